//! The part of the suite about [`Store::watch`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use super::{batch, block_on, commit, conflict, delete, put};
use crate::store::{Batch, Change, Entry, Key, Store, Watch, Write};

/// Longer than any store needs to tell what is committed.
const SOON: Duration = Duration::from_secs(60);

/// What a revision did to the keys under a prefix.
type Writes = Vec<(Key, Option<Entry>)>;

fn watch(store: &dyn Store, prefix: &str, after: u64) -> Box<dyn Watch> {
    block_on(store.watch(prefix.as_bytes(), after)).unwrap()
}

fn next(watch: &mut dyn Watch) -> Change {
    block_on(watch.next(SOON)).unwrap().expect("a change that is committed was not told within a minute")
}

/// Everything is told up to the newest revision of the store: a key is written, and what comes before it is returned.
fn drain(store: &dyn Store, watch: &mut dyn Watch, prefix: &str) -> Vec<Change> {
    let end = commit(store, &batch(&[], vec![put(&format!("{prefix}~end"), "")]));
    let mut told = Vec::new();
    loop {
        match next(watch) {
            Change::Writes { revision, writes } if revision == end => {
                assert_eq!(writes.len(), 1);
                return told;
            }
            Change::Gap { revision } if revision >= end => {
                told.push(Change::Gap { revision });
                return told;
            }
            change => told.push(change),
        }
    }
}

fn entry(key: &str, value: &str, version: u64) -> (Key, Option<Entry>) {
    (key.as_bytes().to_vec(), Some(Entry { value: value.as_bytes().to_vec(), version }))
}

fn gone(key: &str) -> (Key, Option<Entry>) {
    (key.as_bytes().to_vec(), None)
}

pub(super) fn tells_whole_batches_in_order(store: &dyn Store) {
    let start = commit(store, &batch(&[], vec![put("p/old", "1"), put("q", "1")]));
    let mut changes = watch(store, "p/", start);
    let mut expected = Vec::new();
    let mut write = |writes: Vec<Write>, told: &dyn Fn(u64) -> Writes| {
        let revision = commit(store, &batch(&[], writes));
        if !told(revision).is_empty() {
            expected.push(Change::Writes { revision, writes: told(revision) });
        }
    };
    write(vec![put("p/b", "2"), put("p/a", "1"), put("q", "2"), put("p0", "3")], &|r| {
        vec![entry("p/a", "1", r), entry("p/b", "2", r)]
    });
    write(vec![put("q", "3"), put("p", "3"), put("p.", "3")], &|_| vec![]);
    write(vec![delete("p/a"), put("p/b", "2"), put("p/", "")], &|r| {
        vec![entry("p/", "", r), gone("p/a"), entry("p/b", "2", r)]
    });
    // Only what a key holds in the end counts.
    write(vec![put("p/b", "3"), delete("p/b"), put("p/b", "4"), put("p/old", "2"), delete("p/old")], &|r| {
        vec![entry("p/b", "4", r), gone("p/old")]
    });
    // What changes nothing is not told: a refusal, a barrier, a request that comes again.
    conflict(store, &batch(&[("p/b", None)], vec![put("p/refused", "1")]));
    commit(store, &batch(&[], vec![]));
    let again = batch(&[], vec![put("p/again", "1")]);
    let revision = commit(store, &again);
    assert_eq!(commit(store, &again), revision);
    expected.push(Change::Writes { revision, writes: vec![entry("p/again", "1", revision)] });
    assert_eq!(drain(store, &mut *changes, "p/"), expected);
    assert_eq!(block_on(changes.next(Duration::ZERO)).unwrap(), None);
    // The empty prefix is everything.
    let mut all = watch(store, "", revision);
    drain(store, &mut *all, "");
    let revision = commit(store, &batch(&[], vec![put("z", "1"), put("a", "1")]));
    let writes = vec![entry("a", "1", revision), entry("z", "1", revision)];
    assert_eq!(next(&mut *all), Change::Writes { revision, writes });
}

/// Whatever revision a watch begins at: every later one is told, or lies below a gap that is told.
pub(super) fn begins_after_any_revision(store: &dyn Store) {
    let mut ledger = BTreeMap::new();
    for round in 0..40 {
        let key = format!("p/{}", round % 7);
        let revision = commit(store, &batch(&[], vec![put(&key, "1"), put("q", "1")]));
        ledger.insert(revision, vec![entry(&key, "1", revision)]);
    }
    let (oldest, newest) = (*ledger.keys().next().unwrap(), *ledger.keys().next_back().unwrap());
    // A store may have revisions of others before.
    for after in [0, oldest / 2].into_iter().chain(oldest.saturating_sub(2)..=newest) {
        let told = drain(store, &mut *watch(store, "p/", after), "p/");
        let ends = ledger.range(after + 1..).map(|(r, w)| (*r, w.clone())).collect();
        judge(after, &told, &ends, &format!("after {after}"));
    }
}

/// Compares what a watch told with what was committed after its start. A later revision than the ledger's is ignored.
fn judge(after: u64, told: &[Change], ledger: &BTreeMap<u64, Writes>, what: &str) {
    let (mut position, mut seen) = (after, BTreeSet::new());
    for change in told {
        match change {
            Change::Gap { revision } => {
                assert!(*revision > position, "{what}: a gap up to {revision} after {position}");
                seen.extend(ledger.range(..=revision).map(|(r, _)| *r));
            }
            Change::Writes { revision, writes } => {
                assert!(*revision > position, "{what}: revision {revision} after {position}");
                assert!(!writes.is_empty(), "{what}: revision {revision} without writes");
                if let Some(expected) = ledger.get(revision) {
                    // A deletion of what was absent before may be left out.
                    let told = |key: &Key| writes.iter().any(|(k, _)| k == key);
                    let expected: Writes =
                        expected.iter().filter(|(key, entry)| entry.is_some() || told(key)).cloned().collect();
                    assert_eq!(*writes, expected, "{what}: revision {revision}");
                }
                seen.insert(*revision);
            }
        }
        position = change.revision();
    }
    for revision in ledger.keys() {
        assert!(seen.contains(revision), "{what}: revision {revision} was passed over in silence");
    }
}

pub(super) fn says_so_when_it_is_ahead(store: &dyn Store) {
    let newest = commit(store, &batch(&[], vec![put("p", "1")]));
    let mut changes = watch(store, "p", newest + 1000);
    let told = drain(store, &mut *changes, "p");
    assert!(matches!(told[..], [Change::Gap { revision }] if revision >= newest), "{told:?} at revision {newest}");
    let revision = commit(store, &batch(&[], vec![put("p", "2")]));
    assert_eq!(next(&mut *changes), Change::Writes { revision, writes: vec![entry("p", "2", revision)] });
}

pub(super) fn two_do_not_know_of_each_other(store: &dyn Store) {
    let start = commit(store, &batch(&[], vec![put("x", "1")]));
    let (mut one, mut two) = (watch(store, "one/", start), watch(store, "", start));
    let ended = watch(store, "one/", start);
    let revision = commit(store, &batch(&[], vec![put("one/a", "1"), put("two/a", "1")]));
    drop(ended);
    assert_eq!(next(&mut *one), Change::Writes { revision, writes: vec![entry("one/a", "1", revision)] });
    let later = commit(store, &batch(&[], vec![put("two/b", "1")]));
    let both = vec![entry("one/a", "1", revision), entry("two/a", "1", revision)];
    assert_eq!(next(&mut *two), Change::Writes { revision, writes: both });
    assert_eq!(next(&mut *two), Change::Writes { revision: later, writes: vec![entry("two/b", "1", later)] });
    assert_eq!(drain(store, &mut *one, "one/"), []);
}

/// A writer and a watcher that answer each other: each round begins when the last was told.
pub(super) fn waits_for_what_comes(store: &Arc<dyn Store>) {
    let start = commit(&**store, &batch(&[], vec![put("x", "1")]));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut calls = watch(&**store, "call/", start);
            for _ in 0..20 {
                let Change::Writes { writes, .. } = next(&mut *calls) else { panic!("a gap without load") };
                let number = std::str::from_utf8(&writes[0].0).unwrap().strip_prefix("call/").unwrap().to_owned();
                commit(&**store, &batch(&[], vec![put(&format!("answer/{number}"), "")]));
            }
        });
        let mut answers = watch(&**store, "answer/", start);
        for number in 0..20 {
            commit(&**store, &batch(&[], vec![put(&format!("call/{number:02}"), "")]));
            let Change::Writes { writes, .. } = next(&mut *answers) else { panic!("a gap without load") };
            assert_eq!(writes[0].0, format!("answer/{number:02}").into_bytes());
        }
    });
}

/// More commits than a store keeps in one piece, and nobody looks in the meantime.
pub(super) fn a_slow_one_misses_nothing_in_silence(store: &dyn Store) {
    let start = commit(store, &batch(&[], vec![put("p/", "")]));
    let mut changes = watch(store, "p/", start);
    let mut ledger = BTreeMap::new();
    for round in 0..300 {
        let (one, two) = (format!("p/{:02}", round % 50), format!("p/{:02}x", round % 50));
        let revision = commit(store, &batch(&[], vec![put(&one, "1"), put("q", "1"), put(&two, "1")]));
        ledger.insert(revision, vec![entry(&one, "1", revision), entry(&two, "1", revision)]);
    }
    let told = drain(store, &mut *changes, "p/");
    judge(start, &told, &ledger, "a slow watch");
    // And one that begins so far back.
    let told = drain(store, &mut *watch(store, "p/", start), "p/");
    judge(start, &told, &ledger, "a late watch");
}

/// Several writers, and copies of a prefix that are kept by watching: one from the beginning, one that begins in the
/// middle, one that dawdles. Every copy ends as the store does, and every commit is told once, whole and in order.
pub(super) fn copies_agree_under_racing_writers(store: &Arc<dyn Store>) {
    let start = commit(&**store, &batch(&[], vec![put("w/", "")]));
    let (begun, all_begun) = mpsc::channel();
    let ledger: BTreeMap<u64, Writes> = thread::scope(|scope| {
        let copies: Vec<_> = [0, 20, 1]
            .into_iter()
            .enumerate()
            .map(|(i, pause)| {
                let begun = begun.clone();
                scope.spawn(move || follow(&**store, Duration::from_millis(pause), i == 1, &begun))
            })
            .collect();
        drop(begun);
        let writers: Vec<_> = (0..4).map(|writer| scope.spawn(move || write_some(&**store, writer))).collect();
        let mut ledger = BTreeMap::new();
        for writer in writers {
            for (revision, writes) in writer.join().unwrap() {
                assert_eq!(ledger.insert(revision, writes), None, "revision {revision} was given twice");
            }
        }
        // Fails, and does not wait, if a copy has failed.
        (0..copies.len()).for_each(|_| all_begun.recv().unwrap());
        let end = commit(&**store, &batch(&[], vec![put("w/~end", "")]));
        ledger.insert(end, vec![entry("w/~end", "", end)]);
        for copy in copies {
            let (after, told, copy) = copy.join().unwrap();
            let later = ledger.range(after + 1..).map(|(r, w)| (*r, w.clone())).collect();
            judge(after, &told, &later, "a copy");
            assert_eq!(copy, scan(&**store));
        }
        ledger
    });
    judge(start, &drain(&**store, &mut *watch(&**store, "w/", start), "w/"), &ledger, "afterwards");
}

fn write_some(store: &dyn Store, writer: usize) -> Vec<(u64, Writes)> {
    (0..60)
        .map(|round| {
            // Keys that the writers share, and pairs that only fit if a batch is whole.
            let (one, two) = (format!("w/{}", (round + writer) % 5), format!("w/{}", (round + writer) % 5 + 5));
            let value = format!("{writer}.{round}");
            let writes = if round % 9 == 8 {
                vec![delete(&one), put("v", "beside"), put(&two, &value)]
            } else {
                vec![put(&one, &value), put("v", "beside"), put(&two, &value)]
            };
            let deletes = matches!(writes[0], Write::Delete(_));
            let revision = commit(store, &Batch { writes, ..batch(&[], vec![]) });
            let first = if deletes { gone(&one) } else { entry(&one, &value, revision) };
            (revision, vec![first, entry(&two, &value, revision)])
        })
        .collect()
}

fn scan(store: &dyn Store) -> BTreeMap<Key, Entry> {
    block_on(store.scan(b"w/", None, usize::MAX)).unwrap().into_iter().collect()
}

/// Keeps a copy of `w/` until the end is written. Returns where it began, what was told, and the copy.
fn follow(
    store: &dyn Store,
    pause: Duration,
    late: bool,
    begun: &mpsc::Sender<()>,
) -> (u64, Vec<Change>, BTreeMap<Key, Entry>) {
    if late {
        thread::sleep(pause);
    }
    let after = commit(store, &batch(&[], vec![]));
    let mut copy = scan(store);
    let mut changes = watch(store, "w/", after);
    begun.send(()).unwrap();
    let mut told: Vec<Change> = Vec::new();
    let end = |copy: &BTreeMap<Key, Entry>| copy.get(b"w/~end".as_slice()).map(|e| e.version);
    while end(&copy).is_none_or(|end| told.last().is_none_or(|c| c.revision() < end)) {
        let change = next(&mut *changes);
        match &change {
            Change::Gap { .. } => copy = scan(store),
            Change::Writes { revision, writes } => {
                // What is told is there.
                let keys: Vec<Key> = writes.iter().map(|(key, _)| key.clone()).collect();
                for ((key, now), (_, then)) in keys.iter().zip(block_on(store.read(&keys)).unwrap()).zip(writes) {
                    let since = now.as_ref().is_none_or(|now| now.version > *revision);
                    assert!(since || now == *then, "{} after it was told", key.escape_ascii());
                }
                for (key, entry) in writes {
                    if copy.get(key).is_some_and(|held| held.version > *revision) {
                        continue;
                    }
                    match entry {
                        Some(entry) => drop(copy.insert(key.clone(), entry.clone())),
                        None => drop(copy.remove(key)),
                    }
                }
            }
        }
        told.push(change);
        if !late {
            thread::sleep(pause);
        }
    }
    (after, told, copy)
}
