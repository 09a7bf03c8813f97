//! What there is: physical functions, their virtual functions, and what hangs on them, read from sysfs.
//!
//! Names are never identity: a device is its PCI address, and names are what it has now. What cannot be read is noted
//! and left out, and the rest is told all the same: trees change while they are read, and drivers refuse attributes.
//!
//! Bed: fixture, with trees as igb, mlx5 and ice make them, whole and broken; igb.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use dcenet_core::model::{IfIndex, MacAddr};

use crate::address::{Location, PciAddress, PciIds, VfIndex};
use crate::sysfs::{DEVICES, Sysfs, function};

/// All ports with SR-IOV, in the order of their addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inventory {
    /// The physical functions.
    pub functions: Vec<PhysicalFunction>,
    /// What could not be read, and was left out.
    pub notes: Vec<Note>,
}

/// A network device that can have virtual functions (PCI Express Base Specification, chapter 9).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhysicalFunction {
    /// Its address.
    pub address: PciAddress,
    /// What it is.
    pub ids: PciIds,
    /// Its driver; `None` where it has none.
    pub driver: Option<String>,
    /// Where it hangs; its virtual functions hang there too.
    pub location: Location,
    /// How many virtual functions it can have (`sriov_totalvfs`).
    pub total_vfs: u16,
    /// How many it has (`sriov_numvfs`).
    pub num_vfs: u16,
    /// Whether drivers are bound to new virtual functions (`sriov_drivers_autoprobe`; Linux 4.12, before always).
    pub autoprobe: bool,
    /// Its network devices in this namespace: one a port. Those of virtual functions are in `representors`.
    pub netdevs: Vec<Netdev>,
    /// The devices that stand for virtual functions on the switch in the adapter, where it is in switchdev mode.
    pub representors: Vec<Representor>,
    /// Its RDMA devices.
    pub rdma: Vec<RdmaDevice>,
    /// Its virtual functions, by index. Some may be missing: see the notes.
    pub vfs: Vec<VirtualFunction>,
}

/// A virtual function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualFunction {
    /// Its number on the port.
    pub index: VfIndex,
    /// Its address.
    pub address: PciAddress,
    /// What it is.
    pub ids: PciIds,
    /// What drives it.
    pub driver: VfDriverKind,
    /// Its network devices in this namespace.
    pub netdevs: Vec<String>,
    /// Its IOMMU group; without one it cannot be given to user space safely.
    pub iommu_group: Option<u32>,
    /// Its RDMA devices.
    pub rdma: Vec<RdmaDevice>,
}

/// What drives a virtual function.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum VfDriverKind {
    /// Nothing.
    None,
    /// A program in user space, through this driver, such as `vfio-pci`.
    UserSpace(String),
    /// The kernel, by this driver.
    Kernel(String),
}

impl VfDriverKind {
    /// The driver's name.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::None => None,
            Self::UserSpace(name) | Self::Kernel(name) => Some(name),
        }
    }
}

impl VirtualFunction {
    /// Whether it has a driver of the kernel and still no device here. That does not say that it is free: its device is in
    /// another namespace, perhaps one without a name that some process still holds, or is being made now.
    pub fn is_elsewhere(&self) -> bool {
        matches!(self.driver, VfDriverKind::Kernel(_)) && self.netdevs.is_empty()
    }
}

/// What runs on a port (`ARPHRD_*` of `include/uapi/linux/if_arp.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum LinkType {
    /// Ethernet.
    Ether,
    /// InfiniBand.
    Infiniband,
    /// Anything else.
    Other,
}

/// A network device of a physical function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Netdev {
    /// Its name now.
    pub name: String,
    /// Its index.
    pub index: Option<IfIndex>,
    /// Its Ethernet address.
    pub mac: Option<MacAddr>,
    /// What runs on it.
    pub link_type: LinkType,
    /// Its number among the ports of one function (`dev_port`).
    pub dev_port: u32,
    /// Its name on the adapter's switch, such as `p0`.
    pub phys_port_name: Option<String>,
    /// The adapter's switch.
    pub phys_switch_id: Option<String>,
}

/// A device that stands for a virtual function on the adapter's switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Representor {
    /// Its name now.
    pub name: String,
    /// The adapter's switch.
    pub phys_switch_id: String,
    /// The number of the physical function on the adapter.
    pub pf_number: u16,
    /// The virtual function.
    pub vf: VfIndex,
}

/// An RDMA device, and what a program opens of it below `/dev/infiniband`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaDevice {
    /// Its name, such as `mlx5_2`.
    pub name: String,
    /// The names of its character devices, such as `uverbs2`, `umad2` and `issm2`.
    pub character_devices: Vec<String>,
}

/// Something that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// The path below the root.
    pub path: PathBuf,
    /// What is wrong there.
    pub problem: Problem,
}

/// What is wrong with a place of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// It was listed, and is gone.
    Vanished,
    /// Reading it failed so.
    Unreadable(io::ErrorKind),
    /// It says this, and that is not what stands there as a rule.
    Malformed {
        /// What it says.
        value: String,
        /// What stands there.
        wanted: &'static str,
    },
    /// The link leads to a function that is not there.
    Dangling {
        /// The text of the link.
        target: PathBuf,
    },
    /// The port says that it has this virtual function, and has no link to it.
    MissingVf(VfIndex),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.path.display())?;
        match &self.problem {
            Problem::Vanished => f.write_str("is gone"),
            Problem::Unreadable(kind) => write!(f, "{kind}"),
            Problem::Malformed { value, wanted } => write!(f, "says {value:?}, which is not {wanted}"),
            Problem::Dangling { target } => write!(f, "leads to {}, which is not there", target.display()),
            Problem::MissingVf(index) => write!(f, "virtual function {index} should be there, and is not"),
        }
    }
}

/// Why nothing can be told.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}; is sysfs mounted there?", path.display())]
pub struct InventoryError {
    /// The path below the root.
    pub path: PathBuf,
    /// What the system answered.
    #[source]
    pub source: io::Error,
}

impl Inventory {
    /// Reads all ports.
    ///
    /// # Errors
    /// Where the list of PCI functions itself cannot be read. Anything less is a [`Note`].
    ///
    /// # Minimum kernel version
    /// 3.8 (`sriov_numvfs`).
    pub fn scan(sysfs: &dyn Sysfs) -> Result<Self, InventoryError> {
        let all = sysfs.list(Path::new(DEVICES)).map_err(|source| InventoryError { path: DEVICES.into(), source })?;
        let mut addresses: Vec<PciAddress> = all.iter().filter_map(|name| name.parse().ok()).collect();
        addresses.sort_unstable();
        let mut reader = Reader { sysfs, notes: Vec::new() };
        let mut functions = Vec::new();
        // A virtual function's address is above its physical function's: those of ports met before need not be asked
        // whether they are ports.
        let mut virtual_ones = BTreeSet::new();
        for address in addresses {
            if virtual_ones.contains(&address) {
                continue;
            }
            if let Some(pf) = reader.physical(address) {
                virtual_ones.extend(pf.vfs.iter().map(|vf| vf.address));
                functions.push(pf);
            }
        }
        Ok(Self { functions, notes: reader.notes })
    }

    /// Reads one port anew, with its virtual functions: after its devices changed. `address` may be of one of those.
    pub fn refresh(&mut self, sysfs: &dyn Sysfs, address: PciAddress) {
        let port = self.port_of(address).map_or(address, |pf| pf.address);
        let below = function(port);
        let theirs: Vec<PathBuf> = self
            .functions
            .iter()
            .filter(|pf| pf.address == port)
            .flat_map(|pf| pf.vfs.iter().map(|vf| function(vf.address)))
            .chain([below])
            .collect();
        self.notes.retain(|note| !theirs.iter().any(|path| note.path.starts_with(path)));
        let mut reader = Reader { sysfs, notes: Vec::new() };
        let now = reader.physical(port);
        self.notes.append(&mut reader.notes);
        match (self.functions.binary_search_by_key(&port, |pf| pf.address), now) {
            (Ok(at), Some(pf)) => self.functions[at] = pf,
            (Ok(at), None) => drop(self.functions.remove(at)),
            (Err(at), Some(pf)) => self.functions.insert(at, pf),
            (Err(_), None) => {}
        }
    }

    /// Reads one virtual function anew.
    pub fn refresh_vf(&mut self, sysfs: &dyn Sysfs, address: PciAddress) {
        let Some((pf, at)) = self.functions.iter_mut().find_map(|pf| {
            let at = pf.vfs.iter().position(|vf| vf.address == address)?;
            Some((pf, at))
        }) else {
            return;
        };
        let path = function(address);
        self.notes.retain(|note| !note.path.starts_with(&path));
        let mut reader = Reader { sysfs, notes: Vec::new() };
        let vf = &pf.vfs[at];
        let now = reader.virtual_function(vf.index, address, vf.ids);
        pf.vfs[at] = now;
        self.notes.append(&mut reader.notes);
    }

    /// The port of this address, or of the virtual function of this address.
    pub fn port_of(&self, address: PciAddress) -> Option<&PhysicalFunction> {
        let own = |pf: &&PhysicalFunction| pf.address == address || pf.vfs.iter().any(|vf| vf.address == address);
        self.functions.iter().find(own)
    }

    /// The virtual function of this address, with its port.
    pub fn vf(&self, address: PciAddress) -> Option<(&PhysicalFunction, &VirtualFunction)> {
        self.functions.iter().find_map(|pf| {
            let vf = pf.vfs.iter().find(|vf| vf.address == address)?;
            Some((pf, vf))
        })
    }

    /// All virtual functions, with their ports.
    pub fn vfs(&self) -> impl Iterator<Item = (&PhysicalFunction, &VirtualFunction)> {
        self.functions.iter().flat_map(|pf| pf.vfs.iter().map(move |vf| (pf, vf)))
    }
}

/// Where any PCI device hangs, such as a GPU.
///
/// # Errors
/// Where there is no such device.
pub fn locate(sysfs: &dyn Sysfs, address: PciAddress) -> Result<Location, InventoryError> {
    let path = function(address);
    let target = sysfs.link(&path).map_err(|source| InventoryError { path: path.clone(), source })?;
    let mut reader = Reader { sysfs, notes: Vec::new() };
    Ok(Location { numa: reader.numa(&path), bridges: bridges(&target) })
}

/// The names between the host bridge and the device, of a link such as
/// `../../../devices/pci0000:00/0000:00:01.0/0000:01:00.0`.
fn bridges(target: &Path) -> Vec<String> {
    let names: Vec<String> = target.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    let start = names.iter().position(|name| name.starts_with("pci") && name.contains(':'));
    let end = names.len().saturating_sub(1);
    start.and_then(|start| names.get(start..end)).unwrap_or_default().to_vec()
}

struct Reader<'a> {
    sysfs: &'a dyn Sysfs,
    notes: Vec<Note>,
}

impl Reader<'_> {
    fn note(&mut self, path: &Path, problem: Problem) {
        tracing::debug!(path = %path.display(), ?problem, "left out of the inventory");
        self.notes.push(Note { path: path.to_owned(), problem });
    }

    /// An attribute that need not be there, and that its driver need not answer (`EOPNOTSUPP`).
    fn optional(&mut self, path: &Path) -> Option<String> {
        match self.sysfs.read(path) {
            Ok(text) => Some(text).filter(|text| !text.is_empty()),
            Err(error) if is_absent(&error) => None,
            Err(error) => {
                self.note(path, Problem::Unreadable(error.kind()));
                None
            }
        }
    }

    fn parsed<T>(&mut self, path: &Path, wanted: &'static str, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let text = self.optional(path)?;
        let value = parse(&text);
        if value.is_none() {
            self.note(path, Problem::Malformed { value: text, wanted });
        }
        value
    }

    fn names(&mut self, path: &Path) -> Vec<String> {
        match self.sysfs.list(path) {
            Ok(names) => names,
            Err(error) if is_absent(&error) => Vec::new(),
            Err(error) => {
                self.note(path, Problem::Unreadable(error.kind()));
                Vec::new()
            }
        }
    }

    /// The last name of the target of a link that need not be there.
    fn target(&mut self, path: &Path) -> Option<String> {
        match self.sysfs.link(path) {
            Ok(target) => target.file_name().map(|name| name.to_string_lossy().into_owned()),
            Err(error) if is_absent(&error) => None,
            Err(error) => {
                self.note(path, Problem::Unreadable(error.kind()));
                None
            }
        }
    }

    fn numa(&mut self, path: &Path) -> Option<u32> {
        let node = self.parsed(&path.join("numa_node"), "a NUMA node, or -1", |text| text.parse::<i64>().ok())?;
        u32::try_from(node).ok()
    }

    fn hex(&mut self, path: &Path) -> Option<u32> {
        self.parsed(path, "a hexadecimal number", |text| {
            u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
        })
    }

    fn physical(&mut self, address: PciAddress) -> Option<PhysicalFunction> {
        let path = function(address);
        let count = |text: &str| text.parse::<u16>().ok();
        let total_vfs = self.parsed(&path.join("sriov_totalvfs"), "a number of functions", count)?;
        // 0x02 of the class code are network controllers (PCI Code and ID Assignment Specification, 1.3).
        if self.hex(&path.join("class"))? >> 16 != 0x02 {
            return None;
        }
        let ids = self.ids(&path)?;
        let num_vfs = self.parsed(&path.join("sriov_numvfs"), "a number of functions", count).unwrap_or_default();
        let autoprobe = self.optional(&path.join("sriov_drivers_autoprobe")).is_none_or(|text| text != "0");
        let bridges = match self.sysfs.link(&path) {
            Ok(target) => bridges(&target),
            Err(error) => {
                self.note(&path, Problem::Unreadable(error.kind()));
                Vec::new()
            }
        };
        let location = Location { numa: self.numa(&path), bridges };
        let vf_ids = self
            .hex(&path.join("sriov_vf_device"))
            .and_then(|device| u16::try_from(device).ok())
            .map(|device| PciIds { vendor: ids.vendor, device });
        let mut netdevs = Vec::new();
        let mut representors = Vec::new();
        for name in self.names(&path.join("net")) {
            let netdev = self.netdev(&path.join("net").join(&name), name);
            match representor(&netdev) {
                Some(representor) => representors.push(representor),
                None => netdevs.push(netdev),
            }
        }
        netdevs.sort_by_key(|netdev| netdev.dev_port);
        representors.sort_by_key(|r| (r.pf_number, r.vf));
        let vfs = if num_vfs == 0 { Vec::new() } else { self.vfs(&path, num_vfs, vf_ids) };
        let driver = self.target(&path.join("driver"));
        let rdma = self.rdma(&path);
        Some(PhysicalFunction {
            address,
            ids,
            driver,
            location,
            total_vfs,
            num_vfs,
            autoprobe,
            netdevs,
            representors,
            rdma,
            vfs,
        })
    }

    fn ids(&mut self, path: &Path) -> Option<PciIds> {
        let vendor = self.hex(&path.join("vendor"))?;
        let device = self.hex(&path.join("device"))?;
        Some(PciIds { vendor: u16::try_from(vendor).ok()?, device: u16::try_from(device).ok()? })
    }

    fn vfs(&mut self, path: &Path, num_vfs: u16, ids: Option<PciIds>) -> Vec<VirtualFunction> {
        let mut indices: Vec<VfIndex> = self
            .names(path)
            .iter()
            .filter_map(|name| Some(VfIndex(name.strip_prefix("virtfn")?.parse().ok()?)))
            .collect();
        indices.sort_unstable();
        let there: BTreeSet<VfIndex> = indices.iter().copied().collect();
        for index in (0..num_vfs).map(VfIndex).filter(|index| !there.contains(index)) {
            self.note(path, Problem::MissingVf(index));
        }
        let mut vfs = Vec::new();
        for index in indices {
            let link = path.join(format!("virtfn{index}"));
            let target = match self.sysfs.link(&link) {
                Ok(target) => target,
                Err(error) if is_absent(&error) => {
                    self.note(&link, Problem::Vanished);
                    continue;
                }
                Err(error) => {
                    self.note(&link, Problem::Unreadable(error.kind()));
                    continue;
                }
            };
            let Some(address) = target.file_name().and_then(|name| name.to_str()?.parse().ok()) else {
                self.note(&link, Problem::Malformed { value: target.display().to_string(), wanted: "a function" });
                continue;
            };
            let ids = match ids {
                Some(ids) => ids,
                // Before Linux 4.15 the port does not say what its functions are.
                None => match self.ids(&function(address)) {
                    Some(ids) => ids,
                    None => {
                        self.note(&link, Problem::Dangling { target });
                        continue;
                    }
                },
            };
            let notes = self.notes.len();
            let vf = self.virtual_function(index, address, ids);
            // One without anything that a function has may not be there at all.
            if vf.driver == VfDriverKind::None
                && vf.iommu_group.is_none()
                && self.notes.len() == notes
                && self.sysfs.link(&function(address)).is_err()
            {
                self.note(&link, Problem::Dangling { target });
                continue;
            }
            vfs.push(vf);
        }
        vfs
    }

    fn virtual_function(&mut self, index: VfIndex, address: PciAddress, ids: PciIds) -> VirtualFunction {
        let path = function(address);
        let driver = match self.target(&path.join("driver")) {
            None => VfDriverKind::None,
            Some(name) if is_for_user_space(&name) => VfDriverKind::UserSpace(name),
            Some(name) => VfDriverKind::Kernel(name),
        };
        let group = path.join("iommu_group");
        let iommu_group = self.target(&group).and_then(|name| {
            let number = name.parse().ok();
            if number.is_none() {
                self.note(&group, Problem::Malformed { value: name, wanted: "the number of an IOMMU group" });
            }
            number
        });
        // Drivers of user space make no devices.
        let of_kernel = matches!(driver, VfDriverKind::Kernel(_));
        let netdevs = if of_kernel { self.names(&path.join("net")) } else { Vec::new() };
        let rdma = if of_kernel { self.rdma(&path) } else { Vec::new() };
        VirtualFunction { index, address, ids, driver, netdevs, iommu_group, rdma }
    }

    fn netdev(&mut self, path: &Path, name: String) -> Netdev {
        let number = |text: &str| text.parse::<u32>().ok();
        let index = self.parsed(&path.join("ifindex"), "the index of a link", number).and_then(IfIndex::new);
        if index.is_none() {
            self.note(path, Problem::Vanished);
        }
        let link_type = match self.parsed(&path.join("type"), "a hardware type", number) {
            Some(1) => LinkType::Ether,
            Some(32) => LinkType::Infiniband,
            _ => LinkType::Other,
        };
        let mac = match link_type {
            LinkType::Ether => self.parsed(&path.join("address"), "an Ethernet address", |text| text.parse().ok()),
            _ => None,
        };
        let dev_port = self.parsed(&path.join("dev_port"), "the number of a port", number).unwrap_or_default();
        let phys_port_name = self.optional(&path.join("phys_port_name"));
        let phys_switch_id = self.optional(&path.join("phys_switch_id"));
        Netdev { name, index, mac, link_type, dev_port, phys_port_name, phys_switch_id }
    }

    fn rdma(&mut self, path: &Path) -> Vec<RdmaDevice> {
        let mut devices = Vec::new();
        for name in self.names(&path.join("infiniband")) {
            devices.push(RdmaDevice { name, character_devices: Vec::new() });
        }
        if let [first, ..] = &mut devices[..] {
            // The kernel lists them for the function, not for the RDMA device, and a function has one such device.
            for class in ["infiniband_verbs", "infiniband_mad"] {
                let mut more = self.names(&path.join(class));
                first.character_devices.append(&mut more);
            }
        }
        devices
    }
}

/// Reads `pf0vf3`, or `c1pf0vf3` where a controller is named (`devlink_port_phys_port_name_get` in
/// net/devlink/port.c).
fn representor(netdev: &Netdev) -> Option<Representor> {
    let phys_switch_id = netdev.phys_switch_id.clone()?;
    let name = netdev.phys_port_name.as_deref()?;
    let name = match name.strip_prefix('c') {
        Some(rest) => rest.trim_start_matches(|c: char| c.is_ascii_digit()),
        None => name,
    };
    let (pf, vf) = name.strip_prefix("pf")?.split_once("vf")?;
    let (pf_number, vf) = (pf.parse().ok()?, VfIndex(vf.parse().ok()?));
    Some(Representor { name: netdev.name.clone(), phys_switch_id, pf_number, vf })
}

fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV | libc::ENOTDIR))
}

/// Whether a driver hands a function to a program: `vfio-pci` and its variants (`mlx5_vfio_pci`, drivers/vfio/pci), and
/// those of uio.
pub(crate) fn is_for_user_space(driver: &str) -> bool {
    is_vfio(driver) || matches!(driver.replace('_', "-").as_str(), "uio-pci-generic" | "igb-uio")
}

/// Whether it is one of those of VFIO, which hand over functions that the IOMMU holds in.
pub(crate) fn is_vfio(driver: &str) -> bool {
    driver.replace('_', "-").ends_with("vfio-pci")
}
