//! Trees of files that look like sysfs, modelled on those of real adapters.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::address::PciAddress;
use crate::sysfs::SysfsDir;

/// A tree in a directory of the caller's.
///
/// # Panics
/// Every method, where the directory cannot be written.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
    netdevs: u32,
    groups: u32,
}

/// A port with its virtual functions.
#[derive(Debug, Clone)]
pub struct Port<'a> {
    /// Its address.
    pub address: &'a str,
    /// The host bridge and the bridges above it.
    pub bridges: &'a [&'a str],
    /// Vendor, device, and device of its virtual functions.
    pub ids: (u16, u16, u16),
    /// Its driver.
    pub driver: &'a str,
    /// Its NUMA node, or -1.
    pub numa: i32,
    /// Its device.
    pub netdev: &'a str,
    /// How many virtual functions it can have.
    pub total_vfs: u16,
    /// How many it has.
    pub vfs: u16,
    /// First VF offset and VF stride.
    pub routing: (u32, u32),
    /// What drives the virtual functions.
    pub vf: VfOf<'a>,
    /// Its RDMA device, and those of its virtual functions, begin so.
    pub rdma: Option<&'a str>,
    /// The adapter's switch, where it is in switchdev mode: then virtual functions have representors.
    pub switch_id: Option<&'a str>,
}

/// The driver of virtual functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VfOf<'a> {
    /// None.
    Nobody,
    /// This one, which makes a device each.
    Kernel(&'a str),
    /// This one, which makes none.
    UserSpace(&'a str),
}

impl<'a> Port<'a> {
    /// As Intel's 82576 makes it, in QEMU behind a root port: seven functions, two apart, of which none has RDMA.
    pub fn igb(address: &'a str, netdev: &'a str) -> Self {
        Self {
            address,
            bridges: &["pci0000:00", "0000:00:02.0"],
            ids: (0x8086, 0x10c9, 0x10ca),
            driver: "igb",
            numa: -1,
            netdev,
            total_vfs: 7,
            vfs: 7,
            routing: (0x80, 2),
            vf: VfOf::Kernel("igbvf"),
            rdma: None,
            switch_id: None,
        }
    }

    /// As NVIDIA's ConnectX-6 Dx makes it: functions follow one another, and every one has an RDMA device.
    pub fn mlx5(address: &'a str, netdev: &'a str) -> Self {
        Self {
            bridges: &["pci0000:80", "0000:80:01.1"],
            ids: (0x15b3, 0x101d, 0x101e),
            driver: "mlx5_core",
            numa: 1,
            total_vfs: 8,
            vfs: 4,
            routing: (2, 1),
            vf: VfOf::Kernel("mlx5_core"),
            rdma: Some("mlx5_"),
            ..Self::igb(address, netdev)
        }
    }

    /// As Intel's E810 makes it.
    pub fn ice(address: &'a str, netdev: &'a str) -> Self {
        Self {
            bridges: &["pci0000:3a", "0000:3a:00.0"],
            ids: (0x8086, 0x1592, 0x1889),
            driver: "ice",
            numa: 0,
            total_vfs: 128,
            vfs: 16,
            routing: (8, 1),
            vf: VfOf::Kernel("iavf"),
            ..Self::igb(address, netdev)
        }
    }
}

impl Tree {
    /// An empty tree in `root`.
    pub fn new(root: &Path) -> Self {
        for directory in ["bus/pci/devices", "bus/pci/drivers", "devices", "class/net", "kernel/iommu_groups"] {
            fs::create_dir_all(root.join(directory)).expect("to make a directory");
        }
        Self { root: root.to_owned(), netdevs: 1, groups: 10 }
    }

    /// The tree, for reading.
    pub fn sysfs(&self) -> SysfsDir {
        SysfsDir::new(&self.root)
    }

    /// The directory of a function, to change things in.
    pub fn function(&self, address: &str) -> PathBuf {
        self.root.join("bus/pci/devices").join(address).canonicalize().expect("the function is there")
    }

    /// Adds a PCI function without anything special, such as a GPU. Returns its directory.
    pub fn device(&mut self, address: &str, bridges: &[&str], ids: (u16, u16), class: u32, numa: i32) -> PathBuf {
        let below: PathBuf = Path::new("devices").join(bridges.iter().collect::<PathBuf>()).join(address);
        let path = self.root.join(&below);
        fs::create_dir_all(&path).expect("to make a directory");
        link(&Path::new("../../..").join(&below), &self.root.join("bus/pci/devices").join(address));
        write(&path, "vendor", &format!("{:#06x}", ids.0));
        write(&path, "device", &format!("{:#06x}", ids.1));
        write(&path, "class", &format!("{class:#08x}"));
        write(&path, "numa_node", &numa.to_string());
        path
    }

    /// Adds a port and its virtual functions.
    pub fn port(&mut self, port: &Port<'_>) {
        let (vendor, device, vf_device) = port.ids;
        let own: PciAddress = port.address.parse().expect("an address");
        let path = self.device(port.address, port.bridges, (vendor, device), 0x02_0000, port.numa);
        write(&path, "sriov_totalvfs", &port.total_vfs.to_string());
        write(&path, "sriov_numvfs", &port.vfs.to_string());
        write(&path, "sriov_offset", &port.routing.0.to_string());
        write(&path, "sriov_stride", &port.routing.1.to_string());
        write(&path, "sriov_vf_device", &format!("{vf_device:x}"));
        write(&path, "sriov_drivers_autoprobe", "1");
        self.bind(&path, port.driver);
        let name = port.switch_id.map(|_| "p0".to_owned());
        self.netdev(&path, port.netdev, name.as_deref(), port.switch_id);
        if let Some(rdma) = port.rdma {
            self.rdma(&path, &format!("{rdma}0"), 0);
        }
        for index in 0..port.vfs {
            let address = own.further(port.routing.0 + u32::from(index) * port.routing.1).expect("a bus").to_string();
            let vf = self.device(&address, port.bridges, (vendor, vf_device), 0x02_0000, port.numa);
            link(&Path::new("..").join(&address), &path.join(format!("virtfn{index}")));
            link(&Path::new("..").join(port.address), &vf.join("physfn"));
            self.groups += 1;
            let group = self.root.join("kernel/iommu_groups").join(self.groups.to_string());
            fs::create_dir(&group).expect("to make a directory");
            link(&relative(&vf, &group), &vf.join("iommu_group"));
            match port.vf {
                VfOf::Nobody => {}
                VfOf::UserSpace(driver) => self.bind(&vf, driver),
                VfOf::Kernel(driver) => {
                    self.bind(&vf, driver);
                    self.netdev(&vf, &format!("{}v{index}", port.netdev), None, None);
                    if let Some(rdma) = port.rdma {
                        self.rdma(&vf, &format!("{rdma}{}", index + 1), u32::from(index) + 1);
                    }
                }
            }
            if port.switch_id.is_some() {
                let name = format!("{}_{index}", port.netdev);
                self.netdev(&path, &name, Some(&format!("pf0vf{index}")), port.switch_id);
            }
        }
    }

    fn bind(&self, function: &Path, driver: &str) {
        let directory = self.root.join("bus/pci/drivers").join(driver);
        fs::create_dir_all(&directory).expect("to make a directory");
        link(&relative(function, &directory), &function.join("driver"));
    }

    /// Adds a network device to a function.
    pub fn netdev(&mut self, function: &Path, name: &str, port_name: Option<&str>, switch_id: Option<&str>) {
        self.netdevs += 1;
        let path = function.join("net").join(name);
        fs::create_dir_all(&path).expect("to make a directory");
        write(&path, "ifindex", &self.netdevs.to_string());
        write(&path, "address", &format!("52:54:00:00:{:02x}:{:02x}", self.netdevs >> 8, self.netdevs & 0xff));
        write(&path, "type", "1");
        write(&path, "dev_port", "0");
        if let Some(port_name) = port_name {
            write(&path, "phys_port_name", port_name);
        }
        if let Some(switch_id) = switch_id {
            write(&path, "phys_switch_id", switch_id);
        }
        link(&relative(&self.root.join("class/net"), &path), &self.root.join("class/net").join(name));
    }

    fn rdma(&self, function: &Path, name: &str, number: u32) {
        for directory in [
            format!("infiniband/{name}"),
            format!("infiniband_verbs/uverbs{number}"),
            format!("infiniband_mad/umad{number}"),
            format!("infiniband_mad/issm{number}"),
        ] {
            fs::create_dir_all(function.join(directory)).expect("to make a directory");
        }
    }
}

fn write(directory: &Path, name: &str, value: &str) {
    fs::write(directory.join(name), format!("{value}\n")).expect("to write a file");
}

fn link(target: &Path, at: &Path) {
    symlink(target, at).expect("to make a link");
}

/// The way from one directory to another, both below one root.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| "..");
    up.chain(to.components().skip(shared).map(|part| part.as_os_str().to_str().expect("text"))).collect()
}
