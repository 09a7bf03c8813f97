//! Prefixes as numbers, and what is free of one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::error::PlanError;
use crate::model::Family;

/// A prefix. Ordered by its first address, then the wider first: whatever contains a prefix comes before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Block {
    pub(crate) family: Family,
    pub(crate) bits: u128,
    pub(crate) length: u8,
}

/// `::ffff:0:0/96`: these addresses are IPv4 addresses (RFC 4291, section 2.5.5.2).
pub(crate) const MAPPED: Block = Block { family: Family::V6, bits: 0xffff_0000_0000, length: 96 };

impl Block {
    /// Checks a prefix that a caller wrote into `field`.
    pub(crate) fn check(field: &str, cidr: &IpNet) -> Result<Self, PlanError> {
        let invalid = |reason: String| PlanError::Invalid { field: field.to_owned(), value: cidr.to_string(), reason };
        if cidr.addr() != cidr.network() {
            return Err(invalid(format!("has bits set beyond the prefix length; write {}", cidr.trunc())));
        }
        let block = Self::of(cidr);
        if MAPPED.contains(&block) {
            return Err(invalid("holds IPv4-mapped addresses, which are IPv4 addresses; write the IPv4 prefix".into()));
        }
        Ok(block)
    }

    /// The prefix of a record, whose host bits are clear.
    pub(crate) fn of(cidr: &IpNet) -> Self {
        let bits = match cidr.network() {
            IpAddr::V4(ip) => u32::from(ip).into(),
            IpAddr::V6(ip) => ip.into(),
        };
        Self { family: Family::of(cidr), bits, length: cidr.prefix_len() }
    }

    pub(crate) fn cidr(&self) -> IpNet {
        match self.family {
            // Bits of IPv4 come from an Ipv4Addr, or lie in a block of them.
            Family::V4 => IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(self.bits as u32), self.length)),
            Family::V6 => IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from(self.bits), self.length)),
        }
    }

    /// The highest address.
    pub(crate) fn last(&self) -> u128 {
        self.bits | host_mask(self.family, self.length)
    }

    pub(crate) fn contains(&self, other: &Self) -> bool {
        self.family == other.family && self.length <= other.length && (self.bits..=self.last()).contains(&other.bits)
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.contains(other) || other.contains(self)
    }

    /// The block of `length`, at most its own, that contains it.
    pub(crate) fn widen(&self, length: u8) -> Self {
        Self { bits: self.bits & !host_mask(self.family, length), length, ..*self }
    }

    /// How many addresses it has; `u128::MAX` for all 2^128.
    pub(crate) fn size(&self) -> u128 {
        host_mask(self.family, self.length).saturating_add(1)
    }

    /// The other half of the block that is one bit wider. Not for length 0.
    fn buddy(&self) -> Self {
        Self { bits: self.bits ^ (1 << (self.family.bits() - self.length)), ..*self }
    }

    /// Itself without `hole`, as the fewest blocks.
    fn without(&self, hole: &Self) -> Vec<Self> {
        if !self.overlaps(hole) {
            return vec![*self];
        }
        (self.length + 1..=hole.length).map(|length| hole.widen(length).buddy()).collect()
    }
}

fn host_mask(family: Family, length: u8) -> u128 {
    match family.bits() - length {
        0 => 0,
        128 => u128::MAX,
        host => (1 << host) - 1,
    }
}

/// What is free of a block: the fewest aligned blocks, thus a function of what is taken and never of the order in which
/// it was. IPv4-mapped addresses are never free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Free {
    family: Family,
    /// First address to prefix length.
    by_address: BTreeMap<u128, u8>,
    by_length: BTreeSet<(u8, u128)>,
}

impl Free {
    pub(crate) fn whole(block: &Block) -> Self {
        let mut free = Self { family: block.family, by_address: BTreeMap::new(), by_length: BTreeSet::new() };
        free.give(block);
        free
    }

    fn insert(&mut self, block: Block) {
        self.by_address.insert(block.bits, block.length);
        self.by_length.insert((block.length, block.bits));
    }

    fn remove(&mut self, block: &Block) -> bool {
        // Another free block may begin at the same address.
        let was = self.by_length.remove(&(block.length, block.bits));
        if was {
            self.by_address.remove(&block.bits);
        }
        was
    }

    fn block(&self, length: u8, bits: u128) -> Block {
        Block { family: self.family, bits, length }
    }

    /// Takes what is free of a block out.
    pub(crate) fn take(&mut self, block: &Block) {
        if let Some((&bits, &length)) = self.by_address.range(..=block.bits).next_back() {
            let around = self.block(length, bits);
            if around.contains(block) {
                self.remove(&around);
                for part in around.without(block) {
                    self.insert(part);
                }
                return;
            }
        }
        let inside: Vec<Block> =
            self.by_address.range(block.bits..=block.last()).map(|(&bits, &length)| self.block(length, bits)).collect();
        for part in inside {
            self.remove(&part);
        }
    }

    /// Puts a block back of which nothing is free.
    pub(crate) fn give(&mut self, block: &Block) {
        if MAPPED.contains(block) {
            return;
        }
        for part in block.without(&MAPPED) {
            let mut joined = part;
            while joined.length > 0 && self.remove(&joined.buddy()) {
                joined = joined.widen(joined.length - 1);
            }
            self.insert(joined);
        }
    }

    /// Best fit: the lowest block of `length` in the smallest free block that has room for it.
    pub(crate) fn fit(&self, length: u8) -> Option<Block> {
        let (smallest, _) = self.by_length.range(..=(length, u128::MAX)).next_back()?;
        let (_, bits) = self.by_length.range((*smallest, 0)..).next()?;
        Some(self.block(length, *bits))
    }

    /// The length of the largest free block.
    pub(crate) fn largest(&self) -> Option<u8> {
        self.by_length.first().map(|(length, _)| *length)
    }

    pub(crate) fn blocks(&self) -> usize {
        self.by_length.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Block> + '_ {
        self.by_address.iter().map(|(&bits, &length)| self.block(length, bits))
    }

    /// Free addresses, at most `u128::MAX`.
    pub(crate) fn size(&self) -> u128 {
        self.iter().fold(0, |sum: u128, block| sum.saturating_add(block.size()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(text: &str) -> Block {
        Block::of(&text.parse().unwrap())
    }

    #[test]
    fn blocks_at_the_ends_of_the_number_line() {
        for (text, size) in [
            ("0.0.0.0/0", 1 << 32),
            ("255.255.255.255/32", 1),
            ("255.255.255.254/31", 2),
            ("::/0", u128::MAX),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", 1),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127", 2),
        ] {
            let block = block(text);
            assert_eq!((block.size(), block.cidr().to_string()), (size, text.to_owned()));
            assert!(block.contains(&block));
        }
        assert!(block("::/0").contains(&block("ffff::/16")) && !block("::/0").contains(&block("0.0.0.0/0")));
        assert!(block("8000::/1").buddy() == block("::/1") && !block("8000::/1").contains(&block("::/1")));
    }

    #[test]
    fn what_is_taken_and_given_back_joins_to_the_whole() {
        for whole in ["0.0.0.0/0", "10.0.0.0/8", "fd00::/8", "8000::/1"].map(block) {
            let mut free = Free::whole(&whole);
            let untouched = free.clone();
            let taken: Vec<Block> = (0..9)
                .map(|i| {
                    let found = free.fit(whole.length + 20 - i).unwrap();
                    free.take(&found);
                    found
                })
                .collect();
            assert_eq!(free.size() + taken.iter().map(Block::size).sum::<u128>(), whole.size());
            for block in &taken {
                free.give(block);
            }
            assert_eq!(free, untouched);
        }
    }

    #[test]
    fn a_smaller_free_block_at_the_buddys_address_stays() {
        let mut free = Free::whole(&block("0.0.0.0/0"));
        for taken in ["64.0.0.0/2", "192.0.0.0/2"] {
            free.take(&block(taken));
        }
        // Its buddy is 128.0.0.0/2, which is free; the half around them is then joined, but not to 0.0.0.0/2.
        free.give(&block("192.0.0.0/2"));
        assert_eq!(free.iter().collect::<Vec<_>>(), [block("0.0.0.0/2"), block("128.0.0.0/1")]);
        assert_eq!(free.size(), 3 << 30);
    }

    #[test]
    fn mapped_addresses_are_never_free() {
        let mut free = Free::whole(&block("::/0"));
        assert!(free.iter().all(|b| !b.overlaps(&MAPPED)));
        let pristine = free.clone();
        free.take(&block("::/64"));
        free.give(&block("::/64"));
        assert_eq!(free, pristine);
        Block::check("cidr", &"::ffff:10.0.0.0/104".parse().unwrap()).unwrap_err();
    }
}
