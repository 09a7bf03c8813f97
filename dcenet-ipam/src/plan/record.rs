//! Keys and values in the store.
//!
//! | Key | Value |
//! |---|---|
//! | `plan/s` | [`Registry`]: the spaces and their rules, guarded by every change, written when a space is added |
//! | `plan/e/SPACE` | [`EpochRecord`]: how often the space was changed, guarded and written by every change of it |
//! | `plan/p/SPACE/F` + first address (16 bytes) + length (1 byte) + level (1 byte) | [`PrefixRecord`] |
//! | `plan/x/SPACE/F` + first address (16 bytes) + length (1 byte) | [`Tombstone`]: a grant that was given back |
//! | `plan/d/SPACE/` + epoch (8 bytes) | [`ChangeRecord`]: what the change did, kept for the last [`CHANGES`] of them |
//!
//! `F` is `4` or `6`, a level is `0` to `3`, numbers in keys are big-endian: the records of a space are in the order of
//! its tree, each prefix before what it contains.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::block::Block;
use super::model::{Level, Purpose, State};
use crate::model::{AddressSpace, Family};
use crate::store::Key;

/// Changes that a space remembers, so that whoever knows an older state need not read all of the newer.
pub(crate) const CHANGES: u64 = 1024;

/// A place in the tree. Ordered as the tree is read: before what it contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Node {
    pub(crate) block: Block,
    pub(crate) level: Level,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registry {
    pub(crate) spaces: BTreeMap<String, SpaceRules>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SpaceRules {
    /// Purposes whose prefixes overlap nothing in other spaces.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) unique: BTreeSet<Purpose>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EpochRecord {
    pub(crate) epoch: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PrefixRecord {
    pub(crate) name: String,
    pub(crate) owner: String,
    #[serde(default)]
    pub(crate) purpose: Purpose,
    /// When it was claimed; of a delegated prefix, when it was delegated.
    pub(crate) epoch: u64,
    #[serde(default = "held", skip_serializing_if = "is_held")]
    pub(crate) state: State,
    /// Of a prefix that a parent granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) grant: Option<GrantMark>,
}

fn held() -> State {
    State::Held
}

fn is_held(state: &State) -> bool {
    *state == State::Held
}

/// What the parent wrote into the grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GrantMark {
    pub(crate) from: String,
    pub(crate) epoch: u64,
    pub(crate) path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tombstone {
    /// No grant of the prefix up to this one is accepted.
    pub(crate) epoch: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChangeRecord {
    /// `None` for a change that was too large to be remembered: whoever follows reads all.
    pub(crate) deltas: Option<Vec<Delta>>,
}

/// A record that a change set, absolutely: to apply it twice is to apply it once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Delta {
    Delete { cidr: IpNet, level: Level },
    Put { cidr: IpNet, level: Level, record: PrefixRecord },
    Returned { cidr: IpNet, epoch: u64 },
}

pub(crate) fn registry_key() -> Key {
    b"plan/s".to_vec()
}

pub(crate) fn epoch_key(space: &AddressSpace) -> Key {
    format!("plan/e/{space}").into_bytes()
}

pub(crate) fn prefixes(space: &AddressSpace) -> Key {
    format!("plan/p/{space}/").into_bytes()
}

pub(crate) fn tombstones(space: &AddressSpace) -> Key {
    format!("plan/x/{space}/").into_bytes()
}

pub(crate) fn changes(space: &AddressSpace) -> Key {
    format!("plan/d/{space}/").into_bytes()
}

pub(crate) fn node_key(space: &AddressSpace, node: &Node) -> Key {
    let mut key = prefixes(space);
    push_block(&mut key, &node.block);
    key.push(node.level as u8);
    key
}

pub(crate) fn tombstone_key(space: &AddressSpace, block: &Block) -> Key {
    let mut key = tombstones(space);
    push_block(&mut key, block);
    key
}

pub(crate) fn change_key(space: &AddressSpace, epoch: u64) -> Key {
    [changes(space), epoch.to_be_bytes().to_vec()].concat()
}

pub(crate) fn node_of(prefix: &[u8], key: &[u8]) -> Option<Node> {
    let (level, block) = key.strip_prefix(prefix)?.split_last()?;
    let level = [Level::Fleet, Level::Region, Level::Cluster, Level::Pool].into_iter().find(|l| *l as u8 == *level)?;
    Some(Node { block: block_of(block)?, level })
}

pub(crate) fn tombstone_of(prefix: &[u8], key: &[u8]) -> Option<Block> {
    block_of(key.strip_prefix(prefix)?)
}

pub(crate) fn change_of(prefix: &[u8], key: &[u8]) -> Option<u64> {
    key.strip_prefix(prefix)?.try_into().ok().map(u64::from_be_bytes)
}

fn push_block(key: &mut Key, block: &Block) {
    key.push(match block.family {
        Family::V4 => b'4',
        Family::V6 => b'6',
    });
    key.extend(block.bits.to_be_bytes());
    key.push(block.length);
}

fn block_of(bytes: &[u8]) -> Option<Block> {
    let bytes: &[u8; 18] = bytes.try_into().ok()?;
    let family = match bytes[0] {
        b'4' => Family::V4,
        b'6' => Family::V6,
        _ => return None,
    };
    let bits = u128::from_be_bytes(bytes[1..17].try_into().ok()?);
    let block = Block { family, bits, length: bytes[17] };
    // Nothing else may reach the arithmetic.
    (block.length <= family.bits() && bits <= family.last() && block.widen(block.length) == block).then_some(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_as_the_tree_and_read_back() {
        let node = |cidr: &str, level| Node { block: Block::of(&cidr.parse().unwrap()), level };
        let tree = [
            node("10.0.0.0/8", Level::Fleet),
            node("10.0.0.0/8", Level::Region),
            node("10.0.0.0/16", Level::Cluster),
            node("10.0.7.0/24", Level::Pool),
            node("10.1.0.0/16", Level::Cluster),
            node("::/0", Level::Fleet),
            node("fd00::/8", Level::Region),
        ];
        let space = AddressSpace::default();
        let keys: Vec<Key> = tree.iter().map(|n| node_key(&space, n)).collect();
        assert!(keys.is_sorted() && tree.is_sorted());
        for (node, key) in tree.iter().zip(&keys) {
            assert_eq!(node_of(&prefixes(&space), key), Some(*node));
        }
        let mut bad = keys[0].clone();
        let host_bit = bad.len() - 3;
        bad[host_bit] = 1;
        assert_eq!(node_of(&prefixes(&space), &bad), None);
    }
}
