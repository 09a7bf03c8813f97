//! Functions that a program of their owner drives, on the modelled kernel.

use std::path::Path;

use dcenet_sriov::kernel::{DriverState, Kernel};
use dcenet_sriov::lease::{LeaseError, Outcome, Released, Wanted};
use dcenet_sriov::test_support::{Fault, Profile};

use crate::crashes::{faulty, recover};
use crate::world::{Dress, World, owner};

#[test]
fn a_program_gets_the_function_and_the_driver_that_it_had_comes_back() {
    for profile in Profile::ALL {
        let world = World::new(profile, Dress::Dressed);
        let leases = world.leases();
        let lease = leases.prepare(&owner("a"), world.vf, &world.wanted_by_program()).unwrap();
        assert_eq!(lease.link(), None);
        let group = lease.iommu_group().unwrap();
        let [all, own] = group.files();
        assert_eq!((all.as_path(), group.functions.as_slice()), (Path::new("/dev/vfio/vfio"), &[world.vf.address][..]));
        assert_eq!(own, Path::new("/dev/vfio").join(group.number.to_string()));
        let incarnation = lease.commit().unwrap();
        let now = world.now().unwrap();
        let vfio = Some("vfio-pci".to_owned());
        assert_eq!(now.driver, DriverState { driver: vfio.clone(), driver_override: vfio });
        assert_eq!((now.netdev, now.settings.vlan.id.map(|id| id.get())), (None, Some(100)), "{}", profile.driver);
        // The twin.
        assert!(!world.is_home());
        let released = leases.release(&owner("a"), world.vf.address, incarnation);
        assert!(matches!(released, Ok(Released::Clean)), "{}: {released:?}", profile.driver);
        assert!(world.is_home(), "{:?}", world.now());
    }
}

#[test]
fn what_a_program_may_not_have_is_refused_before_anything_is_changed() {
    let world = World::new(Profile::IGB, Dress::Dressed);
    let (leases, other) = (world.leases(), world.model.function(world.port, 1));
    let refusal = |wanted: &Wanted| {
        let error = leases.prepare(&owner("a"), world.vf, wanted).map(drop).unwrap_err();
        assert!(world.is_home() && leases.held().unwrap().is_empty(), "{error}");
        error
    };
    let by_kernel = Wanted { driver: Some("igbvf".to_owned()), ..world.wanted_by_program() };
    assert!(matches!(refusal(&by_kernel), LeaseError::NotVfio { driver, .. } if driver == "igbvf"));
    world.model.set_group(world.vf.address, None);
    assert!(matches!(refusal(&world.wanted_by_program()), LeaseError::NoIommuGroup { .. }));
    world.model.set_group(world.vf.address, Some(7));
    world.model.set_group(other, Some(7));
    let error = refusal(&world.wanted_by_program());
    assert!(matches!(&error, LeaseError::SharedGroup { group: 7, others, .. } if *others == [other]), "{error}");
    assert!(error.to_string().contains(&format!("shares IOMMU group 7 with {other};")), "{error}");
    // A driver that is not loaded is met at the binding, and the one before is back.
    world.model.set_group(other, Some(8));
    let absent = Wanted { driver: Some("mlx5_vfio_pci".to_owned()), ..world.wanted_by_program() };
    assert!(matches!(refusal(&absent), LeaseError::Refused { rollback, .. } if rollback.is_empty()));
    // The twin.
    assert!(matches!(world.live_by_program(&leases), Ok(Released::Clean)));
}

#[test]
fn a_function_is_not_taken_from_a_program_that_has_it_open_and_is_when_that_ends() {
    let world = World::new(Profile::IGB, Dress::Plain);
    let leases = world.leases();
    let incarnation = leases.prepare(&owner("a"), world.vf, &world.wanted_by_program()).unwrap().commit().unwrap();
    world.model.set_open(world.vf.address, true);
    let released = leases.release(&owner("a"), world.vf.address, incarnation);
    assert!(matches!(released, Ok(Released::Quarantined(_))), "{released:?}");
    let now = world.model.driver(world.vf.address).unwrap();
    assert_eq!(now.driver.as_deref(), Some("vfio-pci"));
    // It is held to its VLAN as long.
    assert_eq!(world.now().unwrap().settings.vlan.id.map(|id| id.get()), Some(100));
    assert!(leases.prepare(&owner("b"), world.vf, &world.wanted()).is_err());
    assert!(matches!(recover(&world), Outcome::Quarantined(_)));
    world.model.set_open(world.vf.address, false);
    assert!(matches!(recover(&world), Outcome::Restored));
    assert!(world.is_home(), "{:?}", world.now());
}

#[test]
fn a_kill_at_every_call_gives_the_driver_back_after_recovery() {
    for profile in [Profile::IGB, Profile::MLX5] {
        let (mut kills, mut unclean) = (0, 0);
        'fault: for fault in [Fault::Die, Fault::DieAfter, Fault::Fail(libc::EBUSY), Fault::Lose] {
            for call in 1.. {
                let world = World::new(profile, Dress::Dressed);
                if faulty(&world, call, fault, World::live_by_program).is_none() {
                    continue 'fault;
                }
                kills += 1;
                unclean += u32::from(!world.is_home());
                let outcome = recover(&world);
                let good = matches!(outcome, Outcome::Free | Outcome::Restored | Outcome::Forgotten);
                assert!(good, "{} {fault:?} at call {call}: {outcome:?}", profile.driver);
                assert_eq!(world.now().as_ref(), Some(&world.home), "{} {fault:?} at call {call}", profile.driver);
            }
        }
        eprintln!("{}: {kills} faults, {unclean} unclean before recovery", profile.driver);
        assert!(kills > 60 && unclean * 4 > kills);
    }
}
