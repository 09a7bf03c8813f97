//! A store in memory: the reference for tests, and enough for a process that needs nothing to outlive it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Bound, RangeInclusive};
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::history::History;
use super::runs::Runs;
use super::{Batch, Caps, Durability, Entry, Key, Outcome, Sharing, Store, StoreError, Watch, Write, check, number_of};

/// A store that ends with its process.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
    history: Arc<History>,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<Key, Entry>,
    revision: u64,
    requests: VecDeque<(u128, u64)>,
    /// The numbers under each prefix in which a gap was ever searched for.
    numbers: BTreeMap<Key, Runs>,
}

impl State {
    fn runs_of(&mut self, prefix: &[u8]) -> Result<&Runs, StoreError> {
        if !self.numbers.contains_key(prefix) {
            let mut runs = Runs::default();
            let from = (Bound::Included(prefix), Bound::Unbounded);
            for (key, _) in self.entries.range::<[u8], _>(from).take_while(|(key, _)| key.starts_with(prefix)) {
                runs.insert(number_of(prefix, key)?);
            }
            self.numbers.insert(prefix.to_vec(), runs);
        }
        Ok(&self.numbers[prefix])
    }

    fn note(&mut self, key: &[u8], change: fn(&mut Runs, u128)) {
        let Some(split) = key.len().checked_sub(16) else { return };
        if let Some(runs) = self.numbers.get_mut(&key[..split])
            && let Ok(number) = number_of(&key[..split], key)
        {
            change(runs, number);
        }
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let state = self.state.lock();
        Ok(keys.iter().map(|key| state.entries.get(key).cloned()).collect())
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        let state = self.state.lock();
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        Ok(state
            .entries
            .range::<[u8], _>((from, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .take(limit)
            .map(|(key, entry)| (key.clone(), entry.clone()))
            .collect())
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        check(batch, &self.caps())?;
        let mut state = self.state.lock();
        if let Some(&(_, revision)) = state.requests.iter().find(|(id, _)| *id == batch.request_id) {
            return Ok(Outcome::Committed { revision });
        }
        let holds = batch.guards.iter().all(|g| state.entries.get(&g.key).map(|e| e.version) == g.version);
        if !holds {
            return Ok(Outcome::Conflict(batch.guards.iter().map(|g| state.entries.get(&g.key).cloned()).collect()));
        }
        if batch.writes.is_empty() {
            return Ok(Outcome::Committed { revision: state.revision });
        }
        state.revision += 1;
        let revision = state.revision;
        for write in &batch.writes {
            match write {
                Write::Delete(key) => {
                    state.entries.remove(key);
                    state.note(key, Runs::remove);
                }
                Write::Put(key, value) => {
                    state.entries.insert(key.clone(), Entry { value: value.clone(), version: revision });
                    state.note(key, Runs::insert);
                }
            }
        }
        if state.requests.len() == REMEMBERED {
            state.requests.pop_front();
        }
        state.requests.push_back((batch.request_id, revision));
        // Under the lock, so that commits are remembered in their order.
        self.history.remember(revision, &batch.writes);
        Ok(Outcome::Committed { revision })
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        Ok(self.history.watch(prefix, after))
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        let mut state = self.state.lock();
        Ok(state.runs_of(prefix)?.first_gap(*range.start(), *range.end()))
    }

    fn caps(&self) -> Caps {
        Caps {
            max_operations: 4096,
            max_bytes: 8 << 20,
            multi_key_atomic: true,
            sharing: Sharing::Exclusive,
            durability: Durability::Volatile,
        }
    }
}

/// Committed requests that are remembered.
const REMEMBERED: usize = 256;
