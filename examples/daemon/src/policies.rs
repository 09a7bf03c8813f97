//! Policies in a directory, and its changes.
//!
//! A change counts when it is whole: a file that was closed after writing, renamed into the directory, or removed. Files
//! that are replaced by a rename are never seen half-written; the others may be, while yet another one changes.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use dcenet_policy::sources::kubernetes::{DocumentError, Documents};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

/// Why a directory's policies cannot be used.
#[derive(Debug)]
pub enum PoliciesError {
    /// It, or a file in it, cannot be read.
    Io {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// A document is wrong.
    Document(DocumentError),
}

impl fmt::Display for PoliciesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Self::Document(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for PoliciesError {}

/// Reads all files of a directory, in the order of their names.
///
/// # Errors
/// The first, which names file, document and field.
pub fn read(directory: &Path) -> Result<Documents, PoliciesError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PoliciesError::Io { path, source }
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed(directory))? {
        let path = entry.map_err(failed(directory))?.path();
        if is_read(&path) {
            paths.push(path);
        }
    }
    paths.sort();
    let mut documents = Documents::default();
    for path in paths {
        let text = std::fs::read_to_string(&path).map_err(failed(&path))?;
        let name = path.display().to_string();
        let json = path.extension().is_some_and(|e| e == "json");
        let added = if json { documents.with_json(&name, &text) } else { documents.with_yaml(&name, &text) };
        documents = added.map_err(PoliciesError::Document)?;
    }
    Ok(documents)
}

/// Editors and Kubernetes' volumes begin names with a dot that are not meant to be read.
fn is_read(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json")
}

/// Notices changes of a directory by inotify(7).
#[derive(Debug)]
pub struct Watcher {
    events: OwnedFd,
    directory: PathBuf,
    /// Whether the directory itself is watched: not after it was removed, or something else mounted or moved there.
    watched: bool,
}

impl Watcher {
    /// Watches a directory.
    ///
    /// # Errors
    /// Where it is not there, or the user has no watch left (`fs.inotify.max_user_watches`).
    pub fn new(directory: &Path) -> Result<Self, PoliciesError> {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let failed = |e: Errno| PoliciesError::Io { path: directory.to_owned(), source: e.into() };
        let mut this = Self { events: events.map_err(failed)?, directory: directory.to_owned(), watched: false };
        this.watch().map_err(failed)?;
        Ok(this)
    }

    fn watch(&mut self) -> Result<(), Errno> {
        let flags = WatchFlags::CLOSE_WRITE
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&self.events, &self.directory, flags)?;
        self.watched = true;
        Ok(())
    }

    /// Takes what happened, and tells whether the directory is to be read again.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn changed(&mut self) -> io::Result<bool> {
        let mut changed = false;
        let mut lost = false;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.events, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let flags = event.events();
            lost |= flags.intersects(ReadFlags::IGNORED | ReadFlags::MOVE_SELF | ReadFlags::DELETE_SELF);
            // Who creates a file closes it after writing; a symbolic link is whole at once.
            changed |= flags.intersects(!ReadFlags::CREATE)
                || event.file_name().is_some_and(|name| {
                    let path = self.directory.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
                    path.is_symlink()
                });
        }
        if lost {
            self.watched = false;
        }
        if !self.watched && self.watch().is_ok() {
            changed = true;
        }
        Ok(changed || lost)
    }
}

impl AsFd for Watcher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}
