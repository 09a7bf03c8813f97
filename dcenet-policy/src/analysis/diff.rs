//! What changes between two sets of policies.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;

use super::services::{Services, column};
use super::space::{Peers, Space, as_texts};
use super::{AnalysisError, Named, Scheduled, compiled, named, scheduled};
use crate::compiler::{PolicySet, Update};
use crate::ir::{Leaf, RuleId};
use crate::model::{Cluster, Direction, PodId, Protocol, Rule, Tuple, Verdict};

/// The difference between two clusters, by the verdicts of pods that both have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diff {
    /// Version of the JSON shape; keys may be added in one version.
    pub version: u32,
    /// What changes, each tuple in exactly one element.
    pub changes: Vec<Change>,
    /// Pods that only the first one has.
    #[serde(serialize_with = "as_texts")]
    pub gone: Vec<PodId>,
    /// Pods that only the second one has.
    #[serde(serialize_with = "as_texts")]
    pub new: Vec<PodId>,
    /// The rules of either that were taken as of its time: at other times more may change, or less. None where the clusters
    /// are equal.
    pub scheduled: Vec<Scheduled>,
    /// The rules by names that only one of them has, or has otherwise: what they change for addresses that have not been learnt is
    /// not among the changes.
    pub named: Vec<Named>,
}

/// Tuples whose verdict changes in one way: all services with all peers, at each of the pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The direction, seen from the pods.
    pub direction: Direction,
    /// The pods whose policies judge.
    #[serde(serialize_with = "as_texts")]
    pub pods: Vec<PodId>,
    /// The other ends.
    pub peers: Peers,
    /// The services of the destination.
    pub services: Services,
    /// How the first judges.
    pub before: Judged,
    /// How the second judges.
    pub after: Judged,
    /// One of the tuples.
    pub example: Example,
}

/// A verdict and what decides.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Judged {
    /// The verdict.
    pub verdict: Verdict,
    /// The rule, or why it is no rule, in words.
    pub by: String,
}

/// A packet, for [`explain`](crate::explain::explain).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Example {
    /// The pod under policy.
    #[serde(serialize_with = "text")]
    pub pod: PodId,
    /// The other end's address.
    pub peer: IpAddr,
    /// The protocol.
    #[serde(serialize_with = "text")]
    pub protocol: Protocol,
    /// The port, as in [`Tuple`].
    pub port: u16,
}

fn text<T: fmt::Display, S: serde::Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl Diff {
    /// The change that a tuple is part of.
    pub fn change_of(&self, pod: &PodId, tuple: &Tuple) -> Option<&Change> {
        self.changes.iter().find(|change| change.contains(pod, tuple))
    }
}

impl Change {
    /// Whether a tuple is part of it.
    pub fn contains(&self, pod: &PodId, tuple: &Tuple) -> bool {
        self.direction == tuple.direction
            && self.services.contains(tuple.protocol, tuple.port)
            && self.pods.contains(pod)
            && self.peers.contains(tuple.peer)
    }
}

/// The policy set of a pod in its host's network counts as none.
type Sets<'a> = [Option<&'a Arc<PolicySet>>; 2];

/// What changes for the pods that are in both clusters, which usually differ in their policies only.
///
/// Peers are addresses: where an address belongs to another pod in the second cluster, [`Peers::pods`] names both.
///
/// # Errors
///
/// [`AnalysisError::Compile`] and [`AnalysisError::Refused`] where one of them is more than the compiler takes.
pub fn diff(before: &Cluster, after: &Cluster) -> Result<Diff, AnalysisError> {
    let updates = [compiled(before)?, compiled(after)?];
    let space = Space::new(&updates.each_ref().map(|update| &*update.table), &[before, after]);
    let mut changes = Vec::new();
    for direction in Direction::ALL {
        let mut groups: BTreeMap<_, (Sets<'_>, Vec<&PodId>)> = BTreeMap::new();
        for pod in before.pods.keys().filter(|pod| after.pods.contains_key(pod)) {
            let sets = updates.each_ref().map(|update| update.endpoints.get(pod).map(|plan| plan.set(direction)));
            groups.entry(sets.map(|set| set.map(|set| set.id))).or_insert((sets, Vec::new())).1.push(pod);
        }
        for (sets, pods) in groups.into_values() {
            compare(&updates, &space, direction, sets, &pods, &mut changes);
        }
    }
    let only = |left: &Cluster, right: &Cluster| {
        left.pods.keys().filter(|pod| !right.pods.contains_key(pod)).cloned().collect()
    };
    let [old, new] = [before, after].map(|cluster| named(cluster).collect::<Vec<_>>());
    let other = |one: &[(Named, &Rule)], other: &[(Named, &Rule)]| -> Vec<Named> {
        one.iter().filter(|rule| !other.contains(rule)).map(|(named, _)| named.clone()).collect()
    };
    let named: BTreeSet<Named> = other(&old, &new).into_iter().chain(other(&new, &old)).collect();
    let named = named.into_iter().collect();
    let taken = [before, after].into_iter().filter(|_| before != after).flat_map(scheduled);
    let scheduled = taken.collect::<BTreeSet<_>>().into_iter().collect();
    Ok(Diff { version: 1, changes, gone: only(before, after), new: only(after, before), scheduled, named })
}

fn compare(
    updates: &[Update; 2],
    space: &Space,
    direction: Direction,
    sets: Sets<'_>,
    pods: &[&PodId],
    changes: &mut Vec<Change>,
) {
    let mut known: HashMap<[u16; 2], Vec<(Leaf, Leaf, Services)>> = HashMap::new();
    let mut found: BTreeMap<(Leaf, Leaf, Services), Vec<usize>> = BTreeMap::new();
    for (index, region) in space.regions.iter().enumerate() {
        let locals =
            [0, 1].map(|at: usize| sets[at].map_or(0, |set| set.local(updates[at].table.lookup(region.example))));
        let changed = known.entry(locals).or_insert_with(|| {
            let [before, after] = [0, 1].map(|at: usize| match sets[at] {
                Some(set) => column(&set.program.diagram, locals[at]),
                None => [(HOST, Services::all())].into(),
            });
            let pairs = before
                .iter()
                .flat_map(|(old, left)| after.iter().map(move |(new, right)| (*old, *new, left.and(right))));
            pairs.filter(|(old, new, both)| old.verdict != new.verdict && !both.is_empty()).collect()
        });
        for change in changed {
            found.entry(change.clone()).or_default().push(index);
        }
    }
    let judged = |at: usize, leaf: Leaf| Judged {
        verdict: leaf.verdict,
        by: match sets[at] {
            Some(_) => updates[at].rules.name(leaf.rule),
            None => "the pod uses its host's network".to_owned(),
        },
    };
    for ((old, new, services), regions) in found {
        let (Some(peers), Some(pod)) = (space.peers(&regions), pods.first()) else { continue };
        let Some((protocol, port)) = services.example(peers.example.is_ipv4()) else { continue };
        let example = Example { pod: (*pod).clone(), peer: peers.example, protocol, port };
        let pods = pods.iter().map(|pod| (*pod).clone()).collect();
        let (before, after) = (judged(0, old), judged(1, new));
        changes.push(Change { direction, pods, peers, services, before, after, example });
    }
}

/// What a pod in its host's network is judged by.
const HOST: Leaf = Leaf { verdict: Verdict::Allow, rule: RuleId::NOT_GOVERNED };

/// Two lines for each change, `allow` or `deny` being what it is afterwards.
impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for change in &self.changes {
            writeln!(f, "{change}")?;
        }
        for (pods, what) in [(&self.gone, "gone"), (&self.new, "new")] {
            pods.iter().try_for_each(|pod| writeln!(f, "{what}: pod {pod}"))?;
        }
        self.scheduled.iter().try_for_each(|rule| writeln!(f, "{rule}"))?;
        self.named.iter().try_for_each(|rule| writeln!(f, "{rule}"))
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { direction, pods, peers, services, before, after, example } = self;
        let pods: Vec<String> = pods.iter().map(ToString::to_string).collect();
        let preposition = match direction {
            Direction::Ingress => "from",
            Direction::Egress => "to",
        };
        writeln!(f, "{} {direction} of {} {preposition} {peers}: {services}", after.verdict, pods.join(", "))?;
        let Example { pod, peer, protocol, port } = example;
        write!(
            f,
            "  before: {} ({}); after: {} ({}); such as {pod} {preposition} {peer} {protocol}/{port}",
            before.verdict, before.by, after.verdict, after.by
        )
    }
}
