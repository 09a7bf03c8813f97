//! Making a function what somebody wants, where nothing is in the way: by as few requests as there are things to write.

use dcenet_core::model::{IfIndex, Mtu};

use super::converge::Converge;
use super::error::LeaseError;
use super::snapshot::{NetdevSnapshot, NoAddress, VfSnapshot};
use crate::kernel::{Namespace, NetdevChange, VfChange, VfState};

/// A function as it was seen at one time.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) now: VfSnapshot,
    /// The index of its port's network device.
    pub(super) port: IfIndex,
    /// That of its own, where it is home.
    pub(super) device: Option<IfIndex>,
}

impl Converge<'_> {
    /// Makes it `goal`, from what was seen of it.
    ///
    /// # Errors
    /// As [`reach`](Self::reach) tells them.
    pub(super) fn reach_from(&self, goal: &VfSnapshot, seen: &Seen) -> Result<Seen, Vec<LeaseError>> {
        if let Some(seen) = self.straight(goal, seen) {
            return Ok(seen);
        }
        let errors = self.reach(goal);
        if errors.is_empty() { self.see().map_err(|error| vec![error]) } else { Err(errors) }
    }

    /// What it is then, where it is home under its driver and its names, down, and nothing was refused. Else `None`:
    /// whatever it was, who goes by rounds meets it again, and tells it.
    fn straight(&self, goal: &VfSnapshot, seen: &Seen) -> Option<Seen> {
        let (want, is, device) = (goal.netdev.as_ref()?, seen.now.netdev.as_ref()?, seen.device?);
        let settled = |of: &NetdevSnapshot| {
            let NetdevSnapshot { name, alternative_names, alias, up, .. } = of;
            (name.clone(), alternative_names.clone(), alias.clone(), *up)
        };
        if goal.driver != seen.now.driver || want.up || settled(want) != settled(is) {
            return None;
        }
        self.scrub(device).ok()?;
        let new_mac = want.mac.filter(|mac| is.mac.is_some_and(|is| is != *mac));
        let is_trusted = seen.now.port.trust;
        let configure_port = |change: &VfChange| self.kernel.configure_vf(seen.port, self.vf.index, change).ok();
        let mut port = self.pinned_change(goal, &seen.now.port);
        if new_mac.is_some() && is_trusted == Some(false) {
            // One that once had an address of the administrator's may not change its own: see `effective_mac`.
            if port.trust == Some(true) {
                configure_port(&port)?;
                port = VfChange::default();
            } else {
                configure_port(&VfChange { trust: Some(true), ..VfChange::default() })?;
                port.trust = Some(false);
            }
        }
        let configure = |change: NetdevChange| self.kernel.configure_netdev(&Namespace::Host, device, &change).ok();
        configure(NetdevChange {
            mac: new_mac,
            mtu: (is.mtu != want.mtu).then(|| Mtu::try_from(want.mtu).ok()).flatten(),
            ..NetdevChange::default()
        })?;
        configure_port(&port)?;
        configure(NetdevChange {
            promisc: (is.promisc != want.promisc).then_some(want.promisc),
            all_multicast: (is.all_multicast != want.all_multicast).then_some(want.all_multicast),
            ..NetdevChange::default()
        })?;
        let seen = self.look().ok()?;
        goal.differences(&seen.now, NoAddress::default()).is_empty().then_some(seen)
    }

    fn pinned_change(&self, goal: &VfSnapshot, now: &VfState) -> VfChange {
        let change = goal.port_change(now, NoAddress::default());
        VfChange { mac: self.pinned.or(change.mac), ..change }
    }
}
