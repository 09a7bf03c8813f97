//! Networks that a pod asks for: the annotation, and the definitions that it names (Kubernetes Network Custom Resource
//! Definition De-facto Standard, "NetworkAttachmentDefinition Object" and "Network Attachment Selection Annotation").

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::config::Selection;
use crate::cni::{CniError, ErrorCode, NetConf};
use crate::model::{IfName, MacAddr, ParseError, Workload};
use crate::section::{self, SectionError};

/// The capability by which containerd passes a pod's annotations.
pub(super) const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
/// The annotation.
pub(super) const NETWORKS: &str = "k8s.v1.cni.cncf.io/networks";

/// A network that a pod asks for: an element of the annotation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Selected {
    pub(super) name: String,
    pub(super) namespace: Option<String>,
    pub(super) interface: Option<IfName>,
    ips: Option<Vec<String>>,
    mac: Option<String>,
    #[serde(rename = "infiniband-guid")]
    guid: Option<String>,
    #[serde(rename = "portMappings")]
    port_mappings: Option<Value>,
    bandwidth: Option<Value>,
    #[serde(rename = "cni-args")]
    pub(super) cni_args: Option<Map<String, Value>>,
    #[serde(rename = "default-route")]
    pub(super) default_route: Option<Vec<IpAddr>>,
    /// Of newer clients of the standard. Plugins that know of it read it from the annotation themselves.
    #[serde(rename = "ipam-claim-reference")]
    _claim: Option<Value>,
}

impl Selected {
    /// The addresses that it asks for, with their prefix lengths where it says any.
    pub(super) fn ips(&self) -> &[String] {
        self.ips.as_deref().unwrap_or_default()
    }

    /// The hardware address that it asks for.
    pub(super) fn mac(&self) -> Option<&str> {
        self.mac.as_deref()
    }

    /// Makes sure that addresses are addresses, for a pod's author writes them and plugins get them among arguments of the
    /// runtime's; as the types write them.
    fn check(&mut self, path: &str) -> Result<(), SectionError> {
        for (i, text) in self.ips.iter_mut().flatten().enumerate() {
            let address = text.parse::<IpAddr>().map(|a| a.to_string());
            *text = address.or_else(|_| text.parse::<IpNet>().map(|a| a.to_string())).map_err(|_| SectionError {
                field: format!("{path}.ips[{i}]"),
                reason: format!("{text:?} is no IP address; write one, as 10.0.0.7 or 10.0.0.7/24"),
            })?;
        }
        self.mac = match self.mac.take().filter(|mac| !mac.is_empty()) {
            None => None,
            Some(text) => {
                let mac = MacAddr::for_device(&text);
                let wrong = |e: ParseError| SectionError { field: format!("{path}.mac"), reason: e.to_string() };
                Some(mac.map_err(wrong)?.to_string())
            }
        };
        Ok(())
    }

    /// What it asks for as capabilities (CNI's CONVENTIONS.md).
    pub(super) fn capabilities(&self) -> Vec<(String, Value)> {
        let ips = (!self.ips().is_empty()).then(|| json!(self.ips()));
        let asked = [
            ("ips", ips),
            ("mac", self.mac.as_ref().map(|mac| json!(mac))),
            ("infinibandGUID", self.guid.as_ref().map(|guid| json!(guid))),
            ("portMappings", self.port_mappings.clone()),
            ("bandwidth", self.bandwidth.clone()),
        ];
        asked.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }
}

/// The annotation of the pod, with where it was found; `None` where the pod asks for nothing.
///
/// # Errors
/// Where a file or a value cannot be read.
pub(super) fn annotation(
    conf: &NetConf,
    selection: Option<&Selection>,
    pod: Option<&Workload>,
) -> Result<Option<(String, Value)>, CniError> {
    let given = [
        (format!("runtimeConfig.{ANNOTATIONS}.{NETWORKS}"), conf.key("runtimeConfig").and_then(|c| c.get(ANNOTATIONS))),
        (format!("args.cni.{NETWORKS}"), conf.key("args").and_then(|args| args.get("cni"))),
    ];
    let found = given.into_iter().find_map(|(field, annotations)| Some((field, annotations?.get(NETWORKS)?.clone())));
    if found.is_some() {
        return Ok(found);
    }
    let Some((directory, pod)) = selection.and_then(|s| s.pods.as_deref()).zip(pod) else { return Ok(None) };
    // Neither part can hold a '/' or a '_'.
    let path = directory.join(format!("{}_{}.json", pod.namespace(), pod.name()));
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CniError::new(ErrorCode::Io, format!("{}: {error}", path.display()))),
    };
    let annotations: Map<String, Value> = serde_json::from_str(&text).map_err(|e| {
        let message = format!("{}: {e}; give a JSON object of the pod's annotations", path.display());
        CniError::new(ErrorCode::InvalidConfig, message)
    })?;
    Ok(annotations.get(NETWORKS).map(|value| (format!("{}: {NETWORKS}", path.display()), value.clone())))
}

/// Reads the annotation in either form: `namespace/name@interface, ...`, or a JSON list. An empty one asks for nothing.
///
/// # Errors
/// Names the wrong element.
pub(super) fn parse(field: &str, value: &Value) -> Result<Vec<Selected>, SectionError> {
    let at = |reason: String| SectionError { field: field.to_owned(), reason };
    let text = match value {
        Value::String(text) => text.trim(),
        list @ Value::Array(_) => return read_list(field, list),
        other => return Err(at(format!("{other} is neither text nor a list"))),
    };
    if text.starts_with(['[', '{', '"']) {
        let list: Value = serde_json::from_str(text).map_err(|e| at(format!("not JSON: {e}")))?;
        return read_list(field, &list);
    }
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(|part| short(field, part)).collect()
}

fn read_list(field: &str, list: &Value) -> Result<Vec<Selected>, SectionError> {
    let Value::Array(elements) = list else {
        return Err(SectionError { field: field.to_owned(), reason: format!("{list} is not a list") });
    };
    let read = |(i, element)| {
        let path = format!("{field}[{i}]");
        let mut one: Selected = section::read(&path, element)?;
        check_names(&path, &one)?;
        one.check(&path)?;
        Ok(one)
    };
    elements.iter().enumerate().map(read).collect()
}

fn short(field: &str, part: &str) -> Result<Selected, SectionError> {
    let at = |reason: String| SectionError { field: format!("{field}: {part:?}"), reason };
    let (network, interface) = match part.split_once('@') {
        Some((network, interface)) => (network, Some(interface.parse().map_err(|e: ParseError| at(e.to_string()))?)),
        None => (part, None),
    };
    let (namespace, name) = match network.split_once('/') {
        Some((namespace, name)) => (Some(namespace.to_owned()), name),
        None => (None, network),
    };
    let one = Selected { name: name.to_owned(), namespace, interface, ..Selected::default() };
    check_names(field, &one)?;
    Ok(one)
}

/// Names are those of Kubernetes objects (RFC 1123), so that none is a path.
fn check_names(field: &str, one: &Selected) -> Result<(), SectionError> {
    let namespace = one.namespace.as_deref().unwrap_or("default");
    let checked = Workload::new(namespace, &one.name);
    checked.map(drop).map_err(|e| SectionError {
        field: field.to_owned(),
        reason: format!("{e}; write namespace/name@interface, or a list of JSON objects"),
    })
}

/// The NetworkAttachmentDefinitions of a directory.
#[derive(Debug)]
pub(super) struct Definitions {
    directory: PathBuf,
    found: Vec<Definition>,
    /// Files that could not be read, and why.
    broken: Vec<String>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Definition {
    namespace: String,
    name: String,
    /// Its file.
    pub(super) path: PathBuf,
    /// `spec.config`.
    pub(super) config: String,
}

/// A NetworkAttachmentDefinition, as far as it is read.
#[derive(Deserialize)]
struct Object {
    metadata: Metadata,
    #[serde(default)]
    spec: Option<Spec>,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    namespace: Option<String>,
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    config: String,
}

impl Definitions {
    /// Reads all files of the directory that end in `.json`, `.yaml` or `.yml`. One that cannot be read is in nobody's way
    /// but theirs who look for something that is not found.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub(super) fn read(directory: &Path) -> Result<Self, CniError> {
        let failed = |error: std::io::Error| {
            CniError::new(ErrorCode::Io, format!("selection.definitions: {}: {error}", directory.display()))
        };
        let mut paths = Vec::new();
        for file in std::fs::read_dir(directory).map_err(failed)? {
            paths.push(file.map_err(failed)?.path());
        }
        paths.retain(|path| path.extension().is_some_and(|e| ["json", "yaml", "yml"].iter().any(|known| e == *known)));
        paths.sort();
        let mut all = Self { directory: directory.to_owned(), found: Vec::new(), broken: Vec::new() };
        for path in paths {
            let objects =
                std::fs::read_to_string(&path).map_err(|e| e.to_string()).and_then(|text| objects(&path, &text));
            match objects {
                Ok(objects) => objects.into_iter().for_each(|object| all.take(&path, object)),
                Err(reason) => all.broken.push(format!("{}: {reason}", path.display())),
            }
        }
        Ok(all)
    }

    /// Takes an object, or those of a list of them. What other kinds of objects hold is nobody's affair here.
    fn take(&mut self, path: &Path, object: Value) {
        if object.get("kind").is_none_or(|kind| kind != "NetworkAttachmentDefinition") {
            if let Some(Value::Array(items)) = object.get("items") {
                items.iter().for_each(|item| self.take(path, item.clone()));
            }
            return;
        }
        let object: Object = match section::read("NetworkAttachmentDefinition", &object) {
            Ok(object) => object,
            Err(error) => return self.broken.push(format!("{}: {error}", path.display())),
        };
        let Metadata { name, namespace } = object.metadata;
        let namespace = namespace.unwrap_or_else(|| "default".to_owned());
        let config = object.spec.map(|spec| spec.config).unwrap_or_default();
        self.found.push(Definition { namespace, name, path: path.to_owned(), config });
    }

    /// The one of this name.
    ///
    /// # Errors
    /// Says what is there, where there is none, or two.
    pub(super) fn find(&self, namespace: &str, name: &str) -> Result<&Definition, String> {
        let mut matching = self.found.iter().filter(|d| d.namespace == namespace && d.name == name);
        match (matching.next(), matching.next()) {
            (Some(one), None) if one.config.trim().is_empty() => Err(format!(
                "{}: spec.config of {namespace}/{name} is empty; write the configuration there",
                one.path.display()
            )),
            (Some(one), None) => Ok(one),
            (Some(one), Some(other)) => Err(format!(
                "{namespace}/{name} is defined in {} and in {}; remove one",
                one.path.display(),
                other.path.display()
            )),
            (None, _) => {
                let known: Vec<_> = self.found.iter().map(|d| format!("{}/{}", d.namespace, d.name)).collect();
                let known = if known.is_empty() { "nothing".to_owned() } else { known.join(", ") };
                let broken =
                    if self.broken.is_empty() { String::new() } else { format!("; {}", self.broken.join("; ")) };
                let directory = self.directory.display();
                Err(format!(
                    "no NetworkAttachmentDefinition {namespace}/{name} in {directory}, which defines {known}{broken}"
                ))
            }
        }
    }
}

fn objects(path: &Path, text: &str) -> Result<Vec<Value>, String> {
    if path.extension().is_some_and(|e| e == "json") {
        return serde_json::from_str(text).map(|object| vec![object]).map_err(|e| e.to_string());
    }
    yaml(text)
}

#[cfg(feature = "yaml")]
fn yaml(text: &str) -> Result<Vec<Value>, String> {
    serde_saphyr::from_multiple(text).map_err(|e| e.to_string())
}

#[cfg(not(feature = "yaml"))]
fn yaml(_: &str) -> Result<Vec<Value>, String> {
    Err("this program reads no YAML (feature `yaml`); give JSON".to_owned())
}
