//! Directions, reasons and what is counted.

use super::layout::record;

/// A direction, seen from the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Direction {
    /// The pod sends: egress policy, and the peer is the destination. On the host's end of a veth this is the ingress
    /// hook.
    Egress = 0,
    /// The pod receives: ingress policy, and the peer is the source. On the host's end of a veth this is the egress hook.
    Ingress = 1,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Egress, Self::Ingress];

    /// The other one.
    pub const fn opposite(self) -> Self {
        match self {
            Self::Egress => Self::Ingress,
            Self::Ingress => Self::Egress,
        }
    }

    /// From its number in a map or event.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Egress),
            1 => Some(Self::Ingress),
            _ => None,
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $number:literal $name:literal,)+) => {
        /// Why a packet passed or was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Reason { $($(#[$doc])* $variant = $number,)+ }

        impl Reason {
            /// All of them, by number.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// From its number in a map or event.
            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)+ _ => None }
            }

            /// Its name for people and metrics, in lower case with dashes.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

reasons! {
    /// Passed: a rule, or the default, allows it. Packets of a flow that is already known are not counted here but in
    /// their [`Flow`](super::Flow).
    Allowed = 0 "allowed",
    /// Passed: an ICMP error about a flow that is known (RFC 792, RFC 4443), or the answer to a packet that a rule rejected.
    Related = 1 "related",
    /// Passed: ARP, neighbour or listener discovery.
    Neighbour = 2 "neighbour",
    /// Dropped: a rule, or the default, denies it.
    Denied = 3 "denied",
    /// Dropped: the flow was admitted once, and the policy of now denies it. So are its answers.
    Revoked = 4 "revoked",
    /// Dropped: the endpoint's policy is not known yet.
    PolicyUnknown = 5 "policy-unknown",
    /// Dropped: the source is not the pod's own address.
    Spoofed = 6 "spoofed",
    /// Dropped: ARP or neighbour discovery that speaks for somebody else or goes beyond the link, a router advertisement
    /// or a redirect, sent by the pod; neighbour discovery that no receiver would take (RFC 4861, section 7.1), of either
    /// direction.
    NeighbourRefused = 7 "neighbour-refused",
    /// Dropped: neither IPv4, IPv6 nor ARP, or more than two VLAN tags.
    OtherEtherType = 8 "other-ethertype",
    /// Dropped: headers that are cut off or contradict themselves.
    Malformed = 9 "malformed",
    /// Dropped: more than eight IPv6 extension headers.
    TooManyExtensionHeaders = 10 "too-many-extension-headers",
    /// Dropped: a fragment whose head has not passed.
    FragmentWithoutHead = 11 "fragment-without-head",
    /// Dropped: there is no room for the flow.
    ConntrackFull = 12 "conntrack-full",
    /// Dropped: the attachment's slot holds no endpoint.
    UnknownEndpoint = 13 "unknown-endpoint",
    /// Dropped: towards the pod, a frame for another Ethernet address, such as a bridge floods while it does not know
    /// where that is, or a packet for another IP address.
    OtherHost = 14 "other-host",
    /// Dropped: the sender says by which way the packet goes, so that its destination is not where it ends: a loose or
    /// strict source route of IPv4 (RFC 791, section 3.1; RFC 7126, sections 4.3 and 4.4), or a routing header of IPv6
    /// with segments left (RFC 8200, section 4.4; RFC 5095).
    SourceRoute = 15 "source-route",
    /// Dropped: a VLAN tag (IEEE 802.1Q), of a pod or for one that is no [trunk](super::Endpoint::TRUNK). A tag of VLAN 0,
    /// which carries a priority alone, is one, too.
    Tagged = 16 "tagged",
}

impl Reason {
    /// Whether the packet goes on.
    pub const fn passes(self) -> bool {
        matches!(self, Self::Allowed | Self::Related | Self::Neighbour)
    }
}

/// Where the map of reasons counts a reason in a direction.
pub const fn reason_index(reason: Reason, direction: Direction) -> u32 {
    reason as u32 * 2 + direction as u32
}

record! {
    /// Packets and bytes of one CPU. Bytes count from the Ethernet header on. A packet that the kernel has merged or
    /// will segment (GRO, GSO) counts as one.
    pub struct Traffic, 16 bytes {
        /// Packets.
        packets: u64 = 0 @ PACKETS,
        /// Bytes.
        bytes: u64 = 8 @ OCTETS,
    }
}
