//! What the suite attaches.

use crate::asm::Asm;
use crate::attach::{verdict, xdp_verdict};
use crate::insn::Reg::*;
use crate::insn::{self, AtomicOp, Cond, Helper, Size};
use crate::loader::{LoadRequest, Loader};
use crate::maps::Array;
use crate::object::{MapSpec, Object, ProgramKind};
use crate::program::Program;

pub(super) fn program(kind: ProgramKind, name: &str, code: Asm) -> Program {
    let code = insn::encode(code.finish().unwrap().insns());
    Program::load(kind, name, &code).unwrap()
}

/// What a program of this kind returns for a classifier's verdict: XDP knows no end of a chain.
pub(super) fn answer(kind: ProgramKind, value: i32) -> i32 {
    match (kind, value) {
        (ProgramKind::Xdp, verdict::SHOT) => xdp_verdict::DROP,
        (ProgramKind::Xdp, _) => xdp_verdict::PASS,
        _ => value,
    }
}

/// Where the context has the packet's first byte, and the one behind its last.
fn data(kind: ProgramKind) -> (i16, i16) {
    if kind == ProgramKind::Xdp { (0, 4) } else { (76, 80) }
}

/// Answers every packet with one verdict.
///
/// # Panics
/// Where the kernel does not load it.
pub fn constant(name: &str, value: i32) -> Program {
    constant_of(ProgramKind::Classifier, name, value)
}

/// As [`constant`], of another kind, which takes the verdict for what it means there.
///
/// # Panics
/// As [`constant`].
pub fn constant_of(kind: ProgramKind, name: &str, value: i32) -> Program {
    let mut code = Asm::program(name, kind);
    code.ret(answer(kind, value));
    program(kind, name, code)
}

/// Drops everything.
///
/// # Panics
/// As [`constant`].
pub fn deny() -> Program {
    constant("deny", verdict::SHOT)
}

/// Drops everything, and counts what the flood sends by its way.
pub(super) fn counting_deny(kind: ProgramKind, loader: &dyn Loader) -> (Program, Array<u64>) {
    let mut code = Asm::program("count_deny", kind);
    let (v4, v6, count, drop) = (code.label(), code.label(), code.label(), code.label());
    let (data, end) = data(kind);
    code.load(Size::W, R2, R1, data)
        .load(Size::W, R3, R1, end)
        .mov(R4, R2)
        .add(R4, 74)
        .jump_if(Cond::Gt, R4, R3, drop)
        .load(Size::H, R5, R2, 12)
        .jump_if(Cond::Eq, R5, i32::from(0x0800_u16.to_be()), v4)
        .jump_if(Cond::Eq, R5, i32::from(0x86dd_u16.to_be()), v6)
        .jump(drop)
        .bind(v4)
        .load(Size::H, R5, R2, 36)
        .load(Size::B, R6, R2, 42)
        .jump(count)
        .bind(v6)
        .load(Size::H, R5, R2, 56)
        .load(Size::B, R6, R2, 62)
        .bind(count)
        .jump_if(Cond::Ne, R5, i32::from(ALLOWED.to_be()), drop)
        .store(Size::W, R10, -4, R6)
        .load_map(R1, "dropped")
        .mov(R2, R10)
        .add(R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, drop)
        .mov(R1, 1)
        .atomic(AtomicOp::Add, Size::Dw, R0, 0, R1)
        .bind(drop)
        .ret(answer(kind, verdict::SHOT));
    let mut object = Object::new();
    object.add_map(MapSpec::array("dropped", 8, 4)).unwrap();
    object.add(code.finish().unwrap()).unwrap();
    let mut loaded = loader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    let dropped = Array::new(loaded.take_map("dropped").unwrap()).unwrap();
    (loaded.take_program("count_deny").unwrap(), dropped)
}

pub(super) fn counts(dropped: &Array<u64>) -> [u64; 4] {
    std::array::from_fn(|way| dropped.load(way as u32).unwrap())
}

pub(super) const ALLOWED: u16 = 4001;
pub(super) const DENIED: u16 = 4002;

/// Lets UDP to port `ALLOWED` pass, and neighbour discovery; everything else is dropped.
pub(super) fn allow_one_port(kind: ProgramKind, name: &str) -> Program {
    let mut code = Asm::program(name, kind);
    let (v4, v6, drop, pass) = (code.label(), code.label(), code.label(), code.label());
    let (data, end) = data(kind);
    code.load(Size::W, R2, R1, data)
        .load(Size::W, R3, R1, end)
        .mov(R4, R2)
        .add(R4, 62)
        .jump_if(Cond::Gt, R4, R3, drop)
        .load(Size::H, R5, R2, 12)
        .jump_if(Cond::Eq, R5, i32::from(0x0800_u16.to_be()), v4)
        .jump_if(Cond::Eq, R5, i32::from(0x86dd_u16.to_be()), v6)
        .jump(drop)
        .bind(v4)
        .load(Size::H, R5, R2, 36)
        .jump_if(Cond::Eq, R5, i32::from(ALLOWED.to_be()), pass)
        .jump(drop)
        .bind(v6)
        .load(Size::H, R5, R2, 56)
        .jump_if(Cond::Eq, R5, i32::from(ALLOWED.to_be()), pass)
        .bind(drop)
        .ret(answer(kind, verdict::SHOT))
        .bind(pass)
        .ret(answer(kind, verdict::UNSPEC));
    program(kind, name, code)
}
