//! Policies, their rules and their names.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Direction, Peers, PodMatch, Ports};

/// What a rule does when it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// The packet passes, and nothing else is asked.
    Allow,
    /// The packet is dropped, and nothing else is asked.
    Deny,
    /// As [`Action::Deny`], and whoever sent the packet is told: by a reset for TCP, else by an ICMP error. What is answered, and how
    /// often, is told by [`answer`](dcenet_ebpf::datapath::answer).
    Reject,
    /// The rest of the tier is skipped; the next tier goes on.
    Pass,
}

impl Action {
    /// The same without what is told to the sender: what verdicts depend on.
    pub(crate) fn plain(self) -> Self {
        if self == Self::Reject { Self::Deny } else { self }
    }
}

/// One rule: all of its parts must match.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Rule {
    /// What it does when it matches.
    pub action: Action,
    /// The other end.
    pub peers: Peers,
    /// The service.
    pub ports: Ports,
    /// The name of one of [`Catalog::schedules`](super::Catalog::schedules): the rule is there while that holds, and no rule
    /// at other times; none where it always is.
    pub schedule: Option<String>,
    /// Whether flows that it decides are marked ([`Flow::log`](crate::enforcer::flows::Flow::log)); the verdict is the same.
    pub log: bool,
}

/// A group of policies. Which is tried when is told by [`Catalog::tier`](super::Catalog::tier).
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Tier {
    /// What nothing else overrides.
    Admin,
    /// Policies of namespaces. They isolate the pods that they select.
    #[default]
    NetworkPolicy,
    /// What holds for pods that no policy of the tier NetworkPolicy isolates.
    Baseline,
    /// One of [`Catalog::tiers`](super::Catalog::tiers).
    Named(String),
}

impl Tier {
    /// `admin`, `network-policy`, `baseline` or the tier's own name.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Admin => "admin",
            Self::NetworkPolicy => "network-policy",
            Self::Baseline => "baseline",
            Self::Named(name) => name,
        }
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl From<String> for Tier {
    fn from(name: String) -> Self {
        let fixed = [Self::Admin, Self::NetworkPolicy, Self::Baseline].into_iter().find(|tier| tier.as_str() == name);
        fixed.unwrap_or(Self::Named(name))
    }
}

impl From<Tier> for String {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Named(name) => name,
            fixed => fixed.as_str().to_owned(),
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name of a policy: `shop/db` in the tier NetworkPolicy, `admin:no-metadata` or `baseline:default` in the others,
/// whose policies are the cluster's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PolicyId {
    /// Its tier.
    #[serde(default, skip_serializing_if = "Tier::is_default")]
    pub tier: Tier,
    /// Namespace of the policy object; empty where it has none.
    pub namespace: String,
    /// Its name. A reader whose language has several kinds for one tier puts the kind before it, so that an object of one
    /// kind does not take the place of another's.
    pub name: String,
}

impl PolicyId {
    /// A policy of the tier NetworkPolicy.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { tier: Tier::NetworkPolicy, namespace: namespace.into(), name: name.into() }
    }

    /// A policy that belongs to no namespace.
    pub fn cluster(tier: Tier, name: impl Into<String>) -> Self {
        Self { tier, namespace: String::new(), name: name.into() }
    }
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.tier, self.namespace.as_str()) {
            (Tier::NetworkPolicy, namespace) => write!(f, "{namespace}/{}", self.name),
            (tier, "") => write!(f, "{tier}:{}", self.name),
            (tier, namespace) => write!(f, "{tier}:{namespace}/{}", self.name),
        }
    }
}

/// Whether a policy decides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It is in force.
    #[default]
    Enforce,
    /// It is tried out: verdicts are as if it were not there, and beside each stands the one that there would be if all
    /// policies in audit were in force ([`eval::audit`](crate::eval::audit)).
    Audit,
}

/// A policy: a subject, and rules for the directions that it governs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Policy {
    /// Its name, and its tier.
    pub id: PolicyId,
    /// Its place in its tier: lower ones are tried first, and equal ones by name.
    pub priority: u16,
    /// Whether it decides.
    pub mode: Mode,
    /// The pods that it governs.
    pub subject: PodMatch,
    /// Rules for traffic to the subject; `None` leaves ingress ungoverned, an empty list decides nothing, which in the
    /// tier NetworkPolicy isolates.
    pub ingress: Option<Vec<Rule>>,
    /// Rules for traffic from the subject, likewise.
    pub egress: Option<Vec<Rule>>,
}

impl Policy {
    /// The rules of both directions.
    pub fn all_rules(&self) -> impl Iterator<Item = &Rule> {
        self.ingress.iter().chain(&self.egress).flatten()
    }

    /// The rules of a direction, where it is governed.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// Names the place in a policy that decided.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RuleRef {
    /// The policy.
    pub policy: PolicyId,
    /// Which of its lists.
    pub direction: Direction,
    /// Index of the rule in that list.
    pub rule: usize,
    /// Index of the peer in the rule; `None` where the rule matches anybody. The rule is the model's ([`Rule`]): a reader
    /// may make several peers and ports of one element of an object, or none, as that of
    /// [`clusternetworkpolicy`](crate::sources::clusternetworkpolicy) does.
    pub peer: Option<usize>,
    /// Index of the port in the rule, likewise; `None` where the rule matches every port.
    pub port: Option<usize>,
}

impl fmt::Display for RuleRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}[{}]", self.policy, self.direction, self.rule)?;
        if let Some(peer) = self.peer {
            let list = match self.direction {
                Direction::Ingress => "from",
                Direction::Egress => "to",
            };
            write!(f, " {list}[{peer}]")?;
        }
        if let Some(port) = self.port {
            write!(f, " ports[{port}]")?;
        }
        Ok(())
    }
}
