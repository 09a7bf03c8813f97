//! Local ids by class, of which copies share what they have in common.

use std::sync::Arc;

/// The local id of each class, by class id; 0, which a peer has that nothing is asked about, wherever none was set.
///
/// A set asks about few of a cluster's classes, and an update changes few of these: what is all zero takes no room, and a copy that
/// is changed has one chunk of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locals {
    /// None where all are 0; the last one is not.
    chunks: Vec<Option<Arc<[u16; CHUNK]>>>,
}

/// Classes whose ids are kept together.
pub(crate) const CHUNK: usize = 128;

impl Locals {
    /// The local id of a class.
    pub fn get(&self, class: u32) -> u16 {
        let chunk = self.chunks.get(class as usize / CHUNK).and_then(Option::as_deref);
        chunk.map_or(0, |chunk| chunk[class as usize % CHUNK])
    }

    /// Gives a class a local id.
    pub(crate) fn set(&mut self, class: u32, local: u16) {
        let (place, within) = (class as usize / CHUNK, class as usize % CHUNK);
        if self.get(class) == local {
            return;
        }
        if self.chunks.len() <= place {
            self.chunks.resize(place + 1, None);
        }
        let chunk = Arc::make_mut(self.chunks[place].get_or_insert_with(|| Arc::new([0; CHUNK])));
        chunk[within] = local;
        if *chunk == [0; CHUNK] {
            self.chunks[place] = None;
            let used = self.chunks.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
            self.chunks.truncate(used);
        }
    }

    /// The last class that has a local id other than 0.
    pub fn last(&self) -> Option<u32> {
        let chunk = self.chunks.last()?.as_deref()?;
        let within = chunk.iter().rposition(|local| *local != 0)?;
        Some(((self.chunks.len() - 1) * CHUNK + within) as u32)
    }

    /// The chunks that differ from another's, by their place: this one's, or zeros.
    pub(crate) fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (usize, &'a [u16; CHUNK])> {
        let at = |locals: &'a Self, place: usize| locals.chunks.get(place).and_then(Option::as_ref);
        (0..self.chunks.len().max(other.chunks.len())).filter_map(move |place| {
            let (own, others) = (at(self, place), at(other, place));
            let same = match (own, others) {
                (Some(own), Some(others)) => Arc::ptr_eq(own, others) || own == others,
                (own, others) => own.is_none() && others.is_none(),
            };
            (!same).then(|| (place, own.map_or(&ZEROS, |chunk| &**chunk)))
        })
    }
}

static ZEROS: [u16; CHUNK] = [0; CHUNK];

impl FromIterator<(u32, u16)> for Locals {
    fn from_iter<I: IntoIterator<Item = (u32, u16)>>(of: I) -> Self {
        let mut locals = Self::default();
        of.into_iter().for_each(|(class, local)| locals.set(class, local));
        locals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_found_and_equal_however_it_came_about() {
        let chunk = CHUNK as u32;
        let pairs = [(0, 1), (chunk - 1, 2), (chunk, 3), (70_000, 4)];
        let locals: Locals = pairs.into_iter().collect();
        for (class, local) in pairs {
            assert_eq!(locals.get(class), local);
        }
        assert_eq!([1, chunk + 1, 69_999, 70_001, u32::MAX].map(|class| locals.get(class)), [0; 5]);
        assert_eq!((locals.last(), Locals::default().last()), (Some(70_000), None));

        let mut longer = locals.clone();
        longer.set(200_000, 9);
        assert_ne!(longer, locals);
        assert_eq!(longer.differing(&locals).map(|(place, _)| place).collect::<Vec<_>>(), [200_000 / CHUNK]);
        longer.set(200_000, 0);
        assert_eq!(longer, locals);
        assert_eq!(longer.differing(&locals).count(), 0);
        let none = Locals::default();
        let gone: Vec<_> = none.differing(&locals).collect();
        assert_eq!(gone.len(), 3);
        assert!(gone.iter().all(|(_, chunk)| **chunk == [0; CHUNK]));
    }
}
