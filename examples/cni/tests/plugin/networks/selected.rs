//! Networks that a pod asks for by its annotation.

use dcenet_core::test_support::{Rung, require};
use serde_json::{Value, json};

use super::super::addresses;
use super::super::common::Node;
use super::{Everything, has_debians, node, ours, status, their_macvlan, theirs, warm};

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
    let mac = "02:00:00:00:61:0a";
    // As people write them, not as plugins answer.
    let wish = json!([{ "name": "storage", "interface": "stor0", "ips": ["10.61.0.7/24", "2001:DB8:61:0::7/64"],
        "mac": mac.to_uppercase() }]);
    let annotations = json!({ "k8s.v1.cni.cncf.io/networks": wish.to_string() });
    node.config["runtimeConfig"] = json!({ "io.kubernetes.cri.pod-annotations": annotations });
    let pod = node.pod("db");
    let result = node.add(&pod).unwrap();
    assert_eq!(addresses(&result)[2..], ["10.61.0.7/24", "2001:db8:61::7/64"]);
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
        ("[{\"name\": \"storage\", \"ips\": [\"10.61.0.7/24;POOLS=reserved\"]}]", "[0].ips[0]: "),
        ("[{\"name\": \"storage\", \"mac\": \"02:00:00:00:00:01;K8S_POD_NAMESPACE=kube-system\"}]", "[0].mac: "),
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

/// What the runtime wants of the default network reaches the plugins of others, or is refused.
#[test]
fn what_the_runtime_asks_for_goes_to_the_default_network_or_is_refused() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = node(json!([{ "name": "a", "delegate": { "cniVersion": "1.0.0", "type": "deaf" } }]));
    // It answers with the address that its arguments ask for, or with another.
    let script = "#!/bin/sh\n[ $CNI_COMMAND = ADD ] || exit 0\nip=$(sed -n 's/.*\"wish\":\"\\([0-9.]*\\)\".*/\\1/p')\n\
                  echo '{\"cniVersion\": \"1.0.0\", \"ips\": [{\"address\": \"'${ip:-10.66.0.1}'/24\"}]}'\n";
    node.install("deaf", script);
    let pod = node.pod("web");
    let before = Everything::of(&node, &pod);
    node.config["args"] = json!({ "cni": { "ips": ["10.66.0.9"] } });
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["code"], 2, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("ips: 10.66.0.9 was asked for"), "{error}");
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
    node.config["args"]["cni"]["wish"] = json!("10.66.0.9");
    // Some runtimes send an empty one, which asks for nothing.
    node.config["runtimeConfig"] = json!({ "mac": "" });
    let result = node.add(&pod).unwrap();
    assert_eq!(addresses(&result), ["10.66.0.9/24"], "{result}");
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&Everything::of(&node, &pod)), "");
}

/// The configuration of the front page, with directories of this test.
#[test]
fn the_front_pages_configuration_works() {
    if !has_debians(&["bridge", "host-local"]) {
        return;
    }
    let page = include_str!("../../../../../README.md");
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
