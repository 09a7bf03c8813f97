//! Our links with addresses of the IPAM plugins of others: Debian's host-local and static.

use std::path::Path;

use dcenet_core::test_support::{Rung, require_with};
use serde_json::{Value, json};

use super::addresses;
use super::common::{Faulted, Node};

fn has_debians() -> bool {
    require_with(Rung::Services, || {
        let programs = ["host-local", "static"].map(|plugin| Path::new("/usr/lib/cni").join(plugin));
        let missing = programs.iter().find(|program| !program.exists());
        missing.map(|program| format!("{} is missing: install containernetworking-plugins", program.display()))
    })
}

/// A node whose section `ipam` is this one.
fn node(ipam: Value) -> Node {
    let mut node = Node::new();
    for (name, value) in [("all/accept_dad", "0"), ("default/accept_dad", "0"), ("default/addr_gen_mode", "1")] {
        node.host.root().sysctl(&format!("ipv6/conf/{name}"), value);
    }
    node.config["ipam"] = ipam;
    node
}

fn host_local(node: &Node) -> Value {
    json!({
        "type": "host-local", "dataDir": node.host.directory().join("host-local"),
        "ranges": [[{ "subnet": "10.60.0.0/24", "gateway": "10.60.0.1" }], [{ "subnet": "2001:db8:60::/64" }]],
        "routes": [{ "dst": "0.0.0.0/0" }],
    })
}

/// The addresses that host-local has given, by its files, and how many questions are written down.
fn given(node: &Node) -> (Vec<String>, usize) {
    let names = |directory: std::path::PathBuf| {
        let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
        files.map(|file| file.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let mut addresses = names(node.host.directory().join("host-local/shop"));
    addresses.retain(|name| name.starts_with(|c: char| c.is_ascii_digit()));
    addresses.sort();
    (addresses, names(node.host.directory().join("state/ipam")).len())
}

#[test]
fn pods_have_addresses_of_host_local_and_give_them_back() {
    if !has_debians() {
        return;
    }
    let mut node = node(Value::Null);
    node.config["ipam"] = host_local(&node);
    node.warm();
    assert_eq!(given(&node), (vec![], 0));
    let before = node.host.state();
    let (web, cache) = (node.pod("web"), node.pod("cache"));
    let result = node.add(&web).unwrap();
    let second = node.add(&cache).unwrap();
    assert_eq!(node.add(&web).unwrap(), result, "a repeated ADD gives the same answer");
    let all: Vec<String> = [&result, &second].iter().flat_map(|result| addresses(result)).collect();
    assert_eq!(all.len(), 4);
    let mut held = given(&node).0;
    held.iter_mut().for_each(|address| *address = address.replace('_', ":"));
    for address in &all {
        let address = address.split('/').next().unwrap();
        assert!(held.iter().any(|held| held == address), "{address} of {held:?}");
    }
    web.ping(addresses(&second)[0].split('/').next().unwrap());
    web.ping("10.60.0.1");
    node.check(&web, &result).unwrap();
    node.status().unwrap();

    node.gc(Some(&[&web])).unwrap();
    assert_eq!((given(&node).0.len(), given(&node).1), (2, 1), "what the runtime does not list is given back");
    for _ in 0..2 {
        node.del(&web).unwrap();
        node.del_without_namespace(&cache).unwrap();
    }
    assert_eq!((given(&node), before.diff(&node.host.state()).as_str()), ((vec![], 0), ""));
}

#[test]
fn a_kill_at_any_call_leaves_no_address_of_host_local() {
    if !has_debians() {
        return;
    }
    let mut node = node(Value::Null);
    node.config["ipam"] = host_local(&node);
    node.warm();
    let (before, pod) = (node.host.state(), node.pod("web"));
    let (mut killed, mut unclean) = (0, 0);
    for kind in ["abort", "abort-after"] {
        for call in 1.. {
            let Faulted { met, outcome } = node.faulted("ADD", Some(&pod), &node.config, &format!("{kind}:{call}"));
            let what = format!("{kind} {met:?}: {outcome:?}");
            let has = given(&node).0.len();
            assert!(has == 0 || has == 2, "{what}");
            if met.is_some() {
                killed += 1;
                unclean += usize::from(has > 0);
                if call % 2 == 0 {
                    node.add(&pod).unwrap();
                    assert_eq!(given(&node).0.len(), 2, "{what}");
                }
            }
            node.del(&pod).unwrap();
            assert_eq!((given(&node), before.diff(&node.host.state()).as_str()), ((vec![], 0), ""), "{what}");
            if met.is_none() {
                break;
            }
        }
    }
    // The twin: without the DEL there are some.
    assert!(killed > 10 && unclean > 2, "{unclean} of {killed}");
}

#[test]
fn an_add_that_fails_gives_the_address_back_and_what_was_given_is_what_was_asked() {
    if !has_debians() {
        return;
    }
    let mut node = node(Value::Null);
    node.config["ipam"] = host_local(&node);
    node.warm();
    let pod = node.pod("web");
    let mut wrong = node.config.clone();
    wrong["link"]["mtu"] = json!(100_000);
    node.call("ADD", &pod, &wrong.to_string()).unwrap_err();
    assert_eq!(given(&node), (vec![], 0));
    node.config["runtimeConfig"] = json!({ "ips": ["10.60.0.77/24"] });
    assert!(addresses(&node.add(&pod).unwrap()).contains(&"10.60.0.77/24".to_owned()));
    node.del(&pod).unwrap();
    assert_eq!(given(&node), (vec![], 0));

    let address = json!([{ "address": "10.61.0.9/24", "gateway": "10.61.0.1" }]);
    let mut node = self::node(json!({ "type": "static", "addresses": address }));
    let pod = node.pod("web");
    assert_eq!(addresses(&node.add(&pod).unwrap()), ["10.61.0.9/24"]);
    node.del(&pod).unwrap();
    assert_eq!(given(&node), (vec![], 0));
    node.config["ipam"]["type"] = json!("no-such");
    let error = node.add(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("no-such"), "{error}");
    node.config["ipam"]["type"] = json!("../static");
    let error = node.add(&pod).unwrap_err();
    assert!(error["code"] == 7 && error["msg"].as_str().unwrap().starts_with("ipam.type"), "{error}");
}
