//! BPF Type Format (kernel `Documentation/bpf/btf.rst`): just the types of maps and functions.

use std::collections::HashMap;

use super::{MapSpec, Pinning};

/// The sections `.BTF` and `.BTF.ext` in the making. A type's id is its place in the list, from 1.
pub(super) struct Btf {
    types: Vec<u8>,
    count: u32,
    strings: Vec<u8>,
    string_ids: HashMap<String, u32>,
    int: u32,
    /// Pointers to arrays of n integers: how a BTF-defined map states the number n.
    numbers: HashMap<u32, u32>,
    contexts: HashMap<&'static str, u32>,
    /// Section, then offset in bytes and type of each function.
    functions: Vec<(String, Vec<(u32, u32)>)>,
    /// Section, then `struct bpf_line_info` of each part, offsets in bytes.
    lines: Vec<(String, Vec<[u32; 4]>)>,
}

/// What a function takes and who may call it; the result is an integer.
#[derive(Clone, Copy)]
pub(super) enum Prototype {
    /// A subprogram, whose arguments the verifier finds out.
    Local,
    /// A program; the kernel's name of its argument.
    Program(&'static str),
    /// A function of so many integers that is verified on its own.
    Global(u8),
}

impl Btf {
    pub(super) fn new() -> Self {
        let mut btf = Self {
            types: Vec::new(),
            count: 0,
            strings: vec![0],
            string_ids: HashMap::from([(String::new(), 0)]),
            int: 0,
            numbers: HashMap::new(),
            contexts: HashMap::new(),
            functions: Vec::new(),
            lines: Vec::new(),
        };
        let name = btf.string("int");
        const SIGNED: u32 = 1 << 24;
        btf.int = btf.add(name, info(Kind::Int, 0), 4, &[SIGNED | 32]);
        btf
    }

    /// A map's definition; gives the type of its variable and the variable's size.
    pub(super) fn map(&mut self, map: &MapSpec) -> (u32, u32) {
        let mut fields = vec![("type", map.kind.number()), ("max_entries", map.max_entries)];
        if map.key_size > 0 {
            fields.push(("key_size", map.key_size));
        }
        if map.value_size > 0 {
            fields.push(("value_size", map.value_size));
        }
        if map.flags.bits() != 0 {
            fields.push(("map_flags", map.flags.bits()));
        }
        if map.pinning == Pinning::ByName {
            const LIBBPF_PIN_BY_NAME: u32 = 1;
            fields.push(("pinning", LIBBPF_PIN_BY_NAME));
        }
        let size = fields.len() as u32 * 8;
        let mut members = Vec::new();
        for (at, (field, number)) in fields.iter().enumerate() {
            let name = self.string(field);
            let number = self.number(*number);
            members.extend([name, number, at as u32 * 64]);
        }
        let definition = self.add(0, info(Kind::Struct, fields.len()), size, &members);
        let name = self.string(&map.name);
        const GLOBAL: u32 = 1;
        (self.add(name, info(Kind::Var, 0), definition, &[GLOBAL]), size)
    }

    /// The section of maps: type, offset and size of each variable.
    pub(super) fn data_section(&mut self, name: &str, size: u32, variables: &[[u32; 3]]) {
        let name = self.string(name);
        self.add(name, info(Kind::Datasec, variables.len()), size, variables.as_flattened());
    }

    /// A function at an offset in a section.
    pub(super) fn function(&mut self, section: &str, offset: u32, name: &str, prototype: Prototype) {
        let (parameters, linkage) = match prototype {
            Prototype::Local => (Vec::new(), 0),
            Prototype::Program(context) => {
                let pointer = self.context(context);
                (vec![self.string("ctx"), pointer], 1)
            }
            Prototype::Global(arguments) => {
                // The kernel wants names (kernel/bpf/btf.c, `btf_func_check`).
                let names = ["a", "b", "c", "d", "e"].into_iter().take(usize::from(arguments));
                (names.flat_map(|name| [self.string(name), self.int]).collect(), 1)
            }
        };
        let proto = self.add(0, info(Kind::FuncProto, parameters.len() / 2), self.int, &parameters);
        let name = self.string(name);
        let function = self.add(name, info(Kind::Func, linkage), proto, &[]);
        match self.functions.iter_mut().find(|(known, _)| known == section) {
            Some((_, functions)) => functions.push((offset, function)),
            None => self.functions.push((section.to_owned(), vec![(offset, function)])),
        }
    }

    /// A part of a function: its offset in a section, its name, and what stands for source file and line. Calls go in
    /// ascending order of offsets. The kernel wants one at the start of every function, or none at all (`check_btf_line`,
    /// `kernel/bpf/verifier.c`).
    pub(super) fn line(&mut self, section: &str, offset: u32, text: &str, file: &str, line: u32) {
        // The lower bits are the column, which nobody knows here (`BPF_LINE_INFO_LINE_NUM`).
        const COLUMN_BITS: u32 = 10;
        let record = [offset, self.string(file), self.string(text), line << COLUMN_BITS];
        match self.lines.iter_mut().find(|(known, _)| known == section) {
            Some((_, lines)) => lines.push(record),
            None => self.lines.push((section.to_owned(), vec![record])),
        }
    }

    /// The bytes of `.BTF` and of `.BTF.ext`.
    pub(super) fn finish(mut self) -> (Vec<u8>, Vec<u8>) {
        const FUNC_INFO_BYTES: u32 = 8;
        let mut records = vec![FUNC_INFO_BYTES];
        for (section, functions) in std::mem::take(&mut self.functions) {
            records.extend([self.string(&section), functions.len() as u32]);
            records.extend(functions.into_iter().flat_map(|(offset, function)| [offset, function]));
        }
        let records = words(&records);

        let mut lines = Vec::new();
        if !self.lines.is_empty() {
            const LINE_INFO_BYTES: u32 = 16;
            lines.push(LINE_INFO_BYTES);
            for (section, records) in std::mem::take(&mut self.lines) {
                lines.extend([self.string(&section), records.len() as u32]);
                lines.extend(records.as_flattened());
            }
        }
        let lines = words(&lines);

        // btf_ext_header: function records, line records, and no CO-RE relocations.
        let (length, line_length) = (records.len() as u32, lines.len() as u32);
        let mut ext = header(32);
        ext.extend(words(&[0, length, length, line_length, length + line_length, 0]));
        ext.extend(records);
        ext.extend(lines);

        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let mut btf = header(24);
        btf.extend(words(&[0, types, types, strings]));
        btf.extend(self.types);
        btf.extend(self.strings);
        (btf, ext)
    }

    fn context(&mut self, name: &'static str) -> u32 {
        if let Some(pointer) = self.contexts.get(name) {
            return *pointer;
        }
        let id = self.string(name);
        let context = self.add(id, info(Kind::Struct, 0), 0, &[]);
        let pointer = self.add(0, info(Kind::Ptr, 0), context, &[]);
        self.contexts.insert(name, pointer);
        pointer
    }

    fn number(&mut self, number: u32) -> u32 {
        if let Some(pointer) = self.numbers.get(&number) {
            return *pointer;
        }
        let array = self.add(0, info(Kind::Array, 0), 0, &[self.int, self.int, number]);
        let pointer = self.add(0, info(Kind::Ptr, 0), array, &[]);
        self.numbers.insert(number, pointer);
        pointer
    }

    fn add(&mut self, name: u32, info: u32, size_or_type: u32, rest: &[u32]) -> u32 {
        self.types.extend(words(&[name, info, size_or_type]));
        self.types.extend(words(rest));
        self.count += 1;
        self.count
    }

    fn string(&mut self, text: &str) -> u32 {
        if let Some(id) = self.string_ids.get(text) {
            return *id;
        }
        let id = self.strings.len() as u32;
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
        self.string_ids.insert(text.to_owned(), id);
        id
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Int = 1,
    Ptr = 2,
    Array = 3,
    Struct = 4,
    Func = 12,
    FuncProto = 13,
    Var = 14,
    Datasec = 15,
}

/// The word that holds kind and count (of a function: its linkage).
const fn info(kind: Kind, count: usize) -> u32 {
    (kind as u32) << 24 | count as u32
}

fn header(length: u32) -> Vec<u8> {
    const MAGIC: u16 = 0xeb9f;
    const VERSION: u8 = 1;
    let [m0, m1] = MAGIC.to_le_bytes();
    let mut bytes = vec![m0, m1, VERSION, 0];
    bytes.extend(length.to_le_bytes());
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
