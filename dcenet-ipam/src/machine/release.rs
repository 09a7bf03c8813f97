//! Taking addresses back.

use dcenet_core::model::AttachmentKey;

use super::claim::{put_kept, unqueue};
use super::handover::Place;
use super::{Draft, Halt, REMEMBERED, Reply, Step, Work};
use crate::model::{Addr, AddressSpace, NodeName};
use crate::record::{
    AttachmentRecord, ClaimRecord, EventKind, SlotRecord, attachment_key, claim_key, freed_of, freed_prefix, node_key,
    slot_key,
};

impl Work<'_> {
    /// With a node, only while its record has the version given.
    pub(super) fn release(
        &self,
        attachment: &AttachmentKey,
        sequence: Option<u64>,
        node: Option<(&NodeName, Option<u64>)>,
    ) -> Result<Step, Halt> {
        let own_key = attachment_key(attachment);
        let mut draft = Draft::default();
        if let Some((node, version)) = node {
            let key = node_key(node);
            self.need([&key, &own_key])?;
            if self.entry(&key)?.map(|entry| entry.version) != version {
                return Ok(Step::Done(Reply::NotHeld));
            }
            draft.guard(&key, version);
        }
        let held = self.record::<AttachmentRecord>(&own_key)?;
        draft.guard(&own_key, held.as_ref().map(|(_, version)| *version));
        // Committed as a barrier: what took the lease away may not be flushed yet.
        let Some((record, version)) = held else { return Ok(draft.commit(Reply::NotHeld)) };
        if sequence.is_some_and(|sequence| sequence != record.sequence(version)) {
            return Ok(Step::Done(Reply::NotHeld));
        }
        for Place { space, address, pool, key, slot, version } in self.slots_of(&record)? {
            match &slot {
                SlotRecord::Handover { by, claim, to: Some(other), joined: true, .. }
                    if by == attachment || other == attachment =>
                {
                    let left = if by == attachment { other } else { by };
                    draft.guard(&key, Some(version));
                    unqueue(&mut draft, &space, address, &slot);
                    draft.put(key, &SlotRecord::Bound { by: left.clone(), claim: Some(claim.clone()) });
                    self.note(&mut draft, &space, address, EventKind::Released, Some(attachment), None);
                }
                SlotRecord::Bound { by, .. } | SlotRecord::Handover { by, .. } if by == attachment => {
                    draft.guard(&key, Some(version));
                    self.end_use(&mut draft, &space, address, &slot, &pool)?;
                    self.note(&mut draft, &space, address, EventKind::Released, None, None);
                    self.forget_old_releases(&mut draft, &space, address, &pool)?;
                    self.forget_old_events(&mut draft, &space, address)?;
                }
                // Not this attachment's any more: whoever has it keeps it.
                _ => {}
            }
        }
        draft.delete(own_key);
        Ok(draft.commit(Reply::Done))
    }

    /// Drafts what becomes of an address that nothing is attached to any more.
    fn end_use(
        &self,
        draft: &mut Draft,
        space: &AddressSpace,
        address: Addr,
        slot: &SlotRecord,
        pool: &str,
    ) -> Result<(), Halt> {
        unqueue(draft, space, address, slot);
        let Some(claim) = slot.claim() else {
            self.free(draft, space, address, pool);
            return Ok(());
        };
        let claim_key = claim_key(space, address.family, claim);
        let recorded = self.record::<ClaimRecord>(&claim_key)?;
        draft.guard(&claim_key, recorded.as_ref().map(|(_, version)| *version));
        let own = recorded.map(|(record, _)| record).filter(|record| Addr::from(record.address) == address);
        match own.as_ref().map(|record| self.kept_after(claim, record)) {
            Some(Some(kept)) => put_kept(draft, space, address, &kept),
            Some(None) => {
                draft.delete(claim_key);
                self.free(draft, space, address, pool);
            }
            None => self.free(draft, space, address, pool),
        }
        Ok(())
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
        let queue = self.queue_of(space, address, pool);
        let prefix = freed_prefix(space, address.family, &queue);
        let limit = REMEMBERED.max(self.layout.cooldown).as_millis();
        let old: Vec<_> = self
            .scan(&prefix, None, 2)?
            .iter()
            .filter_map(|key| Some((key, freed_of(&prefix, key)?)))
            .filter(|(_, (at, _))| u128::from(self.now.abs_diff(*at)) > limit)
            .map(|(key, (at, bits))| (key, at, bits, slot_key(space, Addr { family: address.family, bits })))
            .collect();
        self.need(old.iter().map(|(_, _, _, slot)| slot))?;
        for (key, at, bits, slot) in old {
            // Taken since; who took it also took it from the queue.
            let freed = self.record::<SlotRecord>(&slot)?;
            let Some((SlotRecord::Freed { at: freed, .. }, version)) = freed else { continue };
            if freed == at && self.forget_delegated(draft, space, Addr { family: address.family, bits }, pool)? {
                draft.guard(&slot, Some(version));
                draft.delete(slot);
                draft.delete(key.clone());
            }
        }
        Ok(())
    }
}
