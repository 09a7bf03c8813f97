//! Comparing an attachment with what was planned for it.

use std::net::IpAddr;

use ipnet::IpNet;

use super::apply::{has_ports, look_up};
use super::{AttachError, Engine};
use crate::journal::Record;
use crate::link::{HostView, LinkRequest, is_link_local};
use crate::model::{AttachmentKey, IfName};
use crate::netlink::{self, AddressView, LinkView, NeighbourView, NetlinkError, RouteView, Socket};
use crate::netns::NetNs;
use crate::plan::{Operation, Step, Target};

/// A difference between what was made and what is there.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Drift {
    /// No finished attachment is recorded.
    NotAttached,
    /// The namespace is not the one that was attached.
    OtherNamespace,
    /// A link is gone.
    LinkMissing {
        /// Where it was.
        target: Target,
        /// Its name.
        link: IfName,
    },
    /// A link is not as it was made.
    LinkChanged {
        /// Where it is.
        target: Target,
        /// Its name.
        link: IfName,
        /// What differs.
        what: &'static str,
    },
    /// An address is gone.
    AddressMissing {
        /// Where it was.
        target: Target,
        /// The link.
        link: IfName,
        /// The address.
        address: IpNet,
    },
    /// A route is gone.
    RouteMissing {
        /// Where it was.
        target: Target,
        /// Its destination.
        destination: IpNet,
        /// Its next hop.
        gateway: Option<IpAddr>,
    },
    /// A neighbour entry is gone.
    NeighbourMissing {
        /// Where it was.
        target: Target,
        /// The address.
        address: IpAddr,
    },
}

impl std::fmt::Display for Drift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = |target: &Target| match target {
            Target::Host => "host",
            Target::Pod => "pod",
        };
        match self {
            Self::NotAttached => f.write_str("no finished attachment is recorded"),
            Self::OtherNamespace => f.write_str("the namespace is not the one that was attached"),
            Self::LinkMissing { target, link } => write!(f, "{}: link {link} is missing", place(target)),
            Self::LinkChanged { target, link, what } => write!(f, "{}: link {link}: {what}", place(target)),
            Self::AddressMissing { target, link, address } => {
                write!(f, "{}: address {address} of {link} is missing", place(target))
            }
            Self::RouteMissing { target, destination, gateway: Some(gateway) } => {
                write!(f, "{}: route {destination} via {gateway} is missing", place(target))
            }
            Self::RouteMissing { target, destination, gateway: None } => {
                write!(f, "{}: route {destination} is missing", place(target))
            }
            Self::NeighbourMissing { target, address } => {
                write!(f, "{}: neighbour {address} is missing", place(target))
            }
        }
    }
}

/// What one namespace looks like.
struct Observed {
    links: Vec<LinkView>,
    addresses: Vec<AddressView>,
    routes: Vec<RouteView>,
    neighbours: Vec<NeighbourView>,
}

impl Engine {
    /// Compares an attachment with what its plan made. Additions by others are no drift.
    pub fn check(&self, key: &AttachmentKey, netns: &NetNs) -> Result<Vec<Drift>, AttachError> {
        let Some((_entry, record)) = self.journal.find(key.id())? else { return Ok(vec![Drift::NotAttached]) };
        let Some(record) = record.filter(|r| r.key == *key && r.done.is_some()) else {
            return Ok(vec![Drift::NotAttached]);
        };
        if record.netns != netns.id() {
            return Ok(vec![Drift::OtherNamespace]);
        }
        let request = LinkRequest {
            key: key.clone(),
            mac: record.mac,
            addresses: record.lease.addresses.clone(),
            routes: record.lease.routes.clone(),
            policy: record.policy,
        };
        // With nothing there, the plan names everything that there should be.
        let plan = record.link.driver().plan(&request, &HostView::default())?;
        let host = observe(&mut self.host_socket()?, &plan.steps, Target::Host).map_err(AttachError::Look)?;
        let pod = observe(&mut self.pod_socket(netns)?, &plan.steps, Target::Pod).map_err(AttachError::Look)?;
        let mut drift = Vec::new();
        for step in &plan.steps {
            let (here, there) = match step.target {
                Target::Host => (&host, &pod),
                Target::Pod => (&pod, &host),
            };
            compare(step, here, there, &record, &mut drift);
        }
        let mut seen = Vec::new();
        drift.retain(|d| {
            !seen.contains(d) && {
                seen.push(d.clone());
                true
            }
        });
        Ok(drift)
    }

    /// Removes the bridge that attachments of this configuration shared, if it is ours and has no port. Returns whether
    /// it did. Called when a network goes away for good.
    pub fn remove_idle(&self, bridge: &IfName) -> Result<bool, super::TeardownError> {
        let _lock = self.shared.changing(&self.host)?;
        let mut socket = self.host_socket()?;
        let Some(link) = look_up(&mut socket, bridge)? else { return Ok(false) };
        let ours = link.alias.as_deref() == Some(&crate::plan::shared_mark(bridge));
        if !ours || has_ports(&mut socket, link.index)? {
            return Ok(false);
        }
        super::apply::delete(&mut socket, &link)?;
        Ok(true)
    }
}

fn observe(socket: &mut Socket, steps: &[Step], target: Target) -> Result<Observed, NetlinkError> {
    let mut seen = Observed { links: Vec::new(), addresses: Vec::new(), routes: Vec::new(), neighbours: Vec::new() };
    let mut neighbours = false;
    for step in steps {
        let links: Vec<&IfName> = match &step.operation {
            Operation::CreateVeth { near, .. } if step.target == target => vec![&near.name],
            Operation::CreateVeth { far, .. } => vec![&far.name],
            Operation::CreateBridge { bridge, .. } if step.target == target => vec![&bridge.name],
            Operation::AddNeighbour { .. } if step.target == target => {
                neighbours = true;
                continue;
            }
            _ => continue,
        };
        for name in links {
            let Some(link) = look_up(socket, name)? else { continue };
            let addresses = socket.dump(&netlink::address_dump(Some(link.index)))?;
            seen.addresses.extend(addresses.iter().filter_map(|r| AddressView::parse(&r.payload)));
            let routes = socket.dump(&netlink::route_dump(Some(link.index)))?;
            seen.routes.extend(routes.iter().filter_map(|r| RouteView::parse(&r.payload)));
            seen.links.push(link);
        }
    }
    if neighbours {
        let all = socket.dump(&netlink::neighbour_dump())?;
        seen.neighbours.extend(all.iter().filter_map(|r| NeighbourView::parse(&r.payload)));
    }
    Ok(seen)
}

fn compare(step: &Step, here: &Observed, there: &Observed, record: &Record, drift: &mut Vec<Drift>) {
    let target = step.target;
    let other = if target == Target::Host { Target::Pod } else { Target::Host };
    let changed = |target, link: &IfName, what| Drift::LinkChanged { target, link: link.clone(), what };
    let find = |observed: &'_ Observed, name: &IfName| observed.links.iter().find(|l| l.name == name.as_str()).cloned();
    match &step.operation {
        Operation::CreateVeth { near, far, mtu } => {
            for (target, observed, end) in [(target, here, near), (other, there, far)] {
                match find(observed, &end.name) {
                    None => drift.push(Drift::LinkMissing { target, link: end.name.clone() }),
                    Some(link) => {
                        if link.mac != Some(end.mac) {
                            drift.push(changed(target, &end.name, "its Ethernet address was changed"));
                        }
                        if mtu.is_some_and(|m| m.get() != link.mtu) {
                            drift.push(changed(target, &end.name, "its MTU was changed"));
                        }
                    }
                }
            }
        }
        Operation::CreateBridge { bridge, .. } => {
            // Whoever made it chose its address and MTU.
            if find(here, &bridge.name).is_none() {
                drift.push(Drift::LinkMissing { target, link: bridge.name.clone() });
            }
        }
        Operation::Mark { link, alias } => {
            let ours = record.host_end.as_ref().is_some_and(|e| e.name == *link) || *link == record.key.ifname;
            if ours && find(here, link).is_some_and(|l| l.alias.as_deref() != Some(alias)) {
                drift.push(changed(target, link, "its mark is gone"));
            }
        }
        Operation::Up { link, master } => {
            let Some(found) = find(here, link) else { return };
            if !found.is_up() {
                drift.push(changed(target, link, "it is down"));
            }
            if let Some(master) = master
                && found.master.is_none_or(|m| find(here, master).is_none_or(|b| b.index != m))
            {
                drift.push(changed(target, link, "it is not a port of its bridge"));
            }
        }
        Operation::AddAddress { link, address } => {
            let Some(found) = find(here, link) else { return };
            // A shared bridge has the link-local address of whoever made it.
            let same = |a: &AddressView| {
                a.address == *address || target == Target::Host && is_link_local(&a.address) && is_link_local(address)
            };
            if !here.addresses.iter().any(|a| a.index == found.index && same(a)) {
                drift.push(Drift::AddressMissing { target, link: link.clone(), address: *address });
            }
        }
        Operation::AddRoute { link, route } => {
            let Some(found) = find(here, link) else { return };
            let there = here.routes.iter().any(|r| {
                r.destination == route.destination.trunc() && r.gateway == route.gateway && r.link == Some(found.index)
            });
            if !there {
                let (destination, gateway) = (route.destination, route.gateway);
                drift.push(Drift::RouteMissing { target, destination, gateway });
            }
        }
        Operation::AddNeighbour { link, address, mac } => {
            let Some(found) = find(here, link) else { return };
            let known = |n: &NeighbourView| n.index == found.index && n.address == *address && n.mac == Some(*mac);
            if !here.neighbours.iter().any(known) {
                drift.push(Drift::NeighbourMissing { target, address: *address });
            }
        }
        Operation::NoLinkLocal { .. }
        | Operation::ForwardIpv4 { .. }
        | Operation::Hairpin { .. }
        | Operation::SettleCarrier { .. }
        | Operation::ForgetNeighbour { .. }
        | Operation::AttachPolicy => {}
    }
}
