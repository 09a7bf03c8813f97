//! What the pools say about the link of their addresses.

use dcenet_core::test_support::{Rung, require};
use serde_json::json;

use super::addresses;
use super::common::Node;

#[test]
fn the_lower_mtu_of_link_and_pool_is_the_devices() {
    if !require(Rung::Netns) {
        return;
    }
    for link in [json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true }), json!({ "kind": "veth" })] {
        for (of_link, of_pool, expected) in [
            (None, Some(1400), 1400),
            (Some(9000), Some(1450), 1450),
            (Some(1300), Some(9000), 1300),
            (None, None, 1500),
        ] {
            let mut node = Node::new();
            node.config["link"] = link.clone();
            if let Some(mtu) = of_link {
                node.config["link"]["mtu"] = json!(mtu);
            }
            if let Some(mtu) = of_pool {
                node.config["ipam"]["pools"][0]["mtu"] = json!(mtu);
            }
            let pod = node.pod("web");
            let result = node.add(&pod).unwrap();
            assert_eq!(pod.netns.link("eth0").unwrap().mtu, expected, "{link} {of_link:?} {of_pool:?}");
            let ours = result["interfaces"].as_array().unwrap().iter().find(|i| i["name"] == "eth0").unwrap();
            assert_eq!(ours["mtu"], expected);
            node.check(&pod, &result).unwrap();
            pod.netns.sh("ip link set eth0 mtu 1281");
            let drift = node.check(&pod, &result).err().unwrap_or_default();
            // The kernel's own choice is nobody's wish.
            let wished = of_link.or(of_pool).is_some();
            assert_eq!(drift["msg"].as_str().unwrap_or_default().contains("its MTU was changed"), wished, "{drift}");
        }
    }
    // An interface has one MTU for both its families.
    let mut node = Node::new();
    node.config["ipam"]["pools"][0]["mtu"] = json!(1000);
    let error = node.add(&node.pod("web")).unwrap_err();
    let message = error["msg"].as_str().unwrap();
    for word in ["ipam.pools[].mtu", "\"1000\"", "1280", "raise it"] {
        assert!(message.contains(word), "{error}");
    }
}

#[test]
fn a_vlan_that_the_link_cannot_have_is_refused_and_nothing_is_left() {
    if !require(Rung::Netns) {
        return;
    }
    for link in [json!({ "kind": "vrf", "vrf": "red", "table": 77 }), json!({ "kind": "veth" })] {
        let mut node = Node::new();
        node.config["link"] = link.clone();
        node.config["ipam"]["pools"][1]["vlan"] = json!(300);
        let (pod, before) = (node.pod("web"), node.host.state());
        let inside = pod.state();
        let error = node.add(&pod).unwrap_err();
        assert_eq!(error["code"], 7, "{error}");
        let message = error["msg"].as_str().unwrap();
        for word in ["ipam.pools[].vlan", "\"300\"", "pool v6", "drop it from the pool"] {
            assert!(message.contains(word), "{error}");
        }
        assert_eq!(before.diff(&node.host.state()), "");
        assert_eq!(inside.diff(&pod.state()), "");
        // The claim of the configuration is recorded, nothing is leased.
        assert_eq!(node.host.records(), Vec::<String>::new());
        assert!(node.store().iter().all(|line| line.starts_with("claim shop/db")), "{:?}", node.store());
        // A pod that gets none of its addresses is none of its business.
        node.config["ipam"]["pools"][1]["select"] = json!({ "workloads": ["shop/tagged-*"] });
        node.config["ipam"]["pools"][1]["group"] = json!("tagged");
        node.config["ipam"]["routes"] = json!([{ "dst": "0.0.0.0/0" }]);
        if link["kind"] == "veth" {
            assert_eq!(addresses(&node.add(&pod).unwrap()).len(), 1);
        }
    }
}

#[test]
fn a_pools_vlan_is_that_of_the_bridges_port() {
    if !require(Rung::Vm) {
        return;
    }
    let mut node = Node::new();
    node.config["link"] = json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true });
    node.config["ipam"]["pools"][1]["vlan"] = json!(300);
    let pod = node.pod("web");
    let result = node.add(&pod).unwrap();
    let port = result["interfaces"][1]["name"].as_str().unwrap();
    assert!(node.host.root().sh(&format!("bridge vlan show dev {port}")).contains("300 PVID Egress Untagged"));
    pod.ping(result["ips"][0]["gateway"].as_str().unwrap());
    assert!(node.host.root().link("dc0.300").is_some());
    node.check(&pod, &result).unwrap();
    node.del(&pod).unwrap();
    assert_eq!(node.host.records(), Vec::<String>::new());
}

/// As podman has it with `--network a,b`: the second network's default route is the first's already.
#[test]
fn a_second_network_leaves_the_first_its_default_route() {
    if !require(Rung::Netns) {
        return;
    }
    for link in [json!({ "kind": "bridge", "bridge": "dc1", "isGateway": true }), json!({ "kind": "veth" })] {
        let node = Node::new();
        let (pod, mut second) = (node.pod("web"), node.config.clone());
        second["name"] = json!("second");
        second["link"] = link;
        second["ipam"]["pools"] = json!([
            { "name": "second4", "subnet": "10.30.0.0/24", "gateway": "10.30.0.1" },
            { "name": "second6", "subnet": "2001:db8:30::/64", "gateway": "2001:db8:30::1" },
        ]);
        let first = node.add(&pod).unwrap();
        let result = node.call_for("ADD", &pod, "eth1", &second).unwrap();
        for family in ["-4", "-6"] {
            let routes = pod.netns.sh(&format!("ip {family} route show default"));
            assert!(routes.contains("dev eth0") && !routes.contains("eth1"), "{routes}");
        }
        second["prevResult"] = result;
        node.call_for("CHECK", &pod, "eth1", &second).unwrap();
        node.check(&pod, &first).unwrap();
        // The twin: a route that nobody has is missed.
        node.del(&pod).unwrap();
        assert_eq!(node.call_for("CHECK", &pod, "eth1", &second).unwrap_err()["code"], 120);
        node.call_for("DEL", &pod, "eth1", &second).unwrap();
        assert_eq!(node.host.records(), [""; 0]);
    }
}
