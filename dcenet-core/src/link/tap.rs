//! A TAP or TUN device in the pod, for a program there that reads and writes its frames: a virtual machine, or a user's
//! own network stack.
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "tap", "mode": "tap", "owner": 1000, "multiQueue": true }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! It stays when no program has it open; it has a carrier only while one has.

use serde::{Deserialize, Serialize};

use super::pod_end::{Neighbours, PodDevice, is_false};
use super::{HostView, LinkDriver, LinkRequest, Need, PlanError, check_routes, device_mtu, refuse_policy, refuse_vlan};
use crate::model::Mtu;
use crate::plan::{End, Operation, Plan, Step, TapSpec, Target, Tuning};
use crate::sysctl::Sysctls;

/// `"link": { "kind": "tap", ... }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TapConfig {
    /// What the program reads and writes: Ethernet frames (`tap`, the default) or IP packets (`tun`).
    #[serde(default)]
    pub mode: TapMode,
    /// The user who may open it beside root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<u32>,
    /// The group that may open it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u32>,
    /// Whether it may be opened several times, a queue each (Linux 3.8).
    #[serde(default, skip_serializing_if = "is_false")]
    pub multi_queue: bool,
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

/// What a program reads from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TapMode {
    /// Ethernet frames.
    #[default]
    Tap,
    /// IP packets. There is no Ethernet address.
    Tun,
}

impl LinkDriver for TapConfig {
    fn kind(&self) -> &'static str {
        "tap"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        Vec::new()
    }

    fn plan(&self, request: &LinkRequest, _: &HostView) -> Result<Plan, PlanError> {
        refuse_policy(request, self.kind())?;
        check_routes(request)?;
        refuse_vlan(self.kind(), &request.addresses)?;
        let mtu = device_mtu(self.mtu, &request.addresses)?;
        let ethernet = self.mode == TapMode::Tap;
        let end = End { name: request.key.ifname.clone(), mac: request.mac };
        let neighbours = if ethernet { Neighbours::Resolved(request.mac) } else { Neighbours::None };
        let device = PodDevice { request, end, mtu, tuning: self.tuning, neighbours, underlay: None, parent: None };
        let transit = device.transit();
        let tap = TapSpec { ethernet, owner: self.owner, group: self.group, multi_queue: self.multi_queue };
        let create = Operation::CreateTap { link: device.end.clone(), transit: transit.clone(), tap };
        let mut steps = vec![Step::new(Target::Pod, create).undone_by(device.undo())];
        device.finish(&mut steps);
        // Before it is up, which is the last but what comes with addresses.
        let up = steps.iter().position(|s| matches!(s.operation, Operation::Up { .. })).unwrap_or(steps.len());
        let name = device.end.name.clone();
        if let Some(mtu) = mtu {
            steps.insert(up, Step::new(Target::Pod, Operation::SetMtu { link: name.clone(), mtu }));
        }
        if ethernet {
            steps.insert(up, Step::new(Target::Pod, Operation::SetMac { link: name, mac: request.mac }));
        }
        Ok(Plan { steps, host_end: None, pod_end: device.end, bridge: None, router: None })
    }
}
