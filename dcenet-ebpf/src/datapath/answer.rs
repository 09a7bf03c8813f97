//! Answers to what a rule rejects: a reset for TCP (RFC 9293, section 3.10.7.1), and for all else an ICMP error that says that
//! the administrator forbids it (RFC 1812, section 5.2.7.1: type 3, code 13; RFC 4443, section 3.1: type 1, code 1).
//!
//! The packet itself becomes the answer: a program of the endpoint that denies a packet by a rule of [`REJECTS`](abi::REJECTS)
//! calls one of two programs here, which turns addresses round, cuts the packet to size and sends it back by the device that it was
//! on: out of it where it was about to come in, and into it where it was about to go out. On its way the answer meets the
//! endpoint's other program, which lets it pass where its own policy does, and otherwise once for each packet that was answered
//! ([`ANSWERED`](abi::ANSWERED)), if it is a reset or such an error, within [`WINDOW`], and no longer than these are.
//!
//! ```text
//! packet from the pod --> from_pod: denied by a rule that rejects --tail call--> answer --> out of the device --> to_pod --> pod
//! ```
//!
//! # What is not answered
//! * a reset, an ICMP message that is no echo request, and what is no unicast, from or to (RFC 1122, section 3.2.2; RFC 4443, section
//!   2.4 (e));
//! * a fragment that is not the first one, IPv4 with options, IPv6 with extension headers, and over IPv6 protocols other than TCP,
//!   UDP, UDP-Lite, SCTP and ICMPv6;
//! * frames with a VLAN tag;
//! * what [`Spec::answers`](super::Spec::answers) holds back, and what a guard judges again: the pod's own program has answered.
//!
//! All of this is dropped as if the rule said deny.
//!
//! # Minimum kernel version
//! 4.9 (`bpf_skb_change_tail`); for the programs that call these, which have functions of their own, 5.10 on x86-64 and 6.0 on
//! arm64 ([`Features::tail_calls_beside_functions`](crate::probe::Features::tail_calls_beside_functions)).

use super::emitter::{
    Emitter, ICMP, ICMPV6, SCTP, SKB_IFINDEX, SKB_LEN, SKB_VLAN_PRESENT, TC_ACT_SHOT, TCP, UDP, be16,
};
use super::{DatapathError, Judgement, Slot, frame};
use crate::abi::{self, Answered, Direction, Endpoint, EventLimit, FlowKey, Reason, Sizes};
use crate::asm::{AsmError, Function, Label};
use crate::insn::{Cond, Helper, Reg::*, Size, Src, SwapWidth};
use crate::object::Object;

/// Names of the programs, in the order of their places in [`abi::ANSWERERS`]: for the ingress hook of a pod's end on the host, for
/// the egress hook of any device, and for the ingress hook of a device in the pod.
pub const PROGRAMS: [&str; 3] = ["answer_ingress", "answer_egress", "answer_in_pod"];

/// How long after a packet its answer may pass, in nanoseconds: the kernel's queue between is far shorter, and this is some
/// ticks of the coarse clock.
pub const WINDOW: u64 = 1 << 28;

/// Writes the programs that answer, with the map [`abi::ANSWERED`].
///
/// # Errors
/// See [`DatapathError`].
pub fn programs(sizes: &Sizes) -> Result<Object, DatapathError> {
    let mut object = Object::new();
    for map in sizes.shared_maps().into_iter().filter(|map| map.name == abi::ANSWERED) {
        object.add_map(map)?;
    }
    for (name, back) in PROGRAMS.into_iter().zip([Back::Out, Back::In, Back::OutWithoutSocket]) {
        object.add(program(name, back)?)?;
    }
    Ok(object)
}

impl Emitter<'_> {
    /// Answers a packet that was dropped and told of, if its rule wants it; else goes on. [`frame::RULE`], [`frame::NOW`] and the key
    /// are set.
    pub(super) fn answer(&mut self) {
        let Judgement::Classifiers { answers, .. } = self.judgement else { return };
        if self.slot == Slot::Guarded || answers == 0 {
            return;
        }
        let [silent, within, keyed, icmp, on_host] = self.labels();
        self.asm.mark("an answer");
        self.asm.load(Size::W, R7, R10, frame::RULE).mov(R1, R7).rsh(R1, 6);
        self.lookup_index(abi::REJECTS, R1);
        self.asm.jump_if(Cond::Eq, R0, 0, silent).load(Size::Dw, R1, R0, 0).and(R7, 63).rsh(R1, R7).and(R1, 1).jump_if(
            Cond::Eq,
            R1,
            0,
            silent,
        );
        self.count_in_window(EventLimit::ANSWERS, answers, silent, within);
        self.asm
            .jump(silent)
            .bind(within)
            .add(R1, 1)
            .store(Size::W, R0, EventLimit::ANSWERS, R1)
            .load(Size::B, R1, R10, frame::VERSION)
            .and(R1, 0x0f)
            .or(R1, if self.direction == Direction::Ingress { TO_POD } else { 0 })
            .store(Size::B, R10, frame::VERSION, R1)
            .load(Size::B, R2, R10, frame::PROTOCOL)
            .jump_if(Cond::Eq, R2, TCP, keyed)
            // The answer is an error, which the other program takes for a packet of its own.
            .mov(R2, ICMP)
            .and(R1, 0x0f)
            .jump_if(Cond::Eq, R1, 4, icmp)
            .mov(R2, ICMPV6)
            .bind(icmp)
            .store(Size::B, R10, frame::PROTOCOL, R2)
            .bind(keyed)
            .load(Size::W, R1, R10, frame::KEY)
            .store(Size::W, R6, SKB_CB, R1);
        for word in 0..4 {
            self.asm.load(Size::W, R1, R10, frame::PEER + 4 * word).store(Size::W, R6, SKB_CB + 4 + 4 * word, R1);
        }
        // On the host's end what the pod sends comes in.
        let (on_host_index, in_pod_index) = match self.direction {
            Direction::Egress => (0, 1),
            Direction::Ingress => (1, 2),
        };
        self.asm
            .load(Size::W, R1, R9, Endpoint::FLAGS)
            .mov(R3, on_host_index)
            .and(R1, Endpoint::IN_POD as i32)
            .jump_if(Cond::Eq, R1, 0, on_host)
            .mov(R3, in_pod_index)
            .bind(on_host)
            .mov(R1, R6)
            .load_map(R2, abi::ANSWERERS)
            .call(Helper::TailCall)
            .bind(silent);
    }

    /// Lets an answer pass that comes of a packet the other way; else goes on. Uses `R7`.
    pub(super) fn pass_answer(&mut self) {
        let related = self.pass(Reason::Related);
        let [candidate, alone, other] = self.labels();
        let passed = match (self.direction, self.slot) {
            (Direction::Ingress, _) => Answered::FROM_POD,
            (Direction::Egress, Slot::Guarded) => Answered::TO_POD + 1,
            (Direction::Egress, _) => Answered::TO_POD,
        };
        self.asm
            .load(Size::W, R1, R10, frame::TCP_FLAGS)
            .jump_if(Cond::Set, R1, RST, candidate)
            .load(Size::W, R1, R10, frame::ICMP)
            .rsh(R1, 8)
            .jump_if(Cond::Eq, R1, UNREACHABLE_V4, candidate)
            .jump_if(Cond::Ne, R1, UNREACHABLE_V6, other)
            .bind(candidate)
            .load(Size::W, R1, R6, SKB_LEN)
            .jump_if(Cond::Gt, R1, LONGEST, other)
            .load(Size::W, R1, R10, frame::FLAGS)
            .and(R1, frame::RELATED)
            .jump_if(Cond::Eq, R1, 0, alone);
        self.unrelated();
        self.asm.bind(alone);
        self.lookup(abi::ANSWERED, frame::KEY);
        self.asm
            .jump_if(Cond::Eq, R0, 0, other)
            .mov(R7, R0)
            .call(Helper::KtimeGetCoarseNs)
            .load(Size::Dw, R1, R7, Answered::AT)
            .sub(R0, R1)
            // Signed: another CPU may have seen a later tick.
            .jump_if(Cond::Sgt, R0, WINDOW as i32, other)
            .load(Size::Dw, R1, R7, Answered::PASSED)
            .jump_if(Cond::Ne, R1, passed as i32, other)
            .store(Size::Dw, R7, Answered::PASSED, passed as i32 + 1)
            .jump(related)
            .bind(other);
    }
}

/// Which way the answer goes by the packet's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Back {
    Out,
    In,
    /// As a copy, which belongs to no socket: the packet may be another pod's still (net/core/skbuff.c, `skb_scrub_packet`), and a
    /// guard would take the answer for a frame that this one sends under another's address.
    OutWithoutSocket,
}

fn program(name: &str, back: Back) -> Result<Function, AsmError> {
    let mut emitter = Emitter::new(name, Direction::Egress, Slot::Guarded, Judgement::Unknown);
    let [gone, v4, v6, send] = emitter.labels();
    emitter.asm.mark("the frame");
    emitter
        .asm
        .mov(R6, R1)
        .store(Size::Dw, R10, SEGMENT, 0)
        .load(Size::W, R1, R6, SKB_VLAN_PRESENT)
        .jump_if(Cond::Ne, R1, 0, gone)
        .mov(R2, 0);
    emitter.copy(R2, FRAME, ETHERNET, gone);
    emitter
        .asm
        .load(Size::B, R1, R10, FRAME)
        .jump_if(Cond::Set, R1, GROUP, gone)
        .load(Size::H, R1, R10, FRAME + 12)
        .jump_if(Cond::Eq, R1, be16(0x0800), v4)
        .jump_if(Cond::Eq, R1, be16(0x86dd), v6)
        .jump(gone)
        .bind(v4);
    emitter.answer_v4(gone, send);
    emitter.asm.bind(v6);
    emitter.answer_v6(gone, send);

    emitter.asm.mark("the way back");
    emitter.asm.bind(send).mov(R1, R6).mov(R2, R8).add(R2, ETHERNET).mov(R3, 0).call(Helper::SkbChangeTail).jump_if(
        Cond::Ne,
        R0,
        0,
        gone,
    );
    for half in [0, 2, 4] {
        emitter
            .asm
            .load(Size::H, R1, R10, FRAME + half)
            .load(Size::H, R2, R10, FRAME + 6 + half)
            .store(Size::H, R10, FRAME + half, R2)
            .store(Size::H, R10, FRAME + 6 + half, R1);
    }
    emitter.write(0, FRAME, ETHERNET.into(), gone);
    emitter.write(ETHERNET, ANSWER, R8.into(), gone);
    emitter.note_answer(gone);
    let flags = if back == Back::In { BPF_F_INGRESS } else { 0 };
    match back {
        Back::Out | Back::In => {
            emitter.asm.load(Size::W, R1, R6, SKB_IFINDEX).mov(R2, flags).call(Helper::Redirect).exit();
        }
        Back::OutWithoutSocket => {
            emitter.asm.mov(R1, R6).load(Size::W, R2, R6, SKB_IFINDEX).mov(R3, flags).call(Helper::CloneRedirect);
        }
    }
    emitter.asm.bind(gone).ret(TC_ACT_SHOT);
    emitter.asm.finish()
}

impl Emitter<'_> {
    /// Leaves by `send` with the answer at [`ANSWER`] and its length in `R8`.
    fn answer_v4(&mut self, gone: Label, send: Label) {
        let [reset, error, checked] = self.labels();
        const QUOTE: i16 = ANSWER + 28;
        self.asm.mark("IPv4");
        self.asm.mov(R2, ETHERNET);
        self.copy(R2, QUOTE, 28, gone);
        self.asm
            .load(Size::B, R1, R10, QUOTE)
            .jump_if(Cond::Ne, R1, 0x45, gone)
            .load(Size::H, R1, R10, QUOTE + 6)
            .jump_if(Cond::Set, R1, be16(0x1fff), gone)
            .load(Size::B, R1, R10, QUOTE + 12)
            .jump_if(Cond::Eq, R1, 0, gone)
            .jump_if(Cond::Eq, R1, 127, gone)
            .jump_if(Cond::Ge, R1, 224, gone)
            .load(Size::B, R1, R10, QUOTE + 16)
            .jump_if(Cond::Ge, R1, 224, gone)
            // No identification, not to be fragmented; hop limit of RFC 1700.
            .store(Size::H, R10, ANSWER, be16(0x4500))
            .store(Size::W, R10, ANSWER + 4, 0)
            .store(Size::B, R10, ANSWER + 6, 0x40)
            .store(Size::W, R10, ANSWER + 8, HOPS)
            .load(Size::W, R1, R10, QUOTE + 16)
            .store(Size::W, R10, ANSWER + 12, R1)
            .load(Size::W, R1, R10, QUOTE + 12)
            .store(Size::W, R10, ANSWER + 16, R1)
            .load(Size::B, R1, R10, QUOTE + 9)
            .jump_if(Cond::Eq, R1, TCP, reset)
            .jump_if(Cond::Ne, R1, ICMP, error)
            .load(Size::B, R1, R10, QUOTE + 20)
            .jump_if(Cond::Ne, R1, ECHO_V4, gone)
            .bind(error)
            .store(Size::H, R10, ANSWER + 2, be16(56))
            .store(Size::B, R10, ANSWER + 9, ICMP)
            .store(Size::W, R10, ERROR_V4, 0)
            .store(Size::W, R10, ERROR_V4 + 4, 0)
            .store(Size::B, R10, ERROR_V4, UNREACHABLE_V4)
            .store(Size::B, R10, ERROR_V4 + 1, 13);
        self.sum(ERROR_V4, 36, 0.into());
        self.fold();
        self.asm.store(Size::H, R10, ERROR_V4 + 2, R0).mov(R8, 56).jump(checked).bind(reset);
        // What the segment takes of the sequence: its payload, and a place for SYN and FIN each.
        self.asm.load(Size::H, R8, R10, QUOTE + 2).be(SwapWidth::W16, R8).sub(R8, 20).mov(R2, ETHERNET + 20);
        self.copy(R2, SEGMENT, 20, gone);
        self.asm
            .load(Size::W, R1, R10, ANSWER + 12)
            .store(Size::W, R10, PSEUDO, R1)
            .load(Size::W, R1, R10, ANSWER + 16)
            .store(Size::W, R10, PSEUDO + 4, R1)
            .store(Size::H, R10, PSEUDO + 8, be16(TCP as u16))
            .store(Size::H, R10, PSEUDO + 10, be16(20));
        self.reset(ANSWER + 20, 12, gone);
        self.asm
            .store(Size::H, R10, ANSWER + 2, be16(40))
            .store(Size::B, R10, ANSWER + 9, TCP)
            .mov(R8, 40)
            .bind(checked);
        self.sum(ANSWER, 20, 0.into());
        self.fold();
        self.asm.store(Size::H, R10, ANSWER + 10, R0).jump(send);
    }

    /// As [`Emitter::answer_v4`].
    fn answer_v6(&mut self, gone: Label, send: Label) {
        let [reset, echo, error, unicast] = self.labels();
        const QUOTE: i16 = ANSWER + 48;
        self.asm.mark("IPv6");
        self.asm.mov(R2, ETHERNET);
        self.copy(R2, QUOTE, 48, gone);
        self.asm
            .load(Size::B, R1, R10, QUOTE + 8)
            .jump_if(Cond::Eq, R1, 0xff, gone)
            .load(Size::B, R1, R10, QUOTE + 24)
            .jump_if(Cond::Eq, R1, 0xff, gone)
            // Neither `::` nor `::1`.
            .load(Size::Dw, R1, R10, QUOTE + 8)
            .jump_if(Cond::Ne, R1, 0, unicast)
            .load(Size::Dw, R1, R10, QUOTE + 16)
            .be(SwapWidth::W64, R1)
            .jump_if(Cond::Le, R1, 1, gone)
            .bind(unicast)
            .store(Size::W, R10, ANSWER, 0x60)
            .store(Size::W, R10, ANSWER + 4, 0)
            .store(Size::B, R10, ANSWER + 7, HOPS)
            .store(Size::W, R10, PSEUDO + 32, 0)
            .store(Size::W, R10, PSEUDO + 36, 0);
        for (from, to) in [(24, 0), (32, 8), (8, 16), (16, 24)] {
            self.asm.load(Size::Dw, R1, R10, QUOTE + from).store(Size::Dw, R10, ANSWER + 8 + to, R1).store(
                Size::Dw,
                R10,
                PSEUDO + to,
                R1,
            );
        }
        self.asm.load(Size::B, R1, R10, QUOTE + 6).jump_if(Cond::Eq, R1, TCP, reset).jump_if(
            Cond::Eq,
            R1,
            ICMPV6,
            echo,
        );
        for protocol in [UDP, SCTP, UDP_LITE] {
            self.asm.jump_if(Cond::Eq, R1, protocol, error);
        }
        self.asm
            .jump(gone)
            .bind(echo)
            .load(Size::B, R1, R10, QUOTE + 40)
            .jump_if(Cond::Ne, R1, ECHO_V6, gone)
            .bind(error)
            .store(Size::H, R10, ANSWER + 4, be16(56))
            .store(Size::B, R10, ANSWER + 6, ICMPV6)
            .store(Size::H, R10, PSEUDO + 34, be16(56))
            .store(Size::B, R10, PSEUDO + 39, ICMPV6)
            .store(Size::Dw, R10, ERROR_V6, 0)
            .store(Size::B, R10, ERROR_V6, UNREACHABLE_V6)
            .store(Size::B, R10, ERROR_V6 + 1, 1);
        self.sum(PSEUDO, 40, 0.into());
        self.sum(ERROR_V6, 56, R0.into());
        self.fold();
        self.asm.store(Size::H, R10, ERROR_V6 + 2, R0).mov(R8, 96).jump(send).bind(reset);
        self.asm.load(Size::H, R8, R10, QUOTE + 4).be(SwapWidth::W16, R8).mov(R2, ETHERNET + 40);
        self.copy(R2, SEGMENT, 20, gone);
        self.asm
            .store(Size::H, R10, ANSWER + 4, be16(20))
            .store(Size::B, R10, ANSWER + 6, TCP)
            .store(Size::H, R10, PSEUDO + 34, be16(20))
            .store(Size::B, R10, PSEUDO + 39, TCP);
        self.reset(ANSWER + 40, 40, gone);
        self.asm.mov(R8, 60).jump(send);
    }

    /// Has the endpoint's other program let the answer pass.
    fn note_answer(&mut self, gone: Label) {
        let [to_pod, ports, noted] = self.labels();
        for word in 0..5 {
            // Behind the first word come the ports.
            let to = if word == 0 { KEY } else { KEY + FlowKey::PEER + 4 * (word - 1) };
            self.asm.load(Size::W, R1, R6, SKB_CB + 4 * word).store(Size::W, R10, to, R1);
        }
        self.asm
            .store(Size::W, R10, KEY + FlowKey::POD_PORT, 0)
            .store(Size::Dw, R10, VALUE + Answered::PASSED, Answered::FROM_POD as i32)
            .load(Size::B, R7, R10, KEY + FlowKey::VERSION)
            .mov(R1, R7)
            .and(R1, 0x0f)
            .store(Size::B, R10, KEY + FlowKey::VERSION, R1)
            .and(R7, TO_POD)
            .jump_if(Cond::Eq, R7, 0, ports)
            .store(Size::Dw, R10, VALUE + Answered::PASSED, Answered::TO_POD as i32)
            .bind(ports)
            .load(Size::B, R1, R10, KEY + FlowKey::PROTOCOL)
            .jump_if(Cond::Ne, R1, TCP, noted)
            .load(Size::H, R1, R10, SEGMENT)
            .load(Size::H, R2, R10, SEGMENT + 2)
            .jump_if(Cond::Ne, R7, 0, to_pod)
            .store(Size::H, R10, KEY + FlowKey::POD_PORT, R1)
            .store(Size::H, R10, KEY + FlowKey::PEER_PORT, R2)
            .jump(noted)
            .bind(to_pod)
            .store(Size::H, R10, KEY + FlowKey::POD_PORT, R2)
            .store(Size::H, R10, KEY + FlowKey::PEER_PORT, R1)
            .bind(noted)
            .call(Helper::KtimeGetCoarseNs)
            .store(Size::Dw, R10, VALUE + Answered::AT, R0);
        self.update(abi::ANSWERED, KEY, VALUE);
        self.asm.jump_if(Cond::Ne, R0, 0, gone);
    }

    /// Writes the reset of the segment at [`SEGMENT`], of which `R8` bytes are header and payload, with its checksum over it and so
    /// many bytes of [`PSEUDO`]. `R7` is lost.
    fn reset(&mut self, to: i16, pseudo: i32, gone: Label) {
        let [acknowledges, known] = self.labels();
        self.asm
            .load(Size::B, R7, R10, SEGMENT + 13)
            .jump_if(Cond::Set, R7, RST, gone)
            .load(Size::H, R1, R10, SEGMENT)
            .load(Size::H, R2, R10, SEGMENT + 2)
            .store(Size::H, R10, to, R2)
            .store(Size::H, R10, to + 2, R1)
            .store(Size::W, R10, to + 12, 0)
            .store(Size::B, R10, to + 12, 0x50)
            .store(Size::W, R10, to + 16, 0)
            .jump_if(Cond::Set, R7, ACK, acknowledges)
            .load(Size::B, R1, R10, SEGMENT + 12)
            .rsh(R1, 4)
            .lsh(R1, 2)
            .sub(R8, R1);
        for flag in [FIN, SYN] {
            self.asm.mov(R1, R7).rsh(R1, flag.trailing_zeros() as i32).and(R1, 1).add(R8, R1);
        }
        self.asm
            .load(Size::W, R1, R10, SEGMENT + 4)
            .be(SwapWidth::W32, R1)
            .add(R1, R8)
            .be(SwapWidth::W32, R1)
            .store(Size::W, R10, to + 8, R1)
            .store(Size::W, R10, to + 4, 0)
            .store(Size::B, R10, to + 13, RST | ACK)
            .jump(known)
            .bind(acknowledges)
            .load(Size::W, R1, R10, SEGMENT + 8)
            .store(Size::W, R10, to + 4, R1)
            .store(Size::W, R10, to + 8, 0)
            .store(Size::B, R10, to + 13, RST)
            .bind(known);
        self.sum(PSEUDO, pseudo, 0.into());
        self.sum(to, 20, R0.into());
        self.fold();
        self.asm.store(Size::H, R10, to + 16, R0);
    }

    /// `R0 =` the sum of bytes of the stack and a seed, in 32 bits.
    fn sum(&mut self, at: i16, bytes: i32, seed: Src) {
        self.asm
            .mov(R5, seed)
            .mov(R1, 0)
            .mov(R2, 0)
            .mov(R3, R10)
            .add(R3, i32::from(at))
            .mov(R4, bytes)
            .call(Helper::CsumDiff);
    }

    /// `R0 =` the Internet checksum of the sum in `R0` (RFC 1071).
    fn fold(&mut self) {
        for _ in 0..2 {
            self.asm.mov32(R1, R0).rsh(R1, 16).and(R0, 0xffff).add(R0, R1);
        }
        self.asm.xor(R0, 0xffff).and(R0, 0xffff);
    }

    /// Writes bytes of the stack into the packet.
    fn write(&mut self, offset: i32, from: i16, bytes: Src, fail: Label) {
        self.asm
            .mov(R1, R6)
            .mov(R2, offset)
            .mov(R3, R10)
            .add(R3, i32::from(from))
            .mov(R4, bytes)
            .mov(R5, BPF_F_RECOMPUTE_CSUM)
            .call(Helper::SkbStoreBytes)
            .jump_if(Cond::Ne, R0, 0, fail);
    }
}

/// Bytes of an Ethernet header.
const ETHERNET: i32 = 14;
/// In the first byte of an Ethernet address: it is a group's.
const GROUP: i32 = 1;
const HOPS: i32 = 64;

// Where things lie on the stack.
/// The Ethernet header.
const FRAME: i16 = -16;
/// The answer from its IP header on, at most 96 bytes. An ICMP error quotes the packet's IP header and the 8 bytes behind it.
const ANSWER: i16 = -128;
const ERROR_V4: i16 = ANSWER + 20;
const ERROR_V6: i16 = ANSWER + 40;
/// The pseudo-header of a checksum, 12 or 40 bytes.
const PSEUDO: i16 = ANSWER - 40;
/// The TCP header of the packet, without options.
const SEGMENT: i16 = PSEUDO - 24;
const KEY: i16 = SEGMENT - 24;
const VALUE: i16 = KEY - 16;

/// In the version of the key that goes to the answering program in `cb`: the packet was on its way to the pod.
const TO_POD: i32 = 0x40;
/// `cb` in struct __sk_buff (include/uapi/linux/bpf.h), which a called program finds as it was left.
const SKB_CB: i16 = 48;

/// The longest answer: an ICMPv6 error with its frame.
const LONGEST: i32 = ETHERNET + 96;

const UDP_LITE: i32 = 136;
const ECHO_V4: i32 = 8;
const ECHO_V6: i32 = 128;
/// Destination unreachable.
const UNREACHABLE_V4: i32 = 3;
const UNREACHABLE_V6: i32 = 1;

// Flags of the TCP header (RFC 9293, section 3.1).
const FIN: i32 = 0x01;
const SYN: i32 = 0x02;
const RST: i32 = 0x04;
const ACK: i32 = 0x10;

// include/uapi/linux/bpf.h.
const BPF_F_RECOMPUTE_CSUM: i32 = 1;
const BPF_F_INGRESS: i32 = 1;
