//! The objects of whereabouts (`whereabouts.cni.cncf.io/v1alpha1`).
//!
//! - `IPPool`: `spec.range`, and `spec.allocations`, which maps an offset from the range's address, in decimal, to `id`
//!   (the container), `podref` (`namespace/name`) and `ifname`. The pool is named after its range, with `-` for `:` and
//!   `/`, behind the name of its network where it has one.
//! - `OverlappingRangeIPReservation`: named after an address, with `-` for `:`, behind the network's name; `spec` has
//!   `containerid`, `podref` and `ifname`. The two must agree, for whereabouts writes them one after the other, and a
//!   crash between leaves one alone.
//! - `NodeSlicePool`: `status.allocations` tells by `nodeName` and `sliceRange` which node has which part of a range; that
//!   part is an `IPPool` of its own, behind the node's name.
//!
//! Networks are routing domains: only what belongs to one network is read at a time, and the rest passed over.

use std::collections::BTreeMap;
use std::net::IpAddr;

use dcenet_core::model::{ContainerId, Workload};
use ipnet::IpNet;
use serde_json::Value;

use super::dump::{Dump, Object, parsed_of, short};
use super::{Entry, Inventory, Owner, Source, SourceError};
use crate::model::{Addr, NodeName};

/// Dumps of `IPPool`, and best also of `OverlappingRangeIPReservation` and `NodeSlicePool`.
#[derive(Debug, Clone, Default)]
pub struct Whereabouts {
    /// The dumps.
    pub dumps: Vec<Dump>,
    /// The `network_name` of the configuration; empty, as whereabouts has it by default, for the unnamed one.
    pub network_name: String,
}

impl Source for Whereabouts {
    fn read(&self) -> Result<Inventory, SourceError> {
        let mut inventory = Inventory::default();
        let slices = self.slices();
        for object in self.dumps.iter().flat_map(Dump::objects) {
            match object.kind() {
                "IPPool" => self.pool(object, &slices, &mut inventory),
                "OverlappingRangeIPReservation" => self.reservation(object, &mut inventory),
                "NodeSlicePool" => inventory.passed_over.push(object.passed_over("", "the parts of a range by node")),
                _ => inventory.passed_over.push(object.stranger()),
            }
        }
        Ok(inventory)
    }
}

impl Whereabouts {
    /// Nodes by the range that is theirs.
    fn slices(&self) -> BTreeMap<IpNet, String> {
        let pools = self.dumps.iter().flat_map(Dump::objects).filter(|object| object.kind() == "NodeSlicePool");
        let slices = pools.flat_map(|object| object.list("/status/allocations")).filter_map(|slice| {
            let node = slice.get("nodeName")?.as_str()?;
            Some((slice.get("sliceRange")?.as_str()?.parse().ok()?, node.to_owned()))
        });
        slices.filter(|(_, node)| !node.is_empty()).collect()
    }

    fn pool(&self, object: Object<'_>, slices: &BTreeMap<IpNet, String>, inventory: &mut Inventory) {
        let written = object.text("/spec/range").unwrap_or_default();
        let Ok(range) = written.parse::<IpNet>() else {
            let reason = format!("{written:?} is no prefix, and without it no address is known");
            return inventory.unreadable.push(object.unreadable("spec.range", reason));
        };
        let allocations = match object.map("/spec/allocations") {
            Ok(None) => return inventory.passed_over.push(object.passed_over("", "an empty pool")),
            Ok(Some(allocations)) => allocations,
            Err(unreadable) => return inventory.unreadable.push(unreadable),
        };
        let Some(before) = object.name().strip_suffix(&normal(written)) else {
            let reason = format!("the pool is not named after its range {written}, so its network is not known");
            return inventory.unreadable.push(object.unreadable("metadata.name", reason));
        };
        let mut network = before.strip_suffix('-').unwrap_or(before);
        let mut node: Option<NodeName> = None;
        if let Some(name) = slices.get(&range)
            && let Some(before) = network.strip_suffix(name.as_str())
            && (before.is_empty() || before.ends_with('-'))
        {
            network = before.strip_suffix('-').unwrap_or(before);
            node = name.parse().ok();
        }
        if network != self.network_name {
            let what = format!("of network {network:?}, and this is {:?}: read apart", self.network_name);
            return inventory.passed_over.push(object.passed_over("", what));
        }
        for (offset, allocation) in allocations {
            let field = format!("spec.allocations[{offset:?}]");
            let address = address_at(range, offset);
            match address.clone().and_then(|_| owner(allocation, "id", node.clone())) {
                Ok(owner) => {
                    let Ok(address) = address else { continue };
                    inventory.entries.push(Entry { address, owner, origin: object.origin(&field) });
                }
                Err(reason) => {
                    let mut unreadable = object.unreadable(&field, reason);
                    unreadable.address = address.ok();
                    inventory.unreadable.push(unreadable);
                }
            }
        }
    }

    fn reservation(&self, object: Object<'_>, inventory: &mut Inventory) {
        let name = object.name();
        let bare = match self.network_name.as_str() {
            "" => Some(name),
            network => name.strip_prefix(network).and_then(|rest| rest.strip_prefix('-')),
        };
        let address = bare.and_then(|bare| bare.parse().ok().or_else(|| bare.replace('-', ":").parse::<IpAddr>().ok()));
        let Some(address) = address else {
            let what = format!("not named after an address in network {:?}: read apart", self.network_name);
            return inventory.passed_over.push(object.passed_over("", what));
        };
        let spec = object.value("/spec");
        match owner(spec, "containerid", None) {
            Ok(owner) => inventory.entries.push(Entry { address, owner, origin: object.origin("spec") }),
            Err(reason) => {
                let mut unreadable = object.unreadable("spec", reason);
                unreadable.address = Some(address);
                inventory.unreadable.push(unreadable);
            }
        }
    }
}

/// How whereabouts writes a range in names (`normalizeRange` in `pkg/storage/kubernetes/ipam.go`).
fn normal(range: &str) -> String {
    let zero = if range.ends_with(':') { "0" } else { "" };
    format!("{range}{zero}").replace([':', '/'], "-")
}

/// The address at an offset. It counts from the address as written, also where that has bits beyond the prefix.
fn address_at(range: IpNet, offset: &str) -> Result<IpAddr, String> {
    let number: u128 = offset.parse().map_err(|_| format!("the offset {offset:?} is no number"))?;
    if number.to_string() != offset {
        return Err(format!("the offset {offset:?} is not written as whereabouts does"));
    }
    let base = Addr::from(range.addr());
    let bits = base.bits.checked_add(number).filter(|bits| *bits <= base.family.last());
    let address = bits.map(|bits| Addr { family: base.family, bits }.ip()).filter(|ip| range.contains(ip));
    address.ok_or_else(|| format!("the offset {offset} leads out of the range {range}"))
}

fn owner(allocation: &Value, container: &str, node: Option<NodeName>) -> Result<Owner, String> {
    if !allocation.is_object() {
        return Err(format!("{} is no allocation", short(allocation)));
    }
    let workload: Option<Workload> = parsed_of(allocation, "podref")?;
    let ifname = parsed_of(allocation, "ifname")?;
    let container: Option<ContainerId> = parsed_of(allocation, container)?;
    match (container, workload) {
        (Some(container), workload) => Ok(Owner::Container { container, ifname, workload, node }),
        (None, Some(workload)) => Ok(Owner::Workload { workload, ifname, uid: None, node }),
        (None, None) => Err("it names neither a container nor a pod; release it there once nobody uses it".to_owned()),
    }
}
