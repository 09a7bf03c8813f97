//! Routes between nodes: each node's blocks of addresses lead to it, straight where it is on the same segment and through
//! VXLAN where it is not, so that a cluster needs no other network.
//!
//! ```text
//!   FabricSource        which node has which prefix        (a store's watch)
//!        |
//!      plan             table + host -> what is wanted     (pure)
//!        |
//!      Fabric           what is wanted - what is there     (one dump, few batches)
//! ```
//!
//! | Of | Is entered in the main table |
//! |---|---|
//! | another node on a segment of this one (`auto`, `route`) | a route via its address |
//! | another node anywhere (`auto`, `vxlan`) | a route over the VXLAN device, a neighbour, and an entry of the device's forwarding database, all three for good: nothing is asked of the network, and nothing learnt from it |
//! | this node | an unreachable route: an address of its block that no pod has must not be sent back by the default route |
//! | a pool | the same, for the same reason |
//!
//! The VXLAN device has [addresses](crate::provider::FabricNode::inside) of the node's own blocks, one of a family: what the
//! node itself sends through it comes from them, so that answers come back through it.
//!
//! Pods must be routed one by one (`link.kind` `veth`, `netkit` or `vrf` without a table of its own): routes to them are
//! more specific than these. A pod on a bridge takes all of its subnet to be on its own segment.
//!
//! # Who may send
//! A VXLAN device believes its sender which pod a packet is from, and a host's port takes in what anybody sends. Therefore the
//! table `inet dcenet-fabric` of nftables lets in only datagrams that come from the VTEP of a known node, by a link that bears
//! this node's own, that a router is on, or that leads to the sender; nor does the node forward others to VTEPs, for they could
//! be given its own address. It concerns nothing but the fabric's VNI, and counts what it drops. The device is up only while
//! the table is there; who removes the table alone opens the device until the next [`Fabric::apply`].
//!
//! # Whose it is
//! Routes and neighbours bear the number [`FABRIC_PROTOCOL`](crate::netlink::FABRIC_PROTOCOL), the device the alias
//! [`MARK`]: only what bears them is ever changed or removed. Where somebody else has a route to the same prefix with the
//! same metric, theirs stays, and [`Report::problems`] names it. Settings of the host are written down in
//! `fabric.json` of the run directory before they are changed, and put back by [`Fabric::remove`].
//!
//! # When nobody is there
//! What is entered stays when the process ends, however it ends: packets go on. The next [`Fabric`] finds it, and changes
//! what is not right any more. A node that is dead keeps its routes until its blocks are reclaimed or it is
//! [withdrawn](crate::provider::FabricSource::withdraw).
//!
//! # Limits
//! Without an address inside, because none was leased, a node reaches pods of other nodes from its own address, and what they
//! answer goes past the tunnel: a network that lets only its own addresses through drops that. Pods among each other always
//! use one way. Straight routes need a network that lets pods' addresses through.
//!
//! The VXLAN device has the MTU of the node's own underlay; where less fits on the way to another node, by the link that leads
//! there or by what that node tells of itself, the route says so ([`Hop::Vxlan`]), and senders are told by ICMP. A router in
//! between that carries less is not known. Of IPv6 addresses those are announced that last (not temporary ones, RFC 8981); of
//! several one that was announced before, while the process runs and, of the VTEP's family, after it. When the host begins to
//! forward IPv6, links that take router advertisements go on to (`accept_ra` 2); links that come later take none. A pool or
//! block that would cut off a node or a router is not led, and told.
//!
//! A host of the underlay that can send with a node's address is taken for the node, as is a process of a node's own network
//! namespace: VXLAN has no proof of origin (RFC 7348, section 7). Between nodes no addresses may be translated. Over IPv6, where
//! several links lead to a peer by one route and none of them bears the node's own address, what comes by another than the
//! first is dropped (`nft_fib6_eval` of `net/ipv6/netfilter/nft_fib_ipv6.c`).
//!
//! # Minimum kernel version
//! 5.0 (`NDA_PROTOCOL`, so that neighbours of others on the device are told apart).

mod events;
mod fence;
mod host;
mod plan;
mod reconcile;
mod settings;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use self::events::KernelEvents;
pub use self::host::HostFacts;
pub use self::plan::{Hop, Wanted, plan};
pub use self::reconcile::{Fabric, FabricError, Look, Report};
use crate::model::IfName;

/// How nodes are connected, as written in a configuration. The same on every node but for `addresses`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct FabricConfig {
    /// Which way packets go; `auto` unless told.
    pub mode: Mode,
    /// The node's addresses on the underlay, at most one of a family; VXLAN uses the first. Unless told, those of the
    /// devices that default routes lead through, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// The name of the VXLAN device; `dcvx0` unless told.
    pub device: IfName,
    /// The VXLAN network identifier, from 1 to 16777215; 3534 unless told.
    pub vni: u32,
    /// The UDP port of VXLAN; 4789 unless told (RFC 7348, section 8).
    pub port: u16,
}

/// Which way packets go to other nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Mode {
    /// Straight to nodes on a segment of this one, through VXLAN to others.
    #[default]
    Auto,
    /// Straight; nodes on no segment of this one are not reached.
    Route,
    /// Through VXLAN.
    Vxlan,
}

impl Mode {
    /// Whether the node takes in VXLAN. With `auto` it does always: who sends decides.
    pub const fn has_vxlan(self) -> bool {
        matches!(self, Self::Auto | Self::Vxlan)
    }
}

impl Default for FabricConfig {
    fn default() -> Self {
        Self {
            mode: Mode::Auto,
            addresses: Vec::new(),
            device: "dcvx0".parse().expect("a name of five letters"),
            vni: 3534,
            port: 4789,
        }
    }
}

impl FabricConfig {
    /// Refuses what cannot be.
    ///
    /// # Errors
    /// [`FabricError::Invalid`] with the field, its value and what would be accepted.
    pub fn check(&self) -> Result<(), FabricError> {
        let invalid = |field: &str, value: &dyn std::fmt::Display, reason: &str| {
            Err(FabricError::Invalid { field: field.into(), value: value.to_string(), reason: reason.into() })
        };
        if !(1..1 << 24).contains(&self.vni) {
            return invalid("vni", &self.vni, "not between 1 and 16777215; 3534 is as good as any");
        }
        if self.port == 0 {
            return invalid("port", &self.port, "no UDP port; 4789 is VXLAN's");
        }
        for (i, address) in self.addresses.iter().enumerate() {
            let field = format!("addresses[{i}]");
            let link_local = match address {
                IpAddr::V4(a) => a.is_link_local() || a.is_broadcast(),
                IpAddr::V6(a) => a.is_unicast_link_local(),
            };
            if link_local || address.is_loopback() || address.is_unspecified() || address.is_multicast() {
                return invalid(&field, address, "no other node can send there; give the node's own on the underlay");
            }
            if self.addresses[..i].iter().any(|before| before.is_ipv4() == address.is_ipv4()) {
                return invalid(&field, address, "the second of its family; give one of each at most");
            }
        }
        Ok(())
    }
}

/// The alias of the VXLAN device.
pub const MARK: &str = "dcenet:fabric";

/// The metric of every route between nodes. Above those that the kernel and people choose, so that theirs win.
pub const METRIC: u32 = 2210;
