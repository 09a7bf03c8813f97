//! The IPv4 trie: strides of 16, 8 and 8 bits, longest prefixes expanded.

use std::collections::{HashMap, HashSet};

use super::{ClassError, Write};
use crate::abi::{BLOCK_ENTRIES, CHILD, CLASS_V4, ClassId, ROOT_V4_ENTRIES};

#[derive(Debug)]
pub(super) struct TrieV4 {
    /// What the map holds.
    entries: Vec<u32>,
    /// For each entry that is a class, the length of the prefix that it comes from.
    lengths: Vec<u8>,
    prefixes: HashMap<(u8, u32), ClassId>,
    free: Vec<u32>,
    unsettled: Vec<u32>,
}

/// A block, or the root.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// Its first entry.
    base: u32,
    /// Bits of the address before it.
    depth: u8,
    /// Bits of the address that it switches on.
    stride: u8,
}

const ROOT: Block = Block { base: 0, depth: 0, stride: 16 };

impl Block {
    const fn end(self) -> u8 {
        self.depth + self.stride
    }

    /// The entry of an address.
    const fn entry(self, address: u32) -> u32 {
        self.base + (address >> (32 - self.end()) & ((1 << self.stride) - 1))
    }

    const fn child(self, number: u32) -> Self {
        Self { base: number * BLOCK_ENTRIES, depth: self.end(), stride: 8 }
    }
}

impl TrieV4 {
    pub(super) fn new(blocks: u32) -> Self {
        let entries = (ROOT_V4_ENTRIES + blocks * BLOCK_ENTRIES) as usize;
        let first = ROOT_V4_ENTRIES / BLOCK_ENTRIES;
        Self {
            entries: vec![0; entries],
            lengths: vec![0; entries],
            prefixes: HashMap::new(),
            free: (first..first + blocks).rev().collect(),
            unsettled: Vec::new(),
        }
    }

    /// Whether there are blocks for all changes, blocks freed by them not counted.
    pub(super) fn check(&self, changes: &[(u32, u8, Option<ClassId>)]) -> Result<(), ClassError> {
        let mut new = HashSet::new();
        for (address, length, _) in changes.iter().filter(|(.., class)| class.is_some()) {
            let mut block = Some(ROOT);
            for depth in [16, 24] {
                if *length <= depth {
                    break;
                }
                let child = block.and_then(|b| self.child(b, *address));
                if child.is_none() {
                    new.insert((depth, address >> (32 - depth)));
                }
                block = child;
            }
        }
        let (needed, free) = (new.len(), self.free.len());
        if needed > free { Err(ClassError::Full { map: CLASS_V4, needed, free }) } else { Ok(()) }
    }

    fn child(&self, block: Block, address: u32) -> Option<Block> {
        let entry = self.entries[block.entry(address) as usize];
        (entry & CHILD != 0).then(|| block.child(entry & !CHILD))
    }

    /// [`TrieV4::check`] must have found room.
    pub(super) fn insert(&mut self, address: u32, length: u8, class: ClassId, writes: &mut Vec<Write>) {
        self.prefixes.insert((length, address), class);
        self.put(ROOT, (address, length), class, writes);
    }

    fn put(&mut self, block: Block, (address, length): (u32, u8), class: ClassId, writes: &mut Vec<Write>) {
        let entry = block.entry(address);
        if length <= block.end() {
            for entry in entry..entry + (1 << (block.end() - length)) {
                self.fill(block, entry, length, class, writes);
            }
            return;
        }
        if let Some(child) = self.child(block, address) {
            return self.put(child, (address, length), class, writes);
        }
        let number = self.free.pop().expect("check() has counted the blocks");
        let child = block.child(number);
        let range = child.base as usize..(child.base + BLOCK_ENTRIES) as usize;
        let (inherited, inherited_length) = (self.entries[entry as usize], self.lengths[entry as usize]);
        self.entries[range.clone()].fill(inherited);
        self.lengths[range.clone()].fill(inherited_length);
        // Nobody sees the block yet, so it may be written twice.
        self.put(child, (address, length), class, writes);
        for entry in range.step_by(2) {
            self.write(entry as u32, writes);
        }
        self.set(entry, CHILD | number, writes);
    }

    /// Gives an entry, or all below it, to a prefix, but for what longer ones have.
    fn fill(&mut self, block: Block, entry: u32, length: u8, class: ClassId, writes: &mut Vec<Write>) {
        self.leaves(block, entry, writes, &mut |old| (old <= length).then_some((length, class)));
    }

    /// Offers the length of every leaf at or below an entry to `change`.
    fn leaves(
        &mut self,
        block: Block,
        entry: u32,
        writes: &mut Vec<Write>,
        change: &mut impl FnMut(u8) -> Option<(u8, ClassId)>,
    ) {
        let value = self.entries[entry as usize];
        if value & CHILD != 0 {
            let child = block.child(value & !CHILD);
            for entry in child.base..child.base + BLOCK_ENTRIES {
                self.leaves(child, entry, writes, change);
            }
        } else if let Some((length, class)) = change(self.lengths[entry as usize]) {
            self.lengths[entry as usize] = length;
            if value != class {
                self.set(entry, class, writes);
            }
        }
    }

    pub(super) fn remove(&mut self, address: u32, length: u8, writes: &mut Vec<Write>) {
        if self.prefixes.remove(&(length, address)).is_none() {
            return;
        }
        let cover = (0..length).rev().find_map(|shorter| {
            let network = address & u32::MAX.checked_shl(32 - u32::from(shorter)).unwrap_or(0);
            Some((shorter, *self.prefixes.get(&(shorter, network))?))
        });
        let cover = cover.unwrap_or((0, 0));
        let mut path = vec![ROOT];
        while let Some(block) = path.last().filter(|b| length > b.end()) {
            match self.child(*block, address) {
                Some(child) => path.push(child),
                None => return,
            }
        }
        let Some(block) = path.last().copied() else { return };
        let first = block.entry(address);
        for entry in first..first + (1 << (block.end() - length)) {
            self.leaves(block, entry, writes, &mut |old| (old == length).then_some(cover));
        }
        // Blocks that tell no more than their parent's entry could.
        while let [.., parent, block] = path[..] {
            let range = block.base as usize..(block.base + BLOCK_ENTRIES) as usize;
            let plain = self.entries[range.clone()].iter().zip(&self.lengths[range.clone()]);
            if plain.into_iter().any(|(entry, length)| entry & CHILD != 0 || *length > block.depth) {
                return;
            }
            let entry = parent.entry(address);
            self.lengths[entry as usize] = self.lengths[range.start];
            self.set(entry, self.entries[range.start], writes);
            self.unsettled.push(block.base / BLOCK_ENTRIES);
            path.pop();
        }
    }

    #[cfg(test)]
    pub(super) fn free_blocks(&self) -> usize {
        self.free.len()
    }

    pub(super) fn settled(&mut self) {
        self.free.append(&mut self.unsettled);
    }

    fn set(&mut self, entry: u32, value: u32, writes: &mut Vec<Write>) {
        self.entries[entry as usize] = value;
        self.write(entry, writes);
    }

    fn write(&self, entry: u32, writes: &mut Vec<Write>) {
        let at = (entry & !1) as usize;
        let write = Write::ClassV4 { index: entry / 2, pair: [self.entries[at], self.entries[at + 1]] };
        match writes.last_mut() {
            Some(last @ Write::ClassV4 { .. }) if last.index() == entry / 2 => *last = write,
            _ => writes.push(write),
        }
    }
}
