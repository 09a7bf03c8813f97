//! The store proper.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::Instant;

use super::client::{Client, Failure};
use super::gaps::Gaps;
use super::watch::EtcdWatch;
use super::wire::{
    Compare, DeleteRangeRequest, KeyValue, Operation, PutRequest, RangeRequest, RangeResponse, RequestOp,
    ResponseHeader, ResponseOp, TxnRequest, TxnResponse, method,
};
use super::{EtcdConfig, LANES};
use crate::store::{
    Batch, Caps, Change, Durability, Entry, Guard, Key, MAX_KEY, Outcome, Sharing, Store, StoreError, Watch, Write,
    check, number_of, numbered,
};

/// A store in an etcd cluster.
pub struct EtcdStore {
    inner: Arc<Inner>,
    engine: Arc<Engine>,
}

/// The thread on which connections live, for as long as the store or a watch of it.
pub(super) struct Engine {
    /// There until it is dropped.
    runtime: Option<Runtime>,
}

pub(super) struct Inner {
    client: Client,
    entries: Vec<u8>,
    lanes: Vec<u8>,
    timeout: Duration,
    max_operations: usize,
    /// The newest revision that an answer showed.
    pub(super) seen: AtomicI64,
    requests: Mutex<Requests>,
    gaps: Mutex<Gaps>,
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdStore").field("client", &self.inner.client).finish_non_exhaustive()
    }
}

impl Engine {
    pub(super) fn handle(&self) -> Result<Handle, StoreError> {
        let runtime = self.runtime.as_ref();
        Ok(runtime.ok_or_else(|| StoreError::Unavailable("the store is closed".to_owned()))?.handle().clone())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A runtime may not be dropped by a task of another, which the caller may be.
            runtime.shutdown_background();
        }
    }
}

impl EtcdStore {
    /// Prepares to call a cluster. Files are read, the cluster is not asked for anything yet.
    ///
    /// # Errors
    /// [`StoreError::Misuse`] or [`StoreError::Io`] with the field and the file.
    pub fn open(config: &EtcdConfig) -> Result<Self, StoreError> {
        let prefix = config.prefix.as_deref().unwrap_or(EtcdConfig::PREFIX);
        if prefix.is_empty() || prefix.len() > MAX_KEY {
            return Err(StoreError::Misuse(format!(
                "ipam.store.prefix: {prefix:?} is not accepted; write 1 to {MAX_KEY} bytes, as {}",
                EtcdConfig::PREFIX
            )));
        }
        let max_operations = config.max_operations.unwrap_or(EtcdConfig::MAX_OPERATIONS);
        if max_operations < LEAST_OPERATIONS {
            return Err(StoreError::Misuse(format!(
                "ipam.store.maxOperations: {max_operations} is too few for a lease; write at least {LEAST_OPERATIONS}"
            )));
        }
        if config.total() < LEAST_TIMEOUT {
            return Err(StoreError::Misuse(format!(
                "ipam.store.timeout: {:?} is too short for a try at another member; write at least {LEAST_TIMEOUT:?}",
                config.total()
            )));
        }
        let client = Client::new(config)?;
        let runtime =
            Builder::new_multi_thread().worker_threads(1).thread_name("dcenet-etcd").enable_all().build().map_err(
                |source| StoreError::Io { doing: "starting the thread that talks to etcd".to_owned(), source },
            )?;
        let inner = Inner {
            client,
            entries: format!("{prefix}k/").into_bytes(),
            lanes: format!("{prefix}r/").into_bytes(),
            timeout: config.total(),
            max_operations,
            seen: AtomicI64::new(0),
            requests: Mutex::default(),
            gaps: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner), engine: Arc::new(Engine { runtime: Some(runtime) }) })
    }

    /// Runs on the store's own thread, whatever runs the caller; goes on if the caller does not wait for it.
    async fn run<T, F>(&self, work: impl FnOnce(Arc<Inner>) -> F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        match self.engine.handle()?.spawn(work(self.inner.clone())).await {
            Ok(result) => result,
            Err(error) => Err(StoreError::Unavailable(format!("the call to etcd did not end: {error}"))),
        }
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let keys = keys.to_vec();
        self.run(|inner| async move { inner.read(&keys).await }).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        let (prefix, after) = (prefix.to_vec(), after.map(<[u8]>::to_vec));
        self.run(move |inner| async move { inner.scan(&prefix, after.as_deref(), limit).await }).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        check(batch, &self.caps())?;
        let batch = batch.clone();
        if batch.writes.is_empty() {
            return self.run(|inner| async move { inner.barrier(&batch).await }).await;
        }
        // Whatever stops the work on the way, the batch may have been sent.
        match self.run(|inner| async move { Ok(inner.commit(&batch).await) }).await {
            Ok(result) => result,
            Err(error) => Ok(Outcome::Unknown { reason: error.to_string() }),
        }
    }

    async fn commit_many(&self, batches: &[Batch]) -> Vec<Result<Outcome, StoreError>> {
        let (caps, batches) = (self.caps(), batches.to_vec());
        let count = batches.len();
        let work = |inner: Arc<Inner>| async move { Ok(inner.commit_many(batches, &caps).await) };
        // Whatever stops the work on the way, the batches may have been sent.
        self.run(work).await.unwrap_or_else(|error| {
            let unknown = || Ok(Outcome::Unknown { reason: error.to_string() });
            (0..count).map(|_| unknown()).collect()
        })
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        let prefix = prefix.to_vec();
        self.run(|inner| async move { inner.first_gap(&prefix, *range.start(), *range.end()).await }).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        let newest = match self.commit(&Batch::default()).await? {
            Outcome::Committed { revision } => revision,
            _ => return Err(StoreError::Unavailable("etcd does not tell its revision".to_owned())),
        };
        let first = (after > newest).then_some(Change::Gap { revision: newest });
        let after = i64::try_from(after.min(newest)).unwrap_or(i64::MAX);
        Ok(Box::new(EtcdWatch::start(&self.engine, self.inner.clone(), prefix, after, first)?))
    }

    fn caps(&self) -> Caps {
        Caps {
            // One for the lane.
            max_operations: self.inner.max_operations - 1,
            // Guarded keys are sent twice, and the whole must stay below etcd's --max-request-bytes of 1.5 MiB.
            max_bytes: (1 << 20) + (64 << 10),
            multi_key_atomic: true,
            sharing: Sharing::Machines,
            durability: Durability::Power,
        }
    }
}

/// What this process knows of requests of its own.
#[derive(Debug, Default)]
struct Requests {
    known: HashMap<u128, Request>,
    order: VecDeque<u128>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Request {
    Committed(u64),
    /// Tries are under way that may be carried out as long as the lane is not written after this revision.
    Unsettled(i64),
}

impl Requests {
    fn remember(&mut self, id: u128, request: Request) {
        if self.known.insert(id, request).is_none() {
            self.order.push_back(id);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }
}

/// What an answer to a transaction amounts to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Committed(u64),
    Conflict(Vec<Option<Entry>>),
    /// Another request has written the lane since; nothing was applied. Try again behind this revision.
    Crossed(i64),
    /// As `Crossed`, while an earlier try may have been applied before.
    Forgotten,
}

impl Inner {
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The store's key for a key of the cluster.
    pub(super) fn own_key<'k>(&self, key: &'k [u8]) -> Option<&'k [u8]> {
        key.strip_prefix(self.entries.as_slice())
    }

    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    pub(super) fn see(&self, header: Option<&ResponseHeader>) -> i64 {
        let revision = header.map_or(0, |h| h.revision);
        self.seen.fetch_max(revision, Ordering::Relaxed).max(revision)
    }

    pub(super) fn key(&self, key: &[u8]) -> Vec<u8> {
        [&self.entries, key].concat()
    }

    pub(super) fn lane_number(id: u128) -> u128 {
        id % LANES
    }

    fn lane(&self, id: u128) -> Vec<u8> {
        [&self.lanes, format!("{:04x}", Self::lane_number(id)).as_bytes()].concat()
    }

    pub(super) fn most_operations(&self) -> usize {
        self.max_operations
    }

    /// Whether the request was sent before.
    pub(super) fn is_known(&self, id: u128) -> bool {
        self.requests.lock().known.contains_key(&id)
    }

    pub(super) fn remember(&self, id: u128, request: Request) {
        self.requests.lock().remember(id, request);
    }

    async fn range(&self, request: &RangeRequest, deadline: Instant) -> Result<RangeResponse, Failure> {
        let answer: RangeResponse = self.client.call(method::RANGE, request, deadline).await?;
        self.see(answer.header.as_ref());
        Ok(answer)
    }

    async fn transact(&self, request: &TxnRequest, deadline: Instant) -> Result<TxnResponse, Failure> {
        let answer: TxnResponse = self.client.call(method::TXN, request, deadline).await?;
        self.see(answer.header.as_ref());
        Ok(answer)
    }

    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let deadline = self.deadline();
        'again: loop {
            let (mut entries, mut revision) = (Vec::with_capacity(keys.len()), 0);
            for some in keys.chunks(self.max_operations) {
                let ranges = some.iter().map(|key| RangeRequest { key: self.key(key), revision, ..Default::default() });
                let answer = match (&mut ranges.clone(), some.len()) {
                    (one, 1) => {
                        let range = one.next().unwrap_or_default();
                        self.range(&range, deadline)
                            .await
                            .map(|r| (r.header.clone(), vec![ResponseOp { range: Some(r), ..Default::default() }]))
                    }
                    _ => {
                        let success = ranges.map(|r| Operation::Range(r).into()).collect();
                        let request = TxnRequest { success, ..Default::default() };
                        self.transact(&request, deadline).await.map(|t| (t.header, t.responses))
                    }
                };
                match answer {
                    Ok((header, responses)) => {
                        // All other keys as they were when the first were read.
                        if revision == 0 {
                            revision = header.map_or(0, |h| h.revision);
                        }
                        entries.extend(responses.into_iter().map(only_entry));
                    }
                    Err(Failure::Compacted) => continue 'again,
                    Err(failure) => return Err(failure.into()),
                }
            }
            if entries.len() != keys.len() {
                return Err(StoreError::Unavailable("etcd's answer does not fit the question".to_owned()));
            }
            return Ok(entries);
        }
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        let deadline = self.deadline();
        let end = prefix_end(&self.key(prefix));
        let start = match after {
            Some(after) if after >= prefix => next_key(&self.key(after)),
            _ => self.key(prefix),
        };
        'again: loop {
            let (mut found, mut revision, mut from) = (Vec::new(), 0, start.clone());
            while found.len() < limit && from < end {
                let page = PAGE.min(limit - found.len());
                let request = RangeRequest {
                    key: from.clone(),
                    range_end: end.clone(),
                    limit: page as i64,
                    revision,
                    ..Default::default()
                };
                let answer = match self.range(&request, deadline).await {
                    Ok(answer) => answer,
                    Err(Failure::Compacted) => continue 'again,
                    Err(failure) => return Err(failure.into()),
                };
                if revision == 0 {
                    revision = answer.header.map_or(0, |h| h.revision);
                }
                if let Some(last) = answer.kvs.last() {
                    from = next_key(&last.key);
                }
                let more = answer.more;
                for kv in answer.kvs {
                    if let Some(key) = self.own_key(&kv.key) {
                        found.push((key.to_vec(), entry(&kv)));
                    }
                }
                if !more {
                    break;
                }
            }
            return Ok(found);
        }
    }

    fn compares(&self, guards: &[Guard]) -> Vec<Compare> {
        let version = |guard: &Guard| guard.version.map_or(0, |v| i64::try_from(v).unwrap_or(i64::MAX));
        guards.iter().map(|g| Compare::written_by(self.key(&g.key), version(g))).collect()
    }

    fn guarded(&self, guards: &[Guard]) -> Vec<RequestOp> {
        guards.iter().map(|g| read_op(self.key(&g.key))).collect()
    }

    /// A transaction that only reads. It is linearizable because of the read in it: etcd takes one with nothing in the
    /// branches for serializable, and answers from what the member happens to know.
    pub(super) async fn barrier(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let request = TxnRequest {
            compare: self.compares(&batch.guards),
            success: vec![read_op(self.lane(batch.request_id))],
            failure: self.guarded(&batch.guards),
        };
        let answer = self.transact(&request, self.deadline()).await?;
        if answer.succeeded {
            return Ok(Outcome::Committed { revision: revision_of(answer.header.as_ref()) });
        }
        Ok(Outcome::Conflict(answer.responses.into_iter().map(only_entry).collect()))
    }

    /// One that writes.
    pub(super) async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let id = batch.request_id;
        let known = self.requests.lock().known.get(&id).copied();
        let (mut fence, mut doubtful) = match known {
            Some(Request::Committed(revision)) => return Ok(Outcome::Committed { revision }),
            Some(Request::Unsettled(fence)) => (fence, true),
            None => (self.seen.load(Ordering::Relaxed), false),
        };
        let (deadline, mut tries) = (self.deadline(), 0);
        let reason = loop {
            let request = self.transaction(batch, fence);
            let reason = match self.client.attempt::<_, TxnResponse>(method::TXN, &request, deadline).await {
                Ok(answer) => {
                    let now = self.see(answer.header.as_ref());
                    match judge(answer, batch, fence, doubtful) {
                        Verdict::Committed(revision) => return Ok(self.committed(batch, revision)),
                        Verdict::Conflict(current) if !doubtful => return Ok(self.refused(batch, current)),
                        // An earlier try that is still under way could yet be applied.
                        Verdict::Conflict(current) => match self.close_lane(id, fence, deadline).await {
                            Ok(Verdict::Committed(revision)) => {
                                self.requests.lock().remember(id, Request::Committed(revision));
                                return Ok(Outcome::Committed { revision });
                            }
                            Ok(Verdict::Forgotten) => break FORGOTTEN.to_owned(),
                            Ok(_) => return Ok(Outcome::Conflict(current)),
                            Err(Failure::Refused(error)) => break error.to_string(),
                            Err(Failure::Lost(reason) | Failure::Unsent(reason)) => reason,
                            Err(Failure::Compacted) => COMPACTED.to_owned(),
                        },
                        Verdict::Crossed(_) => {
                            fence = now;
                            continue;
                        }
                        Verdict::Forgotten => break FORGOTTEN.to_owned(),
                    }
                }
                Err(Failure::Refused(error)) if !doubtful => return Err(error),
                Err(Failure::Refused(error)) => break error.to_string(),
                Err(Failure::Compacted) => COMPACTED.to_owned(),
                Err(Failure::Unsent(reason)) => reason,
                Err(Failure::Lost(reason)) => {
                    doubtful = true;
                    reason
                }
            };
            tracing::debug!(%reason, doubtful, "a commit is tried again");
            if !self.client.pause(&mut tries, deadline).await {
                if !doubtful {
                    return Err(StoreError::Unavailable(reason));
                }
                break reason;
            }
        };
        self.requests.lock().remember(id, Request::Unsettled(fence));
        Ok(Outcome::Unknown { reason })
    }

    pub(super) fn committed(&self, batch: &Batch, revision: u64) -> Outcome {
        self.requests.lock().remember(batch.request_id, Request::Committed(revision));
        let put = |write: &Write| matches!(write, Write::Put(..));
        self.gaps.lock().found(batch.writes.iter().map(|w| (w.key(), put(w))));
        Outcome::Committed { revision }
    }

    pub(super) fn refused(&self, batch: &Batch, current: Vec<Option<Entry>>) -> Outcome {
        let found = batch.guards.iter().zip(&current).map(|(g, now)| (g.key.as_slice(), now.is_some()));
        self.gaps.lock().found(found);
        Outcome::Conflict(current)
    }

    pub(super) fn transaction(&self, batch: &Batch, fence: i64) -> TxnRequest {
        let lane = self.lane(batch.request_id);
        let mut compare = self.compares(&batch.guards);
        compare.push(Compare::not_written_after(lane.clone(), fence));
        let mut failure = self.guarded(&batch.guards);
        failure.push(read_op(lane.clone()));
        // Of several writes to a key the last counts; etcd takes only one.
        let mut last: HashMap<&[u8], &Write> = HashMap::with_capacity(batch.writes.len());
        last.extend(batch.writes.iter().map(|write| (write.key(), write)));
        let mut success: Vec<RequestOp> = last
            .into_values()
            .map(|write| match write {
                Write::Delete(key) => Operation::Delete(DeleteRangeRequest { key: self.key(key) }).into(),
                Write::Put(key, value) => {
                    Operation::Put(PutRequest { key: self.key(key), value: value.clone() }).into()
                }
            })
            .collect();
        success.push(put_op(lane, batch.request_id.to_be_bytes().to_vec()));
        TxnRequest { compare, success, failure }
    }

    /// Writes the lane of a request, after which no earlier try of it can be applied; or learns that one was.
    async fn close_lane(&self, id: u128, fence: i64, deadline: Instant) -> Result<Verdict, Failure> {
        let lane = self.lane(id);
        let request = TxnRequest {
            compare: vec![Compare::not_written_after(lane.clone(), fence)],
            success: vec![put_op(lane.clone(), Vec::new())],
            failure: vec![read_op(lane)],
        };
        let answer: TxnResponse = self.client.attempt(method::TXN, &request, deadline).await?;
        self.see(answer.header.as_ref());
        if answer.succeeded {
            return Ok(Verdict::Conflict(Vec::new()));
        }
        Ok(match answer.responses.into_iter().next().and_then(only_entry) {
            Some(entry) if entry.value == id.to_be_bytes() => Verdict::Committed(entry.version),
            _ => Verdict::Forgotten,
        })
    }

    async fn first_gap(&self, prefix: &[u8], low: u128, high: u128) -> Result<Option<u128>, StoreError> {
        let deadline = self.deadline();
        let mut fresh = false;
        if low > high {
            return Ok(None);
        }
        loop {
            let (candidate, skipped) = self.gaps.lock().candidate(prefix, low, high);
            let Some(from) = candidate else {
                if fresh {
                    return Ok(None);
                }
                // What is remembered leaves no gap: the server has the last word.
                self.gaps.lock().forget(prefix);
                fresh = true;
                continue;
            };
            if self.gaps.lock().known_free(prefix, from) {
                return Ok(Some(from));
            }
            fresh |= !skipped;
            if let Some(gap) = self.gap_from(prefix, from, high, deadline).await? {
                return Ok(Some(gap));
            }
        }
    }

    /// Looks at the server for a gap from `from` on. `None`: there is none where it looked, which is noted as taken, or
    /// none up to `high`.
    async fn gap_from(
        &self,
        prefix: &[u8],
        from: u128,
        high: u128,
        deadline: Instant,
    ) -> Result<Option<u128>, StoreError> {
        let request = RangeRequest { limit: GAP_PAGE, keys_only: true, ..self.interval(prefix, from, high) };
        let page = self.range(&request, deadline).await?;
        let mut gap = Some(from);
        for kv in &page.kvs {
            let key = self.own_key(&kv.key).unwrap_or_default();
            let number = number_of(prefix, key)?;
            self.gaps.lock().learn(prefix, number, number);
            if gap == Some(number) {
                gap = number.checked_add(1).filter(|next| *next <= high);
            }
        }
        if let Some(gap) = gap {
            let taken =
                page.kvs.iter().filter_map(|kv| number_of(prefix, self.own_key(&kv.key)?).ok()).find(|n| *n > gap);
            match taken {
                Some(taken) => self.gaps.lock().learn_free(prefix, gap, taken - 1),
                None if !page.more => self.gaps.lock().learn_free(prefix, gap, high),
                None => {}
            }
        }
        // All of a full page may be one run, which then goes on.
        if !page.more || page.kvs.last().is_some_and(|kv| gap.is_some_and(|g| self.key(&numbered(prefix, g)) < kv.key))
        {
            return Ok(gap);
        }
        let Some(start) = gap else { return Ok(None) };
        // The run's length is not known: intervals of doubling size, the last cut at the end of the range.
        let mut intervals = Vec::new();
        let (mut first, mut size) = (start, GAP_PAGE as u128);
        while intervals.len() < COUNTS.min(self.max_operations) {
            let last = first.saturating_add(size - 1).min(high);
            intervals.push((first, last));
            match last.checked_add(1).filter(|next| *next <= high) {
                Some(next) => (first, size) = (next, size.saturating_mul(2)),
                None => break,
            }
        }
        loop {
            let Some((low, last)) = self.first_not_full(prefix, &intervals, deadline).await? else { return Ok(None) };
            if last - low < GAP_PAGE as u128 {
                let request = RangeRequest { keys_only: true, ..self.interval(prefix, low, last) };
                let page = self.range(&request, deadline).await?;
                let mut gap = low;
                for kv in &page.kvs {
                    let number = number_of(prefix, self.own_key(&kv.key).unwrap_or_default())?;
                    self.gaps.lock().learn(prefix, number, number);
                    if number == gap && gap < last {
                        gap += 1;
                    } else if number == gap {
                        // Filled meanwhile.
                        return Ok(None);
                    }
                }
                return Ok(Some(gap));
            }
            let part = (last - low) / COUNTS.min(self.max_operations) as u128 + 1;
            intervals.clear();
            let mut first = Some(low);
            while let Some(low) = first {
                let end = low.saturating_add(part - 1).min(last);
                intervals.push((low, end));
                first = end.checked_add(1).filter(|next| *next <= last);
            }
        }
    }

    /// The first interval that holds fewer keys than numbers; those before it are noted as taken.
    async fn first_not_full(
        &self,
        prefix: &[u8],
        intervals: &[(u128, u128)],
        deadline: Instant,
    ) -> Result<Option<(u128, u128)>, StoreError> {
        let counts = intervals.iter().map(|&(low, high)| {
            Operation::Range(RangeRequest { count_only: true, ..self.interval(prefix, low, high) }).into()
        });
        let request = TxnRequest { success: counts.collect(), ..Default::default() };
        let answer = self.transact(&request, deadline).await?;
        for (&(low, high), response) in intervals.iter().zip(answer.responses) {
            let count = response.range.map_or(0, |r| r.count);
            if u128::try_from(count).unwrap_or(0) <= high - low {
                return Ok(Some((low, high)));
            }
            self.gaps.lock().learn(prefix, low, high);
        }
        Ok(None)
    }

    fn interval(&self, prefix: &[u8], low: u128, high: u128) -> RangeRequest {
        RangeRequest {
            key: self.key(&numbered(prefix, low)),
            range_end: next_key(&self.key(&numbered(prefix, high))),
            ..Default::default()
        }
    }
}

/// What an answer to [`Inner::transaction`] says. `doubtful`: earlier tries with the same fence may be under way.
pub(super) fn judge(answer: TxnResponse, batch: &Batch, fence: i64, doubtful: bool) -> Verdict {
    if answer.succeeded {
        return Verdict::Committed(revision_of(answer.header.as_ref()));
    }
    let mut current: Vec<Option<Entry>> = answer.responses.into_iter().map(only_entry).collect();
    let lane = current.pop().flatten();
    if let Some(lane) = &lane
        && lane.value == batch.request_id.to_be_bytes()
    {
        return Verdict::Committed(lane.version);
    }
    if lane.is_some_and(|lane| i64::try_from(lane.version).is_ok_and(|version| version > fence)) {
        if doubtful {
            return Verdict::Forgotten;
        }
        if batch.guards.iter().zip(&current).all(|(guard, now)| guard.version == now.as_ref().map(|e| e.version)) {
            return Verdict::Crossed(fence);
        }
    }
    Verdict::Conflict(current)
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Compacted => Self::Unavailable(COMPACTED.to_owned()),
            Failure::Lost(reason) | Failure::Unsent(reason) => Self::Unavailable(reason),
            Failure::Refused(error) => error,
        }
    }
}

fn read_op(key: Vec<u8>) -> RequestOp {
    Operation::Range(RangeRequest { key, ..Default::default() }).into()
}

fn put_op(key: Vec<u8>, value: Vec<u8>) -> RequestOp {
    Operation::Put(PutRequest { key, value }).into()
}

fn only_entry(response: ResponseOp) -> Option<Entry> {
    response.range.and_then(|range| range.kvs.first().map(entry))
}

pub(super) fn entry(kv: &KeyValue) -> Entry {
    Entry { value: kv.value.clone(), version: u64::try_from(kv.mod_revision).unwrap_or(0) }
}

fn revision_of(header: Option<&ResponseHeader>) -> u64 {
    header.map_or(0, |h| u64::try_from(h.revision).unwrap_or(0))
}

/// The key that follows a key.
fn next_key(key: &[u8]) -> Vec<u8> {
    [key, b"\0"].concat()
}

/// The key behind all that begin with a prefix. A store's prefix holds text, so there is always one.
pub(super) fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            break;
        }
    }
    end
}

const FORGOTTEN: &str = "another request has used its lane before it was settled";
const COMPACTED: &str = "etcd compacted what was asked for";
/// Keys of one answer to a scan.
const PAGE: usize = 1000;
/// Keys of one answer to a search for a gap.
const GAP_PAGE: i64 = 32;
/// Intervals whose keys are counted in one transaction.
const COUNTS: usize = 64;
/// Requests that a process remembers.
const REMEMBERED: usize = 1024;
/// The largest batch of the allocator fits.
const LEAST_OPERATIONS: usize = 32;
const LEAST_TIMEOUT: Duration = Duration::from_millis(100);
