//! Which address a pod gets: pools that select, pools and addresses that are asked for, and what comes with an address.

use dcenet_core::test_support::{Rung, require};
use serde_json::{Value, json};

use super::addresses;
use super::common::{Node, Pod};

/// A node with these pools and no routes, whose released addresses may be had at once.
fn node_with(pools: Value) -> Node {
    let mut node = Node::new();
    node.config["ipam"] = json!({ "type": "dcenet", "cooldown": "0s", "pools": pools });
    node
}

/// The addresses that a pod gets, which leaves again; or the error's code and text.
fn given(node: &Node, name: &str, config: &Value, args: &str) -> Result<String, (u64, String)> {
    let pod = node.pod(name);
    let result = node.add_asking(&pod, config, args).map_err(|error| {
        let message = error["msg"].as_str().unwrap().to_owned();
        (error["code"].as_u64().unwrap(), message)
    })?;
    node.call("DEL", &pod, &config.to_string()).unwrap();
    Ok(addresses(&result).join(" "))
}

/// The same, without what is different in each address of a subnet.
fn subnets(node: &Node, name: &str, config: &Value, args: &str) -> Result<String, (u64, String)> {
    let addresses = given(node, name, config, args)?;
    let subnet = |address: &str| address[..=address.rfind(['.', ':']).unwrap()].to_owned();
    Ok(addresses.split(' ').map(subnet).collect::<Vec<_>>().join(" "))
}

fn labels(labels: &[(&str, &str)]) -> Value {
    let list: Vec<_> = labels.iter().map(|(key, value)| json!({ "key": key, "value": value })).collect();
    json!({ "cni": { "labels": list } })
}

fn mac_in(pod: &Pod) -> String {
    pod.netns.link("eth0").unwrap().mac.unwrap().to_string()
}

#[test]
fn pools_select_by_namespace_workload_labels_node_and_network() {
    if !require(Rung::Netns) {
        return;
    }
    let zone = json!({ "matchLabels": { "zone": "a" } });
    let node = node_with(json!([
        { "name": "rest", "subnet": "10.9.0.0/24", "priority": 9 },
        { "name": "data", "subnet": "10.1.0.0/24", "priority": -1,
          "select": { "namespaces": ["sh*"], "labels": { "matchLabels": { "tier": "data" } } } },
        { "name": "other", "subnet": "10.8.0.0/24", "priority": -2, "select": { "namespaces": ["ops"] } },
        { "name": "rack", "subnet": "10.2.0.0/24", "select": { "nodes": ["rack1-*"], "nodeLabels": zone } },
        { "name": "web", "subnet": "10.3.0.0/24", "select": { "workloads": ["web-*"] } },
        { "name": "lan", "subnet": "10.4.0.0/24", "select": { "networks": ["lan*"] } },
    ]));
    let plain = node.config.clone();
    let with = |pointer: &str, value: Value| {
        let mut config = plain.clone();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[key] = value;
        config
    };
    let node_of = |name: &str, zone: &str| with("/ipam/node", json!({ "name": name, "labels": { "zone": zone } }));
    let data = with("/args", labels(&[("tier", "data")]));
    for (pod, config, expected) in [
        ("x", &plain, "10.9.0."),
        ("x", &data, "10.1.0."),
        // Of two that serve it, the one of the lower number.
        ("web-1", &data, "10.1.0."),
        ("web-1", &plain, "10.3.0."),
        ("x", &with("/args", labels(&[("tier", "front")])), "10.9.0."),
        ("x", &node_of("rack1-n7", "a"), "10.2.0."),
        ("x", &node_of("rack1-n7", "b"), "10.9.0."),
        ("x", &node_of("rack2-n7", "a"), "10.9.0."),
        ("x", &with("/name", json!("lan7")), "10.4.0."),
    ] {
        assert_eq!(subnets(&node, pod, config, "").as_deref(), Ok(expected), "{pod}: {config}");
    }
    // The last of the same kind of pair counts.
    assert_eq!(subnets(&node, "x", &plain, "K8S_POD_NAMESPACE=ops").as_deref(), Ok("10.8.0."));

    let mut nobody = plain.clone();
    nobody["ipam"]["pools"].as_array_mut().unwrap().remove(0);
    let (code, message) = given(&node, "x", &nobody, "").unwrap_err();
    assert_eq!(code, 7, "{message}");
    for word in ["ipam.pools", "workload shop/x", "network shop", "rack1-*", "widen a select"] {
        assert!(message.contains(word), "{message}");
    }
    assert_eq!((node.store(), node.host.records()), (Vec::<String>::new(), Vec::<String>::new()));
}

#[test]
fn a_full_pool_falls_through_in_order_unless_it_says_not_to() {
    if !require(Rung::Netns) {
        return;
    }
    let tiny = |name: &str, n: u8, priority: i32, fallback: bool| {
        json!({ "name": name, "subnet": format!("10.{n}.0.0/30"), "gateway": format!("10.{n}.0.1"),
                "priority": priority, "fallback": fallback })
    };
    let node = node_with(json!([tiny("third", 3, 3, true), tiny("first", 1, 1, true), tiny("second", 2, 2, false)]));
    let pods = ["a", "b", "c"].map(|name| node.pod(name));
    assert_eq!(addresses(&node.add(&pods[0]).unwrap()), ["10.1.0.2/30"]);
    assert_eq!(addresses(&node.add(&pods[1]).unwrap()), ["10.2.0.2/30"]);
    let error = node.add(&pods[2]).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("pool second"), "{error}");
    assert_eq!((node.store().len(), node.host.records().len()), (2, 2));
    node.del(&pods[0]).unwrap();
    assert_eq!(addresses(&node.add(&pods[2]).unwrap()), ["10.1.0.2/30"]);
}

#[test]
fn a_request_names_its_pools_by_capability_arguments_or_environment() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node_with(json!([
        { "name": "web", "subnet": "10.1.0.0/24" },
        { "name": "db-a", "subnet": "10.2.0.0/30", "gateway": "10.2.0.1" },
        { "name": "db-b", "subnet": "10.3.0.0/24" },
        { "name": "six", "subnet": "2001:db8:6::/64" },
        { "name": "ops", "subnet": "10.5.0.0/24", "select": { "namespaces": ["ops"] } },
    ]));
    let asking = |runtime: Value, args: Value| {
        let mut config = node.config.clone();
        config["runtimeConfig"] = runtime;
        config["args"] = json!({ "cni": args });
        config
    };
    let none = json!({});
    for (runtime, args, environment, expected) in [
        (none.clone(), none.clone(), "", "10.1.0. 2001:db8:6::"),
        (json!({ "pools": ["db-a"] }), json!({ "pools": ["web"] }), "POOLS=six", "10.2.0."),
        (json!({ "pools": [] }), json!({ "pools": ["web"] }), "POOLS=six", "10.1.0."),
        (none.clone(), none.clone(), "POOLS=six", "2001:db8:6::"),
        // Both families from two pools, and two of one family, all or none.
        (none.clone(), json!({ "pools": ["db-b", "six"] }), "", "10.3.0. 2001:db8:6::"),
        (none.clone(), json!({ "pools": ["db-b", "web"] }), "", "10.1.0. 10.3.0."),
    ] {
        let config = asking(runtime, args);
        assert_eq!(subnets(&node, "x", &config, environment).as_deref(), Ok(expected), "{config} {environment}");
    }
    let config = asking(json!({ "pools": ["db-b", "web"], "ips": ["10.3.0.7/24"] }), none.clone());
    assert!(given(&node, "x", &config, "").unwrap().ends_with(" 10.3.0.7/24"));
    // A pattern names alternatives.
    let config = asking(json!({ "pools": ["db-?"] }), none.clone());
    let pods = [node.pod("a"), node.pod("b")];
    assert_eq!(addresses(&node.call("ADD", &pods[0], &config.to_string()).unwrap()), ["10.2.0.2/30"]);
    let second = addresses(&node.call("ADD", &pods[1], &config.to_string()).unwrap());
    assert!(second.len() == 1 && second[0].starts_with("10.3.0."), "{second:?}");
    // All or none: the one address of db-a is taken.
    let (code, message) =
        given(&node, "x", &asking(none.clone(), json!({ "pools": ["web", "db-a"] })), "").unwrap_err();
    assert_eq!(code, 11, "{message}");
    assert!(message.contains("pool db-a"), "{message}");
    assert_eq!(node.store().len(), 2, "{:?}", node.store());

    for (runtime, args, environment, said) in [
        (
            json!({ "pools": ["wbe"] }),
            none.clone(),
            "",
            &["runtimeConfig.pools[0]", "\"wbe\"", "there are web, db-a"][..],
        ),
        (none.clone(), json!({ "pools": ["web", "w*"] }), "", &["args.cni.pools[1]", "\"w*\"", "drop one"]),
        (none.clone(), none.clone(), "POOLS=ops", &["CNI_ARGS POOLS[0]", "namespace shop is not among ops"]),
        (json!({ "pools": "web" }), none.clone(), "", &["runtimeConfig.pools", "web"]),
    ] {
        let (code, message) = given(&node, "x", &asking(runtime, args), environment).unwrap_err();
        assert_eq!(code, 7, "{message}");
        assert!(said.iter().all(|word| message.contains(word)), "{message}");
    }
    let mut without = asking(json!({ "pools": ["web"] }), none);
    without.as_object_mut().unwrap().remove("ipam");
    let (code, message) = given(&node, "x", &without, "").unwrap_err();
    assert!(
        code == 7 && message.contains("runtimeConfig.pools: [\"web\"]") && message.contains("add one"),
        "{message}"
    );
    assert_eq!(node.store().len(), 2);
}

#[test]
fn groups_of_pools_give_an_address_each_or_none() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node_with(json!([
        { "name": "front", "subnet": "10.1.0.0/24" },
        { "name": "six", "subnet": "2001:db8:6::/64" },
        { "name": "backup", "subnet": "10.2.0.0/30", "gateway": "10.2.0.1", "group": "backup",
          "select": { "workloads": ["shop/db-*"] } },
    ]));
    let (web, db, rival) = (node.pod("web"), node.pod("db-0"), node.pod("db-1"));
    assert_eq!(addresses(&node.add(&web).unwrap()), ["10.1.0.1/24", "2001:db8:6::1/64"]);
    let result = node.add(&db).unwrap();
    assert_eq!(addresses(&result), ["10.1.0.2/24", "2001:db8:6::2/64", "10.2.0.2/30"]);
    node.check(&db, &result).unwrap();
    let before = node.store();
    let error = node.add(&rival).unwrap_err();
    assert!(error["code"] == 11 && error["msg"].as_str().unwrap().contains("pool backup"), "{error}");
    assert_eq!(node.store(), before);
    node.del(&db).unwrap();
    assert_eq!(addresses(&node.add(&rival).unwrap())[2], "10.2.0.2/30");
}

#[test]
fn a_pod_with_two_interfaces_has_an_address_of_each_networks_pool_and_keeps_one_when_the_other_goes() {
    if !require(Rung::Netns) {
        return;
    }
    let pool = |name: &str, n: u8, networks: &str| {
        json!({ "name": name, "subnet": format!("10.{n}.0.0/24"), "gateway": format!("10.{n}.0.1"),
                "select": { "networks": [networks] } })
    };
    // One section for both networks, as they share the store. The claim is of one interface, in the pool of its network.
    let mut fast = pool("fast", 2, "backup");
    fast["claims"] = json!({ "shop/db-0/net1": { "address": "10.2.0.50", "keep": "forever" } });
    let node = node_with(json!([pool("lan", 1, "shop"), fast]));
    let mut backup = node.config.clone();
    backup["name"] = json!("backup");
    backup["link"]["bridge"] = json!("dc1");
    let (pod, other) = (node.pod("db-0"), node.pod("web"));
    let on_net1 = |verb, pod: &Pod| node.call_for(verb, pod, "net1", &backup);

    let first = node.add(&pod).unwrap();
    assert_eq!(addresses(&first), ["10.1.0.2/24"]);
    let second = on_net1("ADD", &pod).unwrap();
    assert_eq!(addresses(&second), ["10.2.0.50/24"]);
    assert_eq!(addresses(&on_net1("ADD", &other).unwrap()), ["10.2.0.2/24"]);
    for gateway in ["10.1.0.1", "10.2.0.1"] {
        pod.ping(gateway);
    }
    let bound = |node: &Node| node.store().into_iter().filter(|line| line.contains(" has ")).collect::<Vec<_>>();
    let has = |network: &str, pod: &Pod, ifname: &str, address: &str| {
        format!("{network}/{}/{ifname} has {address}/24", pod.container)
    };
    let [lan, fast, web] = [
        has("shop", &pod, "eth0", "10.1.0.2"),
        has("backup", &pod, "net1", "10.2.0.50"),
        has("backup", &other, "net1", "10.2.0.2"),
    ];
    let sorted = |mut lines: Vec<String>| {
        lines.sort();
        lines
    };
    assert_eq!(bound(&node), sorted(vec![lan.clone(), fast.clone(), web.clone()]));

    // DEL of one network leaves the other, and again says nothing new.
    for _ in 0..2 {
        on_net1("DEL", &pod).unwrap();
        assert_eq!(bound(&node), sorted(vec![lan.clone(), web.clone()]));
    }
    assert!(pod.netns.link("net1").is_none() && pod.netns.link("eth0").is_some());
    pod.ping("10.1.0.1");
    node.check(&pod, &first).unwrap();
    // The other way round.
    on_net1("ADD", &pod).unwrap();
    node.del(&pod).unwrap();
    assert_eq!(bound(&node), sorted(vec![fast, web]));
    assert!(pod.netns.link("eth0").is_none() && pod.netns.link("net1").is_some());
    pod.ping("10.2.0.1");
    // GC of one network is not told of the attachments of the other, and leaves them.
    node.gc(Some(&[])).unwrap();
    assert_eq!(bound(&node).len(), 2);
    for pod in [&pod, &other] {
        on_net1("DEL", pod).unwrap();
    }
    assert_eq!((bound(&node), node.host.records()), (Vec::new(), Vec::new()));
}

#[test]
fn addresses_are_asked_for_by_capability_arguments_or_environment() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    let asking = |runtime: Value, args: Value| {
        let mut config = node.config.clone();
        config["runtimeConfig"] = runtime;
        config["args"] = json!({ "cni": args });
        config
    };
    let none = json!({});
    for (runtime, args, environment, expected) in [
        (json!({ "ips": ["10.20.0.9/24"] }), json!({ "ips": ["10.20.0.8"] }), "IP=10.20.0.7", "10.20.0.9/24"),
        (none.clone(), json!({ "ips": ["10.20.0.8"] }), "IP=10.20.0.7", "10.20.0.8/24"),
        (none.clone(), none.clone(), "IP=10.20.0.7", "10.20.0.7/24"),
        (json!({ "ips": ["2001:db8:20::7", "10.20.0.6"] }), none.clone(), "", "10.20.0.6/24 2001:db8:20::7/64"),
    ] {
        let got = given(&node, "x", &asking(runtime, args), environment).unwrap();
        assert!(got.starts_with(expected), "{got}, not {expected}");
    }
    for (runtime, environment, code, said) in [
        (json!({ "ips": ["10.20.0"] }), "", 7, &["runtimeConfig.ips[0]", "\"10.20.0\"", "write one"][..]),
        (json!({ "ips": ["10.99.0.1"] }), "", 7, &["runtimeConfig.ips", "10.99.0.1", "take one from a pool"]),
        (json!({ "ips": ["10.20.0.1"] }), "", 7, &["runtimeConfig.ips", "10.20.0.1", "does not hand it out"]),
        (json!({ "ips": ["10.20.0.8", "10.20.0.9"] }), "", 7, &["runtimeConfig.ips", "10.20.0.9", "ask for one each"]),
        (none.clone(), "IP=10.99.0.1", 7, &["CNI_ARGS IP", "10.99.0.1", "take one from a pool"]),
        (none.clone(), "IP=ten", 4, &["CNI_ARGS IP", "\"ten\"", "write one"]),
        (json!({ "ips": ["10.20.0.77"] }), "", 110, &["10.20.0.77", "claim shop/db"]),
    ] {
        let (got, message) = given(&node, "x", &asking(runtime, none.clone()), environment).unwrap_err();
        assert_eq!(got, code, "{message}");
        assert!(said.iter().all(|word| message.contains(word)), "{message}");
    }
    assert_eq!(node.host.records(), Vec::<String>::new());
}

#[test]
fn an_ethernet_address_comes_from_the_runtime_or_stays_with_the_claim() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.config["ipam"]["pools"][0]["claims"]["shop/db"]["mac"] = json!("02:00:00:00:77:00");
    let kept = |pod: &Pod, result: &Value, mac: &str| {
        assert_eq!(mac_in(pod), mac);
        assert_eq!(result["interfaces"][2]["mac"], mac);
    };
    // With the claim's address, in each container that bears it.
    for _ in 0..2 {
        let db = node.pod("db");
        let result = node.add(&db).unwrap();
        kept(&db, &result, "02:00:00:00:77:00");
        node.check(&db, &result).unwrap();
        node.del(&db).unwrap();
    }
    let (by_capability, by_environment) = (node.pod("web"), node.pod("web"));
    let mut config = node.config.clone();
    config["runtimeConfig"] = json!({ "mac": "02:00:00:00:00:07" });
    let result = node.add_asking(&by_capability, &config, "MAC=02:00:00:00:00:08").unwrap();
    kept(&by_capability, &result, "02:00:00:00:00:07");
    let result = node.add_asking(&by_environment, &node.config, "MAC=02:00:00:00:00:08").unwrap();
    kept(&by_environment, &result, "02:00:00:00:00:08");
    config["runtimeConfig"] = json!({ "mac": "33:33:00:00:00:07" });
    let error = node.call("ADD", &node.pod("web"), &config.to_string()).unwrap_err();
    let message = error["msg"].as_str().unwrap();
    assert!(error["code"] == 7 && message.contains("runtimeConfig.mac") && message.contains("33:33:"), "{error}");
}

#[test]
fn ranges_of_the_runtime_take_the_place_of_the_pools() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = node_with(json!([{ "name": "own", "subnet": "10.9.0.0/24" }]));
    let range = |first: u8, last: u8| {
        let (first, last) = (format!("10.7.0.{first}"), format!("10.7.0.{last}"));
        json!({ "subnet": "10.7.0.0/24", "rangeStart": first, "rangeEnd": last, "gateway": "10.7.0.1" })
    };
    node.config["runtimeConfig"] =
        json!({ "ipRanges": [[range(20, 20), range(40, 40)], [{ "subnet": "2001:db8:7::/64" }]] });
    let pods = ["a", "b", "c"].map(|name| node.pod(name));
    let result = node.add(&pods[0]).unwrap();
    assert_eq!(addresses(&result), ["10.7.0.20/24", "2001:db8:7::1/64"]);
    assert_eq!(result["ips"][0]["gateway"], "10.7.0.1");
    assert_eq!(addresses(&node.add(&pods[1]).unwrap())[0], "10.7.0.40/24");
    node.add(&pods[2]).unwrap_err();
    node.check(&pods[0], &result).unwrap();
    // Without the ranges, as a runtime without a cache calls, what was leased is released all the same.
    let asking = node.config.clone();
    node.config.as_object_mut().unwrap().remove("runtimeConfig");
    node.del(&pods[0]).unwrap();
    assert_eq!(addresses(&node.add(&pods[2]).unwrap()), ["10.9.0.1/24"]);
    node.config = asking;
    assert_eq!(addresses(&node.add(&pods[0]).unwrap())[0], "10.7.0.20/24");
    node.config["runtimeConfig"] = json!({ "ipRanges": [[{ "subnet": "10.7.0.0/24", "rangeEnd": "10.8.0.1" }]] });
    let refused = node.pod("d");
    let error = node.add(&refused).unwrap_err();
    assert!(error["msg"].as_str().unwrap().starts_with("runtimeConfig.ipRanges[0][0].rangeEnd: "), "{error}");
    // The runtime asks for the same when it takes the pod down, and for that of one that it has had.
    node.del(&refused).unwrap();
    node.del(&pods[0]).unwrap();
    node.config["runtimeConfig"] = json!({ "ipRanges": [[range(20, 20)]] });
    assert_eq!(addresses(&node.add(&refused).unwrap()), ["10.7.0.20/24"]);
}
