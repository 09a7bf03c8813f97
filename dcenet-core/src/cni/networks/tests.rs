//! What a configuration and a pod's annotation come to: a table of wishes, none of which touches the host.

use std::collections::HashMap;
use std::ffi::OsString;

use serde_json::{Value, json};

use super::config::{By, Network, resolve};
use crate::cni::{CniError, ErrorCode, Invocation, NetConf};

/// A directory of definitions, and a configuration that uses it.
struct Selecting {
    directory: tempfile::TempDir,
    conf: Value,
}

impl Selecting {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let conf = json!({
            "cniVersion": "1.1.0", "name": "pods", "type": "dcenet",
            "networks": [
                { "name": "first", "delegate": { "type": "theirs", "args": { "cni": { "kept": 1, "labels": [] } } } },
                { "name": "second", "link": { "kind": "veth" } },
            ],
            "selection": { "definitions": directory.path() },
        });
        let this = Self { directory, conf };
        this.define("own", &json!({ "cniVersion": "1.1.0", "type": "dcenet", "link": { "kind": "veth" } }));
        this.define("mute", &json!({ "cniVersion": "0.3.0", "type": "theirs" }));
        let pooled = json!({ "type": "bridge", "ipam": { "type": "dcenet" }, "capabilities": { "ips": true } });
        this.define("pooled", &pooled);
        this
    }

    fn define(&self, name: &str, config: &Value) {
        let object = json!({ "kind": "NetworkAttachmentDefinition", "metadata": { "name": name, "namespace": "shop" },
            "spec": { "config": config.to_string() } });
        self.write(&format!("{name}.json"), &object.to_string());
    }

    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.directory.path().join(file), text).unwrap();
    }

    /// The networks of a pod that asks for these.
    fn asking(&self, annotation: &Value) -> Result<Vec<Network>, CniError> {
        let mut conf = self.conf.clone();
        let text = annotation.as_str().map_or_else(|| annotation.to_string(), str::to_owned);
        conf["args"]["cni"]["k8s.v1.cni.cncf.io/networks"] = json!(text);
        let conf = NetConf::parse(conf.to_string().as_bytes()).unwrap();
        let environment = HashMap::from([
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/netns/p"),
            ("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;POOLS=all;IgnoreUnknown=1"),
        ]);
        let invocation = Invocation::from_env(|name| environment.get(name).map(OsString::from)).unwrap();
        resolve(&conf, &invocation, &"eth0".parse().unwrap())
    }

    /// The third network, which is the first that the pod asks for.
    fn asked(&self, annotation: &Value) -> Network {
        self.asking(annotation).unwrap().remove(2)
    }
}

/// `CNI_ARGS` and capabilities of a network of others, and the arguments of its first plugin.
fn theirs(network: &Network) -> (&str, Value, Value) {
    let By::Plugins { chain, args, capabilities } = &network.by else { panic!("{network:?}") };
    (args, json!(capabilities), json!(chain)["plugins"][0]["args"]["cni"].clone())
}

fn ours(network: &Network) -> &Value {
    let By::Own(conf) = &network.by else { panic!("{network:?}") };
    conf
}

#[test]
fn an_author_of_pods_adds_no_arguments_to_those_of_the_runtime() {
    let selecting = Selecting::new();
    for (definition, wish, says) in [
        ("mute", json!({ "ips": ["10.61.0.7/24;POOLS=reserved"] }), "ips[0]: \"10.61.0.7/24;POOLS=reserved\""),
        ("mute", json!({ "ips": ["10.61.0.7", "fe80::1%eth0"] }), "ips[1]: \"fe80::1%eth0\""),
        ("mute", json!({ "ips": ["10.61.0.7/33"] }), "ips[0]: \"10.61.0.7/33\""),
        ("mute", json!({ "ips": [""] }), "ips[0]: \"\""),
        ("mute", json!({ "mac": "02:00:00:00:00:01;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=x" }), "[0].mac: "),
        ("mute", json!({ "mac": "ff:ff:ff:ff:ff:ff" }), "[0].mac: "),
        // Also where they go by capabilities.
        ("pooled", json!({ "ips": ["10.61.0.7;X=1"] }), "ips[0]: \"10.61.0.7;X=1\""),
        ("own", json!({ "ips": ["10.61.0.7;X=1"] }), "ips[0]: \"10.61.0.7;X=1\""),
        ("own", json!({ "mac": "x" }), "[0].mac: "),
    ] {
        let mut element = wish.clone();
        element["name"] = json!(definition);
        let error = selecting.asking(&json!([element])).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidConfig, "{error}");
        assert!(error.message.contains(says), "{wish}: {error}");
    }
    let wish = json!([{ "name": "mute", "ips": ["2001:DB8:61:0::7/64", "10.61.0.7"], "mac": "02:00:00:00:00:AA" }]);
    let network = selecting.asked(&wish);
    let (args, capabilities, _) = theirs(&network);
    let expected = "IP=2001:db8:61::7/64,10.61.0.7;IgnoreUnknown=1;K8S_POD_NAME=web;K8S_POD_NAMESPACE=shop;\
                    MAC=02:00:00:00:00:aa";
    assert_eq!(args, expected, "as the types write them, and without the pools, which are of the default network");
    assert_eq!(capabilities, json!({ "ips": ["2001:db8:61::7/64", "10.61.0.7"], "mac": "02:00:00:00:00:aa" }));
}

#[test]
fn labels_are_the_runtimes_and_pools_no_pods() {
    let mut selecting = Selecting::new();
    let labels = json!([{ "key": "app", "value": "web" }]);
    selecting.conf["args"] = json!({ "cni": { "labels": labels, "ips": ["10.1.0.9"], "other": true } });
    for (definition, key, value, refused) in [
        ("own", "labels", json!([{ "key": "app", "value": "bank" }]), true),
        ("own", "pools", json!(["reserved"]), true),
        ("pooled", "labels", json!([]), true),
        ("pooled", "pools", json!(["reserved"]), true),
        ("mute", "labels", json!([]), true),
        // What it means to a plugin of others is theirs to know.
        ("mute", "pools", json!(["reserved"]), false),
        ("own", "x", json!(1), false),
    ] {
        let asked = selecting.asking(&json!([{ "name": definition, "cni-args": { key: value } }]));
        match asked {
            Err(error) => assert!(refused && error.message.contains(&format!("cni-args.{key} of shop/{definition}"))),
            Ok(_) => assert!(!refused, "{definition} {key}"),
        }
    }
    // A definition's own labels, which the operator wrote, do not hide the runtime's.
    let forged =
        json!({ "type": "dcenet", "link": { "kind": "veth" }, "args": { "cni": { "labels": [], "pools": ["p"] } } });
    selecting.define("own", &forged);
    let networks = selecting.asking(&json!("own, mute")).unwrap();
    assert_eq!(ours(&networks[2])["args"]["cni"], json!({ "labels": labels, "pools": ["p"] }));
    // All of the runtime's arguments are meant for the default network, and the labels for each.
    let (_, _, default) = theirs(&networks[0]);
    assert_eq!(default, json!({ "labels": labels, "ips": ["10.1.0.9"], "other": true, "kept": 1 }));
    assert_eq!(ours(&networks[1])["args"]["cni"], json!({ "labels": labels }));
    assert_eq!(theirs(&networks[3]).2, json!({ "labels": labels }));
}

#[test]
fn the_nodes_pools_of_functions_are_those_of_every_network() {
    let mut selecting = Selecting::new();
    let (of_node, of_one) = (json!({ "poolsFile": "/etc/dcenet/pools.json" }), json!({ "pools": [] }));
    selecting.conf["sriov"] = of_node.clone();
    // The kubelet's choice, as meta plugins write it into the network's configuration.
    let device = "0000:3b:02.1";
    let fast = json!({ "type": "dcenet", "link": { "kind": "sriov", "pool": "fast" }, "deviceID": device });
    selecting.define("fast", &fast);
    let other = json!({ "type": "dcenet", "link": { "kind": "sriov", "pool": "fast" }, "sriov": of_one });
    selecting.define("other", &other);
    let networks = selecting.asking(&json!("fast, other")).unwrap();
    assert_eq!(ours(&networks[1])["sriov"], of_node);
    assert_eq!(ours(&networks[2])["sriov"], of_node);
    assert_eq!(ours(&networks[2])["deviceID"], device);
    assert_eq!(ours(&networks[3])["sriov"], of_one);
}

#[test]
fn files_hold_what_kubectl_writes_and_other_objects_beside() {
    let selecting = Selecting::new();
    let definition = |name: &str| {
        json!({ "apiVersion": "k8s.cni.cncf.io/v1", "kind": "NetworkAttachmentDefinition",
            "metadata": { "name": name, "namespace": "shop", "uid": "1" },
            "spec": { "config": "{\"cniVersion\": \"1.0.0\", \"type\": \"theirs\"}" } })
    };
    let list = json!({ "apiVersion": "v1", "kind": "List", "metadata": { "resourceVersion": "" }, "items": [
        definition("listed"), { "kind": "Job", "metadata": { "generateName": "x-" }, "spec": { "config": { "a": 1 } } },
    ] });
    selecting.write("list.json", &list.to_string());
    let nameless = json!({ "kind": "NetworkAttachmentDefinition", "metadata": { "namespace": "shop" } });
    selecting.write("nameless.json", &nameless.to_string());
    assert_eq!(selecting.asked(&json!("listed")).label, "shop/listed");
    let error = selecting.asking(&json!("nonesuch")).unwrap_err();
    assert!(
        error.message.contains("nameless.json: NetworkAttachmentDefinition.metadata: missing field `name`"),
        "{error}"
    );
    assert!(!error.message.contains("list.json: "), "{error}");
    #[cfg(feature = "yaml")]
    {
        let yaml = format!(
            "kind: Job\nmetadata:\n  generateName: x-\nspec:\n  config: {{a: 1}}\n---\n\
             apiVersion: v1\nkind: List\nmetadata:\n  resourceVersion: \"\"\nitems:\n- kind: NetworkAttachmentDefinition\n  \
             metadata: {{name: block, namespace: shop}}\n  spec:\n    config: |\n      {}\n",
            json!({ "cniVersion": "1.0.0", "type": "theirs" })
        );
        selecting.write("all.yaml", &yaml);
        assert_eq!(selecting.asked(&json!("block")).label, "shop/block");
    }
}

#[test]
fn absent_and_newer_fields_of_the_annotation_ask_for_nothing() {
    let selecting = Selecting::new();
    let plain = selecting.asked(&json!([{ "name": "mute" }]));
    for element in [
        json!({ "name": "mute", "ips": null, "mac": null, "default-route": null, "cni-args": null, "interface": null }),
        json!({ "name": "mute", "ips": [], "mac": "" }),
        json!({ "name": "mute", "ipam-claim-reference": "web.storage" }),
    ] {
        assert_eq!(selecting.asked(&json!([element])), plain, "{element}");
    }
    let error = selecting.asking(&json!([{ "name": "mute", "interfce": "x" }])).unwrap_err();
    assert!(error.message.contains("did you mean `interface`"), "{error}");
}
