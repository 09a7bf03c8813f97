//! Records of what pools need beside slots: blocks, delegated prefixes, reservations.

use serde::{Deserialize, Serialize};

use super::digit;
use crate::model::{AddressSpace, Family};
use crate::store::Key;

/// Who owns a block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BlockRecord {
    /// The node, or the application as `NAMESPACE/NAME`, which no node is named like.
    pub(crate) node: String,
    /// Nothing new is taken from it until it is decided whether it is empty.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) closing: bool,
}

/// Addresses that somebody outside uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReservationRecord {
    pub(crate) holder: String,
}

/// Before the number of a block: its first address divided by its size, so that the blocks of a pool lie side by side.
pub(crate) fn block_prefix(space: &AddressSpace, family: Family, pool: &str) -> Key {
    format!("b/{space}/{}/{pool}/", digit(family)).into_bytes()
}

/// Before the numbers of the blocks of one owner.
pub(crate) fn owned_prefix(space: &AddressSpace, family: Family, pool: &str, owner: &str) -> Key {
    format!("o/{space}/{}/{pool}/{owner}/", digit(family)).into_bytes()
}

/// Before the number of a delegated prefix: its first address divided by its size, so that neighbours are neighbours.
pub(crate) fn delegated_prefix(space: &AddressSpace, family: Family, pool: &str) -> Key {
    format!("p/{space}/{}/{pool}/", digit(family)).into_bytes()
}

/// Before the last and the first address of a reservation, 16 bytes each: the first key from an address on is of the
/// one reservation that may cover it.
pub(crate) fn reservation_prefix(space: &AddressSpace, family: Family) -> Key {
    format!("x/{space}/{}/", digit(family)).into_bytes()
}

pub(crate) fn reservation_key(space: &AddressSpace, family: Family, (first, last): (u128, u128)) -> Key {
    [reservation_prefix(space, family), last.to_be_bytes().to_vec(), first.to_be_bytes().to_vec()].concat()
}

/// First and last address, of a key under [`reservation_prefix`].
pub(crate) fn reservation_of(prefix: &[u8], key: &[u8]) -> Option<(u128, u128)> {
    let rest: [u8; 32] = key.strip_prefix(prefix)?.try_into().ok()?;
    let (last, first) = rest.split_at(16);
    Some((u128::from_be_bytes(first.try_into().ok()?), u128::from_be_bytes(last.try_into().ok()?)))
}

/// The name of the queue of a block's releases; no pool is named so.
pub(crate) fn block_queue(pool: &str, block: u128) -> String {
    format!("{pool}@{block:x}")
}
