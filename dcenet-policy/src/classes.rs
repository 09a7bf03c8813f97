//! Who an address is, as far as policies can tell.
//!
//! Everything that some policy in use asks about a peer is an *atom*: a pod selector, a CIDR block, a group of prefixes,
//! clusters, a name of
//! the Domain Name System, a node, a backend of a service, a port that the peer names. The *class* of an address is the set of atoms that it satisfies, under a small number. One
//! [`AddressTable`] for the node turns an address into its class: an exact entry where a pod or node holds the
//! address, else the longest prefix, else [`ClassId::UNKNOWN`].
//!
//! A policy set distinguishes far less than the classes do: its own array turns a class into a *local id*, so that
//! a pod that comes, goes or changes labels changes table entries and arrays, and a program only when it does
//! something no peer did before.
//!
//! Ports named in egress rules are resolved here: `name = number` on a peer is an atom, which the rule's condition
//! asks for beside the peer's own.
//!
//! Class ids are stable while in use; see [`Compiler::release`](crate::Compiler::release) for their reuse.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;

use crate::ids::Ids;
use crate::ir::Service;
use crate::isolation::Ambiguous;
use crate::model::{
    Action, Catalog, Cluster, Direction, DomainName, IpBlock, LabelSelector, Labels, NamePattern, NamedPort,
    NamespaceMatch, Operator, Peer, PodMatch, PodNetwork, Protocol, SERVICE_ACCOUNT_LABEL, ServiceId,
};

/// A class of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct ClassId(pub u32);

impl ClassId {
    /// Addresses that satisfy nothing that any policy asks.
    pub const UNKNOWN: Self = Self(0);
}

/// Something that a policy asks about a peer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Atom {
    Pods(PodMatch, Claim),
    Block(IpBlock),
    Group(String, Claim),
    Clusters(LabelSelector, Claim),
    /// The addresses learnt of names.
    Name(NamePattern),
    /// The node of this name.
    Node(String),
    Nodes(LabelSelector, Claim),
    /// A backend or an address of the service, with this port.
    Backend(ServiceId, Protocol, Option<u16>),
    Port {
        name: String,
        protocol: Protocol,
        port: u16,
        claim: Claim,
    },
}

impl Atom {
    /// What a rule asks about a peer: one of these, each for its services. Where it is not known who is meant, and that
    /// must not be, it is everybody.
    pub(crate) fn of(peer: &Peer, direction: Direction, claim: Claim, catalog: &Catalog) -> Vec<(Self, Service)> {
        let atom = match peer {
            Peer::Pods(pods) => Self::Pods(pods.clone(), claim),
            Peer::Block(block) => Self::Block(block.clone()),
            Peer::Group(name) => Self::Group(name.clone(), claim),
            Peer::Clusters(selector) => Self::Clusters(selector.clone(), claim),
            Peer::Nodes(_) if catalog.node_labels.is_empty() && claim == Claim::Any => return Self::everybody(),
            Peer::Nodes(selector) => Self::Nodes(selector.clone(), claim),
            Peer::Service(_) | Peer::Name(_) if direction == Direction::Ingress => return Vec::new(),
            Peer::Name(_) if claim == Claim::Any => return Self::everybody(),
            Peer::Name(pattern) => Self::Name(pattern.clone()),
            Peer::Service(id) => {
                let known = [&catalog.services, &catalog.service_addresses].map(|listed| listed.get(id));
                if known.contains(&None) && claim == Claim::Any {
                    return Self::everybody();
                }
                let listening: BTreeSet<(Protocol, Option<u16>)> =
                    known.into_iter().flatten().flatten().map(|backend| (backend.protocol, backend.port)).collect();
                let atom = |(protocol, port): (Protocol, Option<u16>)| {
                    let service = match port {
                        None => Service::all_of(protocol),
                        Some(port) => Service::Ports { protocol, first: port, last: port },
                    };
                    (Self::Backend(id.clone(), protocol, port), service)
                };
                return listening.into_iter().map(atom).collect();
            }
        };
        vec![(atom, Service::Any)]
    }

    fn everybody() -> Vec<(Self, Service)> {
        everything().map(|block| (Self::Block(block), Service::Any)).to_vec()
    }
}

/// All addresses of both families.
fn everything() -> [IpBlock; 2] {
    [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())].map(|cidr| IpBlock { cidr, except: Vec::new() })
}

/// Whether a pod that is asked about must be the only one that claims its address, and its service account, a node's
/// labels, a group, a cluster or a service be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Claim {
    /// It must.
    Sole,
    /// It may be one of several.
    Any,
}

impl Claim {
    /// Whether a pod with the labels is meant by the selector.
    pub(crate) fn holds(self, selector: &LabelSelector, labels: &Labels) -> bool {
        match self {
            Self::Sole => selector_holds(selector, labels),
            Self::Any => selector_may_hold(selector, labels),
        }
    }

    /// What rules ask for: where it is not known who has an address, nobody is allowed by it and everybody denied. A rule
    /// that passes asks for both.
    pub(crate) fn needed(action: Action) -> &'static [Self] {
        match action {
            Action::Allow => &[Self::Sole],
            Action::Deny | Action::Reject => &[Self::Any],
            Action::Pass => &[Self::Sole, Self::Any],
        }
    }
}

/// An atom's number; never reused.
pub(crate) type AtomId = u32;

/// Address to class, for both families.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AddressTable {
    exact: BTreeMap<IpAddr, ClassId>,
    prefixes: BTreeMap<IpNet, ClassId>,
}

impl AddressTable {
    #[cfg(test)]
    pub(crate) fn of(exact: BTreeMap<IpAddr, ClassId>, prefixes: BTreeMap<IpNet, ClassId>) -> Self {
        Self { exact, prefixes }
    }

    /// Entries for single addresses.
    pub fn exact(&self) -> &BTreeMap<IpAddr, ClassId> {
        &self.exact
    }

    /// Entries for prefixes; the longest that holds an address counts.
    pub fn prefixes(&self) -> &BTreeMap<IpNet, ClassId> {
        &self.prefixes
    }

    /// The class of an address.
    pub fn lookup(&self, address: IpAddr) -> ClassId {
        if let Some(class) = self.exact.get(&address) {
            return *class;
        }
        longest(&self.prefixes, address).copied().unwrap_or(ClassId::UNKNOWN)
    }

    /// The table after changes of single addresses.
    pub(crate) fn with_exact(&self, changes: &BTreeMap<IpAddr, Option<ClassId>>) -> Self {
        let mut next = self.clone();
        for (address, class) in changes {
            match class {
                Some(class) => drop(next.exact.insert(*address, *class)),
                None => drop(next.exact.remove(address)),
            }
        }
        next
    }

    /// What has to be written to turn `self` into `next`.
    pub fn changes_to(&self, next: &Self) -> TableChanges {
        TableChanges { exact: changes(&self.exact, &next.exact), prefixes: changes(&self.prefixes, &next.prefixes) }
    }
}

/// Entries to write (`Some`) and to remove (`None`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TableChanges {
    /// For single addresses.
    pub exact: BTreeMap<IpAddr, Option<ClassId>>,
    /// For prefixes.
    pub prefixes: BTreeMap<IpNet, Option<ClassId>>,
}

impl TableChanges {
    /// Whether nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.prefixes.is_empty()
    }
}

fn changes<K: Ord + Copy>(from: &BTreeMap<K, ClassId>, to: &BTreeMap<K, ClassId>) -> BTreeMap<K, Option<ClassId>> {
    let (mut from, mut to) = (from.iter().peekable(), to.iter().peekable());
    let mut changes = BTreeMap::new();
    loop {
        let order = match (from.peek(), to.peek()) {
            (None, None) => return changes,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((old, _)), Some((new, _))) => old.cmp(new),
        };
        let old = if order.is_le() { from.next() } else { None };
        let new = if order.is_ge() { to.next() } else { None };
        if let (true, Some((key, _))) = (old != new, old.or(new)) {
            changes.insert(*key, new.map(|(_, class)| *class));
        }
    }
}

/// The value of the longest prefix that holds an address.
///
/// Prefixes sort by address, then length, so each one that holds the address stands before it, and the nearest that
/// does not hold it shares a shorter prefix with it, beyond which the search goes on.
pub(crate) fn longest<V>(prefixes: &BTreeMap<IpNet, V>, address: IpAddr) -> Option<&V> {
    let mut probe = IpNet::from(address);
    loop {
        let (found, value) = prefixes.range(..=probe).next_back()?;
        if found.contains(&address) {
            return Some(value);
        }
        let common = common_length(found.addr(), address)?;
        probe = IpNet::new(address, common.min(probe.prefix_len().checked_sub(1)?)).ok()?.trunc();
    }
}

/// How many leading bits two addresses of one family share.
fn common_length(left: IpAddr, right: IpAddr) -> Option<u8> {
    match (left, right) {
        (IpAddr::V4(left), IpAddr::V4(right)) => Some((left.to_bits() ^ right.to_bits()).leading_zeros() as u8),
        (IpAddr::V6(left), IpAddr::V6(right)) => Some((left.to_bits() ^ right.to_bits()).leading_zeros() as u8),
        _ => None,
    }
}

/// The classes of a cluster's addresses over a set of atoms.
pub(crate) struct Classified {
    pub(crate) table: AddressTable,
    pub(crate) used: BTreeSet<u32>,
}

/// Which atoms a class satisfies, in ascending order.
pub(crate) type ClassKey = Vec<AtomId>;

pub(crate) fn classify(
    cluster: &Cluster,
    ambiguous: &Ambiguous,
    atoms: &HashMap<Atom, AtomId>,
    classes: &mut Ids<ClassKey>,
) -> Classified {
    let sets = prefix_sets(&cluster.catalog, atoms);
    let mut used = BTreeSet::new();
    let mut class_of = |key: &ClassKey| {
        let class = if key.is_empty() { ClassId::UNKNOWN } else { ClassId(classes.intern(key)) };
        used.insert(class.0);
        class
    };
    let mut table = AddressTable::default();
    for (prefix, key) in &sets {
        table.prefixes.insert(*prefix, class_of(key));
    }
    for (address, mut key) in exact_sets(cluster, ambiguous, atoms) {
        let inherited = longest(&sets, address).cloned().unwrap_or_default();
        key.extend(inherited);
        key.sort_unstable();
        key.dedup();
        table.exact.insert(address, class_of(&key));
    }
    for key in classes_ahead(atoms, &sets) {
        class_of(&key);
    }
    Classified { table, used }
}

/// The classes that addresses learnt of one name have, as a rule: they are there before the first answer is, so that no
/// program need be made for it.
pub(crate) fn classes_ahead(atoms: &HashMap<Atom, AtomId>, prefixes: &BTreeMap<IpNet, ClassKey>) -> BTreeSet<ClassKey> {
    let mut keys = BTreeSet::new();
    for id in atoms.iter().filter_map(|(atom, id)| matches!(atom, Atom::Name(_)).then_some(*id)) {
        keys.insert(vec![id]);
        for everybody in everything() {
            let mut key = prefixes.get(&everybody.cidr).cloned().unwrap_or_default();
            key.push(id);
            key.sort_unstable();
            keys.insert(key);
        }
    }
    keys
}

/// What is asked about the names that have been learnt of an address; one thing maybe more than once.
pub(crate) fn of_names<'a>(
    names: impl IntoIterator<Item = &'a DomainName>,
    atoms: &HashMap<Atom, AtomId>,
) -> Vec<AtomId> {
    let patterns = names.into_iter().flat_map(NamePattern::all_of);
    patterns.filter_map(|pattern| atoms.get(&Atom::Name(pattern)).copied()).collect()
}

/// The blocks that hold the addresses of each prefix that no longer prefix here holds.
pub(crate) fn prefix_sets(catalog: &Catalog, atoms: &HashMap<Atom, AtomId>) -> BTreeMap<IpNet, ClassKey> {
    #[derive(Default)]
    struct Marks {
        begin: Vec<usize>,
        end: Vec<usize>,
    }
    let everybody = everything();
    // A group's blocks may overlap, and an exception of one is none of another.
    let mut owners: Vec<AtomId> = Vec::new();
    let mut marks: BTreeMap<IpNet, Marks> = BTreeMap::new();
    for (atom, id) in atoms {
        let blocks: Vec<&IpBlock> = match atom {
            Atom::Block(block) => vec![block],
            Atom::Group(name, claim) => match (catalog.groups.get(name), claim) {
                (Some(blocks), _) => blocks.iter().collect(),
                (None, Claim::Any) => everybody.iter().collect(),
                (None, Claim::Sole) => Vec::new(),
            },
            Atom::Clusters(selector, Claim::Any) if !catalog.knows_clusters(selector) => everybody.iter().collect(),
            Atom::Clusters(selector, _) => {
                let meant = catalog.clusters.values().filter(|known| selector_holds(selector, &known.labels));
                meant.flat_map(|known| &known.blocks).collect()
            }
            _ => continue,
        };
        for IpBlock { cidr, except } in blocks {
            if except.iter().any(|hole| hole.contains(cidr)) {
                continue;
            }
            let block = owners.len();
            owners.push(*id);
            marks.entry(cidr.trunc()).or_default().begin.push(block);
            for hole in except {
                marks.entry(hole.trunc()).or_default().end.push(block);
            }
        }
    }
    let mut sets: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
    // Outer prefixes sort before those they hold, so a stack of the open ones finds each one's parent.
    let mut open: Vec<IpNet> = Vec::new();
    for (prefix, Marks { begin, end }) in marks {
        while open.last().is_some_and(|outer| !outer.contains(&prefix)) {
            open.pop();
        }
        let mut set = open.last().and_then(|outer| sets.get(outer)).cloned().unwrap_or_default();
        set.extend(begin);
        set.retain(|block| !end.contains(block));
        sets.insert(prefix, set);
        open.push(prefix);
    }
    let ids = |blocks: Vec<usize>| {
        let mut ids: ClassKey = blocks.into_iter().map(|block| owners[block]).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    };
    sets.into_iter().map(|(prefix, blocks)| (prefix, ids(blocks))).collect()
}

/// The atoms, blocks aside, of each address that a pod or node holds; addresses without any are left out.
fn exact_sets(cluster: &Cluster, ambiguous: &Ambiguous, atoms: &HashMap<Atom, AtomId>) -> BTreeMap<IpAddr, ClassKey> {
    let mut sets = sets_beside_pods(cluster, atoms);
    let mut add = |address: &IpAddr, ids: &[AtomId]| {
        if !ids.is_empty() {
            sets.entry(*address).or_default().extend(ids);
        }
    };
    for (address, names) in cluster.names.by_address() {
        add(address, &of_names(names, atoms));
    }
    let by_namespace = selectors_by_namespace(cluster, atoms);
    for (id, pod) in &cluster.pods {
        if pod.network == PodNetwork::Host {
            continue;
        }
        let candidates = by_namespace.get(id.namespace.as_str()).into_iter().flatten();
        let mut sets = [Claim::Sole, Claim::Any].map(|claim| (claim, ClassKey::new()));
        for (atom, _, claim) in candidates.filter(|(_, selector, claim)| claim.holds(selector, &pod.labels)) {
            sets.iter_mut().filter(|(of, _)| of == claim).for_each(|(_, set)| set.push(*atom));
        }
        for (claim, set) in &mut sets {
            for port in &pod.ports {
                let NamedPort { name, protocol, port } = port.clone();
                set.extend(atoms.get(&Atom::Port { name, protocol, port, claim: *claim }));
            }
        }
        for address in &pod.addresses {
            for (claim, set) in &sets {
                if *claim == Claim::Any || !ambiguous.contains_key(address) {
                    add(address, set);
                }
            }
        }
    }
    sets
}

/// The atoms of addresses that are asked for otherwise than by pods, prefixes and names: of nodes, and of backends.
pub(crate) fn sets_beside_pods(cluster: &Cluster, atoms: &HashMap<Atom, AtomId>) -> BTreeMap<IpAddr, ClassKey> {
    let mut sets: BTreeMap<IpAddr, ClassKey> = BTreeMap::new();
    let mut add = |address: &IpAddr, ids: &[AtomId]| sets.entry(*address).or_default().extend(ids);
    for (node, addresses) in &cluster.nodes {
        if let Some(id) = atoms.get(&Atom::Node(node.clone())) {
            addresses.iter().for_each(|address| add(address, &[*id]));
        }
    }
    for (atom, id) in atoms {
        match atom {
            Atom::Nodes(selector, claim) => {
                for (node, addresses) in cluster.addresses_of_nodes() {
                    let holds = match cluster.catalog.node_labels.get(node) {
                        Some(labels) => selector_holds(selector, labels),
                        None => *claim == Claim::Any,
                    };
                    if holds {
                        addresses.iter().for_each(|address| add(address, &[*id]));
                    }
                }
            }
            Atom::Backend(service, protocol, port) => {
                let Catalog { services, service_addresses, .. } = &cluster.catalog;
                let all = [services, service_addresses].into_iter().filter_map(|listed| listed.get(service)).flatten();
                let listening = all.filter(|backend| backend.protocol == *protocol && backend.port == *port);
                listening.for_each(|backend| add(&backend.address, &[*id]));
            }
            _ => {}
        }
    }
    sets
}

/// What is asked about the pods of each namespace that has one.
pub(crate) fn selectors_by_namespace<'a>(
    cluster: &'a Cluster,
    atoms: &'a HashMap<Atom, AtomId>,
) -> HashMap<&'a str, Vec<(AtomId, &'a LabelSelector, Claim)>> {
    let mut by_namespace: HashMap<&str, Vec<(AtomId, &LabelSelector, Claim)>> = HashMap::new();
    let namespaces: BTreeSet<&str> = cluster.pods.keys().map(|pod| pod.namespace.as_str()).collect();
    for namespace in namespaces {
        by_namespace.insert(namespace, Vec::new());
    }
    let labels: HashMap<&str, Labels> =
        by_namespace.keys().map(|namespace| (*namespace, cluster.namespace_labels(namespace))).collect();
    for (atom, id) in atoms {
        let Atom::Pods(PodMatch { namespaces, pods }, claim) = atom else { continue };
        match namespaces {
            NamespaceMatch::Named(name) => {
                if let Some(list) = by_namespace.get_mut(name.as_str()) {
                    list.push((*id, pods, *claim));
                }
            }
            NamespaceMatch::Selected(selector) => {
                for (namespace, list) in &mut by_namespace {
                    if selector_holds(selector, &labels[namespace]) {
                        list.push((*id, pods, *claim));
                    }
                }
            }
        }
    }
    by_namespace
}

/// Whether labels satisfy a selector.
pub(crate) fn selector_holds(selector: &LabelSelector, labels: &Labels) -> bool {
    holds_but(selector, labels, false)
}

/// Whether they may: what is not known is the service account of a pod without the label for it.
pub(crate) fn selector_may_hold(selector: &LabelSelector, labels: &Labels) -> bool {
    holds_but(selector, labels, true)
}

fn holds_but(selector: &LabelSelector, labels: &Labels, of_unknown: bool) -> bool {
    for requirement in &selector.requirements {
        if requirement.key == SERVICE_ACCOUNT_LABEL && !labels.contains_key(SERVICE_ACCOUNT_LABEL) {
            if of_unknown {
                continue;
            }
            return false;
        }
        let holds = match (&requirement.operator, labels.get(&requirement.key)) {
            (Operator::In(values), Some(value)) => values.contains(value),
            (Operator::NotIn(values), Some(value)) => !values.contains(value),
            (Operator::Exists, Some(_)) | (Operator::NotIn(_) | Operator::DoesNotExist, None) => true,
            (Operator::DoesNotExist, Some(_)) | (Operator::In(_) | Operator::Exists, None) => false,
        };
        if !holds {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_is_found_past_neighbours_that_do_not_hold_the_address() {
        let prefixes = ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.1.0/25", "10.1.1.64/26", "::/0"];
        let map: BTreeMap<IpNet, &str> = prefixes.iter().map(|text| (text.parse().unwrap(), *text)).collect();
        let cases = [
            ("10.1.3.1", "10.1.0.0/16"),
            ("10.1.2.255", "10.1.2.0/24"),
            ("10.1.1.63", "10.1.1.0/25"),
            ("10.1.1.64", "10.1.1.64/26"),
            ("10.1.1.128", "10.1.0.0/16"),
            ("10.255.255.255", "10.0.0.0/8"),
            ("9.255.255.255", "0.0.0.0/0"),
            ("255.255.255.255", "0.0.0.0/0"),
            ("::1", "::/0"),
        ];
        for (address, expected) in cases {
            assert_eq!(longest(&map, address.parse().unwrap()), Some(&expected), "{address}");
        }
        let few: BTreeMap<IpNet, ()> = [("10.0.0.0/8".parse().unwrap(), ())].into();
        assert_eq!(longest(&few, "11.0.0.0".parse().unwrap()), None);
        assert_eq!(longest(&few, "9.0.0.0".parse().unwrap()), None);
        assert_eq!(longest(&few, "::1".parse().unwrap()), None);
    }

    #[test]
    fn changes_lead_from_any_table_to_any_other() {
        let tables: Vec<BTreeMap<u8, ClassId>> = (0..81_u32)
            .map(|number| {
                let class = |key: u8| (key, ClassId(number / 3_u32.pow(key.into()) % 3));
                (0..4).map(class).filter(|(_, class)| *class != ClassId::UNKNOWN).collect()
            })
            .collect();
        for from in &tables {
            for to in &tables {
                let found = changes(from, to);
                assert!(found.iter().all(|(key, class)| from.get(key) != class.as_ref()), "{found:?}");
                let mut applied = from.clone();
                for (key, class) in found {
                    match class {
                        Some(class) => drop(applied.insert(key, class)),
                        None => drop(applied.remove(&key)),
                    }
                }
                assert_eq!(applied, *to);
            }
        }
    }

    #[test]
    fn a_prefix_carries_the_blocks_of_those_around_it() {
        let block = |cidr: &str, except: &[&str]| {
            let except = except.iter().map(|hole| hole.parse().unwrap()).collect();
            Atom::Block(IpBlock { cidr: cidr.parse().unwrap(), except })
        };
        let atoms = HashMap::from([
            (block("10.0.0.0/8", &["10.1.0.0/16"]), 1),
            (block("10.1.1.0/24", &[]), 2),
            (block("10.0.0.0/9", &["10.0.0.0/8"]), 3),
        ]);
        let sets = prefix_sets(&Catalog::default(), &atoms);
        let of = |prefix: &str| sets[&prefix.parse::<IpNet>().unwrap()].clone();
        assert_eq!(of("10.0.0.0/8"), [1]);
        assert_eq!(of("10.1.0.0/16"), [0; 0]);
        assert_eq!(of("10.1.1.0/24"), [2]);
        assert_eq!(sets.len(), 3);
    }
}
