//! A bpffs of our own, where programs and maps outlive the process.
//!
//! The usual mount at `/sys/fs/bpf` is no place for this: `ip netns exec` mounts a fresh sysfs and hides it, and it is
//! shared with everybody. Pins stay until they are removed, the file system is unmounted, or the machine restarts.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::sys::fault::gated;
use crate::sys::{self, SysError};

/// Where pins are unless the configuration says otherwise.
pub const DEFAULT_DIRECTORY: &str = "/run/dcenet/bpf";

/// A directory of pins: a bpffs mounted for us alone.
#[derive(Debug, Clone)]
pub struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// Makes the directory and mounts a bpffs at it, unless that is done already. Any number of processes may do so at
    /// once.
    ///
    /// # Errors
    /// Mounting needs CAP_SYS_ADMIN in the first user namespace; `EPERM` otherwise.
    ///
    /// # Minimum kernel version
    /// 4.4.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, PinError> {
        let pins = Self { directory: directory.into() };
        let failed = |source| PinError { doing: "make the pin directory", path: pins.directory.clone(), source };
        gated("mkdir", || DirBuilder::new().recursive(true).mode(0o700).create(&pins.directory)).map_err(failed)?;
        if sys::is_bpffs(&pins.directory).map_err(failed)? {
            return Ok(pins);
        }
        // Whoever gets here at the same time has opened the same underlying directory, and waits for its lock.
        let lock = gated("lock", || {
            let under = File::open(&pins.directory)?;
            under.lock()?;
            Ok(under)
        })
        .map_err(failed)?;
        if !sys::is_bpffs(&pins.directory).map_err(failed)? {
            sys::mount_bpffs(&pins.directory).map_err(failed)?;
        }
        drop(lock);
        Ok(pins)
    }

    /// Names a directory that somebody else has made and mounted, or will. Makes nothing: where it is missing, so are
    /// all pins.
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// Where it is mounted.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Pins a program, map or link under a name that is free.
    ///
    /// # Errors
    /// `EEXIST` where it is not.
    pub fn pin(&self, name: &str, object: impl AsFd) -> Result<(), PinError> {
        let path = self.path(name)?;
        sys::pin(object.as_fd(), &path).map_err(|source| PinError { doing: "pin", path, source })
    }

    /// Pins under a name in place of what is pinned there: whoever opens it gets the old or the new object.
    pub fn replace(&self, name: &str, object: impl AsFd) -> Result<(), PinError> {
        let path = self.path(name)?;
        // A bpffs refuses dots in names, and ours have no comma: nobody's pin is in the way but one of a process that
        // died here.
        let thread = format!("{:?}", std::thread::current().id());
        let number: String = thread.chars().filter(char::is_ascii_digit).collect();
        let fresh = self.directory.join(format!("{name}{TEMPORARY}{}-{number}", std::process::id()));
        let failed = |source| PinError { doing: "pin in place of another", path: path.clone(), source };
        remove(&fresh).map_err(failed)?;
        sys::pin(object.as_fd(), &fresh).map_err(failed)?;
        gated("rename", || std::fs::rename(&fresh, &path)).map_err(|error| {
            if let Err(left) = remove(&fresh) {
                tracing::warn!(path = %fresh.display(), error = %left, "a temporary pin stays");
            }
            failed(error)
        })
    }

    /// Gives a pin another name, in place of what is pinned there.
    ///
    /// # Errors
    /// `ENOENT` where there is no such pin.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), PinError> {
        let (from, to) = (self.path(from)?, self.path(to)?);
        gated("rename", || std::fs::rename(&from, &to)).map_err(|source| PinError {
            doing: "rename the pin",
            path: from,
            source,
        })
    }

    /// Opens what is pinned under a name; none where nothing is. [`crate::program::Program::from_fd`] and
    /// [`crate::maps::Map::from_fd`] tell what it is.
    pub fn get(&self, name: &str) -> Result<Option<OwnedFd>, PinError> {
        let path = self.path(name)?;
        match sys::open_pin(&path) {
            Ok(fd) => Ok(Some(fd)),
            Err(e) if e.is(libc::ENOENT) => Ok(None),
            Err(source) => Err(PinError { doing: "open the pin", path, source }),
        }
    }

    /// Removes a pin; `false` where there was none. The object lives on while something else holds it.
    pub fn remove(&self, name: &str) -> Result<bool, PinError> {
        let path = self.path(name)?;
        remove(&path).map_err(|source| PinError { doing: "remove the pin", path, source })
    }

    /// The names of all pins, sorted.
    pub fn list(&self) -> Result<Vec<String>, PinError> {
        let read = || {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&self.directory)? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                // Names with a dot are the kernel's own (kernel/bpf/inode.c, `populate_bpffs`).
                if !name.contains(TEMPORARY) && !name.contains('.') {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        };
        gated("readdir", read).map_err(|source| PinError { doing: "list pins", path: self.directory.clone(), source })
    }

    /// Takes the file system away with all pins in it, and the directory. Repeating it is allowed.
    pub fn unmount(self) -> Result<(), PinError> {
        let failed = |source| PinError { doing: "unmount", path: self.directory.clone(), source };
        match sys::is_bpffs(&self.directory) {
            Ok(true) => sys::unmount(&self.directory).map_err(failed)?,
            Ok(false) => {}
            Err(e) if e.is(libc::ENOENT) => return Ok(()),
            Err(e) => return Err(failed(e)),
        }
        match gated("rmdir", || std::fs::remove_dir(&self.directory)) {
            Ok(()) => Ok(()),
            Err(e) if e.is(libc::ENOENT) => Ok(()),
            Err(e) => Err(failed(e)),
        }
    }

    fn path(&self, name: &str) -> Result<PathBuf, PinError> {
        let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if name.is_empty() || name.len() > NAME_BYTES || !name.bytes().all(fits) {
            let reason = format!("pin name {name:?}: want 1 to {NAME_BYTES} letters, digits, '-' and '_'");
            let source = SysError { call: "pin", source: io::Error::new(io::ErrorKind::InvalidInput, reason) };
            return Err(PinError { doing: "pin", path: self.directory.clone(), source });
        }
        Ok(self.directory.join(name))
    }
}

/// Why a pin, or the place for pins, could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {}: {source}", path.display())]
pub struct PinError {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: SysError,
}

impl PinError {
    pub(crate) fn new(doing: &'static str, path: &Path, source: SysError) -> Self {
        Self { doing, path: path.to_owned(), source }
    }

    /// The errno behind the error, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

fn remove(path: &Path) -> Result<bool, SysError> {
    match gated("unlink", || std::fs::remove_file(path)) {
        Ok(()) => Ok(true),
        Err(e) if e.is(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Between a name and the number of the process that replaces it.
const TEMPORARY: char = ',';
/// Leaves room for the temporary name in the 255 bytes of a file name.
const NAME_BYTES: usize = 200;
