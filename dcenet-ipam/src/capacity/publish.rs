//! Counts in the forms that a Kubernetes scheduler takes.

use std::collections::BTreeMap;

use dcenet_core::provider::LeaseError;
use serde::Serialize;

use super::Capacity;
use crate::select::Node;

/// The answer of a scheduler extender to the verb `filter`, for an extender that is `nodeCacheCapable`
/// (`ExtenderFilterResult` of k8s.io/kube-scheduler/extender/v1). The nodes that it was asked about are in one of the two.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FilterResult {
    /// Nodes that can serve the pod.
    #[serde(rename = "nodenames")]
    pub node_names: Vec<String>,
    /// Nodes that cannot, each with the reason.
    #[serde(rename = "failedNodes", skip_serializing_if = "BTreeMap::is_empty")]
    pub failed_nodes: BTreeMap<String, String>,
}

impl Capacity {
    /// The quantities for the `capacity` of a node's status, by the resource's name: `dcenet.io/ip-POOL`.
    ///
    /// The scheduler takes what the pods of the node request from what is published, so each is what the node could still
    /// give and what its attachments have together. A pod then requests `dcenet.io/ip-POOL: 1`. The number is right for one
    /// node at a time: nodes that share a pool publish the same addresses. Attachments are known to be on a node where
    /// their lease was asked for in its name ([`Ipam::on_node`](crate::Ipam::on_node)).
    ///
    /// # Errors
    /// [`LeaseError::Invalid`] if a pool's name makes no name of a resource: after the `/` at most 63 characters, the last
    /// a letter or digit (Kubernetes, "Labels and Selectors", syntax of qualified names).
    pub fn extended_resources(&self, node: &Node) -> Result<BTreeMap<String, String>, LeaseError> {
        self.on_node(node)
            .into_iter()
            .map(|pool| {
                let name = format!("ip-{}", pool.pool);
                if name.len() > 63 || !name.ends_with(|c: char| c.is_ascii_alphanumeric()) {
                    let reason = format!(
                        "{:?} makes no name of a resource; end it with a letter or digit, with at most 60 characters",
                        pool.pool
                    );
                    return Err(LeaseError::Invalid { field: "pool".to_owned(), reason });
                }
                // Quantities are signed 64-bit numbers.
                let quantity = pool.available.saturating_add(pool.in_use).min(i64::MAX as u128);
                Ok((format!("dcenet.io/{name}"), quantity.to_string()))
            })
            .collect()
    }

    /// Which of the nodes can give a pod so many addresses of each of the pools, by name.
    pub fn filter<'a>(
        &self,
        nodes: impl IntoIterator<Item = &'a Node>,
        wants: &BTreeMap<String, u128>,
    ) -> FilterResult {
        let mut result = FilterResult::default();
        for node in nodes {
            let capacity = self.on_node(node);
            let lacking = wants.iter().find_map(|(pool, count)| match capacity.iter().find(|c| c.pool == *pool) {
                None => Some(format!("pool {pool} does not serve the node")),
                Some(c) if c.available < *count => {
                    Some(format!("pool {pool} has {} free for the node, and {count} are needed", c.available))
                }
                Some(_) => None,
            });
            match lacking {
                None => result.node_names.push(node.name.to_string()),
                Some(reason) => drop(result.failed_nodes.insert(node.name.to_string(), reason)),
            }
        }
        result
    }
}
