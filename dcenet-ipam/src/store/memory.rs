//! A store in memory: the reference for tests, and enough for a process that needs nothing to outlive it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::{Condvar, Mutex};

use super::{Batch, Caps, Change, Durability, Entry, Key, Outcome, Sharing, Store, StoreError, Watch, Write, check};

/// A store that ends with its process.
#[derive(Debug, Default)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Signalled after each commit that wrote.
    committed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<Key, Entry>,
    revision: u64,
    requests: VecDeque<(u128, u64)>,
    /// What the newest commits wrote, for watches; the last one is that of `revision`.
    history: VecDeque<Vec<Write>>,
    /// Bytes of keys and values in the history.
    history_bytes: usize,
}

impl State {
    fn remember(&mut self, writes: &[Write]) {
        self.history_bytes += bytes_of(writes);
        self.history.push_back(writes.to_vec());
        while self.history.len() > HISTORY || self.history_bytes > HISTORY_BYTES {
            let Some(oldest) = self.history.pop_front() else { break };
            self.history_bytes -= bytes_of(&oldest);
        }
    }

    /// The first change after a revision, which is moved up to it or, if there is none, to the newest one.
    fn change(&self, prefix: &[u8], after: &mut u64) -> Option<Change> {
        let forgotten = self.revision - self.history.len() as u64;
        if *after < forgotten {
            *after = self.revision;
            return Some(Change::Gap { revision: self.revision });
        }
        for writes in self.history.iter().skip((*after - forgotten) as usize) {
            *after += 1;
            let change = Change::of_batch(*after, writes, prefix);
            if change.is_some() {
                return change;
            }
        }
        None
    }
}

fn bytes_of(writes: &[Write]) -> usize {
    let bytes = |write: &Write| match write {
        Write::Delete(key) => key.len(),
        Write::Put(key, value) => key.len() + value.len(),
    };
    writes.iter().map(bytes).sum()
}

#[derive(Debug)]
struct MemoryWatch {
    shared: Arc<Shared>,
    prefix: Key,
    after: u64,
    /// Asked to begin beyond the newest revision.
    ahead: bool,
}

#[async_trait]
impl Watch for MemoryWatch {
    async fn next(&mut self, limit: Duration) -> Result<Option<Change>, StoreError> {
        // No deadline where the clock cannot express it.
        let deadline = Instant::now().checked_add(limit);
        let mut state = self.shared.state.lock();
        if std::mem::take(&mut self.ahead) {
            self.after = state.revision;
            return Ok(Some(Change::Gap { revision: state.revision }));
        }
        loop {
            if let Some(change) = state.change(&self.prefix, &mut self.after) {
                return Ok(Some(change));
            }
            match deadline {
                None => self.shared.committed.wait(&mut state),
                Some(deadline) if Instant::now() >= deadline => return Ok(None),
                Some(deadline) => drop(self.shared.committed.wait_until(&mut state, deadline)),
            }
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
        let state = self.shared.state.lock();
        Ok(keys.iter().map(|key| state.entries.get(key).cloned()).collect())
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        let state = self.shared.state.lock();
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
        let mut state = self.shared.state.lock();
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
                }
                Write::Put(key, value) => {
                    state.entries.insert(key.clone(), Entry { value: value.clone(), version: revision });
                }
            }
        }
        if state.requests.len() == REMEMBERED {
            state.requests.pop_front();
        }
        state.requests.push_back((batch.request_id, revision));
        state.remember(&batch.writes);
        drop(state);
        self.shared.committed.notify_all();
        Ok(Outcome::Committed { revision })
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        let ahead = after > self.shared.state.lock().revision;
        Ok(Box::new(MemoryWatch { shared: self.shared.clone(), prefix: prefix.to_vec(), after, ahead }))
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
/// Commits that are remembered for watches, and how many bytes of them.
const HISTORY: usize = 1024;
const HISTORY_BYTES: usize = 16 << 20;
