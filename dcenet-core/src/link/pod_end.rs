//! What the pod's end of every kind has: a mark, addresses, routes, and what tunes it.

use super::{HostView, LinkRequest, Policy, gateway_of, link_local};
use crate::model::{IfName, MacAddr, Mtu};
use crate::plan::{Announcer, Device, End, Operation, Plan, RouteSpec, Step, Target, Tuning, Undo, mark};
use crate::probe::Underlay;
use crate::provider::LeasedAddress;

/// A device that lives in the pod alone, on a device of the host or on nothing.
pub(super) struct PodDevice<'a> {
    pub(super) request: &'a LinkRequest,
    pub(super) end: End,
    pub(super) mtu: Option<Mtu>,
    pub(super) tuning: Tuning,
    /// Whether packets are handed to neighbours: without, every route leads straight to the link.
    pub(super) neighbours: Neighbours,
    /// What care is taken of its addresses, where others are on its segment.
    pub(super) underlay: Option<Underlay>,
    /// The device of the host on which it is made, which may remember who had its addresses before.
    pub(super) parent: Option<Parent>,
}

/// A device of the host on which a pod's is made.
pub(super) struct Parent {
    pub(super) link: IfName,
    /// Its Ethernet address, where the pod's device has that too: answers to who has no address yet come to it alone (the
    /// kernel's `ipvlan_handle_mode_l2` finds devices by address).
    pub(super) shared_mac: Option<MacAddr>,
    /// Whether the pod's device has an Ethernet address of its own, which may be set without a change of the parent's.
    pub(super) has_own_mac: bool,
}

/// Whether a device's packets have an Ethernet address to go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Neighbours {
    /// By ARP and neighbour discovery, from the link-local address that belongs to this Ethernet address.
    Resolved(MacAddr),
    /// There are none.
    None,
}

impl PodDevice<'_> {
    /// The device made by the host under a name of its own, then named, given its addresses, and set up.
    pub(super) fn plan(self, device: Device) -> Plan {
        let transit = self.transit();
        let target = if device.parent().is_some() { Target::Host } else { Target::Pod };
        let create = Operation::CreateLink {
            link: self.end.clone(),
            transit: Some(transit),
            device,
            mtu: self.mtu,
            home: Target::Pod,
        };
        let mut steps = vec![Step::new(target, create).undone_by(self.undo())];
        self.finish(&mut steps);
        Plan { steps, host_end: None, pod_end: self.end, bridge: None, router: None }
    }

    /// The name until it is marked.
    pub(super) fn transit(&self) -> IfName {
        self.request.key.id().host_ifname()
    }

    pub(super) fn undo(&self) -> Undo {
        Undo::DeletePodLink { link: self.end.name.clone(), transit: self.transit() }
    }

    /// Everything after the device is there under its first name.
    pub(super) fn finish(&self, steps: &mut Vec<Step>) {
        let (transit, name) = (self.transit(), &self.end.name);
        steps.push(no_router_advertisements(&transit));
        let alias = mark(&self.request.key);
        steps.push(Step::new(Target::Pod, Operation::Rename { link: transit, to: name.clone(), alias }));
        self.set_up(steps);
    }

    /// Everything after the device has its name.
    pub(super) fn set_up(&self, steps: &mut Vec<Step>) {
        let name = &self.end.name;
        steps.push(no_link_local(Target::Pod, name));
        tune(name, self.tuning, steps);
        if self.request.policy == Policy::Wanted {
            steps.push(Step::new(Target::Pod, Operation::AttachPolicy).undone_by(Undo::DetachPolicy));
        }
        steps.push(Step::new(Target::Pod, Operation::Up { link: name.clone(), master: None }));
        if let Some(underlay) = &self.underlay {
            let (target, link) = match &self.parent {
                Some(Parent { link, shared_mac: Some(_), .. }) => (Target::Host, link),
                _ => (Target::Pod, name),
            };
            steps.extend(probe_conflicts(underlay, target, link, self.end.mac, &self.request.addresses));
        }
        match self.neighbours {
            Neighbours::Resolved(mac) => {
                addresses(name, Some(mac), &self.request.addresses, steps);
                routes(name, self.request, steps);
            }
            Neighbours::None => {
                addresses(name, None, &self.request.addresses, steps);
                for route in &self.request.routes {
                    let route = direct(route.destination);
                    steps.push(pod_route(name, route));
                }
            }
        }
        settle(name, &self.request.addresses, steps);
        if let Some(underlay) = &self.underlay {
            if let Some(parent) = &self.parent {
                forget(&parent.link, &self.request.addresses, steps);
            }
            let by = match &self.parent {
                Some(Parent { has_own_mac: true, .. }) => Announcer::Kernel,
                _ => Announcer::Socket,
            };
            introduce(underlay, &self.end, &self.request.addresses, by, steps);
        }
    }
}

/// Asks who has the addresses, before they are entered.
pub(super) fn probe_conflicts(
    underlay: &Underlay,
    target: Target,
    link: &IfName,
    mac: MacAddr,
    addresses: &[LeasedAddress],
) -> Option<Step> {
    let timing = underlay.conflict_probe().filter(|_| !addresses.is_empty())?;
    let addresses = addresses.iter().map(|a| a.address.addr()).collect();
    Some(Step::new(target, Operation::ProbeConflicts { link: link.clone(), mac, addresses, timing }))
}

/// Has a link of the host forget who had the addresses before.
pub(super) fn forget(link: &IfName, addresses: &[LeasedAddress], steps: &mut Vec<Step>) {
    for address in addresses {
        let operation = Operation::ForgetNeighbour { link: link.clone(), address: address.address.addr() };
        steps.push(Step::new(Target::Host, operation).content_with(NOT_KNOWN));
    }
}

/// Tells the segment of the addresses, and asks for the gateways.
pub(super) fn introduce(
    underlay: &Underlay,
    end: &End,
    addresses: &[LeasedAddress],
    by: Announcer,
    steps: &mut Vec<Step>,
) {
    let (link, mac, times) = (end.name.clone(), end.mac, underlay.announcements.get());
    if times > 0 && !addresses.is_empty() {
        let addresses = addresses.iter().map(|a| a.address.addr()).collect();
        steps.push(Step::new(Target::Pod, Operation::Announce { link: link.clone(), mac, addresses, times, by }));
    }
    let gateways: Vec<_> = addresses.iter().filter_map(|a| Some((a.address.addr(), a.gateway?))).collect();
    if let Some(otherwise) = underlay.gateway_probe
        && !gateways.is_empty()
    {
        let timing = underlay.gateway_timing();
        steps.push(Step::new(Target::Pod, Operation::ProbeGateways { link, mac, gateways, timing, otherwise }));
    }
}

/// The addresses of the pod's end, with the link-local one of an Ethernet address where there is IPv6.
pub(super) fn addresses(link: &IfName, mac: Option<MacAddr>, addresses: &[LeasedAddress], steps: &mut Vec<Step>) {
    let ipv6 = addresses.iter().any(|a| a.address.addr().is_ipv6());
    let local = mac.filter(|_| ipv6).map(link_local);
    for address in local.into_iter().chain(addresses.iter().map(|a| a.address)) {
        steps.push(Step::new(Target::Pod, Operation::AddAddress { link: link.clone(), address }));
    }
}

/// Has what is sent to the pod's IPv6 addresses arrive from now on.
pub(super) fn settle(link: &IfName, addresses: &[LeasedAddress], steps: &mut Vec<Step>) {
    for address in addresses.iter().map(|a| a.address.addr()).filter(|a| a.is_ipv6()) {
        steps.push(Step::new(Target::Pod, Operation::SettleAddress { link: link.clone(), address }));
    }
}

/// The routes of the pod's end, over the routers of its subnets.
pub(super) fn routes(link: &IfName, request: &LinkRequest, steps: &mut Vec<Step>) {
    for route in &request.routes {
        let gateway = gateway_of(route, &request.addresses);
        let on_link = gateway.is_some_and(|g| !request.addresses.iter().any(|a| a.address.contains(&g)));
        let route = RouteSpec { gateway, on_link, ..direct(route.destination) };
        steps.push(pod_route(link, route));
    }
}

/// Adds a route. Where another network of the pod has one to the same destination already, that stays the only one: an address
/// that was there before keeps its way out. The reference plugins 1.1 let the last network have it (IPv4) or all (IPv6), and those
/// before the first. When the first network is taken away alone, the pod has none until this one is attached anew.
pub(super) fn pod_route(link: &IfName, route: RouteSpec) -> Step {
    Step::new(Target::Pod, Operation::AddRoute { link: link.clone(), route }).content_with(&[libc::EEXIST])
}

/// A route straight to a link.
pub(super) fn direct(destination: ipnet::IpNet) -> RouteSpec {
    RouteSpec::direct(destination)
}

/// What the configuration changes of the pod's end.
pub(super) fn tune(link: &IfName, tuning: Tuning, steps: &mut Vec<Step>) {
    if !tuning.is_default() {
        steps.push(Step::new(Target::Pod, Operation::Tune { link: link.clone(), tuning }));
    }
}

/// Keeps the kernel from making a link-local address.
pub(super) fn no_link_local(target: Target, link: &IfName) -> Step {
    // A kernel without IPv6 makes no link-local addresses.
    Step::new(target, Operation::NoLinkLocal { link: link.clone() }).content_with(&[libc::EAFNOSUPPORT])
}

/// Has the pod's device take neither addresses nor routes from routers of the segment: it has what it was leased.
pub(super) fn no_router_advertisements(link: &IfName) -> Step {
    let operation = Operation::WriteSetting { name: format!("ipv6/conf/{link}/accept_ra"), value: "0".to_owned() };
    // Without IPv6 there is no such file.
    Step::new(Target::Pod, operation).content_with(&[libc::ENOENT])
}

/// What a host looks like without a link.
pub(super) fn without(host: &HostView, link: &IfName) -> HostView {
    let mut host = host.clone();
    host.links.retain(|l| l.name != link.as_str());
    host
}

pub(super) fn is_false(value: &bool) -> bool {
    !value
}

/// There was no such neighbour, or no such family.
const NOT_KNOWN: &[i32] = &[libc::ENOENT, libc::EAFNOSUPPORT];
