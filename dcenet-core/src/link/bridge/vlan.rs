//! VLANs of a bridge: which ports are in them, and who is their gateway.

use sha2::{Digest, Sha256};

use super::{BridgeConfig, no_link_local, vlan_of};
use crate::link::{HostView, LinkRequest, PlanError, Policy};
use crate::model::{IfName, MacAddr, VlanId, VlanRange};
use crate::netlink::{LinkView, VlanProtocol};
use crate::plan::{BridgeVlan, Device, End, Operation, Step, Tagging, Target, Undo, shared_mark};

impl BridgeConfig {
    /// The VLAN of the pod's frames without a tag, where it is not the bridge's default one.
    pub(super) fn vlan_of(&self, request: &LinkRequest) -> Result<Option<VlanId>, PlanError> {
        if let (Policy::Wanted, Some(range)) = (request.policy, self.vlan_trunk.first()) {
            return Err(PlanError::Invalid {
                field: "link.vlanTrunk",
                value: range.to_string(),
                reason: "frames with tags pass no pod that is under policy; use an attachment with link.vlan for each VLAN, or \
                         drop the section policy"
                    .to_owned(),
            });
        }
        let vlan = vlan_of("link.vlan", self.vlan, &request.addresses)?;
        let holds = |range: &&VlanRange| vlan.is_some_and(|vlan| range.ids().contains(&vlan.get()));
        match self.vlan_trunk.iter().find(holds) {
            Some(range) => Err(PlanError::Invalid {
                field: "link.vlanTrunk",
                value: range.to_string(),
                reason: "holds the VLAN of the pod's frames without a tag; leave that out".to_owned(),
            }),
            None => Ok(vlan),
        }
    }

    /// The VLAN of ports of which nobody says another, where the bridge has one.
    fn default_vlan(&self, host: &HostView) -> Option<VlanId> {
        // As a new bridge has it (`br_vlan_init` of `net/bridge/br_vlan.c`).
        let made = VlanId::try_from(1).ok();
        host.link(&self.bridge).map_or(made, |bridge| bridge.vlans.and_then(|vlans| vlans.default))
    }

    /// Refuses a gateway of the bridge's default VLAN beside the bridge, whose own end would lose the frames without a tag
    /// (`__vlan_add_flags` of `net/bridge/br_vlan.c`): it is the gateway of that VLAN itself. Likewise a trunk by which the pod's
    /// own port would lose them.
    pub(super) fn check_default(
        &self,
        vlan: Option<VlanId>,
        request: &LinkRequest,
        host: &HostView,
    ) -> Result<(), PlanError> {
        let Some(default) = self.default_vlan(host) else { return Ok(()) };
        let bridge = &self.bridge;
        if self.is_gateway && vlan == Some(default) {
            let pool = request.addresses.iter().find(|address| address.vlan.is_some()).map(|address| &address.pool);
            let (field, remedy) = match pool {
                None => ("link.vlan", "drop it".to_owned()),
                Some(pool) => ("ipam.pools[].vlan", format!("drop that of the pool {pool}, and link.vlan")),
            };
            let reason = format!(
                "is the default VLAN of {bridge}, which is itself the gateway there; {remedy}, take another VLAN, or drop \
                 link.isGateway"
            );
            return Err(PlanError::Invalid { field, value: default.to_string(), reason });
        }
        let holds = |range: &&VlanRange| vlan.is_none() && range.ids().contains(&default.get());
        match self.vlan_trunk.iter().find(holds) {
            Some(range) => Err(PlanError::Invalid {
                field: "link.vlanTrunk",
                value: range.to_string(),
                reason: format!(
                    "holds VLAN {default}, the default one of {bridge}, in which the pod's frames without a tag are; leave it \
                     out, or give those another by link.vlan"
                ),
            }),
            None => Ok(()),
        }
    }

    /// Whether the bridge must keep VLANs apart.
    pub(super) fn keeps_apart(&self, vlan: Option<VlanId>) -> bool {
        vlan.is_some() || !self.vlan_trunk.is_empty()
    }

    /// The host's own device in a VLAN.
    pub(super) fn router(&self, vlan: VlanId) -> IfName {
        let name = format!("{}.{vlan}", self.bridge);
        name.parse().unwrap_or_else(|_| {
            let digest = Sha256::digest(name);
            let digits: String = digest[..6].iter().map(|b| format!("{b:02x}")).collect();
            format!("dcb{digits}").parse().expect("15 bytes of letters and digits are an interface name")
        })
    }

    /// Has a bridge that is there keep VLANs apart, if it is to and is ours.
    pub(super) fn plan_filtering(
        &self,
        vlan: Option<VlanId>,
        bridge: &LinkView,
        steps: &mut Vec<Step>,
    ) -> Result<(), PlanError> {
        let name = &self.bridge;
        let reason = match bridge.vlans {
            _ if !self.keeps_apart(vlan) => return Ok(()),
            Some(vlans) if vlans.filtering => return Ok(()),
            Some(_) if bridge.alias.as_deref() == Some(&shared_mark(name)) => {
                let filter = Step::new(Target::Host, Operation::FilterVlans { bridge: name.clone() });
                steps.push(filter.undone_by(Undo::StopFilteringVlans { bridge: name.clone() }));
                return Ok(());
            }
            Some(_) => format!(
                "is not ours, and does not keep VLANs apart; run `ip link set {name} type bridge vlan_filtering 1`, or name \
                 another in link.bridge"
            ),
            None => "this kernel cannot keep VLANs of a bridge apart; it needs Linux 3.9 or later with \
                     CONFIG_BRIDGE_VLAN_FILTERING, or use a link of the kind vlan"
                .to_owned(),
        };
        Err(PlanError::Conflict { link: name.clone(), reason })
    }

    /// Puts the pod's port, which is down, into its VLANs.
    pub(super) fn plan_port(&self, port: &IfName, vlan: Option<VlanId>, host: &HostView, steps: &mut Vec<Step>) {
        if !self.keeps_apart(vlan) {
            return;
        }
        let mut on_host = |operation| steps.push(Step::new(Target::Host, operation));
        // Before it is up, so that no frame passes in a VLAN that is not its own.
        on_host(Operation::Join { link: port.clone(), bridge: self.bridge.clone() });
        for range in &self.vlan_trunk {
            on_host(Operation::AddVlans { link: port.clone(), vlans: *range, tagging: Tagging::Tagged });
        }
        let Some(vlan) = vlan else { return };
        let default = self.default_vlan(host);
        on_host(Operation::AddVlans { link: port.clone(), vlans: vlan.into(), tagging: Tagging::Untagged });
        let is_wanted = |default: &VlanId| self.vlan_trunk.iter().any(|range| range.ids().contains(&default.get()));
        if let Some(default) = default.filter(|default| *default != vlan && !is_wanted(default)) {
            let delete = Operation::DeleteVlan { port: port.clone(), vlan: default };
            steps.push(Step::new(Target::Host, delete).content_with(&[libc::ENOENT]));
        }
    }

    /// The host's own device in the VLAN, made where it is missing, and otherwise made whole; `mac` is the bridge's, for the bridge
    /// passes frames to another up only while it is promiscuous (`br_handle_frame_finish` of `net/bridge/br_input.c`).
    pub(super) fn plan_router(
        &self,
        vlan: VlanId,
        mac: MacAddr,
        host: &HostView,
        steps: &mut Vec<Step>,
    ) -> Result<IfName, PlanError> {
        let link = self.router(vlan);
        let on_host = |operation| Step::new(Target::Host, operation);
        let up = on_host(Operation::Up { link: link.clone(), master: None });
        let bridge = host.link(&self.bridge).map(|bridge| bridge.index);
        let own = Operation::AddVlans { link: self.bridge.clone(), vlans: vlan.into(), tagging: Tagging::Own };
        match host.link(&link) {
            Some(found) if found.alias.as_deref() == Some(&shared_mark(&link)) && found.peer == bridge => {
                steps.extend([on_host(own), on_host(Operation::ForwardIpv4 { link: link.clone() })]);
                if !found.is_up() {
                    steps.push(up);
                }
            }
            Some(_) => {
                let reason = format!(
                    "is not ours, and has the name of the gateway of VLAN {vlan} of {}; rename or remove it, or drop \
                     link.isGateway and leave the gateway to it",
                    self.bridge
                );
                return Err(PlanError::Conflict { link, reason });
            }
            None => {
                let undo = Undo::DeleteIdleRouter {
                    link: link.clone(),
                    vlan: BridgeVlan { bridge: self.bridge.clone(), id: vlan },
                    keeps_own: false,
                };
                let create = Operation::CreateLink {
                    link: End { name: link.clone(), mac },
                    transit: None,
                    device: Device::Vlan { parent: self.bridge.clone(), id: vlan, protocol: VlanProtocol::Dot1Q },
                    mtu: None,
                    home: Target::Host,
                };
                steps.push(on_host(own).undone_by(undo.clone()));
                steps.push(on_host(create).undone_by(undo));
                steps.push(on_host(Operation::Mark { link: link.clone(), alias: shared_mark(&link) }));
                steps.push(no_link_local(Target::Host, &link));
                steps.push(on_host(Operation::ForwardIpv4 { link: link.clone() }));
                steps.push(up);
            }
        }
        Ok(link)
    }
}
