//! Policies of the whole cluster, `policy.networking.k8s.io`: ClusterNetworkPolicy, and the older AdminNetworkPolicy and
//! BaselineAdminNetworkPolicy.
//!
//! The meaning of every field is that of its comment in `apis/v1alpha2/clusternetworkpolicy_types.go`,
//! `apis/v1alpha1/{adminnetworkpolicy,baselineadminnetworkpolicy,shared}_types.go` of `sigs.k8s.io/network-policy-api`;
//! what is refused is what the API server refuses by the marks for validation there, and unknown fields besides.
//!
//! | | ClusterNetworkPolicy | AdminNetworkPolicy | BaselineAdminNetworkPolicy |
//! |---|---|---|---|
//! | version | `v1alpha2`, `v1beta1` | `v1alpha1` | `v1alpha1` |
//! | tier | `spec.tier`: Admin or Baseline | admin | baseline |
//! | `spec.priority` | 0 to 1000 | 0 to 1000 | none; one object, `default` |
//! | actions | Accept, Deny, Pass | Allow, Deny, Pass | Allow, Deny |
//! | services | `protocols`: `tcp`, `udp`, `sctp` with `destinationPort`, or `destinationNamedPort` | `ports`: `portNumber`, `portRange`, `namedPort` | the same |
//! | [`PolicyId`] | `admin:NAME`, `baseline:NAME` | `admin:anp/NAME` | `baseline:banp/default` |
//! | a range of ports | `start` below `end` | `start` not above `end` | the same |
//! | most rules, peers, services of a list | 25 | 100 | 100 |
//!
//! | Rule | Comes from |
//! |---|---|
//! | no rules for a direction, no effect on it | `ClusterNetworkPolicySpec.ingress`, `.egress` |
//! | no `protocols` or `ports`: every protocol | `ClusterNetworkPolicyIngressRule.protocols` |
//! | `networks` match addresses of pods, too, and ICMP | `ClusterNetworkPolicyEgressPeer.networks` |
//! | pods in their host's network are neither subject nor found by `namespaces` or `pods` | `ClusterNetworkPolicySubject`, `ClusterNetworkPolicyIngressPeer` |
//! | a name of a port is one of TCP, UDP and SCTP | `ClusterNetworkPolicyProtocol.destinationNamedPort` |
//! | policies of one priority in one tier go by name: which of them counts is left open | `ClusterNetworkPolicySpec.priority` |
//!
//! Objects of two kinds may have one name, so that a [`PolicyId`] of the older kinds begins with what `kubectl` calls the
//! kind for short; names of objects have no `/`. In the order by name these prefixes count.
//!
//! # What is closed
//!
//! A rule with a peer that has none of the fields which are known here fails closed, as the comment of
//! `ClusterNetworkPolicyIngressPeer` has it: one that accepts matches nothing, and one that denies or passes denies
//! everything. So do `domainNames` in a rule that does not accept: they are "only supported for Accept rules", and which
//! addresses a name has is not known before somebody asks for it. So does one of `domainNames` that is no
//! [`DomainName`](crate::model::DomainName): the pattern of the API's `DomainName` admits addresses and labels that begin with
//! `_`, too. [`Policies::closed`] names each.
//!
//! `domainNames` mean the addresses that have been learnt of them, as [`fqdns`](super::native#objects) do.
//!
//! Of `nodes` the labels must be known ([`Catalog::node_labels`](crate::model::Catalog::node_labels)): a node whose labels
//! are not is matched by rules that deny, and denied by those that pass; where none are known at all, everybody is.
//!
//! # What numbers of peers and ports mean
//!
//! In a [`RuleRef`](crate::model::RuleRef) each of a peer's `networks` and `domainNames` counts as a peer of its own, a name of a port as
//! three ports (TCP, UDP, SCTP), and a peer that is closed not at all; a rule that denies or passes and is closed has
//! neither peers nor ports. The number of a rule is its index in the object's list.
//!
//! ```
//! # #[cfg(feature = "yaml")] {
//! use dcenet_policy::sources::clusternetworkpolicy;
//!
//! let read = clusternetworkpolicy::from_yaml(
//!     r#"
//! apiVersion: policy.networking.k8s.io/v1alpha2
//! kind: ClusterNetworkPolicy
//! metadata: { name: no-metadata }
//! spec:
//!   tier: Admin
//!   priority: 10
//!   subject: { namespaces: {} }
//!   egress:
//!   - { action: Deny, to: [ { networks: [ 169.254.169.254/32 ] } ] }
//!   - { action: Accept, to: [ { domainNames: [ "*.example.org" ] } ] }
//!   - { action: Deny, to: [ { domainNames: [ example.org ] } ] }
//! "#,
//! )
//! .unwrap();
//! assert_eq!(read.policies[0].id.to_string(), "admin:no-metadata");
//! assert_eq!(
//!     read.closed[0].to_string(),
//!     "document 0: spec.egress[2].to[0]: domainNames are for rules that accept: a rule that denies or passes denies \
//!      everything then"
//! );
//! # }
//! ```

use std::collections::BTreeSet;

use serde_json::Value;

use super::fields::{At, Fields, join};
use super::native::pattern;
use super::networkpolicy::{
    KindNeeded, MAX_COMBINATIONS, METADATA, dns_name, one_of, port_number, prefix, selector, within,
};
use super::{SourceError, text};
use crate::model::{
    Action, IpBlock, LabelSelector, Mode, NamespaceMatch, Peer, Peers, PodMatch, Policy, PolicyId, PortMatch, PortSpec,
    Ports, Protocol, Rule, Tier,
};

/// What was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policies {
    /// The policies.
    pub policies: Vec<Policy>,
    /// Rules of theirs that are closed instead of read.
    pub closed: Vec<Closed>,
}

/// A rule that is closed because a peer of it is not known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("document {document}: {path}: {reason}")]
pub struct Closed {
    /// Index of the document in the text, from 0, empty ones not counted.
    pub document: usize,
    /// The peer.
    pub path: String,
    /// What is not known, and what the rule does therefore.
    pub reason: String,
}

/// Reads all policies of a YAML text. It may hold several documents, and `List` objects or typed lists.
///
/// # Errors
///
/// The first [`SourceError`]; nothing is read in part. Two policies of one name in a tier are an error. Limits are those
/// of [`networkpolicy`](super::networkpolicy::from_yaml).
#[cfg(feature = "yaml")]
pub fn from_yaml(text: &str) -> Result<Policies, SourceError> {
    from_documents(&text::yaml(text)?)
}

/// Reads all policies of a JSON text: one object, which may be a list.
///
/// # Errors
///
/// As [`from_yaml`].
pub fn from_json(text: &str) -> Result<Policies, SourceError> {
    from_documents(&[text::json(text)?])
}

/// Reads policies from documents that are parsed already, such as objects of a Kubernetes watch.
///
/// # Errors
///
/// As [`from_yaml`].
pub fn from_documents(documents: &[Value]) -> Result<Policies, SourceError> {
    let mut read = Policies::default();
    let mut seen = BTreeSet::new();
    for (index, document) in documents.iter().enumerate().filter(|(_, document)| !document.is_null()) {
        read_object(&At::root(index, document), None, &mut seen, &mut read)?;
    }
    Ok(read)
}

fn read_object(
    at: &At<'_>,
    item: Option<Kind>,
    seen: &mut BTreeSet<PolicyId>,
    read: &mut Policies,
) -> Result<(), SourceError> {
    let fields = at.some_fields()?;
    let (version, kind) = (fields.field("apiVersion"), fields.field("kind"));
    if item.is_none() {
        let of = kind.text()?.strip_suffix("List");
        let typed = of.and_then(|of| Kind::of(version.text().ok()?, of));
        if of == Some("") || typed.is_some() {
            let fields = at.fields(&["apiVersion", "kind", "metadata", "items"])?;
            return fields.field("items").elements()?.iter().try_for_each(|item| read_object(item, typed, seen, read));
        }
    }
    let (kind, kind_needed) = match item {
        Some(kind) => (kind, KindNeeded::No),
        None => {
            one_of(&kind, &Kind::ALL.map(Kind::name))?;
            let found = Kind::of(version.text()?, kind.text()?);
            (found.ok_or_else(|| version.invalid("is no version of this kind that is known here"))?, KindNeeded::Yes)
        }
    };
    let policy = read_policy(at, kind, kind_needed, &mut read.closed)?;
    if !seen.insert(policy.id.clone()) {
        let twice = format!("{} is there twice; remove or rename one", policy.id);
        return Err(fields.field("metadata").invalid(twice));
    }
    read.policies.push(policy);
    Ok(())
}

/// A kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Cluster,
    Admin,
    Baseline,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Cluster, Self::Admin, Self::Baseline];

    pub(super) fn of(version: &str, kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == kind && known.versions().contains(&version))
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Cluster => "ClusterNetworkPolicy",
            Self::Admin => "AdminNetworkPolicy",
            Self::Baseline => "BaselineAdminNetworkPolicy",
        }
    }

    /// What comes before the name of an object in a [`PolicyId`].
    const fn prefix(self) -> &'static str {
        match self {
            Self::Cluster => "",
            Self::Admin => "anp/",
            Self::Baseline => "banp/",
        }
    }

    const fn versions(self) -> &'static [&'static str] {
        match self {
            Self::Cluster => &["policy.networking.k8s.io/v1alpha2", "policy.networking.k8s.io/v1beta1"],
            Self::Admin | Self::Baseline => &["policy.networking.k8s.io/v1alpha1"],
        }
    }

    /// How many rules, peers and services a list may have.
    const fn longest_list(self) -> usize {
        match self {
            Self::Cluster => 25,
            Self::Admin | Self::Baseline => 100,
        }
    }

    const fn actions(self) -> &'static [&'static str] {
        match self {
            Self::Cluster => &["Accept", "Deny", "Pass"],
            Self::Admin => &["Allow", "Deny", "Pass"],
            Self::Baseline => &["Allow", "Deny"],
        }
    }

    const fn services(self) -> &'static str {
        match self {
            Self::Cluster => "protocols",
            Self::Admin | Self::Baseline => "ports",
        }
    }
}

pub(super) fn read_policy(
    at: &At<'_>,
    kind: Kind,
    kind_needed: KindNeeded,
    closed: &mut Vec<Closed>,
) -> Result<Policy, SourceError> {
    let object = at.fields(&["apiVersion", "kind", "metadata", "spec", "status"])?;
    for (field, wanted) in [("kind", &[kind.name()][..]), ("apiVersion", kind.versions())] {
        let field = object.field(field);
        if kind_needed == KindNeeded::Yes || field.value.is_some() {
            one_of(&field, wanted)?;
        }
    }
    let metadata = object.field("metadata").fields(METADATA)?;
    let namespace = metadata.field("namespace");
    if namespace.value.is_some() {
        return Err(namespace.invalid("such a policy is the cluster's; remove the namespace"));
    }
    let name = metadata.field("name");
    let text = dns_name(&name, 253)?;
    if kind == Kind::Baseline && text != "default" {
        return Err(name.invalid("must be default, for there is one of this kind at most"));
    }

    let known: &[&str] = match kind {
        Kind::Cluster => &["tier", "priority", "subject", "ingress", "egress"],
        Kind::Admin => &["priority", "subject", "ingress", "egress"],
        Kind::Baseline => &["subject", "ingress", "egress"],
    };
    let spec = object.field("spec").fields(known)?;
    let tier = match kind {
        Kind::Cluster => match one_of(&spec.field("tier"), &["Admin", "Baseline"])? {
            "Admin" => Tier::Admin,
            _ => Tier::Baseline,
        },
        Kind::Admin => Tier::Admin,
        Kind::Baseline => Tier::Baseline,
    };
    let priority = match kind {
        Kind::Baseline => 0,
        Kind::Cluster | Kind::Admin => priority(&spec.field("priority"))?,
    };
    let subject = spec.field("subject");
    let fields = subject.fields(&["namespaces", "pods"])?;
    let subject = match exactly_one(&subject, &fields, &["namespaces", "pods"])? {
        "pods" => namespaced_pods(&fields.field("pods"), kind)?,
        _ => namespaces(&fields.field("namespaces"))?,
    };
    let mut rules = |field, peers| rules(&spec.field(field), peers, kind, closed);
    let (ingress, egress) = (rules("ingress", "from")?, rules("egress", "to")?);
    // A policy without rules for a direction has nothing to say about it.
    let any = |rules: Vec<Rule>| Some(rules).filter(|rules| !rules.is_empty());
    let id = PolicyId::cluster(tier, kind.prefix().to_owned() + text);
    Ok(Policy { id, priority, mode: Mode::Enforce, subject, ingress: any(ingress), egress: any(egress) })
}

fn priority(at: &At<'_>) -> Result<u16, SourceError> {
    let number = at.value.and_then(Value::as_u64).and_then(|number| u16::try_from(number).ok());
    number.filter(|number| *number <= MAX_PRIORITY).ok_or_else(|| at.invalid("must be a number from 0 to 1000"))
}

/// The one field that is set.
fn exactly_one(at: &At<'_>, fields: &Fields<'_>, known: &[&'static str]) -> Result<&'static str, SourceError> {
    let set: Vec<&'static str> = known.iter().copied().filter(|name| fields.field(name).value.is_some()).collect();
    match set[..] {
        [one] => Ok(one),
        _ => Err(at.invalid(format!("must have exactly one of {}", known.join(", ")))),
    }
}

fn namespaces(at: &At<'_>) -> Result<PodMatch, SourceError> {
    Ok(PodMatch { namespaces: NamespaceMatch::Selected(selector(at)?), pods: LabelSelector::default() })
}

fn namespaced_pods(at: &At<'_>, kind: Kind) -> Result<PodMatch, SourceError> {
    let fields = at.fields(&["namespaceSelector", "podSelector"])?;
    let (namespaces, pods) = (fields.field("namespaceSelector"), fields.field("podSelector"));
    let namespaces_needed = kind != Kind::Cluster;
    for (field, needed) in [(&namespaces, namespaces_needed), (&pods, true)] {
        if needed && field.value.is_none() {
            return Err(field.invalid("is required; {} selects all"));
        }
    }
    Ok(PodMatch { namespaces: NamespaceMatch::Selected(selector(&namespaces)?), pods: selector(&pods)? })
}

/// The elements of a list that may not be too long.
fn elements<'a>(at: &At<'a>, longest: usize) -> Result<Vec<At<'a>>, SourceError> {
    let elements = at.elements()?;
    if elements.len() > longest {
        return Err(at.invalid(format!("has {} elements, and may have {longest} at most", elements.len())));
    }
    Ok(elements)
}

fn rules(
    at: &At<'_>,
    peers_field: &'static str,
    kind: Kind,
    closed: &mut Vec<Closed>,
) -> Result<Vec<Rule>, SourceError> {
    let known: &[&str] = match (kind, peers_field) {
        (Kind::Cluster, "from") => &["name", "action", "from", "protocols"],
        (Kind::Cluster, _) => &["name", "action", "to", "protocols"],
        (_, "from") => &["name", "action", "from", "ports"],
        _ => &["name", "action", "to", "ports"],
    };
    let mut rules = Vec::new();
    for rule in elements(at, kind.longest_list())? {
        let fields = rule.fields(known)?;
        let name = fields.field("name");
        if name.value.is_some() && name.text()?.chars().count() > MAX_NAME {
            return Err(name.invalid("must have 100 characters at most"));
        }
        let action = match one_of(&fields.field("action"), kind.actions())? {
            "Deny" => Action::Deny,
            "Pass" => Action::Pass,
            _ => Action::Allow,
        };
        let list = fields.field(peers_field);
        let items = elements(&list, kind.longest_list())?;
        if items.is_empty() {
            return Err(list.invalid("must have at least one peer"));
        }
        let (mut peers, mut unknown) = (Vec::new(), Vec::new());
        for item in &items {
            match peer(item, peers_field, kind, action)? {
                Known::Yes(found) => peers.extend(found),
                Known::No(reason) => unknown.push((item, reason)),
            }
        }
        let list = fields.field(kind.services());
        let items = elements(&list, kind.longest_list())?;
        if list.value.is_some() && items.is_empty() {
            return Err(list.invalid("must have at least one element; leave it out for every protocol"));
        }
        let mut ports = Vec::new();
        for item in &items {
            match kind {
                Kind::Cluster => protocol(item, &mut ports)?,
                Kind::Admin | Kind::Baseline => port(item, &mut ports)?,
            }
        }
        let named = ports.iter().any(|port| matches!(port.port, PortSpec::Named(_)));
        if named && peers_field == "to" && (!unknown.is_empty() || peers.iter().any(|p| !matches!(p, Peer::Pods(_)))) {
            return Err(list.invalid("names of ports need peers that are pods; make two rules of it"));
        }
        let combinations = peers.len().saturating_mul(ports.len().max(1));
        within(&rule.path, rule.document, "combinations of peer and port", combinations, MAX_COMBINATIONS)?;
        let ports = if ports.is_empty() { Ports::Any } else { Ports::OneOf(ports) };
        let does = match action {
            Action::Allow => "a rule that allows matches nothing then",
            Action::Deny | Action::Reject | Action::Pass => "a rule that denies or passes denies everything then",
        };
        for (item, reason) in &unknown {
            let (document, path) = (item.document, item.path.clone());
            closed.push(Closed { document, path, reason: format!("{reason}: {does}") });
        }
        rules.push(match (unknown.is_empty(), action) {
            (true, _) => Rule { action, peers: Peers::OneOf(peers), ports, schedule: None, log: false },
            (false, Action::Allow) => {
                Rule { action, peers: Peers::OneOf(Vec::new()), ports, schedule: None, log: false }
            }
            (false, _) => {
                Rule { action: Action::Deny, peers: Peers::Any, ports: Ports::Any, schedule: None, log: false }
            }
        });
    }
    Ok(rules)
}

enum Known {
    Yes(Vec<Peer>),
    No(String),
}

fn peer(at: &At<'_>, peers_field: &str, kind: Kind, action: Action) -> Result<Known, SourceError> {
    let fields = at.some_fields()?;
    let set: Vec<&str> = fields.set().collect();
    let name = match set[..] {
        [] => return Ok(Known::No("no field that is known is set".to_owned())),
        [name] => name,
        _ => return Err(at.invalid("must have exactly one field; make several peers of it")),
    };
    let value = fields.field(name);
    Ok(Known::Yes(match (name, peers_field) {
        ("namespaces", _) => vec![Peer::Pods(namespaces(&value)?)],
        ("pods", _) => vec![Peer::Pods(namespaced_pods(&value, kind)?)],
        ("networks", "to") => {
            let items = elements(&value, MAX_NETWORKS)?;
            if items.is_empty() {
                return Err(value.invalid("must have at least one prefix"));
            }
            let block = |item: &At<'_>| Ok(Peer::Block(IpBlock { cidr: prefix(item)?, except: Vec::new() }));
            items.iter().map(block).collect::<Result<_, SourceError>>()?
        }
        ("nodes", "to") => vec![Peer::Nodes(selector(&value)?)],
        ("domainNames", "to") if action != Action::Allow => {
            return Ok(Known::No(format!("{name} are for rules that accept")));
        }
        ("domainNames", "to") => {
            let items = elements(&value, MAX_NETWORKS)?;
            if items.is_empty() {
                return Err(value.invalid("must have at least one name"));
            }
            let mut names = Vec::new();
            for (index, item) in items.iter().enumerate() {
                let text = item.text()?;
                // The API server admits more than names.
                let Ok(name) = pattern(item) else {
                    return Ok(Known::No(format!("{name}[{index}]: {text:?} is no full domain name")));
                };
                names.push(Peer::Name(name));
            }
            names
        }
        _ => return Ok(Known::No(format!("{} is not known", join(&at.path, name)))),
    }))
}

/// An element of `protocols`.
fn protocol(at: &At<'_>, ports: &mut Vec<PortMatch>) -> Result<(), SourceError> {
    const KNOWN: &[&str] = &["tcp", "udp", "sctp", "destinationNamedPort"];
    let fields = at.fields(KNOWN)?;
    let one = exactly_one(at, &fields, KNOWN)?;
    let value = fields.field(one);
    let protocol = match one {
        "tcp" => Protocol::TCP,
        "udp" => Protocol::UDP,
        "sctp" => Protocol::SCTP,
        _ => return named(&value, ports),
    };
    let port = value.fields(&["destinationPort"])?.field("destinationPort");
    if port.value.is_none() {
        return Err(port.invalid("is required"));
    }
    let fields = port.fields(&["number", "range"])?;
    let (first, last) = match exactly_one(&port, &fields, &["number", "range"])? {
        "number" => {
            let number = port_number(&fields.field("number"))?;
            (number, number)
        }
        _ => {
            let range = fields.field("range");
            interval(&range, &range.fields(&["start", "end"])?, "start must be below end", |first, last| first < last)?
        }
    };
    ports.push(PortMatch { protocol, port: PortSpec::Range { first, last } });
    Ok(())
}

/// An element of `ports`.
fn port(at: &At<'_>, ports: &mut Vec<PortMatch>) -> Result<(), SourceError> {
    const KNOWN: &[&str] = &["portNumber", "namedPort", "portRange"];
    let fields = at.fields(KNOWN)?;
    let one = exactly_one(at, &fields, KNOWN)?;
    let value = fields.field(one);
    let (fields, (first, last)) = match one {
        "namedPort" => return named(&value, ports),
        "portNumber" => {
            let fields = value.fields(&["protocol", "port"])?;
            let number = port_number(&fields.field("port"))?;
            (fields, (number, number))
        }
        _ => {
            let fields = value.fields(&["protocol", "start", "end"])?;
            // The older kinds have no mark for validation on it, so that the API server takes a range of one port.
            let ends = interval(&value, &fields, "start must not be above end", |first, last| first <= last)?;
            (fields, ends)
        }
    };
    let protocol = fields.field("protocol");
    let protocol = match protocol.value {
        None => Protocol::TCP,
        Some(_) => match one_of(&protocol, &["TCP", "UDP", "SCTP"])? {
            "UDP" => Protocol::UDP,
            "SCTP" => Protocol::SCTP,
            _ => Protocol::TCP,
        },
    };
    ports.push(PortMatch { protocol, port: PortSpec::Range { first, last } });
    Ok(())
}

fn interval(
    at: &At<'_>,
    fields: &Fields<'_>,
    rule: &str,
    holds: fn(u16, u16) -> bool,
) -> Result<(u16, u16), SourceError> {
    let (first, last) = (port_number(&fields.field("start"))?, port_number(&fields.field("end"))?);
    if holds(first, last) { Ok((first, last)) } else { Err(at.invalid(rule)) }
}

fn named(at: &At<'_>, ports: &mut Vec<PortMatch>) -> Result<(), SourceError> {
    let name = at.text()?;
    if name.is_empty() {
        return Err(at.invalid("must be the name of a port"));
    }
    let of = |protocol| PortMatch { protocol, port: PortSpec::Named(name.to_owned()) };
    ports.extend([Protocol::TCP, Protocol::UDP, Protocol::SCTP].map(of));
    Ok(())
}

const MAX_PRIORITY: u16 = 1000;
const MAX_NAME: usize = 100;
const MAX_NETWORKS: usize = 25;
