//! Adoption: going over to this allocator from another one while everything runs.
//!
//! A [`Source`] reads what another allocator holds, and writes nothing there. [`Ipam::plan_adoption`] compares it with
//! the configuration and the store, writes nothing either, and tells what would become of every entry: what is bound to
//! whom, what is so already, and what is refused and why. [`Ipam::adopt`] carries a plan out.
//!
//! ```text
//!   Source --read--> Inventory --plan_adoption--> Plan --adopt--> bindings and claims in the store
//!                                                  |
//!                                       refused: all or nothing, unless the caller accepts the refusal by its origin
//! ```
//!
//! # What an owner becomes
//! | Source | knows | becomes | ends by |
//! |---|---|---|---|
//! | [`host_local`] | container, interface | an attachment | DEL, GC, reclaim |
//! | [`whereabouts`] | container, pod, interface | an attachment with its workload | DEL, GC, reclaim |
//! | [`calico`] | container (in the handle), pod, node | the same; without a container in the handle a claim | the same |
//! | [`spiderpool`] | pod, its UID, interface, node | a claim, or an attachment where [`Options::containers`] names the pod's container | see below |
//!
//! The attachment's key is the network and the container that the runtime will name in DEL: [`Options::network`] must be
//! the name of the network configuration that runs after the change, which is best the old name.
//!
//! Where the source knows no container, DEL of a running container finds nothing to release, and answers as it does for
//! everything that is gone. The address is kept by a claim of the workload and its interface ([`Options::keep`], by
//! default as long as the workload exists): an ADD of that workload, be it a restart or a repetition, gets the same
//! address back, nobody else does, and [`Ipam::workload_gone`] or a [`Reclaimer`](crate::reclaim::Reclaimer) that is
//! shown all workloads ends it. Whoever can ask the runtime for the containers of its pods should pass them on, and then
//! DEL works from the first moment.
//!
//! # Sureness
//! - An address is bound under the guard of its own record, as by a lease: a race with a live allocation is refused, and
//!   never doubled.
//! - Each owner is one commit, with all its addresses. A crash between two leaves some owners adopted, wholly each, and
//!   the same plan carried out again completes it; what is done already is not done twice.
//! - A refusal that comes up half way, in a race, takes back what the call had done, unless it has changed since.
//! - A plan grows old: what was used and released here after it was made is refused, not taken back to life.
//!
//! # Which formats
//! Kubernetes objects are read from JSON or YAML dumps, as `kubectl get KIND -o json` or `-o yaml` write them: one object,
//! a list, or several documents. The parser of YAML is why this module is a feature: the CNI binary has no use for it.
//!
//! [`Ipam::adopt`]: crate::Ipam::adopt
//! [`Ipam::plan_adoption`]: crate::Ipam::plan_adoption
//! [`Ipam::workload_gone`]: crate::Ipam::workload_gone

mod apply;
pub mod calico;
mod dump;
pub mod host_local;
mod plan;
pub mod spiderpool;
pub mod whereabouts;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use dcenet_core::model::{ContainerId, IfName, Workload};
use serde::{Deserialize, Serialize};

pub use self::apply::{AdoptError, Adopted};
pub use self::dump::{Dump, DumpFormat};
pub use self::plan::{Options, Outside, Plan, Refusal, Why};
pub use crate::machine::{AdoptedAddress, AdoptedBy, Adoptee};
use crate::model::NodeName;

/// Another allocator's state.
///
/// Contract: `read` writes nothing there; it tells every address that the allocator does not count as free, either as an
/// entry or as unreadable, and everything else that it met as passed over; it invents nothing.
pub trait Source {
    /// Reads everything.
    ///
    /// # Errors
    /// The state cannot be read as a whole. Single entries that make no sense are in [`Inventory::unreadable`].
    fn read(&self) -> Result<Inventory, SourceError>;
}

/// What a source holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// Addresses in use. One may be there twice, if two records of the source name it.
    pub entries: Vec<Entry>,
    /// Entries that make no sense.
    pub unreadable: Vec<Unreadable>,
    /// What is no address in use, such as locks, cursors and addresses that cool.
    pub passed_over: Vec<PassedOver>,
}

/// An address in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The address.
    pub address: IpAddr,
    /// Who uses it.
    pub owner: Owner,
    /// Where that is written.
    pub origin: Origin,
}

/// Who uses an address.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Owner {
    /// A container.
    Container {
        /// Its identifier.
        container: ContainerId,
        /// Its interface, where known.
        ifname: Option<IfName>,
        /// The workload, where known.
        workload: Option<Workload>,
        /// The node, where known.
        node: Option<NodeName>,
    },
    /// A workload, some container of which runs.
    Workload {
        /// Its name.
        workload: Workload,
        /// Its interface, where known.
        ifname: Option<IfName>,
        /// The identity of the pod, where known.
        uid: Option<String>,
        /// The node, where known.
        node: Option<NodeName>,
    },
    /// No workload, but something that needs the address all the same, such as a tunnel. It becomes a reservation.
    Outside {
        /// For people.
        holder: String,
    },
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |f: &mut fmt::Formatter<'_>, ifname: &Option<IfName>| match ifname {
            Some(ifname) => write!(f, " on {ifname}"),
            None => Ok(()),
        };
        match self {
            Self::Container { container, ifname, workload, .. } => {
                write!(f, "container {container}")?;
                on(f, ifname)?;
                workload.as_ref().map_or(Ok(()), |workload| write!(f, " of {workload}"))
            }
            Self::Workload { workload, ifname, uid, .. } => {
                write!(f, "workload {workload}")?;
                on(f, ifname)?;
                uid.as_ref().map_or(Ok(()), |uid| write!(f, ", UID {uid}"))
            }
            Self::Outside { holder } => f.write_str(holder),
        }
    }
}

/// Where something is written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The file.
    pub file: PathBuf,
    /// The line, counted from 1, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    /// What of it: the path of a field in an object, or what a line stands for.
    pub field: String,
}

impl Origin {
    fn new(file: impl Into<PathBuf>, field: impl Into<String>) -> Self {
        Self { file: file.into(), line: None, field: field.into() }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if self.field.is_empty() { Ok(()) } else { write!(f, ": {}", self.field) }
    }
}

/// An entry that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Where it is.
    pub origin: Origin,
    /// The address, where that at least is clear.
    pub address: Option<IpAddr>,
    /// The value, what is wrong with it, and what to do.
    pub reason: String,
}

/// What is no address in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PassedOver {
    /// Where it is.
    pub origin: Origin,
    /// What it is.
    pub what: String,
}

/// Why a source could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Its owner holds its lock.
    #[error("{file} is locked by its owner for longer than {limit:?}; try again", file = file.display())]
    Busy {
        /// The lock.
        file: PathBuf,
        /// How long was waited.
        limit: std::time::Duration,
    },
    /// The operating system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, to which file.
        doing: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is no JSON or YAML.
    #[error("{origin}: {reason}; dump the objects again")]
    Syntax {
        /// Where.
        origin: Origin,
        /// What is wrong.
        reason: String,
    },
}
