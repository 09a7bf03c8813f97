//! Many flows: what a flood can take, and what it cannot.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use dcenet_core::test_support::{Rung, effort, require};
use dcenet_ebpf::abi::{Flow, FlowKey, FlowState, FullTable, Reason, Sizes};
use dcenet_ebpf::datapath::{AllowAll, Found, Spec, Timeouts, sweep};
use dcenet_ebpf::maps::Put;
use dcenet_ebpf::program::TestRun;
use dcenet_ebpf::test_support::packet::*;

use crate::harness::*;

const ALLOW: AllowAll = AllowAll { rule: 1 };

/// How many flows are settled, and how many are new.
fn count(pod: &Pod) -> (usize, usize) {
    let flows = pod.flows();
    (flows.settled.entries().unwrap().len(), flows.begun.entries().unwrap().len())
}

const NEW: (usize, usize) = (0, 1);
const SETTLED: (usize, usize) = (1, 0);

#[test]
fn a_connection_settles_when_its_opener_has_seen_the_answer() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        for addresses in VERSIONS {
            let (from, to) = way(direction, addresses);
            let back = direction.opposite();
            let there = |flags, seq, ack| eth().ip(from, to).tcp(40000, 80, flags).numbers(seq, ack);
            let answer = |flags, seq, ack| eth().ip(to, from).tcp(80, 40000, flags).numbers(seq, ack);
            for isn in [7_000, u32::MAX - 1, 0x7fff_ffff] {
                let pod = Pod::new(&ALLOW, &ALLOW);
                pod.expect(direction, &there(SYN, 100, 0), Some(Reason::Allowed));
                pod.expect(back, &answer(SYN | ACK, isn, 101), None);
                // Asked again by one who was not heard, or by one who guesses.
                pod.expect(direction, &there(SYN, 100, 0), None);
                for guess in [isn, isn.wrapping_add(1 + (1 << 17)), isn.wrapping_sub(1000)] {
                    pod.expect(direction, &there(ACK, 101, guess), None);
                    assert_eq!(count(&pod), NEW, "{guess}");
                }
                // The answering side alone does not settle it.
                pod.expect(back, &answer(ACK | PSH, isn.wrapping_add(1), 101), None);
                assert_eq!(count(&pod), NEW);
                let before = pod.flow().1;
                pod.expect(direction, &there(ACK, 101, isn.wrapping_add(1)), None);
                assert_eq!(count(&pod), SETTLED);
                let after = pod.flow().1;
                let sent = |flow: Flow| flow.egress_packets + flow.ingress_packets;
                assert_eq!((after.state, sent(after)), (FlowState::Established as u8, sent(before) + 1));
                assert_eq!(
                    (after.rule, after.generation, after.direction),
                    (before.rule, before.generation, before.direction)
                );
                pod.expect(back, &answer(ACK, isn.wrapping_add(1), 101), None);
                pod.expect(direction, &there(ACK, 101, 12), None);
                assert_eq!((count(&pod), sent(pod.flow().1)), (SETTLED, sent(after) + 2));
            }
        }
    }
}

#[test]
fn what_was_acknowledged_within_the_first_window_counts() {
    if !require(Rung::Kernel) {
        return;
    }
    for (later, settled) in [(1, SETTLED), (14_600, SETTLED), (1 << 17, SETTLED), ((1 << 17) + 1, NEW)] {
        let pod = Pod::new(&ALLOW, &ALLOW);
        pod.expect(Egress, &eth().ipv4(POD4, PEER4).tcp(4000, 80, SYN), Some(Reason::Allowed));
        pod.expect(Ingress, &eth().ipv4(PEER4, POD4).tcp(80, 4000, SYN | ACK).numbers(500, 1), None);
        pod.expect(Egress, &eth().ipv4(POD4, PEER4).tcp(4000, 80, ACK | PSH).numbers(1, 500 + later), None);
        assert_eq!(count(&pod), settled, "{later}");
    }
}

#[test]
fn a_connection_met_in_mid_flow_settles_unless_its_answer_is_a_reset() {
    if !require(Rung::Kernel) {
        return;
    }
    let (there, answer) = (eth().ipv6(POD6, PEER6), eth().ipv6(PEER6, POD6));
    for (answered, settled) in [(ACK, SETTLED), (RST, NEW), (RST | ACK, NEW), (FIN | ACK, NEW)] {
        let pod = Pod::new(&ALLOW, &ALLOW);
        pod.expect(Egress, &there.clone().tcp(4000, 80, ACK), Some(Reason::Allowed));
        pod.expect(Egress, &there.clone().tcp(4000, 80, ACK), None);
        assert_eq!(count(&pod), NEW);
        pod.expect(Ingress, &answer.clone().tcp(80, 4000, answered), None);
        pod.expect(Egress, &there.clone().tcp(4000, 80, ACK), None);
        assert_eq!(count(&pod), settled, "{answered:#x}");
    }
}

#[test]
fn other_flows_settle_after_three_answers() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        let (from, to) = way(direction, VERSIONS[0]);
        let pairs = [
            (eth().ip(from, to).udp(40000, 53), eth().ip(to, from).udp(53, 40000)),
            (eth().ip(from, to).sctp(40000, 80), eth().ip(to, from).sctp(80, 40000)),
            (eth().ip(from, to).echo_request(9), eth().ip(to, from).echo_reply(9)),
        ];
        for (there, answer) in pairs {
            let pod = Pod::new(&ALLOW, &ALLOW);
            pod.expect(direction, &there, Some(Reason::Allowed));
            for expected in [NEW, NEW, SETTLED] {
                pod.expect(direction.opposite(), &answer, None);
                pod.expect(direction, &there, None);
                assert_eq!(count(&pod), expected);
            }
            // One way, however often.
            let pod = Pod::new(&ALLOW, &ALLOW);
            pod.expect(direction, &there, Some(Reason::Allowed));
            for _ in 0..8 {
                pod.expect(direction, &there, None);
            }
            assert_eq!(count(&pod), NEW);
        }
    }
}

/// What a server takes no notice of, and what it answers whoever sent it, prove nothing; nor does an answer to an opener
/// that is gone stand in the way of the next one.
#[test]
fn only_the_number_of_the_last_answer_is_a_proof() {
    if !require(Rung::Kernel) {
        return;
    }
    let there = |flags, ack| eth().ipv4(PEER4, POD4).tcp(4000, 80, flags).numbers(1, ack);
    let answer = |isn| eth().ipv4(POD4, PEER4).tcp(80, 4000, SYN | ACK).numbers(isn, 2);
    for silent in [0, PSH, ACK] {
        let pod = Pod::new(&ALLOW, &ALLOW);
        pod.expect(Ingress, &there(silent, 0), Some(Reason::Allowed));
        pod.expect(Ingress, &there(SYN, 0), None);
        pod.expect(Egress, &answer(500), None);
        for flags in [0, PSH, ACK, ACK | PSH] {
            pod.expect(Ingress, &there(flags, 0), None);
            assert_eq!(count(&pod), NEW, "{silent} {flags}");
        }
        pod.expect(Egress, &answer(900_000), None);
        pod.expect(Ingress, &there(ACK, 501), None);
        assert_eq!(count(&pod), NEW);
        pod.expect(Ingress, &there(ACK, 900_001), None);
        assert_eq!(count(&pod), SETTLED);
    }
}

/// A settled connection of the pod to the peer's port 80.
fn settle(pod: &Pod, port: u16) {
    let there = |flags, ack| eth().ipv4(POD4, PEER4).tcp(port, 80, flags).numbers(1, ack);
    pod.expect(Egress, &there(SYN, 0), Some(Reason::Allowed));
    pod.expect(Ingress, &eth().ipv4(PEER4, POD4).tcp(80, port, SYN | ACK).numbers(500, 2), None);
    pod.expect(Egress, &there(ACK, 501), None);
}

#[test]
fn a_settled_flow_that_is_over_makes_room_for_the_next_of_its_name() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = Pod::new(&ALLOW, &ALLOW);
    let there = |flags| eth().ipv4(POD4, PEER4).tcp(4000, 80, flags);
    settle(&pod, 4000);
    assert_eq!(count(&pod), SETTLED);
    pod.expect(Egress, &there(FIN | ACK), None);
    pod.expect(Egress, &there(SYN), Some(Reason::Allowed));
    assert_eq!(count(&pod), NEW);
    pod.expect(Ingress, &eth().ipv4(PEER4, POD4).tcp(80, 4000, SYN | ACK).numbers(900, 2), None);
    pod.expect(Egress, &there(ACK).numbers(1, 901), None);
    assert_eq!(count(&pod), SETTLED);
    pod.set_flow(|flow| flow.timeout = 0);
    std::thread::sleep(Duration::from_millis(20));
    pod.expect(Egress, &there(ACK), Some(Reason::Allowed));
    assert_eq!(count(&pod), NEW);
}

#[test]
fn a_settled_flow_is_judged_anew_as_others_are() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut pod = Pod::new(&ALLOW, &ALLOW);
    settle(&pod, 4000);
    let there = eth().ipv4(POD4, PEER4).tcp(4000, 80, ACK);
    pod.bump(1, 1);
    pod.expect(Egress, &there, None);
    assert_eq!((count(&pod), pod.flow().1.generation), (SETTLED, 1));
    let deny = dcenet_ebpf::datapath::DenyAll { rule: 2 };
    pod.replace(&deny, &ALLOW);
    pod.bump(1, 1);
    pod.expect(Egress, &there, Some(Reason::Revoked));
    pod.expect(Ingress, &eth().ipv4(PEER4, POD4).tcp(80, 4000, ACK), Some(Reason::Revoked));
    assert_eq!((count(&pod), pod.flow().1.generation), (SETTLED, 1));
    // A SYN of the other side, which is allowed, is a connection of its own.
    pod.expect(Ingress, &eth().ipv4(PEER4, POD4).tcp(80, 4000, SYN), Some(Reason::Allowed));
    assert_eq!(count(&pod), NEW);
}

/// Runs a frame without a look at anything but the verdict, for floods.
fn passes(pod: &Pod, direction: dcenet_ebpf::abi::Direction, packet: &Packet) -> bool {
    let frame = packet.bytes();
    let run = TestRun { packet: &frame, context: &[], repeat: 1 };
    pod.program(direction).test_run(&run).unwrap().retval.cast_signed() == TC_ACT_UNSPEC
}

/// Live connections while others are opened, as many as both tables hold, four times over: how many are left.
fn live_after(opened: &dyn Fn(&Pod, Ipv4Addr)) -> usize {
    const LIVE: u16 = 200;
    let sizes = Sizes { conntrack: 1024, conntrack_new: 1024, ..small() };
    let pod = Pod::with(&Spec::new(&sizes, &ALLOW, &ALLOW));
    pod.without_twin();
    for port in 0..LIVE {
        settle(&pod, 4000 + port);
    }
    let settled: Vec<FlowKey> = pod.flows().settled.entries().unwrap().into_iter().map(|(key, _)| key).collect();
    assert_eq!(settled.len(), usize::from(LIVE));
    for n in 0..effort(8192, 8192, 65_536_u32) {
        opened(&pod, Ipv4Addr::from(0x0b00_0000 + n));
    }
    settled.iter().filter(|key| pod.flows().settled.load(key).unwrap().is_some()).count()
}

#[test]
fn a_flood_of_answered_openings_takes_no_live_connection() {
    if !require(Rung::Kernel) {
        return;
    }
    let syn = |source: Ipv4Addr| eth().ipv4(source, POD4).tcp(1, 443, SYN);
    let answer = |to: Ipv4Addr| eth().ipv4(POD4, to).tcp(443, 1, SYN | ACK).numbers(77, 1);
    let left = live_after(&|pod, source| {
        assert!(passes(pod, Ingress, &syn(source)) && passes(pod, Egress, &answer(source)));
        // Who does not see the answer can say no more than this.
        assert!(passes(pod, Ingress, &syn(source)));
        assert!(passes(pod, Ingress, &eth().ipv4(source, POD4).tcp(1, 443, ACK).numbers(2, 123_456_789)));
    });
    assert_eq!(left, 200);

    // Datagrams, and packets of connections that there are not.
    let left = live_after(&|pod, source| {
        assert!(passes(pod, Ingress, &eth().ipv4(source, POD4).udp(1, 53)));
        assert!(passes(pod, Egress, &eth().ipv4(POD4, source).udp(53, 1)));
        assert!(passes(pod, Ingress, &eth().ipv4(source, POD4).tcp(1, 443, ACK)));
        assert!(passes(pod, Egress, &eth().ipv4(POD4, source).tcp(443, 1, RST)));
        assert!(passes(pod, Ingress, &eth().ipv4(source, POD4).tcp(1, 443, ACK)));
    });
    assert_eq!(left, 200);

    // Connections that are real take what room there is, so the above would have been seen.
    let left = live_after(&|pod, source| {
        assert!(passes(pod, Ingress, &syn(source)) && passes(pod, Egress, &answer(source)));
        assert!(passes(pod, Ingress, &eth().ipv4(source, POD4).tcp(1, 443, ACK).numbers(2, 78)));
    });
    assert!(left < 200, "{left}");
}

#[test]
fn a_full_table_refuses_until_what_is_over_is_swept() {
    if !require(Rung::Kernel) {
        return;
    }
    let sizes = Sizes { conntrack: 2, conntrack_new: 4, full_table: FullTable::Refuse, ..small() };
    let timeouts = Timeouts { tcp_new: Duration::ZERO, ..Timeouts::default() };
    let pod = Pod::with(&Spec { timeouts, ..Spec::new(&sizes, &ALLOW, &ALLOW) });
    let lives = |slot, tenure| (slot, tenure) == (0, 0);
    let udp = |port| eth().ipv4(POD4, PEER4).udp(port, 53);
    let syn = |port| eth().ipv4(POD4, PEER4).tcp(port, 80, SYN);
    pod.expect(Egress, &udp(1), Some(Reason::Allowed));
    pod.expect(Egress, &udp(2), Some(Reason::Allowed));
    pod.expect(Egress, &syn(3), Some(Reason::Allowed));
    pod.expect(Egress, &syn(4), Some(Reason::Allowed));
    for packet in [udp(5), syn(6)] {
        pod.expect(Egress, &packet, Some(Reason::ConntrackFull));
    }
    pod.expect(Egress, &udp(1), None);
    std::thread::sleep(Duration::from_millis(20));

    let mut told = Vec::new();
    sweep(&pod.flows().begun, uptime_ns(), &lives, &mut |key, flow, found| {
        told.push((key.protocol, key.pod_port.0, flow.egress_packets, found));
    })
    .unwrap();
    told.sort_unstable();
    let (live, silent) = (Found::Live, Found::Silent);
    assert_eq!(told, [(6, 3, 1, silent), (6, 4, 1, silent), (17, 1, 2, live), (17, 2, 1, live)]);
    for packet in [udp(5), syn(6)] {
        pod.expect(Egress, &packet, Some(Reason::Allowed));
    }
    pod.expect(Egress, &udp(7), Some(Reason::ConntrackFull));

    // Flows of an endpoint that is gone, the settled ones full: it stays among the new ones, and passes.
    let (key, flow) = pod.flows().begun.entries().unwrap()[0];
    for slot in [1, 2] {
        pod.flows().settled.store(&FlowKey { slot, ..key }, &flow, Put::New).unwrap();
    }
    for _ in 0..4 {
        pod.expect(Ingress, &eth().ip(PEER4.into(), POD4.into()).udp(53, 1), None);
        pod.expect(Egress, &udp(1), None);
    }
    assert_eq!(count(&pod), (2, 4));
    let mut told = Vec::new();
    sweep(&pod.flows().settled, uptime_ns(), &lives, &mut |_, _, found| told.push(found)).unwrap();
    assert_eq!(told, [Found::Orphan; 2]);
    pod.expect(Egress, &udp(1), None);
    assert_eq!(count(&pod), (1, 3));
}

#[test]
fn a_full_table_forgets_the_flow_that_was_used_least_recently() {
    if !require(Rung::Kernel) {
        return;
    }
    let sizes = Sizes { conntrack_new: 1024, ..small() };
    let pod = Pod::with(&Spec::new(&sizes, &ALLOW, &ALLOW));
    // The kernel evicts by its own approximation of what was used last.
    pod.without_twin();
    let peer = |n: u32| Ipv4Addr::from(0x0b00_0000 + n);
    for n in 0..4096 {
        assert!(passes(&pod, Egress, &eth().ipv4(POD4, peer(n)).udp(1, 53)));
        // One that goes on, one way.
        assert!(passes(&pod, Egress, &eth().ipv4(POD4, PEER4).udp(1, 53)));
    }
    let keys: Vec<FlowKey> = pod.flows().begun.entries().unwrap().into_iter().map(|(key, _)| key).collect();
    assert!(keys.len() <= 1024, "{}", keys.len());
    let left = |peers: std::ops::Range<u32>| {
        let peers: BTreeSet<[u8; 16]> = peers.map(|n| peer(n).to_ipv6_mapped().octets()).collect();
        keys.iter().filter(|key| peers.contains(&key.peer)).count()
    };
    let (first, last) = (left(0..1024), left(3072..4096));
    assert!(first < last / 2, "{first} of the first and {last} of the last");
    let goes_on = pod.flows().begun.entries().unwrap().into_iter();
    let goes_on = goes_on.filter(|(key, _)| key.peer == PEER4.to_ipv6_mapped().octets()).map(|(_, flow)| flow);
    assert_eq!(goes_on.map(|flow| flow.egress_packets).collect::<Vec<_>>(), [4096]);
}
