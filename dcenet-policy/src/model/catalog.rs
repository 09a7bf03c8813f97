//! What policies name beside pods and namespaces.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use serde::{Serialize, Serializer};

use super::{
    Action, CLUSTER_NAME_LABEL, IpBlock, LabelSelector, Labels, Operator, Protocol, Rule, Schedule, Tier, Time,
};

/// Everything that policies may refer to by a name of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Catalog {
    /// The tiers beside the three that there always are, by name.
    pub tiers: BTreeMap<String, TierSpec>,
    /// Groups of prefixes, by name; a group holds an address that one of its blocks holds.
    pub groups: BTreeMap<String, Vec<IpBlock>>,
    /// Clusters whose addresses are known, this one or others, by name. Where none is known, nobody can say who is meant by a
    /// selector, nor where one is not that the selector asks for by its name.
    pub clusters: BTreeMap<String, ClusterSpec>,
    /// When rules hold, by name.
    pub schedules: BTreeMap<String, Schedule>,
    /// Labels of nodes. Of a node whose labels are not known nobody can say whether a selector holds; where none are known
    /// at all, nor which nodes there are.
    pub node_labels: BTreeMap<String, Labels>,
    /// Addresses under which nodes are known outside, beside those of [`Cluster::nodes`](super::Cluster::nodes). Several
    /// nodes, and others, may share one, as where it is translated: a selector of nodes finds it, but it is not the address
    /// of a pod's own node.
    pub external_addresses: BTreeMap<String, BTreeSet<IpAddr>>,
    /// Who answers for a service. A service that nobody answers for is known, with none; of one that is missing here it is
    /// not known.
    #[serde(serialize_with = "by_text")]
    pub services: BTreeMap<ServiceId, BTreeSet<Backend>>,
    /// A service's own addresses and ports, which somebody translates; known, with none, where it is headless.
    #[serde(serialize_with = "by_text")]
    pub service_addresses: BTreeMap<ServiceId, BTreeSet<Backend>>,
}

/// JSON's keys are text.
fn by_text<S: Serializer>(services: &BTreeMap<ServiceId, BTreeSet<Backend>>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(services.iter().map(|(id, backends)| (id.to_string(), backends)))
}

impl Catalog {
    /// Adds what another one holds; of two of one name the other's counts.
    pub fn extend(&mut self, other: Self) {
        let Self { tiers, groups, clusters, schedules, node_labels, external_addresses, services, service_addresses } =
            other;
        self.tiers.extend(tiers);
        self.groups.extend(groups);
        self.clusters.extend(clusters);
        self.schedules.extend(schedules);
        self.node_labels.extend(node_labels);
        self.external_addresses.extend(external_addresses);
        self.services.extend(services);
        self.service_addresses.extend(service_addresses);
    }

    /// When the first of the schedules next begins or ceases to hold; `None` where none ever does.
    pub fn next_change(&self, time: Time) -> Option<Time> {
        self.schedules.values().filter_map(|schedule| schedule.next_change(time)).min()
    }

    /// The names by which a selector asks for clusters that are not known.
    pub fn unknown_clusters<'a>(&'a self, selector: &'a LabelSelector) -> impl Iterator<Item = &'a str> {
        let by_name = selector.requirements.iter().filter(|requirement| requirement.key == CLUSTER_NAME_LABEL);
        let names = by_name.filter_map(|requirement| match &requirement.operator {
            Operator::In(names) => Some(names),
            Operator::NotIn(_) | Operator::Exists | Operator::DoesNotExist => None,
        });
        names.flatten().map(String::as_str).filter(|name| !self.clusters.contains_key(*name))
    }

    /// Whether all clusters that a selector may mean are known, as far as can be said.
    pub(crate) fn knows_clusters(&self, selector: &LabelSelector) -> bool {
        !self.clusters.is_empty() && self.unknown_clusters(selector).next().is_none()
    }

    /// Whether a rule's schedule holds at a time; `None` where that is not known.
    pub fn holds_at(&self, time: Option<Time>, rule: &Rule) -> Option<bool> {
        let Some(name) = &rule.schedule else { return Some(true) };
        self.schedules.get(name).zip(time).map(|(schedule, time)| schedule.holds_at(time))
    }

    /// What a rule does at a time, rejecting being to deny; none where it does not hold then. Where that is not known it may only close.
    pub(crate) fn action_at(&self, time: Option<Time>, rule: &Rule) -> Option<Action> {
        match (self.holds_at(time, rule), rule.action) {
            (Some(true), action) => Some(action.plain()),
            (Some(false), _) | (None, Action::Allow) => None,
            (None, Action::Deny | Action::Reject | Action::Pass) => Some(Action::Deny),
        }
    }

    /// What is known of a tier; `None` where policies name one that there is not.
    pub fn tier(&self, tier: &Tier) -> Option<TierSpec> {
        match tier {
            Tier::Admin => Some(TierSpec::ADMIN),
            Tier::NetworkPolicy => Some(TierSpec::NETWORK_POLICY),
            Tier::Baseline => Some(TierSpec::BASELINE),
            Tier::Named(name) => self.tiers.get(name).copied(),
        }
    }
}

/// What is known of a cluster. Its pods are known by its prefixes alone: between clusters, whoever joins them answers for
/// that a cluster sends from its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ClusterSpec {
    /// Its labels, [`CLUSTER_NAME_LABEL`](super::CLUSTER_NAME_LABEL) and, where it belongs to a set,
    /// [`CLUSTER_SET_LABEL`](super::CLUSTER_SET_LABEL) among them.
    pub labels: Labels,
    /// Its addresses: those that one of the blocks holds.
    pub blocks: Vec<IpBlock>,
}

/// The name of a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ServiceId {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl ServiceId {
    /// Composes the parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Where traffic to a service is addressed to: before its own address is translated ([`Catalog::service_addresses`]), or
/// afterwards ([`Catalog::services`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Backend {
    /// Its address.
    pub address: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The port that it listens on; `None` for all of the protocol's.
    pub port: Option<u16>,
}

/// A tier's place, and what it leaves to those behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct TierSpec {
    /// Lower ones are tried first, and equal ones by name.
    pub order: u16,
    /// What becomes of packets that none of its rules decides.
    pub end: TierEnd,
}

impl TierSpec {
    /// That of [`Tier::Admin`].
    pub const ADMIN: Self = Self { order: 1000, end: TierEnd::Pass };
    /// That of [`Tier::NetworkPolicy`]. Its policies isolate, which no tier behind it can undo.
    pub const NETWORK_POLICY: Self = Self { order: 2000, end: TierEnd::Deny };
    /// That of [`Tier::Baseline`].
    pub const BASELINE: Self = Self { order: 3000, end: TierEnd::Pass };
}

/// What becomes, at the end of a tier, of packets to or from pods that one of its policies governs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TierEnd {
    /// The next tier goes on.
    #[default]
    Pass,
    /// They are dropped.
    Deny,
}
