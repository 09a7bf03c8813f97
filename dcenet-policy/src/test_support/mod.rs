//! Random clusters and packets, and the comparison of evaluator and compiler. Everything follows from a seed.

pub mod bytecode;
mod random;
#[cfg(feature = "yaml")]
pub mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::compiler::{CompileError, Decider, SetId, Update};
use crate::diagram::{Arm, Diagram, Field, Node, NodeId};
use crate::eval::{self, Decision, Reason, Refused};
use crate::ir::{Leaf, RuleId};
use crate::isolation::Fault;
use crate::model::{Cluster, Direction, PodId, Protocol, Tuple, Verdict};

pub use dcenet_core::test_support::Rng;
pub use random::{addresses, ask_for_accounts, change_a_name, claim_twice, cluster, tuples};

/// A wrong compiler, to prove that comparisons notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlantedBug {
    /// The last port of a range is left out.
    EndPortExclusive,
    /// The exceptions of a CIDR block are ignored.
    ExceptIgnored,
    /// Where several pods claim an address, each of them is believed.
    ClaimsBelieved,
    /// What is beyond a limit fails the whole update.
    NothingIsolated,
    /// Rules that pass are left out.
    PassIgnored,
    /// Policies in audit are in force.
    AuditEnforced,
    /// Policies in audit do nothing at all.
    AuditForgotten,
}

/// The policies that an update does not enforce, for the evaluator.
pub fn refused(update: &Update) -> Refused {
    let mut refused = Refused::new();
    for fault in &update.faults {
        if let Fault::Refused { policies, direction, pods, .. } = fault {
            let all = policies.iter().flat_map(|id| pods.iter().map(move |pod| (pod.clone(), *direction, id.clone())));
            refused.extend(all);
        }
    }
    refused
}

/// What a comparison saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Verdicts compared.
    pub pairs: usize,
    /// Those decided by a rule, not by a default.
    pub by_rule: usize,
    /// Those that allow.
    pub allowed: usize,
    /// Those whose verdict policies in audit would change.
    pub audited: usize,
    /// Leaves of each policy set that were the answer at least once.
    pub leaves_hit: BTreeMap<SetId, BTreeSet<Leaf>>,
}

/// Evaluator and compiler disagree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{pod}, {tuple:?}: the evaluator says {expected}, the compiler {found}")]
pub struct Mismatch {
    /// The pod under policy.
    pub pod: PodId,
    /// The packet.
    pub tuple: Tuple,
    /// The evaluator's decision.
    pub expected: String,
    /// The compiler's.
    pub found: String,
}

/// Judges each packet by evaluator and by compiled form; verdict and deciding rule must agree.
///
/// # Errors
///
/// The first [`Mismatch`].
pub fn compare(
    cluster: &Cluster,
    update: &Update,
    questions: impl IntoIterator<Item = (PodId, Tuple)>,
    tally: &mut Tally,
) -> Result<(), Mismatch> {
    let refused = refused(update);
    for (pod, tuple) in questions {
        let Ok(expected) = eval::evaluate_without(cluster, &refused, &pod, &tuple) else { continue };
        if expected.reason == Reason::HostNetwork {
            continue;
        }
        let found = update.decide(&pod, &tuple);
        let in_force = |leaf: Leaf| (leaf.verdict, update.rules.decider(leaf.rule));
        let agrees = found.is_some_and(|leaf| is_same(&in_force(leaf), &expected));
        let Some(leaf) = found.filter(|_| agrees) else {
            let found = match found {
                None => "nothing".to_owned(),
                Some(leaf) => format!("{}: {}", leaf.verdict, update.rules.name(leaf.rule)),
            };
            return Err(Mismatch { pod, tuple, expected: expected.to_string(), found });
        };
        let told = update.rules.audit(leaf.rule);
        let found = told.map_or_else(|| in_force(leaf), |audit| (audit.verdict, audit.by.clone()));
        match eval::audit(cluster, &refused, &pod, &tuple) {
            Ok(Some(would)) if !is_same(&found, &would) => {
                let (expected, found) = (format!("in audit, {would}"), format!("{}: {}", found.0, found.1));
                return Err(Mismatch { pod, tuple, expected, found });
            }
            Ok(None) if told.is_some() => {
                let (expected, found) = ("no audit".to_owned(), format!("{}: {}", found.0, found.1));
                return Err(Mismatch { pod, tuple, expected, found });
            }
            _ => {}
        }
        tally.audited += usize::from(told.is_some_and(|audit| audit.verdict != leaf.verdict));
        tally.pairs += 1;
        let default = [RuleId::NOT_GOVERNED, RuleId::ISOLATED, RuleId::UNMATCHED].map(Decider::Fixed);
        tally.by_rule += usize::from(!default.contains(&update.rules.decider(leaf.rule)));
        tally.allowed += usize::from(leaf.verdict == Verdict::Allow);
        if let Some(plan) = update.endpoints.get(&pod) {
            tally.leaves_hit.entry(plan.set(tuple.direction).id).or_default().insert(leaf);
        }
    }
    Ok(())
}

/// Whether both are one verdict for one reason.
fn is_same(found: &(Verdict, Decider), expected: &Decision) -> bool {
    let by = match &expected.reason {
        Reason::HostNetwork => return false,
        Reason::NotGoverned => Decider::Fixed(RuleId::NOT_GOVERNED),
        Reason::OwnNode => Decider::Fixed(RuleId::OWN_NODE),
        Reason::Isolated(_) => Decider::Fixed(RuleId::ISOLATED),
        Reason::TierEnd(_) | Reason::UnknownTier(_) => Decider::Fixed(RuleId::TIER_END),
        Reason::Unmatched(_) => Decider::Fixed(RuleId::UNMATCHED),
        Reason::Refused(_) => Decider::Fixed(RuleId::REFUSED),
        Reason::Rule(rule) => Decider::Rule(rule.clone()),
    };
    *found == (expected.verdict, by)
}

/// Packets at every boundary of an endpoint's diagram: from each of the given peers, both ends of every interval of
/// protocol and port that the diagram tells apart.
pub fn boundary_tuples(
    update: &Update,
    endpoint: &PodId,
    direction: Direction,
    peers: &[IpAddr],
) -> Vec<(PodId, Tuple)> {
    let mut found = Vec::new();
    let Some(plan) = update.endpoints.get(endpoint) else { return found };
    let set = plan.set(direction);
    let mut seen = BTreeSet::new();
    for peer in peers {
        let local = set.local(update.table.lookup(*peer));
        if !seen.insert((local, peer.is_ipv4())) {
            continue;
        }
        for (protocol, port) in edges(&set.program.diagram, local) {
            found.push((endpoint.clone(), Tuple { direction, peer: *peer, protocol: Protocol(protocol), port }));
        }
    }
    found
}

/// Both ends of each interval of protocol and port, for one local id.
fn edges(diagram: &Diagram, local: u16) -> Vec<(u8, u16)> {
    let mut at = diagram.root();
    if let Node::Switch { field: Field::Local, arms } = diagram.node(at) {
        at = arms[arms.partition_point(|arm| arm.first <= local) - 1].to;
    }
    let mut found = Vec::new();
    for (first, last, to) in intervals(diagram, at, Field::Protocol, u16::from(u8::MAX)) {
        for (low, high, _) in intervals(diagram, to, Field::Port, u16::MAX) {
            for protocol in [first, last] {
                found.extend([(protocol as u8, low), (protocol as u8, high)]);
            }
        }
    }
    found
}

fn intervals(diagram: &Diagram, at: NodeId, wanted: Field, end: u16) -> Vec<(u16, u16, NodeId)> {
    match diagram.node(at) {
        Node::Switch { field, arms } if *field == wanted => {
            let lasts = arms[1..].iter().map(|arm| arm.first - 1).chain([end]);
            arms.iter().zip(lasts).map(|(Arm { first, to }, last)| (*first, last, *to)).collect()
        }
        _ => vec![(0, end, at)],
    }
}

/// Compares random clusters with random packets, `packets` for each seed.
///
/// # Errors
///
/// The first mismatch with its seed, or a cluster that did not compile.
pub fn compare_random(
    seeds: std::ops::Range<u64>,
    packets: usize,
    compiler: impl Fn() -> crate::Compiler,
) -> Result<Tally, Box<dyn std::error::Error>> {
    let mut tally = Tally::default();
    for seed in seeds {
        let mut rng = Rng::new(seed);
        let cluster = cluster(&mut rng);
        let update = compiler().update(&cluster).map_err(|error: CompileError| format!("seed {seed}: {error}"))?;
        let questions = tuples(&mut rng, &cluster, packets);
        compare(&cluster, &update, questions, &mut tally).map_err(|error| format!("seed {seed}: {error}"))?;
    }
    Ok(tally)
}
