//! Virtual functions of QEMU's igb: two ports, of which the first creates them.

use std::time::{Duration, Instant};

use dcenet_core::model::IfName;
use dcenet_core::netlink::LinkView;
use dcenet_core::netns::NetNs;
use dcenet_core::test_support::{HostState, Rung, TestHost, require};

use super::functions::{Functions, address_of, device_of};
use super::{seen, socket};

#[test]
fn a_virtual_function_goes_to_a_pod_and_comes_back() {
    if !require(Rung::Vm) {
        return;
    }
    let home = NetNs::of_this_thread().unwrap();
    let mut at_home = socket(&home);
    let before = HostState::capture(&home);
    {
        let functions = Functions::create(2);
        let own = device_of(&functions.path(0));
        let other = device_of(&functions.path(1));
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
        assert_eq!(said["parentdev"], address_of(&functions.path(0)));
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
        assert_eq!(device_of(&functions.path(0)), net1);
    }
    assert_eq!(before.diff(&HostState::capture(&home)), "");
}
