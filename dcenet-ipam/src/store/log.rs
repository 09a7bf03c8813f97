//! An append log with a snapshot: shared by any number of processes on one machine, without a daemon.
//!
//! # Files
//! - `lock`: locked with flock(2) by whoever appends; also holds two hints (below). Never replaced by us; where somebody has
//!   removed the directory and another process made it anew, whoever still has the old one open finds out when it has its lock.
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
//! again. Watches read the frames of the log one by one; see `watch.rs`.
//!
//! The directory must be on a local file system: flock(2) and rename(2) are trusted.

mod disk;
mod frame;
mod hints;
mod snapshot;
mod view;
mod watch;

use std::fs::File;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use self::disk::{Disk, Identity};
use self::hints::Hints;
use self::view::{Log, Tail, View};
use self::watch::LogWatch;
use super::{Batch, Caps, Durability, Entry, Key, Outcome, Sharing, Store, StoreError, Watch, check, commit_sound};

pub use self::disk::{DiskCall, DiskEvent, DiskUse};

/// A store in a directory, shared by processes.
#[derive(Debug)]
pub struct LogStore {
    shared: Arc<Shared>,
}

/// What the store and its watches use.
#[derive(Debug)]
struct Shared {
    disk: Disk,
    lock: Mutex<Arc<LockFile>>,
    view: Mutex<View>,
    /// Held by the thread that flushes, for flock(2) tells processes apart, not threads of one descriptor.
    flushing: Mutex<()>,
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

    /// As [`LogStore::open`], telling `recorder` of each call that has changed the disk.
    #[cfg(feature = "test-support")]
    pub fn open_recorded(dir: &Path, recorder: Arc<dyn Fn(DiskEvent<'_>) + Send + Sync>) -> Result<Self, StoreError> {
        Self::open_disk(Disk::recorded(dir, recorder))
    }

    fn open_disk(disk: Disk) -> Result<Self, StoreError> {
        disk.make_dir()?;
        let lock = LockFile::open(&disk)?;
        let view = match View::open(&disk)? {
            // Fewer frames than were once durable: look again under the lock before calling it damage.
            Some((view, Tail::Clean))
                if Hints::read(&disk, &lock.file)?.durable_of(view.log.generation) <= view.end =>
            {
                view
            }
            _ => {
                disk.lock(&lock.file, LOCK)?;
                let view = View::open_locked(&disk, &lock.file);
                disk.unlock(&lock.file, LOCK);
                view?
            }
        };
        let lock = Mutex::new(Arc::new(lock));
        let shared = Shared { disk, lock, view: Mutex::new(view), flushing: Mutex::new(()) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// What this store has asked of the system since it was opened.
    pub fn disk_use(&self) -> DiskUse {
        self.shared.disk.usage()
    }
}

impl Shared {
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
            self.locked(|lock| View::open_locked(&self.disk, &lock.file).map(|fresh| *view = fresh))?;
        }
        Ok(())
    }

    fn locked<T>(&self, work: impl FnOnce(&Arc<LockFile>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut held = self.lock.lock();
        self.take(&mut held)?;
        let result = work(&held);
        self.disk.unlock(&held.file, LOCK);
        result
    }

    /// Locks the lock that the directory has now. Whoever has opened the store since the directory was replaced locks that one.
    fn take(&self, held: &mut Arc<LockFile>) -> Result<(), StoreError> {
        loop {
            self.disk.lock(&held.file, LOCK)?;
            let found = self.disk.identity(LOCK);
            if matches!(&found, Ok(found) if *found == Some(held.identity)) {
                return Ok(());
            }
            self.disk.unlock(&held.file, LOCK);
            found?;
            tracing::warn!(dir = %self.disk.path("").display(), "the store's directory was replaced; opening it anew");
            self.disk.make_dir()?;
            *held = Arc::new(LockFile::open(&self.disk)?);
        }
    }

    /// Brings the view up to date and makes it fit to append to. The caller holds the lock. Returns up to where the log
    /// is known to be durable.
    fn refresh_locked(&self, view: &mut View, lock: &LockFile) -> Result<u64, StoreError> {
        let sound = view.current(&self.disk)? && !view.log.stale && view.catch_up(&self.disk)? == Tail::Clean;
        if !sound {
            *view = View::open_locked(&self.disk, &lock.file)?;
        }
        let hints = Hints::read(&self.disk, &lock.file)?;
        if hints.distrusted == view.log.generation {
            tracing::warn!(dir = %self.disk.path("").display(), "rewriting the store after a failed flush");
            view.merge(&self.disk)?;
        }
        Ok(hints.durable_of(view.log.generation))
    }

    /// Applies batches one after the other under one lock, and makes them durable by one flush. After an error nothing
    /// was applied.
    fn commit_all(&self, batches: &[Batch]) -> Result<Vec<Outcome>, StoreError> {
        let (mut outcomes, written) = {
            let mut view = self.view.lock();
            self.locked(|lock| self.apply(&mut view, batches, lock))?
        };
        let committed = outcomes.iter_mut().filter(|outcome| matches!(outcome, Outcome::Committed { .. }));
        if let Some(written) = written
            && let Err(error) = self.make_durable(&written)
        {
            committed.for_each(|outcome| *outcome = Outcome::Unknown { reason: error.to_string() });
        }
        Ok(outcomes)
    }

    /// Returns what the outcomes will be once the log is durable as far as is told beside them.
    fn apply(
        &self,
        view: &mut View,
        batches: &[Batch],
        lock: &Arc<LockFile>,
    ) -> Result<(Vec<Outcome>, Option<Written>), StoreError> {
        let durable = self.refresh_locked(view, lock)?;
        let mut frames = Vec::new();
        let staged = batches.iter().map(|batch| self.stage(view, batch, durable, &mut frames)).collect();
        let reserved = |outcomes| {
            if !frames.is_empty() {
                view.reserve(&self.disk, frames.len())?;
            }
            Ok(outcomes)
        };
        let mut outcomes: Vec<_> = match Result::and_then(staged, reserved) {
            Ok(outcomes) => outcomes,
            Err(error) => {
                // What was laid over is not in the log.
                view.doubted = true;
                return Err(error);
            }
        };
        if !outcomes.iter().any(|outcome| matches!(outcome, Outcome::Committed { .. })) {
            return Ok((outcomes, None));
        }
        if frames.is_empty() {
            let (lock, log) = (Arc::clone(lock), view.log.clone());
            return Ok((outcomes, Some(Written { lock, log, end: view.end, own: false })));
        }
        if let Err(error) = view.append(&self.disk, &frames) {
            // Frames may be there nonetheless, in part or in whole; the next to take the lock sees which. A refusal may
            // rest on one that is not.
            view.doubted = true;
            outcomes.iter_mut().for_each(|outcome| *outcome = Outcome::Unknown { reason: error.to_string() });
            return Ok((outcomes, None));
        }
        // Who flushes reads this to know how much its flush covers. Without it the flush covers these frames only.
        let own = Hints::write_end(&self.disk, &lock.file, view.log.generation, view.end).is_ok();
        let written = Written { lock: Arc::clone(lock), log: view.log.clone(), end: view.end, own };
        if view.wants_merge(batches.len()) {
            // The commits do not depend on it: the log only stays longer.
            if let Err(error) = view.merge(&self.disk) {
                tracing::warn!(%error, "the log could not be merged into its snapshot");
                view.merge_failed_at = view.operations;
            }
        }
        Ok((outcomes, Some(written)))
    }

    /// Decides a batch, adds its frame to those that are to be written, and lays it over the view for those that follow.
    fn stage(&self, view: &mut View, batch: &Batch, durable: u64, frames: &mut Vec<u8>) -> Result<Outcome, StoreError> {
        if let Some(revision) = view.request(batch.request_id) {
            return Ok(Outcome::Committed { revision });
        }
        let mut holds = true;
        let mut current = Vec::with_capacity(batch.guards.len());
        for guard in &batch.guards {
            let entry = view.get(&self.disk, &guard.key)?;
            holds &= entry.as_ref().map(|e| e.version) == guard.version;
            current.push(entry);
        }
        if !holds {
            return Ok(Outcome::Conflict(current));
        }
        if batch.writes.is_empty() {
            return Ok(Outcome::Committed { revision: view.revision });
        }
        let revision = view.revision + 1;
        let offset = view.end + frames.len() as u64;
        frames.extend_from_slice(&frame::encode(view.log.generation, offset, revision, durable, batch));
        view.lay_over(revision, batch.request_id, batch.writes.clone());
        Ok(Outcome::Committed { revision })
    }

    /// Returns when it is durable.
    fn make_durable(&self, written: &Written) -> Result<(), StoreError> {
        let _turn = self.flushing.lock();
        self.disk.lock(&written.log.file, LOG)?;
        let result = self.flush(written);
        self.disk.unlock(&written.log.file, LOG);
        result
    }

    fn flush(&self, Written { lock, log, end, own }: &Written) -> Result<(), StoreError> {
        let (end, lock) = (*end, &lock.file);
        let hints = Hints::read(&self.disk, lock)?;
        if hints.distrusted == log.generation {
            return Err(StoreError::Unavailable("an earlier flush of the log failed".to_owned()));
        }
        // A later generation holds this log's frames in its snapshot, which was flushed before it appeared.
        if hints.durable_generation > log.generation || hints.durable_of(log.generation) >= end {
            return Ok(());
        }
        let covered = if *own && hints.end_generation == log.generation { hints.end.max(end) } else { end };
        match self.disk.sync(&log.file, LOG) {
            Ok(()) => Hints::write_durable(&self.disk, lock, log.generation, covered),
            Err(error) => {
                Hints::write_distrusted(&self.disk, lock, log.generation)?;
                Err(error)
            }
        }
    }
}

/// Up to where a log must be durable before its commits are acknowledged.
struct Written {
    /// The one of this log's directory.
    lock: Arc<LockFile>,
    log: Arc<Log>,
    end: u64,
    /// Whether the caller has itself appended up to there since the machine started, so that the noted end of the log is true.
    own: bool,
}

/// The file `lock`, open.
#[derive(Debug)]
struct LockFile {
    file: File,
    identity: Identity,
}

impl LockFile {
    fn open(disk: &Disk) -> Result<Self, StoreError> {
        let file = disk.open_or_create(LOCK)?;
        let identity = disk.identity_of(&file, LOCK)?;
        Ok(Self { file, identity })
    }
}

#[async_trait]
impl Store for LogStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let shared = &*self.shared;
        let mut view = shared.view.lock();
        shared.refresh(&mut view)?;
        keys.iter().map(|key| view.get(&shared.disk, key)).collect()
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        let shared = &*self.shared;
        let mut view = shared.view.lock();
        shared.refresh(&mut view)?;
        let after = after.filter(|after| *after >= prefix);
        let mut found = Vec::new();
        for record in view.range(&shared.disk, after.unwrap_or(prefix))? {
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
        Ok(self.shared.commit_all(std::slice::from_ref(batch))?.remove(0))
    }

    async fn commit_many(&self, batches: &[Batch]) -> Vec<Result<Outcome, StoreError>> {
        commit_sound(batches, &self.caps(), |sound| self.shared.commit_all(sound))
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        let shared = &*self.shared;
        let mut view = shared.view.lock();
        shared.refresh(&mut view)?;
        view.first_gap(&shared.disk, prefix, *range.start(), *range.end())
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        Ok(Box::new(LogWatch::open(self.shared.clone(), prefix, after)?))
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

const LOCK: &str = "lock";
const LOG: &str = "log";
const LOG_NEW: &str = "log.new";
const SNAP: &str = "snap";
const SNAP_NEW: &str = "snap.new";
