//! What a change of names alone has to mind: it closes nobody, and is in force where every program knows it.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use dcenet_core::model::AttachmentKey;

use super::{Applier, Outcomes, Replaced, Switch, is_current, put_back};
use crate::classes::ClassId;
use crate::compiler::{CompileError, Compiler, PolicySet, Update};
use crate::enforcer::EnforcerError;
use crate::enforcer::state::{Known, Outcome, Shared};
use crate::isolation::Fault;
use crate::model::{Cluster, Direction, Names};

impl Applier {
    /// Takes addresses out of the class tables that had a class of their own by names alone: not the listed ones. They are again what
    /// the prefixes say of them, which every program knows. The next change has all flows judged anew.
    pub(crate) fn take_out(&mut self, names: &Names, listed: &HashSet<IpAddr>) -> Result<(), EnforcerError> {
        let named = names.iter().flat_map(|(_, known)| known.keys()).filter(|address| !listed.contains(*address));
        let out: BTreeMap<IpAddr, Option<ClassId>> = named.map(|address| (*address, None)).collect();
        self.strayed = true;
        self.tables.write(&Arc::new(self.table.with_exact(&out)))
    }

    /// Puts programs back that were replaced. Those are left that are there still.
    pub(super) fn undo(&self, shared: &Shared, switches: &[Switch<'_>], replaced: &mut Vec<Replaced>) {
        let undone = shared.host.0.run_here_or_there(|| {
            replaced.retain(|done| {
                let switch = switches.iter().find(|switch| *switch.key == done.key);
                let Some((switch, before)) = switch.zip(self.endpoints.get(&done.key)) else { return true };
                let state = shared.state.lock();
                let is_told = state.is_still(switch.known);
                let cells = shared.cells.lock();
                drop(state);
                // Its links are shut since, or it has come anew: what it had before is nobody's.
                if !is_told {
                    return false;
                }
                let undone = put_back(shared, &cells, switch, &before.programs);
                if let Err(error) = &undone {
                    tracing::warn!(key = %done.key, %error, "a program that allows by names that are given up stays");
                }
                undone.is_err()
            });
        });
        if let Err(error) = undone {
            tracing::warn!(%error, "programs that allow by names that are given up stay");
        }
    }

    /// Whether a policy set's programs tell by this local id whom a class means: somebody whom they know, or nobody.
    fn tells(&self, set: &PolicySet, class: ClassId, local: u16) -> bool {
        match local {
            0 => self.compiler.is_nobody(set.id, class),
            local => u32::from(local) < set.program.list.locals,
        }
    }

    /// Whether an endpoint's programs know the addresses, of which a rule of its policies asks.
    pub(crate) fn knows(&self, key: &AttachmentKey, mut addresses: impl Iterator<Item = IpAddr>) -> bool {
        let Some(endpoint) = self.endpoints.get(key).filter(|endpoint| !endpoint.is_mixed) else { return false };
        let set = endpoint.programs.plan.set(Direction::Egress);
        let Some(known) = self.sets.get(&set.id) else { return false };
        addresses.all(|address| {
            let local = known.written.get(self.table.lookup(address).0);
            local != 0 && u32::from(local) < set.program.list.locals
        })
    }

    /// Addresses with names whose class is another in an update, and that some programs which are on devices cannot tell then: until
    /// those of the update are on, rules that deny by something else of the address would not meet it.
    pub(super) fn misjudged(&self, update: &Update, names: &Names) -> BTreeSet<IpAddr> {
        let changes = update.changes_from(&self.table);
        let changed = changes.exact.iter().filter_map(|(address, class)| Some((*address, (*class)?)));
        let named: Vec<(IpAddr, ClassId)> =
            changed.filter(|(address, _)| names.of_address(*address).next().is_some()).collect();
        if named.is_empty() {
            return BTreeSet::new();
        }
        let mut present = update.sets();
        present.extend(update.retiring.iter().map(|set| (set.id, set)));
        let plans = self.endpoints.values().flat_map(|endpoint| Direction::ALL.map(|d| endpoint.programs.plan.set(d)));
        let of_programs: BTreeMap<*const PolicySet, &Arc<PolicySet>> =
            plans.map(|set| (Arc::as_ptr(set), set)).collect();
        let tells = |set: &PolicySet, address: IpAddr, class: ClassId| {
            let now = present.get(&set.id).map_or(0, |present| present.local(class));
            let written = self.sets.get(&set.id).map(|known| &*known.written);
            let before = written.map_or(0, |written| written.get(self.table.lookup(address).0));
            now == before || self.tells(set, class, now)
        };
        let is_misjudged =
            |&(address, class): &(IpAddr, ClassId)| !of_programs.values().all(|set| tells(set, address, class));
        named.into_iter().filter(is_misjudged).map(|(address, _)| address).collect()
    }

    /// Whether the programs that endpoints have kept know what the table is to say of single addresses; else why they were kept.
    pub(super) fn all_know(
        &self,
        update: &Update,
        endpoints: &BTreeMap<AttachmentKey, Known>,
        replaced: &[Replaced],
        outcomes: &Outcomes,
    ) -> Result<(), String> {
        let changes = update.changes_from(&self.table);
        let knows = |set: &PolicySet| {
            let written = self.sets.get(&set.id).map(|known| &*known.written);
            let local = |class: ClassId| written.map_or(0, |written| written.get(class.0));
            // An address that goes is nobody's, or a prefix's, which is in the table.
            changes.exact.iter().filter_map(|(address, class)| Some((address, (*class)?))).all(|(address, class)| {
                let now = local(class);
                let before = local(self.table.lookup(*address));
                now == before || self.tells(set, class, now)
            })
        };
        let replaced: BTreeSet<&AttachmentKey> = replaced.iter().map(|replaced| &replaced.key).collect();
        let outcomes: BTreeMap<&AttachmentKey, &Outcome> =
            outcomes.iter().map(|(key, outcome)| (key, outcome)).collect();
        let kept = self
            .endpoints
            .iter()
            .filter(|(key, endpoint)| !replaced.contains(*key) && !is_current(update, endpoints.get(*key), endpoint));
        for (key, endpoint) in kept {
            let reason = match outcomes.get(key) {
                Some(Outcome::Gone) => continue,
                Some(Outcome::Failed { reason, .. } | Outcome::Hopeless { reason }) => reason,
                Some(Outcome::Enforced { .. }) | None => "it has other programs",
            };
            if !Direction::ALL.iter().all(|direction| knows(endpoint.programs.plan.set(*direction))) {
                return Err(format!("{key}: {reason}"));
            }
        }
        Ok(())
    }
}

/// Compiles everything anew; an error where something were closed that is not among the faults.
pub(super) fn update_for_names(
    compiler: &mut Compiler,
    cluster: &Cluster,
    faults: &[Fault],
    room: impl FnMut(&Update) -> Result<(), CompileError>,
) -> Result<Update, EnforcerError> {
    let is_left_out = |fault: &Fault| matches!(fault, Fault::Refused { .. } | Fault::NotAudited { .. });
    // What is in force takes its room until it is released, so that closing need not help.
    let found = compiler.update_closing(cluster, faults.iter().any(is_left_out), room);
    let update = found.map_err(|error| EnforcerError::NoRoomForNames { reason: error.to_string() })?;
    match update.faults.iter().find(|fault| !faults.contains(fault)) {
        None => Ok(update),
        Some(fault) => Err(EnforcerError::NoRoomForNames { reason: fault.to_string() }),
    }
}
