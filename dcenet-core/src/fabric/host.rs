//! What of a host decides how it reaches others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::METRIC;
use crate::model::{IfIndex, IfName};
use crate::netlink::{AddressView, FABRIC_PROTOCOL, LinkView, NetlinkError, RouteView, Socket, VxlanSpec};

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
    /// The MTU of each link that leads out of the host, in bytes: of loopback and dummy links none, on which addresses of
    /// routers are often.
    pub mtus: BTreeMap<IfIndex, u32>,
    /// Routes of the main table that are not the fabric's and lead somewhere: the destination, its metric, and the link.
    pub exits: Vec<(IpNet, u32, IfIndex)>,
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
            facts
                .exits
                .extend(route.link.filter(|link| !own(*link)).map(|link| (route.destination, route.metric, link)));
            facts.routers.extend(route.gateway.zip(route.link).filter(|(_, link)| !own(*link)));
        }
        let stays =
            |link: &LinkView| link.flags & libc::IFF_LOOPBACK as u32 != 0 || link.kind.as_deref() == Some("dummy");
        facts.mtus = links.iter().filter(|link| !stays(link)).map(|link| (link.index, link.mtu)).collect();
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

    /// Whether another route to the address goes before one of the fabric to `prefix`.
    pub(super) fn has_better(&self, address: IpAddr, prefix: &IpNet) -> bool {
        let before = |(to, metric, _): &&(IpNet, u32, Option<IfIndex>)| {
            let (length, of_fabric) = (to.prefix_len(), prefix.prefix_len());
            to.contains(&address) && (length > of_fabric || length == of_fabric && *metric < METRIC)
        };
        self.paths.iter().any(|path| before(&path))
    }

    /// The largest packet that VXLAN carries on the way to a VTEP, in bytes, as far as this host knows.
    pub(super) fn carried_to(&self, vtep: IpAddr) -> Option<u32> {
        let leads = self.exits.iter().filter(|(to, ..)| to.contains(&vtep));
        let (.., link) = leads.max_by_key(|(to, metric, _)| (to.prefix_len(), u32::MAX - metric))?;
        Some(carried(*self.mtus.get(link)?, vtep))
    }

    /// The same on the links of the own VTEP: the one that has its address, or where that is on none that leads out, the one
    /// of the default route.
    pub(super) fn carried_from(&self, own: IpAddr) -> Option<u32> {
        let link = self.addresses.get(&own).and_then(|link| self.mtus.get(link));
        let nowhere = if own.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
        link.map(|mtu| carried(*mtu, own)).or_else(|| self.carried_to(nowhere))
    }

    /// The addresses of the links that default routes lead through, IPv4 first. Of several one that was announced before,
    /// else the first that the kernel lists; of IPv6 none that will not last.
    pub(super) fn addresses_of_default_routes(
        addresses: &[AddressView],
        routes: &[RouteView],
        announced: &[IpAddr],
    ) -> Vec<IpAddr> {
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
            let here = || addresses.iter().filter(here).filter(|a| lasts(a)).map(|a| a.address.addr());
            let first = || here().find(|address| announced.contains(address)).or_else(|| here().next());
            best.source.or_else(first)
        };
        [true, false].into_iter().filter_map(of_family).collect()
    }
}

/// What VXLAN leaves of an MTU, in bytes.
fn carried(mtu: u32, vtep: IpAddr) -> u32 {
    // Whatever the underlay is, a device takes no less (`ETH_MIN_MTU`).
    mtu.saturating_sub(VxlanSpec::overhead(vtep)).max(68)
}

/// Whether an address is usable and stays: temporary ones are exchanged daily (RFC 8981, section 3.4).
fn lasts(address: &AddressView) -> bool {
    // `IFA_F_TEMPORARY` means another thing of IPv4 (`IFA_F_SECONDARY`).
    let temporary = if address.address.addr().is_ipv6() { libc::IFA_F_TEMPORARY } else { 0 };
    address.flags & (temporary | libc::IFA_F_TENTATIVE | libc::IFA_F_DADFAILED | libc::IFA_F_DEPRECATED) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_does_not_last_is_not_announced() {
        let index = IfIndex::new(2).unwrap();
        let at = |text: &str, flags| AddressView { index, address: text.parse().unwrap(), flags, scope: 0 };
        let route = |to: &str| RouteView {
            destination: to.parse().unwrap(),
            gateway: None,
            link: Some(index),
            table: libc::RT_TABLE_MAIN.into(),
            protocol: libc::RTPROT_STATIC,
            scope: 0,
            kind: libc::RTN_UNICAST,
            metric: 0,
            source: None,
            on_link: false,
            metrics: Default::default(),
            unread: None,
        };
        let routes = [route("0.0.0.0/0"), route("::/0")];
        let passing = [libc::IFA_F_TEMPORARY, libc::IFA_F_TENTATIVE, libc::IFA_F_DADFAILED, libc::IFA_F_DEPRECATED];
        for flags in passing {
            let addresses =
                [at("192.0.2.1/24", 0), at("2001:db8::a/64", flags), at("2001:db8::1/64", 0), at("2001:db8::2/64", 0)];
            let told = |announced: Option<&str>| {
                let announced: Vec<IpAddr> = announced.iter().map(|a| a.parse().unwrap()).collect();
                HostFacts::addresses_of_default_routes(&addresses, &routes, &announced)
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
            };
            assert_eq!(told(None), ["192.0.2.1", "2001:db8::1"], "{flags:#x}");
            assert_eq!(told(Some("2001:db8::2")), ["192.0.2.1", "2001:db8::2"], "{flags:#x}");
            assert_eq!(told(Some("2001:db8::a")), ["192.0.2.1", "2001:db8::1"], "{flags:#x}");
        }
        // The bit of temporary ones says of IPv4 that an address is not the first of its subnet.
        let second = [at("192.0.2.1/24", libc::IFA_F_SECONDARY)];
        assert_eq!(HostFacts::addresses_of_default_routes(&second, &routes, &[]).len(), 1);
    }
}
