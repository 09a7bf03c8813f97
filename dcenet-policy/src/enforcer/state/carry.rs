//! Carrying out what was told, in two passes: everything but names, with the names that are in force already, and then names
//! alone. So whatever comes together with an answer is no matter of the answer's, which opens, closes and ends nothing else.

mod second;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_core::model::AttachmentKey;
use parking_lot::MutexGuard;

use super::{Known, Outcome, Shared, State};
use crate::compiler::CompileError;
use crate::enforcer::apply::{Applied, Applier, Changes, Outcomes};
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
        self.apply_when(Again::AtOnce)
    }

    /// As [`Shared::apply`]; what failed before where it is due.
    pub(in crate::enforcer) fn apply_when(&self, again: Again) -> Result<Report, EnforcerError> {
        let mut applier = self.applier.lock();
        let now = self.time();
        {
            let mut state = self.state.lock();
            if !state.started || state.stopping {
                return Ok(state.report());
            }
            state.go_by_policies();
            state.learnt.expire(now);
            if state.is_late(now) {
                state.cluster_mut().time = Some(now);
                state.revision += 1;
            }
            if again == Again::AtOnce || state.applied != state.revision {
                state.learnt.forget_refused();
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
        if let Some(carried_out) = others? {
            self.carry_out_names(&mut applier, carried_out, again);
        }
        Ok(self.state.lock().report())
    }

    /// The first pass, where something waits for it. Returns what is in force then, if names wait for the second.
    fn carry_out_others(&self, applier: &mut Applier, again: Again) -> Result<Option<CarriedOut>, EnforcerError> {
        let (revision, touched, bereft, mut carried_out) = {
            let mut state = self.state.lock();
            let is_due = |at: Instant| again == Again::AtOnce || at <= Instant::now();
            let carried_out =
                |state: &State| CarriedOut { cluster: Arc::clone(&state.cluster), endpoints: state.endpoints.clone() };
            if state.applied == state.revision && !applier.is_unfinished() && !state.retry_at.is_some_and(is_due) {
                return Ok(state.are_names_due(again).then(|| carried_out(&state)));
            }
            if state.applied == state.revision && again == Again::WhenDue && !state.retry_at.is_none_or(is_due) {
                // It is not in force, and its next attempt is no matter of those who ask for names.
                return Ok(None);
            }
            if state.applied == 0 {
                // What an earlier owner has left is in force until then.
                let names = state.learnt.settled();
                state.name_as_before(names);
            }
            let bereft = std::mem::take(&mut state.bereft);
            let touched = state.touched.replace(BTreeSet::new());
            (state.revision, touched, bereft, carried_out(&state))
        };
        applier.forget(&bereft);
        let changes = touched.as_ref().map_or(Changes::All, Changes::Pods);
        let result = applier.run(self, &carried_out.cluster, &changes, &carried_out.endpoints);
        let mut state = self.state.lock();
        let done = match result {
            Ok(Applied { outcomes, faults, mut retry, held, unnamed }) => {
                state.set_faults(faults);
                retry |= self.settle_all(&mut state, &carried_out.endpoints, outcomes) || held.is_some();
                state.applied = revision;
                state.retry_at = retry.then(|| Instant::now() + RETRY);
                if !unnamed.is_empty() {
                    carried_out.unname(&mut state, &unnamed);
                }
                carried_out.refresh(&state);
                Ok((held.is_none() && state.are_names_due(again)).then_some(carried_out))
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
    /// Brings endpoints up to date with what has become of them, but for those that are others by now.
    fn refresh(&mut self, state: &State) {
        for (key, then) in &mut self.endpoints {
            let now = state.endpoints.get(key);
            if let Some(now) = now.filter(|now| now.noted == then.noted && now.endpoint == then.endpoint) {
                *then = now.clone();
            }
        }
    }

    /// Goes by other names, as does the present cluster. Returns those before.
    fn name(&mut self, state: &mut State, names: Names) -> Names {
        let (cluster, before) = state.name(std::mem::take(&mut self.cluster), names);
        self.cluster = cluster;
        before
    }

    /// Has the names of addresses that were left out wait for the second pass.
    fn unname(&mut self, state: &mut State, unnamed: &BTreeSet<IpAddr>) {
        let names = state.cluster.names.without(unnamed);
        self.name(state, names);
        state.learnt.have_wait(unnamed);
    }
}

impl State {
    /// Whether names wait for the second pass.
    fn are_names_due(&self, again: Again) -> bool {
        self.learnt.is_waiting() || (self.learnt.is_over() && self.is_due(again))
    }

    /// Whether it is tried again to take out what is over.
    fn is_due(&self, again: Again) -> bool {
        again == Again::AtOnce || self.names_at.is_none_or(|at| at <= Instant::now())
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
