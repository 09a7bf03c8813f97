//! Watching the log: over merges, after crashes, and from one process to another.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use dcenet_ipam::store::log::{DiskCall, LogStore};
use dcenet_ipam::store::{Batch, Change, Entry, Key, Outcome, Store, Watch, Write};
use pollster::block_on;

const SOON: Duration = Duration::from_secs(60);

/// Writes `k/NAME` and `k/NAME+` with one value.
fn put(store: &LogStore, name: &str, value: &str, request_id: u128) -> u64 {
    let writes = vec![
        Write::Put(format!("k/{name}").into(), value.into()),
        Write::Put(format!("k/{name}+").into(), value.into()),
    ];
    match block_on(store.commit(&Batch { guards: vec![], writes, request_id })).unwrap() {
        Outcome::Committed { revision } => revision,
        other => panic!("{other:?}"),
    }
}

fn watch(store: &LogStore, after: u64) -> Box<dyn Watch> {
    block_on(store.watch(b"k/", after)).unwrap()
}

fn next(watch: &mut dyn Watch) -> Change {
    block_on(watch.next(SOON)).unwrap().expect("nothing came within a minute")
}

fn now(watch: &mut dyn Watch) -> Option<Change> {
    block_on(watch.next(Duration::ZERO)).unwrap()
}

/// The revision of a change that has both writes of a batch.
fn whole(change: &Change) -> u64 {
    let Change::Writes { revision, writes } = change else { panic!("{change:?}") };
    let [(one, Some(a)), (two, Some(b))] = &writes[..] else { panic!("{change:?}") };
    assert!(*two == [one.as_slice(), b"+"].concat() && a == b && a.version == *revision, "{change:?}");
    *revision
}

#[test]
fn a_watch_follows_over_merges_and_a_late_one_is_told_the_gap() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let writer = LogStore::open(dir.path()).unwrap();
    let reader = LogStore::open(dir.path()).unwrap();
    let (mut close, mut slow, mut twice) = (watch(&reader, 0), watch(&reader, 0), watch(&reader, 0));
    let (mut merges, mut generation) = (0, vec![]);
    for i in 1..=1200 {
        put(&writer, &format!("{i:04}"), "v", i);
        assert_eq!(whole(&next(&mut *close)), i as u64);
        let header = fs::read(dir.path().join("log")).unwrap()[..64].to_vec();
        merges += usize::from(header != generation && i > 1);
        generation = header;
        if merges == 1 && i < 600 {
            // Over one merge the slow one has missed nothing.
            while let Some(change) = now(&mut *slow) {
                whole(&change);
            }
        }
    }
    assert!(merges >= 3, "{merges} merges");
    assert_eq!(now(&mut *close), None);
    // Others begin anew where the log does, and tell everything from there on.
    for late in [&mut twice, &mut slow, &mut watch(&writer, 0), &mut watch(&writer, 300)] {
        let mut position = None;
        while let Some(change) = now(&mut **late) {
            match (&change, position) {
                (Change::Gap { revision }, _) => position = Some(*revision),
                (_, Some(before)) => {
                    assert_eq!(whole(&change), before + 1);
                    position = Some(before + 1);
                }
                (_, None) => drop(whole(&change)),
            }
        }
        assert_eq!(position, Some(1200), "no gap was told");
    }
    assert_eq!(now(&mut *watch(&writer, 1200)), None);
}

#[test]
fn what_a_killed_writer_left_half_written_is_never_told() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = LogStore::open(dir.path()).unwrap();
    put(&store, "a", "value", 1);
    let log = dir.path().join("log");
    let before = fs::read(&log).unwrap();
    put(&store, "b", "value", 2);
    let after = fs::read(&log).unwrap();
    let changed: Vec<usize> = (0..before.len()).filter(|i| before[*i] != after[*i]).collect();
    let (start, end) = (changed[0], *changed.last().unwrap() + 1);
    for at in (start + 1..end).step_by(3) {
        let copy = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::write(copy.path().join("log"), &before).unwrap();
        let store = LogStore::open(copy.path()).unwrap();
        let mut changes = watch(&store, 0);
        assert_eq!(whole(&next(&mut *changes)), 1);
        let torn = [&after[..at], &before[at..]].concat();
        fs::write(copy.path().join("log"), torn).unwrap();
        assert_eq!(now(&mut *changes), None, "torn at {at}");
        // The next commit takes its place, and its revision.
        assert_eq!(put(&LogStore::open(copy.path()).unwrap(), "c", "value", 3), 2);
        let change = next(&mut *changes);
        assert_eq!(whole(&change), 2);
        assert!(matches!(&change, Change::Writes { writes, .. } if writes[0].0 == b"k/c"), "{change:?}");
    }
}

/// Calls that a merge makes, each failing once: a watch tells everything all the same.
#[test]
fn a_merge_that_fails_anywhere_takes_nothing_from_a_watch() {
    let mut merges = BTreeSet::new();
    for call in [DiskCall::Create, DiskCall::Rename, DiskCall::SyncDir, DiskCall::Sync] {
        for at in 1..=4 {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let (calls, armed) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
            let arm = armed.clone();
            let fault = move |made| {
                // Flushes of a commit come before those of the merge only where its log grows to its bound.
                let counts = made == call && arm.load(Ordering::Relaxed) == 1;
                let fails = counts && calls.fetch_add(1, Ordering::Relaxed) + 1 == at;
                if fails { Err(std::io::Error::from_raw_os_error(5)) } else { Ok(()) }
            };
            let store = LogStore::open_with_faults(dir.path(), Arc::new(fault)).unwrap();
            let mut changes = watch(&store, 0);
            let mut told = Vec::new();
            for i in 1..=600 {
                // The merge comes with the operation number 512.
                armed.store(u64::from((255..=260).contains(&i)), Ordering::Relaxed);
                let name = format!("{i:04}");
                let writes = vec![
                    Write::Put(format!("k/{name}").into(), "v".into()),
                    Write::Put(format!("k/{name}+").into(), "v".into()),
                ];
                let batch = Batch { guards: vec![], writes, request_id: i };
                while !matches!(block_on(store.commit(&batch)), Ok(Outcome::Committed { .. })) {}
                while let Some(change) = now(&mut *changes) {
                    told.push(whole(&change));
                }
            }
            merges.insert(fs::read(dir.path().join("log")).unwrap()[8]);
            assert_eq!(told, (1..=600).collect::<Vec<u64>>(), "{call:?} number {at}");
        }
    }
    assert!(merges.iter().all(|generation| *generation > 1), "generations {merges:?}");
}

const WRITERS: usize = 4;
const COMMITS: usize = 150;

/// Commits pairs as the CNI binary does, a store for each. Not a test of its own: it is started with
/// `DCENET_IPAM_WRITER`.
#[test]
#[ignore = "run by another test"]
fn writer() {
    let Some(job) = std::env::var_os("DCENET_IPAM_WRITER") else { panic!("run by another test") };
    let job = job.into_string().unwrap();
    let (name, dir) = job.split_once(' ').unwrap();
    for i in 0..COMMITS {
        let store = LogStore::open(Path::new(dir)).unwrap();
        let request = u128::from(std::process::id()) << 64 | i as u128;
        let revision = put(&store, &format!("{name}-{}", i % 20), &i.to_string(), request);
        let mut out = std::io::stdout().lock();
        out.write_all(format!("@wrote {revision} {name}-{} {i}\n", i % 20).as_bytes()).unwrap();
        out.flush().unwrap();
    }
}

fn spawn(name: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "log_watch::writer", "--ignored", "--nocapture"])
        .env("DCENET_IPAM_WRITER", format!("{name} {}", dir.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Four processes write, most of them are killed in the middle; two watches in this one, of which one dawdles.
#[test]
fn processes_that_are_killed_are_watched_without_a_hole() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let ours = LogStore::open(dir.path()).unwrap();
    let start = put(&ours, "start", "v", 1);
    let (ledger, copies) = thread::scope(|scope| {
        let copies = [0, 40].map(|pause| {
            let path = dir.path();
            scope.spawn(move || follow(&LogStore::open(path).unwrap(), start, Duration::from_millis(pause)))
        });
        let slots: Vec<_> = (0..WRITERS)
            .map(|slot| {
                let path = dir.path();
                scope.spawn(move || {
                    let mut wrote = Vec::new();
                    for life in 0..4 {
                        let mut child = spawn(&format!("w{slot}-{life}"), path);
                        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
                        // Killed when it has told so many commits, the last life never: wherever it is just then.
                        let until = if life < 3 { 10 + slot * 7 + life * 13 } else { usize::MAX };
                        for line in lines.map_while(Result::ok) {
                            let Some((_, line)) = line.split_once("@wrote ") else { continue };
                            wrote.push(line.to_owned());
                            if wrote.len() == until {
                                child.kill().unwrap();
                            }
                        }
                        let status = child.wait().unwrap();
                        assert!(life < 3 || status.success(), "a writer failed");
                    }
                    wrote
                })
            })
            .collect();
        let ledger: Vec<String> = slots.into_iter().flat_map(|s| s.join().unwrap()).collect();
        put(&ours, "~end", "v", 2);
        (ledger, copies.map(|c| c.join().unwrap()))
    });
    assert!(ledger.len() >= WRITERS * COMMITS, "{} commits", ledger.len());
    let there: BTreeMap<Key, Entry> = block_on(ours.scan(b"k/", None, usize::MAX)).unwrap().into_iter().collect();
    for (told, gaps, copy) in copies {
        assert_eq!(copy, there);
        for line in &ledger {
            // A line that a kill cut short names nothing.
            let words: Vec<&str> = line.split(' ').collect();
            let [revision, name, value] = words[..] else { continue };
            let revision: u64 = revision.parse().unwrap();
            match told.get(&revision) {
                Some((key, was)) => assert_eq!((key, was), (&format!("k/{name}"), &value.to_owned())),
                None => assert!(gaps.iter().any(|(from, to)| *from < revision && revision <= *to), "{line} unheard of"),
            }
        }
    }
}

type Told = (BTreeMap<u64, (String, String)>, Vec<(u64, u64)>, BTreeMap<Key, Entry>);

/// Keeps a copy until the end is written. Returns the first key and value of each revision, the gaps, and the copy.
fn follow(store: &LogStore, start: u64, pause: Duration) -> Told {
    let scan = || block_on(store.scan(b"k/", None, usize::MAX)).unwrap().into_iter().collect::<BTreeMap<_, _>>();
    let mut changes = watch(store, start);
    let (mut told, mut gaps, mut copy, mut position) = (BTreeMap::new(), vec![], scan(), start);
    loop {
        let change = next(&mut *changes);
        assert!(change.revision() > position, "{change:?} after {position}");
        match &change {
            Change::Gap { revision } => {
                gaps.push((position, *revision));
                copy = scan();
            }
            Change::Writes { revision, writes } => {
                whole(&change);
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                let value = writes[0].1.as_ref().map(|e| text(&e.value)).unwrap();
                told.insert(*revision, (text(&writes[0].0), value));
                for (key, entry) in writes {
                    if copy.get(key).is_none_or(|held| held.version < *revision) {
                        copy.insert(key.clone(), entry.clone().unwrap());
                    }
                }
            }
        }
        position = change.revision();
        if copy.get(b"k/~end+".as_slice()).is_some_and(|end| end.version <= position) {
            return (told, gaps, copy);
        }
        thread::sleep(pause);
    }
}
