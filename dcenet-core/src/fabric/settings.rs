//! Settings of the host that the fabric needs, and what they were before.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::netlink::gated;
use crate::netns::{Host, NetNsError};
use crate::proc_sys;

/// What settings were before the fabric changed them, by their path below `/proc/sys/net`.
#[derive(Debug)]
pub(super) struct Settings {
    file: PathBuf,
    record: Record,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// The boot in which they were so; in another one they are anew what the system's configuration says.
    boot: String,
    settings: BTreeMap<String, Change>,
    /// What [`IPV6`] was of each link, and of those to come (`default`): writing it for all changes every one of them
    /// (`addrconf_fixup_forwarding` of `net/ipv6/addrconf.c`).
    #[serde(default)]
    links: BTreeMap<String, String>,
    /// `links` is what they are to be again, and some may be so already.
    #[serde(default)]
    restoring: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    before: String,
    after: String,
}

impl Settings {
    pub(super) fn open(run_dir: &Path) -> Result<Self, SettingsError> {
        let file = run_dir.join(FILE);
        let failed = |path: &Path, source| SettingsError::Record { path: path.to_owned(), source };
        let boot = Path::new("/proc/sys/kernel/random/boot_id");
        let boot = fs::read_to_string(boot).map_err(|e| failed(boot, e))?.trim().to_owned();
        let record = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice::<Record>(&bytes)
                .map_err(|source| SettingsError::Malformed { path: file.clone(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Record::default(),
            Err(error) => return Err(failed(&file, error)),
        };
        let record = if record.boot == boot { record } else { Record { boot, ..Record::default() } };
        Ok(Self { file, record })
    }

    /// Gives a setting a value, and notes what it was before. Returns whether it was another one.
    pub(super) fn set(&mut self, host: &Host, name: &str, value: &str) -> Result<bool, SettingsError> {
        let found = read(host, name)?;
        if found == value {
            return Ok(false);
        }
        if !self.record.settings.contains_key(name) {
            self.record.settings.insert(name.to_owned(), Change { before: found, after: value.to_owned() });
            self.write()?;
        }
        write(host, name, value)?;
        Ok(true)
    }

    /// Has links go on to take router advertisements when the host forwards: without it default routes that they have of them
    /// are purged at once, and none come any more, nor addresses (`accept_ra` of `ip-sysctl.rst`, `rt6_purge_dflt_routers` of
    /// `net/ipv6/route.c`). A link that takes none stays so. Returns how many changed.
    fn keep_advertised<'a>(
        &mut self,
        host: &Host,
        links: impl Iterator<Item = &'a str>,
    ) -> Result<usize, SettingsError> {
        let mut changed = 0;
        for link in links {
            let name = format!("{IPV6}/{link}/accept_ra");
            match read(host, &name) {
                Ok(value) if value == "1" => changed += usize::from(self.set(host, &name, "2")?),
                Ok(_) => {}
                Err(SettingsError::Setting { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(changed)
    }

    /// Has the host forward IPv6, which it does for all links or for none (`ip6_forward` of `net/ipv6/ip6_output.c`), and
    /// `links` go on to take router advertisements. Links that come later take none, as on any host that forwards: they may be
    /// of pods. Returns how many settings changed.
    pub(super) fn forward_ipv6<'a>(
        &mut self,
        host: &Host,
        links: impl Iterator<Item = &'a str>,
    ) -> Result<usize, SettingsError> {
        // Writing what it is would set every link all the same.
        if read(host, &ipv6_of("all"))? == "1" {
            return Ok(0);
        }
        let changed = self.keep_advertised(host, links)?;
        if !self.record.settings.contains_key(&ipv6_of("all")) {
            self.record.links = ipv6_links(host)?;
        }
        if std::mem::take(&mut self.record.restoring) {
            self.write()?;
        }
        Ok(changed + usize::from(self.set(host, &ipv6_of("all"), "1")?))
    }

    /// Makes all what they were, as far as nobody else changed them since.
    pub(super) fn restore(&mut self, host: &Host) -> Result<(), SettingsError> {
        let all = ipv6_of("all");
        if !self.record.restoring && self.record.settings.get(&all).is_some_and(|c| is(host, &all, &c.after)) {
            let mut links = ipv6_links(host)?;
            // Those that came meanwhile took the default that the fabric had made. Who was turned off stays off.
            let default = self.record.links.get("default").cloned();
            for (link, value) in links.iter_mut().filter(|(_, value)| *value != "0") {
                value.clone_from(self.record.links.get(link).or(default.as_ref()).unwrap_or(&"0".to_owned()));
            }
            (self.record.links, self.record.restoring) = (links, true);
            self.write()?;
        }
        for (name, change) in self.record.settings.iter().filter(|(name, _)| **name != all) {
            if is(host, name, &change.after) {
                write(host, name, &change.before)?;
            }
        }
        if self.record.restoring {
            if let Some(change) = self.record.settings.get(&all) {
                write(host, &all, &change.before)?;
            }
            for (link, value) in &self.record.links {
                if !is(host, &ipv6_of(link), value) {
                    write(host, &ipv6_of(link), value)?;
                }
            }
        }
        match fs::remove_file(&self.file) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(SettingsError::Record { path: self.file.clone(), source });
            }
            _ => {}
        }
        self.record = Record { boot: std::mem::take(&mut self.record.boot), ..Record::default() };
        Ok(())
    }

    /// Whole at once, and on the medium before anything is changed.
    fn write(&self) -> Result<(), SettingsError> {
        let replace = || {
            let fresh = self.file.with_extension("json,new");
            if let Some(directory) = self.file.parent() {
                fs::create_dir_all(directory)?;
            }
            let mut file = fs::File::create(&fresh)?;
            file.write_all(&serde_json::to_vec(&self.record).map_err(io::Error::other)?)?;
            file.sync_all()?;
            fs::rename(fresh, &self.file)
        };
        gated("write down settings", || Ok(replace()))?
            .map_err(|source| SettingsError::Record { path: self.file.clone(), source })
    }
}

/// What a setting is.
pub(super) fn read(host: &Host, name: &str) -> Result<String, SettingsError> {
    let failed = |source| SettingsError::Setting { name: name.to_owned(), source };
    host.0.run_here_or_there(|| proc_sys::read(name))?.map_err(failed)
}

/// Whether a setting can be read and is that.
fn is(host: &Host, name: &str, value: &str) -> bool {
    read(host, name).is_ok_and(|found| found == value)
}

/// Nothing where its link is gone.
fn write(host: &Host, name: &str, value: &str) -> Result<(), SettingsError> {
    match gated("write setting", || host.0.run_here_or_there(|| proc_sys::write(name, value)))? {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.map_err(|source| SettingsError::Setting { name: name.to_owned(), source }),
    }
}

/// Which links forward IPv6, by name, and `default`.
fn ipv6_links(host: &Host) -> Result<BTreeMap<String, String>, SettingsError> {
    let failed = |source| SettingsError::Setting { name: IPV6.to_owned(), source };
    let list = || -> io::Result<Vec<String>> {
        fs::read_dir(proc_sys::path(IPV6))?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let names = host.0.run_here_or_there(list)?.map_err(failed)?;
    let mut links = BTreeMap::new();
    for name in names.into_iter().filter(|name| name != "all") {
        match read(host, &ipv6_of(&name)) {
            Ok(value) => drop(links.insert(name, value)),
            // It went between the two.
            Err(SettingsError::Setting { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(links)
}

fn ipv6_of(link: &str) -> String {
    format!("{IPV6}/{link}/forwarding")
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
    /// What it was cannot be read or written down.
    #[error("{}: {source}", path.display())]
    Record {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// What is written down is not what this program writes.
    #[error("{}: {source}; remove the file: settings that it names then stay as they are", path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    /// The host's namespace cannot be entered.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
}

const FILE: &str = "fabric.json";
const IPV6: &str = "ipv6/conf";
