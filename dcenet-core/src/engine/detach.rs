//! Detaching, and recovery after kills.

use super::Engine;
use super::apply::{delete, look_up};
use super::error::{DetachErrors, TeardownError};
use crate::journal::{JournalError, Record};
use crate::model::AttachmentKey;
use crate::netns::NetNs;
use crate::plan::{Undo, mark};

impl Engine {
    /// Removes an attachment, from the journal alone: nothing is read from the pod, whose namespace may be gone, or
    /// another pod's by now. `netns` helps where a device lives in the pod only.
    ///
    /// Repeating it is allowed; an attachment that is not there is `Ok`.
    ///
    /// # Errors
    /// All that went wrong. Whatever could be removed is; the record stays, and the next call tries again.
    pub fn detach(&self, key: &AttachmentKey, netns: Option<&NetNs>) -> Result<(), DetachErrors> {
        let span = tracing::debug_span!("detach", %key);
        let _entered = span.enter();
        let (entry, record) = match self.journal.find(key.id()) {
            Ok(Some((entry, Some(record)))) => {
                if record.key != *key {
                    let error = TeardownError::IdCollision { key: key.clone(), other: Box::new(record.key) };
                    return Err(DetachErrors(vec![error]));
                }
                (Some(entry), Some(record))
            }
            Ok(Some((entry, None))) => (Some(entry), None),
            Ok(None) => (None, None),
            Err(error @ JournalError::Malformed { .. }) => {
                // The marks on the devices still tell what is ours.
                tracing::warn!(%key, %error, "record unreadable; going by the marks on devices");
                let mut errors = self.detach_by_mark(key);
                if errors.is_empty()
                    && let Err(error) = self.journal.set_aside(key.id())
                {
                    errors.push(error.into());
                }
                return DetachErrors::or_ok(errors);
            }
            Err(error) => return Err(DetachErrors(vec![error.into()])),
        };
        let mut errors = match &record {
            Some(record) => self.take_back_record(record, netns),
            None => self.detach_by_mark(key),
        };
        if errors.is_empty()
            && let Some(entry) = entry
            && let Err(error) = entry.remove()
        {
            errors.push(error.into());
        }
        DetachErrors::or_ok(errors)
    }

    /// Takes back what a record lists. Of a finished attachment what it shares with others stays.
    pub(super) fn take_back_record(&self, record: &Record, netns: Option<&NetNs>) -> Vec<TeardownError> {
        // A namespace of another identity is another pod's.
        let netns = netns.filter(|n| n.id() == record.netns && record.boot == self.journal.boot());
        let finished = record.done.is_some();
        let undo: Vec<Undo> = record.undo.iter().filter(|u| !finished || !u.is_shared()).cloned().collect();
        let lock = if undo.iter().any(Undo::is_shared) { Some(self.shared.changing(&self.host)) } else { None };
        match lock.transpose() {
            Ok(lock) => {
                let errors = self.take_back(&undo, &record.key, netns);
                drop(lock);
                errors
            }
            Err(error) => vec![error.into()],
        }
    }

    /// Removes what carries the attachment's mark, where no record says more.
    fn detach_by_mark(&self, key: &AttachmentKey) -> Vec<TeardownError> {
        let mut errors = Vec::new();
        if let Err(error) = self.delete_marked(key) {
            // The device may be up, and keeps its policy.
            errors.push(error);
        } else if let Some(sink) = &self.policy {
            match self.host.0.run_here_or_there(|| sink.detach(key)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => errors.push(error.into()),
                Err(error) => errors.push(error.into()),
            }
        }
        errors
    }

    fn delete_marked(&self, key: &AttachmentKey) -> Result<(), TeardownError> {
        let mut socket = self.host_socket()?;
        let Some(link) = look_up(&mut socket, &key.id().host_ifname())? else { return Ok(()) };
        if link.alias.as_deref() == Some(&mark(key)) {
            delete(&mut socket, &link)
        } else {
            tracing::warn!(%key, link = link.name, "a link of this name does not carry our mark; left alone");
            Ok(())
        }
    }

    /// Takes back every attach that was begun and not finished because its process was killed. Attachments that
    /// somebody works on now are left alone. Returns the keys of those taken back.
    ///
    /// Called when a daemon starts; a single attach or detach repairs its own attachment by itself.
    pub fn recover(&self) -> Result<Vec<AttachmentKey>, DetachErrors> {
        let failed = |error: JournalError| DetachErrors(vec![error.into()]);
        let mut recovered = Vec::new();
        let mut errors = Vec::new();
        for id in self.journal.ids().map_err(failed)? {
            let (entry, record) = match self.journal.find(id) {
                Ok(Some(found)) => found,
                Ok(None) | Err(JournalError::Busy { .. }) => continue,
                Err(error) => {
                    errors.push(error.into());
                    continue;
                }
            };
            if let Some(record) = record {
                if record.done.is_some() && record.boot == self.journal.boot() {
                    continue;
                }
                let left = self.take_back_record(&record, None);
                if !left.is_empty() {
                    errors.extend(left);
                    continue;
                }
                recovered.push(record.key);
            }
            if let Err(error) = entry.remove() {
                errors.push(error.into());
            }
        }
        DetachErrors::or_ok(errors).map(|()| recovered)
    }
}
