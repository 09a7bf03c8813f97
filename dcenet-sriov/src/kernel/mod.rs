//! What is asked of the kernel about virtual functions: one trait, so that all else runs on a model too.
//!
//! A virtual function has two sides. Its *port* (the physical function's driver) keeps settings that the function cannot
//! change: [`VfState`], written by [`VfChange`]. Its *network device* has what every device has: [`NetdevState`], written
//! by [`NetdevChange`], and lives in one namespace at a time.
//!
//! Calls are single: nothing here orders, repeats or undoes. A port's settings are read and written by the index of its
//! network device in the host's namespace, because names change; a function's devices are found by its PCI address.

mod error;
mod linux;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use dcenet_core::model::{IfIndex, IfName, MacAddr, Mtu};
pub use dcenet_core::netlink::{
    Guid, LinkCounters, Traffic, VfChange, VfGuids, VfLinkState, VfRate, VfView as VfState, VfVlan, VlanProtocol,
};
use dcenet_core::netns::NetNsId;
use serde::{Deserialize, Serialize};

pub use error::{Attribute, ErrorClass, KernelError};
pub use linux::LinuxKernel;

use crate::address::{PciAddress, VfIndex};

/// A kernel with virtual functions: Linux, or a model of it.
///
/// Every call is synchronous and takes effect, or fails, as a whole, except where it says otherwise. The suite for
/// implementations is `test_support::conformance`.
///
/// Bed: igb, netdevsim; modelled with other drivers' quirks. See [`LinuxKernel`].
pub trait Kernel: fmt::Debug + Send + Sync {
    /// What the port says of all of its functions, in the order of their indices. An index may be missing: drivers
    /// withhold functions that are being reset.
    ///
    /// The kernel asks the driver for each function under the lock of all links: not for routine look-ups.
    ///
    /// # Errors
    /// [`ErrorClass::Incomplete`] where the list cannot be read to its end; never a part of it.
    fn vfs(&self, port: IfIndex) -> Result<Vec<(VfIndex, VfState)>, KernelError>;

    /// What the port says of one function. As expensive as [`vfs`](Self::vfs).
    ///
    /// # Errors
    /// [`ErrorClass::NotReported`] where it is not in the list.
    fn vf(&self, port: IfIndex, vf: VfIndex) -> Result<VfState, KernelError> {
        let all = self.vfs(port)?;
        let operation = || format!("look up VF {vf} of link {port}");
        all.into_iter()
            .find_map(|(index, state)| (index == vf).then_some(state))
            .ok_or_else(|| KernelError::of_class(operation(), ErrorClass::NotReported))
    }

    /// What the port's driver counted of each of its functions, as [`vfs`](Self::vfs) lists them and as expensive. A driver
    /// that counts nothing says zeros: igb and netdevsim do.
    ///
    /// # Errors
    /// As of [`vfs`](Self::vfs).
    fn vf_counters(&self, port: IfIndex) -> Result<Vec<(VfIndex, LinkCounters)>, KernelError>;

    /// What a function's network device counted in a namespace; `None` where it has none there.
    ///
    /// # Errors
    /// [`ErrorClass::NamespaceGone`].
    ///
    /// # Minimum kernel version
    /// 5.14 (`IFLA_PARENT_DEV_NAME`).
    fn netdev_counters(&self, at: &Namespace, function: PciAddress) -> Result<Option<LinkCounters>, KernelError>;

    /// Has the port change the settings of a function, by one message. Where nothing is to be changed none is sent.
    ///
    /// # Errors
    /// The kernel does not undo what it did before it met a refusal: on any error read the state, and write back what was
    /// before. It goes by this order: address, VLAN, rates, spoof check, link state, RSS query, trust, GUIDs
    /// (`do_setvfinfo` in net/core/rtnetlink.c). `attribute` names what was refused where it can be told.
    fn configure_vf(&self, port: IfIndex, vf: VfIndex, change: &VfChange) -> Result<(), KernelError>;

    /// The network devices of a function in a namespace; empty where it has none there.
    ///
    /// # Errors
    /// [`ErrorClass::NamespaceGone`].
    ///
    /// # Minimum kernel version
    /// 5.14 for namespaces other than the host's (`IFLA_PARENT_DEV_NAME`).
    fn netdevs(&self, at: &Namespace, function: PciAddress) -> Result<Vec<NetdevState>, KernelError>;

    /// The indices of a function's network devices in the host's namespace, as [`netdevs`](Self::netdevs) would tell.
    fn indices(&self, function: PciAddress) -> Result<Vec<IfIndex>, KernelError> {
        Ok(self.netdevs(&Namespace::Host, function)?.into_iter().map(|device| device.index).collect())
    }

    /// Whether the function has a network device in any namespace, also in one that nobody can look into.
    fn has_netdev(&self, function: PciAddress) -> Result<bool, KernelError>;

    /// A network device by its index in a namespace; `None` where there is none.
    fn netdev(&self, at: &Namespace, index: IfIndex) -> Result<Option<NetdevState>, KernelError>;

    /// Changes a network device, by one message. Where nothing is to be changed none is sent.
    ///
    /// # Errors
    /// As [`configure_vf`](Self::configure_vf), what came before the refusal stays done. A device that is up cannot be
    /// renamed before Linux 6.3 (`EBUSY`).
    fn configure_netdev(&self, at: &Namespace, index: IfIndex, change: &NetdevChange) -> Result<(), KernelError>;

    /// Moves a network device to another namespace, where it is called `name` and is down, unless the change says up. The
    /// changes are made there, in the same message. Its index changes where it is taken there: find it by the function.
    ///
    /// # Errors
    /// [`ErrorClass::Exists`] where names are taken there. It has moved and kept its name where `name` alone is; it has not
    /// moved where its own name is, too, or one of its alternative names (`__dev_change_net_namespace` in net/core/dev.c).
    fn move_netdev(
        &self,
        from: &Namespace,
        index: IfIndex,
        to: &Namespace,
        name: &IfName,
        change: &NetdevChange,
    ) -> Result<(), KernelError>;

    /// Gives a network device another alternative name (`RTM_NEWLINKPROP`; Linux 5.5). Such names are up to 127 bytes.
    fn add_alternative_name(&self, at: &Namespace, index: IfIndex, name: &str) -> Result<(), KernelError>;

    /// Takes an alternative name away. One that it has not is [`ErrorClass::Gone`] or [`ErrorClass::Invalid`].
    fn delete_alternative_name(&self, at: &Namespace, index: IfIndex, name: &str) -> Result<(), KernelError>;

    /// What identifies a namespace while it lives; `None` where it is gone.
    fn namespace_id(&self, at: &Namespace) -> Result<Option<NetNsId>, KernelError>;

    /// What drives a function.
    fn driver(&self, function: PciAddress) -> Result<DriverState, KernelError>;

    /// Binds a function that has no driver to this one. Its network device appears in the host's namespace, some time
    /// later.
    ///
    /// # Errors
    /// [`ErrorClass::Gone`] where the driver is not loaded or does not take the function.
    fn bind(&self, function: PciAddress, driver: &str) -> Result<(), KernelError>;

    /// Takes a function away from its driver. Its network device vanishes, wherever it is.
    ///
    /// # Errors
    /// [`ErrorClass::Gone`] where it has no driver; [`ErrorClass::Busy`] where a program has its VFIO group open, for the
    /// kernel would wait until that lets it go (`vfio_unregister_group_dev` in drivers/vfio/vfio_main.c).
    fn unbind(&self, function: PciAddress) -> Result<(), KernelError>;

    /// Has the function be taken by this driver only (`driver_override`), or, with `None`, by any that knows it. It changes
    /// nothing until the next binding.
    fn set_driver_override(&self, function: PciAddress, driver: Option<&str>) -> Result<(), KernelError>;

    /// The IOMMU group of a function; `None` where it has none, as without an IOMMU or where VFIO made up the group for
    /// want of one (`vfio_noiommu_group_alloc` in drivers/vfio/group.c).
    fn iommu_group(&self, function: PciAddress) -> Result<Option<IommuGroup>, KernelError>;

    /// How many functions a port has.
    fn vf_count(&self, port: PciAddress) -> Result<VfCount, KernelError>;

    /// Writes `sriov_numvfs`. The kernel changes no count but from or to 0 (`sriov_numvfs_store` in drivers/pci/pci-sysfs.c).
    fn write_vf_count(&self, port: PciAddress, count: u16) -> Result<(), KernelError>;

    /// Writes `sriov_drivers_autoprobe` (Linux 4.12).
    fn write_autoprobe(&self, port: PciAddress, autoprobe: bool) -> Result<(), KernelError>;

    /// The addresses of a port's functions (`virtfnN`), in the order of their indices.
    fn vf_addresses(&self, port: PciAddress) -> Result<Vec<(VfIndex, PciAddress)>, KernelError>;

    /// The address of one of them; `None` where the port has no such function.
    fn vf_address(&self, port: PciAddress, vf: VfIndex) -> Result<Option<PciAddress>, KernelError> {
        Ok(self.vf_addresses(port)?.into_iter().find_map(|(index, address)| (index == vf).then_some(address)))
    }

    /// Has a thread work in the host's namespace: the calling one where it is there, else another.
    ///
    /// # Errors
    /// Where the namespace cannot be entered. Nothing was done then.
    fn in_host(&self, work: &mut (dyn FnMut() + Send)) -> Result<(), KernelError>;

    /// Begins to watch for devices that come, go or change.
    fn watch(&self) -> Result<Box<dyn Watch + '_>, KernelError>;
}

/// Tells that something may have changed among the devices since it was made.
pub trait Watch {
    /// Waits until something has, at most for `limit`, and returns whether something has. What changed, the caller looks
    /// up. Called again, it waits for the next change. False may come early: look whether the time is over.
    fn wait(&mut self, limit: Duration) -> Result<bool, KernelError>;
}

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Namespace {
    /// The host's: that of the ports.
    Host,
    /// The one at a path such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    Path(PathBuf),
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host's namespace"),
            Self::Path(path) => write!(f, "namespace {}", path.display()),
        }
    }
}

/// A network device as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetdevState {
    /// Its index in its namespace.
    pub index: IfIndex,
    /// Its name.
    pub name: IfName,
    /// Its alternative names, sorted (Linux 5.5).
    pub alternative_names: Vec<String>,
    /// Its alias; `None` is none.
    pub alias: Option<String>,
    /// The effective Ethernet address; `None` on other links.
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up, as its administrator wants it.
    pub up: bool,
    /// Whether its administrator has it receive all frames. A program's packet socket does not count.
    pub promisc: bool,
    /// Whether its administrator has it receive all multicast frames.
    pub all_multicast: bool,
}

/// What is to be changed of a network device. What is `None` is not touched.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetdevChange {
    /// Its name.
    pub name: Option<IfName>,
    /// Its alias; an empty one takes it away.
    pub alias: Option<String>,
    /// The effective Ethernet address.
    pub mac: Option<MacAddr>,
    /// Its MTU.
    pub mtu: Option<Mtu>,
    /// See [`NetdevState::promisc`].
    pub promisc: Option<bool>,
    /// See [`NetdevState::all_multicast`].
    pub all_multicast: Option<bool>,
    /// Whether it is up.
    pub up: Option<bool>,
}

impl NetdevChange {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What drives a function.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DriverState {
    /// Its driver; `None` where it has none.
    pub driver: Option<String>,
    /// The only driver that may take it (`driver_override`); `None` where any may.
    pub driver_override: Option<String>,
}

/// Functions that the IOMMU cannot tell apart: who drives one of them can reach what the others reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuGroup {
    /// Its number, which another boot may change.
    pub number: u32,
    /// Its functions, sorted.
    pub functions: Vec<PciAddress>,
}

impl IommuGroup {
    /// What a program opens to drive a function of it (Documentation/driver-api/vfio.rst).
    ///
    /// Bed: igb, behind QEMU's IOMMU.
    pub fn files(&self) -> [PathBuf; 2] {
        [PathBuf::from(VFIO).join("vfio"), PathBuf::from(VFIO).join(self.number.to_string())]
    }
}

/// Where VFIO's files are.
pub(crate) const VFIO: &str = "/dev/vfio";

/// How many functions a port has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VfCount {
    /// How many it can have (`sriov_totalvfs`).
    pub total: u16,
    /// How many it has (`sriov_numvfs`).
    pub now: u16,
    /// Whether drivers are bound to new ones (`sriov_drivers_autoprobe`).
    pub autoprobe: bool,
}

/// What a change asks for, in the kernel's order.
pub(crate) fn asked(change: &VfChange) -> Vec<Attribute> {
    let VfChange { mac, vlan, rate, spoofchk, link_state, rss_query, trust, node_guid, port_guid } = change;
    let said = [
        (mac.is_some(), Attribute::Mac),
        (vlan.is_some_and(|vlan| vlan.protocol != VlanProtocol::Dot1Q), Attribute::Protocol),
        (vlan.is_some_and(|vlan| vlan.protocol == VlanProtocol::Dot1Q), Attribute::Vlan),
        (rate.is_some_and(|rate| rate.min != 0), Attribute::MinRate),
        (rate.is_some_and(|rate| rate.min == 0), Attribute::MaxRate),
        (spoofchk.is_some(), Attribute::Spoofchk),
        (link_state.is_some(), Attribute::LinkState),
        (rss_query.is_some(), Attribute::RssQuery),
        (trust.is_some(), Attribute::Trust),
        (node_guid.is_some(), Attribute::NodeGuid),
        (port_guid.is_some(), Attribute::PortGuid),
    ];
    said.into_iter().filter_map(|(set, attribute)| set.then_some(attribute)).collect()
}
