//! Rules that do nothing, contradict another, or open too much.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use serde::Serialize;

use super::services::Services;
use super::space::{Peers, Space, as_texts};
use super::{AnalysisError, Named, Scheduled};
use crate::classes;
use crate::compiler::{Compiler, Limits};
use crate::flatten::{self, Flattener, Place, SetKey};
use crate::ids::Ids;
use crate::isolation;
use crate::model::{Action, Cluster, Direction, PodId, PodNetwork, PolicyId, Protocol, RuleRef, Tier, TierEnd};

/// From where a rule that allows counts as too wide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thresholds {
    /// A block of IPv4 with a prefix of this length or a shorter one. 0: only all of IPv4.
    pub v4: u8,
    /// The same for IPv6.
    pub v6: u8,
    /// So many ports of TCP, UDP or SCTP. 65,536: only all ports of one of them.
    pub ports: u32,
}

impl Default for Thresholds {
    /// All addresses of a family, or all pods, with all ports of a protocol.
    fn default() -> Self {
        Self { v4: 0, v6: 0, ports: 65_536 }
    }
}

/// Everything that was found, by policy, direction and rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Version of the JSON shape; keys and kinds may be added in one version.
    pub version: u32,
    /// What was found.
    pub findings: Vec<Finding>,
    /// The rules that were taken as of the cluster's time: of those that do not hold nothing is said.
    pub scheduled: Vec<Scheduled>,
    /// The rules by names: whether they match or decide anything depends on answers, and nothing is said against them.
    pub named: Vec<Named>,
}

/// One thing to look at. All of them are of the pods, labels and addresses that there are now. A rule is called shadowed or
/// a duplicate only where it does nothing at other times either: by rules without a schedule, or with its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Finding {
    /// A policy selects no pod that policies apply to.
    NoSubject {
        /// The policy.
        #[serde(serialize_with = "text")]
        policy: PolicyId,
    },
    /// A policy is of a tier that there is not: the pods that it governs are closed.
    UnknownTier {
        /// The policy.
        #[serde(serialize_with = "text")]
        policy: PolicyId,
    },
    /// A rule matches no packet: its selectors hold for no pod or node, the group or service that it names has no address,
    /// its port's name is no pod's, or its list is empty. A rule out by names never is.
    Unreachable {
        /// The rule.
        rule: RuleRef,
    },
    /// Rules before it, or the end of a tier, decide all that a rule matches, at every pod that it governs.
    Shadowed {
        /// The rule.
        rule: RuleRef,
        /// What decides in its place.
        by: Vec<Decider>,
    },
    /// A rule repeats one before it: the same packets at the same pods, and the same action.
    Duplicate {
        /// The later one.
        rule: RuleRef,
        /// The earlier one.
        of: RuleRef,
    },
    /// Two rules match exactly the same peers and services at some pods; one allows, the other denies.
    Conflicting {
        /// The one that is tried first, and decides.
        winner: RuleRef,
        /// The other.
        loser: RuleRef,
        /// The pods.
        #[serde(serialize_with = "as_texts")]
        pods: Vec<PodId>,
    },
    /// A rule allows more than the [`Thresholds`].
    TooWide {
        /// The rule.
        rule: RuleRef,
        /// What it opens.
        width: Width,
        /// To whom it opens as many services.
        peers: Peers,
        /// With which services, at least.
        services: Services,
    },
}

/// What decides in place of a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decider {
    /// Another rule.
    Rule(RuleRef),
    /// That the peer is the pod's own node.
    OwnNode,
    /// That a policy of the tier NetworkPolicy selects the pod, so that nothing behind that tier is asked.
    Isolated,
    /// That this tier denies what no rule of it decides.
    TierEnd(Tier),
    /// That there is no such tier, which closes the pods.
    UnknownTier(Tier),
}

/// How wide a rule is; the first that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Width {
    /// Everything from or to anybody.
    AllowsAll,
    /// A block as large as the threshold, with as many ports.
    Block,
    /// Every pod of a cluster with pods in two namespaces or more, with as many ports.
    WholeCluster,
}

fn text<S: serde::Serializer>(policy: &PolicyId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(policy)
}

/// What a rule matches: by class of peers.
type Matched = BTreeMap<u32, Services>;

/// A rule at the pods of one policy set.
struct Placed {
    rule: RuleRef,
    action: Action,
    /// What it acts on.
    conditions: Vec<flatten::Match>,
    /// What a rule that passes denies, for it is not known whose the address is.
    denied: Vec<flatten::Match>,
}

/// What is known of a rule over all policy sets that it is part of.
#[derive(Default)]
struct Seen {
    matches: bool,
    decides: bool,
    by: BTreeSet<Decider>,
    /// The earlier rules that match the same at every pod so far, with the same action.
    twins: Option<BTreeSet<RuleRef>>,
    action: Option<Action>,
    matched: Matched,
    /// Whether more may come to it at other times.
    comes_later: bool,
}

/// Looks at every rule of every policy in force; of those in audit nothing is said, nor of rules whose schedule does not hold
/// at the cluster's time.
///
/// Where it is not known whether a policy governs a pod, for the pod's service account is not known, the policies of that
/// pod and direction count as doing something: of their rules nothing is told that does not hold at other pods, and none of
/// them is called unreachable, shadowed or a duplicate.
///
/// # Errors
///
/// [`AnalysisError::Compile`] where a policy is more than the compiler takes.
pub fn findings(cluster: &Cluster, thresholds: &Thresholds) -> Result<Findings, AnalysisError> {
    let limits = Limits::default();
    let cluster = &*cluster.without_audit();
    let mut sets: BTreeMap<SetKey, Vec<PodId>> = BTreeMap::new();
    for (pod, keys) in Compiler::default().set_keys(cluster) {
        for key in keys.into_iter().filter(|key| !key.policies.is_empty()) {
            sets.entry(key).or_default().push(pod.clone());
        }
    }
    let ambiguous = isolation::ambiguous(cluster);
    let named_ports = flatten::named_ports(cluster);
    let (mut rule_ids, known_atoms) = (Ids::starting_at(0), HashMap::new());
    let mut flattener = Flattener::new(cluster, &named_ports, &limits, &known_atoms, &mut rule_ids);
    let mut placed = Vec::new();
    for (key, pods) in &sets {
        let node = key.node.clone().map(|node| flattener.atom(classes::Atom::Node(node)));
        let rules: Vec<Placed> = place(&mut flattener, key)?;
        placed.push((key, pods, rules, node));
    }
    let atoms = std::mem::take(&mut flattener.atoms);

    let mut class_ids = Ids::starting_at(classes::ClassId::UNKNOWN.0 + 1);
    let table = classes::classify(cluster, &ambiguous, &atoms, &mut class_ids).table;
    let space = Space::new(&[&table], &[cluster]);
    let mut regions: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (index, region) in space.regions.iter().enumerate() {
        regions.entry(table.lookup(region.example).0).or_default().push(index);
    }
    let satisfied: BTreeMap<u32, BTreeSet<u32>> =
        regions.keys().map(|class| (*class, class_ids.key(*class).into_iter().flatten().copied().collect())).collect();

    let mut seen: BTreeMap<RuleRef, Seen> = BTreeMap::new();
    let mut conflicts: BTreeMap<(RuleRef, RuleRef), BTreeSet<PodId>> = BTreeMap::new();
    for (key, pods, rules, node) in &placed {
        if !key.unsure.is_empty() {
            // What its rules come to is not known: nothing is said against them.
            for placed in rules {
                let told = seen.entry(placed.rule.clone()).or_default();
                (told.matches, told.decides) = (true, true);
            }
            continue;
        }
        walk(cluster, key, pods, rules, *node, &satisfied, &mut seen, &mut conflicts);
    }

    let named: Vec<Named> = super::named(cluster).map(|(named, _)| named).collect();
    for Named { rule, .. } in &named {
        if let Some(told) = seen.get_mut(rule) {
            (told.matches, told.decides) = (true, true);
        }
    }

    let subjects: BTreeSet<&PolicyId> = sets.keys().flat_map(|key| key.policies.iter()).collect();
    let governs = |id: &PolicyId| Direction::ALL.into_iter().any(|way| cluster.policies[id].rules(way).is_some());
    let idle = cluster.policies.keys().filter(|id| !subjects.contains(id) && governs(id));
    let mut findings: Vec<Finding> = idle.map(|policy| Finding::NoSubject { policy: policy.clone() }).collect();
    let unknown = cluster.policies.keys().filter(|id| cluster.catalog.tier(&id.tier).is_none());
    findings.extend(unknown.map(|policy| Finding::UnknownTier { policy: policy.clone() }));
    for (rule, seen) in &seen {
        findings.extend(verdict_on(cluster, rule, seen));
        if seen.action == Some(Action::Allow) {
            findings.extend(too_wide(rule, seen, thresholds, cluster, &space, &regions));
        }
        let losing = conflicts.iter().filter(|((_, loser), _)| loser == rule);
        findings.extend(losing.map(|((winner, loser), pods)| Finding::Conflicting {
            winner: winner.clone(),
            loser: loser.clone(),
            pods: pods.iter().cloned().collect(),
        }));
    }
    Ok(Findings { version: 1, findings, scheduled: super::scheduled(cluster).into_iter().collect(), named })
}

/// The rules of a policy set, in the order in which they are tried.
fn place(flattener: &mut Flattener<'_>, key: &SetKey) -> Result<Vec<Placed>, AnalysisError> {
    let (cluster, direction) = (flattener.cluster, key.direction);
    let mut placed = Vec::new();
    for id in key.policies.iter() {
        let rules = cluster.policies.get(id).and_then(|policy| policy.rules(direction)).unwrap_or_default();
        for (index, rule) in rules.iter().enumerate() {
            let Some(action) = flatten::action_now(cluster, rule) else { continue };
            let mut matches = classes::Claim::needed(action)
                .iter()
                .map(|claim| flattener.matches(rule, direction, &key.named_ports, *claim, 0))
                .collect::<Result<Vec<_>, _>>()?
                .into_iter();
            let place = Place { policy: id, direction, rule: index };
            placed.push(Placed {
                rule: place.whole(),
                action,
                conditions: matches.next().unwrap_or_default(),
                denied: matches.next().unwrap_or_default(),
            });
        }
    }
    Ok(placed)
}

/// What some conditions hold for, class by class.
fn matched(conditions: &[flatten::Match], satisfied: &BTreeMap<u32, BTreeSet<u32>>) -> Matched {
    let mut matched = Matched::new();
    for flatten::Match { condition, service, .. } in conditions {
        for (class, atoms) in satisfied {
            if condition.iter().all(|atom| atoms.contains(atom)) {
                let services = matched.entry(*class).or_default();
                *services = services.or(&Services::from(*service));
            }
        }
    }
    matched
}

/// Tries the rules of one policy set as an evaluator would, for all packets at once.
#[expect(clippy::too_many_arguments, reason = "what is known, and two results")]
fn walk(
    cluster: &Cluster,
    key: &SetKey,
    pods: &[PodId],
    rules: &[Placed],
    node: Option<u32>,
    satisfied: &BTreeMap<u32, BTreeSet<u32>>,
    seen: &mut BTreeMap<RuleRef, Seen>,
    conflicts: &mut BTreeMap<(RuleRef, RuleRef), BTreeSet<PodId>>,
) {
    // What nothing decided yet.
    let mut open: Matched = satisfied.keys().map(|class| (*class, Services::all())).collect();
    let mut taken: Vec<(Decider, Matched)> = Vec::new();
    let mut alike: HashMap<Vec<(u32, Services)>, Vec<&Placed>> = HashMap::new();
    let listed = key.policies.iter().filter_map(|id| cluster.policies.get(id)?.rules(key.direction)).flatten();
    let passes_at_times: BTreeSet<_> =
        listed.filter(|rule| rule.action == Action::Pass).map(|rule| &rule.schedule).collect();
    let tiers: Vec<&[PolicyId]> = key.policies.chunk_by(|one, next| one.tier == next.tier).collect();
    let unknown = tiers.iter().flat_map(|of| of.first()).find(|id| cluster.catalog.tier(&id.tier).is_none());
    if let Some(PolicyId { tier, .. }) = unknown {
        taken.push((Decider::UnknownTier(tier.clone()), std::mem::take(&mut open)));
    }
    for policies in tiers {
        let Some(tier) = policies.first().map(|id| &id.tier) else { continue };
        let isolates = *tier == Tier::NetworkPolicy;
        // What in this tier has not been passed on either.
        let mut here = open.clone();
        let mut passed: Vec<(Decider, Matched)> = Vec::new();
        if let (true, Some(node)) = (isolates, node) {
            let of_node = satisfied.iter().filter(|(_, atoms)| atoms.contains(&node));
            let of_node: Matched = of_node.map(|(class, _)| (*class, Services::all())).collect();
            taken.push((Decider::OwnNode, meet(&of_node, &here)));
            open = take(&open, &of_node);
            here = take(&here, &of_node);
        }
        for placed in rules.iter().filter(|placed| placed.rule.policy.tier == *tier) {
            let whole = matched(&placed.conditions, satisfied);
            let denied = take(&matched(&placed.denied, satisfied), &whole);
            let told = seen.entry(placed.rule.clone()).or_default();
            let before = taken.iter().chain(&passed).filter(|(_, theirs)| !meet(theirs, &whole).is_empty());
            told.by.extend(before.map(|(decider, _)| decider.clone()));
            let effective = meet(&whole, &here);
            here = take(&here, &effective);
            let decided = match placed.action {
                Action::Allow | Action::Deny | Action::Reject => effective.clone(),
                Action::Pass => meet(&denied, &here),
            };
            open = take(&open, &decided);
            here = take(&here, &decided);
            told.action = Some(placed.action);
            told.comes_later |=
                passes_at_times.iter().any(|schedule| !is_there_with(cluster, schedule.as_ref(), &placed.rule));
            told.matches |= !whole.is_empty() || !denied.is_empty();
            told.decides |= !effective.is_empty() || !decided.is_empty();
            let same = alike.entry(whole.clone().into_iter().collect()).or_default();
            if !whole.is_empty() {
                let twins =
                    same.iter().filter(|other| other.action == placed.action).map(|other| other.rule.clone()).collect();
                told.twins = Some(match told.twins.take() {
                    Some(before) => before.intersection(&twins).cloned().collect(),
                    None => twins,
                });
                for other in same.iter().filter(|other| opposite(other.action, placed.action)) {
                    conflicts
                        .entry((other.rule.clone(), placed.rule.clone()))
                        .or_default()
                        .extend(pods.iter().cloned());
                }
            }
            same.push(placed);
            if placed.action == Action::Pass {
                passed.push((Decider::Rule(placed.rule.clone()), effective));
            }
            taken.push((Decider::Rule(placed.rule.clone()), decided));
            for (class, services) in whole {
                let all = told.matched.entry(class).or_default();
                *all = all.or(&services);
            }
        }
        let end = cluster.catalog.tier(tier).map(|spec| spec.end);
        if isolates {
            taken.push((Decider::Isolated, std::mem::take(&mut open)));
        } else if end == Some(TierEnd::Deny) {
            open = take(&open, &here);
            taken.push((Decider::TierEnd(tier.clone()), here));
        }
    }
}

fn opposite(left: Action, right: Action) -> bool {
    left != Action::Pass && right != Action::Pass && (left == Action::Allow) != (right == Action::Allow)
}

fn meet(left: &Matched, right: &Matched) -> Matched {
    let both = left.iter().filter_map(|(class, services)| Some((*class, services.and(right.get(class)?))));
    both.filter(|(_, services)| !services.is_empty()).collect()
}

fn take(from: &Matched, what: &Matched) -> Matched {
    let left = from.iter().map(|(class, services)| {
        (*class, what.get(class).map_or_else(|| services.clone(), |taken| services.minus(taken)))
    });
    left.filter(|(_, services)| !services.is_empty()).collect()
}

/// Whether what has the schedule is there whenever the rule is.
fn is_there_with(cluster: &Cluster, schedule: Option<&String>, rule: &RuleRef) -> bool {
    schedule.is_none() || schedule == schedule_of(cluster, rule)
}

fn schedule_of<'a>(cluster: &'a Cluster, rule: &RuleRef) -> Option<&'a String> {
    cluster.policies.get(&rule.policy)?.rules(rule.direction)?.get(rule.rule)?.schedule.as_ref()
}

fn verdict_on(cluster: &Cluster, rule: &RuleRef, seen: &Seen) -> Option<Finding> {
    if !seen.matches {
        return Some(Finding::Unreachable { rule: rule.clone() });
    }
    if seen.decides {
        return None;
    }
    let stays = |other: &RuleRef| is_there_with(cluster, schedule_of(cluster, other), rule);
    // In one tier nothing comes to the later one that does not come to the earlier.
    let near =
        |twin: &&RuleRef| seen.action != Some(Action::Pass) && twin.policy.tier == rule.policy.tier && stays(twin);
    if let Some(of) = seen.twins.iter().flatten().find(near) {
        return Some(Finding::Duplicate { rule: rule.clone(), of: of.clone() });
    }
    let goes = |by: &Decider| matches!(by, Decider::Rule(by) if !stays(by));
    if seen.comes_later || seen.by.iter().any(goes) {
        return None;
    }
    Some(match seen.twins.iter().flatten().next() {
        Some(of) => Finding::Duplicate { rule: rule.clone(), of: of.clone() },
        None => Finding::Shadowed { rule: rule.clone(), by: seen.by.iter().cloned().collect() },
    })
}

fn too_wide(
    rule: &RuleRef,
    seen: &Seen,
    thresholds: &Thresholds,
    cluster: &Cluster,
    space: &Space,
    regions: &BTreeMap<u32, Vec<usize>>,
) -> Option<Finding> {
    let transports = [Protocol::TCP, Protocol::UDP, Protocol::SCTP];
    let is_wide = |services: &Services| transports.iter().any(|of| services.ports_of(*of) >= thresholds.ports);
    let wide: Vec<(&u32, &Services)> = seen.matched.iter().filter(|(_, services)| is_wide(services)).collect();
    let indices: Vec<usize> =
        wide.iter().flat_map(|(class, _)| regions.get(class).into_iter().flatten()).copied().collect();
    let peers = space.peers(&indices)?;
    let services = wide.iter().map(|(_, services)| (*services).clone()).reduce(|all, next| all.and(&next))?;
    let own: BTreeMap<&PodId, _> = cluster.pods.iter().filter(|(_, pod)| pod.network == PodNetwork::Own).collect();
    let namespaces: BTreeSet<&str> = own.keys().map(|pod| pod.namespace.as_str()).collect();
    let is_block = |cidr: &ipnet::IpNet| match cidr {
        ipnet::IpNet::V4(cidr) => cidr.prefix_len() <= thresholds.v4,
        ipnet::IpNet::V6(cidr) => cidr.prefix_len() <= thresholds.v6,
    };
    let width = if wide.len() == regions.len() && services.is_all() {
        Width::AllowsAll
    } else if peers.others.iter().any(|others| is_block(&others.cidr)) {
        Width::Block
    } else if namespaces.len() > 1 && own.keys().all(|pod| peers.pods.binary_search(pod).is_ok()) {
        Width::WholeCluster
    } else {
        return None;
    };
    Some(Finding::TooWide { rule: rule.clone(), width, peers, services })
}

impl fmt::Display for Decider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => rule.fmt(f),
            Self::OwnNode => f.write_str("the pod's own node"),
            Self::Isolated => f.write_str("the pods' isolation"),
            Self::TierEnd(tier) => write!(f, "the end of the tier {tier}"),
            Self::UnknownTier(tier) => write!(f, "the want of a tier {tier}"),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSubject { policy } => write!(f, "no subject: {policy} selects no pod"),
            Self::UnknownTier { policy } => {
                write!(
                    f,
                    "unknown tier: {policy} closes the pods that it governs, for there is no tier {}",
                    policy.tier
                )
            }
            Self::Unreachable { rule } => write!(f, "unreachable: {rule} matches nothing"),
            Self::Shadowed { rule, by } => {
                let by: Vec<String> = by.iter().map(ToString::to_string).collect();
                write!(f, "shadowed: {rule} by {}", by.join(", "))
            }
            Self::Duplicate { rule, of } => write!(f, "duplicate: {rule} repeats {of}"),
            Self::Conflicting { winner, loser, pods } => {
                let pods: Vec<String> = pods.iter().map(ToString::to_string).collect();
                write!(f, "conflicting: {loser} against {winner}, which wins, at {}", pods.join(", "))
            }
            Self::TooWide { rule, width, peers, services } => {
                let what = match width {
                    Width::AllowsAll => "everything for everybody",
                    Width::Block => "a very large block",
                    Width::WholeCluster => "every pod",
                };
                write!(f, "too wide: {rule}: {what}: {services} for {peers}")
            }
        }
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.findings.iter().try_for_each(|finding| writeln!(f, "{finding}"))?;
        self.scheduled.iter().try_for_each(|rule| writeln!(f, "{rule}"))?;
        self.named.iter().try_for_each(|rule| writeln!(f, "{rule}"))
    }
}
