//! How addresses become groups.

use std::fmt;
use std::str::FromStr;

use dcenet_core::model::{ClusterId, NetworkName, ParseError, Workload};
use dcenet_core::provider::LeaseError;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::Layout;
use crate::model::{AddressSpace, ClaimKey, pod_owner};
use crate::select::glob;

/// The stable name of a group, such as `east/shop/db`.
///
/// Up to four parts with `/` between them, each of letters, digits, `-`, `_` and `.` and beginning with a letter or
/// digit, at most 400 bytes together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupName(String);

impl GroupName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name that files and kernel objects can bear, with another character between the parts: of a long name its
    /// beginning and a checksum.
    pub(super) fn short(&self, between: char) -> String {
        let text = self.0.replace('/', &between.to_string());
        match text.get(..SHORT) {
            Some(head) if text.len() > SHORT => format!("{head}-{:08x}", crc32fast::hash(self.0.as_bytes())),
            _ => text,
        }
    }
}

impl FromStr for GroupName {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let part = |p: &str| {
            p.starts_with(|c: char| c.is_ascii_alphanumeric())
                && p.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        };
        if s.len() <= 400 && s.split('/').count() <= 4 && s.split('/').all(part) {
            return Ok(Self(s.to_owned()));
        }
        let reason =
            "not up to four parts with '/' between them, each of letters, digits, '-', '_' and '.', as shop/db";
        Err(ParseError { kind: "group", value: s.to_owned(), reason })
    }
}

impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for GroupName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GroupName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// What shares a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum GroupBy {
    /// All pods of one owner, `NAMESPACE/OWNER`. The owner is that of a claim set which the pod belongs to, else told by
    /// the pod's name in the forms that Kubernetes gives it: `db-0` belongs to `db`, `web-7d9f8c6b5-x2x4z` and
    /// `web-x2x4z` to `web`. Any other name is its own application. Where workloads are named otherwise, use rules or
    /// [`GroupBy::Workload`].
    #[default]
    Application,
    /// All workloads of a namespace, `NAMESPACE`.
    Namespace,
    /// Each workload, `NAMESPACE/NAME`. What a claim set keeps that any of its pods may use is in the group of its owner
    /// until a pod has it.
    Workload,
}

/// Puts workloads into a group of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupRule {
    /// Which workloads: a pattern for `NAMESPACE/NAME` with `*` for any run of characters and `?` for one. A claim set's
    /// addresses that any of its pods may use go by the name of its owner.
    pub workloads: String,
    /// The group, as `shop/payment`.
    pub group: GroupName,
}

/// How addresses become groups.
///
/// ```json
/// { "cluster": "east", "by": "application",
///   "rules": [ { "workloads": "shop/pay-*", "group": "shop/payment" } ] }
/// ```
///
/// The first rule whose pattern matches goes before `by`. Labels cannot be used: the store does not record them. What no
/// workload is known of is in the group `network.NETWORK` of its network. With a `cluster`, every name begins with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Grouping {
    /// The cluster of the store, as the first part of each name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterId>,
    /// Which address space: an address means something in one only.
    pub space: AddressSpace,
    /// What shares a group.
    pub by: GroupBy,
    /// Exceptions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<GroupRule>,
    /// Names what is in pools whose blocks applications own by whole blocks instead of by addresses: a firewall has few
    /// prefixes, and learns of a pod only when its application grows by a block.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub blocks: bool,
}

impl Grouping {
    pub(super) fn check(&self) -> Result<(), LeaseError> {
        for (i, rule) in self.rules.iter().enumerate() {
            if !rule.workloads.contains(['/', '*']) {
                let reason = format!("{:?} matches no workload; write namespace/name or a pattern", rule.workloads);
                return Err(LeaseError::Invalid { field: format!("rules[{i}].workloads"), reason });
            }
            if self.cluster.is_some() && rule.group.as_str().split('/').count() > 3 {
                let reason = format!("{} has four parts, and the cluster is one more; shorten it", rule.group);
                return Err(LeaseError::Invalid { field: format!("rules[{i}].group"), reason });
            }
        }
        Ok(())
    }

    /// The group of what a workload or claim has.
    pub(crate) fn group(
        &self,
        layout: &Layout,
        workload: Option<&Workload>,
        claim: Option<&ClaimKey>,
        network: Option<&NetworkName>,
    ) -> GroupName {
        let shared = claim.filter(|claim| claim.place.is_some()).map(|claim| &claim.workload);
        let name = match workload.or(claim.map(|claim| &claim.workload)) {
            None => format!("network.{}", network.map_or("unknown", NetworkName::as_str)),
            Some(workload) => match self.rules.iter().find(|rule| glob(&rule.workloads, &workload.to_string())) {
                Some(rule) => rule.group.to_string(),
                None => match self.by {
                    GroupBy::Namespace => workload.namespace().to_owned(),
                    GroupBy::Workload => workload.to_string(),
                    GroupBy::Application => match shared.or_else(|| owner(layout, workload)) {
                        Some(owner) => owner.to_string(),
                        None => format!("{}/{}", workload.namespace(), pod_owner(workload.name())),
                    },
                },
            },
        };
        self.of_cluster(name)
    }

    /// The group of what an application owns, whose name is as [`GroupBy::Application`] tells it.
    pub(super) fn group_of_application(&self, application: &str) -> GroupName {
        let name = match self.rules.iter().find(|rule| glob(&rule.workloads, application)) {
            Some(rule) => rule.group.to_string(),
            None => match (self.by, application.split_once('/')) {
                (GroupBy::Namespace, Some((namespace, _))) => namespace.to_owned(),
                _ => application.to_owned(),
            },
        };
        self.of_cluster(name)
    }

    fn of_cluster(&self, name: String) -> GroupName {
        GroupName(match &self.cluster {
            Some(cluster) => format!("{cluster}/{name}"),
            None => name,
        })
    }
}

/// The owner of the claim set that a workload is a member of.
fn owner<'a>(layout: &'a Layout, workload: &Workload) -> Option<&'a Workload> {
    let sets = layout.pools.iter().flat_map(|pool| &pool.sets);
    sets.filter(|set| set.has(workload)).map(|set| &set.owner.workload).next()
}

/// Bytes of a name that are kept in a short one, so that a file name has room for an ending.
const SHORT: usize = 180;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_parts_and_no_way_out_of_a_directory() {
        for good in ["shop", "shop/db", "east/shop/db.primary", "network.lan_1"] {
            assert_eq!(good.parse::<GroupName>().unwrap().to_string(), good);
        }
        for bad in ["", "/", "shop/", "../x", "shop/..", "a/b/c/d/e", "shop db", "shop/.x"] {
            let error = bad.parse::<GroupName>().unwrap_err().to_string();
            assert!(error.contains("as shop/db"), "{error}");
        }
        let long = |end: &str| GroupName(format!("a/{}{end}", "b".repeat(300))).short('+');
        assert!(long("1").len() < 200 && long("1") != long("2"));
    }

    #[test]
    fn rules_that_match_nothing_are_refused() {
        let grouping: Grouping =
            serde_json::from_str(r#"{ "rules": [ { "workloads": "db", "group": "shop/db" } ] }"#).unwrap();
        let error = grouping.check().unwrap_err().to_string();
        assert!(error.contains("rules[0].workloads") && error.contains("namespace/name"), "{error}");
    }
}
