//! Virtual functions of QEMU's igb: two ports, of which the first creates them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dcenet_core::model::IfName;
use dcenet_core::netlink::LinkView;
use dcenet_core::netns::NetNs;
use dcenet_core::test_support::{HostState, Rung, TestHost, require};

use super::{seen, socket};

/// The physical function of the first port, by its Ethernet address: probing has no fixed order.
fn port() -> PathBuf {
    let devices = fs::read_dir("/sys/class/net").unwrap().map(|entry| entry.unwrap().path());
    let mut ports = devices.filter(|d| fs::read_to_string(d.join("address")).is_ok_and(|a| a.trim() == PORT));
    ports.next().expect("the guest has igb ports").join("device").canonicalize().unwrap()
}

/// The network device of a PCI function, which its driver registers some time after it appears.
fn device_of(function: &Path) -> IfName {
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

/// Virtual functions, removed when dropped.
struct Functions(PathBuf);

impl Functions {
    fn create(port: PathBuf, count: usize) -> Self {
        fs::write(port.join("sriov_numvfs"), count.to_string()).unwrap();
        Self(port)
    }
}

impl Drop for Functions {
    fn drop(&mut self) {
        fs::write(self.0.join("sriov_numvfs"), "0").unwrap();
    }
}

#[test]
fn a_virtual_function_goes_to_a_pod_and_comes_back() {
    if !require(Rung::Vm) {
        return;
    }
    let home = NetNs::of_this_thread().unwrap();
    let mut at_home = socket(&home);
    let port = port();
    let before = HostState::capture(&home);
    {
        let functions = Functions::create(port, 2);
        let own = device_of(&functions.0.join("virtfn0"));
        let other = device_of(&functions.0.join("virtfn1"));
        let link = at_home.link(&own).unwrap().unwrap();
        // A physical device has no kind, and nobody can delete it.
        assert_eq!(link.kind, None);
        assert_eq!(at_home.delete_link(&link).unwrap_err().errno(), Some(libc::EOPNOTSUPP));

        let host = TestHost::new();
        let net1: IfName = "net1".parse().unwrap();
        let moved = |netns: &NetNs, name: &IfName| -> Option<LinkView> { socket(netns).link(name).unwrap() };
        // There and back by us.
        let pod = host.new_pod();
        at_home.move_link(&link, pod.netns(), Some(&net1)).unwrap();
        assert_eq!(at_home.link(&own).unwrap(), None);
        assert_eq!(at_home.link(&other).unwrap().unwrap().name, other.as_str());
        let said = seen(&pod, "net1").unwrap();
        assert_eq!(said["address"], link.mac.unwrap().to_string());
        assert_eq!(said["parentdev"], function_address(&functions.0, 0));
        let inside = moved(pod.netns(), &net1).unwrap();
        socket(pod.netns()).move_link(&inside, &home, Some(&own)).unwrap();
        assert_eq!(moved(pod.netns(), &net1), None);
        let back = at_home.link(&own).unwrap().unwrap();
        assert_eq!((back.mac, back.is_up()), (link.mac, false));

        // There by us, and back by the kernel when the pod is gone: it keeps the name that it had there
        // (`default_device_exit_net` in net/core/dev.c).
        at_home.move_link(&back, pod.netns(), Some(&net1)).unwrap();
        drop(pod);
        let deadline = Instant::now() + Duration::from_secs(60);
        let back = loop {
            if let Some(link) = at_home.link(&net1).unwrap() {
                break link;
            }
            assert!(Instant::now() < deadline, "the function did not come back");
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(back.mac, link.mac);
        assert_eq!(device_of(&functions.0.join("virtfn0")), net1);
    }
    assert_eq!(before.diff(&HostState::capture(&home)), "");
}

/// The PCI address of a virtual function.
fn function_address(port: &Path, number: usize) -> String {
    let function = port.join(format!("virtfn{number}")).canonicalize().unwrap();
    function.file_name().unwrap().to_str().unwrap().to_owned()
}

/// As .ci/vm/boot gives it to the first port.
const PORT: &str = "52:54:00:00:00:01";
