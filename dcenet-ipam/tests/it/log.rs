//! The log store: what crashes, damage and failing calls leave of it.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dcenet_ipam::store::log::{DiskCall, LogStore};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Entry, Key, Outcome, Store, StoreError, Write, conformance};
use pollster::block_on;

fn put(store: &LogStore, key: &str, value: &str) -> Outcome {
    static REQUEST: AtomicU64 = AtomicU64::new(1);
    let writes = vec![Write::Put(key.into(), value.into()), Write::Put(format!("{key}+").into(), value.into())];
    let request_id = REQUEST.fetch_add(1, Ordering::Relaxed).into();
    block_on(store.commit(&Batch { guards: vec![], writes, request_id })).unwrap()
}

fn all(store: &LogStore) -> Vec<(Key, Entry)> {
    block_on(store.scan(b"", None, usize::MAX)).unwrap()
}

/// The files of a store as a power loss may leave them: with the log given, and without what processes only tell each
/// other.
fn image(from: &Path, to: &Path, log: &[u8]) {
    if from.join("snap").exists() {
        fs::copy(from.join("snap"), to.join("snap")).unwrap();
    }
    fs::write(to.join("log"), log).unwrap();
}

#[test]
fn backends_conform() {
    conformance::all(|| Arc::new(MemoryStore::new()));
    let dirs = tempfile::tempdir_in("/dev/shm").unwrap();
    let number = AtomicU64::new(0);
    conformance::all(|| {
        let dir = dirs.path().join(number.fetch_add(1, Ordering::Relaxed).to_string());
        Arc::new(LogStore::open(&dir).unwrap())
    });
}

#[test]
fn files_are_private_and_missing_directories_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("a/b");
    let store = LogStore::open(&deep).unwrap();
    put(&store, "k", "v");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&deep), mode(&deep.join("log")), mode(&deep.join("lock"))), (0o700, 0o600, 0o600));
    let blocked = dir.path().join("file");
    fs::write(&blocked, "").unwrap();
    let error = LogStore::open(&blocked.join("x")).unwrap_err();
    assert!(matches!(&error, StoreError::Io { doing, .. } if doing.contains("file/x")), "{error}");
}

#[test]
fn another_handle_sees_every_commit_also_over_merges() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let writer = LogStore::open(dir.path()).unwrap();
    let reader = LogStore::open(dir.path()).unwrap();
    for i in 0..1200 {
        put(&writer, &format!("k{i:04}"), "v");
        let entry = block_on(reader.read(&[format!("k{i:04}").into()])).unwrap().remove(0).unwrap();
        assert_eq!(entry.version, i + 1);
    }
    assert!(dir.path().join("snap").exists());
    assert_eq!(all(&reader), all(&writer));
    assert_eq!(all(&LogStore::open(dir.path()).unwrap()).len(), 2400);
    // The reader's handle is as good for writing: nothing goes to a file that was replaced.
    put(&reader, "last", "v");
    assert_eq!(all(&writer).len(), 2402);
}

/// Somebody removes the directory of a store that a daemon has open, and another process makes it anew: both must exclude each
/// other still.
#[test]
fn a_replaced_directory_has_one_lock_for_those_of_before_and_after() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let before = LogStore::open(&path).unwrap();
    put(&before, "old", "v");
    fs::remove_dir_all(&path).unwrap();
    let after = LogStore::open(&path).unwrap();
    put(&after, "new", "v");

    let lock = fs::File::open(path.join("lock")).unwrap();
    lock.lock().unwrap();
    std::thread::scope(|scope| {
        let (done, is_done) = std::sync::mpsc::channel();
        let store = &before;
        scope.spawn(move || {
            put(store, "late", "v");
            done.send(()).unwrap();
        });
        let early = is_done.recv_timeout(std::time::Duration::from_millis(300));
        assert!(early.is_err(), "it waits for the lock of the directory that is there");
        lock.unlock().unwrap();
        is_done.recv_timeout(std::time::Duration::from_secs(60)).expect("it goes on then");
    });
    let keys: Vec<String> = all(&after).iter().map(|(key, _)| String::from_utf8_lossy(key).into_owned()).collect();
    assert_eq!(keys, ["late", "late+", "new", "new+"]);
    assert_eq!(all(&before), all(&after));

    // Removed, and made anew by nobody: the next commit does.
    fs::remove_dir_all(&path).unwrap();
    put(&before, "alone", "v");
    assert_eq!(all(&LogStore::open(&path).unwrap()).len(), 2);
}

#[test]
fn a_log_torn_at_any_byte_keeps_what_was_acknowledged() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = LogStore::open(dir.path()).unwrap();
    for i in 0..3 {
        put(&store, &format!("k{i}"), "value");
    }
    let before = (fs::read(dir.path().join("log")).unwrap(), all(&store));
    put(&store, "torn", "value of the commit that is torn");
    let after = (fs::read(dir.path().join("log")).unwrap(), all(&store));
    let changed: Vec<usize> = (0..before.0.len()).filter(|i| before.0[*i] != after.0[*i]).collect();
    let (start, end) = (changed[0], *changed.last().unwrap() + 1);
    assert!(end - start > 100);
    let (mut whole, mut cut) = (0, 0);
    for at in start..=end {
        // Its front written and not its end, and the other way round.
        for (front, back) in [(&after.0, &before.0), (&before.0, &after.0)] {
            let torn: Vec<u8> = front[..at].iter().chain(&back[at..]).copied().collect();
            let crashed = tempfile::tempdir_in("/dev/shm").unwrap();
            image(dir.path(), crashed.path(), &torn);
            let store = LogStore::open(crashed.path()).unwrap();
            let found = all(&store);
            if found == after.1 {
                whole += 1;
            } else {
                assert_eq!(found, before.1, "torn at {at}");
                cut += 1;
            }
            // It goes on from there, for others too.
            assert!(matches!(put(&store, "next", "v"), Outcome::Committed { .. }));
            assert_eq!(all(&LogStore::open(crashed.path()).unwrap()).len(), found.len() + 2);
        }
    }
    assert_eq!((whole, cut), (2, (end - start) * 2));
}

#[test]
fn damage_to_what_was_durable_is_refused() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = LogStore::open(dir.path()).unwrap();
    for i in 0..4 {
        put(&store, &format!("k{i}"), "value");
    }
    let before = fs::read(dir.path().join("log")).unwrap();
    let last_frame = before.iter().rposition(|b| *b != 0).unwrap() + 1;
    put(&store, "k4", "value");
    let log = fs::read(dir.path().join("log")).unwrap();
    let used = log.iter().rposition(|b| *b != 0).unwrap() + 1;
    let mut refused = 0;
    for at in 0..used {
        let mut damaged = log.clone();
        damaged[at] ^= 0x10;
        let copy = tempfile::tempdir_in("/dev/shm").unwrap();
        image(dir.path(), copy.path(), &damaged);
        match LogStore::open(copy.path()) {
            Err(StoreError::Corrupt { file, .. }) => {
                assert!(file.ends_with("/log"));
                refused += 1;
            }
            Err(error) => panic!("{error}"),
            // Nothing follows the last record, so that it looks like one that was never finished. Up to 7 bytes between
            // records mean nothing.
            Ok(store) => assert!(at >= last_frame && all(&store).len() == 8 || all(&store).len() == 10, "byte {at}"),
        }
    }
    assert!(refused > used * 3 / 4, "{refused} of {used}");
    // With the notes of the processes the last record is known to have been durable as well.
    let last = used - 8;
    let mut damaged = log.clone();
    damaged[last] ^= 0x10;
    fs::write(dir.path().join("log"), &damaged).unwrap();
    assert!(matches!(LogStore::open(dir.path()).unwrap_err(), StoreError::Corrupt { .. }));
    fs::remove_file(dir.path().join("log")).unwrap();
    fs::write(dir.path().join("snap"), b"short").unwrap();
    assert!(matches!(LogStore::open(dir.path()).unwrap_err(), StoreError::Corrupt { .. }));
}

#[test]
fn a_damaged_snapshot_is_refused_where_it_is_read() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = LogStore::open(dir.path()).unwrap();
    for i in 0..300 {
        put(&store, &format!("k{i:03}"), "value");
    }
    drop(store);
    let snap = fs::read(dir.path().join("snap")).unwrap();
    for at in (0..snap.len()).step_by(97) {
        let mut damaged = snap.clone();
        damaged[at] ^= 1;
        fs::write(dir.path().join("snap"), damaged).unwrap();
        let outcome = LogStore::open(dir.path()).and_then(|s| block_on(s.scan(b"", None, usize::MAX)));
        // Only inner blocks that this scan does not cross go unread.
        match outcome {
            Err(StoreError::Corrupt { file, .. }) => assert!(file.ends_with("/snap")),
            Err(error) => panic!("{error}"),
            Ok(found) => assert_eq!(found.len(), 600, "byte {at}"),
        }
    }
}

type Fault = Arc<dyn Fn(DiskCall) -> io::Result<()> + Send + Sync>;

/// Fails the n-th call that changes the disk; 0 never.
fn failing(at: u64) -> (Arc<AtomicU64>, Fault) {
    let calls = Arc::new(AtomicU64::new(0));
    let counter = calls.clone();
    let fault = move |_| {
        let full = counter.fetch_add(1, Ordering::Relaxed) + 1 == at;
        if full { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
    };
    (calls, Arc::new(fault))
}

#[test]
fn each_failing_call_leaves_the_store_as_before_or_done() {
    // Large values, so that the run passes through growth of the log and a merge.
    let value = "v".repeat(600);
    let (mut at, mut failed) = (0, 0);
    loop {
        at += 1;
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (calls, fault) = failing(at);
        let mut acknowledged = Vec::new();
        if let Ok(store) = LogStore::open_with_faults(dir.path(), fault.clone()) {
            for i in 0..300 {
                let key = format!("k{i:03}");
                let batch = Batch {
                    guards: vec![],
                    writes: vec![Write::Put(key.clone().into(), value.clone().into()), Write::Delete("x".into())],
                    request_id: u128::from(at) << 64 | i,
                };
                match block_on(store.commit(&batch)) {
                    Ok(Outcome::Committed { .. }) => acknowledged.push(key.clone()),
                    Ok(Outcome::Unknown { .. }) => {
                        failed += 1;
                        // The same request heals: it is there once, and durable.
                        assert!(matches!(block_on(store.commit(&batch)).unwrap(), Outcome::Committed { .. }));
                        acknowledged.push(key.clone());
                    }
                    Ok(Outcome::Conflict(_)) => panic!("no guards"),
                    Err(_) => {
                        failed += 1;
                        assert_eq!(block_on(store.read(&[key.clone().into()])).unwrap(), [None], "call {at}");
                        assert!(matches!(block_on(store.commit(&batch)).unwrap(), Outcome::Committed { .. }));
                        acknowledged.push(key.clone());
                    }
                }
                if failed > 0 && calls.load(Ordering::Relaxed) > at + 20 {
                    break;
                }
            }
        }
        let store = LogStore::open(dir.path()).unwrap();
        let found: Vec<String> = all(&store).into_iter().map(|(k, _)| String::from_utf8(k).unwrap()).collect();
        assert_eq!(found, acknowledged, "call {at}");
        if calls.load(Ordering::Relaxed) < at {
            break;
        }
        // The long middle of the run repeats itself.
        if at == 60 {
            at = 740;
        }
    }
    assert!(at > 790 && failed > 50, "the run has {at} calls, of which {failed} failed");
}

#[test]
fn a_failed_flush_is_never_trusted_again() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let other = LogStore::open(dir.path()).unwrap();
    put(&other, "a", "1");
    let (syncs, fault) = {
        let syncs = Arc::new(AtomicU64::new(0));
        let counter = syncs.clone();
        let fault = move |call| {
            let fails = call == DiskCall::Sync && counter.fetch_add(1, Ordering::Relaxed) == 0;
            if fails { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) }
        };
        (syncs, Arc::new(fault))
    };
    let store = LogStore::open_with_faults(dir.path(), fault).unwrap();
    assert!(matches!(put(&store, "b", "2"), Outcome::Unknown { .. }));
    assert_eq!(syncs.load(Ordering::Relaxed), 1);
    assert!(!dir.path().join("snap").exists());
    // Another process, which never saw the error, does not build on the file either: it writes a new one.
    assert!(matches!(put(&other, "c", "3"), Outcome::Committed { .. }));
    assert!(dir.path().join("snap").exists());
    assert_eq!(all(&store).len(), 6);
}

#[test]
fn a_hole_left_by_unflushed_commits_is_no_damage() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let other = Arc::new(LogStore::open(dir.path()).unwrap());
    put(&other, "old", "1");
    let log = dir.path().join("log");
    let used = |bytes: &[u8]| bytes.iter().rposition(|b| *b != 0).unwrap() + 1;
    let before = fs::read(&log).unwrap();
    // While the first commit is about to be flushed, a second one follows it: neither was acknowledged.
    let (sent, images) = std::sync::mpsc::channel();
    let armed = AtomicU64::new(0);
    let path = log.clone();
    let rival = other.clone();
    let fault: Fault = Arc::new(move |call| {
        if call == DiskCall::Sync && armed.fetch_add(1, Ordering::Relaxed) == 0 {
            let first = fs::read(&path).unwrap();
            let rival = rival.clone();
            let thread = std::thread::spawn(move || put(&rival, "second", "3"));
            let mut both = fs::read(&path).unwrap();
            while used(&both) < used(&first) + 40 {
                std::thread::yield_now();
                both = fs::read(&path).unwrap();
            }
            sent.send((first, both, thread)).unwrap();
        }
        Ok(())
    });
    let store = LogStore::open_with_faults(dir.path(), fault).unwrap();
    assert!(matches!(put(&store, "first", "2"), Outcome::Committed { .. }));
    let (first, both, thread) = images.recv().unwrap();
    assert!(matches!(thread.join().unwrap(), Outcome::Committed { .. }));
    assert_eq!(all(&store).len(), 6);
    // Power is lost before either flush, and of the two only the second has reached the disk.
    let hole: Vec<u8> =
        both.iter().enumerate().map(|(i, b)| if first[i] == before[i] { *b } else { before[i] }).collect();
    assert!(used(&hole) > used(&first));
    let crashed = tempfile::tempdir_in("/dev/shm").unwrap();
    image(dir.path(), crashed.path(), &hole);
    let store = LogStore::open(crashed.path()).unwrap();
    assert_eq!(all(&store).len(), 2);
    put(&store, "next", "4");
    assert_eq!(all(&LogStore::open(crashed.path()).unwrap()).len(), 4);
}

#[test]
fn parallel_commits_share_flushes() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let reader = Arc::new(LogStore::open(dir.path()).unwrap());
    // The first flush takes so long that seven others append and wait meanwhile.
    let flushes = Arc::new(AtomicU64::new(0));
    let counter = flushes.clone();
    let slow: Fault = Arc::new(move |call| {
        if call == DiskCall::Sync && counter.fetch_add(1, Ordering::Relaxed) == 0 {
            while all(&reader).len() < 16 {
                std::thread::yield_now();
            }
        }
        Ok(())
    });
    std::thread::scope(|scope| {
        for i in 0..8 {
            let (dir, slow) = (dir.path(), slow.clone());
            scope.spawn(move || {
                // A handle each, as processes have.
                let store = LogStore::open_with_faults(dir, slow).unwrap();
                assert!(matches!(put(&store, &format!("k{i}"), "v"), Outcome::Committed { .. }));
            });
        }
    });
    // The second covers the rest, but for a frame that was appended and not yet noted when it began.
    let flushes = flushes.load(Ordering::Relaxed);
    assert!((2..=3).contains(&flushes), "{flushes} flushes for 8 commits");
}
