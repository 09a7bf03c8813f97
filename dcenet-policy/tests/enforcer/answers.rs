//! Answers beside others that fail: what is given up takes nothing with it, and what is over goes.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use dcenet_core::model::IfIndex;
use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::attach::{AttachError, Attached, Attacher, ClsactAttacher, Hook, Tag};
use dcenet_ebpf::program::Program;
use dcenet_policy::enforcer::{Enforcer, EnforcerError, LearnError, Tools};
use dcenet_policy::model::{Pod, PodId, PolicyId};
use dcenet_policy::sources::kubernetes::Documents;

use crate::faults::Refusing;
use crate::names::{NAMED, OVER, Open, TTL, frozen, learn, name, told, told_instead};
use crate::world::*;

fn refusing(world: &World) -> (Enforcer, Arc<AtomicBool>) {
    let refuse = Arc::new(AtomicBool::new(false));
    let owner = world.open(Tools { loader: Arc::new(Refusing(Arc::clone(&refuse))), ..tools() });
    owner.set_clock(frozen(0)).unwrap();
    owner.start().unwrap();
    (owner, refuse)
}

fn documents(text: &str) -> Documents {
    Documents::default().with_yaml("named.yaml", text).unwrap()
}

/// The same, and nothing can be carried out.
fn misfiled(documents: &Documents) -> Documents {
    let mut misfiled = documents.clone();
    let (id, policy) = misfiled.policies.pop_first().unwrap();
    misfiled.policies.insert(PolicyId { name: "other".to_owned(), ..id }, policy);
    misfiled
}

#[test]
fn an_answer_that_finds_no_room_takes_no_other_with_it_and_keeps_nothing_that_is_over() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let (owner, _) = refusing(&world);
    for (n, name) in [(2, "web"), (3, "db")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    told(&owner, NAMED);
    learn(&world, &owner, "db.example.com", "db");
    owner.set_clock(frozen(10)).unwrap();
    let web = world.address("web", false);
    let tell_all =
        |text: &str, all: &[IpAddr]| owner.learner().learn(web, &name(text), all.iter().map(|address| (*address, TTL)));
    let tell = |text: &str, address: [u8; 4]| tell_all(text, &[address.into()]);
    let full = (0..200_u8).find(|n| tell("many.example.org", [198, 51, *n, 1]).is_err()).unwrap();
    let db = [false, true].map(|ipv6| world.address("db", ipv6));

    // Both wait until something else can be carried out, and the first answer is over by then.
    let (good, bad) = (documents(NAMED), misfiled(&documents(NAMED)));
    owner.replace_documents(&good, &bad).unwrap_err();
    let waits = |learnt: Result<(), LearnError>| {
        assert!(matches!(learnt, Err(LearnError::Enforcer(EnforcerError::Compile(_)))), "{learnt:?}");
    };
    waits(tell_all("fits.example.org", &db));
    waits(tell("more.example.org", [198, 51, full, 1]));
    owner.set_clock(frozen(OVER)).unwrap_err();
    world.tcp("web", "db", 5432, true);
    world.tcp("web", "db", 443, false);
    assert!(owner.replace_documents(&bad, &good).unwrap().is_complete());
    world.tcp("web", "db", 443, true);
    world.tcp("web", "db", 5432, false);
    tell_all("fits.example.org", &db).unwrap();

    // What was given up is told at once, and tried again later.
    let no_room = |learnt: Result<(), LearnError>| {
        assert!(matches!(learnt, Err(LearnError::Enforcer(EnforcerError::NoRoomForNames { .. }))), "{learnt:?}");
    };
    no_room(tell("more.example.org", [198, 51, full, 1]));
    // There would be room for this one.
    no_room(tell("more.example.org", [198, 51, 0, 2]));
    owner.set_clock(frozen(OVER + 5)).unwrap();
    tell("more.example.org", [198, 51, 0, 2]).unwrap();
    no_room(tell("more.example.org", [198, 51, full, 1]));
    assert_eq!(owner.faults(), []);
    owner.uninstall().unwrap();
}

/// Two names at one address of a prefix that rules ask for: what is left when the first is over is a combination of its own.
#[test]
fn what_is_over_is_told_of_until_programs_know_what_is_left() {
    if !require(Rung::Kernel) {
        return;
    }
    const PREFIX: &str = "  - { action: allow, to: [ { cidrs: [ 10.20.0.0/24, \"fd20::/64\" ] } ], services: [ { protocol: tcp, ports: [ 9 ] } ] }\n";
    let mut world = World::new();
    let (owner, refuse) = refusing(&world);
    for (n, name) in [(2, "web"), (3, "db")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    let policy = format!("{NAMED}{PREFIX}");
    told(&owner, &policy);
    learn(&world, &owner, "db.example.com", "db");
    owner.set_clock(frozen(10)).unwrap();
    learn(&world, &owner, "a.example.org", "db");
    refuse.store(true, Ordering::SeqCst);
    let report = owner.set_clock(frozen(OVER)).unwrap();
    assert!(report.names.as_ref().is_some_and(|names| names.contains("injected")), "{report:?}");
    assert!(!report.is_complete() && report.failures.is_empty());
    assert_eq!(owner.overdue_names(), report.names);
    world.tcp("web", "db", 5432, true);
    // What is known is released meanwhile, and what needs no other program.
    learn(&world, &owner, "a.example.org", "db");
    let web = world.address("web", false);
    let elsewhere = || owner.learner().learn(web, &name("b.example.org"), [([192, 0, 2, 1].into(), TTL)]);
    elsewhere().unwrap();
    refuse.store(false, Ordering::SeqCst);
    assert!(owner.retry().unwrap().is_complete());
    assert_eq!(owner.overdue_names(), None);
    world.tcp("web", "db", 5432, false);
    world.tcp("web", "db", 443, true);

    // Whose load fails has the programs before, and asks for what they know.
    refuse.store(true, Ordering::SeqCst);
    let other = policy.replace("ports: [ 443 ]", "ports: [ 444 ]");
    let report = owner.replace_documents(&documents(&policy), &documents(&other)).unwrap();
    assert_eq!(report.failures.len(), 1, "{report:?}");
    learn(&world, &owner, "a.example.org", "db");
    elsewhere().unwrap();
    world.tcp("web", "db", 443, true);
    learn(&world, &owner, "db.example.com", "db");
    let fresh = owner.learner().learn(web, &name("c.example.org"), [(world.address("web", false), TTL)]);
    fresh.unwrap();
    refuse.store(false, Ordering::SeqCst);
    assert!(owner.retry().unwrap().is_complete());
    owner.uninstall().unwrap();
}

/// Of a name that an endpoint's old programs do not ask for, an address of it is nobody's to them: that is no reason to keep what is
/// over.
#[test]
fn a_program_that_does_not_ask_for_a_name_keeps_no_other_beyond_its_time() {
    if !require(Rung::Kernel) {
        return;
    }
    const API: &str = r#"
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: api, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: api } } }
  egress:
  - { action: allow, to: [ { fqdns: [ db.example.com ] } ], services: [ { protocol: tcp, ports: [ 5432 ] } ] }
"#;
    let mut world = World::new();
    let (owner, refuse) = refusing(&world);
    for (n, name) in [(2, "web"), (3, "db"), (4, "api")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    let [before, after] = [API.to_owned(), API.replace("[ db.example.com ]", "[ db.example.com, \"*.example.org\" ]")]
        .map(|api| format!("{NAMED}{api}"));
    told(&owner, &before);
    learn(&world, &owner, "db.example.com", "db");
    owner.set_clock(frozen(10)).unwrap();
    learn(&world, &owner, "a.example.org", "db");
    // `api` keeps programs that ask for the first name alone.
    refuse.store(true, Ordering::SeqCst);
    let report = owner.replace_documents(&documents(&before), &documents(&after)).unwrap();
    assert_eq!(report.failures.iter().map(|(key, _)| key).collect::<Vec<_>>(), [&key("api")], "{report:?}");
    world.tcp("api", "db", 5432, true);
    let report = owner.set_clock(frozen(OVER)).unwrap();
    assert_eq!(report.names, None);
    world.tcp("api", "db", 5432, false);
    world.tcp("web", "db", 5432, false);
    world.tcp("web", "db", 443, true);
    refuse.store(false, Ordering::SeqCst);
    assert!(owner.retry().unwrap().is_complete());
    world.tcp("api", "db", 5432, true);
    owner.uninstall().unwrap();
}

/// A class of which a pod's policies ask nothing ends none of its connections.
#[test]
fn an_answer_for_others_ends_no_connection_with_the_next_change() {
    if !require(Rung::Kernel) {
        return;
    }
    const API: &str = r#"
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: api, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: api } } }
  egress:
  - { action: allow, to: [ { fqdns: [ "*.example.net" ] } ] }
  - { action: allow, to: [ { fqdns: [ a.example.net ] } ] }
"#;
    let mut world = World::new();
    let (owner, _) = refusing(&world);
    for (n, name) in [(2, "web"), (3, "db"), (4, "api")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    told(&owner, &format!("{NAMED}{API}"));
    learn(&world, &owner, "db.example.com", "db");
    let mut open = Open::new(&world, "db", 5432);
    owner.set_clock(frozen(OVER)).unwrap();
    world.tcp("web", "db", 5432, false);
    // Two names that meet for the first time.
    let client = world.address("api", false);
    owner.learner().learn(client, &name("a.example.net"), [([192, 0, 2, 9].into(), TTL)]).unwrap();
    owner.set_namespace("other", &[("a".to_owned(), "b".to_owned())].into()).unwrap();
    assert!(open.carries(ALLOWED));
    // The twin: another change of its policies does.
    told_instead(&owner, &format!("{NAMED}{API}"), &format!("{}{API}", NAMED.replace("443", "444")));
    assert!(!open.carries(DENIED));
    owner.uninstall().unwrap();
}

/// Pods of one label are denied, and names are allowed after that.
const DENIED_PODS: &str = r#"
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: { name: guard }
spec:
  tier: Admin
  priority: 1
  subject: { namespaces: {} }
  egress:
  - { action: Deny, to: [ { pods: { namespaceSelector: {}, podSelector: { matchLabels: { app: vault } } } } ] }
  - { action: Accept, to: [ { domainNames: [ "*.example.org" ] } ] }
"#;

/// Whoever answered for an address beforehand opens no way to the pod that gets it, also where programs do not load.
#[test]
fn a_pod_that_comes_at_an_address_with_a_name_is_denied_from_the_start() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let (owner, refuse) = refusing(&world);
    for (n, name) in [(2, "web"), (3, "api")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    told(&owner, DENIED_PODS);
    let vault = |addresses: &[IpAddr]| Pod::new([("app", "vault")], addresses.iter().copied());
    // One that has no name, whom all programs know.
    assert!(owner.upsert_pod(PodId::new("shop", "first"), vault(&[[10, 20, 9, 9].into()])).unwrap().is_complete());
    learn(&world, &owner, "a.example.org", "api");
    world.tcp("web", "api", 443, true);
    refuse.store(true, Ordering::SeqCst);
    let report = owner.upsert_pod(PodId::new("shop", "api"), vault(&[])).unwrap();
    world.tcp("web", "api", 443, false);
    drop(report);
    owner.retry().unwrap();
    world.tcp("web", "api", 443, false);
    refuse.store(false, Ordering::SeqCst);
    assert!(owner.retry().unwrap().is_complete());
    learn(&world, &owner, "a.example.org", "api");
    world.tcp("web", "api", 443, false);
    // The twin: in the other order the name comes first.
    let mut lines: Vec<&str> = DENIED_PODS.lines().collect();
    let last = lines.len() - 1;
    lines.swap(last - 1, last);
    told_instead(&owner, DENIED_PODS, &lines.join("\n"));
    world.tcp("web", "api", 443, true);
    owner.uninstall().unwrap();
}

/// Replaces so many times, and nothing after that.
struct Tiring(Arc<AtomicI64>);

impl Attacher for Tiring {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        ClsactAttacher.attach_tagged(hook, program, tag)
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        if self.0.fetch_sub(1, Ordering::SeqCst) <= 0 {
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

#[test]
fn who_has_a_program_of_an_answer_that_was_given_up_on_one_hook_is_told_of_and_attached_anew() {
    if !require(Rung::Kernel) {
        return;
    }
    const MANY: i64 = 1 << 40;
    let left = Arc::new(AtomicI64::new(MANY));
    let mut world = World::new();
    let owner = world.open(Tools { attacher: Arc::new(Tiring(Arc::clone(&left))), ..tools() });
    owner.set_clock(frozen(0)).unwrap();
    owner.start().unwrap();
    for (n, name) in [(2, "web"), (3, "db")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    told(&owner, NAMED);
    learn(&world, &owner, "db.example.com", "db");
    // One hook gets the program that knows both names together; neither gets the one before again.
    left.store(1, Ordering::SeqCst);
    let addresses = [(world.address("db", false), TTL)];
    let learnt = owner.learner().learn(world.address("web", false), &name("a.example.org"), addresses);
    assert!(learnt.is_err());
    let failures: Vec<String> = owner.endpoints().into_iter().filter_map(|endpoint| endpoint.failure).collect();
    assert!(failures.len() == 1 && failures[0].contains("could not be put back"), "{failures:?}");
    left.store(MANY, Ordering::SeqCst);
    let report = owner.retry().unwrap();
    assert!(report.is_complete(), "{report:?}");
    world.tcp("web", "db", 5432, true);
    world.tcp("web", "db", 443, false);
    learn(&world, &owner, "a.example.org", "db");
    world.tcp("web", "db", 443, true);
    owner.uninstall().unwrap();
}
