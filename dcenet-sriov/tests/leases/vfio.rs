//! A function that a program drives, behind the guest's IOMMU.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dcenet_core::test_support::{Rung, require};
use dcenet_sriov::lease::{Leases, Outcome, Released, Wanted};
use dcenet_sriov::test_support::guest::IgbPort;
use tempfile::TempDir;

use crate::igb::wanted;
use crate::world::owner;

#[test]
fn a_program_has_the_function_alone_and_its_driver_comes_back_when_it_lets_go() {
    if !require(Rung::Vm) {
        return;
    }
    let port = IgbPort::with(2);
    let vf = port.vf(0);
    port.acquaint(vf);
    let (home, state) = (port.told(vf), TempDir::new().unwrap());
    let leases = |patience| Leases::open(port.kernel.clone(), state.path()).unwrap().with_patience(patience);
    let (long, short) = (Duration::from_secs(120), Duration::from_secs(2));
    let driver = || {
        let path = Path::new("/sys/bus/pci/devices").join(vf.address.to_string()).join("driver");
        path.canonicalize().unwrap().file_name().unwrap().to_str().unwrap().to_owned()
    };
    let wanted = Wanted { port: wanted().port, driver: Some("vfio-pci".to_owned()), ..Wanted::default() };
    let first = leases(long);
    let lease = first.prepare(&owner("a"), vf, &wanted).unwrap();
    let files: Vec<PathBuf> = lease.iommu_group().unwrap().files().into();
    let incarnation = lease.commit().unwrap();
    assert_eq!(driver(), "vfio-pci");
    let told = port.told(vf);
    for part in ["port address: \"02:00:00:00:00:aa\"", "\"vlan\":100", "driver_override: vfio-pci"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(!told.contains("device ifname"), "{told}");

    let open = |path: &PathBuf| OpenOptions::new().read(true).write(true).open(path);
    let container = open(&files[0]).unwrap();
    let group = open(&files[1]).unwrap();
    let released = leases(short).release(&owner("a"), vf.address, incarnation).unwrap();
    assert!(matches!(released, Released::Quarantined(_)), "{released:?}");
    assert_eq!(driver(), "vfio-pci");
    drop((group, container));
    let recovered = leases(long).recover(|_| false).unwrap().pop().unwrap().outcome;
    assert!(matches!(recovered, Outcome::Restored), "{recovered:?}");
    assert_eq!((driver().as_str(), port.told(vf)), ("igbvf", home));
}
