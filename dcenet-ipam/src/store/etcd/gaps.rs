//! Which numbers are known to be taken, so that a search for a gap need not walk over them again.
//!
//! The knowledge is of the past: others may have freed a number since. Then a gap that is found is not the lowest, which
//! harms nobody; that there is none is believed only if the server has just said so.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use crate::store::{Key, Write};

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
        if !self.prefixes.contains_key(prefix) {
            if self.prefixes.len() == PREFIXES {
                self.prefixes.clear();
            }
            self.prefixes.insert(prefix.to_vec(), Taken { runs: BTreeMap::new(), since: Instant::now() });
        }
        if let Some(taken) = self.prefixes.get_mut(prefix) {
            taken.add(low, high);
        }
    }

    /// Forgets what is known of a prefix.
    pub(super) fn forget(&mut self, prefix: &[u8]) {
        self.prefixes.remove(prefix);
    }

    /// Notes what a commit of this process has changed.
    pub(super) fn committed(&mut self, writes: &[Write]) {
        for write in writes {
            let Some((prefix, number)) = write.key().split_last_chunk() else { continue };
            let Some(taken) = self.prefixes.get_mut(prefix) else { continue };
            let number = u128::from_be_bytes(*number);
            match write {
                Write::Delete(_) => taken.remove(number),
                Write::Put(..) => taken.add(number, number),
            }
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
            gaps.committed(&[Write::Put(numbered(b"n/", 5), vec![])]);
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
                        gaps.committed(&[Write::Put(numbered(b"n/", number), vec![])]);
                        set.insert(number);
                    }
                    Action::Delete(number) => {
                        gaps.committed(&[Write::Delete(numbered(b"n/", number))]);
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
