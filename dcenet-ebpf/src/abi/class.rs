//! From addresses to classes, and from classes to local ids.
//!
//! A class is a set of peers that no policy of the node tells apart. Entries of both tries are 32-bit: a class, or
//! [`CHILD`] and the number of a block of [`BLOCK_ENTRIES`] entries. Two entries share one element of the array, as the
//! kernel rounds elements up to 8 bytes.

use super::layout::record;

/// A class of peers; 0 is that of every address that no rule names. Below 2^31.
pub type ClassId = u32;

/// A policy set's own number for a class; 0 for classes that it does not know.
pub type LocalId = u16;

/// Set in a trie's entry that refers to a block; the other bits are the block's number.
pub const CHILD: u32 = 1 << 31;

/// Entries of a block: one for each value of a byte of the address.
pub const BLOCK_ENTRIES: u32 = 256;

/// Entries of the root of the IPv4 trie, one for each value of the first 16 bits. They are the entries of the blocks 0
/// to 255, and block numbers go on from there.
pub const ROOT_V4_ENTRIES: u32 = 65_536;

/// Element and bit offset in it of a class in the map of local ids.
pub const fn local_ids_element(class: ClassId) -> (u32, u32) {
    (class >> 2, (class & 3) * 16)
}

record! {
    /// A place of the open-addressed table of single IPv6 addresses.
    ///
    /// The search begins at [`member_v6_place`] and goes on by one place, around the end, at most [`PROBES_V6`] places
    /// or until a tag of 0.
    pub struct MemberV6, 24 bytes {
        /// The address.
        address: [u8; 16] = 0 @ ADDRESS,
        /// 0: never used. [`MEMBER_USED`] and the class. [`MEMBER_DELETED`]: to be passed over.
        tag: u32 = 16 @ TAG,
    }
}

/// Tag of a place in use, joined with the class.
pub const MEMBER_USED: u32 = 1 << 31;

/// Tag of a place that was in use.
pub const MEMBER_DELETED: u32 = 1;

/// How many places of the table are looked at.
pub const PROBES_V6: u32 = 8;

/// Where the search for an address begins in a table of `2^bits` places.
pub const fn member_v6_place(address: u128, bits: u32) -> u32 {
    let (high, low) = ((address >> 64) as u64, address as u64);
    let hash = (high.wrapping_mul(HASH_HIGH) ^ low).wrapping_mul(HASH_LOW);
    // In two steps: a shift by 64 does not exist.
    ((hash >> 32) >> (32 - bits)) as u32
}

/// Odd constants with evenly spread bits (the golden ratio and the plastic number, as fractions of 2^64).
pub(crate) const HASH_HIGH: u64 = 0x9e37_79b9_7f4a_7c15;
pub(crate) const HASH_LOW: u64 = 0xc13f_a9a9_02a6_328f;

record! {
    /// What a block of the IPv6 trie stands for: the bytes of the address before the one that it switches on.
    ///
    /// The record of block 0 holds the root's entry in [`NodeV6::entry`] and is otherwise unused, as is block 0.
    pub struct NodeV6, 40 bytes {
        /// Mask of the bytes before, of the first 64 bits of the address as a number.
        mask_high: u64 = 0 @ MASK_HIGH,
        /// The same for the last 64 bits.
        mask_low: u64 = 8 @ MASK_LOW,
        /// What the address must be under the mask, first 64 bits.
        prefix_high: u64 = 16 @ PREFIX_HIGH,
        /// The same for the last 64 bits.
        prefix_low: u64 = 24 @ PREFIX_LOW,
        /// By how many bits the half of the address is shifted right to bring the block's byte to the end; plus 64 for
        /// the first half.
        shift: u32 = 32 @ SHIFT,
        /// The class of addresses that do not have this prefix.
        entry: u32 = 36 @ ENTRY,
    }
}
