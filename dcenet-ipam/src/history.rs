//! Who held an address, and when.
//!
//! Every bind and release is written down in the batch that makes it, where [`IpamConfig::history`](crate::IpamConfig::history)
//! wants it: no further call of the store, no further flush. Times are those of the clock of whoever leased or released;
//! the order is that of the commits, and no clock can change it.
//!
//! An event is forgotten when its address has newer ones than are to be kept, or when it is too old; one in four releases
//! looks after the address that it releases, and [`Ipam::prune_history`] after all.

use std::net::IpAddr;

use dcenet_core::model::{AttachmentKey, Workload};
use dcenet_core::provider::LeaseError;

use crate::ipam::{Ipam, decode, store_error};
use crate::machine::history::old_events;
use crate::model::{Addr, AddressSpace};
use crate::record::{EventKind, EventRecord, event_of, history_prefix};
use crate::store::{Batch, Entry, Key, Write, numbered};

/// The time in which somebody held an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenure {
    /// The routing domain.
    pub space: AddressSpace,
    /// The address.
    pub address: IpAddr,
    /// Who held it.
    pub attachment: AttachmentKey,
    /// The workload behind, where known.
    pub workload: Option<Workload>,
    /// From when, in milliseconds since 1970.
    pub from: u64,
    /// To when; `None` if they still hold it.
    pub to: Option<u64>,
}

impl Tenure {
    /// Whether it covers a time, in milliseconds since 1970: the first moment is in it, the last is not.
    pub fn covers(&self, at: u64) -> bool {
        self.from <= at && self.to.is_none_or(|to| at < to)
    }
}

impl Ipam {
    /// Who has held an address, the oldest first, as far back as the history goes.
    pub async fn history(&self, space: &AddressSpace, address: IpAddr) -> Result<Vec<Tenure>, LeaseError> {
        let address = Addr::from(address);
        let prefix = history_prefix(space, address.family);
        let events = self.scan_all(&numbered(&prefix, address.bits)).await?;
        tenures(space, address, &prefix, events)
    }

    /// Who held an address at a time, in milliseconds since 1970: nobody, one, or two in a handover. Reads the events of
    /// that address only.
    pub async fn held_at(&self, space: &AddressSpace, address: IpAddr, at: u64) -> Result<Vec<Tenure>, LeaseError> {
        let mut tenures = self.history(space, address).await?;
        tenures.retain(|tenure| tenure.covers(at));
        Ok(tenures)
    }

    /// Which addresses a workload has held, the earliest first. Reads the whole history: a tool's call.
    pub async fn history_of(&self, workload: &Workload) -> Result<Vec<Tenure>, LeaseError> {
        let mut found = Vec::new();
        for (space, family) in self.families_of_spaces() {
            let prefix = history_prefix(space, family);
            for (bits, events) in by_address(&prefix, self.scan_all(&prefix).await?) {
                let all = tenures(space, Addr { family, bits }, &prefix, events)?;
                found.extend(all.into_iter().filter(|tenure| tenure.workload.as_ref() == Some(workload)));
            }
        }
        found.sort_by_key(|tenure| tenure.from);
        Ok(found)
    }

    /// Forgets events that are too old or too many, of all addresses. Returns how many. Without a history in the
    /// configuration all are too many.
    pub async fn prune_history(&self) -> Result<usize, LeaseError> {
        let (limit, count) = match self.layout().history {
            Some(history) => (u64::try_from(history.keep.as_millis()).unwrap_or(u64::MAX), history.count),
            None => (0, 0),
        };
        let mut forgotten = 0;
        for (space, family) in self.families_of_spaces() {
            let prefix = history_prefix(space, family);
            for (_, events) in by_address(&prefix, self.scan_all(&prefix).await?) {
                let keys: Vec<Key> = events.into_iter().map(|(key, _)| key).collect();
                for old in old_events(&prefix, &keys, self.now(), limit, count).chunks(AT_ONCE) {
                    // Keys of events are never used again, so there is nothing to guard.
                    let writes = old.iter().cloned().map(Write::Delete).collect();
                    let batch = Batch { guards: Vec::new(), writes, request_id: self.request_id() };
                    self.store().commit(&batch).await.map_err(store_error)?;
                    forgotten += old.len();
                }
            }
        }
        Ok(forgotten)
    }
}

/// Events forgotten in one batch; all stores take as many operations.
const AT_ONCE: usize = 64;

/// Groups events, which are sorted by address.
fn by_address(prefix: &[u8], events: Vec<(Key, Entry)>) -> Vec<(u128, Vec<(Key, Entry)>)> {
    let mut groups: Vec<(u128, Vec<(Key, Entry)>)> = Vec::new();
    for (key, entry) in events {
        let Some((bits, _)) = event_of(prefix, &key) else { continue };
        match groups.last_mut() {
            Some((last, group)) if *last == bits => group.push((key, entry)),
            _ => groups.push((bits, vec![(key, entry)])),
        }
    }
    groups
}

/// Pairs the events of one address.
fn tenures(
    space: &AddressSpace,
    address: Addr,
    prefix: &[u8],
    mut events: Vec<(Key, Entry)>,
) -> Result<Vec<Tenure>, LeaseError> {
    // Clocks may step back, revisions do not.
    events.sort_by_key(|(_, entry)| entry.version);
    let mut tenures: Vec<Tenure> = Vec::new();
    for (key, entry) in events {
        let Some((_, at)) = event_of(prefix, &key) else { continue };
        let EventRecord { what, by, workload } = decode(&key, &entry)?;
        match (what, by) {
            (EventKind::Bound | EventKind::Joined, Some(attachment)) => {
                let (space, address) = (space.clone(), address.ip());
                tenures.push(Tenure { space, address, attachment, workload, from: at, to: None });
            }
            (EventKind::Bound | EventKind::Joined, None) => {}
            (EventKind::Released, by) => {
                let open = |t: &&mut Tenure| t.to.is_none() && by.as_ref().is_none_or(|by| t.attachment == *by);
                for tenure in tenures.iter_mut().filter(|t| open(t)) {
                    tenure.to = Some(at);
                }
            }
        }
    }
    Ok(tenures)
}

/// Who holds an address as its events tell.
pub(crate) fn open_tenures(
    space: &AddressSpace,
    address: Addr,
    prefix: &[u8],
    events: Vec<(Key, Entry)>,
) -> Vec<AttachmentKey> {
    let tenures = tenures(space, address, prefix, events).unwrap_or_default();
    tenures.into_iter().filter(|tenure| tenure.to.is_none()).map(|tenure| tenure.attachment).collect()
}
