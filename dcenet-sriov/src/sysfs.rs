//! Reading and writing sysfs below a root, which a test or a container may put elsewhere.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};

/// A tree such as `/sys`. Paths are relative to its root and have plain names only.
///
/// Every call may meet a tree that changes meanwhile: what was listed may be gone when it is read.
///
/// Bed: fixture and modelled; [`SysfsDir`] on `/sys` also igb.
pub trait Sysfs: fmt::Debug + Send + Sync {
    /// The text of an attribute, without white space at its end. `InvalidData` where it is no text.
    fn read(&self, path: &Path) -> io::Result<String>;

    /// The names in a directory, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;

    /// The text of a symbolic link. The link may lead nowhere.
    fn link(&self, path: &Path) -> io::Result<PathBuf>;

    /// Writes an attribute, in one write(2), and returns what the kernel answered. Never creates a file.
    fn write(&self, path: &Path, value: &str) -> io::Result<()>;
}

/// A directory of a file system: `/sys`, or what looks like it.
#[derive(Debug, Clone)]
pub struct SysfsDir {
    root: PathBuf,
}

impl SysfsDir {
    /// The tree below `root`. Nothing is opened.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The machine's own, `/sys`.
    pub fn system() -> Self {
        Self::new("/sys")
    }

    fn path(&self, path: &Path) -> io::Result<PathBuf> {
        if path.components().all(|part| matches!(part, Component::Normal(_))) {
            Ok(self.root.join(path))
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "not a path of plain names below the root"))
        }
    }
}

impl Sysfs for SysfsDir {
    fn read(&self, path: &Path) -> io::Result<String> {
        // An attribute is at most a page (Documentation/filesystems/sysfs.rst): one read has it all, and asking for its
        // size first would cost as much as the read.
        let mut text = vec![0; PAGE];
        let mut file = File::open(self.path(path)?)?;
        let mut len = 0;
        loop {
            match file.read(&mut text[len..]) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            if len < text.len() {
                break;
            }
            return Err(io::Error::new(io::ErrorKind::InvalidData, "longer than a page, as no attribute is"));
        }
        text.truncate(len);
        let text = String::from_utf8(text).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "no text"))?;
        Ok(text.trim_end().to_owned())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path(path)?)? {
            // A name that is no text is none that the kernel gives.
            names.extend(entry?.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn link(&self, path: &Path) -> io::Result<PathBuf> {
        fs::read_link(self.path(path)?)
    }

    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        OpenOptions::new().write(true).open(self.path(path)?)?.write_all(value.as_bytes())
    }
}

/// The directory of a PCI function.
pub(crate) fn function(address: crate::PciAddress) -> PathBuf {
    Path::new(DEVICES).join(address.to_string())
}

/// The directory of all PCI functions.
pub(crate) const DEVICES: &str = "bus/pci/devices";
const PAGE: usize = 4096;
