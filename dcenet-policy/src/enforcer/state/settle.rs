//! What became of endpoints when a change was carried out.

use dcenet_core::model::AttachmentKey;

use super::{Known, Outcome, State};
use crate::enforcer::Phase;

impl State {
    /// Records what a change did, unless the endpoint has become another in the meantime. Returns whether it is gone.
    pub(super) fn settle(&mut self, attachment: &AttachmentKey, then: &Known, outcome: Outcome) -> bool {
        // One whose policy was lifted meanwhile, and that is under policy anew, has nothing of what was done before: its slot may
        // be another's.
        if !self.is_still(then) {
            return false;
        }
        let Some(known) = self.endpoints.get_mut(attachment) else { return false };
        let gone = matches!(outcome, Outcome::Gone);
        // One that was told of in between may be there again.
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

#[cfg(test)]
mod tests {
    use dcenet_core::model::{IfIndex, MacAddr};
    use dcenet_core::provider::{Endpoint, Place};

    use super::*;

    #[test]
    fn what_was_done_before_a_lift_is_not_that_of_the_endpoint_after_it() {
        for lifted in [true, false] {
            let attachment = AttachmentKey {
                network: "shop".parse().unwrap(),
                container: "c1".parse().unwrap(),
                ifname: "eth0".parse().unwrap(),
            };
            let endpoint = Endpoint {
                attachment: attachment.clone(),
                ifindex: IfIndex::new(7).unwrap(),
                ifname: "dc1".parse().unwrap(),
                place: Place::Host,
                mac: MacAddr::new([2, 0, 0, 0, 0, 1]),
                link_local: None,
                addresses: Default::default(),
                workload: None,
                labels: Default::default(),
            };
            let mut state = State::default();
            let mut change = |change: &dyn Fn(&mut State)| {
                change(&mut state);
                state.revision += 1;
                state.endpoints.get(&attachment).cloned()
            };
            let then = change(&|state| state.note(&endpoint, Some(false))).unwrap();
            if lifted {
                change(&|state| state.forget(&attachment));
            }
            // Told of anew, on the same device.
            change(&|state| state.note(&endpoint, Some(false)));
            let is = |state: &State| {
                let known = &state.endpoints[&attachment];
                (known.phase, known.slot, known.failure.is_some())
            };
            let before = (Phase::Default, None, false);
            let failed = Outcome::Failed { reason: "no room".to_owned(), phase: Phase::Enforced };
            assert!(!state.settle(&attachment, &then, failed));
            assert_eq!(is(&state), if lifted { before } else { (Phase::Enforced, None, true) });
            assert!(!state.settle(&attachment, &then, Outcome::Enforced { slot: 3, generation: 1 }));
            assert_eq!(is(&state), if lifted { before } else { (Phase::Enforced, Some(3), false) });
            assert_eq!(state.settle(&attachment, &then, Outcome::Gone), !lifted);
        }
    }
}
