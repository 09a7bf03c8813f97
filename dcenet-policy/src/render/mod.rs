//! Policies for enforcers of others.
//!
//! A renderer takes a cluster and returns text for another enforcer, with a list of what that enforcer does not do as
//! written ([`Omission`]). What is not in the list means the same there as here.

pub mod networkpolicy;
pub mod nftables;

use std::fmt;

use serde::Serialize;

use crate::model::{Cluster, Mode};

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

/// The policies in audit, which are left out.
fn in_audit(cluster: &Cluster) -> impl Iterator<Item = Omission> {
    let policies = cluster.policies.values().filter(|policy| policy.mode == Mode::Audit);
    policies
        .map(|policy| Omission::new(&policy.id, "it is in audit: left out, and nothing there tells what it would do"))
}

impl fmt::Display for Omission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.reason)
    }
}
