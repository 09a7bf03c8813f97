//! Where packets of a pod of several interfaces go.

use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestNetNs, ping, require};
use serde_json::{Value, json};

use super::super::common::{Node, Pod};
use super::{Everything, has_debians, node, ours, status, warm};

/// Two segments behind two routers, and somebody who reaches the pod's networks over either: `far`, behind both.
///
/// ```text
///  pod eth0 (our bridge dc0) --- host --- r0 ---+
///                                               far (10.99.0.9, 2001:db8:99::9)
///  pod net1 (macvlan on uplink) -- wire: router +
/// ```
struct Behind {
    node: Node,
    router: TestNetNs,
    far: TestNetNs,
}

impl Behind {
    fn new(delegated: bool) -> Self {
        let mut node = node(json!([]));
        let (router, far) = (node.host.new_pod(), node.host.new_pod());
        let root = node.host.root();
        root.sh(&format!("ip link set wire netns {}", router.path().display()));
        root.sh(&format!("ip link add tofar type veth peer name far0 netns {}", far.path().display()));
        router.sh(&format!("ip link add tofar type veth peer name far1 netns {}", far.path().display()));
        for (netns, commands) in [
            (root, "ip addr add 10.90.0.1/24 dev tofar; ip -6 addr add 2001:db8:90::1/64 dev tofar nodad
                    ip -6 addr add fe80::90/64 dev tofar nodad; ip link set tofar up"),
            (&router, "ip addr add 10.61.0.1/24 dev wire; ip addr add 10.61.0.254/24 dev wire; ip -6 addr add 2001:db8:61::1/64 dev wire nodad; ip link set wire up
                       ip addr add 10.91.0.1/24 dev tofar; ip -6 addr add 2001:db8:91::1/64 dev tofar nodad; ip link set tofar up"),
            (&far, "ip addr add 10.90.0.9/24 dev far0; ip -6 addr add 2001:db8:90::9/64 dev far0 nodad; ip link set far0 up
                    ip addr add 10.91.0.9/24 dev far1; ip -6 addr add 2001:db8:91::9/64 dev far1 nodad; ip link set far1 up
                    ip route add 10.20.0.0/24 via 10.90.0.1; ip -6 route add 2001:db8:20::/64 via 2001:db8:90::1
                    ip route add 10.61.0.0/24 via 10.91.0.1; ip -6 route add 2001:db8:61::/64 via 2001:db8:91::1"),
        ] {
            netns.sh(commands);
        }
        for netns in [root, &router] {
            netns.sysctl("ipv4/ip_forward", "1");
            netns.sysctl("ipv6/conf/all/forwarding", "1");
        }
        // Only who has a route back answers: the host knows nothing of 10.61.0.0/24, the router nothing of 10.20.0.0/24.
        let macvlan = json!({ "kind": "macvlan", "parent": "uplink" });
        let ipam = json!({ "type": "dcenet", "pools": [
            { "name": "s4", "subnet": "10.61.0.0/24", "ranges": ["10.61.0.5-10.61.0.50"], "gateway": "10.61.0.1" },
            { "name": "s6", "subnet": "2001:db8:61::/64", "gateway": "2001:db8:61::1" },
        ], "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] });
        let theirs = json!({
            "cniVersion": "1.0.0", "type": "macvlan", "master": "uplink",
            "ipam": { "type": "static",
                "addresses": [{ "address": "10.61.0.5/24", "gateway": "10.61.0.1" }, { "address": "2001:db8:61::5/64", "gateway": "2001:db8:61::1" }],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] },
        });
        let second = if delegated {
            json!({ "name": "storage", "delegate": theirs })
        } else {
            json!({ "name": "storage", "link": macvlan, "ipam": ipam })
        };
        node.config["networks"] = json!([ours(), second]);
        Self { node, router, far }
    }
}

fn default_links(pod: &Pod) -> Vec<String> {
    let text = pod.netns.sh("ip route show default; ip -6 route show default");
    text.lines().map(|l| l.split(" dev ").nth(1).unwrap().split(' ').next().unwrap().to_owned()).collect()
}

/// Whether somebody has an answer from the address: at the first try, or at any of a minute, where neighbours are asked and
/// addresses become usable on a busy machine.
fn answered(client: &TestNetNs, address: &str, patient: bool) -> bool {
    let (begin, pause) = (Instant::now(), Duration::from_millis(200));
    loop {
        if ping(client, address.parse().unwrap(), Duration::from_secs(2)).is_ok() {
            return true;
        }
        if !patient || begin.elapsed() > Duration::from_secs(60) {
            return false;
        }
        std::thread::sleep(pause);
    }
}

/// Whether somebody far away has an answer from the address.
fn answers(behind: &Behind, address: &str) -> bool {
    answered(&behind.far, address, true)
}

/// Whether nobody far away has one, of whom others have been answered before.
fn is_silent(behind: &Behind, address: &str) -> bool {
    (0..3).all(|_| !answered(&behind.far, address, false))
}

/// What routes where, for who reads of a failure.
fn routes_of_all(behind: &Behind, pod: &Pod) -> String {
    let all = "ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all; ip neigh; ip -br addr";
    let netns =
        [("pod", &pod.netns), ("host", behind.node.host.root()), ("router", &behind.router), ("far", &behind.far)];
    netns.map(|(name, netns)| format!("{name}:\n{}", netns.sh(all))).join("\n")
}

fn addresses_of(result: &Value, interface: &str) -> Vec<String> {
    let ips = result["ips"].as_array().unwrap().iter();
    let of = |ip: &&Value| result["interfaces"][ip["interface"].as_u64().unwrap() as usize]["name"] == interface;
    ips.filter(of).map(|ip| ip["address"].as_str().unwrap().split('/').next().unwrap().to_owned()).collect()
}

#[test]
fn answers_leave_by_the_interface_that_was_asked() {
    if !has_debians(&["macvlan", "static"]) {
        return;
    }
    for delegated in [false, true] {
        let behind = Behind::new(delegated);
        let node = &behind.node;
        warm(node);
        let pod = node.pod("web");
        let before = Everything::of(node, &pod);
        let result = node.add(&pod).unwrap();
        assert_eq!(default_links(&pod), ["eth0", "eth0"]);
        let (first, second) = (addresses_of(&result, "eth0"), addresses_of(&result, "net1"));
        assert_eq!((first.len(), second.len()), (2, 2), "{result}");
        for address in first.iter().chain(&second) {
            assert!(answers(&behind, address), "{address} {delegated}: {}", routes_of_all(&behind, &pod));
        }
        node.check(&pod, &result).unwrap();
        let status = status(node, &pod).unwrap();
        assert_eq!(status[0]["gateway"], json!(["10.20.0.1", "2001:db8:20::1"]));
        assert!(status[1].get("gateway").is_none(), "{status:?}");

        // Without the rules what comes by the second interface is answered by the first, and lost.
        for address in &second {
            let family = if address.contains(':') { "-6" } else { "-4" };
            pod.netns.sh(&format!("ip {family} rule del from {address}"));
            assert!(is_silent(&behind, address), "{address} {delegated}");
        }
        for address in &first {
            assert!(answers(&behind, address), "{address}");
        }
        let drift = node.check(&pod, &result).unwrap_err();
        assert!(
            drift["msg"].as_str().unwrap().contains(&format!("the rule from {}/32 to table", second[0])),
            "{drift}"
        );
        node.del(&pod).unwrap();
        assert_eq!(before.diff(&Everything::of(node, &pod)), "");
        assert!(!behind.router.sh("ip addr").is_empty());
    }
}

#[test]
fn the_default_route_goes_to_whoever_asks_for_it_family_by_family() {
    if !has_debians(&["macvlan", "static"]) {
        return;
    }
    for delegated in [false, true] {
        for (wish, links) in [
            (json!(true), ["net1", "net1"]),
            (json!(["10.61.0.1"]), ["net1", "eth0"]),
            (json!(["2001:db8:61::1"]), ["eth0", "net1"]),
            // Another router than the network's own.
            (json!(["10.61.0.254"]), ["net1", "eth0"]),
            (json!(false), ["eth0", "eth0"]),
        ] {
            let mut behind = Behind::new(delegated);
            behind.node.config["networks"][1]["defaultRoute"] = wish.clone();
            let node = &behind.node;
            warm(node);
            let pod = node.pod("web");
            let before = Everything::of(node, &pod);
            let result = node.add(&pod).unwrap();
            assert_eq!(default_links(&pod), links, "{wish} {delegated}");
            for address in addresses_of(&result, "eth0").iter().chain(&addresses_of(&result, "net1")) {
                assert!(answers(&behind, address), "{address} {wish} {delegated}");
            }
            let defaults =
                result["routes"].as_array().unwrap().iter().filter(|r| r["dst"] == "0.0.0.0/0" || r["dst"] == "::/0");
            assert_eq!(defaults.count(), 2, "{result}");
            node.check(&pod, &result).unwrap();
            assert_eq!(node.add(&pod).unwrap(), result);
            node.del(&pod).unwrap();
            assert_eq!(before.diff(&Everything::of(node, &pod)), "");
        }
    }
    let mut behind = Behind::new(false);
    behind.node.config["networks"][0]["defaultRoute"] = json!(["10.20.0.1"]);
    behind.node.config["networks"][1]["defaultRoute"] = json!(true);
    let error = behind.node.add(&behind.node.pod("web")).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("network shop has that of IPv4 already"), "{error}");
}

/// A gateway that leads nowhere must not take the place of one that does.
#[test]
fn a_default_route_over_a_gateway_that_the_interface_does_not_reach_is_refused() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = node(json!([ours(), { "name": "more", "link": { "kind": "macvlan", "parent": "uplink" } }]));
    node.config["networks"][1]["ipam"] =
        json!({ "type": "dcenet", "pools": [{ "name": "s4", "subnet": "10.61.0.0/24", "gateway": "10.61.0.1" }] });
    node.config["networks"][0]["ipam"]["cooldown"] = json!("0s");
    node.config["networks"][1]["ipam"]["cooldown"] = json!("0s");
    warm(&node);
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    for gateway in ["10.16.0.1", "2001:db8:9::1", "fe80::1"] {
        node.config["networks"][1]["defaultRoute"] = json!([gateway]);
        let error = node.add(&pod).unwrap_err();
        assert_eq!(error["code"], 7, "{error}");
        let says = format!("network more (net1): default route: gateway {gateway} is not reached by interface net1");
        assert!(error["msg"].as_str().unwrap().starts_with(&says), "{error}");
        assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
    }
    node.config["networks"][1]["defaultRoute"] = json!(["10.61.0.77"]);
    node.add(&pod).unwrap();
    assert_eq!(default_links(&pod), ["net1", "eth0"]);
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
}

/// Debian's ptp has the subnet behind its router, where nobody answers ARP.
#[test]
fn pods_of_a_subnet_behind_a_router_reach_each_other_with_a_second_network() {
    if !has_debians(&["ptp", "host-local"]) {
        return;
    }
    let mut node = node(json!([]));
    let theirs = json!({
        "cniVersion": "1.0.0", "type": "ptp",
        "ipam": {
            "type": "host-local", "dataDir": node.host.directory().join("host-local"),
            "ranges": [[{ "subnet": "10.62.0.0/24" }], [{ "subnet": "2001:db8:62::/64" }]],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
        },
    });
    node.config["networks"] =
        json!([{ "name": "overlay", "delegate": theirs }, { "name": "more", "link": { "kind": "veth" } }]);
    // A router asks for its neighbours from its link-local address.
    for (name, value) in
        [("v4/ip_forward", "1"), ("v6/conf/all/forwarding", "1"), ("v6/conf/default/addr_gen_mode", "0")]
    {
        node.host.root().sysctl(&format!("ip{name}"), value);
    }
    let (a, b) = (node.pod("a"), node.pod("b"));
    let results = [node.add(&a).unwrap(), node.add(&b).unwrap()];
    for address in addresses_of(&results[1], "eth0") {
        assert!(
            answered(&a.netns, &address, true),
            "{address}: {}",
            b.netns.sh("ip rule; ip route show table all; ip -6 route show table all")
        );
    }
    node.check(&a, &results[0]).unwrap();
    // The twin: with the subnet on the link in its own table, b asks nobody's neighbour for a.
    let rule = b.netns.sh("ip -4 rule show pref 2200");
    let table = rule.split("lookup ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    b.netns.sh(&format!("ip route replace 10.62.0.0/24 dev eth0 table {table}"));
    let addresses = addresses_of(&results[1], "eth0");
    let ipv4 = addresses.iter().find(|a| a.contains('.')).unwrap();
    assert!((0..3).all(|_| !answered(&a.netns, ipv4, false)));
    node.del(&a).unwrap();
    node.del(&b).unwrap();
}

/// What a plugin says of the path beside the gateway stays with its default route.
#[test]
fn a_default_route_keeps_mtu_segment_size_and_source() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node(json!([
        { "name": "a", "delegate": { "cniVersion": "1.0.0", "type": "maker" } }, { "name": "more", "link": { "kind": "veth" } },
    ]));
    let script = "#!/bin/sh\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\nn=\"nsenter --net=$CNI_NETNS\"\n\
        [ $CNI_COMMAND = DEL ] && { $n ip link del $CNI_IFNAME; exit 0; }\n[ $CNI_COMMAND = ADD ] || exit 0\nset -e\n\
        $n ip link add $CNI_IFNAME type veth peer name far\n$n ip link set far up\n$n ip link set $CNI_IFNAME up\n\
        $n ip addr add 10.63.0.5/24 dev $CNI_IFNAME\n$n ip addr add 10.63.0.6/24 dev $CNI_IFNAME\n\
        $n ip route add default via 10.63.0.1 src 10.63.0.6 mtu 1400 advmss 1360\n\
        echo '{\"cniVersion\": \"1.0.0\", \"ips\": [{\"address\": \"10.63.0.5/24\"}]}'\n";
    node.install("maker", script);
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    node.add(&pod).unwrap();
    let table = pod.netns.sh("ip -4 rule show from 10.63.0.5");
    let table = table.split("lookup ").nth(1).unwrap().split_whitespace().next().unwrap();
    for route in [pod.netns.sh("ip route show default"), pod.netns.sh(&format!("ip route show default table {table}"))]
    {
        assert!(route.contains("via 10.63.0.1 dev eth0 proto 220 src 10.63.0.6"), "{route}");
        assert!(route.contains("mtu 1400") && route.contains("advmss 1360"), "{route}");
        assert_eq!(route.lines().count(), 1, "{route}");
    }
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
}

/// What the tables of interfaces cannot have would be passed by there.
#[test]
fn routes_that_cannot_be_copied_are_refused_by_name() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node(json!([
        { "name": "a", "delegate": { "cniVersion": "1.0.0", "type": "maker" } }, { "name": "more", "link": { "kind": "veth" } },
    ]));
    for (routes, says) in [
        ("$n ip route add 10.64.0.0/16 via 10.63.0.1", None),
        ("$n ip route add unreachable 169.254.169.254", Some("route 169.254.169.254/32 of the pod has no next hop")),
        (
            "$n ip route add 10.64.0.0/16 nexthop via 10.63.0.1 nexthop via 10.63.0.2",
            Some("route 10.64.0.0/16 of the pod has several next hops"),
        ),
        (
            "$n ip -4 route add default via inet6 fe80::1 dev $CNI_IFNAME",
            Some("route 0.0.0.0/0 of the pod has a router of the other family"),
        ),
    ] {
        // The namespace outlives the interface, and a route that leads to none outlives it too.
        let script = format!(
            "#!/bin/sh\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\nn=\"nsenter --net=$CNI_NETNS\"\n\
            [ $CNI_COMMAND = DEL ] && {{ $n ip route flush type unreachable; $n ip link del $CNI_IFNAME; exit 0; }}\n\
            [ $CNI_COMMAND = ADD ] || exit 0\nset -e\n\
            $n ip link add $CNI_IFNAME type veth peer name far\n$n ip link set far up\n$n ip link set $CNI_IFNAME up\n\
            $n ip addr add 10.63.0.5/24 dev $CNI_IFNAME\n{routes}\n\
            echo '{{\"cniVersion\": \"1.0.0\", \"ips\": [{{\"address\": \"10.63.0.5/24\"}}]}}'\n"
        );
        node.install("maker", &script);
        let pod = node.pod("web");
        let before = Everything::of(&node, &pod);
        match (node.add(&pod), says) {
            (Ok(_), None) => drop(node.del(&pod).unwrap()),
            (Err(error), Some(says)) => assert!(error["msg"].as_str().unwrap().contains(says), "{error}"),
            (outcome, says) => panic!("{outcome:?}, {says:?}"),
        }
        assert_eq!(before.diff(&Everything::of(&node, &pod)), "", "{routes}");
    }
}
