//! Which of a machine's ledgers a function is in.
//!
//! Networks with different state directories have a ledger each, and what one has lent looks free to the others. So
//! there is a place that follows no state directory, where it is written down in which of them a function was prepared
//! last.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dcenet_core::journal::{Ledger, LedgerError, Page};
use serde::{Deserialize, Serialize};

use super::record::VfLedger;
use super::{LEDGER, LeaseError, Leases};
use crate::address::PciAddress;

/// Where a function's lease is, if it has one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Claim {
    /// The state directory.
    state: PathBuf,
}

pub(super) type Claims = Ledger<Claim, (), ()>;

/// Keeps those with other ledgers from a function while it lives.
pub(super) type Claimed = Page<Claim, (), ()>;

impl Leases {
    /// With a directory, such as `/run/dcenet`, that all have in common who lend functions of this machine, whatever
    /// their state directories, and that a reboot empties. Without it, functions are safe from those with the same
    /// state directory alone.
    ///
    /// # Errors
    /// Where the boot's id cannot be read.
    pub fn with_claims(self, common: &Path) -> Result<Self, LedgerError> {
        Ok(Self { claims: Some(std::sync::Arc::new(Claims::open(common, "functions")?)), ..self })
    }

    /// Claims a function for this ledger, where no other one has it lent or in quarantine. Whoever begins a lease of it
    /// keeps what is returned until that is written down.
    pub(super) fn claim(&self, vf: PciAddress) -> Result<Option<Claimed>, LeaseError> {
        let Some(claims) = &self.claims else { return Ok(None) };
        let mut page = claims.enter(&vf.to_string())?;
        let before = page.account()?.standing.as_ref().map(|claim| &claim.state);
        if before.is_some_and(|state| is_same_directory(state, &self.state)) {
            return Ok(Some(page));
        }
        if let Some(state) = before
            && self.is_used_in(state, vf)?
        {
            return Err(LeaseError::Elsewhere { vf, state: state.clone() });
        }
        page.stand(&Claim { state: self.state.clone() })?;
        Ok(Some(page))
    }

    /// As [`claim`](Self::claim), of several, for who changes them all.
    pub(super) fn claim_all(
        &self,
        functions: impl IntoIterator<Item = PciAddress>,
    ) -> Result<Vec<Claimed>, (PciAddress, LeaseError)> {
        let mut claimed = Vec::new();
        for vf in functions {
            claimed.extend(self.claim(vf).map_err(|error| (vf, error))?);
        }
        Ok(claimed)
    }

    /// Whether a ledger has the function lent or in quarantine.
    fn is_used_in(&self, state: &Path, vf: PciAddress) -> Result<bool, LeaseError> {
        match VfLedger::open(state, LEDGER)?.read(&vf.to_string()) {
            Ok(Some(account)) => {
                let lent = account.open.is_some_and(|open| open.boot == self.ledger.boot());
                Ok(lent || account.standing.is_some_and(|standing| standing.quarantine.is_some()))
            }
            Ok(None) => Ok(false),
            Err(LedgerError::Malformed { .. }) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

/// Also where one path leads to it by a symbolic link, or by another mount.
fn is_same_directory(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
    a == b || matches!((identity(a), identity(b)), (Ok(a), Ok(b)) if a == b)
}
