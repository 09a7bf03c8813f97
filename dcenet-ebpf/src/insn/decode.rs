//! From bytes to instructions.

use super::{
    AluOp, AtomicOp, Cond, Helper, Imm64, Insn, Order, PSEUDO_CALL, PSEUDO_FUNC, PSEUDO_MAP_FD, PSEUDO_MAP_VALUE, Reg,
    SLOT_BYTES, Size, Src, SwapWidth, Width,
};

/// Bytes that are no instruction known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The length is no multiple of 8, or the second half of a 64-bit load is missing.
    #[error("slot {slot}: the code ends inside an instruction")]
    Truncated {
        /// Where, in slots of 8 bytes.
        slot: usize,
    },
    /// An operation code, or a reserved field that is not zero.
    #[error("slot {slot}: {bytes:02x?} is no instruction of ISA v1 to v4")]
    Invalid {
        /// Where, in slots of 8 bytes.
        slot: usize,
        /// The slot.
        bytes: [u8; SLOT_BYTES],
    },
    /// A helper that this crate does not name.
    #[error("slot {slot}: helper {id} is not named in dcenet_ebpf::insn::Helper")]
    UnknownHelper {
        /// Where, in slots of 8 bytes.
        slot: usize,
        /// The number in the instruction.
        id: u32,
    },
}

/// Reads a program in the kernel's form. Reserved fields must be zero, as the kernel demands.
///
/// # Errors
/// At the first slot that is no instruction; see [`DecodeError`].
pub fn decode(code: &[u8]) -> Result<Vec<Insn>, DecodeError> {
    let (slots, rest) = code.as_chunks::<SLOT_BYTES>();
    if !rest.is_empty() {
        return Err(DecodeError::Truncated { slot: slots.len() });
    }
    let mut insns = Vec::with_capacity(slots.len());
    let mut at = 0;
    while let Some(bytes) = slots.get(at) {
        let raw = Raw::new(*bytes);
        let insn = if raw.code == 0x18 {
            let second = slots.get(at + 1).ok_or(DecodeError::Truncated { slot: at })?;
            wide(raw, Raw::new(*second))
        } else if raw.code == 0x85 && raw.src == 0 {
            let id = raw.imm as u32;
            let helper = Helper::from_id(id).ok_or(DecodeError::UnknownHelper { slot: at, id })?;
            (raw.dst == 0 && raw.off == 0).then_some(Insn::Call { helper })
        } else {
            narrow(raw)
        };
        let insn = insn.ok_or(DecodeError::Invalid { slot: at, bytes: *bytes })?;
        at += insn.slots();
        insns.push(insn);
    }
    Ok(insns)
}

#[derive(Clone, Copy)]
struct Raw {
    code: u8,
    dst: u8,
    src: u8,
    off: i16,
    imm: i32,
}

impl Raw {
    fn new([code, regs, o0, o1, i0, i1, i2, i3]: [u8; SLOT_BYTES]) -> Self {
        Self {
            code,
            dst: regs & 0x0f,
            src: regs >> 4,
            off: i16::from_le_bytes([o0, o1]),
            imm: i32::from_le_bytes([i0, i1, i2, i3]),
        }
    }

    /// The second operand, where the one that is not used must be zero.
    fn operand(self) -> Option<Src> {
        if self.code & 0x08 == 0 {
            (self.src == 0).then_some(Src::Imm(self.imm))
        } else if self.imm == 0 {
            Reg::from_nibble(self.src).map(Src::Reg)
        } else {
            None
        }
    }
}

fn wide(first: Raw, second: Raw) -> Option<Insn> {
    let dst = Reg::from_nibble(first.dst)?;
    if first.off != 0 || second.code != 0 || second.dst != 0 || second.src != 0 || second.off != 0 {
        return None;
    }
    let value = match first.src {
        0 => Imm64::Value(u64::from(first.imm as u32) | u64::from(second.imm as u32) << 32),
        PSEUDO_MAP_FD if second.imm == 0 => Imm64::MapFd(first.imm),
        PSEUDO_MAP_VALUE => Imm64::MapValue { fd: first.imm, offset: second.imm as u32 },
        PSEUDO_FUNC if second.imm == 0 => Imm64::Func(first.imm),
        _ => return None,
    };
    Some(Insn::LoadImm64 { dst, value })
}

fn narrow(raw: Raw) -> Option<Insn> {
    match raw.code & 0x07 {
        0x04 => alu(raw, Width::W32),
        0x07 => alu(raw, Width::W64),
        0x05 => jump(raw, Width::W64),
        0x06 => jump(raw, Width::W32),
        _ => memory(raw),
    }
}

fn alu(raw: Raw, width: Width) -> Option<Insn> {
    let dst = Reg::from_nibble(raw.dst)?;
    match raw.code & 0xf0 {
        0x80 => {
            (raw.code & 0x08 == 0 && raw.src == 0 && raw.off == 0 && raw.imm == 0).then_some(Insn::Neg { width, dst })
        }
        0xd0 => {
            let bits = match raw.imm {
                16 => SwapWidth::W16,
                32 => SwapWidth::W32,
                64 => SwapWidth::W64,
                _ => return None,
            };
            let order = match raw.code {
                0xd4 => Order::Le,
                0xdc => Order::Be,
                0xd7 => Order::Reverse,
                _ => return None,
            };
            (raw.src == 0 && raw.off == 0).then_some(Insn::Swap { order, bits, dst })
        }
        0xb0 if raw.code & 0x08 != 0 && raw.off != 0 => {
            let from = match raw.off {
                8 => Size::B,
                16 => Size::H,
                32 if width == Width::W64 => Size::W,
                _ => return None,
            };
            (raw.imm == 0).then_some(Insn::MovSx { width, from, dst, src: Reg::from_nibble(raw.src)? })
        }
        code => {
            let wanted = code | u8::try_from(raw.off).ok().filter(|off| *off <= 1)?;
            let op = AluOp::ALL.into_iter().find(|op| *op as u8 == wanted)?;
            Some(Insn::Alu { width, op, dst, src: raw.operand()? })
        }
    }
}

fn jump(raw: Raw, width: Width) -> Option<Insn> {
    match raw.code {
        0x05 => (raw.dst == 0 && raw.src == 0 && raw.imm == 0).then_some(Insn::Jump { off: raw.off }),
        0x06 => (raw.dst == 0 && raw.src == 0 && raw.off == 0).then_some(Insn::JumpLong { off: raw.imm }),
        0x85 => (raw.src == PSEUDO_CALL && raw.dst == 0 && raw.off == 0).then_some(Insn::CallLocal { off: raw.imm }),
        0x95 => (raw.dst == 0 && raw.src == 0 && raw.off == 0 && raw.imm == 0).then_some(Insn::Exit),
        code => {
            let cond = Cond::ALL.into_iter().find(|cond| *cond as u8 == code & 0xf0)?;
            let dst = Reg::from_nibble(raw.dst)?;
            Some(Insn::JumpIf { width, cond, dst, src: raw.operand()?, off: raw.off })
        }
    }
}

fn memory(raw: Raw) -> Option<Insn> {
    let dst = Reg::from_nibble(raw.dst)?;
    let size = match raw.code & 0x18 {
        0x00 => Size::W,
        0x08 => Size::H,
        0x10 => Size::B,
        _ => Size::Dw,
    };
    let src = || Reg::from_nibble(raw.src);
    match raw.code & 0xe7 {
        0x61 if raw.imm == 0 => Some(Insn::Load { size, dst, base: src()?, off: raw.off }),
        0x81 if raw.imm == 0 && size != Size::Dw => Some(Insn::LoadSx { size, dst, base: src()?, off: raw.off }),
        0x62 if raw.src == 0 => Some(Insn::Store { size, base: dst, off: raw.off, src: Src::Imm(raw.imm) }),
        0x63 if raw.imm == 0 => Some(Insn::Store { size, base: dst, off: raw.off, src: Src::Reg(src()?) }),
        0xc3 if matches!(size, Size::W | Size::Dw) => {
            let op = AtomicOp::ALL.into_iter().find(|op| i32::from(*op as u8) == raw.imm)?;
            Some(Insn::Atomic { op, size, base: dst, off: raw.off, src: src()? })
        }
        _ => None,
    }
}
