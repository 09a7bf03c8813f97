//! What the numbers of rules stand for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::Ids;
use crate::ir::{Leaf, RuleId};
use crate::model::{Action, Cluster, PolicyId, RuleRef, Verdict};

/// What a number from [`RuleId::FIRST`] on stands for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Named {
    /// A rule.
    Rule(RuleRef),
    /// What decides, and what would if the policies in audit were in force, where that is something else.
    Audited {
        /// What decides.
        by: Decider,
        /// What would.
        audit: Audit,
    },
}

impl Named {
    /// What decides.
    pub fn decider(&self) -> Decider {
        match self {
            Self::Rule(rule) => Decider::Rule(rule.clone()),
            Self::Audited { by, .. } => by.clone(),
        }
    }

    /// The rule that decides, where one does.
    pub fn rule(&self) -> Option<&RuleRef> {
        match self {
            Self::Rule(rule) | Self::Audited { by: Decider::Rule(rule), .. } => Some(rule),
            Self::Audited { by: Decider::Fixed(_), .. } => None,
        }
    }

    /// What would decide if the policies in audit were in force, where that is something else.
    pub fn audit(&self) -> Option<&Audit> {
        match self {
            Self::Rule(_) => None,
            Self::Audited { audit, .. } => Some(audit),
        }
    }
}

/// A rule, or what holds where none decides.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Decider {
    /// One of the numbers below [`RuleId::FIRST`].
    Fixed(RuleId),
    /// A rule.
    Rule(RuleRef),
}

impl Decider {
    /// The rule's policy.
    pub fn policy(&self) -> Option<&PolicyId> {
        match self {
            Self::Fixed(_) => None,
            Self::Rule(rule) => Some(&rule.policy),
        }
    }
}

impl fmt::Display for Decider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => rule.fmt(f),
            Self::Fixed(id) => f.write_str(match *id {
                RuleId::NOT_GOVERNED => "no policy governs the pod in this direction",
                RuleId::ISOLATED => "isolated; no rule matches",
                RuleId::OWN_NODE => "the peer is the pod's own node",
                RuleId::UNMATCHED => "no rule matches, and no policy isolates the pod",
                RuleId::TIER_END => "no rule matches, and the tier denies what is left",
                RuleId::REFUSED => "closed, for a policy cannot be enforced; no other allows it",
                RuleId(number) => return write!(f, "rule {number}, no longer in use"),
            }),
        }
    }
}

/// What would become of a packet if the policies in audit were in force.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Audit {
    /// The verdict.
    pub verdict: Verdict,
    /// What would decide.
    pub by: Decider,
}

/// What each rule id stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuleTable {
    rules: BTreeMap<RuleId, Arc<Named>>,
    logged: BTreeSet<RuleId>,
    rejecting: BTreeSet<RuleId>,
}

impl RuleTable {
    /// The rule that decides where a program ends with this id; `None` where none does, and for ids that are not in use.
    pub fn rule(&self, id: RuleId) -> Option<&RuleRef> {
        self.rules.get(&id)?.rule()
    }

    /// What an id stands for; `None` for those below [`RuleId::FIRST`] and those that are not in use.
    pub fn named(&self, id: RuleId) -> Option<&Named> {
        self.rules.get(&id).map(|named| &**named)
    }

    /// What decides where a program ends with this id.
    pub fn decider(&self, id: RuleId) -> Decider {
        self.rules.get(&id).map_or(Decider::Fixed(id), |named| named.decider())
    }

    /// What would decide if the policies in audit were in force, where that is something else.
    pub fn audit(&self, id: RuleId) -> Option<&Audit> {
        self.rules.get(&id)?.audit()
    }

    /// Whether the rule that decides where a program ends with this id wants its flows marked
    /// ([`Rule::log`](crate::model::Rule::log)).
    pub fn is_logged(&self, id: RuleId) -> bool {
        self.logged.contains(&id)
    }

    /// The ids of which the rule that decides answers what it denies ([`Action::Reject`]).
    pub fn rejecting(&self) -> &BTreeSet<RuleId> {
        &self.rejecting
    }

    /// The same with marks as the policies want them.
    pub(super) fn marked_as_in(mut self, cluster: &Cluster) -> Self {
        for (id, named) in &self.rules {
            let listed = |rule: &RuleRef| cluster.policies.get(&rule.policy)?.rules(rule.direction)?.get(rule.rule);
            let Some(rule) = named.rule().and_then(listed) else { continue };
            if rule.log {
                self.logged.insert(*id);
            }
            if rule.action == Action::Reject {
                self.rejecting.insert(*id);
            }
        }
        self
    }

    /// All that is in use.
    pub fn iter(&self) -> impl Iterator<Item = (RuleId, &Named)> {
        self.rules.iter().map(|(id, named)| (*id, &**named))
    }

    /// A text for people: what decides.
    pub fn name(&self, id: RuleId) -> String {
        self.decider(id).to_string()
    }
}

impl FromIterator<(RuleId, Arc<Named>)> for RuleTable {
    fn from_iter<I: IntoIterator<Item = (RuleId, Arc<Named>)>>(rules: I) -> Self {
        Self { rules: rules.into_iter().collect(), ..Self::default() }
    }
}

/// The number of what decides, beside what would.
pub(super) fn outcome(rules: &mut Ids<Named>, leaf: Leaf, audit: Leaf) -> RuleId {
    if leaf == audit {
        return leaf.rule;
    }
    let decider = |id: RuleId| rules.key(id.0).map_or(Decider::Fixed(id), Named::decider);
    let named =
        Named::Audited { by: decider(leaf.rule), audit: Audit { verdict: audit.verdict, by: decider(audit.rule) } };
    RuleId(rules.intern(&named))
}
