//! The engine: the only place that changes the system.
//!
//! It asks a link driver for a plan, writes the intent to the journal, carries the plan out in as few netlink batches
//! as the targets allow, and takes back what was done when a step fails.

mod apply;
mod attach;
mod change;
mod check;
mod detach;
mod device;
mod error;
mod hold;
mod known;
mod lend;
mod lock;
mod removal;
mod setting;
mod shared;
mod steer;
mod translate;
mod underlay;
mod undo;

use std::path::Path;
use std::sync::Arc;

pub use self::check::Drift;
pub use self::detach::Recovered;
pub(crate) use self::error::InUse;
pub use self::error::{AttachError, DetachErrors, StepError, TeardownError};
pub use self::hold::Hold;
use self::lock::SharedState;
pub use self::removal::Removals;
pub use self::steer::{PodInterface, SteerError, Steering, UnreachableGateway};
use crate::journal::{Interface, Journal, JournalError, Record};
use crate::link::{LinkConfig, Policy};
use crate::model::{AttachmentKey, IfIndex, LabelSet, MacAddr, NetworkName, Workload};
use crate::nat::Nat;
use crate::netlink::{Family, Socket};
use crate::netns::{Host, NetNs, NetNsError, Pod};
use crate::provider::{DeviceSource, Endpoint, Lease, PolicySink};

/// Makes and removes attachments on one host.
///
/// It holds no socket between calls and can be shared by threads. Several processes may work with the same run
/// directory.
pub struct Engine {
    host: Host,
    journal: Journal,
    policy: Option<Arc<dyn PolicySink>>,
    lifting: Option<Arc<dyn PolicySink>>,
    devices: Option<Arc<dyn DeviceSource>>,
    entry: NamespaceEntry,
    shared: SharedState,
    removals: Option<Arc<Removals>>,
}

/// How the engine opens sockets in namespaces of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NamespaceEntry {
    /// On a thread of its own each time, 30 us: right everywhere.
    #[default]
    Thread,
    /// By moving the calling thread there and back, 3 us: for programs of one thread, which is in the host's namespace.
    InPlace,
}

/// What to attach.
#[derive(Debug)]
pub struct AttachRequest<'a> {
    /// The attachment.
    pub key: AttachmentKey,
    /// The pod's namespace.
    pub pod: Pod<'a>,
    /// The link.
    pub link: LinkConfig,
    /// Addresses and routes.
    pub lease: Lease,
    /// The pod end's Ethernet address where somebody insists on one; else the lease's, else
    /// [`AttachmentKey::mac`].
    pub mac: Option<MacAddr>,
    /// The workload, where known.
    pub workload: Option<Workload>,
    /// The workload's labels.
    pub labels: LabelSet,
    /// Whether it goes under policy before it is up.
    pub policy: Policy,
    /// What the host translates for it.
    pub nat: Nat,
    /// A digest of the configuration: a repeated attach with another one is not the same.
    pub fingerprint: String,
}

impl<'a> AttachRequest<'a> {
    /// Asks for what must be said; nobody's labels, no policy, and an Ethernet address derived from the lease or the key.
    pub fn new(key: AttachmentKey, pod: Pod<'a>, link: LinkConfig, lease: Lease) -> Self {
        Self {
            key,
            pod,
            link,
            lease,
            mac: None,
            workload: None,
            labels: LabelSet::new(),
            policy: Policy::None,
            nat: Nat::default(),
            fingerprint: String::new(),
        }
    }
}

/// An attachment that stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The attachment.
    pub key: AttachmentKey,
    /// The devices, in the order of the CNI result: bridge, host's end, pod's end.
    pub interfaces: Vec<Interface>,
    /// The pod end's place in `interfaces`.
    pub pod_interface: usize,
    /// The host end's index, where there is one.
    pub host_index: Option<IfIndex>,
    /// What policy decides for, if it does.
    pub endpoint: Option<Endpoint>,
    /// Addresses and routes, as they were leased.
    pub lease: Lease,
    /// Whether it stood before this call.
    pub repeated: bool,
}

impl Engine {
    /// An engine for the host whose network namespace is `host`, with its records under `run`, such as `/run/dcenet`.
    ///
    /// `policy` decides for attachments that want it.
    ///
    /// # Errors
    /// Where the boot id cannot be read.
    pub fn new(host: Host, run: &Path, policy: Option<Arc<dyn PolicySink>>) -> Result<Self, JournalError> {
        let shared = SharedState::default();
        Ok(Self {
            host,
            journal: Journal::open(run)?,
            policy,
            lifting: None,
            devices: None,
            entry: NamespaceEntry::default(),
            shared,
            removals: None,
        })
    }

    /// Chooses how namespaces are entered.
    #[must_use]
    pub fn entering(mut self, entry: NamespaceEntry) -> Self {
        self.entry = entry;
        self
    }

    /// With who hands out devices, for links that are made of such.
    #[must_use]
    pub fn lending_from(mut self, devices: Arc<dyn DeviceSource>) -> Self {
        self.devices = Some(devices);
        self
    }

    /// With who takes policy off devices of other plugins that a former configuration put under it, where this one has nobody who
    /// decides.
    #[must_use]
    pub fn lifting_by(mut self, policy: Arc<dyn PolicySink>) -> Self {
        self.lifting = Some(policy);
        self
    }

    /// Has links of the host deleted together with those that others who share `removals` delete at the same time.
    #[must_use]
    pub fn removing_with(mut self, removals: Arc<Removals>) -> Self {
        self.removals = Some(removals);
        self
    }

    /// The host's namespace.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The id of this boot, as records have it.
    pub fn boot(&self) -> &str {
        self.journal.boot()
    }

    /// Whether an attach could be recorded now. Cheap, for STATUS is polled.
    ///
    /// # Errors
    /// Where the run directory cannot be written.
    pub fn ready(&self) -> Result<(), JournalError> {
        self.journal.ready()
    }

    /// Every record of a network: finished attachments, and begun ones whose `done` is `None`.
    pub fn attachments(&self, network: &NetworkName) -> Result<Vec<Record>, JournalError> {
        self.journal.records(network)
    }

    /// As [`Engine::attachments`], of every network, for who adopts or looks after all that is on the host.
    pub fn records(&self) -> Result<Vec<Record>, JournalError> {
        self.journal.records_that(|_| true)
    }

    /// The attachment as its record tells, if it was finished.
    ///
    /// # Errors
    /// Where the record cannot be read, or another process works on the attachment now.
    pub fn attached(&self, key: &AttachmentKey) -> Result<Option<Attached>, JournalError> {
        let record = self.journal.find(key.id())?.and_then(|(_, record)| record).filter(|r| r.key == *key);
        Ok(record.and_then(|r| Attached::from_record(&r, true)))
    }

    fn host_socket(&self) -> Result<Socket, NetNsError> {
        self.host.0.socket(Family::Route)
    }

    fn pod_socket(&self, pod: &NetNs) -> Result<Socket, NetNsError> {
        match self.entry {
            NamespaceEntry::Thread => pod.socket(Family::Route),
            NamespaceEntry::InPlace => pod.socket_in_place(&self.host.0, Family::Route),
        }
    }
}

impl Attached {
    fn from_record(record: &Record, repeated: bool) -> Option<Self> {
        let done = record.done.as_ref()?;
        Some(Self {
            key: record.key.clone(),
            interfaces: done.interfaces.clone(),
            pod_interface: done.interfaces.iter().position(|i| i.sandbox.is_some())?,
            host_index: done.host_index,
            endpoint: record.endpoint(),
            lease: record.lease.clone(),
            repeated,
        })
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { host, journal, policy, lifting: _, devices, entry, shared: _, removals: _ } = self;
        f.debug_struct("Engine")
            .field("host", host)
            .field("journal", journal)
            .field("policy", &policy.is_some())
            .field("devices", &devices.is_some())
            .field("entry", entry)
            .finish_non_exhaustive()
    }
}
