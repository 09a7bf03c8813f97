//! Fragmented packets: the head opens the way, and only for its own.

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::{self, Fragment, FragmentKey, Reason};
use dcenet_ebpf::datapath::AllowAll;
use dcenet_ebpf::maps::{HashTable, Put};
use dcenet_ebpf::test_support::packet::*;

use crate::harness::*;

#[test]
fn fragments_follow_their_head() {
    if !require(Rung::Kernel) {
        return;
    }
    let list = List(vec![(0, 17, 53), (0, 1, 8 << 8), (0, 58, 128 << 8), (0, 1, 13 << 8)]);
    for direction in [Egress, Ingress] {
        for addresses in VERSIONS {
            let pod = Pod::new(&list, &list);
            let (from, to) = way(direction, addresses);
            let piece = |id, offset, more| eth().ip(from, to).fragment(id, offset, more).udp(1000, 53).payload(16);
            let missing = Some(Reason::FragmentWithoutHead);

            pod.expect(direction, &piece(7, 24, true), missing);
            pod.expect(direction, &piece(7, 0, true), Some(Reason::Allowed));
            pod.expect(direction, &piece(7, 24, true), None);
            pod.expect(direction, &piece(7, 48, false), None);
            pod.expect(direction, &piece(8, 48, false), missing);
            pod.expect(
                direction.opposite(),
                &eth().ip(to, from).fragment(7, 24, true).udp(53, 1000).payload(8),
                missing,
            );
            // The same identification to another peer, and of another protocol.
            let other = if from.is_ipv4() { ROUTER4.into() } else { ROUTER6.into() };
            let (from2, to2) = way(direction, (addresses.0, other));
            pod.expect(direction, &eth().ip(from2, to2).fragment(7, 24, true).udp(1000, 53).payload(8), missing);
            pod.expect(direction, &eth().ip(from, to).fragment(7, 24, true).tcp(1000, 53, 0).payload(8), missing);

            // A head that is denied opens nothing, whatever port the rest might have.
            let denied = |offset| eth().ip(from, to).fragment(9, offset, true).udp(1000, 54).payload(16);
            pod.expect(direction, &denied(0), Some(Reason::Denied));
            pod.expect(direction, &denied(24), missing);

            // Echo is a flow; other ICMP is judged piece by piece.
            let echo = |offset| eth().ip(from, to).fragment(10, offset, true).echo_request(3).payload(16);
            pod.expect(direction, &echo(0), Some(Reason::Allowed));
            pod.expect(direction, &echo(24), None);
            if from.is_ipv4() {
                let stamp = |offset| eth().ip(from, to).fragment(11, offset, true).icmp(13, 0, [0; 4]).payload(16);
                pod.expect(direction, &stamp(0), Some(Reason::Allowed));
                pod.expect(direction, &stamp(24), Some(Reason::Allowed));
            }
        }
    }
}

#[test]
fn a_head_too_short_for_its_ports_is_dropped() {
    if !require(Rung::Kernel) {
        return;
    }
    let allow = AllowAll { rule: 1 };
    for direction in [Egress, Ingress] {
        for addresses in VERSIONS {
            let pod = Pod::new(&allow, &allow);
            let (from, to) = way(direction, addresses);
            for (protocol, least) in [(6, 20), (17, 8), (132, 12), (if from.is_ipv4() { 1 } else { 58 }, 8)] {
                for bytes in 0..least {
                    let tiny = eth().ip(from, to).fragment(1, 0, true).protocol(protocol).payload(bytes);
                    pod.expect(direction, &tiny, Some(Reason::Malformed));
                    let rest = eth().ip(from, to).fragment(1, 8, true).protocol(protocol).payload(8);
                    pod.expect(direction, &rest, Some(Reason::FragmentWithoutHead));
                }
            }
            let whole = eth().ip(from, to).fragment(1, 0, true).udp(1, 2);
            pod.expect(direction, &whole, Some(Reason::Allowed));
        }
    }
}

#[test]
fn a_fragment_header_around_a_whole_packet_is_none() {
    if !require(Rung::Kernel) {
        return;
    }
    let allow = AllowAll { rule: 1 };
    let pod = Pod::new(&allow, &allow);
    let (from, to) = VERSIONS[1];
    pod.expect(Egress, &eth().ip(from, to).fragment(5, 0, false).udp(1, 2), Some(Reason::Allowed));
    pod.expect(Egress, &eth().ip(from, to).fragment(5, 8, false).udp(1, 2), Some(Reason::FragmentWithoutHead));
    let fragments = HashTable::<FragmentKey, Fragment>::new(pod.map(abi::FRAGMENTS)).unwrap();
    assert_eq!(fragments.entries().unwrap(), []);
}

#[test]
fn extension_headers_before_and_after_the_fragment_header_are_passed_over() {
    if !require(Rung::Kernel) {
        return;
    }
    let list = List(vec![(0, 17, 53)]);
    for direction in [Egress, Ingress] {
        let pod = Pod::new(&list, &list);
        let (from, to) = way(direction, VERSIONS[1]);
        let head = eth()
            .ip(from, to)
            .extension(HOP_BY_HOP, 1)
            .fragment(5, 0, true)
            .extension(DESTINATION_OPTIONS, 2)
            .udp(1000, 53);
        pod.expect(direction, &head, Some(Reason::Allowed));
        // The rest carries the next header of the first part that can be fragmented.
        let rest = eth().ip(from, to).extension(HOP_BY_HOP, 0).fragment(5, 64, false).protocol(60).payload(8);
        pod.expect(direction, &rest, None);
        let other = eth().ip(from, to).fragment(5, 64, false).protocol(17).payload(8);
        pod.expect(direction, &other, Some(Reason::FragmentWithoutHead));
    }
}

#[test]
fn a_head_is_forgotten_after_a_minute() {
    if !require(Rung::Kernel) {
        return;
    }
    let allow = AllowAll { rule: 1 };
    let pod = Pod::new(&allow, &allow);
    let piece = |offset| eth().ipv4(POD4, PEER4).fragment(7, offset, true).udp(1000, 53).payload(16);
    pod.expect(Egress, &piece(0), Some(Reason::Allowed));
    let fragments = HashTable::<FragmentKey, Fragment>::new(pod.map(abi::FRAGMENTS)).unwrap();
    let (key, mut value) = fragments.entries().unwrap().remove(0);
    pod.expect(Egress, &piece(24), None);
    value.seen -= 61_000_000_000;
    fragments.store(&key, &value, Put::Any).unwrap();
    pod.expect(Egress, &piece(24), Some(Reason::FragmentWithoutHead));
}
