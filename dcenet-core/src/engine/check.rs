//! Comparing an attachment with what was planned for it.

use std::net::IpAddr;

use ipnet::IpNet;

use super::apply::look_up;
use super::attach::{recorded, view};
use super::{AttachError, Engine};
use crate::journal::Record;
use crate::link::is_link_local;
use crate::model::{AttachmentKey, IfName, Mtu};
use crate::netlink::{self, AddressView, LinkView, NeighbourView, NetlinkError, PortVlans, RouteView, Socket};
use crate::netns::NetNs;
use crate::plan::{Device, End, MARK, Operation, Step, Tagging, Target, Tuning, Undo};
use crate::sysctl::dotted;

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
    /// A link of the host is not limited as it was.
    LimitChanged {
        /// The link.
        link: IfName,
        /// What differs.
        what: &'static str,
    },
    /// A device that a source handed out is not what it was lent as.
    DeviceChanged {
        /// The device, as its source calls it.
        device: String,
        /// What differs, as its source tells it.
        what: String,
    },
    /// The host does not translate all that it should for the pod.
    TranslationChanged {
        /// What is missing, or another's.
        what: String,
    },
    /// A setting is not what it was made.
    SettingChanged {
        /// Whose it is.
        target: Target,
        /// Its path below `/proc/sys/net`.
        name: String,
        /// What it was made.
        value: String,
        /// What it is; `None` where it is gone.
        is: Option<String>,
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
            Self::LimitChanged { link, what } => write!(f, "host: link {link}: {what}"),
            Self::DeviceChanged { device, what } => write!(f, "host: device {device}: {what}"),
            Self::TranslationChanged { what } => write!(f, "host: {what}"),
            Self::SettingChanged { target, name, value, is: Some(is) } => {
                write!(f, "{}: {} is {is:?}, and was made {value:?}", place(target), dotted(name))
            }
            Self::SettingChanged { target, name, value: _, is: None } => {
                write!(f, "{}: {} is gone", place(target), dotted(name))
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
    vlans: Vec<PortVlans>,
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
        let request = recorded(&record);
        let driver = record.link.driver();
        let needs = driver.needs(&request);
        let mut socket = self.host_socket()?;
        let view = view(&mut socket, &needs).map_err(AttachError::Look)?;
        let mut drift = Vec::new();
        let plan = match driver.expect(&request, &view) {
            Ok(plan) => plan,
            Err(error) => {
                // It may fail for want of what is missing now.
                let missing = needs.into_iter().map(|need| need.link).filter(|link| view.link(link).is_none());
                drift.extend(missing.map(|link| Drift::LinkMissing { target: Target::Host, link }));
                return if drift.is_empty() { Err(error.into()) } else { Ok(drift) };
            }
        };
        let host = observe(&mut socket, &plan.steps, Target::Host).map_err(AttachError::Look)?;
        let pod = observe(&mut self.pod_socket(netns)?, &plan.steps, Target::Pod).map_err(AttachError::Look)?;
        for step in &plan.steps {
            let (here, there) = match step.target {
                Target::Host => (&host, &pod),
                Target::Pod => (&pod, &host),
            };
            compare(step, here, there, &record, &mut drift);
        }
        drift.extend(self.changed_settings(&record, netns)?);
        let with_ipv4 = record.lease.addresses.iter().any(|a| a.address.addr().is_ipv4());
        // Whoever made a bridge for himself decides what it forwards.
        let ours = |name: &IfName| {
            let link = host.links.iter().find(|link| link.name == name.as_str());
            link.and_then(|link| link.alias.as_deref()).is_some_and(|alias| alias.starts_with(MARK))
        };
        let forwarding = plan.steps.iter().filter_map(|step| match &step.operation {
            Operation::ForwardIpv4 { link } if with_ipv4 && step.target == Target::Host && ours(link) => {
                Some((format!("ipv4/conf/{link}/forwarding"), "1".to_owned()))
            }
            _ => None,
        });
        drift.extend(self.changed(Target::Host, &self.host.0, &forwarding.collect())?);
        compare_limits(&mut socket, &plan.steps, &host, &mut drift).map_err(AttachError::Look)?;
        let mut lacking = self.missing_translation(&record).map_err(AttachError::Look)?;
        if let Some(entry) = plan.entry() {
            lacking.extend(self.contrary_settings(&record, entry)?);
        }
        drift.extend(lacking.into_iter().map(|what| Drift::TranslationChanged { what }));
        if let Some(device) = &request.device {
            let missing = self.missing_of_device(key, device, driver.kind())?;
            drift.extend(missing.into_iter().map(|what| Drift::DeviceChanged { device: device.id.clone(), what }));
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
}

fn observe(socket: &mut Socket, steps: &[Step], target: Target) -> Result<Observed, NetlinkError> {
    let mut seen = Observed {
        links: Vec::new(),
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
        vlans: Vec::new(),
    };
    let (mut neighbours, mut vlans) = (false, false);
    for step in steps {
        let links: Vec<&IfName> = match &step.operation {
            Operation::CreateVeth { near, .. } if step.target == target => vec![&near.name],
            Operation::CreateVeth { far, .. } => vec![&far.name],
            Operation::CreateBridge { bridge, .. } if step.target == target => vec![&bridge.name],
            Operation::CreateLink { link, device, home, .. } => match device {
                _ if *home == target => vec![&link.name],
                Device::Netkit { peer, .. } => vec![&peer.name],
                _ => continue,
            },
            Operation::CreateTap { link, .. } if step.target == target => vec![&link.name],
            Operation::MoveLink { to, .. } if step.target != target => vec![&to.name],
            Operation::AddNeighbour { .. } if step.target == target => {
                neighbours = true;
                continue;
            }
            Operation::AddVlans { .. } if step.target == target => {
                vlans = true;
                continue;
            }
            _ => continue,
        };
        for name in links {
            let Some(link) = look_up(socket, name)? else { continue };
            let addresses = socket.dump(&netlink::address_dump(Some(link.index)))?;
            seen.addresses.extend(addresses.iter().filter_map(|r| AddressView::parse(&r.payload)));
            if target == Target::Host {
                let routes = socket.dump(&netlink::route_dump(Some(link.index)))?;
                seen.routes.extend(routes.iter().filter_map(|r| RouteView::parse(&r.payload)));
            }
            seen.links.push(link);
        }
    }
    if target == Target::Pod && !seen.links.is_empty() {
        // Those of the pod's other networks count, too.
        seen.routes = socket.routes()?;
    }
    if neighbours {
        let all = socket.dump(&netlink::neighbour_dump())?;
        seen.neighbours.extend(all.iter().filter_map(|r| NeighbourView::parse(&r.payload)));
    }
    if vlans {
        seen.vlans = socket.port_vlans()?;
    }
    Ok(seen)
}

fn compare(step: &Step, here: &Observed, there: &Observed, record: &Record, drift: &mut Vec<Drift>) {
    let target = step.target;
    let other = if target == Target::Host { Target::Pod } else { Target::Host };
    let changed = |target, link: &IfName, what| Drift::LinkChanged { target, link: link.clone(), what };
    let find = |observed: &'_ Observed, name: &IfName| observed.links.iter().find(|l| l.name == name.as_str()).cloned();
    let device = |place, end: &End, mtu: Option<Mtu>, drift: &mut Vec<Drift>| {
        let observed = if place == target { here } else { there };
        match find(observed, &end.name) {
            None => drift.push(Drift::LinkMissing { target: place, link: end.name.clone() }),
            Some(link) => {
                if link.mac != Some(end.mac) {
                    drift.push(changed(place, &end.name, "its Ethernet address was changed"));
                }
                if mtu.is_some_and(|m| m.get() != link.mtu) {
                    drift.push(changed(place, &end.name, "its MTU was changed"));
                }
            }
        }
    };
    match &step.operation {
        Operation::CreateVeth { near, far, mtu } => {
            device(target, near, *mtu, drift);
            device(other, far, *mtu, drift);
        }
        Operation::CreateLink { link, device: Device::Netkit { peer, .. }, mtu, .. } => {
            device(target, link, *mtu, drift);
            device(other, peer, *mtu, drift);
        }
        Operation::CreateLink { link, home, .. } if step.undo.as_ref().is_some_and(Undo::is_shared) => {
            // Whoever made it chose its address.
            if find(if *home == target { here } else { there }, &link.name).is_none() {
                drift.push(Drift::LinkMissing { target: *home, link: link.name.clone() });
            }
        }
        Operation::CreateLink { link, mtu, home, .. } => device(*home, link, *mtu, drift),
        Operation::CreateTap { link, .. } => {
            if find(here, &link.name).is_none() {
                drift.push(Drift::LinkMissing { target, link: link.name.clone() });
            }
        }
        Operation::MoveLink { to, alias, .. } => {
            let Some(found) = find(there, &to.name) else {
                return drift.push(Drift::LinkMissing { target: other, link: to.name.clone() });
            };
            // Its address is its own, and known since it was moved.
            let own = record.done.iter().flat_map(|done| &done.interfaces).find(|i| i.sandbox.is_some()).map(|i| i.mac);
            if found.mac != own {
                drift.push(changed(other, &to.name, "its Ethernet address was changed"));
            }
            if found.alias.as_deref() != Some(alias) {
                drift.push(changed(other, &to.name, "its mark is gone"));
            }
        }
        Operation::SetMac { link, mac } => {
            if find(here, link).is_some_and(|l| l.mac != Some(*mac)) {
                drift.push(changed(target, link, "its Ethernet address was changed"));
            }
        }
        Operation::SetMtu { link, mtu } => {
            if find(here, link).is_some_and(|l| l.mtu != mtu.get()) {
                drift.push(changed(target, link, "its MTU was changed"));
            }
        }
        Operation::Tune { link, tuning } => {
            let Some(found) = find(here, link) else { return };
            let Tuning { tx_queue_len, promisc, allmulti } = *tuning;
            let flag = |bit: i32| found.flags & bit as u32 != 0;
            for (differs, what) in [
                (tx_queue_len.is_some_and(|len| len != found.tx_queue_len), "its transmit queue's length was changed"),
                (promisc.is_some_and(|p| p != flag(libc::IFF_PROMISC)), "its promiscuous mode was changed"),
                (allmulti.is_some_and(|a| a != flag(libc::IFF_ALLMULTI)), "its multicast mode was changed"),
            ] {
                if differs {
                    drift.push(changed(target, link, what));
                }
            }
        }
        Operation::CreateBridge { bridge, vlan_filtering, .. } => match find(here, &bridge.name) {
            // Whoever made it chose its address and MTU.
            None => drift.push(Drift::LinkMissing { target, link: bridge.name.clone() }),
            Some(found) if *vlan_filtering && !found.vlans.is_some_and(|vlans| vlans.filtering) => {
                drift.push(changed(target, &bridge.name, "it keeps VLANs apart no more"));
            }
            Some(_) => {}
        },
        Operation::AddVlans { link, vlans, tagging } => {
            let Some(found) = find(here, link) else { return };
            let port = here.vlans.iter().find(|port| port.index == found.index);
            if !port.is_some_and(|port| port.has(*vlans, *tagging == Tagging::Untagged)) {
                let what = match tagging {
                    Tagging::Untagged => "its frames without a tag are no longer of its VLAN",
                    Tagging::Tagged => "a VLAN of its trunk is gone",
                    Tagging::Own => "its own end is no longer in the VLAN of which it is the gateway",
                };
                drift.push(changed(target, link, what));
            }
        }
        Operation::Rename { to, alias, .. } => {
            if find(here, to).is_some_and(|l| l.alias.as_deref() != Some(alias)) {
                drift.push(changed(target, to, "its mark is gone"));
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
            // In a pod with several networks the first has the route to where several lead.
            let table = route.table.unwrap_or(u32::from(libc::RT_TABLE_MAIN));
            let metric = route.metric.unwrap_or(if route.destination.addr().is_ipv4() { 0 } else { METRIC_V6 });
            let others = |r: &RouteView| {
                let is_like_it = (r.table, r.metric, r.kind) == (table, metric, libc::RTN_UNICAST);
                target == Target::Pod && is_like_it && r.link.is_some_and(|link| link != found.index)
            };
            let own = |r: &RouteView| r.gateway == route.gateway && r.link == Some(found.index);
            let there = here.routes.iter().any(|r| r.destination == route.destination.trunc() && (own(r) || others(r)));
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
        Operation::Hairpin { port } => {
            if find(here, port).is_some_and(|l| !l.port.is_some_and(|port| port.hairpin)) {
                drift.push(changed(target, port, "its hairpin mode was turned off, or it is no port of a bridge"));
            }
        }
        Operation::Isolate { port } => {
            if find(here, port).is_some_and(|l| !l.port.is_some_and(|port| port.isolated)) {
                drift.push(changed(target, port, "its isolation was turned off, or it is no port of a bridge"));
            }
        }
        Operation::NoLinkLocal { .. }
        | Operation::WriteSetting { .. }
        | Operation::NoArpReplies { .. }
        | Operation::FilterVlans { .. }
        | Operation::Join { .. }
        | Operation::DeleteVlan { .. }
        | Operation::Shape { .. }
        | Operation::AddClsact { .. }
        | Operation::Divert { .. }
        | Operation::ForwardIpv4 { .. }
        | Operation::SettleCarrier { .. }
        | Operation::SettleAddress { .. }
        | Operation::ForgetNeighbour { .. }
        | Operation::ProbeConflicts { .. }
        | Operation::Announce { .. }
        | Operation::ProbeGateways { .. }
        | Operation::Translate { .. }
        | Operation::AttachPolicy => {}
    }
}

/// Compares the limits on links of the host, which are asked for only where there are any.
fn compare_limits(
    socket: &mut Socket,
    steps: &[Step],
    host: &Observed,
    drift: &mut Vec<Drift>,
) -> Result<(), NetlinkError> {
    let find = |name: &IfName| host.links.iter().find(|link| link.name == name.as_str()).map(|link| link.index);
    let mut disciplines = None;
    for step in steps {
        // A link that is gone is told already.
        match &step.operation {
            Operation::Shape { link, rate } => {
                let Some(index) = find(link) else { continue };
                let all = match &mut disciplines {
                    Some(all) => all,
                    none => none.insert(socket.dump(&netlink::shape_dump())?),
                };
                let found = all.iter().find_map(|reply| netlink::shaped_rate(&reply.payload, index));
                if found != Some(rate.bytes_per_second()) {
                    drift.push(Drift::LimitChanged { link: link.clone(), what: "its bandwidth limit was changed" });
                }
            }
            Operation::Divert { link, through } => {
                let (Some(index), Some(to)) = (find(link), find(through)) else { continue };
                let filters = match socket.dump(&netlink::divert_dump(link, index)) {
                    // Without a clsact there is no such parent (net/sched/cls_api.c, `tc_dump_tfilter`).
                    Err(error) if matches!(error.errno(), Some(libc::EINVAL | libc::ENOENT)) => Vec::new(),
                    listed => listed?,
                };
                if !filters.iter().any(|reply| netlink::diverts_to(&reply.payload, to)) {
                    let what = "what comes from the pod goes past its bandwidth limit";
                    drift.push(Drift::LimitChanged { link: link.clone(), what });
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The metric of an IPv6 route that names none (`IP6_RT_PRIO_USER`, include/uapi/linux/ipv6_route.h); of IPv4 it is 0.
const METRIC_V6: u32 = 1024;
