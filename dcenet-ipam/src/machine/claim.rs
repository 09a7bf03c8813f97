//! Claims: sets, ends of keeping, renaming, and moves between clusters.

use std::net::IpAddr;

use dcenet_core::model::{AttachmentKey, ClusterId, Workload};
use dcenet_core::provider::LeaseError;
use serde::{Deserialize, Serialize};

use super::lease::{Entitlement, PAGE, spread};
use super::{Draft, Halt, Reply, Step, Work};
use crate::model::{
    Addr, AddressSpace, Claim, ClaimKey, ClaimSet, Family, Intervals, KeepPolicy, MacWish, Members, Pool,
};
use crate::record::{
    ClaimRecord, SlotRecord, claim_key, due_key, due_prefix, freed_key, freed_of, quarantine_key, slot_key,
};

/// A claim that was handed out to another cluster, on its way there.
///
/// It is made under a fence: from then on the cluster that handed it out refuses the claim and keeps its address from
/// everybody, and only the cluster that it names takes it in, once. It may be carried any number of times, by any way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimExport {
    /// The routing domain.
    pub space: AddressSpace,
    /// The claim.
    pub claim: ClaimKey,
    /// Its addresses, at most one of each family.
    pub addresses: Vec<IpAddr>,
    /// As of the claim.
    pub keep: KeepPolicy,
    /// As of the claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacWish>,
    /// The cluster that may take it in.
    pub to: ClusterId,
    /// The fence: how often the claim has moved with this move. What is not higher than the taker knows is old.
    pub moves: u64,
}

/// Whether a set is for an attachment of a workload.
pub(super) fn serves(set: &ClaimSet, workload: &Workload, attachment: &AttachmentKey) -> bool {
    set.owner.ifname.as_ref().is_none_or(|ifname| *ifname == attachment.ifname) && set.has(workload)
}

/// Drafts the removal of an address from the queues and lists that its state is in.
pub(super) fn unqueue(draft: &mut Draft, space: &AddressSpace, address: Addr, slot: &SlotRecord) {
    match slot {
        SlotRecord::Freed { at, pool } => draft.delete(freed_key(space, address, pool, *at)),
        SlotRecord::Kept { until, .. } => {
            if let Some(until) = until {
                draft.delete(due_key(space, address, *until));
            }
        }
        SlotRecord::Handover { until, .. } => draft.delete(due_key(space, address, *until)),
        SlotRecord::Quarantined { until, .. } => {
            draft.delete(quarantine_key(space, address));
            if let Some(until) = until {
                draft.delete(due_key(space, address, *until));
            }
        }
        SlotRecord::Bound { .. } => {}
    }
}

/// Drafts that an address is kept, and when that ends.
pub(super) fn put_kept(draft: &mut Draft, space: &AddressSpace, address: Addr, kept: &SlotRecord) {
    if let SlotRecord::Kept { until: Some(until), .. } = kept {
        draft.put_empty(due_key(space, address, *until));
    }
    draft.put(slot_key(space, address), kept);
}

impl Work<'_> {
    /// The claim of a member of a set: its own, or one of those that replicas share.
    pub(super) fn member<'a>(
        &self,
        pool: &'a Pool,
        set: &ClaimSet,
        workload: &Workload,
        asked: Option<Addr>,
    ) -> Result<Entitlement<'a>, Halt> {
        match (set.members, set.size) {
            (Members::Ordinal, None) => {
                let key = ClaimKey { ifname: set.owner.ifname.clone(), ..ClaimKey::new(workload.clone()) };
                Ok(Entitlement { pool, key, fixed: None, keep: set.keep, mac: set.mac })
            }
            // Members within the size are claims of the pool, which were looked for before.
            (Members::Ordinal, Some(size)) => {
                let index = self.layout.pools.iter().position(|p| p.name == pool.name).unwrap_or_default();
                let text = set.to_string();
                Err(LeaseError::Invalid {
                    field: format!("ipam.pools[{index}].claims[{text:?}].addresses"),
                    reason: format!(
                        "there are {size}, for ordinals 0 to {}, and none for {workload}; add addresses or scale down",
                        size - 1
                    ),
                }
                .into())
            }
            (Members::Replica, size) => {
                let owner = &set.owner;
                let of_set = |c: &&Claim| {
                    c.key.place.is_some() && c.key.workload == owner.workload && c.key.ifname == owner.ifname
                };
                let places: Vec<(&Claim, Addr)> =
                    pool.claims.iter().filter(of_set).filter_map(|c| Some((c, c.address?))).collect();
                if let Some(asked) = asked
                    && let Some((claim, _)) = places.iter().find(|(_, address)| *address == asked)
                {
                    return Ok(Entitlement::new(pool, claim));
                }
                let keys: Vec<_> = places.iter().map(|(_, address)| slot_key(&pool.space, *address)).collect();
                self.need(&keys)?;
                // Rivals part ways.
                let skip = if self.entropy == 0 { 0 } else { spread(self.entropy) as usize % keys.len().max(1) };
                for i in (skip..keys.len()).chain(0..skip) {
                    let (claim, address) = places[i];
                    let open = match self.record::<SlotRecord>(&keys[i])? {
                        None | Some((SlotRecord::Freed { .. }, _)) => true,
                        Some((slot @ SlotRecord::Kept { .. }, _)) if slot.claim() == Some(&claim.key) => true,
                        Some((slot, _)) => self.has_ended_for(&slot, Some(&claim.key)),
                    };
                    if !open
                        || self.layout.reservation(&pool.space, address).is_some()
                        || self.reserved_to(pool, address.bits >> pool.shift())?.is_some()
                    {
                        continue;
                    }
                    // It is read next in any case.
                    match self.record::<ClaimRecord>(&claim_key(&pool.space, pool.family(), &claim.key))? {
                        Some((record, _)) if record.away.is_some() => {}
                        _ => return Ok(Entitlement::new(pool, claim)),
                    }
                }
                let pool = format!("{} (claim set {set})", pool.name);
                Err(LeaseError::Exhausted { pool, size: size.unwrap_or_default().into() }.into())
            }
        }
    }

    /// Whether a claim without a fixed address still has the one that it was recorded with: nobody took it since it was
    /// no longer kept, or whoever did has left it to rest long enough; and it is neither in quarantine nor, while nothing
    /// is attached, reserved.
    pub(super) fn has_not_lost(
        &self,
        pool: &Pool,
        address: Addr,
        claim: &ClaimKey,
        recorded: &ClaimRecord,
    ) -> Result<bool, Halt> {
        let slot = self.record::<SlotRecord>(&slot_key(&pool.space, address))?;
        let in_use = slot.as_ref().is_some_and(|(slot, _)| slot.claim() == Some(claim) && slot.holder().is_some());
        if !in_use
            && (self.layout.reservation(&pool.space, address).is_some()
                || self.reserved_to(pool, address.bits >> pool.shift())?.is_some())
        {
            return Ok(false);
        }
        Ok(match slot {
            None => true,
            // The claim's own release would have kept it, so another has had it since.
            Some((SlotRecord::Freed { at, .. }, _)) if self.kept_after(claim, recorded).is_some() => !self.cooling(at),
            Some((SlotRecord::Freed { .. }, _)) => true,
            Some((slot @ SlotRecord::Quarantined { .. }, _)) => self.has_ended_for(&slot, Some(claim)),
            Some((slot, _)) => slot.claim() == Some(claim) || self.has_ended(&slot),
        })
    }

    /// Whether the time is over for which something keeps an address unused.
    pub(super) fn has_ended(&self, slot: &SlotRecord) -> bool {
        match slot {
            SlotRecord::Kept { until, .. } | SlotRecord::Quarantined { until, .. } => {
                until.is_some_and(|until| self.now >= until)
            }
            SlotRecord::Bound { .. } | SlotRecord::Freed { .. } | SlotRecord::Handover { .. } => false,
        }
    }

    /// Whether somebody may take what was kept or in quarantine for a time that is over. What a claim had when its
    /// quarantine began is still the claim's, perhaps in another cluster.
    pub(super) fn has_ended_for(&self, slot: &SlotRecord, claim: Option<&ClaimKey>) -> bool {
        let others = match slot {
            SlotRecord::Quarantined { claim: Some(holder), .. } => Some(holder) != claim,
            _ => false,
        };
        !others && self.has_ended(slot)
    }

    /// What becomes of an address once nothing is attached to it: kept for its claim, or `None`.
    pub(super) fn kept_after(&self, claim: &ClaimKey, record: &ClaimRecord) -> Option<SlotRecord> {
        let until = match record.keep {
            // It may be in use there.
            _ if record.away.is_some() => None,
            KeepPolicy::Ephemeral => return None,
            KeepPolicy::Workload if record.gone => return None,
            keep => self.until(keep),
        };
        Some(SlotRecord::Kept { claim: claim.clone(), until })
    }

    /// When the keeping of an address ends that begins now; `None` for never.
    pub(super) fn until(&self, keep: KeepPolicy) -> Option<u64> {
        match keep {
            KeepPolicy::For(time) => Some(self.now.saturating_add(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))),
            KeepPolicy::Ephemeral | KeepPolicy::Workload | KeepPolicy::Forever => None,
        }
    }

    /// Drafts that an address is kept for a claim until a time; refused if it is another's.
    pub(super) fn keep_for(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        address: Addr,
        claim: &ClaimKey,
        until: Option<u64>,
    ) -> Result<(), Halt> {
        let slot = SlotRecord::Kept { claim: claim.clone(), until };
        self.ask_for(None, Some(claim));
        self.take(draft, space, address, &slot, Some(claim))?;
        if let Some(until) = until {
            draft.put_empty(due_key(space, address, until));
        }
        Ok(())
    }

    /// The address of the set whose keeping or quarantine ended longest ago, and before the cooldown.
    pub(super) fn pick_ended(&self, pool: &Pool, among: &Intervals) -> Result<Option<Addr>, Halt> {
        let prefix = due_prefix(&pool.space, pool.family());
        let cooldown = u64::try_from(self.layout.cooldown.as_millis()).unwrap_or(u64::MAX);
        let mut after = None;
        loop {
            let page = self.scan(&prefix, after, PAGE)?;
            let ended: Vec<Addr> = page
                .iter()
                .filter_map(|key| freed_of(&prefix, key))
                .take_while(|(at, _)| at.saturating_add(cooldown) <= self.now)
                .filter(|(_, bits)| pool.offers(among, *bits))
                .map(|(_, bits)| Addr { family: pool.family(), bits })
                .collect();
            let keys: Vec<_> = ended.iter().map(|address| slot_key(&pool.space, *address)).collect();
            self.need(&keys)?;
            for (address, key) in ended.into_iter().zip(&keys) {
                // Of a handover only the permission ends.
                if self.record::<SlotRecord>(key)?.is_some_and(|(slot, _)| self.has_ended_for(&slot, None))
                    && self.reserved_to(pool, address.bits >> pool.shift())?.is_none()
                {
                    return Ok(Some(address));
                }
            }
            after = match page.last() {
                Some(last)
                    if page.len() == PAGE
                        && freed_of(&prefix, last).is_some_and(|(at, _)| at.saturating_add(cooldown) <= self.now) =>
                {
                    Some(last.clone())
                }
                _ => return Ok(None),
            };
        }
    }

    /// Turns what has ended at an address into what it counts as.
    pub(super) fn expire(&self, space: &AddressSpace, address: Addr) -> Result<Step, Halt> {
        let key = slot_key(space, address);
        let mut draft = Draft::default();
        let Some((slot, version)) = self.record::<SlotRecord>(&key)? else { return Ok(Step::Done(Reply::NotHeld)) };
        draft.guard(&key, Some(version));
        match &slot {
            SlotRecord::Handover { by, until, .. } if self.now >= *until => return self.abort_handover(by),
            SlotRecord::Quarantined { .. } if self.has_ended(&slot) => {
                // In no queue it would never be found again.
                if self.pool_name(space, address, None)?.is_none() {
                    return Ok(Step::Done(Reply::NotHeld));
                }
                return self.lift(space, address);
            }
            SlotRecord::Kept { claim, .. } if self.has_ended(&slot) => {
                let claim_key = claim_key(space, address.family, claim);
                let recorded = self.record::<ClaimRecord>(&claim_key)?;
                draft.guard(&claim_key, recorded.as_ref().map(|(_, version)| *version));
                unqueue(&mut draft, space, address, &slot);
                let record = recorded.as_ref().map(|(record, _)| record);
                let Some(pool) = self.pool_name(space, address, record)? else {
                    return Ok(Step::Done(Reply::NotHeld));
                };
                self.free(&mut draft, space, address, &pool);
                if recorded.is_some_and(|(record, _)| Addr::from(record.address) == address) {
                    draft.delete(claim_key);
                }
            }
            _ => return Ok(Step::Done(Reply::NotHeld)),
        }
        Ok(draft.commit(Reply::Done))
    }

    /// The pool in whose queue an address goes.
    /// The pool may be one that only other configurations know; `None` if none does.
    pub(super) fn pool_name(
        &self,
        space: &AddressSpace,
        address: Addr,
        record: Option<&ClaimRecord>,
    ) -> Result<Option<String>, Halt> {
        if let Some(pool) = self.pool_of(space, address) {
            return Ok(Some(pool.name.clone()));
        }
        if let Some(record) = record {
            return Ok(Some(record.pool.clone()));
        }
        let pools = self.space(space)?.map(|(record, _)| record);
        Ok(pools.and_then(|r| r.pools.iter().find(|p| p.subnet.contains(&address.ip())).map(|p| p.name.clone())))
    }

    /// The records of a claim in both families.
    fn both(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        claim: &ClaimKey,
    ) -> Result<Vec<(crate::store::Key, ClaimRecord)>, Halt> {
        let keys = [Family::V4, Family::V6].map(|family| claim_key(space, family, claim));
        self.need(&keys)?;
        let mut found = Vec::new();
        for key in keys {
            let recorded = self.record::<ClaimRecord>(&key)?;
            draft.guard(&key, recorded.as_ref().map(|(_, version)| *version));
            if let Some((record, _)) = recorded {
                found.push((key, record));
            }
        }
        let slots: Vec<_> = found.iter().map(|(_, record)| slot_key(space, record.address.into())).collect();
        self.need(&slots)?;
        Ok(found)
    }

    pub(super) fn rename(&self, space: &AddressSpace, from: &ClaimKey, to: &ClaimKey) -> Result<Step, Halt> {
        if from == to {
            let reason = format!("{to} is its name already; give another");
            return Err(LeaseError::Invalid { field: "to".to_owned(), reason }.into());
        }
        let mut draft = Draft::default();
        let taken = self.both(&mut draft, space, to)?;
        let found = self.both(&mut draft, space, from)?;
        if let (Some((_, record)), false) = (taken.first(), found.is_empty()) {
            return Err(LeaseError::Held { address: record.address, holder: format!("claim {to}") }.into());
        }
        for (key, record) in &found {
            refuse_away(from, record)?;
            let address = Addr::from(record.address);
            let slot_key = slot_key(space, address);
            if let Some((mut slot, version)) = self.record::<SlotRecord>(&slot_key)?
                && slot.claim() == Some(from)
            {
                draft.guard(&slot_key, Some(version));
                slot.rename(to);
                draft.put(slot_key, &slot);
            }
            draft.delete(key.clone());
            draft.put(claim_key(space, address.family, to), record);
        }
        Ok(draft.commit(if found.is_empty() { Reply::NotHeld } else { Reply::Done }))
    }

    /// The workload of a claim is gone: what is kept for it while it exists goes back, now or once nothing is attached.
    pub(super) fn gone(&self, space: &AddressSpace, claim: &ClaimKey, fence: Option<u64>) -> Result<Step, Halt> {
        let mut draft = Draft::default();
        let mut any = false;
        for (key, record) in self.both(&mut draft, space, claim)? {
            let address = Addr::from(record.address);
            let slot_key = slot_key(space, address);
            let slot = self.record::<SlotRecord>(&slot_key)?;
            draft.guard(&slot_key, slot.as_ref().map(|(_, version)| *version));
            // Used since the evidence was collected, or recorded since.
            let newer = |version: Option<u64>| version > fence && fence.is_some();
            let recorded = self.view.keys.get(&key).and_then(|entry| entry.as_ref()).map(|entry| entry.version);
            if record.keep != KeepPolicy::Workload
                || record.away.is_some()
                || newer(slot.as_ref().map(|(_, version)| *version))
                || newer(recorded)
            {
                continue;
            }
            any = true;
            match slot {
                Some((slot, _)) if slot.claim() == Some(claim) && slot.holder().is_some() => {
                    draft.put(key, &ClaimRecord { gone: true, ..record });
                }
                Some((slot @ SlotRecord::Kept { .. }, _)) if slot.claim() == Some(claim) => {
                    unqueue(&mut draft, space, address, &slot);
                    self.free(&mut draft, space, address, &record.pool);
                    draft.delete(key);
                }
                Some((SlotRecord::Quarantined { .. }, _)) => {
                    self.give_up(&mut draft, space, address, claim, &record.pool)?;
                    draft.delete(key);
                }
                _ => draft.delete(key),
            }
        }
        Ok(draft.commit(if any { Reply::Done } else { Reply::NotHeld }))
    }

    pub(super) fn hand_out(&self, space: &AddressSpace, claim: &ClaimKey, to: &ClusterId) -> Result<Step, Halt> {
        let mut draft = Draft::default();
        let found = self.both(&mut draft, space, claim)?;
        let Some((_, first)) = found.first() else { return Ok(draft.commit(Reply::NotHeld)) };
        // Of two families one may have moved before the other was claimed.
        let again = found.iter().all(|(_, record)| record.away.as_ref() == Some(to));
        let moves = found.iter().map(|(_, record)| record.moves).max().unwrap_or_default() + u64::from(!again);
        let export = ClaimExport {
            space: space.clone(),
            claim: claim.clone(),
            addresses: found.iter().map(|(_, record)| record.address).collect(),
            keep: first.keep,
            mac: first.mac,
            to: to.clone(),
            moves,
        };
        if !again {
            for (key, record) in found {
                refuse_away(claim, &record)?;
                let address = Addr::from(record.address);
                self.keep_still(&mut draft, space, address, claim, None)?;
                draft.put(key, &ClaimRecord { moves, away: Some(to.clone()), gone: false, ..record });
            }
        }
        Ok(draft.commit(Reply::HandedOut(export)))
    }

    /// Drafts that an address is kept for a claim until a time; refused while something is attached.
    fn keep_still(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        address: Addr,
        claim: &ClaimKey,
        until: Option<u64>,
    ) -> Result<(), Halt> {
        if let Some((slot, _)) = self.record::<SlotRecord>(&slot_key(space, address))?
            && slot.claim() == Some(claim)
            && let Some(by) = slot.holder()
        {
            return Err(LeaseError::Held { address: address.ip(), holder: format!("attachment {by}") }.into());
        }
        self.keep_for(draft, space, address, claim, until)
    }

    pub(super) fn hand_in(&self, export: &ClaimExport, here: &ClusterId) -> Result<Step, Halt> {
        let invalid = |field: &str, reason: String| Halt::from(LeaseError::Invalid { field: field.to_owned(), reason });
        let ClaimExport { space, claim, addresses, keep, mac, to, moves } = export;
        if to != here {
            return Err(invalid("to", format!("the claim {claim} was handed out to cluster {to}, and this is {here}")));
        }
        if *keep == KeepPolicy::Ephemeral {
            return Err(invalid("keep", "an ephemeral claim keeps nothing that could move".to_owned()));
        }
        let mut draft = Draft::default();
        let found = self.both(&mut draft, space, claim)?;
        let mut new = false;
        for ip in addresses {
            let address = Addr::from(*ip);
            let pool = self.layout.pools.iter().find(|p| p.space == *space && p.subnet.contains(&address.ip()));
            let Some(pool) = pool.filter(|p| p.allowed.contains(address.bits)) else {
                let reason = format!("{ip} is not in a pool of space {space} here that may hand it out; add a pool");
                return Err(invalid("addresses", reason));
            };
            let key = claim_key(space, address.family, claim);
            match found.iter().find(|(k, _)| *k == key).map(|(_, record)| record) {
                Some(record) if record.moves == *moves && record.away.is_none() && record.address == address.ip() => {
                    continue;
                }
                Some(record) if record.moves >= *moves => {
                    let reason = format!(
                        "{moves} is old: the claim {claim} has moved {} times as far as this cluster knows; hand it out \
                         again where it is",
                        record.moves
                    );
                    return Err(invalid("moves", reason));
                }
                Some(record) if record.address != address.ip() => {
                    let holder = format!("claim {claim} has {} here; forget it first", record.address);
                    return Err(LeaseError::Held { address: record.address, holder }.into());
                }
                _ => {}
            }
            new = true;
            self.allow(pool, address)?;
            if let Some(other) = pool.claims.iter().find(|c| c.address == Some(address) && c.key != *claim) {
                return Err(LeaseError::Held { address: *ip, holder: format!("claim {}", other.key) }.into());
            }
            self.keep_still(&mut draft, space, address, claim, self.until(*keep))?;
            let (pool, address) = (pool.name.clone(), address.ip());
            let (keep, mac, moves) = (*keep, *mac, *moves);
            draft.put(key, &ClaimRecord { address, pool, keep, mac, gone: false, moves, away: None });
        }
        if new {
            self.guard_registration(&mut draft)?;
        }
        Ok(draft.commit(Reply::Done))
    }

    pub(super) fn take_back(&self, space: &AddressSpace, claim: &ClaimKey) -> Result<Step, Halt> {
        let mut draft = Draft::default();
        let mut any = false;
        for (key, record) in self.both(&mut draft, space, claim)? {
            if record.away.is_some() {
                any = true;
                let address = Addr::from(record.address);
                let record = ClaimRecord { moves: record.moves + 1, away: None, ..record };
                let slot = self.record::<SlotRecord>(&slot_key(space, address))?;
                if let Some((slot @ SlotRecord::Kept { .. }, version)) = slot
                    && slot.claim() == Some(claim)
                    && let Some(kept) = self.kept_after(claim, &record)
                {
                    draft.guard(&slot_key(space, address), Some(version));
                    unqueue(&mut draft, space, address, &slot);
                    put_kept(&mut draft, space, address, &kept);
                }
                draft.put(key, &record);
            }
        }
        Ok(draft.commit(if any { Reply::Done } else { Reply::NotHeld }))
    }
}

/// Refuses what may not be done to a claim that another cluster has.
pub(super) fn refuse_away(claim: &ClaimKey, record: &ClaimRecord) -> Result<(), Halt> {
    match &record.away {
        None => Ok(()),
        Some(cluster) => {
            let holder = format!("claim {claim}, which was handed out to cluster {cluster}");
            Err(LeaseError::Held { address: record.address, holder }.into())
        }
    }
}
