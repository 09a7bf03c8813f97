//! Instructions of eBPF, levels v1 to v4, as types.
//!
//! [`Insn`] is one instruction; [`Insn::encode`] gives the kernel's 8-byte form (`struct bpf_insn`), [`decode`] reads it
//! back, and `Display` prints it as the verifier does; [`disassemble`] makes a listing, which [`parse`] reads back. An instruction takes one slot of 8 bytes, a 64-bit immediate load
//! two; jump offsets count slots from the slot after the jump.
//!
//! The kernel's `Documentation/bpf/standardization/instruction-set.rst` (RFC 9669) defines meaning and encoding.

mod decode;
mod helper;
mod parse;
mod text;

pub use decode::{DecodeError, decode};
pub use helper::Helper;
pub use parse::{ParseError, ParseErrorKind, parse};
pub use text::disassemble;

/// A register. `R0` holds results, `R1` to `R5` arguments (lost by every call), `R6` to `R9` are kept over calls,
/// `R10` is the frame pointer and read-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names say all; the type explains the roles")]
pub enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
}

impl Reg {
    /// All registers in order.
    pub const ALL: [Self; 11] =
        [Self::R0, Self::R1, Self::R2, Self::R3, Self::R4, Self::R5, Self::R6, Self::R7, Self::R8, Self::R9, Self::R10];

    /// The register's number.
    pub const fn index(self) -> usize {
        self as usize
    }

    const fn from_nibble(nibble: u8) -> Option<Self> {
        if nibble < 11 { Some(Self::ALL[nibble as usize]) } else { None }
    }
}

/// The second operand: a register, or a constant that is sign-extended to the width of the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Src {
    /// A register.
    Reg(Reg),
    /// A constant.
    Imm(i32),
}

impl From<Reg> for Src {
    fn from(reg: Reg) -> Self {
        Self::Reg(reg)
    }
}

impl From<i32> for Src {
    fn from(imm: i32) -> Self {
        Self::Imm(imm)
    }
}

/// The width of an arithmetic operation or comparison. A 32-bit operation clears the upper half of its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Width {
    /// The lower 32 bits.
    W32,
    /// All 64 bits.
    W64,
}

/// The size of a memory access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Size {
    /// One byte.
    B,
    /// Two bytes.
    H,
    /// Four bytes.
    W,
    /// Eight bytes.
    Dw,
}

impl Size {
    /// The size in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::B => 1,
            Self::H => 2,
            Self::W => 4,
            Self::Dw => 8,
        }
    }

    const fn bits(self) -> u8 {
        match self {
            Self::W => 0x00,
            Self::H => 0x08,
            Self::B => 0x10,
            Self::Dw => 0x18,
        }
    }
}

/// An arithmetic operation with two operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AluOp {
    /// Wrapping addition.
    Add = 0x00,
    /// Wrapping subtraction.
    Sub = 0x10,
    /// Wrapping multiplication.
    Mul = 0x20,
    /// Unsigned division; by zero gives zero.
    Div = 0x30,
    /// Bitwise or.
    Or = 0x40,
    /// Bitwise and.
    And = 0x50,
    /// Shift left, by the count modulo the width.
    Lsh = 0x60,
    /// Logical shift right, by the count modulo the width.
    Rsh = 0x70,
    /// Unsigned remainder; by zero leaves the dividend.
    Mod = 0x90,
    /// Bitwise exclusive or.
    Xor = 0xa0,
    /// Move.
    Mov = 0xb0,
    /// Arithmetic shift right, by the count modulo the width.
    Arsh = 0xc0,
    /// Signed division, truncating; by zero gives zero; the least number by -1 gives itself (v4).
    Sdiv = 0x31,
    /// Signed remainder with the dividend's sign; by zero leaves the dividend (v4).
    Smod = 0x91,
}

impl AluOp {
    /// Every operation.
    pub const ALL: [Self; 14] = [
        Self::Add,
        Self::Sub,
        Self::Mul,
        Self::Div,
        Self::Or,
        Self::And,
        Self::Lsh,
        Self::Rsh,
        Self::Mod,
        Self::Xor,
        Self::Mov,
        Self::Arsh,
        Self::Sdiv,
        Self::Smod,
    ];
}

/// The condition of a jump, between the destination register (left) and the second operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cond {
    /// Equal.
    Eq = 0x10,
    /// Greater, unsigned.
    Gt = 0x20,
    /// Greater or equal, unsigned.
    Ge = 0x30,
    /// A common bit is set.
    Set = 0x40,
    /// Not equal.
    Ne = 0x50,
    /// Greater, signed.
    Sgt = 0x60,
    /// Greater or equal, signed.
    Sge = 0x70,
    /// Less, unsigned (v2).
    Lt = 0xa0,
    /// Less or equal, unsigned (v2).
    Le = 0xb0,
    /// Less, signed (v2).
    Slt = 0xc0,
    /// Less or equal, signed (v2).
    Sle = 0xd0,
}

impl Cond {
    /// Every condition.
    pub const ALL: [Self; 11] = [
        Self::Eq,
        Self::Gt,
        Self::Ge,
        Self::Set,
        Self::Ne,
        Self::Sgt,
        Self::Sge,
        Self::Lt,
        Self::Le,
        Self::Slt,
        Self::Sle,
    ];

    /// The condition that holds exactly where this one does not; [`Cond::Set`] has none.
    pub const fn inverse(self) -> Option<Self> {
        Some(match self {
            Self::Eq => Self::Ne,
            Self::Ne => Self::Eq,
            Self::Gt => Self::Le,
            Self::Le => Self::Gt,
            Self::Ge => Self::Lt,
            Self::Lt => Self::Ge,
            Self::Sgt => Self::Sle,
            Self::Sle => Self::Sgt,
            Self::Sge => Self::Slt,
            Self::Slt => Self::Sge,
            Self::Set => return None,
        })
    }
}

/// An atomic read-modify-write of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AtomicOp {
    /// Adds the source.
    Add = 0x00,
    /// Adds the source and loads the old value into it (v3).
    FetchAdd = 0x01,
    /// Ors the source (v3).
    Or = 0x40,
    /// Ors the source and loads the old value into it (v3).
    FetchOr = 0x41,
    /// Ands the source (v3).
    And = 0x50,
    /// Ands the source and loads the old value into it (v3).
    FetchAnd = 0x51,
    /// Exclusive-ors the source (v3).
    Xor = 0xa0,
    /// Exclusive-ors the source and loads the old value into it (v3).
    FetchXor = 0xa1,
    /// Stores the source and loads the old value into it (v3).
    Xchg = 0xe1,
    /// Stores the source if memory equals `R0`; loads the old value into `R0` in either case (v3).
    Cmpxchg = 0xf1,
}

impl AtomicOp {
    /// Every operation.
    pub const ALL: [Self; 10] = [
        Self::Add,
        Self::FetchAdd,
        Self::Or,
        Self::FetchOr,
        Self::And,
        Self::FetchAnd,
        Self::Xor,
        Self::FetchXor,
        Self::Xchg,
        Self::Cmpxchg,
    ];
}

/// The width of a byte swap or sign extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SwapWidth {
    /// 16 bits.
    W16,
    /// 32 bits.
    W32,
    /// 64 bits.
    W64,
}

impl SwapWidth {
    /// The number of bits.
    pub const fn bits(self) -> u8 {
        match self {
            Self::W16 => 16,
            Self::W32 => 32,
            Self::W64 => 64,
        }
    }
}

/// What a byte swap makes of a register. The upper bits are cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// From host to little-endian order, or back.
    Le,
    /// From host to big-endian (network) order, or back.
    Be,
    /// Reversed on any host (v4).
    Reverse,
}

/// The value of a 64-bit immediate load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Imm64 {
    /// A number.
    Value(u64),
    /// The map of a file descriptor (`BPF_PSEUDO_MAP_FD`). In a program of an [`Object`](crate::object::Object) that is
    /// not loaded yet it is the map's index there.
    MapFd(i32),
    /// The address of the first value of an array map plus an offset in bytes (`BPF_PSEUDO_MAP_VALUE`, Linux 5.2).
    MapValue {
        /// As in [`Imm64::MapFd`].
        fd: i32,
        /// Offset into the value.
        offset: u32,
    },
    /// The address of a function of the same program, by its distance in slots (`BPF_PSEUDO_FUNC`, Linux 5.13).
    Func(i32),
}

/// One instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the fields are operands; every variant says what it does with them")]
pub enum Insn {
    /// `dst = dst op src`.
    Alu { width: Width, op: AluOp, dst: Reg, src: Src },
    /// `dst = -dst`.
    Neg { width: Width, dst: Reg },
    /// `dst = src`, sign-extended from `from` to `width` (v4). `Dw` is no size of it, nor `W` at width 32.
    MovSx { width: Width, from: Size, dst: Reg, src: Reg },
    /// Byte swap.
    Swap { order: Order, bits: SwapWidth, dst: Reg },
    /// `dst = *(size *)(base + off)`, zero-extended.
    Load { size: Size, dst: Reg, base: Reg, off: i16 },
    /// `dst = *(signed size *)(base + off)`, sign-extended to 64 bits (v4). `Dw` is no size of it.
    LoadSx { size: Size, dst: Reg, base: Reg, off: i16 },
    /// `*(size *)(base + off) = src`.
    Store { size: Size, base: Reg, off: i16, src: Src },
    /// Atomic operation on `*(size *)(base + off)`; `size` is `W` or `Dw`.
    Atomic { op: AtomicOp, size: Size, base: Reg, off: i16, src: Reg },
    /// `dst = value`; two slots.
    LoadImm64 { dst: Reg, value: Imm64 },
    /// Jump.
    Jump { off: i16 },
    /// Jump with a 32-bit offset, `gotol` (v4, Linux 6.6).
    JumpLong { off: i32 },
    /// Jump if `dst cond src` (at width 32: v3).
    JumpIf { width: Width, cond: Cond, dst: Reg, src: Src, off: i16 },
    /// Call of a helper.
    Call { helper: Helper },
    /// Call of another function of the program.
    CallLocal { off: i32 },
    /// Return of `R0`.
    Exit,
}

/// A level of the instruction set, as compilers name them (`-mcpu`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IsaLevel {
    /// The first, Linux 3.18.
    V1,
    /// Adds "less than" jumps, Linux 4.14.
    V2,
    /// Adds 32-bit jumps (Linux 5.1) and fetching atomics (Linux 5.12).
    V3,
    /// Adds signed division, sign-extending moves and loads, `bswap` and `gotol`, Linux 6.6.
    V4,
}

/// The size of a slot in bytes.
pub const SLOT_BYTES: usize = 8;

impl Insn {
    /// How many slots of 8 bytes it takes: 2 for a 64-bit immediate load, else 1.
    pub const fn slots(&self) -> usize {
        match self {
            Self::LoadImm64 { .. } => 2,
            _ => 1,
        }
    }

    /// The lowest level that has it.
    pub const fn isa_level(&self) -> IsaLevel {
        match self {
            Self::Alu { op: AluOp::Sdiv | AluOp::Smod, .. }
            | Self::MovSx { .. }
            | Self::LoadSx { .. }
            | Self::JumpLong { .. }
            | Self::Swap { order: Order::Reverse, .. } => IsaLevel::V4,
            Self::JumpIf { width: Width::W32, .. } => IsaLevel::V3,
            Self::Atomic { op, .. } if !matches!(op, AtomicOp::Add) => IsaLevel::V3,
            Self::JumpIf { cond: Cond::Lt | Cond::Le | Cond::Slt | Cond::Sle, .. } => IsaLevel::V2,
            _ => IsaLevel::V1,
        }
    }

    /// The register that it writes by its own operands (calls write `R0` besides).
    pub const fn writes(&self) -> Option<Reg> {
        match *self {
            Self::Alu { dst, .. }
            | Self::Neg { dst, .. }
            | Self::MovSx { dst, .. }
            | Self::Swap { dst, .. }
            | Self::Load { dst, .. }
            | Self::LoadSx { dst, .. }
            | Self::LoadImm64 { dst, .. } => Some(dst),
            Self::Atomic { op: AtomicOp::Cmpxchg, .. } => Some(Reg::R0),
            Self::Atomic {
                op: AtomicOp::FetchAdd | AtomicOp::FetchOr | AtomicOp::FetchAnd | AtomicOp::FetchXor | AtomicOp::Xchg,
                src,
                ..
            } => Some(src),
            Self::Call { .. } | Self::CallLocal { .. } => Some(Reg::R0),
            _ => None,
        }
    }

    /// Appends the kernel's form, little-endian.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Alu { width, op, dst, src } => {
                let (flag, src, imm) = operand(src);
                slot(out, (op as u8 & 0xf0) | flag | alu_class(width), dst, src, i16::from(op as u8 & 0x0f), imm);
            }
            Self::Neg { width, dst } => slot(out, 0x80 | alu_class(width), dst, 0, 0, 0),
            Self::MovSx { width, from, dst, src } => {
                slot(out, 0xb8 | alu_class(width), dst, src as u8, from.bytes() as i16 * 8, 0);
            }
            Self::Swap { order, bits, dst } => {
                let code = match order {
                    Order::Le => 0xd4,
                    Order::Be => 0xdc,
                    Order::Reverse => 0xd7,
                };
                slot(out, code, dst, 0, 0, i32::from(bits.bits()));
            }
            Self::Load { size, dst, base, off } => slot(out, 0x61 | size.bits(), dst, base as u8, off, 0),
            Self::LoadSx { size, dst, base, off } => slot(out, 0x81 | size.bits(), dst, base as u8, off, 0),
            Self::Store { size, base, off, src: Src::Imm(imm) } => slot(out, 0x62 | size.bits(), base, 0, off, imm),
            Self::Store { size, base, off, src: Src::Reg(src) } => {
                slot(out, 0x63 | size.bits(), base, src as u8, off, 0);
            }
            Self::Atomic { op, size, base, off, src } => {
                slot(out, 0xc3 | size.bits(), base, src as u8, off, i32::from(op as u8));
            }
            Self::LoadImm64 { dst, value } => {
                let (src, low, high) = match value {
                    Imm64::Value(v) => (0, v as u32 as i32, (v >> 32) as u32 as i32),
                    Imm64::MapFd(fd) => (PSEUDO_MAP_FD, fd, 0),
                    Imm64::MapValue { fd, offset } => (PSEUDO_MAP_VALUE, fd, offset as i32),
                    Imm64::Func(distance) => (PSEUDO_FUNC, distance, 0),
                };
                slot(out, 0x18, dst, src, 0, low);
                slot(out, 0x00, Reg::R0, 0, 0, high);
            }
            Self::Jump { off } => slot(out, 0x05, Reg::R0, 0, off, 0),
            Self::JumpLong { off } => slot(out, 0x06, Reg::R0, 0, 0, off),
            Self::JumpIf { width, cond, dst, src, off } => {
                let (flag, src, imm) = operand(src);
                slot(out, cond as u8 | flag | jump_class(width), dst, src, off, imm);
            }
            Self::Call { helper } => slot(out, 0x85, Reg::R0, 0, 0, helper.id() as i32),
            Self::CallLocal { off } => slot(out, 0x85, Reg::R0, PSEUDO_CALL, 0, off),
            Self::Exit => slot(out, 0x95, Reg::R0, 0, 0, 0),
        }
    }
}

/// Encodes a whole program.
pub fn encode(insns: &[Insn]) -> Vec<u8> {
    let mut out = Vec::with_capacity(insns.len() * SLOT_BYTES);
    for insn in insns {
        insn.encode(&mut out);
    }
    out
}

fn slot(out: &mut Vec<u8>, code: u8, dst: Reg, src: u8, off: i16, imm: i32) {
    let [o0, o1] = off.to_le_bytes();
    let [i0, i1, i2, i3] = imm.to_le_bytes();
    out.extend_from_slice(&[code, dst as u8 | src << 4, o0, o1, i0, i1, i2, i3]);
}

const fn operand(src: Src) -> (u8, u8, i32) {
    match src {
        Src::Imm(imm) => (0x00, 0, imm),
        Src::Reg(reg) => (0x08, reg as u8, 0),
    }
}

const fn alu_class(width: Width) -> u8 {
    match width {
        Width::W32 => 0x04,
        Width::W64 => 0x07,
    }
}

const fn jump_class(width: Width) -> u8 {
    match width {
        Width::W32 => 0x06,
        Width::W64 => 0x05,
    }
}

const PSEUDO_CALL: u8 = 1;
const PSEUDO_MAP_FD: u8 = 1;
const PSEUDO_MAP_VALUE: u8 = 2;
const PSEUDO_FUNC: u8 = 4;
