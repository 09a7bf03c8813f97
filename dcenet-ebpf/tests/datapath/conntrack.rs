//! Flows: who may answer whom, for how long, and what a new policy makes of them.

use std::net::IpAddr;

use dcenet_core::test_support::{Rung, effort, require};
use dcenet_ebpf::abi::{Be16, Direction, Endpoint, Flow, FlowKey, FlowState, Reason};
use dcenet_ebpf::datapath::{AllowAll, DenyAll, EmitClassifier};
use dcenet_ebpf::maps::Put;
use dcenet_ebpf::test_support::packet::*;

use crate::harness::*;

const ALLOW: AllowAll = AllowAll { rule: 1 };
const DENY: DenyAll = DenyAll { rule: 2 };

/// A pod whose flows can begin in one direction only.
fn one_way(direction: Direction) -> Pod {
    let [egress, ingress]: [&dyn EmitClassifier; 2] = match direction {
        Egress => [&ALLOW, &DENY],
        Ingress => [&DENY, &ALLOW],
    };
    Pod::new(egress, ingress)
}

fn both() -> impl Iterator<Item = (Direction, (IpAddr, IpAddr))> {
    [Egress, Ingress].into_iter().flat_map(|d| VERSIONS.map(|a| (d, way(d, a))))
}

#[test]
fn only_replies_to_what_was_admitted_pass() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let pod = one_way(direction);
        let back = direction.opposite();
        let pairs = [
            (eth().ip(from, to).udp(40000, 53), eth().ip(to, from).udp(53, 40000)),
            (eth().ip(from, to).tcp(40000, 80, SYN), eth().ip(to, from).tcp(80, 40000, SYN | ACK)),
            (eth().ip(from, to).sctp(40000, 80), eth().ip(to, from).sctp(80, 40000)),
            (eth().ip(from, to).protocol(47).payload(4), eth().ip(to, from).protocol(47).payload(4)),
        ];
        for (there, answer) in pairs {
            pod.expect(back, &answer, Some(Reason::Denied));
            pod.expect(direction, &there, Some(Reason::Allowed));
            pod.expect(back, &answer, None);
            pod.expect(direction, &there, None);
        }
        // Other ports, other protocol, the same ports the other way round.
        pod.expect(back, &eth().ip(to, from).udp(53, 40001), Some(Reason::Denied));
        pod.expect(back, &eth().ip(to, from).udp(54, 40000), Some(Reason::Denied));
        pod.expect(back, &eth().ip(to, from).udp(40000, 53), Some(Reason::Denied));
        pod.expect(back, &eth().ip(to, from).tcp(53, 40000, ACK), Some(Reason::Denied));
    }
}

#[test]
fn a_flow_is_recorded_as_it_is() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let pod = one_way(direction);
        pod.set_endpoint(&Endpoint { generation_egress: 5, generation_ingress: 6, ..endpoint() });
        let there = eth().ip(from, to).udp(40000, 53).payload(10);
        let answer = eth().ip(to, from).udp(53, 40000).payload(20);
        let (there_bytes, answer_bytes) = (there.bytes().len() as u64, answer.bytes().len() as u64);

        pod.expect(direction, &there, Some(Reason::Allowed));
        let (key, flow) = pod.flow();
        let peer = VERSIONS[usize::from(from.is_ipv6())].1;
        let (pod_port, peer_port) = if direction == Egress { (40000, 53) } else { (53, 40000) };
        let expected = FlowKey {
            slot: 0,
            protocol: 17,
            version: if from.is_ipv4() { 4 } else { 6 },
            pod_port: Be16(pod_port),
            peer_port: Be16(peer_port),
            peer: match peer {
                IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
                IpAddr::V6(a) => a.octets(),
            },
        };
        assert_eq!(key, expected);
        assert_eq!(flow.generation, if direction == Egress { 5 } else { 6 });
        assert_eq!((flow.rule, flow.direction, flow.state), (1, direction as u8, FlowState::New as u8));
        assert_eq!(flow.timeout, 30_000_000_000);

        pod.expect(direction, &there, None);
        assert_eq!(pod.flow().1.state, FlowState::New as u8);
        pod.expect(direction.opposite(), &answer, None);
        let (_, flow) = pod.flow();
        assert_eq!((flow.state, flow.timeout), (FlowState::Established as u8, 300_000_000_000));
        let (own, other) = ((2, 2 * there_bytes), (1, answer_bytes));
        let (egress, ingress) = if direction == Egress { (own, other) } else { (other, own) };
        assert_eq!((flow.egress_packets, flow.egress_bytes), egress);
        assert_eq!((flow.ingress_packets, flow.ingress_bytes), ingress);
    }
}

#[test]
fn tcp_goes_from_its_syn_to_established_and_closing() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let pod = one_way(direction);
        let there = |flags| eth().ip(from, to).tcp(40000, 80, flags);
        let answer = |flags| eth().ip(to, from).tcp(80, 40000, flags);
        let back = direction.opposite();
        let state =
            |pod: &Pod| (FlowState::from_number(pod.flow().1.state).unwrap(), pod.flow().1.timeout / 1_000_000_000);

        pod.expect(direction, &there(SYN), Some(Reason::Allowed));
        pod.expect(direction, &there(SYN), None);
        assert_eq!(state(&pod), (FlowState::New, 60));
        pod.expect(back, &answer(SYN | ACK), None);
        assert_eq!(state(&pod), (FlowState::Established, 7440));
        pod.expect(direction, &there(ACK), None);
        // The answering side cannot begin a connection of its own over the same ports.
        pod.expect(back, &answer(SYN), Some(Reason::Denied));
        pod.expect(back, &answer(ACK), None);
        pod.expect(back, &answer(FIN | ACK), None);
        assert_eq!(state(&pod), (FlowState::Closing, 240));
        pod.expect(direction, &there(FIN | ACK), None);
        pod.expect(back, &answer(ACK), None);
        assert_eq!(state(&pod), (FlowState::Closing, 240));
        // The same ports again.
        pod.expect(direction, &there(SYN), Some(Reason::Allowed));
        assert_eq!(state(&pod), (FlowState::New, 60));
        pod.expect(back, &answer(RST | ACK), None);
        assert_eq!(state(&pod), (FlowState::Closing, 240));
    }
}

#[test]
fn tcp_in_mid_flow_is_judged_as_if_new() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let pod = one_way(direction);
        pod.expect(direction.opposite(), &eth().ip(to, from).tcp(80, 40000, ACK), Some(Reason::Denied));
        pod.expect(direction, &eth().ip(from, to).tcp(40000, 80, ACK | PSH), Some(Reason::Allowed));
        assert_eq!(pod.flow().1.state, FlowState::Established as u8);
        pod.expect(direction.opposite(), &eth().ip(to, from).tcp(80, 40000, ACK), None);
        pod.expect(direction, &eth().ip(from, to).tcp(1, 2, RST), Some(Reason::Allowed));
        let states: Vec<u8> = pod.flows().entries().iter().map(|(_, f)| f.state).collect();
        assert!(states.contains(&(FlowState::Closing as u8)), "{states:?}");
    }
}

#[test]
fn a_flow_is_forgotten_after_its_time() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let pod = one_way(direction);
        let (there, answer) = (eth().ip(from, to).udp(40000, 53), eth().ip(to, from).udp(53, 40000));
        pod.expect(direction, &there, Some(Reason::Allowed));
        let second = 1_000_000_000;
        pod.set_flow(|f| f.last_seen -= f.timeout - second);
        pod.expect(direction.opposite(), &answer, None);
        // That packet was seen: the time begins anew, and is longer now.
        pod.set_flow(|f| f.last_seen -= 290 * second);
        pod.expect(direction.opposite(), &answer, None);
        pod.set_flow(|f| f.last_seen -= f.timeout + second);
        pod.expect(direction.opposite(), &answer, Some(Reason::Denied));
        pod.expect(direction, &there, Some(Reason::Allowed));
        assert_eq!(pod.flow().1.state, FlowState::New as u8);
        pod.expect(direction.opposite(), &answer, None);
        // A tick that another CPU was ahead is no age.
        pod.set_flow(|f| f.last_seen += second);
        pod.expect(direction.opposite(), &answer, None);
    }
}

#[test]
fn the_time_of_a_settled_flow_goes_on_with_the_clock() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let pod = one_way(direction);
        let (there, answer) = (eth().ip(from, to).udp(40000, 53), eth().ip(to, from).udp(53, 40000));
        pod.expect(direction, &there, Some(Reason::Allowed));
        for _ in 0..4 {
            pod.expect(direction.opposite(), &answer, None);
            pod.expect(direction, &there, None);
        }
        let before = pod.flow().1;
        assert_ne!(before.tick, 0);
        // Longer than a tick of any kernel (CONFIG_HZ is 100 at the least).
        std::thread::sleep(std::time::Duration::from_millis(50));
        pod.expect(direction, &there, None);
        let after = pod.flow().1;
        assert!(after.last_seen >= before.last_seen + 20_000_000, "{before:?} {after:?}");
        assert!(after.tick > before.tick, "{before:?} {after:?}");
        // Packets are counted all the same, in whichever tick they come.
        for _ in 0..3 {
            pod.expect(direction, &there, None);
        }
        let counted = pod.flow().1;
        let packets = |flow: Flow| flow.egress_packets + flow.ingress_packets;
        assert_eq!(packets(counted), packets(after) + 3);
    }
}

#[test]
fn a_new_policy_keeps_what_it_allows_and_cuts_what_it_denies() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let back = direction.opposite();
        // The side that answers sends alone: a server's push. Its packets meet the other hook than the one that admitted.
        let orders = [vec![(back, false)], vec![(direction, true)], vec![(back, false), (direction, true)]];
        for packets in orders.into_iter().skip(effort(2, 0, 0)) {
            for still_allowed in [true, false] {
                let mut pod = one_way(direction);
                let there = eth().ip(from, to).udp(40000, 53);
                let push = eth().ip(to, from).udp(53, 40000);
                pod.expect(direction, &there, Some(Reason::Allowed));
                pod.expect(back, &push, None);

                let other = AllowAll { rule: 7 };
                let admitting: &dyn EmitClassifier = if still_allowed { &other } else { &DENY };
                // What the other direction allows must not matter: it did not admit the flow.
                let not: &dyn EmitClassifier = if still_allowed { &DENY } else { &ALLOW };
                match direction {
                    Egress => pod.replace(admitting, not),
                    Ingress => pod.replace(not, admitting),
                }
                // Until the generation moves, the old verdict stands.
                pod.expect(back, &push, None);
                match direction {
                    Egress => pod.bump(1, 0),
                    Ingress => pod.bump(0, 1),
                }
                for (at, forth) in &packets {
                    let packet = if *forth { &there } else { &push };
                    pod.expect(*at, packet, if still_allowed { None } else { Some(Reason::Revoked) });
                }
                if still_allowed {
                    let (_, flow) = pod.flow();
                    assert_eq!((flow.generation, flow.rule, flow.direction), (1, 7, direction as u8));
                    pod.expect(back, &push, None);
                } else {
                    let (_, flow) = pod.flow();
                    assert_eq!((flow.generation, flow.rule, flow.direction), (0, 1, direction as u8));
                }
            }
        }
    }
}

#[test]
fn a_revoked_flow_is_not_reopened_by_its_answers() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let back = direction.opposite();
        let pairs = [
            (eth().ip(from, to).udp(40000, 53), eth().ip(to, from).udp(53, 40000)),
            (eth().ip(from, to).tcp(40000, 80, ACK), eth().ip(to, from).tcp(80, 40000, ACK | PSH)),
            (eth().ip(from, to).sctp(40000, 80), eth().ip(to, from).sctp(80, 40000)),
            (eth().ip(from, to).echo_request(7), eth().ip(to, from).echo_reply(7)),
        ];
        for (there, answer) in pairs.into_iter().take(effort(1, 4, 4)) {
            // The usual policy: the direction that admits is closed, the other one is open.
            let (deny, allow) = (&DENY as &dyn EmitClassifier, &ALLOW as &dyn EmitClassifier);
            let mut pod = one_way(direction);
            pod.expect(direction, &there, Some(Reason::Allowed));
            pod.expect(back, &answer, None);
            match direction {
                Egress => pod.replace(deny, allow),
                Ingress => pod.replace(allow, deny),
            }
            pod.bump(1, 1);
            // As long as packets come it is remembered. The clock counts from the boot, which may be less long ago.
            for _ in 0..3 {
                pod.set_flow(|f| f.last_seen = f.last_seen.saturating_sub(f.timeout / 4 * 3));
                pod.expect(back, &answer, Some(Reason::Revoked));
                pod.set_flow(|f| f.last_seen = f.last_seen.saturating_sub(f.timeout / 4 * 3));
                pod.expect(direction, &there, Some(Reason::Revoked));
            }
            // Allowed again, it goes on where it stopped.
            match direction {
                Egress => pod.replace(&ALLOW, &DENY),
                Ingress => pod.replace(&DENY, &ALLOW),
            }
            pod.bump(1, 1);
            pod.expect(back, &answer, None);
            pod.expect(direction, &there, None);
            assert_eq!((pod.flow().1.generation, pod.flow().1.direction), (2, direction as u8));
        }
    }
}

#[test]
fn after_its_time_a_revoked_flow_is_nobodys() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let mut pod = one_way(direction);
        let (there, back) = (eth().ip(from, to).udp(500, 500), eth().ip(to, from).udp(500, 500));
        pod.expect(direction, &there, Some(Reason::Allowed));
        match direction {
            Egress => pod.replace(&DENY, &ALLOW),
            Ingress => pod.replace(&ALLOW, &DENY),
        }
        pod.bump(1, 1);
        pod.expect(direction.opposite(), &back, Some(Reason::Revoked));
        pod.set_flow(|f| f.last_seen -= f.timeout + 1_000_000_000);
        pod.expect(direction, &there, Some(Reason::Denied));
        pod.expect(direction.opposite(), &back, Some(Reason::Allowed));
        assert_eq!(pod.flow().1.direction, direction.opposite() as u8);
    }
}

#[test]
fn a_connection_that_begins_anew_over_a_revoked_one_is_judged_by_its_own_direction() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let mut pod = one_way(direction);
        pod.expect(direction, &eth().ip(from, to).tcp(40000, 80, ACK), Some(Reason::Allowed));
        match direction {
            Egress => pod.replace(&DENY, &ALLOW),
            Ingress => pod.replace(&ALLOW, &DENY),
        }
        pod.bump(1, 1);
        pod.expect(direction.opposite(), &eth().ip(to, from).tcp(80, 40000, ACK), Some(Reason::Revoked));
        pod.expect(direction.opposite(), &eth().ip(to, from).tcp(80, 40000, SYN), Some(Reason::Allowed));
        pod.expect(direction, &eth().ip(from, to).tcp(40000, 80, SYN | ACK), None);
    }
}

#[test]
fn a_denied_flow_of_who_had_the_slot_before_does_not_stay() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let (there, back) = (eth().ip(from, to).udp(500, 500), eth().ip(to, from).udp(500, 500));
        for tenure in [0, 1, u16::MAX] {
            let mut pod = one_way(direction);
            pod.expect(direction, &there, Some(Reason::Allowed));
            assert_eq!(pod.flow().1.tenure, 0);
            match direction {
                Egress => pod.replace(&DENY, &ALLOW),
                Ingress => pod.replace(&ALLOW, &DENY),
            }
            pod.set_endpoint(&Endpoint { tenure, generation_egress: 1, generation_ingress: 1, ..endpoint() });
            // The packet that finds it out is lost.
            pod.expect(direction.opposite(), &back, Some(Reason::Revoked));
            let why = if tenure == 0 { Reason::Revoked } else { Reason::Allowed };
            pod.expect(direction.opposite(), &back, Some(why));
            assert_eq!(pod.flow().1.tenure, tenure);
        }
        // One that is allowed becomes the endpoint's own.
        let pod = one_way(direction);
        pod.expect(direction, &there, Some(Reason::Allowed));
        pod.set_endpoint(&Endpoint { tenure: 9, generation_egress: 1, generation_ingress: 1, ..endpoint() });
        pod.expect(direction.opposite(), &back, None);
        assert_eq!((pod.flow().1.tenure, pod.flow().1.generation), (9, 1));
    }
}

#[test]
fn a_stale_flow_is_judged_by_its_own_orientation() {
    if !require(Rung::Kernel) {
        return;
    }
    // Only the port that the flow went to is allowed, in the direction that admitted it.
    for (direction, (from, to)) in both() {
        let list = List(vec![(0, 17, 53), (0, 1, 8 << 8), (0, 58, 128 << 8)]);
        let pod = match direction {
            Egress => Pod::new(&list, &DENY),
            Ingress => Pod::new(&DENY, &list),
        };
        pod.expect(direction, &eth().ip(from, to).udp(40000, 53), Some(Reason::Allowed));
        pod.expect(direction, &eth().ip(from, to).echo_request(9), Some(Reason::Allowed));
        for _ in 0..3 {
            pod.bump(1, 1);
            pod.expect(direction.opposite(), &eth().ip(to, from).udp(53, 40000), None);
            pod.expect(direction.opposite(), &eth().ip(to, from).echo_reply(9), None);
        }
        pod.bump(1, 1);
        pod.expect(direction, &eth().ip(from, to).udp(40000, 53), None);
        pod.expect(direction, &eth().ip(from, to).echo_request(9), None);
        assert!(pod.flows().entries().iter().all(|(_, f)| f.generation == 4));
    }
}

#[test]
fn the_generation_of_the_other_direction_does_not_matter() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let mut pod = one_way(direction);
        pod.expect(direction, &eth().ip(from, to).udp(40000, 53), Some(Reason::Allowed));
        pod.replace(&DENY, &DENY);
        match direction {
            Egress => pod.bump(0, 3),
            Ingress => pod.bump(3, 0),
        }
        pod.expect(direction.opposite(), &eth().ip(to, from).udp(53, 40000), None);
        assert_eq!(pod.flow().1.generation, 0);
    }
}

#[test]
fn an_echo_reply_passes_to_who_asked_and_no_question_comes_back() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        for id in [0, 1, 8, 0x8000, 0xffff] {
            let pod = one_way(direction);
            let back = direction.opposite();
            pod.expect(back, &eth().ip(to, from).echo_reply(id), Some(Reason::Denied));
            pod.expect(direction, &eth().ip(from, to).echo_request(id), Some(Reason::Allowed));
            pod.expect(back, &eth().ip(to, from).echo_reply(id), None);
            pod.expect(back, &eth().ip(to, from).echo_request(id), Some(Reason::Denied));
            pod.expect(back, &eth().ip(to, from).echo_reply(id ^ 2), Some(Reason::Denied));
            pod.expect(direction, &eth().ip(from, to).echo_request(id), None);
            assert_eq!(pod.flow().1.state, FlowState::Established as u8);
        }
    }
}

#[test]
fn an_echo_reply_that_nobody_asked_for_admits_no_question() {
    if !require(Rung::Kernel) {
        return;
    }
    for (direction, (from, to)) in both() {
        let pod = one_way(direction);
        // Allowed as a packet of its own, each time.
        for _ in 0..2 {
            pod.expect(direction, &eth().ip(from, to).echo_reply(5), Some(Reason::Allowed));
        }
        assert_eq!(pod.flows().entries(), []);
        pod.expect(direction.opposite(), &eth().ip(to, from).echo_request(5), Some(Reason::Denied));
    }
}

#[test]
fn two_pods_of_a_node_that_use_the_same_ports_keep_an_entry_each() {
    if !require(Rung::Kernel) {
        return;
    }
    // A test run sees slot 0 alone; the other pod's entry is laid beside it by hand.
    let pod = one_way(Egress);
    let (from, to) = way(Egress, VERSIONS[0]);
    pod.expect(Egress, &eth().ip(from, to).udp(5000, 5000), Some(Reason::Allowed));
    let (key, flow) = pod.flow();
    let other = FlowKey { slot: 1, ..key };
    let theirs = Flow { direction: Ingress as u8, rule: 99, ..flow };
    pod.flows().begun.store(&other, &theirs, Put::New).unwrap();
    pod.expect(Ingress, &eth().ip(to, from).udp(5000, 5000), None);
    assert_eq!(pod.flows().load(&other), Some(theirs));
    assert_eq!(pod.flows().load(&key).unwrap().ingress_packets, 1);

    pod.flows().begun.remove(&key).unwrap();
    pod.expect(Ingress, &eth().ip(to, from).udp(5000, 5000), Some(Reason::Denied));
}
