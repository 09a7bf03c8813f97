//! A diagram as an array of nodes, and the loop that walks it.
//!
//! A node compares one field with a threshold and names where to go on below it and from it on: another node, or a
//! leaf. After the first node, which leads nowhere, come those of the local ids, one for each up to the last that the diagram
//! tells apart, so that the walk begins with what is known of the peer. The searches of the other switches are balanced as those of
//! [`code`](super::code) are, so that a walk takes at most [`STEPS`] nodes: 8 for the protocol, 16 for the port.

use dcenet_ebpf::asm::{Asm, Label};
use dcenet_ebpf::insn::{Cond, Helper, Reg::*, Size};

use super::TargetError;
use super::code::Frame;
use crate::diagram::{Arm, Diagram, Field, Node, NodeId};
use crate::ir::{Leaf, RuleId};
use crate::model::Verdict;

/// The most nodes of a table: 16 MiB.
pub const MAX_TABLE_NODES: usize = 1 << 20;

/// Bytes of a node.
pub(super) const NODE_BYTES: usize = 16;

/// The node of local id 0.
const FIRST: usize = 1;

/// The most nodes on a path.
const STEPS: i32 = 8 + 16;

// Offsets in a node.
/// u16: the first value that goes to `HIGH`.
const THRESHOLD: i16 = 0;
/// u16: where the field begins in the question, in bits.
const SHIFT: i16 = 2;
/// u32: where to go below the threshold.
const LOW: i16 = 4;
/// u32: where to go from the threshold on.
const HIGH: i16 = 8;

/// Marks a leaf in `LOW` and `HIGH`: the rest is the rule's id, and whether it allows.
const LEAF: u32 = 1 << 31;
const ALLOW: u32 = 1 << 30;

/// The nodes of a diagram whose rule ids fit, and the last local id that has a node of its own; all beyond share that one.
pub(super) fn nodes(diagram: &Diagram) -> Result<(Vec<u8>, u16), TargetError> {
    let mut table = Table { diagram, bytes: Vec::new(), entries: vec![None; diagram.nodes().len()] };
    let root = diagram.root();
    let whole = [Arm { first: 0, to: root }];
    let arms = match diagram.node(root) {
        Node::Switch { field: Field::Local, arms } => arms.as_slice(),
        Node::Switch { .. } | Node::Leaf(_) => &whole,
    };
    let last = arms.last().map_or(0, |arm| arm.first);
    table.bytes.resize((FIRST + usize::from(last) + 1) * NODE_BYTES, 0);
    for (at, arm) in arms.iter().enumerate() {
        let until = arms.get(at + 1).map_or(last, |next| next.first - 1);
        let entry = table.entry(arm.to)?;
        for local in arm.first..=until {
            table.begin(FIRST + usize::from(local), entry);
        }
    }
    Ok((table.bytes, last))
}

struct Table<'a> {
    diagram: &'a Diagram,
    bytes: Vec<u8>,
    /// By node of the diagram.
    entries: Vec<Option<u32>>,
}

impl Table<'_> {
    fn entry(&mut self, id: NodeId) -> Result<u32, TargetError> {
        if let Some(entry) = self.entries[id.0 as usize] {
            return Ok(entry);
        }
        let entry = match self.diagram.node(id) {
            Node::Leaf(leaf) => leaf_entry(leaf),
            Node::Switch { field, arms } => self.search(*field, arms)?,
        };
        self.entries[id.0 as usize] = Some(entry);
        Ok(entry)
    }

    fn search(&mut self, field: Field, arms: &[Arm]) -> Result<u32, TargetError> {
        if let [only] = arms {
            return self.entry(only.to);
        }
        let place = self.bytes.len() / NODE_BYTES;
        if place >= MAX_TABLE_NODES {
            let (found, limit) = (place + 1, MAX_TABLE_NODES);
            return Err(TargetError::ImplLimitExceeded { what: "nodes of one policy's table", found, limit });
        }
        self.bytes.resize(self.bytes.len() + NODE_BYTES, 0);
        let (low, high) = arms.split_at(arms.len() / 2);
        let threshold = high[0].first;
        let (low, high) = (self.search(field, low)?, self.search(field, high)?);
        self.set(place, field, threshold, low, high);
        Ok(place as u32)
    }

    /// Makes the node at a place do what an entry leads to.
    fn begin(&mut self, place: usize, entry: u32) {
        if entry & LEAF != 0 {
            self.set(place, Field::Protocol, 0, entry, entry);
        } else {
            let from = entry as usize * NODE_BYTES;
            self.bytes.copy_within(from..from + NODE_BYTES, place * NODE_BYTES);
        }
    }

    fn set(&mut self, place: usize, field: Field, threshold: u16, low: u32, high: u32) {
        let node = &mut self.bytes[place * NODE_BYTES..][..NODE_BYTES];
        node[THRESHOLD as usize..][..2].copy_from_slice(&threshold.to_ne_bytes());
        node[SHIFT as usize..][..2].copy_from_slice(&shift(field).to_ne_bytes());
        node[LOW as usize..][..4].copy_from_slice(&low.to_ne_bytes());
        node[HIGH as usize..][..4].copy_from_slice(&high.to_ne_bytes());
    }
}

fn leaf_entry(leaf: &Leaf) -> u32 {
    LEAF | leaf.rule.0 | if leaf.verdict == Verdict::Allow { ALLOW } else { 0 }
}

const fn shift(field: Field) -> u16 {
    match field {
        Field::Local => 0,
        Field::Protocol => 16,
        Field::Port => 32,
    }
}

/// Writes the walk over a table in a map. A walk that ends at no leaf (the map is not written yet, or not all of it) denies as
/// [`RuleId::ISOLATED`]: an array is zero at first, so that every node leads to the first, and that to itself until the steps
/// are used up.
///
/// Uses every register but `R6` and `R9`, and the first 16 bytes of the stack.
pub(super) fn walk(map: &str, last: u16, frame: Frame, asm: &mut Asm, exit: &mut dyn FnMut(Verdict) -> Label) {
    let (steps, index) = (-8, -16);
    let (begin, next, take, nowhere, leaf) = (asm.label(), asm.label(), asm.label(), asm.label(), asm.label());
    asm.mov(R7, frame.port)
        .lsh(R7, i32::from(shift(Field::Port)))
        .lsh(frame.protocol, i32::from(shift(Field::Protocol)))
        .or(R7, frame.protocol)
        .mov(R8, frame.local)
        .jump_if(Cond::Le, R8, i32::from(last), begin)
        .mov(R8, i32::from(last))
        .bind(begin)
        .add(R8, FIRST as i32)
        // From a register, as older verifiers lose sight of a constant that is stored as such.
        .mov(R4, STEPS)
        .store(Size::Dw, R10, steps, R4)
        .bind(next)
        .load(Size::Dw, R4, R10, steps)
        .jump_if(Cond::Eq, R4, 0, nowhere)
        .sub(R4, 1)
        .store(Size::Dw, R10, steps, R4)
        .store(Size::W, R10, index, R8)
        .load_map(R1, map)
        .mov(R2, R10)
        .add(R2, i32::from(index))
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, nowhere)
        .load(Size::H, R1, R0, SHIFT)
        .mov(R2, R7)
        .rsh(R2, R1)
        .and(R2, i32::from(u16::MAX))
        .load(Size::H, R1, R0, THRESHOLD)
        .load(Size::W, R8, R0, LOW)
        .jump_if(Cond::Lt, R2, R1, take)
        .load(Size::W, R8, R0, HIGH)
        .bind(take)
        .jump_if32(Cond::Slt, R8, 0, leaf)
        .jump(next)
        .bind(nowhere)
        .mov32(frame.rule, RuleId::ISOLATED.0.cast_signed())
        .jump(exit(Verdict::Deny))
        .bind(leaf)
        .mov(frame.rule, R8)
        .and(frame.rule, (ALLOW - 1).cast_signed())
        .jump_if(Cond::Set, R8, ALLOW.cast_signed(), exit(Verdict::Allow))
        .jump(exit(Verdict::Deny));
}
