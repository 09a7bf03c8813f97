//! Kubernetes NetworkPolicy, `networking.k8s.io/v1`.
//!
//! The meaning of every field is that of its comment in `k8s.io/api/networking/v1/types.go`; what is refused is what
//! the API server refuses (`pkg/apis/networking/validation/validation.go`), and unknown fields besides.
//!
//! | Rule | Comes from |
//! |---|---|
//! | an empty or missing `spec.podSelector` selects all pods of the policy's namespace | `NetworkPolicySpec.podSelector` |
//! | policies on the same pod add up: any matching rule allows | `NetworkPolicySpec.podSelector`, `.ingress` |
//! | a direction is isolated as soon as one policy of that type selects the pod; no rules, no traffic | `.ingress`, `.egress` |
//! | without `policyTypes`: always Ingress, and Egress if there are egress rules | `NetworkPolicySpec.policyTypes` |
//! | `from`/`to` and `ports` must both match; the items of each are ORed | `NetworkPolicyIngressRule`, `NetworkPolicyEgressRule` |
//! | empty or missing `from`/`to`: everybody; empty or missing `ports`: everything, also protocols without ports | `.from`, `.to`, `.ports` |
//! | `podSelector` alone: pods of the policy's namespace; `namespaceSelector` alone: all pods there; both: both | `NetworkPolicyPeer` |
//! | `ipBlock` stands alone; each `except` is a strict subset of `cidr` | `NetworkPolicyPeer.ipBlock`, `IPBlock.except`, validation |
//! | `protocol` defaults to TCP; `port` missing: all ports of that protocol | `NetworkPolicyPort` |
//! | `endPort` only with a numeric `port`, and not below it | `NetworkPolicyPort.endPort` |
//! | rules of a direction that `policyTypes` leaves out have no effect | `NetworkPolicySpec.policyTypes` |
//!
//! `ipBlock` matches any address, those of pods too: the API leaves it open, the project's end-to-end tests expect
//! it. A CIDR with host bits set stands for its network, as the API server reads it.
//!
//! The address of a Service is no pod's. Where kube-proxy or nftables translates it behind the programs that judge, what a pod sends
//! there is judged by that address: a rule for the pods that answer does not let it pass, and an `ipBlock` with the Services'
//! range does, as does a native rule that names the service.
//!
//! ```
//! # #[cfg(feature = "yaml")] {
//! use dcenet_policy::sources::networkpolicy;
//!
//! let error = networkpolicy::from_yaml(
//!     r#"
//! apiVersion: networking.k8s.io/v1
//! kind: NetworkPolicy
//! metadata: { name: web, namespace: shop }
//! spec:
//!   podSelector: {}
//!   ingress: [ { ports: [ { port: 80, endport: 90 } ] } ]
//! "#,
//! )
//! .unwrap_err();
//! assert_eq!(
//!     error.to_string(),
//!     "document 0: spec.ingress[0].ports[0].endport: unknown field; did you mean \"endPort\"?"
//! );
//! # }
//! ```

use std::collections::BTreeSet;

use ipnet::IpNet;
use serde_json::Value;

use super::fields::At;
use super::{SourceError, text};
use crate::model::{
    Action, IpBlock, LabelSelector, Mode, NamespaceMatch, Operator, Peer, Peers, PodMatch, Policy, PolicyId, PortMatch,
    PortSpec, Ports, Protocol, Requirement, Rule,
};

/// The longest text that is read, in bytes.
pub const MAX_TEXT: usize = 64 << 20;

/// The most documents in one YAML text.
pub const MAX_DOCUMENTS: usize = 100_000;

/// The most YAML nodes (scalars, lists, maps) in one text, aliases expanded.
pub const MAX_NODES: usize = 10_000_000;

/// The most combinations of peer and port in one rule.
pub const MAX_COMBINATIONS: usize = 65_536;

/// Reads all policies of a YAML text. It may hold several documents, and `List` or `NetworkPolicyList` objects.
///
/// # Errors
///
/// The first [`SourceError`]; nothing is read in part. Two policies of one name are an error. More documents or
/// nodes than the constants of this module allow, or nesting deeper than 64, make a [`SourceError::Syntax`] that says
/// which budget was breached.
#[cfg(feature = "yaml")]
pub fn from_yaml(text: &str) -> Result<Vec<Policy>, SourceError> {
    from_documents(&text::yaml(text)?)
}

/// Reads all policies of a JSON text: one object, which may be a `List` or `NetworkPolicyList`.
///
/// # Errors
///
/// As [`from_yaml`].
pub fn from_json(text: &str) -> Result<Vec<Policy>, SourceError> {
    from_documents(&[text::json(text)?])
}

/// Reads policies from documents that are parsed already, such as objects of a Kubernetes watch.
///
/// # Errors
///
/// As [`from_yaml`].
pub fn from_documents(documents: &[Value]) -> Result<Vec<Policy>, SourceError> {
    let mut policies = Vec::new();
    for (index, document) in documents.iter().enumerate() {
        if !document.is_null() {
            read_object(&At::root(index, document), KindNeeded::Yes, &mut policies)?;
        }
    }
    let mut seen = BTreeSet::new();
    for (at, policy) in &policies {
        if !seen.insert(&policy.id) {
            return Err(at.invalid(format!("{} is there twice; remove or rename one", policy.id)));
        }
    }
    Ok(policies.into_iter().map(|(_, policy)| policy).collect())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KindNeeded {
    Yes,
    /// Items of a typed list come from the API server without kind and version.
    No,
}

fn read_object<'a>(
    at: &At<'a>,
    kind_needed: KindNeeded,
    policies: &mut Vec<(At<'a>, Policy)>,
) -> Result<(), SourceError> {
    let kind = at.value.and_then(|value| value.get("kind")).and_then(Value::as_str);
    match (kind, kind_needed) {
        (Some("List" | "NetworkPolicyList"), KindNeeded::Yes) => {
            let fields = at.fields(&["apiVersion", "kind", "metadata", "items"])?;
            let (version, item_kind) = match kind {
                Some("List") => ("v1", KindNeeded::Yes),
                _ => (API_VERSION, KindNeeded::No),
            };
            one_of(&fields.field("apiVersion"), &[version])?;
            for item in fields.field("items").elements()? {
                read_object(&item, item_kind, policies)?;
            }
            Ok(())
        }
        _ => {
            let policy = read_policy(at, kind_needed)?;
            policies.push((at.fields(OBJECT)?.field("metadata"), policy));
            Ok(())
        }
    }
}

pub(super) fn read_policy(at: &At<'_>, kind_needed: KindNeeded) -> Result<Policy, SourceError> {
    // The kind goes first: of another kind's object every field would be unknown.
    if let Some(Value::Object(map)) = at.value {
        for (name, wanted) in [("kind", KIND), ("apiVersion", API_VERSION)] {
            if kind_needed == KindNeeded::Yes || map.contains_key(name) {
                let path = if at.path.is_empty() { name.to_owned() } else { format!("{}.{name}", at.path) };
                one_of(&At { document: at.document, path, value: map.get(name) }, &[wanted])?;
            }
        }
    }
    let object = at.fields(OBJECT)?;
    let metadata = object.field("metadata").fields(METADATA)?;
    let name = metadata.field("name");
    let namespace = metadata.field("namespace");
    let namespace_name = match namespace.value {
        None => "default",
        Some(_) => dns_name(&namespace, 63)?,
    };
    let id = PolicyId::new(namespace_name, dns_name(&name, 253)?);

    let spec = object.field("spec").fields(&["podSelector", "ingress", "egress", "policyTypes"])?;
    let pods = selector(&spec.field("podSelector"))?;
    let ingress = rules(&spec.field("ingress"), "from", namespace_name)?;
    let egress = rules(&spec.field("egress"), "to", namespace_name)?;

    let mut types = BTreeSet::new();
    for kind in spec.field("policyTypes").elements()? {
        types.insert(one_of(&kind, &["Ingress", "Egress"])?);
    }
    if types.is_empty() {
        types.insert("Ingress");
        if !egress.is_empty() {
            types.insert("Egress");
        }
    }
    Ok(Policy {
        id,
        priority: 0,
        mode: Mode::Enforce,
        subject: PodMatch { namespaces: NamespaceMatch::Named(namespace_name.to_owned()), pods },
        ingress: types.contains("Ingress").then_some(ingress),
        egress: types.contains("Egress").then_some(egress),
    })
}

fn rules(at: &At<'_>, peers_field: &'static str, namespace: &str) -> Result<Vec<Rule>, SourceError> {
    let known: &[&str] = if peers_field == "from" { &["ports", "from"] } else { &["ports", "to"] };
    let mut rules = Vec::new();
    for rule in at.elements()? {
        let fields = rule.fields(known)?;
        let mut peers = Vec::new();
        for item in fields.field(peers_field).elements()? {
            peers.push(peer(&item, namespace)?);
        }
        let mut ports = Vec::new();
        for item in fields.field("ports").elements()? {
            ports.push(port(&item)?);
        }
        let combinations = peers.len().max(1).saturating_mul(ports.len().max(1));
        within(&rule.path, rule.document, "combinations of peer and port", combinations, MAX_COMBINATIONS)?;
        rules.push(Rule {
            action: Action::Allow,
            peers: if peers.is_empty() { Peers::Any } else { Peers::OneOf(peers) },
            ports: if ports.is_empty() { Ports::Any } else { Ports::OneOf(ports) },
            schedule: None,
            log: false,
        });
    }
    Ok(rules)
}

fn peer(at: &At<'_>, namespace: &str) -> Result<Peer, SourceError> {
    let fields = at.fields(&["podSelector", "namespaceSelector", "ipBlock"])?;
    let (pods, namespaces, block) =
        (fields.field("podSelector"), fields.field("namespaceSelector"), fields.field("ipBlock"));
    if block.value.is_some() {
        if pods.value.is_some() || namespaces.value.is_some() {
            return Err(at.invalid("ipBlock excludes the selectors; make two items of it"));
        }
        return ip_block(&block).map(Peer::Block);
    }
    if pods.value.is_none() && namespaces.value.is_none() {
        return Err(at.invalid("must have podSelector, namespaceSelector or ipBlock; leave the list out for everybody"));
    }
    let namespaces = match namespaces.value {
        Some(_) => NamespaceMatch::Selected(selector(&namespaces)?),
        None => NamespaceMatch::Named(namespace.to_owned()),
    };
    Ok(Peer::Pods(PodMatch { namespaces, pods: selector(&pods)? }))
}

fn ip_block(at: &At<'_>) -> Result<IpBlock, SourceError> {
    let fields = at.fields(&["cidr", "except"])?;
    let cidr = prefix(&fields.field("cidr"))?;
    let mut except = Vec::new();
    for item in fields.field("except").elements()? {
        let hole = prefix(&item)?;
        if !cidr.contains(&hole) || cidr == hole {
            return Err(item.invalid(format!("must be a strict subset of cidr {cidr}")));
        }
        except.push(hole);
    }
    Ok(IpBlock { cidr, except })
}

pub(super) fn prefix(at: &At<'_>) -> Result<IpNet, SourceError> {
    let parsed: Result<IpNet, _> = at.text()?.parse();
    parsed
        .map(|prefix| prefix.trunc())
        .map_err(|_| at.invalid("must be a prefix such as 192.168.1.0/24 or 2001:db8::/64"))
}

fn port(at: &At<'_>) -> Result<PortMatch, SourceError> {
    let fields = at.fields(&["protocol", "port", "endPort"])?;
    let protocol = fields.field("protocol");
    let protocol = match protocol.value {
        None => Protocol::TCP,
        Some(_) => match one_of(&protocol, &["TCP", "UDP", "SCTP"])? {
            "UDP" => Protocol::UDP,
            "SCTP" => Protocol::SCTP,
            _ => Protocol::TCP,
        },
    };
    let (first, last) = (fields.field("port"), fields.field("endPort"));
    let needs_number = |_| Err(last.invalid("needs a numeric port beside it; remove endPort or set port"));
    let spec = match first.value {
        None => last.value.map_or(Ok(PortSpec::Any), needs_number)?,
        Some(Value::String(name)) => {
            if !is_port_name(name) {
                return Err(first.invalid(
                    "must be a number, unquoted, or a port name: at most 15 of a-z, 0-9 and -, with a letter, \
                     no - at either end nor two in a row",
                ));
            }
            last.value.map_or(Ok(PortSpec::Named(name.clone())), needs_number)?
        }
        Some(_) => {
            let first = port_number(&first)?;
            let end = if last.value.is_some() { port_number(&last)? } else { first };
            if end < first {
                return Err(last.invalid(format!("must not be below port {first}")));
            }
            PortSpec::Range { first, last: end }
        }
    };
    Ok(PortMatch { protocol, port: spec })
}

pub(super) fn port_number(at: &At<'_>) -> Result<u16, SourceError> {
    let number = at.value.and_then(Value::as_u64).and_then(|number| u16::try_from(number).ok());
    number.filter(|number| *number > 0).ok_or_else(|| at.invalid("must be a number from 1 to 65535"))
}

pub(super) fn selector(at: &At<'_>) -> Result<LabelSelector, SourceError> {
    let fields = at.fields(&["matchLabels", "matchExpressions"])?;
    let mut requirements = Vec::new();
    for (key, value) in fields.field("matchLabels").text_map()? {
        if !is_label_key(key) {
            return Err(value.invalid(LABEL_KEY));
        }
        requirements
            .push(Requirement { key: key.to_owned(), operator: Operator::In(BTreeSet::from([label_value(&value)?])) });
    }
    for expression in fields.field("matchExpressions").elements()? {
        let parts = expression.fields(&["key", "operator", "values"])?;
        let key = parts.field("key");
        if !is_label_key(key.text()?) {
            return Err(key.invalid(LABEL_KEY));
        }
        let list = parts.field("values");
        let mut values = BTreeSet::new();
        for value in list.elements()? {
            values.insert(label_value(&value)?);
        }
        let operator = parts.field("operator");
        let name = one_of(&operator, &["In", "NotIn", "Exists", "DoesNotExist"])?;
        let operator = match (name, values.is_empty()) {
            ("In", false) => Operator::In(values),
            ("NotIn", false) => Operator::NotIn(values),
            ("Exists", true) => Operator::Exists,
            ("DoesNotExist", true) => Operator::DoesNotExist,
            (_, true) => return Err(list.invalid(format!("{name} needs at least one value"))),
            (_, false) => return Err(list.invalid(format!("{name} takes no values; remove them"))),
        };
        requirements.push(Requirement { key: key.text()?.to_owned(), operator });
    }
    Ok(LabelSelector { requirements })
}

fn label_value(at: &At<'_>) -> Result<String, SourceError> {
    let text = at.text()?;
    if text.is_empty() || is_qualified(text) {
        Ok(text.to_owned())
    } else {
        Err(at.invalid("must be a label value: at most 63 of A-Z, a-z, 0-9, -, _ and ., alphanumeric at both ends"))
    }
}

pub(super) fn dns_name<'a>(at: &At<'a>, longest: usize) -> Result<&'a str, SourceError> {
    let text = at.text()?;
    let dots = longest > 63;
    let part_ok = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    if text.len() <= longest && text.split('.').all(part_ok) && (dots || !text.contains('.')) {
        Ok(text)
    } else {
        let dot = if dots { ", and . between such names" } else { "" };
        Err(at.invalid(format!("must be at most {longest} of a-z, 0-9 and -, no - at either end{dot}")))
    }
}

pub(super) fn one_of<'a>(at: &At<'a>, accepted: &[&str]) -> Result<&'a str, SourceError> {
    let text = at.text()?;
    if accepted.contains(&text) { Ok(text) } else { Err(at.invalid(format!("must be {}", accepted.join(" or ")))) }
}

/// IANA service name (RFC 6335, section 5.1), in lower case.
pub(super) fn is_port_name(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && text.bytes().any(|b| b.is_ascii_lowercase())
        && !text.contains("--")
        && !text.starts_with('-')
        && !text.ends_with('-')
}

fn is_label_key(key: &str) -> bool {
    match key.split_once('/') {
        None => is_qualified(key),
        Some((domain, name)) => {
            let domain_ok = !domain.is_empty()
                && domain.len() <= 253
                && domain.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b));
            domain_ok && is_qualified(name)
        }
    }
}

/// What a label's name and a value have in common (`IsQualifiedName` and `IsValidLabelValue` of
/// `k8s.io/apimachinery/pkg/util/validation`).
fn is_qualified(text: &str) -> bool {
    let ends_ok = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    text.len() <= 63
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && ends_ok(text.bytes().next())
        && ends_ok(text.bytes().last())
}

pub(super) fn within(
    path: &str,
    document: usize,
    what: &'static str,
    found: usize,
    limit: usize,
) -> Result<(), SourceError> {
    if found <= limit {
        return Ok(());
    }
    Err(SourceError::ImplLimitExceeded { document, path: path.to_owned(), what, found, limit })
}

pub(super) const KIND: &str = "NetworkPolicy";
pub(super) const API_VERSION: &str = "networking.k8s.io/v1";
/// `status` was written by Kubernetes 1.24 to 1.27 and is found in exported objects.
const OBJECT: &[&str] = &["apiVersion", "kind", "metadata", "spec", "status"];
pub(super) const METADATA: &[&str] = &[
    "name",
    "namespace",
    "labels",
    "annotations",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "managedFields",
    "ownerReferences",
    "finalizers",
    "generateName",
    "selfLink",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
];
const LABEL_KEY: &str =
    "the key must be a label key: name or domain/name, the name at most 63 of A-Z, a-z, 0-9, -, _ and .";
