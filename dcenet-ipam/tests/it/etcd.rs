//! The store on etcd: real members, killed, stopped and cut off.

mod fabric;
mod faults;
mod many;
mod rotation;
mod secure;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dcenet_core::test_support::{Rung, require_with};
use dcenet_ipam::store::etcd::cluster::Cluster;
use dcenet_ipam::store::etcd::{EtcdConfig, EtcdStore};
use dcenet_ipam::store::{Batch, Change, Entry, Guard, Outcome, Store, StoreError, Write, conformance, numbered};
use pollster::block_on;
use tempfile::TempDir;

/// Far longer than anything takes.
const SOON: Duration = Duration::from_secs(120);

fn can_run() -> bool {
    require_with(Rung::Services, Cluster::missing)
}

fn memory_dir() -> TempDir {
    tempfile::Builder::new().prefix("dcenet-etcd-").tempdir_in("/dev/shm").unwrap()
}

fn open(config: &EtcdConfig) -> Arc<dyn Store> {
    Arc::new(EtcdStore::open(config).unwrap())
}

/// Ids that no other test process draws either, for they share nothing but the way of drawing.
fn id() -> u128 {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    u128::from(std::process::id()) << 64 | NEXT.fetch_add(1, Ordering::Relaxed) as u128
}

fn put(key: &str, value: &str) -> Batch {
    Batch { writes: vec![Write::Put(key.into(), value.into())], request_id: id(), ..Batch::default() }
}

fn guarded(key: &str, version: Option<u64>, batch: Batch) -> Batch {
    Batch { guards: vec![Guard { key: key.into(), version }], ..batch }
}

fn commit(store: &dyn Store, batch: &Batch) -> u64 {
    match block_on(store.commit(batch)).unwrap() {
        Outcome::Committed { revision } => revision,
        other => panic!("{batch:?} ended as {other:?}"),
    }
}

fn read(store: &dyn Store, key: &str) -> Option<Entry> {
    block_on(store.read(&[key.into()])).unwrap().remove(0)
}

/// The suite over one member, each of its stores under a prefix of its own.
fn suite(arguments: &[&str], max_operations: Option<usize>) {
    let dir = memory_dir();
    let cluster = Cluster::start_with(1, dir.path(), "http", arguments);
    let stores = AtomicUsize::new(0);
    conformance::all(|| {
        let prefix = Some(format!("/suite/{}/", stores.fetch_add(1, Ordering::Relaxed)));
        open(&EtcdConfig { prefix, max_operations, ..cluster.config() })
    });
}

#[test]
fn one_member_passes_the_conformance_suite() {
    if can_run() {
        suite(&[], None);
    }
}

#[test]
fn a_member_with_a_raised_limit_passes_the_conformance_suite() {
    if can_run() {
        suite(&["--max-txn-ops", "1024"], Some(1024));
    }
}

#[test]
fn a_member_with_default_limits_takes_the_largest_batch() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start(1, dir.path());
    let store = open(&cluster.config());
    let most = store.caps().max_operations;
    let writes = |count: usize| (0..count).map(|n| Write::Put(format!("k{n}").into(), vec![b'v'; 8000])).collect();
    let batch = Batch { writes: writes(most), request_id: id(), ..Batch::default() };
    let revision = commit(&*store, &batch);
    let keys: Vec<_> = (0..300).map(|n| format!("k{n}").into_bytes()).collect();
    // More keys than one transaction reads.
    let read = block_on(store.read(&keys)).unwrap();
    assert_eq!(read.iter().flatten().map(|e| e.version).collect::<Vec<_>>(), vec![revision; most]);
    let guards = (0..most).map(|n| Guard { key: format!("k{n}").into(), version: Some(revision) }).collect();
    assert_eq!(commit(&*store, &Batch { guards, request_id: id(), ..Batch::default() }), revision);
    let long = "k".repeat(1024);
    commit(&*store, &put(&long, &"v".repeat(1 << 20)));
    let over = Batch { writes: writes(most + 1), request_id: id(), ..Batch::default() };
    assert!(matches!(block_on(store.commit(&over)), Err(StoreError::Misuse(_))));
    // Scans of more than one page, at the default page and below it.
    for count in [0, 1000] {
        let writes: Vec<Write> = (0..count).map(|n| Write::Put(format!("page{n:04}").into(), vec![])).collect();
        for some in writes.chunks(most) {
            commit(&*store, &Batch { writes: some.to_vec(), request_id: id(), ..Batch::default() });
        }
        for more in 0..2 {
            if count > 0 {
                commit(&*store, &put(&format!("page{}", 1000 + more), ""));
            }
            let found = block_on(store.scan(b"page", None, usize::MAX)).unwrap();
            assert_eq!(found.len(), if count > 0 { count + more + 1 } else { 0 });
            assert!(found.is_sorted_by_key(|(key, _)| key.clone()));
        }
    }
}

/// The keys are where the documentation says, and values can be read by people.
#[test]
fn another_program_reads_what_is_there() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start(1, dir.path());
    let batch = put("a", "1");
    commit(&*open(&cluster.config()), &batch);
    let lane = format!("/dcenet/ipam/r/{:04x}", batch.request_id % (1 << 14));
    let expected = [("/dcenet/ipam/k/a".into(), b"1".to_vec()), (lane.into(), batch.request_id.to_be_bytes().to_vec())];
    assert_eq!(cluster.dump("/"), expected);
}

#[test]
fn repeated_requests_apply_once_and_lanes_are_shared() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start(1, dir.path());
    let (one, two) = (open(&cluster.config()), open(&cluster.config()));
    // Without a guard nothing but memory tells.
    let blind = put("blind", "1");
    let revision = commit(&*one, &blind);
    assert_eq!((commit(&*one, &blind), read(&*one, "blind").unwrap().version), (revision, revision));
    // The twin: another id, applied again.
    assert!(commit(&*one, &Batch { request_id: id(), ..blind }) > revision);
    // Another process finds the id where the guard fails.
    let guarded_put = guarded("g", None, put("g", "1"));
    let revision = commit(&*one, &guarded_put);
    assert_eq!(commit(&*two, &guarded_put), revision);
    let other = Batch { request_id: id(), ..guarded_put };
    assert!(matches!(block_on(two.commit(&other)).unwrap(), Outcome::Conflict(now) if now[0].is_some()));
    // Requests that meet in a lane: both are applied, a conflict stays one.
    for round in 0..20_u128 {
        let in_lane = |key: &str, n: u128| Batch { request_id: n << 14 | 77, ..put(key, "1") };
        let stores = [&one, &two];
        commit(&**stores[(round % 2) as usize], &in_lane(&format!("lane{round}"), round + 1));
        let taken = guarded("g", None, in_lane("g", 1000 + round));
        assert!(matches!(block_on(one.commit(&taken)).unwrap(), Outcome::Conflict(now) if now[0].is_some()));
    }
    assert_eq!(block_on(one.scan(b"lane", None, 99)).unwrap().len(), 20);
}

/// Numbers that others took or freed meanwhile, in long dense runs, once what was free is not offered unasked any more.
#[test]
fn gaps_of_two_processes_agree_with_counting() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start(1, dir.path());
    let (ours, theirs) = (open(&cluster.config()), open(&cluster.config()));
    let forget = || std::thread::sleep(Duration::from_millis(1100));
    let fill = |from: u128, to: u128| {
        let numbers: Vec<u128> = (from..to).collect();
        for some in numbers.chunks(120) {
            let writes = some.iter().map(|n| Write::Put(numbered(b"n/", *n), vec![])).collect();
            commit(&*theirs, &Batch { writes, request_id: id(), ..Batch::default() });
        }
        forget();
    };
    let free = |n: u128| {
        let writes = vec![Write::Delete(numbered(b"n/", n))];
        commit(&*theirs, &Batch { writes, request_id: id(), ..Batch::default() });
        forget();
    };
    let gap = |low: u128, high: u128| block_on(ours.first_gap(b"n/", low..=high)).unwrap();
    assert_eq!(gap(0, u128::MAX), Some(0));
    fill(10, 5000);
    assert_eq!((gap(10, 4999), gap(10, 5000), gap(10, u128::MAX)), (None, Some(5000), Some(5000)));
    fill(5000, 5200);
    assert_eq!((gap(10, u128::MAX), gap(10, 5199), gap(4000, 4000)), (Some(5200), None, None));
    // Known to be taken, and freed by another: none is lost for good, and "no gap" is never said from memory.
    free(4321);
    assert_eq!(gap(10, 5199), Some(4321));
    free(17);
    assert!([Some(17), Some(4321)].contains(&gap(10, 5199)));
    fill(u128::MAX - 100, u128::MAX);
    assert_eq!(gap(u128::MAX - 100, u128::MAX), Some(u128::MAX));
    commit(&*ours, &Batch { writes: vec![Write::Put(numbered(b"n/", u128::MAX), vec![])], ..put("x", "") });
    assert_eq!(gap(u128::MAX - 100, u128::MAX), None);
}

#[test]
fn compaction_is_told_as_a_gap_and_disturbs_nobody_else() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start(1, dir.path());
    let store = open(&cluster.config());
    let mut near = block_on(store.watch(b"k", 0)).unwrap();
    let first = commit(&*store, &put("k", "0"));
    let near_first = block_on(near.next(SOON)).unwrap().unwrap();
    assert_eq!(near_first.revision(), first);
    let last = (1..50).fold(first, |_, n| commit(&*store, &put("k", &n.to_string())));
    cluster.etcdctl(&["compaction", &(last - 5).to_string()]);

    // Who begins before it is told so, and then everything after it.
    let mut far = block_on(store.watch(b"k", first)).unwrap();
    assert_eq!(block_on(far.next(SOON)).unwrap(), Some(Change::Gap { revision: last - 5 }));
    for revision in last - 4..=last {
        assert_eq!(block_on(far.next(SOON)).unwrap().unwrap().revision(), revision);
    }
    // Who was there all the time misses nothing.
    for revision in first + 1..=last {
        let change = block_on(near.next(SOON)).unwrap().unwrap();
        assert!(matches!(change, Change::Writes { revision: r, .. } if r == revision), "{change:?}");
    }
    assert_eq!(read(&*store, "k").unwrap().version, last);
    assert_eq!(block_on(near.next(Duration::from_millis(50))).unwrap(), None);
}
