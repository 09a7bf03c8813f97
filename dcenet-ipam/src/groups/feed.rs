//! Snapshots of groups, and what changes after them.

use std::ops::Deref;
use std::time::{Duration, Instant};

use dcenet_core::provider::LeaseError;

use super::fold::Fold;
use super::{Grouping, Groups, Update};
use crate::Ipam;
use crate::follow::{FAR, Follower};
use crate::ipam::store_error;
use crate::store::Change;

impl Ipam {
    /// The address groups of all that share the store, at one revision. Reads every record of the space: a tool's call.
    /// Claims that were never used are known of this configuration only.
    ///
    /// # Errors
    /// [`LeaseError::Invalid`] if the grouping contradicts itself; what the store answers; [`LeaseError::Busy`] if it
    /// forgets its changes faster than they can be read.
    pub async fn groups(&self, grouping: &Grouping) -> Result<Groups, LeaseError> {
        let mut feed = GroupFeed::new(self, grouping)?;
        feed.follower.scan(self, &mut feed.fold).await?;
        Ok(feed.fold.groups(feed.follower.revision))
    }
}

/// Tells how address groups change.
///
/// Whoever applies every update to the groups that the feed began with ([`Groups::apply`]) has what
/// [`Ipam::groups`] shows at the revision of the last one. No batch of the store is told by half, and what is told
/// is durable.
///
/// To go on after a restart, write down the groups, and hand them to [`GroupFeed::resume`]: the first update then tells
/// what happened meanwhile, and nothing twice. The same is done where the store has forgotten changes.
///
/// ```
/// # use std::{sync::Arc, time::Duration};
/// # use dcenet_core::provider::{AddressSource, LeaseRequest};
/// # use dcenet_ipam::{Ipam, groups::{GroupFeed, Grouping, Groups}, store::memory::MemoryStore};
/// # pollster::block_on(async {
/// # let config = serde_json::from_str(r#"{ "pools": [ { "name": "db", "subnet": "10.20.0.0/24" } ] }"#)?;
/// let ipam = Arc::new(Ipam::new(&config, Arc::new(MemoryStore::new()))?);
/// let grouping = Grouping::default();
/// let mut ours = ipam.groups(&grouping).await?;
/// let mut feed = GroupFeed::resume(ipam.clone(), &grouping, ours.clone())?;
/// # let attachment = serde_json::from_str(r#"{ "network": "shop", "container": "c1", "ifname": "eth0" }"#)?;
/// ipam.lease(&LeaseRequest { workload: Some("shop/db-0".parse()?), ..LeaseRequest::new(attachment) }).await?;
/// while let Some(update) = feed.next(Duration::ZERO).await? {
///     ours.apply(&update);
/// }
/// assert_eq!(ours.text(&"shop/db".parse()?, Default::default()), "10.20.0.1/32\n");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// ```
pub struct GroupFeed<I> {
    ipam: I,
    fold: Fold,
    follower: Follower,
    /// What the follower has once it was told what is ready.
    known: Groups,
    /// What is not yet known to be durable.
    ready: Option<Update>,
}

impl<I> std::fmt::Debug for GroupFeed<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GroupFeed").field("revision", &self.follower.revision).finish_non_exhaustive()
    }
}

impl<I: Deref<Target = Ipam>> GroupFeed<I> {
    /// For a follower who has nothing: the first update tells everything.
    ///
    /// # Errors
    /// [`LeaseError::Invalid`] if the grouping contradicts itself.
    pub fn new(ipam: I, grouping: &Grouping) -> Result<Self, LeaseError> {
        Self::resume(ipam, grouping, Groups::new(grouping.space.clone()))
    }

    /// For a follower who has these groups, from [`Ipam::groups`] or from applying updates.
    ///
    /// # Errors
    /// [`LeaseError::Invalid`] if the groups are of another space.
    pub fn resume(ipam: I, grouping: &Grouping, from: Groups) -> Result<Self, LeaseError> {
        grouping.check()?;
        if from.space != grouping.space {
            let reason = format!("{} is not the grouping's, {}; begin without groups", from.space, grouping.space);
            return Err(LeaseError::Invalid { field: "space".to_owned(), reason });
        }
        let fold = Fold::new(ipam.layout().clone(), grouping.clone());
        Ok(Self { ipam, fold, follower: Follower::default(), known: from, ready: None })
    }

    /// Waits for the next update, at most `limit`; `None` when nothing changed. Zero looks without waiting.
    ///
    /// May block the thread for as long as it waits, as [`Watch::next`](crate::store::Watch::next) does. The future may be
    /// dropped, and an error loses nothing: the next call goes on.
    ///
    /// # Errors
    /// What the store answers.
    pub async fn next(&mut self, limit: Duration) -> Result<Option<Update>, LeaseError> {
        // No deadline where the clock cannot express it.
        let deadline = Instant::now().checked_add(limit);
        loop {
            if self.ready.is_some() {
                // A loss of power may still undo what a watch tells.
                self.ipam.revision().await?;
                return Ok(self.ready.take());
            }
            if self.follower.behind {
                self.follower.scan(&self.ipam, &mut self.fold).await?;
                let now = self.fold.groups(self.follower.revision);
                self.ready = self.known.changes_to(&now);
                self.known = now;
                continue;
            }
            let now = self.ipam.now();
            let passed = self.fold.pass(self.follower.revision, now);
            self.tell(passed)?;
            let Some(watch) = self.follower.watch.as_mut().filter(|_| self.ready.is_none()) else { continue };
            let left = deadline.map_or(FAR, |deadline| deadline.saturating_duration_since(Instant::now()));
            let end = self.fold.next_end().map_or(FAR, |at| Duration::from_millis(at.saturating_sub(now)));
            match watch.next(left.min(end)).await.map_err(store_error)? {
                // Before the scan.
                Some(Change::Writes { revision, .. }) if revision <= self.follower.revision => {}
                Some(Change::Writes { revision, writes }) => {
                    self.follower.revision = revision;
                    let learned = self.fold.learn(revision, writes, self.ipam.now());
                    self.tell(learned)?;
                }
                Some(Change::Gap { .. }) => self.follower.behind = true,
                None if end > left && deadline.is_some_and(|deadline| Instant::now() >= deadline) => return Ok(None),
                None => {}
            }
        }
    }

    /// The groups as they are once every update was applied that was returned so far.
    pub fn groups(&self) -> &Groups {
        &self.known
    }

    fn tell(&mut self, update: Result<Option<Update>, LeaseError>) -> Result<(), LeaseError> {
        // What the fold was doing is half done.
        self.ready = update.inspect_err(|_| self.follower.behind = true)?;
        if let Some(update) = &self.ready {
            self.known.apply(update);
        }
        Ok(())
    }
}
