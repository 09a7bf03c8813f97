//! The virtual functions of a guest's igb ports.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dcenet_core::model::{IfName, MacAddr};

/// Virtual functions of the first port, removed when dropped.
pub struct Functions(PathBuf);

impl Functions {
    /// The port is up meanwhile: one that is down does not answer its functions' drivers, which then make an Ethernet
    /// address up (`igbvf_probe` in drivers/net/ethernet/intel/igbvf/netdev.c).
    pub fn create(count: usize) -> Self {
        let functions = Self(port());
        functions.port_set(&["up"]);
        fs::write(functions.0.join("sriov_numvfs"), count.to_string()).unwrap();
        functions
    }

    /// The folder of a function in sysfs.
    pub fn path(&self, number: usize) -> PathBuf {
        self.0.join(format!("virtfn{number}")).canonicalize().unwrap()
    }

    /// Gives a function its Ethernet address, which its driver takes over when it is bound the next time.
    pub fn set_mac(&self, number: usize, mac: MacAddr) {
        self.port_set(&["vf", &number.to_string(), "mac", &mac.to_string()]);
    }

    fn port_set(&self, settings: &[&str]) {
        let set =
            Command::new("ip").args(["link", "set", device_of(&self.0).as_str()]).args(settings).status().unwrap();
        assert!(set.success());
    }
}

impl Drop for Functions {
    fn drop(&mut self) {
        fs::write(self.0.join("sriov_numvfs"), "0").unwrap();
        self.port_set(&["down"]);
    }
}

/// The physical function of the first port, by its Ethernet address: probing has no fixed order.
fn port() -> PathBuf {
    let devices = fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().path());
    let mut ports = devices.filter(|d| fs::read_to_string(d.join("address")).is_ok_and(|a| a.trim() == PORT));
    ports.next().expect("the guest has igb ports").join("device").canonicalize().unwrap()
}

/// The network device of a PCI function, which its driver registers some time after it appears.
pub fn device_of(function: &Path) -> IfName {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let entry = fs::read_dir(function.join("net")).ok().and_then(|mut entries| entries.next());
        if let Some(entry) = entry {
            return entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        }
        assert!(Instant::now() < deadline, "{} has no network device", function.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The PCI address of a function.
pub fn address_of(function: &Path) -> String {
    function.file_name().unwrap().to_str().unwrap().to_owned()
}

/// As .ci/vm/boot gives it to the first port.
const PORT: &str = "52:54:00:00:00:01";
