//! The records that say what may be true outside.
//!
//! | Key | Value |
//! |---|---|
//! | `y/NETWORK/CONTAINER/IFNAME` | [`Page`]: what an attachment may have outside |

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use dcenet_core::model::{AttachmentKey, MacAddr, NetworkName, Workload};
use dcenet_core::provider::LeaseError;
use ipnet::IpNet;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{BindRequest, BindToken, Bound, RecordFailure};
use crate::ipam::{decode, random_id, store_error};
use crate::model::{AddressSpace, NodeName};
use crate::record::attachment_text;
use crate::store::{Batch, Entry as StoreEntry, Guard, Key, Outcome, Store, Write};

/// What an attachment may have outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Page {
    pub(super) stage: Stage,
    /// The source that keeps it, which [`Ledger::write`] names; absent where the one that wrote it named none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) owner: Option<Owner>,
    /// The lease; absent where it is the version of this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) sequence: Option<u64>,
    /// What the outside is told of; none where it chooses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) addresses: Vec<IpNet>,
    pub(super) mac: MacAddr,
    /// The workload, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) workload: Option<Workload>,
    /// The node that asked, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) node: Option<NodeName>,
    /// What is known to be bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) bound: Option<Bound>,
}

impl Page {
    /// When it is to be renewed: when its outside says, or later by up to a twentieth of what is left then and at most
    /// [`JITTER`], so that what was bound together is not renewed together. The same for all who look at this version.
    fn due(&self, key: &[u8], version: u64) -> Option<u64> {
        let bound = self.bound.as_ref().filter(|_| self.stage == Stage::Bound)?;
        let at = bound.renew?;
        let most = bound.until.map_or(JITTER, |until| (until.saturating_sub(at) / JITTER_SHARE).min(JITTER));
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(key);
        hasher.update(&version.to_be_bytes());
        Some(at.saturating_add(u64::from(hasher.finalize()) % (most + 1)))
    }
}

/// When a record is to be renewed; at once where it cannot be read.
pub(super) fn due_of(key: &[u8], entry: &StoreEntry) -> Option<u64> {
    serde_json::from_slice::<Page>(&entry.value).map_or(Some(0), |page| page.due(key, entry.version))
}

/// Which source a record is of. Several may share a store, each with an outside of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(super) enum Owner {
    /// A [`BoundSource`](super::BoundSource), with the binder's name.
    Bound { outside: String },
    /// An [`OutsideSource`](super::OutsideSource), with the binder's name.
    Outside { space: AddressSpace, pool: String, outside: String },
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bound { outside } => write!(f, "one that tells {outside}"),
            Self::Outside { space, pool, outside } => write!(f, "{pool} in the space {space}, from {outside}"),
        }
    }
}

/// A record as an audit looks at it.
#[derive(Debug)]
pub(crate) struct OutsidePage {
    pub(crate) sequence: u64,
    /// Being bound or released.
    pub(crate) is_unfinished: bool,
    pub(crate) bound: Vec<IpAddr>,
}

impl OutsidePage {
    pub(crate) fn read(value: &[u8], version: u64) -> Result<Self, String> {
        let page: Page = serde_json::from_slice(value).map_err(|error| error.to_string())?;
        let bound = page.bound.iter().flat_map(|bound| &bound.addresses).map(|a| a.address.addr()).collect();
        let (sequence, is_unfinished) = (page.sequence.unwrap_or(version), page.stage != Stage::Bound);
        Ok(Self { sequence, is_unfinished, bound })
    }
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Stage {
    Intent,
    Bound,
    Releasing,
}

/// A record with what tells that it is the one that was read.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) page: Page,
    pub(super) version: u64,
}

impl Entry {
    pub(super) fn sequence(&self) -> u64 {
        self.page.sequence.unwrap_or(self.version)
    }

    pub(super) fn token(&self, attachment: &AttachmentKey) -> BindToken {
        BindToken { attachment: attachment.clone(), sequence: self.sequence() }
    }

    /// When it is to be renewed.
    pub(super) fn due(&self, attachment: &AttachmentKey) -> Option<u64> {
        self.page.due(&page_key(attachment), self.version)
    }

    /// What is asked of the outside for it.
    pub(super) fn request(&self, attachment: &AttachmentKey) -> BindRequest {
        let Page { addresses, mac, workload, .. } = &self.page;
        let (addresses, workload) = (addresses.clone(), workload.clone());
        BindRequest { token: self.token(attachment), addresses, mac: *mac, workload }
    }
}

/// All records, as far as they can be read.
#[derive(Debug, Default)]
pub(super) struct Pages {
    pub(super) pages: Vec<(AttachmentKey, Entry)>,
    pub(super) unreadable: Vec<RecordFailure>,
}

impl Pages {
    /// The records that are due to be renewed at `now`, and when the first of the others is.
    pub(super) fn due(self, now: u64) -> (Vec<(AttachmentKey, Entry)>, Option<u64>) {
        let next = self.pages.iter().filter_map(|(attachment, entry)| entry.due(attachment)).filter(|at| *at > now);
        let next = next.min();
        let is_due = |(attachment, entry): &(AttachmentKey, Entry)| entry.due(attachment).is_some_and(|at| at <= now);
        (self.pages.into_iter().filter(is_due).collect(), next)
    }
}

#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) store: Arc<dyn Store>,
    /// Whose records it writes.
    pub(super) owner: Owner,
    /// The attachments whose renewal has failed and was not made good yet, each with the number of its last try.
    pub(super) failed: Mutex<BTreeMap<AttachmentKey, u64>>,
}

impl Ledger {
    pub(super) fn new(store: Arc<dyn Store>, owner: Owner) -> Self {
        Self { store, owner, failed: Mutex::default() }
    }

    pub(super) async fn read(&self, attachment: &AttachmentKey) -> Result<Option<Entry>, LeaseError> {
        let key = page_key(attachment);
        let found = self.store.read(std::slice::from_ref(&key)).await.map_err(store_error)?;
        let entry = found.into_iter().next().flatten();
        entry.map(|entry| Ok(Entry { page: decode(&key, &entry)?, version: entry.version })).transpose()
    }

    /// The attachments with a record, of one network or of all, and what was wrong with those that cannot be read.
    pub(super) async fn all(&self, network: Option<&NetworkName>) -> Result<Pages, LeaseError> {
        let prefix = network.map_or_else(|| b"y/".to_vec(), |network| format!("y/{network}/").into_bytes());
        let mut all = Pages::default();
        let mut after: Option<Key> = None;
        loop {
            let page = self.store.scan(&prefix, after.as_deref(), PAGE).await.map_err(store_error)?;
            for (key, entry) in &page {
                let read = attachment_of_page(key).map_err(|reason| LeaseError::Damaged(reason.into()));
                match read.and_then(|attachment| Ok((attachment, decode(key, entry)?))) {
                    Ok((attachment, page)) => all.pages.push((attachment, Entry { page, version: entry.version })),
                    Err(error) => all.unreadable.push(RecordFailure { key: key.escape_ascii().to_string(), error }),
                }
            }
            match page.last() {
                Some((last, _)) if page.len() == PAGE => after = Some(last.clone()),
                _ => return Ok(all),
            }
        }
    }

    /// Writes what a renewal has brought. `None` if who was faster has released or renewed it.
    pub(super) async fn renewed(
        &self,
        attachment: &AttachmentKey,
        entry: &Entry,
        bound: Bound,
    ) -> Result<Option<Entry>, LeaseError> {
        let page = Page { bound: Some(bound), sequence: Some(entry.sequence()), ..entry.page.clone() };
        let written = self.write(attachment, Some(entry.version), Some(&page), Batch::default()).await?;
        Ok(written.map(|version| Entry { page, version }))
    }

    /// Puts what is due in the order in which it is to be renewed: what has not failed before what has, the one tried
    /// longest ago first, then by the end of its time. The answer is the number of this try.
    pub(super) fn sort(&self, due: &mut [(AttachmentKey, Entry)]) -> u64 {
        let mut failed = self.failed.lock();
        let number = failed.values().max().copied().unwrap_or(0) + 1;
        let end = |entry: &Entry| entry.page.bound.as_ref().and_then(|bound| bound.until).unwrap_or(u64::MAX);
        due.sort_by_cached_key(|(attachment, entry)| (failed.get(attachment).copied(), end(entry), attachment.clone()));
        let listed: BTreeSet<&AttachmentKey> = due.iter().map(|(attachment, _)| attachment).collect();
        failed.retain(|attachment, _| listed.contains(attachment));
        number
    }

    /// The key of an attachment's record, for people.
    pub(super) fn name_of(attachment: &AttachmentKey) -> String {
        page_key(attachment).escape_ascii().to_string()
    }

    /// Writes a record in place of the one with the version (`None` for none), with whatever belongs to it, and names its
    /// source in it. `None` if somebody else was faster.
    pub(super) async fn write(
        &self,
        attachment: &AttachmentKey,
        before: Option<u64>,
        page: Option<&Page>,
        mut beside: Batch,
    ) -> Result<Option<u64>, LeaseError> {
        let key = page_key(attachment);
        beside.guards.push(Guard { key: key.clone(), version: before });
        beside.writes.push(match page {
            Some(page) => {
                let page = Page { owner: Some(self.owner.clone()), ..page.clone() };
                Write::Put(key, serde_json::to_vec(&page).map_err(|e| LeaseError::Store(Box::new(e)))?)
            }
            None => Write::Delete(key),
        });
        beside.request_id = random_id();
        for _ in 0..UNKNOWNS {
            match self.store.commit(&beside).await.map_err(store_error)? {
                Outcome::Committed { revision } => return Ok(Some(revision)),
                Outcome::Conflict(_) => return Ok(None),
                // The store knows a batch by its id for a while; later its guards fail.
                Outcome::Unknown { reason } => tracing::warn!(%reason, "the outcome of a commit is unknown"),
            }
        }
        Err(LeaseError::Busy(format!("{UNKNOWNS} commits in a row ended as nobody knows")))
    }
}

/// Whose record a key is of.
pub(crate) fn attachment_of_page(key: &[u8]) -> Result<AttachmentKey, String> {
    let text = key.strip_prefix(PREFIX).and_then(|text| std::str::from_utf8(text).ok());
    let attachment = text.and_then(attachment_text::parse);
    attachment.ok_or_else(|| format!("the key {} is no network, container and interface", key.escape_ascii()))
}

pub(crate) fn page_key(attachment: &AttachmentKey) -> Key {
    format!("y/{attachment}").into_bytes()
}

/// The answer where somebody else works on the same attachment.
pub(super) fn overtaken(attachment: &AttachmentKey) -> LeaseError {
    LeaseError::Busy(format!("another call binds or releases {attachment} at the same time"))
}

/// Before the records.
pub(super) const PREFIX: &[u8] = b"y/";
const PAGE: usize = 512;
const UNKNOWNS: u32 = 3;
/// The part of what is left of a lease by which its renewal may come later, and the most, in milliseconds.
const JITTER_SHARE: u64 = 20;
const JITTER: u64 = 10_000;
