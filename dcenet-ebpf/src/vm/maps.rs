//! Maps in memory.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};

use super::TailTarget;
use crate::object::{LPM_PREFIX_BYTES, MapFlags, MapKind, MapSpec};

/// Why a map refused an operation, with the kernel's error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// No entry has the key (ENOENT).
    #[error("no entry has this key")]
    NotFound,
    /// An entry has the key already (EEXIST).
    #[error("an entry has this key already")]
    Exists,
    /// The map is full, or the index beyond its end (E2BIG).
    #[error("the map is full, or the index beyond its end")]
    Full,
    /// The trie holds as many prefixes as it may (ENOSPC).
    #[error("the trie is full")]
    NoSpace,
    /// Flags, sizes or the operation itself do not fit the map (EINVAL).
    #[error("flags, sizes or operation do not fit the map")]
    Invalid,
    /// The ring buffer is full (EAGAIN).
    #[error("the ring buffer has no room")]
    NoRoom,
}

impl MapError {
    /// The kernel's number, positive.
    pub const fn errno(self) -> i32 {
        match self {
            Self::NotFound => 2,
            Self::Full => 7,
            Self::NoRoom => 11,
            Self::Exists => 17,
            Self::Invalid => 22,
            Self::NoSpace => 28,
        }
    }
}

/// Whether an update may create or replace an entry (`BPF_ANY`, `BPF_NOEXIST`, `BPF_EXIST`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// Either.
    Any,
    /// Create only.
    Create,
    /// Replace only.
    Replace,
}

impl Update {
    pub(super) const fn from_flags(flags: u64) -> Option<Self> {
        match flags {
            0 => Some(Self::Any),
            1 => Some(Self::Create),
            2 => Some(Self::Replace),
            _ => None,
        }
    }
}

/// The maps of an object, shared by the runs of its programs.
#[derive(Debug, Clone)]
pub struct Maps {
    maps: Vec<Map>,
}

impl Maps {
    /// Makes the maps of an object or program, arrays zeroed and all else empty.
    pub fn new(specs: &[MapSpec]) -> Self {
        Self { maps: specs.iter().map(Map::new).collect() }
    }

    /// The map of this name.
    pub fn get(&self, name: &str) -> Option<&Map> {
        self.maps.iter().find(|map| map.spec.name == name)
    }

    /// The map of this name.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Map> {
        self.maps.iter_mut().find(|map| map.spec.name == name)
    }

    /// All maps in the object's order.
    pub fn iter(&self) -> impl Iterator<Item = &Map> {
        self.maps.iter()
    }

    pub(super) fn at(&self, index: u32) -> Option<&Map> {
        self.maps.get(index as usize)
    }

    pub(super) fn at_mut(&mut self, index: u32) -> Option<&mut Map> {
        self.maps.get_mut(index as usize)
    }
}

/// A map. Per-CPU maps have one CPU here. A deleted entry's memory may be taken by a new one in the same run, as with the
/// kernel's preallocated hashes.
#[derive(Debug, Clone)]
pub struct Map {
    spec: MapSpec,
    /// All values, each at a multiple of `stride`.
    values: Vec<u8>,
    stride: usize,
    slots: HashMap<Box<[u8]>, u32>,
    free: Vec<u32>,
    /// Tries only: how many entries have a prefix of this length.
    lengths: BTreeMap<u32, usize>,
    /// LRU only: entries by the time of their last use, and that time by slot.
    uses: BTreeMap<u64, (u32, Box<[u8]>)>,
    used_at: Vec<u64>,
    clock: u64,
    /// Array of programs only: by index, the number that [`Vm::add`](super::Vm::add) gave.
    programs: HashMap<u32, TailTarget>,
    records: Vec<Record>,
    /// Bytes of records that were not drained yet, headers included.
    occupied: usize,
}

#[derive(Debug, Clone)]
struct Record {
    data: Vec<u8>,
    state: RecordState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RecordState {
    Reserved,
    Submitted,
    Discarded,
}

impl Map {
    fn new(spec: &MapSpec) -> Self {
        let stride = (spec.value_size as usize).next_multiple_of(8).max(8);
        let values = match spec.kind {
            MapKind::Array | MapKind::PercpuArray => vec![0; stride * spec.max_entries as usize],
            _ => Vec::new(),
        };
        Self {
            spec: spec.clone(),
            values,
            stride,
            slots: HashMap::new(),
            free: Vec::new(),
            lengths: BTreeMap::new(),
            uses: BTreeMap::new(),
            used_at: Vec::new(),
            clock: 0,
            programs: HashMap::new(),
            records: Vec::new(),
            occupied: 0,
        }
    }

    /// What it was made from.
    pub fn spec(&self) -> &MapSpec {
        &self.spec
    }

    /// How many entries it holds; of a ring buffer, submitted records; of an array of programs, places taken.
    pub fn len(&self) -> usize {
        match self.spec.kind {
            MapKind::Array | MapKind::PercpuArray => self.spec.max_entries as usize,
            MapKind::Hash | MapKind::PercpuHash | MapKind::LruHash | MapKind::LpmTrie => self.slots.len(),
            MapKind::ProgArray => self.programs.len(),
            MapKind::Ringbuf => self.records.iter().filter(|r| r.state == RecordState::Submitted).count(),
        }
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value of a key, of a trie that of the longest prefix. Unlike a program's lookup, it does not count as a use of
    /// an LRU entry.
    pub fn lookup(&self, key: &[u8]) -> Option<&[u8]> {
        self.slot_of(key).map(|slot| self.value(slot))
    }

    /// Keys and values of a hash or trie, in no order; bits beyond a prefix are zero.
    pub fn entries(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.slots.iter().map(|(key, slot)| (&**key, self.value(*slot)))
    }

    /// Sets the value of a key.
    ///
    /// # Errors
    /// As the kernel: a full hash and an index beyond the array are [`MapError::Full`], a full trie is
    /// [`MapError::NoSpace`]; see also [`Update`]. An array of programs takes [`Map::set_program`] only.
    pub fn update(&mut self, key: &[u8], value: &[u8], mode: Update) -> Result<(), MapError> {
        if key.len() != self.spec.key_size as usize || value.len() != self.spec.value_size as usize {
            return Err(MapError::Invalid);
        }
        let own;
        let key = if self.spec.kind == MapKind::LpmTrie {
            own = self.prefix_of(key).ok_or(MapError::Invalid)?;
            &*own
        } else {
            key
        };
        let slot = match (self.spec.kind, self.slot_of_exactly(key)) {
            (MapKind::Ringbuf | MapKind::ProgArray, _) => return Err(MapError::Invalid),
            (MapKind::Array | MapKind::PercpuArray, None) => return Err(MapError::Full),
            (_, Some(_)) if mode == Update::Create => return Err(MapError::Exists),
            (_, Some(slot)) => slot,
            (_, None) if mode == Update::Replace => return Err(MapError::NotFound),
            (_, None) => self.insert(key)?,
        };
        self.touch(slot, key);
        let start = slot as usize * self.stride;
        self.values[start..start + value.len()].copy_from_slice(value);
        Ok(())
    }

    /// Sets or empties a place of an array of programs. `program` is of the [`Vm`](super::Vm) that will run with these
    /// maps.
    ///
    /// # Errors
    /// [`MapError::Full`] for an index beyond the array, [`MapError::Invalid`] for other kinds.
    pub fn set_program(&mut self, index: u32, program: Option<TailTarget>) -> Result<(), MapError> {
        if self.spec.kind != MapKind::ProgArray {
            return Err(MapError::Invalid);
        }
        if index >= self.spec.max_entries {
            return Err(MapError::Full);
        }
        match program {
            Some(program) => self.programs.insert(index, program),
            None => self.programs.remove(&index),
        };
        Ok(())
    }

    /// Removes an entry of a hash or trie.
    ///
    /// # Errors
    /// [`MapError::NotFound`]; [`MapError::Invalid`] for other kinds, and for a prefix longer than the trie's keys.
    pub fn delete(&mut self, key: &[u8]) -> Result<(), MapError> {
        let slot = match self.spec.kind {
            MapKind::Hash | MapKind::PercpuHash | MapKind::LruHash => self.slots.remove(key),
            MapKind::LpmTrie => {
                let prefix = self.prefix_of(key).ok_or(MapError::Invalid)?;
                let slot = self.slots.remove(&prefix);
                if let (Some(_), Entry::Occupied(mut count)) = (slot, self.lengths.entry(length_of(&prefix))) {
                    *count.get_mut() -= 1;
                    if *count.get() == 0 {
                        count.remove();
                    }
                }
                slot
            }
            _ => return Err(MapError::Invalid),
        };
        let slot = slot.ok_or(MapError::NotFound)?;
        if self.spec.kind == MapKind::LruHash {
            self.uses.remove(&self.used_at[slot as usize]);
        }
        self.free.push(slot);
        Ok(())
    }

    /// Takes the submitted records out of a ring buffer, in the order of their reservation.
    pub fn drain(&mut self) -> Vec<Vec<u8>> {
        self.occupied = 0;
        let records = std::mem::take(&mut self.records).into_iter();
        records.filter(|r| r.state == RecordState::Submitted).map(|r| r.data).collect()
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.spec.flags.contains(MapFlags::RDONLY_PROG)
    }

    /// Whether programs may take its value's address without a lookup (`array_map_direct_value_addr` in
    /// `kernel/bpf/arraymap.c`).
    pub(super) fn has_direct_value(&self) -> bool {
        self.spec.kind == MapKind::Array && self.spec.max_entries == 1
    }

    /// A program's lookup.
    pub(super) fn find(&mut self, key: &[u8]) -> Option<u32> {
        let slot = self.slot_of(key)?;
        self.touch(slot, key);
        Some(slot)
    }

    pub(super) fn value(&self, slot: u32) -> &[u8] {
        let start = slot as usize * self.stride;
        &self.values[start..start + self.spec.value_size as usize]
    }

    pub(super) fn value_mut(&mut self, slot: u32) -> &mut [u8] {
        let start = slot as usize * self.stride;
        &mut self.values[start..start + self.spec.value_size as usize]
    }

    /// Room for a record, as the kernel counts it: 8 bytes of header, and the whole a multiple of 8.
    pub(super) fn reserve(&mut self, size: usize) -> Result<u32, MapError> {
        let needs = (size + 8).next_multiple_of(8);
        if self.occupied + needs > self.spec.max_entries as usize {
            return Err(MapError::NoRoom);
        }
        self.occupied += needs;
        self.records.push(Record { data: vec![0; size], state: RecordState::Reserved });
        Ok(self.records.len() as u32 - 1)
    }

    pub(super) fn record(&self, index: u32) -> Option<&[u8]> {
        let record = self.records.get(index as usize)?;
        (record.state == RecordState::Reserved).then_some(&record.data)
    }

    pub(super) fn record_mut(&mut self, index: u32) -> Option<&mut [u8]> {
        let record = self.records.get_mut(index as usize)?;
        (record.state == RecordState::Reserved).then_some(&mut record.data)
    }

    /// Ends a reservation; false if there is none.
    pub(super) fn release(&mut self, index: u32, submit: bool) -> bool {
        let reserved = self.records.get_mut(index as usize).filter(|r| r.state == RecordState::Reserved);
        let Some(record) = reserved else { return false };
        record.state = if submit { RecordState::Submitted } else { RecordState::Discarded };
        true
    }

    /// The program at an index; none where the place is empty or beyond the array.
    pub(super) fn program(&self, index: u32) -> Option<TailTarget> {
        self.programs.get(&index).copied()
    }

    fn slot_of(&self, key: &[u8]) -> Option<u32> {
        if self.spec.kind != MapKind::LpmTrie {
            return self.slot_of_exactly(key);
        }
        let mut prefix = self.prefix_of(key)?;
        // Only lengths that are there: each costs a hash of the whole key.
        self.lengths.range(..=length_of(&prefix)).rev().find_map(|(length, _)| {
            shorten(&mut prefix, *length);
            self.slots.get(&prefix).copied()
        })
    }

    fn slot_of_exactly(&self, key: &[u8]) -> Option<u32> {
        match self.spec.kind {
            MapKind::Array | MapKind::PercpuArray => {
                let index = u32::from_le_bytes(key.try_into().ok()?);
                (index < self.spec.max_entries).then_some(index)
            }
            MapKind::Hash | MapKind::PercpuHash | MapKind::LruHash | MapKind::LpmTrie => self.slots.get(key).copied(),
            MapKind::Ringbuf | MapKind::ProgArray => None,
        }
    }

    /// A trie's key with the bits beyond its prefix cleared; none where it has the wrong size, or the prefix is longer
    /// than the data.
    fn prefix_of(&self, key: &[u8]) -> Option<Box<[u8]>> {
        let (length, data) = key.split_first_chunk()?;
        let length = u32::from_le_bytes(*length);
        if key.len() != self.spec.key_size as usize || length as usize > data.len() * 8 {
            return None;
        }
        let mut prefix: Box<[u8]> = key.into();
        shorten(&mut prefix, length);
        Some(prefix)
    }

    fn insert(&mut self, key: &[u8]) -> Result<u32, MapError> {
        if self.slots.len() == self.spec.max_entries as usize {
            match self.spec.kind {
                MapKind::LruHash => {}
                MapKind::LpmTrie => return Err(MapError::NoSpace),
                _ => return Err(MapError::Full),
            }
            let (_, (slot, oldest)) = self.uses.pop_first().ok_or(MapError::Full)?;
            self.slots.remove(&oldest);
            self.free.push(slot);
        }
        let slot = self.free.pop().unwrap_or((self.values.len() / self.stride) as u32);
        if slot as usize * self.stride == self.values.len() {
            self.values.resize(self.values.len() + self.stride, 0);
            self.used_at.push(0);
        }
        self.slots.insert(key.into(), slot);
        if self.spec.kind == MapKind::LpmTrie {
            *self.lengths.entry(length_of(key)).or_insert(0) += 1;
        }
        Ok(slot)
    }

    fn touch(&mut self, slot: u32, key: &[u8]) {
        if self.spec.kind != MapKind::LruHash {
            return;
        }
        self.clock += 1;
        let entry = self.uses.remove(&self.used_at[slot as usize]).filter(|(at, _)| *at == slot);
        self.uses.insert(self.clock, entry.unwrap_or_else(|| (slot, key.into())));
        self.used_at[slot as usize] = self.clock;
    }
}

/// The length in bits of a trie's prefix.
fn length_of(prefix: &[u8]) -> u32 {
    prefix.first_chunk().map_or(0, |length| u32::from_le_bytes(*length))
}

/// Makes a trie's key one of a prefix that is no longer than it was.
fn shorten(key: &mut [u8], length: u32) {
    let Some((field, data)) = key.split_at_mut_checked(LPM_PREFIX_BYTES as usize) else { return };
    field.copy_from_slice(&length.to_le_bytes());
    let whole = length as usize / 8;
    if let Some(partial) = data.get_mut(whole) {
        *partial &= !(0xff >> (length % 8));
    }
    if let Some(beyond) = data.get_mut(whole + 1..) {
        beyond.fill(0);
    }
}
