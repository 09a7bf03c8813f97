//! Events for user space.

use super::layout::{Be16, record};

/// What an event tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum EventKind {
    /// A flow was admitted; this is its first packet.
    New = 0,
    /// A packet was dropped, of a flow or not.
    Denied = 1,
    /// The first FIN or RST of a TCP flow. The counters are those up to this packet. A flow that ends by silence, or is
    /// evicted, has no such event.
    Closed = 2,
    /// A packet of a known flow, picked at random ([`Spec::sample`](crate::datapath::Spec::sample)). The counters are those
    /// up to this packet.
    Sampled = 3,
}

impl EventKind {
    /// From its number in an event.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::New),
            1 => Some(Self::Denied),
            2 => Some(Self::Closed),
            3 => Some(Self::Sampled),
            _ => None,
        }
    }
}

record! {
    /// A record of the ring buffer. What the packet did not get to tell, because it was dropped before, is zero.
    pub struct Event, 96 bytes {
        /// When.
        time: u64 = 0 @ TIME,
        /// Number of the [`EventKind`].
        kind: u8 = 8 @ KIND,
        /// Number of the [`Reason`](super::Reason), which also tells the verdict.
        reason: u8 = 9 @ REASON,
        /// Number of the [`Direction`](super::Direction) of the packet.
        direction: u8 = 10 @ DIRECTION,
        /// IP protocol.
        protocol: u8 = 11 @ PROTOCOL,
        /// The endpoint.
        slot: u16 = 12 @ SLOT,
        /// As in [`FlowKey`](super::FlowKey).
        version: u8 = 14 @ VERSION,
        /// Flags of the TCP header (RFC 9293, section 3.1).
        tcp_flags: u8 = 15 @ TCP_FLAGS,
        /// The device of the hook.
        ifindex: u32 = 16 @ IFINDEX,
        /// The rule that decided; [`Event::NO_RULE`] where none did.
        rule: u32 = 20 @ RULE,
        /// The pod's own address of the packet's version, by its [`Endpoint`](super::Endpoint).
        pod: [u8; 16] = 24 @ POD,
        /// The peer's address.
        peer: [u8; 16] = 40 @ PEER,
        /// As in [`FlowKey`](super::FlowKey).
        pod_port: Be16 = 56 @ POD_PORT,
        /// As in [`FlowKey`](super::FlowKey).
        peer_port: Be16 = 58 @ PEER_PORT,
        /// ICMP type and code, `type << 8 | code`.
        icmp: u16 = 60 @ ICMP,
        /// Packets that the pod sent; counters are those of the flow, or of this packet where there is none.
        egress_packets: u64 = 64 @ EGRESS_PACKETS,
        /// Bytes that the pod sent.
        egress_bytes: u64 = 72 @ EGRESS_OCTETS,
        /// Packets that the pod received.
        ingress_packets: u64 = 80 @ INGRESS_PACKETS,
        /// Bytes that the pod received.
        ingress_bytes: u64 = 88 @ INGRESS_OCTETS,
    }
}

impl Event {
    /// Stands for no rule.
    pub const NO_RULE: u32 = u32::MAX;
}
