//! What a node should have, as a function of who has what.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::reconcile::is_fabric_mac;
use super::{FabricConfig, HostFacts, Mode};
use crate::model::{IfIndex, MacAddr};
use crate::provider::{FabricNode, FabricTable, Vtep};

/// What a node should have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Where each prefix leads.
    pub routes: BTreeMap<IpNet, Hop>,
    /// Neighbours on the VXLAN device.
    pub neighbours: BTreeMap<IpAddr, MacAddr>,
    /// Behind which host each Ethernet address on the VXLAN device is.
    pub forwarding: BTreeMap<MacAddr, IpAddr>,
    /// Addresses of the VXLAN device: those of [`FabricNode::inside`] that other nodes lead here.
    pub inside: BTreeSet<IpAddr>,
    /// The links on which packets of other nodes come in without VXLAN.
    pub underlay: BTreeSet<IfIndex>,
    /// Who may send VXLAN here: the VTEPs of all other nodes, also of those that are reached straight, for the sender decides.
    pub vteps: BTreeSet<IpAddr>,
    /// The links that VXLAN may come in by wherever the way back leads: those that the own VTEP or a router is on.
    pub entrances: BTreeSet<IfIndex>,
    /// The largest packet that VXLAN carries on this host, in bytes, where there is VXLAN. What fits less on the way to another
    /// node is in the route to it.
    pub mtu: Option<u32>,
    /// What cannot be, why, and what to do about it.
    pub problems: Vec<String>,
}

/// Where a prefix leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hop {
    /// To nobody, and whoever sends there is told.
    Unreachable,
    /// To a node on a link of this one.
    Direct {
        /// The link.
        link: IfIndex,
        /// The node's address on it.
        gateway: IpAddr,
    },
    /// Through the VXLAN device.
    Vxlan {
        /// The neighbour on it: for IPv4 the first address of the prefix that is no other node's neighbour, which needs not be
        /// a host's, for it is never asked for; for IPv6 the link-local address that belongs to the node's Ethernet address, for
        /// the kernel takes no other that it knows on another link (`ip6_route_check_nh_onlink` of `net/ipv6/route.c`).
        gateway: IpAddr,
        /// The largest packet that fits the way there, in bytes, where that is less than [`Wanted::mtu`]: by the link that leads
        /// there, and by what the node tells of itself. A router in between may carry less still.
        mtu: Option<u32>,
    },
}

/// What node `local` should have, given who has what and what its host is like. Pure, and the same for the same arguments.
pub fn plan(table: &FabricTable, local: &FabricNode, facts: &HostFacts, config: &FabricConfig) -> Wanted {
    let mut wanted = Wanted::default();
    if let Some(vtep) = &local.vtep {
        wanted.mtu = facts.carried_from(vtep.address);
        // Until it is known whose it is, others may lead it elsewhere.
        let leads_here = |address: &IpAddr| {
            let around = table.prefixes.iter().filter(|(prefix, _)| prefix.contains(address));
            around.max_by_key(|(prefix, _)| prefix.prefix_len()).is_some_and(|(_, owner)| *owner == local.name)
        };
        wanted.inside.extend(local.inside.iter().copied().filter(leads_here));
        let others = table.nodes.values().filter(|node| node.name != local.name).filter_map(|node| node.vtep);
        let same = others.filter(|other| (other.vni, other.port) == (vtep.vni, vtep.port)).map(|other| other.address);
        wanted.vteps = same.filter(|address| !facts.addresses.contains_key(address)).collect();
        let routed = facts.routers.iter().map(|(_, link)| *link);
        wanted.entrances = routed.chain(facts.addresses.get(&vtep.address).copied()).collect();
    }
    let bridge_of = |prefix: &IpNet| facts.bridged.iter().find(|(subnet, _)| subnet.contains(prefix));
    // What must be reached whatever the table says: without it the table itself could not be heard of any more.
    let mut ways: BTreeMap<IpAddr, String> =
        facts.routers.iter().map(|(address, _)| (*address, "a router's".to_owned())).collect();
    for node in table.nodes.values().filter(|node| node.name != local.name) {
        let ends = node.addresses.iter().copied().chain(node.vtep.map(|vtep| vtep.address));
        ways.extend(ends.map(|address| (address, format!("node {}'s", node.name))));
    }
    let cut_off = |prefix: &IpNet| {
        let is_cut = |address: &IpAddr| !facts.addresses.contains_key(address) && !facts.has_better(*address, prefix);
        ways.iter().find(|(address, _)| prefix.contains(*address) && is_cut(address))
    };
    for pool in &table.pools {
        if let Some((subnet, bridge)) = bridge_of(pool) {
            wanted.problems.push(format!(
                "pool {pool}: bridge {bridge} has an address in {subnet}, so that its pods take all of the subnet to be on \
                 their segment, and reach no other node; use link.kind veth"
            ));
        }
        if let Some((address, whose)) = cut_off(pool) {
            wanted.problems.push(format!(
                "pool {pool}: {address}, {whose}, is in it, so that what of it is nobody's is not made unreachable; give the \
                 pool a subnet without it"
            ));
            continue;
        }
        wanted.routes.insert(pool.trunc(), Hop::Unreachable);
    }
    let peers = peers(table, local, facts, config, &mut wanted.problems);
    let mut unreached: BTreeMap<&str, BTreeSet<bool>> = BTreeMap::new();
    // The longest first, for a single address can be its own neighbour only.
    let mut prefixes: Vec<_> = table.prefixes.iter().collect();
    prefixes.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.prefix_len()));
    for (prefix, owner) in prefixes {
        let prefix = prefix.trunc();
        if let Some((address, whose)) = cut_off(&prefix) {
            wanted.problems.push(format!(
                "prefix {prefix} of node {owner}: {address}, {whose}, is in it, and it is not led there; give pods other \
                 addresses than the underlay"
            ));
            continue;
        }
        if *owner == local.name {
            // What is on the bridge has no route of its own that would go before this one.
            if bridge_of(&prefix).is_none() {
                wanted.routes.insert(prefix, Hop::Unreachable);
            } else {
                wanted.routes.remove(&prefix);
            }
            continue;
        }
        let ipv4 = prefix.addr().is_ipv4();
        // Where it cannot be led to, the shorter prefix that it is in must not lead to somebody else.
        wanted.routes.insert(prefix, Hop::Unreachable);
        let Some(peer) = peers.get(owner.as_str()) else { continue };
        let direct = peer.direct.iter().copied().find(|(_, address)| address.is_ipv4() == ipv4);
        match (direct, peer.vtep) {
            (Some((link, gateway)), _) => {
                wanted.underlay.insert(link);
                wanted.routes.insert(prefix, Hop::Direct { link, gateway });
            }
            (None, Some(vtep)) => {
                let is_free = |a: &IpAddr| wanted.neighbours.get(a).is_none_or(|mac| *mac == vtep.mac);
                let gateway = match prefix {
                    IpNet::V4(net) => (net.network().to_bits()..=net.broadcast().to_bits())
                        .map(|bits| IpAddr::from(Ipv4Addr::from_bits(bits)))
                        .find(is_free),
                    IpNet::V6(_) => Some(link_local(vtep.mac).into()),
                };
                // Where none is free every address of it is another node's, by a route of its own.
                let Some(gateway) = gateway else { continue };
                let way = [facts.carried_to(vtep.address), vtep.mtu].into_iter().flatten().min();
                if let Some(carried) = way.filter(|carried| !ipv4 && *carried < LEAST_IPV6) {
                    wanted.problems.push(format!(
                        "node {owner}: VXLAN carries {carried} bytes on the way there, and IPv6 needs {LEAST_IPV6}: larger packets \
                         are lost; raise the MTU of its underlay, or do without IPv6 pools"
                    ));
                }
                let least = if ipv4 { LEAST_IPV4 } else { LEAST_IPV6 };
                let mtu = way.map(|mtu| mtu.max(least)).filter(|mtu| wanted.mtu.is_some_and(|own| *mtu < own));
                wanted.neighbours.insert(gateway, vtep.mac);
                wanted.forwarding.insert(vtep.mac, vtep.address);
                wanted.routes.insert(prefix, Hop::Vxlan { gateway, mtu });
            }
            (None, None) => {
                unreached.entry(owner).or_default().insert(ipv4);
            }
        }
    }
    for (name, families) in unreached {
        for ipv4 in families {
            let family = if ipv4 { "IPv4" } else { "IPv6" };
            let why = match config.mode {
                Mode::Route => "it has no address of that family on a segment of this node; use fabric.mode auto",
                _ => {
                    "it takes in no VXLAN that this node sends; use the same fabric.mode, vni, port and family on both"
                }
            };
            wanted.problems.push(format!("node {name}: its {family} blocks are not reached, for {why}"));
        }
    }
    if let Some(mtu) = wanted.mtu
        && !wanted.neighbours.is_empty()
    {
        for (name, larger) in facts.pods.iter().filter(|(_, pods)| *pods > mtu) {
            wanted.problems.push(format!(
                "link {name}: its pod sends packets of up to {larger} bytes, and VXLAN carries {mtu}; set link.mtu or the \
                 pool's mtu to {mtu} or less"
            ));
        }
    }
    wanted
}

/// What every link of a family must carry, in bytes (RFC 791, section 3.2; RFC 8200, section 5).
const LEAST_IPV4: u32 = 68;
const LEAST_IPV6: u32 = 1280;

/// How another node is reached.
struct Peer {
    /// Its addresses on links of this node, one of a family.
    direct: Vec<(IfIndex, IpAddr)>,
    vtep: Option<Vtep>,
}

fn peers<'a>(
    table: &'a FabricTable,
    local: &FabricNode,
    facts: &HostFacts,
    config: &FabricConfig,
    problems: &mut Vec<String>,
) -> BTreeMap<&'a str, Peer> {
    let mut macs: BTreeMap<MacAddr, &str> = local.vtep.iter().map(|vtep| (vtep.mac, local.name.as_str())).collect();
    let mut peers = BTreeMap::new();
    for (name, node) in table.nodes.iter().filter(|(name, _)| **name != local.name) {
        let mut ends = node.addresses.iter().copied().chain(node.vtep.map(|vtep| vtep.address));
        if let Some(shared) = ends.find(|address| facts.addresses.contains_key(address)) {
            problems.push(format!("node {name}: its address {shared} is this node's; correct fabric.addresses of one"));
            continue;
        }
        let on_link = |address: &IpAddr| Some((facts.segment_of(*address)?, *address));
        let direct = match config.mode {
            Mode::Vxlan => Vec::new(),
            Mode::Auto | Mode::Route => node.addresses.iter().filter_map(on_link).collect(),
        };
        let fits = |vtep: &&Vtep| {
            local.vtep.is_some_and(|own| {
                (own.vni, own.port, own.address.is_ipv4()) == (vtep.vni, vtep.port, vtep.address.is_ipv4())
            })
        };
        let mut vtep = node.vtep.as_ref().filter(fits).copied();
        if let Some(end) = vtep.filter(|end| !is_fabric_mac(end.mac)) {
            problems.push(format!(
                "node {name}: its Ethernet address {} is none of the fabric's, which begin with 02:dc; have it announce itself \
                 anew",
                end.mac
            ));
            vtep = None;
        }
        if let Some(end) = vtep {
            match macs.get(&end.mac) {
                Some(other) => {
                    problems.push(format!(
                        "node {name}: its Ethernet address {} is node {other}'s, for names are hashed; rename one",
                        end.mac
                    ));
                    vtep = None;
                }
                None => drop(macs.insert(end.mac, name)),
            }
        }
        peers.insert(name.as_str(), Peer { direct, vtep });
    }
    peers
}

/// The link-local address that belongs to an Ethernet address (RFC 4291, appendix A).
fn link_local(mac: MacAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.bytes();
    let eui = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from((0xfe80_u128 << 112) | u128::from(eui))
}
