//! Owners that come and go, also by SIGKILL.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_core::engine::Engine;
use dcenet_core::model::IfIndex;
use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::attach::{AttachError, Attached, Attacher, ClsactAttacher, Hook, Tag};
use dcenet_ebpf::program::Program;
use dcenet_policy::compiler::RuleTable;
use dcenet_policy::enforcer::{Enforcer, EnforcerConfig, EnforcerError, Phase, Tools};
use dcenet_policy::ir::RuleId;

use crate::streams::Stream;
use crate::world::*;

/// An owner in a process of its own, killed when dropped.
pub struct OwnerProcess(Child);

const DIRECTORY: &str = "DCENET_TEST_OWNER_OF";

impl OwnerProcess {
    pub fn start(world: &World) -> Self {
        let ready = world.host.directory().join("ready");
        let _ = std::fs::remove_file(&ready);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "restart::an_owner_in_a_process_of_its_own", "--nocapture"]);
        command.env(DIRECTORY, world.host.directory()).stdin(Stdio::null()).stdout(Stdio::null());
        let mut owner = Self(command.spawn().unwrap());
        let begun = Instant::now();
        while !ready.exists() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the owner does not get ready");
            assert_eq!(owner.0.try_wait().unwrap(), None, "the owner has ended");
            std::thread::sleep(Duration::from_millis(5));
        }
        owner
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has ended by a signal.
    pub fn is_killed(&mut self) -> bool {
        use std::os::unix::process::ExitStatusExt;
        self.0.try_wait().unwrap().is_some_and(|status| status.signal().is_some())
    }

    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for OwnerProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn own(directory: &Path) -> Enforcer {
    let host = || host_of(&directory.join("netns/host"));
    let owner = Enforcer::open(host(), config(directory.to_owned()), tools()).unwrap();
    let engine = Engine::new(host(), &directory.join("run"), None).unwrap();
    owner.adopt(&engine.attachments(&"shop".parse().unwrap()).unwrap()).unwrap();
    owner.set_policies(policies(DB)).unwrap();
    let report = owner.start().unwrap();
    assert!(report.is_complete(), "{report:?}");
    owner
}

/// Not a test by itself: what [`OwnerProcess`] executes. Without its variable it has nothing to own.
#[test]
fn an_owner_in_a_process_of_its_own() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else { return };
    let _owner = own(&directory);
    std::fs::write(directory.join("ready"), "").unwrap();
    loop {
        std::thread::park();
    }
}

#[test]
fn no_verdict_changes_while_owners_are_killed_and_restarted() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = OwnerProcess::start(&world);
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    world.add_enforced("scan", 4, &[]);
    let slots =
        |world: &World| ["web", "db", "scan"].map(|name| world.attached(name).map(|attached| attached.unwrap().class));
    let before = slots(&world);

    let mut floods = Vec::new();
    for ipv6 in [false, true] {
        let to = |port| SocketAddr::new(world.address("db", ipv6), port);
        floods.push((Stream::udp(world.pod("web"), world.pod("db"), to(5353)), true));
        floods.push((Stream::udp(world.pod("scan"), world.pod("db"), to(5354)), false));
    }
    let stream = Stream::tcp(world.pod("web"), world.pod("db"), SocketAddr::new(world.address("db", true), 5432));

    let mut owner = Some(owner);
    for _ in 0..3 {
        owner.take().unwrap().kill();
        // New flows are judged, too, while nobody is there.
        world.tcp("web", "db", 5433, false);
        world.udp("web", "db", 5355, false);
        let error = world.await_enforced("db", Duration::from_secs(1)).unwrap_err();
        assert!(error.contains("await policy"), "{error}");
        owner = Some(OwnerProcess::start(&world));
        world.await_enforced("db", ALLOWED).unwrap();
        assert_eq!(slots(&world), before);
    }
    owner.take().unwrap().kill();

    for (flood, allowed) in floods {
        let (sent, received, gap) = flood.stop();
        assert!(sent > 1000, "no flood: {sent}");
        if allowed {
            // A socket's buffer may overflow on a busy machine; policy would have left a hole of milliseconds.
            assert!(received + sent / 100 >= sent && gap < Duration::from_secs(1), "{received} of {sent}, gap {gap:?}");
        } else {
            assert_eq!(received, 0, "of {sent}");
        }
    }
    let (sent, received, _) = stream.stop();
    assert_eq!(sent, received);

    // Counters went on through all of it.
    let owner = own(world.host.directory());
    let rule = "shop/db ingress[0] from[0] ports[1]";
    let counted =
        |owner: &Enforcer| owner.rule_counters().unwrap().into_iter().find(|c| c.rule == rule).map_or(0, |c| c.packets);
    let before = counted(&owner);
    assert!(before >= 2, "{before}");
    world.udp("web", "db", 5353, true);
    assert_eq!(counted(&owner), before + 2);
    owner.uninstall().unwrap();
}

#[test]
fn the_twin_without_policy_receives_what_the_flood_sends() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    world.add_enforced("db", 3, &[("app", "db")]);
    world.add_enforced("scan", 4, &[]);
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.address("db", ipv6), 5354);
        let (sent, received, _) = {
            let flood = Stream::udp(world.pod("scan"), world.pod("db"), to);
            flood.of_more_than(200, Duration::from_millis(500));
            flood.stop()
        };
        assert!(sent > 200 && received + sent / 100 >= sent, "{received} of {sent}");
    }
    owner.uninstall().unwrap();
}

#[test]
fn there_is_one_owner_at_a_time_and_one_that_stops_leaves_its_verdicts() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    let again = Enforcer::open(world.host.host(), config(world.host.directory().to_owned()), tools());
    assert!(matches!(again, Err(EnforcerError::AnotherOwner { .. })));
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    owner.set_policies(policies(&DB.replace("app: web", "app: nobody"))).unwrap();
    drop(owner);
    assert!(!world.host.run_dir().join("policy.sock").exists());
    world.udp("web", "db", 5353, false);

    // A new owner that knows nothing yet changes nothing, and says of the adopted that they are enforced.
    let owner = world.open(tools());
    owner.adopt(&world.engine.attachments(&"shop".parse().unwrap()).unwrap()).unwrap();
    assert!(owner.endpoints().iter().all(|e| e.phase == Phase::Enforced && e.slot.is_some()));
    world.udp("web", "db", 5353, false);
    world.await_enforced("db", ALLOWED).unwrap();
    assert!(owner.start().unwrap().is_complete());
    world.udp("web", "db", 5353, true);
    owner.uninstall().unwrap();
}

#[test]
fn a_number_that_no_longer_is_a_rules_counts_from_zero() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    world.add_enforced("scan", 4, &[]);
    world.add_enforced("db", 3, &[("app", "db")]);
    owner.set_policies(policies(DB)).unwrap();
    // So many that the few packets which a kernel sends by itself are told from them.
    let flood = Stream::udp(world.pod("scan"), world.pod("db"), SocketAddr::new(world.address("db", false), 5353));
    assert_eq!(flood.of_more_than(200, Duration::from_millis(500)), 0);
    drop(flood);
    let isolated = RuleTable::default().name(RuleId::ISOLATED);
    let counted = |owner: &Enforcer| owner.rule_counters().unwrap().into_iter().find(|c| c.rule == isolated).unwrap();
    let before = counted(&owner).packets;
    assert!(before > 200, "{before}");
    drop(owner);
    let restarted = |world: &World| {
        let owner = world.open(tools());
        owner.adopt(&world.engine.attachments(&"shop".parse().unwrap()).unwrap()).unwrap();
        owner.set_policies(policies(DB)).unwrap();
        assert!(owner.start().unwrap().is_complete());
        owner
    };
    let owner = restarted(&world);
    assert!(counted(&owner).packets >= before, "a new owner goes on counting");
    drop(owner);

    // As by an owner whose rules began at a lower number.
    let path = world.host.run_dir().join("policy.rules");
    let mut names: Vec<(u32, serde_json::Value)> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(!names.is_empty() && names.iter().all(|(id, _)| *id >= RuleId::FIRST.0));
    let kept = names.clone();
    names.insert(0, (RuleId::ISOLATED.0, kept[0].1.clone()));
    names[0].1["rule"] = 7.into();
    std::fs::write(&path, serde_json::to_vec(&names).unwrap()).unwrap();
    let owner = restarted(&world);
    let after = counted(&owner).packets;
    assert!(after < before / 2, "{after} of {before}");
    assert_eq!(serde_json::from_slice::<Vec<(u32, serde_json::Value)>>(&std::fs::read(&path).unwrap()).unwrap(), kept);
    world.udp("scan", "db", 5353, false);
    assert!(counted(&owner).packets > after);
    owner.uninstall().unwrap();
}

/// Replaces a filter only when a stream has gone on over it for a while.
struct Slow(Arc<Stream>);

impl Attacher for Slow {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        ClsactAttacher.attach_tagged(hook, program, tag)
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        let (enough, begun) = (self.0.received() + 20, Instant::now());
        while self.0.received() < enough && begun.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(1));
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

#[test]
fn a_policy_that_changed_between_two_owners_reaches_running_flows() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let mut owner = world.started();
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    // Nobody is admitted, not even the node, so that the new owner's class tables by themselves are no reason to judge
    // anything anew.
    let nobody = policies(&format!("{}  ingress: []\n", DB.split("  ingress:").next().unwrap()));
    for ipv6 in [false, true] {
        assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
        let to = SocketAddr::new(world.address("db", ipv6), 5353);
        let stream = Arc::new(Stream::udp(world.pod("web"), world.pod("db"), to));
        assert!(stream.moves(50));
        drop(owner);

        let slow = Arc::new(Slow(Arc::clone(&stream)));
        let config = EnforcerConfig { node_addresses: [].into(), ..config(world.host.directory().to_owned()) };
        owner = Enforcer::open(world.host.host(), config, Tools { attacher: slow, ..tools() }).unwrap();
        owner.adopt(&world.engine.attachments(&"shop".parse().unwrap()).unwrap()).unwrap();
        owner.set_policies(nobody.clone()).unwrap();
        assert!(stream.moves(50), "until it starts, nothing changes");
        assert!(owner.start().unwrap().is_complete());
        // What had passed before may still lie in the receiver's buffer.
        let mut received = 1;
        for _ in 0..10 {
            let sent;
            (received, sent) = stream.during(Duration::from_millis(300));
            assert!(sent > 0);
            if received == 0 {
                break;
            }
        }
        assert_eq!(received, 0, "a flow that is denied by now goes on");
    }
    owner.uninstall().unwrap();
}
