//! The programs find the classes that the tables' builder put there.

use std::net::IpAddr;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::{self, MemberV6, NodeV6, Reason, Sizes};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::datapath::classes::{Classes, Write};
use dcenet_ebpf::datapath::{DenyAll, EmitClassifier, Exits, Spec};
use dcenet_ebpf::test_support::packet::*;
use ipnet::IpNet;

use crate::harness::*;

/// Allows everything; the rule is the peer's local id.
pub struct Reveal;

impl EmitClassifier for Reveal {
    fn emit(&self, asm: &mut Asm, exits: &Exits) {
        asm.mov(Exits::RULE, Exits::LOCAL_ID).jump(exits.allow());
    }
}

/// Makes the builder's stores.
pub fn store(pod: &Pod, writes: &[Write]) {
    pod.without_twin();
    for write in writes {
        let index = write.index();
        match write {
            Write::ClassV4 { pair, .. } | Write::ClassV6 { pair, .. } => {
                pod.array::<[u32; 2]>(write.map()).store(index, pair).unwrap();
            }
            Write::NodeV6 { node, .. } => pod.array::<NodeV6>(write.map()).store(index, node).unwrap(),
            Write::MemberV6 { member, .. } => pod.array::<MemberV6>(write.map()).store(index, member).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}

/// Local ids that are the classes plus 1000.
pub fn number_classes(pod: &Pod, classes: u32) {
    for class in 1..classes {
        pod.local_id(class, class as u16 + 1000);
    }
}

#[test]
fn every_prefix_length_and_member_is_found() {
    if !require(Rung::Kernel) {
        return;
    }
    let sizes = Sizes { event_bytes: 1 << 18, ..small() };
    let pod = Pod::with(&Spec::new(&sizes, &DenyAll { rule: 0 }, &Reveal));
    number_classes(&pod, 256);
    let mut classes = Classes::new(&sizes);
    let mut nets: Vec<(IpNet, u32)> = Vec::new();
    let mut class = 0;
    // Nested prefixes of every length, and neighbours beside some of them.
    for length in (0..=32).step_by(1) {
        class += 1;
        nets.push((IpNet::new("10.85.170.85".parse().unwrap(), length).unwrap().trunc(), class));
    }
    for length in (4..=128).step_by(4) {
        class += 1;
        let address = "fd55:aa55:aa55:aa55:aa55:aa55:aa55:aa55".parse().unwrap();
        nets.push((IpNet::new(address, length).unwrap().trunc(), class));
    }
    for text in ["10.85.170.0/24", "10.85.170.86/32", "192.0.2.0/25", "fd55:aa55:bb00::/40", "2001:db8::/32"] {
        class += 1;
        nets.retain(|(n, _)| n != &text.parse::<IpNet>().unwrap());
        nets.push((text.parse().unwrap(), class));
    }
    for i in 0..40 {
        class += 1;
        nets.push((format!("fd55:1::{i:x}/128").parse().unwrap(), class));
    }
    for (net, class) in &nets {
        store(&pod, &classes.insert(*net, *class).unwrap());
        // No program runs meanwhile.
        classes.settled();
    }
    let expected = |address: IpAddr| {
        let covering = nets.iter().filter(|(n, _)| n.contains(&address));
        covering.max_by_key(|(n, _)| n.prefix_len()).map_or(0, |(_, class)| class + 1000)
    };
    let step = |address: IpAddr, up: bool| match address {
        IpAddr::V4(a) => IpAddr::V4(u32::from(a).wrapping_add(if up { 1 } else { u32::MAX }).into()),
        IpAddr::V6(a) => IpAddr::V6(u128::from(a).wrapping_add(if up { 1 } else { u128::MAX }).into()),
    };
    let mut asked = 0;
    for (net, _) in &nets {
        let (first, last) = (net.network(), net.broadcast());
        for peer in [first, last, step(first, false), step(last, true)] {
            let pod_ip: IpAddr = if peer.is_ipv4() { POD4.into() } else { POD6.into() };
            asked += 1;
            let why = pod.run(Ingress, &eth().ip(peer, pod_ip).udp(asked, 53));
            assert_eq!(why, Some(Reason::Allowed));
            let told: Vec<u32> = pod.events().iter().map(|e| e.rule).collect();
            assert_eq!(told, [expected(peer)], "{peer}");
        }
    }
    assert!(asked > 400, "{asked} addresses");
    assert_eq!(expected("128.0.0.1".parse().unwrap()), 1001, "0.0.0.0/0 is the first class");
}

#[test]
fn a_child_where_none_can_be_leads_to_no_class() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = Pod::new(&DenyAll { rule: 0 }, &Reveal);
    number_classes(&pod, 256);
    // A trie that leads in a circle, as a broken writer might leave it.
    pod.class_v4(10, 0, abi::CHILD);
    let entries = pod.array::<[u32; 2]>(abi::CLASS_V4);
    for index in 0..256 {
        entries.store(index, &[abi::CHILD; 2]).unwrap();
    }
    let nodes = pod.array::<NodeV6>(abi::NODES_V6);
    nodes.store(0, &NodeV6 { entry: abi::CHILD | 1, ..NodeV6::default() }).unwrap();
    for index in 0..256 {
        pod.array::<[u32; 2]>(abi::CLASS_V6).store(index, &[abi::CHILD | 1; 2]).unwrap();
    }
    for (pod_ip, peer) in VERSIONS {
        assert_eq!(pod.run(Ingress, &eth().ip(peer, pod_ip).udp(1, 53)), Some(Reason::Allowed));
        assert_eq!(pod.events()[0].rule, 0);
    }
}
