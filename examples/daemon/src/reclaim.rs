//! Taking back what pods held that are gone from this node.
//!
//! Only what is proven is taken back, for no evidence means alive:
//!
//! | What is found | What proves that the pod is gone |
//! |---|---|
//! | a record whose attach never finished | nobody holds the record, so whoever began has died |
//! | a finished record | its path does not lead to its namespace any more, and the host's end of its pair is gone, as it is with the namespace |
//!
//! Attachments whose device lives in the pod alone have no host's end to prove it, and a lease without a record may be of a
//! plugin of others: both are left to the runtime's DEL and GC. The work is that of DEL, in its order: devices, then addresses, under a hold
//! on the attachment that no ADD can have meanwhile.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use dcenet_core::engine::Engine;
use dcenet_core::journal::Record;
use dcenet_core::model::{AttachmentId, AttachmentKey};
use dcenet_core::netns::{NetNs, NetNsError};
use dcenet_core::provider::AddressSource;
use dcenet_ipam::Ipam;
use rustix::io::Errno;
use rustix::net::netdevice::index_to_name;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Finds and takes back, on the host whose namespace the calling thread is in.
pub struct Reclaim {
    engine: Engine,
    ipam: Arc<Ipam>,
    /// Attachments whose attach was under way at the last look; none before the first.
    begun: Option<BTreeSet<AttachmentId>>,
}

impl Reclaim {
    /// By the records of an engine, and the leases of a store.
    pub fn new(engine: Engine, ipam: Arc<Ipam>) -> Self {
        Self { engine, ipam, begun: None }
    }

    /// Looks once. Returns what was taken back; what could not be is told, and tried again at the next look.
    pub fn look(&mut self) -> Vec<AttachmentKey> {
        let mut taken = Vec::new();
        let records = match self.engine.records() {
            Ok(records) => records,
            Err(error) => {
                tracing::warn!(%error, "attachments cannot be listed");
                return taken;
            }
        };
        let begun: BTreeSet<AttachmentId> =
            records.iter().filter(|record| record.done.is_none()).map(|record| record.key.id()).collect();
        // Looking who holds a record is in the way of who wants it: only where an attach takes long, or may be of before.
        let long = self.begun.as_ref().is_none_or(|before| !before.is_disjoint(&begun));
        self.begun = Some(begun);
        if long {
            match self.engine.recover() {
                Ok(recovered) => {
                    for error in recovered.errors {
                        tracing::warn!(%error, "what was begun and not finished is not all taken back");
                    }
                    for key in recovered.keys {
                        take(&mut taken, &key, || self.release_unrecorded(&key));
                    }
                }
                Err(error) => tracing::warn!(%error, "what was begun and not finished is not all taken back"),
            }
        }
        for record in records {
            take(&mut taken, &record.key, || self.detach_gone(&record));
        }
        taken
    }

    /// Releases the lease of an attach whose devices were taken back, unless it has begun anew.
    fn release_unrecorded(&self, key: &AttachmentKey) -> Outcome<bool> {
        let hold = self.engine.hold(key)?;
        if hold.is_recorded() {
            return Ok(false);
        }
        let released = self.release(key)?;
        hold.close()?;
        Ok(released)
    }

    fn detach_gone(&self, record: &Record) -> Outcome<bool> {
        // Another store's lease would not be released, and its record is what tells of it.
        let ours = || pollster::block_on(self.ipam.held(&record.key)).map(|lease| lease.is_some());
        if !is_gone(record)? || !ours()? {
            return Ok(false);
        }
        let Some(mut hold) = self.engine.hold_remains(&record.key, None)? else { return Ok(false) };
        // Nobody else changes it from here on: it is still that attachment, or it was made anew.
        if self.engine.records()?.iter().all(|now| now != record) {
            return Ok(false);
        }
        hold.detach(None)?;
        let released = self.release(&record.key)?;
        hold.close()?;
        Ok(released)
    }

    fn release(&self, key: &AttachmentKey) -> Outcome<bool> {
        let Some(lease) = pollster::block_on(self.ipam.held(key))? else { return Ok(false) };
        pollster::block_on(self.ipam.release(key, lease.sequence()))?;
        Ok(true)
    }
}

fn take(taken: &mut Vec<AttachmentKey>, key: &AttachmentKey, work: impl FnOnce() -> Outcome<bool>) {
    match work() {
        Ok(true) => {
            tracing::info!(%key, "taken back: its pod is gone");
            taken.push(key.clone());
        }
        Ok(false) => {}
        Err(error) => tracing::warn!(%key, %error, "not taken back"),
    }
}

/// Whether the record proves that its pod's namespace is gone.
fn is_gone(record: &Record) -> Outcome<bool> {
    let (Some(done), Some(end)) = (&record.done, &record.host_end) else { return Ok(false) };
    let Some(index) = done.host_index else { return Ok(false) };
    match NetNs::open(&record.netns_path) {
        Ok(found) if found.id() == record.netns => return Ok(false),
        Ok(_) | Err(NetNsError::NotANamespace { .. }) => {}
        Err(error) if error.is_gone() => {}
        Err(error) => return Err(error.into()),
    }
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    match index_to_name(&socket, index.get()) {
        Ok(name) => Ok(name != end.name.as_str()),
        Err(Errno::NODEV | Errno::NXIO) => Ok(true),
        Err(error) => Err(io::Error::from(error).into()),
    }
}
