//! Kinds of links through the binary, as a runtime uses them.

mod common;

use common::{Node, Pod};
use dcenet_core::test_support::{Rung, kernel_is_before, ping, require, require_with, tcp_echo};
use dcenet_ebpf::probe::Features;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Two pods come, reach each other and, where the kind promises it, the host; a check and a repeated ADD find all well;
/// they go without a trace, one of them after its namespace.
fn pods_of(node: &mut Node, link: Value, host: bool) {
    node.config["link"] = link;
    let before = node.host.state();
    let (a, b) = (node.pod("web"), node.pod("cache"));
    let empty = a.state();
    let first = node.add(&a).unwrap();
    node.add(&b).unwrap();
    assert_eq!(node.add(&a).unwrap(), first);
    node.check(&a, &first).unwrap();
    let device = first["interfaces"].as_array().unwrap().last().unwrap();
    assert_eq!((&device["name"], &device["sandbox"]), (&json!("eth0"), &json!(a.netns.path())));
    let address = |pod: &Pod, place: usize| {
        let shown = pod.netns.sh("ip -o addr show dev eth0 scope global");
        let line = shown.lines().nth(place).unwrap().to_owned();
        line.split_whitespace().nth(3).unwrap().split('/').next().unwrap().to_owned()
    };
    for place in [0, 1] {
        a.ping(&address(&b, place));
        b.ping(&address(&a, place));
    }
    if host {
        for target in ["10.20.0.1", "2001:db8:20::1"] {
            a.ping(target);
        }
        for place in [0, 1] {
            let target = address(&b, place).parse().unwrap();
            ping(node.host.root(), target, Duration::from_secs(20)).unwrap_or_else(|e| panic!("{target}: {e}"));
        }
    }
    node.status().unwrap();
    node.del(&a).unwrap();
    node.del_without_namespace(&a).unwrap();
    assert_eq!(empty.diff(&a.state()), "");
    b.remove_namespace();
    drop(b.netns);
    node.gc(Some(&[])).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while before != node.host.state() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(before.diff(&node.host.state()), "");
    assert_eq!(node.host.records(), Vec::<String>::new());
    assert!(node.store().iter().all(|line| !line.contains(" has ")), "{:?}", node.store());
}

fn segment(node: &Node) {
    node.host.root().sh("ip link add up0 type veth peer name far0; for end in far0 up0; do \
         ip link set $end addrgenmode none; ip link set $end up; done; \
         ip addr add 10.20.0.1/24 dev up0; ip addr add 2001:db8:20::1/64 dev up0 nodad");
}

fn router(node: &Node) {
    node.host.root().sysctl("ipv6/conf/all/forwarding", "1");
    node.host.root().sh("ip addr add 10.20.0.1/32 dev lo; ip addr add 2001:db8:20::1/128 dev lo nodad");
}

#[test]
fn macvlan_pods_reach_each_other_and_the_host() {
    if require(Rung::Netns) {
        let mut node = Node::new();
        segment(&node);
        pods_of(&mut node, json!({ "kind": "macvlan", "parent": "up0", "hostAccess": true }), true);
    }
}

#[test]
fn macvlan_pods_under_policy_reach_each_other() {
    if tcx(Rung::Kernel) {
        let mut node = Node::under_policy();
        segment(&node);
        pods_of(&mut node, json!({ "kind": "macvlan", "parent": "up0" }), false);
    }
}

/// A guard on the parent, before the device is up, or no pod.
#[test]
fn macvlan_pods_under_guard_reach_each_other() {
    if !tcx(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    segment(&node);
    node.config["policy"]["require"] = json!("guarded");
    let link = json!({ "kind": "macvlan", "parent": "up0" });
    if Features::probe().is_ok_and(|features| features.netns_cookie) {
        pods_of(&mut node, link, false);
        return;
    }
    node.config["link"] = link;
    let pod = node.pod("web");
    let error = node.add(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("policy.require \"guarded\""), "{error}");
    assert!(pod.netns.link("eth0").is_none());
    node.del(&pod).unwrap();
}

#[test]
fn ipvlan_pods_under_policy_reach_each_other() {
    if tcx(Rung::Vm) {
        for mode in ["l2", "l3"] {
            let mut node = Node::under_policy();
            segment(&node);
            pods_of(&mut node, json!({ "kind": "ipvlan", "parent": "up0", "mode": mode }), false);
        }
    }
}

/// In the same VLAN policy decides; into another one nothing passes, whatever it allows.
#[test]
fn bridge_pods_of_a_vlan_are_under_their_policy() {
    if !require(Rung::Kernel) || !require(Rung::Vm) {
        return;
    }
    let mut node = Node::under_policy();
    let [db, replica, far, web] = ["db", "replica", "far", "web"].map(|workload| node.pod(workload));
    let mut ends = Vec::new();
    let mut add = |pod: &Pod, app: &str, vlan: u16| {
        node.config["link"] = json!({ "kind": "bridge", "bridge": "dc0", "vlan": vlan });
        node.config["args"] = json!({ "cni": { "labels": [{ "key": "app", "value": app }] } });
        let result = node.add(pod).unwrap();
        node.check(pod, &result).unwrap();
        ends.push(result["interfaces"][1]["name"].as_str().unwrap().to_owned());
    };
    add(&db, "db", 10);
    add(&replica, "db", 10);
    add(&far, "db", 20);
    add(&web, "web", 10);
    let connects = |from: &Pod, to: &Pod, limit| {
        let shown = to.netns.sh("ip -o addr show dev eth0 scope global");
        let addresses = shown.lines().map(|line| line.split_whitespace().nth(3).unwrap().split('/').next().unwrap());
        let addresses: Vec<IpAddr> = addresses.map(|address| address.parse().unwrap()).collect();
        assert_eq!(addresses.iter().map(IpAddr::is_ipv4).collect::<Vec<_>>(), [true, false]);
        // More than once: who was out of reach just now is a neighbour that did not answer.
        let connects = |address: &IpAddr| {
            let deadline = Instant::now() + limit;
            std::iter::repeat_with(|| tcp_echo(&from.netns, &to.netns, *address, limit).is_ok())
                .find(|connected| *connected || Instant::now() > deadline)
        };
        addresses.iter().map(|address| connects(address).unwrap_or_default()).collect::<Vec<_>>()
    };
    let (long, short) = (Duration::from_secs(20), Duration::from_millis(400));
    assert_eq!(connects(&db, &replica, long), [true, true]);
    assert_eq!(connects(&replica, &db, long), [true, true]);
    assert_eq!(connects(&web, &db, short), [false, false]);
    assert_eq!(connects(&db, &web, short), [false, false]);
    assert_eq!(connects(&db, &far, short), [false, false]);
    // The twins: without its VLAN it is policy that decides, and without policy all is let in.
    let (of_db, of_far) = (&ends[0], &ends[2]);
    node.host
        .root()
        .sh(&format!("bridge vlan del dev {of_far} vid 20; bridge vlan add dev {of_far} vid 10 pvid untagged"));
    assert_eq!(connects(&db, &far, long), [true, true]);
    node.host.root().sh(&format!("tc qdisc del dev {of_db} clsact"));
    assert_eq!(connects(&web, &db, long), [true, true]);
}

/// Before Linux 6.6 nothing holds programs on a device in a pod out of the pod's reach.
#[test]
fn policy_inside_a_pod_needs_tcx_or_says_so() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    segment(&node);
    node.config["link"] = json!({ "kind": "macvlan", "parent": "up0" });
    let pod = node.pod("web");
    match node.add(&pod) {
        Ok(_) => assert!(has_tcx()),
        Err(error) => {
            assert!(!has_tcx(), "{error}");
            assert_eq!(error["code"], 114, "{error}");
            assert!(error["msg"].as_str().unwrap().contains("needs tcx (Linux 6.6)"), "{error}");
            assert_eq!(node.host.records(), Vec::<String>::new());
        }
    }
    node.del(&pod).unwrap();
    // Who wants what a pod cannot pass by is refused on every kernel.
    node.config["policy"]["require"] = json!("full");
    let error = node.add(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("policy.require \"full\""), "{error}");
    assert!(pod.netns.link("eth0").is_none());
    node.del(&pod).unwrap();
}

fn has_tcx() -> bool {
    Features::probe().is_ok_and(|f| f.tcx)
}

fn tcx(rung: Rung) -> bool {
    require_with(rung, || (!has_tcx()).then(|| "the kernel has no tcx (Linux 6.6)".to_owned()))
}

#[test]
fn routed_pods_reach_each_other_and_the_host() {
    if require(Rung::Netns) {
        let mut node = Node::new();
        router(&node);
        pods_of(&mut node, json!({ "kind": "veth", "mtu": 1400 }), true);
    }
}

#[test]
fn ipvlan_pods_reach_each_other() {
    if require(Rung::Vm) {
        let mut node = Node::new();
        segment(&node);
        pods_of(&mut node, json!({ "kind": "ipvlan", "parent": "up0" }), false);
    }
}

#[test]
fn vrf_pods_reach_each_other() {
    if require(Rung::Vm) {
        let mut node = Node::new();
        router(&node);
        // With the first domain of a namespace the kernel makes rules that stay (`vrf_add_fib_rules` in
        // drivers/net/vrf.c).
        node.host.root().sh("ip link add first type vrf table 9; ip link del first");
        pods_of(&mut node, json!({ "kind": "vrf", "vrf": "red", "table": 77 }), false);
    }
}

#[test]
fn netkit_pods_reach_each_other_and_the_host_or_the_kernel_is_named() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    router(&node);
    let link = json!({ "kind": "netkit" });
    if std::env::var_os("DCENET_VM").is_some() && !kernel_is_before(6, 7) {
        return pods_of(&mut node, link, true);
    }
    node.config["link"] = link;
    let pod = node.pod("web");
    if let Err(error) = node.add(&pod) {
        assert_eq!(error["code"], 114, "{error}");
        assert!(error["msg"].as_str().unwrap().contains("it needs Linux 6.7 or later with CONFIG_NETKIT"), "{error}");
        assert_eq!(node.host.records(), Vec::<String>::new());
    }
    node.del(&pod).unwrap();
}

#[test]
fn a_device_is_lent_and_comes_back() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    segment(&node);
    node.host.root().sysctl("ipv6/conf/default/addr_gen_mode", "1");
    node.host.root().sh("ip link set far0 nomaster; ip link add seg type bridge; ip link set seg addrgenmode none; \
         ip link set seg up; ip addr flush dev up0; ip addr add 10.20.0.1/24 dev seg; \
         ip link set far0 master seg; ip link set up0 addrgenmode none; ip link set up0 mtu 1450; \
         ip addr add 192.0.2.1/24 dev up0");
    let before = node.host.state();
    node.config["link"] = json!({ "kind": "host-device", "device": "up0", "mtu": 1400 });
    let pod = node.pod("web");
    let result = node.add(&pod).unwrap();
    assert_eq!(result["interfaces"][0]["mac"], pod.netns.link("eth0").unwrap().mac.unwrap().to_string());
    node.check(&pod, &result).unwrap();
    pod.ping("10.20.0.1");
    let rival = node.pod("cache");
    let error = node.add(&rival).unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("another pod may have it"), "{error}");
    node.del(&rival).unwrap();
    // The runtime has forgotten the namespace.
    node.del_without_namespace(&pod).unwrap();
    assert_eq!(before.diff(&node.host.state()), "");
}

#[test]
fn wrong_links_are_refused_by_field() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    let pod = node.pod("web");
    let before = node.host.state();
    for (link, word) in [
        (json!({ "kind": "macvlan", "parent": "nope" }), "link.parent \"nope\""),
        (json!({ "kind": "macvlan", "parent": "lo" }), "loopback"),
        (json!({ "kind": "macvlan" }), "link: missing field `parent`"),
        (json!({ "kind": "macvlan", "parent": "up0", "mode": "brigde" }), "link.mode"),
        (json!({ "kind": "vlan", "parent": "up0", "id": 4095 }), "link.id"),
        (json!({ "kind": "tap", "owner": -1 }), "link.owner"),
    ] {
        node.config["link"] = link.clone();
        let error = node.add(&pod).unwrap_err();
        assert_eq!(error["code"], 7, "{link}: {error}");
        assert!(error["msg"].as_str().unwrap().contains(word), "{link}: {error}");
    }
    assert_eq!(before.diff(&node.host.state()), "");
}
