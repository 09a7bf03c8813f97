//! Whether policies were in force, noted where it outlives the daemon and the machine's boot: a directory without policies
//! then is as likely one that is not mounted as one that wants none.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The note, a file in the state directory.
#[derive(Debug)]
pub struct Standing {
    path: PathBuf,
    is_set: bool,
}

impl Standing {
    /// Reads it. One that cannot be read counts as set.
    pub fn read(state_dir: &Path) -> Self {
        let path = state_dir.join("policies-in-force");
        let is_set = path.try_exists().unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "taken to say that policies were in force");
            true
        });
        Self { path, is_set }
    }

    /// Whether policies were in force when it was noted last.
    pub fn is_set(&self) -> bool {
        self.is_set
    }

    /// Notes it, where it is not.
    ///
    /// # Errors
    /// Where the file cannot be written or removed; for this process it counts all the same.
    pub fn note(&mut self, are_in_force: bool) -> io::Result<()> {
        if std::mem::replace(&mut self.is_set, are_in_force) == are_in_force {
            return Ok(());
        }
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", self.path.display()));
        if are_in_force {
            let made = self.path.parent().map_or(Ok(()), fs::create_dir_all);
            return made.and_then(|()| fs::write(&self.path, "")).map_err(named);
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(named(error)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_outlives_who_noted_it() {
        let top = tempfile::tempdir().unwrap();
        let state = top.path().join("state");
        assert!(!Standing::read(&state).is_set());
        Standing::read(&state).note(true).unwrap();
        let mut standing = Standing::read(&state);
        assert!(standing.is_set());
        standing.note(true).unwrap();
        standing.note(false).unwrap();
        assert!(!Standing::read(&state).is_set());

        fs::write(state.join("file"), "").unwrap();
        let mut standing = Standing::read(&state.join("file"));
        assert!(standing.is_set(), "what cannot be read");
        standing.note(false).unwrap_err();
    }
}
