//! Keys and values in the store.
//!
//! | Key | Value |
//! |---|---|
//! | `e/SPACE` | [`SpaceRecord`]: the pools of an address space, guarded by everyone who leases from it |
//! | `s/SPACE/F` + address (16 bytes) | [`SlotRecord`]: what an address is used for |
//! | `t/NETWORK/CONTAINER/IFNAME` | [`AttachmentRecord`]: what an attachment holds; its version is the sequence |
//! | `c/SPACE/F/CLAIM` | [`ClaimRecord`]: the address that a claim keeps |
//! | `f/SPACE/F/POOL/` + time (8 bytes) + address (16 bytes) | empty: released addresses, oldest first |
//!
//! `F` is `4` or `6`; numbers in keys are big-endian. Values are JSON, so that a store can be read by people and fields
//! can be added.

use std::net::IpAddr;

use dcenet_core::model::{AttachmentKey, NetworkName, Workload};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::model::{Addr, AddressSpace, ClaimKey, Family, KeepPolicy};
use crate::store::{Key, numbered};

/// What an address is used for. An address without a record was not used lately.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum SlotRecord {
    /// An attachment uses it.
    Bound {
        #[serde(with = "attachment_text")]
        by: AttachmentKey,
        /// The claim through which it does.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        claim: Option<ClaimKey>,
    },
    /// A claim keeps it while nothing is attached.
    Kept { claim: ClaimKey },
    /// Released at a time (milliseconds since 1970), and in the queue of that pool.
    Freed { at: u64, pool: String },
}

/// What an attachment holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AttachmentRecord {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) workload: Option<Workload>,
    pub(crate) addresses: Vec<Held>,
}

/// One address of an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Held {
    /// Absent for the default space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) space: Option<String>,
    pub(crate) address: IpNet,
    pub(crate) pool: String,
}

impl Held {
    pub(crate) fn new(space: &AddressSpace, address: IpNet, pool: &str) -> Self {
        let space = (*space != AddressSpace::default()).then(|| space.to_string());
        Self { space, address, pool: pool.to_owned() }
    }

    /// The slot; `None` if the record's space is no name, which no version of this crate writes.
    pub(crate) fn slot(&self) -> Option<(AddressSpace, Addr)> {
        let space = match &self.space {
            None => AddressSpace::default(),
            Some(text) => text.parse().ok()?,
        };
        Some((space, Addr::from(self.address.addr())))
    }
}

/// The address that a claim keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClaimRecord {
    pub(crate) address: IpAddr,
    pub(crate) pool: String,
    pub(crate) keep: KeepPolicy,
}

/// The pools of an address space.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SpaceRecord {
    pub(crate) pools: Vec<RegisteredPool>,
}

/// A pool as others must respect it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RegisteredPool {
    pub(crate) name: String,
    pub(crate) subnet: IpNet,
    /// Digests of the sets of claims that were recorded for this pool, the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) claims: Vec<u32>,
}

pub(crate) fn space_key(space: &AddressSpace) -> Key {
    format!("e/{space}").into_bytes()
}

pub(crate) fn slot_prefix(space: &AddressSpace, family: Family) -> Key {
    format!("s/{space}/{}", digit(family)).into_bytes()
}

pub(crate) fn slot_key(space: &AddressSpace, address: Addr) -> Key {
    numbered(&slot_prefix(space, address.family), address.bits)
}

pub(crate) fn attachment_key(attachment: &AttachmentKey) -> Key {
    format!("t/{attachment}").into_bytes()
}

pub(crate) fn network_prefix(network: Option<&NetworkName>) -> Key {
    match network {
        Some(network) => format!("t/{network}/").into_bytes(),
        None => b"t/".to_vec(),
    }
}

pub(crate) fn attachment_of(key: &[u8]) -> Option<AttachmentKey> {
    attachment_text::parse(std::str::from_utf8(key.strip_prefix(b"t/")?).ok()?)
}

pub(crate) fn claim_key(space: &AddressSpace, family: Family, claim: &ClaimKey) -> Key {
    format!("c/{space}/{}/{claim}", digit(family)).into_bytes()
}

pub(crate) fn claim_prefix(space: &AddressSpace, family: Family) -> Key {
    format!("c/{space}/{}/", digit(family)).into_bytes()
}

pub(crate) fn freed_prefix(space: &AddressSpace, family: Family, pool: &str) -> Key {
    format!("f/{space}/{}/{pool}/", digit(family)).into_bytes()
}

pub(crate) fn freed_key(space: &AddressSpace, address: Addr, pool: &str, at: u64) -> Key {
    [freed_prefix(space, address.family, pool), at.to_be_bytes().to_vec(), address.bits.to_be_bytes().to_vec()].concat()
}

/// When and which address, of a key in a pool's queue.
pub(crate) fn freed_of(prefix: &[u8], key: &[u8]) -> Option<(u64, u128)> {
    let rest: [u8; 24] = key.strip_prefix(prefix)?.try_into().ok()?;
    let (at, bits) = rest.split_at(8);
    Some((u64::from_be_bytes(at.try_into().ok()?), u128::from_be_bytes(bits.try_into().ok()?)))
}

fn digit(family: Family) -> char {
    match family {
        Family::V4 => '4',
        Family::V6 => '6',
    }
}

mod attachment_text {
    use serde::de::Error as _;

    use super::*;

    pub(super) fn serialize<S: Serializer>(value: &AttachmentKey, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AttachmentKey, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text).ok_or_else(|| D::Error::custom(format!("{text:?} is no network/container/interface")))
    }

    pub(super) fn parse(text: &str) -> Option<AttachmentKey> {
        let mut parts = text.splitn(3, '/');
        let network = parts.next()?.parse().ok()?;
        let container = parts.next()?.parse().ok()?;
        Some(AttachmentKey { network, container, ifname: parts.next()?.parse().ok()? })
    }
}
