//! Leasing: one address of each group of pools, all or none.

use std::net::IpAddr;

use dcenet_core::model::Workload;
use dcenet_core::provider::{LeaseError, LeaseRequest};
use ipnet::IpNet;

use super::block::{freed_in_block, freed_in_blocks_prefix};
use super::choose::Want;
use super::claim::{serves, unqueue};
use super::{Aside, Draft, Halt, Reply, Step, Work};
use crate::model::{Addr, AddressSpace, Claim, ClaimKey, Family, Intervals, KeepPolicy, MacWish, Pool};
use crate::record::{
    AttachmentRecord, ClaimRecord, EventKind, Held, RegisteredPool, SlotRecord, attachment_key, claim_key,
    delegated_prefix, freed_key, freed_of, freed_prefix, slot_key, slot_prefix, space_key,
};
use crate::store::{Key, Write, numbered};

/// The claim that an attachment has in a family.
pub(super) struct Entitlement<'a> {
    pub(super) pool: &'a Pool,
    pub(super) key: ClaimKey,
    /// The address that the configuration fixes.
    pub(super) fixed: Option<Addr>,
    pub(super) keep: KeepPolicy,
    pub(super) mac: Option<MacWish>,
}

impl<'a> Entitlement<'a> {
    pub(super) fn new(pool: &'a Pool, claim: &Claim) -> Self {
        Self { pool, key: claim.key.clone(), fixed: claim.address, keep: claim.keep, mac: claim.mac }
    }
}

impl Work<'_> {
    pub(super) fn lease(&self, request: &LeaseRequest) -> Result<Step, Halt> {
        let own_key = attachment_key(&request.attachment);
        let spaces = self.spaces();
        let space_keys: Vec<Key> = spaces.iter().map(|s| space_key(s)).collect();
        self.need(space_keys.iter().chain([&own_key]))?;

        let mut draft = Draft::default();
        if let Some((record, version)) = self.record::<AttachmentRecord>(&own_key)? {
            // Committed as a barrier: the record may be another's whose flush is not done.
            draft.guard(&own_key, Some(version));
            return Ok(draft.commit(Reply::Leased(self.compose(&record, record.sequence(version)))));
        }
        draft.guard(&own_key, None);
        self.guard_registration(&mut draft)?;

        let mut claims = Vec::new();
        if let Some(workload) = &request.workload {
            let families = self.layout.families();
            let asked = |family| request.addresses.iter().copied().map(Addr::from).find(|a| a.family == family);
            claims = self.together(families, |family| self.entitlement(workload, request, family, asked(family)))?;
        }
        let wants = self.wants(request, claims.into_iter().flatten().collect())?;
        let chosen = self.together(&wants, |want| self.lease_one(&mut draft, request, want))?;
        one_vlan(&chosen)?;

        let addresses = chosen.into_iter().map(|(_, held)| held).collect();
        let node = self.layout.node.as_ref().map(|n| n.name.clone());
        let mut record =
            AttachmentRecord { workload: request.workload.clone(), addresses, mac: None, node, sequence: None };
        // The order of the pools in the configuration.
        record.addresses.sort_by_key(|held| self.layout.pools.iter().position(|p| p.name == held.pool));
        record.mac = draft.mac;
        let reply = Reply::Leased(self.compose(&record, 0));
        draft.put(own_key, &record);
        Ok(draft.commit(reply))
    }

    /// Does something for each, and asks for what all of them must read in one trip.
    fn together<T, R>(
        &self,
        each: impl IntoIterator<Item = T>,
        mut decide: impl FnMut(T) -> Result<R, Halt>,
    ) -> Result<Vec<R>, Halt> {
        let (mut results, mut waits) = (Vec::with_capacity(2), false);
        for item in each {
            match decide(item) {
                Ok(result) => results.push(result),
                Err(Halt::Read) => waits = true,
                Err(halt) => return Err(halt),
            }
        }
        if waits { Err(Halt::Read) } else { Ok(results) }
    }

    fn lease_one<'a>(
        &'a self,
        draft: &mut Draft,
        request: &LeaseRequest,
        want: &Want<'a>,
    ) -> Result<(&'a Pool, Held), Halt> {
        self.ask_for(request.workload.as_ref(), want.claim.as_ref().map(|claim| &claim.key));
        if let Some(claim) = &want.claim {
            return Ok((claim.pool, self.lease_claimed(draft, request, claim, want.asked)?));
        }
        let (pool, address) = match want.asked {
            Some(address) => (self.pool_for(&want.pools, address)?, address),
            None => self.pick(&want.pools)?,
        };
        let slot = SlotRecord::Bound { by: request.attachment.clone(), claim: None };
        self.take(draft, &pool.space, address, &slot, None)?;
        self.note(draft, &pool.space, address, EventKind::Bound, Some(&request.attachment), request.workload.as_ref());
        Ok((pool, held(pool, address)))
    }

    /// The claim of the configuration, else one that was recorded in the store, in any pool of the family.
    fn entitlement(
        &self,
        workload: &Workload,
        request: &LeaseRequest,
        family: Family,
        asked: Option<Addr>,
    ) -> Result<Option<Entitlement<'_>>, Halt> {
        let any = ClaimKey::new(workload.clone());
        let names = [any.clone().on(request.attachment.ifname.clone()), any];
        let pools = || self.layout.pools.iter().filter(|p| p.family() == family);
        for name in &names {
            for pool in pools() {
                if let Some(claim) = pool.claims.iter().find(|c| c.key == *name) {
                    return Ok(Some(Entitlement::new(pool, claim)));
                }
            }
        }
        for pool in pools() {
            if let Some(set) = pool.sets.iter().find(|s| serves(s, workload, &request.attachment)) {
                return self.member(pool, set, workload, asked).map(Some);
            }
        }
        let spaces = self.spaces();
        let keys: Vec<Key> = spaces.iter().flat_map(|s| names.iter().map(|name| claim_key(s, family, name))).collect();
        self.need(&keys)?;
        for space in spaces {
            for name in &names {
                let Some((record, _)) = self.record::<ClaimRecord>(&claim_key(space, family, name))? else { continue };
                if let Some(pool) = pools().find(|p| p.space == *space && p.subnet.contains(&record.address)) {
                    let (key, keep, mac) = (name.clone(), record.keep, record.mac);
                    return Ok(Some(Entitlement { pool, key, fixed: None, keep, mac }));
                }
            }
        }
        Ok(None)
    }

    fn lease_claimed(
        &self,
        draft: &mut Draft,
        request: &LeaseRequest,
        claim: &Entitlement<'_>,
        asked: Option<Addr>,
    ) -> Result<Held, Halt> {
        let (pool, attachment) = (claim.pool, &request.attachment);
        let address = self.settle_claim(draft, claim, asked)?;
        if let Some(asked) = asked
            && asked != address
        {
            let reason = format!("the claim {} has {address} here; ask for that or for none", claim.key);
            return Err(invalid_request(asked.ip(), &reason));
        }
        let slot = SlotRecord::Bound { by: attachment.clone(), claim: Some(claim.key.clone()) };
        let joined = self.take(draft, &pool.space, address, &slot, Some(&claim.key))?;
        let event = if joined { EventKind::Joined } else { EventKind::Bound };
        self.note(draft, &pool.space, address, event, Some(attachment), request.workload.as_ref());
        draft.bear(claim.mac.map(|mac| mac.of(address)));
        Ok(held(pool, address))
    }

    /// Decides which address a claim has, and drafts its record. `first` is the wish for a claim that has none yet. The
    /// slot is left to the caller.
    pub(super) fn settle_claim(
        &self,
        draft: &mut Draft,
        claim: &Entitlement<'_>,
        first: Option<Addr>,
    ) -> Result<Addr, Halt> {
        let &Entitlement { pool, key: ref name, fixed, keep, mac } = claim;
        self.ask_for(None, Some(name));
        let key = claim_key(&pool.space, pool.family(), name);
        let recorded = self.record::<ClaimRecord>(&key)?;
        draft.guard(&key, recorded.as_ref().map(|(_, version)| *version));
        if let Some((record, _)) = &recorded
            && let Some(cluster) = &record.away
        {
            let holder = format!("claim {name}, which was handed out to cluster {cluster}");
            return Err(LeaseError::Held { address: record.address, holder }.into());
        }
        let before = recorded.as_ref().map(|(record, _)| Addr::from(record.address));
        let kept = before.filter(|before| pool.allowed.contains(before.bits));
        let has_not_lost = |kept| match &recorded {
            Some((record, _)) => self.has_not_lost(pool, kept, name, record),
            None => Ok(false),
        };
        let address = match (fixed, kept) {
            (Some(fixed), _) => {
                self.allow(pool, fixed)?;
                fixed
            }
            (None, Some(kept)) if has_not_lost(kept)? => kept,
            (None, _) => match first.filter(|first| pool.free.contains(first.bits)) {
                Some(first) => {
                    self.allow(pool, first)?;
                    first
                }
                None => self.pick_from(pool)?.ok_or_else(|| exhausted(pool))?,
            },
        };
        if let (Some(before), Some((record, _))) = (before, &recorded)
            && before != address
        {
            self.give_up(draft, &pool.space, before, name, &record.pool)?;
        }
        let moves = recorded.as_ref().map_or(0, |(record, _)| record.moves);
        let record =
            ClaimRecord { address: address.ip(), pool: pool.name.clone(), keep, mac, gone: false, moves, away: None };
        match keep {
            KeepPolicy::Ephemeral if recorded.is_some() => draft.delete(key),
            KeepPolicy::Ephemeral => {}
            _ if recorded.is_some_and(|(old, _)| old == record) => {}
            _ => draft.put(key, &record),
        }
        Ok(address)
    }

    /// Frees the address that a claim no longer has, unless something is attached to it.
    pub(super) fn give_up(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        address: Addr,
        claim: &ClaimKey,
        pool: &str,
    ) -> Result<(), Halt> {
        let key = slot_key(space, address);
        let Some((slot, version)) = self.record::<SlotRecord>(&key)? else { return Ok(()) };
        if slot.claim() != Some(claim) {
            return Ok(());
        }
        if let Some(by) = slot.holder() {
            return Err(LeaseError::Held { address: address.ip(), holder: by.to_string() }.into());
        }
        match slot {
            SlotRecord::Kept { .. } => {
                draft.guard(&key, Some(version));
                unqueue(draft, space, address, &slot);
                self.free(draft, space, address, pool);
            }
            // It goes on, and its end leaves the address to anybody.
            SlotRecord::Quarantined { reason, at, until, mac, from, claim: Some(_) } => {
                draft.guard(&key, Some(version));
                draft.put(key, &SlotRecord::Quarantined { reason, at, until, mac, from, claim: None });
            }
            _ => {}
        }
        Ok(())
    }

    /// Drafts the release of an address into the queue of its pool.
    pub(super) fn free(&self, draft: &mut Draft, space: &AddressSpace, address: Addr, pool: &str) {
        let queue = self.queue_of(space, address, pool);
        draft.put_empty(freed_key(space, address, &queue, self.now));
        draft.put(slot_key(space, address), &SlotRecord::Freed { at: self.now, pool: queue });
    }

    /// Drafts a new use of an address that is free, or kept by `claim`. Returns whether it was joined instead: another
    /// has it through the same claim, and a handover permits it.
    pub(super) fn take(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        address: Addr,
        slot: &SlotRecord,
        claim: Option<&ClaimKey>,
    ) -> Result<bool, Halt> {
        let key = slot_key(space, address);
        let refuse = |holder: String| Err(LeaseError::Held { address: address.ip(), holder }.into());
        let current = self.record::<SlotRecord>(&key)?;
        draft.guard(&key, current.as_ref().map(|(_, version)| *version));
        if let Some((current, _)) = current {
            match &current {
                SlotRecord::Freed { .. } => {}
                SlotRecord::Kept { claim: holder, .. } if Some(holder) == claim => {}
                ended if self.has_ended_for(ended, claim) => {}
                SlotRecord::Kept { claim: holder, .. } => return refuse(format!("claim {holder}")),
                SlotRecord::Quarantined { reason, .. } => return refuse(format!("quarantine ({reason})")),
                // Another call for the same attachment has come first since its record was looked for.
                SlotRecord::Bound { by, .. } if slot.holder() == Some(by) => return Err(Halt::Stale),
                SlotRecord::Bound { by, claim: Some(holder) } if Some(holder) != claim => {
                    return refuse(format!("claim {holder} ({by})"));
                }
                SlotRecord::Bound { by, .. } => return refuse(format!("attachment {by}")),
                SlotRecord::Handover { .. } => return self.join(draft, key, address, &current, slot).map(|()| true),
            }
            unqueue(draft, space, address, &current);
        }
        draft.put(key, slot);
        self.refuse_reserved(draft, space, address)?;
        self.own_block(draft, space, address)?;
        self.adopt(draft, space, address);
        Ok(false)
    }

    /// Drafts what goes with an address that is taken, beside its slot.
    fn adopt(&self, draft: &mut Draft, space: &AddressSpace, address: Addr) {
        for Aside { guard, version, puts } in self.aside.take() {
            draft.guard(&guard, version);
            draft.batch.writes.extend(puts.into_iter().map(|(key, value)| Write::Put(key, value)));
        }
        self.note_delegated(draft, space, address);
    }

    /// Drafts that a prefix with a slot is passed over by a search for an unused one.
    pub(super) fn note_delegated(&self, draft: &mut Draft, space: &AddressSpace, address: Addr) {
        if let Some(pool) = self.pool_of(space, address).filter(|p| p.delegate.is_some()) {
            let prefix = delegated_prefix(space, address.family, &pool.name);
            draft.put_empty(numbered(&prefix, address.bits >> pool.shift()));
        }
    }

    /// Drafts that a prefix whose slot is forgotten is found again by a search.
    /// Returns whether the slot may be forgotten: a pool that nobody knows any more may have delegated.
    pub(super) fn forget_delegated(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        address: Addr,
        pool: &str,
    ) -> Result<bool, Halt> {
        let length = match self.pool_of(space, address).filter(|p| p.name == pool) {
            Some(pool) => pool.delegate,
            // A pool that was resized is still known by its name.
            None => {
                let same = |r: &&RegisteredPool| r.name == pool && Family::of(&r.subnet) == address.family;
                match self.space(space)?.and_then(|(record, _)| record.pools.iter().find(same).cloned()) {
                    Some(registered) => registered.delegate,
                    None => return Ok(false),
                }
            }
        };
        if let Some(length) = length {
            let prefix = delegated_prefix(space, address.family, pool);
            draft.delete(numbered(&prefix, address.bits >> (address.family.bits() - length)));
        }
        Ok(true)
    }

    /// An address that anybody may get, from the first of the pools that has one.
    fn pick<'a>(&self, pools: &[&'a Pool]) -> Result<(&'a Pool, Addr), Halt> {
        let mut last = None;
        for &pool in pools {
            if let Some(address) = self.pick_from(pool)? {
                return Ok((pool, address));
            }
            last = Some(pool);
            if !pool.fallback {
                break;
            }
        }
        Err(match last {
            Some(pool) => exhausted(pool).into(),
            None => LeaseError::Invalid { field: "ipam.pools".into(), reason: "there is none".into() }.into(),
        })
    }

    pub(super) fn pick_from(&self, pool: &Pool) -> Result<Option<Addr>, Halt> {
        let found = match pool.block {
            Some(blocks) => self.search_blocks(pool, blocks)?,
            None => self.search(pool)?,
        };
        // An ended address may lie in another node's block.
        let found = match found {
            None if pool.block.is_none_or(|blocks| blocks.borrow) => self.pick_ended(pool, &pool.free)?,
            found => found,
        };
        let Some(address) = found else { return Ok(None) };
        // The search and this were read at different times: the address may have been used and released in between.
        match self.record::<SlotRecord>(&slot_key(&pool.space, address))? {
            None => Ok(Some(address)),
            Some((SlotRecord::Freed { at, .. }, _)) if !self.cooling(at) => Ok(Some(address)),
            Some((ended, _)) if self.has_ended_for(&ended, None) => Ok(Some(address)),
            Some(_) => Err(Halt::Stale),
        }
    }

    fn search(&self, pool: &Pool) -> Result<Option<Addr>, Halt> {
        if let Some(address) = self.unused(pool, &pool.free)? {
            return Ok(Some(address));
        }
        let prefix = freed_prefix(&pool.space, pool.family(), &pool.name);
        if let Some((_, address)) = self.oldest_freed(pool, &prefix, &pool.free)? {
            return Ok(Some(address));
        }
        // Another configuration may share the pool and give blocks.
        match self.space(&pool.space)? {
            Some((record, _)) if record.pools.iter().any(|p| p.name == pool.name && p.block.is_some()) => {
                self.freed_in_blocks(pool)
            }
            _ => Ok(None),
        }
    }

    /// Any address of the pool, whatever block it is in.
    pub(super) fn search_all(&self, pool: &Pool) -> Result<Option<Addr>, Halt> {
        match self.search(pool)? {
            Some(address) => Ok(Some(address)),
            None => self.freed_in_blocks(pool),
        }
    }

    fn freed_in_blocks(&self, pool: &Pool) -> Result<Option<Addr>, Halt> {
        let prefix = freed_in_blocks_prefix(&pool.space, pool.family(), &pool.name);
        let found = self.first_freed(pool, &prefix, &pool.free, |key| freed_in_block(&prefix, key))?;
        Ok(found.map(|(_, address)| address))
    }

    /// An address of the set that was not used lately.
    pub(super) fn unused(&self, pool: &Pool, among: &Intervals) -> Result<Option<Addr>, Halt> {
        let family = pool.family();
        let number = match pool.delegate {
            None => {
                let prefix = slot_prefix(&pool.space, family);
                self.first_free(&prefix, among, |number| self.reserved_to(pool, number))?
            }
            Some(_) => {
                let prefix = delegated_prefix(&pool.space, family, &pool.name);
                let numbers = among.iter().map(|(low, high)| (low >> pool.shift(), high >> pool.shift())).collect();
                self.first_free(&prefix, &Intervals::new(numbers), |number| self.reserved_to(pool, number))?
            }
        };
        Ok(number.map(|number| pool.address_at(number)))
    }

    /// A number of the set that no key under the prefix has. `blocked` tells up to which number a found one and those
    /// after it cannot be had all the same.
    pub(super) fn first_free(
        &self,
        prefix: &[u8],
        among: &Intervals,
        blocked: impl Fn(u128) -> Result<Option<u128>, Halt>,
    ) -> Result<Option<u128>, Halt> {
        let search = |mut low: u128, high: u128| -> Result<Option<u128>, Halt> {
            loop {
                let Some(number) = self.gap(prefix, low, high)? else { return Ok(None) };
                match blocked(number)? {
                    None => return Ok(Some(number)),
                    Some(last) if last >= high => return Ok(None),
                    Some(last) => low = last + 1,
                }
            }
        };
        // Where the search begins, as the count of numbers to skip; it wraps around.
        let size = if self.entropy == 0 { 0 } else { among.size() };
        let skip = if size == 0 { 0 } else { spread(self.entropy) % size };
        let mut before: u128 = 0;
        let mut wrapped = Vec::new();
        for (low, high) in among.iter() {
            let count = (high - low).saturating_add(1);
            let from = skip.saturating_sub(before).min(count);
            before = before.saturating_add(count);
            if from > 0 {
                wrapped.push((low, low + (from - 1)));
            }
            if from < count
                && let Some(number) = search(low + from, high)?
            {
                return Ok(Some(number));
            }
        }
        for (low, high) in wrapped {
            if let Some(number) = search(low, high)? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// The address of the set that was released longest ago into a queue and does not cool any more, and when.
    pub(super) fn oldest_freed(
        &self,
        pool: &Pool,
        prefix: &[u8],
        among: &Intervals,
    ) -> Result<Option<(u64, Addr)>, Halt> {
        self.first_freed(pool, prefix, among, |key| freed_of(prefix, key))
    }

    fn first_freed(
        &self,
        pool: &Pool,
        prefix: &[u8],
        among: &Intervals,
        read: impl Fn(&[u8]) -> Option<(u64, u128)>,
    ) -> Result<Option<(u64, Addr)>, Halt> {
        // Rivals part ways here too, among the oldest.
        let skip = if self.entropy == 0 { 0 } else { spread(self.entropy) as usize % (PAGE / 2) };
        let mut after: Option<Key> = None;
        loop {
            let page = self.scan(prefix, after.clone(), PAGE)?;
            let mut usable: Vec<(u64, u128)> = Vec::new();
            for (at, bits) in page.iter().filter_map(|key| read(key)) {
                let offered = !self.cooling(at) && pool.offers(among, bits);
                if offered && self.reserved_to(pool, bits >> pool.shift())?.is_none() {
                    usable.push((at, bits));
                    // The others are only for rivals to part ways.
                    if self.entropy == 0 {
                        break;
                    }
                }
            }
            if !usable.is_empty() {
                let (at, bits) = usable[skip % usable.len()];
                return Ok(Some((at, Addr { family: pool.family(), bits })));
            }
            match page.last() {
                Some(last) if page.len() == PAGE => after = Some(last.clone()),
                _ => return Ok(None),
            }
        }
    }

    fn pool_for<'a>(&self, pools: &[&'a Pool], address: Addr) -> Result<&'a Pool, Halt> {
        let inside = pools.iter().find(|p| p.subnet.contains(&address.ip()));
        let pool =
            *inside.ok_or_else(|| invalid_request(address.ip(), "in none of the pools that serve the request"))?;
        self.allow(pool, address)?;
        // The address of a claim is nobody else's, also before the claim was ever used.
        match pool.claims.iter().find(|c| c.address == Some(address)) {
            Some(claim) => {
                Err(LeaseError::Held { address: address.ip(), holder: format!("claim {}", claim.key) }.into())
            }
            None => Ok(pool),
        }
    }

    /// Refuses an address that the pool may not have in use. Claims may lie outside its ranges, not on what is reserved.
    pub(super) fn allow(&self, pool: &Pool, address: Addr) -> Result<(), Halt> {
        if let Some(reserved) = self.layout.reservation(&pool.space, address) {
            let holder = format!("reservation {}", reserved.holder);
            return Err(LeaseError::Held { address: address.ip(), holder }.into());
        }
        if pool.family() == address.family && pool.allowed.contains(address.bits) {
            let first = pool.address_at(address.bits >> pool.shift());
            if first != address && pool.delegate.is_some() {
                return Err(invalid_request(address.ip(), &format!("not the first of its prefix; ask for {first}")));
            }
            return Ok(());
        }
        Err(invalid_request(address.ip(), &format!("pool {} does not hand it out", pool.name)))
    }

    pub(super) fn probe(&self) -> Result<Step, Halt> {
        self.guard_registration(&mut Draft::default())?;
        let families: Vec<Family> = self.layout.families().collect();
        self.together(families, |family| {
            // Whom each serves is not known here: somebody is served where one has an address.
            let pools: Vec<&Pool> = self.layout.pools.iter().filter(|p| p.family() == family).collect();
            let mut last = Ok(());
            for pool in &pools {
                last = match self.pick_from(pool)? {
                    Some(_) => return Ok(()),
                    None => Err(exhausted(pool)),
                };
            }
            Ok(last?)
        })?;
        Ok(Step::Done(Reply::Done))
    }

    /// The spaces of the configuration, each once.
    pub(super) fn spaces(&self) -> Vec<&AddressSpace> {
        let mut spaces: Vec<&AddressSpace> = self.layout.pools.iter().map(|p| &p.space).collect();
        spaces.sort_unstable();
        spaces.dedup();
        spaces
    }
}

/// An interface is in one VLAN.
fn one_vlan(chosen: &[(&Pool, Held)]) -> Result<(), LeaseError> {
    let mut named = chosen.iter().filter_map(|(pool, _)| Some((pool, pool.vlan?)));
    let Some((first, vlan)) = named.next() else { return Ok(()) };
    let Some((other, second)) = named.find(|(_, other)| *other != vlan) else { return Ok(()) };
    let reason = format!(
        "pool {} is in VLAN {vlan} and pool {} in VLAN {second}, and one interface cannot be in both; give them to two \
         attachments",
        first.name, other.name
    );
    Err(LeaseError::Invalid { field: "ipam.pools".to_owned(), reason })
}

/// Entries of a queue that are looked at together.
pub(super) const PAGE: usize = 64;

/// Spreads 64 bits of entropy over 128, so that wide pools are used in their whole width.
pub(super) fn spread(entropy: u64) -> u128 {
    let entropy = u128::from(entropy);
    (entropy << 64 | entropy).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
}

pub(super) fn held(pool: &Pool, address: Addr) -> Held {
    let length = pool.delegate.unwrap_or(pool.subnet.prefix_len());
    let network = IpNet::new(address.ip(), length).expect("lengths of a checked pool fit its family");
    Held { delegated: pool.delegate.is_some(), ..Held::new(&pool.space, network, &pool.name) }
}

pub(super) fn exhausted(pool: &Pool) -> LeaseError {
    LeaseError::Exhausted { pool: pool.name.clone(), size: pool.size() }
}

pub(super) fn invalid_request(address: IpAddr, reason: &str) -> Halt {
    LeaseError::Invalid { field: "addresses".to_owned(), reason: format!("{address}: {reason}") }.into()
}
