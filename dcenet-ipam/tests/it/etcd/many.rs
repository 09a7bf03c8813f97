//! Many batches at once: each is answered as if it had been alone, and few transactions carry them.

use dcenet_ipam::store::etcd::EtcdConfig;
use dcenet_ipam::store::etcd::cluster::Cluster;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Change, Guard, Outcome, Store, StoreError, Write};
use pollster::block_on;

use super::{can_run, commit, id, memory_dir, open, put, read};

fn create(key: &str, value: &str) -> Batch {
    Batch { guards: vec![Guard { key: key.into(), version: None }], ..put(key, value) }
}

/// What became of a batch, without the numbers that differ between stores.
fn told(outcome: &Result<Outcome, StoreError>) -> String {
    match outcome {
        Ok(Outcome::Committed { .. }) => "committed".to_owned(),
        Ok(Outcome::Conflict(now)) => {
            let value = |entry: &Option<_>| entry.as_ref().map(|e: &dcenet_ipam::store::Entry| e.value.clone());
            format!("conflict {:?}", now.iter().map(value).collect::<Vec<_>>())
        }
        Ok(Outcome::Unknown { reason }) => format!("unknown {reason}"),
        Err(error) => format!("error {error}"),
    }
}

#[test]
fn batches_sent_together_are_answered_as_one_after_the_other() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start_with(1, dir.path(), "http", &[]);
    let (etcd, memory) = (open(&cluster.config()), MemoryStore::new());
    for store in [&*etcd, &memory as &dyn Store] {
        commit(store, &put("taken", "before"));
    }
    let lane = id();
    let batches = vec![
        create("a", "1"),
        create("taken", "2"),
        create("b", "3"),
        // Sees what the first did.
        create("a", "4"),
        Batch { writes: vec![Write::Delete(b"b".to_vec()), Write::Put(b"c".to_vec(), b"5".to_vec())], ..put("", "") },
        // A key that no store takes, which stops no other.
        Batch { writes: vec![Write::Put(Vec::new(), Vec::new())], ..put("", "") },
        create("b", "6"),
        // Two of one lane.
        Batch { request_id: lane, ..create("d", "7") },
        Batch { request_id: lane + (1 << 14), ..create("e", "8") },
        Batch { request_id: id(), guards: vec![Guard { key: b"e".to_vec(), version: None }], ..Batch::default() },
        Batch { request_id: id(), ..Batch::default() },
        // The same request once more.
        Batch { request_id: lane, ..create("d", "7") },
    ];
    let answers = block_on(etcd.commit_many(&batches));
    let expected = block_on(memory.commit_many(&batches));
    assert_eq!(answers.iter().map(told).collect::<Vec<_>>(), expected.iter().map(told).collect::<Vec<_>>());
    for key in ["a", "b", "c", "d", "e", "taken"] {
        assert_eq!(read(&*etcd, key).map(|e| e.value), read(&memory, key).map(|e| e.value), "{key}");
    }
    // The revision that is told is the one that wrote.
    for (batch, answer) in batches.iter().zip(&answers) {
        if let (Some(Write::Put(key, _)), Ok(Outcome::Committed { revision })) = (batch.writes.last(), answer)
            && !["a", "b", "d"].contains(&std::str::from_utf8(key).unwrap())
        {
            assert_eq!(block_on(etcd.read(std::slice::from_ref(key))).unwrap()[0].as_ref().unwrap().version, *revision);
        }
    }
}

#[test]
fn what_has_no_key_in_common_goes_in_few_transactions_and_is_told_once() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    // etcd's default of 128 operations for a transaction.
    let cluster = Cluster::start_with(1, dir.path(), "http", &[]);
    let store = open(&cluster.config());
    let mut watch = block_on(store.watch(b"n/", 0)).unwrap();
    let shared = commit(&*store, &put("pool", "1"));
    let pool = Guard { key: b"pool".to_vec(), version: Some(shared) };
    let batches: Vec<Batch> = (0..300)
        .map(|n| {
            let mut batch = create(&format!("n/{n:03}"), "v");
            batch.guards.push(pool.clone());
            batch
        })
        .collect();
    let answers = block_on(store.commit_many(&batches));
    let mut revisions: Vec<u64> = answers
        .iter()
        .map(|answer| match answer {
            Ok(Outcome::Committed { revision }) => *revision,
            other => panic!("{other:?}"),
        })
        .collect();
    revisions.dedup();
    assert!(revisions.is_sorted() && revisions.len() <= 20, "{revisions:?}");
    let mut seen = Vec::new();
    while seen.len() < 300 {
        match block_on(watch.next(super::SOON)).unwrap() {
            Some(Change::Writes { revision, writes }) => {
                assert!(writes.iter().all(|(_, entry)| entry.as_ref().is_some_and(|e| e.version == revision)));
                seen.extend(writes.into_iter().map(|(key, _)| key));
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(seen.is_sorted() && seen.windows(2).all(|two| two[0] != two[1]), "each is told once");
    // All of them again: etcd has them, and says so.
    let again = block_on(store.commit_many(&batches));
    assert_eq!(again.iter().map(told).collect::<Vec<_>>(), vec!["committed".to_owned(); 300]);
    // Another process knows nothing of these requests: the lanes that were used since have the last word, the guards all.
    let other = open(&cluster.config());
    for answer in block_on(other.commit_many(&batches)) {
        assert!(matches!(answer, Ok(Outcome::Committed { .. } | Outcome::Conflict(_))), "{answer:?}");
    }
    assert_eq!(block_on(store.scan(b"n/", None, usize::MAX)).unwrap().len(), 300);
}

#[test]
fn a_member_that_is_gone_leaves_nothing_done_and_no_doubt() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let mut cluster = Cluster::start_with(1, dir.path(), "http", &[]);
    let timeout = Some(std::time::Duration::from_secs(3));
    let store = open(&EtcdConfig { timeout, ..cluster.config() });
    commit(&*store, &put("a", "1"));
    cluster.kill(0);
    let batches: Vec<Batch> = (0..50).map(|n| create(&format!("n/{n:03}"), "v")).collect();
    for answer in block_on(store.commit_many(&batches)) {
        // The first try may have been on its way when the member went.
        assert!(matches!(answer, Err(StoreError::Unavailable(_)) | Ok(Outcome::Unknown { .. })), "{answer:?}");
    }
    cluster.restart(0);
    let begun = std::time::Instant::now();
    while block_on(store.read(&[b"a".to_vec()])).is_err() {
        assert!(begun.elapsed() < super::SOON, "the member comes back");
    }
    for answer in block_on(store.commit_many(&batches)) {
        assert!(matches!(answer, Ok(Outcome::Committed { .. })), "{answer:?}");
    }
    assert_eq!(block_on(store.scan(b"n/", None, usize::MAX)).unwrap().len(), 50);
}
