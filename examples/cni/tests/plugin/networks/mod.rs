//! Several networks in one pod: ours, and those of Debian's plugins.

mod collect;
mod faults;
mod routes;
mod selected;

use std::path::{Path, PathBuf};

use dcenet_core::cni::networks::network_status;
use dcenet_core::model::AttachmentKey;
use dcenet_core::test_support::{HostState, Rung, require, require_with};
use serde_json::{Value, json};

use super::addresses;
use super::common::{Node, Pod};

fn has_debians(plugins: &[&str]) -> bool {
    require_with(Rung::Services, || {
        let missing = plugins.iter().map(|plugin| Path::new("/usr/lib/cni").join(plugin)).find(|path| !path.exists());
        missing.map(|path| format!("{} is missing: install containernetworking-plugins", path.display()))
    })
}

/// A node whose pods have these networks. Its devices have no addresses but those that they are given, so that it looks the
/// same at any time, and an uplink for macvlans, whose other end is in the host too.
fn node(networks: Value) -> Node {
    let mut node = Node::new();
    for (name, value) in [("all/accept_dad", "0"), ("default/accept_dad", "0"), ("default/addr_gen_mode", "1")] {
        node.host.root().sysctl(&format!("ipv6/conf/{name}"), value);
    }
    node.host.root().sh("ip link add uplink type veth peer name wire && ip link set uplink up && ip link set wire up");
    let keys = node.config.as_object_mut().unwrap();
    keys.remove("link");
    keys.remove("ipam");
    node.config["name"] = json!("pods");
    node.config["networks"] = networks;
    node
}

/// Debian's bridge with their host-local, both families.
fn theirs(node: &Node) -> Value {
    json!({
        "cniVersion": "1.0.0", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": node.host.directory().join("host-local"),
            "ranges": [[{ "subnet": "10.60.0.0/24" }], [{ "subnet": "2001:db8:60::/64" }]],
        },
    })
}

/// Debian's macvlan with their static.
fn their_macvlan() -> Value {
    json!({
        "cniVersion": "1.0.0", "type": "macvlan", "master": "uplink", "mode": "bridge",
        "ipam": { "type": "static", "addresses": [{ "address": "10.61.0.5/24" }] },
    })
}

/// Our bridge with our addresses.
fn ours() -> Value {
    let node = Node::new();
    json!({ "name": "shop", "link": node.config["link"], "ipam": node.config["ipam"] })
}

/// Two of theirs around one of ours.
fn three() -> Node {
    let mut node = node(json!([]));
    let (bridge, macvlan) = (theirs(&node), their_macvlan());
    node.config["networks"] = json!([
        ours(), { "name": "legacy", "delegate": bridge }, { "name": "storage", "interface": "stor0", "delegate": macvlan },
    ]);
    node.config["networks"][0]["ipam"]["cooldown"] = json!("0s");
    node
}

/// Files below the directory, by path.
fn files(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(files(&path)),
            path => found.push(path.display().to_string()),
        }
    }
    found.sort();
    found
}

/// Everything that a verb may change: devices, both kinds of records, our addresses, and theirs.
#[derive(Debug, PartialEq)]
struct Everything {
    host: HostState,
    pod: HostState,
    lists: Vec<Vec<String>>,
}

impl Everything {
    fn of(node: &Node, pod: &Pod) -> Self {
        let state = PathBuf::from(node.config["stateDir"].as_str().unwrap());
        let leased = files(&node.host.directory().join("host-local")).into_iter();
        // Theirs keeps its lock, and which address it gave last.
        let leased = leased.filter(|f| !f.contains("last_reserved_ip") && !f.ends_with("/lock")).collect();
        let lists = vec![node.host.records(), files(&state.join("networks")), store(node), leased];
        Self { host: node.host.state(), pod: pod.state(), lists }
    }

    fn diff(&self, after: &Self) -> String {
        let mut text = self.host.diff(&after.host) + &self.pod.diff(&after.pod);
        for (before, after) in self.lists.iter().zip(&after.lists) {
            text.extend(before.iter().filter(|l| !after.contains(l)).map(|l| format!("- {l}\n")));
            text.extend(after.iter().filter(|l| !before.contains(l)).map(|l| format!("+ {l}\n")));
        }
        text
    }
}

/// What our store has bound.
fn store(node: &Node) -> Vec<String> {
    let networks = node.config["networks"].as_array();
    let Some(ipam) = networks.into_iter().flatten().find_map(|network| network.get("ipam")) else { return Vec::new() };
    let state: PathBuf = node.config["stateDir"].as_str().unwrap().into();
    let ipam = dcenet_ipam::Ipam::open(&serde_json::from_value(ipam.clone()).unwrap(), &state).unwrap();
    let bindings = pollster::block_on(ipam.bindings(None)).unwrap();
    bindings.iter().map(|b| format!("{} has {}", b.attachment, b.address)).collect()
}

fn key(node: &Node, pod: &Pod) -> AttachmentKey {
    let key = json!({ "network": node.config["name"], "container": pod.container, "ifname": "eth0" });
    serde_json::from_value(key).unwrap()
}

fn status(node: &Node, pod: &Pod) -> Option<Vec<Value>> {
    network_status(Path::new(node.config["stateDir"].as_str().unwrap()), &key(node, pod)).unwrap()
}

/// A pod that came and went, so that bridges stand as on a real host.
fn warm(node: &Node) {
    let first = node.pod("first");
    node.add(&first).unwrap();
    node.del(&first).unwrap();
}

#[test]
fn a_pod_gets_networks_of_ours_and_of_theirs_and_goes_without_a_trace() {
    if !has_debians(&["bridge", "macvlan", "host-local", "static"]) {
        return;
    }
    let node = three();
    warm(&node);
    let (pod, other) = (node.pod("web"), node.pod("cache"));
    let before = Everything::of(&node, &pod);
    node.status().unwrap();
    let result = node.add(&pod).unwrap();
    let inside: Vec<_> =
        result["interfaces"].as_array().unwrap().iter().filter(|i| i.get("sandbox").is_some()).collect();
    let names: Vec<_> = inside.iter().map(|i| i["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["eth0", "net1", "stor0"], "{result}");
    let ips = addresses(&result);
    assert_eq!(ips[..2], ["10.20.0.3/24", "2001:db8:20::3/64"]);
    assert!(ips.iter().any(|ip| ip.starts_with("10.60.0.")) && ips.iter().any(|ip| ip.starts_with("2001:db8:60::")));
    assert_eq!(ips[4], "10.61.0.5/24");
    // Each address says whose it is.
    for (ip, name) in [(0, "eth0"), (1, "eth0"), (2, "net1"), (3, "net1"), (4, "stor0")] {
        let place = result["ips"][ip]["interface"].as_u64().unwrap() as usize;
        assert_eq!(result["interfaces"][place]["name"], name, "{result}");
    }
    assert_eq!(pod.netns.link("stor0").unwrap().kind.as_deref(), Some("macvlan"));
    for address in ["10.20.0.1", "2001:db8:20::1", "10.60.0.1", "2001:db8:60::1"] {
        pod.ping(address);
    }
    let status = status(&node, &pod).unwrap();
    let said: Vec<_> = status
        .iter()
        .map(|s| (s["name"].as_str().unwrap(), s["interface"].as_str().unwrap(), s["default"] == true))
        .collect();
    assert_eq!(said, [("shop", "eth0", true), ("legacy", "net1", false), ("storage", "stor0", false)]);
    assert_eq!(status[2]["ips"], json!(["10.61.0.5"]));

    assert_eq!(node.add(&pod).unwrap(), result, "repeated");
    node.check(&pod, &result).unwrap();
    // Each is asked, and all that they say is told.
    pod.netns.sh("ip addr flush dev net1; ip addr del 10.20.0.3/24 dev eth0");
    let drift = node.check(&pod, &result).unwrap_err();
    assert_eq!(drift["code"], 120, "{drift}");
    for part in ["network shop (eth0)", "10.20.0.3/24", "network legacy (net1): plugin bridge: CHECK"] {
        assert!(drift["msg"].as_str().unwrap().contains(part), "{part}: {drift}");
    }
    node.gc(Some(&[&pod])).unwrap();
    assert_eq!(self::status(&node, &pod).unwrap().len(), 3, "it is alive");

    // Nothing of the configuration is needed to take it all back.
    let mut bare = node.config.clone();
    bare["networks"] = json!([{ "name": "x", "link": { "kind": "veth" } }]);
    node.call("DEL", &pod, &bare.to_string()).unwrap();
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
    node.del(&pod).unwrap();
    node.del_without_namespace(&pod).unwrap();
    assert_eq!(self::status(&node, &pod), None);

    // One of each is seen where it is left.
    node.add(&other).unwrap();
    let left = before.diff(&Everything::of(&node, &pod));
    for part in ["+ link dc", "+ link veth", "/networks/", "has 10.20.0.", "host-local/legacy/10.60.0."] {
        assert!(left.contains(part), "{part}: {left}");
    }
    node.gc(Some(&[])).unwrap();
    let mut after = before.diff(&Everything::of(&node, &pod));
    // Nobody uses our bridge any more.
    after = after.lines().filter(|l| !l.starts_with("- ") || !l.contains("dc0")).collect();
    assert_eq!(after, "");
}

#[test]
fn a_configuration_of_one_network_keeps_it_as_the_default_beside_further_ones() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.config["networks"] = json!([{ "name": "inner", "link": { "kind": "veth" } }, { "name": "more", "interface": "x0", "link": { "kind": "veth" } }]);
    let pod = node.pod("db");
    let result = node.add(&pod).unwrap();
    assert_eq!(addresses(&result)[0], "10.20.0.77/24", "the claim of the pod's name");
    for name in ["eth0", "net1", "x0"] {
        assert!(pod.netns.link(name).is_some(), "{name}");
    }
    node.check(&pod, &result).unwrap();
    pod.netns.sh("ip link del x0");
    // What is not whole is made anew.
    assert_eq!(addresses(&node.add(&pod).unwrap())[0], "10.20.0.77/24");
    assert!(pod.netns.link("x0").is_some());
    let mut other = node.config.clone();
    other["networks"][1]["interface"] = json!("x1");
    let error = node.call("ADD", &pod, &other.to_string()).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("another configuration"), "{error}");
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let mut older = node.config.clone();
        older["cniVersion"] = json!(version);
        let result = node.call("ADD", &pod, &older.to_string()).unwrap();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["ips"][0].get("version").is_some(), version < "1.0.0");
        assert!(result["interfaces"].as_array().unwrap().iter().all(|i| i.get("mtu").is_none()), "{result}");
    }
    node.del(&pod).unwrap();
    assert_eq!(node.host.records(), Vec::<String>::new());
}

/// An operator who adds networks to a configuration, or drops them, has pods that stand.
#[test]
fn pods_of_before_a_change_of_the_configuration_are_removed_whole() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.warm();
    let one = node.config.clone();
    let mut several = one.clone();
    several["networks"] = json!([{ "name": "more", "link": { "kind": "veth" } }]);
    let pod = node.pod("web");
    let whole = |node: &Node| (node.host.state(), node.store(), node.host.records(), pod.state());
    let networks = PathBuf::from(one["stateDir"].as_str().unwrap()).join("networks");
    let before = whole(&node);
    for (made, removed) in [(&one, &several), (&several, &one)] {
        for verb in ["DEL", "GC"] {
            node.config = made.clone();
            node.add(&pod).unwrap();
            assert_ne!(before, whole(&node), "something is there");
            node.config = removed.clone();
            match verb {
                "DEL" => drop(node.del(&pod).unwrap()),
                _ => {
                    // Alive, and then not; another pod is, lest the bridge goes with the last one.
                    node.gc(Some(&[&pod])).unwrap();
                    assert!(pod.netns.link("eth0").is_some());
                    node.gc(Some(&[&node.pod("other")])).unwrap();
                }
            }
            let after = whole(&node);
            assert_eq!((before.0.diff(&after.0), before.3.diff(&after.3)), (String::new(), String::new()), "{verb}");
            assert_eq!((&before.1, &before.2), (&after.1, &after.2), "{verb}");
            assert_eq!(files(&networks), [""; 0]);
        }
    }
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_done() {
    if !require(Rung::Netns) {
        return;
    }
    let dummy = json!({ "kind": "veth" });
    for (networks, says) in [
        (json!([]), "networks: names no network"),
        (json!({}), "networks: {} is not a list"),
        (json!([{ "name": "a" }]), "networks[0]: has neither link nor delegate"),
        (json!([{ "name": "a", "lnik": dummy }]), "networks[0].lnik"),
        (json!([{ "name": "a", "link": { "kind": "dumy" } }]), "networks[0].link.kind"),
        (json!([{ "name": "a/b", "link": dummy }]), "networks[0].name"),
        (
            json!([{ "name": "a", "link": dummy, "delegate": { "type": "bridge" } }]),
            "networks[0].delegate: stands beside",
        ),
        (json!([{ "name": "a", "delegate": { "type": "../bridge" } }]), "networks[0].delegate.type"),
        (
            json!([{ "name": "a", "delegate": { "type": "nonesuch" } }]),
            "plugin nonesuch is in no directory of CNI_PATH",
        ),
        (json!([{ "name": "a", "link": dummy, "interface": "eth7" }]), "networks[0].interface: eth7 is of the default"),
        (
            json!([{ "name": "a", "link": dummy, "default": true }, { "name": "b", "link": dummy, "default": true }]),
            "networks[1].default: there is one",
        ),
        (
            json!([{ "name": "a", "link": dummy }, { "name": "b", "link": dummy, "interface": "eth0" }]),
            "interface eth0: is asked for",
        ),
    ] {
        let node = node(networks);
        let pod = node.pod("web");
        let before = Everything::of(&node, &pod);
        let error = node.add(&pod).unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains(says), "{says}: {error}");
        assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
    }
    // A foreign interface in the place of one of ours stays.
    let node = node(json!([{ "name": "a", "link": dummy }, { "name": "b", "delegate": their_macvlan() }]));
    let pod = node.pod("web");
    pod.netns.sh("ip link add net1 type veth peer name far");
    let before = Everything::of(&node, &pod);
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["code"], 113, "{error}");
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
}
