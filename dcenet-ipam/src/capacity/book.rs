//! From records to counts.

use std::collections::{BTreeMap, BTreeSet};

use dcenet_core::provider::LeaseError;

use super::{Capacity, PoolCapacity, Sharers};
use crate::config::Layout;
use crate::follow::Replica;
use crate::ipam::decode;
use crate::model::{Addr, BlockOwner, Interval, Intervals, NodeName, Pool};
use crate::record::{
    AttachmentRecord, BlockRecord, SlotRecord, block_prefix, network_prefix, reservation_of, reservation_prefix,
    slot_prefix,
};
use crate::store::{Entry, Key, number_of};

/// The records that counts are made of, each with its version.
pub(super) struct Book {
    layout: Layout,
    prefixes: Vec<Key>,
    /// By pool of the layout and address.
    slots: BTreeMap<(usize, u128), (u64, SlotRecord)>,
    /// By pool and block.
    blocks: BTreeMap<(usize, u128), (u64, BlockRecord)>,
    /// By key: what somebody outside uses.
    reservations: BTreeMap<Key, u64>,
    /// By key: on which node each attachment has an address of which pools.
    attachments: BTreeMap<Key, (u64, Option<NodeName>, Vec<usize>)>,
}

/// What an address counts as.
enum State {
    Bound,
    Kept,
    /// Until when; `None` for one that no search finds, for it rests in the queue of a pool of another name.
    Cooling(Option<u64>),
    Quarantined,
    Available,
}

impl Replica for Book {
    fn prefixes(&self) -> &[Key] {
        &self.prefixes
    }

    fn reset(&mut self, found: Vec<(Key, Entry)>, _now: u64) -> Result<(), LeaseError> {
        (self.slots, self.blocks, self.reservations, self.attachments) = Default::default();
        found.into_iter().try_for_each(|(key, entry)| self.enter(&key, entry.version, Some(&entry)))
    }

    fn take_in(&mut self, revision: u64, writes: Vec<(Key, Option<Entry>)>, _now: u64) -> Result<(), LeaseError> {
        writes.into_iter().try_for_each(|(key, entry)| self.enter(&key, revision, entry.as_ref()))
    }
}

impl Book {
    pub(super) fn new(layout: Layout) -> Self {
        let mut prefixes = vec![network_prefix(None)];
        for pool in &layout.pools {
            prefixes.push(slot_prefix(&pool.space, pool.family()));
            prefixes.push(reservation_prefix(&pool.space, pool.family()));
            prefixes.extend(pool.block.map(|_| block_prefix(&pool.space, pool.family(), &pool.name)));
        }
        prefixes.sort_unstable();
        prefixes.dedup();
        let (slots, blocks, reservations, attachments) = Default::default();
        Self { layout, prefixes, slots, blocks, reservations, attachments }
    }

    /// Enters what a key holds since a revision, unless something newer is known.
    fn enter(&mut self, key: &[u8], revision: u64, entry: Option<&Entry>) -> Result<(), LeaseError> {
        match key.first() {
            Some(b's') => {
                let Some(place) = self.slot_of(key) else { return Ok(()) };
                set(&mut self.slots, place, revision, entry.map(|entry| decode(key, entry)).transpose()?)
            }
            Some(b'b') => {
                let Some(place) = self.block_of(key) else { return Ok(()) };
                set(&mut self.blocks, place, revision, entry.map(|entry| decode(key, entry)).transpose()?)
            }
            Some(b'x') => match entry {
                Some(_) => drop(self.reservations.insert(key.to_vec(), revision)),
                None if self.reservations.get(key).is_some_and(|known| *known < revision) => {
                    self.reservations.remove(key);
                }
                None => {}
            },
            Some(b't') => {
                if self.attachments.get(key).is_some_and(|(known, ..)| *known >= revision) {
                    return Ok(());
                }
                match entry {
                    Some(entry) => {
                        let record: AttachmentRecord = decode(key, entry)?;
                        let pools = record.addresses.iter().filter_map(|held| {
                            let (space, _) = held.slot()?;
                            self.layout.pools.iter().position(|p| p.name == held.pool && p.space == space)
                        });
                        let pools = pools.collect();
                        self.attachments.insert(key.to_vec(), (revision, record.node, pools));
                    }
                    None => drop(self.attachments.remove(key)),
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn slot_of(&self, key: &[u8]) -> Option<(usize, u128)> {
        self.layout.pools.iter().enumerate().find_map(|(i, pool)| {
            let bits = number_of(&slot_prefix(&pool.space, pool.family()), key).ok()?;
            let address = Addr { family: pool.family(), bits };
            pool.subnet.contains(&address.ip()).then_some((i, bits))
        })
    }

    fn block_of(&self, key: &[u8]) -> Option<(usize, u128)> {
        self.layout.pools.iter().enumerate().filter(|(_, pool)| pool.block.is_some()).find_map(|(i, pool)| {
            Some((i, number_of(&block_prefix(&pool.space, pool.family(), &pool.name), key).ok()?))
        })
    }

    pub(super) fn count(&self, revision: u64, now: u64) -> Capacity {
        let mut next_due = None;
        let pools = (0..self.layout.pools.len()).map(|i| self.count_pool(i, now, &mut next_due)).collect();
        Capacity { revision, pools, next_due }
    }

    fn count_pool(&self, index: usize, now: u64, next_due: &mut Option<u64>) -> PoolCapacity {
        let pool = &self.layout.pools[index];
        let held_outside = self.held_outside(pool);
        let size = units(pool, &pool.allowed);
        let open = pool.free.without(&held_outside);
        let fixed = pool.allowed.without(&pool.free).without(&held_outside);
        let (mut bound, mut kept, mut cooling, mut quarantined) = (0, units(pool, &fixed), 0, 0);
        let mut reserved = size - units(pool, &pool.allowed.without(&held_outside));
        // What of the free is not to be had, by number, and what somebody has or keeps.
        let (mut away, mut used) = (Vec::new(), Vec::new());
        for (&(_, bits), (_, slot)) in self.slots.range((index, 0)..=(index, u128::MAX)) {
            let state = self.state(pool, slot, now);
            if matches!(state, State::Bound | State::Kept)
                || matches!(state, State::Quarantined) && slot.claim().is_some()
            {
                used.push(bits);
            }
            if !pool.offers(&pool.allowed, bits) {
                continue;
            }
            let free = open.contains(bits);
            let due = match (end_of(slot).filter(|end| *end > now), &state) {
                (None, State::Cooling(until)) => *until,
                (end, _) => end,
            };
            *next_due = next_due.iter().copied().chain(due).min();
            let count = match state {
                State::Bound => &mut bound,
                State::Kept => &mut kept,
                State::Quarantined => &mut quarantined,
                State::Cooling(_) if free => &mut cooling,
                // What is not free for anybody stays what it is without a record: reserved, or a claim's.
                State::Cooling(_) | State::Available => continue,
            };
            *count += 1;
            if free {
                away.push(bits);
            } else if fixed.contains(bits) {
                kept -= 1;
            } else {
                reserved -= 1;
            }
        }
        let available_in = |among: &Intervals| {
            let taken = among.iter().map(|(low, high)| {
                away.partition_point(|bits| *bits <= high) - away.partition_point(|bits| *bits < low)
            });
            units(pool, among) - taken.sum::<usize>() as u128
        };
        let available = available_in(&open);
        let (mut available_to, mut unowned, mut sharing) = (BTreeMap::new(), None, Sharers::All);
        if let Some(blocks) = pool.block {
            let mut left = available;
            for (&(_, block), (_, record)) in self.blocks.range((index, 0)..=(index, u128::MAX)) {
                let (low, high) = pool.block_range(blocks.length, block);
                let inside = available_in(&open.within(low, high));
                left -= inside;
                if !record.closing {
                    *available_to.entry(record.node.clone()).or_insert(0) += inside;
                }
            }
            if blocks.owner == BlockOwner::Application {
                sharing = Sharers::Application;
                let shift = u32::from(pool.family().bits() - blocks.length);
                used.retain(|block| !self.blocks.contains_key(&(index, block >> shift)));
                let blocks_of_others: BTreeSet<u128> = used.into_iter().map(|bits| bits >> shift).collect();
                for block in blocks_of_others {
                    let (low, high) = pool.block_range(blocks.length, block);
                    left -= available_in(&open.within(low, high));
                }
            } else if !blocks.borrow {
                sharing = Sharers::Node;
            }
            unowned = Some(left);
        }
        let mut in_use_on = BTreeMap::new();
        for (_, node, pools) in self.attachments.values() {
            let Some(node) = node else { continue };
            let count = pools.iter().filter(|p| **p == index).count() as u128;
            if count > 0 {
                *in_use_on.entry(node.clone()).or_insert(0) += count;
            }
        }
        PoolCapacity {
            pool: pool.name.clone(),
            space: pool.space.clone(),
            size,
            bound,
            kept,
            cooling,
            quarantined,
            reserved,
            available,
            in_use_on,
            available_to,
            unowned,
            sharing,
            select: pool.select.clone(),
        }
    }

    /// What somebody outside uses, widened to what the pool hands out.
    fn held_outside(&self, pool: &Pool) -> Intervals {
        let prefix = reservation_prefix(&pool.space, pool.family());
        let mask = (1u128 << pool.shift()) - 1;
        let of_pool = self.reservations.keys().filter_map(|key| reservation_of(&prefix, key));
        Intervals::new(of_pool.map(|(low, high): Interval| (low & !mask, high | mask)).collect())
    }

    fn cooldown(&self) -> u64 {
        u64::try_from(self.layout.cooldown.as_millis()).unwrap_or(u64::MAX)
    }

    fn state(&self, pool: &Pool, slot: &SlotRecord, now: u64) -> State {
        let rests = |at: u64| at.checked_add(self.cooldown()).filter(|end| *end > now);
        match slot {
            SlotRecord::Bound { .. } | SlotRecord::Handover { .. } => State::Bound,
            SlotRecord::Freed { pool: queue, at } => {
                let own =
                    queue.strip_prefix(pool.name.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('@'));
                match (own, u128::from(now.abs_diff(*at)) < self.layout.cooldown.as_millis()) {
                    (false, _) => State::Cooling(None),
                    (true, true) => State::Cooling(rests(*at)),
                    (true, false) => State::Available,
                }
            }
            SlotRecord::Quarantined { claim, until, .. } => match (claim, until.filter(|end| *end <= now)) {
                (_, None) => State::Quarantined,
                (Some(_), Some(_)) => State::Kept,
                (None, Some(end)) => ended(rests(end)),
            },
            SlotRecord::Kept { until, .. } => match until.filter(|end| *end <= now) {
                None => State::Kept,
                Some(end) => ended(rests(end)),
            },
        }
    }
}

/// What is over counts as released then.
fn ended(rests: Option<u64>) -> State {
    match rests {
        Some(until) => State::Cooling(Some(until)),
        None => State::Available,
    }
}

fn end_of(slot: &SlotRecord) -> Option<u64> {
    match slot {
        SlotRecord::Kept { until, .. } | SlotRecord::Quarantined { until, .. } => *until,
        SlotRecord::Bound { .. } | SlotRecord::Handover { .. } | SlotRecord::Freed { .. } => None,
    }
}

/// How many addresses, or prefixes where the pool delegates those.
fn units(pool: &Pool, among: &Intervals) -> u128 {
    match pool.shift() {
        0 => among.size(),
        shift => among.iter().fold(0, |sum, (low, high)| sum + ((high >> shift) - (low >> shift) + 1)),
    }
}

fn set<K: Ord, V>(map: &mut BTreeMap<K, (u64, V)>, key: K, revision: u64, value: Option<V>) {
    if map.get(&key).is_some_and(|(known, _)| *known >= revision) {
        return;
    }
    match value {
        Some(value) => drop(map.insert(key, (revision, value))),
        None => drop(map.remove(&key)),
    }
}
