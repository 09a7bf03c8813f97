//! Which registers hold something at every instruction.

use super::Role;
use super::lint::{Flow, UnsetRead};
use crate::insn::{AluOp, AtomicOp, Helper, Insn, Reg, Src};

/// A set of registers, a bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Set(u16);

impl Set {
    const NONE: Self = Self(0);
    /// `R1` to `R5`.
    const ARGUMENTS: Self = Self(0x3e);

    const fn of(reg: Reg) -> Self {
        Self(1 << reg.index())
    }

    /// The first arguments.
    const fn arguments(count: u8) -> Self {
        Self(((1 << count) - 1) << 1)
    }

    fn with_src(self, src: Src) -> Self {
        match src {
            Src::Reg(reg) => self.and(Self::of(reg)),
            Src::Imm(_) => self,
        }
    }

    const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    fn registers(self) -> impl Iterator<Item = Reg> {
        Reg::ALL.into_iter().filter(move |reg| self.0 >> reg.index() & 1 == 1)
    }
}

/// What is known in front of an instruction, whatever way control came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    /// Written on every way.
    set: Set,
    /// Lost to a call on some way.
    lost: Set,
}

impl Known {
    fn joined(self, other: Self) -> Self {
        Self { set: self.set.both(other.set), lost: self.lost.and(other.lost) }
    }
}

/// Every read of a register that is not written on every way to it, by slot.
pub(super) fn unset_reads(flow: &Flow<'_>, role: Role) -> Vec<UnsetRead> {
    if flow.insns.is_empty() {
        return Vec::new();
    }
    let arguments = match role {
        Role::Program(_) => Set::arguments(1),
        // How many its callers give it only they know.
        Role::Subprogram => Set::ARGUMENTS,
        Role::Global { arguments } => Set::arguments(arguments),
    };
    let mut before: Vec<Option<Known>> = vec![None; flow.insns.len()];
    let begin = Known { set: arguments.and(Set::of(Reg::R10)), lost: Set::NONE };
    before[0] = Some(begin);
    let mut work = vec![0];
    // A set only shrinks and what is lost only grows, so this ends.
    while let Some(index) = work.pop() {
        let Some(known) = before[index] else { continue };
        let after = step(&flow.insns[index], known);
        for next in flow.successors(index) {
            let joined = before[next].map_or(after, |known| known.joined(after));
            if before[next] != Some(joined) {
                before[next] = Some(joined);
                work.push(next);
            }
        }
    }
    let mut found = Vec::new();
    for (index, (insn, known)) in flow.insns.iter().zip(before).enumerate() {
        let Some(known) = known else { continue };
        let unset = reads(insn, role).without(known.set);
        found.extend(unset.registers().map(|reg| UnsetRead {
            slot: flow.starts[index],
            reg,
            after_call: known.lost.both(Set::of(reg)) != Set::NONE,
        }));
    }
    found
}

fn step(insn: &Insn, known: Known) -> Known {
    let (mut set, mut lost) = (known.set, known.lost);
    if matches!(insn, Insn::Call { .. } | Insn::CallLocal { .. }) {
        lost = lost.and(Set::ARGUMENTS.both(set));
        set = set.without(Set::ARGUMENTS);
    }
    // Neither these nor a tail call that comes back have a result.
    let written = match insn {
        Insn::Call { helper: Helper::TailCall | Helper::RingbufSubmit | Helper::RingbufDiscard } => {
            lost = lost.and(Set::of(Reg::R0).both(set));
            set = set.without(Set::of(Reg::R0));
            Set::NONE
        }
        _ => insn.writes().map_or(Set::NONE, Set::of),
    };
    Known { set: set.and(written), lost: lost.without(written) }
}

/// What an instruction reads. Of a local call nothing: how many arguments the callee wants stands there.
fn reads(insn: &Insn, role: Role) -> Set {
    match *insn {
        Insn::Alu { op: AluOp::Mov, src, .. } => Set::NONE.with_src(src),
        Insn::Alu { dst, src, .. } | Insn::JumpIf { dst, src, .. } => Set::of(dst).with_src(src),
        Insn::Neg { dst, .. } | Insn::Swap { dst, .. } => Set::of(dst),
        Insn::MovSx { src, .. } => Set::of(src),
        Insn::Load { base, .. } | Insn::LoadSx { base, .. } => Set::of(base),
        Insn::Store { base, src, .. } => Set::of(base).with_src(src),
        Insn::Atomic { op: AtomicOp::Cmpxchg, base, src, .. } => Set::of(base).and(Set::of(src)).and(Set::of(Reg::R0)),
        Insn::Atomic { base, src, .. } => Set::of(base).and(Set::of(src)),
        Insn::Call { helper } => Set::arguments(helper.arguments()),
        // A subprogram may return nothing, if its callers do not look.
        Insn::Exit if role == Role::Subprogram => Set::NONE,
        Insn::Exit => Set::of(Reg::R0),
        Insn::LoadImm64 { .. } | Insn::Jump { .. } | Insn::JumpLong { .. } | Insn::CallLocal { .. } => Set::NONE,
    }
}
