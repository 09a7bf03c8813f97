//! How many addresses each node could still give: what a scheduler must know so as not to place a pod where none is left.
//!
//! [`Ipam::capacity`](crate::Ipam::capacity) counts once; a [`CapacityFeed`] tells whenever a count has changed. A [`Capacity`] says of each pool
//! what becomes of its addresses, and of a node ([`Capacity::on_node`]) how many more attachments without a claim it could
//! serve from each pool that selects it. That number is exact at the revision of the count: so many leases succeed, and
//! the next is refused. Several nodes share what is in a pool, so only one of them can have the last address; who must not
//! overcommit asks when a pod is placed ([`Capacity::filter`]) instead of publishing a number beforehand.
//!
//! [`Capacity::extended_resources`] and [`Capacity::filter`] are the forms that Kubernetes takes.

mod book;
mod feed;
mod publish;

use std::collections::BTreeMap;

use serde::Serialize;

pub use self::feed::CapacityFeed;
pub use self::publish::FilterResult;
use crate::model::{AddressSpace, NodeName};
use crate::select::{Node, Selector};

/// What becomes of the addresses of all pools of a configuration, at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Capacity {
    /// The revision of the store.
    pub revision: u64,
    /// The pools, in the order of the configuration.
    pub pools: Vec<PoolCapacity>,
    /// When time alone changes the counts next: something has cooled down, or is not kept any longer. Milliseconds since
    /// 1970; absent for never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_due: Option<u64>,
}

/// What becomes of the addresses of a pool, or of the prefixes where it delegates those. The counts from `bound` to
/// `available` add up to `size`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolCapacity {
    /// Its name.
    pub pool: String,
    /// Its routing domain.
    pub space: AddressSpace,
    /// How many it could have in use.
    pub size: u128,
    /// Attachments use them.
    pub bound: u128,
    /// Claims keep them while nothing is attached, also those that the configuration fixes and nobody used yet.
    pub kept: u128,
    /// They were released so lately that nobody else gets them yet.
    pub cooling: u128,
    /// Somebody else on the link answers for them.
    pub quarantined: u128,
    /// Somebody outside uses them, as was recorded in the store. Those that the configuration reserves are no part of the
    /// pool.
    pub reserved: u128,
    /// Anybody gets them, or, in a pool of blocks, who owns the block or takes it.
    pub available: u128,
    /// How many attachments that are known to be on a node have an address of the pool.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub in_use_on: BTreeMap<NodeName, u128>,
    /// In a pool of blocks, the part of `available` that is in each owner's blocks; a block that is being given up serves
    /// nobody and is not counted.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub available_to: BTreeMap<String, u128>,
    /// In a pool of blocks, the part of `available` that is in blocks which nobody owns yet and anybody may take. Where
    /// applications own blocks, only of those that are nobody's altogether.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unowned: Option<u128>,
    #[serde(skip)]
    sharing: Sharers,
    #[serde(skip)]
    select: Option<Selector>,
}

/// Who may have what is available.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharers {
    /// Any node may have all.
    All,
    /// An application has what is in its own blocks and in those of nobody, on every node.
    Application,
    /// A node has what is in its own blocks and in those of nobody.
    Node,
}

/// What a node could still give of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeCapacity {
    /// The pool.
    pub pool: String,
    /// How many more attachments without a claim get an address of it. Where applications own blocks, those of one that has
    /// none yet; [`PoolCapacity::for_application`] tells it of the others.
    pub available: u128,
    /// How many attachments on the node have one.
    pub in_use: u128,
}

impl Capacity {
    /// What a node could still give, of each pool whose conditions on nodes it meets. Conditions on workloads and networks
    /// are not looked at: a pool is for those whom it selects.
    pub fn on_node(&self, node: &Node) -> Vec<NodeCapacity> {
        let serving = self.pools.iter().filter(|pool| pool.select.as_ref().is_none_or(|select| select.admits(node)));
        serving.map(|pool| pool.on_node(&node.name)).collect()
    }
}

impl PoolCapacity {
    /// How many more pods of the application, as `NAMESPACE/OWNER`, get an address of the pool, whichever nodes they are on.
    pub fn for_application(&self, application: &str) -> u128 {
        match self.sharing {
            Sharers::Application => self.reach_of(application),
            Sharers::All | Sharers::Node => self.available,
        }
    }

    /// What an owner has in his own blocks and in those of nobody.
    fn reach_of(&self, owner: &str) -> u128 {
        let own = self.available_to.get(owner).copied().unwrap_or(0);
        own.saturating_add(self.unowned.unwrap_or(0))
    }

    fn on_node(&self, node: &NodeName) -> NodeCapacity {
        let available = match self.sharing {
            Sharers::All => self.available,
            Sharers::Application => self.unowned.unwrap_or(0),
            Sharers::Node => self.reach_of(node.as_str()),
        };
        let in_use = self.in_use_on.get(node).copied().unwrap_or(0);
        NodeCapacity { pool: self.pool.clone(), available, in_use }
    }
}
