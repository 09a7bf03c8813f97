//! The second pass: names alone. What is over goes first, whatever comes; then answers come in, together where that succeeds, else one
//! by one.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Instant;

use super::{Again, CarriedOut, RETRY};
use crate::enforcer::EnforcerError;
use crate::enforcer::apply::{Applied, Applier, Changes};
use crate::enforcer::learnt::Answer;
use crate::enforcer::state::Shared;
use crate::model::Names;

impl Shared {
    /// Carries out what waits of names. What is over and cannot be taken out is tried again; an answer that finds no room, or
    /// meets programs that would take it for something else, is given up.
    pub(super) fn carry_out_names(&self, applier: &mut Applier, mut carried_out: CarriedOut, again: Again) {
        let is_due = {
            let mut state = self.state.lock();
            state.settle_names();
            state.learnt.is_over() && state.is_due(again)
        };
        if is_due {
            self.take_out_over(applier, &mut carried_out);
        }
        let first = self.state.lock().learnt.answers();
        let mut batches = vec![first];
        while let Some(batch) = batches.pop() {
            let now = self.time();
            let (mut batch, names) = {
                let mut state = self.state.lock();
                let batch = state.learnt.still_waiting(batch, now);
                let names = state.learnt.with(&state.cluster.names, &batch);
                (batch, names)
            };
            if batch.is_empty() {
                continue;
            }
            let renamed = batch.iter().flat_map(Answer::addresses).collect();
            let Err(error) = self.name(applier, &mut carried_out, names, &renamed) else {
                self.state.lock().settle_names();
                continue;
            };
            let is_of_answers =
                matches!(error, EnforcerError::NoRoomForNames { .. } | EnforcerError::NamesNotInForce { .. });
            if is_of_answers && batch.len() > 1 {
                let second = batch.split_off(batch.len() / 2);
                batches.extend([second, batch]);
                continue;
            }
            tracing::debug!(%error, answers = batch.len(), "answers are given up; their names are to be asked for again");
            let mut state = self.state.lock();
            batch.iter().for_each(|answer| state.learnt.give_up(answer, &error, now));
        }
        self.changed.notify_all();
    }

    /// Takes out what is over.
    fn take_out_over(&self, applier: &mut Applier, carried_out: &mut CarriedOut) {
        let (renamed, names) = {
            let mut state = self.state.lock();
            let renamed = state.learnt.take_renamed();
            let names = state.learnt.settled();
            let is_same = |address: &IpAddr| {
                let [before, after] = [&state.cluster.names, &names].map(|names| names.of_address(*address));
                before.map(|(name, _)| name).eq(after.map(|(name, _)| name))
            };
            let renamed: BTreeSet<IpAddr> = renamed.into_iter().filter(|address| !is_same(address)).collect();
            (renamed, names)
        };
        let taken_out = match renamed.is_empty() {
            true => Ok(()),
            false => self.name(applier, carried_out, names, &renamed),
        };
        let failure = taken_out.err().map(|error| error.to_string());
        let mut state = self.state.lock();
        if let Some(failure) = &failure {
            state.learnt.note_renamed(renamed);
            if state.names_failure.as_ref() != Some(failure) {
                tracing::warn!(
                    error = failure,
                    "addresses of names are allowed beyond their time, until the next attempt"
                );
            }
        }
        state.names_at = failure.is_some().then(|| Instant::now() + RETRY);
        state.names_failure = failure;
    }

    /// Puts names in force that are others for these addresses. Where that fails, those before are.
    fn name(
        &self,
        applier: &mut Applier,
        carried_out: &mut CarriedOut,
        names: Names,
        renamed: &BTreeSet<IpAddr>,
    ) -> Result<(), EnforcerError> {
        let (before, faults) = {
            let mut state = self.state.lock();
            (carried_out.name(&mut state, names), state.faults.clone())
        };
        let changes = Changes::Names { renamed, faults: &faults };
        let result = applier.run(self, &carried_out.cluster, &changes, &carried_out.endpoints);
        let mut state = self.state.lock();
        let done = result.and_then(|Applied { outcomes, faults, mut retry, held, unnamed: _ }| {
            retry |= self.settle_all(&mut state, &carried_out.endpoints, outcomes);
            carried_out.refresh(&state);
            if retry {
                state.retry_at.get_or_insert_with(|| Instant::now() + RETRY);
            }
            match held {
                None => {
                    state.set_faults(faults);
                    Ok(())
                }
                Some(reason) => Err(EnforcerError::NamesNotInForce { reason }),
            }
        });
        if done.is_err() {
            carried_out.name(&mut state, before);
        }
        done
    }
}
