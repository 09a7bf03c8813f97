//! Endpoints and their limits.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::layout::record;

record! {
    /// What the programs know of an endpoint. Its slot is a constant of the programs
    /// ([`Slot::Constant`](crate::datapath::Slot::Constant)), or comes with the attachment: the low 16 bits of the filter's
    /// class id (TCA_BPF_CLASSID), which cls_bpf hands to the program as `tc_classid` (net/sched/cls_bpf.c). Slot 0 is
    /// never given to an endpoint, as a filter without a class id and BPF_PROG_TEST_RUN show it.
    ///
    /// Generations of a slot only ever grow, also when another endpoint gets the slot: so an old entry of the conntrack
    /// map is never believed. Its tenure tells whose flow such an entry is.
    pub struct Endpoint, 64 bytes {
        /// [`Endpoint::ACTIVE`], [`Endpoint::TRUNK`] and [`Endpoint::IN_POD`].
        flags: u32 = 0 @ FLAGS,
        /// Generation of the egress policy. Flows that it admitted under another one are judged anew.
        generation_egress: u32 = 4 @ GENERATION_EGRESS,
        /// Generation of the ingress policy.
        generation_ingress: u32 = 8 @ GENERATION_INGRESS,
        /// Own IPv4 address, network order; zeros for none.
        ipv4: [u8; 4] = 12 @ IPV4,
        /// Own IPv6 address; zeros for none.
        ipv6: [u8; 16] = 16 @ IPV6,
        /// Own IPv6 link-local address, which neighbour discovery uses (RFC 4861, section 7.2.2); zeros for none.
        link_local: [u8; 16] = 32 @ LINK_LOCAL,
        /// Own Ethernet address, which the pod's frames, ARP packets and neighbour discovery must bear, and which unicast
        /// frames towards it must be for; zeros for any.
        mac: [u8; 6] = 48 @ MAC,
        /// How many endpoints had the slot before, modulo 65,536. A flow of another tenure that is denied is forgotten at
        /// once, as it was never the endpoint's.
        tenure: u16 = 54 @ TENURE,
    }
}

impl Endpoint {
    /// The slot holds an endpoint; without it every packet is dropped.
    pub const ACTIVE: u32 = 1;
    /// VLAN-tagged frames are judged by what is in them, whatever their VLAN. Without it they are dropped, for an address
    /// means another host in another VLAN. The owner of dcenet-policy makes no endpoint one.
    pub const TRUNK: u32 = 2;
    /// The programs are on a device in the pod, whose hooks are the other way round: what the pod sends is at egress.
    pub const IN_POD: u32 = 4;
    /// Offset of 8 bytes that are zero.
    pub(crate) const ZERO: i16 = 56;

    /// An active endpoint with these addresses, both generations 0.
    pub fn new(ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>, link_local: Option<Ipv6Addr>) -> Self {
        Self {
            flags: Self::ACTIVE,
            ipv4: ipv4.map_or([0; 4], |a| a.octets()),
            ipv6: ipv6.map_or([0; 16], |a| a.octets()),
            link_local: link_local.map_or([0; 16], |a| a.octets()),
            ..Self::default()
        }
    }

    /// The same, as [`Endpoint::TRUNK`].
    #[must_use]
    pub fn as_trunk(self) -> Self {
        Self { flags: self.flags | Self::TRUNK, ..self }
    }

    /// The same, as [`Endpoint::IN_POD`].
    #[must_use]
    pub fn as_in_pod(self) -> Self {
        Self { flags: self.flags | Self::IN_POD, ..self }
    }

    /// The same, bound to an Ethernet address.
    #[must_use]
    pub fn with_mac(self, mac: [u8; 6]) -> Self {
        Self { mac, ..self }
    }
}

record! {
    /// How many events an endpoint has caused in a span of time, and how many of it were held back or lost. All endpoints
    /// write to one ring buffer: without limits one of them could fill it for all.
    ///
    /// Programs of several CPUs update the window without a lock, so limits are approximate; what is held back or lost is
    /// counted atomically.
    pub struct EventLimit, 40 bytes {
        /// Number of the window, 2^30 ns each (1.07 s).
        window: u64 = 0 @ WINDOW,
        /// Events of this window about drops ([`Spec::denied_events`](crate::datapath::Spec::denied_events)).
        used: u32 = 8 @ USED,
        /// Events of this window about flows ([`Spec::flow_events`](crate::datapath::Spec::flow_events)).
        used_by_flows: u32 = 12 @ USED_BY_FLOWS,
        /// Events of either sort that a limit held back.
        limited: u64 = 16 @ LIMITED,
        /// Events of every kind that found the ring buffer full.
        lost: u64 = 24 @ LOST,
        /// Packets of this window that a rule rejected and that were answered
        /// ([`Spec::answers`](crate::datapath::Spec::answers)).
        answers: u32 = 32 @ ANSWERS,
    }
}
