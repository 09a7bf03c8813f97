//! Who held an address, and when.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use dcenet_core::provider::AddressSource;
use dcenet_ipam::Ipam;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError};
use pollster::block_on;

use crate::claims::{Clock, calls, space};
use crate::{attachment, each_store, ipam, lease, release, request};

const JSON: &str = r#"{ "cooldown": "0s", "history": { "keep": "1h", "count": 8 },
    "pools": [ { "name": "p", "subnet": "10.0.0.0/30", "claims": { "shop/vm": { "address": "10.0.0.2" } } } ] }"#;

fn at(ipam: &Ipam, address: &str, time: u64) -> Vec<String> {
    let held = block_on(ipam.held_at(&space(), address.parse().unwrap(), time)).unwrap();
    held.iter().map(|t| t.attachment.container.to_string()).collect()
}

#[test]
fn who_held_an_address_at_a_time() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(JSON, &store));
        let start = clock.now();
        for container in ["a", "b"] {
            lease(&ipam, container, Some("shop/x")).unwrap();
            clock.advance(10);
            release(&ipam, container);
            clock.advance(5);
        }
        // a from 0 to 10 s, b from 15 to 25 s.
        for (second, holder) in [(0, "a"), (9, "a"), (15, "b"), (24, "b")] {
            assert_eq!(at(&ipam, "10.0.0.1", start + second * 1000), [holder], "at {second} s");
        }
        for second in [10, 14, 25, 1000] {
            assert_eq!(at(&ipam, "10.0.0.1", start + second * 1000), Vec::<String>::new(), "at {second} s");
        }
        assert_eq!(at(&ipam, "10.0.0.1", start - 1), Vec::<String>::new());
        let of_workload = block_on(ipam.history_of(&"shop/x".parse().unwrap())).unwrap();
        assert_eq!(of_workload.len(), 2);
        assert_eq!((of_workload[0].from, of_workload[0].to), (start, Some(start + 10_000)));
        assert_eq!(block_on(ipam.history_of(&"shop/y".parse().unwrap())).unwrap(), []);
        // What reclaim releases is told like any release.
        lease(&ipam, "c", None).unwrap();
        block_on(ipam.retain(&"net".parse().unwrap(), &[])).unwrap();
        let all = block_on(ipam.history(&space(), "10.0.0.1".parse().unwrap())).unwrap();
        assert_eq!(all.iter().filter(|t| t.to.is_none()).count(), 0);
        assert_eq!(all.len(), 3);
    });
}

#[test]
fn a_handover_shows_both_holders() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(JSON, &store));
        lease(&ipam, "source", Some("shop/vm")).unwrap();
        let limit = Duration::from_secs(60);
        block_on(ipam.begin_handover(&attachment("source"), None, None, limit)).unwrap();
        clock.advance(1);
        lease(&ipam, "target", Some("shop/vm")).unwrap();
        let both = clock.now();
        clock.advance(1);
        block_on(ipam.complete_handover(&attachment("source"))).unwrap();
        assert_eq!(at(&ipam, "10.0.0.2", both), ["source", "target"]);
        assert_eq!(at(&ipam, "10.0.0.2", clock.now()), ["target"]);
    });
}

#[test]
fn a_clock_that_steps_back_mixes_up_no_holders() {
    each_store(|store, _| {
        let (late, early) = (Clock::new(), Clock::new());
        late.advance(1000);
        let (one, other) = (late.drive(ipam(JSON, &store)), early.drive(ipam(JSON, &store)));
        lease(&one, "a", None).unwrap();
        release(&one, "a");
        lease(&other, "b", None).unwrap();
        let all = block_on(one.history(&space(), "10.0.0.1".parse().unwrap())).unwrap();
        let names: Vec<_> = all.iter().map(|t| (t.attachment.container.to_string(), t.to.is_some())).collect();
        assert_eq!(names, [("a".to_owned(), true), ("b".to_owned(), false)]);
    });
}

fn events(store: &Arc<dyn Store>) -> usize {
    block_on(store.scan(b"h/", None, 10_000)).unwrap().len()
}

#[test]
fn old_events_go_by_themselves_and_when_told() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ours = clock.drive(ipam(JSON, &store));
        let mut most = 0;
        for i in 0..600 {
            lease(&ours, &format!("c{i}"), None).unwrap();
            release(&ours, &format!("c{i}"));
            most = most.max(events(&store));
        }
        // One in four releases looks after its address: 8 are kept, and what comes between two looks.
        assert!(most < 400, "{most}");
        assert!(events(&store) >= 8);
        let before = events(&store);
        assert_eq!(block_on(ours.prune_history()).unwrap(), before - events(&store));
        // Two addresses came and went by turns.
        assert!(events(&store) <= 16, "{}", events(&store));
        clock.advance(3601);
        block_on(ours.prune_history()).unwrap();
        assert_eq!(events(&store), 0);
        // The twin: without pruning they stay.
        lease(&ours, "last", None).unwrap();
        clock.advance(10_000);
        assert_eq!(events(&store), 1);
    });
}

#[test]
fn a_history_costs_a_write_of_the_batch_and_no_call_more() {
    let without = JSON.replace(r#""history": { "keep": "1h", "count": 8 },"#, "");
    let wide = |json: &str| json.replace("10.0.0.0/30", "10.0.0.0/24");
    let plain = calls(&wide(&without), None);
    let kept = calls(&wide(JSON), None);
    assert_eq!(kept.0, plain.0);
    // One in four releases looks for old events.
    assert!(kept.1 <= plain.1 + 1, "{kept:?} {plain:?}");
    // Without it in the configuration nothing is written.
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    lease(&ipam(&without, &store), "c", None).unwrap();
    assert_eq!(events(&store), 0);
}

#[test]
fn an_event_is_small() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(JSON, &store);
    // As long as a runtime makes them.
    let mut request = request(&"0123456789abcdef".repeat(4), Some("production/payments-7d9f8c6b5-x2x4z"));
    request.attachment.network = "payments".parse().unwrap();
    block_on(ours.lease(&request)).unwrap();
    block_on(ours.release_current(&request.attachment)).unwrap();
    let bytes: usize =
        block_on(store.scan(b"h/", None, 10)).unwrap().iter().map(|(key, entry)| key.len() + entry.value.len()).sum();
    assert_eq!(events(&store), 2);
    assert!(bytes <= 2 * 130, "{bytes} bytes for two events");
}

/// Passes everything on and remembers the largest batch.
#[derive(Debug, Default)]
struct Largest {
    inner: MemoryStore,
    operations: AtomicUsize,
}

#[async_trait]
impl Store for Largest {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        self.operations.fetch_max(batch.guards.len() + batch.writes.len(), Ordering::Relaxed);
        self.inner.commit(batch).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

#[test]
fn old_events_go_a_few_in_a_batch() {
    let largest = Arc::new(Largest::default());
    let store: Arc<dyn Store> = largest.clone();
    let clock = Clock::new();
    let many = JSON.replace(r#""count": 8"#, r#""count": 1024"#);
    let round = |ours: &Ipam, i: usize| {
        lease(ours, &format!("c{i}"), None).unwrap();
        release(ours, &format!("c{i}"));
    };
    let ours = clock.drive(ipam(&many, &store));
    (0..400).for_each(|i| round(&ours, i));
    let full = events(&store);
    assert_eq!(full, 800);
    // All of them are too old at once.
    clock.advance(3601);
    (400..800).for_each(|i| round(&ours, i));
    let left = block_on(store.scan(b"h/", None, 10_000)).unwrap();
    assert!(left.len() < full + 400, "{} events: fewer go than come", left.len());
    let most = largest.operations.load(Ordering::Relaxed);
    assert!(most <= 48, "{most} operations in one batch");
}

/// Figures for people: `cargo test -p dcenet-ipam --test it history::cost -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn cost() {
    let without = JSON.replace(r#""history": { "keep": "1h", "count": 8 },"#, "");
    let mut times = [Vec::new(), Vec::new()];
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let ipams = [without.as_str(), JSON].map(|json| {
        let dir = dirs[usize::from(json == JSON)].path();
        let store: Arc<dyn Store> = Arc::new(LogStore::open(dir).unwrap());
        ipam(json, &store)
    });
    for round in 0..2000 {
        for (ipam, times) in ipams.iter().zip(&mut times) {
            let start = std::time::Instant::now();
            lease(ipam, &format!("c{round}"), None).unwrap();
            release(ipam, &format!("c{round}"));
            times.push(start.elapsed());
        }
    }
    for (what, times) in ["without", "with"].iter().zip(&mut times) {
        times.sort();
        let size = |dir: &tempfile::TempDir| -> u64 {
            std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum()
        };
        let bytes = size(&dirs[usize::from(*what == "with")]);
        eprintln!(
            "{what} history: lease and release p50 {:?}, p90 {:?}; files {bytes} bytes",
            times[1000], times[1800]
        );
    }
}
