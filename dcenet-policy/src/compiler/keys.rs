//! Which policies are whose.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::Compiler;
use crate::classes::{selector_holds, selector_may_hold};
use crate::flatten::{self, SetKey};
use crate::model::{
    Cluster, Direction, Mode, NamedPort, NamespaceMatch, Pod, PodId, PodMatch, Policy, PolicyId, Protocol,
};

impl Compiler {
    /// For each endpoint in scope what identifies its policy sets, ingress first.
    pub(crate) fn set_keys(&self, cluster: &Cluster) -> BTreeMap<PodId, [SetKey; 2]> {
        let mut named: HashMap<&str, Vec<&Policy>> = HashMap::new();
        let mut selected: Vec<&Policy> = Vec::new();
        for policy in cluster.policies.values() {
            match &policy.subject.namespaces {
                NamespaceMatch::Named(name) => named.entry(name).or_default().push(policy),
                NamespaceMatch::Selected(_) => selected.push(policy),
            }
        }
        let mut known: HashMap<Arc<[PolicyId]>, NamesUsed> = HashMap::new();
        let mut endpoints = BTreeMap::new();
        for (id, pod) in &cluster.pods {
            if !self.scope.holds(pod) {
                continue;
            }
            let candidates = named.get(id.namespace.as_str()).into_iter().flatten().chain(&selected);
            let governing = candidates.copied().filter(|policy| governs(cluster, policy, id, pod)).collect();
            // Pods with the same policies share their list.
            let keys = keys_of(cluster, pod, governing, &mut |policies| {
                if let Some((shared, names)) = known.get_key_value(policies.as_slice()) {
                    return (Arc::clone(shared), names.clone());
                }
                let names = flatten::names_used(cluster, &policies, Direction::Ingress);
                let shared: Arc<[PolicyId]> = policies.into();
                known.insert(Arc::clone(&shared), names.clone());
                (shared, names)
            });
            endpoints.insert(id.clone(), keys);
        }
        endpoints
    }
}

/// Whether a policy whose subjects' namespace has the pod's name, or is selected, governs the pod.
pub(super) fn governs(cluster: &Cluster, policy: &Policy, id: &PodId, pod: &Pod) -> bool {
    let PodMatch { namespaces, pods } = &policy.subject;
    let here = match namespaces {
        NamespaceMatch::Named(_) => true,
        NamespaceMatch::Selected(selector) => selector_holds(selector, &cluster.namespace_labels(&id.namespace)),
    };
    here && selector_may_hold(pods, &pod.labels)
}

/// The names of ports that rules use.
type NamesUsed = BTreeSet<(String, Protocol)>;

/// What identifies the policy sets of a pod that these policies govern, ingress first. `names_used` is told policies, and gives them
/// back with the names of ports that their rules for ingress use.
pub(super) fn keys_of(
    cluster: &Cluster,
    pod: &Pod,
    mut governing: Vec<&Policy>,
    names_used: &mut dyn FnMut(Vec<PolicyId>) -> (Arc<[PolicyId]>, NamesUsed),
) -> [SetKey; 2] {
    governing.sort_unstable_by(|left, right| cluster.order(left).cmp(&cluster.order(right)));
    Direction::ALL.map(|direction| {
        let with_rules = governing.iter().copied().filter(|policy| policy.rules(direction).is_some());
        let (in_audit, in_force): (Vec<&Policy>, Vec<&Policy>) =
            with_rules.clone().partition(|policy| policy.mode == Mode::Audit);
        let key = key_of(cluster, pod, direction, &in_force, names_used);
        if in_audit.is_empty() {
            return key;
        }
        let all: Vec<&Policy> = with_rules.collect();
        SetKey { audit: Some(Box::new(key_of(cluster, pod, direction, &all, names_used))), ..key }
    })
}

/// What identifies the set of these policies, all of them in force.
fn key_of(
    cluster: &Cluster,
    pod: &Pod,
    direction: Direction,
    governing: &[&Policy],
    names_used: &mut dyn FnMut(Vec<PolicyId>) -> (Arc<[PolicyId]>, NamesUsed),
) -> SetKey {
    let (policies, names) = names_used(governing.iter().map(|policy| policy.id.clone()).collect());
    let is_unsure = |policy: &&&Policy| !selector_holds(&policy.subject.pods, &pod.labels);
    let unsure = governing.iter().filter(is_unsure).map(|policy| policy.id.clone()).collect();
    let is_believed = !(pod.on_segment && direction == Direction::Ingress);
    let applies = |node: &String| !policies.is_empty() && is_believed && cluster.nodes.contains_key(node);
    let node = pod.node.clone().filter(applies);
    let mut named_ports = BTreeMap::new();
    if direction == Direction::Ingress {
        for (name, protocol) in names {
            let same = |port: &&NamedPort| port.name == name && port.protocol == protocol;
            let numbers = pod.ports.iter().filter(same).map(|port| port.port).collect();
            named_ports.insert((name, protocol), numbers);
        }
    }
    SetKey { direction, policies, node, named_ports, refused: BTreeSet::new(), unsure, audit: None }
}
