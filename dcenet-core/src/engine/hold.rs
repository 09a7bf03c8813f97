//! Keeping others from an attachment while its devices and its addresses change.

use super::error::{AttachError, DetachErrors, TeardownError};
use super::{AttachRequest, Attached, Engine};
use crate::journal::{Entered, Entry, JournalError, Record};
use crate::model::AttachmentKey;
use crate::netns::NetNs;

/// An attachment that nobody else attaches or detaches, in any process, until this is dropped: others are told that it is
/// [`Busy`](JournalError::Busy).
///
/// An address has two keepers, the device that bears it and the store that leased it, and they change one after the
/// other. Whoever changes both holds the attachment from before the first change until the second is durable. A detach
/// that stood still between the two would otherwise free the addresses of an attach that began meanwhile, for that gets the
/// same lease.
///
/// ```no_run
/// # use dcenet_core::engine::Engine;
/// # use dcenet_core::model::AttachmentKey;
/// # use dcenet_core::provider::AddressSource;
/// # async fn delete(engine: &Engine, source: &dyn AddressSource, key: &AttachmentKey)
/// # -> Result<(), Box<dyn std::error::Error>> {
/// if let Some(mut hold) = engine.hold_remains(key, None)? {
///     let lease = source.held(key).await?;
///     hold.detach(None)?;
///     source.release(key, lease.map_or(0, |lease| lease.sequence())).await?;
///     hold.close()?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Hold<'e> {
    engine: &'e Engine,
    key: AttachmentKey,
    entry: Entry,
    found: Found,
}

/// What the record says.
#[derive(Debug)]
enum Found {
    /// Nothing: its file is empty.
    Nothing,
    Record(Box<Record>),
    /// What was, and is gone. It stays until its addresses are released too: whoever finds it after a kill, also GC, which
    /// knows no other list, detaches once more.
    Detached,
    /// What this program does not write; whether the devices that carry the attachment's mark are gone.
    Malformed {
        line: usize,
        reason: String,
        gone: bool,
    },
    /// It is not ours to touch any more.
    Closed,
}

impl Engine {
    /// Holds an attachment, whether or not there is anything of it.
    ///
    /// # Errors
    /// Where another process or thread holds it now, or its record cannot be opened or read.
    pub fn hold(&self, key: &AttachmentKey) -> Result<Hold<'_>, JournalError> {
        match self.journal.enter(key.id())? {
            Entered::New(entry) => Ok(Hold { engine: self, key: key.clone(), entry, found: Found::Nothing }),
            Entered::Old(entry) => self.hold_entry(key, entry),
        }
    }

    /// Holds an attachment that something may be left of; `None` where nothing is: no record, no device with its mark, and
    /// nobody who decides about policy or hands out devices and might know of it. `netns` helps where a device lives in the pod only.
    ///
    /// # Errors
    /// As [`Engine::hold`], and where the host's devices cannot be looked at.
    pub fn hold_remains(&self, key: &AttachmentKey, netns: Option<&NetNs>) -> Result<Option<Hold<'_>>, DetachErrors> {
        let failed = |error: TeardownError| DetachErrors(vec![error]);
        if let Some(entry) = self.journal.open_entry(key.id()).map_err(|e| failed(e.into()))? {
            return self.hold_entry(key, entry).map(Some).map_err(|e| failed(e.into()));
        }
        let nothing = self.policy.is_none() && !self.has_marked(key, netns).map_err(failed)?;
        if nothing && !self.has_device(key).map_err(failed)? {
            return Ok(None);
        }
        self.hold(key).map(Some).map_err(|e| failed(e.into()))
    }

    fn hold_entry(&self, key: &AttachmentKey, mut entry: Entry) -> Result<Hold<'_>, JournalError> {
        let found = match entry.read() {
            Ok(Some(record)) => Found::Record(Box::new(record)),
            Ok(None) => Found::Nothing,
            Err(JournalError::Malformed { line, reason, .. }) => Found::Malformed { line, reason, gone: false },
            Err(error) => return Err(error),
        };
        Ok(Hold { engine: self, key: key.clone(), entry, found })
    }
}

impl Hold<'_> {
    /// The attachment.
    pub fn key(&self) -> &AttachmentKey {
        &self.key
    }

    /// What was recorded of the attachment when it was held or attached; `None` where nothing is, or it was detached since.
    pub fn record(&self) -> Option<&Record> {
        match &self.found {
            Found::Record(record) => Some(record),
            _ => None,
        }
    }

    /// Whether anything of the attachment may be on the host: a record of it, finished, only begun, or malformed.
    pub fn is_recorded(&self) -> bool {
        matches!(self.found, Found::Record(_) | Found::Malformed { gone: false, .. })
    }

    /// Makes the attachment, or returns the one that stands.
    ///
    /// Repeating it is allowed: with the same key, namespace and fingerprint it returns the same answer; what an earlier
    /// call left unfinished when its process was killed is taken back first.
    ///
    /// # Errors
    /// The host and the pod are as before, except for what the error lists in `rollback`.
    ///
    /// # Minimum kernel version
    /// 4.11. Before 6.2 (no echo on link creation) two more requests are made.
    pub fn attach(&mut self, request: &AttachRequest<'_>) -> Result<Attached, AttachError> {
        let span = tracing::debug_span!("attach", key = %request.key, kind = request.link.driver().kind());
        let _entered = span.enter();
        if request.key != self.key {
            return Err(AttachError::NotHeld { key: request.key.clone(), held: Box::new(self.key.clone()) });
        }
        self.engine.admit(request)?;
        match &mut self.found {
            Found::Nothing | Found::Closed => {}
            Found::Detached => self.clear()?,
            Found::Malformed { line, reason, .. } => {
                let (path, reason) = (self.entry.path().to_owned(), reason.clone());
                return Err(JournalError::Malformed { path, line: *line, reason }.into());
            }
            Found::Record(record) if self.engine.is_changed(record, request) => {
                return self.engine.change(record, request, &mut self.entry);
            }
            Found::Record(record) => {
                if let Some(attached) = self.engine.resume(record, request)? {
                    return Ok(attached);
                }
                DetachErrors::or_ok(self.engine.take_back_record(record, Some(request.pod.netns)))
                    .map_err(|source| AttachError::Leftover { key: self.key.clone(), source })?;
                self.clear()?;
            }
        }
        let mut recorded = None;
        let outcome = self.engine.attach_new(request, &mut self.entry, &mut recorded);
        match recorded {
            Some(record) => self.found = Found::Record(record),
            // At most an intent whose steps were all taken back.
            None => {
                if let Err(error) = self.clear() {
                    tracing::warn!(key = %self.key, %error, "an intent is left of what was taken back");
                }
            }
        }
        outcome
    }

    /// Removes the attachment's devices, from the journal alone: nothing is read from the pod, whose namespace may be gone,
    /// or another pod's by now. `netns` helps where a device lives in the pod only.
    ///
    /// # Errors
    /// All that went wrong. Whatever could be removed is; the record stays, and the next call tries again.
    pub fn detach(&mut self, netns: Option<&NetNs>) -> Result<(), DetachErrors> {
        let span = tracing::debug_span!("detach", key = %self.key);
        let _entered = span.enter();
        match &self.found {
            Found::Record(record) if record.key != self.key => {
                let (key, other) = (self.key.clone(), Box::new(record.key.clone()));
                Err(DetachErrors(vec![TeardownError::IdCollision { key, other }]))
            }
            Found::Record(record) => {
                DetachErrors::or_ok(self.engine.take_back_record(record, netns))?;
                self.found = Found::Detached;
                Ok(())
            }
            Found::Detached => Ok(()),
            Found::Nothing | Found::Closed => DetachErrors::or_ok(self.engine.detach_by_mark(&self.key, netns)),
            Found::Malformed { line, reason, .. } => {
                // The marks on the devices still tell what is ours.
                tracing::warn!(key = %self.key, line, reason, "record unreadable; going by the marks on devices");
                DetachErrors::or_ok(self.engine.detach_by_mark(&self.key, netns))?;
                self.found = Found::Malformed { line: *line, reason: reason.clone(), gone: true };
                Ok(())
            }
        }
    }

    /// Lets others at the attachment again, and removes its record where it says nothing any more.
    ///
    /// # Errors
    /// Where the record cannot be removed. It is harmless, and the next call removes it.
    pub fn close(mut self) -> Result<(), JournalError> {
        self.tidy()
    }

    /// Lets others at the attachment again, and leaves its record although its devices are gone, for its addresses could not
    /// be released: whoever finds it detaches once more, and releases them.
    pub fn keep(mut self) {
        // A file that says nothing tells nobody whose the addresses are.
        if !matches!(self.found, Found::Nothing) {
            self.found = Found::Closed;
        }
    }

    fn clear(&mut self) -> Result<(), JournalError> {
        self.entry.clear()?;
        self.found = Found::Nothing;
        Ok(())
    }

    fn tidy(&mut self) -> Result<(), JournalError> {
        // Once only: the name may be another's file as soon as ours is gone.
        match std::mem::replace(&mut self.found, Found::Closed) {
            Found::Nothing | Found::Detached => self.entry.remove(),
            Found::Malformed { gone: true, .. } => self.entry.set_aside(),
            Found::Record(_) | Found::Malformed { .. } | Found::Closed => Ok(()),
        }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.tidy() {
            tracing::warn!(key = %self.key, %error, "a record of nothing is left");
        }
    }
}
