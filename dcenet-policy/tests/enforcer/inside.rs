//! Pods whose device has no end on the host: macvlans, whose programs are on the device in the pod, held by pinned links.

mod guards;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dcenet_core::journal::Record;
use dcenet_core::netns::NetNs;
use dcenet_core::provider::{Enforcement, PolicySink};
use dcenet_core::test_support::{Rung, ping, require_with};
use dcenet_ebpf::abi::{self, Reason};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{Attacher, Direction, Hook, PinnedLink, TcxAttacher, verdict};
use dcenet_ebpf::datapath::guard::{JUDGES, NAMESPACES, SENDERS};
use dcenet_ebpf::insn;
use dcenet_ebpf::maps::{HashTable, Map, Put};
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::Program;
use dcenet_policy::enforcer::{DefaultVerdict, Phase, PinnedDefault, PolicyConfig, Require};

use crate::frames::SHUT_IN;
use crate::restart::OwnerProcess;
use crate::streams::Stream;
use crate::world::*;

/// How long is waited for what a machine that has much else to do must come to.
const LONG: Duration = Duration::from_secs(60);

pub fn ready() -> bool {
    require_with(Rung::Kernel, || {
        (!Features::probe().is_ok_and(|f| f.tcx)).then(|| "the kernel has no tcx (Linux 6.6)".to_owned())
    })
}

/// Whether parents of macvlans get guards, for whoever wants one.
pub fn has_guards() -> bool {
    Features::probe().is_ok_and(|features| features.netns_cookie)
}

fn world() -> World {
    World::of_macvlans(PolicyConfig::default())
}

/// A world whose pods want guards.
pub fn guarded_world() -> World {
    World::of_macvlans(PolicyConfig { require: Require::Guarded, ..PolicyConfig::default() })
}

impl World {
    fn tcx(&self) -> TcxAttacher {
        TcxAttacher::new(Pins::at(self.host.directory().join("bpf")))
    }

    /// The links of a pod, found by the id in their names.
    fn links(&self, name: &str) -> Vec<PinnedLink> {
        let id = key(name).id().to_string();
        self.tcx().links_of(|label| label.starts_with(&id)).unwrap()
    }

    /// What the names of a pod's pins tell of its slot.
    fn slots(&self, name: &str) -> BTreeSet<Option<u16>> {
        let slot = |label: &str| label.split_once('_').map(|(_, slot)| slot.trim_end_matches('d').parse().unwrap());
        self.links(name).iter().map(|link| slot(&link.label)).collect()
    }

    /// Whether the names say that a pod has default programs alone.
    fn is_on_default(&self, name: &str) -> bool {
        self.links(name).iter().all(|link| !link.label.contains('_') || link.label.ends_with('d'))
    }

    /// What a check says of a pod.
    pub fn missing(&self, name: &str) -> Option<String> {
        let endpoint = self.endpoint(name);
        self.pod(name).run(|| self.sink.missing(&endpoint)).unwrap()
    }

    fn has_pin(&self, name: &str) -> bool {
        Pins::at(self.host.directory().join("bpf")).get(name).unwrap().is_some()
    }

    fn records(&self) -> Vec<Record> {
        self.engine.attachments(&"shop".parse().unwrap()).unwrap()
    }

    fn require(&mut self, require: Require) {
        let config = PolicyConfig { pins: self.host.directory().join("bpf"), require, ..PolicyConfig::default() };
        self.sink = std::sync::Arc::new(PinnedDefault::new(&config, &self.host.run_dir()));
        self.engine = self.host.engine(Some(std::sync::Arc::clone(&self.sink) as _));
    }

    pub fn db_web_scan(&mut self) {
        self.add_enforced("web", 2, &[("app", "web")]);
        self.add_enforced("db", 3, &[("app", "db")]);
        self.add_enforced("scan", 4, &[]);
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn pods_without_an_end_on_the_host_are_under_their_policies() {
    if !ready() {
        return;
    }
    let mut world = world();
    let owner = world.started();
    world.db_web_scan();
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    world.tcp("web", "db", 5432, true);
    world.udp("web", "db", 5353, true);
    world.tcp("web", "db", 5433, false);
    world.tcp("scan", "db", 5432, false);
    world.ping("scan", "db", false);
    // Egress is the other hook, and the other pods have no policy.
    world.tcp("db", "scan", 80, true);
    for status in owner.endpoints() {
        assert_eq!(status.phase, Phase::Enforced, "{status:?}");
        assert_eq!(status.enforcement, Enforcement::EgressBypassable, "{status:?}");
        let name = status.attachment.container.to_string();
        assert_eq!(world.slots(&name), [status.slot].into(), "{name}");
        assert_eq!(world.links(&name).len(), 2, "{name}");
        assert_eq!(world.missing(&name), None, "{name}");
    }
    let slots: BTreeSet<_> = owner.endpoints().iter().map(|status| status.slot).collect();
    assert_eq!(slots.len(), 3, "{slots:?}");
    // Nobody wants a guard.
    assert!(world.guarded_parents().is_empty() && !world.has_pin(SENDERS));

    // A change reaches the flow that lives, and new ones.
    let to = SocketAddr::new(world.address("db", false), 5353);
    let stream = Stream::udp(world.pod("web"), world.pod("db"), to);
    eventually("the stream runs", || stream.received() > 100);
    assert!(owner.set_policies(policies(SHUT_IN)).unwrap().is_complete());
    let revoked = || world.reasons()[&Reason::Revoked] + world.reasons()[&Reason::Denied];
    let before = revoked();
    eventually("the stream is cut", || revoked() > before + 100);
    drop(stream);
    world.tcp("web", "db", 5432, false);
    world.udp("web", "scan", 5353, false);
    world.tcp("scan", "db", 5432, true);
    world.tcp("db", "web", 80, true);
    assert!(owner.set_policies([]).unwrap().is_complete());
    world.tcp("web", "db", 5432, true);

    // What is gone leaves no pin, and its slot is another's in time.
    world.delete("scan");
    assert_eq!(world.links("scan").len(), 0);
    world.add_enforced("scan", 4, &[]);
    world.tcp("scan", "db", 5432, true);

    // The twin: without its links a pod is under no policy, and a check says so.
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    world.tcp("scan", "db", 5432, false);
    for link in world.links("db") {
        world.tcx().release(&link.label).unwrap();
    }
    world.tcp("scan", "db", 5432, true);
    assert!(world.missing("db").expect("it is told").contains("no policy is on eth0"));
    owner.uninstall().unwrap();
}

/// Before its policy is known a pod may resolve its neighbours, by the default that denies, or anything by the other.
#[test]
fn until_policy_is_known_the_default_holds_inside_pods() {
    if !ready() {
        return;
    }
    for default in DefaultVerdict::ALL {
        let mut world = World::of_macvlans(PolicyConfig { default, ..PolicyConfig::default() });
        // Nobody is there to admit the first.
        drop(world.open(tools()));
        world.add("early", 9, &[]);
        assert_eq!(world.slots("early"), [None].into());
        let owner = world.open(tools());
        world.add("web", 2, &[("app", "web")]);
        world.add("db", 3, &[("app", "db")]);
        assert!(world.slots("web").iter().all(Option::is_some), "admitted: {:?}", world.links("web"));
        assert!(world.is_on_default("web") && world.is_on_default("early"), "{:?}", world.links("web"));
        // The next owner takes nobody for enforced who never was.
        drop(owner);
        let owner = world.open(tools());
        let records = world.engine.attachments(&"shop".parse().unwrap()).unwrap();
        owner.adopt(&records).unwrap();
        let phases: BTreeSet<_> = owner.endpoints().iter().map(|status| format!("{:?}", status.phase)).collect();
        assert_eq!((owner.endpoints().len(), phases), (3, ["Default".to_owned()].into()));
        let allowed = default == DefaultVerdict::Allow;
        let neighbours = world.reasons()[&Reason::Neighbour];
        world.tcp("web", "db", 5432, allowed);
        world.tcp("early", "db", 5432, allowed);
        if !allowed {
            let to = world.address("db", false);
            eventually("neighbours are resolved", || {
                assert!(ping(world.pod("web"), to, DENIED).is_err(), "nothing else passes");
                world.reasons()[&Reason::Neighbour] > neighbours
            });
            assert!(world.reasons()[&Reason::PolicyUnknown] > 0);
        }
        owner.set_policies(policies(DB)).unwrap();
        let report = owner.start().unwrap();
        assert!(report.is_complete() && report.enforced == 3, "{report:?}");
        assert!(world.slots("early").iter().all(Option::is_some));
        assert!(!world.is_on_default("early") && !world.is_on_default("web"));
        world.tcp("web", "db", 5432, true);
        world.tcp("early", "db", 5432, false);
        owner.uninstall().unwrap();
    }
}

#[test]
fn owners_of_pods_without_an_end_on_the_host_are_killed_and_their_endpoints_adopted() {
    if !ready() {
        return;
    }
    let mut world = world();
    let owner = OwnerProcess::start(&world);
    world.db_web_scan();
    let slots = |world: &World| ["web", "db", "scan"].map(|name| world.slots(name));
    let before = slots(&world);
    assert!(before.iter().all(|slots| slots.len() == 1 && !slots.contains(&None)), "{before:?}");
    let to = |port| SocketAddr::new(world.address("db", false), port);
    let allowed = Stream::udp(world.pod("web"), world.pod("db"), to(5353));
    let denied = Stream::udp(world.pod("scan"), world.pod("db"), to(5354));
    let mut owner = Some(owner);
    for _ in 0..2 {
        owner.take().unwrap().kill();
        world.tcp("web", "db", 5433, false);
        world.tcp("web", "db", 5432, true);
        owner = Some(OwnerProcess::start(&world));
        world.await_enforced("db", ALLOWED).unwrap();
        assert_eq!(slots(&world), before);
    }
    // Who comes now gets a slot that nobody has.
    world.add_enforced("late", 5, &[]);
    assert!(before.iter().all(|slots| slots.is_disjoint(&world.slots("late"))));
    world.tcp("late", "db", 5432, false);
    owner.take().unwrap().kill();
    let (sent, received, gap) = allowed.stop();
    assert!(sent > 1000, "no flood: {sent}");
    assert!(received + sent / 100 >= sent && gap < Duration::from_secs(1), "{received} of {sent}, gap {gap:?}");
    let (sent, received, _) = denied.stop();
    assert!(sent > 1000 && received == 0, "{received} of {sent}");
}

/// A namespace that ends takes its devices with it: nobody says so, and the owner finds out.
#[test]
fn a_pod_whose_namespace_has_gone_is_forgotten_with_its_pins() {
    if !ready() {
        return;
    }
    let mut world = world();
    let owner = world.started();
    world.db_web_scan();
    // Its path goes, and it lives on, by a descriptor: so does its policy, also where it changes.
    NetNs::remove(world.pod("db").path()).unwrap();
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    world.tcp("scan", "db", 5432, false);
    world.tcp("web", "db", 5432, true);
    world.delete("web");
    drop(world.pods.remove("db"));
    eventually("its device vanishes", || world.links("db").iter().all(|link| link.device.is_none()));
    let report = owner.set_policies([]).unwrap();
    assert!(report.failures.is_empty(), "{report:?}");
    eventually("it is forgotten", || owner.endpoints().iter().all(|e| e.attachment != key("db")));
    eventually("its pins go", || world.links("db").is_empty());
    assert_eq!(owner.endpoints().len(), 1);
    owner.uninstall().unwrap();
}

/// The programs are there before the device is up, on both hooks, and nobody's after the attach has failed.
#[test]
fn links_inside_a_pod_are_of_its_device_alone() {
    if !ready() {
        return;
    }
    let mut world = world();
    let owner = world.started();
    world.db_web_scan();
    // Devices of pods have equal indices, and each link is found in its own namespace.
    for name in ["web", "db", "scan"] {
        let device = world.endpoint(name).ifindex;
        for direction in [Direction::Ingress, Direction::Egress] {
            let hook = Hook { device, direction };
            let attached = world.pod(name).run(|| world.tcx().attached(hook)).unwrap().unwrap();
            let link = world.links(name).into_iter().find(|link| link.direction == direction).unwrap();
            assert_eq!(attached.program, Some(link.program), "{name}");
        }
    }
    let programs: BTreeSet<u32> =
        ["web", "db", "scan"].iter().flat_map(|n| world.links(n)).map(|l| l.program).collect();
    assert_eq!(programs.len(), 6, "each holds its own slot");
    owner.uninstall().unwrap();
    assert_eq!(world.links("db").len(), 0);
    world.tcp("scan", "db", 80, true);
}

/// On a segment anybody can have the node's address, so that it opens nothing. The twin is a pod with an end on the host, where
/// it is the node's alone.
#[test]
fn on_a_segment_the_address_of_the_node_opens_nothing() {
    if !ready() {
        return;
    }
    for on_segment in [true, false] {
        let mut world = if on_segment { world() } else { World::new() };
        let owner = world.started();
        world.add_enforced("db", 3, &[("app", "db")]);
        if on_segment {
            // Somebody on the segment, on the other side of the pods' parent.
            world.host.root().sh("ip addr add 10.20.0.1/24 dev far0");
        }
        let to = world.address("db", false);
        ping(world.host.root(), to, LONG).expect("no policy is there yet");
        assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
        if on_segment {
            let denied = world.reasons()[&Reason::Denied];
            eventually("it is denied", || {
                assert!(ping(world.host.root(), to, DENIED).is_err(), "the node's address is believed");
                world.reasons()[&Reason::Denied] > denied
            });
        } else {
            ping(world.host.root(), to, LONG).expect("the node is let in");
        }
        owner.uninstall().unwrap();
    }
}

/// The default knows no addresses before an owner has noted the pod, and lets no probe for them pass.
#[test]
fn probes_without_an_owner_fail_with_the_reason_and_pass_with_one() {
    if !ready() {
        return;
    }
    let mut world = world();
    world.probes = 1;
    drop(world.open(tools()));
    let error = world.try_add("db", 3, &[]).unwrap_err();
    assert!(error.contains("does the policy owner run?"), "{error}");
    let owner = world.started();
    world.add_enforced("web", 2, &[]);
    owner.uninstall().unwrap();
}

/// Whoever detaches a pod whose device lives on leaves it nothing that later policy would make wrong.
#[test]
fn a_device_that_outlives_its_attachment_is_shut() {
    if !ready() {
        return;
    }
    let mut world = world();
    let owner = world.started();
    world.db_web_scan();
    world.tcp("web", "db", 5432, true);
    // Told to an owner, and below without one.
    let default = |name: &str| world.links(name).iter().all(|link| !link.label.contains('_'));
    world.sink.detach(&key("db")).unwrap();
    assert!(default("db") && world.links("db").len() == 2, "{:?}", world.links("db"));
    assert!(owner.endpoints().iter().all(|status| status.attachment != key("db")));
    world.tcp("web", "db", 5432, false);
    world.tcp("web", "scan", 5432, true);
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    assert!(default("db"), "{:?}", world.links("db"));
    drop(owner);
    world.sink.detach(&key("scan")).unwrap();
    assert!(default("scan") && world.links("scan").len() == 2, "{:?}", world.links("scan"));
    world.tcp("web", "scan", 5432, false);
    world.open(tools()).uninstall().unwrap();
}
