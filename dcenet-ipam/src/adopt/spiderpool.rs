//! The objects of Spiderpool (`spiderpool.spidernet.io/v2beta1`).
//!
//! - `SpiderIPPool`: `spec.subnet`, and `status.allocatedIPs`, a JSON text in which each address has `pod`
//!   (`namespace/name`), `podUid`, and in older versions `interface`.
//! - `SpiderEndpoint`, named as its pod: `status.current` with `uid`, `node`, and in `ips` the `interface` with `ipv4` and
//!   `ipv6`. It tells the interfaces, without which the claims of a pod with two could not be told apart. The two must
//!   agree: Spiderpool writes them one after the other. An address that an endpoint alone has is adopted for it, for the
//!   pod may go on using it.
//!
//! Spiderpool does not know containers. See the [module above](super) for what an owner becomes.

use std::net::IpAddr;

use dcenet_core::model::{IfName, Workload};
use ipnet::IpNet;
use serde_json::{Map, Value};

use super::dump::{Dump, Object, parsed_of, short, text_of};
use super::{Entry, Inventory, Owner, Source, SourceError, Unreadable};
use crate::model::NodeName;

/// Dumps of `SpiderIPPool` and best also of `SpiderEndpoint`.
#[derive(Debug, Clone, Default)]
pub struct Spiderpool {
    /// The dumps.
    pub dumps: Vec<Dump>,
}

impl Source for Spiderpool {
    fn read(&self) -> Result<Inventory, SourceError> {
        let mut inventory = Inventory::default();
        for object in self.dumps.iter().flat_map(Dump::objects) {
            match object.kind() {
                "SpiderIPPool" => pool(object, &mut inventory),
                "SpiderEndpoint" => endpoint(object, &mut inventory),
                _ => inventory.passed_over.push(object.stranger()),
            }
        }
        Ok(inventory)
    }
}

const FIELD: &str = "status.allocatedIPs";

fn pool(object: Object<'_>, inventory: &mut Inventory) {
    let Some(text) = object.text("/status/allocatedIPs").filter(|text| !text.is_empty()) else {
        return inventory.passed_over.push(object.passed_over("", "an empty pool"));
    };
    let allocations: Map<String, Value> = match serde_json::from_str(text) {
        Ok(allocations) => allocations,
        Err(error) => {
            let reason = format!("it is no JSON map of addresses: {error}");
            return inventory.unreadable.push(object.unreadable(FIELD, reason));
        }
    };
    if allocations.is_empty() {
        return inventory.passed_over.push(object.passed_over("", "an empty pool"));
    }
    let subnet: Option<IpNet> = object.text("/spec/subnet").and_then(|subnet| subnet.parse().ok());
    for (written, allocation) in &allocations {
        let field = format!("{FIELD}[{written:?}]");
        let address: Option<IpAddr> = written.parse().ok();
        let mut refuse = |reason: String| {
            let mut unreadable = object.unreadable(&field, reason);
            unreadable.address = address;
            inventory.unreadable.push(unreadable);
        };
        let Some(ip) = address else {
            refuse(format!("{written:?} is no address"));
            continue;
        };
        if let Some(subnet) = subnet.filter(|subnet| !subnet.contains(&ip)) {
            refuse(format!("{ip} is not in the pool's subnet {subnet}"));
            continue;
        }
        match owner(allocation) {
            Ok(owner) => inventory.entries.push(Entry { address: ip, owner, origin: object.origin(&field) }),
            Err(reason) => refuse(reason),
        }
    }
}

fn owner(allocation: &Value) -> Result<Owner, String> {
    if !allocation.is_object() {
        return Err(format!("{} is no allocation", short(allocation)));
    }
    let Some(workload) = parsed_of(allocation, "pod")? else {
        return Err("pod: it names no pod; release it there once nobody uses it".to_owned());
    };
    let (ifname, uid) = (parsed_of(allocation, "interface")?, text_of(allocation, "podUid")?.map(str::to_owned));
    Ok(Owner::Workload { workload, ifname, uid, node: None })
}

fn endpoint(object: Object<'_>, inventory: &mut Inventory) {
    let current = object.value("/status/current");
    let known = || -> Result<(Workload, Option<String>, Option<NodeName>), Unreadable> {
        let namespace = object.text("/metadata/namespace").unwrap_or_default();
        let workload =
            Workload::new(namespace, object.name()).map_err(|e| object.unreadable("metadata", e.to_string()))?;
        let in_current = |e: String| object.unreadable("status.current", e);
        let uid = text_of(current, "uid").map_err(in_current)?.map(str::to_owned);
        let node = parsed_of(current, "node").map_err(in_current)?;
        Ok((workload, uid, node))
    };
    let (workload, uid, node) = match known() {
        Ok(known) => known,
        Err(unreadable) => return inventory.unreadable.push(unreadable),
    };
    let mut any = false;
    for (i, detail) in object.list("/status/current/ips").iter().enumerate() {
        let place = format!("status.current.ips[{i}]");
        let ifname: Option<IfName> = match parsed_of(detail, "interface") {
            Ok(ifname) => ifname,
            Err(reason) => {
                inventory.unreadable.push(object.unreadable(&place, reason));
                continue;
            }
        };
        for family in ["ipv4", "ipv6"] {
            let field = format!("{place}.{family}");
            let text = match text_of(detail, family) {
                Ok(None) => continue,
                Ok(Some(text)) => text,
                Err(reason) => {
                    inventory.unreadable.push(object.unreadable(&place, reason));
                    continue;
                }
            };
            // With the length of the subnet's prefix.
            let address = text.parse::<IpNet>().map(|net| net.addr()).or_else(|_| text.parse::<IpAddr>());
            let Ok(address) = address else {
                inventory.unreadable.push(object.unreadable(&field, format!("{text:?} is no address")));
                continue;
            };
            any = true;
            let owner = Owner::Workload {
                workload: workload.clone(),
                ifname: ifname.clone(),
                uid: uid.clone(),
                node: node.clone(),
            };
            inventory.entries.push(Entry { address, owner, origin: object.origin(&field) });
        }
    }
    if !any {
        inventory.passed_over.push(object.passed_over("", "an endpoint without addresses"));
    }
}
