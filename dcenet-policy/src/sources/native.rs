//! Policies in the model's own terms, `dcenet.io/v1alpha1` Policy: what the kinds of Kubernetes cannot say.
//!
//! | Wish | Field |
//! |---|---|
//! | a rule that denies, in a namespace's own policy too | `action: deny` |
//! | an order | `spec.tier`, `spec.priority`, and that of the rules |
//! | ICMP by type and code, any protocol by its number | `services` |
//! | everything but some prefixes, everything but some ports | `notCidrs`, `notPorts` |
//! | prefixes on ingress, above the policies of namespaces | `cidrs` in `from`, in the tier `admin` |
//! | an address list of its own, that many rules name | PrefixGroup, `prefixGroups` |
//! | nodes, services, service accounts | `nodes`, `service`, `serviceAccounts` |
//! | names of the Domain Name System | `fqdns` |
//! | clusters, and sets of them | Cluster, `clusters` |
//! | more tiers | Tier, `spec.tier` |
//! | to see what a policy would do before it does | `spec.mode: audit` |
//! | a rule for some hours of some days | Schedule, `schedule` |
//!
//! # Objects
//!
//! An object with `metadata.namespace` governs pods of that namespace, in the tier NetworkPolicy: like a NetworkPolicy it
//! isolates the pods that it selects, in each direction that it has a list for, be it empty. All objects of the kind
//! NetworkPolicy have priority 0; one of this kind has `spec.priority` from 1, and 1000 where it says nothing: it is asked
//! after them. What shall come before belongs to the tier `admin`.
//!
//! An object without a namespace is the cluster's. It names its `spec.tier`, `admin`, `baseline` or a Tier, and its
//! `spec.priority`; lower ones are asked first, those of ClusterNetworkPolicy among them. What no rule of it matches is
//! for others to decide ([`model`](crate::model)).
//!
//! | Field | Meaning |
//! |---|---|
//! | `spec.subject` | `podSelector`, `serviceAccounts`, and for the cluster's `namespaceSelector`; what is missing selects all |
//! | `spec.mode` | `enforce`, so where missing, or `audit`: the policy changes no verdict. Of each flow that it would have changed, or decided by another rule, it is told what the verdict would be if all policies in audit were in force ([`Flow::audit`](crate::enforcer::flows::Flow::audit)), and [`explain`](crate::explain) says so of every packet |
//! | `spec.ingress[].from`, `spec.egress[].to` | missing: anybody. A list of `pods`, `cidrs`, `notCidrs`, `nodes`, `prefixGroups`, `clusters`, and in `to` `service` and `fqdns` |
//! | `pods` | `namespaceSelector`, `podSelector` and `serviceAccounts`; without the first the policy's namespace, and for the cluster's all |
//! | `serviceAccounts` | names of the pods' `spec.serviceAccountName`; one that says nothing has `default`. Of a pod of which only its endpoint is known, and no v1 Pod object, the account is not known: a rule that allows by accounts does not match it, one that denies or passes denies it, and as the subject it is allowed nothing |
//! | `nodes` | a selector for labels of nodes: their addresses, and so pods in their hosts' networks. `{}` selects all nodes. Nodes are those that v1 Node objects or pods tell of; of a node without such an object the labels are not known, so that a rule that allows does not match it and one that denies or passes denies it. Where there is no Node object at all, it denies everybody |
//! | `prefixGroups` | names of groups. Of a group that is not given, a rule that allows matches nobody, and one that denies or passes denies everybody |
//! | `clusters` | a selector for labels of Clusters: the addresses of those that it selects. `{}` selects all; `matchLabels: { clusterset.k8s.io: prod }` those of a set, `cluster.clusterset.k8s.io` one by its name. Where no Cluster is given, or not one that is asked for by its name (`matchLabels`, `In`), a rule that allows matches those that are, and one that denies or passes denies everybody. That one is missing of a set nobody can tell |
//! | `service` | `name` and `namespace` (for a policy of a namespace its own where missing): the service's own addresses and ports (v1 Service: cluster addresses, external ones, those of its balancer), and the addresses of its EndpointSlices (`discovery.k8s.io/v1`) with the ports there: where and whether the one is translated to the other makes no difference. All endpoints, ready or not. What enters by a `nodePort` is addressed to a node: name `nodes`. Where the Service or every slice of it is missing, a rule that allows matches what is known, and one that denies or passes denies everybody. The rule has no `services` |
//! | `fqdns` | names such as `db.example.com`, or `"*.example.com"` for all that have one label or more before `.example.com`, and not that itself; at least two labels, in any case. Meant are the addresses that have been learnt of them ([`Cluster::names`](crate::model::Cluster::names)), whichever pod of the node has asked, while they [count](crate::enforcer::learnt); before that, and where nobody tells the owner of the node's policy state of answers, the rule matches nobody. A name is the one that was asked for, not those that a CNAME leads on to. Whoever answers for a name says which addresses the rule means, those of other pods included, and an address is open under all of its names. Only rules that allow may have them: a list of names can never be known to be all that leads to an address |
//! | `cidrs`, `except` | addresses of pods or not, but those of the exceptions |
//! | `notCidrs` | addresses but these. The list names prefixes of both families, or the whole of the one that is not meant (`"::/0"`): what a list of one family should mean for the other cannot be guessed |
//! | `services` | missing: everything. A list of `protocol` with `ports`, `notPorts`, or `type` and `code` |
//! | `protocol` | `tcp`, `udp`, `sctp`, `icmp`, `icmpv6` or a number (IANA, Assigned Internet Protocol Numbers) |
//! | `ports`, `notPorts` | numbers, ranges as `8000-8100`; `ports` also names that pods give to theirs |
//! | `type`, `code` | of ICMP (RFC 792) and ICMPv6 (RFC 4443); without `code` all of the type |
//! | `log` | `true`: flows that the rule decides are marked ([`Flow::log`](crate::enforcer::flows::Flow::log)), and [`Logged`](crate::enforcer::flows::Logged) hands on these alone. Nothing else changes; the limits of events hold for them, too, and what is beyond is counted |
//! | `schedule` | the name of a Schedule: the rule is there while that holds, and is no rule at other times. Of a Schedule that is not given, a rule that allows matches nobody, and one that denies or passes denies whom it matches. Established flows are judged anew when it begins and when it ceases to hold, as after any change. Both are done by the owner of the node's policy state: while none runs, or where the change fails, what was in force before goes on, so that a rule that allows stays beyond its hours |
//! | `action` | `allow`, `deny`, `reject`, or `pass`: the rest of the tier is not asked. `reject` denies, and the sender is told: by a reset for TCP (RFC 9293, section 3.10.7.1), else by an ICMP error that says that the administrator forbids it (RFC 1812, section 5.2.7.1; RFC 4443, section 3.1), at most 100 times in about a second for each pod, where the kernel can (on arm64 since Linux 6.0). What is not answered is dropped ([`answer`](dcenet_ebpf::datapath::answer)) |
//!
//! # What policies refer to
//!
//! These are the cluster's. [`Documents`](super::kubernetes::Documents) reads them beside policies; the functions here
//! read policies only.
//!
//! | Kind | Field | Meaning |
//! |---|---|---|
//! | Tier | `spec.order` | its place, from 1 to 65535: lower ones are tried first, and equal ones by name. `admin` has 1000, `network-policy` 2000, `baseline` 3000. What is behind `network-policy` is not asked for a pod that a policy in there isolates; what is before it comes before traffic of the pod's own node, too |
//! | | `spec.end` | of pods that a policy of the tier governs in a direction, what no rule decides: `pass` it to the next tier (so where missing), or `deny` it |
//! | PrefixGroup | `spec.cidrs`, `spec.except` | prefixes and exceptions, as those of a rule. A change of a group changes classes of addresses, and no program |
//! | Cluster | `metadata.labels`, `spec.clusterSet` | its labels; `cluster.clusterset.k8s.io` is its name and `clusterset.k8s.io` its set, as the properties of a cluster are called (`about.k8s.io`, KEP-2149) |
//! | | `spec.cidrs`, `spec.except` | its addresses: of pods, of services, of its gateways, as rules shall mean them. The own cluster may be one, too |
//! | Schedule | `spec.utcOffset` | how far local time is from UTC, such as `"+01:00"`; UTC where missing. There are no zones that change for daylight saving |
//! | | `spec.windows` | a list of at most 100; it holds in each. `days` on which the window begins (`mon` to `sun`, missing: all), `from` and `until`, times of day such as `"08:00"`, in quotes; the second is not part of it, and is one of the next day where it is not after the first. Missing both: the whole day |
//!
//! A policy of a tier that is not given closes the pods that it governs, in its directions.
//!
//! In a [`RuleRef`](crate::model::RuleRef) each prefix of `cidrs` and each of `prefixGroups` and `fqdns` counts as a peer of its own, `notCidrs` as two (IPv4,
//! IPv6), and each port or gap between ports as a port of its own. A [`PolicyId`] begins with `policy/`, as objects of
//! other kinds may have the same name: `shop/policy/db`, `admin:policy/no-telnet`.
//!
//! ```
//! # #[cfg(feature = "yaml")] {
//! use dcenet_policy::sources::native;
//!
//! let policies = native::from_yaml(
//!     r#"
//! apiVersion: dcenet.io/v1alpha1
//! kind: Policy
//! metadata: { name: perimeter }
//! spec:
//!   tier: admin
//!   priority: 10
//!   ingress:
//!   - action: deny
//!     from: [ { notCidrs: [ 10.0.0.0/8, "fd00::/8" ] } ]
//!     services: [ { protocol: tcp, notPorts: [ 443 ] }, { protocol: icmp, type: 8 } ]
//! "#,
//! )
//! .unwrap();
//! assert_eq!(policies[0].id.to_string(), "admin:policy/perimeter");
//!
//! let error = native::from_yaml(
//!     r#"
//! apiVersion: dcenet.io/v1alpha1
//! kind: Policy
//! metadata: { name: ping }
//! spec: { tier: admin, priority: 1, ingress: [ { action: allow, services: [ { protocol: tcp, type: 8 } ] } ] }
//! "#,
//! )
//! .unwrap_err();
//! assert_eq!(
//!     error.to_string(),
//!     "document 0: spec.ingress[0].services[0].type: 8: only icmp and icmpv6 have types; remove it or change protocol"
//! );
//! # }
//! ```

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;

use super::fields::{At, Fields};
use super::networkpolicy::{
    KindNeeded, MAX_COMBINATIONS, METADATA, dns_name, is_port_name, one_of, prefix, selector, within,
};
use super::{SourceError, text};
use crate::model::{
    Action, IpBlock, Mode, NamePattern, NamespaceMatch, Operator, Peer, Peers, PodMatch, Policy, PolicyId, PortMatch,
    PortSpec, Ports, Protocol, Requirement, Rule, SERVICE_ACCOUNT_LABEL, ServiceId, Tier, Tuple,
};

/// Reads all policies of a YAML text. It may hold several documents, and `List` or `PolicyList` objects.
///
/// # Errors
///
/// The first [`SourceError`]; nothing is read in part. Two policies of one name in a tier and namespace are an error.
/// Limits are those of [`networkpolicy`](super::networkpolicy::from_yaml).
#[cfg(feature = "yaml")]
pub fn from_yaml(text: &str) -> Result<Vec<Policy>, SourceError> {
    from_documents(&text::yaml(text)?)
}

/// Reads all policies of a JSON text: one object, which may be a list.
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
    let (mut policies, mut seen) = (Vec::new(), BTreeSet::new());
    for (index, document) in documents.iter().enumerate().filter(|(_, document)| !document.is_null()) {
        read_object(&At::root(index, document), KindNeeded::Yes, &mut seen, &mut policies)?;
    }
    Ok(policies)
}

fn read_object(
    at: &At<'_>,
    kind_needed: KindNeeded,
    seen: &mut BTreeSet<PolicyId>,
    policies: &mut Vec<Policy>,
) -> Result<(), SourceError> {
    let kind = at.some_fields()?.field("kind");
    if let (Some(list @ ("List" | "PolicyList")), KindNeeded::Yes) = (kind.value.and_then(Value::as_str), kind_needed) {
        let fields = at.fields(&["apiVersion", "kind", "metadata", "items"])?;
        let (version, items) = if list == "List" { ("v1", KindNeeded::Yes) } else { (API_VERSION, KindNeeded::No) };
        one_of(&fields.field("apiVersion"), &[version])?;
        return fields.field("items").elements()?.iter().try_for_each(|item| read_object(item, items, seen, policies));
    }
    let policy = read_policy(at, kind_needed)?;
    if !seen.insert(policy.id.clone()) {
        let twice = format!("{} is there twice; remove or rename one", policy.id);
        return Err(at.some_fields()?.field("metadata").invalid(twice));
    }
    policies.push(policy);
    Ok(())
}

/// Where a policy belongs.
#[derive(Clone, Copy)]
enum Owner<'a> {
    Namespace(&'a str),
    Cluster,
}

impl Owner<'_> {
    /// The namespaces of a selector, which may leave them out.
    fn namespaces(self, at: &At<'_>) -> Result<NamespaceMatch, SourceError> {
        match (self, at.value) {
            (Owner::Namespace(own), None) => Ok(NamespaceMatch::Named(own.to_owned())),
            _ => selector(at).map(NamespaceMatch::Selected),
        }
    }
}

pub(super) fn read_policy(at: &At<'_>, kind_needed: KindNeeded) -> Result<Policy, SourceError> {
    let object = at.fields(&["apiVersion", "kind", "metadata", "spec"])?;
    for (field, wanted) in [("kind", KIND), ("apiVersion", API_VERSION)] {
        let field = object.field(field);
        if kind_needed == KindNeeded::Yes || field.value.is_some() {
            one_of(&field, &[wanted])?;
        }
    }
    let metadata = object.field("metadata").fields(METADATA)?;
    let name = PREFIX.to_owned() + dns_name(&metadata.field("name"), 253)?;
    let namespace = metadata.field("namespace");
    let owner = match namespace.value {
        Some(_) => Owner::Namespace(dns_name(&namespace, 63)?),
        None => Owner::Cluster,
    };

    let spec = object.field("spec").fields(&["tier", "priority", "mode", "subject", "ingress", "egress"])?;
    let (tier, priority, subject) = (spec.field("tier"), spec.field("priority"), spec.field("subject"));
    let (id, priority) = match owner {
        Owner::Namespace(namespace) => {
            if tier.value.is_some() {
                one_of(&tier, &["network-policy"]).map_err(|_| {
                    tier.invalid("must be network-policy in a namespace; remove the namespace for another tier")
                })?;
            }
            let priority = if priority.value.is_none() { DEFAULT_PRIORITY } else { number(&priority, 1, u16::MAX)? };
            (PolicyId::new(namespace, name), priority)
        }
        Owner::Cluster => {
            let found = Tier::from(dns_name(&tier, 63)?.to_owned());
            if found == Tier::NetworkPolicy {
                return Err(tier.invalid("must be admin, baseline or the name of a Tier; add a namespace for this one"));
            }
            (PolicyId::cluster(found, name), number(&priority, 0, u16::MAX)?)
        }
    };
    let known: &[&str] = match owner {
        Owner::Namespace(_) => &["podSelector", "serviceAccounts"],
        Owner::Cluster => &["namespaceSelector", "podSelector", "serviceAccounts"],
    };
    let subject = pods_of(&subject.fields(known)?, owner)?;
    let rules = |field, peers| {
        let list = spec.field(field);
        list.value.map(|_| rules(&list, peers, owner)).transpose()
    };
    let (ingress, egress) = (rules("ingress", "from")?, rules("egress", "to")?);
    if ingress.is_none() && egress.is_none() {
        return Err(object.field("spec").invalid("must have ingress or egress; an empty list is one"));
    }
    let mode = spec.field("mode");
    let mode = match mode.value {
        Some(_) if one_of(&mode, &["enforce", "audit"])? == "audit" => Mode::Audit,
        _ => Mode::Enforce,
    };
    Ok(Policy { id, priority, mode, subject, ingress, egress })
}

fn rules(at: &At<'_>, peers_field: &'static str, owner: Owner<'_>) -> Result<Vec<Rule>, SourceError> {
    let known: &[&str] = if peers_field == "from" {
        &["name", "action", "from", "services", "schedule", "log"]
    } else {
        &["name", "action", "to", "services", "schedule", "log"]
    };
    let mut rules = Vec::new();
    for rule in at.elements()? {
        let fields = rule.fields(known)?;
        if fields.field("name").value.is_some() {
            fields.field("name").text()?;
        }
        let action = fields.field("action");
        let action = match one_of(&action, &["allow", "deny", "reject", "pass"])? {
            "allow" => Action::Allow,
            "deny" => Action::Deny,
            "reject" => Action::Reject,
            _ => Action::Pass,
        };
        let schedule = fields.field("schedule");
        let schedule = schedule.value.map(|_| dns_name(&schedule, 63)).transpose()?.map(str::to_owned);
        let log = fields.field("log");
        let log = match log.value {
            None | Some(Value::Bool(false)) => false,
            Some(Value::Bool(true)) => true,
            Some(_) => return Err(log.invalid("must be true or false")),
        };
        let list = fields.field(peers_field);
        let peers = some(&list, "for anybody", |item, peers| peer(item, owner, peers_field, peers))?;
        if action != Action::Allow && peers.iter().flatten().any(|peer| matches!(peer, Peer::Name(_))) {
            return Err(list.invalid(
                "has fqdns, which are for rules that allow: there may be more addresses than have been learnt; name cidrs",
            ));
        }
        let ports = some(&fields.field("services"), "for everything", service)?;
        if ports.is_some() && peers.iter().flatten().any(|peer| matches!(peer, Peer::Service(_))) {
            return Err(list.invalid("has a service, which has ports of its own; make two rules, one without services"));
        }
        let combinations = peers.as_ref().map_or(1, Vec::len).saturating_mul(ports.as_ref().map_or(1, Vec::len));
        within(&rule.path, rule.document, "combinations of peer and port", combinations, MAX_COMBINATIONS)?;
        rules.push(Rule {
            action,
            peers: peers.map_or(Peers::Any, Peers::OneOf),
            ports: ports.map_or(Ports::Any, Ports::OneOf),
            schedule,
            log,
        });
    }
    Ok(rules)
}

/// What the elements of a list stand for; none where there is no list.
fn some<T>(
    list: &At<'_>,
    without: &str,
    mut read: impl FnMut(&At<'_>, &mut Vec<T>) -> Result<(), SourceError>,
) -> Result<Option<Vec<T>>, SourceError> {
    if list.value.is_none() {
        return Ok(None);
    }
    let elements = list.elements()?;
    if elements.is_empty() {
        return Err(list.invalid(format!("must have at least one element; leave it out {without}")));
    }
    let mut found = Vec::new();
    elements.iter().try_for_each(|element| read(element, &mut found))?;
    Ok(Some(found))
}

/// Pods by selectors and service accounts.
fn pods_of(fields: &Fields<'_>, owner: Owner<'_>) -> Result<PodMatch, SourceError> {
    let namespaces = owner.namespaces(&fields.field("namespaceSelector"))?;
    let mut pods = selector(&fields.field("podSelector"))?;
    let accounts = some(&fields.field("serviceAccounts"), "for all", |item, names: &mut Vec<String>| {
        names.push(dns_name(item, 253)?.to_owned());
        Ok(())
    })?;
    if let Some(accounts) = accounts {
        let operator = Operator::In(accounts.into_iter().collect());
        pods.requirements.push(Requirement { key: SERVICE_ACCOUNT_LABEL.to_owned(), operator });
    }
    Ok(PodMatch { namespaces, pods })
}

fn peer(at: &At<'_>, owner: Owner<'_>, peers_field: &'static str, peers: &mut Vec<Peer>) -> Result<(), SourceError> {
    let known: &[&str] =
        &["pods", "cidrs", "except", "notCidrs", "nodes", "prefixGroups", "clusters", "service", "fqdns"];
    let fields = at.fields(known)?;
    let (pods, cidrs, except, not) =
        (fields.field("pods"), fields.field("cidrs"), fields.field("except"), fields.field("notCidrs"));
    let (nodes, groups, service) = (fields.field("nodes"), fields.field("prefixGroups"), fields.field("service"));
    let (clusters, names) = (fields.field("clusters"), fields.field("fqdns"));
    let kinds = [&pods, &cidrs, &not, &nodes, &groups, &clusters, &service, &names];
    if kinds.iter().filter(|field| field.value.is_some()).count() != 1 {
        return Err(at.invalid(
            "must have exactly one of pods, cidrs, notCidrs, nodes, prefixGroups, clusters, service, fqdns; make several \
             elements of it",
        ));
    }
    if except.value.is_some() && cidrs.value.is_none() {
        return Err(except.invalid("belongs to cidrs; remove it"));
    }
    if pods.value.is_some() {
        let fields = pods.fields(&["namespaceSelector", "podSelector", "serviceAccounts"])?;
        peers.push(Peer::Pods(pods_of(&fields, owner)?));
    } else if nodes.value.is_some() {
        peers.push(Peer::Nodes(selector(&nodes)?));
    } else if clusters.value.is_some() {
        peers.push(Peer::Clusters(selector(&clusters)?));
    } else if groups.value.is_some() {
        let names = some(&groups, "for anybody", |item, names: &mut Vec<Peer>| {
            names.push(Peer::Group(dns_name(item, 63)?.to_owned()));
            Ok(())
        })?;
        peers.extend(names.into_iter().flatten());
    } else if names.value.is_some() {
        if peers_field == "from" {
            return Err(names.invalid("is for egress: nobody tells which names a sender has; name cidrs"));
        }
        let patterns = some(&names, "for anybody", |item, patterns: &mut Vec<Peer>| {
            patterns.push(Peer::Name(pattern(item)?));
            Ok(())
        })?;
        peers.extend(patterns.into_iter().flatten());
    } else if service.value.is_some() {
        if peers_field == "from" {
            return Err(service.invalid("is for egress; name the pods that may come in"));
        }
        let fields = service.fields(&["namespace", "name"])?;
        let namespace = fields.field("namespace");
        let namespace = match (owner, namespace.value) {
            (Owner::Namespace(own), None) => own,
            _ => dns_name(&namespace, 63)?,
        };
        peers.push(Peer::Service(ServiceId::new(namespace, dns_name(&fields.field("name"), 63)?)));
    } else if not.value.is_some() {
        let holes = prefixes(&not)?;
        if holes.iter().all(|hole| hole.addr().is_ipv4()) || holes.iter().all(|hole| hole.addr().is_ipv6()) {
            return Err(not.invalid(
                "must name prefixes of both families; add \"::/0\" or 0.0.0.0/0 if no address of the other is meant",
            ));
        }
        let before = peers.len();
        for cidr in [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())] {
            let except: Vec<IpNet> = holes.iter().copied().filter(|hole| cidr.contains(hole)).collect();
            // Where all of a family is excluded nothing is left of it.
            if !except.contains(&cidr) {
                peers.push(Peer::Block(IpBlock { cidr, except }));
            }
        }
        if peers.len() == before {
            return Err(not.invalid("leaves no address; name the prefixes that are meant"));
        }
    } else {
        peers.extend(blocks(&cidrs, &except)?.into_iter().map(Peer::Block));
    }
    Ok(())
}

/// A name of the Domain Name System, or all below one.
pub(super) fn pattern(at: &At<'_>) -> Result<NamePattern, SourceError> {
    let text = at.text()?;
    let name = text.trim_start_matches("*.");
    if name.strip_suffix('.').unwrap_or(name).parse::<IpAddr>().is_ok() {
        return Err(at.invalid("is an address; name it as a prefix"));
    }
    text.parse().map_err(|_| {
        at.invalid(
            "must be a full domain name, such as db.example.com, or *.example.com for all below: at least two labels of at \
             most 63 of a-z, 0-9, - and _, which begin and end with a letter or digit",
        )
    })
}

/// Prefixes but for their exceptions.
pub(super) fn blocks(cidrs: &At<'_>, except: &At<'_>) -> Result<Vec<IpBlock>, SourceError> {
    let blocks = prefixes(cidrs)?;
    let holes = if except.value.is_some() { prefixes(except)? } else { Vec::new() };
    for (index, hole) in holes.iter().enumerate() {
        let inside = |block: &&IpNet| block.contains(hole) && *block != hole;
        if !blocks.iter().any(|block| inside(&block)) {
            let items = except.elements()?;
            return Err(items[index].invalid("must be a strict subset of one of cidrs"));
        }
    }
    let mut found = Vec::new();
    for cidr in blocks {
        let except: Vec<IpNet> =
            holes.iter().copied().filter(|hole| cidr.contains(hole) || hole.contains(&cidr)).collect();
        if !except.iter().any(|hole| hole.contains(&cidr)) {
            found.push(IpBlock { cidr, except });
        }
    }
    Ok(found)
}

fn prefixes(list: &At<'_>) -> Result<Vec<IpNet>, SourceError> {
    let items = list.elements()?;
    if items.is_empty() {
        return Err(list.invalid("must have at least one prefix"));
    }
    items.iter().map(prefix).collect()
}

fn service(at: &At<'_>, ports: &mut Vec<PortMatch>) -> Result<(), SourceError> {
    let fields = at.fields(&["protocol", "ports", "notPorts", "type", "code"])?;
    let protocol = protocol(&fields.field("protocol"))?;
    let (list, not) = (fields.field("ports"), fields.field("notPorts"));
    let (kind, code) = (fields.field("type"), fields.field("code"));
    let icmp = matches!(protocol, Protocol::ICMP | Protocol::ICMPV6);
    for (field, allowed, what) in [
        (&list, protocol.has_ports() && !icmp, "only tcp, udp and sctp have ports; remove it or change protocol"),
        (&not, protocol.has_ports() && !icmp, "only tcp, udp and sctp have ports; remove it or change protocol"),
        (&kind, icmp, "only icmp and icmpv6 have types; remove it or change protocol"),
        (&code, icmp && kind.value.is_some(), "needs a type beside it, of icmp or icmpv6; set type or remove it"),
    ] {
        if field.value.is_some() && !allowed {
            return Err(field.invalid(what));
        }
    }
    let range = |first, last| PortMatch { protocol, port: PortSpec::Range { first, last } };
    if kind.value.is_some() {
        let kind = octet(&kind)?;
        let (first, last) = if code.value.is_some() { (octet(&code)?, octet(&code)?) } else { (0, u8::MAX) };
        ports.push(range(Tuple::icmp_port(kind, first), Tuple::icmp_port(kind, last)));
    } else if list.value.is_some() && not.value.is_some() {
        return Err(not.invalid("excludes ports; make two elements of it"));
    } else if let Some(items) = some(&list, "for every port", port)? {
        ports.extend(items.into_iter().map(|port| PortMatch { protocol, port }));
    } else if let Some(items) = some(&not, "for every port", port)? {
        gaps(&not, &items)?.into_iter().for_each(|(first, last)| ports.push(range(first, last)));
    } else {
        ports.push(PortMatch { protocol, port: PortSpec::Any });
    }
    Ok(())
}

/// The ports that no element of the list covers.
fn gaps(at: &At<'_>, items: &[PortSpec]) -> Result<Vec<(u16, u16)>, SourceError> {
    let mut covered = Vec::new();
    for (item, spec) in at.elements()?.iter().zip(items) {
        match spec {
            PortSpec::Range { first, last } => covered.push((*first, *last)),
            _ => return Err(item.invalid("must be a number or a range: what a name stands for differs by pod")),
        }
    }
    covered.sort_unstable();
    let (mut gaps, mut next) = (Vec::new(), Some(0_u16));
    for (first, last) in covered {
        if let Some(from) = next
            && from < first
        {
            gaps.push((from, first - 1));
        }
        next = next.and_then(|from| Some(from.max(last.checked_add(1)?)));
    }
    gaps.extend(next.map(|from| (from, u16::MAX)));
    if gaps.is_empty() {
        return Err(at.invalid("leaves no port; name the ports that are meant"));
    }
    Ok(gaps)
}

fn protocol(at: &At<'_>) -> Result<Protocol, SourceError> {
    let found = match at.value {
        Some(Value::String(name)) => Protocol::parse(&name.to_ascii_lowercase()),
        Some(Value::Number(number)) => number.as_u64().and_then(|number| u8::try_from(number).ok()).map(Protocol),
        _ => None,
    };
    found.ok_or_else(|| at.invalid("must be tcp, udp, sctp, icmp, icmpv6 or a number from 0 to 255"))
}

/// A number, a range in text, or a name.
fn port(at: &At<'_>, ports: &mut Vec<PortSpec>) -> Result<(), SourceError> {
    const RULE: &str = "must be a number from 1 to 65535, a range such as 8000-8100, or the name of a port";
    let text = match at.value {
        Some(Value::String(text)) => text.as_str(),
        _ => {
            let port = number(at, 1, u16::MAX).map_err(|_| at.invalid(RULE))?;
            ports.push(PortSpec::Range { first: port, last: port });
            return Ok(());
        }
    };
    let numbers =
        |text: &str| -> Option<u16> { text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())? };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    ports.push(match (numbers(first), numbers(last)) {
        (Some(first @ 1..), Some(last)) if first <= last => PortSpec::Range { first, last },
        // No name of a port, but a range that is misspelt, which would match nothing.
        (Some(_), None) if text.contains('-') => return Err(at.invalid(RULE)),
        _ if is_port_name(text) => PortSpec::Named(text.to_owned()),
        _ => return Err(at.invalid(RULE)),
    });
    Ok(())
}

fn octet(at: &At<'_>) -> Result<u8, SourceError> {
    let number = at.value.and_then(Value::as_u64).and_then(|number| u8::try_from(number).ok());
    number.ok_or_else(|| at.invalid("must be a number from 0 to 255"))
}

fn number(at: &At<'_>, least: u16, most: u16) -> Result<u16, SourceError> {
    let number = at.value.and_then(Value::as_u64).and_then(|number| u16::try_from(number).ok());
    let number = number.filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| at.invalid(format!("must be a number from {least} to {most}")))
}

pub(super) const KIND: &str = "Policy";
pub(super) const API_VERSION: &str = "dcenet.io/v1alpha1";
/// What comes before the name of an object in a [`PolicyId`].
const PREFIX: &str = "policy/";
const DEFAULT_PRIORITY: u16 = 1000;

#[cfg(all(test, feature = "yaml"))]
mod tests;
