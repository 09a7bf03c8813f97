//! What a test sets up and looks at. None of it counts as a call, and no time passes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use dcenet_core::model::{IfIndex, MacAddr};
use dcenet_core::provider::{DeviceScrub, ScrubError};

use super::world::{Device, HOST, Port, Vf, World};
use super::{Model, Profile};
use crate::address::PciAddress;
use crate::kernel::{DriverState, LinkCounters, Namespace, NetdevState, VfLinkState, VfRate, VfState, VfVlan};

/// All that can be seen of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionState {
    /// What its port keeps.
    pub settings: VfState,
    /// What drives it.
    pub driver: DriverState,
    /// Its network device, with the namespace's path, the host's or none where the namespace has none.
    pub netdev: Option<(Option<Namespace>, NetdevState)>,
    /// Programs on the device.
    pub programs: Vec<String>,
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}

/// # Panics
/// Every method, where what it names is not there.
impl Model {
    /// A host without ports.
    pub fn new() -> Self {
        Self {
            world: Mutex::new(World {
                ports: Vec::new(),
                devices: Vec::new(),
                spaces: BTreeMap::from([(HOST, 1)]),
                paths: BTreeMap::new(),
                drivers: BTreeSet::from(["vfio-pci".to_owned()]),
                groups: BTreeMap::new(),
                open: BTreeSet::new(),
                calls: Vec::new(),
                coming: Vec::new(),
                clock: 0,
                delay: 0,
                counter: 0,
                refuses_moves: None,
                deaf: false,
                late: 0,
                late_macs: Vec::new(),
            }),
        }
    }

    /// A host with one port at `0000:01:00.0`, which has carrier and so many functions, and the port's device.
    pub fn with_port(profile: Profile, vfs: u16) -> (Self, IfIndex) {
        let model = Self::new();
        let port = model.add_port(profile, PORT, vfs);
        (model, port)
    }

    /// Adds a port, which has carrier, and returns its device. The devices of its functions are there.
    pub fn add_port(&self, profile: Profile, address: &str, vfs: u16) -> IfIndex {
        let address: PciAddress = address.parse().expect("a PCI address");
        let mut world = self.world();
        let mac = world.random_mac();
        let netdev = world.add_device("pf", Some(address), mac);
        world.drivers.insert(profile.vf_driver.to_owned());
        world.ports.push(Port {
            address,
            netdev,
            profile,
            bound: true,
            carrier: true,
            autoprobe: true,
            refuses_count: None,
            grants: None,
            refuses_autoprobe: None,
            busy: 0,
            busy_until: 0,
            vfs: Vec::new(),
        });
        world.populate(address, vfs);
        let now = world.clock.saturating_add(world.delay);
        world.advance(now);
        netdev
    }

    /// The address of a function of a port.
    pub fn function(&self, port: IfIndex, index: u16) -> PciAddress {
        self.world().port(port, "test").expect("the port").vfs[usize::from(index)].address
    }

    /// How many calls pass between the binding of a function and its device; with `u64::MAX` it never appears.
    pub fn set_delay(&self, calls: u64) {
        self.world().delay = calls;
    }

    /// Puts a function into an IOMMU group with others, or into none.
    pub fn set_group(&self, function: PciAddress, group: Option<u32>) {
        self.world().groups.insert(function, group);
    }

    /// Whether a program has the function's VFIO group open.
    pub fn set_open(&self, function: PciAddress, open: bool) {
        let mut world = self.world();
        if open {
            world.open.insert(function)
        } else {
            world.open.remove(&function)
        };
    }

    /// Whether a port has carrier.
    pub fn set_carrier(&self, port: IfIndex, carrier: bool) {
        self.world().port(port, "test").expect("the port").carrier = carrier;
    }

    /// Takes the driver away from a port, or gives it back.
    pub fn set_port_bound(&self, port: IfIndex, bound: bool) {
        self.world().port(port, "test").expect("the port").bound = bound;
    }

    /// Has a port's driver refuse more functions than that so.
    pub fn refuse_above(&self, port: IfIndex, most: u16, errno: i32) {
        self.world().port(port, "test").expect("the port").refuses_count = Some((most, errno));
    }

    /// Has a port's driver make no more functions than that, whatever is asked.
    pub fn grant_at_most(&self, port: IfIndex, vfs: u16) {
        self.world().port(port, "test").expect("the port").grants = Some(vfs);
    }

    /// Has a port refuse another autoprobe so, as where sysfs can only be read; `None` ends it.
    pub fn refuse_autoprobe(&self, port: IfIndex, errno: Option<i32>) {
        self.world().port(port, "test").expect("the port").refuses_autoprobe = errno;
    }

    /// Has a port's driver be busy (`EAGAIN`) during so many calls after each change of a function's settings, as one that
    /// resets the function (`i40e_ndo_set_vf_mac` in drivers/net/ethernet/intel/i40e/i40e_virtchnl_pf.c).
    pub fn be_busy_after_writes(&self, port: IfIndex, calls: u64) {
        self.world().port(port, "test").expect("the port").busy = calls;
    }

    /// Has functions take the addresses of their devices over so many calls after they were set, as those of iavf do when
    /// their port has answered.
    pub fn take_addresses_late(&self, calls: u64) {
        self.world().late = calls;
    }

    /// Refuses to move any device so; `None` ends it.
    pub fn refuse_moves(&self, errno: Option<i32>) {
        self.world().refuses_moves = errno;
    }

    /// Has watches hear nothing, as in a container without the host's events.
    pub fn be_deaf(&self) {
        self.world().deaf = true;
    }

    /// Loads another driver, which takes functions that are to be taken by it only.
    pub fn load_driver(&self, name: &str) {
        self.world().drivers.insert(name.to_owned());
    }

    /// Has a port's driver leave a function out of its list, as one that is being reset.
    pub fn withhold(&self, function: PciAddress, withheld: bool) {
        self.world().function(function).expect("the function").1.withheld = withheld;
    }

    /// Has a function's network device, and its port, count so much.
    pub fn count(&self, function: PciAddress, device: LinkCounters, port: LinkCounters) {
        let mut world = self.world();
        world.function(function).expect("the function").1.counted = port;
        for found in world.devices.iter_mut().filter(|found| found.function == Some(function)) {
            found.counted = device;
        }
    }

    /// Makes a namespace.
    pub fn create_namespace(&self, path: impl Into<PathBuf>) -> Namespace {
        let path = path.into();
        let mut world = self.world();
        world.counter += 1;
        let space = 0xf000_0000 + u64::from(world.counter);
        world.spaces.insert(space, 0);
        assert!(world.paths.insert(path.clone(), space).is_none(), "{} is there", path.display());
        Namespace::Path(path)
    }

    /// Somebody has the namespace open: it outlives its path. Returns what lets it go.
    pub fn hold_namespace(&self, path: impl AsRef<Path>) -> u64 {
        let mut world = self.world();
        let space = world.paths[path.as_ref()];
        *world.spaces.get_mut(&space).expect("a living namespace") += 1;
        space
    }

    /// Nobody has the namespace open any more.
    pub fn release_namespace(&self, held: u64) {
        let mut world = self.world();
        *world.spaces.get_mut(&held).expect("a living namespace") = 0;
        if !world.paths.values().any(|space| *space == held) {
            world.bury(held);
        }
    }

    /// Removes a namespace's path, and the namespace with it, unless somebody holds it.
    pub fn remove_namespace(&self, path: impl AsRef<Path>) {
        let mut world = self.world();
        let space = world.paths.remove(path.as_ref()).expect("the path");
        if world.spaces[&space] == 0 {
            world.bury(space);
        }
    }

    /// Makes another device in a namespace, which is in the way of names.
    pub fn add_link(&self, at: &Namespace, name: &str) -> IfIndex {
        let mut world = self.world();
        let space = match at {
            Namespace::Host => HOST,
            Namespace::Path(path) => world.paths[path],
        };
        let mac = world.random_mac();
        world.add_device("link", None, mac);
        let index = world.free_index(space, None);
        let device = world.devices.last_mut().expect("just made");
        device.space = space;
        device.state.name = name.parse().expect("a name");
        device.state.index = index;
        index
    }

    /// Attaches a program to the device of a function.
    pub fn attach_program(&self, function: PciAddress, name: &str) {
        let mut world = self.world();
        let device = world.devices.iter_mut().find(|device| device.function == Some(function));
        device.expect("a device").programs.push(name.to_owned());
    }

    /// Whether a frame with this source address passes the port, as far as the spoof check goes.
    pub fn passes(&self, function: PciAddress, source: MacAddr) -> bool {
        let mut world = self.world();
        let (_, vf) = world.function(function).expect("the function");
        let (checked, given) = (vf.state.spoofchk == Some(true), vf.state.mac);
        let effective = world.devices.iter().find(|device| device.function == Some(function)).and_then(|d| d.state.mac);
        let known = if given.is_device_address() { Some(given) } else { effective };
        !checked || known == Some(source)
    }

    /// All that can be seen of a function; `None` where it is not there.
    pub fn look(&self, function: PciAddress) -> Option<FunctionState> {
        let mut world = self.world();
        let (_, vf) = world.function(function)?;
        let driver = DriverState { driver: vf.driver.clone(), driver_override: vf.driver_override.clone() };
        let settings = vf.state.clone();
        let device = world.devices.iter().find(|device| device.function == Some(function));
        let at = |device: &Device| match device.space {
            HOST => Some(Namespace::Host),
            space => world.paths.iter().find(|(_, s)| **s == space).map(|(path, _)| Namespace::Path(path.clone())),
        };
        let netdev = device.map(|device| (at(device), device.state.clone()));
        let programs = device.map(|device| device.programs.clone()).unwrap_or_default();
        Some(FunctionState { settings, driver, netdev, programs })
    }

    /// The calls since the last time that this was asked.
    pub fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.world().calls)
    }
}

impl World {
    /// Makes the functions of a port, and binds them where the port says so.
    pub(super) fn populate(&mut self, address: PciAddress, count: u16) {
        let Ok(port) = self.port_at(address, "test") else { return };
        let (profile, autoprobe) = (port.profile, port.autoprobe);
        // As the 82576 has them: the first 0x80 further, and two apart.
        let functions: Vec<_> = (0..u32::from(count)).filter_map(|n| address.further(0x80 + 2 * n)).collect();
        port.vfs = functions
            .iter()
            .map(|function| Vf {
                address: *function,
                state: VfState {
                    mac: MacAddr::new([0; 6]),
                    vlan: VfVlan::default(),
                    rate: VfRate::default(),
                    spoofchk: profile.has_spoofchk.then_some(true),
                    trust: profile.has_trust.then_some(false),
                    link_state: VfLinkState::Auto,
                    rss_query: profile.has_rss_query.then_some(false),
                    guids: None,
                },
                mac_given: false,
                driver: None,
                driver_override: None,
                withheld: false,
                counted: LinkCounters::default(),
            })
            .collect();
        if profile.has_mac_at_birth {
            for n in 0..functions.len() {
                let mac = self.random_mac();
                if let Ok(port) = self.port_at(address, "test") {
                    (port.vfs[n].state.mac, port.vfs[n].mac_given) = (mac, true);
                }
            }
        }
        if autoprobe {
            for function in functions {
                self.take(function, profile.vf_driver);
            }
        }
    }
}

impl DeviceScrub for Model {
    /// Acts in the host's namespace: the model has no threads.
    fn scrub(&self, device: IfIndex) -> Result<Vec<String>, ScrubError> {
        let mut world = self.call(&format!("scrub link {device}"));
        let found = world.device(HOST, device);
        let found = found.map(|at| std::mem::take(&mut world.devices[at].programs));
        found.ok_or_else(|| ScrubError {
            device,
            what: "programs".to_owned(),
            source: std::io::Error::from_raw_os_error(libc::ENODEV).into(),
        })
    }
}

/// Where [`Model::with_port`] has its port.
const PORT: &str = "0000:01:00.0";
