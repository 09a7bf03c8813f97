//! Attaching and detaching, on a real kernel, with real traffic.

mod common;

use std::time::Duration;

use common::{bridge, key, lease, request, veth};
use dcenet_core::link::LinkConfig;
use dcenet_core::test_support::{HostState, Rung, TestHost, TestNetNs, ping, require, tcp_echo, udp_echo};

const LIMIT: Duration = Duration::from_secs(3);

fn talk(client: &TestNetNs, server: &TestNetNs, addresses: &[&str]) {
    for address in addresses {
        let address = address.parse().unwrap();
        ping(client, address, LIMIT).unwrap_or_else(|e| panic!("ping {address}: {e}"));
        tcp_echo(client, server, address, LIMIT).unwrap_or_else(|e| panic!("tcp {address}: {e}"));
        udp_echo(client, server, address, LIMIT).unwrap_or_else(|e| panic!("udp {address}: {e}"));
    }
}

fn two_pods_talk_and_leave_nothing(config: &LinkConfig) {
    let host = TestHost::new();
    host.root().sysctl("ipv6/conf/all/forwarding", "1");
    let engine = host.engine(None);
    let before = host.state();
    let (a, b) = (host.new_pod(), host.new_pod());
    let empty = HostState::capture(a.netns());
    let first = engine.attach(&request("c1", &a, config, lease(2))).unwrap();
    assert!(!first.repeated);
    engine.attach(&request("c2", &b, config, lease(3))).unwrap();
    assert_eq!(engine.check(&key("c1"), a.netns()).unwrap(), []);
    talk(&a, &b, &["10.20.0.3", "fd20::3"]);
    talk(&b, &a, &["10.20.0.2", "fd20::2"]);
    if matches!(config, LinkConfig::Bridge(_)) {
        talk(&a, host.root(), &["10.20.0.1", "fd20::1"]);
    }
    assert_eq!(host.records().len(), 2);

    let again = engine.attach(&request("c1", &a, config, lease(2))).unwrap();
    assert!(again.repeated);
    assert_eq!(again.interfaces, first.interfaces);

    for container in ["c1", "c2"] {
        engine.detach(&key(container), None).unwrap();
        engine.detach(&key(container), None).unwrap();
    }
    assert_eq!(empty.diff(&HostState::capture(a.netns())), "");
    if let LinkConfig::Bridge(config) = config {
        assert!(engine.remove_idle(&config.bridge).unwrap());
    }
    assert_eq!(before.diff(&host.state()), "");
    assert!(host.records().is_empty());
}

#[test]
fn pods_on_a_bridge_talk_and_leave_nothing() {
    if require(Rung::Netns) {
        two_pods_talk_and_leave_nothing(&bridge());
    }
}

#[test]
fn routed_pods_talk_and_leave_nothing() {
    if require(Rung::Netns) {
        two_pods_talk_and_leave_nothing(&veth());
    }
}
