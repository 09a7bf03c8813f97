//! Loads, attachments and system calls that fail.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use dcenet_core::model::IfIndex;
use dcenet_core::provider::{Endpoint, PolicySink};
use dcenet_core::test_support::{Rung, effort, require};
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::attach::{AttachError, Attached, Attacher, ClsactAttacher, Hook, Tag};
use dcenet_ebpf::loader::{AyaLoader, LoadError, LoadRequest, Loaded, Loader};
use dcenet_ebpf::program::Program;
use dcenet_ebpf::test_support::{Fault, Faults};
use dcenet_policy::enforcer::{Enforcer, Phase, Report, Tools};
use dcenet_policy::model::{Pod, PodId};
use dcenet_policy::target::Tc;

use crate::streams::Stream;
use crate::world::*;

/// Counts down, and fails at 0.
#[derive(Clone, Default)]
struct Countdown(Arc<AtomicI64>);

impl Countdown {
    fn set(&self, calls: i64) {
        self.0.store(calls + 1, Ordering::SeqCst);
    }

    fn hits(&self) -> bool {
        self.0.fetch_sub(1, Ordering::SeqCst) == 1
    }

    /// Whether it has not failed yet.
    fn is_running(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }
}

struct FlakyLoader(Countdown);

impl Loader for FlakyLoader {
    fn load(&self, elf: &[u8], request: &LoadRequest<'_>) -> Result<Loaded, LoadError> {
        if self.0.hits() {
            return Err(LoadError::refused("injected", std::io::Error::from_raw_os_error(EPERM), ""));
        }
        AyaLoader.load(elf, request)
    }
}

struct FlakyAttacher(Countdown);

impl Attacher for FlakyAttacher {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        ClsactAttacher.attach_tagged(hook, program, tag)
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        if self.0.hits() {
            return Err(AttachError::Occupied { hook, occupant: "an injected fault".into() });
        }
        ClsactAttacher.replace_tagged(hook, program, tag)
    }

    fn devices(&self) -> Result<Vec<IfIndex>, AttachError> {
        ClsactAttacher.devices()
    }

    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        ClsactAttacher.chain(hook)
    }

    fn detach(&self, hook: Hook) -> Result<bool, AttachError> {
        ClsactAttacher.detach(hook)
    }
}

const EPERM: i32 = 1;

/// Policies under which `web` reaches `db` at one port only.
fn only(port: u16) -> Vec<dcenet_policy::model::Policy> {
    policies(&DB.replace("port: 5353", &format!("port: {port}")))
}

/// Which of two ports of `db` is open: whether a datagram arrives at each.
fn open(world: &World) -> [bool; 2] {
    let try_port = |port| {
        let to = SocketAddr::new(world.address("db", false), port);
        let server = world.pod("db").run(|| std::net::UdpSocket::bind(to)).unwrap();
        let client = world.pod("web").run(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(40))).unwrap();
        client.send_to(b"x", to).unwrap();
        server.recv(&mut [0; 8]).is_ok()
    };
    [try_port(6000), try_port(6001)]
}

struct Flaky {
    world: World,
    owner: Enforcer,
    loads: Countdown,
    attachments: Countdown,
}

impl Flaky {
    fn new() -> Self {
        let (loads, attachments) = (Countdown::default(), Countdown::default());
        let tools = Tools {
            loader: Arc::new(FlakyLoader(loads.clone())),
            attacher: Arc::new(FlakyAttacher(attachments.clone())),
            lowering: Arc::new(Tc::new(Sizes::small())),
        };
        let mut world = World::new();
        let owner = world.open(tools);
        owner.start().unwrap();
        world.add_enforced("web", 2, &[("app", "web")]);
        world.add_enforced("db", 3, &[("app", "db")]);
        world.add_enforced("db2", 4, &[("app", "db")]);
        // Neighbours are known from here on.
        world.udp("web", "db", 6002, true);
        assert!(owner.set_policies(only(6000)).unwrap().is_complete());
        Self { world, owner, loads, attachments }
    }

    /// After a change to port 6001 in which something failed: the old verdicts, whoever they are reported for; then a
    /// retry repairs.
    fn check(&self, result: &Result<Report, String>, what: &str) {
        let report = match result {
            Err(_) => None,
            Ok(report) if report.is_complete() => panic!("{what}: a failure that nobody reports"),
            Ok(report) => Some(report),
        };
        let of_db = report.is_none_or(|r| r.failures.iter().any(|(attachment, _)| *attachment == key("db")));
        let flows_only =
            report.is_some_and(|r| r.failures.iter().any(|(_, reason)| reason.contains("not judged anew")));
        if of_db && !flows_only {
            assert_eq!(open(&self.world), [true, false], "{what}: {result:?}");
        }
        let report = self.owner.retry().unwrap();
        assert!(report.is_complete() && report.enforced == 3, "{what}: {report:?}");
        assert_eq!(open(&self.world), [false, true], "{what}, repaired");
        assert!(self.owner.set_policies(only(6000)).unwrap().is_complete());
    }
}

#[test]
fn a_failing_load_or_attachment_leaves_the_old_verdicts() {
    if !require(Rung::Kernel) {
        return;
    }
    let flaky = Flaky::new();
    for (what, countdown) in [("load", &flaky.loads), ("attachment", &flaky.attachments)] {
        let (mut calls, mut others) = (0, 0);
        loop {
            countdown.set(calls);
            let result = flaky.owner.set_policies(only(6001)).map_err(|e| e.to_string());
            let complete = countdown.is_running();
            countdown.set(-1);
            if complete {
                break;
            }
            // An attempt for who was awaited last may come late, and meet the fault before this one.
            if others < 5 && result.as_ref().is_ok_and(Report::is_complete) {
                others += 1;
                flaky.owner.set_policies(only(6000)).unwrap();
                continue;
            }
            flaky.check(&result, &format!("{what} {calls}"));
            calls += 1;
        }
        // One program for both pods; two hooks of each.
        assert_eq!(calls, if what == "load" { 1 } else { 4 }, "{what}");
        flaky.owner.set_policies(only(6000)).unwrap();
    }
    flaky.owner.uninstall().unwrap();
}

#[test]
fn any_failing_call_to_bpf_leaves_the_old_verdicts() {
    if !require(Rung::Kernel) {
        return;
    }
    let flaky = Flaky::new();
    let root = flaky.world.host.root();
    let mut at = 0;
    loop {
        // In the host's namespace everything happens in this thread, where calls are counted.
        let (result, calls) = root.run(|| {
            let faults = Faults::at(at, Fault::Fail(EPERM));
            (flaky.owner.set_policies(only(6001)).map_err(|e| e.to_string()), faults.calls())
        });
        if calls <= at {
            break;
        }
        // A fault that a fallback makes up for is none.
        if result.as_ref().is_ok_and(Report::is_complete) {
            flaky.owner.set_policies(only(6000)).unwrap();
        } else {
            flaky.check(&result, &format!("call {at} of {calls}"));
        }
        at += 1;
    }
    assert!(at > 5, "only {at} calls");
    println!("{at} calls of a change of policy failed once each");
    flaky.owner.uninstall().unwrap();
}

#[test]
fn an_address_that_only_a_failed_change_admitted_is_not_let_in() {
    if !require(Rung::Kernel) {
        return;
    }
    let flaky = Flaky::new();
    let root = flaky.world.host.root();
    // An address of nobody, which a pod elsewhere may get, stands on the node.
    root.sh("ip addr add 10.20.0.77/32 dev dc0");
    let late = || Pod::new([("app", "web")], ["10.20.0.77".parse().unwrap()]);
    let id = PodId::new("shop", "late");
    let to = SocketAddr::new(flaky.world.address("db", false), 6000);
    let server = flaky.world.pod("db").run(|| UdpSocket::bind(to)).unwrap();
    server.set_read_timeout(Some(ALLOWED)).unwrap();
    let client = root.run(|| UdpSocket::bind("10.20.0.77:0")).unwrap();
    let witness = flaky.world.pod("web").run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    let arrives = || {
        client.send_to(b"late", to).unwrap();
        witness.send_to(b"last", to).unwrap();
        let mut late = false;
        let mut bytes = [0; 8];
        while server.recv(&mut bytes).unwrap() > 0 && &bytes[..4] != b"last" {
            late = true;
        }
        late
    };
    flaky.owner.upsert_pod(id.clone(), late()).unwrap();
    assert!(arrives(), "the twin: the pod is known");
    flaky.owner.remove_pod(&id).unwrap();
    assert!(!arrives());

    let mut at = 0;
    loop {
        let calls = root.run(|| {
            let faults = Faults::from(at, Fault::Fail(EPERM));
            // What comes of it does not matter.
            let _ = flaky.owner.upsert_pod(id.clone(), late());
            faults.calls()
        });
        // Nor whether the owner tries again in the meantime.
        assert!(flaky.owner.remove_pod(&id).unwrap().is_complete());
        assert!(!arrives(), "after call {at} and all behind it had failed");
        if calls <= at {
            break;
        }
        at += 1;
    }
    assert!(at > 1, "only {at} calls");
    flaky.owner.uninstall().unwrap();
}

/// Takes its time to replace a filter.
struct Slow(FlakyAttacher, Duration);

impl Attacher for Slow {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        self.0.attach_tagged(hook, program, tag)
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        std::thread::sleep(self.1);
        self.0.replace_tagged(hook, program, tag)
    }

    fn devices(&self) -> Result<Vec<IfIndex>, AttachError> {
        self.0.devices()
    }

    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        self.0.chain(hook)
    }

    fn detach(&self, hook: Hook) -> Result<bool, AttachError> {
        self.0.detach(hook)
    }
}

#[test]
fn who_awaits_an_endpoint_that_was_told_anew_is_not_answered_for_what_it_was() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let slow = Slow(FlakyAttacher(Countdown::default()), Duration::from_millis(200));
    let owner = world.open(Tools { attacher: Arc::new(slow), ..tools() });
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    assert!(owner.start().unwrap().is_complete());
    world.add_enforced("db", 3, &[]);
    let programs = |world: &World| world.attached("db").map(|attached| attached.unwrap().program);
    let open = programs(&world);
    let endpoint = Endpoint { labels: [("app".to_owned(), "db".to_owned())].into(), ..world.endpoint("db") };
    world.host.root().run(|| world.sink.attach(&endpoint)).unwrap();
    world.sink.await_enforced(&endpoint, ALLOWED).unwrap();
    let isolated = programs(&world);
    assert!(open[0] != isolated[0] && open[1] != isolated[1], "{open:?} {isolated:?}");
    owner.uninstall().unwrap();
}

#[test]
fn an_endpoint_whose_load_fails_keeps_the_default_and_the_owner_tries_again() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut flaky = Flaky::new();
    let mut all = only(6000);
    all.extend(policies(&DB.replace("name: db", "name: cache").replace("app: db", "app: cache")));
    assert!(flaky.owner.set_policies(all).unwrap().is_complete());
    flaky.loads.set(0);
    flaky.world.add("cache", 5, &[("app", "cache")]);
    let error = flaky.world.await_enforced("cache", Duration::from_millis(100)).unwrap_err();
    assert!(error.contains("the default stands") && error.contains("not permitted"), "{error}");
    let status = flaky.owner.endpoints().into_iter().find(|e| e.attachment == key("cache")).unwrap();
    assert_eq!((status.phase, status.slot), (Phase::Default, None));
    flaky.world.await_enforced("cache", ALLOWED).unwrap();
    flaky.world.udp("web", "cache", 5353, true);
    flaky.world.udp("db", "cache", 5353, false);
    flaky.owner.uninstall().unwrap();
}

/// Refuses every load while it is told to.
pub struct Refusing(pub Arc<AtomicBool>);

impl Loader for Refusing {
    fn load(&self, elf: &[u8], request: &LoadRequest<'_>) -> Result<Loaded, LoadError> {
        if self.0.load(Ordering::SeqCst) {
            return Err(LoadError::refused("injected", std::io::Error::from_raw_os_error(EPERM), ""));
        }
        AyaLoader.load(elf, request)
    }
}

#[test]
fn flows_are_judged_by_new_classes_also_where_new_programs_do_not_load() {
    if !require(Rung::Kernel) {
        return;
    }
    let moving = effort(5, 50, 50);
    let refuse = Arc::new(AtomicBool::new(false));
    let mut world = World::new();
    let owner = world.open(Tools { loader: Arc::new(Refusing(Arc::clone(&refuse))), ..tools() });
    assert!(owner.start().unwrap().is_complete());
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    let another = DB.replace("name: db", "name: more").replace("app: db", "tier: x").replace("5432", "9");
    assert!(owner.set_policies(policies(&format!("{DB}---\n{another}"))).unwrap().is_complete());
    let to = SocketAddr::new(world.address("db", false), 5353);
    let stream = Stream::udp(world.pod("web"), world.pod("db"), to);
    assert!(stream.moves(moving), "the twin: while nothing changes");

    // In one change `web` is nobody any more, and `db` wants another program.
    refuse.store(true, Ordering::SeqCst);
    let pods = [("web", vec![]), ("db", vec![("app", "db"), ("tier", "x")])];
    let report =
        owner.upsert_pods(pods.map(|(name, labels)| (PodId::new("shop", name), Pod::new(labels, [])))).unwrap();
    assert_eq!(
        report.failures.iter().map(|(attachment, _)| attachment).collect::<Vec<_>>(),
        [&key("db")],
        "{report:?}"
    );
    assert_eq!(stream.of_more_than(moving, Duration::from_millis(400)), 0);
    refuse.store(false, Ordering::SeqCst);
    assert!(owner.retry().unwrap().is_complete());
    assert_eq!(stream.during(Duration::from_millis(400)).0, 0);
    owner.uninstall().unwrap();
}
