//! Calico's blocks (`IPAMBlock` of `crd.projectcalico.org/v1`).
//!
//! `spec.cidr` is the block, and `spec.allocations` has for each of its addresses null, or the number of an element of
//! `spec.attributes`: `handle_id`, and `secondary` with `namespace`, `pod`, `node`, and `type` for what is no pod's.
//!
//! - The handle of a pod is the network's name, a point and the container's id (`GetHandleID` of Calico's CNI plugin), so
//!   the container is known where the id is of the form that runtimes give: 64 hexadecimal digits. Calico does not
//!   write the interface down: it is [`Options::ifname`](super::Options::ifname).
//! - Addresses of tunnels, those reserved for Windows and those of handles without a pod become reservations. Remove them
//!   when Calico is gone.
//! - An attribute with `releasedAt` is of an address that cools, and it is passed over.
//! - A block's affinity `host:NODE` tells the node of what does not tell its own.

use std::net::IpAddr;

use dcenet_core::model::{ContainerId, Workload};
use ipnet::IpNet;
use serde_json::Value;

use super::dump::{Dump, Object, parsed_of, short, text_of};
use super::{Entry, Inventory, Owner, Source, SourceError};
use crate::model::{Addr, NodeName};

/// Dumps of `IPAMBlock`.
#[derive(Debug, Clone, Default)]
pub struct Calico {
    /// The dumps.
    pub dumps: Vec<Dump>,
}

impl Source for Calico {
    fn read(&self) -> Result<Inventory, SourceError> {
        let mut inventory = Inventory::default();
        for object in self.dumps.iter().flat_map(Dump::objects) {
            match object.kind() {
                "IPAMBlock" => block(object, &mut inventory),
                _ => inventory.passed_over.push(object.stranger()),
            }
        }
        Ok(inventory)
    }
}

/// The handle of addresses that Windows keeps for itself.
const WINDOWS: &str = "windows-reserved-ipam-handle";

fn block(object: Object<'_>, inventory: &mut Inventory) {
    let written = object.text("/spec/cidr").unwrap_or_default();
    let Ok(cidr) = written.parse::<IpNet>() else {
        let reason = format!("{written:?} is no prefix, and without it no address is known");
        return inventory.unreadable.push(object.unreadable("spec.cidr", reason));
    };
    let attributes = object.list("/spec/attributes");
    let affinity = object.text("/spec/affinity").and_then(|affinity| affinity.split_once(':'));
    let host: Option<NodeName> = affinity.and_then(|(_, node)| node.parse().ok());
    let mut any = false;
    for (ordinal, allocation) in object.list("/spec/allocations").iter().enumerate() {
        if allocation.is_null() {
            continue;
        }
        any = true;
        let field = format!("spec.allocations[{ordinal}]");
        let address = address_at(cidr, ordinal);
        let attribute = allocation.as_u64().and_then(|index| attributes.get(usize::try_from(index).ok()?));
        let (Some(address), Some(attribute)) = (address, attribute) else {
            let reason = match address {
                None => format!("it is beyond the last address of {cidr}"),
                Some(_) => {
                    format!("{} is the number of no attribute; there are {}", short(allocation), attributes.len())
                }
            };
            let mut unreadable = object.unreadable(&field, reason);
            unreadable.address = address;
            inventory.unreadable.push(unreadable);
            continue;
        };
        if attribute.get("releasedAt").is_some_and(|at| !at.is_null()) {
            inventory.passed_over.push(object.passed_over(&field, format!("{address} was released and cools")));
            continue;
        }
        match owner(attribute, host.clone()) {
            Ok(owner) => inventory.entries.push(Entry { address, owner, origin: object.origin(&field) }),
            Err(reason) => {
                let field = format!("spec.attributes[{}]", short(allocation));
                let mut unreadable = object.unreadable(&field, reason);
                unreadable.address = Some(address);
                unreadable.origin.field.push_str(&format!(" of {address}"));
                inventory.unreadable.push(unreadable);
            }
        }
    }
    if !any {
        inventory.passed_over.push(object.passed_over("", "an empty block"));
    }
}

fn address_at(cidr: IpNet, ordinal: usize) -> Option<IpAddr> {
    let base = Addr::from(cidr.network());
    let bits = base.bits.checked_add(ordinal as u128)?;
    (bits <= base.family.last()).then(|| Addr { family: base.family, bits }.ip()).filter(|ip| cidr.contains(ip))
}

fn owner(attribute: &Value, host: Option<NodeName>) -> Result<Owner, String> {
    if !attribute.is_object() {
        return Err(format!("{} is no attribute", short(attribute)));
    }
    let handle = text_of(attribute, "handle_id")?;
    let secondary = attribute.get("secondary").unwrap_or(&Value::Null);
    let node = parsed_of(secondary, "node").map_err(|e| format!("secondary.{e}"))?.or(host);
    let of_node = |what: &str| match &node {
        Some(node) => format!("calico: {what} of node {node}"),
        None => format!("calico: {what}"),
    };
    if handle == Some(WINDOWS) {
        return Ok(Owner::Outside { holder: of_node("reserved for Windows") });
    }
    let of = |key: &str| text_of(secondary, key).map_err(|e| format!("secondary.{e}"));
    if let Some(kind) = of("type")?
        && of("pod")?.is_none()
    {
        return Ok(Owner::Outside { holder: of_node(kind) });
    }
    let workload = match (of("namespace")?, of("pod")?) {
        (Some(namespace), Some(pod)) => {
            Some(Workload::new(namespace, pod).map_err(|e| format!("secondary.namespace and secondary.pod: {e}"))?)
        }
        _ => None,
    };
    let (uid, ifname) = (None, None);
    match (handle.and_then(container), workload, handle) {
        (Some(container), workload, _) => Ok(Owner::Container { container, ifname, workload, node }),
        (None, Some(workload), _) => Ok(Owner::Workload { workload, ifname, uid, node }),
        (None, None, Some(handle)) => Ok(Owner::Outside { holder: of_node(&format!("handle {handle}")) }),
        (None, None, None) => Err("it names no owner; release the address there once nobody uses it".to_owned()),
    }
}

/// The container of a handle.
fn container(handle: &str) -> Option<ContainerId> {
    let (_, id) = handle.rsplit_once('.')?;
    (id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit())).then(|| id.parse().ok()).flatten()
}
