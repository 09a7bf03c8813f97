//! A node whose default route a router advertises (RFC 4861, section 4.2).

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::{Duration, Instant};

use dcenet_core::fabric::{Fabric, FabricConfig, Mode};
use dcenet_core::provider::FabricTable;
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, require};
use socket2::{Domain, Protocol, Socket, Type};

/// All nodes of a link are told that the sender is a router for half an hour.
fn advertise(router: &TestNetNs, link: &str) {
    let index = router.link(link).unwrap().index.get();
    router.run(|| {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
        // Who takes one of another hop limit might take one of another link.
        socket.set_multicast_hops_v6(255).unwrap();
        let mut message = [0; 16];
        (message[0], message[4]) = (134, 64);
        message[6..8].copy_from_slice(&1800u16.to_be_bytes());
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        socket.send_to(&message, &SocketAddrV6::new(all_nodes, 0, 0, index).into()).unwrap();
    });
}

fn has_route(node: &TestNetNs) -> bool {
    node.sh("ip -6 route show default proto ra").contains("via fe80")
}

fn learn(router: &TestNetNs, node: &TestNetNs) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !has_route(node) {
        assert!(Instant::now() < limit, "{}", node.sh("ip -6 addr; ip -6 route"));
        advertise(router, "p0");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_node_that_forwards_keeps_the_routes_that_it_was_told() {
    if !require(Rung::Netns) {
        return;
    }
    let (router, node) = (TestHost::new(), TestHost::new());
    let (there, here) = (router.root(), node.root());
    there.sh(&format!("ip link add p0 type veth peer name up0 netns {}", here.path().display()));
    for (end, link) in [(there, "p0"), (here, "up0")] {
        end.sysctl(&format!("ipv6/conf/{link}/accept_dad"), "0");
        end.sh(&format!("ip link set {link} up"));
    }
    here.sh("ip addr add 192.0.2.1/24 dev up0");
    learn(there, here);
    let before = node.state();
    let addresses = vec!["192.0.2.1".parse().unwrap()];
    let config = FabricConfig { mode: Mode::Route, addresses, ..FabricConfig::default() };
    let fabric = Fabric::new(node.host(), config, "n1", &node.run_dir()).unwrap();
    let table = FabricTable { pools: ["fd20::/64".parse().unwrap()].into(), ..FabricTable::default() };
    let local = fabric.local().unwrap();
    let setting = |name: &str| here.sh(&format!("cat /proc/sys/net/ipv6/conf/{name}")).trim().to_owned();

    assert_eq!(fabric.apply(&local, &table).unwrap().failures, [""; 0]);
    assert_eq!((setting("all/forwarding"), setting("up0/accept_ra")), ("1".into(), "2".into()));
    assert!(has_route(here), "{}", here.sh("ip -6 route"));
    here.sh("ip -6 route del default");
    learn(there, here);
    assert_eq!(fabric.apply(&local, &table).unwrap().changed, 0);
    fabric.remove().unwrap();
    assert_eq!((setting("all/forwarding"), setting("up0/accept_ra")), ("0".into(), "1".into()));
    assert_eq!(before.diff(&node.state()), "");

    // Its twin: who forwards without it has no way out at once.
    assert!(has_route(here));
    here.sysctl("ipv6/conf/all/forwarding", "1");
    assert!(!has_route(here), "{}", here.sh("ip -6 route"));

    // Before the first has come, as while a host boots.
    here.sysctl("ipv6/conf/all/forwarding", "0");
    assert_eq!(fabric.apply(&local, &table).unwrap().failures, [""; 0]);
    learn(there, here);
    fabric.remove().unwrap();
}
