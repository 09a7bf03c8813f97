//! `ens1#0-3,7`: a port, and which of its functions.

use std::fmt;
use std::str::FromStr;

use dcenet_core::model::{IfName, ParseError};
use serde::{Deserialize, Serialize};

use crate::address::{PciAddress, VfIndex};
use crate::inventory::PhysicalFunction;

/// Ranges of functions of a port, apart from each other and in order: `0-3,7`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VfRanges(Vec<(u16, u16)>);

impl VfRanges {
    /// Whether a function is in one of them.
    pub fn has(&self, index: VfIndex) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&index.0))
    }

    fn meets(&self, other: &Self) -> bool {
        self.0.iter().any(|(a, b)| other.0.iter().any(|(c, d)| a <= d && c <= b))
    }
}

impl FromStr for VfRanges {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let refuse = |reason| ParseError { kind: "VF ranges", value: s.to_owned(), reason };
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            let form = "not numbers and ranges joined by ',', as 0-3,7; functions count from 0 to 65535";
            text.parse().ok().filter(|_| digits).ok_or(refuse(form))
        };
        let mut ranges: Vec<(u16, u16)> = Vec::new();
        for part in s.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(refuse("a range that ends before it begins; give the lower number first"));
            }
            if ranges.iter().any(|(a, b)| *a <= last && first <= *b) {
                return Err(refuse("names a function twice; name it once"));
            }
            ranges.push((first, last));
        }
        ranges.sort_unstable();
        Ok(Self(ranges))
    }
}

impl fmt::Display for VfRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (first, last)) in self.0.iter().enumerate() {
            let comma = if number == 0 { "" } else { "," };
            if first == last { write!(f, "{comma}{first}")? } else { write!(f, "{comma}{first}-{last}")? }
        }
        Ok(())
    }
}

/// A port by the name of its device or by its PCI address, and which of its functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PfSelector {
    /// The port.
    pub port: PortName,
    /// Its functions; all where absent.
    pub ranges: Option<VfRanges>,
}

/// How a port is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortName {
    /// By the name that one of its devices has now.
    Netdev(IfName),
    /// By its address.
    Address(PciAddress),
}

impl PfSelector {
    pub(super) fn has(&self, pf: &PhysicalFunction, index: VfIndex) -> bool {
        let port = match &self.port {
            PortName::Netdev(name) => pf.netdevs.iter().any(|netdev| netdev.name == name.as_str()),
            PortName::Address(address) => pf.address == *address,
        };
        port && self.ranges.as_ref().is_none_or(|ranges| ranges.has(index))
    }

    /// Whether both may have one function.
    pub(super) fn meets(&self, other: &Self) -> bool {
        let ports = match (&self.port, &other.port) {
            (PortName::Netdev(a), PortName::Netdev(b)) => a == b,
            (PortName::Address(a), PortName::Address(b)) => a == b,
            _ => true,
        };
        let ranges = match (&self.ranges, &other.ranges) {
            (Some(a), Some(b)) => a.meets(b),
            _ => true,
        };
        ports && ranges
    }
}

impl FromStr for PfSelector {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        // A name may hold '#' itself; what follows the last one are ranges.
        let (port, ranges) = match s.rsplit_once('#') {
            Some((port, ranges)) => (port, Some(ranges.parse()?)),
            None => (s, None),
        };
        let port = match port.parse::<PciAddress>() {
            Ok(address) => PortName::Address(address),
            Err(error) if port.contains(':') => return Err(error),
            Err(_) => PortName::Netdev(port.parse()?),
        };
        Ok(Self { port, ranges })
    }
}

impl fmt::Display for PfSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.port {
            PortName::Netdev(name) => write!(f, "{name}")?,
            PortName::Address(address) => write!(f, "{address}")?,
        }
        self.ranges.as_ref().map_or(Ok(()), |ranges| write!(f, "#{ranges}"))
    }
}

impl TryFrom<String> for PfSelector {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<PfSelector> for String {
    fn from(selector: PfSelector) -> String {
        selector.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_round_trip() {
        for text in ["ens1", "ens1#0", "ens1#0-3,7,9-12", "0000:03:00.0#1", "odd#name#2"] {
            assert_eq!(text.parse::<PfSelector>().unwrap().to_string(), text);
        }
        assert_eq!("ens1#9,0-3".parse::<PfSelector>().unwrap().to_string(), "ens1#0-3,9");
    }

    #[test]
    fn bad_ones_are_refused_with_the_reason() {
        for (text, reason) in [
            ("ens1#", "not numbers"),
            ("ens1#+1", "not numbers"),
            ("ens1#0-", "not numbers"),
            ("ens1#65536", "not numbers"),
            ("ens1#3-1", "lower number first"),
            ("ens1#0-3,2", "twice"),
            ("0000:03:0.0#1", "PCI address"),
            ("#1", "interface name"),
            ("a-name-too-long-for-one", "interface name"),
        ] {
            let error = text.parse::<PfSelector>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
