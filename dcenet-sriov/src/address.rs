//! Where a function is: its PCI address, the bridges above it, and its number among the functions of its port.

use std::fmt;
use std::str::FromStr;

use dcenet_core::model::ParseError;
use serde::{Deserialize, Serialize};

/// The address of a PCI function, as `0000:03:10.2`: domain, bus, device, function.
///
/// A domain has 16 bits, or 32 where a controller adds domains of its own, as Intel's VMD does (`10000:01:00.0`;
/// `drivers/pci/controller/vmd.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// The address of these parts; `None` where the device is above 31 or the function above 7.
    pub const fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 { None } else { Some(Self { domain, bus, device, function }) }
    }

    /// The function that is `distance` routing identifiers further, on a later bus where need be (PCI Express Base
    /// Specification, 9.2.1.2: first VF offset and VF stride); `None` beyond the domain's end.
    pub fn further(self, distance: u32) -> Option<Self> {
        let own = u32::from(self.bus) << 8 | u32::from(self.device) << 3 | u32::from(self.function);
        let id = u16::try_from(own.checked_add(distance)?).ok()?;
        Self::new(self.domain, (id >> 8) as u8, (id >> 3) as u8 & 31, id as u8 & 7)
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl FromStr for PciAddress {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let part = |text: &str, digits: std::ops::RangeInclusive<usize>| {
            let good = digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
            good.then(|| u32::from_str_radix(text, 16).ok()).flatten()
        };
        let parse = || {
            let (domain, rest) = s.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let byte = |text, digits| u8::try_from(part(text, digits)?).ok();
            Self::new(part(domain, 4..=8)?, byte(bus, 2..=2)?, byte(device, 2..=2)?, byte(function, 1..=1)?)
        };
        parse().ok_or_else(|| ParseError {
            kind: "PCI address",
            value: s.to_owned(),
            reason: "not DOMAIN:BUS:DEVICE.FUNCTION in hexadecimal, as 0000:03:10.2; `lspci -D` lists them",
        })
    }
}

impl TryFrom<String> for PciAddress {
    type Error = ParseError;

    fn try_from(text: String) -> Result<Self, ParseError> {
        text.parse()
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> String {
        address.to_string()
    }
}

/// The number of a virtual function among those of its physical function, from 0: N of `virtfnN` and of `ip link set PF
/// vf N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VfIndex(pub u16);

impl fmt::Display for VfIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Vendor and device of a function (`vendor` and `device` in sysfs; its configuration space says 0xffff for both where
/// the function is virtual).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciIds {
    /// Who made it, such as 0x8086.
    pub vendor: u16,
    /// What it is, such as 0x10ca.
    pub device: u16,
}

impl fmt::Display for PciIds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.device)
    }
}

/// Where a device hangs in the machine, for telling which devices are near each other.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Location {
    /// The NUMA node; `None` where firmware names none.
    pub numa: Option<u32>,
    /// The host bridge, such as `pci0000:00`, and the bridges from there down to the device, without itself.
    pub bridges: Vec<String>,
}

/// How far two devices are apart. Smaller is nearer: data between devices below one switch need not reach the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Distance {
    /// Below one host bridge, so many bridges apart.
    Bridges(u16),
    /// Below different host bridges of one NUMA node.
    SameNode,
    /// Nobody says of which NUMA node one of them is.
    UnknownNode,
    /// On different NUMA nodes.
    OtherNode,
}

impl Distance {
    /// A number that grows with the distance, so that distances can be added up: one step beyond a host bridge is more
    /// than all bridges below it, and one beyond a node more than all that.
    pub const fn cost(self) -> u64 {
        match self {
            Self::Bridges(count) => count as u64,
            Self::SameNode => 1 << 20,
            Self::UnknownNode => 2 << 20,
            Self::OtherNode => 3 << 20,
        }
    }
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridges(count) => write!(f, "{count} bridges apart"),
            Self::SameNode => f.write_str("on the same NUMA node"),
            Self::UnknownNode => f.write_str("on an unknown NUMA node"),
            Self::OtherNode => f.write_str("on another NUMA node"),
        }
    }
}

impl Location {
    /// How far another device is.
    pub fn distance(&self, other: &Self) -> Distance {
        let shared = self.bridges.iter().zip(&other.bridges).take_while(|(a, b)| a == b).count();
        if shared > 0 {
            let apart = self.bridges.len() + other.bridges.len() - 2 * shared;
            return Distance::Bridges(u16::try_from(apart).unwrap_or(u16::MAX));
        }
        match (self.numa, other.numa) {
            (Some(a), Some(b)) if a == b => Distance::SameNode,
            (Some(_), Some(_)) => Distance::OtherNode,
            _ => Distance::UnknownNode,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip_and_bad_ones_are_refused() {
        for good in ["0000:03:10.2", "10000:e1:1f.7", "ffffffff:ff:00.0"] {
            assert_eq!(good.parse::<PciAddress>().unwrap().to_string(), good);
        }
        assert_eq!("0000:AB:1F.0".parse::<PciAddress>().unwrap().to_string(), "0000:ab:1f.0");
        for bad in ["", "03:10.2", "0000:03:20.0", "0000:03:10.8", "0000:3:10.2", "0000:03:10.2 ", "0000:+3:10.2"] {
            let error = bad.parse::<PciAddress>().unwrap_err();
            assert!(error.to_string().contains(bad), "{error}");
        }
    }

    #[test]
    fn functions_go_on_over_the_end_of_a_bus() {
        let pf: PciAddress = "0000:01:00.0".parse().unwrap();
        assert_eq!(pf.further(0x80).unwrap().to_string(), "0000:01:10.0");
        assert_eq!(pf.further(0x180).unwrap().to_string(), "0000:02:10.0");
        assert_eq!(pf.further(0xffff), None);
    }

    #[test]
    fn distance_counts_bridges_before_nodes() {
        let at = |numa, bridges: &[&str]| Location { numa, bridges: bridges.iter().map(|b| b.to_string()).collect() };
        let nic = at(Some(0), &["pci0000:00", "0000:00:01.0", "0000:01:00.0"]);
        assert_eq!(nic.distance(&nic), Distance::Bridges(0));
        assert_eq!(nic.distance(&at(Some(0), &["pci0000:00", "0000:00:01.0", "0000:01:01.0"])), Distance::Bridges(2));
        assert_eq!(nic.distance(&at(Some(0), &["pci0000:80"])), Distance::SameNode);
        assert_eq!(nic.distance(&at(None, &["pci0000:80"])), Distance::UnknownNode);
        assert_eq!(nic.distance(&at(Some(1), &["pci0000:80"])), Distance::OtherNode);
    }
}
