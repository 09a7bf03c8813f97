//! What attachments share on the host: when it is idle, when it goes, and what makes it whole.

use super::apply::{Session, delete, gone_is_fine, look_up};
use super::attach::{recorded, view};
use super::error::{AttachError, TeardownError};
use super::{AttachRequest, Engine};
use crate::journal::Record;
use crate::link::{HostView, LinkConfig, PlanError};
use crate::model::{IfIndex, IfName, VlanId};
use crate::netlink::{self, LinkView, NetlinkError, RouteView, Socket};
use crate::plan::{Device, MARK, Operation, Plan, Step, Target, Undo, shared_mark};

impl Engine {
    /// Removes a link that attachments of a configuration [shared](crate::link::LinkDriver::shared), if it is ours and nobody uses
    /// it; of a bridge that stays, ours or not, the host's devices in VLANs in which no pod is. Returns whether the link is gone.
    /// Called when a network goes away for good.
    ///
    /// # Errors
    /// Where the kernel refuses. What could be removed is.
    pub fn remove_idle(&self, name: &IfName) -> Result<bool, TeardownError> {
        let _lock = self.shared.changing(&self.host)?;
        let mut socket = self.host_socket()?;
        let Some(link) = look_up(&mut socket, name)? else { return Ok(false) };
        let ours = link.alias.as_deref() == Some(&shared_mark(name));
        if ours && !is_in_use(&mut socket, link.index)? {
            // The devices in its VLANs go with it.
            delete(&mut socket, &link)?;
            return Ok(true);
        }
        if link.kind.as_deref() == Some("bridge") {
            remove_idle_routers(&mut socket, name, link.index)?;
        }
        Ok(false)
    }

    /// Has VLANs be as a standing attachment to a bridge needs them, where somebody changed them. `false` where only another attach
    /// does: what has to be made is written down first.
    pub(super) fn renew_vlans(&self, record: &Record, request: &AttachRequest<'_>) -> Result<bool, AttachError> {
        let (LinkConfig::Bridge(config), Some(end)) = (&record.link, &record.host_end) else { return Ok(true) };
        let wanted = recorded(record);
        if !config.has_vlans(&wanted)? {
            return Ok(true);
        }
        let driver = record.link.driver();
        let _lock = self.shared.changing(&self.host)?;
        let mut session = Session::new(self, request.pod.netns, self.host_socket()?);
        let host = view(session.host(), &driver.needs(&wanted)).map_err(AttachError::Look)?;
        let mut plan = driver.plan(&wanted, &host)?;
        let bridge = host.link(&config.bridge).map(|bridge| bridge.index);
        let port = look_up(session.host(), &end.name).map_err(AttachError::Look)?;
        let makes_router =
            |step: &Step| matches!(step.operation, Operation::CreateLink { device: Device::Vlan { .. }, .. });
        if bridge.is_none() || port.is_none_or(|port| port.master != bridge) || plan.steps.iter().any(makes_router) {
            return Ok(false);
        }
        let router = plan.router.take();
        plan.steps.retain(|step| match &step.operation {
            Operation::FilterVlans { .. } | Operation::AddVlans { .. } | Operation::DeleteVlan { .. } => true,
            Operation::ForwardIpv4 { link }
            | Operation::Up { link, .. }
            | Operation::AddAddress { link, .. }
            | Operation::SettleCarrier { link } => step.target == Target::Host && Some(link) == router.as_ref(),
            _ => false,
        });
        for link in &host.links {
            session.know(Target::Host, link);
        }
        match session.apply(&plan, request).failure {
            // What is whole again stays so.
            Some((_, cause)) => Err(AttachError::Step { cause, rollback: Vec::new() }),
            None => Ok(true),
        }
    }
}

/// Looks where a plan puts the own end of a bridge that is there: it refuses to take frames without a tag from it
/// (`__vlan_add_flags` of `net/bridge/br_vlan.c`), and has it stay in a VLAN in which somebody else put it. The caller holds the
/// lock of what is shared.
pub(super) fn look_at_own_end(plan: &mut Plan, host: &HostView, socket: &mut Socket) -> Result<(), AttachError> {
    let mut own = None;
    for step in &mut plan.steps {
        let Some(Undo::DeleteIdleRouter { vlan, keeps_own, .. }) = &mut step.undo else { continue };
        let Some(bridge) = host.link(&vlan.bridge) else { return Ok(()) };
        let ports = match &own {
            Some(ports) => ports,
            None => own.insert(socket.port_vlans().map_err(AttachError::Look)?),
        };
        let Some(end) = ports.iter().find(|port| port.index == bridge.index && port.is_in(vlan.id)) else { continue };
        if !end.has(vlan.id.into(), false) {
            let reason = format!(
                "its own end has the frames of VLAN {} without a tag, so that it is itself the gateway there; use another VLAN, \
                 drop link.isGateway, or run `bridge vlan del dev {} vid {} self`",
                vlan.id, vlan.bridge, vlan.id
            );
            return Err(PlanError::Conflict { link: vlan.bridge.clone(), reason }.into());
        }
        *keeps_own = true;
    }
    Ok(())
}

/// Removes the host's devices of ours in VLANs of a bridge in which no pod is, and over which no route of ours leads.
fn remove_idle_routers(socket: &mut Socket, name: &IfName, bridge: IfIndex) -> Result<(), TeardownError> {
    let is_router = |link: &LinkView| {
        let marked = link.name.parse().is_ok_and(|name| link.alias.as_deref() == Some(&shared_mark(&name)));
        marked && (link.peer, link.peer_netns) == (Some(bridge), None)
    };
    let routers: Vec<LinkView> = socket.links()?.into_iter().filter(is_router).collect();
    for router in routers {
        let Some(vlan) = router.vlan else { continue };
        if !has_pods_in(socket, bridge, vlan)? && !is_in_use(socket, router.index)? {
            remove_router(socket, Some(&router), (name, bridge), vlan, false)?;
        }
    }
    Ok(())
}

/// Deletes the host's device in a VLAN of a bridge, and takes the bridge's own end out of it, unless that stays.
pub(super) fn remove_router(
    socket: &mut Socket,
    router: Option<&LinkView>,
    (name, bridge): (&IfName, IfIndex),
    vlan: VlanId,
    keeps_own: bool,
) -> Result<(), TeardownError> {
    if let Some(router) = router {
        delete(socket, router)?;
    }
    if keeps_own {
        return Ok(());
    }
    let message = netlink::delete_vlan(name, bridge, vlan, true);
    gone_is_fine(socket.request(&message).map(drop), netlink::NO_VLAN)
}

/// The ports of a bridge.
fn ports(socket: &mut Socket, bridge: IfIndex) -> Result<Vec<LinkView>, NetlinkError> {
    let links = socket.dump(&netlink::link_dump(Some(bridge)))?;
    let links = links.iter().filter_map(|reply| LinkView::parse(&reply.payload));
    Ok(links.filter(|link| link.master == Some(bridge)).collect())
}

/// Whether a bridge has ports.
pub(super) fn has_ports(socket: &mut Socket, bridge: IfIndex) -> Result<bool, NetlinkError> {
    Ok(!ports(socket, bridge)?.is_empty())
}

/// Whether a bridge has ports of ours in a VLAN: others, such as its uplinks, need no gateway of ours.
pub(super) fn has_pods_in(socket: &mut Socket, bridge: IfIndex, vlan: VlanId) -> Result<bool, NetlinkError> {
    let is_ours = |port: &LinkView| port.alias.as_deref().is_some_and(|alias| alias.starts_with(MARK));
    let ours: Vec<IfIndex> =
        ports(socket, bridge)?.iter().filter(|port| is_ours(port)).map(|port| port.index).collect();
    if ours.is_empty() {
        return Ok(false);
    }
    Ok(socket.port_vlans()?.iter().any(|port| ours.contains(&port.index) && port.is_in(vlan)))
}

/// Whether anything goes over a link that attachments share: it has ports, or routes of ours lead over it.
pub(super) fn is_in_use(socket: &mut Socket, link: IfIndex) -> Result<bool, NetlinkError> {
    if has_ports(socket, link)? {
        return Ok(true);
    }
    let routes = socket.dump(&netlink::route_dump(Some(link)))?;
    let ours = |r: RouteView| r.link == Some(link) && r.protocol == netlink::PROTOCOL;
    Ok(routes.iter().filter_map(|r| RouteView::parse(&r.payload)).any(ours))
}
