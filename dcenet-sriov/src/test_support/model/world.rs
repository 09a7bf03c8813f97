//! What the modelled kernel keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use dcenet_core::model::{IfIndex, IfName, MacAddr};

use super::Profile;
use crate::address::{PciAddress, VfIndex};
use crate::kernel::{KernelError, LinkCounters, NetdevState, VfState};

/// The number of a namespace. Numbers are never used again.
pub(super) type Space = u64;
/// The host's.
pub(super) const HOST: Space = 1;

#[derive(Debug)]
pub(super) struct World {
    pub(super) ports: Vec<Port>,
    pub(super) devices: Vec<Device>,
    /// Living namespaces, and how many hold each beside its path.
    pub(super) spaces: BTreeMap<Space, u32>,
    pub(super) paths: BTreeMap<PathBuf, Space>,
    pub(super) drivers: BTreeSet<String>,
    /// The IOMMU groups of functions: those that are not here have one of their own.
    pub(super) groups: BTreeMap<PciAddress, Option<u32>>,
    /// Functions whose VFIO group a program has open.
    pub(super) open: BTreeSet<PciAddress>,
    pub(super) calls: Vec<String>,
    /// Devices that appear when the clock gets there.
    pub(super) coming: Vec<(u64, PciAddress)>,
    pub(super) clock: u64,
    pub(super) delay: u64,
    pub(super) counter: u32,
    pub(super) refuses_moves: Option<i32>,
    pub(super) deaf: bool,
    /// How many calls pass until a function's device has the address that it was given, and those that are under way.
    pub(super) late: u64,
    pub(super) late_macs: Vec<(u64, PciAddress, MacAddr)>,
}

#[derive(Debug)]
pub(super) struct Port {
    pub(super) address: PciAddress,
    pub(super) netdev: IfIndex,
    pub(super) profile: Profile,
    pub(super) bound: bool,
    pub(super) carrier: bool,
    pub(super) autoprobe: bool,
    pub(super) refuses_count: Option<(u16, i32)>,
    pub(super) grants: Option<u16>,
    pub(super) refuses_autoprobe: Option<i32>,
    /// During how many calls the driver is busy after each change, and until when it is now.
    pub(super) busy: u64,
    pub(super) busy_until: u64,
    pub(super) vfs: Vec<Vf>,
}

#[derive(Debug)]
pub(super) struct Vf {
    pub(super) address: PciAddress,
    pub(super) state: VfState,
    /// Whether `state.mac` was given by the administrator.
    pub(super) mac_given: bool,
    pub(super) driver: Option<String>,
    pub(super) driver_override: Option<String>,
    pub(super) withheld: bool,
    /// What the port's driver counted of it.
    pub(super) counted: LinkCounters,
}

#[derive(Debug)]
pub(super) struct Device {
    pub(super) space: Space,
    pub(super) function: Option<PciAddress>,
    pub(super) state: NetdevState,
    pub(super) programs: Vec<String>,
    pub(super) counted: LinkCounters,
}

impl World {
    pub(super) fn port(&mut self, netdev: IfIndex, operation: &str) -> Result<&mut Port, KernelError> {
        let found = self.ports.iter_mut().find(|port| port.netdev == netdev);
        found.ok_or_else(|| KernelError::refused(operation, libc::ENODEV))
    }

    pub(super) fn port_at(&mut self, address: PciAddress, operation: &str) -> Result<&mut Port, KernelError> {
        let found = self.ports.iter_mut().find(|port| port.address == address);
        found.ok_or_else(|| KernelError::refused(operation, libc::ENOENT))
    }

    /// A function with its port.
    pub(super) fn function(&mut self, address: PciAddress) -> Option<(&Profile, &mut Vf)> {
        self.ports.iter_mut().find_map(|port| {
            let vf = port.vfs.iter_mut().find(|vf| vf.address == address)?;
            Some((&port.profile, vf))
        })
    }

    pub(super) fn device(&mut self, space: Space, index: IfIndex) -> Option<usize> {
        self.devices.iter().position(|device| device.space == space && device.state.index == index)
    }

    /// Whether a name or alternative name is taken in a namespace by another device than this one.
    pub(super) fn is_taken(&self, space: Space, name: &str, except: usize) -> bool {
        let has = |device: &Device| {
            device.state.name.as_str() == name || device.state.alternative_names.iter().any(|other| other == name)
        };
        self.devices.iter().enumerate().any(|(at, device)| at != except && device.space == space && has(device))
    }

    /// The index in a namespace that a device gets: its own where that is free.
    pub(super) fn free_index(&self, space: Space, wanted: Option<IfIndex>) -> IfIndex {
        let taken = |index: IfIndex| self.devices.iter().any(|d| d.space == space && d.state.index == index);
        let more = (2..).filter_map(IfIndex::new);
        wanted.into_iter().chain(more).find(|index| !taken(*index)).expect("indices do not end")
    }

    /// Makes a device, down, under the first free name that begins so.
    pub(super) fn add_device(&mut self, stem: &str, function: Option<PciAddress>, mac: MacAddr) -> IfIndex {
        let name = (0..).map(|n| format!("{stem}{n}")).find(|name| !self.is_taken(HOST, name, usize::MAX));
        let name: IfName = name.and_then(|name| name.parse().ok()).expect("names do not end");
        self.counter += 1;
        // The kernel's indices grow, too: one that was used is not used again soon.
        let index = self.free_index(HOST, IfIndex::new(self.counter + 1));
        let state = NetdevState {
            index,
            name,
            alternative_names: Vec::new(),
            alias: None,
            mac: Some(mac),
            mtu: 1500,
            up: false,
            promisc: false,
            all_multicast: false,
        };
        self.devices.push(Device {
            space: HOST,
            function,
            state,
            programs: Vec::new(),
            counted: LinkCounters::default(),
        });
        index
    }

    /// Another address that nobody has.
    pub(super) fn random_mac(&mut self) -> MacAddr {
        self.counter += 1;
        let [_, b, c, d] = self.counter.to_be_bytes();
        MacAddr::local([0x0a, 0, 0xee, b, c, d])
    }

    /// Binds a function to its driver, whose device appears later.
    pub(super) fn take(&mut self, function: PciAddress, driver: &str) {
        let due = self.clock.saturating_add(self.delay);
        let Some((profile, vf)) = self.function(function) else { return };
        vf.driver = Some(driver.to_owned());
        if profile.vf_driver == driver {
            self.coming.push((due, function));
        }
    }

    /// The device of a function vanishes, wherever it is.
    pub(super) fn drop_device(&mut self, function: PciAddress) {
        self.coming.retain(|(_, coming)| *coming != function);
        self.devices.retain(|device| device.function != Some(function));
    }

    /// Time passes: devices that are due appear. Returns whether one did.
    pub(super) fn advance(&mut self, to: u64) -> bool {
        self.clock = self.clock.max(to);
        let (due, later): (Vec<_>, Vec<_>) = self.late_macs.drain(..).partition(|(when, ..)| *when <= to);
        self.late_macs = later;
        for (_, function, mac) in due {
            let device = self.devices.iter_mut().find(|device| device.function == Some(function));
            device.into_iter().for_each(|device| device.state.mac = Some(mac));
        }
        let (due, later): (Vec<_>, Vec<_>) = self.coming.drain(..).partition(|(when, _)| *when <= to);
        self.coming = later;
        for (_, function) in &due {
            let random = self.random_mac();
            let Some((_, vf)) = self.function(*function) else { continue };
            let mac = if vf.state.mac.is_device_address() { vf.state.mac } else { random };
            self.add_device("eth", Some(*function), mac);
        }
        !due.is_empty()
    }

    /// A namespace dies: physical devices go back to the host as they are (`default_device_exit_net` in net/core/dev.c),
    /// others vanish.
    pub(super) fn bury(&mut self, space: Space) {
        self.spaces.remove(&space);
        self.devices.retain(|device| device.space != space || device.function.is_some());
        while let Some(at) = self.devices.iter().position(|device| device.space == space) {
            let index = self.devices[at].state.index;
            let mut name = self.devices[at].state.name.clone();
            if self.is_taken(HOST, name.as_str(), at) {
                let fallback = format!("dev{index}");
                let free = !self.is_taken(HOST, &fallback, at);
                let other = (0..).map(|n| format!("dev{n}")).find(|name| !self.is_taken(HOST, name, at));
                let chosen = if free { Some(fallback) } else { other };
                name = chosen.and_then(|name| name.parse().ok()).expect("names do not end");
            }
            let mut alternative = std::mem::take(&mut self.devices[at].state.alternative_names);
            alternative.retain(|name| !self.is_taken(HOST, name, at));
            let index = self.free_index(HOST, Some(index));
            let device = &mut self.devices[at];
            device.space = HOST;
            device.state =
                NetdevState { index, name, alternative_names: alternative, up: false, ..device.state.clone() };
        }
    }

    /// Whether a function may give its device another address, as its port sees it; and what the port then knows.
    pub(super) fn change_mac(&mut self, function: PciAddress, mac: MacAddr) -> Result<(), i32> {
        let Some((profile, vf)) = self.function(function) else { return Ok(()) };
        if let Some(errno) = profile.mac_is_fixed
            && vf.mac_given
            && vf.state.trust != Some(true)
            && vf.state.mac != mac
        {
            return Err(errno);
        }
        if profile.reports_own_mac {
            vf.state.mac = mac;
        }
        Ok(())
    }

    /// A function's device goes up: its driver tells its address to the port.
    pub(super) fn up(&mut self, at: usize) {
        let (function, mac) = (self.devices[at].function, self.devices[at].state.mac);
        let (Some(function), Some(mac)) = (function, mac) else { return };
        if let Some((profile, vf)) = self.function(function)
            && profile.reports_own_mac
            && !vf.mac_given
        {
            vf.state.mac = mac;
        }
    }
}

impl Port {
    pub(super) fn vf(&mut self, index: VfIndex, operation: &str) -> Result<&mut Vf, KernelError> {
        let found = self.vfs.get_mut(usize::from(index.0));
        found.ok_or_else(|| KernelError::refused(operation, libc::EINVAL))
    }
}
