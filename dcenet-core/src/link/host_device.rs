//! A device of the host, which is the pod's as long as the attachment stands: a network card's port, or anything else that
//! may change its namespace.
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "host-device", "device": "eth1" }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! It keeps its own Ethernet address, whatever address was asked for. On detach it gets its name, MTU, alias, state and
//! addresses back, also where the pod's namespace is gone and the kernel has brought a physical device back under the
//! pod's name. Routes that the host had over it are not brought back.

use serde::{Deserialize, Serialize};

use super::pod_end::{self, Neighbours, PodDevice};
use super::{
    HostView, LinkDriver, LinkRequest, Need, PlanError, check_routes, device_mtu, is_link_local, parent_mac,
    refuse_policy, refuse_vlan,
};
use crate::model::{IfName, Mtu};
use crate::netlink::LinkView;
use crate::plan::{End, Lent, MARK, Operation, Plan, Step, Target, Tuning, Undo, lent_mark};
use crate::probe::Underlay;
use crate::sysctl::Sysctls;

/// `"link": { "kind": "host-device", ... }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HostDeviceConfig {
    /// The device.
    pub device: IfName,
    /// Its MTU in the pod, in bytes; unchanged where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// What else it is to be in the pod.
    #[serde(default, skip_serializing_if = "Tuning::is_default")]
    pub tuning: Tuning,
    /// What care is taken of the pod's addresses on the segment; the default where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub underlay: Option<Underlay>,
    /// Settings of the pod's namespace, and of its device.
    #[serde(default, skip_serializing_if = "Sysctls::is_empty")]
    pub sysctl: Sysctls,
}

impl HostDeviceConfig {
    fn steps(&self, request: &LinkRequest, mtu: Option<Mtu>, end: End, lent: Option<Lent>) -> Plan {
        let alias = lent_mark(&request.key, &self.device);
        let to_pod = Operation::MoveLink { link: self.device.clone(), to: end.clone(), alias };
        let mut step = Step::new(Target::Host, to_pod);
        step.undo = lent.map(|lent| Undo::ReturnLink(Box::new(lent)));
        let mut steps = vec![step, pod_end::no_router_advertisements(&end.name)];
        if let Some(mtu) = mtu {
            steps.push(Step::new(Target::Pod, Operation::SetMtu { link: end.name.clone(), mtu }));
        }
        // Of an address that is known without the device too.
        let neighbours = Neighbours::Resolved(request.key.mac());
        let underlay = Some(self.underlay.unwrap_or_default());
        let device = PodDevice { request, end, mtu, tuning: self.tuning, neighbours, underlay, parent: None };
        device.set_up(&mut steps);
        Plan { steps, host_end: None, pod_end: device.end, bridge: None, router: None }
    }

    /// What the device is now, and shall be again.
    fn snapshot(&self, request: &LinkRequest, host: &HostView, link: &LinkView) -> Result<Lent, PlanError> {
        let has = |flag: i32| link.flags & flag as u32 != 0;
        let conflict = |reason: String| Err(PlanError::Conflict { link: self.device.clone(), reason });
        if has(libc::IFF_LOOPBACK) {
            return conflict("is the loopback device, which every namespace has; name another".to_owned());
        }
        if link.master.is_some() {
            return conflict("is a port of a bridge, bond or routing domain; take it out of there first".to_owned());
        }
        if let Some(alias) = link.alias.as_deref().filter(|alias| alias.starts_with(MARK)) {
            return conflict(format!("belongs to another attachment ({alias}); name another"));
        }
        // The kernel makes link-local addresses by itself.
        let addresses = host.addresses.iter().filter(|a| a.index == link.index && !is_link_local(&a.address));
        Ok(Lent {
            end: End { name: self.device.clone(), mac: parent_mac(link)? },
            pod_name: request.key.ifname.clone(),
            mark: lent_mark(&request.key, &self.device),
            alias: link.alias.clone(),
            mtu: link.mtu,
            tx_queue_len: link.tx_queue_len,
            up: link.is_up(),
            promisc: has(libc::IFF_PROMISC),
            allmulti: has(libc::IFF_ALLMULTI),
            addresses: addresses.map(|a| a.address).collect(),
            physical: link.kind.is_none(),
        })
    }
}

impl LinkDriver for HostDeviceConfig {
    fn kind(&self) -> &'static str {
        "host-device"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        vec![Need { link: self.device.clone(), addresses: true }]
    }

    fn plan(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        refuse_policy(request, self.kind())?;
        check_routes(request)?;
        refuse_vlan(self.kind(), &request.addresses)?;
        let mtu = device_mtu(self.mtu, &request.addresses)?;
        let Some(link) = host.link(&self.device) else {
            return Err(PlanError::Invalid {
                field: "link.device",
                value: self.device.to_string(),
                reason: "the host has no such link; another pod may have it".to_owned(),
            });
        };
        let lent = self.snapshot(request, host, link)?;
        let end = End { name: request.key.ifname.clone(), mac: lent.end.mac };
        Ok(self.steps(request, mtu, end, Some(lent)))
    }

    fn expect(&self, request: &LinkRequest, _: &HostView) -> Result<Plan, PlanError> {
        // The device is away: its address is not known here, and a check takes it from the record.
        let end = End { name: request.key.ifname.clone(), mac: request.mac };
        let mtu = device_mtu(self.mtu, &request.addresses)?;
        Ok(self.steps(request, mtu, end, None))
    }
}
