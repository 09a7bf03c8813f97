//! The decision diagram: local id, then protocol, then port, then a verdict with its rule.
//!
//! A node splits one field into intervals; a walker finds the interval by binary search, so that the number of
//! comparisons is logarithmic in the number of rules. Equal sub-diagrams exist once. Nodes stand after all that
//! they lead to, the root last, and equal lists give equal diagrams.

use std::collections::{BTreeSet, HashMap};

use serde::Serialize;

use crate::compiler::{CompileError, Limits};
use crate::ir::{Leaf, RuleId, RuleList};
use crate::model::Protocol;
use crate::partition::{both, columns, others, pieces, protocols};

/// A node's index in its diagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct NodeId(pub u32);

/// What a node splits on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Field {
    /// The peer's local id, 0 to 65,535.
    Local,
    /// The protocol number, 0 to 255.
    Protocol,
    /// The port, or ICMP `type * 256 + code`, 0 to 65,535.
    Port,
}

/// One interval of a node, from `first` to the next arm's, or to the field's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Arm {
    /// The first value.
    pub first: u16,
    /// Where it leads.
    pub to: NodeId,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Node {
    /// The answer.
    Leaf(Leaf),
    /// A split. At least two arms, in ascending order, the first from 0, neighbours leading to different nodes.
    Switch {
        /// What it splits on. On every path the fields come in the order of [`Field`], each at most once.
        field: Field,
        /// The intervals.
        arms: Vec<Arm>,
    },
}

/// The size of a diagram.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Nodes, leaves included.
    pub nodes: usize,
    /// Distinct leaves.
    pub leaves: usize,
    /// Arms of all switches together: what code or table size grows with.
    pub arms: usize,
    /// The most comparisons on any path, each switch of n arms taking the binary logarithm of n, rounded up.
    pub depth: usize,
}

/// A decision diagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagram {
    nodes: Vec<Node>,
}

impl Diagram {
    /// Builds the diagram of a list, whatever policies in audit would do. A local id that the list does not have is decided
    /// as 0 is.
    ///
    /// # Errors
    ///
    /// [`CompileError::ImplLimitExceeded`] where it would be too large.
    pub fn build(list: &RuleList, limits: &Limits) -> Result<Self, CompileError> {
        Self::of_sides(Sides { list, audit: None }, limits, &mut |leaf, _| leaf.rule)
    }

    /// As [`Diagram::build`], with policies in audit: each leaf has the verdict of the list, and as its rule what `outcome`
    /// says of it and of what would be the leaf if those policies were in force.
    ///
    /// # Errors
    ///
    /// As [`Diagram::build`].
    pub fn build_audited(
        list: &RuleList,
        limits: &Limits,
        outcome: &mut dyn FnMut(Leaf, Leaf) -> RuleId,
    ) -> Result<Self, CompileError> {
        Self::of_sides(Sides { list, audit: list.audit.as_deref() }, limits, outcome)
    }

    fn of_sides(
        sides: Sides<'_>,
        limits: &Limits,
        outcome: &mut dyn FnMut(Leaf, Leaf) -> RuleId,
    ) -> Result<Self, CompileError> {
        let Sides { list, audit } = sides;
        let columns_in_force = columns(list, limits)?;
        let columns_of_audit = audit.map(|audit| columns(audit, limits)).transpose()?.unwrap_or_default();
        let mut builder = Builder { nodes: Vec::new(), ids: HashMap::new(), arms: 0, limits, outcome };
        let mut built: HashMap<[&[u32]; 2], NodeId> = HashMap::new();
        let mut arms = Vec::new();
        for (first, column) in (0..=u16::MAX).zip(&columns_in_force) {
            let columns = [column.as_slice(), columns_of_audit.get(usize::from(first)).map_or(&[], Vec::as_slice)];
            let to = match built.get(&columns) {
                Some(to) => *to,
                None => *built.entry(columns).or_insert(builder.column(&sides, columns)?),
            };
            arms.push(Arm { first, to });
        }
        if let (Ok(first), Some(unknown)) = (u16::try_from(list.locals), arms.first().copied()) {
            arms.push(Arm { first, ..unknown });
        }
        let root = builder.switch(Field::Local, arms)?;
        Ok(Self { nodes: builder.finish(root) })
    }

    /// All nodes; each leads only to nodes before it.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Where a walk begins: the last node.
    pub fn root(&self) -> NodeId {
        NodeId(self.nodes.len() as u32 - 1)
    }

    /// The node of an id.
    ///
    /// # Panics
    ///
    /// If the id is of another diagram and this one has fewer nodes.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// Walks the diagram.
    pub fn decide(&self, local: u16, protocol: Protocol, port: u16) -> Leaf {
        let mut at = self.root();
        loop {
            match self.node(at) {
                Node::Leaf(leaf) => return *leaf,
                Node::Switch { field, arms } => {
                    let value = match field {
                        Field::Local => local,
                        Field::Protocol => u16::from(protocol.0),
                        Field::Port => port,
                    };
                    // The first arm begins at 0, so at least one is counted.
                    at = arms[arms.partition_point(|arm| arm.first <= value) - 1].to;
                }
            }
        }
    }

    /// The distinct leaves.
    pub fn leaves(&self) -> BTreeSet<Leaf> {
        self.nodes
            .iter()
            .filter_map(|node| match node {
                Node::Leaf(leaf) => Some(*leaf),
                Node::Switch { .. } => None,
            })
            .collect()
    }

    /// Its size.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats { nodes: self.nodes.len(), ..Stats::default() };
        let mut depths = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            depths.push(match node {
                Node::Leaf(_) => {
                    stats.leaves += 1;
                    0
                }
                Node::Switch { arms, .. } => {
                    stats.arms += arms.len();
                    let below = arms.iter().map(|arm| depths[arm.to.0 as usize]).max().unwrap_or(0);
                    below + arms.len().next_power_of_two().trailing_zeros() as usize
                }
            });
        }
        stats.depth = depths.last().copied().unwrap_or(0);
        stats
    }
}

/// What holds, and what would with policies in audit.
#[derive(Clone, Copy)]
struct Sides<'a> {
    list: &'a RuleList,
    audit: Option<&'a RuleList>,
}

struct Builder<'a> {
    nodes: Vec<Node>,
    ids: HashMap<Node, NodeId>,
    arms: usize,
    limits: &'a Limits,
    outcome: &'a mut dyn FnMut(Leaf, Leaf) -> RuleId,
}

impl Builder<'_> {
    fn column(&mut self, sides: &Sides<'_>, columns: [&[u32]; 2]) -> Result<NodeId, CompileError> {
        let Sides { list, audit } = *sides;
        let [column, of_audit] = columns;
        let rest = self.leaf(sides, [others(list, column), audit.and_then(|audit| others(audit, of_audit))]);
        let mut arms = vec![Arm { first: 0, to: rest }];
        let mut told_apart = protocols(list, column);
        told_apart.extend(audit.iter().flat_map(|audit| protocols(audit, of_audit)));
        for protocol in told_apart {
            let mut ports = Vec::new();
            let in_force = pieces(list, column, protocol);
            let of_audit = audit.map(|audit| pieces(audit, of_audit, protocol)).unwrap_or_default();
            for (first, entries) in both(&in_force, &of_audit) {
                ports.push(Arm { first, to: self.leaf(sides, entries) });
            }
            let to = self.switch(Field::Port, ports)?;
            let number = u16::from(protocol.0);
            if arms.last().is_some_and(|arm| arm.first == number) {
                arms.pop();
            }
            arms.push(Arm { first: number, to });
            if number < u16::from(u8::MAX) {
                arms.push(Arm { first: number + 1, to: rest });
            }
        }
        self.switch(Field::Protocol, arms)
    }

    fn leaf(&mut self, sides: &Sides<'_>, entries: [Option<u32>; 2]) -> NodeId {
        let leaf_of =
            |list: &RuleList, entry: Option<u32>| entry.map_or(list.default, |index| list.entries[index as usize].leaf);
        let leaf = leaf_of(sides.list, entries[0]);
        let rule = match sides.audit {
            Some(audit) => (self.outcome)(leaf, leaf_of(audit, entries[1])),
            None => leaf.rule,
        };
        self.intern(Node::Leaf(Leaf { rule, ..leaf }))
    }

    fn switch(&mut self, field: Field, mut arms: Vec<Arm>) -> Result<NodeId, CompileError> {
        arms.dedup_by(|next, previous| next.to == previous.to);
        if let [only] = arms[..] {
            return Ok(only.to);
        }
        self.arms += arms.len();
        self.limits.check("arms of one diagram", self.arms, self.limits.arms)?;
        Ok(self.intern(Node::Switch { field, arms }))
    }

    fn intern(&mut self, node: Node) -> NodeId {
        if let Some(id) = self.ids.get(&node) {
            return *id;
        }
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(node.clone());
        self.ids.insert(node, id);
        id
    }

    /// Drops nodes that the root does not lead to: leaves that were looked up and then merged away.
    fn finish(self, root: NodeId) -> Vec<Node> {
        let mut used = vec![false; root.0 as usize + 1];
        used[root.0 as usize] = true;
        for index in (0..used.len()).rev() {
            if let (true, Node::Switch { arms, .. }) = (used[index], &self.nodes[index]) {
                arms.iter().for_each(|arm| used[arm.to.0 as usize] = true);
            }
        }
        let mut renamed = vec![NodeId(0); used.len()];
        let mut kept = Vec::new();
        for (index, mut node) in self.nodes.into_iter().take(used.len()).enumerate() {
            if used[index] {
                if let Node::Switch { arms, .. } = &mut node {
                    arms.iter_mut().for_each(|arm| arm.to = renamed[arm.to.0 as usize]);
                }
                renamed[index] = NodeId(kept.len() as u32);
                kept.push(node);
            }
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Verdict;

    fn diagram(entries: &str) -> Diagram {
        let list: RuleList = format!("ingress locals 4\n{entries}\ndeny 1 default").parse().unwrap();
        Diagram::build(&list, &Limits::default()).unwrap()
    }

    fn allow(rule: u32) -> Leaf {
        Leaf { verdict: Verdict::Allow, rule: RuleId(rule) }
    }

    const DEFAULT: Leaf = Leaf { verdict: Verdict::Deny, rule: RuleId::ISOLATED };

    #[test]
    fn no_entry_is_one_leaf() {
        let diagram = diagram("");
        assert_eq!(diagram.stats(), Stats { nodes: 1, leaves: 1, arms: 0, depth: 0 });
        assert_eq!(diagram.decide(3, Protocol::TCP, 80), DEFAULT);
    }

    #[test]
    fn the_first_match_decides_at_every_edge() {
        let diagram = diagram("allow 3 peers 1 tcp 80-90\nallow 4 peers 1-2 tcp 85-65535\nallow 5 peers 2 any");
        let tcp = |local, port| diagram.decide(local, Protocol::TCP, port);
        assert_eq!([tcp(1, 79), tcp(1, 80), tcp(1, 90), tcp(1, 91)], [DEFAULT, allow(3), allow(3), allow(4)]);
        assert_eq!([tcp(2, 84), tcp(2, 85), tcp(2, 65535)], [allow(5), allow(4), allow(4)]);
        assert_eq!(diagram.decide(2, Protocol(255), 0), allow(5));
        assert_eq!(diagram.decide(2, Protocol(0), 0), allow(5));
        assert_eq!(diagram.decide(1, Protocol(5), 80), DEFAULT);
        assert_eq!(diagram.decide(1, Protocol(7), 80), DEFAULT);
        assert_eq!([tcp(0, 80), tcp(3, 80), tcp(4, 80), tcp(u16::MAX, 80)], [DEFAULT; 4]);
    }

    #[test]
    fn the_last_protocol_and_neighbours_have_their_own_arms() {
        let diagram = diagram("allow 3 peers 1 255 *\nallow 4 peers 1 254 *\nallow 5 peers 1 0 *");
        let of = |protocol| diagram.decide(1, Protocol(protocol), 0);
        assert_eq!([of(0), of(1), of(253), of(254), of(255)], [allow(5), DEFAULT, DEFAULT, allow(4), allow(3)]);
    }

    #[test]
    fn equal_peers_share_their_part() {
        let one = diagram("allow 3 peers 1 tcp 80-80").stats();
        let many = diagram("allow 3 peers 1,3 tcp 80-80").stats();
        assert_eq!(one.nodes, many.nodes);
        assert_eq!(many.arms, one.arms + 2);
    }

    #[test]
    fn ids_beyond_the_list_are_decided_as_the_unknown_peer() {
        let diagram = diagram("allow 3 peers 0,2 any\nallow 4 peers 3 any");
        assert_eq!(diagram.decide(3, Protocol::TCP, 1), allow(4));
        assert_eq!(diagram.decide(4, Protocol::TCP, 1), allow(3));
        assert_eq!(diagram.decide(u16::MAX, Protocol::TCP, 1), allow(3));
    }

    #[test]
    fn too_large_a_diagram_is_refused() {
        let list: RuleList = "ingress locals 4\nallow 3 peers * tcp 80-80\ndeny 1 default".parse().unwrap();
        let refused = |limits| Diagram::build(&list, &limits).unwrap_err().to_string();
        assert!(refused(Limits { arms: 2, ..Limits::default() }).contains("arms of one diagram"));
        assert!(refused(Limits { work: 3, ..Limits::default() }).contains("pairs of entry and peer group"));
    }
}
