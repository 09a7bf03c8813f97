//! Which endpoint has which slot.

use std::collections::{BTreeMap, HashMap, VecDeque};

use dcenet_core::model::AttachmentId;

/// Hands out slots. A slot that was given back goes to the end of the queue.
#[derive(Debug)]
pub(crate) struct Slots {
    used: HashMap<AttachmentId, u16>,
    free: VecDeque<u16>,
}

impl Slots {
    /// For a map of `entries` endpoints, of which slot 0 is nobody's, with those in `used` taken.
    pub(crate) fn new(entries: u32, used: BTreeMap<u16, AttachmentId>) -> Self {
        let last = u16::try_from(entries.saturating_sub(1)).unwrap_or(u16::MAX);
        let free = (1..=last).filter(|slot| !used.contains_key(slot)).collect();
        Self { used: used.into_iter().map(|(slot, id)| (id, slot)).collect(), free }
    }

    /// The endpoint's slot, found or new; none where all are taken.
    pub(crate) fn take(&mut self, id: AttachmentId) -> Option<u16> {
        if let Some(slot) = self.of(id) {
            return Some(slot);
        }
        let slot = self.free.pop_front()?;
        self.used.insert(id, slot);
        Some(slot)
    }

    /// Takes an endpoint's slot back.
    pub(crate) fn give_back(&mut self, id: AttachmentId) {
        if let Some(slot) = self.used.remove(&id) {
            self.free.push_back(slot);
        }
    }

    /// The slot of an endpoint.
    pub(crate) fn of(&self, id: AttachmentId) -> Option<u16> {
        self.used.get(&id).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u64) -> AttachmentId {
        format!("{n:013x}").parse().unwrap()
    }

    #[test]
    fn slots_are_kept_given_back_and_reused_last() {
        let mut slots = Slots::new(4, BTreeMap::from([(2, id(7))]));
        assert_eq!(slots.take(id(7)), Some(2), "what was found attached");
        assert_eq!([slots.take(id(1)), slots.take(id(1)), slots.take(id(3))], [Some(1), Some(1), Some(3)]);
        assert_eq!(slots.take(id(4)), None);
        slots.give_back(id(5));
        slots.give_back(id(1));
        slots.give_back(id(7));
        assert_eq!(slots.take(id(4)), Some(1));
        assert_eq!([slots.of(id(4)), slots.of(id(3)), slots.of(id(7))], [Some(1), Some(3), None]);
    }

    #[test]
    fn slot_0_is_never_given_and_16_bits_are_the_end() {
        assert_eq!(Slots::new(1, BTreeMap::new()).take(id(1)), None);
        let mut slots = Slots::new(1 << 20, BTreeMap::new());
        assert_eq!((1..=u16::MAX).filter(|n| slots.take(id(u64::from(*n))).is_some()).count(), 65_535);
        assert_eq!(slots.take(id(70_000)), None);
    }
}
