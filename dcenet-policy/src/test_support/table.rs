//! Reachability tables: a cluster, its changes, and the verdicts that people expect, in one text file.
//!
//! The expectations are written by hand, so a table is an oracle for whatever can carry out its probes: the
//! evaluator, compiled programs in a simulator or in the kernel, real pods.
//!
//! ```text
//! # A comment.
//! == topology                       adds or replaces; all words after the name are optional
//! namespace x team=red
//! node n1 192.0.2.1 2001:db8::1
//! pod x/a app=web ip=10.0.1.1 ip=fd00:1::1 node=n1 port=http:tcp:80
//! node n1 kubernetes.io/os=linux     labels of a node that is there
//! pod x/s sa=robot ip=10.0.1.2       its service account
//! pod x/h host node=n1              uses its node's network and addresses
//! outside far 198.51.100.7          an address that nobody holds
//! remove x/a                        takes a pod away
//!
//! == apply                          policies in YAML, of any kind that is read; same name replaces
//! kind: NetworkPolicy
//! ...
//! == delete x/policy                or admin:policy
//!
//! == swap admin:policy egress 0 2   two rules of a policy
//!
//! == limit entries 6                for the whole file: what a compiler takes, see `Limits`
//! == refused                        what is beyond the limit from here on: policy, direction, pods; replaces
//! x/policy ingress x/a x/b
//!
//! == expect tcp/80                  rows open connections to columns
//!       x/a  x/b  far
//! x/a   -    .    X
//! n1    .    .    -
//! ```
//!
//! `.` is connected, `X` is not, `-` is not asked (a pod's traffic to itself never is: what policy means for it is
//! undefined upstream, <https://github.com/kubernetes/kubernetes/issues/95879>). Names in a table are pods, nodes
//! and outsiders. A probe is `tcp/PORT`, `udp/PORT`, `sctp/PORT`, `icmp` or `icmpv6` (echo request) or `proto/NUMBER`;
//! it runs in every address family that both ends have, ICMP in its own.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::compiler::Limits;
use crate::eval::Refused;
use crate::model::{
    Catalog, Cluster, Direction, NamedPort, Pod, PodId, PodNetwork, PolicyId, Protocol, SERVICE_ACCOUNT_LABEL, Tier,
    Tuple, Verdict,
};
use crate::sources::kubernetes::Documents;

/// A parsed file.
#[derive(Debug, Clone)]
pub struct Table {
    /// One for each `== expect`, in order.
    pub cases: Vec<Case>,
    /// What compilers of its clusters are to keep within.
    pub limits: Limits,
}

/// One matrix, with the cluster as it is then.
#[derive(Debug, Clone)]
pub struct Case {
    /// Line of the `== expect`, from 1.
    pub line: usize,
    /// The cluster.
    pub cluster: Cluster,
    /// Policies that are beyond the limits.
    pub refused: Refused,
    /// The probe's protocol.
    pub protocol: Protocol,
    /// The probe's port, as in [`Tuple`].
    pub port: u16,
    /// What is asked.
    pub probes: Vec<Probe>,
}

/// One cell of a matrix in one address family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Who opens the connection.
    pub source: End,
    /// To whom.
    pub destination: End,
    /// Whether it succeeds.
    pub expected: Verdict,
}

/// One end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The name in the table.
    pub name: String,
    /// The pod whose policy counts; none for nodes and outsiders.
    pub pod: Option<PodId>,
    /// The address used.
    pub address: IpAddr,
}

impl Probe {
    /// The questions whose answers must all be "allow" for the connection to succeed: egress of the source, ingress
    /// of the destination.
    pub fn questions(&self, protocol: Protocol, port: u16) -> Vec<(PodId, Tuple)> {
        let out = self.source.pod.clone().map(|pod| (pod, Tuple::egress(self.destination.address, protocol, port)));
        let inward = self.destination.pod.clone().map(|pod| (pod, Tuple::ingress(self.source.address, protocol, port)));
        out.into_iter().chain(inward).collect()
    }
}

/// A line that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct TableError {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

struct Section<'a> {
    number: usize,
    title: &'a str,
    lines: Vec<(usize, &'a str)>,
}

#[derive(Default)]
struct State {
    cluster: Cluster,
    refused: Refused,
    outside: BTreeMap<String, Vec<IpAddr>>,
}

impl Table {
    /// Reads a table.
    ///
    /// # Errors
    ///
    /// [`TableError`] at the first line that cannot be read.
    pub fn parse(text: &str) -> Result<Self, TableError> {
        let mut state = State::default();
        let (mut cases, mut limits) = (Vec::new(), Limits::default());
        let mut sections: Vec<Section<'_>> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            if let Some(title) = line.strip_prefix("== ") {
                sections.push(Section { number, title: title.trim(), lines: Vec::new() });
            } else if let Some(section) = sections.last_mut() {
                section.lines.push((number, line));
            } else if !line.trim().is_empty() && !line.starts_with('#') {
                return Err(error(number, "must come after a `== ` line"));
            }
        }
        for Section { number, title, lines } in sections {
            let words: Vec<&str> = title.split_whitespace().collect();
            match words[..] {
                ["topology"] => {
                    for (number, line) in meaningful(&lines) {
                        state.topology(line).map_err(|reason| error(number, &reason))?;
                    }
                }
                ["apply"] => {
                    let yaml: Vec<&str> = lines.iter().map(|(_, line)| *line).collect();
                    let read = Documents::default().with_yaml("apply", &yaml.join("\n"));
                    let read = read.map_err(|e| error(number, &e.to_string()))?;
                    let counts = [
                        read.unused.len(),
                        read.pods.len(),
                        read.left_out.len(),
                        read.namespaces.len(),
                        read.closed.len(),
                    ];
                    if counts != [0; 5] || (read.policies.is_empty() && read.catalog == Catalog::default()) {
                        return Err(error(number, "must hold policies or what they name, and nothing else"));
                    }
                    state.cluster.catalog.extend(read.catalog);
                    for policy in read.policies.into_values() {
                        state.cluster.insert_policy(policy);
                    }
                }
                ["delete", name] => {
                    let id = policy_id(name).ok_or_else(|| error(number, "must be ns/name or tier:name"))?;
                    let gone = state.cluster.policies.remove(&id);
                    gone.ok_or_else(|| error(number, "no such policy"))?;
                }
                ["swap", name, direction, one, other] => {
                    let policy = policy_id(name).and_then(|id| state.cluster.policies.get_mut(&id));
                    let rules = policy.and_then(|policy| match direction {
                        "ingress" => policy.ingress.as_mut(),
                        "egress" => policy.egress.as_mut(),
                        _ => None,
                    });
                    let at = |text: &str| text.parse().ok();
                    match (rules, at(one), at(other)) {
                        (Some(rules), Some(one), Some(other)) if one < rules.len() && other < rules.len() => {
                            rules.swap(one, other);
                        }
                        _ => return Err(error(number, "must name a policy, a direction and two of its rules")),
                    }
                }
                ["limit", "entries", count] => {
                    limits.entries = count.parse().map_err(|_| error(number, "must be a number"))?;
                }
                ["refused"] => {
                    state.refused.clear();
                    for (number, line) in meaningful(&lines) {
                        state.refuse(line).ok_or_else(|| error(number, "must be NS/POLICY DIRECTION NS/POD..."))?;
                    }
                }
                ["expect", probe] => {
                    let (protocol, port) = parse_probe(probe).ok_or_else(|| error(number, "must be like tcp/80"))?;
                    let probes = state.matrix(number, &lines, protocol)?;
                    let State { cluster, refused, .. } = &state;
                    let (cluster, refused) = (cluster.clone(), refused.clone());
                    cases.push(Case { line: number, cluster, refused, protocol, port, probes });
                }
                _ => {
                    return Err(error(
                        number,
                        "must be topology, apply, delete NS/NAME, swap POLICY DIRECTION N N, limit entries N, refused or expect \
                         PROBE",
                    ));
                }
            }
        }
        Ok(Self { cases, limits })
    }
}

impl State {
    fn topology(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match &words[..] {
            ["namespace", name, labels @ ..] => {
                let labels: Option<Vec<_>> = labels.iter().map(|label| label.split_once('=')).collect();
                self.cluster.insert_namespace(*name, labels.ok_or("labels must be key=value")?);
            }
            ["node", name, labels @ ..] if labels.iter().any(|label| label.contains('=')) => {
                let labels: Option<Vec<_>> = labels.iter().map(|label| label.split_once('=')).collect();
                let labels = labels.ok_or("labels must be key=value")?.into_iter();
                let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
                self.cluster.nodes.get(*name).ok_or("no such node")?;
                self.cluster.catalog.node_labels.insert((*name).to_owned(), labels);
            }
            ["node", name, list @ ..] => {
                self.cluster.nodes.insert((*name).to_owned(), parse_addresses(list)?.into_iter().collect());
            }
            ["outside", name, list @ ..] => {
                self.outside.insert((*name).to_owned(), parse_addresses(list)?);
            }
            ["pod", name, words @ ..] => {
                let (namespace, name) = name.split_once('/').ok_or("must be ns/name")?;
                let pod = self.pod(words)?;
                self.cluster.pods.insert(PodId::new(namespace, name), pod);
            }
            ["remove", name] => {
                let (namespace, name) = name.split_once('/').ok_or("must be ns/name")?;
                self.cluster.pods.remove(&PodId::new(namespace, name)).ok_or("no such pod")?;
            }
            _ => return Err("must be namespace, node, pod, outside or remove".to_owned()),
        }
        Ok(())
    }

    fn refuse(&mut self, line: &str) -> Option<()> {
        let mut words = line.split_whitespace();
        let (namespace, name) = words.next()?.split_once('/')?;
        let direction = match words.next()? {
            "ingress" => Direction::Ingress,
            "egress" => Direction::Egress,
            _ => return None,
        };
        for word in words {
            let (of, pod) = word.split_once('/')?;
            self.refused.insert((PodId::new(of, pod), direction, PolicyId::new(namespace, name)));
        }
        Some(())
    }

    fn pod(&self, words: &[&str]) -> Result<Pod, String> {
        let mut pod = Pod::default();
        for word in words {
            match word.split_once('=') {
                None if *word == "host" => pod.network = PodNetwork::Host,
                None => return Err(format!("{word}: must be key=value or host")),
                Some(("ip", address)) => pod.addresses.extend(parse_addresses(&[address])?),
                Some(("sa", account)) => {
                    pod.labels.insert(SERVICE_ACCOUNT_LABEL.to_owned(), account.to_owned());
                }
                Some(("node", node)) => pod.node = Some(node.to_owned()),
                Some(("port", port)) => {
                    let parts: Vec<&str> = port.split(':').collect();
                    let [name, protocol, number] = parts[..] else { return Err("port=name:protocol:number".into()) };
                    pod.ports.insert(NamedPort {
                        name: name.to_owned(),
                        protocol: Protocol::parse(protocol).ok_or("no such protocol")?,
                        port: number.parse().map_err(|_| "no such port".to_owned())?,
                    });
                }
                Some((key, value)) => {
                    pod.labels.insert(key.to_owned(), value.to_owned());
                }
            }
        }
        if pod.network == PodNetwork::Host {
            let node = pod.node.as_ref().and_then(|node| self.cluster.nodes.get(node));
            pod.addresses = node.ok_or("a host pod needs a known node")?.clone();
        }
        Ok(pod)
    }

    fn matrix(&self, number: usize, lines: &[(usize, &str)], protocol: Protocol) -> Result<Vec<Probe>, TableError> {
        let mut lines = meaningful(lines);
        let (_, header) = lines.next().ok_or_else(|| error(number, "a matrix must follow"))?;
        let columns: Vec<&str> = header.split_whitespace().collect();
        let mut probes = Vec::new();
        for (number, line) in lines {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [row, cells @ ..] = &words[..] else { continue };
            if cells.len() != columns.len() {
                return Err(error(number, &format!("{} cells for {} columns", cells.len(), columns.len())));
            }
            for (column, cell) in columns.iter().zip(cells) {
                let expected = match *cell {
                    "." => Verdict::Allow,
                    "X" => Verdict::Deny,
                    "-" => continue,
                    _ => return Err(error(number, "a cell must be . or X or -")),
                };
                if row == column {
                    return Err(error(number, "traffic to oneself must be -"));
                }
                let before = probes.len();
                for source in self.ends(row).ok_or_else(|| error(number, &format!("{row} is not known")))? {
                    let ends = self.ends(column).ok_or_else(|| error(number, &format!("{column} is not known")))?;
                    let fits = |end: &End| {
                        let v4 = end.address.is_ipv4();
                        let carried = (protocol != Protocol::ICMP || v4) && (protocol != Protocol::ICMPV6 || !v4);
                        v4 == source.address.is_ipv4() && carried
                    };
                    let destinations = ends.into_iter().filter(fits);
                    probes.extend(destinations.map(|end| Probe { source: source.clone(), destination: end, expected }));
                }
                if probes.len() == before {
                    return Err(error(number, &format!("{row} and {column} share no address family for this probe")));
                }
            }
        }
        if probes.is_empty() {
            return Err(error(number, "nothing is asked"));
        }
        Ok(probes)
    }

    fn ends(&self, name: &str) -> Option<Vec<End>> {
        let (pod, addresses): (Option<PodId>, Vec<IpAddr>) = match name.split_once('/') {
            Some((namespace, pod)) => {
                let id = PodId::new(namespace, pod);
                let addresses = self.cluster.pods.get(&id)?.addresses.iter().copied().collect();
                (Some(id), addresses)
            }
            None => match self.cluster.nodes.get(name) {
                Some(addresses) => (None, addresses.iter().copied().collect()),
                None => (None, self.outside.get(name)?.clone()),
            },
        };
        let end = |address| End { name: name.to_owned(), pod: pod.clone(), address };
        Some(addresses.into_iter().map(end).collect())
    }
}

fn meaningful<'a>(lines: &[(usize, &'a str)]) -> impl Iterator<Item = (usize, &'a str)> {
    lines.iter().copied().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'))
}

fn error(line: usize, reason: &str) -> TableError {
    TableError { line, reason: reason.to_owned() }
}

/// `ns/name` or `tier:name`.
fn policy_id(text: &str) -> Option<PolicyId> {
    match text.split_once(':') {
        Some((tier, name)) => Some(PolicyId::cluster(Tier::from(tier.to_owned()), name)),
        None => text.split_once('/').map(|(namespace, name)| PolicyId::new(namespace, name)),
    }
}

fn parse_addresses(words: &[&str]) -> Result<Vec<IpAddr>, String> {
    words.iter().map(|word| word.parse().map_err(|_| format!("{word}: no address"))).collect()
}

fn parse_probe(text: &str) -> Option<(Protocol, u16)> {
    match text.split_once('/') {
        None if text == "icmp" => Some((Protocol::ICMP, Tuple::icmp_port(8, 0))),
        None if text == "icmpv6" => Some((Protocol::ICMPV6, Tuple::icmp_port(128, 0))),
        Some(("proto", number)) => Some((Protocol(number.parse().ok()?), 0)),
        Some((name @ ("tcp" | "udp" | "sctp"), port)) => Some((Protocol::parse(name)?, port.parse().ok()?)),
        _ => None,
    }
}
