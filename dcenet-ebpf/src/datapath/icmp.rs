//! ICMP: echo makes flows, errors belong to the flow that they are about, the rest is judged packet by packet.

use super::emitter::{Emitter, ICMP, ICMPV6, SCTP, TCP, UDP, be16};
use super::frame;
use super::frame::{L3, L4};
use super::parse::{FRAGMENT_OFFSET, FragmentHeaders};
use crate::abi::{Direction, Endpoint, FlowKey, Reason};
use crate::asm::Label;
use crate::insn::{Cond, Reg::*, Size, SwapWidth};

impl Emitter<'_> {
    /// ICMP (RFC 792) at offset `R7`.
    pub(super) fn icmp_v4(&mut self) {
        let malformed = self.drop(Reason::Malformed);
        let [error, single] = self.labels();
        self.need(8, malformed);
        self.copy(R7, L4, 8, malformed);
        self.note_type();
        self.echo(V4, self.direction);
        for kind in [3, 11, 12] {
            self.asm.jump_if(Cond::Eq, R1, kind, error);
        }
        self.asm.bind(single);
        self.single();

        self.asm.bind(error);
        self.if_flags(frame::HEAD, single);
        self.asm.add(R7, 8);
        self.copy(R7, L3, 20, single);
        self.asm
            .load(Size::B, R5, R10, L3)
            .mov(R2, R5)
            .rsh(R2, 4)
            .jump_if(Cond::Ne, R2, 4, single)
            .and(R5, 0xf)
            .lsh(R5, 2)
            .jump_if(Cond::Lt, R5, 20, single)
            .load(Size::H, R1, R10, L3 + 6)
            .jump_if(Cond::Set, R1, be16(FRAGMENT_OFFSET), single)
            .load(Size::W, R2, R9, Endpoint::IPV4)
            .add(R7, R5)
            .load(Size::B, R8, R10, L3 + 9);
        // The packet in question went the other way: from the pod its sender is now the error's peer.
        match self.direction {
            Direction::Egress => {
                self.asm
                    .load(Size::W, R1, R10, L3 + 16)
                    .jump_if(Cond::Ne, R1, R2, single)
                    .load(Size::W, R1, R10, L3 + 12)
                    .load(Size::W, R2, R10, frame::PEER_V4)
                    .jump_if(Cond::Ne, R1, R2, single);
            }
            Direction::Ingress => {
                self.asm.load(Size::W, R1, R10, L3 + 12).jump_if(Cond::Ne, R1, R2, single);
            }
        }
        self.copy(R7, L4, 8, single);
        self.related(V4, single);
    }

    /// ICMPv6 (RFC 4443) at offset `R7`, the IPv6 header copied.
    pub(super) fn icmp_v6(&mut self) {
        let malformed = self.drop(Reason::Malformed);
        self.asm.store(Size::B, R10, frame::PROTOCOL, ICMPV6);
        self.need(8, malformed);
        self.copy(R7, L4, 8, malformed);
        self.note_type();
        self.neighbour_discovery();
        self.listener_discovery();
        if !self.enforces() {
            let lookup = self.places.lookup;
            self.asm.jump(lookup);
            return;
        }
        self.own_end_v6();
        let single = self.asm.label();
        let error = self.asm.label();
        self.asm.load(Size::B, R1, R10, L4);
        self.echo(V6, self.direction);
        self.asm.jump_if(Cond::Lt, R1, 1, single).jump_if(Cond::Le, R1, 4, error).bind(single);
        self.single();

        self.asm.bind(error);
        self.if_flags(frame::HEAD, single);
        self.asm.add(R7, 8);
        self.copy(R7, L3, 40, single);
        self.asm
            .load(Size::B, R1, R10, L3)
            .rsh(R1, 4)
            .jump_if(Cond::Ne, R1, 6, single)
            .load(Size::B, R8, R10, L3 + 6)
            .add(R7, 40);
        let own = self.asm.label();
        match self.direction {
            Direction::Egress => {
                self.if_own_v6((R10, L3 + 24), own);
                self.asm.jump(single).bind(own);
                for half in [0, 8] {
                    self.asm
                        .load(Size::Dw, R1, R10, L3 + 8 + half)
                        .load(Size::Dw, R2, R10, frame::PEER + half)
                        .jump_if(Cond::Ne, R1, R2, single);
                }
            }
            Direction::Ingress => {
                self.if_own_v6((R10, L3 + 8), own);
                self.asm.jump(single).bind(own);
            }
        }
        self.extension_headers(single, single, single, FragmentHeaders::Skip(single));
        self.copy(R7, L4, 8, single);
        self.related(V6, single);
    }

    /// `R1 =` the type; notes type and code.
    fn note_type(&mut self) {
        self.asm.load(Size::H, R1, R10, L4).be(SwapWidth::W16, R1).store(Size::W, R10, frame::ICMP, R1).load(
            Size::B,
            R1,
            R10,
            L4,
        );
    }

    /// Completes the key of echo whose type is in `R1` and goes on to the flow; other types fall through.
    fn echo(&mut self, version: Version, direction: Direction) {
        let [request, reply, other] = self.labels();
        let lookup = self.places.lookup;
        self.asm
            .jump_if(Cond::Eq, R1, version.request, request)
            .jump_if(Cond::Eq, R1, version.reply, reply)
            .jump(other)
            .bind(request);
        self.echo_key(version, direction);
        self.asm.jump(lookup).bind(reply);
        // A reply that nobody asked for makes no flow: it would admit questions.
        self.set_flags(frame::STATELESS);
        self.echo_key(version, direction.opposite());
        self.asm.jump(lookup).bind(other);
    }

    /// Notes the identifier for echo that was asked in a direction.
    fn echo_key(&mut self, version: Version, asked: Direction) {
        let (port, flag) = match asked {
            Direction::Egress => (frame::POD_PORT, 0),
            Direction::Ingress => (frame::PEER_PORT, FlowKey::ASKED_BY_PEER),
        };
        self.asm
            .store(Size::W, R10, frame::PORTS, 0)
            .load(Size::H, R1, R10, L4 + 4)
            .store(Size::H, R10, port, R1)
            .store(Size::B, R10, frame::VERSION, version.number | i32::from(flag));
    }

    /// A packet of its own.
    fn single(&mut self) {
        let judge = self.places.judge_packet;
        self.set_flags(frame::STATELESS | frame::NO_LOOKUP);
        self.asm.jump(judge);
    }

    /// An error about a packet of protocol `R8`, the addresses of which are checked, its IP header and the first 8 bytes
    /// after its headers copied.
    fn related(&mut self, version: Version, single: Label) {
        let (ports, echo, known, lookup) = (self.asm.label(), self.asm.label(), self.asm.label(), self.places.lookup);
        let before = self.direction.opposite();
        self.asm.jump_if(Cond::Ne, R8, version.icmp, known).load(Size::B, R1, R10, L4);
        self.asm.jump_if(Cond::Eq, R1, version.request, known).jump_if(Cond::Ne, R1, version.reply, single).bind(known);
        self.copy_address((R10, frame::PEER), frame::OUTER_PEER);
        self.set_flags(frame::RELATED);
        self.asm.store(Size::B, R10, frame::PROTOCOL, R8);
        let peer = match (before, version.number) {
            (Direction::Egress, 4) => Some(L3 + 16),
            (Direction::Egress, _) => Some(L3 + 24),
            // It was found to be the same.
            (Direction::Ingress, _) => None,
        };
        match peer {
            Some(at) if version.number == 4 => {
                self.asm.load(Size::W, R1, R10, at).store(Size::W, R10, frame::PEER_V4, R1);
            }
            Some(at) => self.copy_address((R10, at), frame::PEER),
            None => {}
        }
        for protocol in [TCP, UDP, SCTP] {
            self.asm.jump_if(Cond::Eq, R8, protocol, ports);
        }
        self.asm.jump_if(Cond::Eq, R8, version.icmp, echo).jump(lookup).bind(ports).load(Size::W, R1, R10, L4);
        self.ports(before);
        let reply = self.asm.label();
        self.asm.jump(lookup).bind(echo).load(Size::B, R1, R10, L4).jump_if(Cond::Eq, R1, version.reply, reply);
        self.echo_key(version, before);
        self.asm.jump(lookup).bind(reply);
        self.echo_key(version, before.opposite());
        self.asm.jump(lookup);
    }

    /// Makes a packet of its own of an error about a flow that is not known, in place.
    pub(super) fn unrelated(&mut self) {
        let [v4, done] = self.labels();
        self.copy_address((R10, frame::OUTER_PEER), frame::PEER);
        self.asm
            .store(Size::W, R10, frame::PORTS, 0)
            .load(Size::W, R1, R10, frame::FLAGS)
            .and(R1, !frame::RELATED)
            .or(R1, frame::STATELESS | frame::NO_LOOKUP)
            .store(Size::W, R10, frame::FLAGS, R1)
            .load(Size::B, R1, R10, frame::VERSION)
            .and(R1, 0x0f)
            .store(Size::B, R10, frame::VERSION, R1)
            .jump_if(Cond::Eq, R1, 4, v4)
            .store(Size::B, R10, frame::PROTOCOL, ICMPV6)
            .jump(done)
            .bind(v4)
            .store(Size::B, R10, frame::PROTOCOL, ICMP)
            .bind(done);
    }
}

/// What differs between ICMP and ICMPv6.
#[derive(Debug, Clone, Copy)]
struct Version {
    number: i32,
    icmp: i32,
    request: i32,
    reply: i32,
}

const V4: Version = Version { number: 4, icmp: ICMP, request: 8, reply: 0 };
const V6: Version = Version { number: 6, icmp: ICMPV6, request: 128, reply: 129 };

/// What classifiers are told of echo: the type of the question, code 0.
pub(super) const ECHO_V4: i32 = V4.request << 8;
pub(super) const ECHO_V6: i32 = V6.request << 8;
