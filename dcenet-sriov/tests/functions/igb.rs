//! A real kernel with an adapter: QEMU's igb in the guest.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dcenet_core::model::MacAddr;
use dcenet_core::netlink::Family;
use dcenet_core::netns::NetNs;
use dcenet_core::test_support::{Rung, TestHost, require};
use dcenet_sriov::config::{Capabilities, VfConfig, VfSettings};
use dcenet_sriov::count::{CountError, CountRequest, set_vf_count};
use dcenet_sriov::inventory::{Inventory, LinkType, VfDriverKind};
use dcenet_sriov::kernel::{
    Attribute, Guid, Kernel, Namespace, NetdevChange, VfChange, VfLinkState, VfRate, VfVlan, VlanProtocol,
};
use dcenet_sriov::lease::VfId;
use dcenet_sriov::sysfs::SysfsDir;
use dcenet_sriov::test_support::Profile;
use dcenet_sriov::test_support::conformance::{Bed, conforms};
use dcenet_sriov::test_support::guest::IgbPort;
use dcenet_sriov::{PciAddress, VfIndex};

/// The last part of what a link leads to.
fn target(path: PathBuf) -> String {
    fs::canonicalize(&path).unwrap().file_name().unwrap().to_str().unwrap().to_owned()
}

fn mac(last: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, last])
}

const ZERO: MacAddr = MacAddr::new([0; 6]);

#[test]
fn the_inventory_of_igb_is_what_kernel_and_netlink_say() {
    if !require(Rung::Vm) {
        return;
    }
    let port = IgbPort::with(0);
    let sysfs = SysfsDir::new("/sys");
    let before = Inventory::scan(&sysfs).unwrap();
    assert_eq!(before.functions.len(), 2, "{before:?}");
    assert!(before.functions.iter().all(|pf| pf.num_vfs == 0 && pf.total_vfs == 7 && pf.vfs.is_empty()), "{before:?}");
    let device = PathBuf::from(format!("/sys/bus/pci/devices/{}", port.address));
    port.set_count(3);
    let all = Inventory::scan(&sysfs).unwrap();
    assert_eq!(all.notes, []);
    let pf = all.functions.iter().find(|pf| pf.address == port.address).unwrap();
    assert_eq!((pf.driver.as_deref(), pf.num_vfs, pf.vfs.len()), (Some("igb"), 3, 3));
    assert_eq!(all.vfs().count(), 3);
    let mut socket = NetNs::of_this_thread().unwrap().socket(Family::Route).unwrap();
    let mut link = |name: &str| socket.link(&name.parse().unwrap()).unwrap().unwrap();
    let [netdev] = &pf.netdevs[..] else { panic!("{pf:?}") };
    let seen = link(&netdev.name);
    assert_eq!((netdev.index, netdev.mac, netdev.link_type), (Some(seen.index), seen.mac, LinkType::Ether));
    for (n, vf) in pf.vfs.iter().enumerate() {
        assert_eq!(vf.address.to_string(), target(device.join(format!("virtfn{n}"))));
        assert_eq!(vf.driver, VfDriverKind::Kernel("igbvf".to_owned()));
        let [netdev] = &vf.netdevs[..] else { panic!("{vf:?}") };
        assert!(link(netdev).mac.is_some());
        assert_eq!(all.port_of(vf.address).unwrap().address, port.address);
    }
    // One port alone, read again after its functions went, is what a whole scan says.
    let mut kept = all.clone();
    port.set_count(0);
    kept.refresh(&sysfs, port.address);
    assert_eq!(kept, before);
}

#[test]
fn igb_conforms() {
    if !require(Rung::Vm) {
        return;
    }
    let port = IgbPort::with(2);
    let host = TestHost::new();
    let pod = host.new_pod();
    let VfId { address, index, .. } = port.vf(1);
    conforms(&Bed {
        kernel: &*port.kernel,
        port: port.index,
        driver: "igb",
        vf: index,
        function: Some(address),
        pod: Some(Namespace::Path(pod.path().to_owned())),
    });
}

/// The errnos that Linux gives, and that nothing of it was asked: what is known of the driver refuses it before.
#[test]
fn what_igb_refuses_is_refused_before_the_first_write() {
    if !require(Rung::Vm) {
        return;
    }
    let port = IgbPort::with(1);
    let before = port.kernel.vf(port.index, VfIndex(0)).unwrap();
    let can = Capabilities::of(Some("igb"), &before);
    let none = VfSettings::default;
    let tag = VfVlan { id: 5.try_into().ok(), qos: 0, protocol: VlanProtocol::Dot1Ad };
    for (attribute, settings, change, errno) in [
        (
            Attribute::Protocol,
            VfSettings { vlan: Some(5), protocol: Some(VlanProtocol::Dot1Ad), ..none() },
            VfChange { vlan: Some(tag), ..VfChange::default() },
            libc::EPROTONOSUPPORT,
        ),
        (
            Attribute::MinRate,
            VfSettings { min_rate: Some(5), max_rate: Some(10), ..none() },
            VfChange { rate: Some(VfRate { min: 5, max: 10 }), ..VfChange::default() },
            libc::EINVAL,
        ),
        (
            Attribute::LinkState,
            VfSettings { link_state: Some(VfLinkState::Disable), ..none() },
            VfChange { link_state: Some(VfLinkState::Disable), ..VfChange::default() },
            libc::EOPNOTSUPP,
        ),
        (
            Attribute::RssQuery,
            VfSettings { rss_query: Some(true), ..none() },
            VfChange { rss_query: Some(true), ..VfChange::default() },
            libc::EOPNOTSUPP,
        ),
        (
            Attribute::PortGuid,
            VfSettings { port_guid: Some(Guid(7)), ..none() },
            VfChange { port_guid: Some(Guid(7)), ..VfChange::default() },
            libc::EOPNOTSUPP,
        ),
    ] {
        let config = VfConfig::new(VfSettings { mac: Some(mac(9)), ..settings }).unwrap();
        assert_eq!(can.check(&config).unwrap_err().attribute, attribute);
        assert_eq!(port.kernel.vf(port.index, VfIndex(0)).unwrap(), before);
        // The twin asks the kernel, which changes what comes before.
        let with_mac = VfChange { mac: Some(mac(9)), ..change };
        let error = port.kernel.configure_vf(port.index, VfIndex(0), &with_mac).unwrap_err();
        assert_eq!((error.errno, error.attribute), (Some(errno), Some(attribute)), "{error}");
        let after = port.kernel.vf(port.index, VfIndex(0)).unwrap();
        assert_eq!(after.mac, mac(9), "{attribute}");
        port.kernel.configure_vf(port.index, VfIndex(0), &before.restore(&after)).unwrap();
        assert_eq!(port.kernel.vf(port.index, VfIndex(0)).unwrap(), before);
    }
}

/// What the model says of igb, asked of igb.
#[test]
fn igb_is_as_its_profile_says() {
    if !require(Rung::Vm) {
        return;
    }
    let says = Profile::IGB;
    let port = IgbPort::with(2);
    let (kernel, vf) = (&*port.kernel, port.vf(0));
    let state = || kernel.vf(port.index, vf.index).unwrap();
    let set = |change: VfChange| kernel.configure_vf(port.index, vf.index, &change);
    let device = |change: NetdevChange| {
        let index = port.device(vf.address).index;
        kernel.configure_netdev(&Namespace::Host, index, &change)
    };
    let none = VfChange::default;
    let of_device = NetdevChange::default;
    assert_eq!(kernel.vf_count(port.address).unwrap().total, says.total_vfs);
    assert_eq!(kernel.driver(port.address).unwrap().driver.as_deref(), Some(says.driver));
    assert_eq!(kernel.driver(vf.address).unwrap().driver.as_deref(), Some(says.vf_driver));
    let own = || port.device(vf.address).mac.unwrap();
    let first = state();
    // Where the port's driver begins anew after the function's has begun, as on Linux 6.1, it has forgotten what that told.
    let untold_or_own = |mac: MacAddr| mac == ZERO || mac == own();
    assert!(untold_or_own(first.mac), "{first:?}");
    assert_eq!(first.trust.is_some(), says.has_trust);
    assert_eq!((first.rss_query.is_some(), first.guids), (says.has_rss_query, None));

    // Bug 9: a port that was down has not been told by the function's driver.
    port.set_count(0);
    port.set_up(false);
    port.set_count(2);
    port.set_up(true);
    assert!(own().is_device_address() && untold_or_own(state().mac), "{:?}", state());
    device(NetdevChange { up: Some(true), ..of_device() }).unwrap();
    // The function's driver tells it when it hears that the port is there.
    let deadline = Instant::now() + Duration::from_secs(60);
    while state().mac == ZERO && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    device(NetdevChange { up: Some(false), ..of_device() }).unwrap();
    assert_eq!(state().mac == own(), says.reports_own_mac, "{:?}", state());
    // Bug 11.
    assert_eq!(set(VfChange { mac: Some(ZERO), ..none() }).is_err(), says.refuses_zero_mac);

    set(VfChange { mac: Some(mac(1)), trust: Some(false), ..none() }).unwrap();
    assert_eq!(port.device(vf.address).mac == Some(mac(1)), says.mac_reaches_device_at_once);
    // Bug 10.
    let error = device(NetdevChange { mac: Some(mac(2)), ..of_device() }).unwrap_err();
    assert_eq!((error.errno, error.attribute), (says.mac_is_fixed, Some(Attribute::EffectiveMac)), "{error}");
    set(VfChange { trust: Some(true), ..none() }).unwrap();
    device(NetdevChange { mac: Some(mac(2)), ..of_device() }).unwrap();
    assert_eq!(port.device(vf.address).mac, Some(mac(2)));
    set(VfChange { mac: Some(mac(1)), ..none() }).unwrap();
    kernel.unbind(vf.address).unwrap();
    kernel.bind(vf.address, says.vf_driver).unwrap();
    assert_eq!(port.device(vf.address).mac, Some(mac(1)));

    let limit = VfRate { min: 0, max: 100 };
    set(VfChange { rate: Some(limit), ..none() }).unwrap();
    assert_eq!(state().rate, limit);
    port.set_up(false);
    for rate in [limit, VfRate::default()] {
        let refused = set(VfChange { rate: Some(rate), ..none() });
        assert_eq!(refused.is_err(), says.rate_needs_carrier, "{refused:?}");
    }
}

fn nobody(_: PciAddress) -> Option<String> {
    None
}

#[test]
fn counts_change_as_they_do_on_the_model() {
    if !require(Rung::Vm) {
        return;
    }
    let port = IgbPort::with(0);
    let (kernel, address) = (&*port.kernel, port.address);
    let limit = Duration::from_secs(120);
    let request = |count| CountRequest { count, autoprobe: None, user: &nobody, even_elsewhere: false, limit };
    // Bug 16: when the call returns each has its device.
    for count in [3, 5, 5] {
        let all = set_vf_count(kernel, address, &request(count)).unwrap();
        assert_eq!(all.len(), usize::from(count));
        for (n, (index, function)) in (0..).zip(&all) {
            assert_eq!(*index, VfIndex(n));
            let net = format!("/sys/bus/pci/devices/{function}/net");
            assert_eq!(fs::read_dir(net).unwrap().count(), 1, "{function}");
        }
    }
    // Bug 15, and its twins, which ask the kernel.
    assert_eq!(kernel.write_vf_count(address, 6).unwrap_err().errno, Some(libc::EBUSY));
    assert_eq!(kernel.write_vf_count(address, 8).unwrap_err().errno, Some(libc::ERANGE));
    let error = set_vf_count(kernel, address, &request(8)).unwrap_err();
    assert!(matches!(error, CountError::TooMany { wanted: 8, total: 7, .. }), "{error}");
    // Bug 17.
    let host = TestHost::new();
    let pod = host.new_pod();
    let inside = Namespace::Path(pod.path().to_owned());
    let taken = port.vf(2).address;
    let device = port.device(taken);
    let net1 = "net1".parse().unwrap();
    kernel.move_netdev(&Namespace::Host, device.index, &inside, &net1, &NetdevChange::default()).unwrap();
    let error = set_vf_count(kernel, address, &request(2)).unwrap_err();
    assert!(matches!(error, CountError::InUse { function, .. } if function == taken), "{error}");
    assert_eq!(kernel.vf_count(address).unwrap().now, 5);
    assert!(pod.link("net1").is_some());
    let anyway = CountRequest { even_elsewhere: true, autoprobe: Some(false), ..request(2) };
    let all = set_vf_count(kernel, address, &anyway).unwrap();
    assert!(pod.link("net1").is_none());
    assert!(!kernel.vf_count(address).unwrap().autoprobe);
    for (_, function) in all {
        assert_eq!(kernel.driver(function).unwrap().driver, None);
    }
    set_vf_count(kernel, address, &CountRequest { autoprobe: Some(true), ..request(0) }).unwrap();
    assert_eq!(set_vf_count(kernel, address, &request(0)).unwrap(), []);
}
