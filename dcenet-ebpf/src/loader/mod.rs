//! From an object file to programs and maps in the kernel.
//!
//! ELF bytes are the boundary: whatever wrote the object (this crate, clang, bpf-linker), a [`Loader`] makes its maps,
//! relocates its code and hands it to the verifier. What comes back are plain descriptors, so no backend's types spread,
//! and what outlives the process is decided by the caller, by pinning ([`crate::pin::Pins`]) and
//! attaching ([`crate::attach`]).
//!
//! Maps are shared by handing in descriptors: of a map that another object made, or of one opened from a pin after a
//! restart.
//!
//! | Backend | Feature | Needs for building | Differs in |
//! |---|---|---|---|
//! | `AyaLoader` | `aya` (default) | cargo alone | parses the kernel's BTF once per process, 20 ms |
//! | `LibbpfLoader` | `libbpf` | gcc, make, pkg-config, headers of libelf and zlib | links libelf and zlib |
//!
//! What every backend must do is written down as tests in `conformance` (feature `test-support`), which a backend of
//! somebody else's can run too.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use crate::maps::Map;
use crate::program::Program;

#[cfg(any(feature = "aya", feature = "libbpf"))]
mod aligned;
#[cfg(feature = "aya")]
mod aya;
#[cfg(any(test, feature = "test-support"))]
pub mod conformance;
#[cfg(feature = "libbpf")]
mod libbpf;

#[cfg(feature = "aya")]
pub use self::aya::AyaLoader;
#[cfg(feature = "libbpf")]
pub use self::libbpf::LibbpfLoader;

/// Loads object files. Synchronous: bpf(2) is a short blocking call, milliseconds for the largest programs.
pub trait Loader: Send + Sync {
    /// Makes the object's maps, but for those that the request hands in, and loads all its programs.
    ///
    /// The same object may be loaded any number of times; each time gives new programs and new maps. An implementor
    /// attaches and pins nothing, and leaves nothing behind when it fails: maps and programs are freed with the last
    /// descriptor.
    ///
    /// # Errors
    /// [`LoadErrorClass`] says what can be done about it.
    fn load(&self, elf: &[u8], request: &LoadRequest<'_>) -> Result<Loaded, LoadError>;
}

/// What a load uses beside the object.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadRequest<'a> {
    /// Maps to use in place of new ones, by their names in the object. The verifier checks every access by the sizes of
    /// the map that it is given; that the type and the number of entries suit the program is the caller's duty
    /// ([`Map::info`]).
    pub maps: &'a [(&'a str, BorrowedFd<'a>)],
}

/// What a load gave.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The object's programs, by name.
    pub programs: Vec<(String, Program)>,
    /// The object's maps, those handed in included, by name.
    pub maps: Vec<(String, Map)>,
}

impl Loaded {
    /// Takes a program out.
    pub fn take_program(&mut self, name: &str) -> Option<Program> {
        let place = self.programs.iter().position(|(n, _)| n == name)?;
        Some(self.programs.swap_remove(place).1)
    }

    /// Takes a map out.
    pub fn take_map(&mut self, name: &str) -> Option<Map> {
        let place = self.maps.iter().position(|(n, _)| n == name)?;
        Some(self.maps.swap_remove(place).1)
    }
}

/// Why an object was not loaded.
#[derive(Debug)]
pub struct LoadError {
    class: LoadErrorClass,
    subject: String,
    log: String,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// What kind of failure a [`LoadError`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LoadErrorClass {
    /// The object is malformed, lacks something, or contradicts the request.
    BadObject,
    /// The kernel is out of memory, or a limit of the process (descriptors, locked memory before Linux 5.11) is hit.
    OutOfResources,
    /// CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN, are missing, or a security module forbids it.
    Permission,
    /// The program is beyond what the verifier looks at: too many instructions, or too many branches in one path.
    TooLarge,
    /// The kernel lacks an instruction, a helper, a map type or a program type.
    Unsupported,
    /// The verifier found a fault in the program; its log says which.
    Verifier,
}

impl fmt::Display for LoadErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BadObject => "the object cannot be used",
            Self::OutOfResources => "out of memory or descriptors",
            Self::Permission => "not permitted (CAP_BPF and CAP_NET_ADMIN are needed)",
            Self::TooLarge => "too large for the verifier",
            Self::Unsupported => "the kernel lacks a feature that it uses",
            Self::Verifier => "refused by the verifier",
        })
    }
}

impl LoadError {
    /// An object that cannot be used, whatever the kernel.
    pub fn bad_object(subject: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self {
            class: LoadErrorClass::BadObject,
            subject: subject.to_owned(),
            log: String::new(),
            source: source.into(),
        }
    }

    /// A program or map that the kernel refused; the errno and the log decide on the class.
    pub fn refused(subject: &str, source: io::Error, log: &str) -> Self {
        let class = classify(source.raw_os_error(), log);
        Self { class, subject: subject.to_owned(), log: tail(log).to_owned(), source: source.into() }
    }

    /// What kind of failure it is.
    pub fn class(&self) -> LoadErrorClass {
        self.class
    }

    /// The program or map that failed; empty where it was the object as a whole.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The end of the verifier's log, in whole lines, at most 4 KiB; empty where it did not come to that.
    pub fn log(&self) -> &str {
        &self.log
    }

    /// The errno behind the error, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        let mut error: Option<&(dyn std::error::Error + 'static)> = Some(&*self.source);
        while let Some(e) = error {
            if let Some(io) = e.downcast_ref::<io::Error>() {
                return io.raw_os_error();
            }
            error = e.source();
        }
        None
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { class, subject, log, source: _ } = self;
        if subject.is_empty() {
            write!(f, "loading the object: {class}")?;
        } else {
            write!(f, "loading {subject}: {class}")?;
        }
        // The last line is the verifier's statistics, the one before it the reason.
        match log.lines().rev().find(|l| !l.trim().is_empty() && !is_statistics(l)) {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for LoadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.source)
    }
}

/// The errno alone does not tell a fault from a limit: the verifier answers EFAULT or E2BIG to a program that is too
/// complex, EACCES and EINVAL to a fault, and EINVAL also to what the kernel does not know (kernel/bpf/verifier.c).
fn classify(errno: Option<i32>, log: &str) -> LoadErrorClass {
    let says = |phrases: &[&str]| phrases.iter().any(|p| log.contains(p));
    if says(&["is too complex", "program is too large", "too many states", "Processed insn limit"]) {
        return LoadErrorClass::TooLarge;
    }
    if says(&["invalid func ", "unknown func ", "unknown opcode", "program of this type cannot use helper"]) {
        return LoadErrorClass::Unsupported;
    }
    match errno {
        Some(libc::E2BIG) => LoadErrorClass::TooLarge,
        Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSPC) => LoadErrorClass::OutOfResources,
        Some(libc::EPERM) => LoadErrorClass::Permission,
        _ if log.lines().any(|l| !is_statistics(l) && !l.trim().is_empty()) => LoadErrorClass::Verifier,
        Some(libc::EACCES) => LoadErrorClass::Permission,
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS | ENOTSUPP) => LoadErrorClass::Unsupported,
        _ => LoadErrorClass::BadObject,
    }
}

fn is_statistics(line: &str) -> bool {
    line.starts_with("processed ") || line.starts_with("verification time ") || line.starts_with("stack depth ")
}

fn tail(log: &str) -> &str {
    let log = log.trim_end();
    let Some(excess) = log.len().checked_sub(LOG_TAIL_BYTES) else { return log };
    let start = log.as_bytes()[excess..].iter().position(|&b| b == b'\n').map_or(log.len(), |n| excess + n + 1);
    &log[start..]
}

/// Answered by some commands; not part of user space's errno.h (include/linux/errno.h).
const ENOTSUPP: i32 = 524;
const LOG_TAIL_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complex_program_is_too_large_whatever_its_errno() {
        let log = "0: R1=ctx()\nThe sequence of 8193 jumps is too complex.\nprocessed 8200 insns (limit 1000000)\n";
        let error = LoadError::refused("p", io::Error::from_raw_os_error(libc::EFAULT), log);
        assert_eq!(error.class(), LoadErrorClass::TooLarge);
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        assert_eq!(
            error.to_string(),
            "loading p: too large for the verifier: The sequence of 8193 jumps is too complex."
        );
    }

    #[test]
    fn an_access_error_with_a_log_is_the_verifiers_and_without_one_a_permission() {
        let refused = |errno, log| LoadError::refused("p", io::Error::from_raw_os_error(errno), log).class();
        assert_eq!(refused(libc::EACCES, "R0 !read_ok\nprocessed 1 insns"), LoadErrorClass::Verifier);
        assert_eq!(refused(libc::EACCES, "processed 0 insns"), LoadErrorClass::Permission);
        assert_eq!(refused(libc::EPERM, ""), LoadErrorClass::Permission);
        assert_eq!(refused(libc::EINVAL, ""), LoadErrorClass::Unsupported);
        assert_eq!(refused(libc::EINVAL, "invalid func bpf_loop#181"), LoadErrorClass::Unsupported);
        assert_eq!(refused(libc::ENOMEM, ""), LoadErrorClass::OutOfResources);
    }

    #[test]
    fn the_tail_of_a_long_log_starts_on_a_line_also_between_wide_characters() {
        let log = "\u{e4}\u{e4}\n".repeat(3000);
        let error = LoadError::refused("p", io::Error::from_raw_os_error(libc::EINVAL), &log);
        assert!(error.log().len() <= LOG_TAIL_BYTES && error.log().starts_with('\u{e4}'), "{:?}", error.log());
        let one_line = "x".repeat(10_000);
        assert_eq!(LoadError::refused("p", io::Error::from_raw_os_error(libc::EINVAL), &one_line).log(), "");
    }
}
