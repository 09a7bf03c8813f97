//! The bundles that were taken last, where they outlive the daemon and the machine's boot: whoever brings bundles takes none away by
//! bringing none.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::policies::{BUNDLE, Set};

/// The directory below the state directory.
#[derive(Debug)]
pub struct Kept {
    directory: PathBuf,
}

impl Kept {
    /// Nothing is read or made yet.
    pub fn of(state_dir: &Path) -> Self {
        Self { directory: state_dir.join("policy-bundles") }
    }

    /// Where they are, one file of each set.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Keeps a set's bundles, on the disk when it returns, and no others.
    ///
    /// # Errors
    /// Where a file cannot be written or removed. Each is whole, and of before or of now.
    pub fn keep(&self, set: &Set) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        let mut names: BTreeSet<OsString> = BTreeSet::new();
        for (verified, envelope) in set.bundles.iter().zip(&set.envelopes) {
            // Of letters, digits, dots and dashes, and as short as the configuration has them.
            let name = format!("{}.{BUNDLE}", verified.bundle.name());
            let path = self.directory.join(&name);
            if !fs::read(&path).is_ok_and(|kept| kept == envelope.as_bytes()) {
                // With a dot, so that it is not read.
                let fresh = self.directory.join(format!(".{name}"));
                let mut file = File::create(&fresh)?;
                file.write_all(envelope.as_bytes())?;
                file.sync_all()?;
                fs::rename(&fresh, &path)?;
            }
            names.insert(name.into());
        }
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if !names.contains(&entry.file_name()) {
                fs::remove_file(entry.path())?;
            }
        }
        File::open(&self.directory)?.sync_all()
    }
}
