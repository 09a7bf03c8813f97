//! The reference evaluator: one question, answered straight from the model, without index or cache.
//!
//! It is the oracle that compiler, simulator and kernel are compared with, so it shares no code with them, and is
//! written to be read beside the steps in [`model`](crate::model). Its cost is linear in policies and pods.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::model::{
    Action, Backend, CLUSTER_NAME_LABEL, Cluster, Direction, IpBlock, LabelSelector, Labels, Mode, NamespaceMatch,
    Operator, Peer, Peers, Pod, PodId, PodMatch, PodNetwork, Policy, PolicyId, PortMatch, PortSpec, Ports, Requirement,
    Rule, RuleRef, SERVICE_ACCOUNT_LABEL, Tier, TierEnd, Tuple, Verdict,
};

/// A verdict and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// The verdict.
    pub verdict: Verdict,
    /// What decided.
    pub reason: Reason,
}

/// What decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The pod uses its host's network namespace and is no subject of policy.
    HostNetwork,
    /// No policy governs the pod in this direction.
    NotGoverned,
    /// The other end is the node that the pod runs on.
    OwnNode,
    /// This rule matched first.
    Rule(RuleRef),
    /// These policies, of the tier NetworkPolicy, govern the pod in this direction, and no rule matches.
    Isolated(Vec<PolicyId>),
    /// These policies govern the pod in this direction, no rule of theirs decides, and their tiers deny what is left.
    TierEnd(Vec<PolicyId>),
    /// These policies govern the pod in this direction, and there is no such tier as theirs.
    UnknownTier(Vec<PolicyId>),
    /// These policies govern the pod in this direction, none of them isolates it, and no rule of theirs decides.
    Unmatched(Vec<PolicyId>),
    /// These policies are not enforced in this direction, or ask for the pod's service account, which is not known; no other
    /// that may speak allows it.
    Refused(Vec<PolicyId>),
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.verdict, self.reason)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HostNetwork => f.write_str("the pod uses its host's network"),
            Self::NotGoverned => f.write_str("no policy governs the pod in this direction"),
            Self::OwnNode => f.write_str("the peer is the pod's own node"),
            Self::Rule(rule) => rule.fmt(f),
            Self::Isolated(policies) => {
                f.write_str("isolated by")?;
                list(f, policies)?;
                f.write_str("; no rule matches")
            }
            Self::TierEnd(policies) => {
                f.write_str("no rule of")?;
                list(f, policies)?;
                f.write_str(" decides, and the tier denies what is left")
            }
            Self::UnknownTier(policies) => {
                f.write_str("closed, for there is no such tier as that of")?;
                list(f, policies)
            }
            Self::Unmatched(policies) => {
                f.write_str("no rule of")?;
                list(f, policies)?;
                f.write_str(" decides, and no policy isolates the pod")
            }
            Self::Refused(policies) => {
                f.write_str("closed, for it is not enforced, or not known whether it governs the pod:")?;
                list(f, policies)?;
                f.write_str("; no other policy allows it")
            }
        }
    }
}

fn list(f: &mut fmt::Formatter<'_>, policies: &[PolicyId]) -> fmt::Result {
    for (index, policy) in policies.iter().enumerate() {
        write!(f, "{} {policy}", if index == 0 { "" } else { "," })?;
    }
    Ok(())
}

/// The question cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The pod is not in the cluster.
    #[error("pod {0} is not in the cluster; add it before asking")]
    UnknownPod(PodId),
}

/// Policies that are not enforced in a direction of a pod, because a compiler cannot.
pub type Refused = BTreeSet<(PodId, Direction, PolicyId)>;

/// Judges a packet by the policies of one pod.
///
/// # Errors
///
/// [`EvalError::UnknownPod`] if the cluster has no such pod.
pub fn evaluate(cluster: &Cluster, subject: &PodId, tuple: &Tuple) -> Result<Decision, EvalError> {
    evaluate_without(cluster, &Refused::new(), subject, tuple)
}

/// The policies that govern a pod in a direction, in the order in which they are tried; those in audit are none of them.
///
/// # Errors
///
/// [`EvalError::UnknownPod`] if the cluster has no such pod.
pub fn governing(cluster: &Cluster, subject: &PodId, direction: Direction) -> Result<Vec<PolicyId>, EvalError> {
    let pod = cluster.pods.get(subject).ok_or_else(|| EvalError::UnknownPod(subject.clone()))?;
    Ok(governors(cluster, subject, pod, direction, false).into_iter().map(|policy| policy.id.clone()).collect())
}

/// What would become of a packet if all policies in audit were in force, where some policies are not enforced as for
/// [`evaluate_without`]; `None` where no policy in audit governs the pod in this direction.
///
/// # Errors
///
/// [`EvalError::UnknownPod`] if the cluster has no such pod.
pub fn audit(
    cluster: &Cluster,
    refused: &Refused,
    subject: &PodId,
    tuple: &Tuple,
) -> Result<Option<Decision>, EvalError> {
    let pod = cluster.pods.get(subject).ok_or_else(|| EvalError::UnknownPod(subject.clone()))?;
    let all = governors(cluster, subject, pod, tuple.direction, true);
    if pod.network == PodNetwork::Host || all.iter().all(|policy| policy.mode == Mode::Enforce) {
        return Ok(None);
    }
    Ok(Some(judge(cluster, refused, subject, pod, tuple, &all)))
}

/// Judges a packet where some policies are not enforced: such a policy allows nothing, and where one of its rules denies
/// or passes, nothing behind it allows anything either.
///
/// # Errors
///
/// [`EvalError::UnknownPod`] if the cluster has no such pod.
pub fn evaluate_without(
    cluster: &Cluster,
    refused: &Refused,
    subject: &PodId,
    tuple: &Tuple,
) -> Result<Decision, EvalError> {
    let pod = cluster.pods.get(subject).ok_or_else(|| EvalError::UnknownPod(subject.clone()))?;
    if pod.network == PodNetwork::Host {
        return Ok(Decision { verdict: Verdict::Allow, reason: Reason::HostNetwork });
    }
    let governing = governors(cluster, subject, pod, tuple.direction, false);
    Ok(judge(cluster, refused, subject, pod, tuple, &governing))
}

/// Judges by these policies, which govern the pod, in the order in which they are tried.
fn judge(
    cluster: &Cluster,
    refused: &Refused,
    subject: &PodId,
    pod: &Pod,
    tuple: &Tuple,
    governing: &[&Policy],
) -> Decision {
    if governing.is_empty() {
        return Decision { verdict: Verdict::Allow, reason: Reason::NotGoverned };
    }
    let ids = |policies: &[&Policy]| policies.iter().map(|policy| policy.id.clone()).collect::<Vec<_>>();
    let mut not_enforced = ids(governing);
    let unsure = |id: &PolicyId| !selects(cluster, &cluster.policies[id].subject, subject, pod, true);
    not_enforced.retain(|id| refused.contains(&(subject.clone(), tuple.direction, id.clone())) || unsure(id));
    let closed = || Decision { verdict: Verdict::Deny, reason: Reason::Refused(not_enforced.clone()) };

    let question = Question { cluster, pod, tuple, claimants: pods_at(cluster, tuple.peer) };
    for policies in governing.chunk_by(|one, next| one.id.tier == next.id.tier) {
        let Some(tier) = policies.first().map(|policy| &policy.id.tier) else { continue };
        let end = |policy: &Policy| cluster.catalog.tier(&policy.id.tier).map(|spec| spec.end);
        let ending = |wanted| {
            let named = governing.iter().copied().filter(|policy| policy.id.tier != Tier::NetworkPolicy);
            ids(&named.filter(|policy| end(policy) == wanted).collect::<Vec<_>>())
        };
        let Some(spec) = cluster.catalog.tier(tier) else {
            return Decision { verdict: Verdict::Deny, reason: Reason::UnknownTier(ending(None)) };
        };
        let isolates = *tier == Tier::NetworkPolicy;
        let may_be_forged = pod.on_segment && tuple.direction == Direction::Ingress;
        if isolates && !may_be_forged && is_own_node(cluster, pod, tuple.peer) {
            return Decision { verdict: Verdict::Allow, reason: Reason::OwnNode };
        }
        let mut passed = false;
        'tier: for policy in policies {
            let rules = policy.rules(tuple.direction).unwrap_or_default();
            if not_enforced.contains(&policy.id) {
                if rules.iter().any(|rule| rule.action != Action::Allow) {
                    return closed();
                }
                continue;
            }
            for (index, rule) in rules.iter().enumerate() {
                let (verdict, peer, port) = match question.apply(rule) {
                    Outcome::NoMatch => continue,
                    Outcome::Pass => {
                        passed = true;
                        break 'tier;
                    }
                    Outcome::Decided(verdict, peer, port) => (verdict, peer, port),
                };
                let direction = tuple.direction;
                let decided = RuleRef { policy: policy.id.clone(), direction, rule: index, peer, port };
                return Decision { verdict, reason: Reason::Rule(decided) };
            }
        }
        if isolates || (spec.end == TierEnd::Deny && !passed) {
            let reason = match isolates {
                true => Reason::Isolated(ids(policies)),
                false => Reason::TierEnd(ending(Some(TierEnd::Deny))),
            };
            return if not_enforced.is_empty() { Decision { verdict: Verdict::Deny, reason } } else { closed() };
        }
    }
    Decision { verdict: Verdict::Allow, reason: Reason::Unmatched(ids(governing)) }
}

/// One packet, as a rule sees it.
struct Question<'a> {
    cluster: &'a Cluster,
    pod: &'a Pod,
    tuple: &'a Tuple,
    claimants: Vec<(&'a PodId, &'a Pod)>,
}

enum Outcome {
    NoMatch,
    Pass,
    /// The verdict, and which peer and port matched.
    Decided(Verdict, Option<usize>, Option<usize>),
}

impl Question<'_> {
    /// An address that several pods claim is none's to whom it would open something, and everybody's to whom it is
    /// closed. Where a rule passes it may do either: what it matches only for one of the claimants is closed.
    fn apply(&self, rule: &Rule) -> Outcome {
        let sole: &[(&PodId, &Pod)] = if self.claimants.len() > 1 { &[] } else { &self.claimants };
        let matched = |claimants, sure| self.matches(rule, claimants, sure);
        let decided = |verdict, found: Option<(_, _)>| match found {
            Some((peer, port)) => Outcome::Decided(verdict, peer, port),
            None => Outcome::NoMatch,
        };
        let Cluster { catalog, time, .. } = self.cluster;
        let holds = match &rule.schedule {
            None => Some(true),
            Some(name) => catalog.schedules.get(name).zip(*time).map(|(schedule, time)| schedule.holds_at(time)),
        };
        match rule.action {
            _ if holds == Some(false) => Outcome::NoMatch,
            // Whether it holds is not known.
            Action::Allow if holds.is_none() => Outcome::NoMatch,
            Action::Allow => decided(Verdict::Allow, matched(sole, true)),
            Action::Deny | Action::Reject => decided(Verdict::Deny, matched(&self.claimants, false)),
            Action::Pass if holds.is_some() && matched(sole, true).is_some() => Outcome::Pass,
            Action::Pass => decided(Verdict::Deny, matched(&self.claimants, false)),
        }
    }

    /// Which peer and which port match, if the other end is one of these pods; without being sure also those that match as
    /// far as is known. A rule is tried peer by peer, each with all
    /// ports, but ports do not depend on which peer matched: the first matching peer is the one to name.
    fn matches(&self, rule: &Rule, claimants: &[(&PodId, &Pod)], sure: bool) -> Option<(Option<usize>, Option<usize>)> {
        let Self { cluster, pod, tuple, .. } = self;
        let destination: Vec<&Pod> = match tuple.direction {
            Direction::Ingress => vec![pod],
            Direction::Egress => claimants.iter().map(|(_, pod)| *pod).collect(),
        };
        let peer = match &rule.peers {
            Peers::Any => None,
            Peers::OneOf(peers) => {
                Some(peers.iter().position(|wanted| matches_peer(cluster, wanted, tuple, claimants, sure))?)
            }
        };
        let port = match &rule.ports {
            Ports::Any => None,
            Ports::OneOf(ports) => Some(ports.iter().position(|wanted| matches_port(wanted, tuple, &destination))?),
        };
        Some((peer, port))
    }
}

/// The policies that govern the pod, as far as is known; with those in audit, or without.
fn governors<'a>(
    cluster: &'a Cluster,
    subject: &PodId,
    pod: &Pod,
    direction: Direction,
    with_audit: bool,
) -> Vec<&'a Policy> {
    let mut governing: Vec<&Policy> = cluster
        .policies
        .values()
        .filter(|policy| with_audit || policy.mode == Mode::Enforce)
        .filter(|policy| policy.rules(direction).is_some() && selects(cluster, &policy.subject, subject, pod, false))
        .collect();
    governing.sort_by_key(|policy| cluster.order(policy));
    governing
}

fn is_own_node(cluster: &Cluster, pod: &Pod, address: IpAddr) -> bool {
    let Some(node) = &pod.node else { return false };
    cluster.nodes.get(node).is_some_and(|addresses| addresses.contains(&address))
}

/// The pods that claim an address as their own; more than one only by mistake.
fn pods_at(cluster: &Cluster, address: IpAddr) -> Vec<(&PodId, &Pod)> {
    let holds = |pod: &Pod| pod.network == PodNetwork::Own && pod.addresses.contains(&address);
    cluster.pods.iter().filter(|(_, pod)| holds(pod)).collect()
}

fn matches_peer(cluster: &Cluster, peer: &Peer, tuple: &Tuple, pods: &[(&PodId, &Pod)], sure: bool) -> bool {
    let address = tuple.peer;
    let in_block = |IpBlock { cidr, except }: &IpBlock| {
        cidr.contains(&address) && !except.iter().any(|hole| hole.contains(&address))
    };
    match peer {
        Peer::Pods(wanted) => pods.iter().any(|(id, pod)| selects(cluster, wanted, id, pod, sure)),
        Peer::Block(block) => in_block(block),
        Peer::Group(name) => match cluster.catalog.groups.get(name) {
            Some(blocks) => blocks.iter().any(in_block),
            None => !sure,
        },
        Peer::Clusters(selector) if !sure && asks_for_unknown(cluster, selector) => true,
        Peer::Clusters(selector) => {
            let mut selected =
                cluster.catalog.clusters.values().filter(|known| has_labels(selector, &known.labels, true));
            selected.any(|known| known.blocks.iter().any(in_block))
        }
        Peer::Nodes(_) if cluster.catalog.node_labels.is_empty() => !sure,
        Peer::Nodes(selector) => {
            cluster.nodes.iter().chain(&cluster.catalog.external_addresses).any(|(name, addresses)| {
                let selected = || match cluster.catalog.node_labels.get(name) {
                    Some(labels) => has_labels(selector, labels, true),
                    None => !sure,
                };
                addresses.contains(&address) && selected()
            })
        }
        Peer::Service(_) | Peer::Name(_) if tuple.direction == Direction::Ingress => false,
        Peer::Name(_) if !sure => true,
        Peer::Name(pattern) => {
            let pattern = pattern.to_string();
            let is_meant = |name: &str| match pattern.strip_prefix('*') {
                Some(end) => name.len() > end.len() && name.ends_with(end),
                None => name == pattern,
            };
            cluster.names.iter().any(|(name, learnt)| is_meant(name.as_str()) && learnt.contains_key(&address))
        }
        Peer::Service(id) => {
            let answers = |backend: &Backend| {
                let port = backend.port.is_none_or(|port| port == tuple.port);
                backend.address == address && backend.protocol == tuple.protocol && port
            };
            let known = [cluster.catalog.services.get(id), cluster.catalog.service_addresses.get(id)];
            known.into_iter().any(|listed| listed.map_or(!sure, |listed| listed.iter().any(answers)))
        }
    }
}

/// Whether a selector asks for a cluster of a name that is not given, or for any where none is.
fn asks_for_unknown(cluster: &Cluster, selector: &LabelSelector) -> bool {
    let given = &cluster.catalog.clusters;
    given.is_empty()
        || selector.requirements.iter().any(|Requirement { key, operator }| match operator {
            Operator::In(names) if key == CLUSTER_NAME_LABEL => !names.iter().all(|name| given.contains_key(name)),
            _ => false,
        })
}

fn matches_port(wanted: &PortMatch, tuple: &Tuple, destinations: &[&Pod]) -> bool {
    if wanted.protocol != tuple.protocol {
        return false;
    }
    match &wanted.port {
        PortSpec::Any => true,
        PortSpec::Range { first, last } => *first <= tuple.port && tuple.port <= *last,
        PortSpec::Named(name) => destinations.iter().any(|pod| {
            pod.ports.iter().any(|p| p.name == *name && p.protocol == tuple.protocol && p.port == tuple.port)
        }),
    }
}

fn selects(cluster: &Cluster, wanted: &PodMatch, id: &PodId, pod: &Pod, sure: bool) -> bool {
    let namespace_fits = match &wanted.namespaces {
        NamespaceMatch::Named(name) => *name == id.namespace,
        NamespaceMatch::Selected(selector) => has_labels(selector, &cluster.namespace_labels(&id.namespace), true),
    };
    namespace_fits && has_labels(&wanted.pods, &pod.labels, sure)
}

/// Whether all requirements hold; without being sure, whether they may.
fn has_labels(selector: &LabelSelector, labels: &Labels, sure: bool) -> bool {
    selector.requirements.iter().all(|requirement| {
        let value = labels.get(&requirement.key);
        if value.is_none() && requirement.key == SERVICE_ACCOUNT_LABEL {
            return !sure;
        }
        match &requirement.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => !value.is_some_and(|value| values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    })
}
