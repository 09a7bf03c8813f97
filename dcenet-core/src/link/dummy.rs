//! A dummy device: it bears addresses and leads nowhere.
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "dummy" }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```

use serde::{Deserialize, Serialize};

use super::pod_end::{Neighbours, PodDevice};
use super::{HostView, LinkDriver, LinkRequest, Need, PlanError, check_routes, device_mtu, refuse_policy, refuse_vlan};
use crate::model::Mtu;
use crate::plan::{Device, End, Plan, Tuning};
use crate::sysctl::Sysctls;

/// `"link": { "kind": "dummy", ... }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DummyConfig {
    /// MTU of the device, in bytes; the kernel's default (1500) where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// What else it is to be.
    #[serde(default, skip_serializing_if = "Tuning::is_default")]
    pub tuning: Tuning,
    /// Settings of the pod's namespace, and of its device.
    #[serde(default, skip_serializing_if = "Sysctls::is_empty")]
    pub sysctl: Sysctls,
}

impl LinkDriver for DummyConfig {
    fn kind(&self) -> &'static str {
        "dummy"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        Vec::new()
    }

    fn plan(&self, request: &LinkRequest, _: &HostView) -> Result<Plan, PlanError> {
        refuse_policy(request, self.kind())?;
        check_routes(request)?;
        refuse_vlan(self.kind(), &request.addresses)?;
        let mtu = device_mtu(self.mtu, &request.addresses)?;
        let end = End { name: request.key.ifname.clone(), mac: request.mac };
        let neighbours = Neighbours::Resolved(request.mac);
        Ok(PodDevice { request, end, mtu, tuning: self.tuning, neighbours, underlay: None, parent: None }
            .plan(Device::Dummy))
    }
}
