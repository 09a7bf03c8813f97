//! The system calls that make the log durable, in one place: counted, and made to fail by tests.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::store::StoreError;

/// A call that changes what is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskCall {
    /// A file is made.
    Create,
    /// Bytes are written.
    Write,
    /// A file's data is flushed, with what metadata is needed to read it (fdatasync).
    Sync,
    /// A file takes another's name.
    Rename,
    /// A directory is flushed.
    SyncDir,
}

/// A call that has changed what is on disk, for those who work out what a loss of power may leave of it. Files are told
/// apart by their inode, for names change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskEvent<'a> {
    /// A file was made under a name, or emptied.
    Created(&'a str, u64),
    /// The directory was flushed: creations and new names last.
    DirectorySynced,
    /// The first name was taken from its file and given to it in place of the second.
    Renamed(&'a str, &'a str),
    /// A file's data was flushed.
    Synced(u64),
    /// Bytes were written to a file at an offset.
    Wrote(u64, u64, &'a [u8]),
}

/// Told after each call that succeeded.
pub(super) type Recorder = Arc<dyn Fn(DiskEvent<'_>) + Send + Sync>;

/// Asked before each call; an error is returned instead of making the call.
pub(super) type Fault = Arc<dyn Fn(DiskCall) -> io::Result<()> + Send + Sync>;

/// What a store has asked of the system since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUse {
    /// Files and directories opened.
    pub opens: u64,
    /// Flushes of a file's data.
    pub syncs: u64,
    /// Bytes written.
    pub written: u64,
}

pub(super) struct Disk {
    dir: PathBuf,
    fault: Option<Fault>,
    recorder: Option<Recorder>,
    opens: AtomicU64,
    syncs: AtomicU64,
    written: AtomicU64,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Disk").field(&self.dir).finish()
    }
}

impl Disk {
    pub(super) fn new(dir: &Path, fault: Option<Fault>) -> Self {
        let zero = || AtomicU64::new(0);
        Self { dir: dir.to_owned(), fault, recorder: None, opens: zero(), syncs: zero(), written: zero() }
    }

    #[cfg(feature = "test-support")]
    pub(super) fn recorded(dir: &Path, recorder: Recorder) -> Self {
        Self { recorder: Some(recorder), ..Self::new(dir, None) }
    }

    fn record<'a>(&self, event: impl FnOnce() -> io::Result<DiskEvent<'a>>) -> io::Result<()> {
        match &self.recorder {
            Some(recorder) => event().map(|event| recorder(event)),
            None => Ok(()),
        }
    }

    pub(super) fn usage(&self) -> DiskUse {
        DiskUse {
            opens: self.opens.load(Ordering::Relaxed),
            syncs: self.syncs.load(Ordering::Relaxed),
            written: self.written.load(Ordering::Relaxed),
        }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes a call, unless a test wants it to fail.
    fn make<T>(&self, call: DiskCall, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if let Some(fault) = &self.fault {
            fault(call)?;
        }
        #[cfg(feature = "fault-injection")]
        return dcenet_core::test_support::through_gate(&format!("store {call:?}"), make);
        #[cfg(not(feature = "fault-injection"))]
        make()
    }

    fn error(&self, verb: &str, name: &str, source: io::Error) -> StoreError {
        StoreError::Io { doing: format!("cannot {verb} {}", self.path(name).display()), source }
    }

    /// Makes the directory and those above it, private to the owner, and flushes each parent that got a new entry.
    pub(super) fn make_dir(&self) -> Result<(), StoreError> {
        if self.dir.is_dir() {
            return Ok(());
        }
        let error = |source| self.error("create", "", source);
        let existing = self.dir.ancestors().find(|p| p.is_dir()).map(Path::to_owned);
        self.make(DiskCall::Create, || DirBuilder::new().recursive(true).mode(0o700).create(&self.dir))
            .map_err(error)?;
        for parent in self.dir.ancestors().skip(1) {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            self.sync_path(parent).map_err(error)?;
            if existing.as_deref() == Some(parent) {
                break;
            }
        }
        Ok(())
    }

    /// Opens a file for reading and writing, `None` if there is none.
    pub(super) fn open(&self, name: &str) -> Result<Option<File>, StoreError> {
        self.opens.fetch_add(1, Ordering::Relaxed);
        match OpenOptions::new().read(true).write(true).open(self.path(name)) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.error("open", name, e)),
        }
    }

    /// Opens a file for reading and writing and makes it if there is none.
    pub(super) fn open_or_create(&self, name: &str) -> Result<File, StoreError> {
        if let Some(file) = self.open(name)? {
            return Ok(file);
        }
        self.create_with(name, OpenOptions::new().create(true))
    }

    /// Makes an empty file in place of any of that name.
    pub(super) fn create(&self, name: &str) -> Result<File, StoreError> {
        self.create_with(name, OpenOptions::new().create(true).truncate(true))
    }

    fn create_with(&self, name: &str, options: &mut OpenOptions) -> Result<File, StoreError> {
        self.opens.fetch_add(1, Ordering::Relaxed);
        self.make(DiskCall::Create, || options.read(true).write(true).mode(0o600).open(self.path(name)))
            .and_then(|file| {
                self.record(|| Ok(DiskEvent::Created(name, file.metadata()?.ino())))?;
                Ok(file)
            })
            .map_err(|e| self.error("create", name, e))
    }

    pub(super) fn write_at(&self, file: &File, name: &str, bytes: &[u8], offset: u64) -> Result<(), StoreError> {
        self.make(DiskCall::Write, || file.write_all_at(bytes, offset))
            .and_then(|()| self.record(|| Ok(DiskEvent::Wrote(file.metadata()?.ino(), offset, bytes))))
            .map_err(|e| self.error("write", name, e))?;
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn sync(&self, file: &File, name: &str) -> Result<(), StoreError> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.make(DiskCall::Sync, || file.sync_data())
            .and_then(|()| self.record(|| Ok(DiskEvent::Synced(file.metadata()?.ino()))))
            .map_err(|e| self.error("flush", name, e))
    }

    /// Gives a flushed temporary file its name, durably.
    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), StoreError> {
        self.make(DiskCall::Rename, || fs::rename(self.path(from), self.path(to)))
            .and_then(|()| self.record(|| Ok(DiskEvent::Renamed(from, to))))
            .map_err(|e| self.error("rename a temporary file to", to, e))?;
        self.sync_path(&self.dir)
            .and_then(|()| self.record(|| Ok(DiskEvent::DirectorySynced)))
            .map_err(|e| self.error("flush the directory of", to, e))
    }

    fn sync_path(&self, dir: &Path) -> io::Result<()> {
        self.opens.fetch_add(1, Ordering::Relaxed);
        self.make(DiskCall::SyncDir, || File::open(dir)?.sync_all())
    }

    /// Identifies what the name stands for now; a file renamed over it has another identity.
    pub(super) fn identity(&self, name: &str) -> Result<Option<Identity>, StoreError> {
        match fs::metadata(self.path(name)) {
            Ok(meta) => Ok(Some(Identity { device: meta.dev(), inode: meta.ino() })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(self.error("look at", name, e)),
        }
    }

    pub(super) fn identity_of(&self, file: &File, name: &str) -> Result<Identity, StoreError> {
        let meta = file.metadata().map_err(|e| self.error("look at", name, e))?;
        Ok(Identity { device: meta.dev(), inode: meta.ino() })
    }

    pub(super) fn lock(&self, file: &File, name: &str) -> Result<(), StoreError> {
        file.lock().map_err(|e| self.error("lock", name, e))
    }

    /// Not reported to the caller, whose work is done: flock(2) can only fail here for a bad descriptor.
    pub(super) fn unlock(&self, file: &File, name: &str) {
        if let Err(error) = file.unlock() {
            tracing::error!(%error, "cannot unlock {}", self.path(name).display());
        }
    }

    /// Reads up to `length` bytes; fewer only at the end of the file.
    pub(super) fn read_at(&self, file: &File, name: &str, offset: u64, length: usize) -> Result<Vec<u8>, StoreError> {
        let mut bytes = vec![0; length];
        let mut filled = 0;
        while filled < length {
            match file.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.error("read", name, e)),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    pub(super) fn corrupt(&self, name: &str, offset: u64, reason: impl Into<String>) -> StoreError {
        StoreError::Corrupt { file: self.path(name).display().to_string(), offset, reason: reason.into() }
    }
}

/// Device and inode. An inode is not reused while a descriptor of it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}
