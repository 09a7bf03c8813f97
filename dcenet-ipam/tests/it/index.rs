//! Allocators that keep an index of their pools: many callers, other processes, and an index that is wrong.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use async_trait::async_trait;
use dcenet_core::model::LabelSet;
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Ipam;
use dcenet_ipam::store::group::GroupStore;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError, Watch};
use pollster::block_on;

use crate::{attachment, each_store, ipam, lease, release, request};

const SMALL: &str = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/29" } ] }"#;
/// 1,022 addresses, less 22.
const THOUSAND: &str = r#"{ "cooldown": "0s",
    "pools": [ { "name": "p", "subnet": "10.0.0.0/22", "ranges": ["10.0.0.1-10.0.3.232"] } ] }"#;

/// Counts conflicts, and can be deaf: then its watches tell nothing and its scans find nothing.
#[derive(Debug)]
struct Observed {
    inner: Arc<dyn Store>,
    conflicts: AtomicU64,
    reads: AtomicU64,
    deaf: bool,
}

impl Observed {
    fn new(inner: Arc<dyn Store>, deaf: bool) -> Arc<Self> {
        Arc::new(Self { inner, conflicts: AtomicU64::new(0), reads: AtomicU64::new(0), deaf })
    }
}

#[async_trait]
impl Store for Observed {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        if self.deaf && prefix.starts_with(b"s/") {
            return Ok(Vec::new());
        }
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let outcome = self.inner.commit(batch).await;
        if matches!(outcome, Ok(Outcome::Conflict(_))) {
            self.conflicts.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.first_gap(prefix, range).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        match self.deaf {
            true => MemoryStore::new().watch(prefix, 0).await,
            false => self.inner.watch(prefix, after).await,
        }
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

/// All addresses that the callers got; each caller leases as often as is said.
fn stampede(sources: &[&Ipam], callers: usize, each: usize) -> Vec<Result<IpAddr, LeaseError>> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..callers)
            .map(|caller| {
                let ipam = sources[caller % sources.len()];
                let one = move |n| {
                    let leased = block_on(ipam.lease(&request(&format!("c{caller}-{n}"), None)))?;
                    Ok(leased.addresses[0].address.addr())
                };
                scope.spawn(move || (0..each).map(one).collect::<Vec<_>>())
            })
            .collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    })
}

fn distinct(results: &[Result<IpAddr, LeaseError>]) -> usize {
    results.iter().map(|r| r.as_ref().unwrap()).collect::<BTreeSet<_>>().len()
}

#[test]
fn an_index_follows_what_others_do() {
    each_store(|store, _| {
        let indexed = ipam(SMALL, &store).with_index();
        let other = ipam(SMALL, &store);
        assert_eq!(lease(&indexed, "a", None).unwrap(), ["10.0.0.1/29"]);
        assert_eq!(lease(&other, "b", None).unwrap(), ["10.0.0.2/29"]);
        assert_eq!(lease(&indexed, "b", None).unwrap(), ["10.0.0.2/29"], "what is held is held");
        for n in 3..=6 {
            lease(&indexed, &format!("c{n}"), None).unwrap();
        }
        assert!(matches!(lease(&indexed, "d", None), Err(LeaseError::Exhausted { .. })));
        // Released elsewhere, found here; released here, found here; the oldest first.
        release(&other, "b");
        crate::later();
        release(&indexed, "a");
        assert_eq!(lease(&indexed, "e", None).unwrap(), ["10.0.0.2/29"]);
        assert_eq!(lease(&indexed, "f", None).unwrap(), ["10.0.0.1/29"]);
        assert!(matches!(lease(&indexed, "g", None), Err(LeaseError::Exhausted { .. })));
        assert_eq!(block_on(other.bindings(None)).unwrap().len(), 6);
    });
}

#[test]
fn callers_of_one_process_do_not_collide() {
    let run = |index: bool| {
        let store = Observed::new(Arc::new(GroupStore::new(Arc::new(MemoryStore::new()))), false);
        let ipam = ipam(THOUSAND, &(store.clone() as Arc<dyn Store>));
        let ipam = if index { ipam.with_index() } else { ipam };
        block_on(ipam.ready()).unwrap();
        lease(&ipam, "first", None).unwrap();
        let before = store.reads.load(Ordering::Relaxed);
        let results = stampede(&[&ipam], 16, 50);
        assert_eq!(distinct(&results), 800);
        (store.conflicts.load(Ordering::Relaxed), store.reads.load(Ordering::Relaxed) - before)
    };
    assert_eq!(run(true), (0, 0), "no lost race and no read for 800 leases");
    let (_, reads) = run(false);
    assert!(reads > 800, "{reads}: without an index each lease reads");
}

#[test]
fn a_thousand_callers_get_a_thousand_addresses_and_the_next_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = || -> Arc<dyn Store> { Arc::new(GroupStore::new(Arc::new(LogStore::open(dir.path()).unwrap()))) };
    // As two processes would: stores of their own, each with an index.
    let (one, two) = (ipam(THOUSAND, &open()).with_index(), ipam(THOUSAND, &open()).with_index());
    let results = stampede(&[&one, &two], 1000, 1);
    assert_eq!((results.len(), distinct(&results)), (1000, 1000));
    for ipam in [&one, &two] {
        assert!(matches!(lease(ipam, "more", None), Err(LeaseError::Exhausted { .. })));
    }
    assert_eq!(block_on(one.bindings(None)).unwrap().len(), 1000);
}

#[test]
fn an_index_that_knows_nothing_of_others_gives_nothing_twice() {
    let memory: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let other = ipam(THOUSAND, &memory);
    let deaf = Observed::new(memory.clone(), true);
    let wrong = ipam(THOUSAND, &(deaf.clone() as Arc<dyn Store>)).with_index();
    for n in 0..40 {
        lease(&other, &format!("before-{n}"), None).unwrap();
    }
    let results = stampede(&[&wrong, &other], 16, 60);
    assert_eq!(distinct(&results), 960);
    assert_eq!(block_on(other.bindings(None)).unwrap().len(), 1000);
    assert!(deaf.conflicts.load(Ordering::Relaxed) > 0, "the index was right by accident");
    // What it takes for free is not, and what it takes for used is.
    let refused = lease(&wrong, "more", None);
    assert!(matches!(refused, Err(LeaseError::Exhausted { .. })), "{refused:?}");
    release(&other, "before-7");
    assert_eq!(lease(&wrong, "more", None).unwrap(), ["10.0.0.8/22"]);
}

#[test]
fn proposals_of_leases_that_fail_are_free_again() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    // The second family has one address: a lease that lacks it takes none of the first.
    let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/29" }, { "name": "q", "subnet": "fd00::1/128" } ] }"#;
    let ipam = ipam(json, &store).with_index();
    assert_eq!(lease(&ipam, "a", None).unwrap(), ["10.0.0.1/29", "fd00::1/128"]);
    for n in 0..10 {
        assert!(matches!(lease(&ipam, &format!("x{n}"), None), Err(LeaseError::Exhausted { .. })));
    }
    release(&ipam, "a");
    let asked = dcenet_core::provider::LeaseRequest { pools: vec!["p".to_owned()], ..request("b", None) };
    let leased = block_on(ipam.lease(&asked)).unwrap();
    assert_eq!(leased.addresses[0].address.to_string(), "10.0.0.2/29");
}

#[test]
fn a_node_takes_from_its_blocks_without_reading() {
    let memory: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let store = Observed::new(memory.clone(), false);
    let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24", "block": { "size": "/28" } } ] }"#;
    let node = |name: &str| name.parse().unwrap();
    let indexed = ipam(json, &(store.clone() as Arc<dyn Store>)).on_node(node("n1"), LabelSet::default()).with_index();
    let other = ipam(json, &memory).on_node(node("n2"), LabelSet::default());
    let first = lease(&indexed, "a", None).unwrap();
    lease(&other, "z", None).unwrap();
    lease(&indexed, "b", None).unwrap();
    let before = store.reads.load(Ordering::Relaxed);
    for n in 0..8 {
        lease(&indexed, &format!("c{n}"), None).unwrap();
    }
    assert_eq!(store.reads.load(Ordering::Relaxed), before);
    // A block is claimed only by who has looked, and nobody else's.
    for n in 8..20 {
        lease(&indexed, &format!("c{n}"), None).unwrap();
    }
    let owners: Vec<String> =
        block_on(other.blocks()).unwrap().into_iter().map(|b| format!("{} {}", b.prefix, b.owner)).collect();
    assert_eq!(owners, ["10.0.0.0/28 n1", "10.0.0.16/28 n2", "10.0.0.32/28 n1"]);
    // Given back by another while this one believes that it owns it: it is asked again, and given anew.
    for container in std::iter::once("a".to_owned()).chain(["b".to_owned()]).chain((0..20).map(|n| format!("c{n}"))) {
        block_on(indexed.release_current(&attachment(&container))).unwrap();
    }
    assert_eq!(block_on(other.reclaim_blocks("n1")).unwrap().len(), 2);
    let again = lease(&indexed, "again", None).unwrap();
    assert_ne!(again, first, "it cools");
    assert_eq!(block_on(other.blocks()).unwrap().iter().filter(|b| b.owner == "n1").count(), 1);
}

/// The head of the queue of releases is reserved since: the next that is free there is taken, as without an index, and no
/// other pool is asked.
#[test]
fn a_reserved_release_hides_nothing_behind_it() {
    let json = r#"{ "cooldown": "0s", "pools": [
        { "name": "p", "subnet": "10.0.0.0/29", "priority": 1 }, { "name": "q", "subnet": "10.0.1.0/29", "priority": 2 } ] }"#;
    let run = |index: bool| {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let other = ipam(json, &store);
        let ours = if index { ipam(json, &store).with_index() } else { ipam(json, &store) };
        for n in 1..=6 {
            lease(&ours, &format!("c{n}"), None).unwrap();
        }
        // Released in this order; the first two are reserved then.
        for n in [2, 4, 5, 3] {
            release(&ours, &format!("c{n}"));
            crate::later();
        }
        for reserved in ["10.0.0.2", "10.0.0.4"] {
            block_on(other.reserve_external(&Default::default(), reserved.parse().unwrap(), "router")).unwrap();
        }
        let mut leased: Vec<String> = (0..3).flat_map(|n| lease(&ours, &format!("d{n}"), None).unwrap()).collect();
        // Who lost a race, as with what was guessed of the reservations, begins elsewhere in the queue.
        leased.sort();
        block_on(other.unreserve_external(&Default::default(), "10.0.0.2".parse().unwrap(), "router")).unwrap();
        (leased, lease(&ours, "e", None).unwrap())
    };
    let expected = ["10.0.0.3/29", "10.0.0.5/29", "10.0.1.1/29"].map(str::to_owned).to_vec();
    assert_eq!(run(false), (expected.clone(), vec!["10.0.0.2/29".to_owned()]), "without an index");
    assert_eq!(run(true), (expected, vec!["10.0.0.2/29".to_owned()]), "with an index");
}
