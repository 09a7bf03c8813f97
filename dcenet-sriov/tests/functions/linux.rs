//! The running kernel, with devices that need no adapter.

use std::time::{Duration, Instant};

use dcenet_core::model::{IfName, MacAddr, Mtu};
use dcenet_core::netns::NetNs;
use dcenet_core::test_support::{Rung, TestHost, require};
use dcenet_sriov::VfIndex;
use dcenet_sriov::kernel::{ErrorClass, Kernel, LinuxKernel, Namespace, NetdevChange, NetdevState, VfChange};
use dcenet_sriov::sysfs::SysfsDir;

const HOST: Namespace = Namespace::Host;

#[test]
fn devices_are_moved_renamed_and_configured_by_one_message() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    host.root().sh("ip link add vf0 type veth peer name far0");
    let kernel = LinuxKernel::new(NetNs::open(host.root().path()).unwrap(), SysfsDir::system());
    let pod = host.new_pod();
    let inside = Namespace::Path(pod.path().to_owned());
    assert_eq!(kernel.namespace_id(&inside).unwrap(), Some(pod.netns().id()));
    assert_ne!(kernel.namespace_id(&HOST).unwrap(), Some(pod.netns().id()));
    let index = host.root().link("vf0").unwrap().index;
    let before = kernel.netdev(&HOST, index).unwrap().unwrap();
    assert_eq!((before.name.as_str(), before.up, before.promisc), ("vf0", false, false));

    kernel.add_alternative_name(&HOST, index, "another").unwrap();
    assert_eq!(kernel.add_alternative_name(&HOST, index, "far0").unwrap_err().class, ErrorClass::Exists);
    let name: IfName = "net1".parse().unwrap();
    let (mac, mtu) = (MacAddr::new([2, 0, 0, 0, 0, 7]), Mtu::try_from(1400).unwrap());
    let change = NetdevChange {
        mac: Some(mac),
        mtu: Some(mtu),
        alias: Some("of a pod".to_owned()),
        promisc: Some(true),
        all_multicast: Some(true),
        up: Some(true),
        ..NetdevChange::default()
    };
    kernel.move_netdev(&HOST, index, &inside, &name, &change).unwrap();
    assert_eq!(kernel.netdev(&HOST, index).unwrap(), None);
    let moved = kernel.netdev(&inside, pod.link("net1").unwrap().index).unwrap().unwrap();
    let wanted = NetdevState {
        index: moved.index,
        name: name.clone(),
        alternative_names: vec!["another".to_owned()],
        alias: Some("of a pod".to_owned()),
        mac: Some(mac),
        mtu: 1400,
        up: true,
        promisc: true,
        all_multicast: true,
    };
    assert_eq!(moved, wanted);
    // iproute2 says the same.
    let said = pod.sh("ip -d link show net1");
    for part in ["PROMISC", "ALLMULTI", "mtu 1400", "altname another", "alias of a pod", &mac.to_string()] {
        assert!(said.contains(part), "{part}: {said}");
    }

    let back = NetdevChange {
        mac: before.mac,
        mtu: Mtu::try_from(before.mtu).ok(),
        alias: Some(String::new()),
        promisc: Some(false),
        all_multicast: Some(false),
        ..NetdevChange::default()
    };
    kernel.move_netdev(&inside, moved.index, &HOST, &before.name, &back).unwrap();
    let index = host.root().link("vf0").unwrap().index;
    kernel.delete_alternative_name(&HOST, index, "another").unwrap();
    kernel.delete_alternative_name(&HOST, index, "another").unwrap_err();
    assert_eq!(kernel.netdev(&HOST, index).unwrap(), Some(NetdevState { index, ..before }));
}

#[test]
fn what_is_not_there_or_has_no_functions_is_told() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    host.root().sh("ip link add vf0 type veth peer name far0");
    let kernel = LinuxKernel::new(NetNs::open(host.root().path()).unwrap(), SysfsDir::system());
    let index = host.root().link("vf0").unwrap().index;
    assert_eq!(kernel.vfs(index).unwrap(), []);
    assert_eq!(kernel.vf(index, VfIndex(0)).unwrap_err().class, ErrorClass::NotReported);
    let change = VfChange { trust: Some(true), ..VfChange::default() };
    let error = kernel.configure_vf(index, VfIndex(0), &change).unwrap_err();
    assert_eq!(error.class, ErrorClass::Unsupported, "{error}");
    let pod = host.new_pod();
    let inside = Namespace::Path(pod.path().to_owned());
    drop(pod);
    assert_eq!(kernel.namespace_id(&inside).unwrap(), None);
    assert_eq!(kernel.netdev(&inside, index).unwrap_err().class, ErrorClass::NamespaceGone);
    let never = "fffe:00:1f.7".parse().unwrap();
    assert_eq!(kernel.driver(never).unwrap_err().class, ErrorClass::Gone);
    assert_eq!(kernel.vf_count(never).unwrap_err().class, ErrorClass::Gone);
    assert_eq!(kernel.netdevs(&HOST, never).unwrap(), []);
}

/// Nothing may come in a container, and waiting ends all the same.
#[test]
fn watching_ends_at_its_limit() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let kernel = LinuxKernel::new(NetNs::open(host.root().path()).unwrap(), SysfsDir::system());
    let mut watch = kernel.watch().unwrap();
    let begin = Instant::now();
    while watch.wait(Duration::from_millis(10)).unwrap() {
        assert!(begin.elapsed() < Duration::from_secs(60), "devices change all the time");
    }
}

#[test]
fn work_is_done_in_the_hosts_namespace_wherever_the_caller_is() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let root = NetNs::open(host.root().path()).unwrap();
    let id = root.id();
    let kernel = LinuxKernel::new(NetNs::open(host.root().path()).unwrap(), SysfsDir::system());
    let in_host = || {
        let mut there = None;
        kernel.in_host(&mut || there = Some(NetNs::of_this_thread().unwrap().id())).unwrap();
        there
    };
    let here = NetNs::of_this_thread().unwrap().id();
    assert_ne!(here, id);
    assert_eq!(in_host(), Some(id));
    assert_eq!(host.new_pod().netns().run(in_host).unwrap(), Some(id));
    assert_eq!(root.run(in_host).unwrap(), Some(id));
    assert_eq!(NetNs::of_this_thread().unwrap().id(), here);
}
