//! Limits on what pods send and receive, measured by real traffic and read back by tc(8).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestNetNs, effort, require, tcp_echo};
use serde_json::{Value, json};

use crate::common::{Node, Pod};

/// Bits per second, low enough for any machine to reach, and bits at once.
const RATE: u64 = 8_000_000;
const BURST: u64 = 512_000;

fn limits() -> Value {
    json!({ "ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE, "egressBurst": BURST })
}

/// Sends for a while from one namespace to an address of another, and returns the bits that arrived in a second.
fn measured(from: &TestNetNs, to: &TestNetNs, address: &str) -> f64 {
    let listener = to.run(|| TcpListener::bind(SocketAddr::new(address.parse().unwrap(), 0)).unwrap());
    let at = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = from.run(|| TcpStream::connect(at).unwrap());
            stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
            let (begun, chunk) = (Instant::now(), vec![0; 1 << 16]);
            while begun.elapsed() < Duration::from_millis(1500) {
                stream.write_all(&chunk).unwrap();
            }
        });
        let (mut stream, _) = listener.accept().unwrap();
        let (begun, mut bytes, mut chunk) = (Instant::now(), 0, vec![0; 1 << 16]);
        while let Ok(some @ 1..) = stream.read(&mut chunk) {
            bytes += some;
        }
        // What passes at once is allowed in whatever time.
        (bytes as f64 * 8.0 - BURST as f64) / begun.elapsed().as_secs_f64()
    })
}

/// What the pod sends to the host, and what it receives.
fn both_ways(node: &Node, pod: &Pod, host: &str, own: &str) -> [f64; 2] {
    [measured(&pod.netns, node.host.root(), host), measured(node.host.root(), &pod.netns, own)]
}

fn shapers(node: &Node) -> String {
    node.host.root().sh("tc qdisc show; ip -o link show type ifb")
}

#[test]
fn a_limited_pod_is_no_faster_and_an_unlimited_one_is() {
    if !require(Rung::Netns) {
        return;
    }
    let links = [json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true }), json!({ "kind": "veth" })];
    for link in links.into_iter().take(effort(1, 2, 2)) {
        let mut node = Node::new();
        node.host
            .root()
            .sh("ip link add up0 type veth peer name up1; ip link set up0 up; ip addr add 192.0.2.1/32 dev up0");
        node.config["link"] = link.clone();
        node.warm();
        let before = node.host.state();
        let pod = node.pod("web");
        let own = "10.20.0.3";
        node.add(&pod).unwrap();
        for seen in both_ways(&node, &pod, "192.0.2.1", own) {
            assert!(seen > RATE as f64 * 1.2, "without a limit: {seen} bit/s over {link}");
        }
        node.del(&pod).unwrap();

        // As the conventions have it, and as part of the configuration.
        for by_runtime in [true, false] {
            let pod = node.pod(if by_runtime { "asked" } else { "told" });
            match by_runtime {
                true => node.config["runtimeConfig"] = json!({ "bandwidth": limits(), "ips": [own] }),
                false => {
                    node.config["runtimeConfig"] = json!({ "ips": [own] });
                    node.config["link"]["bandwidth"] = limits();
                }
            }
            let result = node.add(&pod).unwrap();
            for seen in both_ways(&node, &pod, "192.0.2.1", own) {
                assert!(seen < RATE as f64 * 1.2, "with a limit: {seen} bit/s over {link}");
                assert!(seen > RATE as f64 * 0.1, "hardly anything passes: {seen} bit/s over {link}");
            }
            let listed = shapers(&node);
            assert_eq!(listed.matches("tbf dce: ").count(), 2, "{listed}");
            assert_eq!(listed.matches("rate 8Mbit burst 64000b").count(), 2, "{listed}");
            assert_eq!(node.add(&pod).unwrap(), result);
            node.check(&pod, &result).unwrap();
            node.del(&pod).unwrap();
            assert_eq!(before.diff(&node.host.state()), "");
            assert!(!shapers(&node).contains("ifb"), "{}", shapers(&node));
        }
    }
}

#[test]
fn what_policy_denies_stays_denied_and_what_it_allows_is_limited() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    node.host
        .root()
        .sh("ip link add up0 type veth peer name up1; ip link set up0 up; ip addr add 192.0.2.1/32 dev up0");
    node.warm();
    let (before, policy) = (node.host.state(), node.policy());
    let unlimited = node.pod("server");
    let to = node.add(&unlimited).unwrap()["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
    node.config["runtimeConfig"] = json!({ "bandwidth": limits() });
    let pod = node.pod("web");
    let result = node.add(&pod).unwrap();
    let seen = measured(&pod.netns, &unlimited.netns, &to);
    assert!(seen < RATE as f64 * 1.2 && seen > RATE as f64 * 0.1, "{seen} bit/s");
    let short = Duration::from_millis(700);
    tcp_echo(&pod.netns, node.host.root(), "192.0.2.1".parse().unwrap(), short).unwrap_err();
    node.check(&pod, &result).unwrap();
    node.del(&pod).unwrap();
    node.config.as_object_mut().unwrap().remove("runtimeConfig");
    node.del(&unlimited).unwrap();
    assert_eq!(before.diff(&node.host.state()), "");
    assert_eq!(node.policy(), policy);
}

#[test]
fn what_is_changed_of_limits_is_told() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.config["link"]["bandwidth"] = limits();
    let pod = node.pod("web");
    let result = node.add(&pod).unwrap();
    let names: Vec<String> = node
        .host
        .root()
        .sh("ip -o link show | cut -d: -f2 | cut -d@ -f1 | tr -d ' '")
        .lines()
        .filter(|name| name.len() == 15)
        .map(str::to_owned)
        .collect();
    let [end, ifb] = ["dc", "db"].map(|word| names.iter().find(|name| name.starts_with(word)).unwrap().clone());
    let changes = [
        (
            format!("tc qdisc change dev {end} root handle dce: tbf rate 9mbit burst 64000 limit 90000"),
            "limit was changed",
        ),
        (format!("tc qdisc del dev {end} root"), "limit was changed"),
        (format!("tc filter del dev {end} ingress"), "goes past its bandwidth limit"),
        (format!("ip link del {ifb}"), "is missing"),
    ];
    for (change, told) in changes {
        node.host.root().sh(&change);
        let error = node.check(&pod, &result).unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains(told), "{change}: {error}");
    }
    node.del(&pod).unwrap();
    assert!(!shapers(&node).contains("tbf"), "{}", shapers(&node));
}

#[test]
fn a_device_of_a_lost_record_goes_with_its_shaper() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.warm();
    let before = node.host.state();
    node.config["link"]["bandwidth"] = limits();
    let pod = node.pod("web");
    node.add(&pod).unwrap();
    std::fs::remove_dir_all(node.config["runDir"].as_str().unwrap()).unwrap();
    node.del(&pod).unwrap();
    assert_eq!(before.diff(&node.host.state()), "");
}

#[test]
fn limits_that_cannot_be_are_refused_and_change_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    let before = node.host.state();
    let pod = node.pod("web");
    for (bandwidth, words) in [
        (json!({ "ingressRate": 1000 }), ["runtimeConfig.bandwidth", "without ingressBurst"]),
        (json!({ "egressRate": 1_000_000, "egressBurst": 8000 }), ["bandwidth.egressBurst", "at least 12112"]),
    ] {
        node.config["runtimeConfig"] = json!({ "bandwidth": bandwidth });
        let error = node.add(&pod).unwrap_err();
        assert!(words.iter().all(|word| error["msg"].as_str().unwrap().contains(word)), "{error}");
        assert_eq!(error["code"], 7);
    }
    node.config["runtimeConfig"] = json!({ "bandwidth": limits() });
    node.config["link"] = json!({ "kind": "macvlan", "parent": "up0" });
    let error = node.add(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("do not pass the host"), "{error}");
    assert_eq!(before.diff(&node.host.state()), "");
}
