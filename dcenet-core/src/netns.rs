//! Network namespaces, without an ambient one.
//!
//! Which namespace a system call acts on is a property of the calling thread. Nothing in this crate relies on it: a
//! [`NetNs`] is passed to whatever acts, sockets are opened in it and stay bound to it, and other code runs in it on a
//! thread that dies afterwards.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::netlink::{Family, NetlinkError, Socket};
use crate::sys;

/// An open network namespace. It lives for as long as this handle.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    id: NetNsId,
}

/// What identifies a network namespace while it lives: the kernel may give a later one the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetNsId {
    /// The device of nsfs.
    pub dev: u64,
    /// The inode in it.
    pub inode: u64,
}

impl NetNs {
    /// Opens the namespace at a path such as `/run/netns/NAME` or `/proc/PID/ns/net`. Creates nothing.
    ///
    /// # Errors
    /// [`NetNsError::Open`], with `NotFound` where the namespace is gone; [`NetNsError::NotANamespace`] where something
    /// else is there, as a runtime leaves the empty file when it unmounts the namespace.
    ///
    /// # Minimum kernel version
    /// 4.11 (`NS_GET_NSTYPE`).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetNsError> {
        let path = path.as_ref();
        let failed = |source| NetNsError::Open { path: path.to_owned(), source };
        // Not blocking, lest a FIFO in this place stops us for ever.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        if !sys::is_netns(file.as_fd()).map_err(failed)? {
            return Err(NetNsError::NotANamespace { path: path.to_owned() });
        }
        let metadata = file.metadata().map_err(failed)?;
        Ok(Self { id: NetNsId { dev: metadata.dev(), inode: metadata.ino() }, file })
    }

    /// Makes a new, empty namespace and mounts it at `path`, where it stays until [`NetNs::remove`], whoever uses it.
    /// The file is made; its directory must be there.
    ///
    /// # Errors
    /// [`NetNsError::Create`], where the path exists already too; nothing is left behind.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, NetNsError> {
        let path = path.as_ref();
        let failed = |source| NetNsError::Create { path: path.to_owned(), source };
        let target = CString::new(path.as_os_str().as_bytes()).map_err(|e| failed(e.into()))?;
        OpenOptions::new().write(true).create_new(true).open(path).map_err(failed)?;
        let made = std::thread::scope(|scope| {
            let maker = scope.spawn(|| {
                sys::unshare_netns()?;
                sys::bind_mount(c"/proc/thread-self/ns/net", &target)
            });
            maker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        if let Err(source) = made {
            // The file is ours, made above, and empty.
            let _ = std::fs::remove_file(path);
            return Err(failed(source));
        }
        Self::open(path)
    }

    /// Unmounts the namespace at `path` and removes the file. The namespace goes when nobody uses it any more. A path
    /// that does not exist, and a file on which nothing is mounted, are no errors.
    pub fn remove(path: impl AsRef<Path>) -> Result<(), NetNsError> {
        let path = path.as_ref();
        let failed = |source| NetNsError::Remove { path: path.to_owned(), source };
        let target = CString::new(path.as_os_str().as_bytes()).map_err(|e| failed(e.into()))?;
        match sys::unmount(&target) {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
                return Err(failed(error));
            }
            _ => {}
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// Opens the namespace of the calling thread.
    pub fn of_this_thread() -> Result<Self, NetNsError> {
        Self::open(THREAD)
    }

    /// The file that stands for it.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Its identity.
    pub fn id(&self) -> NetNsId {
        self.id
    }

    /// Whether the calling thread is in it.
    pub fn is_current(&self) -> Result<bool, NetNsError> {
        let path = Path::new(THREAD);
        let metadata = path.metadata().map_err(|source| NetNsError::Open { path: path.to_owned(), source })?;
        Ok(self.id == NetNsId { dev: metadata.dev(), inode: metadata.ino() })
    }

    /// Runs `f` in the namespace, on a fresh thread that ends with it: no panic or early return can leave a thread
    /// behind in the wrong namespace. Costs some 30 us.
    ///
    /// # Panics
    /// As `f` does.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R, NetNsError> {
        std::thread::scope(|scope| {
            let worker = std::thread::Builder::new().name("dcenet-netns".into()).spawn_scoped(scope, || {
                sys::enter_netns(self.file.as_fd())?;
                Ok(f())
            });
            let worker = worker.map_err(NetNsError::Enter)?;
            match worker.join() {
                Ok(result) => result.map_err(NetNsError::Enter),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Runs `f` in the namespace: here where the calling thread is in it already, else as [`run`](Self::run) does.
    pub fn run_here_or_there<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R, NetNsError> {
        if self.is_current()? { Ok(f()) } else { self.run(f) }
    }

    /// Opens a netlink socket in the namespace. The socket stays bound to it, whichever thread uses it.
    pub fn socket(&self, family: Family) -> Result<Socket, NetNsError> {
        Ok(self.run_here_or_there(|| Socket::open_here(family))??)
    }

    /// Opens a netlink socket in the namespace by moving this thread there and back to `home`, which costs 3 us
    /// instead of 30. See [`NetNsGuard`] for when it is right.
    pub fn socket_in_place(&self, home: &NetNs, family: Family) -> Result<Socket, NetNsError> {
        let guard = NetNsGuard::enter(self, home)?;
        let socket = Socket::open_here(family);
        drop(guard);
        Ok(socket?)
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Keeps the calling thread in a namespace until it is dropped.
///
/// For programs of one thread that count microseconds: `/proc/self/net` of the whole process follows its first thread.
/// Others use [`NetNs::run`]. The guard cannot leave its thread.
#[derive(Debug)]
pub struct NetNsGuard<'a> {
    home: &'a NetNs,
    not_send: PhantomData<*const ()>,
}

impl<'a> NetNsGuard<'a> {
    /// Moves the calling thread into `namespace`; dropping the guard moves it back to `home`.
    ///
    /// # Errors
    /// [`NetNsError::NotHome`] where the thread is not in `home` now.
    pub fn enter(namespace: &NetNs, home: &'a NetNs) -> Result<Self, NetNsError> {
        if !home.is_current()? {
            return Err(NetNsError::NotHome);
        }
        sys::enter_netns(namespace.as_fd()).map_err(NetNsError::Enter)?;
        Ok(Self { home, not_send: PhantomData })
    }
}

impl Drop for NetNsGuard<'_> {
    fn drop(&mut self) {
        if let Err(error) = sys::enter_netns(self.home.as_fd()) {
            // Whatever this thread did next would be done to a pod instead of the host.
            tracing::error!(%error, "cannot return to the own network namespace");
            std::process::abort();
        }
    }
}

/// The namespace in which the host's side of every attachment lives.
#[derive(Debug)]
pub struct Host(pub NetNs);

/// The namespace of one pod.
#[derive(Debug, Clone, Copy)]
pub struct Pod<'a> {
    /// The namespace, open.
    pub netns: &'a NetNs,
    /// The path under which the caller knows it, as text for results and records.
    pub path: &'a Path,
}

/// Why a namespace cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetNsError {
    /// The path cannot be opened.
    #[error("network namespace {}: {source}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// No namespace could be made there.
    #[error("cannot make a network namespace at {}: {source}", path.display())]
    Create {
        /// The path.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// The namespace could not be unmounted, or its file not removed.
    #[error("cannot remove the network namespace at {}: {source}", path.display())]
    Remove {
        /// The path.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// The path leads to something else.
    #[error("network namespace {}: not a network namespace; give /run/netns/NAME or /proc/PID/ns/net", path.display())]
    NotANamespace {
        /// The path.
        path: PathBuf,
    },
    /// setns(2) failed, or no thread could be started.
    #[error("cannot enter the network namespace: {0}")]
    Enter(#[source] io::Error),
    /// The file that stands for the host's namespace could not be locked.
    #[error("cannot lock the host's network namespace: {0}")]
    Lock(#[source] io::Error),
    /// A guard was asked to return to a namespace in which the thread is not.
    #[error("the calling thread is not in the namespace that it is to return to")]
    NotHome,
    /// A socket could not be opened in the namespace.
    #[error(transparent)]
    Socket(#[from] NetlinkError),
}

impl NetNsError {
    /// Whether the namespace does not exist (any more): DEL goes on without it.
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Open { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
                    || source.raw_os_error() == Some(libc::ESRCH)
            }
            Self::NotANamespace { .. } => true,
            _ => false,
        }
    }
}

/// Of the calling thread; `/proc/self/ns/net` would be the first thread's.
const THREAD: &str = "/proc/thread-self/ns/net";
