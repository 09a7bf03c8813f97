//! Rivals at one store, each with a twin that lacks the guard and must show the fault.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use async_trait::async_trait;
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::store::flaky::{MeetingStore, UnguardedStore};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError};
use pollster::block_on;

use crate::{each_store, ipam, lease, release, request, texts};

/// Holds the first commit that writes a key with the prefix until it is let go: what it was decided from may have changed.
#[derive(Debug)]
pub(crate) struct LateStore {
    inner: Arc<dyn Store>,
    prefix: &'static [u8],
    held: AtomicUsize,
    decided: Barrier,
    released: Barrier,
}

impl LateStore {
    pub(crate) fn over(inner: Arc<dyn Store>, prefix: &'static [u8]) -> Arc<Self> {
        let (held, decided, released) = (AtomicUsize::new(0), Barrier::new(2), Barrier::new(2));
        Arc::new(Self { inner, prefix, held, decided, released })
    }

    pub(crate) fn store(self: &Arc<Self>) -> Arc<dyn Store> {
        self.clone()
    }

    pub(crate) fn wait_for_commit(&self) {
        self.decided.wait();
    }

    pub(crate) fn let_go(&self) {
        self.released.wait();
    }
}

#[async_trait]
impl Store for LateStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let late = batch.writes.iter().any(|w| w.key().starts_with(self.prefix));
        if late && self.held.fetch_add(1, Ordering::SeqCst) == 0 {
            self.decided.wait();
            self.released.wait();
        }
        self.inner.commit(batch).await
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.inner.first_gap(prefix, range).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

const POOL: &str = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#;

/// Two leases that were decided from the same state.
fn two_leases(store: &Arc<dyn Store>) -> Vec<Vec<String>> {
    // Registered before, lest that be what they race for.
    block_on(ipam(POOL, store).ready()).unwrap();
    let meeting: Arc<dyn Store> = MeetingStore::over(store.clone(), b"t/");
    thread::scope(|scope| {
        let racers = ["c1", "c2"].map(|c| {
            let meeting = &meeting;
            scope.spawn(move || lease(&ipam(POOL, meeting), c, None).unwrap())
        });
        racers.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

#[test]
fn two_leases_from_one_state_get_two_addresses() {
    each_store(|store, _| {
        let leases = two_leases(&store);
        assert_ne!(leases[0], leases[1]);
    });
}

#[test]
fn without_the_slots_guard_they_get_one_address() {
    let unguarded: Arc<dyn Store> =
        Arc::new(UnguardedStore::new(Arc::new(MemoryStore::new()), |guard| guard.key.starts_with(b"s/")));
    let leases = two_leases(&unguarded);
    assert_eq!(leases[0], leases[1]);
}

/// Two configurations that overlap under different names and were both checked against the same state.
fn two_registrations(store: &Arc<dyn Store>) -> Vec<Result<Vec<String>, LeaseError>> {
    let meeting: Arc<dyn Store> = MeetingStore::over(store.clone(), b"e/");
    thread::scope(|scope| {
        let racers = [("c1", "big", "10.0.0.0/16"), ("c2", "small", "10.0.0.0/24")].map(|(container, name, subnet)| {
            let meeting = &meeting;
            scope.spawn(move || {
                let json = format!(r#"{{ "pools": [ {{ "name": "{name}", "subnet": "{subnet}" }} ] }}"#);
                lease(&ipam(&json, meeting), container, None)
            })
        });
        racers.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

#[test]
fn one_of_two_overlapping_registrations_is_refused() {
    each_store(|store, _| {
        let outcomes = two_registrations(&store);
        let refused: Vec<String> = outcomes.iter().filter_map(|o| o.as_ref().err()).map(ToString::to_string).collect();
        assert_eq!(refused.len(), 1, "{outcomes:?}");
        assert!(refused[0].contains("overlaps pool"), "{refused:?}");
    });
}

#[test]
fn without_the_spaces_guard_both_are_let_in() {
    let unguarded: Arc<dyn Store> =
        Arc::new(UnguardedStore::new(Arc::new(MemoryStore::new()), |guard| guard.key.starts_with(b"e/")));
    let outcomes = two_registrations(&unguarded);
    // Each finds the other's registration in place of its own afterwards; what they did is in the store already.
    let record = block_on(unguarded.read(&[b"e/default".to_vec()])).unwrap().remove(0).unwrap();
    let text = String::from_utf8(record.value).unwrap();
    assert!(outcomes.iter().any(Result::is_ok), "{outcomes:?} {text}");
    assert!(record.version > 1, "the second registration overwrote the first: {text}");
}

#[test]
fn exactly_enough_addresses_serve_all_and_the_next_is_refused() {
    each_store(|store, _| {
        let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24", "ranges": ["10.0.0.1-10.0.0.200"] } ] }"#;
        let mut all: Vec<String> = thread::scope(|scope| {
            let callers: Vec<_> = (0..8)
                .map(|caller| {
                    let store = &store;
                    scope.spawn(move || {
                        let ipam = ipam(json, store);
                        (0..25)
                            .map(|i| {
                                texts(&block_on(ipam.lease(&request(&format!("c{caller}-{i}"), None))).unwrap())
                                    .remove(0)
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            callers.into_iter().flat_map(|c| c.join().unwrap()).collect()
        });
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 200);
        let ours = ipam(json, &store);
        assert!(matches!(lease(&ours, "one-more", None).unwrap_err(), LeaseError::Exhausted { .. }));
        let usage = block_on(ours.usage()).unwrap().remove(0);
        assert_eq!((usage.bound, usage.size), (200, 200));
    });
}

#[test]
fn many_callers_of_one_attachment_get_one_lease() {
    each_store(|store, _| {
        let leases: Vec<Vec<String>> = thread::scope(|scope| {
            let callers: Vec<_> = (0..8)
                .map(|_| {
                    let store = &store;
                    scope.spawn(move || lease(&ipam(POOL, store), "same", None).unwrap())
                })
                .collect();
            callers.into_iter().map(|c| c.join().unwrap()).collect()
        });
        assert!(leases.iter().all(|l| *l == leases[0]), "{leases:?}");
        release(&ipam(POOL, &store), "same");
        assert_eq!(block_on(ipam(POOL, &store).bindings(None)).unwrap(), []);
    });
}
