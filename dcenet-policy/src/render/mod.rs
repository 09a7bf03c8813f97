//! Policies for enforcers of others.
//!
//! A renderer takes a cluster and returns text for another enforcer, with a list of what that enforcer does not do as
//! written ([`Omission`]). What is not in the list means the same there as here.

pub mod networkpolicy;
pub mod nftables;

use std::fmt;

use serde::Serialize;

use crate::flatten::Place;
use crate::model::{Action, Cluster, Direction, Mode, Peer, Peers, Rule, RuleRef};

/// Something that is not enforced as it is written, and what happens instead.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Omission {
    /// The pod, policy or address that it is about; `everything` where it is about all.
    pub what: String,
    /// What cannot be expressed, and what happens instead.
    pub reason: String,
}

impl Omission {
    fn new(what: impl fmt::Display, reason: impl Into<String>) -> Self {
        Self { what: what.to_string(), reason: reason.into() }
    }
}

/// What no rendering expresses.
fn unexpressed(cluster: &Cluster) -> impl Iterator<Item = Omission> {
    in_audit(cluster).chain(scheduled(cluster)).chain(logged(cluster)).chain(rejecting(cluster))
}

/// The policies in audit, which are left out.
fn in_audit(cluster: &Cluster) -> impl Iterator<Item = Omission> {
    let policies = cluster.policies.values().filter(|policy| policy.mode == Mode::Audit);
    policies
        .map(|policy| Omission::new(&policy.id, "it is in audit: left out, and nothing there tells what it would do"))
}

/// The rules with a schedule, which are rendered as they are now.
fn scheduled(cluster: &Cluster) -> impl Iterator<Item = Omission> {
    rules_in_force(cluster).filter_map(|(place, rule)| {
        let name = rule.schedule.as_ref()?;
        let now = match cluster.catalog.holds_at(cluster.time, rule) {
            Some(true) => "it holds now, and stays",
            Some(false) => "it does not hold now, and is left out",
            None => "whether it holds is not known: it allows nobody, or denies whom it would pass",
        };
        Some(Omission::new(place, format!("the schedule {name}: {now}; render again when that changes")))
    })
}

/// The rules with names, which are rendered with the addresses learnt so far.
fn named(cluster: &Cluster) -> impl Iterator<Item = Omission> {
    let rules = rules_in_force(cluster).filter(|(_, rule)| {
        matches!(&rule.peers, Peers::OneOf(peers) if peers.iter().any(|peer| matches!(peer, Peer::Name(_))))
    });
    rules.map(|(place, _)| {
        Omission::new(place, "its names are the addresses learnt so far; render again when other answers are learnt")
    })
}

/// The rules whose flows are to be marked, which nobody does there.
fn logged(cluster: &Cluster) -> impl Iterator<Item = Omission> {
    let rules = rules_in_force(cluster).filter(|(_, rule)| rule.log);
    rules.map(|(place, _)| Omission::new(place, "it is to be logged: nothing there tells of its flows"))
}

/// The rules that reject, which deny there.
fn rejecting(cluster: &Cluster) -> impl Iterator<Item = Omission> {
    let rules = rules_in_force(cluster).filter(|(_, rule)| rule.action == Action::Reject);
    rules.map(|(place, _)| Omission::new(place, "it rejects: denied there, and nobody tells the sender"))
}

/// The rules of policies in force, whether they hold or not.
pub(crate) fn rules_in_force(cluster: &Cluster) -> impl Iterator<Item = (RuleRef, &Rule)> {
    let policies = cluster.policies.values().filter(|policy| policy.mode == Mode::Enforce);
    policies.flat_map(|policy| {
        Direction::ALL.into_iter().flat_map(move |direction| {
            let rules = policy.rules(direction).unwrap_or_default().iter().enumerate();
            rules.map(move |(rule, of)| (Place { policy: &policy.id, direction, rule }.whole(), of))
        })
    })
}

impl fmt::Display for Omission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.reason)
    }
}
