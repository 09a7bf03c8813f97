//! The backend over aya.
//!
//! aya takes shared maps by pin path only, so descriptors that are handed in are pinned for the moment of the load, in a
//! bpffs of the process's own that no directory shows. The aya loader itself is made once per process: it parses the
//! kernel's BTF, which takes 20 ms.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

use aya::maps::{Map as AyaMap, MapError};
use aya::programs::{Program as AyaProgram, ProgramError};
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};

use super::aligned::Aligned;
use super::{LoadError, LoadRequest, Loaded, Loader};
use crate::maps::Map;
use crate::program::Program;
use crate::sys;

/// Loads objects with aya: section `classifier` for classifiers, `xdp` for XDP, `cgroup_skb/ingress` and
/// `cgroup_skb/egress`, `cgroup/connect4` and its like; maps either BTF-defined in `.maps` or in aya's own section `maps`.
///
/// # Minimum kernel version
/// 5.2 where maps are handed in (fsopen(2)), otherwise what the object needs.
#[derive(Debug, Clone, Copy, Default)]
pub struct AyaLoader;

/// What all loads of the process share.
struct Shared {
    loader: EbpfLoader<'static>,
    /// Made by the first load.
    scratch: Option<Scratch>,
}

/// The private bpffs, and the file name that each map name has in it. aya keeps names for as long as its loader lives;
/// there are as many as the process has kinds of shared maps.
struct Scratch {
    mount: OwnedFd,
    names: HashMap<&'static str, PathBuf>,
}

impl Loader for AyaLoader {
    fn load(&self, elf: &[u8], request: &LoadRequest<'_>) -> Result<Loaded, LoadError> {
        // aya reads the object's tables in place.
        let aligned = Aligned::new(elf);
        let elf = aligned.bytes();
        let mut ebpf = {
            // A panic inside aya leaves at worst pins in the scratch, which the next load removes first.
            let mut shared = shared().lock().unwrap_or_else(PoisonError::into_inner);
            shared.open(elf, request)?
        };
        // Verifying is the slow part, and happens outside the lock. The kernel verifies programs of who has CAP_BPF and
        // CAP_PERFMON side by side (kernel/bpf/verifier.c, `bpf_check`).
        let mut loaded = Loaded::default();
        let verified: Vec<_> = std::thread::scope(|scope| {
            let mut programs = ebpf.programs_mut();
            let first = programs.next();
            let others: Vec<_> =
                programs.map(|(name, program)| (name.to_owned(), scope.spawn(move || verify(name, program)))).collect();
            let first = first.map(|(name, program)| (name.to_owned(), verify(name, program)));
            let others = others.into_iter().map(|(name, thread)| {
                let verified = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                (name, verified)
            });
            first.into_iter().chain(others).collect()
        });
        for (name, verified) in verified {
            loaded.programs.push((name, verified?));
        }
        for (name, map) in ebpf.maps() {
            let fd = map_fd(map).try_clone_to_owned().map_err(|e| LoadError::refused(name, e, ""))?;
            let map = Map::from_fd(fd).map_err(|e| LoadError::refused(name, e.source, ""))?;
            loaded.maps.push((name.to_owned(), map));
        }
        for (name, _) in request.maps {
            if !loaded.maps.iter().any(|(n, _)| n == name) {
                return Err(LoadError::bad_object(name, "the object has no map of this name"));
            }
        }
        loaded.programs.sort_by(|a, b| a.0.cmp(&b.0));
        loaded.maps.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(loaded)
    }
}

impl Shared {
    fn open(&mut self, elf: &[u8], request: &LoadRequest<'_>) -> Result<Ebpf, LoadError> {
        let Self { loader, scratch } = self;
        let scratch = match scratch {
            Some(scratch) => scratch,
            None => {
                let mount = sys::private_bpffs().map_err(|e| LoadError::refused("the private bpffs", e.source, ""))?;
                let scratch = scratch.insert(Scratch { mount, names: HashMap::new() });
                // Where aya puts maps that the object wants pinned: what is pinned is the caller's decision.
                loader.default_map_pin_directory(scratch.directory());
                scratch
            }
        };
        scratch.clear().map_err(|e| LoadError::refused("the private bpffs", e, ""))?;
        for (name, map) in request.maps {
            let path = scratch.path(name, loader);
            sys::pin(*map, &path).map_err(|e| LoadError::refused(name, e.source, ""))?;
        }
        let loaded = loader.load(elf).map_err(object_error);
        // aya pins what it finds no pin for, when the name was once a shared map's or the object asks for it.
        scratch.clear().map_err(|e| LoadError::refused("the private bpffs", e, ""))?;
        loaded
    }
}

impl Scratch {
    fn directory(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.mount.as_raw_fd()))
    }

    fn path(&mut self, name: &str, loader: &mut EbpfLoader<'static>) -> PathBuf {
        if let Some(path) = self.names.get(name) {
            return path.clone();
        }
        let path = self.directory().join(format!("map{}", self.names.len()));
        let kept: &'static str = Box::leak(name.to_owned().into_boxed_str());
        loader.map_pin_path(kept, path.clone());
        self.names.insert(kept, path.clone());
        path
    }

    fn clear(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(self.directory())? {
            let entry = entry?;
            // Names with a dot are the kernel's own (kernel/bpf/inode.c, `populate_bpffs`), and it refuses them to us.
            if !entry.file_name().as_bytes().contains(&b'.') {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

fn shared() -> &'static Mutex<Shared> {
    static SHARED: OnceLock<Mutex<Shared>> = OnceLock::new();
    SHARED.get_or_init(|| {
        let mut loader = EbpfLoader::new();
        // aya asks for a log only after a refusal; the state of every instruction is what makes it readable.
        loader.verifier_log_level(VerifierLogLevel::DEBUG | VerifierLogLevel::STATS).allow_unsupported_maps();
        Mutex::new(Shared { loader, scratch: None })
    })
}

fn verify(name: &str, program: &mut AyaProgram) -> Result<Program, LoadError> {
    let done = match program {
        AyaProgram::SchedClassifier(p) => p.load().and_then(|()| p.fd()),
        AyaProgram::Xdp(p) => p.load().and_then(|()| p.fd()),
        AyaProgram::CgroupSkb(p) => p.load().and_then(|()| p.fd()),
        AyaProgram::CgroupSockAddr(p) => p.load().and_then(|()| p.fd()),
        other => {
            let reason = format!("program type {:?} is not one that this crate loads", other.prog_type());
            return Err(LoadError::bad_object(name, reason));
        }
    };
    let fd = done.map_err(|e| program_error(name, e))?;
    let fd = fd.as_fd().try_clone_to_owned().map_err(|e| LoadError::refused(name, e, ""))?;
    Program::from_fd(fd).map_err(|e| LoadError::refused(name, e.source, ""))
}

fn program_error(name: &str, error: ProgramError) -> LoadError {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            LoadError::refused(name, io_error, &verifier_log.to_string())
        }
        ProgramError::SyscallError(e) => LoadError::refused(name, e.io_error, ""),
        other => LoadError::bad_object(name, other),
    }
}

fn object_error(error: EbpfError) -> LoadError {
    match error {
        EbpfError::MapError(MapError::CreateError { name, io_error }) => LoadError::refused(&name, io_error, ""),
        EbpfError::MapError(MapError::SyscallError(e)) => LoadError::refused(e.call, e.io_error, ""),
        other => LoadError::bad_object("", other),
    }
}

fn map_fd(map: &AyaMap) -> BorrowedFd<'_> {
    match map {
        AyaMap::Array(m)
        | AyaMap::ArrayOfMaps(m)
        | AyaMap::BloomFilter(m)
        | AyaMap::CgroupArray(m)
        | AyaMap::CgroupStorage(m)
        | AyaMap::CgrpStorage(m)
        | AyaMap::CpuMap(m)
        | AyaMap::DevMap(m)
        | AyaMap::DevMapHash(m)
        | AyaMap::HashMap(m)
        | AyaMap::HashOfMaps(m)
        | AyaMap::InodeStorage(m)
        | AyaMap::LpmTrie(m)
        | AyaMap::LruHashMap(m)
        | AyaMap::PerCpuArray(m)
        | AyaMap::PerCpuCgroupStorage(m)
        | AyaMap::PerCpuHashMap(m)
        | AyaMap::PerCpuLruHashMap(m)
        | AyaMap::PerfEventArray(m)
        | AyaMap::ProgramArray(m)
        | AyaMap::Queue(m)
        | AyaMap::ReusePortSockArray(m)
        | AyaMap::RingBuf(m)
        | AyaMap::SockHash(m)
        | AyaMap::SockMap(m)
        | AyaMap::SkStorage(m)
        | AyaMap::Stack(m)
        | AyaMap::StackTraceMap(m)
        | AyaMap::Unsupported(m)
        | AyaMap::XskMap(m) => m.fd().as_fd(),
    }
}

#[cfg(test)]
mod tests {
    use dcenet_core::test_support::{Rung, require};

    use super::*;

    #[test]
    fn conforms() {
        if require(Rung::Kernel) {
            super::super::conformance::all(&AyaLoader);
        }
    }
}
