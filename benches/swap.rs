//! `swap`: another program in the place of the one on a pod's device: by netlink on clsact, by an update of a link on tcx
//! where the kernel has it, by turns. No peer replaces without loading, so each is against what it cannot do without: clsact
//! against the system calls of one netlink request that changes nothing, made on a socket of its own as ours is; tcx against
//! a look at the chain and at the pin, for beside the update (less than 1 us) it holds a lock of the pins, reads the chain and
//! opens the link's pin, so that several processes may do it at once. Beside each ratio stands the time that was set beforehand.
//! Needs root.

use std::time::Instant;

use dcenet_benches::{Mounted, Row, Sample, Summary, rounds, say};
use dcenet_core::netlink::Family;
use dcenet_core::netns::NetNs;
use dcenet_core::test_support::TestHost;
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{Attacher, ClsactAttacher, Direction, Hook, TcxAttacher};
use dcenet_ebpf::insn::Reg::R0;
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::object::{Object, ProgramKind};
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::Program;

const ID: &str = "swap";
const DEVICE: &str = "pod0";
const LABEL: &str = "bench";
/// Half as much again as a request that changes nothing.
const CLSACT: f64 = 1.5;
/// Half as much again as the looks, for the update and the lock.
const TCX: f64 = 1.5;
/// Microseconds that either may take.
const CLSACT_US: f64 = 60.0;
const TCX_US: f64 = 30.0;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let host = TestHost::new();
    host.root().sh("ip link add pod0 type veth peer name pod1 && ip link set pod0 up && ip link set pod1 up");
    let device = host.root().link(DEVICE).ok_or("the device just made")?.index;
    let hook = Hook { device, direction: Direction::Ingress };
    let mounted = Mounted::open(host.directory().join("bpf"))?;
    let features = Features::probe()?;
    let programs = [program(1)?, program(2)?];
    let mut summary = Summary::default();
    let tcx = features.tcx.then(|| TcxAttacher::new(mounted.pins().clone()));
    let times = host.root().run(|| measure(tcx.as_ref(), hook, &programs))?;
    let mut row = |name, (goal, bound): (f64, f64), ours: &[f64], peer: (&str, &[f64])| {
        let sample = Sample::new(ours.to_vec());
        say(format_args!("{ID}: {name}: p50 {:.1} us, p99 {:.1} us", sample.median(), sample.quantile(0.99)));
        summary.add(Row::compare(ID, name, goal, ours, peer).in_unit("us"));
        let (bounds, name) = (vec![bound; ours.len()], format!("{name}, at most"));
        summary.add(Row::compare(ID, &name, 1.0, ours, (&format!("{bound} us"), &bounds)).in_unit("us"));
    };
    row("clsact", (CLSACT, CLSACT_US), &times.clsact, ("an empty request", &times.request));
    if !times.tcx.is_empty() {
        row("tcx", (TCX, TCX_US), &times.tcx, ("chain and pin", &times.looks));
    }
    summary.write();
    Ok(())
}

/// Microseconds, round by round.
#[derive(Default)]
struct Times {
    request: Vec<f64>,
    clsact: Vec<f64>,
    looks: Vec<f64>,
    tcx: Vec<f64>,
}

fn measure(tcx: Option<&TcxAttacher>, hook: Hook, programs: &[Program; 2]) -> Result<Times, Failure> {
    let (device, mut times) = (DEVICE.parse()?, Times::default());
    let clsact: (&dyn Attacher, &mut Vec<f64>) = (&ClsactAttacher, &mut times.clsact);
    let looker = tcx;
    let tcx = tcx.map(|tcx| (tcx as &dyn Attacher, &mut times.tcx));
    let mut ways: Vec<_> = [clsact].into_iter().chain(tcx).collect();
    for (attacher, _) in &ways {
        attacher.attach(hook, &programs[0], LABEL)?;
    }
    for round in 0..rounds(2000, 100) {
        let begin = Instant::now();
        NetNs::of_this_thread()?.socket(Family::Route)?.link(&device)?;
        times.request.push(begin.elapsed().as_secs_f64() * 1e6);
        if let Some(tcx) = looker {
            let begin = Instant::now();
            let (chain, links) = (tcx.chain(hook)?, tcx.links_of(|label| label == LABEL)?);
            times.looks.push(begin.elapsed().as_secs_f64() * 1e6);
            if (chain.len(), links.len()) != (1, 1) {
                return Err(format!("{chain:?} on the device, {links:?} pinned; want one of each").into());
            }
        }
        let next = &programs[(round + 1) % 2];
        for (attacher, times) in &mut ways {
            let begin = Instant::now();
            attacher.replace(hook, next, LABEL)?;
            times.push(begin.elapsed().as_secs_f64() * 1e6);
            // It has happened.
            let there = attacher.attached(hook)?.and_then(|attached| attached.program);
            if there != Some(next.info().id) {
                return Err(format!("program {there:?} is attached, and {} was put there", next.info().id).into());
            }
        }
    }
    for (attacher, _) in &ways {
        attacher.detach(hook)?;
    }
    drop(ways);
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
