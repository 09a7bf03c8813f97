//! Splits what one peer may do into disjoint pieces, each with the entry that decides it.

use std::collections::BTreeSet;

use crate::compiler::{CompileError, Limits};
use crate::ir::{Entry, RuleList, Service};
use crate::model::Protocol;

/// For each local id the entries that can match it, as indices into the list.
pub(crate) fn columns(list: &RuleList, limits: &Limits) -> Result<Vec<Vec<u32>>, CompileError> {
    let mut columns = vec![Vec::new(); list.locals as usize];
    // A column that ends with an entry for everything can decide nothing further down.
    let mut complete = vec![false; list.locals as usize];
    let mut work = 0;
    for (index, entry) in (0..).zip(&list.entries) {
        for (first, last) in entry.locals.intervals() {
            for local in usize::from(*first)..=usize::from(*last) {
                if !complete[local] {
                    work += 1;
                    columns[local].push(index);
                    complete[local] = entry.service == Service::Any;
                }
            }
        }
        limits.check("pairs of entry and peer group in one policy set", work, limits.work)?;
    }
    Ok(columns)
}

/// The protocols that a column tells apart, in ascending order.
pub(crate) fn protocols(list: &RuleList, column: &[u32]) -> BTreeSet<Protocol> {
    let services = column.iter().map(|index| list.entries[*index as usize].service);
    services
        .filter_map(|service| match service {
            Service::Any => None,
            Service::Ports { protocol, .. } => Some(protocol),
        })
        .collect()
}

/// A piece begins at `first` and ends before the next; `entry` decides it, or the default where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) first: u16,
    pub(crate) entry: Option<u32>,
}

/// The entry that decides every protocol that no entry of the column names.
pub(crate) fn others(list: &RuleList, column: &[u32]) -> Option<u32> {
    column.iter().copied().find(|index| list.entries[*index as usize].service == Service::Any)
}

/// The pieces of one protocol, from port 0 up; neighbours differ.
pub(crate) fn pieces(list: &RuleList, column: &[u32], protocol: Protocol) -> Vec<Piece> {
    // Boundaries in ascending order; the lowest index among the open entries wins.
    let mut changes: Vec<(u32, u32, bool)> = Vec::new();
    for index in column {
        let Entry { service, .. } = &list.entries[*index as usize];
        match *service {
            Service::Any => {
                changes.push((0, *index, true));
                break;
            }
            Service::Ports { protocol: wanted, first, last } if wanted == protocol => {
                changes.push((u32::from(first), *index, true));
                changes.push((u32::from(last) + 1, *index, false));
            }
            Service::Ports { .. } => {}
        }
    }
    changes.sort_unstable();

    let mut open = BTreeSet::new();
    let mut pieces: Vec<Piece> = vec![Piece { first: 0, entry: None }];
    let mut changes = changes.into_iter().peekable();
    while let Some((at, index, opens)) = changes.next() {
        if opens {
            open.insert(index);
        } else {
            open.remove(&index);
        }
        if changes.peek().is_some_and(|next| next.0 == at) {
            continue;
        }
        let Ok(first) = u16::try_from(at) else { break };
        let entry = open.first().copied();
        match pieces.last_mut() {
            Some(last) if last.entry == entry => {}
            Some(last) if last.first == first => last.entry = entry,
            _ => pieces.push(Piece { first, entry }),
        }
    }
    pieces
}

/// The pieces of two lists for the same ports, with the entries of both; neighbours differ in one of them.
pub(crate) fn both(one: &[Piece], other: &[Piece]) -> Vec<(u16, [Option<u32>; 2])> {
    let firsts: BTreeSet<u16> = one.iter().chain(other).map(|piece| piece.first).collect();
    // The first piece begins at port 0.
    let entry = |pieces: &[Piece], first| {
        let after = pieces.partition_point(|piece| piece.first <= first);
        after.checked_sub(1).and_then(|at| pieces.get(at)?.entry)
    };
    firsts.into_iter().map(|first| (first, [entry(one, first), entry(other, first)])).collect()
}
