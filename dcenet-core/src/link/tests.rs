//! Plans, without a kernel.

use serde_json::{Value, json};

use super::*;
use crate::bandwidth::Rate;
use crate::model::{IfIndex, Mtu, VlanId};
use crate::netlink::BridgeVlans;
use crate::plan::{Operation, Tagging, Target, Undo};
use crate::provider::LeasedAddress;

fn address(text: &str, gateway: Option<&str>) -> LeasedAddress {
    LeasedAddress {
        gateway: gateway.map(|g| g.parse().unwrap()),
        ..LeasedAddress::new(text.parse().unwrap(), "pods", 1)
    }
}

fn request(addresses: Vec<LeasedAddress>, routes: &[(&str, Option<&str>)]) -> LinkRequest {
    let key = AttachmentKey {
        network: "shop".parse().unwrap(),
        container: "c1".parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    };
    let route = |(to, via): &(&str, Option<&str>)| LeasedRoute {
        destination: to.parse().unwrap(),
        gateway: via.map(|g| g.parse().unwrap()),
    };
    LinkRequest {
        mac: key.mac(),
        key,
        addresses,
        routes: routes.iter().map(route).collect(),
        policy: Policy::Wanted,
        device: None,
    }
}

fn config(json: &str) -> LinkConfig {
    serde_json::from_str(json).unwrap()
}

fn plan(json: &str, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
    config(json).driver().plan(request, host)
}

fn bridge_link(kind: Option<&str>) -> LinkView {
    LinkView {
        index: IfIndex::new(7).unwrap(),
        name: "dc0".into(),
        kind: kind.map(Into::into),
        mac: None,
        mtu: 1500,
        flags: libc::IFF_UP as u32,
        alias: None,
        master: None,
        peer: None,
        peer_netns: None,
        tx_queue_len: 0,
        port: None,
        vlans: None,
        vlan: None,
    }
}

fn vlan(id: u16) -> VlanId {
    id.try_into().unwrap()
}

fn place(plan: &Plan, wanted: impl Fn(&Operation) -> bool) -> usize {
    plan.steps.iter().position(|s| wanted(&s.operation)).unwrap()
}

#[test]
fn configurations_are_read_strictly_and_written_as_read() {
    let text = r#"{"kind":"bridge","bridge":"dc0","mtu":1400,"isGateway":true,"hairpinMode":true}"#;
    assert_eq!(serde_json::to_string(&config(text)).unwrap(), text);
    assert_eq!(serde_json::to_string(&config(r#"{"kind":"veth"}"#)).unwrap(), r#"{"kind":"veth"}"#);
    for (bad, said) in [
        (r#"{"kind":"bridge"}"#, "missing field `bridge`"),
        (r#"{"bridge":"dc0"}"#, "missing field `kind`"),
        (r#"{"kind":"bond"}"#, "unknown variant `bond`"),
        (r#"{"kind":"bridge","bridge":"dc0","mtuu":1}"#, "unknown field `mtuu`"),
        (r#"{"kind":"bridge","bridge":"a/b"}"#, "interface name \"a/b\""),
        (r#"{"kind":"bridge","bridge":"dc0","mtu":7}"#, "MTU \"7\""),
        (r#"{"kind":"veth","bridge":"dc0"}"#, "unknown field `bridge`"),
    ] {
        let error = serde_json::from_str::<LinkConfig>(bad).unwrap_err().to_string();
        assert!(error.contains(said), "{bad}: {error}");
    }
}

#[test]
fn policy_comes_before_the_host_end_is_up_and_after_it_exists() {
    for json in [r#"{"kind":"bridge","bridge":"dc0"}"#, r#"{"kind":"veth"}"#] {
        let request = request(vec![address("10.0.0.2/24", Some("10.0.0.1"))], &[("0.0.0.0/0", None)]);
        let plan = plan(json, &request, &HostView::default()).unwrap();
        let end = plan.host_end.clone().unwrap().name;
        let create = place(&plan, |o| matches!(o, Operation::CreateVeth { .. }));
        let policy = place(&plan, |o| *o == Operation::AttachPolicy);
        let up = place(&plan, |o| matches!(o, Operation::Up { link, .. } if *link == end));
        assert!(create < policy && policy < up, "{json}");
        let without = LinkRequest { policy: Policy::None, ..request };
        let plan = self::plan(json, &without, &HostView::default()).unwrap();
        assert!(plan.steps.iter().all(|s| s.operation != Operation::AttachPolicy));
    }
}

#[test]
fn a_bridge_is_made_only_where_it_is_missing() {
    let json = r#"{"kind":"bridge","bridge":"dc0","isGateway":true}"#;
    let request = request(vec![address("10.0.0.2/24", Some("10.0.0.1"))], &[]);
    let fresh = plan(json, &request, &HostView::default()).unwrap();
    assert!(fresh.makes_shared());
    let made = |o: &Operation| matches!(o, Operation::CreateBridge { .. });
    assert!(fresh.steps.iter().any(|s| made(&s.operation)));

    let mut host = HostView { links: vec![bridge_link(Some("bridge"))], addresses: Vec::new() };
    let second = plan(json, &request, &host).unwrap();
    assert!(!second.steps.iter().any(|s| made(&s.operation)));
    // The gateway address is missing there, and taken back only while nobody uses it.
    assert!(second.makes_shared());
    let gateway: ipnet::IpNet = "10.0.0.1/24".parse().unwrap();
    let idle = Undo::DeleteIdleAddress { link: "dc0".parse().unwrap(), address: gateway, vlan: None };
    assert!(second.steps.iter().any(|s| s.undo.as_ref() == Some(&idle)));

    host.addresses.push(AddressView { index: IfIndex::new(7).unwrap(), address: gateway, flags: 0, scope: 0 });
    let third = plan(json, &request, &host).unwrap();
    assert!(!third.makes_shared());
    let forgotten = place(&third, |o| matches!(o, Operation::ForgetNeighbour { .. }));
    assert!(third.steps[forgotten].tolerate.contains(&libc::ENOENT));

    for kind in [Some("veth"), None] {
        let host = HostView { links: vec![bridge_link(kind)], addresses: Vec::new() };
        assert!(matches!(plan(json, &request, &host), Err(PlanError::Conflict { .. })));
    }
}

#[test]
fn a_gateway_outside_every_subnet_is_taken_to_be_on_the_link() {
    let json = r#"{"kind":"bridge","bridge":"dc0"}"#;
    let on_link = |gateway| {
        let request = request(vec![address("10.0.0.2/24", Some(gateway))], &[("0.0.0.0/0", None)]);
        let plan = plan(json, &request, &HostView::default()).unwrap();
        let at = place(&plan, |o| matches!(o, Operation::AddRoute { .. }));
        match &plan.steps[at].operation {
            Operation::AddRoute { route, .. } => (route.gateway.unwrap().to_string(), route.on_link),
            _ => unreachable!(),
        }
    };
    assert_eq!(on_link("10.0.0.1"), ("10.0.0.1".into(), false));
    assert_eq!(on_link("192.0.2.1"), ("192.0.2.1".into(), true));
}

#[test]
fn routed_pods_have_single_addresses_and_one_first_hop() {
    let addresses = vec![address("10.0.0.2/24", Some("10.0.0.1")), address("fd00::2/64", None)];
    let request = request(addresses, &[("0.0.0.0/0", None), ("10.9.0.0/16", Some("10.0.0.7"))]);
    let plan = plan(r#"{"kind":"veth"}"#, &request, &HostView::default()).unwrap();
    let lines = |target| -> Vec<String> {
        let line = |o: &Operation| match o {
            Operation::AddAddress { address, .. } => Some(format!("address {address}")),
            Operation::AddRoute { route, .. } => Some(format!("{} via {:?}", route.destination, route.gateway)),
            Operation::AddNeighbour { address, .. } => Some(format!("neighbour {address}")),
            _ => None,
        };
        plan.steps.iter().filter(|s| s.target == target).filter_map(|s| line(&s.operation)).collect()
    };
    let local = link_local(request.mac);
    assert_eq!(
        lines(Target::Pod),
        [
            format!("address {local}"),
            "address 10.0.0.2/32".into(),
            "address fd00::2/128".into(),
            "neighbour 169.254.1.1".into(),
            "neighbour fe80::1".into(),
            "10.0.0.0/24 via Some(169.254.1.1)".into(),
            "fd00::/64 via Some(fe80::1)".into(),
            "0.0.0.0/0 via Some(169.254.1.1)".into(),
            "10.9.0.0/16 via Some(169.254.1.1)".into(),
        ]
    );
    assert_eq!(
        lines(Target::Host),
        ["neighbour 10.0.0.2", "neighbour fd00::2", "10.0.0.2/32 via None", "fd00::2/128 via None"]
    );
}

#[test]
fn contradictions_are_refused_by_name() {
    let routes = [("0.0.0.0/0", Some("fd00::1"))];
    let mixed = request(vec![address("10.0.0.2/24", None)], &routes);
    let ipv6 = request(vec![address("fd00::2/64", None)], &[]);
    for json in [r#"{"kind":"bridge","bridge":"dc0","mtu":1000}"#, r#"{"kind":"veth","mtu":1000}"#] {
        let field = |request| match plan(json, request, &HostView::default()) {
            Err(PlanError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(&mixed), "routes[].gw");
        assert_eq!(field(&ipv6), "link.mtu");
    }
    assert_eq!(Mtu::IPV6_MIN, 1280);
}

#[test]
fn the_ends_addresses_differ_and_are_the_same_each_time() {
    let request = request(Vec::new(), &[]);
    assert_ne!(host_mac(&request.key, request.mac), request.mac);
    assert_eq!(host_mac(&request.key, request.mac), host_mac(&request.key, request.mac));
    // Even where somebody insists on the address that the host's end would have had.
    let insisted = host_mac(&request.key, request.mac);
    assert_ne!(host_mac(&request.key, insisted), insisted);
    assert_eq!(link_local("02:00:00:00:00:01".parse().unwrap()).to_string(), "fe80::ff:fe00:1/64");
}

#[test]
fn a_device_gets_the_lowest_mtu_that_anybody_names() {
    let of = |mtu| LeasedAddress { mtu: Some(Mtu::try_from(mtu).unwrap()), ..address("10.0.0.2/24", None) };
    let six = LeasedAddress { mtu: Some(Mtu::try_from(1400).unwrap()), ..address("fd00::2/64", None) };
    for kind in [r#""kind":"bridge","bridge":"dc0""#, r#""kind":"veth""#] {
        let mtu_of = |link: &str, addresses: Vec<LeasedAddress>| {
            let plan = plan(&format!("{{{kind}{link}}}"), &request(addresses, &[]), &HostView::default())?;
            let made = plan.steps.iter().map(|s| match &s.operation {
                Operation::CreateVeth { mtu, .. } | Operation::CreateBridge { mtu, .. } => Some(*mtu),
                _ => None,
            });
            let made: Vec<_> = made.flatten().map(|mtu| mtu.map(Mtu::get)).collect();
            assert!(made.iter().all(|mtu| *mtu == made[0]), "{made:?}");
            Ok(made[0])
        };
        assert_eq!(mtu_of("", vec![address("10.0.0.2/24", None)]), Ok(None));
        assert_eq!(mtu_of("", vec![of(9000), six.clone()]), Ok(Some(1400)));
        assert_eq!(mtu_of(r#","mtu":1300"#, vec![of(9000), six.clone()]), Ok(Some(1300)));
        assert_eq!(mtu_of(r#","mtu":9000"#, vec![of(1000)]), Ok(Some(1000)));
        match mtu_of(r#","mtu":9000"#, vec![of(1000), six.clone()]) {
            Err(PlanError::Invalid { field: "ipam.pools[].mtu", value, .. }) => assert_eq!(value, "1000"),
            other => panic!("{other:?}"),
        }
        let tagged = LeasedAddress { vlan: Some(7.try_into().unwrap()), ..address("10.0.0.2/24", None) };
        match mtu_of("", vec![six.clone(), tagged]) {
            Err(PlanError::Invalid { field: "ipam.pools[].vlan", value, .. }) => assert_eq!(value, "7"),
            made => assert!(kind.contains("bridge") && made == Ok(Some(1400)), "{made:?}"),
        }
    }
}

#[test]
fn every_kind_is_read_strictly_and_written_as_read() {
    for (text, kind) in [
        (r#"{"kind":"macvlan","parent":"eth1","mode":"source","sources":["02:00:00:00:00:0a"],"mtu":1400}"#, "macvlan"),
        (r#"{"kind":"macvlan","parent":"eth1","mode":"bridge","hostAccess":true}"#, "macvlan"),
        (r#"{"kind":"ipvlan","parent":"eth1","mode":"l3s","flag":"vepa"}"#, "ipvlan"),
        (r#"{"kind":"vlan","parent":"eth1","id":100,"protocol":"802.1ad"}"#, "vlan"),
        (r#"{"kind":"host-device","device":"eth1","tuning":{"txQueueLen":7,"promisc":true}}"#, "host-device"),
        (r#"{"kind":"vrf","vrf":"red","table":77}"#, "vrf"),
        (r#"{"kind":"netkit","mode":"l2"}"#, "netkit"),
        (r#"{"kind":"dummy","mtu":1400}"#, "dummy"),
        (r#"{"kind":"tap","mode":"tun","owner":1000,"group":100,"multiQueue":true}"#, "tap"),
    ] {
        let read = LinkConfig::read(&serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!(read.driver().kind(), kind);
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        assert_eq!(config(text), read);
    }
    for (bad, field, said) in [
        (r#"{"kind":"macvlan"}"#, "link", "missing field `parent`"),
        (r#"{"kind":"macvlna","parent":"eth1"}"#, "link.kind", "did you mean `macvlan`?"),
        (r#"{"kind":"macvlan","parent":"eth1","mode":"brigde"}"#, "link.mode", "did you mean `bridge`?"),
        (r#"{"kind":"macvlan","parent":"eth1","hostAcces":true}"#, "link.hostAcces", "did you mean `hostAccess`?"),
        (r#"{"kind":"ipvlan","parent":"eth1","flag":"l2"}"#, "link.flag", "unknown variant `l2`"),
        (r#"{"kind":"vlan","parent":"eth1","id":4095}"#, "link.id", "not between 1 and 4094"),
        (r#"{"kind":"vlan","parent":"eth1","id":1,"protocol":"802.1x"}"#, "link.protocol", "unknown variant"),
        (r#"{"kind":"tap","tuning":{"promiscuous":true}}"#, "link.tuning.promiscuous", "unknown field"),
    ] {
        let error = LinkConfig::read(&serde_json::from_str(bad).unwrap()).unwrap_err();
        assert_eq!(error.field, field, "{bad}");
        assert!(error.reason.contains(said), "{bad}: {error}");
    }
}

#[test]
fn a_device_on_a_parent_is_made_by_the_host_and_finished_in_the_pod() {
    let host = HostView { links: vec![LinkView { mtu: 1450, ..bridge_link(None) }], addresses: Vec::new() };
    let request = LinkRequest {
        policy: Policy::None,
        ..request(vec![address("10.0.0.2/24", Some("10.0.0.1"))], &[("0.0.0.0/0", None)])
    };
    let plan = plan(r#"{"kind":"macvlan","parent":"dc0"}"#, &request, &host).unwrap();
    let on_host: Vec<&Operation> =
        plan.steps.iter().filter(|s| s.target == Target::Host).map(|s| &s.operation).collect();
    assert!(matches!(on_host[..], [Operation::CreateLink { .. }, Operation::ForgetNeighbour { .. }]), "{on_host:?}");
    assert_eq!(plan.steps[0].target, Target::Host);
    // What is no message comes before, and is written while the device is down.
    assert!(matches!(plan.steps[1].operation, Operation::WriteSetting { .. }));
    let rename = place(&plan, |o| matches!(o, Operation::Rename { .. }));
    let up = place(&plan, |o| matches!(o, Operation::Up { .. }));
    assert!(rename < up);
    assert!(plan.steps[0].undo.as_ref().is_some_and(Undo::is_in_pod));
    assert!(!plan.makes_shared());

    // Pools may know of a narrower link than the configuration.
    let mut narrow = request;
    narrow.addresses[0].mtu = Some(Mtu::try_from(1300).unwrap());
    let plan = self::plan(r#"{"kind":"macvlan","parent":"dc0","mtu":1400}"#, &narrow, &host).unwrap();
    let Operation::CreateLink { mtu, .. } = &plan.steps[0].operation else { panic!("{plan:?}") };
    assert_eq!(mtu.unwrap().get(), 1300);
}

#[test]
fn addresses_are_probed_for_before_they_are_entered_and_announced_after() {
    let host =
        HostView { links: vec![LinkView { kind: Some("bridge".into()), ..bridge_link(None) }], ..Default::default() };
    let addresses = vec![address("10.0.0.2/24", Some("10.0.0.1")), address("fd00::2/64", Some("fd00::1"))];
    let of = |json: &str, policy| {
        let request = LinkRequest { policy, ..request(addresses.clone(), &[("0.0.0.0/0", None)]) };
        plan(json, &request, &host).unwrap()
    };
    let probed = |o: &Operation| matches!(o, Operation::ProbeConflicts { addresses, .. } if addresses.len() == 2);
    let announced = |o: &Operation| matches!(o, Operation::Announce { addresses, .. } if addresses.len() == 2);
    let asked = |o: &Operation| matches!(o, Operation::ProbeGateways { gateways, .. } if gateways.len() == 2);
    for (json, policy) in [
        (r#"{"kind":"macvlan","parent":"dc0","underlay":{"gatewayProbe":"warn"}}"#, Policy::None),
        (r#"{"kind":"vlan","parent":"dc0","id":7,"underlay":{"gatewayProbe":"fail"}}"#, Policy::None),
        (r#"{"kind":"bridge","bridge":"dc0","underlay":{"gatewayProbe":"fail"}}"#, Policy::Wanted),
    ] {
        let plan = of(json, policy);
        let up = place(&plan, |o| matches!(o, Operation::Up { link, .. } if link.as_str() == "eth0"));
        let entered = place(&plan, |o| matches!(o, Operation::AddAddress { link, .. } if link.as_str() == "eth0"));
        let settled = plan.steps.iter().rposition(|s| matches!(s.operation, Operation::SettleAddress { .. })).unwrap();
        let order = [up, place(&plan, probed), entered, settled, place(&plan, announced), place(&plan, asked)];
        assert!(order.is_sorted(), "{json}: {order:?}");
        if policy == Policy::Wanted {
            // The way to the segment is open, and policy stands before it is.
            let policy = place(&plan, |o| *o == Operation::AttachPolicy);
            let port = place(&plan, |o| matches!(o, Operation::Up { master: Some(_), .. }));
            assert!(policy < port && port < order[1], "{json}");
        }
    }
    // Asked from the parent, whose Ethernet address the pod has.
    let mut with_mac = host.clone();
    with_mac.links[0].mac = Some("02:00:00:00:00:aa".parse().unwrap());
    let request = LinkRequest { policy: Policy::None, ..request(addresses.clone(), &[]) };
    let ipvlan = plan(r#"{"kind":"ipvlan","parent":"dc0"}"#, &request, &with_mac).unwrap();
    let step = &ipvlan.steps[place(&ipvlan, probed)];
    assert!(matches!(&step.operation, Operation::ProbeConflicts { link, .. } if link.as_str() == "dc0"));
    assert_eq!(step.target, Target::Host);
    for json in [
        r#"{"kind":"macvlan","parent":"dc0","underlay":{"probes":0,"announcements":0}}"#,
        r#"{"kind":"bridge","bridge":"dc0"}"#,
        r#"{"kind":"veth"}"#,
        r#"{"kind":"ipvlan","parent":"dc0","mode":"l3"}"#,
    ] {
        let plan = plan(json, &request, &with_mac).unwrap();
        assert!(
            !plan.steps.iter().any(|s| probed(&s.operation) || announced(&s.operation) || asked(&s.operation)),
            "{json}"
        );
    }
    let refused = plan(r#"{"kind":"ipvlan","parent":"dc0","mode":"l3","underlay":{}}"#, &request, &with_mac);
    assert!(matches!(refused, Err(PlanError::Invalid { field: "link.underlay", .. })), "{refused:?}");
    let wrong = LinkConfig::read(&serde_json::json!({ "kind": "veth", "underlay": {} })).unwrap_err();
    assert_eq!(wrong.field, "link.underlay");
}

#[test]
fn a_runtimes_limit_of_one_direction_leaves_the_other() {
    let rate = |bits| Some(Rate::new(bits, 1_000_000).unwrap());
    let link = json!({ "kind": "veth", "bandwidth": {
        "ingressRate": 8000, "ingressBurst": 1_000_000, "egressRate": 16_000, "egressBurst": 1_000_000 } });
    let limited = |by| match LinkConfig::read(&link).unwrap().limited(by).unwrap() {
        LinkConfig::Veth(config) => config.bandwidth,
        other => panic!("{other:?}"),
    };
    let of = |ingress, egress| Bandwidth { ingress, egress };
    assert_eq!(limited(of(None, None)), of(rate(8000), rate(16_000)));
    assert_eq!(limited(of(rate(32_000), None)), of(rate(32_000), rate(16_000)));
    assert_eq!(limited(of(None, rate(32_000))), of(rate(8000), rate(32_000)));
}

#[test]
fn a_port_is_in_its_vlans_before_it_is_up() {
    let json = r#"{"kind":"bridge","bridge":"dc0","vlan":10,"vlanTrunk":[{"minID":100,"maxID":199}]}"#;
    let open = LinkRequest { policy: Policy::None, ..request(vec![address("10.0.0.2/24", None)], &[]) };
    let plan = plan(json, &open, &HostView::default()).unwrap();
    let joins = place(&plan, |o| matches!(o, Operation::Join { .. }));
    let tagged = place(&plan, |o| matches!(o, Operation::AddVlans { tagging: Tagging::Tagged, .. }));
    let untagged = place(&plan, |o| matches!(o, Operation::AddVlans { tagging: Tagging::Untagged, .. }));
    let leaves = place(&plan, |o| matches!(o, Operation::DeleteVlan { vlan, .. } if vlan.get() == 1));
    let up = place(&plan, |o| matches!(o, Operation::Up { master: Some(_), .. }));
    assert!([joins, tagged, untagged, leaves, up].is_sorted());
    assert!(plan.steps.iter().any(|s| matches!(s.operation, Operation::CreateBridge { vlan_filtering: true, .. })));
    assert_eq!(serde_json::to_string(&config(json)).unwrap(), json);
    // Policy knows no tags.
    let refused = self::plan(json, &LinkRequest { policy: Policy::Wanted, ..open.clone() }, &HostView::default());
    assert!(matches!(refused, Err(PlanError::Invalid { field: "link.vlanTrunk", .. })), "{refused:?}");
    let both = self::plan(&json.replace("100", "9"), &open, &HostView::default());
    assert!(
        matches!(&both, Err(PlanError::Invalid { field: "link.vlanTrunk", value, .. }) if value == "9-199"),
        "{both:?}"
    );
    for (bad, said) in [
        (r#"{"minID":9,"maxID":8}"#, "exchange minID and maxID"),
        (r#"{"id":9,"maxID":8}"#, "give one of these"),
        (r#"{"minID":9}"#, "give one of these"),
        (r#"{"id":4095}"#, "not between 1 and 4094"),
    ] {
        let link: Value =
            serde_json::from_str(&format!(r#"{{"kind":"bridge","bridge":"dc0","vlanTrunk":[{bad}]}}"#)).unwrap();
        let error = LinkConfig::read(&link).unwrap_err();
        assert!(error.field.starts_with("link.vlanTrunk") && error.reason.contains(said), "{bad}: {error}");
    }
}

#[test]
fn a_bridge_that_is_there_keeps_vlans_apart_if_it_is_ours() {
    let json = r#"{"kind":"bridge","bridge":"dc0","vlan":10}"#;
    let request = request(vec![address("10.0.0.2/24", None)], &[]);
    let of = |alias: Option<&str>, vlans| {
        let bridge = LinkView { alias: alias.map(Into::into), vlans, ..bridge_link(Some("bridge")) };
        plan(json, &request, &HostView { links: vec![bridge], ..Default::default() })
    };
    let apart = |filtering, default| Some(BridgeVlans { filtering, default });
    let filters = |plan: &Plan| plan.steps.iter().any(|s| matches!(s.operation, Operation::FilterVlans { .. }));
    let left = |plan: &Plan| {
        plan.steps.iter().find_map(|s| match s.operation {
            Operation::DeleteVlan { vlan, .. } => Some(vlan.get()),
            _ => None,
        })
    };
    let ours = of(Some("dcenet:shared/dc0"), apart(false, Some(vlan(1)))).unwrap();
    assert!(filters(&ours) && ours.makes_shared());
    let theirs = of(None, apart(true, Some(vlan(5)))).unwrap();
    assert_eq!((filters(&theirs), theirs.makes_shared(), left(&theirs)), (false, false, Some(5)));
    for default in [None, Some(vlan(10))] {
        assert_eq!(left(&of(None, apart(true, default)).unwrap()), None);
    }
    for (alias, vlans, said) in [
        (None, apart(false, Some(vlan(1))), "type bridge vlan_filtering 1"),
        (Some("dcenet:shared/dc0"), None, "CONFIG_BRIDGE_VLAN_FILTERING"),
    ] {
        let error = of(alias, vlans).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn the_default_vlan_has_the_bridge_as_its_gateway() {
    let open = |vlan| LinkRequest {
        policy: Policy::None,
        ..request(vec![LeasedAddress { vlan, ..address("10.0.0.2/24", Some("10.0.0.1")) }], &[])
    };
    let json = |id: u16| format!(r#"{{"kind":"bridge","bridge":"dc0","isGateway":true,"vlan":{id}}}"#);
    let of_pool = r#"{"kind":"bridge","bridge":"dc0","isGateway":true}"#;
    let there = |default| {
        let vlans = Some(BridgeVlans { filtering: true, default });
        HostView { links: vec![LinkView { vlans, ..bridge_link(Some("bridge")) }], ..Default::default() }
    };
    for (host, default) in [(HostView::default(), 1), (there(Some(vlan(1))), 1), (there(Some(vlan(7))), 7)] {
        for (json, pool, its) in [
            (json(default), None, "link.vlan"),
            (json(default), Some(vlan(default)), "ipam.pools[].vlan"),
            (of_pool.to_owned(), Some(vlan(default)), "ipam.pools[].vlan"),
        ] {
            match plan(&json, &open(pool), &host).unwrap_err() {
                PlanError::Invalid { field, value, reason } => {
                    assert_eq!((field, value), (its, default.to_string()));
                    assert!(reason.contains("itself the gateway") && reason.contains("drop"), "{reason}");
                }
                other => panic!("{other}"),
            }
        }
        // Any other is fine, and so is this one where nobody is its gateway.
        plan(&json(default + 1), &open(None), &host).unwrap();
        plan(&json(default).replace("true", "false"), &open(None), &host).unwrap();
    }
    plan(&json(1), &open(None), &there(None)).unwrap();
}

#[test]
fn a_trunk_leaves_the_vlan_of_frames_without_a_tag_out() {
    let open = LinkRequest { policy: Policy::None, ..request(vec![address("10.0.0.2/24", None)], &[]) };
    let json =
        |more: &str| format!(r#"{{"kind":"bridge","bridge":"dc0","vlanTrunk":[{{"minID":2,"maxID":4094}}{more}}}"#);
    let vlans = Some(BridgeVlans { filtering: true, default: Some(vlan(7)) });
    let seven = HostView { links: vec![LinkView { vlans, ..bridge_link(Some("bridge")) }], ..Default::default() };
    plan(&json("]"), &open, &HostView::default()).unwrap();
    // With one of its own the pod may have the default VLAN's frames with their tags.
    plan(&json(r#"],"vlan":100"#).replace("4094", "99"), &open, &seven).unwrap();
    for (json, host, value) in [(json(r#",{"id":1}]"#), HostView::default(), "1"), (json("]"), seven, "2-4094")] {
        match plan(&json, &open, &host).unwrap_err() {
            PlanError::Invalid { field: "link.vlanTrunk", value: told, reason } => {
                assert!(told == value && reason.contains("the default one of dc0"), "{told}: {reason}");
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn the_gateway_of_a_vlan_is_on_a_device_of_the_host() {
    let json = |bridge: &str| format!(r#"{{"kind":"bridge","bridge":"{bridge}","isGateway":true}}"#);
    let tagged = |id| LeasedAddress { vlan: Some(vlan(id)), ..address("10.0.0.2/24", Some("10.0.0.1")) };
    let request = |addresses| LinkRequest { policy: Policy::None, ..request(addresses, &[]) };
    for (bridge, name) in [("dc0", "dc0.4094"), ("a-longer-name", "dcb")] {
        let plan = plan(&json(bridge), &request(vec![tagged(4094)]), &HostView::default()).unwrap();
        let router = plan.router.clone().unwrap();
        assert!(router.as_str().starts_with(name), "{router}");
        assert_eq!(plan.entry(), Some(&router));
        let made = place(&plan, |o| matches!(o, Operation::CreateLink { link, .. } if link.name == router));
        let gateway = place(&plan, |o| matches!(o, Operation::AddAddress { link, .. } if *link == router));
        let own = place(&plan, |o| matches!(o, Operation::AddVlans { tagging: Tagging::Own, .. }));
        assert!(own < made && made < gateway);
        assert!(matches!(&plan.steps[gateway].undo, Some(Undo::DeleteIdleAddress { vlan: Some(_), .. })));
        // The bridge itself is nobody's router.
        let on_bridge = |o: &Operation| matches!(o, Operation::ForwardIpv4 { link } if link.as_str() == bridge);
        assert!(!plan.steps.iter().any(|s| on_bridge(&s.operation)));
    }
    let two = plan(&json("dc0"), &request(vec![tagged(7), tagged(8)]), &HostView::default());
    assert!(
        matches!(&two, Err(PlanError::Invalid { field: "ipam.pools[].vlan", value, .. }) if value == "8"),
        "{two:?}"
    );
    let other = r#"{"kind":"bridge","bridge":"dc0","vlan":9}"#;
    let other = plan(other, &request(vec![tagged(7)]), &HostView::default());
    assert!(matches!(&other, Err(PlanError::Invalid { field: "link.vlan", .. })), "{other:?}");
}
