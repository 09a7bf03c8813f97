//! What is known, written down for the next owner.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Learnt;
use crate::enforcer::state::Shared;
use crate::model::{DomainName, NamePattern, Names, Time};

/// The file.
#[derive(Serialize, Deserialize)]
struct Written {
    /// What policies ask for.
    asked: Vec<String>,
    learnt: Vec<(DomainName, IpAddr, Time)>,
}

impl Shared {
    /// Writes down what is known, where that is not what the file says. Where it fails, the next change tries again: only an owner
    /// that starts before that does not know all.
    pub(in crate::enforcer) fn write_names(&self) {
        let written = {
            let mut state = self.state.lock();
            if !state.learnt.take_unwritten() {
                return;
            }
            let pairs = state.learnt.names().by_end();
            Written {
                asked: state.learnt.asked().iter().map(NamePattern::to_string).collect(),
                learnt: pairs.map(|(until, name, address)| (name.clone(), *address, *until)).collect(),
            }
        };
        let (path, fresh) = (path(&self.config.run_dir), path_of_fresh(&self.config.run_dir));
        let text = serde_json::to_vec(&written).map_err(io::Error::from);
        if let Err(error) = text.and_then(|text| fs::write(&fresh, text)).and_then(|()| fs::rename(&fresh, &path)) {
            tracing::warn!(path = %path.display(), %error, "names that were learnt are not written down yet");
            self.state.lock().learnt.note_unwritten();
        }
    }
}

/// Where names are kept for the next owner.
pub(in crate::enforcer) fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("policy.names")
}

/// Where they are written first.
pub(in crate::enforcer) fn path_of_fresh(run_dir: &Path) -> PathBuf {
    run_dir.join("policy.names,new")
}

/// What an earlier owner has left. A file that cannot be read is as good as none: nobody is allowed by names until they are asked
/// for again.
pub(in crate::enforcer) fn resume(run_dir: &Path) -> Learnt {
    let path = path(run_dir);
    let read = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Learnt::default(),
        read => read.and_then(|text| serde_json::from_slice::<Written>(&text).map_err(io::Error::from)),
    };
    let Written { asked, learnt } = match read {
        Ok(written) => written,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the names that were learnt are lost");
            return Learnt::default();
        }
    };
    let mut names = Names::default();
    for (name, address, until) in learnt {
        names.learn(name, address, until);
    }
    let asked: HashSet<NamePattern> = asked.iter().filter_map(|pattern| pattern.parse().ok()).collect();
    Learnt::new(names, asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_again_and_a_file_that_is_broken_is_as_good_as_none() {
        let directory = tempfile::tempdir().unwrap();
        assert!(resume(directory.path()).names().is_empty());
        let text = r#"{"asked":["*.example.com"],"learnt":[["db.example.com","192.0.2.1",100],["db.example.com","2001:db8::1",90]]}"#;
        fs::write(path(directory.path()), text).unwrap();
        let learnt = resume(directory.path());
        assert_eq!((learnt.names().len(), learnt.next_end()), (2, Some(90)));
        assert!(learnt.is_asked_for(&"db.example.com".parse().unwrap()));
        assert!(!learnt.is_asked_for(&"example.com".parse().unwrap()));
        fs::write(path(directory.path()), text.replace("db.example.com", "com")).unwrap();
        assert!(resume(directory.path()).names().is_empty());
    }
}
