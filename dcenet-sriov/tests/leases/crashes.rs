//! Kills and refusals at every call, and what is left of a ledger.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::{Arc, Once};

use dcenet_sriov::lease::{LeaseError, Leases, Outcome, Released};
use dcenet_sriov::test_support::{Fault, FlakyKernel, Profile};

use crate::world::{Dress, World, owner};

/// All kinds of hosts.
fn hosts() -> impl Iterator<Item = (Profile, Dress)> {
    Profile::ALL.into_iter().flat_map(|profile| [(profile, Dress::Plain), (profile, Dress::Dressed)])
}

/// Lives with a fault at a call. `None` where the call was never reached.
fn live_with(world: &World, call: u64, fault: Fault) -> Option<bool> {
    faulty(world, call, fault, World::live)
}

/// As [`live_with`], of a life of this kind.
pub(crate) fn faulty(
    world: &World,
    call: u64,
    fault: Fault,
    live: impl Fn(&World, &Leases) -> Result<Released, LeaseError>,
) -> Option<bool> {
    // Deaths that are wanted would fill the output.
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let tell = take_hook();
        set_hook(Box::new(move |panic| {
            if panic.payload_as_str() != Some(FlakyKernel::DEATH) {
                tell(panic);
            }
        }));
    });
    let flaky = Arc::new(FlakyKernel::new(world.model.clone(), call, fault));
    let leases = world.leases_on(flaky.clone());
    let outcome = catch_unwind(AssertUnwindSafe(|| live(world, &leases)));
    if flaky.calls() < call {
        assert!(matches!(outcome, Ok(Ok(Released::Clean))), "{outcome:?}");
        return None;
    }
    assert_eq!(outcome.is_err(), flaky.is_dead());
    Some(matches!(outcome, Ok(Ok(Released::Clean))))
}

pub(crate) fn recover(world: &World) -> Outcome {
    let mut all = world.leases().recover(|_| false).unwrap();
    assert!(all.len() <= 1, "{all:?}");
    all.pop().map_or(Outcome::Free, |recovered| recovered.outcome)
}

#[test]
fn a_kill_at_every_call_leaves_nothing_after_recovery_and_the_twins_without_it_do() {
    for (profile, dress) in hosts() {
        let (mut kills, mut unclean, mut without_ledger) = (0, 0, 0);
        'fault: for fault in [Fault::Die, Fault::DieAfter] {
            for call in 1.. {
                let world = World::new(profile, dress);
                if live_with(&world, call, fault).is_none() {
                    continue 'fault;
                }
                kills += 1;
                unclean += u32::from(!world.is_home());
                let at = || format!("{} {dress:?}, {fault:?} at call {call}", profile.driver);
                let outcome = recover(&world);
                assert!(
                    matches!(outcome, Outcome::Free | Outcome::Restored | Outcome::Forgotten),
                    "{}: {outcome:?}",
                    at()
                );
                assert_eq!(world.now().as_ref(), Some(&world.home), "{}", at());
                assert!(world.leases().held().unwrap().is_empty(), "{}", at());
                // Once more changes nothing, and the function can be had.
                assert!(matches!(recover(&world), Outcome::Free | Outcome::Forgotten), "{}", at());
                assert!(matches!(world.live(&world.leases()), Ok(Released::Clean)), "{}", at());
                assert!(world.is_home(), "{}", at());
                // The twin: as above, but nothing was written down.
                let world = World::new(profile, dress);
                live_with(&world, call, fault);
                drop(fs::remove_file(world.file()));
                recover(&world);
                without_ledger += u32::from(!world.is_home());
            }
        }
        eprintln!(
            "{} {dress:?}: {kills} kills, {unclean} unclean before recovery, {without_ledger} without a ledger",
            profile.driver
        );
        assert!(kills > 60 && unclean * 3 > kills && without_ledger * 3 > kills);
    }
}

#[test]
fn a_ledger_cut_at_every_byte_that_a_kill_can_leave_still_brings_the_function_home() {
    let (profile, dress) = (Profile::IGB, Dress::Dressed);
    let mut cuts = 0;
    let mut before = 0;
    for call in 1.. {
        // What is written between the last call and this one may have been cut anywhere.
        let world = World::new(profile, dress);
        let reached = live_with(&world, call, Fault::Die).is_some();
        let whole = world.bytes();
        for len in before..whole.len() {
            let world = World::new(profile, dress);
            live_with(&world, call, Fault::Die);
            let bytes = world.bytes();
            // Numbers differ in value, not in length.
            assert_eq!(bytes.len(), whole.len());
            fs::write(world.file(), &bytes[..len]).unwrap();
            let outcome = recover(&world);
            assert!(
                matches!(outcome, Outcome::Free | Outcome::Restored | Outcome::Forgotten),
                "call {call}, cut at {len}: {outcome:?}"
            );
            assert_eq!(world.now().as_ref(), Some(&world.home), "call {call}, cut at {len}");
            assert!(matches!(world.live(&world.leases()), Ok(Released::Clean)), "call {call}, cut at {len}");
            assert!(world.is_home(), "call {call}, cut at {len}");
            cuts += 1;
        }
        before = whole.len();
        if !reached {
            break;
        }
    }
    eprintln!("{cuts} cuts");
    assert!(cuts > 500);
}

#[test]
fn a_refusal_or_a_lost_reply_at_every_call_is_told_or_made_good() {
    for (profile, dress) in hosts() {
        let (mut faults, mut told) = (0, 0);
        'fault: for fault in [Fault::Fail(libc::EIO), Fault::Fail(libc::EBUSY), Fault::Lose] {
            for call in 1.. {
                let world = World::new(profile, dress);
                let Some(clean) = live_with(&world, call, fault) else { continue 'fault };
                faults += 1;
                let at = || format!("{} {dress:?}, {fault:?} at call {call}", profile.driver);
                told += u32::from(!clean);
                if clean {
                    assert_eq!(world.now().as_ref(), Some(&world.home), "{}", at());
                } else if !world.is_home() {
                    // Nobody gets it before it is restored.
                    let leases = world.leases();
                    if leases.prepare(&owner("b"), world.vf, &world.wanted()).map(drop).is_ok() {
                        assert!(world.is_home(), "{}", at());
                    }
                }
                let outcome = recover(&world);
                assert!(
                    matches!(outcome, Outcome::Free | Outcome::Restored | Outcome::Forgotten),
                    "{}: {outcome:?}",
                    at()
                );
                assert_eq!(world.now().as_ref(), Some(&world.home), "{}", at());
            }
        }
        eprintln!("{} {dress:?}: {faults} faults, {told} told", profile.driver);
        assert!(faults > 90 && told > 0);
    }
}

#[test]
fn a_kill_of_the_recovery_too_leaves_nothing_after_the_next_one() {
    let mut kills = 0;
    for first in (1..).step_by(3) {
        for second in 1.. {
            let world = World::new(Profile::IGB, Dress::Dressed);
            if live_with(&world, first, Fault::DieAfter).is_none() {
                eprintln!("{kills} kills of a recovery");
                assert!(kills > 100);
                return;
            }
            let flaky = Arc::new(FlakyKernel::new(world.model.clone(), second, Fault::DieAfter));
            let leases = world.leases_on(flaky.clone());
            let outcome = catch_unwind(AssertUnwindSafe(|| leases.recover(|_| false).map(drop)));
            if flaky.calls() < second {
                assert!(matches!(outcome, Ok(Ok(()))), "{outcome:?}");
                break;
            }
            kills += 1;
            let outcome = recover(&world);
            assert!(matches!(outcome, Outcome::Free | Outcome::Restored | Outcome::Forgotten), "{outcome:?}");
            assert_eq!(world.now().as_ref(), Some(&world.home), "kills at {first} and {second}");
        }
    }
}
