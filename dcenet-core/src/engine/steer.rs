//! The routes of a pod that has several interfaces: which of them has the default routes, and that answers leave by the
//! interface by which the questions came.
//!
//! Each interface gets a table of its own with what the main table has of it, and a rule for each of its addresses: what is
//! sent from that address goes by that table, whoever has the default routes. Without, an answer to somebody who is not
//! on the interface's own subnet leaves by the default interface, whose network knows nothing of the address.
//!
//! The own table is a copy, and derives nothing from addresses: a plugin may have the subnet behind its router although
//! an address's prefix says that it is on the link, as `ptp` of the reference plugins has.
//!
//! A table's number comes from the interface's name alone, not from what else the pod has: it is the same each time.
//!
//! What cannot be copied, routes that refuse (`unreachable` and its kind) and those over several next hops, is refused: an own
//! table's default route would be asked before it.
//!
//! Two kinds of default routes are left to the plugins: one that the kernel learns from router advertisements comes back
//! with the next of them (have the plugin set `accept_ra_defrtr` to 0), and one over several next hops stays in the main
//! table, where ours is refused.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Engine;
use super::apply::{gone_is_fine, look_up, new_route};
use super::error::{DetachErrors, StepError, TeardownError};
use crate::link::is_link_local;
use crate::model::IfName;
use crate::netlink::{self, RouteView, RuleSpec};
use crate::netns::NetNs;
use crate::plan::RouteSpec;

/// An interface of a pod, as it is before anything is decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInterface {
    /// Its name.
    pub name: IfName,
    /// Its addresses with their prefix lengths.
    pub addresses: Vec<IpNet>,
    /// Its routes in the main table: the default ones, and those that follow from its addresses where they are there.
    pub routes: Vec<RouteSpec>,
    /// The routers of its subnets, as far as they are known. What is sent from its addresses goes over them where it has no
    /// default route.
    pub gateways: Vec<IpAddr>,
    /// Whether it shall have the default routes, and over which gateways; over its own where the list is empty.
    pub default_route: Option<Vec<IpAddr>>,
}

/// What is added to a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Steering {
    /// Routes, those of the main table last.
    pub routes: Vec<(IfName, RouteSpec)>,
    /// Rules.
    pub rules: Vec<RuleSpec>,
}

impl Steering {
    /// Decides for the interfaces of a pod, of which the first is the default one. Pure.
    ///
    /// The default routes of a family are of the interface that asks for them, else of the first that has any.
    ///
    /// # Errors
    /// Where an interface asks for default routes over a gateway that it does not reach: the pod would lose those that work.
    pub fn plan(interfaces: &[PodInterface]) -> Result<Self, UnreachableGateway> {
        for interface in interfaces {
            let wished = interface.default_route.iter().flatten();
            if let Some(gateway) = wished.copied().find(|gateway| interface.over(*gateway).is_none()) {
                return Err(UnreachableGateway { interface: interface.name.clone(), gateway });
            }
        }
        let mut steering = Self::default();
        let tables = tables_of(interfaces.iter().map(|interface| &interface.name));
        for (interface, table) in interfaces.iter().zip(tables) {
            for route in interface.table() {
                steering.routes.push((interface.name.clone(), RouteSpec { table: Some(table), ..route }));
            }
            let sources = interface.addresses.iter().filter(|a| !is_link_local(a));
            steering.rules.extend(sources.map(|a| RuleSpec { from: a.addr().into(), table, priority: PRIORITY }));
        }
        for ipv4 in [true, false] {
            if let Some((interface, routes)) = winner(interfaces, ipv4) {
                steering.routes.extend(routes.into_iter().map(|route| (interface.name.clone(), route)));
            }
        }
        Ok(steering)
    }

    /// The interface that has the default routes of a family.
    pub fn default_of(&self, ipv4: bool) -> Option<(&IfName, &RouteSpec)> {
        let of_family = |r: &RouteSpec| r.table.is_none() && r.destination == any(ipv4);
        self.routes.iter().find(|(_, route)| of_family(route)).map(|(name, route)| (name, route))
    }
}

/// Who has the default routes of a family, and which.
fn winner(interfaces: &[PodInterface], ipv4: bool) -> Option<(&PodInterface, Vec<RouteSpec>)> {
    // Who names gateways of one family asks for nothing of the other.
    let asks = |i: &&PodInterface| {
        let gateways = i.default_route.as_ref();
        gateways.is_some_and(|g| g.is_empty() || g.iter().any(|gateway| gateway.is_ipv4() == ipv4))
    };
    let wishes = interfaces.iter().filter(asks).chain(interfaces);
    wishes.map(|i| (i, i.defaults(ipv4))).find(|(_, routes)| !routes.is_empty())
}

impl PodInterface {
    /// One that has nothing.
    pub fn none(name: &IfName) -> Self {
        let (addresses, routes, gateways) = (Vec::new(), Vec::new(), Vec::new());
        Self { name: name.clone(), addresses, routes, gateways, default_route: None }
    }

    /// Its default routes of a family, as they shall be.
    fn defaults(&self, ipv4: bool) -> Vec<RouteSpec> {
        let wished = self.default_route.iter().flatten().find(|gateway| gateway.is_ipv4() == ipv4);
        match wished {
            Some(gateway) => self.over(*gateway).into_iter().collect(),
            None => self.own_defaults(ipv4).cloned().collect(),
        }
    }

    /// Its default routes of a family, as its network made them.
    fn own_defaults(&self, ipv4: bool) -> impl Iterator<Item = &RouteSpec> {
        self.routes.iter().filter(move |r| r.destination == any(ipv4))
    }

    /// The default route over a gateway; `None` where the interface does not reach it. It does where it has an address of the
    /// family, and a route straight to the gateway, or one over it.
    fn over(&self, gateway: IpAddr) -> Option<RouteSpec> {
        let destination = any(gateway.is_ipv4());
        if !self.addresses.iter().any(|a| a.addr().is_ipv4() == gateway.is_ipv4() && !is_link_local(a)) {
            return None;
        }
        let used = self.routes.iter().find(|r| r.gateway == Some(gateway));
        let direct = self.routes.iter().any(|r| r.gateway.is_none() && is_part(r) && r.destination.contains(&gateway));
        if used.is_none() && !direct && !is_link_local(&gateway.into()) {
            return None;
        }
        // What its network says of the path (MTU, source, metric) is so whoever asks for the gateway.
        if let Some(own) = self.own_defaults(gateway.is_ipv4()).find(|r| r.gateway == Some(gateway)) {
            return Some(own.clone());
        }
        let on_link = used.is_some_and(|r| r.on_link);
        Some(RouteSpec { gateway: Some(gateway), on_link, ..RouteSpec::direct(destination) })
    }

    /// What its own table holds: what is on the link first, for gateways are.
    fn table(&self) -> Vec<RouteSpec> {
        let mut routes: Vec<RouteSpec> = Vec::new();
        let mut take = |route: RouteSpec| {
            if !routes.iter().any(|r| r.destination == route.destination && r.metric == route.metric) {
                routes.push(route);
            }
        };
        let parts = |near: bool| self.routes.iter().filter(move |r| is_part(r) && r.gateway.is_none() == near).cloned();
        parts(true).for_each(&mut take);
        if self.addresses.iter().any(|a| a.addr().is_ipv6()) {
            // The kernel may enter its own later, with the address.
            take(RouteSpec::direct(IpNet::V6(LINK_LOCAL)));
        }
        parts(false).for_each(&mut take);
        for ipv4 in [true, false] {
            let wished = self.defaults(ipv4);
            let behind = |route: &RouteSpec| RouteSpec {
                metric: Some(route.metric.unwrap_or_default().saturating_add(BEHIND)),
                ..route.clone()
            };
            // What its network made is looked for by CHECK, whoever has the default.
            let own =
                self.own_defaults(ipv4).filter(|own| !wished.iter().any(|w| w.gateway == own.gateway)).map(behind);
            let own: Vec<_> = own.collect();
            wished.into_iter().chain(own).for_each(&mut take);
        }
        for gateway in &self.gateways {
            if !routes.iter().any(|r| r.destination == any(gateway.is_ipv4())) {
                routes.extend(self.over(*gateway));
            }
        }
        routes
    }
}

/// Whether a route is to a part of a family, and no default one.
fn is_part(route: &RouteSpec) -> bool {
    route.destination.prefix_len() > 0
}

/// A gateway that an interface cannot send to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "gateway {gateway} is not reached by interface {interface}: it has no address of the family, or no route to it; give a \
     router on a subnet of the interface, or true for its own default route"
)]
pub struct UnreachableGateway {
    /// The interface.
    pub interface: IfName,
    /// The gateway.
    pub gateway: IpAddr,
}

/// Why the routes of a pod could not be changed.
pub type SteerError = StepError;

impl Engine {
    /// Reads an interface of a pod, and takes its default routes out of the main table: where several interfaces have one,
    /// the kernel refuses the second, or shares traffic between them.
    ///
    /// `None` where there is no such interface.
    ///
    /// # Errors
    /// Where the kernel refuses, and [`StepError::Route`] for a route whose copy would lead elsewhere.
    pub fn take_defaults(&self, pod: &NetNs, name: &IfName) -> Result<Option<PodInterface>, SteerError> {
        let mut socket = self.pod_socket(pod)?;
        let Some(link) = look_up(&mut socket, name)?.map(|link| Some(link.index)) else { return Ok(None) };
        let addresses = socket.addresses()?.into_iter().filter(|a| Some(a.index) == link).map(|a| a.address);
        let addresses: Vec<_> = addresses.filter(|a| !is_link_local(a)).collect();
        let mut routes = Vec::new();
        let of_link = |r: &RouteView| {
            let main = r.table == u32::from(libc::RT_TABLE_MAIN) && r.kind == libc::RTN_UNICAST;
            main && r.link.is_some() && r.link == link && !is_link_local(&r.destination)
        };
        let found: Vec<_> = socket.routes()?.into_iter().filter(of_link).collect();
        if let Some((route, what)) = found.iter().find_map(|route| Some((route, route.unread?))) {
            return Err(StepError::Route { destination: route.destination, what });
        }
        for route in &found {
            routes.push(RouteSpec {
                destination: route.destination,
                gateway: route.gateway,
                on_link: route.on_link,
                metric: Some(route.metric).filter(|metric| *metric > 0),
                table: None,
                // The kernel's own say which address a sender gets who chose none, and their table is asked by who has one.
                source: route.source.filter(|_| route.protocol != libc::RTPROT_KERNEL),
                metrics: route.metrics,
            });
            if route.destination.prefix_len() == 0 {
                let deleted = socket.request(&netlink::delete_listed_route(route)).map(drop);
                match deleted {
                    // It went by itself, with an address that somebody took away.
                    Err(error) if error.errno() == Some(libc::ESRCH) => {}
                    other => other?,
                }
            }
        }
        Ok(Some(PodInterface { addresses, routes, ..PodInterface::none(name) }))
    }

    /// Adds the routes and the rules. What was added before an error is taken back by [`unsteer`](Self::unsteer), routes with
    /// their interfaces.
    ///
    /// # Errors
    /// Where the kernel refuses, where an interface is gone, and [`StepError::Route`] for a route of the pod of which the own
    /// tables have no copy, so that their default routes would go before it.
    pub fn steer(&self, pod: &NetNs, steering: &Steering) -> Result<(), SteerError> {
        let mut socket = self.pod_socket(pod)?;
        for route in socket.routes()? {
            let passed_by =
                steering.rules.iter().any(|rule| rule.from.addr().is_ipv4() == route.destination.addr().is_ipv4());
            if let Some(what) = not_copied(&route).filter(|_| passed_by) {
                return Err(StepError::Route { destination: route.destination, what });
            }
        }
        let mut messages = Vec::new();
        for (name, route) in &steering.routes {
            let Some(link) = look_up(&mut socket, name)? else {
                let source = std::io::Error::from(std::io::ErrorKind::NotFound);
                return Err(StepError::Local { what: format!("interface {name} of the pod"), source });
            };
            messages.push(netlink::add_route(name.as_str(), &new_route(link.index, route)));
        }
        messages.extend(steering.rules.iter().map(netlink::add_rule));
        for outcome in socket.batch(&messages) {
            outcome?;
        }
        Ok(())
    }

    /// Removes the rules; the routes go with their interfaces.
    ///
    /// # Errors
    /// All that went wrong.
    pub fn unsteer(&self, pod: &NetNs, steering: &Steering) -> Result<(), DetachErrors> {
        if steering.rules.is_empty() {
            return Ok(());
        }
        let mut socket = self.pod_socket(pod).map_err(|error| DetachErrors(vec![error.into()]))?;
        let messages: Vec<_> = steering.rules.iter().map(netlink::delete_rule).collect();
        let outcomes = socket.batch(&messages).into_iter().map(|outcome| outcome.map(drop));
        let gone = |outcome| gone_is_fine(outcome, &[libc::ENOENT, libc::ESRCH]);
        let errors: Vec<TeardownError> = outcomes.filter_map(|outcome| gone(outcome).err()).collect();
        DetachErrors::or_ok(errors)
    }

    /// Removes the rules that lead to the tables of these interfaces, where what was added is not known.
    ///
    /// # Errors
    /// All that went wrong.
    pub fn unsteer_tables(&self, pod: &NetNs, interfaces: &[IfName]) -> Result<(), DetachErrors> {
        let tables = tables_of(interfaces);
        let mut rules = Vec::new();
        let listed: Result<_, TeardownError> = (|| Ok(self.pod_socket(pod)?.rules()?))();
        for rule in listed.map_err(|error| DetachErrors(vec![error]))? {
            if let Some(from) = rule.from
                && rule.priority == PRIORITY
                && tables.contains(&rule.table)
            {
                rules.push(RuleSpec { from, table: rule.table, priority: rule.priority });
            }
        }
        self.unsteer(pod, &Steering { routes: Vec::new(), rules })
    }

    /// What of it is missing, for people.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn check_steering(&self, pod: &NetNs, steering: &Steering) -> Result<Vec<String>, SteerError> {
        let mut socket = self.pod_socket(pod)?;
        let (links, routes, rules) = (socket.links()?, socket.routes()?, socket.rules()?);
        let mut missing = Vec::new();
        for (name, route) in &steering.routes {
            let index = links.iter().find(|l| l.name == name.as_str()).map(|l| l.index);
            let table = route.table.unwrap_or(libc::RT_TABLE_MAIN.into());
            let same = |r: &RouteView| {
                r.link == index && r.destination == route.destination && r.gateway == route.gateway && r.table == table
            };
            if !routes.iter().any(same) {
                missing.push(format!("pod: route {} on {name} in table {table} is missing", route.destination));
            }
        }
        for rule in &steering.rules {
            let same = |r: &netlink::RuleView| {
                r.table == rule.table && r.priority == rule.priority && r.from == Some(rule.from)
            };
            if !rules.iter().any(same) {
                missing.push(format!("pod: the rule from {} to table {} is missing", rule.from, rule.table));
            }
        }
        Ok(missing)
    }
}

/// What a route of the main table to a part of a family has that keeps it from being an interface's own.
fn not_copied(route: &RouteView) -> Option<&'static str> {
    let of_main = route.table == u32::from(libc::RT_TABLE_MAIN) && route.protocol != libc::RTPROT_KERNEL;
    if !of_main || route.destination.prefix_len() == 0 || is_link_local(&route.destination) {
        return None;
    }
    match route.kind {
        libc::RTN_BLACKHOLE | libc::RTN_UNREACHABLE | libc::RTN_PROHIBIT | libc::RTN_THROW => {
            Some("no next hop (blackhole, unreachable, prohibit, throw)")
        }
        libc::RTN_UNICAST => route.unread,
        _ => None,
    }
}

/// Every destination of a family.
fn any(ipv4: bool) -> IpNet {
    if ipv4 { IpNet::V4(Ipv4Net::default()) } else { IpNet::V6(Ipv6Net::default()) }
}

/// The tables of a pod's interfaces, of which the first is the default one.
fn tables_of<'i>(interfaces: impl IntoIterator<Item = &'i IfName>) -> Vec<u32> {
    let mut tables: Vec<u32> = Vec::new();
    for name in interfaces {
        let mut table = table_of(name);
        while tables.contains(&table) {
            table += 1;
        }
        tables.push(table);
    }
    tables
}

/// An interface's table, of 2^16 that nobody else uses.
fn table_of(name: &IfName) -> u32 {
    let digest = Sha256::digest(name.as_str());
    FIRST_TABLE + u32::from(u16::from_be_bytes([digest[0], digest[1]]))
}

const FIRST_TABLE: u32 = 0x0dce_0000;
/// `fe80::/64` (RFC 4291, section 2.5.6).
const LINK_LOCAL: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 64);
/// More than the metric that the kernel gives where none is said (0, and 1024: `IP6_RT_PRIO_USER`).
const BEHIND: u32 = 2048;
/// After the local table's 0, before the main one's 32766 (`fib_default_rules_init` in `net/ipv4/fib_rules.c`).
const PRIORITY: u32 = 2200;

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn interface(name: &str, addresses: &[&str], routes: &[(&str, Option<&str>)]) -> PodInterface {
        let route = |(destination, gateway): &(&str, Option<&str>)| RouteSpec {
            gateway: gateway.map(|g| g.parse().unwrap()),
            ..RouteSpec::direct(net(destination))
        };
        PodInterface {
            name: name.parse().unwrap(),
            addresses: addresses.iter().map(|a| net(a)).collect(),
            routes: routes.iter().map(route).collect(),
            gateways: Vec::new(),
            default_route: None,
        }
    }

    fn text(steering: &Steering) -> Vec<String> {
        let route = |(name, r): &(IfName, RouteSpec)| {
            let via = r.gateway.map(|g| format!(" via {g}")).unwrap_or_default();
            let on_link = if r.on_link { " onlink" } else { "" };
            let metric = r.metric.map(|m| format!(" metric {m}")).unwrap_or_default();
            let own = if r.table.is_some() { " own" } else { "" };
            format!("{}{via} dev {name}{on_link}{metric}{own}", r.destination)
        };
        steering.routes.iter().map(route).collect()
    }

    #[test]
    fn the_first_interface_keeps_the_default_and_each_has_a_table_with_its_own() {
        let eth0 = interface("eth0", &["10.1.0.2/24"], &[("0.0.0.0/0", Some("10.1.0.1")), ("10.1.0.0/24", None)]);
        let routes = [("10.2.0.0/24", None), ("0.0.0.0/0", Some("10.2.0.1")), ("10.9.0.0/16", Some("10.2.0.9"))];
        let net1 = interface("net1", &["10.2.0.2/24"], &routes);
        let steering = Steering::plan(&[eth0, net1]).unwrap();
        let expected = [
            "10.1.0.0/24 dev eth0 own",
            "0.0.0.0/0 via 10.1.0.1 dev eth0 own",
            "10.2.0.0/24 dev net1 own",
            "10.9.0.0/16 via 10.2.0.9 dev net1 own",
            "0.0.0.0/0 via 10.2.0.1 dev net1 own",
            "0.0.0.0/0 via 10.1.0.1 dev eth0",
        ];
        assert_eq!(text(&steering), expected);
        let [a, b] = steering.rules[..] else { panic!("{:?}", steering.rules) };
        assert_eq!((a.from, b.from), (net("10.1.0.2/32"), net("10.2.0.2/32")));
        assert_ne!(a.table, b.table);
        // Not by what else there is.
        let alone = Steering::plan(&[interface("eth0", &["10.7.0.2/24"], &[])]).unwrap();
        assert_eq!(a.table, alone.rules[0].table);
    }

    /// As `ptp` makes them: the subnet is behind the router.
    #[test]
    fn a_subnet_is_on_the_link_only_where_the_main_table_has_it_so() {
        let routes = [
            ("10.1.0.0/24", Some("10.1.0.1")),
            ("10.1.0.1/32", None),
            ("0.0.0.0/0", Some("10.1.0.1")),
            ("2001:db8::/64", Some("2001:db8::1")),
            ("2001:db8::1/128", None),
        ];
        let eth0 = interface("eth0", &["10.1.0.2/24", "2001:db8::2/64"], &routes);
        let expected = [
            "10.1.0.1/32 dev eth0 own",
            "2001:db8::1/128 dev eth0 own",
            "fe80::/64 dev eth0 own",
            "10.1.0.0/24 via 10.1.0.1 dev eth0 own",
            "2001:db8::/64 via 2001:db8::1 dev eth0 own",
            "0.0.0.0/0 via 10.1.0.1 dev eth0 own",
            "0.0.0.0/0 via 10.1.0.1 dev eth0",
        ];
        assert_eq!(text(&Steering::plan(&[eth0]).unwrap()), expected);
    }

    #[test]
    fn an_override_is_of_its_family_alone() {
        let both = [("0.0.0.0/0", Some("10.1.0.1")), ("::/0", Some("2001:db8:1::1"))];
        let eth0 = interface("eth0", &["10.1.0.2/24", "2001:db8:1::2/64"], &both);
        let routes = [("10.2.0.0/24", None), ("0.0.0.0/0", Some("10.2.0.1")), ("::/0", Some("2001:db8:2::1"))];
        let mut net1 = interface("net1", &["10.2.0.2/24"], &routes);
        net1.default_route = Some(vec!["10.2.0.254".parse().unwrap()]);
        let steering = Steering::plan(&[eth0.clone(), net1.clone()]).unwrap();
        let (name, route) = steering.default_of(true).unwrap();
        assert_eq!((name.as_str(), route.gateway), ("net1", "10.2.0.254".parse().ok()));
        assert_eq!(steering.default_of(false).unwrap().0.as_str(), "eth0");
        // Its own stays behind the override, where CHECK looks for it.
        let own = |name: &str| {
            text(&steering).into_iter().filter(|l| l.starts_with("0.") && l.contains(name)).collect::<Vec<_>>()
        };
        let expected = [
            "0.0.0.0/0 via 10.2.0.254 dev net1 own",
            "0.0.0.0/0 via 10.2.0.1 dev net1 metric 2048 own",
            "0.0.0.0/0 via 10.2.0.254 dev net1",
        ];
        assert_eq!(own("net1"), expected);
        net1.routes.truncate(1);
        // One that has none to give loses nothing of the others.
        net1.default_route = Some(Vec::new());
        let steering = Steering::plan(&[eth0.clone(), net1.clone()]).unwrap();
        assert_eq!(steering.default_of(true).unwrap().0.as_str(), "eth0");
        net1.gateways = vec!["10.2.0.1".parse().unwrap()];
        let steering = Steering::plan(&[eth0, net1]).unwrap();
        assert!(text(&steering).contains(&"0.0.0.0/0 via 10.2.0.1 dev net1 own".to_owned()));
    }

    #[test]
    fn an_override_by_the_networks_own_gateway_keeps_what_the_route_says() {
        let mut eth0 =
            interface("eth0", &["10.63.0.5/24"], &[("0.0.0.0/0", Some("10.63.0.1")), ("10.63.0.0/24", None)]);
        eth0.routes[0].metrics.mtu = Some(1400);
        eth0.routes[0].source = "10.63.0.6".parse().ok();
        let own = eth0.routes[0].clone();
        eth0.default_route = Some(vec!["10.63.0.1".parse().unwrap()]);
        let steering = Steering::plan(&[eth0]).unwrap();
        let defaults: Vec<_> = steering.routes.into_iter().map(|(_, r)| r).filter(|r| !is_part(r)).collect();
        assert_eq!(defaults, [RouteSpec { table: defaults[0].table, ..own.clone() }, own]);
    }

    #[test]
    fn a_gateway_that_the_interface_does_not_reach_is_refused() {
        let mut routed = interface("r", &["10.3.0.2/32", "2001:db8:3::2/128"], &[("10.3.0.0/24", Some("169.254.1.1"))]);
        routed.routes[0].on_link = true;
        let plain = interface("net1", &["10.2.0.2/24"], &[("10.2.0.0/24", None), ("0.0.0.0/0", Some("10.2.0.1"))]);
        let both =
            interface("b", &["10.2.0.2/24", "2001:db8::2/64"], &[("10.2.0.0/24", None), ("2001:db8::/64", None)]);
        for (interface, gateway, becomes) in [
            (&plain, "10.2.0.254", Some("0.0.0.0/0 via 10.2.0.254 dev net1")),
            (&plain, "10.20.0.1", None),
            (&plain, "2001:db8:9::1", None),
            (&plain, "fe80::1", None),
            (&both, "2001:db8::1", Some("::/0 via 2001:db8::1 dev b")),
            (&both, "2001:db8:9::1", None),
            (&both, "fe80::1", Some("::/0 via fe80::1 dev b")),
            (&routed, "10.3.0.1", None),
            (&routed, "169.254.1.1", Some("0.0.0.0/0 via 169.254.1.1 dev r onlink")),
        ] {
            let gateway: IpAddr = gateway.parse().unwrap();
            let asking = PodInterface { default_route: Some(vec![gateway]), ..interface.clone() };
            let planned = Steering::plan(&[asking]);
            let refused = UnreachableGateway { interface: interface.name.clone(), gateway };
            match becomes {
                Some(route) => assert_eq!(text(&planned.unwrap()).last().unwrap(), route),
                None => assert_eq!(planned.unwrap_err(), refused),
            }
        }
    }
}
