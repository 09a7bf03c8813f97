//! Giving somebody the best functions that can be had.

use std::collections::BTreeSet;

use dcenet_core::journal::LedgerError;
use dcenet_core::model::AttachmentKey;

use super::{LeaseError, Leases, VfId, VfLease, Wanted};
use crate::address::PciAddress;
use crate::allocate::{Candidates, Choice, Refusal, Request};
use crate::inventory::Inventory;

/// Functions that were chosen and prepared.
#[derive(Debug)]
#[must_use = "dropped, they are taken back"]
pub struct Chosen<'l> {
    /// The functions, in the order of their addresses.
    pub leases: Vec<VfLease<'l>>,
    /// Why these.
    pub choice: Choice,
    /// Functions that would have been as good or better and could not be had, and why.
    pub passed_over: Vec<LeaseError>,
}

/// Why nobody gets any.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChooseError {
    /// There are too few.
    #[error("{refusal}{}", told(passed_over))]
    TooFew {
        /// What is missing.
        refusal: Refusal,
        /// Functions that look free and could not be had, and why.
        passed_over: Vec<LeaseError>,
    },
    /// A function refused what was wanted, or the ledger cannot be used: others would do the same.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

impl Leases {
    /// Chooses among the members of a pool and [prepares](Self::prepare) what was chosen, all or none. Where a function
    /// cannot be had after all, because another process was faster or it cannot be found, it is chosen anew without it.
    ///
    /// # Errors
    /// Nothing is prepared then.
    pub fn choose(
        &self,
        owner: &AttachmentKey,
        inventory: &Inventory,
        members: &[PciAddress],
        request: &Request,
        wanted: &Wanted,
    ) -> Result<Chosen<'_>, ChooseError> {
        let (mut used, mut unfinished) = self.unavailable()?;
        let mut passed_over = Vec::new();
        'choice: loop {
            let candidates = Candidates::of(inventory, members, |vf| used.contains(&vf) || unfinished.contains(&vf));
            let choice = match candidates.choose(request) {
                Ok(choice) => choice,
                Err(_) if !unfinished.is_empty() => {
                    // Last, those that killed calls may have left.
                    unfinished.clear();
                    continue 'choice;
                }
                Err(refusal) => return Err(ChooseError::TooFew { refusal, passed_over }),
            };
            let mut leases = Vec::with_capacity(choice.functions.len());
            for address in &choice.functions {
                // What was chosen is of the inventory.
                let Some((port, vf)) = inventory.vf(*address) else { continue };
                let vf = VfId { address: *address, port: port.address, index: vf.index };
                match self.prepare(owner, vf, wanted) {
                    Ok(lease) => leases.push(lease),
                    Err(error) if is_of_one(&error) => {
                        used.insert(*address);
                        passed_over.push(error);
                        // What was prepared already is taken back.
                        continue 'choice;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            return Ok(Chosen { leases, choice, passed_over });
        }
    }

    /// The functions that somebody has, or nobody may have; and those of which a call is giving or taking one, or was
    /// when it was killed.
    fn unavailable(&self) -> Result<(BTreeSet<PciAddress>, BTreeSet<PciAddress>), LeaseError> {
        let (mut all, mut unfinished) = (BTreeSet::new(), BTreeSet::new());
        for key in self.ledger.keys()? {
            let Ok(vf) = key.parse::<PciAddress>() else { continue };
            let unavailable = match self.ledger.read(&key) {
                Ok(Some(account)) => {
                    let open = account.open.filter(|open| open.boot == self.ledger.boot());
                    let leased = open.as_ref().is_some_and(|open| super::record::is_committed(&open.steps));
                    unfinished.extend((open.is_some() && !leased).then_some(vf));
                    leased || account.standing.is_some_and(|standing| standing.quarantine.is_some())
                }
                Ok(None) => false,
                Err(LedgerError::Malformed { .. }) => true,
                Err(error) => return Err(error.into()),
            };
            all.extend(unavailable.then_some(vf));
        }
        Ok((all, unfinished))
    }
}

/// Whether another function may do.
fn is_of_one(error: &LeaseError) -> bool {
    matches!(
        error,
        LeaseError::Taken { .. }
            | LeaseError::Quarantined { .. }
            | LeaseError::Elsewhere { .. }
            | LeaseError::Gone { .. }
            | LeaseError::Hidden { .. }
            | LeaseError::NoDevice { .. }
            | LeaseError::Another { .. }
            | LeaseError::Ledger(LedgerError::Busy { .. })
    )
}

fn told(passed_over: &[LeaseError]) -> String {
    if passed_over.is_empty() { String::new() } else { format!("; {}", super::error::all(passed_over)) }
}
