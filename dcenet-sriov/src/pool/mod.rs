//! Pools: which virtual functions are handed out under which name.
//!
//! ```json
//! [ { "name": "db", "select": [ { "pfs": ["ens1#0-3", "ens2#0-3"], "drivers": ["igbvf"] } ] },
//!   { "name": "dpdk", "select": [ { "vendors": ["15b3"], "numa": [1] } ], "exclude": [ { "pfs": ["ens9"] } ] } ]
//! ```
//!
//! A function is in a pool when one of the pool's selectors has it and none of its exclusions has. A selector has it when
//! every key that is given does; a key does when one of its values fits. No function may be in two pools.
//!
//! Bed: fixture; the use that the host makes of a port: netns.

mod host_use;
mod ranges;

use std::collections::BTreeMap;
use std::fmt;

use dcenet_core::section::{self, SectionError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use host_use::{HostUse, InUse};
pub use ranges::{PfSelector, VfRanges};

use crate::address::PciAddress;
use crate::inventory::{Inventory, LinkType, PhysicalFunction, VirtualFunction};

/// Pools with different names, whose selectors name something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pools(Vec<PoolConfig>);

/// One pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PoolConfig {
    /// Its name.
    pub name: String,
    /// Which functions it has: those of any of these.
    pub select: Vec<Selector>,
    /// Which of them it has not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<Selector>,
    /// Whether functions may be of a port that the host itself uses: over which its default route leads, or which is part
    /// of a bridge or bond. Whoever configures such a port's functions can cut the host off.
    #[serde(default)]
    pub shared_port: bool,
}

/// What functions have in common. An absent key fits all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Vendors, in hexadecimal, such as `8086`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendors: Option<Vec<PciId>>,
    /// Devices, which the virtual functions are and not their ports, such as `10ca`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<PciId>>,
    /// Drivers of the functions, such as `igbvf` or `vfio-pci`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drivers: Option<Vec<String>>,
    /// Ports, by the name of their device or by their PCI address, with ranges of functions: `ens1#0-3,7`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pfs: Option<Vec<PfSelector>>,
    /// Functions, by their PCI address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<PciAddress>>,
    /// NUMA nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<Vec<u32>>,
    /// What runs on the port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_types: Option<Vec<LinkType>>,
}

/// A vendor's or device's number: four hexadecimal digits, with or without `0x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciId(pub u16);

impl TryFrom<String> for PciId {
    type Error = dcenet_core::model::ParseError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let digits = text.strip_prefix("0x").unwrap_or(&text);
        let good = digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        match u16::from_str_radix(digits, 16) {
            Ok(id) if good => Ok(Self(id)),
            _ => Err(dcenet_core::model::ParseError {
                kind: "PCI id",
                value: text,
                reason: "not four hexadecimal digits, as 8086; `lspci -n` tells them",
            }),
        }
    }
}

impl From<PciId> for String {
    fn from(id: PciId) -> String {
        format!("{:04x}", id.0)
    }
}

/// What a pool has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Members {
    /// The pool's name.
    pub pool: String,
    /// Its functions, in the order of their addresses.
    pub functions: Vec<PciAddress>,
    /// The ports and functions whose use by the host keeps them out.
    pub refused: Vec<Refused>,
}

/// A device that a pool selects and that the host uses itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The port, with all its functions, or one function.
    pub address: PciAddress,
    /// Its network device.
    pub netdev: String,
    /// What the host uses it for.
    pub used: InUse,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, netdev, used } = self;
        write!(f, "{netdev} ({address}) {used}; select another, or set \"sharedPort\": true")
    }
}

/// Functions that two pools have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "pools {first:?} and {second:?} both have {}; exclude {them} from one of them",
    list(functions),
    them = if functions.len() == 1 { "it" } else { "them" }
)]
pub struct Overlap {
    /// The pool that stands first in the configuration.
    pub first: String,
    /// The other one.
    pub second: String,
    /// The functions, in the order of their addresses.
    pub functions: Vec<PciAddress>,
}

fn list(functions: &[PciAddress]) -> String {
    let mut text: Vec<String> = functions.iter().take(4).map(PciAddress::to_string).collect();
    if functions.len() > 4 {
        text.push(format!("{} more", functions.len() - 4));
    }
    text.join(", ")
}

/// Why pools cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(Overlap::to_string).collect::<Vec<_>>().join("; "))]
pub struct Overlaps(pub Vec<Overlap>);

impl Pools {
    /// Reads pools from a configuration. `path` is where they stand in it, for errors.
    ///
    /// # Errors
    /// Names the field, what it says, and what would be right.
    ///
    /// Bed: fixture.
    pub fn read(path: &str, value: &Value) -> Result<Self, SectionError> {
        let pools: Vec<PoolConfig> = section::read(path, value)?;
        for (number, pool) in pools.iter().enumerate() {
            let wrong = |field: String, reason: String| {
                Err(SectionError { field: format!("{path}[{number}].{field}"), reason })
            };
            if pool.name.is_empty() {
                return wrong("name".into(), "empty; give the pool a name by which it is asked for".into());
            }
            if let Some(first) = pools[..number].iter().position(|other| other.name == pool.name) {
                let reason = format!("{:?} is the name of {path}[{first}] too; choose another", pool.name);
                return wrong("name".into(), reason);
            }
            if pool.select.is_empty() {
                return wrong("select".into(), "[] has no function; give a selector".into());
            }
            for (key, selectors) in [("select", &pool.select), ("exclude", &pool.exclude)] {
                for (at, selector) in selectors.iter().enumerate() {
                    if let Err((inner, reason)) = selector.check() {
                        return wrong(format!("{key}[{at}]{inner}"), reason);
                    }
                }
            }
        }
        Ok(Self(pools))
    }

    /// The pools as configured.
    pub fn configs(&self) -> &[PoolConfig] {
        &self.0
    }

    /// What each pool has now.
    ///
    /// # Errors
    /// All overlaps, with the names of both pools. What the host uses overlaps too, for it may be free later.
    ///
    /// Bed: fixture.
    pub fn resolve(&self, inventory: &Inventory, host: &HostUse) -> Result<Vec<Members>, Overlaps> {
        let mut owners: BTreeMap<PciAddress, Vec<usize>> = BTreeMap::new();
        let mut all: Vec<Members> = Vec::new();
        for (number, pool) in self.0.iter().enumerate() {
            let mut members = Members { pool: pool.name.clone(), functions: Vec::new(), refused: Vec::new() };
            for (pf, vf) in inventory.vfs().filter(|(pf, vf)| pool.has(pf, vf)) {
                owners.entry(vf.address).or_default().push(number);
                let names = pf.netdevs.iter().map(|netdev| (pf.address, &netdev.name));
                let names = names.chain(vf.netdevs.iter().map(|name| (vf.address, name)));
                let mut used = names.filter_map(|(address, name)| Some((address, name, host.by(name)?)));
                match used.next().filter(|_| !pool.shared_port) {
                    None => members.functions.push(vf.address),
                    Some((address, name, used)) => {
                        let refused = Refused { address, netdev: name.clone(), used: used.clone() };
                        if !members.refused.contains(&refused) {
                            members.refused.push(refused);
                        }
                    }
                }
            }
            members.functions.sort_unstable();
            all.push(members);
        }
        let mut overlaps: BTreeMap<(usize, usize), Vec<PciAddress>> = BTreeMap::new();
        for (address, pools) in owners {
            for (at, first) in pools.iter().enumerate() {
                for second in &pools[at + 1..] {
                    overlaps.entry((*first, *second)).or_default().push(address);
                }
            }
        }
        if overlaps.is_empty() {
            return Ok(all);
        }
        let name = |number: usize| self.0[number].name.clone();
        let told = overlaps.into_iter().map(|((first, second), functions)| Overlap {
            first: name(first),
            second: name(second),
            functions,
        });
        Err(Overlaps(told.collect()))
    }

    /// Pairs of pools that would have a function in common on some machine, told from the configuration alone: no key
    /// keeps a selector of one apart from a selector of the other. A port's name and its address may be of one port.
    ///
    /// Bed: fixture.
    pub fn possible_overlaps(&self) -> Vec<(&str, &str)> {
        let mut pairs = Vec::new();
        for (at, first) in self.0.iter().enumerate() {
            for second in &self.0[at + 1..] {
                let meets = |a: &Selector| second.select.iter().any(|b| !a.is_apart_from(b));
                if first.select.iter().any(meets) {
                    pairs.push((first.name.as_str(), second.name.as_str()));
                }
            }
        }
        pairs
    }
}

impl PoolConfig {
    /// Whether a function is in the pool, whatever the host uses it for.
    pub fn has(&self, pf: &PhysicalFunction, vf: &VirtualFunction) -> bool {
        let any = |selectors: &[Selector]| selectors.iter().any(|selector| selector.has(pf, vf));
        any(&self.select) && !any(&self.exclude)
    }
}

impl Selector {
    /// Refuses what has no function or all: an error in the place where one meant something.
    fn check(&self) -> Result<(), (String, String)> {
        let Self { vendors, devices, drivers, pfs, addresses, numa, link_types } = self;
        let lens = [
            ("vendors", vendors.as_ref().map(Vec::len)),
            ("devices", devices.as_ref().map(Vec::len)),
            ("drivers", drivers.as_ref().map(Vec::len)),
            ("pfs", pfs.as_ref().map(Vec::len)),
            ("addresses", addresses.as_ref().map(Vec::len)),
            ("numa", numa.as_ref().map(Vec::len)),
            ("linkTypes", link_types.as_ref().map(Vec::len)),
        ];
        if lens.iter().all(|(_, len)| len.is_none()) {
            let known = lens.map(|(key, _)| key).join(", ");
            return Err((String::new(), format!("{{}} has every function of the host; give one of {known}")));
        }
        match lens.iter().find(|(_, len)| *len == Some(0)) {
            Some((key, _)) => Err((format!(".{key}"), "[] fits no function; leave the key out, or name one".into())),
            None => Ok(()),
        }
    }

    fn has(&self, pf: &PhysicalFunction, vf: &VirtualFunction) -> bool {
        let Self { vendors, devices, drivers, pfs, addresses, numa, link_types } = self;
        let link_type = || pf.netdevs.first().map(|netdev| netdev.link_type);
        fits(vendors, |vendor| vendor.0 == vf.ids.vendor)
            && fits(devices, |device| device.0 == vf.ids.device)
            && fits(drivers, |driver| vf.driver.name() == Some(driver))
            && fits(pfs, |selector| selector.has(pf, vf.index))
            && fits(addresses, |address| *address == vf.address)
            && fits(numa, |node| pf.location.numa == Some(*node))
            && fits(link_types, |wanted| link_type() == Some(*wanted))
    }

    fn is_apart_from(&self, other: &Self) -> bool {
        let Self { vendors, devices, drivers, pfs, addresses, numa, link_types } = self;
        apart(vendors, &other.vendors, |a, b| a == b)
            || apart(devices, &other.devices, |a, b| a == b)
            || apart(drivers, &other.drivers, |a, b| a == b)
            || apart(pfs, &other.pfs, PfSelector::meets)
            || apart(addresses, &other.addresses, |a, b| a == b)
            || apart(numa, &other.numa, |a, b| a == b)
            || apart(link_types, &other.link_types, |a, b| a == b)
    }
}

fn fits<T>(values: &Option<Vec<T>>, mut fit: impl FnMut(&T) -> bool) -> bool {
    values.as_ref().is_none_or(|values| values.iter().any(&mut fit))
}

fn apart<T>(one: &Option<Vec<T>>, other: &Option<Vec<T>>, meets: impl Fn(&T, &T) -> bool) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => !one.iter().any(|a| other.iter().any(|b| meets(a, b))),
        _ => false,
    }
}
