//! Deleting links of the host together.
//!
//! The kernel waits for grace periods of RCU when it deletes a link, under the lock that all changes of links take: 64 pairs
//! one after the other take more than a second. Of a group of links it deletes all and waits once (`rtnl_group_dellink` in
//! `net/core/rtnetlink.c`, `unregister_netdevice_many` in `net/core/dev.c`).

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::apply::delete;
use super::error::TeardownError;
use crate::model::IfIndex;
use crate::netlink::{LinkView, Message, NetlinkError, Socket, delete_group, set_group};
use crate::netns::NetNsId;

/// Has the links that several threads want deleted at a time deleted together. Engines share it; those of several host
/// namespaces may, and take turns.
///
/// Nobody waits to be joined longer than for the kernel's lock: who gets that first takes all who have come by then, and
/// those that come meanwhile are the next group. Every call returns when its own link is gone.
#[derive(Debug, Default)]
pub struct Removals {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Whether somebody deletes now.
    busy: bool,
    next: u64,
    waiting: Vec<Wanted>,
    /// What came of those that another deleted: whether they are gone.
    outcomes: HashMap<u64, bool>,
    together: u64,
}

#[derive(Debug)]
struct Wanted {
    ticket: u64,
    /// Whose link has the index.
    host: NetNsId,
    name: String,
    index: IfIndex,
}

impl Removals {
    /// How many links went with others so far.
    pub fn together(&self) -> u64 {
        self.lock().together
    }

    /// Deletes a link of the host namespace whose socket this is.
    pub(super) fn delete(&self, socket: &mut Socket, host: NetNsId, link: &LinkView) -> Result<(), TeardownError> {
        let mut state = self.lock();
        let ticket = state.next;
        state.next += 1;
        state.waiting.push(Wanted { ticket, host, name: link.name.clone(), index: link.index });
        loop {
            match state.outcomes.remove(&ticket) {
                Some(true) => return Ok(()),
                // Alone it gets an error of its own, if any.
                Some(false) => {
                    drop(state);
                    return delete(socket, link);
                }
                None if state.busy => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                None => break,
            }
        }
        state.busy = true;
        drop(state);
        let mut lead = Lead { removals: self, led: Vec::new(), ticket, gone: false };
        // Drawn for this once, of 2^31, so that no link of anybody else's has it.
        let group = RandomState::new().build_hasher().finish() as u32 | 1 << 31;
        // This waits for the lock behind those who have it or were there before, as who looks a link up to have it deleted,
        // too: they join.
        let tagged = socket.request(&set_group(&link.name, link.index, group)).map(drop);
        // In another namespace the index is somebody else's.
        lead.led = self.lock().waiting.extract_if(.., |wanted| wanted.host == host).collect();
        let others: Vec<&Wanted> = lead.led.iter().filter(|wanted| wanted.ticket != ticket).collect();
        if !others.is_empty() {
            lead.gone = delete_together(socket, tagged, &others, group);
        }
        if lead.gone { Ok(()) } else { delete(socket, link) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The turn of who deletes. It ends, and those that were led are told, however the thread leaves.
struct Lead<'a> {
    removals: &'a Removals,
    led: Vec<Wanted>,
    ticket: u64,
    gone: bool,
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        let mut state = self.removals.lock();
        state.busy = false;
        state.together += if self.gone { self.led.len() as u64 } else { 0 };
        let others = self.led.iter().filter(|wanted| wanted.ticket != self.ticket);
        state.outcomes.extend(others.map(|wanted| (wanted.ticket, self.gone)));
        drop(state);
        self.removals.changed.notify_all();
    }
}

/// Whether the error means anything but that a link is gone, as with its pod's namespace.
fn is_there(error: &NetlinkError) -> bool {
    error.errno() != Some(libc::ENODEV)
}

/// Deletes links, and one that is in the group if it could be put there. Whether all of them are gone.
fn delete_together(socket: &mut Socket, own: Result<(), NetlinkError>, others: &[&Wanted], group: u32) -> bool {
    let tags: Vec<Message> = others.iter().map(|link| set_group(&link.name, link.index, group)).collect();
    let tagged = socket.batch(&tags).into_iter().map(|outcome| outcome.map(drop));
    let mut failed = std::iter::once(own).chain(tagged).filter_map(Result::err).find(is_there);
    if failed.is_none() {
        failed = socket.request(&delete_group(group)).err().filter(is_there);
    }
    if let Some(error) = &failed {
        tracing::debug!(%error, "links are deleted one by one");
    }
    failed.is_none()
}
