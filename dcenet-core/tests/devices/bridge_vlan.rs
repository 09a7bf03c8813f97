//! VLANs of a bridge. A kernel without CONFIG_BRIDGE_VLAN_FILTERING says so.

use std::time::Duration;

use dcenet_core::engine::{AttachError, AttachRequest, Drift, Engine, StepError};
use dcenet_core::link::LinkConfig;
use dcenet_core::link::conformance::{self, Reach, Subject};
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{Lease, LeasedAddress};
use dcenet_core::test_support::{HostState, Rung, TestHost, TestNetNs, ping, require};
use serde_json::{Value, json};

/// As the other drivers of the suite, in a VLAN, with its gateway.
fn subject() -> Subject {
    Subject {
        prepare: |_| {},
        link: |_| json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true, "vlan": 10, "mtu": 1400 }),
        pods: Reach::Both,
        host: Reach::Both,
        own_mac: false,
        drift: &[
            ("bridge vlan del dev END vid 10", "frames without a tag"),
            ("bridge vlan add dev END vid 11 pvid untagged", "frames without a tag"),
            ("bridge vlan del dev dc0 vid 10 self", "its own end"),
            ("ip link set dc0 type bridge vlan_filtering 0", "keeps VLANs apart no more"),
            ("ip addr del 10.20.0.1/24 dev dc0.10", "address 10.20.0.1/24 of dc0.10"),
            ("ip link del dc0.10", "link dc0.10 is missing"),
        ],
    }
}

#[test]
fn conforms() {
    if require(Rung::Vm) {
        conformance::conforms(&subject());
    }
}

#[test]
fn survives_faults() {
    if require(Rung::Vm) {
        conformance::survives_faults(&subject());
    }
}

#[test]
fn survives_kills() {
    if require(Rung::Vm) {
        conformance::survives_kills(&subject(), "drivers::child");
    }
}

fn key(n: u8) -> AttachmentKey {
    serde_json::from_value(json!({ "network": "shop", "container": format!("c{n}"), "ifname": "eth0" })).unwrap()
}

/// A pod `10.20.0.N`, whose port is as `more` says.
fn attach(engine: &Engine, pod: &TestNetNs, n: u8, more: &Value) -> Result<(), AttachError> {
    let mut link = json!({ "kind": "bridge", "bridge": "dc0" });
    link.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let mut address = LeasedAddress::new(format!("10.20.0.{n}/24").parse().unwrap(), "pods", n.into());
    address.gateway = Some("10.20.0.1".parse().unwrap());
    let lease = Lease { addresses: vec![address], routes: Vec::new(), dns: Default::default(), mac: None };
    engine.attach(&AttachRequest::new(key(n), pod.pod(), LinkConfig::read(&link).unwrap(), lease)).map(drop)
}

fn reaches(from: &TestNetNs, to: u8, expected: bool) {
    let limit = Duration::from_millis(if expected { 20_000 } else { 500 });
    let reached = ping(from, format!("10.20.0.{to}").parse().unwrap(), limit);
    assert_eq!(reached.is_ok(), expected, "10.20.0.{to}");
}

/// The VLANs of the pod's port, as iproute2 tells them.
fn vlans(host: &TestHost, n: u8) -> String {
    let told = host.root().sh(&format!("bridge vlan show dev {}", key(n).id().host_ifname()));
    let lines = told.lines().skip(1).map(|line| line.split_whitespace().filter(|word| !word.starts_with("dc")));
    lines.map(|words| words.collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join(", ")
}

#[test]
fn pods_of_one_vlan_meet_and_those_of_two_do_not() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    // Without VLANs all meet: the twin.
    for apart in [true, false] {
        let of = |vlan: u16| if apart { json!({ "vlan": vlan }) } else { json!({}) };
        let [a, b, c, plain] = [2, 3, 4, 5].map(|n| (n, host.new_pod()));
        for ((n, pod), more) in [(&a, of(10)), (&b, of(10)), (&c, of(20)), (&plain, json!({}))] {
            attach(&engine, pod, *n, &more).unwrap();
            assert_eq!(engine.check(&key(*n), pod.netns()).unwrap(), []);
        }
        if apart {
            assert_eq!(
                [2, 4, 5].map(|n| vlans(&host, n)),
                ["10 PVID Egress Untagged", "20 PVID Egress Untagged", "1 PVID Egress Untagged"]
            );
        }
        reaches(&a.1, 3, true);
        for (from, to) in [(&a, 4), (&c, 2), (&a, 5), (&plain, 4)] {
            reaches(&from.1, to, !apart);
        }
        for n in 2..6 {
            engine.detach(&key(n), None).unwrap();
        }
        assert!(engine.remove_idle(&"dc0".parse().unwrap()).unwrap());
    }
}

#[test]
fn a_trunk_has_tags_of_its_vlans_only() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let (trunk, inside, outside) = (host.new_pod(), host.new_pod(), host.new_pod());
    let wide = json!({ "vlan": 30, "vlanTrunk": [{ "id": 10 }, { "minID": 100, "maxID": 102 }] });
    attach(&engine, &trunk, 2, &wide).unwrap();
    attach(&engine, &inside, 3, &json!({ "vlan": 10 })).unwrap();
    attach(&engine, &outside, 4, &json!({ "vlan": 20 })).unwrap();
    assert_eq!(vlans(&host, 2), "10, 30 PVID Egress Untagged, 100, 101, 102");
    assert_eq!(engine.check(&key(2), trunk.netns()).unwrap(), []);
    trunk.sh("ip addr flush dev eth0; for id in 10 20; do ip link add link eth0 name eth0.$id type vlan id $id; \
        ip link set eth0.$id up; done; ip addr add 10.20.0.2/24 dev eth0.10");
    reaches(&trunk, 3, true);
    trunk.sh("ip addr flush dev eth0.10; ip addr add 10.20.0.2/24 dev eth0.20");
    reaches(&trunk, 4, false);
    let end = key(2).id().host_ifname();
    host.root().sh(&format!("bridge vlan del dev {end} vid 101"));
    let told = |drift: Vec<Drift>| drift.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    // Its address was taken away above.
    let drift = told(engine.check(&key(2), trunk.netns()).unwrap());
    assert!(drift.contains("a VLAN of its trunk is gone"), "{drift}");
}

#[test]
fn the_gateway_of_a_vlan_serves_its_pods_alone_and_goes_with_the_bridge() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let before = host.state();
    let (a, b) = (host.new_pod(), host.new_pod());
    // A bridge of ours that kept nothing apart until now.
    let plain = host.new_pod();
    attach(&engine, &plain, 5, &json!({})).unwrap();
    attach(&engine, &a, 2, &json!({ "isGateway": true, "vlan": 10 })).unwrap();
    attach(&engine, &b, 3, &json!({ "vlan": 20 })).unwrap();
    reaches(&a, 1, true);
    reaches(&b, 1, false);
    reaches(&plain, 1, false);
    let alias = host.root().link("dc0.10").unwrap().alias;
    assert_eq!(alias.as_deref(), Some("dcenet:shared/dc0.10"));
    // Without promiscuous mode, which a gateway with another Ethernet address than the bridge's would need.
    assert_eq!(host.root().link("dc0").unwrap().mac, host.root().link("dc0.10").unwrap().mac);
    for n in [2, 3, 5] {
        engine.detach(&key(n), None).unwrap();
    }
    assert!(engine.remove_idle(&"dc0".parse().unwrap()).unwrap());
    assert_eq!(before.diff(&host.state()), "");

    // One that is not ours has the gateway's name.
    host.root().sh("ip link add up0 type veth peer name far0; ip link add link up0 name dc0.10 type vlan id 10");
    let (before, inside) = (host.state(), HostState::capture(a.netns()));
    let error = attach(&engine, &a, 2, &json!({ "isGateway": true, "vlan": 10 })).unwrap_err().to_string();
    assert!(error.contains("is not ours") && error.contains("gateway of VLAN 10"), "{error}");
    assert_eq!((before.diff(&host.state()), inside.diff(&HostState::capture(a.netns()))), Default::default());
}

#[test]
fn a_bridge_of_others_must_keep_vlans_apart_already() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    host.root().sh("ip link add dc0 type bridge");
    let engine = host.engine(None);
    let (a, b) = (host.new_pod(), host.new_pod());
    let (before, inside) = (host.state(), HostState::capture(a.netns()));
    let Some(_) = host.root().link("dc0").unwrap().vlans else {
        // A kernel without: before anything is changed where there is a bridge, and else nothing is left.
        let error = attach(&engine, &a, 2, &json!({ "vlan": 10 })).unwrap_err();
        assert!(matches!(error, AttachError::Plan(_)), "{error}");
        assert!(error.to_string().contains("CONFIG_BRIDGE_VLAN_FILTERING"), "{error}");
        assert_eq!(before.diff(&host.state()), "");
        host.root().sh("ip link del dc0");
        let before = host.state();
        match attach(&engine, &a, 2, &json!({ "vlan": 10 })).unwrap_err() {
            AttachError::Step { cause: StepError::NoVlanFiltering { .. }, rollback } if rollback.is_empty() => {}
            other => panic!("{other}"),
        }
        assert_eq!((before.diff(&host.state()), inside.diff(&HostState::capture(a.netns()))), Default::default());
        return assert_eq!(host.records(), [""; 0]);
    };
    let error = attach(&engine, &a, 2, &json!({ "vlan": 10 })).unwrap_err().to_string();
    assert!(error.contains("run `ip link set dc0 type bridge vlan_filtering 1`"), "{error}");
    assert_eq!((before.diff(&host.state()), inside.diff(&HostState::capture(a.netns()))), Default::default());
    // With another default VLAN, too.
    host.root().sh("ip link set dc0 type bridge vlan_filtering 1 vlan_default_pvid 7");
    attach(&engine, &a, 2, &json!({ "vlan": 10 })).unwrap();
    attach(&engine, &b, 3, &json!({})).unwrap();
    assert_eq!([vlans(&host, 2), vlans(&host, 3)], ["10 PVID Egress Untagged", "7 PVID Egress Untagged"]);
    reaches(&a, 3, false);
}

#[test]
fn an_attach_that_fails_leaves_a_bridge_with_ports_to_keep_vlans_apart() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let (plain, a) = (host.new_pod(), host.new_pod());
    attach(&engine, &plain, 5, &json!({})).unwrap();
    engine.detach(&key(5), None).unwrap();
    // It stands in the way of the gateway, which comes after the bridge began to keep VLANs apart.
    host.root().sh("ip link add link dc0 name other type vlan id 10");
    let apart = || host.root().link("dc0").unwrap().vlans.unwrap().filtering;
    for has_ports in [false, true] {
        if has_ports {
            attach(&engine, &plain, 5, &json!({})).unwrap();
        }
        assert!(!apart());
        let error = attach(&engine, &a, 2, &json!({ "isGateway": true, "vlan": 10 })).unwrap_err().to_string();
        assert!(error.contains("its VLAN 10 has a device already"), "{error}");
        assert_eq!(apart(), has_ports);
    }
}

/// The VLANs of the own end of `dc0`, as iproute2 tells them.
fn own_vlans(host: &TestHost) -> Vec<String> {
    let told = host.root().sh("bridge vlan show dev dc0");
    let lines = told.lines().skip(1).map(|line| line.split_whitespace().filter(|word| *word != "dc0"));
    lines.map(|words| words.collect::<Vec<_>>().join(" ")).filter(|line| !line.is_empty()).collect()
}

/// A bridge of somebody else's with an uplink that is in VLAN 10.
fn bridge_of_others(host: &TestHost) {
    host.root().sh(
        "ip link add dc0 type bridge vlan_filtering 1; ip link set dc0 addrgenmode none; ip link set dc0 up; \
        ip link add up0 type veth peer name far0; for end in up0 far0; do ip link set $end addrgenmode none; \
        ip link set $end up; done; ip link set up0 master dc0; bridge vlan add dev up0 vid 10",
    );
}

#[test]
fn gateways_of_vlans_without_pods_go_where_the_bridge_stays() {
    if !require(Rung::Vm) {
        return;
    }
    let dc0 = "dc0".parse().unwrap();
    for ours in [false, true] {
        let host = TestHost::new();
        let engine = host.engine(None);
        let (a, b, plain) = (host.new_pod(), host.new_pod(), host.new_pod());
        if ours {
            // What keeps the bridge.
            attach(&engine, &plain, 5, &json!({ "vlan": 30 })).unwrap();
        } else {
            bridge_of_others(&host);
        }
        let (before, own) = (host.state(), own_vlans(&host));
        let in_vlan = |id: u16| json!({ "isGateway": true, "vlan": id });
        attach(&engine, &a, 2, &in_vlan(10)).unwrap();
        attach(&engine, &b, 3, &in_vlan(20)).unwrap();
        // Each has its pod.
        assert!(!engine.remove_idle(&dc0).unwrap());
        assert_eq!(engine.check(&key(2), a.netns()).unwrap(), []);
        engine.detach(&key(2), None).unwrap();
        assert!(host.root().link("dc0.10").is_some(), "it waits for the next pod until the network goes");
        assert!(!engine.remove_idle(&dc0).unwrap());
        assert!(host.root().link("dc0.10").is_none());
        assert!(!own_vlans(&host).iter().any(|line| line.starts_with("10")), "{:?}", own_vlans(&host));
        assert_eq!(engine.check(&key(3), b.netns()).unwrap(), []);
        reaches(&b, 1, true);
        engine.detach(&key(3), None).unwrap();
        assert!(!engine.remove_idle(&dc0).unwrap());
        assert_eq!((before.diff(&host.state()), own_vlans(&host)), (String::new(), own), "ours: {ours}");
    }
}

#[test]
fn an_attach_that_fails_leaves_vlans_of_others_as_they_were() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let a = host.new_pod();
    bridge_of_others(&host);
    let in_vlan = json!({ "isGateway": true, "vlan": 10 });
    // A device in the way, with and without the bridge's own end in the VLAN.
    host.root().sh("ip link add link dc0 name other type vlan id 10");
    for own in ["true", "bridge vlan add dev dc0 vid 10 self"] {
        host.root().sh(own);
        let (before, vlans) = (host.state(), own_vlans(&host));
        let error = attach(&engine, &a, 2, &in_vlan).unwrap_err().to_string();
        assert!(error.contains("its VLAN 10 has a device already"), "{error}");
        assert_eq!((before.diff(&host.state()), own_vlans(&host)), (String::new(), vlans), "{own}");
    }
    // The host's own frames without a tag are of that VLAN, and stay so.
    host.root().sh("ip link del other; bridge vlan add dev dc0 vid 10 pvid untagged self");
    let (before, vlans) = (host.state(), own_vlans(&host));
    let error = attach(&engine, &a, 2, &in_vlan).unwrap_err().to_string();
    assert!(error.contains("run `bridge vlan del dev dc0 vid 10 self`"), "{error}");
    assert_eq!((before.diff(&host.state()), own_vlans(&host)), (String::new(), vlans));
    // What it says helps.
    host.root().sh("bridge vlan del dev dc0 vid 10 self");
    attach(&engine, &a, 2, &in_vlan).unwrap();
    reaches(&a, 1, true);
}

#[test]
fn a_repeated_attach_puts_vlans_right() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let more = json!({ "isGateway": true, "vlan": 10, "vlanTrunk": [{ "minID": 100, "maxID": 102 }] });
    attach(&engine, &pod, 2, &more).unwrap();
    let end = key(2).id().host_ifname();
    let index = || pod.link("eth0").unwrap().index;
    for (command, stands) in [
        ("bridge vlan del dev END vid 10", true),
        ("bridge vlan add dev END vid 11 pvid untagged", true),
        ("bridge vlan add dev END vid 1 pvid untagged; bridge vlan del dev END vid 101", true),
        ("bridge vlan del dev dc0 vid 10 self", true),
        ("ip link set dc0 type bridge vlan_filtering 0", true),
        ("ip link set dc0.10 down; ip addr flush dev dc0.10", true),
        // What is gone is made by another attach.
        ("ip link del dc0.10", false),
        ("ip link set END nomaster", false),
    ] {
        let before = index();
        host.root().sh(&command.replace("END", end.as_str()));
        assert!(!engine.check(&key(2), pod.netns()).unwrap().is_empty(), "{command}");
        attach(&engine, &pod, 2, &more).unwrap();
        assert_eq!(engine.check(&key(2), pod.netns()).unwrap(), [], "{command}");
        assert_eq!(index() == before, stands, "{command}");
        assert!(!vlans(&host, 2).contains("1 PVID"), "{}", vlans(&host, 2));
        reaches(&pod, 1, true);
    }
}

#[test]
fn the_next_attach_makes_a_gateway_whole_and_awaits_its_carrier() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let in_vlan = json!({ "isGateway": true, "vlan": 10 });
    let a = host.new_pod();
    attach(&engine, &a, 2, &in_vlan).unwrap();
    engine.detach(&key(2), None).unwrap();
    host.root().sh("bridge vlan del dev dc0 vid 10 self; sysctl -qw net.ipv4.conf.dc0/10.forwarding=0");
    // A bridge without a port has no carrier, nor have the devices in its VLANs.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while host.root().sh("ip -o link show dc0.10").contains("state UP") {
        assert!(std::time::Instant::now() < deadline, "the bridge keeps its carrier");
        std::thread::sleep(Duration::from_millis(50));
    }
    attach(&engine, &a, 3, &in_vlan).unwrap();
    let shown = host.root().sh("ip -o link show dc0.10");
    assert!(shown.contains("state UP"), "{shown}");
    assert_eq!(engine.check(&key(3), a.netns()).unwrap(), []);
    reaches(&a, 1, true);
}
