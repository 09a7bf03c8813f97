//! Changing what was added to another plugin's device, which lives on.
//!
//! What is new comes first. Policy is lifted when nothing else can be refused any more, and what was before goes last: an attach
//! that cannot have what it asks for leaves the pod what it has. The record is that of before until the change is whole, and lists
//! what takes back either.

use std::sync::Arc;

use super::apply::Session;
use super::attach::{done, link_request, view};
use super::error::{AttachError, DetachErrors, StepError, TeardownError};
use super::{AttachRequest, Attached, Engine};
use crate::journal::{Entry, Record};
use crate::link::{LinkConfig, Policy};
use crate::netlink::nft;
use crate::netns::NetNs;
use crate::plan::{Target, Undo};
use crate::provider::PolicySink;

impl Engine {
    /// Whether another plugin's device stands that is to have something else added than it has. Policy is never off between two
    /// configurations that want it: those are refused as others are.
    pub(super) fn is_changed(&self, record: &Record, request: &AttachRequest<'_>) -> bool {
        let chained = |link: &LinkConfig| matches!(link, LinkConfig::Chained(_));
        let stands = record.done.is_some()
            && (&record.key, record.boot.as_str(), record.netns)
                == (&request.key, self.journal.boot(), request.pod.netns.id());
        let policy = match (record.policy, request.policy) {
            (Policy::None, _) => true,
            (Policy::Wanted, Policy::None) => self.lifting.is_some(),
            (Policy::Wanted, Policy::Wanted) => false,
        };
        stands && policy && chained(&record.link) && chained(&request.link) && record.fingerprint != request.fingerprint
    }

    /// Has such a device have what is asked for now. `record` is what the record says, before and after.
    ///
    /// # Errors
    /// All is as before, but for what the error lists; where what was before could not be taken off, both are there, and the
    /// next attach goes on.
    pub(super) fn change(
        &self,
        record: &mut Record,
        request: &AttachRequest<'_>,
        entry: &mut Entry,
    ) -> Result<Attached, AttachError> {
        let (link_request, driver, pod) = (link_request(request), request.link.driver(), request.pod.netns);
        let mut session = Session::new(self, pod, self.host_socket()?);
        let _lock = self.shared.relying(&self.host)?;
        let host = view(session.host(), &driver.needs(&link_request)).map_err(AttachError::Look)?;
        let mut plan = driver.plan(&link_request, &host)?;
        super::translate::add_to(&mut plan, &request.nat, request.policy, &link_request.addresses)?;
        for link in &host.links {
            session.know(Target::Host, link);
        }
        let settings = self.lock_settings_of(&plan, request)?;
        self.look_at_settings(&mut plan, request)?;
        for undo in plan.steps.iter_mut().filter_map(|step| step.undo.as_mut()) {
            if let Some(own) = record.undo.iter().find(|own| is_same_setting(own, undo)) {
                own.clone_into(undo);
            }
        }
        let mut next = self.record_of(request, link_request.mac, &plan);
        let before = record.clone();
        let added = beyond(&next.undo, &before.undo);
        record.undo.extend(added.clone());
        entry.rewrite(record)?;
        drop(settings);

        let failed = session.apply(&plan, request).failure.map(|(_, cause)| cause);
        next.done = Some(done(request, &plan, &host, &session));
        let lifts = before.policy == Policy::Wanted && request.policy == Policy::None;
        let failed = failed.or_else(|| if lifts { self.lift(self.lifting.as_ref(), &before).err() } else { None });
        if let Some(cause) = failed {
            let rollback = self.change_back(&before, &next, &added, pod);
            if rollback.is_empty() {
                *record = before;
                if let Err(error) = entry.rewrite(record) {
                    tracing::warn!(key = %record.key, %error, "the record lists what was taken back, too");
                }
            }
            return Err(AttachError::Step { cause, rollback });
        }

        let mut removed = beyond(&before.undo, &next.undo);
        removed.retain(|undo| !matches!(undo, Undo::DetachPolicy));
        DetachErrors::or_ok(self.take_back(&removed, &request.key, Some(pod)))
            .map_err(|source| AttachError::Leftover { key: request.key.clone(), source })?;
        entry.rewrite(&next)?;
        *record = next;
        Ok(Attached::from_record(record, false).expect("the completion was just set"))
    }

    /// Takes back what was added, and makes again what that has replaced.
    fn change_back(&self, before: &Record, next: &Record, added: &[Undo], pod: &NetNs) -> Vec<TeardownError> {
        let (policy, added): (Vec<Undo>, Vec<Undo>) =
            added.iter().cloned().partition(|undo| matches!(undo, Undo::DetachPolicy));
        let mut errors = self.take_back(&added, &before.key, Some(pod));
        let former = |error| TeardownError::Former(Box::new(error));
        if !policy.is_empty() {
            errors.extend(self.lift(self.policy.as_ref(), next).err().map(former));
        }
        let entered = match self.missing_translation(before) {
            Ok(missing) if missing.is_empty() => Ok(()),
            Ok(_) => self.translate(before.translation(), &before.key),
            Err(error) => Err(error.into()),
        };
        errors.extend(entered.err().map(former));
        errors
    }

    fn lift(&self, sink: Option<&Arc<dyn PolicySink>>, record: &Record) -> Result<(), StepError> {
        let Some((sink, endpoint)) = sink.zip(record.endpoint()) else { return Ok(()) };
        Ok(self.host.0.run_here_or_there(|| sink.lift(&endpoint))??)
    }
}

/// What of these undos is not among others: elements of other keys, other settings.
fn beyond(undos: &[Undo], others: &[Undo]) -> Vec<Undo> {
    let there = |element: &_| {
        others.iter().any(|other| match other {
            Undo::DeleteTranslation { elements } => elements.iter().any(|other| nft::is_same_entry(element, other)),
            _ => false,
        })
    };
    let one = |undo: &Undo| match undo {
        Undo::DeleteTranslation { elements } => {
            let elements: Vec<_> = elements.iter().filter(|element| !there(*element)).cloned().collect();
            (!elements.is_empty()).then_some(Undo::DeleteTranslation { elements })
        }
        undo if others.iter().any(|other| other == undo || is_same_setting(other, undo)) => None,
        undo => Some(undo.clone()),
    };
    undos.iter().filter_map(one).collect()
}

fn is_same_setting(one: &Undo, other: &Undo) -> bool {
    match (one, other) {
        (
            Undo::RestoreSetting { target, name, .. },
            Undo::RestoreSetting { target: of_other, name: other_name, .. },
        ) => (target, name) == (of_other, other_name),
        _ => false,
    }
}
