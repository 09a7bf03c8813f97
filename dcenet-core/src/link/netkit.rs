//! A netkit pair with routed addresses: as a veth without a bridge, but programs run where a packet enters the pair, and in
//! layer 3 no Ethernet addresses are needed at all.
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "netkit", "mode": "l3" }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! The host must forward, as with a [routed veth](super::VethConfig).

use serde::{Deserialize, Serialize};

use super::pod_end::{Neighbours, no_link_local};
use super::veth::RoutedPair;
use super::{HostView, LinkDriver, LinkRequest, Need, PlanError};
use crate::bandwidth::Bandwidth;
use crate::model::{MacAddr, Mtu};
use crate::netlink::NetkitMode;
use crate::plan::{Device, Operation, Plan, Step, Target, Tuning, Undo, mark};
use crate::sysctl::Sysctls;

/// `"link": { "kind": "netkit", ... }`.
///
/// # Minimum kernel version
/// 6.7 (`CONFIG_NETKIT`); before,
/// [`CreateLinkError::UnknownKind`](crate::netlink::CreateLinkError::UnknownKind).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetkitConfig {
    /// What the pair carries: IP packets (`l3`, the default) or Ethernet frames (`l2`). In `l3` no end has an Ethernet
    /// address, whatever address was asked for.
    #[serde(default = "l3")]
    pub mode: NetkitMode,
    /// MTU of the pod's device, in bytes; the kernel's default (1500) where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// What else the pod's device is to be.
    #[serde(default, skip_serializing_if = "Tuning::is_default")]
    pub tuning: Tuning,
    /// How fast the pod may send and receive; as it can where absent.
    #[serde(default, skip_serializing_if = "Bandwidth::is_none")]
    pub bandwidth: Bandwidth,
    /// Settings of the pod's namespace, and of its device.
    #[serde(default, skip_serializing_if = "Sysctls::is_empty")]
    pub sysctl: Sysctls,
}

impl LinkDriver for NetkitConfig {
    fn kind(&self) -> &'static str {
        "netkit"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        Vec::new()
    }

    fn plan(&self, request: &LinkRequest, _: &HostView) -> Result<Plan, PlanError> {
        let mut pair = RoutedPair::new(self.kind(), request, self.mtu, self.bandwidth)?;
        if self.mode == NetkitMode::L3 {
            (pair.pod.mac, pair.host.mac) = (NO_MAC, NO_MAC);
            pair.neighbours = Neighbours::None;
        }
        // The end that programs belong to is the one in the socket's namespace.
        let create = Operation::CreateLink {
            link: pair.host.clone(),
            transit: None,
            device: Device::Netkit { mode: self.mode, peer: pair.pod.clone() },
            mtu: pair.mtu,
            home: Target::Host,
        };
        let undo = Undo::DeleteLink { target: Target::Host, end: pair.host.clone() };
        let (name, alias) = (pair.pod.name.clone(), mark(&request.key));
        let steps = vec![
            Step::new(Target::Host, create).undone_by(undo),
            Step::new(Target::Pod, Operation::Mark { link: name.clone(), alias }),
            no_link_local(Target::Pod, &name),
        ];
        Ok(pair.plan(steps, self.tuning, None, Vec::new()))
    }
}

fn l3() -> NetkitMode {
    NetkitMode::L3
}

/// What the kernel says of a device without an Ethernet address.
const NO_MAC: MacAddr = MacAddr::new([0; 6]);
