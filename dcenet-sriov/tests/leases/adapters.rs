//! Ports, and functions that are others than before.

use std::time::Duration;

use dcenet_core::model::IfName;
use dcenet_sriov::count::{CountError, CountRequest, set_vf_count};
use dcenet_sriov::kernel::{Kernel, Namespace, NetdevChange, VfChange, VfVlan};
use dcenet_sriov::lease::{LeaseError, Outcome, Released, VfId};
use dcenet_sriov::{PciAddress, VfIndex};

use crate::regressions::igb;
use crate::world::{World, look, owner};

fn nobody(_: PciAddress) -> Option<String> {
    None
}

fn request(count: u16) -> CountRequest<'static> {
    let limit = Duration::from_secs(60);
    CountRequest { count, autoprobe: None, user: &nobody, even_elsewhere: false, limit }
}

fn give_vlan(world: &World, id: u16) {
    let vlan = VfVlan { id: id.try_into().ok(), ..VfVlan::default() };
    let change = VfChange { vlan: Some(vlan), ..VfChange::default() };
    world.model.configure_vf(world.port, world.vf.index, &change).unwrap();
}

#[test]
fn the_number_of_functions_does_not_change_under_a_lease_or_its_making() {
    let world = igb();
    let (leases, port) = (world.leases(), world.vf.port);
    let count = || world.model.vf_count(port).unwrap().now;
    let lease = leases.prepare(&owner("a"), world.vf, &world.wanted()).unwrap();
    let error = leases.set_vf_count(port, &request(1)).unwrap_err();
    assert!(matches!(&error, CountError::InUse { function, .. } if *function == world.vf.address), "{error}");
    let incarnation = lease.commit().unwrap();
    for error in [leases.set_vf_count(port, &request(1)).unwrap_err(), leases.forget_port(port).unwrap_err()] {
        assert!(error.to_string().contains("fast/a as net1"), "{error}");
    }
    assert_eq!(count(), 2);
    assert!(matches!(leases.release(&owner("a"), world.vf.address, incarnation), Ok(Released::Clean)));
    assert_eq!(leases.set_vf_count(port, &request(1)).unwrap().len(), 1);
    // The twin: who asks nobody takes it away under the lease.
    let lease = leases.prepare(&owner("a"), world.vf, &world.wanted()).unwrap();
    set_vf_count(&*world.model, port, &request(0)).unwrap();
    assert_eq!((count(), world.now()), (0, None));
    drop(lease);
}

/// The twin is told nothing, and bends the new function to the old one.
#[test]
fn functions_that_were_made_anew_keep_what_the_administrator_gives_them() {
    for told in ["by the leases", "afterwards", "never"] {
        let world = igb();
        let (leases, port) = (world.leases(), world.vf.port);
        assert!(matches!(world.live(&leases), Ok(Released::Clean)));
        if told == "by the leases" {
            leases.set_vf_count(port, &request(1)).unwrap();
        } else {
            set_vf_count(&*world.model, port, &request(1)).unwrap();
        }
        if told == "afterwards" {
            leases.forget_port(port).unwrap();
        }
        give_vlan(&world, 9);
        let given = world.now();
        assert!(matches!(world.live(&leases), Ok(Released::Clean)), "{told}");
        assert_eq!(world.now() == given, told != "never", "{told}: {:?} is not {given:?}", world.now());
    }
}

#[test]
fn functions_whose_names_were_exchanged_both_get_their_own_back() {
    let world = igb();
    let leases = world.leases();
    let second = VfId { address: world.model.function(world.port, 1), index: VfIndex(1), ..world.vf };
    let homes = [world.vf, second].map(|vf| {
        drop(leases.prepare(&owner("a"), vf, &world.wanted()).unwrap());
        look(&world.model, vf.address)
    });
    let device = |vf: VfId| world.model.netdevs(&Namespace::Host, vf.address).unwrap().remove(0);
    let rename = |vf: VfId, name: &IfName| {
        let change = NetdevChange { name: Some(name.clone()), ..NetdevChange::default() };
        world.model.configure_netdev(&Namespace::Host, device(vf).index, &change).unwrap();
    };
    let names = [world.vf, second].map(|vf| device(vf).name);
    rename(world.vf, &"between".parse().unwrap());
    rename(second, &names[0]);
    rename(world.vf, &names[1]);
    for recovered in leases.recover(|_| true).unwrap() {
        assert!(matches!(recovered.outcome, Outcome::Restored), "{recovered:?}");
    }
    assert_eq!([world.vf, second].map(|vf| look(&world.model, vf.address)), homes);
}

#[test]
fn a_function_that_is_not_the_one_named_is_neither_written_nor_read() {
    let world = igb();
    give_vlan(&world, 9);
    let wrong = VfId { index: VfIndex(1), ..world.vf };
    let before = world.model.vfs(world.port).unwrap();
    let refused = world.leases().prepare(&owner("a"), wrong, &world.wanted()).map(drop);
    assert!(matches!(refused, Err(LeaseError::Another { index: VfIndex(1), .. })), "{refused:?}");
    assert!(matches!(world.leases().readmit(wrong), Err(LeaseError::Another { .. })));
    assert_eq!(world.model.vfs(world.port).unwrap(), before);
    // Somebody's lease is taken back by what was written down of it.
    let leases = world.leases();
    kill(leases.prepare(&owner("a"), world.vf, &world.wanted()).unwrap());
    let refused = leases.prepare(&owner("b"), wrong, &world.wanted()).map(drop);
    assert!(matches!(refused, Err(LeaseError::Another { .. })), "{refused:?}");
    assert_eq!(world.model.vfs(world.port).unwrap(), before);
    world.model.write_vf_count(world.vf.port, 0).unwrap();
    let gone = world.leases().prepare(&owner("a"), world.vf, &world.wanted()).map(drop);
    assert!(matches!(gone, Err(LeaseError::Gone { .. })), "{gone:?}");
}

/// Its process dies: nothing is taken back, and its locks are free.
pub(crate) fn kill<T>(what: T) {
    let death = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _what = what;
        std::panic::resume_unwind(Box::new(()));
    }));
    assert!(death.is_err());
}

#[test]
fn drivers_of_virtual_machines_make_no_network_device_and_none_is_missed() {
    for driver in ["vfio-pci", "mlx5_vfio_pci"] {
        let world = igb();
        let vf = world.vf.address;
        world.model.load_driver(driver);
        world.model.unbind(vf).unwrap();
        world.model.set_driver_override(vf, Some(driver)).unwrap();
        world.model.bind(vf, driver).unwrap();
        let bound = world.now();
        let leases = world.leases();
        let lease = leases.prepare(&owner("a"), world.vf, &world.wanted()).unwrap();
        assert_eq!(lease.netdev().unwrap(), None);
        let incarnation = lease.commit().unwrap();
        assert_ne!(world.now(), bound);
        let released = leases.release(&owner("a"), vf, incarnation);
        assert!(matches!(released, Ok(Released::Clean)), "{released:?}");
        assert_eq!(world.now(), bound);
    }
}

#[test]
fn a_gc_of_one_network_leaves_the_functions_of_others() {
    let world = igb();
    let leases = world.leases();
    leases.prepare(&owner("a"), world.vf, &world.wanted()).unwrap().commit().unwrap();
    let outcome = |network: &str| {
        let mut all = leases.recover_network(&network.parse().unwrap(), |_| false).unwrap();
        all.pop().unwrap().outcome
    };
    assert!(matches!(outcome("slow"), Outcome::Leased(_)));
    assert!(matches!(outcome("fast"), Outcome::Restored));
    assert!(world.is_home());
}
