//! An append log with a snapshot: shared by any number of processes on one machine, without a daemon.
//!
//! # Files
//! - `lock`: locked with flock(2) by whoever appends; also holds two hints (below). Never replaced.
//! - `log`: frames, one a commit, each with a checksum; see `frame.rs`.
//! - `snap`: a sorted run of all records up to the log's base; see `snapshot.rs`. Searched by positioned reads, never
//!   read whole. Absent until the first merge.
//!
//! A store is the snapshot with the log's writes laid over it. When the log has grown past a bound, the committer that
//! sees it merges both: new `snap` under a temporary name, flushed, renamed, directory flushed; then a new, empty `log`
//! of the same new generation likewise. A log whose generation is below the snapshot's is contained in it and ignored.
//!
//! # Commit
//! Under the lock: notice whether the files were replaced, read the frames of others, check the guards, write one
//! frame. Then, outside that lock, make it durable and only then reply. Flushing has a lock of its own (on the log
//! file), under which the flusher notes in `lock` up to where the log is durable: who waits meanwhile finds its frame
//! already flushed by another and does nothing. So n processes share flushes instead of queueing for n.
//!
//! Flushing outside the lock is right because fdatasync(2) of a file covers all its bytes: a commit that read or
//! followed an unflushed frame of another is acknowledged only after a flush that began later, which made that frame
//! durable too. No reply can therefore survive a crash that what it rests on does not. Replies that only read are the
//! exception; a barrier (a commit without writes) gives them the same footing. An answer `Conflict` may rest on a frame
//! that a loss of power undoes: a refusal that was right when given.
//!
//! The lock orders frames, so two facts follow for recovery: a frame that is damaged and lies below the noted durable
//! offset, or below the `durable` field of a later sound frame, was once flushed: the medium lost it, and the store
//! refuses to open ([`StoreError::Corrupt`]). Any other damaged frame was never acknowledged (a writer was killed in
//! the middle, or power was lost with pages written in another order), and it and all behind it are cut.
//!
//! Space is written with zeros ahead in steps, so that flushing a frame changes no metadata of the file and needs no
//! journal commit of the file system.
//!
//! # Failing flushes
//! After a failed fdatasync(2) Linux takes the pages for clean: trying again would succeed and prove nothing, and so
//! would reading back. The commit ends as `Unknown`, the log is marked as not trusted in `lock`, and the next commit
//! of any process first writes everything to new files, or fails.
//!
//! # Readers
//! They take no lock: a frame that is not whole fails its checksum. On anything unexpected they take the lock and look
//! again.
//!
//! The directory must be on a local file system: flock(2) and rename(2) are trusted.

mod disk;
mod frame;
mod hints;
mod snapshot;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::{Bound, RangeInclusive};
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use self::disk::{Disk, Identity};
use self::frame::HEADER;
use self::hints::Hints;
use self::snapshot::{Snapshot, Writer};
use super::{
    Batch, Caps, Durability, Entry, Key, Outcome, Sharing, Store, StoreError, Write, check, number_of, numbered,
};

pub use self::disk::{DiskCall, DiskUse};

/// A store in a directory, shared by processes.
#[derive(Debug)]
pub struct LogStore {
    disk: Disk,
    lock: File,
    view: Mutex<View>,
    /// Held by the thread that flushes, for flock(2) tells processes apart, not threads of one descriptor.
    flushing: Mutex<()>,
}

/// What this process knows of the files.
#[derive(Debug)]
struct View {
    log: Arc<Log>,
    snapshot: Option<Snapshot>,
    snapshot_identity: Option<Identity>,
    /// Where the next frame goes.
    end: u64,
    /// Bytes of the file, zero beyond `end`.
    allocated: u64,
    revision: u64,
    /// What the log lays over the snapshot; `None` is a deletion.
    tail: BTreeMap<Key, Option<Entry>>,
    requests: HashMap<u128, u64>,
    /// Operations in the log.
    operations: u64,
    /// A merge failed at this many operations; the next try waits for as many more.
    merge_failed_at: u64,
}

#[derive(Debug)]
struct Log {
    file: File,
    identity: Identity,
    generation: u64,
    /// Contained in the snapshot: a merge was cut short before it replaced the log.
    stale: bool,
}

/// What the frames after some offset amount to.
#[derive(Debug, PartialEq, Eq)]
enum Tail {
    /// All sound, zeros behind.
    Clean,
    /// Something else behind the last sound frame.
    Dirty,
}

impl LogStore {
    /// Opens the store in a directory. Directory (mode 0700) and files (mode 0600) are made if absent.
    ///
    /// # Errors
    /// [`StoreError::Io`] where the system refuses, [`StoreError::Corrupt`] where durable data is damaged.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_disk(Disk::new(dir, None))
    }

    /// As [`LogStore::open`], asking `fault` before each call that changes the disk; an error it returns takes the
    /// call's place.
    #[cfg(feature = "test-support")]
    pub fn open_with_faults(
        dir: &Path,
        fault: Arc<dyn Fn(DiskCall) -> std::io::Result<()> + Send + Sync>,
    ) -> Result<Self, StoreError> {
        Self::open_disk(Disk::new(dir, Some(fault)))
    }

    fn open_disk(disk: Disk) -> Result<Self, StoreError> {
        disk.make_dir()?;
        let lock = disk.open_or_create(LOCK)?;
        let view = match View::open(&disk)? {
            // Fewer frames than were once durable: look again under the lock before calling it damage.
            Some((view, Tail::Clean)) if Hints::read(&disk, &lock)?.durable_of(view.log.generation) <= view.end => view,
            _ => {
                disk.lock(&lock, LOCK)?;
                let view = View::open_locked(&disk, &lock);
                disk.unlock(&lock, LOCK);
                view?
            }
        };
        Ok(Self { disk, lock, view: Mutex::new(view), flushing: Mutex::new(()) })
    }

    /// What this store has asked of the system since it was opened.
    pub fn disk_use(&self) -> DiskUse {
        self.disk.usage()
    }

    /// Brings the view up to date without the lock.
    fn refresh(&self, view: &mut View) -> Result<(), StoreError> {
        let clean = if view.current(&self.disk)? {
            view.catch_up(&self.disk)? == Tail::Clean
        } else {
            match View::open(&self.disk)? {
                Some((fresh, tail)) => {
                    *view = fresh;
                    tail == Tail::Clean
                }
                None => false,
            }
        };
        if !clean {
            self.locked(|| View::open_locked(&self.disk, &self.lock).map(|fresh| *view = fresh))?;
        }
        Ok(())
    }

    fn locked<T>(&self, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.disk.lock(&self.lock, LOCK)?;
        let result = work();
        self.disk.unlock(&self.lock, LOCK);
        result
    }

    /// Brings the view up to date and makes it fit to append to. The caller holds the lock.
    fn refresh_locked(&self, view: &mut View) -> Result<(), StoreError> {
        let sound = view.current(&self.disk)? && !view.log.stale && view.catch_up(&self.disk)? == Tail::Clean;
        if !sound {
            *view = View::open_locked(&self.disk, &self.lock)?;
        }
        if Hints::read(&self.disk, &self.lock)?.distrusted == view.log.generation {
            tracing::warn!(dir = %self.disk.path("").display(), "rewriting the store after a failed flush");
            view.merge(&self.disk)?;
        }
        Ok(())
    }

    fn apply(&self, view: &mut View, batch: &Batch) -> Result<Applied, StoreError> {
        self.refresh_locked(view)?;
        if let Some(&revision) = view.requests.get(&batch.request_id) {
            return Ok(Applied::Yes { revision, log: view.log.clone(), end: view.end, own: false });
        }
        let mut holds = true;
        let mut current = Vec::with_capacity(batch.guards.len());
        for guard in &batch.guards {
            let entry = view.get(&self.disk, &guard.key)?;
            holds &= entry.as_ref().map(|e| e.version) == guard.version;
            current.push(entry);
        }
        if !holds {
            return Ok(Applied::No(current));
        }
        if batch.writes.is_empty() {
            let revision = view.revision;
            return Ok(Applied::Yes { revision, log: view.log.clone(), end: view.end, own: false });
        }
        let revision = view.revision + 1;
        let durable = Hints::read(&self.disk, &self.lock)?.durable_of(view.log.generation);
        let bytes = frame::encode(view.log.generation, view.end, revision, durable, batch);
        view.reserve(&self.disk, bytes.len())?;
        if let Err(error) = view.append(&self.disk, &bytes) {
            // The frame may be there nonetheless, in part or in whole; the next to take the lock sees which.
            return Ok(Applied::Perhaps(error));
        }
        view.lay_over(revision, batch.request_id, batch.writes.clone());
        // Who flushes reads this to know how much its flush covers. Without it the flush covers this frame only.
        let own = Hints::write_end(&self.disk, &self.lock, view.log.generation, view.end).is_ok();
        let applied = Applied::Yes { revision, log: view.log.clone(), end: view.end, own };
        if view.wants_merge() {
            // The commit does not depend on it: the log only stays longer.
            if let Err(error) = view.merge(&self.disk) {
                tracing::warn!(%error, "the log could not be merged into its snapshot");
                view.merge_failed_at = view.operations;
            }
        }
        Ok(applied)
    }

    /// Returns when the log is durable up to `end`. `own` says that the caller has itself appended up to there since
    /// the machine started, so that the noted end of the log is true.
    fn make_durable(&self, log: &Log, end: u64, own: bool) -> Result<(), StoreError> {
        let _turn = self.flushing.lock();
        self.disk.lock(&log.file, LOG)?;
        let result = self.flush(log, end, own);
        self.disk.unlock(&log.file, LOG);
        result
    }

    fn flush(&self, log: &Log, end: u64, own: bool) -> Result<(), StoreError> {
        let hints = Hints::read(&self.disk, &self.lock)?;
        if hints.distrusted == log.generation {
            return Err(StoreError::Unavailable("an earlier flush of the log failed".to_owned()));
        }
        // A later generation holds this log's frames in its snapshot, which was flushed before it appeared.
        if hints.durable_generation > log.generation || hints.durable_of(log.generation) >= end {
            return Ok(());
        }
        let covered = if own && hints.end_generation == log.generation { hints.end.max(end) } else { end };
        match self.disk.sync(&log.file, LOG) {
            Ok(()) => Hints::write_durable(&self.disk, &self.lock, log.generation, covered),
            Err(error) => {
                Hints::write_distrusted(&self.disk, &self.lock, log.generation)?;
                Err(error)
            }
        }
    }
}

enum Applied {
    Yes { revision: u64, log: Arc<Log>, end: u64, own: bool },
    No(Vec<Option<Entry>>),
    Perhaps(StoreError),
}

#[async_trait]
impl Store for LogStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let mut view = self.view.lock();
        self.refresh(&mut view)?;
        keys.iter().map(|key| view.get(&self.disk, key)).collect()
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        let mut view = self.view.lock();
        self.refresh(&mut view)?;
        let after = after.filter(|after| *after >= prefix);
        let mut found = Vec::new();
        for record in view.range(&self.disk, after.unwrap_or(prefix))? {
            let (key, entry) = record?;
            if found.len() == limit || !key.starts_with(prefix) {
                break;
            }
            if after != Some(key.as_slice()) {
                found.push((key, entry));
            }
        }
        Ok(found)
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        check(batch, &self.caps())?;
        let applied = {
            let mut view = self.view.lock();
            self.locked(|| self.apply(&mut view, batch))?
        };
        match applied {
            Applied::No(current) => Ok(Outcome::Conflict(current)),
            Applied::Perhaps(error) => Ok(Outcome::Unknown { reason: error.to_string() }),
            Applied::Yes { revision, log, end, own } => match self.make_durable(&log, end, own) {
                Ok(()) => Ok(Outcome::Committed { revision }),
                Err(error) => Ok(Outcome::Unknown { reason: error.to_string() }),
            },
        }
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        let mut view = self.view.lock();
        self.refresh(&mut view)?;
        view.first_gap(&self.disk, prefix, *range.start(), *range.end())
    }

    fn caps(&self) -> Caps {
        Caps {
            max_operations: 4096,
            max_bytes: 8 << 20,
            multi_key_atomic: true,
            sharing: Sharing::Processes,
            durability: Durability::Power,
        }
    }
}

impl View {
    /// Opens the files as they are now; `None` if there is no log or its base is missing.
    fn open(disk: &Disk) -> Result<Option<(Self, Tail)>, StoreError> {
        // A merge replaces the snapshot, then the log: whoever opens in between sees a stale log, and whoever opened
        // the old snapshot and then the new log begins again.
        for _ in 0..100 {
            let snapshot = disk.open(SNAP)?.map(|file| Snapshot::open(disk, file, SNAP)).transpose()?;
            let Some(file) = disk.open(LOG)? else { return Ok(None) };
            let identity = disk.identity_of(&file, LOG)?;
            let bytes = disk.read_at(&file, LOG, 0, HEADER as usize)?;
            let (generation, base) = frame::parse_header(&bytes)
                .ok_or_else(|| disk.corrupt(LOG, 0, "the header's checksum does not match"))?;
            let below = snapshot.as_ref().map_or(FIRST_GENERATION, |s| s.generation);
            if generation > below {
                continue;
            }
            let stale = generation < below;
            let snapshot_identity = snapshot.as_ref().map(|s| disk.identity_of(s.file(), SNAP)).transpose()?;
            let mut view = Self {
                log: Arc::new(Log { file, identity, generation, stale }),
                revision: if stale { snapshot.as_ref().map_or(base, |s| s.revision) } else { base },
                snapshot,
                snapshot_identity,
                end: HEADER,
                allocated: HEADER,
                tail: BTreeMap::new(),
                requests: HashMap::new(),
                operations: 0,
                merge_failed_at: 0,
            };
            let tail = if stale { Tail::Clean } else { view.read_frames(disk, true)? };
            return Ok(Some((view, tail)));
        }
        Err(disk.corrupt(
            LOG,
            8,
            "its generation is above the snapshot's: the snapshot was removed or is an older copy",
        ))
    }

    /// Opens the files under the lock: makes the first log, finishes what a crash left half done.
    fn open_locked(disk: &Disk, lock: &File) -> Result<Self, StoreError> {
        let (mut view, tail) = match Self::open(disk)? {
            Some(opened) => opened,
            None => {
                if disk.identity(SNAP)?.is_some() {
                    return Err(disk.corrupt(LOG, 0, "the log is gone while its snapshot is there"));
                }
                create_log(disk, FIRST_GENERATION, 0)?;
                Self::open(disk)?.ok_or_else(|| disk.corrupt(LOG, 0, "the log vanished after it was made"))?
            }
        };
        if view.log.stale {
            let base = view.revision;
            let generation = view.snapshot.as_ref().map_or(FIRST_GENERATION, |s| s.generation);
            create_log(disk, generation, base)?;
            let (fresh, _) =
                Self::open(disk)?.ok_or_else(|| disk.corrupt(LOG, 0, "the log vanished after it was made"))?;
            return Ok(fresh);
        }
        if tail == Tail::Dirty {
            view.cut(disk, Hints::read(disk, lock)?.durable_of(view.log.generation))?;
        } else if Hints::read(disk, lock)?.durable_of(view.log.generation) > view.end {
            return Err(disk.corrupt(LOG, view.end, "acknowledged records are missing at its end"));
        }
        Ok(view)
    }

    /// Whether the names still stand for the files that are open.
    fn current(&self, disk: &Disk) -> Result<bool, StoreError> {
        Ok(disk.identity(LOG)? == Some(self.log.identity) && disk.identity(SNAP)? == self.snapshot_identity)
    }

    /// Reads frames that others have appended.
    fn catch_up(&mut self, disk: &Disk) -> Result<Tail, StoreError> {
        if self.log.stale {
            return Ok(Tail::Clean);
        }
        // All beyond the end was zero when it was first read, and frames are written in order since.
        let next = disk.read_at(&self.log.file, LOG, self.end, 8)?;
        if next.iter().all(|b| *b == 0) {
            return Ok(Tail::Clean);
        }
        self.read_frames(disk, false)
    }

    fn read_frames(&mut self, disk: &Disk, whole: bool) -> Result<Tail, StoreError> {
        let length = self.log.file.metadata().map(|m| m.len()).unwrap_or(0).saturating_sub(self.end);
        let bytes = disk.read_at(&self.log.file, LOG, self.end, length as usize)?;
        let start = self.end;
        let mut at = 0;
        while let Some(frame) = frame::decode(self.log.generation, start + at as u64, &bytes[at..]) {
            if frame.revision != self.revision + 1 {
                break;
            }
            at += frame.size;
            self.lay_over(frame.revision, frame.request_id, frame.writes);
        }
        self.end = start + at as u64;
        self.allocated = start + bytes.len() as u64;
        let rest = bytes.get(at..).unwrap_or_default();
        let clean = if whole { rest.iter().all(|b| *b == 0) } else { rest.iter().take(8).all(|b| *b == 0) };
        Ok(if clean { Tail::Clean } else { Tail::Dirty })
    }

    /// Removes what follows the last sound frame, unless there is evidence that it was once durable.
    fn cut(&mut self, disk: &Disk, durable: u64) -> Result<(), StoreError> {
        let bytes = disk.read_at(&self.log.file, LOG, self.end, (self.allocated - self.end) as usize)?;
        let mut proof = durable;
        for at in (0..bytes.len()).step_by(8) {
            if let Some(frame) = frame::decode(self.log.generation, self.end + at as u64, &bytes[at..])
                && frame.revision > self.revision
            {
                proof = proof.max(frame.durable);
            }
        }
        if proof > self.end {
            return Err(disk.corrupt(
                LOG,
                self.end,
                format!("a record that was durable (up to byte {proof}) is not whole"),
            ));
        }
        tracing::info!(offset = self.end, "cutting an unacknowledged record off the log");
        disk.write_at(&self.log.file, LOG, &vec![0; bytes.len()], self.end)
    }

    /// Makes room for a frame.
    fn reserve(&mut self, disk: &Disk, frame: usize) -> Result<(), StoreError> {
        let end = self.end + frame as u64;
        if end > self.allocated {
            // Before the frame, not with it: should the medium be full, the frame must not be there in whole.
            let allocated = end.next_multiple_of(CHUNK);
            disk.write_at(&self.log.file, LOG, &vec![0; (allocated - self.allocated) as usize], self.allocated)?;
            self.allocated = allocated;
        }
        Ok(())
    }

    fn append(&mut self, disk: &Disk, frame: &[u8]) -> Result<(), StoreError> {
        disk.write_at(&self.log.file, LOG, frame, self.end)?;
        self.end += frame.len() as u64;
        Ok(())
    }

    fn lay_over(&mut self, revision: u64, request_id: u128, writes: Vec<Write>) {
        self.revision = revision;
        self.requests.insert(request_id, revision);
        self.operations += writes.len() as u64;
        for write in writes {
            match write {
                Write::Delete(key) => self.tail.insert(key, None),
                Write::Put(key, value) => self.tail.insert(key, Some(Entry { value, version: revision })),
            };
        }
    }

    fn get(&self, disk: &Disk, key: &[u8]) -> Result<Option<Entry>, StoreError> {
        match (self.tail.get(key), &self.snapshot) {
            (Some(entry), _) => Ok(entry.clone()),
            (None, Some(snapshot)) => snapshot.get(disk, key),
            (None, None) => Ok(None),
        }
    }

    /// The records from a key on, in order: those of the snapshot with the log's laid over them.
    fn range<'a>(
        &'a self,
        disk: &'a Disk,
        from: &[u8],
    ) -> Result<impl Iterator<Item = Result<(Key, Entry), StoreError>> + 'a, StoreError> {
        let snapshot = self.snapshot.as_ref().map(|s| s.range(disk, from)).transpose()?;
        let mut below = snapshot.into_iter().flatten().peekable();
        let mut above = self.tail.range::<[u8], _>((Bound::Included(from), Bound::Unbounded)).peekable();
        Ok(std::iter::from_fn(move || {
            loop {
                let from_tail = match (below.peek(), above.peek()) {
                    (None, None) => return None,
                    (Some(Err(_)), _) | (Some(_), None) => false,
                    (None, Some(_)) => true,
                    (Some(Ok((key, _))), Some((over, _))) => key >= *over,
                };
                if !from_tail {
                    return below.next();
                }
                let (key, entry) = above.next()?;
                if below.peek().is_some_and(|r| matches!(r, Ok((k, _)) if k == key)) {
                    below.next();
                }
                if let Some(entry) = entry {
                    return Some(Ok((key.clone(), entry.clone())));
                }
            }
        }))
    }

    fn first_gap(&self, disk: &Disk, prefix: &[u8], low: u128, high: u128) -> Result<Option<u128>, StoreError> {
        let mut low = low;
        while low <= high {
            let below = match &self.snapshot {
                Some(snapshot) => snapshot.first_gap(disk, prefix, low, high)?,
                None => Some(low),
            };
            // The log may have freed a number that the snapshot holds, and taken numbers from its gap on.
            let until = below.unwrap_or(high);
            let over = self.tail.range(numbered(prefix, low)..=numbered(prefix, until));
            if let Some((key, _)) = over.into_iter().find(|(_, entry)| entry.is_none()) {
                return Ok(Some(number_of(prefix, key)?));
            }
            let Some(mut candidate) = below else { return Ok(None) };
            for (key, entry) in self.tail.range(numbered(prefix, candidate)..=numbered(prefix, high)) {
                if number_of(prefix, key)? != candidate || entry.is_none() {
                    break;
                }
                match candidate.checked_add(1) {
                    Some(next) if next <= high => candidate = next,
                    _ => return Ok(None),
                }
            }
            if self.get(disk, &numbered(prefix, candidate))?.is_none() {
                return Ok(Some(candidate));
            }
            low = candidate;
        }
        Ok(None)
    }

    fn wants_merge(&self) -> bool {
        let records = self.snapshot.as_ref().map_or(0, |s| s.records);
        self.operations >= self.merge_failed_at + TAIL_MIN.max(records / TAIL_SHARE)
    }

    /// Writes everything to a new snapshot and begins a new log. The caller holds the lock.
    fn merge(&mut self, disk: &Disk) -> Result<(), StoreError> {
        let generation = self.log.generation + 1;
        let mut writer = Writer::create(disk, SNAP_NEW)?;
        for record in self.range(disk, &[])? {
            let (key, entry) = record?;
            writer.push(&key, &entry)?;
        }
        writer.finish(generation, self.revision)?;
        disk.rename(SNAP_NEW, SNAP)?;
        // From here on this view is out of date, and noticed to be if the rest fails.
        create_log(disk, generation, self.revision)?;
        let (view, _) = Self::open(disk)?.ok_or_else(|| disk.corrupt(LOG, 0, "the log vanished after it was made"))?;
        *self = view;
        Ok(())
    }
}

fn create_log(disk: &Disk, generation: u64, revision: u64) -> Result<(), StoreError> {
    let file = disk.create(LOG_NEW)?;
    let mut bytes = frame::header(generation, revision);
    bytes.resize(CHUNK as usize, 0);
    disk.write_at(&file, LOG_NEW, &bytes, 0)?;
    disk.sync(&file, LOG_NEW)?;
    disk.rename(LOG_NEW, LOG)
}

const LOCK: &str = "lock";
const LOG: &str = "log";
const LOG_NEW: &str = "log.new";
const SNAP: &str = "snap";
const SNAP_NEW: &str = "snap.new";
const FIRST_GENERATION: u64 = 1;
/// The log grows by this many bytes of zeros at a time.
const CHUNK: u64 = 64 << 10;
/// A merge comes after this many operations, or this part of the snapshot's records, whichever is more.
const TAIL_MIN: u64 = 512;
const TAIL_SHARE: u64 = 128;
