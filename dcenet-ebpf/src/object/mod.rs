//! An object: programs, subprograms and maps, ready for a loader or for the [VM](crate::vm).
//!
//! [`Object::to_elf`] writes a standard BPF ELF file as `clang -target bpf` would, which aya, libbpf and bpftool load and
//! `llvm-objdump` reads: BTF-defined maps, BTF with a record per function,
//! line information where functions name their parts ([`Asm::mark`](crate::asm::Asm::mark)), and relocations for maps and
//! calls.
//! [`Object::link`] resolves all names in one piece.

mod btf;
mod chain;
mod elf;
mod link;
mod map;

use crate::asm::{Function, Role, Symbol};

pub use chain::{CallChain, MAX_ABOVE_TAIL_CALLS, MAX_CALL_FRAMES};
pub use link::Program;
pub(crate) use map::LPM_PREFIX_BYTES;
pub use map::{MapFlags, MapKind, MapSpec, Pinning};

/// The licence that every program of this crate's users may carry to call all helpers.
pub const LICENSE: &str = "Dual MIT/GPL";

/// Where the kernel runs a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProgramKind {
    /// Traffic control, clsact and tcx (`BPF_PROG_TYPE_SCHED_CLS`); section `classifier`, which both aya and libbpf know.
    Classifier,
    /// XDP (`BPF_PROG_TYPE_XDP`); section `xdp`.
    Xdp,
    /// A cgroup's arriving packets (`BPF_PROG_TYPE_CGROUP_SKB`); section `cgroup_skb/ingress`.
    CgroupSkbIngress,
    /// A cgroup's leaving packets (`BPF_PROG_TYPE_CGROUP_SKB`); section `cgroup_skb/egress`.
    CgroupSkbEgress,
    /// connect(2) on an IPv4 socket of a cgroup's processes (`BPF_PROG_TYPE_CGROUP_SOCK_ADDR`); section `cgroup/connect4`.
    Connect4,
    /// The same on an IPv6 socket, also to an IPv4 address mapped into one of IPv6 (`::ffff:0:0/96`); section `cgroup/connect6`.
    Connect6,
    /// sendto(2) and sendmsg(2) of a datagram to an IPv4 address, without a connection; section `cgroup/sendmsg4`.
    SendMsg4,
    /// The same to an IPv6 address; section `cgroup/sendmsg6`.
    SendMsg6,
}

impl ProgramKind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Classifier,
        Self::Xdp,
        Self::CgroupSkbIngress,
        Self::CgroupSkbEgress,
        Self::Connect4,
        Self::Connect6,
        Self::SendMsg4,
        Self::SendMsg6,
    ];

    /// The ELF section that tells loaders the kind.
    pub const fn section(self) -> &'static str {
        match self {
            Self::Classifier => "classifier",
            Self::Xdp => "xdp",
            Self::CgroupSkbIngress => "cgroup_skb/ingress",
            Self::CgroupSkbEgress => "cgroup_skb/egress",
            Self::Connect4 => "cgroup/connect4",
            Self::Connect6 => "cgroup/connect6",
            Self::SendMsg4 => "cgroup/sendmsg4",
            Self::SendMsg6 => "cgroup/sendmsg6",
        }
    }

    /// The kernel's type of the context.
    const fn context(self) -> &'static str {
        match self {
            Self::Xdp => "xdp_md",
            Self::Connect4 | Self::Connect6 | Self::SendMsg4 | Self::SendMsg6 => "bpf_sock_addr",
            _ => "__sk_buff",
        }
    }
}

/// Why an object cannot be made of its parts.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// A name that is no C identifier, or a map's name of more than the kernel's 15 bytes.
    #[error("name {name:?}: {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Two maps or functions have one name.
    #[error("name {name:?} is used twice in one object")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A map that no kernel would make.
    #[error("map {map}: {field} is {value}: {reason}")]
    Map {
        /// The map's name.
        map: String,
        /// The field of [`MapSpec`].
        field: &'static str,
        /// Its value.
        value: u32,
        /// What would be accepted.
        reason: &'static str,
    },
    /// A function refers to a map or function that the object does not have, or calls a program.
    #[error("function {function} refers to {symbol:?}, which is no map or subprogram of the object")]
    Unresolved {
        /// The function's name.
        function: String,
        /// What it refers to.
        symbol: Symbol,
    },
    /// The object has no program of this name.
    #[error("the object has no program {name:?}")]
    NoProgram {
        /// The name.
        name: String,
    },
    /// A function calls itself, by way of others or not; the verifier refuses that.
    #[error("function {function} calls itself, by way of others or not; unroll it, or use bpf_loop")]
    Recursion {
        /// One of the functions.
        function: String,
    },
    /// Writing the ELF file failed.
    #[error("the ELF file cannot be written")]
    Write {
        /// The writer's error.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Programs, the functions that they call, and the maps that they share.
#[derive(Debug, Clone)]
pub struct Object {
    license: String,
    maps: Vec<MapSpec>,
    functions: Vec<Function>,
}

impl Default for Object {
    fn default() -> Self {
        Self::new()
    }
}

impl Object {
    /// An empty object under [`LICENSE`].
    pub fn new() -> Self {
        Self { license: LICENSE.to_owned(), maps: Vec::new(), functions: Vec::new() }
    }

    /// Sets the licence of the programs; the kernel gives some helpers only to GPL-compatible ones.
    pub fn license(&mut self, license: impl Into<String>) -> &mut Self {
        self.license = license.into();
        self
    }

    /// Adds a map.
    ///
    /// # Errors
    /// [`ObjectError::Name`], [`ObjectError::Duplicate`] and [`ObjectError::Map`].
    pub fn add_map(&mut self, map: MapSpec) -> Result<&mut Self, ObjectError> {
        map.check()?;
        self.check_name(&map.name)?;
        self.maps.push(map);
        Ok(self)
    }

    /// Adds a program or subprogram. What it refers to may be added later.
    ///
    /// # Errors
    /// [`ObjectError::Name`] and [`ObjectError::Duplicate`].
    pub fn add(&mut self, function: Function) -> Result<&mut Self, ObjectError> {
        self.check_name(function.name())?;
        self.functions.push(function);
        Ok(self)
    }

    /// The maps, in the order of their addition: the index is the map's number in a linked [`Program`].
    pub fn maps(&self) -> &[MapSpec] {
        &self.maps
    }

    /// The functions, in the order of their addition.
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// Writes the object as an ELF file, the same bytes for the same object.
    ///
    /// # Errors
    /// [`ObjectError::Unresolved`]; [`ObjectError::Write`] beyond the format's limits.
    pub fn to_elf(&self) -> Result<Vec<u8>, ObjectError> {
        self.check_references()?;
        elf::write(self)
    }

    /// Puts a program and all that it calls in one piece, names resolved.
    ///
    /// # Errors
    /// [`ObjectError::NoProgram`] and [`ObjectError::Unresolved`].
    pub fn link(&self, program: &str) -> Result<Program, ObjectError> {
        self.check_references()?;
        link::link(self, program)
    }

    /// The chain of calls from a program that takes the most stack, callbacks of helpers counted as calls;
    /// [`CallChain::fits`] tells whether the verifier of every kernel takes it.
    ///
    /// # Errors
    /// [`ObjectError::NoProgram`], [`ObjectError::Unresolved`] and [`ObjectError::Recursion`].
    pub fn deepest_chain(&self, program: &str) -> Result<CallChain, ObjectError> {
        self.check_references()?;
        if !self.functions.iter().any(|f| f.name() == program && matches!(f.role(), Role::Program(_))) {
            return Err(ObjectError::NoProgram { name: program.to_owned() });
        }
        chain::deepest(self, program)
    }

    fn check_references(&self) -> Result<(), ObjectError> {
        for function in &self.functions {
            for reference in function.references() {
                let known = match &reference.symbol {
                    Symbol::Map(name) => self.map_index(name).is_some(),
                    Symbol::Function(name) => {
                        self.functions.iter().any(|f| f.name() == name && !matches!(f.role(), Role::Program(_)))
                    }
                };
                if !known {
                    let function = function.name().to_owned();
                    return Err(ObjectError::Unresolved { function, symbol: reference.symbol.clone() });
                }
            }
        }
        Ok(())
    }

    fn map_index(&self, name: &str) -> Option<usize> {
        self.maps.iter().position(|map| map.name == name)
    }

    fn check_name(&self, name: &str) -> Result<(), ObjectError> {
        let error = |reason| Err(ObjectError::Name { name: name.to_owned(), reason });
        if !name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        {
            return error("not a C identifier (letters, digits and _, no digit first)");
        }
        let taken = self.maps.iter().map(|map| map.name.as_str()).chain(self.functions.iter().map(Function::name));
        if taken.into_iter().any(|taken| taken == name) {
            return Err(ObjectError::Duplicate { name: name.to_owned() });
        }
        Ok(())
    }
}
