//! Removes entries that never decide, and says which rules thereby vanish.
//!
//! An entry is dead when the entries before it cover every combination of peer, protocol and port that it matches,
//! one of them alone or several together. Duplicates are the plainest case.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::Serialize;

use crate::compiler::{CompileError, Limits};
use crate::ir::{Entry, RuleId, RuleList, Service};
use crate::model::Protocol;
use crate::partition::{Piece, columns, others, pieces, protocols};

/// A rule that can never decide, given the peers that exist now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shadowed {
    /// The rule.
    pub rule: RuleId,
    /// The rules that decide in its place, in ascending order; where very many do, some of them.
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
    let mut numbers: HashMap<&[u32], usize> = HashMap::new();
    let mut distinct: Vec<Decided> = Vec::new();
    let mut of_local = Vec::with_capacity(columns.len());
    for column in &columns {
        of_local.push(*numbers.entry(column).or_insert_with(|| {
            distinct.push(Decided::of(list, column));
            distinct.len() - 1
        }));
    }
    let mut alive = vec![false; list.entries.len()];
    for index in distinct.iter().flat_map(Decided::entries) {
        alive[index as usize] = true;
    }

    let survivors: HashSet<RuleId> =
        list.entries.iter().zip(&alive).filter(|(_, alive)| **alive).map(|(entry, _)| entry.leaf.rule).collect();
    let mut shadowed: Vec<Shadowed> = Vec::new();
    let mut told = HashSet::new();
    for entry in &list.entries {
        if !survivors.contains(&entry.leaf.rule) && told.insert(entry.leaf.rule) {
            let by = deciding(list, entry, &of_local, &distinct);
            shadowed.push(Shadowed { rule: entry.leaf.rule, by: by.into_iter().collect() });
        }
    }
    let mut alive = alive.into_iter();
    let mut list = list.clone();
    list.entries.retain(|_| alive.next().unwrap_or(true));
    Ok(Optimised { list, shadowed })
}

/// What decides the packets of one column.
struct Decided {
    others: Option<u32>,
    protocols: BTreeMap<Protocol, Vec<Piece>>,
}

impl Decided {
    fn of(list: &RuleList, column: &[u32]) -> Self {
        let pieces = |protocol| (protocol, pieces(list, column, protocol));
        Self { others: others(list, column), protocols: protocols(list, column).into_iter().map(pieces).collect() }
    }

    /// The entries that decide something.
    fn entries(&self) -> impl Iterator<Item = u32> {
        self.others.into_iter().chain(self.protocols.values().flatten().filter_map(|piece| piece.entry))
    }

    /// The entries that decide something of a service, once for each piece.
    fn of_service(&self, service: Service) -> Box<dyn Iterator<Item = u32> + '_> {
        match service {
            Service::Any => Box::new(self.entries()),
            Service::Ports { protocol, first, last } => match self.protocols.get(&protocol) {
                None => Box::new(self.others.into_iter()),
                Some(pieces) => {
                    // The first piece begins at port 0.
                    let from = pieces.partition_point(|piece| piece.first <= first).saturating_sub(1);
                    let met = pieces[from..].iter().take_while(move |piece| piece.first <= last);
                    Box::new(met.filter_map(|piece| piece.entry))
                }
            },
        }
    }
}

/// The rules that decide in the place of an entry that never does.
///
/// At most [`PIECES`] are looked at, so that time goes with the number of shadowed rules whatever shadows them.
fn deciding(list: &RuleList, entry: &Entry, of_local: &[usize], distinct: &[Decided]) -> BTreeSet<RuleId> {
    let columns = entry.locals.iter().filter_map(|local| distinct.get(*of_local.get(usize::from(local))?));
    let deciders = columns.flat_map(|decided| decided.of_service(entry.service));
    deciders.take(PIECES).map(|index| list.entries[index as usize].leaf.rule).collect()
}

/// Of what one shadowed rule would match, how many pieces are looked at.
const PIECES: usize = 1_000;

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
    fn only_rules_that_decide_in_its_place_are_named() {
        let hidden = "allow 3 peers 1 tcp 0-99\nallow 4 peers 1 tcp 50-199\nallow 5 peers 2 tcp *\n\
                      allow 6 peers 1 udp *\nallow 7 peers 1 tcp 60-80\nallow 8 peers 1 tcp 150-160";
        assert_eq!(optimised(hidden).1, [(7, vec![3]), (8, vec![4])]);
        let any = "allow 3 peers 1 tcp *\nallow 4 peers 1 any\nallow 5 peers 1 any\nallow 6 peers 1 udp 1-1";
        assert_eq!(optimised(any).1, [(5, vec![3, 4]), (6, vec![4])]);
    }

    #[test]
    fn of_very_many_rules_that_shadow_one_some_are_named() {
        let many: String = (0..2_000).map(|port| format!("allow {} peers 1 tcp {port}-{port}\n", port + 10)).collect();
        let (_, shadowed) = optimised(&format!("{many}allow 5000 peers 1 tcp 0-1999"));
        let first: Vec<u32> = (10..10 + PIECES as u32).collect();
        assert_eq!(shadowed, [(5000, first)]);
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
