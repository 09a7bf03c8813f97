//! The allocator in a simulated world: many nodes over one store, in virtual time, from a seed.
//!
//! The code under test is the real [`Ipam`](dcenet_ipam::Ipam); simulated are the scheduler, the way to the store, and
//! the clocks. Calls are delayed and overtake each other, replies get lost, requests arrive twice, processes are killed
//! or stand still for an hour between any two calls, clocks jump, and the store restarts. An independent checker
//! ([`history`]) knows only what callers were told, and reads the store's content by itself.
//!
//! ```text
//!   runtimes, collector, operator world.rs       ADD, DEL, lost DEL, GC, migration, quarantine, expiry, blocks
//!        |                                            |
//!   Ipam (under test)                            history.rs   the judge
//!        |
//!   SimStore                      network.rs     delays, losses, doubles; planted bugs
//!        |
//!   MemoryStore or LogStore
//! ```

mod history;
mod network;
mod planted;
mod scheduler;
mod world;

use self::network::Plant;
use self::world::{Setup, run};

/// Operations of a test in all its runs: a few seconds' worth, or as many as the project promises.
fn operations() -> u64 {
    if std::env::var_os("DCENET_SOAK").is_some() { 10_000_000 } else { 40_000 }
}

#[test]
fn nothing_is_doubled_freed_or_leaked() {
    let (mut done, mut seed, mut total) = (0, 0, world::Tally::default());
    while done < operations() {
        let tally = run(&Setup { seed, ..Setup::default() }).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
        done += tally.operations();
        total += tally;
        seed += 1;
    }
    println!("{seed} worlds: {total:?}");
    // A world in which nothing goes wrong proves nothing.
    for (what, count) in total.faults().into_iter().chain(total.kinds()) {
        assert!(count > 20, "{what} happened {count} times only: {total:?}");
    }
}

#[test]
fn blocks_change_hands_and_nothing_is_doubled_freed_or_leaked() {
    let mut total = world::Tally::default();
    for seed in 0..if std::env::var_os("DCENET_SOAK").is_some() { 400 } else { 12 } {
        let setup = Setup { seed, blocks: true, ..Setup::default() };
        total += run(&setup).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
    }
    println!("{total:?}");
    assert!(total.blocks > 10 && total.completed > 5, "{total:?}");
}

#[test]
fn the_log_restarts_under_load() {
    let mut total = world::Tally::default();
    for seed in 0..6 {
        let setup = Setup { seed, on_disk: true, ..Setup::default() };
        total += run(&setup).unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
    }
    assert!(total.restarts > 6, "{total:?}");
}

#[test]
fn a_seed_gives_the_same_run() {
    let setup = Setup { seed: 7, steps: 2_000, ..Setup::default() };
    assert_eq!(run(&setup).unwrap(), run(&setup).unwrap());
}

/// Runs seeds until the bug shows; the judge's words must name what it leads to.
fn must_be_found(plant: Plant, words: &[&str]) {
    for seed in 0..200 {
        let setup = Setup { seed, plant: Some(plant), ..Setup::default() };
        if let Err(fault) = run(&setup) {
            println!("{plant:?}: seed {seed}: {fault}");
            assert!(words.iter().any(|w| fault.contains(w)), "{plant:?} was found as something else: {fault}");
            return;
        }
    }
    panic!("{plant:?} was not found in 200 worlds");
}

// The nine classes of bugs that allocators of this field had. Each is planted and must be found.

/// whereabouts#110: concurrent read, change and write of one record.
#[test]
fn planted_lost_update_is_found() {
    must_be_found(Plant::NoSlotGuards, &["two holders", "in quarantine", "is alive, and the store"]);
}

/// whereabouts#162 and #207: the list of the living was older than the reservations that it judged.
#[test]
fn planted_collection_by_stale_evidence_is_found() {
    must_be_found(Plant::StaleEvidence, &["is alive, and the store"]);
}

/// whereabouts#176, spiderpool#1187: released by a name that somebody else bears by now.
#[test]
fn planted_release_by_name_is_found() {
    must_be_found(Plant::ReleaseByName, &["is alive, and the store"]);
}

/// spiderpool#412 and #4867: two records, and a crash between them.
#[test]
fn planted_half_batches_are_found() {
    must_be_found(Plant::HalfBatches, &["is alive, and the store", "leaked", "two holders", "in quarantine", "cannot"]);
}

/// cilium#42920: who held a lock acts after it has lapsed.
#[test]
fn planted_late_lock_holder_is_found() {
    must_be_found(
        Plant::LockInsteadOfGuards,
        &["two holders", "in quarantine", "is alive, and the store", "given again"],
    );
}

/// kube-ovn#4304, amazon-vpc-cni-k8s#711: rebuilt after a restart from a source that was not complete.
#[test]
fn planted_incomplete_rebuild_is_found() {
    must_be_found(
        Plant::IncompleteRebuild,
        &["two holders", "in quarantine", "is alive, and the store", "is kept for"],
    );
}

/// cilium#46952, whereabouts#83: IPv6 addresses as 64-bit numbers.
#[test]
fn planted_low_64_bits_are_found() {
    must_be_found(Plant::Low64Bits, &["outside"]);
}

/// Spiderpool and whereabouts keep a pool in one object: everybody contends for it.
#[test]
fn planted_hot_object_is_found() {
    let busy = Setup { busy: true, ..Setup::default() };
    println!("without it: {:?}", run(&busy).unwrap());
    let fault = run(&Setup { plant: Some(Plant::HotObject), ..busy }).unwrap_err();
    assert!(fault.contains("lost races"), "{fault}");
}

/// calico#4152, amazon-vpc-cni-k8s#3887: an address is used again at once.
#[test]
fn planted_fast_reuse_is_found() {
    must_be_found(Plant::NoCooldown, &["given again"]);
}
