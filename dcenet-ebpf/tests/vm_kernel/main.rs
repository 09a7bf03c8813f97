//! The VM against the kernel (`BPF_PROG_TEST_RUN`) and against rbpf: the same bytecode, the same results.

#![cfg(feature = "aya")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod helpers;
mod prefixes;
mod tails;
mod xdp;

use std::sync::{Mutex, OnceLock};

use aya::EbpfLoader;
use aya::maps::{Array, MapData};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::insn::{
    AluOp, AtomicOp, Cond, Helper, Insn, IsaLevel, Order, Reg, Reg::*, Size, Src, SwapWidth, Width, encode,
};
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::vm::{Environment, Maps, PlantedBug, Skb, Update, Vm};
use proptest::prelude::*;
use proptest::sample::select;

/// Numbers at which operations change their minds.
const OPERANDS: [u64; 16] = [
    0,
    1,
    2,
    7,
    31,
    32,
    64,
    0x80,
    0x8000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    i64::MAX as u64,
    i64::MIN as u64,
    u64::MAX,
];
const IMMEDIATES: [i32; 8] = [0, 1, 5, 31, 0x7f, -1, i32::MAX, i32::MIN];

const INPUTS: usize = 16;
const RESULTS: usize = 1024;
const NAME: &str = "test";

/// Begins a program with `inputs` in `R8` and `results` in `R9`.
fn begin() -> Asm {
    let mut asm = Asm::program(NAME, ProgramKind::Classifier);
    asm.isa(IsaLevel::V4).mov(R6, R1);
    for (map, to) in [("inputs", R8), ("results", R9)] {
        let found = asm.label();
        asm.store(Size::W, R10, -4, 0).load_map(R1, map).mov(R2, R10).add(R2, -4).call(Helper::MapLookupElem);
        asm.jump_if(Cond::Ne, R0, 0, found).ret(-1).bind(found).mov(to, R0);
    }
    asm
}

/// Ends it and puts it in an object.
fn object(asm: Asm) -> Object {
    let mut object = Object::new();
    object.add_map(MapSpec::array("inputs", INPUTS as u32 * 8, 1)).unwrap();
    object.add_map(MapSpec::array("results", RESULTS as u32 * 8, 1)).unwrap();
    object.add(asm.finish().unwrap()).unwrap();
    object
}

#[derive(Debug, PartialEq)]
struct Judgement {
    value: u32,
    results: Vec<u64>,
}

fn by_kernel(object: &Object, inputs: &[u64; INPUTS], packet: &[u8]) -> Judgement {
    // One loader for all tests, as each parses the kernel's BTF anew.
    static LOADER: OnceLock<Mutex<EbpfLoader<'static>>> = OnceLock::new();
    let loader = LOADER.get_or_init(|| Mutex::new(EbpfLoader::new()));
    let mut loaded = loader.lock().unwrap().load(&object.to_elf().unwrap()).unwrap();
    let mut map: Array<&mut MapData, [u64; INPUTS]> = loaded.map_mut("inputs").unwrap().try_into().unwrap();
    map.set(0, inputs, 0).unwrap();
    let program: &mut SchedClassifier = loaded.program_mut(NAME).unwrap().try_into().unwrap();
    program.load().unwrap_or_else(|error| panic!("{error:?}"));
    let value =
        program.test_run(TestRunOptions { data_in: Some(packet), ..TestRunOptions::new() }).unwrap().return_value;
    let map: Array<&MapData, [u64; RESULTS]> = loaded.map("results").unwrap().try_into().unwrap();
    Judgement { value, results: map.get(&0, 0).unwrap().to_vec() }
}

fn by_vm(object: &Object, inputs: &[u64; INPUTS], packet: &[u8], bug: Option<PlantedBug>) -> Judgement {
    let program = object.link(NAME).unwrap();
    let mut maps = Maps::new(object.maps());
    let bytes: Vec<u8> = inputs.iter().flat_map(|input| input.to_le_bytes()).collect();
    maps.get_mut("inputs").unwrap().update(&[0; 4], &bytes, Update::Any).unwrap();
    let mut vm = Vm::new(&program).unwrap();
    if let Some(bug) = bug {
        vm.plant_bug(bug);
    }
    let run = vm.run(&mut Skb::new(packet), &mut maps, &mut Environment::default());
    let run = run.unwrap_or_else(|trap| panic!("{trap}"));
    let results = maps.get("results").unwrap().lookup(&[0; 4]).unwrap();
    let results = results.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    Judgement { value: run.value, results }
}

const PACKET: [u8; 64] = {
    let mut packet = [0; 64];
    let mut at = 0;
    while at < 64 {
        packet[at] = (at * 37 + 11) as u8;
        at += 1;
    }
    packet[12] = 0x08;
    packet[13] = 0x00;
    packet
};

#[track_caller]
fn agree(asm: Asm) {
    let object = object(asm);
    let (kernel, vm) = (by_kernel(&object, &OPERANDS, &PACKET), by_vm(&object, &OPERANDS, &PACKET, None));
    if kernel != vm {
        let text = dcenet_ebpf::insn::disassemble(object.functions()[0].insns());
        let differ: Vec<_> = kernel.results.iter().zip(&vm.results).enumerate().filter(|(_, (k, v))| k != v).collect();
        panic!("kernel {:#x}, VM {:#x}, results {differ:#x?}\n{text}", kernel.value, vm.value);
    }
}

/// Hands out places for results.
struct Place(i16);

impl Place {
    fn next(&mut self) -> i16 {
        let at = self.0;
        self.0 += 8;
        assert!(at < RESULTS as i16 * 8, "more results than there is room for");
        at
    }
}

/// Every pair of operands in `R1` and `R2`, then `with`; every operand in `R1` with every constant, then `with`.
fn operands(asm: &mut Asm, with: impl Fn(&mut Asm, Src, i16)) {
    let mut place = Place(0);
    let input = |at: usize| at as i16 * 8;
    for a in 0..INPUTS {
        for b in 0..INPUTS {
            asm.load(Size::Dw, R1, R8, input(a)).load(Size::Dw, R2, R8, input(b));
            with(asm, Src::Reg(R2), place.next());
        }
        for imm in IMMEDIATES {
            asm.load(Size::Dw, R1, R8, input(a));
            with(asm, Src::Imm(imm), place.next());
        }
    }
}

/// Whether the verifier takes this constant operand.
fn takes(width: Width, op: AluOp, src: Src) -> bool {
    let Src::Imm(imm) = src else { return true };
    let bits = if width == Width::W64 { 64 } else { 32 };
    match op {
        AluOp::Div | AluOp::Mod | AluOp::Sdiv | AluOp::Smod => imm != 0,
        AluOp::Lsh | AluOp::Rsh | AluOp::Arsh => (0..bits).contains(&imm),
        _ => true,
    }
}

#[test]
fn arithmetic_agrees_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    for op in AluOp::ALL {
        for width in [Width::W32, Width::W64] {
            let mut asm = begin();
            operands(&mut asm, |asm, src, place| {
                if takes(width, op, src) {
                    asm.alu(width, op, R1, src).store(Size::Dw, R9, place, R1);
                }
            });
            asm.ret(0);
            agree(asm);
        }
    }
}

fn all_comparisons(cond: Cond, width: Width) -> Asm {
    let mut asm = begin();
    operands(&mut asm, |asm, src, place| {
        let holds = asm.label();
        asm.mov(R3, 1);
        match width {
            Width::W32 => asm.jump_if32(cond, R1, src, holds),
            Width::W64 => asm.jump_if(cond, R1, src, holds),
        };
        asm.mov(R3, 0).bind(holds).store(Size::Dw, R9, place, R3);
    });
    asm.ret(3);
    asm
}

#[test]
fn comparisons_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    for cond in Cond::ALL {
        for width in [Width::W32, Width::W64] {
            agree(all_comparisons(cond, width));
        }
    }
}

#[test]
fn a_planted_bug_in_the_vm_is_found() {
    if !require(Rung::Kernel) {
        return;
    }
    for (cond, wrong) in [(Cond::Slt, true), (Cond::Sge, true), (Cond::Lt, false), (Cond::Eq, false)] {
        let object = object(all_comparisons(cond, Width::W64));
        let kernel = by_kernel(&object, &OPERANDS, &PACKET);
        let vm = by_vm(&object, &OPERANDS, &PACKET, Some(PlantedBug::UnsignedCompare));
        assert_eq!(kernel != vm, wrong, "{cond:?}");
    }
}

#[test]
fn swaps_extensions_and_negation_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut insns = Vec::new();
    for order in [Order::Le, Order::Be, Order::Reverse] {
        for bits in [SwapWidth::W16, SwapWidth::W32, SwapWidth::W64] {
            insns.push(Insn::Swap { order, bits, dst: R1 });
        }
    }
    for width in [Width::W32, Width::W64] {
        insns.push(Insn::Neg { width, dst: R1 });
        for from in [Size::B, Size::H, Size::W] {
            if (width, from) != (Width::W32, Size::W) {
                insns.push(Insn::MovSx { width, from, dst: R1, src: R1 });
            }
        }
    }
    let mut asm = begin();
    let mut place = Place(0);
    for insn in insns {
        for input in 0..INPUTS {
            asm.load(Size::Dw, R1, R8, input as i16 * 8).insn(insn).store(Size::Dw, R9, place.next(), R1);
        }
    }
    asm.ret(0);
    agree(asm);
}

#[test]
fn loads_and_stores_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut asm = begin();
    let mut place = Place(0);
    asm.load(Size::W, R7, R6, 76).load(Size::W, R1, R6, 80).mov(R2, R7).add(R2, 64);
    let long = asm.label();
    asm.jump_if(Cond::Le, R2, R1, long).ret(-2).bind(long);
    asm.store(Size::Dw, R10, -16, -2).store(Size::Dw, R10, -8, 0x1234_5678);
    for size in [Size::B, Size::H, Size::W, Size::Dw] {
        for off in [0, 1, 3, 8, 50] {
            for base in [R7, R8] {
                asm.load(size, R1, base, off).store(Size::Dw, R9, place.next(), R1);
                if size != Size::Dw {
                    asm.insn(Insn::LoadSx { size, dst: R1, base, off }).store(Size::Dw, R9, place.next(), R1);
                }
            }
        }
        let (aligned, odd) = (-16 + size.bytes() as i16, place.next() + 3);
        asm.load(size, R1, R10, aligned).store(Size::Dw, R9, place.next(), R1);
        asm.load(Size::Dw, R1, R8, 120).store(size, R9, odd, R1).store(size, R9, place.next(), -5);
        asm.store(size, R10, -8, 0x7654).load(Size::Dw, R1, R10, -8).store(Size::Dw, R9, place.next(), R1);
        // And into the packet, read back as a whole.
        asm.store(size, R7, 21, 0x5a5b).load(Size::Dw, R1, R7, 20).store(Size::Dw, R9, place.next(), R1);
    }
    asm.ret(0);
    agree(asm);
}

#[test]
fn atomics_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    for op in AtomicOp::ALL {
        let mut asm = begin();
        let mut place = Place(0);
        for size in [Size::W, Size::Dw] {
            for a in [0, 1, 9, 11, 14, 15] {
                for b in [0, 1, 10, 13, 15] {
                    let (memory, source, r0) = (place.next(), place.next(), place.next());
                    asm.load(Size::Dw, R1, R8, a * 8).load(Size::Dw, R2, R8, b * 8).store(Size::Dw, R9, memory, R1);
                    // Half of the compare-and-exchanges find what they expect.
                    asm.mov(R0, if b % 2 == 0 { R1 } else { R2 });
                    asm.atomic(op, size, R9, memory, R2).store(Size::Dw, R9, source, R2).store(Size::Dw, R9, r0, R0);
                }
            }
        }
        asm.ret(0);
        agree(asm);
    }
}

#[test]
fn the_context_agrees_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut asm = begin();
    let mut place = Place(0);
    // len, pkt_type, mark, queue_mapping, protocol, vlan_*, priority, ingress_ifindex, ifindex, tc_index.
    for off in (0..48).step_by(4) {
        asm.load(Size::W, R1, R6, off).store(Size::Dw, R9, place.next(), R1);
    }
    asm.load(Size::H, R1, R6, 16).store(Size::Dw, R9, place.next(), R1);
    asm.load(Size::B, R1, R6, 1).store(Size::Dw, R9, place.next(), R1);
    asm.load(Size::W, R1, R6, 80).load(Size::W, R2, R6, 76).sub(R1, R2).store(Size::Dw, R9, place.next(), R1);
    for off in [8, 32, 44, 48, 64, 72] {
        asm.mov(R1, i32::from(off) + 1000).store(Size::W, R6, off, R1);
        asm.load(Size::W, R1, R6, off).store(Size::Dw, R9, place.next(), R1);
    }
    asm.store(Size::B, R6, 49, 0x77).load(Size::W, R1, R6, 48).store(Size::Dw, R9, place.next(), R1);
    asm.ret(0);
    let object = object(asm);
    for mac in [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1], [2, 0, 0, 0, 0, 1]] {
        let mut packet = PACKET;
        packet[..6].copy_from_slice(&mac);
        let (kernel, vm) = (by_kernel(&object, &OPERANDS, &packet), by_vm(&object, &OPERANDS, &packet, None));
        assert_eq!(kernel, vm, "{mac:02x?}");
    }
}

/// Calls a helper and stores its result.
fn call(asm: &mut Asm, place: &mut Place, helper: Helper) {
    let at = place.next();
    asm.call(helper).store(Size::Dw, R9, at, R0);
}

#[test]
fn maps_and_their_errors_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut asm = begin();
    let mut place = Place(0);
    for map in ["hash", "lru", "array", "percpu", "percpu_hash"] {
        // Absent, created, created again, replaced, bad flags, beyond the end, deleted, deleted again.
        let steps = [
            (Some(0), 2, 1),
            (Some(1), 2, 1),
            (Some(1), 2, 2),
            (Some(2), 2, 3),
            (Some(7), 2, 4),
            (Some(0), 1, 5),
            (Some(0), 3, 6),
            (Some(0), 900, 7),
            (None, 3, 0),
            (None, 3, 0),
            (Some(1), 3, 8),
            (None, 900, 0),
        ];
        for (flags, key, value) in steps {
            asm.store(Size::W, R10, -4, key).store(Size::Dw, R10, -16, value);
            asm.load_map(R1, map).mov(R2, R10).add(R2, -4);
            if let Some(flags) = flags {
                asm.mov(R3, R10).add(R3, -16).mov(R4, flags);
                call(&mut asm, &mut place, Helper::MapUpdateElem);
            } else {
                call(&mut asm, &mut place, Helper::MapDeleteElem);
            }
            let (absent, at) = (asm.label(), place.next());
            asm.load_map(R1, map).mov(R2, R10).add(R2, -4).call(Helper::MapLookupElem);
            asm.mov(R1, -1).jump_if(Cond::Eq, R0, 0, absent).load(Size::Dw, R1, R0, 0).bind(absent);
            asm.store(Size::Dw, R9, at, R1);
        }
    }
    asm.ret(0);
    let mut object = object(asm);
    object.add_map(MapSpec::hash("hash", 4, 8, 2)).unwrap();
    // The kernel's LRU has room per CPU and drops before it is full: only its codes are compared, at ample size.
    object.add_map(MapSpec::lru_hash("lru", 4, 8, 1024)).unwrap();
    object.add_map(MapSpec::array("array", 8, 4)).unwrap();
    object.add_map(MapSpec::percpu_array("percpu", 8, 4)).unwrap();
    object.add_map(MapSpec::percpu_hash("percpu_hash", 4, 8, 2)).unwrap();
    assert_eq!(by_kernel(&object, &OPERANDS, &PACKET), by_vm(&object, &OPERANDS, &PACKET, None));
}

#[test]
fn packet_and_ring_buffer_helpers_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut asm = begin();
    let mut place = Place(0);
    for (offset, len) in [(0, 8), (14, 20), (60, 4), (61, 4), (64, 1), (-1, 8)] {
        for off in [-32, -24, -16] {
            asm.store(Size::Dw, R10, off, 9);
        }
        asm.mov(R1, R6).mov32(R2, offset).mov(R3, R10).add(R3, -32).mov(R4, len);
        call(&mut asm, &mut place, Helper::SkbLoadBytes);
        asm.load(Size::Dw, R1, R10, -32).store(Size::Dw, R9, place.next(), R1);
        asm.mov(R1, R6).mov(R2, offset).mov(R3, R8).mov(R4, len).mov(R5, 0);
        call(&mut asm, &mut place, Helper::SkbStoreBytes);
    }
    for len in [0, 64, 65] {
        asm.mov(R1, R6).mov(R2, len);
        call(&mut asm, &mut place, Helper::SkbPullData);
    }
    for flags in [0, 1, 2] {
        asm.mov(R1, 5).mov(R2, flags);
        call(&mut asm, &mut place, Helper::Redirect);
    }
    // 4096 bytes hold two records of 2000 bytes with headers, not three.
    for _ in 0..3 {
        asm.load_map(R1, "ring").mov(R2, R9).mov(R3, 2000).mov(R4, 0);
        call(&mut asm, &mut place, Helper::RingbufOutput);
    }
    asm.load_map(R1, "ring").mov(R2, 2000).mov(R3, 0).call(Helper::RingbufReserve);
    let full = asm.label();
    asm.mov(R7, 0).jump_if(Cond::Eq, R0, 0, full).mov(R1, R0).mov(R2, 0).mov(R7, 1);
    asm.call(Helper::RingbufDiscard).bind(full).store(Size::Dw, R9, place.next(), R7);
    asm.ret(0);
    let mut object = object(asm);
    object.add_map(MapSpec::ringbuf("ring", 4096)).unwrap();
    assert_eq!(by_kernel(&object, &OPERANDS, &PACKET), by_vm(&object, &OPERANDS, &PACKET, None));
}

#[test]
fn calls_and_loops_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut asm = begin();
    let mut place = Place(0);
    asm.mov(R1, 1).mov(R6, 77).store(Size::Dw, R10, -8, 0).call_function("deep1");
    asm.store(Size::Dw, R9, place.next(), R0).store(Size::Dw, R9, place.next(), R6);
    for rounds in [0, 1, 5, 100, 9_000_000] {
        asm.mov(R1, rounds).load_function(R2, "add_up").mov(R3, R10).add(R3, -8).mov(R4, 0);
        call(&mut asm, &mut place, Helper::Loop);
        asm.load(Size::Dw, R1, R10, -8).store(Size::Dw, R9, place.next(), R1);
    }
    asm.ret(0);
    let mut object = object(asm);
    for depth in 1..=6 {
        let mut deep = Asm::subprogram(format!("deep{depth}"));
        deep.mov(R6, R1).lsh(R1, 1).store(Size::Dw, R10, -8, R6);
        if depth < 6 {
            deep.call_function(format!("deep{}", depth + 1));
        } else {
            deep.mov(R0, R1);
        }
        deep.load(Size::Dw, R1, R10, -8).add(R0, R1).add(R0, R6).exit();
        object.add(deep.finish().unwrap()).unwrap();
    }
    // Adds the round to the number it is given; stops after round 40.
    let mut add_up = Asm::subprogram("add_up");
    let stop = add_up.label();
    add_up.load(Size::Dw, R3, R2, 0).add(R3, R1).store(Size::Dw, R2, 0, R3);
    add_up.jump_if(Cond::Ge, R1, 40, stop).ret(0).bind(stop).ret(1);
    object.add(add_up.finish().unwrap()).unwrap();
    assert_eq!(by_kernel(&object, &OPERANDS, &PACKET), by_vm(&object, &OPERANDS, &PACKET, None));
}

/// Registers that random programs compute in.
const SCALARS: [Reg; 7] = [R0, R1, R2, R3, R4, R5, R7];

#[derive(Debug, Clone)]
enum Step {
    Insn(Insn),
    /// Skips the next steps.
    Branch(Width, Cond, Reg, Src, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let reg = || select(SCALARS.to_vec());
    let imm = || prop_oneof![select(IMMEDIATES.to_vec()), any::<i32>()];
    let src = move || prop_oneof![reg().prop_map(Src::Reg), imm().prop_map(Src::Imm)];
    let width = || select(vec![Width::W32, Width::W64]);
    let alu = (width(), select(AluOp::ALL.to_vec()), reg(), src())
        .prop_map(|(width, op, dst, src)| Step::Insn(Insn::Alu { width, op, dst, src }));
    let swap =
        (select(vec![Order::Le, Order::Be]), select(vec![SwapWidth::W16, SwapWidth::W32, SwapWidth::W64]), reg())
            .prop_map(|(order, bits, dst)| Step::Insn(Insn::Swap { order, bits, dst }));
    let neg = (width(), reg()).prop_map(|(width, dst)| Step::Insn(Insn::Neg { width, dst }));
    let branch = (width(), select(Cond::ALL.to_vec()), reg(), src(), 1usize..5)
        .prop_map(|(width, cond, dst, src, skip)| Step::Branch(width, cond, dst, src, skip));
    prop_oneof![6 => alu, 1 => swap, 1 => neg, 2 => branch]
}

/// Up to 120 steps that the verifier takes, of which `can` keeps some.
fn steps(step: impl Strategy<Value = Step>, can: fn(&Step) -> bool) -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step, 1..120).prop_map(move |mut steps| {
        steps.retain(|step| match step {
            Step::Insn(Insn::Alu { width, op, src, .. }) => takes(*width, *op, *src) && can(step),
            _ => can(step),
        });
        steps
    })
}

/// rbpf 0.4 knows no ISA v4 and departs from RFC 9669: it panics on the negation of the least number, zero-extends the
/// constant of a 64-bit jump, and keeps the upper half of a 32-bit remainder by zero.
fn rbpf_can(step: &Step) -> bool {
    match step {
        Step::Insn(Insn::Neg { .. } | Insn::Alu { width: Width::W32, op: AluOp::Mod, .. }) => false,
        Step::Insn(insn) => insn.isa_level() < IsaLevel::V4,
        Step::Branch(width, _, _, src, _) => !matches!((width, src), (Width::W64, Src::Imm(..0))),
    }
}

/// Writes the steps.
fn write(asm: &mut Asm, steps: &[Step]) {
    let mut waiting = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        waiting.retain(|(until, label)| {
            if *until == at {
                asm.bind(*label);
            }
            *until != at
        });
        match *step {
            Step::Insn(insn) => {
                asm.insn(insn);
            }
            Step::Branch(width, cond, dst, src, skip) => {
                let label = asm.label();
                waiting.push((at + 1 + skip, label));
                match width {
                    Width::W32 => asm.jump_if32(cond, dst, src, label),
                    Width::W64 => asm.jump_if(cond, dst, src, label),
                };
            }
        }
    }
    for (_, label) in waiting {
        asm.bind(label);
    }
}

/// Memory, extension and atomic steps come from the kernel-only set.
fn kernel_step() -> impl Strategy<Value = Step> {
    let reg = || select(SCALARS.to_vec());
    let size = || select(vec![Size::B, Size::H, Size::W, Size::Dw]);
    let load = (size(), reg(), 0i16..120).prop_map(|(size, dst, off)| Insn::Load { size, dst, base: R8, off });
    let load_sx = (select(vec![Size::B, Size::H, Size::W]), reg(), 0i16..120)
        .prop_map(|(size, dst, off)| Insn::LoadSx { size, dst, base: R8, off });
    let store = (size(), reg(), 0i16..1000).prop_map(|(size, reg, off)| Insn::Store {
        size,
        base: R9,
        off,
        src: Src::Reg(reg),
    });
    let atomic = (select(AtomicOp::ALL.to_vec()), select(vec![Size::W, Size::Dw]), reg(), 0i16..100)
        .prop_map(|(op, size, src, word)| Insn::Atomic { op, size, base: R9, off: word * 8, src });
    let movsx = (select(vec![Size::B, Size::H]), select(vec![Width::W32, Width::W64]), reg(), reg())
        .prop_map(|(from, width, dst, src)| Insn::MovSx { width, from, dst, src });
    prop_oneof![8 => step(), 3 => prop_oneof![load, load_sx, store, atomic, movsx].prop_map(Step::Insn)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_programs_agree_with_the_kernel(
        steps in steps(kernel_step(), |_| true),
        inputs in prop::array::uniform16(prop_oneof![any::<u64>(), select(OPERANDS.to_vec())]),
    ) {
        if !require(Rung::Kernel) {
            return Ok(());
        }
        let mut asm = begin();
        for (at, reg) in SCALARS.into_iter().enumerate() {
            asm.load(Size::Dw, reg, R8, at as i16 * 8);
        }
        write(&mut asm, &steps);
        for (at, reg) in SCALARS.into_iter().enumerate() {
            asm.store(Size::Dw, R9, 2000 + at as i16 * 8, reg);
        }
        asm.exit();
        let object = object(asm);
        let (kernel, vm) = (by_kernel(&object, &inputs, &PACKET), by_vm(&object, &inputs, &PACKET, None));
        prop_assert!(kernel == vm, "{}", dcenet_ebpf::insn::disassemble(object.functions()[0].insns()));
    }

    /// Needs no kernel.
    #[test]
    fn random_programs_agree_with_rbpf(
        steps in steps(step(), rbpf_can),
        inputs in prop::array::uniform16(prop_oneof![any::<u64>(), select(OPERANDS.to_vec())]),
    ) {
        let mut asm = Asm::program(NAME, ProgramKind::Classifier);
        for (reg, input) in SCALARS.into_iter().zip(inputs) {
            asm.load_imm64(reg, input);
        }
        write(&mut asm, &steps);
        // The whole state in one number.
        for reg in &SCALARS[1..] {
            asm.mul(R0, 31).add(R0, *reg);
        }
        asm.mov(R1, R0).rsh(R1, 32).xor(R0, R1).exit();
        let mut object = Object::new();
        object.add(asm.finish().unwrap()).unwrap();
        let program = object.link(NAME).unwrap();
        let code = encode(program.insns());
        let rbpf = rbpf::EbpfVmNoData::new(Some(&code)).unwrap().execute_program().unwrap();
        let mut vm = Vm::new(&program).unwrap();
        let run = vm.run(&mut Skb::new(PACKET), &mut Maps::new(&[]), &mut Environment::default()).unwrap();
        prop_assert_eq!(run.value, rbpf as u32, "{}", dcenet_ebpf::insn::disassemble(program.insns()));
    }
}
