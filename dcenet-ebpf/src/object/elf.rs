//! The ELF file.

use std::collections::HashMap;

use object::write::{Object as Writer, Relocation, SectionId, Symbol as ElfSymbol, SymbolId, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, RelocationFlags, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
};

use super::btf::{Btf, Prototype};
use super::{Object, ObjectError};
use crate::asm::{Function, Role, Symbol};
use crate::insn::{self, Insn, SLOT_BYTES};

/// Subprograms lie here; libbpf takes local functions nowhere else.
const TEXT: &str = ".text";

pub(super) fn write(object: &Object) -> Result<Vec<u8>, ObjectError> {
    let mut writer = Writer::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let mut btf = Btf::new();
    let mut sections: HashMap<&str, SectionId> = HashMap::new();
    let mut symbols: HashMap<Symbol, SymbolId> = HashMap::new();

    let license = writer.add_section(Vec::new(), b"license".to_vec(), SectionKind::Data);
    let mut text = object.license.clone().into_bytes();
    text.push(0);
    writer.set_section_data(license, text, 1);

    if !object.maps.is_empty() {
        let section = writer.add_section(Vec::new(), b".maps".to_vec(), SectionKind::Data);
        let mut variables = Vec::new();
        for map in &object.maps {
            let (variable, size) = btf.map(map);
            let offset = writer.append_section_data(section, &vec![0; size as usize], 8);
            variables.push([variable, offset as u32, size]);
            let symbol = symbol(&map.name, section, offset, u64::from(size), SymbolKind::Data, SymbolScope::Dynamic);
            symbols.insert(Symbol::Map(map.name.clone()), writer.add_symbol(symbol));
        }
        let size = variables.last().map_or(0, |[_, offset, size]| offset + size);
        btf.data_section(".maps", size, &variables);
    }

    // A call needs its callee's symbol, which must lie in a section; so all code first, then all relocations.
    let has_lines = object.functions.iter().any(|function| !function.marks().is_empty());
    let mut placed = Vec::new();
    for function in &object.functions {
        let (name, scope, prototype) = match function.role() {
            Role::Program(kind) => (kind.section(), SymbolScope::Dynamic, Prototype::Program(kind.context())),
            Role::Subprogram => (TEXT, SymbolScope::Compilation, Prototype::Local),
            Role::Global { arguments } => (TEXT, SymbolScope::Dynamic, Prototype::Global(arguments)),
        };
        let section = *sections
            .entry(name)
            .or_insert_with(|| writer.add_section(Vec::new(), name.as_bytes().to_vec(), SectionKind::Text));
        let code = insn::encode(function.insns());
        let offset = writer.append_section_data(section, &code, SLOT_BYTES as u64);
        btf.function(name, offset as u32, function.name(), prototype);
        if has_lines {
            lines(&mut btf, name, offset as u32, function);
        }
        let symbol = symbol(function.name(), section, offset, code.len() as u64, SymbolKind::Text, scope);
        symbols.insert(Symbol::Function(function.name().to_owned()), writer.add_symbol(symbol));
        placed.push((function, section, offset));
    }
    for (function, section, start) in placed {
        let mut references = function.references().iter().peekable();
        let mut slot = 0;
        for (index, insn) in function.insns().iter().enumerate() {
            if let Some(reference) = references.next_if(|reference| reference.insn == index) {
                let r_type = match insn {
                    Insn::CallLocal { .. } => object::elf::R_BPF_64_32,
                    _ => object::elf::R_BPF_64_64,
                };
                let relocation = Relocation {
                    offset: start + (slot * SLOT_BYTES) as u64,
                    symbol: symbols[&reference.symbol],
                    addend: 0,
                    flags: RelocationFlags::Elf { r_type },
                };
                writer.add_relocation(section, relocation).map_err(write_error)?;
            }
            slot += insn.slots();
        }
    }

    let (types, ext) = btf.finish();
    for (name, bytes) in [(".BTF", types), (".BTF.ext", ext)] {
        let section = writer.add_section(Vec::new(), name.as_bytes().to_vec(), SectionKind::Other);
        writer.set_section_data(section, bytes, 4);
    }
    writer.write().map_err(write_error)
}

/// A record at the function's start, and one for each of its parts.
fn lines(btf: &mut Btf, section: &str, start: u32, function: &Function) {
    // The verifier prints a name only if file or line differ from those before (`verbose_linfo`, `kernel/bpf/log.c`).
    let mut marks = (1..).zip(function.marks()).peekable();
    if marks.peek().is_none_or(|(_, first)| first.insn > 0) {
        btf.line(section, start, function.name(), function.name(), 0);
    }
    let mut offset = start;
    for (index, insn) in function.insns().iter().enumerate() {
        if let Some((number, mark)) = marks.next_if(|(_, mark)| mark.insn == index) {
            btf.line(section, offset, &mark.text, function.name(), number);
        }
        offset += (insn.slots() * SLOT_BYTES) as u32;
    }
}

fn symbol(name: &str, section: SectionId, value: u64, size: u64, kind: SymbolKind, scope: SymbolScope) -> ElfSymbol {
    ElfSymbol {
        name: name.as_bytes().to_vec(),
        value,
        size,
        kind,
        scope,
        weak: false,
        section: SymbolSection::Section(section),
        flags: SymbolFlags::None,
    }
}

fn write_error(error: object::write::Error) -> ObjectError {
    ObjectError::Write { source: Box::new(error) }
}
