//! A VLAN device: the frames of a device of the host that carry a tag.
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "vlan", "parent": "eth1", "id": 100, "protocol": "802.1q" }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! A VLAN of a parent has one device, so that one pod of a host has it. Where several shall, give them macvlans on a VLAN
//! device of the host.

use serde::{Deserialize, Serialize};

use super::pod_end::{Neighbours, PodDevice};
use super::{
    HostView, LinkDriver, LinkRequest, Need, PlanError, check_routes, device_mtu, parent_of, refuse_policy, vlan_of,
};
use crate::model::{IfName, Mtu, VlanId};
use crate::netlink::VlanProtocol;
use crate::plan::{Device, End, Plan, Tuning};
use crate::probe::Underlay;
use crate::sysctl::Sysctls;

/// `"link": { "kind": "vlan", ... }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VlanConfig {
    /// The device of the host whose frames they are. It must be up.
    pub parent: IfName,
    /// The VLAN; that of the pool from which the addresses come where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<VlanId>,
    /// The tag's kind: `802.1q` (the default) or `802.1ad`.
    #[serde(default)]
    pub protocol: VlanProtocol,
    /// MTU of the pod's device, in bytes; the parent's where absent, and never more than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// What else the pod's device is to be.
    #[serde(default, skip_serializing_if = "Tuning::is_default")]
    pub tuning: Tuning,
    /// What care is taken of the pod's addresses on the segment; the default where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub underlay: Option<Underlay>,
    /// Settings of the pod's namespace, and of its device.
    #[serde(default, skip_serializing_if = "Sysctls::is_empty")]
    pub sysctl: Sysctls,
}

impl VlanConfig {
    fn vlan(&self, request: &LinkRequest) -> Result<VlanId, PlanError> {
        vlan_of("link.id", self.id, &request.addresses)?.ok_or_else(|| PlanError::Invalid {
            field: "link.id",
            value: String::new(),
            reason: "missing, and no pool says it; give a number from 1 to 4094".to_owned(),
        })
    }
}

impl LinkDriver for VlanConfig {
    fn kind(&self) -> &'static str {
        "vlan"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        vec![Need { link: self.parent.clone(), addresses: false }]
    }

    fn plan(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        let id = self.vlan(request)?;
        refuse_policy(request, self.kind())?;
        check_routes(request)?;
        let mtu = device_mtu(self.mtu, &request.addresses)?;
        parent_of(host, &self.parent, mtu)?;
        let end = End { name: request.key.ifname.clone(), mac: request.mac };
        let neighbours = Neighbours::Resolved(request.mac);
        let underlay = Some(self.underlay.unwrap_or_default());
        let device = PodDevice { request, end, mtu, tuning: self.tuning, neighbours, underlay, parent: None };
        Ok(device.plan(Device::Vlan { parent: self.parent.clone(), id, protocol: self.protocol }))
    }

    fn expect(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        self.plan(request, host)
    }
}
