//! Who puts compiled policy on devices.
//!
//! A node has one *owner* of its policy state: a process that embeds an [`Enforcer`], such as a daemon or a user's own
//! agent. Everybody else, a CNI binary above all, uses [`PinnedDefault`]: it puts a device, while it is down, under
//! pinned default programs, tells the owner over a Unix socket ([`protocol`]), and can wait until the endpoint's own
//! verdicts are in force.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use dcenet_core::netns::{Host, NetNs};
//! use dcenet_ebpf::abi::Sizes;
//! use dcenet_ebpf::attach::ClsactAttacher;
//! # use dcenet_ebpf::loader::Loader;
//! use dcenet_ebpf::probe::Features;
//! use dcenet_policy::enforcer::{Enforcer, EnforcerConfig, Tools};
//! use dcenet_policy::target::Tc;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # fn loader() -> Arc<dyn Loader> { unimplemented!() }
//! let owner = Enforcer::open(
//!     Host(NetNs::of_this_thread()?),
//!     EnforcerConfig {
//!         node: "n1".into(),
//!         node_addresses: ["192.0.2.1".parse()?].into(),
//!         run_dir: "/run/dcenet".into(),
//!         pins: "/run/dcenet/bpf".into(),
//!     },
//!     Tools {
//!         loader: loader(), // such as dcenet_ebpf::loader::AyaLoader
//!         attacher: Arc::new(ClsactAttacher),
//!         lowering: Arc::new(Tc::for_kernel(Sizes::default(), &Features::probe()?)),
//!     },
//! )?;
//! owner.set_policies([])?; // from files, Kubernetes...
//! let report = owner.start()?;
//! for (attachment, reason) in &report.failures {
//!     tracing::warn!(%attachment, reason, "not enforced yet");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # The life of an endpoint
//! ```text
//!                client: pinned default on both hooks, device down
//!                                  |
//!                                  v
//!   +--------------------> [ Default ] -- told, or found by the owner: slot, cell, compile, load --+
//!   |                          |  ^                                                                |
//!   | detached, and made anew  |  | a load or attach fails: what was in force stays, is retried    v
//!   |                          |  +--------------------------------------------------------- [ Compiled ]
//!   |                          |                                                                   |
//!   |                          v                    both hooks replaced, generations bumped        v
//!   +----------------------- gone <-------------- told, or the device has vanished ---------- [ Enforced ] --+
//!                                                                                             ^              |
//!                                                                                             +-- a change --+
//! ```
//! [`Phase`] names them. An owner that starts *adopts* what it finds attached: such endpoints are `Enforced` by their last
//! verdicts until the owner's sources have told what they know ([`Enforcer::start`]).
//!
//! # Where devices are
//! | Device | What holds its programs | Where the programs learn the slot | What the pod sends | [`Enforcement`] |
//! |---|---|---|---|---|
//! | the host's end of a pair | filters of clsact, by [`Tools::attacher`] | the filter's class | comes in | `Full` |
//! | in the pod: macvlan that wants a guard | as below, and on the parent (Linux 6.13) | a constant | goes out | `Guarded` |
//! | in the pod: macvlan, ipvlan | pinned tcx links (Linux 6.6) | a constant | goes out | `EgressBypassable` |
//!
//! Verdicts, cells, flows and tables are the same for both. Equal policies share one program on the host; in pods they share
//! the compiled object, in which nothing but the slot differs, and each is loaded by itself. [`PolicyConfig::require`] refuses
//! endpoints that cannot be enforced in full.
//!
//! # One change
//! 1. Compile the cluster. Sets and programs that did not change are shared with the update before.
//! 2. Write the local ids of all policy sets: what changes in them is of classes that no table names yet.
//! 3. Load new programs. Equal policy sets share one: what tells endpoints apart is the slot, which comes with the
//!    attachment.
//! 4. Write the class tables.
//! 5. Write the cells of new endpoints, then replace the filters on both hooks.
//! 6. Bump the generations of the endpoints whose verdicts may have changed: from now on established flows are judged
//!    anew, once each.
//!
//! What has been [learnt] of names is carried out by itself after that: in the same steps, but 4 comes after 5, and 6 is left out.
//! Where it finds no room, or some endpoint's programs do not know it, it is given up, and the programs before are put back. Names of
//! addresses that the rest of a change makes others, as those of a pod that comes, wait for that where programs on devices do not know
//! both together.
//!
//! What cannot be compiled in 1, or finds no room in the node's maps, closes the pods that it concerns and nobody else
//! ([`isolation`](crate::isolation)); [`Report::faults`] and [`EndpointStatus::faults`] name it until it is over.
//!
//! A failure in 1, 2 or 4 leaves everybody the verdicts before. One in 3 or 5 leaves them to the endpoint that it befell:
//! its old programs go on, with tables that are right for them. Either way it is reported per endpoint ([`Report`],
//! [`Enforcer::endpoints`]) and tried again, until it succeeds or a new change makes it moot.
//!
//! # What outlives the owner
//! Filters and their programs, and in a bpffs the default programs and the maps that mean the same to every owner:
//! endpoint cells, conntrack, counters, events. Class tables are an owner's own, because class numbers are its compiler's:
//! the next owner fills new ones, and the old live as long as a program refers to them. So whatever happens between two
//! owners, every packet is judged by one complete state.

mod apply;
mod cells;
pub mod client;
mod clock;
mod config;
pub mod flows;
mod guard;
mod inside;
pub mod learnt;
mod lowering;
mod node;
pub mod protocol;
mod server;
mod slots;
mod state;
mod sweep;
mod tables;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use dcenet_core::journal::Record;
use dcenet_core::link::Policy as LinkPolicy;
use dcenet_core::model::{AttachmentKey, Workload};
use dcenet_core::netns::{Host, NetNsError};
use dcenet_core::provider::{Endpoint, Enforcement};
use dcenet_ebpf::attach::{AttachError, Attacher};
use dcenet_ebpf::datapath::classes::ClassError;
use dcenet_ebpf::insn::IsaLevel;
use dcenet_ebpf::loader::{LoadError, Loader};
use dcenet_ebpf::pin::{PinError, Pins};
use dcenet_ebpf::probe::{Features, Missing, ProbeError};

pub use self::client::{ClientError, PinnedDefault};
pub use self::clock::Clock;
pub use self::config::{Ahead, AheadError, DefaultVerdict, Limit, LimitError, PolicyConfig, Require};
pub use self::learnt::{LearnError, Learner};
pub use self::lowering::{LoweredObject, Lowering, LoweringError};
use self::server::{OwnerLock, Server};
use self::state::Shared;
pub use self::sweep::Sweep;
use crate::compiler::CompileError;
use crate::eval::EvalError;
use crate::explain::{Explanation, explain_without};
use crate::isolation::{Fault, refused};
use crate::model::{Catalog, Labels, Pod, PodId, Policy, Tuple};
use crate::sources::kubernetes::Documents;

/// What an owner is told about its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnforcerConfig {
    /// The node's name in the cluster.
    pub node: String,
    /// The node's own addresses, of all its interfaces: traffic between them and its pods is allowed.
    pub node_addresses: BTreeSet<IpAddr>,
    /// The directory of the socket, such as `/run/dcenet`.
    pub run_dir: PathBuf,
    /// The bpffs of maps and default programs; the clients' `pins`.
    pub pins: PathBuf,
}

/// What an owner works with. Each part can be replaced.
#[derive(Clone)]
pub struct Tools {
    /// Loads objects.
    pub loader: Arc<dyn Loader>,
    /// Puts programs on devices.
    pub attacher: Arc<dyn Attacher>,
    /// Makes objects of policies.
    pub lowering: Arc<dyn Lowering>,
}

impl fmt::Debug for Tools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tools").finish_non_exhaustive()
    }
}

/// Where an endpoint stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// The pinned default holds. Entered when the endpoint is attached.
    Default,
    /// Its programs are loaded and not on both hooks yet. Entered from `Default`, for a moment or until a retry succeeds.
    Compiled,
    /// Its own verdicts are in force; those before the latest change where [`EndpointStatus::failure`] says so, and
    /// closed as far as [`EndpointStatus::faults`] does. Who awaits it is not told before nothing is closed.
    Enforced,
}

/// An endpoint, as the owner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointStatus {
    /// Its attachment.
    pub attachment: AttachmentKey,
    /// Its workload, where known.
    pub workload: Option<Workload>,
    /// Its slot, once it has one.
    pub slot: Option<u16>,
    /// Where it stands.
    pub phase: Phase,
    /// The larger of its two generations.
    pub generation: u32,
    /// Whether its verdicts are its own, and take account of what its attachment says now.
    pub is_current: bool,
    /// What its policy holds against the pod itself, once it is enforced.
    pub enforcement: Enforcement,
    /// Why the latest change is not in force for it.
    pub failure: Option<String>,
    /// What of its policies is closed instead of enforced as written, or in audit and not told of, and which of its
    /// addresses others claim, too.
    pub faults: Vec<Fault>,
}

/// What came of a change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Endpoints whose verdicts are those of the latest change.
    pub enforced: usize,
    /// Endpoints for which it is not in force, and why. The owner goes on trying.
    pub failures: Vec<(AttachmentKey, String)>,
    /// What is closed instead of enforced as written, or in audit and not told of, on the whole node. Another change can
    /// help it.
    pub faults: Vec<Fault>,
    /// Why addresses of names are allowed by although their time is over, where some are. The owner goes on trying. An answer
    /// that is given up is told to whoever tells of it ([`Learner::learn`]), and is no matter of this.
    pub names: Option<String>,
}

impl Report {
    /// Whether the change is in force everywhere, as written, all that is in audit is told of, and no name counts beyond its time.
    pub fn is_complete(&self) -> bool {
        self.failures.is_empty() && self.faults.is_empty() && self.names.is_none()
    }
}

/// The owner of a node's policy state.
///
/// Methods can be called from any thread; a change is in force when the method returns, except for what its [`Report`]
/// lists. Dropping it leaves the last verdicts in force.
#[derive(Debug)]
pub struct Enforcer {
    features: Features,
    shared: Arc<Shared>,
    /// Held until the end.
    lock: Option<OwnerLock>,
    server: Option<Server>,
    worker: Option<std::thread::JoinHandle<()>>,
}

impl Enforcer {
    /// Becomes the owner of the host's policy state: opens the pins, makes maps and default programs where they are
    /// missing, adopts what is attached and listens on the socket. Verdicts change only from [`Enforcer::start`] on.
    ///
    /// # Errors
    /// [`EnforcerError::AnotherOwner`] while one lives; [`EnforcerError::OtherLayout`] after an incompatible release;
    /// [`EnforcerError::Kernel`] where it lacks what the lowering's programs need; whatever the kernel refuses.
    ///
    /// # Minimum kernel version
    /// 5.11 (the coarse clock), and that of the lowering's level of the instruction set ([`Lowering::isa`]).
    pub fn open(host: Host, config: EnforcerConfig, tools: Tools) -> Result<Self, EnforcerError> {
        let features = Features::probe()?;
        suffices(&features, tools.lowering.isa())?;
        let lock = OwnerLock::take(&config.run_dir)?;
        let run_dir = config.run_dir.clone();
        let shared = Arc::new(Shared::open(host, config, tools)?);
        let worker = Shared::work_in_background(&shared)?;
        let server = match Server::start(&run_dir, Arc::clone(&shared) as _) {
            Ok(server) => server,
            Err(error) => {
                shared.stop();
                return Err(error);
            }
        };
        Ok(Self { features, shared, lock: Some(lock), server: Some(server), worker: Some(worker) })
    }

    /// What the kernel can do, as asked when the owner was opened.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The level of the instruction set of the programs.
    pub fn isa(&self) -> IsaLevel {
        self.shared.tools.lowering.isa()
    }

    /// Says that the sources have told what they know: from now on every change is carried out. Until then policies,
    /// pods and endpoints are only noted, so that a restarted owner replaces no verdict by one of half the knowledge.
    pub fn start(&self) -> Result<Report, EnforcerError> {
        self.shared.change(|state| state.started = true)
    }

    /// Takes over the endpoints of an engine's records: those that were attached while no owner ran, with their
    /// workloads and labels. Endpoints that are known already keep what was told of them last.
    pub fn adopt(&self, records: &[Record]) -> Result<Report, EnforcerError> {
        let endpoints: Vec<Endpoint> = records.iter().filter_map(endpoint_of).collect();
        self.shared.change(|state| {
            for endpoint in &endpoints {
                state.note(endpoint, None);
            }
        })
    }

    /// Replaces all policies.
    pub fn set_policies(&self, policies: impl IntoIterator<Item = Policy>) -> Result<Report, EnforcerError> {
        let policies = policies.into_iter().map(|policy| (policy.id.clone(), policy)).collect();
        self.shared.change(|state| state.cluster_mut().policies = policies)
    }

    /// Replaces what policies name beside pods.
    ///
    /// # Errors
    /// As [`Enforcer::set_policies`].
    pub fn set_catalog(&self, catalog: Catalog) -> Result<Report, EnforcerError> {
        self.shared.change(|state| state.cluster_mut().catalog = catalog)
    }

    /// Adds a namespace, or replaces its labels.
    pub fn set_namespace(&self, name: &str, labels: &Labels) -> Result<Report, EnforcerError> {
        let labels = labels.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        self.shared.change(|state| state.cluster_mut().insert_namespace(name, labels))
    }

    /// Removes a namespace's labels; one that is not known still has its name.
    pub fn remove_namespace(&self, name: &str) -> Result<Report, EnforcerError> {
        self.shared.change(|state| drop(state.cluster_mut().namespaces.remove(name)))
    }

    /// Sets the addresses of a node; none forgets it.
    pub fn set_node(&self, name: &str, addresses: BTreeSet<IpAddr>) -> Result<Report, EnforcerError> {
        self.shared.change(|state| {
            let nodes = &mut state.cluster_mut().nodes;
            if addresses.is_empty() {
                nodes.remove(name);
            } else {
                nodes.insert(name.to_owned(), addresses);
            }
        })
    }

    /// Adds or replaces a pod, of this node or elsewhere. Of a pod with an endpoint here, the labels and ports told in
    /// this way count, and its endpoint's addresses are added.
    pub fn upsert_pod(&self, id: PodId, pod: Pod) -> Result<Report, EnforcerError> {
        self.upsert_pods([(id, pod)])
    }

    /// As [`Enforcer::upsert_pod`], many in one change.
    pub fn upsert_pods(&self, pods: impl IntoIterator<Item = (PodId, Pod)>) -> Result<Report, EnforcerError> {
        self.shared.change(|state| pods.into_iter().for_each(|(id, pod)| state.set_pod(id, Some(pod))))
    }

    /// Forgets a pod; one with an endpoint here is still known by that.
    pub fn remove_pod(&self, id: &PodId) -> Result<Report, EnforcerError> {
        self.shared.change(|state| state.set_pod(id.clone(), None))
    }

    /// Puts what documents say in the place of what earlier ones said, in one change: namespaces, pods, nodes, policies
    /// and what these name. What else was told of other namespaces, pods and nodes stays; of policies nothing else does. Whoever told last of one
    /// counts: a pod of these documents that [`Enforcer::upsert_pod`] told of, too, is forgotten when they leave it out. A
    /// source that has read its documents anew hands over those that it told before, or empty ones.
    ///
    /// # Errors
    /// As [`Enforcer::set_policies`]; the documents count as told all the same, and are tried again.
    pub fn replace_documents(&self, before: &Documents, now: &Documents) -> Result<Report, EnforcerError> {
        self.shared.change(|state| {
            let known = |id: &PodId| now.pods.contains_key(id) || now.awaited.contains_key(id);
            for id in before.pods.keys().chain(before.awaited.keys()).filter(|id| !known(id)) {
                state.set_pod(id.clone(), None);
            }
            for (id, pod) in now.pods.iter().chain(&now.awaited) {
                if !state.has_pod(id, pod) {
                    state.set_pod(id.clone(), Some(pod.clone()));
                }
            }
            let cluster = state.cluster_mut();
            for name in before.namespaces.keys().filter(|name| !now.namespaces.contains_key(*name)) {
                cluster.namespaces.remove(name);
            }
            for (name, labels) in &now.namespaces {
                cluster.insert_namespace(name, labels.iter().map(|(key, value)| (key.as_str(), value.as_str())));
            }
            cluster.nodes.retain(|name, _| !before.nodes.contains_key(name));
            cluster.nodes.extend(now.nodes.clone());
            cluster.policies = now.policies.clone();
            cluster.catalog = now.catalog.clone();
        })
    }

    /// Goes by another clock than the host's, for tests and rehearsals. It is asked which schedules hold
    /// ([`Catalog::schedules`]) and until when what is [learnt] counts, and for nothing else.
    ///
    /// # Errors
    /// As [`Enforcer::set_policies`]; the clock counts all the same.
    pub fn set_clock(&self, clock: Clock) -> Result<Report, EnforcerError> {
        *self.shared.clock.lock() = clock;
        let report = self.shared.apply();
        self.shared.look_again();
        report
    }

    /// Tries at once what failed, instead of waiting for the next attempt.
    pub fn retry(&self) -> Result<Report, EnforcerError> {
        self.shared.apply()
    }

    /// Removes the flows that are over, which the owner does by itself every ten seconds. Programs pass over them, but they
    /// take room; they are told of ([`flows::FlowKind::Ended`]), and those that live where a report is due
    /// ([`flows::FlowReader::report_every`]).
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn sweep(&self) -> Result<Sweep, EnforcerError> {
        sweep::sweep(&self.shared)
    }

    /// All endpoints of this node.
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        self.shared.statuses()
    }

    /// Makes the owner's compiler wrong in one way, to prove that a test notices.
    #[cfg(feature = "test-support")]
    pub fn plant_bug(&self, bug: crate::test_support::PlantedBug) {
        self.shared.plant_bug(bug);
    }

    /// Why a packet of a pod is allowed or denied by what the owner was told, with what the latest change has closed
    /// taken into account. An endpoint for which that change is not in force ([`EndpointStatus::failure`]) is under
    /// earlier verdicts.
    ///
    /// # Errors
    /// [`EvalError::UnknownPod`] if the owner knows no such pod.
    pub fn explain(&self, subject: &PodId, tuple: &Tuple) -> Result<Explanation, EvalError> {
        let now = self.shared.time();
        let (cluster, faults) = {
            let state = self.shared.state.lock();
            (state.cluster(), state.faults.clone())
        };
        let mut explanation = explain_without(&cluster, &refused(&faults), subject, tuple)?;
        let state = self.shared.state.lock();
        for learnt in &mut explanation.peer_names {
            // An answer that says the same again is no change.
            let known = state.learnt.names().addresses(&learnt.name).and_then(|known| known.get(&tuple.peer));
            learnt.until = known.copied().unwrap_or(learnt.until);
            learnt.remaining = Some(learnt.until.saturating_sub(now).max(0));
        }
        Ok(explanation)
    }

    /// What the latest change has closed, or does not tell of; also in each [`Report`].
    pub fn faults(&self) -> Vec<Fault> {
        self.shared.state.lock().faults.clone()
    }

    /// The reader of flow events. One at a time: two readers take each other's events.
    ///
    /// # Errors
    /// Where the ring cannot be mapped.
    pub fn flows(&self) -> Result<flows::FlowReader, EnforcerError> {
        flows::FlowReader::new(&self.shared)
    }

    /// Packets and bytes of the new flows that each rule decided on since the maps were made, by the rule's name.
    pub fn rule_counters(&self) -> Result<Vec<flows::RuleCounter>, EnforcerError> {
        flows::rule_counters(&self.shared)
    }

    /// Packets and bytes by the reason for their verdict, since the maps were made.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn reason_counters(&self) -> Result<Vec<flows::ReasonCounter>, EnforcerError> {
        flows::reason_counters(&self.shared)
    }

    /// Removes everything from the host: filters, pins with their maps and programs, the mount, socket and lock.
    /// Afterwards the pods' traffic is subject to no policy of ours.
    ///
    /// # Errors
    /// The first of all errors; what can be removed is. The enforcer is stopped in any case.
    pub fn uninstall(mut self) -> Result<(), EnforcerError> {
        self.halt();
        let cleared = self.shared.clear();
        // The lock goes last: until here nobody else can begin.
        let unlocked = self.lock.take().map_or(Ok(()), OwnerLock::remove);
        cleared.and(unlocked)
    }

    fn halt(&mut self) {
        self.shared.stop();
        self.server.take();
        if let Some(thread) = self.worker.take()
            && thread.join().is_err()
        {
            tracing::error!("the policy owner's thread panicked");
        }
        self.shared.note_names();
    }
}

impl Drop for Enforcer {
    fn drop(&mut self) {
        self.halt();
    }
}

fn suffices(features: &Features, isa: IsaLevel) -> Result<(), EnforcerError> {
    let missing = features.missing_for_datapath(isa);
    if missing.is_empty() { Ok(()) } else { Err(EnforcerError::Kernel { missing }) }
}

fn endpoint_of(record: &Record) -> Option<Endpoint> {
    if record.policy == LinkPolicy::Wanted { record.endpoint() } else { None }
}

/// Why the owner cannot do its part.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnforcerError {
    /// Another process owns the policy state of this run directory.
    #[error("another policy owner holds {}; stop it first", path.display())]
    AnotherOwner {
        /// The lock.
        path: PathBuf,
    },
    /// A pinned map is not what this release uses.
    #[error(
        "pinned map {map}: {what} is {found}, and this release uses {wanted}; uninstall with the release that made it, \
         or restart the host"
    )]
    OtherLayout {
        /// The map.
        map: String,
        /// What differs.
        what: &'static str,
        /// What it is.
        found: u32,
        /// What it should be.
        wanted: u32,
    },
    /// The kernel could not be asked what it can do.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The kernel lacks what the programs need.
    #[error("the kernel lacks {}; use a newer one, or programs that do without", names(missing))]
    Kernel {
        /// What it lacks.
        missing: Vec<Missing>,
    },
    /// The cluster cannot be compiled; the last verdicts stand.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// No object could be made.
    #[error("lowering policy to programs: {0}")]
    Lowering(#[source] LoweringError),
    /// A program could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A map could not be made, read or written.
    #[error("map {name}: {source}")]
    Map {
        /// The map.
        name: String,
        /// What failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no room for what the policies need.
    #[error("{what}: {found} needed, and there is room for {room}; use larger maps or fewer distinct peers")]
    Full {
        /// What there is too much of.
        what: &'static str,
        /// How much is needed.
        found: usize,
        /// How much fits.
        room: usize,
    },
    /// The class tables do not take the policies' peers.
    #[error(transparent)]
    Tables(#[from] ClassError),
    /// There is no room for addresses that were learnt of names; they are forgotten, and everything else stands.
    #[error("no room for addresses of names: {reason}")]
    NoRoomForNames {
        /// What would have been closed.
        reason: String,
    },
    /// A program that would judge addresses that were learnt is not in force, so that they are given up: to the program before they
    /// might be nobody's, whom rules by prefixes do not deny.
    #[error("what is learnt of names waits for a program: {reason}")]
    NamesNotInForce {
        /// Whose, and why.
        reason: String,
    },
    /// A device could not be reached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// An endpoint wants a guard on its parent, and there can be none.
    #[error("{reason}")]
    Unguarded {
        /// Why not.
        reason: String,
    },
    /// The pins could not be used.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The host's namespace could not be entered.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    /// A file in the run directory could not be used.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: std::io::Error,
    },
}

fn names(missing: &[Missing]) -> String {
    missing.iter().map(Missing::to_string).collect::<Vec<_>>().join("; ")
}

impl EnforcerError {
    pub(crate) fn map(name: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Map { name: name.to_owned(), source: source.into() }
    }
}

/// Opens the pins of a configuration.
pub(crate) fn open_pins(config: &EnforcerConfig) -> Result<Pins, PinError> {
    Pins::open(&config.pins)
}

#[cfg(test)]
mod tests {
    use dcenet_core::test_support::{Rung, require};
    use dcenet_ebpf::abi::Sizes;

    use super::*;
    use crate::target::Tc;

    #[test]
    fn programs_are_written_at_the_level_that_the_kernel_has_and_more_is_refused_by_name() {
        if !require(Rung::Kernel) {
            return;
        }
        let mut features = Features::probe().expect("probing as root");
        assert_eq!(Tc::for_kernel(Sizes::small(), &features).isa, features.isa());
        suffices(&features, features.isa()).expect("this kernel suffices");
        features.isa_v4 = false;
        assert_eq!(Tc::for_kernel(Sizes::small(), &features).isa, IsaLevel::V3);
        suffices(&features, IsaLevel::V3).expect("it does without");
        let error = suffices(&features, IsaLevel::V4).expect_err("no long jumps").to_string();
        assert!(error.contains("instruction set v4") && error.contains("Linux 6.6"), "{error}");
        assert!(!error.contains("ring buffers"), "{error}");
    }
}
