//! The plugin as the IPAM plugin of others: alone, and of Debian's bridge and macvlan plugins.

use std::path::Path;
use std::process::Command;

use dcenet_core::test_support::{Rung, require, require_with};
use serde_json::{Value, json};

use super::addresses;
use super::common::{Node, Pod, Running};

/// A node with a configuration of another plugin that asks us for addresses.
fn node(plugin: Value) -> Node {
    let mut node = Node::new();
    let ours = node.config.as_object_mut().unwrap();
    ours.remove("link");
    ours["cniVersion"] = json!("1.0.0");
    ours["ipam"]["cooldown"] = json!("0s");
    ours.extend(plugin.as_object().unwrap().clone());
    node
}

/// Has the host's IPv6 addresses come into use at once, and its devices have none but those they are given, so that the
/// host looks the same at any time.
fn without_surprises(node: &Node) {
    for (name, value) in [("all/accept_dad", "0"), ("default/accept_dad", "0"), ("default/addr_gen_mode", "1")] {
        node.host.root().sysctl(&format!("ipv6/conf/{name}"), value);
    }
}

/// A directory that holds the other plugin and ours, under the names by which they call each other.
fn installed(node: &Node, plugin: &str) -> std::path::PathBuf {
    let directory = node.host.directory().join("bin");
    if !directory.exists() {
        std::fs::create_dir(&directory).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_dcenet"), directory.join("dcenet")).unwrap();
        std::os::unix::fs::symlink(Path::new("/usr/lib/cni").join(plugin), directory.join(plugin)).unwrap();
    }
    directory
}

/// Runs the other plugin as a runtime does.
fn run(node: &Node, verb: &str, pod: &Pod, extra: &[(&str, Value)]) -> Result<Value, Value> {
    let plugin = node.config["type"].as_str().unwrap();
    let directory = installed(node, plugin);
    let mut config = node.config.clone();
    for (key, value) in extra {
        config[*key] = value.clone();
    }
    let mut command = Command::new(directory.join(plugin));
    command.env_clear().env("CNI_COMMAND", verb).env("CNI_PATH", &directory);
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("CNI_CONTAINERID", &pod.container).env("CNI_NETNS", pod.netns.path()).env("CNI_IFNAME", "eth0");
    command.env("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={}", pod.name));
    node.host.root().run(|| Running::start(command, &config.to_string()).wait()).expect("nobody kills it")
}

fn has_debians(plugin: &str) -> bool {
    require_with(Rung::Services, || {
        let path = Path::new("/usr/lib/cni").join(plugin);
        (!path.exists()).then(|| format!("{} is missing: install containernetworking-plugins", path.display()))
    })
}

#[test]
fn an_ipam_result_has_addresses_routes_and_dns_in_the_version_that_was_asked_for() {
    if !require(Rung::Netns) {
        return;
    }
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let mut node = node(json!({ "type": "bridge", "bridge": "cni0", "ipMasq": true, "isGateway": true }));
        node.config["cniVersion"] = json!(version);
        node.config["ipam"]["dns"] = json!({ "nameservers": ["10.20.0.53"] });
        let (pod, before) = (node.pod("web"), node.host.state());
        let inside = pod.state();
        let result = node.add(&pod).unwrap();
        let mut ips = json!([
            { "address": "10.20.0.2/24", "gateway": "10.20.0.1" },
            { "address": "2001:db8:20::2/64", "gateway": "2001:db8:20::1" },
        ]);
        if version < "1.0.0" {
            ips[0]["version"] = json!("4");
            ips[1]["version"] = json!("6");
        }
        let expected = json!({
            "cniVersion": version, "ips": ips, "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            "dns": { "nameservers": ["10.20.0.53"] },
        });
        assert_eq!(result, expected);
        assert_eq!(node.add(&pod).unwrap(), expected, "repeated");
        if version > "0.3.1" {
            node.check(&pod, &result).unwrap();
            let mut other = result.clone();
            other["ips"][0]["address"] = json!("10.20.0.99/24");
            let error = node.check(&pod, &other).unwrap_err();
            assert_eq!(error["code"], 120, "{error}");
        }
        if version == "1.1.0" {
            node.status().unwrap();
            node.gc(Some(&[&pod])).unwrap();
            node.check(&pod, &result).unwrap();
            node.gc(Some(&[])).unwrap();
            assert_eq!(node.check(&pod, &result).unwrap_err()["code"], 120);
            node.add(&pod).unwrap();
        }
        node.del(&pod).unwrap();
        node.del_without_namespace(&pod).unwrap();
        assert!(node.store().iter().all(|line| line.starts_with("claim ")), "{:?}", node.store());
        // It touched no device and left no record.
        assert_eq!((before.diff(&node.host.state()), inside.diff(&pod.state())), (String::new(), String::new()));
        assert_eq!(node.host.records(), Vec::<String>::new());
    }
}

#[test]
fn what_the_other_plugin_would_not_apply_is_refused_and_given_back() {
    if !require(Rung::Netns) {
        return;
    }
    let changed = |pointer: &str, value: Value, plugin: Value| {
        let mut node = node(json!({ "type": "bridge", "bridge": "cni0" }));
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        node.config.pointer_mut(parent).unwrap()[key] = value;
        node.config.as_object_mut().unwrap().extend(plugin.as_object().unwrap().clone());
        node
    };
    let none = json!({});
    let mac = "02:00:00:00:77:00";
    for (pointer, value, plugin, said) in [
        (
            "/ipam/pools/0/vlan",
            json!(300),
            none.clone(),
            &["ipam.pools[].vlan: 300 of pool v4", "told vlan nothing"][..],
        ),
        ("/ipam/pools/0/vlan", json!(300), json!({ "vlan": 301 }), &["vlan: 300", "told vlan 301"]),
        ("/ipam/pools/0/mtu", json!(1400), none.clone(), &["ipam.pools[].mtu: 1400 of pool v4", "told mtu nothing"]),
        ("/ipam/pools/0/mtu", json!(1400), json!({ "mtu": 1500 }), &["mtu: 1400", "told mtu 1500", "at most 1400"]),
        ("/ipam/pools/0/claims/shop~1db/mac", json!(mac), none.clone(), &["claims", mac, "capability mac"]),
        ("/policy", json!({}), none.clone(), &["policy", "plugin \"bridge\"", "drop the section"]),
    ] {
        let node = changed(pointer, value, plugin);
        let pod = node.pod("db");
        let error = node.add(&pod).unwrap_err();
        let message = error["msg"].as_str().unwrap();
        assert!(said.iter().all(|word| message.contains(word)), "{pointer}: {error}");
        assert!(node.store().iter().all(|line| line.starts_with("claim ")), "{:?}", node.store());
        assert_eq!(node.host.records(), Vec::<String>::new());
    }
    for (pointer, value, plugin) in [
        ("/ipam/pools/0/vlan", json!(300), json!({ "vlan": 300 })),
        ("/ipam/pools/0/mtu", json!(1400), json!({ "mtu": 1400 })),
        ("/ipam/pools/0/claims/shop~1db/mac", json!(mac), json!({ "runtimeConfig": { "mac": mac } })),
    ] {
        let node = changed(pointer, value, plugin);
        let pod = node.pod("db");
        assert_eq!(addresses(&node.add(&pod).unwrap())[0], "10.20.0.77/24");
    }
    // Not ours to hand out twice: the same name for a network of our own.
    let node = node(json!({ "type": "bridge", "bridge": "cni0" }));
    let (pod, mut own) = (node.pod("web"), node.config.clone());
    own["type"] = json!("dcenet");
    own.as_object_mut().unwrap().remove("bridge");
    own["link"] = json!({ "kind": "veth" });
    node.call("ADD", &pod, &own.to_string()).unwrap();
    let error = node.add(&pod).unwrap_err();
    assert!(error["code"] == 7 && error["msg"].as_str().unwrap().contains("name this network otherwise"), "{error}");
    node.del(&pod).unwrap_err();
    node.call("DEL", &pod, &own.to_string()).unwrap();
}

#[test]
fn debians_bridge_plugin_connects_pods_with_our_addresses() {
    if !has_debians("bridge") {
        return;
    }
    let node = node(json!({ "type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": false }));
    without_surprises(&node);
    // The first pod makes the bridge, which theirs never removes.
    let first = node.pod("first");
    run(&node, "ADD", &first, &[]).unwrap();
    run(&node, "DEL", &first, &[]).unwrap();
    let before = node.host.state();
    let (web, db) = (node.pod("web"), node.pod("db"));
    let result = run(&node, "ADD", &web, &[]).unwrap();
    let mut ips = addresses(&result);
    ips.sort();
    assert_eq!(ips, ["10.20.0.3/24", "2001:db8:20::3/64"]);
    assert_eq!(result["ips"][0]["interface"], 2, "theirs says which interface: {result}");
    assert!(addresses(&run(&node, "ADD", &db, &[]).unwrap()).contains(&"10.20.0.77/24".to_owned()));
    for address in ["10.20.0.77", "10.20.0.1", "2001:db8:20::1"] {
        web.ping(address);
    }
    db.ping("10.20.0.3");
    run(&node, "CHECK", &web, &[("prevResult", result.clone())]).unwrap();
    assert_eq!(node.store().iter().filter(|line| line.contains(" has ")).count(), 4, "{:?}", node.store());

    for pod in [&web, &db] {
        run(&node, "DEL", pod, &[]).unwrap();
        run(&node, "DEL", pod, &[]).unwrap();
    }
    assert!(node.store().iter().all(|line| line.starts_with("claim shop/db")), "{:?}", node.store());
    assert_eq!(node.host.records(), Vec::<String>::new());
    assert_eq!(before.diff(&node.host.state()), "");
    let error = run(&node, "CHECK", &web, &[("prevResult", result)]).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("10.20.0.3/24"), "{error}");
}

#[test]
fn debians_macvlan_plugin_connects_pods_with_our_addresses() {
    if !has_debians("macvlan") {
        return;
    }
    let node = node(json!({ "type": "macvlan", "master": "uplink", "mode": "bridge" }));
    without_surprises(&node);
    node.host.root().sh("ip link add uplink type veth peer name wire && ip link set uplink up && ip link set wire up");
    let before = node.host.state();
    let (web, db) = (node.pod("web"), node.pod("db"));
    assert_eq!(addresses(&run(&node, "ADD", &web, &[]).unwrap())[0], "10.20.0.2/24");
    assert_eq!(addresses(&run(&node, "ADD", &db, &[]).unwrap())[0], "10.20.0.77/24");
    assert_eq!(web.netns.link("eth0").unwrap().kind.as_deref(), Some("macvlan"));
    web.ping("10.20.0.77");
    db.ping("10.20.0.2");
    for pod in [&web, &db] {
        run(&node, "DEL", pod, &[]).unwrap();
    }
    assert!(node.store().iter().all(|line| line.starts_with("claim shop/db")), "{:?}", node.store());
    assert_eq!(before.diff(&node.host.state()), "");
}
