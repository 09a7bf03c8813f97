//! Checks of a finished function, and its figures.

use std::collections::HashMap;
use std::ops::Range;

use super::{AsmError, Role, STACK_BYTES, registers};
use crate::insn::{AluOp, Imm64, Insn, IsaLevel, Reg, Size, Src, Width};

/// Figures and blemishes of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lint {
    /// Length in slots of 8 bytes.
    pub slots: usize,
    /// Slots that control never reaches; the verifier refuses a program that has any (unreachable insn).
    pub unreachable: Vec<Range<usize>>,
    /// Registers that are read though nothing was written to them, or though a call has clobbered them, on some path
    /// through the code, whatever the values that it branches on; the verifier refuses each that it can get to (`!read_ok`).
    pub unset_reads: Vec<UnsetRead>,
    /// How deep the stack is used, in bytes: by direct accesses, and by addresses formed as `rX = r10; rX += -n`.
    pub stack_bytes: u16,
    /// The lowest level of the instruction set that has all its instructions.
    pub isa: IsaLevel,
    /// The longest span of a 16-bit jump, in slots.
    pub longest_short_jump: usize,
}

/// A read of a register that holds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnsetRead {
    /// The slot of the instruction that reads.
    pub slot: usize,
    /// What it reads.
    pub reg: Reg,
    /// Whether a call lost it (`R1` to `R5`, and `R0` to a helper without a result); otherwise nothing was ever written to it.
    pub after_call: bool,
}

/// Where control goes.
pub(super) struct Flow<'a> {
    pub(super) insns: &'a [Insn],
    /// The slot of each instruction.
    pub(super) starts: Vec<usize>,
    index_of: HashMap<usize, usize>,
}

impl<'a> Flow<'a> {
    fn new(insns: &'a [Insn]) -> Self {
        let mut starts = Vec::with_capacity(insns.len());
        let mut slot = 0;
        for insn in insns {
            starts.push(slot);
            slot += insn.slots();
        }
        let index_of = starts.iter().enumerate().map(|(index, slot)| (*slot, index)).collect();
        Self { insns, starts, index_of }
    }

    /// The instructions, by index, that may come after one.
    pub(super) fn successors(&self, index: usize) -> impl Iterator<Item = usize> {
        let target = |off: i64| {
            let slot = usize::try_from(self.starts[index] as i64 + 1 + off).ok()?;
            self.index_of.get(&slot).copied()
        };
        let next = (index + 1 < self.insns.len()).then_some(index + 1);
        let both = match self.insns[index] {
            Insn::Exit => [None, None],
            Insn::Jump { off } => [target(off.into()), None],
            Insn::JumpLong { off } => [target(off.into()), None],
            Insn::JumpIf { off, .. } => [next, target(off.into())],
            _ => [next, None],
        };
        both.into_iter().flatten()
    }
}

pub(super) fn lint(insns: &[Insn], role: Role) -> Lint {
    let flow = Flow::new(insns);
    let slots = insns.iter().map(Insn::slots).sum();

    let mut reached = vec![false; insns.len()];
    let mut work = vec![0];
    while let Some(index) = work.pop() {
        let Some(seen) = reached.get_mut(index) else { continue };
        if !std::mem::replace(seen, true) {
            work.extend(flow.successors(index));
        }
    }
    let starts = &flow.starts;
    let mut unreachable: Vec<Range<usize>> = Vec::new();
    for (index, _) in reached.iter().enumerate().filter(|(_, reached)| !**reached) {
        let end = starts[index] + insns[index].slots();
        match unreachable.last_mut() {
            Some(last) if last.end == starts[index] => last.end = end,
            _ => unreachable.push(starts[index]..end),
        }
    }

    Lint {
        slots,
        unreachable,
        unset_reads: registers::unset_reads(&flow, role),
        stack_bytes: stack_bytes(insns),
        isa: insns.iter().map(Insn::isa_level).max().unwrap_or(IsaLevel::V1),
        longest_short_jump: insns
            .iter()
            .map(|insn| match insn {
                Insn::Jump { off } | Insn::JumpIf { off, .. } => usize::from(off.unsigned_abs()),
                _ => 0,
            })
            .max()
            .unwrap_or(0),
    }
}

fn stack_bytes(insns: &[Insn]) -> u16 {
    let direct = insns.iter().filter_map(|insn| frame_access(insn).map(|(off, _)| off));
    let formed = insns
        .windows(2)
        .filter_map(|pair| formed_address(&[pair[0], pair[1]]))
        .filter_map(|off| i16::try_from(off).ok());
    direct.chain(formed).filter(|off| *off < 0).map(i16::unsigned_abs).max().unwrap_or(0)
}

/// Offset and size of an access by the frame pointer itself.
fn frame_access(insn: &Insn) -> Option<(i16, Size)> {
    match *insn {
        Insn::Load { size, base: Reg::R10, off, .. }
        | Insn::LoadSx { size, base: Reg::R10, off, .. }
        | Insn::Store { size, base: Reg::R10, off, .. }
        | Insn::Atomic { size, base: Reg::R10, off, .. } => Some((off, size)),
        _ => None,
    }
}

/// The offset of an address that two instructions form as `rX = r10; rX += n`.
fn formed_address(pair: &[Insn; 2]) -> Option<i32> {
    match *pair {
        [
            Insn::Alu { width: Width::W64, op: AluOp::Mov, dst, src: Src::Reg(Reg::R10) },
            Insn::Alu { width: Width::W64, op: AluOp::Add, dst: same, src: Src::Imm(imm) },
        ] if dst == same => Some(imm),
        _ => None,
    }
}

/// Refuses what no kernel takes, and what is above the level.
pub(super) fn check(function: &str, level: IsaLevel, insns: &[Insn]) -> Result<(), AsmError> {
    let function = || function.to_owned();
    let mut slot = 0;
    for (at, insn) in insns.iter().enumerate() {
        let insn = *insn;
        if insn.writes() == Some(Reg::R10) {
            return Err(AsmError::WritesFramePointer { function: function(), slot, insn });
        }
        if let Some(reason) = malformed(&insn) {
            return Err(AsmError::NoSuchInsn { function: function(), slot, insn, reason });
        }
        if let Some((off, size)) = frame_access(&insn)
            && (off < -STACK_BYTES || i32::from(off) + size.bytes() as i32 > 0)
        {
            return Err(AsmError::OutsideStack { function: function(), slot, insn });
        }
        let needs = insn.isa_level();
        if needs > level {
            return Err(AsmError::IsaLevel { function: function(), slot, insn, needs, level });
        }
        if let Some([_, next]) = insns.get(at..at + 2)
            && formed_address(&[insn, *next]).is_some_and(|off| !(-i32::from(STACK_BYTES)..=0).contains(&off))
        {
            return Err(AsmError::OutsideStack { function: function(), slot: slot + insn.slots(), insn: *next });
        }
        slot += insn.slots();
    }
    match insns.last() {
        Some(Insn::Exit | Insn::Jump { .. } | Insn::JumpLong { .. }) => Ok(()),
        _ => Err(AsmError::FallsOffEnd { function: function() }),
    }
}

fn malformed(insn: &Insn) -> Option<&'static str> {
    match *insn {
        Insn::Atomic { size: Size::B | Size::H, .. } => Some("atomics have 4 or 8 bytes"),
        Insn::LoadSx { size: Size::Dw, .. } => Some("8 bytes have nothing to extend; use a plain load"),
        Insn::MovSx { from: Size::Dw, .. } | Insn::MovSx { width: Width::W32, from: Size::W, .. } => {
            Some("nothing to extend; use a plain move")
        }
        Insn::Alu { op: AluOp::Div | AluOp::Mod | AluOp::Sdiv | AluOp::Smod, src: Src::Imm(0), .. } => {
            Some("the verifier refuses division by a constant zero")
        }
        Insn::Alu { width, op: AluOp::Lsh | AluOp::Rsh | AluOp::Arsh, src: Src::Imm(by), .. }
            if !(0..if width == Width::W64 { 64 } else { 32 }).contains(&by) =>
        {
            Some("the verifier refuses to shift by a constant of the width or more")
        }
        Insn::LoadImm64 { value: Imm64::MapValue { fd, .. }, .. } if fd < 0 => Some("no map has a negative number"),
        _ => None,
    }
}
