//! Watching, and stores that do it wrong, which the suite must see.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dcenet_ipam::store::flaky::{Failure, FlakyStore};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Change, Entry, Key, Outcome, Store, StoreError, Watch, Write, conformance};
use pollster::block_on;

const SOON: Duration = Duration::from_secs(60);

fn put(store: &dyn Store, key: &str, request_id: u128) -> u64 {
    let batch = Batch { writes: vec![Write::Put(key.into(), b"v".to_vec())], request_id, ..Batch::default() };
    match block_on(store.commit(&batch)).unwrap() {
        Outcome::Committed { revision } => revision,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_watch_of_memory_that_is_too_slow_is_told_a_gap() {
    let store = MemoryStore::new();
    let mut watch = block_on(store.watch(b"k", 0)).unwrap();
    for request in 1..=3000 {
        put(&store, "k", request);
    }
    assert_eq!(block_on(watch.next(SOON)).unwrap(), Some(Change::Gap { revision: 3000 }));
    assert_eq!(block_on(watch.next(Duration::ZERO)).unwrap(), None);
    let revision = put(&store, "k", 3001);
    assert!(matches!(block_on(watch.next(SOON)).unwrap(), Some(Change::Writes { revision: r, .. }) if r == revision));
}

/// A watch whose n-th call fails loses nothing, or says what it lost.
#[test]
fn a_flaky_watch_fails_or_tells_a_gap() {
    for failure in [Failure::Before, Failure::Lost, Failure::After] {
        let (mut errors, mut gaps) = (0, 0);
        // The first call makes the watch.
        for fail_at in 1..=12 {
            let inner: Arc<dyn Store> = Arc::new(MemoryStore::new());
            let flaky = FlakyStore::new(inner.clone(), failure, fail_at);
            let mut watch = loop {
                match block_on(flaky.watch(b"k", 0)) {
                    Ok(watch) => break watch,
                    Err(_) => errors += 1,
                }
            };
            for request in 1..=10 {
                let revision = put(&*inner, "k", request);
                let change = loop {
                    match block_on(watch.next(SOON)) {
                        Ok(change) => break change.unwrap(),
                        Err(_) => errors += 1,
                    }
                };
                gaps += usize::from(matches!(change, Change::Gap { .. }));
                assert_eq!(change.revision(), revision);
            }
        }
        let expected = if failure == Failure::After { (1, 10) } else { (11, 0) };
        assert_eq!((errors, gaps), expected, "{failure:?}");
    }
}

/// How a watch does wrong.
#[derive(Debug, Clone, Copy)]
enum Wrong {
    AheadInSilence,
    Drops,
    EndsWithOneWrite,
    Halves,
    Lags,
    Mixes,
    Repeats,
    StartsLate,
    TellsAll,
}

#[derive(Debug)]
struct WrongStore {
    inner: MemoryStore,
    wrong: Wrong,
}

struct WrongWatch {
    inner: Box<dyn Watch>,
    wrong: Wrong,
    told: u64,
    held: Vec<Change>,
}

#[async_trait]
impl Watch for WrongWatch {
    async fn next(&mut self, limit: Duration) -> Result<Option<Change>, StoreError> {
        if let Some(change) = self.held.pop() {
            return Ok(Some(change));
        }
        let Some(mut change) = self.inner.next(limit).await? else { return Ok(None) };
        self.told += 1;
        let nth = self.told.is_multiple_of(3);
        match (self.wrong, &mut change) {
            (Wrong::Drops, Change::Writes { .. }) if nth => return self.next(limit).await,
            (Wrong::EndsWithOneWrite, Change::Writes { writes, .. }) => writes.truncate(1),
            (Wrong::Halves, Change::Writes { revision, writes }) if writes.len() > 1 => {
                let half = writes.split_off(1);
                self.held.push(Change::Writes { revision: *revision, writes: half });
            }
            (Wrong::Lags, Change::Writes { writes, .. }) => {
                writes.iter_mut().filter_map(|(_, entry)| entry.as_mut()).for_each(|entry| entry.version -= 1);
            }
            (Wrong::Mixes, Change::Writes { .. }) if nth => {
                // One that is there already goes first.
                if let Some(later) = self.inner.next(Duration::ZERO).await? {
                    self.held.push(change);
                    return Ok(Some(later));
                }
            }
            (Wrong::Repeats, _) if nth => self.held.push(change.clone()),
            _ => {}
        }
        Ok(Some(change))
    }
}

#[async_trait]
impl Store for WrongStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        self.inner.commit(batch).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        let Outcome::Committed { revision } = self.inner.commit(&Batch::default()).await? else { unreachable!() };
        let prefix = if matches!(self.wrong, Wrong::TellsAll) { b"" } else { prefix };
        let after = match self.wrong {
            Wrong::AheadInSilence => after.min(revision),
            Wrong::StartsLate => after.max(revision),
            _ => after,
        };
        let inner = self.inner.watch(prefix, after).await?;
        Ok(Box::new(WrongWatch { inner, wrong: self.wrong, told: 0, held: vec![] }))
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

#[test]
fn the_suite_sees_a_watch_that_does_wrong() {
    use Wrong::{AheadInSilence, Drops, EndsWithOneWrite, Halves, Lags, Mixes, Repeats, StartsLate, TellsAll};
    for wrong in [AheadInSilence, Drops, EndsWithOneWrite, Halves, Lags, Mixes, Repeats, StartsLate, TellsAll] {
        let run = || conformance::watches(|| Arc::new(WrongStore { inner: MemoryStore::new(), wrong }));
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err(), "{wrong:?} passed");
    }
}
