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
//! whom a pool serves ([`Selector`](crate::select::Selector)); a pool without it serves anybody. An exhausted pool falls
//! through to the next unless it says `"fallback": false`. A family none of whose pools serves the attachment is an error
//! that tells what was compared. A claim's address stays in its pool, whomever the pool selects.
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
mod pool;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::provider::{Dns, LeaseError, LeasedRoute};
use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use self::claims::{ClaimConfig, HistoryConfig};
pub(crate) use self::pool::overlap;
pub use self::pool::{BlockConfig, BlockSize, PoolConfig};
use crate::model::{Addr, AddressSpace, Family, Pool};
use crate::select::Node;
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
    /// The node that asks, for pools that select by node and for blocks; `Ipam::on_node` goes before it. The CNI plugin
    /// takes the host name where nothing is said, so that one configuration serves all nodes.
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

impl IpamConfig {
    /// The node that asks: the one that is told, else this machine by its host name; `None` where that is none that a node may
    /// have.
    pub fn owner(&self) -> Option<Node> {
        self.node.clone().or_else(Node::of_this_machine)
    }
}

impl StoreConfig {
    /// Whether what it keeps is there when the process has ended.
    pub fn outlives_process(&self) -> bool {
        match self {
            Self::Etcd(_) | Self::Log { .. } => true,
            Self::Memory {} => false,
        }
    }

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
