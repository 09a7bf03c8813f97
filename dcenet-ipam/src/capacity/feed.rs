//! Counts, and when they change.

use std::ops::Deref;
use std::time::{Duration, Instant};

use dcenet_core::provider::LeaseError;

use super::Capacity;
use super::book::Book;
use crate::Ipam;
use crate::follow::{FAR, Follower};
use crate::ipam::store_error;
use crate::store::StoreError;

impl Ipam {
    /// What becomes of the addresses of the configuration's pools. Reads every record of them: a tool's call; who asks
    /// again and again keeps a [`CapacityFeed`].
    ///
    /// # Errors
    /// What the store answers; [`LeaseError::Busy`] if it forgets its changes faster than they can be read.
    pub async fn capacity(&self) -> Result<Capacity, LeaseError> {
        let mut feed = CapacityFeed::new(self);
        feed.scan().await?;
        Ok(feed.count())
    }
}

/// Tells what becomes of the addresses of a configuration's pools whenever that has changed.
///
/// It keeps a copy of the records in memory, follows the store's watch, and knows when time alone changes a count. Of a
/// store that cannot be watched it reads everything at each call. What it tells may be a change that a loss of power undoes:
/// a count is a hint for a scheduler, and the lease decides.
///
/// ```
/// # use std::{sync::Arc, time::Duration};
/// # use dcenet_core::provider::{AddressSource, LeaseRequest};
/// # use dcenet_ipam::{Ipam, capacity::CapacityFeed, store::memory::MemoryStore};
/// # pollster::block_on(async {
/// # let config = serde_json::from_str(r#"{ "pools": [ { "name": "db", "subnet": "10.20.0.0/28" } ] }"#)?;
/// let ipam = Arc::new(Ipam::new(&config, Arc::new(MemoryStore::new()))?);
/// let mut feed = CapacityFeed::new(ipam.clone());
/// let first = feed.next(Duration::ZERO).await?.expect("the first call tells what there is");
/// assert_eq!(first.pools[0].available, 14);
/// # let attachment = serde_json::from_str(r#"{ "network": "shop", "container": "c1", "ifname": "eth0" }"#)?;
/// ipam.lease(&LeaseRequest::new(attachment)).await?;
/// let node = serde_json::from_str(r#"{ "name": "n1" }"#)?;
/// let now = feed.next(Duration::from_secs(1)).await?.expect("it has changed");
/// assert_eq!(now.extended_resources(&node)?["dcenet.io/ip-db"], "13");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// ```
pub struct CapacityFeed<I> {
    ipam: I,
    book: Book,
    follower: Follower,
    known: Option<Capacity>,
}

impl<I> std::fmt::Debug for CapacityFeed<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CapacityFeed").field("revision", &self.follower.revision).finish_non_exhaustive()
    }
}

impl<I: Deref<Target = Ipam>> CapacityFeed<I> {
    /// The first call of [`CapacityFeed::next`] reads the records.
    pub fn new(ipam: I) -> Self {
        let book = Book::new(ipam.layout().clone());
        Self { ipam, book, follower: Follower::default(), known: None }
    }

    /// Waits until a count differs from what the last call told, at most `limit`; `None` when none does. The first call
    /// tells what there is. Zero looks without waiting; so does every call where the store cannot be watched. Several
    /// changes may be told as one.
    ///
    /// May block the thread for as long as it waits, as [`Watch::next`](crate::store::Watch::next) does. The future may be
    /// dropped, and an error loses nothing: the next call goes on.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn next(&mut self, limit: Duration) -> Result<Option<Capacity>, LeaseError> {
        // No deadline where the clock cannot express it.
        let deadline = Instant::now().checked_add(limit);
        loop {
            if self.follower.behind {
                self.scan().await?;
            }
            self.follower.drain(&self.ipam, &mut self.book).await?;
            if self.follower.behind && self.follower.watch.is_some() {
                continue;
            }
            let now = self.count();
            let unchanged = |known: &Capacity| known.pools == now.pools;
            if !self.known.as_ref().is_some_and(unchanged) {
                self.known = Some(now.clone());
                return Ok(Some(now));
            }
            let left = deadline.map_or(FAR, |deadline| deadline.saturating_duration_since(Instant::now()));
            let due = now.next_due.map_or(FAR, |at| Duration::from_millis(at.saturating_sub(self.ipam.now())));
            let Some(watch) = &mut self.follower.watch else { return Ok(None) };
            match watch.next(left.min(due)).await.map_err(store_error)? {
                Some(change) => self.follower.learn(change, &self.ipam, &mut self.book)?,
                None if deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok(None),
                None => {}
            }
        }
    }

    async fn scan(&mut self) -> Result<(), LeaseError> {
        match self.follower.scan(&self.ipam, &mut self.book).await {
            Ok(()) => {}
            Err(LeaseError::Store(error)) if matches!(error.downcast_ref(), Some(StoreError::Misuse(_))) => {
                self.follower.scan_once(&self.ipam, &mut self.book).await?;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn count(&self) -> Capacity {
        self.book.count(self.follower.revision, self.ipam.now())
    }
}
