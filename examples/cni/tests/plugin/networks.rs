//! Several networks in one pod: ours, and those of Debian's plugins.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use dcenet_core::cni::networks::network_status;
use dcenet_core::model::AttachmentKey;
use dcenet_core::test_support::{HostState, Rung, effort, require, require_with};
use serde_json::{Value, json};

use super::addresses;
use super::common::{Faulted, Node, Pod};

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

/// Puts Debian's plugin behind a script that notes calls, and fails at the call of this number: before it, or after it did its
/// work.
fn wrap(node: &Node, plugin: &str) {
    let directory = node.host.directory().join("bin");
    std::fs::create_dir_all(&directory).unwrap();
    let script = format!(
        r#"#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin; d={}; export PATH
echo "$CNI_COMMAND {plugin} $CNI_IFNAME netns=$CNI_NETNS" >>$d/calls
n=$(wc -l <$d/calls); read k at <$d/fail 2>/dev/null
[ "$n" = "$at" ] && [ "$k" = before ] && {{ echo '{{"code": 200, "msg": "told to"}}'; exit 1; }}
/usr/lib/cni/{plugin} >$d/out.$$; rc=$?
[ "$n" = "$at" ] && [ "$k" = after ] && {{ rm $d/out.$$; echo '{{"code": 201, "msg": "told to, after"}}'; exit 1; }}
cat $d/out.$$; rm $d/out.$$; exit $rc
"#,
        directory.display()
    );
    let path = directory.join(plugin);
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn calls(node: &Node) -> Vec<String> {
    let text = std::fs::read_to_string(node.host.directory().join("bin/calls")).unwrap_or_default();
    text.lines().map(|line| line.split(' ').take(3).collect::<Vec<_>>().join(" ")).collect()
}

fn fail_at(node: &Node, rule: &str) {
    let directory = node.host.directory().join("bin");
    std::fs::write(directory.join("fail"), format!("{rule}\n")).unwrap();
    std::fs::write(directory.join("calls"), "").unwrap();
}

#[test]
fn a_plugin_that_fails_at_any_call_leaves_nothing_and_del_tells_of_it_and_is_repeated() {
    if !has_debians(&["bridge", "macvlan", "host-local", "static"]) {
        return;
    }
    let node = three();
    warm(&node);
    for plugin in ["bridge", "macvlan"] {
        wrap(&node, plugin);
    }
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    for when in ["before", "after"] {
        for call in 1..=2 {
            fail_at(&node, &format!("{when} {call}"));
            let error = node.add(&pod).unwrap_err();
            assert_eq!(error["code"], if when == "before" { 200 } else { 201 }, "{error}");
            let (network, plugin) = [("legacy (net1)", "bridge"), ("storage (stor0)", "macvlan")][call - 1];
            let says = format!("network {network}: plugin {plugin}: ADD: told to");
            assert!(error["msg"].as_str().unwrap().starts_with(&says), "{error}");
            let expected = match call {
                1 => vec!["ADD bridge net1", "DEL bridge net1"],
                _ => vec!["ADD bridge net1", "ADD macvlan stor0", "DEL macvlan stor0", "DEL bridge net1"],
            };
            assert_eq!(calls(&node), expected);
            assert_eq!(before.diff(&Everything::of(&node, &pod)), "", "{when} {call}");
        }
    }
    // Taking back fails too: it says so, and the next DEL finishes it.
    fail_at(&node, "before 2");
    let error = {
        std::fs::write(node.host.directory().join("bin/static"), "#!/bin/sh\nexit 9\n").unwrap();
        let path = node.host.directory().join("bin/static");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let error = node.add(&pod).unwrap_err();
        std::fs::remove_file(path).unwrap();
        error
    };
    assert_eq!(error["code"], 115, "{error}");
    assert!(error["details"].as_str().unwrap().contains("could not all be taken back"), "{error}");
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
    for when in ["before", "after"] {
        for call in 1..=2 {
            fail_at(&node, "never 0");
            node.add(&pod).unwrap();
            fail_at(&node, &format!("{when} {call}"));
            let error = node.del(&pod).unwrap_err();
            let network = ["storage (stor0)", "legacy (net1)"][call - 1];
            assert!(error["msg"].as_str().unwrap().contains(&format!("network {network}")), "{error}");
            // It went on to the others, ours too.
            assert_eq!(calls(&node), ["DEL macvlan stor0", "DEL bridge net1"]);
            assert!(pod.netns.link("eth0").is_none());
            node.del(&pod).unwrap();
            assert_eq!(before.diff(&Everything::of(&node, &pod)), "", "{when} {call}");
        }
    }
}

/// The calls of netlink, of journals, of the store and of plugins, each failing, lost, or the end of the process.
#[test]
fn each_call_of_several_networks_may_fail_or_be_the_last_and_nothing_is_left() {
    if !has_debians(&["bridge", "macvlan", "host-local", "static"]) {
        return;
    }
    let node = three();
    warm(&node);
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    for verb in ["ADD", "DEL"] {
        // What was lost has happened as what follows it finds it, and after call 3 is before call 4.
        for (kind, stride) in [
            ("fail", effort(5, 1, 1)),
            ("lose", effort(11, 3, 1)),
            ("abort", effort(5, 1, 1)),
            ("abort-after", effort(11, 3, 1)),
        ] {
            let (mut met_any, mut left_any, mut plugins) = (0, 0, 0);
            for call in (1..).step_by(stride) {
                if verb == "DEL" {
                    node.add(&pod).unwrap();
                }
                let Faulted { met, outcome } = node.faulted(verb, Some(&pod), &node.config, &format!("{kind}:{call}"));
                let what = format!("{verb}, {kind} {met:?}: {outcome:?}");
                let now = before.diff(&Everything::of(&node, &pod));
                left_any += u32::from(!now.is_empty());
                met_any += u32::from(met.is_some());
                plugins += u32::from(met.as_ref().is_some_and(|met| met.contains("run plugin")));
                match (&outcome, verb) {
                    // The empty file of a record may be left where its removal is what failed.
                    (Some(Err(error)), "ADD") if error["code"] != 115 => {
                        assert!(
                            now.lines().all(|l| l.starts_with("+ /") || l.starts_with("+ dc") || l.len() < 20),
                            "{what}: {now}"
                        );
                    }
                    (Some(Ok(_)), "ADD") => drop(node.add(&pod).unwrap_or_else(|e| panic!("{what}: {e}"))),
                    (None, "ADD") if call % 2 == 0 => {
                        let result = node.add(&pod).unwrap_or_else(|e| panic!("{what}: {e}"));
                        node.check(&pod, &result).unwrap_or_else(|e| panic!("{what}: {e}"));
                    }
                    _ => {}
                }
                node.del(&pod).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(before.diff(&Everything::of(&node, &pod)), "", "{what}");
                if met.is_none() {
                    break;
                }
            }
            println!(
                "{verb} {kind}: {met_any} calls met, {plugins} of plugins, something left for the next call by {left_any}"
            );
            // A dump that is read once more has the numbers of later calls differ between two runs.
            assert!(met_any > 2 && (stride > 1 || plugins >= 1), "{verb} {kind}: {met_any}, {plugins} of plugins");
            // The twin: kills do leave something, which the next call removes.
            assert!(!kind.starts_with("abort") || left_any > 0, "{verb} {kind}");
        }
    }
}

#[test]
fn after_a_restart_and_without_a_namespace_del_and_gc_free_what_plugins_hold() {
    if !has_debians(&["bridge", "macvlan", "host-local", "static"]) {
        return;
    }
    let node = three();
    warm(&node);
    wrap(&node, "bridge");
    let (pod, second) = (node.pod("web"), node.pod("db"));
    let before = Everything::of(&node, &pod);
    node.add(&pod).unwrap();
    node.add(&second).unwrap();
    for pod in [&pod, &second] {
        pod.remove_namespace();
        // As a plugin does that locks what is not there (a file at the path of the namespace).
        std::fs::write(pod.netns.path(), "").unwrap();
    }
    fail_at(&node, "never 0");
    node.del(&pod).unwrap();
    // The path leads to no namespace, and no plugin is sent there.
    let text = std::fs::read_to_string(node.host.directory().join("bin/calls")).unwrap();
    assert!(text.starts_with("DEL bridge net1 netns=\n"), "{text}");
    node.gc(Some(&[])).unwrap();
    let lists = Everything::of(&node, &pod).lists;
    let leases = |lists: &[Vec<String>]| lists[1..].to_vec();
    assert_eq!(leases(&lists), leases(&before.lists));
}

/// Has a directory of definitions, in YAML and in JSON, and a pod's annotation where a caller without Kubernetes puts it.
fn selecting() -> Node {
    let mut node = node(json!([ours()]));
    let (definitions, pods) = (node.host.directory().join("definitions"), node.host.directory().join("pods"));
    for directory in [&definitions, &pods] {
        std::fs::create_dir(directory).unwrap();
    }
    let yaml = |namespace: &str, name: &str, config: &Value| {
        format!(
            "apiVersion: k8s.cni.cncf.io/v1\nkind: NetworkAttachmentDefinition\nmetadata:\n  name: {name}\n  \
             namespace: {namespace}\nspec:\n  config: '{config}'\n---\n"
        )
    };
    let mut wishes = their_macvlan();
    wishes["capabilities"] = json!({ "ips": true, "mac": true });
    wishes["ipam"] = json!({ "type": "static" });
    let own = json!({ "cniVersion": "1.1.0", "type": "dcenet", "link": { "kind": "veth" } });
    let text = yaml("shop", "storage", &wishes) + &yaml("default", "plain", &own) + &yaml("secret", "own", &own);
    std::fs::write(definitions.join("all.yaml"), text).unwrap();
    let list = json!({ "kind": "List", "items": [{
        "kind": "NetworkAttachmentDefinition", "metadata": { "name": "legacy", "namespace": "shop" },
        "spec": { "config": json!({ "cniVersion": "1.0.0", "plugins": [theirs(&node)] }).to_string() },
    }] });
    std::fs::write(definitions.join("list.json"), list.to_string()).unwrap();
    std::fs::write(definitions.join("broken.yaml"), "kind: [").unwrap();
    node.config["selection"] = json!({ "definitions": definitions, "pods": pods });
    node
}

/// Asks in the name of a pod.
fn annotate(node: &Node, pod: &str, networks: &str) {
    let path = node.host.directory().join("pods").join(format!("shop_{pod}.json"));
    let annotations = json!({ "k8s.v1.cni.cncf.io/networks": networks, "others": "1" });
    std::fs::write(path, annotations.to_string()).unwrap();
}

#[test]
fn a_pod_gets_the_networks_that_its_annotation_names() {
    if !has_debians(&["bridge", "macvlan", "host-local", "static"]) {
        return;
    }
    let mut node = selecting();
    warm(&node);
    let (plain, pod) = (node.pod("plain"), node.pod("web"));
    let first = Everything::of(&node, &pod);
    let result = node.add(&plain).unwrap();
    assert_eq!(addresses(&result).len(), 2, "a pod that asks for nothing has the networks of every pod");
    node.del(&plain).unwrap();

    annotate(&node, "web", "legacy, default/plain@plain0");
    let result = node.add(&pod).unwrap();
    for name in ["eth0", "net1", "plain0"] {
        assert!(pod.netns.link(name).is_some(), "{name}");
    }
    let names: Vec<_> = status(&node, &pod).unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["shop", "shop/legacy", "default/plain"]);
    node.check(&pod, &result).unwrap();
    // The pod's wish and the definitions are gone, and DEL does the same.
    node.host.root().sh(&format!("rm -r {0}/definitions {0}/pods", node.host.directory().display()));
    node.del(&pod).unwrap();
    let mut left = first.diff(&Everything::of(&node, &pod));
    // Their bridge stays, as it does on a real host.
    left = left.lines().filter(|l| !l.contains("cni0") && !l.contains("10.60.0.1") && !l.contains("8:60::")).collect();
    assert_eq!(left, "");

    // As containerd passes them.
    node = selecting();
    node.config["capabilities"] = json!({ "io.kubernetes.cri.pod-annotations": true });
    let mac = "02:00:00:00:61:07";
    let wish = json!([{ "name": "storage", "interface": "stor0", "ips": ["10.61.0.7/24"], "mac": mac }]);
    let annotations = json!({ "k8s.v1.cni.cncf.io/networks": wish.to_string() });
    node.config["runtimeConfig"] = json!({ "io.kubernetes.cri.pod-annotations": annotations });
    let pod = node.pod("db");
    let result = node.add(&pod).unwrap();
    assert_eq!(addresses(&result).last().unwrap(), "10.61.0.7/24");
    assert_eq!(pod.netns.link("stor0").unwrap().mac.unwrap().to_string(), mac);
    // Another wish is another configuration, another label of the pod is not.
    node.config["runtimeConfig"]["io.kubernetes.cri.pod-annotations"]["x"] = json!("y");
    assert_eq!(node.add(&pod).unwrap(), result);
    node.del(&pod).unwrap();

    for (wish, says) in [
        ("nonesuch", "no NetworkAttachmentDefinition shop/nonesuch in"),
        ("nonesuch", "which defines shop/storage, default/plain, secret/own, shop/legacy; "),
        ("nonesuch", "broken.yaml: "),
        ("secret/own", "is of another namespace than the pod; have selection.shared list"),
        ("a/b/c", "write namespace/name@interface"),
        ("../etc", "write namespace/name@interface"),
        ("storage@a/b", "interface name \"a/b\""),
        ("plain@x, legacy@x", "no NetworkAttachmentDefinition shop/plain"),
        ("legacy@x, default/plain@x", "interface x: is asked for"),
        ("[{\"name\": \"legacy\", \"interfce\": \"x\"}]", "[0].interfce: unknown field"),
        ("[{\"name\": \"legacy\", \"bandwidth\": {}}]", "none of whose plugins declares the capability"),
        ("[{\"name\": \"plain\", \"namespace\": \"default\", \"bandwidth\": {}}]", "is not offered"),
        (
            "[{\"name\": \"legacy\", \"mac\": \"02:00:00:00:00:aa\", \"ips\": [\"10.99.0.1\"]}]",
            "network shop/legacy (net1)",
        ),
        ("[1", "not JSON"),
    ] {
        node.config["runtimeConfig"]["io.kubernetes.cri.pod-annotations"]["k8s.v1.cni.cncf.io/networks"] = json!(wish);
        let pod = node.pod("bad");
        let before = pod.state();
        let error = node.add(&pod).unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains(says), "{wish}: {error}");
        assert_eq!(before.diff(&pod.state()), "");
        assert_eq!(status(&node, &pod), None);
    }
}

/// A plugin that asks for what its pod wanted and gets another is no success.
#[test]
fn a_wish_that_plugins_ignore_is_refused_and_taken_back() {
    if !has_debians(&["ptp", "static"]) {
        return;
    }
    let node = selecting();
    // Declared, and not honoured: ptp lets the kernel choose.
    let deaf = json!({
        "cniVersion": "1.0.0", "type": "ptp", "capabilities": { "mac": true },
        "ipam": { "type": "static", "addresses": [{ "address": "10.62.0.5/24", "gateway": "10.62.0.1" }] },
    });
    let object = json!({ "kind": "NetworkAttachmentDefinition", "metadata": { "name": "deaf", "namespace": "shop" },
        "spec": { "config": deaf.to_string() } });
    std::fs::write(node.host.directory().join("definitions/deaf.json"), object.to_string()).unwrap();
    warm(&node);
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    annotate(&node, "web", "[{\"name\": \"deaf\", \"mac\": \"02:00:00:00:62:05\"}]");
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["code"], 2, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("mac: 02:00:00:00:62:05 was asked for"), "{error}");
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
}

/// SIGKILL while a plugin is at work: it ends too, and the next DEL takes back what it has done.
#[test]
fn a_plugin_ends_with_the_call_that_runs_it() {
    if !require(Rung::Netns) {
        return;
    }
    let node =
        node(json!([{ "name": "a", "link": { "kind": "veth" } }, { "name": "b", "delegate": { "type": "slow" } }]));
    let directory = node.host.directory().join("bin");
    std::fs::create_dir_all(&directory).unwrap();
    let script = format!(
        "#!/bin/sh\nexport PATH=/usr/sbin:/usr/bin:/sbin:/bin\ncd {}\n[ $CNI_COMMAND = DEL ] && {{ echo DEL >>calls; exit 0; }}\n\
         nsenter --net=$CNI_NETNS ip link add net1 type veth peer name far\necho $$ >pid.new; mv pid.new pid; exec sleep 1000\n",
        directory.display()
    );
    std::fs::write(directory.join("slow"), script).unwrap();
    std::fs::set_permissions(directory.join("slow"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    let mut running = node.start("ADD", &pod);
    let await_that = |what: &str, is: &dyn Fn() -> bool| {
        let begin = std::time::Instant::now();
        while !is() {
            assert!(begin.elapsed() < std::time::Duration::from_secs(120), "{what}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    };
    await_that("the plugin starts", &|| directory.join("pid").exists());
    let pid = std::fs::read_to_string(directory.join("pid")).unwrap();
    // Another call is told to come later.
    assert_eq!(node.del(&pod).unwrap_err()["code"], 11);
    running.kill();
    assert_eq!(running.wait(), None);
    let ended = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        stat.is_empty() || stat.rsplit(')').next().unwrap().trim_start().starts_with('Z')
    };
    await_that("the plugin ends", &ended);
    assert!(before.diff(&Everything::of(&node, &pod)).contains("net1"), "what it did is there");
    // Its DEL does nothing: a device that a plugin leaves would be seen.
    node.del(&pod).unwrap();
    assert_eq!(std::fs::read_to_string(directory.join("calls")).unwrap(), "DEL\n");
    pod.netns.sh("ip link del net1");
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
}

/// Two segments behind two routers, and somebody who reaches the pod's networks over either: `far`, behind both.
///
/// ```text
///  pod eth0 (our bridge dc0) --- host --- r0 ---+
///                                               far (10.99.0.9, 2001:db8:99::9)
///  pod net1 (macvlan on uplink) -- wire: router +
/// ```
struct Behind {
    node: Node,
    router: dcenet_core::test_support::TestNetNs,
    far: dcenet_core::test_support::TestNetNs,
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
            (&router, "ip addr add 10.61.0.1/24 dev wire; ip -6 addr add 2001:db8:61::1/64 dev wire nodad; ip link set wire up
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

/// Whether somebody far away has an answer from the address.
fn answers(behind: &Behind, address: &str) -> bool {
    let limit = std::time::Duration::from_secs(2);
    (0..3).any(|_| dcenet_core::test_support::ping(&behind.far, address.parse().unwrap(), limit).is_ok())
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
            assert!(!answers(&behind, address), "{address} {delegated}");
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

/// The configuration of the front page, with directories of this test.
#[test]
fn the_front_pages_configuration_works() {
    if !has_debians(&["bridge", "host-local"]) {
        return;
    }
    let page = include_str!("../../../../README.md");
    let block = page.split("```json").skip(1).map(|part| part.split("```").next().unwrap());
    let block = block.filter(|block| block.contains("\"networks\"")).collect::<Vec<_>>();
    let mut node = selecting();
    let shown: Value = serde_json::from_str(block[0]).unwrap();
    let kept = ["selection", "stateDir", "runDir"].map(|key| (key, node.config[key].clone()));
    node.config = shown;
    for (key, value) in kept {
        node.config[key] = value;
    }
    node.config["networks"][0]["delegate"]["ipam"]["dataDir"] = json!(node.host.directory().join("host-local"));
    annotate(&node, "web", "default/plain");
    warm(&node);
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    let result = node.add(&pod).unwrap();
    for (name, kind) in [("eth0", "veth"), ("stor0", "macvlan"), ("net2", "veth")] {
        assert_eq!(pod.netns.link(name).unwrap().kind.as_deref(), Some(kind), "{name}: {result}");
    }
    node.check(&pod, &result).unwrap();
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
}
