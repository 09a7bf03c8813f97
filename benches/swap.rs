//! `swap`: another program in the place of the one on a pod's device: by netlink on clsact, by an update of a link on tcx
//! where the kernel has it. It is against a fixed time, for no peer replaces without loading. Needs root.

use std::time::Instant;

use dcenet_benches::{Mounted, Row, Sample, Summary, rounds, say};
use dcenet_core::test_support::TestHost;
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{Attacher, ClsactAttacher, Direction, Hook, TcxAttacher};
use dcenet_ebpf::insn::Reg::R0;
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::object::{Object, ProgramKind};
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::Program;

const ID: &str = "swap";
const LABEL: &str = "bench";

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let host = TestHost::new();
    host.root().sh("ip link add pod0 type veth peer name pod1 && ip link set pod0 up && ip link set pod1 up");
    let device = host.root().link("pod0").ok_or("the device just made")?.index;
    let hook = Hook { device, direction: Direction::Ingress };
    let mounted = Mounted::open(host.directory().join("bpf"))?;
    let features = Features::probe()?;
    let mut ways: Vec<(&str, Box<dyn Attacher>, f64)> = vec![("clsact", Box::new(ClsactAttacher), 60.0)];
    if features.tcx {
        ways.push(("tcx", Box::new(TcxAttacher::new(mounted.pins().clone())), 30.0));
    }
    let programs = [program(1)?, program(2)?];
    let mut summary = Summary::default();
    for (name, attacher, goal) in &ways {
        let times = host.root().run(|| measure(&**attacher, hook, &programs))?;
        let sample = Sample::new(times.clone());
        say(format_args!("{ID}: {name}: p50 {:.1} us, p99 {:.1} us", sample.median(), sample.quantile(0.99)));
        let goals = vec![*goal; times.len()];
        summary.add(Row::compare(ID, name, 1.0, &times, (&format!("{goal} us"), &goals)).in_unit("us"));
    }
    summary.write();
    Ok(())
}

/// Microseconds of each replacement; each is seen to have happened.
fn measure(attacher: &dyn Attacher, hook: Hook, programs: &[Program; 2]) -> Result<Vec<f64>, Failure> {
    attacher.attach(hook, &programs[0], LABEL)?;
    let mut times = Vec::new();
    for round in 0..rounds(2000, 100) {
        let next = &programs[(round + 1) % 2];
        let begin = Instant::now();
        attacher.replace(hook, next, LABEL)?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
        let there = attacher.attached(hook)?.and_then(|attached| attached.program);
        if there != Some(next.info().id) {
            return Err(format!("program {there:?} is attached, and {} was put there", next.info().id).into());
        }
    }
    attacher.detach(hook)?;
    Ok(times)
}

/// A program that lets everything through; the number makes it another.
fn program(number: i32) -> Result<Program, Failure> {
    let mut code = Asm::program("swapped", ProgramKind::Classifier);
    code.mov(R0, number).ret(-1);
    let mut object = Object::new();
    object.add(code.finish()?)?;
    let mut loaded = AyaLoader.load(&object.to_elf()?, &LoadRequest::default())?;
    Ok(loaded.take_program("swapped").ok_or("the program just loaded")?)
}
