//! Looking whether the records of a store fit together, and mending those that do not.
//!
//! Each commit of the allocator changes all records that belong together, so no crash and no race leaves any of what is
//! listed here: it comes from other hands, from a store that was put back in part, or from a bug. [`Ipam::check`] reads
//! everything and tells; [`Ipam::repair`] mends what it is given, each finding under the guard of every record that the
//! finding rests on.
//!
//! ```no_run
//! # async fn example(ipam: &dcenet_ipam::Ipam) -> Result<(), dcenet_core::provider::LeaseError> {
//! let audit = ipam.check().await?;
//! for finding in &audit.findings {
//!     println!("{finding}");
//! }
//! for outcome in ipam.repair(&audit.findings).await? {
//!     println!("{outcome:?}");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What repair may do
//! It never frees an address that an attachment holds: where two records disagree whether somebody has an address, it is
//! somebody's afterwards. Of two attachments that claim one address, that in the address's own record has it, as for the
//! allocator. What only people can decide has no remedy.
//!
//! Where no configuration is at hand, [`Ipam::without_pools`] looks at a store too. The example `check` of this crate is a
//! tool for operators.
//!
//! One call of repair mends a record once; where several findings rest on one record, check and repair again.

mod find;
mod rebuild;
mod snapshot;

use std::fmt;
use std::net::IpAddr;

use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::LeaseError;
use ipnet::IpNet;

use self::find::Finder;
use self::snapshot::Snapshot;
use crate::ipam::{Ipam, store_error};
use crate::model::{AddressSpace, ClaimKey};
use crate::store::{Batch, Entry, Guard, Key, Outcome, Write};

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audit {
    /// What does not fit, in the order of keys; empty for a sound store.
    pub findings: Vec<Finding>,
    /// Records that were looked at.
    pub records: usize,
    /// The newest revision that is looked at.
    pub revision: u64,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Nothing is wrong yet, or nothing but what people are shown.
    Hint,
    /// An address or a claim is lost to everybody.
    Leak,
    /// An address may be given to two.
    Danger,
}

/// Records that do not fit together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is.
    pub damage: Damage,
    /// The key of the record that is wrong, with bytes that are no letters escaped.
    pub key: String,
    /// What [`Ipam::repair`] would do; `None` where people must decide.
    pub remedy: Option<&'static str>,
    /// What the finding rests on.
    guards: Vec<Guard>,
    writes: Vec<Write>,
}

impl Finding {
    /// How bad it is.
    pub fn severity(&self) -> Severity {
        self.damage.severity()
    }

    /// Whether both rest on the same records, which have not changed in between. What would mend it is no part of that.
    fn stands(&self, before: &Self) -> bool {
        (&self.key, &self.damage, &self.guards) == (&before.key, &before.damage, &before.guards)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}: {}; ", self.severity(), self.key, self.damage)?;
        match self.remedy {
            Some(remedy) => write!(f, "repair {remedy}"),
            None => f.write_str("people must decide"),
        }
    }
}

/// What does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// The address's own record does not know of the attachment, so that anybody may get it.
    #[error("{attachment} holds {address} of space {space}, which counts as free")]
    AttachmentWithoutSlot {
        /// The attachment.
        attachment: AttachmentKey,
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
    },
    /// The address's own record gives it to somebody else.
    #[error("{attachment} holds {address} of space {space}, which is of {holder}")]
    AttachmentLostAddress {
        /// The attachment.
        attachment: AttachmentKey,
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// Whose it is.
        holder: String,
    },
    /// An attachment has two addresses of a pool, and a lease has one at most.
    #[error("{attachment} holds {first} and {second} of pool {pool}")]
    TwoOfPool {
        /// The attachment.
        attachment: AttachmentKey,
        /// The pool.
        pool: String,
        /// An address.
        first: IpAddr,
        /// Another.
        second: IpAddr,
    },
    /// No DEL can release the address, for the attachment's record does not name it.
    #[error("{address} of space {space} is of {attachment}, whose record does not name it")]
    SlotWithoutAttachment {
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// The attachment.
        attachment: AttachmentKey,
    },
    /// A claim that lasts has an address that counts as free.
    #[error("claim {claim} keeps {address} of space {space}, which counts as free")]
    ClaimWithoutSlot {
        /// The claim.
        claim: ClaimKey,
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
    },
    /// A claim that lasts has an address that is somebody else's.
    #[error("claim {claim} keeps {address} of space {space}, which is of {holder}")]
    ClaimLostAddress {
        /// The claim.
        claim: ClaimKey,
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// Whose it is.
        holder: String,
    },
    /// An address is kept for a claim that is not there, or has another address.
    #[error("{address} of space {space} is kept for claim {claim}, which does not have it")]
    SlotWithoutClaim {
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// The claim.
        claim: ClaimKey,
    },
    /// An address is in use that no pool of its space contains, and no record tells that an outside gave it: if one did,
    /// nobody renews it there.
    #[error("{address} of space {space} is of {holder}, and in no pool")]
    InNoPool {
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// Whose it is.
        holder: String,
    },
    /// An address is in use that its pool does not hand out any more, for it was shrunk, or the address is excluded since.
    #[error("{address} of space {space} is of {holder}, and pool {pool} does not hand it out")]
    NotHandedOut {
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// Whose it is.
        holder: String,
        /// The pool.
        pool: String,
    },
    /// An address is in use that is reserved for somebody outside.
    #[error("{address} of space {space} is of {holder}, and reserved for {outsider}")]
    InReserved {
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// Whose it is.
        holder: String,
        /// For whom it is reserved.
        outsider: String,
    },
    /// A record is in a state of which a queue or list should tell, and it does not: nobody finds it there.
    #[error("{address} of space {space} is {state}, and not listed so")]
    Unlisted {
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// Its state.
        state: &'static str,
    },
    /// A row of a queue or list tells of a state that its record is not in.
    #[error("a row without a record: {what}")]
    StrayRow {
        /// What it tells.
        what: &'static str,
    },
    /// The record of a space counts other reservations than there are. Where it counts none, nobody heeds them.
    #[error("space {space} counts {counted} reservations, and there are {found}")]
    ReservationCount {
        /// The routing domain.
        space: AddressSpace,
        /// What it counts.
        counted: u64,
        /// What there is.
        found: u64,
    },
    /// A node owns a block and does not find it.
    #[error("block {block:x} of pool {pool} is of node {node}, and not in its list")]
    BlockUnlisted {
        /// The pool.
        pool: String,
        /// The block: its first address divided by its size.
        block: u128,
        /// The node.
        node: String,
    },
    /// The history says that somebody holds an address who does not.
    #[error("the history has {attachment} hold {address} of space {space}, and it does not")]
    OpenTenure {
        /// The routing domain.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// Who is said to hold it.
        attachment: AttachmentKey,
    },
    /// The lease was released past the source that bound it outside: it stays bound there until the source recovers or
    /// renews ([`BinderSource`](crate::binder::BinderSource)), which repair cannot do in its place.
    #[error("{attachment} has {addresses} outside, and no lease {sequence} of it")]
    OutsideWithoutLease {
        /// The attachment.
        attachment: AttachmentKey,
        /// The lease's sequence.
        sequence: u64,
        /// What is bound, for people.
        addresses: String,
    },
    /// A bind or release outside was begun and not finished: it is under way, or its caller has died, and the source's
    /// [`recover`](crate::binder::BinderSource::recover) finishes it.
    #[error("{attachment} is being bound or released outside")]
    OutsideUnfinished {
        /// The attachment.
        attachment: AttachmentKey,
    },
    /// A pool is leased from that the fleet plan in the same store does not know.
    #[error("pool {pool} ({subnet}) of space {space} is in no pool of the fleet plan")]
    Unplanned {
        /// The routing domain.
        space: AddressSpace,
        /// The pool.
        pool: String,
        /// Its subnet.
        subnet: IpNet,
    },
    /// A key or value that this version does not understand.
    #[error("cannot be understood: {reason}")]
    Unreadable {
        /// Why.
        reason: String,
    },
}

impl Damage {
    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            Self::AttachmentLostAddress { .. }
            | Self::AttachmentWithoutSlot { .. }
            | Self::ClaimWithoutSlot { .. }
            | Self::InReserved { .. }
            | Self::ReservationCount { .. }
            | Self::Unreadable { .. } => Severity::Danger,
            Self::BlockUnlisted { .. }
            | Self::ClaimLostAddress { .. }
            | Self::OutsideWithoutLease { .. }
            | Self::SlotWithoutAttachment { .. }
            | Self::SlotWithoutClaim { .. }
            | Self::Unlisted { .. } => Severity::Leak,
            Self::InNoPool { .. }
            | Self::NotHandedOut { .. }
            | Self::OpenTenure { .. }
            | Self::OutsideUnfinished { .. }
            | Self::StrayRow { .. }
            | Self::TwoOfPool { .. }
            | Self::Unplanned { .. } => Severity::Hint,
        }
    }
}

/// What became of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repaired {
    /// A record that it rests on has changed since; nothing was done. Check again.
    Changed,
    /// It is mended.
    Done,
    /// It has no remedy; people must decide.
    NotRepairable,
    /// The store does not know whether it was applied. Check again.
    Unknown,
}

impl Ipam {
    /// Reads all records, of all networks and spaces that share the store, and tells which do not fit together. It may run
    /// beside everything else: what is told was so at one moment, or has stood unchanged over two looks.
    ///
    /// Whether an address is handed out is judged by this configuration, and in all else by what is registered in the
    /// store. A store that configurations with and without a history share has gaps in its history, and they show here as
    /// [`Damage::OpenTenure`].
    ///
    /// # Errors
    /// The store failed.
    pub async fn check(&self) -> Result<Audit, LeaseError> {
        // Of both looks, for what would mend a finding may bear the time, and its key be guarded.
        let now = self.now();
        let first = self.pass_over(now).await?;
        if first.1 == first.0.revision || first.0.findings.is_empty() {
            return Ok(first.0);
        }
        // The store was written to while it was read, and halves of a commit may look like damage. Such halves have
        // other versions at the next look.
        let (mut second, _) = self.pass_over(now).await?;
        second.findings.retain(|finding| first.0.findings.iter().any(|before| finding.stands(before)));
        Ok(second)
    }

    /// The findings of one pass over the store, and the revision before it.
    async fn pass_over(&self, now: u64) -> Result<(Audit, u64), LeaseError> {
        let before = self.revision().await?;
        let entries: Vec<(Key, Entry)> = self.scan_all(b"").await?;
        let revision = self.revision().await?;
        let records = entries.len();
        let snapshot = Snapshot::new(&entries);
        let mut findings = Finder::new(self, &snapshot, now).findings();
        findings.sort_by(|a, b| a.key.cmp(&b.key));
        Ok((Audit { findings, records, revision }, before))
    }

    /// Mends what was found, as each finding's remedy says, and tells for each what became of it. Only if everything is
    /// still as it was found; so repeating it does nothing.
    ///
    /// # Errors
    /// The store failed; what comes before the failure may be mended.
    pub async fn repair(&self, findings: &[Finding]) -> Result<Vec<Repaired>, LeaseError> {
        let mut outcomes = Vec::with_capacity(findings.len());
        for finding in findings {
            if finding.remedy.is_none() {
                outcomes.push(Repaired::NotRepairable);
                continue;
            }
            let (guards, writes) = (finding.guards.clone(), finding.writes.clone());
            let batch = Batch { guards, writes, request_id: self.request_id() };
            outcomes.push(match self.store().commit(&batch).await.map_err(store_error)? {
                Outcome::Committed { .. } => Repaired::Done,
                Outcome::Conflict(_) => Repaired::Changed,
                Outcome::Unknown { .. } => Repaired::Unknown,
            });
        }
        Ok(outcomes)
    }
}
