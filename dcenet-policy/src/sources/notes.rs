//! What a reader of a report should know of what was read.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use super::kubernetes::Documents;
use crate::model::{Catalog, Direction, Peer, Peers, Policy, PolicyId, ServiceId};

/// Something that a verdict does not show and that may surprise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// Of what kind it is.
    pub kind: NoteKind,
    /// In words, for people.
    pub text: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Kinds of [`Note`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NoteKind {
    /// A pod takes no part ([`Documents::left_out`]).
    LeftOut,
    /// A namespace is not given ([`Documents::assumed_namespaces`]).
    AssumedNamespace,
    /// A rule is closed ([`Documents::closed`]).
    ClosedRule,
    /// A policy names a tier that is not given ([`Documents::unknown_tiers`]).
    UnknownTier,
    /// A policy names nodes, a group or a service that is not given ([`Documents::unknown_peers`]).
    UnknownPeer,
    /// A policy allows by names, whose addresses nobody has learnt here: no document has them. To be left out by who has a
    /// learner.
    UnlearntNames,
    /// Policies share a priority ([`Documents::ties`]).
    Tie,
    /// Objects of a kind do not count ([`Documents::unused`]).
    Unused,
    /// A file or directory is not read. [`Documents::notes`] has none of these: they are of whoever reads files.
    NotRead,
}

/// What a policy names and no document gives.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum UnknownPeer {
    /// Nodes, and there is no v1 Node.
    Nodes,
    /// A group of prefixes.
    Group(String),
    /// Who answers for a service: there is no EndpointSlice of it.
    Backends(ServiceId),
    /// A service's own addresses: there is no v1 Service of this name.
    Service(ServiceId),
    /// Clusters: there is no Cluster.
    Clusters,
    /// A cluster by its name: there is no Cluster of it.
    Cluster(String),
    /// When a rule holds: there is no Schedule of this name.
    Schedule(String),
}

impl UnknownPeer {
    fn of(peer: &Peer, catalog: &Catalog) -> Vec<Self> {
        match peer {
            Peer::Nodes(_) if catalog.node_labels.is_empty() => vec![Self::Nodes],
            Peer::Clusters(_) if catalog.clusters.is_empty() => vec![Self::Clusters],
            Peer::Clusters(wanted) => {
                catalog.unknown_clusters(wanted).map(|name| Self::Cluster(name.to_owned())).collect()
            }
            Peer::Group(name) if !catalog.groups.contains_key(name) => vec![Self::Group(name.clone())],
            Peer::Service(id) => {
                let backends = (!catalog.services.contains_key(id)).then(|| Self::Backends(id.clone()));
                let service = (!catalog.service_addresses.contains_key(id)).then(|| Self::Service(id.clone()));
                backends.into_iter().chain(service).collect()
            }
            Peer::Nodes(_) | Peer::Group(_) | Peer::Pods(_) | Peer::Block(_) | Peer::Name(_) => Vec::new(),
        }
    }
}

impl fmt::Display for UnknownPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nodes => f.write_str("no v1 Node is given"),
            Self::Clusters => f.write_str("no Cluster is given"),
            Self::Cluster(name) => write!(f, "there is no Cluster {name}"),
            Self::Group(name) => write!(f, "there is no PrefixGroup {name}"),
            Self::Backends(id) => write!(f, "there is no EndpointSlice of service {id}"),
            Self::Service(id) => write!(f, "there is no v1 Service {id}"),
            Self::Schedule(name) => write!(f, "there is no Schedule {name}"),
        }
    }
}

fn names_names(policy: &Policy) -> bool {
    let rules = Direction::ALL.into_iter().filter_map(|direction| policy.rules(direction)).flatten();
    let mut peers = rules.filter_map(|rule| match &rule.peers {
        Peers::OneOf(peers) => Some(peers),
        Peers::Any => None,
    });
    peers.any(|peers| peers.iter().any(|peer| matches!(peer, Peer::Name(_))))
}

impl Documents {
    /// What policies name that is not given: by it nothing is allowed, and rules that deny or pass deny everybody.
    pub fn unknown_peers(&self) -> BTreeSet<(&PolicyId, UnknownPeer)> {
        let mut found = BTreeSet::new();
        for policy in self.policies.values() {
            for rule in Direction::ALL.into_iter().filter_map(|direction| policy.rules(direction)).flatten() {
                let known = |name: &&String| self.catalog.schedules.contains_key(*name);
                let unknown = rule.schedule.as_ref().filter(|name| !known(name));
                found.extend(unknown.map(|name| (&policy.id, UnknownPeer::Schedule(name.clone()))));
                if let Peers::OneOf(peers) = &rule.peers {
                    let unknown = peers.iter().flat_map(|peer| UnknownPeer::of(peer, &self.catalog));
                    found.extend(unknown.map(|unknown| (&policy.id, unknown)));
                }
            }
        }
        found
    }

    /// All that may surprise, in the order of [`NoteKind`].
    pub fn notes(&self) -> Vec<Note> {
        let left_out = self.left_out.iter();
        let left_out = left_out.map(|(pod, reason)| (NoteKind::LeftOut, format!("pod {pod} is left out: {reason}")));
        let assumed = self.assumed_namespaces().into_iter().map(|namespace| {
            let text = format!("namespace {namespace} is not given: it has no label but its name");
            (NoteKind::AssumedNamespace, text)
        });
        let closed = self.closed.iter().map(|closed| (NoteKind::ClosedRule, format!("closed: {closed}")));
        let unknown = self.unknown_tiers().map(|id| {
            let text =
                format!("{id}: there is no tier {}: the pods that the policy governs are closed; add a Tier", id.tier);
            (NoteKind::UnknownTier, text)
        });
        let peers = self.unknown_peers().into_iter().map(|(id, unknown)| {
            let text = format!(
                "{id}: {unknown}: rules that allow by it match nobody, and those that deny or pass deny everybody"
            );
            (NoteKind::UnknownPeer, text)
        });
        let named = self.policies.values().filter(|policy| names_names(policy)).map(|policy| {
            let text = format!(
                "{}: addresses of names are not known here until somebody learns them: by them nobody is allowed",
                policy.id
            );
            (NoteKind::UnlearntNames, text)
        });
        let ties = self.ties().into_iter().map(|tied| {
            let names: Vec<String> = tied.iter().map(ToString::to_string).collect();
            let names = names.join(", ");
            (NoteKind::Tie, format!("{names} have one priority: the first by name counts, elsewhere any may"))
        });
        let unused = self.unused.iter();
        let unused = unused.map(|(kind, count)| (NoteKind::Unused, format!("not used: {kind} ({count})")));
        let all =
            left_out.chain(assumed).chain(closed).chain(unknown).chain(peers).chain(named).chain(ties).chain(unused);
        all.map(|(kind, text)| Note { kind, text }).collect()
    }
}
