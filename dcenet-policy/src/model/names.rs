//! Names of the Domain Name System: what rules ask for, and what has been learnt of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};

use super::Time;

/// A full name of at least two labels, in lower case and without the dot at its end (RFC 1035, section 2.3).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainName(Arc<str>);

/// What is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no full domain name: labels of 1 to 63 of a-z, 0-9, - and _, that begin and end with a letter or digit, at \
     least two, with dots between them, 253 characters at most"
)]
pub struct NoName {
    text: String,
}

impl DomainName {
    /// The name, in lower case, without the dot at its end.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DomainName {
    type Err = NoName;

    fn from_str(text: &str) -> Result<Self, NoName> {
        let name = text.strip_suffix('.').unwrap_or(text);
        // A label may begin with `_` where it is no host's (RFC 8552), and nobody connects to such a name.
        let is_end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let is_label = |label: &str| {
            let bytes = label.as_bytes();
            let known = bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
            bytes.len() <= 63 && known && is_end(bytes.first()) && is_end(bytes.last())
        };
        if name.len() <= 253 && name.contains('.') && name.split('.').all(is_label) {
            Ok(Self(name.to_ascii_lowercase().into()))
        } else {
            Err(NoName { text: text.chars().take(300).collect() })
        }
    }
}

impl TryFrom<String> for DomainName {
    type Error = NoName;

    fn try_from(text: String) -> Result<Self, NoName> {
        text.parse()
    }
}

impl From<DomainName> for String {
    fn from(name: DomainName) -> Self {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names that a rule means: one, or (`*.example.com`) all that have one label or more before it, and not itself; as
/// `DomainName` of `policy.networking.k8s.io/v1alpha2` has it. Upper and lower case are the same (RFC 4343).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NamePattern {
    /// This name alone.
    Exactly(DomainName),
    /// All names below this one.
    Below(DomainName),
}

impl NamePattern {
    /// Every pattern that means the name.
    pub(crate) fn all_of(name: &DomainName) -> impl Iterator<Item = Self> + '_ {
        let dots = name.as_str().match_indices('.').map(|(at, _)| &name.as_str()[at + 1..]);
        let below = dots.filter(|parent| parent.contains('.')).map(|parent| Self::Below(DomainName(parent.into())));
        [Self::Exactly(name.clone())].into_iter().chain(below)
    }
}

impl FromStr for NamePattern {
    type Err = NoName;

    fn from_str(text: &str) -> Result<Self, NoName> {
        match text.strip_prefix("*.") {
            None => text.parse().map(Self::Exactly),
            Some(parent) => parent.parse().map(Self::Below).map_err(|_| NoName { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exactly(name) => name.fmt(f),
            Self::Below(name) => write!(f, "*.{name}"),
        }
    }
}

impl Serialize for NamePattern {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// Addresses that have been learnt of names, each with the time until which it is to be known. An address counts while it is
/// here: whoever keeps a cluster takes out what is over ([`Names::expire`]), and no verdict asks the time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    addresses: BTreeMap<DomainName, BTreeMap<IpAddr, Time>>,
    names: BTreeMap<IpAddr, BTreeSet<DomainName>>,
    ends: BTreeSet<(Time, DomainName, IpAddr)>,
}

impl Names {
    /// Adds an address of a name, or keeps it until a later time. Returns whether it is new.
    pub fn learn(&mut self, name: DomainName, address: IpAddr, until: Time) -> bool {
        let of_name = self.addresses.entry(name.clone()).or_default();
        let before = of_name.get(&address).copied();
        let until = before.map_or(until, |before| before.max(until));
        of_name.insert(address, until);
        if let Some(before) = before {
            self.ends.remove(&(before, name.clone(), address));
        }
        self.names.entry(address).or_default().insert(name.clone());
        self.ends.insert((until, name, address));
        before.is_none()
    }

    /// Removes an address of a name. Returns whether it was there.
    pub fn forget(&mut self, name: &DomainName, address: IpAddr) -> bool {
        let Some(of_name) = self.addresses.get_mut(name) else { return false };
        let Some(until) = of_name.remove(&address) else { return false };
        if of_name.is_empty() {
            self.addresses.remove(name);
        }
        if let Some(of_address) = self.names.get_mut(&address) {
            of_address.remove(name);
            if of_address.is_empty() {
                self.names.remove(&address);
            }
        }
        self.ends.remove(&(until, name.clone(), address));
        true
    }

    /// Removes what is to be known no longer than until this time; returns whose names are others now.
    pub fn expire(&mut self, now: Time) -> BTreeSet<IpAddr> {
        let over: Vec<_> = self.by_end().take_while(|(until, ..)| *until <= now).cloned().collect();
        for (_, name, address) in &over {
            self.forget(name, *address);
        }
        over.into_iter().map(|(_, _, address)| address).collect()
    }

    /// The same but for the names of these addresses.
    pub(crate) fn without(&self, addresses: &BTreeSet<IpAddr>) -> Self {
        let mut left = self.clone();
        for address in addresses {
            for name in self.names.get(address).into_iter().flatten() {
                left.forget(name, *address);
            }
        }
        left
    }

    /// When the first address is to be forgotten.
    pub fn next_end(&self) -> Option<Time> {
        self.ends.first().map(|(until, ..)| *until)
    }

    /// All pairs, by the time until which they are to be known.
    pub(crate) fn by_end(&self) -> impl DoubleEndedIterator<Item = &(Time, DomainName, IpAddr)> {
        self.ends.iter()
    }

    /// The addresses of a name, each with the time until which it is to be known.
    pub fn addresses(&self, name: &DomainName) -> Option<&BTreeMap<IpAddr, Time>> {
        self.addresses.get(name)
    }

    /// All names with their addresses.
    pub fn iter(&self) -> impl Iterator<Item = (&DomainName, &BTreeMap<IpAddr, Time>)> {
        self.addresses.iter()
    }

    /// All addresses with their names.
    pub(crate) fn by_address(&self) -> impl Iterator<Item = (&IpAddr, &BTreeSet<DomainName>)> {
        self.names.iter()
    }

    /// The names of an address, each with the time until which that is to be known.
    pub fn of_address(&self, address: IpAddr) -> impl Iterator<Item = (&DomainName, Time)> {
        let names = self.names.get(&address).into_iter().flatten();
        names.filter_map(move |name| Some((name, *self.addresses.get(name)?.get(&address)?)))
    }

    /// How many pairs of name and address there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether nothing has been learnt.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
}

impl Serialize for Names {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        self.addresses.serialize(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_any_case_and_what_is_none_is_refused() {
        let name = |text: &str| text.parse::<DomainName>().map(|name| name.to_string());
        assert_eq!(name("DB.Example.com.").unwrap(), "db.example.com");
        assert_eq!(name("a_b.1.x-y").unwrap(), "a_b.1.x-y");
        let long = format!("{}.com", "a".repeat(64));
        let longest = vec!["a".repeat(63); 4].join(".");
        for bad in [
            "", ".", "com", "com.", "a..b", "-a.com", "a-.com", "a.com..", "*.a.com", "ä.com", "a b.com", &long,
            &longest,
        ] {
            assert!(name(bad).is_err(), "{bad}");
        }
        let pattern = |text: &str| text.parse::<NamePattern>().map(|pattern| pattern.to_string());
        assert_eq!(pattern("*.Example.com").unwrap(), "*.example.com");
        for bad in ["*", "*.", "*.com", "a.*.com", "*a.com", "*.*.com"] {
            assert!(pattern(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_asterisk_stands_for_one_label_or_more() {
        let all = |name: &str| -> Vec<String> {
            NamePattern::all_of(&name.parse().unwrap()).map(|pattern| pattern.to_string()).collect()
        };
        assert_eq!(all("a.b.example.com"), ["a.b.example.com", "*.b.example.com", "*.example.com"]);
        assert_eq!(all("example.com"), ["example.com"]);
    }

    #[test]
    fn an_address_is_known_until_the_latest_of_its_times() {
        let (db, api): (DomainName, DomainName) =
            ("db.example.com".parse().unwrap(), "api.example.com".parse().unwrap());
        let [one, two]: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "2001:db8::2".parse().unwrap()];
        let mut names = Names::default();
        assert!(names.learn(db.clone(), one, 10));
        assert!(!names.learn(db.clone(), one, 30));
        assert!(!names.learn(db.clone(), one, 20));
        assert!(names.learn(db.clone(), two, 15));
        assert!(names.learn(api.clone(), one, 40));
        assert_eq!((names.len(), names.next_end()), (3, Some(15)));
        assert_eq!(names.of_address(one).collect::<Vec<_>>(), [(&api, 40), (&db, 30)]);
        assert_eq!(names.expire(14), [].into());
        assert_eq!(names.expire(15), [two].into());
        assert_eq!(names.expire(30), [one].into());
        assert_eq!(names.of_address(one).collect::<Vec<_>>(), [(&api, 40)]);
        assert!(names.addresses(&db).is_none());
        assert_eq!(serde_json::to_string(&names).unwrap(), r#"{"api.example.com":{"192.0.2.1":40}}"#);
        assert_eq!(names.expire(40), [one].into());
        assert_eq!(names, Names::default());
    }
}
