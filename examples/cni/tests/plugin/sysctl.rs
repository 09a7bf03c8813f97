//! Settings of the pod's namespace, and what the node allows of them.

use std::process::Command;

use dcenet_core::test_support::{Rung, require};
use serde_json::{Value, json};

use super::common::{Node, Pod, Running};

/// Runs ADD with this as the node's allow-list, seen by nobody else: in a mount namespace of its own.
fn add_where_allowed(node: &Node, pod: &Pod, list: &str) -> Result<Value, Value> {
    let file = node.host.directory().join("allowlist.conf");
    std::fs::write(&file, list).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec"]);
    command.arg("mount -t tmpfs none /etc; mkdir -p /etc/cni/tuning; cp \"$0\" /etc/cni/tuning/; exec \"$1\"");
    command.arg(&file).arg(env!("CARGO_BIN_EXE_dcenet"));
    command.env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", &pod.container).env("CNI_IFNAME", "eth0");
    command.env("CNI_NETNS", pod.netns.path()).env("CNI_ARGS", pod.args());
    let config = node.config.to_string();
    node.host.root().run(|| Running::start(command, &config).wait()).expect("nobody kills it")
}

#[test]
fn a_pod_has_the_settings_that_the_node_allows() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.warm();
    node.config["link"]["sysctl"] = json!({ "net.core.somaxconn": "77", "net.ipv4.conf.IFNAME.rp_filter": "2", "net.ipv4.conf.all.log_martians": "1" });
    let (pod, before) = (node.pod("web"), node.host.state());
    let of_pod = pod.state();
    for (list, refused) in [
        ("", "net.core.somaxconn"),
        ("^net.core.somaxconn$\n^net\\.ipv4\\.conf\\.IFNAME\\.[a-z_]*$", "net.ipv4.conf.all.log_martians"),
        ("^net.ipv4\n^net.core.somaxconn_$", "net.core.somaxconn"),
    ] {
        let error = add_where_allowed(&node, &pod, list).unwrap_err();
        assert_eq!(error["code"], 7, "{error}");
        let text = error["msg"].as_str().unwrap();
        assert!(text.contains(&format!("link.sysctl {refused:?}")) && text.contains("allowlist.conf"), "{text}");
        assert_eq!((before.diff(&node.host.state()), of_pod.diff(&pod.state())), Default::default());
        assert_eq!(node.host.records(), [""; 0]);
    }
    let error = add_where_allowed(&node, &pod, "(").unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("line 1"), "{error}");

    let result = add_where_allowed(&node, &pod, "# ours\n^net\\.core\\.somaxconn$\n^net\\.ipv4\\.conf\\.").unwrap();
    let is =
        || pod.netns.sh("sysctl -n net.core.somaxconn net.ipv4.conf.eth0.rp_filter net.ipv4.conf.all.log_martians");
    assert_eq!(is(), "77\n2\n1\n");
    node.check(&pod, &result).unwrap();
    pod.netns.sh("sysctl -qw net.core.somaxconn=78");
    let error = node.check(&pod, &result).unwrap_err();
    assert_eq!(error["code"], 120);
    assert!(error["msg"].as_str().unwrap().contains("net.core.somaxconn is \"78\""), "{error}");
    node.del(&pod).unwrap();
    assert_eq!(of_pod.diff(&pod.state()), "");
    node.del(&pod).unwrap();

    node.config["link"]["sysctl"] = json!({ "kernel.hostname": "x" });
    let error = node.add(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().starts_with("link.sysctl: \"kernel.hostname\" is no setting"), "{error}");
    node.config["link"]["sysctl"] = json!({ "net.core.somaxconn": "many" });
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("net.core.somaxconn cannot be set to \"many\""), "{error}");
}
