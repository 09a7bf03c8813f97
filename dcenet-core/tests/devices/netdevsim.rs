//! The kernel's simulated device, for what QEMU's igb refuses. Debian leaves it out; .ci/vm/netdevsim builds it.

use std::fs;
use std::path::PathBuf;

use dcenet_core::model::IfName;
use dcenet_core::netns::NetNs;
use dcenet_core::test_support::{HostState, Rung, TestHost, require};

use super::{seen, socket};

/// A simulated device with one port, removed when dropped.
struct Simulated(u32);

impl Simulated {
    fn create(number: u32) -> Self {
        let loaded = std::process::Command::new("modprobe").arg("netdevsim").status().unwrap();
        assert!(loaded.success());
        fs::write("/sys/bus/netdevsim/new_device", format!("{number} 1")).unwrap();
        Self(number)
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/sys/bus/netdevsim/devices/netdevsim{}", self.0))
    }

    fn port(&self) -> IfName {
        let mut ports = fs::read_dir(self.path().join("net")).unwrap();
        ports.next().unwrap().unwrap().file_name().to_str().unwrap().parse().unwrap()
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        fs::write("/sys/bus/netdevsim/del_device", self.0.to_string()).unwrap();
    }
}

#[test]
fn a_simulated_port_has_functions_and_goes_to_a_pod() {
    if !require(Rung::Vm) {
        return;
    }
    let home = NetNs::of_this_thread().unwrap();
    let before = HostState::capture(&home);
    {
        let simulated = Simulated::create(7);
        fs::write(simulated.path().join("sriov_numvfs"), "2").unwrap();
        let port = simulated.port();
        let host = TestHost::new();
        // Service tags and states of the link, which igb has not.
        let set =
            format!("ip link set {port} vf 1 vlan 100 qos 3 proto 802.1ad; ip link set {port} vf 0 state disable");
        assert!(std::process::Command::new("sh").args(["-ec", &set]).status().unwrap().success());

        let pod = host.new_pod();
        let net1: IfName = "net1".parse().unwrap();
        let link = socket(&home).link(&port).unwrap().unwrap();
        socket(&home).move_link(&link, pod.netns(), Some(&net1)).unwrap();
        let functions = seen(&pod, "net1").unwrap()["vfinfo_list"].clone();
        assert_eq!(functions.as_array().unwrap().len(), 2, "{functions}");
        assert_eq!(functions[0]["link_state"], "disable", "{functions}");
        let tag = &functions[1]["vlan_list"][0];
        assert_eq!((&tag["vlan"], &tag["qos"], &tag["protocol"]), (&100.into(), &3.into(), &"802.1ad".into()));
        let inside = socket(pod.netns()).link(&net1).unwrap().unwrap();
        socket(pod.netns()).move_link(&inside, &home, Some(&port)).unwrap();
        assert_eq!(socket(&home).link(&port).unwrap().unwrap().mac, link.mac);
    }
    assert_eq!(before.diff(&HostState::capture(&home)), "");
}
