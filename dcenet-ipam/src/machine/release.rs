//! Taking addresses back.

use dcenet_core::model::AttachmentKey;

use super::{Draft, Halt, REMEMBERED, Reply, Step, Work};
use crate::model::{Addr, AddressSpace, KeepPolicy};
use crate::record::{
    AttachmentRecord, ClaimRecord, SlotRecord, attachment_key, claim_key, freed_of, freed_prefix, slot_key,
};

impl Work<'_> {
    pub(super) fn release(&self, attachment: &AttachmentKey, sequence: Option<u64>) -> Result<Step, Halt> {
        let own_key = attachment_key(attachment);
        let mut draft = Draft::default();
        let held = self.record::<AttachmentRecord>(&own_key)?;
        draft.guard(&own_key, held.as_ref().map(|(_, version)| *version));
        // Committed as a barrier: what took the lease away may not be flushed yet.
        let Some((record, version)) = held else { return Ok(draft.commit(Reply::NotHeld)) };
        if sequence.is_some_and(|sequence| sequence != version) {
            return Ok(Step::Done(Reply::NotHeld));
        }
        let slots: Vec<_> = record.addresses.iter().filter_map(|h| Some((h, h.slot()?))).collect();
        let keys: Vec<_> = slots.iter().map(|(_, (space, address))| slot_key(space, *address)).collect();
        self.need(&keys)?;
        for ((held, (space, address)), key) in slots.iter().zip(&keys) {
            match self.record::<SlotRecord>(key)? {
                Some((SlotRecord::Bound { by, claim }, version)) if by == *attachment => {
                    draft.guard(key, Some(version));
                    let keeper = match &claim {
                        Some(claim) => {
                            let claim_key = claim_key(space, address.family, claim);
                            let kept = self.record::<ClaimRecord>(&claim_key)?;
                            draft.guard(&claim_key, kept.as_ref().map(|(_, version)| *version));
                            kept.filter(|(kept, _)| {
                                Addr::from(kept.address) == *address && kept.keep == KeepPolicy::Forever
                            })
                        }
                        None => None,
                    };
                    match (claim, keeper) {
                        (Some(claim), Some(_)) => draft.put(key.clone(), &SlotRecord::Kept { claim }),
                        _ => self.free(&mut draft, space, *address, &held.pool),
                    }
                    self.forget_old_releases(&mut draft, space, *address, &held.pool)?;
                }
                // Not this attachment's any more: whoever has it keeps it.
                _ => {}
            }
        }
        draft.delete(own_key);
        Ok(draft.commit(Reply::Done))
    }

    /// Drops up to two of the oldest releases of the pool's queue that need not be remembered, so that the queue holds
    /// no more than what was released within that time.
    fn forget_old_releases(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        address: Addr,
        pool: &str,
    ) -> Result<(), Halt> {
        let prefix = freed_prefix(space, address.family, pool);
        let limit = REMEMBERED.max(self.layout.cooldown).as_millis();
        let old: Vec<_> = self
            .scan(&prefix, None, 2)?
            .iter()
            .filter_map(|key| Some((key, freed_of(&prefix, key)?)))
            .filter(|(_, (at, _))| u128::from(self.now.abs_diff(*at)) > limit)
            .map(|(key, (at, bits))| (key, at, slot_key(space, Addr { family: address.family, bits })))
            .collect();
        self.need(old.iter().map(|(_, _, slot)| slot))?;
        for (key, at, slot) in old {
            match self.record::<SlotRecord>(&slot)? {
                Some((SlotRecord::Freed { at: freed, .. }, version)) if freed == at => {
                    draft.guard(&slot, Some(version));
                    draft.delete(slot);
                    draft.delete(key.clone());
                }
                // Taken since; who took it also took it from the queue.
                _ => {}
            }
        }
        Ok(())
    }
}
