//! From the policies that govern an endpoint to one list of conditions, in the order in which they are tried.

mod signatures;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use crate::classes::{Atom, AtomId, Claim};
use crate::compiler::{CompileError, Limits, Named};
use crate::ids::Ids;
use crate::ir::{Leaf, RuleId, Service};
use crate::model::{
    Action, Cluster, Direction, Peer, Peers, PodNetwork, PolicyId, PortMatch, PortSpec, Ports, Protocol, Rule, RuleRef,
    Tier, TierEnd, TierSpec, Verdict,
};

pub(crate) use signatures::{ClassMembers, Signatures};

/// What makes two endpoints' policies the same artefact.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SetKey {
    pub(crate) direction: Direction,
    /// The governing policies, in order.
    pub(crate) policies: Arc<[PolicyId]>,
    /// The endpoint's node, if anything governs it, the node is known, and its address is believed.
    pub(crate) node: Option<String>,
    /// On ingress, what the names that the rules use mean on the endpoint.
    pub(crate) named_ports: BTreeMap<(String, Protocol), BTreeSet<u16>>,
    /// Those of the policies that cannot be compiled; see [`isolation`](crate::isolation).
    pub(crate) refused: BTreeSet<PolicyId>,
    /// Those of which it is not known whether they govern the endpoint: they allow nothing, either.
    pub(crate) unsure: BTreeSet<PolicyId>,
    /// What the set would be if policies in audit that govern the endpoint were in force; none where there are none.
    pub(crate) audit: Option<Box<SetKey>>,
}

impl SetKey {
    /// Whether nothing is allowed by the policy.
    pub(crate) fn is_closed(&self, policy: &PolicyId) -> bool {
        self.refused.contains(policy) || self.unsure.contains(policy)
    }
}

/// What a rule asks about the peer: all of these atoms. None: anybody.
pub(crate) type Condition = Vec<AtomId>;

/// One rule before peers are known.
#[derive(Debug, Clone)]
pub(crate) struct Conditional {
    pub(crate) condition: Condition,
    pub(crate) service: Service,
    pub(crate) leaf: Leaf,
}

/// A policy set before peers are known.
#[derive(Debug, Clone)]
pub(crate) struct FlatSet {
    pub(crate) direction: Direction,
    pub(crate) rules: Vec<Conditional>,
    pub(crate) default: Leaf,
    /// What it would be if policies in audit were in force.
    pub(crate) audit: Option<Box<FlatSet>>,
}

/// The numbers of ports by name and protocol, over all pods that policy knows.
pub(crate) type NamedPorts = HashMap<(String, Protocol), BTreeSet<u16>>;

pub(crate) fn named_ports(cluster: &Cluster) -> NamedPorts {
    let mut found = NamedPorts::new();
    for pod in cluster.pods.values().filter(|pod| pod.network == PodNetwork::Own) {
        for port in &pod.ports {
            found.entry((port.name.clone(), port.protocol)).or_default().insert(port.port);
        }
    }
    found
}

/// The numbers that a name in an egress rule stands for, and whom each asks for.
pub(crate) fn ports_of_peers<'a>(
    named_ports: &'a NamedPorts,
    name: &'a str,
    protocol: Protocol,
    claim: Claim,
) -> impl Iterator<Item = (u16, Atom)> + 'a {
    let numbers = named_ports.get(&(name.to_owned(), protocol)).into_iter().flatten();
    numbers.map(move |port| (*port, Atom::Port { name: name.to_owned(), protocol, port: *port, claim }))
}

/// The names that a policy set's rules use.
pub(crate) fn names_used(
    cluster: &Cluster,
    policies: &[PolicyId],
    direction: Direction,
) -> BTreeSet<(String, Protocol)> {
    let rules = policies.iter().filter_map(|id| cluster.policies.get(id)?.rules(direction)).flatten();
    let ports = rules.filter_map(|rule| match &rule.ports {
        Ports::Any => None,
        Ports::OneOf(ports) => Some(ports),
    });
    ports
        .flatten()
        .filter_map(|port| match &port.port {
            PortSpec::Named(name) => Some((name.clone(), port.protocol)),
            PortSpec::Any | PortSpec::Range { .. } => None,
        })
        .collect()
}

/// What a rule does at the cluster's time; none where it does not hold then. Where that is not known it may only close.
pub(crate) fn action_now(cluster: &Cluster, rule: &Rule) -> Option<Action> {
    cluster.catalog.action_at(cluster.time, rule)
}

/// What the names of ports that rules use mean on the endpoint.
type OwnPorts = BTreeMap<(String, Protocol), BTreeSet<u16>>;

/// Where a rule stands.
pub(crate) struct Place<'a> {
    pub(crate) policy: &'a PolicyId,
    pub(crate) direction: Direction,
    pub(crate) rule: usize,
}

impl Place<'_> {
    /// The rule, whatever of it matches.
    pub(crate) fn whole(&self) -> RuleRef {
        let Self { policy, direction, rule } = *self;
        RuleRef { policy: policy.clone(), direction, rule, peer: None, port: None }
    }
}

/// A combination of peer and service that a rule matches.
pub(crate) struct Match {
    peer: Option<usize>,
    port: Option<usize>,
    pub(crate) condition: Condition,
    pub(crate) service: Service,
}

/// Numbers atoms and rules while flattening.
pub(crate) struct Flattener<'a> {
    pub(crate) cluster: &'a Cluster,
    pub(crate) named_ports: &'a NamedPorts,
    pub(crate) limits: &'a Limits,
    pub(crate) atoms: HashMap<Atom, AtomId>,
    /// Numbers of atoms that are known already, to be kept.
    pub(crate) known_atoms: &'a HashMap<Atom, AtomId>,
    pub(crate) next_atom: AtomId,
    pub(crate) rules: &'a mut Ids<Named>,
    pub(crate) rules_used: BTreeSet<u32>,
    #[cfg(feature = "test-support")]
    pub(crate) planted: Option<crate::test_support::PlantedBug>,
}

impl<'a> Flattener<'a> {
    pub(crate) fn new(
        cluster: &'a Cluster,
        named_ports: &'a NamedPorts,
        limits: &'a Limits,
        known_atoms: &'a HashMap<Atom, AtomId>,
        rules: &'a mut Ids<Named>,
    ) -> Self {
        Self {
            cluster,
            named_ports,
            limits,
            atoms: HashMap::new(),
            known_atoms,
            next_atom: 0,
            rules,
            rules_used: BTreeSet::new(),
            #[cfg(feature = "test-support")]
            planted: None,
        }
    }

    pub(crate) fn flatten(&mut self, key: &SetKey) -> Result<FlatSet, CompileError> {
        let audit = key.audit.as_deref().map(|key| self.in_force(key)).transpose()?.map(Box::new);
        #[cfg(feature = "test-support")]
        match (self.planted, &audit) {
            (Some(crate::test_support::PlantedBug::AuditEnforced), Some(audit)) => return Ok((**audit).clone()),
            (Some(crate::test_support::PlantedBug::AuditForgotten), _) => return self.in_force(key),
            _ => {}
        }
        Ok(FlatSet { audit, ..self.in_force(key)? })
    }

    /// As far as the set's policies are in force.
    fn in_force(&mut self, key: &SetKey) -> Result<FlatSet, CompileError> {
        let SetKey { direction, policies, node, named_ports, refused, unsure, audit: _ } = key;
        let direction = *direction;
        let all_open = refused.is_empty() && unsure.is_empty();
        if policies.is_empty() {
            let default = Leaf { verdict: Verdict::Allow, rule: RuleId::NOT_GOVERNED };
            return Ok(FlatSet { direction, rules: Vec::new(), default, audit: None });
        }
        let tiers: Vec<&[PolicyId]> = policies.chunk_by(|one, next| one.tier == next.tier).collect();
        let spec = |tier: &[PolicyId]| tier.first().and_then(|id| self.cluster.catalog.tier(&id.tier));
        let Some(specs) = tiers.iter().map(|tier| spec(tier)).collect::<Option<Vec<TierSpec>>>() else {
            let default = Leaf { verdict: Verdict::Deny, rule: RuleId::TIER_END };
            return Ok(FlatSet { direction, rules: Vec::new(), default, audit: None });
        };
        let isolates = policies.iter().any(|id| id.tier == Tier::NetworkPolicy);
        let default = match (isolates, all_open) {
            (true, true) => Leaf { verdict: Verdict::Deny, rule: RuleId::ISOLATED },
            (true, false) => Leaf { verdict: Verdict::Deny, rule: RuleId::REFUSED },
            (false, _) => Leaf { verdict: Verdict::Allow, rule: RuleId::UNMATCHED },
        };
        // From the last tier to the first, for a rule that passes needs what comes behind its own.
        let mut behind: Vec<Conditional> = Vec::new();
        for (tier, spec) in tiers.into_iter().zip(specs).rev() {
            let is_isolating = tier.iter().any(|id| id.tier == Tier::NetworkPolicy);
            if is_isolating {
                // A pod that is isolated never comes to what is behind that.
                behind.clear();
            }
            let mut rules = Vec::new();
            if let (true, Some(node)) = (is_isolating, node) {
                let condition = vec![self.atom(Atom::Node(node.clone()))];
                let leaf = Leaf { verdict: Verdict::Allow, rule: RuleId::OWN_NODE };
                rules.push(Conditional { condition, service: Service::Any, leaf });
            }
            for id in tier {
                let listed =
                    self.cluster.policies.get(id).and_then(|policy| policy.rules(direction)).unwrap_or_default();
                if key.is_closed(id) {
                    if listed.iter().any(|rule| rule.action != Action::Allow) {
                        let leaf = Leaf { verdict: Verdict::Deny, rule: RuleId::REFUSED };
                        rules.push(Conditional { condition: Vec::new(), service: Service::Any, leaf });
                        break;
                    }
                    continue;
                }
                for (index, rule) in listed.iter().enumerate() {
                    let place = Place { policy: id, direction, rule: index };
                    match action_now(self.cluster, rule) {
                        None => {}
                        Some(Action::Allow) => self.decide(&mut rules, &place, rule, named_ports, Verdict::Allow)?,
                        Some(Action::Deny | Action::Reject) => {
                            self.decide(&mut rules, &place, rule, named_ports, Verdict::Deny)?
                        }
                        Some(Action::Pass) => {
                            #[cfg(feature = "test-support")]
                            if self.planted == Some(crate::test_support::PlantedBug::PassIgnored) {
                                continue;
                            }
                            self.pass(&mut rules, &behind, default, &place, rule, named_ports)?;
                        }
                    }
                }
            }
            self.limits.check("entries in one policy set", rules.len() + behind.len(), self.limits.entries)?;
            if spec.end == TierEnd::Deny && !is_isolating {
                let rule = if all_open { RuleId::TIER_END } else { RuleId::REFUSED };
                let leaf = Leaf { verdict: Verdict::Deny, rule };
                rules.push(Conditional { condition: Vec::new(), service: Service::Any, leaf });
                // Only rules that pass lead on, and they have what is behind already.
                behind.clear();
            }
            rules.append(&mut behind);
            behind = rules;
        }
        Ok(FlatSet { direction, rules: behind, default, audit: None })
    }

    /// Adds a rule that decides.
    fn decide(
        &mut self,
        rules: &mut Vec<Conditional>,
        place: &Place<'_>,
        rule: &Rule,
        named_ports: &OwnPorts,
        verdict: Verdict,
    ) -> Result<(), CompileError> {
        let claim = self.claim(if verdict == Verdict::Allow { Claim::Sole } else { Claim::Any });
        let matches = self.matches(rule, place.direction, named_ports, claim, rules.len())?;
        for Match { peer, port, condition, service } in matches {
            let leaf = Leaf { verdict, rule: self.rule(place, peer, port) };
            rules.push(Conditional { condition, service, leaf });
        }
        Ok(())
    }

    /// Adds a rule that passes: what is behind its tier, once more, for what it matches. Where several pods claim an
    /// address, what it matches for one of them is denied.
    fn pass(
        &mut self,
        rules: &mut Vec<Conditional>,
        behind: &[Conditional],
        default: Leaf,
        place: &Place<'_>,
        rule: &Rule,
        named_ports: &OwnPorts,
    ) -> Result<(), CompileError> {
        let (direction, claim) = (place.direction, self.claim(Claim::Sole));
        let sole = self.matches(rule, direction, named_ports, claim, rules.len())?;
        // Peers share services: what is behind is searched once for each, so that time goes with entries.
        let mut reached: HashMap<Service, Vec<(Service, &Conditional)>> = HashMap::new();
        for Match { condition, service, .. } in &sole {
            let reached = reached
                .entry(*service)
                .or_insert_with(|| behind.iter().filter_map(|next| Some((service.and(next.service)?, next))).collect());
            let found = rules.len().saturating_add(reached.len()).saturating_add(1);
            self.limits.check("entries in one policy set", found, self.limits.entries)?;
            for (service, next) in reached {
                let mut condition: Condition = condition.iter().chain(&next.condition).copied().collect();
                condition.sort_unstable();
                condition.dedup();
                rules.push(Conditional { condition, service: *service, leaf: next.leaf });
            }
            rules.push(Conditional { condition: condition.clone(), service: *service, leaf: default });
        }
        let any = self.matches(rule, direction, named_ports, Claim::Any, rules.len())?;
        let passed: HashSet<(&Condition, Service)> = sole.iter().map(|m| (&m.condition, m.service)).collect();
        for Match { peer, port, condition, service } in any {
            if !passed.contains(&(&condition, service)) {
                let leaf = Leaf { verdict: Verdict::Deny, rule: self.rule(place, peer, port) };
                rules.push(Conditional { condition, service, leaf });
            }
        }
        Ok(())
    }

    /// The combinations of peer and service that a rule matches, peer by peer; each is to become an entry at least, beside
    /// those that there are.
    pub(crate) fn matches(
        &mut self,
        rule: &Rule,
        direction: Direction,
        named_ports: &OwnPorts,
        claim: Claim,
        entries: usize,
    ) -> Result<Vec<Match>, CompileError> {
        let mut peers: Vec<(Option<usize>, Condition, Service)> = Vec::new();
        match &rule.peers {
            Peers::Any => peers.push((None, Vec::new(), Service::Any)),
            Peers::OneOf(listed) => {
                for (at, peer) in listed.iter().enumerate() {
                    let asked = self.peer(peer, direction, claim);
                    peers.extend(asked.into_iter().map(|(atom, service)| (Some(at), vec![atom], service)));
                }
            }
        }
        let mut services: Vec<(Option<usize>, Option<AtomId>, Service)> = Vec::new();
        match &rule.ports {
            Ports::Any => services.push((None, None, Service::Any)),
            Ports::OneOf(ports) => {
                for (at, port) in ports.iter().enumerate() {
                    let resolved = self.port(port, direction, named_ports, claim);
                    services.extend(resolved.into_iter().map(|(atom, service)| (Some(at), atom, service)));
                }
            }
        }
        let new = peers.len().saturating_mul(services.len());
        self.limits.check("entries in one policy set", entries.saturating_add(new), self.limits.entries)?;
        let mut matches = Vec::with_capacity(peers.len() * services.len());
        for (peer, condition, of_peer) in peers {
            for (port, port_atom, service) in &services {
                let Some(service) = of_peer.and(*service) else { continue };
                let mut condition = condition.clone();
                condition.extend(port_atom);
                condition.sort_unstable();
                matches.push(Match { peer, port: *port, condition, service });
            }
        }
        Ok(matches)
    }

    fn rule(&mut self, place: &Place<'_>, peer: Option<usize>, port: Option<usize>) -> RuleId {
        let Place { policy, direction, rule } = *place;
        let id = self.rules.intern(&Named::Rule(RuleRef { policy: policy.clone(), direction, rule, peer, port }));
        self.rules_used.insert(id);
        RuleId(id)
    }

    /// Whom a rule may take a peer for where several pods claim its address.
    fn claim(&self, claim: Claim) -> Claim {
        #[cfg(feature = "test-support")]
        if self.planted == Some(crate::test_support::PlantedBug::ClaimsBelieved) {
            return Claim::Any;
        }
        claim
    }

    fn peer(&mut self, peer: &Peer, direction: Direction, claim: Claim) -> Vec<(AtomId, Service)> {
        #[cfg(feature = "test-support")]
        if let Peer::Block(block) = peer
            && self.planted == Some(crate::test_support::PlantedBug::ExceptIgnored)
        {
            let atom = Atom::Block(crate::model::IpBlock { cidr: block.cidr, except: Vec::new() });
            return vec![(self.atom(atom), Service::Any)];
        }
        let asked = Atom::of(peer, direction, claim, &self.cluster.catalog);
        asked.into_iter().map(|(atom, service)| (self.atom(atom), service)).collect()
    }

    fn port(
        &mut self,
        port: &PortMatch,
        direction: Direction,
        own: &OwnPorts,
        claim: Claim,
    ) -> Vec<(Option<AtomId>, Service)> {
        let protocol = port.protocol;
        let single = |number| Service::Ports { protocol, first: number, last: number };
        match &port.port {
            PortSpec::Any => vec![(None, Service::all_of(protocol))],
            PortSpec::Range { first, last } => {
                #[cfg(feature = "test-support")]
                if self.planted == Some(crate::test_support::PlantedBug::EndPortExclusive) && first < last {
                    return vec![(None, Service::Ports { protocol, first: *first, last: last - 1 })];
                }
                vec![(None, Service::Ports { protocol, first: *first, last: *last })]
            }
            PortSpec::Named(name) => match direction {
                Direction::Ingress => own
                    .get(&(name.clone(), protocol))
                    .into_iter()
                    .flatten()
                    .map(|number| (None, single(*number)))
                    .collect(),
                Direction::Egress => {
                    let named_ports = self.named_ports;
                    ports_of_peers(named_ports, name, protocol, claim)
                        .map(|(number, atom)| (Some(self.atom(atom)), single(number)))
                        .collect()
                }
            },
        }
    }

    pub(crate) fn atom(&mut self, atom: Atom) -> AtomId {
        if let Some(id) = self.atoms.get(&atom) {
            return *id;
        }
        let id = match self.known_atoms.get(&atom) {
            Some(id) => *id,
            None => {
                let id = self.next_atom;
                self.next_atom += 1;
                id
            }
        };
        self.atoms.insert(atom, id);
        id
    }
}
