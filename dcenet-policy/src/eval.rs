//! The reference evaluator: one question, answered straight from the model, without index or cache.
//!
//! It is the oracle that compiler, simulator and kernel are compared with, so it shares no code with them, and is
//! written to be read beside the steps in [`model`](crate::model). Its cost is linear in policies and pods.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::model::{
    Cluster, Direction, IpBlock, LabelSelector, Labels, NamespaceMatch, Operator, Peer, Peers, Pod, PodId, PodMatch,
    PodNetwork, PolicyId, PortMatch, PortSpec, Ports, RuleRef, Tuple, Verdict,
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
    /// These policies govern the pod in this direction, and no rule of theirs matches.
    Isolated(Vec<PolicyId>),
    /// These policies govern the pod in this direction and are not enforced; no other that may speak allows it.
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
            Self::Refused(policies) => {
                f.write_str("closed, for it is not enforced:")?;
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

/// Judges a packet where some policies are not enforced: such a policy allows nothing, and where one of its rules denies,
/// no policy after it allows anything either.
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

    let governing: Vec<_> = cluster
        .policies
        .values()
        .filter(|policy| policy.rules(tuple.direction).is_some() && selects(cluster, &policy.subject, subject, pod))
        .collect();
    if governing.is_empty() {
        return Ok(Decision { verdict: Verdict::Allow, reason: Reason::NotGoverned });
    }
    if is_own_node(cluster, pod, tuple.peer) {
        return Ok(Decision { verdict: Verdict::Allow, reason: Reason::OwnNode });
    }

    let claimants = pods_at(cluster, tuple.peer);
    let not_enforced: Vec<PolicyId> = governing
        .iter()
        .map(|policy| policy.id.clone())
        .filter(|id| refused.contains(&(subject.clone(), tuple.direction, id.clone())))
        .collect();
    for policy in &governing {
        if not_enforced.contains(&policy.id) {
            if policy.rules(tuple.direction).unwrap_or_default().iter().any(|rule| rule.action == Verdict::Deny) {
                break;
            }
            continue;
        }
        for (index, rule) in policy.rules(tuple.direction).unwrap_or_default().iter().enumerate() {
            // An address that several pods claim is none's to whom it would open something, and everybody's to whom it
            // is closed.
            let peer: &[(&PodId, &Pod)] = match rule.action {
                Verdict::Allow if claimants.len() > 1 => &[],
                Verdict::Allow | Verdict::Deny => &claimants,
            };
            let destination: Vec<&Pod> = match tuple.direction {
                Direction::Ingress => vec![pod],
                Direction::Egress => peer.iter().map(|(_, pod)| *pod).collect(),
            };
            let peer_index = match &rule.peers {
                Peers::Any => None,
                Peers::OneOf(peers) => {
                    // A rule is tried peer by peer, each with all ports, but ports do not depend on which peer
                    // matched: the first matching peer is the one to name.
                    match peers.iter().position(|candidate| matches_peer(cluster, candidate, tuple.peer, peer)) {
                        Some(found) => Some(found),
                        None => continue,
                    }
                }
            };
            let port_index = match &rule.ports {
                Ports::Any => None,
                Ports::OneOf(ports) => {
                    match ports.iter().position(|candidate| matches_port(candidate, tuple, &destination)) {
                        Some(found) => Some(found),
                        None => continue,
                    }
                }
            };
            let decided = RuleRef {
                policy: policy.id.clone(),
                direction: tuple.direction,
                rule: index,
                peer: peer_index,
                port: port_index,
            };
            return Ok(Decision { verdict: rule.action, reason: Reason::Rule(decided) });
        }
    }
    if !not_enforced.is_empty() {
        return Ok(Decision { verdict: Verdict::Deny, reason: Reason::Refused(not_enforced) });
    }
    let isolating = governing.iter().map(|policy| policy.id.clone()).collect();
    Ok(Decision { verdict: Verdict::Deny, reason: Reason::Isolated(isolating) })
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

fn matches_peer(cluster: &Cluster, peer: &Peer, address: IpAddr, pods: &[(&PodId, &Pod)]) -> bool {
    match peer {
        Peer::Pods(wanted) => pods.iter().any(|(id, pod)| selects(cluster, wanted, id, pod)),
        Peer::Block(IpBlock { cidr, except }) => {
            cidr.contains(&address) && !except.iter().any(|hole| hole.contains(&address))
        }
    }
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

fn selects(cluster: &Cluster, wanted: &PodMatch, id: &PodId, pod: &Pod) -> bool {
    let namespace_fits = match &wanted.namespaces {
        NamespaceMatch::Named(name) => *name == id.namespace,
        NamespaceMatch::Selected(selector) => has_labels(selector, &cluster.namespace_labels(&id.namespace)),
    };
    namespace_fits && has_labels(&wanted.pods, &pod.labels)
}

fn has_labels(selector: &LabelSelector, labels: &Labels) -> bool {
    selector.requirements.iter().all(|requirement| {
        let value = labels.get(&requirement.key);
        match &requirement.operator {
            Operator::In(values) => value.is_some_and(|value| values.contains(value)),
            Operator::NotIn(values) => !value.is_some_and(|value| values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    })
}
