//! What an allocator that lives long knows of its pools without asking.
//!
//! An index holds an [`AddressPool`] for each pool that hands out single addresses. It answers the two questions for
//! which a lease must otherwise search the store: which address of a range was not used lately, and which was released
//! longest ago. Each answer is a [`Proposal`]: set apart for the one who asked until his commit is decided, so that the
//! callers of one process do not run into each other.
//!
//! It is fed by three: a scan when it is first asked, the commits of its own process, and a watch, which is looked at
//! when a commit was refused, when a pool seems to be full, and otherwise every [`LOOK`]. Nothing rests on it. What it
//! proposes is taken by a commit that is guarded by the slot's version, and no refusal is given on its word: a lease
//! that finds nothing is decided again from the store.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::config::Layout;
use crate::machine::Query;
use crate::model::{Addr, AddressSpace, Family, Intervals};
use crate::pool::{AddressPool, Ranges, Use};
use crate::record::{SlotRecord, freed_key, freed_prefix, slot_prefix};
use crate::store::{Batch, Change, Entry, Guard, Key, Store, StoreError, Watch, Write, number_of, numbered};

/// See the module.
pub(super) struct Index {
    store: Arc<dyn Store>,
    tracked: Vec<Tracked>,
    /// The watches with the time of the last look; taken while somebody looks.
    feed: Mutex<Option<Feed>>,
}

/// One for each address space and family that a pool is tracked in.
#[derive(Default)]
struct Feed {
    watches: Vec<(Key, Option<Box<dyn Watch>>)>,
    looked: Option<u64>,
}

/// Puts the feed back, also if who looks gives up in the middle.
struct Looking<'a> {
    index: &'a Index,
    feed: Feed,
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        *self.index.feed.lock() = Some(std::mem::take(&mut self.feed));
    }
}

struct Tracked {
    space: AddressSpace,
    family: Family,
    name: String,
    /// Of the slots of the space and family.
    slots: Key,
    /// Of the queue of what was released.
    queue: Key,
    ranges: Intervals,
    pool: Mutex<AddressPool>,
}

/// An address that is set apart for who asked, until this is dropped.
pub(super) struct Proposal<'a> {
    tracked: &'a Tracked,
    pub(super) address: u128,
    /// Sequence and time of the release, of one that was released.
    released: Option<(u64, u64)>,
    /// What it answers of the queue of releases.
    answers: Option<Query>,
}

impl Drop for Proposal<'_> {
    fn drop(&mut self) {
        let mut pool = self.tracked.pool.lock();
        // A commit, the watch, or a refusal may have told what became of it.
        if pool.owner(self.address) == Some(PROPOSED) {
            match self.released {
                None => pool.forget(self.address),
                Some((version, at)) => pool.note_released(self.address, version, at),
            }
        }
    }
}

impl Proposal<'_> {
    /// Of one that was released and that a batch does not take, what it answered: it stands at the head of its queue and
    /// may not be had, for it is reserved since, and what is behind it only the store tells.
    pub(super) fn passed_over(&self, guards: &[Guard]) -> Option<&Query> {
        let slot = numbered(&self.tracked.slots, self.address);
        self.answers.as_ref().filter(|_| guards.iter().all(|guard| guard.key != slot))
    }

    /// The key of one that was released in the queue of releases, the key of its slot and what that holds.
    pub(super) fn in_queue(&self) -> Option<(Key, Key, Entry)> {
        let Tracked { space, family, name, slots, .. } = self.tracked;
        let (version, at) = self.released?;
        let key = freed_key(space, Addr { family: *family, bits: self.address }, name, at);
        let record = SlotRecord::Freed { at, pool: name.clone() };
        let value = serde_json::to_vec(&record).expect("a time and a name serialise");
        Some((key, numbered(slots, self.address), Entry { value, version }))
    }
}

impl Tracked {
    /// Enters what a slot holds, unless it is older than what is known.
    fn enter(&self, address: u128, entry: Option<&Entry>, revision: u64) {
        let mut pool = self.pool.lock();
        let known = match pool.usage(address) {
            Some(Use::Bound { sequence, .. } | Use::Released { sequence, .. }) => sequence,
            None => 0,
        };
        if known >= revision {
            return;
        }
        match entry.map(|entry| self.freed(&entry.value)) {
            // One that is proposed is being written at this moment.
            None if pool.owner(address) == Some(PROPOSED) => {}
            None => pool.forget(address),
            Some(Some(at)) => pool.note_released(address, revision, at),
            Some(None) => pool.note_bound(address, HELD, revision, 0),
        }
    }

    /// When the address of a slot was released into this queue, by the value of its record. Only such are understood.
    fn freed(&self, value: &[u8]) -> Option<u64> {
        if !value.starts_with(br#"{"freed""#) {
            return None;
        }
        match serde_json::from_slice(value) {
            Ok(SlotRecord::Freed { at, pool }) if pool == self.name => Some(at),
            _ => None,
        }
    }
}

impl Index {
    pub(super) fn new(layout: &Layout, store: Arc<dyn Store>) -> Self {
        let tracked = layout.pools.iter().filter(|pool| pool.delegate.is_none()).map(|pool| Tracked {
            space: pool.space.clone(),
            family: pool.family(),
            name: pool.name.clone(),
            slots: slot_prefix(&pool.space, pool.family()),
            queue: freed_prefix(&pool.space, pool.family(), &pool.name),
            ranges: pool.free.clone(),
            pool: Mutex::new(AddressPool::new(Ranges::from(pool.free.clone()), layout.cooldown)),
        });
        let tracked: Vec<Tracked> = tracked.collect();
        let mut prefixes: Vec<Key> = tracked.iter().map(|t| t.slots.clone()).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        let watches = prefixes.into_iter().map(|prefix| (prefix, None)).collect();
        Self { store, tracked, feed: Mutex::new(Some(Feed { watches, looked: None })) }
    }

    /// Learns what others did, if that was not done lately or `at_once` is said. Who comes while another looks goes on
    /// with what is known. A store that cannot be read or watched leaves the index as it is: it costs refused commits.
    pub(super) async fn look(&self, now: u64, at_once: bool) -> Result<(), StoreError> {
        let feed = self.feed.lock().take_if(|feed| at_once || feed.looked.is_none_or(|at| due(at, now)));
        let Some(mut feed) = feed else { return Ok(()) };
        feed.looked = Some(now);
        self.follow(&mut Looking { index: self, feed }.feed).await
    }

    async fn follow(&self, feed: &mut Feed) -> Result<(), StoreError> {
        for (prefix, watch) in &mut feed.watches {
            let mut following = match watch.take() {
                Some(watch) => watch,
                None => {
                    let barrier = Batch { request_id: super::random_id(), ..Batch::default() };
                    let revision = match self.store.commit(&barrier).await? {
                        crate::store::Outcome::Committed { revision } => revision,
                        _ => return Ok(()),
                    };
                    self.forget(prefix);
                    self.scan(prefix).await?;
                    self.store.watch(prefix, revision).await?
                }
            };
            while let Some(change) = following.next(Duration::ZERO).await? {
                match change {
                    Change::Writes { revision, writes } => {
                        for (key, entry) in writes {
                            self.learn(&key, entry.as_ref(), revision);
                        }
                    }
                    Change::Gap { .. } => {
                        self.forget(prefix);
                        self.scan(prefix).await?;
                    }
                }
            }
            *watch = Some(following);
        }
        Ok(())
    }

    async fn scan(&self, prefix: &[u8]) -> Result<(), StoreError> {
        let mut all: Vec<(Key, Entry)> = Vec::new();
        loop {
            let page = self.store.scan(prefix, all.last().map(|(key, _)| key.as_slice()), PAGE).await?;
            let more = page.len() == PAGE;
            all.extend(page);
            if !more {
                break;
            }
        }
        // As it happened, so that releases queue at the end.
        all.sort_unstable_by_key(|(_, entry)| entry.version);
        for (key, entry) in &all {
            self.learn(key, Some(entry), entry.version);
        }
        Ok(())
    }

    /// Empties the pools of a prefix, for what happened to them cannot be had.
    fn forget(&self, prefix: &[u8]) {
        for tracked in self.tracked.iter().filter(|t| t.slots == prefix) {
            tracked.pool.lock().clear();
        }
    }

    fn of(&self, key: &[u8]) -> Option<(&Tracked, u128)> {
        self.tracked.iter().find_map(|tracked| {
            let address = number_of(&tracked.slots, key).ok()?;
            tracked.ranges.contains(address).then_some((tracked, address))
        })
    }

    fn learn(&self, key: &[u8], entry: Option<&Entry>, revision: u64) {
        if let Some((tracked, address)) = self.of(key) {
            tracked.enter(address, entry, revision);
        }
    }

    /// Learns a commit of this process.
    pub(super) fn committed(&self, writes: &[Write], revision: u64) {
        for write in writes {
            match write {
                Write::Delete(key) => self.learn(key, None, revision),
                Write::Put(key, value) if key.starts_with(b"s/") => {
                    self.learn(key, Some(&Entry { value: value.clone(), version: revision }), revision);
                }
                Write::Put(..) => {}
            }
        }
    }

    /// Learns what guards of a refused commit found. Returns whether one found a slot otherwise than was known.
    pub(super) fn refused(&self, guards: &[Guard], current: &[Option<Entry>]) -> bool {
        let mut surprised = false;
        for (guard, entry) in guards.iter().zip(current) {
            let version = entry.as_ref().map(|e| e.version);
            if version == guard.version {
                continue;
            }
            if let Some((tracked, address)) = self.of(&guard.key) {
                surprised = true;
                match entry {
                    Some(entry) => tracked.enter(address, Some(entry), entry.version),
                    // Also what was proposed, or it would be restored.
                    None => tracked.pool.lock().forget(address),
                }
            }
        }
        surprised
    }

    /// An answer to [`Query::Gap`] for slots: `None` if the index does not know them.
    pub(super) fn unused(&self, prefix: &[u8], low: u128, high: u128, now: u64) -> Option<Option<Proposal<'_>>> {
        let tracked = self.tracked.iter().find(|t| t.slots == prefix && t.ranges.contains(low))?;
        let mut pool = tracked.pool.lock();
        let proposed = pool.unused_within(low, high);
        if let Some(address) = proposed {
            pool.note_bound(address, PROPOSED, 0, now);
        }
        Some(proposed.map(|address| Proposal { tracked, address, released: None, answers: None }))
    }

    /// An answer to [`Query::Scan`] for a queue of releases: the address that was released longest ago and does not cool,
    /// if the index knows one.
    pub(super) fn released(&self, query: &Query, now: u64) -> Option<Proposal<'_>> {
        let Query::Scan(queue, None, _) = query else { return None };
        let tracked = self.tracked.iter().find(|t| t.queue == *queue)?;
        let mut pool = tracked.pool.lock();
        let (address, version, at) = pool.next_released(now)?;
        // With the version, so that a watch that tells the release again is old.
        pool.note_bound(address, PROPOSED, version, now);
        Some(Proposal { tracked, address, released: Some((version, at)), answers: Some(query.clone()) })
    }
}

fn due(at: u64, now: u64) -> bool {
    now.abs_diff(at) >= LOOK
}

/// Milliseconds between two looks at what others did.
const LOOK: u64 = 500;
/// Slots that are read at a time.
const PAGE: usize = 4096;
/// Stands for whoever has an address: the store knows him.
const HELD: &str = "held";
/// Stands for a caller of this process who tries to take an address.
const PROPOSED: &str = "";
