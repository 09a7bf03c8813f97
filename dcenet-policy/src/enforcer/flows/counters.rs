//! What the datapath counts.

use dcenet_ebpf::abi::{self, Reason};
use dcenet_ebpf::maps::PerCpuArray;
use serde::Serialize;

use super::super::EnforcerError;
use super::super::state::Shared;
use super::{FlowAudit, as_optional_text, direction_of};
use crate::ir::RuleId;
use crate::model::{Direction, PolicyId, Verdict};

/// What one rule has decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RuleCounter {
    /// The rule, in words.
    pub rule: String,
    /// The policy, where the rule is one's.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
    pub policy: Option<PolicyId>,
    /// What would be if the policies in audit were in force, where that is something else. Such packets are counted apart: the
    /// counts of one rule are those of all entries with its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<FlowAudit>,
    /// Whether the rule is in force. One that is not keeps its counts until its number is given to another rule, or it
    /// comes back with another number.
    pub in_use: bool,
    /// Packets that began a flow, or were dropped.
    pub packets: u64,
    /// Their bytes, Ethernet headers included.
    pub bytes: u64,
}

/// Packets that had their verdict for one reason. Those of flows that are known already are counted in the flow alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReasonCounter {
    /// Why, in the datapath's words, as [`Flow::reason`](super::Flow::reason).
    pub reason: &'static str,
    /// What became of them.
    pub verdict: Verdict,
    /// Their direction, seen from the endpoint.
    pub direction: Direction,
    /// How many.
    pub packets: u64,
    /// Their bytes, Ethernet headers included.
    pub bytes: u64,
}

/// Packets and bytes by rule.
pub(crate) fn counters(shared: &Shared) -> Result<PerCpuArray<[u64; 2]>, EnforcerError> {
    PerCpuArray::new(shared.maps.get(abi::RULES)?).map_err(|e| EnforcerError::map(abi::RULES, e))
}

pub(crate) fn rule_counters(shared: &Shared) -> Result<Vec<RuleCounter>, EnforcerError> {
    let map = counters(shared)?;
    let names = shared.names.read();
    let fixed = (0..RuleId::FIRST.0).map(RuleId);
    let ids: Vec<RuleId> = fixed.chain(names.ids()).filter(|id| id.0 < map.entries()).collect();
    let end = ids.iter().map(|id| id.0 + 1).max().unwrap_or(0);
    let sums = map.sum_range(0, end).map_err(|e| EnforcerError::map(abi::RULES, e))?;
    let counter = |id: RuleId| {
        let [packets, bytes] = sums[id.0 as usize];
        let (rule, policy, audit) = (names.text(id), names.policy(id), names.audit(id));
        RuleCounter { rule, policy, audit, in_use: names.in_use(id), packets, bytes }
    };
    Ok(ids.into_iter().map(counter).collect())
}

pub(crate) fn reason_counters(shared: &Shared) -> Result<Vec<ReasonCounter>, EnforcerError> {
    let failed = |e| EnforcerError::map(abi::REASONS, e);
    let map = PerCpuArray::<[u64; 2]>::new(shared.maps.get(abi::REASONS)?).map_err(failed)?;
    let sums = map.sum_range(0, map.entries()).map_err(failed)?;
    let each = Reason::ALL.iter().flat_map(|reason| abi::Direction::ALL.map(|direction| (*reason, direction)));
    let counter = |(reason, direction): (Reason, abi::Direction)| {
        let [packets, bytes] = *sums.get(abi::reason_index(reason, direction) as usize)?;
        let verdict = if reason.passes() { Verdict::Allow } else { Verdict::Deny };
        Some(ReasonCounter { reason: reason.name(), verdict, direction: direction_of(direction), packets, bytes })
    };
    Ok(each.filter_map(counter).collect())
}
