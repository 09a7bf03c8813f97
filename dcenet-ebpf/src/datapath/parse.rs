//! From a packet to the key of its flow.
//!
//! Packets whose headers lie in the linear part at their usual places (no VLAN tag, no IPv4 option, no extension header,
//! no fragment, TCP or UDP) are read in place. All others take the slow path, which copies each header to the stack and
//! so needs no linear packet and no fixed offset: a copy costs about 20 ns.

use super::emitter::{
    Emitter, ICMP, ICMPV6, Places, SCTP, SKB_DATA, SKB_DATA_END, SKB_GSO_SIZE, SKB_TC_CLASSID, SKB_VLAN_PRESENT, TCP,
    UDP, be16,
};
use super::frame::{IP_END, L3, L4};
use super::{Slot, frame};
use crate::abi::{self, Direction, Endpoint, FlowKey, Reason};
use crate::asm::Label;
use crate::insn::{Cond, Reg, Reg::*, Size, Src, SwapWidth};

/// What the walk over extension headers does at a fragment header.
#[derive(Debug, Clone, Copy)]
pub(super) enum FragmentHeaders {
    /// Notes it; a fragment that is not a head goes to the label.
    Note(Label),
    /// Passes over it; a fragment that is not a head goes to the label.
    Skip(Label),
}

impl Emitter<'_> {
    /// Finds the endpoint; packets of none are dropped.
    pub(super) fn prologue(&mut self) {
        let unknown = self.drop(Reason::UnknownEndpoint);
        self.slot();
        self.asm.jump_if(Cond::Eq, R0, 0, unknown).mov(R9, R0).load(Size::W, R1, R9, Endpoint::FLAGS).jump_if(
            Cond::Eq,
            R1,
            0,
            unknown,
        );
    }

    /// `to =` a zero that the verifier does not know to be one. What is cleared by a known zero is another state for it than what
    /// a packet filled in, and it would look at the classifiers once for each of them.
    fn zero(&mut self, to: Reg) {
        self.asm.load(Size::Dw, to, R9, Endpoint::ZERO);
    }

    /// `R0 =` the endpoint, or null; `R8` the slot.
    pub(super) fn slot(&mut self) {
        self.asm.mov(R6, R1);
        match self.slot {
            Slot::Class => self.asm.load(Size::W, R8, R6, SKB_TC_CLASSID).and(R8, 0xffff),
            // What the guard has written is for nobody else: later programs and qdiscs would take it for a class.
            Slot::Guarded => {
                let read = self.asm.load(Size::W, R8, R6, SKB_TC_CLASSID).and(R8, 0xffff);
                read.store(Size::W, R6, SKB_TC_CLASSID, 0)
            }
            Slot::Constant(slot) => self.asm.mov(R8, i32::from(slot)),
            // The cell of nobody has no addresses.
            Slot::Nobody => self.asm.mov(R8, 0),
        };
        self.lookup_index(abi::ENDPOINTS, R8);
    }

    /// Clears the stack by a zero and notes the slot in `R8`.
    pub(super) fn clear(&mut self, zero: Src) {
        self.clear_parts(zero);
        for at in (frame::KEY..0).step_by(8) {
            self.asm.store(Size::Dw, R10, at, zero);
        }
        self.asm.store(Size::H, R10, frame::SLOT, R8).store(Size::W, R10, frame::TCP_FLAGS, zero).store(
            Size::Dw,
            R10,
            frame::SEQUENCE,
            zero,
        );
        self.asm.store(Size::W, R10, frame::FLAGS, zero).store(Size::W, R10, frame::ICMP, zero);
    }

    /// What only the slow path fills in.
    fn clear_parts(&mut self, zero: Src) {
        for at in (frame::OUTER_PEER..frame::FRAGMENT).chain(frame::FRAGMENT_KEY..frame::KEY).step_by(8) {
            self.asm.store(Size::Dw, R10, at, zero);
        }
    }

    /// Flags, and what only ICMP has. Uses `R1`.
    pub(super) fn clear_marks(&mut self) {
        self.zero(R1);
        self.asm.store(Size::W, R10, frame::FLAGS, R1).store(Size::W, R10, frame::ICMP, R1);
    }

    /// Clears what the fast path has left as it was. Uses `R1`.
    pub(super) fn clear_rest(&mut self) {
        self.zero(R1);
        self.clear_parts(R1.into());
        self.clear_marks();
        // Written in parts, as the slow path does: of a whole slot the verifier would know what was stored, another state for it.
        for at in [frame::KEY + 4, frame::PEER + 12] {
            self.asm.load(Size::W, R1, R10, at).store(Size::W, R10, at, R1);
        }
    }

    /// Reads common packets in place. Control goes on to `common` or, with a cleared stack, `slow`.
    pub(super) fn fast(&mut self) {
        let Places { slow, uncommon, .. } = self.places;
        let [not_v4, foreign] = self.labels();
        self.asm
            .load(Size::W, R1, R6, SKB_VLAN_PRESENT)
            .jump_if(Cond::Ne, R1, 0, uncommon)
            .load(Size::W, R7, R6, SKB_DATA)
            .load(Size::W, R3, R6, SKB_DATA_END)
            .mov(R1, R7)
            .add(R1, ETHERNET + IPV4 + 8)
            .jump_if(Cond::Gt, R1, R3, uncommon);
        if self.direction == Direction::Egress {
            self.own_mac((R7, SOURCE_MAC), foreign);
        } else {
            self.for_own_mac((R7, 0));
        }
        self.asm.load(Size::H, R1, R7, 12).jump_if(Cond::Ne, R1, be16(ETH_P_IP), not_v4);

        let ip = ETHERNET as i16;
        let (own, peer) = if self.direction == Direction::Egress { (12, 16) } else { (16, 12) };
        // The slow path knows the other addresses that are the pod's.
        let elsewhere = if self.direction == Direction::Egress { foreign } else { uncommon };
        self.asm
            .load(Size::B, R1, R7, ip)
            .jump_if(Cond::Ne, R1, 0x45, uncommon)
            .load(Size::H, R1, R7, ip + 6)
            .jump_if(Cond::Set, R1, be16(MORE_FRAGMENTS | FRAGMENT_OFFSET), uncommon)
            .load(Size::W, R1, R7, ip + own)
            .load(Size::W, R2, R9, Endpoint::IPV4)
            .jump_if(Cond::Ne, R1, R2, elsewhere)
            // An endpoint without an IPv4 address has that of nobody in its place.
            .jump_if(Cond::Eq, R1, 0, elsewhere)
            .load(Size::H, R5, R7, ip + 2)
            .be(SwapWidth::W16, R5)
            .sub(R5, IPV4)
            .load(Size::B, R1, R7, ip + 9);
        self.fast_ports(ETHERNET + IPV4, 4);
        // Its last four bytes are the address, and two bytes before them are ones: ::ffff:a.b.c.d.
        self.asm.load(Size::W, R2, R7, ip + peer);
        self.place(R2, 4);
        self.asm.load_imm64(R4, u64::from_ne_bytes([0, 0, 0xff, 0xff, 0, 0, 0, 0])).or(R2, R4);
        self.zero(R1);
        self.asm.store(Size::Dw, R10, frame::PEER, R1).store(Size::Dw, R10, frame::PEER + 8, R2);
        let common = self.places.common;
        self.asm.jump(common);

        self.asm
            .bind(not_v4)
            .jump_if(Cond::Ne, R1, be16(ETH_P_IPV6), uncommon)
            .mov(R1, R7)
            .add(R1, ETHERNET + IPV6 + 8)
            .jump_if(Cond::Gt, R1, R3, uncommon)
            .load(Size::B, R1, R7, ip)
            .rsh(R1, 4)
            .jump_if(Cond::Ne, R1, 6, uncommon);
        // The slow path tells of a foreign source. It knows, too, that ICMPv6 must not meet the check of the source, for neighbour
        // discovery has rules of its own.
        self.own_v6((R7, ip), uncommon);
        self.asm.load(Size::H, R5, R7, ip + 4).be(SwapWidth::W16, R5).load(Size::B, R1, R7, ip + 6);
        self.fast_ports(ETHERNET + IPV6, 6);
        let peer = if self.direction == Direction::Egress { 24 } else { 8 };
        self.copy_address((R7, ip + peer), frame::PEER);
        self.asm.jump(common);

        if self.direction == Direction::Egress {
            let spoofed = self.drop(Reason::Spoofed);
            self.asm.bind(foreign);
            self.zero(R1);
            self.clear(R1.into());
            self.asm.jump(spoofed);
        }
        self.asm.bind(uncommon);
        self.zero(R1);
        self.clear(R1.into());
        self.asm.jump(slow);
    }

    /// The transport header at a fixed offset, and the key's first word; `R1` has the protocol, `R5` how many bytes follow the IP
    /// header. Uses `R1`, `R2`, `R4`, `R5`.
    ///
    /// The key is written by whole words: who reads a word (the hash of a table does) soon after its parts were written waits until
    /// all of them have left the processor's store buffer.
    fn fast_ports(&mut self, offset: i32, version: u8) {
        let uncommon = self.places.uncommon;
        let [udp, ports] = self.labels();
        let at = offset as i16;
        let protocol = |number: i32| u64::from_ne_bytes([0, 0, number as u8, version, 0, 0, 0, 0]);
        self.asm
            .jump_if(Cond::Eq, R1, UDP, udp)
            .jump_if(Cond::Ne, R1, TCP, uncommon)
            .jump_if(Cond::Slt, R5, TCP_HEADER, uncommon)
            .mov(R1, R7)
            .add(R1, offset + TCP_HEADER)
            .jump_if(Cond::Gt, R1, R3, uncommon)
            .load(Size::B, R1, R7, at + 12)
            .jump_if(Cond::Lt, R1, 0x50, uncommon)
            .load(Size::B, R1, R7, at + 13)
            .store(Size::W, R10, frame::TCP_FLAGS, R1)
            .load(Size::W, R1, R7, at + 4)
            .store(Size::W, R10, frame::SEQUENCE, R1)
            .load(Size::W, R1, R7, at + 8)
            .store(Size::W, R10, frame::ACKNOWLEDGED, R1)
            .load_imm64(R4, protocol(TCP))
            .jump(ports)
            .bind(udp)
            .jump_if(Cond::Slt, R5, 8, uncommon);
        self.zero(R1);
        self.asm
            .store(Size::W, R10, frame::TCP_FLAGS, R1)
            .store(Size::Dw, R10, frame::SEQUENCE, R1)
            .load_imm64(R4, protocol(UDP))
            .bind(ports)
            .load(Size::W, R1, R7, at);
        self.pods_port_first(self.direction);
        self.place(R1, FlowKey::POD_PORT);
        self.asm.or(R4, R1).mov(R1, R8);
        if cfg!(target_endian = "big") {
            self.asm.lsh(R1, 48);
        }
        self.asm.or(R4, R1).store(Size::Dw, R10, frame::KEY, R4);
    }

    /// Moves a number of 4 bytes to where a word of 8 bytes has it at this offset, with zeros around it.
    fn place(&mut self, number: Reg, offset: i16) {
        debug_assert!(offset == 4);
        self.asm.lsh(number, 32);
        if cfg!(target_endian = "big") {
            self.asm.rsh(number, 32);
        }
    }

    /// Notes the ports in `R1`, as they lie in a packet of this direction, source first. Uses `R2`.
    pub(super) fn ports(&mut self, direction: Direction) {
        self.pods_port_first(direction);
        self.asm.store(Size::W, R10, frame::PORTS, R1);
    }

    /// Puts the pod's port first of those in `R1`, whose lower 32 bits count then. Uses `R2`.
    fn pods_port_first(&mut self, direction: Direction) {
        if direction == Direction::Ingress {
            self.asm.mov(R2, R1).rsh(R1, 16).lsh(R2, 16).or(R1, R2);
        }
    }

    /// Notes version and peer of the IPv4 header at `header`; from the pod, drops what has not its own source.
    fn addresses_v4(&mut self, header: (Reg, i16)) {
        let (base, at) = header;
        if self.direction == Direction::Egress {
            let spoofed = self.drop(Reason::Spoofed);
            self.asm
                .load(Size::W, R1, base, at + 12)
                .load(Size::W, R2, R9, Endpoint::IPV4)
                .jump_if(Cond::Ne, R1, R2, spoofed)
                .jump_if(Cond::Eq, R1, 0, spoofed);
        }
        let peer = if self.direction == Direction::Egress { 16 } else { 12 };
        self.asm
            .load(Size::W, R1, base, at + peer)
            .store(Size::W, R10, frame::PEER_V4, R1)
            .store(Size::H, R10, frame::PEER + 10, -1)
            .store(Size::B, R10, frame::VERSION, 4);
    }

    /// Notes version and peer of the IPv6 header at `header`.
    fn peer_v6(&mut self, header: (Reg, i16)) {
        let peer = if self.direction == Direction::Egress { 24 } else { 8 };
        self.copy_address((header.0, header.1 + peer), frame::PEER);
        self.asm.store(Size::B, R10, frame::VERSION, 6);
    }

    /// Drops what the pod sends from another source than its own, and what is sent to it for another destination, of the
    /// IPv6 header copied.
    pub(super) fn own_end_v6(&mut self) {
        let group = self.asm.label();
        let foreign = match self.direction {
            Direction::Egress => self.drop(Reason::Spoofed),
            Direction::Ingress => {
                // A group (RFC 4291, section 2.7), which is nobody's own.
                self.asm.load(Size::B, R1, R10, L3 + 24).jump_if(Cond::Eq, R1, 0xff, group);
                self.drop(Reason::OtherHost)
            }
        };
        self.own_v6((R10, L3), foreign);
        self.asm.bind(group);
    }

    /// What the pod sends from another source than its own goes to `foreign`, and what is sent to it for another destination.
    fn own_v6(&mut self, (base, at): (Reg, i16), foreign: Label) {
        let own = self.asm.label();
        let end = if self.direction == Direction::Egress { 8 } else { 24 };
        self.if_own_v6((base, at + end), own);
        self.asm.jump(foreign).bind(own);
    }

    /// Drops what is sent to the pod for another destination than its own, of the IPv4 header copied: whoever sends may pair
    /// any Ethernet address with any other, and its policy has judged the destination, that of the pod the Ethernet address.
    ///
    /// The pod's own are its address, groups, and in a frame for a group of the link the broadcast addresses of networks
    /// that it could be in (RFC 1122, section 3.2.1.3), which are its address with its last bits set: how long the
    /// network's prefix is, the programs do not know. 0.0.0.0 is no destination (RFC 1122, section 3.2.1.3), not even of an
    /// endpoint that has no IPv4 address. Uses `R1` to `R5`, `R8`.
    fn own_destination_v4(&mut self) {
        if self.direction == Direction::Egress {
            return;
        }
        let [group, own] = self.labels();
        let (malformed, other) = (self.drop(Reason::Malformed), self.drop(Reason::OtherHost));
        self.asm
            .load(Size::W, R1, R10, L3 + 16)
            .jump_if(Cond::Eq, R1, 0, other)
            .load(Size::W, R2, R9, Endpoint::IPV4)
            .jump_if(Cond::Eq, R1, R2, own)
            .and(R1, MULTICAST_MASK.to_be().cast_signed())
            .jump_if(Cond::Eq, R1, MULTICAST.to_be().cast_signed(), own)
            .mov(R8, 0);
        self.copy(R8, L4, 2, malformed);
        self.asm
            .load(Size::B, R1, R10, L4)
            .jump_if(Cond::Set, R1, 1, group)
            .jump(other)
            .bind(group)
            .load(Size::W, R1, R10, L3 + 16)
            .be(SwapWidth::W32, R1)
            .load(Size::W, R2, R9, Endpoint::IPV4)
            .be(SwapWidth::W32, R2)
            .xor(R2, R1);
        // All bits from the first that differs.
        for shift in [1, 2, 4, 8, 16] {
            self.asm.mov(R3, R2).rsh(R3, shift).or(R2, R3);
        }
        self.asm.and(R1, R2).jump_if(Cond::Ne, R1, R2, other).bind(own);
    }

    /// Jumps if the IPv6 address at `address` is one of the pod's own. Uses `R1`, `R2`, `R4`.
    pub(super) fn if_own_v6(&mut self, address: (Reg, i16), own: Label) {
        let [other, no] = self.labels();
        self.asm
            .load(Size::Dw, R1, address.0, address.1)
            .load(Size::Dw, R2, address.0, address.1 + 8)
            .mov(R4, R1)
            .or(R4, R2)
            .jump_if(Cond::Eq, R4, 0, no)
            .load(Size::Dw, R4, R9, Endpoint::IPV6)
            .jump_if(Cond::Ne, R4, R1, other)
            .load(Size::Dw, R4, R9, Endpoint::IPV6 + 8)
            .jump_if(Cond::Eq, R4, R2, own)
            .bind(other)
            .load(Size::Dw, R4, R9, Endpoint::LINK_LOCAL)
            .jump_if(Cond::Ne, R4, R1, no)
            .load(Size::Dw, R4, R9, Endpoint::LINK_LOCAL + 8)
            .jump_if(Cond::Eq, R4, R2, own)
            .bind(no);
    }

    /// Jumps if the Ethernet address at `address` is not the pod's own, where that is known. Uses `R1`, `R2`.
    pub(super) fn own_mac(&mut self, address: (Reg, i16), foreign: Label) {
        let [any, own] = self.labels();
        let (base, at) = address;
        // By halves: on the stack, and as a destination in a packet, the address may lie at an odd multiple of 2.
        let parts: &[(Size, i16)] = match (base, at) {
            (R7, SOURCE_MAC) => &[(Size::W, 0), (Size::H, 4)],
            _ => &[(Size::H, 0), (Size::H, 2), (Size::H, 4)],
        };
        for (size, part) in parts {
            self.asm.load(*size, R1, base, at + part).load(*size, R2, R9, Endpoint::MAC + part).jump_if(
                Cond::Ne,
                R1,
                R2,
                any,
            );
        }
        self.asm
            .jump(own)
            .bind(any)
            .load(Size::W, R1, R9, Endpoint::MAC)
            .load(Size::H, R2, R9, Endpoint::MAC + 4)
            .or(R1, R2)
            .jump_if(Cond::Ne, R1, 0, foreign)
            .bind(own);
    }

    /// Drops what is for one other Ethernet address, that at `address`: neither the pod's own, where that is known, nor of
    /// a group (the lowest bit of the first byte, IEEE 802). Uses `R1`, `R2`.
    fn for_own_mac(&mut self, address: (Reg, i16)) {
        let [foreign, done] = self.labels();
        let other = self.drop(Reason::OtherHost);
        self.own_mac(address, foreign);
        self.asm.jump(done).bind(foreign).load(Size::B, R1, address.0, address.1).and(R1, 1);
        self.asm.jump_if(Cond::Eq, R1, 0, other).bind(done);
    }

    /// Parses by copying headers. `R7` is the offset reached, `R8` the next header's protocol.
    pub(super) fn slow(&mut self) {
        let [v4, v6, arp, l4] = self.labels();
        let (malformed, other) = (self.drop(Reason::Malformed), self.drop(Reason::OtherEtherType));
        let untagged = self.asm.label();
        self.asm.bind(self.places.slow);
        if self.direction == Direction::Egress {
            let spoofed = self.drop(Reason::Spoofed);
            self.asm.mov(R7, i32::from(SOURCE_MAC));
            self.copy(R7, L4, 6, malformed);
            self.own_mac((R10, L4), spoofed);
        } else if self.enforces() {
            self.asm.mov(R7, 0);
            self.copy(R7, L4, 6, malformed);
            self.for_own_mac((R10, L4));
        }
        self.asm.mov(R7, 12);
        self.copy(R7, L4, 2, malformed);
        self.asm.load(Size::H, R8, R10, L4);
        let (trunk, tagged) = (self.asm.label(), self.drop(Reason::Tagged));
        // Towards a pod of which nothing is known there is no endpoint to ask.
        if self.direction == Direction::Egress || self.enforces() {
            self.asm.load(Size::W, R1, R9, Endpoint::FLAGS).jump_if(Cond::Set, R1, Endpoint::TRUNK as i32, trunk);
        }
        self.asm
            .load(Size::W, R1, R6, SKB_VLAN_PRESENT)
            .jump_if(Cond::Ne, R1, 0, tagged)
            .jump_if(Cond::Eq, R8, be16(ETH_P_8021Q), tagged)
            .jump_if(Cond::Eq, R8, be16(ETH_P_8021AD), tagged);
        if self.direction == Direction::Egress || self.enforces() {
            self.asm.jump(untagged).bind(trunk);
            self.tags(untagged);
        }
        self.asm
            .bind(untagged)
            .add(R7, 2)
            .jump_if(Cond::Eq, R8, be16(ETH_P_ARP), arp)
            .jump_if(Cond::Eq, R8, be16(ETH_P_IPV6), v6)
            .jump_if(Cond::Ne, R8, be16(ETH_P_IP), other);

        self.asm.bind(v4);
        if self.enforces() {
            self.slow_v4(l4);
        } else {
            let lookup = self.places.lookup;
            self.asm.jump(lookup);
        }
        self.asm.bind(v6);
        self.slow_v6(l4);
        if self.enforces() {
            self.asm.bind(l4);
            self.transport();
        }
        self.asm.bind(arp);
        self.arp();
    }

    /// Passes over the tags at `R7`; `R8` is the EtherType.
    fn tags(&mut self, untagged: Label) {
        let malformed = self.drop(Reason::Malformed);
        for _ in 0..VLAN_TAGS {
            let tag = self.asm.label();
            self.asm
                .jump_if(Cond::Eq, R8, be16(ETH_P_8021Q), tag)
                .jump_if(Cond::Ne, R8, be16(ETH_P_8021AD), untagged)
                .bind(tag)
                .add(R7, 4);
            self.copy(R7, L4, 2, malformed);
            self.asm.load(Size::H, R8, R10, L4);
        }
    }

    fn slow_v4(&mut self, l4: Label) {
        let malformed = self.drop(Reason::Malformed);
        let [sized, later, head] = self.labels();
        self.copy(R7, L3, IPV4, malformed);
        self.asm
            .load(Size::B, R1, R10, L3)
            .mov(R2, R1)
            .rsh(R2, 4)
            .jump_if(Cond::Ne, R2, 4, malformed)
            .and(R1, 0xf)
            .lsh(R1, 2)
            .jump_if(Cond::Lt, R1, IPV4, malformed)
            .load(Size::H, R2, R10, L3 + 2)
            .be(SwapWidth::W16, R2)
            .jump_if(Cond::Ge, R2, R1, sized)
            .jump_if(Cond::Ne, R2, 0, malformed)
            // A length of 0 stands for more than 65,535 bytes, in a packet that will be segmented.
            .load(Size::W, R2, R6, SKB_GSO_SIZE)
            .jump_if(Cond::Eq, R2, 0, malformed)
            .mov(R2, NO_END)
            .bind(sized)
            .add(R2, R7)
            .store(Size::W, R10, IP_END, R2)
            .add(R7, R1);
        self.addresses_v4((R10, L3));
        self.own_destination_v4();
        self.options_v4();
        self.asm
            .load(Size::B, R8, R10, L3 + 9)
            .load(Size::H, R1, R10, L3 + 6)
            .be(SwapWidth::W16, R1)
            .jump_if(Cond::Set, R1, i32::from(MORE_FRAGMENTS | FRAGMENT_OFFSET), head)
            .jump(l4)
            .bind(head)
            .store(Size::W, R10, frame::FRAGMENT_KEY + abi::FragmentKey::IDENTIFICATION, 0)
            .load(Size::H, R2, R10, L3 + 4)
            .store(Size::H, R10, frame::FRAGMENT_KEY + abi::FragmentKey::IDENTIFICATION, R2)
            .and(R1, i32::from(FRAGMENT_OFFSET))
            .mov(R5, R1);
        self.fragment_key(4);
        self.asm.jump_if(Cond::Ne, R5, 0, later);
        self.set_flags(frame::HEAD);
        self.asm.jump(l4).bind(later);
        self.later_fragment();
    }

    /// Drops what has a source route among its options, which end at `R7`. Uses `R1` to `R5`, `R8`.
    fn options_v4(&mut self) {
        let (malformed, routed) = (self.drop(Reason::Malformed), self.drop(Reason::SourceRoute));
        let [next, single, done] = self.labels();
        self.asm
            .load(Size::B, R1, R10, L3)
            .jump_if(Cond::Eq, R1, 0x45, done)
            .and(R1, 0xf)
            .lsh(R1, 2)
            .mov(R8, R7)
            .add(R8, IPV4)
            .sub(R8, R1)
            .store(Size::W, R10, frame::OPTIONS_END, R7)
            .store(Size::Dw, R10, frame::COUNT, 0)
            .bind(next)
            // By way of the stack, as of extension headers.
            .store(Size::W, R10, frame::NEXT_HEADER, R8)
            .load(Size::W, R8, R10, frame::NEXT_HEADER)
            .load(Size::W, R1, R10, frame::OPTIONS_END)
            .jump_if(Cond::Gt, R8, R1, malformed)
            .jump_if(Cond::Eq, R8, R1, done)
            .load(Size::Dw, R1, R10, frame::COUNT)
            .add(R1, 1)
            .jump_if(Cond::Gt, R1, IPV4_OPTIONS, malformed)
            .store(Size::Dw, R10, frame::COUNT, R1);
        self.copy(R8, L4, 1, malformed);
        self.asm
            .load(Size::B, R1, R10, L4)
            .jump_if(Cond::Eq, R1, END_OF_OPTIONS, done)
            .jump_if(Cond::Eq, R1, NO_OPERATION, single)
            .jump_if(Cond::Eq, R1, LOOSE_SOURCE_ROUTE, routed)
            .jump_if(Cond::Eq, R1, STRICT_SOURCE_ROUTE, routed)
            .add(R8, 1);
        self.copy(R8, L4, 1, malformed);
        self.asm
            .load(Size::B, R1, R10, L4)
            .jump_if(Cond::Lt, R1, 2, malformed)
            .sub(R1, 2)
            .add(R8, R1)
            .bind(single)
            .add(R8, 1)
            .jump(next)
            .bind(done);
    }

    fn slow_v6(&mut self, l4: Label) {
        let malformed = self.drop(Reason::Malformed);
        let (too_many, routed) = (self.drop(Reason::TooManyExtensionHeaders), self.drop(Reason::SourceRoute));
        let [later, sized] = self.labels();
        self.copy(R7, L3, IPV6, malformed);
        self.asm
            .load(Size::B, R1, R10, L3)
            .rsh(R1, 4)
            .jump_if(Cond::Ne, R1, 6, malformed)
            .load(Size::B, R8, R10, L3 + 6)
            .add(R7, IPV6)
            .load(Size::H, R1, R10, L3 + 4)
            .be(SwapWidth::W16, R1)
            .jump_if(Cond::Ne, R1, 0, sized)
            // Either nothing follows, which the copies below will notice, or a jumbo payload (RFC 2675).
            .mov(R1, NO_END)
            .bind(sized)
            .add(R1, R7)
            .store(Size::W, R10, IP_END, R1);
        self.peer_v6((R10, L3));
        self.extension_headers(too_many, malformed, routed, FragmentHeaders::Note(later));

        let icmp = self.asm.label();
        self.asm.jump_if(Cond::Eq, R8, ICMPV6, icmp);
        if self.enforces() {
            self.own_end_v6();
            self.asm.jump(l4).bind(later);
            self.own_end_v6();
            self.later_fragment();
        } else {
            let lookup = self.places.lookup;
            self.asm.jump(lookup).bind(later).jump(lookup);
        }
        self.asm.bind(icmp);
        self.icmp_v6();
    }

    /// Walks over extension headers: from protocol `R8` at offset `R7` to the first that is none. A packet that has not
    /// come to the end of its route goes to `routed`.
    pub(super) fn extension_headers(
        &mut self,
        too_many: Label,
        truncated: Label,
        routed: Label,
        fragments: FragmentHeaders,
    ) {
        let [next, header, fragment, authentication, sized, unrouted, done] = self.labels();
        self.asm
            .store(Size::Dw, R10, frame::COUNT, 0)
            .bind(next)
            // By way of the stack the verifier forgets where the offset comes from: otherwise every chain of headers is
            // a state of its own for it.
            .store(Size::W, R10, frame::NEXT_HEADER, R7)
            .load(Size::W, R7, R10, frame::NEXT_HEADER)
            .store(Size::B, R10, frame::HEADER_KIND, R8);
        for protocol in [HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION_OPTIONS] {
            self.asm.jump_if(Cond::Eq, R8, protocol, header);
        }
        self.asm
            .jump(done)
            .bind(header)
            // And what it is: each kind would be followed by itself.
            .load(Size::B, R8, R10, frame::HEADER_KIND)
            .load(Size::Dw, R1, R10, frame::COUNT)
            .add(R1, 1)
            .jump_if(Cond::Gt, R1, EXTENSION_HEADERS, too_many)
            .store(Size::Dw, R10, frame::COUNT, R1);
        self.need(8, truncated);
        self.copy(R7, L4, 8, truncated);
        self.asm
            .jump_if(Cond::Eq, R8, FRAGMENT, fragment)
            .load(Size::B, R1, R10, L4 + 1)
            .jump_if(Cond::Eq, R8, AUTHENTICATION, authentication)
            .jump_if(Cond::Ne, R8, ROUTING, unrouted)
            .load(Size::B, R2, R10, L4 + 3)
            .jump_if(Cond::Ne, R2, 0, routed)
            .bind(unrouted)
            .add(R1, 1)
            .lsh(R1, 3)
            .jump(sized)
            .bind(authentication)
            // RFC 4302, section 2.2: in 4-byte units, minus 2.
            .add(R1, 2)
            .lsh(R1, 2)
            .bind(sized)
            .add(R7, R1)
            .load(Size::B, R8, R10, L4)
            .jump(next)
            .bind(fragment);
        self.fragment_header(next, fragments);
        self.asm.bind(done);
    }

    fn fragment_header(&mut self, next: Label, fragments: FragmentHeaders) {
        let whole = self.asm.label();
        self.asm.load(Size::H, R5, R10, L4 + 2).be(SwapWidth::W16, R5).load(Size::B, R8, R10, L4);
        match fragments {
            FragmentHeaders::Skip(later) => {
                self.asm.jump_if(Cond::Set, R5, FRAGMENT_OFFSET_V6, later);
            }
            FragmentHeaders::Note(later) if self.enforces() => {
                // RFC 6946: a fragment that is all of its packet is no fragment.
                let fragment = self.asm.label();
                self.asm
                    .jump_if(Cond::Set, R5, FRAGMENT_OFFSET_V6 | MORE_FRAGMENTS_V6, fragment)
                    .jump(whole)
                    .bind(fragment)
                    .load(Size::W, R1, R10, L4 + 4)
                    .store(Size::W, R10, frame::FRAGMENT_KEY + abi::FragmentKey::IDENTIFICATION, R1);
                self.fragment_key(6);
                self.asm.jump_if(Cond::Set, R5, FRAGMENT_OFFSET_V6, later);
                self.set_flags(frame::HEAD);
            }
            FragmentHeaders::Note(later) => {
                self.asm.jump_if(Cond::Set, R5, FRAGMENT_OFFSET_V6, later);
            }
        }
        self.asm.bind(whole).add(R7, 8).jump(next);
    }

    /// Jumps if fewer than `bytes` of the IP packet are left at `R7`. Uses `R1`, `R2`.
    pub(super) fn need(&mut self, bytes: i32, truncated: Label) {
        self.asm.mov(R1, R7).add(R1, bytes).load(Size::W, R2, R10, IP_END).jump_if(Cond::Gt, R1, R2, truncated);
    }

    /// The transport header at `R7` of protocol `R8`, of either version.
    fn transport(&mut self) {
        let [tcp, udp, sctp, icmp] = self.labels();
        let (malformed, lookup) = (self.drop(Reason::Malformed), self.places.lookup);
        self.asm
            .store(Size::B, R10, frame::PROTOCOL, R8)
            .jump_if(Cond::Eq, R8, TCP, tcp)
            .jump_if(Cond::Eq, R8, UDP, udp)
            .jump_if(Cond::Eq, R8, SCTP, sctp)
            .load(Size::B, R1, R10, frame::VERSION)
            .jump_if(Cond::Ne, R1, 4, lookup)
            .jump_if(Cond::Eq, R8, ICMP, icmp)
            .jump(lookup);

        self.asm.bind(tcp);
        self.need(TCP_HEADER, malformed);
        self.copy(R7, L4, TCP_HEADER, malformed);
        self.asm
            .load(Size::B, R1, R10, L4 + 12)
            .jump_if(Cond::Lt, R1, 0x50, malformed)
            .load(Size::B, R1, R10, L4 + 13)
            .store(Size::W, R10, frame::TCP_FLAGS, R1)
            .load(Size::W, R1, R10, L4 + 4)
            .store(Size::W, R10, frame::SEQUENCE, R1)
            .load(Size::W, R1, R10, L4 + 8)
            .store(Size::W, R10, frame::ACKNOWLEDGED, R1)
            .load(Size::W, R1, R10, L4);
        self.ports(self.direction);
        self.asm.jump(lookup);

        for (label, bytes) in [(udp, 8), (sctp, 12)] {
            self.asm.bind(label);
            self.need(bytes, malformed);
            self.copy(R7, L4, bytes, malformed);
            self.asm.load(Size::W, R1, R10, L4);
            self.ports(self.direction);
            self.asm.jump(lookup);
        }

        self.asm.bind(icmp);
        self.icmp_v4();
    }
}

const ETHERNET: i32 = 14;
const IPV4: i32 = 20;
const IPV6: i32 = 40;
const TCP_HEADER: i32 = 20;

// EtherTypes (include/uapi/linux/if_ether.h).
/// Offset of the source in an Ethernet header.
const SOURCE_MAC: i16 = 6;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021AD: u16 = 0x88a8;

/// IPv4 groups, 224.0.0.0/4 (RFC 1112, section 4).
const MULTICAST: u32 = 0xe000_0000;
const MULTICAST_MASK: u32 = 0xf000_0000;

/// VLAN tags that are passed over. The outermost one of a received packet the kernel has already taken off.
const VLAN_TAGS: usize = 2;

/// The flag and the field of the IPv4 header (RFC 791, section 3.1).
const MORE_FRAGMENTS: u16 = 0x2000;
pub(super) const FRAGMENT_OFFSET: u16 = 0x1fff;

/// The same of the IPv6 fragment header (RFC 8200, section 4.5).
const MORE_FRAGMENTS_V6: i32 = 1;
const FRAGMENT_OFFSET_V6: i32 = 0xfff8;

/// More than any packet's length, and small enough to add an offset.
const NO_END: i32 = 0x3fff_ffff;

/// As many as an IPv4 header has room for (RFC 791, section 3.1).
const IPV4_OPTIONS: i32 = 40;

// IPv4 options, of which the first two have no length.
const END_OF_OPTIONS: i32 = 0;
const NO_OPERATION: i32 = 1;
const LOOSE_SOURCE_ROUTE: i32 = 131;
const STRICT_SOURCE_ROUTE: i32 = 137;

/// How many extension headers are passed over.
const EXTENSION_HEADERS: i32 = 8;

// The extension headers that the kernel knows (`ipv6_ext_hdr`, net/ipv6/exthdrs_core.c), but for "no next header".
const HOP_BY_HOP: i32 = 0;
const ROUTING: i32 = 43;
const FRAGMENT: i32 = 44;
const AUTHENTICATION: i32 = 51;
const DESTINATION_OPTIONS: i32 = 60;
