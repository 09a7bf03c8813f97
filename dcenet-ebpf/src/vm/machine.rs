//! One run: registers, frames, and the meaning of every instruction.

use super::alu;
use super::maps::{Map, Maps};
use super::memory::Stack;
use super::packet::Packet;
use super::skb::CONTEXT_BYTES;
use super::trap::{Memory, Trap, TrapKind};
use super::value::{Address, Region, Value};
use super::{Code, Environment, Redirect, TailTarget};
#[cfg(feature = "test-support")]
use crate::insn::Order;
use crate::insn::{AluOp, AtomicOp, Cond, Helper, Imm64, Insn, Reg, Size, Src, Width};

/// The kernel's `MAX_CALL_FRAMES`.
pub(super) const MAX_FRAMES: usize = 8;

/// What a call keeps for its return.
#[derive(Debug, Clone, Copy)]
struct Frame {
    /// The program that called, and the slot in it to go on at.
    program: TailTarget,
    return_to: usize,
    kept: [Value; 4],
    repeat: Option<Repeat>,
}

/// `bpf_loop` under way in a frame.
#[derive(Debug, Clone, Copy)]
struct Repeat {
    function: usize,
    context: Value,
    round: u64,
    rounds: u64,
}

pub(super) struct Machine<'a, 'p> {
    pub(super) regs: [Value; 11],
    frames: [Option<Frame>; MAX_FRAMES - 1],
    depth: usize,
    program: TailTarget,
    pub(super) tail_calls: u32,
    pub(super) stacks: &'a mut [Stack; MAX_FRAMES],
    pub(super) context: &'a mut [u8; CONTEXT_BYTES],
    pub(super) packet: &'a mut Packet<'p>,
    pub(super) maps: &'a mut Maps,
    pub(super) env: &'a mut Environment,
    /// Raised by every helper that may move the packet.
    pub(super) epoch: u32,
    pub(super) redirect: Option<Redirect>,
    /// Bytes that clones took.
    pub(super) cloned: usize,
    /// Records reserved and not yet released.
    pub(super) reserved: usize,
    pub(super) scratch: Vec<u8>,
    #[cfg(feature = "test-support")]
    pub(super) bug: Option<super::PlantedBug>,
}

impl<'a, 'p> Machine<'a, 'p> {
    pub(super) fn new(
        stacks: &'a mut [Stack; MAX_FRAMES],
        packet: &'a mut Packet<'p>,
        context: &'a mut [u8; CONTEXT_BYTES],
        maps: &'a mut Maps,
        env: &'a mut Environment,
        scratch: Vec<u8>,
    ) -> Self {
        let mut machine = Self {
            regs: [Value::Nothing; 11],
            frames: [None; MAX_FRAMES - 1],
            depth: 0,
            program: TailTarget::ENTRY,
            tail_calls: 0,
            stacks,
            context,
            packet,
            maps,
            env,
            epoch: 0,
            redirect: None,
            cloned: 0,
            reserved: 0,
            scratch,
            #[cfg(feature = "test-support")]
            bug: None,
        };
        machine.enter_program(TailTarget::ENTRY);
        machine
    }

    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// Runs from slot 0 of the first program to the exit; gives the result and the number of instructions.
    pub(super) fn run(&mut self, programs: &mut [Code], budget: u64) -> Result<(u64, u64), Trap> {
        let mut pc = 0;
        let mut came_from = 0;
        let mut count = 0;
        loop {
            let Some(Code { name, slots, ran }) = programs.get_mut(self.program.index()) else {
                let program = format!("number {}", self.program.index());
                return Err(Trap { program, slot: 0, insn: Insn::Exit, kind: TrapKind::UnknownProgram });
            };
            loop {
                let Some(insn) = slots.get(pc).copied().flatten() else {
                    let insn = slots.get(came_from).copied().flatten().unwrap_or(Insn::Exit);
                    return Err(Trap { program: name.clone(), slot: came_from, insn, kind: TrapKind::Outside });
                };
                let trap = |kind| Trap { program: name.clone(), slot: pc, insn, kind };
                if count == budget {
                    return Err(trap(TrapKind::Budget));
                }
                count += 1;
                ran[pc] = true;
                came_from = pc;
                match self.step(pc, insn) {
                    Ok(Next::Slot(next)) => pc = next,
                    Ok(Next::Program(next)) => {
                        pc = next;
                        came_from = next;
                        break;
                    }
                    Ok(Next::Done(result)) => return Ok((result, count)),
                    Err(kind) => return Err(trap(kind)),
                }
            }
        }
    }

    /// All that a program finds: the context, an empty stack, and no other register.
    fn enter_program(&mut self, program: TailTarget) {
        self.program = program;
        self.regs = [Value::Nothing; 11];
        self.regs[1] = Value::Address(Address::new(Region::Context, 0));
        self.enter_stack();
    }

    fn map_number(&self, number: i32) -> Result<u16, TrapKind> {
        let known = u16::try_from(number).ok().filter(|n| self.maps.at((*n).into()).is_some());
        known.ok_or(TrapKind::WrongMaps)
    }

    #[inline]
    fn step(&mut self, pc: usize, insn: Insn) -> Result<Next, TrapKind> {
        let next = pc + insn.slots();
        match insn {
            Insn::Alu { width, op, dst, src } => self.alu(width, op, dst, src)?,
            Insn::Neg { width, dst } => {
                let number = self.number(dst)?;
                self.set(dst, alu::alu(width, AluOp::Sub, 0, number));
            }
            Insn::MovSx { width, from, dst, src } => {
                let number = alu::sign_extend(from, self.number(src)?);
                self.set(dst, alu::alu(width, AluOp::Mov, 0, number));
            }
            Insn::Swap { order, bits, dst } => {
                let number = self.number(dst)?;
                #[cfg(feature = "test-support")]
                let order = if self.bug == Some(super::PlantedBug::Unswapped) { Order::Le } else { order };
                self.set(dst, alu::swap(order, bits, number));
            }
            Insn::Load { size, dst, base, off } => {
                self.regs[dst.index()] = self.load(self.address(base)?.plus(off.into()), size)?;
            }
            Insn::LoadSx { size, dst, base, off } => {
                let address = self.address(base)?;
                if address.region == Region::Context {
                    return Err(TrapKind::Context { offset: address.offset + i64::from(off), size: size.bytes() });
                }
                let number = self.load(address.plus(off.into()), size)?.number(dst)?;
                self.set(dst, alu::sign_extend(size, number));
            }
            Insn::Store { size, base, off, src } => {
                let value = self.operand(src);
                let from = if let Src::Reg(reg) = src { reg } else { base };
                self.store(self.address(base)?.plus(off.into()), size, value, from)?;
            }
            Insn::Atomic { op, size, base, off, src } => self.atomic(op, size, base, off, src)?,
            Insn::LoadImm64 { dst, value } => {
                self.regs[dst.index()] = match value {
                    Imm64::Value(number) => Value::Number(number),
                    Imm64::MapFd(map) => Value::Address(Address::new(Region::Map(self.map_number(map)?), 0)),
                    Imm64::MapValue { fd, offset } => {
                        let map = self.map_number(fd)?;
                        if !self.maps.at(map.into()).is_some_and(Map::has_direct_value) {
                            return Err(TrapKind::DirectValue);
                        }
                        Value::Address(Address::new(Region::MapValue { map, slot: 0 }, offset.into()))
                    }
                    Imm64::Func(distance) => {
                        let slot = jump(pc, distance)?;
                        Value::Address(Address::new(Region::Function(slot as u32), 0))
                    }
                };
            }
            Insn::Jump { off } => return jump(pc, off.into()).map(Next::Slot),
            Insn::JumpLong { off } => return jump(pc, off).map(Next::Slot),
            Insn::JumpIf { width, cond, dst, src, off } => {
                if self.condition(width, cond, dst, src)? {
                    return jump(pc, off.into()).map(Next::Slot);
                }
            }
            Insn::Call { helper } => {
                self.regs[0] = match helper {
                    Helper::Loop => return self.begin_loop(next).map(Next::Slot),
                    Helper::TailCall => {
                        if let Some(target) = self.tail_call()? {
                            self.enter_program(target);
                            return Ok(Next::Program(0));
                        }
                        Value::Nothing
                    }
                    _ => self.call(helper)?,
                };
                self.clobber();
            }
            Insn::CallLocal { off } => {
                self.push(next, None)?;
                return jump(pc, off).map(Next::Slot);
            }
            Insn::Exit => return self.exit(),
        }
        Ok(Next::Slot(next))
    }

    fn alu(&mut self, width: Width, op: AluOp, dst: Reg, src: Src) -> Result<(), TrapKind> {
        let b = self.operand(src);
        let b_reg = if let Src::Reg(reg) = src { reg } else { dst };
        if op == AluOp::Mov {
            self.regs[dst.index()] = match (width, b) {
                (_, Value::Nothing) => return Err(TrapKind::UninitRegister(b_reg)),
                (Width::W64, value) => value,
                (Width::W32, Value::Number(number)) => Value::Number(u64::from(number as u32)),
                (Width::W32, Value::Address(_)) => return Err(TrapKind::PointerArithmetic),
            };
            return Ok(());
        }
        let a = self.regs[dst.index()];
        let result = match (a, b) {
            (Value::Number(a), Value::Number(b)) => Value::Number(alu::alu(width, op, a, b)),
            (Value::Nothing, _) => return Err(TrapKind::UninitRegister(dst)),
            (_, Value::Nothing) => return Err(TrapKind::UninitRegister(b_reg)),
            _ if width == Width::W32 => return Err(TrapKind::PointerArithmetic),
            (Value::Address(a), Value::Number(b)) => match (op, a.region) {
                (_, Region::Map(_) | Region::Function(_)) => return Err(TrapKind::PointerArithmetic),
                (AluOp::Add, _) => Value::Address(a.plus(b as i64)),
                (AluOp::Sub, _) => Value::Address(a.plus((b as i64).wrapping_neg())),
                _ => return Err(TrapKind::PointerArithmetic),
            },
            (Value::Number(a), Value::Address(b)) => match (op, b.region) {
                (AluOp::Add, region) if !matches!(region, Region::Map(_) | Region::Function(_)) => {
                    Value::Address(b.plus(a as i64))
                }
                _ => return Err(TrapKind::PointerArithmetic),
            },
            (Value::Address(a), Value::Address(b)) => {
                if op != AluOp::Sub || a.region != b.region {
                    return Err(TrapKind::PointerArithmetic);
                }
                Value::Number(a.offset.wrapping_sub(b.offset) as u64)
            }
        };
        self.regs[dst.index()] = result;
        Ok(())
    }

    fn condition(&self, width: Width, cond: Cond, dst: Reg, src: Src) -> Result<bool, TrapKind> {
        let a = self.regs[dst.index()];
        let b = self.operand(src);
        match (a, b) {
            (Value::Number(a), Value::Number(b)) => {
                #[cfg(feature = "test-support")]
                let cond = self.bug.map_or(cond, |bug| bug.condition(cond));
                Ok(alu::compare(width, cond, a, b))
            }
            (Value::Nothing, _) => Err(TrapKind::UninitRegister(dst)),
            (_, Value::Nothing) => Err(TrapKind::UninitRegister(if let Src::Reg(reg) = src { reg } else { dst })),
            _ if width == Width::W32 => Err(TrapKind::PointerComparison),
            // An address is never null.
            (Value::Address(_), Value::Number(0)) | (Value::Number(0), Value::Address(_)) => match cond {
                Cond::Eq => Ok(false),
                Cond::Ne => Ok(true),
                _ => Err(TrapKind::PointerComparison),
            },
            (Value::Address(a), Value::Address(b)) if a.region == b.region => {
                if cond == Cond::Set {
                    return Err(TrapKind::PointerComparison);
                }
                // Offsets may be negative, addresses are not; the shift keeps their order.
                let unsigned = |offset: i64| (offset as u64) ^ 1 << 63;
                let (a, b) = (unsigned(a.offset), unsigned(b.offset));
                Ok(alu::compare(width, cond, a, b))
            }
            _ => Err(TrapKind::PointerComparison),
        }
    }

    fn atomic(&mut self, op: AtomicOp, size: Size, base: Reg, off: i16, src: Reg) -> Result<(), TrapKind> {
        let address = self.address(base)?.plus(off.into());
        match address.region {
            Region::Context => return Err(TrapKind::NoAtomic(Memory::Context)),
            Region::Packet { .. } => return Err(TrapKind::NoAtomic(Memory::Packet)),
            _ => {}
        }
        let cut = |number: u64| if size == Size::W { u64::from(number as u32) } else { number };
        let operand = cut(self.number(src)?);
        let old = match self.load(address, size)? {
            Value::Number(old) => old,
            _ => return Err(TrapKind::PointerArithmetic),
        };
        let new = match op {
            AtomicOp::Add | AtomicOp::FetchAdd => cut(old.wrapping_add(operand)),
            AtomicOp::Or | AtomicOp::FetchOr => old | operand,
            AtomicOp::And | AtomicOp::FetchAnd => old & operand,
            AtomicOp::Xor | AtomicOp::FetchXor => old ^ operand,
            AtomicOp::Xchg => operand,
            AtomicOp::Cmpxchg => {
                if cut(self.number(Reg::R0)?) == old {
                    operand
                } else {
                    old
                }
            }
        };
        self.store(address, size, Value::Number(new), src)?;
        match op {
            AtomicOp::Add | AtomicOp::Or | AtomicOp::And | AtomicOp::Xor => {}
            AtomicOp::Cmpxchg => self.set(Reg::R0, old),
            _ => self.set(src, old),
        }
        Ok(())
    }

    /// `bpf_loop(rounds, function, context, flags)`.
    fn begin_loop(&mut self, next: usize) -> Result<usize, TrapKind> {
        const MAX_LOOPS: u64 = 8 << 20;
        let rounds = u64::from(self.number(Reg::R1)? as u32);
        let Address { region: Region::Function(function), .. } = self.address(Reg::R2)? else {
            return Err(TrapKind::Argument { argument: 2, reason: "a function, from Asm::load_function" });
        };
        let context = self.regs[3];
        if context == Value::Nothing {
            return Err(TrapKind::UninitRegister(Reg::R3));
        }
        if self.number(Reg::R4)? != 0 {
            return Err(TrapKind::Argument { argument: 4, reason: "no flags are defined" });
        }
        if rounds == 0 || rounds > MAX_LOOPS {
            // The verifier writes the loop out and moves the error to the lower half only (`inline_bpf_loop`).
            const E2BIG: i32 = 7;
            self.set(Reg::R0, if rounds == 0 { 0 } else { u64::from((-E2BIG) as u32) });
            self.clobber();
            return Ok(next);
        }
        let function = function as usize;
        self.push(next, Some(Repeat { function, context, round: 0, rounds }))?;
        self.regs[1] = Value::Number(0);
        self.regs[2] = context;
        Ok(function)
    }

    fn exit(&mut self) -> Result<Next, TrapKind> {
        let result = self.regs[0];
        if self.depth == 0 {
            return match result {
                Value::Nothing => Err(TrapKind::UninitRegister(Reg::R0)),
                Value::Address(_) => Err(TrapKind::PointerLeak),
                Value::Number(_) if self.reserved > 0 => Err(TrapKind::UnreleasedRecord),
                Value::Number(number) => Ok(Next::Done(number)),
            };
        }
        let Some(frame) = self.frames[self.depth - 1] else { return Err(TrapKind::Outside) };
        if let Some(repeat) = frame.repeat {
            let stop = result.number(Reg::R0)? != 0;
            let round = repeat.round + 1;
            if !stop && round < repeat.rounds {
                self.frames[self.depth - 1] = Some(Frame { repeat: Some(Repeat { round, ..repeat }), ..frame });
                self.enter_stack();
                self.clobber();
                self.forget_kept();
                self.regs[0] = Value::Nothing;
                self.regs[1] = Value::Number(round);
                self.regs[2] = repeat.context;
                return Ok(self.go_on_in(frame.program, repeat.function));
            }
            self.regs[0] = Value::Number(round);
        }
        self.depth -= 1;
        self.clobber();
        self.regs[6..10].copy_from_slice(&frame.kept);
        let serial = self.stacks[self.depth].serial;
        self.regs[10] = Value::Address(Address::new(Region::Stack { depth: self.depth as u8, serial }, 0));
        Ok(self.go_on_in(frame.program, frame.return_to))
    }

    fn go_on_in(&mut self, program: TailTarget, slot: usize) -> Next {
        if program == self.program {
            return Next::Slot(slot);
        }
        self.program = program;
        Next::Program(slot)
    }

    fn push(&mut self, return_to: usize, repeat: Option<Repeat>) -> Result<(), TrapKind> {
        let program = self.program;
        let mut kept = [Value::Nothing; 4];
        kept.copy_from_slice(&self.regs[6..10]);
        *self.frames.get_mut(self.depth).ok_or(TrapKind::CallDepth)? = Some(Frame { program, return_to, kept, repeat });
        self.depth += 1;
        self.regs[0] = Value::Nothing;
        if repeat.is_some() {
            self.clobber();
        }
        self.forget_kept();
        self.enter_stack();
        Ok(())
    }

    /// Whether `bpf_loop` is under way.
    pub(super) fn in_callback(&self) -> bool {
        self.frames.iter().take(self.depth).flatten().any(|frame| frame.repeat.is_some())
    }

    fn enter_stack(&mut self) {
        let stack = &mut self.stacks[self.depth];
        stack.enter();
        let region = Region::Stack { depth: self.depth as u8, serial: stack.serial };
        self.regs[10] = Value::Address(Address::new(region, 0));
    }

    fn clobber(&mut self) {
        self.regs[1..6].fill(Value::Nothing);
    }

    fn forget_kept(&mut self) {
        self.regs[6..10].fill(Value::Nothing);
    }

    fn operand(&self, src: Src) -> Value {
        match src {
            Src::Reg(reg) => self.regs[reg.index()],
            Src::Imm(imm) => Value::Number(imm as u64),
        }
    }

    pub(super) fn number(&self, reg: Reg) -> Result<u64, TrapKind> {
        self.regs[reg.index()].number(reg)
    }

    pub(super) fn address(&self, reg: Reg) -> Result<Address, TrapKind> {
        self.regs[reg.index()].address(reg)
    }

    fn set(&mut self, reg: Reg, number: u64) {
        self.regs[reg.index()] = Value::Number(number);
    }
}

enum Next {
    Slot(usize),
    /// A slot of another program, which [`Machine::program`] names.
    Program(usize),
    Done(u64),
}

fn jump(pc: usize, off: i32) -> Result<usize, TrapKind> {
    usize::try_from(pc as i64 + 1 + i64::from(off)).map_err(|_| TrapKind::Outside)
}
