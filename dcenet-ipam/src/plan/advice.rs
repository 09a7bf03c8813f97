//! How to make room: what to move where.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::block::Block;
use super::index::Index;
use super::model::{Prefix, State};
use super::record::Node;
use crate::model::AddressSpace;

/// How to get a prefix of some length in another one. Nothing of it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advice {
    /// There is room: claim this.
    Free(IpNet),
    /// There is room in pieces: after these moves `then` is free. Every target is free now and overlaps no other, so
    /// that the moves can be made in any order, each by claiming the target, renumbering, and releasing the old prefix.
    Moves {
        /// The fewest addresses, of prefixes in this authority's hands where that is enough.
        moves: Vec<Move>,
        /// What is free afterwards.
        then: IpNet,
    },
    /// There is no room in it, but around it: claim this beside it, for the same owner.
    Grow {
        /// The prefix around it.
        parent: Box<Prefix>,
        /// What is free there.
        beside: IpNet,
    },
    /// Neither it nor what is around it has room: have more delegated.
    Overflow {
        /// The addresses that are wanted.
        wanted: u128,
        /// The addresses that are free in it.
        free: u128,
    },
}

/// A prefix to renumber.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// What, with its name, path and owner. If it is delegated, its owner must renumber.
    pub prefix: Prefix,
    /// To where.
    pub to: IpNet,
}

/// The most places that are tried, the cheapest first.
const TRIED: usize = 256;

pub(crate) fn advise(space: &AddressSpace, index: &Index, parent: &Node, length: u8) -> Option<Advice> {
    let free = index.free(parent)?;
    if let Some(block) = free.fit(length) {
        return Some(Advice::Free(Block { length, ..block }.cidr()));
    }
    // Every place of this length has something in it. Those with something as large or larger are of no use: to move that
    // needs what is sought.
    let mut places: BTreeMap<Block, Vec<(Node, State)>> = BTreeMap::new();
    for (node, held) in index.children(parent).filter(|(node, _)| node.block.length > length) {
        places.entry(node.block.widen(length)).or_default().push((*node, held.record.state));
    }
    let cost = |inner: &[(Node, State)]| {
        let foreign = inner.iter().filter(|(_, state)| *state != State::Held).count();
        let addresses = inner.iter().fold(0, |sum: u128, (node, _)| sum.saturating_add(node.block.size()));
        (foreign, addresses, inner.len())
    };
    let mut places: Vec<(Block, Vec<(Node, State)>)> = places.into_iter().collect();
    places.sort_by_key(|(place, inner)| (cost(inner), *place));
    for (place, mut inner) in places.into_iter().take(TRIED) {
        let mut left = free.clone();
        left.take(&place);
        // In order of size best fit is exact: sizes are powers of two and blocks aligned, so that nothing smaller can
        // spoil the place of something larger.
        inner.sort_by_key(|(node, _)| (node.block.length, *node));
        let mut moves = Vec::with_capacity(inner.len());
        for (node, _) in &inner {
            let Some(to) = left.fit(node.block.length) else { break };
            let to = Block { length: node.block.length, ..to };
            left.take(&to);
            moves.push(Move { prefix: index.prefix(space, node)?, to: to.cidr() });
        }
        if moves.len() == inner.len() {
            return Some(Advice::Moves { moves, then: place.cidr() });
        }
    }
    let mut above = index.get(parent)?.parent;
    while let Some(around) = above {
        if let (Some(block), _) = index.fit(&around, length) {
            let beside = Block { length, ..block }.cidr();
            return Some(Advice::Grow { parent: Box::new(index.prefix(space, &around)?), beside });
        }
        above = index.get(&around)?.parent;
    }
    let wanted = Block { length, ..parent.block }.size();
    Some(Advice::Overflow { wanted, free: free.size() })
}
