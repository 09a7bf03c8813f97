//! Live migration: two attachments of one claim, one of which has it.
//!
//! ```text
//!   Bound(source) --begin--> Handover(source) --lease of the target--> Handover(source, target)
//!        ^                      |   abort, end                            |       |
//!        +----------------------+<----------- abort, end, target released-+       | complete, or source released
//!        Bound(target) <----------------------------------------------------------+
//! ```
//!
//! The source has the address until the handover is completed or the source is released. If the target dies, its
//! release (by its own DEL, by reclaim, or by an abort) gives its place back and the source goes on; if the source dies,
//! its release leaves the address to the target. Every release presents a sequence, so the late one of whoever lost the
//! address finds nothing that it could free.

use std::time::Duration;

use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::LeaseError;

use super::claim::unqueue;
use super::{Draft, Halt, Reply, Step, Work};
use crate::model::{Addr, AddressSpace};
use crate::record::{AttachmentRecord, EventKind, SlotRecord, attachment_key, due_key, slot_key};
use crate::store::Key;

/// How long a handover may last at most.
pub const MAX_HANDOVER: Duration = Duration::from_secs(24 * 3600);

impl Work<'_> {
    pub(super) fn begin_handover(
        &self,
        from: &AttachmentKey,
        sequence: Option<u64>,
        to: Option<&AttachmentKey>,
        limit: Duration,
    ) -> Result<Step, Halt> {
        let invalid = |field: &str, reason: String| Halt::from(LeaseError::Invalid { field: field.to_owned(), reason });
        if limit.is_zero() || limit > MAX_HANDOVER {
            return Err(invalid("limit", format!("{limit:?} is not more than zero and at most {MAX_HANDOVER:?}")));
        }
        if to == Some(from) {
            return Err(invalid(
                "to",
                format!("{from} has the address already; name the attachment that is to get it"),
            ));
        }
        let (from_key, to_key) = (attachment_key(from), to.map(attachment_key));
        self.need([&from_key].into_iter().chain(&to_key))?;
        let mut draft = Draft::default();
        let held = self.record::<AttachmentRecord>(&from_key)?;
        draft.guard(&from_key, held.as_ref().map(|(_, version)| *version));
        let Some((record, version)) = held else { return Ok(draft.commit(Reply::NotHeld)) };
        if sequence.is_some_and(|sequence| sequence != record.sequence(version)) {
            return Ok(draft.commit(Reply::NotHeld));
        }
        let slots = self.slots_of(&record)?;
        if let (Some(to), Some(to_key)) = (to, &to_key) {
            let other = self.record::<AttachmentRecord>(to_key)?;
            draft.guard(to_key, other.as_ref().map(|(_, version)| *version));
            let joined = slots.iter().any(|place| match &place.slot {
                SlotRecord::Handover { joined: true, to: Some(second), .. } => second == to,
                _ => false,
            });
            if other.is_some() && !joined {
                return Err(invalid("to", format!("{to} has a lease of its own; release it first")));
            }
        }
        let until = self.now.saturating_add(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
        let mut any = false;
        for Place { space, address, key, slot, version, .. } in slots {
            let next = match &slot {
                SlotRecord::Bound { by, claim: Some(claim) } if by == from => {
                    SlotRecord::Handover { by: by.clone(), claim: claim.clone(), to: to.cloned(), joined: false, until }
                }
                SlotRecord::Handover { by, claim, to: second, joined, .. } if by == from => {
                    if let (true, Some(second)) = (*joined, second)
                        && to.is_some_and(|to| to != second)
                    {
                        let holder =
                            format!("attachments {by} and {second}, in a handover; complete or abort it first");
                        return Err(LeaseError::Held { address: address.ip(), holder }.into());
                    }
                    let to = if *joined { second.clone() } else { to.cloned() };
                    SlotRecord::Handover { by: by.clone(), claim: claim.clone(), to, joined: *joined, until }
                }
                _ => continue,
            };
            any = true;
            draft.guard(&key, Some(version));
            unqueue(&mut draft, &space, address, &slot);
            draft.put(key, &next);
            draft.put_empty(due_key(&space, address, until));
        }
        if !any {
            let reason = format!("{from} has no address through a claim, and only claims are handed over");
            return Err(invalid("from", reason));
        }
        Ok(draft.commit(Reply::Done))
    }

    /// Drafts the second place of a handover for whoever is in the slot that it asked for.
    pub(super) fn join(
        &self,
        draft: &mut Draft,
        key: Key,
        address: Addr,
        current: &SlotRecord,
        wanted: &SlotRecord,
    ) -> Result<(), Halt> {
        let SlotRecord::Handover { by, claim, to, joined, until } = current else { return Err(Halt::Stale) };
        let refuse = |holder: String| Err(LeaseError::Held { address: address.ip(), holder }.into());
        let Some(newcomer) = wanted.holder().filter(|_| wanted.claim() == Some(claim)) else {
            return refuse(format!("claim {claim} ({by})"));
        };
        match to {
            _ if newcomer == by => Err(Halt::Stale),
            Some(to) if *joined && to == newcomer => Err(Halt::Stale),
            Some(to) if *joined => refuse(format!("attachments {by} and {to}, in a handover")),
            Some(to) if to != newcomer => refuse(format!("attachment {by}, in a handover to {to}")),
            _ if self.now >= *until => refuse(format!("attachment {by}; the time of its handover is over")),
            _ => {
                let (by, claim, to) = (by.clone(), claim.clone(), Some(newcomer.clone()));
                // Its end stays where it is in the queue.
                draft.put(key, &SlotRecord::Handover { by, claim, to, joined: true, until: *until });
                Ok(())
            }
        }
    }

    pub(super) fn complete_handover(&self, from: &AttachmentKey) -> Result<Step, Halt> {
        self.end_handover(from, true)
    }

    pub(super) fn abort_handover(&self, from: &AttachmentKey) -> Result<Step, Halt> {
        self.end_handover(from, false)
    }

    fn end_handover(&self, from: &AttachmentKey, complete: bool) -> Result<Step, Halt> {
        let from_key = attachment_key(from);
        let mut draft = Draft::default();
        let held = self.record::<AttachmentRecord>(&from_key)?;
        draft.guard(&from_key, held.as_ref().map(|(_, version)| *version));
        let Some((record, version)) = held else { return Ok(draft.commit(Reply::NotHeld)) };
        let mut losers: Vec<(AttachmentKey, Vec<(AddressSpace, Addr)>)> = Vec::new();
        let mut any = false;
        for Place { space, address, key, slot, version: slot_version, .. } in self.slots_of(&record)? {
            let SlotRecord::Handover { by, claim, to, joined, .. } = &slot else { continue };
            if by != from {
                continue;
            }
            let second = to.as_ref().filter(|_| *joined);
            let (winner, loser) = match (complete, second) {
                (true, Some(to)) => (to, Some(by)),
                (true, None) => {
                    let reason = format!("nobody has joined {from} yet; wait for the target's lease, or abort");
                    return Err(LeaseError::Invalid { field: "from".to_owned(), reason }.into());
                }
                (false, second) => (by, second),
            };
            any = true;
            draft.guard(&key, Some(slot_version));
            unqueue(&mut draft, &space, address, &slot);
            draft.put(key, &SlotRecord::Bound { by: winner.clone(), claim: Some(claim.clone()) });
            if let Some(loser) = loser {
                self.note(&mut draft, &space, address, EventKind::Released, Some(loser), None);
                match losers.iter_mut().find(|(l, _)| l == loser) {
                    Some((_, lost)) => lost.push((space, address)),
                    None => losers.push((loser.clone(), vec![(space, address)])),
                }
            }
        }
        for (loser, lost) in losers {
            if loser == *from {
                strip(&mut draft, from_key.clone(), record.clone(), version, &lost);
            } else {
                let key = attachment_key(&loser);
                let other = self.record::<AttachmentRecord>(&key)?;
                draft.guard(&key, other.as_ref().map(|(_, version)| *version));
                if let Some((record, version)) = other {
                    strip(&mut draft, key, record, version, &lost);
                }
            }
        }
        Ok(draft.commit(if any { Reply::Done } else { Reply::NotHeld }))
    }

    /// The slots of an attachment's addresses that have a record.
    pub(super) fn slots_of(&self, record: &AttachmentRecord) -> Result<Vec<Place>, Halt> {
        let places: Vec<_> = record.addresses.iter().filter_map(|held| Some((held, held.slot()?))).collect();
        let keys: Vec<_> = places.iter().map(|(_, (space, address))| slot_key(space, *address)).collect();
        self.need(&keys)?;
        let mut found = Vec::with_capacity(keys.len());
        for ((held, (space, address)), key) in places.into_iter().zip(keys) {
            if let Some((slot, version)) = self.record::<SlotRecord>(&key)? {
                found.push(Place { space, address, pool: held.pool.clone(), key, slot, version });
            }
        }
        Ok(found)
    }
}

/// One address of an attachment with the record of its slot.
pub(super) struct Place {
    pub(super) space: AddressSpace,
    pub(super) address: Addr,
    pub(super) pool: String,
    pub(super) key: Key,
    pub(super) slot: SlotRecord,
    /// The version of the slot's record.
    pub(super) version: u64,
}

/// Drafts the loss of some of an attachment's addresses; its lease keeps its sequence.
fn strip(draft: &mut Draft, key: Key, mut record: AttachmentRecord, version: u64, lost: &[(AddressSpace, Addr)]) {
    let sequence = record.sequence(version);
    record.addresses.retain(|held| held.slot().is_none_or(|slot| !lost.contains(&slot)));
    if record.addresses.is_empty() {
        draft.delete(key);
    } else {
        draft.put(key, &AttachmentRecord { sequence: Some(sequence), ..record });
    }
}
