//! Where Debian's reference plugins (package containernetworking-plugins, `bridge` with `host-local`) leave something
//! behind or refuse, beside ours in the same situation. Each test fails as well should theirs have learnt it, for then
//! it proves nothing any more.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Node, Pod, Running};
use dcenet_core::test_support::{HostState, Rung, TestHost, require_with};
use serde_json::{Value, json};

const BRIDGE: &str = "/usr/lib/cni/bridge";

fn installed() -> bool {
    require_with(Rung::Services, || {
        let missing = !Path::new(BRIDGE).exists();
        missing.then(|| format!("{BRIDGE} is missing: install containernetworking-plugins"))
    })
}

/// Their plugin on a host of its own.
struct Theirs {
    host: TestHost,
    config: Value,
}

impl Theirs {
    /// With so many addresses.
    fn new(addresses: u8) -> Self {
        let host = TestHost::new();
        let config = json!({
            "cniVersion": "1.0.0", "name": "shop", "type": "bridge", "bridge": "cni0", "isGateway": true,
            "ipam": {
                "type": "host-local", "dataDir": host.directory().join("host-local"),
                "ranges": [[{
                    "subnet": "10.20.0.0/24", "gateway": "10.20.0.1",
                    "rangeStart": "10.20.0.2", "rangeEnd": format!("10.20.0.{}", 1 + addresses),
                }]],
            },
        });
        Self { host, config }
    }

    fn run(&self, verb: &str, pod: Option<&Pod>, config: &Value) -> Result<Value, Value> {
        let mut command = Command::new(BRIDGE);
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_PATH", "/usr/lib/cni");
        // Its helpers for the host's firewall and settings.
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        if let Some(pod) = pod {
            let (container, netns) = (&pod.container, pod.netns.path());
            command.env("CNI_CONTAINERID", container).env("CNI_NETNS", netns).env("CNI_IFNAME", "eth0");
        }
        self.host.root().run(|| Running::start(command, &config.to_string()).wait()).expect("nobody kills it")
    }

    fn add(&self, pod: &Pod) -> Result<Value, Value> {
        self.run("ADD", Some(pod), &self.config)
    }

    fn pod(&self, name: &str) -> Pod {
        Pod { container: name.to_owned(), name: name.to_owned(), netns: self.host.new_pod() }
    }

    /// Addresses that its store holds.
    fn held(&self) -> usize {
        let files = std::fs::read_dir(self.host.directory().join("host-local/shop")).into_iter().flatten().flatten();
        files.filter(|f| f.file_name().to_string_lossy().starts_with("10.")).count()
    }
}

fn veths(state: &HostState) -> usize {
    state.lines().filter(|l| l.starts_with("link ") && l.contains("\"veth\"")).count()
}

/// A node of ours with so many addresses in its smaller pool.
fn ours(subnet: &str) -> Node {
    let mut node = Node::new();
    node.config["ipam"]["pools"] = json!([{ "name": "v4", "subnet": subnet, "gateway": "10.20.0.1" }]);
    node.config["ipam"]["routes"] = json!([]);
    // Theirs has no such thing: what was released may be had at once.
    node.config["ipam"]["cooldown"] = json!("0s");
    node
}

/// containernetworking/plugins issue 29.
#[test]
fn an_add_that_gets_no_address_leaves_nothing() {
    if !installed() {
        return;
    }
    let theirs = Theirs::new(1);
    // It goes on living: the kernel would take its device away some time later.
    let (first, rival) = (theirs.pod("first"), theirs.pod("rival"));
    theirs.add(&first).unwrap();
    let (before, untouched) = (theirs.host.state(), rival.state());
    let error = theirs.add(&rival).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("no IP addresses available"), "{error}");
    assert_eq!(veths(&theirs.host.state()), veths(&before) + 1, "theirs left no device");
    assert_ne!(untouched, rival.state(), "theirs left the pod alone");

    let node = ours("10.20.0.0/30");
    let first = node.pod("first");
    node.add(&first).unwrap();
    let (before, rival) = (node.host.state(), node.pod("rival"));
    let untouched = rival.state();
    let error = node.add(&rival).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert_eq!(before.diff(&node.host.state()), "");
    assert_eq!(untouched.diff(&rival.state()), "");
    assert_eq!((node.host.records().len(), node.store().len()), (1, 1));
}

#[test]
fn a_repeated_add_has_the_same_answer() {
    if !installed() {
        return;
    }
    let theirs = Theirs::new(10);
    let pod = theirs.pod("web");
    theirs.add(&pod).unwrap();
    let error = theirs.add(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("already"), "{error}");

    let node = ours("10.20.0.0/24");
    let pod = node.pod("web");
    let first = node.add(&pod).unwrap();
    assert_eq!(node.add(&pod), Ok(first));
}

/// CNI 1.1.0, section 2, "GC": a runtime names what is alive after it has lost track, as after a crash.
#[test]
fn gc_frees_what_a_lost_pod_held() {
    if !installed() {
        return;
    }
    let theirs = Theirs::new(10);
    let (lost, alive) = (theirs.pod("lost"), theirs.pod("alive"));
    theirs.add(&lost).unwrap();
    theirs.add(&alive).unwrap();
    let before = theirs.host.state();
    let mut config = theirs.config.clone();
    config["cniVersion"] = json!("1.1.0");
    config["cni.dev/valid-attachments"] = json!([{ "containerID": "alive", "ifname": "eth0" }]);
    let answer = theirs.run("GC", None, &config);
    assert!(answer.is_err(), "theirs has learnt GC: {answer:?}");
    assert_eq!((theirs.held(), veths(&theirs.host.state())), (2, veths(&before)));

    let node = ours("10.20.0.0/24");
    let (lost, alive) = (node.pod("lost"), node.pod("alive"));
    node.add(&lost).unwrap();
    node.add(&alive).unwrap();
    let before = node.host.state();
    node.gc(Some(&[&alive])).unwrap();
    assert_eq!((node.store().len(), veths(&node.host.state())), (1, veths(&before) - 1));
    assert!(node.store()[0].contains(&alive.container), "{:?}", node.store());
    alive.ping("10.20.0.1");
}

/// A node that was restarted: namespaces, devices and what is below /run are gone, the directory of addresses is not
/// (containernetworking/cni issue 204). The runtime lists nothing as alive.
#[test]
fn addresses_of_before_a_restart_come_back() {
    if !installed() {
        return;
    }
    let theirs = Theirs::new(1);
    theirs.add(&theirs.pod("before")).unwrap();
    let restarted = Theirs { host: TestHost::new(), config: theirs.config.clone() };
    let error = restarted.add(&restarted.pod("after")).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("no IP addresses available"), "{error}");

    let node = ours("10.20.0.0/30");
    node.add(&node.pod("before")).unwrap();
    let mut restarted = Node { owner: None, host: TestHost::new(), config: node.config.clone() };
    restarted.config["runDir"] = json!(restarted.host.run_dir());
    restarted.gc(Some(&[])).unwrap();
    restarted.add(&restarted.pod("after")).unwrap();
}
