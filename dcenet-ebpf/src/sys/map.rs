//! Commands on maps.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::object::MapSpec;

use super::{Attr, Command, SysError, length, object_info, possible_cpus, text_at, u32_at};

/// What the kernel says of a map (`struct bpf_map_info`).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapInfo {
    /// The type: a value of `enum bpf_map_type`.
    pub kind: u32,
    /// The number that the kernel gave it; never reused while the system runs, until the counter wraps.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value, of one CPU where each has its own.
    pub value_size: u32,
    /// The largest number of entries; of a ring buffer, its bytes.
    pub max_entries: u32,
    /// The flags that it was made with (`BPF_F_*`).
    pub flags: u32,
    /// The first 15 bytes of its name.
    pub name: String,
}

/// An open map with its description, and the commands on it by bytes.
///
/// The kernel copies keys and values by the map's own sizes, whatever the caller handed in, so every method compares
/// lengths first: a wrong one is `InvalidInput` and reaches no kernel.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    info: MapInfo,
    /// Bytes of all that one key leads to: a value for each possible CPU, each on an 8-byte border, in a per-CPU map.
    value_bytes: usize,
    cpus: usize,
}

/// What [`Map::update`] does when the key is there, or is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Put {
    /// Adds or replaces (`BPF_ANY`).
    #[default]
    Any,
    /// Adds; fails with `EEXIST` (`BPF_NOEXIST`).
    New,
    /// Replaces; fails with `ENOENT` (`BPF_EXIST`).
    Existing,
}

/// A part of a map, as [`Map::read_batch`] hands it out.
#[derive(Debug, Clone, Default)]
pub(crate) struct Batch {
    pub(crate) keys: Vec<u8>,
    pub(crate) values: Vec<u8>,
    pub(crate) count: usize,
    /// Where the next batch starts; none after the last.
    pub(crate) next: Option<Vec<u8>>,
}

impl Map {
    /// Makes a map. Its name is for people who look at the kernel: characters that the kernel refuses become `_`.
    /// Whether the specification asks for a pin is not looked at; [`crate::pin::Pins::pin`] pins.
    ///
    /// # Errors
    /// `EINVAL` for sizes that the kind does not take, `E2BIG` and `ENOMEM` for too large ones, `EPERM` without CAP_BPF.
    pub fn create(spec: &MapSpec) -> Result<Self, SysError> {
        let MapSpec { name, kind, key_size, value_size, max_entries, flags, pinning: _ } = spec;
        let mut attr = Attr::new()
            .u32(0, kind.number())
            .u32(4, *key_size)
            .u32(8, *value_size)
            .u32(12, *max_entries)
            .u32(16, flags.bits())
            .name(28, name);
        // SAFETY: the attribute holds no pointer; the command returns a new descriptor.
        let fd = unsafe { attr.call_for_fd(Command::MAP_CREATE) }?;
        Self::from_fd(fd)
    }

    /// Takes an open map and asks the kernel what it is.
    ///
    /// # Errors
    /// `EINVAL` where the descriptor is none of bpf(2)'s; `InvalidInput` where it is a program's or a link's.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, SysError> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)));
        // A program answers the same command with a description of its own, which would be misread.
        if link.is_ok_and(|l| l.as_os_str() != "anon_inode:bpf-map") {
            return Err(wrong_input("a map's descriptor"));
        }
        let mut raw = [0; 80];
        object_info(fd.as_fd(), &mut raw)?;
        let info = MapInfo {
            kind: u32_at(&raw, 0),
            id: u32_at(&raw, 4),
            key_size: u32_at(&raw, 8),
            value_size: u32_at(&raw, 12),
            max_entries: u32_at(&raw, 16),
            flags: u32_at(&raw, 20),
            name: text_at(&raw, 24, 16),
        };
        let (cpus, value_bytes) = match info.kind {
            PERCPU_HASH | PERCPU_ARRAY | LRU_PERCPU_HASH | PERCPU_CGROUP_STORAGE => {
                let cpus = possible_cpus()?;
                (cpus, (info.value_size as usize).next_multiple_of(8) * cpus)
            }
            // Maps of descriptors take and give 4 bytes; the others their own size.
            _ => (1, info.value_size as usize),
        };
        Ok(Self { fd, info, value_bytes, cpus })
    }

    /// Opens a map by the number that the kernel gave it.
    pub fn by_id(id: u32) -> Result<Self, SysError> {
        let mut attr = Attr::new().u32(0, id);
        // SAFETY: the attribute holds no pointer; the command returns a new descriptor.
        let fd = unsafe { attr.call_for_fd(Command::MAP_GET_FD_BY_ID) }?;
        Self::from_fd(fd)
    }

    /// What the kernel said of it when it was opened.
    pub fn info(&self) -> &MapInfo {
        &self.info
    }

    /// How many values a key leads to: one, or one for each possible CPU.
    pub fn values_per_key(&self) -> usize {
        self.cpus
    }

    /// Bytes that [`Map::lookup`] fills and [`Map::update`] takes.
    pub fn value_bytes(&self) -> usize {
        self.value_bytes
    }

    /// Another descriptor of the same map.
    pub fn try_clone(&self) -> Result<Self, SysError> {
        let fd = self.fd.try_clone().map_err(|source| SysError { call: "dup", source })?;
        Ok(Self { fd, info: self.info.clone(), ..*self })
    }

    /// Copies the value of `key` out; `false` where there is none.
    pub fn lookup(&self, key: &[u8], value: &mut [u8]) -> Result<bool, SysError> {
        self.check(key.len() == self.key_bytes() && value.len() == self.value_bytes)?;
        let mut attr = self.element(key).u64(16, value.as_mut_ptr() as u64);
        // SAFETY: the kernel reads a key and writes a value of the map's sizes, and the slices have just those.
        let done = unsafe { attr.call(Command::MAP_LOOKUP_ELEM) };
        found(done)
    }

    /// Stores a value.
    pub fn update(&self, key: &[u8], value: &[u8], put: Put) -> Result<(), SysError> {
        self.check(key.len() == self.key_bytes() && value.len() == self.value_bytes)?;
        let mut attr = self.element(key).u64(16, value.as_ptr() as u64).u64(24, put as u64);
        // SAFETY: the kernel reads a key and a value of the map's sizes, and the slices have just those.
        unsafe { attr.call(Command::MAP_UPDATE_ELEM) }.map(drop)
    }

    /// Removes a key; `false` where it was not there.
    pub fn delete(&self, key: &[u8]) -> Result<bool, SysError> {
        self.check(key.len() == self.key_bytes())?;
        let mut attr = self.element(key);
        // SAFETY: the kernel reads a key of the map's size, and the slice has just that.
        let done = unsafe { attr.call(Command::MAP_DELETE_ELEM) };
        found(done)
    }

    /// Writes the key that follows `key`, or the first one, into `next`; `false` after the last. Where `key` is gone
    /// meanwhile a hash map begins anew.
    pub fn next_key(&self, key: Option<&[u8]>, next: &mut [u8]) -> Result<bool, SysError> {
        self.check(key.is_none_or(|k| k.len() == self.key_bytes()) && next.len() == self.key_bytes())?;
        let start = match key {
            Some(key) => self.element(key),
            None => Attr::new().fd(0, self.fd.as_fd()),
        };
        let mut attr = start.u64(16, next.as_mut_ptr() as u64);
        // SAFETY: the kernel reads and writes a key of the map's size, and both slices have just that; a null pointer
        // for the key means the first.
        let done = unsafe { attr.call(Command::MAP_GET_NEXT_KEY) };
        found(done)
    }

    /// Reads at most `most` entries in one call. `ENOSPC` means that one bucket of the hash alone holds more.
    pub(crate) fn read_batch(&self, start: Option<&[u8]>, most: usize) -> Result<Batch, SysError> {
        // The cursor is a 4-byte bucket number for hash maps and a key for the others (kernel/bpf/hashtab.c,
        // `__htab_map_lookup_and_delete_batch`; kernel/bpf/syscall.c, `generic_map_lookup_batch`).
        let cursor = self.key_bytes().max(4);
        self.check(start.is_none_or(|s| s.len() == cursor))?;
        let mut keys = vec![0; most * self.key_bytes()];
        let mut values = vec![0; most * self.value_bytes];
        let mut next = vec![0; cursor];
        let mut attr = Attr::new()
            .u64(0, start.map_or(0, |s| s.as_ptr() as u64))
            .u64(8, next.as_mut_ptr() as u64)
            .u64(16, keys.as_mut_ptr() as u64)
            .u64(24, values.as_mut_ptr() as u64)
            .u32(32, length(most))
            .fd(36, self.fd.as_fd());
        // SAFETY: the kernel writes at most `most` keys and values of the map's sizes, for which there is room, and a
        // cursor of at most `cursor` bytes, which is also what it reads at the start.
        let done = unsafe { attr.call(Command::MAP_LOOKUP_BATCH) };
        let last = match done {
            Ok(_) => false,
            Err(e) if e.is(libc::ENOENT) => true,
            Err(e) => return Err(e),
        };
        let count = (attr.read_u32(32) as usize).min(most);
        keys.truncate(count * self.key_bytes());
        values.truncate(count * self.value_bytes);
        Ok(Batch { keys, values, count, next: (!last).then_some(next) })
    }

    /// Stores as many values as there are keys in one call. Returns how many were stored, and what stopped it.
    pub(crate) fn update_batch(&self, keys: &[u8], values: &[u8]) -> (usize, Result<(), SysError>) {
        let count = self.count(keys);
        if let Err(e) =
            self.check(count * self.key_bytes() == keys.len() && count * self.value_bytes == values.len() && count > 0)
        {
            return (0, Err(e));
        }
        let mut attr = self.batch(keys, count).u64(24, values.as_ptr() as u64);
        // SAFETY: the kernel reads `count` keys and values of the map's sizes, and the slices hold just those.
        let done = unsafe { attr.call(Command::MAP_UPDATE_BATCH) };
        part(&attr, count, done)
    }

    /// Removes keys in one call. Returns how many were removed, and what stopped it: `ENOENT` at a key that is absent.
    pub(crate) fn delete_batch(&self, keys: &[u8]) -> (usize, Result<(), SysError>) {
        let count = self.count(keys);
        if let Err(e) = self.check(count * self.key_bytes() == keys.len() && count > 0) {
            return (0, Err(e));
        }
        let mut attr = self.batch(keys, count);
        // SAFETY: the kernel reads `count` keys of the map's size, and the slice holds just those.
        let done = unsafe { attr.call(Command::MAP_DELETE_BATCH) };
        part(&attr, count, done)
    }

    fn key_bytes(&self) -> usize {
        self.info.key_size as usize
    }

    fn count(&self, keys: &[u8]) -> usize {
        keys.len().checked_div(self.key_bytes()).unwrap_or(0)
    }

    fn element(&self, key: &[u8]) -> Attr {
        Attr::new().fd(0, self.fd.as_fd()).u64(8, key.as_ptr() as u64)
    }

    fn batch(&self, keys: &[u8], count: usize) -> Attr {
        Attr::new().u64(16, keys.as_ptr() as u64).u32(32, length(count)).fd(36, self.fd.as_fd())
    }

    fn check(&self, right: bool) -> Result<(), SysError> {
        if right { Ok(()) } else { Err(wrong_input("keys and values of the map's sizes")) }
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Map> for OwnedFd {
    fn from(map: Map) -> OwnedFd {
        map.fd
    }
}

fn wrong_input(wanted: &'static str) -> SysError {
    SysError { call: "bpf", source: io::Error::new(io::ErrorKind::InvalidInput, format!("{wanted} wanted")) }
}

fn found(done: Result<i64, SysError>) -> Result<bool, SysError> {
    match done {
        Ok(_) => Ok(true),
        Err(e) if e.is(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// What a batch did: where it stopped at an element the kernel has written its number, and where it was refused before
/// it began the attribute still holds the full count (kernel/bpf/syscall.c, `generic_map_update_batch`).
fn part(attr: &Attr, count: usize, done: Result<i64, SysError>) -> (usize, Result<(), SysError>) {
    match done {
        Ok(_) => (count, Ok(())),
        Err(e) => {
            let handled = attr.read_u32(32) as usize;
            (if handled >= count { 0 } else { handled }, Err(e))
        }
    }
}

const PERCPU_HASH: u32 = 5;
const PERCPU_ARRAY: u32 = 6;
const LRU_PERCPU_HASH: u32 = 10;
const PERCPU_CGROUP_STORAGE: u32 = 21;
