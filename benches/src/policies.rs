//! Clusters and policies of any size, the same each time.

use std::net::IpAddr;

use dcenet_policy::model::{
    Action, Cluster, IpBlock, LabelSelector, Mode, NamespaceMatch, Operator, Peer, Peers, Pod, PodId, PodMatch, Policy,
    PolicyId, PortMatch, PortSpec, Ports, Protocol, Requirement, Rule,
};
use ipnet::{IpNet, Ipv4Net};

/// SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }
}

/// The namespace of the pods of [`one_subject`].
pub const NAMESPACE: &str = "bench";

/// The pod under policy.
pub fn subject() -> PodId {
    PodId::new(NAMESPACE, "subject")
}

/// A requirement that a label has this value.
pub fn label(key: &str, value: usize) -> LabelSelector {
    let operator = Operator::In([format!("v{value}")].into());
    LabelSelector { requirements: vec![Requirement { key: key.to_owned(), operator }] }
}

/// Both addresses of the peer of this number.
pub fn addresses(number: usize) -> [IpAddr; 2] {
    let number = number as u32;
    let v4 = std::net::Ipv4Addr::from(0x0a00_0000 + number);
    let v6 = std::net::Ipv6Addr::from((0xfd00_u128 << 112) + u128::from(number));
    [v4.into(), v6.into()]
}

fn allow(peer: Peer, protocol: Protocol, first: u16, last: u16) -> Rule {
    let port = PortSpec::Range { first, last };
    Rule {
        action: Action::Allow,
        peers: Peers::OneOf(vec![peer]),
        ports: Ports::OneOf(vec![PortMatch { protocol, port }]),
        schedule: None,
        log: false,
    }
}

fn block(cidr: IpNet) -> Peer {
    Peer::Block(IpBlock { cidr, except: Vec::new() })
}

fn pods(selector: LabelSelector) -> Peer {
    Peer::Pods(PodMatch { namespaces: NamespaceMatch::Named(NAMESPACE.to_owned()), pods: selector })
}

/// A policy on ingress of the one pod.
pub fn policy(rules: Vec<Rule>) -> Policy {
    Policy {
        id: PolicyId::new(NAMESPACE, "many"),
        priority: 0,
        mode: Mode::Enforce,
        subject: PodMatch {
            namespaces: NamespaceMatch::Named(NAMESPACE.to_owned()),
            pods: LabelSelector {
                requirements: vec![Requirement { key: "subject".into(), operator: Operator::Exists }],
            },
        },
        ingress: Some(rules),
        egress: None,
    }
}

/// The pod under policy, and peers by their group, of so many groups.
pub fn one_subject(peers: usize, groups: usize) -> Cluster {
    let mut cluster = Cluster::default();
    cluster.insert_namespace(NAMESPACE, []);
    cluster.pods.insert(subject(), Pod::new([("subject", "")], ["192.0.2.1", "2001:db8::1"].map(address)));
    for number in 0..peers {
        let group = format!("v{}", number % groups.max(1));
        let pod = Pod::new([("group", group.as_str())], addresses(number));
        cluster.pods.insert(PodId::new(NAMESPACE, format!("p{number}")), pod);
    }
    cluster
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Ports that rules of [`by_group`] use.
const PORTS: usize = 30_000;

/// Which group of peers and which TCP port a rule of [`by_group`] allows.
pub fn allowed(rule: usize, groups: usize) -> (usize, u16) {
    (rule % groups.max(1), (1000 + 2 * (rule % PORTS)) as u16)
}

/// As a cluster's policies are: rules for groups of pods, each with a port.
pub fn by_group(rules: usize, groups: usize) -> Vec<Rule> {
    let rule = |number| {
        let (group, port) = allowed(number, groups);
        allow(pods(label("group", group)), Protocol::TCP, port, port)
    };
    (0..rules).map(rule).collect()
}

/// As filters of ClassBench are (Taylor and Turner, 2007): prefixes of many lengths, most long, nested in few short ones;
/// ports that are any, the high ones, single ones or ranges.
pub fn by_prefix(rules: usize) -> Vec<Rule> {
    let mut random = Random::new(11);
    let rule = |_| {
        let length = [8, 16, 16, 20, 22, 24, 24, 24, 24, 26, 28, 30, 32, 32, 32, 32][random.below(16)];
        // A few networks of which all others are parts.
        let network = (random.below(40) as u32) << 24 | (random.below(64) as u32) << 16 | random.below(1 << 16) as u32;
        let cidr = Ipv4Net::new_assert(network.into(), length).trunc().into();
        let protocol = if random.below(4) == 0 { Protocol::UDP } else { Protocol::TCP };
        let (first, last) = match random.below(10) {
            0 => (0, u16::MAX),
            1 => (1024, u16::MAX),
            2 => {
                let first = random.below(60_000) as u16;
                (first, first + random.below(5_000) as u16)
            }
            _ => {
                let port = [22, 25, 53, 80, 123, 161, 443, 1521, 3306, 5432, 6379, 8080][random.below(12)];
                (port, port)
            }
        };
        allow(block(cidr), protocol, first, last)
    };
    (0..rules).map(rule).collect()
}

/// So that as much overlaps as the arms of a diagram allow: eight chains of five prefixes, one in the other, and for each
/// prefix ranges of ports of which every one holds those before it, so that each rule decides something. At most 100,000.
pub fn overlapping(rules: usize) -> Vec<Rule> {
    let rule = |number: usize| {
        let (prefix, step) = (number % 40, (number / 40) as u16);
        let (chain, depth) = (prefix as u32 / 5, prefix as u8 % 5);
        let cidr = Ipv4Net::new_assert(((11 + chain) << 24).into(), 8 + 4 * depth).into();
        let widened = 12 * step + prefix as u16;
        allow(block(cidr), Protocol::TCP, 32_000 - widened, 33_000 + widened)
    };
    (0..rules.min(100_000)).map(rule).collect()
}

/// 50 namespaces; each policy has two rules in each direction and governs about one in ten pods of its namespace.
pub fn large(policies: usize, pods: usize) -> Cluster {
    let mut random = Random::new(1);
    let mut cluster = Cluster::default();
    for namespace in 0..50 {
        let team = format!("v{}", namespace % 5);
        cluster.insert_namespace(format!("ns{namespace}"), [("team", team.as_str())]);
    }
    for number in 0..pods {
        let labels = [("app", format!("v{}", random.below(10))), ("tier", format!("v{}", random.below(4)))];
        let labels = labels.each_ref().map(|(key, value)| (*key, value.as_str()));
        let pod = Pod::new(labels, [addresses(number)[0]]);
        cluster.pods.insert(PodId::new(format!("ns{}", number % 50), format!("p{number}")), pod);
    }
    for number in 0..policies {
        let namespace = format!("ns{}", number % 50);
        let mut rule = || {
            let peer = match random.below(4) {
                0 => block(Ipv4Net::new_assert((0x0a00_0000 | (random.below(256) as u32) << 8).into(), 24).into()),
                1 => Peer::Pods(PodMatch {
                    namespaces: NamespaceMatch::Selected(label("team", random.below(5))),
                    pods: label("app", random.below(10)),
                }),
                _ => Peer::Pods(PodMatch {
                    namespaces: NamespaceMatch::Named(namespace.clone()),
                    pods: label("app", random.below(10)),
                }),
            };
            let first = random.below(60_000) as u16;
            allow(peer, Protocol::TCP, first, first + random.below(10) as u16)
        };
        let (ingress, egress) = (vec![rule(), rule()], vec![rule(), rule()]);
        cluster.insert_policy(Policy {
            id: PolicyId::new(namespace.clone(), format!("policy{number}")),
            priority: 0,
            mode: Mode::Enforce,
            subject: PodMatch { namespaces: NamespaceMatch::Named(namespace), pods: label("app", random.below(10)) },
            ingress: Some(ingress),
            egress: Some(egress),
        });
    }
    cluster
}
