//! What a loss of power may leave of the log's files, worked out from a record of every write, flush and rename.
//!
//! The model of the medium: a write is durable once its file was flushed after it; until then any subset of its sectors
//! (512 bytes) may be there, whatever was written before or after. A name is durable once the directory was flushed;
//! until then the operations on names that came first may be there, as journals of file systems have it. Notes in `lock`
//! are never flushed, so that all, some or none of them may be left.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use dcenet_ipam::store::log::{DiskEvent, LogStore};
use dcenet_ipam::store::{Batch, Guard, Key, Outcome, Store, Write};
use pollster::block_on;

const SECTOR: usize = 512;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Event {
    Created(String, u64),
    DirectorySynced,
    Renamed(String, String),
    Synced(u64),
    Wrote(u64, u64, Vec<u8>),
}

type Contents = BTreeMap<Key, Vec<u8>>;

/// A run of one writer: what it did to the disk, and what it told when.
struct Run {
    events: Vec<Event>,
    /// The contents after each commit.
    states: Vec<Contents>,
    /// For each commit, how many events had happened when it was sent, and when it was acknowledged.
    spans: Vec<(usize, usize)>,
}

fn contents(store: &LogStore) -> Contents {
    block_on(store.scan(b"", None, usize::MAX)).unwrap().into_iter().map(|(key, e)| (key, e.value)).collect()
}

/// Small commits, groups of commits, and ones that are large enough for merges.
fn run() -> Run {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let recorder = move |event: DiskEvent<'_>| {
        sink.lock().unwrap().push(match event {
            DiskEvent::Created(name, file) => Event::Created(name.to_owned(), file),
            DiskEvent::DirectorySynced => Event::DirectorySynced,
            DiskEvent::Renamed(from, to) => Event::Renamed(from.to_owned(), to.to_owned()),
            DiskEvent::Synced(file) => Event::Synced(file),
            DiskEvent::Wrote(file, offset, bytes) => Event::Wrote(file, offset, bytes.to_vec()),
        });
    };
    let store = LogStore::open_recorded(dir.path(), Arc::new(recorder)).unwrap();
    let (mut states, mut spans, mut request) = (vec![Contents::new()], vec![], 0);
    let pair = |name: String, value: &str| {
        let key = |half| format!("{name}.{half}").into_bytes();
        vec![Write::Put(key(1), value.into()), Write::Put(key(2), value.into())]
    };
    let mut commits: Vec<Vec<Vec<Write>>> = Vec::new();
    for era in 0..2 {
        commits.extend((0..4).map(|i| vec![pair(format!("one{era}-{i}"), "a value of some length")]));
        // Several records in one write, over some sectors.
        commits.push((0..6).map(|i| pair(format!("group{era}-{i}"), &"g".repeat(90))).collect());
        commits.push(vec![vec![
            Write::Delete(format!("one{era}-1.1").into()),
            Write::Delete(format!("one{era}-1.2").into()),
        ]]);
        // Enough operations for a merge.
        commits.push(vec![(0..130).flat_map(|i| pair(format!("many{i}"), &format!("{era}"))).collect()]);
        commits.push(vec![(0..130).flat_map(|i| pair(format!("more{i}"), &format!("{era}"))).collect()]);
    }
    for group in commits {
        let batches: Vec<Batch> = group
            .into_iter()
            .map(|writes| {
                request += 1;
                Batch { guards: vec![Guard { key: b"absent".to_vec(), version: None }], writes, request_id: request }
            })
            .collect();
        let sent = events.lock().unwrap().len();
        for outcome in block_on(store.commit_many(&batches)) {
            assert!(matches!(outcome, Ok(Outcome::Committed { .. })), "{outcome:?}");
        }
        let answered = events.lock().unwrap().len();
        for batch in batches {
            let mut state = states.last().unwrap().clone();
            for write in batch.writes {
                match write {
                    Write::Delete(key) => drop(state.remove(&key)),
                    Write::Put(key, value) => drop(state.insert(key, value)),
                }
            }
            states.push(state);
            spans.push((sent, answered));
        }
    }
    assert_eq!(contents(&store), *states.last().unwrap());
    let events = events.lock().unwrap().clone();
    assert!(events.iter().filter(|e| matches!(e, Event::Renamed(_, to) if to == "snap")).count() >= 2, "merges");
    Run { events, states, spans }
}

/// A file: what is durable of it, and the sectors that may be there as well.
#[derive(Debug, Clone, Default)]
struct File {
    durable: Vec<u8>,
    pending: Vec<(u64, Vec<u8>)>,
}

fn write(bytes: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + data.len());
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[start..end].copy_from_slice(data);
}

/// The disk after some events: what is durable and what is not.
#[derive(Debug, Clone, Default)]
struct Medium {
    files: BTreeMap<u64, File>,
    names: BTreeMap<String, u64>,
    pending_names: Vec<Event>,
}

fn rename(names: &mut BTreeMap<String, u64>, event: &Event) {
    match event {
        Event::Created(name, file) => drop(names.insert(name.clone(), *file)),
        Event::Renamed(from, to) => {
            let file = names.remove(from).unwrap();
            names.insert(to.clone(), file);
        }
        _ => unreachable!(),
    }
}

impl Medium {
    fn apply(&mut self, event: &Event) {
        match event {
            Event::Created(_, file) => {
                self.files.insert(*file, File::default());
                self.pending_names.push(event.clone());
            }
            Event::Renamed(..) => self.pending_names.push(event.clone()),
            Event::DirectorySynced => {
                for event in std::mem::take(&mut self.pending_names) {
                    rename(&mut self.names, &event);
                }
            }
            Event::Synced(file) => {
                let file = self.files.get_mut(file).unwrap();
                for (offset, data) in std::mem::take(&mut file.pending) {
                    write(&mut file.durable, offset, &data);
                }
            }
            Event::Wrote(file, offset, data) => {
                // Sector by sector, for each may be there without the others.
                let file = self.files.get_mut(file).unwrap();
                let mut at = 0;
                while at < data.len() {
                    let place = *offset as usize + at;
                    let length = (SECTOR - place % SECTOR).min(data.len() - at);
                    file.pending.push((place as u64, data[at..at + length].to_vec()));
                    at += length;
                }
            }
        }
    }

    fn lock_file(&self) -> Option<u64> {
        let created = self.pending_names.iter().find_map(|e| match e {
            Event::Created(name, file) if name == "lock" => Some(*file),
            _ => None,
        });
        self.names.get("lock").copied().or(created)
    }

    /// Everything that a loss of power may leave, as far as the number of sectors lets all be tried; beyond that each
    /// prefix, each suffix, each single one and each single one missing.
    fn images(&self, mut each: impl FnMut(&BTreeMap<String, Vec<u8>>)) {
        let lock = self.lock_file();
        let unsynced: Vec<(u64, usize)> = self
            .files
            .iter()
            .filter(|(file, _)| Some(**file) != lock)
            .flat_map(|(file, held)| (0..held.pending.len()).map(|i| (*file, i)))
            .collect();
        let n = unsynced.len();
        let subsets: Vec<Vec<bool>> = if n <= 7 {
            (0..1_usize << n).map(|bits| (0..n).map(|i| bits >> i & 1 == 1).collect()).collect()
        } else {
            let step = n.div_ceil(12);
            (0..=n)
                .step_by(step)
                .flat_map(|at| {
                    let pick = |there: &dyn Fn(usize) -> bool| (0..n).map(there).collect::<Vec<bool>>();
                    [pick(&|i| i < at), pick(&|i| i >= at), pick(&|i| i == at), pick(&|i| i != at)]
                })
                .collect()
        };
        for names in 0..=self.pending_names.len() {
            let mut tree = self.names.clone();
            self.pending_names[..names].iter().for_each(|event| rename(&mut tree, event));
            for subset in &subsets {
                let mut files = self.files.clone();
                for ((file, i), there) in unsynced.iter().zip(subset) {
                    if *there {
                        let file = files.get_mut(file).unwrap();
                        let (offset, data) = file.pending[*i].clone();
                        write(&mut file.durable, offset, &data);
                    }
                }
                // None of the notes, all of them, or those up to the middle.
                let notes = lock.map_or(0, |file| self.files[&file].pending.len());
                for count in [0, notes / 2, notes] {
                    if let Some(file) = lock {
                        let held = files.get_mut(&file).unwrap();
                        held.durable.clear();
                        for (offset, data) in &self.files[&file].pending[..count] {
                            write(&mut held.durable, *offset, data);
                        }
                    }
                    each(&tree.iter().map(|(name, file)| (name.clone(), files[file].durable.clone())).collect());
                    if notes == 0 {
                        break;
                    }
                }
            }
        }
    }
}

/// Opens what is left after each event, and judges: everything acknowledged is there, nothing is there by half. Returns
/// the images, and those that break this.
fn judge(run: &Run, counts: impl Fn(&Medium, &Event) -> bool, spoil: impl Fn(&mut Vec<u8>)) -> (usize, usize) {
    let (mut medium, mut images, mut broken) = (Medium::default(), 0, 0);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for (i, event) in run.events.iter().enumerate() {
        if counts(&medium, event) {
            medium.apply(event);
        }
        let acknowledged = run.spans.iter().filter(|(_, answered)| *answered <= i + 1).count();
        let sent = run.spans.iter().filter(|(sent, _)| *sent <= i).count();
        medium.images(|image| {
            images += 1;
            let crashed = dir.path().join("crashed");
            let _ = fs::remove_dir_all(&crashed);
            fs::create_dir(&crashed).unwrap();
            for (name, bytes) in image {
                let mut bytes = bytes.clone();
                if name == "log" {
                    spoil(&mut bytes);
                }
                fs::write(crashed.join(name), bytes).unwrap();
            }
            broken += usize::from(!holds(&crashed, &run.states[acknowledged..=sent], images % 16 == 0));
        });
    }
    (images, broken)
}

fn holds(dir: &Path, permitted: &[Contents], goes_on: bool) -> bool {
    let Ok(store) = LogStore::open(dir) else { return false };
    let Ok(all) = block_on(store.scan(b"", None, usize::MAX)) else { return false };
    let found: Contents = all.into_iter().map(|(key, e)| (key, e.value)).collect();
    if !permitted.contains(&found) {
        return false;
    }
    if !goes_on {
        return true;
    }
    // It can be written to, and others see that.
    let batch = Batch { writes: vec![Write::Put(b"next".to_vec(), vec![])], request_id: 1 << 100, ..Batch::default() };
    let next = block_on(store.commit(&batch));
    matches!(next, Ok(Outcome::Committed { .. }))
        && LogStore::open(dir).is_ok_and(|other| contents(&other).len() == found.len() + 1)
}

fn as_it_is(_: &mut Vec<u8>) {}

#[test]
fn whatever_power_loss_leaves_holds_all_that_was_acknowledged() {
    let run = run();
    let (images, broken) = judge(&run, |_, _| true, as_it_is);
    assert!(images > 2000, "{images} images of {} events", run.events.len());
    assert_eq!(broken, 0, "of {images} images");
}

fn named(medium: &Medium, name: &str, file: u64) -> bool {
    let mut names = medium.names.clone();
    medium.pending_names.iter().for_each(|event| rename(&mut names, event));
    names.get(name) == Some(&file)
}

#[test]
fn a_log_that_is_not_flushed_is_caught() {
    let counts = |medium: &Medium, e: &Event| !matches!(e, Event::Synced(file) if named(medium, "log", *file));
    let mut run = run();
    // Up to the first merge, which flushes everything.
    let merge = run.events.iter().position(|e| matches!(e, Event::Created(name, _) if name == "snap.new")).unwrap();
    run.events.truncate(merge);
    let (images, broken) = judge(&run, counts, as_it_is);
    assert!(broken > images / 10, "{broken} of {images}");
}

#[test]
fn a_snapshot_that_is_not_flushed_is_caught() {
    let counts = |medium: &Medium, e: &Event| !matches!(e, Event::Synced(file) if named(medium, "snap.new", *file));
    let mut run = run();
    let merged = run.events.iter().position(|e| matches!(e, Event::Renamed(_, to) if to == "snap")).unwrap();
    run.events.truncate(merged + 8);
    let (images, broken) = judge(&run, counts, as_it_is);
    assert!(broken > 0, "none of {images}");
}

#[test]
fn a_directory_that_is_not_flushed_is_caught() {
    let mut run = run();
    let merged = run.events.iter().position(|e| matches!(e, Event::Renamed(_, to) if to == "snap")).unwrap();
    run.events.truncate(merged + 20);
    let (images, broken) = judge(&run, |_, e| *e != Event::DirectorySynced, as_it_is);
    assert!(broken > 0, "none of {images}");
}

/// Every record is given the checksum of what is there, as if none was looked at.
#[test]
fn a_checksum_that_is_not_looked_at_is_caught() {
    let spoil = |log: &mut Vec<u8>| {
        let Some(generation) = log.get(8..16).map(<[u8]>::to_vec) else { return };
        let mut at = 64;
        while at + 24 <= log.len() {
            let length = u32::from_le_bytes(log[at..at + 4].try_into().unwrap()) as usize;
            if length < 16 || at + 24 + length > log.len() {
                return;
            }
            let frame = &log[at..at + 24 + length];
            let sum = [&generation, (at as u64).to_le_bytes().as_slice(), &frame[..4], &frame[8..]].concat();
            let crc = crc32fast::hash(&sum).to_le_bytes();
            log[at + 4..at + 8].copy_from_slice(&crc);
            at += (24 + length).next_multiple_of(8);
        }
    };
    let mut run = run();
    let merge = run.events.iter().position(|e| matches!(e, Event::Created(name, _) if name == "snap.new")).unwrap();
    run.events.truncate(merge);
    let (images, broken) = judge(&run, |_, _| true, spoil);
    assert!(broken > 0, "none of {images}");
}
