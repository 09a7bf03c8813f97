//! Hash tables with a value for each CPU.

use std::marker::PhantomData;

use super::{Map, MapError, Plain, Put, bytes_of, expect};
use crate::object::MapKind;

/// A hash table with a value for each CPU. A program that adds a key sets its own CPU's value; the others are zero.
///
/// # Minimum kernel version
/// 4.6.
#[derive(Debug)]
pub struct PerCpuHashTable<K, V> {
    map: Map,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K: Plain, V: Plain> PerCpuHashTable<K, V> {
    /// Views a map.
    ///
    /// # Errors
    /// [`MapError::Mismatch`] where it is no per-CPU hash table of such keys and values.
    pub fn new(map: Map) -> Result<Self, MapError> {
        expect(&map, &[MapKind::PercpuHash], K::SIZE, V::SIZE)?;
        Ok(Self { map, types: PhantomData })
    }

    /// The value of each possible CPU.
    pub fn load(&self, key: &K) -> Result<Option<Vec<V>>, MapError> {
        let mut bytes = vec![0; self.map.value_bytes()];
        let found = self.map.lookup(&bytes_of(key), &mut bytes).map_err(|e| MapError::of(&self.map, e))?;
        let values = bytes.chunks_exact(V::SIZE.next_multiple_of(8)).map(|b| V::read(&b[..V::SIZE]));
        Ok(found.then(|| values.collect()))
    }

    /// Stores the same value for every CPU.
    ///
    /// # Errors
    /// [`MapError::Full`]; `EEXIST` and `ENOENT` where `put` says so.
    pub fn store(&self, key: &K, value: &V, put: Put) -> Result<(), MapError> {
        let one = bytes_of(value);
        let mut bytes = vec![0; self.map.value_bytes()];
        for slot in bytes.chunks_exact_mut(V::SIZE.next_multiple_of(8)) {
            slot[..V::SIZE].copy_from_slice(&one);
        }
        self.map.update(&bytes_of(key), &bytes, put).map_err(|e| MapError::of(&self.map, e))
    }

    /// Removes a key; `false` where it was not there.
    pub fn remove(&self, key: &K) -> Result<bool, MapError> {
        self.map.delete(&bytes_of(key)).map_err(|e| MapError::of(&self.map, e))
    }

    /// All keys. What programs add or remove meanwhile may be among them or not.
    pub fn keys(&self) -> Result<Vec<K>, MapError> {
        let mut all = Vec::new();
        let mut key: Option<Vec<u8>> = None;
        let mut next = vec![0; K::SIZE];
        // A key that is removed under us starts the walk anew; this many steps end it all the same.
        for _ in 0..=2 * u64::from(self.map.info().max_entries) {
            if !self.map.next_key(key.as_deref(), &mut next).map_err(|e| MapError::of(&self.map, e))? {
                break;
            }
            all.push(K::read(&next));
            key = Some(next.clone());
        }
        Ok(all)
    }

    /// The map itself.
    pub fn map(&self) -> &Map {
        &self.map
    }
}
