//! Detaching, and recovery after kills.

use super::Engine;
use super::apply::{delete, look_up};
use super::error::{DetachErrors, TeardownError};
use crate::journal::{JournalError, Record};
use crate::model::{AttachmentKey, IfName};
use crate::netlink::{self, LinkChange, LinkView, NetlinkError, Socket};
use crate::netns::NetNs;
use crate::plan::{Undo, is_mark_of, lent_name, mark};

impl Engine {
    /// Removes an attachment, as [`Hold::detach`](super::Hold::detach) does. Who releases addresses of it uses [`Engine::hold_remains`]
    /// instead, or another attach may get them before.
    ///
    /// Repeating it is allowed; an attachment that is not there is `Ok`.
    ///
    /// # Errors
    /// As [`Hold::detach`](super::Hold::detach).
    pub fn detach(&self, key: &AttachmentKey, netns: Option<&NetNs>) -> Result<(), DetachErrors> {
        let Some(mut hold) = self.hold_remains(key, netns)? else { return Ok(()) };
        hold.detach(netns)?;
        hold.close().map_err(|error| DetachErrors(vec![error.into()]))
    }

    /// Takes back what a record lists. Of a finished attachment what it shares with others stays.
    pub(super) fn take_back_record(&self, record: &Record, netns: Option<&NetNs>) -> Vec<TeardownError> {
        // A namespace of another identity is another pod's.
        let same = |n: &NetNs| n.id() == record.netns && record.boot == self.journal.boot();
        let finished = record.done.is_some();
        let undo: Vec<Undo> = record.undo.iter().filter(|u| !finished || !u.is_shared()).cloned().collect();
        let mut netns = netns.filter(|n| same(n));
        let opened;
        if netns.is_none() && undo.iter().any(Undo::is_in_pod) {
            // Whoever has no path any more may still mean a namespace that is there.
            opened = match NetNs::open(&record.netns_path) {
                Ok(found) => Some(found).filter(same),
                Err(error) if error.is_gone() => None,
                Err(error) => return vec![error.into()],
            };
            netns = opened.as_ref();
        }
        self.take_back_locked(&undo, record, netns)
    }

    fn take_back_locked(&self, undo: &[Undo], record: &Record, netns: Option<&NetNs>) -> Vec<TeardownError> {
        let lock = if undo.iter().any(Undo::is_shared) { Some(self.shared.changing(&self.host)) } else { None };
        match lock.transpose() {
            Ok(lock) => {
                let errors = self.take_back(undo, &record.key, netns);
                drop(lock);
                errors
            }
            Err(error) => vec![error.into()],
        }
    }

    /// Removes what carries the attachment's mark, where no record says more.
    pub(super) fn detach_by_mark(&self, key: &AttachmentKey, netns: Option<&NetNs>) -> Vec<TeardownError> {
        // Before marks are looked for: what comes home by its source is not deleted.
        let released = self.has_device(key).and_then(|lent| self.release_devices(key).map(|()| lent));
        let mut deleted = match released {
            Ok(lent) => lent,
            Err(error) => return vec![error],
        };
        let mut errors = Vec::new();
        let inside = netns.map_or(Ok(false), |netns| self.delete_marked_in(netns, key));
        for outcome in [inside, self.delete_marked(key)] {
            match outcome {
                Ok(found) => deleted |= found,
                Err(error) => errors.push(error),
            }
        }
        errors.extend(self.untranslate_by_mark(key).err());
        if !errors.is_empty() {
            // The device may be up, and keeps its policy.
            return errors;
        }
        let Some(sink) = &self.policy else { return Vec::new() };
        let told = self.host.0.run_here_or_there(|| if deleted { sink.detach(key) } else { sink.forget(key) });
        match told {
            Ok(Ok(())) => Vec::new(),
            Ok(Err(error)) => vec![error.into()],
            Err(error) => vec![error.into()],
        }
    }

    /// Removes the attachment's device that lives in the pod's namespace alone, or gives it back to the host. Returns
    /// whether there was one.
    fn delete_marked_in(&self, netns: &NetNs, key: &AttachmentKey) -> Result<bool, TeardownError> {
        let mut socket = self.pod_socket(netns)?;
        let Some(link) = marked_in_pod(&mut socket, key)? else { return Ok(false) };
        // A network may be called "lent".
        let lent = link.alias.as_deref().filter(|alias| *alias != mark(key)).and_then(lent_name);
        if let Some(name) = lent {
            let change = LinkChange { alias: Some(""), ..Default::default() };
            let moved = netlink::move_link(&link.name, link.index, &self.host.0, Some(&name), &change);
            socket.request(&moved)?;
        } else {
            delete(&mut socket, &link)?;
        }
        Ok(true)
    }

    fn delete_marked(&self, key: &AttachmentKey) -> Result<bool, TeardownError> {
        let mut socket = self.host_socket()?;
        let (mut found, mut refused) = (false, None);
        for name in [key.id().host_ifname(), key.id().shaper_ifname()] {
            let deleted = match marked(&mut socket, key, &name) {
                Ok(Some(link)) => delete(&mut socket, &link).map(|()| true),
                Ok(None) => Ok(false),
                Err(error) => Err(error.into()),
            };
            match deleted {
                Ok(deleted) => found |= deleted,
                // One that stays keeps no other from going.
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        refused.map_or(Ok(found), Err)
    }

    /// Whether a device carries the attachment's mark.
    pub(super) fn has_marked(&self, key: &AttachmentKey, netns: Option<&NetNs>) -> Result<bool, TeardownError> {
        if let Some(netns) = netns
            && marked_in_pod(&mut self.pod_socket(netns)?, key)?.is_some()
        {
            return Ok(true);
        }
        let mut socket = self.host_socket()?;
        let end = marked(&mut socket, key, &key.id().host_ifname())?;
        Ok(end.is_some() || marked(&mut socket, key, &key.id().shaper_ifname())?.is_some())
    }

    /// Takes back every attach that was begun and not finished because its process was killed. Attachments that
    /// somebody works on now are left alone, and those that were made in another namespace than this engine's host.
    ///
    /// A single attach or detach repairs its own attachment by itself. Who releases addresses, too, uses
    /// [`Engine::hold_remains`] on each instead, or they are nobody's when its process is killed in between.
    ///
    /// # Errors
    /// Where records cannot be listed. What one of them refuses is among [`Recovered::errors`].
    pub fn recover(&self) -> Result<Recovered, JournalError> {
        let mut done = Recovered::default();
        for id in self.journal.ids()? {
            let (entry, record) = match self.journal.find(id) {
                Ok(Some(found)) => found,
                Ok(None) | Err(JournalError::Busy { .. }) => continue,
                Err(error) => {
                    done.errors.push(error.into());
                    continue;
                }
            };
            if let Some(record) = record {
                let elsewhere = record.host.is_some_and(|host| host != self.host.0.id());
                if (record.done.is_some() || elsewhere) && record.boot == self.journal.boot() {
                    continue;
                }
                let left = self.take_back_record(&record, None);
                if !left.is_empty() {
                    done.errors.extend(left);
                    continue;
                }
                done.keys.push(record.key);
            }
            if let Err(error) = entry.remove() {
                done.errors.push(error.into());
            }
        }
        Ok(done)
    }
}

impl Engine {
    /// Removes records that say nothing, of attaches whose processes were killed before they had written what they were about
    /// to do. Nobody can tell whose they were, and nothing was made for them. Those that somebody holds are left alone.
    ///
    /// # Errors
    /// Where records cannot be listed, read or removed.
    pub fn remove_empty_records(&self) -> Result<(), JournalError> {
        for id in self.journal.ids()? {
            // Most say something, and need no lock to be read.
            if !self.journal.is_empty(id)? {
                continue;
            }
            match self.journal.find(id) {
                Ok(Some((entry, None))) => entry.remove()?,
                Ok(_) | Err(JournalError::Busy { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What [`Engine::recover`] did.
#[derive(Debug, Default)]
#[must_use = "addresses of what was taken back are still leased, and errors tell what was not"]
pub struct Recovered {
    /// The attachments that were taken back. Their addresses stay leased.
    pub keys: Vec<AttachmentKey>,
    /// What went wrong with others, whose records stay.
    pub errors: Vec<TeardownError>,
}

/// The host's link of this name, if it carries the attachment's mark.
fn marked(socket: &mut Socket, key: &AttachmentKey, name: &IfName) -> Result<Option<LinkView>, NetlinkError> {
    let Some(link) = look_up(socket, name)? else { return Ok(None) };
    if link.alias.as_deref() == Some(&mark(key)) {
        return Ok(Some(link));
    }
    tracing::warn!(%key, link = link.name, "a link of this name does not carry our mark; left alone");
    Ok(None)
}

/// The pod's link of the attachment's name, if it carries the attachment's mark.
fn marked_in_pod(socket: &mut Socket, key: &AttachmentKey) -> Result<Option<LinkView>, NetlinkError> {
    let link = look_up(socket, &key.ifname)?;
    Ok(link.filter(|link| link.alias.as_deref().is_some_and(|alias| is_mark_of(key, alias))))
}
