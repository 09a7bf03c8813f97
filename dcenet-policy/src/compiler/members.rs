//! Updates after which policies are what they were, and some pods, or names of some addresses, are not.
//!
//! Such an update asks, for these addresses alone, what policies ask about them, and finds their classes. A class
//! that there was changes the table and nothing else. A new one gets its local id in each policy set; a set that has none for
//! what the class satisfies is the only one whose list, diagram and program are made anew.
//!
//! What this does not cover is left to the full compilation: a pod that comes under policies that no other pod has together, or
//! was the last to have them; an address that has got a name and that several pods hold; endpoints that come and go; named ports that change; addresses that several pods claim; and
//! whatever is closed or too large.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::keys::{governs, keys_of};
use super::{
    CompileError, Compiler, EndpointPlan, Endpoints, Held, Locals, PolicySet, Program, Scope, SetId, Update, compile,
};
use crate::classes::{
    self, Atom, AtomId, Claim, ClassId, ClassKey, TableChanges, classes_ahead, longest, of_names, prefix_sets,
    selectors_by_namespace, sets_beside_pods,
};
use crate::flatten::{self, SetKey, Signatures};
use crate::ids::Ids;
use crate::ir::RuleList;
use crate::model::{
    Cluster, Direction, LabelSelector, NamedPort, NamespaceMatch, Pod, PodId, PodNetwork, Policy, PolicyId,
};

/// Where pods were, as of the last update.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    endpoints: Endpoints,
    pods: HashMap<PodId, Place>,
    /// How many pods and nodes have each address.
    holders: HashMap<IpAddr, u32>,
    set_users: HashMap<SetId, u32>,
}

#[derive(Debug, Clone)]
struct Place {
    addresses: BTreeSet<IpAddr>,
    ports: BTreeSet<NamedPort>,
    node: Option<String>,
    on_segment: bool,
    is_endpoint: bool,
}

impl Place {
    fn of(pod: &Pod, scope: &Scope) -> Self {
        let Pod { labels: _, addresses, ports, node, network: _, on_segment } = pod;
        Self {
            addresses: addresses.clone(),
            ports: ports.clone(),
            node: node.clone(),
            on_segment: *on_segment,
            is_endpoint: scope.holds(pod),
        }
    }
}

impl Placed {
    pub(super) fn new(cluster: &Cluster, scope: &Scope, endpoints: &Endpoints) -> Self {
        let own = || cluster.pods.iter().filter(|(_, pod)| pod.network == PodNetwork::Own);
        let mut holders: HashMap<IpAddr, u32> = HashMap::new();
        let of_nodes = cluster.nodes.values().flatten();
        for address in own().flat_map(|(_, pod)| &pod.addresses).chain(of_nodes) {
            *holders.entry(*address).or_default() += 1;
        }
        Self {
            endpoints: endpoints.clone(),
            pods: own().map(|(id, pod)| (id.clone(), Place::of(pod, scope))).collect(),
            holders,
            set_users: endpoints.users(),
        }
    }
}

/// What policies ask, as of the last full update.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    of_namespace: HashMap<String, Vec<(AtomId, Claim)>>,
    selectors: HashMap<AtomId, LabelSelector>,
    /// Of nodes and backends, by address.
    beside_pods: BTreeMap<IpAddr, ClassKey>,
    prefixes: BTreeMap<IpNet, ClassKey>,
    /// How many entries of the table name each class; one more of those that are there before any entry is.
    class_users: HashMap<ClassId, u32>,
    /// By the namespace that they name.
    policies: HashMap<String, Vec<PolicyId>>,
    /// Those that select namespaces.
    selecting: Vec<PolicyId>,
    /// The policy sets with a condition of which this is one part: the last.
    sets: HashMap<AtomId, Vec<SetId>>,
}

impl Asked {
    fn new(
        cluster: &Cluster,
        atoms: &HashMap<Atom, AtomId>,
        table: &classes::AddressTable,
        numbers: &Ids<ClassKey>,
        held: &HashMap<SetKey, Held>,
    ) -> Self {
        let mut sets: HashMap<AtomId, Vec<SetId>> = HashMap::new();
        for Held { set, signatures, .. } in held.values() {
            for atom in signatures.last_atoms() {
                sets.entry(atom).or_default().push(set.id);
            }
        }
        let (mut of_namespace, mut selectors) = (HashMap::new(), HashMap::new());
        for (namespace, asked) in selectors_by_namespace(cluster, atoms) {
            for (atom, selector, _) in &asked {
                selectors.entry(*atom).or_insert_with(|| (*selector).clone());
            }
            let asked = asked.into_iter().map(|(atom, _, claim)| (atom, claim)).collect();
            of_namespace.insert(namespace.to_owned(), asked);
        }
        let prefixes = prefix_sets(&cluster.catalog, atoms);
        let ahead = classes_ahead(atoms, &prefixes).into_iter().filter_map(|key| numbers.get(&key)).map(ClassId);
        let mut class_users = HashMap::new();
        for class in table.exact().values().chain(table.prefixes().values()).copied().chain(ahead) {
            *class_users.entry(class).or_default() += 1;
        }
        let (mut policies, mut selecting): (HashMap<String, Vec<PolicyId>>, _) = (HashMap::new(), Vec::new());
        for policy in cluster.policies.values() {
            match &policy.subject.namespaces {
                NamespaceMatch::Named(name) => policies.entry(name.clone()).or_default().push(policy.id.clone()),
                NamespaceMatch::Selected(_) => selecting.push(policy.id.clone()),
            }
        }
        Self {
            of_namespace,
            selectors,
            beside_pods: sets_beside_pods(cluster, atoms),
            prefixes,
            class_users,
            policies,
            selecting,
            sets,
        }
    }

    /// What an address satisfies that this pod has, or nobody; empty where the table needs no entry for it.
    fn satisfied(
        &self,
        cluster: &Cluster,
        address: IpAddr,
        pod: Option<(&PodId, &Pod)>,
        atoms: &HashMap<Atom, AtomId>,
    ) -> ClassKey {
        let mut key = self.beside_pods.get(&address).cloned().unwrap_or_default();
        key.extend(of_names(cluster.names.of_address(address).map(|(name, _)| name), atoms));
        if let Some((id, pod)) = pod {
            let asked = self.of_namespace.get(&id.namespace).into_iter().flatten();
            let meant = asked.filter(|(atom, claim)| {
                self.selectors.get(atom).is_some_and(|selector| claim.holds(selector, &pod.labels))
            });
            key.extend(meant.map(|(atom, _)| *atom));
            for NamedPort { name, protocol, port } in &pod.ports {
                for claim in [Claim::Sole, Claim::Any] {
                    let atom = Atom::Port { name: name.clone(), protocol: *protocol, port: *port, claim };
                    key.extend(atoms.get(&atom));
                }
            }
        }
        if !key.is_empty() {
            key.extend(longest(&self.prefixes, address).into_iter().flatten());
            key.sort_unstable();
            key.dedup();
        }
        key
    }
}

/// A policy set that is not what it was.
struct Changed<'a> {
    before: &'a Held,
    locals: Locals,
    /// Where a combination has got a local id.
    extended: Option<Signatures>,
}

/// The numbers of classes that were given for an update.
#[derive(Default)]
struct Numbers {
    given: Vec<u32>,
    /// With the generations in which they were retired.
    revived: Vec<(u32, u64)>,
}

impl Numbers {
    /// Undoes that.
    fn give_back(self, classes: &mut Ids<ClassKey>) {
        self.given.into_iter().for_each(|class| classes.take_back(class));
        self.revived.into_iter().for_each(|(class, generation)| classes.retire(class, generation));
    }
}

/// An update that was found, and is not yet the compiler's.
struct Found {
    update: Update,
    moved: Moved,
    sets: HashMap<SetId, Held>,
    /// By their places.
    retired_sets: Vec<(usize, Arc<PolicySet>)>,
    programs: Vec<(Arc<RuleList>, Arc<Program>)>,
    /// Of those classes whose number of entries changes.
    class_users: HashMap<ClassId, i64>,
    /// Whether some endpoint's program has to tell more peers apart.
    extends: bool,
}

impl Compiler {
    /// As [`Compiler::update`], where all that differs from the cluster of the last update that succeeded is these pods:
    /// some have come or gone, or have other labels, addresses or ports. Whatever else differs may be overlooked until
    /// [`Compiler::update`] is called.
    ///
    /// What it costs depends on what the change touches, where no endpoint comes or goes and policies stay what they were
    /// for each; otherwise it is a full compilation.
    ///
    /// # Errors
    ///
    /// As [`Compiler::update`].
    pub fn update_pods<'a>(
        &mut self,
        cluster: &Cluster,
        pods: impl IntoIterator<Item = &'a PodId>,
    ) -> Result<Update, CompileError> {
        self.update_pods_within(cluster, pods, |_| Ok(()))
    }

    /// As [`Compiler::update_pods`], for tables that have less room, as [`Compiler::update_within`].
    ///
    /// # Errors
    ///
    /// As [`Compiler::update_within`].
    pub fn update_pods_within<'a>(
        &mut self,
        cluster: &Cluster,
        pods: impl IntoIterator<Item = &'a PodId>,
        room: impl FnMut(&Update) -> Result<(), CompileError>,
    ) -> Result<Update, CompileError> {
        self.update_parts_within(cluster, pods, &BTreeSet::new(), room)
    }

    /// As [`Compiler::update_pods_within`], where the names that have been learnt of these addresses
    /// ([`Cluster::names`]) may differ, too.
    ///
    /// # Errors
    ///
    /// As [`Compiler::update_within`].
    pub fn update_parts_within<'a>(
        &mut self,
        cluster: &Cluster,
        pods: impl IntoIterator<Item = &'a PodId>,
        renamed: &BTreeSet<IpAddr>,
        mut room: impl FnMut(&Update) -> Result<(), CompileError>,
    ) -> Result<Update, CompileError> {
        match self.update_quickly_within(cluster, pods, renamed, &mut room, None) {
            Some(update) => Ok(update),
            None => {
                // Where it fails, these pods are not what they were at the last update that there was.
                self.placed = None;
                self.update_within(cluster, room)
            }
        }
    }

    pub(super) fn update_quickly_within<'a>(
        &mut self,
        cluster: &Cluster,
        pods: impl IntoIterator<Item = &'a PodId>,
        renamed: &BTreeSet<IpAddr>,
        room: impl FnOnce(&Update) -> Result<(), CompileError>,
        keep: Option<&mut dyn FnMut(Self)>,
    ) -> Option<Update> {
        let pods: BTreeSet<&PodId> = pods.into_iter().collect();
        let mut numbers = Numbers::default();
        match self.find(cluster, &pods, renamed, &mut numbers) {
            Some(found) if room(&found.update).is_ok() => {
                if let Some(keep) = keep.filter(|_| found.extends) {
                    let mut before = self.clone();
                    numbers.give_back(&mut before.state.classes);
                    keep(before);
                }
                Some(self.take(found))
            }
            _ => {
                numbers.give_back(&mut self.state.classes);
                None
            }
        }
    }

    /// Whether [`Compiler::update_parts_within`] would compile everything anew.
    #[cfg(feature = "test-support")]
    pub fn would_compile_all<'a>(
        &self,
        cluster: &Cluster,
        pods: impl IntoIterator<Item = &'a PodId>,
        renamed: &BTreeSet<IpAddr>,
    ) -> bool {
        self.clone().find(cluster, &pods.into_iter().collect(), renamed, &mut Numbers::default()).is_none()
    }

    /// The update, unless it is for the full compilation. Tells of the numbers of classes that it has given.
    fn find(
        &mut self,
        cluster: &Cluster,
        pods: &BTreeSet<&PodId>,
        renamed: &BTreeSet<IpAddr>,
        numbers: &mut Numbers,
    ) -> Option<Found> {
        let before = self.placed.as_ref()?;
        // What costs nothing is asked first: a pod of this node that comes or goes is for the full compilation.
        let stays = |id: &&PodId| {
            let (old, new) = (before.pods.get(*id), cluster.pods.get(*id));
            let ports = [old.map(|place| &place.ports), new.map(|pod| &pod.ports)];
            let [had, has] = ports.map(|ports| ports.filter(|ports| !ports.is_empty()));
            new.is_none_or(|pod| pod.network == PodNetwork::Own)
                && old.is_some_and(|place| place.is_endpoint) == new.is_some_and(|pod| self.scope.holds(pod))
                && had == has
        };
        if !pods.iter().all(stays) {
            return None;
        }
        let state = &mut self.state;
        let asked = self
            .asked
            .get_or_insert_with(|| Asked::new(cluster, &state.atoms, &state.table, &state.classes, &state.sets));
        let mut placed_pods: Vec<(&PodId, Option<Place>)> = Vec::new();
        let mut plans: Vec<(&PodId, [SetKey; 2])> = Vec::new();
        let mut keys: BTreeMap<IpAddr, ClassKey> = BTreeMap::new();
        for &id in pods {
            let (old, new) = (before.pods.get(id), cluster.pods.get(id));
            // Nothing was found out about a namespace without pods.
            if new.is_some() && !asked.of_namespace.contains_key(&id.namespace) {
                return None;
            }
            let place = new.map(|pod| Place::of(pod, &self.scope));
            let is_endpoint = place.as_ref().is_some_and(|place| place.is_endpoint);
            if let (true, Some(pod), Some(old)) = (is_endpoint, new, old) {
                if pod.node != old.node || pod.on_segment != old.on_segment {
                    return None;
                }
                let named = asked.policies.get(&id.namespace).into_iter().flatten().chain(&asked.selecting);
                let candidates = named.map(|policy| cluster.policies.get(policy)).collect::<Option<Vec<&Policy>>>()?;
                let governing = candidates.into_iter().filter(|policy| governs(cluster, policy, id, pod)).collect();
                let names = &mut |policies: Vec<PolicyId>| {
                    let names = flatten::names_used(cluster, &policies, Direction::Ingress);
                    (policies.into(), names)
                };
                plans.push((id, keys_of(cluster, pod, governing, names)));
            }
            let addresses = |place: Option<&Place>| place.map(|place| place.addresses.clone()).unwrap_or_default();
            let (had, has) = (addresses(old), addresses(place.as_ref()));
            for address in had.union(&has) {
                let holders = before.holders.get(address).copied().unwrap_or(0);
                if holders != u32::from(had.contains(address)) || keys.contains_key(address) {
                    return None;
                }
                let holder = new.filter(|_| has.contains(address)).map(|pod| (id, pod));
                keys.insert(*address, asked.satisfied(cluster, *address, holder, &state.atoms));
            }
            placed_pods.push((id, place));
        }
        for address in renamed {
            if keys.contains_key(address) {
                continue;
            }
            let holds = |pod: &Pod| pod.network == PodNetwork::Own && pod.addresses.contains(address);
            let mut holders = Vec::new();
            if before.holders.contains_key(address) {
                holders.extend(cluster.pods.iter().filter(|(_, pod)| holds(pod)));
            }
            let holder = match holders[..] {
                [] => None,
                [holder] => Some(holder),
                _ => return None,
            };
            keys.insert(*address, asked.satisfied(cluster, *address, holder, &state.atoms));
        }

        // Classes.
        let mut table_changes = TableChanges::default();
        let mut new_classes: BTreeMap<u32, &ClassKey> = BTreeMap::new();
        let mut class_users: Vec<(ClassId, i64)> = Vec::new();
        for (address, key) in &keys {
            let old = state.table.exact().get(address).copied();
            let class = (!key.is_empty()).then(|| {
                let known = state.classes.get(key);
                numbers.revived.extend(known.and_then(|class| Some((class, state.classes.retired_at(class)?))));
                let class = state.classes.intern(key);
                if known.is_none() {
                    numbers.given.push(class);
                    new_classes.insert(class, key);
                }
                ClassId(class)
            });
            if class != old {
                class_users.extend(old.map(|class| (class, -1)));
                class_users.extend(class.map(|class| (class, 1)));
                table_changes.exact.insert(*address, class);
            }
        }

        // Their local ids.
        let mut changed: HashMap<SetId, Changed<'_>> = HashMap::new();
        let mut retired_sets: Vec<(usize, Arc<PolicySet>)> = Vec::new();
        let last_set = state.sets.values().map(|held| held.set.id.0 as usize).max().unwrap_or(0);
        for (class, atoms) in &new_classes {
            let mut concerned = vec![false; last_set + 1];
            for set in atoms.iter().filter_map(|atom| asked.sets.get(atom)).flatten() {
                if let Some(concerned) = concerned.get_mut(set.0 as usize) {
                    *concerned = true;
                }
            }
            for held in state.sets.values() {
                // It satisfies none of the others' conditions, and its number may have been another's.
                if !concerned[held.set.id.0 as usize] && held.set.local(ClassId(*class)) == 0 {
                    continue;
                }
                let signature = held.signatures.of_class(atoms);
                let own = changed.get(&held.set.id);
                let extended = own.and_then(|own| own.extended.as_ref());
                let local = extended.unwrap_or(&held.signatures).local(&signature);
                let before = match own {
                    Some(own) => own.locals.get(*class),
                    None => held.set.local(ClassId(*class)),
                };
                if local == Some(before) {
                    continue;
                }
                let own = changed.entry(held.set.id).or_insert_with(|| Changed {
                    before: held,
                    locals: (*held.set.locals).clone(),
                    extended: None,
                });
                let local = match local {
                    Some(local) => local,
                    None => {
                        let signatures = own.extended.get_or_insert_with(|| (*held.signatures).clone());
                        signatures.add(signature, &self.limits)?
                    }
                };
                own.locals.set(*class, local);
            }
            for (at, (_, set, signatures)) in state.retired_sets.iter().enumerate() {
                let place = retired_sets.iter().position(|(known, _)| *known == at);
                let set = place.map_or(set, |place| &retired_sets[place].1);
                let local = signatures.local(&signatures.of_class(atoms)).unwrap_or(0);
                if set.local(ClassId(*class)) != local {
                    let mut locals = (*set.locals).clone();
                    locals.set(*class, local);
                    let set = Arc::new(PolicySet { locals: Arc::new(locals), ..(**set).clone() });
                    match place {
                        Some(place) => retired_sets[place].1 = set,
                        None => retired_sets.push((at, set)),
                    }
                }
            }
        }

        // Policy sets.
        let extends = changed.values().any(|changed| changed.extended.is_some());
        let mut sets: HashMap<SetId, Held> = HashMap::new();
        let mut programs: Vec<(Arc<RuleList>, Arc<Program>)> = Vec::new();
        for (id, Changed { before: held, locals, extended }) in changed {
            let mut program = Arc::clone(&held.set.program);
            if let Some(signatures) = &extended {
                let list = signatures.list(&held.flat);
                let known = programs.iter().find(|(known, _)| **known == list).map(|(_, program)| program);
                program = match state.programs.get(&list).or(known) {
                    Some(program) => Arc::clone(program),
                    None => {
                        // What it ends with would need numbers.
                        if list.audit.is_some() {
                            return None;
                        }
                        let program = Arc::new(compile(&list, &self.limits, &mut |leaf, _| leaf.rule).ok()?);
                        programs.push((Arc::new(list), Arc::clone(&program)));
                        program
                    }
                };
            }
            let signatures = extended.map_or_else(|| Arc::clone(&held.signatures), Arc::new);
            let set = Arc::new(PolicySet { program, locals: Arc::new(locals), ..(*held.set).clone() });
            sets.insert(id, Held { set, signatures, flat: Arc::clone(&held.flat) });
        }

        // Endpoints.
        let replaced: HashMap<SetId, Arc<PolicySet>> =
            sets.iter().map(|(id, held)| (*id, Arc::clone(&held.set))).collect();
        let mut endpoints = before.endpoints.clone();
        endpoints.replace_sets(&replaced);
        let mut set_users: HashMap<SetId, u32> = HashMap::new();
        for (id, keys) in &plans {
            let mut ways = Vec::new();
            for key in keys {
                let set = &state.sets.get(key)?.set;
                ways.push(replaced.get(&set.id).unwrap_or(set));
            }
            let [ingress, egress] = ways[..] else { return None };
            let old = before.endpoints.get(id)?;
            for (old, new) in [(&old.ingress, ingress), (&old.egress, egress)] {
                if old.id != new.id {
                    let users = |id: SetId| before.set_users.get(&id).copied().unwrap_or(0);
                    *set_users.entry(new.id).or_insert_with(|| users(new.id)) += 1;
                    let left = set_users.entry(old.id).or_insert_with(|| users(old.id));
                    *left = left.checked_sub(1)?;
                }
            }
            endpoints.set(id, EndpointPlan { ingress: Arc::clone(ingress), egress: Arc::clone(egress) });
        }
        if set_users.values().any(|users| *users == 0) {
            return None;
        }

        let table = match table_changes.exact.is_empty() {
            true => Arc::clone(&state.table),
            false => Arc::new(state.table.with_exact(&table_changes.exact)),
        };
        let mut users = HashMap::new();
        for (class, by) in &class_users {
            let before = || i64::from(asked.class_users.get(class).copied().unwrap_or(0));
            *users.entry(*class).or_insert_with(before) += by;
        }
        let is_known = |class: &&ClassId| **class != ClassId::UNKNOWN && asked.class_users.contains_key(class);
        let known = asked.class_users.len() - usize::from(asked.class_users.contains_key(&ClassId::UNKNOWN));
        let unchanged = known - users.keys().filter(is_known).count();
        let classes = 1 + unchanged + users.values().filter(|users| **users > 0).count();
        let retiring = state.retired_sets.iter().enumerate().map(|(at, (_, set, _))| {
            let changed = retired_sets.iter().find(|(known, _)| *known == at);
            Arc::clone(changed.map_or(set, |(_, set)| set))
        });
        let update = Update {
            generation: state.generation + 1,
            endpoints: endpoints.clone(),
            retiring: retiring.collect(),
            table,
            table_changes,
            table_before: Arc::clone(&state.table),
            rules: Arc::clone(&state.rule_table),
            classes,
            faults: Vec::new(),
        };
        let placed_pods = placed_pods.into_iter().map(|(id, place)| (id.clone(), place)).collect();
        let moved = Moved { endpoints, pods: placed_pods, set_users };
        Some(Found { update, moved, sets, retired_sets, programs, class_users: users, extends })
    }

    /// Makes an update the compiler's.
    fn take(&mut self, found: Found) -> Update {
        let Found { update, moved, mut sets, retired_sets, programs, class_users, extends: _ } = found;
        let state = &mut self.state;
        state.generation = update.generation;
        state.table = Arc::clone(&update.table);
        for (at, set) in retired_sets {
            state.retired_sets[at].1 = set;
        }
        for held in state.sets.values_mut() {
            if let Some(next) = sets.remove(&held.set.id) {
                *held = next;
            }
        }
        if !programs.is_empty() {
            state.programs.extend(programs);
            let used: BTreeSet<*const Program> =
                state.sets.values().map(|held| Arc::as_ptr(&held.set.program)).collect();
            state.programs.retain(|_, program| used.contains(&Arc::as_ptr(program)));
        }
        if let Some(asked) = &mut self.asked {
            for (class, users) in class_users {
                if users > 0 {
                    asked.class_users.insert(class, users as u32);
                } else {
                    asked.class_users.remove(&class);
                    state.classes.retire(class.0, update.generation);
                }
            }
        }
        if let Some(placed) = &mut self.placed {
            placed.take(moved);
        }
        update
    }
}

/// What [`Placed`] becomes.
struct Moved {
    endpoints: Endpoints,
    pods: Vec<(PodId, Option<Place>)>,
    set_users: HashMap<SetId, u32>,
}

impl Placed {
    fn take(&mut self, Moved { endpoints, pods, set_users }: Moved) {
        self.endpoints = endpoints;
        self.set_users.extend(set_users);
        for (id, place) in pods {
            let has = place.as_ref().map(|place| place.addresses.clone()).unwrap_or_default();
            let before = match place {
                Some(place) => self.pods.insert(id, place),
                None => self.pods.remove(&id),
            };
            for address in before.iter().flat_map(|place| &place.addresses) {
                self.holders.remove(address);
            }
            self.holders.extend(has.into_iter().map(|address| (address, 1)));
        }
    }
}
