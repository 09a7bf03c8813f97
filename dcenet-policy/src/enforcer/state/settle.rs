//! What became of endpoints when a change was carried out.

use dcenet_core::model::AttachmentKey;

use super::{Known, Outcome, State};
use crate::enforcer::Phase;

impl State {
    /// Records what a change did, unless the endpoint has become another in the meantime. Returns whether it is gone.
    pub(super) fn settle(&mut self, attachment: &AttachmentKey, then: &Known, outcome: Outcome) -> bool {
        let Some(known) = self.endpoints.get_mut(attachment) else { return false };
        if !known.is_on(then.endpoint.ifindex, &then.endpoint.place) {
            return false;
        }
        let gone = matches!(outcome, Outcome::Gone);
        // A device whose policy was lifted lives on, and may be under policy anew: who has gone is the one before.
        if gone && known.noted != then.noted {
            return false;
        }
        match outcome {
            Outcome::Enforced { slot, generation } => {
                (known.phase, known.slot, known.generation) = (Phase::Enforced, Some(slot), generation);
                known.failure = None;
            }
            Outcome::Failed { reason, phase } => (known.failure, known.phase) = (Some(reason), phase),
            Outcome::Hopeless { reason } => known.failure = Some(reason),
            Outcome::Gone => {
                tracing::info!(%attachment, "the endpoint's device has vanished");
                self.forget(attachment);
                self.revision += 1;
            }
        }
        gone
    }
}
