//! Times of what this crate asks of the kernel. Run alone, in release:
//! `cargo test --release -p dcenet-ebpf --test figures -- --ignored --nocapture --test-threads 1`

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestHost, require};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{Attacher, ClsactAttacher, Direction, Hook, TcxAttacher, verdict};
use dcenet_ebpf::insn::Reg::*;
use dcenet_ebpf::insn::{self, Cond, Helper, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::{Map, RingBuffer};
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::{Program, TestRun};

/// Prints the median and the ninth decile, and returns the median.
fn report(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    let at = |part: usize| times[times.len() * part / 100];
    println!("{what}: p50 {:?}, p90 {:?}, n {}", at(50), at(90), times.len());
    at(50)
}

fn timed<R>(act: impl FnOnce() -> R) -> (Duration, R) {
    let start = Instant::now();
    let result = act();
    (start.elapsed(), result)
}

fn constant(value: i32) -> Program {
    let mut code = Asm::program("c", ProgramKind::Classifier);
    code.ret(value);
    Program::load(ProgramKind::Classifier, "c", &insn::encode(code.finish().unwrap().insns())).unwrap()
}

#[test]
#[ignore = "a measurement"]
fn attach_replace_detach() {
    if !require(Rung::Kernel) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let pins = Pins::open(directory.path().join("bpf")).unwrap();
    attach_replace_detach_by("clsact", &ClsactAttacher);
    if Features::probe().unwrap().tcx {
        let tcx = TcxAttacher::new(pins.clone());
        attach_replace_detach_by("tcx", &tcx);
        // Among the pins of 250 pods.
        let host = TestHost::new();
        let devices: Vec<_> = (0..125).map(|n| format!("ip link add a{n} type veth peer name b{n}")).collect();
        host.root().sh(&devices.join("\n"));
        let program = constant(verdict::SHOT);
        for name in (0..125).flat_map(|n| [format!("a{n}"), format!("b{n}")]) {
            let device = host.root().link(&name).unwrap().index;
            for direction in [Direction::Ingress, Direction::Egress] {
                host.root().run(|| tcx.attach(Hook { device, direction }, &program, &name)).unwrap();
            }
        }
        assert_eq!(tcx.links().unwrap().len(), 500);
        attach_replace_detach_by("tcx, 500 pins", &tcx);
    }
    pins.unmount().unwrap();
}

fn attach_replace_detach_by(backend: &str, a: &dyn Attacher) {
    let host = TestHost::new();
    let root = host.root();
    root.sh("ip link add h0 type veth peer name p0; ip link set p0 up");
    let hook = |direction| Hook { device: root.link("h0").unwrap().index, direction };
    let (one, two) = (constant(verdict::SHOT), constant(verdict::UNSPEC));
    for state in ["down", "up"] {
        let (ingress, egress) = (hook(Direction::Ingress), hook(Direction::Egress));
        root.run(|| {
            let (mut first, mut second, mut replace, mut query, mut last) = (vec![], vec![], vec![], vec![], vec![]);
            for _ in 0..200 {
                first.push(timed(|| a.attach(ingress, &one, "x").unwrap()).0);
                second.push(timed(|| a.attach(egress, &one, "x").unwrap()).0);
                replace.push(timed(|| a.replace(ingress, &two, "x").unwrap()).0);
                query.push(timed(|| a.attached(ingress).unwrap()).0);
                a.detach(egress).unwrap();
                last.push(timed(|| a.detach(ingress).unwrap()).0);
            }
            report(&format!("{backend}, device {state}: attach"), first);
            report(&format!("{backend}, device {state}: attach the other way"), second);
            report(&format!("{backend}, device {state}: replace"), replace);
            report(&format!("{backend}, device {state}: query"), query);
            report(&format!("{backend}, device {state}: detach"), last);
        });
        root.set_up("h0");
    }
}

/// A decision tree by bisection over the packet's mark: about 3 instructions a leaf.
fn tree(code: &mut Asm, low: u32, high: u32) {
    if high - low <= 1 {
        code.ret(i32::try_from(low & 0xffff).unwrap());
        return;
    }
    let middle = low + (high - low) / 2;
    let upper = code.label();
    code.jump_if(Cond::Ge, R2, i32::try_from(middle).unwrap(), upper);
    tree(code, low, middle);
    code.bind(upper);
    tree(code, middle, high);
}

#[test]
#[ignore = "a measurement"]
fn load_time() {
    if !require(Rung::Kernel) {
        return;
    }
    const MARK: i16 = 8;
    let (first, _) = timed(|| AyaLoader.load(&elf_of(constant_code()), &LoadRequest::default()).unwrap());
    println!("first load of the process through aya: {first:?}");
    for leaves in [1, 3_333, 33_333] {
        let mut code = Asm::program("tree", ProgramKind::Classifier);
        code.load(Size::W, R2, R1, MARK);
        tree(&mut code, 0, leaves);
        let function = code.finish().unwrap();
        let raw = insn::encode(function.insns());
        let mut object = Object::new();
        object.add(function).unwrap();
        let elf = object.to_elf().unwrap();
        let rounds = if leaves > 10_000 { 5 } else { 20 };
        let mut raw_times = Vec::new();
        let mut aya_times = Vec::new();
        let mut insns = 0;
        for _ in 0..rounds {
            let (time, program) = timed(|| Program::load(ProgramKind::Classifier, "tree", &raw).unwrap());
            insns = program.info().verified_instructions;
            raw_times.push(time);
            let (time, loaded) = timed(|| AyaLoader.load(&elf, &LoadRequest::default()).unwrap());
            assert_eq!(loaded.programs.len(), 1);
            aya_times.push(time);
        }
        let slots = raw.len() / 8;
        let raw_time = report(&format!("{slots} instructions, {insns} verified, raw"), raw_times);
        let aya_time = report(&format!("{slots} instructions, aya"), aya_times);
        let per_10k = |t: Duration| t * 10_000 / u32::try_from(slots).unwrap();
        println!("   for 10,000 instructions: raw {:?}, aya {:?}", per_10k(raw_time), per_10k(aya_time));
        assert!(aya_time < Duration::from_secs(5));
    }
    let shared = Map::create(&MapSpec::array("m", 8, 1)).unwrap();
    let mut code = Asm::program("c", ProgramKind::Classifier);
    code.load_map(R1, "m").ret(0);
    let mut object = Object::new();
    object.add_map(MapSpec::array("m", 8, 1)).unwrap().add(code.finish().unwrap()).unwrap();
    let elf = object.to_elf().unwrap();
    let maps = [("m", shared.as_fd())];
    let times = (0..50).map(|_| timed(|| AyaLoader.load(&elf, &LoadRequest { maps: &maps }).unwrap()).0).collect();
    report("a small object with a shared map, aya", times);
}

fn constant_code() -> Asm {
    let mut code = Asm::program("c", ProgramKind::Classifier);
    code.ret(0);
    code
}

fn elf_of(code: Asm) -> Vec<u8> {
    let mut object = Object::new();
    object.add(code.finish().unwrap()).unwrap();
    object.to_elf().unwrap()
}

#[test]
#[ignore = "a measurement"]
fn ring_buffer_events() {
    if !require(Rung::Kernel) {
        return;
    }
    const EVENTS: u32 = 4_000_000;
    const NO_WAKEUP: i32 = 1;
    let mut code = Asm::program("event", ProgramKind::Classifier);
    for at in (-64..0).step_by(8) {
        code.store(Size::Dw, R10, at, 0);
    }
    code.load_map(R1, "ring").mov(R2, R10).add(R2, -64).mov(R3, 64).mov(R4, NO_WAKEUP).call(Helper::RingbufOutput);
    let refused = code.label();
    code.jump_if(Cond::Eq, R0, 0, refused)
        .store(Size::W, R10, -4, 0)
        .load_map(R1, "lost")
        .mov(R2, R10)
        .add(R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, refused)
        .mov(R1, 1)
        .atomic(insn::AtomicOp::Add, Size::Dw, R0, 0, R1)
        .bind(refused)
        .ret(0);
    let mut object = Object::new();
    object.add_map(MapSpec::ringbuf("ring", 8 << 20)).unwrap().add_map(MapSpec::array("lost", 8, 1)).unwrap();
    object.add(code.finish().unwrap()).unwrap();
    let mut loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    let program = loaded.take_program("event").unwrap();
    let lost = dcenet_ebpf::maps::Array::<u64>::new(loaded.take_map("lost").unwrap()).unwrap();
    let mut ring = RingBuffer::new(loaded.take_map("ring").unwrap()).unwrap();

    // The consumer alone: how fast a full ring is emptied.
    let run = |repeat| program.test_run(&TestRun { packet: &[0; 64], context: &[], repeat }).unwrap();
    let produced = run(100_000);
    let (time, events) = timed(|| ring.drain(usize::MAX, |e| assert_eq!(e.len(), 64)).unwrap());
    println!("producer {:?} an event; consumer {:?} an event", produced.duration, time / events as u32);
    assert_eq!(events, 100_000);

    let (time, seen) = std::thread::scope(|scope| {
        let producer = scope.spawn(|| run(EVENTS));
        timed(|| {
            let mut seen = 0_u64;
            loop {
                let some = ring.drain(usize::MAX, |_| seen += 1).unwrap();
                if some == 0 && producer.is_finished() && ring.pending() == 0 {
                    return seen;
                }
            }
        })
    });
    let lost = lost.load(0).unwrap();
    println!(
        "side by side: {:.2} M events/s seen, {lost} of {EVENTS} refused and counted",
        seen as f64 / time.as_secs_f64() / 1e6
    );
    assert_eq!(seen + lost, u64::from(EVENTS), "every event is seen or counted as lost");
}
