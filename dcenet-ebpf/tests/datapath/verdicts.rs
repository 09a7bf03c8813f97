//! Each row of the verdict table, with the twin that passes where the row's guard is not met.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::{self, Endpoint, Reason};
use dcenet_ebpf::datapath::guard::FROM_GUARDED;
use dcenet_ebpf::datapath::{self, AllowAll, DenyAll, EmitClassifier, Slot, Spec};
use dcenet_ebpf::test_support::packet::*;
use dcenet_ebpf::vm::{Environment, Maps, Skb, Update, Vm};

use crate::harness::*;

fn open() -> Pod {
    Pod::new(&AllowAll { rule: 1 }, &AllowAll { rule: 2 })
}

fn shut() -> Pod {
    Pod::new(&DenyAll { rule: 3 }, &DenyAll { rule: 4 })
}

fn undecided() -> Pod {
    Pod::load(&datapath::default_program(&small()).unwrap(), &[])
}

/// One packet of every kind that can be a flow.
fn flows(direction: dcenet_ebpf::abi::Direction) -> Vec<Packet> {
    let mut packets = Vec::new();
    for addresses in VERSIONS {
        let (from, to) = way(direction, addresses);
        packets.extend([
            eth().ip(from, to).tcp(40000, 80, SYN),
            eth().ip(from, to).udp(40000, 53).payload(9),
            eth().ip(from, to).sctp(40000, 7).payload(4),
            eth().ip(from, to).echo_request(77),
            eth().ip(from, to).protocol(47).payload(8),
            eth().vlan(5).ip(from, to).tcp(40001, 80, SYN),
            eth().tag(0x88a8, 6).vlan(5).ip(from, to).tcp(40002, 80, SYN),
        ]);
    }
    packets
}

#[test]
fn a_first_packet_is_allowed_and_the_next_one_is_known() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        let pod = open();
        for packet in flows(direction) {
            pod.expect(direction, &packet, Some(Reason::Allowed));
            pod.expect(direction, &packet, None);
        }
    }
}

#[test]
fn a_tag_passes_trunks_alone() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        let pod = open();
        let access = Endpoint::new(Some(POD4), Some(POD6), Some(POD_LINK_LOCAL));
        for addresses in VERSIONS {
            let (from, to) = way(direction, addresses);
            for tag in [0x8100, 0x88a8] {
                // VLAN 0 carries a priority alone (IEEE 802.1Q).
                for id in [0, 5] {
                    let packet = eth().tag(tag, id).ip(from, to).udp(40000, 53);
                    pod.set_endpoint(&access);
                    pod.expect(direction, &packet, Some(Reason::Tagged));
                    assert_eq!(pod.flows().entries(), []);
                }
            }
            // As the kernel hands it over: the tag beside the packet. A test run cannot, so it is the VM alone.
            let frame = eth().ip(from, to).udp(40000, 53).bytes();
            assert_eq!(pod.run_beside(direction, &frame), TC_ACT_SHOT);
            pod.set_endpoint(&access.as_trunk());
            assert_eq!(pod.run_beside(direction, &frame), TC_ACT_UNSPEC);
        }
        pod.set_endpoint(&access);
        pod.expect(direction, &eth().vlan(5).arp(1, POD4, PEER4), Some(Reason::Tagged));
        let undecided = undecided();
        undecided.set_endpoint(&access);
        undecided.expect(direction, &eth().vlan(5).arp(1, POD4, PEER4), Some(Reason::Tagged));
        undecided.expect(direction, &eth().arp(1, POD4, PEER4), Some(Reason::Neighbour));
    }
}

#[test]
fn nothing_passes_where_everything_is_denied() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = shut();
    for direction in [Egress, Ingress] {
        for packet in flows(direction) {
            pod.expect(direction, &packet, Some(Reason::Denied));
            pod.expect(direction, &packet, Some(Reason::Denied));
        }
    }
    assert_eq!(pod.flows().entries(), []);
    assert_eq!((pod.rule(3).packets, pod.rule(4).packets), (28, 28));
}

#[test]
fn nothing_but_neighbours_passes_until_the_policy_is_known() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = undecided();
    for direction in [Egress, Ingress] {
        for packet in flows(direction) {
            // Whether the endpoint is a trunk, the default program towards it cannot know.
            let tagged = matches!(packet.bytes()[12..14], [0x81, 0] | [0x88, 0xa8]);
            let reason = if tagged && direction == Ingress { Reason::Tagged } else { Reason::PolicyUnknown };
            pod.expect(direction, &packet, Some(reason));
        }
    }
    pod.expect(Egress, &eth().arp(1, POD4, PEER4), Some(Reason::Neighbour));
    pod.expect(Ingress, &eth().arp(2, PEER4, POD4), Some(Reason::Neighbour));
    pod.expect(Egress, &eth().ipv6(POD6, PEER6).neighbour(136, POD6), Some(Reason::Neighbour));
    pod.expect(Ingress, &eth().ipv6(PEER6, POD6).neighbour(136, PEER6), Some(Reason::Neighbour));
    pod.expect(Egress, &eth().arp(2, PEER4, POD4), Some(Reason::NeighbourRefused));

    // With no endpoint in the slot the pod has no address of its own.
    pod.set_endpoint(&Endpoint::default());
    pod.expect(Egress, &eth().arp(1, POD4, PEER4), Some(Reason::NeighbourRefused));
    pod.expect(Ingress, &eth().arp(2, PEER4, POD4), Some(Reason::Neighbour));
}

#[test]
fn the_peers_class_decides_and_an_unknown_peer_has_none() {
    if !require(Rung::Kernel) {
        return;
    }
    // Local id 9 may be reached at TCP port 80, and may reach port 22; rule numbers are places in the lists.
    let (egress, ingress) = (List(vec![(9, 6, 80)]), List(vec![(9, 6, 22), (9, 6, 23)]));
    let pod = Pod::new(&egress, &ingress);
    let known = Ipv4Addr::new(10, 7, 0, 1);
    pod.class_v4(10, 7, 5);
    pod.expect(Egress, &eth().ipv4(POD4, known).tcp(1000, 80, SYN), Some(Reason::Denied));
    pod.local_id(5, 9);
    pod.expect(Egress, &eth().ipv4(POD4, known).tcp(1000, 80, SYN), Some(Reason::Allowed));
    pod.expect(Egress, &eth().ipv4(POD4, known).tcp(1000, 81, SYN), Some(Reason::Denied));
    pod.expect(Egress, &eth().ipv4(POD4, known).udp(1000, 80), Some(Reason::Denied));
    pod.expect(Egress, &eth().ipv4(POD4, PEER4).tcp(1000, 80, SYN), Some(Reason::Denied));
    pod.expect(Ingress, &eth().ipv4(known, POD4).tcp(1001, 23, SYN), Some(Reason::Allowed));
    pod.expect(Ingress, &eth().ipv4(known, POD4).tcp(1001, 80, SYN), Some(Reason::Denied));
    pod.expect(Ingress, &eth().ipv4(PEER4, POD4).tcp(1001, 23, SYN), Some(Reason::Denied));
    assert_eq!((pod.rule(0).packets, pod.rule(1).packets, pod.rule(63).packets), (1, 1, 6));
}

#[test]
fn icmp_is_asked_by_type_and_code() {
    if !require(Rung::Kernel) {
        return;
    }
    let list = List(vec![(0, 1, 13 << 8), (0, 58, 130 << 8 | 1), (0, 1, 8 << 8), (0, 58, 128 << 8)]);
    for direction in [Egress, Ingress] {
        let pod = Pod::new(&list, &list);
        let (from, to) = way(direction, VERSIONS[0]);
        pod.expect(direction, &eth().ip(from, to).icmp(13, 0, [0; 4]), Some(Reason::Allowed));
        pod.expect(direction, &eth().ip(from, to).icmp(13, 1, [0; 4]), Some(Reason::Denied));
        pod.expect(direction, &eth().ip(from, to).echo_request(1), Some(Reason::Allowed));
        let (from, to) = way(direction, VERSIONS[1]);
        pod.expect(direction, &eth().ip(from, to).icmp(130, 1, [0; 4]), Some(Reason::Allowed));
        pod.expect(direction, &eth().ip(from, to).icmp(130, 0, [0; 4]), Some(Reason::Denied));
        pod.expect(direction, &eth().ip(from, to).echo_request(1), Some(Reason::Allowed));
        // A number of the other version's ICMP is no ICMP.
        pod.expect(direction, &eth().ip(from, to).protocol(1).data([13, 0, 0, 0, 0, 0, 0, 0]), Some(Reason::Denied));
    }
}

#[test]
fn a_source_that_is_not_the_pods_own_is_dropped() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = open();
    let strangers4 = [PEER4, Ipv4Addr::UNSPECIFIED, Ipv4Addr::new(10, 0, 0, 0), Ipv4Addr::BROADCAST];
    let strangers6 = [PEER6, Ipv6Addr::UNSPECIFIED, ROUTER6, POD4.to_ipv6_mapped()];
    let strangers = strangers4.map(IpAddr::V4).into_iter().chain(strangers6.map(IpAddr::V6));
    for stranger in strangers {
        let to = if stranger.is_ipv4() { IpAddr::V4(PEER4) } else { IpAddr::V6(PEER6) };
        let frames = [
            eth().ip(stranger, to).tcp(1, 2, SYN),
            eth().ip(stranger, to).udp(1, 2),
            eth().ip(stranger, to).sctp(1, 2),
            eth().ip(stranger, to).echo_request(1),
            eth().ip(stranger, to).protocol(50).payload(20),
            eth().vlan(9).ip(stranger, to).udp(1, 2),
            eth().ip(stranger, to).fragment(1, 0, true).udp(1, 2).payload(8),
            eth().ip(stranger, to).fragment(1, 8, true).udp(1, 2).payload(8),
            eth().ip(stranger, to).options(&[1, 1, 1, 1]).extension(HOP_BY_HOP, 0).udp(1, 2),
        ];
        for packet in frames {
            pod.expect(Egress, &packet, Some(Reason::Spoofed));
        }
    }
    assert_eq!(pod.flows().entries(), []);
    pod.expect(Egress, &eth().ipv6(POD_LINK_LOCAL, PEER6).udp(1, 2), Some(Reason::Allowed));
    // Towards the pod the source is the peer, whoever it is.
    pod.expect(Ingress, &eth().ipv4(ROUTER4, POD4).udp(1, 2), Some(Reason::Allowed));

    // A pod without addresses has no source of its own, and the unspecified one is none.
    pod.set_endpoint(&Endpoint::new(None, None, None));
    for packet in [
        eth().ipv4(POD4, PEER4).udp(1, 2),
        eth().ipv4(Ipv4Addr::UNSPECIFIED, PEER4).udp(1, 2),
        eth().ipv6(Ipv6Addr::UNSPECIFIED, PEER6).udp(1, 2),
    ] {
        pod.expect(Egress, &packet, Some(Reason::Spoofed));
    }
}

#[test]
fn the_pod_speaks_arp_for_itself_alone() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = open();
    let (none, pass, refuse) = (Ipv4Addr::UNSPECIFIED, Some(Reason::Neighbour), Some(Reason::NeighbourRefused));
    for operation in [1, 2] {
        pod.expect(Egress, &eth().arp(operation, POD4, PEER4), pass);
        pod.expect(Egress, &eth().vlan(3).arp(operation, POD4, POD4), pass);
        pod.expect(Egress, &eth().arp(operation, none, POD4), pass);
        pod.expect(Egress, &eth().arp(operation, none, PEER4), refuse);
        pod.expect(Egress, &eth().arp(operation, PEER4, POD4), refuse);
        pod.expect(Egress, &eth().arp(operation, Ipv4Addr::new(10, 0, 1, 1), POD4), refuse);
        pod.expect(Ingress, &eth().arp(operation, PEER4, POD4), pass);
    }
    // Reverse and inverse ARP (RFC 903, RFC 2390).
    for operation in [0, 3, 4, 8, 9, 257] {
        pod.expect(Egress, &eth().arp(operation, POD4, PEER4), refuse);
        pod.expect(Ingress, &eth().arp(operation, PEER4, POD4), pass);
    }
    let frame = eth().arp(1, POD4, PEER4).bytes();
    for (at, byte) in [(15, 6), (17, 1), (18, 8), (19, 6)] {
        let mut odd = frame.clone();
        odd[at] = byte;
        assert_eq!(pod.run_bytes(Egress, &odd), refuse, "byte {at}");
    }
    for length in 14..42 {
        assert_eq!(pod.run_bytes(Egress, &frame[..length]), Some(Reason::Malformed), "{length} bytes");
    }
    pod.set_endpoint(&Endpoint::new(None, Some(POD6), None));
    pod.expect(Egress, &eth().arp(1, none, none), refuse);
}

#[test]
fn arp_is_no_way_past_the_policy() {
    if !require(Rung::Kernel) {
        return;
    }
    let (pass, refuse) = (Some(Reason::Neighbour), Some(Reason::NeighbourRefused));
    for pod in [shut(), undecided()] {
        for direction in [Egress, Ingress] {
            let (sender, target) = if direction == Egress { (POD4, PEER4) } else { (PEER4, POD4) };
            let behind = |frame: Vec<u8>, length: usize| {
                assert!(frame.len() <= length);
                let padding = vec![0x5a; length - frame.len()];
                pod.run_bytes(direction, &[frame, padding].concat())
            };
            let frame = || eth().arp(1, sender, target).bytes();
            // The padding of the least frame, and what is more than that; what comes from the wire may have a trailer.
            let most = if direction == Egress { 60 } else { 124 };
            for (length, why) in [(42, pass), (43, pass), (60, pass), (most, pass), (most + 1, refuse), (1514, refuse)]
            {
                assert_eq!(behind(frame(), length), why, "{direction:?}, {length} bytes");
            }
        }
    }
    // A tag makes it longer.
    let pod = shut();
    for (length, why) in [(46, pass), (64, pass), (65, refuse)] {
        let mut frame = eth().vlan(5).arp(1, POD4, PEER4).bytes();
        frame.resize(length, 0);
        assert_eq!(pod.run_bytes(Egress, &frame), why, "{length} bytes, tagged");
    }
}

/// A bridge that snoops brings questions for the pod's address to the pod only where it has heard the pod's reports.
#[test]
fn the_pod_tells_its_groups_whatever_the_policy_is() {
    if !require(Rung::Kernel) {
        return;
    }
    let group = |text: &str| -> Ipv6Addr { text.parse().unwrap() };
    let (all, routers) = (group("ff02::16"), group("ff02::2"));
    let own = group("ff02::1:ff00:1");
    // RFC 3810, section 5.2: a record is of type, auxiliary data, number of sources, group.
    let record = |group: Ipv6Addr| [&[4, 0, 0, 0][..], &group.octets()].concat();
    let base = |source, destination| eth().ipv6(source, destination).extension(HOP_BY_HOP, 0);
    let report = |packet: Packet, groups: &[Ipv6Addr]| {
        let records = groups.iter().flat_map(|g| record(*g)).collect::<Vec<u8>>();
        packet.icmp(143, 0, [0, 0, 0, groups.len() as u8]).data(records)
    };
    let single = |packet: Packet, kind: u8, group: Ipv6Addr| packet.icmp(kind, 0, [0; 4]).data(group.octets());
    let bytes = |packet: &Packet, hop_limit: u8| {
        let mut frame = packet.bytes();
        frame[21] = hop_limit;
        frame
    };
    let none = Ipv6Addr::UNSPECIFIED;
    let router = group("fe80::99");
    let pass = Some(Reason::Neighbour);
    for pod in [shut(), undecided()] {
        for source in [POD6, POD_LINK_LOCAL, none] {
            for packet in [
                report(base(source, all), &[own]),
                report(base(source, all), &[own, group("ff02::fb"), own, own]),
                single(base(source, own), 131, own),
                single(base(source, routers), 132, own),
            ] {
                assert_eq!(pod.run_bytes(Egress, &bytes(&packet, 1)), pass, "{packet:?}");
            }
        }
        for (kind, sources) in [(130, &[][..]), (130, &[2, 125, 0, 0])] {
            let question = base(router, group("ff02::1")).icmp(kind, 0, [0; 4]);
            let question = question.data([&none.octets()[..], sources].concat());
            assert_eq!(pod.run_bytes(Ingress, &bytes(&question, 1)), pass, "{question:?}");
        }
    }
    // What is not just that is judged.
    let pod = shut();
    let long = vec![own; 5];
    let mut with_data = report(base(POD6, all), &[own]);
    with_data = with_data.clone().data([&record(own)[..], &[0; 40]].concat());
    let mut auxiliary = record(own);
    auxiliary[1] = 1;
    let mut sources = record(own);
    sources[3] = 1;
    let raw = |data: &[u8]| base(POD6, all).icmp(143, 0, [0, 0, 0, 1]).data(data);
    let denied = Some(Reason::Denied);
    let table = [
        (report(base(POD6, all), &long), 1, denied),
        (report(base(POD6, all), &[]), 1, denied),
        (report(base(POD6, all), &[own, group("ff05::2")]), 1, denied),
        (report(base(POD6, all), &[own]), 64, denied),
        (report(base(POD6, PEER6), &[own]), 1, denied),
        (report(base(POD6, group("ff05::2")), &[own]), 1, denied),
        (report(base(PEER6, all), &[own]), 1, Some(Reason::Spoofed)),
        (report(base(none, group("ff05::2")), &[own]), 1, Some(Reason::Spoofed)),
        (report(eth().ipv6(POD6, all), &[own]), 1, denied),
        (report(eth().ipv6(POD6, all).extension(HOP_BY_HOP, 30), &[own]), 1, denied),
        (report(base(POD6, all).extension(DESTINATION_OPTIONS, 30), &[own]), 1, denied),
        (with_data, 1, denied),
        (raw(&auxiliary), 1, denied),
        (raw(&sources), 1, denied),
        (single(base(POD6, own), 131, group("ff05::2")), 1, denied),
        (single(base(POD6, own), 131, own).data([&own.octets()[..], &[0; 8]].concat()), 1, denied),
        (single(base(POD6, own), 130, own), 1, denied),
    ];
    for (packet, hop_limit, why) in table {
        assert_eq!(pod.run_bytes(Egress, &bytes(&packet, hop_limit)), why, "hop limit {hop_limit}: {packet:?}");
    }
    let behind = [bytes(&report(base(POD6, all), &[own]), 1), vec![0x5a; 40]].concat();
    assert_eq!(pod.run_bytes(Egress, &behind), denied, "bytes behind the packet");
    let question = |source, destination, data: &[u8]| {
        bytes(&base(source, destination).icmp(130, 0, [0; 4]).data([&none.octets()[..], data].concat()), 1)
    };
    for frame in [
        question(PEER6, group("ff02::1"), &[]),
        question(router, POD6, &[]),
        question(router, group("ff02::1"), &[0; 20]),
        bytes(&report(base(router, all), &[own]), 1),
    ] {
        assert_eq!(pod.run_bytes(Ingress, &frame), denied, "{frame:x?}");
    }
    assert_eq!(pod.flows().entries(), []);
}

#[test]
fn the_pod_speaks_neighbour_discovery_for_itself_alone() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = open();
    let (none, pass, refuse) = (Ipv6Addr::UNSPECIFIED, Some(Reason::Neighbour), Some(Reason::NeighbourRefused));
    let table = [
        // Solicitations: by source, or unspecified for the pod's own address.
        (135, POD6, PEER6, pass),
        (135, POD_LINK_LOCAL, PEER6, pass),
        (135, none, POD6, pass),
        (135, none, POD_LINK_LOCAL, pass),
        (135, none, PEER6, refuse),
        (135, none, none, refuse),
        (135, PEER6, POD6, refuse),
        // Advertisements: by target.
        (136, POD6, POD6, pass),
        (136, POD_LINK_LOCAL, POD6, pass),
        (136, POD6, POD_LINK_LOCAL, pass),
        (136, POD6, PEER6, refuse),
        (136, POD6, none, refuse),
        // Router solicitations.
        (133, POD_LINK_LOCAL, none, pass),
        (133, PEER6, none, refuse),
        (133, none, none, refuse),
        // Router advertisements and redirects.
        (134, POD_LINK_LOCAL, none, refuse),
        (137, POD6, PEER6, refuse),
    ];
    for (kind, source, target, why) in table {
        let multicast = "ff02::1".parse().unwrap();
        pod.expect(Egress, &eth().ipv6(source, multicast).neighbour(kind, target), why);
        pod.expect(Egress, &eth().vlan(2).ipv6(source, multicast).neighbour(kind, target), why);
    }
    for kind in 133..=137 {
        pod.expect(Ingress, &eth().ipv6(PEER6, POD6).neighbour(kind, PEER6), pass);
    }
    let frame = eth().ipv6(POD6, PEER6).neighbour(135, PEER6).bytes();
    for length in 54..frame.len() {
        assert_eq!(pod.run_bytes(Egress, &frame[..length]), Some(Reason::Malformed), "{length} bytes");
    }
    assert_eq!(pod.flows().entries(), []);
}

#[test]
fn neighbour_discovery_is_no_way_past_the_policy() {
    if !require(Rung::Kernel) {
        return;
    }
    let (pass, refuse) = (Some(Reason::Neighbour), Some(Reason::NeighbourRefused));
    let group: Ipv6Addr = "ff02::1:ff00:2".parse().unwrap();
    let router: Ipv6Addr = "fe80::99".parse().unwrap();
    // Each message as its kernel would send it, and what it may not be.
    let own = |kind: u8| match kind {
        133 => (POD_LINK_LOCAL, group, POD_LINK_LOCAL),
        135 => (POD6, group, PEER6),
        _ => (POD6, PEER6, POD6),
    };
    for pod in [shut(), undecided()] {
        for (direction, kinds) in [(Egress, &[133, 135, 136][..]), (Ingress, &[133, 134, 135, 136, 137])] {
            for &kind in kinds {
                let (source, destination, target) = if direction == Egress { own(kind) } else { (router, POD6, PEER6) };
                let base = eth().ipv6(source, destination);
                let message = base.clone().neighbour(kind, target);
                pod.expect(direction, &message, pass);
                let at = |byte: usize, value: u8| {
                    let mut frame = message.bytes();
                    frame[byte] = value;
                    frame
                };
                for hop_limit in [0, 1, 64, 254] {
                    assert_eq!(pod.run_bytes(direction, &at(21, hop_limit)), refuse, "{kind}: hop limit {hop_limit}");
                }
                for code in [1, 255] {
                    assert_eq!(pod.run_bytes(direction, &at(55, code)), refuse, "{kind}: code {code}");
                }
                for extension in [HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS, AUTHENTICATION] {
                    for units in [0, 170] {
                        let packet = base.clone().extension(extension, units).neighbour(kind, target);
                        pod.expect(direction, &packet, refuse);
                    }
                }
                // RFC 6946: a fragment that is all of its packet.
                pod.expect(direction, &base.clone().fragment(7, 0, false).neighbour(kind, target), refuse);
                if direction == Egress {
                    let behind = [message.bytes(), vec![0x5a; 40]].concat();
                    assert_eq!(pod.run_bytes(direction, &behind), refuse, "{kind}: bytes behind the packet");
                }
            }
        }
        // Beyond the link, from the pod.
        let wide: Ipv6Addr = "ff05::2".parse().unwrap();
        let table = [
            (133, router, pass),
            (133, "ff02::2".parse().unwrap(), pass),
            (133, ROUTER6, refuse),
            (133, wide, refuse),
            (135, PEER6, pass),
            (135, router, pass),
            (135, ROUTER6, refuse),
            (135, wide, refuse),
            (136, PEER6, pass),
            (136, router, pass),
            (136, "ff02::1".parse().unwrap(), pass),
        ];
        for (kind, destination, why) in table {
            let (source, _, target) = own(kind);
            pod.expect(Egress, &eth().ipv6(source, destination).neighbour(kind, target), why);
        }
    }
}

#[test]
fn other_ethertypes_are_dropped() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = open();
    for direction in [Egress, Ingress] {
        let (from, to) = way(direction, VERSIONS[0]);
        for ether_type in [0x88b5, 0x88cc, 0x8847, 0x8863, 0x0000, 0x05dc, 0xffff] {
            let packet = eth().ether_type(ether_type).payload(60);
            pod.expect(direction, &packet, Some(Reason::OtherEtherType));
        }
        let three = eth().vlan(1).vlan(2).vlan(3).ip(from, to).tcp(1, 2, SYN);
        pod.expect(direction, &three, Some(Reason::OtherEtherType));
        let two = eth().vlan(1).vlan(2).ip(from, to).tcp(1, 2, SYN);
        pod.expect(direction, &two, Some(Reason::Allowed));
    }
}

#[test]
fn options_and_up_to_eight_extension_headers_are_passed_over() {
    if !require(Rung::Kernel) {
        return;
    }
    let list = List(vec![(0, 17, 53), (0, 6, 53)]);
    for direction in [Egress, Ingress] {
        let pod = Pod::new(&list, &list);
        for words in 0..=10 {
            let (from, to) = way(direction, VERSIONS[0]);
            let options = vec![1; words * 4];
            let packet = |port| eth().ip(from, to).options(&options).udp(1000 + words as u16, port);
            pod.expect(direction, &packet(53), Some(Reason::Allowed));
            pod.expect(direction, &packet(54), Some(Reason::Denied));
        }
        let (from, to) = way(direction, VERSIONS[1]);
        let kinds = [HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS, AUTHENTICATION];
        for count in 0..=9_u16 {
            for units in [0, 3, 40] {
                let mut packet = eth().ip(from, to);
                for i in 0..count {
                    packet = packet.extension(kinds[i as usize % 4], units);
                }
                let source = 2000 + count * 50 + u16::from(units);
                let why = |open| match (count, open) {
                    (9, _) => Some(Reason::TooManyExtensionHeaders),
                    (_, true) => Some(Reason::Allowed),
                    (_, false) => Some(Reason::Denied),
                };
                pod.expect(direction, &packet.clone().tcp(source, 53, SYN), why(true));
                pod.expect(direction, &packet.tcp(source, 54, SYN), why(false));
            }
        }
    }
}

#[test]
fn a_packet_that_its_sender_routes_is_dropped() {
    if !require(Rung::Kernel) {
        return;
    }
    let routed = Some(Reason::SourceRoute);
    // What may stand before it: nothing, padding, a time stamp, a router alert, a route to be recorded, and an option
    // whose content looks like a route.
    let mut looks = vec![131; 30];
    looks[..2].copy_from_slice(&[200, 30]);
    let befores =
        [vec![], vec![1], vec![1; 33], vec![68, 8, 5, 0, 0, 0, 0, 0], vec![148, 4, 0, 0], vec![7, 3, 4], looks];
    for direction in [Egress, Ingress] {
        let pod = open();
        let (from, to) = way(direction, VERSIONS[0]);
        let with = |options: &[u8]| eth().ip(from, to).options(options).udp(1000, 53);
        pod.expect(direction, &with(&[]), Some(Reason::Allowed));
        for before in &befores {
            pod.expect(direction, &with(before), None);
            for kind in [131, 137] {
                let route = [kind, 7, 4, 192, 0, 2, 9];
                pod.expect(direction, &with(&[before, &route[..]].concat()), routed);
                // Nothing counts behind the end of the options.
                if before.len() < 33 {
                    pod.expect(direction, &with(&[before, &[0][..], &route].concat()), None);
                }
            }
        }
        // Lengths that lead nowhere, or out of the header.
        for length in [0, 1, 5, 200] {
            pod.expect(direction, &with(&[68, length, 5, 0]), Some(Reason::Malformed));
        }

        let (from, to) = way(direction, VERSIONS[1]);
        for before in 0..3 {
            for (kind, left, why) in
                [(0, 1, routed), (2, 1, routed), (4, 2, routed), (4, 255, routed), (4, 0, Some(Reason::Allowed))]
            {
                let mut packet = eth().ip(from, to);
                for _ in 0..before {
                    packet = packet.extension(DESTINATION_OPTIONS, 0);
                }
                let mut frame = packet.extension(ROUTING, 2).udp(2000 + before, 53).bytes();
                let header = 14 + 40 + 8 * usize::from(before);
                (frame[header + 2], frame[header + 3]) = (kind, left);
                assert_eq!(pod.run_bytes(direction, &frame), why, "type {kind}, {left} segments left");
            }
        }
    }
}

#[test]
fn headers_cut_off_at_any_byte_are_dropped() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        let pod = open();
        let (from4, to4) = way(direction, VERSIONS[0]);
        let (from6, to6) = way(direction, VERSIONS[1]);
        let frames = [
            eth().ip(from4, to4).tcp(1, 2, SYN),
            eth().ip(from4, to4).udp(1, 2),
            eth().ip(from4, to4).sctp(1, 2),
            eth().ip(from4, to4).echo_request(3),
            eth().ip(from4, to4).options(&[1; 12]).tcp(3, 4, SYN),
            eth().vlan(1).tag(0x88a8, 2).ip(from4, to4).udp(3, 4),
            eth().ip(from6, to6).tcp(1, 2, SYN),
            eth().ip(from6, to6).udp(1, 2),
            eth().ip(from6, to6).sctp(1, 2),
            eth().ip(from6, to6).echo_request(3),
            eth().vlan(1).ip(from6, to6).extension(HOP_BY_HOP, 1).extension(AUTHENTICATION, 2).udp(3, 4),
        ];
        for packet in frames {
            let frame = packet.bytes();
            // A test run refuses packets without a whole IP header, unless a tag hides it (net/bpf/test_run.c).
            let shortest = match (frame[12], frame[13]) {
                (0x08, 0x00) => 14 + 20,
                (0x86, 0xdd) => 14 + 40,
                _ => 14,
            };
            for length in shortest..frame.len() {
                let why = pod.run_bytes(direction, &frame[..length]);
                assert_eq!(why, Some(Reason::Malformed), "{length} of {} bytes, {packet:?}", frame.len());
            }
            assert_eq!(pod.run_bytes(direction, &frame), Some(Reason::Allowed));
        }
    }
}

#[test]
fn lengths_and_versions_that_contradict_themselves_are_dropped() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        let pod = open();
        let (from4, to4) = way(direction, VERSIONS[0]);
        let (from6, to6) = way(direction, VERSIONS[1]);
        let v4 = eth().ip(from4, to4).tcp(1, 2, SYN).bytes();
        let v6 = eth().ip(from6, to6).tcp(1, 2, SYN).bytes();
        let udp6 = eth().ip(from6, to6).udp(1, 2).bytes();
        let malformed: [(&[u8], usize, u8); 9] = [
            (&v4, 14, 0x55), // version 5
            (&v4, 14, 0x44), // a header of 16 bytes
            (&v4, 17, 39),   // a packet one byte shorter than its headers
            (&v4, 17, 19),
            (&v4, 46, 0x40), // a TCP header of 16 bytes
            (&v6, 14, 0x40),
            (&v6, 19, 19),
            (&v6, 66, 0x40),
            (&udp6, 19, 7),
        ];
        for (frame, at, byte) in malformed {
            let mut odd = frame.to_vec();
            odd[at] = byte;
            assert_eq!(pod.run_bytes(direction, &odd), Some(Reason::Malformed), "byte {at} = {byte}");
        }
        // A total length of 0 is for packets that will be segmented, and this one will not be. The VM knows nothing of
        // segmentation.
        pod.without_twin();
        let mut zero = v4.clone();
        zero[17] = 0;
        assert_eq!(pod.run_bytes(direction, &zero), Some(Reason::Malformed));
        assert_eq!(pod.run_bytes(direction, &v4), Some(Reason::Allowed));
    }
}

#[test]
fn an_ipv6_packet_from_a_mapped_address_is_no_ipv4_packet() {
    if !require(Rung::Kernel) {
        return;
    }
    let list = List(vec![(9, 17, 53)]);
    let pod = Pod::new(&list, &list);
    pod.class_v4(10, 0, 5);
    pod.local_id(5, 9);
    pod.expect(Ingress, &eth().ipv4(PEER4, POD4).udp(1, 53), Some(Reason::Allowed));
    pod.expect(Ingress, &eth().ipv4(PEER4, POD4).udp(1, 53), None);
    pod.expect(Ingress, &eth().ipv6(PEER4.to_ipv6_mapped(), POD6).udp(1, 53), Some(Reason::Denied));
    pod.expect(Ingress, &eth().ipv6(PEER4.to_ipv6_mapped(), POD6).udp(2, 53), Some(Reason::Denied));
}

#[test]
fn packets_of_no_endpoint_are_dropped() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = open();
    pod.set_endpoint(&Endpoint { flags: 0, ..endpoint() });
    pod.expect(Egress, &eth().ipv4(POD4, PEER4).udp(1, 2), Some(Reason::UnknownEndpoint));
    pod.expect(Ingress, &eth().arp(2, PEER4, POD4), Some(Reason::UnknownEndpoint));
    pod.set_endpoint(&endpoint());
    pod.expect(Egress, &eth().ipv4(POD4, PEER4).udp(1, 2), Some(Reason::Allowed));
}

#[test]
fn the_pod_speaks_by_its_own_ethernet_address() {
    if !require(Rung::Kernel) {
        return;
    }
    // The packets bear 02:00:00:00:00:01 as their source.
    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];
    let option = |kind: u8, mac: [u8; 6]| [[kind, 1].as_slice(), &mac].concat();
    let discovery = |kind: u8, options: &[Vec<u8>]| {
        let target = if kind == 135 { PEER6 } else { POD6 };
        let body: Vec<u8> = target.octets().into_iter().chain(options.concat()).collect();
        eth().ipv6(POD6, PEER6).icmp(kind, 0, [0; 4]).data(body)
    };
    let pod = open();
    pod.set_endpoint(&endpoint().with_mac(OWN));
    for packet in flows(Egress) {
        pod.expect(Egress, &packet, Some(Reason::Allowed));
    }
    pod.expect(Egress, &eth().arp(2, POD4, PEER4), Some(Reason::Neighbour));
    for kind in [135, 136] {
        pod.expect(Egress, &discovery(kind, &[]), Some(Reason::Neighbour));
        pod.expect(Egress, &discovery(kind, &[option(2, OWN)]), Some(Reason::Neighbour));
        pod.expect(Egress, &discovery(kind, &[option(1, OTHER)]), Some(Reason::NeighbourRefused));
        pod.expect(Egress, &discovery(kind, &[option(2, OTHER)]), Some(Reason::NeighbourRefused));
        // A nonce (RFC 3971, section 5.3.2) is no address; behind it an address could hide.
        pod.expect(Egress, &discovery(kind, &[option(14, OTHER)]), Some(Reason::Neighbour));
        pod.expect(Egress, &discovery(kind, &[option(14, OWN), option(2, OTHER)]), Some(Reason::NeighbourRefused));
    }

    pod.set_endpoint(&endpoint().with_mac(OTHER));
    for packet in flows(Egress) {
        pod.expect(Egress, &packet, Some(Reason::Spoofed));
    }
    pod.expect(Egress, &eth().arp(2, POD4, PEER4), Some(Reason::Spoofed));
    pod.expect(Egress, &discovery(136, &[]), Some(Reason::Spoofed));
    // What others send to the pod bears their addresses, and the pod's as its destination.
    let pod = open();
    pod.set_endpoint(&endpoint().with_mac([2, 0, 0, 0, 0, 2]));
    for packet in flows(Ingress) {
        pod.expect(Ingress, &packet, Some(Reason::Allowed));
    }

    // The frame's source is right, the one that ARP tells is not.
    pod.set_endpoint(&endpoint().with_mac(OWN));
    let mut lie = eth().arp(2, POD4, PEER4).bytes();
    lie[22..28].copy_from_slice(&OTHER);
    assert_eq!(pod.run_bytes(Egress, &lie), Some(Reason::NeighbourRefused));
}

/// A sender whose policy allows Y may write Y's address into a frame for this pod: it is not this pod's packet.
#[test]
fn a_packet_for_another_address_does_not_reach_the_pod() {
    if !require(Rung::Kernel) {
        return;
    }
    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const ALL: [u8; 6] = [0xff; 6];
    let (other, allowed) = (Some(Reason::OtherHost), Some(Reason::Allowed));
    let v6 = |text: &str| -> Ipv6Addr { text.parse().unwrap() };
    let pod = open();
    pod.set_endpoint(&endpoint().with_mac(OWN));
    let v4 = [
        // By the last bits of 10.0.0.1: a network's broadcast address only in a frame for all.
        (POD4, OWN, allowed),
        (POD4, ALL, allowed),
        (Ipv4Addr::new(10, 0, 0, 9), OWN, other),
        (Ipv4Addr::new(10, 0, 0, 9), ALL, other),
        (Ipv4Addr::new(10, 0, 0, 3), OWN, other),
        (Ipv4Addr::new(10, 0, 0, 3), ALL, allowed),
        (Ipv4Addr::new(10, 0, 0, 255), OWN, other),
        (Ipv4Addr::new(10, 0, 0, 255), ALL, allowed),
        (Ipv4Addr::new(10, 0, 255, 255), ALL, allowed),
        (Ipv4Addr::new(10, 0, 1, 255), ALL, allowed),
        (Ipv4Addr::new(10, 0, 2, 255), ALL, other),
        (Ipv4Addr::new(10, 0, 1, 127), ALL, other),
        (Ipv4Addr::BROADCAST, ALL, allowed),
        (Ipv4Addr::BROADCAST, OWN, other),
        (Ipv4Addr::new(224, 0, 0, 251), OWN, allowed),
        (Ipv4Addr::new(239, 255, 0, 1), [1, 0, 0x5e, 0x7f, 0, 1], allowed),
        (Ipv4Addr::new(240, 0, 0, 1), ALL, other),
        (Ipv4Addr::new(223, 255, 255, 255), ALL, other),
        (ROUTER4, OWN, other),
        (ROUTER4, ALL, other),
        (Ipv4Addr::UNSPECIFIED, OWN, other),
        (Ipv4Addr::UNSPECIFIED, ALL, other),
    ];
    let v6 = [
        (POD6, OWN, allowed),
        (POD6, ALL, allowed),
        (POD_LINK_LOCAL, OWN, allowed),
        (v6("fd00::9"), OWN, other),
        (v6("fd00::9"), ALL, other),
        (v6("fe80::12"), OWN, other),
        (v6("ff02::fb"), [0x33, 0x33, 0, 0, 0, 0xfb], allowed),
        (v6("ff05::2"), OWN, allowed),
        (v6("fe02::fb"), ALL, other),
        (Ipv6Addr::UNSPECIFIED, OWN, other),
    ];
    let v4 = v4.map(|(to, mac, why)| (IpAddr::V4(PEER4), IpAddr::V4(to), mac, why));
    let v6 = v6.map(|(to, mac, why)| (IpAddr::V6(PEER6), IpAddr::V6(to), mac, why));
    for (port, (from, to, mac, why)) in (1u16..).zip(v4.into_iter().chain(v6)) {
        // In place and by copies: SCTP, fragments and other protocols are read there.
        let base = || eth().ip(from, to);
        for packet in [
            base().tcp(port, 80, SYN),
            base().udp(port, 80),
            base().sctp(port, 80),
            base().echo_request(port),
            base().protocol(47).payload(20),
            base().fragment(port.into(), 0, true).udp(port, 81).payload(8),
        ] {
            let mut frame = packet.bytes();
            frame[..6].copy_from_slice(&mac);
            let got = pod.run_bytes(Ingress, &frame);
            // The peer is the same, and so is the flow of a protocol without ports.
            assert_eq!(got.or(allowed), why, "{mac:x?} {packet:?}");
        }
    }
    pod.events();
    pod.expect(Ingress, &eth().ipv4(PEER4, ROUTER4).udp(9, 9), other);
    assert_eq!(pod.events(), [], "told as little as a frame for another Ethernet address");
    // The address that an endpoint without one has in its cell is not its own.
    pod.set_endpoint(&Endpoint::new(None, Some(POD6), None).with_mac(OWN));
    for (port, mac) in (100u16..).zip([OWN, ALL]) {
        for packet in [
            eth().ipv4(PEER4, Ipv4Addr::UNSPECIFIED).udp(port, 80),
            eth().ipv4(PEER4, Ipv4Addr::UNSPECIFIED).echo_request(port),
        ] {
            let mut frame = packet.bytes();
            frame[..6].copy_from_slice(&mac);
            assert_eq!(pod.run_bytes(Ingress, &frame), other, "{mac:x?} {packet:?}");
        }
        let mut frame = eth().ipv6(PEER6, POD6).udp(port, 80).bytes();
        frame[..6].copy_from_slice(&mac);
        assert_eq!(pod.run_bytes(Ingress, &frame), allowed, "{mac:x?}");
    }
    // From the pod any destination is its policy's matter.
    let pod = open();
    pod.expect(Egress, &eth().ipv4(POD4, ROUTER4).udp(9, 9), allowed);
    pod.expect(Egress, &eth().ipv6(POD6, ROUTER6).udp(9, 9), allowed);
}

#[test]
fn a_frame_for_another_ethernet_address_does_not_reach_the_pod() {
    if !require(Rung::Kernel) {
        return;
    }
    // Each half of the address differs once, and never by the bit that makes it a group.
    let others =
        [[2, 0, 0, 0, 0, 9], [2, 0, 0, 9, 0, 2], [2, 9, 0, 0, 0, 2], [0; 6], [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]];
    let groups = [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1], [3, 0, 0, 0, 0, 2]];
    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 2];
    let to = |packet: &Packet, mac: [u8; 6]| {
        let mut frame = packet.bytes();
        frame[..6].copy_from_slice(&mac);
        frame
    };
    let neighbours = [eth().arp(2, PEER4, POD4), eth().ipv6(PEER6, POD6).neighbour(136, PEER6)];
    let pod = open();
    pod.set_endpoint(&endpoint().with_mac(OWN));
    for packet in flows(Ingress).iter().chain(&neighbours) {
        for other in others {
            assert_eq!(pod.run_bytes(Ingress, &to(packet, other)), Some(Reason::OtherHost), "{other:x?} {packet:?}");
        }
    }
    assert_eq!(pod.flows().entries(), []);
    assert_eq!(pod.events(), [], "a bridge may flood very many");
    for mac in groups.into_iter().chain([OWN]) {
        let pod = open();
        pod.set_endpoint(&endpoint().with_mac(OWN));
        for packet in flows(Ingress) {
            assert_eq!(pod.run_bytes(Ingress, &to(&packet, mac)), Some(Reason::Allowed), "{mac:x?} {packet:?}");
        }
        for packet in &neighbours {
            assert_eq!(pod.run_bytes(Ingress, &to(packet, mac)), Some(Reason::Neighbour), "{mac:x?}");
        }
    }
    // Of an endpoint without an address nothing is known, and what the pod sends is for others.
    let pod = open();
    for (packet, reply) in flows(Ingress).iter().zip(flows(Egress)) {
        assert_eq!(pod.run_bytes(Ingress, &to(packet, others[0])), Some(Reason::Allowed));
        assert_ne!(pod.run_bytes(Egress, &to(&reply, others[0])), Some(Reason::OtherHost));
    }
}

/// By which the guard tells its judge the pod: a later program, or a queueing discipline, would take it for a class.
#[test]
fn what_judges_for_a_guard_leaves_no_class_behind() {
    let sizes = small();
    let (open, shut) = (AllowAll { rule: 1 }, DenyAll { rule: 3 });
    let of = |classifier: &dyn EmitClassifier| {
        let spec = Spec { slot: Slot::Guarded, ..Spec::new(&sizes, classifier, classifier) };
        datapath::program(&spec).unwrap()
    };
    let objects = [of(&open), of(&shut), datapath::default_program_of(&sizes, Slot::Guarded).unwrap()];
    for (object, passes) in objects.iter().zip([true, false, false]) {
        let mut vm = Vm::new(&object.link(FROM_GUARDED).unwrap()).unwrap();
        let mut maps = Maps::new(object.maps());
        let cell = endpoint().encode();
        maps.get_mut(abi::ENDPOINTS).unwrap().update(&5u32.to_ne_bytes(), &cell, Update::Any).unwrap();
        for (slot, passes) in [(5, passes), (6, false)] {
            let packet = eth().ipv4(POD4, PEER4).udp(40_000, 53).bytes();
            let mut skb = Skb { tc_classid: slot, ..Skb::new(packet) };
            let run = vm.run(&mut skb, &mut maps, &mut Environment::default()).unwrap_or_else(|trap| panic!("{trap}"));
            // TC_ACT_UNSPEC and TC_ACT_SHOT (include/uapi/linux/pkt_cls.h).
            assert_eq!(run.value.cast_signed(), if passes { -1 } else { 2 }, "slot {slot}");
            assert_eq!(skb.tc_classid, 0, "slot {slot}");
        }
    }
}
