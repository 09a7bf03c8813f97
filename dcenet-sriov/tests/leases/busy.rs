//! Drivers that are not done when they say so, or cannot do what others can.

use std::time::{Duration, Instant};

use dcenet_sriov::kernel::{ErrorClass, Kernel};
use dcenet_sriov::lease::{LeaseError, Outcome, Released};
use dcenet_sriov::test_support::Profile;

use crate::regressions::{add, igb};
use crate::world::{Dress, World, owner};

/// Longer than any machine needs.
const LONG: Duration = Duration::from_secs(300);

/// The twin has no patience.
#[test]
fn a_driver_that_is_busy_after_each_write_is_waited_for() {
    for profile in [Profile::I40E, Profile::IGB] {
        for patience in [LONG, Duration::ZERO] {
            let world = World::new(profile, Dress::Plain);
            world.model.be_busy_after_writes(world.port, 200);
            let outcome = world.live(&world.leases().with_patience(patience));
            let clean = matches!(outcome, Ok(Released::Clean));
            assert_eq!(clean, patience == LONG, "{}: {outcome:?}", profile.driver);
            assert_eq!(world.is_home(), clean, "{:?}", world.now());
        }
    }
}

/// The twin has no patience.
#[test]
fn an_address_that_is_taken_over_later_is_waited_for() {
    for patience in [LONG, Duration::ZERO] {
        let world = World::new(Profile::MLX5, Dress::Plain);
        world.model.take_addresses_late(100);
        let outcome = world.live(&world.leases().with_patience(patience));
        assert_eq!(matches!(outcome, Ok(Released::Clean)), patience == LONG, "{outcome:?}");
        assert!(patience.is_zero() || world.is_home(), "{:?}", world.now());
    }
}

/// The twin has no patience.
#[test]
fn a_function_that_its_driver_withholds_for_a_while_can_be_had() {
    for patience in [LONG, Duration::ZERO] {
        let world = World::new(Profile::I40E, Dress::Plain);
        world.model.withhold(world.vf.address, true);
        let leases = world.leases().with_patience(patience);
        let prepared = std::thread::scope(|scope| {
            let prepared = scope.spawn(|| leases.prepare(&owner("a"), world.vf, &world.wanted()).map(drop));
            if patience == LONG {
                std::thread::sleep(Duration::from_millis(20));
                world.model.withhold(world.vf.address, false);
            }
            prepared.join().unwrap()
        });
        match prepared {
            Ok(()) => assert!(patience == LONG && world.is_home()),
            Err(LeaseError::Kernel(error)) => {
                assert!(patience.is_zero() && error.class == ErrorClass::NotReported, "{error}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_device_that_comes_without_an_event_is_found_all_the_same() {
    let world = igb();
    let incarnation = add(&world);
    world.model.set_delay(12);
    world.model.be_deaf();
    world.model.unbind(world.vf.address).unwrap();
    world.model.bind(world.vf.address, Profile::IGB.vf_driver).unwrap();
    let begin = Instant::now();
    let released = world.leases().with_patience(LONG).release(&owner("a"), world.vf.address, incarnation);
    assert!(matches!(released, Ok(Released::Clean)), "{released:?}");
    assert!(world.is_home() && begin.elapsed() < LONG);
}

#[test]
fn a_driver_that_cannot_take_an_address_away_is_asked_once() {
    let mut profile = Profile::MLX5;
    profile.refuses_zero_mac = true;
    let world = World::new(profile, Dress::Plain);
    let own = world.home.netdev.as_ref().unwrap().1.mac;
    assert!(world.home.settings.mac.bytes() == [0; 6] && own.is_some());
    for round in 0..2 {
        assert!(matches!(world.live(&world.leases()), Ok(Released::Clean)), "round {round}");
        let now = world.now().unwrap();
        assert_eq!((Some(now.settings.mac), now.netdev), (own, world.home.netdev.clone()), "round {round}");
        world.model.take_calls();
        let outcome = world.leases().recover(|_| true).unwrap().pop().unwrap().outcome;
        assert!(matches!(outcome, Outcome::Free), "{outcome:?}");
        let calls = world.model.take_calls();
        assert!(!calls.iter().any(|call| call.starts_with("configure VF")), "{calls:?}");
    }
}
