//! ICMP errors: they pass where the flow that they are about is known, and tell nothing new.

use std::net::IpAddr;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::{Direction, Reason};
use dcenet_ebpf::datapath::{AllowAll, DenyAll};
use dcenet_ebpf::test_support::packet::*;

use crate::harness::*;

const ALLOW: AllowAll = AllowAll { rule: 1 };
const DENY: DenyAll = DenyAll { rule: 2 };

/// Error types: for IPv4 unreachable, time exceeded, parameter problem; for IPv6 also too big.
fn kinds(address: IpAddr) -> &'static [u8] {
    if address.is_ipv4() { &[3, 11, 12] } else { &[1, 2, 3, 4] }
}

fn one_way(direction: Direction) -> Pod {
    match direction {
        Egress => Pod::new(&ALLOW, &DENY),
        Ingress => Pod::new(&DENY, &ALLOW),
    }
}

#[test]
fn an_error_about_a_known_flow_passes_both_ways() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        for (pod_ip, peer) in VERSIONS {
            let pod = one_way(direction);
            let (from, to) = way(direction, (pod_ip, peer));
            let back = direction.opposite();
            let known = [
                eth().ip(from, to).tcp(40000, 80, SYN),
                eth().ip(from, to).udp(40000, 53).payload(4),
                eth().ip(from, to).sctp(40000, 80),
                eth().ip(from, to).echo_request(9),
                eth().ip(from, to).protocol(47).payload(16),
            ];
            // Errors about the pod's packets come from anywhere on the way; the pod's own go to the packet's sender.
            let router: IpAddr = if pod_ip.is_ipv4() { ROUTER4.into() } else { ROUTER6.into() };
            let reporter = if back == Ingress { router } else { pod_ip };
            for packet in &known {
                for kind in kinds(pod_ip) {
                    let error = eth().ip(reporter, from).icmp_error(*kind, 0, packet);
                    pod.expect(back, &error, Some(Reason::Denied));
                }
            }
            for packet in &known {
                pod.expect(direction, packet, Some(Reason::Allowed));
            }
            let before = sorted(&pod);
            for packet in &known {
                for kind in kinds(pod_ip) {
                    let error = eth().ip(reporter, from).icmp_error(*kind, 0, packet);
                    pod.expect(back, &error, Some(Reason::Related));
                    let tagged = eth().vlan(2).ip(reporter, from).options(&[1; 4]).icmp_error(*kind, 1, packet);
                    pod.expect(back, &tagged, Some(Reason::Related));
                }
            }
            assert_eq!(sorted(&pod), before, "an error neither counts in the flow nor keeps it alive");

            // About the reply, sent by who got it.
            let reply = eth().ip(to, from).udp(53, 40000);
            let error = eth().ip(from, to).icmp_error(kinds(pod_ip)[0], 3, &reply);
            pod.expect(direction, &error, Some(Reason::Related));
            let reply = eth().ip(to, from).echo_reply(9);
            let error = eth().ip(from, to).icmp_error(kinds(pod_ip)[0], 3, &reply);
            pod.expect(direction, &error, Some(Reason::Related));
        }
    }
}

fn sorted(pod: &Pod) -> Vec<String> {
    let mut flows: Vec<String> = pod.flows().entries().iter().map(|f| format!("{f:?}")).collect();
    flows.sort();
    flows
}

#[test]
fn an_error_about_another_flow_is_judged_by_itself() {
    if !require(Rung::Kernel) {
        return;
    }
    for direction in [Egress, Ingress] {
        for (pod_ip, peer) in VERSIONS {
            let pod = one_way(direction);
            let (from, to) = way(direction, (pod_ip, peer));
            let back = direction.opposite();
            let stranger: IpAddr = if pod_ip.is_ipv4() { ROUTER4.into() } else { ROUTER6.into() };
            pod.expect(direction, &eth().ip(from, to).udp(40000, 53), Some(Reason::Allowed));
            let kind = kinds(pod_ip)[0];
            let strange = [
                eth().ip(from, to).udp(40000, 54),
                eth().ip(from, to).udp(40001, 53),
                eth().ip(from, to).tcp(40000, 53, ACK),
                eth().ip(from, stranger).udp(40000, 53),
                eth().ip(stranger, to).udp(40000, 53),
                eth().ip(to, from).udp(40000, 53),
                eth().ip(from, to).echo_request(5),
                eth().ip(from, to).icmp(13, 0, [0; 4]),
                eth().ip(from, to).fragment(3, 8, false).udp(40000, 53).payload(16),
            ];
            for packet in strange {
                pod.expect(back, &eth().ip(to, from).icmp_error(kind, 0, &packet), Some(Reason::Denied));
                // Where single packets are allowed it passes as one, and leaves nothing behind.
                pod.expect(direction, &eth().ip(from, to).icmp_error(kind, 0, &packet), Some(Reason::Allowed));
            }
            // The pod cannot report to somebody else about a flow of its own.
            if back == Egress {
                let about = eth().ip(from, to).udp(40000, 53);
                pod.expect(back, &eth().ip(pod_ip, stranger).icmp_error(kind, 0, &about), Some(Reason::Denied));
                pod.expect(back, &eth().ip(pod_ip, from).icmp_error(kind, 0, &about), Some(Reason::Related));
            }
            assert_eq!(pod.flows().entries().len(), 1);
        }
    }
}

#[test]
fn an_error_that_quotes_too_little_is_judged_by_itself() {
    if !require(Rung::Kernel) {
        return;
    }
    for (pod_ip, peer) in VERSIONS {
        let pod = one_way(Egress);
        let about = eth().ip(pod_ip, peer).udp(40000, 53);
        pod.expect(Egress, &about, Some(Reason::Allowed));
        let whole = eth().ip(peer, pod_ip).icmp_error(kinds(pod_ip)[0], 0, &about).bytes();
        for length in whole.len() - 8..whole.len() {
            assert_eq!(pod.run_bytes(Ingress, &whole[..length]), Some(Reason::Denied), "{length} bytes");
        }
        assert_eq!(pod.run_bytes(Ingress, &whole), Some(Reason::Related));
    }
}

#[test]
fn an_error_about_a_packet_with_options_or_extension_headers_is_understood() {
    if !require(Rung::Kernel) {
        return;
    }
    let pod = one_way(Egress);
    pod.expect(Egress, &eth().ipv4(POD4, PEER4).udp(40000, 53), Some(Reason::Allowed));
    pod.expect(Egress, &eth().ipv6(POD6, PEER6).udp(40000, 53), Some(Reason::Allowed));
    let about = eth().ipv4(POD4, PEER4).options(&[1; 40]).udp(40000, 53);
    pod.expect(Ingress, &eth().ipv4(ROUTER4, POD4).icmp_error(3, 4, &about), Some(Reason::Related));
    // Path MTU discovery of a fragmented datagram.
    let about = eth().ipv6(POD6, PEER6).extension(HOP_BY_HOP, 1).fragment(4, 0, true).udp(40000, 53).payload(8);
    pod.expect(Ingress, &eth().ipv6(ROUTER6, POD6).icmp_error(2, 0, &about), Some(Reason::Related));
    let about = eth().ipv6(POD6, PEER6).fragment(4, 8, true).udp(40000, 53).payload(8);
    pod.expect(Ingress, &eth().ipv6(ROUTER6, POD6).icmp_error(2, 0, &about), Some(Reason::Denied));
}

#[test]
fn an_error_about_a_flow_that_is_now_denied_cuts_it() {
    if !require(Rung::Kernel) {
        return;
    }
    for (pod_ip, peer) in VERSIONS {
        let mut pod = one_way(Egress);
        let about = eth().ip(pod_ip, peer).udp(40000, 53);
        let error = eth().ip(peer, pod_ip).icmp_error(kinds(pod_ip)[0], 0, &about);
        pod.expect(Egress, &about, Some(Reason::Allowed));
        pod.bump(1, 0);
        pod.expect(Ingress, &error, Some(Reason::Related));
        assert_eq!(pod.flow().1.generation, 1);
        pod.replace(&DENY, &ALLOW);
        pod.bump(1, 0);
        let seen = pod.flow().1.last_seen;
        for _ in 0..2 {
            pod.expect(Ingress, &error, Some(Reason::Revoked));
        }
        assert_eq!((pod.flow().1.generation, pod.flow().1.last_seen), (1, seen));
    }
}
