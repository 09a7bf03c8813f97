//! A virtual function handed to a driver in user space, behind the guest's IOMMU.

use std::fs;
use std::path::Path;

use dcenet_core::model::MacAddr;
use dcenet_core::netns::NetNs;
use dcenet_core::test_support::{HostState, Rung, require};

use super::functions::{Functions, address_of, device_of};
use super::socket;

/// Takes the function from its driver and has the kernel look for one anew: the named one, or that of its identity.
fn bind(function: &Path, driver: Option<&str>) {
    // Documentation/ABI/testing/sysfs-bus-pci: an override that is an empty line is none.
    fs::write(function.join("driver_override"), format!("{}\n", driver.unwrap_or(""))).unwrap();
    fs::write(function.join("driver/unbind"), address_of(function)).unwrap();
    fs::write("/sys/bus/pci/drivers_probe", address_of(function)).unwrap();
}

fn driver(function: &Path) -> String {
    function.join("driver").canonicalize().unwrap().file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_virtual_function_goes_to_vfio_and_comes_back() {
    if !require(Rung::Vm) {
        return;
    }
    let home = NetNs::of_this_thread().unwrap();
    let before = HostState::capture(&home);
    {
        let functions = Functions::create(1);
        let function = functions.path(0);
        let name = device_of(&function);
        // One that nobody set is made up anew by the driver (`igbvf_probe` in drivers/net/ethernet/intel/igbvf/netdev.c).
        let mac: MacAddr = "02:00:00:00:00:07".parse().unwrap();
        functions.set_mac(0, mac);
        let group = function.join("iommu_group").canonicalize().unwrap();
        let device = Path::new("/dev/vfio").join(group.file_name().unwrap());
        assert_eq!(driver(&function), "igbvf");
        assert!(!device.exists());

        bind(&function, Some("vfio-pci"));
        assert_eq!(driver(&function), "vfio-pci");
        assert!(device.exists());
        assert_eq!(socket(&home).link(&name).unwrap(), None);

        bind(&function, None);
        assert_eq!(driver(&function), "igbvf");
        assert!(!device.exists());
        let back = socket(&home).link(&device_of(&function)).unwrap().unwrap();
        assert_eq!(back.mac, Some(mac));
    }
    assert_eq!(before.diff(&HostState::capture(&home)), "");
}
