//! Two nodes that share a store, a router between them, and daemons that make their pods reach each other.

use std::fs;
use std::time::Duration;

use dcenet_core::test_support::{HostState, Rung, TestHost, ping, require, tcp_echo};
use rustix::process::Signal;
use serde_json::json;

use crate::common::{Daemon, Flood, Node, PATIENCE, Pod, eventually};

/// Nodes `n0` and `n1`, each on a segment of its own.
struct Cluster {
    router: TestHost,
    nodes: [Node; 2],
    before: [HostState; 2],
}

impl Cluster {
    fn new() -> Self {
        let router = TestHost::new();
        router.root().sysctl("ipv4/ip_forward", "1");
        let state = router.directory().join("shared");
        fs::create_dir(&state).unwrap();
        let nodes = [0, 1].map(|n| {
            let mut node = Node::new();
            let root = node.host.root();
            router.root().sh(&format!(
                "ip link add p{n} type veth peer name up0; ip link set up0 netns {}; ip link set p{n} up; \
                 ip addr add 192.0.{n}.254/24 dev p{n}",
                root.path().display()
            ));
            root.sysctl("ipv6/conf/up0/disable_ipv6", "1");
            root.sh(&format!(
                "ip link set up0 up; ip addr add 192.0.{n}.1/24 dev up0; ip route add default via 192.0.{n}.254"
            ));
            let ipam = json!({
                "node": { "name": format!("n{n}") },
                "pools": [{ "name": "v4", "subnet": "10.20.0.0/24", "mtu": 1450, "block": { "size": 64 } }],
            });
            for config in [&mut node.config, &mut node.network] {
                config["ipam"] = ipam.clone();
                config["stateDir"] = json!(state);
            }
            node.config["fabric"] = json!({});
            node.network["link"] = json!({ "kind": "veth" });
            node
        });
        let before = [0, 1].map(|n: usize| nodes[n].host.state());
        Self { router, nodes, before }
    }
}

fn reach(from: &Pod, to: &Pod) -> bool {
    ping(&from.netns, to.address, Duration::from_millis(500)).is_ok()
}

#[test]
fn pods_of_two_nodes_talk_through_a_restart_and_until_a_node_is_forgotten() {
    if !require(Rung::Netns) {
        return;
    }
    let cluster = Cluster::new();
    let [one, two] = &cluster.nodes;
    let [first, second]: [Daemon; 2] = [one.start(), two.start()];
    let (a, b) = (one.add("shop", "web"), two.add("shop", "db"));
    eventually("an answer of the other node's pod", || reach(&a, &b));
    tcp_echo(&a.netns, &b.netns, b.address, PATIENCE).unwrap();
    let samples = one.samples();
    assert_eq!((samples["dcenet_fabric_mtu_bytes"], samples["dcenet_fabric_problems"]), (1450.0, 0.0));
    assert_eq!(samples["dcenet_fabric_routes_wanted"], 3.0, "its own block, the other's, and the pool");
    assert_eq!(samples["dcenet_fabric_routes_installed"], 3.0);

    // Over a network that lets only the nodes' own addresses through, a node itself is answered, too: through VXLAN.
    cluster.router.root().sh("ip rule add from 10.20.0.0/24 blackhole");
    let node_reaches = || ping(one.host.root(), b.address, Duration::from_millis(500)).is_ok();
    eventually("an answer to the node itself", node_reaches);
    let inside = one.host.root().sh("ip -4 -o addr show dev dcvx0 | grep -o '10.20.0.[0-9]*/32'");
    // Its twin: without the address, with which the kernel takes the routes away, there is none. The daemon hears of it.
    first.send(Signal::STOP);
    one.host.root().sh(&format!("ip addr del {} dev dcvx0", inside.trim()));
    assert!(!node_reaches());
    first.send(Signal::CONT);
    eventually("the address is there again", node_reaches);

    // Killed and started anew, it loses no packet and changes nothing.
    let routed = one.host.state();
    let flood = Flood::start(&a, &b, 4000);
    std::thread::sleep(Duration::from_millis(300));
    first.kill();
    std::thread::sleep(Duration::from_millis(300));
    let first = one.start();
    eventually("the new daemon has looked", || one.samples()["dcenet_fabric_routes_installed"] == 3.0);
    let (sent, received) = flood.stop();
    assert!(sent > 50 && sent == received, "{received} of {sent} arrived");
    assert_eq!(routed.diff(&one.host.state()), "");

    // Its twin: without the route they are lost. The daemon hears of it, and enters it again.
    second.kill();
    two.host.root().sh("ip route del $(ip route show proto 221 | grep -o '10.20.0.[0-9]*/26 via' | cut -d' ' -f1)");
    assert!(!reach(&b, &a));
    let second = two.start();
    eventually("the route is there again", || reach(&b, &a));
    two.host.root().sh("ip route del $(ip route show proto 221 | grep -o '10.20.0.[0-9]*/26 via' | cut -d' ' -f1)");
    eventually("it is entered by who hears of it", || reach(&b, &a));

    // A node that dies keeps its routes. When its pod is gone and it is forgotten, they go.
    second.kill();
    assert!(reach(&a, &b));
    two.call(&crate::common::Plugin, "DEL", "db", Some(b.netns.path()), &two.network).unwrap();
    let ended = two.run("--uninstall");
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(cluster.before[1].diff(&two.host.state()), "");
    eventually("the other's block leads nowhere", || {
        let found = one.host.root().sh("ip route show proto 221");
        !found.contains(" via ") && found.contains("unreachable 10.20.0.0/24")
    });
    one.call(&crate::common::Plugin, "DEL", "web", Some(a.netns.path()), &one.network).unwrap();
    assert_eq!(first.stop().code(), Some(0));
    assert!(one.run("--uninstall").status.success());
    assert_eq!(cluster.before[0].diff(&one.host.state()), "");
}

#[test]
fn a_node_is_taken_out_while_its_store_is_gone_and_told_of_later() {
    if !require(Rung::Netns) {
        return;
    }
    let cluster = Cluster::new();
    let [one, two] = &cluster.nodes;
    let [first, second] = [one.start(), two.start()];
    two.add("shop", "db");
    eventually("the other's block is known", || one.samples()["dcenet_fabric_routes_installed"] >= 2.0);
    assert_eq!(first.stop().code(), Some(0));
    assert_ne!(cluster.before[0].diff(&one.host.state()), "");
    let shared = cluster.router.directory().join("shared");
    assert_eq!(second.stop().code(), Some(0));
    fs::rename(shared.join("ipam"), shared.join("away")).unwrap();
    fs::write(shared.join("ipam"), "no directory").unwrap();
    let ended = one.run("--uninstall");
    let told = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{told}");
    assert!(told.contains("the host is clean, but the other nodes have not been told: "), "{told}");
    assert_eq!(cluster.before[0].diff(&one.host.state()), "");
    fs::remove_file(shared.join("ipam")).unwrap();
    fs::rename(shared.join("away"), shared.join("ipam")).unwrap();
    let ended = one.run("--uninstall");
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn a_pool_whose_packets_do_not_fit_is_refused_with_the_number_that_does() {
    if !require(Rung::Netns) {
        return;
    }
    let mut cluster = Cluster::new();
    let apps = json!({ "name": "apps", "subnet": "10.21.0.0/24", "mtu": 1500, "block": { "size": 16, "owner": "application" } });
    cluster.nodes[0].config["ipam"]["pools"].as_array_mut().unwrap().push(apps);
    assert_eq!(cluster.nodes[0].start().stop().code(), Some(0), "blocks of applications are not routed");
    cluster.nodes[0].config["ipam"]["pools"][0]["mtu"] = json!(1500);
    let ended = cluster.nodes[0].run("--uninstall");
    assert!(ended.status.success(), "what is refused at the start can be removed: {ended:?}");
    let path = cluster.nodes[0].config_file();
    let run = || crate::common::dcenetd().arg("--config").arg(path).output();
    let ended = cluster.nodes[0].host.root().run(run).unwrap();
    let told = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{told}");
    assert!(told.contains("ipam.pools[0].mtu: 1500 does not fit") && told.contains("write 1450 or less"), "{told}");
}
