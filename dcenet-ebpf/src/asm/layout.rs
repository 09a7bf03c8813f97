//! From items to instructions: where every label lies and how every jump gets there.

use std::collections::BTreeSet;

use super::{Asm, AsmError, Item, Label};
use crate::insn::{Cond, Insn, IsaLevel, Reg, Src, Width};

/// Instructions, and which of them stand for a name.
#[derive(Debug, Default)]
pub(super) struct Code {
    pub(super) insns: Vec<Insn>,
    pub(super) named: Vec<(usize, u32)>,
    /// The first instruction and number of each part.
    pub(super) marks: Vec<(usize, u32)>,
}

/// The slots of an item; `long`: its jump in the `gotol` form.
pub(super) fn slots(item: &Item, long: bool) -> usize {
    match item {
        Item::Bind(_) | Item::Mark(_) => 0,
        Item::Insn(insn) | Item::Named(insn, _) => insn.slots(),
        Item::JumpIf { cond, .. } if long => 2 + usize::from(cond.inverse().is_none()),
        Item::Jump(_) | Item::JumpIf { .. } => 1,
    }
}

pub(super) fn layout(asm: &Asm) -> Result<Code, AsmError> {
    let uses = label_uses(asm)?;
    if asm.isa >= IsaLevel::V4 { Ok(with_long_jumps(asm)) } else { Islands::new(asm, uses).run() }
}

/// The last item that jumps to each label, having checked that every label used is bound, and once.
fn label_uses(asm: &Asm) -> Result<Vec<Option<usize>>, AsmError> {
    let mut bound = vec![false; asm.labels as usize];
    let mut last = vec![None; asm.labels as usize];
    for (at, item) in asm.items.iter().enumerate() {
        let (Item::Bind(label) | Item::Jump(label) | Item::JumpIf { label, .. }) = *item else { continue };
        if label.0 >= asm.labels {
            return Err(AsmError::ForeignLabel { function: asm.name.clone(), label });
        }
        if !matches!(item, Item::Bind(_)) {
            last[label.0 as usize] = Some(at);
        } else if std::mem::replace(&mut bound[label.0 as usize], true) {
            return Err(AsmError::LabelBoundTwice { function: asm.name.clone(), label });
        }
    }
    match last.iter().zip(&bound).position(|(used, bound)| used.is_some() && !bound) {
        Some(label) => Err(AsmError::UnboundLabel { function: asm.name.clone(), label: Label(label as u32) }),
        None => Ok(last),
    }
}

/// Level 4: jumps start short and become long until nothing changes. Lengths only grow, so this ends.
fn with_long_jumps(asm: &Asm) -> Code {
    let mut long = vec![false; asm.items.len()];
    let mut labels = vec![0usize; asm.labels as usize];
    loop {
        let mut slot = 0;
        for (item, long) in asm.items.iter().zip(&long) {
            if let Item::Bind(label) = item {
                labels[label.0 as usize] = slot;
            }
            slot += slots(item, *long);
        }
        let mut changed = false;
        slot = 0;
        for (item, long) in asm.items.iter().zip(&mut long) {
            if let Item::Jump(label) | Item::JumpIf { label, .. } = item
                && !*long
                && labels[label.0 as usize].abs_diff(slot + 1) > asm.span
            {
                *long = true;
                changed = true;
            }
            slot += slots(item, *long);
        }
        if !changed {
            break;
        }
    }
    let mut code = Code::default();
    let mut slot = 0;
    for (item, long) in asm.items.iter().zip(long) {
        slot += slots(item, long);
        // From the slot after the item, which is where its last jump counts from.
        let distance = |label: Label| labels[label.0 as usize] as i64 - slot as i64;
        match *item {
            Item::Bind(_) => {}
            Item::Mark(mark) => code.marks.push((code.insns.len(), mark)),
            Item::Insn(insn) => code.insns.push(insn),
            Item::Named(insn, name) => {
                code.named.push((code.insns.len(), name));
                code.insns.push(insn);
            }
            Item::Jump(label) if long => code.insns.push(Insn::JumpLong { off: distance(label) as i32 }),
            Item::Jump(label) => code.insns.push(Insn::Jump { off: distance(label) as i16 }),
            Item::JumpIf { width, cond, dst, src, label } if long => {
                match cond.inverse() {
                    Some(cond) => code.insns.push(Insn::JumpIf { width, cond, dst, src, off: 1 }),
                    None => {
                        code.insns.push(Insn::JumpIf { width, cond, dst, src, off: 1 });
                        code.insns.push(Insn::Jump { off: 1 });
                    }
                }
                code.insns.push(Insn::JumpLong { off: distance(label) as i32 });
            }
            Item::JumpIf { width, cond, dst, src, label } => {
                code.insns.push(Insn::JumpIf { width, cond, dst, src, off: distance(label) as i16 });
            }
        }
    }
    code
}

/// Below level 4: one pass that carries jumps under way. Before the oldest of them gets out of reach an island is
/// written: a jump past it where control comes from above, and one jump for each label, in which jumps of before end and
/// a new one begins. A label that is jumped back to gets a relay in the same way.
struct Islands<'a> {
    asm: &'a Asm,
    /// The last item that jumps to each label.
    uses: Vec<Option<usize>>,
    code: Code,
    slot: usize,
    /// Where a label was bound last.
    bound: Option<usize>,
    labels: Vec<State>,
    /// Labels jumped to and not bound yet, by the slot of the oldest jump.
    pending: BTreeSet<(usize, u32)>,
    /// Labels bound that are jumped to further on, by the slot of the label or its newest relay.
    behind: BTreeSet<(usize, u32)>,
}

#[derive(Debug, Clone, Default)]
struct State {
    /// The label's slot, or that of its newest relay.
    place: Option<usize>,
    /// Jumps to it under way: index of the instruction, slot.
    jumps: Vec<(usize, usize)>,
}

impl<'a> Islands<'a> {
    fn new(asm: &'a Asm, uses: Vec<Option<usize>>) -> Self {
        Self {
            asm,
            uses,
            code: Code::default(),
            slot: 0,
            bound: None,
            labels: vec![State::default(); asm.labels as usize],
            pending: BTreeSet::new(),
            behind: BTreeSet::new(),
        }
    }

    fn run(mut self) -> Result<Code, AsmError> {
        for (at, item) in self.asm.items.iter().enumerate() {
            self.island_if_due(at, slots(item, false))?;
            match *item {
                Item::Bind(label) => self.bind(at, label),
                Item::Mark(mark) => self.code.marks.push((self.code.insns.len(), mark)),
                Item::Insn(insn) => self.push(insn),
                Item::Named(insn, name) => {
                    self.code.named.push((self.code.insns.len(), name));
                    self.push(insn);
                }
                Item::Jump(label) => self.jump(Insn::Jump { off: 0 }, label),
                Item::JumpIf { width, cond, dst, src, label } => self.branch(width, cond, dst, src, label),
            }
        }
        Ok(self.code)
    }

    fn branch(&mut self, width: Width, cond: Cond, dst: Reg, src: Src, label: Label) {
        self.jump(Insn::JumpIf { width, cond, dst, src, off: 0 }, label);
    }

    fn push(&mut self, insn: Insn) {
        self.slot += insn.slots();
        self.code.insns.push(insn);
    }

    fn jump(&mut self, insn: Insn, label: Label) {
        let (index, slot) = (self.code.insns.len(), self.slot);
        self.push(insn);
        let state = &mut self.labels[label.0 as usize];
        match state.place {
            Some(place) => aim(&mut self.code.insns[index], slot, place),
            None => {
                if state.jumps.is_empty() {
                    self.pending.insert((slot, label.0));
                }
                state.jumps.push((index, slot));
            }
        }
    }

    /// Ends the jumps to a label that are under way at the present slot.
    fn land(&mut self, label: u32) {
        let here = self.slot;
        let jumps = std::mem::take(&mut self.labels[label as usize].jumps);
        if let Some((_, oldest)) = jumps.first() {
            self.pending.remove(&(*oldest, label));
        }
        for (index, slot) in jumps {
            aim(&mut self.code.insns[index], slot, here);
        }
    }

    fn bind(&mut self, at: usize, label: Label) {
        self.land(label.0);
        self.bound = Some(self.slot);
        self.labels[label.0 as usize].place = Some(self.slot);
        if self.uses[label.0 as usize].is_some_and(|last| last > at) {
            self.behind.insert((self.slot, label.0));
        }
    }

    fn island_if_due(&mut self, at: usize, next: usize) -> Result<(), AsmError> {
        let uses = &self.uses;
        let Some(oldest) =
            [self.pending.first(), self.behind.first()].into_iter().flatten().map(|(slot, _)| *slot).min()
        else {
            return Ok(());
        };
        // The island itself, the jump past it, and the next item with its own jump must still be in reach.
        let size = self.pending.len() + self.behind.len() + 2;
        if self.slot + next + size <= oldest + self.asm.span {
            return Ok(());
        }
        self.behind.retain(|(_, label)| uses[*label as usize].is_some_and(|last| last >= at));
        // Everything older than half a span moves on, so that islands are rare.
        let horizon = self.slot.saturating_sub(self.asm.span / 2);
        let forward: Vec<_> = self.pending.iter().take_while(|(slot, _)| *slot <= horizon).copied().collect();
        let backward: Vec<_> = self.behind.iter().take_while(|(slot, _)| *slot <= horizon).copied().collect();
        let entries = forward.len() + backward.len();
        let out_of_reach = [forward.first(), backward.first()]
            .into_iter()
            .flatten()
            .any(|(slot, _)| self.slot + 1 + entries > slot + i16::MAX as usize);
        if out_of_reach || size > self.asm.span / 2 {
            return Err(AsmError::JumpTooFar { function: self.asm.name.clone(), slot: self.slot, pending: size - 2 });
        }
        if entries == 0 {
            return Ok(());
        }
        // A label that was bound just here is entered by jumps, whatever stands above it.
        let falls_in =
            self.bound == Some(self.slot) || !matches!(self.code.insns.last(), Some(Insn::Exit | Insn::Jump { .. }));
        if falls_in {
            self.push(Insn::Jump { off: entries as i16 });
        }
        for (_, label) in forward {
            self.land(label);
            self.jump(Insn::Jump { off: 0 }, Label(label));
        }
        for (place, label) in backward {
            self.behind.remove(&(place, label));
            let relay = self.slot;
            self.jump(Insn::Jump { off: 0 }, Label(label));
            self.labels[label as usize].place = Some(relay);
            self.behind.insert((relay, label));
        }
        Ok(())
    }
}

/// Points a short jump at `slot` to `target`, which the callers have kept in reach.
fn aim(insn: &mut Insn, slot: usize, target: usize) {
    let distance = target as i64 - slot as i64 - 1;
    if let Insn::Jump { off } | Insn::JumpIf { off, .. } = insn {
        *off = distance as i16;
    }
}
