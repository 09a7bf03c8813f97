//! Guards on the parents of macvlans, which hold what pods send past their own devices.

mod killed;

use std::io::Write;
use std::net::{IpAddr, UdpSocket};

use dcenet_core::test_support::TestNetNs;

use super::*;
use crate::frames::{Arrivals, frame, marked};
use crate::sys::packet_socket;

/// The Ethernet address of a device that a pod makes for itself.
const STACKED: [u8; 6] = [2, 0, 0, 0, 0, 0x66];

impl World {
    /// The directions of the links on all parents.
    pub(super) fn guarded_parents(&self) -> Vec<&'static str> {
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

    fn raw(&self, device: &str, bypass: bool, source: [u8; 6]) -> [Vec<u64>; 2] {
        self.raw_of("web", device, bypass, source)
    }

    fn raw_of(&self, pod: &str, device: &str, bypass: bool, source: [u8; 6]) -> [Vec<u64>; 2] {
        self.raw_from(self.pod(pod), [false, true].map(|v6| self.address(pod, v6)), (device, bypass), source)
    }

    /// How many frames arrive at `scan` and on the wire, of both families and none, that a pod sends by a device and past its queues or
    /// not, from an Ethernet address: until all have, or programs have dropped many.
    fn raw_from(
        &self,
        pod: &TestNetNs,
        own: [IpAddr; 2],
        (device, bypass): (&str, bool),
        source: [u8; 6],
    ) -> [Vec<u64>; 2] {
        let far = self.host.root().link("far0").unwrap().mac.unwrap().bytes();
        let ends = |v6| Some((own[usize::from(v6)], self.address("scan", v6)));
        let kinds = [ends(false), ends(true), None];
        let index = pod.link(device).unwrap().index.get();
        let mut socket = pod.run(|| packet_socket(index, bypass)).unwrap();
        let scan = (self.endpoint("scan").mac.bytes(), Arrivals::of(self.pod("scan")));
        [scan, (far, Arrivals::on(self.host.root(), "far0"))].map(|(to, mut arrivals)| {
            let frames: Vec<_> = (0..).zip(kinds).map(|(kind, ends)| frame(source, to, ends, kind)).collect();
            // Of devices in pods, those of all pods count.
            let (mut seen, begun, before) = (vec![0; frames.len()], Instant::now(), self.dropped("scan"));
            let is_enough = |seen: &[u64]| {
                let dropped = self.dropped("scan") - before;
                seen.iter().all(|count| *count > 0) || dropped >= 20 * frames.len() as u64
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

/// Who has no policy sends past the guard of others as if it were not there; in the name of a guarded pod it gets no further than that.
#[test]
fn a_pod_without_policy_sends_past_the_guard_of_others() {
    if !ready() || !has_guards() {
        return;
    }
    let mut world = guarded_world();
    let owner = world.started();
    world.db_web_scan();
    assert!(owner.set_policies(policies(SHUT_IN)).unwrap().is_complete());
    // An owner that lives would put back what is taken off below.
    drop(owner);
    let (stranger, mac) = (world.host.new_pod(), [2, 0, 0, 0, 0, 0x55]);
    world.host.root().sh(&format!(
        "ip link add eth0 link up0 address 02:00:00:00:00:55 netns {} type macvlan mode bridge",
        stranger.path().display()
    ));
    stranger.set_up("eth0");
    let own = ["10.20.0.55", "fd20::55"].map(|address| address.parse().unwrap());
    let web = (world.endpoint("web").mac.bytes(), [false, true].map(|v6| world.address("web", v6)));
    for bypass in [false, true] {
        let seen = world.raw_from(&stranger, own, ("eth0", bypass), mac);
        assert!(seen.iter().flatten().all(|count| *count > 0), "past its queues: {bypass}: {seen:?}");
    }
    for guarded in [true, false] {
        if !guarded {
            world.release_guards();
        }
        let seen = world.raw_from(&stranger, web.1, ("eth0", true), web.0);
        assert!(seen.iter().flatten().all(|count| (*count == 0) == guarded), "guarded: {guarded}: {seen:?}");
    }
    world.open(tools()).uninstall().unwrap();
}

/// What a pod forwards has no socket. It is the pod's by its Ethernet source, and from another that is nobody's it goes past the guard:
/// the twin, and what a guard does not see.
#[test]
fn what_a_pod_forwards_is_judged_by_its_ethernet_source() {
    if !ready() || !has_guards() {
        return;
    }
    let mut world = guarded_world();
    let owner = world.started();
    world.db_web_scan();
    // An owner that lives would put back what is taken off below.
    drop(owner);
    let (web, behind) = (world.pod("web"), world.host.new_pod());
    web.sh(&format!(
        "ip link add in0 type veth peer name eth0 netns {}
         ip addr add 10.9.0.1/24 dev in0; ip link set in0 up; echo 1 > /proc/sys/net/ipv4/ip_forward",
        behind.path().display()
    ));
    behind.sh("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up; ip route add default via 10.9.0.1");
    // The guard alone: its own device has judged it before.
    for link in world.links("web") {
        world.tcx().release(&link.label).unwrap();
    }
    let (to, mac) = (world.address("scan", false), world.endpoint("scan").mac);
    let socket = behind.run(|| UdpSocket::bind("10.9.0.2:0")).unwrap();
    let is_past = || {
        let (mut arrivals, mut seen) = (Arrivals::of(world.pod("scan")), [0]);
        let spoofed = || world.reasons()[&Reason::Spoofed];
        let before = spoofed();
        eventually("it arrives or is dropped", || {
            socket.send_to(&marked(0), (to, 5353)).unwrap();
            arrivals.drain(&mut seen);
            seen[0] > 0 || spoofed() >= before + 20
        });
        std::thread::sleep(DENIED);
        arrivals.drain(&mut seen);
        seen[0] > 0
    };
    // Its neighbour answers, so that what the kernel asks in the pod's name, without a socket either, has passed.
    assert!(!is_past(), "by its own device, from an address that is not its own");
    world.stack("web");
    web.sh(&format!("ip route add {to}/32 dev mv0; ip neigh add {to} lladdr {mac} dev mv0"));
    assert!(is_past(), "from the Ethernet address of nobody");
    world.open(tools()).uninstall().unwrap();
}
