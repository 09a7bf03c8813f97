//! The records that say what may be true outside.
//!
//! | Key | Value |
//! |---|---|
//! | `y/NETWORK/CONTAINER/IFNAME` | [`Page`]: what an attachment may have outside |

use std::sync::Arc;

use dcenet_core::model::{AttachmentKey, MacAddr, NetworkName};
use dcenet_core::provider::LeaseError;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{AddressBinder, BindError, BindToken, Bound};
use crate::ipam::{decode, random_id, store_error};
use crate::record::attachment_text;
use crate::store::{Batch, Guard, Key, Outcome, Store, Write};

/// What an attachment may have outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Page {
    pub(super) stage: Stage,
    /// The lease; absent where it is the version of this record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) sequence: Option<u64>,
    /// What the outside is told of; none where it chooses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) addresses: Vec<IpNet>,
    pub(super) mac: MacAddr,
    /// What is known to be bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) bound: Option<Bound>,
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
}

#[derive(Debug, Clone)]
pub(super) struct Ledger {
    pub(super) store: Arc<dyn Store>,
}

impl Ledger {
    pub(super) async fn read(&self, attachment: &AttachmentKey) -> Result<Option<Entry>, LeaseError> {
        let key = page_key(attachment);
        let found = self.store.read(std::slice::from_ref(&key)).await.map_err(store_error)?;
        let entry = found.into_iter().next().flatten();
        entry.map(|entry| Ok(Entry { page: decode(&key, &entry)?, version: entry.version })).transpose()
    }

    /// The attachments with a record, of one network or of all.
    pub(super) async fn all(&self, network: Option<&NetworkName>) -> Result<Vec<(AttachmentKey, Entry)>, LeaseError> {
        let prefix = network.map_or_else(|| b"y/".to_vec(), |network| format!("y/{network}/").into_bytes());
        let mut all = Vec::new();
        let mut after: Option<Key> = None;
        loop {
            let page = self.store.scan(&prefix, after.as_deref(), PAGE).await.map_err(store_error)?;
            for (key, entry) in &page {
                let text = key.strip_prefix(b"y/").and_then(|text| std::str::from_utf8(text).ok());
                if let Some(attachment) = text.and_then(attachment_text::parse) {
                    all.push((attachment, Entry { page: decode(key, entry)?, version: entry.version }));
                }
            }
            match page.last() {
                Some((last, _)) if page.len() == PAGE => after = Some(last.clone()),
                _ => return Ok(all),
            }
        }
    }

    /// Renews what is due; see [`BinderSource::renew_due`](super::BinderSource::renew_due).
    pub(super) async fn renew_due<B: AddressBinder + ?Sized>(
        &self,
        binder: &B,
        now: u64,
    ) -> Result<Vec<(AttachmentKey, u64)>, LeaseError> {
        let (mut doomed, mut failure) = (Vec::new(), None);
        for (attachment, entry) in self.all(None).await? {
            let Some(bound) = entry.page.bound.as_ref().filter(|_| entry.page.stage == Stage::Bound) else { continue };
            if bound.renew.is_none_or(|at| at > now) {
                continue;
            }
            match binder.renew(bound).await {
                Ok(bound) => {
                    let page = Page { bound: Some(bound), sequence: Some(entry.sequence()), ..entry.page.clone() };
                    // Who is faster than this has released it.
                    if let Err(error) =
                        self.write(&attachment, Some(entry.version), Some(&page), Batch::default()).await
                    {
                        failure.get_or_insert(error);
                    }
                }
                Err(BindError::Lost { .. }) => doomed.push((attachment, now)),
                Err(error) => {
                    tracing::warn!(%attachment, %error, "what is bound outside could not be renewed");
                    doomed.extend(bound.until.map(|until| (attachment, until)));
                }
            }
        }
        failure.map_or(Ok(doomed), Err)
    }

    /// Writes a record in place of the one with the version (`None` for none), with whatever belongs to it. `None` if
    /// somebody else was faster.
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
            Some(page) => Write::Put(key, serde_json::to_vec(page).map_err(|e| LeaseError::Store(Box::new(e)))?),
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

pub(super) fn page_key(attachment: &AttachmentKey) -> Key {
    format!("y/{attachment}").into_bytes()
}

/// The answer where somebody else works on the same attachment.
pub(super) fn overtaken(attachment: &AttachmentKey) -> LeaseError {
    LeaseError::Busy(format!("another call binds or releases {attachment} at the same time"))
}

const PAGE: usize = 512;
const UNKNOWNS: u32 = 3;
