//! What it costs to make a function what a pod wants: exact counts, of the kernel's view.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use dcenet_core::test_support::{Rung, require};
use dcenet_sriov::kernel::LinuxKernel;
use dcenet_sriov::lease::Wanted;
use dcenet_sriov::test_support::guest::IgbPort;
use tempfile::TempDir;

use super::{Guest, leases, wanted};
use crate::world::owner;

/// What a process did between two looks at files that there are not.
#[derive(Debug, Default)]
struct Counts {
    requests: usize,
    sockets: usize,
    setns: usize,
    calls: usize,
}

/// A process of its own, which knows nothing yet, as each call of the plugin is one. The ledger knows the function.
#[test]
fn a_function_is_prepared_by_few_calls() {
    if !require(Rung::Vm) {
        return;
    }
    if std::env::var_os(TRACED).is_some() {
        return traced();
    }
    // Nobody else of this process has the port meanwhile.
    let _alone = IgbPort::with(2);
    let directory = TempDir::new().unwrap();
    let log = directory.path().join("calls");
    let status = Command::new("strace")
        .args(["-f", "-o"])
        .arg(&log)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "igb::cost::a_function_is_prepared_by_few_calls", "--nocapture"])
        .env(TRACED, "1")
        .status()
        .expect("strace starts");
    assert!(status.success());
    let text = std::fs::read_to_string(&log).unwrap();
    let begin = text.lines().find(|line| line.contains(BEGIN)).expect("it began");
    let (thread, _) = begin.split_once(' ').unwrap();
    let of_thread = |line: &&str| line.split_once(' ').is_some_and(|(id, _)| id == thread);
    let calls = text.lines().filter(of_thread).filter_map(|line| Some(line.split_once(' ')?.1.trim_start()));
    // What another thread came in between of has two lines.
    let own = calls.filter(|call| !call.starts_with("<..."));
    let mut counts = Counts::default();
    for call in own.skip_while(|call| !call.contains(BEGIN)).skip(1).take_while(|call| !call.contains(END)) {
        counts.calls += 1;
        counts.requests += usize::from(call.starts_with("send"));
        counts.sockets += usize::from(call.starts_with("socket("));
        counts.setns += usize::from(call.starts_with("setns("));
        if std::env::var_os("DCENET_SHOW_CALLS").is_some() {
            println!("{call}");
        }
    }
    println!("a function is prepared by {counts:?}");
    let Counts { requests, sockets, setns, calls } = counts;
    assert!(requests > 2 && calls > 20, "that was no lease");
    assert!(requests <= 6 && sockets <= 1 && setns == 0 && calls <= 120);
}

/// What is traced.
fn traced() {
    let guest = Guest::acquainted();
    // What costs one request more.
    let wanted = Wanted { all_multicast: None, ..wanted() };
    // The first one writes down what it was.
    drop(guest.leases().prepare(&owner("a"), guest.vf, &wanted).unwrap());
    let pod = guest.host.new_pod();
    let kernel = Arc::new(LinuxKernel::of_this_thread().unwrap());
    let leases = leases(kernel, guest.state.path());
    assert!(!Path::new(BEGIN).exists());
    let mut lease = leases.prepare(&owner("a"), guest.vf, &wanted).unwrap();
    lease.moving_to(pod.path()).unwrap();
    let incarnation = lease.commit().unwrap();
    assert!(!Path::new(END).exists());
    leases.release(&owner("a"), guest.vf.address, incarnation).unwrap();
    guest.assert_home("given back");
}

const TRACED: &str = "DCENET_TRACED";
const BEGIN: &str = "/no-such-file/begin";
const END: &str = "/no-such-file/end";
