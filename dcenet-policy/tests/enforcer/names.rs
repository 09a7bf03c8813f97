//! Rules by names: answers that the owner is told, how long they count, and what is left of them after a restart.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use dcenet_core::test_support::{Rung, require};
use dcenet_policy::enforcer::learnt::{GRACE, LEAST_TTL};
use dcenet_policy::enforcer::{Clock, Enforcer, EnforcerError, LearnError, Tools};
use dcenet_policy::model::{DomainName, Pod, PodId, PolicyId, Protocol, Tuple};
use dcenet_policy::sources::kubernetes::Documents;

use crate::faults::Refusing;
use crate::world::*;

pub const NAMED: &str = r#"
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: out, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: web } } }
  egress:
  - { action: allow, to: [ { fqdns: [ db.example.com ] } ], services: [ { protocol: tcp, ports: [ 5432 ] } ] }
  - { action: allow, to: [ { fqdns: [ "*.example.org" ] } ], services: [ { protocol: tcp, ports: [ 443 ] } ] }
"#;

/// Some time.
const BEGUN: u64 = 1_800_000_000;

pub const TTL: Duration = Duration::from_secs(300);

/// When an answer of the beginning is over.
pub const OVER: u64 = TTL.as_secs() + GRACE.as_secs();

pub fn frozen(seconds: u64) -> Clock {
    Arc::new(move || SystemTime::UNIX_EPOCH + Duration::from_secs(BEGUN + seconds))
}

pub fn name(text: &str) -> DomainName {
    text.parse().unwrap()
}

pub fn told(owner: &Enforcer, text: &str) {
    let documents = Documents::default().with_yaml("named.yaml", text).unwrap();
    assert!(owner.replace_documents(&Documents::default(), &documents).unwrap().is_complete());
}

pub fn told_instead(owner: &Enforcer, before: &str, now: &str) {
    let [before, now] = [before, now].map(|text| Documents::default().with_yaml("named.yaml", text).unwrap());
    assert!(owner.replace_documents(&before, &now).unwrap().is_complete());
}

pub fn learn(world: &World, owner: &Enforcer, text: &str, of: &str) {
    let addresses = [false, true].map(|ipv6| (world.address(of, ipv6), TTL));
    owner.learner().learn(world.address("web", false), &name(text), addresses).unwrap();
}

/// A connection that is under way.
pub struct Open {
    client: TcpStream,
    server: TcpStream,
}

impl Open {
    pub fn new(world: &World, to: &str, port: u16) -> Self {
        let at = SocketAddr::new(world.address(to, false), port);
        let listener = world.pod(to).run(|| TcpListener::bind(at)).unwrap();
        let client = world.pod("web").run(|| TcpStream::connect_timeout(&at, ALLOWED)).unwrap();
        let (server, _) = listener.accept().unwrap();
        Self { client, server }
    }

    /// Whether a byte gets through in time.
    pub fn carries(&mut self, limit: Duration) -> bool {
        self.server.set_read_timeout(Some(limit)).unwrap();
        self.client.write_all(b"x").unwrap();
        match self.server.read(&mut [0]) {
            Ok(count) => count == 1,
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
                false
            }
        }
    }
}

#[test]
fn an_answer_is_in_force_when_it_is_learnt_and_new_flows_are_denied_when_it_is_over() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.open(tools());
    owner.set_clock(frozen(0)).unwrap();
    let web = || IpAddr::from([10, 20, 0, 2]);
    let early = owner.learner().learn(web(), &name("db.example.com"), [(web(), TTL)]);
    assert!(matches!(early, Err(LearnError::NotStarted)), "{early:?}");
    owner.start().unwrap();
    for (n, name) in [(2, "web"), (3, "db"), (4, "api")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    told(&owner, NAMED);
    world.tcp("web", "db", 5432, false);

    learn(&world, &owner, "DB.example.com", "db");
    world.tcp("web", "db", 5432, true);
    world.tcp("web", "db", 443, false);
    world.tcp("web", "api", 5432, false);
    let subject = PodId::new("shop", "web");
    let tuple = Tuple::egress(world.address("db", false), Protocol::TCP, 5432);
    let why = owner.explain(&subject, &tuple).unwrap().to_string();
    assert!(why.contains("10.20.0.3 is an address of db.example.com for 330 s more"), "{why}");

    // Nobody asks for it, and nothing is kept.
    assert!(!owner.learner().is_asked_for(&name("db.example.net")));
    learn(&world, &owner, "db.example.net", "api");
    assert!(
        owner
            .explain(&subject, &Tuple::egress(world.address("api", false), Protocol::TCP, 443))
            .unwrap()
            .peer_names
            .is_empty()
    );

    let mut open = Open::new(&world, "db", 5432);
    owner.set_clock(frozen(OVER - 1)).unwrap();
    world.tcp("web", "db", 5432, true);
    owner.set_clock(frozen(OVER)).unwrap();
    world.tcp("web", "db", 5432, false);
    assert!(open.carries(ALLOWED), "a connection outlives the answer by which it was opened");
    // Another answer does not end it, though it brings a combination that was not there and so another program.
    learn(&world, &owner, "a.example.org", "api");
    learn(&world, &owner, "a.b.example.org", "api");
    learn(&world, &owner, "db.example.com", "api");
    world.tcp("web", "api", 5432, true);
    world.tcp("web", "api", 443, true);
    world.tcp("web", "db", 5432, false);
    assert!(open.carries(ALLOWED), "nor does another answer end it");
    // The least time, however short the answer's own is.
    owner.learner().learn(web(), &name("b.example.org"), [(world.address("db", false), Duration::ZERO)]).unwrap();
    let tuple = Tuple::egress(world.address("db", false), Protocol::TCP, 443);
    let remaining = owner.explain(&subject, &tuple).unwrap().peer_names[0].remaining;
    assert_eq!(remaining, Some((LEAST_TTL + GRACE).as_secs().cast_signed()));

    // A change of policy has flows judged anew.
    told(&owner, &NAMED.replace("443", "444"));
    assert!(!open.carries(DENIED), "what is allowed no more is ended by a change");
    // Asked for again, it goes on.
    learn(&world, &owner, "db.example.com", "db");
    assert!(open.carries(ALLOWED));
    // What no policy asks for meanwhile is forgotten.
    world.tcp("web", "db", 5432, true);
    told(&owner, &NAMED.replace("db.example.com", "other.example.com"));
    told(&owner, NAMED);
    world.tcp("web", "db", 5432, false);
    owner.uninstall().unwrap();
    assert!(!world.host.run_dir().join("policy.names").exists());
}

#[test]
fn the_next_owner_begins_with_what_was_learnt_and_without_its_file_with_nothing() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    owner.set_clock(frozen(0)).unwrap();
    for (n, name) in [(2, "web"), (3, "db")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    told(&owner, NAMED);
    learn(&world, &owner, "db.example.com", "db");
    world.tcp("web", "db", 5432, true);
    // The same address again, which changes no table.
    const AGAIN: u64 = 200;
    owner.set_clock(frozen(AGAIN)).unwrap();
    learn(&world, &owner, "db.example.com", "db");
    drop(owner);
    world.tcp("web", "db", 5432, true);

    let file = world.host.run_dir().join("policy.names");
    for (is_there, seconds) in [(true, AGAIN + OVER - 1), (true, AGAIN + OVER), (false, 0)] {
        let owner = world.open(tools());
        // Before it has been told policies, those of the owner before count, and no answer for their names is released.
        let asked = ["db.example.com", "db.example.net"].map(|text| owner.learner().is_asked_for(&name(text)));
        assert_eq!(asked, [is_there, false]);
        owner.set_clock(frozen(seconds)).unwrap();
        let records = world.engine.attachments(&"shop".parse().unwrap()).unwrap();
        owner.adopt(&records).unwrap();
        told(&owner, NAMED);
        assert!(owner.start().unwrap().is_complete());
        world.tcp("web", "db", 5432, is_there && seconds < AGAIN + OVER);
        if is_there && seconds == AGAIN + OVER {
            // What the third one is not to know.
            learn(&world, &owner, "db.example.com", "db");
            drop(owner);
            std::fs::remove_file(&file).unwrap();
        }
    }
}

#[test]
fn what_finds_no_room_is_given_up_and_closes_nobody() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    for (n, name) in [(2, "web"), (3, "db")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    told(
        &owner,
        &format!(
            "{NAMED}  - {{ action: allow, to: [ {{ pods: {{ podSelector: {{ matchLabels: {{ app: far }} }} }} }} ] }}\n"
        ),
    );
    learn(&world, &owner, "db.example.com", "db");
    // Each of another block of the table.
    let (mut learnt, web) = (0_u8, world.address("web", false));
    let error = loop {
        assert!(learnt < 200, "the table has no end");
        match owner.learner().learn(web, &name("many.example.org"), [([198, 51, learnt, 1].into(), TTL)]) {
            Ok(()) => learnt += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, LearnError::Enforcer(EnforcerError::NoRoomForNames { .. })), "{error}");
    assert!(learnt > 10, "{learnt}");
    assert_eq!(owner.faults(), []);
    assert!(owner.retry().unwrap().is_complete());
    world.tcp("web", "db", 5432, true);
    // There is room in the blocks that are there.
    owner.learner().learn(web, &name("many.example.org"), [([198, 51, 0, 2].into(), TTL)]).unwrap();
    let refused = owner.learner().learn(web, &name("more.example.org"), [([198, 51, learnt, 1].into(), TTL)]);
    assert!(refused.is_err());
    assert_eq!(owner.faults(), []);
    world.tcp("web", "db", 5432, true);

    // A pod that policies know comes in yet another block: what was learnt gives way to it.
    let far = Pod::new([("app", "far")], ["203.0.113.9".parse().unwrap()]);
    let report = owner.upsert_pod(PodId::new("shop", "far"), far).unwrap();
    assert!(report.is_complete(), "{report:?}");
    world.tcp("web", "db", 5432, false);
    learn(&world, &owner, "db.example.com", "db");
    world.tcp("web", "db", 5432, true);
}

/// A prefix that is denied before names are asked for.
const DENIED_BEFORE: &str = r#"
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: { name: guard }
spec:
  tier: Admin
  priority: 1
  subject: { namespaces: {} }
  egress:
  - { action: Deny, to: [ { networks: [ 10.20.0.0/24, "fd20::/64" ] } ] }
  - { action: Accept, to: [ { domainNames: [ "*.example.org" ] } ] }
"#;

/// Whoever answers for a name that is allowed chooses its address, and gets nobody past a rule that denies that, also while the
/// program that would know both together does not load.
#[test]
fn an_answer_opens_no_prefix_that_is_denied() {
    if !require(Rung::Kernel) {
        return;
    }
    let refuse = Arc::new(AtomicBool::new(false));
    let mut world = World::new();
    let owner = world.open(Tools { loader: Arc::new(Refusing(Arc::clone(&refuse))), ..tools() });
    owner.start().unwrap();
    for (n, name) in [(2, "web"), (3, "api")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    world.tcp("web", "api", 443, true);
    told(&owner, DENIED_BEFORE);
    world.tcp("web", "api", 443, false);
    refuse.store(true, Ordering::SeqCst);
    let (web, answered) = (world.address("web", false), [false, true].map(|ipv6| (world.address("api", ipv6), TTL)));
    let learn = || owner.learner().learn(web, &name("a.example.org"), answered);
    // Each attempt but the first is another way to the tables.
    for _ in 0..3 {
        let error = learn().unwrap_err();
        assert!(error.to_string().contains("injected"), "{error}");
        // What was given up is remembered until something else is carried out.
        owner.retry().unwrap();
        world.tcp("web", "api", 443, false);
    }
    refuse.store(false, Ordering::SeqCst);
    learn().unwrap();
    assert!(owner.retry().unwrap().is_complete());
    world.tcp("web", "api", 443, false);
    // The twin: in the other order the name comes first.
    let mut lines: Vec<&str> = DENIED_BEFORE.lines().collect();
    let last = lines.len() - 1;
    lines.swap(last - 1, last);
    told_instead(&owner, DENIED_BEFORE, &lines.join("\n"));
    world.tcp("web", "api", 443, true);
    world.tcp("api", "web", 443, false);
    owner.uninstall().unwrap();
}

/// As above, where a pod that comes and an answer are carried out together.
#[test]
fn an_answer_that_comes_with_a_pod_opens_no_prefix_that_is_denied() {
    if !require(Rung::Kernel) {
        return;
    }
    let refuse = Arc::new(AtomicBool::new(false));
    let mut world = World::new();
    let owner = world.open(Tools { loader: Arc::new(Refusing(Arc::clone(&refuse))), ..tools() });
    owner.start().unwrap();
    for (n, name) in [(2, "web"), (3, "api")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    told(&owner, DENIED_BEFORE);
    // Nothing is carried out while policies are refused, so that the answer waits.
    let documents = Documents::default().with_yaml("named.yaml", DENIED_BEFORE).unwrap();
    let mut misfiled = documents.clone();
    let (id, policy) = misfiled.policies.pop_first().unwrap();
    misfiled.policies.insert(PolicyId { name: "other".to_owned(), ..id }, policy);
    owner.replace_documents(&documents, &misfiled).unwrap_err();
    let answered = [false, true].map(|ipv6| (world.address("api", ipv6), TTL));
    let learn = || owner.learner().learn(world.address("web", false), &name("a.example.org"), answered);
    assert!(matches!(learn(), Err(LearnError::Enforcer(EnforcerError::Compile(_)))));
    refuse.store(true, Ordering::SeqCst);
    let mut come = documents.clone();
    come.pods
        .insert(PodId::new("shop", "far"), Pod { addresses: ["10.20.9.9".parse().unwrap()].into(), ..Pod::default() });
    assert!(owner.replace_documents(&misfiled, &come).unwrap().is_complete(), "a pod elsewhere needs no program");
    world.tcp("web", "api", 443, false);
    let error = learn().unwrap_err();
    assert!(error.to_string().contains("injected"), "{error}");
    world.tcp("web", "api", 443, false);
    refuse.store(false, Ordering::SeqCst);
    assert!(owner.retry().unwrap().is_complete());
    learn().unwrap();
    world.tcp("web", "api", 443, false);
    owner.uninstall().unwrap();
}

/// An endpoint that never gets programs of its own keeps nobody's connections from outliving answers, nor does a pod that comes.
#[test]
fn an_answer_that_is_over_ends_no_connection_beside_an_endpoint_without_workload() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    owner.set_clock(frozen(0)).unwrap();
    for (n, name) in [(2, "web"), (3, "db")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    told(&owner, NAMED);
    world.anonymous = true;
    world.add("nobody", 4, &[]);
    learn(&world, &owner, "db.example.com", "db");
    let mut open = Open::new(&world, "db", 5432);
    assert!(owner.endpoints().iter().any(|endpoint| endpoint.failure.is_some()));
    owner.set_clock(frozen(OVER)).unwrap();
    world.tcp("web", "db", 5432, false);
    assert!(open.carries(ALLOWED), "it outlives the answer");
    let far = Pod { addresses: ["10.20.9.9".parse().unwrap()].into(), ..Pod::default() };
    learn(&world, &owner, "db.example.com", "db");
    owner.upsert_pod(PodId::new("shop", "far"), far).unwrap();
    owner.set_clock(frozen(3 * TTL.as_secs())).unwrap();
    world.tcp("web", "db", 5432, false);
    assert!(open.carries(ALLOWED), "a pod that comes changes nothing of that");
    owner.uninstall().unwrap();
}
