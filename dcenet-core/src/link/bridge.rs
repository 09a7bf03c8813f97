//! A veth whose host end is a port of a Linux bridge.
//!
//! ```text
//!  pod: eth0 ---- dc<id>: port of BRIDGE [ gateway addresses, if isGateway ] :host
//! ```
//!
//! # VLANs
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "bridge", "bridge": "dc0", "vlan": 10, "vlanTrunk": [ { "id": 20 }, { "minID": 100, "maxID": 199 } ] }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! With `vlan` the pod's port carries the frames of that VLAN without a tag and leaves the bridge's default VLAN, where pods
//! without the key are; with `vlanTrunk` those of others with their tags. The bridge keeps VLANs apart from then on, if it is
//! ours; one of somebody else's must do so already. The gateway of pods with `vlan` is a VLAN device of the host on the bridge,
//! `BRIDGE.VLAN`, or `dcb` and a digest where that is longer than a name may be; that of the default VLAN is the bridge, so that
//! `vlan` cannot name it with `isGateway`.

mod vlan;

use serde::{Deserialize, Serialize};

use super::pod_end::{self, is_false, no_link_local, tune};
use super::{
    HostView, LinkDriver, LinkRequest, Need, PlanError, Policy, check_routes, device_mtu, host_mac, is_link_local,
    link_local, shaper, vlan_of,
};
use crate::bandwidth::Bandwidth;
use crate::model::{AttachmentKey, IfName, MacAddr, Mtu, VlanId, VlanRange};
use crate::plan::{Announcer, BridgeVlan, End, Operation, Plan, Step, Target, Tuning, Undo, mark, shared_mark};
use crate::probe::Underlay;
use crate::provider::LeasedAddress;
use crate::sysctl::Sysctls;
use ipnet::IpNet;

/// `"link": { "kind": "bridge", ... }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BridgeConfig {
    /// The bridge; made where it is missing.
    pub bridge: IfName,
    /// MTU of the pod's device, in bytes; a lower one of its addresses' pools goes before it. The kernel's default (1500)
    /// where neither says anything. A bridge that is made gets the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// Whether the bridge carries the gateway addresses of the pods' subnets and forwards for them.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_gateway: bool,
    /// Whether a pod may reach itself through an address that the host translates to its own: frames may leave a port
    /// by which they came.
    #[serde(default, skip_serializing_if = "is_false")]
    pub hairpin_mode: bool,
    /// Whether the pod's port exchanges no frames with other isolated ports of the bridge, only with the host and with
    /// ports that are not isolated (Linux 4.18).
    #[serde(default, skip_serializing_if = "is_false")]
    pub isolated: bool,
    /// The VLAN of the pod's frames; that of the pool from which its addresses come where absent, or else the bridge's
    /// default one. Linux 3.9 with `CONFIG_BRIDGE_VLAN_FILTERING`; with `isGateway`, the kernel's `8021q` too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanId>,
    /// VLANs whose frames the pod sends and receives with their tags: not that of its frames without a tag, which is the
    /// bridge's default one where nothing says another. Policy knows no tags, so that it refuses them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vlan_trunk: Vec<VlanRange>,
    /// What else the pod's device is to be.
    #[serde(default, skip_serializing_if = "Tuning::is_default")]
    pub tuning: Tuning,
    /// How fast the pod may send and receive; as it can where absent.
    #[serde(default, skip_serializing_if = "Bandwidth::is_none")]
    pub bandwidth: Bandwidth,
    /// What care is taken of the pod's addresses on the segment; none where the key is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub underlay: Option<Underlay>,
    /// Settings of the pod's namespace, and of its device.
    #[serde(default, skip_serializing_if = "Sysctls::is_empty")]
    pub sysctl: Sysctls,
}

impl BridgeConfig {
    fn end(&self, key: &AttachmentKey) -> End {
        // Of the first attachment, whose container id no other host has: two hosts' bridges may share a wire.
        let mut bytes = key.mac().bytes();
        bytes[4] ^= 0xff;
        End { name: self.bridge.clone(), mac: MacAddr::new(bytes) }
    }

    /// What the bridge, whose Ethernet address is `mac`, bears as the pods' gateway.
    fn gateways(&self, addresses: &[LeasedAddress], mac: MacAddr) -> Vec<IpNet> {
        let gateway = |a: &LeasedAddress| IpNet::new(a.gateway?, a.address.prefix_len()).ok();
        let mut gateways = if self.is_gateway { addresses.iter().filter_map(gateway).collect() } else { Vec::new() };
        if gateways.iter().any(|g| g.addr().is_ipv6()) {
            // Without one the kernel asks for no neighbour on behalf of packets that it forwards (net/ipv6/ndisc.c,
            // ndisc_send_ns).
            gateways.insert(0, link_local(mac));
        }
        gateways
    }

    fn plan_bridge(
        &self,
        request: &LinkRequest,
        vlan: Option<VlanId>,
        mtu: Option<Mtu>,
        host: &HostView,
        steps: &mut Vec<Step>,
    ) -> Result<(), PlanError> {
        let on_bridge = |operation| Step::new(Target::Host, operation);
        let up = || on_bridge(Operation::Up { link: self.bridge.clone(), master: None });
        let mac = match host.link(&self.bridge) {
            None => {
                let end = self.end(&request.key);
                let vlan_filtering = self.keeps_apart(vlan);
                let create = Operation::CreateBridge { bridge: end.clone(), mtu, vlan_filtering };
                steps.push(on_bridge(create).undone_by(Undo::DeleteIdleBridge(end.clone())));
                let alias = shared_mark(&self.bridge);
                steps.push(on_bridge(Operation::Mark { link: self.bridge.clone(), alias }));
                steps.push(no_link_local(Target::Host, &self.bridge));
                if self.is_gateway && vlan.is_none() {
                    steps.push(on_bridge(Operation::ForwardIpv4 { link: self.bridge.clone() }));
                }
                steps.push(up());
                end.mac
            }
            Some(bridge) if bridge.kind.as_deref() == Some("bridge") => {
                self.plan_filtering(vlan, bridge, steps)?;
                if !bridge.is_up() {
                    steps.push(up());
                }
                bridge.mac.unwrap_or_else(|| request.key.mac())
            }
            Some(bridge) => {
                return Err(PlanError::Conflict {
                    link: self.bridge.clone(),
                    reason: format!(
                        "is a {} device and not a bridge; rename it, or name another in link.bridge",
                        bridge.kind.as_deref().unwrap_or("physical")
                    ),
                });
            }
        };
        let router = match vlan {
            Some(vlan) if self.is_gateway => self.plan_router(vlan, mac, host, steps)?,
            _ => self.bridge.clone(),
        };
        let of = vlan.map(|id| BridgeVlan { bridge: self.bridge.clone(), id });
        let add_gateway = |address: IpNet| {
            Step::new(Target::Host, Operation::AddAddress { link: router.clone(), address })
                .undone_by(Undo::DeleteIdleAddress { link: router.clone(), address, vlan: of.clone() })
                .content_with(&[libc::EEXIST])
        };
        let gateways = self.gateways(&request.addresses, mac).into_iter();
        let Some(link) = host.link(&router) else {
            steps.extend(gateways.map(add_gateway));
            return Ok(());
        };
        let has_link_local = host.has_link_local(link);
        let there = |a: &IpNet| host.has_address(link, *a) || is_link_local(a) && has_link_local;
        steps.extend(gateways.filter(|a| !there(a)).map(add_gateway));
        pod_end::forget(&router, &request.addresses, steps);
        Ok(())
    }
}

impl LinkDriver for BridgeConfig {
    fn kind(&self) -> &'static str {
        "bridge"
    }

    fn needs(&self, request: &LinkRequest) -> Vec<Need> {
        let mut needs = vec![Need { link: self.bridge.clone(), addresses: self.is_gateway }];
        if let Ok(Some(vlan)) = self.vlan_of(request)
            && self.is_gateway
        {
            needs.push(Need { link: self.router(vlan), addresses: true });
        }
        needs
    }

    fn plan(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        self.check_default(self.vlan_of(request)?, request, host)?;
        self.lay_out(request, host)
    }

    fn expect(&self, request: &LinkRequest, _: &HostView) -> Result<Plan, PlanError> {
        // Whatever the default VLAN is by now, this one was let through.
        self.lay_out(request, &HostView::default())
    }

    fn shared(&self) -> Vec<IfName> {
        vec![self.bridge.clone()]
    }
}

impl BridgeConfig {
    /// Whether the pod's port is in other VLANs than the bridge's default one.
    pub(crate) fn has_vlans(&self, request: &LinkRequest) -> Result<bool, PlanError> {
        Ok(self.keeps_apart(self.vlan_of(request)?))
    }
}

impl BridgeConfig {
    fn lay_out(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        check_routes(request)?;
        let vlan = self.vlan_of(request)?;
        let mtu = device_mtu(self.mtu, &request.addresses)?;
        self.bandwidth.check(mtu)?;
        let key = &request.key;
        let pod = End { name: key.ifname.clone(), mac: request.mac };
        let end = End { name: key.id().host_ifname(), mac: host_mac(key, request.mac) };
        let mut steps = create_pair(&pod, &end, mtu, key);
        let mut enter = Vec::new();
        pod_end::addresses(&pod.name, Some(pod.mac), &request.addresses, &mut enter);
        pod_end::routes(&pod.name, request, &mut enter);
        pod_up(&pod, self.tuning, &mut steps);
        if self.underlay.is_none() {
            steps.append(&mut enter);
        }
        host_end(&end, key, request.policy, self.bandwidth, &mut steps);
        self.plan_bridge(request, vlan, mtu, host, &mut steps)?;
        self.plan_port(&end.name, vlan, host, &mut steps);
        let master = Some(self.bridge.clone());
        steps.push(Step::new(Target::Host, Operation::Up { link: end.name.clone(), master }));
        if self.hairpin_mode {
            steps.push(Step::new(Target::Host, Operation::Hairpin { port: end.name.clone() }));
        }
        if self.isolated {
            steps.push(Step::new(Target::Host, Operation::Isolate { port: end.name.clone() }));
        }
        settle_carrier(&pod, &end, &mut steps);
        let router = vlan.filter(|_| self.is_gateway).map(|vlan| self.router(vlan));
        if let Some(link) = router.clone() {
            // Also one that is there: it had no carrier while the bridge had no port that was up.
            steps.push(Step::new(Target::Host, Operation::SettleCarrier { link }));
        }
        if let Some(underlay) = &self.underlay {
            // Asked by way of the bridge, under the policy that stands.
            let probe = pod_end::probe_conflicts(underlay, Target::Pod, &pod.name, pod.mac, &request.addresses);
            steps.extend(probe);
            steps.append(&mut enter);
        }
        pod_end::settle(&pod.name, &request.addresses, &mut steps);
        if let Some(underlay) = &self.underlay {
            pod_end::introduce(underlay, &pod, &request.addresses, Announcer::Kernel, &mut steps);
        }
        Ok(Plan { steps, host_end: Some(end), pod_end: pod, bridge: Some(self.bridge.clone()), router })
    }
}

/// The pair, its pod's end marked.
pub(super) fn create_pair(pod: &End, host: &End, mtu: Option<Mtu>, key: &AttachmentKey) -> Vec<Step> {
    let create = Operation::CreateVeth { near: pod.clone(), far: host.clone(), mtu };
    vec![
        Step::new(Target::Pod, create).undone_by(Undo::DeleteLink { target: Target::Host, end: host.clone() }),
        Step::new(Target::Pod, Operation::Mark { link: pod.name.clone(), alias: mark(key) }),
        no_link_local(Target::Pod, &pod.name),
    ]
}

/// The pod's end up, with its addresses, and a link-local one where there is IPv6.
pub(super) fn set_up_pod(pod: &End, tuning: Tuning, addresses: &[LeasedAddress], steps: &mut Vec<Step>) {
    pod_up(pod, tuning, steps);
    pod_end::addresses(&pod.name, Some(pod.mac), addresses, steps);
}

fn pod_up(pod: &End, tuning: Tuning, steps: &mut Vec<Step>) {
    tune(&pod.name, tuning, steps);
    steps.push(Step::new(Target::Pod, Operation::Up { link: pod.name.clone(), master: None }));
}

/// The host's end, still down: under policy, then marked and limited.
pub(super) fn host_end(end: &End, key: &AttachmentKey, policy: Policy, bandwidth: Bandwidth, steps: &mut Vec<Step>) {
    if policy == Policy::Wanted {
        steps.push(Step::new(Target::Host, Operation::AttachPolicy).undone_by(Undo::DetachPolicy));
    }
    steps.push(Step::new(Target::Host, Operation::Mark { link: end.name.clone(), alias: mark(key) }));
    steps.push(no_link_local(Target::Host, &end.name));
    shaper::limit(end, key, bandwidth, steps);
}

/// The end of every veth: both ends carry packets when the attach returns, and the pod takes those for its addresses.
pub(super) fn settle(pod: &End, host: &End, addresses: &[LeasedAddress], steps: &mut Vec<Step>) {
    settle_carrier(pod, host, steps);
    pod_end::settle(&pod.name, addresses, steps);
}

fn settle_carrier(pod: &End, host: &End, steps: &mut Vec<Step>) {
    for (target, end) in [(Target::Host, host), (Target::Pod, pod)] {
        steps.push(Step::new(target, Operation::SettleCarrier { link: end.name.clone() }));
    }
}
