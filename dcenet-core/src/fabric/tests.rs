//! The planner, by cases written by hand and against a naive reading of the rules.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;
use crate::model::{IfIndex, MacAddr};
use crate::provider::{FabricNode, FabricTable, Vtep};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn index(n: u32) -> IfIndex {
    IfIndex::new(n).unwrap()
}

fn node(n: u8, addresses: &[&str], mode: Mode) -> FabricNode {
    let addresses: Vec<IpAddr> = addresses.iter().map(|a| ip(a)).collect();
    let vtep =
        Vtep { address: addresses[0], mac: MacAddr::new([2, 0xdc, 0, 0, 0, n]), vni: 3534, port: 4789, mtu: None };
    FabricNode { name: format!("n{n}"), addresses, vtep: mode.has_vxlan().then_some(vtep), inside: Vec::new() }
}

fn table(nodes: &[FabricNode], pools: &[&str], prefixes: &[(&str, &str)]) -> FabricTable {
    FabricTable {
        nodes: nodes.iter().map(|n| (n.name.clone(), n.clone())).collect(),
        pools: pools.iter().map(|p| net(p)).collect(),
        prefixes: prefixes.iter().map(|(prefix, owner)| (net(prefix), (*owner).to_owned())).collect(),
    }
}

/// A host on 192.0.2.0/24 and 2001:db8::/64 by link 2, with default routes.
fn facts() -> HostFacts {
    let paths = [("192.0.2.0/24", Some(2)), ("2001:db8::/64", Some(2)), ("0.0.0.0/0", None), ("::/0", None)];
    HostFacts {
        addresses: BTreeMap::from([(ip("192.0.2.1"), index(2)), (ip("2001:db8::1"), index(2))]),
        paths: paths.iter().map(|(to, link)| (net(to), 0, link.map(index))).collect(),
        mtus: BTreeMap::from([(index(2), 1500)]),
        ..HostFacts::default()
    }
}

fn config(mode: Mode) -> FabricConfig {
    FabricConfig { mode, ..FabricConfig::default() }
}

#[test]
fn each_mode_leads_as_it_says() {
    let prefixes = [("10.0.0.0/26", "n1"), ("10.0.0.64/26", "n2"), ("10.0.0.128/26", "n3"), ("fd00::40/122", "n2")];
    let unreachable = |p: &str| (net(p), Hop::Unreachable);
    let direct = |p: &str, g: &str| (net(p), Hop::Direct { link: index(2), gateway: ip(g) });
    let tunnel = |p: &str, g: &str| (net(p), Hop::Vxlan { gateway: ip(g), mtu: None });
    let own = [unreachable("10.0.0.0/16"), unreachable("fd00::/64"), unreachable("10.0.0.0/26")];
    let near = [direct("10.0.0.64/26", "192.0.2.2"), direct("fd00::40/122", "2001:db8::2")];
    for (mode, expected, problems) in [
        (Mode::Route, [own.to_vec(), near.to_vec(), vec![unreachable("10.0.0.128/26")]].concat(), 1),
        (Mode::Auto, [own.to_vec(), near.to_vec(), vec![tunnel("10.0.0.128/26", "10.0.0.128")]].concat(), 0),
        (
            Mode::Vxlan,
            [
                own.to_vec(),
                vec![
                    tunnel("10.0.0.64/26", "10.0.0.64"),
                    tunnel("10.0.0.128/26", "10.0.0.128"),
                    tunnel("fd00::40/122", "fe80::dc:ff:fe00:2"),
                ],
            ]
            .concat(),
            0,
        ),
    ] {
        let nodes = [
            node(1, &["192.0.2.1", "2001:db8::1"], mode),
            node(2, &["192.0.2.2", "2001:db8::2"], mode),
            node(3, &["198.51.100.3"], mode),
        ];
        let table = table(&nodes, &["10.0.0.0/16", "fd00::/64"], &prefixes);
        let wanted = plan(&table, &nodes[0], &facts(), &config(mode));
        assert_eq!(wanted.routes, BTreeMap::from_iter(expected), "{mode:?}");
        assert_eq!(wanted.problems.len(), problems, "{mode:?}: {:?}", wanted.problems);
        assert_eq!(wanted.mtu, mode.has_vxlan().then_some(1450));
    }
}

#[test]
fn an_address_inside_is_used_where_others_lead_it_here() {
    let mut own = node(1, &["192.0.2.1"], Mode::Auto);
    own.inside = ["10.0.0.1", "10.0.0.9", "10.0.0.65", "fd00::1"].map(ip).to_vec();
    let prefixes = [("10.0.0.0/26", "n1"), ("10.0.0.9/32", "n2"), ("10.0.0.64/26", "n2")];
    let table = table(&[own.clone()], &["10.0.0.0/16", "fd00::/64"], &prefixes);
    assert_eq!(plan(&table, &own, &facts(), &config(Mode::Auto)).inside, [ip("10.0.0.1")].into());
    own.vtep = None;
    assert!(plan(&table, &own, &facts(), &config(Mode::Route)).inside.is_empty());
}

#[test]
fn the_overhead_is_that_of_the_underlays_family() {
    let nodes = [node(1, &["2001:db8::1"], Mode::Vxlan), node(2, &["2001:db8:9::2"], Mode::Vxlan)];
    let table = table(&nodes, &["10.0.0.0/16"], &[("10.0.0.64/26", "n2")]);
    let wanted = plan(&table, &nodes[0], &facts(), &config(Mode::Vxlan));
    assert_eq!(wanted.mtu, Some(1430));
    assert_eq!(wanted.forwarding, BTreeMap::from([(MacAddr::new([2, 0xdc, 0, 0, 0, 2]), ip("2001:db8:9::2"))]));
}

#[test]
fn what_cannot_be_is_told_with_a_remedy() {
    let own = node(1, &["192.0.2.1"], Mode::Auto);
    let far = |change: fn(&mut FabricNode)| {
        let mut far = node(2, &["198.51.100.2"], Mode::Auto);
        change(&mut far);
        far
    };
    let cases: [(FabricNode, &str); 6] = [
        (far(|n| n.vtep.as_mut().unwrap().mac = MacAddr::new([2, 0, 0, 0, 0, 2])), "which begin with 02:dc"),
        (far(|n| n.vtep.as_mut().unwrap().address = ip("192.0.2.1")), "correct fabric.addresses of one"),
        (far(|n| n.vtep.as_mut().unwrap().vni = 7), "use the same fabric.mode, vni, port and family"),
        (far(|n| n.vtep.as_mut().unwrap().mac = MacAddr::new([2, 0xdc, 0, 0, 0, 1])), "rename one"),
        (far(|n| n.addresses = vec![ip("192.0.2.1")]), "correct fabric.addresses of one"),
        (far(|n| n.vtep = None), "takes in no VXLAN"),
    ];
    for (other, told) in cases {
        let table = table(&[own.clone(), other], &["10.0.0.0/16"], &[("10.0.0.64/26", "n2")]);
        let wanted = plan(&table, &own, &facts(), &config(Mode::Auto));
        assert!(wanted.problems.iter().any(|p| p.contains(told)), "{told}: {:?}", wanted.problems);
        assert!(wanted.routes.values().all(|hop| *hop == Hop::Unreachable), "{:?}", wanted.routes);
    }
    let peers = [own.clone(), node(2, &["198.51.100.2"], Mode::Auto)];
    let table = table(&peers, &["10.0.0.0/16"], &[("10.0.0.64/26", "n2"), ("10.0.0.0/26", "n1")]);
    let mut facts = facts();
    facts.pods = vec![("dc1".into(), 1500), ("dc2".into(), 1450)];
    facts.bridged = vec![(net("10.0.0.0/16"), "dc0".into())];
    let wanted = plan(&table, &own, &facts, &config(Mode::Auto));
    let told = wanted.problems.join("\n");
    assert!(told.contains("link dc1") && told.contains("1450 or less") && !told.contains("dc2"), "{told}");
    assert!(told.contains("bridge dc0") && told.contains("use link.kind veth"), "{told}");
    assert!(!wanted.routes.contains_key(&net("10.0.0.0/26")), "pods on the bridge must stay in reach");
}

#[test]
fn no_pool_and_no_block_cuts_the_underlay_off() {
    let nodes = [node(1, &["192.0.2.1"], Mode::Auto), node(2, &["198.51.100.2"], Mode::Auto)];
    let mut facts = facts();
    facts.routers.insert((ip("192.0.2.254"), index(2)));
    let far = ("198.51.100.0/26", "n2");
    type Blocks<'a> = &'a [(&'a str, &'a str)];
    let cases: [(&str, Blocks<'_>, &[&str]); 3] = [
        ("192.0.2.128/25", &[], &["pool 192.0.2.128/25: 192.0.2.254, a router's, is in it"]),
        (
            "198.51.100.0/24",
            &[far],
            &[
                "pool 198.51.100.0/24: 198.51.100.2, node n2's, is in it",
                "prefix 198.51.100.0/26 of node n2: 198.51.100.2, node n2's, is in it",
            ],
        ),
        // The segment's own route goes before that of a pool as large, and after that of a block.
        ("192.0.2.0/24", &[("192.0.2.192/26", "n2")], &["prefix 192.0.2.192/26 of node n2: 192.0.2.254, a router's"]),
    ];
    for (pool, prefixes, told) in cases {
        let prefixes: Vec<_> = [("10.0.0.64/26", "n2")].iter().chain(prefixes).copied().collect();
        let wanted = plan(&table(&nodes, &["10.0.0.0/16", pool], &prefixes), &nodes[0], &facts, &config(Mode::Auto));
        assert_eq!(wanted.problems.len(), told.len(), "{:?}", wanted.problems);
        for told in told {
            assert!(wanted.problems.iter().any(|p| p.starts_with(told)), "{told}: {:?}", wanted.problems);
        }
        let mut led: Vec<IpNet> = wanted.routes.keys().copied().collect();
        led.retain(|prefix| *prefix != net("192.0.2.0/24"));
        assert_eq!(led, [net("10.0.0.0/16"), net("10.0.0.64/26")], "{pool}");
    }
    // Its twin: what holds nothing of the underlay but the own address, before which no route goes, is led, in a pool that is
    // the segment's, too.
    let prefixes = [("10.0.0.64/26", "n2"), ("192.0.2.0/26", "n2"), ("192.0.2.128/26", "n1")];
    let wanted =
        plan(&table(&nodes, &["10.0.0.0/16", "192.0.2.0/24"], &prefixes), &nodes[0], &facts, &config(Mode::Auto));
    assert_eq!((wanted.routes.len(), wanted.problems.len()), (5, 0), "{:?}", wanted.problems);
    // A route of the segment that stands behind the fabric's does not keep it in reach.
    facts.paths[0].1 = METRIC + 1;
    let wanted = plan(&table(&nodes, &["192.0.2.0/24"], &[]), &nodes[0], &facts, &config(Mode::Auto));
    assert!(wanted.problems.iter().any(|p| p.contains("192.0.2.254, a router's")), "{:?}", wanted.problems);
}

#[test]
fn what_fits_less_on_the_way_to_a_node_is_in_the_route_to_it() {
    let own = node(1, &["192.0.2.1"], Mode::Vxlan);
    let near = node(2, &["192.0.2.2"], Mode::Vxlan);
    let mut far = node(3, &["198.51.100.3"], Mode::Vxlan);
    let mut facts = facts();
    facts.mtus = BTreeMap::from([(index(2), 9000), (index(3), 1400)]);
    facts.exits = vec![(net("192.0.2.0/24"), 0, index(2)), (net("0.0.0.0/0"), 0, index(3))];
    let prefixes = [("10.0.0.64/26", "n2"), ("10.0.1.64/26", "n3"), ("fd00::40/122", "n3")];
    let planned = |facts: &HostFacts, far: &FabricNode| {
        let table = table(&[own.clone(), near.clone(), far.clone()], &["10.0.0.0/16", "fd00::/64"], &prefixes);
        let wanted = plan(&table, &own, facts, &config(Mode::Vxlan));
        let of = |prefix: &str| match wanted.routes[&net(prefix)] {
            Hop::Vxlan { mtu, .. } => mtu,
            hop => panic!("{prefix}: {hop:?}"),
        };
        let mtus = [of("10.0.0.64/26"), of("10.0.1.64/26"), of("fd00::40/122")];
        (wanted.mtu, mtus, wanted.problems)
    };
    let mut of = |told: Option<u32>| {
        far.vtep.as_mut().unwrap().mtu = told;
        planned(&facts, &far)
    };
    assert_eq!(of(None), (Some(8950), [None, Some(1350), Some(1350)], vec![]), "by the link of its router");
    assert_eq!(of(Some(9000)).1, [None, Some(1350), Some(1350)]);
    assert_eq!(of(Some(1300)).1, [None, Some(1300), Some(1300)], "by what it tells");
    let (own_mtu, mtus, problems) = of(Some(1));
    assert_eq!((own_mtu, mtus), (Some(8950), [None, Some(68), Some(1280)]), "no less than a link must carry");
    assert!(problems.len() == 1 && problems[0].starts_with("node n3: VXLAN carries 1 bytes"), "{problems:?}");
    // The own address is on a link that leads nowhere, as routers have it.
    let mut facts = facts.clone();
    facts.addresses.insert(ip("192.0.2.1"), index(1));
    far.vtep.as_mut().unwrap().mtu = None;
    assert_eq!(planned(&facts, &far).0, Some(1350), "by the default route's");
}

#[test]
fn a_configuration_that_cannot_be_is_refused_with_its_field() {
    for (text, told) in [
        (r#"{ "vni": 0 }"#, "fabric.vni: 0"),
        (r#"{ "vni": 16777216 }"#, "fabric.vni: 16777216"),
        (r#"{ "port": 0 }"#, "fabric.port: 0"),
        (r#"{ "addresses": ["127.0.0.1"] }"#, "fabric.addresses[0]: 127.0.0.1"),
        (r#"{ "addresses": ["192.0.2.1", "192.0.2.2"] }"#, "fabric.addresses[1]: 192.0.2.2"),
        (r#"{ "addresses": ["192.0.2.1", "fe80::1"] }"#, "fabric.addresses[1]: fe80::1"),
    ] {
        let config: FabricConfig = serde_json::from_str(text).unwrap();
        let error = config.check().unwrap_err().to_string();
        assert!(error.starts_with(told), "{text}: {error}");
    }
    FabricConfig::default().check().unwrap();
}

/// Where a packet goes, read off the rules of the module's page, one address at a time.
fn naive(table: &FabricTable, own: &str, mode: Mode, to: IpAddr) -> String {
    let mut best: Option<(u8, &str)> = None;
    for (prefix, owner) in &table.prefixes {
        if prefix.contains(&to) && best.is_none_or(|(length, _)| length < prefix.prefix_len()) {
            best = Some((prefix.prefix_len(), owner));
        }
    }
    let in_pool = table.pools.iter().any(|pool| pool.contains(&to));
    let Some((_, owner)) = best else { return if in_pool { "nobody" } else { "elsewhere" }.into() };
    if owner == own {
        return "nobody".into();
    }
    let Some(peer) = table.nodes.get(owner) else { return "nobody".into() };
    let near = peer.addresses.iter().any(|a| a.is_ipv4() && a.to_string().starts_with("192.0.2."));
    match (mode, near) {
        (Mode::Route | Mode::Auto, true) => format!("straight to {owner}"),
        (Mode::Auto | Mode::Vxlan, _) => format!("tunnel to {owner}"),
        (Mode::Route, false) => "nobody".into(),
    }
}

/// Where a packet goes by the plan: the longest prefix, then device, neighbour and forwarding.
fn planned(wanted: &Wanted, table: &FabricTable, to: IpAddr) -> String {
    let leads = wanted.routes.iter().filter(|(prefix, _)| prefix.contains(&to));
    let owner_at =
        |address: IpAddr| table.nodes.values().find(|n| n.addresses.contains(&address)).unwrap().name.clone();
    match leads.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, hop)| *hop) {
        None => "elsewhere".into(),
        Some(Hop::Unreachable) => "nobody".into(),
        Some(Hop::Direct { gateway, .. }) => format!("straight to {}", owner_at(gateway)),
        Some(Hop::Vxlan { gateway, mtu: _ }) => {
            format!("tunnel to {}", owner_at(wanted.forwarding[&wanted.neighbours[&gateway]]))
        }
    }
}

proptest! {
    #[test]
    fn every_address_goes_where_the_rules_say(
        mode in prop::sample::select(vec![Mode::Auto, Mode::Route, Mode::Vxlan]),
        near in prop::collection::vec(any::<bool>(), 6),
        known in prop::collection::vec(prop::bool::weighted(0.9), 6),
        blocks in prop::collection::btree_map(0u8..16, 0usize..6, 0..16),
        single in prop::collection::btree_map(any::<u8>(), 0usize..6, 0..12),
        to in prop::collection::vec(any::<u8>(), 32),
    ) {
        let mut all = Vec::new();
        for (i, near) in near.iter().enumerate() {
            let network = if *near || i == 0 { "192.0.2" } else { "198.51.100" };
            let one = node(i as u8 + 1, &[&format!("{network}.{}", i + 1)], mode);
            if known[i] || i == 0 {
                all.push(one);
            }
        }
        let name = |owner: usize| format!("n{}", owner + 1);
        let mut table = table(&all, &["10.0.0.0/24"], &[]);
        table.prefixes.extend(blocks.iter().map(|(b, owner)| (net(&format!("10.0.0.{}/28", b * 16)), name(*owner))));
        table.prefixes.extend(single.iter().map(|(a, owner)| (net(&format!("10.0.0.{a}/32")), name(*owner))));
        let wanted = plan(&table, &all[0], &facts(), &config(mode));
        for to in to {
            let to = ip(&format!("10.0.0.{to}"));
            let expected = naive(&table, "n1", mode, to);
            prop_assert_eq!(planned(&wanted, &table, to), expected, "{}", to);
        }
        let to = ip("10.0.1.1");
        prop_assert_eq!(planned(&wanted, &table, to), "elsewhere");
    }
}
