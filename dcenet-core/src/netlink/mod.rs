//! Netlink: the only sender of it on behalf of this crate.
//!
//! Synchronous on purpose: the kernel works on a request inside `send`, under one lock for all of a namespace, so that
//! there is nothing to overlap. A [`Socket`] belongs to one namespace and one operation.
//!
//! Requests are encoded here and not by `netlink-packet-route`, because they must be laid out exactly as
//! `include/uapi/linux/rtnetlink.h` and its companions say, several in one buffer; the tests compare them with what
//! that crate and iproute2 make of them.

mod address;
mod carrier;
pub(crate) mod conntrack;
mod counters;
mod detail;
mod device;
mod fault;
mod link;
mod list;
mod message;
mod neighbour;
pub(crate) mod nft;
mod nsid;
#[cfg(test)]
mod oracle;
mod route;
mod rule;
mod shaping;
mod socket;
mod uevent;
mod vf;
mod vlans;
mod vxlan;

use std::net::IpAddr;

pub use address::AddressView;
pub use counters::{LinkCounters, Traffic};
pub use detail::{LinkDetail, LinkSettings};
pub use device::{
    CreateLinkError, IpvlanFlag, IpvlanMode, LinkKind, MacvlanMode, NetkitMode, NetkitPolicy, NewLink, VlanProtocol,
};
pub use link::{BridgePort, LinkView};
pub use message::{Attributes, Message};
pub use neighbour::NeighbourView;
pub use route::{RouteMetrics, RouteView, RuleView};
pub use rule::RuleSpec;
pub use socket::{Failure, Family, NetlinkError, Reply, Socket};
pub use uevent::Uevents;
pub use vf::{Guid, VfChange, VfGuids, VfLinkState, VfListError, VfRate, VfView, VfVlan};
pub use vlans::{BridgeVlans, PortVlans};
pub use vxlan::{ForwardingView, VxlanSpec};

#[cfg(feature = "fault-injection")]
pub use fault::{Fault, Injection, through_gate, with_fault};

pub(crate) use address::{add_address, address_dump, delete_address};
pub(crate) use carrier::{NO_ROUTE, is_local_route, is_operational};
pub(crate) use conntrack::Flow;
pub(crate) use device::{create_link, lacks_kind, move_link, refused};
pub(crate) use fault::{Gate, gate, gated};
pub(crate) use link::{
    LinkChange, NewVeth, create_bridge, create_veth, delete_group, delete_link, hairpin, isolate, link_by_name,
    link_dump, set_group, set_link,
};
pub(crate) use neighbour::{add_fabric_neighbour, add_neighbour, delete_neighbour, neighbour_dump};
pub(crate) use route::{
    FabricRoute, NewRoute, NextHop, add_route, delete_listed_route, delete_route, fabric_route, route_dump, route_to,
    rule_dump,
};
pub(crate) use rule::{add_rule, delete_rule};
pub(crate) use shaping::{add_clsact, divert, divert_dump, diverts_to, shape, shape_dump, shaped_rate};
pub(crate) use vlans::{NO_VLAN, add_vlans, delete_vlan, filter_vlans};
pub(crate) use vxlan::{delete_forwarding, mark_vxlan, no_addresses_of_its_own, set_forwarding};

/// Marks routes and rules of ours, in the field that tells who made them (`rtm_protocol`; 220 is free in iproute2's
/// `rt_protos`).
pub const PROTOCOL: u8 = 220;

/// Marks routes and neighbours between nodes ([`crate::fabric`]), lest they are taken for those of pods.
pub const FABRIC_PROTOCOL: u8 = 221;

/// Reads a datagram as every reader of this crate would, whatever is in it. For fuzzing: it must not panic.
#[cfg(feature = "test-support")]
pub fn read_hostile(datagram: &[u8]) {
    for message in message::split(datagram).flatten() {
        let payload = message.payload;
        std::hint::black_box((
            LinkView::parse(payload),
            LinkDetail::parse(payload),
            vf::parse_list(payload).is_ok(),
            AddressView::parse(payload),
            RouteView::parse(payload),
            RuleView::parse(payload),
            NeighbourView::parse(payload),
            ForwardingView::parse(payload),
            VxlanSpec::parse(payload),
            PortVlans::parse(payload),
            nft::Found::parse(payload),
            Flow::parse(payload),
            crate::model::IfIndex::new(1).map(|i| (shaped_rate(payload, i), diverts_to(payload, i))),
            socket::acknowledgement(message).is_ok(),
        ));
    }
}

/// The address family of an address, as the kernel numbers it.
pub(crate) fn family_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// An address's bytes in wire order.
pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// Reads an address of 4 or 16 bytes.
pub(crate) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    }
}
