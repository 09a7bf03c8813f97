//! What every [`Attacher`] must do, on real devices. [`conforms`] runs all but three: that a program outlives its process needs
//! a child, [`outlives_its_process`], and `survives_faults` and `survives_kills` the feature `fault-injection`. They need the
//! rung `kernel` and panic at the first breach.
//!
//! ```no_run
//! use dcenet_core::test_support::TestNetNs;
//! use dcenet_ebpf::attach::ClsactAttacher;
//! use dcenet_ebpf::attach::conformance::{self, PairKind, Subject};
//! use dcenet_ebpf::loader::AyaLoader;
//! use dcenet_ebpf::object::ProgramKind;
//!
//! let state = |host: &TestNetNs| host.sh("tc qdisc show dev h0; tc filter show dev h0 ingress 2>/dev/null || true");
//! let (pair, takes) = (PairKind::Veth, ProgramKind::Classifier);
//! conformance::conforms(&Subject { attacher: &ClsactAttacher, loader: &AyaLoader, state: &state, pair, takes });
//! ```

#![expect(clippy::unwrap_used, reason = "a suite of tests fails by panicking")]

mod overtaken;
mod pair;
mod programs;

use std::process::{Child, Command, Stdio};

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dcenet_core::model::IfIndex;
use dcenet_core::test_support::{TestNetNs, effort};

pub use self::overtaken::a_replacement_at_the_same_time_is_not_ahead_of_ours;
use self::pair::{FLOOD, PATIENCE, Receiver, Sender, WAYS, flood, flood_over_up};
pub use self::pair::{Pair, PairKind};
use self::programs::{ALLOWED, DENIED, allow_one_port, answer, counting_deny, counts};
pub use self::programs::{constant, constant_of, deny};
use super::flaky::{Failure, FlakyAttacher};
use super::{AttachError, Attached, Attacher, Direction, Hook, Owner, Via, everything, verdict};
use crate::loader::Loader;
use crate::maps::{Array, Map};
use crate::object::ProgramKind;
use crate::program::{Program, TestRun};

/// A backend, and how to look at what it does.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The backend.
    pub attacher: &'a dyn Attacher,
    /// Loads what is attached.
    pub loader: &'a dyn Loader,
    /// What is on the device `h0` of a namespace, and all else that the backend may leave, told by other means than the
    /// backend's: the same text where nothing has changed.
    pub state: &'a (dyn Fn(&TestNetNs) -> String + Sync),
    /// What the device is an end of.
    pub pair: PairKind,
    /// The kind of program that the backend takes. XDP runs on [`Direction::Ingress`] alone.
    pub takes: ProgramKind,
}

impl Subject<'_> {
    fn constant(&self, name: &str, value: i32) -> Program {
        constant_of(self.takes, name, value)
    }

    fn deny(&self) -> Program {
        self.constant("deny", verdict::SHOT)
    }

    fn directions(&self) -> &'static [Direction] {
        match self.takes {
            ProgramKind::Xdp => &[Direction::Ingress],
            _ => &[Direction::Ingress, Direction::Egress],
        }
    }

    /// The last one.
    fn direction(&self) -> Direction {
        self.directions()[self.directions().len() - 1]
    }
}

/// Attaches, replaces and detaches, under floods and without.
///
/// # Panics
/// At the first breach.
pub fn conforms(subject: &Subject<'_>) {
    the_device_is_left_as_it_was(subject);
    what_others_have_attached_stays(subject);
    a_replacement_at_the_same_time_is_not_ahead_of_ours(subject);
    an_index_means_the_device_in_the_callers_namespace(subject);
    unfit_requests_are_told_apart(subject);
    what_is_attached_goes_with_its_device(subject);
    a_repeated_call_mends_a_failed_one(subject);
    nothing_passes_before_the_device_is_up(subject);
    the_other_way_is_denied_from_the_start_too(subject);
    nothing_leaks_and_nothing_is_lost_while_replaced(subject);
}

/// A flood that begins before the device is up meets the program, every packet of it.
///
/// # Panics
/// At the first breach.
pub fn nothing_passes_before_the_device_is_up(subject: &Subject<'_>) {
    let pair = Pair::new(subject.pair);
    let hook = pair.hook(Direction::Ingress);
    let (program, dropped) = counting_deny(subject.takes, subject.loader);
    pair.on_host(|| subject.attacher.attach(hook, &program, "default")).unwrap();
    let seen = flood_over_up(&pair, |_| counts(&dropped).iter().all(|d| *d >= FLOOD));
    let dropped = counts(&dropped);
    assert!(dropped.iter().all(|d| *d >= FLOOD), "the flood: {dropped:?} by {WAYS:?}");
    assert_eq!(seen, [0; 4], "arrived, and {dropped:?} were dropped, by {WAYS:?}");
    // The twin: the same flood without the program is seen, every way.
    assert!(pair.on_host(|| subject.attacher.detach(hook)).unwrap());
    let twin = Pair::new(subject.pair);
    let seen = flood_over_up(&twin, |seen| seen.iter().all(|s| *s >= FLOOD));
    assert!(seen.iter().all(|s| *s >= FLOOD), "arrived {seen:?} by {WAYS:?}");
}

/// The same for what the device sends, where the backend has programs for it.
///
/// # Panics
/// At the first breach.
pub fn the_other_way_is_denied_from_the_start_too(subject: &Subject<'_>) {
    if subject.direction() == Direction::Ingress {
        return;
    }
    let pair = Pair::new(subject.pair);
    let (program, dropped) = counting_deny(subject.takes, subject.loader);
    let hook = pair.hook(Direction::Egress);
    pair.on_host(|| subject.attacher.attach(hook, &program, "default")).unwrap();
    let sender = Sender::to_pod(&pair);
    let seen =
        flood(&pair, &sender, Receiver::new(&pair.pod, ALLOWED), |_| counts(&dropped).iter().all(|d| *d >= FLOOD));
    let dropped = counts(&dropped);
    assert!(dropped.iter().all(|d| *d >= FLOOD), "the flood: {dropped:?} by {WAYS:?}");
    assert_eq!(seen, [0; 4], "arrived, and {dropped:?} were dropped, by {WAYS:?}");
    // The twin: without the program the same is seen.
    assert!(pair.on_host(|| subject.attacher.detach(hook)).unwrap());
    let seen = flood(&pair, &sender, Receiver::new(&pair.pod, ALLOWED), |seen| seen.iter().all(|s| *s >= FLOOD));
    assert!(seen.iter().all(|s| *s >= FLOOD), "arrived {seen:?} by {WAYS:?}");
}

/// A backend acts on the calling thread's namespace, and finds nothing of another.
///
/// # Panics
/// At the first breach.
pub fn an_index_means_the_device_in_the_callers_namespace(subject: &Subject<'_>) {
    let Subject { attacher, .. } = *subject;
    let (pair, other) = (Pair::new(subject.pair), Pair::new(subject.pair));
    let hook = pair.hook(Direction::Ingress);
    assert_eq!(other.device, pair.device, "two devices of one index, each the first of its namespace");
    pair.on_host(|| attacher.attach(hook, &subject.deny(), "here")).unwrap();
    assert!(pair.on_host(|| attacher.attached(hook)).unwrap().is_some());
    assert_eq!(pair.on_host(|| attacher.devices()).unwrap(), [pair.device]);
    assert_eq!(other.on_host(|| attacher.attached(hook)).unwrap(), None);
    assert!(!other.on_host(|| attacher.detach(hook)).unwrap());
    assert_eq!(other.on_host(|| attacher.devices()).unwrap(), []);
    // Both at once, and each finds its own.
    other.on_host(|| attacher.attach(hook, &subject.deny(), "there")).unwrap();
    for (pair, label) in [(&pair, "here"), (&other, "there")] {
        let owner = pair.on_host(|| attacher.attached(hook)).unwrap().unwrap().owner;
        assert_eq!(owner, Owner::Ours(label.to_owned()));
        assert!(pair.on_host(|| attacher.detach(hook)).unwrap());
        assert_eq!(pair.on_host(|| attacher.devices()).unwrap(), []);
    }
}

/// While programs take each other's place under a flood, no packet passes that both deny, and none is lost that both let
/// pass.
///
/// # Panics
/// At the first breach.
pub fn nothing_leaks_and_nothing_is_lost_while_replaced(subject: &Subject<'_>) {
    let Subject { attacher: a, loader, .. } = *subject;
    let swaps = effort(200_u64, 2_000, 100_000);
    let pair = Pair::new(subject.pair);
    let hook = pair.hook(Direction::Ingress);
    // Both ends take a while to be ready for multicast.
    flood_over_up(&pair, |seen| seen.iter().all(|s| *s > 0));
    let (program, dropped) = counting_deny(subject.takes, loader);
    pair.on_host(|| a.attach(hook, &program, "default")).unwrap();
    let mut allowed = Receiver::new(pair.host.root(), ALLOWED);
    let mut denied = Receiver::new(pair.host.root(), DENIED);
    let sender = Sender::to_host(&pair);
    let (open, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let must_arrive = [const { AtomicU64::new(0) }; 4];
    let mut refused = 0_u64;
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            pair.on_host(|| {
                let [one, two] = ["one", "two"].map(|name| allow_one_port(subject.takes, name));
                let start = Instant::now();
                while counts(&dropped).iter().any(|d| *d < 100) && start.elapsed() < PATIENCE {
                    std::thread::sleep(Duration::from_millis(2));
                }
                a.replace(hook, &one, "one").unwrap();
                open.store(true, Ordering::Release);
                let begun = Instant::now();
                for swap in 0..swaps {
                    // An attacher that waits for a grace period at each has seen enough with fewer.
                    if swap >= FEWEST_SWAPS && begun.elapsed() > effort(LONG, LONG, Duration::MAX) {
                        break;
                    }
                    let (old, new) = if swap % 2 == 0 { (&one, &two) } else { (&two, &one) };
                    let was = a.replace(hook, new, "swapped").unwrap();
                    assert_eq!(was.program, Some(old.info().id));
                    std::thread::sleep(Duration::from_micros(100));
                }
                // A fast backend is done before the flood is one.
                let enough = |due: &AtomicU64| due.load(Ordering::Relaxed) >= FLOOD / 2;
                let start = Instant::now();
                while !must_arrive.iter().all(enough) && start.elapsed() < PATIENCE {
                    a.replace(hook, &two, "swapped").unwrap();
                    a.replace(hook, &one, "swapped").unwrap();
                    std::thread::sleep(Duration::from_micros(100));
                }
                stop.store(true, Ordering::Release);
            });
        });
        let mut number = 0;
        while !stop.load(Ordering::Acquire) && !swapper.is_finished() {
            for (way, due) in must_arrive.iter().enumerate() {
                let was_open = open.load(Ordering::Acquire);
                if sender.send(way, ALLOWED, number) && was_open {
                    due.fetch_add(1, Ordering::Relaxed);
                }
                refused += u64::from(sender.send(way, DENIED, number));
            }
            number += 1;
            // A socket holds some 270 of these: we wait for what is under way before it can overflow. What is lost
            // stays under way, and is found below.
            let sent: u64 = must_arrive.iter().map(|s| s.load(Ordering::Relaxed)).sum();
            let start = Instant::now();
            allowed.drain();
            while allowed.counts.iter().sum::<u64>() + 64 < sent && start.elapsed() < Duration::from_secs(2) {
                allowed.drain();
            }
            denied.drain();
        }
        swapper.join().unwrap();
    });
    std::thread::sleep(Duration::from_millis(20));
    allowed.drain();
    denied.drain();
    let must_arrive = must_arrive.map(AtomicU64::into_inner);
    assert!(must_arrive.iter().all(|s| *s >= FLOOD / 2) && refused >= FLOOD, "the flood: {must_arrive:?}, {refused}");
    assert_eq!(denied.counts, [0; 4], "leaked of {refused}");
    for (way, (seen, sent)) in allowed.counts.iter().zip(must_arrive).enumerate() {
        assert!(*seen >= sent, "{}: {seen} of {sent} that must arrive", WAYS[way]);
    }
    assert!(pair.on_host(|| a.detach(hook)).unwrap());
}

/// A child that does not outlive a test which fails.
struct KilledAtLast(Child);

impl Drop for KilledAtLast {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is attached stays in force when its process is killed, and whoever comes next finds it. `child` runs a test of the
/// same binary that calls [`child`] with the same backend.
///
/// # Panics
/// At the first breach.
pub fn outlives_its_process(subject: &Subject<'_>, child: &mut Command) {
    let Subject { attacher: a, .. } = *subject;
    let pair = Pair::new(subject.pair);
    let before = (subject.state)(pair.host.root());
    child.env(DEVICE, pair.device.to_string()).stdout(Stdio::null());
    let mut child = KilledAtLast(pair.on_host(|| child.spawn().unwrap()));
    let hook = pair.hook(Direction::Ingress);
    let start = Instant::now();
    let attached = loop {
        // A link is foreign until it is pinned.
        if let Some(attached) = pair.on_host(|| a.attached(hook)).unwrap() {
            break attached;
        }
        assert!(start.elapsed() < PATIENCE && child.0.try_wait().unwrap().is_none(), "it never attached");
        std::thread::sleep(Duration::from_millis(2));
    };
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    let after = pair.on_host(|| a.attached(hook)).unwrap().expect("still there");
    assert_eq!(after, attached);
    assert_eq!(after.owner, Owner::Ours("of-the-dead".into()));
    // Whoever comes next adopts it: program and maps are found from the device.
    let program = Program::by_id(after.program.unwrap()).unwrap();
    let [map] = program.info().maps[..] else { panic!("{:?}", program.info()) };
    let dropped = Array::new(Map::by_id(map).unwrap()).unwrap();
    let seen = flood_over_up(&pair, |_| counts(&dropped).iter().all(|d| *d >= FLOOD));
    let dropped = counts(&dropped);
    assert!(dropped.iter().all(|d| *d >= FLOOD), "the flood: {dropped:?} by {WAYS:?}");
    assert_eq!(seen, [0; 4], "arrived, and {dropped:?} were dropped, by {WAYS:?}");
    let run = program.test_run(&TestRun { packet: &[0; 64], context: &[], repeat: 1 }).unwrap();
    assert_eq!(run.retval, answer(subject.takes, verdict::SHOT).cast_unsigned());
    assert_eq!(Some(program.info().tag), after.tag);
    // It may replace and remove what the dead has made.
    let other = subject.constant("other", verdict::UNSPEC);
    assert_eq!(pair.on_host(|| a.replace(hook, &other, "heir")).unwrap().program, after.program);
    assert_eq!(pair.on_host(|| a.attached(hook)).unwrap().unwrap().owner, Owner::Ours("heir".into()));
    assert!(pair.on_host(|| a.detach(hook)).unwrap());
    assert_eq!((subject.state)(pair.host.root()), before);
}

const DEVICE: &str = "DCENET_TEST_DEVICE";

/// Swaps, and how long they may take where there are more.
const FEWEST_SWAPS: u64 = 200;
const LONG: Duration = Duration::from_secs(10);

/// The child of [`outlives_its_process`] and of `survives_kills`: attaches, and waits for its end. Returns where it is nobody's child.
///
/// # Panics
/// Where it cannot attach, or nobody kills it.
pub fn child(attacher: &dyn Attacher, loader: &dyn Loader, takes: ProgramKind) {
    let Ok(device) = std::env::var(DEVICE) else { return };
    let device = IfIndex::new(device.parse().unwrap()).unwrap();
    let hook = Hook { device, direction: Direction::Ingress };
    #[cfg(feature = "fault-injection")]
    if let Ok(fault) = std::env::var(KILL) {
        return dies(attacher, hook, takes, &fault);
    }
    // A test runs on a thread of its own, in the namespace that the process was started in.
    attacher.attach(hook, &counting_deny(takes, loader).0, "of-the-dead").unwrap();
    std::thread::sleep(2 * PATIENCE);
    panic!("nobody killed the child");
}

/// Attach, replace and detach in all orders, and what they return.
///
/// # Panics
/// At the first breach.
pub fn the_device_is_left_as_it_was(subject: &Subject<'_>) {
    let Subject { attacher: a, .. } = *subject;
    let pair = Pair::new(subject.pair);
    let before = (subject.state)(pair.host.root());
    let (ingress, egress) = (pair.hook(Direction::Ingress), pair.hook(Direction::Egress));
    let both = subject.direction() == Direction::Egress;
    pair.on_host(|| {
        let (one, two) = (subject.deny(), subject.constant("other", verdict::UNSPEC));
        assert_eq!(a.chain(ingress).unwrap(), []);
        assert!(!a.detach(ingress).unwrap());
        assert!(matches!(a.replace(ingress, &one, "x"), Err(AttachError::NotAttached { .. })));
        assert_eq!(a.attach(ingress, &one, "first").unwrap(), None);
        assert_eq!(a.attached(egress).unwrap(), None);
        if both {
            assert_eq!(a.attach(egress, &two, "").unwrap(), None);
        } else {
            assert!(matches!(a.attach(egress, &two, ""), Err(AttachError::IngressOnly { .. })));
            assert!(matches!(a.replace(egress, &two, ""), Err(AttachError::NotAttached { .. })));
        }
        assert_eq!(a.devices().unwrap(), [pair.device]);
        // Again, and another in its place.
        let first = a.attached(ingress).unwrap().unwrap();
        assert_eq!((first.program, first.tag), (Some(one.info().id), Some(one.info().tag)));
        assert_eq!(first.owner, Owner::Ours("first".into()));
        assert_eq!(a.attach(ingress, &one, "first").unwrap(), Some(first.clone()));
        assert_eq!(a.attached(ingress).unwrap(), Some(first.clone()));
        assert_eq!(a.attach(ingress, &two, "second").unwrap(), Some(first));
        let chain = a.chain(ingress).unwrap();
        assert!(matches!(&chain[..], [Attached { owner: Owner::Ours(label), .. }] if label == "second"), "{chain:?}");
        assert_eq!(a.before(ingress).unwrap(), []);
        assert!(matches!(a.evict(ingress, &chain[0]), Err(AttachError::NotForeign { .. })));
        assert_eq!(a.attached(egress).unwrap().map(|a| a.owner), both.then(|| Owner::Ours(String::new())));
    });
    assert_ne!((subject.state)(pair.host.root()), before, "the state shows what is attached");
    pair.on_host(|| {
        // The other direction stays.
        assert!(a.detach(ingress).unwrap());
        assert_eq!(a.attached(egress).unwrap().is_some(), both);
        assert_eq!(a.detach(egress).unwrap(), both);
        assert!(!a.detach(egress).unwrap());
    });
    assert_eq!((subject.state)(pair.host.root()), before);
}

/// Filters of others are neither touched nor taken for ours, and are told of and taken off when they are named.
///
/// # Panics
/// At the first breach.
pub fn what_others_have_attached_stays(subject: &Subject<'_>) {
    let Subject { attacher: a, .. } = *subject;
    let pair = Pair::new(subject.pair);
    let root = pair.host.root();
    root.sh("tc qdisc add dev h0 clsact");
    root.sh("tc filter add dev h0 ingress pref 7 protocol ip u32 match u32 0 0 flowid 1:1");
    root.sh("tc filter add dev h0 ingress pref 60000 protocol ip u32 match u32 0 0 flowid 1:1");
    root.sh("tc filter add dev h0 egress pref 60000 protocol ip u32 match u32 0 0 flowid 1:1");
    let filters = || root.sh("tc filter show dev h0 ingress; tc filter show dev h0 egress; tc qdisc show dev h0");
    let before = (filters(), (subject.state)(root));
    assert!(before.0.contains("clsact") && before.0.matches("u32").count() > 2, "{}", before.0);
    let hook = pair.hook(Direction::Ingress);
    let (ours, all, ahead) = pair.on_host(|| {
        a.attach(hook, &subject.deny(), "ours").unwrap();
        let ours = a.attached(hook).unwrap().unwrap();
        (ours, everything(hook).unwrap(), a.before(hook).unwrap())
    });
    assert_eq!(ours.owner, Owner::Ours("ours".into()));
    let u32 = |a: &&Attached| a.owner == Owner::Foreign(Some("u32".into()));
    // The tables that they are in are no filters. The kernel shows those of both directions that have one priority.
    let table = |a: &Attached| matches!(&a.via, Via::Clsact(filter) if filter.handle & 0xfff == 0);
    assert!(all.iter().filter(u32).count() >= 2 && !all.iter().any(table), "{all:?}");
    let place = all.iter().position(|a| a.via == ours.via).expect("ours among all");
    assert_eq!(ahead, all[..place]);
    assert!(pair.on_host(|| a.detach(hook)).unwrap());
    assert_eq!((filters(), (subject.state)(root)), before);
    // What is named goes, and nothing else.
    let low = all.iter().filter(u32).rfind(|a| a.priority == 7).expect("the filter of priority 7");
    pair.on_host(|| {
        a.attach(hook, &subject.deny(), "ours").unwrap();
        assert!(a.evict(hook, low).unwrap());
        assert!(!a.evict(hook, low).unwrap());
        assert_eq!(a.before(hook).unwrap(), []);
        assert!(a.attached(hook).unwrap().is_some());
    });
    let left = root.sh("tc filter show dev h0 ingress");
    assert!(!left.contains("pref 7 u32 chain 0 fh 800::800"), "{left}");
    assert!(left.contains("pref 60000 u32 chain 0 fh 80"), "{left}");
    assert!(pair.on_host(|| a.detach(hook)).unwrap());
}

/// A device that is not there, programs and labels that do not fit.
///
/// # Panics
/// At the first breach.
pub fn unfit_requests_are_told_apart(subject: &Subject<'_>) {
    let Subject { attacher: a, .. } = *subject;
    let pair = Pair::new(subject.pair);
    let before = (subject.state)(pair.host.root());
    let hook = pair.hook(Direction::Ingress);
    let nowhere = Hook { device: IfIndex::new(9_999).unwrap(), direction: Direction::Ingress };
    let unfit = match subject.takes {
        ProgramKind::Xdp => constant("x", verdict::OK),
        _ => constant_of(ProgramKind::Xdp, "x", verdict::OK),
    };
    pair.on_host(|| {
        assert!(
            matches!(a.attach(nowhere, &subject.deny(), "x"), Err(AttachError::NoDevice(d)) if d == nowhere.device)
        );
        assert!(matches!(a.replace(nowhere, &subject.deny(), "x"), Err(AttachError::NotAttached { .. })));
        assert!(!a.detach(nowhere).unwrap());
        assert_eq!(a.chain(nowhere).unwrap(), []);
        assert_eq!(a.before(nowhere).unwrap(), []);
        let refused = a.attach(hook, &unfit, "x");
        assert!(matches!(refused, Err(AttachError::WrongProgram { kind, want, .. })
            if kind == unfit.info().kind && want == subject.takes));
        assert!(matches!(a.attach(hook, &subject.deny(), "a\0b"), Err(AttachError::BadLabel { .. })));
        assert!(matches!(a.attach(hook, &subject.deny(), &"x".repeat(201)), Err(AttachError::BadLabel { .. })));
        assert_eq!((subject.state)(pair.host.root()), before);
        let longest = "x-Y_9".repeat(26)[..128].to_owned();
        a.attach(hook, &subject.deny(), &longest).unwrap();
        assert_eq!(a.attached(hook).unwrap().unwrap().owner, Owner::Ours(longest));
        assert!(a.detach(hook).unwrap());
    });
    assert_eq!((subject.state)(pair.host.root()), before);
}

/// A device takes along what is attached to it: the next one of the same name and index has nothing, and takes all anew.
///
/// # Panics
/// At the first breach.
pub fn what_is_attached_goes_with_its_device(subject: &Subject<'_>) {
    let Subject { attacher: a, .. } = *subject;
    let mut pair = Pair::new(subject.pair);
    let before = (subject.state)(pair.host.root());
    let hook = pair.hook(Direction::Ingress);
    for direction in subject.directions() {
        pair.on_host(|| a.attach(pair.hook(*direction), &subject.deny(), "gone")).unwrap();
    }
    let gone = |hook| {
        assert_eq!(a.chain(hook).unwrap(), []);
        assert_eq!(a.attached(hook).unwrap(), None);
        assert!(!a.detach(hook).unwrap());
        assert_eq!(a.devices().unwrap(), []);
        assert!(matches!(a.replace(hook, &subject.deny(), "x"), Err(AttachError::NotAttached { .. })));
    };
    pair.on_host(|| assert_eq!(a.devices().unwrap(), [pair.device]));
    pair.remake();
    let again = pair.hook(Direction::Ingress);
    pair.on_host(|| {
        for hook in [hook, again, pair.hook(Direction::Egress)] {
            gone(hook);
        }
        let forgotten = a.forget_vanished().unwrap();
        assert!([0, subject.directions().len()].contains(&forgotten), "{forgotten}");
        assert_eq!(a.forget_vanished().unwrap(), 0);
        assert_eq!((subject.state)(pair.host.root()), before, "nothing is left of the device");
        assert_eq!(a.attach(again, &subject.deny(), "gone").unwrap(), None);
        assert!(a.attached(again).unwrap().is_some());
        assert_eq!(a.attached(pair.hook(Direction::Egress)).unwrap(), None);
        assert!(a.detach(again).unwrap());
    });
    pair.host.root().sh("ip link del h0");
    pair.on_host(|| gone(again));
    assert_eq!(a.forget_vanished().unwrap(), 0, "it was detached before");
}

/// Whichever call of a sequence fails, before or after its effect, repeating it leads to the same end.
///
/// # Panics
/// At the first breach.
pub fn a_repeated_call_mends_a_failed_one(subject: &Subject<'_>) {
    let pair = Pair::new(subject.pair);
    let before = (subject.state)(pair.host.root());
    let hook = pair.hook(subject.direction());
    let (one, two) = (subject.deny(), subject.constant("other", verdict::UNSPEC));
    let end = |a: &dyn Attacher| a.attached(hook).unwrap().map(|a| (a.owner, a.program));
    let again = |call: &dyn Fn() -> Result<(), AttachError>| call().or_else(|_| call()).unwrap();
    for failure in [Failure::Before, Failure::After] {
        for fail_at in 0..=4 {
            pair.on_host(|| {
                let flaky = FlakyAttacher::new(subject.attacher, failure, fail_at);
                again(&|| flaky.attach(hook, &one, "one").map(drop));
                again(&|| flaky.attach(hook, &one, "one").map(drop));
                assert_eq!(end(subject.attacher), Some((Owner::Ours("one".into()), Some(one.info().id))));
                again(&|| flaky.replace(hook, &two, "two").map(drop));
                assert_eq!(end(subject.attacher), Some((Owner::Ours("two".into()), Some(two.info().id))));
                again(&|| flaky.detach(hook).map(drop));
                assert_eq!(end(subject.attacher), None);
                assert_eq!(flaky.calls(), 4 + u64::from(fail_at != 0));
            });
        }
    }
    assert_eq!((subject.state)(pair.host.root()), before);
}

/// Every system call that the backend makes fails once: the hook is as before, and repeating the operation does it.
///
/// # Panics
/// At the first breach.
#[cfg(feature = "fault-injection")]
pub fn survives_faults(subject: &Subject<'_>) {
    use dcenet_core::test_support::{Fault, Injection, with_fault};
    let Subject { attacher: a, .. } = *subject;
    let pair = Pair::new(subject.pair);
    let hook = pair.hook(Direction::Ingress);
    let (one, two) = (subject.deny(), subject.constant("other", verdict::UNSPEC));
    let empty = (subject.state)(pair.host.root());
    let fail = |call| Injection { call, fault: Fault::Fail };
    let mut counts = Vec::new();
    pair.on_host(|| {
        let stands = |p: &Program, label: &str| {
            let attached = a.attached(hook).unwrap().unwrap();
            attached.program == Some(p.info().id) && attached.owner == Owner::Ours(label.to_owned())
        };
        for call in 1.. {
            let (outcome, calls) = with_fault(fail(call), || a.attach(hook, &one, "one"));
            if call > calls {
                outcome.unwrap();
                counts.push(("attach", calls));
                break;
            }
            outcome.unwrap_err();
            let told = format!("attach, call {call}");
            becomes(&[][..], || a.chain(hook).unwrap(), &told);
            becomes(&empty, || (subject.state)(pair.host.root()), &told);
        }
        let with_one = (subject.state)(pair.host.root());
        for call in 1.. {
            let (outcome, calls) = with_fault(fail(call), || a.attach(hook, &two, "two"));
            if call > calls {
                outcome.unwrap();
                counts.push(("attach again", calls));
                break;
            }
            assert!(outcome.is_err() && stands(&one, "one"), "attach again, call {call}: {outcome:?}");
            assert_eq!((subject.state)(pair.host.root()), with_one, "attach again, call {call}");
        }
        assert!(stands(&two, "two"));
        for call in 1.. {
            let (outcome, calls) = with_fault(fail(call), || a.replace(hook, &one, "one"));
            if call > calls {
                outcome.unwrap();
                counts.push(("replace", calls));
                break;
            }
            assert!(outcome.is_err() && stands(&two, "two"), "replace, call {call}: {outcome:?}");
        }
        for call in 1.. {
            let (outcome, calls) = with_fault(fail(call), || a.detach(hook));
            if call > calls {
                outcome.unwrap();
                counts.push(("detach", calls));
                break;
            }
            outcome.unwrap_err();
        }
    });
    becomes(&empty, || (subject.state)(pair.host.root()), "detached");
    assert!(counts.iter().all(|(_, calls)| (2..=24).contains(calls)), "{counts:?}");
}

/// Waits until it is so. What was unlinked in a bpffs and not detached stays on the device until the kernel frees the
/// inode, which may take an RCU grace period (kernel/bpf/inode.c, `bpf_free_inode`).
#[cfg(feature = "fault-injection")]
fn becomes<W, T>(want: &W, look: impl Fn() -> T, told: &str)
where
    W: std::fmt::Debug + ?Sized,
    T: std::fmt::Debug + PartialEq<W>,
{
    let start = Instant::now();
    loop {
        let now = look();
        if now == *want {
            return;
        }
        assert!(start.elapsed() < GRACE, "{told}: {now:?}, want {want:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Longer than grace periods take on a busy machine.
#[cfg(feature = "fault-injection")]
const GRACE: Duration = Duration::from_secs(20);

/// More than any operation of a backend makes.
#[cfg(feature = "fault-injection")]
const MOST_CALLS: u64 = 200;

/// Tells a child what to do, and where to die of it.
#[cfg(feature = "fault-injection")]
const KILL: &str = "DCENET_TEST_KILL";

/// A process is killed before and after every system call that the backend makes: what was there stands, or what was to come
/// does, nothing between, and repeating the operation finishes it. `child` is that of [`outlives_its_process`]. Returns how
/// many times it was killed.
///
/// # Panics
/// At the first breach.
#[cfg(feature = "fault-injection")]
pub fn survives_kills(subject: &Subject<'_>, child: impl Fn() -> Command) -> usize {
    use std::os::unix::process::ExitStatusExt;
    let Subject { attacher: a, .. } = *subject;
    let pair = Pair::new(subject.pair);
    let root = pair.host.root();
    let hook = pair.hook(Direction::Ingress);
    let empty = (subject.state)(root);
    let one = subject.constant("one", verdict::UNSPEC);
    let attached = || pair.on_host(|| a.attached(hook)).unwrap().map(|a| (a.owner, a.program, a.tag));
    let mut kills = 0;
    for operation in ["attach", "replace", "detach"] {
        'calls: for call in 1.. {
            assert!(call <= MOST_CALLS, "{operation} does not come to its end");
            for fault in ["abort", "abort-after"] {
                if operation != "attach" {
                    pair.on_host(|| a.attach(hook, &one, "killed")).unwrap();
                }
                let before = attached();
                let mut child = child();
                child.env(DEVICE, pair.device.to_string()).env(KILL, format!("{operation} {fault}:{call}"));
                let ended = pair.on_host(|| child.output()).unwrap();
                let after = attached();
                let told = format!("{operation}, {fault} at call {call}: {before:?}, {after:?}");
                let killed = ended.status.signal() == Some(libc::SIGABRT);
                let words = || format!("{told}: {}: {}", ended.status, String::from_utf8_lossy(&ended.stderr));
                assert!(killed || ended.status.success(), "{}", words());
                let new = || {
                    let (owner, program, tag) = after.clone().expect("attached");
                    owner == Owner::Ours("killed".into())
                        && program != Some(one.info().id)
                        && tag == Some(subject.deny().info().tag)
                };
                let done = if operation == "detach" { after.is_none() } else { after.is_some() && new() };
                assert!(done || after == before, "{told}");
                if after.is_none() {
                    becomes(&[][..], || pair.on_host(|| a.chain(hook)).unwrap(), &told);
                }
                if killed {
                    kills += 1;
                    // Whoever comes next finishes it.
                    pair.on_host(|| carry_out(a, hook, &subject.deny(), operation)).unwrap();
                    assert_eq!(attached().is_some(), operation != "detach", "{told}");
                } else {
                    assert!(done, "{told}");
                }
                pair.on_host(|| a.detach(hook)).unwrap();
                becomes(&empty, || (subject.state)(root), &told);
                if !killed {
                    assert!(call > 2, "{operation} made {call} calls");
                    break 'calls;
                }
            }
        }
    }
    kills
}

#[cfg(feature = "fault-injection")]
fn carry_out(a: &dyn Attacher, hook: Hook, program: &Program, operation: &str) -> Result<(), AttachError> {
    match operation {
        "attach" => a.attach(hook, program, "killed").map(drop),
        "replace" => a.replace(hook, program, "killed").map(drop),
        _ => a.detach(hook).map(drop),
    }
}

#[cfg(feature = "fault-injection")]
fn dies(a: &dyn Attacher, hook: Hook, takes: ProgramKind, how: &str) {
    use dcenet_core::test_support::{Injection, with_fault};
    let (operation, fault) = how.split_once(' ').unwrap();
    // Loaded before, for the operation's calls are those that count.
    let program = constant_of(takes, "deny", verdict::SHOT);
    let done = with_fault(Injection::parse(fault).unwrap(), || carry_out(a, hook, &program, operation));
    done.0.unwrap();
}
