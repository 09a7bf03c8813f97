//! The owner of the policy state, frozen: in a process of its own, stopped by SIGSTOP.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

use dcenet_core::engine::AttachRequest;
use dcenet_core::link::{LinkConfig, Policy};
use dcenet_core::netns::{Host, NetNs};
use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_core::test_support::{Rung, require, tcp_echo};
use dcenet_ebpf::pin::Pins;
use dcenet_policy::enforcer::{PinnedDefault, PolicyConfig};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::common::{Node, Owner, Pod};

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

    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    fn send(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("the child is ours");
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

/// A node whose owner is a process. `limit` is how long ADD waits for verdicts.
fn owned(limit: &str) -> (Node, Process) {
    let mut node = Node::new();
    let owner = Process::start(&node);
    node.config["policy"] =
        json!({ "default": "deny", "await": limit, "pins": Owner::pins_below(node.host.directory()) });
    node.config["args"] = json!({ "cni": { "labels": [{ "key": "app", "value": "db" }] } });
    (node, owner)
}

/// The same, and frozen.
fn frozen(limit: &str) -> (Node, Process) {
    let (node, owner) = owned(limit);
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

/// Stands before an owner, and passes on what is said. Goes when it is dropped.
struct Door {
    open: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Door {
    /// With `stops`, whoever says that an endpoint is gone finds the owner frozen.
    fn before(node: &Node, owner: &Process, stops: bool) -> Self {
        let (path, behind) = (node.host.run_dir().join("policy.sock"), node.host.run_dir().join("behind.sock"));
        if !behind.exists() {
            std::fs::rename(&path, &behind).unwrap();
        }
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (open, owner) = (Arc::new(AtomicBool::new(true)), owner.pid());
        let is_open = Arc::clone(&open);
        let thread = spawn(move || {
            while is_open.load(Ordering::Acquire) {
                match listener.accept() {
                    Ok((client, _)) => {
                        let behind = UnixStream::connect(&behind).unwrap();
                        spawn(move || pass_on(client, behind, stops.then_some(owner)));
                    }
                    Err(_) => sleep(Duration::from_millis(1)),
                }
            }
            std::fs::remove_file(path).unwrap();
        });
        Self { open, thread: Some(thread) }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.open.store(false, Ordering::Release);
        self.thread.take().map(JoinHandle::join);
    }
}

/// Until either end closes.
fn pass_on(mut client: UnixStream, mut behind: UnixStream, freezes: Option<Pid>) {
    client.set_nonblocking(false).unwrap();
    let (mut answers, mut back) = (behind.try_clone().unwrap(), client.try_clone().unwrap());
    let answering = spawn(move || {
        let copied = io::copy(&mut answers, &mut back);
        back.shutdown(Shutdown::Both).and(copied)
    });
    let mut said = [0; 4096];
    while let Ok(length @ 1..) = client.read(&mut said) {
        if let Some(owner) = freezes
            && said[..length].windows(6).any(|word| word == b"\"gone\"")
        {
            kill_process(owner, Signal::STOP).expect("the owner is the test's");
        }
        if behind.write_all(&said[..length]).is_err() {
            break;
        }
    }
    if let Err(error) = behind.shutdown(Shutdown::Both).and(answering.join().unwrap().map(drop)) {
        eprintln!("between a client and the owner: {error}");
    }
}

/// A pod that somebody else has connected to the bridge `br9`, with what they tell of it.
fn theirs(node: &Node, workload: &str, n: u8) -> (Pod, Value) {
    let pod = node.pod(workload);
    let path = pod.netns.path().display();
    node.host.root().sh(&format!(
        "ip link show br9 2>/dev/null || {{ ip link add br9 type bridge; ip link set br9 up; }}; \
         ip link add h{n} type veth peer name eth0 netns {path}; ip link set h{n} master br9; ip link set h{n} up"
    ));
    pod.netns.sh(&format!("ip addr add 10.20.0.{n}/24 dev eth0; ip link set eth0 up"));
    let told = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{ "name": format!("h{n}") }, { "name": "eth0", "sandbox": pod.netns.path() }],
        "ips": [{ "address": format!("10.20.0.{n}/24"), "interface": 1 }],
    });
    (pod, told)
}

/// The plugin behind another one, whose list does not ask for policy any more: what the owner does not hear of is not done.
#[test]
fn policy_is_not_off_where_the_owner_stalls_while_it_is_lifted() {
    if !require(Rung::Kernel) {
        return;
    }
    let (mut node, owner) = owned("30s");
    let ours = node.config.as_object_mut().unwrap();
    ours.remove("link");
    ours.remove("ipam");
    let [(db, told), (replica, of_replica), (web, _)] =
        [("db", 9), ("replica", 10), ("web", 11)].map(|(workload, n)| theirs(&node, workload, n));
    let asks = node.config.clone();
    let mut asks_not = asks.clone();
    asks_not.as_object_mut().unwrap().remove("policy");
    let call = |verb: &str, config: &Value, (pod, told): (&Pod, &Value)| {
        let mut config = config.clone();
        config["prevResult"] = told.clone();
        node.call(verb, pod, &config.to_string())
    };
    let address: IpAddr = "10.20.0.9".parse().unwrap();
    let connects = |from: &Pod, limit| tcp_echo(&from.netns, &db.netns, address, limit).is_ok();
    let (long, short) = (Duration::from_secs(20), Duration::from_millis(700));
    call("ADD", &asks, (&db, &told)).unwrap();
    call("ADD", &asks, (&replica, &of_replica)).unwrap();
    assert!(connects(&replica, long) && !connects(&web, short));

    for stops in [true, false] {
        let door = Door::before(&node, &owner, stops);
        let lifted = call("ADD", &asks_not, (&db, &told));
        if !stops {
            // The twin.
            lifted.unwrap();
            assert!(connects(&web, long));
            call("CHECK", &asks_not, (&db, &told)).unwrap();
            continue;
        }
        let error = lifted.unwrap_err();
        assert_eq!(error["code"], 11, "{error}");
        assert!(!connects(&web, short));
        owner.send(Signal::CONT);
        drop(door);
        // And the owner goes on deciding for it.
        assert!(connects(&replica, long) && !connects(&web, short));
        call("CHECK", &asks, (&db, &told)).unwrap();
    }
    call("DEL", &asks_not, (&db, &told)).unwrap();
    call("DEL", &asks, (&replica, &of_replica)).unwrap();
    assert_eq!(node.host.records(), [""; 0]);
}
