//! What is handed out, to whom, and for how long: address spaces, pools, claims and bindings.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use dcenet_core::model::{AttachmentKey, IfName, Mtu, ParseError, VlanId, Workload};
use dcenet_core::provider::{Dns, LeasedRoute};
use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::select::{Selector, Subject};

/// A routing domain: an address means one thing inside it, and may mean another in the next.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressSpace(String);

impl AddressSpace {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for AddressSpace {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl FromStr for AddressSpace {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        match name_fault(s) {
            Some(reason) => Err(ParseError { kind: "address space", value: s.to_owned(), reason }),
            None => Ok(Self(s.to_owned())),
        }
    }
}

impl fmt::Display for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is no name of a pool or space.
pub(crate) fn name_fault(s: &str) -> Option<&'static str> {
    if s.is_empty() || s.len() > 63 {
        Some("not 1 to 63 bytes long")
    } else if !s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        Some("has a character other than letters, digits, '-', '_' and '.'")
    } else {
        None
    }
}

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Bits of an address.
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// The highest address as a number.
    pub const fn last(self) -> u128 {
        match self {
            Self::V4 => u32::MAX as u128,
            Self::V6 => u128::MAX,
        }
    }

    /// The family of a prefix.
    pub const fn of(subnet: &IpNet) -> Self {
        match subnet {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// An address as a number with its family, so that one arithmetic serves both.
///
/// An IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2) becomes the IPv4 address that it stands for, so that no
/// address has two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Addr {
    /// The family.
    pub family: Family,
    /// The address; below 2^32 for IPv4.
    pub bits: u128,
}

impl Addr {
    /// The usual form.
    pub fn ip(self) -> IpAddr {
        match self.family {
            // `bits` of IPv4 come from an Ipv4Addr or from an interval within 32 bits.
            Family::V4 => IpAddr::V4(Ipv4Addr::from(self.bits as u32)),
            Family::V6 => IpAddr::V6(Ipv6Addr::from(self.bits)),
        }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Self { family: Family::V4, bits: u32::from(ip).into() },
            IpAddr::V6(ip) => Self { family: Family::V6, bits: ip.into() },
        }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

/// First and last number of an interval, both in it.
pub(crate) type Interval = (u128, u128);

/// A set of numbers as sorted, disjoint, non-adjacent intervals.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Intervals(Vec<Interval>);

impl Intervals {
    /// The union of the given intervals.
    pub(crate) fn new(mut parts: Vec<Interval>) -> Self {
        parts.sort_unstable();
        let mut joined: Vec<Interval> = Vec::with_capacity(parts.len());
        for (low, high) in parts {
            match joined.last_mut() {
                Some(last) if last.1.checked_add(1).is_none_or(|next| low <= next) => last.1 = last.1.max(high),
                _ => joined.push((low, high)),
            }
        }
        Self(joined)
    }

    /// What is in `self` and not in `other`.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut left = Vec::with_capacity(self.0.len());
        for &(low, high) in &self.0 {
            let mut low = Some(low);
            let first = other.0.partition_point(|hole| Some(hole.1) < low);
            for &(hole_low, hole_high) in &other.0[first..] {
                let Some(from) = low.filter(|from| *from <= high) else { break };
                if hole_low > high {
                    break;
                }
                if hole_low > from {
                    left.push((from, hole_low - 1));
                }
                low = hole_high.checked_add(1);
            }
            if let Some(from) = low.filter(|from| *from <= high) {
                left.push((from, high));
            }
        }
        Self(left)
    }

    /// Whether the number is in one of them.
    pub fn contains(&self, number: u128) -> bool {
        let after = self.0.partition_point(|(low, _)| *low <= number);
        after > 0 && self.0[after - 1].1 >= number
    }

    /// How many numbers they hold, `u128::MAX` for all 2^128.
    pub fn size(&self) -> u128 {
        self.0.iter().fold(0, |sum: u128, (low, high)| sum.saturating_add((high - low).saturating_add(1)))
    }

    /// The intervals in order.
    pub fn iter(&self) -> impl Iterator<Item = (u128, u128)> + '_ {
        self.0.iter().copied()
    }
}

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
    /// The claims that the configuration makes in this pool.
    pub claims: Vec<Claim>,
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
}

impl Pool {
    /// The family of its addresses.
    pub fn family(&self) -> Family {
        Family::of(&self.subnet)
    }

    /// How many addresses it could have in use.
    pub fn size(&self) -> u128 {
        self.allowed.size()
    }

    /// Why it does not serve the subject; `None` if it does.
    pub(crate) fn mismatch(&self, subject: &Subject<'_>) -> Option<String> {
        self.select.as_ref().and_then(|select| select.mismatch(subject))
    }
}

/// Whom a claim is for: a workload, and which of its interfaces. It outlives containers.
///
/// As text `namespace/name`, or `namespace/name/interface`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimKey {
    /// The workload.
    pub workload: Workload,
    /// The interface inside the container; `None` for whichever interface is attached.
    pub ifname: Option<IfName>,
}

impl fmt::Display for ClaimKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.ifname {
            Some(ifname) => write!(f, "{}/{ifname}", self.workload),
            None => self.workload.fmt(f),
        }
    }
}

impl FromStr for ClaimKey {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let mut parts = s.splitn(3, '/');
        let (namespace, name) = (parts.next().unwrap_or_default(), parts.next());
        let name = name.ok_or_else(|| ParseError {
            kind: "claim",
            value: s.to_owned(),
            reason: "not of the form namespace/name or namespace/name/interface",
        })?;
        let workload = Workload::new(namespace, name)?;
        Ok(Self { workload, ifname: parts.next().map(str::parse).transpose()? })
    }
}

impl Serialize for ClaimKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ClaimKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// How long a claim keeps its address once nothing is attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum KeepPolicy {
    /// Not at all: the address goes back when its attachment goes.
    Ephemeral,
    /// Until the claim is forgotten.
    #[default]
    Forever,
}

/// A workload's wish for an address of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// For whom.
    pub key: ClaimKey,
    /// The address; `None` for whichever is free at the first lease, from then on the same.
    pub address: Option<Addr>,
    /// What becomes of the address after release.
    pub keep: KeepPolicy,
}

/// An address in use by an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Who uses it.
    pub attachment: AttachmentKey,
    /// The workload behind, where known.
    pub workload: Option<Workload>,
    /// The routing domain.
    pub space: AddressSpace,
    /// The address with its subnet's prefix length.
    pub address: IpNet,
    /// The pool.
    pub pool: String,
    /// Never used twice: the store revision that made the binding.
    pub sequence: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_subtract_at_the_edges_of_the_number_line() {
        let all = Intervals::new(vec![(0, u128::MAX)]);
        assert_eq!(all.size(), u128::MAX);
        let ends = Intervals::new(vec![(0, 0), (u128::MAX, u128::MAX)]);
        let inner = all.without(&ends);
        assert_eq!(inner.iter().collect::<Vec<_>>(), [(1, u128::MAX - 1)]);
        assert!(!inner.contains(0) && inner.contains(1) && !inner.contains(u128::MAX));
        assert_eq!(all.without(&all).iter().count(), 0);
        assert_eq!(Intervals::new(vec![(5, 9), (0, 4), (7, 12)]).iter().collect::<Vec<_>>(), [(0, 12)]);
        let holes = Intervals::new(vec![(3, 4), (8, 20)]);
        assert_eq!(
            Intervals::new(vec![(0, 9), (15, 30)]).without(&holes).iter().collect::<Vec<_>>(),
            [(0, 2), (5, 7), (21, 30)]
        );
    }

    #[test]
    fn mapped_addresses_are_the_address_they_map() {
        let mapped: IpAddr = "::ffff:10.0.0.5".parse().unwrap();
        assert_eq!(Addr::from(mapped), Addr::from("10.0.0.5".parse::<IpAddr>().unwrap()));
        assert_eq!(Addr::from(mapped).ip().to_string(), "10.0.0.5");
    }

    #[test]
    fn claims_name_a_workload_and_perhaps_an_interface() {
        for good in ["shop/db", "shop/db-0.replica/net1"] {
            assert_eq!(good.parse::<ClaimKey>().unwrap().to_string(), good);
        }
        for bad in ["shop", "shop/", "shop/db/", "shop/db/a/b", "Shop/db"] {
            bad.parse::<ClaimKey>().unwrap_err();
        }
    }
}
