//! Which numbers are taken, as runs: what a search for a free one asks.

use std::collections::BTreeMap;

/// Sets of numbers as runs without gaps, by first number. Asking and changing take the logarithm of the runs.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Runs(BTreeMap<u128, u128>);

impl Runs {
    /// The last number of the run with this number.
    fn end_of(&self, number: u128) -> Option<u128> {
        self.0.range(..=number).next_back().map(|(_, end)| *end).filter(|end| *end >= number)
    }

    pub(crate) fn insert(&mut self, number: u128) {
        if self.end_of(number).is_some() {
            return;
        }
        let end = number.checked_add(1).and_then(|next| self.0.remove(&next)).unwrap_or(number);
        match number.checked_sub(1).and_then(|below| self.0.range_mut(..=below).next_back()) {
            Some((_, before)) if *before == number - 1 => *before = end,
            _ => {
                self.0.insert(number, end);
            }
        }
    }

    pub(crate) fn remove(&mut self, number: u128) {
        let Some((&start, end)) = self.0.range_mut(..=number).next_back() else { return };
        let last = *end;
        if last < number {
            return;
        }
        if start == number {
            self.0.remove(&start);
        } else {
            *end = number - 1;
        }
        if last > number {
            self.0.insert(number + 1, last);
        }
    }

    /// The lowest number from `low` to `high` that is not taken.
    pub(crate) fn first_gap(&self, low: u128, high: u128) -> Option<u128> {
        let gap = match self.end_of(low) {
            Some(end) => end.checked_add(1)?,
            None => low,
        };
        (gap <= high).then_some(gap)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Numbers close together, at both ends and in the middle.
    fn number() -> impl Strategy<Value = u128> {
        (0..3_usize, 0..12_u128).prop_map(|(at, n)| [n, (1 << 64) - 6 + n, u128::MAX - n][at])
    }

    proptest! {
        #[test]
        fn runs_agree_with_a_set(changes in prop::collection::vec((any::<bool>(), number()), 0..80),
                                 low in number(), high in number()) {
            let (mut runs, mut set) = (Runs::default(), BTreeSet::new());
            for (add, number) in changes {
                if add { runs.insert(number); set.insert(number); } else { runs.remove(number); set.remove(&number); }
                let mut last: Option<u128> = None;
                for (start, end) in &runs.0 {
                    prop_assert!(start <= end && last.is_none_or(|l| l + 1 < *start), "{:?}", runs);
                    last = Some(*end);
                }
            }
            // No run is longer than the numbers there are, so the walk ends.
            let walked = (low..=high).find(|n| !set.contains(n));
            prop_assert_eq!(runs.first_gap(low, high), walked);
        }
    }
}
