//! Which function somebody gets of those that can be had.

use std::path::Path;

use dcenet_sriov::PciAddress;
use dcenet_sriov::allocate::{Refusal, Request};
use dcenet_sriov::inventory::Inventory;
use dcenet_sriov::lease::{ChooseError, LeaseError, Released};
use dcenet_sriov::test_support::{Port, Profile, Tree};

use crate::world::{Dress, POD, World, owner};

/// A host with two functions, and what sysfs says of it.
fn host() -> (World, Inventory, Vec<PciAddress>) {
    let world = World::new(Profile::IGB, Dress::Plain);
    let mut tree = Tree::new(world.state.path());
    tree.port(&Port { vfs: 2, ..Port::igb("0000:01:00.0", "eth0") });
    let inventory = Inventory::scan(&tree.sysfs()).unwrap();
    let members: Vec<_> = inventory.vfs().map(|(_, vf)| vf.address).collect();
    assert_eq!(members, [world.vf.address, world.model.function(world.port, 1)]);
    (world, inventory, members)
}

#[test]
fn pods_get_one_after_the_other_and_the_last_is_told_that_there_is_none() {
    let (world, inventory, members) = host();
    let leases = world.leases();
    let wanted = world.wanted();
    let choose = |name: &str| leases.choose(&owner(name), &inventory, &members, &Request::of(1), &wanted);
    let mut numbers = Vec::new();
    for (name, member) in [("a", members[0]), ("b", members[1])] {
        let mut chosen = choose(name).unwrap();
        assert_eq!(chosen.choice.functions, [member]);
        assert!(chosen.passed_over.is_empty());
        numbers.push(chosen.leases.pop().unwrap().commit().unwrap());
    }
    match choose("c") {
        Err(ChooseError::TooFew { refusal, .. }) => assert_eq!(refusal, Refusal::TooFew { wanted: 1, free: 0 }),
        other => panic!("{other:?}"),
    }
    assert!(matches!(leases.release(&owner("a"), members[0], numbers[0]), Ok(Released::Clean)));
    assert_eq!(choose("c").unwrap().choice.functions, [members[0]]);
}

#[test]
fn what_is_worked_on_or_cannot_be_found_is_passed_over_and_both_come_or_none() {
    let (world, inventory, members) = host();
    let leases = world.leases();
    let wanted = world.wanted();
    let choose = |count| leases.choose(&owner("b"), &inventory, &members, &Request::of(count), &wanted);
    // Locked by a call that goes on, and to others as good as taken.
    let busy = leases.prepare(&owner("a"), world.vf, &wanted).unwrap();
    let chosen = choose(1).unwrap();
    assert_eq!(chosen.choice.functions, [members[1]]);
    drop(chosen);
    drop(busy);
    assert!(world.is_home());
    // Gone into a namespace that nobody knows.
    let mut lease = leases.prepare(&owner("a"), world.vf, &wanted).unwrap();
    lease.move_to(Path::new(POD), &"net1".parse().unwrap()).unwrap();
    lease.commit().unwrap();
    std::fs::remove_file(world.file()).unwrap();
    let chosen = choose(1).unwrap();
    assert_eq!(chosen.choice.functions, [members[1]]);
    assert!(matches!(chosen.passed_over[..], [LeaseError::Hidden { .. }]), "{:?}", chosen.passed_over);
    drop(chosen);
    let error = choose(2).unwrap_err();
    assert!(matches!(&error, ChooseError::TooFew { passed_over, .. } if passed_over.len() == 1), "{error}");
    assert!(leases.held().unwrap().is_empty());
}

#[test]
fn what_a_killed_call_left_is_taken_back_where_nothing_else_is_free() {
    let (world, inventory, members) = host();
    let leases = world.leases();
    let wanted = world.wanted();
    crate::adapters::kill(leases.prepare(&owner("a"), world.vf, &wanted).unwrap());
    assert!(!world.is_home());
    let choose = |count| leases.choose(&owner("b"), &inventory, &members, &Request::of(count), &wanted);
    let chosen = choose(1).unwrap();
    assert_eq!(chosen.choice.functions, [members[1]]);
    drop(chosen);
    assert!(!world.is_home());
    let chosen = choose(2).unwrap();
    assert_eq!(chosen.choice.functions, members);
    drop(chosen);
    assert!(world.is_home());
}

#[test]
fn what_one_function_refuses_is_not_tried_with_all() {
    let (world, inventory, members) = host();
    world.model.set_carrier(world.port, false);
    let leases = world.leases();
    let error = leases.choose(&owner("a"), &inventory, &members, &Request::of(1), &world.wanted()).map(drop);
    assert!(matches!(error, Err(ChooseError::Lease(LeaseError::Refused { .. }))), "{error:?}");
    assert!(!world.state.path().join("vfs").join(members[1].to_string()).exists());
    assert!(world.is_home());
}
