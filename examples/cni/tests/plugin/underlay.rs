//! Addresses that somebody on the underlay has already.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use dcenet_core::test_support::{HostState, Rung, TestNetNs, require};
use dcenet_ipam::QuarantinedAddress;
use serde_json::{Value, json};

use super::addresses;
use super::common::Node;

/// A node whose pods are macvlans on `up0`, and a host at the other end of the cable.
fn node() -> (Node, TestNetNs) {
    let mut node = Node::new();
    let neighbour = node.host.new_pod();
    node.host.root().sh(&format!("ip link add up0 type veth peer name far0 netns {}", neighbour.path().display()));
    for (netns, end) in [(&neighbour, "far0"), (node.host.root(), "up0")] {
        netns.sh(&format!("ip link set {end} addrgenmode none; ip link set {end} up"));
    }
    // As long as a busy machine may take to answer; an answer ends it.
    node.config["link"] = json!({ "kind": "macvlan", "parent": "up0", "underlay": { "within": "1s" } });
    node.config["ipam"]["cooldown"] = json!("0s");
    (node, neighbour)
}

fn hold(neighbour: &TestNetNs, addresses: &[&str]) {
    for address in addresses {
        let more = if address.contains(':') { " nodad" } else { "" };
        neighbour.sh(&format!("ip addr add {address} dev far0{more}"));
    }
}

fn mac(neighbour: &TestNetNs) -> String {
    neighbour.link("far0").unwrap().mac.unwrap().to_string()
}

fn quarantined(node: &Node) -> Vec<QuarantinedAddress> {
    pollster::block_on(node.ipam().quarantined()).unwrap()
}

fn nothing_is_left(node: &Node, before: &HostState) {
    assert_eq!(before.diff(&node.host.state()), "");
    assert_eq!(node.host.records(), Vec::<String>::new());
    assert!(node.store().iter().all(|line| !line.contains(" has ")), "{:?}", node.store());
}

#[test]
fn a_pod_whose_first_three_addresses_are_taken_gets_the_fourth() {
    if !require(Rung::Netns) {
        return;
    }
    let (node, neighbour) = node();
    hold(&neighbour, &["10.20.0.2/24", "10.20.0.3/24", "10.20.0.4/24", "2001:db8:20::2/64", "10.20.0.1/24"]);
    hold(&neighbour, &["2001:db8:20::1/64"]);
    let (before, pod) = (node.host.state(), node.pod("web"));
    let result = node.add(&pod).unwrap();
    assert_eq!(addresses(&result), ["10.20.0.5/24", "2001:db8:20::3/64"]);
    let bad: Vec<IpAddr> = ["10.20.0.2", "10.20.0.3", "10.20.0.4", "2001:db8:20::2"].map(|a| a.parse().unwrap()).into();
    let mut seen = quarantined(&node);
    seen.sort_by_key(|q| q.address);
    assert_eq!(seen.iter().map(|q| q.address).collect::<Vec<_>>(), bad);
    for entry in &seen {
        assert_eq!(entry.seen.unwrap().to_string(), mac(&neighbour));
        assert!(entry.until.is_some() && entry.reason.contains("is used by"), "{entry:?}");
    }
    for gateway in ["10.20.0.1", "2001:db8:20::1"] {
        pod.ping(gateway);
    }
    node.check(&pod, &result).unwrap();
    // Again gives the same, and asks nobody.
    assert_eq!(node.add(&pod).unwrap(), result);
    // The next pod is not given them either.
    let other = node.pod("cache");
    assert_eq!(addresses(&node.add(&other).unwrap()), ["10.20.0.6/24", "2001:db8:20::4/64"]);
    node.del(&pod).unwrap();
    node.del(&other).unwrap();
    nothing_is_left(&node, &before);
}

/// The guard removed: the pod gets what the neighbour has.
#[test]
fn without_probes_a_pod_gets_an_address_that_is_in_use() {
    if !require(Rung::Netns) {
        return;
    }
    let (mut node, neighbour) = node();
    hold(&neighbour, &["10.20.0.2/24"]);
    node.config["link"]["underlay"] = json!({ "probes": 0 });
    assert_eq!(addresses(&node.add(&node.pod("web")).unwrap())[0], "10.20.0.2/24");
    assert_eq!(quarantined(&node), []);
}

#[test]
fn an_address_that_is_asked_for_or_fixed_is_not_replaced() {
    if !require(Rung::Netns) {
        return;
    }
    let (node, neighbour) = node();
    hold(&neighbour, &["10.20.0.77/24", "10.20.0.55/24", "2001:db8:20::55/64"]);
    let before = node.host.state();
    let mut asking = node.config.clone();
    asking["runtimeConfig"] = json!({ "ips": ["10.20.0.55", "2001:db8:20::55"] });
    let refused = |name: &str, config: &Value, bad: &str| {
        let pod = node.pod(name);
        let inside = pod.state();
        let error = node.call("ADD", &pod, &config.to_string()).unwrap_err();
        assert_eq!(error["code"], 110, "{error}");
        let message = error["msg"].as_str().unwrap();
        assert!(message.contains(&format!("{bad} is used by {}", mac(&neighbour))), "{error}");
        assert!(message.contains("is fixed, and not replaced"), "{error}");
        assert_eq!(inside.diff(&pod.state()), "");
        node.del(&pod).unwrap();
    };
    refused("db", &node.config, "10.20.0.77");
    refused("web", &asking, "10.20.0.55");
    assert_eq!(quarantined(&node), []);
    nothing_is_left(&node, &before);
    // Once its holder is gone the claim has its own.
    neighbour.sh("ip addr flush dev far0");
    assert_eq!(addresses(&node.add(&node.pod("db")).unwrap())[0], "10.20.0.77/24");
}

#[test]
fn a_segment_full_of_foreign_addresses_ends_in_an_error_that_names_them() {
    if !require(Rung::Netns) {
        return;
    }
    let (mut node, neighbour) = node();
    let held: Vec<String> = (2..7).map(|n| format!("10.20.0.{n}")).collect();
    for address in &held {
        hold(&neighbour, &[&format!("{address}/24")]);
    }
    // By the number of replacements, which are kept from others, and by a pool that has no more.
    let cases = [(0, "10.20.0.0/24", 110, 1, 0), (1, "10.20.0.0/24", 110, 2, 1), (8, "10.20.0.0/29", 11, 4, 4)];
    for (replacements, subnet, code, named, kept) in cases {
        node.config["link"]["underlay"]["replacements"] = json!(replacements);
        node.config["ipam"]["pools"][0]["subnet"] = json!(subnet);
        node.config["ipam"]["pools"][0]["claims"] = json!({});
        let (before, pod) = (node.host.state(), node.pod("web"));
        let inside = pod.state();
        let error = node.add(&pod).unwrap_err();
        assert_eq!(error["code"], code, "{error}");
        let message = error["msg"].as_str().unwrap();
        let told = held.iter().filter(|a| message.contains(&format!("{a} is used by {}", mac(&neighbour)))).count();
        assert_eq!((told, quarantined(&node).len()), (named, kept), "{error}");
        assert_eq!(message.contains("link.underlay.replacements"), code == 110, "{error}");
        assert_eq!(inside.diff(&pod.state()), "");
        nothing_is_left(&node, &before);
        node.del(&pod).unwrap();
    }
}

/// One address of two is fixed: that ends it, and the other is not replaced for nothing. Both are told of.
#[test]
fn with_a_fixed_address_in_conflict_no_other_is_replaced() {
    if !require(Rung::Netns) {
        return;
    }
    let (node, neighbour) = node();
    // Of `db`, its fixed one, and the first of the other pool.
    hold(&neighbour, &["10.20.0.77/24", "2001:db8:20::2/64"]);
    let (before, pod) = (node.host.state(), node.pod("db"));
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["code"], 110, "{error}");
    let message = error["msg"].as_str().unwrap();
    for part in ["10.20.0.77 is used by", "2001:db8:20::2 is used by", "10.20.0.77 is fixed, and not replaced"] {
        assert!(message.contains(part), "{error}");
    }
    assert_eq!(quarantined(&node), []);
    nothing_is_left(&node, &before);
}

#[test]
fn a_gateway_is_asked_after_the_addresses_and_its_silence_has_a_code() {
    if !require(Rung::Netns) {
        return;
    }
    let (mut node, neighbour) = node();
    node.config["link"]["underlay"] = json!({ "within": "1s", "gatewayProbe": "fail" });
    hold(&neighbour, &["10.20.0.2/24"]);
    let (before, pod) = (node.host.state(), node.pod("web"));
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["code"], 111, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("10.20.0.1, 2001:db8:20::1 does not answer"), "{error}");
    // The conflict was seen first.
    assert_eq!(quarantined(&node).len(), 1);
    nothing_is_left(&node, &before);
    hold(&neighbour, &["10.20.0.1/24", "2001:db8:20::1/64"]);
    node.add(&pod).unwrap();
}

/// A bridge with a port to the outside, and pods that may not speak before somebody knows their policy: what they ask the
/// segment before they have an address passes all the same, and so does what comes back.
#[test]
fn the_default_that_denies_lets_probes_and_announcements_pass() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    let neighbour = node.host.new_pod();
    node.host.root().sh(&format!(
        "ip link add dc0 type bridge; ip link set dc0 addrgenmode none; ip link set dc0 up; \
         ip link add up0 type veth peer name far0 netns {}; ip link set up0 addrgenmode none; \
         ip link set up0 master dc0; ip link set up0 up",
        neighbour.path().display()
    ));
    neighbour.sh("ip link set far0 addrgenmode none; ip link set far0 up");
    hold(&neighbour, &["10.20.0.2/24", "10.20.0.9/24", "2001:db8:20::2/64", "2001:db8:20::9/64"]);
    // Whom the neighbour believes to have the address that the pod will get.
    neighbour.sh("ip neigh replace 10.20.0.3 lladdr 02:00:00:00:00:99 dev far0 nud stale; \
         ip neigh replace 2001:db8:20::3 lladdr 02:00:00:00:00:99 dev far0 nud stale");
    node.config["link"] = json!({ "kind": "bridge", "bridge": "dc0", "underlay": { "within": "1s" } });
    let pod = node.pod("web");
    let result = node.add(&pod).unwrap();
    assert_eq!(addresses(&result), ["10.20.0.3/24", "2001:db8:20::3/64"]);
    assert_eq!(quarantined(&node).len(), 2);
    let own = pod.netns.link("eth0").unwrap().mac.unwrap().to_string();
    for address in ["10.20.0.3", "2001:db8:20::3"] {
        // Told before ADD ended, and taken note of when the neighbour's kernel gets to it.
        let until = Instant::now() + Duration::from_secs(5);
        let known = loop {
            let known = neighbour.sh(&format!("ip neigh show {address} dev far0"));
            if known.contains(&own) || Instant::now() > until {
                break known;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(known.contains(&own), "{known}");
    }
    node.del(&pod).unwrap();
}
