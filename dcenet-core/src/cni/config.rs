//! The network configuration on stdin (CNI 1.1.0, section 1), as far as it concerns every backend.
//!
//! Keys of the specification and of runtimes are let through. Inside our own sections an unknown key is an error; at
//! the top it is one only if it looks like a misspelt key of ours, or is a key of the reference plugins that has
//! another place here: a `polcy` that nobody reads would be a container without policy.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{CniError, CniResult, ErrorCode, SpecVersion, networks, ranges};
use crate::bandwidth::Bandwidth;
use crate::model::{ContainerId, IfName, LabelSet, MacAddr, NetworkName};
use crate::nat::{Nat, NatConfig, PortMapping, Transport};
use crate::provider::Dns;
use crate::section::{self, SectionError};

/// A network configuration.
#[derive(Debug, Clone)]
pub struct NetConf {
    /// `cniVersion`.
    pub version: SpecVersion,
    /// `name`.
    pub name: NetworkName,
    /// `stateDir`: what must outlive a reboot.
    pub state_dir: PathBuf,
    /// `runDir`: what must not.
    pub run_dir: PathBuf,
    /// What the binary is to be for this configuration.
    pub role: Role,
    /// `runtimeConfig` and `args.cni`, as far as they are understood.
    pub runtime: RuntimeConfig,
    /// `args.cni.labels`: the workload's labels.
    pub labels: LabelSet,
    /// `prevResult`, in whatever form the runtime kept it.
    pub previous: Option<CniResult>,
    /// `cni.dev/valid-attachments`, or its older name `cni.dev/attachments`: what GC must keep. Absent is not empty.
    pub valid_attachments: Option<Vec<(ContainerId, IfName)>>,
    /// Why the capability `ipRanges` cannot be had. Only what hands out addresses needs it.
    ranges: Option<CniError>,
    sections: Map<String, Value>,
}

/// What the binary is to be for a configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It makes the attachment.
    Main,
    /// It hands out addresses to another plugin, whose configuration this is (CNI 1.1.0, section 4, "Plugin Delegation"):
    /// `ipam.type` names us, `type` names another, and there is no section `link`.
    Ipam,
    /// It adds policy and translation to what a plugin before it in the list has made: there is no section `link`, and no
    /// `ipam` either.
    Chained,
    /// It attaches several networks, some of them by the plugins of others: there is a key `networks` or `selection`.
    Meta,
}

/// What the runtime asks for in the configuration. Each capability is read only as far as it is used: runtimes send
/// shapes that the conventions do not list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// The capability `mac`.
    pub mac: Option<MacAddr>,
    /// The capability `ips`, else `args.cni.ips`: wanted addresses; a prefix length is ignored.
    pub addresses: Asked<IpAddr>,
    /// The capability `pools`, else `args.cni.pools`: names of pools, or patterns with `*` and `?`. A key of ours:
    /// [`LeaseRequest::pools`](crate::provider::LeaseRequest::pools) tells what it means.
    pub pools: Asked<String>,
}

/// What is asked for, and by which field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked<T> {
    /// The field's path.
    pub field: &'static str,
    /// What it holds. Empty, it asks for nothing.
    pub values: Vec<T>,
}

impl<T> Default for Asked<T> {
    fn default() -> Self {
        Self { field: "", values: Vec::new() }
    }
}

impl<T> Asked<T> {
    /// The first that asks for anything, else the last.
    pub(super) fn or(self, other: Self) -> Self {
        if self.values.is_empty() { other } else { self }
    }
}

/// Where state goes when the configuration does not say.
const STATE_DIR: &str = "/var/lib/dcenet";
const RUN_DIR: &str = "/run/dcenet";

/// The name by which configurations name this plugin.
const PLUGIN: &str = "dcenet";

/// The keys of ours at the top.
const OWN_KEYS: [&str; 10] =
    ["link", "ipam", "nat", "policy", "sriov", "networks", "selection", "stateDir", "runDir", "daemon"];

/// The specification's keys, libcni's, and those that runtimes add.
const KNOWN_KEYS: [&str; 15] = [
    "cniVersion",
    "cniVersions",
    "name",
    "type",
    "args",
    "capabilities",
    "dns",
    "prevResult",
    "runtimeConfig",
    "disableCheck",
    "disableGC",
    "loadOnlyInlinedPlugins",
    "plugins",
    "cni.dev/attachments",
    "cni.dev/valid-attachments",
];

/// Capabilities of the conventions that are not honoured, each with what to do instead.
const LOST_CAPABILITIES: [(&str, &str); 2] = [
    ("deviceID", "name the device in a link of kind host-device, or use the kind sriov"),
    ("infinibandGUID", "set the address on the device before the pod gets it"),
];

/// Keys of the reference plugins which would be lost without a word.
const MOVED_KEYS: [(&str, &str); 10] = [
    ("bridge", "say link.bridge"),
    ("hairpinMode", "say link.hairpinMode"),
    ("isDefaultGateway", "say link.isGateway, and a default route in ipam.pools[].routes"),
    ("isGateway", "say link.isGateway"),
    ("ipMasq", "say nat.masquerade"),
    ("master", "say link.parent"),
    ("mode", "say link.mode"),
    ("mtu", "say link.mtu"),
    ("vlan", "say link.vlan, link.id of a link of kind vlan, or ipam.pools[].vlan"),
    ("vlanTrunk", "say link.vlanTrunk"),
];

impl NetConf {
    /// Reads a configuration.
    ///
    /// # Errors
    /// Code 6 if it is no JSON object, 1 for its version, 2 for a key that cannot be honoured, 7 for any other wrong
    /// value; the message names the field.
    pub fn parse(stdin: &[u8]) -> Result<Self, CniError> {
        let value: Value = serde_json::from_slice(stdin)
            .map_err(|e| CniError::new(ErrorCode::Decode, format!("the network configuration is not JSON: {e}")))?;
        let Value::Object(mut keys) = value else {
            return Err(CniError::new(ErrorCode::Decode, "the network configuration is JSON, but not an object"));
        };
        let version = version(&keys)?;
        let role = role(&keys);
        if role != Role::Ipam {
            // The other keys of another plugin's configuration are its own affair.
            check_keys(&keys)?;
        }

        let name = required::<NetworkName>(&keys, "name")?;
        let (mut runtime, mut labels) = (RuntimeConfig::default(), LabelSet::new());
        if let Some(value) = keys.get("args") {
            let args: Args = section::read("args", value)?;
            if let Some(cni) = args.cni {
                runtime.addresses = addresses("args.cni.ips", cni.ips)?;
                runtime.pools = pools("args.cni.pools", cni.pools)?;
                labels = cni.labels.into_iter().map(|l| (l.key, l.value)).collect();
            }
        }
        if let Some(value) = keys.get("runtimeConfig") {
            let wire: WireRuntime = section::read("runtimeConfig", value)?;
            runtime.mac = wire
                .mac
                .filter(|m| !m.is_empty())
                .map(|m| MacAddr::for_device(&m))
                .transpose()
                .map_err(|e| field("runtimeConfig.mac", e))?;
            runtime.addresses = addresses("runtimeConfig.ips", wire.ips.unwrap_or_default())?.or(runtime.addresses);
            runtime.pools = pools("runtimeConfig.pools", wire.pools.unwrap_or_default())?.or(runtime.pools);
        }
        let mut ranges = None;
        // The meta role hands it on to the network that it is for, and the IPAM plugins of others read it themselves.
        if role != Role::Meta
            && !of_others(&keys)
            && let Some(asked) = keys.get("runtimeConfig").and_then(|runtime| runtime.get("ipRanges")).cloned()
            && !says_nothing(&asked)
        {
            ranges = ranges::put(&asked, &mut keys).err();
        }
        let previous = match keys.get("prevResult") {
            None | Some(Value::Null) => None,
            Some(value) => Some(section::read("prevResult", value)?),
        };
        let valid_attachments = ["cni.dev/valid-attachments", "cni.dev/attachments"]
            .into_iter()
            .find_map(|key| keys.get(key).map(|value| (key, value)))
            .map(|(key, value)| section::read::<Vec<ValidAttachment>>(key, value))
            .transpose()?
            .map(|list| list.into_iter().map(|a| (a.container, a.ifname)).collect());
        Ok(Self {
            version,
            name,
            state_dir: directory(&keys, "stateDir", STATE_DIR)?,
            run_dir: directory(&keys, "runDir", RUN_DIR)?,
            role,
            runtime,
            labels,
            previous,
            valid_attachments,
            ranges,
            sections: keys,
        })
    }

    /// The key `daemon`: where a daemon listens that serves the calls of this configuration.
    ///
    /// # Errors
    /// Code 7 for what is no absolute path.
    pub fn daemon(&self) -> Result<Option<PathBuf>, CniError> {
        if matches!(self.sections.get("daemon"), None | Some(Value::Null)) {
            return Ok(None);
        }
        directory(&self.sections, "daemon", "").map(Some)
    }

    /// Whether the section `ipam` names the plugin of others.
    pub fn has_ipam_of_others(&self) -> bool {
        of_others(&self.sections)
    }

    /// All of it.
    pub(super) fn whole(&self) -> Value {
        Value::Object(self.sections.clone())
    }

    /// A key at the top, as it is written.
    pub(super) fn key(&self, name: &str) -> Option<&Value> {
        self.sections.get(name)
    }

    /// The capability `dns` (CNI conventions): resolver settings of the runtime's, which go before those of the pools, each
    /// list by itself. `None` where it asks for nothing.
    ///
    /// # Errors
    /// Code 7, with the path of the wrong field.
    pub fn dns(&self) -> Result<Option<Dns>, CniError> {
        let Some(value) = self.asked("dns") else { return Ok(None) };
        let WireDns { servers, searches, options } = section::read("runtimeConfig.dns", value)?;
        let [servers, searches, options] = [servers, searches, options].map(Option::unwrap_or_default);
        if let Some((i, text)) = servers.iter().enumerate().find(|(_, text)| text.parse::<IpAddr>().is_err()) {
            return Err(field(
                &format!("runtimeConfig.dns.servers[{i}]"),
                format!("{text:?} is no IP address; write one, as 10.0.0.53"),
            ));
        }
        Ok(Some(Dns { nameservers: servers, domain: None, search: searches, options }))
    }

    /// The capability `bandwidth` (CNI conventions), which goes before `link.bandwidth` in each direction that it limits.
    /// `None` where it asks for nothing.
    ///
    /// # Errors
    /// Code 7, with the path of the wrong field.
    pub fn bandwidth(&self) -> Result<Option<Bandwidth>, CniError> {
        Ok(self.asked("bandwidth").map(|value| section::read("runtimeConfig.bandwidth", value)).transpose()?)
    }

    /// Refuses the capability `bandwidth`, where the devices are another's.
    ///
    /// # Errors
    /// Code 2, with the remedy.
    pub(super) fn refuse_bandwidth(&self) -> Result<(), CniError> {
        self.asked("bandwidth").map_or(Ok(()), |value| {
            let remedy = "put the reference plugin `bandwidth` behind this one in the list";
            Err(lost("bandwidth", value, remedy))
        })
    }

    /// Refuses the capability `ipRanges` where its ranges cannot be had. Who releases addresses needs them not.
    ///
    /// # Errors
    /// Code 7, with the path of the wrong field.
    pub(super) fn refuse_ranges(&self) -> Result<(), CniError> {
        self.ranges.clone().map_or(Ok(()), Err)
    }

    /// Refuses capabilities that nothing here honours: a runtime that is not told would believe that they are.
    ///
    /// # Errors
    /// Code 2, with the field and the remedy.
    pub(super) fn refuse_lost(&self) -> Result<(), CniError> {
        self.refuse_lost_but("")
    }

    /// As [`refuse_lost`](Self::refuse_lost), but for one that is honoured this time.
    pub(super) fn refuse_lost_but(&self, honoured: &str) -> Result<(), CniError> {
        let mut lost_ones = LOST_CAPABILITIES.iter().filter(|(name, _)| *name != honoured);
        match lost_ones.find_map(|(name, remedy)| Some((name, self.asked(name)?, remedy))) {
            None => Ok(()),
            Some((name, value, remedy)) => Err(lost(name, value, remedy)),
        }
    }

    /// A capability that asks for something.
    pub(super) fn asked(&self, capability: &str) -> Option<&Value> {
        self.key("runtimeConfig")?.get(capability).filter(|value| !says_nothing(value))
    }

    /// What is to be translated: by the section `nat`, and the capability `portMappings`.
    ///
    /// # Errors
    /// Code 7, with the path of the wrong field.
    pub fn nat(&self) -> Result<Nat, CniError> {
        let NatConfig { masquerade } = self.section("nat")?.unwrap_or_default();
        let mappings = self.key("runtimeConfig").and_then(|runtime| runtime.get("portMappings"));
        let ports = match mappings {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(list)) => {
                let read = |(i, value)| port_mapping(&format!("runtimeConfig.portMappings[{i}]"), value).transpose();
                list.iter().enumerate().filter_map(read).collect::<Result<_, _>>()?
            }
            Some(other) => return Err(field("runtimeConfig.portMappings", format!("{other} is not a list"))),
        };
        Ok(Nat { masquerade, ports })
    }

    /// Reads one of our sections: `link`, `ipam` or `policy`. `None` if the configuration has none.
    ///
    /// # Errors
    /// Code 7, with the path of the wrong field.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, CniError> {
        match self.sections.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => Ok(Some(section::read(name, value)?)),
        }
    }
}

fn of_others(keys: &Map<String, Value>) -> bool {
    let plugin = keys.get("ipam").and_then(|ipam| ipam.get("type")).and_then(Value::as_str);
    plugin.is_some_and(|plugin| plugin != PLUGIN)
}

fn role(keys: &Map<String, Value>) -> Role {
    let delegated = keys.get("ipam").and_then(|ipam| ipam.get("type")).is_some_and(|plugin| plugin == PLUGIN);
    let anothers = keys.get("type").is_some_and(|plugin| plugin.is_string() && plugin != PLUGIN);
    match delegated && anothers && !keys.contains_key("link") {
        true => Role::Ipam,
        false if networks::is_meta(keys) => Role::Meta,
        false if !keys.contains_key("link") && !keys.contains_key("ipam") => Role::Chained,
        false => Role::Main,
    }
}

/// Reads only the version, for the answer to VERSION and for errors before anything else is known.
pub(super) fn version_of(stdin: &[u8]) -> Option<SpecVersion> {
    #[derive(Deserialize)]
    struct Wire {
        #[serde(rename = "cniVersion")]
        version: String,
    }
    serde_json::from_slice::<Wire>(stdin).ok()?.version.parse().ok()
}

#[derive(Deserialize)]
struct Args {
    cni: Option<ArgsCni>,
}

#[derive(Deserialize)]
struct ArgsCni {
    #[serde(default)]
    ips: Vec<String>,
    #[serde(default)]
    pools: Vec<String>,
    #[serde(default)]
    labels: Vec<Label>,
}

#[derive(Deserialize)]
struct Label {
    key: String,
    value: String,
}

#[derive(Deserialize)]
struct WireRuntime {
    mac: Option<String>,
    ips: Option<Vec<String>>,
    pools: Option<Vec<String>>,
}

/// As the conventions name the keys, and as containerd's go-cni does, whose types `DNS` and `PortMapping` have no JSON tags
/// and nil slices.
#[derive(Deserialize)]
struct WireDns {
    #[serde(alias = "Servers")]
    servers: Option<Vec<String>>,
    #[serde(alias = "Searches")]
    searches: Option<Vec<String>>,
    #[serde(alias = "Options")]
    options: Option<Vec<String>>,
}

/// As [`WireDns`].
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WirePort {
    #[serde(default, alias = "HostPort")]
    host_port: u16,
    #[serde(alias = "ContainerPort")]
    container_port: u16,
    #[serde(alias = "Protocol")]
    protocol: Option<String>,
    #[serde(rename = "hostIP", alias = "HostIP")]
    host_ip: Option<String>,
}

#[derive(Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container: ContainerId,
    ifname: IfName,
}

fn version(keys: &Map<String, Value>) -> Result<SpecVersion, CniError> {
    match keys.get("cniVersion") {
        Some(Value::String(text)) => text.parse(),
        Some(other) => {
            Err(CniError::new(ErrorCode::InvalidConfig, format!("cniVersion: {other} is not a string; give \"1.1.0\"")))
        }
        // The specification reads a missing version as 0.1.0, which is not served.
        None => Err(CniError::new(
            ErrorCode::IncompatibleVersion,
            "cniVersion is missing, which means 0.1.0, and that is not served; give \"1.1.0\"",
        )),
    }
}

fn check_keys(keys: &Map<String, Value>) -> Result<(), CniError> {
    for (key, value) in keys {
        if OWN_KEYS.contains(&key.as_str()) || KNOWN_KEYS.contains(&key.as_str()) {
            continue;
        }
        if let Some((_, remedy)) = MOVED_KEYS.iter().find(|(moved, _)| moved == key) {
            // `false` and `null` ask for what is done anyway.
            if matches!(value, Value::Null | Value::Bool(false)) {
                continue;
            }
            return Err(CniError::new(
                ErrorCode::UnsupportedField,
                format!("{key}: {value} has no meaning at the top of a dcenet configuration; {remedy}"),
            ));
        }
        if let Some(known) = section::suggestion(key, OWN_KEYS) {
            return Err(CniError::new(
                ErrorCode::UnsupportedField,
                format!("{key}: {value} is an unknown key; did you mean `{known}`?"),
            ));
        }
    }
    Ok(())
}

fn required<T: DeserializeOwned>(keys: &Map<String, Value>, name: &'static str) -> Result<T, CniError> {
    let value = keys.get(name).ok_or_else(|| CniError::new(ErrorCode::InvalidConfig, format!("{name} is missing")))?;
    Ok(section::read(name, value)?)
}

fn directory(keys: &Map<String, Value>, name: &'static str, default: &str) -> Result<PathBuf, CniError> {
    let Some(value) = keys.get(name) else { return Ok(PathBuf::from(default)) };
    let path: PathBuf = section::read(name, value)?;
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(field(name, format!("{} is not an absolute path", Path::new(&path).display())))
    }
}

fn addresses(path: &'static str, list: Vec<String>) -> Result<Asked<IpAddr>, CniError> {
    let values = list.iter().enumerate().map(|(i, text)| {
        let bare = text.split_once('/').map_or(text.as_str(), |(address, _)| address);
        bare.parse()
            .map_err(|_| field(&format!("{path}[{i}]"), format!("{text:?} is no IP address; write one, as 10.0.0.7")))
    });
    Ok(Asked { field: path, values: values.collect::<Result<_, _>>()? })
}

fn pools(path: &'static str, values: Vec<String>) -> Result<Asked<String>, CniError> {
    match values.iter().position(String::is_empty) {
        Some(i) => {
            Err(field(&format!("{path}[{i}]"), "\"\" names no pool; write a name or a pattern, or drop the entry"))
        }
        None => Ok(Asked { field: path, values }),
    }
}

fn lost(name: &str, value: &Value, remedy: &str) -> CniError {
    CniError::new(
        ErrorCode::UnsupportedField,
        format!("runtimeConfig.{name}: {value} cannot be honoured; {remedy}, and drop capabilities.{name}"),
    )
}

/// Whether a capability asks for nothing: runtimes send zero rates and empty lists.
pub(super) fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.iter().all(says_nothing),
        Value::Object(keys) => keys.values().all(says_nothing),
    }
}

/// An entry of `portMappings`; `None` for one that maps nothing: runtimes list ports of a container that are no ports of
/// the host with the number 0.
fn port_mapping(path: &str, value: &Value) -> Result<Option<PortMapping>, CniError> {
    let WirePort { host_port, container_port, protocol, host_ip } = section::read(path, value)?;
    if host_port == 0 {
        return Ok(None);
    }
    if container_port == 0 {
        return Err(field(&format!("{path}.containerPort"), "0 is no port; give one from 1 to 65535"));
    }
    let protocol = match protocol.as_deref() {
        None | Some("") => Transport::Tcp,
        Some(name) => Transport::of_name(name)
            .ok_or_else(|| field(&format!("{path}.protocol"), format!("{name:?} is none of tcp, udp, sctp")))?,
    };
    let host_ip = match host_ip.as_deref() {
        None | Some("") => None,
        Some(text) => Some(text.parse::<IpAddr>().map(|ip| ip.to_canonical()).map_err(|_| {
            field(&format!("{path}.hostIP"), format!("{text:?} is no IP address; write one, as 192.0.2.1, or drop it"))
        })?),
    };
    Ok(Some(PortMapping { host_ip, host_port, container_port, protocol }))
}

pub(super) fn field(path: &str, reason: impl ToString) -> CniError {
    SectionError { field: path.to_owned(), reason: reason.to_string() }.into()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: Value) -> Result<NetConf, CniError> {
        NetConf::parse(value.to_string().as_bytes())
    }

    fn with(key: &str, value: Value) -> Result<NetConf, CniError> {
        let mut conf = json!({"cniVersion": "1.1.0", "name": "shop", "type": "dcenet"});
        conf[key] = value;
        parse(conf)
    }

    #[test]
    fn what_is_no_configuration_is_refused_with_its_code() {
        assert_eq!(NetConf::parse(b"").unwrap_err().code.number(), 6);
        assert_eq!(NetConf::parse(b"{\"name\":").unwrap_err().code.number(), 6);
        assert_eq!(NetConf::parse(b"[]").unwrap_err().code.number(), 6);
        assert_eq!(NetConf::parse(b"\xff").unwrap_err().code.number(), 6);
        for version in ["0.1.0", "0.2.0", "0.3.0", "1.2.0", "1.1", ""] {
            let error = with("cniVersion", json!(version)).unwrap_err();
            assert_eq!(error.code.number(), 1, "{version}");
        }
        assert_eq!(parse(json!({"name": "shop"})).unwrap_err().code.number(), 1);
        assert_eq!(with("cniVersion", json!(1)).unwrap_err().code.number(), 7);
        assert_eq!(parse(json!({"cniVersion": "1.1.0"})).unwrap_err().message, "name is missing");
        assert_eq!(with("name", json!("a/b")).unwrap_err().code.number(), 7);
        assert_eq!(with("stateDir", json!("relative")).unwrap_err().code.number(), 7);
    }

    #[test]
    fn keys_of_others_pass_and_lost_keys_do_not() {
        with("capabilities", json!({"portMappings": true})).unwrap();
        with("somebodys.example/key", json!(1)).unwrap();
        with("ipMasq", json!(false)).unwrap();
        for (key, value, says) in [
            ("polcy", json!({}), "did you mean `policy`?"),
            ("statedir", json!("/x"), "did you mean `stateDir`?"),
            ("ipMasq", json!(true), "ipMasq: true"),
            ("bridge", json!("cni0"), "link.bridge"),
        ] {
            let error = with(key, value).unwrap_err();
            assert_eq!(error.code.number(), 2, "{key}");
            assert!(error.message.contains(says), "{error}");
        }
    }

    #[test]
    fn capabilities_are_read_only_as_far_as_they_are_used() {
        // podman sends `aliases` as an object instead of a list.
        let conf = with(
            "runtimeConfig",
            json!({"aliases": {"net": ["a"]}, "mac": "02:00:00:00:00:07", "ips": ["10.0.0.7/24", "2001:db8::7"]}),
        )
        .unwrap();
        assert_eq!(conf.runtime.mac.unwrap().to_string(), "02:00:00:00:00:07");
        assert_eq!((conf.runtime.addresses.values.len(), conf.runtime.addresses.field), (2, "runtimeConfig.ips"));
        let error = with("runtimeConfig", json!({"ips": ["10.0.0"]})).unwrap_err();
        assert!(error.message.starts_with("runtimeConfig.ips[0]"), "{error}");
    }

    #[test]
    fn resolvers_are_read_and_lost_capabilities_refused() {
        let asked = |value: Value| with("runtimeConfig", value).unwrap();
        let dns =
            asked(json!({ "dns": { "servers": ["10.0.0.53"], "searches": ["a.example"], "options": ["ndots:5"] } }));
        let dns = dns.dns().unwrap().unwrap();
        assert_eq!(
            (&dns.nameservers[..], &dns.search[..]),
            (&["10.0.0.53".to_owned()][..], &["a.example".to_owned()][..])
        );
        assert_eq!(dns.options, ["ndots:5"]);
        for nothing in [json!({}), json!({ "dns": null }), json!({ "dns": { "servers": [] } })] {
            assert_eq!(asked(nothing).dns().unwrap(), None);
        }
        let error = asked(json!({ "dns": { "servers": ["10.0.0.53", "x"] } })).dns().unwrap_err();
        assert!(error.message.starts_with("runtimeConfig.dns.servers[1]"), "{error}");

        for (name, value) in [("deviceID", json!("0000:00:02.0")), ("infinibandGUID", json!("c2:11:22:33:44:55:66:77"))]
        {
            let error = asked(json!({ name: value })).refuse_lost().unwrap_err();
            assert_eq!(error.code.number(), 2);
            assert!(error.message.starts_with(&format!("runtimeConfig.{name}: ")), "{error}");
        }
        let limits = asked(json!({ "bandwidth": { "ingressRate": 1_000_000, "ingressBurst": 1_000_000 } }));
        assert!(limits.bandwidth().unwrap().unwrap().egress.is_none());
        assert_eq!(limits.refuse_bandwidth().unwrap_err().code.number(), 2);
        let error = asked(json!({ "bandwidth": { "egressRate": 1 } })).bandwidth().unwrap_err();
        assert!(error.message.starts_with("runtimeConfig.bandwidth: egressRate is 1 without"), "{error}");
        let zero = json!({ "bandwidth": { "ingressRate": 0, "egressRate": 0 }, "ipRanges": [], "deviceID": "" });
        let zero = asked(zero);
        zero.refuse_lost().unwrap();
        assert_eq!(zero.bandwidth().unwrap(), None);
        asked(json!({ "aliases": ["db"], "cgroupPath": "/x", "io.kubernetes.cri.pod-annotations": { "a": "b" } }))
            .refuse_lost()
            .unwrap();
    }

    #[test]
    fn port_mappings_are_read_as_runtimes_write_them() {
        let nat = |list: Value| with("runtimeConfig", json!({ "portMappings": list })).unwrap().nat();
        let port = |value: Value| nat(json!([value])).unwrap().ports.remove(0);
        let read = port(json!({"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": "", "range": 1}));
        let expected = PortMapping { host_ip: None, host_port: 8080, container_port: 80, protocol: Transport::Tcp };
        assert_eq!(read, expected);
        assert_eq!(port(json!({"hostPort": 8080, "containerPort": 80})), expected);
        let read = port(json!({"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "::1"}));
        assert_eq!((read.protocol, read.host_ip), (Transport::Udp, Some("::1".parse().unwrap())));
        let read = port(json!({"hostPort": 53, "containerPort": 53, "hostIP": "::ffff:192.0.2.1"}));
        assert_eq!(read.host_ip, Some("192.0.2.1".parse().unwrap()));
        assert!(nat(json!([{"hostPort": 0, "containerPort": 80}])).unwrap().is_none());
        assert!(nat(json!([])).unwrap().is_none() && nat(Value::Null).unwrap().is_none());
        for (value, path) in [
            (json!([{"hostPort": 70000, "containerPort": 80}]), "runtimeConfig.portMappings[0].hostPort"),
            (json!([{"hostPort": 80}]), "runtimeConfig.portMappings[0]"),
            (json!([{"hostPort": 80, "containerPort": 0}]), "runtimeConfig.portMappings[0].containerPort"),
            (
                json!([{"hostPort": 80, "containerPort": 1, "protocol": "icmp"}]),
                "runtimeConfig.portMappings[0].protocol",
            ),
            (json!([{"hostPort": 80, "containerPort": 1, "hostIP": "x"}]), "runtimeConfig.portMappings[0].hostIP"),
            (json!({}), "runtimeConfig.portMappings"),
        ] {
            let error = nat(value).unwrap_err();
            assert_eq!(error.code.number(), 7);
            assert!(error.message.starts_with(path), "{error}");
        }
        assert!(with("nat", json!({ "masquerade": true })).unwrap().nat().unwrap().masquerade);
        let error = with("nat", json!({ "masqerade": true })).unwrap().nat().unwrap_err();
        assert!(error.message.contains("did you mean `masquerade`?"), "{error}");
    }

    /// The bytes of `json.Marshal` for go-cni's `[]PortMapping` and `DNS`.
    #[test]
    fn capabilities_are_read_as_containerd_writes_them() {
        let conf = NetConf::parse(
            br#"{"cniVersion":"1.1.0","name":"shop","type":"dcenet","runtimeConfig":{"dns":{"Servers":["10.0.0.53"],"Searches":["a.example"],"Options":null},"portMappings":[{"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":""},{"HostPort":53,"ContainerPort":5353,"Protocol":"udp","HostIP":"192.0.2.1"},{"HostPort":0,"ContainerPort":81,"Protocol":"tcp","HostIP":""}]}}"#,
        )
        .unwrap();
        let mapping = |ip: Option<&str>, host_port, container_port, protocol| PortMapping {
            host_ip: ip.map(|ip| ip.parse().unwrap()),
            host_port,
            container_port,
            protocol,
        };
        assert_eq!(
            conf.nat().unwrap().ports,
            [mapping(None, 8080, 80, Transport::Tcp), mapping(Some("192.0.2.1"), 53, 5353, Transport::Udp)]
        );
        let dns = conf.dns().unwrap().unwrap();
        assert_eq!(
            (dns.nameservers, dns.search, dns.options.len()),
            (vec!["10.0.0.53".into()], vec!["a.example".into()], 0)
        );
    }

    #[test]
    fn what_the_runtime_asks_for_goes_before_the_arguments() {
        let conf = |runtime: Value, args: Value| {
            parse(json!({
                "cniVersion": "1.1.0", "name": "shop", "type": "dcenet", "runtimeConfig": runtime, "args": { "cni": args },
            }))
            .map(|conf| (conf.runtime.pools, conf.runtime.addresses.field))
        };
        let args = json!({ "pools": ["db"], "ips": ["10.0.0.7"] });
        let asked = |field, pool: &str| Asked { field, values: vec![pool.to_owned()] };
        let runtime = json!({ "pools": ["web*"], "ips": [] });
        assert_eq!(conf(runtime, args.clone()).unwrap(), (asked("runtimeConfig.pools", "web*"), "args.cni.ips"));
        assert_eq!(conf(json!({}), args.clone()).unwrap(), (asked("args.cni.pools", "db"), "args.cni.ips"));
        for (runtime, args, path) in [
            (json!({ "pools": [""] }), json!({}), "runtimeConfig.pools[0]"),
            (json!({ "pools": "db" }), json!({}), "runtimeConfig.pools"),
            (json!({}), json!({ "pools": ["a", 1] }), "args.cni.pools[1]"),
        ] {
            let error = conf(runtime, args).unwrap_err();
            assert!(error.message.starts_with(path), "{error}");
        }
    }

    #[test]
    fn anothers_configuration_that_names_us_for_addresses_is_anothers() {
        let conf = |mut more: Value| {
            let keys = more.as_object_mut().unwrap();
            keys.extend(json!({ "cniVersion": "1.0.0", "name": "shop" }).as_object().unwrap().clone());
            parse(more)
        };
        let theirs = json!({ "type": "bridge", "bridge": "cni0", "ipMasq": true, "ipam": { "type": "dcenet" } });
        assert_eq!(conf(theirs).unwrap().role, Role::Ipam);
        for ours in [
            json!({ "type": "dcenet", "ipam": { "type": "dcenet" } }),
            json!({ "ipam": { "type": "dcenet" } }),
            json!({ "type": "renamed", "link": {}, "ipam": { "type": "dcenet" } }),
            json!({ "type": "bridge", "ipam": { "type": "host-local" } }),
        ] {
            assert_eq!(conf(ours).unwrap().role, Role::Main);
        }
        for behind in [json!({ "type": "dcenet", "policy": {} }), json!({ "type": "renamed" })] {
            assert_eq!(conf(behind).unwrap().role, Role::Chained);
        }
    }

    #[test]
    fn absent_attachments_are_not_empty_attachments() {
        assert_eq!(with("x", json!(1)).unwrap().valid_attachments, None);
        assert_eq!(with("cni.dev/valid-attachments", json!([])).unwrap().valid_attachments, Some(vec![]));
        let list = json!([{"containerID": "c1", "ifname": "eth0"}]);
        for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            assert_eq!(with(key, list.clone()).unwrap().valid_attachments.unwrap().len(), 1);
        }
        with("cni.dev/valid-attachments", json!([{"containerID": "c1"}])).unwrap_err();
    }

    #[test]
    fn labels_come_with_the_arguments() {
        let conf =
            with("args", json!({"cni": {"labels": [{"key": "app", "value": "db"}], "other": 1}, "x": {}})).unwrap();
        assert_eq!(conf.labels["app"], "db");
    }
}
