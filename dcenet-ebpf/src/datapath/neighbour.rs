//! ARP, neighbour and listener discovery: the pod may speak for itself alone, by its own Ethernet address.

use super::emitter::{Emitter, ICMPV6, SKB_LEN, be16};
use super::frame::{IP_END, L3, L4, OPTION};
use crate::abi::{Direction, Endpoint, Reason};
use crate::asm::Label;
use crate::insn::{Cond, Reg::*, Size, SwapWidth};

impl Emitter<'_> {
    /// ARP (RFC 826) at offset `R7`. Towards the pod it passes; from the pod it is a request or a reply, and its sender must
    /// be the pod, or unspecified while the pod asks for its own address (RFC 5227, section 1.1). No more follows than the
    /// padding of a short frame (IEEE 802.3, clause 3.2.8), for ARP passes whatever the policy is; towards the pod, [`SLACK`] in
    /// addition.
    pub(super) fn arp(&mut self) {
        let pass = self.pass(Reason::Neighbour);
        let (refused, malformed) = (self.drop(Reason::NeighbourRefused), self.drop(Reason::Malformed));
        let most = if self.direction == Direction::Ingress { LEAST_DATA + SLACK } else { LEAST_DATA };
        self.asm.load(Size::W, R1, R6, SKB_LEN).mov(R2, R7).add(R2, most).jump_if(Cond::Gt, R1, R2, refused);
        if self.direction == Direction::Ingress {
            self.asm.jump(pass);
            return;
        }
        let [probe, not_probe, known] = self.labels();
        self.copy(R7, L3, 28, malformed);
        self.asm
            .load(Size::W, R1, R10, L3)
            .jump_if32(Cond::Ne, R1, ARP_ETHERNET_IPV4.to_be().cast_signed(), refused)
            .load(Size::H, R1, R10, L3 + 4)
            .jump_if(Cond::Ne, R1, be16(0x0604), refused)
            .load(Size::H, R1, R10, L3 + 6)
            .jump_if(Cond::Eq, R1, be16(ARP_REQUEST), known)
            .jump_if(Cond::Ne, R1, be16(ARP_REPLY), refused)
            .bind(known);
        self.own_mac((R10, L3 + 8), refused);
        self.asm
            // The addresses lie at odd multiples of 2, so they are compared by halves.
            .load(Size::H, R1, R10, L3 + 14)
            .load(Size::H, R2, R10, L3 + 16)
            .mov(R3, R1)
            .or(R3, R2)
            .jump_if(Cond::Eq, R3, 0, probe)
            .load(Size::H, R3, R9, Endpoint::IPV4)
            .jump_if(Cond::Ne, R1, R3, not_probe)
            .load(Size::H, R3, R9, Endpoint::IPV4 + 2)
            .jump_if(Cond::Eq, R2, R3, pass)
            .bind(not_probe)
            .jump(refused)
            .bind(probe)
            .load(Size::W, R1, R9, Endpoint::IPV4)
            .jump_if(Cond::Eq, R1, 0, refused)
            .load(Size::H, R1, R10, L3 + 24)
            .load(Size::H, R2, R9, Endpoint::IPV4)
            .jump_if(Cond::Ne, R1, R2, refused)
            .load(Size::H, R1, R10, L3 + 26)
            .load(Size::H, R2, R9, Endpoint::IPV4 + 2)
            .jump_if(Cond::Ne, R1, R2, refused)
            .jump(pass);
    }

    /// Neighbour discovery (RFC 4861) at offset `R7`, its type in `R1`, the IPv6 header and the first 8 bytes of the
    /// message copied. Control ends here for its types; others go on.
    ///
    /// As it passes whatever the policy is, it must be what a receiver takes for a neighbour's word: hop limit 255, code
    /// 0 (sections 6.1.1, 6.1.2, 7.1.1, 7.1.2, 8.1), and no extension header before it, for none has a use there and RFC
    /// 6980 forbids that of fragments. What the pod sends is for its link, too: to a group of the link or to a
    /// link-local address; a neighbour solicitation also to its target, an advertisement to whoever has asked.
    pub(super) fn neighbour_discovery(&mut self) {
        let other = self.asm.label();
        let pass = self.pass(Reason::Neighbour);
        let (refused, malformed) = (self.drop(Reason::NeighbourRefused), self.drop(Reason::Malformed));
        self.asm
            .jump_if(Cond::Lt, R1, ROUTER_SOLICITATION, other)
            .jump_if(Cond::Gt, R1, REDIRECT, other)
            .load(Size::B, R2, R10, L3 + 6)
            .jump_if(Cond::Ne, R2, ICMPV6, refused)
            .load(Size::B, R2, R10, L3 + 7)
            .jump_if(Cond::Ne, R2, HOP_LIMIT, refused)
            .load(Size::B, R2, R10, L4 + 1)
            .jump_if(Cond::Ne, R2, 0, refused);
        if self.direction == Direction::Ingress {
            self.asm.jump(pass).bind(other);
            return;
        }
        let [solicitation, advertisement] = self.labels();
        self.asm
            // Nothing hides behind the packet: no link pads frames that are as long as these.
            .load(Size::W, R2, R6, SKB_LEN)
            .load(Size::W, R3, R10, IP_END)
            .jump_if(Cond::Gt, R2, R3, refused)
            .jump_if(Cond::Eq, R1, NEIGHBOUR_SOLICITATION, solicitation)
            .jump_if(Cond::Eq, R1, NEIGHBOUR_ADVERTISEMENT, advertisement)
            .jump_if(Cond::Ne, R1, ROUTER_SOLICITATION, refused);
        self.need(8, malformed);
        let on_link = self.asm.label();
        self.if_link_scope(on_link);
        self.asm.jump(refused).bind(on_link);
        self.link_layer_option(8, refused, malformed);
        self.if_own_v6((R10, L3 + 8), pass);
        self.asm.jump(refused);

        self.asm.bind(solicitation);
        self.need(24, malformed);
        self.copy(R7, L4, 24, malformed);
        let on_link = self.asm.label();
        self.if_link_scope(on_link);
        for half in [0, 8] {
            self.asm.load(Size::Dw, R1, R10, L3 + 24 + half).load(Size::Dw, R2, R10, L4 + 8 + half).jump_if(
                Cond::Ne,
                R1,
                R2,
                refused,
            );
        }
        self.asm.bind(on_link);
        self.link_layer_option(24, refused, malformed);
        self.if_own_v6((R10, L3 + 8), pass);
        // Detection of duplicates asks from the unspecified address (RFC 4862, section 5.4.2).
        self.asm.load(Size::Dw, R1, R10, L3 + 8).load(Size::Dw, R2, R10, L3 + 16).or(R1, R2).jump_if(
            Cond::Ne,
            R1,
            0,
            refused,
        );
        self.if_own_v6((R10, L4 + 8), pass);
        self.asm.jump(refused);

        self.asm.bind(advertisement);
        self.need(24, malformed);
        self.copy(R7, L4, 24, malformed);
        self.link_layer_option(24, refused, malformed);
        self.if_own_v6((R10, L4 + 8), pass);
        self.asm.jump(refused).bind(other);
    }

    /// Multicast listener discovery (RFC 2710, RFC 3810) at offset `R7`, its type in the first of 8 bytes copied. It passes
    /// whatever the policy is, as far as neighbour discovery needs it: a bridge that snoops (RFC 4541) does not bring the
    /// question for a pod's address to a pod that has not told its groups, or has not answered when asked for them.
    ///
    /// From the pod that is a report or its withdrawal, by an own address or by none (RFC 3810, section 5.2.13), of at most
    /// [`GROUPS`] groups of the link; to the pod a question without sources. All are for a group of the link, have a hop
    /// limit of 1, and before them nothing but 8 bytes of hop-by-hop options. What is not so goes on, as other ICMP does.
    /// Uses `R1` to `R5` and `R8`.
    pub(super) fn listener_discovery(&mut self) {
        let [other, first] = self.labels();
        let pass = self.pass(Reason::Neighbour);
        self.asm
            .load(Size::H, R2, R10, L3 + 6)
            // Hop-by-hop options follow; the hop limit.
            .jump_if(Cond::Ne, R2, be16(0x0001), other)
            .load(Size::H, R2, R10, L3 + 24)
            .jump_if(Cond::Ne, R2, be16(LINK_GROUP), other)
            .load(Size::W, R5, R10, IP_END)
            .sub(R5, R7)
            .load(Size::H, R2, R10, L3 + 4)
            .be(SwapWidth::W16, R2)
            .sub(R2, 8)
            .jump_if(Cond::Ne, R2, R5, other)
            .load(Size::W, R2, R6, SKB_LEN)
            .load(Size::W, R3, R10, IP_END)
            .jump_if(Cond::Gt, R2, R3, other)
            .load(Size::B, R1, R10, L4);
        if self.direction == Direction::Ingress {
            self.asm
                .jump_if(Cond::Ne, R1, LISTENER_QUERY, other)
                .load(Size::H, R2, R10, L3 + 8)
                .and(R2, be16(0xffc0))
                .jump_if(Cond::Ne, R2, be16(0xfe80), other)
                .jump_if(Cond::Eq, R5, 24, pass)
                .jump_if(Cond::Eq, R5, 28, pass)
                .jump(other)
                .bind(other);
            return;
        }
        let own = self.asm.label();
        self.if_own_v6((R10, L3 + 8), own);
        self.asm
            .load(Size::Dw, R1, R10, L3 + 8)
            .load(Size::Dw, R2, R10, L3 + 16)
            .or(R1, R2)
            .jump_if(Cond::Ne, R1, 0, other)
            .bind(own)
            .load(Size::B, R1, R10, L4)
            .mov(R8, R7)
            .add(R8, 8)
            .jump_if(Cond::Eq, R1, LISTENER_REPORT, first)
            .jump_if(Cond::Eq, R1, LISTENER_DONE, first)
            .jump_if(Cond::Ne, R1, LISTENER_REPORT_V2, other)
            // How many records there are, of 20 bytes each.
            .load(Size::H, R1, R10, L4 + 6)
            .be(SwapWidth::W16, R1)
            .jump_if(Cond::Eq, R1, 0, other)
            .jump_if(Cond::Gt, R1, GROUPS, other)
            .mov(R2, R1)
            .lsh(R2, 4)
            .lsh(R1, 2)
            .add(R2, R1)
            .add(R2, 8)
            .jump_if(Cond::Ne, R2, R5, other);
        for _ in 0..GROUPS {
            self.copy(R8, OPTION, 6, other);
            self.asm
                // Neither auxiliary data nor sources.
                .load(Size::B, R1, R10, OPTION + 1)
                .jump_if(Cond::Ne, R1, 0, other)
                .load(Size::H, R1, R10, OPTION + 2)
                .jump_if(Cond::Ne, R1, 0, other)
                .load(Size::H, R1, R10, OPTION + 4)
                .jump_if(Cond::Ne, R1, be16(LINK_GROUP), other)
                .add(R8, 20)
                .load(Size::W, R1, R10, IP_END)
                .jump_if(Cond::Ge, R8, R1, pass);
        }
        self.asm.jump(other).bind(first).jump_if(Cond::Ne, R5, 24, other);
        self.copy(R8, OPTION, 2, other);
        self.asm.load(Size::H, R1, R10, OPTION).jump_if(Cond::Eq, R1, be16(LINK_GROUP), pass).bind(other);
    }

    /// Jumps if the destination is a group of the link or a link-local address (RFC 4291, sections 2.5.6 and 2.7), which
    /// no router forwards. Uses `R1`.
    fn if_link_scope(&mut self, on_link: Label) {
        self.asm
            .load(Size::H, R1, R10, L3 + 24)
            .jump_if(Cond::Eq, R1, be16(LINK_GROUP), on_link)
            .and(R1, be16(0xffc0))
            .jump_if(Cond::Eq, R1, be16(0xfe80), on_link);
    }

    /// What follows the `fixed` bytes of a message at `R7` may be one option of 8 bytes, as Linux sends it (net/ipv6/
    /// ndisc.c); a link-layer address in it (RFC 4861, section 4.6.1) must be the pod's own. Several options, of which a
    /// receiver would choose one, are refused. Uses `R7`.
    fn link_layer_option(&mut self, fixed: i32, refused: Label, malformed: Label) {
        let none = self.asm.label();
        self.asm
            .load(Size::W, R2, R10, IP_END)
            .sub(R2, R7)
            .jump_if(Cond::Eq, R2, fixed, none)
            .jump_if(Cond::Ne, R2, fixed + 8, refused)
            .add(R7, fixed);
        self.copy(R7, OPTION, 8, malformed);
        self.asm.load(Size::B, R1, R10, OPTION).jump_if(Cond::Gt, R1, TARGET_LINK_LAYER_ADDRESS, none);
        self.own_mac((R10, OPTION + 2), refused);
        self.asm.bind(none);
    }
}

/// Hardware type Ethernet, protocol type IPv4.
const ARP_ETHERNET_IPV4: u32 = 0x0001_0800;

const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;

/// What an Ethernet frame carries at the least (IEEE 802.3, clause 4A.4.2: `minFrameSize` without addresses, type and FCS).
const LEAST_DATA: i32 = 46;

/// What devices and switches add behind a frame from the wire: the FCS that a device leaves there (`rx-fcs`, ethtool(8)), and
/// padding to the length that a longer, tagged or encapsulated frame had to have.
const SLACK: i32 = 64;

/// The first 16 bits of a group of link scope (RFC 4291, section 2.7).
const LINK_GROUP: u16 = 0xff02;

/// How many groups one report may tell of: those of a pod's own addresses, and some more.
const GROUPS: i32 = 4;

// ICMPv6 types of listener discovery.
const LISTENER_QUERY: i32 = 130;
const LISTENER_REPORT: i32 = 131;
const LISTENER_DONE: i32 = 132;
const LISTENER_REPORT_V2: i32 = 143;

// ICMPv6 types; router advertisements are 134.
const ROUTER_SOLICITATION: i32 = 133;
const NEIGHBOUR_SOLICITATION: i32 = 135;
const NEIGHBOUR_ADVERTISEMENT: i32 = 136;
const REDIRECT: i32 = 137;

/// What a packet has that no router has forwarded.
const HOP_LIMIT: i32 = 255;

/// Options of neighbour discovery: 1 is the source's link-layer address.
const TARGET_LINK_LAYER_ADDRESS: i32 = 2;
