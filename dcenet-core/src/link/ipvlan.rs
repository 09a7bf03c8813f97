//! An ipvlan device: IP addresses of its own behind the Ethernet address of a device of the host.
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "ipvlan", "parent": "eth1", "mode": "l2", "flag": "bridge" }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! The pod has the parent's Ethernet address, whatever address was asked for. So have all pods of the parent: whether one
//! of them, or the host, has an address already is not found by asking the segment. In the modes `l3` and `l3s` packets are
//! routed in the host's namespace; there are no neighbours, and every route leads straight to the device.
//!
//! Policy sits on the device in the pod, as for [macvlan](super::MacvlanConfig), in the modes `l2` and `l3`; `l3s` hands packets
//! to the pod past its device, and is refused under policy, and beside a pod under policy on the same parent: all ipvlan devices
//! of a parent share the mode. Who makes such devices by other means must keep to that.

use serde::{Deserialize, Serialize};

use super::pod_end::{Neighbours, Parent, PodDevice};
use super::{
    HostView, LinkDriver, LinkRequest, Need, PlanError, Policy, check_routes, device_mtu, parent_mac, parent_of,
    refuse_vlan,
};
use crate::model::{AttachmentKey, IfName, Mtu};
use crate::netlink::{IpvlanFlag, IpvlanMode};
use crate::plan::{Device, End, Plan, Tuning};
use crate::probe::Underlay;
use crate::sysctl::Sysctls;

/// `"link": { "kind": "ipvlan", ... }`.
///
/// # Minimum kernel version
/// 4.15, for the flags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IpvlanConfig {
    /// The device of the host on which it is made. It must be up. All ipvlan devices of a parent share mode and flag:
    /// those of the latest.
    pub parent: IfName,
    /// How far up packets are handed over: `l2` (the default), `l3` or `l3s`.
    #[serde(default = "l2")]
    pub mode: IpvlanMode,
    /// Whom the pod reaches: `bridge` (the default), `private` or `vepa`.
    #[serde(default)]
    pub flag: IpvlanFlag,
    /// MTU of the pod's device, in bytes; the parent's where absent, and never more than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// What else the pod's device is to be.
    #[serde(default, skip_serializing_if = "Tuning::is_default")]
    pub tuning: Tuning,
    /// What care is taken of the pod's addresses on the segment; the default where the key is absent, in the mode `l2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub underlay: Option<Underlay>,
    /// Settings of the pod's namespace, and of its device.
    #[serde(default, skip_serializing_if = "Sysctls::is_empty")]
    pub sysctl: Sysctls,
}

impl IpvlanConfig {
    /// In the mode `l3s` what comes in passes the parent's netfilter hooks and is handed to the pod's sockets behind its
    /// device's ingress hook (drivers/net/ipvlan/ipvlan_l3s.c, `ipvlan_l3_rcv`).
    fn check_policy(&self, request: &LinkRequest) -> Result<(), PlanError> {
        match (self.mode, request.policy) {
            (IpvlanMode::L3s, Policy::Wanted) => Err(PlanError::Invalid {
                field: "link.mode",
                value: "l3s".to_owned(),
                reason:
                    "hands the pod packets that its device's programs never see; drop the policy section, or use the \
                         mode l2 or l3"
                        .to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// Refuses the mode `l3s` beside a pod under policy, and policy beside that mode: mode and flag are of the parent's port, and
    /// the latest device sets them for all (drivers/net/ipvlan/ipvlan_main.c, `ipvlan_link_new`, `ipvlan_set_port_mode`).
    pub(crate) fn check_beside(
        &self,
        policy: Policy,
        other: &AttachmentKey,
        config: &Self,
        others_policy: Policy,
    ) -> Result<(), PlanError> {
        let conflict = |reason: String| Err(PlanError::Conflict { link: self.parent.clone(), reason });
        if config.parent != self.parent {
            return Ok(());
        }
        match ((self.mode, policy), (config.mode, others_policy)) {
            ((IpvlanMode::L3s, _), (_, Policy::Wanted)) => conflict(format!(
                "the mode l3s would take {other}, which is on it under policy, out of that, for all ipvlan devices of a parent \
                 share the mode; use another parent, or the mode l2 or l3"
            )),
            ((_, Policy::Wanted), (IpvlanMode::L3s, _)) => conflict(format!(
                "its ipvlan devices have the mode l3s for {other}, which hands pods packets that their devices' programs never \
                 see; use another parent, or detach that first"
            )),
            _ => Ok(()),
        }
    }
}

impl LinkDriver for IpvlanConfig {
    fn kind(&self) -> &'static str {
        "ipvlan"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        vec![Need { link: self.parent.clone(), addresses: false }]
    }

    fn plan(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        self.check_policy(request)?;
        check_routes(request)?;
        refuse_vlan(self.kind(), &request.addresses)?;
        let mtu = device_mtu(self.mtu, &request.addresses)?;
        let parent = parent_of(host, &self.parent, mtu)?;
        let neighbours = match self.mode {
            // All devices of the parent have one Ethernet address, and each needs a link-local address of its own.
            IpvlanMode::L2 => Neighbours::Resolved(request.key.mac()),
            IpvlanMode::L3 | IpvlanMode::L3s => Neighbours::None,
        };
        let mac = parent_mac(parent)?;
        let underlay = match (self.mode, self.underlay) {
            (IpvlanMode::L2, underlay) => Some(underlay.unwrap_or_default()),
            (_, None) => None,
            (mode, Some(_)) => {
                return Err(PlanError::Invalid {
                    field: "link.underlay",
                    value: format!("with mode {mode:?}").to_lowercase(),
                    reason: "its packets are routed and it has no neighbours to ask; drop it, or use the mode l2"
                        .to_owned(),
                });
            }
        };
        let device = PodDevice {
            request,
            end: End { name: request.key.ifname.clone(), mac },
            mtu,
            tuning: self.tuning,
            neighbours,
            underlay,
            parent: Some(Parent { link: self.parent.clone(), shared_mac: Some(mac), has_own_mac: false }),
        };
        Ok(device.plan(Device::Ipvlan { parent: self.parent.clone(), mode: self.mode, flag: self.flag }))
    }

    fn expect(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        self.plan(request, host)
    }
}

fn l2() -> IpvlanMode {
    IpvlanMode::L2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_device_takes_a_pod_of_its_parent_out_of_policy() {
        let other = AttachmentKey {
            network: "shop".parse().unwrap(),
            container: "c1".parse().unwrap(),
            ifname: "eth0".parse().unwrap(),
        };
        let config = |parent: &str, mode: &str| {
            serde_json::from_value::<IpvlanConfig>(serde_json::json!({ "parent": parent, "mode": mode })).unwrap()
        };
        let check = |(parent, mode, policy), (others_mode, others_policy)| {
            config(parent, mode).check_beside(policy, &other, &config("up0", others_mode), others_policy)
        };
        let (free, held) = (Policy::None, Policy::Wanted);
        for mode in ["l2", "l3"] {
            let error = check(("up0", "l3s", free), (mode, held)).unwrap_err().to_string();
            assert!(error.contains("up0") && error.contains("c1") && error.contains("under policy"), "{error}");
            let error = check(("up0", mode, held), ("l3s", free)).unwrap_err().to_string();
            assert!(error.contains("up0") && error.contains("c1") && error.contains("l3s"), "{error}");
            check(("up1", "l3s", free), (mode, held)).unwrap();
            check(("up0", "l3s", free), (mode, free)).unwrap();
            check(("up0", mode, held), (mode, held)).unwrap();
            check(("up0", mode, free), ("l3s", free)).unwrap();
            // Would change the mode, and to one that policy sees.
            check(("up0", mode, free), (mode, held)).unwrap();
        }
    }
}
