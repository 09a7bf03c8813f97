//! What concerns all functions of a port at once.

use std::collections::{BTreeMap, BTreeSet};

use dcenet_core::journal::LedgerError;

use super::record::{VfPage, is_committed};
use super::{LeaseError, Leases};
use crate::address::{PciAddress, VfIndex};
use crate::count::{CountError, CountRequest, change_vf_count};

impl Leases {
    /// As [`set_vf_count`](crate::count::set_vf_count), while nobody can take a function, and never under a lease, or
    /// under a call that works on one. What the functions were is forgotten when they are made anew.
    ///
    /// # Errors
    /// See [`CountError`].
    ///
    /// Bed: modelled.
    pub fn set_vf_count(
        &self,
        port: PciAddress,
        request: &CountRequest<'_>,
    ) -> Result<Vec<(VfIndex, PciAddress)>, CountError> {
        let mut pages = self.pages_of(port)?;
        let _claimed = self.claim_all(pages.keys().copied()).map_err(|(function, error)| match error {
            LeaseError::Elsewhere { state, .. } => {
                let user = format!("who has it by the ledger of state directory {}", state.display());
                CountError::InUse { port, function, user }
            }
            LeaseError::Ledger(LedgerError::Busy { .. }) => busy(port, function),
            LeaseError::Ledger(error) => error.into(),
            error => CountError::InUse { port, function, user: format!("somebody who cannot be told ({error})") },
        })?;
        let holders: BTreeMap<_, _> =
            pages.iter().filter_map(|(function, page)| Some((*function, self.holder(page)?))).collect();
        let user = |function| holders.get(&function).cloned().or_else(|| (request.user)(function));
        let CountRequest { count, autoprobe, user: _, even_elsewhere, limit } = *request;
        let request = CountRequest { count, autoprobe, user: &user, even_elsewhere, limit };
        let mut anew = false;
        let outcome = change_vf_count(&*self.kernel, port, &request, &mut anew);
        if anew {
            for page in pages.values_mut() {
                self.drop_page(page)?;
            }
        }
        outcome
    }

    /// Forgets what a port's functions were, because somebody else has had them made anew. To be called after that,
    /// before any is leased: else the new ones would be made what the old ones were.
    ///
    /// # Errors
    /// [`CountError::InUse`] where one is leased: release it first, which a function that has gone does not hinder.
    ///
    /// Bed: modelled.
    pub fn forget_port(&self, port: PciAddress) -> Result<(), CountError> {
        let mut pages = self.pages_of(port)?;
        for (function, page) in &pages {
            if let Some(user) = self.holder(page) {
                return Err(CountError::InUse { port, function: *function, user });
            }
        }
        pages.values_mut().try_for_each(|page| self.drop_page(page))
    }

    /// The files of all functions that a port has, or had during a lease, locked.
    fn pages_of(&self, port: PciAddress) -> Result<BTreeMap<PciAddress, VfPage>, CountError> {
        let mut pages = BTreeMap::new();
        let present = self.kernel.vf_addresses(port)?.into_iter().map(|(_, function)| function);
        let mut functions: BTreeSet<_> = present.collect();
        for key in self.ledger.keys()? {
            let Ok(function) = key.parse() else { continue };
            let account = match self.ledger.read(&key) {
                // Whose it is cannot be told.
                Err(LedgerError::Malformed { .. }) => continue,
                account => account?,
            };
            let known = account.and_then(|account| account.standing).and_then(|standing| standing.vf);
            if known.is_some_and(|vf| vf.port == port) {
                functions.insert(function);
            }
        }
        for function in functions {
            let page = self.ledger.enter(&function.to_string()).map_err(|error| match error {
                LedgerError::Busy { .. } => busy(port, function),
                error => error.into(),
            })?;
            pages.insert(function, page);
        }
        Ok(pages)
    }

    /// Who has a function, for people.
    fn holder(&self, page: &VfPage) -> Option<String> {
        let account = match page.account() {
            Ok(account) => account,
            Err(error) => return Some(format!("somebody whose record cannot be read ({error})")),
        };
        let open = account.open.as_ref()?;
        let held = open.boot == self.ledger.boot() && is_committed(&open.steps);
        let owner = &open.intent.owner;
        held.then(|| format!("{}/{} as {}", owner.network, owner.container, owner.ifname))
    }

    /// The function is gone, and whatever was begun with it is over.
    fn drop_page(&self, page: &mut VfPage) -> Result<(), CountError> {
        let (vf, open) = match page.account() {
            Ok(account) => (account.standing.as_ref().and_then(|standing| standing.vf), account.open.is_some()),
            Err(LedgerError::Malformed { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if let Some(vf) = vf {
            self.forget(page, vf)?;
        }
        if open {
            page.end()?;
        }
        Ok(())
    }
}

fn busy(port: PciAddress, function: PciAddress) -> CountError {
    CountError::InUse { port, function, user: "a call that works on it now".to_owned() }
}
