//! Records that cannot be read, made anew from the others.

use dcenet_core::model::AttachmentKey;

use super::Damage;
use super::find::{Finder, Mend, is_row, put};
use super::snapshot::Row;
use crate::model::{Addr, AddressSpace, BlockOwner, Family, KeepPolicy};
use crate::record::{
    AttachmentRecord, BlockRecord, ClaimRecord, RegisteredPool, ReservationRecord, SlotRecord, SpaceRecord,
    attachment_key, attachment_of, block_prefix, claim_key, slot_key,
};
use crate::store::{Key, Write, numbered};

impl Finder<'_> {
    pub(super) fn unreadable(&mut self) {
        for (key, reason) in &self.snapshot.unreadable {
            let key = key.to_vec();
            let mend = self.rebuild(&key).unwrap_or_else(Mend::none);
            self.find(key, Damage::Unreadable { reason: reason.clone() }, mend);
        }
    }

    /// What an unreadable record must have been, as far as the others tell.
    fn rebuild(&self, key: &Key) -> Option<Mend> {
        if is_row(key) || key.starts_with(b"h/") || key.starts_with(b"n/") {
            return Some(Mend::new("takes it away, for nothing rests on it", vec![Write::Delete(key.clone())]));
        }
        if let Some(attachment) = attachment_of(key) {
            return self.rebuild_attachment(key, &attachment);
        }
        if key.starts_with(b"s/") {
            return self.rebuild_slot(key);
        }
        if key.starts_with(b"c/") {
            let has = |space: &AddressSpace, address: Addr, slot: &SlotRecord| {
                slot.claim().is_some_and(|claim| claim_key(space, address.family, claim) == *key)
            };
            let mut slots = self.snapshot.slots.iter();
            let found = slots.find(|((space, address), (slot, _))| has(space, *address, slot));
            let Some(((space, address), _)) = found else {
                if self.snapshot.any_unreadable(b"s/") {
                    return None;
                }
                let write = vec![Write::Delete(key.clone())];
                return Some(Mend::new("forgets the claim, for it has no address", write));
            };
            let pool = self.registered(space, *address)?.name.clone();
            let record = ClaimRecord {
                address: address.ip(),
                pool,
                keep: KeepPolicy::Forever,
                mac: None,
                gone: false,
                moves: 0,
                away: None,
            };
            let write = put(key.clone(), &record);
            let mend = Mend::new("records the claim with the address that it has, for ever", vec![write]);
            return Some(mend.resting_on([slot_key(space, *address)]));
        }
        if key.starts_with(b"b/") {
            let row = self.snapshot.owned.iter().find_map(|row| {
                let (pool, node) = row.name.split_once('/')?;
                (numbered(&block_prefix(&row.space, row.family, pool), row.number) == *key).then_some((row, node))
            });
            return Some(match row {
                Some((row, node)) => {
                    let write = put(key.clone(), &BlockRecord { node: node.to_owned(), closing: false });
                    Mend::new("gives it to the node whose list has it", vec![write]).resting_on([row.key.clone()])
                }
                None => Mend::new("gives the block up, for no node has it", vec![Write::Delete(key.clone())]),
            });
        }
        if key.starts_with(b"x/") {
            let holder = "unknown, for the record could not be read".to_owned();
            let write = put(key.clone(), &ReservationRecord { holder });
            return Some(Mend::new("keeps the reservation, for an unknown holder", vec![write]));
        }
        let space: AddressSpace = std::str::from_utf8(key.strip_prefix(b"e/")?).ok()?.parse().ok()?;
        if self.ipam.layout().pools.is_empty() {
            // Who has a configuration knows more.
            return None;
        }
        let counted = self.snapshot.reservations.iter().filter(|((of, _), _)| *of == space);
        let reservations = counted.map(|(_, all)| all.len() as u64).sum();
        let own = self.ipam.layout().pools.iter().filter(|pool| pool.space == space);
        let pools = own.map(|pool| RegisteredPool {
            applications: pool.block.is_some_and(|blocks| blocks.owner == BlockOwner::Application),
            name: pool.name.clone(),
            subnet: pool.subnet,
            claims: Vec::new(),
            block: pool.block.map(|blocks| blocks.length),
            delegate: pool.delegate,
            // What they gave up stood in the record alone.
            given_up: Vec::new(),
        });
        let record = SpaceRecord { pools: pools.collect(), reservations, changes: self.now };
        let write = put(key.clone(), &record);
        let remedy = "counts the reservations and registers the pools of this configuration; others do it for theirs";
        Some(Mend::new(remedy, vec![write]))
    }

    fn rebuild_attachment(&self, key: &Key, attachment: &AttachmentKey) -> Option<Mend> {
        if self.snapshot.any_unreadable(b"s/") {
            // A slot that cannot be read may name it.
            return None;
        }
        let (mut addresses, mut rests, mut workload) = (Vec::new(), Vec::new(), None);
        for ((space, address), (slot, _)) in &self.snapshot.slots {
            let joined = matches!(slot, SlotRecord::Handover { to: Some(to), joined: true, .. } if to == attachment);
            if slot.holder() == Some(attachment) || joined {
                addresses.push(self.held(space, *address)?);
                rests.push(slot_key(space, *address));
                workload = workload.or_else(|| slot.claim().map(|claim| claim.workload.clone()));
            }
        }
        let mend = if addresses.is_empty() {
            Mend::new("takes it away, for no address is the attachment's", vec![Write::Delete(key.clone())])
        } else {
            let record = AttachmentRecord { workload, addresses, mac: None, node: None, sequence: None };
            Mend::new("enters the addresses that are the attachment's", vec![put(key.clone(), &record)])
        };
        Some(mend.resting_on(rests))
    }

    fn rebuild_slot(&self, key: &Key) -> Option<Mend> {
        let rest = key.strip_prefix(b"s/")?;
        let slash = rest.iter().position(|b| *b == b'/')?;
        let space: AddressSpace = std::str::from_utf8(&rest[..slash]).ok()?.parse().ok()?;
        let (family, bits) = match rest[slash + 1..].split_first()? {
            (b'4', bits) => (Family::V4, bits),
            (b'6', bits) => (Family::V6, bits),
            _ => return None,
        };
        let address = Addr { family, bits: u128::from_be_bytes(bits.try_into().ok()?) };
        let holders = self.holders_of(&space, address);
        if let [(by, record)] = holders[..] {
            let claim = self.claim_of(&space, address, by, record);
            let write = put(key.clone(), &SlotRecord::Bound { by: by.clone(), claim });
            return Some(
                Mend::new("binds it to the attachment that holds it", vec![write]).resting_on([attachment_key(by)]),
            );
        }
        if !holders.is_empty() {
            return None;
        }
        if self.snapshot.any_unreadable(b"t/") {
            // An attachment whose record cannot be read may have it.
            return None;
        }
        let claim = self
            .snapshot
            .claims
            .iter()
            .find(|((of, _, _), (record, _))| *of == space && Addr::from(record.address) == address);
        if let Some(((_, _, claim), _)) = claim {
            let write = put(key.clone(), &SlotRecord::Kept { claim: claim.clone(), until: None });
            let mend = Mend::new("keeps it for the claim that has it", vec![write]);
            return Some(mend.resting_on([claim_key(&space, family, claim)]));
        }
        let same = |row: &&Row| row.space == space && row.family == family && row.number == address.bits;
        if let Some(row) = self.snapshot.freed.iter().find(same) {
            let write = put(key.clone(), &SlotRecord::Freed { at: row.at, pool: row.name.clone() });
            return Some(
                Mend::new("counts it as released when its queue says", vec![write]).resting_on([row.key.clone()]),
            );
        }
        Some(Mend::new("counts it as released now, for nobody has it", self.free(&space, address)?))
    }
}
