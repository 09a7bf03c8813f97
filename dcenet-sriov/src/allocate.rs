//! Choosing virtual functions: pure, the same for the same question, the best there is, and explained.
//!
//! What is best is told by three things, the first before the second before the third:
//! 1. the sum of the [costs](crate::Distance::cost) of the distances from each chosen function to each device that it is
//!    to be near;
//! 2. how the functions spread over ports, as [`Shape`] says;
//! 3. the list of addresses in order, the lowest first: so that there is one answer.
//!
//! Functions of a port are equally near to anything. So the nearest ports give all they have, and only among those that
//! are as far as the last one needed there is something to decide: every choice there is a small problem with an exact
//! greedy answer. Tests compare it with all possible choices.
//!
//! Bed: pure.

use std::collections::BTreeMap;
use std::fmt;

use crate::address::{Distance, Location, PciAddress};
use crate::inventory::Inventory;

/// What may be chosen from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Candidates {
    /// The ports.
    pub ports: Vec<CandidatePort>,
}

/// A port with free functions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CandidatePort {
    /// Its address.
    pub address: PciAddress,
    /// Where it hangs.
    pub location: Location,
    /// How many of its functions are in use, also by others than who asks now.
    pub in_use: u32,
    /// Its functions that may be chosen, in any order, each once.
    pub free: Vec<PciAddress>,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// How many functions.
    pub count: usize,
    /// The devices that they are to be near: GPUs, disks, or whatever [`locate`](crate::inventory::locate) finds.
    pub near: Vec<Near>,
    /// The only NUMA node from which they may be.
    pub numa: Option<u32>,
    /// How they spread over ports.
    pub shape: Shape,
}

impl Request {
    /// So many functions, wherever they are.
    pub fn of(count: usize) -> Self {
        Self { count, near: Vec::new(), numa: None, shape: Shape::Lowest }
    }
}

/// A device to be near to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Near {
    /// Its name, for the explanation.
    pub name: String,
    /// Where it hangs.
    pub location: Location,
}

/// How functions spread over ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Shape {
    /// It does not matter: those with the lowest addresses.
    #[default]
    Lowest,
    /// From as few ports as can be, so that others keep ports for themselves.
    Pack,
    /// So that ports are used alike: the sum of the squares of the numbers in use afterwards is the least.
    Spread,
    /// Each from another port, as the halves of a bond: a port that fails takes one of them only. Then as `Spread`.
    Distinct,
}

/// What was chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The functions, in the order of their addresses.
    pub functions: Vec<PciAddress>,
    /// What every port that had something to offer gave, the nearest first.
    pub shares: Vec<Share>,
}

/// What a port gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The port.
    pub port: PciAddress,
    /// How many functions were chosen.
    pub taken: usize,
    /// How many it had.
    pub free: usize,
    /// How many were in use before.
    pub in_use: u32,
    /// How far it is from each device of the request.
    pub distances: Vec<(String, Distance)>,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { port, taken, free, in_use, distances } = self;
        write!(f, "port {port}: {taken} of {free} free functions, {in_use} in use before")?;
        distances.iter().try_for_each(|(name, distance)| write!(f, "; {name} is {distance}"))
    }
}

/// Why nothing can be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There are too few.
    #[error("{wanted} virtual functions are wanted and {free} are free; free some, or raise the number of functions")]
    TooFew {
        /// How many are wanted.
        wanted: usize,
        /// How many there are.
        free: usize,
    },
    /// There are too few on the node.
    #[error(
        "{wanted} virtual functions of NUMA node {node} are wanted and {there} are free, {free} on all nodes; ask for fewer, or leave out the node"
    )]
    TooFewOnNode {
        /// How many are wanted.
        wanted: usize,
        /// How many there are.
        there: usize,
        /// How many there are elsewhere and there.
        free: usize,
        /// The node.
        node: u32,
    },
    /// Too few ports have one.
    #[error(
        "{wanted} virtual functions of different ports are wanted, and {ports} ports have a free one; ask for fewer, or for another shape"
    )]
    TooFewPorts {
        /// How many are wanted.
        wanted: usize,
        /// How many ports have one.
        ports: usize,
    },
}

impl Candidates {
    /// The members of a pool that `is_used` does not deny. Of all functions of a port, in the pool or not, those that it
    /// denies count as in use.
    pub fn of(inventory: &Inventory, members: &[PciAddress], is_used: impl Fn(PciAddress) -> bool) -> Self {
        let members: std::collections::BTreeSet<_> = members.iter().copied().collect();
        let ports = inventory.functions.iter().map(|pf| {
            let (used, free): (Vec<_>, Vec<_>) = pf.vfs.iter().map(|vf| vf.address).partition(|vf| is_used(*vf));
            CandidatePort {
                address: pf.address,
                location: pf.location.clone(),
                in_use: used.len() as u32,
                free: free.into_iter().filter(|vf| members.contains(vf)).collect(),
            }
        });
        Self { ports: ports.filter(|port| !port.free.is_empty()).collect() }
    }

    /// Chooses.
    ///
    /// # Errors
    /// Says how many there are of what there is too little.
    ///
    /// Bed: pure; against every possible choice.
    pub fn choose(&self, request: &Request) -> Result<Choice, Refusal> {
        let on_node = |port: &&CandidatePort| request.numa.is_none_or(|node| port.location.numa == Some(node));
        let mut ports: Vec<Offer<'_>> =
            self.ports.iter().filter(on_node).map(|port| Offer::of(port, request)).collect();
        ports.retain(|port| !port.free.is_empty());
        let there: usize = ports.iter().map(|port| port.free.len()).sum();
        if there < request.count {
            let free = self.ports.iter().map(|port| port.free.len()).sum();
            let wanted = request.count;
            return Err(match request.numa {
                Some(node) => Refusal::TooFewOnNode { wanted, there, free, node },
                None => Refusal::TooFew { wanted, free },
            });
        }
        if request.shape == Shape::Distinct && ports.len() < request.count {
            return Err(Refusal::TooFewPorts { wanted: request.count, ports: ports.len() });
        }
        let most = if request.shape == Shape::Distinct { 1 } else { usize::MAX };
        ports.sort_by_key(|port| (port.cost, port.port.address));
        let mut missing = request.count;
        for group in ports.chunk_by_mut(|a, b| a.cost == b.cost) {
            let all: usize = group.iter().map(|port| port.free.len().min(most)).sum();
            if all <= missing {
                group.iter_mut().for_each(|port| port.taken = port.free.len().min(most));
                missing -= all;
                continue;
            }
            match request.shape {
                Shape::Lowest => lowest(group.iter_mut(), missing),
                Shape::Pack => pack(group, missing),
                Shape::Spread | Shape::Distinct => spread(group, missing, most),
            }
            break;
        }
        let mut functions: Vec<PciAddress> =
            ports.iter().flat_map(|port| port.free[..port.taken].iter().copied()).collect();
        functions.sort_unstable();
        Ok(Choice { functions, shares: ports.into_iter().map(Share::from).collect() })
    }
}

struct Offer<'a> {
    port: &'a CandidatePort,
    /// In order: whatever a port gives, it gives the lowest.
    free: Vec<PciAddress>,
    distances: Vec<(String, Distance)>,
    /// Of one function.
    cost: u64,
    taken: usize,
}

impl<'a> Offer<'a> {
    fn of(port: &'a CandidatePort, request: &Request) -> Self {
        let mut free = port.free.clone();
        free.sort_unstable();
        let distances: Vec<_> =
            request.near.iter().map(|near| (near.name.clone(), near.location.distance(&port.location))).collect();
        let cost = distances.iter().map(|(_, distance)| distance.cost()).sum();
        Self { port, free, distances, cost, taken: 0 }
    }
}

impl From<Offer<'_>> for Share {
    fn from(offer: Offer<'_>) -> Self {
        let Offer { port, free, distances, cost: _, taken } = offer;
        Self { port: port.address, taken, free: free.len(), in_use: port.in_use, distances }
    }
}

/// The `count` lowest addresses of ports of which none has given anything.
fn lowest<'o, 'p: 'o>(ports: impl Iterator<Item = &'o mut Offer<'p>>, count: usize) {
    let mut ports: Vec<_> = ports.collect();
    let mut all: Vec<(PciAddress, usize)> = Vec::new();
    for (number, port) in ports.iter().enumerate() {
        all.extend(port.free.iter().map(|address| (*address, number)));
    }
    all.sort_unstable();
    for (_, number) in all.into_iter().take(count) {
        ports[number].taken += 1;
    }
}

/// As few ports as can be; of those the ones that give the lowest list.
///
/// A port whose lowest address is below that of every port not yet considered is in the lowest list if any such list has
/// it: its address would stand where any other list has a higher one. So ports are considered in that order, and taken
/// if the largest of the others can supply the rest.
fn pack(group: &mut [Offer<'_>], count: usize) {
    group.sort_by_key(|port| port.free.first().copied());
    let mut sizes: Vec<usize> = group.iter().map(|port| port.free.len()).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let mut sum = 0;
    let mut fewest = 0;
    while sum < count {
        // The group has more than is missing.
        sum += sizes[fewest];
        fewest += 1;
    }
    let mut chosen: BTreeMap<usize, usize> = BTreeMap::new();
    for number in 0..group.len() {
        let slots = fewest - chosen.len();
        if slots == 0 {
            break;
        }
        let own = group[number].free.len();
        let mut others: Vec<usize> = group[number + 1..].iter().map(|port| port.free.len()).collect();
        others.sort_unstable_by(|a, b| b.cmp(a));
        let rest: usize = others.iter().take(slots - 1).sum();
        if chosen.values().sum::<usize>() + own + rest >= count {
            chosen.insert(number, own);
        }
    }
    lowest(group.iter_mut().enumerate().filter(|(number, _)| chosen.contains_key(number)).map(|(_, port)| port), count);
}

/// One after the other from the port with the fewest in use, of which the one with the lowest address: squares are
/// convex, so what is best for one is best for all. A port comes up once at each number in use, and those that come up at
/// the last number differ by their addresses alone.
fn spread(group: &mut [Offer<'_>], count: usize, most: usize) {
    for _ in 0..count {
        let next = group
            .iter_mut()
            .filter(|port| port.taken < port.free.len().min(most))
            .min_by_key(|port| (u64::from(port.port.in_use) + port.taken as u64, port.free[port.taken]));
        let Some(port) = next else { return };
        port.taken += 1;
    }
}
