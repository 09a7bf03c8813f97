//! Pods whose device has no end on the host: macvlans, whose programs are on the device in the pod, held by pinned links.

use std::collections::BTreeSet;
use std::io::Write;
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

use crate::frames::{Arrivals, frame};
use crate::restart::OwnerProcess;
use crate::streams::Stream;
use crate::sys::packet_socket;
use crate::world::*;

/// Nothing may leave `app: web`.
const SHUT_IN: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: web, namespace: shop }
spec:
  podSelector: { matchLabels: { app: web } }
  policyTypes: [Egress]
  egress: []
"#;

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

/// The Ethernet address of a device that a pod makes for itself.
const STACKED: [u8; 6] = [2, 0, 0, 0, 0, 0x66];

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

    /// The directions of the links on all parents.
    fn guarded_parents(&self) -> Vec<&'static str> {
        let links = self.tcx().links_of(|label| label.starts_with("guard-")).unwrap();
        let word = |link: &PinnedLink| if link.direction == Direction::Egress { "egress" } else { "ingress" };
        let mut words: Vec<_> = links.iter().filter(|link| link.device.is_some()).map(word).collect();
        words.sort_unstable();
        words
    }

    /// Packets that were counted of flows to a port, those of the side that opened it and the answers.
    fn questions(&self, port: u16) -> Vec<(u64, u64)> {
        let mut counted = Vec::new();
        for name in abi::FLOW_TABLES {
            let pin = Pins::at(self.host.directory().join("bpf")).get(name).unwrap().unwrap();
            let flows = HashTable::<abi::FlowKey, abi::Flow>::new(Map::from_fd(pin).unwrap()).unwrap();
            let asked = flows.entries().unwrap().into_iter().filter(|(key, _)| key.peer_port == abi::Be16(port));
            counted.extend(asked.map(|(_, flow)| (flow.egress_packets, flow.ingress_packets)));
        }
        counted
    }

    fn has_pin(&self, name: &str) -> bool {
        Pins::at(self.host.directory().join("bpf")).get(name).unwrap().is_some()
    }

    fn guarded_namespaces(&self) -> HashTable<abi::Namespace, u64> {
        let pin = Pins::at(self.host.directory().join("bpf")).get(NAMESPACES).unwrap().unwrap();
        HashTable::new(Map::from_fd(pin).unwrap()).unwrap()
    }

    /// The slots that have a program of their own judge on a parent.
    fn judged_slots(&self) -> BTreeSet<u32> {
        let judges = Map::from_fd(Pins::at(self.host.directory().join("bpf")).get(JUDGES).unwrap().unwrap()).unwrap();
        let has = |slot: &u32| judges.lookup(&slot.to_ne_bytes(), &mut [0; 4]).unwrap();
        (0..judges.info().max_entries).filter(has).collect()
    }

    fn release_guards(&self) {
        for link in self.tcx().links_of(|label| label.starts_with("guard-")).unwrap() {
            self.tcx().release(&link.label).unwrap();
        }
    }

    /// Has a pod make another device on its parent (drivers/net/macvlan.c, `macvlan_common_newlink`).
    fn stack(&self, name: &str) {
        let commands =
            "ip link add mv0 link eth0 address 02:00:00:00:00:66 type macvlan mode bridge; ip link set mv0 up";
        self.pod(name).sh(commands);
    }

    fn records(&self) -> Vec<Record> {
        self.engine.attachments(&"shop".parse().unwrap()).unwrap()
    }

    fn require(&mut self, require: Require) {
        let config = PolicyConfig { pins: self.host.directory().join("bpf"), require, ..PolicyConfig::default() };
        self.sink = std::sync::Arc::new(PinnedDefault::new(&config, &self.host.run_dir()));
        self.engine = self.host.engine(Some(std::sync::Arc::clone(&self.sink) as _));
    }

    fn raw(&self, device: &str, bypass: bool, source: [u8; 6]) -> [Vec<u64>; 2] {
        self.raw_of("web", device, bypass, source)
    }

    /// How many frames arrive at `scan` and on the wire, of both families and none, that a pod sends in its own name from an Ethernet
    /// address: until all have, or programs have dropped many.
    fn raw_of(&self, pod: &str, device: &str, bypass: bool, source: [u8; 6]) -> [Vec<u64>; 2] {
        let far = self.host.root().link("far0").unwrap().mac.unwrap().bytes();
        let ends = |v6| Some((self.address(pod, v6), self.address("scan", v6)));
        let kinds = [ends(false), ends(true), None];
        let index = self.pod(pod).link(device).unwrap().index.get();
        let mut socket = self.pod(pod).run(|| packet_socket(index, bypass)).unwrap();
        let scan = (self.endpoint("scan").mac.bytes(), Arrivals::of(self.pod("scan")));
        [scan, (far, Arrivals::on(self.host.root(), "far0"))].map(|(to, mut arrivals)| {
            let frames: Vec<_> = (0..).zip(kinds).map(|(kind, ends)| frame(source, to, ends, kind)).collect();
            let (mut seen, begun, before) = (vec![0; frames.len()], Instant::now(), self.dropped(pod));
            let is_enough = |seen: &[u64]| {
                seen.iter().all(|count| *count > 0) || self.dropped(pod) >= before + 20 * frames.len() as u64
            };
            while !is_enough(&seen) && begun.elapsed() < LONG {
                for frame in &frames {
                    match socket.write_all(frame) {
                        Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                        written => written.unwrap(),
                    }
                }
                arrivals.drain(&mut seen);
            }
            assert!(is_enough(&seen), "neither arrived nor dropped: {seen:?}");
            std::thread::sleep(DENIED);
            arrivals.drain(&mut seen);
            seen
        })
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

/// What goes past the queues of a pod's own device, and what comes from one that the pod has made on the same parent, is judged on the
/// parent: to the pod beside and to the wire, whoever's Ethernet address it bears. Without a guard all of it arrives, and what is
/// reported says so.
#[test]
fn raw_frames_past_a_pods_own_device_meet_the_guard_of_its_parent() {
    if !ready() {
        return;
    }
    let mut world = if has_guards() { guarded_world() } else { world() };
    let owner = world.started();
    world.db_web_scan();
    world.tcp("web", "scan", 5432, true);
    assert!(owner.set_policies(policies(SHUT_IN)).unwrap().is_complete());
    let reported = if has_guards() { Enforcement::Guarded } else { Enforcement::EgressBypassable };
    assert!(owner.endpoints().iter().all(|status| status.enforcement == reported));
    world.stack("web");
    // An owner that lives would put back what is taken off below.
    drop(owner);
    let guarded = world.guarded_parents();
    assert_eq!(guarded, if has_guards() { vec!["egress", "ingress"] } else { vec![] });

    // The twin of what its own programs drop.
    let (own, parent) =
        (world.endpoint("web").mac.bytes(), world.host.root().link("up0").unwrap().mac.unwrap().bytes());
    let ways =
        [("eth0", own), ("eth0", parent), ("eth0", world.endpoint("db").mac.bytes()), ("mv0", STACKED), ("mv0", own)];
    let seen = world.raw("eth0", false, own);
    assert!(seen.iter().flatten().all(|count| *count == 0), "by its queues: {seen:?}");
    for guards in [has_guards(), false] {
        if !guards {
            world.release_guards();
        }
        for (device, source) in ways {
            let seen = world.raw(device, true, source);
            let all = seen.iter().flatten().all(|count| (*count == 0) == guards);
            assert!(all, "{device} {source:x?}, guards: {guards}: {seen:?}");
        }
    }
    for link in world.links("web") {
        world.tcx().release(&link.label).unwrap();
    }
    let seen = world.raw("eth0", false, own);
    assert!(seen.iter().flatten().all(|count| *count > 0), "without its links: {seen:?}");
    world.open(tools()).uninstall().unwrap();
}

/// A configuration that wants a guard gets it before the device is up, or is refused, and nothing stays.
#[test]
fn who_wants_a_guard_gets_it_or_is_refused() {
    if !ready() {
        return;
    }
    let mut world = world();
    let owner = world.started();
    world.require(Require::Full);
    let error = world.try_add("strict", 7, &[]).unwrap_err();
    assert!(error.contains("policy.require \"full\"") && error.contains("eth0 lives in the pod"), "{error}");
    assert_eq!(world.links("strict").len(), 0);

    world.require(Require::Guarded);
    if has_guards() {
        world.db_web_scan();
        world.tcp("web", "db", 5432, true);
        assert_eq!(world.missing("web"), None);
        assert_eq!(world.guarded_parents(), ["egress", "ingress"]);
        // What both the pod's device and its parent have judged counts once.
        world.udp("web", "db", 5353, true);
        let asked = world.questions(5353);
        assert_eq!(asked, [(1, 1), (1, 1)], "of both families");
        // What somebody puts ahead of the guard is told of, unless the operator knows it.
        let mut code = Asm::program("tracer", ProgramKind::Classifier);
        code.ret(verdict::OK);
        let tracer =
            Program::load(ProgramKind::Classifier, "tracer", &insn::encode(code.finish().unwrap().insns())).unwrap();
        let pins = Pins::open(world.host.directory().join("tracer")).unwrap();
        let (tcx, root) = (TcxAttacher::new(pins.clone()), world.host.root());
        let hook = Hook { device: root.link("up0").unwrap().index, direction: Direction::Egress };
        root.run(|| tcx.attach(hook, &tracer, "tracer")).unwrap();
        let told = world.missing("web").expect("it is told");
        assert!(told.contains("\"tracer\" on tcx") && told.contains("before the guard"), "{told}");
        for (known, accepted) in [("tracer", true), ("trace", false)] {
            let policy = PolicyConfig {
                pins: world.host.directory().join("bpf"),
                require: Require::Guarded,
                ahead: vec![known.parse().unwrap()],
                ..PolicyConfig::default()
            };
            let sink = PinnedDefault::new(&policy, &world.host.run_dir());
            let endpoint = world.endpoint("web");
            let told = world.pod("web").run(|| sink.missing(&endpoint)).unwrap();
            assert_eq!(told.is_none(), accepted, "{known}: {told:?}");
        }
        assert!(root.run(|| tcx.detach(hook)).unwrap());
        pins.unmount().unwrap();
        assert_eq!(world.missing("web"), None);
        // The twin of a check that finds nothing.
        world.release_guards();
        assert!(world.missing("web").expect("it is told").contains("no guard is on the parent"));
        world.delete("scan");
        world.add_enforced("scan", 4, &[]);
        assert_eq!(world.missing("scan"), None, "it is there again");
        world.release_guards();
        eventually("the owner puts it back", || world.guarded_parents() == ["egress", "ingress"]);
        assert_eq!(world.missing("web"), None);
    } else {
        let error = world.try_add("web", 2, &[]).unwrap_err();
        assert!(error.contains("policy.require \"guarded\"") && error.contains("Linux 6.13"), "{error}");
        assert_eq!(world.links("web").len(), 0);
    }
    // What is there is there without an owner, too, but nobody else can put it there.
    drop(owner);
    if has_guards() {
        assert_eq!(world.missing("web"), None);
        world.release_guards();
        let told = world.missing("web").expect("it is told");
        assert!(told.contains("no guard is on the parent of eth0") && told.contains("does not run"), "{told}");
    }
    let error = world.try_add("alone", 8, &[]).unwrap_err();
    assert!(error.contains("the policy owner does not run"), "{error}");
    assert_eq!(world.links("alone").len(), 0);
    world.open(tools()).uninstall().unwrap();
    assert!(world.guarded_parents().is_empty());
}

/// Guards hold while no owner lives, and each goes with the last pod of its parent.
#[test]
fn guards_outlive_their_owner_and_go_with_the_last_pod_of_a_parent() {
    if !ready() || !has_guards() {
        return;
    }
    let mut world = guarded_world();
    world.host.root().sh("ip link add up1 type veth peer name far1
         for end in far1 up1; do ip link set $end addrgenmode none; ip link set $end up; done");
    let owner = OwnerProcess::start(&world);
    world.db_web_scan();
    world.parent = Some("up1");
    world.add_enforced("far", 9, &[("app", "db")]);
    assert_eq!(world.guarded_parents().len(), 4);
    world.tcp("web", "scan", 80, true);
    owner.kill();
    // By its policy it may send: to what it owns.
    let own = world.endpoint("db").mac.bytes();
    let (web, stranger) = (world.endpoint("web").mac.bytes(), STACKED);
    let seen = world.raw_of("db", "eth0", true, own);
    // The third is of no known protocol.
    let ip = seen.iter().flat_map(|seen| &seen[..2]).all(|count| *count > 0);
    assert!(ip && seen.iter().all(|seen| seen[2] == 0), "as allowed: {seen:?}");
    for source in [web, stranger] {
        let seen = world.raw_of("db", "eth0", true, source);
        assert!(seen.iter().flatten().all(|count| *count == 0), "{source:x?}: {seen:?}");
    }

    let owner = world.started();
    let records = world.engine.attachments(&"shop".parse().unwrap()).unwrap();
    owner.adopt(&records).unwrap();
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    assert!(
        owner.endpoints().iter().all(|status| status.enforcement == Enforcement::Guarded),
        "{:?}",
        owner.endpoints()
    );
    world.tcp("web", "db", 5432, true);
    world.tcp("scan", "db", 5432, false);
    for name in ["web", "db"] {
        world.delete(name);
        assert_eq!(world.guarded_parents().len(), 4, "others are there");
    }
    world.delete("scan");
    assert_eq!(world.guarded_parents().len(), 2, "the last of its parent");
    // Its devices go with it.
    world.host.root().sh("ip link del up1");
    owner.set_policies([]).unwrap();
    eventually("its guard goes", || world.guarded_parents().is_empty());
    owner.uninstall().unwrap();
}

/// Whoever wants no guard is not harmed by that of another on the same parent, which holds what its own pod sends by whatever
/// device.
#[test]
fn a_guard_is_for_the_pods_that_want_one() {
    if !ready() || !has_guards() {
        return;
    }
    let mut world = guarded_world();
    let owner = world.started();
    world.add_enforced("db", 3, &[]);
    world.require(Require::Any);
    world.add_enforced("web", 2, &[]);
    world.add_enforced("scan", 4, &[]);
    let enforcement = |name: &str| owner.endpoints().iter().find(|e| e.attachment == key(name)).unwrap().enforcement;
    assert_eq!(enforcement("db"), Enforcement::Guarded);
    assert_eq!(enforcement("web"), Enforcement::EgressBypassable);
    let slot = owner.endpoints().iter().find(|e| e.attachment == key("db")).and_then(|e| e.slot).unwrap();
    assert_eq!(world.judged_slots(), [u32::from(slot)].into());
    for name in ["web", "db"] {
        world.stack(name);
        let seen = world.raw_of(name, "mv0", false, STACKED);
        let dropped = name == "db";
        assert!(seen.iter().flatten().all(|count| (*count == 0) == dropped), "{name}: {seen:?}");
        world.pod(name).sh("ip link del mv0");
    }
    world.tcp("web", "db", 80, true);
    world.tcp("db", "scan", 80, true);
    // The same pod, by a configuration that wants none any more.
    let endpoint = world.endpoint("db");
    world.pod("db").run(|| world.sink.attach(&endpoint)).unwrap();
    world.await_enforced("db", ALLOWED).unwrap();
    assert_eq!(enforcement("db"), Enforcement::EgressBypassable);
    assert!(world.guarded_parents().is_empty());
    assert_eq!((world.judged_slots().len(), world.guarded_namespaces().entries().unwrap().len()), (0, 0));
    world.stack("db");
    let seen = world.raw_of("db", "mv0", false, STACKED);
    assert!(seen.iter().flatten().all(|count| *count > 0), "{seen:?}");
    owner.uninstall().unwrap();
}

/// What an owner finds written down of a pod may be of an earlier one with the same name, Ethernet address and slot.
#[test]
fn a_pod_that_came_anew_while_no_owner_ran_is_guarded_as_it_is_now() {
    if !ready() || !has_guards() {
        return;
    }
    let mut world = guarded_world();
    let owner = world.started();
    world.db_web_scan();
    drop(owner);
    world.require(Require::Any);
    world.delete("web");
    world.add("web", 2, &[("app", "web")]);
    // What an owner that dies in the middle leaves.
    world.guarded_namespaces().store(&abi::Namespace { netns: 7, parent: 7 }, &1, Put::Any).unwrap();
    let owner = world.open(tools());
    owner.adopt(&world.records()).unwrap();
    owner.set_policies(policies(SHUT_IN)).unwrap();
    assert!(owner.start().unwrap().is_complete());
    world.await_enforced("web", ALLOWED).unwrap();
    for status in owner.endpoints() {
        assert_eq!(status.enforcement, Enforcement::Guarded, "{status:?}");
    }
    world.stack("web");
    let own = world.endpoint("web").mac.bytes();
    for (device, bypass, source) in [("mv0", false, STACKED), ("eth0", true, STACKED), ("eth0", true, own)] {
        let seen = world.raw(device, bypass, source);
        assert!(seen.iter().flatten().all(|count| *count == 0), "{device} {source:x?}: {seen:?}");
    }
    world.tcp("db", "scan", 80, true);
    let namespaces = || world.guarded_namespaces().entries().unwrap();
    assert_eq!(namespaces().len(), 3, "that of the earlier one is gone, and what nobody has");
    // The twin: nobody knows the namespace.
    drop(owner);
    for (namespace, _) in namespaces() {
        world.guarded_namespaces().remove(&namespace).unwrap();
    }
    let seen = world.raw("mv0", false, STACKED);
    assert!(seen.iter().flatten().all(|count| *count > 0), "{seen:?}");
    world.open(tools()).uninstall().unwrap();
}

/// A pod that runs keeps what it has where a call about it is repeated that wants more than can be; one that comes is taken back.
#[test]
fn a_repeated_call_that_is_refused_a_guard_leaves_the_pod_as_it_was() {
    if !ready() {
        return;
    }
    let mut world = world();
    let owner = world.started();
    world.mode = "passthru";
    world.add_enforced("db", 3, &[("app", "db")]);
    world.require(Require::Guarded);
    let why = if has_guards() { "(mode passthru)" } else { "bpf_get_netns_cookie" };
    let (slots, endpoint) = (world.slots("db"), world.endpoint("db"));
    assert_eq!(slots.len(), 1, "{slots:?}");
    for _ in 0..2 {
        let error = world.pod("db").run(|| world.sink.attach(&endpoint)).unwrap_err().to_string();
        assert!(error.contains("policy.require \"guarded\"") && error.contains(why), "{error}");
        assert_eq!((world.slots("db"), world.is_on_default("db")), (slots.clone(), false));
        assert!(world.missing("db").expect("it is told").contains(why));
    }
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete(), "its policy is enforced all the same");
    assert_eq!(owner.endpoints().len(), 1);
    assert_eq!(owner.endpoints()[0].enforcement, Enforcement::EgressBypassable);
    assert_eq!(world.slots("db"), slots);

    world.delete("db");
    let error = world.try_add("db", 3, &[]).unwrap_err();
    assert!(error.contains(why), "{error}");
    assert_eq!((world.links("db").len(), owner.endpoints().len()), (0, 0));
    assert!(world.guarded_parents().is_empty());
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
