//! What whoever learns names has to know of the state, and how the names in it become those that are in force.

use std::net::IpAddr;
use std::sync::Arc;

use super::{Shared, State};
use crate::enforcer::learnt::Client;
use crate::model::{Cluster, DomainName, Names, Time};

impl Shared {
    /// Writes down for how much longer known addresses count, which nothing else does: no change is carried out for it.
    pub(in crate::enforcer) fn note_names(&self) {
        let _applier = self.applier.lock();
        self.write_names();
    }

    /// Why something that is over is in force of names, if it is.
    pub(in crate::enforcer) fn names_failure(&self) -> Option<String> {
        self.state.lock().names_failure.clone()
    }

    /// Whether the endpoint that has this address knows these by the programs that it has, also where others are wanted for it.
    pub(in crate::enforcer) fn knows(&self, client: IpAddr, addresses: impl Iterator<Item = IpAddr>) -> bool {
        let applier = self.applier.lock();
        let key = {
            let state = self.state.lock();
            let of = state.endpoints.iter().find(|(_, known)| known.endpoint.addresses.contains(&client));
            of.map(|(key, _)| key.clone())
        };
        key.is_some_and(|key| applier.knows(&key, addresses))
    }
}

impl State {
    /// Names a cluster that was carried out, and the present one. Returns the former, and the names before.
    pub(super) fn name(&mut self, mut carried_out: Arc<Cluster>, names: Names) -> (Arc<Cluster>, Names) {
        if Arc::ptr_eq(&carried_out, &self.cluster) {
            // The only one is changed in place.
            drop(carried_out);
            let before = self.name_as_before(names);
            return (Arc::clone(&self.cluster), before);
        }
        Arc::make_mut(&mut carried_out).names.clone_from(&names);
        (carried_out, self.name_as_before(names))
    }

    /// Notes that the cluster's names are in force.
    pub(super) fn settle_names(&mut self) {
        self.learnt.settle(&self.cluster.names);
    }

    /// Returns the names that give way.
    pub(super) fn name_as_before(&mut self, names: Names) -> Names {
        std::mem::replace(&mut Arc::make_mut(&mut self.cluster).names, names)
    }

    /// Whether some policy asks for the name.
    pub(in crate::enforcer) fn is_asked_for(&mut self, name: &DomainName) -> bool {
        self.go_by_policies();
        self.learnt.is_asked_for(name)
    }

    /// Has what is learnt go by the policies, once they have been told.
    pub(super) fn go_by_policies(&mut self) {
        if self.started {
            self.learnt.go_by(&self.cluster);
        }
    }

    /// Whose places addresses take that somebody hears of.
    pub(in crate::enforcer) fn client(&self, address: IpAddr) -> Client {
        let known = self.endpoints.iter().find(|(_, known)| known.endpoint.addresses.contains(&address));
        known.map_or_else(|| Client::other(address), |(key, _)| Client::Endpoint(key.id()))
    }

    /// Whether something that was learnt is over.
    pub(super) fn are_names_late(&self, now: Time) -> bool {
        self.started && self.learnt.next_end().is_some_and(|end| end <= now)
    }

    pub(in crate::enforcer) fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Whether the address is an endpoint's.
    pub(in crate::enforcer) fn is_endpoints(&self, address: IpAddr) -> bool {
        self.endpoints.values().any(|known| known.endpoint.addresses.contains(&address))
    }

    /// Why the latest change is not in force for the endpoint with the address, if it is one.
    pub(in crate::enforcer) fn failure_of(&self, address: IpAddr) -> Option<String> {
        let known = self.endpoints.values().find(|known| known.endpoint.addresses.contains(&address))?;
        known.failure.clone()
    }
}
