//! Taking back what was done.

use std::io;

use super::Engine;
use super::apply::{delete, gone_is_fine, look_up, new_route};
use super::error::TeardownError;
use super::shared::{has_pods_in, has_ports, is_in_use, remove_router};
use crate::model::AttachmentKey;
use crate::netlink::{self, LinkView, Socket};
use crate::netns::NetNs;
use crate::plan::{Target, Undo, mark, shared_mark};

impl Engine {
    /// Takes back what `undo` lists, in reverse; goes on after errors and returns them.
    ///
    /// Own devices go first, for shared ones stay while they have ports. Policy goes after them, and only when they are gone: a
    /// device that is still there must not carry a packet without it. Settings of the host are given back last, when nothing
    /// is translated for the attachment any more.
    pub(super) fn take_back(&self, undo: &[Undo], key: &AttachmentKey, pod: Option<&NetNs>) -> Vec<TeardownError> {
        let (of_host, others): (Vec<&Undo>, Vec<&Undo>) =
            undo.iter().rev().partition(|u| is_setting_of(u, Target::Host));
        let (policy, devices): (Vec<_>, Vec<_>) = others.into_iter().partition(|u| matches!(u, Undo::DetachPolicy));
        let (shared, own): (Vec<_>, Vec<_>) = devices.into_iter().partition(|u| u.is_shared());
        let mut errors = Vec::new();
        let mut refused = Vec::new();
        let mut host = None;
        let mut take_back = |undo: &Undo| self.take_back_one(undo, key, pod, &mut host);
        for undo in own {
            match take_back(undo) {
                Ok(()) => {}
                Err(TeardownError::Setting { source, .. }) if is_refusal(undo, &source) => refused.push(undo),
                Err(error) => errors.push(warned(key, undo, error)),
            }
        }
        // The kernel ties settings to each other, so that one order only may be right. What the pod's processes made of them is
        // theirs, and must not keep the pod from going: its namespace ends, with the settings.
        for undo in refused {
            match take_back(undo) {
                Ok(()) => {}
                Err(TeardownError::Setting { name, value, source }) if is_refusal(undo, &source) => {
                    tracing::warn!(%key, name, value, error = %source, "the pod keeps a setting: it cannot be given back");
                }
                Err(error) => errors.push(warned(key, undo, error)),
            }
        }
        let gone = errors.is_empty();
        for undo in shared.into_iter().chain(policy.into_iter().filter(|_| gone)).chain(of_host) {
            errors.extend(take_back(undo).err().map(|error| warned(key, undo, error)));
        }
        errors
    }

    fn take_back_one(
        &self,
        undo: &Undo,
        key: &AttachmentKey,
        pod: Option<&NetNs>,
        host: &mut Option<Socket>,
    ) -> Result<(), TeardownError> {
        if let Undo::DetachPolicy = undo {
            let Some(sink) = self.policy.as_ref().or(self.lifting.as_ref()) else {
                tracing::warn!(%key, "under policy, and this program has no policy backend: its state is left");
                return Ok(());
            };
            return Ok(self.host.0.run_here_or_there(|| sink.detach(key))??);
        }
        if let Undo::ReturnLink(lent) = undo {
            return self.return_link(lent, pod);
        }
        if let Undo::ReleaseDevice(device) = undo {
            return self.release_device(key, device, pod);
        }
        if let Undo::DeleteTranslation { elements } = undo {
            return self.untranslate(elements, key);
        }
        if let Undo::RestoreSetting { target, name, before, .. } = undo {
            let netns = if *target == Target::Host { Some(&self.host.0) } else { pod };
            return netns.map_or(Ok(()), |netns| self.restore_setting(key, netns, (*target, name, before)));
        }
        let mut in_pod = None;
        let socket = match pod {
            None if undo.is_in_pod() => return Ok(()),
            Some(pod) if undo.is_in_pod() => in_pod.insert(self.pod_socket(pod)?),
            _ => match host {
                Some(socket) => socket,
                none => none.insert(self.host_socket()?),
            },
        };
        match undo {
            Undo::DetachPolicy
            | Undo::ReturnLink(_)
            | Undo::ReleaseDevice(_)
            | Undo::DeleteTranslation { .. }
            | Undo::RestoreSetting { .. } => Ok(()),
            Undo::DeletePodLink { link, transit } => {
                for name in [link, transit] {
                    let Some(found) = look_up(socket, name)? else { continue };
                    // Nobody sets it up before it is marked.
                    if found.alias.as_deref() == Some(&mark(key)) || name == transit && !found.is_up() {
                        delete(socket, &found)?;
                    } else {
                        tracing::warn!(%key, link = %name, "a link of this name is not of this attachment; left alone");
                    }
                }
                Ok(())
            }
            Undo::DeleteRoute { link: name, route } => {
                let Some(link) = look_up(socket, name)? else { return Ok(()) };
                let message = netlink::delete_route(name.as_str(), &new_route(link.index, route));
                gone_is_fine(socket.request(&message).map(drop), &[libc::ESRCH, libc::ENODEV, libc::ENETUNREACH])
            }
            Undo::DeleteNeighbour { link: name, address } => {
                let Some(link) = look_up(socket, name)? else { return Ok(()) };
                let message = netlink::delete_neighbour(name.as_str(), link.index, *address);
                gone_is_fine(socket.request(&message).map(drop), &[libc::ENOENT, libc::ENODEV])
            }
            Undo::DeleteIdleLink(end) => {
                let Some(link) = look_up(socket, &end.name)? else { return Ok(()) };
                if link.mac != Some(end.mac) || is_in_use(socket, link.index)? {
                    return Ok(());
                }
                delete(socket, &link)
            }
            Undo::DeleteLink { end, target } => {
                let Some(link) = look_up(socket, &end.name)? else { return Ok(()) };
                if link.mac != Some(end.mac) && link.alias.as_deref() != Some(&mark(key)) {
                    tracing::warn!(%key, link = %end.name, "a link of this name is not of this attachment; left alone");
                    return Ok(());
                }
                match &self.removals {
                    Some(removals) if *target == Target::Host => removals.delete(socket, self.host.0.id(), &link),
                    _ => delete(socket, &link),
                }
            }
            Undo::DeleteIdleBridge(end) => {
                let Some(link) = look_up(socket, &end.name)? else { return Ok(()) };
                if link.mac != Some(end.mac) || has_ports(socket, link.index)? {
                    return Ok(());
                }
                delete(socket, &link)
            }
            Undo::DeleteIdleAddress { link: name, address, vlan } => {
                let Some(link) = look_up(socket, name)? else { return Ok(()) };
                let in_use = match vlan {
                    None => has_ports(socket, link.index)?,
                    Some(vlan) => match look_up(socket, &vlan.bridge)? {
                        Some(bridge) => has_pods_in(socket, bridge.index, vlan.id)?,
                        None => false,
                    },
                };
                if in_use {
                    return Ok(());
                }
                let message = netlink::delete_address(name.as_str(), link.index, *address);
                gone_is_fine(socket.request(&message).map(drop), &[libc::EADDRNOTAVAIL, libc::ENODEV])
            }
            Undo::DeleteIdleRouter { link: name, vlan, keeps_own } => {
                let Some(bridge) = look_up(socket, &vlan.bridge)? else { return Ok(()) };
                if has_pods_in(socket, bridge.index, vlan.id)? {
                    return Ok(());
                }
                // Nobody sets it up before it is marked.
                let is_ours = |link: &LinkView| match &link.alias {
                    Some(alias) => *alias == shared_mark(name),
                    None => !link.is_up(),
                };
                let router = look_up(socket, name)?.filter(is_ours);
                remove_router(socket, router.as_ref(), (&vlan.bridge, bridge.index), vlan.id, *keeps_own)
            }
            Undo::StopFilteringVlans { bridge: name } => {
                let Some(bridge) = look_up(socket, name)?.map(|bridge| bridge.index) else { return Ok(()) };
                // Pods of the default VLAN may have relied on it since, too: no port tells.
                if has_ports(socket, bridge)? {
                    return Ok(());
                }
                let message = netlink::filter_vlans(name, bridge, false);
                gone_is_fine(socket.request(&message).map(drop), &[libc::ENODEV])
            }
        }
    }
}

fn warned(key: &AttachmentKey, undo: &Undo, error: TeardownError) -> TeardownError {
    tracing::warn!(%key, ?undo, %error, "could not take back");
    error
}

fn is_setting_of(undo: &Undo, whose: Target) -> bool {
    matches!(undo, Undo::RestoreSetting { target, .. } if *target == whose)
}

/// Whether a pod's setting stays so however often it is written: the kernel answered, and lacked nothing.
fn is_refusal(undo: &Undo, error: &io::Error) -> bool {
    const SHORTAGES: [i32; 5] = [libc::EAGAIN, libc::EINTR, libc::EMFILE, libc::ENFILE, libc::ENOMEM];
    is_setting_of(undo, Target::Pod) && error.raw_os_error().is_some_and(|errno| !SHORTAGES.contains(&errno))
}
