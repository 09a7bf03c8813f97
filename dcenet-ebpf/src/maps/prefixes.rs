//! Longest-prefix tries.

use std::marker::PhantomData;

use super::{Map, MapError, Plain, Put, bytes_of, expect};
use crate::object::MapKind;

/// A prefix, as `struct bpf_lpm_trie_key_u8` (`include/uapi/linux/bpf.h`) lays it out. The trie reads `data` from the
/// highest bit of its first byte on, which suits addresses in network order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LpmKey<const N: usize> {
    /// How many bits of `data` count, at most `8 * N`.
    pub prefix_len: u32,
    /// The bits; those beyond the prefix do not count.
    pub data: [u8; N],
}

impl<const N: usize> Plain for LpmKey<N> {
    const SIZE: usize = 4 + N;

    fn write(&self, bytes: &mut [u8]) {
        let (length, data) = bytes.split_at_mut(4);
        self.prefix_len.write(length);
        data.copy_from_slice(&self.data);
    }

    fn read(bytes: &[u8]) -> Self {
        let (length, data) = bytes.split_at(4);
        Self { prefix_len: u32::read(length), data: Plain::read(data) }
    }
}

/// Prefixes of up to `8 * N` bits to values.
///
/// # Minimum kernel version
/// 4.11; listing 4.16. Before 6.13 (and the stable kernels of December 2024) the kernel takes no notice of [`Put`] here.
#[derive(Debug)]
pub struct PrefixTable<const N: usize, V> {
    map: Map,
    value: PhantomData<fn() -> V>,
}

impl<const N: usize, V: Plain> PrefixTable<N, V> {
    /// Views a map.
    ///
    /// # Errors
    /// [`MapError::Mismatch`] where it is no trie of such prefixes and values.
    pub fn new(map: Map) -> Result<Self, MapError> {
        expect(&map, &[MapKind::LpmTrie], LpmKey::<N>::SIZE, V::SIZE)?;
        Ok(Self { map, value: PhantomData })
    }

    /// The value of the longest prefix that `key` begins with and that is no longer than it.
    pub fn load(&self, key: &LpmKey<N>) -> Result<Option<V>, MapError> {
        let mut bytes = vec![0; V::SIZE];
        let found = self.map.lookup(&bytes_of(key), &mut bytes).map_err(|e| MapError::of(&self.map, e))?;
        Ok(found.then(|| V::read(&bytes)))
    }

    /// Stores the value of a prefix.
    ///
    /// # Errors
    /// `ENOSPC` where the trie is full, `EINVAL` for a prefix of more than `8 * N` bits; `EEXIST` and `ENOENT` where `put`
    /// says so.
    pub fn store(&self, key: &LpmKey<N>, value: &V, put: Put) -> Result<(), MapError> {
        self.map.update(&bytes_of(key), &bytes_of(value), put).map_err(|e| MapError::of(&self.map, e))
    }

    /// Removes just this prefix; `false` where it was not there.
    pub fn remove(&self, key: &LpmKey<N>) -> Result<bool, MapError> {
        self.map.delete(&bytes_of(key)).map_err(|e| MapError::of(&self.map, e))
    }

    /// All prefixes, longer ones before those that hold them (`trie_get_next_key`, `kernel/bpf/lpm_trie.c`), each with the
    /// value that a lookup of it finds. What is changed meanwhile may be among them or not.
    pub fn entries(&self) -> Result<Vec<(LpmKey<N>, V)>, MapError> {
        let mut all = Vec::new();
        let mut key: Option<Vec<u8>> = None;
        let mut next = vec![0; LpmKey::<N>::SIZE];
        // A prefix that is removed under us starts the walk anew; this many steps end it all the same.
        for _ in 0..=2 * u64::from(self.map.info().max_entries) {
            if !self.map.next_key(key.as_deref(), &mut next).map_err(|e| MapError::of(&self.map, e))? {
                break;
            }
            let prefix = LpmKey::read(&next);
            if let Some(value) = self.load(&prefix)? {
                all.push((prefix, value));
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
