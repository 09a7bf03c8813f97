//! A policy set as objects of Kubernetes, for clusters whose own CNI enforces.
//!
//! Policies of the tier NetworkPolicy become `networking.k8s.io/v1` NetworkPolicy, those of admin and baseline
//! `policy.networking.k8s.io/v1alpha2` ClusterNetworkPolicy. What these kinds cannot say is left out and listed, by rule:
//!
//! | Here | There | Where left out |
//! |---|---|---|
//! | a rule of the tier NetworkPolicy that denies or passes | nothing: all rules allow, and add up | rules that it could have stopped are left out, too, in this policy and in those behind it of the namespace: closed |
//! | ICMP, other protocols, port 0 | nothing | a rule that allows does not allow it: closed. One that denies or passes does not take it: open to what is behind |
//! | a policy of a tier that has a name of its own | nothing | open to what is behind; closed where all its rules allow, and the tier's end passes |
//! | a prefix, group, node, or anybody, in `ingress` of admin and baseline | nothing, but pods | as for ICMP |
//! | exceptions of a prefix in admin and baseline | the prefixes around them | |
//! | a group of prefixes | its prefixes | one that is not known: as for ICMP |
//! | clusters by labels | their prefixes | where none is known, or one is not that is asked for by its name: those that are not, as for ICMP |
//! | a name of the DNS | `domainNames`, where admin and baseline allow | addresses change as answers do: in the tier NetworkPolicy closed, and as for ICMP in rules that deny or pass |
//! | nodes by labels | their addresses in the tier NetworkPolicy, else `nodes`; their addresses in rules that allow, too, where labels of some are not known | a rule that denies or passes where labels of some are not known: as for ICMP |
//! | a service | its own and its backends' addresses, a rule for each port | names of ports with it, or one that is not known: as for ICMP |
//! | pods by service account | nothing | as for ICMP; where it is the subject the policy is left out: open to what is behind |
//! | a rule that rejects | one that denies | nobody tells the sender |
//! | a rule that is to be logged | the rule | nothing tells of its flows |
//! | a rule with a schedule | the rule, or nothing, as of the cluster's time | as it is then |
//! | a policy in audit | nothing | left out: it changes no verdict, and nobody tells what it would do |
//! | a port's name for one protocol, in the other tiers | the name for TCP, UDP and SCTP, where no pod uses it for another of them | else as above |
//! | more than 25 rules, peers or services | several rules, several objects | |
//! | priorities above 1000, or equal ones | their order, numbered from 0 | |
//! | a subject in several namespaces, in the tier NetworkPolicy | an object in each namespace that there is now | |
//!
//! The rule that a pod's own node reaches it holds there as here; so does what pods on the host's network mean. The text is
//! in YAML's flow style, which is JSON: no reader takes a quoted `"on"` for a truth value.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::Omission;
use crate::classes::selector_holds;
use crate::model::{
    Action, Backend, Cluster, Direction, IpBlock, LabelSelector, NAMESPACE_NAME_LABEL, NamespaceMatch, Operator, Peer,
    Peers, PodMatch, Policy, PortMatch, PortSpec, Ports, Protocol, Rule, SERVICE_ACCOUNT_LABEL, ServiceId, Tier,
    TierEnd,
};

/// Objects, and what they do not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The objects.
    pub objects: Vec<Value>,
    /// What is not enforced as written.
    pub omitted: Vec<Omission>,
}

impl Rendered {
    /// All objects as one text for `kubectl apply -f`.
    pub fn text(&self) -> String {
        let texts: Vec<String> = self.objects.iter().map(|object| format!("{object:#}\n")).collect();
        texts.join("---\n")
    }
}

/// Renders all policies of a cluster. Its pods, namespaces, nodes, ports' names and [`Catalog`](crate::model::Catalog)
/// count where the objects' kinds have no words for what a policy means: render again when they change.
pub fn render(cluster: &Cluster) -> Rendered {
    let omitted = super::unexpressed(cluster).collect();
    let rendered = Rendered { objects: Vec::new(), omitted };
    let cluster = &*cluster.in_force();
    let mut policies: Vec<&Policy> = cluster.policies.values().collect();
    policies.sort_by_key(|policy| cluster.order(policy));
    let mut renderer = Renderer { cluster, rendered, names: BTreeSet::new() };
    let mut stopped: BTreeMap<(String, Direction), String> = BTreeMap::new();
    let (mut admin, mut baseline) = (Vec::new(), Vec::new());
    for policy in policies {
        match &policy.id.tier {
            Tier::Named(name) => renderer.named(policy, name),
            Tier::Admin | Tier::NetworkPolicy | Tier::Baseline if !is_sayable(&policy.subject) => {
                renderer.omit(&policy.id, format!("its subject asks for a service account: left out; {OPEN}"));
            }
            Tier::Admin => admin.push(policy),
            Tier::NetworkPolicy => renderer.namespaced(policy, &mut stopped),
            Tier::Baseline => baseline.push(policy),
        }
    }
    renderer.of_cluster("Admin", &admin);
    renderer.of_cluster("Baseline", &baseline);
    renderer.rendered
}

/// The rules of one direction.
type Side = (Direction, Vec<Value>);

struct Renderer<'a> {
    cluster: &'a Cluster,
    rendered: Rendered,
    names: BTreeSet<(String, String)>,
}

impl Renderer<'_> {
    fn omit(&mut self, what: impl std::fmt::Display, reason: impl Into<String>) {
        let omission = Omission::new(what, reason);
        if !self.rendered.omitted.contains(&omission) {
            self.rendered.omitted.push(omission);
        }
    }

    /// A name that objects may have, and that no other has.
    fn name(&mut self, namespace: &str, wanted: &str) -> String {
        let base = wanted.replace('/', "-");
        let mut name = base.clone();
        for number in 2.. {
            if self.names.insert((namespace.to_owned(), name.clone())) {
                break;
            }
            name = format!("{base}-{number}");
        }
        name
    }

    /// A policy of a tier that is none of Kubernetes'.
    fn named(&mut self, policy: &Policy, tier: &str) {
        let rules = Direction::ALL.into_iter().flat_map(|direction| policy.rules(direction).unwrap_or_default());
        let mut rules = rules.filter(|rule| !matches_nobody(rule));
        let passes = self.cluster.catalog.tier(&policy.id.tier).is_some_and(|spec| spec.end == TierEnd::Pass);
        let left = if passes && rules.all(|rule| rule.action == Action::Allow) { CLOSED } else { OPEN };
        self.omit(&policy.id, format!("left out: Kubernetes has no tier {tier}; {left}"));
    }

    fn namespaced(&mut self, policy: &Policy, stopped: &mut BTreeMap<(String, Direction), String>) {
        let namespaces: BTreeSet<String> = if let NamespaceMatch::Named(name) = &policy.subject.namespaces {
            [name.clone()].into()
        } else {
            let known = self.cluster.namespaces.keys().chain(self.cluster.pods.keys().map(|pod| &pod.namespace));
            known.filter(|name| self.selects(&policy.subject.namespaces, name)).cloned().collect()
        };
        for namespace in &namespaces {
            let mut spec = json!({ "podSelector": selector(&policy.subject.pods), "policyTypes": [] });
            for direction in Direction::ALL {
                let Some(rules) = policy.rules(direction) else { continue };
                let key = (namespace.clone(), direction);
                let mut list = Vec::new();
                for (index, rule) in rules.iter().enumerate().filter(|(_, rule)| !matches_nobody(rule)) {
                    let place = format!("{} {direction}[{index}]", policy.id);
                    match (rule.action, stopped.get(&key)) {
                        (Action::Deny | Action::Reject | Action::Pass, None) => {
                            drop(stopped.insert(key.clone(), place))
                        }
                        (Action::Deny | Action::Reject | Action::Pass, Some(_)) => {}
                        (Action::Allow, Some(by)) => {
                            let reason = format!("left out: {by} may stop it, and cannot be expressed; {CLOSED}");
                            self.omit(place, reason);
                        }
                        (Action::Allow, None) => {
                            for rule in self.expanded(&place, rule, direction, CLOSED, false) {
                                list.extend(self.allow(&place, &rule, direction, namespace));
                            }
                        }
                    }
                }
                let (types, of) = match direction {
                    Direction::Ingress => ("Ingress", "ingress"),
                    Direction::Egress => ("Egress", "egress"),
                };
                if let Some(all) = spec["policyTypes"].as_array_mut() {
                    all.push(types.into());
                }
                spec[of] = list.into();
            }
            if spec["policyTypes"].as_array().is_some_and(Vec::is_empty) {
                continue;
            }
            let name = self.name(namespace, &policy.id.name);
            self.rendered.objects.push(json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": { "name": name, "namespace": namespace }, "spec": spec,
            }));
        }
    }

    /// A rule without groups, services and service accounts, and without names where these are not kept, as one or several.
    fn expanded(&mut self, place: &str, rule: &Rule, direction: Direction, left: &str, names: bool) -> Vec<Rule> {
        let Peers::OneOf(wanted) = &rule.peers else { return vec![rule.clone()] };
        let (mut peers, mut of_services) = (Vec::new(), Vec::new());
        for peer in wanted {
            match peer {
                Peer::Pods(pods) if !is_sayable(pods) => self.omit(place, format!("a service account; {left}")),
                Peer::Nodes(_) => {
                    if rule.action != Action::Allow && self.are_nodes_unknown() {
                        self.omit(place, format!("nodes whose labels are not known; {left}"));
                    }
                    peers.push(peer.clone());
                }
                Peer::Pods(_) | Peer::Block(_) => peers.push(peer.clone()),
                Peer::Group(name) => match self.cluster.catalog.groups.get(name) {
                    Some(blocks) => peers.extend(blocks.iter().cloned().map(Peer::Block)),
                    None => self.omit(place, format!("the group {name}, which is not known; {left}")),
                },
                Peer::Clusters(wanted) => {
                    if !self.cluster.catalog.knows_clusters(wanted) {
                        self.omit(place, format!("clusters that are not known; {left}"));
                    }
                    let known = self.cluster.catalog.clusters.values();
                    let meant = known.filter(|known| selector_holds(wanted, &known.labels));
                    peers.extend(meant.flat_map(|known| &known.blocks).cloned().map(Peer::Block));
                }
                Peer::Service(_) | Peer::Name(_) if direction == Direction::Ingress => {}
                Peer::Name(_) if names && rule.action == Action::Allow => peers.push(peer.clone()),
                Peer::Name(pattern) => {
                    self.omit(place, format!("the name {pattern}, whose addresses change as answers do; {left}"));
                }
                Peer::Service(id) => of_services.extend(self.service_rules(place, rule, id, left)),
            }
        }
        of_services.insert(0, Rule { peers: Peers::OneOf(peers), ..rule.clone() });
        of_services
    }

    /// What a rule says of a service's backends, each at its port.
    fn service_rules(&mut self, place: &str, rule: &Rule, id: &ServiceId, left: &str) -> Vec<Rule> {
        let mut listening: BTreeMap<(Protocol, Option<u16>), Vec<Peer>> = BTreeMap::new();
        let catalog = &self.cluster.catalog;
        let known = [&catalog.services, &catalog.service_addresses].map(|listed| listed.get(id));
        if known.contains(&None) && rule.action != Action::Allow {
            self.omit(place, format!("a service that is not known; {left}"));
        }
        for Backend { address, protocol, port } in known.into_iter().flatten().flatten() {
            let block = IpBlock { cidr: IpNet::from(*address), except: Vec::new() };
            listening.entry((*protocol, *port)).or_default().push(Peer::Block(block));
        }
        let mut rules = Vec::new();
        for ((protocol, port), peers) in listening {
            let all = port.map_or(PortSpec::Any, |port| PortSpec::Range { first: port, last: port });
            let ports = match &rule.ports {
                Ports::Any => vec![all],
                Ports::OneOf(ports) => {
                    let mut both = Vec::new();
                    for wanted in ports.iter().filter(|wanted| wanted.protocol == protocol) {
                        match (&wanted.port, port) {
                            (PortSpec::Any, _) => both.push(all.clone()),
                            (PortSpec::Range { .. }, None) => both.push(wanted.port.clone()),
                            (PortSpec::Range { first, last }, Some(port)) => {
                                both.extend((*first..=*last).contains(&port).then(|| all.clone()));
                            }
                            (PortSpec::Named(_), _) => {
                                self.omit(place, format!("names of ports with a service; {left}"));
                            }
                        }
                    }
                    both
                }
            };
            let ports = Ports::OneOf(ports.into_iter().map(|port| PortMatch { protocol, port }).collect());
            rules.push(Rule { action: rule.action, peers: Peers::OneOf(peers), ports, schedule: None, log: false });
        }
        rules
    }

    /// A rule of a NetworkPolicy; none where nothing of it can be said.
    fn allow(&mut self, place: &str, rule: &Rule, direction: Direction, namespace: &str) -> Option<Value> {
        let mut object = Map::new();
        if let Peers::OneOf(wanted) = &rule.peers {
            let mut peers = Vec::new();
            for peer in wanted {
                match peer {
                    Peer::Pods(pods) => {
                        let mut item = json!({ "podSelector": selector(&pods.pods) });
                        // The subject's own namespace needs no selector.
                        if !matches!(&pods.namespaces, NamespaceMatch::Named(name) if name == namespace) {
                            item["namespaceSelector"] = namespaces(&pods.namespaces);
                        }
                        peers.push(item);
                    }
                    Peer::Block(block) => {
                        let whole = whole(block);
                        peers.extend(
                            whole.map(|(cidr, except)| json!({ "ipBlock": { "cidr": cidr, "except": except } })),
                        );
                    }
                    Peer::Nodes(wanted) => {
                        peers.extend(self.nodes(wanted).map(|cidr| json!({ "ipBlock": { "cidr": cidr } })));
                    }
                    Peer::Group(_) | Peer::Clusters(_) | Peer::Service(_) | Peer::Name(_) => {
                        self.omit(place, format!("a peer of another kind; {CLOSED}"))
                    }
                }
            }
            if peers.is_empty() {
                return None;
            }
            object.insert(if direction == Direction::Ingress { "from" } else { "to" }.to_owned(), peers.into());
        }
        if let Ports::OneOf(wanted) = &rule.ports {
            let mut ports = Vec::new();
            for PortMatch { protocol, port } in wanted {
                let Some(name) = transport(*protocol) else {
                    self.omit(place, format!("protocol {protocol}; {CLOSED}"));
                    continue;
                };
                let name = name.to_uppercase();
                match port {
                    PortSpec::Any | PortSpec::Range { first: 0, last: u16::MAX } => {
                        ports.push(json!({ "protocol": name }));
                    }
                    PortSpec::Range { first, last } => {
                        if *first == 0 {
                            self.omit(place, format!("port 0 of {protocol}; {CLOSED}"));
                        }
                        if *last > 0 {
                            ports.push(json!({ "protocol": name, "port": (*first).max(1), "endPort": last }));
                        }
                    }
                    PortSpec::Named(port) => ports.push(json!({ "protocol": name, "port": port })),
                }
            }
            if ports.is_empty() {
                return None;
            }
            object.insert("ports".to_owned(), ports.into());
        }
        Some(object.into())
    }

    fn of_cluster(&mut self, tier: &str, policies: &[&Policy]) {
        let mut parts: Vec<(&Policy, Direction, Vec<Value>)> = Vec::new();
        for policy in policies {
            for direction in Direction::ALL {
                let mut list = Vec::new();
                for (index, rule) in policy.rules(direction).unwrap_or_default().iter().enumerate() {
                    let place = format!("{} {direction}[{index}]", policy.id);
                    list.extend(self.cluster_rule(&place, rule, direction));
                }
                parts.extend(list.chunks(LONGEST).map(|chunk| (*policy, direction, chunk.to_vec())));
            }
        }
        let priorities: Vec<u16> = parts.iter().map(|(policy, ..)| policy.priority).collect();
        // An object has both directions where neither is split; the numbers stay where they say the order already.
        let mut objects: Vec<(&Policy, Vec<Side>)> = Vec::new();
        for (policy, direction, rules) in parts {
            match objects.last_mut() {
                Some((of, sides)) if of.id == policy.id && sides.iter().all(|(side, _)| *side != direction) => {
                    sides.push((direction, rules));
                }
                _ => objects.push((policy, vec![(direction, rules)])),
            }
        }
        let ordered = objects.windows(2).all(|pair| pair[0].0.priority < pair[1].0.priority);
        let renumbered = !ordered || priorities.iter().any(|priority| *priority > MAX_PRIORITY);
        for (number, (policy, sides)) in objects.into_iter().enumerate() {
            let priority = if renumbered { number } else { usize::from(policy.priority) };
            if priority > usize::from(MAX_PRIORITY) {
                self.omit(&policy.id, format!("more than 1001 objects in one tier: left out; {OPEN}"));
                continue;
            }
            let mut spec = json!({
                "tier": tier,
                "priority": priority,
                "subject": { "pods": {
                    "namespaceSelector": namespaces(&policy.subject.namespaces), "podSelector": selector(&policy.subject.pods),
                } },
            });
            for (direction, rules) in sides {
                spec[direction.as_str()] = rules.into();
            }
            let name = self.name("", &format!("{}-{}", policy.id.tier, policy.id.name));
            self.rendered.objects.push(json!({
                "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
                "metadata": { "name": name }, "spec": spec,
            }));
        }
    }

    /// The rules of a ClusterNetworkPolicy that one rule becomes.
    fn cluster_rule(&mut self, place: &str, rule: &Rule, direction: Direction) -> Vec<Value> {
        let (action, left) = match rule.action {
            Action::Allow => ("Accept", CLOSED),
            Action::Deny | Action::Reject => ("Deny", OPEN),
            Action::Pass => ("Pass", OPEN),
        };
        let expanded = self.expanded(place, rule, direction, left, true);
        expanded.iter().flat_map(|rule| self.accept(place, rule, direction, action, left)).collect()
    }

    /// The rules of a ClusterNetworkPolicy for one without groups and services.
    fn accept(&mut self, place: &str, rule: &Rule, direction: Direction, action: &str, left: &str) -> Vec<Value> {
        let (mut pods, mut networks): (Vec<Value>, Vec<Value>) = (Vec::new(), Vec::new());
        match (&rule.peers, direction) {
            (Peers::Any, Direction::Ingress) => {
                pods.push(json!({ "namespaces": {} }));
                self.omit(place, format!("peers that are no pods; {left}"));
            }
            (Peers::Any, Direction::Egress) => {
                networks.extend(["0.0.0.0/0", "::/0"].map(|cidr| json!({ "networks": [cidr] })))
            }
            (Peers::OneOf(wanted), _) => {
                for peer in wanted {
                    match (peer, direction) {
                        (Peer::Pods(wanted), _) => pods.push(json!({ "pods": {
                            "namespaceSelector": namespaces(&wanted.namespaces), "podSelector": selector(&wanted.pods),
                        } })),
                        (Peer::Block(block), Direction::Egress) => {
                            let around = whole(block).map(|(cidr, except)| around(cidr, &except)).unwrap_or_default();
                            networks.extend(around.iter().map(|cidr| json!({ "networks": [cidr] })));
                        }
                        // There the labels of all nodes are known, and more would be allowed.
                        (Peer::Nodes(wanted), Direction::Egress)
                            if rule.action == Action::Allow && self.are_nodes_unknown() =>
                        {
                            networks.extend(self.nodes(wanted).map(|cidr| json!({ "networks": [cidr] })));
                        }
                        (Peer::Nodes(wanted), Direction::Egress) => networks.push(json!({ "nodes": selector(wanted) })),
                        (Peer::Name(pattern), Direction::Egress) => {
                            networks.push(json!({ "domainNames": [pattern.to_string()] }));
                        }
                        (
                            Peer::Block(_)
                            | Peer::Nodes(_)
                            | Peer::Group(_)
                            | Peer::Clusters(_)
                            | Peer::Service(_)
                            | Peer::Name(_),
                            _,
                        ) => {
                            self.omit(place, format!("a peer that is no pod; {left}"));
                        }
                    }
                }
            }
        }
        let (mut numbers, mut named) = (Vec::new(), Vec::new());
        if let Ports::OneOf(wanted) = &rule.ports {
            for port in wanted {
                self.service(place, port, left, &mut numbers, &mut named, wanted);
            }
        }
        let mut rules = Vec::new();
        let mut add = |peers: &[Value], services: Option<&[Value]>| {
            for peers in peers.chunks(LONGEST) {
                let field = if direction == Direction::Ingress { "from" } else { "to" };
                match services {
                    None => rules.push(json!({ "action": action, field: peers })),
                    Some(services) => rules.extend(
                        services
                            .chunks(LONGEST)
                            .map(|services| json!({ "action": action, field: peers, "protocols": services })),
                    ),
                }
            }
        };
        if rule.ports == Ports::Any {
            add(&[pods, networks].concat(), None);
            return rules;
        }
        add(&[pods.clone(), networks.clone()].concat(), Some(&numbers));
        add(&pods, Some(&named));
        if !named.is_empty() && !networks.is_empty() {
            self.omit(place, format!("names of ports with prefixes; {left}"));
        }
        rules
    }

    fn service(
        &mut self,
        place: &str,
        PortMatch { protocol, port }: &PortMatch,
        left: &str,
        numbers: &mut Vec<Value>,
        named: &mut Vec<Value>,
        all: &[PortMatch],
    ) {
        let Some(name) = transport(*protocol) else {
            return self.omit(place, format!("protocol {protocol}; {left}"));
        };
        let (first, last) = match port {
            PortSpec::Any => (0, u16::MAX),
            PortSpec::Range { first, last } => (*first, *last),
            PortSpec::Named(port) => {
                let of = |protocol| PortMatch { protocol, port: PortSpec::Named(port.clone()) };
                let transports = [Protocol::TCP, Protocol::UDP, Protocol::SCTP].into_iter();
                let mut others = transports.filter(|other| !all.contains(&of(*other)));
                let ports = self.cluster.pods.values().flat_map(|pod| &pod.ports);
                let item = json!({ "destinationNamedPort": port });
                if others.any(|other| ports.clone().any(|named| named.name == *port && named.protocol == other)) {
                    let reason =
                        format!("name {port} of {protocol} ports, which pods use for another protocol, too; {left}");
                    self.omit(place, reason);
                } else if !named.contains(&item) {
                    named.push(item);
                }
                return;
            }
        };
        if first == 0 {
            self.omit(place, format!("port 0 of {protocol}; {left}"));
        }
        let first = first.max(1);
        if first < last {
            numbers.push(json!({ name: { "destinationPort": { "range": { "start": first, "end": last } } } }));
        } else if first == last {
            numbers.push(json!({ name: { "destinationPort": { "number": first } } }));
        }
    }

    /// The addresses of nodes that are known to have the labels.
    fn nodes(&self, wanted: &LabelSelector) -> impl Iterator<Item = IpNet> {
        let labels = &self.cluster.catalog.node_labels;
        let known = |name| labels.get(name).is_some_and(|labels| selector_holds(wanted, labels));
        let nodes = self.cluster.addresses_of_nodes().filter(move |(name, _)| known(*name));
        nodes.flat_map(|(_, addresses)| addresses).map(|address| IpNet::from(*address))
    }

    /// Whether there are nodes whose labels nobody gave: rules that deny or pass hold here for them, or for everybody.
    fn are_nodes_unknown(&self) -> bool {
        let labels = &self.cluster.catalog.node_labels;
        labels.is_empty() || self.cluster.addresses_of_nodes().any(|(node, _)| !labels.contains_key(node))
    }

    fn selects(&self, wanted: &NamespaceMatch, name: &str) -> bool {
        match wanted {
            NamespaceMatch::Named(wanted) => wanted == name,
            NamespaceMatch::Selected(selector) => selector_holds(selector, &self.cluster.namespace_labels(name)),
        }
    }
}

/// As a rule that does not hold, in a cluster as it is now.
fn matches_nobody(rule: &Rule) -> bool {
    matches!(&rule.peers, Peers::OneOf(peers) if peers.is_empty())
}

/// Whether Kubernetes has words for it: service accounts are no labels there.
fn is_sayable(PodMatch { pods, .. }: &PodMatch) -> bool {
    pods.requirements.iter().all(|requirement| requirement.key != SERVICE_ACCOUNT_LABEL)
}

fn transport(protocol: Protocol) -> Option<&'static str> {
    match protocol {
        Protocol::TCP => Some("tcp"),
        Protocol::UDP => Some("udp"),
        Protocol::SCTP => Some("sctp"),
        _ => None,
    }
}

fn selector(selector: &LabelSelector) -> Value {
    let expressions = selector.requirements.iter().map(|requirement| {
        let key = &requirement.key;
        match &requirement.operator {
            Operator::In(values) => json!({ "key": key, "operator": "In", "values": values }),
            Operator::NotIn(values) => json!({ "key": key, "operator": "NotIn", "values": values }),
            Operator::Exists => json!({ "key": key, "operator": "Exists" }),
            Operator::DoesNotExist => json!({ "key": key, "operator": "DoesNotExist" }),
        }
    });
    let expressions: Vec<Value> = expressions.collect();
    if expressions.is_empty() { json!({}) } else { json!({ "matchExpressions": expressions }) }
}

fn namespaces(wanted: &NamespaceMatch) -> Value {
    match wanted {
        NamespaceMatch::Named(name) => json!({ "matchLabels": { NAMESPACE_NAME_LABEL: name } }),
        NamespaceMatch::Selected(wanted) => selector(wanted),
    }
}

/// A prefix with the exceptions that are strictly inside it; none where one covers it.
fn whole(IpBlock { cidr, except }: &IpBlock) -> Option<(IpNet, Vec<IpNet>)> {
    let cidr = cidr.trunc();
    if except.iter().any(|hole| hole.contains(&cidr)) {
        return None;
    }
    Some((cidr, except.iter().map(IpNet::trunc).filter(|hole| cidr.contains(hole)).collect()))
}

/// The prefixes of all that is left of one.
fn around(cidr: IpNet, except: &[IpNet]) -> Vec<IpNet> {
    if except.iter().any(|hole| hole.contains(&cidr)) {
        return Vec::new();
    }
    let inside: Vec<IpNet> = except.iter().copied().filter(|hole| cidr.contains(hole)).collect();
    match (inside.is_empty(), cidr.subnets(cidr.prefix_len() + 1)) {
        (false, Ok(halves)) => halves.flat_map(|half| around(half, &inside)).collect(),
        _ => vec![cidr],
    }
}

/// The most rules, peers and services of a list in a ClusterNetworkPolicy.
const LONGEST: usize = 25;
const MAX_PRIORITY: u16 = 1000;
/// What becomes of what a rule that allows would have allowed.
const CLOSED: &str = "closed";
/// What becomes of what others would have denied or passed.
const OPEN: &str = "open to what is behind";
