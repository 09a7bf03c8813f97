//! A program with all that it calls, names resolved.

use std::collections::HashMap;

use super::{MapSpec, Object, ObjectError, ProgramKind};
use crate::asm::{Function, Role, Symbol};
use crate::insn::{Imm64, Insn};

/// A whole program in one piece, as the kernel would get it; maps are numbered by their place in
/// [`Program::maps`] where the kernel has file descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    name: String,
    kind: ProgramKind,
    insns: Vec<Insn>,
    functions: Vec<(usize, String)>,
    parts: Vec<(usize, String)>,
    maps: Vec<MapSpec>,
    /// Length in slots.
    slots: usize,
}

impl Program {
    /// A program of instructions that no assembler has seen, for tests of what reads and runs them.
    #[cfg(any(test, feature = "test-support"))]
    pub fn from_insns(name: &str, kind: ProgramKind, insns: Vec<Insn>, maps: Vec<MapSpec>) -> Self {
        let slots = insns.iter().map(Insn::slots).sum();
        Self {
            name: name.to_owned(),
            kind,
            insns,
            functions: vec![(0, name.to_owned())],
            parts: Vec::new(),
            maps,
            slots,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the kernel would run it.
    pub const fn kind(&self) -> ProgramKind {
        self.kind
    }

    /// All instructions: the program's, then those of the functions that it calls.
    pub fn insns(&self) -> &[Insn] {
        &self.insns
    }

    /// First slot and name of every function, ascending.
    pub fn functions(&self) -> &[(usize, String)] {
        &self.functions
    }

    /// First slot and name of every part that its writer named ([`Asm::mark`](crate::asm::Asm::mark)), ascending.
    pub fn parts(&self) -> &[(usize, String)] {
        &self.parts
    }

    /// The part that the instruction at a slot is of: the nearest mark before it in its function, or the function's name.
    /// None beyond the program's end.
    pub fn part_of(&self, slot: usize) -> Option<&str> {
        if slot >= self.slots {
            return None;
        }
        let nearest = |parts: &'_ [(usize, String)]| parts.partition_point(|(start, _)| *start <= slot).checked_sub(1);
        let (start, function) = self.functions.get(nearest(&self.functions)?)?;
        let part = nearest(&self.parts).and_then(|at| self.parts.get(at)).filter(|(at, _)| at >= start);
        Some(part.map_or(function, |(_, part)| part))
    }

    /// The maps of the object.
    pub fn maps(&self) -> &[MapSpec] {
        &self.maps
    }
}

pub(super) fn link(object: &Object, name: &str) -> Result<Program, ObjectError> {
    let no_program = || ObjectError::NoProgram { name: name.to_owned() };
    let entry = object.functions.iter().find(|f| f.name() == name).ok_or_else(no_program)?;
    let Role::Program(kind) = entry.role() else { return Err(no_program()) };
    let by_name: HashMap<&str, &Function> = object.functions.iter().map(|f| (f.name(), f)).collect();

    // Functions in the order in which they are first called, as loaders place them.
    let mut order = vec![entry];
    let mut starts = HashMap::from([(entry.name(), 0)]);
    let mut end = entry.slots();
    let mut next = 0;
    while let Some(function) = order.get(next).copied() {
        next += 1;
        for reference in function.references() {
            let Symbol::Function(callee) = &reference.symbol else { continue };
            let unresolved =
                || ObjectError::Unresolved { function: function.name().to_owned(), symbol: reference.symbol.clone() };
            let callee = *by_name.get(callee.as_str()).ok_or_else(unresolved)?;
            if !starts.contains_key(callee.name()) {
                starts.insert(callee.name(), end);
                end += callee.slots();
                order.push(callee);
            }
        }
    }

    let mut insns = Vec::with_capacity(end);
    let mut parts = Vec::new();
    let mut slot = 0;
    for function in &order {
        let mut marks = function.marks().iter().peekable();
        let mut references = function.references().iter().peekable();
        for (index, insn) in function.insns().iter().enumerate() {
            let mut insn = *insn;
            if let Some(mark) = marks.next_if(|mark| mark.insn == index) {
                parts.push((slot, mark.text.clone()));
            }
            if let Some(reference) = references.next_if(|reference| reference.insn == index) {
                let unresolved = || ObjectError::Unresolved {
                    function: function.name().to_owned(),
                    symbol: reference.symbol.clone(),
                };
                match (&mut insn, &reference.symbol) {
                    (Insn::LoadImm64 { value, .. }, Symbol::Map(map)) => {
                        *value = Imm64::MapFd(object.map_index(map).ok_or_else(unresolved)? as i32);
                    }
                    (Insn::LoadImm64 { value, .. }, Symbol::Function(callee)) => {
                        *value = Imm64::Func((starts[callee.as_str()] as i64 - slot as i64 - 1) as i32);
                    }
                    (Insn::CallLocal { off }, Symbol::Function(callee)) => {
                        *off = (starts[callee.as_str()] as i64 - slot as i64 - 1) as i32;
                    }
                    _ => return Err(unresolved()),
                }
            }
            slot += insn.slots();
            insns.push(insn);
        }
    }
    let functions = order.iter().map(|f| (starts[f.name()], f.name().to_owned())).collect();
    Ok(Program { name: name.to_owned(), kind, insns, functions, parts, maps: object.maps.clone(), slots: slot })
}
