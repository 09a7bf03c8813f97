//! What was taken before, so that nothing older takes its place.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Digest, Verified};

/// The sets that a cluster or node has taken, in a file that outlives boots.
#[derive(Debug)]
pub struct Accepted {
    path: PathBuf,
    sets: BTreeMap<String, Taken>,
}

/// Which issue of a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taken {
    /// Its generation.
    pub generation: u64,
    /// Of its payload.
    pub digest: Digest,
}

/// Why a bundle is not taken, or what was taken is not known.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AcceptedError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A later one was taken, or is the least that is wanted.
    #[error(
        "{name}: generation {generation} is older than {taken}, which was taken before or is the least; issue it anew with a higher one"
    )]
    Older {
        /// The name of the set.
        name: String,
        /// The one that was given.
        generation: u64,
        /// The one that was taken, or is the least.
        taken: u64,
    },
    /// The same generation had another content.
    #[error(
        "{name}: generation {generation} is another than the one that was taken before ({given} for {taken}); issue it anew with a \
         higher generation"
    )]
    Another {
        /// The name of the set.
        name: String,
        /// Its generation.
        generation: u64,
        /// Of the one that was given.
        given: Digest,
        /// Of the one that was taken.
        taken: Digest,
    },
    /// Two bundles are of one set.
    #[error("{name}: there are two bundles of this set, of the generations {generations:?}; remove one")]
    Twice {
        /// The name of the set.
        name: String,
        /// Of both.
        generations: [u64; 2],
    },
    /// A set that is wanted is not there.
    #[error(
        "{name}: no bundle of this set is there; bring it, or issue one without documents where no policies are wanted"
    )]
    Missing {
        /// The name of the set.
        name: String,
    },
    /// Nobody wants this set here.
    #[error("{name}: no such set is wanted here; remove the bundle, or add its name to those of policies.trust.sets")]
    Unwanted {
        /// The name of the set.
        name: String,
    },
}

impl Accepted {
    /// Reads the file; none is one where nothing was taken.
    ///
    /// # Errors
    /// [`AcceptedError::File`], also for a file that is not whole: without it anything older would be taken.
    pub fn read(path: &Path) -> Result<Self, AcceptedError> {
        let failed = |source| AcceptedError::File { path: path.to_owned(), source };
        let sets = match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| failed(error.into()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(failed(error)),
        };
        Ok(Self { path: path.to_owned(), sets })
    }

    /// What was taken, by the names of sets.
    pub fn sets(&self) -> &BTreeMap<String, Taken> {
        &self.sets
    }

    /// Whether all of these may be taken, in the place of all that was. Nothing is noted. `wanted` has the names of the sets that
    /// are to be there, each with the least generation that is taken: a key may sign sets for others, too, and where nothing was taken
    /// yet nothing else tells which ones are old.
    ///
    /// # Errors
    /// The first that may not.
    pub fn check(&self, given: &[Verified], wanted: &BTreeMap<String, u64>) -> Result<(), AcceptedError> {
        let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
        for Verified { bundle, digest, .. } in given {
            let (name, generation) = (bundle.name(), bundle.generation());
            if let Some(other) = seen.insert(name, generation) {
                return Err(AcceptedError::Twice { name: name.to_owned(), generations: [other, generation] });
            }
            let Some(least) = wanted.get(name).copied() else {
                return Err(AcceptedError::Unwanted { name: name.to_owned() });
            };
            if generation < least {
                return Err(AcceptedError::Older { name: name.to_owned(), generation, taken: least });
            }
            match self.sets.get(name) {
                Some(taken) if generation < taken.generation => {
                    return Err(AcceptedError::Older { name: name.to_owned(), generation, taken: taken.generation });
                }
                Some(taken) if generation == taken.generation && *digest != taken.digest => {
                    let (given, taken) = (digest.clone(), taken.digest.clone());
                    return Err(AcceptedError::Another { name: name.to_owned(), generation, given, taken });
                }
                _ => {}
            }
        }
        match wanted.keys().find(|name| !seen.contains_key(name.as_str())) {
            Some(name) => Err(AcceptedError::Missing { name: name.clone() }),
            None => Ok(()),
        }
    }

    /// Notes that these were taken, on the disk when it returns. To be called before they are put in force: one of which nobody
    /// knows could be followed by an older one.
    ///
    /// # Errors
    /// As [`Accepted::check`], and [`AcceptedError::File`].
    pub fn take(&mut self, given: &[Verified], wanted: &BTreeMap<String, u64>) -> Result<(), AcceptedError> {
        self.check(given, wanted)?;
        let taken = |v: &Verified| {
            (v.bundle.name().to_owned(), Taken { generation: v.bundle.generation(), digest: v.digest.clone() })
        };
        // A set that nobody wants any more may be wanted again.
        let sets: BTreeMap<_, _> = self.sets.clone().into_iter().chain(given.iter().map(taken)).collect();
        if sets != self.sets {
            self.write(&sets).map_err(|source| AcceptedError::File { path: self.path.clone(), source })?;
            self.sets = sets;
        }
        Ok(())
    }

    fn write(&self, sets: &BTreeMap<String, Taken>) -> io::Result<()> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(directory)?;
        let mut fresh = self.path.clone().into_os_string();
        fresh.push(".new");
        let mut file = File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(sets)?)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        File::open(directory)?.sync_all()
    }
}
