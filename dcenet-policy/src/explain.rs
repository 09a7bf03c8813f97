//! Why one packet is allowed or denied, as data and as text.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::eval::{self, Decision, EvalError, Reason, Refused};
use crate::model::{
    Action, Cluster, Direction, DomainName, PodId, PodNetwork, PolicyId, Protocol, RuleRef, Time, Tuple, Verdict,
};

/// An answer with all that led to it. Serialises to JSON for other programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The pod whose policies were asked.
    pub subject: PodId,
    /// The question.
    pub tuple: Tuple,
    /// The pods at the other end: none where the address is no pod's, several only where each claims it by mistake.
    pub peer_pods: Vec<PodId>,
    /// The node that holds the peer's address, where one does.
    pub peer_node: Option<String>,
    /// The names that have been learnt of the peer's address, on egress.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peer_names: Vec<LearntName>,
    /// The answer.
    pub decision: Decision,
    /// Whether whoever sent it is told that it is denied ([`Action::Reject`]).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rejected: bool,
    /// All policies that govern the subject in this direction, in the order in which they are tried.
    pub governing: Vec<PolicyId>,
    /// What would be the answer if the policies in audit were in force; none where no such policy governs the subject in this
    /// direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<Decision>,
}

/// A name of the peer's address, as it has been learnt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LearntName {
    /// The name.
    pub name: DomainName,
    /// Until when this is to be known, in seconds since 1970.
    pub until: Time,
    /// In how many seconds that is, where the time is known; none where it is past, and the name not yet taken out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remaining: Option<Time>,
}

/// Both halves of a connection between two pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConnectionExplanation {
    /// Judged by the source's policies.
    pub egress: Explanation,
    /// Judged by the destination's policies.
    pub ingress: Explanation,
}

impl ConnectionExplanation {
    /// Allow only if both ends allow.
    pub fn verdict(&self) -> Verdict {
        self.egress.decision.verdict.max(self.ingress.decision.verdict)
    }
}

/// Explains the verdict for a packet by the policies of `subject`.
///
/// # Errors
///
/// [`EvalError::UnknownPod`] if the cluster has no such pod.
pub fn explain(cluster: &Cluster, subject: &PodId, tuple: &Tuple) -> Result<Explanation, EvalError> {
    explain_without(cluster, &Refused::new(), subject, tuple)
}

/// As [`explain`], where some policies are not enforced: what is in force, and not what is written.
/// [`refused`](crate::isolation::refused) tells which.
///
/// # Errors
///
/// [`EvalError::UnknownPod`] if the cluster has no such pod.
pub fn explain_without(
    cluster: &Cluster,
    refused: &Refused,
    subject: &PodId,
    tuple: &Tuple,
) -> Result<Explanation, EvalError> {
    let decision = eval::evaluate_without(cluster, refused, subject, tuple)?;
    let peer_pods = cluster
        .pods
        .iter()
        .filter(|(_, pod)| pod.network == PodNetwork::Own && pod.addresses.contains(&tuple.peer))
        .map(|(id, _)| id.clone())
        .collect();
    let peer_node =
        cluster.nodes.iter().find(|(_, addresses)| addresses.contains(&tuple.peer)).map(|(name, _)| name.clone());
    let governing = match cluster.pods.get(subject).map(|pod| pod.network) {
        Some(PodNetwork::Host) => Vec::new(),
        _ => eval::governing(cluster, subject, tuple.direction)?,
    };
    let names = cluster.names.of_address(tuple.peer).filter(|_| tuple.direction == Direction::Egress);
    let learnt = |(name, until): (&DomainName, Time)| LearntName {
        name: name.clone(),
        until,
        remaining: cluster.time.map(|now| until.saturating_sub(now).max(0)),
    };
    let peer_names = names.map(learnt).collect();
    let audit = eval::audit(cluster, refused, subject, tuple)?;
    let rejected = match &decision.reason {
        Reason::Rule(RuleRef { policy, direction, rule, .. }) => {
            let rules = cluster.policies.get(policy).and_then(|policy| policy.rules(*direction));
            rules.and_then(|rules| rules.get(*rule)).is_some_and(|rule| rule.action == Action::Reject)
        }
        _ => false,
    };
    let (subject, tuple) = (subject.clone(), *tuple);
    Ok(Explanation { subject, tuple, peer_pods, peer_node, peer_names, decision, rejected, governing, audit })
}

/// Explains a connection from one pod to another: egress of the source, ingress of the destination.
///
/// `from` and `to` are the addresses that the packet carries; they must be of one family for the answer to make sense.
///
/// # Errors
///
/// [`EvalError::UnknownPod`] if the cluster lacks either pod.
pub fn explain_connection(
    cluster: &Cluster,
    (source, from): (&PodId, IpAddr),
    (destination, to): (&PodId, IpAddr),
    protocol: Protocol,
    port: u16,
) -> Result<ConnectionExplanation, EvalError> {
    Ok(ConnectionExplanation {
        egress: explain(cluster, source, &Tuple::egress(to, protocol, port))?,
        ingress: explain(cluster, destination, &Tuple::ingress(from, protocol, port))?,
    })
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tuple { direction, peer, protocol, port } = self.tuple;
        let preposition = match direction {
            Direction::Ingress => "from",
            Direction::Egress => "to",
        };
        write!(f, "{direction} of {} {preposition} {peer}", self.subject)?;
        match (&self.peer_pods[..], &self.peer_node) {
            ([pod], _) => write!(f, " (pod {pod})")?,
            ([first, others @ ..], _) => {
                write!(f, " (claimed by pods {first}")?;
                others.iter().try_for_each(|pod| write!(f, ", {pod}"))?;
                f.write_str(")")?;
            }
            ([], Some(node)) => write!(f, " (node {node})")?,
            ([], None) => f.write_str(" (no pod, no node)")?,
        }
        match protocol {
            Protocol::ICMP | Protocol::ICMPV6 => write!(f, ", {protocol} type {} code {}", port >> 8, port & 0xff)?,
            _ if protocol.has_ports() => write!(f, ", {protocol} port {port}")?,
            _ => write!(f, ", protocol {protocol}")?,
        }
        write!(f, "\n  {}", self.decision)?;
        if self.rejected {
            f.write_str(", and the sender is told")?;
        }
        for policy in &self.governing {
            write!(f, "\n  governed by {policy}")?;
        }
        for LearntName { name, until, remaining } in &self.peer_names {
            write!(f, "\n  {} is an address of {name}", self.tuple.peer)?;
            match remaining {
                Some(seconds) => write!(f, " for {seconds} s more")?,
                None => write!(f, " until {until} s after 1970")?,
            }
        }
        if let Some(audit) = &self.audit {
            write!(f, "\n  with the policies in audit: {audit}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ConnectionExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}\n{}", self.verdict(), self.egress, self.ingress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Mode, NamespaceMatch, Pod, PodMatch, Policy};

    #[test]
    fn a_connection_is_explained_from_both_ends() {
        let mut cluster = Cluster::default();
        let (a, b) = (PodId::new("x", "a"), PodId::new("x", "b"));
        let (at_a, at_b) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        cluster.pods.insert(a.clone(), Pod::new([], [at_a]));
        cluster.pods.insert(b.clone(), Pod::new([], [at_b]));
        cluster.insert_policy(Policy {
            id: PolicyId::new("x", "deny"),
            priority: 0,
            mode: Mode::Enforce,
            subject: PodMatch { namespaces: NamespaceMatch::Named("x".to_owned()), pods: Default::default() },
            ingress: Some(Vec::new()),
            egress: None,
        });
        let answer = explain_connection(&cluster, (&a, at_a), (&b, at_b), Protocol::TCP, 80).unwrap();
        assert_eq!(
            answer.to_string(),
            "deny\n\
             egress of x/a to 10.0.0.2 (pod x/b), tcp port 80\n  \
             allow: no policy governs the pod in this direction\n\
             ingress of x/b from 10.0.0.1 (pod x/a), tcp port 80\n  \
             deny: isolated by x/deny; no rule matches\n  \
             governed by x/deny"
        );
        let json = serde_json::to_value(&answer).unwrap();
        assert_eq!(json["ingress"]["decision"]["verdict"], "deny");
        assert_eq!(json["egress"]["peer_pods"][0]["name"], "b");
        assert!(json["ingress"].get("audit").is_none());

        cluster.policies.values_mut().for_each(|policy| policy.mode = Mode::Audit);
        let answer = explain_connection(&cluster, (&a, at_a), (&b, at_b), Protocol::TCP, 80).unwrap();
        assert_eq!(
            answer.ingress.to_string(),
            "ingress of x/b from 10.0.0.1 (pod x/a), tcp port 80\n  \
             allow: no policy governs the pod in this direction\n  \
             with the policies in audit: deny: isolated by x/deny; no rule matches"
        );
        assert_eq!((answer.verdict(), answer.egress.audit), (Verdict::Allow, None));
    }
}
