//! Routes and rules: `struct rtmsg` and `struct fib_rule_hdr` (`include/uapi/linux/rtnetlink.h`, `fib_rules.h`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::message::{Attributes, Message, field, number, text};
use super::{FABRIC_PROTOCOL, PROTOCOL, family_of, ip, octets};
use crate::model::IfIndex;

/// A route as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteView {
    /// Destination prefix.
    pub destination: IpNet,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// The link it leads to, where it has one next hop.
    pub link: Option<IfIndex>,
    /// The table, 254 being the main one.
    pub table: u32,
    /// Who made it.
    pub protocol: u8,
    /// Its scope: 0 global, 253 link, 254 host.
    pub scope: u8,
    /// `RTN_*` type: 1 unicast, 2 local, 3 broadcast.
    pub kind: u8,
    /// Its metric; the lowest wins.
    pub metric: u32,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// The next hop is taken to be on the link although no prefix says so.
    pub on_link: bool,
    /// What it says of the path.
    pub metrics: RouteMetrics,
    /// What else it says of its next hop that is not read here; without it the route would lead elsewhere.
    pub unread: Option<&'static str>,
}

/// What a route says of the path to its destination (`RTA_METRICS`), as far as plugins set it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteMetrics {
    /// The path's MTU, in bytes (`RTAX_MTU`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The largest TCP segment that is announced, in bytes (`RTAX_ADVMSS`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
}

impl RouteMetrics {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn parse(nested: &[u8]) -> Self {
        let attributes = Attributes::new(nested);
        let value = |attribute| attributes.find(attribute).and_then(number);
        Self { mtu: value(RTAX_MTU), advmss: value(RTAX_ADVMSS) }
    }
}

impl RouteView {
    /// Reads a `RTM_NEWROUTE` payload.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let [family, prefix, _, _] = field(payload, 0)?;
        let [table, protocol, scope, kind] = field(payload, 4)?;
        let flags = u32::from_ne_bytes(field(payload, 8)?);
        let attributes = Attributes::new(payload.get(HEADER..)?);
        let address = |attribute| attributes.find(attribute).and_then(ip);
        let any: IpAddr = match i32::from(family) {
            libc::AF_INET => Ipv4Addr::UNSPECIFIED.into(),
            libc::AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        Some(Self {
            destination: IpNet::new(address(libc::RTA_DST).unwrap_or(any), prefix).ok()?,
            gateway: address(libc::RTA_GATEWAY),
            link: attributes.find(libc::RTA_OIF).and_then(number).and_then(IfIndex::new),
            table: attributes.find(libc::RTA_TABLE).and_then(number).unwrap_or(table.into()),
            protocol,
            scope,
            kind,
            metric: attributes.find(libc::RTA_PRIORITY).and_then(number).unwrap_or_default(),
            source: address(libc::RTA_PREFSRC),
            on_link: flags & RTNH_F_ONLINK != 0,
            metrics: attributes.find(libc::RTA_METRICS).map(RouteMetrics::parse).unwrap_or_default(),
            unread: UNREAD.iter().find(|(attribute, _)| attributes.find(*attribute).is_some()).map(|(_, what)| *what),
        })
    }
}

/// A route to add.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewRoute {
    pub(crate) index: IfIndex,
    pub(crate) destination: IpNet,
    pub(crate) gateway: Option<IpAddr>,
    /// Take the gateway to be on this link although no prefix says so (`RTNH_F_ONLINK`).
    pub(crate) on_link: bool,
    pub(crate) metric: Option<u32>,
    pub(crate) table: u32,
    pub(crate) source: Option<IpAddr>,
    pub(crate) metrics: RouteMetrics,
}

/// Adds a route marked as ours. Fails with EEXIST where there is one to the same destination with the same metric.
pub(crate) fn add_route(link: &str, route: &NewRoute) -> Message {
    let what = format!("add route {}{} on {link}", route.destination, Via(route.gateway));
    message(libc::RTM_NEWROUTE, (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16, what, route)
}

/// Deletes a route of ours.
pub(crate) fn delete_route(link: &str, route: &NewRoute) -> Message {
    message(libc::RTM_DELROUTE, 0, format!("delete route {} on {link}", route.destination), route)
}

/// Deletes a route that was listed, whoever made it.
pub(crate) fn delete_listed_route(route: &RouteView) -> Message {
    let mut header = [0; HEADER];
    header[0] = family_of(route.destination.addr());
    header[1] = route.destination.prefix_len();
    header[4] = u8::try_from(route.table).unwrap_or(libc::RT_TABLE_UNSPEC);
    header[5] = route.protocol;
    header[6] = route.scope;
    header[7] = route.kind;
    let mut message = Message::new(libc::RTM_DELROUTE, 0, format!("delete route {}", route.destination), &header);
    if route.destination.prefix_len() > 0 {
        message.bytes(libc::RTA_DST, &octets(route.destination.network()));
    }
    if let Some(gateway) = route.gateway {
        message.bytes(libc::RTA_GATEWAY, &octets(gateway));
    }
    if let Some(link) = route.link {
        message.u32(libc::RTA_OIF, link.get());
    }
    message.u32(libc::RTA_PRIORITY, route.metric).u32(libc::RTA_TABLE, route.table);
    message
}

fn message(kind: u16, flags: u16, operation: String, route: &NewRoute) -> Message {
    let mut header = [0; HEADER];
    header[0] = family_of(route.destination.addr());
    header[1] = route.destination.prefix_len();
    let small = u8::try_from(route.table);
    header[4] = small.unwrap_or(libc::RT_TABLE_UNSPEC);
    header[5] = PROTOCOL;
    // The kernel wants a narrower scope for what is reached without a router (fib_check_nh).
    header[6] = match route.gateway {
        None if header[0] == libc::AF_INET as u8 => libc::RT_SCOPE_LINK,
        _ => libc::RT_SCOPE_UNIVERSE,
    };
    header[7] = libc::RTN_UNICAST;
    if route.on_link {
        header[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    }
    let mut message = Message::new(kind, flags, operation, &header);
    if route.destination.prefix_len() > 0 {
        message.bytes(libc::RTA_DST, &octets(route.destination.network()));
    }
    if let Some(gateway) = route.gateway {
        message.bytes(libc::RTA_GATEWAY, &octets(gateway));
    }
    message.u32(libc::RTA_OIF, route.index.get());
    if let Some(metric) = route.metric {
        message.u32(libc::RTA_PRIORITY, metric);
    }
    if small.is_err() {
        message.u32(libc::RTA_TABLE, route.table);
    }
    if let Some(source) = route.source {
        message.bytes(libc::RTA_PREFSRC, &octets(source));
    }
    let RouteMetrics { mtu, advmss } = route.metrics;
    let metrics = [(RTAX_MTU, mtu), (RTAX_ADVMSS, advmss)];
    if !route.metrics.is_empty() {
        message.nest(libc::RTA_METRICS, |nested| {
            for (attribute, value) in metrics {
                if let Some(value) = value {
                    nested.u32(attribute, value);
                }
            }
        });
    }
    message
}

/// A route between nodes, in the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FabricRoute {
    pub(crate) destination: IpNet,
    pub(crate) metric: u32,
    /// `None` answers that nobody is there (`RTN_UNREACHABLE`).
    pub(crate) hop: Option<NextHop>,
}

/// Where a [`FabricRoute`] leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NextHop {
    pub(crate) link: IfIndex,
    pub(crate) gateway: IpAddr,
    pub(crate) on_link: bool,
    /// The largest packet that fits all of the way, in bytes, where that is less than the link's (`RTAX_MTU`).
    pub(crate) mtu: Option<u32>,
}

/// Enters a route between nodes: in place of ours to the same destination with the same metric where `replaces`, else
/// only where there is none (EEXIST).
pub(crate) fn fabric_route(route: &FabricRoute, replaces: bool) -> Message {
    let FabricRoute { destination, metric, hop } = *route;
    let flags = if replaces { libc::NLM_F_REPLACE } else { libc::NLM_F_CREATE | libc::NLM_F_EXCL };
    let verb = if replaces { "replace" } else { "add" };
    let what = match hop {
        Some(NextHop { gateway, link, .. }) => format!("{verb} route {destination} via {gateway} on link {link}"),
        None => format!("{verb} unreachable route {destination}"),
    };
    let mut header = [0; HEADER];
    header[0] = family_of(destination.addr());
    header[1] = destination.prefix_len();
    header[4] = libc::RT_TABLE_MAIN;
    header[5] = FABRIC_PROTOCOL;
    header[6] = libc::RT_SCOPE_UNIVERSE;
    header[7] = if hop.is_some() { libc::RTN_UNICAST } else { libc::RTN_UNREACHABLE };
    if hop.is_some_and(|hop| hop.on_link) {
        header[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    }
    let mut message = Message::new(libc::RTM_NEWROUTE, flags as u16, what, &header);
    message.bytes(libc::RTA_DST, &octets(destination.network()));
    if let Some(NextHop { link, gateway, mtu, on_link: _ }) = hop {
        message.bytes(libc::RTA_GATEWAY, &octets(gateway)).u32(libc::RTA_OIF, link.get());
        if let Some(mtu) = mtu {
            message.nest(libc::RTA_METRICS, |metrics| {
                metrics.u32(RTAX_MTU, mtu);
            });
        }
    }
    message.u32(libc::RTA_PRIORITY, metric);
    message
}

/// Asks for all routes of both families, or those over one link.
pub(crate) fn route_dump(link: Option<IfIndex>) -> Message {
    let mut message = Message::new(libc::RTM_GETROUTE, 0, "list routes", &[0; HEADER]);
    if let Some(index) = link {
        message.u32(libc::RTA_OIF, index.get());
    }
    message
}

/// Asks by which route a packet of this namespace would go to the address.
pub(crate) fn route_to(address: IpAddr) -> Message {
    let mut header = [0; HEADER];
    header[0] = family_of(address);
    let bytes = octets(address);
    header[1] = bytes.len() as u8 * 8;
    let mut message = Message::new(libc::RTM_GETROUTE, 0, format!("look up route to {address}"), &header);
    message.bytes(libc::RTA_DST, &bytes);
    message
}

/// A policy routing rule as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleView {
    /// Its address family (`AF_INET` or `AF_INET6`).
    pub family: u8,
    /// Its place: the lowest is asked first.
    pub priority: u32,
    /// The table that it leads to.
    pub table: u32,
    /// Sources that it is for.
    pub from: Option<IpNet>,
    /// Destinations that it is for.
    pub to: Option<IpNet>,
    /// Incoming link that it is for.
    pub incoming: Option<String>,
    /// Packet mark that it is for.
    pub mark: u32,
    /// `FR_ACT_*`.
    pub action: u8,
    /// Who made it.
    pub protocol: u8,
}

impl RuleView {
    /// Reads a `RTM_NEWRULE` payload.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let [family, to_len, from_len, _] = field(payload, 0)?;
        let [table, _, _, action] = field(payload, 4)?;
        let attributes = Attributes::new(payload.get(HEADER..)?);
        let value = |attribute| attributes.find(attribute).and_then(number);
        let net = |attribute, len| attributes.find(attribute).and_then(ip).and_then(|a| IpNet::new(a, len).ok());
        Some(Self {
            family,
            priority: value(FRA_PRIORITY).unwrap_or_default(),
            table: value(FRA_TABLE).unwrap_or(table.into()),
            from: net(FRA_SRC, from_len),
            to: net(FRA_DST, to_len),
            incoming: attributes.find(FRA_IIFNAME).map(text),
            mark: value(FRA_FWMARK).unwrap_or_default(),
            action,
            protocol: attributes.find(FRA_PROTOCOL).and_then(|p| p.first().copied()).unwrap_or_default(),
        })
    }
}

/// Asks for all rules of both families.
pub(crate) fn rule_dump() -> Message {
    Message::new(libc::RTM_GETRULE, 0, "list rules", &[0; HEADER])
}

struct Via(Option<IpAddr>);

impl std::fmt::Display for Via {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |gateway| write!(f, " via {gateway}"))
    }
}

const HEADER: usize = 12;
const RTNH_F_ONLINK: u32 = 4;
/// `RTA_VIA`, `RTA_ENCAP` and `RTA_MULTIPATH` of `include/uapi/linux/rtnetlink.h`.
const UNREAD: [(u16, &str); 3] = [
    (18, "a router of the other family (via inet6, RFC 5549)"),
    (22, "an encapsulation (encap)"),
    (9, "several next hops (multipath)"),
];
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_PROTOCOL: u16 = 21;
