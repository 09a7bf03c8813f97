//! Which pool serves whom.

use std::fmt;

use dcenet_core::model::{LabelSet, NetworkName, Workload};
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, ConfigFault};
use crate::model::NodeName;

/// The machine that asks: pools are chosen by it, and blocks belong to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name, unique among the nodes that share the store, the same over restarts.
    pub name: NodeName,
    /// Its labels.
    #[serde(default, skip_serializing_if = "LabelSet::is_empty")]
    pub labels: LabelSet,
}

impl Node {
    /// This machine under its host name, without labels; `None` where the host name is none that a node may have.
    /// Orchestrators name nodes so unless told otherwise.
    pub fn of_this_machine() -> Option<Self> {
        let name = rustix::system::uname().nodename().to_str().ok()?.to_lowercase();
        Some(Self { name: name.parse().ok()?, labels: LabelSet::default() })
    }
}

/// Whom a pool is for. Every condition that is given must hold; a condition that is left out or empty says nothing.
///
/// ```json
/// { "namespaces": ["shop", "team-*"], "workloads": ["db-*", "ops/scan"],
///   "labels": { "matchLabels": { "tier": "data" },
///               "matchExpressions": [ { "key": "env", "operator": "NotIn", "values": ["test"] } ] },
///   "nodes": ["rack1-*"], "nodeLabels": { "matchLabels": { "zone": "a" } }, "networks": ["lan*"] }
/// ```
///
/// Patterns match the whole text; `*` stands for any run of characters, `?` for one. A condition on something that is
/// not known of the request (a container without a workload, an allocator without a node) does not hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Selector {
    /// Patterns, one of which the workload's namespace matches; `*` for any workload with a namespace.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<String>,
    /// Patterns, one of which the workload's name matches, or `namespace/name` where the pattern has a `/`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub workloads: Vec<String>,
    /// What the workload's labels satisfy.
    #[serde(skip_serializing_if = "LabelSelector::is_empty")]
    pub labels: LabelSelector,
    /// Patterns, one of which the node's name matches.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<String>,
    /// What the node's labels satisfy.
    #[serde(skip_serializing_if = "LabelSelector::is_empty")]
    pub node_labels: LabelSelector,
    /// Patterns, one of which the name of the attachment's network matches.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<String>,
}

/// Labels, with the meaning of the `LabelSelector` of Kubernetes (meta/v1): all of both lists must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Labels that are there with this value.
    #[serde(skip_serializing_if = "LabelSet::is_empty")]
    pub match_labels: LabelSet,
    /// Further conditions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<LabelExpression>,
}

/// A condition on one label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelExpression {
    /// The label's key.
    pub key: String,
    /// How it is compared.
    pub operator: LabelOperator,
    /// With what: at least one value for `In` and `NotIn`, none for the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

/// How a label is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LabelOperator {
    /// It is there, with one of the values.
    In,
    /// It is not there, or with none of the values.
    NotIn,
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

/// What selectors look at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) workload: Option<&'a Workload>,
    pub(crate) labels: &'a LabelSet,
    pub(crate) network: &'a NetworkName,
    pub(crate) node: Option<&'a Node>,
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.workload {
            Some(workload) => write!(f, "workload {workload}")?,
            None => f.write_str("no workload")?,
        }
        write!(f, ", labels {}, network {}, ", List(self.labels), self.network)?;
        match self.node {
            Some(node) => write!(f, "node {} with labels {}", node.name, List(&node.labels)),
            None => f.write_str("no node"),
        }
    }
}

struct List<'a>(&'a LabelSet);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels: Vec<String> = self.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
        write!(f, "{{{}}}", labels.join(", "))
    }
}

impl Selector {
    /// The first condition that does not hold, in words; `None` if the subject is selected.
    pub(crate) fn mismatch(&self, subject: &Subject<'_>) -> Option<String> {
        let Self { namespaces, workloads, labels, nodes, node_labels, networks } = self;
        let none_of = |patterns: &[String], what: &str, text: Option<&str>| {
            let matched = text.is_some_and(|text| patterns.iter().any(|p| glob(p, text)));
            (!patterns.is_empty() && !matched)
                .then(|| format!("{what} {} is not among {}", text.unwrap_or("(unknown)"), patterns.join(", ")))
        };
        let workload_fault = || {
            let matches = |workload: &Workload| {
                workloads.iter().any(|pattern| match pattern.contains('/') {
                    true => glob(pattern, &workload.to_string()),
                    false => glob(pattern, workload.name()),
                })
            };
            if workloads.is_empty() || subject.workload.is_some_and(matches) {
                return None;
            }
            let name = subject.workload.map_or("(unknown)".to_owned(), ToString::to_string);
            Some(format!("workload {name} is not among {}", workloads.join(", ")))
        };
        let node_name = subject.node.map(|n| n.name.as_str());
        none_of(namespaces, "namespace", subject.workload.map(Workload::namespace))
            .or_else(workload_fault)
            .or_else(|| labels.mismatch(Some(subject.labels)).map(|m| format!("label {m}")))
            .or_else(|| none_of(nodes, "node", node_name))
            .or_else(|| node_labels.mismatch(subject.node.map(|n| &n.labels)).map(|m| format!("node label {m}")))
            .or_else(|| none_of(networks, "network", Some(subject.network.as_str())))
    }

    /// Whether the conditions on the node hold; the others are not looked at.
    pub(crate) fn admits(&self, node: &Node) -> bool {
        let named = self.nodes.is_empty() || self.nodes.iter().any(|pattern| glob(pattern, node.name.as_str()));
        named && self.node_labels.mismatch(Some(&node.labels)).is_none()
    }

    pub(crate) fn check(&self, field: &str) -> Result<(), ConfigError> {
        let Self { namespaces, workloads, labels, nodes, node_labels, networks } = self;
        let lists = [("namespaces", namespaces), ("workloads", workloads), ("nodes", nodes), ("networks", networks)];
        for (name, patterns) in lists {
            if let Some(i) = patterns.iter().position(String::is_empty) {
                let reason = "an empty pattern matches nothing; write a name, or * for any";
                return Err(malformed(format!("{field}.{name}[{i}]"), "", reason));
            }
        }
        for (i, pattern) in namespaces.iter().enumerate() {
            if pattern.contains('/') {
                let reason = "a namespace has no '/'; write namespace/name patterns in workloads";
                return Err(malformed(format!("{field}.namespaces[{i}]"), pattern, reason));
            }
        }
        labels.check(&format!("{field}.labels"))?;
        node_labels.check(&format!("{field}.nodeLabels"))
    }
}

impl LabelSelector {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn mismatch(&self, labels: Option<&LabelSet>) -> Option<String> {
        if self.is_empty() {
            return None;
        }
        let Some(labels) = labels else { return Some("conditions on nothing known".to_owned()) };
        let is = |key: &str| match labels.get(key) {
            Some(value) => format!("{key} is {value:?}"),
            None => format!("{key} is absent"),
        };
        for (key, wanted) in &self.match_labels {
            if labels.get(key) != Some(wanted) {
                return Some(format!("{}, not {wanted:?}", is(key)));
            }
        }
        for LabelExpression { key, operator, values } in &self.match_expressions {
            let value = labels.get(key);
            let listed = value.is_some_and(|value| values.contains(value));
            let holds = match operator {
                LabelOperator::In => listed,
                LabelOperator::NotIn => !listed,
                LabelOperator::Exists => value.is_some(),
                LabelOperator::DoesNotExist => value.is_none(),
            };
            if !holds {
                return Some(format!("{}, against {key} {operator:?} [{}]", is(key), values.join(", ")));
            }
        }
        None
    }

    fn check(&self, field: &str) -> Result<(), ConfigError> {
        if self.match_labels.contains_key("") {
            return Err(malformed(format!("{field}.matchLabels"), "", "a label's key is not empty"));
        }
        for (i, LabelExpression { key, operator, values }) in self.match_expressions.iter().enumerate() {
            let at = format!("{field}.matchExpressions[{i}]");
            if key.is_empty() {
                return Err(malformed(format!("{at}.key"), key, "a label's key is not empty"));
            }
            let reason = match (operator, values.is_empty()) {
                (LabelOperator::In | LabelOperator::NotIn, true) => "In and NotIn need at least one value",
                (LabelOperator::Exists | LabelOperator::DoesNotExist, false) => {
                    "Exists and DoesNotExist take no values; remove them"
                }
                _ => continue,
            };
            return Err(malformed(format!("{at}.values"), &values.join(", "), reason));
        }
        Ok(())
    }
}

/// Whether the pattern matches the whole text.
pub(crate) fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // Where the last `*` stands, and up to where it reaches in the text: the one place to go back to.
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == '?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((at, reach)) = star else { return false };
                star = Some((at, reach + 1));
                p = at + 1;
                t = reach + 1;
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

pub(crate) fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?'])
}

fn malformed(field: String, value: &str, reason: &str) -> ConfigError {
    ConfigError { field, value: value.to_owned(), fault: ConfigFault::Malformed(reason.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_the_whole_text() {
        for (pattern, text) in [
            ("shop", "shop"),
            ("*", ""),
            ("*", "x"),
            ("team-*", "team-"),
            ("a*b*c", "aXbXbc"),
            ("?b", "ab"),
            ("**a", "a"),
        ] {
            assert!(glob(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in
            [("shop", "shops"), ("", "a"), ("?", ""), ("a*b", "abc"), ("team-*", "team"), ("a?", "a")]
        {
            assert!(!glob(pattern, text), "{pattern} {text}");
        }
    }

    #[test]
    fn label_expressions_mean_what_they_mean_in_kubernetes() {
        let labels = LabelSet::from([("env".to_owned(), "prod".to_owned())]);
        let holds = |json: &str| serde_json::from_str::<LabelSelector>(json).unwrap().mismatch(Some(&labels)).is_none();
        for (operator, key, values, expected) in [
            ("In", "env", "[\"prod\"]", true),
            ("In", "env", "[\"test\"]", false),
            ("In", "tier", "[\"prod\"]", false),
            ("NotIn", "env", "[\"prod\"]", false),
            ("NotIn", "env", "[\"test\"]", true),
            // What is absent is in no set.
            ("NotIn", "tier", "[\"prod\"]", true),
            ("Exists", "env", "[]", true),
            ("Exists", "tier", "[]", false),
            ("DoesNotExist", "env", "[]", false),
            ("DoesNotExist", "tier", "[]", true),
        ] {
            let json = format!(
                r#"{{ "matchExpressions": [ {{ "key": "{key}", "operator": "{operator}", "values": {values} }} ] }}"#
            );
            assert_eq!(holds(&json), expected, "{json}");
        }
        assert!(holds(r#"{ "matchLabels": { "env": "prod" } }"#) && !holds(r#"{ "matchLabels": { "env": "" } }"#));
    }
}
