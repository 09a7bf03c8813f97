//! Attaching and detaching, on a real kernel, with real traffic.

mod common;

use std::time::Duration;

use common::{bridge, key, lease, request, veth};
use dcenet_core::engine::AttachError;
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

#[test]
fn hairpin_mode_is_set_on_the_port() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    for (text, expected) in [("", "hairpin off"), (r#", "hairpinMode": true"#, "hairpin on")] {
        let config = serde_json::from_str(&format!(r#"{{"kind": "bridge", "bridge": "dc0"{text}}}"#)).unwrap();
        engine.attach(&request("c1", &pod, &config, lease(2))).unwrap();
        let port = host.root().sh(&format!("bridge -d link show dev {}", key("c1").id().host_ifname()));
        assert!(port.contains(expected), "{port}");
        engine.detach(&key("c1"), None).unwrap();
    }
}

#[test]
fn a_port_that_others_set_otherwise_is_told() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let text = r#"{ "kind": "bridge", "bridge": "dc0", "hairpinMode": true, "isolated": true }"#;
    engine.attach(&request("c1", &pod, &serde_json::from_str(text).unwrap(), lease(2))).unwrap();
    let drift = || engine.check(&key("c1"), pod.netns()).unwrap().iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(drift(), [""; 0]);
    let port = key("c1").id().host_ifname();
    for (setting, told) in
        [("hairpin", "its hairpin mode was turned off"), ("isolated", "its isolation was turned off")]
    {
        host.root().sh(&format!("bridge link set dev {port} {setting} off"));
        let found = drift();
        assert!(found.len() == 1 && found[0].contains(told), "{found:?}");
        host.root().sh(&format!("bridge link set dev {port} {setting} on"));
        assert_eq!(drift(), [""; 0]);
    }
    host.root().sh(&format!("ip link set {port} nomaster"));
    assert!(drift().iter().any(|told| told.contains("no port of a bridge")), "{:?}", drift());
    engine.detach(&key("c1"), None).unwrap();
}

#[test]
fn a_key_too_long_for_an_alias_is_marked_by_its_id() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let before = host.state();
    let mut long = request("c1", &pod, &veth(), lease(2));
    long.key.container = "c".repeat(250).parse().unwrap();
    long.key.network = "n".repeat(250).parse().unwrap();
    let attached = engine.attach(&long).unwrap();
    let end = host.root().link(long.key.id().host_ifname().as_str()).unwrap();
    assert_eq!(end.alias, Some(format!("dcenet:{}", long.key.id())));
    assert_eq!(attached.host_index, Some(end.index));
    assert_eq!(engine.check(&long.key, pod.netns()).unwrap(), []);
    std::fs::remove_dir_all(host.run_dir()).unwrap();
    engine.detach(&long.key, None).unwrap();
    assert_eq!(before.diff(&host.state()), "");
}

#[test]
fn ipv4_works_where_ipv6_is_off() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let (a, b) = (host.new_pod(), host.new_pod());
    for place in [host.root(), &a, &b] {
        place.sysctl("ipv6/conf/all/disable_ipv6", "1");
        place.sysctl("ipv6/conf/default/disable_ipv6", "1");
    }
    let ipv4 = |n| {
        let mut lease = lease(n);
        lease.addresses.truncate(1);
        lease.routes.truncate(1);
        lease
    };
    for config in [bridge(), veth()] {
        engine.attach(&request("c1", &a, &config, ipv4(2))).unwrap();
        engine.attach(&request("c2", &b, &config, ipv4(3))).unwrap();
        talk(&a, &b, &["10.20.0.3"]);
        for container in ["c1", "c2"] {
            engine.detach(&key(container), None).unwrap();
        }
        engine.remove_idle(&"dc0".parse().unwrap()).unwrap();
    }
}

#[test]
fn another_attachments_record_of_the_same_id_is_not_touched() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let (pod, other) = (host.new_pod(), host.new_pod());
    engine.attach(&request("c1", &pod, &veth(), lease(2))).unwrap();
    // As if the two keys had the same 52 bits.
    let records = host.run_dir().join("attachments");
    std::fs::rename(records.join(key("c1").id().to_string()), records.join(key("c2").id().to_string())).unwrap();
    let before = host.state();
    let error = engine.attach(&request("c2", &other, &veth(), lease(3))).unwrap_err();
    assert!(matches!(error, AttachError::IdCollision { .. }), "{error}");
    let error = engine.detach(&key("c2"), None).unwrap_err();
    assert!(error.to_string().contains("belongs to shop/c1/eth0"), "{error}");
    assert_eq!(before.diff(&host.state()), "");
}

#[test]
fn results_tell_names_addresses_and_mtu() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let attached = engine.attach(&request("c1", &pod, &bridge(), lease(2))).unwrap();
    let [bridge, end, eth0] = &attached.interfaces[..] else { panic!("{attached:?}") };
    assert_eq!(attached.pod_interface, 2);
    assert_eq!(bridge.mac, host.root().link("dc0").unwrap().mac.unwrap());
    let there = host.root().link(&end.name).unwrap();
    assert_eq!((Some(end.mac), end.mtu.unwrap().get()), (there.mac, 1400));
    assert_eq!(there.alias.as_deref(), Some("dcenet:shop/c1/eth0"));
    let inside = pod.link("eth0").unwrap();
    assert_eq!((eth0.name.as_str(), Some(eth0.mac), eth0.mtu.unwrap().get()), ("eth0", inside.mac, 1400));
    assert_eq!(eth0.sandbox.as_deref(), Some(pod.path()));
    assert_eq!(inside.alias, there.alias);
    assert!(inside.is_up() && there.is_up());
    // No address waits for duplicate address detection, none came by itself on the host's end.
    let tentative = pod.sh("ip -6 addr show tentative") + &host.root().sh("ip -6 addr show tentative");
    assert_eq!(tentative, "");
    assert_eq!(host.root().sh(&format!("ip addr show dev {} | grep -c inet || true", end.name)).trim(), "0");
}

#[test]
fn a_gateway_bridge_forwards_between_subnets_of_both_families() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    host.root().sysctl("ipv4/ip_forward", "1");
    host.root().sysctl("ipv6/conf/all/forwarding", "1");
    let engine = host.engine(None);
    let (a, b) = (host.new_pod(), host.new_pod());
    engine.attach(&request("c1", &a, &bridge(), lease(2))).unwrap();
    let mut other = lease(3);
    for (address, gateway, here) in [(0, "10.30.0.1", "10.30.0.3/24"), (1, "fd30::1", "fd30::3/64")] {
        other.addresses[address].address = here.parse().unwrap();
        other.addresses[address].gateway = Some(gateway.parse().unwrap());
    }
    engine.attach(&request("c2", &b, &bridge(), other)).unwrap();
    // The host has never heard of the receiver: it asks for it on behalf of the packet that it forwards.
    talk(&a, &b, &["10.30.0.3", "fd30::3"]);
}
