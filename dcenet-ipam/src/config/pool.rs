//! Pools as written, and their check.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use dcenet_core::model::{Mtu, VlanId};
use dcenet_core::provider::{Dns, LeasedRoute};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{AddressRange, ClaimConfig, ConfigError, ConfigFault, Reserved, claims};
use crate::model::{Addr, AddressSpace, BlockOwner, Blocks, Family, Interval, Intervals, Pool, name_fault};
use crate::select::Selector;

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
    /// [`IpamConfig::node`](super::IpamConfig::node).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<BlockConfig>,
    /// Hands out prefixes of this length instead of addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delegate: Option<u8>,
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

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

fn is_zero(value: &i32) -> bool {
    *value == 0
}

impl Pool {
    pub(super) fn check_beside(&self, other: &Self, path: &str) -> Result<(), ConfigError> {
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
pub(super) fn raw(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

/// `::ffff:0:0/96`: these addresses are IPv4 addresses.
const MAPPED: Interval = (0xffff_0000_0000, 0xffff_ffff_ffff);

impl PoolConfig {
    pub(super) fn check(&self, path: &str, set_aside: &[Reserved]) -> Result<Pool, ConfigError> {
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
