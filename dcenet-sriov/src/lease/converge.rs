//! Making a function what it is to be, from wherever a call was killed.
//!
//! There is one way for giving and for taking back: look at what it is, change what differs, look again. So nothing is
//! written that is right already (drivers refuse even that), every step can be repeated, and it does not matter which steps
//! an earlier call did. Every step goes on past errors; all are reported.
//! While a driver is busy, or has not taken over yet what was written, it is done again, with growing pauses: drivers refuse
//! settings while they reset a function, which i40e's says takes up to 200 ms (`i40e_check_vf_init_timeout` in
//! drivers/net/ethernet/intel/i40e/i40e_virtchnl_pf.c).
//!
//! The order, and why:
//! 1. the driver, because a bound driver makes the network device anew, under a new name;
//! 2. the network device comes home, down, and gets its names;
//! 3. its own address, before the port's settings: while the administrator has set an address, or has taken the trust away,
//!    drivers refuse it (`igb_rcv_msg_from_vf` in drivers/net/ethernet/intel/igb/igb_main.c);
//! 4. the port's settings, in one message;
//! 5. the rest of the network device, which may need the trust, and last whether it is up.
//!
//! A network device that does not come home is a tenant's still, and so are the port's settings: what they keep it from, such
//! as all VLANs but one, they go on to keep it from. Then only what closes is written.

use std::time::{Duration, Instant};

use dcenet_core::model::{IfIndex, IfName, MacAddr, Mtu};
use dcenet_core::provider::DeviceScrub;

use super::VfId;
use super::error::LeaseError;
use super::record::Away;
use super::snapshot::{Difference, NetdevSnapshot, NoAddress, VfSnapshot, is_zero};
use super::straight::Seen;
use crate::kernel::{
    Attribute, ErrorClass, Kernel, KernelError, Namespace, NetdevChange, NetdevState, VfChange, VfLinkState,
};

/// One function being made what it is to be.
pub(super) struct Converge<'a> {
    pub(super) kernel: &'a dyn Kernel,
    pub(super) scrub: Option<&'a dyn DeviceScrub>,
    pub(super) vf: VfId,
    /// Where its network device may be beside the host's namespace.
    pub(super) away: Option<&'a Away>,
    /// How long it may take to appear, and the driver to be no longer busy.
    pub(super) patience: Duration,
    /// The address that the administrator gives it. It is written though the port says it already: that may be what the
    /// function told of itself, which does not hold the function to it (`igb_set_vf_mac_filter` in
    /// drivers/net/ethernet/intel/igb/igb_main.c).
    pub(super) pinned: Option<MacAddr>,
}

impl Converge<'_> {
    /// What the function is now. Its network device is looked for in the host's namespace only. A driver that withholds
    /// the function for a while is waited for.
    pub(super) fn snapshot(&self) -> Result<VfSnapshot, LeaseError> {
        self.see().map(|seen| seen.now)
    }

    /// As [`snapshot`](Self::snapshot), with the indices by which it was seen.
    pub(super) fn see(&self) -> Result<Seen, LeaseError> {
        let mut pauses = Pauses::until(self.patience);
        loop {
            match self.look() {
                Err(error) if is_busy(&error) && pauses.pause() => {}
                looked => return looked,
            }
        }
    }

    /// As [`snapshot`](Self::snapshot), wherever its network device is.
    pub(super) fn snapshot_anywhere(&self) -> Result<VfSnapshot, LeaseError> {
        let netdev = self.abroad()?.map(|(_, device)| device.into());
        let now = self.snapshot()?;
        Ok(VfSnapshot { netdev: netdev.or(now.netdev), ..now })
    }

    pub(super) fn look(&self) -> Result<Seen, LeaseError> {
        let driver = self.driver()?;
        let index = self.port()?;
        let port = self.kernel.vf(index, self.vf.index)?;
        let device = self.at_home()?;
        let at = device.as_ref().map(|device| device.index);
        let now = VfSnapshot { port, driver, netdev: device.map(NetdevSnapshot::from) };
        Ok(Seen { now, port: index, device: at })
    }

    /// Makes it `goal`. Empty where it is, which was looked at last.
    pub(super) fn reach(&self, goal: &VfSnapshot) -> Vec<LeaseError> {
        self.restore(goal, &mut NoAddress::default())
    }

    /// As [`reach`](Self::reach), and knows what the driver takes an address of zeros for; what is new about that is
    /// told.
    pub(super) fn restore(&self, goal: &VfSnapshot, none: &mut NoAddress) -> Vec<LeaseError> {
        let mut pauses = Pauses::until(self.patience);
        let mut rounds = 0;
        loop {
            rounds += 1;
            let mut errors = Vec::new();
            self.round(goal, none, &mut errors);
            if errors.iter().any(|error| {
                matches!(error, LeaseError::Gone { .. } | LeaseError::Hidden { .. } | LeaseError::NoDevice { .. })
            }) {
                // Looking again would only wait again.
                return errors;
            }
            match self.look().map(|seen| goal.differences(&seen.now, *none)) {
                // What was refused on the way came right in the end.
                Ok(differences) if differences.is_empty() => {
                    errors.retain(|error| matches!(error, LeaseError::Scrub(_)));
                    if errors.is_empty() {
                        return errors;
                    }
                }
                Ok(differences) => errors.push(LeaseError::Unverified { vf: self.vf.address, differences }),
                Err(error) => errors.push(error),
            }
            let passes = errors.iter().any(is_busy) || errors.iter().all(is_passing);
            if !(passes && pauses.pause()) && rounds >= ROUNDS {
                return errors;
            }
        }
    }

    /// In what it is not `goal`.
    pub(super) fn is(&self, goal: &VfSnapshot, none: NoAddress) -> Result<bool, LeaseError> {
        Ok(goal.differences(&self.snapshot()?, none).is_empty())
    }

    fn round(&self, goal: &VfSnapshot, none: &mut NoAddress, errors: &mut Vec<LeaseError>) {
        if let Err(error) = self.bind(goal) {
            let (gone, open) = (matches!(error, LeaseError::Gone { .. }), is_busy(&error));
            errors.push(error);
            if gone {
                return;
            }
            if open && goal.netdev.is_some() {
                // A program has it still: there is no device to wait for, and what its port keeps it from goes on.
                if let Err(error) = self.close(errors) {
                    errors.push(error);
                }
                return;
            }
        }
        if let Some(want) = &goal.netdev {
            match self.bring_home(want, errors) {
                Ok(device) => self.names(&device, want, errors),
                Err(error) => {
                    let gone = matches!(error, LeaseError::Gone { .. });
                    errors.push(error);
                    if !gone && let Err(error) = self.close(errors) {
                        errors.push(error);
                    }
                    return;
                }
            }
            if let Err(error) = self.effective_mac(want) {
                errors.push(error);
            }
        }
        if let Err(error) = self.port_settings(goal, none, errors) {
            errors.push(error);
        }
        if let Some(want) = &goal.netdev
            && let Err(error) = self.rest(want)
        {
            errors.push(error);
        }
    }

    /// Has the port let through no more than before, and nothing where its driver can do that.
    fn close(&self, errors: &mut Vec<LeaseError>) -> Result<(), LeaseError> {
        let port = self.port()?;
        let now = self.kernel.vf(port, self.vf.index)?;
        let change = VfChange {
            spoofchk: now.spoofchk.and_then(|checks| (!checks).then_some(true)),
            link_state: (now.link_state != VfLinkState::Disable).then_some(VfLinkState::Disable),
            trust: now.trust.and_then(|trusts| trusts.then_some(false)),
            ..VfChange::default()
        };
        for (_, single) in singles(&change) {
            match self.kernel.configure_vf(port, self.vf.index, &single) {
                Err(error) if error.class == ErrorClass::Unsupported => {}
                Err(error) => errors.push(error.into()),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    pub(super) fn driver(&self) -> Result<crate::kernel::DriverState, LeaseError> {
        self.kernel.driver(self.vf.address).map_err(|error| match error.class {
            ErrorClass::Gone => LeaseError::Gone { vf: self.vf.address },
            _ => error.into(),
        })
    }

    /// The index of the port's network device. A PCI function may have several: the port's is the one that tells of
    /// this virtual function.
    pub(super) fn port(&self) -> Result<IfIndex, LeaseError> {
        let candidates = self.kernel.indices(self.vf.port)?;
        if let [only] = candidates[..] {
            return Ok(only);
        }
        for candidate in candidates {
            if self.kernel.vf(candidate, self.vf.index).is_ok() {
                return Ok(candidate);
            }
        }
        Err(LeaseError::NoPort { vf: self.vf.address, port: self.vf.port })
    }

    fn at_home(&self) -> Result<Option<NetdevState>, LeaseError> {
        let mut devices = self.kernel.netdevs(&Namespace::Host, self.vf.address)?;
        devices.sort_by_key(|device| device.index);
        Ok(devices.into_iter().next())
    }

    /// The network device in the namespace to which it was moved, if that is still the same one.
    fn abroad(&self) -> Result<Option<(Namespace, NetdevState)>, LeaseError> {
        let Some(Away { path, netns }) = self.away else { return Ok(None) };
        let there = Namespace::Path(path.clone());
        if self.kernel.namespace_id(&there)? != Some(*netns) {
            return Ok(None);
        }
        match self.kernel.netdevs(&there, self.vf.address) {
            Ok(devices) => Ok(devices.into_iter().min_by_key(|device| device.index).map(|device| (there, device))),
            Err(error) if error.class == ErrorClass::NamespaceGone => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn bind(&self, goal: &VfSnapshot) -> Result<(), LeaseError> {
        let now = self.driver()?;
        let (address, want) = (self.vf.address, &goal.driver);
        if now.driver_override != want.driver_override {
            self.kernel.set_driver_override(address, want.driver_override.as_deref())?;
        }
        if now.driver != want.driver {
            if now.driver.is_some() {
                self.kernel.unbind(address)?;
            }
            if let Some(driver) = &want.driver {
                self.kernel.bind(address, driver)?;
            }
        }
        Ok(())
    }

    /// Finds the network device wherever it is, and moves it into the host's namespace. It may take a while to appear
    /// there: the kernel ends namespaces, and drivers make devices, when they come to it.
    fn bring_home(&self, want: &NetdevSnapshot, errors: &mut Vec<LeaseError>) -> Result<NetdevState, LeaseError> {
        let deadline = Instant::now() + self.patience;
        let mut watch = None;
        loop {
            if let Some((there, device)) = self.abroad()? {
                self.move_home(&there, &device, want, errors)?;
            }
            if let Some(device) = self.at_home()? {
                return Ok(device);
            }
            // Watched from before the last look, lest what comes in between is missed.
            let Some(watch) = &mut watch else {
                watch = Some(self.kernel.watch()?);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // A function that went meanwhile is not hidden.
                self.driver()?;
                return Err(self.unseen());
            }
            // In a container events may not come.
            watch.wait(left.min(LONGEST_WAIT))?;
        }
    }

    /// Why its network device is not found. Where it cannot be told whether there is one, somebody may have it.
    pub(super) fn unseen(&self) -> LeaseError {
        let vf = self.vf.address;
        match self.kernel.has_netdev(vf) {
            Ok(false) => LeaseError::NoDevice { vf },
            _ => LeaseError::Hidden { vf },
        }
    }

    fn move_home(
        &self,
        there: &Namespace,
        device: &NetdevState,
        want: &NetdevSnapshot,
        errors: &mut Vec<LeaseError>,
    ) -> Result<(), LeaseError> {
        // A name that the host has too would keep it there.
        self.drop_names(there, device, want, errors);
        let none = NetdevChange::default();
        let moved = self.kernel.move_netdev(there, device.index, &Namespace::Host, &want.name, &none);
        let Err(error) = moved else { return Ok(()) };
        if error.class != ErrorClass::Exists {
            return Err(error.into());
        }
        if self.abroad()?.is_none() {
            // Home, under the name that it had; `names` tries once more.
            return Ok(());
        }
        // Its own name is taken at home.
        let transit = self.transit()?;
        // First down: the kernel renames before it looks at the flags, and before Linux 6.3 refuses that of a device
        // that is up (`do_setlink` in net/core/rtnetlink.c).
        if device.up {
            let down = NetdevChange { up: Some(false), ..NetdevChange::default() };
            self.kernel.configure_netdev(there, device.index, &down)?;
        }
        let change = NetdevChange { name: Some(transit.clone()), ..NetdevChange::default() };
        self.kernel.configure_netdev(there, device.index, &change)?;
        self.kernel.move_netdev(there, device.index, &Namespace::Host, &transit, &none)?;
        Ok(())
    }

    /// A name that nobody else has: of the function's address.
    fn transit(&self) -> Result<IfName, LeaseError> {
        let digits: String = self.vf.address.to_string().chars().filter(char::is_ascii_alphanumeric).collect();
        let name = format!("v{digits}");
        name.parse().map_err(|e| KernelError::of_class(format!("name {name}: {e}"), ErrorClass::Invalid).into())
    }

    fn drop_names(&self, at: &Namespace, device: &NetdevState, want: &NetdevSnapshot, errors: &mut Vec<LeaseError>) {
        for name in device.alternative_names.iter().filter(|name| !want.alternative_names.contains(name)) {
            if let Err(error) = self.kernel.delete_alternative_name(at, device.index, name) {
                errors.push(error.into());
            }
        }
    }

    fn names(&self, device: &NetdevState, want: &NetdevSnapshot, errors: &mut Vec<LeaseError>) {
        let host = &Namespace::Host;
        let mut change = |change: NetdevChange| {
            if let Err(error) = self.kernel.configure_netdev(host, device.index, &change) {
                errors.push(error.into());
            }
        };
        let is = NetdevSnapshot::from(device.clone());
        if device.up && is != *want {
            change(NetdevChange { up: Some(false), ..NetdevChange::default() });
        }
        if device.alias != want.alias {
            let alias = Some(want.alias.clone().unwrap_or_default());
            change(NetdevChange { alias, ..NetdevChange::default() });
        }
        self.drop_names(host, device, want, errors);
        if device.name != want.name {
            let change = NetdevChange { name: Some(want.name.clone()), ..NetdevChange::default() };
            if let Err(error) = self.kernel.configure_netdev(host, device.index, &change) {
                if error.class == ErrorClass::Exists {
                    self.step_aside(device, errors);
                }
                errors.push(error.into());
            }
        }
        for name in want.alternative_names.iter().filter(|name| !device.alternative_names.contains(name)) {
            if let Err(error) = self.kernel.add_alternative_name(host, device.index, name) {
                errors.push(error.into());
            }
        }
        if let Err(error) = self.scrub(device.index) {
            errors.push(error);
        }
    }

    /// Gives up its present name: whoever has the one that it wants may want this one.
    fn step_aside(&self, device: &NetdevState, errors: &mut Vec<LeaseError>) {
        let aside = self.transit().and_then(|transit| {
            if device.name == transit {
                return Ok(());
            }
            let change = NetdevChange { name: Some(transit), ..NetdevChange::default() };
            Ok(self.kernel.configure_netdev(&Namespace::Host, device.index, &change)?)
        });
        if let Err(error) = aside {
            errors.push(error);
        }
    }

    /// Takes foreign programs off the network device.
    pub(super) fn scrub(&self, device: IfIndex) -> Result<(), LeaseError> {
        let Some(scrub) = self.scrub else { return Ok(()) };
        let mut outcome = None;
        let failed = |error: KernelError| dcenet_core::provider::ScrubError {
            device,
            what: "what is on it".to_owned(),
            source: Box::new(error),
        };
        self.kernel.in_host(&mut || outcome = Some(scrub.scrub(device))).map_err(failed)?;
        let found = outcome.transpose()?.unwrap_or_default();
        if !found.is_empty() {
            tracing::warn!(vf = %self.vf.address, ?found, "took foreign programs off");
        }
        Ok(())
    }

    /// Sets the function's own address. Where it may not change that, it is trusted for the moment; where that does not
    /// help, the port says the address first.
    fn effective_mac(&self, want: &NetdevSnapshot) -> Result<(), LeaseError> {
        let Some(device) = self.at_home()? else { return Ok(()) };
        let (Some(mac), Some(is)) = (want.mac, device.mac) else { return Ok(()) };
        if mac == is {
            return Ok(());
        }
        let set = || {
            let change = NetdevChange { mac: Some(mac), ..NetdevChange::default() };
            self.kernel.configure_netdev(&Namespace::Host, device.index, &change)
        };
        let Err(first) = set() else { return Ok(()) };
        let port = self.port()?;
        let trust = VfChange { trust: Some(true), ..VfChange::default() };
        let address = VfChange { mac: Some(mac), ..VfChange::default() };
        for help in [trust, address] {
            if self.kernel.configure_vf(port, self.vf.index, &help).is_ok() && set().is_ok() {
                return Ok(());
            }
        }
        Err(first.into())
    }

    fn port_settings(
        &self,
        goal: &VfSnapshot,
        none: &mut NoAddress,
        errors: &mut Vec<LeaseError>,
    ) -> Result<(), LeaseError> {
        let port = self.port()?;
        let now = self.kernel.vf(port, self.vf.index)?;
        let pinned = |change: VfChange| VfChange { mac: self.pinned.or(change.mac), ..change };
        let change = pinned(goal.port_change(&now, *none));
        if change.is_empty() || self.kernel.configure_vf(port, self.vf.index, &change).is_ok() {
            return Ok(());
        }
        // What was refused must not keep back what comes after it.
        let now = self.kernel.vf(port, self.vf.index)?;
        for (attribute, single) in singles(&pinned(goal.port_change(&now, *none))) {
            let Err(error) = self.kernel.configure_vf(port, self.vf.index, &single) else { continue };
            if attribute == Attribute::Mac && single.mac.is_some_and(is_zero) && is_lasting(&error) {
                // Some drivers cannot take an address away: its own one then, which is what it has without.
                *none = NoAddress::OrOwn;
                let now = self.kernel.vf(port, self.vf.index)?;
                let own = VfChange { mac: goal.port_change(&now, *none).mac, ..VfChange::default() };
                if own.is_empty() || self.kernel.configure_vf(port, self.vf.index, &own).is_ok() {
                    continue;
                }
            }
            errors.push(error.into());
        }
        Ok(())
    }

    fn rest(&self, want: &NetdevSnapshot) -> Result<(), LeaseError> {
        let Some(device) = self.at_home()? else { return Ok(()) };
        let change = NetdevChange {
            mtu: (device.mtu != want.mtu).then(|| Mtu::try_from(want.mtu).ok()).flatten(),
            promisc: (device.promisc != want.promisc).then_some(want.promisc),
            all_multicast: (device.all_multicast != want.all_multicast).then_some(want.all_multicast),
            up: (device.up != want.up).then_some(want.up),
            ..NetdevChange::default()
        };
        if change.is_empty() {
            return Ok(());
        }
        Ok(self.kernel.configure_netdev(&Namespace::Host, device.index, &change)?)
    }
}

/// The change, one attribute at a time, in the kernel's order.
fn singles(change: &VfChange) -> Vec<(Attribute, VfChange)> {
    let VfChange { mac, vlan, rate, spoofchk, link_state, rss_query, trust, node_guid, port_guid } = *change;
    let none = VfChange::default();
    let all = [
        (Attribute::Mac, VfChange { mac, ..none }),
        (Attribute::Vlan, VfChange { vlan, ..none }),
        (Attribute::MaxRate, VfChange { rate, ..none }),
        (Attribute::Spoofchk, VfChange { spoofchk, ..none }),
        (Attribute::LinkState, VfChange { link_state, ..none }),
        (Attribute::RssQuery, VfChange { rss_query, ..none }),
        (Attribute::Trust, VfChange { trust, ..none }),
        (Attribute::NodeGuid, VfChange { node_guid, ..none }),
        (Attribute::PortGuid, VfChange { port_guid, ..none }),
    ];
    all.into_iter().filter(|(_, change)| !change.is_empty()).collect()
}

/// Whether the driver cannot do it, and not only not now.
fn is_lasting(error: &KernelError) -> bool {
    matches!(error.class, ErrorClass::Invalid | ErrorClass::Unsupported)
}

/// Whether the driver may do later what it did not do now.
fn is_busy(error: &LeaseError) -> bool {
    matches!(error, LeaseError::Kernel(error) if error.is_retryable())
}

/// Whether it may be over without anybody doing anything: the driver is busy, or takes over later what was written.
fn is_passing(error: &LeaseError) -> bool {
    match error {
        LeaseError::Unverified { differences, .. } => differences.iter().all(Difference::is_taken_over_later),
        error => is_busy(error),
    }
}

/// Pauses that grow, until a time has passed.
struct Pauses {
    deadline: Instant,
    next: Duration,
}

impl Pauses {
    fn until(limit: Duration) -> Self {
        Self { deadline: Instant::now() + limit, next: SHORTEST_PAUSE }
    }

    /// Pauses; false where the time had passed.
    fn pause(&mut self) -> bool {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        std::thread::sleep(self.next.min(left));
        self.next = (self.next * 2).min(LONGEST_PAUSE);
        true
    }
}

/// How often it is looked at and changed at least: setting one thing has drivers reset others.
const ROUNDS: usize = 3;
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// How long it is waited for an event before looking all the same.
const LONGEST_WAIT: Duration = Duration::from_millis(500);
