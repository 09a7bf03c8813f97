//! A sorted run of records that is searched where it lies.
//!
//! ```text
//! header, 64 bytes: magic 8, generation 8, revision 8, records 8, end of leaves 8, root offset 8, root length 4,
//!                   depth 4, zero 4, CRC-32 of these 4
//! block:            CRC-32 4, length 4 (of the entries), entries
//! leaf entry:       key length 2, value length 4, version 8, key, value
//! index entry:      key length 2, block offset 8, block length 4, records before it 8, key
//! ```
//!
//! Leaves follow the header in key order; index levels follow them up to the root. An index entry holds the first key
//! of its block and how many records precede it, so that a path from the root answers both "where is this key" and "how
//! many keys are below it", each with one read a level. Depth 0 is an empty run.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::Disk;
use super::frame::{u32_at, u64_at};
use crate::store::{Entry, Key, StoreError, numbered};

const MAGIC: &[u8; 8] = b"dcesnap1";
const HEADER: usize = 64;
/// A block is closed when it has grown to this many bytes.
const BLOCK: usize = 4096;
/// Blocks kept in memory by one open snapshot.
const CACHED: usize = 256;

#[derive(Debug)]
pub(super) struct Snapshot {
    file: File,
    name: &'static str,
    pub(super) generation: u64,
    pub(super) revision: u64,
    pub(super) records: u64,
    leaves_end: u64,
    root: Reference,
    depth: u32,
    cache: Mutex<HashMap<u64, Arc<Block>>>,
}

#[derive(Debug, Clone, Copy)]
struct Reference {
    offset: u64,
    length: u32,
}

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    /// Where each entry begins in `bytes`.
    starts: Vec<usize>,
}

struct Child<'a> {
    key: &'a [u8],
    block: Reference,
    before: u64,
}

impl Block {
    fn parse(bytes: Vec<u8>, leaf: bool) -> Option<Self> {
        let body = bytes.get(8..)?;
        if u32_at(&bytes, 0) != crc32fast::hash(&bytes[4..]) || u32_at(&bytes, 4) as usize != body.len() {
            return None;
        }
        let (mut starts, mut at) = (Vec::with_capacity(64), 8);
        while at < bytes.len() {
            starts.push(at);
            let key = usize::from(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
            at += if leaf {
                LEAF_FIXED + key + u32_at(bytes.get(at..at + LEAF_FIXED)?, 2) as usize
            } else {
                INDEX_FIXED + key
            };
        }
        (at == bytes.len() && !starts.is_empty()).then_some(Self { bytes, starts })
    }

    fn leaf(&self, i: usize) -> (&[u8], &[u8], u64) {
        let at = &self.bytes[self.starts[i]..];
        let key = usize::from(u16::from_le_bytes([at[0], at[1]]));
        let value = u32_at(at, 2) as usize;
        (&at[LEAF_FIXED..LEAF_FIXED + key], &at[LEAF_FIXED + key..LEAF_FIXED + key + value], u64_at(at, 6))
    }

    fn child(&self, i: usize) -> Child<'_> {
        let at = &self.bytes[self.starts[i]..];
        let key = usize::from(u16::from_le_bytes([at[0], at[1]]));
        Child {
            key: &at[INDEX_FIXED..INDEX_FIXED + key],
            block: Reference { offset: u64_at(at, 2), length: u32_at(at, 10) },
            before: u64_at(at, 14),
        }
    }

    /// How many leading entries satisfy the condition, which holds for a prefix of them.
    fn partition(&self, mut holds: impl FnMut(usize) -> bool) -> usize {
        let (mut low, mut high) = (0, self.starts.len());
        while low < high {
            let middle = low + (high - low) / 2;
            if holds(middle) { low = middle + 1 } else { high = middle }
        }
        low
    }
}

const LEAF_FIXED: usize = 14;
const INDEX_FIXED: usize = 22;

impl Snapshot {
    pub(super) fn open(disk: &Disk, file: File, name: &'static str) -> Result<Self, StoreError> {
        let header = disk.read_at(&file, name, 0, HEADER)?;
        let sound = header.len() == HEADER
            && header.starts_with(MAGIC)
            && u32_at(&header, HEADER - 4) == crc32fast::hash(&header[..HEADER - 4]);
        if !sound {
            return Err(disk.corrupt(name, 0, "the header's checksum does not match"));
        }
        Ok(Self {
            file,
            name,
            generation: u64_at(&header, 8),
            revision: u64_at(&header, 16),
            records: u64_at(&header, 24),
            leaves_end: u64_at(&header, 32),
            root: Reference { offset: u64_at(&header, 40), length: u32_at(&header, 48) },
            depth: u32_at(&header, 52),
            cache: Mutex::default(),
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn load(&self, disk: &Disk, at: Reference, leaf: bool) -> Result<Block, StoreError> {
        let bytes = disk.read_at(&self.file, self.name, at.offset, at.length as usize)?;
        Block::parse(bytes, leaf).ok_or_else(|| disk.corrupt(self.name, at.offset, "a block's checksum does not match"))
    }

    fn block(&self, disk: &Disk, at: Reference, leaf: bool) -> Result<Arc<Block>, StoreError> {
        if let Some(block) = self.cache.lock().get(&at.offset) {
            return Ok(block.clone());
        }
        let block = Arc::new(self.load(disk, at, leaf)?);
        let mut cache = self.cache.lock();
        if cache.len() >= CACHED {
            cache.clear();
        }
        cache.insert(at.offset, block.clone());
        Ok(block)
    }

    /// Walks from the root to a leaf; `choose` picks the child of each index block. Returns the leaf, where it lies and
    /// the records before it.
    fn descend(
        &self,
        disk: &Disk,
        mut choose: impl FnMut(&Block) -> usize,
    ) -> Result<Option<(Arc<Block>, Reference, u64)>, StoreError> {
        if self.depth == 0 {
            return Ok(None);
        }
        let (mut at, mut before) = (self.root, 0);
        for _ in 1..self.depth {
            let index = self.block(disk, at, false)?;
            let child = index.child(choose(&index));
            (at, before) = (child.block, child.before);
        }
        Ok(Some((self.block(disk, at, true)?, at, before)))
    }

    /// The leaf in which the key is, or would be.
    fn leaf_of(&self, disk: &Disk, key: &[u8]) -> Result<Option<(Arc<Block>, Reference, u64)>, StoreError> {
        self.descend(disk, |index| index.partition(|i| index.child(i).key <= key).saturating_sub(1))
    }

    pub(super) fn get(&self, disk: &Disk, key: &[u8]) -> Result<Option<Entry>, StoreError> {
        let Some((leaf, ..)) = self.leaf_of(disk, key)? else { return Ok(None) };
        let i = leaf.partition(|i| leaf.leaf(i).0 < key);
        if i == leaf.starts.len() || leaf.leaf(i).0 != key {
            return Ok(None);
        }
        let (_, value, version) = leaf.leaf(i);
        Ok(Some(Entry { value: value.to_vec(), version }))
    }

    /// As [`Store::first_gap`](crate::store::Store::first_gap), over this run alone. The numbered keys from the start of
    /// the range are dense up to the gap, and their place in the run tells whether they are.
    pub(super) fn first_gap(
        &self,
        disk: &Disk,
        prefix: &[u8],
        low: u128,
        high: u128,
    ) -> Result<Option<u128>, StoreError> {
        let start = numbered(prefix, low);
        let Some((leaf, _, before)) = self.leaf_of(disk, &start)? else { return Ok(Some(low)) };
        let rank = before + leaf.partition(|i| leaf.leaf(i).0 < start.as_slice()) as u64;
        // Record `i` of the run is the one that a run without gap would have there.
        let dense = |i: u64, key: &[u8]| match low.checked_add(u128::from(i - rank)) {
            Some(number) => key == numbered(prefix, number),
            None => false,
        };
        let found = self.descend(disk, |index| {
            let fits = |i| {
                let child = index.child(i);
                child.before <= rank || dense(child.before, child.key)
            };
            index.partition(fits).saturating_sub(1)
        })?;
        let Some((leaf, _, before)) = found else { return Ok(Some(low)) };
        let past = leaf.partition(|i| {
            let at = before + i as u64;
            at < rank || dense(at, leaf.leaf(i).0)
        }) as u64;
        let gap = low.checked_add(u128::from((before + past).saturating_sub(rank)));
        Ok(gap.filter(|gap| *gap <= high))
    }

    /// The records whose key is `from` or greater, in order.
    pub(super) fn range<'a>(&'a self, disk: &'a Disk, from: &[u8]) -> Result<Records<'a>, StoreError> {
        let mut records = Records { snapshot: self, disk, leaf: None, next: 0, offset: self.leaves_end };
        if let Some((leaf, at, _)) = self.leaf_of(disk, from)? {
            records.next = leaf.partition(|i| leaf.leaf(i).0 < from);
            records.offset = at.offset + u64::from(at.length);
            records.leaf = Some(leaf);
        }
        Ok(records)
    }
}

/// Walks over the records of a snapshot, reading leaves one after the other.
pub(super) struct Records<'a> {
    snapshot: &'a Snapshot,
    disk: &'a Disk,
    leaf: Option<Arc<Block>>,
    next: usize,
    /// Where the leaf after this one begins.
    offset: u64,
}

impl Records<'_> {
    fn advance(&mut self) -> Result<Option<(Key, Entry)>, StoreError> {
        loop {
            let Some(leaf) = &self.leaf else { return Ok(None) };
            if self.next < leaf.starts.len() {
                let (key, value, version) = leaf.leaf(self.next);
                self.next += 1;
                return Ok(Some((key.to_vec(), Entry { value: value.to_vec(), version })));
            }
            if self.offset >= self.snapshot.leaves_end {
                self.leaf = None;
                continue;
            }
            let snapshot = self.snapshot;
            let head = self.disk.read_at(&snapshot.file, snapshot.name, self.offset, 8)?;
            if head.len() < 8 {
                return Err(self.disk.corrupt(snapshot.name, self.offset, "the file ends inside a block"));
            }
            // The length is only trusted within the leaves; the block's checksum settles it.
            let left = snapshot.leaves_end - self.offset;
            let length = (u64::from(u32_at(&head, 4)) + 8).min(left) as u32;
            let at = Reference { offset: self.offset, length };
            self.leaf = Some(Arc::new(snapshot.load(self.disk, at, true)?));
            self.next = 0;
            self.offset += u64::from(length);
        }
    }
}

impl Iterator for Records<'_> {
    type Item = Result<(Key, Entry), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}

/// Writes a snapshot to a new file, front to back; [`Writer::finish`] flushes it.
pub(super) struct Writer<'a> {
    disk: &'a Disk,
    file: File,
    name: &'static str,
    /// Bytes not yet written, which belong at `flushed`.
    pending: Vec<u8>,
    flushed: u64,
    /// The open block of each level, leaves first.
    levels: Vec<Level>,
    records: u64,
}

#[derive(Default)]
struct Level {
    bytes: Vec<u8>,
    first: Key,
    /// Records before the open block.
    before: u64,
    /// Finished blocks, of levels above the leaves: their place is fixed when all leaves are written.
    finished: Vec<(Vec<u8>, Key, u64)>,
}

impl<'a> Writer<'a> {
    pub(super) fn create(disk: &'a Disk, name: &'static str) -> Result<Self, StoreError> {
        let file = disk.create(name)?;
        let (pending, levels) = (vec![0; HEADER], vec![Level::default(), Level::default()]);
        Ok(Self { disk, file, name, pending, flushed: 0, levels, records: 0 })
    }

    pub(super) fn push(&mut self, key: &[u8], entry: &Entry) -> Result<(), StoreError> {
        if self.levels[0].bytes.is_empty() {
            self.levels[0].first = key.to_vec();
            self.levels[0].before = self.records;
        }
        let bytes = &mut self.levels[0].bytes;
        bytes.extend_from_slice(&(key.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&(entry.value.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&entry.version.to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(&entry.value);
        self.records += 1;
        if self.levels[0].bytes.len() >= BLOCK {
            self.close_leaf()?;
        }
        Ok(())
    }

    fn close_leaf(&mut self) -> Result<(), StoreError> {
        let leaf = std::mem::take(&mut self.levels[0]);
        let at = self.append(&leaf.bytes)?;
        Self::add_child(&mut self.levels[1], &leaf.first, at, leaf.before);
        Ok(())
    }

    fn append(&mut self, entries: &[u8]) -> Result<Reference, StoreError> {
        let offset = self.flushed + self.pending.len() as u64;
        let length = (entries.len() as u32).to_le_bytes();
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&length);
        hasher.update(entries);
        self.pending.extend_from_slice(&hasher.finalize().to_le_bytes());
        self.pending.extend_from_slice(&length);
        self.pending.extend_from_slice(entries);
        if self.pending.len() >= 1 << 20 {
            self.flush()?;
        }
        Ok(Reference { offset, length: entries.len() as u32 + 8 })
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        self.disk.write_at(&self.file, self.name, &self.pending, self.flushed)?;
        self.flushed += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    fn add_child(level: &mut Level, first: &[u8], at: Reference, before: u64) {
        if level.bytes.is_empty() {
            level.first = first.to_vec();
            level.before = before;
        }
        level.bytes.extend_from_slice(&(first.len() as u16).to_le_bytes());
        level.bytes.extend_from_slice(&at.offset.to_le_bytes());
        level.bytes.extend_from_slice(&at.length.to_le_bytes());
        level.bytes.extend_from_slice(&before.to_le_bytes());
        level.bytes.extend_from_slice(first);
        if level.bytes.len() >= BLOCK {
            Self::close_index(level);
        }
    }

    fn close_index(level: &mut Level) {
        let (bytes, first) = (std::mem::take(&mut level.bytes), std::mem::take(&mut level.first));
        level.finished.push((bytes, first, level.before));
    }

    /// Writes what is left and the header, and flushes the file.
    pub(super) fn finish(mut self, generation: u64, revision: u64) -> Result<(), StoreError> {
        if !self.levels[0].bytes.is_empty() {
            self.close_leaf()?;
        }
        let leaves_end = self.flushed + self.pending.len() as u64;
        let mut level = std::mem::take(&mut self.levels[1]);
        let (mut depth, mut root) = (0, Reference { offset: 0, length: 0 });
        if self.records > 0 {
            depth = 1;
            loop {
                depth += 1;
                if !level.bytes.is_empty() {
                    Self::close_index(&mut level);
                }
                let mut above = Level::default();
                let blocks = level.finished.len();
                for (bytes, first, before) in &level.finished {
                    root = self.append(bytes)?;
                    Self::add_child(&mut above, first, root, *before);
                }
                if blocks == 1 {
                    break;
                }
                level = above;
            }
        }
        self.flush()?;
        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(MAGIC);
        for number in [generation, revision, self.records, leaves_end, root.offset] {
            header.extend_from_slice(&number.to_le_bytes());
        }
        header.extend_from_slice(&root.length.to_le_bytes());
        header.extend_from_slice(&(depth as u32).to_le_bytes());
        header.resize(HEADER - 4, 0);
        let crc = crc32fast::hash(&header);
        header.extend_from_slice(&crc.to_le_bytes());
        self.disk.write_at(&self.file, self.name, &header, 0)?;
        self.disk.sync(&self.file, self.name)
    }
}
