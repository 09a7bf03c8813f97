//! Bugs of the reference plugins (Debian's containernetworking-plugins 1.1.1; most stand in 1.9.1 too), each beside what
//! ours does in the same situation. A test fails as well should theirs have learnt it, for then it proves nothing.

use std::path::{Path, PathBuf};

use dcenet_core::test_support::{HostState, TestHost};
use serde_json::{Value, json};

use crate::common::{Node, Pod, elements, has_nft};
use crate::{has, libcni};

const PLUGINS: &str = "/usr/lib/cni";

fn is_here() -> bool {
    has(&[("/usr/lib/cni/bridge", "containernetworking-plugins"), ("/usr/sbin/iptables", "iptables")])
}

/// One of theirs, on a host of its own.
struct Theirs {
    host: TestHost,
    conf: Value,
}

impl Theirs {
    fn new(conf: Value) -> Self {
        let mut theirs = Self { host: TestHost::new(), conf };
        theirs.conf["cniVersion"] = json!("1.0.0");
        theirs.conf["name"] = json!("shop");
        theirs
    }

    /// With addresses from 10.20.0.2 on, so many.
    fn with_addresses(mut self, count: u8) -> Self {
        let last = format!("10.20.0.{}", 1 + count);
        let range =
            json!({ "subnet": "10.20.0.0/24", "gateway": "10.20.0.1", "rangeStart": "10.20.0.2", "rangeEnd": last });
        let directory = self.host.directory().join("host-local");
        self.conf["ipam"] = json!({ "type": "host-local", "dataDir": directory, "ranges": [[range]] });
        self
    }

    fn pod(&self, name: &str) -> Pod {
        Pod { container: name.to_owned(), name: name.to_owned(), netns: self.host.new_pod() }
    }

    fn call(
        &self,
        verb: &str,
        pod: Option<&Pod>,
        variables: &[(&str, &str)],
        previous: Option<&Value>,
    ) -> Result<Value, Value> {
        let mut conf = self.conf.clone();
        if let Some(previous) = previous {
            conf["prevResult"] = previous.clone();
        }
        let program = Path::new(PLUGINS).join(conf["type"].as_str().unwrap());
        libcni::run(&self.host, &program, PLUGINS, verb, pod, variables, &conf)
    }

    fn add(&self, pod: &Pod) -> Result<Value, Value> {
        self.call("ADD", Some(pod), &[], None)
    }

    fn del(&self, pod: &Pod) -> Result<Value, Value> {
        self.call("DEL", Some(pod), &[], None)
    }

    /// How many addresses its store holds.
    fn held(&self) -> usize {
        let files = std::fs::read_dir(self.host.directory().join("host-local/shop")).into_iter().flatten().flatten();
        files.filter(|f| f.file_name().to_string_lossy().starts_with("10.")).count()
    }
}

/// A node of ours with this link, and one pool of one family.
fn ours(link: Value, subnet: &str) -> Node {
    let mut node = Node::new();
    node.config["link"] = link;
    node.config["ipam"]["pools"] = json!([{ "name": "v4", "subnet": subnet, "gateway": "10.20.0.1" }]);
    node.config["ipam"]["routes"] = json!([]);
    // Theirs has no such thing: what was released may be had at once.
    node.config["ipam"]["cooldown"] = json!("0s");
    node
}

fn bridge() -> Value {
    json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true })
}

/// A link to the world outside, of which macvlan devices are made.
fn with_uplink(host: &TestHost) {
    host.root().sh("ip link add up0 type veth peer name far0; ip link set up0 up; ip link set far0 up");
}

fn veths(host: &TestHost) -> usize {
    host.state().lines().filter(|l| l.starts_with("link ") && l.contains("\"veth\"")).count()
}

fn message(error: &Value) -> &str {
    error["msg"].as_str().unwrap_or_else(|| panic!("{error} says nothing"))
}

/// What ours does where the only address is taken: it leaves all as it was, and a retry succeeds when there is one.
fn a_failed_add_leaves_nothing(node: &Node) {
    let first = node.pod("first");
    node.add(&first).unwrap();
    let (host, rival) = (node.host.state(), node.pod("rival"));
    let untouched = rival.state();
    let error = node.add(&rival).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert_eq!(host.diff(&node.host.state()), "");
    assert_eq!(untouched.diff(&rival.state()), "");
    assert_eq!((node.host.records().len(), node.store().len()), (1, 1));
    node.del(&first).unwrap();
    node.add(&rival).unwrap();
}

/// A rollback that looks at another variable than the one with the error.
#[test]
fn r1_macvlan_leaves_its_link_where_no_address_is_to_be_had() {
    if !is_here() {
        return;
    }
    let theirs = Theirs::new(json!({ "type": "macvlan", "master": "up0" })).with_addresses(1);
    with_uplink(&theirs.host);
    let (first, rival) = (theirs.pod("first"), theirs.pod("rival"));
    theirs.add(&first).unwrap();
    let error = theirs.add(&rival).unwrap_err();
    assert!(message(&error).contains("no IP addresses available"), "{error}");
    assert!(rival.netns.link("eth0").is_some(), "theirs left no link");
    theirs.del(&first).unwrap();
    let error = theirs.add(&rival).unwrap_err();
    assert!(message(&error).contains("exist"), "{error}");

    let node = ours(json!({ "kind": "macvlan", "parent": "up0" }), "10.20.0.0/30");
    with_uplink(&node.host);
    a_failed_add_leaves_nothing(&node);
}

/// containernetworking/plugins issue 29.
#[test]
fn r2_bridge_leaves_its_veth_where_no_address_is_to_be_had() {
    if !is_here() {
        return;
    }
    let theirs = Theirs::new(json!({ "type": "bridge", "bridge": "cni0" })).with_addresses(1);
    let (first, rival) = (theirs.pod("first"), theirs.pod("rival"));
    theirs.add(&first).unwrap();
    let before = veths(&theirs.host);
    let error = theirs.add(&rival).unwrap_err();
    assert!(message(&error).contains("no IP addresses available"), "{error}");
    assert_eq!(veths(&theirs.host), before + 1);
    let error = theirs.add(&rival).unwrap_err();
    assert!(message(&error).contains("exist"), "{error}");

    a_failed_add_leaves_nothing(&ours(bridge(), "10.20.0.0/30"));
}

#[test]
fn r3_bridge_without_addresses_cannot_be_checked() {
    if !is_here() {
        return;
    }
    let theirs = Theirs::new(json!({ "type": "bridge", "bridge": "cni0" }));
    let pod = theirs.pod("web");
    let result = theirs.add(&pod).unwrap();
    let error = theirs.call("CHECK", Some(&pod), &[], Some(&result)).unwrap_err();
    assert!(message(&error).contains("no plugin name provided"), "{error}");

    let mut node = ours(json!({ "kind": "bridge", "bridge": "dc0" }), "10.20.0.0/24");
    node.config.as_object_mut().unwrap().remove("ipam");
    let pod = node.pod("web");
    let result = node.add(&pod).unwrap();
    node.check(&pod, &result).unwrap();
    // The twin: what is amiss is told.
    pod.netns.sh("ip link set eth0 down");
    let error = node.check(&pod, &result).unwrap_err();
    assert_eq!(error["code"], 120, "{error}");
}

/// A lock on the path, which is opened so that it is made.
#[test]
fn r4_sbr_puts_a_file_where_the_namespace_was() {
    if !is_here() {
        return;
    }
    let theirs = Theirs::new(json!({ "type": "sbr" }));
    let pod = theirs.pod("web");
    pod.remove_namespace();
    theirs.del(&pod).unwrap_err();
    assert!(pod.netns.path().is_file(), "theirs made no file");
    // Which others then stumble over.
    let loopback = Theirs { conf: json!({ "type": "loopback", "cniVersion": "1.0.0", "name": "lo" }), ..theirs };
    loopback.del(&pod).unwrap_err();

    let node = ours(bridge(), "10.20.0.0/24");
    let pod = node.pod("web");
    node.add(&pod).unwrap();
    pod.remove_namespace();
    node.del(&pod).unwrap();
    assert!(!pod.netns.path().exists(), "ours made a file");
    assert_eq!((node.host.records().len(), node.store().len()), (0, 0));
    // Nor does it stumble over one.
    std::fs::write(pod.netns.path(), "").unwrap();
    node.del(&pod).unwrap();
}

/// containernetworking/plugins issue 810.
#[test]
fn r5_bridge_leaves_its_masquerading_where_the_namespace_is_gone() {
    if !is_here() || !has_nft() {
        return;
    }
    let theirs =
        Theirs::new(json!({ "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true })).with_addresses(9);
    let rules = || theirs.host.root().sh("iptables -t nat -S").lines().filter(|l| l.contains("CNI-")).count();
    let pod = theirs.pod("web");
    theirs.add(&pod).unwrap();
    let entered = rules();
    assert!(entered > 0);
    pod.remove_namespace();
    theirs.call("DEL", Some(&pod), &[("CNI_NETNS", "")], None).unwrap();
    assert_eq!((rules(), theirs.held()), (entered, 0));

    let mut node = ours(bridge(), "10.20.0.0/24");
    node.config["nat"] = json!({ "masquerade": true });
    let pod = node.pod("web");
    node.add(&pod).unwrap();
    assert_ne!(elements(&node), [""; 0]);
    pod.remove_namespace();
    node.del_without_namespace(&pod).unwrap();
    assert_eq!(elements(&node), [""; 0]);
    assert_eq!((node.host.records().len(), node.store().len()), (0, 0));
}

/// containernetworking/plugins issues 1013 and 1047.
#[test]
fn r6_bridge_collects_nothing() {
    if !is_here() {
        return;
    }
    let mut theirs = Theirs::new(json!({ "type": "bridge", "bridge": "cni0" })).with_addresses(9);
    for name in ["lost", "alive"] {
        theirs.add(&theirs.pod(name)).unwrap();
    }
    theirs.conf["cniVersion"] = json!("1.1.0");
    theirs.conf["cni.dev/valid-attachments"] = json!([{ "containerID": "alive", "ifname": "eth0" }]);
    let answer = theirs.call("GC", None, &[], None);
    // 1.9.1 says that it did.
    assert_eq!(theirs.held(), 2, "{answer:?}");

    let node = ours(bridge(), "10.20.0.0/24");
    let (lost, alive) = (node.pod("lost"), node.pod("alive"));
    node.add(&lost).unwrap();
    node.add(&alive).unwrap();
    node.gc(Some(&[&alive])).unwrap();
    assert_eq!((node.host.records().len(), node.store().len()), (1, 1));
    assert!(node.store()[0].contains(&alive.container), "{:?}", node.store());
    alive.ping("10.20.0.1");
}

#[test]
fn r7_host_device_keeps_the_address_where_the_namespace_is_gone() {
    if !is_here() {
        return;
    }
    let theirs = Theirs::new(json!({ "type": "host-device", "device": "up0" })).with_addresses(9);
    with_uplink(&theirs.host);
    let pod = theirs.pod("web");
    theirs.add(&pod).unwrap();
    pod.remove_namespace();
    let error = theirs.del(&pod).unwrap_err();
    assert!(message(&error).contains("namespace") || message(&error).contains("netns"), "{error}");
    theirs.call("DEL", Some(&pod), &[("CNI_NETNS", "")], None).unwrap();
    assert_eq!(theirs.held(), 1, "theirs has learnt to release");

    for without in [false, true] {
        let node = ours(json!({ "kind": "host-device", "device": "up0" }), "10.20.0.0/24");
        with_uplink(&node.host);
        let pod = node.pod("web");
        node.add(&pod).unwrap();
        assert_eq!(node.store().len(), 1);
        pod.remove_namespace();
        if without { node.del_without_namespace(&pod) } else { node.del(&pod) }.unwrap();
        assert_eq!((node.host.records().len(), node.store().len()), (0, 0));
    }
}

/// The arguments of an interface plugin are no arguments of the IPAM plugin that it asks.
#[test]
fn r8_bridge_with_a_mac_address_in_the_arguments_fails_and_leaves_its_link() {
    if !is_here() {
        return;
    }
    let mac = "02:00:00:00:00:07";
    let arguments = format!("MAC={mac}");
    let variables = [("CNI_ARGS", arguments.as_str())];
    let theirs = Theirs::new(json!({ "type": "bridge", "bridge": "cni0" })).with_addresses(9);
    let (before, pod) = (veths(&theirs.host), theirs.pod("web"));
    let error = theirs.call("ADD", Some(&pod), &variables, None).unwrap_err();
    assert!(message(&error).contains("ARGS"), "{error}");
    assert_eq!(veths(&theirs.host), before + 1);

    let node = ours(bridge(), "10.20.0.0/24");
    let pod = node.pod("web");
    let program = PathBuf::from(env!("CARGO_BIN_EXE_dcenet"));
    libcni::run(&node.host, &program, PLUGINS, "ADD", Some(&pod), &variables, &node.config).unwrap();
    assert_eq!(pod.netns.link("eth0").unwrap().mac.unwrap().to_string(), mac);
}

/// Ours has settings of the device where theirs has sysctls; both name the interface by what the runtime calls it.
#[test]
fn r9_tuning_of_an_interface_cannot_be_checked() {
    if !is_here() {
        return;
    }
    let theirs = Theirs::new(json!({ "type": "tuning", "sysctl": { "net.ipv4.conf.IFNAME.arp_filter": "1" } }));
    let pod = theirs.pod("web");
    pod.netns.sh("ip link add eth0 type veth peer name eth1");
    let untuned = HostState::capture(pod.netns.netns());
    let result = json!({ "cniVersion": "1.0.0", "interfaces": [{ "name": "eth0", "sandbox": pod.netns.path() }] });
    let result = theirs.call("ADD", Some(&pod), &[], Some(&result)).unwrap();
    assert_eq!(pod.netns.sh("cat /proc/sys/net/ipv4/conf/eth0/arp_filter").trim(), "1");
    assert_eq!(untuned.diff(&pod.state()), "");
    let error = theirs.call("CHECK", Some(&pod), &[], Some(&result)).unwrap_err();
    assert!(message(&error).contains("IFNAME"), "{error}");

    let mut link = bridge();
    link["tuning"] = json!({ "txQueueLen": 500, "promisc": true });
    let node = ours(link, "10.20.0.0/24");
    let pod = node.pod("web");
    let result = node.add(&pod).unwrap();
    assert!(pod.netns.sh("ip link show eth0").contains("qlen 500"));
    node.check(&pod, &result).unwrap();
    pod.netns.sh("ip link set eth0 promisc off");
    assert_eq!(node.check(&pod, &result).unwrap_err()["code"], 120);
}
