//! Routing domains, families, addresses as numbers, and sets of them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use dcenet_core::model::ParseError;
use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

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
        Self(self.parts_within(low, high).collect())
    }

    /// The same, one by one.
    pub(crate) fn parts_within(&self, low: u128, high: u128) -> impl Iterator<Item = Interval> {
        let parts = self.0[self.position(low)..].iter().take_while(move |part| part.0 <= high);
        parts.map(move |part| (part.0.max(low), part.1.min(high)))
    }

    /// How many of the intervals end before the number.
    pub(crate) fn position(&self, number: u128) -> usize {
        self.0.partition_point(|part| part.1 < number)
    }

    /// The n-th interval.
    pub(crate) fn nth(&self, n: usize) -> Option<Interval> {
        self.0.get(n).copied()
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
}
