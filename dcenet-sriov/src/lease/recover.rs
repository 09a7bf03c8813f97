//! Bringing functions to an end that calls left in between, and those back that could not be restored.

use std::path::PathBuf;
use std::time::Duration;

use dcenet_core::journal::LedgerError;
use dcenet_core::model::NetworkName;

use super::record::{Quarantine, Until, is_committed};
use super::{Held, LeaseError, Leases, Released, VfId, error, holding};
use crate::address::PciAddress;

/// What a recovery found of one function.
#[derive(Debug)]
pub struct Recovered {
    /// The function, as its file is called.
    pub key: String,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of recovering a function.
#[derive(Debug)]
pub enum Outcome {
    /// It is free, and what it was.
    Free,
    /// It was not what it was and is now, or its lease was taken back.
    Restored,
    /// Somebody has it.
    Leased(Held),
    /// The machine has it no more, or has been started anew since.
    Forgotten,
    /// It is in quarantine, as before or from now on.
    Quarantined(Quarantine),
    /// It is lent, or in quarantine, in the ledger of this other state directory.
    Elsewhere(PathBuf),
    /// Somebody works on it now.
    Busy,
    /// It could not be recovered. The next recovery tries again.
    Failed(LeaseError),
}
impl Leases {
    /// Brings every function to an end that is not an owner's whom `keep` knows: takes back leases that were not
    /// finished, finishes releases that were not, and restores what is nobody's. Called at start. Repeating it changes
    /// nothing.
    ///
    /// `keep` is asked of the owners of all networks, and whom it does not know loses the function: who knows one
    /// network's, as a GC of CNI does, calls [`recover_network`](Self::recover_network).
    ///
    /// What is in quarantine is looked at once, without waiting.
    ///
    /// # Errors
    /// Where the ledger cannot be read. What concerns one function is told of that.
    pub fn recover(&self, keep: impl Fn(&Held) -> bool) -> Result<Vec<Recovered>, LeaseError> {
        let recovered = |key: &str| match self.recover_one(key, &keep) {
            Ok(outcome) => outcome,
            Err(LeaseError::Ledger(LedgerError::Busy { .. })) => Outcome::Busy,
            Err(error) => Outcome::Failed(error),
        };
        let keys = self.ledger.keys()?.into_iter();
        let mut all: Vec<_> = keys.map(|key| Recovered { outcome: recovered(&key), key }).collect();
        if all.iter().any(|one| matches!(one.outcome, Outcome::Restored)) {
            // One that got its name back may have had another's.
            for one in &mut all {
                if matches!(&one.outcome, Outcome::Quarantined(quarantine) if quarantine.until == Until::Restored) {
                    one.outcome = recovered(&one.key);
                }
            }
        }
        Ok(all)
    }

    /// As [`recover`](Self::recover), by somebody who knows the owners of one network only: committed leases of others
    /// stand.
    ///
    /// # Errors
    /// As of [`recover`](Self::recover).
    pub fn recover_network(
        &self,
        network: &NetworkName,
        keep: impl Fn(&Held) -> bool,
    ) -> Result<Vec<Recovered>, LeaseError> {
        self.recover(|held| held.owner.network != *network || keep(held))
    }

    /// As [`recover`](Self::recover), of those of these functions alone that are in quarantine. Whether one came back.
    ///
    /// # Errors
    /// Where the ledger cannot be read.
    pub fn recover_quarantined(&self, among: &[PciAddress]) -> Result<bool, LeaseError> {
        let mut any = false;
        for vf in among {
            let key = vf.to_string();
            let standing = match self.ledger.read(&key) {
                Ok(account) => account.and_then(|account| account.standing),
                // It is for an operator to readmit.
                Err(LedgerError::Malformed { .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            if standing.is_none_or(|standing| standing.quarantine.is_none()) {
                continue;
            }
            match self.recover_one(&key, &|_: &Held| true) {
                // One that is another since the machine was started anew is free as well.
                Ok(outcome) => any |= matches!(outcome, Outcome::Restored | Outcome::Forgotten),
                Err(LeaseError::Ledger(LedgerError::Busy { .. })) => {}
                Err(error) => tracing::warn!(%vf, %error, "a function stays in quarantine"),
            }
        }
        Ok(any)
    }

    fn recover_one(&self, key: &str, keep: &impl Fn(&Held) -> bool) -> Result<Outcome, LeaseError> {
        let Some(mut page) = self.ledger.find(key)? else { return Ok(Outcome::Forgotten) };
        let account = match self.account(&mut page, None) {
            Ok(account) => account,
            Err(LeaseError::Quarantined { reason, .. }) => {
                return Ok(Outcome::Quarantined(Quarantine { reason, until: Until::Readmitted }));
            }
            Err(error) => return Err(error),
        };
        let Some(standing) = account.standing else { return Ok(Outcome::Forgotten) };
        let (vf, boot) = match (standing.vf, &standing.quarantine) {
            (_, Some(quarantine)) if quarantine.until == Until::Readmitted => {
                return Ok(Outcome::Quarantined(quarantine.clone()));
            }
            (Some(vf), _) => (vf, standing.boot),
            (None, _) => return Ok(Outcome::Forgotten),
        };
        if let Some(open) = account.open {
            if open.boot == self.ledger.boot() && is_committed(&open.steps) {
                let held = holding(vf.address, open.clone());
                if keep(&held) {
                    return Ok(Outcome::Leased(held));
                }
            }
            return Ok(match self.take_back(&mut page, vf, &open)? {
                Released::Clean => Outcome::Restored,
                Released::Gone | Released::NotHeld => Outcome::Forgotten,
                Released::Quarantined(errors) => {
                    Outcome::Quarantined(Quarantine { reason: error::all(&errors), until: Until::Restored })
                }
            });
        }
        let Some(home) = standing.home.filter(|_| boot == self.ledger.boot()) else {
            if standing.quarantine.is_some() {
                // The machine was started anew, and the function with it.
                self.forget(&mut page, vf)?;
            }
            return Ok(Outcome::Forgotten);
        };
        let _claimed = match self.claim(vf.address) {
            Err(LeaseError::Elsewhere { state, .. }) => return Ok(Outcome::Elsewhere(state)),
            claimed => claimed?,
        };
        let home = standing.restore.of(home);
        let away = standing.away.as_ref();
        let mut none = standing.no_address;
        let mut work = self.work(vf, away);
        if standing.quarantine.is_some() {
            // It was waited for when it went there.
            work.patience = Duration::ZERO;
        } else if matches!(work.is(&home, none), Ok(true)) {
            return Ok(Outcome::Free);
        }
        let errors = work.restore(&home, &mut none);
        Ok(match self.settle(&mut page, vf, away, standing.owner.as_ref(), none, errors)? {
            Released::Clean => Outcome::Restored,
            Released::Gone | Released::NotHeld => Outcome::Forgotten,
            Released::Quarantined(errors) => {
                Outcome::Quarantined(Quarantine { reason: error::all(&errors), until: Until::Restored })
            }
        })
    }

    /// Ends a quarantine: a person has looked at the function, and what it is now is what it is to be from now on.
    ///
    /// # Errors
    /// Where somebody has it or works on it, or it cannot be looked at.
    pub fn readmit(&self, vf: VfId) -> Result<(), LeaseError> {
        let mut page = self.ledger.enter(&vf.address.to_string())?;
        let account = match self.account(&mut page, Some(vf)) {
            Err(LeaseError::Quarantined { .. }) => page.account()?.clone(),
            other => other?,
        };
        if let Some(open) = account.open {
            let (owner, incarnation) = (Box::new(open.intent.owner), open.incarnation);
            return Err(LeaseError::Taken { vf: vf.address, owner, incarnation });
        }
        let _claimed = self.claim(vf.address)?;
        self.confirm(vf)?;
        let now = self.work(vf, None).snapshot()?;
        self.first_see(&mut page, vf, &now).map(drop)
    }
}
