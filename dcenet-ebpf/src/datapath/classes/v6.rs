//! IPv6: a table of single addresses, and a path-compressed trie of prefixes.

use std::collections::{BTreeMap, HashMap};

use super::{ClassError, Write};
use crate::abi::{
    BLOCK_ENTRIES, CHILD, CLASS_V6, ClassId, MEMBER_DELETED, MEMBER_USED, MemberV6, NodeV6, PROBES_V6, member_v6_place,
};

#[derive(Debug, Clone)]
pub(super) struct TableV6 {
    /// What the map of members holds.
    members: Vec<MemberV6>,
    /// Places that a program may still look at.
    unsettled_members: Vec<u32>,
    /// Prefixes, and single addresses that found no place in the table.
    prefixes: BTreeMap<(u128, u8), ClassId>,
    /// The blocks in use by what they hold.
    blocks: HashMap<Content, u32>,
    root: u32,
    free: Vec<u32>,
    unsettled: Vec<u32>,
}

/// All that a block says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Content {
    node: NodeV6,
    entries: Box<[u32]>,
}

/// A new trie under construction.
struct Build<'a> {
    old: &'a HashMap<Content, u32>,
    blocks: HashMap<Content, u32>,
    free: std::slice::Iter<'a, u32>,
    /// Blocks that the trie would need beyond the free ones.
    missing: usize,
    taken: usize,
    writes: Vec<Write>,
}

impl TableV6 {
    pub(super) fn new(members: u32, blocks: u32) -> Self {
        Self {
            members: vec![MemberV6::default(); members as usize],
            unsettled_members: Vec::new(),
            prefixes: BTreeMap::new(),
            blocks: HashMap::new(),
            root: 0,
            // Block 0 is the root's record.
            free: (1..blocks).collect(),
            unsettled: Vec::new(),
        }
    }

    pub(super) fn apply(
        &mut self,
        changes: &[(u128, u8, Option<ClassId>)],
        writes: &mut Vec<Write>,
    ) -> Result<(), ClassError> {
        let before = self.prefixes.clone();
        let (table, unsettled) = (self.members.clone(), self.unsettled_members.len());
        let mut member_writes = Vec::new();
        for &(address, length, class) in changes {
            match class {
                Some(class) => {
                    let spilled = self.prefixes.contains_key(&(address, length));
                    let single = length == 128 && !spilled;
                    if !single || !self.insert_member(address, class, &mut member_writes) {
                        self.prefixes.insert((address, length), class);
                    }
                }
                None => {
                    self.prefixes.remove(&(address, length));
                    if length == 128 {
                        self.remove_member(address, &mut member_writes);
                    }
                }
            }
        }
        if let Err(error) = self.rebuild(&before, writes) {
            self.prefixes = before;
            self.members = table;
            self.unsettled_members.truncate(unsettled);
            return Err(error);
        }
        writes.append(&mut member_writes);
        Ok(())
    }

    fn places(&self, address: u128) -> impl Iterator<Item = usize> + use<> {
        let size = self.members.len();
        let first = member_v6_place(address, size.trailing_zeros()) as usize;
        (first..first + PROBES_V6 as usize).map(move |place| place % size)
    }

    fn member(&self, address: u128) -> Option<usize> {
        let bytes = address.to_be_bytes();
        self.places(address)
            .take_while(|place| self.members[*place].tag != 0)
            .find(|place| self.members[*place].tag & MEMBER_USED != 0 && self.members[*place].address == bytes)
    }

    /// `false` where no place is free.
    fn insert_member(&mut self, address: u128, class: ClassId, writes: &mut Vec<Write>) -> bool {
        let tag = MEMBER_USED | class;
        let known = self.member(address);
        let free = |place: &usize| {
            self.members[*place].tag & MEMBER_USED == 0 && !self.unsettled_members.contains(&(*place as u32))
        };
        let Some(place) = known.or_else(|| self.places(address).find(free)) else { return false };
        if known.is_none() {
            // The address first, under a tag that programs do not look behind.
            self.members[place].address = address.to_be_bytes();
            self.write_member(place, writes);
        }
        self.members[place].tag = tag;
        self.write_member(place, writes);
        true
    }

    fn remove_member(&mut self, address: u128, writes: &mut Vec<Write>) {
        if let Some(place) = self.member(address) {
            self.members[place].tag = MEMBER_DELETED;
            self.unsettled_members.push(place as u32);
            self.write_member(place, writes);
        }
    }

    fn write_member(&self, place: usize, writes: &mut Vec<Write>) {
        writes.push(Write::MemberV6 { index: place as u32, member: self.members[place] });
    }

    /// Writes the trie anew where the prefixes have changed, sharing all blocks that say the same as before.
    fn rebuild(&mut self, before: &BTreeMap<(u128, u8), ClassId>, writes: &mut Vec<Write>) -> Result<(), ClassError> {
        if *before == self.prefixes {
            return Ok(());
        }
        let prefixes: Vec<(u128, u8, ClassId)> = self.prefixes.iter().map(|(&(a, l), &c)| (a, l, c)).collect();
        let mut build = Build {
            old: &self.blocks,
            blocks: HashMap::new(),
            free: self.free.iter(),
            missing: 0,
            taken: 0,
            writes: Vec::new(),
        };
        let root = build.entry(&prefixes, 0, 0);
        let Build { blocks, missing, taken, writes: mut new, .. } = build;
        if missing > 0 {
            return Err(ClassError::Full { map: CLASS_V6, needed: taken + missing, free: taken });
        }
        writes.append(&mut new);
        if root != self.root {
            writes.push(Write::NodeV6 { index: 0, node: NodeV6 { entry: root, ..NodeV6::default() } });
        }
        self.root = root;
        self.free.drain(..taken);
        let left = self.blocks.iter().filter(|(content, _)| !blocks.contains_key(*content));
        self.unsettled.extend(left.map(|(_, number)| *number));
        self.blocks = blocks;
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn free_blocks(&self) -> usize {
        self.free.len()
    }

    pub(super) fn settled(&mut self) {
        self.free.append(&mut self.unsettled);
        self.unsettled_members.clear();
    }
}

impl Build<'_> {
    /// The entry for addresses that agree in the first `depth` bytes with all of these prefixes, sorted by address and
    /// length. `cover` is the class of the longest prefix that covers them all.
    fn entry(&mut self, prefixes: &[(u128, u8, ClassId)], depth: usize, cover: ClassId) -> u32 {
        let [first, .., last] = prefixes else {
            return match prefixes {
                [only] => self.node(prefixes, usize::from(only.1.saturating_sub(1)) / 8, depth, cover),
                _ => cover,
            };
        };
        let shared = (first.0 ^ last.0).leading_zeros() as usize / 8;
        let shortest = prefixes.iter().map(|(_, length, _)| usize::from(length.saturating_sub(1)) / 8).min();
        self.node(prefixes, shared.min(shortest.unwrap_or(0)), depth, cover)
    }

    /// A block that switches on the byte `at`.
    fn node(&mut self, prefixes: &[(u128, u8, ClassId)], at: usize, depth: usize, cover: ClassId) -> u32 {
        debug_assert!(depth <= at && at < 16);
        let end = 8 * (at + 1);
        let byte = |address: u128| (address >> (128 - end)) as usize & 0xff;
        let mut entries = vec![cover; BLOCK_ENTRIES as usize];
        let mut short: Vec<_> = prefixes.iter().filter(|(_, length, _)| usize::from(*length) <= end).collect();
        short.sort_by_key(|(_, length, _)| *length);
        for (address, length, class) in short {
            let first = byte(*address);
            entries[first..first + (1 << (end - usize::from(*length)))].fill(*class);
        }
        let long: Vec<_> = prefixes.iter().filter(|(_, length, _)| usize::from(*length) > end).copied().collect();
        for group in long.chunk_by(|a, b| byte(a.0) == byte(b.0)) {
            let entry = byte(group[0].0);
            entries[entry] = self.entry(group, at + 1, entries[entry]);
        }
        let mask = u128::MAX.checked_shl(128 - 8 * at as u32).unwrap_or(0);
        let prefix = prefixes[0].0 & mask;
        let node = NodeV6 {
            mask_high: (mask >> 64) as u64,
            mask_low: mask as u64,
            prefix_high: (prefix >> 64) as u64,
            prefix_low: prefix as u64,
            // 64 to 120 for the first half's bytes, 0 to 56 for the others: the flag and the shift in one.
            shift: 120 - 8 * at as u32,
            entry: cover,
        };
        CHILD | self.block(Content { node, entries: entries.into() })
    }

    fn block(&mut self, content: Content) -> u32 {
        if let Some(number) = self.blocks.get(&content) {
            return *number;
        }
        let number = match self.old.get(&content) {
            Some(number) => *number,
            None => {
                let Some(&number) = self.free.next() else {
                    self.missing += 1;
                    return 0;
                };
                self.taken += 1;
                for (i, pair) in content.entries.chunks_exact(2).enumerate() {
                    let index = number * (BLOCK_ENTRIES / 2) + i as u32;
                    self.writes.push(Write::ClassV6 { index, pair: [pair[0], pair[1]] });
                }
                self.writes.push(Write::NodeV6 { index: number, node: content.node });
                number
            }
        };
        self.blocks.insert(content, number);
        number
    }
}
