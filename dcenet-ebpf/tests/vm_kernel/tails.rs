//! Tail calls: where they arrive, where they do not, and how many there may be.

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::insn::{AtomicOp, Cond, Helper, Reg::*, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::{Array, ProgramArray};
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::program::TestRun;
use dcenet_ebpf::vm::{Environment, Maps, PlantedBug, Skb, TailTarget, Vm, VmError};

use super::PACKET;

/// What stands in the array of programs: `entry` itself, nothing, and `other`.
const ITSELF: i32 = 0;
const EMPTY: i32 = 1;
const OTHER: i32 = 2;
const PLACES: u32 = 3;

/// Adds 1 to the only value of `runs`.
fn count(asm: &mut Asm) {
    let absent = asm.label();
    asm.store(Size::W, R10, -4, 0).load_map(R1, "runs").mov(R2, R10).add(R2, -4).call(Helper::MapLookupElem);
    asm.jump_if(Cond::Eq, R0, 0, absent).mov(R1, 1).atomic(AtomicOp::Add, Size::Dw, R0, 0, R1).bind(absent);
}

/// `entry` counts, then does what `go` writes with the context in `R6`; `other` counts and returns 9.
fn object(go: impl FnOnce(&mut Asm)) -> Object {
    let mut entry = Asm::program("entry", ProgramKind::Classifier);
    entry.mov(R6, R1);
    count(&mut entry);
    go(&mut entry);
    let mut other = Asm::program("other", ProgramKind::Classifier);
    count(&mut other);
    other.ret(9);
    // Twice the result of what it tail-calls, or of 4.
    let mut inner = Asm::subprogram("inner");
    inner.load_map(R2, "targets").mov(R3, OTHER).call(Helper::TailCall).ret(4);
    let mut empty = Asm::subprogram("inner_empty");
    empty.load_map(R2, "targets").mov(R3, EMPTY).call(Helper::TailCall).ret(4);
    let mut object = Object::new();
    object.add_map(MapSpec::array("runs", 8, 1)).unwrap();
    object.add_map(MapSpec::prog_array("targets", PLACES)).unwrap();
    for asm in [entry, other, inner, empty] {
        object.add(asm.finish().unwrap()).unwrap();
    }
    object
}

/// The result, and how many programs began.
fn by_kernel(object: &Object) -> (u32, u64) {
    let mut loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    let targets = ProgramArray::new(loaded.take_map("targets").unwrap()).unwrap();
    let (entry, other) = (loaded.take_program("entry").unwrap(), loaded.take_program("other").unwrap());
    targets.set(ITSELF as u32, &entry).unwrap();
    targets.set(OTHER as u32, &other).unwrap();
    let run = entry.test_run(&TestRun { packet: &PACKET, context: &[], repeat: 1 }).unwrap();
    let runs = Array::<u64>::new(loaded.take_map("runs").unwrap()).unwrap().load(0).unwrap();
    // The array held the program, as the program holds the array; the last descriptor's end would empty it too.
    assert!(targets.clear(ITSELF as u32).unwrap());
    (run.retval, runs)
}

fn by_vm(object: &Object, bug: Option<PlantedBug>) -> (u32, u64) {
    let mut vm = Vm::new(&object.link("entry").unwrap()).unwrap();
    let other = vm.add(&object.link("other").unwrap()).unwrap();
    let mut maps = Maps::new(object.maps());
    let targets = maps.get_mut("targets").unwrap();
    targets.set_program(ITSELF as u32, Some(TailTarget::ENTRY)).unwrap();
    targets.set_program(OTHER as u32, Some(other)).unwrap();
    if let Some(bug) = bug {
        vm.plant_bug(bug);
    }
    let run = vm.run(&mut Skb::new(PACKET), &mut maps, &mut Environment::default());
    let run = run.unwrap_or_else(|trap| panic!("{trap}"));
    let runs = maps.get("runs").unwrap().lookup(&[0; 4]).unwrap();
    (run.value, u64::from_le_bytes(runs.try_into().unwrap()))
}

fn to(index: i32) -> Object {
    object(|asm| {
        asm.mov(R1, R6).load_map(R2, "targets").mov32(R3, index).call(Helper::TailCall).ret(3);
    })
}

#[test]
fn tail_calls_agree_with_the_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let cases = [
        ("another program", to(OTHER), (9, 2)),
        ("an empty place", to(EMPTY), (3, 1)),
        ("beyond the array", to(PLACES as i32), (3, 1)),
        ("far beyond the array", to(-1), (3, 1)),
        ("itself, until the limit", to(ITSELF), (3, 34)),
        (
            "an empty place, then another program",
            object(|asm| {
                for index in [EMPTY, EMPTY, OTHER] {
                    asm.mov(R1, R6).load_map(R2, "targets").mov(R3, index).call(Helper::TailCall);
                }
                asm.ret(3);
            }),
            (9, 2),
        ),
        (
            "another program from a subprogram, which its caller survives",
            object(|asm| {
                asm.mov(R7, 100).mov(R1, R6).call_function("inner").add(R0, R7).mov(R7, R0);
                asm.mov(R1, R6).call_function("inner_empty").add(R0, R7).exit();
            }),
            (113, 2),
        ),
    ];
    for (name, object, expected) in cases {
        assert_eq!(by_kernel(&object), expected, "the kernel, {name}");
        assert_eq!(by_vm(&object, None), expected, "the VM, {name}");
    }
}

#[test]
fn a_planted_bug_in_tail_calls_is_found() {
    if !require(Rung::Kernel) {
        return;
    }
    let object = to(ITSELF);
    assert_ne!(by_kernel(&object), by_vm(&object, Some(PlantedBug::OneTailCallMore)));
}

#[test]
fn a_program_that_no_array_would_hold_is_refused() {
    let one = to(OTHER);
    let mut xdp = Asm::program("entry", ProgramKind::Xdp);
    xdp.ret(0);
    let mut others = Object::new();
    others.add(xdp.finish().unwrap()).unwrap();
    let mut plain = Asm::program("plain", ProgramKind::Classifier);
    plain.ret(0);
    others.add(plain.finish().unwrap()).unwrap();
    let mut vm = Vm::new(&one.link("entry").unwrap()).unwrap();
    assert!(matches!(
        vm.add(&others.link("entry").unwrap()),
        Err(VmError::OtherKind { kind: ProgramKind::Xdp, entry: ProgramKind::Classifier, .. })
    ));
    assert!(matches!(vm.add(&others.link("plain").unwrap()), Err(VmError::OtherMaps { .. })));
}
