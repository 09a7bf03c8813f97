//! What pods may do, before and after their policy is known.

use std::time::Duration;

use dcenet_core::provider::PolicySink;
use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::program::Program;
use dcenet_policy::enforcer::{DefaultVerdict, Phase};

use crate::world::*;

#[test]
fn nothing_passes_until_policy_is_known_and_then_what_it_says() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let error = world.try_add("web", 2, &[("app", "web")]).unwrap_err();
    assert!(error.contains("no policy owner has prepared this host"), "{error}");

    let owner = world.open(tools());
    world.add("web", 2, &[("app", "web")]);
    world.add("db", 3, &[("app", "db")]);
    world.add("scan", 4, &[]);
    world.ping("web", "db", false);
    world.udp("web", "scan", 5353, false);
    world.ping("node", "web", false);
    let error = world.await_enforced("db", Duration::from_millis(20)).unwrap_err();
    assert!(error.contains("has not been told the policies yet"), "{error}");

    assert!(owner.start().unwrap().is_complete());
    for pod in ["web", "db", "scan"] {
        world.await_enforced(pod, ALLOWED).unwrap();
    }
    world.tcp("scan", "db", 80, true);
    world.udp("db", "web", 80, true);
    world.ping("web", "scan", true);
    world.ping("node", "db", true);
    world.tcp("web", "node", 80, true);

    let report = owner.set_policies(policies(DB)).unwrap();
    assert!(report.is_complete() && report.enforced == 3, "{report:?}");
    world.tcp("web", "db", 5432, true);
    world.udp("web", "db", 5353, true);
    world.tcp("web", "db", 5433, false);
    world.udp("web", "db", 5432, false);
    world.ping("web", "db", false);
    world.tcp("scan", "db", 5432, false);
    world.udp("scan", "db", 5353, false);
    // The pod's own node, and what the policy does not govern.
    world.ping("node", "db", true);
    world.tcp("node", "db", 80, true);
    world.tcp("db", "scan", 80, true);
    world.tcp("scan", "web", 80, true);
    for status in owner.endpoints() {
        assert_eq!((status.phase, status.failure), (Phase::Enforced, None));
    }
    owner.uninstall().unwrap();
}

#[test]
fn equal_policies_share_a_program_and_uninstalling_leaves_nothing() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    for (n, name) in [(2, "db-0"), (3, "db-1"), (4, "web")] {
        let app = &name[..name.find('-').unwrap_or(name.len())];
        world.add_enforced(name, n, &[("app", app)]);
    }
    owner.set_policies(policies(DB)).unwrap();
    let ids = |name: &str| world.attached(name).map(|a| a.unwrap().program.unwrap());
    let slots = |name: &str| world.attached(name).map(|a| a.unwrap().class);
    assert_eq!(ids("db-0"), ids("db-1"));
    assert_ne!(ids("db-0"), ids("web"));
    assert_ne!(slots("db-0"), slots("db-1"));
    assert_eq!(slots("db-0")[0], slots("db-0")[1]);
    assert!(slots("web")[0] != 0);

    let mut programs: Vec<u32> = ["db-0", "web"].into_iter().flat_map(ids).collect();
    let pins = dcenet_ebpf::pin::Pins::at(world.host.directory().join("bpf"));
    assert!(pins.list().unwrap().len() > 8);
    for name in ["deny_from_pod", "deny_to_pod", "allow_from_pod", "allow_to_pod"] {
        programs.push(Program::from_fd(pins.get(name).unwrap().unwrap()).unwrap().info().id);
    }
    let state = world.host.state();
    assert!(state.lines().any(|line| line.contains("clsact")));
    owner.uninstall().unwrap();

    let after: Vec<String> = world.host.state().lines().map(str::to_owned).collect();
    assert!(!after.iter().any(|line| line.contains("clsact") || line.starts_with("filter")), "{after:#?}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&format!("{}/bpf", world.host.directory().display())));
    assert!(!world.host.directory().join("bpf").exists());
    let left: Vec<String> = std::fs::read_dir(world.host.run_dir())
        .unwrap()
        .map(|f| f.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("policy"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    // The kernel frees programs after a grace period.
    let begun = std::time::Instant::now();
    while let Some(alive) = programs.iter().find(|id| Program::by_id(**id).is_ok()) {
        assert!(begun.elapsed() < Duration::from_secs(5), "program {alive} is still loaded");
        std::thread::sleep(Duration::from_millis(10));
    }
    world.ping("web", "db-0", true);
}

#[test]
fn a_host_without_an_owner_keeps_the_default_and_says_so_at_once() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    drop(world.open(tools()));
    world.add("web", 2, &[]);
    world.add("db", 3, &[]);
    let begun = std::time::Instant::now();
    let limit = Duration::from_secs(60);
    let error = world.await_enforced("web", limit).unwrap_err();
    assert!(error.contains("await policy for shop/web/eth0"), "{error}");
    assert!(begun.elapsed() < limit / 2);
    world.ping("web", "db", false);
    world.sink.detach(&key("nobody")).unwrap();
    // An owner that comes finds them in the engine's records.
    let owner = world.open(tools());
    owner.adopt(&world.engine.attachments(&"shop".parse().unwrap()).unwrap()).unwrap();
    assert!(owner.start().unwrap().is_complete());
    world.ping("web", "db", true);
    world.delete("web");
    world.delete("db");
    assert!(owner.endpoints().is_empty());
    owner.uninstall().unwrap();
}

#[test]
fn a_default_of_allow_holds_until_the_owner_knows_better() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::with_default(DefaultVerdict::Allow);
    let owner = world.open(tools());
    world.add("web", 2, &[("app", "web")]);
    world.add("db", 3, &[("app", "db")]);
    world.tcp("web", "db", 80, true);
    world.await_enforced("db", Duration::from_millis(20)).unwrap_err();
    owner.set_policies(policies(DB)).unwrap();
    world.tcp("web", "db", 80, true);
    assert!(owner.start().unwrap().is_complete());
    world.tcp("web", "db", 80, false);
    world.tcp("web", "db", 5432, true);
    owner.uninstall().unwrap();
}
