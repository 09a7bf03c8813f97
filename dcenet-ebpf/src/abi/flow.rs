//! Flows that were admitted, and fragments of them.

use super::layout::{Be16, record};

record! {
    /// Names a flow of one endpoint, in the same way in both directions.
    ///
    /// The owner is part of it, so two pods of a node that talk to each other have an entry each. ICMP echo has the
    /// identifier as the port of who asks and 0 as the other one; [`FlowKey::ASKED_BY_PEER`] tells the two apart, also
    /// where the identifier is 0.
    pub struct FlowKey, 24 bytes {
        /// The endpoint.
        slot: u16 = 0 @ SLOT,
        /// IP protocol.
        protocol: u8 = 2 @ PROTOCOL,
        /// 4 or 6, and [`FlowKey::ASKED_BY_PEER`]. With the version here an IPv6 packet from `::ffff:a.b.c.d` cannot
        /// pass for one of IPv4.
        version: u8 = 3 @ VERSION,
        /// The pod's port; 0 for protocols without ports.
        pod_port: Be16 = 4 @ POD_PORT,
        /// The peer's port.
        peer_port: Be16 = 6 @ PEER_PORT,
        /// The peer's address.
        peer: [u8; 16] = 8 @ PEER,
    }
}

impl FlowKey {
    /// Flag in [`FlowKey::version`]: ICMP echo that the peer asked for.
    pub const ASKED_BY_PEER: u8 = 0x80;
}

/// What is known of a flow's progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum FlowState {
    /// No answer yet: for TCP, only the SYN was seen.
    New = 0,
    /// Packets went both ways, or TCP was met in mid-flow.
    Established = 1,
    /// TCP: a FIN or RST was seen.
    Closing = 2,
}

impl FlowState {
    /// From its number in the map.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::New),
            1 => Some(Self::Established),
            2 => Some(Self::Closing),
            _ => None,
        }
    }
}

record! {
    /// An admitted flow.
    ///
    /// One that the policy of now denies keeps its entry and its old generation, so that each of its packets is judged
    /// by the policy of the direction that admitted it, in whichever direction it goes: without the entry the answers
    /// would pass for a new flow of the other direction. It is forgotten as others are, after its time without packets.
    ///
    /// Programs write it without a lock: when two CPUs handle packets of one flow and direction at once, a count can be
    /// lost. Each direction has its own counters, so the two hooks do not disturb each other.
    pub struct Flow, 72 bytes {
        /// Generation of the policy that admitted it, in [`Flow::direction`].
        generation: u32 = 0 @ GENERATION,
        /// The rule that admitted it.
        rule: u32 = 4 @ RULE,
        /// Time of the last packet.
        last_seen: u64 = 8 @ LAST_SEEN,
        /// How long after the last packet the flow is forgotten, in ns. Follows from the state.
        timeout: u64 = 16 @ TIMEOUT,
        /// Number of the [`Direction`](super::Direction) whose policy admitted it.
        direction: u8 = 24 @ DIRECTION,
        /// Number of the [`FlowState`].
        state: u8 = 25 @ STATE,
        /// [`Endpoint::tenure`](super::Endpoint::tenure) of the endpoint whose flow it is.
        tenure: u16 = 26 @ TENURE,
        /// TCP that began with SYN and SYN-ACK: the acknowledgement number that the opening side must bear out to be
        /// believed, which is the answer's sequence number and 1 (RFC 9293, section 3.4). 0 while it is not known.
        expected: u32 = 28 @ EXPECTED,
        /// Packets that the pod sent.
        egress_packets: u64 = 32 @ EGRESS_PACKETS,
        /// Bytes that the pod sent.
        egress_bytes: u64 = 40 @ EGRESS_OCTETS,
        /// Packets that the pod received.
        ingress_packets: u64 = 48 @ INGRESS_PACKETS,
        /// Bytes that the pod received.
        ingress_bytes: u64 = 56 @ INGRESS_OCTETS,
        /// The kernel's counter of ticks (`jiffies`) when the flow's last packet was seen by the clock, 0 while that is not known.
        /// The coarse clock stands still for as long, so that a packet of the same tick need not ask it.
        tick: u64 = 64 @ TICK,
    }
}

record! {
    /// A packet that a rule rejected and that was answered, under the key that the answer has: of a reset the flow's, of an ICMP
    /// error that of a packet without ports. The answer comes to the pod's other program as any packet does, which lets one pass for
    /// each entry.
    pub struct Answered, 16 bytes {
        /// When.
        at: u64 = 0 @ AT,
        /// [`Answered::FROM_POD`] or [`Answered::TO_POD`], and one more for each program that has let the answer pass: the one on
        /// the pod's device, and for a frame of the pod the guard behind it.
        passed: u64 = 8 @ PASSED,
    }
}

impl Answered {
    /// What the pod sent was answered.
    pub const FROM_POD: u64 = 0;
    /// What was sent to the pod was answered.
    pub const TO_POD: u64 = 16;
}

record! {
    /// Names a fragmented packet of one endpoint. The pod's own address is not part of it: two of its addresses that
    /// use one identifier towards one peer would share the entry, and a receiver does not join their fragments.
    pub struct FragmentKey, 24 bytes {
        /// The endpoint.
        slot: u16 = 0 @ SLOT,
        /// IP protocol; for IPv6 the next header of the fragment header.
        protocol: u8 = 2 @ PROTOCOL,
        /// `version << 4 | direction`.
        kind: u8 = 3 @ KIND,
        /// Identification, in the byte order of the packet: 16 bits for IPv4, then zeros; 32 for IPv6.
        identification: [u8; 4] = 4 @ IDENTIFICATION,
        /// The peer's address.
        peer: [u8; 16] = 8 @ PEER,
    }
}

record! {
    /// What the head of a fragmented packet told.
    pub struct Fragment, 24 bytes {
        /// As in [`FlowKey`].
        pod_port: Be16 = 0 @ POD_PORT,
        /// As in [`FlowKey`].
        peer_port: Be16 = 2 @ PEER_PORT,
        /// IP protocol.
        protocol: u8 = 4 @ PROTOCOL,
        /// As in [`FlowKey`].
        version: u8 = 5 @ VERSION,
        /// ICMP type and code, `type << 8 | code`.
        icmp: u16 = 6 @ ICMP,
        /// The program's flags for packets that have no entry in the conntrack map.
        flags: u32 = 8 @ FLAGS,
        /// When the head passed.
        seen: u64 = 16 @ SEEN,
    }
}
