//! Wrappers that make a store worse, to see whether what stands on it holds.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::{Condvar, Mutex};

use super::{Batch, Caps, Change, Entry, Guard, Key, Outcome, Store, StoreError, Watch};

/// When a failing call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// After it took effect: a commit is applied and answers `Unknown`. A watch loses what it was about to tell, and
    /// tells a gap. Reads fail as with `Before`.
    After,
    /// Before it had any effect: `Unavailable`.
    Before,
    /// Before it had any effect, without saying so: a commit is not applied and answers `Unknown`. Reads fail as with
    /// `Before`.
    Lost,
}

/// Which calls fail. One may be shared by a store and by whatever else is to fail in its turn.
pub trait Faults: std::fmt::Debug + Send + Sync {
    /// Counts a call, and tells how it fails, if it does.
    fn next(&self) -> Option<Failure>;

    /// Calls so far.
    fn calls(&self) -> u64;
}

/// A store that fails at some calls. Calls of its watches count as the store's.
#[derive(Debug)]
pub struct FlakyStore {
    inner: Arc<dyn Store>,
    plan: Arc<dyn Faults>,
}

/// The n-th call fails, and only that.
#[derive(Debug)]
struct Nth {
    failure: Failure,
    fail_at: u64,
    calls: AtomicU64,
}

impl Faults for Nth {
    fn next(&self) -> Option<Failure> {
        (self.calls.fetch_add(1, Ordering::Relaxed) + 1 == self.fail_at).then_some(self.failure)
    }

    fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
}

struct FlakyWatch {
    inner: Box<dyn Watch>,
    plan: Arc<dyn Faults>,
}

#[async_trait]
impl Watch for FlakyWatch {
    async fn next(&mut self, limit: Duration) -> Result<Option<Change>, StoreError> {
        match self.plan.next() {
            None => self.inner.next(limit).await,
            Some(Failure::After) => {
                let lost = self.inner.next(limit).await?;
                Ok(lost.map(|change| Change::Gap { revision: change.revision() }))
            }
            Some(Failure::Before | Failure::Lost) => Err(made_to_fail()),
        }
    }
}

fn made_to_fail() -> StoreError {
    StoreError::Unavailable("made to fail".to_owned())
}

impl FlakyStore {
    /// Fails the call with the number `fail_at`, counted from 1; 0 for none.
    pub fn new(inner: Arc<dyn Store>, failure: Failure, fail_at: u64) -> Self {
        Self::with_faults(inner, Arc::new(Nth { failure, fail_at, calls: AtomicU64::new(0) }))
    }

    /// Fails the calls that the plan says.
    pub fn with_faults(inner: Arc<dyn Store>, plan: Arc<dyn Faults>) -> Self {
        Self { inner, plan }
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.plan.calls()
    }

    fn answer(&self) -> Result<(), StoreError> {
        self.plan.next().map_or(Ok(()), |_| Err(made_to_fail()))
    }
}

#[async_trait]
impl Store for FlakyStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.answer()?;
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.answer()?;
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let unknown = Ok(Outcome::Unknown { reason: "made to fail".to_owned() });
        match self.plan.next() {
            None => self.inner.commit(batch).await,
            Some(Failure::Before) => Err(made_to_fail()),
            Some(Failure::Lost) => unknown,
            Some(Failure::After) => match self.inner.commit(batch).await? {
                Outcome::Committed { .. } => unknown,
                other => Ok(other),
            },
        }
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.answer()?;
        self.inner.first_gap(prefix, range).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        self.answer()?;
        Ok(Box::new(FlakyWatch { inner: self.inner.watch(prefix, after).await?, plan: self.plan.clone() }))
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

/// A store that ignores some guards: what must never happen does happen on it, which proves that a test would see it.
#[derive(Debug)]
pub struct UnguardedStore {
    inner: Arc<dyn Store>,
    ignored: fn(&Guard) -> bool,
}

impl UnguardedStore {
    /// Ignores the guards for which `ignored` is true.
    pub fn new(inner: Arc<dyn Store>, ignored: fn(&Guard) -> bool) -> Self {
        Self { inner, ignored }
    }
}

#[async_trait]
impl Store for UnguardedStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let mut batch = batch.clone();
        batch.guards.retain(|guard| !(self.ignored)(guard));
        match self.inner.commit(&batch).await? {
            Outcome::Conflict(_) => {
                Err(StoreError::Misuse("this wrapper cannot place the values of a conflict".into()))
            }
            outcome => Ok(outcome),
        }
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.inner.first_gap(prefix, range).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(prefix, after).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

/// Holds the first two commits that write a key with a prefix until both have come: both were decided from the same
/// state. Each must come from a thread of its own.
#[derive(Debug)]
pub struct MeetingStore {
    inner: Arc<dyn Store>,
    prefix: &'static [u8],
    come: Mutex<usize>,
    both: Condvar,
}

impl MeetingStore {
    /// How long the first waits for the second; then it goes on alone, so that a test fails rather than hangs.
    pub const PATIENCE: Duration = Duration::from_secs(60);

    /// A meeting before commits that write a key with the prefix.
    pub fn over(inner: Arc<dyn Store>, prefix: &'static [u8]) -> Arc<Self> {
        Arc::new(Self { inner, prefix, come: Mutex::new(0), both: Condvar::new() })
    }

    /// Whether two have met.
    pub fn met(&self) -> bool {
        *self.come.lock() >= 2
    }
}

#[async_trait]
impl Store for MeetingStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        if batch.writes.iter().any(|write| write.key().starts_with(self.prefix)) {
            let mut come = self.come.lock();
            if *come < 2 {
                *come += 1;
                self.both.notify_all();
                self.both.wait_while_for(&mut come, |come| *come < 2, Self::PATIENCE);
            }
        }
        self.inner.commit(batch).await
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.inner.first_gap(prefix, range).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(prefix, after).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}
