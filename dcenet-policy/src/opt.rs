//! Removes entries that never decide, and says which rules thereby vanish.
//!
//! An entry is dead when the entries before it cover every combination of peer, protocol and port that it matches,
//! one of them alone or several together. Duplicates are the plainest case.

use std::collections::{BTreeSet, HashSet};

use serde::Serialize;

use crate::compiler::{CompileError, Limits};
use crate::ir::{Entry, RuleId, RuleList, Service};
use crate::partition::{columns, others, pieces, protocols};

/// A rule that can never decide, given the peers that exist now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shadowed {
    /// The rule.
    pub rule: RuleId,
    /// The rules that decide in its place, in ascending order.
    pub by: Vec<RuleId>,
}

/// A list without dead entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Optimised {
    /// The list; it decides as the one before.
    pub list: RuleList,
    /// Rules of which no entry is left, in the order of the list.
    pub shadowed: Vec<Shadowed>,
}

/// Removes dead entries.
///
/// # Errors
///
/// [`CompileError::ImplLimitExceeded`] where the list is too large to look at.
pub fn optimise(list: &RuleList, limits: &Limits) -> Result<Optimised, CompileError> {
    let columns = columns(list, limits)?;
    let mut alive = vec![false; list.entries.len()];
    let mut seen = HashSet::new();
    for column in &columns {
        if !seen.insert(column) {
            continue;
        }
        if let Some(index) = others(list, column) {
            alive[index as usize] = true;
        }
        for protocol in protocols(list, column) {
            for piece in pieces(list, column, protocol) {
                if let Some(index) = piece.entry {
                    alive[index as usize] = true;
                }
            }
        }
    }

    let survivors: HashSet<RuleId> =
        list.entries.iter().zip(&alive).filter(|(_, alive)| **alive).map(|(entry, _)| entry.leaf.rule).collect();
    let mut shadowed: Vec<Shadowed> = Vec::new();
    let mut told = HashSet::new();
    for (index, entry) in list.entries.iter().enumerate() {
        if !survivors.contains(&entry.leaf.rule) && told.insert(entry.leaf.rule) {
            let by: BTreeSet<_> = list.entries[..index]
                .iter()
                .zip(&alive)
                .filter(|(other, alive)| **alive && overlap(other, entry))
                .map(|(other, _)| other.leaf.rule)
                .collect();
            shadowed.push(Shadowed { rule: entry.leaf.rule, by: by.into_iter().collect() });
        }
    }
    let mut alive = alive.into_iter();
    let mut list = list.clone();
    list.entries.retain(|_| alive.next().unwrap_or(true));
    Ok(Optimised { list, shadowed })
}

fn overlap(left: &Entry, right: &Entry) -> bool {
    let services = match (left.service, right.service) {
        (Service::Any, _) | (_, Service::Any) => true,
        (
            Service::Ports { protocol, first, last },
            Service::Ports { protocol: other, first: other_first, last: other_last },
        ) => protocol == other && first <= other_last && other_first <= last,
    };
    let meets = |(first, last): &(u16, u16)| {
        right.locals.intervals().iter().any(|(other_first, other_last)| first <= other_last && other_first <= last)
    };
    services && left.locals.intervals().iter().any(meets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optimised(entries: &str) -> (String, Vec<(u32, Vec<u32>)>) {
        let list: RuleList = format!("ingress locals 3\n{entries}\ndeny 1 default").parse().unwrap();
        let Optimised { list, shadowed } = optimise(&list, &Limits::default()).unwrap();
        let ids = |list: &[RuleId]| list.iter().map(|rule| rule.0).collect();
        (list.to_string(), shadowed.iter().map(|s| (s.rule.0, ids(&s.by))).collect())
    }

    #[test]
    fn a_duplicate_is_shadowed_by_its_first() {
        let (text, shadowed) = optimised("allow 3 peers 1 tcp 80-80\nallow 4 peers 1 tcp 80-80");
        assert_eq!(text, "ingress locals 3\nallow 3 peers 1 tcp 80-80\ndeny 1 default\n");
        assert_eq!(shadowed, [(4, vec![3])]);
    }

    #[test]
    fn several_rules_together_shadow_one() {
        let covered = "allow 3 peers 1 tcp 0-99\nallow 4 peers * tcp 100-65535\nallow 5 peers 1 tcp 50-150";
        assert_eq!(optimised(covered).1, [(5, vec![3, 4])]);
        let hole = "allow 3 peers 1 tcp 0-98\nallow 4 peers * tcp 100-65535\nallow 5 peers 1 tcp 50-150";
        assert_eq!(optimised(hole).1, []);
    }

    #[test]
    fn a_rule_lives_while_any_of_its_peers_or_protocols_needs_it() {
        assert_eq!(optimised("allow 3 peers 1 any\nallow 4 peers 1-2 any").1, []);
        assert_eq!(optimised("allow 3 peers 1-2 any\nallow 4 peers 1-2 tcp 80-80").1, [(4, vec![3])]);
        assert_eq!(optimised("allow 3 peers 1 tcp *\nallow 4 peers 1 any").1, []);
        let (text, shadowed) = optimised("allow 3 peers 1 tcp *\nallow 4 peers 1 tcp 1-1\nallow 4 peers 2 tcp 1-1");
        assert!(!text.contains("peers 1 tcp 1-1") && text.contains("peers 2 tcp 1-1"), "{text}");
        assert_eq!(shadowed, [], "rule 4 still decides for peer 2");
    }
}
