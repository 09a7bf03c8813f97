//! An assembler: write a function instruction by instruction, with labels, maps and functions by name.
//!
//! [`Asm`] takes instructions in order, [`Asm::finish`] resolves labels and checks the whole. Errors wait until then, so
//! that calls chain. The result, a [`Function`], goes into an [`Object`](crate::object::Object), which becomes ELF for a
//! loader, or a [`Program`](crate::object::Program) for the [VM](crate::vm).
//!
//! # Far jumps
//! A jump holds a 16-bit offset, and the verifier lengthens jumps when it rewrites what lies under them (inlined map
//! lookups, context accesses): a program that just fits is refused with ERANGE. A jump over more than [`SAFE_SPAN`]
//! slots is therefore written in another way: at ISA v4 as `gotol`, or an inverted branch over a `gotol`; below, by
//! islands of jumps that the code passes by, chained as often as needed.
//!
//! # Examples
//! See the crate's documentation for a whole program.

mod layout;
mod lint;
mod registers;

use std::collections::HashMap;

use crate::insn::{AluOp, AtomicOp, Cond, Helper, Imm64, Insn, IsaLevel, Order, Reg, Size, Src, SwapWidth, Width};
use crate::object::ProgramKind;

pub use lint::{Lint, UnsetRead};

/// The longest span of a short jump, in slots: a third of what 16 bits reach, as the verifier may lengthen it.
pub const SAFE_SPAN: usize = 10_900;

/// The size of a function's stack frame in bytes (`MAX_BPF_STACK`, `include/linux/filter.h`).
pub const STACK_BYTES: i16 = 512;

/// A place in a function, for jumps. It belongs to the [`Asm`] that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(u32);

/// Whether the kernel enters a function, or only other functions call it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Entered by the kernel with the context in `R1`.
    Program(ProgramKind),
    /// Called by functions of the same object, with up to five arguments in `R1` to `R5`.
    Subprogram,
    /// As a subprogram, with so many arguments, all of them numbers, and a number as its result. The verifier follows it
    /// once, for any arguments, and not once for each state at each call (Linux 5.6).
    Global {
        /// How many arguments it takes, at most five.
        arguments: u8,
    },
}

/// What an instruction refers to by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Symbol {
    /// A map of the object, referred to by a 64-bit immediate load.
    Map(String),
    /// A function of the object, referred to by a local call or a 64-bit immediate load.
    Function(String),
}

/// A name that stands for a value in one instruction until the object is linked or loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Index into [`Function::insns`].
    pub insn: usize,
    /// What is meant.
    pub symbol: Symbol,
}

/// Where a part of a function begins, and what its writer calls it; see [`Asm::mark`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Index into [`Function::insns`] of the part's first instruction.
    pub insn: usize,
    /// The part's name, in one line.
    pub text: String,
}

/// An assembled function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    name: String,
    role: Role,
    insns: Vec<Insn>,
    references: Vec<Reference>,
    marks: Vec<Mark>,
}

impl Function {
    /// The function's name: the program's name for the loader and for `bpftool`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is a program or a subprogram.
    pub const fn role(&self) -> Role {
        self.role
    }

    /// Its instructions; those of [`Function::references`] are not resolved.
    pub fn insns(&self) -> &[Insn] {
        &self.insns
    }

    /// The names that its instructions refer to, in order.
    pub fn references(&self) -> &[Reference] {
        &self.references
    }

    /// The parts that its writer named, ascending; each goes on until the next begins.
    pub fn marks(&self) -> &[Mark] {
        &self.marks
    }

    /// Its length in slots of 8 bytes.
    pub fn slots(&self) -> usize {
        self.insns.iter().map(Insn::slots).sum()
    }

    /// What a reviewer wants to know of it; see [`Lint`].
    pub fn lint(&self) -> Lint {
        lint::lint(&self.insns, self.role)
    }
}

/// Why a function cannot be assembled. Slots count from the start of the function.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AsmError {
    /// A jump goes to a label that was never bound.
    #[error("function {function}: a jump goes to {label:?}, which is bound nowhere; call Asm::bind")]
    UnboundLabel {
        /// The function's name.
        function: String,
        /// The label.
        label: Label,
    },
    /// A label was bound twice.
    #[error("function {function}: {label:?} is bound twice; make a label per place")]
    LabelBoundTwice {
        /// The function's name.
        function: String,
        /// The label.
        label: Label,
    },
    /// A label that another assembler made.
    #[error("function {function}: {label:?} was made by another Asm")]
    ForeignLabel {
        /// The function's name.
        function: String,
        /// The label.
        label: Label,
    },
    /// An instruction writes the frame pointer.
    #[error("function {function}, slot {slot}: `{insn}` writes r10, the read-only frame pointer; copy it first")]
    WritesFramePointer {
        /// The function's name.
        function: String,
        /// Where.
        slot: usize,
        /// The instruction.
        insn: Insn,
    },
    /// An access outside the 512 bytes below the frame pointer.
    #[error("function {function}, slot {slot}: `{insn}` is outside the stack, r10-512 up to r10")]
    OutsideStack {
        /// The function's name.
        function: String,
        /// Where.
        slot: usize,
        /// The instruction.
        insn: Insn,
    },
    /// An operand that the instruction does not have, such as an atomic operation on one byte.
    #[error("function {function}, slot {slot}: `{insn}` does not exist: {reason}")]
    NoSuchInsn {
        /// The function's name.
        function: String,
        /// Where.
        slot: usize,
        /// The instruction.
        insn: Insn,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An instruction of a higher level than the assembler was told to keep to.
    #[error("function {function}, slot {slot}: `{insn}` needs ISA {needs:?}, but the level is {level:?}; see Asm::isa")]
    IsaLevel {
        /// The function's name.
        function: String,
        /// Where.
        slot: usize,
        /// The instruction.
        insn: Insn,
        /// What it needs.
        needs: IsaLevel,
        /// What is allowed.
        level: IsaLevel,
    },
    /// Control would run past the last instruction.
    #[error("function {function}: control runs past its end; end it with exit or a jump")]
    FallsOffEnd {
        /// The function's name.
        function: String,
    },
    /// More jumps are under way over one place than islands can carry; ISA v4 has no such limit.
    #[error(
        "function {function}, slot {slot}: {pending} far jumps cross here, more than islands carry; use ISA v4 or split"
    )]
    JumpTooFar {
        /// The function's name.
        function: String,
        /// Where.
        slot: usize,
        /// How many labels are jumped to over this place.
        pending: usize,
    },
    /// [`Asm::insn`] was given a jump or local call, whose distance only labels and names can keep right.
    #[error("function {function}: `{insn}` has a distance of its own; use a label or name")]
    RawDistance {
        /// The function's name.
        function: String,
        /// The instruction.
        insn: Insn,
    },
}

/// One thing written, in order.
#[derive(Debug, Clone, Copy)]
enum Item {
    Insn(Insn),
    /// The name, by its index, stands for a value in this instruction.
    Named(Insn, u32),
    Bind(Label),
    /// A part begins, by its index into [`Asm::marks`].
    Mark(u32),
    Jump(Label),
    JumpIf {
        width: Width,
        cond: Cond,
        dst: Reg,
        src: Src,
        label: Label,
    },
}

/// Assembles one function. Every method but [`Asm::label`] and [`Asm::finish`] returns the assembler, for chaining.
#[derive(Debug)]
pub struct Asm {
    name: String,
    role: Role,
    isa: IsaLevel,
    span: usize,
    items: Vec<Item>,
    labels: u32,
    names: Vec<Symbol>,
    name_ids: HashMap<Symbol, u32>,
    marks: Vec<String>,
    raw: Option<Insn>,
}

macro_rules! alu_methods {
    ($($(#[$doc:meta])* $wide:ident $narrow:ident $op:ident;)+) => {$(
        $(#[$doc])*
        pub fn $wide(&mut self, dst: Reg, src: impl Into<Src>) -> &mut Self {
            self.alu(Width::W64, AluOp::$op, dst, src)
        }

        #[doc = concat!("As [`Asm::", stringify!($wide), "`], on the lower 32 bits; the upper ones become zero.")]
        pub fn $narrow(&mut self, dst: Reg, src: impl Into<Src>) -> &mut Self {
            self.alu(Width::W32, AluOp::$op, dst, src)
        }
    )+};
}

impl Asm {
    /// Begins a program that the kernel enters.
    pub fn program(name: impl Into<String>, kind: ProgramKind) -> Self {
        Self::new(name.into(), Role::Program(kind))
    }

    /// Begins a function that others call by [`Asm::call_function`].
    pub fn subprogram(name: impl Into<String>) -> Self {
        Self::new(name.into(), Role::Subprogram)
    }

    /// Begins a function that others call by [`Asm::call_function`], and that the verifier looks at on its own; see
    /// [`Role::Global`]. More than five arguments count as five.
    pub fn global(name: impl Into<String>, arguments: u8) -> Self {
        Self::new(name.into(), Role::Global { arguments: arguments.min(5) })
    }

    fn new(name: String, role: Role) -> Self {
        Self {
            name,
            role,
            isa: IsaLevel::V3,
            span: SAFE_SPAN,
            items: Vec::new(),
            labels: 0,
            names: Vec::new(),
            name_ids: HashMap::new(),
            marks: Vec::new(),
            raw: None,
        }
    }

    /// Sets the level of the instruction set to keep to; [`IsaLevel::V3`] (Linux 5.12) unless told.
    pub fn isa(&mut self, level: IsaLevel) -> &mut Self {
        self.isa = level;
        self
    }

    /// Sets the longest span of a short jump in slots, [`SAFE_SPAN`] unless told, at most 32,767. Tests of far jumps make
    /// it small.
    pub fn short_span(&mut self, slots: u16) -> &mut Self {
        self.span = usize::from(slots).min(i16::MAX as usize);
        self
    }

    /// Makes a label that is bound nowhere yet.
    pub fn label(&mut self) -> Label {
        let label = Label(self.labels);
        self.labels += 1;
        label
    }

    /// Binds a label to the place of the next instruction.
    pub fn bind(&mut self, label: Label) -> &mut Self {
        self.push(Item::Bind(label))
    }

    /// Names the part of the function that begins with the next instruction, until the next mark. The name goes into the
    /// object's line information: the verifier's log repeats it above the part's instructions, and so does
    /// `bpftool prog dump xlated linum`. Both show the function's name for the file, and the number of the part, from 1,
    /// for the line. Line breaks and other control characters become spaces.
    ///
    /// # Minimum kernel version
    /// 5.0; loaders leave line information out on older ones.
    pub fn mark(&mut self, text: impl AsRef<str>) -> &mut Self {
        let text = text.as_ref().replace(char::is_control, " ");
        let mark = self.marks.len() as u32;
        self.marks.push(text);
        self.push(Item::Mark(mark))
    }

    /// Writes an instruction that is no jump and no local call.
    pub fn insn(&mut self, insn: Insn) -> &mut Self {
        if matches!(
            insn,
            Insn::Jump { .. }
                | Insn::JumpLong { .. }
                | Insn::JumpIf { .. }
                | Insn::CallLocal { .. }
                | Insn::LoadImm64 { value: Imm64::Func(_), .. }
        ) {
            self.raw.get_or_insert(insn);
        }
        self.push(Item::Insn(insn))
    }

    /// `dst = dst op src` at a width.
    pub fn alu(&mut self, width: Width, op: AluOp, dst: Reg, src: impl Into<Src>) -> &mut Self {
        self.push(Item::Insn(Insn::Alu { width, op, dst, src: src.into() }))
    }

    alu_methods! {
        /// `dst = src`; a constant is sign-extended.
        mov mov32 Mov;
        /// `dst += src`.
        add add32 Add;
        /// `dst -= src`.
        sub sub32 Sub;
        /// `dst *= src`.
        mul mul32 Mul;
        /// `dst /= src`, unsigned; by zero gives zero.
        div div32 Div;
        /// `dst %= src`, unsigned; by zero leaves `dst`.
        rem rem32 Mod;
        /// `dst &= src`; a constant is sign-extended.
        and and32 And;
        /// `dst |= src`; a constant is sign-extended.
        or or32 Or;
        /// `dst ^= src`; a constant is sign-extended.
        xor xor32 Xor;
        /// `dst <<= src`.
        lsh lsh32 Lsh;
        /// `dst >>= src`, filling with zeros.
        rsh rsh32 Rsh;
        /// `dst >>= src`, filling with the sign.
        arsh arsh32 Arsh;
    }

    /// `dst = -dst`.
    pub fn neg(&mut self, dst: Reg) -> &mut Self {
        self.push(Item::Insn(Insn::Neg { width: Width::W64, dst }))
    }

    /// Network to host order and back: `dst` as a number of `bits` bits in big-endian order, upper bits cleared.
    pub fn be(&mut self, bits: SwapWidth, dst: Reg) -> &mut Self {
        self.push(Item::Insn(Insn::Swap { order: Order::Be, bits, dst }))
    }

    /// `dst = *(size *)(base + off)`, zero-extended.
    pub fn load(&mut self, size: Size, dst: Reg, base: Reg, off: i16) -> &mut Self {
        self.push(Item::Insn(Insn::Load { size, dst, base, off }))
    }

    /// `*(size *)(base + off) = src`.
    pub fn store(&mut self, size: Size, base: Reg, off: i16, src: impl Into<Src>) -> &mut Self {
        self.push(Item::Insn(Insn::Store { size, base, off, src: src.into() }))
    }

    /// Atomic operation on `*(size *)(base + off)`, `size` being `W` or `Dw`.
    pub fn atomic(&mut self, op: AtomicOp, size: Size, base: Reg, off: i16, src: Reg) -> &mut Self {
        self.push(Item::Insn(Insn::Atomic { op, size, base, off, src }))
    }

    /// `dst = value`, all 64 bits; two slots.
    pub fn load_imm64(&mut self, dst: Reg, value: u64) -> &mut Self {
        self.push(Item::Insn(Insn::LoadImm64 { dst, value: Imm64::Value(value) }))
    }

    /// `dst =` the map of this name, as helpers take it.
    pub fn load_map(&mut self, dst: Reg, map: impl Into<String>) -> &mut Self {
        let name = self.name_id(Symbol::Map(map.into()));
        self.push(Item::Named(Insn::LoadImm64 { dst, value: Imm64::MapFd(0) }, name))
    }

    /// `dst =` the address of the subprogram of this name, as [`Helper::Loop`] takes it.
    pub fn load_function(&mut self, dst: Reg, function: impl Into<String>) -> &mut Self {
        let name = self.name_id(Symbol::Function(function.into()));
        self.push(Item::Named(Insn::LoadImm64 { dst, value: Imm64::Func(0) }, name))
    }

    /// Jumps to a label, before or after this place.
    pub fn jump(&mut self, label: Label) -> &mut Self {
        self.push(Item::Jump(label))
    }

    /// Jumps if `dst cond src` on 64 bits; a constant is sign-extended.
    pub fn jump_if(&mut self, cond: Cond, dst: Reg, src: impl Into<Src>, label: Label) -> &mut Self {
        self.push(Item::JumpIf { width: Width::W64, cond, dst, src: src.into(), label })
    }

    /// Jumps if `dst cond src` on the lower 32 bits (ISA v3).
    pub fn jump_if32(&mut self, cond: Cond, dst: Reg, src: impl Into<Src>, label: Label) -> &mut Self {
        self.push(Item::JumpIf { width: Width::W32, cond, dst, src: src.into(), label })
    }

    /// Calls a helper. Afterwards `R0` holds its result, and `R1` to `R5` nothing.
    pub fn call(&mut self, helper: Helper) -> &mut Self {
        self.push(Item::Insn(Insn::Call { helper }))
    }

    /// Calls a subprogram of the same object. Afterwards `R0` holds its result, and `R1` to `R5` nothing.
    pub fn call_function(&mut self, function: impl Into<String>) -> &mut Self {
        let name = self.name_id(Symbol::Function(function.into()));
        self.push(Item::Named(Insn::CallLocal { off: -1 }, name))
    }

    /// Returns `R0`.
    pub fn exit(&mut self) -> &mut Self {
        self.push(Item::Insn(Insn::Exit))
    }

    /// Returns a constant: a move to `R0` and an exit.
    pub fn ret(&mut self, value: i32) -> &mut Self {
        self.mov(Reg::R0, value).exit()
    }

    /// How many slots the code has so far, far jumps counted as short ones.
    pub fn len(&self) -> usize {
        self.items.iter().map(|item| layout::slots(item, false)).sum()
    }

    /// Whether nothing is written yet.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Resolves labels, chooses the form of every jump, and checks the function.
    ///
    /// # Errors
    /// See [`AsmError`].
    pub fn finish(self) -> Result<Function, AsmError> {
        if let Some(insn) = self.raw {
            return Err(AsmError::RawDistance { function: self.name, insn });
        }
        let code = layout::layout(&self)?;
        lint::check(&self.name, self.isa, &code.insns)?;
        let references = code
            .named
            .into_iter()
            .map(|(insn, name)| Reference { insn, symbol: self.names[name as usize].clone() })
            .collect();
        let end = code.insns.len();
        let mut marks: Vec<Mark> = Vec::new();
        for (insn, mark) in code.marks.into_iter().filter(|(insn, _)| *insn < end) {
            // An empty part has no instruction to stand above.
            if marks.last().is_some_and(|last| last.insn == insn) {
                marks.pop();
            }
            marks.push(Mark { insn, text: self.marks[mark as usize].clone() });
        }
        Ok(Function { name: self.name, role: self.role, insns: code.insns, references, marks })
    }

    fn push(&mut self, item: Item) -> &mut Self {
        self.items.push(item);
        self
    }

    fn name_id(&mut self, symbol: Symbol) -> u32 {
        if let Some(id) = self.name_ids.get(&symbol) {
            return *id;
        }
        let id = self.names.len() as u32;
        self.names.push(symbol.clone());
        self.name_ids.insert(symbol, id);
        id
    }
}
