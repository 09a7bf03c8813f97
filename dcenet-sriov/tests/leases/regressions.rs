//! What is known to go wrong with functions that change hands, and must not.

use std::fs;
use std::path::Path;

use dcenet_sriov::kernel::{Attribute, Kernel, Namespace, NetdevChange, VfChange, VfLinkState};
use dcenet_sriov::lease::{LeaseError, Outcome, Released, Restore, Until, Wanted};
use dcenet_sriov::test_support::Profile;

use crate::world::{Dress, POD, World, mac, owner};

pub(crate) fn igb() -> World {
    World::new(Profile::IGB, Dress::Plain)
}

/// A committed lease of pod a. Returns its number.
pub(crate) fn add(world: &World) -> u64 {
    let leases = world.leases();
    let mut lease = leases.prepare(&owner("a"), world.vf, &world.wanted()).unwrap();
    let moved = lease.move_to(Path::new(POD), &"net1".parse().unwrap()).unwrap();
    assert_eq!((moved.name.as_str(), moved.up, moved.mac, moved.mtu), ("net1", true, Some(mac(0xaa)), 1400));
    lease.commit().unwrap()
}

fn release(world: &World, incarnation: u64) -> Released {
    world.leases().release(&owner("a"), world.vf.address, incarnation).unwrap()
}

fn outcome(world: &World) -> Outcome {
    world.leases().recover(|_| true).unwrap().pop().unwrap().outcome
}

#[test]
fn a_leased_function_is_what_was_wanted() {
    for profile in Profile::ALL {
        let world = World::new(profile, Dress::Plain);
        let incarnation = add(&world);
        let now = world.now().unwrap();
        let wanted = world.wanted().port;
        assert_eq!(now.settings.mac, mac(0xaa));
        assert_eq!(Some(now.settings.vlan), wanted.vlan);
        assert_eq!(now.settings.spoofchk, Some(false));
        assert_eq!(now.settings.trust, wanted.trust);
        let (at, device) = now.netdev.unwrap();
        assert_eq!(at, Some(Namespace::Path(POD.into())));
        assert!(device.all_multicast && device.up);
        let held = world.leases().held().unwrap();
        assert_eq!(held.len(), 1);
        assert!(held[0].committed && held[0].incarnation == incarnation && held[0].owner == owner("a"));
        assert!(matches!(outcome(&world), Outcome::Leased(_)));
        assert!(matches!(release(&world, incarnation), Released::Clean));
        assert!(world.is_home(), "{:?} is not {:?}", world.now(), world.home);
    }
}

#[test]
fn a_refused_setting_takes_back_what_came_before_it() {
    let world = igb();
    // The driver takes a rate only while the port has carrier; address and tag come before it.
    world.model.set_carrier(world.port, false);
    let error = world.leases().prepare(&owner("a"), world.vf, &world.wanted()).unwrap_err();
    assert!(matches!(&error, LeaseError::Refused { rollback, .. } if rollback.is_empty()), "{error}");
    assert!(error.to_string().contains("maxRate"), "{error}");
    assert!(world.is_home());
    // What is not wanted is not written, so that the driver refuses nothing.
    world.model.take_calls();
    let lease = world.leases().prepare(&owner("a"), world.vf, &Wanted::default()).map(drop);
    assert!(lease.is_ok(), "{lease:?}");
    let calls = world.model.take_calls();
    assert!(!calls.iter().any(|call| call.starts_with("configure VF")), "{calls:?}");
}

/// A driver that reports what the function told of itself looks as if the administrator had given that address.
#[test]
fn a_tenant_without_trust_keeps_the_address_that_it_was_given() {
    for profile in Profile::ALL {
        for trusted in [false, true] {
            let world = World::new(profile, Dress::Plain);
            let trust = profile.has_trust.then_some(trusted);
            let port = VfChange { mac: Some(mac(0xaa)), trust, ..VfChange::default() };
            let leases = world.leases();
            let wanted = Wanted { port, ..Wanted::default() };
            let mut lease = leases.prepare(&owner("a"), world.vf, &wanted).unwrap();
            let device = lease.move_to(Path::new(POD), &"net1".parse().unwrap()).unwrap();
            let incarnation = lease.commit().unwrap();
            let other = NetdevChange { mac: Some(mac(0x99)), ..NetdevChange::default() };
            let refused = world.model.configure_netdev(&Namespace::Path(POD.into()), device.index, &other);
            let errno = profile.mac_is_fixed.filter(|_| trust != Some(true));
            assert_eq!(refused.err().and_then(|error| error.errno), errno, "{} {trusted}", profile.driver);
            assert!(matches!(release(&world, incarnation), Released::Clean));
            assert!(world.is_home(), "{:?} is not {:?}", world.now(), world.home);
        }
    }
}

#[test]
fn a_late_release_of_the_last_owner_leaves_the_next_one_alone() {
    // Who adds and deletes in which order: every merge of the two pods' calls.
    let orders = (0_u32..64).filter(|bits| bits.count_ones() == 3);
    let mut late = 0;
    for order in orders {
        let world = igb();
        let leases = world.leases();
        let pods = [owner("a"), owner("b")];
        let mut calls = [0, 0];
        let mut incarnations = [None, None];
        let mut holder = None;
        for turn in 0..6 {
            let pod = (order >> turn & 1) as usize;
            calls[pod] += 1;
            let before = world.now();
            if calls[pod] == 1 {
                match leases.prepare(&pods[pod], world.vf, &world.wanted()) {
                    Ok(lease) => {
                        assert_eq!(holder, None);
                        incarnations[pod] = Some(lease.commit().unwrap());
                        holder = Some(pod);
                    }
                    Err(LeaseError::Taken { owner, .. }) => {
                        assert_eq!(Some(*owner), holder.map(|pod| pods[pod].clone()));
                        assert_eq!(world.now(), before);
                    }
                    Err(error) => panic!("{error}"),
                }
                continue;
            }
            // A pod that got nothing deletes with whatever number it heard of.
            let incarnation = incarnations[pod].or(incarnations[1 - pod]).unwrap_or(1);
            let released = leases.release(&pods[pod], world.vf.address, incarnation).unwrap();
            if holder == Some(pod) {
                assert!(matches!(released, Released::Clean), "{released:?}");
                assert!(world.is_home());
                holder = None;
            } else {
                assert!(matches!(released, Released::NotHeld), "{released:?}");
                assert_eq!(world.now(), before);
                late += u32::from(holder.is_some());
            }
        }
        assert!(world.is_home() && holder.is_none());
    }
    assert!(late >= 5, "{late} releases met another owner");
}

#[test]
fn a_thousand_pods_leave_it_to_the_byte_as_it_was() {
    let world = igb();
    for round in 0..1000 {
        assert!(matches!(world.live(&world.leases()), Ok(Released::Clean)), "round {round}");
        assert_eq!(world.now().as_ref(), Some(&world.home), "round {round}");
    }
    // The twin: the kernel alone brings the function back as the pod left it.
    add(&world);
    world.meddle();
    world.model.remove_namespace(POD);
    assert!(!world.is_home());
}

#[test]
fn a_dead_namespace_gives_it_back_clean_under_whatever_name() {
    for taken in [None, Some("mine")] {
        let world = igb();
        let incarnation = add(&world);
        world.meddle();
        if let Some(name) = taken {
            // The kernel calls it dev<ifindex> then.
            world.model.add_link(&Namespace::Host, name);
        }
        world.model.remove_namespace(POD);
        assert!(matches!(release(&world, incarnation), Released::Clean));
        assert!(world.is_home(), "{:?}", world.now());
    }
}

#[test]
fn a_namespace_that_somebody_holds_hides_it_until_recovery_finds_it() {
    let world = igb();
    let incarnation = add(&world);
    world.meddle();
    let held = world.model.hold_namespace(POD);
    world.model.remove_namespace(POD);
    // The same path, another pod: it is not looked for there.
    world.model.create_namespace(POD);
    let released = release(&world, incarnation);
    assert!(
        matches!(&released, Released::Quarantined(errors) if matches!(errors[..], [LeaseError::Hidden { .. }, ..] | [.., LeaseError::Hidden { .. }])),
        "{released:?}"
    );
    let refused = world.leases().prepare(&owner("b"), world.vf, &world.wanted()).map(drop);
    assert!(matches!(refused, Err(LeaseError::Quarantined { .. })), "{refused:?}");
    assert!(matches!(release(&world, incarnation), Released::NotHeld));
    assert!(matches!(outcome(&world), Outcome::Quarantined(q) if q.until == Until::Restored));
    world.model.release_namespace(held);
    assert!(matches!(outcome(&world), Outcome::Restored));
    assert!(world.is_home());
    assert!(matches!(outcome(&world), Outcome::Free));
}

#[test]
fn names_that_the_host_has_too_do_not_keep_it_in_the_pod() {
    let world = igb();
    let incarnation = add(&world);
    world.meddle();
    // Its present name and its alternative one are taken at home.
    world.model.add_link(&Namespace::Host, "mine");
    world.model.add_link(&Namespace::Host, "also-mine");
    assert!(matches!(release(&world, incarnation), Released::Clean));
    assert!(world.is_home(), "{:?}", world.now());
}

#[test]
fn its_own_name_taken_at_home_keeps_it_from_the_next_pod_until_it_is_free() {
    let world = igb();
    let incarnation = add(&world);
    let name = world.home.netdev.as_ref().unwrap().1.name.to_string();
    let other = world.model.add_link(&Namespace::Host, &name);
    let released = release(&world, incarnation);
    assert!(matches!(&released, Released::Quarantined(_)), "{released:?}");
    // Home, though, and in all else clean.
    let now = world.now().unwrap();
    assert_eq!(now.settings, world.home.settings);
    assert_eq!(now.netdev.unwrap().0, Some(Namespace::Host));
    let rename = NetdevChange { name: Some("other".parse().unwrap()), ..NetdevChange::default() };
    world.model.configure_netdev(&Namespace::Host, other, &rename).unwrap();
    assert!(matches!(outcome(&world), Outcome::Restored));
    assert!(world.is_home());
}

#[test]
fn a_function_that_went_is_forgotten_and_its_successor_is_seen_anew() {
    let world = igb();
    let incarnation = add(&world);
    world.model.write_vf_count(world.vf.port, 0).unwrap();
    assert!(matches!(release(&world, incarnation), Released::Gone));
    world.model.write_vf_count(world.vf.port, 2).unwrap();
    // Time passes by calls, and devices appear.
    world.model.netdevs(&Namespace::Host, world.vf.address).unwrap();
    let successor = crate::world::look(&world.model, world.vf.address);
    assert!(matches!(outcome(&world), Outcome::Forgotten));
    assert!(matches!(world.live(&world.leases()), Ok(Released::Clean)));
    assert_eq!(world.now(), successor);
}

#[test]
fn a_function_whose_driver_was_bound_anew_under_the_pod_is_restored() {
    let world = igb();
    let incarnation = add(&world);
    world.model.set_delay(3);
    world.model.unbind(world.vf.address).unwrap();
    world.model.bind(world.vf.address, Profile::IGB.vf_driver).unwrap();
    assert!(matches!(release(&world, incarnation), Released::Clean));
    assert!(world.is_home(), "{:?}", world.now());
}

/// The twin is the device that somebody hides, of which DEL says that the pod may have it still.
#[test]
fn a_driver_that_makes_no_device_leaves_it_to_nobody() {
    let world = igb();
    let incarnation = add(&world);
    let anew = |delay| {
        world.model.unbind(world.vf.address).unwrap();
        world.model.set_delay(delay);
        world.model.bind(world.vf.address, Profile::IGB.vf_driver).unwrap();
    };
    anew(u64::MAX);
    let released = release(&world, incarnation);
    let none = |errors: &[LeaseError]| errors.iter().any(|error| matches!(error, LeaseError::NoDevice { .. }));
    assert!(matches!(&released, Released::Quarantined(errors) if none(errors)), "{released:?}");
    assert_eq!(world.leases().lost().unwrap(), []);
    assert!(matches!(outcome(&world), Outcome::Quarantined(q) if q.until == Until::Restored));
    anew(0);
    assert!(matches!(outcome(&world), Outcome::Restored));
    assert!(world.is_home());
}

#[test]
fn an_unreadable_record_puts_it_into_quarantine_until_a_person_has_looked() {
    let world = igb();
    add(&world);
    let damaged: Vec<u8> = world.bytes().iter().map(|b| if *b == b':' { b'?' } else { *b }).collect();
    assert!(world.leases().quarantined().unwrap().is_empty());
    fs::write(world.file(), &damaged).unwrap();
    assert_eq!(world.leases().quarantined().unwrap(), [world.vf.address].into());
    let refused = world.leases().prepare(&owner("b"), world.vf, &Wanted::default()).map(drop);
    assert!(matches!(refused, Err(LeaseError::Quarantined { .. })), "{refused:?}");
    let aside = world.file().with_file_name(format!("{}.unreadable-1", world.vf.address));
    assert_eq!(fs::read(aside).unwrap(), damaged);
    assert!(matches!(outcome(&world), Outcome::Quarantined(q) if q.until == Until::Readmitted));
    assert_eq!(world.leases().quarantined().unwrap(), [world.vf.address].into());
    // It is hidden in the pod as yet.
    assert!(matches!(world.leases().readmit(world.vf), Err(LeaseError::Hidden { .. })));
    world.model.remove_namespace(POD);
    world.leases().readmit(world.vf).unwrap();
    assert!(matches!(outcome(&world), Outcome::Free) && world.leases().quarantined().unwrap().is_empty());
}

#[test]
fn after_a_reboot_nothing_is_restored_that_the_reboot_has_undone() {
    let world = igb();
    let incarnation = add(&world);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let text = String::from_utf8(world.bytes()).unwrap();
    fs::write(world.file(), text.replace(boot.trim(), "00000000-0000-0000-0000-000000000000")).unwrap();
    let before = world.now();
    assert!(world.leases().held().unwrap().is_empty());
    assert!(matches!(release(&world, incarnation), Released::Gone));
    assert_eq!(world.now(), before);
}

#[test]
fn defaults_take_away_what_the_function_had_when_it_was_first_seen() {
    let world = World::new(Profile::MLX5, Dress::Dressed);
    let trusted = VfChange { trust: Some(true), spoofchk: Some(false), ..VfChange::default() };
    world.model.configure_vf(world.port, world.vf.index, &trusted).unwrap();
    let leases = world.leases().with_restore(Restore::Defaults);
    assert!(matches!(world.live(&leases), Ok(Released::Clean)));
    let settings = world.now().unwrap().settings;
    assert_eq!((settings.vlan.id, settings.trust, settings.spoofchk), (None, Some(false), Some(true)));
}

#[test]
fn a_lease_that_is_dropped_is_taken_back() {
    let world = igb();
    let leases = world.leases();
    let mut lease = leases.prepare(&owner("a"), world.vf, &world.wanted()).unwrap();
    lease.move_to(Path::new(POD), &"net1".parse().unwrap()).unwrap();
    assert!(!world.is_home());
    // Nobody else works on it meanwhile.
    assert!(matches!(leases.prepare(&owner("b"), world.vf, &world.wanted()), Err(LeaseError::Ledger(_))));
    drop(lease);
    assert!(world.is_home());
    assert!(leases.held().unwrap().is_empty());
}

/// The port's fence is the tenant's own as long as the device is.
#[test]
fn a_tenant_that_keeps_the_device_gets_no_other_network() {
    for profile in Profile::ALL {
        let world = World::new(profile, Dress::Plain);
        let incarnation = add(&world);
        let leased = world.now().unwrap().settings;
        let held = world.model.hold_namespace(POD);
        world.model.remove_namespace(POD);
        assert!(matches!(release(&world, incarnation), Released::Quarantined(_)));
        for _ in 0..2 {
            let kept = world.now().unwrap().settings;
            assert_eq!((kept.vlan, kept.rate, kept.mac), (leased.vlan, leased.rate, leased.mac), "{}", profile.driver);
            assert_eq!((kept.spoofchk, kept.trust), (Some(true), profile.has_trust.then_some(false)));
            assert_eq!(kept.link_state == VfLinkState::Disable, !profile.no_link_state, "{}", profile.driver);
            assert!(matches!(outcome(&world), Outcome::Quarantined(_)));
        }
        world.model.release_namespace(held);
        assert!(matches!(outcome(&world), Outcome::Restored));
        assert!(world.is_home(), "{:?}", world.now());
    }
}

#[test]
fn a_device_that_could_not_be_moved_is_fetched_later_from_where_it_was_left() {
    let world = igb();
    let incarnation = add(&world);
    let vlan = world.now().unwrap().settings.vlan;
    world.model.refuse_moves(Some(libc::ENOMEM));
    assert!(matches!(release(&world, incarnation), Released::Quarantined(_)));
    assert_eq!(world.now().unwrap().settings.vlan, vlan);
    assert!(matches!(outcome(&world), Outcome::Quarantined(_)));
    world.model.refuse_moves(None);
    assert!(matches!(outcome(&world), Outcome::Restored));
    assert!(world.is_home(), "{:?}", world.now());
}

#[test]
fn a_recovery_that_finds_nothing_new_writes_nothing_and_waits_for_nothing() {
    let world = igb();
    let incarnation = add(&world);
    let held = world.model.hold_namespace(POD);
    world.model.remove_namespace(POD);
    assert!(matches!(release(&world, incarnation), Released::Quarantined(_)));
    outcome(&world);
    let before = world.bytes();
    let patience = std::time::Duration::from_secs(300);
    let begin = std::time::Instant::now();
    for _ in 0..20 {
        let all = world.leases().with_patience(patience).recover(|_| true).unwrap();
        assert!(matches!(all[0].outcome, Outcome::Quarantined(_)), "{all:?}");
    }
    assert!(begin.elapsed() < patience);
    assert_eq!(world.bytes().len(), before.len());
    world.model.release_namespace(held);
    assert!(matches!(outcome(&world), Outcome::Restored));
}

#[test]
fn a_device_whose_present_and_own_names_are_both_taken_comes_home_under_a_third() {
    let world = igb();
    let incarnation = add(&world);
    world.meddle();
    let own = world.home.netdev.as_ref().unwrap().1.name.to_string();
    let other = world.model.add_link(&Namespace::Host, &own);
    world.model.add_link(&Namespace::Host, "mine");
    assert!(matches!(release(&world, incarnation), Released::Quarantined(_)));
    let now = world.now().unwrap();
    assert_eq!(now.settings, world.home.settings);
    assert_eq!(now.netdev.unwrap().0, Some(Namespace::Host));
    let rename = NetdevChange { name: Some("other".parse().unwrap()), ..NetdevChange::default() };
    world.model.configure_netdev(&Namespace::Host, other, &rename).unwrap();
    assert!(matches!(outcome(&world), Outcome::Restored));
    assert!(world.is_home(), "{:?}", world.now());
}

#[test]
fn what_the_driver_cannot_set_or_does_not_tell_is_refused_before_anything_is_written() {
    let mut profile = Profile::MLX5;
    profile.has_spoofchk = false;
    let world = World::new(profile, Dress::Plain);
    let before = world.now();
    let mut wanted = world.wanted();
    wanted.port.spoofchk = Some(true);
    let error = world.leases().prepare(&owner("a"), world.vf, &wanted).map(drop).unwrap_err();
    let is_of = |error: &LeaseError, attribute: Attribute| matches!(error, LeaseError::Unsupported { source, .. } if source.attribute == attribute);
    assert!(is_of(&error, Attribute::Spoofchk), "{error}");
    assert_eq!(world.now(), before);
    assert!(world.leases().held().unwrap().is_empty());
    // Nor what is known of the driver though it tells of it.
    let world_of_igb = igb();
    let mut refused = world_of_igb.wanted();
    refused.port.link_state = Some(VfLinkState::Disable);
    let error = world_of_igb.leases().prepare(&owner("a"), world_of_igb.vf, &refused).map(drop).unwrap_err();
    assert!(is_of(&error, Attribute::LinkState), "{error}");
    // Who asks for what is told gets it.
    wanted.port.spoofchk = None;
    drop(world.leases().prepare(&owner("a"), world.vf, &wanted).unwrap());
}
