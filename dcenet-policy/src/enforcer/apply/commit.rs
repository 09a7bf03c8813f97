//! Noting what is in force, and having flows judged by it.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::Endpoint;
use parking_lot::Mutex;

use super::arrays::{classes_of, judges_otherwise, says_the_same};
use super::{Applier, InForce, Outcomes, Replaced, Switch, policy_key};
use crate::classes::ClassId;
use crate::compiler::{SetId, Update};
use crate::enforcer::cells::Cells;
use crate::enforcer::state::{Known, Outcome};
use crate::enforcer::{EnforcerError, Phase};
use crate::model::Direction;

impl Applier {
    /// Notes that the tables are an update's, and whose flows are to be judged anew: nobody's where names alone have changed.
    pub(super) fn commit(&mut self, update: &Update, endpoints: &BTreeMap<AttachmentKey, Known>, by_names: bool) {
        let changes = update.changes_from(&self.table);
        let mut touched: BTreeSet<SetId> = BTreeSet::new();
        let strayed = std::mem::take(&mut self.strayed);
        let retiring = update.retiring.iter().map(|set| (set.id, set));
        let in_use: OnceCell<BTreeSet<ClassId>> = OnceCell::new();
        let named = || in_use.get_or_init(|| classes_of(&update.table));
        for (id, set) in update.sets().into_iter().chain(retiring) {
            if let Some(known) = self.sets.get_mut(&id) {
                let differs = || {
                    judges_otherwise(&known.set, set, &changes, &self.table)
                        || !(Arc::ptr_eq(&known.set, set) || says_the_same(&known.set, set, named()))
                };
                if strayed || (!by_names && differs()) {
                    touched.insert(id);
                }
                known.set = Arc::clone(set);
            }
        }
        self.table = Arc::clone(&update.table);
        self.astray.clear();
        self.unfinished = false;
        for (key, endpoint) in &mut self.endpoints {
            let plan = endpoints.get(key).and_then(Known::pod).and_then(|pod| update.endpoints.get(&pod));
            if let Some(plan) = plan {
                endpoint.is_behind |= !by_names && policy_key(plan) != policy_key(&endpoint.wanted);
                endpoint.wanted = plan.clone();
            }
            // Also of those that keep the programs they had: these look into the new tables.
            for direction in Direction::ALL {
                if touched.contains(&endpoint.programs.plan.set(direction).id) {
                    endpoint.unbumped.insert(direction);
                }
            }
        }
    }

    /// Notes who has other programs.
    pub(super) fn note_replaced(&mut self, switches: Vec<Switch<'_>>, replaced: &[Replaced]) {
        let mut replaced: BTreeMap<&AttachmentKey, &Replaced> = replaced.iter().map(|done| (&done.key, done)).collect();
        for Switch { key, known, programs } in switches {
            let Some(done) = replaced.remove(key) else { continue };
            let Endpoint { ifindex, place, addresses, .. } = &known.endpoint;
            // Programs of other names alone.
            let before = self.endpoints.get(key).filter(|before| {
                let differs = before.slot != done.slot
                    || before.programs.key.guarded != programs.key.guarded
                    || before.addresses != *addresses;
                !before.is_behind && !before.is_mixed && !differs
            });
            let (wanted, unbumped) = match before {
                Some(before) => (before.wanted.clone(), before.unbumped.clone()),
                // Of a new endpoint, too: it may have had an earlier owner's programs until now, and what those let pass
                // since its cell was written is of this cell's generations.
                None => (programs.plan.clone(), Direction::ALL.into()),
            };
            let in_force = InForce {
                device: *ifindex,
                place: place.clone(),
                slot: done.slot,
                generation: done.generation,
                programs,
                addresses: addresses.clone(),
                wanted,
                is_behind: false,
                is_mixed: false,
                unbumped,
            };
            self.endpoints.insert(key.clone(), in_force);
        }
    }

    /// Lets go of what neither an update nor an endpoint uses.
    pub(super) fn forget_unused(&mut self, update: &Update) {
        let in_use = self.endpoints.values().flat_map(|e| Direction::ALL.map(|d| e.programs.plan.set(d).id));
        let retiring = update.retiring.iter().map(|set| set.id);
        let used: BTreeSet<SetId> = in_use.chain(retiring).chain(update.sets().into_keys()).collect();
        self.sets.retain(|id, _| used.contains(id));
        self.programs.retain(|_, programs| programs.strong_count() > 0);
        self.guarded.retain(|_, program| program.strong_count() > 0);
        self.walked.retain(|_, walked| walked.strong_count() > 0);
    }

    /// Lets the endpoints' established flows be judged anew. What came of an endpoint already is not told again.
    pub(super) fn bump(&mut self, cells: &Mutex<Cells>, outcomes: &mut Outcomes) {
        let settled: BTreeSet<AttachmentKey> = outcomes.iter().map(|(key, _)| key.clone()).collect();
        let keys: Vec<AttachmentKey> = self.endpoints.keys().cloned().collect();
        for key in keys {
            let bumped = self.bump_one(cells, &key);
            if settled.contains(&key) {
                if let Err(error) = bumped {
                    tracing::warn!(%key, %error, "established flows are not judged anew yet");
                }
                continue;
            }
            let outcome = match bumped {
                Ok((slot, generation)) => Outcome::Enforced { slot, generation },
                Err(error) => Outcome::Failed {
                    reason: format!("established flows are not judged anew yet: {error}"),
                    phase: Phase::Enforced,
                },
            };
            outcomes.push((key, outcome));
        }
    }

    fn bump_one(&mut self, cells: &Mutex<Cells>, key: &AttachmentKey) -> Result<(u16, u32), EnforcerError> {
        let endpoint = &self.endpoints[key];
        let slot = endpoint.slot;
        if endpoint.unbumped.is_empty() {
            return Ok((slot, endpoint.generation));
        }
        let generation = cells.lock().bump(slot, &endpoint.unbumped)?;
        if let Some(endpoint) = self.endpoints.get_mut(key) {
            endpoint.unbumped.clear();
            endpoint.generation = generation;
        }
        Ok((slot, generation))
    }
}
