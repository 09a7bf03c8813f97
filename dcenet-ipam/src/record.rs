//! Keys and values in the store.
//!
//! | Key | Value |
//! |---|---|
//! | `e/SPACE` | [`SpaceRecord`]: the pools of an address space, guarded by everyone who leases from it |
//! | `s/SPACE/F` + address (16 bytes) | [`SlotRecord`]: what an address is used for |
//! | `t/NETWORK/CONTAINER/IFNAME` | [`AttachmentRecord`]: what an attachment holds; its version is the sequence |
//! | `c/SPACE/F/CLAIM` | [`ClaimRecord`]: the address that a claim keeps |
//! | `k/SPACE/F/` + time (8 bytes) + address (16 bytes) | empty: when what holds an address for a time ends |
//! | `q/SPACE/F` + address (16 bytes) | empty: addresses in quarantine |
//! | `h/SPACE/F` + address (16 bytes) + time (8 bytes) + tag (4 bytes) | [`EventRecord`]: what became of an address |
//! | `n/NODE` | [`NodeRecord`]: a node's last sign of life |
//! | `v/NODE` | [`FabricNode`](dcenet_core::provider::FabricNode): how others reach a node |
//! | `f/SPACE/F/POOL/` + time (8 bytes) + address (16 bytes) | empty: released addresses, oldest first; `POOL@BLOCK` for those of a block |
//! | `b/SPACE/F/POOL/` + block (16 bytes) | [`BlockRecord`]: which node or application owns a block |
//! | `o/SPACE/F/POOL/OWNER/` + block (16 bytes) | empty: the blocks of a node, or of an application `NAMESPACE/NAME` |
//! | `p/SPACE/F/POOL/` + prefix (16 bytes) | empty: a delegated prefix with a slot |
//! | `y/NETWORK/CONTAINER/IFNAME` | what an attachment may have outside; see [`binder`](crate::binder) |
//! | `x/SPACE/F/` + last and first address (16 bytes each) | [`ReservationRecord`]: who uses them outside |
//!
//! `F` is `4` or `6`; numbers in keys are big-endian. Values are JSON, so that a store can be read by people and fields
//! can be added.

mod pools;

use std::net::IpAddr;

use dcenet_core::model::{AttachmentKey, ClusterId, MacAddr, NetworkName, Workload};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(crate) use self::pools::{
    BlockRecord, ReservationRecord, block_prefix, block_queue, delegated_prefix, owned_prefix, reservation_key,
    reservation_of, reservation_prefix,
};
use crate::model::{Addr, AddressSpace, ClaimKey, Family, KeepPolicy, MacWish, NodeName};
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
    Kept {
        claim: ClaimKey,
        /// When that ends (milliseconds since 1970), and then it is in the queue of what ends; absent for never.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<u64>,
    },
    /// An attachment uses it through a claim, and another is to take it over, or uses it already.
    Handover {
        /// Who has it now, and keeps it if the handover is not completed.
        #[serde(with = "attachment_text")]
        by: AttachmentKey,
        claim: ClaimKey,
        /// Who may take it over; absent for whoever comes first.
        #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_attachment")]
        to: Option<AttachmentKey>,
        /// Whether the other has a lease.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        joined: bool,
        /// When the permission ends; in the queue of what ends.
        until: u64,
    },
    /// Nobody gets it, for somebody else on the link answers for it.
    Quarantined {
        reason: String,
        /// Since when.
        at: u64,
        /// When that ends, and then it is in the queue of what ends; absent for never.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<u64>,
        /// Who answers for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mac: Option<MacAddr>,
        /// The claim that kept it, or used it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        claim: Option<ClaimKey>,
        /// The attachment that got another instead.
        #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_attachment")]
        from: Option<AttachmentKey>,
    },
    /// Released at a time (milliseconds since 1970), and in the queue of that pool.
    Freed { at: u64, pool: String },
}

impl SlotRecord {
    /// The claim that has the address.
    pub(crate) fn claim(&self) -> Option<&ClaimKey> {
        match self {
            Self::Bound { claim, .. } | Self::Quarantined { claim, .. } => claim.as_ref(),
            Self::Kept { claim, .. } | Self::Handover { claim, .. } => Some(claim),
            Self::Freed { .. } => None,
        }
    }

    /// Gives the claim that has the address another key.
    pub(crate) fn rename(&mut self, to: &ClaimKey) {
        match self {
            Self::Bound { claim, .. } | Self::Quarantined { claim, .. } => *claim = Some(to.clone()),
            Self::Kept { claim, .. } | Self::Handover { claim, .. } => *claim = to.clone(),
            Self::Freed { .. } => {}
        }
    }

    /// The attachment that has the address, of two the one that had it first.
    pub(crate) fn holder(&self) -> Option<&AttachmentKey> {
        match self {
            Self::Bound { by, .. } | Self::Handover { by, .. } => Some(by),
            Self::Kept { .. } | Self::Freed { .. } | Self::Quarantined { .. } => None,
        }
    }
}

/// What an attachment holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AttachmentRecord {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) workload: Option<Workload>,
    pub(crate) addresses: Vec<Held>,
    /// The MAC address that a claim keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mac: Option<MacAddr>,
    /// Where it is attached, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) node: Option<NodeName>,
    /// The sequence of the lease, where the record was written again since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sequence: Option<u64>,
}

impl AttachmentRecord {
    /// The number of the lease, given the version of this record.
    pub(crate) fn sequence(&self, version: u64) -> u64 {
        self.sequence.unwrap_or(version)
    }
}

/// One address of an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Held {
    /// Absent for the default space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) space: Option<String>,
    pub(crate) address: IpNet,
    pub(crate) pool: String,
    /// The whole prefix is the attachment's, not the address alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) delegated: bool,
}

impl Held {
    pub(crate) fn new(space: &AddressSpace, address: IpNet, pool: &str) -> Self {
        let space = (*space != AddressSpace::default()).then(|| space.to_string());
        Self { space, address, pool: pool.to_owned(), delegated: false }
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mac: Option<MacWish>,
    /// The workload is gone; nothing is kept once nothing is attached.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) gone: bool,
    /// How many times the claim has gone from one cluster to another.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) moves: u64,
    /// The cluster that has it now, if not this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) away: Option<ClusterId>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// What became of an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EventRecord {
    #[serde(rename = "e")]
    pub(crate) what: EventKind,
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_attachment")]
    pub(crate) by: Option<AttachmentKey>,
    #[serde(default, rename = "w", skip_serializing_if = "Option::is_none")]
    pub(crate) workload: Option<Workload>,
}

/// As short as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EventKind {
    #[serde(rename = "b")]
    Bound,
    #[serde(rename = "j")]
    Joined,
    #[serde(rename = "r")]
    Released,
}

/// A node's last sign of life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeRecord {
    /// By the node's own clock, in milliseconds since 1970; for people.
    pub(crate) beat: u64,
    /// Which boot or start of the node it is of.
    pub(crate) epoch: u64,
}

/// The pools of an address space.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SpaceRecord {
    pub(crate) pools: Vec<RegisteredPool>,
    /// How many reservations of outsiders there are. Every change of one changes this record, and with it what leases
    /// guard.
    #[serde(default, skip_serializing_if = "none")]
    pub(crate) reservations: u64,
    /// Changes of reservations so far, so that one taken away and another made do not leave the record as it was.
    #[serde(default, skip_serializing_if = "none")]
    pub(crate) changes: u64,
}

fn none(count: &u64) -> bool {
    *count == 0
}

/// A pool as others must respect it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RegisteredPool {
    pub(crate) name: String,
    pub(crate) subnet: IpNet,
    /// Digests of the sets of claims that were recorded for this pool, the newest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) claims: Vec<u32>,
    /// The prefix length of the blocks that nodes or applications own in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) block: Option<u8>,
    /// The blocks are of applications, and every address is of one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) applications: bool,
    /// The length of the prefixes that it delegates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) delegate: Option<u8>,
    /// Ground that a pool which delegates had before it was shrunk. Prefixes that are held may cover it, so another pool
    /// takes it only once they are released.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) given_up: Vec<IpNet>,
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

/// The queue of what ends.
pub(crate) fn due_prefix(space: &AddressSpace, family: Family) -> Key {
    format!("k/{space}/{}/", digit(family)).into_bytes()
}

pub(crate) fn due_key(space: &AddressSpace, address: Addr, at: u64) -> Key {
    [due_prefix(space, address.family), at.to_be_bytes().to_vec(), address.bits.to_be_bytes().to_vec()].concat()
}

pub(crate) fn quarantine_prefix(space: &AddressSpace, family: Family) -> Key {
    format!("q/{space}/{}", digit(family)).into_bytes()
}

pub(crate) fn quarantine_key(space: &AddressSpace, address: Addr) -> Key {
    numbered(&quarantine_prefix(space, address.family), address.bits)
}

/// The events of all addresses of a family.
pub(crate) fn history_prefix(space: &AddressSpace, family: Family) -> Key {
    format!("h/{space}/{}", digit(family)).into_bytes()
}

/// The key of an event. The tag keeps events of the same millisecond apart.
pub(crate) fn event_key(space: &AddressSpace, address: Addr, at: u64, tag: u32) -> Key {
    let mut key = numbered(&history_prefix(space, address.family), address.bits);
    key.extend(at.to_be_bytes());
    key.extend(tag.to_be_bytes());
    key
}

/// Which address and when, of the key of an event.
pub(crate) fn event_of(prefix: &[u8], key: &[u8]) -> Option<(u128, u64)> {
    let rest: [u8; 28] = key.strip_prefix(prefix)?.try_into().ok()?;
    Some((u128::from_be_bytes(rest[..16].try_into().ok()?), u64::from_be_bytes(rest[16..24].try_into().ok()?)))
}

pub(crate) fn node_key(node: &NodeName) -> Key {
    format!("n/{node}").into_bytes()
}

pub(crate) fn fabric_key(node: &str) -> Key {
    format!("v/{node}").into_bytes()
}

/// When and which address, of a key in a queue.
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

mod optional_attachment {
    use super::*;

    pub(super) fn serialize<S: Serializer>(value: &Option<AttachmentKey>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => attachment_text::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<AttachmentKey>, D::Error> {
        attachment_text::deserialize(deserializer).map(Some)
    }
}

pub(crate) mod attachment_text {
    use serde::de::Error as _;

    use super::*;

    pub(super) fn serialize<S: Serializer>(value: &AttachmentKey, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AttachmentKey, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text).ok_or_else(|| D::Error::custom(format!("{text:?} is no network/container/interface")))
    }

    pub(crate) fn parse(text: &str) -> Option<AttachmentKey> {
        let mut parts = text.splitn(3, '/');
        let network = parts.next()?.parse().ok()?;
        let container = parts.next()?.parse().ok()?;
        Some(AttachmentKey { network, container, ifname: parts.next()?.parse().ok()? })
    }
}
