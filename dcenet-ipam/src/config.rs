//! The `ipam` section of a configuration, and its checked form.
//!
//! ```json
//! { "type": "dcenet", "store": { "kind": "log" }, "cooldown": "5s",
//!   "pools": [ { "name": "db", "subnet": "10.20.0.0/24", "ranges": ["10.20.0.10-10.20.0.99"],
//!                "exclude": ["10.20.0.50"], "gateway": "10.20.0.1",
//!                "claims": { "shop/db": { "address": "10.20.0.11", "keep": "forever" } } },
//!              { "name": "db6", "subnet": "fd00:20::/64" } ],
//!   "routes": [ { "dst": "0.0.0.0/0" } ], "dns": { "nameservers": ["10.20.0.1"] } }
//! ```
//!
//! # Which pool
//! An attachment gets one address of each family that has a pool, from the first pool of the family that serves it and has
//! a free one. Pools are tried by `priority`, the lower number first, and among equals as they are written. `select` says
//! whom a pool serves ([`Selector`]); a pool without it serves anybody. An exhausted pool falls through to the next
//! unless it says `"fallback": false`. A family none of whose pools serves the attachment is an error that tells what was
//! compared. A claim's address stays in its pool, whomever the pool selects.
//!
//! ```json
//! { "node": { "name": "rack1-n7", "labels": { "zone": "a" } },
//!   "pools": [ { "name": "db", "subnet": "10.20.0.0/24", "priority": -1, "fallback": false,
//!                "select": { "namespaces": ["shop"], "labels": { "matchLabels": { "tier": "data" } } } },
//!              { "name": "rack1", "subnet": "10.21.0.0/24", "select": { "nodes": ["rack1-*"] } },
//!              { "name": "rest", "subnet": "10.22.0.0/16" },
//!              { "name": "backup", "subnet": "10.30.0.0/24", "group": "backup", "vlan": 300, "mtu": 9000,
//!                "select": { "workloads": ["shop/db-*"] } } ] }
//! ```
//!
//! # Several addresses
//! Pools of a family with the same `group` are alternatives; an attachment gets an address of each group that serves it,
//! all or none. The pools without a `group` must serve everybody who asks; a `group` is for those whom its pools select.
//! A request may name pools instead, by name or by pattern ([`LeaseRequest::pools`]), and then gets an address of each
//! entry and no other. VLAN, MTU, gateway, routes and DNS of each pool come with its address; pools of one lease may not
//! name two VLANs, for one interface is in one.
//!
//! [`LeaseRequest::pools`]: dcenet_core::provider::LeaseRequest::pools
//!
//! # Addresses that are somebody else's
//! ```json
//! { "reserved": [ { "addresses": ["10.20.0.2-10.20.0.9", "10.20.0.128/28"], "holder": "edge routers" } ],
//!   "pools": [ { "name": "db", "subnet": "10.20.0.0/24" } ] }
//! ```
//! No pool of the space hands them out, and who asks for one is told the holder. Reservations can also be recorded in the
//! store, for all configurations that share it: [`Ipam::reserve_external`](crate::Ipam::reserve_external).
//!
//! # Blocks of a node
//! ```json
//! { "node": { "name": "n7" },
//!   "pools": [ { "name": "pods", "subnet": "10.128.0.0/14", "block": { "size": 64, "borrow": false } } ] }
//! ```
//! The node takes an aligned block of 64 addresses at a time and hands out from its own blocks, so that one route leads to
//! many of its pods ([`Ipam::blocks`](crate::Ipam::blocks)). What keeps an address unique is its own record all the same,
//! whoever owns the block. When no block is left, addresses of other nodes' blocks are borrowed, unless that is forbidden.
//! A claim, or a request for one address, is served from any block.
//!
//! # Blocks of an application
//! ```json
//! { "pools": [ { "name": "dmz", "subnet": "10.64.0.0/16", "block": { "size": "/28", "owner": "application" } } ] }
//! ```
//! The first pod of an application makes it a block of its own, the next block is made when the first is full, and an empty
//! one is given back ([`Ipam::release_empty_blocks`](crate::Ipam::release_empty_blocks)), so that a firewall names an
//! application by few prefixes and nobody has to plan a pool for it. The application is told by the workload as address
//! groups are ([`GroupBy::Application`](crate::groups::GroupBy::Application)). Every address of such a pool, also a claim's
//! and one that is asked for, is of a block of its application: nobody else gets any, no request without a workload is
//! served, and a configuration that does not say the same of the pool cannot share it.
//!
//! # A prefix for each workload
//! ```json
//! { "pools": [ { "name": "delegated", "subnet": "2001:db8:100::/40", "delegate": 64 } ] }
//! ```
//! Every attachment gets a prefix of that length to itself (RFC 9663, RFC 8273), and in it its first address. The gateway of
//! such a pool may be link-local.

mod claims;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::model::{Mtu, VlanId};
use dcenet_core::provider::{Dns, LeaseError, LeasedRoute};
use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use self::claims::{ClaimConfig, HistoryConfig};
use crate::model::{Addr, AddressSpace, BlockOwner, Blocks, Family, Interval, Intervals, Pool, name_fault};
use crate::select::{Node, Selector};
use crate::store::etcd::EtcdConfig;
use crate::store::log::LogStore;
use crate::store::memory::MemoryStore;
use crate::store::{Store, StoreError};

/// The `ipam` section as written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IpamConfig {
    /// `dcenet`, where given: the key by which CNI configurations name an IPAM plugin.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub plugin: Option<String>,
    /// Where bindings are kept.
    #[serde(default)]
    pub store: StoreConfig,
    /// The pools in order of preference within their family.
    pub pools: Vec<PoolConfig>,
    /// Routes that come with every lease.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<LeasedRoute>,
    /// Resolver settings that come with every lease.
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
    /// How long a released address is given to nobody else, 5 s unless told. Neighbours and connection tracking still
    /// take it for the old holder for a moment. Claims and requests for one address do not wait.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "duration_text")]
    pub cooldown: Option<Duration>,
    /// The node that asks, for pools that select by node; `Ipam::on_node` goes before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Node>,
    /// Keeps who held each address, and when: `{ "keep": "720h", "count": 64 }`. Nothing is kept unless told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<HistoryConfig>,
    /// Addresses that no pool hands out, for somebody else uses them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reserved: Vec<ReservedConfig>,
}

/// Addresses of somebody else, as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReservedConfig {
    /// `first-last`, a prefix or one address each; they need not be in a pool.
    pub addresses: Vec<AddressRange>,
    /// Who has them, for people.
    pub holder: String,
    /// The routing domain, `default` unless told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space: Option<String>,
}

/// Addresses of somebody else, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reserved {
    /// The routing domain.
    pub space: AddressSpace,
    /// The first of them.
    pub first: Addr,
    /// The last of them.
    pub last: Addr,
    /// Who has them.
    pub holder: String,
}

/// The blocks that nodes or applications own in a pool, as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// How large a block is.
    pub size: BlockSize,
    /// Whether a node gets addresses of other nodes' blocks when its own are full and no block is left; yes unless told.
    /// Applications never do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub borrow: Option<bool>,
    /// Who owns blocks; nodes unless told.
    #[serde(default, skip_serializing_if = "is_node")]
    pub owner: BlockOwner,
}

fn is_node(owner: &BlockOwner) -> bool {
    *owner == BlockOwner::Node
}

/// A number of addresses that is a power of two, as `64`, or a prefix length, as `"/26"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BlockSize {
    /// Addresses.
    Count(u64),
    /// `/` and a prefix length.
    Length(String),
}

impl BlockSize {
    /// The prefix length in a family; `None` if it is none.
    fn length(&self, family: Family) -> Option<u8> {
        match self {
            Self::Count(count) if count.is_power_of_two() => family.bits().checked_sub(count.ilog2() as u8),
            Self::Count(_) => None,
            Self::Length(text) => text.strip_prefix('/')?.parse().ok().filter(|length| *length <= family.bits()),
        }
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => count.fmt(f),
            Self::Length(text) => text.fmt(f),
        }
    }
}

/// Which store, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "lowercase")]
#[non_exhaustive]
pub enum StoreConfig {
    /// An etcd cluster, shared by any number of processes on any number of machines (feature `etcd`).
    Etcd(EtcdConfig),
    /// A log in a directory, shared by all processes of the machine.
    Log {
        /// The directory; `ipam` below the state directory unless told.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
    },
    /// Memory of this process. Of no use to a program that ends between two calls.
    Memory {},
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self::Log { path: None }
    }
}

impl StoreConfig {
    /// Opens the store; `state_dir` is where the log goes that has no path of its own.
    pub fn open(&self, state_dir: &Path) -> Result<Arc<dyn Store>, StoreError> {
        Ok(match self {
            Self::Etcd(config) => config.open()?,
            Self::Log { path: Some(path) } => Arc::new(LogStore::open(path)?),
            Self::Log { path: None } => Arc::new(LogStore::open(&state_dir.join("ipam"))?),
            Self::Memory {} => Arc::new(MemoryStore::new()),
        })
    }
}

/// A pool as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// Its name, unique in the configuration. Configurations that share a store and name a pool alike share the pool.
    pub name: String,
    /// The routing domain, `default` unless told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space: Option<String>,
    /// The subnet of the link.
    pub subnet: IpNet,
    /// What may be handed out: `first-last`, a prefix or one address each; the whole subnet unless told. The network
    /// and broadcast addresses of IPv4 (except in a /31, RFC 3021, and a /32) and the subnet-router anycast address of
    /// IPv6 (RFC 4291, section 2.6.1; except in a /127, RFC 6164, and a /128) never are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<AddressRange>,
    /// What may not, in the same form.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<AddressRange>,
    /// The subnet's router; never handed out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Routes that come with an address of this pool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<LeasedRoute>,
    /// Resolver settings that come with an address of this pool.
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
    /// Fixed addresses by workload (`namespace/name`, or `namespace/name/interface`), and by all pods of one owner
    /// (`namespace/name-*`); see [`ClaimConfig`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub claims: BTreeMap<String, ClaimConfig>,
    /// Whom the pool serves; anybody unless told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select: Option<Selector>,
    /// Pools of a lower number are tried first; 0 unless told.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: i32,
    /// Whether the next pool is tried when this one is exhausted; yes unless told.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub fallback: bool,
    /// Pools of the same family and group are alternatives. Those of another group give a further address to whom they
    /// select, all or nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The VLAN of the subnet, 1 to 4094, passed on with the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanId>,
    /// The MTU of the link in bytes, passed on with the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// Gives each node, or each application, blocks of its own; any address to anybody unless told. Blocks of nodes need
    /// [`IpamConfig::node`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<BlockConfig>,
    /// Hands out prefixes of this length instead of addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delegate: Option<u8>,
}

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

fn is_zero(value: &i32) -> bool {
    *value == 0
}

/// `first-last`, a prefix, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    /// The first address as written; it may be above the last, until the configuration is checked.
    pub first: IpAddr,
    /// The last address.
    pub last: IpAddr,
}

impl FromStr for AddressRange {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let address = |t: &str| {
            t.trim()
                .parse::<IpAddr>()
                .map_err(|_| format!("{s:?} is neither an address, nor a prefix, nor a range first-last of addresses"))
        };
        if let Some((first, last)) = s.split_once('-') {
            Ok(Self { first: address(first)?, last: address(last)? })
        } else if let Ok(prefix) = s.trim().parse::<IpNet>() {
            Ok(Self { first: prefix.network(), last: prefix.broadcast() })
        } else {
            address(s).map(|ip| Self { first: ip, last: ip })
        }
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl Serialize for AddressRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AddressRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// What is wrong with a configuration, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value:?} {fault}")]
pub struct ConfigError {
    /// The path of the field, such as `ipam.pools[0].gateway`.
    pub field: String,
    /// Its value.
    pub value: String,
    /// What is wrong with it, and the remedy.
    pub fault: ConfigFault,
}

/// What is wrong with a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigFault {
    /// Not of the form that the field asks for.
    #[error("is not accepted: {0}")]
    Malformed(String),
    /// A range that ends before it begins.
    #[error("ends before it begins; write the lower address first")]
    Reversed,
    /// An address, or an end of a range, that is not in the subnet.
    #[error("is not in the pool's subnet {subnet}; take it from there or widen the subnet")]
    OutsideSubnet {
        /// The pool's subnet.
        subnet: IpNet,
    },
    /// An address that no attachment may have.
    #[error("cannot be claimed: it is {what}; take another address of {subnet}")]
    Reserved {
        /// What it is.
        what: &'static str,
        /// The pool's subnet.
        subnet: IpNet,
    },
    /// Two pools of one space share addresses.
    #[error("overlaps pool {other} ({subnet}) of space {space}; choose a disjoint subnet or another space")]
    Overlap {
        /// The other pool.
        other: String,
        /// Its subnet.
        subnet: IpNet,
        /// The space.
        space: AddressSpace,
    },
    /// A name or claim that exists already.
    #[error("is taken by {by}; each may appear once")]
    Duplicate {
        /// Who has it.
        by: String,
    },
    /// A pool without a single address to give.
    #[error("leaves no address to hand out; widen the ranges or remove exclusions")]
    Empty,
}

impl From<ConfigError> for LeaseError {
    fn from(error: ConfigError) -> Self {
        Self::Invalid { reason: format!("{:?} {}", error.value, error.fault), field: error.field }
    }
}

/// A configuration that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The pools in order of preference within their family.
    pub pools: Vec<Pool>,
    /// Routes that come with every lease.
    pub routes: Vec<LeasedRoute>,
    /// Resolver settings that come with every lease.
    pub dns: Dns,
    /// See [`IpamConfig::cooldown`].
    pub cooldown: Duration,
    /// The node that asks: see [`IpamConfig::node`] and [`Ipam::on_node`](crate::Ipam::on_node).
    pub node: Option<Node>,
    /// See [`IpamConfig::history`].
    pub history: Option<HistoryConfig>,
    /// Addresses of somebody else, by space, family and number; disjoint.
    pub reserved: Vec<Reserved>,
}

impl Layout {
    /// [`IpamConfig::cooldown`] unless told.
    pub const COOLDOWN: Duration = Duration::from_secs(5);

    /// The reservation of the configuration that covers the address.
    pub fn reservation(&self, space: &AddressSpace, address: Addr) -> Option<&Reserved> {
        let until = self.reserved.partition_point(|r| (&r.space, r.first) <= (space, address));
        self.reserved[..until].last().filter(|r| r.space == *space && (r.first..=r.last).contains(&address))
    }

    /// Families that have a pool, IPv4 first.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        [Family::V4, Family::V6].into_iter().filter(|f| self.pools.iter().any(|p| p.family() == *f))
    }
}

impl IpamConfig {
    /// Checks everything that can be checked without a store. Field paths begin with `ipam`.
    pub fn layout(&self) -> Result<Layout, ConfigError> {
        let Self { plugin, store: _, pools: written, routes, dns, cooldown, node, history, reserved } = self;
        if let Some(plugin) = plugin
            && plugin != "dcenet"
        {
            let fault = ConfigFault::Malformed("this is the configuration of another plugin; write dcenet".to_owned());
            return Err(ConfigError { field: "ipam.type".to_owned(), value: plugin.clone(), fault });
        }
        if written.is_empty() {
            let fault = ConfigFault::Malformed("there is no address to hand out; name at least one pool".to_owned());
            return Err(ConfigError { field: "ipam.pools".to_owned(), value: "[]".to_owned(), fault });
        }
        let reserved = check_reserved(reserved)?;
        let mut pools: Vec<Pool> = Vec::with_capacity(written.len());
        for (i, pool) in written.iter().enumerate() {
            let checked = pool.check(&format!("ipam.pools[{i}]"), &reserved)?;
            for other in &pools {
                checked.check_beside(other, &format!("ipam.pools[{i}]"))?;
            }
            pools.push(checked);
        }
        let cooldown = cooldown.unwrap_or(Layout::COOLDOWN);
        if let Some(history) = history {
            history.check()?;
        }
        let (routes, dns, node, history) = (routes.clone(), dns.clone(), node.clone(), *history);
        Ok(Layout { pools, routes, dns, cooldown, node, history, reserved })
    }
}

fn check_reserved(written: &[ReservedConfig]) -> Result<Vec<Reserved>, ConfigError> {
    let mut all: Vec<Reserved> = Vec::new();
    for (i, ReservedConfig { addresses, holder, space }) in written.iter().enumerate() {
        let path = format!("ipam.reserved[{i}]");
        let error =
            |field: String, value: &dyn fmt::Display, fault| ConfigError { field, value: value.to_string(), fault };
        let malformed = |field: &str, value: &str, reason: &str| {
            error(format!("{path}.{field}"), &value, ConfigFault::Malformed(reason.to_owned()))
        };
        let space = match space {
            None => AddressSpace::default(),
            Some(text) => {
                text.parse().map_err(|e: dcenet_core::model::ParseError| malformed("space", text, e.reason))?
            }
        };
        if holder.is_empty() {
            return Err(malformed("holder", holder, "nobody could be told whose the addresses are; name the holder"));
        }
        if addresses.is_empty() {
            return Err(malformed("addresses", "[]", "nothing is reserved; name addresses or remove the entry"));
        }
        for (k, range) in addresses.iter().enumerate() {
            let field = format!("{path}.addresses[{k}]");
            let (first, last) = range.ends().map_err(|fault| error(field.clone(), range, fault))?;
            let reserved = Reserved { space: space.clone(), first, last, holder: holder.clone() };
            if let Some(other) = all.iter().find(|o| o.space == space && o.first <= last && first <= o.last) {
                let fault = ConfigFault::Duplicate { by: format!("reservation {}", other.holder) };
                return Err(error(field, range, fault));
            }
            all.push(reserved);
        }
    }
    all.sort_by(|a, b| (&a.space, a.first).cmp(&(&b.space, b.first)));
    Ok(all)
}

impl AddressRange {
    /// First and last address, of one family and in order.
    pub(crate) fn ends(&self) -> Result<(Addr, Addr), ConfigFault> {
        let (first, last) = (Addr::from(self.first), Addr::from(self.last));
        if first.family != last.family {
            return Err(ConfigFault::Malformed("its ends are of two families; write one range for each".to_owned()));
        }
        if first > last { Err(ConfigFault::Reversed) } else { Ok((first, last)) }
    }
}

impl Pool {
    fn check_beside(&self, other: &Self, path: &str) -> Result<(), ConfigError> {
        if self.name == other.name {
            let fault = ConfigFault::Duplicate { by: format!("the pool with subnet {}", other.subnet) };
            return Err(ConfigError { field: format!("{path}.name"), value: self.name.clone(), fault });
        }
        if self.space == other.space && overlap(&self.subnet, &other.subnet) {
            let (other, subnet, space) = (other.name.clone(), other.subnet, other.space.clone());
            let fault = ConfigFault::Overlap { other, subnet, space };
            return Err(ConfigError { field: format!("{path}.subnet"), value: self.subnet.to_string(), fault });
        }
        // A workload's interface has one address a family.
        if self.family() == other.family()
            && let Some(claim) = self.claims.iter().find(|c| other.claims.iter().any(|o| o.key == c.key))
        {
            let fault = ConfigFault::Duplicate { by: format!("a claim in pool {} of the same family", other.name) };
            let field = format!("{path}.claims[{:?}]", claim.key.to_string());
            return Err(ConfigError { field, value: claim.key.to_string(), fault });
        }
        if self.family() == other.family()
            && let Some(set) = self.sets.iter().find(|s| other.sets.iter().any(|o| o.owner == s.owner))
        {
            let fault = ConfigFault::Duplicate { by: format!("a claim set in pool {} of the same family", other.name) };
            let field = format!("{path}.claims[{:?}]", set.to_string());
            return Err(ConfigError { field, value: set.to_string(), fault });
        }
        Ok(())
    }
}

/// Whether two prefixes share an address: one contains the other.
pub(crate) fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn interval(subnet: &IpNet) -> Interval {
    (raw(subnet.network()), raw(subnet.broadcast()))
}

/// The address as a number in its own family, also where it is IPv4-mapped.
fn raw(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

/// `::ffff:0:0/96`: these addresses are IPv4 addresses.
const MAPPED: Interval = (0xffff_0000_0000, 0xffff_ffff_ffff);

impl PoolConfig {
    fn check(&self, path: &str, set_aside: &[Reserved]) -> Result<Pool, ConfigError> {
        let error = |field: &str, value: &dyn fmt::Display, fault: ConfigFault| ConfigError {
            field: format!("{path}.{field}"),
            value: value.to_string(),
            fault,
        };
        let malformed = |field: &str, value: &dyn fmt::Display, reason: &str| {
            error(field, value, ConfigFault::Malformed(reason.to_owned()))
        };
        if let Some(reason) = name_fault(&self.name) {
            return Err(malformed("name", &self.name, reason));
        }
        let space = match &self.space {
            None => AddressSpace::default(),
            Some(text) => {
                text.parse().map_err(|e: dcenet_core::model::ParseError| malformed("space", text, e.reason))?
            }
        };
        let subnet = self.subnet;
        if subnet.addr() != subnet.network() {
            let remedy = format!("bits are set beyond the prefix length; write {}", subnet.trunc());
            return Err(malformed("subnet", &subnet, &remedy));
        }
        let family = Family::of(&subnet);
        let whole = interval(&subnet);
        if family == Family::V6 && whole.0 >= MAPPED.0 && whole.1 <= MAPPED.1 {
            return Err(malformed(
                "subnet",
                &subnet,
                "IPv4-mapped addresses are IPv4 addresses; write the IPv4 prefix",
            ));
        }
        let inside = |ip: &IpAddr| subnet.contains(ip);
        let outside = || ConfigFault::OutsideSubnet { subnet };

        let mut given = Vec::with_capacity(self.ranges.len());
        for (key, ranges) in [("ranges", &self.ranges), ("exclude", &self.exclude)] {
            for (i, range) in ranges.iter().enumerate() {
                let field = format!("{key}[{i}]");
                if !inside(&range.first) || !inside(&range.last) {
                    return Err(error(&field, range, outside()));
                }
                if raw(range.first) > raw(range.last) {
                    return Err(error(&field, range, ConfigFault::Reversed));
                }
                if key == "ranges" {
                    given.push((raw(range.first), raw(range.last)));
                }
            }
        }
        let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        if let Some(gateway) = &self.gateway
            && !inside(gateway)
            && !(self.delegate.is_some() && family == Family::V6 && link_local(gateway))
        {
            return Err(error("gateway", gateway, outside()));
        }

        if let Some(select) = &self.select {
            select.check(&format!("{path}.select"))?;
        }
        if let Some(group) = &self.group
            && let Some(reason) = name_fault(group)
        {
            return Err(malformed("group", group, reason));
        }
        if let Some(mtu) = self.mtu
            && family == Family::V6
            && mtu.get() < Mtu::IPV6_MIN
        {
            let reason = format!("IPv6 needs at least {} bytes (RFC 8200, section 5)", Mtu::IPV6_MIN);
            return Err(malformed("mtu", &mtu, &reason));
        }

        let shares = |length: u8| (subnet.prefix_len().max(1)..=family.bits()).contains(&length);
        let block = match &self.block {
            None => None,
            Some(BlockConfig { borrow: Some(true), owner: BlockOwner::Application, .. }) => {
                let reason = "what is in an application's block is nobody else's; drop it, or let nodes own the blocks";
                return Err(malformed("block.borrow", &true, reason));
            }
            Some(BlockConfig { size, borrow, owner }) => match size.length(family).filter(|length| shares(*length)) {
                Some(length) => {
                    let borrow = borrow.unwrap_or(*owner == BlockOwner::Node);
                    Some(Blocks { length, borrow, owner: *owner })
                }
                None => {
                    let reason = format!(
                        "write a power of two of addresses, or / and a prefix length, from /{} to /{}",
                        subnet.prefix_len().max(1),
                        family.bits()
                    );
                    return Err(malformed("block.size", size, &reason));
                }
            },
        };
        let delegate = self.delegate;
        if let Some(length) = delegate {
            if !shares(length) {
                let reason = format!("write a prefix length from {} to {}", subnet.prefix_len().max(1), family.bits());
                return Err(malformed("delegate", &length, &reason));
            }
            if block.is_some() {
                return Err(malformed(
                    "delegate",
                    &length,
                    "a pool of blocks hands out addresses; drop one of the two",
                ));
            }
        }
        for (text, wish) in &self.claims {
            let Some(address) = wish.address.map(Addr::from) else { continue };
            let field = format!("claims[{text:?}].address");
            let covers = |r: &&Reserved| r.space == space && (r.first..=r.last).contains(&address);
            if let Some(other) = set_aside.iter().find(covers) {
                let fault = ConfigFault::Duplicate { by: format!("reservation {}", other.holder) };
                return Err(error(&field, &address, fault));
            }
            let host_bits = delegate.map_or(0, |length| u32::from(family.bits() - length));
            if inside(&address.ip()) && host_bits > 0 {
                let first = address.bits >> host_bits << host_bits | u128::from(host_bits > 1);
                if address.bits != first {
                    let first = Addr { family, bits: first };
                    let reason = format!("a claim of a prefix names its first address; write {first}");
                    return Err(malformed(&field, &address, &reason));
                }
            }
        }

        // What nobody may have, each with its reason.
        let one = |number: u128| (number, number);
        let mut reserved: Vec<(Interval, &'static str)> = Vec::new();
        match family {
            // Nobody is on a link with the whole subnet: each prefix has a link of its own.
            _ if delegate.is_some() => {}
            Family::V4 if subnet.prefix_len() < 31 => {
                reserved.push((one(whole.0), "the network address"));
                reserved.push((one(whole.1), "the broadcast address"));
            }
            Family::V6 if subnet.prefix_len() < 127 => {
                reserved.push((one(whole.0), "the subnet-router anycast address"));
            }
            _ => {}
        }
        if family == Family::V6 {
            reserved.push((MAPPED, "an IPv4-mapped address"));
        }
        let gateway = self.gateway.filter(inside);
        reserved.extend(gateway.map(|ip| (one(raw(ip)), "the pool's gateway")));
        reserved.extend(self.exclude.iter().map(|r| ((raw(r.first), raw(r.last)), "excluded")));

        let claims::Checked { claims, sets, fixed } = claims::check(self, path, &reserved)?;

        let mut ranges = if given.is_empty() { vec![whole] } else { given };
        let mut reserved: Vec<Interval> = reserved.into_iter().map(|(interval, _)| interval).collect();
        let elsewhere = set_aside.iter().filter(|r| r.space == space && r.first.family == family);
        reserved.extend(elsewhere.map(|r| (r.first.bits, r.last.bits)));
        let host = delegate.and_then(|length| u128::MAX.checked_shr(u32::from(128 - family.bits() + length)));
        let host = host.unwrap_or(0);
        if delegate.is_some() {
            // Only whole prefixes are handed out, and none of which a part is not to be.
            ranges = Intervals::new(ranges)
                .iter()
                .filter_map(|(low, high)| {
                    let low = if low & host == 0 { low } else { (low | host).checked_add(1)? };
                    let high = if high & host == host { high } else { (high & !host).checked_sub(1)? };
                    (low <= high).then_some((low, high))
                })
                .collect();
            reserved = reserved.into_iter().map(|(low, high)| (low & !host, high | host)).collect();
        }
        let reserved = Intervals::new(reserved);
        let fixed = Intervals::new(fixed.into_iter().map(one).collect());
        let usable = Intervals::new(ranges.clone()).without(&reserved);
        // Who has the first address of a prefix has all of it.
        let taken = Intervals::new(fixed.iter().map(|(low, high)| (low & !host, high | host)).collect());
        let free = usable.without(&taken);
        let allowed = Intervals::new(usable.iter().chain(fixed.iter()).collect());
        if allowed.size() == 0 {
            let (field, value) = match self.ranges.first() {
                Some(range) => ("ranges", range.to_string()),
                None => ("subnet", subnet.to_string()),
            };
            return Err(error(field, &value, ConfigFault::Empty));
        }
        Ok(Pool {
            name: self.name.clone(),
            space,
            subnet,
            gateway: self.gateway,
            routes: self.routes.clone(),
            dns: self.dns.clone(),
            free,
            allowed,
            claims,
            sets,
            select: self.select.clone(),
            priority: self.priority,
            fallback: self.fallback,
            group: self.group.clone(),
            vlan: self.vlan,
            mtu: self.mtu,
            block,
            delegate,
        })
    }
}

pub(crate) use duration_text::parse as parse_duration;

/// Durations as `500ms`, `5s`, `2m` or `1h`.
pub(crate) mod duration_text {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(value: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(duration) => serializer.collect_str(&format_args!("{}ms", duration.as_millis())),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        parse(&text).map(Some).ok_or_else(|| {
            D::Error::custom(format!("{text:?} is no duration; write a number with ms, s, m or h, as 5s"))
        })
    }

    pub(crate) fn parse(text: &str) -> Option<Duration> {
        let digits = text.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = text[..digits].parse().ok()?;
        let unit = match &text[digits..] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return None,
        };
        Some(Duration::from_millis(number.checked_mul(unit)?))
    }
}
