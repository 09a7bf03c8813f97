//! What failed, and who died: the next attempt makes the host what it should be, or what it was.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use dcenet_core::fabric::{Fabric, FabricConfig, Mode};
use dcenet_core::netns::{Host, NetNs};
use dcenet_core::provider::FabricNode;
use dcenet_core::test_support::{Fault, Injection, Rung, TestHost, effort, require, with_fault};
use serde::{Deserialize, Serialize};

use crate::{Cluster, Node, table_of};

/// What a host is, and which settings it has. The index of the device is left out, for a new one has a new one.
fn shape(host: &TestHost) -> Vec<String> {
    let mut lines: Vec<String> = host.state().lines().map(ToOwned::to_owned).collect();
    for line in lines.iter_mut().filter(|line| line.starts_with("link dcvx0 #")) {
        *line = line.split(' ').filter(|word| !word.starts_with('#')).collect::<Vec<_>>().join(" ");
    }
    lines.extend(settings(host).lines().map(ToOwned::to_owned));
    lines
}

fn settings(host: &TestHost) -> String {
    host.root().sh("cd /proc/sys/net; grep . ipv4/conf/*/forwarding ipv6/conf/*/forwarding")
}

#[test]
fn what_any_failing_call_leaves_the_next_attempt_completes() {
    if !require(Rung::Netns) {
        return;
    }
    for segments in [false, true] {
        let mut cluster = Cluster::new(2, segments, false, Mode::Auto);
        cluster.have_inside(true);
        let Node { host, fabric, local, .. } = &cluster.nodes[0];
        fabric.apply(local, &cluster.table).unwrap();
        let wanted = shape(host);
        fabric.remove().unwrap();
        let before = shape(host);
        for fault in [Fault::Fail, Fault::Lose] {
            let mut failed = [0, 0];
            for call in (1..).step_by(effort(3, 1, 1)) {
                let (applied, made) = with_fault(Injection { call, fault }, || fabric.apply(local, &cluster.table));
                let whole = applied.as_ref().is_ok_and(|report| report.failures.is_empty());
                failed[0] += u64::from(!whole);
                let report = fabric.apply(local, &cluster.table).unwrap();
                assert_eq!((report.failures.len(), report.installed), (0, report.wanted), "{fault:?} {call}");
                assert_eq!(shape(host), wanted, "{fault:?} {call}: {applied:?}");
                assert_eq!(fabric.apply(local, &cluster.table).unwrap().changed, 0, "{fault:?} {call}");
                let (removed, unmade) = with_fault(Injection { call, fault }, || fabric.remove());
                failed[1] += u64::from(removed.is_err());
                if removed.is_err() {
                    fabric.remove().unwrap();
                }
                assert_eq!(shape(host), before, "{fault:?} {call}: {removed:?}");
                if made < call && unmade < call {
                    println!("segments {segments}, {fault:?}: {made} and {unmade} calls, of which {failed:?} failed");
                    break;
                }
            }
            assert!(failed.iter().all(|n| *n > 0), "{failed:?}");
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Told {
    verb: String,
    host: PathBuf,
    run_dir: PathBuf,
    nodes: Vec<FabricNode>,
}

/// One `apply` or `remove` of the first node as a process of its own, told by the environment.
#[test]
fn child() {
    let Ok(told) = std::env::var("DCENET_TEST_CHILD") else { return };
    let Told { verb, host, run_dir, nodes } = serde_json::from_str(&told).unwrap();
    let host = Host(NetNs::open(host).unwrap());
    let fabric = Fabric::new(host, FabricConfig::default(), &nodes[0].name, &run_dir).unwrap();
    match verb.as_str() {
        "apply" => assert_eq!(fabric.apply(&nodes[0], &table_of(nodes.iter())).unwrap().failures.len(), 0),
        _ => fabric.remove().unwrap(),
    }
}

#[test]
fn a_kill_at_any_call_is_repaired() {
    if !require(Rung::Netns) {
        return;
    }
    let mut cluster = Cluster::new(2, true, false, Mode::Auto);
    cluster.have_inside(true);
    let Node { host, fabric, local, .. } = &cluster.nodes[0];
    fabric.apply(local, &cluster.table).unwrap();
    let wanted = shape(host);
    fabric.remove().unwrap();
    let before = shape(host);
    let killed = |verb: &str, fault: &str| {
        let told = Told {
            verb: verb.into(),
            host: host.root().path().to_owned(),
            run_dir: host.run_dir(),
            nodes: cluster.nodes.iter().map(|node| node.local.clone()).collect(),
        };
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "repair::child", "--quiet"]).stdout(Stdio::null()).stderr(Stdio::null());
        command.env("DCENET_TEST_CHILD", serde_json::to_string(&told).unwrap()).env("DCENET_FAULT", fault);
        let status = command.status().unwrap();
        assert!(status.success() || status.signal().is_some(), "{verb} {fault}: {status}");
        status.signal().is_some()
    };
    for fault in ["abort", "abort-after"] {
        for call in 1.. {
            let fault = format!("{fault}:{call}");
            let in_apply = killed("apply", &fault);
            // Two ways on, in turn.
            if call % 2 == 0 {
                fabric.apply(local, &cluster.table).unwrap();
                assert_eq!(shape(host), wanted, "{fault}");
            }
            let in_remove = killed("remove", &fault);
            fabric.remove().unwrap();
            assert_eq!(shape(host), before, "{fault}");
            if !in_apply && !in_remove {
                assert!(call > 10, "{call} calls are fewer than there are");
                println!("{fault}: no such call any more");
                break;
            }
        }
    }
}

#[test]
fn settings_are_put_back_link_by_link_where_nobody_else_has_changed_them() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let root = host.root();
    root.sh("ip link add kept type veth peer name other; ip link set kept up; ip addr add 192.0.2.1/24 dev kept");
    root.sysctl("ipv6/conf/kept/forwarding", "1");
    let config = FabricConfig { addresses: vec!["192.0.2.1".parse().unwrap()], ..FabricConfig::default() };
    let fabric = Fabric::new(host.host(), config, "n1", &host.run_dir()).unwrap();
    let table = table_of([].into_iter());
    let apply = || fabric.apply(&fabric.local().unwrap(), &table).unwrap();
    let forwards = || {
        root.sh(
            "cd /proc/sys/net/ipv6/conf; echo $(cat all/forwarding default/forwarding kept/forwarding other/forwarding)",
        )
    };
    assert_eq!(forwards().trim(), "0 0 1 0");
    apply();
    assert_eq!(forwards().trim(), "1 1 1 1");
    root.sh("ip link add late type veth peer name later; grep 1 /proc/sys/net/ipv6/conf/late/forwarding");
    fabric.remove().unwrap();
    assert_eq!(forwards().trim(), "0 0 1 0");
    root.sh("grep 0 /proc/sys/net/ipv6/conf/late/forwarding");
    assert!(!host.run_dir().join("fabric.json").exists());

    // Somebody turned one link off meanwhile, or all of them: so they stay.
    apply();
    root.sysctl("ipv6/conf/kept/forwarding", "0");
    fabric.remove().unwrap();
    assert_eq!(forwards().trim(), "0 0 0 0");
    root.sysctl("ipv6/conf/kept/forwarding", "1");
    apply();
    root.sysctl("ipv6/conf/all/forwarding", "0");
    root.sysctl("ipv6/conf/other/forwarding", "1");
    fabric.remove().unwrap();
    assert_eq!(forwards().trim(), "0 0 0 1");

    // What was on before stays on.
    root.sysctl("ipv6/conf/all/forwarding", "1");
    apply();
    fabric.remove().unwrap();
    assert_eq!(forwards().trim(), "1 1 1 1");

    // A record that nobody can read is named.
    root.sysctl("ipv6/conf/all/forwarding", "0");
    std::fs::write(host.run_dir().join("fabric.json"), "{").unwrap();
    let error = fabric.remove().unwrap_err().to_string();
    assert!(error.contains("fabric.json") && error.contains("remove the file"), "{error}");
}
