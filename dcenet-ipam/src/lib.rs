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
//!   store       a sorted map with guarded atomic batches: memory, log
//! ```
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
