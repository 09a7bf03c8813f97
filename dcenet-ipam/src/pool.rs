//! Which addresses of a set are free, which are used by whom, and which rest: in memory, in time that depends neither on
//! how large the set is nor on how full.
//!
//! [`AddressPool`] is a pure structure: it does no I/O and reads no clock; the time is handed in. It decides nothing that
//! must be true. What is in use is what the store says, guarded commit by guarded commit; the pool is
//!
//! - what an [`Ipam`](crate::Ipam) that lives long knows of its pools without asking
//!   ([`Ipam::with_index`](crate::Ipam::with_index)): it is fed from what the store holds, from the commits of this
//!   process and from those that a watch tells of others, and proposes the address that a commit then tries to take. A
//!   proposal is set apart while it is tried, so no two callers of a process try the same one. Where it is out of date
//!   the commit is refused by the slot's guard, which also says what is there, and the next proposal knows it;
//! - what an embedder uses that has a set of addresses or numbers for himself and keeps them nowhere: VLAN-local
//!   prefixes, link addresses, the inside of a block that one node owns.
//!
//! # Structure
//! An address is 110 bits of chunk and 18 bits of place in it. Chunks exist on demand, in a tree by number, so that a
//! set of 2^96 addresses costs what is in use of it. A chunk is three levels of 64: a node has a bit for each child that
//! exists and one for each that is full, and holds the children that exist in order of their number, so a child is found
//! by counting bits. A leaf has a bit for each of 64 addresses and the records of those that have one, once there are
//! many each at a place of its own. The free address
//! at or above a given one is a count of trailing zeros on each level. Chunks that are full are known as runs of numbers,
//! so that any number of them in a row is stepped over at once.
//!
//! A record is 24 bytes: sequence, time and owner, whose name is kept once for all its addresses. Released addresses
//! keep their record, and stand in a queue in the order of release.
//!
//! # Which address
//! The lowest that has no record, else the one released longest ago if its cooldown is over. That is the order in which
//! the allocator of the store chooses too.
//!
//! ```
//! use std::time::Duration;
//!
//! use dcenet_ipam::pool::{AddressPool, Ranges};
//!
//! let subnet: Ranges = "10.1.0.0/31".parse::<ipnet::IpNet>()?.into();
//! let mut pool = AddressPool::new(subnet, Duration::from_secs(60));
//! let first = pool.allocate("shop/web-0", 0)?;
//! let second = pool.allocate("shop/web-1", 0)?;
//! assert_eq!((first.address + 1, pool.owner(second.address)), (second.address, Some("shop/web-1")));
//! assert!(pool.is_full(0));
//! assert!(pool.free(first.address, first.sequence, 1_000));
//! assert!(!pool.free(first.address, first.sequence, 1_000), "a sequence frees once");
//! assert_eq!(pool.allocate("shop/web-2", 2_000).unwrap_err().free_at, Some(61_000));
//! assert_eq!(pool.allocate("shop/web-2", 61_000)?.address, first.address);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod owners;
mod tree;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ipnet::IpNet;

use self::owners::Owners;
use self::tree::{Chunk, Level};
use crate::model::{Family, Intervals};
use crate::store::Runs;

/// A set of addresses as numbers, those of IPv4 below 2^32.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Intervals);

impl Ranges {
    /// The union of ranges, each from its first to its last number. One that ends before it begins is empty.
    pub fn new(ranges: impl IntoIterator<Item = (u128, u128)>) -> Self {
        Self(Intervals::new(ranges.into_iter().filter(|(first, last)| first <= last).collect()))
    }
}

impl From<IpNet> for Ranges {
    /// All of a prefix.
    fn from(prefix: IpNet) -> Self {
        let first = match prefix.network() {
            std::net::IpAddr::V4(ip) => u32::from(ip).into(),
            // Not canonical: the prefix of mapped addresses is one of IPv6.
            std::net::IpAddr::V6(ip) => u128::from(ip),
        };
        let host = Family::of(&prefix).bits() - prefix.prefix_len();
        Self::new([(first, first | u128::MAX.checked_shr(128 - u32::from(host)).unwrap_or(0))])
    }
}

impl From<Intervals> for Ranges {
    fn from(intervals: Intervals) -> Self {
        Self(intervals)
    }
}

/// Addresses in use, at rest and free.
#[derive(Debug, Default)]
pub struct AddressPool {
    ranges: Intervals,
    chunks: BTreeMap<u128, Chunk>,
    /// The chunks in which every address has a record.
    full: Runs,
    /// All ranges before this one have a record for every address.
    open: usize,
    /// Addresses of the ranges without a record, `u128::MAX` also for 2^128.
    unused: u128,
    bound: u64,
    /// In the order of the sequences. Addresses that were taken since stand in it until their turn comes, or there are too many of them.
    released: VecDeque<Released>,
    /// How many in the queue are at rest.
    resting: usize,
    owners: Owners,
    sequence: u64,
    cooldown: u64,
}

/// What is known of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Record {
    /// Of the allocation, or of the release.
    sequence: u64,
    /// When that was, in milliseconds.
    at: u64,
    owner: u32,
}

impl Record {
    fn is_released(&self) -> bool {
        self.owner == Owners::NOBODY
    }
}

/// In the queue of releases. Of an address as two words, for as one number it would take more room.
#[derive(Debug, Clone, Copy)]
struct Released {
    address: [u64; 2],
    sequence: u64,
    at: u64,
}

/// An address that was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// The address.
    pub address: u128,
    /// What [`AddressPool::free`] must present: never given twice by one pool.
    pub sequence: u64,
}

/// What an address is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use<'a> {
    /// Somebody has it.
    Bound {
        /// Who.
        owner: &'a str,
        /// Of the allocation.
        sequence: u64,
        /// When it was given, in the caller's milliseconds.
        since: u64,
    },
    /// It was given back, and not given again since.
    Released {
        /// Of the release.
        sequence: u64,
        /// When.
        at: u64,
    },
}

/// No address is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no address is free{}", .free_at.map_or_else(String::new, |at| format!("; one is at {at} ms")))]
pub struct Full {
    /// When the first cooldown ends, if an address is at rest.
    pub free_at: Option<u64>,
}

/// An address cannot be given to who asks for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// Somebody has it.
    #[error("{owner} has it")]
    Held {
        /// Who.
        owner: String,
    },
    /// It was given back lately.
    #[error("it was given back lately; it is free at {free_at} ms")]
    Cooling {
        /// When it is free.
        free_at: u64,
    },
    /// It is in none of the ranges.
    #[error("it is in none of the ranges")]
    Outside,
}

impl AddressPool {
    /// All of the ranges is free. Addresses that are given back rest for `cooldown`.
    pub fn new(ranges: impl Into<Ranges>, cooldown: Duration) -> Self {
        let Ranges(ranges) = ranges.into();
        let cooldown = u64::try_from(cooldown.as_millis()).unwrap_or(u64::MAX);
        Self { unused: ranges.size(), ranges, cooldown, ..Self::default() }
    }

    /// Gives the next address.
    ///
    /// # Errors
    /// None is free.
    pub fn allocate(&mut self, owner: &str, now: u64) -> Result<Allocation, Full> {
        let address = match self.lowest_unused() {
            Some(address) => address,
            None => self.oldest_released(now)?,
        };
        Ok(self.give(address, owner, now))
    }

    /// Gives the lowest address of `first..=last` that was never used; `None` if there is none. Rivals that must part
    /// ways each begin elsewhere.
    pub fn allocate_within(&mut self, first: u128, last: u128, owner: &str, now: u64) -> Option<Allocation> {
        let address = self.unused_within(first, last)?;
        Some(self.give(address, owner, now))
    }

    /// Gives this address.
    ///
    /// # Errors
    /// Somebody has it, or it rests, or is in none of the ranges.
    pub fn allocate_exact(&mut self, address: u128, owner: &str, now: u64) -> Result<Allocation, Refused> {
        if !self.ranges.contains(address) {
            return Err(Refused::Outside);
        }
        match self.record(address) {
            Some(record) if !record.is_released() => {
                return Err(Refused::Held { owner: self.owners.name(record.owner).to_owned() });
            }
            Some(record) if self.cools(record.at, now) => {
                return Err(Refused::Cooling { free_at: record.at.saturating_add(self.cooldown) });
            }
            _ => {}
        }
        Ok(self.give(address, owner, now))
    }

    /// Takes an address back if it is held under this sequence. Returns whether it was.
    pub fn free(&mut self, address: u128, sequence: u64, now: u64) -> bool {
        if !self.record(address).is_some_and(|r| r.sequence == sequence && !r.is_released()) {
            return false;
        }
        let sequence = self.next_sequence();
        self.note_released(address, sequence, now);
        true
    }

    /// Forgets the release of up to two addresses that rest for longer than `remembered` and their cooldown: they are as
    /// if never used. Called with each release, it keeps the memory to what was released within that time.
    pub fn forget_released(&mut self, remembered: Duration, now: u64) {
        let limit = u64::try_from(remembered.as_millis()).unwrap_or(u64::MAX).max(self.cooldown);
        for _ in 0..2 {
            // Without a look at what is not old.
            if self.released.front().is_none_or(|released| now.abs_diff(released.at) <= limit) {
                return;
            }
            match self.head() {
                Some((address, record)) if now.abs_diff(record.at) > limit => self.forget(address),
                _ => return,
            }
        }
    }

    /// Whether nothing could be given now.
    pub fn is_full(&mut self, now: u64) -> bool {
        self.unused == 0 && self.oldest_released(now).is_err()
    }

    /// How many addresses there are, `u128::MAX` also for 2^128.
    pub fn size(&self) -> u128 {
        self.ranges.size()
    }

    /// How many addresses somebody has.
    pub fn bound(&self) -> u64 {
        self.bound
    }

    /// How many addresses were given back and not given again since, whether they cool or not.
    pub fn resting(&self) -> usize {
        self.resting
    }

    /// What the address is used for.
    pub fn usage(&self, address: u128) -> Option<Use<'_>> {
        self.record(address).map(|&Record { sequence, at, owner }| match owner {
            Owners::NOBODY => Use::Released { sequence, at },
            owner => Use::Bound { owner: self.owners.name(owner), sequence, since: at },
        })
    }

    /// Who has the address.
    pub fn owner(&self, address: u128) -> Option<&str> {
        match self.usage(address)? {
            Use::Bound { owner, .. } => Some(owner),
            Use::Released { .. } => None,
        }
    }

    /// Enters that an address is used, as another place knows that counts its own sequences.
    pub fn note_bound(&mut self, address: u128, owner: &str, sequence: u64, since: u64) {
        if self.ranges.contains(address) {
            let owner = self.owners.intern(owner);
            self.enter(address, Record { sequence, at: since, owner });
        }
    }

    /// Enters that an address was released, as another place knows. The queue is in the order of the sequences.
    pub fn note_released(&mut self, address: u128, sequence: u64, at: u64) {
        if !self.ranges.contains(address) {
            return;
        }
        self.enter(address, Record { sequence, at, owner: Owners::NOBODY });
        let released = Released { address: [(address >> 64) as u64, address as u64], sequence, at };
        if self.released.back().is_none_or(|last| last.sequence <= sequence) {
            self.released.push_back(released);
        } else {
            let place = self.released.partition_point(|before| before.sequence <= sequence);
            self.released.insert(place, released);
        }
        self.resting += 1;
        self.tidy();
    }

    /// Enters that an address is as if never used.
    pub fn forget(&mut self, address: u128) {
        let (number, place) = split(address);
        let Some(chunk) = self.chunks.get_mut(&number) else { return };
        let Some(record) = chunk.remove(place) else { return };
        if chunk.is_empty() {
            self.chunks.remove(&number);
        }
        self.full.remove(number);
        self.unused = self.unused.saturating_add(1);
        self.open = self.open.min(self.ranges.position(address));
        self.leave(record);
        self.tidy();
    }

    /// Enters that every address is as if never used.
    pub fn clear(&mut self) {
        let Self { ranges, cooldown, sequence, .. } = std::mem::take(self);
        *self = Self { unused: ranges.size(), ranges, cooldown, sequence, ..Self::default() };
    }

    /// The lowest address of `first..=last` that was never used.
    pub fn unused_within(&self, first: u128, last: u128) -> Option<u128> {
        self.ranges.parts_within(first, last).find_map(|(low, high)| self.unused_in(low, high))
    }

    /// The address that was released longest ago and does not cool, with sequence and time of the release.
    pub fn next_released(&mut self, now: u64) -> Option<(u128, u64, u64)> {
        let address = self.oldest_released(now).ok()?;
        self.record(address).map(|record| (address, record.sequence, record.at))
    }

    fn give(&mut self, address: u128, owner: &str, now: u64) -> Allocation {
        let (owner, sequence) = (self.owners.intern(owner), self.next_sequence());
        self.enter(address, Record { sequence, at: now, owner });
        Allocation { address, sequence }
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    fn record(&self, address: u128) -> Option<&Record> {
        let (number, place) = split(address);
        self.chunks.get(&number)?.get(place)
    }

    fn enter(&mut self, address: u128, record: Record) {
        let (number, place) = split(address);
        let chunk = self.chunks.entry(number).or_default();
        let before = chunk.insert(place, record);
        match before {
            Some(before) => self.leave(before),
            None => {
                if chunk.is_full() {
                    self.full.insert(number);
                }
                self.unused -= u128::from(self.unused != u128::MAX);
            }
        }
        self.bound += u64::from(!record.is_released());
    }

    /// Counts out a record that was replaced or removed.
    fn leave(&mut self, record: Record) {
        if record.is_released() {
            self.resting -= 1;
        } else {
            self.bound -= 1;
            self.owners.release(record.owner);
        }
    }

    fn lowest_unused(&mut self) -> Option<u128> {
        if self.unused == 0 {
            return None;
        }
        while let Some((low, high)) = self.ranges.nth(self.open) {
            if let Some(address) = self.unused_in(low, high) {
                return Some(address);
            }
            self.open += 1;
        }
        None
    }

    /// The lowest address without a record of an interval of the ranges.
    fn unused_in(&self, mut low: u128, high: u128) -> Option<u128> {
        let last = high >> tree::CHUNK;
        loop {
            let number = low >> tree::CHUNK;
            let open = self.full.first_gap(number, last)?;
            if open != number {
                low = open << tree::CHUNK;
            }
            let Some(chunk) = self.chunks.get(&open) else { return Some(low) };
            if let Some(place) = chunk.first_free(split(low).1) {
                return Some(open << tree::CHUNK | u128::from(place)).filter(|address| *address <= high);
            }
            if open == last {
                return None;
            }
            low = (open + 1) << tree::CHUNK;
        }
    }

    /// The head of the queue, without what was taken since.
    fn head(&mut self) -> Option<(u128, Record)> {
        loop {
            let released = self.released.front()?;
            if let Some(record) = self.stands(released) {
                return Some((released.number(), record));
            }
            self.released.pop_front();
        }
    }

    fn stands(&self, released: &Released) -> Option<Record> {
        self.record(released.number()).filter(|r| r.is_released() && r.sequence == released.sequence).copied()
    }

    fn oldest_released(&mut self, now: u64) -> Result<u128, Full> {
        match self.head() {
            None => Err(Full { free_at: None }),
            Some((_, record)) if self.cools(record.at, now) => {
                Err(Full { free_at: Some(record.at.saturating_add(self.cooldown)) })
            }
            Some((address, _)) => Ok(address),
        }
    }

    /// On either side, so that a clock that jumps delays reuse by no more than the cooldown.
    fn cools(&self, at: u64, now: u64) -> bool {
        now.abs_diff(at) < self.cooldown
    }

    /// Drops what stands in the queue for nothing once that is the greater part of it.
    fn tidy(&mut self) {
        if self.released.len() > 2 * self.resting + 64 {
            let mut released = std::mem::take(&mut self.released);
            released.retain(|r| self.stands(r).is_some());
            self.released = released;
        }
    }
}

impl Released {
    fn number(&self) -> u128 {
        let [high, low] = self.address;
        u128::from(high) << 64 | u128::from(low)
    }
}

/// The chunk of an address and the place in it.
fn split(address: u128) -> (u128, u32) {
    (address >> tree::CHUNK, (address as u32) & ((1 << tree::CHUNK) - 1))
}
