//! The daemon's configuration: one JSON object. Its sections `ipam` and `policy` and the keys `stateDir` and `runDir` are
//! those of the CNI configuration.

mod policies;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use dcenet_core::fabric::FabricConfig;
use dcenet_core::section;
use dcenet_ipam::Layout;
use dcenet_ipam::config::IpamConfig;
use dcenet_policy::dns::ProxyConfig;
use dcenet_policy::enforcer::PolicyConfig;
use dcenet_sriov::allocate::Shape;
use dcenet_sriov::kubelet::DevicePlugin;
use dcenet_sriov::source::SourceConfig;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

pub use self::policies::{PoliciesConfig, TrustConfig};

/// What the daemon does. A part whose section is missing is not there.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Where it runs.
    #[serde(default)]
    pub node: NodeConfig,
    /// The pools and the store, as in the CNI configuration: leases of pods that are gone are taken back, and counted for
    /// metrics.
    pub ipam: Option<IpamConfig>,
    /// As in the CNI configuration: the daemon owns the node's policy state.
    pub policy: Option<PolicyConfig>,
    /// Where policies are read from; none are in force without it.
    pub policies: Option<PoliciesConfig>,
    /// Where pods of this node ask for names, so that policies may allow by these.
    pub dns: Option<DnsConfig>,
    /// How leases are taken back.
    #[serde(default)]
    pub reclaim: ReclaimConfig,
    /// Where Prometheus asks.
    pub metrics: Option<MetricsConfig>,
    /// Who is told of flows.
    pub flows: Option<FlowsConfig>,
    /// Whether calls of the plugin are served, for configurations that say where: `"daemon": SOCKET`.
    pub server: Option<ServerConfig>,
    /// How the pods of other nodes are reached.
    pub fabric: Option<FabricConfig>,
    /// The pools of virtual functions, as in the CNI configuration.
    pub sriov: Option<Value>,
    /// Which of them are told to the kubelet.
    pub kubelet: Option<KubeletConfig>,
    /// What is told to people.
    #[serde(default)]
    pub log: LogConfig,
    /// As in the CNI configuration.
    #[serde(default = "state_dir")]
    pub state_dir: PathBuf,
    /// As in the CNI configuration.
    #[serde(default = "run_dir")]
    pub run_dir: PathBuf,
}

/// The node.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Its name in the cluster; the host name unless told.
    pub name: Option<String>,
    /// Its own addresses, from and to which its pods may talk; those of all its devices unless told.
    pub addresses: Option<BTreeSet<IpAddr>>,
}

/// A proxy for the Domain Name System.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsConfig {
    /// Addresses of the host, `ADDRESS:PORT`.
    pub listen: Vec<SocketAddr>,
    /// The servers behind it, likewise.
    pub upstreams: Vec<SocketAddr>,
    /// How long each of them may take.
    #[serde(default = "upstream_timeout")]
    pub timeout: Period,
    /// Who may ask beside the pods that are under policy.
    #[serde(default)]
    pub clients: Vec<IpNet>,
}

impl DnsConfig {
    /// As the library has it.
    pub fn proxy(&self) -> ProxyConfig {
        let Self { listen, upstreams, timeout, clients } = self.clone();
        ProxyConfig { listen, upstreams, timeout: timeout.0, clients, ..ProxyConfig::default() }
    }
}

/// When leases are taken back.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReclaimConfig {
    /// How often it is looked for pods that are gone.
    pub every: Period,
}

impl Default for ReclaimConfig {
    fn default() -> Self {
        Self { every: Period(Duration::from_secs(30)) }
    }
}

/// Where metrics are.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct MetricsConfig {
    /// `ADDRESS:PORT`, or `unix:PATH` for a socket of mode 0600.
    pub listen: Listen,
    /// How many rules have counters of their own.
    #[serde(default = "most_rules")]
    pub most_rules: usize,
}

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

/// Who is told of flows.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowsConfig {
    /// A file that gets a line of JSON for each; opened anew on SIGHUP.
    pub file: Option<PathBuf>,
    /// An IPFIX collector.
    pub ipfix: Option<IpfixSection>,
    /// How often flows that go on are told of; they are not unless told.
    pub active: Option<Period>,
}

/// Serving calls of the plugin.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// The socket; `dcenetd.sock` in the run directory unless told.
    pub socket: Option<PathBuf>,
    /// How many calls at a time. What calls do is mostly to wait, for flushes and for the kernel, and those that wait together
    /// wait once: the links of as many DELs are deleted together.
    #[serde(default = "workers")]
    pub workers: NonZeroUsize,
}

/// What the kubelet is told of.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KubeletConfig {
    /// Where it has the sockets of its device plugins.
    #[serde(default = "plugins")]
    pub directory: PathBuf,
    /// The resources, a pool each.
    pub resources: Vec<ResourceConfig>,
}

/// A resource of the node.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceConfig {
    /// Its name, such as `example.com/vf`.
    pub name: String,
    /// The pool that it is.
    pub pool: String,
    /// How the functions of one container spread over ports.
    #[serde(default)]
    pub shape: Shape,
}

/// A collector.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct IpfixSection {
    /// `ADDRESS:PORT`, where UDP is received.
    pub collector: SocketAddr,
    /// What tells this node from others at the collector.
    #[serde(default)]
    pub observation_domain: u32,
}

/// What is told to people, on the standard error.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// In which form.
    pub format: LogFormat,
    /// How much.
    pub level: LogLevel,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object each.
    Json,
}

/// The least severe line that is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// A length of time, as text such as `30s`, `5m` or `1h`; a second at the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period(pub Duration);

/// Why a configuration cannot be used.
#[derive(Debug)]
pub enum ConfigError {
    /// The file cannot be read now.
    Unreadable {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// File, field, value and remedy in words.
    Wrong(String),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { path, source } => write!(f, "{}: {source}", path.display()),
            Self::Wrong(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
        let text = String::from_utf8(std::fs::read(path).map_err(unreadable)?);
        let in_file = |reason: &dyn fmt::Display| ConfigError::Wrong(format!("{}: {reason}", path.display()));
        Self::parse(&text.map_err(|e| in_file(&e))?).map_err(|e| in_file(&e))
    }

    /// Reads and checks a text.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_str(text).map_err(|e| ConfigError::Wrong(format!("not JSON: {e}")))?;
        let config: Self = section::read("", &value).map_err(|error| match error.field.trim_start_matches('.') {
            "" => ConfigError::Wrong(error.reason),
            field => ConfigError::Wrong(format!("{field}: {}", error.reason)),
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |text: String| Err(ConfigError::Wrong(text));
        let paths = [("stateDir", Some(&self.state_dir)), ("runDir", Some(&self.run_dir))];
        let paths = paths.into_iter().chain([
            ("policies.directory", self.policies.as_ref().map(|p| &p.directory)),
            ("policies.cluster", self.policies.as_ref().and_then(|p| p.cluster.as_ref())),
            ("policy.pins", self.policy.as_ref().map(|p| &p.pins)),
            ("server.socket", self.server.as_ref().and_then(|s| s.socket.as_ref())),
            ("flows.file", self.flows.as_ref().and_then(|f| f.file.as_ref())),
            ("kubelet.directory", self.kubelet.as_ref().map(|k| &k.directory)),
        ]);
        if let Some(trust) = self.policies.as_ref().and_then(|p| p.trust.as_ref()) {
            trust.check().map_err(ConfigError::Wrong)?;
        }
        let keys = self.policies.iter().filter_map(|p| p.trust.as_ref()).flat_map(|trust| &trust.keys);
        let paths = paths.chain(keys.map(|path| ("policies.trust.keys", Some(path))));
        for (field, path) in paths.filter_map(|(field, path)| Some((field, path?))) {
            if !path.is_absolute() {
                return wrong(format!("{field}: {path:?} is not absolute; begin it with a slash"));
            }
        }
        if let Some(policies) = &self.policies
            && policies.cluster.as_ref() == Some(&policies.directory)
        {
            return wrong(format!(
                "policies.cluster: {:?} is policies.directory; name another, or none where it is all in one",
                policies.directory
            ));
        }
        if let Some(ipam) = &self.ipam {
            ipam.layout().map_err(|e| ConfigError::Wrong(e.to_string()))?;
            if !ipam.store.outlives_process() {
                return wrong("ipam.store.kind: \"memory\" is shared with no plugin; say \"log\"".to_owned());
            }
        }
        if let Some(fabric) = &self.fabric {
            fabric.check().map_err(|e| ConfigError::Wrong(e.to_string()))?;
            if !self.layout().is_some_and(|layout| layout.pools.iter().any(|pool| pool.node_blocks().is_some())) {
                return wrong(
                    "fabric: no pool of ipam has blocks that nodes own, so that there is nothing to route; add \"block\": \
                     { \"size\": 64 } to a pool"
                        .to_owned(),
                );
            }
        }
        let functions = self.sriov.as_ref().map(SourceConfig::read).transpose();
        let functions = functions.map_err(|e| ConfigError::Wrong(e.to_string()))?;
        if let Some(kubelet) = &self.kubelet {
            kubelet.check(functions.as_ref())?;
        }
        if self.policy.is_none() {
            let needy =
                [("policies", self.policies.is_some()), ("flows", self.flows.is_some()), ("dns", self.dns.is_some())];
            if let Some((field, _)) = needy.into_iter().find(|(_, given)| *given) {
                return wrong(format!("{field}: nothing is enforced without a section policy; add \"policy\": {{}}"));
            }
        }
        if let Some(dns) = &self.dns {
            dns.proxy().check().map_err(|e| ConfigError::Wrong(format!("dns.{e}")))?;
        }
        if let Some(flows) = &self.flows
            && flows.file.is_none()
            && flows.ipfix.is_none()
        {
            return wrong("flows: nobody is told; name a file or an ipfix collector, or drop the section".to_owned());
        }
        Ok(())
    }

    /// The checked pools.
    pub fn layout(&self) -> Option<Layout> {
        // Checked when it was read.
        self.ipam.as_ref().and_then(|ipam| ipam.layout().ok())
    }
}

impl KubeletConfig {
    fn check(&self, section: Option<&SourceConfig>) -> Result<(), ConfigError> {
        let wrong = |text: String| Err(ConfigError::Wrong(text));
        let Some(section) = section else {
            return wrong(
                "kubelet: there are no pools without a section sriov; add \"sriov\": { \"pools\": [..] }".to_owned(),
            );
        };
        // The file may come later; one that is there is read.
        let pools = match &section.pools_file {
            Some(path) if section.pools.is_null() && !path.exists() => None,
            _ => Some(section.pools().map_err(|e| ConfigError::Wrong(e.to_string()))?),
        };
        if self.resources.is_empty() {
            return wrong("kubelet.resources: none, so that nothing is told; name one, or drop the section".to_owned());
        }
        for (i, resource) in self.resources.iter().enumerate() {
            let field = format!("kubelet.resources[{i}]");
            DevicePlugin::check_name(&resource.name).map_err(|e| ConfigError::Wrong(format!("{field}.name: {e}")))?;
            let socket = self.directory.join(DevicePlugin::socket_of(&resource.name));
            let length = socket.as_os_str().len();
            if length > MOST_OF_SOCKET {
                return wrong(format!(
                    "kubelet.directory: {} has {length} bytes, and the path of a socket at most {MOST_OF_SOCKET} (unix(7)); mount the \
                     directory at a shorter path",
                    socket.display()
                ));
            }
            let before = &self.resources[..i];
            if before.iter().any(|other| other.name == resource.name) {
                return wrong(format!("{field}.name: {:?} is the name of two; rename one", resource.name));
            }
            let variable = DevicePlugin::variable(&resource.name);
            if let Some(other) = before.iter().find(|other| DevicePlugin::variable(&other.name) == variable) {
                return wrong(format!(
                    "{field}.name: {:?} and {:?} are both {variable} to a container; rename one",
                    other.name, resource.name
                ));
            }
            if before.iter().any(|other| other.pool == resource.pool) {
                return wrong(format!(
                    "{field}.pool: {:?} is two resources, which would allot the same; drop one",
                    resource.pool
                ));
            }
            let Some(pools) = &pools else { continue };
            let known: Vec<&str> = pools.configs().iter().map(|pool| pool.name.as_str()).collect();
            if !known.contains(&resource.pool.as_str()) {
                return wrong(format!("{field}.pool: {:?} is none of sriov.pools, which are {known:?}", resource.pool));
            }
        }
        Ok(())
    }
}

/// `sun_path` without the byte that ends it.
const MOST_OF_SOCKET: usize = 107;

fn plugins() -> PathBuf {
    dcenet_sriov::kubelet::DIRECTORY.into()
}

fn state_dir() -> PathBuf {
    "/var/lib/dcenet".into()
}

fn run_dir() -> PathBuf {
    "/run/dcenet".into()
}

const fn upstream_timeout() -> Period {
    Period(Duration::from_secs(2))
}

const fn workers() -> NonZeroUsize {
    NonZeroUsize::new(64).unwrap()
}

const fn most_rules() -> usize {
    1000
}

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = |reason: &str| format!("duration {text:?}: {reason}; write 30s, 5m or 1h");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let scale = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return Err(refuse("not a whole number of seconds, minutes or hours")),
        };
        match number.parse::<u64>().ok().and_then(|n| n.checked_mul(scale)) {
            Some(seconds @ 1..=86_400) => Ok(Self(Duration::from_secs(seconds))),
            _ => Err(refuse("not between a second and a day")),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(_) => Err(format!("{text:?} is not absolute; write unix:/run/dcenet/metrics.sock")),
            None => text.parse().map(Self::Tcp).map_err(|_| {
                format!("{text:?} is no address; write 127.0.0.1:9464, [::1]:9464 or unix:/run/dcenet/metrics.sock")
            }),
        }
    }
}

fn from_text<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(deserializer: D) -> Result<T, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer)
    }
}

impl<'de> Deserialize<'de> for Listen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_text(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_object_is_a_daemon_with_nothing_to_do_and_the_usual_directories() {
        let config = Config::parse("{}").unwrap();
        assert_eq!((config.state_dir, config.run_dir), ("/var/lib/dcenet".into(), "/run/dcenet".into()));
        assert_eq!(config.reclaim.every.0, Duration::from_secs(30));
    }

    fn of_functions(resources: &str) -> String {
        let pools = r#"[{ "name": "fast", "select": [{ "pfs": ["ens1"] }] }]"#;
        format!(r#"{{ "sriov": {{ "pools": {pools} }}, "kubelet": {{ "resources": {resources} }} }}"#)
    }

    #[test]
    fn what_is_wrong_is_told_with_its_field_and_a_remedy() {
        let pools = r#""pools": [{ "name": "db", "subnet": "10.0.0.0/24" }]"#;
        let function = r#"[{ "name": "a.b/vf", "pool": "fast" }]"#;
        let far = of_functions(function)
            .replace(r#""resources""#, &format!(r#""directory": "/run/{}", "resources""#, "x".repeat(100)));
        let sick =
            format!(r#"{{ "sriov": {{ "poolsFile": "/dev/null" }}, "kubelet": {{ "resources": {function} }} }}"#);
        for (text, told) in [
            ("[", "not JSON"),
            ("3", "invalid type"),
            (r#"{ "polices": {} }"#, "polices: unknown field `polices`"),
            (r#"{ "polices": {} }"#, "did you mean `polic"),
            (r#"{ "policy": { "awiat": "5s" } }"#, "policy.awiat: unknown field"),
            (
                r#"{ "policy": {}, "metrics": { "listen": "localhost" } }"#,
                "metrics.listen: \"localhost\" is no address",
            ),
            (r#"{ "metrics": { "listen": "unix:x" } }"#, "metrics.listen: \"unix:x\" is not absolute"),
            (r#"{ "reclaim": { "every": "5" } }"#, "reclaim.every: duration \"5\": not a whole number"),
            (r#"{ "reclaim": { "every": "0s" } }"#, "reclaim.every: duration \"0s\": not between"),
            (r#"{ "policies": { "directory": "/etc/dcenet/policies" } }"#, "add \"policy\": {}"),
            (r#"{ "policy": {}, "flows": {} }"#, "flows: nobody is told"),
            (r#"{ "dns": { "listen": ["10.0.0.1:53"], "upstreams": ["10.0.0.2:53"] } }"#, "dns: nothing is enforced"),
            (
                r#"{ "policy": {}, "dns": { "listen": ["0.0.0.0:53"], "upstreams": ["10.0.0.2:53"] } }"#,
                "dns.listen: 0.0.0.0:53: must be one address",
            ),
            (
                r#"{ "policy": {}, "dns": { "listen": ["10.0.0.1:53"], "upstreams": [] } }"#,
                "dns.upstreams: []: must have",
            ),
            (
                r#"{ "policy": {}, "policies": { "directory": "here" } }"#,
                "policies.directory: \"here\" is not absolute",
            ),
            (
                r#"{ "policy": {}, "policies": { "directory": "/etc/a", "cluster": "there" } }"#,
                "policies.cluster: \"there\" is not absolute",
            ),
            (
                r#"{ "policy": {}, "policies": { "directory": "/etc/a", "cluster": "/etc/a/" } }"#,
                "policies.cluster: \"/etc/a\" is policies.directory",
            ),
            (r#"{ "runDir": "run" }"#, "runDir: \"run\" is not absolute"),
            (r#"{ "ipam": { "pools": [] } }"#, "ipam.pools"),
            (&format!(r#"{{ "ipam": {{ "store": {{ "kind": "memory" }}, {pools} }} }}"#), "ipam.store.kind"),
            (r#"{ "fabric": { "mode": "bgp" } }"#, "fabric.mode: unknown variant"),
            (r#"{ "fabric": { "vni": 0 } }"#, "fabric.vni: 0"),
            (&format!(r#"{{ "fabric": {{}}, "ipam": {{ {pools} }} }}"#), "fabric: no pool of ipam has blocks"),
            (r#"{ "log": { "format": "xml" } }"#, "log.format: unknown variant"),
            (r#"{ "kubelet": { "resources": [] } }"#, "kubelet: there are no pools"),
            (&far, "kubelet.directory: /run/"),
            (&sick, "poolsFile: /dev/null is not JSON"),
            (&of_functions("[]"), "kubelet.resources: none"),
            (&of_functions(r#"[{ "name": "vf", "pool": "fast" }]"#), "kubelet.resources[0].name: resource: \"vf\""),
            (
                &of_functions(r#"[{ "name": "a.b/vf", "pool": "slow" }]"#),
                "kubelet.resources[0].pool: \"slow\" is none of",
            ),
            (
                &of_functions(r#"[{ "name": "a.b/vf", "pool": "fast" }, { "name": "a.b/c", "pool": "fast" }]"#),
                "kubelet.resources[1].pool: \"fast\" is two resources",
            ),
            (&of_functions(r#"[{ "name": "a.b/vf", "pool": "fast", "shape": "flat" }]"#), "shape: unknown variant"),
            (
                &of_functions(r#"[{ "name": "a.b/vf-1", "pool": "fast" }, { "name": "a.b/VF_1", "pool": "slow" }]"#),
                "kubelet.resources[1].name: \"a.b/vf-1\" and \"a.b/VF_1\" are both PCIDEVICE_A_B_VF_1",
            ),
            (r#"{ "sriov": { "pool": [] }, "kubelet": { "resources": [] } }"#, "sriov.pool: unknown field"),
            (r#"{ "sriov": { "pool": [] } }"#, "sriov.pool: unknown field"),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
