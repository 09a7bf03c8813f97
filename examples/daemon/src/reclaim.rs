//! Taking back what pods held that are gone from this node.
//!
//! Only what is proven is taken back, for no evidence means alive:
//!
//! | What is found | What proves that the pod is gone |
//! |---|---|
//! | a record of an earlier boot | the boot |
//! | a record of this host's namespace whose attach never finished | nobody holds the record, so whoever began has died |
//! | a finished record of this host's namespace | its path does not lead to its namespace any more, and no device has the index of its pair's end on the host, as it is when the namespace is gone |
//!
//! A daemon that is in another network namespace than the pods' host, such as that of its own container, sees no device of
//! theirs: so records name the namespace in which they were made, and those that do not, of earlier releases, prove nothing.
//! Nothing is taken back either of a pod that is under policy, where this daemon does not own it: the owner would not be told.
//!
//! Attachments whose device lives in the pod alone have no host's end to prove it, and a lease without a record may be of a
//! plugin of others: both are left to the runtime's DEL and GC. The work is that of DEL, in its order: devices, then addresses, under a hold
//! on the attachment that no ADD can have meanwhile.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use dcenet_core::engine::{Engine, TeardownError};
use dcenet_core::journal::{JournalError, Record};
use dcenet_core::link::Policy;
use dcenet_core::model::{AttachmentId, AttachmentKey};
use dcenet_core::netns::{NetNs, NetNsError};
use dcenet_core::provider::{AddressSource, Lease};
use dcenet_ipam::Ipam;
use rustix::io::Errno;
use rustix::net::netdevice::index_to_name;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::threads::Threads;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Finds and takes back, on the host whose namespace the calling thread is in.
pub struct Reclaim {
    engine: Engine,
    ipam: Arc<Ipam>,
    /// Whether the engine tells an owner of policy what goes.
    owns_policy: bool,
    /// Attachments whose attach was under way at the last look; none before the first.
    begun: Option<BTreeSet<AttachmentId>>,
}

impl Reclaim {
    /// By the records of an engine, and the leases of a store. `owns_policy` tells whether the engine has a sink of policy.
    pub fn new(engine: Engine, ipam: Arc<Ipam>, owns_policy: bool) -> Self {
        Self { engine, ipam, owns_policy, begun: None }
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
        let begun = records.iter().filter(|record| record.done.is_none()).map(|record| record.key.id()).collect();
        // To see who holds a record is to hold it for a moment: only where an attach takes long, or may be of before.
        let before = self.begun.replace(begun);
        let lasts = |record: &Record| before.as_ref().is_none_or(|before| before.contains(&record.key.id()));
        for record in records.iter().filter(|record| record.done.is_some() || lasts(record)) {
            match self.take_back(record) {
                Ok(true) => {
                    tracing::info!(key = %record.key, "taken back: its pod is gone");
                    taken.push(record.key.clone());
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(key = %record.key, %error, "not taken back"),
            }
        }
        taken
    }

    /// Takes back what a record tells of, if its pod is proven to be gone and its addresses are of our store.
    fn take_back(&self, record: &Record) -> Outcome<bool> {
        // Another store's lease would not be released, and its record is what tells of it.
        if !self.is_proven_gone(record)? || self.held(&record.key)?.is_none() {
            return Ok(false);
        }
        let mut hold = match self.engine.hold_remains(&record.key, None) {
            Ok(Some(hold)) => hold,
            Ok(None) => return Ok(false),
            // Whoever began it lives, or it is being deleted.
            Err(errors) if matches!(errors.0[..], [TeardownError::Journal(JournalError::Busy { .. })]) => {
                return Ok(false);
            }
            Err(errors) => return Err(errors.into()),
        };
        // Nobody else changes it from here on: it is still that attachment, or it was made anew.
        if hold.record() != Some(record) {
            return Ok(false);
        }
        let Some(lease) = self.held(&record.key)? else { return Ok(false) };
        hold.detach(None)?;
        if let Err(error) = pollster::block_on(self.ipam.release(&record.key, lease.sequence())) {
            // Its record leads here again.
            hold.keep();
            return Err(error.into());
        }
        hold.close()?;
        Ok(true)
    }

    fn held(&self, key: &AttachmentKey) -> Outcome<Option<Lease>> {
        Ok(pollster::block_on(self.ipam.held(key))?)
    }

    fn is_proven_gone(&self, record: &Record) -> Outcome<bool> {
        if record.policy == Policy::Wanted && !self.owns_policy {
            return Ok(false);
        }
        if record.boot != self.engine.boot() {
            return Ok(true);
        }
        if record.host != Some(self.engine.host().0.id()) {
            return Ok(false);
        }
        if record.done.is_none() { Ok(true) } else { is_gone(record) }
    }
}

/// Looks again and again on a thread of its own, until it is dropped: a store that does not answer keeps nothing else
/// waiting, at the end neither. What is under way then is left as after a kill, and found by the next look.
#[derive(Debug)]
pub struct Looking {
    _stop: Sender<()>,
}

impl Looking {
    /// Begins, on the host whose namespace the calling thread is in. `tell` hears what each look has taken back.
    ///
    /// # Errors
    /// Where there can be no thread.
    pub fn start(
        mut reclaim: Reclaim,
        every: Duration,
        tell: impl Fn(&[AttachmentKey]) + Send + 'static,
        threads: &Threads,
    ) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let look = move || {
            loop {
                tell(&reclaim.look());
                if stopped.recv_timeout(every) == Err(RecvTimeoutError::Disconnected) {
                    return;
                }
            }
        };
        threads.spawn("dcenetd-reclaim", look)?;
        Ok(Self { _stop: stop })
    }
}

/// Whether the record proves that its pod's namespace is gone.
fn is_gone(record: &Record) -> Outcome<bool> {
    let Some(index) = record.done.as_ref().and_then(|done| done.host_index) else { return Ok(false) };
    match NetNs::open(&record.netns_path) {
        Ok(found) if found.id() == record.netns => return Ok(false),
        Ok(_) | Err(NetNsError::NotANamespace { .. }) => {}
        Err(error) if error.is_gone() => {}
        Err(error) => return Err(error.into()),
    }
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    match index_to_name(&socket, index.get()) {
        // By whatever name: anybody can rename a device.
        Ok(_) => Ok(false),
        Err(Errno::NODEV | Errno::NXIO) => Ok(true),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

#[cfg(test)]
mod tests;
