//! A cluster from the objects of Kubernetes: namespaces, pods and policies, as people write them and as
//! `kubectl get -o yaml` prints them.
//!
//! | Object | What is read |
//! |---|---|
//! | `v1` Namespace | `metadata.name`, `metadata.labels` |
//! | `v1` Pod | `metadata`: name, namespace (`default` where missing), labels; `spec`: `nodeName`, `serviceAccountName` (`default` where missing), `hostNetwork`, named ports of containers and of init containers that restart always; `status`: `phase`, `podIP`, `podIPs`, `hostIP`, `hostIPs` |
//! | `networking.k8s.io/v1` NetworkPolicy | everything, strictly: see [`networkpolicy`] |
//! | `policy.networking.k8s.io` ClusterNetworkPolicy, AdminNetworkPolicy, BaselineAdminNetworkPolicy | everything, strictly: see [`clusternetworkpolicy`]; rules that are closed are told by [`Documents::closed`] |
//! | `dcenet.io/v1alpha1` Policy | everything, strictly: see [`native`]; another version of it is refused |
//! | `dcenet.io/v1alpha1` Tier, PrefixGroup | everything, strictly: see [`native`] |
//! | `v1` Node | `metadata`: name, labels; `status.addresses` of the types `InternalIP` and `ExternalIP` |
//! | `v1` Service | `metadata`: name, namespace; `spec`: `clusterIP`, `clusterIPs`, `externalIPs`, `ports`; `status.loadBalancer.ingress[].ip`. One of the type `ExternalName` is counted as not used |
//! | `discovery.k8s.io/v1` EndpointSlice | `metadata`: namespace, the label `kubernetes.io/service-name`; `addressType`, `endpoints[].addresses`, `ports`; those of no service, and of names, are counted as not used |
//! | any `List`, also typed ones such as `PodList` | its `items` |
//! | another kind that is called `...NetworkPolicy` | refused: without it, verdicts would be others than in the cluster |
//! | any other kind | counted in [`Documents::unused`] |
//!
//! Fields of namespaces and pods that are not read may hold anything. What cannot be right is refused:
//!
//! | Case | What happens |
//! |---|---|
//! | a pod that is finished (`status.phase` is `Succeeded` or `Failed`) | left out, for its address may be another's by now; told by [`Documents::left_out`] |
//! | a pod without an address, such as one that is not scheduled yet | left out, likewise |
//! | a pod whose namespace is not given | the namespace has only its name as label, as each has (`kubernetes.io/metadata.name`); told by [`Documents::assumed_namespaces`] |
//! | two namespaces, pods or policies of one name, in whatever files | refused; policies of the cluster have one name in each tier |
//! | an address of two pods that have networks of their own, or of such a pod and a node, but for the one below | refused |
//! | an address that no pod can have: unspecified, loopback, multicast, broadcast | refused |
//! | `hostNetwork: true` | the pod has its node's addresses, is no subject of policy, and no selector finds it; addresses that may be shared. `hostIPs` count where it has no `podIPs` |
//!
//! Nodes are known by their own objects, and by what pods say of theirs (`spec.nodeName` with `status.hostIPs`, or a host-network pod's own
//! addresses), since traffic between a pod and its node is allowed. A pod that has its node's address without
//! `hostNetwork`, as where each pod has a machine of its own (Fargate), has it alone: it is told as no node's, unless
//! another pod says that it is. An `ExternalIP` may be shared by many, as where it is translated: rules that name nodes find
//! it, but who comes from there is not the pods' own node.
//!
//! ```
//! # #[cfg(feature = "yaml")] {
//! use dcenet_policy::sources::kubernetes::Documents;
//!
//! let documents = Documents::default()
//!     .with_yaml(
//!         "shop.yaml",
//!         r#"
//! { apiVersion: v1, kind: Namespace, metadata: { name: shop, labels: { team: red } } }
//! ---
//! apiVersion: v1
//! kind: Pod
//! metadata: { name: db, namespace: shop, labels: { app: db } }
//! status: { podIP: 10.0.0.1 }
//! "#,
//!     )
//!     .unwrap();
//! assert_eq!(documents.pods.len(), 1);
//!
//! let error = documents.with_yaml("more.yaml", "apiVersion: v1\nkind: Pod\nmetadata:\n  nmae: web\n").unwrap_err();
//! assert_eq!(error.to_string(), "more.yaml:3: document 0: metadata.name: nothing: is required");
//! # }
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use serde_json::Value;

use super::SourceError;
use super::clusternetworkpolicy::{self, Closed};
use super::fields::{At, Fields};
use super::native;
use super::networkpolicy::{self, KindNeeded, dns_name, one_of, port_number};
use super::nodes::{self, ReadNode};
pub use super::notes::{Note, NoteKind, UnknownPeer};
use super::objects::{self, Named};
use super::services;
use super::text::{self, Lines};
use crate::model::{
    Catalog, Cluster, Labels, NamedPort, Pod, PodId, PodNetwork, Policy, PolicyId, Protocol, SERVICE_ACCOUNT_LABEL,
    Tier,
};

/// What a set of texts says of a cluster.
#[derive(Debug, Clone, Default)]
pub struct Documents {
    /// Labels of each namespace that is given.
    pub namespaces: BTreeMap<String, Labels>,
    /// The pods that have an address.
    pub pods: BTreeMap<PodId, Pod>,
    /// Addresses of each node that is given or that a pod names.
    pub nodes: BTreeMap<String, BTreeSet<IpAddr>>,
    /// The policies.
    pub policies: BTreeMap<PolicyId, Policy>,
    /// What policies name beside pods.
    pub catalog: Catalog,
    /// Pods that have no address yet: what is known of them when a node gives them one. [`Documents::left_out`] names them, too.
    pub awaited: BTreeMap<PodId, Pod>,
    /// Pods that take no part.
    pub left_out: BTreeMap<PodId, LeftOut>,
    /// Rules of policies that are closed, for they say what is not known here.
    pub closed: Vec<ClosedRule>,
    /// How many objects there are of each kind that is not read, such as `apps/v1 Deployment`.
    pub unused: BTreeMap<String, usize>,
    /// Where each object stands, by kind and name.
    places: BTreeMap<(&'static str, String), String>,
    holders: BTreeMap<IpAddr, Holder>,
}

/// Why a pod takes no part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LeftOut {
    /// Its phase is `Succeeded` or `Failed`.
    Finished,
    /// Its status has no address.
    NoAddress,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Finished => "it is finished",
            Self::NoAddress => "it has no address; set status.podIP",
        })
    }
}

/// A rule that is closed instead of read, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClosedRule {
    /// The name that the caller gave to the text.
    pub file: String,
    /// The line of the peer that is not known, from 1.
    pub line: Option<u64>,
    /// What is closed, and why.
    pub closed: Closed,
}

impl fmt::Display for ClosedRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", place(&self.file, self.line), self.closed)
    }
}

/// Why a text was refused, and where.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", place(file, *line))]
#[non_exhaustive]
pub struct DocumentError {
    /// The name that the caller gave to the text.
    pub file: String,
    /// The line of the field, from 1, or of what it is missing from; `None` where the text cannot be parsed, which its
    /// own error tells more about.
    pub line: Option<u64>,
    /// What is wrong.
    pub source: SourceError,
}

fn place(file: &str, line: Option<u64>) -> String {
    match line {
        Some(line) => format!("{file}:{line}"),
        None => file.to_owned(),
    }
}

impl Documents {
    /// Adds all objects of a YAML text; `file` is its name in errors.
    ///
    /// # Errors
    ///
    /// The first [`DocumentError`].
    #[cfg(feature = "yaml")]
    pub fn with_yaml(self, file: &str, text: &str) -> Result<Self, DocumentError> {
        let documents = text::yaml(text);
        self.with(file, text, documents)
    }

    /// Adds the object of a JSON text, which may be a `List`.
    ///
    /// # Errors
    ///
    /// The first [`DocumentError`].
    pub fn with_json(self, file: &str, text: &str) -> Result<Self, DocumentError> {
        let document = text::json(text);
        self.with(file, text, document.map(|document| vec![document]))
    }

    fn with(
        mut self,
        file: &str,
        text: &str,
        documents: Result<Vec<Value>, SourceError>,
    ) -> Result<Self, DocumentError> {
        let lines = Lines::new(text);
        let added = documents.and_then(|documents| {
            let mut objects = Objects::default();
            for (index, document) in documents.iter().enumerate().filter(|(_, document)| !document.is_null()) {
                read(&At::root(index, document), None, &mut objects)?;
            }
            for closed in objects.closed {
                let line = lines.line(closed.document, &closed.path);
                self.closed.push(ClosedRule { file: file.to_owned(), line, closed });
            }
            objects.read.into_iter().try_for_each(|(at, object)| self.add(file, &at, object))
        });
        match added {
            Ok(()) => Ok(self),
            Err(source) => Err(DocumentError { file: file.to_owned(), line: line(&lines, &source), source }),
        }
    }

    fn add(&mut self, file: &str, at: &At<'_>, object: Object) -> Result<(), SourceError> {
        let (kind, name) = match &object {
            Object::Namespace(name, _) => ("Namespace", name.clone()),
            Object::Pod(pod) => ("Pod", pod.id.to_string()),
            Object::Policy(policy) => ("policy", policy.id.to_string()),
            Object::Named(named) => (named.kind, named.name.clone()),
            Object::Node(node) => (nodes::KIND, node.name.clone()),
            Object::Unused(kind) => {
                *self.unused.entry(kind.clone()).or_default() += 1;
                return Ok(());
            }
        };
        let metadata = at.some_fields()?.field("metadata");
        let here = format!("{file}, document {}", at.document);
        if let Some(first) = self.places.get(&(kind, name.clone())) {
            return Err(metadata.invalid(format!("{kind} {name} is in {first}, too; remove or rename one")));
        }
        self.places.insert((kind, name), here);
        match object {
            Object::Namespace(name, labels) => drop(self.namespaces.insert(name, labels)),
            Object::Policy(policy) => drop(self.policies.insert(policy.id.clone(), policy)),
            Object::Pod(pod) => self.add_pod(at, *pod)?,
            Object::Named(named) => self.add_named(named),
            Object::Node(node) => self.add_node(at, *node)?,
            Object::Unused(_) => {}
        }
        Ok(())
    }

    /// A service may have many slices.
    fn add_named(&mut self, Named { mut adds, .. }: Named) {
        for (service, backends) in &mut adds.services {
            backends.extend(self.catalog.services.get(service).into_iter().flatten());
        }
        self.catalog.extend(adds);
    }

    fn add_node(&mut self, at: &At<'_>, read: ReadNode) -> Result<(), SourceError> {
        let ReadNode { name, labels, mut internal, external } = read;
        let status = at.some_fields()?.field("status");
        internal.retain(|address| !self.is_of_pod_on(*address, &name));
        for address in &internal {
            self.hold(&status, *address, Holder::Node { name: name.clone(), by_pod: false })?;
        }
        if !internal.is_empty() {
            self.nodes.entry(name.clone()).or_default().extend(internal);
        }
        if !external.is_empty() {
            self.catalog.external_addresses.insert(name.clone(), external);
        }
        self.catalog.node_labels.insert(name, labels);
        Ok(())
    }

    /// Whether a pod of the node has the address, which is then not the node's.
    fn is_of_pod_on(&self, address: IpAddr, node: &str) -> bool {
        let Some(Holder::Pod(id)) = self.holders.get(&address) else { return false };
        self.pods.get(id).is_some_and(|pod| pod.node.as_deref() == Some(node))
    }

    /// Takes an address from the node that only its own object gives it to, for a pod of that node.
    fn take_from_node(&mut self, address: IpAddr, node: &str) {
        let Some(Holder::Node { name, by_pod: false }) = self.holders.get(&address) else { return };
        if name != node {
            return;
        }
        self.holders.remove(&address);
        if let Some(addresses) = self.nodes.get_mut(node) {
            addresses.remove(&address);
            if addresses.is_empty() {
                self.nodes.remove(node);
            }
        }
    }

    fn add_pod(&mut self, at: &At<'_>, read: ReadPod) -> Result<(), SourceError> {
        let ReadPod { id, pod, node_addresses, finished } = read;
        let status = at.some_fields()?.field("status");
        if let Some(node) = &pod.node {
            for address in &node_addresses {
                self.hold(&status, *address, Holder::Node { name: node.clone(), by_pod: true })?;
            }
            if !node_addresses.is_empty() {
                self.nodes.entry(node.clone()).or_default().extend(&node_addresses);
            }
        }
        if finished {
            self.left_out.insert(id, LeftOut::Finished);
        } else if pod.addresses.is_empty() {
            self.awaited.insert(id.clone(), pod);
            self.left_out.insert(id, LeftOut::NoAddress);
        } else {
            if pod.network == PodNetwork::Own {
                for address in &pod.addresses {
                    if let Some(node) = &pod.node {
                        self.take_from_node(*address, node);
                    }
                    self.hold(&status, *address, Holder::Pod(id.clone()))?;
                }
            }
            self.pods.insert(id, pod);
        }
        Ok(())
    }

    /// Notes whose an address is. A node's may be said by many pods, also under several names of nodes: it is no pod's.
    fn hold(&mut self, at: &At<'_>, address: IpAddr, holder: Holder) -> Result<(), SourceError> {
        match (self.holders.get(&address), &holder) {
            (Some(other @ Holder::Pod(_)), _) | (Some(other @ Holder::Node { .. }), Holder::Pod(_)) => {
                Err(at
                    .invalid(format!("{address} is the address of {other}, too; correct one, or remove what is gone")))
            }
            (Some(Holder::Node { by_pod: true, .. }), Holder::Node { by_pod: false, .. }) => Ok(()),
            (Some(Holder::Node { .. }) | None, _) => {
                self.holders.insert(address, holder);
                Ok(())
            }
        }
    }

    /// Namespaces that pods or policies are in and that are not given: they have no label but their name.
    pub fn assumed_namespaces(&self) -> BTreeSet<&str> {
        let of_pods = self.pods.keys().map(|id| id.namespace.as_str());
        let all = of_pods.chain(self.policies.keys().map(|id| id.namespace.as_str()));
        // Policies of the cluster are in none.
        all.filter(|name| !name.is_empty() && !self.namespaces.contains_key(*name)).collect()
    }

    /// Policies that share tier and priority with others, outside the tier NetworkPolicy: which of them counts where both
    /// match is left open (`ClusterNetworkPolicySpec.priority`), and here goes by name.
    pub fn ties(&self) -> Vec<Vec<&PolicyId>> {
        let mut shared: BTreeMap<(&Tier, u16), Vec<&PolicyId>> = BTreeMap::new();
        for policy in self.policies.values().filter(|policy| policy.id.tier != Tier::NetworkPolicy) {
            shared.entry((&policy.id.tier, policy.priority)).or_default().push(&policy.id);
        }
        shared.into_values().filter(|policies| policies.len() > 1).collect()
    }

    /// Policies of tiers that are not given: the pods that they govern are closed.
    pub fn unknown_tiers(&self) -> impl Iterator<Item = &PolicyId> {
        self.policies.keys().filter(|id| self.catalog.tier(&id.tier).is_none())
    }

    /// What verdicts depend on.
    pub fn into_cluster(self) -> Cluster {
        let Self { pods, nodes, policies, catalog, .. } = self;
        let mut cluster = Cluster { pods, nodes, policies, catalog, ..Cluster::default() };
        for (name, labels) in self.namespaces {
            cluster.insert_namespace(name, labels.iter().map(|(key, value)| (key.as_str(), value.as_str())));
        }
        cluster
    }
}

#[derive(Debug, Clone)]
enum Holder {
    Pod(PodId),
    /// As its own object says, or a pod.
    Node {
        name: String,
        by_pod: bool,
    },
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(id) => write!(f, "pod {id}"),
            Self::Node { name, .. } => write!(f, "node {name}"),
        }
    }
}

#[derive(Default)]
struct Objects<'a> {
    read: Vec<(At<'a>, Object)>,
    closed: Vec<Closed>,
}

enum Object {
    Namespace(String, Labels),
    Pod(Box<ReadPod>),
    Policy(Policy),
    Named(Named),
    Node(Box<ReadNode>),
    Unused(String),
}

struct ReadPod {
    id: PodId,
    pod: Pod,
    node_addresses: BTreeSet<IpAddr>,
    finished: bool,
}

fn line(lines: &Lines<'_>, error: &SourceError) -> Option<u64> {
    match error {
        SourceError::Syntax { .. } => None,
        SourceError::Invalid { document, path, .. } => {
            // How `At::invalid` calls the path of a document.
            let path = if path == "the document" { "" } else { path };
            lines.line(*document, path)
        }
        SourceError::UnknownField { document, path, .. } | SourceError::ImplLimitExceeded { document, path, .. } => {
            lines.line(*document, path)
        }
    }
}

/// Version and kind of the items of a typed list, which come from the API server without their own.
type ItemKind<'a> = (&'a str, &'a str);

fn read<'a>(at: &At<'a>, item: Option<ItemKind<'a>>, objects: &mut Objects<'a>) -> Result<(), SourceError> {
    let fields = at.some_fields()?;
    let (version, kind) = (fields.field("apiVersion"), fields.field("kind"));
    let or_item = |at: &At<'a>, of: fn(ItemKind<'a>) -> &'a str| match (at.value, item) {
        (None, Some(item)) => Ok(of(item)),
        (None, None) => Err(at.invalid("is required; only Kubernetes objects may be here")),
        (Some(_), _) => at.text(),
    };
    let (version_text, kind_text) = (or_item(&version, |item| item.0)?, or_item(&kind, |item| item.1)?);
    let items = fields.field("items");
    if let (Some(of), Some(Value::Array(_))) = (kind_text.strip_suffix("List"), items.value) {
        let item = (!of.is_empty()).then_some((version_text, of));
        return items.elements()?.iter().try_for_each(|element| read(element, item, objects));
    }
    let kind_needed = if item.is_some() { KindNeeded::No } else { KindNeeded::Yes };
    let object = match (version_text, kind_text) {
        (CORE, "Namespace") => namespace(&fields)?,
        (CORE, nodes::KIND) => Object::Node(Box::new(nodes::read(&fields)?)),
        (CORE, services::SERVICE) | (services::API_VERSION, services::KIND) => {
            let read = if kind_text == services::KIND { services::read } else { services::read_service };
            match read(&fields)? {
                Some(named) => Object::Named(named),
                None => Object::Unused(format!("{version_text} {kind_text}")),
            }
        }
        (CORE, "Pod") => Object::Pod(Box::new(pod(&fields)?)),
        (networkpolicy::API_VERSION, networkpolicy::KIND) => {
            Object::Policy(networkpolicy::read_policy(at, kind_needed)?)
        }
        (native::API_VERSION, native::KIND) => Object::Policy(native::read_policy(at, kind_needed)?),
        (native::API_VERSION, named) if objects::KINDS.contains(&named) => {
            Object::Named(objects::read(at, named, kind_needed)?)
        }
        (version, _) if version.starts_with("dcenet.io/") => {
            let known = format!("{} {}, {}", native::API_VERSION, native::KIND, objects::KINDS.join(", "));
            return Err(kind.invalid(format!("{version} {kind_text} is not known; of this group are {known}")));
        }
        (version, policy) if policy.ends_with("NetworkPolicy") => {
            let Some(of_cluster) = clusternetworkpolicy::Kind::of(version, policy) else {
                return Err(kind.invalid(format!(
                    "{version} {policy} is not understood, and verdicts without it would be wrong: translate it to a kind \
                     and version that is, or remove it"
                )));
            };
            Object::Policy(clusternetworkpolicy::read_policy(at, of_cluster, kind_needed, &mut objects.closed)?)
        }
        _ => Object::Unused(format!("{version_text} {kind_text}")),
    };
    objects.read.push((at.clone(), object));
    Ok(())
}

fn namespace(fields: &Fields<'_>) -> Result<Object, SourceError> {
    let metadata = fields.field("metadata").some_fields()?;
    Ok(Object::Namespace(dns_name(&metadata.field("name"), 63)?.to_owned(), labels(&metadata)?))
}

pub(super) fn labels(metadata: &Fields<'_>) -> Result<Labels, SourceError> {
    let mut labels = Labels::new();
    for (key, value) in metadata.field("labels").text_map()? {
        labels.insert(key.to_owned(), value.text()?.to_owned());
    }
    Ok(labels)
}

fn pod(fields: &Fields<'_>) -> Result<ReadPod, SourceError> {
    let metadata = fields.field("metadata").some_fields()?;
    let namespace = metadata.field("namespace");
    let namespace = if namespace.value.is_none() { "default" } else { dns_name(&namespace, 63)? };
    let id = PodId::new(namespace, dns_name(&metadata.field("name"), 253)?);

    let spec = fields.field("spec").some_fields()?;
    let node = spec.field("nodeName");
    let node = if node.value.is_none() { None } else { Some(node.text()?.to_owned()) };
    let host_network = spec.field("hostNetwork");
    let network = match host_network.value {
        None | Some(Value::Bool(false)) => PodNetwork::Own,
        Some(Value::Bool(true)) => PodNetwork::Host,
        Some(_) => return Err(host_network.invalid("must be true or false")),
    };
    let mut ports = BTreeSet::new();
    for container in spec.field("containers").elements()? {
        named_ports(&container.some_fields()?, &mut ports)?;
    }
    for container in spec.field("initContainers").elements()? {
        let container = container.some_fields()?;
        // A sidecar runs as long as the pod (`ContainerRestartPolicyAlways` in k8s.io/api/core/v1).
        if container.field("restartPolicy").value.and_then(Value::as_str) == Some("Always") {
            named_ports(&container, &mut ports)?;
        }
    }

    let status = fields.field("status").some_fields()?;
    let mut addresses = addresses(&status, "podIP", "podIPs")?;
    let mut node_addresses = self::addresses(&status, "hostIP", "hostIPs")?;
    if network == PodNetwork::Host {
        if addresses.is_empty() {
            addresses.clone_from(&node_addresses);
        }
        node_addresses.extend(&addresses);
    } else {
        // Some platforms give a pod a machine of its own, and both one address: it is the pod's.
        node_addresses.retain(|address| !addresses.contains(address));
    }
    let phase = status.field("phase");
    let finished = phase.value.is_some() && ["Succeeded", "Failed"].contains(&phase.text()?);
    let account = spec.field("serviceAccountName");
    let account = if account.value.is_some_and(|name| name != "") { dns_name(&account, 253)? } else { "default" };
    let mut labels = labels(&metadata)?;
    labels.insert(SERVICE_ACCOUNT_LABEL.to_owned(), account.to_owned());
    let pod = Pod { labels, addresses, ports, node, network, on_segment: false };
    Ok(ReadPod { id, pod, node_addresses, finished })
}

fn named_ports(container: &Fields<'_>, ports: &mut BTreeSet<NamedPort>) -> Result<(), SourceError> {
    for port in container.field("ports").elements()? {
        let port = port.some_fields()?;
        let name = port.field("name");
        if name.value.is_none() {
            continue;
        }
        let protocol = port.field("protocol");
        let protocol = match protocol.value {
            None => Protocol::TCP,
            Some(_) => match one_of(&protocol, &["TCP", "UDP", "SCTP"])? {
                "UDP" => Protocol::UDP,
                "SCTP" => Protocol::SCTP,
                _ => Protocol::TCP,
            },
        };
        let number = port_number(&port.field("containerPort"))?;
        ports.insert(NamedPort { name: name.text()?.to_owned(), protocol, port: number });
    }
    Ok(())
}

/// The addresses of a status: a single one, and a list of objects with `ip`.
fn addresses(status: &Fields<'_>, single: &str, list: &str) -> Result<BTreeSet<IpAddr>, SourceError> {
    let mut found = BTreeSet::new();
    let single = status.field(single);
    // The API server writes "" for none.
    if single.value.is_some_and(|value| value != "") {
        found.insert(address(&single)?);
    }
    for element in status.field(list).elements()? {
        found.insert(address(&element.some_fields()?.field("ip"))?);
    }
    Ok(found)
}

pub(super) fn address(at: &At<'_>) -> Result<IpAddr, SourceError> {
    let parsed: Result<IpAddr, _> = at.text()?.parse();
    let usable = |address: &IpAddr| {
        let mapped = matches!(address, IpAddr::V6(address) if address.to_ipv4_mapped().is_some());
        let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
        !address.is_unspecified() && !address.is_loopback() && !address.is_multicast() && !broadcast && !mapped
    };
    let address = parsed.ok().filter(usable);
    address.ok_or_else(|| at.invalid("must be an address that a host can have, such as 10.0.0.1 or fd00::1"))
}

const CORE: &str = "v1";
