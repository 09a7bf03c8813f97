//! tcx: the suite, and what only it has.
//!
//! Programs of others come from aya, which also tells what is on a device: it shares no code with ours.

use std::path::Path;
use std::time::Duration;

use aya::programs::tc::{TcAttachOptions, TcAttachType};
use aya::programs::{LinkOrder, SchedClassifier};
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, require_with, udp_echo};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::conformance::{Pair, constant, deny};
use dcenet_ebpf::attach::{
    AttachError, Attached, Attacher, ClsactAttacher, Direction, Hook, Owner, Placement, Tag, TcxAttacher, Via,
    everything, for_kernel, verdict,
};
use dcenet_ebpf::object::{Object, ProgramKind};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;

use crate::{PLACE, PinScene, Pinning, conforms};

fn ready() -> bool {
    require_with(Rung::Kernel, || {
        let tcx = Features::probe().map(|f| f.tcx);
        tcx.map_or_else(|e| Some(e.to_string()), |tcx| (!tcx).then(|| "the kernel has no tcx (Linux 6.6)".to_owned()))
    })
}

type Scene = PinScene<TcxAttacher>;

impl Pinning for TcxAttacher {
    fn pinning(pins: Pins) -> Self {
        Self::new(pins)
    }

    fn seen(host: &TestNetNs) -> String {
        format!("{:?}", [TcAttachType::Ingress, TcAttachType::Egress].map(|direction| seen(host, "h0", direction)))
    }
}

fn attacher(place: &Path) -> TcxAttacher {
    TcxAttacher::new(Pins::at(place))
}

/// What it takes.
const TAKES: ProgramKind = ProgramKind::Classifier;

conforms!(ready);

/// The programs that aya finds on a device, in their order.
fn seen(host: &TestNetNs, device: &str, direction: TcAttachType) -> Vec<u32> {
    let (_, programs) = host.run(|| SchedClassifier::query_tcx(device, direction)).unwrap();
    programs.iter().map(|p| p.id()).collect()
}

/// A program of somebody else, on a device as long as this lives.
struct Foreign {
    _loaded: aya::Ebpf,
    id: u32,
}

impl Foreign {
    fn attach(host: &TestNetNs, device: &str, answer: i32, direction: TcAttachType, options: TcAttachOptions) -> Self {
        let mut code = Asm::program("stranger", ProgramKind::Classifier);
        code.ret(answer);
        let mut object = Object::new();
        object.add(code.finish().unwrap()).unwrap();
        let mut loaded = aya::Ebpf::load(&object.to_elf().unwrap()).unwrap();
        let program: &mut SchedClassifier = loaded.program_mut("stranger").unwrap().try_into().unwrap();
        program.load().unwrap();
        let id = program.info().unwrap().id();
        host.run(|| program.attach_with_options(device, direction, options)).unwrap();
        Self { _loaded: loaded, id }
    }

    fn first(host: &TestNetNs, device: &str, answer: i32) -> Self {
        Self::attach(host, device, answer, TcAttachType::Ingress, TcAttachOptions::TcxOrder(LinkOrder::first()))
    }

    fn last(host: &TestNetNs, device: &str, answer: i32) -> Self {
        Self::attach(host, device, answer, TcAttachType::Ingress, TcAttachOptions::TcxOrder(LinkOrder::last()))
    }
}

fn id(attached: &Attached) -> u32 {
    attached.program.unwrap()
}

/// Whether a datagram from the pod is answered by the host.
fn passes(pair: &Pair) -> bool {
    udp_echo(&pair.pod, pair.host.root(), "10.9.0.1".parse().unwrap(), Duration::from_millis(700)).is_ok()
}

/// The same where it must: a slow machine may need longer for one.
fn passes_at_last(pair: &Pair) -> bool {
    (0..60).any(|_| passes(pair))
}

/// Both ends up, and packets pass.
fn up(pair: &Pair) {
    let root = pair.host.root();
    root.set_up("h0");
    root.sh("ip neigh replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev h0");
    assert!(passes_at_last(pair), "no packet passes though nothing is attached");
}

#[test]
fn ours_goes_where_it_is_told_to() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Ingress);
    let [a, b] = [Foreign::last(root, "h0", verdict::UNSPEC), Foreign::last(root, "h0", verdict::UNSPEC)];
    let ours = deny();
    let us = ours.info().id;
    for (placement, order) in [
        (Placement::First, [us, a.id, b.id]),
        (Placement::Last, [a.id, b.id, us]),
        (Placement::Before(b.id), [a.id, us, b.id]),
        (Placement::After(a.id), [a.id, us, b.id]),
    ] {
        let attacher = TcxAttacher::placed(scene.pins.clone(), placement);
        pair.on_host(|| attacher.attach(hook, &ours, "ours")).unwrap();
        assert_eq!(seen(root, "h0", TcAttachType::Ingress), order, "{placement:?}");
        let chain = pair.on_host(|| attacher.chain(hook)).unwrap();
        assert_eq!(chain.iter().map(id).collect::<Vec<_>>(), order, "{placement:?}");
        for (place, attached) in chain.iter().enumerate() {
            assert_eq!(usize::from(attached.priority), place);
            let owner =
                if id(attached) == us { Owner::Ours("ours".into()) } else { Owner::Foreign(Some("stranger".into())) };
            assert_eq!(attached.owner, owner);
            assert!(matches!(attached.via, Via::Tcx { link: Some(_) }), "{attached:?}");
        }
        // A replaced program keeps its place.
        let other = constant("other", verdict::UNSPEC);
        pair.on_host(|| attacher.replace(hook, &other, "ours")).unwrap();
        let order = order.map(|p| if p == us { other.info().id } else { p });
        assert_eq!(seen(root, "h0", TcAttachType::Ingress), order, "{placement:?}");
        assert!(pair.on_host(|| attacher.detach(hook)).unwrap());
        assert_eq!(seen(root, "h0", TcAttachType::Ingress), [a.id, b.id]);
    }
    let nowhere = TcxAttacher::placed(scene.pins.clone(), Placement::Before(us));
    let refused = pair.on_host(|| nowhere.attach(hook, &ours, "ours")).unwrap_err();
    assert!(matches!(refused, AttachError::NoNeighbour { program, .. } if program == us), "{refused}");
    assert_eq!(scene.pins.list().unwrap(), [""; 0]);
    // The same program twice on one hook is refused by the kernel.
    let first = pair.on_host(|| scene.attacher.attach(hook, &ours, "ours")).unwrap();
    assert_eq!(first, None);
    let second = Scene::new();
    let refused = pair.on_host(|| second.attacher.attach(hook, &ours, "theirs")).unwrap_err();
    assert!(matches!(refused, AttachError::Occupied { .. }), "{refused}");
    drop((a, b));
}

/// What passes our program is still for others to drop, and what others drop is not ours to see.
#[test]
fn programs_of_others_before_and_behind_ours_decide_too() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Ingress);
    up(&pair);
    let go_on = constant("go_on", verdict::UNSPEC);
    pair.on_host(|| scene.attacher.attach(hook, &go_on, "ours")).unwrap();
    assert!(passes_at_last(&pair), "ours alone lets it pass");
    let behind = Foreign::last(root, "h0", verdict::SHOT);
    assert!(!passes(&pair), "who stands behind ours is asked");
    // The twin: with a verdict that ends the chain nobody behind is.
    let end = constant("end", verdict::OK);
    pair.on_host(|| scene.attacher.replace(hook, &end, "ours")).unwrap();
    assert!(passes_at_last(&pair), "TC_ACT_OK skips who stands behind");
    pair.on_host(|| scene.attacher.replace(hook, &go_on, "ours")).unwrap();
    drop(behind);
    assert!(passes_at_last(&pair));
    let before = Foreign::first(root, "h0", verdict::SHOT);
    assert!(!passes(&pair), "who stands before ours is asked");
    drop(before);
    assert!(passes_at_last(&pair));
    // clsact comes behind tcx, and is asked as well.
    root.sh("tc qdisc add dev h0 clsact");
    root.sh("tc filter add dev h0 ingress pref 1 protocol ip bpf da bytecode '1,6 0 0 2,'");
    assert!(!passes(&pair), "clsact is asked after tcx");
    pair.on_host(|| scene.attacher.replace(hook, &end, "ours")).unwrap();
    assert!(passes_at_last(&pair), "and TC_ACT_OK skips it");
}

#[test]
fn who_can_keep_packets_from_ours_is_told_and_goes_when_named() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Ingress);
    up(&pair);
    let denies = deny();
    pair.on_host(|| scene.attacher.attach(hook, &denies, "ours")).unwrap();
    assert!(!passes(&pair));
    assert_eq!(pair.on_host(|| scene.attacher.before(hook)).unwrap(), []);
    // Two others: ahead of ours by a link, behind it another.
    let ahead = Foreign::first(root, "h0", verdict::OK);
    let behind = Foreign::last(root, "h0", verdict::UNSPEC);
    assert!(passes_at_last(&pair), "the hole: TC_ACT_OK ahead of ours");
    let told = pair.on_host(|| scene.attacher.before(hook)).unwrap();
    assert_eq!(told.iter().map(id).collect::<Vec<_>>(), [ahead.id]);
    assert_eq!(told[0].owner, Owner::Foreign(Some("stranger".into())));
    // Only what is named goes.
    assert!(pair.on_host(|| scene.attacher.evict(hook, &told[0])).unwrap());
    assert!(!passes(&pair), "the hole is closed");
    assert_eq!(seen(root, "h0", TcAttachType::Ingress), [denies.info().id, behind.id]);
    assert!(!pair.on_host(|| scene.attacher.evict(hook, &told[0])).unwrap(), "it is gone");
    // Ours is not evicted, by whichever name.
    for ours in pair.on_host(|| everything(hook)).unwrap().iter().filter(|a| id(a) == denies.info().id) {
        let refused = pair.on_host(|| scene.attacher.evict(hook, ours)).unwrap_err();
        assert!(matches!(refused, AttachError::NotForeign { .. }), "{refused}");
    }
    // What sits on tcx is ahead of ours on clsact, wherever it stands there.
    assert!(pair.on_host(|| scene.attacher.detach(hook)).unwrap());
    pair.on_host(|| ClsactAttacher.attach(hook, &denies, "ours")).unwrap();
    root.sh("tc filter add dev h0 ingress pref 1 protocol ip bpf da bytecode '1,6 0 0 0,'");
    root.sh("tc filter add dev h0 ingress pref 50000 protocol ip bpf da bytecode '1,6 0 0 0,'");
    assert!(passes_at_last(&pair), "the hole: a filter that answers TC_ACT_OK");
    let told = pair.on_host(|| ClsactAttacher.before(hook)).unwrap();
    let told: Vec<_> = told.into_iter().map(|a| (a.owner, a.priority)).collect();
    let stranger = Owner::Foreign(Some("stranger".into()));
    assert_eq!(told, [(stranger, 0), (Owner::Foreign(Some("bpf".into())), 1)]);
    for told in pair.on_host(|| ClsactAttacher.before(hook)).unwrap() {
        assert!(pair.on_host(|| ClsactAttacher.evict(hook, &told)).unwrap());
    }
    assert_eq!(pair.on_host(|| ClsactAttacher.before(hook)).unwrap(), []);
    assert!(!passes(&pair), "the hole is closed");
    assert!(root.sh("tc filter show dev h0 ingress").contains("pref 50000"), "what was not named stays");
}

/// The link of `TcxAttacher` is found by one who opens the same pins, and by nobody else.
#[test]
fn who_has_the_pins_adopts() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let hook = pair.hook(Direction::Egress);
    let program = deny();
    pair.on_host(|| scene.attacher.attach(hook, &program, "db-0")).unwrap();
    let heir = TcxAttacher::new(Pins::at(scene.place()));
    let found = pair.on_host(|| heir.attached(hook)).unwrap().unwrap();
    assert_eq!((found.owner.clone(), found.program), (Owner::Ours("db-0".into()), Some(program.info().id)));
    let stranger = Scene::new();
    assert_eq!(pair.on_host(|| stranger.attacher.attached(hook)).unwrap(), None);
    assert!(!pair.on_host(|| stranger.attacher.detach(hook)).unwrap());
    // Nor by one whose pins are nowhere: it finds nothing, and leaves nothing that it could not pin.
    let nowhere = TcxAttacher::new(Pins::at(scene.pins.directory().with_file_name("missing")));
    assert_eq!(pair.on_host(|| nowhere.attached(hook)).unwrap(), None);
    assert!(!pair.on_host(|| nowhere.detach(hook)).unwrap());
    assert_eq!(nowhere.links().unwrap(), []);
    let refused = pair.on_host(|| nowhere.replace(hook, &deny(), "x")).unwrap_err();
    assert!(matches!(refused, AttachError::NotAttached { .. }), "{refused}");
    let refused = pair.on_host(|| nowhere.attach(hook, &deny(), "x")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ENOENT), "{refused}");
    assert_eq!(seen(pair.host.root(), "h0", TcAttachType::Egress), [program.info().id]);
    assert!(pair.on_host(|| heir.detach(hook)).unwrap());
    assert_eq!(scene.pins.list().unwrap(), [""; 0]);
}

#[test]
fn a_revision_tells_of_every_change() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Ingress);
    let revision = || pair.on_host(|| scene.attacher.revision(hook)).unwrap().unwrap();
    let mut last = revision();
    assert_eq!(revision(), last);
    let mut raised = |what: &str| {
        let now = revision();
        assert!(now > last, "{what}: {now} after {last}");
        assert_eq!(revision(), now, "{what}");
        last = now;
    };
    pair.on_host(|| scene.attacher.attach(hook, &deny(), "x")).unwrap();
    raised("attached");
    pair.on_host(|| scene.attacher.replace(hook, &constant("other", verdict::UNSPEC), "x")).unwrap();
    raised("replaced");
    let foreign = Foreign::last(root, "h0", verdict::UNSPEC);
    raised("a foreign one came");
    drop(foreign);
    raised("a foreign one went");
    let nowhere = Hook { device: dcenet_core::model::IfIndex::new(9_999).unwrap(), ..hook };
    assert_eq!(pair.on_host(|| scene.attacher.revision(nowhere)).unwrap(), None);
}

#[test]
fn labels_and_classes_that_have_no_place_are_refused() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let hook = pair.hook(Direction::Ingress);
    pair.on_host(|| {
        let a = &scene.attacher;
        for label in ["a b", "a,b", "a.b", "a/b", "ä", &"x".repeat(161)] {
            let refused = a.attach(hook, &deny(), label).unwrap_err();
            assert!(matches!(refused, AttachError::BadLabel { .. }), "{label}: {refused}");
        }
        let refused = a.attach_tagged(hook, &deny(), Tag { label: "x", class: 7 }).unwrap_err();
        assert!(matches!(refused, AttachError::NoClass { class: 7 }), "{refused}");
        assert_eq!(a.chain(hook).unwrap(), []);
        // Signs of the pin's own name are part of the label.
        for label in ["ingress-1-", "tcx-ingress-1-a", "-", &"x".repeat(160)] {
            a.attach(hook, &deny(), label).unwrap();
            assert_eq!(a.attached(hook).unwrap().unwrap().owner, Owner::Ours(label.to_owned()));
        }
        assert!(a.detach(hook).unwrap());
    });
}

/// A macvlan device on a parent in the host's namespace, in the pod's from its beginning.
fn macvlan(host: &TestHost, pod: &TestNetNs, name: &str, address: &str) -> dcenet_core::model::IfIndex {
    let path = pod.path().display();
    host.root().sh(&format!("ip link add {name} link up0 netns {path} type macvlan mode bridge"));
    pod.sh(&format!("ip addr add {address}/24 dev {name}"));
    pod.link(name).unwrap().index
}

#[test]
fn a_macvlan_device_in_a_pod_is_guarded_from_inside_and_released_from_outside() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let host = TestHost::new();
    let root = host.root();
    // A veth pair for the wire.
    root.sh("ip link add up0 type veth peer name wire; ip link set up0 up; ip link set wire up");
    let [one, two] = [host.new_pod(), host.new_pod()];
    let device = macvlan(&host, &one, "net0", "10.8.0.1");
    macvlan(&host, &two, "net0", "10.8.0.2");
    let hooks = [Direction::Ingress, Direction::Egress].map(|direction| Hook { device, direction });
    let program = deny();
    for hook in hooks {
        one.run(|| scene.attacher.attach(hook, &program, "pod-one")).unwrap();
    }
    one.set_up("net0");
    two.set_up("net0");
    let echo = |from: &TestNetNs, to: &TestNetNs, address: &str| {
        udp_echo(from, to, address.parse().unwrap(), Duration::from_millis(500)).is_ok()
    };
    assert!(!echo(&two, &one, "10.8.0.1"));
    assert!(!echo(&one, &two, "10.8.0.2"));
    // It is the pod's device, and none of the host's.
    assert_eq!(one.run(|| scene.attacher.devices()).unwrap(), [device]);
    assert_eq!(root.run(|| scene.attacher.devices()).unwrap(), []);
    assert_eq!(scene.attacher.links().unwrap().len(), 2);
    // Nothing that a pod's root can do with a queueing discipline takes it off.
    one.sh("tc qdisc add dev net0 clsact; tc qdisc del dev net0 clsact");
    assert!(!echo(&two, &one, "10.8.0.1"));
    // DEL does not enter the pod.
    assert_eq!(scene.attacher.release("pod-one").unwrap(), 2);
    assert_eq!(scene.attacher.release("pod-one").unwrap(), 0);
    assert_eq!(seen(&one, "net0", TcAttachType::Ingress), [0; 0]);
    // The twin: without it the pods reach each other.
    assert!((0..60).any(|_| echo(&two, &one, "10.8.0.1") && echo(&one, &two, "10.8.0.2")));
}

#[test]
fn a_link_follows_its_device_into_a_namespace_and_ends_with_it() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let host = TestHost::new();
    let pod = host.new_pod();
    let root = host.root();
    root.sh("ip link add up0 type veth peer name wire; ip link add net0 link up0 type macvlan mode bridge");
    let device = root.link("net0").unwrap().index;
    let hook = Hook { device, direction: Direction::Ingress };
    let program = deny();
    root.run(|| scene.attacher.attach(hook, &program, "moves")).unwrap();
    root.run(|| ClsactAttacher.attach(hook, &deny(), "stays-behind")).unwrap();
    let links = scene.attacher.links().unwrap();
    assert_eq!(links.iter().map(|l| (l.label.as_str(), l.device)).collect::<Vec<_>>(), [("moves", Some(device))]);
    root.sh(&format!("ip link set net0 netns {}", pod.path().display()));
    let inside = Hook { device: pod.link("net0").unwrap().index, ..hook };
    let moved = pod.run(|| scene.attacher.attached(inside)).unwrap().expect("tcx follows");
    assert_eq!((moved.owner.clone(), moved.program), (Owner::Ours("moves".into()), Some(program.info().id)));
    // The twin: what sits on clsact does not survive it.
    assert_eq!(pod.run(|| ClsactAttacher.attached(inside)).unwrap(), None);
    // Another device of the index that it had is not taken for it.
    root.sh(&format!("ip link add name net0 index {device} type bridge"));
    assert_eq!(root.run(|| scene.attacher.attached(hook)).unwrap(), None);
    assert!(!root.run(|| scene.attacher.detach(hook)).unwrap());
    assert!(matches!(
        root.run(|| scene.attacher.replace(hook, &deny(), "moves")),
        Err(AttachError::NotAttached { .. })
    ));
    assert!(pod.run(|| scene.attacher.attached(inside)).unwrap().is_some());
    assert_eq!(scene.attacher.remove_vanished().unwrap(), []);
    // The device goes: its pin is told of, and removed.
    pod.sh("ip link del net0");
    let vanished = scene.attacher.links().unwrap();
    assert!(matches!(&vanished[..], [l] if l.label == "moves" && l.device.is_none()), "{vanished:?}");
    assert_eq!(pod.run(|| scene.attacher.attached(inside)).unwrap(), None);
    assert_eq!(scene.attacher.remove_vanished().unwrap(), vanished);
    assert_eq!(scene.pins.list().unwrap(), [""; 0]);
}

/// Six threads attach, replace and detach on two devices: ours is on a hook once at most, and no pin stays.
#[test]
fn racing_attachers_share_a_hook() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let hook = pair.hook(Direction::Ingress);
    std::thread::scope(|scope| {
        for worker in 0..6 {
            let (scene, pair) = (&scene, &pair);
            scope.spawn(move || {
                // As another process would.
                let a = TcxAttacher::new(Pins::at(scene.place()));
                let program = constant("racer", verdict::UNSPEC);
                pair.on_host(|| {
                    for round in 0..20 {
                        let label = format!("racer-{worker}");
                        a.attach(hook, &program, &label).unwrap();
                        let ours = a.chain(hook).unwrap();
                        assert!(ours.len() <= 1, "round {round}: {ours:?}");
                        a.detach(hook).unwrap();
                    }
                });
            });
        }
    });
    assert_eq!(seen(pair.host.root(), "h0", TcAttachType::Ingress), [0; 0]);
    assert_eq!(scene.pins.list().unwrap(), [""; 0]);
}

#[test]
fn the_kernel_decides_on_the_backend() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let hook = pair.hook(Direction::Ingress);
    let features = Features::probe().unwrap();
    let attacher = for_kernel(&features, &scene.pins);
    pair.on_host(|| attacher.attach(hook, &deny(), "x")).unwrap();
    assert_eq!(seen(pair.host.root(), "h0", TcAttachType::Ingress).len(), 1);
    assert!(pair.on_host(|| attacher.detach(hook)).unwrap());
    let mut older = features;
    older.tcx = false;
    let attacher = for_kernel(&older, &scene.pins);
    pair.on_host(|| attacher.attach(hook, &deny(), "x")).unwrap();
    assert_eq!(seen(pair.host.root(), "h0", TcAttachType::Ingress), [0; 0]);
    assert!(crate::clsact::state(pair.host.root()).contains("dcenet:x"));
}
