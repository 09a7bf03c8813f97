//! A diagram as code.
//!
//! Each switch becomes a balanced binary search, written where control first comes to it; whoever comes later jumps
//! there. Leaves are two instructions and are written again where the last copy is not near, so that no jump but those
//! to the two exits goes far. No comparison's outcome follows from those before it: code that the verifier proves dead
//! it removes piece by piece, in time quadratic in the size of the program.

use std::collections::HashMap;

use dcenet_ebpf::asm::{Asm, Label};
use dcenet_ebpf::insn::{Cond, Reg};

use crate::diagram::{Arm, Diagram, Field, Node, NodeId};
use crate::ir::Leaf;
use crate::model::Verdict;

/// The most arms of a diagram that is lowered to code; two to three instructions each.
///
/// Each program of an endpoint holds both classifiers, and the kernel's time to load it grows faster than its length.
/// At this size it is some tenths of a second, far from the million instructions that the verifier follows at most.
pub const MAX_CODE_ARMS: usize = 32_000;

/// How far back, in instructions, a leaf is reused.
const NEAR: usize = 2_000;

/// The registers of a classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The peer's local id on entry, 0 to 65,535.
    pub local: Reg,
    /// The protocol on entry, 0 to 255.
    pub protocol: Reg,
    /// The port or ICMP type and code on entry, 0 to 65,535.
    pub port: Reg,
    /// The id of the rule that decided, on exit.
    pub rule: Reg,
}

/// A wrong lowering, to prove that comparisons notice.
#[cfg(feature = "test-support")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoweringBug {
    /// An interval begins one later than it should.
    OffByOne,
    /// The two halves of a search are exchanged at its first comparison.
    Exchanged,
    /// Single values are compared by their lower eight bits only.
    Narrow,
}

/// Writes the code of a diagram; control enters at its start and leaves by the labels that `exit` gives.
pub(super) struct CodeWriter<'a> {
    diagram: &'a Diagram,
    frame: Frame,
    asm: &'a mut Asm,
    exit: &'a mut dyn FnMut(Verdict) -> Label,
    /// How many arms lead to each node.
    uses: Vec<u32>,
    /// Of switches that are written and that more than one arm leads to.
    written: Vec<Option<Label>>,
    /// Where a leaf was written last, and how many instructions were before it.
    leaves: HashMap<Leaf, (Label, usize)>,
    /// Instructions so far.
    slots: usize,
    #[cfg(feature = "test-support")]
    pub(super) bug: Option<LoweringBug>,
}

impl<'a> CodeWriter<'a> {
    pub(super) fn new(
        diagram: &'a Diagram,
        frame: Frame,
        asm: &'a mut Asm,
        exit: &'a mut dyn FnMut(Verdict) -> Label,
    ) -> Self {
        let mut uses = vec![0; diagram.nodes().len()];
        for node in diagram.nodes() {
            if let Node::Switch { arms, .. } = node {
                arms.iter().for_each(|arm| uses[arm.to.0 as usize] += 1);
            }
        }
        Self {
            diagram,
            frame,
            asm,
            exit,
            written: vec![None; uses.len()],
            uses,
            leaves: HashMap::new(),
            slots: 0,
            #[cfg(feature = "test-support")]
            bug: None,
        }
    }

    pub(super) fn write(mut self) {
        self.node(self.diagram.root(), None);
    }

    /// What is done at a node. `entry` is what was jumped to, and is bound here.
    fn node(&mut self, id: NodeId, entry: Option<Label>) {
        if let Some(label) = entry {
            self.asm.bind(label);
        }
        match self.diagram.node(id) {
            Node::Leaf(leaf) => {
                let label = match entry {
                    Some(label) => label,
                    None => {
                        let label = self.asm.label();
                        self.asm.bind(label);
                        label
                    }
                };
                self.leaves.insert(*leaf, (label, self.slots));
                let exit = (self.exit)(leaf.verdict);
                self.asm.mov32(self.frame.rule, leaf.rule.0.cast_signed()).jump(exit);
                self.slots += 2;
            }
            Node::Switch { field, arms } => {
                if let Some(label) = self.written[id.0 as usize] {
                    self.asm.jump(label);
                    self.slots += 1;
                    return;
                }
                if self.uses[id.0 as usize] > 1 {
                    let label = match entry {
                        Some(label) => label,
                        None => {
                            let label = self.asm.label();
                            self.asm.bind(label);
                            label
                        }
                    };
                    self.written[id.0 as usize] = Some(label);
                }
                let register = match field {
                    Field::Local => self.frame.local,
                    Field::Protocol => self.frame.protocol,
                    Field::Port => self.frame.port,
                };
                self.search(register, arms, None);
            }
        }
    }

    /// Finds the arm of a register's value, which is known to be in one of these.
    fn search(&mut self, register: Reg, arms: &[Arm], entry: Option<Label>) {
        if let [only] = arms {
            return self.node(only.to, entry);
        }
        if let Some(label) = entry {
            self.asm.bind(label);
        }
        if let Some((rest, singles)) = singles(arms) {
            let mut later = Vec::new();
            for arm in singles {
                let first = self.single(arm.first);
                later.extend(self.branch(Cond::Eq, register, first, arm.to).map(|label| (label, arm.to)));
            }
            self.node(rest, None);
            for (label, to) in later {
                self.node(to, Some(label));
            }
            return;
        }
        let (low, high) = arms.split_at(arms.len() / 2);
        let (low, high) = self.halves(low, high);
        let first = self.threshold(arms[arms.len() / 2].first);
        let label = match high {
            [only] => self.branch(Cond::Ge, register, first, only.to),
            _ => Some(self.jump_if(Cond::Ge, register, first)),
        };
        self.search(register, low, None);
        if let Some(label) = label {
            self.search(register, high, Some(label));
        }
    }

    /// Jumps to a node if it is written and near; otherwise to the label returned, where it is still to be written.
    fn branch(&mut self, cond: Cond, register: Reg, value: i32, to: NodeId) -> Option<Label> {
        let known = match self.diagram.node(to) {
            Node::Leaf(leaf) => self.leaves.get(leaf).filter(|(_, at)| at + NEAR > self.slots).map(|(label, _)| *label),
            Node::Switch { .. } => self.written[to.0 as usize],
        };
        match known {
            Some(label) => {
                self.asm.jump_if(cond, register, value, label);
                self.slots += 1;
                None
            }
            None => Some(self.jump_if(cond, register, value)),
        }
    }

    fn jump_if(&mut self, cond: Cond, register: Reg, value: i32) -> Label {
        let label = self.asm.label();
        self.asm.jump_if(cond, register, value, label);
        self.slots += 1;
        label
    }

    fn threshold(&self, first: u16) -> i32 {
        #[cfg(feature = "test-support")]
        if self.bug == Some(LoweringBug::OffByOne) {
            return i32::from(first) + 1;
        }
        i32::from(first)
    }

    fn single(&self, value: u16) -> i32 {
        #[cfg(feature = "test-support")]
        if self.bug == Some(LoweringBug::Narrow) {
            return i32::from(value & 0xff);
        }
        i32::from(value)
    }

    fn halves<'b>(&mut self, low: &'b [Arm], high: &'b [Arm]) -> (&'b [Arm], &'b [Arm]) {
        #[cfg(feature = "test-support")]
        if self.bug == Some(LoweringBug::Exchanged) {
            self.bug = None;
            return (high, low);
        }
        (low, high)
    }
}

/// Arms of which every second one is a single value between intervals that lead to one node: that node, and the single
/// values. Two comparisons find one of two values, as a search would.
fn singles(arms: &[Arm]) -> Option<(NodeId, Vec<Arm>)> {
    if arms.len() != 3 && arms.len() != 5 {
        return None;
    }
    let rest = arms[0].to;
    let fits = arms
        .windows(3)
        .step_by(2)
        .all(|triple| triple[2].to == rest && u32::from(triple[2].first) == u32::from(triple[1].first) + 1);
    fits.then(|| (rest, arms.iter().skip(1).step_by(2).copied().collect()))
}
