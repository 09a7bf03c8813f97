//! Address management that cannot duplicate, leak or stall.
//!
//! A configuration ([`IpamConfig`]) names pools of addresses, and claims: addresses that belong to a workload for as
//! long as it wants, whatever container runs it. [`Ipam`] hands them out from a [`store`], which other processes and
//! other configurations may share, and is an [`AddressSource`](dcenet_core::provider::AddressSource).
//!
//! ```text
//!   Ipam        reads, steps, commits, retries
//!    |  \
//!    |   machine     decides: pure, no clock, no I/O
//!   store       a sorted map with guarded atomic batches: memory, log, redb, etcd
//! ```
//!
//! # Stores
//! | Store | Shared by | Survives | For |
//! |---|---|---|---|
//! | [`memory`](store::memory) | nobody | nothing | tests, simulations |
//! | [`log`](store::log) | the processes of a machine | loss of power | the CNI plugin and a daemon of one node |
//! | `redb` (feature) | nobody | loss of power | an embedder that has its addresses for itself |
//! | [`etcd`](store::etcd) (feature) | machines | what a majority of the members survives | pools of a cluster |
//!
//! ```
//! # use dcenet_ipam::{Ipam, IpamConfig};
//! # let pools = r#""pools": [ { "name": "db", "subnet": "10.20.0.0/24" } ]"#;
//! # let parse = |text: String| serde_json::from_str::<IpamConfig>(&text);
//! let log = parse(format!(r#"{{ "store": {{ "kind": "log", "path": "/var/lib/example/ipam" }}, {pools} }}"#))?;
//! let etcd = parse(format!(
//!     r#"{{ "store": {{ "kind": "etcd", "endpoints": ["https://10.0.0.1:2379"], "ca": "/etc/dcenet/ca.pem" }},
//!          "node": {{ "name": "n7" }}, {pools} }}"#,
//! ))?;
//! # #[cfg(feature = "redb")]
//! # fn redb(log: &IpamConfig) -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! let redb = dcenet_ipam::store::redb::RedbStore::open(dir.path())?;
//! let ipam = Ipam::new(log, std::sync::Arc::new(redb))?; // the configuration's own store is not opened
//! # Ok(()) }
//! # #[cfg(feature = "redb")]
//! # redb(&log)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Limits
//! - **A pool is full**: the lease is refused ([`LeaseError::Exhausted`](dcenet_core::provider::LeaseError::Exhausted), CNI
//!   code 11, so a runtime tries again) once every pool that may serve it was looked at; nothing is changed. Addresses
//!   that were released a moment ago rest for the `cooldown`. [`capacity`] tells beforehand how many are left.
//! - **The store is slow or gone**: a call ends with an error that may be tried again (CNI code 11), after the store's
//!   `timeout` at most (etcd: 10 s unless told, less than what runtimes wait; the log waits for its lock). What runs keeps
//!   its addresses, for nothing here expires by itself: no lease of the store's guards an address. DEL and GC end with the
//!   same error, and are repeated by the runtime.
//! - **Nobody knows whether a batch was carried out**: the allocator reads before it decides again, so a lease that was
//!   made is found and given, not made twice.
//! - **A clock jumps**: times are those of the process that calls. Forward, what is kept for a time and what rests ends
//!   early by as much; back, late. What is in use depends on no clock. See [`machine`] and
//!   [`KeepPolicy::For`](model::KeepPolicy::For).
//! - **Two clusters are parted**: each goes on in the prefixes that it owns ([`plan`]), and cannot claim new ones from an
//!   authority that it does not reach. When they meet again there is nothing to reconcile. Of the members of one etcd the
//!   majority goes on, the others refuse.
//! - **GC of a node** ends what that node leased and its runtime no longer lists. What other nodes hold in a store that
//!   they share, and what nobody's node is told of, ends by [`reclaim`] alone, on two observations.
//! - **Sizes**: a batch of the store holds at least 32 operations, a key 1,024 bytes; an IPv6 prefix may be of any length,
//!   and no call walks over its addresses.
//!
//! # Example
//! ```
//! use dcenet_core::provider::{AddressSource, LeaseRequest};
//! use dcenet_ipam::{Ipam, IpamConfig};
//!
//! # pollster::block_on(async {
//! let config: IpamConfig = serde_json::from_str(
//!     r#"{ "store": { "kind": "log" },
//!          "pools": [ { "name": "db", "subnet": "10.20.0.0/24", "gateway": "10.20.0.1",
//!                       "claims": { "shop/db": { "address": "10.20.0.11" } } },
//!                     { "name": "db6", "subnet": "fd00:20::/64" } ] }"#,
//! )?;
//! let dir = tempfile::tempdir()?;
//! let ipam = Ipam::open(&config, dir.path())?;
//! let lease = ipam
//!     .lease(&LeaseRequest {
//!         workload: Some("shop/db".parse()?),
//!         ..LeaseRequest::new(serde_json::from_str(
//!             r#"{ "network": "shop", "container": "c1", "ifname": "eth0" }"#,
//!         )?)
//!     })
//!     .await?;
//! assert_eq!(lease.addresses[0].address.to_string(), "10.20.0.11/24");
//! assert_eq!(lease.addresses[1].address.to_string(), "fd00:20::1/64");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # }).unwrap();
//! ```

#![forbid(unsafe_code)]
// A library neither prints nor panics on its caller's input.
#![warn(unreachable_pub, clippy::print_stderr, clippy::print_stdout, clippy::unwrap_used)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(feature = "adopt")]
#[cfg_attr(docsrs, doc(cfg(feature = "adopt")))]
pub mod adopt;
pub mod audit;
pub mod binder;
pub mod capacity;
mod claims;
pub mod config;
pub mod fabric;
mod follow;
pub mod groups;
pub mod history;
mod ipam;
pub mod machine;
#[cfg(feature = "metrics")]
#[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
pub mod metrics;
pub mod model;
pub mod plan;
pub mod pool;
pub mod reclaim;
mod record;
pub mod select;
pub mod store;

pub use crate::claims::{OpenHandover, QuarantinedAddress};
pub use crate::config::{ConfigError, IpamConfig, Layout};
pub use crate::ipam::{Ipam, OpenError, OwnedBlock, PoolUsage, RecordedClaim, Reservation};
pub use crate::machine::{ClaimExport, Quarantine};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
