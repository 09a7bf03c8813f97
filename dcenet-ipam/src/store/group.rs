//! Group commit: the commits of one process share flushes.
//!
//! A commit that finds no other under way leads: it takes whatever waits and sends all of it by
//! [`Store::commit_many`], once for the log, that is, one lock and one flush. Those that come meanwhile wait and make
//! the next group. There is no timer and no thread: a commit that is alone goes straight through. The answers of a group
//! set its callers free all at once, so the first who is back with another commit waits a moment for the others, at most
//! a part of the time that the last group took.
//!
//! The order in which commits came is the order in which they are applied, and each is answered as if it had been
//! alone: guards of a later one see what an earlier one of its group wrote.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;

use super::{Batch, Caps, Entry, Key, Outcome, Store, StoreError, Watch, Write, check};

/// Batches and bytes of one group.
const GROUP: usize = 256;
const GROUP_BYTES: usize = 1 << 20;
/// The part of the time of the last group that a leader waits for others, and the most.
const GATHER_SHARE: u32 = 4;
const GATHER: Duration = Duration::from_millis(1);

/// A store whose commits are sent in groups, for a daemon that many callers commit through at once.
///
/// The callers run on threads of their own, or the store below does not block: while a leader blocks its thread, tasks
/// of the same thread cannot join its group.
pub struct GroupStore {
    inner: Arc<dyn Store>,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(Batch, Arc<Ticket>)>,
    /// Somebody leads, or was told to.
    led: bool,
    /// Commits of the last group, and how long it took.
    last: (usize, Duration),
}

/// What one caller waits for.
struct Ticket(Mutex<Stage>);

enum Stage {
    Answered(Result<Outcome, StoreError>),
    /// The caller is to lead: its own batch is at the head of the queue.
    Leads,
    /// Answered or led, and the caller knows.
    Taken,
    Waits(Option<Waker>),
}

impl Ticket {
    fn set(&self, stage: Stage) {
        let before = std::mem::replace(&mut *self.0.lock(), stage);
        if let Stage::Waits(Some(waker)) = before {
            waker.wake();
        }
    }

    /// `Some(None)`: the caller leads.
    fn poll(&self, context: &Context<'_>) -> Poll<Option<Result<Outcome, StoreError>>> {
        let mut stage = self.0.lock();
        match std::mem::replace(&mut *stage, Stage::Taken) {
            Stage::Answered(answer) => Poll::Ready(Some(answer)),
            Stage::Leads => Poll::Ready(None),
            Stage::Taken | Stage::Waits(_) => {
                *stage = Stage::Waits(Some(context.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl GroupStore {
    /// Groups the commits to a store.
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self { inner, queue: Mutex::default() }
    }

    /// Lets the others who were in the last group come, while they do.
    fn gather(&self) {
        let (others, time) = self.queue.lock().last;
        if others < 2 {
            return;
        }
        let (begin, limit) = (Instant::now(), (time / GATHER_SHARE).min(GATHER));
        while self.queue.lock().waiting.len() < others && begin.elapsed() < limit {
            std::thread::yield_now();
        }
    }

    /// What waits, as much as a group may have, in the order in which it came.
    fn take(&self) -> (Vec<Batch>, Vec<Arc<Ticket>>) {
        let mut queue = self.queue.lock();
        let (mut batches, mut tickets, mut bytes) = (Vec::new(), Vec::new(), 0);
        while batches.len() < GROUP
            && let Some((batch, _)) = queue.waiting.front()
        {
            bytes += batch.writes.iter().map(size).sum::<usize>();
            if bytes > GROUP_BYTES && !batches.is_empty() {
                break;
            }
            let Some((batch, ticket)) = queue.waiting.pop_front() else { break };
            batches.push(batch);
            tickets.push(ticket);
        }
        (batches, tickets)
    }

    /// Lets the next in the queue lead, if there is one.
    fn hand_over(&self) {
        let mut queue = self.queue.lock();
        match queue.waiting.front() {
            Some((_, ticket)) => ticket.set(Stage::Leads),
            None => queue.led = false,
        }
    }
}

fn size(write: &Write) -> usize {
    match write {
        Write::Delete(key) => key.len(),
        Write::Put(key, value) => key.len() + value.len(),
    }
}

impl fmt::Debug for GroupStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GroupStore").field(&self.inner).finish()
    }
}

/// A group under way. If its leader is dropped, nobody knows what became of it, and another leads.
struct Lead<'a> {
    store: &'a GroupStore,
    tickets: Vec<Arc<Ticket>>,
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        for ticket in &self.tickets {
            let reason = "the commit that led the group was dropped".to_owned();
            ticket.set(Stage::Answered(Ok(Outcome::Unknown { reason })));
        }
        self.store.hand_over();
    }
}

/// A caller that waits. One that is dropped leaves the queue, and lets another lead if it was to.
struct Waiting<'a> {
    store: &'a GroupStore,
    ticket: &'a Arc<Ticket>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if matches!(*self.ticket.0.lock(), Stage::Taken) {
            return;
        }
        let mut queue = self.store.queue.lock();
        queue.waiting.retain(|(_, ticket)| !Arc::ptr_eq(ticket, self.ticket));
        // Only who holds the queue makes a leader, so that it is either one now or never will be.
        let led = matches!(*self.ticket.0.lock(), Stage::Leads);
        drop(queue);
        if led {
            self.store.hand_over();
        }
    }
}

#[async_trait]
impl Store for GroupStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        // One that is refused is not to be carried by others.
        check(batch, &self.caps())?;
        let ticket = Arc::new(Ticket(Mutex::new(Stage::Waits(None))));
        {
            let mut queue = self.queue.lock();
            if !queue.led {
                queue.led = true;
                *ticket.0.lock() = Stage::Leads;
            }
            queue.waiting.push_back((batch.clone(), ticket.clone()));
        }
        let waiting = Waiting { store: self, ticket: &ticket };
        if let Some(answer) = poll_fn(|context| ticket.poll(context)).await {
            return answer;
        }
        self.gather();
        let (batches, tickets) = self.take();
        let mut lead = Lead { store: self, tickets };
        let begin = Instant::now();
        let answers = self.inner.commit_many(&batches).await;
        self.queue.lock().last = (batches.len(), begin.elapsed());
        let mut answers = answers.into_iter();
        let mut own = None;
        for other in lead.tickets.drain(..) {
            let unanswered = || Err(StoreError::Unavailable("the store left a batch unanswered".to_owned()));
            let answer = answers.next().unwrap_or_else(unanswered);
            if Arc::ptr_eq(&other, &ticket) { own = Some(answer) } else { other.set(Stage::Answered(answer)) }
        }
        drop((lead, waiting));
        own.unwrap_or_else(|| Err(StoreError::Unavailable("the group left its leader out".to_owned())))
    }

    async fn commit_many(&self, batches: &[Batch]) -> Vec<Result<Outcome, StoreError>> {
        self.inner.commit_many(batches).await
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.inner.first_gap(prefix, range).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(prefix, after).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}
