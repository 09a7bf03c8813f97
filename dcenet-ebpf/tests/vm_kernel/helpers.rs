//! Helpers that change checksums or ask for devices and routes: success and every errno.

use dcenet_core::test_support::{Rung, TestHost, effort, require};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::insn::{Cond, Helper, Reg::*, Size};
use dcenet_ebpf::object::{Object, ProgramKind};
use dcenet_ebpf::vm::{Environment, Maps, Redirect, Route, SentClone, Skb, TrapKind, Vm};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::{OPERANDS, PACKET, Place, begin, by_kernel, by_vm, call, object};

const EINVAL: u64 = -22i64 as u64;
const EFAULT: u64 = -14i64 as u64;

/// `helper(skb, offset, from, to, flags)`, its result, and the two bytes of the packet after.
fn replace(asm: &mut Asm, place: &mut Place, helper: Helper, [offset, flags]: [i32; 2], [from, to]: [u64; 2]) {
    asm.mov(R1, R6).mov32(R2, offset).load_imm64(R3, from).load_imm64(R4, to).mov(R5, flags);
    call(asm, place, helper);
    let at = place.next();
    asm.store(Size::Dw, R10, -16, 0).mov(R1, R6).mov(R2, offset & 0x3e).mov(R3, R10).add(R3, -16).mov(R4, 2);
    asm.call(Helper::SkbLoadBytes).load(Size::Dw, R1, R10, -16).store(Size::Dw, R9, at, R1);
}

#[test]
fn checksum_replacement_agrees_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut seen = std::collections::BTreeSet::new();
    let mut runner = TestRunner::deterministic();
    let word =
        || prop_oneof![Just(0u64), Just(0xffff), Just(0xffff_ffff), any::<u16>().prop_map(u64::from), any::<u64>()];
    // With BPF_F_PSEUDO_HDR, BPF_F_MARK_MANGLED_0 and BPF_F_MARK_ENFORCE, which only transport checksums know.
    let flags = prop_oneof![
        6 => prop::sample::select(vec![0, 2, 4]),
        4 => prop::sample::select(vec![0x10 | 2, 0x10 | 4, 0x20 | 2, 0x20, 0x60 | 4, 0x30 | 4]),
        1 => prop::sample::select(vec![1, 3, 8, 0x102, -1])
    ];
    let offset =
        prop_oneof![6 => (7i32..31).prop_map(|at| at * 2), 1 => prop::sample::select(vec![15, 63, 64, 0x1_0000, -2])];
    let steps = prop::collection::vec((prop::bool::ANY, offset, flags, word(), word()), 25);
    let cases = (steps, prop::collection::vec(sparse(), 64));
    for _ in 0..effort(4, 40, 1_000) {
        let (steps, packet) = cases.new_tree(&mut runner).unwrap().current();
        let mut asm = begin();
        let mut place = Place(0);
        for (l3, offset, flags, from, to) in &steps {
            let helper = if *l3 { Helper::L3CsumReplace } else { Helper::L4CsumReplace };
            // A ready difference has no "from".
            let from = if flags & 0xf == 0 && to % 3 > 0 { 0 } else { *from };
            replace(&mut asm, &mut place, helper, [*offset, *flags], [from, *to]);
        }
        asm.ret(0);
        let object = object(asm);
        let kernel = by_kernel(&object, &OPERANDS, &packet);
        assert_eq!(by_vm(&object, &OPERANDS, &packet, None), kernel, "{steps:x?} {packet:x?}");
        seen.extend(kernel.results.iter().step_by(2).take(steps.len()).copied());
    }
    assert_eq!(Vec::from_iter(seen), [0, EINVAL, EFAULT]);
}

/// Half of the bytes are 0 or 0xff, where one's complement sums are odd.
fn sparse() -> impl Strategy<Value = u8> {
    prop_oneof![Just(0u8), Just(0xff), any::<u8>(), any::<u8>()]
}

/// Where bytes lie in the inputs, of which there are 128, and how many.
type Bytes = (Option<i32>, i32);

/// The difference of sums of each pair with each seed, folded to 16 bits unless it is an error.
fn differences(cases: &[(Bytes, Bytes)]) -> Object {
    let mut asm = begin();
    let mut place = Place(0);
    for (from, to) in cases {
        for seed in [0, 1, 0x7fff_ffff, -1] {
            for (reg, size, (at, bytes)) in [(R1, R2, *from), (R3, R4, *to)] {
                match at {
                    Some(at) => asm.mov(reg, R8).add(reg, at),
                    None => asm.mov(reg, 0),
                };
                asm.mov(size, bytes);
            }
            // Kernels before 6.13 leave the sum in 32 bits.
            let (negative, at) = (asm.label(), place.next());
            asm.mov32(R5, seed).call(Helper::CsumDiff).jump_if(Cond::Slt, R0, 0, negative);
            for _ in 0..2 {
                asm.mov(R1, R0).rsh(R1, 16).and(R0, 0xffff).add(R0, R1);
            }
            asm.bind(negative).store(Size::Dw, R9, at, R0);
        }
    }
    asm.ret(0);
    object(asm)
}

#[test]
fn differences_of_sums_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let none = (None, 0);
    let at = |at, bytes| (Some(at), bytes);
    let words = differences(&[
        (none, none),
        (none, at(8, 4)),
        (none, at(8, 112)),
        (at(8, 4), none),
        (at(40, 80), none),
        (at(8, 4), at(56, 4)),
        (at(8, 40), at(48, 64)),
        (at(8, 0), at(48, 4)),
    ]);
    let odd = differences(&[(at(8, 3), at(48, 4)), (at(8, 4), at(48, 6)), (at(41, 1), none), (none, at(40, 5))]);
    let judge = |object: &Object| (by_kernel(object, &OPERANDS, &PACKET), by_vm(object, &OPERANDS, &PACKET, None));
    let (of_odd, of_words) = (judge(&odd), judge(&words));
    // Kernels before 6.13 refuse odd sizes, and may write a sum of zero as 0xffff; the VM is as later ones.
    let new = of_odd.0.results[0] != EINVAL;
    let zero = |sum: &u64| if *sum == 0xffff && !new { 0 } else { *sum };
    let sums = |results: &[u64]| results.iter().map(zero).collect::<Vec<_>>();
    assert_eq!(sums(&of_words.0.results), sums(&of_words.1.results));
    assert!(of_words.0.results.iter().filter(|sum| **sum != 0).count() > 20, "sums of something");
    if new {
        assert_eq!(of_odd.0, of_odd.1);
    }
}

#[test]
fn devices_and_routes_agree_with_the_kernel_as_far_as_it_has_them() {
    if !require(Rung::Kernel) {
        return;
    }
    const NOBODY: i32 = 0x7fff_fff0;
    let mut asm = begin();
    let mut place = Place(0);
    for (ifindex, flags) in [(NOBODY, 0), (NOBODY, 1), (1, 4), (1, 0)] {
        asm.mov(R1, R6).mov(R2, ifindex).mov(R3, flags);
        call(&mut asm, &mut place, Helper::CloneRedirect);
    }
    // Family and device of struct bpf_fib_lookup; too short, unknown flags, unknown family, no such device.
    for (size, flags, family, ifindex) in
        [(63, 0, 2, 1), (64, 1 << 16, 2, 1), (64, 0, 1, 1), (64, 0, 2, NOBODY), (64, 0, 10, NOBODY)]
    {
        for off in (-64..0).step_by(8) {
            asm.store(Size::Dw, R10, off, 0);
        }
        asm.store(Size::B, R10, -64, family).store(Size::W, R10, -56, ifindex);
        asm.mov(R1, R6).mov(R2, R10).add(R2, -64).mov(R3, size).mov(R4, flags);
        call(&mut asm, &mut place, Helper::FibLookup);
    }
    asm.ret(0);
    let object = object(asm);
    // Where device 1 is a loopback that is up, and nobody else's.
    let host = TestHost::new();
    let kernel = host.root().run(|| by_kernel(&object, &OPERANDS, &PACKET));
    assert_eq!(kernel, by_vm(&object, &OPERANDS, &PACKET, None));
    let errno = |number: i64| -number as u64;
    assert_eq!(kernel.results[..9], [EINVAL, EINVAL, EINVAL, 0, EINVAL, EINVAL, errno(97), errno(19), errno(19)]);
}

#[test]
fn clones_are_kept_and_routes_answered() {
    let mut asm = Asm::program("test", ProgramKind::Classifier);
    asm.mov(R6, R1).mov(R2, 3).mov(R3, 1).call(Helper::CloneRedirect);
    for off in (-64..0).step_by(8) {
        asm.store(Size::Dw, R10, off, -1);
    }
    asm.store(Size::B, R10, -64, 2).store(Size::W, R10, -56, 3);
    asm.mov(R1, R6).mov(R2, R10).add(R2, -64).mov(R3, 64).mov(R4, 0).call(Helper::FibLookup).mov(R7, R0);
    // Writes what was found over the packet's first 16 bytes.
    asm.mov(R1, R6).mov(R2, 0).mov(R3, R10).add(R3, -16).mov(R4, 16).mov(R5, 0).call(Helper::SkbStoreBytes);
    asm.load(Size::W, R0, R10, -56).lsh(R7, 8).or(R0, R7).exit();
    let mut object = Object::new();
    object.add(asm.finish().unwrap()).unwrap();
    let mut vm = Vm::new(&object.link("test").unwrap()).unwrap();
    let route = Route { ifindex: 9, source_mac: [2, 0, 0, 0, 0, 1], destination_mac: [2, 0, 0, 0, 0, 2], metric: 77 };
    let mut env = Environment { devices: vec![3], route: Some(route), ..Environment::default() };
    let mut skb = Skb::new(PACKET);
    let run = vm.run(&mut skb, &mut Maps::new(&[]), &mut env).unwrap();
    assert_eq!(run.value, 9);
    assert_eq!(skb.packet[..16], [0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2], "no VLAN, both addresses");
    let redirect = Redirect { ifindex: 3, ingress: true };
    assert_eq!(env.clones, [SentClone { redirect, packet: PACKET.to_vec() }]);

    // Nothing of the neighbour where none is asked for, but the metric; other flags are not simulated.
    let fib = |flags: i32, env: &mut Environment| {
        let mut asm = Asm::program("test", ProgramKind::Classifier);
        for off in (-64..0).step_by(8) {
            asm.store(Size::Dw, R10, off, -1);
        }
        asm.store(Size::B, R10, -64, 2).store(Size::W, R10, -56, 3);
        asm.mov(R6, R1).mov(R2, R10).add(R2, -64).mov(R3, 64).mov(R4, flags).call(Helper::FibLookup);
        asm.mov(R1, R6).mov(R2, 0).mov(R3, R10).add(R3, -56).mov(R4, 56).mov(R5, 0).call(Helper::SkbStoreBytes).ret(0);
        let mut object = Object::new();
        object.add(asm.finish().unwrap()).unwrap();
        let (mut skb, mut vm) = (Skb::new(PACKET), Vm::new(&object.link("test").unwrap()).unwrap());
        let run = vm.run(&mut skb, &mut Maps::new(&[]), env);
        run.map(|_| skb.packet[..56].to_vec()).map_err(|trap| trap.kind)
    };
    for (flags, neighbour) in [(0, [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]), (4, [0xff; 12]), (5, [0xff; 12])] {
        let found = fib(flags, &mut env).unwrap();
        assert_eq!(found[..8], [9, 0, 0, 0, 77, 0, 0, 0], "device and metric");
        assert_eq!(found[44..], neighbour, "flags {flags}");
    }
    for flags in [8, 0x10, 0x20] {
        assert!(matches!(fib(flags, &mut env), Err(TrapKind::Argument { argument: 4, .. })), "flags {flags}");
    }

    env.route = None;
    let run = vm.run(&mut Skb::new(PACKET), &mut Maps::new(&[]), &mut env).unwrap();
    assert_eq!(run.value, 3 | 4 << 8, "BPF_FIB_LKUP_RET_NOT_FWDED, and nothing written");

    let mut asm = Asm::program("test", ProgramKind::Classifier);
    asm.mov(R2, R10).add(R2, -64).mov(R3, 64).mov(R4, 0).call(Helper::FibLookup).ret(0);
    let mut object = Object::new();
    object.add(asm.finish().unwrap()).unwrap();
    let mut vm = Vm::new(&object.link("test").unwrap()).unwrap();
    let trap = vm.run(&mut Skb::new(PACKET), &mut Maps::new(&[]), &mut env).unwrap_err();
    assert_eq!(trap.kind, TrapKind::UninitStack(-64));
}
