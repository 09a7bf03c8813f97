//! Numbers with a meaning.

use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::ParseError;

/// The index of an interface, unique inside one network namespace only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IfIndex(NonZeroU32);

impl IfIndex {
    /// Wraps an index; 0 means "none" to the kernel and is no index.
    pub const fn new(index: u32) -> Option<Self> {
        match NonZeroU32::new(index) {
            Some(index) => Some(Self(index)),
            None => None,
        }
    }

    /// The index as the kernel takes it.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for IfIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The largest network-layer packet of a link, in bytes, without the Ethernet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Mtu(u32);

impl Mtu {
    /// The smallest MTU on which IPv6 runs (RFC 8200, section 5).
    pub const IPV6_MIN: u32 = 1280;

    /// The value in bytes.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Mtu {
    type Error = ParseError;

    fn try_from(value: u32) -> Result<Self, ParseError> {
        if (68..=65_535).contains(&value) {
            Ok(Self(value))
        } else {
            Err(ParseError::new("MTU", value.to_string(), "not between 68 (RFC 791) and 65535 bytes"))
        }
    }
}

impl From<Mtu> for u32 {
    fn from(mtu: Mtu) -> u32 {
        mtu.0
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A VLAN (IEEE 802.1Q, clause 9.6): 1 to 4094. 0 means "no VLAN, only a priority", and 4095 is reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct VlanId(u16);

impl VlanId {
    /// The number, 1 to 4094.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u16> for VlanId {
    type Error = ParseError;

    fn try_from(value: u16) -> Result<Self, ParseError> {
        if (1..=4094).contains(&value) {
            Ok(Self(value))
        } else {
            Err(ParseError::new("VLAN", value.to_string(), "not between 1 and 4094 (0 and 4095 are reserved)"))
        }
    }
}

impl From<VlanId> for u16 {
    fn from(vlan: VlanId) -> u16 {
        vlan.0
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// VLANs without a gap: `{ "id": 7 }`, or `{ "minID": 100, "maxID": 199 }`, as the reference plugin `bridge` has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WrittenRange", into = "WrittenRange")]
pub struct VlanRange {
    first: VlanId,
    last: VlanId,
}

impl VlanRange {
    /// From `first` to `last`.
    ///
    /// # Errors
    /// Where `first` is the greater one.
    pub fn new(first: VlanId, last: VlanId) -> Result<Self, ParseError> {
        if first <= last {
            Ok(Self { first, last })
        } else {
            Err(ParseError::new(
                "VLANs",
                format!("{first} to {last}"),
                "begin after they end; exchange minID and maxID",
            ))
        }
    }

    /// The first.
    pub const fn first(self) -> VlanId {
        self.first
    }

    /// The last, which may be the first.
    pub const fn last(self) -> VlanId {
        self.last
    }

    /// All of them.
    pub fn ids(self) -> std::ops::RangeInclusive<u16> {
        self.first.get()..=self.last.get()
    }
}

impl From<VlanId> for VlanRange {
    fn from(vlan: VlanId) -> Self {
        Self { first: vlan, last: vlan }
    }
}

impl fmt::Display for VlanRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.first, self.last) {
            (first, last) if first == last => first.fmt(f),
            (first, last) => write!(f, "{first}-{last}"),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRange {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<VlanId>,
    #[serde(default, rename = "minID", skip_serializing_if = "Option::is_none")]
    first: Option<VlanId>,
    #[serde(default, rename = "maxID", skip_serializing_if = "Option::is_none")]
    last: Option<VlanId>,
}

impl TryFrom<WrittenRange> for VlanRange {
    type Error = ParseError;

    fn try_from(written: WrittenRange) -> Result<Self, ParseError> {
        match (written.id, written.first, written.last) {
            (Some(id), None, None) => Ok(id.into()),
            (None, Some(first), Some(last)) => Self::new(first, last),
            _ => Err(ParseError::new(
                "VLANs",
                String::new(),
                "neither `id` alone nor `minID` with `maxID`; give one of these",
            )),
        }
    }
}

impl From<VlanRange> for WrittenRange {
    fn from(range: VlanRange) -> Self {
        let (first, last) = (Some(range.first), Some(range.last));
        if first == last { Self { id: first, first: None, last: None } } else { Self { id: None, first, last } }
    }
}
