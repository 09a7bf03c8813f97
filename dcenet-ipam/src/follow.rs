//! Keeping a copy of the store's records up to date: a scan, and a watch from there on.

use std::time::Duration;

use dcenet_core::provider::LeaseError;

use crate::Ipam;
use crate::ipam::store_error;
use crate::store::{Change, Entry, Key, Watch};

/// A copy of some of the store's records.
pub(crate) trait Replica {
    /// Before all keys that it wants.
    fn prefixes(&self) -> &[Key];

    /// Begins anew with what a scan found.
    fn reset(&mut self, found: Vec<(Key, Entry)>, now: u64) -> Result<(), LeaseError>;

    /// Takes in what a revision wrote. What is older than what it has is to be ignored: a scan sees parts of what the watch
    /// tells again.
    fn take_in(&mut self, revision: u64, writes: Vec<(Key, Option<Entry>)>, now: u64) -> Result<(), LeaseError>;
}

/// Where a copy stands.
pub(crate) struct Follower {
    /// Up to which revision the copy knows everything.
    pub(crate) revision: u64,
    /// Opened by the first scan.
    pub(crate) watch: Option<Box<dyn Watch>>,
    /// The copy is to be filled anew: it never was, changes were missed, or cannot be watched.
    pub(crate) behind: bool,
}

impl Default for Follower {
    fn default() -> Self {
        Self { revision: 0, watch: None, behind: true }
    }
}

impl Follower {
    /// Fills the copy with the records of one moment.
    pub(crate) async fn scan(&mut self, ipam: &Ipam, replica: &mut impl Replica) -> Result<(), LeaseError> {
        self.behind = true;
        for _ in 0..SCANS {
            if self.scanned(ipam, replica).await? {
                self.behind = false;
                return Ok(());
            }
        }
        let reason = format!("the store forgot changes during {SCANS} scans in a row; follow it from nearer");
        Err(LeaseError::Busy(reason))
    }

    /// The same for a store that cannot be watched. What is written meanwhile may be seen by half.
    pub(crate) async fn scan_once(&mut self, ipam: &Ipam, replica: &mut impl Replica) -> Result<(), LeaseError> {
        self.revision = ipam.revision().await?;
        let mut found = Vec::new();
        for prefix in replica.prefixes() {
            found.extend(ipam.scan_all(prefix).await?);
        }
        replica.reset(found, ipam.now())
    }

    /// Takes in what is ready, so that many changes are looked at once.
    pub(crate) async fn drain(&mut self, ipam: &Ipam, replica: &mut impl Replica) -> Result<(), LeaseError> {
        for _ in 0..AT_ONCE {
            let Some(watch) = &mut self.watch else { return Ok(()) };
            match watch.next(Duration::ZERO).await.map_err(store_error)? {
                Some(change) => self.learn(change, ipam, replica)?,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Takes in what the watch told.
    pub(crate) fn learn(&mut self, change: Change, ipam: &Ipam, replica: &mut impl Replica) -> Result<(), LeaseError> {
        match change {
            // Before the scan.
            Change::Writes { revision, .. } if revision <= self.revision => {}
            Change::Writes { revision, writes } => {
                self.revision = revision;
                let taken = replica.take_in(revision, writes, ipam.now());
                // What the copy was doing is half done.
                taken.inspect_err(|_| self.behind = true)?;
            }
            Change::Gap { .. } => self.behind = true,
        }
        Ok(())
    }

    /// Whether no change was missed between the pages of the scan.
    async fn scanned(&mut self, ipam: &Ipam, replica: &mut impl Replica) -> Result<bool, LeaseError> {
        let before = ipam.revision().await?;
        if self.watch.is_none() {
            self.watch = Some(ipam.store().watch(b"", before).await.map_err(store_error)?);
        }
        let mut found = Vec::new();
        for prefix in replica.prefixes() {
            found.extend(ipam.scan_all(prefix).await?);
        }
        // What was written meanwhile may be seen by half.
        let after = ipam.revision().await?;
        replica.reset(found, ipam.now())?;
        self.revision = before;
        let Some(watch) = &mut self.watch else { return Ok(false) };
        while self.revision < after {
            match watch.next(SETTLE).await.map_err(store_error)? {
                // A watch that was opened earlier may have older ones to tell.
                Some(Change::Writes { revision, .. }) if revision <= before => {}
                Some(Change::Writes { revision, writes }) => {
                    replica.take_in(revision, writes, ipam.now())?;
                    self.revision = revision;
                }
                Some(Change::Gap { .. }) => return Ok(false),
                // The rest was not written under any key of ours.
                None => break,
            }
        }
        self.revision = self.revision.max(after);
        Ok(true)
    }
}

/// How long a change may be on its way from the store to its watch.
const SETTLE: Duration = Duration::from_secs(2);
/// Changes that are taken in before who follows looks.
const AT_ONCE: usize = 1024;
/// Waits that nothing limits.
pub(crate) const FAR: Duration = Duration::from_secs(3600);
/// Scans before giving up on a store that forgets faster.
const SCANS: usize = 8;
