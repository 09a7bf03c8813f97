//! Devices of every kind.

use dcenet_core::model::{IfIndex, IfName, VlanId};
use dcenet_core::netlink::{
    CreateLinkError, IpvlanFlag, IpvlanMode, LinkKind, MacvlanMode, NetkitMode, NetkitPolicy, NewLink, VlanProtocol,
};
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, kernel_is_before, require};
use serde_json::json;

use super::{host_with_parent, seen, socket};

fn name(text: &str) -> IfName {
    text.parse().unwrap()
}

fn new<'a>(name: &'a IfName, kind: LinkKind<'a>) -> NewLink<'a> {
    NewLink { name, kind, mac: None, mtu: None, netns: None }
}

/// Creates the device on the host, moves it to a pod under another name and deletes it there; then creates it straight
/// in the pod. `data` is what iproute2 must say of its settings. Nothing is left of either.
fn lives(host: &TestHost, kind: LinkKind<'_>, data: serde_json::Value) {
    let pod = host.new_pod();
    let (host_before, pod_before) = (host.state(), state(&pod));
    let (mut on_host, mut in_pod) = (socket(host.root().netns()), socket(pod.netns()));
    let (dev0, net1) = (name("dev0"), name("net1"));
    let expect = |netns: &TestNetNs, name: &str| {
        let info = seen(netns, name).unwrap_or_else(|| panic!("no {name}"))["linkinfo"].clone();
        assert_eq!(info["info_kind"], kind.name());
        for (key, value) in data.as_object().unwrap() {
            assert_eq!(&info["info_data"][key], value, "{key} of {info}");
        }
    };

    let index = on_host.create_link(&new(&dev0, kind)).unwrap();
    expect(host.root(), "dev0");
    let link = on_host.link(&dev0).unwrap().unwrap();
    assert_eq!((link.index, link.kind.as_deref(), link.is_up()), (index, Some(kind.name()), false));

    on_host.move_link(&link, pod.netns(), Some(&net1)).unwrap();
    assert_eq!((seen(host.root(), "dev0"), on_host.link(&dev0).unwrap()), (None, None));
    expect(&pod, "net1");
    let moved = in_pod.link(&net1).unwrap().unwrap();
    in_pod.delete_link(&moved).unwrap();
    assert_eq!(in_pod.link(&net1).unwrap(), None);
    assert_eq!(in_pod.delete_link(&moved).unwrap_err().errno(), Some(libc::ENODEV));

    let index = on_host.create_link(&NewLink { netns: Some(pod.netns()), ..new(&net1, kind) }).unwrap();
    assert_eq!(seen(host.root(), "net1"), None);
    expect(&pod, "net1");
    let made = in_pod.link(&net1).unwrap().unwrap();
    assert_eq!(made.index, index);
    in_pod.delete_link(&made).unwrap();

    assert_eq!((host_before.diff(&host.state()), pod_before.diff(&state(&pod))), Default::default());
}

fn state(pod: &TestNetNs) -> dcenet_core::test_support::HostState {
    dcenet_core::test_support::HostState::capture(pod.netns())
}

#[test]
fn macvlan_lives() {
    if !require(Rung::Netns) {
        return;
    }
    for (mode, text) in [
        (MacvlanMode::Private, "private"),
        (MacvlanMode::Vepa, "vepa"),
        (MacvlanMode::Bridge, "bridge"),
        (MacvlanMode::Passthru, "passthru"),
    ] {
        let host = host_with_parent();
        let parent = host.root().link("up0").unwrap().index;
        lives(&host, LinkKind::Macvlan { parent, mode, sources: &[] }, json!({ "mode": text }));
    }
}

#[test]
fn ipvlan_lives() {
    if !require(Rung::Vm) {
        return;
    }
    for (mode, mode_text, flag, flag_text) in [
        (IpvlanMode::L2, "l2", IpvlanFlag::Bridge, "bridge"),
        (IpvlanMode::L3, "l3", IpvlanFlag::Private, "private"),
        (IpvlanMode::L3s, "l3s", IpvlanFlag::Vepa, "vepa"),
    ] {
        let host = host_with_parent();
        let parent = host.root().link("up0").unwrap().index;
        lives(&host, LinkKind::Ipvlan { parent, mode, flag }, json!({ "mode": mode_text, flag_text: true }));
    }
}

#[test]
fn vlan_lives() {
    if !require(Rung::Vm) {
        return;
    }
    let host = host_with_parent();
    let parent = host.root().link("up0").unwrap().index;
    for (id, protocol, text) in [(1, VlanProtocol::Dot1Q, "802.1Q"), (4094, VlanProtocol::Dot1Ad, "802.1ad")] {
        let kind = LinkKind::Vlan { parent, id: VlanId::try_from(id).unwrap(), protocol };
        lives(&host, kind, json!({ "id": id, "protocol": text }));
    }
}

#[test]
fn wireguard_and_dummy_live() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    lives(&host, LinkKind::Wireguard, json!({}));
    lives(&host, LinkKind::Dummy, json!({}));
}

#[test]
fn vrf_stays_where_it_was_made() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    let pod = host.new_pod();
    let mut on_host = socket(host.root().netns());
    let vrf = name("red");
    on_host.create_link(&new(&vrf, LinkKind::Vrf { table: 77 })).unwrap();
    let said = seen(host.root(), "red").unwrap();
    assert_eq!(said["linkinfo"], json!({ "info_kind": "vrf", "info_data": { "table": 77 } }));
    let link = on_host.link(&vrf).unwrap().unwrap();
    assert_eq!(on_host.move_link(&link, pod.netns(), None).unwrap_err().errno(), Some(libc::EINVAL));
    on_host.delete_link(&link).unwrap();
    assert_eq!(seen(host.root(), "red"), None);

    let refused = on_host.create_link(&new(&vrf, LinkKind::Vrf { table: 0 })).unwrap_err();
    assert!(matches!(&refused, CreateLinkError::Netlink(e) if e.errno() == Some(libc::EINVAL)), "{refused}");
}

#[test]
fn netkit_joins_two_namespaces_or_the_kernel_is_named() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    let pod = host.new_pod();
    let before = host.state();
    let mut on_host = socket(host.root().netns());
    let (near, far) = (name("nk0"), name("eth0"));
    for mode in [NetkitMode::L2, NetkitMode::L3] {
        let kind = LinkKind::Netkit {
            mode,
            policy: NetkitPolicy::Forward,
            peer_policy: NetkitPolicy::Forward,
            peer_name: &far,
            peer_mac: None,
            peer_mtu: None,
            peer_netns: Some(pod.netns()),
        };
        let made = on_host.create_link(&new(&near, kind));
        if kernel_is_before(6, 7) {
            let refused = made.unwrap_err();
            assert!(
                matches!(&refused, CreateLinkError::UnknownKind { kind: "netkit", since: "6.7", .. }),
                "{refused:?}"
            );
            let text = refused.to_string();
            assert!(text.ends_with("it needs Linux 6.7 or later with CONFIG_NETKIT"), "{text}");
            assert_eq!(before.diff(&host.state()), "");
            continue;
        }
        let index = made.unwrap();
        let link = on_host.link(&near).unwrap().unwrap();
        assert_eq!((link.index, link.kind.as_deref()), (index, Some("netkit")));
        assert_eq!(seen(&pod, "eth0").unwrap()["linkinfo"]["info_kind"], "netkit");
        host.root().sh("ip addr add 10.9.0.1/24 dev nk0 && ip link set nk0 up");
        pod.sh("ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up");
        let address = "10.9.0.2".parse().unwrap();
        dcenet_core::test_support::ping(host.root(), address, std::time::Duration::from_secs(20)).unwrap();
        on_host.delete_link(&link).unwrap();
        assert_eq!((seen(host.root(), "nk0"), seen(&pod, "eth0")), (None, None));
        assert_eq!(before.diff(&host.state()), "");
    }
}

#[test]
fn refusals_name_their_cause() {
    if !require(Rung::Netns) {
        return;
    }
    let host = host_with_parent();
    let parent = host.root().link("up0").unwrap().index;
    let pod = host.new_pod();
    pod.sh("ip link add net1 type veth peer name other");
    let mut on_host = socket(host.root().netns());
    let before = (host.state(), state(&pod));
    let kind = LinkKind::Macvlan { parent, mode: MacvlanMode::Bridge, sources: &[] };
    let net1 = name("net1");

    let taken = on_host.create_link(&NewLink { netns: Some(pod.netns()), ..new(&net1, kind) }).unwrap_err();
    assert!(matches!(&taken, CreateLinkError::Netlink(e) if e.errno() == Some(libc::EEXIST)), "{taken}");
    let nowhere =
        LinkKind::Macvlan { parent: IfIndex::new(i32::MAX as u32).unwrap(), mode: MacvlanMode::Vepa, sources: &[] };
    let absent = on_host.create_link(&new(&net1, nowhere)).unwrap_err();
    assert!(matches!(&absent, CreateLinkError::Netlink(e) if e.errno() == Some(libc::ENODEV)), "{absent}");
    assert_eq!((before.0.diff(&host.state()), before.1.diff(&state(&pod))), Default::default());

    // A move whose new name alone is taken is made, without the renaming.
    let dev0 = name("dev0");
    on_host.create_link(&new(&dev0, kind)).unwrap();
    let link = on_host.link(&dev0).unwrap().unwrap();
    assert_eq!(on_host.move_link(&link, pod.netns(), Some(&net1)).unwrap_err().errno(), Some(libc::EEXIST));
    assert_eq!(on_host.link(&dev0).unwrap(), None);
    assert_eq!(seen(&pod, "dev0").unwrap()["linkinfo"]["info_kind"], "macvlan");
}
