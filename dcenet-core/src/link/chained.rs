//! A device that a plugin before us in the chain made: nothing is made, and nothing of it removed.
//!
//! ```text
//!  pod: eth0 ---- veth1234 :host, of another plugin; policy and translation of ours
//! ```

use serde::{Deserialize, Serialize};

use super::{HostView, LinkDriver, LinkRequest, Need, PlanError, Policy, refuse_policy};
use crate::model::IfName;
use crate::plan::{End, Operation, Plan, Step, Target, Undo};

/// What was found of the other plugin's attachment. It is of records, and no kind that a configuration can name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChainedConfig {
    /// The device on the host through which all packets of the pod pass; `None` where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<End>,
    /// The pod's device.
    pub pod: End,
    /// The bridge of which the host's device is a port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<IfName>,
}

impl ChainedConfig {
    fn steps(&self, request: &LinkRequest) -> Result<Plan, PlanError> {
        let mut steps = Vec::new();
        if self.host.is_none() {
            refuse_policy(request, "of another plugin")?;
        } else if request.policy == Policy::Wanted {
            steps.push(Step::new(Target::Host, Operation::AttachPolicy).undone_by(Undo::DetachPolicy));
        }
        Ok(Plan {
            steps,
            host_end: self.host.clone(),
            pod_end: self.pod.clone(),
            bridge: self.bridge.clone(),
            router: None,
        })
    }
}

impl LinkDriver for ChainedConfig {
    fn kind(&self) -> &'static str {
        "chained"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        self.host.iter().map(|end| Need { link: end.name.clone(), addresses: false }).collect()
    }

    fn plan(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        let plan = self.expect(request, host)?;
        let Some(end) = &self.host else { return Ok(plan) };
        let differs = host.link(&end.name).is_some_and(|link| link.mac != Some(end.mac));
        match differs {
            true => Err(PlanError::Conflict {
                link: end.name.clone(),
                reason: "is another device than a moment ago; repeat the call".to_owned(),
            }),
            false => Ok(plan),
        }
    }

    fn expect(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        match &self.host {
            Some(end) if host.link(&end.name).is_none() => Err(PlanError::Conflict {
                link: end.name.clone(),
                reason: "of the plugin before this one is gone; have the runtime make the pod's network anew"
                    .to_owned(),
            }),
            _ => self.steps(request),
        }
    }
}
