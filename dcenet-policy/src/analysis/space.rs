//! The addresses that policies tell apart, each kind of them once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Serialize, Serializer};

use crate::classes::AddressTable;
use crate::model::{Cluster, PodId, PodNetwork};

/// Addresses that the policies in question treat alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Peers {
    /// Pods with networks of their own, by the addresses below.
    #[serde(serialize_with = "as_texts")]
    pub pods: Vec<PodId>,
    /// Nodes, likewise.
    pub nodes: Vec<String>,
    /// Addresses that these pods and nodes hold, and those below.
    pub addresses: Vec<IpAddr>,
    /// Addresses of services' backends that no pod and no node holds.
    pub backends: Vec<IpAddr>,
    /// Addresses that no pod, no node and no backend holds.
    pub others: Vec<Others>,
    /// One of all these addresses.
    pub example: IpAddr,
    #[serde(skip)]
    held: Arc<BTreeSet<IpAddr>>,
}

/// Addresses of a prefix, but those of some prefixes inside it, and but those that pods, nodes and backends hold.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Others {
    /// The prefix.
    pub cidr: IpNet,
    /// What does not belong to it.
    pub except: Vec<IpNet>,
}

impl Peers {
    /// Whether an address belongs to them.
    pub fn contains(&self, address: IpAddr) -> bool {
        if self.held.contains(&address) {
            return self.addresses.binary_search(&address).is_ok();
        }
        let inside = |Others { cidr, except }: &Others| {
            cidr.contains(&address) && !except.iter().any(|hole| hole.contains(&address))
        };
        self.others.iter().any(inside)
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pods = self.pods.iter().map(ToString::to_string);
        let nodes = self.nodes.iter().map(|node| format!("node {node}"));
        let others = self.others.iter().map(|Others { cidr, except }| {
            let except = except.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
            if except.is_empty() { format!("others in {cidr}") } else { format!("others in {cidr} but {except}") }
        });
        let backends = self.backends.iter().map(|address| format!("backend {address}"));
        f.write_str(&pods.chain(nodes).chain(backends).chain(others).collect::<Vec<_>>().join(", "))
    }
}

/// All addresses of both families in disjoint, non-empty regions.
pub(super) struct Space {
    pub(super) regions: Vec<Region>,
    held: Arc<BTreeSet<IpAddr>>,
    /// For each prefix those directly inside it.
    inside: BTreeMap<IpNet, Vec<IpNet>>,
}

pub(super) struct Region {
    /// One of its addresses, which any table looks up as it does all others of the region.
    pub(super) example: IpAddr,
    pub(super) pods: Vec<PodId>,
    pub(super) nodes: Vec<String>,
    /// What it is of; none where it is one address, which somebody holds or answers a service at.
    prefix: Option<IpNet>,
}

impl Space {
    /// The regions that these tables and clusters tell apart.
    pub(super) fn new(tables: &[&AddressTable], clusters: &[&Cluster]) -> Self {
        let mut holders: BTreeMap<IpAddr, (BTreeSet<PodId>, BTreeSet<String>)> = BTreeMap::new();
        for cluster in clusters {
            for (id, pod) in cluster.pods.iter().filter(|(_, pod)| pod.network == PodNetwork::Own) {
                for address in &pod.addresses {
                    holders.entry(*address).or_default().0.insert(id.clone());
                }
            }
            for (node, addresses) in cluster.addresses_of_nodes() {
                for address in addresses {
                    holders.entry(*address).or_default().1.insert(node.clone());
                }
            }
        }
        for address in tables.iter().flat_map(|table| table.exact().keys()) {
            holders.entry(*address).or_default();
        }
        let held: BTreeSet<IpAddr> = holders.keys().copied().collect();
        let mut prefixes: BTreeSet<IpNet> = tables.iter().flat_map(|table| table.prefixes().keys().copied()).collect();
        prefixes.extend([IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())]);

        let within = nested(&prefixes);
        let none = Vec::new();
        let examples: BTreeMap<IpNet, IpAddr> = prefixes
            .into_iter()
            .filter_map(|prefix| Some((prefix, free(&prefix, within.get(&prefix).unwrap_or(&none), &held)?)))
            .collect();
        // A prefix that those inside it and the addresses of somebody cover whole tells nothing apart.
        let inside = nested(&examples.keys().copied().collect());
        let mut regions: Vec<Region> = holders
            .into_iter()
            .map(|(example, (pods, nodes))| Region {
                example,
                pods: pods.into_iter().collect(),
                nodes: nodes.into_iter().collect(),
                prefix: None,
            })
            .collect();
        let rest = |(prefix, example)| Region { example, pods: Vec::new(), nodes: Vec::new(), prefix: Some(prefix) };
        regions.extend(examples.into_iter().map(rest));
        Self { regions, held: Arc::new(held), inside }
    }

    /// Some of the regions in one; none of none.
    pub(super) fn peers(&self, indices: &[usize]) -> Option<Peers> {
        let regions = || indices.iter().filter_map(|index| self.regions.get(*index));
        let own: BTreeSet<IpNet> = regions().filter_map(|region| region.prefix).collect();
        let covered: BTreeSet<IpNet> =
            own.iter().flat_map(|prefix| self.inside.get(prefix).into_iter().flatten()).copied().collect();
        let others = own.iter().filter(|prefix| !covered.contains(prefix)).map(|prefix| {
            let mut except = Vec::new();
            self.holes(prefix, &own, &mut except);
            Others { cidr: *prefix, except }
        });
        let pods: BTreeSet<PodId> = regions().flat_map(|region| region.pods.iter().cloned()).collect();
        let nodes: BTreeSet<String> = regions().flat_map(|region| region.nodes.iter().cloned()).collect();
        let addresses: BTreeSet<IpAddr> =
            regions().filter(|region| region.prefix.is_none()).map(|region| region.example).collect();
        let nobodys = regions().filter(|of| of.prefix.is_none() && of.pods.is_empty() && of.nodes.is_empty());
        let backends: BTreeSet<IpAddr> = nobodys.map(|region| region.example).collect();
        // An address of somebody says more than any other.
        let first = regions().find(|region| !region.pods.is_empty()).or_else(|| regions().next())?;
        Some(Peers {
            pods: pods.into_iter().collect(),
            nodes: nodes.into_iter().collect(),
            addresses: addresses.into_iter().collect(),
            backends: backends.into_iter().collect(),
            others: others.collect(),
            example: first.example,
            held: Arc::clone(&self.held),
        })
    }

    /// What of a prefix is in none of `own`.
    fn holes(&self, prefix: &IpNet, own: &BTreeSet<IpNet>, found: &mut Vec<IpNet>) {
        for inner in self.inside.get(prefix).into_iter().flatten() {
            if own.contains(inner) {
                self.holes(inner, own, found);
            } else {
                found.push(*inner);
            }
        }
    }
}

/// For each prefix those directly inside it.
fn nested(prefixes: &BTreeSet<IpNet>) -> BTreeMap<IpNet, Vec<IpNet>> {
    let mut inside: BTreeMap<IpNet, Vec<IpNet>> = BTreeMap::new();
    // Outer prefixes sort before those they hold.
    let mut open: Vec<IpNet> = Vec::new();
    for prefix in prefixes {
        while open.last().is_some_and(|outer| !outer.contains(prefix)) {
            open.pop();
        }
        if let Some(outer) = open.last() {
            inside.entry(*outer).or_default().push(*prefix);
        }
        open.push(*prefix);
    }
    inside
}

/// An address of a prefix that is in none of the prefixes inside it, and that nobody holds.
fn free(prefix: &IpNet, inside: &[IpNet], held: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let is_free = |address: &IpAddr| {
        prefix.contains(address) && !held.contains(address) && !inside.iter().any(|inner| inner.contains(address))
    };
    // Addresses for documentation (RFC 5737, RFC 3849), and a host of the prefix rather than its network's address.
    let documentation =
        [IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()];
    let nice = documentation.into_iter().chain(next(prefix.network()));
    if let Some(address) = nice.into_iter().find(is_free) {
        return Some(address);
    }
    let mut candidate = prefix.network();
    let mut inner = inside.iter().peekable();
    loop {
        while inner.peek().is_some_and(|inner| inner.broadcast() < candidate) {
            inner.next();
        }
        let skip_to = match inner.peek() {
            Some(inner) if inner.contains(&candidate) => inner.broadcast(),
            _ if held.contains(&candidate) => candidate,
            _ => return Some(candidate),
        };
        candidate = next(skip_to).filter(|address| prefix.contains(address))?;
    }
}

fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => address.to_bits().checked_add(1).map(|bits| Ipv4Addr::from_bits(bits).into()),
        IpAddr::V6(address) => address.to_bits().checked_add(1).map(|bits| Ipv6Addr::from_bits(bits).into()),
    }
}

pub(super) fn as_texts<T: fmt::Display, S: Serializer>(values: &[T], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(ToString::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_that_others_cover_whole_has_no_address_of_its_own() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let halves = [net("10.0.0.0/31"), net("10.0.0.2/31")];
        assert_eq!(free(&net("10.0.0.0/30"), &halves, &BTreeSet::new()), None);
        let held: BTreeSet<IpAddr> = ["10.0.0.2".parse().unwrap()].into();
        assert_eq!(free(&net("10.0.0.0/30"), &halves[..1], &held), Some("10.0.0.3".parse().unwrap()));
        assert_eq!(free(&net("255.255.255.255/32"), &[], &held), Some("255.255.255.255".parse().unwrap()));
        assert_eq!(free(&net("::/0"), &[], &held), Some("2001:db8::1".parse().unwrap()));
        let taken: BTreeSet<IpAddr> = ["255.255.255.255".parse().unwrap()].into();
        assert_eq!(free(&net("255.255.255.255/32"), &[], &taken), None);
    }
}
