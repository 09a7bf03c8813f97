//! Settings of the host that the fabric needs, and what they were before.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::netns::{Host, NetNsError};

/// What settings were before the fabric changed them, by their path below `/proc/sys/net`.
#[derive(Debug)]
pub(super) struct Settings {
    file: PathBuf,
    before: Before,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Before {
    /// The boot in which they were so; in another one they are anew what the system's configuration says.
    boot: String,
    settings: BTreeMap<String, String>,
}

impl Settings {
    pub(super) fn open(run_dir: &Path) -> io::Result<Self> {
        let file = run_dir.join(FILE);
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let before = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice::<Before>(&bytes).map_err(io::Error::other)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Before::default(),
            Err(error) => return Err(error),
        };
        let before = if before.boot == boot { before } else { Before { boot, ..Before::default() } };
        Ok(Self { file, before })
    }

    /// Gives a setting a value, and notes what it was before. Returns whether it was another one.
    pub(super) fn set(&mut self, host: &Host, name: &str, value: &str) -> Result<bool, SettingsError> {
        let failed = |source| SettingsError::Setting { name: name.to_owned(), source };
        let found = read(host, name)?;
        if found == value {
            return Ok(false);
        }
        if !self.before.settings.contains_key(name) {
            self.before.settings.insert(name.to_owned(), found);
            self.write().map_err(|source| SettingsError::Record { path: self.file.clone(), source })?;
        }
        host.0.run_here_or_there(|| fs::write(path(name), value))?.map_err(failed)?;
        Ok(true)
    }

    /// Makes all what they were, as far as nobody else changed them since.
    pub(super) fn restore(&mut self, host: &Host) -> Result<(), SettingsError> {
        for (name, before) in &self.before.settings {
            let failed = |source| SettingsError::Setting { name: name.clone(), source };
            match host.0.run_here_or_there(|| fs::write(path(name), before))? {
                // Its link is gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome.map_err(failed)?,
            }
        }
        match fs::remove_file(&self.file) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(SettingsError::Record { path: self.file.clone(), source });
            }
            _ => {}
        }
        self.before.settings.clear();
        Ok(())
    }

    /// Whole at once, and on the medium before anything is changed.
    fn write(&self) -> io::Result<()> {
        let fresh = self.file.with_extension("json,new");
        if let Some(directory) = self.file.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut file = fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(&self.before).map_err(io::Error::other)?)?;
        file.sync_all()?;
        fs::rename(fresh, &self.file)
    }
}

/// What a setting is.
pub(super) fn read(host: &Host, name: &str) -> Result<String, SettingsError> {
    let failed = |source| SettingsError::Setting { name: name.to_owned(), source };
    let text = host.0.run_here_or_there(|| fs::read_to_string(path(name)))?.map_err(failed)?;
    Ok(text.trim().to_owned())
}

fn path(name: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(name)
}

/// Why a setting cannot be had or changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SettingsError {
    /// It cannot be read or written.
    #[error("setting net/{name}: {source}")]
    Setting {
        name: String,
        #[source]
        source: io::Error,
    },
    /// What it was cannot be written down.
    #[error("{}: {source}", path.display())]
    Record {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The host's namespace cannot be entered.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
}

const FILE: &str = "fabric.json";
