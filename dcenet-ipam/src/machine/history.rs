//! Events of addresses, written with what they are of.

use dcenet_core::model::{AttachmentKey, Workload};

use super::{Draft, Halt, Work};
use crate::model::{Addr, AddressSpace};
use crate::record::{EventKind, EventRecord, event_key, event_of, history_prefix};
use crate::store::{Key, Write, numbered};

/// Of how many releases one looks for old events of its address.
const PRUNE_ONE_IN: u32 = 4;
/// Events forgotten in one batch, of all its addresses: more than come between two looks, and few enough for any store.
const PRUNE_AT_ONCE: usize = 16;

impl Work<'_> {
    /// Drafts an event. It costs one more write of the batch, and nothing where no history is wanted. Who released is
    /// told by the event before, and named only where two had the address.
    pub(super) fn note(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        address: Addr,
        what: EventKind,
        by: Option<&AttachmentKey>,
        workload: Option<&Workload>,
    ) {
        if self.layout.history.is_none() {
            return;
        }
        let record = EventRecord { what, by: by.cloned(), workload: workload.cloned() };
        let tag = tag(draft, what);
        draft.put(event_key(space, address, self.now, tag), &record);
    }

    /// Drafts the removal of events of an address that are too old or too many, once in a while.
    pub(super) fn forget_old_events(&self, draft: &mut Draft, space: &AddressSpace, address: Addr) -> Result<(), Halt> {
        let Some(history) = self.layout.history else { return Ok(()) };
        if !tag(draft, EventKind::Released).is_multiple_of(PRUNE_ONE_IN) {
            return Ok(());
        }
        let prefix = history_prefix(space, address.family);
        let forgotten = |write: &&Write| matches!(write, Write::Delete(key) if key.starts_with(b"h/"));
        let room = PRUNE_AT_ONCE.saturating_sub(draft.batch.writes.iter().filter(forgotten).count());
        let events = self.scan(&numbered(&prefix, address.bits), None, history.count + PRUNE_AT_ONCE)?;
        let limit = u64::try_from(history.keep.as_millis()).unwrap_or(u64::MAX);
        for key in old_events(&prefix, events, self.now, limit, history.count).into_iter().take(room) {
            draft.delete(key);
        }
        Ok(())
    }
}

/// Keeps apart the events of one address in one millisecond: each comes with a write of the slot, which is guarded by
/// another version.
fn tag(draft: &Draft, what: EventKind) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[what as u8]);
    for guard in &draft.batch.guards {
        hasher.update(&guard.version.unwrap_or_default().to_be_bytes());
        hasher.update(&guard.key);
    }
    hasher.finalize()
}

/// Of the events of one address, in order, those that are too old or too many.
pub(crate) fn old_events(prefix: &[u8], events: &[Key], now: u64, keep: u64, count: usize) -> Vec<Key> {
    let many = events.len().saturating_sub(count);
    let old = |key: &Key| event_of(prefix, key).is_some_and(|(_, at)| at.saturating_add(keep) < now);
    events.iter().enumerate().filter(|(i, key)| *i < many || old(key)).map(|(_, key)| key.clone()).collect()
}
