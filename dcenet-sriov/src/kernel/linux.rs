//! Linux: settings and devices by netlink, drivers and counts by sysfs.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use dcenet_core::model::{IfIndex, IfName};
use dcenet_core::netlink::{Failure, Family, LinkDetail, LinkSettings, NetlinkError, Socket, Uevents, VfListError};
use dcenet_core::netns::{NetNs, NetNsError, NetNsId};

use super::{
    Attribute, DriverState, ErrorClass, IommuGroup, Kernel, KernelError, LinkCounters, Namespace, NetdevChange,
    NetdevState, VfChange, VfCount, VfState, Watch, asked,
};
use crate::address::{PciAddress, VfIndex};
use crate::sysfs::{Sysfs, SysfsDir, function};

/// The running kernel.
///
/// The host's namespace is that which it is made with, and sysfs must show that one's devices: it does where it was
/// mounted there.
///
/// Bed: igb, all of it on Linux 6.1, and netdevsim, for the settings and lists that igb has not. Not tried: InfiniBand GUIDs.
#[derive(Debug)]
pub struct LinuxKernel<S = SysfsDir> {
    host: NetNs,
    sysfs: S,
    socket: Mutex<Option<Socket>>,
}

impl LinuxKernel {
    /// The kernel, seen from the calling thread's network namespace.
    ///
    /// # Errors
    /// Where `/proc` does not tell that namespace.
    pub fn of_this_thread() -> Result<Self, NetNsError> {
        Ok(Self::new(NetNs::of_this_thread()?, SysfsDir::system()))
    }
}

impl<S: Sysfs> LinuxKernel<S> {
    /// The kernel, with this namespace as the host's.
    pub fn new(host: NetNs, sysfs: S) -> Self {
        Self { host, sysfs, socket: Mutex::new(None) }
    }

    fn open(&self, at: &Namespace, operation: &str) -> Result<NetNs, KernelError> {
        let Namespace::Path(path) = at else { return Err(KernelError::of_class(operation, ErrorClass::Other)) };
        NetNs::open(path).map_err(|error| of_namespace(operation, &error))
    }

    /// Asks in a namespace. The host's socket is kept; one of another would keep a dead pod's namespace alive.
    fn ask<T>(
        &self,
        at: &Namespace,
        operation: &str,
        ask: impl FnOnce(&mut Socket) -> Result<T, KernelError>,
    ) -> Result<T, KernelError> {
        let open = |netns: &NetNs| netns.socket(Family::Route).map_err(|error| of_namespace(operation, &error));
        match at {
            Namespace::Host => {
                let mut kept = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
                let mut socket = match kept.take() {
                    Some(socket) => socket,
                    None => open(&self.host)?,
                };
                let answer = ask(&mut socket);
                // After a lost reply the next one read could be that.
                if !answer.as_ref().is_err_and(KernelError::may_have_happened) {
                    *kept = Some(socket);
                }
                answer
            }
            Namespace::Path(_) => ask(&mut open(&self.open(at, operation)?)?),
        }
    }

    fn read(&self, path: &Path, operation: &str) -> Result<String, KernelError> {
        self.sysfs.read(path).map_err(|error| of_file(operation, path, &error))
    }

    fn write(&self, path: &Path, value: &str, operation: &str) -> Result<(), KernelError> {
        self.sysfs.write(path, value).map_err(|error| of_file(operation, path, &error))
    }

    /// The function to which a link of sysfs leads, if there is one.
    fn behind(&self, link: &Path, operation: &str) -> Result<Option<PciAddress>, KernelError> {
        let target: PathBuf = match self.sysfs.link(link) {
            Ok(target) => target,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(of_file(operation, link, &error)),
        };
        let address = target.file_name().and_then(|name| name.to_str()?.parse().ok());
        let said = || format!("{} leads to {}, which is no PCI function", link.display(), target.display());
        address.ok_or_else(|| KernelError::of_class(operation, ErrorClass::Other).saying(said())).map(Some)
    }

    /// Refuses where a program has the group of a function open that a driver of VFIO has.
    fn refuse_where_open(&self, function: PciAddress, operation: &str) -> Result<(), KernelError> {
        let of_vfio = self.driver(function)?.driver.is_some_and(|driver| crate::inventory::is_vfio(&driver));
        let Some(group) = (if of_vfio { self.iommu_group(function)? } else { None }) else { return Ok(()) };
        let [_, file] = group.files();
        match std::fs::OpenOptions::new().read(true).write(true).open(&file) {
            // One process at a time has it (`vfio_group_fops_open` in drivers/vfio/group.c).
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let said = format!("a program has {} open", file.display());
                Err(KernelError::refused(operation, libc::EBUSY).saying(said))
            }
            // Where it cannot be looked at, as in a container without it, the kernel decides.
            _ => Ok(()),
        }
    }

    fn count(&self, port: PciAddress, name: &str, operation: &str) -> Result<u16, KernelError> {
        let text = self.read(&function(port).join(name), operation)?;
        let said = || format!("{name} says {text:?}, which is no number of functions");
        text.parse().map_err(|_| KernelError::of_class(operation, ErrorClass::Other).saying(said()))
    }
}

impl<S: Sysfs> Kernel for LinuxKernel<S> {
    fn vfs(&self, port: IfIndex) -> Result<Vec<(VfIndex, VfState)>, KernelError> {
        let operation = format!("list VFs of link {port}");
        let list = |socket: &mut Socket| socket.vfs(port).map_err(|error| of_list(&operation, error));
        Ok(indexed(self.ask(&Namespace::Host, &operation, list)?))
    }

    fn vf_counters(&self, port: IfIndex) -> Result<Vec<(VfIndex, LinkCounters)>, KernelError> {
        let operation = format!("read counters of VFs of link {port}");
        let list = |socket: &mut Socket| socket.vf_counters(port).map_err(|error| of_list(&operation, error));
        Ok(indexed(self.ask(&Namespace::Host, &operation, list)?))
    }

    fn netdev_counters(&self, at: &Namespace, function: PciAddress) -> Result<Option<LinkCounters>, KernelError> {
        let operation = format!("read counters of {function} in {at}");
        let wanted = function.to_string();
        let own = |(detail, _): &(LinkDetail, LinkCounters)| is_of(detail, &wanted);
        let list = |socket: &mut Socket| socket.link_counters().map_err(|error| of_netlink(&operation, error));
        let all = self.ask(at, &operation, list)?.into_iter().filter(own);
        Ok(all.min_by_key(|(detail, _)| detail.link.index).map(|(_, counters)| counters))
    }

    fn configure_vf(&self, port: IfIndex, vf: VfIndex, change: &VfChange) -> Result<(), KernelError> {
        if change.is_empty() {
            return Ok(());
        }
        let operation = format!("configure VF {vf} of link {port}");
        let set = |socket: &mut Socket| {
            socket.set_vf(port, u32::from(vf.0), change).map_err(|error| of_netlink(&operation, error))
        };
        let error = match self.ask(&Namespace::Host, &operation, set) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        // The kernel stops at what it refuses, and does not say what that was.
        let known = match &asked(change)[..] {
            [only] => Some(*only),
            _ if error.errno.is_some() => self.vf(port, vf).ok().and_then(|now| first_missing(change, &now)),
            _ => None,
        };
        Err(KernelError { attribute: known, ..error })
    }

    fn netdevs(&self, at: &Namespace, function: PciAddress) -> Result<Vec<NetdevState>, KernelError> {
        let operation = format!("look for devices of {function} in {at}");
        let wanted = function.to_string();
        let failed = |error| of_netlink(&operation, error);
        let found = match at {
            // A host has many links, and sysfs tells which of them to ask for.
            Namespace::Host => {
                let mut found = Vec::new();
                for index in self.indices(function)? {
                    found.extend(self.ask(at, &operation, |socket| socket.link_detail(index).map_err(failed))?);
                }
                found
            }
            Namespace::Path(_) => {
                let all = self.ask(at, &operation, |socket| socket.link_details().map_err(failed))?;
                all.into_iter().filter(|detail| is_of(detail, &wanted)).collect()
            }
        };
        found.iter().map(|detail| state(detail, &operation)).collect()
    }

    fn indices(&self, function: PciAddress) -> Result<Vec<IfIndex>, KernelError> {
        let operation = format!("look for devices of {function}");
        let directory = crate::sysfs::function(function).join("net");
        let names = match self.sysfs.list(&directory) {
            Ok(names) => names,
            Err(error) if is_absent(&error) => Vec::new(),
            Err(error) => return Err(of_file(&operation, &directory, &error)),
        };
        let mut found = Vec::new();
        for name in names {
            match self.sysfs.read(&directory.join(name).join("ifindex")) {
                Ok(index) => found.extend(index.parse().ok().and_then(IfIndex::new)),
                // It went, or was renamed, meanwhile.
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(of_file(&operation, &directory, &error)),
            }
        }
        Ok(found)
    }

    fn has_netdev(&self, function: PciAddress) -> Result<bool, KernelError> {
        // The directory is there as long as any device is (`cleanup_glue_dir` in drivers/base/core.c); only what is in it is
        // seen by namespace.
        let directory = crate::sysfs::function(function).join("net");
        match self.sysfs.list(&directory) {
            Ok(_) => Ok(true),
            Err(error) if is_absent(&error) => Ok(false),
            Err(error) => Err(of_file(&format!("look for any device of {function}"), &directory, &error)),
        }
    }

    fn netdev(&self, at: &Namespace, index: IfIndex) -> Result<Option<NetdevState>, KernelError> {
        let operation = format!("look up link {index} in {at}");
        let look = |socket: &mut Socket| socket.link_detail(index).map_err(|error| of_netlink(&operation, error));
        self.ask(at, &operation, look)?.map(|detail| state(&detail, &operation)).transpose()
    }

    fn configure_netdev(&self, at: &Namespace, index: IfIndex, change: &NetdevChange) -> Result<(), KernelError> {
        if change.is_empty() {
            return Ok(());
        }
        let operation = format!("configure link {index} in {at}");
        let settings = settings(change);
        let set =
            |socket: &mut Socket| socket.change_link(index, &settings).map_err(|error| of_netlink(&operation, error));
        self.ask(at, &operation, set).map_err(|error| self.name_refused(error, at, index, change))
    }

    fn move_netdev(
        &self,
        from: &Namespace,
        index: IfIndex,
        to: &Namespace,
        name: &IfName,
        change: &NetdevChange,
    ) -> Result<(), KernelError> {
        let operation = format!("move link {index} from {from} to {to} as {name}");
        let opened;
        let target = match to {
            Namespace::Host => &self.host,
            Namespace::Path(_) => {
                opened = self.open(to, &operation)?;
                &opened
            }
        };
        let settings = LinkSettings { netns: Some(target), name: Some(name), ..settings(change) };
        let set =
            |socket: &mut Socket| socket.change_link(index, &settings).map_err(|error| of_netlink(&operation, error));
        self.ask(from, &operation, set).map_err(|error| self.name_refused(error, to, index, change))
    }

    fn add_alternative_name(&self, at: &Namespace, index: IfIndex, name: &str) -> Result<(), KernelError> {
        let operation = format!("add alternative name {name} to link {index} in {at}");
        let add = |socket: &mut Socket| {
            socket.add_alternative_name(index, name).map_err(|error| of_netlink(&operation, error))
        };
        self.ask(at, &operation, add)
    }

    fn delete_alternative_name(&self, at: &Namespace, index: IfIndex, name: &str) -> Result<(), KernelError> {
        let operation = format!("delete alternative name {name} of link {index} in {at}");
        let delete = |socket: &mut Socket| {
            socket.delete_alternative_name(index, name).map_err(|error| of_netlink(&operation, error))
        };
        self.ask(at, &operation, delete)
    }

    fn namespace_id(&self, at: &Namespace) -> Result<Option<NetNsId>, KernelError> {
        let Namespace::Path(path) = at else { return Ok(Some(self.host.id())) };
        match NetNs::open(path) {
            Ok(netns) => Ok(Some(netns.id())),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(of_namespace(&format!("identify {at}"), &error)),
        }
    }

    fn driver(&self, function: PciAddress) -> Result<DriverState, KernelError> {
        let operation = format!("look up the driver of {function}");
        let directory = crate::sysfs::function(function);
        // The kernel writes `(null)` where there is none (`driver_override_show` in drivers/pci/pci-sysfs.c).
        let path = directory.join("driver_override");
        let driver_override = Some(self.read(&path, &operation)?).filter(|name| name != "(null)" && !name.is_empty());
        let path = directory.join("driver");
        let driver = match self.sysfs.link(&path) {
            Ok(target) => target.file_name().map(|name| name.to_string_lossy().into_owned()),
            Err(error) if is_absent(&error) => None,
            Err(error) => return Err(of_file(&operation, &path, &error)),
        };
        Ok(DriverState { driver, driver_override })
    }

    fn bind(&self, function: PciAddress, driver: &str) -> Result<(), KernelError> {
        let operation = format!("bind {function} to {driver}");
        let path = Path::new(DRIVERS).join(driver).join("bind");
        self.write(&path, &function.to_string(), &operation)
    }

    fn unbind(&self, function: PciAddress) -> Result<(), KernelError> {
        let operation = format!("unbind {function}");
        self.refuse_where_open(function, &operation)?;
        let path = crate::sysfs::function(function).join("driver/unbind");
        self.write(&path, &function.to_string(), &operation)
    }

    fn set_driver_override(&self, function: PciAddress, driver: Option<&str>) -> Result<(), KernelError> {
        let operation = format!("set the driver override of {function}");
        // A line without a name takes it away (Documentation/ABI/testing/sysfs-bus-pci).
        let path = crate::sysfs::function(function).join("driver_override");
        self.write(&path, driver.unwrap_or("\n"), &operation)
    }

    fn iommu_group(&self, function: PciAddress) -> Result<Option<IommuGroup>, KernelError> {
        let operation = format!("look up the IOMMU group of {function}");
        let path = crate::sysfs::function(function).join("iommu_group");
        let number = match self.sysfs.link(&path) {
            Ok(target) => target.file_name().and_then(|name| name.to_str()?.parse().ok()),
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(of_file(&operation, &path, &error)),
        };
        let Some(number) = number else {
            return Err(KernelError::of_class(operation, ErrorClass::Other).saying("its group has no number"));
        };
        // Few groups have a name.
        match self.sysfs.read(&path.join("name")) {
            Ok(name) if name == "vfio-noiommu" => return Ok(None),
            Ok(_) => {}
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(of_file(&operation, &path, &error)),
        }
        let devices = path.join("devices");
        let names = self.sysfs.list(&devices).map_err(|error| of_file(&operation, &devices, &error))?;
        let mut functions: Vec<PciAddress> = names.iter().filter_map(|name| name.parse().ok()).collect();
        functions.sort_unstable();
        Ok(Some(IommuGroup { number, functions }))
    }

    fn vf_count(&self, port: PciAddress) -> Result<VfCount, KernelError> {
        let operation = format!("look up the VF count of {port}");
        let total = self.count(port, "sriov_totalvfs", &operation)?;
        let now = self.count(port, "sriov_numvfs", &operation)?;
        let path = function(port).join(AUTOPROBE);
        let autoprobe = match self.sysfs.read(&path) {
            Ok(text) => text != "0",
            // Before Linux 4.12 always.
            Err(error) if is_absent(&error) => true,
            Err(error) => return Err(of_file(&operation, &path, &error)),
        };
        Ok(VfCount { total, now, autoprobe })
    }

    fn write_vf_count(&self, port: PciAddress, count: u16) -> Result<(), KernelError> {
        let operation = format!("set the VF count of {port} to {count}");
        let path = function(port).join("sriov_numvfs");
        // Its errnos tell of the driver; whether the port is there was looked up before.
        self.sysfs.write(&path, &count.to_string()).map_err(|error| KernelError::io(operation, &error))
    }

    fn write_autoprobe(&self, port: PciAddress, autoprobe: bool) -> Result<(), KernelError> {
        let operation = format!("set autoprobe of {port}");
        self.write(&function(port).join(AUTOPROBE), if autoprobe { "1" } else { "0" }, &operation)
    }

    fn vf_addresses(&self, port: PciAddress) -> Result<Vec<(VfIndex, PciAddress)>, KernelError> {
        let operation = format!("list the VFs of {port}");
        let directory = function(port);
        let names = self.sysfs.list(&directory).map_err(|error| of_file(&operation, &directory, &error))?;
        let mut all = Vec::new();
        for name in names {
            let Some(index) = name.strip_prefix("virtfn").and_then(|n| n.parse().ok()) else { continue };
            all.extend(self.behind(&directory.join(&name), &operation)?.map(|address| (VfIndex(index), address)));
        }
        all.sort_unstable();
        Ok(all)
    }

    fn vf_address(&self, port: PciAddress, vf: VfIndex) -> Result<Option<PciAddress>, KernelError> {
        self.behind(&function(port).join(format!("virtfn{vf}")), &format!("look for VF {vf} of {port}"))
    }

    fn in_host(&self, work: &mut (dyn FnMut() + Send)) -> Result<(), KernelError> {
        let operation = "work in the host's namespace";
        self.host.run_here_or_there(work).map_err(|error| of_namespace(operation, &error))
    }

    fn watch(&self) -> Result<Box<dyn Watch + '_>, KernelError> {
        let events = Uevents::listen(&self.host).map_err(|error| of_namespace("watch devices", &error))?;
        Ok(Box::new(LinuxWatch(events)))
    }
}

impl<S: Sysfs> LinuxKernel<S> {
    /// Names what was refused of several changes: the first that is not made.
    fn name_refused(&self, error: KernelError, at: &Namespace, index: IfIndex, change: &NetdevChange) -> KernelError {
        if error.errno.is_none() || matches!(error.class, ErrorClass::Gone | ErrorClass::Exists) {
            return error;
        }
        let Ok(Some(now)) = self.netdev(at, index) else { return error };
        let attribute = if change.mac.is_some_and(|mac| now.mac != Some(mac)) {
            Some(Attribute::EffectiveMac)
        } else if change.mtu.is_some_and(|mtu| now.mtu != mtu.get()) {
            Some(Attribute::Mtu)
        } else {
            None
        };
        KernelError { attribute, ..error }
    }
}

struct LinuxWatch(Uevents);

impl Watch for LinuxWatch {
    fn wait(&mut self, limit: Duration) -> Result<bool, KernelError> {
        self.0.wait(limit).map_err(|error| of_netlink("wait for device events", error))
    }
}

/// Whether a link is of the PCI function with this address.
fn is_of(detail: &LinkDetail, function: &str) -> bool {
    detail.parent.as_ref().is_some_and(|(bus, name)| bus == "pci" && name == function)
}

/// A port has at most 65,535 (PCI Express Base Specification, 9.3.3.5: TotalVFs).
fn indexed<T>(all: Vec<(u32, T)>) -> Vec<(VfIndex, T)> {
    all.into_iter().filter_map(|(n, of)| Some((VfIndex(u16::try_from(n).ok()?), of))).collect()
}

fn settings(change: &NetdevChange) -> LinkSettings<'_> {
    let NetdevChange { name, alias, mac, mtu, promisc, all_multicast, up } = change;
    LinkSettings {
        netns: None,
        name: name.as_ref(),
        alias: alias.as_deref(),
        mac: *mac,
        mtu: *mtu,
        promisc: *promisc,
        allmulti: *all_multicast,
        up: *up,
    }
}

fn state(detail: &LinkDetail, operation: &str) -> Result<NetdevState, KernelError> {
    let LinkDetail { link, alternative_names, .. } = detail;
    let name = link.name.parse();
    let name = name.map_err(|error: dcenet_core::model::ParseError| {
        KernelError::of_class(operation, ErrorClass::Other).saying(error.to_string())
    })?;
    Ok(NetdevState {
        index: link.index,
        name,
        alternative_names: alternative_names.clone(),
        alias: link.alias.clone().filter(|alias| !alias.is_empty()),
        mac: link.mac,
        mtu: link.mtu,
        up: link.is_up(),
        promisc: link.flags & libc::IFF_PROMISC as u32 != 0,
        all_multicast: link.flags & libc::IFF_ALLMULTI as u32 != 0,
    })
}

/// The first that is asked for and is not so, in the kernel's order.
fn first_missing(change: &VfChange, now: &VfState) -> Option<Attribute> {
    asked(change).into_iter().find(|attribute| match attribute {
        Attribute::Mac => change.mac != Some(now.mac),
        Attribute::Vlan | Attribute::Protocol => change.vlan != Some(now.vlan),
        Attribute::MinRate | Attribute::MaxRate => change.rate != Some(now.rate),
        Attribute::Spoofchk => change.spoofchk != now.spoofchk,
        Attribute::LinkState => change.link_state != Some(now.link_state),
        Attribute::RssQuery => change.rss_query != now.rss_query,
        Attribute::Trust => change.trust != now.trust,
        Attribute::NodeGuid => change.node_guid != now.guids.map(|guids| guids.node),
        Attribute::PortGuid => change.port_guid != now.guids.map(|guids| guids.port),
        _ => false,
    })
}

fn of_netlink(operation: &str, error: NetlinkError) -> KernelError {
    match error.failure {
        Failure::Refused { errno, message, .. } => {
            KernelError { detail: message, ..KernelError::refused(operation, errno) }
        }
        Failure::Lost => KernelError::of_class(operation, ErrorClass::Lost),
        Failure::Interrupted { .. } => {
            KernelError::of_class(operation, ErrorClass::Busy).saying(error.failure.to_string())
        }
        // The request may have been read before the socket failed.
        other => KernelError::of_class(operation, ErrorClass::Lost).saying(other.to_string()),
    }
}

fn of_list(operation: &str, error: VfListError) -> KernelError {
    match error {
        VfListError::Netlink(error) if error.errno() == Some(libc::EMSGSIZE) => {
            KernelError { class: ErrorClass::Incomplete, ..of_netlink(operation, error) }
        }
        VfListError::Netlink(error) => of_netlink(operation, error),
        error => KernelError::of_class(operation, ErrorClass::Incomplete).saying(error.to_string()),
    }
}

fn of_namespace(operation: &str, error: &NetNsError) -> KernelError {
    let class = if error.is_gone() { ErrorClass::NamespaceGone } else { ErrorClass::Other };
    KernelError::of_class(operation, class).saying(error.to_string())
}

fn of_file(operation: &str, path: &Path, error: &io::Error) -> KernelError {
    KernelError::io(operation, error).saying(path.display().to_string())
}

fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOTDIR))
}

const AUTOPROBE: &str = "sriov_drivers_autoprobe";
/// The directory of all drivers of PCI functions.
const DRIVERS: &str = "bus/pci/drivers";
