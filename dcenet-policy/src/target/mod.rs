//! From decision diagrams to programs of one kind of hook.
//!
//! A [`Target`] is a backend: it knows what the kernel hands to a program at its hook, with which header a packet
//! begins there, what verdicts are called, and how a pair of diagrams becomes an [`Object`]. [`Tc`] is the classifier
//! hook of traffic control; [`Cache`] keeps what was lowered, so that policy sets with equal content are lowered once.
//!
//! A diagram is lowered in one of two forms:
//!
//! - [`Form::Code`]: each switch is a balanced search by comparisons with constants, so that a verdict takes about as
//!   many branches as the logarithm of the number of rules;
//! - [`Form::Table`]: the same search as nodes in an array map, walked by a loop. Its code is the same for every policy
//!   but for the number of peers that it tells apart, and its size is bounded by memory alone, but each step is a map lookup.
//!
//! # Examples
//! ```
//! use dcenet_ebpf::abi::Sizes;
//! use dcenet_policy::Compiler;
//! use dcenet_policy::model::{Cluster, Pod, PodId};
//! use dcenet_policy::target::{Cache, Tc};
//!
//! let mut cluster = Cluster::default();
//! cluster.insert_namespace("shop", []);
//! let (web, db) = (PodId::new("shop", "web"), PodId::new("shop", "db"));
//! cluster.pods.insert(web.clone(), Pod::new([("app", "web")], ["10.0.0.1".parse().unwrap()]));
//! cluster.pods.insert(db.clone(), Pod::new([("app", "db")], ["10.0.0.2".parse().unwrap()]));
//! let update = Compiler::default().update(&cluster).unwrap();
//!
//! let mut cache = Cache::new(Tc::new(Sizes::default()));
//! let first = cache.get(&update.endpoints[&web]).unwrap();
//! let elf: Vec<u8> = first.object.to_elf().unwrap(); // for a loader
//! # assert!(elf.starts_with(b"\x7fELF"));
//! // No policy governs either pod, so both run the same programs.
//! assert!(std::sync::Arc::ptr_eq(&first, &cache.get(&update.endpoints[&db]).unwrap()));
//! ```

mod cache;
mod code;
mod table;
mod tc;

use dcenet_ebpf::datapath::DatapathError;
use dcenet_ebpf::object::{Object, ProgramKind};

use crate::compiler::Program;

pub use self::cache::Cache;
#[cfg(feature = "test-support")]
pub use self::code::LoweringBug;
pub use self::code::{Frame, MAX_CODE_ARMS};
pub use self::table::MAX_TABLE_NODES;
pub use self::tc::{Classifier, Tc};

/// The header with which a packet begins at a hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FirstHeader {
    /// Ethernet.
    Ethernet,
    /// IPv4 or IPv6.
    Network,
}

/// What a program returns at a hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Codes {
    /// The packet goes on to the next program or filter.
    pub pass: i32,
    /// The packet is dropped.
    pub drop: i32,
}

/// What is lowered together: the diagrams of an endpoint.
#[derive(Debug, Clone, Copy)]
pub struct Policies<'a> {
    /// For what is opened to the pod.
    pub ingress: &'a Program,
    /// For what the pod opens.
    pub egress: &'a Program,
}

/// How a diagram was lowered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// As comparisons and branches.
    Code,
    /// As an array of nodes, walked by a loop.
    Table,
}

/// The content of an array map, to be written after the object was loaded and before its programs are attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapContent {
    /// The map's name in the object.
    pub map: String,
    /// Its values from index 0 on, one behind the other.
    pub bytes: Vec<u8>,
    /// Bytes of one value.
    pub stride: usize,
}

impl MapContent {
    /// The values in the order of their indices.
    pub fn values(&self) -> impl Iterator<Item = (u32, &[u8])> {
        (0..).zip(self.bytes.chunks_exact(self.stride))
    }
}

/// The programs of an endpoint, ready for a loader.
#[derive(Debug, Clone)]
pub struct Artefact {
    /// Programs and the maps that they need.
    pub object: Object,
    /// What has to stand in maps of the object before a packet comes. Until then, whatever these maps are asked is
    /// denied.
    pub contents: Vec<MapContent>,
    /// The form of the ingress classifier.
    pub ingress: Form,
    /// The form of the egress classifier.
    pub egress: Form,
}

/// Why a diagram cannot be lowered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// The diagram is fine but larger than this implementation takes.
    #[error("{what}: {found}, more than the limit of {limit}; split the policies")]
    ImplLimitExceeded {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there may be.
        limit: usize,
    },
    /// The programs around the diagrams cannot be made.
    #[error("the programs around the policy cannot be made")]
    Datapath(#[from] DatapathError),
}

/// A kind of hook that policies are lowered to.
pub trait Target {
    /// The kind of program, which decides what the kernel hands to it.
    fn kind(&self) -> ProgramKind;

    /// With which header a packet begins.
    fn first_header(&self) -> FirstHeader;

    /// What the programs return.
    fn codes(&self) -> Codes;

    /// Writes the programs of an endpoint. The same input gives the same object.
    ///
    /// # Errors
    /// [`TargetError::ImplLimitExceeded`] where a diagram is larger than any form takes.
    fn lower(&self, policies: Policies<'_>) -> Result<Artefact, TargetError>;
}
