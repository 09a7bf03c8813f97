//! The reference evaluator: one question, answered straight from the model, without index or cache.
//!
//! It is the oracle that compiler, simulator and kernel are compared with, so it shares no code with them, and is
//! written to be read beside the steps in [`model`](crate::model). Its cost is linear in policies and pods.

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
                for (index, policy) in policies.iter().enumerate() {
                    write!(f, "{} {policy}", if index == 0 { "" } else { "," })?;
                }
                f.write_str("; no rule matches")
            }
        }
    }
}

/// The question cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// The pod is not in the cluster.
    #[error("pod {0} is not in the cluster; add it before asking")]
    UnknownPod(PodId),
}

/// Judges a packet by the policies of one pod.
///
/// # Errors
///
/// [`EvalError::UnknownPod`] if the cluster has no such pod.
pub fn evaluate(cluster: &Cluster, subject: &PodId, tuple: &Tuple) -> Result<Decision, EvalError> {
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

    let peer = pod_at(cluster, tuple.peer);
    let destination = match tuple.direction {
        Direction::Ingress => Some(pod),
        Direction::Egress => peer.map(|(_, pod)| pod),
    };
    for policy in &governing {
        for (index, rule) in policy.rules(tuple.direction).unwrap_or_default().iter().enumerate() {
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
                    match ports.iter().position(|candidate| matches_port(candidate, tuple, destination)) {
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
    let isolating = governing.iter().map(|policy| policy.id.clone()).collect();
    Ok(Decision { verdict: Verdict::Deny, reason: Reason::Isolated(isolating) })
}

fn is_own_node(cluster: &Cluster, pod: &Pod, address: IpAddr) -> bool {
    let Some(node) = &pod.node else { return false };
    cluster.nodes.get(node).is_some_and(|addresses| addresses.contains(&address))
}

/// The pod that holds an address of its own.
fn pod_at(cluster: &Cluster, address: IpAddr) -> Option<(&PodId, &Pod)> {
    cluster.pods.iter().find(|(_, pod)| pod.network == PodNetwork::Own && pod.addresses.contains(&address))
}

fn matches_peer(cluster: &Cluster, peer: &Peer, address: IpAddr, pod: Option<(&PodId, &Pod)>) -> bool {
    match peer {
        Peer::Pods(wanted) => pod.is_some_and(|(id, pod)| selects(cluster, wanted, id, pod)),
        Peer::Block(IpBlock { cidr, except }) => {
            cidr.contains(&address) && !except.iter().any(|hole| hole.contains(&address))
        }
    }
}

fn matches_port(wanted: &PortMatch, tuple: &Tuple, destination: Option<&Pod>) -> bool {
    if wanted.protocol != tuple.protocol {
        return false;
    }
    match &wanted.port {
        PortSpec::Any => true,
        PortSpec::Range { first, last } => *first <= tuple.port && tuple.port <= *last,
        PortSpec::Named(name) => destination.is_some_and(|pod| {
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
