//! Calls of the plugin that the daemon serves.

use std::collections::BTreeSet;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dcenet_core::cni::node::Server;
use dcenet_core::cni::{Backends, CniError, ErrorCode, NetConf, PolicyChoice};
use dcenet_core::provider::AddressSource;
use dcenet_core::test_support::{Rung, TestNetNs, effort, require};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::common::*;

/// A plugin that can do nothing by itself: what it answers, somebody else did.
struct Nobody;

impl Backends for Nobody {
    fn addresses(&self, _: &NetConf) -> Result<Option<Box<dyn AddressSource>>, CniError> {
        Err(CniError::new(ErrorCode::Failed, "asked for addresses without the daemon"))
    }

    fn policy(&self, _: &NetConf) -> Result<Option<PolicyChoice>, CniError> {
        Err(CniError::new(ErrorCode::Failed, "asked for policy without the daemon"))
    }

    fn stands_alone(&self, _: &NetConf) -> Result<bool, CniError> {
        Ok(false)
    }
}

/// A node whose plugins hand their calls over.
fn node() -> Node {
    let mut node = Node::new();
    node.config["server"] = json!({});
    // What a call leaves is judged here, and not what the daemon takes back later.
    node.config["reclaim"] = json!({ "every": "24h" });
    node.network["daemon"] = json!(node.host.run_dir().join("dcenetd.sock"));
    node
}

/// The bridge stays when the last pod goes, as on a real host.
fn warm(node: &Node) {
    let pod = node.host.new_pod();
    node.call(&Plugin, "ADD", "first", Some(pod.path()), &node.network).unwrap();
    node.call(&Plugin, "DEL", "first", Some(pod.path()), &node.network).unwrap();
}

#[test]
fn every_verb_is_served_and_without_a_daemon_the_call_waits_or_stands_alone() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    warm(&node);
    let before = node.host.state();
    let pod = node.host.new_pod();
    let call = |verb: &str, conf: &Value| node.call(&Nobody, verb, "web", Some(pod.path()), conf);

    let error = call("ADD", &node.network).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert_eq!((before.diff(&node.host.state()).as_str(), node.leased().len()), ("", 0));

    let daemon = node.start();
    let socket = node.host.run_dir().join("dcenetd.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let result = call("ADD", &node.network).unwrap();
    assert_eq!(result["interfaces"][2]["sandbox"], pod.path().to_str().unwrap());
    assert_eq!(call("ADD", &node.network).unwrap(), result, "a repeated ADD gives the same answer");
    assert_eq!(node.leased(), ["web"]);
    let mut check = node.network.clone();
    check["prevResult"] = result.clone();
    call("CHECK", &check).unwrap();
    call("STATUS", &node.network).unwrap();
    let other = node.host.new_pod();
    node.call(&Nobody, "ADD", "gone", Some(other.path()), &node.network).unwrap();
    let mut valid = node.network.clone();
    valid["cni.dev/valid-attachments"] = json!([{ "containerID": "web", "ifname": "eth0" }]);
    call("GC", &valid).unwrap();
    assert_eq!(node.leased(), ["web"]);

    // An error is the daemon's own answer.
    let mut wrong = node.network.clone();
    wrong["ipam"]["pools"][0]["gateway"] = json!("10.99.0.1");
    let error = node.call(&Nobody, "ADD", "wrong", Some(other.path()), &wrong).unwrap_err();
    assert!(error["code"] == 7 && error["msg"].as_str().unwrap().contains("ipam.pools[0].gateway"), "{error}");
    let log = daemon.log();
    let told = log.lines().find(|line| line.contains("ipam.pools[0].gateway")).unwrap_or_else(|| panic!("{log}"));
    let line: Value = serde_json::from_str(told).unwrap();
    assert_eq!((&line["span"]["traceparent"], &line["span"]["container"]), (&json!(TRACE), &json!("wrong")), "{told}");
    call("DEL", &node.network).unwrap();
    assert_eq!((before.diff(&node.host.state()).as_str(), node.leased().len()), ("", 0));

    // What the daemon made a plugin alone removes, and the other way round.
    call("ADD", &node.network).unwrap();
    daemon.stop();
    assert!(!socket.exists());
    node.call(&Plugin, "DEL", "web", Some(pod.path()), &node.network).unwrap();
    node.call(&Plugin, "ADD", "web", Some(pod.path()), &node.network).unwrap();
    let _daemon = node.start();
    call("DEL", &node.network).unwrap();
    assert_eq!((before.diff(&node.host.state()).as_str(), node.leased().len()), ("", 0));
}

/// 64 at once, or 512 with `DCENET_SOAK=1`.
#[test]
fn parallel_adds_get_an_address_each() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = node();
    for config in [&mut node.config, &mut node.network] {
        config["ipam"]["pools"][0]["subnet"] = json!("10.20.0.0/22");
    }
    let _daemon = node.start();
    warm(&node);
    let before = node.host.state();
    let pods: Vec<TestNetNs> = (0..effort(32, 64, 512)).map(|_| node.host.new_pod()).collect();
    let add = |n: usize, pod: &TestNetNs| {
        let name = format!("pod{n}");
        let result = node.call(&Nobody, "ADD", &name, Some(pod.path()), &node.network).unwrap();
        result["ips"][0]["address"].as_str().unwrap().to_owned()
    };
    let addresses: BTreeSet<String> = std::thread::scope(|scope| {
        let adds: Vec<_> = pods.iter().enumerate().map(|(n, pod)| scope.spawn(move || add(n, pod))).collect();
        adds.into_iter().map(|add| add.join().unwrap()).collect()
    });
    assert_eq!((addresses.len(), node.leased().len()), (pods.len(), pods.len()));
    std::thread::scope(|scope| {
        for (n, pod) in pods.iter().enumerate() {
            let node = &node;
            let del = move || node.call(&Nobody, "DEL", &format!("pod{n}"), Some(pod.path()), &node.network).unwrap();
            scope.spawn(del);
        }
    });
    assert_eq!((node.leased().len(), node.host.records().len()), (0, 0));
    assert_eq!(before.diff(&node.host.state()), "");
}

/// The bytes of an ADD for `web`, written by hand after the module's description.
fn request(node: &Node, pod: &TestNetNs, version: u32) -> Vec<u8> {
    let path = |key: &str| identity(node.network[key].as_str().unwrap().as_ref());
    request_of(node, pod, version, [identity(node.host.root().path()), path("stateDir"), path("runDir")])
}

/// As a plugin for which the host's namespace, the state directory and the run directory are these.
fn request_of(node: &Node, pod: &TestNetNs, version: u32, told: [String; 3]) -> Vec<u8> {
    request_for(&node.network, pod, version, told, "ADD", "")
}

/// Likewise, with variables more.
fn request_for(
    network: &Value,
    pod: &TestNetNs,
    version: u32,
    [host, state, run]: [String; 3],
    verb: &str,
    more: &str,
) -> Vec<u8> {
    let netns = pod.path().to_str().unwrap();
    let environment = format!(
        "CNI_COMMAND={verb}\0CNI_CONTAINERID=web\0CNI_NETNS={netns}\0CNI_IFNAME=eth0\0CNI_PATH=/usr/lib/cni\0\
         DCENET_HOST={host}\0DCENET_STATE_DIR={state}\0DCENET_RUN_DIR={run}\0{more}"
    );
    let stdin = network.to_string();
    let numbers = [version, environment.len() as u32, stdin.len() as u32].map(u32::to_be_bytes).concat();
    [b"dcen".as_slice(), &numbers, environment.as_bytes(), stdin.as_bytes()].concat()
}

fn identity(path: &Path) -> String {
    path.metadata().map_or(String::new(), |found| format!("{}:{}", found.dev(), found.ino()))
}

/// Connects and sends bytes, with a namespace or without.
fn send(node: &Node, bytes: &[u8], netns: Option<&TestNetNs>) -> UnixStream {
    let stream = UnixStream::connect(node.host.run_dir().join("dcenetd.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let file = netns.map(|netns| std::fs::File::open(netns.path()).unwrap());
    let descriptors = file.as_ref().map(|file| [file.as_fd()]);
    let mut space = [const { MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if let Some(descriptors) = &descriptors {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let sent = sendmsg(&stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
    stream
}

/// The first byte of the daemon's answer, or why it declined.
fn answer(mut stream: &UnixStream) -> Result<(), String> {
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    match byte[0] {
        b'A' => Ok(()),
        b'D' => {
            let mut reason = String::new();
            stream.read_exact(&mut [0; 4]).unwrap();
            stream.read_to_string(&mut reason).unwrap();
            Err(reason)
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_call_that_is_half_sent_declined_or_not_begun_changes_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    warm(&node);
    let daemon = node.start();
    let (before, pod, other) = (node.host.state(), node.host.new_pod(), node.host.new_pod());
    let whole = request(&node, &pod, 2);
    for part in [1, 4, 15, 16, 40, whole.len() - 1] {
        drop(send(&node, &whole[..part], Some(&pod)));
    }
    answer(&send(&node, &whole, Some(&pod))).expect("accepted, and then nobody says go");

    // What is not read, however much it is, takes nothing from the reason.
    let unread = [request(&node, &pod, 3), vec![0; 1 << 20]].concat();
    let reason = answer(&send(&node, &unread, Some(&pod))).unwrap_err();
    assert!(reason.contains("protocol 2, the plugin 3; install both of one release"), "{reason}");
    for netns in [None, Some(&other)] {
        let reason = answer(&send(&node, &whole, netns)).unwrap_err();
        assert!(reason.contains("another file for the daemon"), "{reason}");
    }
    let path = |key: &str| identity(node.network[key].as_str().unwrap().as_ref());
    let own = [identity(node.host.root().path()), path("stateDir"), path("runDir")];
    let others = [
        ("DCENET_HOST", identity(pod.path())),
        ("DCENET_STATE_DIR", String::new()),
        ("DCENET_RUN_DIR", path("stateDir")),
    ];
    for (i, (name, other)) in others.into_iter().enumerate() {
        let mut told = own.clone();
        told[i] = other;
        let reason = answer(&send(&node, &request_of(&node, &pod, 2, told), Some(&pod))).unwrap_err();
        assert!(reason.contains(name) && reason.contains("is another for the daemon"), "{reason}");
    }
    // A node's list of settings that the daemon does not see would allow everything. What takes away does without.
    let mut sets = node.network.clone();
    sets["link"]["sysctl"] = json!({ "net.core.somaxconn": "77" });
    let own_list = format!("DCENET_ALLOW_LIST={}\0", identity("/etc/cni/tuning/allowlist.conf".as_ref()));
    let listing = |network: &Value, verb: &str, list: &str| {
        answer(&send(&node, &request_for(network, &pod, 2, own.clone(), verb, list), Some(&pod)))
    };
    for (list, said) in [
        ("DCENET_ALLOW_LIST=1:2\0", "allowlist.conf is another for the daemon"),
        ("", "does not tell it, for it is of an earlier release"),
    ] {
        let reason = listing(&sets, "ADD", list).unwrap_err();
        assert!(reason.contains(said), "{reason}");
        // And so does what sets nothing.
        for (network, verb) in [(&sets, "DEL"), (&node.network, "ADD")] {
            listing(network, verb, list).expect("accepted, and then nobody says go");
        }
    }
    listing(&sets, "ADD", &own_list).expect("accepted, and then nobody says go");
    // Nothing of it is under way any more when the daemon has ended.
    assert!(daemon.stop().success());
    assert_eq!((before.diff(&node.host.state()).as_str(), node.leased().len()), ("", 0));
    assert_eq!(node.host.records(), Vec::<String>::new());

    // The same call, begun, is what would have been seen.
    let daemon = node.start();
    let mut stream = send(&node, &whole, Some(&pod));
    answer(&stream).unwrap();
    stream.write_all(b"G").unwrap();
    let mut failed = [1];
    stream.read_exact(&mut failed).unwrap();
    assert_eq!(failed, [0]);
    assert!(daemon.stop().success());
    assert_eq!(node.leased(), ["web"]);
    assert_ne!(before.diff(&node.host.state()), "");
    node.call(&Plugin, "DEL", "web", Some(pod.path()), &node.network).unwrap();
    assert_eq!((before.diff(&node.host.state()).as_str(), node.leased().len()), ("", 0));
}

#[test]
fn del_removes_what_a_killed_daemon_left() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    warm(&node);
    let before = node.host.state();
    for microseconds in [0, 300, 1000, 3000, 10_000] {
        let (daemon, pod) = (node.start(), node.host.new_pod());
        let mut stream = send(&node, &request(&node, &pod, 2), Some(&pod));
        answer(&stream).unwrap();
        stream.write_all(b"G").unwrap();
        std::thread::sleep(Duration::from_micros(microseconds));
        daemon.kill();
        node.call(&Plugin, "DEL", "web", Some(pod.path()), &node.network).unwrap();
        assert_eq!((before.diff(&node.host.state()).as_str(), node.leased().len()), ("", 0));
        assert_eq!(node.host.records(), Vec::<String>::new());
    }
}

/// The plugin's backends, which stop the first call before it holds its attachment.
struct Stopping {
    stops: AtomicBool,
    stopped: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Backends for Stopping {
    fn addresses(&self, conf: &NetConf) -> Result<Option<Box<dyn AddressSource>>, CniError> {
        if self.stops.swap(false, Ordering::AcqRel) {
            self.stopped.send(()).unwrap();
            self.go_on.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        }
        Plugin.addresses(conf)
    }

    fn policy(&self, conf: &NetConf) -> Result<Option<PolicyChoice>, CniError> {
        Plugin.policy(conf)
    }
}

fn serve_in(node: &Node, backends: Arc<dyn Backends + Send + Sync>) -> Server {
    let path = node.host.run_dir().join("dcenetd.sock");
    node.host.root().run(|| Server::start(&path, NonZeroUsize::new(4).unwrap(), backends)).unwrap()
}

/// Has a server stop an ADD, lets the plugin leave or not, and another do something before the ADD goes on.
fn around_an_add(node: &Node, pod: &TestNetNs, leaves: bool, meanwhile: impl FnOnce(&dyn Fn())) {
    let ((stopped, has_stopped), (go, go_on)) = (channel(), channel());
    let stopping = Stopping { stops: AtomicBool::new(true), stopped, go_on: Mutex::new(go_on) };
    let server = serve_in(node, Arc::new(stopping));
    let mut stream = send(node, &request(node, pod, 2), Some(pod));
    answer(&stream).unwrap();
    stream.write_all(b"G").unwrap();
    has_stopped.recv_timeout(PATIENCE).unwrap();
    let stays = (!leaves).then_some(stream);
    meanwhile(&|| go.send(()).unwrap());
    // It waits for what is under way.
    drop(server);
    drop(stays);
}

#[test]
fn an_add_never_comes_after_the_del_that_followed_it() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    warm(&node);
    let (before, pod) = (node.host.state(), node.host.new_pod());
    let mut alone = node.network.clone();
    alone.as_object_mut().unwrap().remove("daemon");
    let clean = || {
        assert_eq!((before.diff(&node.host.state()).as_str(), node.leased().len()), ("", 0));
        assert_eq!(node.host.records(), Vec::<String>::new());
    };
    // Its plugin was killed, and DEL was served without the daemon, which did not take it in time.
    let del_alone = |go: &dyn Fn()| {
        node.call(&Plugin, "DEL", "web", Some(pod.path()), &alone).unwrap();
        go();
    };
    around_an_add(&node, &pod, true, del_alone);
    clean();
    // A plugin that waits is what the ADD goes by: the same order of the two leaves what nobody deletes.
    around_an_add(&node, &pod, false, del_alone);
    assert_eq!(node.leased(), ["web"]);
    node.call(&Plugin, "DEL", "web", Some(pod.path()), &alone).unwrap();
    clean();
    // The daemon has the DEL wait, whether or not the ADD is given up.
    for leaves in [true, false] {
        around_an_add(&node, &pod, leaves, |go| {
            std::thread::scope(|scope| {
                let del = scope.spawn(|| node.call(&Nobody, "DEL", "web", Some(pod.path()), &node.network));
                std::thread::sleep(Duration::from_millis(300));
                assert!(!del.is_finished(), "it does not wait for the ADD");
                go();
                del.join().unwrap().unwrap();
            });
        });
        clean();
    }
}

#[test]
fn a_server_whose_socket_is_anothers_or_gone_ends_and_leaves_what_is_not_its_own() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    let ends = |server: Server| {
        let (done, is_done) = channel();
        std::thread::spawn(move || {
            drop(server);
            done.send(()).unwrap();
        });
        is_done.recv_timeout(PATIENCE).expect("it ends");
    };
    let [first, second] = [Arc::new(Plugin), Arc::new(Plugin)];
    let (replaced, server) = (serve_in(&node, first.clone()), serve_in(&node, second.clone()));
    ends(replaced);
    assert_eq!(Arc::strong_count(&first), 1, "its threads have ended");
    node.call(&Nobody, "STATUS", "web", None, &node.network).expect("the other serves");
    let socket = node.host.run_dir().join("dcenetd.sock");
    std::fs::remove_file(&socket).unwrap();
    ends(server);
    assert_eq!(Arc::strong_count(&second), 1, "its threads have ended");
    ends(serve_in(&node, second));
    assert!(!socket.exists(), "what is its own goes");
}

#[test]
fn there_is_one_daemon_for_a_run_directory() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    let daemon = node.start();
    let config = node.config_file();
    let second = node.host.root().run(|| dcenetd().arg("--config").arg(&config).output()).unwrap();
    let stderr = String::from_utf8(second.stderr).unwrap();
    assert!(second.status.code() == Some(1) && stderr.contains("dcenetd.lock; stop it"), "{stderr}");
    node.call(&Nobody, "STATUS", "web", None, &node.network).expect("the first serves");
    daemon.stop();
    assert!(node.start().stop().success());
}
