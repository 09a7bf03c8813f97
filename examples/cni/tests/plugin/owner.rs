//! The owner of the policy state, frozen: in a process of its own, stopped by SIGSTOP.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use dcenet_core::engine::AttachRequest;
use dcenet_core::link::{LinkConfig, Policy};
use dcenet_core::netns::{Host, NetNs};
use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::pin::Pins;
use dcenet_policy::enforcer::{PinnedDefault, PolicyConfig};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::common::{Node, Owner};

const DIRECTORIES: &str = "DCENET_TEST_OWNER";

/// An owner in a process of its own. Killed when it is dropped.
struct Process(Child, PathBuf);

impl Process {
    fn start(node: &Node) -> Self {
        let (directory, run_dir) = (node.host.directory(), node.host.run_dir());
        let start = || {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "owner::owns_the_policy_of_another_test", "--nocapture"])
                .env(DIRECTORIES, format!("{} {}", directory.display(), run_dir.display()))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("a second process of this program")
        };
        let mut child = node.host.root().run(start);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.map_while(Result::ok).any(|line| line.contains(READY));
        let this = Self(child, Owner::pins_below(directory));
        assert!(ready, "the owner did not start");
        this
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("the child is ours");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Also a stopped process dies of it.
        self.0.kill().expect("the child is ours");
        self.0.wait().expect("it ends");
        if let Err(error) = Pins::at(&self.1).unmount() {
            eprintln!("{error}");
        }
    }
}

const READY: &str = "the owner is ready";

/// Not a test by itself: what [`Process`] runs.
#[test]
fn owns_the_policy_of_another_test() {
    let Some(directories) = std::env::var(DIRECTORIES).ok() else { return };
    let (directory, run_dir) = directories.split_once(' ').unwrap();
    let host = Host(NetNs::of_this_thread().unwrap());
    let owner = Owner::open_at(host, directory.as_ref(), run_dir.into());
    println!("{READY}");
    // Until the test is over, or has died.
    std::io::stdin().read_line(&mut String::new()).unwrap();
    drop(owner);
}

/// A node whose owner is a process, and frozen. `limit` is how long ADD waits for verdicts.
fn frozen(limit: &str) -> (Node, Process) {
    let mut node = Node::new();
    let owner = Process::start(&node);
    node.config["policy"] =
        json!({ "default": "deny", "await": limit, "pins": Owner::pins_below(node.host.directory()) });
    node.config["args"] = json!({ "cni": { "labels": [{ "key": "app", "value": "db" }] } });
    let pod = node.pod("first");
    node.add(&pod).unwrap();
    node.del(&pod).unwrap();
    owner.send(Signal::STOP);
    (node, owner)
}

#[test]
fn retries_under_a_frozen_owner_leave_no_lease_and_no_record() {
    if !require(Rung::Kernel) {
        return;
    }
    for limit in ["30s", "0s"] {
        let (node, owner) = frozen(limit);
        let before = (node.host.state(), node.store());
        for _ in 0..2 {
            let pod = node.pod("web");
            let error = node.add(&pod).unwrap_err();
            assert_eq!(error["code"], 11, "{error}");
            assert!(error["msg"].as_str().unwrap().contains("policy owner"), "{error}");
            assert_eq!(node.host.records(), Vec::<String>::new());
            assert_eq!((before.0.diff(&node.host.state()).as_str(), node.store()), ("", before.1.clone()));
        }
        owner.send(Signal::CONT);
        let pod = node.pod("web");
        node.add(&pod).unwrap();
        node.del(&pod).unwrap();
        assert_eq!(before.0.diff(&node.host.state()), "");
    }
}

/// What an ADD does that does not ask first.
#[test]
fn without_the_question_each_retry_leaves_its_lease_and_its_record() {
    if !require(Rung::Kernel) {
        return;
    }
    let (node, _owner) = frozen("0s");
    let before = node.store().len();
    let policy: PolicyConfig = serde_json::from_value(node.config["policy"].clone()).unwrap();
    let link: LinkConfig = serde_json::from_value(node.config["link"].clone()).unwrap();
    let sink = PinnedDefault::new(&policy, &node.host.run_dir());
    let engine = node.host.engine(Some(Arc::new(sink)));
    let ipam = node.ipam();
    for n in 1..=2 {
        let pod = node.pod("web");
        let key: dcenet_core::model::AttachmentKey =
            serde_json::from_value(json!({ "network": "shop", "container": pod.container, "ifname": "eth0" })).unwrap();
        let mut hold = engine.hold(&key).unwrap();
        let lease = pollster::block_on(ipam.lease(&LeaseRequest::new(key.clone()))).unwrap();
        let request = AttachRequest {
            policy: Policy::Wanted,
            ..AttachRequest::new(key.clone(), pod.netns.pod(), link.clone(), lease.clone())
        };
        hold.attach(&request).unwrap_err();
        // As the plugin does: what cannot be taken back keeps its addresses.
        assert!(hold.is_recorded());
        drop(hold);
        assert_eq!((node.host.records().len(), node.store().len()), (n, before + 2 * n));
    }
}

#[test]
fn an_owner_that_is_not_there_is_missed_only_by_those_who_wait_for_it() {
    if !require(Rung::Kernel) {
        return;
    }
    let (mut node, owner) = frozen("30s");
    owner.send(Signal::KILL);
    let pod = node.pod("web");
    let (before, store) = (node.host.state(), node.store());
    // The process is gone when its socket is.
    let error = loop {
        let error = node.add(&pod).unwrap_err();
        if error["msg"].as_str().unwrap().contains("does not run") {
            break error;
        }
    };
    assert_eq!(error["code"], 11, "{error}");
    assert_eq!((before.diff(&node.host.state()).as_str(), node.host.records().len(), node.store()), ("", 0, store));
    // The default stands.
    node.config["policy"]["await"] = json!("0s");
    node.add(&pod).unwrap();
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&node.host.state()), "");
}
