//! Attaching.

use super::apply::{Session, look_up};
use super::error::{AttachError, DetachErrors, StepError};
use super::{AttachRequest, Attached, Engine};
use crate::journal::{Done, Entry, Interface, Record};
use crate::link::{HostView, LinkConfig, LinkRequest, PlanError, Policy};
use crate::model::MacAddr;
use crate::netlink::{self, AddressView, CreateLinkError, IpvlanMode, Socket};
use crate::netns::NetNs;
use crate::plan::{Device, Operation, Plan, Target, Undo, is_mark_of, mark};

impl Engine {
    /// Makes an attachment, or returns the one that stands. Who leases addresses for it uses [`Engine::hold`] instead, and
    /// [`Hold::attach`](super::Hold::attach).
    ///
    /// # Errors
    /// As [`Hold::attach`](super::Hold::attach).
    pub fn attach(&self, request: &AttachRequest<'_>) -> Result<Attached, AttachError> {
        self.admit(request)?;
        self.hold(&request.key)?.attach(request)
    }

    /// Refuses what could never be attached.
    pub(super) fn admit(&self, request: &AttachRequest<'_>) -> Result<(), AttachError> {
        if request.pod.netns.id() == self.host.0.id() {
            return Err(AttachError::HostNamespace { path: request.pod.path.to_owned() });
        }
        if request.policy == Policy::Wanted && self.policy.is_none() {
            return Err(AttachError::NoPolicyBackend { key: request.key.clone() });
        }
        Ok(())
    }

    /// Answers a repeated attach; `None` where what is recorded is unfinished or gone.
    pub(super) fn resume(&self, record: &Record, request: &AttachRequest<'_>) -> Result<Option<Attached>, AttachError> {
        let key = &request.key;
        if record.key != *key {
            return Err(AttachError::IdCollision { key: key.clone(), other: Box::new(record.key.clone()) });
        }
        let Some(attached) = Attached::from_record(record, true) else { return Ok(None) };
        if record.boot != self.journal.boot() {
            return Ok(None);
        }
        if let Some(end) = &record.host_end {
            let mut socket = self.host_socket()?;
            let link = look_up(&mut socket, &end.name).map_err(AttachError::Look)?;
            if link.is_none_or(|l| Some(l.index) != attached.host_index || l.mac != Some(end.mac)) {
                return Ok(None);
            }
        } else if !self.stands_in_pod(record, request.pod.netns)? {
            return Ok(None);
        }
        let difference = if record.netns != request.pod.netns.id() {
            "another network namespace"
        } else if record.fingerprint != request.fingerprint {
            "another configuration"
        } else if !self.renew_vlans(record, request)? {
            return Ok(None);
        } else {
            // Whoever loads a rule set of his own often flushes all others first.
            if !self.missing_translation(record).map_err(AttachError::Look)?.is_empty() {
                let entered = self.translate(record.translation(), key);
                entered.map_err(|cause| AttachError::Step { cause, rollback: Vec::new() })?;
            }
            self.renew_settings(record, request.pod.netns)
                .and_then(|()| self.renew_policy(record, request))
                .map_err(|cause| AttachError::Step { cause, rollback: Vec::new() })?;
            return Ok(Some(attached));
        };
        Err(AttachError::AlreadyAttached { key: key.clone(), difference })
    }

    /// Has another plugin's device under policy anew, where an attempt to lift it was broken off: the device is not made anew, as
    /// one of ours would be.
    fn renew_policy(&self, record: &Record, request: &AttachRequest<'_>) -> Result<(), StepError> {
        let (Policy::Wanted, LinkConfig::Chained(_), Some(sink)) = (record.policy, &record.link, &self.policy) else {
            return Ok(());
        };
        let Some(endpoint) = record.endpoint() else { return Ok(()) };
        let netns = if endpoint.place.is_host() { &self.host.0 } else { request.pod.netns };
        let renew = || match sink.missing(&endpoint)? {
            Some(_) => sink.attach(&endpoint),
            None => Ok(()),
        };
        Ok(self.run_in(netns, renew)??)
    }

    /// Whether a device that lives in the pod alone is still there.
    fn stands_in_pod(&self, record: &Record, netns: &NetNs) -> Result<bool, AttachError> {
        let opened;
        let netns = if netns.id() == record.netns {
            netns
        } else {
            match NetNs::open(&record.netns_path) {
                Ok(found) if found.id() == record.netns => {
                    opened = found;
                    &opened
                }
                Ok(_) => return Ok(false),
                Err(error) if error.is_gone() => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        };
        let link = look_up(&mut self.pod_socket(netns)?, &record.key.ifname).map_err(AttachError::Look)?;
        Ok(link.is_some_and(|l| l.alias.is_some_and(|alias| is_mark_of(&record.key, &alias))))
    }

    /// Refuses an ipvlan device whose mode would take a pod's policy away. Nobody attaches in the mode `l3s` meanwhile.
    fn check_port(&self, request: &AttachRequest<'_>) -> Result<(), AttachError> {
        let LinkConfig::Ipvlan(config) = &request.link else { return Ok(()) };
        if request.policy == Policy::None && config.mode != IpvlanMode::L3s {
            return Ok(());
        }
        let is_other = |record: &Record| record.key != request.key && record.boot == self.journal.boot();
        for record in self.journal.records_that(is_other)? {
            if let LinkConfig::Ipvlan(other) = &record.link {
                config.check_beside(request.policy, &record.key, other, record.policy)?;
            }
        }
        Ok(())
    }

    /// Attaches where nothing is recorded. `recorded` is what the record says afterwards, if that is anything.
    pub(super) fn attach_new(
        &self,
        request: &AttachRequest<'_>,
        entry: &mut Entry,
        recorded: &mut Option<Box<Record>>,
    ) -> Result<Attached, AttachError> {
        let mut link_request = link_request(request);
        let mac = link_request.mac;
        let driver = request.link.driver();
        let Some(wish) = driver.device(&link_request)? else {
            // A call that was killed before it had written a record may have lent one, for a link of another kind.
            let left = self.has_device(&request.key).and_then(|lent| match lent {
                true => self.release_devices(&request.key),
                false => Ok(()),
            });
            left.map_err(|error| AttachError::Leftover {
                key: request.key.clone(),
                source: DetachErrors(vec![error]),
            })?;
            return self.attach_with(request, &link_request, entry, recorded);
        };
        link_request.device = Some(self.lend_device(request, wish, mac)?);
        let attached = self.attach_with(request, &link_request, entry, recorded);
        if attached.is_err() && recorded.is_none() {
            // It may not have come so far that a step of the plan took it back.
            if let Err(error) = self.release_devices(&request.key) {
                tracing::error!(key = %request.key, %error, "a device stays lent until it is detached");
            }
        }
        attached
    }

    /// Attaches by whatever device was lent for it.
    fn attach_with(
        &self,
        request: &AttachRequest<'_>,
        link_request: &LinkRequest,
        entry: &mut Entry,
        recorded: &mut Option<Box<Record>>,
    ) -> Result<Attached, AttachError> {
        let mac = link_request.mac;
        let driver = request.link.driver();
        let needs = driver.needs(link_request);
        let mut session = Session::new(self, request.pod.netns, self.host_socket()?);
        let mut look = || -> Result<(HostView, Plan), AttachError> {
            let view = view(session.host(), &needs).map_err(AttachError::Look)?;
            let mut plan = driver.plan(link_request, &view)?;
            super::setting::add_to(&mut plan, request.link.sysctl(), &request.key.ifname)?;
            super::translate::add_to(&mut plan, &request.nat, request.policy, &link_request.addresses)?;
            Ok((view, plan))
        };
        // Who relies on shared devices keeps those from removing them who made them and failed.
        let mut lock = if needs.is_empty() { None } else { Some(self.shared.relying(&self.host)?) };
        let (mut host, mut plan) = look()?;
        let opens_port = matches!(&request.link, LinkConfig::Ipvlan(config) if config.mode == IpvlanMode::L3s);
        if plan.makes_shared() || opens_port {
            drop(lock.take());
            lock = Some(self.shared.changing(&self.host)?);
            (host, plan) = look()?;
            super::shared::look_at_own_end(&mut plan, &host, session.host())?;
        }
        self.check_port(request)?;
        let settings = self.lock_settings_of(&plan, request)?;
        self.look_at_settings(&mut plan, request)?;
        for link in &host.links {
            session.know(Target::Host, link);
        }
        if let Some(device) = &link_request.device {
            session.know_index(Target::Host, &device.name, device.index);
        }

        let mut record = Box::new(self.record_of(request, mac, &plan));
        entry.begin(&record)?;
        drop(settings);
        let applied = session.apply(&plan, request);
        let mut undo = applied.undo;
        let mut failure = applied.failure;
        if failure.is_none() {
            let settings = self.settings_of(request.link.sysctl(), &request.key.ifname, request.pod.netns);
            let completed = settings.and_then(|settings| {
                let done = Done { settings, ..done(request, &plan, &host, &session) };
                entry.complete(&done)?;
                Ok(done)
            });
            match completed {
                Ok(done) => record.done = Some(done),
                Err(error) => failure = Some((plan.steps.len(), error)),
            }
        }
        let outcome = match failure {
            None => {
                let attached = Attached::from_record(&record, false).expect("the completion was just set");
                *recorded = Some(record);
                Ok(attached)
            }
            Some((step, cause)) => {
                let named = self.explain(&mut session, &plan, step, &cause, request, &mut undo);
                // Who went meanwhile has left it to this attach to give settings back, also those that it did not come to make.
                let is_left = |own: &&Undo| matches!(own, Undo::RestoreSetting { .. }) && !undo.contains(own);
                let left: Vec<Undo> = record.undo.iter().filter(is_left).cloned().collect();
                undo.extend(left);
                let rollback = self.take_back(&undo, &request.key, Some(request.pod.netns));
                if !rollback.is_empty() {
                    *recorded = Some(record);
                }
                Err(match named {
                    Some(named) if rollback.is_empty() => named,
                    _ => AttachError::Step { cause, rollback },
                })
            }
        };
        drop(lock);
        outcome
    }

    /// What is written down before the plan is carried out.
    pub(super) fn record_of(&self, request: &AttachRequest<'_>, mac: MacAddr, plan: &Plan) -> Record {
        Record {
            key: request.key.clone(),
            boot: self.journal.boot().to_owned(),
            host: Some(self.host.0.id()),
            netns_path: request.pod.path.to_owned(),
            netns: request.pod.netns.id(),
            fingerprint: request.fingerprint.clone(),
            link: request.link.clone(),
            lease: request.lease.clone(),
            mac,
            workload: request.workload.clone(),
            labels: request.labels.clone(),
            policy: request.policy,
            host_end: plan.host_end.clone(),
            undo: plan.steps.iter().filter_map(|s| s.undo.clone()).collect(),
            done: None,
        }
    }

    /// Says what stands in the way of a device, for the kernel says only "exists" or "busy".
    fn explain(
        &self,
        session: &mut Session<'_>,
        plan: &Plan,
        step: usize,
        cause: &StepError,
        request: &AttachRequest<'_>,
        undo: &mut Vec<Undo>,
    ) -> Option<AttachError> {
        let errno = match cause {
            StepError::Netlink(error) | StepError::Create(CreateLinkError::Netlink(error)) => error.errno()?,
            _ => return None,
        };
        let step = plan.steps.get(step)?;
        match (&step.operation, errno) {
            (
                Operation::CreateVeth { .. } | Operation::CreateLink { device: Device::Netkit { .. }, .. },
                libc::EEXIST,
            ) => self.explain_pair(session, plan, request, undo),
            (Operation::CreateLink { device, .. }, libc::EBUSY) => {
                let reason = "serves another purpose: it is a port of a bridge or bond, or the parent of devices of \
                              another kind; name another link, or free it";
                Some(PlanError::Conflict { link: device.parent()?.clone(), reason: reason.to_owned() }.into())
            }
            (Operation::CreateLink { device: Device::Vlan { parent, id, .. }, .. }, libc::EEXIST) => {
                let reason = format!(
                    "its VLAN {id} has a device already, here or in another namespace; remove that, use another VLAN, \
                     or a macvlan on that device"
                );
                Some(PlanError::Conflict { link: parent.clone(), reason }.into())
            }
            (Operation::CreateLink { .. } | Operation::Rename { .. } | Operation::MoveLink { .. }, libc::EEXIST) => {
                self.explain_in_pod(session, plan, request, undo)
            }
            _ => None,
        }
    }

    /// One of the two names of a pair was taken.
    fn explain_pair(
        &self,
        session: &mut Session<'_>,
        plan: &Plan,
        request: &AttachRequest<'_>,
        undo: &mut Vec<Undo>,
    ) -> Option<AttachError> {
        if let Some(end) = &plan.host_end
            && let Ok(Some(link)) = look_up(session.host(), &end.name)
        {
            if link.mac == Some(end.mac) || link.alias.as_deref() == Some(&mark(&request.key)) {
                // Ours, of an attach whose record was lost: cleared now, so that the next attempt succeeds.
                undo.push(Undo::DeleteLink { target: Target::Host, end: end.clone() });
                return None;
            }
            return Some(AttachError::HostNameTaken { ifname: end.name.clone() });
        }
        let (ifname, netns) = (plan.pod_end.name.clone(), request.pod.path.to_owned());
        Some(AttachError::InterfaceExists { ifname, netns })
    }

    /// The name in the pod was taken.
    fn explain_in_pod(
        &self,
        session: &mut Session<'_>,
        plan: &Plan,
        request: &AttachRequest<'_>,
        undo: &mut Vec<Undo>,
    ) -> Option<AttachError> {
        let ifname = plan.pod_end.name.clone();
        match look_up(session.pod().ok()?, &ifname) {
            Ok(Some(link)) if link.alias.as_deref() != Some(&mark(&request.key)) => {
                Some(AttachError::InterfaceExists { ifname, netns: request.pod.path.to_owned() })
            }
            // Ours, of an attach whose record was lost, as above.
            _ => {
                undo.push(Undo::DeletePodLink { link: ifname, transit: request.key.id().host_ifname() });
                None
            }
        }
    }
}

pub(super) fn link_request(request: &AttachRequest<'_>) -> LinkRequest {
    LinkRequest {
        key: request.key.clone(),
        mac: request.mac.or(request.lease.mac).unwrap_or_else(|| request.key.mac()),
        addresses: request.lease.addresses.clone(),
        routes: request.lease.routes.clone(),
        policy: request.policy,
        device: None,
    }
}

/// What was asked for, as the record tells.
pub(super) fn recorded(record: &Record) -> LinkRequest {
    LinkRequest {
        key: record.key.clone(),
        mac: record.mac,
        addresses: record.lease.addresses.clone(),
        routes: record.lease.routes.clone(),
        policy: record.policy,
        device: record.lent_device(),
    }
}

pub(super) fn view(socket: &mut Socket, needs: &[crate::link::Need]) -> Result<HostView, crate::netlink::NetlinkError> {
    let mut view = HostView::default();
    for need in needs {
        let Some(link) = look_up(socket, &need.link)? else { continue };
        if need.addresses {
            let addresses = socket.dump(&netlink::address_dump(Some(link.index)))?;
            let addresses = addresses.iter().filter_map(|r| AddressView::parse(&r.payload));
            view.addresses.extend(addresses.filter(|a| a.index == link.index));
        }
        view.links.push(link);
    }
    Ok(view)
}

pub(super) fn done(request: &AttachRequest<'_>, plan: &Plan, host: &HostView, session: &Session<'_>) -> Done {
    let mut interfaces = Vec::with_capacity(3);
    if let Some(bridge) = &plan.bridge {
        let made = plan.steps.iter().find_map(|step| match &step.operation {
            Operation::CreateBridge { bridge, .. } => Some(bridge.mac),
            _ => None,
        });
        if let Some(mac) = made.or(host.link(bridge).and_then(|l| l.mac)) {
            // Its MTU follows its ports, so that no number would stay true.
            interfaces.push(Interface { name: bridge.to_string(), mac, mtu: None, sandbox: None });
        }
    }
    if let Some(end) = &plan.host_end {
        let mtu = session.known_mtu(Target::Host, &end.name);
        interfaces.push(Interface { name: end.name.to_string(), mac: end.mac, mtu, sandbox: None });
    }
    let pod = &plan.pod_end;
    let mtu = session.known_mtu(Target::Pod, &pod.name);
    let sandbox = Some(request.pod.path.to_owned());
    interfaces.push(Interface { name: pod.name.to_string(), mac: pod.mac, mtu, sandbox });
    let host_index = plan.host_end.as_ref().and_then(|end| session.known(Target::Host, &end.name));
    let pod_index = if plan.host_end.is_none() { session.known(Target::Pod, &plan.pod_end.name) } else { None };
    Done { interfaces, host_index, pod_index, settings: Default::default() }
}
