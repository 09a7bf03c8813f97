//! The backend over libbpf, the C library of the kernel's authors.
//!
//! It is used below libbpf-rs, by its own functions: libbpf-rs keeps errno to itself, which decides on the class of an
//! error, and formats what libbpf says in a way that ends the process at a name that is not UTF-8.

use std::io;

use super::aligned::Aligned;
use super::{LoadError, LoadRequest, Loaded, Loader};
use crate::maps::Map;
use crate::object::ProgramKind;
use crate::program::{self, Program};
use crate::sys::libbpf::{Object, ObjectMap, Verbosity, hear};

/// Loads objects with libbpf: sections as libbpf names them (`classifier` and `tc` for classifiers), maps BTF-defined in
/// `.maps`.
///
/// What libbpf says during a load goes to `tracing`, and into errors. What it says to other users in the process goes where
/// they told it to.
///
/// # Minimum kernel version
/// What the object needs. Before 5.11 libbpf lifts the process's limit of locked memory (`RLIMIT_MEMLOCK`).
#[derive(Debug, Clone, Copy, Default)]
pub struct LibbpfLoader;

impl Loader for LibbpfLoader {
    fn load(&self, elf: &[u8], request: &LoadRequest<'_>) -> Result<Loaded, LoadError> {
        let aligned = Aligned::new(elf);
        let load = |verbosity| {
            let (done, said) = hear(|| attempt(aligned.bytes(), request, verbosity));
            for message in &said {
                tracing::debug!(text = %message, "libbpf says");
            }
            done.map_err(|failure| failure.told(&said))
        };
        match load(Verbosity::Refusals) {
            // Before 6.4 the kernel stops writing where the log is full, which hides why it refused the program.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && !error.log().is_empty() => {
                load(Verbosity::Reasons)
            }
            done => done,
        }
    }
}

/// What failed, before it is known what libbpf said of it.
enum Failure {
    /// The file was not understood.
    Open(io::Error),
    /// The maps or programs were not made.
    Load { error: io::Error, log: String },
    /// It is known already.
    Known(LoadError),
}

fn attempt(elf: &[u8], request: &LoadRequest<'_>, verbosity: Verbosity) -> Result<Loaded, Failure> {
    let mut object = Object::open(elf, verbosity).map_err(Failure::Open)?;
    let names = prepare(&object, request).map_err(Failure::Known)?;
    if let Err(error) = object.load() {
        return Err(Failure::Load { error, log: object.log() });
    }
    taken(&object, names).map_err(Failure::Known)
}

/// Everything that is decided between opening and loading. Gives the names of the maps in the object, for one that is reused
/// takes the name of the other.
fn prepare(object: &Object<'_>, request: &LoadRequest<'_>) -> Result<Vec<String>, LoadError> {
    let maps: Vec<(String, ObjectMap<'_>)> = object.maps().into_iter().map(|map| (map.name(), map)).collect();
    for (name, map) in &maps {
        // What is pinned is the caller's decision.
        map.forget_pin().map_err(|e| LoadError::refused(name, e, ""))?;
    }
    for (name, fd) in request.maps {
        let Some((_, map)) = maps.iter().find(|(own, _)| own == name) else {
            return Err(LoadError::bad_object(name, "the object has no map of this name"));
        };
        map.reuse(*fd).map_err(|e| LoadError::refused(name, e, ""))?;
    }
    for program in object.programs() {
        let kind = program.kind();
        if ProgramKind::ALL.iter().all(|known| program::number(*known) != kind) {
            let reason = format!("program type {kind} is not one that this crate loads (0: its section is not known)");
            return Err(LoadError::bad_object(&program.name(), reason));
        }
    }
    Ok(maps.into_iter().map(|(name, _)| name).collect())
}

fn taken(object: &Object<'_>, names: Vec<String>) -> Result<Loaded, LoadError> {
    let mut loaded = Loaded::default();
    for program in object.programs() {
        let name = program.name();
        let fd = program.fd().and_then(|fd| fd.try_clone_to_owned()).map_err(|e| LoadError::refused(&name, e, ""))?;
        let program = Program::from_fd(fd).map_err(|e| LoadError::refused(&name, e.source, ""))?;
        loaded.programs.push((name, program));
    }
    for (name, map) in names.into_iter().zip(object.maps()) {
        let fd = map.fd().and_then(|fd| fd.try_clone_to_owned()).map_err(|e| LoadError::refused(&name, e, ""))?;
        let map = Map::from_fd(fd).map_err(|e| LoadError::refused(&name, e.source, ""))?;
        loaded.maps.push((name, map));
    }
    loaded.programs.sort_by(|a, b| a.0.cmp(&b.0));
    loaded.maps.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(loaded)
}

impl Failure {
    fn told(self, said: &[String]) -> LoadError {
        match self {
            Self::Known(error) => error,
            Self::Open(error) if is_about_us(&error) => LoadError::refused("", error, ""),
            Self::Open(error) => LoadError::bad_object("", reason(&error, said)),
            Self::Load { error, log } => match subject(said) {
                Some(name) => LoadError::refused(name, error, &log),
                // The kernel was not asked for a map or program of it yet.
                None if is_about_us(&error) => LoadError::refused("", error, &log),
                None => LoadError::bad_object("", reason(&error, said)),
            },
        }
    }
}

/// The name of the program or map that the kernel refused; empty where it was the program of nothing that libbpf loads before
/// all else. libbpf says so in words only (tools/lib/bpf/libbpf.c, `bpf_object_load_prog`, `bpf_object__create_map` and
/// `bpf_object__probe_loading`).
fn subject(said: &[String]) -> Option<&str> {
    said.iter().find_map(|message| {
        if message.starts_with("libbpf: Error in bpf_object__probe_loading()") {
            return Some("");
        }
        let (head, what) = message.split_once("': ")?;
        let (thing, name) = head.split_once(" '")?;
        let refused = match thing {
            "libbpf: prog" => what.starts_with("BPF program load failed"),
            "libbpf: map" => what.starts_with("failed to create"),
            _ => false,
        };
        refused.then_some(name)
    })
}

/// The words of libbpf, which say more than the errno: it has numbers of its own, from 4000 on, and EINVAL for the rest.
fn reason(error: &io::Error, said: &[String]) -> String {
    match said.last() {
        Some(message) => format!("{message} ({error})"),
        None => error.to_string(),
    }
}

fn is_about_us(error: &io::Error) -> bool {
    [libc::EPERM, libc::ENOMEM, libc::EMFILE, libc::ENFILE].iter().any(|errno| error.raw_os_error() == Some(*errno))
}

#[cfg(test)]
mod tests {
    use dcenet_core::test_support::{Rung, require};
    use object::write::{Object as Writer, Symbol, SymbolSection};
    use object::{Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope};

    use super::super::LoadErrorClass;
    use super::*;
    use crate::asm::Asm;
    use crate::insn::Reg::*;

    #[test]
    fn conforms() {
        if require(Rung::Kernel) {
            super::super::conformance::all(&LibbpfLoader);
        }
    }

    #[test]
    fn a_malformed_object_is_told_of_in_the_librarys_words() {
        let error = LibbpfLoader.load(&[0x42; 64], &LoadRequest::default()).expect_err("no object");
        let source = std::error::Error::source(&error).expect("a reason").to_string();
        assert!(source.contains("libbpf: elf"), "{source}");
    }

    #[test]
    fn a_kernel_that_takes_no_program_at_all_is_told_from_a_bad_object() {
        let class = |errno, said: &[&str]| {
            let failure = Failure::Load { error: io::Error::from_raw_os_error(errno), log: String::new() };
            let error = failure.told(&said.iter().map(|message| (*message).to_owned()).collect::<Vec<_>>());
            assert_eq!(error.subject(), "");
            error.class()
        };
        let said = ["libbpf: Error in bpf_object__probe_loading(): -EACCES. Couldn't load trivial BPF program."];
        assert_eq!(class(libc::EACCES, &said), LoadErrorClass::Permission);
        assert_eq!(class(libc::EPERM, &said), LoadErrorClass::Permission);
        for errno in [libc::ENOSYS, libc::EINVAL] {
            assert_eq!(class(errno, &said), LoadErrorClass::Unsupported);
        }
        assert_eq!(class(libc::ENOMEM, &said), LoadErrorClass::OutOfResources);
        // The twin: the same of something else, which libbpf refuses itself.
        let said = ["libbpf: sec 'classifier': failed to find program symbol at offset 0"];
        assert_eq!(class(libc::EINVAL, &said), LoadErrorClass::BadObject);
    }

    /// An object with a program of nothing, and constants.
    fn with_constants() -> Vec<u8> {
        let mut code = Asm::program("only", ProgramKind::Classifier);
        code.mov(R0, 0).exit();
        let code = crate::insn::encode(code.finish().expect("sound code").insns());
        let mut writer = Writer::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        let mut section = |name: &str, kind, data: Vec<u8>| {
            let section = writer.add_section(Vec::new(), name.as_bytes().to_vec(), kind);
            writer.set_section_data(section, data, 8);
            section
        };
        section("license", SectionKind::Data, b"GPL\0".to_vec());
        section(".rodata", SectionKind::ReadOnlyData, vec![7; 8]);
        let size = code.len() as u64;
        let text = section("classifier", SectionKind::Text, code);
        writer.add_symbol(Symbol {
            name: b"only".to_vec(),
            value: 0,
            size,
            kind: SymbolKind::Text,
            scope: SymbolScope::Dynamic,
            weak: false,
            section: SymbolSection::Section(text),
            flags: SymbolFlags::None,
        });
        writer.write().expect("an object")
    }

    #[test]
    fn a_map_that_is_a_section_has_its_name() {
        if !require(Rung::Kernel) {
            return;
        }
        let elf = with_constants();
        let names = |loader: &dyn Loader, elf: &[u8]| {
            let loaded = loader.load(elf, &LoadRequest::default()).expect("loads");
            loaded.maps.into_iter().map(|(name, map)| (name, map.info().name.clone())).collect::<Vec<_>>()
        };
        // Wherever the bytes are.
        for elf in [elf.clone(), elf.clone()] {
            assert_eq!(names(&LibbpfLoader, &elf), [(".rodata".to_owned(), ".rodata".to_owned())]);
        }
        #[cfg(feature = "aya")]
        assert_eq!(names(&super::super::AyaLoader, &elf), names(&LibbpfLoader, &elf));
    }
}
