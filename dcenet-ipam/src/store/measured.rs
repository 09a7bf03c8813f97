//! A store whose calls are counted and timed.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::{Batch, Caps, Change, Entry, Key, Outcome, Store, StoreError, Watch};
use crate::metrics::Metrics;

/// Counts what passes through it; see [`metrics`](crate::metrics). It belongs right below the allocator: what is below it,
/// such as a [`GroupStore`](super::group::GroupStore), may make other batches of those that it sees.
#[derive(Debug)]
pub struct MeasuredStore {
    inner: Arc<dyn Store>,
    metrics: Metrics,
}

impl MeasuredStore {
    /// Counts into `metrics`.
    pub fn new(inner: Arc<dyn Store>, metrics: &Metrics) -> Self {
        Self { inner, metrics: metrics.clone() }
    }
}

/// Its waiting is not timed, for nothing may be there to be told.
struct MeasuredWatch {
    inner: Box<dyn Watch>,
    metrics: Metrics,
}

#[async_trait]
impl Watch for MeasuredWatch {
    async fn next(&mut self, limit: Duration) -> Result<Option<Change>, StoreError> {
        let result = self.inner.next(limit).await;
        result.inspect_err(|error| self.metrics.count_store_error("watch", error))
    }
}

#[async_trait]
impl Store for MeasuredStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let begun = Instant::now();
        let result = self.inner.read(keys).await;
        self.metrics.count_store("read", begun, &result);
        result
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        let begun = Instant::now();
        let result = self.inner.scan(prefix, after, limit).await;
        self.metrics.count_store("scan", begun, &result);
        result
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let begun = Instant::now();
        let result = self.inner.commit(batch).await;
        self.metrics.count_store("commit", begun, &result);
        self.metrics.count_commit(&batch.writes, &result);
        result
    }

    async fn commit_many(&self, batches: &[Batch]) -> Vec<Result<Outcome, StoreError>> {
        let begun = Instant::now();
        let results = self.inner.commit_many(batches).await;
        self.metrics.count_store("commit_many", begun, &Ok(()));
        for (batch, result) in batches.iter().zip(&results) {
            self.metrics.count_commit(&batch.writes, result);
            if let Err(error) = result {
                self.metrics.count_store_error("commit_many", error);
            }
        }
        results
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        let begun = Instant::now();
        let result = self.inner.first_gap(prefix, range).await;
        self.metrics.count_store("first_gap", begun, &result);
        result
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        let begun = Instant::now();
        let result = self.inner.watch(prefix, after).await;
        self.metrics.count_store("watch", begun, &result);
        Ok(Box::new(MeasuredWatch { inner: result?, metrics: self.metrics.clone() }))
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}
