//! What is handed out, to whom, and for how long: address spaces, pools, claims and bindings.

mod address;
mod claim;
mod pool;

use std::fmt;
use std::str::FromStr;

use dcenet_core::model::{AttachmentKey, ParseError, Workload};
use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use self::address::{Addr, AddressSpace, Family, Intervals};
pub(crate) use self::address::{Interval, name_fault};
pub(crate) use self::claim::pod_owner;
pub use self::claim::{Claim, ClaimKey, ClaimSet, KeepPolicy, MacWish, Members};
pub use self::pool::{BlockOwner, Blocks, Pool};

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
