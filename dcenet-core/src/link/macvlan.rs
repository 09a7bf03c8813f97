//! A macvlan device: an Ethernet address of its own on a device of the host, straight on that device's segment.
//!
//! ```text
//!  pod: eth0 (its own Ethernet address) ---+
//!                                          +--- PARENT ---- the segment
//!  host: dcm<hash>, if hostAccess ---------+
//! ```
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "macvlan", "parent": "eth1", "mode": "bridge", "hostAccess": true, "mtu": 1500 }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! The kernel never lets a parent talk to the devices on it, so that the host's own addresses there are not found when the
//! segment is asked for those of the pod: keep them out of the pools. With `hostAccess` the host has a device of its own on the
//! same parent, which all pods share; routes lead over it to each pod and back to the addresses that the parent has when
//! the pod is attached. All neighbours of that device are entered for good and it answers no ARP, so that the segment
//! never learns of it.
//!
//! # Policy
//! There is no end on the host: policy sits on the device in the pod, from before it is up, and needs Linux 6.6 (tcx). It holds
//! what the pod sends by its stack and what comes to its stack. A pod with CAP_NET_RAW can send past it, and read by packet
//! sockets what it denies; one with CAP_NET_ADMIN can make another macvlan on the same parent, which is judged in neither
//! direction ([`Enforcement::EgressBypassable`](crate::provider::Enforcement::EgressBypassable)). Do not grant those where policy
//! matters, or refuse such devices by `"policy": { "require": "full" }`.
//!
//! From Linux 6.13 on, `"policy": { "require": "guarded" }` has the owner of the policy state put a guard on the parent, which judges
//! there once more what this pod sends to the wire and to others, by whatever device, or refuses the pod:
//! [`Enforcement::Guarded`](crate::provider::Enforcement::Guarded) says what that holds and what not. Such a pod must have no other
//! device that leaves by the same parent, such as a VLAN device over that, or a second macvlan without a guard: what it sends by
//! that is dropped as spoofed. The modes `vepa` and `private` leave less open than `bridge`: in these the kernel copies no broadcast from one
//! pod to another. In `passthru` there is no guard, for the pod has the parent's own address.
//!
//! What has the address of the pod's node as its source is not let in for that, as it is on a host's end: on a segment anybody can
//! send from it. Where the host shall reach an isolated pod by `hostAccess`, a policy must allow its address.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::pod_end::{self, Neighbours, Parent, PodDevice, direct, is_false};
use super::{
    HostView, LinkDriver, LinkRequest, Need, PlanError, check_routes, device_mtu, is_link_local, parent_mac, parent_of,
    refuse_vlan,
};
use crate::model::{IfName, MacAddr, Mtu};
use crate::netlink::{LinkView, MacvlanMode};
use crate::plan::{Device, End, Operation, Plan, Step, Target, Tuning, Undo, shared_mark};
use crate::probe::Underlay;
use crate::sysctl::Sysctls;
use ipnet::IpNet;

/// `"link": { "kind": "macvlan", ... }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MacvlanConfig {
    /// The device of the host on which it is made. It must be up.
    pub parent: IfName,
    /// Whom the pod reaches: `bridge` (the default), `vepa`, `private`, `passthru` or `source`. In `passthru` the pod is
    /// the only one on the parent and has its Ethernet address.
    #[serde(default = "bridge")]
    pub mode: MacvlanMode,
    /// In mode `source` the Ethernet addresses whose frames the pod gets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<MacAddr>,
    /// MTU of the pod's device, in bytes; the parent's where absent, and never more than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// Whether host and pod reach each other.
    #[serde(default, skip_serializing_if = "is_false")]
    pub host_access: bool,
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

impl MacvlanConfig {
    /// The host's own device on the parent.
    fn shim(&self) -> IfName {
        let digest = Sha256::digest(self.parent.as_str());
        let digits: String = digest[..6].iter().map(|b| format!("{b:02x}")).collect();
        format!("dcm{digits}").parse().expect("15 bytes of letters and digits are an interface name")
    }

    fn check(&self) -> Result<(), PlanError> {
        let invalid =
            |field, value: String, reason: &str| Err(PlanError::Invalid { field, value, reason: reason.to_owned() });
        if (self.mode == MacvlanMode::Source) == self.sources.is_empty() {
            let value = format!("{} addresses", self.sources.len());
            return invalid("link.sources", value, "the mode `source`, and no other, needs a list of them");
        }
        if let Some(group) = self.sources.iter().find(|mac| !mac.is_device_address()) {
            return invalid("link.sources", group.to_string(), "nobody sends from it; give unicast addresses");
        }
        if self.host_access && self.mode != MacvlanMode::Bridge {
            return invalid("link.hostAccess", "true".to_owned(), "only devices in the mode `bridge` reach each other");
        }
        Ok(())
    }

    /// The host's device, what leads over it to the pod, and what leads to the host from the pod.
    fn plan_host(
        &self,
        request: &LinkRequest,
        host: &HostView,
        parent: &LinkView,
        plan: &mut Plan,
    ) -> Result<(), PlanError> {
        let name = self.shim();
        let on_host = |operation| Step::new(Target::Host, operation);
        let up = on_host(Operation::Up { link: name.clone(), master: None });
        let mut steps = Vec::new();
        let mac = match host.link(&name) {
            Some(shim) if shim.alias.as_deref() == Some(&shared_mark(&name)) => {
                if !shim.is_up() {
                    steps.push(up);
                }
                parent_mac(shim)?
            }
            Some(_) => {
                let reason = "is not ours, and has the name of the host's own macvlan device; rename or remove it";
                return Err(PlanError::Conflict { link: name, reason: reason.to_owned() });
            }
            None => {
                let mut bytes = request.key.mac().bytes();
                bytes[4] ^= 0xff;
                let end = End { name: name.clone(), mac: MacAddr::new(bytes) };
                let create = Operation::CreateLink {
                    link: end.clone(),
                    transit: None,
                    device: Device::Macvlan {
                        parent: self.parent.clone(),
                        mode: MacvlanMode::Bridge,
                        sources: Vec::new(),
                    },
                    mtu: None,
                    home: Target::Host,
                };
                let mac = end.mac;
                // Beside the pod's device, before anything is done in the pod: one batch.
                plan.steps.insert(0, on_host(create).undone_by(Undo::DeleteIdleLink(end)));
                steps.push(on_host(Operation::Mark { link: name.clone(), alias: shared_mark(&name) }));
                steps.push(pod_end::no_link_local(Target::Host, &name));
                steps.push(on_host(Operation::NoArpReplies { link: name.clone() }));
                steps.push(up);
                mac
            }
        };
        let pod = &plan.pod_end;
        let same_family = |a: &IpNet, b: &IpNet| a.addr().is_ipv4() == b.addr().is_ipv4();
        let leased: Vec<IpNet> = request.addresses.iter().map(|a| a.address).collect();
        let of_host = host.addresses.iter().filter(|a| a.index == parent.index && !is_link_local(&a.address));
        for address in of_host.map(|a| a.address).filter(|a| leased.iter().any(|l| same_family(l, a))) {
            let (link, mac) = (pod.name.clone(), mac);
            if !leased.iter().any(|l| l.contains(&address.addr())) {
                plan.steps.push(pod_end::pod_route(&link, direct(address.addr().into())));
            }
            let address = address.addr();
            plan.steps.push(Step::new(Target::Pod, Operation::AddNeighbour { link, address, mac }));
        }
        for address in leased {
            let (link, address) = (name.clone(), address.addr());
            let neighbour = Operation::AddNeighbour { link: link.clone(), address, mac: pod.mac };
            let undo = Undo::DeleteNeighbour { link: link.clone(), address };
            steps.push(on_host(neighbour).undone_by(undo));
            let route = direct(address.into());
            let undo = Undo::DeleteRoute { link: link.clone(), route: route.clone() };
            // One of an attachment whose record was lost: the address has one bearer at a time.
            let add = on_host(Operation::AddRoute { link, route }).undone_by(undo).content_with(&[libc::EEXIST]);
            steps.push(add);
        }
        plan.steps.extend(steps);
        Ok(())
    }
}

impl LinkDriver for MacvlanConfig {
    fn kind(&self) -> &'static str {
        "macvlan"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        let mut needs = vec![Need { link: self.parent.clone(), addresses: self.host_access }];
        if self.host_access {
            needs.push(Need { link: self.shim(), addresses: false });
        }
        needs
    }

    fn plan(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        self.check()?;
        check_routes(request)?;
        refuse_vlan(self.kind(), &request.addresses)?;
        let mtu = device_mtu(self.mtu, &request.addresses)?;
        let parent = parent_of(host, &self.parent, mtu)?;
        let mac = if self.mode == MacvlanMode::Passthru { parent_mac(parent)? } else { request.mac };
        let device = PodDevice {
            request,
            end: End { name: request.key.ifname.clone(), mac },
            mtu,
            tuning: self.tuning,
            // Not of the parent's own address, whose link-local address the parent may have.
            neighbours: Neighbours::Resolved(if mac == request.mac { mac } else { request.key.mac() }),
            underlay: Some(self.underlay.unwrap_or_default()),
            parent: Some(Parent {
                link: self.parent.clone(),
                shared_mac: None,
                has_own_mac: self.mode != MacvlanMode::Passthru,
            }),
        };
        let mut plan = device.plan(Device::Macvlan {
            parent: self.parent.clone(),
            mode: self.mode,
            sources: self.sources.clone(),
        });
        if self.host_access {
            self.plan_host(request, host, parent, &mut plan)?;
        }
        Ok(plan)
    }

    fn expect(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError> {
        let mac = host.link(&self.shim()).and_then(|l| l.mac);
        let mut plan = self.plan(request, &pod_end::without(host, &self.shim()))?;
        if let Some(actual) = mac {
            // Whoever made the shared device chose its address.
            for step in &mut plan.steps {
                if let (Target::Pod, Operation::AddNeighbour { mac, .. }) = (step.target, &mut step.operation) {
                    *mac = actual;
                }
            }
        }
        Ok(plan)
    }

    fn shared(&self) -> Vec<IfName> {
        if self.host_access { vec![self.shim()] } else { Vec::new() }
    }
}

fn bridge() -> MacvlanMode {
    MacvlanMode::Bridge
}
