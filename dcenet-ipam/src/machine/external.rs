//! Reservations: addresses that somebody outside uses, recorded in the store for all configurations.
//!
//! The record of a space counts its reservations, and everyone who takes an address guards that record. So a lease that
//! was decided before a reservation is decided again after it, and where there is none nothing is read. A reservation is
//! recorded first and then looked over: what was taken before it is found then, and nothing can be taken after.

use std::rc::Rc;

use dcenet_core::provider::LeaseError;

use super::{Draft, Halt, Reply, SpaceEntry, Step, Work};
use crate::model::{Addr, AddressSpace, Family, Interval, Pool};
use crate::record::{ReservationRecord, SpaceRecord, reservation_key, reservation_of, reservation_prefix, space_key};
use crate::store::Key;

impl Work<'_> {
    /// The record of a space, read and understood once.
    pub(super) fn space(&self, space: &AddressSpace) -> Result<SpaceEntry, Halt> {
        if let Some((_, known)) = self.spaces_read.borrow().iter().find(|(s, _)| s == space) {
            return Ok(known.clone());
        }
        let record = self.record::<SpaceRecord>(&space_key(space))?.map(|(record, version)| (Rc::new(record), version));
        self.spaces_read.borrow_mut().push((space.clone(), record.clone()));
        Ok(record)
    }

    /// The last address up to which reservations cover everything from `first` on, if they cover anything of
    /// `first..=last`, and the key of the first of them.
    fn covered(
        &self,
        space: &AddressSpace,
        family: Family,
        (first, last): Interval,
    ) -> Result<Option<(u128, Key)>, Halt> {
        if self.space(space)?.is_none_or(|(record, _)| record.reservations == 0) {
            return Ok(None);
        }
        let prefix = reservation_prefix(space, family);
        // The first key with a last address of `first` or more.
        let after = first.checked_sub(1).map(|below| reservation_key(space, family, (u128::MAX, below)));
        let mut covered: Option<(u128, Key)> = None;
        for key in self.scan(&prefix, after, RUN)? {
            let Some((low, high)) = reservation_of(&prefix, key) else { continue };
            covered = match covered {
                None if low <= last => Some((high, key.clone())),
                Some((until, first_key)) if until.checked_add(1).is_some_and(|next| low <= next) => {
                    Some((high, first_key))
                }
                done => return Ok(done),
            };
        }
        Ok(covered)
    }

    /// The last number up to which nothing can be had from this number on, for it is reserved; `None` if it can.
    pub(super) fn reserved_to(&self, pool: &Pool, number: u128) -> Result<Option<u128>, Halt> {
        let (shift, family) = (pool.shift(), pool.family());
        let first = number << shift;
        let covered = self.covered(&pool.space, family, (first, first | ((1 << shift) - 1)))?;
        // A number of which only a part is covered cannot be had either.
        Ok(covered.map(|(until, _)| (until >> shift).max(number)))
    }

    /// Refuses an address that is reserved, or is in a prefix of the pool that is in part, by the holder's name, and
    /// rests the decision on there being no such reservation.
    pub(super) fn refuse_reserved(&self, draft: &mut Draft, space: &AddressSpace, address: Addr) -> Result<(), Halt> {
        let version = self.space(space)?.map(|(_, version)| version);
        draft.guard(&space_key(space), version);
        let pool = self.pool_of(space, address);
        let shift = pool.map_or(0, Pool::shift);
        let first = address.bits >> shift << shift;
        let Some((_, key)) = self.covered(space, address.family, (first, first | ((1 << shift) - 1)))? else {
            return Ok(());
        };
        let holder = self.record::<ReservationRecord>(&key)?.map_or_else(String::new, |(record, _)| record.holder);
        Err(LeaseError::Held { address: address.ip(), holder: format!("reservation {holder}") }.into())
    }

    /// Which pool of the configuration the address is of.
    pub(super) fn pool_of(&self, space: &AddressSpace, address: Addr) -> Option<&Pool> {
        self.layout.pools.iter().find(|p| p.space == *space && p.subnet.contains(&address.ip()))
    }

    pub(super) fn hold(&self, space: &AddressSpace, first: Addr, last: Addr, holder: &str) -> Result<Step, Halt> {
        let (family, range) = (first.family, (first.bits, last.bits));
        let (mut draft, key) = (Draft::default(), reservation_key(space, family, range));
        self.need([&space_key(space), &key])?;
        let before = self.record::<ReservationRecord>(&key)?;
        draft.guard(&key, before.as_ref().map(|(_, version)| *version));
        if let Some((before, _)) = before {
            if before.holder == holder {
                return Ok(draft.commit(Reply::NotHeld));
            }
            return Err(
                LeaseError::Held { address: first.ip(), holder: format!("reservation {}", before.holder) }.into()
            );
        }
        let mut record = self.note_change(&mut draft, space)?;
        if let Some((_, other)) = self.covered(space, family, range)? {
            let other = self.record::<ReservationRecord>(&other)?.map_or_else(String::new, |(record, _)| record.holder);
            return Err(LeaseError::Held { address: first.ip(), holder: format!("reservation {other}") }.into());
        }
        record.reservations += 1;
        draft.put(space_key(space), &record);
        draft.put(key, &ReservationRecord { holder: holder.to_owned() });
        Ok(draft.commit(Reply::Done))
    }

    pub(super) fn unhold(&self, space: &AddressSpace, first: Addr, last: Addr, holder: &str) -> Result<Step, Halt> {
        let mut draft = Draft::default();
        let key = reservation_key(space, first.family, (first.bits, last.bits));
        self.need([&space_key(space), &key])?;
        let before = self.record::<ReservationRecord>(&key)?;
        draft.guard(&key, before.as_ref().map(|(_, version)| *version));
        let Some((before, _)) = before else { return Ok(draft.commit(Reply::NotHeld)) };
        if before.holder != holder {
            return Err(
                LeaseError::Held { address: first.ip(), holder: format!("reservation {}", before.holder) }.into()
            );
        }
        let mut record = self.note_change(&mut draft, space)?;
        record.reservations = record.reservations.saturating_sub(1);
        draft.put(space_key(space), &record);
        draft.delete(key);
        Ok(draft.commit(Reply::Done))
    }

    /// The record of a space that counts one change more.
    fn note_change(&self, draft: &mut Draft, space: &AddressSpace) -> Result<SpaceRecord, Halt> {
        let before = self.space(space)?;
        draft.guard(&space_key(space), before.as_ref().map(|(_, version)| *version));
        let mut record = before.map(|(record, _)| SpaceRecord::clone(&record)).unwrap_or_default();
        record.changes += 1;
        Ok(record)
    }
}

/// Reservations that are crossed in one look where they lie side by side.
const RUN: usize = 64;
