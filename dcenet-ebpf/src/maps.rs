//! Maps from the outside: typed views over a map's descriptor.
//!
//! A view is made from an open [`Map`] (of [`crate::loader::Loaded`], [`crate::pin::Pins::get`] or [`Map::create`]) and checks its type and sizes once. Keys and values are laid out by [`Plain`], byte by byte.

mod percpu;
mod prefixes;
mod programs;

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

pub use self::percpu::PerCpuHashTable;
pub use self::prefixes::{LpmKey, PrefixTable};
pub use self::programs::ProgramArray;
use crate::object::MapKind;
pub use crate::sys::{Map, MapInfo, Put, SysError};
use crate::sys::{Ring, possible_cpus};

/// A value with a fixed layout, as a program sees it in a map.
pub trait Plain: Sized {
    /// Bytes of the layout, padding included.
    const SIZE: usize;

    /// Lays the value out in `bytes`, which has [`Plain::SIZE`] bytes that are zero.
    fn write(&self, bytes: &mut [u8]);

    /// Reads a value from [`Plain::SIZE`] bytes. Every pattern must give one.
    fn read(bytes: &[u8]) -> Self;
}

macro_rules! plain_number {
    ($($number:ty)*) => {$(
        impl Plain for $number {
            const SIZE: usize = size_of::<$number>();

            fn write(&self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_ne_bytes());
            }

            fn read(bytes: &[u8]) -> Self {
                let mut own = [0; size_of::<$number>()];
                own.copy_from_slice(bytes);
                Self::from_ne_bytes(own)
            }
        }
    )*};
}

plain_number!(u8 u16 u32 u64 i32 i64);

impl<T: Plain, const N: usize> Plain for [T; N] {
    const SIZE: usize = T::SIZE * N;

    fn write(&self, bytes: &mut [u8]) {
        for (item, bytes) in self.iter().zip(bytes.chunks_exact_mut(T::SIZE.max(1))) {
            item.write(bytes);
        }
    }

    fn read(bytes: &[u8]) -> Self {
        std::array::from_fn(|i| T::read(&bytes[i * T::SIZE..(i + 1) * T::SIZE]))
    }
}

/// Why a map cannot be used, or an access failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The map is another than the view is for.
    #[error("map {name}: {what} is {found}, and {wanted} is wanted")]
    Mismatch {
        /// The map's name.
        name: String,
        /// What differs: `type`, `key size` or `value size`.
        what: &'static str,
        /// What the kernel says.
        found: u32,
        /// What the view needs.
        wanted: u32,
    },
    /// The index is beyond the array.
    #[error("map {name}: index {index} is beyond its {entries} entries")]
    OutOfBounds {
        /// The map's name.
        name: String,
        /// The index asked for.
        index: u32,
        /// How many there are.
        entries: u32,
    },
    /// The map has no room for another key.
    #[error("map {name} is full: it holds {entries} entries")]
    Full {
        /// The map's name.
        name: String,
        /// How many it can hold.
        entries: u32,
    },
    /// The kernel refused.
    #[error("map {name}: {source}")]
    Sys {
        /// The map's name.
        name: String,
        /// What it answered.
        #[source]
        source: SysError,
    },
}

impl MapError {
    /// The errno behind the error, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Sys { source, .. } => source.raw_os_error(),
            Self::Full { .. } => Some(libc::E2BIG),
            Self::Mismatch { .. } | Self::OutOfBounds { .. } => None,
        }
    }

    fn of(map: &Map, source: SysError) -> Self {
        let info = map.info();
        match source.raw_os_error() {
            Some(libc::E2BIG) => Self::Full { name: info.name.clone(), entries: info.max_entries },
            _ => Self::Sys { name: info.name.clone(), source },
        }
    }
}

fn expect(map: &Map, kinds: &[MapKind], key: usize, value: usize) -> Result<(), MapError> {
    let info = map.info();
    let mismatch = |what, found, wanted| MapError::Mismatch { name: info.name.clone(), what, found, wanted };
    if !kinds.iter().any(|k| k.number() == info.kind) {
        return Err(mismatch("type", info.kind, kinds[0].number()));
    }
    if info.key_size as usize != key {
        return Err(mismatch("key size", info.key_size, key as u32));
    }
    if info.value_size as usize != value {
        return Err(mismatch("value size", info.value_size, value as u32));
    }
    Ok(())
}

fn bytes_of<T: Plain>(value: &T) -> Vec<u8> {
    let mut bytes = vec![0; T::SIZE];
    value.write(&mut bytes);
    bytes
}

/// An array, zero at first.
///
/// # Minimum kernel version
/// 3.19.
#[derive(Debug)]
pub struct Array<V> {
    map: Map,
    value: PhantomData<fn() -> V>,
}

impl<V: Plain> Array<V> {
    /// Views a map.
    ///
    /// # Errors
    /// [`MapError::Mismatch`] where it is no array of such values.
    pub fn new(map: Map) -> Result<Self, MapError> {
        expect(&map, &[MapKind::Array], 4, V::SIZE)?;
        Ok(Self { map, value: PhantomData })
    }

    /// How many values it has.
    pub fn entries(&self) -> u32 {
        self.map.info().max_entries
    }

    /// Reads a value.
    pub fn load(&self, index: u32) -> Result<V, MapError> {
        let mut bytes = vec![0; V::SIZE];
        match self.map.lookup(&index.to_ne_bytes(), &mut bytes) {
            Ok(true) => Ok(V::read(&bytes)),
            Ok(false) => Err(self.out_of_bounds(index)),
            Err(e) => Err(MapError::of(&self.map, e)),
        }
    }

    /// Reads `count` values from `first` on, many in one call where the kernel can (Linux 5.6), one by one otherwise. They
    /// are not of one moment: programs may write between two of them.
    ///
    /// # Errors
    /// [`MapError::OutOfBounds`] where the range goes beyond the array.
    pub fn load_range(&self, first: u32, count: u32) -> Result<Vec<V>, MapError> {
        let mut values = Vec::with_capacity(count as usize);
        read_range(&self.map, first, count, |bytes| values.push(V::read(bytes)))?;
        Ok(values)
    }

    /// All values, as [`Array::load_range`] reads them.
    pub fn load_all(&self) -> Result<Vec<V>, MapError> {
        self.load_range(0, self.entries())
    }

    /// Stores a value. A program that reads it meanwhile may see a part of it, but for numbers of at most 8 bytes
    /// (kernel/bpf/arraymap.c, `array_map_update_elem` copies).
    pub fn store(&self, index: u32, value: &V) -> Result<(), MapError> {
        if index >= self.entries() {
            return Err(self.out_of_bounds(index));
        }
        self.map.update(&index.to_ne_bytes(), &bytes_of(value), Put::Any).map_err(|e| MapError::of(&self.map, e))
    }

    /// Stores values from `first` on, many in one call where the kernel can (Linux 5.6), one by one otherwise.
    pub fn store_all(&self, first: u32, values: &[V]) -> Result<(), MapError> {
        let end = first as u64 + values.len() as u64;
        if end > u64::from(self.entries()) {
            return Err(self.out_of_bounds(u32::try_from(end - 1).unwrap_or(u32::MAX)));
        }
        let mut index = first;
        for part in values.chunks(BATCH) {
            let mut keys = Vec::with_capacity(part.len() * 4);
            let mut bytes = vec![0; part.len() * V::SIZE];
            for (i, value) in (index..).zip(part) {
                keys.extend_from_slice(&i.to_ne_bytes());
                let at = (i - index) as usize * V::SIZE;
                value.write(&mut bytes[at..at + V::SIZE]);
            }
            put_all(&self.map, &keys, &bytes)?;
            index += part.len() as u32;
        }
        Ok(())
    }

    /// The map itself.
    pub fn map(&self) -> &Map {
        &self.map
    }

    fn out_of_bounds(&self, index: u32) -> MapError {
        let info = self.map.info();
        MapError::OutOfBounds { name: info.name.clone(), index, entries: info.max_entries }
    }
}

/// An array with a value for each CPU: counters that cost a program 1 ns.
///
/// # Minimum kernel version
/// 4.6.
#[derive(Debug)]
pub struct PerCpuArray<V> {
    map: Map,
    value: PhantomData<fn() -> V>,
}

impl<V: Plain> PerCpuArray<V> {
    /// Views a map.
    ///
    /// # Errors
    /// [`MapError::Mismatch`] where it is no per-CPU array of such values.
    pub fn new(map: Map) -> Result<Self, MapError> {
        expect(&map, &[MapKind::PercpuArray], 4, V::SIZE)?;
        Ok(Self { map, value: PhantomData })
    }

    /// How many indices it has.
    pub fn entries(&self) -> u32 {
        self.map.info().max_entries
    }

    /// The value of each possible CPU.
    pub fn load(&self, index: u32) -> Result<Vec<V>, MapError> {
        let mut bytes = vec![0; self.map.value_bytes()];
        match self.map.lookup(&index.to_ne_bytes(), &mut bytes) {
            Ok(true) => Ok(bytes.chunks_exact(V::SIZE.next_multiple_of(8)).map(|b| V::read(&b[..V::SIZE])).collect()),
            Ok(false) => {
                let info = self.map.info();
                Err(MapError::OutOfBounds { name: info.name.clone(), index, entries: info.max_entries })
            }
            Err(e) => Err(MapError::of(&self.map, e)),
        }
    }

    /// Stores the same value for every CPU; a count goes to zero this way, and what is counted meanwhile may be lost.
    pub fn store(&self, index: u32, value: &V) -> Result<(), MapError> {
        let one = bytes_of(value);
        let mut bytes = vec![0; self.map.value_bytes()];
        for slot in bytes.chunks_exact_mut(V::SIZE.next_multiple_of(8)) {
            slot[..V::SIZE].copy_from_slice(&one);
        }
        self.map.update(&index.to_ne_bytes(), &bytes, Put::Any).map_err(|e| MapError::of(&self.map, e))
    }

    /// The map itself.
    pub fn map(&self) -> &Map {
        &self.map
    }
}

impl<const N: usize> PerCpuArray<[u64; N]> {
    /// The counts of all CPUs added up, wrapping as the kernel's own do.
    pub fn sum(&self, index: u32) -> Result<[u64; N], MapError> {
        Ok(add_up(self.load(index)?))
    }

    /// The sums of `count` indices from `first` on, many in one call where the kernel can (Linux 5.13), one by one
    /// otherwise.
    ///
    /// # Errors
    /// [`MapError::OutOfBounds`] where the range goes beyond the array.
    pub fn sum_range(&self, first: u32, count: u32) -> Result<Vec<[u64; N]>, MapError> {
        let mut sums = Vec::with_capacity(count as usize);
        let size = <[u64; N]>::SIZE;
        read_range(&self.map, first, count, |bytes| {
            sums.push(add_up(bytes.chunks_exact(size.max(1)).map(<[u64; N]>::read)));
        })?;
        Ok(sums)
    }
}

fn add_up<const N: usize>(counts: impl IntoIterator<Item = [u64; N]>) -> [u64; N] {
    counts.into_iter().fold([0; N], |mut sum, one| {
        for (total, count) in sum.iter_mut().zip(one) {
            *total = total.wrapping_add(count);
        }
        sum
    })
}

/// A hash table, evicting (LRU) or not.
///
/// # Minimum kernel version
/// 3.19, LRU 4.10. Batches 5.6; before, each entry takes a call.
#[derive(Debug)]
pub struct HashTable<K, V> {
    map: Map,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K: Plain, V: Plain> HashTable<K, V> {
    /// Views a map.
    ///
    /// # Errors
    /// [`MapError::Mismatch`] where it is no hash table of such keys and values.
    pub fn new(map: Map) -> Result<Self, MapError> {
        expect(&map, &[MapKind::Hash, MapKind::LruHash], K::SIZE, V::SIZE)?;
        Ok(Self { map, types: PhantomData })
    }

    /// Reads the value of a key.
    pub fn load(&self, key: &K) -> Result<Option<V>, MapError> {
        let mut bytes = vec![0; V::SIZE];
        match self.map.lookup(&bytes_of(key), &mut bytes) {
            Ok(found) => Ok(found.then(|| V::read(&bytes))),
            Err(e) => Err(MapError::of(&self.map, e)),
        }
    }

    /// Stores a value.
    ///
    /// # Errors
    /// [`MapError::Full`]; `EEXIST` and `ENOENT` where `put` says so.
    pub fn store(&self, key: &K, value: &V, put: Put) -> Result<(), MapError> {
        self.map.update(&bytes_of(key), &bytes_of(value), put).map_err(|e| MapError::of(&self.map, e))
    }

    /// Removes a key; `false` where it was not there.
    pub fn remove(&self, key: &K) -> Result<bool, MapError> {
        self.map.delete(&bytes_of(key)).map_err(|e| MapError::of(&self.map, e))
    }

    /// Stores many entries, in the order given. On an error those before the one that failed are stored.
    pub fn store_all(&self, entries: &[(K, V)]) -> Result<(), MapError> {
        for part in entries.chunks(BATCH) {
            let mut keys = vec![0; part.len() * K::SIZE];
            let mut values = vec![0; part.len() * V::SIZE];
            for (i, (key, value)) in part.iter().enumerate() {
                key.write(&mut keys[i * K::SIZE..(i + 1) * K::SIZE]);
                value.write(&mut values[i * V::SIZE..(i + 1) * V::SIZE]);
            }
            put_all(&self.map, &keys, &values)?;
        }
        Ok(())
    }

    /// Removes many keys; those that are absent are passed over. Returns how many were there.
    pub fn remove_all(&self, keys: &[K]) -> Result<usize, MapError> {
        let mut bytes = vec![0; keys.len() * K::SIZE];
        for (key, slot) in keys.iter().zip(bytes.chunks_exact_mut(K::SIZE)) {
            key.write(slot);
        }
        let mut rest = bytes.as_slice();
        let mut removed = 0;
        while !rest.is_empty() {
            let part = &rest[..rest.len().min(BATCH * K::SIZE)];
            let (done, outcome) = self.map.delete_batch(part);
            removed += done;
            rest = &rest[done * K::SIZE..];
            match outcome {
                Ok(()) => {}
                Err(e) if e.is(libc::ENOENT) => rest = &rest[K::SIZE..],
                Err(e) if is_unknown(&e) => {
                    let (one, others) = rest.split_at(K::SIZE);
                    removed += usize::from(self.map.delete(one).map_err(|e| MapError::of(&self.map, e))?);
                    rest = others;
                }
                Err(e) => return Err(MapError::of(&self.map, e)),
            }
        }
        Ok(removed)
    }

    /// All entries. What programs add or remove meanwhile may be among them or not.
    pub fn entries(&self) -> Result<Vec<(K, V)>, MapError> {
        let mut all = Vec::new();
        let mut cursor: Option<Vec<u8>> = None;
        let mut size = BATCH;
        loop {
            match self.map.read_batch(cursor.as_deref(), size) {
                Ok(batch) => {
                    let keys = batch.keys.chunks_exact(K::SIZE);
                    let values = batch.values.chunks_exact(V::SIZE);
                    all.extend(keys.zip(values).take(batch.count).map(|(k, v)| (K::read(k), V::read(v))));
                    match batch.next {
                        Some(next) => cursor = Some(next),
                        None => return Ok(all),
                    }
                }
                // A bucket holds more than the whole batch.
                Err(e) if e.is(libc::ENOSPC) && size < self.map.info().max_entries as usize => size *= 4,
                Err(e) if is_unknown(&e) && cursor.is_none() => return self.entries_one_by_one(),
                Err(e) => return Err(MapError::of(&self.map, e)),
            }
        }
    }

    fn entries_one_by_one(&self) -> Result<Vec<(K, V)>, MapError> {
        let failed = |e| MapError::of(&self.map, e);
        let mut all = Vec::new();
        let mut key: Option<Vec<u8>> = None;
        let mut next = vec![0; K::SIZE];
        // A key that is removed under us starts the walk anew; this many steps end it all the same.
        for _ in 0..=2 * u64::from(self.map.info().max_entries) {
            if !self.map.next_key(key.as_deref(), &mut next).map_err(failed)? {
                break;
            }
            let mut value = vec![0; V::SIZE];
            if self.map.lookup(&next, &mut value).map_err(failed)? {
                all.push((K::read(&next), V::read(&value)));
            }
            key = Some(next.clone());
        }
        Ok(all)
    }

    /// The map itself.
    pub fn map(&self) -> &Map {
        &self.map
    }
}

/// Hands the values of an array to `each`, in batches or one by one where the kernel knows none.
fn read_range(map: &Map, first: u32, count: u32, mut each: impl FnMut(&[u8])) -> Result<(), MapError> {
    let (entries, size) = (map.info().max_entries, map.value_bytes());
    let beyond = |index| MapError::OutOfBounds { name: map.info().name.clone(), index, entries };
    let end = u64::from(first) + u64::from(count);
    if end > u64::from(entries) {
        return Err(beyond(u32::try_from(end - 1).unwrap_or(u32::MAX)));
    }
    let (mut index, end, most) = (first, end as u32, (BATCH_BYTES / size.max(1)).clamp(1, BATCH));
    let mut batches = true;
    while index < end {
        if batches {
            // The cursor of an array is the index before.
            let cursor = index.checked_sub(1).map(u32::to_ne_bytes);
            let wanted = most.min((end - index) as usize);
            match map.read_batch(cursor.as_ref().map(<[u8; 4]>::as_slice), wanted) {
                Ok(batch) if batch.count > 0 => {
                    batch.values.chunks_exact(size).for_each(&mut each);
                    index += batch.count as u32;
                }
                Ok(_) => return Err(beyond(index)),
                Err(e) if is_unknown(&e) => batches = false,
                Err(e) => return Err(MapError::of(map, e)),
            }
        } else {
            let mut bytes = vec![0; size];
            if !map.lookup(&index.to_ne_bytes(), &mut bytes).map_err(|e| MapError::of(map, e))? {
                return Err(beyond(index));
            }
            each(&bytes);
            index += 1;
        }
    }
    Ok(())
}

/// Stores a batch, or one by one where the kernel knows no batches.
fn put_all(map: &Map, keys: &[u8], values: &[u8]) -> Result<(), MapError> {
    if keys.is_empty() {
        return Ok(());
    }
    let (_, outcome) = map.update_batch(keys, values);
    match outcome {
        Ok(()) => Ok(()),
        Err(e) if is_unknown(&e) => {
            let key_size = map.info().key_size as usize;
            for (key, value) in keys.chunks_exact(key_size).zip(values.chunks_exact(map.value_bytes())) {
                map.update(key, value, Put::Any).map_err(|e| MapError::of(map, e))?;
            }
            Ok(())
        }
        Err(e) => Err(MapError::of(map, e)),
    }
}

/// Whether the kernel, or this type of map, knows no batches: EINVAL for an unknown command, ENOTSUPP (524, not in user
/// space's errno.h) for a type without them.
fn is_unknown(error: &SysError) -> bool {
    error.is(libc::EINVAL) || error.is(524)
}

/// The consumer's side of a ring buffer: events from programs.
///
/// One consumer at a time: two on the same map take each other's events.
///
/// # Minimum kernel version
/// 5.8.
#[derive(Debug)]
pub struct RingBuffer {
    ring: Ring,
    name: String,
}

impl RingBuffer {
    /// Views a map. What is in it already is handed out first.
    ///
    /// # Errors
    /// [`MapError::Mismatch`] where it is no ring buffer; `EPERM` where it was made read-only for user space.
    pub fn new(map: Map) -> Result<Self, MapError> {
        expect(&map, &[MapKind::Ringbuf], 0, 0)?;
        let name = map.info().name.clone();
        let bytes = map.info().max_entries as usize;
        let failed = |source| MapError::Sys { name: name.clone(), source };
        let ring = Ring::new(OwnedFd::from(map), bytes).map_err(failed)?;
        Ok(Self { ring, name })
    }

    /// Hands every waiting event to `each`, oldest first, at most `most`, and returns how many there were. Its room is
    /// given back after each.
    ///
    /// # Errors
    /// Only if the memory holds no valid record: somebody else moves the consumer's position.
    pub fn drain(&mut self, most: usize, each: impl FnMut(&[u8])) -> Result<usize, MapError> {
        self.ring.drain(most, each).map_err(|source| MapError::Sys { name: self.name.clone(), source })
    }

    /// Waits until an event is there, at most for `limit`; `false` when none came. Programs that give
    /// `BPF_RB_NO_WAKEUP` do not wake: poll by time then. The descriptor ([`AsFd`]) can be waited on with epoll, too.
    pub fn wait(&self, limit: Duration) -> Result<bool, MapError> {
        self.ring.wait(limit).map_err(|source| MapError::Sys { name: self.name.clone(), source })
    }

    /// Bytes that wait, the 8 bytes in front of each event included: near the size of the ring, events will be lost.
    pub fn pending(&self) -> u64 {
        self.ring.pending()
    }
}

impl AsFd for RingBuffer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

/// The number of possible CPUs, online or not: how many values a per-CPU map has for each key.
pub fn cpus() -> Result<usize, SysError> {
    possible_cpus()
}

/// Entries in one call: large enough that the call's cost vanishes, small enough for the stack of pages that the kernel
/// copies.
const BATCH: usize = 4096;

/// Bytes of values in one call: those of per-CPU maps are large where there are many CPUs.
const BATCH_BYTES: usize = 1 << 20;
