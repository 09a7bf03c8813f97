//! From records to members: a copy of the records that matter, and what each address is because of them.

use std::collections::{BTreeMap, BTreeSet};

use dcenet_core::model::{AttachmentKey, NetworkName, Workload};
use dcenet_core::provider::LeaseError;
use ipnet::IpNet;

use super::{GroupChange, GroupName, Grouping, Groups, MemberState, Members, Update};
use crate::config::Layout;
use crate::follow::Replica;
use crate::ipam::decode;
use crate::model::{Addr, BlockOwner, Claim, ClaimKey, Family, Pool};
use crate::record::{
    AttachmentRecord, BlockRecord, ClaimRecord, SlotRecord, SpaceRecord, attachment_key, block_prefix, claim_key,
    claim_prefix, network_prefix, reservation_of, reservation_prefix, slot_prefix, space_key,
};
use crate::store::{Entry, Key, number_of};

/// An address as a member of its group.
type Place = (GroupName, IpNet, MemberState);

/// What can be a member.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Spot {
    Address(Addr),
    /// A block, by the key of its record.
    Block(Key),
}

/// What a change of a record is about.
enum Touched {
    Nothing,
    Some(Vec<Addr>),
    Block,
    All,
}

/// The records of one address space, and the members that they make.
pub(super) struct Fold {
    layout: Layout,
    grouping: Grouping,
    prefixes: Vec<Key>,
    /// Claims of the configuration with a fixed address.
    fixed: BTreeMap<Addr, Claim>,
    /// As they were last seen, with the versions that tell what is older.
    records: BTreeMap<Key, Entry>,
    slots: BTreeMap<Addr, SlotRecord>,
    /// What ends, and when, in both orders.
    due: BTreeSet<(u64, Addr)>,
    ends: BTreeMap<Addr, u64>,
    /// Registered subnets, with the length of the prefixes that they delegate.
    delegates: Vec<(IpNet, Option<u8>)>,
    places: BTreeMap<Spot, Place>,
}

impl Replica for Fold {
    fn prefixes(&self) -> &[Key] {
        &self.prefixes
    }

    fn reset(&mut self, found: Vec<(Key, Entry)>, now: u64) -> Result<(), LeaseError> {
        (self.records, self.slots, self.due, self.ends, self.places) = Default::default();
        for (key, entry) in found {
            if let Some(slot) = self.slot_of(&key) {
                self.slots.insert(slot, decode(&key, &entry)?);
            }
            self.records.insert(key, entry);
        }
        self.delegates = self.registered(self.records.get(&space_key(&self.grouping.space)))?;
        let all = self.all();
        all.iter().try_for_each(|spot| self.place(spot, now).map(drop))
    }

    fn take_in(&mut self, revision: u64, writes: Vec<(Key, Option<Entry>)>, now: u64) -> Result<(), LeaseError> {
        self.learn(revision, writes, now).map(drop)
    }
}

impl Fold {
    pub(super) fn new(layout: Layout, grouping: Grouping) -> Self {
        let pools = layout.pools.iter().filter(|pool| pool.space == grouping.space);
        let claims = pools.flat_map(|pool| &pool.claims);
        let fixed = claims.filter_map(|claim| Some((claim.address?, claim.clone()))).collect();
        let space = &grouping.space;
        let of_family = |f| [slot_prefix(space, f), claim_prefix(space, f), reservation_prefix(space, f)];
        let families = [Family::V4, Family::V6].into_iter().flat_map(of_family);
        let whole = layout.pools.iter().filter(|pool| is_whole(pool, &grouping));
        let blocks = whole.map(|pool| block_prefix(space, pool.family(), &pool.name));
        let prefixes = families.chain([network_prefix(None), space_key(space)]).chain(blocks).collect();
        let (records, slots, due, ends, delegates, places) = Default::default();
        Self { layout, grouping, prefixes, fixed, records, slots, due, ends, delegates, places }
    }

    /// Takes in what a revision wrote, ignoring what is older than what is known, and returns what it did to groups.
    pub(super) fn learn(
        &mut self,
        revision: u64,
        writes: Vec<(Key, Option<Entry>)>,
        now: u64,
    ) -> Result<Option<Update>, LeaseError> {
        let mut touched: BTreeSet<Spot> = BTreeSet::new();
        for (key, entry) in writes {
            if !self.prefixes.iter().any(|p| key.starts_with(p))
                || self.records.get(&key).is_some_and(|known| known.version >= revision)
            {
                continue;
            }
            let old = self.records.get(&key).cloned();
            for entry in old.iter().chain(&entry) {
                match self.touched(&key, entry)? {
                    Touched::Nothing => {}
                    Touched::Some(addresses) => touched.extend(addresses.into_iter().map(Spot::Address)),
                    Touched::Block => drop(touched.insert(Spot::Block(key.clone()))),
                    Touched::All => touched.extend(self.all()),
                }
            }
            if let Some(address) = self.slot_of(&key) {
                match &entry {
                    Some(entry) => drop(self.slots.insert(address, decode(&key, entry)?)),
                    None => drop(self.slots.remove(&address)),
                }
            }
            if key == space_key(&self.grouping.space) {
                self.delegates = self.registered(entry.as_ref())?;
            }
            match entry {
                Some(entry) => drop(self.records.insert(key, entry)),
                None => drop(self.records.remove(&key)),
            }
        }
        self.settle(revision, touched, now)
    }

    /// Lets time pass, and returns what that did to groups.
    pub(super) fn pass(&mut self, revision: u64, now: u64) -> Result<Option<Update>, LeaseError> {
        let over = self.due.iter().take_while(|(at, _)| *at <= now).map(|(_, a)| Spot::Address(*a)).collect();
        self.settle(revision, over, now)
    }

    /// When something ends next.
    pub(super) fn next_end(&self) -> Option<u64> {
        self.due.first().map(|(at, _)| *at)
    }

    pub(super) fn groups(&self, revision: u64) -> Groups {
        let mut groups = Groups { revision, ..Groups::new(self.grouping.space.clone()) };
        for (group, prefix, state) in self.places.values() {
            groups.groups.entry(group.clone()).or_default().insert(*prefix, *state);
        }
        groups
    }

    fn settle(&mut self, revision: u64, touched: BTreeSet<Spot>, now: u64) -> Result<Option<Update>, LeaseError> {
        let (mut before, mut after) = (BTreeMap::<_, Members>::new(), BTreeMap::<_, Members>::new());
        for spot in touched {
            let old = self.place(&spot, now)?;
            for (place, side) in [(old.as_ref(), &mut before), (self.places.get(&spot), &mut after)] {
                if let Some((group, prefix, state)) = place {
                    side.entry(group.clone()).or_default().insert(*prefix, *state);
                }
            }
        }
        let names: BTreeSet<GroupName> = before.keys().chain(after.keys()).cloned().collect();
        let none = Members::new();
        let changes: Vec<_> = names
            .iter()
            .filter_map(|g| GroupChange::between(g, before.get(g).unwrap_or(&none), after.get(g).unwrap_or(&none)))
            .collect();
        Ok((!changes.is_empty()).then_some(Update { revision, changes }))
    }

    /// Everything that can be a member.
    fn all(&self) -> BTreeSet<Spot> {
        let addresses = self.slots.keys().chain(self.fixed.keys()).copied().map(Spot::Address);
        let blocks = self.records.keys().filter(|key| key.starts_with(b"b/")).cloned().map(Spot::Block);
        addresses.chain(blocks).collect()
    }

    fn slot_of(&self, key: &[u8]) -> Option<Addr> {
        [Family::V4, Family::V6].into_iter().find_map(|family| {
            let bits = number_of(&slot_prefix(&self.grouping.space, family), key).ok()?;
            Some(Addr { family, bits })
        })
    }

    /// The addresses that an entry says something of.
    fn touched(&self, key: &[u8], entry: &Entry) -> Result<Touched, LeaseError> {
        let space = &self.grouping.space;
        if let Some(address) = self.slot_of(key) {
            return Ok(Touched::Some(vec![address]));
        }
        if key.starts_with(b"b/") {
            return Ok(Touched::Block);
        }
        if key.starts_with(b"t/") {
            let record: AttachmentRecord = decode(key, entry)?;
            let slots = record.addresses.iter().filter_map(|held| held.slot());
            return Ok(Touched::Some(slots.filter(|(s, _)| s == space).map(|(_, address)| address).collect()));
        }
        if key.starts_with(b"c/") {
            return Ok(Touched::Some(vec![decode::<ClaimRecord>(key, entry)?.address.into()]));
        }
        if key.starts_with(b"x/") {
            return Ok(Touched::Some(self.fixed.keys().copied().collect()));
        }
        if key == space_key(space) {
            let same = self.registered(Some(entry))? == self.delegates;
            return Ok(if same { Touched::Nothing } else { Touched::All });
        }
        Ok(Touched::Nothing)
    }

    /// Works out what an address or block is now, and returns what it was.
    fn place(&mut self, spot: &Spot, now: u64) -> Result<Option<Place>, LeaseError> {
        let place = match spot {
            Spot::Address(address) => self.place_of(*address, now)?,
            Spot::Block(key) => self.block(key)?,
        };
        Ok(match place {
            Some(place) => self.places.insert(spot.clone(), place),
            None => self.places.remove(spot),
        })
    }

    /// The place of a block that somebody owns.
    fn block(&self, key: &Key) -> Result<Option<Place>, LeaseError> {
        let Some(entry) = self.records.get(key) else { return Ok(None) };
        let record: BlockRecord = decode(key, entry)?;
        let found = self.layout.pools.iter().filter(|pool| is_whole(pool, &self.grouping)).find_map(|pool| {
            let block = number_of(&block_prefix(&pool.space, pool.family(), &pool.name), key).ok()?;
            let (length, family) = (pool.block?.length, pool.family());
            let (first, _) = pool.block_range(length, block);
            IpNet::new(Addr { family, bits: first }.ip(), length).ok()
        });
        Ok(found.map(|prefix| (self.grouping.group_of_application(&record.node), prefix, MemberState::Bound)))
    }

    fn place_of(&mut self, address: Addr, now: u64) -> Result<Option<Place>, LeaseError> {
        if let Some(end) = self.ends.remove(&address) {
            self.due.remove(&(end, address));
        }
        if let Some(SlotRecord::Kept { until: Some(until), .. } | SlotRecord::Quarantined { until: Some(until), .. }) =
            self.slots.get(&address)
            && *until > now
        {
            self.due.insert((*until, address));
            self.ends.insert(address, *until);
        }
        // The block that it is in stands for it.
        let mut whole = self.layout.pools.iter().filter(|pool| is_whole(pool, &self.grouping));
        match whole.any(|pool| pool.subnet.contains(&address.ip())) {
            true => Ok(None),
            false => self.member(address, now),
        }
    }

    fn member(&self, address: Addr, now: u64) -> Result<Option<Place>, LeaseError> {
        let ended = |until: &Option<u64>| until.is_some_and(|until| now >= until);
        match self.slots.get(&address) {
            Some(SlotRecord::Bound { by, claim }) => self.bound(address, by, claim.as_ref()).map(Some),
            Some(SlotRecord::Handover { by, claim, .. }) => self.bound(address, by, Some(claim)).map(Some),
            Some(SlotRecord::Kept { claim, until }) if !ended(until) => self.kept(address, claim),
            // It is the claim's again.
            Some(SlotRecord::Quarantined { claim: Some(claim), until, .. }) if ended(until) => {
                self.kept(address, claim)
            }
            Some(SlotRecord::Quarantined { until, .. }) if !ended(until) => Ok(None),
            None | Some(SlotRecord::Freed { .. } | SlotRecord::Kept { .. } | SlotRecord::Quarantined { .. }) => {
                match self.fixed.get(&address) {
                    Some(claim) if !self.is_reserved(address) => self.kept(address, &claim.key),
                    _ => Ok(None),
                }
            }
        }
    }

    fn bound(&self, address: Addr, by: &AttachmentKey, claim: Option<&ClaimKey>) -> Result<Place, LeaseError> {
        let key = attachment_key(by);
        let record: Option<AttachmentRecord> = self.records.get(&key).map(|entry| decode(&key, entry)).transpose()?;
        let held = record.iter().flat_map(|record| &record.addresses);
        let delegated = held
            .filter(|held| held.delegated && held.slot() == Some((self.grouping.space.clone(), address)))
            .map(|held| held.address.trunc())
            .next();
        let workload = record.as_ref().and_then(|record| record.workload.as_ref());
        let group = self.name(workload, claim, Some(&by.network));
        Ok((group, delegated.unwrap_or_else(|| IpNet::from(address.ip())), MemberState::Bound))
    }

    fn kept(&self, address: Addr, claim: &ClaimKey) -> Result<Option<Place>, LeaseError> {
        let key = claim_key(&self.grouping.space, address.family, claim);
        let record: Option<ClaimRecord> = self.records.get(&key).map(|entry| decode(&key, entry)).transpose()?;
        if record.as_ref().is_some_and(|record| record.away.is_some()) {
            return Ok(None);
        }
        let whole = self.delegated_length(address).and_then(|length| IpNet::new(address.ip(), length).ok());
        let prefix = whole.map_or_else(|| IpNet::from(address.ip()), |prefix| prefix.trunc());
        Ok(Some((self.name(None, Some(claim), None), prefix, MemberState::Kept)))
    }

    fn name(&self, workload: Option<&Workload>, claim: Option<&ClaimKey>, network: Option<&NetworkName>) -> GroupName {
        self.grouping.group(&self.layout, workload, claim, network)
    }

    /// The subnets of a space's record, with the length of the prefixes that they delegate.
    fn registered(&self, entry: Option<&Entry>) -> Result<Vec<(IpNet, Option<u8>)>, LeaseError> {
        let key = space_key(&self.grouping.space);
        let record = entry.map(|entry| decode::<SpaceRecord>(&key, entry)).transpose()?.unwrap_or_default();
        Ok(record.pools.into_iter().map(|pool| (pool.subnet, pool.delegate)).collect())
    }

    /// The length of the prefix that comes with an address, where its pool delegates prefixes.
    fn delegated_length(&self, address: Addr) -> Option<u8> {
        if let Some((_, length)) = self.delegates.iter().find(|(subnet, _)| subnet.contains(&address.ip())) {
            return *length;
        }
        // A pool that nobody leased from yet is not registered.
        let own = self.layout.pools.iter().filter(|pool| pool.space == self.grouping.space);
        own.filter(|pool| pool.subnet.contains(&address.ip())).find_map(|pool| pool.delegate)
    }

    /// Whether somebody outside has it, so that no claim of the configuration gets it.
    fn is_reserved(&self, address: Addr) -> bool {
        let prefix = reservation_prefix(&self.grouping.space, address.family);
        self.records.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix)).any(|(key, _)| {
            reservation_of(&prefix, key).is_some_and(|(first, last)| (first..=last).contains(&address.bits))
        })
    }
}

/// Whether the members of groups are the pool's blocks instead of its addresses.
fn is_whole(pool: &Pool, grouping: &Grouping) -> bool {
    let of_applications = pool.block.is_some_and(|blocks| blocks.owner == BlockOwner::Application);
    grouping.blocks && pool.space == grouping.space && of_applications
}
