//! The VM and the kernel on frames of a grammar: the same verdicts, reasons and flows.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, effort, require};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::insn::encode;
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::program::{Program, TestRun};
use dcenet_ebpf::test_support::traffic::{Hosts, frame};
use dcenet_ebpf::vm::PlantedBug;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use crate::harness::*;

fn hosts() -> Hosts {
    let pods = [POD4, PEER4, ROUTER4, Ipv4Addr::BROADCAST, Ipv4Addr::new(224, 0, 0, 1), Ipv4Addr::UNSPECIFIED];
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let v6 = [POD6, PEER6, ROUTER6, POD_LINK_LOCAL, all_nodes, Ipv6Addr::UNSPECIFIED];
    // The pod and its peer are the ends of most.
    let v4 = [POD4, PEER4].into_iter().cycle().take(16).chain(pods).collect();
    let v6 = [POD6, PEER6].into_iter().cycle().take(16).chain(v6).collect();
    Hosts { v4, v6, ports: vec![80, 53, 40_000, 40_001] }
}

/// Some ports and types are allowed to and fro, all else is denied.
fn pod() -> Pod {
    let ports = |protocol| [80, 53, 40_000].map(|port| (0, protocol, port));
    let list = || {
        let mut rules = [6, 17, 132].map(ports).concat();
        rules.extend([(0, 1, 8 << 8), (0, 58, 128 << 8)]);
        List(rules)
    };
    Pod::new(&list(), &list())
}

/// The answer to a frame of TCP, UDP or SCTP: addresses and ports change places, which no checksum notices. None where
/// tags, options or extension headers come in between.
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    let (addresses, ports, protocol) = match frame.get(12..15)? {
        [0x08, 0x00, 0x45] => (26..34, 34..38, 23),
        [0x86, 0xdd, 0x60] => (22..54, 54..58, 20),
        _ => return None,
    };
    let mut answer = frame.to_vec();
    for pair in [addresses, ports] {
        let half = pair.len() / 2;
        answer.get_mut(pair)?.rotate_left(half);
    }
    matches!(frame[protocol], 6 | 17 | 132).then_some(answer)
}

/// Whether test runs take a frame: newer kernels refuse those that end inside the IP header, whatever the program
/// (net/bpf/test_run.c, `bpf_prog_test_run_skb`).
fn is_taken(nothing: &Program, frame: &[u8]) -> bool {
    match nothing.test_run(&TestRun { packet: frame, context: &[], repeat: 1 }) {
        Ok(_) => true,
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => false,
        Err(error) => panic!("{error}"),
    }
}

/// Runs so many frames, and beyond them for as long as `soak` is not over; how often each reason was met. Flows are forgotten now and then, so that both tables stay small.
fn run(pod: &Pod, seed: u8, count: usize, soak: Duration) -> BTreeMap<String, usize> {
    let mut runner = TestRunner::new_with_rng(
        proptest::test_runner::Config::default(),
        TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]),
    );
    let frames = frame(&hosts());
    let mut nothing = Asm::program("nothing", ProgramKind::Classifier);
    nothing.ret(0);
    let nothing = encode(nothing.finish().unwrap().insns());
    let nothing = Program::load(ProgramKind::Classifier, "nothing", &nothing).unwrap();
    let (mut refused, mut last) = (0, Vec::new());
    let begin = Instant::now();
    let mut met = BTreeMap::new();
    for at in 0.. {
        if at >= count && begin.elapsed() >= soak {
            break;
        }
        if at % 60 == 0 {
            let flows = pod.flows();
            for table in [&flows.settled, &flows.begun] {
                let keys: Vec<_> = table.entries().unwrap().into_iter().map(|(key, _)| key).collect();
                table.remove_all(&keys).unwrap();
            }
        }
        // One frame in its direction, then once more, then the answer.
        let bytes = match at % 3 {
            0 => frames.new_tree(&mut runner).unwrap().current(),
            1 => last.clone(),
            _ => answer(&last).unwrap_or_else(|| last.clone()),
        };
        last.clone_from(&bytes);
        if !is_taken(&nothing, &bytes) {
            refused += 1;
            assert!(refused < 100 + at / 5, "test runs refuse {refused} of {at} frames");
            continue;
        }
        let way = (at / 3 + usize::from(at % 3 == 2)) % 2;
        let direction = [Egress, Ingress][way];
        *met.entry(format!("{direction:?} {:?}", pod.run_bytes(direction, &bytes))).or_insert(0) += 1;
    }
    met
}

#[test]
fn the_vm_and_the_kernel_agree_on_generated_frames() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = pod();
    let (count, soak) = effort((150, 0), (9_000, 0), (9_000, 600));
    let met = run(&pod, 1, count, Duration::from_secs(soak));
    let frames: usize = met.values().sum();
    eprintln!("{frames} frames: {met:?}");
    assert!(met.len() >= effort(8, 14, 14), "few outcomes were met: {met:?}");
    for direction in [Egress, Ingress] {
        let Some((ran, all)) = pod.coverage(direction) else { continue };
        eprintln!("{direction:?}: {ran} of {all} instructions ran in the VM");
        assert!(ran * 10 > all * 6, "{direction:?}: only {ran} of {all} instructions ran");
    }
}

#[test]
fn a_planted_bug_in_the_vm_is_found_by_generated_frames() {
    if !require(Rung::Kernel) || !effort(false, true, true) {
        return;
    }
    let pod = pod();
    pod.plant_bug(PlantedBug::Unswapped);
    let outcome = catch_unwind(AssertUnwindSafe(|| run(&pod, 1, 1_000, Duration::ZERO)));
    let message = outcome.expect_err("the VM differs");
    let text = message.downcast_ref::<String>().map(String::as_str).unwrap_or_default();
    assert!(text.contains("the VM differs from the kernel"), "{text}");
}
