//! Settings of a pod's namespace, as sysctl(8) writes them: the key `sysctl` of the section `link`, and the list of those that a
//! node allows.
//!
//! Only what is below `net.` can be named, and is written from inside the pod's namespace, where the kernel shows what belongs
//! to that namespace alone: keys of the whole host are absent there, or cannot be written (`ensure_safe_net_sysctl` in
//! `net/sysctl_net.c`).

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use regex_lite::Regex;
use serde::{Deserialize, Serialize};

use crate::link::PlanError;
use crate::model::IfName;

/// Where the reference plugin `tuning` has the list of what a node allows.
pub const ALLOW_LIST: &str = "/etc/cni/tuning/allowlist.conf";

/// Stands for the pod's device in a key, as for the reference plugin `tuning`.
const DEVICE: &str = "IFNAME";

/// `"sysctl": { "net.core.somaxconn": "512", "net.ipv4.conf.IFNAME.rp_filter": "2" }`: settings and their values, written with dots
/// or slashes.
///
/// `IFNAME`, or the device's name in the pod, is the attachment's own device. Everything else is of the whole pod: it gets the value
/// that it had when the attachment is detached, unless another attachment of the pod asks for the same.
///
/// # Minimum kernel version
/// 5.13; before, some keys of the whole host could be written from a pod's namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Sysctls(BTreeMap<Key, String>);

/// The name of a setting: what is between its separators.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key(Vec<String>);

/// A setting of a pod's namespace, and what it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    /// Its path below `/proc/sys/net`.
    pub(crate) name: String,
    /// What it shall be.
    pub(crate) value: String,
    /// For one of the attachment's own device, which is not there before it is made: the same of a device to come.
    pub(crate) pattern: Option<String>,
}

impl Sysctls {
    /// None.
    pub const NONE: &Self = &Self(BTreeMap::new());

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What they mean for a device called `ifname` in the pod: those of the whole pod first, for some of them set every device.
    pub(crate) fn settings(&self, ifname: &IfName) -> Result<Vec<Setting>, PlanError> {
        let mut settings: Vec<Setting> = Vec::with_capacity(self.0.len());
        for (key, value) in &self.0 {
            let setting = key.setting(ifname, value);
            if settings.iter().any(|other| other.name == setting.name) {
                return Err(invalid(
                    key.to_string(),
                    format!("is set twice, for the device is {ifname}; keep one of them"),
                ));
            }
            settings.push(setting);
        }
        settings.sort_by_key(|setting| setting.pattern.is_some());
        Ok(settings)
    }
}

impl Key {
    fn setting(&self, ifname: &IfName, value: &str) -> Setting {
        let path = |key: &Self| key.0[1..].join("/");
        let (name, pattern) = match self.is_of(ifname) {
            true => (path(&self.with_device(ifname.as_str())), Some(path(&self.with_device("default")))),
            false => (path(self), None),
        };
        Setting { name, value: value.to_owned(), pattern }
    }

    /// Whether it is of the device.
    fn is_of(&self, ifname: &IfName) -> bool {
        self.device().is_some_and(|device| device == DEVICE || device == ifname.as_str())
    }

    /// The device of `net.FAMILY.conf.DEVICE.NAME` and `net.FAMILY.neigh.DEVICE.NAME`.
    fn device(&self) -> Option<&str> {
        match self.0.as_slice() {
            [_, _, kind, device, _] if ["conf", "neigh"].contains(&kind.as_str()) => Some(device),
            _ => None,
        }
    }

    /// The same of another device.
    fn with_device(&self, device: &str) -> Self {
        let mut parts = self.0.clone();
        if let Some(part) = parts.get_mut(3) {
            device.clone_into(part);
        }
        Self(parts)
    }
}

impl FromStr for Key {
    type Err = String;

    /// As sysctl(8): the first separator decides which of `.` and `/` separates; the other stands for a dot in a name.
    fn from_str(text: &str) -> Result<Self, String> {
        let separator = text.chars().find(|c| matches!(c, '.' | '/')).unwrap_or('.');
        let parts =
            text.split(separator).map(|part| if separator == '.' { part.replace('/', ".") } else { part.into() });
        let parts: Vec<String> = parts.collect();
        let is_name = |part: &String| {
            !matches!(part.as_str(), "" | "." | "..")
                && !part.contains(['/', '\\'])
                && part.chars().all(|c| c.is_ascii_graphic())
        };
        if parts.len() < 3 || parts.first().is_none_or(|first| first != "net") {
            return Err(format!(
                "{text:?} is no setting of a network; give one below net., such as net.core.somaxconn"
            ));
        }
        if !parts.iter().all(is_name) {
            return Err(format!("{text:?} is no name of a setting; write it as `sysctl -a` does"));
        }
        let key = Self(parts);
        // Whoever chooses a device's name would choose another setting.
        let stands_for_device = usize::from(key.device() == Some(DEVICE));
        match key.0.iter().filter(|part| *part == DEVICE).count() == stands_for_device {
            true => Ok(key),
            false => Err(format!(
                "{text:?}: {DEVICE} stands for the device in net.FAMILY.conf.{DEVICE}.NAME and \
                 net.FAMILY.neigh.{DEVICE}.NAME alone; write the name that is meant"
            )),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, part) in self.0.iter().enumerate() {
            write!(f, "{}{}", if i > 0 { "." } else { "" }, part.replace('.', "/"))?;
        }
        Ok(())
    }
}

/// A setting's name as sysctl(8) writes it; `path` is below `/proc/sys/net`.
pub(crate) fn dotted(path: &str) -> String {
    let parts: Vec<String> = path.split('/').map(|part| part.replace('.', "/")).collect();
    format!("net.{}", parts.join("."))
}

impl TryFrom<BTreeMap<String, String>> for Sysctls {
    type Error = String;

    fn try_from(written: BTreeMap<String, String>) -> Result<Self, String> {
        let mut sysctls = BTreeMap::new();
        for (text, value) in written {
            let key: Key = text.parse()?;
            if value.contains(|c: char| c.is_control() && c != '\t') {
                return Err(format!("{text:?}: {value:?} has control characters; write one line"));
            }
            if sysctls.insert(key, value).is_some() {
                return Err(format!("{text:?} is set twice, with dots and with slashes; keep one of them"));
            }
        }
        Ok(Self(sysctls))
    }
}

impl From<Sysctls> for BTreeMap<String, String> {
    fn from(sysctls: Sysctls) -> Self {
        sysctls.0.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
    }
}

pub(crate) fn invalid(value: String, reason: String) -> PlanError {
    PlanError::Invalid { field: "link.sysctl", value, reason }
}

/// Whether the kernel means the same by both: it separates numbers by tabs, and ends with a newline.
pub(crate) fn same_value(one: &str, other: &str) -> bool {
    one.split_whitespace().eq(other.split_whitespace())
}

/// What a node allows configurations to set: regular expressions, a line each, one of which a key must match.
///
/// The file is that of the reference plugin `tuning`. A key is matched as sysctl(8) writes it with dots, with `IFNAME` for the
/// attachment's own device, or with the device's name. An expression matches anywhere in a key: begin it with `^` and end
/// it with `$`. Empty lines and such that begin with `#` say nothing.
#[derive(Debug, Clone)]
pub struct AllowList {
    path: PathBuf,
    /// Everything is allowed where there is no list.
    allowed: Option<Vec<Regex>>,
}

impl AllowList {
    /// Reads the list of a node; where there is no such file, every setting of a pod is allowed.
    ///
    /// # Errors
    /// Where it cannot be read, or a line is no regular expression: then nobody knows what is allowed.
    pub fn read(path: &Path) -> Result<Self, AllowListError> {
        let failed = |source| AllowListError::Io { path: path.to_owned(), source };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { path: path.to_owned(), allowed: None });
            }
            Err(error) => return Err(failed(error)),
        };
        let mut allowed = Vec::new();
        for (number, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let malformed = |e: regex_lite::Error| AllowListError::Line {
                path: path.to_owned(),
                line: number + 1,
                reason: e.to_string(),
            };
            allowed.push(Regex::new(line).map_err(malformed)?);
        }
        Ok(Self { path: path.to_owned(), allowed: Some(allowed) })
    }

    /// Refuses settings that the node does not allow. The attachment's device is called `ifname` in the pod.
    ///
    /// # Errors
    /// Names the first of them.
    pub fn check(&self, sysctls: &Sysctls, ifname: &IfName) -> Result<(), PlanError> {
        let Some(allowed) = &self.allowed else { return Ok(()) };
        for key in sysctls.0.keys() {
            let names = match key.is_of(ifname) {
                true => vec![key.with_device(DEVICE).to_string(), key.with_device(ifname.as_str()).to_string()],
                false => vec![key.to_string()],
            };
            if !allowed.iter().any(|regex| names.iter().any(|name| regex.is_match(name))) {
                let reason = format!(
                    "this node does not allow it; drop it, or have the node's administrator add a line to {}",
                    self.path.display()
                );
                return Err(invalid(key.to_string(), reason));
            }
        }
        Ok(())
    }
}

/// Why it is not known what a node allows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AllowListError {
    /// The file system refused.
    #[error("{}: {source}; nothing is allowed until it can be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it answered.
        #[source]
        source: io::Error,
    },
    /// A line is no regular expression.
    #[error("{}: line {line}: {reason}; nothing is allowed until it is right", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::section;

    fn read(value: Value) -> Result<Sysctls, String> {
        section::read("link.sysctl", &value).map_err(|e| e.to_string())
    }

    fn named(value: Value, ifname: &str) -> Vec<(String, bool)> {
        let settings = read(value).unwrap().settings(&ifname.parse().unwrap()).unwrap();
        settings.into_iter().map(|s| (s.name, s.pattern.is_some())).collect()
    }

    #[test]
    fn keys_are_read_as_sysctl_writes_them() {
        let own = |name: &str| (name.to_owned(), true);
        let of_all = |name: &str| (name.to_owned(), false);
        for (key, ifname, expected) in [
            ("net.core.somaxconn", "eth0", of_all("core/somaxconn")),
            ("net/core/somaxconn", "eth0", of_all("core/somaxconn")),
            ("net.ipv4.conf.IFNAME.rp_filter", "eth0", own("ipv4/conf/eth0/rp_filter")),
            ("net.ipv4.conf.eth0.rp_filter", "eth0", own("ipv4/conf/eth0/rp_filter")),
            ("net.ipv4.conf.eth1.rp_filter", "eth0", of_all("ipv4/conf/eth1/rp_filter")),
            ("net.ipv6.neigh.IFNAME.retrans_time_ms", "a.7", own("ipv6/neigh/a.7/retrans_time_ms")),
            ("net/ipv4/conf/a.7/rp_filter", "a.7", own("ipv4/conf/a.7/rp_filter")),
            ("net.ipv4.conf.a/7.rp_filter", "a.7", own("ipv4/conf/a.7/rp_filter")),
            ("net.ipv4.conf.all.rp_filter", "eth0", of_all("ipv4/conf/all/rp_filter")),
            // A device may be called as a family is.
            ("net.ipv4.ip_forward", "ipv4", of_all("ipv4/ip_forward")),
        ] {
            assert_eq!(named(json!({ key: "1" }), ifname), [expected], "{key}");
        }
        assert_eq!(dotted("ipv4/conf/a.7/rp_filter"), "net.ipv4.conf.a/7.rp_filter");
        let both = json!({ "net.ipv4.conf.IFNAME.forwarding": "0", "net.ipv4.ip_forward": "1" });
        assert_eq!(named(both, "eth0"), [of_all("ipv4/ip_forward"), own("ipv4/conf/eth0/forwarding")]);
        let written = json!({ "net.ipv4.conf.a/7.rp_filter": "2" });
        assert_eq!(json!(read(written.clone()).unwrap()), written);
    }

    #[test]
    fn what_is_outside_or_twice_is_refused() {
        for key in [
            "kernel.hostname",
            "net",
            "net.core",
            "",
            "net/../kernel/hostname",
            "net.ipv4.//.//.kernel.hostname",
            "net/ipv4/./ip_forward",
            "net//ip_forward/x",
            "/proc/sys/net/core/somaxconn",
            "net.ipv4.conf.a b.rp_filter",
            "net.core.so\u{0}maxconn",
            "net.ipv4.IFNAME.all.forwarding",
            "net.IFNAME.ip_forward",
            "net.ipv4.conf.IFNAME",
            "net.ipv4.conf.IFNAME.IFNAME",
            "net.ipv4.neigh.IFNAME.a.b",
        ] {
            let error = read(json!({ key: "1" })).unwrap_err();
            assert!(error.starts_with("link.sysctl: ") && error.contains(&format!("{key:?}")), "{key}: {error}");
        }
        assert!(read(json!({ "net.core.somaxconn": "1\n2" })).unwrap_err().contains("control"));
        let twice = json!({ "net.core.somaxconn": "1", "net/core/somaxconn": "2" });
        assert!(read(twice).unwrap_err().contains("twice"));
        let twice = json!({ "net.ipv4.conf.IFNAME.rp_filter": "1", "net.ipv4.conf.eth0.rp_filter": "2" });
        let twice = read(twice).unwrap();
        assert!(twice.settings(&"eth0".parse().unwrap()).unwrap_err().to_string().contains("twice"));
        assert_eq!(twice.settings(&"eth1".parse().unwrap()).unwrap().len(), 2);
    }

    #[test]
    fn a_node_allows_what_its_list_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("allowlist.conf");
        let eth0 = "eth0".parse().unwrap();
        let check = |key: &str| {
            let list = AllowList::read(&path).map_err(|e| e.to_string())?;
            list.check(&read(json!({ key: "1" })).unwrap(), &eth0).map_err(|e| e.to_string())
        };
        check("net.core.somaxconn").unwrap();

        // The lines of the reference plugin's documentation, and such as clusters have.
        std::fs::write(&path, "# of the node\n\n ^net\\.core\\.somaxconn$ \n^net.ipv4.conf.IFNAME.[a-z_]*$\n").unwrap();
        for key in [
            "net.core.somaxconn",
            "net/core/somaxconn",
            "net.ipv4.conf.eth0.rp_filter",
            "net.ipv4.conf.IFNAME.rp_filter",
        ] {
            check(key).unwrap();
        }
        for key in [
            "net.core.somaxconn2",
            "net.ipv4.conf.all.rp_filter",
            "net.ipv4.conf.eth1.rp_filter",
            "net.ipv4.ip_forward",
        ] {
            let error = check(key).unwrap_err();
            assert!(error.starts_with(&format!("link.sysctl {key:?}: this node does not allow it")), "{error}");
        }
        std::fs::write(&path, "^net\\.ipv4\\.conf\\.eth0\\.").unwrap();
        check("net.ipv4.conf.IFNAME.rp_filter").unwrap();
        std::fs::write(&path, "").unwrap();
        check("net.core.somaxconn").unwrap_err();
        std::fs::write(&path, "net.core\n(\n").unwrap();
        assert!(check("net.core.somaxconn").unwrap_err().contains("line 2"));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(check("net.core.somaxconn").unwrap_err().contains("nothing is allowed"));
    }
}
