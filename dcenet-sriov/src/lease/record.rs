//! What is written down of a function, in core's ledger.

use std::path::PathBuf;

use dcenet_core::journal::{Account, Ledger, Open, Page};
use dcenet_core::model::AttachmentKey;
use dcenet_core::netns::NetNsId;
use serde::{Deserialize, Serialize};

use super::snapshot::VfSnapshot;
use super::{Restore, VfId, Wanted};

/// What is true of a function whoever has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Standing {
    /// Which function it is; `None` where its file was unreadable.
    pub(super) vf: Option<VfId>,
    /// The boot during which the snapshot was taken: a later one begins with other functions.
    pub(super) boot: String,
    /// What it was when the pool first saw it; `None` where that is not known.
    pub(super) home: Option<VfSnapshot>,
    /// Why nobody gets it.
    pub(super) quarantine: Option<Quarantine>,
    /// Where its network device was left, while it is in quarantine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) away: Option<Away>,
    /// Who had it when its network device was left there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) owner: Option<AttachmentKey>,
    /// What the last who got it had it made afterwards.
    #[serde(default, skip_serializing_if = "is_default")]
    pub(super) restore: Restore,
    /// What its driver takes an address of zeros for.
    #[serde(default, skip_serializing_if = "is_default")]
    pub(super) no_address: super::snapshot::NoAddress,
}

impl Standing {
    /// Of a function of which nothing else is known.
    pub(super) fn of(vf: Option<VfId>, boot: &str) -> Self {
        Self {
            vf,
            boot: boot.to_owned(),
            home: None,
            quarantine: None,
            away: None,
            owner: None,
            restore: Restore::default(),
            no_address: super::snapshot::NoAddress::default(),
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Why nobody gets a function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Quarantine {
    /// What is wrong.
    pub reason: String,
    /// Who ends it.
    pub until: Until,
}

/// Who ends a quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Until {
    /// A recovery that finds the function, and brings it back to what it was.
    Restored,
    /// A person who has looked at it: nobody knows what it was. See [`readmit`](super::Leases::readmit).
    Readmitted,
}

/// What is about to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Intent {
    /// Who gets it.
    pub(super) owner: AttachmentKey,
    /// What it is to be.
    pub(super) wanted: Wanted,
}

/// How far it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Step {
    /// Its network device is moved next.
    Moving(Away),
    /// The owner has it.
    Committed,
    /// The owner has it no more.
    Releasing,
}

/// Where a network device was moved to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Away {
    /// The namespace's path, as the caller gave it.
    pub(super) path: PathBuf,
    /// Its identity: the path may be another's by now.
    pub(super) netns: NetNsId,
}

/// Where the last move went, if there was one.
pub(super) fn away(steps: &[Step]) -> Option<&Away> {
    steps.iter().rev().find_map(|step| match step {
        Step::Moving(away) => Some(away),
        _ => None,
    })
}

/// Whether the owner has it.
pub(super) fn is_committed(steps: &[Step]) -> bool {
    steps.contains(&Step::Committed) && !steps.contains(&Step::Releasing)
}

pub(super) type VfLedger = Ledger<Standing, Intent, Step>;
pub(super) type VfPage = Page<Standing, Intent, Step>;
pub(super) type VfAccount = Account<Standing, Intent, Step>;
pub(super) type VfOpen = Open<Intent, Step>;
