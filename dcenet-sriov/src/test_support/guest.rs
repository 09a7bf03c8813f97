//! The devices of a guest of `make vm-test`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dcenet_core::model::{IfIndex, IfName, MacAddr};

use crate::address::{PciAddress, VfIndex};
use crate::count::{CountRequest, set_vf_count};
use crate::inventory::Inventory;
use crate::kernel::{Kernel, LinuxKernel, Namespace, NetdevState};
use crate::lease::VfId;
use crate::sysfs::SysfsDir;

/// The first igb port of a guest, for one test at a time. It is up and has carrier, and its functions go when it is
/// dropped.
///
/// # Panics
/// Every method, where the guest has no such port or it does otherwise.
#[derive(Debug)]
pub struct IgbPort {
    /// The running kernel.
    pub kernel: Arc<LinuxKernel>,
    /// The port.
    pub address: PciAddress,
    /// Its device.
    pub index: IfIndex,
    /// Its device's name.
    pub name: IfName,
    _alone: MutexGuard<'static, ()>,
}

impl IgbPort {
    /// The port with so many functions, each with its driver and its device.
    ///
    /// It is set up first: one that is down does not answer its functions' drivers (`igbvf_probe` in
    /// drivers/net/ethernet/intel/igbvf/netdev.c).
    pub fn with(count: u16) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let inventory = Inventory::scan(&SysfsDir::system()).expect("an inventory");
        let mut ports = inventory.functions.iter().flat_map(|pf| pf.netdevs.iter().map(move |dev| (pf, dev)));
        let (pf, device) =
            ports.find(|(_, device)| device.mac == Some(FIRST)).expect("the guest has igb's ports (DEVICES=igb)");
        let port = Self {
            kernel: Arc::new(LinuxKernel::of_this_thread().expect("the kernel")),
            address: pf.address,
            index: device.index.expect("a device has an index"),
            name: device.name.parse().expect("a device has a name"),
            _alone: alone,
        };
        // Linux 6.1 falls over where the port gets an IPv6 address while its functions change: `igb_restore_vf_multicasts` in
        // drivers/net/ethernet/intel/igb/igb_main.c reads what `igb_disable_sriov` has freed.
        sh(&format!("ip link set {} addrgenmode none", port.name));
        port.set_up(true);
        port.set_count(count);
        port
    }

    /// Sets it up, and waits for its carrier; or down.
    pub fn set_up(&self, up: bool) {
        sh(&format!("ip link set {} {}", self.name, if up { "up" } else { "down" }));
        self.await_carrier();
    }

    /// Waits for its carrier, where it is up. Its driver takes the carrier away for a while when the number of functions
    /// changes (`igb_sriov_reinit` in drivers/net/ethernet/intel/igb/igb_main.c).
    fn await_carrier(&self) {
        let device = self.kernel.netdev(&Namespace::Host, self.index).expect("to look").expect("the port's device");
        let carrier = PathBuf::from(format!("/sys/class/net/{}/carrier", self.name));
        let deadline = Instant::now() + LIMIT;
        while device.up && fs::read_to_string(&carrier).map_or(true, |carrier| carrier.trim() != "1") {
            assert!(Instant::now() < deadline, "{} has no carrier", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Another number of functions, whoever has them.
    pub fn set_count(&self, count: u16) {
        let request =
            CountRequest { count, autoprobe: Some(true), user: &|_| None, even_elsewhere: true, limit: LIMIT };
        set_vf_count(&*self.kernel, self.address, &request).expect("to make functions");
        self.await_carrier();
    }

    /// One of its functions.
    pub fn vf(&self, index: u16) -> VfId {
        let all = self.kernel.vf_addresses(self.address).expect("to list functions");
        let index = VfIndex(index);
        let (_, address) = all.into_iter().find(|(found, _)| *found == index).expect("it has the function");
        VfId { address, port: self.address, index }
    }

    /// The device of a function in the host's namespace, once it is there.
    pub fn device(&self, function: PciAddress) -> NetdevState {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(device) = self.kernel.netdevs(&Namespace::Host, function).expect("to look").pop() {
                return device;
            }
            assert!(Instant::now() < deadline, "{function} has no device");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sets a function's device up and down until its driver has told the port's an address. The one that is bound while the
    /// port begins anew, as on Linux 6.1 when functions are made, speaks to nobody until then: it takes any address, and
    /// none is its port's.
    pub fn acquaint(&self, vf: VfId) {
        let name = self.device(vf.address).name;
        let deadline = Instant::now() + LIMIT;
        let told = || self.kernel.vf(self.index, vf.index).expect("to look").mac;
        while told().bytes() == [0; 6] {
            assert!(Instant::now() < deadline, "{name} does not speak to its port");
            sh(&format!("ip link set {name} up"));
            std::thread::sleep(Duration::from_millis(200));
            sh(&format!("ip link set {name} down"));
        }
    }

    /// All that iproute2 and sysfs say of a function that its owner or its tenant can change, a line each.
    pub fn told(&self, vf: VfId) -> String {
        let port = parsed(&sh(&format!("ip -j -d link show {}", self.name)));
        let mut lines: BTreeMap<String, String> = BTreeMap::new();
        for list in port[0]["vfinfo_list"].as_array().into_iter().flatten().filter(|list| list["vf"] == vf.index.0) {
            for (key, value) in list.as_object().into_iter().flatten() {
                lines.insert(format!("port {key}"), value.to_string());
            }
        }
        let device = PathBuf::from(format!("/sys/bus/pci/devices/{}", vf.address));
        let driver = fs::canonicalize(device.join("driver")).ok();
        lines.insert("driver".to_owned(), format!("{driver:?}"));
        let only = fs::read_to_string(device.join("driver_override")).expect("a function has an override");
        lines.insert("driver_override".to_owned(), only.trim().to_owned());
        let name = fs::read_dir(device.join("net")).ok().and_then(|mut all| all.next()?.ok());
        if let Some(name) = name.map(|entry| entry.file_name().to_string_lossy().into_owned()) {
            let link = parsed(&sh(&format!("ip -j -d link show {name}")));
            for key in ["ifname", "altnames", "ifalias", "address", "mtu", "flags", "promiscuity", "allmulti", "xdp"] {
                lines.insert(format!("device {key}"), link[0][key].to_string());
            }
        }
        lines.into_iter().map(|(key, value)| format!("{key}: {value}\n")).collect()
    }
}

impl Drop for IgbPort {
    fn drop(&mut self) {
        let done =
            self.kernel.write_vf_count(self.address, 0).and_then(|()| self.kernel.write_autoprobe(self.address, true));
        if let Err(error) = done {
            tracing::error!(port = %self.address, %error, "its functions stay");
        }
        drop(Command::new("ip").args(["link", "set", self.name.as_str(), "down"]).status());
    }
}

/// The kernel's simulated device (netdevsim), with one port, which goes when it is dropped.
///
/// # Panics
/// As [`IgbPort`].
#[derive(Debug)]
pub struct SimulatedPort {
    /// The running kernel.
    pub kernel: LinuxKernel,
    /// The port's device.
    pub index: IfIndex,
    /// Its name.
    pub name: IfName,
    number: u32,
}

impl SimulatedPort {
    /// A port that can have so many functions. `number` is the device's.
    pub fn new(number: u32, most: u16) -> Self {
        sh("modprobe netdevsim");
        fs::write("/sys/bus/netdevsim/new_device", format!("{number} 1")).expect("to make the device");
        let device = Self::path(number);
        let limit = format!("/sys/kernel/debug/netdevsim/netdevsim{number}/max_vfs");
        fs::write(limit, most.to_string()).expect("to set how many functions it can have");
        let entry = fs::read_dir(device.join("net")).expect("it has a port").next().expect("it has a port");
        let name = entry.expect("its name").file_name().to_string_lossy().into_owned();
        let index = fs::read_to_string(device.join("net").join(&name).join("ifindex")).expect("its index");
        Self {
            kernel: LinuxKernel::of_this_thread().expect("the kernel"),
            index: index.trim().parse().ok().and_then(IfIndex::new).expect("an index"),
            name: name.parse().expect("a name"),
            number,
        }
    }

    /// Gives it so many functions, by way of 0.
    pub fn set_count(&self, count: u16) {
        let path = Self::path(self.number).join("sriov_numvfs");
        for count in [0, count] {
            fs::write(&path, count.to_string()).expect("to make functions");
        }
    }

    fn path(number: u32) -> PathBuf {
        PathBuf::from(format!("/sys/bus/netdevsim/devices/netdevsim{number}"))
    }
}

impl Drop for SimulatedPort {
    fn drop(&mut self) {
        if let Err(error) = fs::write("/sys/bus/netdevsim/del_device", self.number.to_string()) {
            tracing::error!(number = self.number, %error, "the simulated device stays");
        }
    }
}

/// Runs commands and returns what they printed.
///
/// # Panics
/// If they fail.
pub fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().expect("sh starts");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn parsed(text: &str) -> serde_json::Value {
    serde_json::from_str(text).expect("iproute2 prints JSON")
}

/// Tests of a binary run side by side, and there is one port.
static ALONE: Mutex<()> = Mutex::new(());
/// As .ci/vm/boot gives it to the first port; probing has no fixed order.
const FIRST: MacAddr = MacAddr::new([0x52, 0x54, 0, 0, 0, 1]);
/// An emulated processor is slow.
const LIMIT: Duration = Duration::from_secs(120);
