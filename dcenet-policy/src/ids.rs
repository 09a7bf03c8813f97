//! Small numbers for large keys, stable while the key is in use and not given to another key too early.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::Arc;

/// Gives each key a number.
///
/// A key that is no longer used is *retired*: its number still stands for it, in programs and tables that are in
/// force until the next update reaches the kernel. Only when the caller says that a generation is in force are the
/// numbers retired in it or before free for other keys.
#[derive(Debug, Clone)]
pub(crate) struct Ids<K> {
    ids: HashMap<Arc<K>, u32>,
    keys: Vec<Option<Arc<K>>>,
    free: BTreeSet<u32>,
    retired: BTreeMap<u32, u64>,
}

impl<K: Clone + Eq + Hash> Ids<K> {
    /// Starts with numbers below `first` reserved.
    pub(crate) fn starting_at(first: u32) -> Self {
        let keys = (0..first).map(|_| None).collect();
        Self { ids: HashMap::new(), keys, free: BTreeSet::new(), retired: BTreeMap::new() }
    }

    pub(crate) fn intern(&mut self, key: &K) -> u32 {
        if let Some(id) = self.ids.get(key) {
            self.retired.remove(id);
            return *id;
        }
        let id = self.free.pop_first().unwrap_or(self.keys.len() as u32);
        if id as usize == self.keys.len() {
            self.keys.push(None);
        }
        let key = Arc::new(key.clone());
        self.keys[id as usize] = Some(Arc::clone(&key));
        self.ids.insert(key, id);
        id
    }

    /// The number that stands for a key, retired or not.
    pub(crate) fn get(&self, key: &K) -> Option<u32> {
        self.ids.get(key).copied()
    }

    /// When a number was retired, if it is.
    pub(crate) fn retired_at(&self, id: u32) -> Option<u64> {
        self.retired.get(&id).copied()
    }

    /// Takes a number back that was given just now and that nobody has heard of.
    pub(crate) fn take_back(&mut self, id: u32) {
        if let Some(key) = self.keys.get_mut(id as usize).and_then(Option::take) {
            self.ids.remove(&key);
            self.free.insert(id);
        }
    }

    /// Gives a key the number that it had under another `Ids`; `false` where either is taken.
    pub(crate) fn restore(&mut self, id: u32, key: K) -> bool {
        if self.ids.contains_key(&key) || (id as usize) < self.keys.len() && !self.free.contains(&id) {
            return false;
        }
        while self.keys.len() <= id as usize {
            self.free.insert(self.keys.len() as u32);
            self.keys.push(None);
        }
        self.free.remove(&id);
        let key = Arc::new(key);
        self.keys[id as usize] = Some(Arc::clone(&key));
        self.ids.insert(key, id);
        true
    }

    pub(crate) fn key(&self, id: u32) -> Option<&K> {
        self.shared(id).map(|key| &**key)
    }

    /// As [`Ids::key`], for whoever keeps it.
    pub(crate) fn shared(&self, id: u32) -> Option<&Arc<K>> {
        self.keys.get(id as usize).and_then(Option::as_ref)
    }

    /// All numbers that stand for a key, in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &K)> {
        (0..).zip(&self.keys).filter_map(|(id, key)| Some((id, &**key.as_ref()?)))
    }

    /// Retires every number that is not used.
    pub(crate) fn retire_others(&mut self, used: &BTreeSet<u32>, generation: u64) {
        for (id, key) in (0..).zip(&self.keys) {
            if key.is_some() && !used.contains(&id) {
                self.retired.entry(id).or_insert(generation);
            }
        }
    }

    /// Retires one number.
    pub(crate) fn retire(&mut self, id: u32, generation: u64) {
        if self.key(id).is_some() {
            self.retired.entry(id).or_insert(generation);
        }
    }

    /// Whether a number waits for [`Ids::release`].
    pub(crate) fn any_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Frees what was retired in `generation` or before.
    pub(crate) fn release(&mut self, generation: u64) {
        let due: Vec<u32> = self.retired.iter().filter(|(_, at)| **at <= generation).map(|(id, _)| *id).collect();
        for id in due {
            self.retired.remove(&id);
            if let Some(key) = self.keys[id as usize].take() {
                self.ids.remove(&key);
            }
            self.free.insert(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_reused_only_after_its_generation_is_in_force() {
        let mut ids = Ids::starting_at(1);
        assert_eq!([ids.intern(&"a"), ids.intern(&"b"), ids.intern(&"a")], [1, 2, 1]);
        ids.retire_others(&BTreeSet::from([1]), 7);
        assert_eq!(ids.intern(&"c"), 3, "2 is not free yet");
        ids.release(6);
        assert_eq!(ids.intern(&"d"), 4);
        ids.release(7);
        assert_eq!(ids.intern(&"e"), 2);
        assert_eq!(ids.key(2), Some(&"e"));
    }

    #[test]
    fn a_restored_key_keeps_its_number_and_leaves_the_others_free() {
        let mut ids = Ids::starting_at(2);
        assert!(ids.restore(5, "a") && !ids.restore(5, "b") && !ids.restore(1, "b") && !ids.restore(7, "a"));
        assert_eq!(
            [ids.intern(&"b"), ids.intern(&"a"), ids.intern(&"c"), ids.intern(&"d"), ids.intern(&"e")],
            [2, 5, 3, 4, 6]
        );
    }

    #[test]
    fn a_retired_key_that_returns_keeps_its_number() {
        let mut ids = Ids::starting_at(0);
        ids.intern(&"a");
        ids.retire_others(&BTreeSet::new(), 1);
        assert_eq!(ids.intern(&"a"), 0);
        ids.release(1);
        assert_eq!(ids.key(0), Some(&"a"));
    }
}
