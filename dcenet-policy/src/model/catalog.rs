//! What policies name beside pods and namespaces.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Tier;

/// Everything that policies may refer to by a name of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Catalog {
    /// The tiers beside the three that there always are, by name.
    pub tiers: BTreeMap<String, TierSpec>,
}

impl Catalog {
    /// Adds what another one holds; of two of one name the other's counts.
    pub fn extend(&mut self, other: Self) {
        let Self { tiers } = other;
        self.tiers.extend(tiers);
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
