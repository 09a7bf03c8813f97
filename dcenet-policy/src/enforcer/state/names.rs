//! What whoever learns names has to know of the state.

use std::net::IpAddr;
use std::sync::Arc;

use super::State;
use crate::model::Names;

impl State {
    pub(in crate::enforcer) fn names_mut(&mut self) -> &mut Names {
        &mut Arc::make_mut(&mut self.cluster).names
    }

    /// Counts a change of names, if one waits; returns the revision in which it is in force.
    pub(in crate::enforcer) fn count_names(&mut self) -> u64 {
        if !self.pending.renamed.is_empty() {
            self.revision += 1;
        }
        self.revision
    }

    pub(in crate::enforcer) fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// The latest revision.
    pub(in crate::enforcer) fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether the address is an endpoint's.
    pub(in crate::enforcer) fn is_endpoints(&self, address: IpAddr) -> bool {
        self.endpoints.values().any(|known| known.endpoint.addresses.contains(&address))
    }

    /// Whether changes up to this revision are carried out.
    pub(in crate::enforcer) fn is_applied(&self, revision: u64) -> bool {
        self.applied >= revision
    }

    /// Why the latest change is not in force for the endpoint with the address, if it is one.
    pub(in crate::enforcer) fn failure_of(&self, address: IpAddr) -> Option<String> {
        let known = self.endpoints.values().find(|known| known.endpoint.addresses.contains(&address))?;
        known.failure.clone()
    }
}
