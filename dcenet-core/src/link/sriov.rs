//! A virtual function of a network adapter (SR-IOV), which is the pod's as long as the attachment stands.
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "sriov", "pool": "fast", "mtu": 1500, "vf": { "vlan": 100, "maxRate": 1000 } }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! Which function it is, a [`DeviceSource`](crate::provider::DeviceSource) decides before anything is planned: one of a
//! pool, or the one that the runtime names (capability `deviceID`). The source makes it what `vf` says, gives it the
//! pod's Ethernet address and writes down what it was; here it is moved into the pod, still down, put under policy, set
//! up and given its addresses. On detach the source brings it back from wherever it is, as it was.
//!
//! # Policy
//! There is no end on the host: policy sits on the function's device in the pod, from before it is up, and needs Linux
//! 6.6 (tcx). It holds what the pod's stack sends and takes
//! ([`Enforcement::EgressBypassable`](crate::provider::Enforcement::EgressBypassable)); a pod with CAP_NET_RAW sends
//! past it. The port holds an untrusted function to its Ethernet address, and no guard can be put on it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::pod_end::{self, Neighbours, PodDevice};
use super::{HostView, LinkDriver, LinkRequest, Need, PlanError, check_routes, device_mtu};
use crate::model::Mtu;
use crate::plan::{End, Operation, Plan, Step, Target, Tuning, Undo, lent_mark};
use crate::probe::Underlay;
use crate::provider::{DeviceWish, LeasedAddress};
use crate::sysctl::Sysctls;

/// `"link": { "kind": "sriov", ... }`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SriovConfig {
    /// The pool of which it is, as the section `sriov` names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The function's PCI address, where it is to be this one; the capability `deviceID` goes before it. With a pool it
    /// must be of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The MTU in the pod, in bytes; unchanged where absent. The port's is the largest that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// What its port is to do with it, as `vlan`, `qos`, `maxRate`, `spoofchk` or `trust`; unchanged what is absent.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub vf: Map<String, Value>,
    /// What care is taken of the pod's addresses on the segment; the default where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub underlay: Option<Underlay>,
    /// Settings of the pod's namespace, and of its device.
    #[serde(default, skip_serializing_if = "Sysctls::is_empty")]
    pub sysctl: Sysctls,
}

impl SriovConfig {
    /// What is asked of the source for a pod without addresses.
    ///
    /// # Errors
    /// [`PlanError::Invalid`].
    pub fn wish(&self) -> Result<DeviceWish, PlanError> {
        self.wish_with(&[])
    }

    fn wish_with(&self, addresses: &[LeasedAddress]) -> Result<DeviceWish, PlanError> {
        Ok(DeviceWish {
            pool: self.pool.clone(),
            device: self.device.clone(),
            settings: self.vf.clone(),
            mtu: device_mtu(self.mtu, addresses)?,
            vlan: addresses.iter().find_map(|address| address.vlan),
        })
    }
}

impl LinkDriver for SriovConfig {
    fn kind(&self) -> &'static str {
        "sriov"
    }

    fn device(&self, request: &LinkRequest) -> Result<Option<DeviceWish>, PlanError> {
        if self.pool.is_none() && self.device.is_none() {
            return Err(PlanError::Invalid {
                field: "link.pool",
                value: String::new(),
                reason: "nothing says which function; name a pool of the section sriov, or have the runtime name the function \
                         by its capability deviceID"
                    .to_owned(),
            });
        }
        check_routes(request)?;
        self.wish_with(&request.addresses).map(Some)
    }

    /// Nothing: what the source lends it describes.
    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        Vec::new()
    }

    fn plan(&self, request: &LinkRequest, _: &HostView) -> Result<Plan, PlanError> {
        let Some(device) = &request.device else {
            return Err(PlanError::Invalid {
                field: "link.kind",
                value: self.kind().to_owned(),
                reason: "this program has no source of devices; use one that has, or another kind".to_owned(),
            });
        };
        let end = End { name: request.key.ifname.clone(), mac: device.mac };
        let alias = lent_mark(&request.key, &device.name);
        let to_pod = Operation::MoveLink { link: device.name.clone(), to: end.clone(), alias };
        let mut steps = vec![
            Step::new(Target::Host, to_pod).undone_by(Undo::ReleaseDevice(Box::new(device.clone()))),
            pod_end::no_router_advertisements(&end.name),
        ];
        let device = PodDevice {
            request,
            // The source has set it.
            mtu: None,
            tuning: Tuning::default(),
            neighbours: Neighbours::Resolved(end.mac),
            underlay: Some(self.underlay.unwrap_or_default()),
            parent: None,
            end,
        };
        device.set_up(&mut steps);
        Ok(Plan { steps, host_end: None, pod_end: device.end, bridge: None, router: None })
    }
}
