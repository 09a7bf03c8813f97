//! Watching, over one stream that is opened again wherever it ends.
//!
//! etcd's progress notices are not asked for: before 3.4.25 and 3.5.8 one could come ahead of the events that it vouches
//! for (etcd pull request 15220). Without them a watch that saw nothing for long, and then loses its connection, may
//! have to begin at a revision that was compacted; it then tells a gap where nothing was missed, which is permitted.

use std::collections::{BTreeMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::Streaming;

use super::client::Failure;
use super::store::{Engine, Inner, entry, prefix_end};
use super::wire::{Event, WatchCreateRequest, WatchRequest, WatchResponse, method};
use crate::store::{Change, Entry, Key, StoreError, Watch};

/// The receiving end of a task that follows a prefix.
pub(super) struct EtcdWatch {
    engine: Arc<Engine>,
    changes: mpsc::Receiver<Result<Change, StoreError>>,
    task: JoinHandle<()>,
}

impl Drop for EtcdWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl EtcdWatch {
    /// `first` is told before anything else.
    pub(super) fn start(
        engine: &Arc<Engine>,
        inner: Arc<Inner>,
        prefix: &[u8],
        after: i64,
        first: Option<Change>,
    ) -> Result<Self, StoreError> {
        let (told, changes) = mpsc::channel(AHEAD);
        let follower = Follower { prefix: inner.key(prefix), inner, after, told };
        let task = engine.handle()?.spawn(follower.run(first));
        Ok(Self { engine: engine.clone(), changes, task })
    }
}

#[async_trait]
impl Watch for EtcdWatch {
    async fn next(&mut self, limit: Duration) -> Result<Option<Change>, StoreError> {
        let timer = {
            // A timer belongs to the runtime in which it is made, whoever polls it.
            let handle = self.engine.handle()?;
            let _inside = handle.enter();
            sleep(limit)
        };
        let mut timer = pin!(timer);
        let changes = &mut self.changes;
        std::future::poll_fn(move |context: &mut Context<'_>| {
            if let Poll::Ready(told) = changes.poll_recv(context) {
                let ended = || StoreError::Unavailable("the watch has ended".to_owned());
                return Poll::Ready(told.ok_or_else(ended).and_then(|change| change).map(Some));
            }
            timer.as_mut().poll(context).map(|()| Ok(None))
        })
        .await
    }
}

struct Follower {
    inner: Arc<Inner>,
    prefix: Vec<u8>,
    /// The newest revision that was told.
    after: i64,
    told: mpsc::Sender<Result<Change, StoreError>>,
}

/// Why a stream ended.
enum End {
    /// Nobody listens any more.
    Dropped,
    Failed(Failure),
}

impl Follower {
    async fn run(mut self, first: Option<Change>) {
        if let Some(change) = first
            && self.told.send(Ok(change)).await.is_err()
        {
            return;
        }
        let mut tries = 0;
        // Until then failures are nobody's business.
        let mut deadline = self.inner.deadline();
        loop {
            let before = self.after;
            let failure = match self.follow(deadline).await {
                End::Dropped => return,
                End::Failed(failure) => failure,
            };
            if self.after > before {
                (tries, deadline) = (0, self.inner.deadline());
            }
            tracing::debug!(?failure, "a watch of etcd begins again after revision {}", self.after);
            let error = match failure {
                Failure::Refused(error) => Some(error),
                other if !self.inner.client().pause(&mut tries, deadline).await => Some(other.into()),
                _ => None,
            };
            if let Some(error) = error {
                if self.told.send(Err(error)).await.is_err() {
                    return;
                }
                sleep(REST).await;
                (tries, deadline) = (0, self.inner.deadline());
            }
        }
    }

    /// One stream from its beginning to its end.
    async fn follow(&mut self, deadline: Instant) -> End {
        // Kept until the stream has ended: closing our side would end it.
        let (_requests, stream) = match self.open(deadline).await {
            Ok(opened) => opened,
            Err(failure) => return End::Failed(failure),
        };
        let (at, mut stream) = stream;
        loop {
            let response = match stream.message().await {
                Ok(Some(response)) => response,
                Ok(None) => return End::Failed(Failure::Unsent("the stream was closed".to_owned())),
                Err(status) => return End::Failed(self.inner.client().failure(at, &status).await),
            };
            if response.canceled {
                if response.compact_revision > self.after {
                    // A deletion at that very revision may be gone too.
                    self.after = response.compact_revision;
                    let gap = Change::Gap { revision: revision(self.after) };
                    if self.told.send(Ok(gap)).await.is_err() {
                        return End::Dropped;
                    }
                    return End::Failed(Failure::Compacted);
                }
                return End::Failed(self.inner.client().cancelled(at, &response.cancel_reason).await);
            }
            for change in self.changes(response.events) {
                self.after = i64::try_from(change.revision()).unwrap_or(i64::MAX);
                if self.told.send(Ok(change)).await.is_err() {
                    return End::Dropped;
                }
            }
        }
    }

    async fn open(
        &self,
        deadline: Instant,
    ) -> Result<(mpsc::Sender<WatchRequest>, (usize, Streaming<WatchResponse>)), Failure> {
        let create = WatchCreateRequest {
            key: self.prefix.clone(),
            range_end: prefix_end(&self.prefix),
            start_revision: self.after.saturating_add(1),
        };
        let (requests, receiver) = mpsc::channel(1);
        // There is room for one.
        let _ = requests.try_send(WatchRequest { create: Some(create) });
        let stream = self.inner.client().stream(method::WATCH, ReceiverStream::new(receiver), deadline).await?;
        Ok((requests, stream))
    }

    /// A response holds whole revisions, one or several.
    fn changes(&self, events: Vec<Event>) -> VecDeque<Change> {
        let mut by_revision: BTreeMap<i64, BTreeMap<Key, Option<Entry>>> = BTreeMap::new();
        for event in events {
            let Some(kv) = event.kv else { continue };
            let Some(key) = self.inner.own_key(&kv.key) else { continue };
            let held = (event.kind != Event::DELETE).then(|| entry(&kv));
            by_revision.entry(kv.mod_revision).or_default().insert(key.to_vec(), held);
        }
        by_revision
            .into_iter()
            .filter(|(at, _)| *at > self.after)
            .map(|(at, writes)| Change::Writes { revision: revision(at), writes: writes.into_iter().collect() })
            .collect()
    }
}

fn revision(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// Changes that are fetched before they are asked for. More wait at etcd.
const AHEAD: usize = 64;
/// Between two tries after an error was told.
const REST: Duration = Duration::from_secs(1);
