//! What endpoints have in common, and what one of them must not keep from others.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::loader::{AyaLoader, LoadError, LoadRequest, Loaded, Loader};
use dcenet_policy::enforcer::{PolicyConfig, Tools};
use dcenet_policy::target::Tc;

use crate::inside::ready;
use crate::world::*;

/// How long is waited for what a machine that has much else to do must come to.
const LONG: Duration = Duration::from_secs(60);

/// Counts the tables that loads make.
struct Tables(Arc<AtomicUsize>);

impl Loader for Tables {
    fn load(&self, elf: &[u8], request: &LoadRequest<'_>) -> Result<Loaded, LoadError> {
        let loaded = AyaLoader.load(elf, request)?;
        let is_given = |name: &str| request.maps.iter().any(|(given, _)| *given == name);
        let is_table = |name: &str| name == "policy_in" || name == "policy_out";
        let made = loaded.maps.iter().filter(|(name, _)| is_table(name) && !is_given(name)).count();
        self.0.fetch_add(made, Ordering::SeqCst);
        Ok(loaded)
    }
}

#[test]
fn pods_with_the_same_policies_walk_the_same_table() {
    if !ready() {
        return;
    }
    let made = Arc::new(AtomicUsize::new(0));
    let mut world = World::of_macvlans(PolicyConfig::default());
    let tables = Tools {
        loader: Arc::new(Tables(Arc::clone(&made))),
        lowering: Arc::new(Tc::new(Sizes::small()).code_arms(0)),
        ..tools()
    };
    let owner = world.open(tables);
    assert!(owner.start().unwrap().is_complete());
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    // What a table holds is of the policies' own peers, so that those are there first.
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("scan", 3, &[]);
    assert_eq!(made.load(Ordering::SeqCst), 0, "nobody is under a policy that takes a table");
    world.add_enforced("db", 4, &[("app", "db")]);
    assert_eq!(made.load(Ordering::SeqCst), 1);
    world.add_enforced("db2", 5, &[("app", "db")]);
    assert_eq!(made.load(Ordering::SeqCst), 1, "a copy for another pod with the same policies");
    for name in ["db", "db2"] {
        world.udp("web", name, 5353, true);
        world.udp("scan", name, 5353, false);
    }
    // The table stays as long as anybody walks it.
    world.delete("db");
    world.udp("web", "db2", 5353, true);
    world.udp("scan", "db2", 5353, false);
    // Another policy is another table.
    let other = DB.replace("port: 5353", "port: 5354");
    assert!(owner.set_policies(policies(&other)).unwrap().is_complete());
    assert_eq!(made.load(Ordering::SeqCst), 2);
    world.udp("web", "db2", 5354, true);
    world.udp("web", "db2", 5353, false);
    owner.uninstall().unwrap();
}

/// Holds up one load once it is told to, until it is let go on.
#[derive(Default)]
struct Gate {
    is_armed: AtomicBool,
    is_open: Mutex<bool>,
    changed: Condvar,
    held: AtomicUsize,
}

impl Gate {
    fn pass(&self) {
        if self.is_armed.swap(false, Ordering::SeqCst) {
            self.held.fetch_add(1, Ordering::SeqCst);
            let is_open = self.is_open.lock().unwrap();
            let waited = self.changed.wait_timeout_while(is_open, LONG, |is_open| !*is_open).unwrap();
            assert!(!waited.1.timed_out(), "nobody was admitted meanwhile");
        }
    }

    fn open(&self) {
        *self.is_open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

struct Gated(Arc<Gate>);

impl Loader for Gated {
    fn load(&self, elf: &[u8], request: &LoadRequest<'_>) -> Result<Loaded, LoadError> {
        self.0.pass();
        AyaLoader.load(elf, request)
    }
}

/// Programs of one pod in the loader keep no other pod from being admitted.
#[test]
fn a_pod_is_admitted_while_programs_of_another_are_loaded() {
    if !ready() {
        return;
    }
    let gate = Arc::new(Gate::default());
    let world = World::of_macvlans(PolicyConfig::default());
    // Not started: what is loaded is default programs, at an admission.
    let owner = world.open(Tools { loader: Arc::new(Gated(Arc::clone(&gate))), ..tools() });
    gate.is_armed.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let late = scope.spawn(|| world.attach("late", 2, &[]).unwrap());
        while gate.held.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let soon = world.attach("soon", 3, &[]).unwrap();
        assert!(!late.is_finished());
        gate.open();
        drop((soon, late.join().unwrap()));
    });
    owner.uninstall().unwrap();
}

/// One that goes before its new owner has carried anything out gives its slot back as others do.
#[test]
fn the_slot_of_who_goes_before_an_owner_begins_is_free_again() {
    if !require(Rung::Kernel) {
        return;
    }
    let two = || Tools { lowering: Arc::new(Tc::new(Sizes { endpoints: 3, ..Sizes::small() })), ..tools() };
    let mut world = World::new();
    let owner = world.open(two());
    assert!(owner.start().unwrap().is_complete());
    world.add_enforced("db", 2, &[]);
    world.add_enforced("web", 3, &[]);
    drop(owner);
    let owner = world.open(two());
    world.delete("web");
    assert!(owner.start().unwrap().is_complete());
    world.add_enforced("scan", 4, &[]);
    // The twin: a third has no room.
    world.add("other", 5, &[]);
    assert!(world.await_enforced("other", Duration::from_millis(1)).is_err());
    assert!(owner.endpoints().iter().any(|status| status.attachment == key("other") && status.slot.is_none()));
    owner.uninstall().unwrap();
}
