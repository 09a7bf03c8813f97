//! What every store must do. Run [`all`] in a test of a backend; it panics at the first fault.
//!
//! ```
//! use std::sync::Arc;
//! use dcenet_ipam::store::{conformance, memory::MemoryStore};
//!
//! conformance::all(|| Arc::new(MemoryStore::new()));
//! ```

#![expect(clippy::unwrap_used, reason = "a suite of tests fails by panicking")]

mod failures;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};

pub use self::failures::failures_leave_all_or_nothing;
use super::flaky::{MeetingStore, UnguardedStore};
use super::{Batch, Entry, Guard, Key, MAX_KEY, Outcome, Store, StoreError, Write, numbered};
use crate::model::AddressSpace;
use crate::plan::{Claim, Level, Plan, PlanError, Prefix};
use crate::{Ipam, IpamConfig};

/// Checks the whole contract. `make` gives a new, empty store at each call.
///
/// # Panics
/// At the first breach.
pub fn all(make: impl Fn() -> Arc<dyn Store>) {
    reads_and_guards(&*make());
    versions_never_repeat(&*make());
    batches_apply_whole_and_in_order(&*make());
    scans_page_in_order(&*make());
    barriers_change_nothing(&*make());
    repeated_requests_apply_once(&*make());
    limits_are_refused(&*make());
    gaps_agree_with_counting(&*make());
    random_batches_agree_with_a_map(&*make());
    racers_never_both_win(&make());
    increments_are_not_lost(&make());
    overlapping_pools_are_refused_to_one_racer(&make());
    overlapping_claims_are_refused_to_one_racer(&make);
    failures_leave_all_or_nothing(&make);
    watches(make);
}

/// Checks the contract of [`Store::watch`]. `make` gives a new, empty store at each call.
///
/// # Panics
/// At the first breach.
pub fn watches(make: impl Fn() -> Arc<dyn Store>) {
    watch::tells_whole_batches_in_order(&*make());
    watch::begins_after_any_revision(&*make());
    watch::says_so_when_it_is_ahead(&*make());
    watch::two_do_not_know_of_each_other(&*make());
    watch::waits_for_what_comes(&make());
    watch::a_slow_one_misses_nothing_in_silence(&*make());
    watch::copies_agree_under_racing_writers(&make());
}

/// Runs a future on the calling thread.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

static REQUEST: AtomicUsize = AtomicUsize::new(1);

fn batch(guards: &[(&str, Option<u64>)], writes: Vec<Write>) -> Batch {
    let guards =
        guards.iter().map(|(key, version)| Guard { key: key.as_bytes().to_vec(), version: *version }).collect();
    Batch { guards, writes, request_id: REQUEST.fetch_add(1, Ordering::Relaxed) as u128 }
}

fn put(key: &str, value: &str) -> Write {
    Write::Put(key.as_bytes().to_vec(), value.as_bytes().to_vec())
}

fn delete(key: &str) -> Write {
    Write::Delete(key.as_bytes().to_vec())
}

fn read(store: &dyn Store, key: &str) -> Option<Entry> {
    block_on(store.read(&[key.as_bytes().to_vec()])).unwrap().remove(0)
}

fn commit(store: &dyn Store, batch: &Batch) -> u64 {
    match block_on(store.commit(batch)).unwrap() {
        Outcome::Committed { revision } => revision,
        other => panic!("{batch:?} ended as {other:?}"),
    }
}

fn conflict(store: &dyn Store, batch: &Batch) -> Vec<Option<Entry>> {
    match block_on(store.commit(batch)).unwrap() {
        Outcome::Conflict(current) => current,
        other => panic!("{batch:?} ended as {other:?}"),
    }
}

fn reads_and_guards(store: &dyn Store) {
    assert_eq!(read(store, "a"), None);
    let first = commit(store, &batch(&[("a", None)], vec![put("a", "1"), put("b", "2")]));
    assert_eq!(read(store, "a"), Some(Entry { value: b"1".to_vec(), version: first }));
    let both = block_on(store.read(&[b"b".to_vec(), b"x".to_vec(), b"a".to_vec()])).unwrap();
    assert_eq!(
        both.iter().map(|e| e.as_ref().map(|e| e.value.clone())).collect::<Vec<_>>(),
        [Some(b"2".to_vec()), None, Some(b"1".to_vec())]
    );
    let refused = batch(&[("x", None), ("a", None), ("b", Some(first))], vec![put("c", "3"), delete("b")]);
    let current = conflict(store, &refused);
    assert_eq!(current, [None, read(store, "a"), read(store, "b")]);
    conflict(store, &batch(&[("a", Some(first + 1))], vec![delete("a")]));
    conflict(store, &batch(&[("x", Some(first))], vec![put("x", "1")]));
    assert_eq!((read(store, "c"), read(store, "x")), (None, None));
    commit(store, &batch(&[("a", Some(first))], vec![delete("a")]));
    assert_eq!(read(store, "a"), None);
}

fn versions_never_repeat(store: &dyn Store) {
    let mut seen = BTreeSet::new();
    for _ in 0..20 {
        let made = commit(store, &batch(&[("a", None)], vec![put("a", "1")]));
        let changed = commit(store, &batch(&[("a", Some(made))], vec![put("a", "1")]));
        assert!(made < changed && seen.last() < Some(&made));
        seen.extend([made, changed]);
        commit(store, &batch(&[("a", Some(changed))], vec![delete("a")]));
        // What was learnt before the deletion does not fit what comes after.
        conflict(store, &batch(&[("a", Some(made))], vec![put("a", "late")]));
    }
}

fn batches_apply_whole_and_in_order(store: &dyn Store) {
    let revision =
        commit(store, &batch(&[], vec![put("a", "1"), delete("a"), put("b", "1"), put("b", "2"), delete("x")]));
    assert_eq!(read(store, "a"), None);
    assert_eq!(read(store, "b"), Some(Entry { value: b"2".to_vec(), version: revision }));
    commit(store, &batch(&[], vec![put("empty", "")]));
    assert_eq!(read(store, "empty").unwrap().value, b"");
}

fn scans_page_in_order(store: &dyn Store) {
    let keys: Vec<Key> = vec![
        b"p".to_vec(),
        b"p\0".to_vec(),
        b"p/1".to_vec(),
        b"p/2".to_vec(),
        b"p\xff".to_vec(),
        b"p\xff\xff".to_vec(),
    ];
    let outside = [b"o\xff".to_vec(), b"q".to_vec()];
    let writes = keys.iter().chain(&outside).map(|k| Write::Put(k.clone(), b"v".to_vec())).collect();
    commit(store, &batch(&[], writes));
    let scan = |prefix: &[u8], after: Option<&[u8]>, limit| -> Vec<Key> {
        block_on(store.scan(prefix, after, limit)).unwrap().into_iter().map(|(key, _)| key).collect()
    };
    assert_eq!(scan(b"p", None, 100), keys);
    assert_eq!(scan(b"p", None, 2), keys[..2]);
    assert_eq!(scan(b"p", Some(b"p\0"), 2), keys[2..4]);
    assert_eq!(scan(b"p", Some(b"p/15"), 9), keys[3..]);
    assert_eq!(scan(b"p", Some(b"a"), 1), keys[..1]);
    assert_eq!(scan(b"p/", None, 100), keys[2..4]);
    assert_eq!(scan(b"", None, 100).len(), 8);
    assert!(scan(b"p", Some(b"p\xff\xff"), 9).is_empty() && scan(b"z", None, 9).is_empty());
}

fn barriers_change_nothing(store: &dyn Store) {
    let revision = commit(store, &batch(&[], vec![put("a", "1")]));
    assert_eq!(commit(store, &batch(&[("a", Some(revision))], vec![])), revision);
    assert_eq!(conflict(store, &batch(&[("a", None)], vec![])), [read(store, "a")]);
    assert_eq!(commit(store, &batch(&[], vec![put("b", "1")])), revision + 1);
}

fn repeated_requests_apply_once(store: &dyn Store) {
    let request = batch(&[("a", None)], vec![put("a", "1")]);
    let revision = commit(store, &request);
    assert_eq!(commit(store, &request), revision);
    assert_eq!(read(store, "a").unwrap().version, revision);
}

fn limits_are_refused(store: &dyn Store) {
    let misuse = |batch: &Batch| matches!(block_on(store.commit(batch)), Err(StoreError::Misuse(_)));
    assert!(misuse(&batch(&[], vec![put("", "1")])));
    assert!(misuse(&batch(&[], vec![put(&"k".repeat(MAX_KEY + 1), "1")])));
    assert!(misuse(&batch(&[], vec![delete("a"); store.caps().max_operations + 1])));
    assert_eq!(block_on(store.scan(b"", None, 9)).unwrap(), []);
}

fn gaps_agree_with_counting(store: &dyn Store) {
    let edges = [0, 1 << 63, 1 << 64, u128::MAX - 5];
    let mut random = Random(7);
    let mut taken: BTreeSet<u128> = BTreeSet::new();
    for round in 0..300 {
        let base: u128 = edges[random.below(4)];
        let number = base.saturating_sub(3).saturating_add(random.below(9) as u128);
        let key = numbered(b"n/", number);
        let write = if taken.contains(&number) && random.below(3) == 0 {
            taken.remove(&number);
            Write::Delete(key)
        } else {
            taken.insert(number);
            Write::Put(key, vec![])
        };
        commit(store, &Batch { writes: vec![write, put("n0", "beside")], ..batch(&[], vec![]) });
        let low = edges[random.below(4)].saturating_sub(random.below(5) as u128);
        let high = low.saturating_add(random.below(9) as u128);
        let expected = (low..=high).find(|n| !taken.contains(n));
        let found = block_on(store.first_gap(b"n/", low..=high)).unwrap();
        assert_eq!(found, expected, "round {round}, {low}..={high} of {taken:?}");
    }
    // A long dense run, through several pages and blocks, in batches as large as they may be.
    let run: Vec<u128> = (5000..7000).collect();
    for some in run.chunks(store.caps().max_operations.min(500)) {
        let writes = some.iter().map(|n| Write::Put(numbered(b"n/", *n), vec![7; 40])).collect();
        commit(store, &Batch { writes, ..batch(&[], vec![]) });
    }
    let gap = |range| block_on(store.first_gap(b"n/", range)).unwrap();
    assert_eq!(gap(5000..=u128::MAX), Some(7000));
    assert_eq!(gap(5000..=6999), None);
    assert_eq!(gap(6999..=7000), Some(7000));
    commit(store, &Batch { writes: vec![Write::Delete(numbered(b"n/", 6123))], ..batch(&[], vec![]) });
    assert_eq!(gap(5000..=u128::MAX), Some(6123));
    assert_eq!(gap(6124..=u128::MAX), Some(7000));
}

fn random_batches_agree_with_a_map(store: &dyn Store) {
    let mut random = Random(42);
    let mut map: BTreeMap<Key, (Vec<u8>, u64)> = BTreeMap::new();
    for round in 0..1500 {
        let key = |random: &mut Random| format!("{:03}", random.below(400)).into_bytes();
        let guards: Vec<Guard> = (0..random.below(3))
            .map(|_| {
                let key = key(&mut random);
                let held = map.get(&key).map(|(_, version)| *version);
                Guard { key, version: if random.below(8) == 0 { Some(1) } else { held } }
            })
            .collect();
        let writes: Vec<Write> = (0..random.below(5))
            .map(|_| {
                let key = key(&mut random);
                if random.below(3) == 0 {
                    Write::Delete(key)
                } else {
                    Write::Put(key, vec![round as u8; random.below(200)])
                }
            })
            .collect();
        let attempt = Batch { guards, writes, ..batch(&[], vec![]) };
        let holds = attempt.guards.iter().all(|g| map.get(&g.key).map(|(_, v)| *v) == g.version);
        if !holds {
            conflict(store, &attempt);
            continue;
        }
        let revision = commit(store, &attempt);
        for write in attempt.writes {
            match write {
                Write::Delete(key) => drop(map.remove(&key)),
                Write::Put(key, value) => drop(map.insert(key, (value, revision))),
            }
        }
        if round % 100 == 0 {
            let all = block_on(store.scan(b"", None, usize::MAX)).unwrap();
            let all: Vec<_> = all.into_iter().map(|(key, e)| (key, (e.value, e.version))).collect();
            assert_eq!(all, map.clone().into_iter().collect::<Vec<_>>(), "round {round}");
            let some: Vec<Key> = (0..400).step_by(7).map(|n| format!("{n:03}").into_bytes()).collect();
            let read = block_on(store.read(&some)).unwrap();
            for (key, entry) in some.iter().zip(read) {
                assert_eq!(entry.map(|e| (e.value, e.version)).as_ref(), map.get(key), "round {round}");
            }
        }
    }
}

fn racers_never_both_win(store: &Arc<dyn Store>) {
    let wins = AtomicUsize::new(0);
    thread::scope(|scope| {
        for racer in 0..4 {
            let wins = &wins;
            scope.spawn(move || {
                for key in 0..20 {
                    let key = format!("k{key}");
                    let attempt = batch(&[(&key, None)], vec![put(&key, &format!("{racer}"))]);
                    match block_on(store.commit(&attempt)).unwrap() {
                        Outcome::Committed { .. } => drop(wins.fetch_add(1, Ordering::Relaxed)),
                        Outcome::Conflict(current) => assert!(current[0].is_some()),
                        Outcome::Unknown { reason } => panic!("{reason}"),
                    }
                }
            });
        }
    });
    assert_eq!(wins.into_inner(), 20);
}

fn increments_are_not_lost(store: &Arc<dyn Store>) {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let mut current = read(&**store, "n");
                    loop {
                        let number: u64 =
                            current.as_ref().map_or(0, |e| std::str::from_utf8(&e.value).unwrap().parse().unwrap());
                        let version = current.as_ref().map(|e| e.version);
                        let attempt = batch(&[("n", version)], vec![put("n", &(number + 1).to_string())]);
                        match block_on(store.commit(&attempt)).unwrap() {
                            Outcome::Committed { .. } => break,
                            Outcome::Conflict(mut found) => current = found.remove(0),
                            Outcome::Unknown { reason } => panic!("{reason}"),
                        }
                    }
                }
            });
        }
    });
    assert_eq!(read(&**store, "n").unwrap().value, b"80");
}

/// Two configurations whose pools overlap under different names race for the first lease: the store lets one in, and
/// the other learns the name.
fn overlapping_pools_are_refused_to_one_racer(store: &Arc<dyn Store>) {
    let mut refused = 0;
    for round in 0..10 {
        let space = format!("round{round}");
        let outcomes: Vec<Result<_, LeaseError>> = thread::scope(|scope| {
            let racers: Vec<_> = [("wide", "10.0.0.0/16"), ("narrow", "10.0.8.0/24")]
                .map(|(name, subnet)| {
                    let space = &space;
                    scope.spawn(move || {
                        let config: IpamConfig = serde_json::from_value(serde_json::json!({
                            "pools": [{ "name": name, "space": space, "subnet": subnet }]
                        }))
                        .unwrap();
                        let request = LeaseRequest::new(
                            serde_json::from_value(serde_json::json!({
                                "network": name, "container": format!("c{round}"), "ifname": "eth0"
                            }))
                            .unwrap(),
                        );
                        block_on(Ipam::new(&config, store.clone()).unwrap().lease(&request))
                    })
                })
                .into_iter()
                .collect();
            racers.into_iter().map(|r| r.join().unwrap()).collect()
        });
        assert_eq!(outcomes.iter().filter(|o| o.is_ok()).count(), 1, "{outcomes:?}");
        for outcome in outcomes {
            if let Err(error) = outcome {
                let text = error.to_string();
                assert!(text.contains("overlaps pool wide") || text.contains("overlaps pool narrow"), "{text}");
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 10);
}

/// Two claims of overlapping prefixes, which are different keys, both decided before either is committed: the store lets
/// one in, and the other learns who has it. Without the guard on the epoch of the space both get it.
fn overlapping_claims_are_refused_to_one_racer(make: impl Fn() -> Arc<dyn Store>) {
    let rounds = [["10.0.0.0/16", "10.0.7.0/24"], ["10.1.9.0/24", "10.1.0.0/16"], ["fd00:1::/32", "fd00:1:8000::/33"]];
    for (round, rivals) in rounds.iter().enumerate() {
        let store = make();
        let outcomes = two_claims(&store, rivals);
        let refused: Vec<&PlanError> = outcomes.iter().filter_map(|o| o.as_ref().err()).collect();
        assert!(matches!(refused[..], [PlanError::Overlap { .. }]), "round {round}: {outcomes:?}");
        let winner = outcomes.iter().find_map(|o| o.as_ref().ok()).unwrap();
        assert_eq!(refused[0].holder().unwrap().path, winner.path, "round {round}");
        assert_eq!(claimed(&*store).len(), 1, "round {round}");

        let unguarded: Arc<dyn Store> =
            Arc::new(UnguardedStore::new(make(), |guard| guard.key.starts_with(b"plan/e/")));
        let outcomes = two_claims(&unguarded, rivals);
        assert!(outcomes.iter().all(Result::is_ok), "round {round}, without the guard: {outcomes:?}");
        assert_eq!(claimed(&*unguarded).len(), 2, "round {round}, without the guard");
    }
}

/// What two authorities that share a store are told when they claim at the same time.
fn two_claims(store: &Arc<dyn Store>, rivals: &[&str; 2]) -> Vec<Result<Prefix, PlanError>> {
    let plan = Plan::new(store.clone(), "fleet").unwrap();
    block_on(plan.add_space(&AddressSpace::default(), &[])).unwrap();
    for cidr in ["10.0.0.0/8", "fd00::/8"] {
        block_on(plan.own(&Claim::at(cidr.parse().unwrap(), Level::Fleet, "corp", "net"))).unwrap();
    }
    let meeting = MeetingStore::over(store.clone(), b"plan/p/");
    let outcomes = thread::scope(|scope| {
        let racers: Vec<_> = rivals
            .iter()
            .zip(["one", "two"])
            .map(|(cidr, name)| {
                let meeting = meeting.clone();
                scope.spawn(move || {
                    let claim = Claim::at(cidr.parse().unwrap(), Level::Cluster, name, name);
                    block_on(Plan::new(meeting, "fleet").unwrap().claim(&claim))
                })
            })
            .collect();
        racers.into_iter().map(|r| r.join().unwrap()).collect()
    });
    assert!(meeting.met(), "one was decided after the other was committed: {outcomes:?}");
    outcomes
}

/// The keys of the prefixes of clusters, read without the plan: the last byte is the level.
fn claimed(store: &dyn Store) -> Vec<Key> {
    let all = block_on(store.scan(b"plan/p/", None, usize::MAX)).unwrap();
    all.into_iter().map(|(key, _)| key).filter(|key| key.last() == Some(&2)).collect()
}

/// Numbers that look random and are the same in each run (xorshift64*, Vigna 2016).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}
