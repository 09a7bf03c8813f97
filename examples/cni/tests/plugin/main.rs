//! The CNI binary as a runtime sees it: environment and stdin in, stdout and exit code out, in a host of its own.

#[path = "../common/mod.rs"]
mod common;

mod bandwidth;
mod burst;
mod chained;
mod collect;
mod igb;
mod ipam;
mod link;
mod nat;
mod networks;
mod owner;
mod pools;
mod races;
mod roles;
mod shared;
mod sysctl;
mod theirs;
mod underlay;

use common::Node;
use dcenet_core::test_support::{Rung, effort, require};
use serde_json::{Value, json};

fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().expect("the result has ips");
    ips.iter().map(|ip| ip["address"].as_str().expect("an address is text").to_owned()).collect()
}

#[test]
fn version_needs_no_configuration() {
    let answer = common::run_anywhere(&[("CNI_COMMAND", "VERSION"), ("CNI_IFNAME", "dummy")], "").unwrap();
    assert_eq!(answer, json!({ "cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] }));
    let answer = common::run_anywhere(&[("CNI_COMMAND", "VERSION")], r#"{"cniVersion":"1.0.0"}"#).unwrap();
    assert_eq!(answer["cniVersion"], "1.0.0");
}

#[test]
fn a_pod_gets_both_families_talks_and_goes_without_a_trace() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    node.warm();
    let (before_host, pod) = (node.host.state(), node.pod("web"));
    let before_pod = pod.state();
    let result = node.add(&pod).unwrap();
    assert_eq!(addresses(&result), ["10.20.0.3/24", "2001:db8:20::3/64"]);
    let names: Vec<_> = result["interfaces"].as_array().unwrap().iter().map(|i| i["name"].clone()).collect();
    assert_eq!(names[0], "dc0");
    assert_eq!(names[2], "eth0");
    assert_eq!(result["interfaces"][2]["sandbox"], pod.netns.path().to_str().unwrap());

    let other = node.pod("cache");
    let second = node.add(&other).unwrap();
    assert_eq!(addresses(&second), ["10.20.0.4/24", "2001:db8:20::4/64"]);
    for target in ["10.20.0.4", "2001:db8:20::4", "10.20.0.1", "2001:db8:20::1"] {
        pod.ping(target);
    }

    node.check(&pod, &result).unwrap();
    node.del(&pod).unwrap();
    node.del(&other).unwrap();
    assert_eq!(before_host.diff(&node.host.state()), "");
    assert_eq!(before_pod.diff(&pod.state()), "");
    assert_eq!(node.host.records(), Vec::<String>::new());
    // Runtimes repeat DEL, without the namespace and without a result.
    node.del(&pod).unwrap();
    node.del_without_namespace(&pod).unwrap();
}

#[test]
fn every_version_gets_its_own_form() {
    if !require(Rung::Netns) {
        return;
    }
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let mut node = Node::new();
        node.config["cniVersion"] = json!(version);
        let pod = node.pod("web");
        let result = node.add(&pod).unwrap();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["ips"][0].get("version").is_some(), version < "1.0.0", "{result}");
        if version == "0.3.1" {
            assert_eq!(node.check(&pod, &result).unwrap_err()["code"], 1);
        } else {
            node.check(&pod, &result).unwrap();
        }
        node.del(&pod).unwrap();
    }
}

#[test]
fn a_repeated_add_gives_the_same_answer() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    let pod = node.pod("web");
    let first = node.add(&pod).unwrap();
    let (host, inside) = (node.host.state(), pod.state());
    assert_eq!(node.add(&pod).unwrap(), first);
    assert_eq!(host.diff(&node.host.state()), "");
    assert_eq!(inside.diff(&pod.state()), "");

    // The same container with another configuration is not the same attachment, and the one that stands stays whole.
    let mut changed = Node { owner: None, config: node.config.clone(), host: node.host };
    changed.config["link"]["mtu"] = json!(1400);
    let error = changed.add(&pod).unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    changed.config["link"].as_object_mut().unwrap().remove("mtu");
    assert_eq!(changed.add(&pod).unwrap(), first);
    changed.check(&pod, &first).unwrap();
}

#[test]
fn a_claim_keeps_its_address_and_others_are_told_who_has_it() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    let db = node.pod("db");
    let first = node.add(&db).unwrap();
    assert_eq!(addresses(&first)[0], "10.20.0.77/24");
    node.del(&db).unwrap();

    // Another claims the address while nothing bears it.
    let rival = node.pod("scan");
    let claims = node.config["ipam"]["pools"][0]["claims"].take();
    node.config["ipam"]["pools"][0]["claims"] = json!({ "shop/scan": { "address": "10.20.0.77", "keep": "forever" } });
    let error = node.add(&rival).unwrap_err();
    assert_eq!(error["code"], 110, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("shop/db"), "{error}");

    node.config["ipam"]["pools"][0]["claims"] = claims;
    let again = node.pod("db");
    let second = node.add(&again).unwrap();
    assert_eq!(addresses(&second)[0], "10.20.0.77/24");
    assert_eq!(second["interfaces"][2]["mac"], first["interfaces"][2]["mac"]);
}

#[test]
fn requested_addresses_are_given_or_refused_by_name() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    let pod = node.pod("web");
    node.config["runtimeConfig"] = json!({ "ips": ["10.20.0.50/24"], "mac": "02:00:00:00:00:50" });
    let result = node.add(&pod).unwrap();
    assert_eq!(addresses(&result)[0], "10.20.0.50/24");
    assert_eq!(result["interfaces"][2]["mac"], "02:00:00:00:00:50");
    let rival = node.pod("cache");
    assert_eq!(node.add(&rival).unwrap_err()["code"], 110);
    node.config["runtimeConfig"] = json!({ "ips": ["192.0.2.1"] });
    let error = node.add(&rival).unwrap_err();
    assert_eq!(error["code"], 7);
    assert!(error["msg"].as_str().unwrap().contains("192.0.2.1"), "{error}");
}

#[test]
fn resolvers_of_the_runtime_go_before_those_of_the_pools() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.config["ipam"]["dns"] = json!({ "nameservers": ["10.20.0.1"], "search": ["pools.example"] });
    let pod = node.pod("web");
    node.config["runtimeConfig"] = json!({ "dns": { "servers": ["10.0.0.53"], "options": ["ndots:5"] } });
    let result = node.add(&pod).unwrap();
    let expected = json!({ "nameservers": ["10.0.0.53"], "search": ["pools.example"], "options": ["ndots:5"] });
    assert_eq!(result["dns"], expected);
    // A repeated ADD answers the same.
    assert_eq!(node.add(&pod).unwrap(), result);
    let before = node.host.state();
    let rival = node.pod("cache");
    for runtime in [json!({ "dns": { "servers": ["x"] } }), json!({ "bandwidth": { "ingressRate": 1000 } })] {
        node.config["runtimeConfig"] = runtime;
        let error = node.add(&rival).unwrap_err();
        assert!(error["msg"].as_str().unwrap().starts_with("runtimeConfig."), "{error}");
    }
    assert_eq!(before.diff(&node.host.state()), "");
}

#[test]
fn bad_input_is_refused_by_field_and_changes_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    let pod = node.pod("web");
    let (before, inside) = (node.host.state(), pod.state());
    // Path of the change, its value, the code and a word that the message must have.
    let table: &[(&str, Value, u32, &str)] = &[
        ("/cniVersion", json!("9.9.9"), 1, "9.9.9"),
        ("/name", json!("a b"), 7, "a b"),
        ("/link", Value::Null, 7, "link"),
        ("/link/kind", json!("brigde"), 7, "did you mean `bridge`"),
        ("/link/bridge", json!("a-name-that-is-too-long"), 7, "link.bridge"),
        ("/link/mtu", json!(12), 7, "link.mtu"),
        ("/link/brigde", json!("dc0"), 7, "did you mean `bridge`"),
        ("/ipam/type", json!("../host-local"), 7, "ipam.type"),
        ("/ipam/store", json!({ "kind": "memory" }), 7, "ipam.store.kind"),
        ("/ipam/pools/0/subnet", json!("10.20.0.0/33"), 7, "ipam.pools[0].subnet"),
        ("/ipam/pools/0/gateway", json!("10.21.0.1"), 7, "ipam.pools[0].gateway"),
        ("/ipam/pools/1/subnet", json!("10.20.0.0/25"), 7, "ipam.pools[1]"),
        ("/ipam/pools/0/claims/shop~1db/address", json!("10.99.0.1"), 7, "10.99.0.1"),
        ("/ipMasq", json!(true), 2, "say nat.masquerade"),
        ("/policy", json!({ "await": "5 weeks" }), 7, "policy.await"),
        ("/policy", json!({ "defualt": "deny" }), 7, "did you mean `default`"),
    ];
    for (path, value, code, word) in table {
        let mut config = node.config.clone();
        let (parent, key) = path.rsplit_once('/').unwrap();
        let key = key.replace("~1", "/");
        match config.pointer_mut(parent).unwrap() {
            Value::Array(list) => list[key.parse::<usize>().unwrap()] = value.clone(),
            object => object[key.as_str()] = value.clone(),
        }
        let error = node.call("ADD", &pod, &config.to_string()).unwrap_err();
        assert_eq!(error["code"], *code, "{path}: {error}");
        assert!(error["msg"].as_str().unwrap().contains(word), "{path}: {error}");
    }
    assert_eq!(node.call("ADD", &pod, "{\"name\":").unwrap_err()["code"], 6);
    assert_eq!(before.diff(&node.host.state()), "");
    assert_eq!(inside.diff(&pod.state()), "");
    assert_eq!(node.host.records(), Vec::<String>::new());
}

#[test]
fn a_namespace_path_must_be_a_foreign_namespace() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    let pod = node.pod("web");
    let file = node.host.directory().join("file");
    std::fs::write(&file, "").unwrap();
    for path in [file.as_path(), node.host.root().path(), "/nonexistent/netns".as_ref(), "/etc/passwd".as_ref()] {
        let error = node.call_at("ADD", &pod, path).unwrap_err();
        assert_eq!(error["code"], 8, "{error}");
        // DEL goes on with what it knows by itself.
        node.call_at("DEL", &pod, path).unwrap();
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"");
}

#[test]
fn a_foreign_interface_is_left_alone_and_the_lease_is_returned() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    let pod = node.pod("web");
    pod.netns.sh("ip link add eth0 type veth peer name far");
    let inside = pod.state();
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["code"], 113, "{error}");
    assert_eq!(inside.diff(&pod.state()), "");
    node.del(&pod).unwrap();
    assert_eq!(inside.diff(&pod.state()), "");
    pod.netns.sh("ip link del eth0");
    // The address of the failed ADD was given back, and cools down before anybody else gets it.
    assert_eq!(addresses(&node.add(&pod).unwrap())[0].rsplit_once('/').unwrap().1, "24");
}

#[test]
fn del_frees_all_when_the_namespace_is_gone() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    node.warm();
    let before = node.host.state();
    let pod = node.pod("web");
    node.add(&pod).unwrap();
    pod.remove_namespace();
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&node.host.state()), "");
    assert_eq!(node.host.records(), Vec::<String>::new());
}

#[test]
fn del_removes_what_stands_whatever_became_of_the_policy_section() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.warm();
    let before = node.host.state();
    let pod = node.pod("web");
    node.add(&pod).unwrap();
    node.config["policy"] = json!({ "default": "perhaps" });
    let error = node.add(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("policy.default"), "{error}");
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&node.host.state()), "");
    assert_eq!(node.host.records(), Vec::<String>::new());
}

#[test]
fn del_of_what_was_never_added_succeeds_whatever_became_of_the_policy_section() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    let (before, pod) = (node.host.state(), node.pod("web"));
    node.config["policy"] = json!({ "default": "perhaps" });
    node.del(&pod).unwrap();
    node.del_without_namespace(&pod).unwrap();
    assert_eq!(before.diff(&node.host.state()), "");
    assert_eq!(node.host.records(), Vec::<String>::new());

    // A device that may be under policy is not forgotten: it goes, and the caller learns what could not be done.
    node.config.as_object_mut().unwrap().remove("policy");
    node.add(&pod).unwrap();
    std::fs::remove_file(node.host.run_dir().join("attachments").join(&node.host.records()[0])).unwrap();
    node.config["policy"] = json!({ "default": "perhaps" });
    let error = node.del(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("policy.default"), "{error}");
    node.del(&pod).unwrap();
    assert!(node.store().iter().all(|line| line.starts_with("claim ")), "{:?}", node.store());
}

#[test]
fn gc_removes_what_is_not_listed_and_nothing_without_a_list() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    let (keep, stale) = (node.pod("web"), node.pod("cache"));
    let kept = node.add(&keep).unwrap();
    node.add(&stale).unwrap();
    let mut other_network = node.config.clone();
    other_network["name"] = json!("other");
    let foreign = node.pod("elsewhere");
    node.call("ADD", &foreign, &other_network.to_string()).unwrap();
    assert_eq!(node.host.records().len(), 3);

    node.gc(None).unwrap();
    assert_eq!(node.host.records().len(), 3);
    node.gc(Some(&[&keep])).unwrap();
    assert_eq!(node.host.records().len(), 2);
    node.check(&keep, &kept).unwrap();
    assert!(stale.state().lines().all(|l| !l.contains("eth0")), "the stale interface is gone");
    node.gc(Some(&[])).unwrap();
    assert_eq!(node.host.records().len(), 1, "the other network is left alone");
    node.call("DEL", &foreign, &other_network.to_string()).unwrap();
    // Now nobody uses the bridge, and it goes with the network.
    assert!(node.host.root().link("dc0").is_some());
    node.gc(Some(&[])).unwrap();
    assert!(node.host.root().link("dc0").is_none());
}

#[test]
fn status_tells_whether_an_add_could_succeed() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.status().unwrap();
    node.config["ipam"]["pools"] = json!([{ "name": "tiny", "subnet": "10.30.0.0/30", "gateway": "10.30.0.1" }]);
    node.config["ipam"]["routes"] = json!([]);
    node.status().unwrap();
    let run = std::mem::replace(&mut node.config["runDir"], json!("/proc/self"));
    let error = node.status().unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("/proc/self/attachments"), "{error}");
    node.config["runDir"] = run;
    let pod = node.pod("web");
    node.add(&pod).unwrap();
    let error = node.status().unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
    let rival = node.pod("cache");
    let error = node.add(&rival).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("tiny"), "{error}");
    node.config["cniVersion"] = json!("1.0.0");
    assert_eq!(node.status().unwrap_err()["code"], 1);
}

#[test]
fn check_tells_what_drifted() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    let pod = node.pod("web");
    let result = node.add(&pod).unwrap();
    node.check(&pod, &result).unwrap();
    pod.netns.sh("ip addr del 10.20.0.2/24 dev eth0");
    let error = node.check(&pod, &result).unwrap_err();
    assert_eq!(error["code"], 120, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("10.20.0.2"), "{error}");
}

#[test]
fn parallel_adds_of_many_pods_share_one_bridge_and_no_address() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.config["ipam"]["pools"][0]["subnet"] = json!("10.20.0.0/22");
    node.warm();
    let before = node.host.state();
    let count = effort(16, 16, 512);
    let pods: Vec<_> = (0..count).map(|n| node.pod(&format!("web{n}"))).collect();
    let mut all: Vec<String> = std::thread::scope(|scope| {
        let running: Vec<_> = pods.iter().map(|pod| scope.spawn(|| addresses(&node.add(pod).unwrap()))).collect();
        running.into_iter().flat_map(|r| r.join().unwrap()).collect()
    });
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 2 * count, "{all:?}");
    std::thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(|| node.del(pod).unwrap());
        }
    });
    assert_eq!(before.diff(&node.host.state()), "");
}
