//! Which numbers are known to be taken, so that a search for a gap need not walk over them again; and which were free
//! a moment ago, so that it need not ask at all.
//!
//! The knowledge is of the past. Others may have freed a number since: then a gap that is found is not the lowest, which
//! harms nobody; that there is none is believed only if the server has just said so. Others may have taken a number
//! since: the guard on it tells, and what it found is noted.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use crate::store::Key;

/// Knowledge by prefix.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    prefixes: HashMap<Key, Taken>,
}

/// Runs of taken numbers, first to last, disjoint and not adjacent.
#[derive(Debug)]
struct Taken {
    runs: BTreeMap<u128, u128>,
    since: Instant,
    /// A run that was free, and when.
    free: Option<(u128, u128, Instant)>,
}

impl Gaps {
    /// The lowest number of the range that is not known to be taken, and whether any below it is.
    pub(super) fn candidate(&mut self, prefix: &[u8], low: u128, high: u128) -> (Option<u128>, bool) {
        if self.prefixes.get(prefix).is_some_and(|taken| taken.since.elapsed() > LIFETIME) {
            self.prefixes.remove(prefix);
        }
        let run = self.prefixes.get(prefix).and_then(|taken| taken.runs.range(..=low).next_back());
        match run {
            Some((_, last)) if *last >= high => (None, true),
            Some((_, last)) if *last >= low => (Some(last + 1), true),
            _ => (Some(low), false),
        }
    }

    /// Notes that all numbers from `low` to `high` are taken.
    pub(super) fn learn(&mut self, prefix: &[u8], low: u128, high: u128) {
        self.prefix(prefix).add(low, high);
    }

    /// Notes that all numbers from `low` to `high` are free now.
    pub(super) fn learn_free(&mut self, prefix: &[u8], low: u128, high: u128) {
        self.prefix(prefix).free = Some((low, high, Instant::now()));
    }

    /// Whether a candidate was free a moment ago.
    pub(super) fn known_free(&self, prefix: &[u8], number: u128) -> bool {
        let free = self.prefixes.get(prefix).and_then(|taken| taken.free);
        free.is_some_and(|(low, high, at)| (low..=high).contains(&number) && at.elapsed() < MOMENT)
    }

    fn prefix(&mut self, prefix: &[u8]) -> &mut Taken {
        if self.prefixes.len() >= PREFIXES && !self.prefixes.contains_key(prefix) {
            self.prefixes.clear();
        }
        self.prefixes.entry(prefix.to_vec()).or_insert_with(|| Taken {
            runs: BTreeMap::new(),
            since: Instant::now(),
            free: None,
        })
    }

    /// Forgets what is known of a prefix.
    pub(super) fn forget(&mut self, prefix: &[u8]) {
        self.prefixes.remove(prefix);
    }

    /// Notes what keys were found, or made by a commit of this process, to hold: something or nothing.
    pub(super) fn found<'k>(&mut self, keys: impl Iterator<Item = (&'k [u8], bool)>) {
        for (key, holds) in keys {
            let Some((prefix, number)) = key.split_last_chunk() else { continue };
            let Some(taken) = self.prefixes.get_mut(prefix) else { continue };
            let number = u128::from_be_bytes(*number);
            if holds { taken.add(number, number) } else { taken.remove(number) }
        }
    }
}

impl Taken {
    fn add(&mut self, mut low: u128, mut high: u128) {
        // Every run that overlaps or touches becomes part of one.
        while let Some((&first, &last)) = self.runs.range(..=high.saturating_add(1)).next_back() {
            if last < low.saturating_sub(1) {
                break;
            }
            self.runs.remove(&first);
            (low, high) = (low.min(first), high.max(last));
        }
        self.runs.insert(low, high);
    }

    fn remove(&mut self, number: u128) {
        let Some((&first, &last)) = self.runs.range(..=number).next_back() else { return };
        if last < number {
            return;
        }
        self.runs.remove(&first);
        if first < number {
            self.runs.insert(first, number - 1);
        }
        if number < last {
            self.runs.insert(number + 1, last);
        }
    }
}

/// After this, what others have freed is found again.
const LIFETIME: Duration = Duration::from_secs(10);
/// So long what was free is offered without asking. Longer, and rivals would have taken much of it.
const MOMENT: Duration = Duration::from_secs(1);
/// More prefixes than any configuration has spaces.
const PREFIXES: usize = 256;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::store::numbered;

    #[derive(Debug, Clone)]
    enum Action {
        Learn(u128, u128),
        Put(u128),
        Delete(u128),
    }

    fn number() -> impl Strategy<Value = u128> {
        prop_oneof![0..12_u128, u128::MAX - 11..=u128::MAX]
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            (number(), 0..4_u128).prop_map(|(low, more)| Action::Learn(low, low.saturating_add(more))),
            number().prop_map(Action::Put),
            number().prop_map(Action::Delete),
        ]
    }

    proptest! {
        #[test]
        fn candidates_agree_with_a_set_of_numbers(
            actions in proptest::collection::vec(action(), 0..40), low in number(), more in 0..12_u128,
        ) {
            let (mut gaps, mut set) = (Gaps::default(), BTreeSet::new());
            // What nothing was learnt of is not followed.
            gaps.found([(&*numbered(b"n/", 5), true)].into_iter());
            prop_assert_eq!(gaps.candidate(b"n/", 5, 5), (Some(5), false));
            gaps.learn(b"n/", 3, 3);
            set.insert(3);
            for action in actions {
                match action {
                    Action::Learn(low, high) => {
                        gaps.learn(b"n/", low, high);
                        set.extend(low..=high);
                    }
                    Action::Put(number) => {
                        gaps.found([(&*numbered(b"n/", number), true)].into_iter());
                        set.insert(number);
                    }
                    Action::Delete(number) => {
                        gaps.found([(&*numbered(b"n/", number), false)].into_iter());
                        set.remove(&number);
                    }
                }
            }
            let high = low.saturating_add(more);
            let expected = (low..=high).find(|n| !set.contains(n));
            prop_assert_eq!(gaps.candidate(b"n/", low, high), (expected, set.contains(&low)));
            prop_assert_eq!(gaps.candidate(b"other/", low, high), (Some(low), false));
        }
    }
}
