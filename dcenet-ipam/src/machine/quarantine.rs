//! Quarantine: addresses that somebody else on the link answers for.

use std::net::IpAddr;
use std::time::Duration;

use dcenet_core::model::{AttachmentKey, MacAddr};
use dcenet_core::provider::LeaseError;

use super::claim::{put_kept, unqueue};
use super::lease::{exhausted, held, invalid_request};
use super::{Draft, Halt, Reply, Step, Work};
use crate::model::{Addr, AddressSpace, ClaimKey};
use crate::record::{
    AttachmentRecord, ClaimRecord, EventKind, SlotRecord, attachment_key, claim_key, due_key, quarantine_key, slot_key,
};

/// Why an address goes into quarantine, and for how long.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quarantine {
    /// For people.
    pub reason: String,
    /// For how long; `None` until it is lifted.
    pub time: Option<Duration>,
    /// The MAC address that answered for it.
    pub seen: Option<MacAddr>,
}

/// The longest reason in bytes.
const MAX_REASON: usize = 1024;

impl Work<'_> {
    /// Drafts the quarantine of an address whose slot is guarded.
    fn confine(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        address: Addr,
        why: &Quarantine,
        claim: Option<ClaimKey>,
        from: Option<&AttachmentKey>,
    ) -> Result<(), Halt> {
        if why.reason.len() > MAX_REASON {
            let reason = format!("{} bytes; write at most {MAX_REASON}", why.reason.len());
            return Err(LeaseError::Invalid { field: "reason".to_owned(), reason }.into());
        }
        let end = |time: Duration| self.now.saturating_add(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let until = why.time.map(end);
        let slot = SlotRecord::Quarantined {
            reason: why.reason.clone(),
            at: self.now,
            until,
            mac: why.seen,
            claim,
            from: from.cloned(),
        };
        draft.put(slot_key(space, address), &slot);
        draft.put_empty(quarantine_key(space, address));
        self.note_delegated(draft, space, address);
        if let Some(until) = until {
            draft.put_empty(due_key(space, address, until));
        }
        Ok(())
    }

    pub(super) fn quarantine(&self, space: &AddressSpace, address: Addr, why: &Quarantine) -> Result<Step, Halt> {
        let Some(pool) = self.pool_of(space, address) else {
            return Err(invalid_request(address.ip(), &format!("in no pool of space {space} of this configuration")));
        };
        // Of a delegated prefix all is, under the address that stands for it.
        let address = pool.first_of(address);
        let key = slot_key(space, address);
        let mut draft = Draft::default();
        let current = self.record::<SlotRecord>(&key)?;
        draft.guard(&key, current.as_ref().map(|(_, version)| *version));
        let mut claim = None;
        if let Some((slot, _)) = &current {
            if let Some(by) = slot.holder() {
                let holder = format!("attachment {by}; replace it there");
                return Err(LeaseError::Held { address: address.ip(), holder }.into());
            }
            unqueue(&mut draft, space, address, slot);
            claim = slot.claim().cloned();
        }
        self.confine(&mut draft, space, address, why, claim, None)?;
        Ok(draft.commit(Reply::Done))
    }

    pub(super) fn lift(&self, space: &AddressSpace, address: Addr) -> Result<Step, Halt> {
        let address = self.pool_of(space, address).map_or(address, |pool| pool.first_of(address));
        let key = slot_key(space, address);
        let mut draft = Draft::default();
        let current = self.record::<SlotRecord>(&key)?;
        draft.guard(&key, current.as_ref().map(|(_, version)| *version));
        let Some((slot @ SlotRecord::Quarantined { .. }, _)) = current else {
            return Ok(draft.commit(Reply::NotHeld));
        };
        unqueue(&mut draft, space, address, &slot);
        let recorded = match slot.claim() {
            Some(claim) => {
                let key = claim_key(space, address.family, claim);
                let recorded = self.record::<ClaimRecord>(&key)?;
                draft.guard(&key, recorded.as_ref().map(|(_, version)| *version));
                recorded.map(|(record, _)| record).filter(|record| Addr::from(record.address) == address)
            }
            None => None,
        };
        match slot.claim().zip(recorded.as_ref()).and_then(|(claim, record)| self.kept_after(claim, record)) {
            // It is still the claim's.
            Some(kept) => put_kept(&mut draft, space, address, &kept),
            None => {
                let Some(pool) = self.pool_name(space, address, recorded.as_ref())? else {
                    return Err(invalid_request(
                        address.ip(),
                        &format!("in no pool of space {space} that is known here"),
                    ));
                };
                self.free(&mut draft, space, address, &pool);
                if let Some(claim) = slot.claim().filter(|_| recorded.is_some()) {
                    draft.delete(claim_key(space, address.family, claim));
                }
            }
        }
        Ok(draft.commit(Reply::Done))
    }

    /// Gives the attachment another address of the same pool in place of a bad one, which goes into quarantine.
    pub(super) fn replace(
        &self,
        attachment: &AttachmentKey,
        sequence: u64,
        bad: IpAddr,
        why: &Quarantine,
    ) -> Result<Step, Halt> {
        let own_key = attachment_key(attachment);
        let mut draft = Draft::default();
        let held_record = self.record::<AttachmentRecord>(&own_key)?;
        draft.guard(&own_key, held_record.as_ref().map(|(_, version)| *version));
        let Some((mut record, version)) = held_record else { return Ok(draft.commit(Reply::NotHeld)) };
        let bad = Addr::from(bad);
        let place = record.addresses.iter().position(|held| Addr::from(held.address.addr()) == bad);
        if record.sequence(version) != sequence {
            // Done before, by a call that did not learn of it.
            let done = place.is_none() && self.replaced_before(attachment, &record, bad)?;
            let reply = Reply::Leased(self.compose(&record, record.sequence(version)));
            return Ok(draft.commit(if done { reply } else { Reply::NotHeld }));
        }
        let slot = place.and_then(|i| Some((i, record.addresses[i].slot()?)));
        let Some((place, (space, bad))) = slot else {
            return Err(invalid_request(bad.ip(), &format!("{attachment} does not hold it")));
        };
        let pool = self.layout.pools.iter().find(|p| p.name == record.addresses[place].pool && p.space == space);
        let Some(pool) = pool else {
            let reason = format!("its pool {} is not of this configuration", record.addresses[place].pool);
            return Err(invalid_request(bad.ip(), &reason));
        };
        self.guard_registration(&mut draft)?;
        let key = slot_key(&space, bad);
        let claim = match self.record::<SlotRecord>(&key)? {
            Some((SlotRecord::Bound { by, claim }, version)) if by == *attachment => {
                draft.guard(&key, Some(version));
                claim
            }
            Some((SlotRecord::Handover { by, to, .. }, _)) => {
                let second = to.map_or(String::new(), |to| format!(" to {to}"));
                let holder = format!("a handover of {by}{second}; complete or abort it first");
                return Err(LeaseError::Held { address: bad.ip(), holder }.into());
            }
            _ => return Err(Halt::Stale),
        };
        if let Some(claim) = pool.claims.iter().find(|c| c.address == Some(bad)) {
            let reason = format!("the configuration fixes it for the claim {}; change it there", claim.key);
            return Err(invalid_request(bad.ip(), &reason));
        }
        self.ask_for(record.workload.as_ref(), claim.as_ref());
        let next = self.pick_from(pool)?.ok_or_else(|| exhausted(pool))?;
        if let Some(claim) = &claim {
            let key = claim_key(&space, bad.family, claim);
            if let Some((kept, version)) = self.record::<ClaimRecord>(&key)? {
                draft.guard(&key, Some(version));
                if let Some(wish) = kept.mac
                    && record.mac == Some(wish.of(bad))
                {
                    record.mac = Some(wish.of(next));
                }
                draft.put(key, &ClaimRecord { address: next.ip(), ..kept });
            }
        }
        let slot = SlotRecord::Bound { by: attachment.clone(), claim };
        self.take(&mut draft, &space, next, &slot, None)?;
        self.confine(&mut draft, &space, bad, why, None, Some(attachment))?;
        self.note(&mut draft, &space, bad, EventKind::Released, None, None);
        self.note(&mut draft, &space, next, EventKind::Bound, Some(attachment), record.workload.as_ref());
        record.addresses[place] = held(pool, next);
        record.sequence = None;
        let reply = Reply::Leased(self.compose(&record, 0));
        draft.put(own_key, &record);
        Ok(draft.commit(reply))
    }

    fn replaced_before(&self, attachment: &AttachmentKey, record: &AttachmentRecord, bad: Addr) -> Result<bool, Halt> {
        for (space, _) in record.addresses.iter().filter_map(|held| held.slot()) {
            if let Some((SlotRecord::Quarantined { from, .. }, _)) =
                self.record::<SlotRecord>(&slot_key(&space, bad))?
                && from.as_ref() == Some(attachment)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
