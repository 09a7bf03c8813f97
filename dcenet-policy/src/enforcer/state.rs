//! What the owner knows, and who may change it.

mod admit;
mod carry;
mod names;
mod settle;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_core::model::{AttachmentId, AttachmentKey, IfIndex};
use dcenet_core::netns::Host;
use dcenet_core::provider::{Endpoint, Enforcement, Place};
use dcenet_ebpf::attach::{AttachError, Attacher, Direction, Hook, Owner};
use dcenet_ebpf::pin::Pins;
use parking_lot::{Condvar, Mutex, RwLock};

pub(in crate::enforcer) use self::carry::Again;
use super::apply::Applier;
use super::cells::Cells;
use super::clock::{self, Clock};
use super::flows::Names as RuleNames;
use super::guard::{Guards, Refusal};
use super::inside::{Inside, InsideLink};
use super::learnt::{self, Learnt};
use super::node::{NodeMaps, pin_defaults, place_answerers};
use super::protocol::{Reply, Request, Stranger};
use super::server::Answer;
use super::sweep::{self, Listener};
use super::{EndpointStatus, EnforcerConfig, EnforcerError, Phase, Report, Tools, open_pins};
use crate::isolation::Fault;
use crate::model::{Cluster, Pod, PodId};

/// Shared by the enforcer, its socket and its retrying thread.
pub(crate) struct Shared {
    pub(crate) host: Host,
    pub(crate) config: EnforcerConfig,
    pub(crate) tools: Tools,
    pub(crate) pins: Pins,
    pub(crate) inside: Inside,
    pub(crate) guards: Guards,
    pub(crate) maps: NodeMaps,
    /// Held for moments only.
    pub(crate) state: Mutex<State>,
    /// Signalled whenever an endpoint's phase may have changed.
    changed: Condvar,
    /// Held while a change is carried out; taken before `state`.
    applier: Mutex<Applier>,
    /// Held for one endpoint's time; taken after both.
    pub(crate) cells: Mutex<Cells>,
    pub(crate) names: Arc<RwLock<RuleNames>>,
    pub(crate) listener: Listener,
    pub(super) clock: Mutex<Clock>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What was told.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Whether changes are carried out.
    pub(crate) started: bool,
    stopping: bool,
    /// Counts changes.
    revision: u64,
    /// The revision that is in force, but for the endpoints that have a failure.
    applied: u64,
    retry_at: Option<Instant>,
    /// When it is tried again to take out of the tables what is over of names, and why that failed.
    names_at: Option<Instant>,
    names_failure: Option<String>,
    /// What policies are compiled for: `told` and the endpoints, joined. Its names are those that are in force.
    cluster: Arc<Cluster>,
    /// The pods of it that are not what they were when a change was last carried out, where nothing else of it may be.
    touched: Option<BTreeSet<PodId>>,
    /// Pods as the sources told them.
    told: BTreeMap<PodId, Pod>,
    endpoints: BTreeMap<AttachmentKey, Known>,
    /// Who went, or lost the programs, since a change was last carried out: of these nothing is in force, whoever has such
    /// a name now.
    bereft: BTreeSet<AttachmentKey>,
    /// What was found attached when the owner started: endpoints under an earlier owner's last verdicts.
    adopted: BTreeMap<AttachmentId, u16>,
    /// Who was found under a guard then, and is not known yet: it was wanted.
    guarded: BTreeSet<AttachmentId>,
    /// What the latest change has closed, or does not tell of.
    pub(crate) faults: Vec<Fault>,
    pub(super) learnt: Learnt,
    node: String,
}

/// An endpoint of this node.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) endpoint: Endpoint,
    pub(crate) phase: Phase,
    pub(crate) slot: Option<u16>,
    pub(crate) generation: u32,
    pub(crate) failure: Option<String>,
    /// Whether it wants a guard on its parent.
    pub(crate) guarded: bool,
    /// The revision as of which the endpoint is what it is; 0 for one that was adopted, as its verdicts are the last of
    /// an earlier owner in any case.
    noted: u64,
    /// The revision as of which it has been known on its device without a break.
    since: u64,
}

impl Known {
    /// Whether an earlier owner's programs may be on its hooks.
    pub(crate) fn is_adopted(&self) -> bool {
        self.noted == 0
    }

    /// Whether its device is this one.
    pub(crate) fn is_on(&self, device: IfIndex, place: &Place) -> bool {
        self.endpoint.ifindex == device && self.endpoint.place == *place
    }

    pub(crate) fn pod(&self) -> Option<PodId> {
        self.endpoint.workload.as_ref().map(|w| PodId::new(w.namespace(), w.name()))
    }
}

/// What carrying out a change did to one endpoint.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    /// Its verdicts are those of the change.
    Enforced { slot: u16, generation: u32 },
    /// They are those before.
    Failed { reason: String, phase: Phase },
    /// Nothing but another configuration can help it.
    Hopeless { reason: String },
    /// Its device is no more.
    Gone,
}

impl State {
    pub(super) fn cluster_ref(&self) -> &Cluster {
        &self.cluster
    }

    pub(crate) fn cluster_mut(&mut self) -> &mut Cluster {
        self.touched = None;
        self.learnt.forget_asked();
        Arc::make_mut(&mut self.cluster)
    }

    /// Notes an endpoint: one that is told of now, and whether it wants a guard, or (`None`) one that was recorded some time ago.
    pub(crate) fn note(&mut self, endpoint: &Endpoint, wish: Option<bool>) {
        let was_guarded = self.guarded.remove(&endpoint.attachment.id());
        let guarded = wish.unwrap_or(was_guarded);
        let before = self.endpoints.get(&endpoint.attachment);
        let is_same = |known: &Known| known.endpoint == *endpoint && known.guarded == guarded;
        if before.is_some_and(|known| wish.is_none() || is_same(known)) {
            return;
        }
        // A device that was made anew carries the default; the same one keeps what it has.
        let same_device = before.filter(|known| known.is_on(endpoint.ifindex, &endpoint.place));
        // Whoever notes a change counts it afterwards.
        let noted = self.revision + 1;
        let known = match same_device {
            Some(known) => Known { endpoint: endpoint.clone(), guarded, noted, ..known.clone() },
            None => {
                let slot = self.adopted.remove(&endpoint.attachment.id());
                let since = noted;
                let (phase, noted) = if slot.is_some() { (Phase::Enforced, 0) } else { (Phase::Default, noted) };
                Known { endpoint: endpoint.clone(), phase, slot, generation: 0, failure: None, guarded, noted, since }
            }
        };
        let (old, new) = (before.and_then(Known::pod), known.pod());
        self.endpoints.insert(endpoint.attachment.clone(), known);
        old.into_iter().chain(new).collect::<BTreeSet<_>>().into_iter().for_each(|pod| self.join(pod));
    }

    /// Whether the endpoint is known, on this device.
    pub(crate) fn has(&self, endpoint: &Endpoint) -> bool {
        self.endpoints.get(&endpoint.attachment).is_some_and(|known| known.is_on(endpoint.ifindex, &endpoint.place))
    }

    /// Whether the endpoint has been told ever since, on this device.
    pub(in crate::enforcer) fn is_still(&self, then: &Known) -> bool {
        let known = self.endpoints.get(&then.endpoint.attachment);
        known.is_some_and(|known| known.since == then.since && known.is_on(then.endpoint.ifindex, &then.endpoint.place))
    }

    /// Notes that the default stands in for an endpoint's own programs.
    fn lost(&mut self, attachment: &AttachmentKey) {
        if let Some(known) = self.endpoints.get_mut(attachment) {
            known.phase = Phase::Default;
            self.bereft.insert(attachment.clone());
        }
    }

    fn forget(&mut self, attachment: &AttachmentKey) {
        // One that is made anew with the same name has a new device, which nobody has put under verdicts.
        self.adopted.remove(&attachment.id());
        self.guarded.remove(&attachment.id());
        let Some(known) = self.endpoints.remove(attachment) else { return };
        self.bereft.insert(attachment.clone());
        // Sources may have given its addresses to others already.
        let heirs =
            self.told.iter().filter(|(_, pod)| known.endpoint.addresses.iter().any(|a| pod.addresses.contains(a)));
        let pods: BTreeSet<PodId> = heirs.map(|(id, _)| id.clone()).chain(known.pod()).collect();
        pods.into_iter().for_each(|pod| self.join(pod));
    }

    /// Whether just this was told of a pod last, and no address of it is an endpoint's instead.
    pub(crate) fn has_pod(&self, id: &PodId, pod: &Pod) -> bool {
        let joined = self.cluster.pods.get(id);
        self.told.get(id) == Some(pod) && joined.is_some_and(|joined| joined.addresses.is_superset(&pod.addresses))
    }

    pub(crate) fn set_pod(&mut self, id: PodId, pod: Option<Pod>) {
        match pod {
            Some(pod) => drop(self.told.insert(id.clone(), pod)),
            None => drop(self.told.remove(&id)),
        }
        self.join(id);
    }

    /// Joins what sources and endpoints say of a pod.
    fn join(&mut self, id: PodId) {
        let mut pod = self.told.get(&id).cloned();
        for known in self.endpoints.values().filter(|known| known.pod().as_ref() == Some(&id)) {
            let labels = || Pod { labels: known.endpoint.labels.clone(), ..Pod::default() };
            let pod = pod.get_or_insert_with(labels);
            pod.addresses.extend(&known.endpoint.addresses);
            pod.node = Some(self.node.clone());
            pod.on_segment |= !known.endpoint.place.is_host();
        }
        let held = self.addresses_of_endpoints();
        let cluster = Arc::make_mut(&mut self.cluster);
        let mut touched = BTreeSet::from([id.clone()]);
        let Some(mut pod) = pod else {
            cluster.pods.remove(&id);
            self.touched.iter_mut().for_each(|all| all.append(&mut touched));
            return;
        };
        // An address that an endpoint of this node has is no other pod's: a source that says so is late. Endpoints that
        // have one together may both send from it, so that is for the compiler to close.
        pod.addresses.retain(|address| held.get(address).is_none_or(|holders| holders.contains(&id)));
        for (address, holders) in held.iter().filter(|(_, holders)| holders.contains(&id)) {
            for (other, pod) in cluster.pods.iter_mut().filter(|(other, _)| !holders.contains(other)) {
                if pod.addresses.remove(address) {
                    touched.insert(other.clone());
                }
            }
        }
        cluster.pods.insert(id, pod);
        self.touched.iter_mut().for_each(|all| all.append(&mut touched));
    }

    fn addresses_of_endpoints(&self) -> BTreeMap<IpAddr, BTreeSet<PodId>> {
        let mut held: BTreeMap<IpAddr, BTreeSet<PodId>> = BTreeMap::new();
        for known in self.endpoints.values() {
            if let Some(pod) = known.pod() {
                for address in &known.endpoint.addresses {
                    held.entry(*address).or_default().insert(pod.clone());
                }
            }
        }
        held
    }

    fn faults_of(&self, known: &Known) -> Vec<Fault> {
        let pod = known.pod();
        self.faults.iter().filter(|fault| pod.as_ref().is_some_and(|pod| fault.concerns(pod))).cloned().collect()
    }

    /// Replaces what is closed or not told of, and tells operators what is new and what is over.
    fn set_faults(&mut self, faults: Vec<Fault>) {
        for fault in faults.iter().filter(|fault| !self.faults.contains(fault)) {
            tracing::warn!(%fault, "{}; everything else is enforced", fault.effect());
        }
        for fault in self.faults.iter().filter(|fault| !faults.contains(fault)) {
            tracing::info!(%fault, "no longer {}", fault.effect());
        }
        self.faults = faults;
    }

    pub(crate) fn cluster(&self) -> Arc<Cluster> {
        Arc::clone(&self.cluster)
    }

    fn report(&self) -> Report {
        let mut report = Report { faults: self.faults.clone(), names: self.names_failure.clone(), ..Report::default() };
        for (attachment, known) in &self.endpoints {
            match &known.failure {
                Some(reason) => report.failures.push((attachment.clone(), reason.clone())),
                None if known.phase == Phase::Enforced => report.enforced += 1,
                None => {}
            }
        }
        report
    }
}

impl Shared {
    pub(crate) fn open(host: Host, config: EnforcerConfig, tools: Tools) -> Result<Self, EnforcerError> {
        let pins = open_pins(&config)?;
        let sizes = tools.lowering.sizes();
        let maps = NodeMaps::open(&pins, &sizes)?;
        pin_defaults(&pins, &maps, &*tools.loader, &*tools.lowering)?;
        place_answerers(&maps, &*tools.loader, &*tools.lowering)?;
        let inside = Inside::new(pins.clone());
        let guards = Guards::resume(&host.0, &pins, &maps, &*tools.loader, &*tools.lowering);
        let mut used = host.0.run_here_or_there(|| attached_slots(&*tools.attacher))??;
        let in_pods = inside.slots()?;
        used.extend(in_pods.iter().map(|(slot, holder)| (*slot, holder.id)));
        forget_vanished(&*tools.attacher, &inside);
        let names = RuleNames::resume(&config.run_dir);
        // Who was admitted and nothing else is under no verdicts yet.
        let is_judged = |slot: &u16| in_pods.get(slot).is_none_or(|holder| holder.is_judged);
        let adopted = used.iter().filter(|(slot, _)| is_judged(slot)).map(|(slot, id)| (*id, *slot)).collect();
        let applier = Applier::new(&maps, &sizes, &config.node, &names)?;
        let cells = Cells::new(&maps, &sizes, used)?;
        let mut state = State { node: config.node.clone(), adopted, guarded: guards.ids(), ..State::default() };
        state.cluster_mut().nodes.insert(config.node.clone(), config.node_addresses.clone());
        state.learnt = learnt::resume(&config.run_dir);
        Ok(Self {
            host,
            config,
            tools,
            pins,
            inside,
            guards,
            maps,
            state: Mutex::new(state),
            changed: Condvar::new(),
            applier: Mutex::new(applier),
            cells: Mutex::new(cells),
            names: Arc::new(RwLock::new(names)),
            listener: Listener::default(),
            clock: Mutex::new(clock::of_host()),
        })
    }

    /// Makes a change and carries it out.
    pub(crate) fn change(&self, change: impl FnOnce(&mut State)) -> Result<Report, EnforcerError> {
        self.note(change);
        self.apply()
    }

    fn note(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        state.revision += 1;
    }

    /// Gives back the slots of endpoints that are neither listed nor were admitted since the list was made.
    pub(crate) fn give_back_others(&self, listed: &BTreeMap<AttachmentKey, Known>) -> Result<(), EnforcerError> {
        let state = self.state.lock();
        // A namespace that ends takes its time, and who gets the slot must not share it with a device that is up.
        let in_force = |id| self.inside.of(id).map_or(true, |links| links.iter().any(InsideLink::lives));
        self.cells.lock().give_back_others([listed, &state.endpoints], in_force)
    }

    /// Forgets an attachment whose device is gone, or that wants no guard.
    fn unguard(&self, id: AttachmentId) {
        if let Err(error) = self.guards.forget(id) {
            tracing::warn!(attachment = %id, %error, "the guard on its parent still knows it");
        }
    }

    /// What an endpoint's policy holds against the pod itself now.
    fn enforcement(&self, endpoint: &Endpoint) -> Enforcement {
        let is_guarded = !endpoint.place.is_host() && self.guards.covers(endpoint.attachment.id());
        if is_guarded { Enforcement::Guarded } else { endpoint.enforcement() }
    }

    /// As [`Shared::enforcement`], looked at now.
    fn what_holds(&self, attachment: &AttachmentKey) -> Reply {
        let known = self.state.lock().endpoints.get(attachment).map(|known| (known.endpoint.clone(), known.guarded));
        let Some((endpoint, guarded)) = known else {
            return Reply::Refused { reason: format!("{attachment} is not known; attach it first") };
        };
        let enforcement = endpoint.enforcement();
        if endpoint.place.is_host() || !guarded {
            return Reply::Holds { enforcement, reason: None, ahead: Vec::new() };
        }
        match self.guards.holds(&self.host.0, attachment.id()) {
            Ok(Ok(ahead)) => {
                let ahead = ahead.iter().map(Stranger::from).collect();
                Reply::Holds { enforcement: Enforcement::Guarded, reason: None, ahead }
            }
            Ok(Err(Refusal { reason, may_pass: false })) => {
                Reply::Holds { enforcement, reason: Some(reason), ahead: Vec::new() }
            }
            Ok(Err(Refusal { reason, may_pass: true })) => Reply::Busy { reason: format!("{NO_GUARD}: {reason}") },
            Err(error) => Reply::Busy { reason: format!("{NO_GUARD}: {error}") },
        }
    }

    /// Has the links of an attachment that is gone judge by no policy of it, where their device lives on.
    fn shut(&self, attachment: &AttachmentKey) {
        let state = self.state.lock();
        if state.endpoints.contains_key(attachment) {
            // It is there again.
            return;
        }
        // Whoever puts programs on it now has begun before it was told to be gone.
        let _cells = self.cells.lock();
        drop(state);
        let guarded = match self.inside.shut(&self.pins, attachment.id()) {
            Ok(0) => {
                self.unguard(attachment.id());
                return;
            }
            Ok(_) => self.guards.shut(attachment.id()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = guarded {
            tracing::warn!(%attachment, %error, "its device in the pod keeps the policy that it had");
        }
    }

    pub(crate) fn statuses(&self) -> Vec<EndpointStatus> {
        let state = self.state.lock();
        let status = |known: &Known| EndpointStatus {
            attachment: known.endpoint.attachment.clone(),
            workload: known.endpoint.workload.clone(),
            slot: known.slot,
            phase: known.phase,
            generation: known.generation,
            is_current: known.phase == Phase::Enforced && known.failure.is_none() && known.noted <= state.applied,
            enforcement: self.enforcement(&known.endpoint),
            failure: known.failure.clone(),
            faults: state.faults_of(known),
        };
        state.endpoints.values().map(status).collect()
    }

    /// The devices of slots.
    pub(crate) fn devices(&self) -> BTreeMap<u16, IfIndex> {
        let state = self.state.lock();
        state.endpoints.values().filter_map(|known| Some((known.slot?, known.endpoint.ifindex))).collect()
    }

    #[cfg(feature = "test-support")]
    pub(crate) fn plant_bug(&self, bug: crate::test_support::PlantedBug) {
        self.applier.lock().plant_bug(bug);
    }

    /// Tries again what failed, and sweeps flows that are over.
    pub(crate) fn work_in_background(shared: &Arc<Self>) -> Result<std::thread::JoinHandle<()>, EnforcerError> {
        let own = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("dcenet-policy".into()).spawn(move || own.keep_working());
        thread.map_err(|source| EnforcerError::File { path: shared.config.run_dir.clone(), source })
    }

    fn keep_working(&self) {
        let mut sweep_at = Instant::now() + sweep::INTERVAL;
        let mut state = self.state.lock();
        while !state.stopping {
            let (now, time) = (Instant::now(), self.time());
            let is_late = state.is_late(time) || state.are_names_late(time);
            let retry_at = [state.retry_at, state.names_at].into_iter().flatten().min();
            if retry_at.is_some_and(|at| at <= now) || is_late {
                drop(state);
                if let Err(error) = self.apply_when(Again::WhenDue) {
                    tracing::warn!(%error, "the latest policy is not in force; the last verdicts stand");
                }
            } else if sweep_at <= now {
                let known = state.endpoints.keys().map(AttachmentKey::id).collect();
                drop(state);
                self.note_names();
                forget_vanished(&*self.tools.attacher, &self.inside);
                if let Err(error) = self.guards.sweep(&self.host.0, &self.inside, &known) {
                    tracing::warn!(%error, "guards on parents of macvlans are not as they should be until the next attempt");
                }
                if let Err(error) = sweep::sweep(self) {
                    tracing::warn!(%error, "flows that are over could not be removed");
                }
                sweep_at = Instant::now() + sweep::INTERVAL;
            } else {
                let until = retry_at.map_or(sweep_at, |at| at.min(sweep_at));
                let until = state.until_next_change(time).map_or(until, |wait| until.min(now + wait));
                self.changed.wait_until(&mut state, until);
                continue;
            }
            state = self.state.lock();
        }
    }

    /// Lets the retrying thread see what is to be done.
    pub(super) fn look_again(&self) {
        self.changed.notify_all();
    }

    pub(crate) fn stop(&self) {
        self.state.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Takes everything off the host.
    pub(crate) fn clear(&self) -> Result<(), EnforcerError> {
        // Whoever is in the middle of a change finishes it first.
        let _applier = self.applier.lock();
        let attacher = &*self.tools.attacher;
        let mut first: Option<EnforcerError> = None;
        let filters = self.host.0.run_here_or_there(|| {
            let mut errors = Vec::new();
            match attacher.devices() {
                Ok(devices) => {
                    for hook in devices.into_iter().flat_map(hooks) {
                        match attacher.attached(hook) {
                            Ok(None) => {}
                            Ok(Some(_)) => errors.extend(attacher.detach(hook).err()),
                            Err(error) => errors.push(error),
                        }
                    }
                }
                Err(error) => errors.push(error),
            }
            errors
        });
        match filters {
            Ok(errors) => first = errors.into_iter().map(EnforcerError::from).next(),
            Err(error) => drop(first.get_or_insert(error.into())),
        }
        if let Err(error) = self.inside.clear() {
            first.get_or_insert(error.into());
        }
        if let Err(error) = self.guards.clear() {
            first.get_or_insert(error.into());
        }
        if let Err(error) = self.pins.clone().unmount() {
            first.get_or_insert(error.into());
        }
        let run_dir = &self.config.run_dir;
        for path in [RuleNames::path(run_dir), learnt::path(run_dir), learnt::path_of_fresh(run_dir)] {
            if let Err(error) = super::server::remove(&path) {
                first.get_or_insert(error);
            }
        }
        first.map_or(Ok(()), Err)
    }

    fn await_enforced(&self, attachment: &AttachmentKey, limit: Duration) -> Reply {
        let deadline = Instant::now() + limit;
        let mut state = self.state.lock();
        loop {
            let waiting = match state.endpoints.get(attachment) {
                None => "the endpoint is not known; attach it first".to_owned(),
                Some(known @ Known { phase: Phase::Enforced, failure: None, generation, noted, .. })
                    if *noted <= state.applied =>
                {
                    let closed = known.pod().and_then(|pod| state.faults.iter().find(|fault| fault.closes(&pod)));
                    match closed {
                        Some(fault) => fault.to_string(),
                        None => return Reply::Enforced { generation: *generation },
                    }
                }
                Some(Known { failure: Some(reason), .. }) => reason.clone(),
                Some(_) if !state.started => "the owner has not been told the policies yet".to_owned(),
                Some(_) => "compiling".to_owned(),
            };
            let unknown = !state.endpoints.contains_key(attachment);
            if unknown || state.stopping || self.changed.wait_until(&mut state, deadline).timed_out() {
                return Reply::Waiting { reason: waiting };
            }
        }
    }
}

impl Answer for Shared {
    fn answer(&self, request: Request) -> Reply {
        match request {
            Request::Attached { endpoint, default, guarded } => {
                tracing::debug!(attachment = %endpoint.attachment, default = default.as_str(), "endpoint attached");
                let known = self.state.lock().endpoints.contains_key(&endpoint.attachment);
                self.note(|state| state.note(&endpoint, Some(guarded)));
                if !guarded {
                    self.unguard(endpoint.attachment.id());
                }
                if let Err(error) = self.admit(&endpoint, known) {
                    tracing::warn!(attachment = %endpoint.attachment, %error, "cannot tell the default programs of it");
                }
                Reply::Noted
            }
            Request::Gone { attachment } => {
                self.note(|state| {
                    state.forget(&attachment);
                    self.cells.lock().forget(&attachment);
                });
                self.shut(&attachment);
                self.changed.notify_all();
                Reply::Noted
            }
            Request::Enforcement { attachment } => self.what_holds(&attachment),
            Request::Await { attachment, limit } => self.await_enforced(&attachment, limit.get()),
        }
    }

    fn answered(&self) {
        if let Err(error) = self.apply() {
            tracing::warn!(%error, "the latest policy is not in force; the last verdicts stand");
        }
    }
}

/// Both hooks of a device.
pub(crate) fn hooks(device: IfIndex) -> [Hook; 2] {
    [Direction::Ingress, Direction::Egress].map(|direction| Hook { device, direction })
}

/// The slots of what is attached in the calling thread's namespace, by the labels on it.
fn attached_slots(attacher: &dyn Attacher) -> Result<BTreeMap<u16, AttachmentId>, AttachError> {
    let mut slots = BTreeMap::new();
    for hook in attacher.devices()?.into_iter().flat_map(hooks) {
        let Some(attached) = attacher.attached(hook)? else { continue };
        if let Owner::Ours(label) = &attached.owner
            && let Ok(id) = label.parse()
            && attached.class != 0
        {
            slots.insert(attached.class, id);
        }
    }
    Ok(slots)
}

/// What is left of devices that are no more does no harm but to those who list it.
fn forget_vanished(attacher: &dyn Attacher, inside: &Inside) {
    let of_host = attacher.forget_vanished();
    match of_host.and_then(|count| Ok(count + inside.forget_vanished()?)) {
        Ok(0) => {}
        Ok(count) => tracing::debug!(count, "links of vanished devices are forgotten"),
        Err(error) => tracing::warn!(%error, "links of vanished devices stay pinned until the next attempt"),
    }
}

const NO_GUARD: &str = "no guard is on the parent of the endpoint's device yet";
