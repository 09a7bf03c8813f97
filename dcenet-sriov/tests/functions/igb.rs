//! The inventory of a real kernel: QEMU's igb in the guest.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dcenet_core::netlink::Family;
use dcenet_core::netns::NetNs;
use dcenet_core::test_support::{Rung, require};
use dcenet_sriov::inventory::{Inventory, LinkType, VfDriverKind};
use dcenet_sriov::sysfs::SysfsDir;

/// Functions of a port, which go with it.
struct Functions(PathBuf);

impl Functions {
    fn create(device: PathBuf, count: usize) -> Self {
        fs::write(device.join("sriov_numvfs"), count.to_string()).unwrap();
        Self(device)
    }
}

impl Drop for Functions {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.0.join("sriov_numvfs"), "0") {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

/// The last part of what a link leads to.
fn target(path: PathBuf) -> String {
    fs::canonicalize(&path).unwrap().file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn the_inventory_of_igb_is_what_kernel_and_netlink_say() {
    if !require(Rung::Vm) {
        return;
    }
    let sysfs = SysfsDir::new("/sys");
    let before = Inventory::scan(&sysfs).unwrap();
    assert_eq!(before.functions.len(), 2, "{before:?}");
    assert!(before.functions.iter().all(|pf| pf.num_vfs == 0 && pf.total_vfs == 7 && pf.vfs.is_empty()), "{before:?}");
    let port = before.functions[0].address;
    let device = PathBuf::from(format!("/sys/bus/pci/devices/{port}"));
    let functions = Functions::create(device.clone(), 3);
    // The functions are there when the write returns, their drivers' devices a little later.
    let deadline = Instant::now() + Duration::from_secs(60);
    let all = loop {
        let all = Inventory::scan(&sysfs).unwrap();
        if all.vfs().all(|(_, vf)| vf.netdevs.len() == 1) || Instant::now() > deadline {
            break all;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(all.notes, []);
    let pf = all.functions.iter().find(|pf| pf.address == port).unwrap();
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
        assert_eq!(all.port_of(vf.address).unwrap().address, port);
    }
    // One port alone, read again after its functions went, is what a whole scan says.
    let mut kept = all.clone();
    drop(functions);
    kept.refresh(&sysfs, port);
    assert_eq!(kept, before);
}
