//! What a rule rejects is answered, and the answer passes, once.

use std::net::IpAddr;
use std::os::fd::AsFd;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::{self, Direction, Reason};
use dcenet_ebpf::datapath::{self, AllowAll, DenyAll, Spec, answer};
use dcenet_ebpf::insn::{Helper, Insn};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loaded, Loader};
use dcenet_ebpf::maps::ProgramArray;
use dcenet_ebpf::program::TestRun;
use dcenet_ebpf::test_support::packet::*;
use dcenet_ebpf::vm::{Environment, Maps, Skb, Vm};

use crate::harness::*;

const REJECT: DenyAll = DenyAll { rule: 33 };
/// `TC_ACT_REDIRECT` (include/uapi/linux/pkt_cls.h).
const BACK: i32 = 7;
const DROPPED: i32 = 2;

/// A pod of which rule 33 rejects, with the programs that answer.
fn pod(spec: &Spec<'_>) -> (Pod, Loaded) {
    let pod = Pod::with(spec);
    // Its VM has no programs to call.
    pod.without_twin();
    let bits = pod.array::<u64>(abi::REJECTS);
    bits.store(0, &(1 << 33)).unwrap();
    let (elf, answered) = (answer::programs(&small()).unwrap().to_elf().unwrap(), pod.map(abi::ANSWERED));
    let request = LoadRequest { maps: &[(abi::ANSWERED, answered.as_fd())] };
    let answerers = AyaLoader.load(&elf, &request).unwrap();
    let places = ProgramArray::new(pod.map(abi::ANSWERERS)).unwrap();
    for (place, name) in (0..).zip(answer::PROGRAMS) {
        let (_, program) = answerers.programs.iter().find(|(n, _)| n == name).unwrap();
        places.set(place, program).unwrap();
    }
    (pod, answerers)
}

/// The verdict on a frame, and the frame as it was left.
fn send(pod: &Pod, direction: Direction, frame: &[u8]) -> (i32, Vec<u8>) {
    let run = TestRun { packet: frame, context: &[], repeat: 1 };
    let outcome = pod.program(direction).test_run(&run).unwrap();
    (outcome.retval.cast_signed(), outcome.packet)
}

/// The Internet checksum over bytes that hold theirs is 0 (RFC 1071).
fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Checks an answer's headers and checksums, and gives what is behind the IP header.
#[track_caller]
fn opened(answer: &[u8], rejected: &[u8], (from, to): (IpAddr, IpAddr)) -> Vec<u8> {
    assert_eq!((&answer[..6], &answer[6..12]), (&rejected[6..12], &rejected[..6]), "Ethernet addresses");
    assert_eq!(answer[12..14], rejected[12..14]);
    let ip = &answer[14..];
    let (header, protocol) = if from.is_ipv4() {
        assert_eq!(ip[0], 0x45);
        assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
        assert_eq!(checksum(&[&ip[..20]]), 0);
        assert_eq!(ip[12..20], [octets(from), octets(to)].concat());
        (20, ip[9])
    } else {
        assert_eq!(ip[0], 0x60);
        assert_eq!(usize::from(u16::from_be_bytes([ip[4], ip[5]])), ip.len() - 40);
        assert_eq!(ip[8..40], [octets(from), octets(to)].concat());
        (40, ip[6])
    };
    let rest = &ip[header..];
    let pseudo = match protocol {
        1 => Vec::new(),
        _ => [octets(from), octets(to), vec![0, protocol], (rest.len() as u16).to_be_bytes().to_vec()].concat(),
    };
    assert_eq!(checksum(&[&pseudo, rest]), 0, "protocol {protocol}");
    [&[protocol], rest].concat()
}

#[test]
fn a_rejected_segment_is_reset_as_by_a_host_without_the_port() {
    if !require(Rung::Kernel) {
        return;
    }
    for (pod_ip, peer) in VERSIONS {
        for direction in [Egress, Ingress] {
            let (pod, _answerers) = pod(&Spec::new(&small(), &REJECT, &REJECT));
            let (from, to) = way(direction, (pod_ip, peer));
            // Sequence, acknowledgement and flags of the reset (RFC 9293, section 3.10.7.1).
            let cases = [
                (SYN, 7, 0, 0, [0, 8], RST | ACK),
                (SYN | FIN, u32::MAX, 0, 3, [0, 4], RST | ACK),
                (ACK, 7, 100, 9, [100, 0], RST),
                (PSH | ACK | FIN, 7, 100, 9, [100, 0], RST),
                (0, 7, 0, 5, [0, 12], RST | ACK),
            ];
            for (port, (flags, sequence, acknowledged, payload, numbers, answered)) in (40_000..).zip(cases) {
                let rejected = eth().ip(from, to).tcp(port, 80, flags).numbers(sequence, acknowledged).payload(payload);
                let (verdict, answer) = send(&pod, direction, &rejected.bytes());
                assert_eq!(verdict, BACK, "{rejected:?}");
                let segment = opened(&answer, &rejected.bytes(), (to, from));
                let mut expected = vec![6];
                expected.extend([80u16.to_be_bytes(), port.to_be_bytes()].concat());
                expected.extend(numbers.map(u32::to_be_bytes).concat());
                expected.extend([0x50, answered, 0, 0]);
                assert_eq!(segment[..expected.len()], expected, "{rejected:?}");
                assert_eq!(segment.len(), 21);

                let back = direction.opposite();
                let there = eth().ip(from, to).tcp(port, 80, RST);
                assert_eq!(pod.run(direction, &there), Some(Reason::Denied), "the same way");
                assert_eq!(pod.run_bytes(back, &answer), Some(Reason::Related), "{rejected:?}");
                assert_eq!(pod.run_bytes(back, &answer), Some(Reason::Denied), "a second one");
            }
            let reset = eth().ip(from, to).tcp(40_100, 80, RST);
            assert_eq!(send(&pod, direction, &reset.bytes()).0, DROPPED, "a reset is not answered");
            assert!(pod.flows().entries().is_empty());
        }
    }
}

#[test]
fn what_is_no_segment_is_answered_by_an_error() {
    if !require(Rung::Kernel) {
        return;
    }
    for (pod_ip, peer) in VERSIONS {
        let (kind, code, quoted) = if pod_ip.is_ipv4() { (3, 13, 28) } else { (1, 1, 48) };
        for direction in [Egress, Ingress] {
            let (pod, _answerers) = pod(&Spec::new(&small(), &REJECT, &REJECT));
            let (from, to) = way(direction, (pod_ip, peer));
            let begun = eth().ip(from, to);
            let answered = [
                begun.clone().udp(40_000, 53).payload(4),
                begun.clone().udp(40_000, 53),
                begun.clone().udp(40_001, 53).payload(1400),
                begun.clone().sctp(40_000, 80),
                begun.clone().echo_request(9),
            ];
            for rejected in &answered {
                let frame = rejected.bytes();
                let (verdict, answer) = send(&pod, direction, &frame);
                assert_eq!(verdict, BACK, "{rejected:?}");
                let error = opened(&answer, &frame, (to, from));
                assert_eq!(error[1..3], [kind, code]);
                assert_eq!(error[5..9], [0; 4]);
                assert_eq!(error[9..], frame[14..14 + quoted], "{rejected:?}");
                let back = direction.opposite();
                assert_eq!(pod.run_bytes(back, &answer), Some(Reason::Related), "{rejected:?}");
                assert_eq!(pod.run_bytes(back, &answer), Some(Reason::Denied), "a second one: {rejected:?}");
            }
            let silent = [
                begun.clone().echo_reply(9),
                begun.clone().icmp_error(kind, 0, &answered[0]),
                begun.clone().udp(40_000, 53).payload(4).vlan(5),
            ];
            for rejected in silent {
                assert_eq!(send(&pod, direction, &rejected.bytes()).0, DROPPED, "{rejected:?}");
            }
            let back = eth().ip(to, from).icmp_error(kind, code, &begun.clone().echo_reply(9));
            assert_eq!(
                pod.run(direction.opposite(), &back),
                Some(Reason::Denied),
                "no answer, and nothing passes as one"
            );
        }
    }
}

#[test]
fn packets_of_a_flow_that_is_no_longer_allowed_are_answered() {
    if !require(Rung::Kernel) {
        return;
    }
    let allow = AllowAll { rule: 1 };
    for (pod_ip, peer) in VERSIONS {
        for direction in [Egress, Ingress] {
            let (mut pod, _answerers) = pod(&Spec::new(&small(), &allow, &allow));
            let (from, to) = way(direction, (pod_ip, peer));
            let packets = [eth().ip(from, to).tcp(40_000, 80, SYN), eth().ip(from, to).udp(40_000, 53).payload(4)];
            for packet in &packets {
                pod.expect(direction, packet, Some(Reason::Allowed));
            }
            pod.replace(&REJECT, &REJECT);
            pod.bump(1, 1);
            for packet in &packets {
                let (verdict, answer) = send(&pod, direction, &packet.bytes());
                assert_eq!(verdict, BACK, "{packet:?}");
                assert_eq!(pod.run_bytes(direction.opposite(), &answer), Some(Reason::Related), "{packet:?}");
                assert_eq!(pod.run_bytes(direction.opposite(), &answer), Some(Reason::Revoked), "{packet:?}");
            }
        }
    }
}

#[test]
fn without_the_bit_of_its_rule_nothing_is_answered_and_no_answer_passes() {
    if !require(Rung::Kernel) {
        return;
    }
    for (pod_ip, peer) in VERSIONS {
        let (pod, _answerers) = pod(&Spec::new(&small(), &REJECT, &REJECT));
        let syn = eth().ip(pod_ip, peer).tcp(40_000, 80, SYN).bytes();
        let (verdict, answer) = send(&pod, Egress, &syn);
        assert_eq!(verdict, BACK);
        pod.array::<u64>(abi::REJECTS).store(0, &!(1 << 33)).unwrap();
        let other = eth().ip(pod_ip, peer).tcp(40_001, 80, SYN).bytes();
        assert_eq!(send(&pod, Egress, &other).0, DROPPED);
        let mut forged = answer.clone();
        forged[14 + if pod_ip.is_ipv4() { 20 } else { 40 } + 3] ^= 1;
        assert_eq!(pod.run_bytes(Ingress, &forged), Some(Reason::Denied), "of what was not answered");
        assert_eq!(pod.run_bytes(Ingress, &answer), Some(Reason::Related));
    }
}

#[test]
fn answers_have_a_limit_of_their_own() {
    if !require(Rung::Kernel) {
        return;
    }
    let (pod, _answerers) =
        pod(&Spec { answers: 3, denied_events: 0, ..Spec::new(&small(), &REJECT, &AllowAll { rule: 1 }) });
    let verdicts: Vec<i32> = (0..20u16)
        .map(|port| send(&pod, Egress, &eth().ip(POD4.into(), PEER4.into()).tcp(port, 80, SYN).bytes()).0)
        .collect();
    let answered = verdicts.iter().filter(|verdict| **verdict == BACK).count();
    // A window may end in between.
    assert!(answered == 3 || answered == 6, "{verdicts:?}");
    assert_eq!(verdicts.len() - answered, verdicts.iter().filter(|verdict| **verdict == DROPPED).count());
    assert_eq!(pod.limit().limited, 20, "events about drops, none of which was to be told");
}

#[test]
fn the_vm_answers_as_the_kernel_does() {
    if !require(Rung::Kernel) {
        return;
    }
    let object = answer::programs(&small()).unwrap();
    let loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    for (pod_ip, peer) in VERSIONS {
        let begun = eth().ip(pod_ip, peer);
        let frames = [
            begun.clone().tcp(40_000, 80, SYN).numbers(9, 0),
            begun.clone().tcp(40_000, 80, ACK).numbers(9, 77).payload(100),
            begun.clone().tcp(40_000, 80, RST),
            begun.clone().udp(40_000, 53).payload(31),
            begun.clone().echo_request(3),
            begun.clone().echo_reply(3),
            begun.clone().protocol(47).payload(16),
            begun.clone().protocol(59),
            eth().arp(1, POD4, PEER4),
            begun.clone().fragment(7, 8, true).udp(1, 2).payload(64),
        ];
        for (name, program) in &loaded.programs {
            let mut vm = Vm::new(&object.link(name).unwrap()).unwrap();
            for packet in &frames {
                let frame = packet.bytes();
                let kernel = program.test_run(&TestRun { packet: &frame, context: &[], repeat: 1 }).unwrap();
                let mut skb = Skb::new(&*frame);
                let run = vm.run(&mut skb, &mut Maps::new(object.maps()), &mut Environment::default()).unwrap();
                assert_eq!(run.value as u32, kernel.retval, "{name} {packet:?}");
                assert_eq!(skb.packet, kernel.packet, "{name} {packet:?}");
            }
        }
    }
}

#[test]
fn programs_that_answer_nothing_call_nobody() {
    let calls = |answers| {
        let object = datapath::program(&Spec { answers, ..Spec::new(&small(), &REJECT, &REJECT) }).unwrap();
        let all = object.functions().iter().flat_map(|function| function.insns().to_vec());
        all.filter(|insn| *insn == Insn::Call { helper: Helper::TailCall }).count()
    };
    assert_eq!((calls(0), calls(1)), (0, 2));
}
