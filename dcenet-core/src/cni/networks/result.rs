//! The results of several networks as one, in the form of a version, and as `network-status`.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::config::Network;
use crate::cni::SpecVersion;
use crate::engine::Steering;
use crate::model::IfName;
use crate::plan::RouteSpec;

/// The results in one, the default network's first. What is not known of them stays.
pub(super) fn compose(parts: &[(&Network, &Value)]) -> Value {
    let mut ordered: Vec<_> = parts.iter().filter(|(network, _)| network.default).collect();
    ordered.extend(parts.iter().filter(|(network, _)| !network.default));
    let (mut interfaces, mut ips, mut routes): (Vec<Value>, Vec<Value>, Vec<Value>) = Default::default();
    for (network, result) in &ordered {
        // Networks may share a device of the host: it is told once.
        let mut places = Vec::new();
        for interface in list(result, "interfaces") {
            let shared = interface.get("sandbox").is_none_or(|s| s == "");
            let known = interfaces.iter().position(|other| shared && other == interface);
            places.push(known.unwrap_or(interfaces.len()));
            if known.is_none() {
                interfaces.push(interface.clone());
            }
        }
        let own = list(result, "interfaces").iter().position(|i| i["name"] == network.ifname.as_str() && !on_host(i));
        for ip in list(result, "ips") {
            let mut ip = ip.clone();
            // Without a number it is the container's interface that is meant.
            let place = ip.get("interface").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok()).or(own);
            match place.and_then(|place| places.get(place)) {
                Some(place) => ip["interface"] = json!(place),
                None => drop(ip.as_object_mut().and_then(|keys| keys.remove("interface"))),
            }
            ips.push(ip);
        }
        routes.extend(list(result, "routes").iter().cloned());
    }
    let mut all = json!({ "cniVersion": SpecVersion::NEWEST, "interfaces": interfaces, "ips": ips, "routes": routes });
    if let Some(dns) = ordered.first().and_then(|(_, result)| result.get("dns")).filter(|dns| *dns != &json!({})) {
        all["dns"] = dns.clone();
    }
    in_version(&all, SpecVersion::NEWEST)
}

/// A result in the form of a version.
pub(super) fn in_version(result: &Value, version: SpecVersion) -> Value {
    let mut result = result.clone();
    result["cniVersion"] = json!(version);
    let objects = |result: &mut Value, key: &str, change: &dyn Fn(&mut Map<String, Value>)| {
        let list = result.get_mut(key).and_then(Value::as_array_mut);
        list.into_iter().flatten().filter_map(Value::as_object_mut).for_each(change);
    };
    objects(&mut result, "ips", &|ip| {
        ip.remove("version");
        if version < SpecVersion::V1_0_0 {
            let v6 = ip.get("address").and_then(Value::as_str).is_some_and(|address| address.contains(':'));
            ip.insert("version".to_owned(), json!(if v6 { "6" } else { "4" }));
        }
    });
    if version < SpecVersion::V1_1_0 {
        objects(&mut result, "interfaces", &|i| {
            ["mtu", "socketPath", "pciID"].iter().for_each(|key| drop(i.remove(*key)))
        });
        objects(&mut result, "routes", &|r| {
            ["mtu", "advmss", "priority", "table", "scope"].iter().for_each(|key| drop(r.remove(*key)));
        });
    }
    result
}

/// The standard's status, an element for each interface in the pod.
pub(super) fn status(parts: &[(&Network, &Value)], steering: Option<&Steering>) -> Vec<Value> {
    let mut all = Vec::new();
    for (network, result) in parts {
        let interfaces = list(result, "interfaces");
        let inside = interfaces.iter().enumerate().filter(|(_, interface)| !on_host(interface));
        for (place, interface) in inside {
            let is_own = interface["name"] == network.ifname.as_str();
            let here = |ip: &&Value| ip.get("interface").map_or(is_own, |i| *i == json!(place));
            let ips: Vec<_> = list(result, "ips").iter().filter(here).filter_map(bare_address).collect();
            let mut element = json!({
                "name": network.label, "interface": interface["name"], "ips": ips,
                "default": network.default && is_own, "dns": result.get("dns").cloned().unwrap_or_else(|| json!({})),
            });
            let defaults = [true, false].into_iter().filter_map(|ipv4| steering?.default_of(ipv4));
            let over = |(name, route): (&IfName, &RouteSpec)| route.gateway.filter(|_| *name == network.ifname);
            let gateways: Vec<_> = defaults.filter_map(over).filter(|_| is_own).collect();
            if !gateways.is_empty() {
                element["gateway"] = json!(gateways);
            }
            for key in ["mac", "mtu"] {
                if let Some(value) = interface.get(key) {
                    element[key] = value.clone();
                }
            }
            all.push(element);
        }
    }
    // The cluster's network comes first.
    all.sort_by_key(|element| element["default"] != true);
    all
}

/// Has a result tell what became of its default routes of a family: none, or one over this gateway.
pub(super) fn set_default(result: &mut Value, ipv4: bool, default: Option<Option<IpAddr>>) {
    let destination = if ipv4 { "0.0.0.0/0" } else { "::/0" };
    let mut routes = list(result, "routes").to_vec();
    // A route of another table (CNI 1.1.0) is none of those that are moved.
    let is_main = |table: &Value| table.is_null() || *table == 0 || *table == 254;
    let is_default = |route: &Value| route["dst"] == destination && route.get("table").is_none_or(is_main);
    let before = routes.iter().find(|r| is_default(r)).cloned();
    routes.retain(|route| !is_default(route));
    if let Some(gateway) = default {
        let gateway = gateway.map(|gateway| json!(gateway));
        // What it says beside the gateway stays where the gateway does.
        let same =
            before.filter(|route| gateway.is_none() || route.get("gw").is_none_or(|gw| Some(gw) == gateway.as_ref()));
        let mut route = same.unwrap_or_else(|| json!({ "dst": destination }));
        if let Some(gateway) = gateway {
            route["gw"] = gateway;
        }
        routes.push(route);
    } else if before.is_none() {
        return;
    }
    result["routes"] = Value::Array(routes);
}

/// The routers of an interface's subnets.
pub(super) fn gateways(network: &Network, result: &Value) -> Vec<IpAddr> {
    let own = list(result, "interfaces").iter().position(|i| i["name"] == network.ifname.as_str() && !on_host(i));
    let here = |ip: &&Value| ip.get("interface").is_none_or(|i| Some(i) == own.map(|own| json!(own)).as_ref());
    let gateway = |ip: &Value| ip.get("gateway")?.as_str()?.parse().ok();
    list(result, "ips").iter().filter(here).filter_map(gateway).collect()
}

/// The addresses of a result, without their prefix lengths.
pub(super) fn addresses(result: &Value) -> Vec<IpAddr> {
    list(result, "ips").iter().filter_map(|ip| bare(ip.get("address")?.as_str()?)).collect()
}

/// An address without its prefix length.
pub(super) fn bare(text: &str) -> Option<IpAddr> {
    text.split('/').next()?.parse().ok()
}

fn bare_address(ip: &Value) -> Option<String> {
    Some(ip.get("address")?.as_str()?.split('/').next()?.to_owned())
}

/// The interfaces of a result that are in the pod.
pub(super) fn inside(result: &Value) -> impl Iterator<Item = &Value> {
    list(result, "interfaces").iter().filter(|interface| !on_host(interface))
}

fn on_host(interface: &Value) -> bool {
    interface.get("sandbox").and_then(Value::as_str).is_none_or(str::is_empty)
}

fn list<'a>(result: &'a Value, key: &str) -> &'a [Value] {
    result.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}
