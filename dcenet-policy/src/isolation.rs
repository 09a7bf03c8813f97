//! What cannot be enforced as it stands, kept from taking others with it.
//!
//! Whatever is wrong with one policy or one address stays with the pods that it concerns, and closes: nothing is allowed
//! by what is not understood. All other pods are compiled as if it did not exist.
//!
//! | Case | Verdict |
//! |---|---|
//! | a policy beyond a limit, in the direction in which it is | allows nothing; what other policies of the pod allow stays allowed |
//! | the same, with a rule that denies or passes | nor do policies behind it in order, of whatever tier, nor what holds where none matches: what it would have denied, or left to others, is not known |
//! | policies of a pod that fit each, and not together | as if each were beyond the limit: no rule of theirs allows anything in the direction |
//! | no rule matches, with a policy beyond a limit | denied where one of those beyond it denies or passes, or where a NetworkPolicy selects the pod; else allowed as ever: policies of the cluster that only allow close nothing |
//! | policies that the node has no room for together | those in force stay; of the others, the one that asks for the most peers, or numbers that an egress rule's port names have on peers, is beyond the limit, then the next |
//! | peers of those in force that the node has no room for | nothing changes anywhere until there is: the last verdicts stand, and the owner tries again each second |
//! | a policy whose subject asks for a service account, and a pod of which none is known | of that pod's policies as one beyond a limit |
//! | with a policy in audit beyond a limit, or policies that the node has no room for | what is in force stands; what would be with the policies in audit is not told, of those pods or at all |
//! | the pod's own node | allowed where no policy could have denied it: none of the tier admin that denies or passes is beyond a limit |
//! | an address that several pods claim, as a peer | no pod: rules that allow pods by selector or named port do not match; rules that deny match where they do for one of the claimants; rules that pass deny there; blocks and rules for anybody match as ever |
//! | the pod whose own address others claim, too | judged by its own policies, for its device tells who it is |
//!
//! What is in force is known only to the [`Compiler`](crate::Compiler) that put it there. The first update of a new one,
//! such as that of an owner that was started again, finds everything new: where the node has no room for all policies
//! together, the one that asks for the most peers goes first, also where it was in force before and another was not.
//!
//! Why other policies stay in force: rules that allow add up, in `networking.k8s.io/v1` without exception, so that a pod
//! with one policy less is allowed less, never more. Denying all instead would let anybody who may add a policy take
//! away what others allow.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;

use crate::classes::{Atom, Claim};
use crate::compiler::CompileError;
use crate::eval::Refused;
use crate::flatten::{self, NamedPorts, SetKey};
use crate::model::{Cluster, Direction, Peers, PodId, PodNetwork, PolicyId, PortSpec, Ports, Rule};

/// Something that is closed instead of enforced as written, or in audit and not told of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// Several pods claim one address, so that a peer with it may be any of them: no selector that allows holds for it.
    #[error("address {address} is claimed by {}: no selector allows it; remove it from those that are gone", list(.pods))]
    AmbiguousAddress {
        /// The address.
        address: IpAddr,
        /// Who claims it, two or more.
        pods: BTreeSet<PodId>,
    },
    /// Policies are beyond a limit: one by itself, or several together where none of them is by itself. They allow
    /// nothing in this direction.
    #[error("{} for {direction} of {}: not enforced, and allows nothing: {source}", list(.policies), list(.pods))]
    Refused {
        /// The policies.
        policies: BTreeSet<PolicyId>,
        /// In this direction only.
        direction: Direction,
        /// The pods in scope that they select.
        pods: BTreeSet<PodId>,
        /// What is too large, and the remedy.
        source: CompileError,
    },
    /// Policies in audit are beyond a limit together with those in force, or the node has no room for them. What is in force
    /// stands; what would be with them is not told.
    #[error("{} for {direction} of {}: in audit, and not told of: {source}", list(.policies), list(.pods))]
    NotAudited {
        /// The policies in audit.
        policies: BTreeSet<PolicyId>,
        /// In this direction only.
        direction: Direction,
        /// The pods in scope that they select.
        pods: BTreeSet<PodId>,
        /// What is too large, and the remedy.
        source: CompileError,
    },
    /// A policy governs pods of certain service accounts, and of pods that it may govern the account is not known. It allows
    /// them nothing, and closes them where it denies or isolates.
    #[error("{policy} asks for service accounts, and that of {} is not known: it allows nothing there; tell of the pods' v1 Pod objects", list(.pods))]
    UnknownAccount {
        /// The policy.
        policy: PolicyId,
        /// The pods in scope that it may govern.
        pods: BTreeSet<PodId>,
    },
}

impl Fault {
    /// Whether the pod's own verdicts are not what its policies say.
    pub fn closes(&self, pod: &PodId) -> bool {
        matches!(self, Self::Refused { pods, .. } | Self::UnknownAccount { pods, .. } if pods.contains(pod))
    }

    /// What comes of it, in words for a log.
    pub fn effect(&self) -> &'static str {
        match self {
            Self::NotAudited { .. } => "not told of; verdicts are as if it were not there",
            _ => "closed instead of enforced as written",
        }
    }

    /// Whether the pod is named: it is closed, or claims the address, or policies in audit are not told of.
    pub fn concerns(&self, pod: &PodId) -> bool {
        let (Self::AmbiguousAddress { pods, .. }
        | Self::Refused { pods, .. }
        | Self::NotAudited { pods, .. }
        | Self::UnknownAccount { pods, .. }) = self;
        pods.contains(pod)
    }
}

/// The policies that are not enforced, for [`explain_without`](crate::explain::explain_without).
pub fn refused(faults: &[Fault]) -> Refused {
    let mut refused = Refused::new();
    for fault in faults {
        if let Fault::Refused { policies, direction, pods, .. } = fault {
            for pod in pods {
                refused.extend(policies.iter().map(|policy| (pod.clone(), *direction, policy.clone())));
            }
        }
    }
    refused
}

/// The first few, and how many more there are.
fn list<T: fmt::Display>(all: &BTreeSet<T>) -> String {
    let mut shown: Vec<String> = all.iter().take(SHOWN).map(ToString::to_string).collect();
    if all.len() > SHOWN {
        shown.push(format!("{} more", all.len() - SHOWN));
    }
    let last = shown.pop().unwrap_or_default();
    if shown.is_empty() { last } else { format!("{} and {last}", shown.join(", ")) }
}

const SHOWN: usize = 3;

/// Addresses that several pods claim, and which.
pub(crate) type Ambiguous = BTreeMap<IpAddr, BTreeSet<PodId>>;

/// The addresses that several pods claim.
pub(crate) fn ambiguous(cluster: &Cluster) -> Ambiguous {
    let mut sole: HashMap<IpAddr, &PodId> = HashMap::new();
    let mut ambiguous = Ambiguous::new();
    for (id, pod) in cluster.pods.iter().filter(|(_, pod)| pod.network == PodNetwork::Own) {
        for address in &pod.addresses {
            match sole.get(address) {
                None => drop(sole.insert(*address, id)),
                Some(first) => ambiguous.entry(*address).or_default().extend([(*first).clone(), id.clone()]),
            }
        }
    }
    ambiguous
}

/// What is closed for want of pods' service accounts.
pub(crate) fn unknown_accounts<'a>(endpoints: impl Iterator<Item = (&'a PodId, &'a SetKey)>) -> Vec<Fault> {
    let mut found: BTreeMap<&PolicyId, BTreeSet<PodId>> = BTreeMap::new();
    for (pod, key) in endpoints {
        for policy in &key.unsure {
            found.entry(policy).or_default().insert(pod.clone());
        }
    }
    found.into_iter().map(|(policy, pods)| Fault::UnknownAccount { policy: policy.clone(), pods }).collect()
}

/// What stood in the way of a compilation.
#[derive(Debug)]
pub(crate) enum Obstacle {
    /// Policy sets are beyond a limit, each by itself.
    Sets(Vec<(SetKey, CompileError)>),
    /// All of them together are.
    Together(CompileError),
}

impl Obstacle {
    /// The first of its errors.
    pub(crate) fn into_error(self) -> CompileError {
        match self {
            Self::Together(error) => error,
            Self::Sets(sets) => {
                let first = sets.into_iter().next().map(|(_, error)| error);
                first.unwrap_or(CompileError::ImplLimitExceeded { what: "policy sets", found: 0, limit: 0 })
            }
        }
    }
}

/// The policies that are left out, and why.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    /// By the key of the policy set as it would be without refusals.
    sets: BTreeMap<SetKey, Vec<(BTreeSet<PolicyId>, CompileError)>>,
    /// In all policy sets.
    everywhere: BTreeMap<(PolicyId, Direction), CompileError>,
    /// Sets whose policies in audit are left out.
    not_audited: BTreeMap<SetKey, CompileError>,
    /// All policies in audit are.
    none_audited: Option<CompileError>,
    /// How many to leave out next, so that few rounds are needed where there is far too much.
    step: usize,
}

impl Refusals {
    /// The key of a policy set without what is left out of it.
    pub(crate) fn applied_to(&self, key: &SetKey) -> SetKey {
        let in_force = in_force(key);
        let of_set = self.sets.get(&in_force).into_iter().flatten().flat_map(|(policies, _)| policies);
        let everywhere = key.policies.iter().filter(|id| self.everywhere.contains_key(&((*id).clone(), key.direction)));
        let refused: BTreeSet<PolicyId> = of_set.chain(everywhere).cloned().collect();
        let audit = key.audit.as_deref().filter(|_| self.reason_against_audit(key).is_none());
        let audit = audit.map(|audit| Box::new(SetKey { refused: refused.clone(), ..audit.clone() }));
        SetKey { refused, audit, ..in_force }
    }

    /// Why a set's policies in audit are left out, if they are.
    fn reason_against_audit(&self, key: &SetKey) -> Option<&CompileError> {
        let sought = SetKey { refused: BTreeSet::new(), ..key.clone() };
        self.none_audited.as_ref().or_else(|| self.not_audited.get(&sought))
    }

    /// Leaves out what is to blame for a set that cannot be compiled; an error where nothing is left to leave out.
    /// `alone` compiles one of its policies.
    pub(crate) fn blame(
        &mut self,
        mut key: SetKey,
        error: CompileError,
        mut alone: impl FnMut(SetKey) -> Result<(), CompileError>,
    ) -> Result<(), CompileError> {
        if let Some(audit) = key.audit.take() {
            let audit = SetKey { refused: BTreeSet::new(), ..*audit };
            let whole = SetKey { refused: BTreeSet::new(), audit: Some(Box::new(audit)), ..key };
            self.not_audited.insert(whole, error);
            return Ok(());
        }
        let left: Vec<PolicyId> = key.policies.iter().filter(|id| !key.is_closed(id)).cloned().collect();
        if left.is_empty() {
            return Err(error);
        }
        let whole = SetKey { refused: BTreeSet::new(), ..key };
        let mut found = Vec::new();
        if left.len() > 1 {
            for id in &left {
                let single = SetKey { policies: [id.clone()].into(), unsure: BTreeSet::new(), ..whole.clone() };
                if let Err(error) = alone(single) {
                    found.push(([id.clone()].into(), error));
                }
            }
        }
        if found.is_empty() {
            found.push((left.into_iter().collect(), error));
        }
        self.sets.entry(whole).or_default().extend(found);
        Ok(())
    }

    /// Leaves out the policies that ask the most of peers that is not `known` yet; an error where none is left. What is in
    /// force stays: what it asks keeps its room until it is released, so that leaving it out makes none.
    pub(crate) fn blame_heaviest<'a>(
        &mut self,
        cluster: &Cluster,
        keys: impl Iterator<Item = &'a SetKey>,
        named_ports: &NamedPorts,
        known: impl Fn(&Atom) -> bool,
        error: CompileError,
    ) -> Result<(), CompileError> {
        let keys: Vec<&SetKey> = keys.collect();
        if keys.iter().any(|key| key.audit.is_some()) {
            self.none_audited = Some(error);
            return Ok(());
        }
        let mut weights: BTreeMap<(PolicyId, Direction), usize> = BTreeMap::new();
        for key in keys {
            for id in key.policies.iter().filter(|id| !key.is_closed(id)) {
                weights.entry((id.clone(), key.direction)).or_insert_with(|| {
                    let policy = cluster.policies.get(id).and_then(|policy| policy.rules(key.direction));
                    let atoms = policy
                        .unwrap_or_default()
                        .iter()
                        .flat_map(|rule| asked(cluster, rule, key.direction, named_ports));
                    atoms.filter(|atom| !known(atom)).count()
                });
            }
        }
        let mut heaviest: Vec<_> = weights.into_iter().filter(|(_, weight)| *weight > 0).collect();
        if heaviest.is_empty() {
            return Err(error);
        }
        heaviest.sort_by_key(|(_, weight)| std::cmp::Reverse(*weight));
        self.step = (2 * self.step).max(1);
        self.everywhere.extend(heaviest.into_iter().take(self.step).map(|(policy, _)| (policy, error.clone())));
        Ok(())
    }

    /// In words, given what each pod's policy sets would be without refusals.
    pub(crate) fn faults<'a>(&self, endpoints: impl Iterator<Item = (&'a PodId, &'a SetKey)>) -> Vec<Fault> {
        let mut closed: BTreeMap<(Direction, &BTreeSet<PolicyId>), Closed<'_>> = BTreeMap::new();
        let mut untold: BTreeMap<(Direction, BTreeSet<PolicyId>), Closed<'_>> = BTreeMap::new();
        let singles: BTreeMap<_, (BTreeSet<PolicyId>, _)> =
            self.everywhere.iter().map(|(key, error)| (key, ([key.0.clone()].into(), error))).collect();
        for (pod, key) in endpoints {
            if let (Some(audit), Some(source)) = (&key.audit, self.reason_against_audit(key)) {
                let policies = audit.policies.iter().filter(|id| !key.policies.contains(id)).cloned().collect();
                let new = || Closed { pods: BTreeSet::new(), source };
                untold.entry((key.direction, policies)).or_insert_with(new).pods.insert(pod.clone());
            }
            let of_set = self.sets.get(&in_force(key)).into_iter().flatten().map(|(policies, error)| (policies, error));
            let everywhere = key.policies.iter().filter_map(|id| {
                let (policies, error) = singles.get(&(id.clone(), key.direction))?;
                Some((policies, *error))
            });
            for (policies, source) in of_set.chain(everywhere) {
                let new = || Closed { pods: BTreeSet::new(), source };
                closed.entry((key.direction, policies)).or_insert_with(new).pods.insert(pod.clone());
            }
        }
        let faults = closed.into_iter().map(|((direction, policies), Closed { pods, source })| Fault::Refused {
            policies: policies.clone(),
            direction,
            pods,
            source: source.clone(),
        });
        let untold = untold.into_iter().map(|((direction, policies), Closed { pods, source })| Fault::NotAudited {
            policies,
            direction,
            pods,
            source: source.clone(),
        });
        faults.chain(untold).collect()
    }
}

/// The key of a set without its policies in audit.
fn in_force(key: &SetKey) -> SetKey {
    SetKey { audit: None, ..key.clone() }
}

/// What a rule asks about peers at the cluster's time.
fn asked(cluster: &Cluster, rule: &Rule, direction: Direction, named_ports: &NamedPorts) -> HashSet<Atom> {
    let mut atoms = HashSet::new();
    let Some(action) = flatten::action_now(cluster, rule) else { return atoms };
    for claim in Claim::needed(action) {
        if let Peers::OneOf(peers) = &rule.peers {
            let of = |peer| Atom::of(peer, direction, *claim, &cluster.catalog).into_iter().map(|(atom, _)| atom);
            atoms.extend(peers.iter().flat_map(of));
        }
        if let (Direction::Egress, Ports::OneOf(ports)) = (direction, &rule.ports) {
            for port in ports {
                if let PortSpec::Named(name) = &port.port {
                    let ports = flatten::ports_of_peers(named_ports, name, port.protocol, *claim);
                    atoms.extend(ports.map(|(_, atom)| atom));
                }
            }
        }
    }
    atoms
}

/// Whom the policies close, and why.
struct Closed<'a> {
    pods: BTreeSet<PodId>,
    source: &'a CompileError,
}
