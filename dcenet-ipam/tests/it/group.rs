//! Commits in groups: as if each were alone.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Waker};
use std::thread;

use async_trait::async_trait;
use dcenet_ipam::store::group::GroupStore;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Guard, Key, Outcome, Store, StoreError, Write, conformance};
use pollster::block_on;

fn put(key: &str, guard: Option<Option<u64>>, request_id: u128) -> Batch {
    let guards = guard.map(|version| Guard { key: key.into(), version }).into_iter().collect();
    Batch { guards, writes: vec![Write::Put(key.into(), b"v".to_vec())], request_id }
}

#[test]
fn groups_over_memory_and_the_log_conform() {
    conformance::all(|| Arc::new(GroupStore::new(Arc::new(MemoryStore::new()))));
    let dirs = tempfile::tempdir_in("/dev/shm").unwrap();
    let number = AtomicU64::new(0);
    conformance::all(|| {
        let dir = dirs.path().join(number.fetch_add(1, Ordering::Relaxed).to_string());
        Arc::new(GroupStore::new(Arc::new(LogStore::open(&dir).unwrap())))
    });
}

/// Batches at once are answered as batches one after the other: the default of the trait is the oracle.
#[test]
fn many_at_once_are_as_one_after_the_other() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let log = LogStore::open(&dir.path().join("log")).unwrap();
    let memory = MemoryStore::new();
    let mut state = 7_u64;
    let mut random = move |bound: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound
    };
    let (mut request, mut kinds) = (0, [0; 4]);
    for round in 0..200 {
        let batches: Vec<Batch> = (0..random(20))
            .map(|_| {
                request += 1;
                let key = |n: u64| format!("k{n}").into_bytes();
                let guards = (0..random(3))
                    .map(|_| Guard {
                        key: key(random(6)),
                        version: [None, Some(random(request as u64 + 1))][random(2) as usize],
                    })
                    .collect();
                let mut writes: Vec<Write> = (0..random(4))
                    .map(|_| {
                        if random(3) == 0 {
                            Write::Delete(key(random(6)))
                        } else {
                            Write::Put(key(random(6)), vec![round])
                        }
                    })
                    .collect();
                if random(20) == 0 {
                    writes.push(Write::Delete(vec![]));
                }
                // Some come twice.
                Batch { guards, writes, request_id: request - u128::from(random(10) == 0) }
            })
            .collect();
        let alone = block_on(memory.commit_many(&batches));
        let together = block_on(log.commit_many(&batches));
        assert_eq!(alone.len(), together.len());
        for (one, other) in alone.iter().zip(&together) {
            match (one, other) {
                (Ok(one), Ok(other)) => assert_eq!(one, other, "round {round}"),
                (Err(StoreError::Misuse(one)), Err(StoreError::Misuse(other))) => assert_eq!(one, other),
                other => panic!("{other:?}"),
            }
            kinds[match one {
                Ok(Outcome::Committed { .. }) => 0,
                Ok(Outcome::Conflict(_)) => 1,
                Ok(Outcome::Unknown { .. }) => 2,
                Err(_) => 3,
            }] += 1;
        }
        assert_eq!(block_on(log.scan(b"", None, 99)).unwrap(), block_on(memory.scan(b"", None, 99)).unwrap());
    }
    assert!(kinds[0] > 200 && kinds[1] > 200 && kinds[2] == 0 && kinds[3] > 20, "{kinds:?}");
    let reopened = LogStore::open(&dir.path().join("log")).unwrap();
    assert_eq!(block_on(reopened.scan(b"", None, 99)).unwrap(), block_on(memory.scan(b"", None, 99)).unwrap());
}

/// 64 callers that want the same 40 keys: each key has one winner, and flushes are far fewer than commits.
#[test]
fn callers_share_flushes_and_guards_hold() {
    const CALLERS: usize = 64;
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    // A flush takes its time, as it does on a disk.
    let slow = Arc::new(|call| {
        if call == dcenet_ipam::store::log::DiskCall::Sync {
            thread::sleep(std::time::Duration::from_millis(2));
        }
        Ok(())
    });
    let log = Arc::new(LogStore::open_with_faults(dir.path(), slow).unwrap());
    let group = GroupStore::new(log.clone());
    let (before, wins) = (log.disk_use().syncs, AtomicU64::new(0));
    let together = Barrier::new(CALLERS);
    thread::scope(|scope| {
        for caller in 0..CALLERS {
            let (group, wins, together) = (&group, &wins, &together);
            scope.spawn(move || {
                together.wait();
                for key in 0..40_u128 {
                    let batch = put(&format!("k{key}"), Some(None), key << 32 | caller as u128);
                    match block_on(group.commit(&batch)).unwrap() {
                        Outcome::Committed { .. } => drop(wins.fetch_add(1, Ordering::Relaxed)),
                        Outcome::Conflict(held) => assert!(held[0].is_some()),
                        Outcome::Unknown { reason } => panic!("{reason}"),
                    }
                    block_on(group.commit(&put(
                        &format!("own{caller}-{key}"),
                        Some(None),
                        1 << 100 | key << 32 | caller as u128,
                    )))
                    .unwrap();
                }
            });
        }
    });
    assert_eq!(wins.into_inner(), 40);
    let commits = CALLERS as u64 * 40 + 40;
    assert_eq!(block_on(log.scan(b"", None, 9999)).unwrap().len() as u64, commits);
    let flushes = log.disk_use().syncs - before;
    assert!(flushes < commits / 4, "{flushes} flushes for {commits} commits");
}

/// Answers a commit only when it is let, without blocking its thread.
#[derive(Debug, Default)]
struct GatedStore {
    inner: MemoryStore,
    open: AtomicBool,
}

#[async_trait]
impl Store for GatedStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        std::future::poll_fn(|context| {
            if self.open.load(Ordering::SeqCst) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
        self.inner.commit(batch).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

/// Callers that are dropped, in each role, leave nobody waiting.
#[test]
fn a_dropped_caller_leaves_nobody_waiting() {
    let poll = |future: std::pin::Pin<&mut dyn Future<Output = Result<Outcome, StoreError>>>| {
        future.poll(&mut Context::from_waker(Waker::noop()))
    };
    let inner = Arc::new(GatedStore::default());
    let group = GroupStore::new(inner.clone());
    let batches: Vec<Batch> = (0..5).map(|i| put(&format!("k{i}"), None, i)).collect();
    let mut leader = Box::pin(group.commit(&batches[0]));
    let mut second = Box::pin(group.commit(&batches[1]));
    let mut third = Box::pin(group.commit(&batches[2]));
    let mut fourth = pin!(group.commit(&batches[3]));
    assert!(poll(leader.as_mut()).is_pending());
    assert!(
        poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending() && poll(fourth.as_mut()).is_pending()
    );
    // The leader goes in the middle of its group: the second is to lead. It goes before it knows; the third is to lead,
    // does, and goes in the middle. The fourth was in the third's group, and is told that nobody knows.
    drop(leader);
    drop(second);
    assert!(poll(third.as_mut()).is_pending());
    drop(third);
    let Poll::Ready(Ok(Outcome::Unknown { .. })) = poll(fourth.as_mut()) else { panic!("the fourth was forgotten") };
    inner.open.store(true, Ordering::SeqCst);
    assert!(matches!(block_on(group.commit(&batches[4])), Ok(Outcome::Committed { revision: 1 })));
    assert_eq!(block_on(group.scan(b"", None, 9)).unwrap().len(), 1);
}
