//! What is handed out, to whom, and for how long: address spaces, pools, claims and bindings.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::time::Duration;

use dcenet_core::model::{AttachmentKey, IfName, MacAddr, Mtu, ParseError, VlanId, Workload};
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

impl Serialize for AddressSpace {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AddressSpace {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
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

    /// What is in `self` and in the interval.
    pub(crate) fn within(&self, low: u128, high: u128) -> Self {
        let first = self.0.partition_point(|part| part.1 < low);
        let parts = self.0[first..].iter().take_while(|part| part.0 <= high);
        Self(parts.map(|part| (part.0.max(low), part.1.min(high))).collect())
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
    /// The blocks that nodes own in it.
    pub block: Option<Blocks>,
    /// The length of the prefixes that it hands out instead of addresses.
    pub delegate: Option<u8>,
}

/// How nodes own parts of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// The prefix length of a block.
    pub length: u8,
    /// Whether a node gets addresses of other nodes' blocks when its own are full and no block is left.
    pub borrow: bool,
}

impl Pool {
    /// The family of its addresses.
    pub fn family(&self) -> Family {
        Family::of(&self.subnet)
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

/// Whom a claim is for: a workload, and which of its interfaces. It outlives containers.
///
/// As text `namespace/name`, or `namespace/name/interface`. The claims that a set of replicas shares
/// ([`Members::Replica`]) are numbered: `namespace/name#2`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimKey {
    /// The workload.
    pub workload: Workload,
    /// The place in a set whose addresses any replica of the workload may use.
    pub place: Option<u32>,
    /// The interface inside the container; `None` for whichever interface is attached.
    pub ifname: Option<IfName>,
}

impl ClaimKey {
    /// Of a workload with whichever interface.
    pub fn new(workload: Workload) -> Self {
        Self { workload, place: None, ifname: None }
    }

    /// The same on one interface.
    #[must_use]
    pub fn on(self, ifname: IfName) -> Self {
        Self { ifname: Some(ifname), ..self }
    }
}

impl fmt::Display for ClaimKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.workload.fmt(f)?;
        if let Some(place) = self.place {
            write!(f, "#{place}")?;
        }
        match &self.ifname {
            Some(ifname) => write!(f, "/{ifname}"),
            None => Ok(()),
        }
    }
}

impl FromStr for ClaimKey {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let fault = |reason| ParseError { kind: "claim", value: s.to_owned(), reason };
        let mut parts = s.splitn(3, '/');
        let (namespace, name) = (parts.next().unwrap_or_default(), parts.next());
        let name = name.ok_or_else(|| fault("not of the form namespace/name or namespace/name/interface"))?;
        let (name, place) = match name.split_once('#') {
            Some((name, place)) => {
                (name, Some(number(place).ok_or_else(|| fault("has no number after '#', as in shop/web#2"))?))
            }
            None => (name, None),
        };
        let workload = Workload::new(namespace, name)?;
        Ok(Self { workload, place, ifname: parts.next().map(str::parse).transpose()? })
    }
}

/// A decimal number in its one form: without sign and leading zeros.
fn number(text: &str) -> Option<u32> {
    let number = text.parse().ok()?;
    (u32::to_string(&number) == text).then_some(number)
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
///
/// As JSON `"ephemeral"`, `"workload"`, a duration as `"72h"` or `{ "for": "72h" }`, or `"forever"`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeepPolicy {
    /// Not at all: the address goes back when its attachment goes.
    Ephemeral,
    /// While the workload exists: until somebody says that it is gone ([`Ipam::workload_gone`](crate::Ipam::workload_gone),
    /// or a [`Reclaimer`](crate::reclaim::Reclaimer) that is shown all workloads).
    Workload,
    /// For this time after the release, in whole milliseconds. Then the address counts as released, though its claim
    /// finds it again as long as nobody else took it. Only clocks tell when; one that jumps delays or hastens the end
    /// and can do nothing else: whoever takes the address does so under the guard of its slot.
    For(Duration),
    /// Until the claim is forgotten.
    #[default]
    Forever,
}

impl Serialize for KeepPolicy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Ephemeral => serializer.serialize_str("ephemeral"),
            Self::Workload => serializer.serialize_str("workload"),
            Self::For(time) => serializer.collect_str(&format_args!("{}ms", time.as_millis())),
            Self::Forever => serializer.serialize_str("forever"),
        }
    }
}

impl<'de> Deserialize<'de> for KeepPolicy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "keep is neither a text nor an object; write forever, workload, ephemeral, 72h \
                                       or { \"for\": \"72h\" }"
        )]
        enum Written {
            Text(String),
            Timed(Timed),
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Timed {
            #[serde(rename = "for")]
            time: String,
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Text(text) => match text.as_str() {
                "ephemeral" => return Ok(Self::Ephemeral),
                "workload" => return Ok(Self::Workload),
                "forever" => return Ok(Self::Forever),
                _ => text,
            },
            Written::Timed(Timed { time }) => time,
        };
        let time = crate::config::parse_duration(&text).filter(|time| !time.is_zero());
        time.map(Self::For).ok_or_else(|| {
            D::Error::custom(format!(
                "keep {text:?} is not accepted; write forever, workload, ephemeral, or a time with ms, s, m or h, as 72h"
            ))
        })
    }
}

/// Which MAC address a claim keeps with its address.
///
/// As JSON `"from-address"`, or an address as `"02:00:00:00:00:07"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MacWish {
    /// Told by the address, so that no two of a link are alike: `0a:58` and the four bytes of an IPv4 address, or `0e`
    /// and the last five bytes of an IPv6 address, which differ between the addresses of a link where interface
    /// identifiers (RFC 4291, section 2.5.1) differ in their last 40 bits. Both are locally administered.
    FromAddress,
    /// This one.
    Fixed(MacAddr),
}

impl MacWish {
    /// The MAC address that comes with an address.
    pub fn of(self, address: Addr) -> MacAddr {
        match self {
            Self::Fixed(mac) => mac,
            Self::FromAddress => {
                let bytes = address.bits.to_be_bytes();
                let [.., v, w, x, y, z] = bytes;
                MacAddr::new(match address.family {
                    Family::V4 => [0x0a, 0x58, w, x, y, z],
                    Family::V6 => [0x0e, v, w, x, y, z],
                })
            }
        }
    }
}

impl FromStr for MacWish {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        if s == "from-address" { Ok(Self::FromAddress) } else { MacAddr::for_device(s).map(Self::Fixed) }
    }
}

impl fmt::Display for MacWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FromAddress => f.write_str("from-address"),
            Self::Fixed(mac) => mac.fmt(f),
        }
    }
}

impl Serialize for MacWish {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacWish {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
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
    /// The MAC address that comes with it, over restarts and migrations; `None` for one of the attachment's own.
    pub mac: Option<MacWish>,
}

/// How the members of a claim set are recognised. All that is known of a workload is its `namespace/name`, so the name
/// tells, in the forms that Kubernetes gives to pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Members {
    /// `NAME-0`, `NAME-1` and so on, the pods of a StatefulSet: each has an address of its own. Those of ordinals that
    /// were scaled down are kept.
    Ordinal,
    /// `NAME-RANDOM` or `NAME-HASH-RANDOM`, the pods of a ReplicaSet, DaemonSet or Deployment: 5 random characters and a
    /// hash of up to 10, of the consonants and digits that Kubernetes draws from (`bcdfghjklmnpqrstvwxz2456789`). All
    /// share the addresses of the set; whichever is free is taken. A rolling update needs as many addresses more as it
    /// surges.
    Replica,
}

/// Claims for all pods of a StatefulSet or Deployment. As text `namespace/name-*`, or `namespace/name-*/interface`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimSet {
    /// The name of what owns the pods, and which interface of theirs.
    pub owner: ClaimKey,
    /// Which workloads belong to it.
    pub members: Members,
    /// How many addresses it has, each a claim of the pool; `None` if each member keeps whichever it got first.
    pub size: Option<u32>,
    /// As of a claim.
    pub keep: KeepPolicy,
    /// As of a claim.
    pub mac: Option<MacWish>,
}

impl ClaimSet {
    /// Whether a workload is a member.
    pub fn has(&self, workload: &Workload) -> bool {
        let owner = &self.owner.workload;
        workload.namespace() == owner.namespace()
            && workload.name().strip_prefix(owner.name()).and_then(|rest| rest.strip_prefix('-')).is_some_and(
                |suffix| match self.members {
                    Members::Ordinal => number(suffix).is_some(),
                    Members::Replica => is_replica_suffix(suffix),
                },
            )
    }

    /// The claim of the member with this ordinal.
    pub(crate) fn ordinal(&self, ordinal: u32) -> Result<ClaimKey, ParseError> {
        let owner = &self.owner.workload;
        let workload = Workload::new(owner.namespace(), &format!("{}-{ordinal}", owner.name()))?;
        Ok(ClaimKey { workload, place: None, ifname: self.owner.ifname.clone() })
    }
}

impl fmt::Display for ClaimSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-*", self.owner.workload)?;
        match &self.owner.ifname {
            Some(ifname) => write!(f, "/{ifname}"),
            None => Ok(()),
        }
    }
}

/// Whether Kubernetes may have made it: `SafeEncodeString` and `String` of `k8s.io/apimachinery/pkg/util/rand`.
fn is_replica_suffix(suffix: &str) -> bool {
    let drawn = |text: &str| text.bytes().all(|b| b"bcdfghjklmnpqrstvwxz2456789".contains(&b));
    match suffix.split_once('-') {
        Some((hash, random)) => (1..=10).contains(&hash.len()) && random.len() == 5 && drawn(hash) && drawn(random),
        None => suffix.len() == 5 && drawn(suffix),
    }
}

/// A machine that attachments are on.
///
/// 1 to 253 letters, digits, `-`, `_` and `.`, as Kubernetes names nodes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if (1..=253).contains(&s.len()) && s.bytes().all(good) {
            return Ok(Self(s.to_owned()));
        }
        let reason = "not 1 to 253 letters, digits, '-', '_' and '.'";
        Err(ParseError { kind: "node", value: s.to_owned(), reason })
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for NodeName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NodeName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
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
    /// The node that it is on, where whoever leased told ([`Ipam::on_node`](crate::Ipam::on_node)).
    pub node: Option<NodeName>,
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
    fn a_mac_address_told_by_the_address_differs_where_the_address_does() {
        let mac = |ip: &str| MacWish::FromAddress.of(Addr::from(ip.parse::<IpAddr>().unwrap())).to_string();
        assert_eq!(mac("10.20.0.11"), "0a:58:0a:14:00:0b");
        assert_eq!(mac("fd00::1:203:405"), "0e:01:02:03:04:05");
        assert_ne!(mac("fd00::1"), mac("fd00::2"));
        assert_eq!("02:00:00:00:00:07".parse::<MacWish>().unwrap().to_string(), "02:00:00:00:00:07");
        "01:00:5e:00:00:01".parse::<MacWish>().unwrap_err();
    }

    #[test]
    fn members_of_a_set_are_told_by_the_names_that_their_owner_gives_them() {
        let set = |members| ClaimSet {
            owner: "shop/web".parse().unwrap(),
            members,
            size: None,
            keep: KeepPolicy::Forever,
            mac: None,
        };
        let has = |members, name: &str| set(members).has(&name.parse().unwrap());
        for member in ["shop/web-0", "shop/web-17"] {
            assert!(has(Members::Ordinal, member), "{member}");
        }
        for stranger in ["shop/web", "shop/web-00", "shop/web-1-2", "shop/web-x", "ops/web-0", "shop/webs-0"] {
            assert!(!has(Members::Ordinal, stranger), "{stranger}");
        }
        for member in ["shop/web-7d9f8c6b5-x2x4z", "shop/web-x2x4z"] {
            assert!(has(Members::Replica, member), "{member}");
        }
        // Another Deployment's name may begin alike.
        for stranger in ["shop/web-admin-7d9f8c6b5-x2x4z", "shop/web-0", "shop/web-abcde", "shop/web-admin-x2x4z"] {
            assert!(!has(Members::Replica, stranger), "{stranger}");
        }
    }

    #[test]
    fn keep_policies_are_read_in_every_form_and_written_in_one() {
        let read = |json: &str| serde_json::from_str::<KeepPolicy>(json);
        let days = KeepPolicy::For(Duration::from_secs(72 * 3600));
        for (json, policy) in [
            (r#""forever""#, KeepPolicy::Forever),
            (r#""workload""#, KeepPolicy::Workload),
            (r#""ephemeral""#, KeepPolicy::Ephemeral),
            (r#""72h""#, days),
            (r#"{ "for": "72h" }"#, days),
        ] {
            assert_eq!(read(json).unwrap(), policy);
            assert_eq!(read(&serde_json::to_string(&policy).unwrap()).unwrap(), policy);
        }
        for bad in [r#""always""#, r#""0s""#, r#"{ "for": 3 }"#, r#"{ "for": "3d" }"#, "7", r#""72""#] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains("72h"), "{bad}: {error}");
        }
    }

    #[test]
    fn claims_name_a_workload_and_perhaps_an_interface() {
        for good in ["shop/db", "shop/db-0.replica/net1", "shop/web#2", "shop/web#0/net1"] {
            assert_eq!(good.parse::<ClaimKey>().unwrap().to_string(), good);
        }
        for bad in ["shop", "shop/", "shop/db/", "shop/db/a/b", "Shop/db", "shop/web#", "shop/web#01", "shop/web#x"] {
            bad.parse::<ClaimKey>().unwrap_err();
        }
    }
}
