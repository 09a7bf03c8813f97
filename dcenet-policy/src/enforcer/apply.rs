//! Carrying out a change, step by step, and taking it back.

mod arrays;
mod commit;
mod compile;
mod load;
mod names;
mod rejects;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use dcenet_core::model::{AttachmentKey, IfIndex};
use dcenet_core::provider::{Endpoint, Place};
use dcenet_ebpf::abi::{self, Sizes};
use dcenet_ebpf::attach::{AttachError, Direction as HookDirection, Hook, Tag};
use dcenet_ebpf::maps::Map;
use dcenet_ebpf::program::{Program as Loaded, wait_for_running};

use self::arrays::rewrite;
use self::rejects::Rejects;
use super::cells::Cells;
use super::flows::{self, Names};
use super::guard::Judge;
use super::inside::{Holds, on_device};
use super::node::{NodeMaps, create};
use super::state::{Known, Outcome, Shared};
use super::tables::ClassTables;
use super::{EnforcerError, LoweredObject, Phase};
use crate::classes::AddressTable;
use crate::compiler::{Compiler, EndpointPlan, Limits, Locals, PolicySet, RuleTable, Scope, SetId, Update};
use crate::isolation::Fault;
use crate::model::{Cluster, Direction, PodId};
use crate::target::MAX_TABLE_NODES;

/// Outcomes by endpoint.
pub(crate) type Outcomes = Vec<(AttachmentKey, Outcome)>;

/// What came of a change.
pub(crate) struct Applied {
    pub(crate) outcomes: Outcomes,
    /// What is closed instead of enforced as written, or in audit and not told of.
    pub(crate) faults: Vec<Fault>,
    /// Whether another attempt may find more room.
    pub(crate) retry: bool,
    /// Why the change is not in force anywhere, where it is not.
    pub(crate) held: Option<String>,
    /// Addresses whose names were left out: they are to be carried out by themselves.
    pub(crate) unnamed: BTreeSet<IpAddr>,
}

/// What is not as it was the last time.
pub(crate) enum Changes<'a> {
    /// Anything but names.
    All,
    /// These pods.
    Pods(&'a BTreeSet<PodId>),
    /// The names of these addresses. There may be no other faults than those that there are.
    Names { renamed: &'a BTreeSet<IpAddr>, faults: &'a [Fault] },
}

impl Changes<'_> {
    /// Rules only allow by names, so that flows are not judged anew: what is learnt ends no flow, and what is over shall not.
    fn are_names(&self) -> bool {
        matches!(self, Self::Names { .. })
    }
}

/// What is in force, and the means to change it.
pub(crate) struct Applier {
    compiler: Compiler,
    sizes: Sizes,
    tables: ClassTables,
    /// Policy sets with their maps of local ids, as they are in force.
    sets: BTreeMap<SetId, SetInForce>,
    programs: HashMap<ProgramKey, Weak<Programs>>,
    /// Programs for guards, which pods with equal policies share.
    guarded: HashMap<PolicyKey, Weak<Loaded>>,
    walked: HashMap<PolicyKey, Weak<Walked>>,
    endpoints: BTreeMap<AttachmentKey, InForce>,
    /// The class tables by which the flows of before the latest bump were judged.
    table: Arc<AddressTable>,
    /// Whether programs may have met other tables since, of an update that failed.
    strayed: bool,
    /// Whether the last change but for names was compiled and is not in force.
    unfinished: bool,
    /// Addresses of which the compiler was told names that are not in force.
    astray: BTreeSet<IpAddr>,
    /// The last update that is in force everywhere, and since when.
    settled: Option<(u64, Instant)>,
    /// The rules whose names are noted.
    learnt: Option<Arc<RuleTable>>,
    rejects: Rejects,
}

struct SetInForce {
    set: Arc<PolicySet>,
    /// The local ids in the map.
    written: Arc<Locals>,
    map: Map,
}

/// What makes two endpoints' programs the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ProgramKey {
    policy: PolicyKey,
    /// Of devices in pods, where it is a constant of the programs.
    slot: Option<u16>,
    /// Whether a guard is wanted, which has a program of its own judge.
    guarded: bool,
}

/// What makes two endpoints' policy the same: code and local ids of both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PolicyKey {
    sets: [SetId; 2],
    /// Addresses of diagrams that the programs keep alive.
    code: [usize; 2],
}

/// The loaded programs of one or several endpoints.
struct Programs {
    from_pod: Loaded,
    to_pod: Loaded,
    /// What the guard on the parent of a device in a pod has judge once more, where one is wanted.
    guarded: Option<Arc<Loaded>>,
    key: ProgramKey,
    _walked: Arc<Walked>,
    /// Keeps the diagrams, and thus the key, from being used by others.
    plan: EndpointPlan,
}

impl Programs {
    fn on(&self, direction: HookDirection) -> &Loaded {
        match direction {
            HookDirection::Ingress => &self.from_pod,
            HookDirection::Egress => &self.to_pod,
        }
    }
}

/// The tables that classifiers walk, by their maps' names: too large for a copy in each of the pods that have the same
/// policies.
#[derive(Default)]
struct Walked {
    maps: Vec<(String, Map)>,
}

/// Objects whose slot is a constant, by what else makes them; kept for one change.
type Templates = HashMap<PolicyKey, LoweredObject>;

/// An endpoint under its own verdicts.
struct InForce {
    device: IfIndex,
    place: Place,
    slot: u16,
    generation: u32,
    programs: Arc<Programs>,
    addresses: Vec<IpAddr>,
    /// What it was to have when a change was last in force.
    wanted: EndpointPlan,
    /// Whether it waits for more than names.
    is_behind: bool,
    /// Whether one of its hooks may have another program than `programs`, as these could not be put back.
    is_mixed: bool,
    /// A change of its verdicts was written, and its generations were not bumped yet.
    unbumped: BTreeSet<Direction>,
}

/// An endpoint that gets other programs.
struct Switch<'a> {
    key: &'a AttachmentKey,
    known: &'a Known,
    programs: Arc<Programs>,
}

impl Applier {
    pub(crate) fn new(maps: &NodeMaps, sizes: &Sizes, node: &str, names: &Names) -> Result<Self, EnforcerError> {
        // What the compiler takes, the target has to take, too.
        let limits = Limits { arms: MAX_TABLE_NODES, ..Limits::default() };
        let mut compiler = Compiler::new(Scope::Node(node.to_owned()), limits);
        compiler.resume_rules(names.rules());
        Ok(Self {
            compiler,
            sizes: sizes.clone(),
            tables: ClassTables::new(maps, sizes)?,
            sets: BTreeMap::new(),
            programs: HashMap::new(),
            guarded: HashMap::new(),
            walked: HashMap::new(),
            endpoints: BTreeMap::new(),
            table: Arc::default(),
            strayed: false,
            unfinished: false,
            astray: BTreeSet::new(),
            settled: None,
            learnt: None,
            rejects: Rejects::new(maps)?,
        })
    }

    #[cfg(feature = "test-support")]
    pub(crate) fn plant_bug(&mut self, bug: crate::test_support::PlantedBug) {
        self.compiler.plant_bug(bug);
    }

    /// Puts the cluster's policies in force for the endpoints.
    pub(crate) fn run(
        &mut self,
        shared: &Shared,
        cluster: &Cluster,
        changes: &Changes<'_>,
        endpoints: &BTreeMap<AttachmentKey, Known>,
    ) -> Result<Applied, EnforcerError> {
        if !changes.are_names() {
            self.drop_gone(shared, endpoints)?;
        }
        if let Some((generation, since)) = self.settled
            && since.elapsed() > GRACE
        {
            self.compiler.release(generation);
        }
        let (update, unnamed, before) = match *changes {
            Changes::Names { renamed, faults } => {
                let (update, before) = self.compile_names(cluster, renamed, faults)?;
                (update, BTreeSet::new(), before)
            }
            Changes::All => self.compile_named(cluster, None)?,
            Changes::Pods(pods) => self.compile_named(cluster, Some(pods))?,
        };
        let noted = match &self.learnt {
            Some(learnt) if Arc::ptr_eq(learnt, &update.rules) => Ok(()),
            _ => {
                let counters = flows::counters(shared);
                counters.and_then(|c| shared.names.write().learn(&update.rules, &c, &shared.config.run_dir))
            }
        };
        if let Err(error) = noted.and_then(|()| self.rejects.write(update.rules.rejecting())) {
            if let Some(before) = before {
                self.compiler = before;
            }
            return Err(error);
        }
        self.learnt = Some(Arc::clone(&update.rules));
        let mut outcomes = Outcomes::new();
        let carried_out = self.carry_out(shared, &update, endpoints, changes.are_names(), &mut outcomes);
        // Numbers of what is no longer in force take room until they are released.
        let wants_room = |fault: &Fault| matches!(fault, Fault::Refused { .. } | Fault::NotAudited { .. });
        let retry = update.faults.iter().any(wants_room) && self.compiler.is_unreleased();
        let held = carried_out.map_err(|Held { reason, is_undone, stuck }| {
            if is_undone && let Some(before) = before {
                self.compiler = before;
            }
            if changes.are_names() {
                // Whoever has no other programs needs none for what is given up.
                outcomes.retain(|(key, outcome)| {
                    matches!(outcome, Outcome::Enforced { .. } | Outcome::Gone) || stuck.contains(key)
                });
            }
            reason
        });
        Ok(Applied { outcomes, faults: update.faults, retry, held: held.err(), unnamed })
    }

    /// Whether the last change but for names has to be carried out once more before one of names is.
    pub(crate) fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// Puts an update in force. Where that fails for all, the verdicts before stand.
    fn carry_out(
        &mut self,
        shared: &Shared,
        update: &Update,
        endpoints: &BTreeMap<AttachmentKey, Known>,
        by_names: bool,
        outcomes: &mut Outcomes,
    ) -> Result<(), Held> {
        let keeps = |reason: String| Held { reason, is_undone: false, stuck: BTreeSet::new() };
        // Arrays first: what changes in them is of classes that no table names yet.
        if let Err(error) = self.write_sets(update) {
            self.wait_all(endpoints, &error.to_string(), outcomes);
            return Err(keeps(error.to_string()));
        }
        let switches = self.load(shared, update, endpoints, by_names, outcomes);
        // New policy asks what no class says that is in the table.
        if !by_names && let Err(error) = self.write_table(update) {
            self.wait_all(endpoints, &error.to_string(), outcomes);
            return Err(keeps(error.to_string()));
        }
        // From here on the tables are those of the update, so whatever fails, they must be noted and flows judged by them.
        let attached = shared.host.0.run_here_or_there(|| self.attach(shared, &switches, outcomes));
        let (mut replaced, stuck) = attached.unwrap_or_else(|error| {
            let failed = |known: &Known| Outcome::Failed { reason: error.to_string(), phase: known.phase };
            outcomes.extend(switches.iter().map(|switch| (switch.key.clone(), failed(switch.known))));
            Default::default()
        });
        // Whoever answers for a name chooses the address, which rules may deny by a prefix: to programs that do not know both
        // together it would be nobody's. Those that do know the classes of before, too.
        let held = if by_names {
            let known = self.all_know(update, endpoints, &replaced, outcomes);
            known.and_then(|()| self.write_table(update).map_err(|error| error.to_string()))
        } else {
            Ok(())
        };
        // A replaced program that still runs would give a flow that it admits the new generation, and so it would never be
        // judged again. A default program admits none.
        let had_others = |key: &AttachmentKey| self.endpoints.contains_key(key) || endpoints[key].is_adopted();
        if replaced.iter().any(|r| had_others(&r.key)) {
            wait_for_programs();
        }
        match &held {
            Ok(()) => self.commit(update, endpoints, by_names),
            Err(_) => self.undo(shared, &switches, &mut replaced),
        }
        self.note_replaced(switches, &replaced);
        self.bump(&shared.cells, outcomes);
        self.forget_unused(update);
        if held.is_ok() && self.endpoints.iter().all(|(key, endpoint)| is_current(update, endpoints.get(key), endpoint))
        {
            self.settled = Some((update.generation, Instant::now()));
        }
        held.map_err(|reason| Held { reason, is_undone: replaced.is_empty() && stuck.is_empty(), stuck })
    }

    /// Everybody whose verdicts are in force keeps those before, and the endpoints that have no outcome yet their
    /// default.
    fn wait_all(&self, endpoints: &BTreeMap<AttachmentKey, Known>, reason: &str, outcomes: &mut Outcomes) {
        let settled: BTreeSet<AttachmentKey> = outcomes.iter().map(|(key, _)| key.clone()).collect();
        for (key, known) in endpoints.iter().filter(|(key, _)| !settled.contains(*key)) {
            let reason = format!("waits for others: {reason}");
            outcomes.push((key.clone(), Outcome::Failed { reason, phase: known.phase }));
        }
    }

    /// Notes that nothing is in force of these endpoints.
    pub(crate) fn forget(&mut self, attachments: &BTreeSet<AttachmentKey>) {
        self.endpoints.retain(|key, _| !attachments.contains(key));
    }

    /// Gives back the slots of endpoints that are no more.
    fn drop_gone(&mut self, shared: &Shared, endpoints: &BTreeMap<AttachmentKey, Known>) -> Result<(), EnforcerError> {
        // A device that was made anew has none of our programs on it.
        self.endpoints.retain(|key, endpoint| {
            endpoints.get(key).is_some_and(|known| known.is_on(endpoint.device, &endpoint.place))
        });
        shared.give_back_others(endpoints)
    }

    /// Writes the local ids of all policy sets, also of those that only old programs still use.
    fn write_sets(&mut self, update: &Update) -> Result<(), EnforcerError> {
        let retiring = update.retiring.iter().map(|set| (set.id, set));
        for (id, set) in update.sets().into_iter().chain(retiring) {
            match self.sets.get_mut(&id) {
                Some(known) => {
                    if !Arc::ptr_eq(&known.written, &set.locals) {
                        rewrite(&known.map, &known.written, &set.locals)?;
                        known.written = Arc::clone(&set.locals);
                    }
                }
                None => {
                    let map = create(&self.sizes.local_ids(on_packet(set.program.list.direction)))?;
                    rewrite(&map, &Locals::default(), &set.locals)?;
                    self.sets.insert(id, SetInForce { set: Arc::clone(set), written: Arc::clone(&set.locals), map });
                }
            }
        }
        Ok(())
    }

    /// Puts programs on devices. Returns whose were replaced, and of whom one hook may have the new program alone.
    fn attach(
        &mut self,
        shared: &Shared,
        switches: &[Switch<'_>],
        outcomes: &mut Outcomes,
    ) -> (Vec<Replaced>, BTreeSet<AttachmentKey>) {
        let (mut replaced, mut stuck) = (Vec::new(), BTreeSet::new());
        for switch in switches {
            let state = shared.state.lock();
            // A device may live on after it was told to be gone: its links in a pod are shut since, or its policy was lifted.
            let is_told = state.has(&switch.known.endpoint);
            let mut cells = shared.cells.lock();
            drop(state);
            // One of the same name may have been admitted since, and the cell is that one's.
            if !is_told || !shared.has_device(&switch.known.endpoint) {
                outcomes.push((switch.key.clone(), Outcome::Gone));
                continue;
            }
            let before = self.endpoints.get(switch.key).map(|e| Arc::clone(&e.programs));
            let error = match self.attach_one(shared, &mut cells, switch) {
                Ok((slot, generation)) => {
                    replaced.push(Replaced { key: switch.key.clone(), slot, generation });
                    continue;
                }
                Err(error) => error,
            };
            let outcome = if shared.has_device(&switch.known.endpoint) {
                let mut reason = error.to_string();
                // One of its hooks may have the new program.
                let put_back = |before| put_back(shared, &cells, switch, before);
                let undone = before.as_deref().map_or(Ok(()), put_back);
                if let Err(left) = undone {
                    reason = format!("{reason}; and its program before could not be put back: {left}");
                    stuck.insert(switch.key.clone());
                    if let Some(in_force) = self.endpoints.get_mut(switch.key) {
                        in_force.is_mixed = true;
                    }
                }
                let phase = if before.is_some() { Phase::Enforced } else { switch.known.phase.max(Phase::Compiled) };
                Outcome::Failed { reason, phase }
            } else {
                Outcome::Gone
            };
            outcomes.push((switch.key.clone(), outcome));
        }
        (replaced, stuck)
    }

    fn attach_one(&self, shared: &Shared, cells: &mut Cells, switch: &Switch<'_>) -> Result<(u16, u32), EnforcerError> {
        let fresh = !self.endpoints.contains_key(switch.key);
        let (slot, cell) = cells.settle(&switch.known.endpoint, fresh)?;
        let in_programs = switch.programs.key.slot;
        if in_programs.is_some_and(|constant| constant != slot) {
            // It went and came again since they were loaded.
            let what = "the endpoint's slot has changed while its programs were loaded".into();
            return Err(EnforcerError::Lowering(what));
        }
        shared.replace(&switch.known.endpoint, &switch.programs, slot)?;
        Ok((slot, cell.generation_ingress.max(cell.generation_egress)))
    }

    /// Writes the class tables; puts them back where that fails.
    fn write_table(&mut self, update: &Update) -> Result<(), EnforcerError> {
        let Err(error) = self.tables.write_update(update) else { return Ok(()) };
        // A class that is written means the same to every program in force, so nothing is wrong where this fails, too.
        if let Err(left) = self.tables.write(&self.table) {
            tracing::warn!(error = %left, "class tables are between two updates until the next attempt");
        }
        self.strayed = true;
        Err(error)
    }
}

/// Puts the programs before on both hooks.
fn put_back(shared: &Shared, cells: &Cells, switch: &Switch<'_>, before: &Programs) -> Result<(), EnforcerError> {
    let endpoint = &switch.known.endpoint;
    // What is a constant of the programs is what their links are called by.
    let slot = before.key.slot.or_else(|| cells.slot(endpoint.attachment.id())).unwrap_or_default();
    shared.replace(endpoint, before, slot)
}

impl Shared {
    /// Puts an endpoint's programs in the place of those that are there, by the hooks of a host's end. Devices on the host are
    /// found by their index in the calling thread's namespace. In pods an earlier device of the attachment may live beside the
    /// present one, and takes the same programs. The first error is told when all is tried.
    fn replace(&self, endpoint: &Endpoint, programs: &Programs, slot: u16) -> Result<(), EnforcerError> {
        let id = endpoint.attachment.id();
        let links = if endpoint.place.is_host() { Vec::new() } else { self.inside.of(id)? };
        let mut first: Option<EnforcerError> = None;
        for direction in [HookDirection::Ingress, HookDirection::Egress] {
            let hook = Hook { device: endpoint.ifindex, direction: on_device(direction, &endpoint.place) };
            if endpoint.place.is_host() {
                let tag = Tag { label: &id.to_string(), class: slot };
                if let Err(error) = self.tools.attacher.replace_tagged(hook, programs.on(direction), tag) {
                    first.get_or_insert(error.into());
                }
                continue;
            }
            let mut replaced = 0;
            for link in links.iter().filter(|link| link.lives() && link.link.direction == hook.direction) {
                match self.inside.replace(link, programs.on(direction), Holds::Own(slot)) {
                    Ok(()) => replaced += 1,
                    // Its device has vanished since the links were listed.
                    Err(AttachError::NoLink { .. }) => {}
                    Err(error) => {
                        replaced += 1;
                        first.get_or_insert(error.into());
                    }
                }
            }
            if replaced == 0 {
                first.get_or_insert(AttachError::NotAttached { hook }.into());
            }
        }
        let guarded = match &programs.guarded {
            Some(judge) => self.cover(endpoint, slot, Judge::Own(judge)),
            // A change that was under way when it was told may have covered it since.
            None => self.guards.forget(id),
        };
        if let Err(error) = guarded {
            first.get_or_insert(error);
        }
        first.map_or(Ok(()), Err)
    }

    /// Whether an endpoint's device is there still; one on the host is looked for in the calling thread's namespace.
    fn has_device(&self, endpoint: &Endpoint) -> bool {
        if endpoint.place.is_host() { is_here(endpoint) } else { self.inside.exists(endpoint) }
    }
}

/// Why an update is in force nowhere.
struct Held {
    reason: String,
    /// Whether every endpoint has the programs before, and the compiler may forget the update.
    is_undone: bool,
    /// Who has a program of the update on one hook, and needs another attempt.
    stuck: BTreeSet<AttachmentKey>,
}

/// Filters that were replaced, and what was there.
struct Replaced {
    key: AttachmentKey,
    slot: u16,
    generation: u32,
}

/// Whether an endpoint has the programs that an update has for it.
fn is_current(update: &Update, known: Option<&Known>, endpoint: &InForce) -> bool {
    let plan = known.and_then(Known::pod).and_then(|pod| update.endpoints.get(&pod));
    !endpoint.is_mixed && plan.is_some_and(|plan| policy_key(plan) == endpoint.programs.key.policy)
}

fn policy_key(plan: &EndpointPlan) -> PolicyKey {
    let both = [&plan.ingress, &plan.egress];
    PolicyKey { sets: both.map(|set| set.id), code: both.map(|set| Arc::as_ptr(&set.program) as usize) }
}

fn on_packet(direction: Direction) -> abi::Direction {
    match direction {
        Direction::Ingress => abi::Direction::Ingress,
        Direction::Egress => abi::Direction::Egress,
    }
}

fn local_ids_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => abi::LOCAL_IDS_INGRESS,
        Direction::Egress => abi::LOCAL_IDS_EGRESS,
    }
}

/// Whether the endpoint's device is still the one in the calling thread's namespace.
pub(crate) fn is_here(endpoint: &Endpoint) -> bool {
    let Ok((socket, _)) = UnixStream::pair() else { return true };
    match rustix::net::netdevice::name_to_index(socket, endpoint.ifname.as_str()) {
        Ok(index) => index == endpoint.ifindex.get(),
        Err(error) => error != rustix::io::Errno::NODEV,
    }
}

/// Returns when every program that runs now has ended.
pub(crate) fn wait_for_programs() {
    if let Err(error) = wait_for_running() {
        tracing::debug!(%error, "waiting for a generous time instead");
        std::thread::sleep(GRACE);
    }
}

/// After this time no packet is still on its way through a program that was replaced.
const GRACE: Duration = Duration::from_millis(100);

const NO_WORKLOAD: &str =
    "no policy can be found for it, because its workload is not known; name it in args.cni of the configuration";
