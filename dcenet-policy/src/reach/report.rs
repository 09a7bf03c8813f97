//! What is told of a run, as data, JSON and text.

use std::fmt;
use std::net::IpAddr;

use serde::{Serialize, Serializer};

use crate::eval::{Decision, Reason};
use crate::model::{PodId, PolicyId, Protocol, Verdict};
use crate::sources::kubernetes::Note;

/// All answers of one run; see the [module](super) for its JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Version of the JSON shape.
    pub version: u32,
    /// Who answered.
    pub engine: &'static str,
    /// The answers, by probe, source and destination.
    pub results: Vec<Answer>,
    /// Pairs that a probe cannot be tried on.
    pub not_asked: Vec<NotAsked>,
    /// What should be known beside the answers. [`reach`](super::reach) has none to tell: they are of whoever read the
    /// cluster, such as [`Documents::notes`](crate::sources::kubernetes::Documents::notes).
    pub notes: Vec<Note>,
}

impl Report {
    /// The version of the JSON shape that this implementation writes.
    pub const VERSION: u32 = 1;

    pub(super) fn new(engine: &'static str) -> Self {
        Self { version: Self::VERSION, engine, results: Vec::new(), not_asked: Vec::new(), notes: Vec::new() }
    }
}

/// Of which version of IP a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

/// One connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// The probe, as it is written.
    pub probe: String,
    /// Who opens the connection.
    #[serde(serialize_with = "as_text")]
    pub source: PodId,
    /// To whom.
    #[serde(serialize_with = "as_text")]
    pub destination: PodId,
    /// The family of both addresses.
    pub family: Family,
    /// The source's address.
    pub source_address: IpAddr,
    /// The destination's address.
    pub destination_address: IpAddr,
    /// The protocol.
    #[serde(serialize_with = "as_text")]
    pub protocol: Protocol,
    /// The destination port; none for ICMP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// By the policies of the source.
    pub egress: Side,
    /// By the policies of the destination.
    pub ingress: Side,
    /// Allow only where both allow.
    pub verdict: Verdict,
}

/// The verdict at one end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Side {
    /// The verdict.
    pub verdict: Verdict,
    /// What kind of thing decided.
    pub decided_by: DecidedBy,
    /// The policy of the rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Index of the rule in the policy's list for this direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
    /// Index of the peer in the rule, as [`RuleRef::peer`](crate::model::RuleRef::peer) counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<usize>,
    /// Index of the port in the rule, as [`RuleRef::port`](crate::model::RuleRef::port) counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule_port: Option<usize>,
    /// The policies that isolate the pod, or that select it though no rule of theirs decides.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<String>,
    /// The same in words.
    pub text: String,
}

/// What decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DecidedBy {
    /// A rule that matches.
    Rule,
    /// That policies select the pod, and no rule of theirs matches.
    Isolation,
    /// That no policy selects the pod in this direction.
    NoPolicy,
    /// That policies select the pod, none of which isolates it, and no rule of theirs decides.
    NoRule,
    /// That no rule of a tier decides which denies what is left, or that there is no such tier.
    TierEnd,
    /// That the other end is the pod's own node.
    OwnNode,
    /// That the pod is in its host's network.
    HostNetwork,
    /// That both ends are one pod.
    SamePod,
    /// That policies which select the pod are beyond what is enforced.
    NotEnforced,
}

impl Side {
    pub(super) fn same_pod() -> Self {
        Self::of(Verdict::Allow, DecidedBy::SamePod, "both ends are the same pod".to_owned())
    }

    fn of(verdict: Verdict, decided_by: DecidedBy, text: String) -> Self {
        Self { verdict, decided_by, policy: None, rule: None, peer: None, rule_port: None, policies: Vec::new(), text }
    }
}

impl From<Decision> for Side {
    fn from(Decision { verdict, reason }: Decision) -> Self {
        let names = |policies: &[PolicyId]| policies.iter().map(ToString::to_string).collect();
        let side = |decided_by| Self::of(verdict, decided_by, reason.to_string());
        match &reason {
            Reason::HostNetwork => side(DecidedBy::HostNetwork),
            Reason::NotGoverned => Self::of(verdict, DecidedBy::NoPolicy, "no policy selects it".to_owned()),
            Reason::OwnNode => side(DecidedBy::OwnNode),
            Reason::Isolated(policies) => Self { policies: names(policies), ..side(DecidedBy::Isolation) },
            Reason::TierEnd(policies) | Reason::UnknownTier(policies) => {
                Self { policies: names(policies), ..side(DecidedBy::TierEnd) }
            }
            Reason::Unmatched(policies) => Self { policies: names(policies), ..side(DecidedBy::NoRule) },
            Reason::Refused(policies) => Self { policies: names(policies), ..side(DecidedBy::NotEnforced) },
            Reason::Rule(rule) => Self {
                policy: Some(rule.policy.to_string()),
                rule: Some(rule.rule),
                peer: rule.peer,
                rule_port: rule.port,
                ..side(DecidedBy::Rule)
            },
        }
    }
}

/// A pair that a probe cannot be tried on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NotAsked {
    /// The probe, as it is written.
    pub probe: String,
    /// Who would open the connection.
    #[serde(serialize_with = "as_text")]
    pub source: PodId,
    /// To whom.
    #[serde(serialize_with = "as_text")]
    pub destination: PodId,
    /// Why not.
    pub reason: String,
}

/// A line for each answer, and one for each pair that is not asked:
/// `tcp/80 x/a -> y/b (10.0.1.1 -> 10.0.2.2): deny; egress allow: no policy selects it; ingress deny: ...`.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for answer in &self.results {
            let Answer { probe, source, destination, source_address, destination_address, egress, ingress, .. } =
                answer;
            writeln!(
                f,
                "{probe} {source} -> {destination} ({source_address} -> {destination_address}): {}; \
                 egress {}: {}; ingress {}: {}",
                answer.verdict, egress.verdict, egress.text, ingress.verdict, ingress.text
            )?;
        }
        for NotAsked { probe, source, destination, reason } in &self.not_asked {
            writeln!(f, "{probe} {source} -> {destination}: not asked: {reason}")?;
        }
        Ok(())
    }
}

fn as_text<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
