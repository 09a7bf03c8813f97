//! The newest commits of a store that one process has for itself, for its watches.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::{Condvar, Mutex};

use super::{Change, Key, StoreError, Watch, Write};

/// Shared by a store and its watches, none of which keeps a queue of its own.
#[derive(Debug, Default)]
pub(super) struct History {
    ring: Mutex<Ring>,
    committed: Condvar,
}

#[derive(Debug, Default)]
struct Ring {
    revision: u64,
    /// The last one is what `revision` wrote.
    commits: VecDeque<Vec<Write>>,
    /// Bytes of their keys and values.
    bytes: usize,
}

impl History {
    /// Of a store that has come to a revision, and remembers nothing up to it.
    #[cfg(feature = "redb")]
    pub(super) fn since(revision: u64) -> Self {
        Self { ring: Mutex::new(Ring { revision, ..Ring::default() }), committed: Condvar::new() }
    }

    /// Adds a commit. The store has applied it, and calls in the order of its revisions.
    pub(super) fn remember(&self, revision: u64, writes: &[Write]) {
        let mut ring = self.ring.lock();
        if revision != ring.revision + 1 {
            // One in between has ended as nobody knows.
            ring.commits.clear();
            ring.bytes = 0;
        }
        ring.revision = revision;
        ring.bytes += bytes_of(writes);
        ring.commits.push_back(writes.to_vec());
        while ring.commits.len() > COMMITS || ring.bytes > BYTES {
            let Some(oldest) = ring.commits.pop_front() else { break };
            ring.bytes -= bytes_of(&oldest);
        }
        drop(ring);
        self.committed.notify_all();
    }

    /// A watch as [`Store::watch`](super::Store::watch) promises it.
    pub(super) fn watch(self: &Arc<Self>, prefix: &[u8], after: u64) -> Box<dyn Watch> {
        let ahead = after > self.ring.lock().revision;
        Box::new(HistoryWatch { history: self.clone(), prefix: prefix.to_vec(), after, ahead })
    }
}

impl Ring {
    /// The first change after a revision, which is moved up to it or, if there is none, to the newest one.
    fn change(&self, prefix: &[u8], after: &mut u64) -> Option<Change> {
        let forgotten = self.revision - self.commits.len() as u64;
        if *after < forgotten {
            *after = self.revision;
            return Some(Change::Gap { revision: self.revision });
        }
        for writes in self.commits.iter().skip((*after - forgotten) as usize) {
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

struct HistoryWatch {
    history: Arc<History>,
    prefix: Key,
    after: u64,
    /// Asked to begin beyond the newest revision.
    ahead: bool,
}

#[async_trait]
impl Watch for HistoryWatch {
    async fn next(&mut self, limit: Duration) -> Result<Option<Change>, StoreError> {
        // No deadline where the clock cannot express it.
        let deadline = Instant::now().checked_add(limit);
        let mut ring = self.history.ring.lock();
        if std::mem::take(&mut self.ahead) {
            self.after = ring.revision;
            return Ok(Some(Change::Gap { revision: ring.revision }));
        }
        loop {
            if let Some(change) = ring.change(&self.prefix, &mut self.after) {
                return Ok(Some(change));
            }
            match deadline {
                None => self.history.committed.wait(&mut ring),
                Some(deadline) if Instant::now() >= deadline => return Ok(None),
                Some(deadline) => drop(self.history.committed.wait_until(&mut ring, deadline)),
            }
        }
    }
}

/// Commits that are remembered, and how many bytes of them.
const COMMITS: usize = 1024;
const BYTES: usize = 16 << 20;
