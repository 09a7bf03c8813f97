//! The suite's scenario of failing calls finds a store that keeps half a batch.

use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError, conformance};

/// Applies only the first half of the writes of one of its batches, and says that it does not know.
#[derive(Debug)]
struct TornStore {
    inner: MemoryStore,
    /// Which batch of several writes, counted from 1.
    tears: usize,
    batches: AtomicUsize,
}

impl TornStore {
    fn new(tears: usize) -> Self {
        Self { inner: MemoryStore::new(), tears, batches: AtomicUsize::new(0) }
    }
}

#[async_trait]
impl Store for TornStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        if batch.writes.len() < 2 || self.batches.fetch_add(1, Ordering::Relaxed) + 1 != self.tears {
            return self.inner.commit(batch).await;
        }
        let writes = batch.writes[..batch.writes.len() / 2].to_vec();
        Ok(match self.inner.commit(&Batch { writes, ..batch.clone() }).await? {
            Outcome::Committed { .. } => Outcome::Unknown { reason: "torn".to_owned() },
            other => other,
        })
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.inner.first_gap(prefix, range).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

/// Whichever batch of the scenario is torn.
#[test]
fn a_store_that_tears_a_batch_does_not_pass() {
    let passes = |tears: usize| {
        let run = || conformance::failures_leave_all_or_nothing(|| Arc::new(TornStore::new(tears)));
        catch_unwind(AssertUnwindSafe(run)).is_ok()
    };
    let (torn, whole): (Vec<usize>, Vec<usize>) = (1..=6).chain([10_000]).partition(|tears| !passes(*tears));
    println!("found with these batches torn: {torn:?}, not with {whole:?}");
    assert!(passes(10_000) && torn.len() > 3, "found with these batches torn: {torn:?}, not with {whole:?}");
}
