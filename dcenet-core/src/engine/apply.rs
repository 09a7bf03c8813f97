//! Carrying out a plan's steps.

use std::collections::HashMap;
use std::time::Duration;

use super::error::{StepError, TeardownError};
use super::{AttachRequest, Engine, NamespaceEntry};
use crate::link::link_local_of_another;
use crate::model::{IfIndex, IfName, Mtu};
use crate::netlink::{
    self, Failure, LinkChange, LinkKind, LinkView, Message, NetkitPolicy, NetlinkError, NewLink, NewRoute, NewVeth,
    Socket, gated,
};
use crate::netns::{NetNs, NetNsError, NetNsGuard};
use crate::plan::{Device, End, Operation, Plan, RouteSpec, Step, Target, Undo};
use crate::provider::{Endpoint, Place};

/// Sockets and indices of one attach.
pub(super) struct Session<'a> {
    pub(super) engine: &'a Engine,
    pod_netns: &'a NetNs,
    host: Socket,
    pod: Option<Socket>,
    /// Indices and MTUs of links, as far as they were learnt.
    pub(super) links: HashMap<(Target, IfName), (IfIndex, Option<u32>)>,
    /// The names that links have before the plan renames them, by the later ones.
    pub(super) renamed: HashMap<(Target, IfName), IfName>,
}

/// What became of a plan.
pub(super) struct Applied {
    /// Undos of the steps that were done, or may have been, in plan order.
    pub(super) undo: Vec<Undo>,
    /// The first step that failed.
    pub(super) failure: Option<(usize, StepError)>,
}

impl<'a> Session<'a> {
    pub(super) fn new(engine: &'a Engine, pod_netns: &'a NetNs, host: Socket) -> Self {
        Self { engine, pod_netns, host, pod: None, links: HashMap::new(), renamed: HashMap::new() }
    }

    /// The host's socket.
    pub(super) fn host(&mut self) -> &mut Socket {
        &mut self.host
    }

    /// The pod's socket.
    pub(super) fn pod(&mut self) -> Result<&mut Socket, StepError> {
        self.socket(Target::Pod)
    }

    pub(super) fn socket(&mut self, target: Target) -> Result<&mut Socket, StepError> {
        Ok(match target {
            Target::Host => &mut self.host,
            Target::Pod => match &mut self.pod {
                Some(socket) => socket,
                none => none.insert(self.engine.pod_socket(self.pod_netns)?),
            },
        })
    }

    /// Does all steps, or those up to and around the first that fails: what shares its batch may be done too.
    pub(super) fn apply(&mut self, plan: &Plan, request: &AttachRequest<'_>) -> Applied {
        let mut applied = Applied { undo: Vec::new(), failure: None };
        for step in &plan.steps {
            if let Operation::Rename { link, to, .. } = &step.operation {
                self.renamed.insert((step.target, to.clone()), link.clone());
            }
        }
        let mut next = 0;
        while next < plan.steps.len() && applied.failure.is_none() {
            // Known before the batch is cut, so that what follows joins it.
            let first = &plan.steps[next];
            for link in indexed(&first.operation) {
                if let Err(error) = self.find_index(first.target, link) {
                    applied.failure = Some((next, error));
                    return applied;
                }
            }
            let end = self.batch_end(&plan.steps, next);
            if let Err((step, error)) = self.apply_batch(plan, next..end, request, &mut applied.undo) {
                applied.failure = Some((step, error));
            }
            next = end;
        }
        applied
    }

    /// The end of the longest run of steps that can be done at once: settings, or messages whose indices are all known, of one
    /// target.
    fn batch_end(&self, steps: &[Step], start: usize) -> usize {
        let first = &steps[start];
        if let Operation::WriteSetting { .. } = first.operation {
            let joins = |s: &&Step| s.target == first.target && matches!(s.operation, Operation::WriteSetting { .. });
            return start + steps[start..].iter().take_while(joins).count();
        }
        // A device that could not be named and marked must not be set up by what follows.
        if !is_message(&first.operation) || matches!(first.operation, Operation::Rename { .. }) {
            return start + 1;
        }
        // Nor a port that could not be put into its VLANs, nor one of a bridge that does not keep them apart: the kernel does not
        // stop at what it refuses.
        let mut apart = keeps_apart(&first.operation);
        let joins = |step: &&Step| {
            let is_in_time = !(apart && matches!(step.operation, Operation::Up { .. }));
            apart |= keeps_apart(&step.operation);
            is_in_time
                && step.target == first.target
                && is_message(&step.operation)
                && !matches!(step.operation, Operation::Rename { .. })
                && indexed(&step.operation).iter().all(|link| self.known(step.target, link).is_some())
        };
        start + 1 + steps[start + 1..].iter().take_while(joins).count()
    }

    fn apply_batch(
        &mut self,
        plan: &Plan,
        range: std::ops::Range<usize>,
        request: &AttachRequest<'_>,
        undo: &mut Vec<Undo>,
    ) -> Result<(), (usize, StepError)> {
        let start = range.start;
        let steps = &plan.steps[range];
        if let Operation::WriteSetting { .. } = steps[0].operation {
            undo.extend(steps.iter().filter_map(|step| step.undo.clone()));
            return self.write_settings(steps).map_err(|(offset, e)| (start + offset, e));
        }
        if !is_message(&steps[0].operation) {
            undo.extend(steps[0].undo.clone());
            return self.do_locally(&steps[0], plan, request).map_err(|e| (start, e));
        }
        let target = steps[0].target;
        let messages: Vec<Message> = steps.iter().map(|step| self.encode(step)).collect();
        let socket = self.socket(target).map_err(|e| (start, e))?;
        let outcomes = socket.batch(&messages);
        let mut failure = None;
        let mut unsettled = Vec::new();
        for ((offset, step), outcome) in steps.iter().enumerate().zip(outcomes) {
            match outcome {
                Ok(replies) => {
                    undo.extend(step.undo.clone());
                    let settled = match &step.operation {
                        Operation::SettleCarrier { .. } => replies.iter().any(|r| netlink::is_operational(&r.payload)),
                        Operation::SettleAddress { .. } => replies.iter().any(|r| netlink::is_local_route(&r.payload)),
                        _ => true,
                    };
                    if !settled {
                        unsettled.push((start + offset, &step.operation));
                    }
                    let made = replies.iter().filter(|r| r.kind == libc::RTM_NEWLINK);
                    for link in made.filter_map(|r| LinkView::parse(&r.payload)) {
                        self.learn(step, &link);
                    }
                }
                Err(error) if error.errno().is_some_and(|e| step.tolerate.contains(&e)) => {}
                Err(error)
                    if matches!(step.operation, Operation::SettleAddress { .. })
                        && error.errno().is_some_and(|e| netlink::NO_ROUTE.contains(&e)) =>
                {
                    unsettled.push((start + offset, &step.operation));
                }
                Err(error) => {
                    // A link that was moved and could not be renamed stays where it was moved to.
                    if error.may_have_happened() || matches!(step.operation, Operation::MoveLink { .. }) {
                        undo.extend(step.undo.clone());
                    }
                    // Later failures of the batch mostly follow from the first.
                    if failure.is_none() {
                        failure = Some((start + offset, self.refusal(step, error)));
                    }
                }
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        for (step, operation) in unsettled {
            self.await_settled(target, operation).map_err(|e| (step, e))?;
        }
        Ok(())
    }

    /// What a refused step is to the caller: a device of a kind that the kernel lacks has an error of its own.
    fn refusal(&self, step: &Step, error: NetlinkError) -> StepError {
        match &step.operation {
            Operation::CreateLink { link, device, mtu, .. } => {
                netlink::refused(&link.name, &self.kind(step.target, device, *mtu), error).into()
            }
            Operation::AddVlans { link, .. }
            | Operation::FilterVlans { bridge: link }
            | Operation::CreateBridge { bridge: End { name: link, .. }, vlan_filtering: true, .. }
                if error.errno() == Some(libc::EOPNOTSUPP) && !netlink::lacks_kind(&error) =>
            {
                StepError::NoVlanFiltering { link: link.clone(), source: error }
            }
            _ => error.into(),
        }
    }

    /// Does what is no netlink message.
    fn do_locally(&mut self, step: &Step, plan: &Plan, request: &AttachRequest<'_>) -> Result<(), StepError> {
        match &step.operation {
            Operation::AttachPolicy => self.attach_policy(step.target, plan, request),
            Operation::Translate { elements } => self.engine.translate(elements, &request.key),
            Operation::CreateTap { link, transit, tap } => {
                let what = || format!("create tap {}", link.name);
                let make = || self.engine.run_in(self.netns(step.target), || crate::sys::create_tap(transit, tap));
                gated("create tap", make)?.map_err(|source| StepError::Local { what: what(), source })
            }
            Operation::ProbeConflicts { .. } | Operation::Announce { .. } | Operation::ProbeGateways { .. } => {
                self.talk(step)
            }
            _ => Ok(()),
        }
    }

    pub(super) fn netns(&self, target: Target) -> &'a NetNs {
        match target {
            Target::Host => &self.engine.host.0,
            Target::Pod => self.pod_netns,
        }
    }

    /// Waits for the kernel's workers, where asking did not do their part.
    pub(super) fn await_settled(&mut self, target: Target, operation: &Operation) -> Result<(), StepError> {
        let mut listener = match target {
            Target::Host => self.engine.host_socket()?,
            Target::Pod => self.engine.pod_socket(self.pod_netns)?,
        };
        let settled = match operation {
            Operation::SettleCarrier { link } => {
                self.socket(target)?.await_operational(listener, link, SETTLE_LIMIT)?
            }
            Operation::SettleAddress { address, .. } => listener.await_local(*address, SETTLE_LIMIT)?,
            _ => true,
        };
        if !settled {
            // All is done that can be: it works as soon as the kernel gets to it.
            tracing::warn!(?operation, "not settled yet");
        }
        Ok(())
    }

    /// Takes indices from the echo of a creation.
    fn learn(&mut self, step: &Step, link: &LinkView) {
        let (home, far) = match &step.operation {
            Operation::CreateVeth { far, .. } => (step.target, Some(&far.name)),
            Operation::CreateLink { home, device: Device::Netkit { peer, .. }, .. } => (*home, Some(&peer.name)),
            Operation::CreateLink { home, .. } => (*home, None),
            Operation::MoveLink { .. } => return,
            _ => (step.target, None),
        };
        self.know(home, link);
        if let (Some(far), Some(peer)) = (far, link.peer) {
            self.links.insert((other(home), far.clone()), (peer, Some(link.mtu)));
        }
    }

    pub(super) fn find_index(&mut self, target: Target, link: &IfName) -> Result<IfIndex, StepError> {
        if let Some(index) = self.known(target, link) {
            return Ok(index);
        }
        let found = look_up(self.socket(target)?, link)?;
        let Some(found) = found else {
            let refused = Failure::Refused { errno: libc::ENODEV, message: None, offset: None };
            return Err(NetlinkError::new(format!("look up link {link}"), refused).into());
        };
        self.know(target, &found);
        Ok(found.index)
    }

    fn attach_policy(&mut self, target: Target, plan: &Plan, request: &AttachRequest<'_>) -> Result<(), StepError> {
        let (end, place) = match target {
            Target::Host => (plan.host_end.as_ref(), Place::Host),
            Target::Pod => {
                let path = request.pod.path.to_owned();
                (Some(&plan.pod_end), Place::Pod { path, netns: self.pod_netns.id() })
            }
        };
        let Some((end, sink)) = end.zip(self.engine.policy.as_ref()) else {
            // The engine refuses such requests before it plans.
            return Ok(());
        };
        let (name, asked_mac) = (end.name.clone(), request.mac.or(request.lease.mac));
        let endpoint = Endpoint {
            attachment: request.key.clone(),
            ifindex: self.find_index(target, &name)?,
            ifname: name,
            place,
            mac: plan.pod_end.mac,
            link_local: link_local_of_another(
                plan.pod_end.mac,
                asked_mac.unwrap_or_else(|| request.key.mac()),
                &request.key,
            ),
            addresses: request.lease.addresses.iter().map(|a| a.address.addr()).collect(),
            workload: request.workload.clone(),
            labels: request.labels.clone(),
        };
        Ok(self.engine.run_in(self.netns(target), || sink.attach(&endpoint))??)
    }

    fn encode(&self, step: &Step) -> Message {
        let index = |link: &IfName| {
            self.known(step.target, link).expect("batch_end and apply_batch admit steps whose indices are known")
        };
        match &step.operation {
            Operation::CreateLink { link, transit, device, mtu, home } => netlink::create_link(&NewLink {
                name: transit.as_ref().unwrap_or(&link.name),
                kind: self.kind(step.target, device, *mtu),
                mac: device.takes_mac().then_some(link.mac),
                mtu: *mtu,
                netns: (*home != step.target).then(|| self.netns(*home)),
            }),
            Operation::MoveLink { link, to, alias } => {
                let change = LinkChange { alias: Some(alias), ..Default::default() };
                let there = self.netns(other(step.target));
                netlink::move_link(link.as_str(), index(link), there, Some(&to.name), &change)
            }
            Operation::Rename { link, to, alias } => {
                let change = LinkChange { rename: Some(to), alias: Some(alias), ..Default::default() };
                netlink::set_link(link, index(link), &change)
            }
            Operation::Tune { link, tuning } => {
                let crate::plan::Tuning { tx_queue_len, promisc, allmulti } = *tuning;
                let change = LinkChange { tx_queue_len, promisc, allmulti, ..Default::default() };
                netlink::set_link(link, index(link), &change)
            }
            Operation::SetMtu { link, mtu } => {
                netlink::set_link(link, index(link), &LinkChange { mtu: Some(mtu.get()), ..Default::default() })
            }
            Operation::SetMac { link, mac } => {
                netlink::set_link(link, index(link), &LinkChange { mac: Some(*mac), ..Default::default() })
            }
            Operation::NoArpReplies { link } => {
                netlink::set_link(link, index(link), &LinkChange { no_arp_replies: true, ..Default::default() })
            }
            Operation::Isolate { port } => netlink::isolate(port, index(port)),
            Operation::CreateVeth { near, far, mtu } => {
                let other = self.netns(other(step.target));
                netlink::create_veth(&NewVeth {
                    name: &near.name,
                    mac: near.mac,
                    mtu: mtu.map(|m| m.get()),
                    peer_name: &far.name,
                    peer_mac: far.mac,
                    peer_netns: std::os::fd::AsFd::as_fd(other),
                })
            }
            Operation::CreateBridge { bridge, mtu, vlan_filtering } => {
                netlink::create_bridge(&bridge.name, bridge.mac, mtu.map(|m| m.get()), *vlan_filtering)
            }
            Operation::FilterVlans { bridge } => netlink::filter_vlans(bridge, index(bridge), true),
            Operation::Join { link, bridge } => {
                let master = Some(index(bridge));
                netlink::set_link(link, index(link), &LinkChange { master, ..Default::default() })
            }
            Operation::AddVlans { link, vlans, tagging } => netlink::add_vlans(link, index(link), *vlans, *tagging),
            Operation::DeleteVlan { port, vlan } => netlink::delete_vlan(port, index(port), *vlan, false),
            Operation::Mark { link, alias } => {
                netlink::set_link(link, index(link), &LinkChange { alias: Some(alias), ..Default::default() })
            }
            Operation::NoLinkLocal { link } => {
                netlink::set_link(link, index(link), &LinkChange { no_ipv6_link_local: true, ..Default::default() })
            }
            Operation::ForwardIpv4 { link } => {
                netlink::set_link(link, index(link), &LinkChange { ipv4_forwarding: true, ..Default::default() })
            }
            Operation::Up { link, master } => {
                let master = master.as_ref().map(&index);
                netlink::set_link(link, index(link), &LinkChange { up: Some(true), master, ..Default::default() })
            }
            Operation::SettleCarrier { link } => netlink::link_by_name(link),
            Operation::SettleAddress { address, .. } => netlink::route_to(*address),
            Operation::Hairpin { port } => netlink::hairpin(port, index(port)),
            Operation::Shape { link, rate } => netlink::shape(link, index(link), *rate),
            Operation::AddClsact { link } => netlink::add_clsact(link, index(link)),
            Operation::Divert { link, through } => netlink::divert(link, index(link), through, index(through)),
            Operation::AddAddress { link, address } => netlink::add_address(link.as_str(), index(link), *address),
            Operation::AddRoute { link, route } => netlink::add_route(link.as_str(), &new_route(index(link), route)),
            Operation::AddNeighbour { link, address, mac } => {
                netlink::add_neighbour(link.as_str(), index(link), *address, *mac)
            }
            Operation::ForgetNeighbour { link, address } => {
                netlink::delete_neighbour(link.as_str(), index(link), *address)
            }
            Operation::AttachPolicy
            | Operation::Translate { .. }
            | Operation::WriteSetting { .. }
            | Operation::CreateTap { .. }
            | Operation::ProbeConflicts { .. }
            | Operation::Announce { .. }
            | Operation::ProbeGateways { .. } => unreachable!("these are no messages"),
        }
    }

    fn kind<'k>(&'k self, target: Target, device: &'k Device, mtu: Option<Mtu>) -> LinkKind<'k> {
        let index = |link: &IfName| self.known(target, link).expect("as for the step of which this is the device");
        match device {
            Device::Macvlan { parent, mode, sources } => {
                LinkKind::Macvlan { parent: index(parent), mode: *mode, sources }
            }
            Device::Ipvlan { parent, mode, flag } => {
                LinkKind::Ipvlan { parent: index(parent), mode: *mode, flag: *flag }
            }
            Device::Vlan { parent, id, protocol } => {
                LinkKind::Vlan { parent: index(parent), id: *id, protocol: *protocol }
            }
            Device::Dummy => LinkKind::Dummy,
            Device::Ifb => LinkKind::Ifb,
            Device::Vrf { table } => LinkKind::Vrf { table: *table },
            Device::Netkit { mode, peer } => LinkKind::Netkit {
                mode: *mode,
                policy: NetkitPolicy::Forward,
                peer_policy: NetkitPolicy::Forward,
                peer_name: &peer.name,
                peer_mac: device.takes_mac().then_some(peer.mac),
                peer_mtu: mtu,
                peer_netns: Some(self.netns(other(target))),
            },
        }
    }
}

impl Engine {
    /// Runs `f` where the device of an endpoint is; `pod` is the namespace of its pod.
    pub(crate) fn run_at<R: Send>(
        &self,
        endpoint: &Endpoint,
        pod: &NetNs,
        f: impl FnOnce() -> R + Send,
    ) -> Result<R, NetNsError> {
        self.run_in(if endpoint.place.is_host() { &self.host.0 } else { pod }, f)
    }

    /// Runs `f` in a namespace, entered as this engine does.
    pub(super) fn run_in<R: Send>(&self, netns: &NetNs, f: impl FnOnce() -> R + Send) -> Result<R, NetNsError> {
        match self.entry {
            _ if netns.id() == self.host.0.id() => netns.run_here_or_there(f),
            NamespaceEntry::Thread => netns.run(f),
            NamespaceEntry::InPlace => {
                let guard = NetNsGuard::enter(netns, &self.host.0)?;
                let value = f();
                drop(guard);
                Ok(value)
            }
        }
    }
}

fn other(target: Target) -> Target {
    match target {
        Target::Host => Target::Pod,
        Target::Pod => Target::Host,
    }
}

/// Whether the step is a netlink message, and may share a batch.
fn is_message(operation: &Operation) -> bool {
    !matches!(
        operation,
        Operation::AttachPolicy
            | Operation::Translate { .. }
            | Operation::WriteSetting { .. }
            | Operation::CreateTap { .. }
            | Operation::ProbeConflicts { .. }
            | Operation::Announce { .. }
            | Operation::ProbeGateways { .. }
    )
}

/// Whether the step has a bridge keep its ports apart.
fn keeps_apart(operation: &Operation) -> bool {
    matches!(operation, Operation::FilterVlans { .. } | Operation::AddVlans { .. } | Operation::DeleteVlan { .. })
}

/// The kernel's workers come after a second at most, but have to find a processor.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// The links whose indices a step's message holds.
fn indexed(operation: &Operation) -> Vec<&IfName> {
    match operation {
        Operation::CreateVeth { .. }
        | Operation::CreateBridge { .. }
        | Operation::SettleCarrier { .. }
        | Operation::SettleAddress { .. }
        | Operation::WriteSetting { .. }
        | Operation::CreateTap { .. }
        | Operation::Translate { .. }
        | Operation::AttachPolicy => Vec::new(),
        Operation::CreateLink { device, .. } => device.parent().into_iter().collect(),
        Operation::Up { link, master: Some(master) } | Operation::Join { link, bridge: master } => vec![link, master],
        Operation::Divert { link, through } => vec![link, through],
        Operation::Mark { link, .. }
        | Operation::NoLinkLocal { link }
        | Operation::ForwardIpv4 { link }
        | Operation::Up { link, master: None }
        | Operation::Hairpin { port: link }
        | Operation::Isolate { port: link }
        | Operation::MoveLink { link, .. }
        | Operation::Rename { link, .. }
        | Operation::Tune { link, .. }
        | Operation::SetMtu { link, .. }
        | Operation::SetMac { link, .. }
        | Operation::NoArpReplies { link }
        | Operation::FilterVlans { bridge: link }
        | Operation::AddVlans { link, .. }
        | Operation::DeleteVlan { port: link, .. }
        | Operation::Shape { link, .. }
        | Operation::AddClsact { link }
        | Operation::AddAddress { link, .. }
        | Operation::AddRoute { link, .. }
        | Operation::AddNeighbour { link, .. }
        | Operation::ForgetNeighbour { link, .. }
        | Operation::ProbeConflicts { link, .. }
        | Operation::Announce { link, .. }
        | Operation::ProbeGateways { link, .. } => vec![link],
    }
}

pub(super) fn new_route(index: IfIndex, route: &RouteSpec) -> NewRoute {
    let RouteSpec { destination, gateway, on_link, metric, table, source, metrics } = *route;
    let table = table.unwrap_or(libc::RT_TABLE_MAIN.into());
    NewRoute { index, destination, gateway, on_link, metric, table, source, metrics }
}

/// The link of this name, if there is one.
pub(super) fn look_up(socket: &mut Socket, link: &IfName) -> Result<Option<LinkView>, NetlinkError> {
    socket.link(link)
}

/// Deletes a link; one that vanished meanwhile, as with its namespace, is fine.
pub(super) fn delete(socket: &mut Socket, link: &LinkView) -> Result<(), TeardownError> {
    let deleted = socket.request(&netlink::delete_link(&link.name, link.index)).map(drop);
    gone_is_fine(deleted, &[libc::ENODEV])
}

pub(super) fn gone_is_fine(result: Result<(), NetlinkError>, errnos: &[i32]) -> Result<(), TeardownError> {
    match result {
        Err(error) if error.errno().is_some_and(|e| errnos.contains(&e)) => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests;
