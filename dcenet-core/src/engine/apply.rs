//! Carrying out a plan's steps and their undos.

use std::collections::HashMap;
use std::time::Duration;

use super::error::{StepError, TeardownError};
use super::{AttachRequest, Engine};
use crate::model::{AttachmentKey, IfIndex, IfName, Mtu};
use crate::netlink::{self, Failure, LinkChange, LinkView, Message, NetlinkError, NewRoute, NewVeth, Socket};
use crate::netns::NetNs;
use crate::plan::{Operation, Plan, RouteSpec, Step, Target, Undo, mark};
use crate::provider::Endpoint;

/// Sockets and indices of one attach.
pub(super) struct Session<'a> {
    engine: &'a Engine,
    pod_netns: &'a NetNs,
    host: Socket,
    pod: Option<Socket>,
    links: HashMap<(Target, IfName), (IfIndex, Option<u32>)>,
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
        Self { engine, pod_netns, host, pod: None, links: HashMap::new() }
    }

    /// The host's socket.
    pub(super) fn host(&mut self) -> &mut Socket {
        &mut self.host
    }

    /// Remembers a link's index, so that it need not be asked for.
    pub(super) fn know(&mut self, target: Target, link: &LinkView) {
        if let Ok(name) = link.name.parse() {
            self.links.insert((target, name), (link.index, Some(link.mtu)));
        }
    }

    /// A link's index, if it was learnt.
    pub(super) fn known(&self, target: Target, link: &IfName) -> Option<IfIndex> {
        self.links.get(&(target, link.clone())).map(|(index, _)| *index)
    }

    /// A link's MTU, if it was learnt.
    pub(super) fn known_mtu(&self, target: Target, link: &IfName) -> Option<Mtu> {
        let (_, mtu) = self.links.get(&(target, link.clone()))?;
        mtu.and_then(|mtu| Mtu::try_from(mtu).ok())
    }

    fn socket(&mut self, target: Target) -> Result<&mut Socket, StepError> {
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
        let mut next = 0;
        while next < plan.steps.len() && applied.failure.is_none() {
            let end = self.batch_end(&plan.steps, next);
            if let Err((step, error)) = self.apply_batch(plan, next..end, request, &mut applied.undo) {
                applied.failure = Some((step, error));
            }
            next = end;
        }
        applied
    }

    /// The end of the longest run of steps that can be sent at once: one target, every index known.
    fn batch_end(&self, steps: &[Step], start: usize) -> usize {
        let first = &steps[start];
        if first.operation == Operation::AttachPolicy {
            return start + 1;
        }
        let joins = |step: &&Step| {
            step.target == first.target
                && step.operation != Operation::AttachPolicy
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
        if steps[0].operation == Operation::AttachPolicy {
            undo.extend(steps[0].undo.clone());
            return self.attach_policy(plan, request).map_err(|e| (start, e));
        }
        let target = steps[0].target;
        for link in indexed(&steps[0].operation) {
            self.find_index(target, link).map_err(|e| (start, e))?;
        }
        let messages: Vec<Message> = steps.iter().map(|step| self.encode(step)).collect();
        let socket = self.socket(target).map_err(|e| (start, e))?;
        let outcomes = socket.batch(&messages);
        let mut failure = None;
        let mut unsettled = Vec::new();
        for ((offset, step), outcome) in steps.iter().enumerate().zip(outcomes) {
            match outcome {
                Ok(replies) => {
                    undo.extend(step.undo.clone());
                    if let Operation::SettleCarrier { link } = &step.operation
                        && !replies.iter().any(|r| netlink::is_operational(&r.payload))
                    {
                        unsettled.push((start + offset, link));
                    }
                    let made = replies.iter().filter(|r| r.kind == libc::RTM_NEWLINK);
                    for link in made.filter_map(|r| LinkView::parse(&r.payload)) {
                        self.learn(step, &link);
                    }
                }
                Err(error) if error.errno().is_some_and(|e| step.tolerate.contains(&e)) => {}
                Err(error) => {
                    if error.may_have_happened() {
                        undo.extend(step.undo.clone());
                    }
                    // Later failures of the batch mostly follow from the first.
                    failure.get_or_insert((start + offset, error.into()));
                }
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        for (step, link) in unsettled {
            self.await_carrier(target, link).map_err(|e| (step, e))?;
        }
        Ok(())
    }

    /// Waits for the kernel to act on a carrier, where asking for the link did not make it.
    fn await_carrier(&mut self, target: Target, link: &IfName) -> Result<(), StepError> {
        let listener = match target {
            Target::Host => self.engine.host_socket()?,
            Target::Pod => self.engine.pod_socket(self.pod_netns)?,
        };
        if !self.socket(target)?.await_operational(listener, link, CARRIER_LIMIT)? {
            // All is done that can be: it transmits as soon as it has a carrier.
            tracing::warn!(%link, "no carrier yet");
        }
        Ok(())
    }

    /// Takes indices from the echo of a creation.
    fn learn(&mut self, step: &Step, link: &LinkView) {
        self.know(step.target, link);
        if let Operation::CreateVeth { far, .. } = &step.operation
            && let Some(peer) = link.peer
        {
            let other = match step.target {
                Target::Host => Target::Pod,
                Target::Pod => Target::Host,
            };
            self.links.insert((other, far.name.clone()), (peer, Some(link.mtu)));
        }
    }

    fn find_index(&mut self, target: Target, link: &IfName) -> Result<IfIndex, StepError> {
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

    fn attach_policy(&mut self, plan: &Plan, request: &AttachRequest<'_>) -> Result<(), StepError> {
        let Some((end, sink)) = plan.host_end.as_ref().zip(self.engine.policy.as_ref()) else {
            // The engine refuses such requests before it plans.
            return Ok(());
        };
        let endpoint = Endpoint {
            attachment: request.key.clone(),
            ifindex: self.find_index(Target::Host, &end.name)?,
            ifname: end.name.clone(),
            mac: plan.pod_end.mac,
            addresses: request.lease.addresses.iter().map(|a| a.address.addr()).collect(),
            workload: request.workload.clone(),
            labels: request.labels.clone(),
        };
        Ok(self.engine.host.0.run_here_or_there(|| sink.attach(&endpoint))??)
    }

    fn encode(&self, step: &Step) -> Message {
        let index = |link: &IfName| {
            self.known(step.target, link).expect("batch_end and apply_batch admit steps whose indices are known")
        };
        match &step.operation {
            Operation::CreateVeth { near, far, mtu } => {
                let other = match step.target {
                    Target::Host => self.pod_netns,
                    Target::Pod => &self.engine.host.0,
                };
                netlink::create_veth(&NewVeth {
                    name: &near.name,
                    mac: near.mac,
                    mtu: mtu.map(|m| m.get()),
                    peer_name: &far.name,
                    peer_mac: far.mac,
                    peer_netns: std::os::fd::AsFd::as_fd(other),
                })
            }
            Operation::CreateBridge { bridge, mtu } => {
                netlink::create_bridge(&bridge.name, bridge.mac, mtu.map(|m| m.get()))
            }
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
                netlink::set_link(link, index(link), &LinkChange { up: true, master, ..Default::default() })
            }
            Operation::SettleCarrier { link } => netlink::link_by_name(link),
            Operation::Hairpin { port } => netlink::hairpin(port, index(port)),
            Operation::AddAddress { link, address } => netlink::add_address(link.as_str(), index(link), *address),
            Operation::AddRoute { link, route } => netlink::add_route(link.as_str(), &new_route(index(link), route)),
            Operation::AddNeighbour { link, address, mac } => {
                netlink::add_neighbour(link.as_str(), index(link), *address, *mac)
            }
            Operation::ForgetNeighbour { link, address } => {
                netlink::delete_neighbour(link.as_str(), index(link), *address)
            }
            Operation::AttachPolicy => unreachable!("a policy step is a batch of its own"),
        }
    }
}

/// The kernel's worker comes after a second at most, but has to find a processor.
const CARRIER_LIMIT: Duration = Duration::from_secs(10);

/// The links whose indices a step's message holds.
fn indexed(operation: &Operation) -> Vec<&IfName> {
    match operation {
        Operation::CreateVeth { .. }
        | Operation::CreateBridge { .. }
        | Operation::SettleCarrier { .. }
        | Operation::AttachPolicy => Vec::new(),
        Operation::Up { link, master: Some(master) } => vec![link, master],
        Operation::Mark { link, .. }
        | Operation::NoLinkLocal { link }
        | Operation::ForwardIpv4 { link }
        | Operation::Up { link, master: None }
        | Operation::Hairpin { port: link }
        | Operation::AddAddress { link, .. }
        | Operation::AddRoute { link, .. }
        | Operation::AddNeighbour { link, .. }
        | Operation::ForgetNeighbour { link, .. } => vec![link],
    }
}

fn new_route(index: IfIndex, route: &RouteSpec) -> NewRoute {
    let RouteSpec { destination, gateway, on_link, metric, table } = *route;
    let table = table.unwrap_or(libc::RT_TABLE_MAIN.into());
    NewRoute { index, destination, gateway, on_link, metric, table }
}

/// The link of this name, if there is one.
pub(super) fn look_up(socket: &mut Socket, link: &IfName) -> Result<Option<LinkView>, NetlinkError> {
    socket.link(link)
}

impl Engine {
    /// Takes back what `undo` lists, in reverse; goes on after errors and returns them.
    ///
    /// Own devices go first, for shared ones stay while they have ports. Policy goes last, and only when they are gone: a
    /// device that is still there must not carry a packet without it.
    pub(super) fn take_back(&self, undo: &[Undo], key: &AttachmentKey, pod: Option<&NetNs>) -> Vec<TeardownError> {
        let (policy, devices): (Vec<_>, Vec<_>) = undo.iter().rev().partition(|u| matches!(u, Undo::DetachPolicy));
        let (shared, own): (Vec<_>, Vec<_>) = devices.into_iter().partition(|u| u.is_shared());
        let mut errors = Vec::new();
        let mut host = None;
        let mut take_back = |undo: &Undo| {
            let failed = self.take_back_one(undo, key, pod, &mut host);
            failed.inspect_err(|error| tracing::warn!(%key, ?undo, %error, "could not take back")).err()
        };
        errors.extend(own.into_iter().filter_map(&mut take_back));
        let gone = errors.is_empty();
        errors.extend(shared.into_iter().chain(policy.into_iter().filter(|_| gone)).filter_map(take_back));
        errors
    }

    fn take_back_one(
        &self,
        undo: &Undo,
        key: &AttachmentKey,
        pod: Option<&NetNs>,
        host: &mut Option<Socket>,
    ) -> Result<(), TeardownError> {
        if let Undo::DetachPolicy = undo {
            let Some(sink) = &self.policy else {
                tracing::warn!(%key, "under policy, and this program has no policy backend: its state is left");
                return Ok(());
            };
            return Ok(self.host.0.run_here_or_there(|| sink.detach(key))??);
        }
        let mut in_pod = None;
        let socket = match (undo, pod) {
            (Undo::DeleteLink { target: Target::Pod, .. }, None) => return Ok(()),
            (Undo::DeleteLink { target: Target::Pod, .. }, Some(pod)) => in_pod.insert(self.pod_socket(pod)?),
            _ => match host {
                Some(socket) => socket,
                none => none.insert(self.host_socket()?),
            },
        };
        match undo {
            Undo::DetachPolicy => Ok(()),
            Undo::DeleteLink { end, .. } => {
                let Some(link) = look_up(socket, &end.name)? else { return Ok(()) };
                if link.mac != Some(end.mac) && link.alias.as_deref() != Some(&mark(key)) {
                    tracing::warn!(%key, link = %end.name, "a link of this name is not of this attachment; left alone");
                    return Ok(());
                }
                delete(socket, &link)
            }
            Undo::DeleteIdleBridge(end) => {
                let Some(link) = look_up(socket, &end.name)? else { return Ok(()) };
                if link.mac != Some(end.mac) || has_ports(socket, link.index)? {
                    return Ok(());
                }
                delete(socket, &link)
            }
            Undo::DeleteIdleAddress { link: name, address } => {
                let Some(link) = look_up(socket, name)? else { return Ok(()) };
                if has_ports(socket, link.index)? {
                    return Ok(());
                }
                let message = netlink::delete_address(name.as_str(), link.index, *address);
                gone_is_fine(socket.request(&message).map(drop), &[libc::EADDRNOTAVAIL, libc::ENODEV])
            }
        }
    }
}

/// Deletes a link; one that vanished meanwhile, as with its namespace, is fine.
pub(super) fn delete(socket: &mut Socket, link: &LinkView) -> Result<(), TeardownError> {
    let deleted = socket.request(&netlink::delete_link(&link.name, link.index)).map(drop);
    gone_is_fine(deleted, &[libc::ENODEV])
}

/// Whether a bridge has ports.
pub(super) fn has_ports(socket: &mut Socket, bridge: IfIndex) -> Result<bool, NetlinkError> {
    let ports = socket.dump(&netlink::link_dump(Some(bridge)))?;
    Ok(ports.iter().filter_map(|r| LinkView::parse(&r.payload)).any(|l| l.master == Some(bridge)))
}

fn gone_is_fine(result: Result<(), NetlinkError>, errnos: &[i32]) -> Result<(), TeardownError> {
    match result {
        Err(error) if error.errno().is_some_and(|e| errnos.contains(&e)) => Ok(()),
        other => Ok(other?),
    }
}
