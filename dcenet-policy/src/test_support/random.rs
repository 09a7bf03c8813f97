//! Clusters in which much overlaps, and packets that meet the edges.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::Rng;
use crate::classes::{selector_holds, selector_may_hold};
use crate::flatten;
use crate::model::{
    Action, Backend, CLUSTER_NAME_LABEL, CLUSTER_SET_LABEL, Catalog, Cluster, ClusterSpec, Direction, DomainName,
    IpBlock, LabelSelector, Labels, Mode, NamePattern, NamedPort, Names, NamespaceMatch, Operator, Peer, Peers, Pod,
    PodId, PodMatch, PodNetwork, Policy, PolicyId, PortMatch, PortSpec, Ports, Protocol, Requirement, Rule,
    SERVICE_ACCOUNT_LABEL, Schedule, ServiceId, Tier, TierEnd, TierSpec, Time, Tuple, Window,
};

const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const KEYS: [&str; 3] = ["app", "tier", "team"];
const VALUES: [&str; 3] = ["a", "b", "c"];
/// With their places: before admin, between admin and NetworkPolicy, before and after baseline.
const TIERS: [(&str, u16); 4] = [("first", 500), ("second", 1500), ("third", 2500), ("last", 3500)];
/// With their sets.
const CLUSTERS: [(&str, &str); 3] = [("west", "prod"), ("east", "prod"), ("lab", "test")];
const GROUPS: [&str; 2] = ["partners", "lists"];
const SCHEDULES: [&str; 2] = ["odd", "even"];
const SERVICES: [&str; 2] = ["db", "dns"];
const NAMES: [&str; 5] = ["a.example.com", "b.example.com", "c.b.example.com", "example.com", "d.example.org"];
const NODES: [&str; 2] = ["n1", "n2"];
const PORT_NAMES: [&str; 2] = ["web", "dns"];
const PORTED: [Protocol; 3] = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];
const EDGES: [u16; 9] = [0, 1, 53, 80, 81, 443, 8080, 65534, 65535];

/// A cluster of up to three namespaces, two nodes, ten pods, eight policies of namespaces and five of the cluster, and now
/// and then one that is tried out.
pub fn cluster(rng: &mut Rng) -> Cluster {
    let mut cluster = Cluster::default();
    for name in &NAMESPACES[..1 + rng.below(3)] {
        cluster.insert_namespace(*name, []);
        if let Some(known) = cluster.namespaces.get_mut(*name) {
            known.extend(labels(rng));
        }
    }
    for (node, number) in NODES.iter().zip(1_u8..) {
        let addresses = [v4(rng, 200 + number), v6(u16::from(number) << 8)];
        cluster.nodes.insert((*node).to_owned(), addresses.into());
    }
    for number in 1..=2 + rng.below(9) as u8 {
        let mut pod = Pod { labels: labels(rng), ..Pod::default() };
        pod.addresses.insert(v4(rng, number));
        if rng.chance(70) {
            pod.addresses.insert(v6(u16::from(number)));
        }
        if rng.chance(80) {
            pod.node = Some((*rng.pick(&NODES)).to_owned());
        }
        if rng.chance(5) {
            pod.network = PodNetwork::Host;
            pod.addresses = pod.node.as_ref().and_then(|node| cluster.nodes.get(node)).cloned().unwrap_or_default();
        }
        for _ in 0..rng.below(4) {
            let (name, protocol, port) = ((*rng.pick(&PORT_NAMES)).to_owned(), *rng.pick(&PORTED), *rng.pick(&EDGES));
            pod.ports.insert(NamedPort { name, protocol, port });
        }
        cluster.pods.insert(PodId::new(*rng.pick(&NAMESPACES), format!("pod{number}")), pod);
    }
    for number in 0..1 + rng.below(8) {
        let policy = policy(rng, number);
        cluster.insert_policy(policy);
    }
    catalog(rng, &mut cluster);
    for (name, order) in TIERS {
        if rng.chance(5) {
            continue;
        }
        let end = if rng.chance(75) { TierEnd::Pass } else { TierEnd::Deny };
        cluster.catalog.tiers.insert(name.to_owned(), TierSpec { order, end });
    }
    for number in 0..rng.below(6) {
        let policy = cluster_policy(rng, number);
        cluster.insert_policy(policy);
    }
    if rng.chance(35) {
        let policy = if rng.chance(60) { cluster_policy(rng, 9) } else { policy(rng, 9) };
        cluster.insert_policy(Policy { mode: Mode::Audit, ..policy });
    }
    cluster
}

/// Groups, clusters, schedules, labels of nodes, names, and services; now and then one is missing.
fn catalog(rng: &mut Rng, cluster: &mut Cluster) {
    for name in GROUPS {
        if rng.chance(85) {
            let blocks = (0..rng.below(4)).map(|_| block(rng)).collect();
            cluster.catalog.groups.insert(name.to_owned(), blocks);
        }
    }
    for node in NODES {
        if rng.chance(80) {
            cluster.catalog.node_labels.insert(node.to_owned(), labels(rng));
        }
        if rng.chance(30) {
            // Now and then of both.
            let number = 210 + rng.below(2) as u8;
            cluster.catalog.external_addresses.insert(node.to_owned(), [Ipv4Addr::new(10, 0, 0, number).into()].into());
        }
    }
    for (name, set) in CLUSTERS {
        if rng.chance(70) {
            let own =
                [(CLUSTER_NAME_LABEL, name), (CLUSTER_SET_LABEL, set)].map(|(key, of)| (key.to_owned(), of.to_owned()));
            let labels = labels(rng).into_iter().chain(own).collect();
            let blocks = (0..rng.below(3)).map(|_| block(rng)).collect();
            cluster.catalog.clusters.insert(name.to_owned(), ClusterSpec { labels, blocks });
        }
    }
    for (name, days) in [("odd", 0b101_0101), ("even", 0b010_1010)] {
        if rng.chance(90) {
            let windows = vec![Window { days, from: 360, until: 360 }];
            cluster.catalog.schedules.insert(name.to_owned(), Schedule { offset: 60, windows });
        }
    }
    for _ in 0..rng.below(10) {
        change_a_name(rng, &mut cluster.names);
    }
    cluster.time = rng.chance(90).then(|| rng.below(1_000_000) as Time * 60);
    for name in SERVICES {
        if rng.chance(90) {
            let backends = backends(rng, 1);
            cluster.catalog.services.insert(ServiceId::new("x", name), backends);
        }
        if rng.chance(90) {
            let addresses = backends(rng, 100);
            cluster.catalog.service_addresses.insert(ServiceId::new("x", name), addresses);
        }
    }
}

fn backends(rng: &mut Rng, first: u8) -> BTreeSet<Backend> {
    let mut found = BTreeSet::new();
    for _ in 0..rng.below(4) {
        let host = first + rng.below(10) as u8;
        let (address, protocol) = (v4(rng, host), *rng.pick(&PORTED));
        let port = if rng.chance(90) { Some(*rng.pick(&EDGES)) } else { None };
        found.insert(Backend { address, protocol, port });
    }
    found
}

fn listening<'a>(cluster: &'a Cluster, id: &ServiceId) -> impl Iterator<Item = IpAddr> + use<'a> {
    let Catalog { services, service_addresses, .. } = &cluster.catalog;
    let all = [services.get(id), service_addresses.get(id)].into_iter().flatten().flatten();
    all.map(|backend| backend.address)
}

/// Gives service accounts to some pods, and lets policies ask for them.
pub fn ask_for_accounts(rng: &mut Rng, cluster: &mut Cluster) {
    for pod in cluster.pods.values_mut() {
        if rng.chance(60) {
            pod.labels.insert(SERVICE_ACCOUNT_LABEL.to_owned(), (*rng.pick(&VALUES)).to_owned());
        }
    }
    for policy in cluster.policies.values_mut() {
        let Policy { subject, ingress, egress, .. } = policy;
        let rules = [ingress, egress].into_iter().flatten().flatten();
        let peers = rules.filter_map(|rule| match &mut rule.peers {
            Peers::OneOf(peers) => Some(peers),
            Peers::Any => None,
        });
        let of_peers = peers.flatten().filter_map(|peer| match peer {
            Peer::Pods(wanted) => Some(wanted),
            _ => None,
        });
        for wanted in of_peers.chain([subject]) {
            if rng.chance(30) {
                let requirement = Requirement { key: SERVICE_ACCOUNT_LABEL.to_owned(), operator: operator(rng) };
                wanted.pods.requirements.push(requirement);
            }
        }
    }
}

/// Lets pods claim addresses of others.
pub fn claim_twice(rng: &mut Rng, cluster: &mut Cluster) {
    let mut own: Vec<&mut Pod> = cluster.pods.values_mut().filter(|pod| pod.network == PodNetwork::Own).collect();
    for _ in 0..own.len().min(3) {
        let taken = own[rng.below(own.len())].addresses.clone();
        let claimant = rng.below(own.len());
        own[claimant].addresses.extend(taken);
    }
}

/// Every address that the cluster's verdicts can depend on: of pods and nodes, both ends of each block and
/// exception with their neighbours, and strangers.
pub fn addresses(cluster: &Cluster) -> Vec<IpAddr> {
    let mut found: BTreeSet<IpAddr> = cluster.pods.values().flat_map(|pod| pod.addresses.iter().copied()).collect();
    found.extend(cluster.nodes.values().chain(cluster.catalog.external_addresses.values()).flatten());
    found.extend(cluster.names.iter().flat_map(|(_, learnt)| learnt.keys()));
    found.extend(["192.0.2.1", "2001:db8::1"].into_iter().filter_map(|text| text.parse::<IpAddr>().ok()));
    for policy in cluster.policies.values() {
        for rule in Direction::ALL.into_iter().filter_map(|direction| policy.rules(direction)).flatten() {
            let Peers::OneOf(peers) = &rule.peers else { continue };
            for peer in peers {
                let blocks = match peer {
                    Peer::Block(block) => std::slice::from_ref(block),
                    Peer::Group(name) => cluster.catalog.groups.get(name).map(Vec::as_slice).unwrap_or_default(),
                    Peer::Clusters(_) => {
                        let all = cluster.catalog.clusters.values().flat_map(|known| &known.blocks);
                        let prefixes = all.flat_map(|block| [&block.cidr].into_iter().chain(&block.except));
                        prefixes.for_each(|prefix| found.extend(prefix_edges(prefix)));
                        &[]
                    }
                    Peer::Service(id) => {
                        found.extend(listening(cluster, id));
                        &[]
                    }
                    Peer::Pods(_) | Peer::Nodes(_) | Peer::Name(_) => &[],
                };
                for IpBlock { cidr, except } in blocks {
                    [cidr].into_iter().chain(except).for_each(|prefix| found.extend(prefix_edges(prefix)));
                }
            }
        }
    }
    found.into_iter().collect()
}

/// Packets, most of them aimed at a rule: its peers and the edges of its ports.
pub fn tuples(rng: &mut Rng, cluster: &Cluster, count: usize) -> Vec<(PodId, Tuple)> {
    let strangers = addresses(cluster);
    let own: Vec<(&PodId, &Pod)> = cluster.pods.iter().filter(|(_, pod)| pod.network == PodNetwork::Own).collect();
    let mut targets = Vec::new();
    for (id, pod) in &own {
        for policy in cluster.policies.values().filter(|policy| selected(cluster, &policy.subject, id, pod)) {
            for direction in Direction::ALL {
                let rules = policy.rules(direction).unwrap_or_default().iter();
                let there = rules.filter(|rule| flatten::action_now(cluster, rule).is_some());
                // Rules that decide are met more often than those that are tried out.
                let weight = if policy.mode == Mode::Enforce { 3 } else { 1 };
                let aims = there.flat_map(|rule| std::iter::repeat_n((*id, *pod, direction, rule), weight));
                targets.extend(aims);
            }
        }
    }
    let mut found = Vec::with_capacity(count);
    while found.len() < count && !own.is_empty() {
        if targets.is_empty() || rng.chance(5) {
            let (protocol, port) = service(rng);
            let direction = *rng.pick(&Direction::ALL);
            let tuple = Tuple { direction, peer: *rng.pick(&strangers), protocol, port };
            found.push((rng.pick(&own).0.clone(), tuple));
            continue;
        }
        let (id, pod, direction, rule) = *rng.pick(&targets);
        let peer = match &rule.peers {
            Peers::OneOf(peers) if !peers.is_empty() && rng.chance(90) => aim(rng, cluster, peers, &own),
            _ => None,
        };
        let peer = peer.unwrap_or_else(|| *rng.pick(&strangers));
        let (protocol, port) = match &rule.ports {
            Ports::OneOf(ports) if !ports.is_empty() && rng.chance(95) => {
                let PortMatch { protocol, port } = rng.pick(ports);
                let destination = match direction {
                    Direction::Ingress => Some(pod),
                    Direction::Egress => own.iter().map(|(_, pod)| *pod).find(|pod| pod.addresses.contains(&peer)),
                };
                (*protocol, aim_port(rng, port, destination, *protocol))
            }
            _ => service(rng),
        };
        found.push((id.clone(), Tuple { direction, peer, protocol, port }));
    }
    found
}

fn aim(rng: &mut Rng, cluster: &Cluster, peers: &[Peer], own: &[(&PodId, &Pod)]) -> Option<IpAddr> {
    let edge = |rng: &mut Rng, IpBlock { cidr, except }: &IpBlock| {
        let prefix = match except.is_empty() || rng.chance(60) {
            true => cidr,
            false => rng.pick(except),
        };
        let edges = prefix_edges(prefix);
        if edges.is_empty() { None } else { Some(*rng.pick(&edges)) }
    };
    match rng.pick(peers) {
        Peer::Block(block) => edge(rng, block),
        Peer::Group(name) => match cluster.catalog.groups.get(name) {
            Some(blocks) if !blocks.is_empty() => {
                let block = rng.pick(blocks);
                edge(rng, block)
            }
            _ => None,
        },
        Peer::Clusters(wanted) => {
            let known = cluster.catalog.clusters.values().filter(|known| selector_holds(wanted, &known.labels));
            let blocks: Vec<&IpBlock> = known.flat_map(|known| &known.blocks).collect();
            if blocks.is_empty() {
                return None;
            }
            let block = *rng.pick(&blocks);
            edge(rng, block)
        }
        Peer::Nodes(_) => {
            let all = cluster.nodes.values().chain(cluster.catalog.external_addresses.values());
            let addresses: Vec<IpAddr> = all.flatten().copied().collect();
            if addresses.is_empty() { None } else { Some(*rng.pick(&addresses)) }
        }
        Peer::Name(_) => {
            let addresses: Vec<IpAddr> = cluster.names.iter().flat_map(|(_, learnt)| learnt.keys().copied()).collect();
            if addresses.is_empty() { None } else { Some(*rng.pick(&addresses)) }
        }
        Peer::Service(id) => {
            let addresses: Vec<IpAddr> = listening(cluster, id).collect();
            if addresses.is_empty() { None } else { Some(*rng.pick(&addresses)) }
        }
        Peer::Pods(wanted) => {
            let members: Vec<IpAddr> = own
                .iter()
                .filter(|(id, pod)| selected(cluster, wanted, id, pod))
                .flat_map(|(_, pod)| pod.addresses.iter().copied())
                .collect();
            if members.is_empty() { None } else { Some(*rng.pick(&members)) }
        }
    }
}

fn aim_port(rng: &mut Rng, port: &PortSpec, destination: Option<&Pod>, protocol: Protocol) -> u16 {
    match port {
        PortSpec::Any => *rng.pick(&EDGES),
        PortSpec::Range { first, last } => {
            let edges = [first.saturating_sub(1), *first, *first, *last, *last, last.saturating_add(1)];
            *rng.pick(&edges)
        }
        PortSpec::Named(name) => {
            let same = |port: &&NamedPort| port.name == *name && port.protocol == protocol;
            let named = destination.into_iter().flat_map(|pod| pod.ports.iter().filter(same)).next();
            named.map_or(80, |named| named.port)
        }
    }
}

fn service(rng: &mut Rng) -> (Protocol, u16) {
    let protocol = match rng.below(10) {
        0..=3 => Protocol::TCP,
        4..=5 => Protocol::UDP,
        6 => Protocol::SCTP,
        7 => Protocol::ICMP,
        8 => Protocol::ICMPV6,
        _ => Protocol(*rng.pick(&[0, 5, 7, 47, 131, 133, 255])),
    };
    let port = if protocol.has_ports() { *rng.pick(&EDGES) } else { 0 };
    (protocol, port)
}

fn selected(cluster: &Cluster, wanted: &PodMatch, id: &PodId, pod: &Pod) -> bool {
    let here = match &wanted.namespaces {
        NamespaceMatch::Named(name) => *name == id.namespace,
        NamespaceMatch::Selected(selector) => selector_holds(selector, &cluster.namespace_labels(&id.namespace)),
    };
    here && selector_may_hold(&wanted.pods, &pod.labels)
}

fn policy(rng: &mut Rng, number: usize) -> Policy {
    let namespace = *rng.pick(&NAMESPACES);
    let namespaces = match rng.chance(30) {
        true => NamespaceMatch::Selected(selector(rng)),
        false => NamespaceMatch::Named(namespace.to_owned()),
    };
    let mut rules =
        |percent| rng.chance(percent).then(|| (0..1 + rng.below(3)).map(|_| rule(rng, namespace)).collect());
    let (ingress, egress) = (rules(80), rules(60));
    Policy {
        id: PolicyId::new(namespace, format!("policy{number}")),
        priority: 0,
        mode: Mode::Enforce,
        subject: PodMatch { namespaces, pods: selector(rng) },
        ingress,
        egress,
    }
}

/// One of the tiers around the namespaces', with priorities that meet.
fn cluster_policy(rng: &mut Rng, number: usize) -> Policy {
    let Policy { mut subject, mut ingress, mut egress, .. } = policy(rng, number);
    if let NamespaceMatch::Named(_) = subject.namespaces {
        subject.namespaces = NamespaceMatch::Selected(LabelSelector::default());
    }
    for rule in [&mut ingress, &mut egress].into_iter().flatten().flatten() {
        rule.action = *rng.pick(&[Action::Allow, Action::Allow, Action::Deny, Action::Reject, Action::Pass]);
    }
    let tier = match rng.below(10) {
        0..=5 => Tier::Admin,
        6..=7 => Tier::Baseline,
        // Where it is known which there are.
        _ => Tier::Named(rng.pick(&TIERS).0.to_owned()),
    };
    let id = PolicyId::cluster(tier, format!("policy{number}"));
    Policy { id, priority: rng.below(3) as u16, mode: Mode::Enforce, subject, ingress, egress }
}

fn rule(rng: &mut Rng, namespace: &str) -> Rule {
    let peers = match rng.chance(15) {
        true => Peers::Any,
        false => Peers::OneOf((0..1 + rng.below(3)).map(|_| peer(rng, namespace)).collect()),
    };
    let ports = match rng.chance(25) {
        true => Ports::Any,
        false => Ports::OneOf((0..1 + rng.below(3)).map(|_| port(rng)).collect()),
    };
    let schedule = rng.chance(6).then(|| (*rng.pick(&SCHEDULES)).to_owned());
    Rule {
        action: if rng.chance(20) { Action::Deny } else { Action::Allow },
        peers,
        ports,
        schedule,
        log: rng.chance(20),
    }
}

fn peer(rng: &mut Rng, namespace: &str) -> Peer {
    match rng.below(20) {
        0..=6 => return Peer::Block(block(rng)),
        7..=8 => return Peer::Group((*rng.pick(&GROUPS)).to_owned()),
        9 => return Peer::Nodes(selector(rng)),
        11 => return Peer::Clusters(by_name(selector(rng))),
        12 => return Peer::Name(pattern(rng)),
        10 => return Peer::Service(ServiceId::new("x", *rng.pick(&SERVICES))),
        _ => {}
    }
    let namespaces = match rng.chance(50) {
        true => NamespaceMatch::Selected(selector(rng)),
        false => NamespaceMatch::Named(namespace.to_owned()),
    };
    Peer::Pods(PodMatch { namespaces, pods: selector(rng) })
}

fn pattern(rng: &mut Rng) -> NamePattern {
    let text = rng.pick(&[
        "a.example.com",
        "b.example.com",
        "c.b.example.com",
        "*.example.com",
        "*.b.example.com",
        "no.example.org",
    ]);
    text.parse().unwrap_or_else(|_| NamePattern::Below(name(NAMES[0])))
}

fn name(text: &str) -> DomainName {
    match text.parse() {
        Ok(name) => name,
        Err(error) => unreachable!("{error}"),
    }
}

/// Learns or forgets an address of a name; returns the address.
pub fn change_a_name(rng: &mut Rng, names: &mut Names) -> IpAddr {
    let address = if rng.chance(70) { v4_any(rng) } else { v6(rng.below(16) as u16) };
    let text = rng.pick::<&str>(&NAMES);
    let name = name(text);
    let learnt: Vec<IpAddr> = names.addresses(&name).into_iter().flat_map(|learnt| learnt.keys().copied()).collect();
    if !learnt.is_empty() && rng.chance(40) {
        let address = *rng.pick(&learnt);
        names.forget(&name, address);
        return address;
    }
    names.learn(name, address, 1000);
    address
}

fn block(rng: &mut Rng) -> IpBlock {
    let (address, lengths, step) = match rng.chance(70) {
        true => (v4_any(rng), &[0, 8, 22, 23, 24, 28, 31, 32][..], 4),
        false => (v6(rng.below(0x300) as u16), &[0, 32, 112, 118, 124, 127, 128][..], 3),
    };
    let cidr = prefix(address, *rng.pick(lengths));
    let mut except = Vec::new();
    for _ in 0..rng.below(3) {
        let inner = match (cidr, rng.chance(50)) {
            (IpNet::V4(_), true) => v4_any(rng),
            (IpNet::V6(_), true) => v6(rng.below(0x300) as u16),
            _ => cidr.addr(),
        };
        let hole = prefix(inner, (cidr.prefix_len() + 1 + rng.below(step) as u8).min(cidr.max_prefix_len()));
        if cidr.contains(&hole) && cidr != hole {
            except.push(hole);
        }
    }
    IpBlock { cidr, except }
}

fn port(rng: &mut Rng) -> PortMatch {
    let protocol = match rng.chance(10) {
        true => *rng.pick(&[Protocol::ICMP, Protocol::ICMPV6]),
        false => *rng.pick(&PORTED),
    };
    let port = match rng.below(10) {
        0 => PortSpec::Any,
        1..=2 => PortSpec::Named((*rng.pick(&PORT_NAMES)).to_owned()),
        _ => {
            let (one, other) = (*rng.pick(&EDGES), *rng.pick(&EDGES));
            PortSpec::Range { first: one.min(other), last: one.max(other) }
        }
    };
    PortMatch { protocol, port }
}

fn selector(rng: &mut Rng) -> LabelSelector {
    let count = *rng.pick(&[0, 0, 1, 1, 2]);
    let requirement = |_| Requirement { key: (*rng.pick(&KEYS)).to_owned(), operator: operator(rng) };
    LabelSelector { requirements: (0..count).map(requirement).collect() }
}

/// Some selectors ask for clusters by their names, which may not be given.
fn by_name(mut selector: LabelSelector) -> LabelSelector {
    if let [Requirement { key, operator: Operator::In(values) }] = &mut selector.requirements[..] {
        *key = CLUSTER_NAME_LABEL.to_owned();
        *values = VALUES
            .iter()
            .zip(CLUSTERS)
            .filter(|(of, _)| values.contains(**of))
            .map(|(_, (name, _))| name.to_owned())
            .collect();
    }
    selector
}

fn operator(rng: &mut Rng) -> Operator {
    let values: BTreeSet<String> = (0..1 + rng.below(2)).map(|_| (*rng.pick(&VALUES)).to_owned()).collect();
    match rng.below(6) {
        0 => Operator::Exists,
        1 => Operator::DoesNotExist,
        2 => Operator::NotIn(values),
        _ => Operator::In(values),
    }
}

fn labels(rng: &mut Rng) -> Labels {
    let mut labels = Labels::new();
    for key in KEYS {
        if rng.chance(75) {
            labels.insert(key.to_owned(), (*rng.pick(&VALUES)).to_owned());
        }
    }
    labels
}

fn v4(rng: &mut Rng, host: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, rng.below(4) as u8, host).into()
}

fn v4_any(rng: &mut Rng) -> IpAddr {
    Ipv4Addr::new(10, 0, rng.below(4) as u8, rng.below(16) as u8).into()
}

fn v6(low: u16) -> IpAddr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, low).into()
}

fn prefix(address: IpAddr, length: u8) -> IpNet {
    IpNet::new(address, length).unwrap_or_else(|_| IpNet::from(address)).trunc()
}

/// First and last address of a prefix, and the addresses just outside.
fn prefix_edges(prefix: &IpNet) -> Vec<IpAddr> {
    let (first, last) = (prefix.network(), prefix.broadcast());
    let outside = |address: IpAddr, up: bool| match address {
        IpAddr::V4(address) => {
            let bits = address.to_bits();
            let next = if up { bits.checked_add(1) } else { bits.checked_sub(1) };
            next.map(|bits| IpAddr::from(Ipv4Addr::from_bits(bits)))
        }
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            let next = if up { bits.checked_add(1) } else { bits.checked_sub(1) };
            next.map(|bits| IpAddr::from(Ipv6Addr::from_bits(bits)))
        }
    };
    [Some(first), Some(last), outside(first, false), outside(last, true)].into_iter().flatten().collect()
}
