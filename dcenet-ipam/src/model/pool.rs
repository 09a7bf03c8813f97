//! Pools of addresses.

use std::net::IpAddr;

use dcenet_core::model::{Mtu, VlanId};
use dcenet_core::provider::{Dns, LeasedRoute};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Addr, AddressSpace, Claim, ClaimSet, Family, Interval, Intervals};
use crate::select::{Selector, Subject};

/// Addresses that are handed out together, of one family, in one subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its name, unique in a configuration.
    pub name: String,
    /// The routing domain.
    pub space: AddressSpace,
    /// The subnet on whose link the addresses are.
    pub subnet: IpNet,
    /// The subnet's router.
    pub gateway: Option<IpAddr>,
    /// Routes that come with an address of this pool.
    pub routes: Vec<LeasedRoute>,
    /// Resolver settings that come with an address of this pool.
    pub dns: Dns,
    /// The addresses that anybody may get: the ranges without exclusions, gateway, network, broadcast and anycast
    /// addresses, and without those that claims of the configuration fix.
    pub free: Intervals,
    /// The addresses that may be in use at all, thus also those fixed by claims; requests for one address are held to it.
    pub allowed: Intervals,
    /// The claims that the configuration makes in this pool, also those that its claim sets consist of.
    pub claims: Vec<Claim>,
    /// The claim sets that the configuration makes in this pool.
    pub sets: Vec<ClaimSet>,
    /// Whom it serves; `None` for anybody.
    pub select: Option<Selector>,
    /// Pools of a lower number are tried before those of a higher one.
    pub priority: i32,
    /// Whether the next pool is tried when this one is exhausted.
    pub fallback: bool,
    /// What its addresses are for, beside the first address of the family; see [`PoolConfig::group`].
    ///
    /// [`PoolConfig::group`]: crate::config::PoolConfig::group
    pub group: Option<String>,
    /// The VLAN of the subnet.
    pub vlan: Option<VlanId>,
    /// The MTU of the link.
    pub mtu: Option<Mtu>,
    /// The blocks that nodes or applications own in it.
    pub block: Option<Blocks>,
    /// The length of the prefixes that it hands out instead of addresses.
    pub delegate: Option<u8>,
}

/// How nodes or applications own parts of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// The prefix length of a block.
    pub length: u8,
    /// Whether a node gets addresses of other nodes' blocks when its own are full and no block is left.
    pub borrow: bool,
    /// Who owns blocks.
    pub owner: BlockOwner,
}

/// Who owns the blocks of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockOwner {
    /// Applications: all pods of one owner, `NAMESPACE/OWNER`, told as in [`GroupBy::Application`]. Whoever has an address
    /// of the pool has it from a block of his application.
    ///
    /// [`GroupBy::Application`]: crate::groups::GroupBy::Application
    Application,
    /// Nodes. A block is where a node looks first; claims and requests for one address are served from any.
    #[default]
    Node,
}

impl Pool {
    /// The family of its addresses.
    pub fn family(&self) -> Family {
        Family::of(&self.subnet)
    }

    /// The length of its blocks where nodes own them: such pools are routed between nodes.
    pub fn node_blocks(&self) -> Option<u8> {
        self.block.filter(|blocks| blocks.owner == BlockOwner::Node).map(|blocks| blocks.length)
    }

    /// How many addresses, or prefixes where it delegates those, it could have in use.
    pub fn size(&self) -> u128 {
        match self.delegate {
            None => self.allowed.size(),
            Some(_) => self.allowed.iter().fold(0, |sum: u128, (low, high)| {
                sum.saturating_add((high >> self.shift()) - (low >> self.shift()) + 1)
            }),
        }
    }

    /// Whether it may have the address in use.
    pub(crate) fn has(&self, address: Addr) -> bool {
        self.family() == address.family && self.allowed.contains(address.bits)
    }

    /// How far an address is shifted to become the number of what is handed out.
    pub(crate) fn shift(&self) -> u32 {
        self.delegate.map_or(0, |length| u32::from(self.family().bits() - length))
    }

    /// The address of the number-th thing that is handed out: where a prefix is, its first address that a host may have
    /// (all-zero host bits are the subnet-router anycast address of IPv6, RFC 4291, section 2.6.1, and the network of
    /// IPv4).
    pub(crate) fn address_at(&self, number: u128) -> Addr {
        let host = u128::from(self.shift() > 1);
        Addr { family: self.family(), bits: number << self.shift() | host }
    }

    /// The address that stands for what is handed out with this address in it: of a prefix that of
    /// [`Pool::address_at`], else the address itself.
    pub(crate) fn first_of(&self, address: Addr) -> Addr {
        self.address_at(address.bits >> self.shift())
    }

    /// Whether a number found in a queue is one of the set and stands for what the pool hands out.
    pub(crate) fn offers(&self, among: &Intervals, bits: u128) -> bool {
        among.contains(bits) && self.address_at(bits >> self.shift()).bits == bits
    }

    /// First and last address of a block.
    pub(crate) fn block_range(&self, length: u8, block: u128) -> Interval {
        let shift = self.family().bits() - length;
        let first = block << shift;
        (first, first | ((1 << shift) - 1))
    }

    /// Why it does not serve the subject; `None` if it does.
    pub(crate) fn mismatch(&self, subject: &Subject<'_>) -> Option<String> {
        self.select.as_ref().and_then(|select| select.mismatch(subject))
    }
}
