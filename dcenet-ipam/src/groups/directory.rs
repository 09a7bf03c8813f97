//! Address groups as files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::{Groups, ListForm};

/// A directory with a file for each group, which nobody ever sees half written.
///
/// - `GROUP.list` holds a prefix on each line; `+` stands for the `/` of the group's name, and a name of more than 180
///   bytes is cut and ends in a checksum.
/// - `groups.json` holds all of it ([`Groups`]), and is written last: it is a point from which
///   [`GroupFeed::resume`](super::GroupFeed::resume) goes on.
///
/// Each file is flushed before it takes its name. A file whose content is right is left alone, so that its time says
/// when the group changed. Lists of groups that are no more are removed, once `groups.json` does not name them. After a
/// crash every file is an old one or a new one, and the next [`GroupDirectory::write`] makes all of them new. Writers
/// wait for each other; other files in the directory stay.
#[derive(Debug)]
pub struct GroupDirectory {
    path: PathBuf,
    form: ListForm,
}

/// What a write changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Files that were made or replaced.
    pub written: usize,
    /// Files that were right.
    pub unchanged: usize,
    /// Files that were removed.
    pub removed: usize,
}

/// Why groups could not be written. Whatever was written before is whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The system refused.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// The file holds no groups.
    #[error("{} holds no address groups: {source}; remove it, and begin anew", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    move |source| ExportError::Io { doing, path: path.to_owned(), source }
}

impl GroupDirectory {
    /// Makes the directory if it is not there; its parent must be.
    ///
    /// # Errors
    /// [`ExportError::Io`].
    pub fn open(path: impl Into<PathBuf>, form: ListForm) -> Result<Self, ExportError> {
        let path = path.into();
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("make", &path)(error)),
            _ => Ok(Self { path, form }),
        }
    }

    /// What `groups.json` holds; `None` before the first write.
    ///
    /// # Errors
    /// [`ExportError::Malformed`] if somebody else wrote it.
    pub fn read(&self) -> Result<Option<Groups>, ExportError> {
        let path = self.path.join(INDEX);
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).map_err(|source| ExportError::Malformed { path, source })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Makes the files say what the groups say.
    ///
    /// # Errors
    /// [`ExportError::Io`]; some files may be new and others old, each whole.
    pub fn write(&self, groups: &Groups) -> Result<Written, ExportError> {
        let lock = self.path.join(LOCK);
        let locked = OpenOptions::new().create(true).truncate(false).write(true).open(&lock);
        let locked = locked.map_err(failed("open", &lock))?;
        flock(&locked, FlockOperation::LockExclusive).map_err(|e| failed("lock", &lock)(e.into()))?;

        let mut found: BTreeSet<String> = BTreeSet::new();
        for entry in fs::read_dir(&self.path).map_err(failed("list", &self.path))? {
            let name = entry.map_err(failed("list", &self.path))?.file_name();
            found.extend(name.into_string());
        }
        let mut files: BTreeMap<String, String> = BTreeMap::new();
        for group in groups.groups.keys() {
            files.insert(format!("{}{LIST}", group.short('+')), groups.text(group, self.form));
        }
        let mut counts = Written::default();
        for (name, text) in &files {
            self.put(name, text, &mut counts)?;
        }
        let mut json = serde_json::to_string_pretty(groups).map_err(|e| failed("write", &self.path)(e.into()))?;
        json.push('\n');
        // The names of the lists last before a file speaks of them.
        self.sync()?;
        self.put(INDEX, &json, &mut counts)?;
        self.sync()?;
        let stale = |name: &&String| name.starts_with(TEMPORARY) || name.ends_with(LIST) && !files.contains_key(*name);
        for name in found.iter().filter(stale) {
            let path = self.path.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &path)(error)),
                _ => counts.removed += usize::from(!name.starts_with(TEMPORARY)),
            }
        }
        self.sync()?;
        Ok(counts)
    }

    fn put(&self, name: &str, text: &str, counts: &mut Written) -> Result<(), ExportError> {
        let path = self.path.join(name);
        if fs::read(&path).is_ok_and(|old| old == text.as_bytes()) {
            counts.unchanged += 1;
            return Ok(());
        }
        let temporary = self.path.join(format!("{TEMPORARY}{name}"));
        let mut file = File::create(&temporary).map_err(failed("make", &temporary))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed("write", &temporary))?;
        fs::rename(&temporary, &path).map_err(failed("replace", &path))?;
        counts.written += 1;
        Ok(())
    }

    fn sync(&self) -> Result<(), ExportError> {
        File::open(&self.path).and_then(|dir| dir.sync_all()).map_err(failed("flush", &self.path))
    }
}

const INDEX: &str = "groups.json";
const LIST: &str = ".list";
const LOCK: &str = ".lock";
const TEMPORARY: &str = ".new-";
