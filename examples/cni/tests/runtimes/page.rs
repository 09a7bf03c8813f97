//! The lists of the operators' page, each by libcni's sequence.

use std::collections::BTreeSet;

use dcenet_core::test_support::TestHost;
use serde_json::{Value, json};

use crate::common::{Node, elements, has_nft};
use crate::libcni::Runtime;
use crate::{has, without_surprises};

const PAGE: &str = include_str!("../../../../docs/operators.md");
/// The guest has an adapter: the plugin's tests there begin with this list.
const OF_AN_ADAPTER: &str = "Virtual functions";

/// Heading and list of each section that has one.
fn lists() -> Vec<(&'static str, Value)> {
    let sections = PAGE.split("\n## ").skip(1);
    let lists = sections.filter_map(|section| {
        let (heading, text) = section.split_once('\n')?;
        let block = text.split("```json").nth(1)?.split("```").next()?;
        Some((heading, serde_json::from_str(block).unwrap_or_else(|e| panic!("{heading}: {e}"))))
    });
    lists.collect()
}

/// Puts what is kept below the test's own directory.
fn move_in(host: &TestHost, configuration: &mut Value) {
    let Some(object) = configuration.as_object_mut() else { return };
    match object.get("type").and_then(Value::as_str) {
        Some("host-local") => drop(object.insert("dataDir".to_owned(), json!(host.directory().join("host-local")))),
        // Its own configuration, or a part of another plugin's that it is called with for addresses.
        Some("dcenet") if !object.contains_key("pools") => {
            object.insert("stateDir".to_owned(), json!(host.directory().join("state")));
            object.insert("runDir".to_owned(), json!(host.run_dir()));
        }
        Some(_) if object.get("ipam").is_some_and(|ipam| ipam["type"] == "dcenet") => {
            object.insert("stateDir".to_owned(), json!(host.directory().join("state")));
            object.insert("runDir".to_owned(), json!(host.run_dir()));
        }
        _ => {}
    }
    for (_, value) in object.iter_mut() {
        match value {
            Value::Array(elements) => elements.iter_mut().for_each(|element| move_in(host, element)),
            value => move_in(host, value),
        }
    }
}

/// What a pod leaves: of the host, of translation, of records, and files with addresses in their names.
fn traces(node: &Node) -> BTreeSet<String> {
    let mut traces: BTreeSet<String> = node.host.state().lines().map(str::to_owned).collect();
    traces.extend(elements(node));
    traces.extend(node.host.records());
    let held = std::fs::read_dir(node.host.directory().join("host-local")).into_iter().flatten().flatten();
    let held = held.flat_map(|network| std::fs::read_dir(network.path()).into_iter().flatten().flatten());
    traces.extend(held.map(|f| f.file_name().to_string_lossy().into_owned()).filter(|name| name.starts_with("10.")));
    traces
}

#[test]
fn every_list_of_the_page_works() {
    let here = has(&[("/usr/lib/cni/bridge", "containernetworking-plugins"), ("/usr/sbin/iptables", "iptables")]);
    if !here || !has_nft() {
        return;
    }
    let lists = lists();
    let headings: Vec<&str> = lists.iter().map(|(heading, _)| *heading).collect();
    assert_eq!(
        headings,
        [
            "One network",
            "Limited bandwidth",
            "Settings of pods",
            "The network of the data centre",
            "Addresses for another plugin",
            "Addresses of another plugin",
            "Behind another plugin",
            "Several networks",
            OF_AN_ADAPTER,
        ]
    );
    for (heading, mut list) in lists {
        if heading == OF_AN_ADAPTER {
            continue;
        }
        let node = Node::new();
        without_surprises(&node.host);
        // The segment's other end has the address of its gateway.
        node.host.root().sh("ip link add eth1 type veth peer name wire && ip addr add 10.50.0.1/24 dev wire && \
             ip link set eth1 up && ip link set wire up");
        move_in(&node.host, &mut list);
        let mut runtime = Runtime::new(&node.host, list.clone());
        let mapped = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }]);
        runtime.capabilities.insert("portMappings".to_owned(), mapped);
        let first = node.pod("first");
        runtime.add(&first).unwrap_or_else(|e| panic!("{heading}: {e:?}"));
        runtime.del(&first).unwrap_or_else(|e| panic!("{heading}: {e:?}"));

        let before = traces(&node);
        let pod = node.pod("db");
        let result = runtime.add(&pod).unwrap_or_else(|e| panic!("{heading}: {e:?}"));
        let ips = result["ips"].as_array().unwrap();
        assert!(!ips.is_empty(), "{heading}: {result}");
        for gateway in ips.iter().filter_map(|ip| ip["gateway"].as_str()) {
            pod.ping(gateway);
        }
        match heading {
            "One network" => assert_eq!((&ips[0]["address"], ips.len()), (&json!("10.20.0.5/24"), 2), "its claim"),
            "The network of the data centre" => {
                assert!(ips[0]["address"].as_str().unwrap().starts_with("10.50.0.6"), "{result}");
            }
            "Settings of pods" => {
                assert_eq!(pod.netns.sh("sysctl -n net.core.somaxconn net.ipv4.conf.eth0.rp_filter"), "1024\n2\n");
            }
            "Several networks" => assert!(pod.netns.link("stor0").is_some(), "{result}"),
            _ => {}
        }
        assert_ne!(traces(&node), before, "{heading}: a pod is seen");
        runtime.check(&pod).unwrap_or_else(|e| panic!("{heading}: {e:?}"));
        if list["cniVersion"] == "1.1.0" {
            runtime.status().unwrap_or_else(|e| panic!("{heading}: {e:?}"));
        }
        runtime.del(&pod).unwrap_or_else(|e| panic!("{heading}: {e:?}"));
        let left: Vec<_> = traces(&node).difference(&before).cloned().collect();
        assert!(left.is_empty(), "{heading}: {left:?}");
    }
}
