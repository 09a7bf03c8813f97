//! From a cluster to what the datapath needs: tables, arrays and decision diagrams.
//!
//! An [`Update`] is complete. What did not change is shared with the update before, so an enforcer finds out by
//! pointer what to write. It writes in this order:
//!
//! 1. the class arrays of all sets, those of [`Update::retiring`] too: only classes that no table names yet change;
//! 2. the address table: old programs now meet new classes, which their arrays know;
//! 3. programs;
//!
//! and when all of it is in force calls [`Compiler::release`]. After each step every endpoint still judges every peer
//! by its old policy or by its new one, as long as the peer itself is the same. A peer whose own labels, namespace
//! or ports changed may count as unknown to a policy set that is replaced in the same update, until step 3. Where names alone
//! have other addresses, which somebody else chooses, step 3 goes before step 2: programs of that update know the classes of
//! before, too.
//!
//! What cannot be enforced as it stands closes the pods that it concerns and nobody else: [`Update::faults`] names it,
//! and [`isolation`] the verdicts.
//!
//! Until released, what fell out of use keeps its number, and classes still distinguish what only retired policy
//! sets ask; so an enforcer that never releases pays with ever more classes.

mod endpoints;
mod keys;
mod locals;
mod members;
mod names;
mod rules;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::Serialize;

use crate::classes::{self, AddressTable, Atom, AtomId, ClassId, ClassKey, TableChanges};
use crate::diagram::Diagram;
use crate::flatten::{self, ClassMembers, FlatSet, Flattener, SetKey, Signatures};
use crate::ids::Ids;
use crate::ir::{Leaf, RuleId, RuleList};
use crate::isolation::{self, Ambiguous, Fault, Obstacle, Refusals};
use crate::model::{Cluster, Direction, Pod, PodId, PodNetwork, PolicyId, Tuple};
use crate::opt::{self, Shadowed};
use crate::verify;

pub use self::endpoints::Endpoints;
pub(crate) use self::locals::CHUNK;
pub use self::locals::Locals;
pub use self::rules::{Audit, Decider, Named, RuleTable};

use self::members::{Asked, Placed};

/// Why something cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// The input is fine but larger than this implementation takes.
    #[error("{what}: {found}, more than the limit of {limit}; split the policies or raise the limit")]
    ImplLimitExceeded {
        /// What is counted.
        what: &'static str,
        /// How many there are, at least.
        found: usize,
        /// How many there may be.
        limit: usize,
    },
    /// A policy is filed under another name than its own.
    #[error("policy {id} is filed under {key}; use Cluster::insert_policy")]
    MisfiledPolicy {
        /// The key in [`Cluster::policies`].
        key: Box<PolicyId>,
        /// The policy's own id.
        id: Box<PolicyId>,
    },
}

/// Bounds that turn a hang into an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Entries of one policy set and direction.
    pub entries: usize,
    /// Local ids of one policy set.
    pub locals: usize,
    /// Pairs of entry and local id of one policy set; time and memory of a compilation are proportional.
    pub work: usize,
    /// Arms of one diagram.
    pub arms: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 200_000, locals: 65_535, work: 20_000_000, arms: 2_000_000 }
    }
}

impl Limits {
    pub(crate) fn check(&self, what: &'static str, found: usize, limit: usize) -> Result<(), CompileError> {
        if found > limit { Err(CompileError::ImplLimitExceeded { what, found, limit }) } else { Ok(()) }
    }
}

/// Whose pods are compiled for. Peers are the whole cluster's in any case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Scope {
    /// Every pod.
    #[default]
    Cluster,
    /// The pods of one node.
    Node(String),
}

impl Scope {
    /// Whether the pod is an endpoint.
    fn holds(&self, pod: &Pod) -> bool {
        let here = match self {
            Self::Cluster => true,
            Self::Node(node) => pod.node.as_ref() == Some(node),
        };
        here && pod.network == PodNetwork::Own
    }
}

/// The number of a policy set: stable while it is in use, and the index of its class array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct SetId(pub u32);

/// What is lowered to code. Policy sets with equal lists share one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The list, without entries that never decide.
    pub list: RuleList,
    /// The same as a diagram.
    pub diagram: Diagram,
    /// Rules that never decide, given the peers that exist now.
    pub shadowed: Vec<Shadowed>,
}

impl Program {
    /// Whether both become the same code. The numbers of what decides beside what policies in audit would do are in the
    /// diagram alone, and may have been given anew.
    pub(crate) fn is_same_code(&self, other: &Self) -> bool {
        self.list == other.list && (self.list.audit.is_none() || self.diagram == other.diagram)
    }
}

/// The policies of one or several endpoints in one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicySet {
    /// Its number.
    pub id: SetId,
    /// The policies, in the order in which they are tried; none where nothing governs the endpoints.
    pub policies: Arc<[PolicyId]>,
    /// Its diagram.
    pub program: Arc<Program>,
    /// The local id of each class.
    pub locals: Arc<Locals>,
}

impl PolicySet {
    /// The local id of a class.
    pub fn local(&self, class: ClassId) -> u16 {
        self.locals.get(class.0)
    }
}

/// Both directions of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPlan {
    /// Judges packets to the endpoint.
    pub ingress: Arc<PolicySet>,
    /// Judges packets from the endpoint.
    pub egress: Arc<PolicySet>,
}

impl EndpointPlan {
    /// The policy set of a direction.
    pub fn set(&self, direction: Direction) -> &Arc<PolicySet> {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// The result of a compilation.
#[derive(Debug, Clone)]
pub struct Update {
    /// Counts updates of this compiler, from 1.
    pub generation: u64,
    /// The endpoints in scope; pods in their host's network namespace are none.
    pub endpoints: Endpoints,
    /// Policy sets that are no endpoint's any more but whose programs may still run, with arrays for this update's
    /// classes.
    pub retiring: Vec<Arc<PolicySet>>,
    /// Address to class.
    pub table: Arc<AddressTable>,
    /// What of the table differs from the update before.
    pub table_changes: TableChanges,
    /// The table of the update before.
    table_before: Arc<AddressTable>,
    /// Rule id to name.
    pub rules: Arc<RuleTable>,
    /// Classes in use, the unknown one included.
    pub classes: usize,
    /// What is closed instead of enforced as written, or in audit and not told of.
    pub faults: Vec<Fault>,
}

impl Update {
    /// Judges a packet as the datapath will: address to class to local id, then the diagram. `None` where the pod is
    /// no endpoint.
    pub fn decide(&self, endpoint: &PodId, tuple: &Tuple) -> Option<Leaf> {
        let set = self.endpoints.get(endpoint)?.set(tuple.direction);
        let local = set.local(self.table.lookup(tuple.peer));
        Some(set.program.diagram.decide(local, tuple.protocol, tuple.port))
    }

    /// What of the table differs from another one.
    pub(crate) fn changes_from(&self, table: &Arc<AddressTable>) -> Cow<'_, TableChanges> {
        if Arc::ptr_eq(table, &self.table_before) {
            return Cow::Borrowed(&self.table_changes);
        }
        Cow::Owned(if Arc::ptr_eq(table, &self.table) {
            TableChanges::default()
        } else {
            table.changes_to(&self.table)
        })
    }

    /// The distinct policy sets, by number.
    pub fn sets(&self) -> BTreeMap<SetId, &Arc<PolicySet>> {
        let both = self.endpoints.plans().flat_map(|plan| [&plan.ingress, &plan.egress]);
        both.map(|set| (set.id, set)).collect()
    }
}

impl Compiled {
    fn into_update(self, endpoints: &BTreeMap<&PodId, [SetKey; 2]>) -> (State, Update) {
        let Self { next, table_changes, table_before, classes } = self;
        let plan = |[ingress, egress]: &[SetKey; 2]| EndpointPlan {
            ingress: Arc::clone(&next.sets[ingress].set),
            egress: Arc::clone(&next.sets[egress].set),
        };
        let update = Update {
            generation: next.generation,
            endpoints: endpoints.iter().map(|(pod, keys)| ((*pod).clone(), plan(keys))).collect(),
            retiring: next.retired_sets.iter().map(|(_, set, _)| Arc::clone(set)).collect(),
            table: Arc::clone(&next.table),
            table_changes,
            table_before,
            rules: Arc::clone(&next.rule_table),
            classes,
            faults: Vec::new(),
        };
        (next, update)
    }
}

/// Compiles clusters, one after the other, keeping numbers and artefacts where it can.
#[derive(Debug, Clone)]
pub struct Compiler {
    scope: Scope,
    limits: Limits,
    state: State,
    /// Of the last update, so that it need not be found out again each time.
    too_large: TooLarge,
    /// Of the last update; `None` where it closed something.
    placed: Option<Placed>,
    /// Of the last update but for pods, made when it is wanted.
    asked: Option<Asked>,
    #[cfg(feature = "test-support")]
    planted: Option<crate::test_support::PlantedBug>,
}

#[derive(Debug, Clone)]
struct State {
    generation: u64,
    /// Those in use, and those that a retired policy set may still need.
    atoms: HashMap<Atom, AtomId>,
    retired_atoms: HashMap<Atom, u64>,
    next_atom: AtomId,
    classes: Ids<ClassKey>,
    rules: Ids<Named>,
    set_ids: Ids<(SetKey, u64)>,
    sets: HashMap<SetKey, Held>,
    retired_sets: Vec<(u64, Arc<PolicySet>, Arc<Signatures>)>,
    programs: HashMap<Arc<RuleList>, Arc<Program>>,
    table: Arc<AddressTable>,
    rule_table: Arc<RuleTable>,
}

/// A policy set in use, and what it is made of.
#[derive(Debug, Clone)]
struct Held {
    set: Arc<PolicySet>,
    signatures: Arc<Signatures>,
    flat: Arc<FlatSet>,
}

impl State {
    fn new() -> Self {
        Self {
            generation: 0,
            atoms: HashMap::new(),
            retired_atoms: HashMap::new(),
            next_atom: 0,
            classes: Ids::starting_at(ClassId::UNKNOWN.0 + 1),
            rules: Ids::starting_at(RuleId::FIRST.0),
            set_ids: Ids::starting_at(0),
            sets: HashMap::new(),
            retired_sets: Vec::new(),
            programs: HashMap::new(),
            table: Arc::default(),
            rule_table: Arc::default(),
        }
    }
}

/// Lists that cannot be compiled.
type TooLarge = HashMap<RuleList, CompileError>;

/// A compilation that nothing stood in the way of.
struct Compiled {
    next: State,
    table_changes: TableChanges,
    table_before: Arc<AddressTable>,
    classes: usize,
}

impl Default for Compiler {
    /// For every pod, with the default limits.
    fn default() -> Self {
        Self::new(Scope::Cluster, Limits::default())
    }
}

impl Compiler {
    /// Starts without a cluster.
    pub fn new(scope: Scope, limits: Limits) -> Self {
        Self {
            scope,
            limits,
            state: State::new(),
            too_large: HashMap::new(),
            placed: None,
            asked: None,
            #[cfg(feature = "test-support")]
            planted: None,
        }
    }

    /// Makes the compiler wrong in one way, to prove that a comparison notices.
    #[cfg(feature = "test-support")]
    pub fn with_planted_bug(mut self, bug: crate::test_support::PlantedBug) -> Self {
        self.plant_bug(bug);
        self
    }

    #[cfg(feature = "test-support")]
    pub(crate) fn plant_bug(&mut self, bug: crate::test_support::PlantedBug) {
        self.planted = Some(bug);
        self.placed = None;
    }

    /// Gives rules the ids that an earlier compiler gave them, so that counters and events keep their meaning over a
    /// restart. For a compiler that has not compiled yet; ids that are out of range or taken are passed over.
    pub fn resume_rules(&mut self, rules: impl IntoIterator<Item = (RuleId, Named)>) {
        for (id, rule) in rules {
            if id >= RuleId::FIRST && id.0 < MAX_RESUMED {
                self.state.rules.restore(id.0, rule);
            }
        }
    }

    /// Compiles a cluster's present state.
    ///
    /// Numbers of classes, rules and sets that were in use stay theirs; unchanged sets and programs are those of the
    /// update before (`Arc::ptr_eq`). What is beyond a limit is closed, or in audit and not told of, as
    /// [`Update::faults`] says; each update tries it again.
    ///
    /// # Errors
    ///
    /// [`CompileError::MisfiledPolicy`], and [`CompileError::ImplLimitExceeded`] only where the limits have no room for
    /// a pod that nothing is allowed to. The compiler is then as if it had not been called, and the last update stands.
    pub fn update(&mut self, cluster: &Cluster) -> Result<Update, CompileError> {
        self.update_within(cluster, |_| Ok(()))
    }

    /// As [`Compiler::update`], for a caller whose tables have less room than the limits: `room` says whether an update
    /// fits. Where it does not, policies are left out until it does, those first that ask for the most peers of whom no
    /// policy in force asks.
    ///
    /// # Errors
    ///
    /// As [`Compiler::update`]; the error of `room` where an update without all those does not fit, and of limits that
    /// are too small for closing. What was in force before takes its room until [`Compiler::release`]: the same call may
    /// succeed after that.
    pub fn update_within(
        &mut self,
        cluster: &Cluster,
        room: impl FnMut(&Update) -> Result<(), CompileError>,
    ) -> Result<Update, CompileError> {
        self.update_closing(cluster, true, room)
    }

    /// As [`Compiler::update_within`]; where policies may not be left out, the first obstacle is the error.
    pub(crate) fn update_closing(
        &mut self,
        cluster: &Cluster,
        may_leave_out: bool,
        mut room: impl FnMut(&Update) -> Result<(), CompileError>,
    ) -> Result<Update, CompileError> {
        check(cluster)?;
        let ambiguous = isolation::ambiguous(cluster);
        let whole = self.set_keys(cluster);
        let mut refusals = Refusals::default();
        let mut too_large = TooLarge::new();
        let (next, mut update) = loop {
            let endpoints: BTreeMap<&PodId, [SetKey; 2]> =
                whole.iter().map(|(pod, keys)| (pod, keys.each_ref().map(|key| refusals.applied_to(key)))).collect();
            let compiled = self.attempt(cluster, &ambiguous, endpoints.values().flatten().collect(), &mut too_large);
            let obstacle = match compiled {
                Ok(compiled) => {
                    let (next, update) = compiled.into_update(&endpoints);
                    match room(&update) {
                        Ok(()) => break (next, update),
                        Err(error) => Obstacle::Together(error),
                    }
                }
                Err(obstacle) => obstacle,
            };
            #[cfg(feature = "test-support")]
            if self.planted == Some(crate::test_support::PlantedBug::NothingIsolated) {
                return Err(obstacle.into_error());
            }
            if !may_leave_out {
                return Err(obstacle.into_error());
            }
            match obstacle {
                Obstacle::Sets(sets) => {
                    for (key, error) in sets {
                        refusals.blame(key, error, |single| {
                            self.compiles_alone(cluster, &ambiguous, &single, &mut too_large)
                        })?;
                    }
                }
                Obstacle::Together(error) => {
                    let named_ports = flatten::named_ports(cluster);
                    let known = |atom: &Atom| self.state.atoms.contains_key(atom);
                    refusals.blame_heaviest(cluster, endpoints.values().flatten(), &named_ports, known, error)?;
                }
            }
        };
        let addresses = ambiguous.into_iter().map(|(address, pods)| Fault::AmbiguousAddress { address, pods });
        let refused = refusals.faults(whole.iter().flat_map(|(pod, keys)| keys.iter().map(move |key| (pod, key))));
        let unsure =
            isolation::unknown_accounts(whole.iter().flat_map(|(pod, keys)| keys.iter().map(move |key| (pod, key))));
        update.faults = addresses.chain(refused).chain(unsure).collect();
        self.state = next;
        self.too_large = too_large;
        self.asked = None;
        self.placed = update.faults.is_empty().then(|| Placed::new(cluster, &self.scope, &update.endpoints));
        Ok(update)
    }

    /// Whether a policy set is within the limits, if there is no other.
    fn compiles_alone(
        &self,
        cluster: &Cluster,
        ambiguous: &Ambiguous,
        key: &SetKey,
        too_large: &mut TooLarge,
    ) -> Result<(), CompileError> {
        let mut fresh = Self::new(self.scope.clone(), self.limits.clone());
        fresh.too_large.clone_from(&self.too_large);
        #[cfg(feature = "test-support")]
        {
            fresh.planted = self.planted;
        }
        match fresh.attempt(cluster, ambiguous, [key].into(), too_large) {
            Err(obstacle) => Err(obstacle.into_error()),
            Ok(_) => Ok(()),
        }
    }

    /// Compiles policy sets, and changes nothing of the compiler's.
    fn attempt(
        &self,
        cluster: &Cluster,
        ambiguous: &Ambiguous,
        keys: BTreeSet<&SetKey>,
        too_large: &mut TooLarge,
    ) -> Result<Compiled, Obstacle> {
        let mut next = self.state.clone();
        next.generation += 1;
        let mut failed = Vec::new();

        let named_ports = flatten::named_ports(cluster);
        let mut flattener = Flattener::new(cluster, &named_ports, &self.limits, &self.state.atoms, &mut next.rules);
        flattener.next_atom = next.next_atom;
        #[cfg(feature = "test-support")]
        {
            flattener.planted = self.planted;
        }
        let mut flat: Vec<(&SetKey, FlatSet)> = Vec::with_capacity(keys.len());
        for key in keys {
            match flattener.flatten(key) {
                Ok(set) => flat.push((key, set)),
                Err(error) => failed.push((key.clone(), error)),
            }
        }
        // What they ask about peers would be in everybody's way.
        if !failed.is_empty() {
            return Err(Obstacle::Sets(failed));
        }
        let Flattener { atoms, next_atom, mut rules_used, .. } = flattener;
        next.retired_atoms.retain(|atom, _| !atoms.contains_key(atom));
        for atom in self.state.atoms.keys().filter(|atom| !atoms.contains_key(atom)) {
            next.retired_atoms.entry(atom.clone()).or_insert(next.generation);
        }
        (next.next_atom, next.atoms) = (next_atom, atoms);
        next.atoms.extend(next.retired_atoms.keys().map(|atom| (atom.clone(), self.state.atoms[atom])));

        let classified = classes::classify(cluster, ambiguous, &next.atoms, &mut next.classes);
        let members = ClassMembers::new(next.classes.iter());

        let old_programs = std::mem::take(&mut next.programs);
        let mut old_sets = std::mem::take(&mut next.sets);
        let mut sets_used = BTreeSet::new();
        for (key, flat) in flat {
            let before = old_sets.remove(key);
            let mut signatures = before.as_ref().map(|held| (*held.signatures).clone()).unwrap_or_default();
            let (list, locals) = match signatures.resolve(&flat, &members, next.generation, &self.limits) {
                Ok(resolved) => resolved,
                Err(error) => {
                    failed.push((key.clone(), error));
                    continue;
                }
            };
            let id = next.set_ids.intern(&(key.clone(), signatures.epoch));
            sets_used.insert(id);
            let program = match old_programs.get(&list).or_else(|| next.programs.get(&list)) {
                Some(program) => Arc::clone(program),
                None => match self.compile(&list, too_large, &mut next.rules) {
                    Ok(program) => Arc::new(program),
                    Err(error) => {
                        failed.push((key.clone(), error));
                        continue;
                    }
                },
            };
            if list.audit.is_some() {
                rules_used.extend(program.diagram.leaves().into_iter().map(|leaf| leaf.rule.0));
            }
            next.programs.insert(Arc::new(list), Arc::clone(&program));
            let before = match before {
                Some(Held { set, signatures: old, .. }) if old.epoch != signatures.epoch => {
                    next.retired_sets.push((next.generation, set, old));
                    None
                }
                before => before.map(|held| held.set),
            };
            let same =
                before.filter(|old| old.id.0 == id && Arc::ptr_eq(&old.program, &program) && *old.locals == locals);
            let policies = || Arc::clone(&key.policies);
            let set = same.unwrap_or_else(|| {
                Arc::new(PolicySet { id: SetId(id), policies: policies(), program, locals: Arc::new(locals) })
            });
            next.sets.insert(key.clone(), Held { set, signatures: Arc::new(signatures), flat: Arc::new(flat) });
        }
        if !failed.is_empty() {
            return Err(Obstacle::Sets(failed));
        }

        let gone = old_sets.into_values().map(|Held { set, signatures, .. }| (next.generation, set, signatures));
        next.retired_sets.extend(gone);
        for (_, set, signatures) in &mut next.retired_sets {
            let locals = signatures.locals(&members);
            if *set.locals != locals {
                *set = Arc::new(PolicySet { locals: Arc::new(locals), ..(**set).clone() });
            }
        }

        let table_changes = self.state.table.changes_to(&classified.table);
        if !table_changes.is_empty() {
            next.table = Arc::new(classified.table);
        }
        let named = rules_used.iter().filter_map(|id| Some((RuleId(*id), Arc::clone(next.rules.shared(*id)?))));
        let rule_table = named.collect::<RuleTable>().marked_as_in(cluster);
        if *next.rule_table != rule_table {
            next.rule_table = Arc::new(rule_table);
        }
        next.classes.retire_others(&classified.used, next.generation);
        next.rules.retire_others(&rules_used, next.generation);
        next.set_ids.retire_others(&sets_used, next.generation);

        let classes = classified.used.len() + usize::from(!classified.used.contains(&ClassId::UNKNOWN.0));
        Ok(Compiled { next, table_changes, table_before: Arc::clone(&self.state.table), classes })
    }

    /// Says that nothing older than `generation` is in force any more: its tables and programs are written, and every
    /// packet that began under older ones is through. Numbers that fell out of use in it or before may now be given
    /// to others. Without this call no number is ever reused.
    pub fn release(&mut self, generation: u64) {
        self.state.classes.release(generation);
        self.state.rules.release(generation);
        self.state.set_ids.release(generation);
        self.state.retired_sets.retain(|(retired, _, _)| *retired > generation);
        let State { atoms, retired_atoms, .. } = &mut self.state;
        retired_atoms.retain(|atom, retired| {
            let keep = *retired > generation;
            if !keep {
                atoms.remove(atom);
                self.asked = None;
            }
            keep
        });
    }

    /// Whether something is kept for programs and tables that may still be in use, until [`Compiler::release`]: policy
    /// sets, what they ask, and numbers of classes, rules and sets.
    pub fn is_unreleased(&self) -> bool {
        let State { retired_atoms, retired_sets, classes, rules, set_ids, .. } = &self.state;
        let kept = !retired_atoms.is_empty() || !retired_sets.is_empty();
        kept || classes.any_retired() || rules.any_retired() || set_ids.any_retired()
    }

    fn compile(
        &self,
        list: &RuleList,
        too_large: &mut TooLarge,
        rules: &mut Ids<Named>,
    ) -> Result<Program, CompileError> {
        let known = self.too_large.get(list).or_else(|| too_large.get(list)).cloned();
        let compiled = known
            .map_or_else(|| compile(list, &self.limits, &mut |leaf, audit| rules::outcome(rules, leaf, audit)), Err);
        if let Err(error) = &compiled {
            too_large.insert(list.clone(), error.clone());
        }
        compiled
    }
}

fn check(cluster: &Cluster) -> Result<(), CompileError> {
    if let Some((key, policy)) = cluster.policies.iter().find(|(key, policy)| **key != policy.id) {
        return Err(CompileError::MisfiledPolicy { key: key.clone().into(), id: policy.id.clone().into() });
    }
    Ok(())
}

/// `outcome` numbers what decides beside what would if policies in audit were in force.
fn compile(
    list: &RuleList,
    limits: &Limits,
    outcome: &mut dyn FnMut(Leaf, Leaf) -> RuleId,
) -> Result<Program, CompileError> {
    debug_verify(list);
    let audit = list.audit.as_deref().map(|audit| opt::optimise(audit, limits)).transpose()?;
    let opt::Optimised { mut list, mut shadowed } = opt::optimise(list, limits)?;
    list.audit = audit.map(|audit| Box::new(audit.list));
    // What holds where no rule matches is no rule.
    shadowed.retain(|shadowed| shadowed.rule >= RuleId::FIRST);
    debug_verify(&list);
    let diagram = Diagram::build_audited(&list, limits, outcome)?;
    Ok(Program { list, diagram, shadowed })
}

/// Beyond any id that a compiler gives in practice, and few enough to keep a place for each.
const MAX_RESUMED: u32 = 1 << 22;

/// A broken invariant is a defect of ours, which a debug build should show at once.
fn debug_verify(list: &RuleList) {
    if cfg!(debug_assertions)
        && let Err(error) = verify::verify(list)
    {
        panic!("{error}\n{list}");
    }
}
