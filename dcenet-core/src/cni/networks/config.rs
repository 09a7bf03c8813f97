//! The sections `networks` and `selection`, and what each network of a pod takes.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::select::{self, Selected};
use crate::cni::device::DEVICE_ID;
use crate::cni::{Chain, CniError, ErrorCode, Invocation, NetConf, Role, SpecVersion};
use crate::link::LinkConfig;
use crate::model::{IfName, NetworkName};
use crate::section::{self, SectionError};

/// A network of a pod, with everything that it takes to attach and to detach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Network {
    /// How people call it: `name`, or `namespace/name` of a definition.
    pub(super) label: String,
    /// The interface in the pod.
    pub(super) ifname: IfName,
    /// Whether it is the pod's default network.
    pub(super) default: bool,
    /// Whether it has the pod's default routes, and over which gateways; over those that it has of its own where the list
    /// is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) default_route: Option<Vec<IpAddr>>,
    /// Who makes it.
    pub(super) by: By,
}

/// Who makes a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum By {
    /// This program, by a configuration of one network.
    Own(Value),
    /// The plugins of others.
    Plugins {
        /// Their configurations.
        chain: Chain,
        /// `CNI_ARGS`, its parts in order.
        args: String,
        /// What the runtime or the pod asks for.
        capabilities: Map<String, Value>,
    },
}

impl Network {
    /// The name of the network of which this is an attachment.
    pub(super) fn name(&self) -> Result<NetworkName, CniError> {
        match &self.by {
            By::Own(conf) => Ok(section::read("name", conf.get("name").unwrap_or(&Value::Null))?),
            By::Plugins { chain, .. } => Ok(chain.name().clone()),
        }
    }

    /// Says of an error whose it is.
    pub(super) fn blame(&self, error: CniError) -> CniError {
        CniError { message: format!("network {} ({}): {}", self.label, self.ifname, error.message), ..error }
    }
}

/// An entry of `networks`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    name: NetworkName,
    interface: Option<IfName>,
    #[serde(default)]
    default: bool,
    default_route: Option<DefaultRoute>,
    link: Option<Value>,
    ipam: Option<Value>,
    nat: Option<Value>,
    policy: Option<Value>,
    delegate: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "give true, or a list of gateways")]
enum DefaultRoute {
    Wanted(bool),
    Over(Vec<IpAddr>),
}

/// `"selection": { .. }`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Selection {
    /// The directory of NetworkAttachmentDefinitions.
    pub(super) definitions: PathBuf,
    /// The directory of pods' annotations.
    pub(super) pods: Option<PathBuf>,
    /// The namespaces whose definitions every pod may use.
    #[serde(default = "shared")]
    pub(super) shared: Vec<String>,
}

fn shared() -> Vec<String> {
    vec!["default".to_owned()]
}

/// Whether a configuration with these keys is of several networks.
pub(in crate::cni) fn is_meta(keys: &Map<String, Value>) -> bool {
    ["networks", "selection"].iter().any(|key| keys.get(*key).is_some_and(|value| !value.is_null()))
}

/// The networks of every pod, as they are for the runtime's interface `first`. None of a pod's own.
///
/// # Errors
/// Names the wrong field.
pub(super) fn configured(conf: &NetConf, invocation: &Invocation, first: &IfName) -> Result<Vec<Network>, CniError> {
    let entries = match conf.key("networks") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(list)) => {
            let read = |(i, value)| section::read::<Entry>(&format!("networks[{i}]"), value);
            list.iter().enumerate().map(read).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(wrong("networks", format!("{other} is not a list"))),
    };
    let top = conf.key("link").is_some_and(|link| !link.is_null());
    if !top && let Some(stray) = ["ipam", "nat", "policy"].into_iter().find(|key| conf.key(key).is_some()) {
        return Err(wrong(stray, "belongs to one network; move it into networks[], beside its link".to_owned()));
    }
    let marked: Vec<usize> = (0..entries.len()).filter(|i| entries[*i].default).collect();
    let default = match marked[..] {
        [] if top => None,
        [] if entries.is_empty() => {
            return Err(wrong("networks", "names no network; give one, or a link at the top".to_owned()));
        }
        [] => Some(0),
        [one] if !top => Some(one),
        [one] => {
            let reason = "the link at the top is the default network; drop one of the two".to_owned();
            return Err(wrong(&format!("networks[{one}].default"), reason));
        }
        [_, second, ..] => {
            return Err(wrong(&format!("networks[{second}].default"), "there is one default network".to_owned()));
        }
    };
    let mut networks = Vec::new();
    if top {
        let sections = ["link", "ipam", "nat", "policy", "sriov", DEVICE_ID].map(|key| (key, conf.key(key).cloned()));
        let by = own(conf, &conf.name, sections, &asked_by_runtime(conf), conf.key("args").cloned())?;
        networks.push(Network {
            label: conf.name.to_string(),
            ifname: first.clone(),
            default: true,
            default_route: None,
            by,
        });
    }
    for (i, entry) in entries.into_iter().enumerate() {
        let path = format!("networks[{i}]");
        let is_default = default == Some(i);
        let ifname = match (entry.interface, is_default) {
            (None, true) => first.clone(),
            (Some(own), true) if own != *first => {
                let reason = format!("{own} is of the default network, which the runtime calls {first}; drop the key");
                return Err(wrong(&format!("{path}.interface"), reason));
            }
            (Some(own), _) => own,
            (None, false) => numbered(&networks, first)?,
        };
        let default_route = match entry.default_route {
            None | Some(DefaultRoute::Wanted(false)) => None,
            Some(DefaultRoute::Wanted(true)) => Some(Vec::new()),
            Some(DefaultRoute::Over(gateways)) => Some(gateways),
        };
        let by = match (entry.delegate, entry.link) {
            (Some(_), link)
                if link.is_some() || entry.ipam.is_some() || entry.nat.is_some() || entry.policy.is_some() =>
            {
                let reason = "stands beside sections of our own; a network is made by other plugins or by this one";
                return Err(wrong(&format!("{path}.delegate"), reason.to_owned()));
            }
            (Some(delegate), _) => {
                let mut chain = Chain::read(&format!("{path}.delegate"), &delegate, &entry.name, conf.version)?;
                chain.give_args(&if is_default { arguments(conf) } else { labels(conf) });
                let capabilities = if is_default { asked_by_runtime(conf) } else { Map::new() };
                By::Plugins { chain, args: args(invocation, is_default, &[]), capabilities }
            }
            (None, Some(link)) => {
                let sections = [
                    ("link", Some(link)),
                    ("ipam", entry.ipam),
                    ("nat", entry.nat),
                    ("policy", entry.policy),
                    ("sriov", None),
                    (DEVICE_ID, conf.key(DEVICE_ID).filter(|_| is_default).cloned()),
                ];
                let asked = if is_default { asked_by_runtime(conf) } else { Map::new() };
                let arguments = if is_default { arguments(conf) } else { labels(conf) };
                own(conf, &entry.name, sections, &asked, Some(json!({ "cni": arguments })))
                    .map_err(|e| under(&path, e))?
            }
            (None, None) => {
                return Err(wrong(&path, "has neither link nor delegate; say who makes it".to_owned()));
            }
        };
        networks.push(Network { label: entry.name.to_string(), ifname, default: is_default, default_route, by });
    }
    Ok(networks)
}

/// All networks of the pod that a call is about.
///
/// # Errors
/// As [`configured`], and where the pod asks for what there is not.
pub(super) fn resolve(conf: &NetConf, invocation: &Invocation, first: &IfName) -> Result<Vec<Network>, CniError> {
    let mut networks = configured(conf, invocation, first)?;
    let selection: Option<Selection> = conf.section("selection")?;
    let pod = invocation.args.workload.as_ref();
    if let Some((field, text)) = select::annotation(conf, selection.as_ref(), pod)? {
        let Some(selection) = &selection else {
            let reason = "asks for networks, and the configuration has no selection.definitions; add it".to_owned();
            return Err(wrong(&field, reason));
        };
        let selected = select::parse(&field, &text)?;
        let definitions = select::Definitions::read(&selection.definitions)?;
        for one in selected {
            let network = of_definition(conf, invocation, selection, &definitions, &field, one, &networks, first)?;
            networks.push(network);
        }
    }
    refuse_two_defaults(&networks)?;
    for (i, network) in networks.iter().enumerate() {
        if let Some(other) = networks[..i].iter().find(|other| other.ifname == network.ifname) {
            let reason =
                format!("is asked for by network {} and by network {}; give each its own", other.label, network.label);
            return Err(wrong(&format!("interface {}", network.ifname), reason));
        }
    }
    Ok(networks)
}

/// Refuses networks that both want the default routes of a family.
fn refuse_two_defaults(networks: &[Network]) -> Result<(), CniError> {
    for ipv4 in [true, false] {
        let of_family = |gateways: &Vec<IpAddr>| gateways.iter().filter(|g| g.is_ipv4() == ipv4).count();
        let mut holder: Option<&Network> = None;
        for network in networks {
            let Some(gateways) = &network.default_route else { continue };
            let wants = if gateways.is_empty() { 1 } else { of_family(gateways) };
            let field = format!("default route of network {}", network.label);
            let family = if ipv4 { "IPv4" } else { "IPv6" };
            if wants > 1 {
                return Err(wrong(&field, format!("there are {wants} gateways of {family}; give one of each family")));
            }
            if wants == 1
                && let Some(other) = holder.replace(network)
            {
                return Err(wrong(
                    &field,
                    format!("network {} has that of {family} already; give it to one", other.label),
                ));
            }
        }
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "all of it decides about the one network")]
fn of_definition(
    conf: &NetConf,
    invocation: &Invocation,
    selection: &Selection,
    definitions: &select::Definitions,
    field: &str,
    one: Selected,
    before: &[Network],
    first: &IfName,
) -> Result<Network, CniError> {
    let own_namespace = invocation.args.workload.as_ref().map_or("default", |pod| pod.namespace());
    let namespace = one.namespace.as_deref().unwrap_or(own_namespace);
    let label = format!("{namespace}/{}", one.name);
    if namespace != own_namespace && !selection.shared.iter().any(|shared| shared == "*" || shared == namespace) {
        let reason = format!(
            "{label} is of another namespace than the pod; have selection.shared list {namespace:?}, or copy it"
        );
        return Err(wrong(field, reason));
    }
    let definition = definitions.find(namespace, &one.name).map_err(|reason| wrong(field, reason))?;
    let path = format!("{}: spec.config", definition.path.display());
    let value: Value = serde_json::from_str(&definition.config)
        .map_err(|e| CniError::new(ErrorCode::InvalidConfig, format!("{path}: not JSON: {e}")))?;
    let name: NetworkName = section::read(field, &json!(one.name))?;
    let ifname = match one.interface.clone() {
        Some(ifname) => ifname,
        None => numbered(before, first)?,
    };
    let default_route = one.default_route.clone();
    let mut chain = Chain::read(&path, &value, &name, conf.version)?;
    if let Some(arguments) = &one.cni_args {
        // By labels pools are chosen and policies decided: they are the runtime's to tell.
        let reserved = |key: &&str| *key == "labels" || chain.asks_us();
        if let Some(key) = ["labels", "pools"].into_iter().filter(reserved).find(|key| arguments.contains_key(*key)) {
            let reason = format!("cni-args.{key} of {label} is not for the pod to say; drop it");
            return Err(wrong(field, reason));
        }
        chain.give_args(arguments);
    }
    chain.give_args(&labels(conf));
    let by = match chain.only_of_type("dcenet") {
        Some(keys) => {
            if let Some(key) = ["networks", "selection"].into_iter().find(|key| keys.contains_key(*key)) {
                return Err(wrong(&format!("{path}.{key}"), "a network of a pod is one network".to_owned()));
            }
            let mut asked = Map::new();
            for (key, value) in one.capabilities() {
                if key != "ips" && key != "mac" {
                    let message = format!("{field}: {key} of {label} is not offered; drop it");
                    return Err(CniError::new(ErrorCode::UnsupportedField, message));
                }
                asked.insert(key, value);
            }
            let sections =
                ["link", "ipam", "nat", "policy", "sriov", DEVICE_ID].map(|key| (key, keys.get(key).cloned()));
            own(conf, chain.name(), sections, &asked, keys.get("args").cloned()).map_err(|e| under(&path, e))?
        }
        None => {
            let capabilities: Map<_, _> = one.capabilities().into_iter().collect();
            let undeclared =
                capabilities.keys().find(|key| !["ips", "mac"].contains(&key.as_str()) && !chain.declares(key));
            if let Some(key) = undeclared {
                let reason = format!("{key} is asked of {label}, none of whose plugins declares the capability");
                return Err(wrong(field, reason));
            }
            // Plugins without the capabilities know these arguments.
            let mut more = Vec::new();
            if !one.ips().is_empty() && !chain.declares("ips") {
                more.push(format!("IP={}", one.ips().join(",")));
            }
            if let Some(mac) = one.mac().filter(|_| !chain.declares("mac")) {
                more.push(format!("MAC={mac}"));
            }
            By::Plugins { chain, args: args(invocation, false, &more), capabilities }
        }
    };
    Ok(Network { label, ifname, default: false, default_route, by })
}

/// The capabilities that concern one network.
const CAPABILITIES: [&str; 9] =
    ["bandwidth", "deviceID", "dns", "infinibandGUID", "ipRanges", "ips", "mac", "pools", "portMappings"];

/// The configuration of a network of our own, checked as far as can be without the host.
fn own(
    conf: &NetConf,
    name: &NetworkName,
    sections: [(&str, Option<Value>); 6],
    asked: &Map<String, Value>,
    args: Option<Value>,
) -> Result<By, CniError> {
    let mut keys = json!({
        "cniVersion": SpecVersion::NEWEST, "name": name, "type": "dcenet",
        "stateDir": conf.state_dir, "runDir": conf.run_dir,
    });
    // Whose devices they are is the node's affair, and told once for all networks.
    if let Some(section) = conf.key("sriov") {
        keys["sriov"] = section.clone();
    }
    for (key, value) in sections {
        if let Some(value) = value {
            keys[key] = value;
        }
    }
    // Those that are not honoured are refused by the ADD.
    let understood = asked.iter().filter(|(key, _)| CAPABILITIES.contains(&key.as_str()));
    let runtime: Map<_, _> = understood.map(|(k, v)| (k.clone(), v.clone())).collect();
    if !runtime.is_empty() {
        keys["runtimeConfig"] = Value::Object(runtime);
    }
    if let Some(args) = args {
        keys["args"] = args;
    }
    let parsed = NetConf::parse(keys.to_string().as_bytes())?;
    debug_assert!(matches!(parsed.role, Role::Main | Role::Chained));
    match parsed.key("link") {
        Some(link) => LinkConfig::read(link)?,
        None => return Err(wrong("link", "missing; give { \"kind\": .. }".to_owned())),
    };
    Ok(By::Own(keys))
}

/// What the runtime asks for, all of which is meant for the default network.
fn asked_by_runtime(conf: &NetConf) -> Map<String, Value> {
    let mut asked = conf.key("runtimeConfig").and_then(Value::as_object).cloned().unwrap_or_default();
    asked.remove(select::ANNOTATIONS);
    asked
}

/// The runtime's arguments, but for the annotation, which is no plugin's.
fn arguments(conf: &NetConf) -> Map<String, Value> {
    let arguments = conf.key("args").and_then(|args| args.get("cni")).and_then(Value::as_object);
    let mut arguments = arguments.cloned().unwrap_or_default();
    arguments.remove(select::NETWORKS);
    arguments
}

/// The arguments that every network's pools and policies are chosen by.
fn labels(conf: &NetConf) -> Map<String, Value> {
    let mut arguments = arguments(conf);
    arguments.retain(|key, _| key == "labels");
    arguments
}

/// `CNI_ARGS` for a network's plugins, in an order that does not change. What names an address or a pool is meant for the
/// default network.
fn args(invocation: &Invocation, is_default: bool, more: &[String]) -> String {
    let given = invocation.args.text.split(';').filter(|pair| !pair.is_empty());
    let of_default = |pair: &&str| ["IP=", "MAC=", "POOLS="].iter().any(|key| pair.starts_with(key));
    let mut pairs: Vec<&str> = given.filter(|pair| is_default || !of_default(pair)).collect();
    pairs.extend(more.iter().map(String::as_str));
    if !more.is_empty() && !pairs.iter().any(|pair| pair.starts_with("IgnoreUnknown=")) {
        pairs.push("IgnoreUnknown=1");
    }
    pairs.sort_unstable();
    pairs.dedup();
    pairs.join(";")
}

/// `net1`, `net2`... by the place among the networks that are not the default.
fn numbered(before: &[Network], first: &IfName) -> Result<IfName, CniError> {
    let others = before.iter().filter(|network| network.ifname != *first).count();
    format!("net{}", others + 1).parse().map_err(CniError::from)
}

fn wrong(field: &str, reason: String) -> CniError {
    SectionError { field: field.to_owned(), reason }.into()
}

fn under(path: &str, error: CniError) -> CniError {
    CniError { message: format!("{path}.{}", error.message), ..error }
}
