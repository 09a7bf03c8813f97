//! Registering pools, recording and forgetting claims.

use dcenet_core::provider::LeaseError;
use ipnet::IpNet;

use super::claim::refuse_away;
use super::lease::Entitlement;
use super::{Draft, Halt, Reply, Step, Work};
use crate::config::overlap;
use crate::model::{Addr, AddressSpace, BlockOwner, Claim, ClaimKey, Family, KeepPolicy, Pool};
use crate::record::{ClaimRecord, RegisteredPool, SlotRecord, SpaceRecord, claim_key, slot_key, space_key};

/// Sets of claims that a pool remembers as recorded: as many configurations can share it without recording again.
const CLAIM_SETS: usize = 16;

impl Work<'_> {
    /// Guards the records of all spaces, in which all pools must stand with their claims.
    pub(super) fn guard_registration(&self, draft: &mut Draft) -> Result<(), Halt> {
        self.guard_pools(draft, recorded)
    }

    /// Guards the records of all spaces, in which all pools must stand, and `more` be true of them.
    fn guard_pools(&self, draft: &mut Draft, more: impl Fn(&Pool, &RegisteredPool) -> bool) -> Result<(), Halt> {
        for space in self.spaces() {
            let Some((record, version)) = self.space(space)? else { return Err(Halt::Unregistered) };
            draft.guard(&space_key(space), Some(version));
            let stands = |pool: &Pool| {
                let same = |r: &&RegisteredPool| r.name == pool.name && r.subnet == pool.subnet && agrees(r, pool);
                record.pools.iter().find(same).is_some_and(|r| more(pool, r))
            };
            if !self.layout.pools.iter().filter(|p| p.space == *space).all(stands) {
                return Err(Halt::Unregistered);
            }
        }
        Ok(())
    }

    pub(super) fn register(&self, note_claims: bool) -> Result<Step, Halt> {
        let mut draft = Draft::default();
        for space in self.spaces() {
            let key = space_key(space);
            let before = self.record::<SpaceRecord>(&key)?;
            draft.guard(&key, before.as_ref().map(|(_, version)| *version));
            let before = before.map(|(record, _)| record).unwrap_or_default();
            let mut after = before.clone();
            for (i, pool) in self.layout.pools.iter().enumerate().filter(|(_, p)| p.space == *space) {
                self.leave_held_ground(&after, i, pool)?;
                enter(&mut after, i, pool, note_claims)?;
            }
            if after != before {
                draft.put(key, &after);
            }
        }
        Ok(draft.commit(Reply::Done))
    }

    /// Refuses a pool on ground that another has given up and prefixes that are held still cover. Nothing new is leased
    /// there meanwhile: who would do that must first change the space's record, which is guarded.
    fn leave_held_ground(&self, record: &SpaceRecord, index: usize, pool: &Pool) -> Result<(), Halt> {
        for other in record.pools.iter().filter(|r| r.name != pool.name) {
            // Who hands out addresses one by one, as the other did, is kept from a held one by its slot.
            let whole = pool.delegate.map(|_| pool.family().bits());
            let Some(length) = other.delegate.or(whole) else { continue };
            for ground in other.given_up.iter().filter(|g| overlap(g, &pool.subnet)) {
                // Of two prefixes that overlap one is in the other.
                let common = if ground.prefix_len() > pool.subnet.prefix_len() { ground } else { &pool.subnet };
                let (family, first) = (Family::of(common), Addr::from(common.network()).bits);
                let last = Addr::from(common.broadcast()).bits;
                let shift = u32::from(family.bits() - length);
                let range = (first >> shift << shift, last | ((1 << shift) - 1));
                let Some((address, slot)) = self.first_in_use(&pool.space, family, range)? else { continue };
                let holder = match (slot.holder(), slot.claim()) {
                    (Some(by), _) => format!("attachment {by}"),
                    (None, Some(claim)) => format!("claim {claim}"),
                    (None, None) => "quarantine".to_owned(),
                };
                return Err(LeaseError::Invalid {
                    field: format!("ipam.pools[{index}].subnet"),
                    reason: format!(
                        "{:?} of pool {} overlaps the prefix of {} (/{length}), which {holder} has from pool {} although \
                         that was shrunk; choose a disjoint subnet, or wait until it is released",
                        pool.subnet.to_string(),
                        pool.name,
                        address.ip(),
                        other.name
                    ),
                }
                .into());
            }
        }
        Ok(())
    }

    /// `ended` says that the claim's use elsewhere counts as over: what it keeps for a time it keeps from now on.
    pub(super) fn record_claim(&self, pool: &str, claim: &Claim, ended: bool) -> Result<Step, Halt> {
        let pool = self.layout.pools.iter().find(|p| p.name == pool).ok_or_else(|| LeaseError::Invalid {
            field: "pool".to_owned(),
            reason: format!("{pool:?} is no pool of this configuration"),
        })?;
        if claim.keep == KeepPolicy::Ephemeral {
            let reason = "an ephemeral claim keeps nothing that could be recorded; use forever".to_owned();
            return Err(LeaseError::Invalid { field: "keep".to_owned(), reason }.into());
        }
        // Nobody could read the record: it is a time in milliseconds, and none is no time.
        if matches!(claim.keep, KeepPolicy::For(time) if time.as_millis() == 0) {
            let reason = "a claim that is kept for less than a millisecond keeps nothing; use a longer time".to_owned();
            return Err(LeaseError::Invalid { field: "keep".to_owned(), reason }.into());
        }
        let mut draft = Draft::default();
        // The claims are not, for recording them is a part of registering.
        self.guard_pools(&mut draft, |_, _| true)?;
        let claim_key = claim_key(&pool.space, pool.family(), &claim.key);
        let before = self.record::<ClaimRecord>(&claim_key)?.map(|(record, _)| record.keep);
        let address = self.settle_claim(&mut draft, &Entitlement::new(pool, claim), None)?;
        let key = slot_key(&pool.space, address);
        let keep_anew = match self.record::<SlotRecord>(&key)? {
            Some((slot, version)) if slot.claim() == Some(&claim.key) && slot.holder().is_some() => {
                draft.guard(&key, Some(version));
                return Ok(draft.commit(Reply::Done));
            }
            // Never used, or kept for longer than a time: nothing has begun that a repetition could begin anew.
            Some((SlotRecord::Kept { claim: holder, until: None }, version))
                if holder == claim.key && before == Some(claim.keep) =>
            {
                draft.guard(&key, Some(version));
                return Ok(draft.commit(Reply::Done));
            }
            Some((SlotRecord::Kept { claim: holder, .. }, _)) => holder == claim.key,
            _ => ended,
        };
        let until = self.until(claim.keep).filter(|_| keep_anew);
        self.keep_for(&mut draft, &pool.space, address, &claim.key, until)?;
        Ok(draft.commit(Reply::Done))
    }

    pub(super) fn forget(&self, space: &AddressSpace, claim: &ClaimKey) -> Result<Step, Halt> {
        let mut draft = Draft::default();
        let keys = [Family::V4, Family::V6].map(|family| claim_key(space, family, claim));
        self.need(&keys)?;
        let mut known = false;
        for key in &keys {
            let recorded = self.record::<ClaimRecord>(key)?;
            draft.guard(key, recorded.as_ref().map(|(_, version)| *version));
            if let Some((record, _)) = recorded {
                refuse_away(claim, &record)?;
                self.give_up(&mut draft, space, Addr::from(record.address), claim, &record.pool)?;
                draft.delete(key.clone());
                known = true;
            }
        }
        Ok(draft.commit(if known { Reply::Done } else { Reply::NotHeld }))
    }
}

/// Whether the claims of the pool were recorded.
fn recorded(pool: &Pool, registered: &RegisteredPool) -> bool {
    digest(pool).is_none_or(|digest| registered.claims.contains(&digest))
}

/// Stands for the claims of a pool that are to be recorded; `None` if there are none.
fn digest(pool: &Pool) -> Option<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut any = false;
    for claim in pool.claims.iter().filter(|c| c.keep != KeepPolicy::Ephemeral) {
        if let Some(address) = claim.address {
            hasher.update(format!("{} {address}\n", claim.key).as_bytes());
            if claim.keep != KeepPolicy::Forever || claim.mac.is_some() {
                hasher.update(format!("{:?} {:?}\n", claim.keep, claim.mac).as_bytes());
            }
            any = true;
        }
    }
    any.then(|| hasher.finalize())
}

/// Enters a pool into the record of its space. A pool of the same name with another subnet that overlaps is the same
/// pool, resized.
fn enter(record: &mut SpaceRecord, index: usize, pool: &Pool, note_claims: bool) -> Result<(), LeaseError> {
    let other = record.pools.iter().find(|r| r.name != pool.name && overlap(&r.subnet, &pool.subnet));
    if let Some(other) = other {
        return Err(LeaseError::Invalid {
            field: format!("ipam.pools[{index}].subnet"),
            reason: format!(
                "{:?} of pool {} overlaps pool {} ({}) of space {} in the store; choose a disjoint subnet or another \
                 space, or name the pool {} to share it",
                pool.subnet.to_string(),
                pool.name,
                other.name,
                other.subnet,
                pool.space,
                other.name
            ),
        });
    }
    let same = |r: &RegisteredPool| r.name == pool.name && overlap(&r.subnet, &pool.subnet);
    let (mut claims, mut block) = (Vec::new(), pool.block.map(|blocks| blocks.length));
    let mut given_up = Vec::new();
    // What this pool takes was looked over.
    for other in record.pools.iter_mut().filter(|r| r.name != pool.name) {
        given_up_but(&mut other.given_up, &pool.subnet);
    }
    for before in record.pools.extract_if(.., |r| same(r)) {
        agree(&before, index, pool)?;
        block = block.or(before.block);
        given_up.extend(before.given_up);
        given_up.push(before.subnet);
        if before.subnet == pool.subnet {
            claims = before.claims;
        }
    }
    if note_claims
        && let Some(digest) = digest(pool)
        && !claims.contains(&digest)
    {
        claims.push(digest);
        if claims.len() > CLAIM_SETS {
            claims.remove(0);
        }
    }
    let (name, delegate, applications) = (pool.name.clone(), pool.delegate, of_applications(pool));
    given_up_but(&mut given_up, &pool.subnet);
    record.pools.push(RegisteredPool { name, subnet: pool.subnet, claims, block, applications, delegate, given_up });
    record.pools.sort_by(|a, b| (&a.name, &a.subnet).cmp(&(&b.name, &b.subnet)));
    Ok(())
}

/// Takes a subnet out of ground that was given up.
fn given_up_but(ground: &mut Vec<IpNet>, taken: &IpNet) {
    let mut left: Vec<IpNet> = Vec::with_capacity(ground.len());
    for mut part in std::mem::take(ground) {
        // The half without it stays, until what is left is in it, or was beside it.
        while overlap(&part, taken) && part.prefix_len() < taken.prefix_len() {
            let Ok(halves) = part.subnets(part.prefix_len() + 1) else { break };
            let (with, without): (Vec<IpNet>, Vec<IpNet>) = halves.partition(|half| overlap(half, taken));
            left.extend(without);
            match with.first() {
                Some(half) => part = *half,
                None => break,
            }
        }
        if !overlap(&part, taken) {
            left.push(part);
        }
    }
    *ground = IpNet::aggregate(&left);
}

/// Whether a configuration means the same pool. One without blocks may share a pool with those that give them; one that
/// begins to give them says so. Where applications own them all must.
fn agrees(registered: &RegisteredPool, pool: &Pool) -> bool {
    let block = pool.block.map(|blocks| blocks.length);
    registered.delegate == pool.delegate
        && registered.applications == of_applications(pool)
        && (block.is_none() || block == registered.block)
}

/// Whether applications own its blocks.
fn of_applications(pool: &Pool) -> bool {
    pool.block.is_some_and(|blocks| blocks.owner == BlockOwner::Application)
}

/// Blocks of two sizes would overlap, and so would addresses and prefixes.
fn agree(registered: &RegisteredPool, index: usize, pool: &Pool) -> Result<(), LeaseError> {
    let show = |length: Option<u8>| length.map_or("none".to_owned(), |length| format!("/{length}"));
    let refuse = |field: &str, own: Option<u8>, other: Option<u8>| LeaseError::Invalid {
        field: format!("ipam.pools[{index}].{field}"),
        reason: format!(
            "{} of pool {}, which the store holds with {}; write that, or give another subnet another name",
            show(own),
            pool.name,
            show(other)
        ),
    };
    if registered.delegate != pool.delegate {
        return Err(refuse("delegate", pool.delegate, registered.delegate));
    }
    let own = of_applications(pool);
    if registered.applications != own && registered.block.is_some() {
        let whose = |applications: bool| if applications { "applications" } else { "nodes" };
        return Err(LeaseError::Invalid {
            field: format!("ipam.pools[{index}].block.owner"),
            reason: format!(
                "the blocks of pool {} are of {} here, and in the store of {}; write that, or give another subnet another name",
                pool.name,
                if pool.block.is_some() { whose(own) } else { "nobody" },
                whose(registered.applications)
            ),
        });
    }
    match (pool.block.map(|blocks| blocks.length), registered.block) {
        (Some(own), Some(other)) if own != other => Err(refuse("block.size", Some(own), Some(other))),
        _ => Ok(()),
    }
}
