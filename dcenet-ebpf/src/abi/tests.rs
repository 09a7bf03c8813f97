use std::net::{Ipv4Addr, Ipv6Addr};

use super::*;

fn hex(bytes: &[u8]) -> String {
    bytes.chunks(8).map(|c| c.iter().map(|b| format!("{b:02x}")).collect::<String>()).collect::<Vec<_>>().join(" ")
}

fn mapped(address: Ipv4Addr) -> [u8; 16] {
    address.to_ipv6_mapped().octets()
}

// The goldens are those of a little-endian machine.
#[cfg(target_endian = "little")]
mod golden {
    use super::*;

    #[test]
    fn endpoint() {
        let mut endpoint = Endpoint::new(
            Some(Ipv4Addr::new(10, 1, 2, 3)),
            Some("fd00::1:2".parse::<Ipv6Addr>().unwrap()),
            Some("fe80::5".parse::<Ipv6Addr>().unwrap()),
        );
        endpoint.generation_egress = 0x0102_0304;
        endpoint.generation_ingress = 7;
        endpoint.tenure = 0x0809;
        assert_eq!(
            hex(&endpoint.encode()),
            "0100000004030201 070000000a010203 fd00000000000000 0000000000010002 \
             fe80000000000000 0000000000000005 0000000000000908 0000000000000000"
        );
        assert_eq!(Endpoint::decode(&endpoint.encode()), Some(endpoint));
    }

    #[test]
    fn flow_key() {
        let key = FlowKey {
            slot: 0x0102,
            protocol: 6,
            version: 4,
            pod_port: Be16(80),
            peer_port: Be16(0x1234),
            peer: mapped(Ipv4Addr::new(192, 0, 2, 9)),
        };
        assert_eq!(hex(&key.encode()), "0201060400501234 0000000000000000 0000ffffc0000209");
        assert_eq!(FlowKey::decode(&key.encode()), Some(key));
    }

    #[test]
    fn flow() {
        let flow = Flow {
            generation: 1,
            rule: 2,
            last_seen: 3,
            timeout: 4,
            direction: Direction::Ingress as u8,
            state: FlowState::Closing as u8,
            tenure: 0x0809,
            expected: 0x0a0b_0c0d,
            egress_packets: 5,
            egress_bytes: 6,
            ingress_packets: 7,
            ingress_bytes: 8,
            tick: 9,
        };
        assert_eq!(
            hex(&flow.encode()),
            "0100000002000000 0300000000000000 0400000000000000 010209080d0c0b0a \
             0500000000000000 0600000000000000 0700000000000000 0800000000000000 \
             0900000000000000"
        );
        assert_eq!(Flow::decode(&flow.encode()), Some(flow));
    }

    #[test]
    fn guarded_pods() {
        let sender = Sender { mac: [2, 0, 0xdc, 0, 0, 7], parent: 3 };
        assert_eq!(hex(&sender.encode()), "0200dc0000070000 0300000000000000");
        let pod = Guarded { attachment: 0x0102, netns: 4, slot: 5 };
        assert_eq!(hex(&pod.encode()), "0201000000000000 0400000000000000 0500000000000000");
        assert_eq!(hex(&Namespace { netns: 4, parent: 3 }.encode()), "0400000000000000 0300000000000000");
        assert_eq!(Sender::decode(&sender.encode()), Some(sender));
        assert_eq!(Guarded::decode(&pod.encode()), Some(pod));
    }

    #[test]
    fn fragments() {
        let key = FragmentKey { slot: 1, protocol: 17, kind: 0x41, identification: [0xab, 0xcd, 0, 0], peer: [9; 16] };
        assert_eq!(hex(&key.encode()), "01001141abcd0000 0909090909090909 0909090909090909");
        let value = Fragment {
            pod_port: Be16(1),
            peer_port: Be16(2),
            protocol: 1,
            version: 0x84,
            icmp: 0x0800,
            flags: 4,
            seen: 5,
        };
        assert_eq!(hex(&value.encode()), "0001000201840008 0400000000000000 0500000000000000");
        assert_eq!(FragmentKey::decode(&key.encode()), Some(key));
        assert_eq!(Fragment::decode(&value.encode()), Some(value));
    }

    #[test]
    fn event() {
        let event = Event {
            time: 1,
            kind: EventKind::Closed as u8,
            reason: Reason::Revoked as u8,
            direction: Direction::Ingress as u8,
            protocol: 6,
            slot: 0x0203,
            version: 4,
            tcp_flags: 0x11,
            ifindex: 9,
            rule: Event::NO_RULE,
            pod: mapped(Ipv4Addr::new(10, 0, 0, 1)),
            peer: mapped(Ipv4Addr::new(10, 0, 0, 2)),
            pod_port: Be16(443),
            peer_port: Be16(40000),
            icmp: 0x0301,
            egress_packets: 2,
            egress_bytes: 3,
            ingress_packets: 4,
            ingress_bytes: 5,
        };
        assert_eq!(
            hex(&event.encode()),
            "0100000000000000 0204010603020411 09000000ffffffff 0000000000000000 0000ffff0a000001 \
             0000000000000000 0000ffff0a000002 01bb9c4001030000 0200000000000000 0300000000000000 \
             0400000000000000 0500000000000000"
        );
        assert_eq!(Event::decode(&event.encode()), Some(event));
        assert_eq!(Event::decode(&event.encode()[1..]), None);
    }

    #[test]
    fn classes() {
        let member = MemberV6 { address: [1; 16], tag: MEMBER_USED | 5 };
        assert_eq!(hex(&member.encode()), "0101010101010101 0101010101010101 0500008000000000");
        let node = NodeV6 { mask_high: 1, mask_low: 2, prefix_high: 3, prefix_low: 4, shift: 64 + 8, entry: CHILD | 6 };
        assert_eq!(
            hex(&node.encode()),
            "0100000000000000 0200000000000000 0300000000000000 0400000000000000 4800000006000080"
        );
        assert_eq!(local_ids_element(7), (1, 48));
    }

    #[test]
    fn counters() {
        assert_eq!(hex(&Traffic { packets: 1, bytes: 2 }.encode()), "0100000000000000 0200000000000000");
        let limit = EventLimit { window: 1, used: 2, used_by_flows: 5, limited: 3, lost: 4, answers: 6 };
        assert_eq!(
            hex(&limit.encode()),
            "0100000000000000 0200000005000000 0300000000000000 0400000000000000 0600000000000000"
        );
    }
}

#[test]
fn numbers_of_reasons_are_kept_and_read_back() {
    for (number, reason) in Reason::ALL.iter().enumerate() {
        assert_eq!(*reason as usize, number, "{}", reason.name());
        assert_eq!(Reason::from_number(number as u8), Some(*reason));
    }
    assert_eq!(Reason::from_number(Reason::ALL.len() as u8), None);
    let last = reason_index(*Reason::ALL.last().unwrap(), Direction::Ingress);
    assert!(last < REASON_CELLS);
}

#[test]
fn the_hash_of_a_member_fits_the_table() {
    for bits in [0, 1, 10, 16, 31] {
        for address in [0, 1, u128::MAX, 0xfd00 << 112 | 77] {
            assert!(u64::from(member_v6_place(address, bits)) < 1 << bits);
        }
    }
}

#[test]
fn every_map_can_be_made() {
    let mut object = crate::object::Object::new();
    let sizes = Sizes::default();
    for map in sizes.shared_maps() {
        object.add_map(map).unwrap();
    }
    for direction in Direction::ALL {
        object.add_map(sizes.local_ids(direction)).unwrap();
    }
    assert_eq!(object.maps().len(), 17);
}
