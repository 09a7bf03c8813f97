//! Names: of interfaces, containers, networks, clusters and workloads.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::{ParseError, serde_by_text, text_value};

/// The name of a network interface: 1 to 15 bytes without `/`, `:` or white space, and not `.` or `..`
/// (`dev_valid_name` in the kernel's `net/core/dev.c`; the CNI specification asks the same of `CNI_IFNAME`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(String);

impl IfName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for IfName {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let refuse = |reason| Err(ParseError::new("interface name", s, reason));
        match s {
            "" => refuse("empty; give 1 to 15 bytes"),
            "." | ".." => refuse("reserved by the kernel; choose another name"),
            _ if s.len() > 15 => refuse("longer than 15 bytes, the kernel's limit; shorten it"),
            _ if s.bytes().any(|b| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace() || b == 0x0b) => {
                refuse("contains '/', ':', NUL or white space, which the kernel refuses")
            }
            _ => Ok(Self(s.to_owned())),
        }
    }
}

/// Checks the CNI specification's form of names: a letter or digit, then letters, digits, `_`, `.` and `-`.
fn cni_name(kind: &'static str, s: &str) -> Result<String, ParseError> {
    let refuse = |reason| Err(ParseError::new(kind, s, reason));
    let mut bytes = s.bytes();
    match bytes.next() {
        None => refuse("empty; give at least one letter or digit"),
        Some(first) if !first.is_ascii_alphanumeric() => refuse("does not begin with a letter or digit"),
        Some(_) if !bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-')) => {
            refuse("has a character other than letters, digits, '_', '.' and '-'")
        }
        Some(_) if s.len() > 253 => refuse("longer than 253 bytes; shorten it"),
        Some(_) => Ok(s.to_owned()),
    }
}

/// The identifier of a container, as the runtime gives it in `CNI_CONTAINERID` (CNI specification 1.1.0, section 2).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(String);

impl ContainerId {
    /// The identifier as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        cni_name("container id", s).map(Self)
    }
}

/// The name of a network configuration, unique on a host (CNI specification 1.1.0, section 1, key `name`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkName(String);

impl NetworkName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NetworkName {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        cni_name("network name", s).map(Self)
    }
}

/// The name of a cluster, unique in its fleet: a DNS label (RFC 1123, section 2.1).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(String);

impl ClusterId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterId {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        dns_name("cluster name", s, 63, false).map(Self)
    }
}

fn dns_name(kind: &'static str, s: &str, limit: usize, dots: bool) -> Result<String, ParseError> {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let ok = s.len() <= limit && if dots { s.split('.').all(label) } else { label(s) };
    if ok {
        Ok(s.to_owned())
    } else {
        Err(ParseError::new(kind, s, "not a DNS name of lower-case letters, digits and '-' (RFC 1123)"))
    }
}

text_value!(IfName, ContainerId, NetworkName, ClusterId);

/// A workload's stable name inside its cluster: `namespace/name`, as `shop/db`.
///
/// It outlives containers: a restarted or rescheduled pod of the same name is the same workload.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Workload {
    namespace: String,
    name: String,
}

impl Workload {
    /// Joins a namespace (a DNS label) and a name (a DNS subdomain).
    pub fn new(namespace: &str, name: &str) -> Result<Self, ParseError> {
        Ok(Self {
            namespace: dns_name("namespace", namespace, 63, false)?,
            name: dns_name("workload name", name, 253, true)?,
        })
    }

    /// The namespace, `shop` of `shop/db`.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name, `db` of `shop/db`.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for Workload {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let (namespace, name) =
            s.split_once('/').ok_or(ParseError::new("workload", s, "not of the form namespace/name"))?;
        Self::new(namespace, name)
    }
}

serde_by_text!(Workload);

/// Labels of a workload or namespace, by key.
pub type LabelSet = BTreeMap<String, String>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_follow_the_kernels_rule() {
        for good in ["eth0", "a", "net1.100", "dc0123456789abc", "naïve"] {
            assert_eq!(good.parse::<IfName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "a\tb", "a\u{b}b", "sixteen-bytes-xx"] {
            let error = bad.parse::<IfName>().unwrap_err();
            assert_eq!(error.value, bad, "{error}");
        }
    }

    #[test]
    fn container_and_network_names_follow_the_specification() {
        for good in ["c1", "0a.b_c-d", "A"] {
            good.parse::<ContainerId>().unwrap();
            good.parse::<NetworkName>().unwrap();
        }
        for bad in ["", "-a", ".a", "a/b", "a b", "ä"] {
            bad.parse::<ContainerId>().unwrap_err();
            bad.parse::<NetworkName>().unwrap_err();
        }
    }

    #[test]
    fn workloads_are_namespace_and_name() {
        let w: Workload = "shop/db-0.replica".parse().unwrap();
        assert_eq!((w.namespace(), w.name()), ("shop", "db-0.replica"));
        assert_eq!(w.to_string(), "shop/db-0.replica");
        for bad in ["shop", "shop/", "/db", "Shop/db", "shop/-db", "a.b/c"] {
            bad.parse::<Workload>().unwrap_err();
        }
    }

    #[test]
    fn values_serialise_as_their_text() {
        let name: IfName = serde_json::from_str("\"eth0\"").unwrap();
        assert_eq!(serde_json::to_string(&name).unwrap(), "\"eth0\"");
        let error = serde_json::from_str::<IfName>("\"a/b\"").unwrap_err();
        assert!(error.to_string().contains("interface name \"a/b\""), "{error}");
    }
}
