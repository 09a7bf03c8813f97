//! What user space hears.

use std::net::IpAddr;
use std::num::NonZeroU32;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::{self, Be16, Direction, Event, EventKind, Reason, Sizes};
use dcenet_ebpf::datapath::{self, AllowAll, DenyAll, Slot, Spec};
use dcenet_ebpf::program::TestRun;
use dcenet_ebpf::test_support::packet::*;

use crate::harness::*;

const ALLOW: AllowAll = AllowAll { rule: 1 };
const DENY: DenyAll = DenyAll { rule: 2 };

fn bytes_of(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

/// The event without what the test cannot know beforehand.
fn timeless(mut event: Event) -> Event {
    assert_ne!(event.time, 0);
    event.time = 0;
    // The test run's device is the loopback interface.
    event.ifindex = 0;
    event
}

fn expected(direction: Direction, addresses: (IpAddr, IpAddr), bytes: usize) -> Event {
    let mut event = Event {
        direction: direction as u8,
        version: if addresses.0.is_ipv4() { 4 } else { 6 },
        pod: bytes_of(addresses.0),
        peer: bytes_of(addresses.1),
        ..Event::default()
    };
    match direction {
        Egress => (event.egress_packets, event.egress_bytes) = (1, bytes as u64),
        Ingress => (event.ingress_packets, event.ingress_bytes) = (1, bytes as u64),
    }
    event
}

#[test]
fn a_new_flow_a_denied_packet_and_a_close_are_told_in_full() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        for addresses in VERSIONS {
            let (from, to) = way(direction, addresses);
            let pod = match direction {
                Egress => Pod::new(&ALLOW, &DENY),
                Ingress => Pod::new(&DENY, &ALLOW),
            };
            let ports = |event: &mut Event, from: u16, to: u16| {
                (event.pod_port, event.peer_port) =
                    if event.direction == Egress as u8 { (Be16(from), Be16(to)) } else { (Be16(to), Be16(from)) };
            };
            let syn = eth().ip(from, to).tcp(40000, 80, SYN);
            let ack = eth().ip(to, from).tcp(80, 40000, SYN | ACK).payload(3);
            let fin = eth().ip(from, to).tcp(40000, 80, FIN | ACK).payload(5);
            let bytes = |p: &Packet| p.bytes().len();

            pod.expect(direction, &syn, Some(Reason::Allowed));
            let mut new = expected(direction, addresses, bytes(&syn));
            (new.kind, new.reason, new.protocol, new.tcp_flags, new.rule) =
                (EventKind::New as u8, Reason::Allowed as u8, 6, SYN, 1);
            ports(&mut new, 40000, 80);
            assert_eq!(pod.events().into_iter().map(timeless).collect::<Vec<_>>(), [new]);

            pod.expect(direction.opposite(), &ack, None);
            assert_eq!(pod.events(), []);
            pod.expect(direction, &fin, None);
            pod.expect(direction, &fin, None);
            let mut closed = new;
            (closed.kind, closed.tcp_flags) = (EventKind::Closed as u8, FIN | ACK);
            let there = (2, (bytes(&syn) + bytes(&fin)) as u64);
            let back = (1, bytes(&ack) as u64);
            let (egress, ingress) = if direction == Egress { (there, back) } else { (back, there) };
            (closed.egress_packets, closed.egress_bytes) = egress;
            (closed.ingress_packets, closed.ingress_bytes) = ingress;
            assert_eq!(pod.events().into_iter().map(timeless).collect::<Vec<_>>(), [closed]);

            let ping = eth().ip(to, from).icmp(if from.is_ipv4() { 8 } else { 128 }, 0, [0x12, 0x34, 0, 0]);
            pod.expect(direction.opposite(), &ping, Some(Reason::Denied));
            let mut denied = expected(direction.opposite(), addresses, bytes(&ping));
            (denied.kind, denied.reason, denied.rule) = (EventKind::Denied as u8, Reason::Denied as u8, 2);
            (denied.protocol, denied.icmp) = if from.is_ipv4() { (1, 0x0800) } else { (58, 0x8000) };
            if direction == Egress {
                denied.version |= abi::FlowKey::ASKED_BY_PEER;
                denied.peer_port = Be16(0x1234);
            } else {
                denied.pod_port = Be16(0x1234);
            }
            assert_eq!(pod.events().into_iter().map(timeless).collect::<Vec<_>>(), [denied]);
        }
    }
}

#[test]
fn packets_of_known_flows_are_sampled_where_that_is_asked_for() {
    if !require(Rung::Kernel) {
        return;
    }
    let sizes = small();
    let sampling = |one_in: u32| Spec {
        sample: NonZeroU32::new(one_in),
        flow_events: u32::MAX,
        ..Spec::new(&sizes, &ALLOW, &ALLOW)
    };
    for direction in [Egress, Ingress] {
        for addresses in VERSIONS {
            let (from, to) = way(direction, addresses);
            let (there, back) = (eth().ip(from, to).udp(4000, 53), eth().ip(to, from).udp(53, 4000).payload(7));
            let every = Pod::with(&sampling(1));
            every.expect(direction, &there, Some(Reason::Allowed));
            every.expect(direction.opposite(), &back, None);
            every.expect(direction, &there, None);
            let events = every.events();
            let kinds: Vec<_> = events.iter().map(|e| (e.kind, e.direction)).collect();
            let sampled = EventKind::Sampled as u8;
            let (own, other) = (direction as u8, direction.opposite() as u8);
            assert_eq!(kinds, [(EventKind::New as u8, own), (sampled, other), (sampled, own)]);
            let bytes = |p: &Packet, n: u64| p.bytes().len() as u64 * n;
            let mut last = expected(direction, addresses, 0);
            (last.kind, last.protocol, last.rule) = (sampled, 17, 1);
            let (mine, theirs) = ((2, bytes(&there, 2)), (1, bytes(&back, 1)));
            let (egress, ingress) = if direction == Egress { (mine, theirs) } else { (theirs, mine) };
            (last.egress_packets, last.egress_bytes) = egress;
            (last.ingress_packets, last.ingress_bytes) = ingress;
            let ports = if direction == Egress { (4000, 53) } else { (53, 4000) };
            (last.pod_port, last.peer_port) = (Be16(ports.0), Be16(ports.1));
            assert_eq!(timeless(events[2]), last);
        }
    }
    // By chance: of 20,000 packets 1 in 10, give or take ten standard deviations.
    let there = eth().ipv4(POD4, PEER4).udp(4000, 53);
    for (spec, range) in
        [(sampling(10), 1576..=2424), (sampling(u32::MAX), 0..=2), (Spec::new(&sizes, &ALLOW, &ALLOW), 0..=0)]
    {
        let pod = Pod::with(&spec);
        pod.expect(Egress, &there, Some(Reason::Allowed));
        pod.events();
        let mut told = 0;
        for _ in 0..100 {
            let frame = there.bytes();
            pod.program(Egress).test_run(&TestRun { packet: &frame, context: &[], repeat: 200 }).unwrap();
            told += pod.events().len();
        }
        assert!(range.contains(&told), "{told} events, {:?}", spec.sample);
        assert_eq!((pod.limit().lost, pod.flow().1.egress_packets), (0, 20_001));
    }
}

#[test]
fn a_drop_before_any_rule_names_none() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = Pod::new(&ALLOW, &ALLOW);
    let packet = eth().ether_type(0x88cc).payload(60);
    pod.expect(Ingress, &packet, Some(Reason::OtherEtherType));
    let expected = Event {
        kind: EventKind::Denied as u8,
        reason: Reason::OtherEtherType as u8,
        direction: Ingress as u8,
        rule: Event::NO_RULE,
        ingress_packets: 1,
        ingress_bytes: 74,
        ..Event::default()
    };
    assert_eq!(pod.events().into_iter().map(timeless).collect::<Vec<_>>(), [expected]);
}

#[test]
fn a_revoked_flow_is_told() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut pod = Pod::new(&ALLOW, &ALLOW);
    let packet = eth().ipv4(POD4, PEER4).udp(1, 2);
    pod.expect(Egress, &packet, Some(Reason::Allowed));
    pod.replace(&DENY, &ALLOW);
    pod.bump(1, 0);
    pod.expect(Egress, &packet, Some(Reason::Revoked));
    let told: Vec<_> = pod.events().iter().map(|e| (e.kind, e.reason, e.rule)).collect();
    assert_eq!(
        told,
        [(EventKind::New as u8, Reason::Allowed as u8, 1), (EventKind::Denied as u8, Reason::Revoked as u8, 2)]
    );
}

#[test]
fn events_about_drops_are_limited_and_the_others_counted() {
    if !require(Rung::Kernel) {
        return;
    }
    let sizes = small();
    let pod = Pod::with(&Spec { denied_events: 5, ..Spec::new(&sizes, &DENY, &DENY) });
    for _ in 0..100 {
        pod.expect(Egress, &eth().ipv4(POD4, PEER4).udp(1, 2), Some(Reason::Denied));
    }
    let told = pod.events().len() as u64;
    let limit = pod.limit();
    assert_eq!(told + limit.limited, 100);
    assert_eq!(limit.lost, 0);
    // A window may have ended meanwhile, on a busy machine several, and the first at any packet.
    assert!((5..=50).contains(&told) && limit.used <= 5, "{told} events, {limit:?}");
}

/// One ring serves all: a pod that opens flows as fast as it can, or sends where every packet is sampled, must not take the
/// others' events.
#[test]
fn a_pod_that_floods_leaves_room_for_events_of_others() {
    if !require(Rung::Kernel) {
        return;
    }
    // 39 events fill the ring: that takes the limited pod eight windows, of a second each.
    let sizes = Sizes { event_bytes: 4096, ..small() };
    let (limited, unlimited) = (5, u32::MAX);
    for sample in [None, NonZeroU32::new(1)] {
        for flow_events in [limited, unlimited] {
            let spec = |slot| {
                let slot = Slot::Constant(slot);
                Spec { slot, flow_events, sample, ..Spec::new(&sizes, &ALLOW, &ALLOW) }
            };
            let loud = Pod::with(&spec(3));
            let quiet = loud.beside(5, &datapath::program(&spec(5)).unwrap());
            quiet.set_endpoint(&endpoint());
            let flow = |port: u16| eth().ipv4(POD4, PEER4).udp(port, 53);
            for port in 0..60 {
                // Flows, or one flow of which each packet is sampled.
                loud.run(Egress, &flow(if sample.is_none() { port } else { 0 }));
            }
            for port in 0..3 {
                quiet.expect(Egress, &flow(port), Some(Reason::Allowed));
            }
            let events = loud.events();
            let of = |slot| events.iter().filter(|event| event.slot == slot).count() as u64;
            let (held_back, lost) = (loud.limit().limited, loud.limit().lost);
            assert_eq!(of(3) + held_back + lost, 60, "each event is told or counted");
            if flow_events == limited {
                assert_eq!((of(5), quiet.limit().lost, lost), (3, 0, 0), "{sample:?}: {held_back} held back");
                assert!((5..39).contains(&of(3)) && held_back > 20, "{} told, {held_back} held back", of(3));
            } else {
                assert_eq!((of(5), quiet.limit().lost, held_back), (0, 3, 0), "the twin: {lost} lost");
            }
        }
    }
    // Drops and flows have limits of their own.
    let spec = Spec { flow_events: 0, denied_events: 1000, ..Spec::new(&sizes, &ALLOW, &DENY) };
    let pod = Pod::with(&spec);
    pod.expect(Egress, &eth().ipv4(POD4, PEER4).tcp(1, 2, SYN), Some(Reason::Allowed));
    pod.expect(Egress, &eth().ipv4(POD4, PEER4).tcp(1, 2, FIN), None);
    pod.expect(Ingress, &eth().ipv4(PEER4, POD4).udp(1, 2), Some(Reason::Denied));
    assert_eq!(pod.events().iter().map(|e| e.kind).collect::<Vec<_>>(), [EventKind::Denied as u8]);
    assert_eq!(pod.limit().limited, 2, "the new flow and its end");
}

#[test]
fn events_that_find_the_ring_full_are_counted() {
    if !require(Rung::Kernel) {
        return;
    }
    let sizes = Sizes { event_bytes: 4096, ..small() };
    let pod = Pod::with(&Spec::new(&sizes, &ALLOW, &ALLOW));
    for port in 0..100 {
        pod.expect(Egress, &eth().ipv4(POD4, PEER4).udp(port, 2), Some(Reason::Allowed));
    }
    let lost = pod.limit().lost;
    assert_eq!(pod.events().len() as u64 + lost, 100);
    assert!(lost > 50, "4,096 bytes hold 39 events, {lost} were lost");
}
