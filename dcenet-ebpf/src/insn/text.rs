//! Disassembly in the verifier's style (`kernel/bpf/disasm.c`).

use std::fmt;

use super::{AluOp, AtomicOp, Cond, Imm64, Insn, Order, Reg, Size, Src, Width};

impl fmt::Display for Reg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.index())
    }
}

impl fmt::Display for Src {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reg(reg) => reg.fmt(f),
            Self::Imm(imm) => imm.fmt(f),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::B => "u8",
            Self::H => "u16",
            Self::W => "u32",
            Self::Dw => "u64",
        })
    }
}

impl fmt::Display for Insn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Alu { width, op, dst, src } => {
                write!(f, "{} {} {}", At(width, dst), alu_symbol(op), AtSrc(width, src))
            }
            Self::Neg { width, dst } => write!(f, "{0} = -{0}", At(width, dst)),
            Self::MovSx { width, from, dst, src } => {
                write!(f, "{} = (s{}){}", At(width, dst), from.bytes() * 8, At(width, src))
            }
            Self::Swap { order, bits, dst } => {
                let name = match order {
                    Order::Le => "le",
                    Order::Be => "be",
                    Order::Reverse => "bswap",
                };
                write!(f, "{dst} = {name}{} {dst}", bits.bits())
            }
            Self::Load { size, dst, base, off } => write!(f, "{dst} = *({size} *)({base} {off:+})"),
            Self::LoadSx { size, dst, base, off } => {
                write!(f, "{dst} = *(s{} *)({base} {off:+})", size.bytes() * 8)
            }
            Self::Store { size, base, off, src } => write!(f, "*({size} *)({base} {off:+}) = {src}"),
            Self::Atomic { op, size, base, off, src } => atomic(f, op, size, base, off, src),
            Self::LoadImm64 { dst, value } => match value {
                Imm64::Value(value) => write!(f, "{dst} = {value:#x} ll"),
                Imm64::MapFd(fd) => write!(f, "{dst} = map[{fd}]"),
                Imm64::MapValue { fd, offset } => write!(f, "{dst} = map[{fd}][0]+{offset}"),
                Imm64::Func(distance) => write!(f, "{dst} = func[{distance:+}]"),
            },
            Self::Jump { off } => write!(f, "goto {off:+}"),
            Self::JumpLong { off } => write!(f, "gotol {off:+}"),
            Self::JumpIf { width, cond, dst, src, off } => {
                write!(f, "if {} {} {} goto {off:+}", At(width, dst), cond_symbol(cond), AtSrc(width, src))
            }
            Self::Call { helper } => write!(f, "call {}#{}", helper.name().trim_start_matches("bpf_"), helper.id()),
            Self::CallLocal { off } => write!(f, "call pc{off:+}"),
            Self::Exit => f.write_str("exit"),
        }
    }
}

/// One line per instruction: slot, colon, text.
pub fn disassemble(insns: &[Insn]) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let mut slot = 0;
    for insn in insns {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{slot:4}: {insn}");
        slot += insn.slots();
    }
    text
}

/// A register at a width: `r1` or `w1`.
struct At(Width, Reg);

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.0 {
            Width::W32 => 'w',
            Width::W64 => 'r',
        };
        write!(f, "{letter}{}", self.1.index())
    }
}

struct AtSrc(Width, Src);

impl fmt::Display for AtSrc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            Src::Reg(reg) => At(self.0, reg).fmt(f),
            Src::Imm(imm) => imm.fmt(f),
        }
    }
}

fn atomic(f: &mut fmt::Formatter<'_>, op: AtomicOp, size: Size, base: Reg, off: i16, src: Reg) -> fmt::Result {
    let wide = if size == Size::Dw { "64" } else { "" };
    let place = format_args!("({size} *)({base} {off:+})").to_string();
    match op {
        AtomicOp::Add => write!(f, "lock *{place} += {src}"),
        AtomicOp::Or => write!(f, "lock *{place} |= {src}"),
        AtomicOp::And => write!(f, "lock *{place} &= {src}"),
        AtomicOp::Xor => write!(f, "lock *{place} ^= {src}"),
        AtomicOp::FetchAdd => write!(f, "{src} = atomic{wide}_fetch_add({place}, {src})"),
        AtomicOp::FetchOr => write!(f, "{src} = atomic{wide}_fetch_or({place}, {src})"),
        AtomicOp::FetchAnd => write!(f, "{src} = atomic{wide}_fetch_and({place}, {src})"),
        AtomicOp::FetchXor => write!(f, "{src} = atomic{wide}_fetch_xor({place}, {src})"),
        AtomicOp::Xchg => write!(f, "{src} = atomic{wide}_xchg({place}, {src})"),
        AtomicOp::Cmpxchg => write!(f, "r0 = atomic{wide}_cmpxchg({place}, r0, {src})"),
    }
}

const fn alu_symbol(op: AluOp) -> &'static str {
    match op {
        AluOp::Add => "+=",
        AluOp::Sub => "-=",
        AluOp::Mul => "*=",
        AluOp::Div => "/=",
        AluOp::Or => "|=",
        AluOp::And => "&=",
        AluOp::Lsh => "<<=",
        AluOp::Rsh => ">>=",
        AluOp::Mod => "%=",
        AluOp::Xor => "^=",
        AluOp::Mov => "=",
        AluOp::Arsh => "s>>=",
        AluOp::Sdiv => "s/=",
        AluOp::Smod => "s%=",
    }
}

const fn cond_symbol(cond: Cond) -> &'static str {
    match cond {
        Cond::Eq => "==",
        Cond::Gt => ">",
        Cond::Ge => ">=",
        Cond::Set => "&",
        Cond::Ne => "!=",
        Cond::Sgt => "s>",
        Cond::Sge => "s>=",
        Cond::Lt => "<",
        Cond::Le => "<=",
        Cond::Slt => "s<",
        Cond::Sle => "s<=",
    }
}
