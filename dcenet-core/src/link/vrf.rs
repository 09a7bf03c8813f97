//! A routed veth whose host end is in a routing domain (VRF): pods of one domain reach each other, and nobody else.
//!
//! ```text
//!  pod: eth0 (a.b.c.d/32) ---- dc<id>: port of VRF, whose table has the route a.b.c.d/32 -> dc<id> :host
//! ```
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "vrf", "vrf": "red", "table": 77 }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! The host's own addresses are reached from every domain as long as the rule of its local table comes first, as the
//! kernel makes it (priority 0); Documentation/networking/vrf.rst moves it behind that of the domains (1000).
//!
//! What leads out of the domain is whatever else the operator puts into it. Where its table has no route, the kernel goes
//! on to the host's main table (Documentation/networking/vrf.rst): on a host that forwards, put an unreachable default
//! route of a high metric into the table, for this driver does not.

use serde::{Deserialize, Serialize};

use super::bridge::create_pair;
use super::veth::{Domain, RoutedPair};
use super::{HostView, LinkDriver, LinkRequest, Need, PlanError};
use crate::bandwidth::Bandwidth;
use crate::model::{IfName, MacAddr, Mtu};
use crate::plan::{Device, End, Operation, Plan, Step, Target, Tuning, Undo, shared_mark};
use crate::sysctl::Sysctls;

/// `"link": { "kind": "vrf", ... }`.
///
/// # Minimum kernel version
/// 4.8, for IPv6 and rules of the domains' own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VrfConfig {
    /// The routing domain's device; made where it is missing.
    pub vrf: IfName,
    /// Its routing table, the same for all configurations that name the device.
    pub table: u32,
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

impl VrfConfig {
    fn plan_domain(&self, request: &LinkRequest, host: &HostView) -> Result<Vec<Step>, PlanError> {
        let on_host = |operation| Step::new(Target::Host, operation);
        let up = on_host(Operation::Up { link: self.vrf.clone(), master: None });
        match host.link(&self.vrf) {
            Some(vrf) if vrf.kind.as_deref() != Some("vrf") => Err(PlanError::Conflict {
                link: self.vrf.clone(),
                reason: format!(
                    "is a {} device and no routing domain; rename it, or name another in link.vrf",
                    vrf.kind.as_deref().unwrap_or("physical")
                ),
            }),
            Some(vrf) => Ok(if vrf.is_up() { Vec::new() } else { vec![up] }),
            None => {
                let mut bytes = request.key.mac().bytes();
                bytes[4] ^= 0xff;
                let end = End { name: self.vrf.clone(), mac: MacAddr::new(bytes) };
                let create = Operation::CreateLink {
                    link: end.clone(),
                    transit: None,
                    device: Device::Vrf { table: self.table },
                    mtu: None,
                    home: Target::Host,
                };
                let alias = shared_mark(&self.vrf);
                Ok(vec![
                    on_host(create).undone_by(Undo::DeleteIdleLink(end)),
                    on_host(Operation::Mark { link: self.vrf.clone(), alias }),
                    up,
                ])
            }
        }
    }
}

impl LinkDriver for VrfConfig {
    fn kind(&self) -> &'static str {
        "vrf"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        vec![Need { link: self.vrf.clone(), addresses: false }]
    }

    fn plan(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        // RT_TABLE_UNSPEC, and the tables that the kernel has for everybody (include/uapi/linux/rtnetlink.h).
        if matches!(self.table, 0 | 253..=255) {
            return Err(PlanError::Invalid {
                field: "link.table",
                value: self.table.to_string(),
                reason: "0 and 253 to 255 are not for routing domains; give another number".to_owned(),
            });
        }
        let pair = RoutedPair::new(self.kind(), request, self.mtu, self.bandwidth)?;
        let steps = create_pair(&pair.pod, &pair.host, pair.mtu, &request.key);
        let domain = Domain { master: &self.vrf, table: self.table };
        Ok(pair.plan(steps, self.tuning, Some(domain), self.plan_domain(request, host)?))
    }

    fn shared(&self) -> Vec<IfName> {
        vec![self.vrf.clone()]
    }
}
