//! Who can reach a pod, and what it can reach.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use super::services::{Services, allowed};
use super::space::{Peers, Space};
use super::{AnalysisError, Named, Scheduled, compiled, named, scheduled};
use crate::compiler::{SetId, Update};
use crate::model::{Cluster, Direction, PodId, PodNetwork};

/// Which way is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Who can open connections to the pod.
    To,
    /// To whom the pod can open connections.
    From,
}

/// The answer for one pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Access {
    /// Version of the JSON shape; keys may be added in one version.
    pub version: u32,
    /// Which way was asked.
    pub way: Way,
    /// The pod.
    #[serde(serialize_with = "one")]
    pub pod: PodId,
    /// Who, with what. Each pair of addresses is in one element at most; in none is what is denied.
    pub allowed: Vec<Reachable>,
    /// The rules that were taken as of the cluster's time.
    pub scheduled: Vec<Scheduled>,
    /// The rules by names, taken as what has been learnt.
    pub named: Vec<Named>,
}

fn one<S: serde::Serializer>(pod: &PodId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(pod)
}

/// Peers that may use the same services.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reachable {
    /// The pod's own addresses that it holds for; only peers of the same family are meant.
    pub own: Vec<IpAddr>,
    /// The other ends.
    pub peers: Peers,
    /// What is allowed, in the destination's ports.
    pub services: Services,
}

/// Who can open a connection to a pod, or to whom it can: what policies of both ends allow. Of a peer that is no pod in its
/// own network, nothing but the pod's own policies is asked. The pod itself is left out: it reaches itself always.
///
/// An address that several pods claim counts as reached where any of them allows it.
///
/// # Errors
///
/// [`AnalysisError::UnknownPod`], [`AnalysisError::HostNetwork`]; [`AnalysisError::Compile`] and
/// [`AnalysisError::Refused`] where the policies are more than the compiler takes.
pub fn access(cluster: &Cluster, pod: &PodId, way: Way) -> Result<Access, AnalysisError> {
    let subject = cluster.pods.get(pod).ok_or_else(|| AnalysisError::UnknownPod(pod.clone()))?;
    if subject.network == PodNetwork::Host {
        return Err(AnalysisError::HostNetwork(pod.clone()));
    }
    let update = compiled(cluster)?;
    let space = Space::new(&[&update.table], &[cluster]);
    let (own, theirs) = match way {
        Way::To => (Direction::Ingress, Direction::Egress),
        Way::From => (Direction::Egress, Direction::Ingress),
    };
    let mut sides = Sides { update: &update, known: HashMap::new() };
    let mut found: BTreeMap<(Services, Vec<usize>), Vec<IpAddr>> = BTreeMap::new();
    for address in &subject.addresses {
        let mut of_address: BTreeMap<Services, Vec<usize>> = BTreeMap::new();
        for (index, region) in space.regions.iter().enumerate() {
            let same_family = region.example.is_ipv4() == address.is_ipv4();
            if !same_family || region.pods == std::slice::from_ref(pod) {
                continue;
            }
            let mut services = sides.of(pod, own, region.example);
            if !region.pods.is_empty() {
                let others = region.pods.iter().filter(|other| *other != pod);
                let any = others.fold(Services::none(), |any, other| any.or(&sides.of(other, theirs, *address)));
                services = services.and(&any);
            }
            if !services.is_empty() {
                of_address.entry(services).or_default().push(index);
            }
        }
        for key in of_address {
            found.entry(key).or_default().push(*address);
        }
    }
    let reachable = |((services, regions), own): ((Services, Vec<usize>), Vec<IpAddr>)| {
        Some(Reachable { own, peers: space.peers(&regions)?, services })
    };
    let mut allowed: Vec<Reachable> = found.into_iter().filter_map(reachable).collect();
    allowed.sort_by(|left, right| (&left.own, left.peers.example).cmp(&(&right.own, right.peers.example)));
    let scheduled = scheduled(cluster).into_iter().collect();
    let named = named(cluster).map(|(named, _)| named).collect();
    Ok(Access { version: 1, way, pod: pod.clone(), allowed, scheduled, named })
}

/// What the policies of one end allow.
struct Sides<'a> {
    update: &'a Update,
    known: HashMap<(SetId, u16), Services>,
}

impl Sides<'_> {
    /// What the policies of one pod allow with an address.
    fn of(&mut self, pod: &PodId, direction: Direction, peer: IpAddr) -> Services {
        let Some(plan) = self.update.endpoints.get(pod) else { return Services::all() };
        let set = plan.set(direction);
        let local = set.local(self.update.table.lookup(peer));
        self.known.entry((set.id, local)).or_insert_with(|| allowed(&set.program.diagram, local)).clone()
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { way, pod, allowed, scheduled, named, .. } = self;
        if allowed.is_empty() {
            match way {
                Way::To => writeln!(f, "nobody reaches {pod}")?,
                Way::From => writeln!(f, "{pod} reaches nobody")?,
            }
        }
        for Reachable { own, peers, services } in allowed {
            let own: Vec<String> = own.iter().map(ToString::to_string).collect();
            match way {
                Way::To => writeln!(f, "{pod} ({}) from {peers}: {services}", own.join(", "))?,
                Way::From => writeln!(f, "{pod} ({}) to {peers}: {services}", own.join(", "))?,
            }
        }
        scheduled.iter().try_for_each(|rule| writeln!(f, "{rule}"))?;
        named.iter().try_for_each(|rule| writeln!(f, "{rule}"))
    }
}
