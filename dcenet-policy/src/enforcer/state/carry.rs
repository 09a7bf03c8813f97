//! Carrying out what was told, in two passes: everything but names, with the names that are in force already, and then names
//! alone. So whatever comes together with an answer is no matter of the answer's, which opens, closes and ends nothing else.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_core::model::AttachmentKey;
use parking_lot::MutexGuard;

use super::{Known, Outcome, Shared, State};
use crate::compiler::CompileError;
use crate::enforcer::apply::{Applied, Applier, Changes, Outcomes};
use crate::enforcer::learnt::Waiting;
use crate::enforcer::{EnforcerError, Report};
use crate::model::{Catalog, Cluster, Names};

/// When what failed is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::enforcer) enum Again {
    AtOnce,
    WhenDue,
}

/// What is in force, but for names.
struct CarriedOut {
    cluster: Arc<Cluster>,
    endpoints: BTreeMap<AttachmentKey, Known>,
}

impl Shared {
    /// Carries out what has changed, if it has been started; also what failed before.
    pub(crate) fn apply(&self) -> Result<Report, EnforcerError> {
        let (others, names) = self.apply_both(Again::AtOnce);
        if let Err(error) = names {
            tracing::warn!(%error, "answers are given up; their names are to be asked for again");
        }
        others
    }

    /// As [`Shared::apply`]; what became of names is told beside.
    pub(in crate::enforcer) fn apply_both(
        &self,
        again: Again,
    ) -> (Result<Report, EnforcerError>, Result<(), EnforcerError>) {
        let mut applier = self.applier.lock();
        let now = self.time();
        {
            let mut state = self.state.lock();
            if !state.started || state.stopping {
                return (Ok(state.report()), Ok(()));
            }
            state.go_by_policies();
            state.learnt.expire(now);
            if state.is_late(now) {
                state.cluster_mut().time = Some(now);
                state.revision += 1;
            }
        }
        self.write_names();
        let mut others = self.carry_out_others(&mut applier, again);
        if let Err(error @ EnforcerError::Compile(CompileError::ImplLimitExceeded { .. })) = &others
            && self.give_up_all_names(&mut applier)
        {
            tracing::warn!(%error, "all that was learnt of names is given up: it may be what leaves no room for everything else");
            others = self.carry_out_others(&mut applier, Again::AtOnce);
        }
        let (others, names) = match others {
            Ok(None) => (Ok(()), Ok(())),
            Ok(Some(carried_out)) => (Ok(()), self.carry_out_names(&mut applier, carried_out)),
            Err(error) => (Err(error), Ok(())),
        };
        let report = self.state.lock().report();
        (others.map(|()| report), names)
    }

    /// The first pass, where something waits for it. Returns what is in force then, if names wait for the second.
    fn carry_out_others(&self, applier: &mut Applier, again: Again) -> Result<Option<CarriedOut>, EnforcerError> {
        let (revision, touched, bereft, carried_out) = {
            let mut state = self.state.lock();
            let is_due = |at: Instant| again == Again::AtOnce || at <= Instant::now();
            let carried_out =
                |state: &State| CarriedOut { cluster: Arc::clone(&state.cluster), endpoints: state.endpoints.clone() };
            if state.applied == state.revision && !applier.is_unfinished() && !state.retry_at.is_some_and(is_due) {
                return Ok(state.learnt.is_waiting().then(|| carried_out(&state)));
            }
            if state.applied == 0 {
                // What an earlier owner has left is in force until then.
                let names = state.learnt.names().clone();
                state.name_as_before(names);
            }
            let bereft = std::mem::take(&mut state.bereft);
            let touched = state.touched.replace(BTreeSet::new());
            (state.revision, touched, bereft, carried_out(&state))
        };
        applier.forget(&bereft);
        let CarriedOut { cluster, endpoints } = &carried_out;
        let result = applier.run(self, cluster, &touched.as_ref().map_or(Changes::All, Changes::Pods), endpoints);
        let mut state = self.state.lock();
        let done = match result {
            Ok(Applied { outcomes, faults, mut retry, held }) => {
                state.set_faults(faults);
                retry |= self.settle_all(&mut state, endpoints, outcomes) || held.is_some();
                state.applied = revision;
                state.retry_at = retry.then(|| Instant::now() + RETRY);
                Ok((held.is_none() && state.learnt.is_waiting()).then(|| carried_out.refreshed(&state)))
            }
            Err(error) => {
                state.touched = None;
                for known in state.endpoints.values_mut() {
                    known.failure = Some(error.to_string());
                }
                // Of everything else there may be room once numbers of what is no longer in force are free.
                let hopeless = matches!(error, EnforcerError::Compile(CompileError::MisfiledPolicy { .. }));
                state.retry_at = (!hopeless).then(|| Instant::now() + RETRY);
                Err(error)
            }
        };
        drop(state);
        self.changed.notify_all();
        done
    }

    /// Takes out all that was learnt, if there is something. Without it a pod could fill the tables by what it asks for, and nothing else
    /// would be carried out any more, nor what is over.
    fn give_up_all_names(&self, applier: &mut Applier) -> bool {
        let (names, listed) = {
            let mut state = self.state.lock();
            if state.cluster.names.is_empty() {
                return false;
            }
            state.learnt.give_up_all();
            let names = state.name_as_before(Names::default());
            (names, listed(&state.cluster))
        };
        if let Err(error) = applier.take_out(&names, &listed) {
            tracing::warn!(%error, "addresses of names that are given up take room until the next attempt");
        }
        true
    }

    /// The second pass. What finds no room, or meets programs that would take it for something else, is given up.
    fn carry_out_names(&self, applier: &mut Applier, carried_out: CarriedOut) -> Result<(), EnforcerError> {
        let CarriedOut { cluster, endpoints } = carried_out;
        let (cluster, before, waiting, known_faults) = {
            let mut state = self.state.lock();
            let waiting = state.learnt.take();
            let (cluster, before) = state.name(cluster);
            (cluster, before, waiting, state.faults.clone())
        };
        let Waiting { renamed, fresh, revision } = &waiting;
        let faults = (!fresh.is_empty()).then_some(&*known_faults);
        let result = applier.run(self, &cluster, &Changes::Names { renamed, faults }, &endpoints);
        // Another change in the meantime can then change the cluster in place.
        drop(cluster);
        let mut state = self.state.lock();
        let done = match result {
            Ok(Applied { mut outcomes, faults, mut retry, held }) => {
                if held.is_some() {
                    // Whoever has no other programs needs none for what is given up.
                    outcomes.retain(|(_, outcome)| matches!(outcome, Outcome::Enforced { .. } | Outcome::Gone));
                }
                retry |= self.settle_all(&mut state, &endpoints, outcomes);
                match held {
                    None => {
                        state.set_faults(faults);
                        state.learnt.note_applied(*revision);
                        if retry {
                            state.retry_within(RETRY);
                        }
                        Ok(())
                    }
                    Some(reason) => Err(EnforcerError::NamesNotInForce { reason }),
                }
            }
            Err(error) => Err(error),
        };
        if let Err(error) = &done {
            // What is over is not why there is no room.
            let at_once = matches!(error, EnforcerError::NoRoomForNames { .. });
            state.name_as_before(before);
            state.learnt.give_up(waiting);
            state.retry_within(if at_once { Duration::ZERO } else { RETRY });
        }
        drop(state);
        self.changed.notify_all();
        done
    }

    /// Records what a pass did. Returns whether some endpoint wants another attempt.
    fn settle_all(
        &self,
        state: &mut MutexGuard<'_, State>,
        endpoints: &BTreeMap<AttachmentKey, Known>,
        outcomes: Outcomes,
    ) -> bool {
        let mut retry = false;
        for (attachment, outcome) in outcomes {
            retry |= matches!(outcome, Outcome::Failed { .. });
            let Some(then) = endpoints.get(&attachment) else { continue };
            if state.settle(&attachment, then, outcome) {
                self.cells.lock().forget(&attachment);
                self.unguard(attachment.id());
            }
        }
        retry
    }
}

impl CarriedOut {
    /// Endpoints with what has become of them, but for those that are others by now.
    fn refreshed(mut self, state: &State) -> Self {
        for (key, then) in &mut self.endpoints {
            let now = state.endpoints.get(key);
            if let Some(now) = now.filter(|now| now.noted == then.noted && now.endpoint == then.endpoint) {
                *then = now.clone();
            }
        }
        self
    }
}

impl State {
    /// Has another attempt made after this time at the latest.
    fn retry_within(&mut self, wait: Duration) {
        let at = Instant::now() + wait;
        self.retry_at = Some(self.retry_at.map_or(at, |before| before.min(at)));
    }
}

/// Addresses that policies may know by something else than names and prefixes.
fn listed(cluster: &Cluster) -> HashSet<IpAddr> {
    let Catalog { external_addresses, services, service_addresses, .. } = &cluster.catalog;
    let pods = cluster.pods.values().flat_map(|pod| &pod.addresses);
    let nodes = cluster.nodes.values().chain(external_addresses.values()).flatten();
    let backends = services.values().chain(service_addresses.values()).flatten().map(|backend| &backend.address);
    pods.chain(nodes).chain(backends).copied().collect()
}

/// Between attempts.
const RETRY: Duration = Duration::from_secs(1);
