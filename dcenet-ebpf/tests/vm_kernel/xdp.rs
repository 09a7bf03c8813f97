//! XDP programs: frames whose ends are moved, in the VM and by `BPF_PROG_TEST_RUN`.

use std::os::fd::{AsRawFd, OwnedFd};

use dcenet_core::test_support::{Rung, effort, require};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::insn::{Cond, Helper, Imm64, Insn, Reg, Reg::*, Size, encode};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::{Array, Map};
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::program::{Program, TestRun};
use dcenet_ebpf::vm::{Environment, Maps, PlantedBug, Redirect, Vm, Xdp, XdpAction};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

const RESULTS: usize = 256;
/// Offsets in `struct xdp_md`.
const DATA: i16 = 0;
const DATA_END: i16 = 4;
const DATA_META: i16 = 8;

/// What a program does with its frame, one after the other.
#[derive(Debug, Clone)]
enum Step {
    Adjust(Helper, i32),
    /// Reads so many bytes at an offset by address, where they are in the frame.
    Peek(i16),
    /// Writes by address.
    Poke(i16, i32),
    /// Reads the first word of the metadata, where there is one.
    Meta,
    Load(i32, i32),
    Store(i32, i32),
}

fn step() -> impl Strategy<Value = Step> {
    let helper = prop_oneof![
        3 => Just(Helper::XdpAdjustHead),
        3 => Just(Helper::XdpAdjustTail),
        2 => Just(Helper::XdpAdjustMeta)
    ];
    let delta = prop_oneof![
        4 => -40i32..40,
        1 => prop::sample::select(vec![-216, -217, -4096, 4096, i32::MIN, i32::MAX, 0]),
        2 => (-10i32..10).prop_map(|words| words * 4),
    ];
    let offset = || prop_oneof![5 => 0i32..100, 1 => prop::sample::select(vec![-1, 0xffff, 0x1_0000])];
    prop_oneof![
        4 => (helper, delta).prop_map(|(helper, by)| Step::Adjust(helper, by)),
        2 => (0i16..80).prop_map(Step::Peek),
        1 => (0i16..80, any::<i32>()).prop_map(|(at, value)| Step::Poke(at, value)),
        1 => Just(Step::Meta),
        1 => (offset(), 1i32..16).prop_map(|(at, len)| Step::Load(at, len)),
        1 => (offset(), 1i32..16).prop_map(|(at, len)| Step::Store(at, len)),
    ]
}

/// Puts a result at the next place of `results`, which `R9` points to.
fn keep(asm: &mut Asm, place: &mut i16, reg: Reg) {
    asm.store(Size::Dw, R9, *place, reg);
    *place += 8;
    assert!(usize::from(place.unsigned_abs()) <= RESULTS * 8, "more results than there is room for");
}

fn object(steps: &[Step], result: i32) -> Object {
    let mut asm = Asm::program("test", ProgramKind::Xdp);
    let found = asm.label();
    asm.mov(R6, R1).store(Size::W, R10, -4, 0).load_map(R1, "results").mov(R2, R10).add(R2, -4);
    asm.call(Helper::MapLookupElem).jump_if(Cond::Ne, R0, 0, found).ret(-1).bind(found).mov(R9, R0);
    let mut place = 0;
    for step in steps {
        let outside = asm.label();
        match *step {
            Step::Adjust(helper, by) => {
                asm.mov(R1, R6).mov32(R2, by).call(helper).mov(R7, R0);
            }
            Step::Peek(at) | Step::Poke(at, _) => {
                asm.mov(R7, -1).load(Size::W, R2, R6, DATA).load(Size::W, R3, R6, DATA_END);
                asm.mov(R4, R2).add(R4, i32::from(at) + 4).jump_if(Cond::Gt, R4, R3, outside);
                match *step {
                    Step::Poke(_, value) => asm.store(Size::W, R2, at, value).mov(R7, 1),
                    _ => asm.load(Size::W, R7, R2, at),
                };
            }
            Step::Meta => {
                asm.mov(R7, -1).load(Size::W, R2, R6, DATA_META).load(Size::W, R3, R6, DATA);
                asm.mov(R4, R2).add(R4, 4).jump_if(Cond::Gt, R4, R3, outside).load(Size::W, R7, R2, 0);
            }
            Step::Load(at, len) => {
                asm.store(Size::Dw, R10, -16, 7).store(Size::Dw, R10, -24, 7);
                asm.mov(R1, R6).mov32(R2, at).mov(R3, R10).add(R3, -24).mov(R4, len).call(Helper::XdpLoadBytes);
                asm.load(Size::Dw, R7, R10, -24).xor(R7, R0);
            }
            Step::Store(at, len) => {
                asm.mov(R1, R6).mov32(R2, at).mov(R3, R9).mov(R4, len).call(Helper::XdpStoreBytes).mov(R7, R0);
            }
        }
        asm.bind(outside);
        keep(&mut asm, &mut place, R7);
    }
    asm.mov(R1, R6).call(Helper::XdpGetBuffLen);
    keep(&mut asm, &mut place, R0);
    for field in [12, 16] {
        asm.load(Size::W, R1, R6, field);
        keep(&mut asm, &mut place, R1);
    }
    asm.ret(result);
    let mut object = Object::new();
    object.add_map(MapSpec::array("results", RESULTS as u32 * 8, 1)).unwrap();
    object.add(asm.finish().unwrap()).unwrap();
    object
}

#[derive(Debug, PartialEq)]
struct Judgement {
    value: u32,
    results: Vec<u64>,
    meta: Vec<u8>,
    packet: Vec<u8>,
}

fn by_kernel(object: &Object, meta: &[u8], packet: &[u8]) -> Judgement {
    // Without a loader, as each parses the kernel's BTF anew.
    let results = OwnedFd::from(Map::create(&object.maps()[0]).unwrap());
    let mut insns = object.link("test").unwrap().insns().to_vec();
    for insn in &mut insns {
        if let Insn::LoadImm64 { value: Imm64::MapFd(fd), .. } = insn {
            *fd = results.as_raw_fd();
        }
    }
    let program = Program::load(ProgramKind::Xdp, "test", &encode(&insns));
    let program = program.unwrap_or_else(|error| panic!("{error}\n{}", error.log()));
    let input = [meta, packet].concat();
    // Metadata stands in front of the data, and `data` tells how much there is; device and queue are the default's.
    let mut context = [0; 24];
    context[..4].copy_from_slice(&(meta.len() as u32).to_le_bytes());
    context[4..8].copy_from_slice(&(input.len() as u32).to_le_bytes());
    let run = program.test_run(&TestRun { packet: &input, context: &context, repeat: 1 }).unwrap();
    let data = u32::from_le_bytes(run.context[..4].try_into().unwrap()) as usize;
    let results = Array::<[u64; RESULTS]>::new(Map::from_fd(results).unwrap()).unwrap();
    let (meta, packet) = run.packet.split_at(data);
    Judgement {
        value: run.retval,
        results: results.load(0).unwrap().to_vec(),
        meta: meta.to_vec(),
        packet: packet.to_vec(),
    }
}

fn by_vm(object: &Object, meta: &[u8], packet: &[u8], bug: Option<PlantedBug>) -> Judgement {
    let mut vm = Vm::new(&object.link("test").unwrap()).unwrap();
    if let Some(bug) = bug {
        vm.plant_bug(bug);
    }
    let mut maps = Maps::new(object.maps());
    let mut frame = Xdp { meta: meta.to_vec(), ..Xdp::new(packet) };
    let run = vm.run_xdp(&mut frame, &mut maps, &mut Environment::default());
    let run = run.unwrap_or_else(|trap| panic!("{trap}"));
    let results = maps.get("results").unwrap().lookup(&[0; 4]).unwrap();
    let results = results.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    Judgement { value: run.value, results, meta: frame.meta, packet: frame.packet }
}

/// How many of so many generated programs and frames the two judge differently.
fn disagreements(cases: usize, bug: Option<PlantedBug>) -> usize {
    let mut runner = TestRunner::deterministic();
    let inputs = (
        prop::collection::vec(step(), 1..30),
        (0usize..=8).prop_map(|words| words * 4),
        prop::collection::vec(any::<u8>(), 14..120),
        0i32..6,
    );
    // Older kernels, 6.1 for one, have at most 32 bytes of metadata, which the VM does not imitate: nothing grows there.
    let growing = object(&[Step::Adjust(Helper::XdpAdjustMeta, -36)], 0);
    let grows = by_kernel(&growing, &[], &[0; 14]).results[0] == 0;
    let mut moved = 0;
    let mut wrong = 0;
    for _ in 0..cases {
        let (mut steps, meta, packet, result) = inputs.new_tree(&mut runner).unwrap().current();
        steps.retain(|step| grows || !matches!(step, Step::Adjust(Helper::XdpAdjustMeta, ..0)));
        let object = object(&steps, result);
        let meta: Vec<u8> = (0..meta as u8).map(|byte| byte ^ 0x5a).collect();
        let (kernel, vm) = (by_kernel(&object, &meta, &packet), by_vm(&object, &meta, &packet, bug));
        moved += usize::from(kernel.packet.len() != packet.len());
        if kernel != vm {
            wrong += 1;
            assert!(bug.is_some(), "kernel {kernel:?}\nVM {vm:?}\n{steps:?}\nmeta {meta:?}\npacket {packet:?}");
        }
    }
    assert!(moved > cases / 4, "{moved} of {cases} frames changed their length");
    wrong
}

#[test]
fn frames_and_results_agree_with_the_kernel() {
    if require(Rung::Kernel) {
        assert_eq!(disagreements(effort(15, 300, 5_000), None), 0);
    }
}

#[test]
fn a_planted_bug_in_adjust_tail_is_found() {
    if require(Rung::Kernel) {
        assert!(disagreements(effort(15, 100, 100), Some(PlantedBug::GrownTailKept)) > 0);
    }
}

#[test]
fn redirects_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    for (flags, action) in [(0, XdpAction::Redirect), (1, XdpAction::Aborted)] {
        let mut asm = Asm::program("test", ProgramKind::Xdp);
        asm.mov(R1, 7).mov(R2, flags).call(Helper::Redirect).exit();
        let mut object = Object::new();
        object.add(asm.finish().unwrap()).unwrap();
        let mut loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
        let program = loaded.take_program("test").unwrap();
        let kernel = program.test_run(&TestRun { packet: &[0; 64], context: &[], repeat: 1 }).unwrap();
        let mut vm = Vm::new(&object.link("test").unwrap()).unwrap();
        let run = vm.run_xdp(&mut Xdp::new([0; 64]), &mut Maps::new(&[]), &mut Environment::default()).unwrap();
        assert_eq!((kernel.retval, run.value), (action as u32, action as u32));
        let redirect = (action == XdpAction::Redirect).then_some(Redirect { ifindex: 7, ingress: false });
        assert_eq!(run.redirect, redirect);
    }
}
