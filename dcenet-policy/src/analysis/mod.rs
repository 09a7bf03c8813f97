//! What a set of policies amounts to, exactly: nothing here samples.
//!
//! | Question | Answer |
//! |---|---|
//! | which rules do nothing, contradict another or open too much? | [`findings`] |
//! | what would change if these policies were applied? | [`diff`] |
//! | who can reach a pod? what can it reach? | [`access`] |
//!
//! All three go over *regions* of addresses instead of addresses: everything that the policies in question treat alike is
//! one, be it a pod, a node, or a prefix with holes ([`Peers`]); and over sets of services instead of ports
//! ([`Services`]). The verdicts of [`diff`] and [`access`] are those of the compiled diagrams ([`Compiler`]); [`findings`]
//! tries the rules of each pod itself, tier by tier. Each difference comes with an example that
//! [`explain`](crate::explain) can be asked about.
//!
//! Answers are of the cluster's time. Rules with a schedule, which are there or not as of then, are listed beside them
//! ([`Scheduled`]): at other times the answer may be another. So are rules by names of the Domain Name System ([`Named`]): they mean
//! what has been learnt, which in files is nothing.
//!
//! What is compared are the model's questions: the first packet of a flow, by the policies of one pod and direction
//! ([`Tuple`](crate::model::Tuple)). [`access`] takes both ends together.
//!
//! ```
//! # #[cfg(feature = "yaml")] {
//! use dcenet_policy::analysis::diff;
//! use dcenet_policy::model::{Cluster, Pod, PodId};
//! use dcenet_policy::sources::networkpolicy::from_yaml;
//!
//! let mut before = Cluster::default();
//! for (name, address) in [("db", "10.0.0.1"), ("web", "10.0.0.2")] {
//!     before.pods.insert(PodId::new("shop", name), Pod::new([("app", name)], [address.parse().unwrap()]));
//! }
//! let mut after = before.clone();
//! let policies = from_yaml(
//!     r#"
//! apiVersion: networking.k8s.io/v1
//! kind: NetworkPolicy
//! metadata: { name: db, namespace: shop }
//! spec:
//!   podSelector: { matchLabels: { app: db } }
//!   ingress: [ { from: [ { podSelector: { matchLabels: { app: web } } } ], ports: [ { port: 5432 } ] } ]
//! "#,
//! )
//! .unwrap();
//! policies.into_iter().for_each(|policy| drop(after.insert_policy(policy)));
//! let changes = diff(&before, &after).unwrap().to_string();
//! assert!(changes.contains(
//!     "deny ingress of shop/db from shop/web: every protocol but tcp; tcp 0-5431, 5433-65535\n"
//! ));
//! # }
//! ```

mod access;
mod diff;
mod findings;
mod services;
mod space;

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use crate::compiler::{CompileError, Compiler, Update};
use crate::isolation::Fault;
use crate::model::{Cluster, Direction, DomainName, NamePattern, Peer, Peers as RulePeers, PodId, Rule, RuleRef};
use crate::render::rules_in_force;

pub use self::access::{Access, Reachable, Way, access};
pub use self::diff::{Change, Diff, Example, Judged, diff};
pub use self::findings::{Decider, Finding, Findings, Thresholds, Width, findings};
pub(crate) use self::services::allowed;
pub use self::services::{ServiceRange, Services};
pub use self::space::{Others, Peers};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnalysisError {
    /// The policies cannot be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// Some policies are beyond what is compiled, so that an answer would be of others than are written.
    #[error("{0}; split the policies before asking")]
    Refused(Box<Fault>),
    /// The pod is not in the cluster.
    #[error("pod {0} is not in the cluster; add it before asking")]
    UnknownPod(PodId),
    /// The pod is no subject of policy.
    #[error("pod {0} uses its host's network: no policy judges what it sends or gets; ask about the node's firewall")]
    HostNetwork(PodId),
}

/// A rule with a schedule, and how it was taken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Scheduled {
    /// The rule.
    pub rule: RuleRef,
    /// The name of its schedule.
    pub schedule: String,
    /// Whether that holds at the cluster's time; `None` where it is not known, so that the rule may only close.
    pub holds: Option<bool>,
}

impl fmt::Display for Scheduled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule, schedule, holds } = self;
        let now = match holds {
            Some(true) => "holds now",
            Some(false) => "does not hold now",
            None => "is not known to hold",
        };
        write!(f, "scheduled: {rule}: {schedule} {now}; ask again for other times")
    }
}

/// The rules with a schedule of all policies in force.
fn scheduled(cluster: &Cluster) -> BTreeSet<Scheduled> {
    let taken = |(place, rule): (RuleRef, &Rule)| {
        let schedule = rule.schedule.clone()?;
        Some(Scheduled { rule: place, schedule, holds: cluster.catalog.holds_at(cluster.time, rule) })
    };
    rules_in_force(cluster).filter_map(taken).collect()
}

/// A rule by names of the Domain Name System, which was taken to mean the addresses that have been learnt of them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Named {
    /// The rule.
    pub rule: RuleRef,
    /// The names.
    pub names: Vec<NamePattern>,
    /// How many addresses have been learnt of them: none in a cluster that was read from files.
    pub learnt: usize,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule, names, learnt } = self;
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        write!(
            f,
            "named: {rule}: {}, of which {learnt} addresses have been learnt; whom else it means is not seen",
            names.join(", ")
        )
    }
}

/// The rules by names of all policies in force. On the way in names mean nobody, whatever is learnt.
fn named(cluster: &Cluster) -> impl Iterator<Item = (Named, &Rule)> {
    let outwards = rules_in_force(cluster).filter(|(place, _)| place.direction == Direction::Egress);
    outwards.filter_map(|(place, rule)| {
        let RulePeers::OneOf(peers) = &rule.peers else { return None };
        let names = peers.iter().filter_map(|peer| match peer {
            Peer::Name(pattern) => Some(pattern.clone()),
            _ => None,
        });
        let names: Vec<NamePattern> = names.collect();
        let is_meant = |name: &DomainName| NamePattern::all_of(name).any(|pattern| names.contains(&pattern));
        let meant = cluster.names.iter().filter(|(name, _)| is_meant(name)).flat_map(|(_, known)| known.keys());
        let learnt = meant.collect::<BTreeSet<_>>().len();
        (!names.is_empty()).then_some((Named { rule: place, names, learnt }, rule))
    })
}

fn compiled(cluster: &Cluster) -> Result<Update, AnalysisError> {
    let mut update = Compiler::default().update(&cluster.in_force())?;
    match update.faults.iter().position(|fault| matches!(fault, Fault::Refused { .. })) {
        Some(index) => Err(AnalysisError::Refused(Box::new(update.faults.swap_remove(index)))),
        None => Ok(update),
    }
}
