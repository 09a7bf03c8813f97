//! What is known, written down for the next owner.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::enforcer::state::Shared;
use crate::model::{DomainName, Names, Time};

impl Shared {
    /// Writes down what is known, where that is not what the file says. Where it fails, the next change tries again: only an owner
    /// that starts before that does not know all.
    pub(in crate::enforcer) fn write_names(&self) {
        let Some(names) = self.state.lock().learnt.take_unwritten() else { return };
        let told: Vec<(&DomainName, &IpAddr, &Time)> =
            names.iter().flat_map(|(name, known)| known.iter().map(move |(at, until)| (name, at, until))).collect();
        let (path, fresh) = (path(&self.config.run_dir), self.config.run_dir.join("policy.names,new"));
        let written = serde_json::to_vec(&told).map_err(io::Error::from);
        if let Err(error) = written.and_then(|text| fs::write(&fresh, text)).and_then(|()| fs::rename(&fresh, &path)) {
            tracing::warn!(path = %path.display(), %error, "names that were learnt are not written down yet");
            self.state.lock().learnt.note_unwritten();
        }
    }
}

/// Where names are kept for the next owner.
pub(in crate::enforcer) fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("policy.names")
}

/// What an earlier owner has left. A file that cannot be read is as good as none: nobody is allowed by names until they are asked
/// for again.
pub(in crate::enforcer) fn resume(run_dir: &Path) -> Names {
    let path = path(run_dir);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Names::default(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the names that were learnt are lost");
            return Names::default();
        }
    };
    match serde_json::from_slice::<Vec<(DomainName, IpAddr, Time)>>(&text) {
        Ok(told) => {
            let mut names = Names::default();
            for (name, address, until) in told {
                names.learn(name, address, until);
            }
            names
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the names that were learnt are lost");
            Names::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_again_and_a_file_that_is_broken_is_as_good_as_none() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(resume(directory.path()), Names::default());
        let text = r#"[["db.example.com","192.0.2.1",100],["db.example.com","2001:db8::1",90]]"#;
        fs::write(path(directory.path()), text).unwrap();
        let names = resume(directory.path());
        assert_eq!((names.len(), names.next_end()), (2, Some(90)));
        fs::write(path(directory.path()), "[[\"com\",\"192.0.2.1\",100]]").unwrap();
        assert_eq!(resume(directory.path()), Names::default());
    }
}
