//! Who has functions, by one reading of the ledger each.

use std::collections::BTreeSet;

use dcenet_core::journal::LedgerError;
use dcenet_core::model::AttachmentKey;

use super::record::VfAccount;
use super::{Held, LeaseError, Leases, holding};
use crate::address::PciAddress;

/// What somebody has, or may have.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Had {
    /// Leases that stand, as [`Leases::held`] tells them.
    pub held: Vec<Held>,
    /// Functions that were not found when they were taken back, as [`Leases::lost`] tells them.
    pub lost: Vec<PciAddress>,
}

impl Had {
    /// Whether it is nothing.
    pub fn is_empty(&self) -> bool {
        let Self { held, lost } = self;
        held.is_empty() && lost.is_empty()
    }
}

impl Leases {
    /// The leases that stand, in the order of the functions' addresses, also unfinished ones. Nothing is locked, and
    /// what is told may be over.
    ///
    /// # Errors
    /// Where the ledger cannot be read. Unreadable files are left out, for [`recover`](Self::recover) to set aside.
    pub fn held(&self) -> Result<Vec<Held>, LeaseError> {
        Ok(self.accounts()?.into_iter().filter_map(|(vf, account)| self.holding(vf, account)).collect())
    }

    /// The functions in quarantine whose network devices were found nowhere when they were taken back, with those who
    /// had them and may have them still, in the order of their addresses. A [recovery](Self::recover_quarantined) that
    /// finds one brings it back.
    ///
    /// # Errors
    /// As of [`held`](Self::held).
    pub fn lost(&self) -> Result<Vec<(PciAddress, AttachmentKey)>, LeaseError> {
        let all = self.accounts()?.into_iter();
        Ok(all.filter_map(|(vf, account)| Some((vf, self.loser(&account)?.clone()))).collect())
    }

    /// What somebody has, or may have.
    ///
    /// # Errors
    /// As of [`held`](Self::held).
    pub fn had_by(&self, owner: &AttachmentKey) -> Result<Had, LeaseError> {
        let mut had = Had::default();
        for (vf, account) in self.accounts()? {
            had.lost.extend((self.loser(&account) == Some(owner)).then_some(vf));
            had.held.extend(self.holding(vf, account).filter(|held| held.owner == *owner));
        }
        Ok(had)
    }

    /// All who have functions, or may have.
    ///
    /// # Errors
    /// As of [`held`](Self::held).
    pub fn owners(&self) -> Result<BTreeSet<AttachmentKey>, LeaseError> {
        let mut all = BTreeSet::new();
        for (vf, account) in self.accounts()? {
            all.extend(self.loser(&account).cloned());
            all.extend(self.holding(vf, account).map(|held| held.owner));
        }
        Ok(all)
    }

    fn holding(&self, vf: PciAddress, account: VfAccount) -> Option<Held> {
        let open = account.open.filter(|open| open.boot == self.ledger.boot())?;
        Some(holding(vf, open))
    }

    fn loser<'a>(&self, account: &'a VfAccount) -> Option<&'a AttachmentKey> {
        let standing = account.standing.as_ref().filter(|standing| standing.boot == self.ledger.boot())?;
        standing.owner.as_ref()
    }

    /// What is written down of all functions, in the order of their addresses, but what cannot be read.
    pub(super) fn accounts(&self) -> Result<Vec<(PciAddress, VfAccount)>, LeaseError> {
        let mut all = Vec::new();
        for key in self.ledger.keys()? {
            let Ok(vf) = key.parse() else { continue };
            match self.ledger.read(&key) {
                Ok(account) => all.extend(account.map(|account| (vf, account))),
                Err(LedgerError::Malformed { .. }) => tracing::warn!(key, "record left out"),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(all)
    }
}
