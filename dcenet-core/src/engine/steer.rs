//! The routes of a pod that has several interfaces: which of them has the default routes, and that answers leave by the
//! interface by which the questions came.
//!
//! Each interface gets a table of its own with its subnets and its routes, and a rule for each of its addresses: what is
//! sent from that address goes by that table, whoever has the default routes. Without, an answer to somebody who is not
//! on the interface's own subnet leaves by the default interface, whose network knows nothing of the address.
//!
//! A table's number comes from the interface's name alone, not from what else the pod has: it is the same each time.

use std::net::IpAddr;

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
    /// Its routes, the default ones included, but not those that follow from the addresses.
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
    pub fn plan(interfaces: &[PodInterface]) -> Self {
        let mut steering = Self::default();
        let mut tables: Vec<u32> = Vec::new();
        for interface in interfaces {
            let mut table = table_of(&interface.name);
            while tables.contains(&table) {
                table += 1;
            }
            tables.push(table);
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
        steering
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
    fn defaults(&self, ipv4: bool) -> Vec<RouteSpec> {
        let wished = self.default_route.iter().flatten().find(|gateway| gateway.is_ipv4() == ipv4);
        match wished {
            Some(gateway) => vec![self.over(*gateway)],
            None => self.routes.iter().filter(|r| r.destination == any(ipv4)).cloned().collect(),
        }
    }

    fn over(&self, gateway: IpAddr) -> RouteSpec {
        let on_link = !self.addresses.iter().any(|a| a.contains(&gateway));
        let destination = any(gateway.is_ipv4());
        RouteSpec { destination, gateway: Some(gateway), on_link, metric: None, table: None }
    }

    /// What its own table holds: subnets first, for gateways are on them.
    fn table(&self) -> Vec<RouteSpec> {
        let direct =
            |destination: IpNet| RouteSpec { destination, gateway: None, on_link: false, metric: None, table: None };
        let subnets = self.addresses.iter().filter(|a| a.prefix_len() < a.max_prefix_len() && !is_link_local(a));
        let mut routes: Vec<RouteSpec> = Vec::new();
        let mut take = |route: RouteSpec| {
            if !routes.iter().any(|r| r.destination == route.destination && r.metric == route.metric) {
                routes.push(route);
            }
        };
        subnets.map(|a| direct(a.trunc())).for_each(&mut take);
        let (near, far): (Vec<_>, Vec<_>) = self.routes.iter().partition(|r| r.gateway.is_none());
        let defaults: Vec<_> = [true, false].into_iter().flat_map(|ipv4| self.defaults(ipv4)).collect();
        let more = near.into_iter().chain(far).filter(|r| r.destination.prefix_len() > 0).cloned();
        more.chain(defaults).for_each(&mut take);
        for gateway in &self.gateways {
            if !routes.iter().any(|r| r.destination == any(gateway.is_ipv4())) {
                routes.push(self.over(*gateway));
            }
        }
        routes
    }
}

/// Why the routes of a pod could not be changed.
pub type SteerError = StepError;

impl Engine {
    /// Reads an interface of a pod, and takes its default routes out of the main table: where several interfaces have one,
    /// the kernel refuses the second, or shares traffic between them.
    ///
    /// # Errors
    /// Where the kernel refuses, and where there is no such interface.
    pub fn take_defaults(&self, pod: &NetNs, name: &IfName) -> Result<PodInterface, SteerError> {
        let mut socket = self.pod_socket(pod)?;
        let link = look_up(&mut socket, name)?.map(|link| link.index);
        let addresses = socket.addresses()?.into_iter().filter(|a| Some(a.index) == link).map(|a| a.address);
        let addresses: Vec<_> = addresses.filter(|a| !is_link_local(a)).collect();
        let mut routes = Vec::new();
        let of_link = |r: &RouteView| {
            let main = r.table == u32::from(libc::RT_TABLE_MAIN) && r.kind == libc::RTN_UNICAST;
            main && r.link.is_some()
                && r.link == link
                && r.protocol != libc::RTPROT_KERNEL
                && !is_link_local(&r.destination)
        };
        for route in socket.routes()?.iter().filter(|r| of_link(r)) {
            let on_link = |gateway: &IpAddr| {
                let known = addresses.iter().any(|a| a.contains(gateway)) || is_link_local(&(*gateway).into());
                !known
            };
            routes.push(RouteSpec {
                destination: route.destination,
                gateway: route.gateway,
                on_link: route.gateway.as_ref().is_some_and(on_link),
                metric: Some(route.metric).filter(|metric| *metric > 0),
                table: None,
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
        Ok(PodInterface { name: name.clone(), addresses, routes, gateways: Vec::new(), default_route: None })
    }

    /// Adds the routes and the rules. What was added before an error is taken back by [`unsteer`](Self::unsteer), routes with
    /// their interfaces.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn steer(&self, pod: &NetNs, steering: &Steering) -> Result<(), SteerError> {
        let mut socket = self.pod_socket(pod)?;
        let mut messages = Vec::new();
        for (name, route) in &steering.routes {
            // One that is gone meanwhile is told by the kernel's refusal.
            let Some(link) = look_up(&mut socket, name)? else { continue };
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

/// Every destination of a family.
fn any(ipv4: bool) -> IpNet {
    if ipv4 { IpNet::V4(Ipv4Net::default()) } else { IpNet::V6(Ipv6Net::default()) }
}

/// An interface's table, of 2^16 that nobody else uses.
fn table_of(name: &IfName) -> u32 {
    let digest = Sha256::digest(name.as_str());
    FIRST_TABLE + u32::from(u16::from_be_bytes([digest[0], digest[1]]))
}

const FIRST_TABLE: u32 = 0x0dce_0000;
/// After the local table's 0, before the main one's 32766 (`fib_default_rules_init` in `net/ipv4/fib_rules.c`).
const PRIORITY: u32 = 2200;

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, addresses: &[&str], routes: &[(&str, Option<&str>)]) -> PodInterface {
        let route = |(destination, gateway): &(&str, Option<&str>)| RouteSpec {
            destination: destination.parse().unwrap(),
            gateway: gateway.map(|g| g.parse().unwrap()),
            on_link: false,
            metric: None,
            table: None,
        };
        PodInterface {
            name: name.parse().unwrap(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            routes: routes.iter().map(route).collect(),
            gateways: Vec::new(),
            default_route: None,
        }
    }

    fn text(steering: &Steering) -> Vec<String> {
        let route = |(name, r): &(IfName, RouteSpec)| {
            let via = r.gateway.map(|g| format!(" via {g}")).unwrap_or_default();
            let own = if r.table.is_some() { " own" } else { "" };
            format!("{}{via} dev {name}{own}", r.destination)
        };
        steering.routes.iter().map(route).collect()
    }

    #[test]
    fn the_first_interface_keeps_the_default_and_each_has_a_table_with_its_own() {
        let eth0 = interface("eth0", &["10.1.0.2/24"], &[("0.0.0.0/0", Some("10.1.0.1"))]);
        let net1 =
            interface("net1", &["10.2.0.2/24"], &[("0.0.0.0/0", Some("10.2.0.1")), ("10.9.0.0/16", Some("10.2.0.9"))]);
        let steering = Steering::plan(&[eth0, net1]);
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
        assert_eq!((a.from, b.from), ("10.1.0.2/32".parse().unwrap(), "10.2.0.2/32".parse().unwrap()));
        assert_ne!(a.table, b.table);
        // Not by what else there is.
        assert_eq!(a.table, Steering::plan(&[interface("eth0", &["10.7.0.2/24"], &[])]).rules[0].table);
    }

    #[test]
    fn an_override_is_of_its_family_alone() {
        let both = [("0.0.0.0/0", Some("10.1.0.1")), ("::/0", Some("2001:db8:1::1"))];
        let eth0 = interface("eth0", &["10.1.0.2/24", "2001:db8:1::2/64"], &both);
        let mut net1 = interface("net1", &["10.2.0.2/24"], &[("::/0", Some("2001:db8:2::1"))]);
        net1.default_route = Some(vec!["10.2.0.254".parse().unwrap()]);
        let steering = Steering::plan(&[eth0.clone(), net1.clone()]);
        let (name, route) = steering.default_of(true).unwrap();
        assert_eq!((name.as_str(), route.gateway), ("net1", "10.2.0.254".parse().ok()));
        assert_eq!(steering.default_of(false).unwrap().0.as_str(), "eth0");
        net1.routes.clear();
        // One that has none to give loses nothing of the others.
        net1.default_route = Some(Vec::new());
        assert_eq!(Steering::plan(&[eth0.clone(), net1.clone()]).default_of(true).unwrap().0.as_str(), "eth0");
        net1.gateways = vec!["10.2.0.1".parse().unwrap()];
        let steering = Steering::plan(&[eth0, net1]);
        assert!(text(&steering).contains(&"0.0.0.0/0 via 10.2.0.1 dev net1 own".to_owned()));
    }
}
