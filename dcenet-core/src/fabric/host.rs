//! What of a host decides how it reaches others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{IfIndex, IfName};
use crate::netlink::{AddressView, FABRIC_PROTOCOL, LinkView, NetlinkError, RouteView, Socket};

/// What of a host decides how it reaches others.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    /// Its addresses, each with its link.
    pub addresses: BTreeMap<IpAddr, IfIndex>,
    /// Routes of the main table that are not the fabric's: the destination, its metric, and the link where the destination is
    /// on that link; `None` where it is behind a router, or nowhere.
    pub paths: Vec<(IpNet, u32, Option<IfIndex>)>,
    /// Routers of routes of the main table that are not the fabric's, each with its link.
    pub routers: BTreeSet<(IpAddr, IfIndex)>,
    /// The MTU of each link, in bytes.
    pub mtus: BTreeMap<IfIndex, u32>,
    /// Subnets that bridges of the host have addresses in: their pods are on a segment, and have no routes of their own.
    pub bridged: Vec<(IpNet, String)>,
    /// Ends of pods and how large packets they send, in bytes.
    pub pods: Vec<(String, u32)>,
}

/// The lists of a host at one moment.
#[derive(Debug)]
pub(super) struct Lists {
    pub(super) links: Vec<LinkView>,
    pub(super) addresses: Vec<AddressView>,
    pub(super) routes: Vec<RouteView>,
}

impl Lists {
    pub(super) fn read(socket: &mut Socket) -> Result<Self, NetlinkError> {
        Ok(Self { links: socket.links()?, addresses: socket.addresses()?, routes: socket.routes()? })
    }

    /// `device` is the fabric's own.
    pub(super) fn facts(&self, device: &IfName) -> HostFacts {
        HostFacts::of(&self.links, &self.addresses, &self.routes, device)
    }
}

impl HostFacts {
    /// What lists of the host say. `device` is the fabric's own.
    pub fn of(links: &[LinkView], addresses: &[AddressView], routes: &[RouteView], device: &IfName) -> Self {
        let link_of = |index| links.iter().find(|link| link.index == index);
        let own = |index| link_of(index).is_some_and(|link| link.name == device.as_str());
        let mut facts = Self::default();
        for a in addresses.iter().filter(|a| !own(a.index)) {
            facts.addresses.insert(a.address.addr(), a.index);
            if let Some(bridge) = link_of(a.index).filter(|link| link.kind.as_deref() == Some("bridge")) {
                facts.bridged.push((a.address.trunc(), bridge.name.clone()));
            }
        }
        let main = u32::from(libc::RT_TABLE_MAIN);
        for route in routes.iter().filter(|r| r.table == main && r.protocol != FABRIC_PROTOCOL) {
            let straight = route.kind == libc::RTN_UNICAST && route.gateway.is_none() && route.unread.is_none();
            let link = route.link.filter(|link| straight && !own(*link));
            facts.paths.push((route.destination, route.metric, link));
            facts.routers.extend(route.gateway.zip(route.link).filter(|(_, link)| !own(*link)));
        }
        facts.mtus = links.iter().map(|link| (link.index, link.mtu)).collect();
        let ours = |link: &&LinkView| {
            let alias = link.alias.as_deref().unwrap_or_default();
            alias.starts_with("dcenet:")
                && alias != super::MARK
                && matches!(link.kind.as_deref(), Some("veth" | "netkit"))
        };
        facts.pods = links.iter().filter(ours).map(|link| (link.name.clone(), link.mtu)).collect();
        facts
    }

    /// The link that the address is on; `None` where a router leads there, or nothing.
    pub fn segment_of(&self, address: IpAddr) -> Option<IfIndex> {
        let leads = self.paths.iter().filter(|(to, ..)| to.contains(&address));
        leads.max_by_key(|(to, metric, _)| (to.prefix_len(), u32::MAX - metric)).and_then(|(.., link)| *link)
    }

    /// The addresses of the links that default routes lead through, IPv4 first. Of several the first that the kernel lists.
    pub(super) fn addresses_of_default_routes(addresses: &[AddressView], routes: &[RouteView]) -> Vec<IpAddr> {
        let main = u32::from(libc::RT_TABLE_MAIN);
        let of_family = |ipv4: bool| {
            let defaults = routes.iter().filter(|r| {
                let ours = r.protocol == FABRIC_PROTOCOL || r.kind != libc::RTN_UNICAST;
                r.table == main && r.destination.prefix_len() == 0 && r.destination.addr().is_ipv4() == ipv4 && !ours
            });
            let best = defaults.min_by_key(|r| r.metric)?;
            let here = |a: &&AddressView| {
                Some(a.index) == best.link && a.address.addr().is_ipv4() == ipv4 && a.scope == libc::RT_SCOPE_UNIVERSE
            };
            best.source.or_else(|| addresses.iter().find(here).map(|a| a.address.addr()))
        };
        [true, false].into_iter().filter_map(of_family).collect()
    }
}
