//! The plugin behind Debian's bridge, ptp and macvlan in a list.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dcenet_core::test_support::{Rung, TestNetNs, require, require_with, tcp_echo};
use serde_json::{Value, json};

use super::common::{Node, Pod, Running, elements, has_nft};

fn has_debians(plugin: &str) -> bool {
    require_with(Rung::Services, || {
        let path = Path::new("/usr/lib/cni").join(plugin);
        (!path.exists()).then(|| format!("{} is missing: install containernetworking-plugins", path.display()))
    })
}

/// A list of their plugin and ours.
struct List {
    node: Node,
    first: Value,
}

impl List {
    /// `node.config` becomes that of our plugin, behind theirs.
    fn new(mut node: Node, mut first: Value) -> Self {
        let keys = json!({
            "cniVersion": "1.0.0", "name": "shop",
            "ipam": {
                "type": "host-local", "dataDir": node.host.directory().join("host-local"),
                "ranges": [[{ "subnet": "10.20.0.0/24", "gateway": "10.20.0.1" }]], "routes": [{ "dst": "0.0.0.0/0" }],
            },
        });
        first.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let ours = node.config.as_object_mut().unwrap();
        ours.remove("link");
        ours.remove("ipam");
        ours.insert("cniVersion".to_owned(), json!("1.0.0"));
        Self { node, first }
    }

    fn theirs(&self, verb: &str, pod: &Pod, previous: Option<&Value>) -> Result<Value, Value> {
        let mut command = Command::new(Path::new("/usr/lib/cni").join(self.first["type"].as_str().unwrap()));
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_PATH", "/usr/lib/cni");
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("CNI_CONTAINERID", &pod.container).env("CNI_NETNS", pod.netns.path()).env("CNI_IFNAME", "eth0");
        let config = with_previous(&self.first, previous).to_string();
        self.node.host.root().run(|| Running::start(command, &config).wait()).expect("nobody kills it")
    }

    fn ours(&self, verb: &str, pod: &Pod, previous: Option<&Value>) -> Result<Value, Value> {
        self.node.call(verb, pod, &with_previous(&self.node.config, previous).to_string())
    }

    /// As libcni does: forward, each with the result of the one before.
    fn add(&self, pod: &Pod) -> Value {
        let first = self.theirs("ADD", pod, None).unwrap();
        let last = self.ours("ADD", pod, Some(&first)).unwrap();
        assert_eq!(last, first, "the result is handed on");
        last
    }

    /// Backward.
    fn del(&self, pod: &Pod, previous: Option<&Value>) {
        self.ours("DEL", pod, previous).unwrap();
        self.theirs("DEL", pod, previous).unwrap();
    }
}

fn with_previous(config: &Value, previous: Option<&Value>) -> Value {
    let mut config = config.clone();
    if let Some(previous) = previous {
        config["prevResult"] = previous.clone();
    }
    config
}

fn bridge() -> Value {
    json!({ "type": "bridge", "bridge": "cni0", "isGateway": true })
}

fn ptp() -> Value {
    json!({ "type": "ptp" })
}

/// Long for what must come, short for what must not.
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(700);

fn connects(from: &Pod, to: &Pod, result: &Value, limit: Duration) -> bool {
    let address = result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap();
    tcp_echo(&from.netns, &to.netns, address, limit).is_ok()
}

#[test]
fn pods_of_other_plugins_are_under_policy() {
    if !require(Rung::Kernel) || !has_debians("bridge") {
        return;
    }
    for first in [bridge(), ptp()] {
        let list = List::new(Node::under_policy(), first);
        let (db, replica, web) = (list.node.pod("db"), list.node.pod("replica"), list.node.pod("web"));
        let result = list.add(&db);
        list.add(&replica);
        // Of no workload that the policy lets in: it is behind their plugin alone.
        list.theirs("ADD", &web, None).unwrap();
        assert!(connects(&replica, &db, &result, LONG));
        assert!(!connects(&web, &db, &result, SHORT));
        let endpoints = || list.node.policy().iter().filter(|l| l.starts_with("endpoint ")).count();
        assert_eq!(endpoints(), 2);
        list.ours("CHECK", &db, Some(&result)).unwrap();
        // The twin: with the classifiers gone all are let in, and CHECK tells.
        let interfaces = result["interfaces"].as_array().unwrap();
        let outside = interfaces.iter().filter(|i| i.get("sandbox").is_none_or(|s| s == ""));
        let device = outside.map(|i| i["name"].as_str().unwrap()).find(|name| *name != "cni0").unwrap();
        list.node.host.root().sh(&format!("tc qdisc del dev {device} clsact"));
        assert!(connects(&web, &db, &result, LONG));
        let error = list.ours("CHECK", &db, Some(&result)).unwrap_err();
        assert_eq!(error["code"], 120, "{error}");
        // With and without the result, and once more when all is gone.
        list.del(&db, Some(&result));
        list.del(&replica, None);
        list.del(&replica, None);
        assert_eq!(list.node.host.records(), [""; 0]);
        assert_eq!(endpoints(), 0);
    }
}

#[test]
fn policy_goes_when_the_list_asks_for_it_no_more_and_comes_back() {
    if !require(Rung::Kernel) || !has_debians("bridge") {
        return;
    }
    let mut list = List::new(Node::under_policy(), bridge());
    let (db, web) = (list.node.pod("db"), list.node.pod("web"));
    let result = list.add(&db);
    list.theirs("ADD", &web, None).unwrap();
    let asks = list.node.config.clone();
    let mut asks_not = asks.clone();
    asks_not.as_object_mut().unwrap().remove("policy");
    let endpoints = |list: &List| list.node.policy().iter().filter(|l| l.starts_with("endpoint ")).count();
    let programs = |list: &List| {
        let filters = "for d in $(ip -o link show type veth | cut -d' ' -f2 | \
                       cut -d@ -f1); do tc filter show dev $d ingress; tc filter show dev $d egress; done";
        list.node.host.root().sh(filters).matches(" bpf ").count()
    };
    assert!(programs(&list) > 0);
    for _ in 0..2 {
        assert!(!connects(&web, &db, &result, SHORT));
        // Twice, for a runtime may not have heard the answer.
        list.node.config = asks_not.clone();
        for _ in 0..2 {
            assert_eq!(list.ours("ADD", &db, Some(&result)).unwrap(), result);
        }
        assert_eq!((endpoints(&list), programs(&list)), (0, 0));
        assert!(connects(&web, &db, &result, LONG));
        list.ours("CHECK", &db, Some(&result)).unwrap();
        list.node.config = asks.clone();
        assert_eq!(list.ours("ADD", &db, Some(&result)).unwrap(), result);
        assert_eq!(endpoints(&list), 1);
        list.ours("CHECK", &db, Some(&result)).unwrap();
    }
    assert!(!connects(&web, &db, &result, SHORT));
    // The section is gone before the pod is.
    list.node.config = asks_not;
    list.del(&db, Some(&result));
    assert_eq!((endpoints(&list), list.node.host.records()), (0, Vec::new()));
}

fn call(netns: &TestNetNs, to: &str) {
    let to: SocketAddr = to.parse().unwrap();
    netns.run(|| TcpStream::connect_timeout(&to, LONG)).unwrap_or_else(|e| panic!("{to}: {e}"));
}

#[test]
fn ports_lead_to_pods_of_other_plugins() {
    if !has_nft() || !has_debians("bridge") {
        return;
    }
    for first in [bridge(), ptp()] {
        let mut list = List::new(Node::new(), first);
        list.node.config["nat"] = json!({ "masquerade": true });
        list.node.config["runtimeConfig"] =
            json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
        let pod = list.node.pod("web");
        let result = list.add(&pod);
        assert!(!elements(&list.node).is_empty());
        let listener = pod.netns.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
        call(list.node.host.root(), "127.0.0.1:8080");
        call(&pod.netns, "10.20.0.1:8080");
        drop(listener);
        list.ours("CHECK", &pod, Some(&result)).unwrap();
        // A repeated ADD is the same; a second pod cannot have the port.
        assert_eq!(list.ours("ADD", &pod, Some(&result)).unwrap(), result);
        // With another port it has that, and the one before no more.
        list.node.config["runtimeConfig"]["portMappings"][0]["hostPort"] = json!(8081);
        assert_eq!(list.ours("ADD", &pod, Some(&result)).unwrap(), result);
        let listed = elements(&list.node).join("\n");
        assert!(listed.contains("8081") && !listed.contains("8080"), "{listed}");
        list.ours("CHECK", &pod, Some(&result)).unwrap();
        let rival = list.node.pod("rival");
        let first = list.theirs("ADD", &rival, None).unwrap();
        assert_eq!(list.ours("ADD", &rival, Some(&first)).unwrap_err()["code"], 112);
        list.del(&rival, None);
        list.del(&pod, None);
        assert_eq!(elements(&list.node), [""; 0]);
        assert_eq!(list.node.host.records(), [""; 0]);
    }
}

/// Whoever asks for what cannot be had keeps what he has: policy, and ports.
#[test]
fn a_repeated_add_that_fails_changes_nothing() {
    if !require(Rung::Kernel) || !has_nft() || !has_debians("bridge") {
        return;
    }
    let mut list = List::new(Node::under_policy(), bridge());
    let (db, web, rival) = (list.node.pod("db"), list.node.pod("web"), list.node.pod("rival"));
    let with_port = |config: &Value, port: u16| {
        let mut config = config.clone();
        config["runtimeConfig"] = json!({ "portMappings": [{ "hostPort": port, "containerPort": 80 }] });
        config
    };
    let policy = list.node.config.clone();
    let mut open = policy.clone();
    open.as_object_mut().unwrap().remove("policy");
    list.node.config = with_port(&open, 8081);
    list.add(&rival);
    list.node.config = with_port(&policy, 8080);
    let result = list.add(&db);
    list.theirs("ADD", &web, None).unwrap();
    let endpoints = |list: &List| list.node.policy().iter().filter(|l| l.starts_with("endpoint ")).count();

    for (had, wanted) in [(&policy, &open), (&open, &open)] {
        list.node.config = with_port(had, 8080);
        assert_eq!(list.ours("ADD", &db, Some(&result)).unwrap(), result);
        let (translated, under_policy) = (elements(&list.node), endpoints(&list));
        assert_eq!(under_policy, usize::from(had == &policy));
        list.node.config = with_port(wanted, 8081);
        assert_eq!(list.ours("ADD", &db, Some(&result)).unwrap_err()["code"], 112);
        assert_eq!((elements(&list.node), endpoints(&list)), (translated, under_policy));
        list.node.config = with_port(had, 8080);
        list.ours("CHECK", &db, Some(&result)).unwrap();
        assert_eq!(!connects(&web, &db, &result, if under_policy > 0 { SHORT } else { LONG }), under_policy > 0);
    }
    // The twin: what can be had comes in the place of what was there.
    list.node.config = with_port(&open, 8082);
    list.ours("ADD", &db, Some(&result)).unwrap();
    let translated = elements(&list.node).join("\n");
    assert!(translated.contains("8082") && !translated.contains("8080"), "{translated}");
    list.ours("CHECK", &db, Some(&result)).unwrap();
    list.del(&db, Some(&result));
    list.del(&rival, None);
    assert_eq!((elements(&list.node), list.node.host.records()), (Vec::new(), Vec::new()));
}

#[test]
fn gc_and_status_need_no_link_of_ours() {
    if !has_nft() || !has_debians("ptp") {
        return;
    }
    let mut list = List::new(Node::new(), ptp());
    list.node.config["nat"] = json!({ "masquerade": true });
    let (kept, stale) = (list.node.pod("kept"), list.node.pod("stale"));
    list.add(&kept);
    let entered = elements(&list.node);
    list.add(&stale);
    list.node.config["cniVersion"] = json!("1.1.0");
    list.node.status().unwrap();
    list.node.gc(Some(&[&kept])).unwrap();
    assert_eq!(elements(&list.node), entered);
    assert_eq!(list.node.host.records().len(), 1);
    list.node.gc(Some(&[])).unwrap();
    assert_eq!(list.node.host.records(), [""; 0]);
}

#[test]
fn what_does_not_pass_the_host_is_refused_or_handed_on() {
    if !require(Rung::Kernel) || !has_debians("macvlan") {
        return;
    }
    let list = List::new(Node::under_policy(), json!({ "type": "macvlan", "master": "up0" }));
    list.node.host.root().sh("ip link add up0 type veth peer name far0; ip link set up0 up; ip link set far0 up");
    let pod = list.node.pod("db");
    let first = list.theirs("ADD", &pod, None).unwrap();
    let error = list.ours("ADD", &pod, Some(&first)).unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("of another plugin"), "{error}");
    list.ours("DEL", &pod, None).unwrap();
    // Nothing is asked for: nothing is done.
    let mut plain = list.node.config.clone();
    plain.as_object_mut().unwrap().remove("policy");
    let call = |verb: &str| list.node.call(verb, &pod, &with_previous(&plain, Some(&first)).to_string());
    assert_eq!(call("ADD").unwrap(), first);
    call("CHECK").unwrap();
    call("DEL").unwrap();
    // Without a result before it there is nothing to chain to.
    let error = list.node.call("ADD", &pod, &plain.to_string()).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("prevResult"), "{error}");
    list.theirs("DEL", &pod, None).unwrap();
}

/// Indices repeat between namespaces: the host has a device of the same index, whose other end has the same, too.
#[test]
fn a_device_that_leads_to_a_third_namespace_has_no_end_here() {
    if !has_nft() {
        return;
    }
    let mut node = Node::new();
    let third = node.host.new_pod();
    let (pod, other) = (node.pod("web"), node.pod("cache"));
    for (from, name, to) in [(&third, "t0", &pod), (node.host.root(), "h0", &other)] {
        let to = to.netns.path().display().to_string();
        from.sh(&format!("ip link add name {name} index 7777 type veth peer name eth0 index 555 netns {to}"));
    }
    let ours = node.config.as_object_mut().unwrap();
    ours.remove("link");
    ours.remove("ipam");
    node.config["nat"] = json!({ "masquerade": true });
    let add = |pod: &Pod| {
        let interface = json!({ "name": "eth0", "sandbox": pod.netns.path() });
        let result =
            json!({ "cniVersion": "1.1.0", "interfaces": [interface], "ips": [{ "address": "10.20.0.9/24" }] });
        node.call("ADD", pod, &with_previous(&node.config, Some(&result)).to_string())
    };
    let error = add(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("do not pass the host"), "{error}");
    add(&other).unwrap();
    node.del(&other).unwrap();
}
