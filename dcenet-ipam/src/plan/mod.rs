//! The fleet plan: who owns which prefix, so that no subnet is used twice over all clusters.
//!
//! A [`Plan`] is the tree of prefixes that one authority owns, in a store: the fleet's, a region's, a cluster's. In it a
//! prefix is claimed ([`Plan::claim`]) inside another of a lower [`Level`]: this one, or the best free one of a length.
//! Whatever overlaps is refused, by the holder's name and path. A claimed prefix can be put into its owner's hands
//! ([`Plan::delegate`]): the owner's own plan, over the owner's own store, accepts the grant and claims in it from then
//! on, down to the pools that addresses are leased from.
//!
//! ```text
//!   fleet's store                            prod-1's store
//!   10.0.0.0/8        corp                   10.16.0.0/16   corp/eu/prod-1   (granted)
//!     10.16.0.0/12    corp/eu                  10.16.0.0/20 pods             -> Ipam leases from it
//!       10.16.0.0/16  prod-1, delegated ---->  10.16.16.0/24 services
//! ```
//!
//! # Without duplicates
//! In one store every change of a space is guarded by the space's epoch record and writes it, so that changes form one
//! line: two who claim overlapping prefixes at once meet there although they write different keys, and the second
//! decides again. Between stores nothing is shared: a parent claims nothing in what it delegated, and the owner claims
//! nothing outside. Neither needs the other to go on, so a partition stops nobody, and when it ends there is nothing
//! to merge. In a space no two prefixes overlap, unless one was claimed in the other. Between spaces the same prefix
//! may be used again, except for purposes that a space keeps unique ([`Plan::add_space`]).
//!
//! # Taking back
//! A delegation ends only by its owner's consent, or by an operator's word that the owner is gone. There are no leases:
//! with time as judge, a cluster that is cut off for longer would lose addresses that its pods use, and its clock would
//! decide.
//!
//! ```text
//!   parent                        owner
//!   revoke      -- Revocation -->  surrender   nothing new is claimed in it; empty: given back, with a tombstone
//!   settle      <--- Receipt ---               the prefix is free
//! ```
//!
//! All documents carry the epoch of the grant, may be lost, late or repeated, and are refused when that epoch is over:
//! a late receipt does not end a later grant, and a late grant does not bring back what was given back. What carries
//! them must see to it that nobody forges them.
//!
//! **An owner that is partitioned and revoked** does not know, goes on, and must be let: its pods run. The prefix
//! therefore stays out of use in the parent's plan ([`State::Revoking`]) until a receipt comes. When the owner is gone
//! for good, [`Plan::attest_gone`] frees it at once. Should the owner come back after that, its [`Statement`] holds a
//! grant that the parent no longer knows, and the answer ([`Plan::orders`]) names it lost: the owner claims nothing new
//! in it ([`State::Lost`], [`Plan::verify`] refuses its pools), whoever operates it renumbers, and then it goes back.
//! In between two clusters may have used the same addresses: what a wrong word costs. One parent grants in a space.
//!
//! After a partition: `owner.statement()`, `parent.orders()`, `owner.obey()`, `parent.settle()` of each receipt. Every
//! step may be repeated, and left out.
//!
//! # Example
//! ```
//! use std::sync::Arc;
//! use dcenet_ipam::model::AddressSpace;
//! use dcenet_ipam::plan::{Claim, Level, Plan, PlanError, Purpose};
//! use dcenet_ipam::store::memory::MemoryStore;
//!
//! # pollster::block_on(async {
//! // The fleet's store, wherever it is.
//! let fleet = Plan::new(Arc::new(MemoryStore::new()), "fleet")?;
//! let space = AddressSpace::default();
//! fleet.add_space(&space, &[]).await?;
//! let corp = fleet.own(&Claim::at("10.0.0.0/8".parse()?, Level::Fleet, "corp", "net")).await?;
//! let eu = fleet.claim(&Claim::within(corp.cidr, 12, Level::Region, "eu", "net-eu")).await?;
//! let prod = fleet.claim(&Claim::within(eu.cidr, 16, Level::Cluster, "prod-1", "prod-1")).await?;
//!
//! // What overlaps is refused by name.
//! let rival = Claim::at("10.0.128.0/17".parse()?, Level::Cluster, "lab", "lab");
//! let refused = fleet.claim(&rival).await.unwrap_err();
//! assert_eq!(refused.holder().unwrap().path, "corp/eu/prod-1");
//!
//! // The cluster's own store needs the grant and nothing else.
//! let grant = fleet.delegate(&space, prod.cidr, prod.level).await?;
//! let cluster = Plan::new(Arc::new(MemoryStore::new()), "prod-1")?;
//! cluster.accept(&serde_json::from_str(&serde_json::to_string(&grant)?)?).await?;
//! let pods = Claim::within(prod.cidr, 20, Level::Pool, "pods", "prod-1").purpose(Purpose::Pod);
//! assert_eq!(cluster.claim(&pods).await?.path, "corp/eu/prod-1/pods");
//!
//! // A pool of a CNI configuration is checked before addresses are leased from it.
//! let pool = serde_json::from_str(r#"{ "name": "db", "subnet": "10.0.16.0/24" }"#)?;
//! assert!(matches!(cluster.verify(&pool).await, Err(PlanError::Unclaimed { .. })));
//! cluster.claim_pool(&pool, Purpose::Underlay).await?;
//! cluster.verify(&pool).await?;
//!
//! println!("{}", cluster.tree(&space).await?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # }).unwrap();
//! ```

mod advice;
mod block;
mod document;
mod error;
mod index;
mod machine;
mod model;
mod planner;
mod record;
mod table;

pub use self::advice::{Advice, Move};
pub use self::document::{Conflict, ConflictKind, Document, DocumentPrefix, ImportReport};
pub use self::error::{Holder, PlanError};
pub use self::model::{
    Claim, Grant, Holding, Level, Orders, Place, Prefix, Purpose, Receipt, Revocation, State, Statement, Utilisation,
};
pub use self::planner::{Obeyed, Plan, Surrender};
pub use self::table::{Row, Tree};

/// The prefix and level that a key of a space's plan stands for.
pub(crate) fn planned(space: &crate::model::AddressSpace, key: &[u8]) -> Option<(ipnet::IpNet, Level)> {
    let node = self::record::node_of(&self::record::prefixes(space), key)?;
    Some((node.block.cidr(), node.level))
}
