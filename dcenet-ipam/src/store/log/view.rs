//! What one process knows of the files, and how they are read, appended to and replaced.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Bound;
use std::sync::Arc;

use super::disk::{Disk, Identity};
use super::frame::{self, HEADER};
use super::hints::Hints;
use super::snapshot::{Snapshot, Writer};
use super::{LOG, LOG_NEW, SNAP, SNAP_NEW};
use crate::store::{Entry, Key, StoreError, Write, number_of, numbered};

/// What this process knows of the files.
#[derive(Debug)]
pub(super) struct View {
    pub(super) log: Arc<Log>,
    snapshot: Option<Snapshot>,
    snapshot_identity: Option<Identity>,
    /// Where the next frame goes.
    pub(super) end: u64,
    /// Bytes of the file, zero beyond `end`.
    allocated: u64,
    pub(super) revision: u64,
    /// What the log lays over the snapshot; `None` is a deletion.
    tail: BTreeMap<Key, Option<Entry>>,
    /// The requests of the log, and those of the one that this view has merged last: whoever learnt `Unknown` from a
    /// failed flush, which a merge heals, sends his again.
    requests: HashMap<u128, u64>,
    merged_requests: HashMap<u128, u64>,
    /// Operations in the log.
    pub(super) operations: u64,
    /// A merge failed at this many operations; the next try waits for as many more.
    pub(super) merge_failed_at: u64,
    /// Laid over with what did not reach the log: to be opened again.
    pub(super) doubted: bool,
}

#[derive(Debug)]
pub(super) struct Log {
    pub(super) file: File,
    pub(super) identity: Identity,
    pub(super) generation: u64,
    /// The revision before its first frame.
    pub(super) base: u64,
    /// Contained in the snapshot: a merge was cut short before it replaced the log.
    pub(super) stale: bool,
}

/// What the frames after some offset amount to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tail {
    /// All sound, zeros behind.
    Clean,
    /// Something else behind the last sound frame.
    Dirty,
}

impl View {
    /// Opens the files as they are now; `None` if there is no log or its base is missing.
    pub(super) fn open(disk: &Disk) -> Result<Option<(Self, Tail)>, StoreError> {
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
                log: Arc::new(Log { file, identity, generation, base, stale }),
                revision: if stale { snapshot.as_ref().map_or(base, |s| s.revision) } else { base },
                snapshot,
                snapshot_identity,
                end: HEADER,
                allocated: HEADER,
                tail: BTreeMap::new(),
                requests: HashMap::new(),
                merged_requests: HashMap::new(),
                operations: 0,
                merge_failed_at: 0,
                doubted: false,
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
    pub(super) fn open_locked(disk: &Disk, lock: &File) -> Result<Self, StoreError> {
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
    pub(super) fn current(&self, disk: &Disk) -> Result<bool, StoreError> {
        Ok(!self.doubted
            && disk.identity(LOG)? == Some(self.log.identity)
            && disk.identity(SNAP)? == self.snapshot_identity)
    }

    /// Reads frames that others have appended.
    pub(super) fn catch_up(&mut self, disk: &Disk) -> Result<Tail, StoreError> {
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
    pub(super) fn reserve(&mut self, disk: &Disk, frame: usize) -> Result<(), StoreError> {
        let end = self.end + frame as u64;
        if end > self.allocated {
            // Before the frame, not with it: should the medium be full, the frame must not be there in whole.
            let allocated = end.next_multiple_of(CHUNK);
            disk.write_at(&self.log.file, LOG, &vec![0; (allocated - self.allocated) as usize], self.allocated)?;
            self.allocated = allocated;
        }
        Ok(())
    }

    pub(super) fn append(&mut self, disk: &Disk, frame: &[u8]) -> Result<(), StoreError> {
        disk.write_at(&self.log.file, LOG, frame, self.end)?;
        self.end += frame.len() as u64;
        Ok(())
    }

    pub(super) fn lay_over(&mut self, revision: u64, request_id: u128, writes: Vec<Write>) {
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

    /// The revision of a request that was committed and is remembered.
    pub(super) fn request(&self, id: u128) -> Option<u64> {
        self.requests.get(&id).or_else(|| self.merged_requests.get(&id)).copied()
    }

    pub(super) fn get(&self, disk: &Disk, key: &[u8]) -> Result<Option<Entry>, StoreError> {
        match (self.tail.get(key), &self.snapshot) {
            (Some(entry), _) => Ok(entry.clone()),
            (None, Some(snapshot)) => snapshot.get(disk, key),
            (None, None) => Ok(None),
        }
    }

    /// The records from a key on, in order: those of the snapshot with the log's laid over them.
    pub(super) fn range<'a>(
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

    pub(super) fn first_gap(
        &self,
        disk: &Disk,
        prefix: &[u8],
        low: u128,
        high: u128,
    ) -> Result<Option<u128>, StoreError> {
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

    /// Whether it is time to merge for who has committed so many batches at once. Who commits in groups does so often,
    /// and merges less often for it, or merging would take more time than committing; the next who comes alone merges.
    pub(super) fn wants_merge(&self, batches: usize) -> bool {
        let records = self.snapshot.as_ref().map_or(0, |s| s.records);
        self.operations >= self.merge_failed_at + patience(records, batches)
    }

    /// Writes everything to a new snapshot and begins a new log. The caller holds the lock.
    pub(super) fn merge(&mut self, disk: &Disk) -> Result<(), StoreError> {
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
        let merged_requests = std::mem::take(&mut self.requests);
        *self = Self { merged_requests, ..view };
        Ok(())
    }
}

/// Operations that may wait for a merge in the log over a snapshot with so many records.
fn patience(records: u64, batches: usize) -> u64 {
    let alone = TAIL_MIN.max(records / TAIL_SHARE);
    // What a group leaves must be read by each process that opens the log, and merged by the next that commits alone.
    let group = alone.saturating_mul((batches as u64).min(GROUP_PATIENCE));
    group.min(GROUP_TAIL).max(alone)
}

fn create_log(disk: &Disk, generation: u64, revision: u64) -> Result<(), StoreError> {
    let file = disk.create(LOG_NEW)?;
    let mut bytes = frame::header(generation, revision);
    bytes.resize(CHUNK as usize, 0);
    disk.write_at(&file, LOG_NEW, &bytes, 0)?;
    disk.sync(&file, LOG_NEW)?;
    disk.rename(LOG_NEW, LOG)
}

const FIRST_GENERATION: u64 = 1;
/// The log grows by this many bytes of zeros at a time.
const CHUNK: u64 = 64 << 10;
/// A merge comes after this many operations, or this part of the snapshot's records, whichever is more.
const TAIL_MIN: u64 = 512;
const TAIL_SHARE: u64 = 128;
/// How many times as many a group may leave for the next merge, and how many at most where one that is alone would not
/// leave more.
const GROUP_PATIENCE: u64 = 64;
const GROUP_TAIL: u64 = 8192;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_group_leaves_is_bounded() {
        assert_eq!((patience(0, 1), patience(0, 2), patience(0, 8)), (512, 1024, 4096));
        assert_eq!((patience(0, 256), patience(65_536, 256), patience(1_000_000, 256)), (8192, 8192, 8192));
        assert_eq!((patience(1_000_000, 1), patience(2_000_000, 1), patience(2_000_000, 256)), (7812, 15_625, 15_625));
    }
}
