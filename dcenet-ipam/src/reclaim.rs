//! Taking back what nobody gave back: containers whose DEL never came, nodes that died, workloads that are gone.
//!
//! No evidence means alive. What is taken back must be absent from two complete snapshots of what is alive, each begun
//! after the binding was made, and must not have changed since:
//!
//! ```no_run
//! # async fn example(ipam: &dcenet_ipam::Ipam, runtime: &dyn Fn() -> std::collections::BTreeSet<dcenet_core::model::AttachmentKey>)
//! # -> Result<(), Box<dyn std::error::Error>> {
//! use dcenet_ipam::reclaim::{Alive, Policy, Reclaimer, Scope, Snapshot};
//!
//! let mut reclaimer = Reclaimer::new(ipam, Policy::default());
//! loop {
//!     let begun = Snapshot::begin(ipam).await?;
//!     let containers = runtime(); // all of them, or this round is left out
//!     reclaimer.observe(&begun.complete(Scope::default(), Alive::Attachments(containers))).await?;
//!     std::thread::sleep(std::time::Duration::from_secs(10));
//! }
//! # }
//! ```
//!
//! The first observation is kept in memory by the [`Reclaimer`]: a process that is started again observes twice again,
//! which can only delay. The release itself presents the sequence that was observed, in the same commit, so a binding
//! that was made anew meanwhile, by the same name or not, stays; and so a late DEL of a node that returns frees nothing
//! that is somebody else's by then.
//!
//! # Dead nodes
//! A node's heartbeat ([`Ipam::heartbeat`]) is a hint for people and orchestrators. It frees nothing: a node that cannot
//! reach the store may well run its containers. What was bound on a dead node comes back when the orchestrator's snapshot
//! does not name it any more, or by an operator's order, [`Ipam::drop_node`]. Whoever fences nodes by other means may
//! choose [`Policy::silence`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use dcenet_core::model::{AttachmentKey, NetworkName, Workload};
use dcenet_core::provider::LeaseError;

use crate::ipam::{Ipam, decode, store_error};
use crate::machine::{Command, Reply};
use crate::model::{AddressSpace, ClaimKey, KeepPolicy, NodeName};
use crate::record::{AttachmentRecord, NodeRecord, attachment_of, fabric_key, network_prefix, node_key};
use crate::store::{Batch, Outcome, Write};

/// Which bindings a snapshot speaks of. The default is all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// Only those of a network.
    pub network: Option<NetworkName>,
    /// Only those that are known to be on a node.
    pub node: Option<NodeName>,
}

/// What is alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Alive {
    /// Attachments, as a container runtime knows them.
    Attachments(BTreeSet<AttachmentKey>),
    /// Workloads, as an orchestrator knows them, each with the node that it is on, where known. Of a binding without a
    /// workload it says nothing. A pod of the same name on another node is another; of one on the same node, its runtime
    /// knows which container is alive.
    Workloads(BTreeSet<(Workload, Option<NodeName>)>),
}

/// What somebody has seen to be alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    id: u128,
    revision: u64,
    complete: bool,
    scope: Scope,
    alive: Alive,
}

/// A snapshot that is being collected.
#[derive(Debug)]
#[must_use = "a snapshot is complete only when somebody says so"]
pub struct Collecting {
    id: u128,
    revision: u64,
}

impl Snapshot {
    /// Fences a snapshot: it will speak only of bindings made up to now. Call it before looking for what is alive.
    pub async fn begin(ipam: &Ipam) -> Result<Collecting, LeaseError> {
        Ok(Collecting { id: ipam.request_id(), revision: ipam.revision().await? })
    }

    /// The newest revision that it speaks of.
    pub fn revision(&self) -> u64 {
        self.revision
    }
}

impl Collecting {
    /// Everything in the scope that is alive is named.
    pub fn complete(self, scope: Scope, alive: Alive) -> Snapshot {
        Snapshot { id: self.id, revision: self.revision, complete: true, scope, alive }
    }

    /// Something may be missing: a page that did not come, a runtime that still starts, a cache that has not caught up.
    /// It is refused by [`Reclaimer::observe`], and there so that callers need not decide.
    pub fn partial(self, scope: Scope, alive: Alive) -> Snapshot {
        Snapshot { id: self.id, revision: self.revision, complete: false, scope, alive }
    }
}

/// When a [`Reclaimer`] acts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// How long something must have been absent at least, by the clock of this process. It can only delay. 0 unless told.
    pub grace: Duration,
    /// The most attachments that one observation may release; more are refused altogether, for so much at once rather
    /// means that the evidence is wrong. `None` for any number.
    pub most: Option<usize>,
    /// Takes the bindings of a node back whose heartbeat was not heard for this time by the clock of this process, in two
    /// looks ([`Reclaimer::silent_nodes`]). `None`, the default: never, for a silent node may run its containers.
    pub silence: Option<Duration>,
}

/// Why an observation was refused. Nothing was released.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReclaimError {
    /// Something alive may be missing from it.
    #[error("the snapshot is partial, so what it does not name may be alive; collect a complete one")]
    Partial,
    /// It is older than one that was observed.
    #[error("the snapshot of revision {revision} is older than one of {last} that was observed; collect a new one")]
    Old {
        /// Its revision.
        revision: u64,
        /// The newest observed.
        last: u64,
    },
    /// It was fenced by another store, or the store was put back to an older state.
    #[error("the snapshot is of revision {revision}, and the store has come to {newest} only: it is of another store")]
    Foreign {
        /// Its revision.
        revision: u64,
        /// The store's.
        newest: u64,
    },
    /// More is absent than [`Policy::most`].
    #[error(
        "{absent} attachments are absent, more than the {most} that may be released at once; look whether the \
             evidence is right, and raise the limit if it is"
    )]
    TooMany {
        /// How many.
        absent: usize,
        /// The limit.
        most: usize,
    },
    /// The store failed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

/// What an observation did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// What was released, with the sequences.
    pub released: Vec<(AttachmentKey, u64)>,
    /// Claims that ended because their workload is gone.
    pub ended: Vec<ClaimKey>,
    /// How much is absent and waits for another observation.
    pub suspected: usize,
}

/// When something was first absent.
#[derive(Debug, Clone, Copy)]
struct First {
    snapshot: u128,
    at: u64,
}

/// Compares snapshots of what is alive with what is bound.
#[derive(Debug)]
pub struct Reclaimer<'a> {
    ipam: &'a Ipam,
    policy: Policy,
    newest: u64,
    attachments: BTreeMap<(AttachmentKey, u64), First>,
    claims: BTreeMap<(AddressSpace, ClaimKey), First>,
    /// Nodes with the version of their record and when it was first seen.
    nodes: BTreeMap<NodeName, (u64, u64)>,
}

/// A binding as the reclaimer sees it.
struct Seen {
    attachment: AttachmentKey,
    record: AttachmentRecord,
    sequence: u64,
}

impl<'a> Reclaimer<'a> {
    /// It has observed nothing yet.
    pub fn new(ipam: &'a Ipam, policy: Policy) -> Self {
        let (attachments, claims, nodes) = Default::default();
        Self { ipam, policy, newest: 0, attachments, claims, nodes }
    }

    /// Releases what this snapshot does not name, nor did an earlier one; and, if it names workloads of every node and
    /// network, ends the claims that last while their workload exists.
    ///
    /// # Errors
    /// The snapshot is no evidence, and nothing was released. After [`ReclaimError::Lease`] some may be.
    pub async fn observe(&mut self, snapshot: &Snapshot) -> Result<Reclaimed, ReclaimError> {
        let &Snapshot { id, revision, complete, ref scope, ref alive } = snapshot;
        if !complete {
            return Err(ReclaimError::Partial);
        }
        if revision < self.newest {
            return Err(ReclaimError::Old { revision, last: self.newest });
        }
        let newest = self.ipam.revision().await?;
        if revision > newest {
            return Err(ReclaimError::Foreign { revision, newest });
        }
        let now = self.ipam.now();
        let mut suspects: BTreeMap<(AttachmentKey, u64), First> = BTreeMap::new();
        let mut due = Vec::new();
        for Seen { attachment, record, sequence } in self.seen(scope.network.as_ref()).await? {
            // No container is behind it.
            if crate::fabric::is_inside(&attachment, record.node.as_ref()) {
                continue;
            }
            let key = (attachment, sequence);
            let first = self.attachments.get(&key).copied();
            if !scope.speaks_of(&record) {
                // Other evidence counts on.
                suspects.extend(first.map(|first| (key, first)));
                continue;
            }
            // Made after the snapshot was begun: it can say nothing of it.
            if sequence > revision || alive.names(&key.0, &record) {
                continue;
            }
            let first = first.unwrap_or(First { snapshot: id, at: now });
            if first.snapshot != id && self.has_waited(first.at, now) {
                due.push(key.clone());
            }
            suspects.insert(key, first);
        }
        if let Some(most) = self.policy.most
            && due.len() > most
        {
            return Err(ReclaimError::TooMany { absent: due.len(), most });
        }
        // What is of another network was not looked at.
        let unseen = |key: &(AttachmentKey, u64)| scope.network.as_ref().is_some_and(|n| *n != key.0.network);
        self.attachments.retain(|key, _| unseen(key));
        self.attachments.extend(suspects);
        self.newest = revision;
        let mut reclaimed = Reclaimed::default();
        for key in due {
            if self.ipam.release_sequence(&key.0, key.1).await? {
                reclaimed.released.push(key.clone());
            }
            self.attachments.remove(&key);
        }
        if let Alive::Workloads(workloads) = alive
            && *scope == Scope::default()
        {
            reclaimed.ended = self.end_claims(id, revision, workloads, now).await?;
        }
        reclaimed.suspected = self.attachments.len() + self.claims.len();
        Ok(reclaimed)
    }

    async fn end_claims(
        &mut self,
        id: u128,
        revision: u64,
        workloads: &BTreeSet<(Workload, Option<NodeName>)>,
        now: u64,
    ) -> Result<Vec<ClaimKey>, LeaseError> {
        let mut suspects = BTreeMap::new();
        let mut ended = Vec::new();
        for recorded in self.ipam.claims().await? {
            let key = (recorded.space, recorded.claim.key);
            let workload = &key.1.workload;
            // The places of a set are of all replicas.
            if recorded.claim.keep != KeepPolicy::Workload
                || key.1.place.is_some()
                || places(workloads, workload).next().is_some()
            {
                continue;
            }
            let first = self.claims.get(&key).copied().unwrap_or(First { snapshot: id, at: now });
            if first.snapshot != id && self.has_waited(first.at, now) {
                if self.ipam.claim_gone(&key.0, &key.1, Some(revision)).await? {
                    ended.push(key.1);
                }
            } else {
                suspects.insert(key, first);
            }
        }
        self.claims = suspects;
        ended.dedup();
        Ok(ended)
    }

    /// Looks at the nodes' heartbeats. Returns those that were silent for longer than [`Policy::silence`] at this look
    /// and one before, after releasing what is bound on them, each under the guard of the node's record: a heartbeat that
    /// comes meanwhile stops it. Without that policy it releases nothing and returns none.
    pub async fn silent_nodes(&mut self) -> Result<Vec<(NodeName, Reclaimed)>, LeaseError> {
        let Some(silence) = self.policy.silence else { return Ok(Vec::new()) };
        let now = self.ipam.now();
        let mut nodes = BTreeMap::new();
        let mut silent = Vec::new();
        for state in self.ipam.nodes().await? {
            let since = match self.nodes.get(&state.node) {
                Some((version, since)) if *version == state.version => {
                    if u128::from(now.saturating_sub(*since)) >= silence.as_millis() {
                        silent.push((state.node.clone(), state.version));
                    }
                    *since
                }
                _ => now,
            };
            nodes.insert(state.node, (state.version, since));
        }
        self.nodes = nodes;
        let mut all = Vec::new();
        for (node, version) in silent {
            let mut reclaimed = Reclaimed::default();
            for Seen { attachment, record, sequence } in self.seen(None).await? {
                if record.node.as_ref() != Some(&node) {
                    continue;
                }
                let command = Command::ReleaseOfNode {
                    attachment: attachment.clone(),
                    sequence,
                    node: node.clone(),
                    version: Some(version),
                };
                if self.ipam.run(&command).await? == Reply::Done {
                    reclaimed.released.push((attachment, sequence));
                }
            }
            all.push((node, reclaimed));
        }
        Ok(all)
    }

    fn has_waited(&self, since: u64, now: u64) -> bool {
        u128::from(now.saturating_sub(since)) >= self.policy.grace.as_millis()
    }

    async fn seen(&self, network: Option<&NetworkName>) -> Result<Vec<Seen>, LeaseError> {
        self.ipam.seen(network).await
    }
}

impl Scope {
    fn speaks_of(&self, record: &AttachmentRecord) -> bool {
        self.node.is_none() || self.node == record.node
    }
}

impl Alive {
    /// Whether it is evidence of life. What it cannot speak of is alive.
    fn names(&self, attachment: &AttachmentKey, record: &AttachmentRecord) -> bool {
        match (self, &record.workload) {
            (Self::Attachments(alive), _) => alive.contains(attachment),
            (Self::Workloads(_), None) => true,
            (Self::Workloads(alive), Some(workload)) => {
                places(alive, workload).any(|node| node.is_none() || record.node.is_none() || *node == record.node)
            }
        }
    }
}

/// Where a workload is alive.
fn places<'a>(
    alive: &'a BTreeSet<(Workload, Option<NodeName>)>,
    workload: &'a Workload,
) -> impl Iterator<Item = &'a Option<NodeName>> {
    let named = alive.range((workload.clone(), None)..).take_while(move |(name, _)| name == workload);
    named.map(|(_, node)| node)
}

/// A node's last sign of life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeState {
    /// The node.
    pub node: NodeName,
    /// What it called its boot or start.
    pub epoch: u64,
    /// When, by its own clock, in milliseconds since 1970.
    pub beat: u64,
    /// The revision of the record: it grows with every heartbeat, whatever clocks say.
    pub version: u64,
}

impl Ipam {
    /// Tells that a node is alive. `epoch` is whatever differs between its boots. Each costs one commit.
    pub async fn heartbeat(&self, node: &NodeName, epoch: u64) -> Result<(), LeaseError> {
        let record = NodeRecord { beat: self.now(), epoch };
        let value = serde_json::to_vec(&record).map_err(|e| LeaseError::Store(Box::new(e)))?;
        self.write(Write::Put(node_key(node), value)).await
    }

    /// The nodes that told of themselves.
    pub async fn nodes(&self) -> Result<Vec<NodeState>, LeaseError> {
        let mut nodes = Vec::new();
        for (key, entry) in self.scan_all(b"n/").await? {
            let NodeRecord { beat, epoch } = decode(&key, &entry)?;
            let text = std::str::from_utf8(&key[2..]).unwrap_or_default();
            let node = text.parse().map_err(|e| LeaseError::Damaged(Box::new(e)))?;
            nodes.push(NodeState { node, epoch, beat, version: entry.version });
        }
        Ok(nodes)
    }

    /// Releases everything that was bound on a node up to the revision, and forgets the node and how it is reached, by order
    /// of somebody who knows that it is dead or fenced. Take [`Ipam::revision`] when that is known: what the node binds after
    /// its return stays. Returns what was released.
    pub async fn drop_node(&self, node: &NodeName, fence: u64) -> Result<Vec<(AttachmentKey, u64)>, LeaseError> {
        let mut released = Vec::new();
        for Seen { attachment, record, sequence } in self.seen(None).await? {
            if record.node.as_ref() == Some(node)
                && sequence <= fence
                && self.release_sequence(&attachment, sequence).await?
            {
                released.push((attachment, sequence));
            }
        }
        self.write(Write::Delete(node_key(node))).await?;
        self.write(Write::Delete(fabric_key(node.as_str()))).await?;
        Ok(released)
    }

    async fn seen(&self, network: Option<&NetworkName>) -> Result<Vec<Seen>, LeaseError> {
        let mut all = Vec::new();
        for (key, entry) in self.scan_all(&network_prefix(network)).await? {
            let Some(attachment) = attachment_of(&key) else { continue };
            let record: AttachmentRecord = decode(&key, &entry)?;
            let sequence = record.sequence(entry.version);
            all.push(Seen { attachment, record, sequence });
        }
        Ok(all)
    }

    pub(crate) async fn write(&self, write: Write) -> Result<(), LeaseError> {
        let batch = Batch { guards: Vec::new(), writes: vec![write], request_id: self.request_id() };
        match self.store().commit(&batch).await.map_err(store_error)? {
            Outcome::Committed { .. } => Ok(()),
            Outcome::Conflict(_) => Err(LeaseError::Busy("a batch without guards was refused".to_owned())),
            Outcome::Unknown { reason } => Err(LeaseError::Store(reason.into())),
        }
    }
}
