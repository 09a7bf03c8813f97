//! Clients that mean no good, what is not there yet, and the privileges that a service manager leaves.

use std::fs;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use dcenet_core::test_support::{Rung, require};
use serde_json::{Value, json};

use crate::common::*;

#[test]
fn clients_of_the_metrics_neither_kill_nor_keep_the_daemon() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    let socket = node.host.run_dir().join("made/metrics.sock");
    node.config["metrics"]["listen"] = json!(format!("unix:{}", socket.display()));
    let daemon = node.start();
    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let ask = |request: &[u8]| {
        let mut stream = connect();
        stream.write_all(request).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let before = daemon.holds();
    for length in ["9000000000000000000", "18446744073709551615", "99999999999999999999"] {
        let answer = ask(format!("GET /metrics HTTP/1.1\r\nContent-Length: {length}\r\n\r\n").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("# EOF\n"), "{answer}");
    }
    // A line that never ends is read up to its limit.
    let mut endless = connect();
    let sent = (0..1000).take_while(|_| endless.write_all(&[b'a'; 4096]).is_ok()).count();
    let mut answer = [0; 12];
    endless.read_exact(&mut answer).unwrap();
    assert!(sent > 0 && &answer == b"HTTP/1.1 400" || &answer == b"HTTP/1.1 431", "{answer:?}");

    let mut stalled: Vec<UnixStream> = (0..40).map(|_| connect()).collect();
    for stream in stalled.iter_mut().step_by(2) {
        // Whoever had to go by now cannot be written to.
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost:");
    }
    assert_eq!(node.samples()[r#"dcenet_ipam_addresses{space="default",pool="v4",state="bound"}"#], 0.0);
    // Far fewer than clients; what the daemon does by itself may have a thread just now.
    let after = daemon.holds();
    assert!(after.0 <= before.0 + 16 && after.1 <= before.1 + 2, "{before:?} {after:?}");
    assert!(daemon.stop().success(), "in spite of them");
    assert!(!socket.exists(), "it goes with the daemon");
}

#[test]
fn what_only_observes_may_come_after_the_daemon() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    node.put_policy("db.yaml", DB);
    let late = node.host.directory().join("late");
    fs::write(&late, "in the way").unwrap();
    let (file, socket) = (late.join("flows.json"), late.join("metrics.sock"));
    node.config["metrics"]["listen"] = json!(format!("unix:{}", socket.display()));
    node.config["flows"] = json!({ "file": file, "ipfix": { "collector": "203.0.113.9:4739" } });
    node.config["ipam"]["store"] = json!({ "kind": "log", "path": late.join("ipam") });
    let daemon = node.start();
    let [web, db, scan] = ["web", "db", "scan"].map(|name| node.add("shop", name));
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));
    let told =
        ["flows.file", "flows.ipfix.collector 203.0.113.9:4739", "metrics.listen: unix:", "ipam.store: not to be"];
    eventually("all are told of", || told.iter().all(|what| daemon.log().contains(what)));
    assert!(!socket.exists() && !file.exists());

    fs::remove_file(&late).unwrap();
    fs::create_dir(&late).unwrap();
    node.host.root().sh("ip link set lo up; ip addr add 203.0.113.9/32 dev lo");
    let collector = node.host.root().run(|| UdpSocket::bind("203.0.113.9:4739")).unwrap();
    collector.set_read_timeout(Some(PATIENCE)).unwrap();
    eventually("metrics are served", || UnixStream::connect(&socket).is_ok());
    eventually("addresses are counted", || {
        node.samples().contains_key(r#"dcenet_ipam_addresses{space="default",pool="v4",state="bound"}"#)
    });
    eventually("what the file lacks is told", || {
        json_lines(&file).iter().any(|line| line["lost"]["undelivered"].as_u64().is_some_and(|lost| lost > 0))
    });
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));
    eventually("flows are logged", || json_lines(&file).iter().any(|line: &Value| line["kind"] == "denied"));
    assert!(collector.recv(&mut [0; 2048]).unwrap() > 16);
    assert!(daemon.stop().success());
}

/// `dcenetd` with the capabilities that its unit leaves it, but for some.
fn confined(without: &[&str]) -> Command {
    let unit = include_str!("../../dcenetd.service");
    let set = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).expect("the unit bounds it");
    let kept = set.split(' ').map(|name| name.strip_prefix("CAP_").expect("a name").to_lowercase());
    let kept: Vec<String> =
        kept.filter(|name| !without.contains(&name.as_str())).map(|name| format!(",+{name}")).collect();
    dcenetd_by(&["setpriv", "--no-new-privs", "--bounding-set", &format!("-all{}", kept.concat()), "--"])
}

/// A node whose daemon serves the plugin.
fn served(mut node: Node) -> Node {
    let socket: PathBuf = node.host.run_dir().join("dcenetd.sock");
    node.config["server"] = json!({});
    node.network["daemon"] = json!(socket);
    node
}

#[test]
fn the_units_capabilities_are_enough_to_probe_addresses_and_fewer_are_not() {
    if !require(Rung::Netns) {
        return;
    }
    for (without, enough) in [(&[][..], true), (&["net_raw"], false)] {
        let mut node = served(Node::new());
        node.host.root().sh("ip link add up0 type veth peer name far0; ip link set up0 up; ip link set far0 up");
        node.network["link"] = json!({ "kind": "macvlan", "parent": "up0", "underlay": { "within": "1s" } });
        let (_daemon, pod) = (node.start_by(confined(without)), node.host.new_pod());
        let added = node.call(&Plugin, "ADD", "web", Some(pod.path()), &node.network);
        assert_eq!(added.is_ok(), enough, "{added:?}");
        node.call(&Plugin, "DEL", "web", Some(pod.path()), &node.network).unwrap();
        assert_eq!(node.leased(), Vec::<String>::new());
    }
}

#[test]
fn the_units_capabilities_are_enough_to_own_policy() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    node.put_policy("db.yaml", DB);
    node.config["flows"] = json!({ "file": node.host.directory().join("flows.json") });
    let daemon = node.start_by(confined(&[]));
    let [web, db, scan] = ["web", "db", "scan"].map(|name| node.add("shop", name));
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));
    assert_eq!(node.samples()[r#"dcenet_daemon_endpoints{phase="enforced"}"#], 3.0);
    assert!(daemon.stop().success());
}

#[test]
fn what_the_stores_of_served_calls_do_is_counted() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = served(Node::new());
    // What it takes back itself is counted as well.
    node.config["reclaim"] = json!({ "every": "24h" });
    let (_daemon, pod) = (node.start(), node.host.new_pod());
    let bound = || -> f64 {
        let of = |series: &str| series.starts_with("dcenet_ipam_address_changes_total") && series.contains("\"bound\"");
        node.samples().iter().filter(|(series, _)| of(series)).map(|(_, count)| count).sum()
    };
    assert_eq!(bound(), 0.0);
    node.call(&Plugin, "ADD", "web", Some(pod.path()), &node.network).unwrap();
    assert_eq!(bound(), 1.0);
    node.call(&Plugin, "DEL", "web", Some(pod.path()), &node.network).unwrap();
}
