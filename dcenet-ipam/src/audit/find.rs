//! What does not fit together, and what would mend it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use dcenet_core::model::AttachmentKey;
use ipnet::IpNet;
use serde::Serialize;

use super::snapshot::{Place, Row, Snapshot};
use super::{Damage, Finding};
use crate::binder::ledger::page_key;
use crate::history::open_tenures;
use crate::ipam::Ipam;
use crate::model::{Addr, AddressSpace, ClaimKey, Family, KeepPolicy};
use crate::plan::{Level, planned};
use crate::record::{
    AttachmentRecord, ClaimRecord, EventKind, EventRecord, Held, RegisteredPool, SlotRecord, SpaceRecord,
    attachment_key, block_prefix, block_queue, claim_key, delegated_prefix, due_key, event_key, freed_key,
    history_prefix, owned_prefix, quarantine_key, slot_key, space_key,
};
use crate::store::{Guard, Key, Write, numbered};

pub(super) struct Finder<'a> {
    pub(super) ipam: &'a Ipam,
    pub(super) snapshot: &'a Snapshot<'a>,
    pub(super) now: u64,
    found: Vec<Finding>,
}

/// What mends a finding.
pub(super) struct Mend {
    remedy: Option<&'static str>,
    guards: Vec<Key>,
    writes: Vec<Write>,
}

impl Mend {
    /// Nothing: people must decide.
    pub(super) fn none() -> Self {
        Self { remedy: None, guards: Vec::new(), writes: Vec::new() }
    }

    pub(super) fn new(remedy: &'static str, writes: Vec<Write>) -> Self {
        Self { remedy: Some(remedy), guards: Vec::new(), writes }
    }

    /// Also rests on these keys.
    pub(super) fn resting_on(mut self, keys: impl IntoIterator<Item = Key>) -> Self {
        self.guards.extend(keys);
        self
    }
}

pub(super) fn put(key: Key, record: &impl Serialize) -> Write {
    Write::Put(key, serde_json::to_vec(record).expect("records have only text keys and serialise"))
}

impl<'a> Finder<'a> {
    pub(super) fn new(ipam: &'a Ipam, snapshot: &'a Snapshot<'a>, now: u64) -> Self {
        Self { ipam, snapshot, now, found: Vec::new() }
    }

    pub(super) fn findings(mut self) -> Vec<Finding> {
        self.unreadable();
        self.attachments();
        self.slots();
        self.claims();
        self.rows();
        self.blocks();
        self.delegated();
        self.reservations();
        self.pools();
        self.outside();
        if self.ipam.layout().history.is_some() {
            self.history();
        }
        self.found
    }

    pub(super) fn find(&mut self, key: Key, damage: Damage, mend: Mend) {
        let mut keys: Vec<Key> = std::iter::once(key.clone()).chain(mend.guards).collect();
        // A record that is written must be as it was seen. Rows say nothing of their own.
        keys.extend(mend.writes.iter().map(|write| write.key().to_vec()).filter(|key| !is_row(key)));
        keys.sort();
        keys.dedup();
        let guards = keys.into_iter().map(|key| Guard { version: self.snapshot.version(&key), key }).collect();
        let key = key.escape_ascii().to_string();
        self.found.push(Finding { damage, key, remedy: mend.remedy, guards, writes: mend.writes });
    }

    fn is_unreadable(&self, key: &[u8]) -> bool {
        self.snapshot.unreadable.contains_key(key)
    }

    fn slot(&self, space: &AddressSpace, address: Addr) -> Option<&'a SlotRecord> {
        self.snapshot.slots.get(&(space.clone(), address)).map(|(slot, _)| slot)
    }

    pub(super) fn registered(&self, space: &AddressSpace, address: Addr) -> Option<&'a RegisteredPool> {
        let (record, _) = self.snapshot.spaces.get(space)?;
        record.pools.iter().find(|pool| pool.subnet.contains(&address.ip()))
    }

    /// The pool that delegates or has delegated the address: of ground that a pool has given up, prefixes may be held.
    fn delegating(&self, space: &AddressSpace, address: Addr) -> Option<(&'a RegisteredPool, u8)> {
        let ip = address.ip();
        let (record, _) = self.snapshot.spaces.get(space)?;
        let given_up = || record.pools.iter().find(|pool| pool.given_up.iter().any(|ground| ground.contains(&ip)));
        let pool = self.registered(space, address).or_else(given_up)?;
        Some((pool, pool.delegate?))
    }

    /// What an attachment's record has of an address; `None` where no pool has it.
    pub(super) fn held(&self, space: &AddressSpace, address: Addr) -> Option<Held> {
        let pool = self.registered(space, address)?;
        let length = pool.delegate.unwrap_or(pool.subnet.prefix_len());
        let network = IpNet::new(address.ip(), length).ok()?;
        Some(Held { delegated: pool.delegate.is_some(), ..Held::new(space, network, &pool.name) })
    }

    /// The claim that has the address and may be the attachment's.
    pub(super) fn claim_of(
        &self,
        space: &AddressSpace,
        address: Addr,
        by: &AttachmentKey,
        record: &AttachmentRecord,
    ) -> Option<ClaimKey> {
        let workload = record.workload.as_ref()?;
        let mut names =
            [ClaimKey::new(workload.clone()).on(by.ifname.clone()), ClaimKey::new(workload.clone())].into_iter();
        names.find(|name| {
            let claim = self.snapshot.claims.get(&(space.clone(), address.family, name.clone()));
            claim.is_some_and(|(claim, _)| Addr::from(claim.address) == address)
        })
    }

    /// Rows that go when the state of an address goes.
    fn unlist(space: &AddressSpace, address: Addr, slot: Option<&SlotRecord>) -> Vec<Write> {
        listed(space, address, slot).into_iter().map(|(key, _)| Write::Delete(key)).collect()
    }

    /// Releases an address now.
    pub(super) fn free(&self, space: &AddressSpace, address: Addr) -> Option<Vec<Write>> {
        let pool = self.registered(space, address)?;
        let queue = match pool.block {
            Some(length) => block_queue(&pool.name, address.bits >> (address.family.bits() - length)),
            None => pool.name.clone(),
        };
        let row = Write::Put(freed_key(space, address, &queue, self.now), Vec::new());
        Some(vec![row, put(slot_key(space, address), &SlotRecord::Freed { at: self.now, pool: queue })])
    }

    fn attachments(&mut self) {
        for (attachment, (record, version)) in &self.snapshot.attachments {
            for (i, held) in record.addresses.iter().enumerate() {
                let first =
                    record.addresses[..i].iter().find(|first| first.pool == held.pool && first.space == held.space);
                if let Some(first) = first {
                    let (pool, first, second) = (held.pool.clone(), first.address.addr(), held.address.addr());
                    let damage = Damage::TwoOfPool { attachment: attachment.clone(), pool, first, second };
                    self.find(attachment_key(attachment), damage, Mend::none());
                }
                if let Some((space, address)) = held.slot() {
                    self.held_address(attachment, record, *version, (space, address));
                }
            }
        }
    }

    fn held_address(&mut self, by: &AttachmentKey, record: &AttachmentRecord, version: u64, (space, address): Place) {
        let (key, own) = (slot_key(&space, address), attachment_key(by));
        if self.is_unreadable(&key) {
            return;
        }
        let slot = self.slot(&space, address);
        let mut claim = self.claim_of(&space, address, by, record);
        let free = match slot {
            Some(SlotRecord::Bound { by: holder, .. }) if holder == by => return,
            Some(SlotRecord::Handover { by: holder, .. }) if holder == by => return,
            Some(SlotRecord::Handover { to: Some(holder), joined: true, .. }) if holder == by => return,
            None | Some(SlotRecord::Freed { .. }) => true,
            // Kept for a claim whose place nobody else has: a set's or a renamed one, which its name does not tell.
            Some(SlotRecord::Kept { claim: holder, .. }) => {
                let sole = self.holders_of(&space, address).len() == 1;
                claim = claim.filter(|claim| claim == holder).or_else(|| sole.then(|| holder.clone()));
                claim.is_some()
            }
            Some(_) => false,
        };
        if free {
            let mut writes = Self::unlist(&space, address, slot);
            writes.extend(self.delegated_row(&space, address));
            writes.push(put(key.clone(), &SlotRecord::Bound { by: by.clone(), claim }));
            let damage = Damage::AttachmentWithoutSlot { attachment: by.clone(), space, address: address.ip() };
            return self.find(key, damage, Mend::new("binds it to the attachment", writes).resting_on([own]));
        }
        let mut rest = AttachmentRecord { sequence: Some(record.sequence(version)), ..record.clone() };
        rest.addresses.retain(|held| held.slot().as_ref() != Some(&(space.clone(), address)));
        let write = if rest.addresses.is_empty() { Write::Delete(own.clone()) } else { put(own.clone(), &rest) };
        let holder = slot.map_or_else(String::new, holder);
        let damage = Damage::AttachmentLostAddress { attachment: by.clone(), space, address: address.ip(), holder };
        let mend =
            Mend::new("takes it out of the attachment's record; look whether its container uses it", vec![write]);
        // Without a holder the container may be the only one who has it: nothing is to be taken from it unseen.
        let mend = if slot.is_some_and(|slot| slot.holder().is_none()) { Mend::none() } else { mend };
        self.find(own, damage, mend.resting_on([key]));
    }

    fn slots(&mut self) {
        for ((space, address), (slot, _)) in &self.snapshot.slots {
            let (by, to) = match slot {
                SlotRecord::Bound { by, .. } => (Some(by), None),
                SlotRecord::Handover { by, to, joined, .. } => (Some(by), to.as_ref().filter(|_| *joined)),
                _ => (None, None),
            };
            for attachment in by.into_iter().chain(to) {
                self.slot_of(attachment, space, *address, slot);
            }
            if let SlotRecord::Kept { claim, until } = slot {
                self.kept(claim, *until, space, *address);
            }
            for (row, state) in listed(space, *address, Some(slot)) {
                if self.snapshot.version(&row).is_none() {
                    let damage = Damage::Unlisted { space: space.clone(), address: address.ip(), state };
                    let mend = Mend::new("lists it", vec![Write::Put(row.clone(), Vec::new())]).resting_on([row]);
                    self.find(slot_key(space, *address), damage, mend);
                }
            }
        }
    }

    fn slot_of(&mut self, attachment: &AttachmentKey, space: &AddressSpace, address: Addr, slot: &SlotRecord) {
        let own = attachment_key(attachment);
        let place = Some((space.clone(), address));
        let record = self.snapshot.attachments.get(attachment);
        if self.is_unreadable(&own) || record.is_some_and(|(r, _)| r.addresses.iter().any(|h| h.slot() == place)) {
            return;
        }
        let mend = self.held(space, address).map(|held| {
            let record = match record {
                Some((record, version)) => {
                    let mut record = AttachmentRecord { sequence: Some(record.sequence(*version)), ..record.clone() };
                    record.addresses.push(held);
                    record
                }
                None => AttachmentRecord {
                    workload: slot.claim().map(|claim| claim.workload.clone()),
                    addresses: vec![held],
                    mac: None,
                    node: None,
                    sequence: None,
                },
            };
            Mend::new(
                "enters it into the attachment's record, so that DEL, GC or reclaim release it",
                vec![put(own.clone(), &record)],
            )
        });
        let (attachment, space, address) = (attachment.clone(), space.clone(), address);
        let key = slot_key(&space, address);
        let damage = Damage::SlotWithoutAttachment { space, address: address.ip(), attachment };
        self.find(key, damage, mend.unwrap_or_else(Mend::none).resting_on([own]));
    }

    fn kept(&mut self, claim: &ClaimKey, until: Option<u64>, space: &AddressSpace, address: Addr) {
        let own = claim_key(space, address.family, claim);
        let record = self.snapshot.claims.get(&(space.clone(), address.family, claim.clone()));
        let has = record.is_some_and(|(record, _)| Addr::from(record.address) == address);
        if has || self.is_unreadable(&own) {
            return;
        }
        let key = slot_key(space, address);
        let mend = match (record, self.registered(space, address)) {
            (None, Some(pool)) => {
                let left = until.map(|until| std::time::Duration::from_millis(until.saturating_sub(self.now).max(1)));
                let record = ClaimRecord {
                    address: address.ip(),
                    pool: pool.name.clone(),
                    keep: left.map_or(KeepPolicy::Forever, KeepPolicy::For),
                    mac: None,
                    gone: false,
                    moves: 0,
                    away: None,
                };
                Mend::new("records the claim again", vec![put(own.clone(), &record)])
            }
            (Some(_), _) => match self.free(space, address) {
                Some(mut writes) => {
                    writes.extend(Self::unlist(space, address, self.slot(space, address)));
                    Mend::new("releases it, for nothing is attached and the claim has another", writes)
                }
                None => Mend::none(),
            },
            (None, None) => Mend::none(),
        };
        let damage = Damage::SlotWithoutClaim { space: space.clone(), address: address.ip(), claim: claim.clone() };
        self.find(key, damage, mend.resting_on([own]));
    }

    fn claims(&mut self) {
        for ((space, _, claim), (record, _)) in &self.snapshot.claims {
            let address = Addr::from(record.address);
            let key = slot_key(space, address);
            // What is kept for a time only may be taken by others when that is over.
            if matches!(record.keep, KeepPolicy::For(_) | KeepPolicy::Ephemeral) || self.is_unreadable(&key) {
                continue;
            }
            let own = claim_key(space, address.family, claim);
            match self.slot(space, address) {
                Some(slot) if slot.claim() == Some(claim) => {}
                // An attachment of the claim's workload that has it is told of in its place.
                slot @ (None | Some(SlotRecord::Freed { .. })) => {
                    let mut writes = Self::unlist(space, address, slot);
                    if self.holders_of(space, address).is_empty() {
                        writes.extend(self.delegated_row(space, address));
                        writes.push(put(key.clone(), &SlotRecord::Kept { claim: claim.clone(), until: None }));
                        let (claim, space) = (claim.clone(), space.clone());
                        let damage = Damage::ClaimWithoutSlot { claim, space, address: address.ip() };
                        self.find(key, damage, Mend::new("keeps it for the claim", writes).resting_on([own]));
                    }
                }
                Some(slot) => {
                    let (claim, space, holder) = (claim.clone(), space.clone(), holder(slot));
                    let damage = Damage::ClaimLostAddress { claim, space, address: address.ip(), holder };
                    let mend = Mend::new(
                        "forgets the claim's record; its next lease makes a new one",
                        vec![Write::Delete(own.clone())],
                    );
                    self.find(own, damage, mend.resting_on([key]));
                }
            }
        }
    }

    /// Attachments whose records name an address.
    pub(super) fn holders_of(
        &self,
        space: &AddressSpace,
        address: Addr,
    ) -> Vec<(&'a AttachmentKey, &'a AttachmentRecord)> {
        let place = Some((space.clone(), address));
        let all = self.snapshot.attachments.iter().map(|(attachment, (record, _))| (attachment, record));
        all.filter(|(_, record)| record.addresses.iter().any(|held| held.slot() == place)).collect()
    }

    fn rows(&mut self) {
        let kinds = [
            (&self.snapshot.freed, "an address released into a queue"),
            (&self.snapshot.due, "something that ends"),
            (&self.snapshot.quarantined, "a quarantine"),
        ];
        for (rows, what) in kinds {
            for row in rows {
                let address = Addr { family: row.family, bits: row.number };
                let slot = slot_key(&row.space, address);
                let state = self.slot(&row.space, address);
                if !self.is_unreadable(&slot)
                    && !listed(&row.space, address, state).iter().any(|(key, _)| *key == row.key)
                {
                    self.stray(row, what, slot);
                }
            }
        }
    }

    fn stray(&mut self, row: &Row, what: &'static str, record: Key) {
        let mend = Mend::new("takes the row away", vec![Write::Delete(row.key.clone())]);
        self.find(row.key.clone(), Damage::StrayRow { what }, mend.resting_on([record]));
    }

    fn blocks(&mut self) {
        for ((space, family, pool, block), (record, _)) in &self.snapshot.blocks {
            let row = numbered(&owned_prefix(space, *family, pool, &record.node), *block);
            if self.snapshot.version(&row).is_none() {
                let (pool, block, node) = (pool.clone(), *block, record.node.clone());
                let key = numbered(&block_prefix(space, *family, &pool), block);
                let mend = Mend::new("lists it", vec![Write::Put(row.clone(), Vec::new())]).resting_on([row]);
                self.find(key, Damage::BlockUnlisted { pool, block, node }, mend);
            }
        }
        for row in &self.snapshot.owned {
            let Some((pool, node)) = row.name.split_once('/') else { continue };
            let block = self.snapshot.blocks.get(&(row.space.clone(), row.family, pool.to_owned(), row.number));
            let key = numbered(&block_prefix(&row.space, row.family, pool), row.number);
            if !self.is_unreadable(&key) && block.is_none_or(|(record, _)| record.node != node) {
                self.stray(row, "a block of a node", key);
            }
        }
    }

    /// The row of the delegated prefix that an address stands for.
    fn delegated_row(&self, space: &AddressSpace, address: Addr) -> Option<Write> {
        let (pool, length) = self.delegating(space, address)?;
        let shift = address.family.bits() - length;
        let prefix = delegated_prefix(space, address.family, &pool.name);
        Some(Write::Put(numbered(&prefix, address.bits.checked_shr(shift.into()).unwrap_or(0)), Vec::new()))
    }

    fn delegated(&mut self) {
        let mut with_slot: BTreeSet<Key> = BTreeSet::new();
        for (space, address) in self.snapshot.slots.keys() {
            let Some(row) = self.delegated_row(space, *address) else { continue };
            let key = row.key().to_vec();
            if self.snapshot.version(&key).is_none() {
                let state = "the first of a delegated prefix";
                let damage = Damage::Unlisted { space: space.clone(), address: address.ip(), state };
                self.find(
                    slot_key(space, *address),
                    damage,
                    Mend::new("lists it", vec![row]).resting_on([key.clone()]),
                );
            }
            with_slot.insert(key);
        }
        // By what is left of an address or a row without the zeros behind, for of a pool that nobody knows any more the
        // length of its prefixes is not known.
        let odd = |bits: u128| bits.checked_shr(bits.trailing_zeros()).unwrap_or(0);
        let slots: BTreeSet<(&AddressSpace, Family, u128)> = self
            .snapshot
            .slots
            .keys()
            // The first address of a prefix is not that with all zeros.
            .flat_map(|(space, address)| [0, 1].map(|low| (space, address.family, odd(address.bits & !low))))
            .collect();
        for row in &self.snapshot.delegated {
            let registered = self.snapshot.spaces.get(&row.space).and_then(|(record, _)| {
                record.pools.iter().find(|pool| pool.name == row.name && Family::of(&pool.subnet) == row.family)
            });
            let length = registered.and_then(|pool| pool.delegate);
            // The slot that it should have, so that one made meanwhile stops the repair.
            let shift = length.map_or(0, |length| u32::from(row.family.bits() - length));
            let bits = row.number.checked_shl(shift).unwrap_or(0) | u128::from(shift > 1);
            let slot = slot_key(&row.space, Addr { family: row.family, bits });
            let given_up = registered.is_none() && slots.contains(&(&row.space, row.family, odd(row.number)));
            let known = with_slot.contains(&row.key) || given_up || self.is_unreadable(&slot);
            if !known && !self.is_unreadable(&space_key(&row.space)) {
                self.stray(row, "a delegated prefix in use", slot);
            }
        }
    }

    fn reservations(&mut self) {
        let mut counts: BTreeMap<&AddressSpace, u64> = BTreeMap::new();
        for ((space, _), all) in &self.snapshot.reservations {
            *counts.entry(space).or_default() += all.len() as u64;
        }
        for space in self.snapshot.all_spaces() {
            let found = counts.get(space).copied().unwrap_or_default();
            let (record, key) = (self.snapshot.spaces.get(space).map(|(record, _)| record), space_key(space));
            let counted = record.map_or(0, |record| record.reservations);
            if counted != found && !self.is_unreadable(&key) {
                let record = record.cloned().unwrap_or_default();
                let changes = record.changes + 1;
                let write = put(key.clone(), &SpaceRecord { reservations: found, changes, ..record });
                let damage = Damage::ReservationCount { space: space.clone(), counted, found };
                self.find(key, damage, Mend::new("counts them", vec![write]));
            }
        }
    }

    fn pools(&mut self) {
        for ((space, address), (slot, _)) in &self.snapshot.slots {
            if matches!(slot, SlotRecord::Freed { .. } | SlotRecord::Quarantined { .. }) {
                continue;
            }
            let (key, ip, holder) = (slot_key(space, *address), address.ip(), holder(slot));
            let recorded = self.snapshot.reservations.get(&(space.clone(), address.family)).and_then(|all| {
                // By last address, as they are disjoint.
                let at = all.partition_point(|(_, last, _)| *last < address.bits);
                all.get(at).filter(|(first, ..)| *first <= address.bits).map(|(.., outsider)| outsider.clone())
            });
            let written = self.ipam.layout().reservation(space, *address).map(|reserved| reserved.holder.clone());
            let own = self.ipam.layout().pools.iter().find(|p| p.space == *space && p.subnet.contains(&ip));
            let space = space.clone();
            if let Some(outsider) = recorded.or(written) {
                self.find(key, Damage::InReserved { space, address: ip, holder, outsider }, Mend::none());
            } else if self.registered(&space, *address).is_none() {
                if let Some((pool, _)) = self.delegating(&space, *address) {
                    let pool = pool.name.clone();
                    self.find(key, Damage::NotHandedOut { space, address: ip, holder, pool }, Mend::none());
                } else if !self.is_unreadable(&space_key(&space)) && !self.is_from_outside(slot, ip) {
                    self.find(key, Damage::InNoPool { space, address: ip, holder }, Mend::none());
                }
            } else if let Some(pool) = own.filter(|pool| !pool.has(*address)) {
                let pool = pool.name.clone();
                self.find(key, Damage::NotHandedOut { space, address: ip, holder, pool }, Mend::none());
            }
        }
        self.unplanned();
    }

    /// Whether a record tells that an outside gave the address to who has it.
    fn is_from_outside(&self, slot: &SlotRecord, ip: IpAddr) -> bool {
        let page = slot.holder().and_then(|by| self.snapshot.outside.get(by));
        page.is_some_and(|page| page.bound.contains(&ip))
            || slot.holder().is_some_and(|by| self.is_unreadable(&page_key(by)))
    }

    /// What is bound outside, or is being bound or released there, against the leases.
    fn outside(&mut self) {
        for (attachment, page) in &self.snapshot.outside {
            let own = attachment_key(attachment);
            if self.is_unreadable(&own) {
                continue;
            }
            let (key, attachment) = (page_key(attachment), attachment.clone());
            let lease = self.snapshot.attachments.get(&attachment);
            let leased = lease.is_some_and(|(record, version)| record.sequence(*version) == page.sequence);
            if page.is_unfinished {
                self.find(key, Damage::OutsideUnfinished { attachment }, Mend::none().resting_on([own]));
            } else if !leased {
                let addresses: Vec<String> = page.bound.iter().map(ToString::to_string).collect();
                let (sequence, addresses) = (page.sequence, addresses.join(" and "));
                let damage = Damage::OutsideWithoutLease { attachment, sequence, addresses };
                self.find(key, damage, Mend::none().resting_on([own]));
            }
        }
    }

    /// Pools of which a fleet plan in the same store knows nothing, where it knows of any pools of their space.
    fn unplanned(&mut self) {
        for (space, (record, _)) in &self.snapshot.spaces {
            let pools: Vec<IpNet> = self
                .snapshot
                .planned
                .iter()
                .filter_map(|key| planned(space, key))
                .filter(|(_, level)| *level == Level::Pool)
                .map(|(cidr, _)| cidr)
                .collect();
            for pool in &record.pools {
                let same_family = |cidr: &&IpNet| Family::of(cidr) == Family::of(&pool.subnet);
                let mut known = pools.iter().filter(same_family).peekable();
                if known.peek().is_some() && !known.any(|cidr| cidr.contains(&pool.subnet)) {
                    let (space, pool, subnet) = (space.clone(), pool.name.clone(), pool.subnet);
                    self.find(space_key(&space), Damage::Unplanned { space, pool, subnet }, Mend::none());
                }
            }
        }
    }

    fn history(&mut self) {
        for ((space, address), events) in &self.snapshot.events {
            let key = slot_key(space, *address);
            if self.is_unreadable(&key) {
                continue;
            }
            let slot = self.slot(space, *address);
            let holds = |attachment: &AttachmentKey| match slot {
                Some(SlotRecord::Bound { by, .. }) => by == attachment,
                Some(SlotRecord::Handover { by, to, joined, .. }) => {
                    by == attachment || (*joined && to.as_ref() == Some(attachment))
                }
                _ => false,
            };
            // What the attachment's own record says of it is told in its place.
            let said = |attachment: &AttachmentKey| {
                let own = self.snapshot.attachments.get(attachment);
                own.is_some_and(|(own, _)| own.addresses.iter().any(|h| h.slot() == Some((space.clone(), *address))))
                    || self.is_unreadable(&attachment_key(attachment))
            };
            let prefix = history_prefix(space, address.family);
            let mut events: Vec<_> = events.iter().map(|(key, entry)| ((*key).clone(), (*entry).clone())).collect();
            events.sort_by_key(|(_, entry)| entry.version);
            let last = events.last().map(|(key, _)| key.clone());
            for attachment in open_tenures(space, *address, &prefix, events)
                .into_iter()
                .filter(|by| !holds(by) && !said(by))
                .collect::<Vec<_>>()
            {
                let (what, by) = (EventKind::Released, Some(attachment.clone()));
                let end = event_key(space, *address, self.now, u32::MAX);
                let write = put(end, &EventRecord { what, by, workload: None });
                let space = space.clone();
                let damage = Damage::OpenTenure { space, address: address.ip(), attachment };
                let mend = Mend::new("ends it now", vec![write]).resting_on([key.clone()]);
                self.find(last.clone().unwrap_or_default(), damage, mend);
            }
        }
    }
}

/// The rows that must be there for the state of an address.
fn listed(space: &AddressSpace, address: Addr, slot: Option<&SlotRecord>) -> Vec<(Key, &'static str)> {
    let due = |until: &u64| (due_key(space, address, *until), "to end at a time");
    match slot {
        None | Some(SlotRecord::Bound { .. }) => Vec::new(),
        Some(SlotRecord::Freed { at, pool }) => vec![(freed_key(space, address, pool, *at), "released")],
        Some(SlotRecord::Kept { until, .. }) => until.iter().map(due).collect(),
        Some(SlotRecord::Handover { until, .. }) => vec![due(until)],
        Some(SlotRecord::Quarantined { until, .. }) => {
            let own = (quarantine_key(space, address), "in quarantine");
            std::iter::once(own).chain(until.iter().map(due)).collect()
        }
    }
}

/// Whose an address is, for people.
fn holder(slot: &SlotRecord) -> String {
    match slot {
        SlotRecord::Bound { by, .. } => format!("attachment {by}"),
        SlotRecord::Handover { by, .. } => format!("attachment {by}, in a handover"),
        SlotRecord::Kept { claim, .. } => format!("claim {claim}"),
        SlotRecord::Quarantined { reason, .. } => format!("nobody: it is in quarantine ({reason})"),
        SlotRecord::Freed { .. } => "nobody".to_owned(),
    }
}

/// Whether a key is a row of a queue or list, without a value of its own.
pub(super) fn is_row(key: &[u8]) -> bool {
    [b"f/", b"k/", b"q/", b"o/", b"p/"].iter().any(|prefix| key.starts_with(*prefix))
}
