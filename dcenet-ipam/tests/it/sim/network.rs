//! The way to the store, with everything that can happen on it.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Guard, Key, Outcome, Store, StoreError, Watch, Write};
use parking_lot::Mutex;
use pollster::block_on;

use super::planted;
use super::scheduler::Clock;
use super::world::Tally;

/// A bug to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plant {
    HalfBatches,
    HotObject,
    IncompleteRebuild,
    LockInsteadOfGuards,
    Low64Bits,
    NoCooldown,
    NoSlotGuards,
    ReleaseByName,
    StaleEvidence,
}

/// The store that all nodes share, and what has happened on the way to it.
pub(super) struct Server {
    pub(super) clock: Clock,
    pub(super) plant: Option<Plant>,
    /// Off while the world comes to rest.
    pub(super) faulty: Mutex<bool>,
    pub(super) tally: Mutex<Tally>,
    pub(super) lock: Mutex<planted::Lock>,
    store: Mutex<Arc<dyn Store>>,
    /// Grows with each restart.
    life: Mutex<u64>,
    directory: Option<PathBuf>,
    doubles: Mutex<Vec<(u64, Batch)>>,
}

impl Server {
    pub(super) fn new(clock: Clock, plant: Option<Plant>, directory: Option<PathBuf>) -> Self {
        let store: Arc<dyn Store> = match &directory {
            Some(directory) => Arc::new(LogStore::open(directory).unwrap()),
            None => Arc::new(MemoryStore::new()),
        };
        Self {
            clock,
            plant,
            faulty: Mutex::new(true),
            tally: Mutex::default(),
            lock: Mutex::default(),
            store: Mutex::new(store),
            life: Mutex::new(0),
            directory,
            doubles: Mutex::default(),
        }
    }

    pub(super) fn store(&self) -> Arc<dyn Store> {
        self.store.lock().clone()
    }

    /// Everything in it, read directly.
    pub(super) fn content(&self) -> Vec<(Key, Entry)> {
        block_on(self.store().scan(b"", None, usize::MAX)).unwrap()
    }

    /// All calls that are under way lose their answers.
    pub(super) fn restart(&self) {
        *self.life.lock() += 1;
        self.tally.lock().restarts += 1;
        if let Some(directory) = &self.directory {
            *self.store.lock() = Arc::new(LogStore::open(directory).unwrap());
        }
        if self.plant == Some(Plant::IncompleteRebuild) {
            planted::forget_some(&*self.store(), &self.clock);
        }
    }

    /// Lets requests arrive a second time whose time has come.
    pub(super) fn deliver_doubles(&self) {
        let now = self.clock.now();
        let due: Vec<Batch> = {
            let mut doubles = self.doubles.lock();
            let (due, later) = doubles.drain(..).partition(|(at, _)| *at <= now);
            *doubles = later;
            Vec::into_iter(due).map(|(_, batch)| batch).collect()
        };
        for batch in due {
            self.tally.lock().doubled += 1;
            block_on(self.store().commit(&batch)).unwrap();
        }
    }

    fn dice(&self, count: u64) -> bool {
        *self.faulty.lock() && self.clock.dice(count)
    }

    /// The way there or back: mostly short, sometimes an hour.
    async fn way(&self) {
        let long = self.dice(30);
        if long {
            self.tally.lock().pauses += 1;
        }
        let milliseconds = if long { 3_000 + self.clock.below(3_600_000) } else { 1 + self.clock.below(20) };
        self.clock.sleep(milliseconds).await;
    }

    async fn ask<T>(&self, question: impl FnOnce(&dyn Store) -> Result<T, StoreError> + Send) -> Result<T, StoreError> {
        let life = *self.life.lock();
        self.way().await;
        if self.dice(20) || life != *self.life.lock() {
            return Err(StoreError::Unavailable("the way there is cut".to_owned()));
        }
        // A store in this process: it answers at once.
        let answer = question(&*self.store());
        self.way().await;
        answer
    }

    async fn commit(&self, batch: &Batch, hot: &Mutex<Option<u64>>) -> Result<Outcome, StoreError> {
        let unknown = |reason: &str| {
            self.tally.lock().unknown += 1;
            Ok(Outcome::Unknown { reason: reason.to_owned() })
        };
        let life = *self.life.lock();
        self.way().await;
        if self.dice(20) {
            return Err(StoreError::Unavailable("the way there is cut".to_owned()));
        }
        if self.dice(40) || life != *self.life.lock() {
            return unknown("lost on the way there");
        }
        self.tally.lock().commits += 1;
        let outcome = match self.plant {
            Some(Plant::HalfBatches) => planted::commit_in_halves(self, batch).await?,
            Some(Plant::HotObject) => planted::commit_with_hot_object(&*self.store(), batch, hot).await?,
            _ => self.store().commit(batch).await?,
        };
        if matches!(outcome, Outcome::Conflict(_)) {
            self.tally.lock().conflicts += 1;
        }
        if self.dice(100) {
            // Before the store forgets the request, as its contract asks of whoever sends again.
            self.doubles.lock().push((self.clock.now() + 1 + self.clock.below(50), batch.clone()));
        }
        self.way().await;
        if self.dice(40) || life != *self.life.lock() {
            return unknown("lost on the way back");
        }
        Ok(outcome)
    }
}

/// One node's view of the store.
#[derive(Clone)]
pub(super) struct SimStore {
    pub(super) server: Arc<Server>,
    pub(super) node: usize,
    /// The version of the one object of [`Plant::HotObject`] that was seen last.
    pub(super) hot: Arc<Mutex<Option<u64>>>,
}

impl std::fmt::Debug for SimStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimStore").field("node", &self.node).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for SimStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        if self.server.plant == Some(Plant::LockInsteadOfGuards) {
            planted::lock(&self.server, self.node)?;
        }
        if self.server.plant == Some(Plant::HotObject) {
            planted::see_hot_object(&*self.server.store(), &self.hot).await?;
        }
        self.server.ask(|store| block_on(store.read(keys))).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.server.ask(|store| block_on(store.scan(prefix, after, limit))).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let is_slot = |guard: &Guard| guard.key.starts_with(b"s/");
        let ignored: fn(&Guard) -> bool = match self.server.plant {
            Some(Plant::NoSlotGuards) => is_slot,
            Some(Plant::LockInsteadOfGuards) => |_| true,
            _ => return self.server.commit(batch, &self.hot).await,
        };
        let guards = batch.guards.iter().filter(|g| !ignored(g)).cloned().collect();
        match self.server.commit(&Batch { guards, ..batch.clone() }, &self.hot).await? {
            // The values of the ignored guards are not there; it can go on as if the answer were lost.
            Outcome::Conflict(_) => Ok(Outcome::Unknown { reason: "refused".to_owned() }),
            outcome => Ok(outcome),
        }
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        let gap = self.server.ask(|store| block_on(store.first_gap(prefix, range))).await?;
        Ok(match self.server.plant {
            Some(Plant::Low64Bits) => gap.map(|number| number & u128::from(u64::MAX)),
            _ => gap,
        })
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        self.server.store().watch(prefix, after).await
    }

    fn caps(&self) -> Caps {
        self.server.store().caps()
    }
}

/// Not to be used by tasks: for the judge and for planted bugs, at one moment.
pub(super) fn put(store: &dyn Store, writes: Vec<Write>, request_id: u128) {
    let outcome = block_on(store.commit(&Batch { guards: Vec::new(), writes, request_id })).unwrap();
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
}

pub(super) const COOLDOWN: Duration = Duration::from_secs(30);

/// How long a claim of [`super::history::KEPT_FOR_A_TIME`] keeps its address.
pub(super) const KEPT: Duration = Duration::from_secs(120);
