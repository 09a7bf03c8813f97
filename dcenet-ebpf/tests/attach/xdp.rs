//! XDP: the suite in the driver and in the stack, and what only it has.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use aya::programs::{Xdp as AyaXdp, XdpMode as AyaMode};
use dcenet_core::netlink::{Family, Message};
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, require, udp_echo};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::conformance::{Pair, constant, constant_of};
use dcenet_ebpf::attach::{
    AttachError, Attached, Attacher, ClsactAttacher, Direction, Hook, Owner, Via, XdpAttacher, XdpMode, XdpPlace,
    verdict, xdp_verdict,
};
use dcenet_ebpf::insn::Reg::*;
use dcenet_ebpf::insn::{AtomicOp, Cond, Helper, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::Array;
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::program::Program;

use crate::{PinScene, Pinning};

/// What it takes.
const TAKES: ProgramKind = ProgramKind::Xdp;

fn ready() -> bool {
    require(Rung::Kernel)
}

impl Pinning for XdpAttacher {
    const TAKES: ProgramKind = TAKES;

    fn pinning(pins: Pins) -> Self {
        Self::new(pins)
    }

    fn seen(host: &TestNetNs) -> String {
        host.sh("ip -d link show dev h0 2>/dev/null | grep -o 'xdp.* id [0-9]*' || true")
    }
}

/// veth's driver runs XDP.
mod native {
    use super::*;
    use crate::{PLACE, conforms};

    type Scene = PinScene<XdpAttacher>;

    fn attacher(place: &Path) -> XdpAttacher {
        XdpAttacher::placed(Pins::at(place), XdpPlace::Native)
    }

    conforms!(ready);
}

mod generic {
    use super::*;
    use crate::{PLACE, conforms};

    struct Scene(PinScene<XdpAttacher>);

    impl Scene {
        fn new() -> Self {
            Self(PinScene::with(|pins| XdpAttacher::placed(pins, XdpPlace::Generic)))
        }
    }

    impl std::ops::Deref for Scene {
        type Target = PinScene<XdpAttacher>;

        fn deref(&self) -> &Self::Target {
            &self.0
        }
    }

    fn attacher(place: &Path) -> XdpAttacher {
        XdpAttacher::placed(Pins::at(place), XdpPlace::Generic)
    }

    conforms!(ready);
}

type Scene = PinScene<XdpAttacher>;

fn xdp(name: &str, answer: i32) -> Program {
    constant_of(ProgramKind::Xdp, name, answer)
}

fn mode(attached: &Attached) -> XdpMode {
    match attached.via {
        Via::Xdp { mode } => mode,
        _ => panic!("{attached}"),
    }
}

/// A program of somebody else, on a device as long as this lives: by a link, as aya makes it.
struct Foreign {
    _loaded: aya::Ebpf,
    id: u32,
}

impl Foreign {
    fn attach(on: &[(&TestNetNs, &str)], mode: AyaMode) -> Self {
        let mut code = Asm::program("stranger", ProgramKind::Xdp);
        code.ret(xdp_verdict::PASS);
        let mut object = Object::new();
        object.add(code.finish().unwrap()).unwrap();
        let mut loaded = aya::Ebpf::load(&object.to_elf().unwrap()).unwrap();
        let program: &mut AyaXdp = loaded.program_mut("stranger").unwrap().try_into().unwrap();
        program.load().unwrap();
        let id = program.info().unwrap().id();
        for (host, device) in on {
            host.run(|| program.attach(device, mode)).unwrap();
        }
        Self { _loaded: loaded, id }
    }
}

/// Without a link, as older agents do.
fn attach_by_netlink(host: &TestNetNs, device: &str, program: &Program) {
    let (xdp_fd, xdp_flags, generic) = (1, 3, 2);
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&host.link(device).unwrap().index.get().to_ne_bytes());
    let mut message = Message::new(libc::RTM_SETLINK, 0, "set XDP", &header);
    message.nest(libc::IFLA_XDP | libc::NLA_F_NESTED as u16, |xdp| {
        xdp.bytes(xdp_fd, &program.as_fd().as_raw_fd().to_ne_bytes()).u32(xdp_flags, generic);
    });
    host.netns().socket(Family::Route).unwrap().request(&message).unwrap();
}

#[test]
fn the_driver_runs_it_where_it_can_and_the_report_says_so() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let host = TestHost::new();
    let root = host.root();
    root.sh("ip link add h0 type veth peer name p0; ip link add b0 type bridge
             ip link add q0 numrxqueues 1 numtxqueues 1 type veth peer name q1 numrxqueues 1 numtxqueues 4");
    let program = xdp("deny", verdict::SHOT);
    for (device, place, expected) in [
        ("h0", XdpPlace::Best, Some(XdpMode::Native)),
        ("h0", XdpPlace::Native, Some(XdpMode::Native)),
        ("h0", XdpPlace::Generic, Some(XdpMode::Generic)),
        ("b0", XdpPlace::Best, Some(XdpMode::Generic)),
        ("b0", XdpPlace::Native, None),
        ("b0", XdpPlace::Generic, Some(XdpMode::Generic)),
        // Its driver wants a queue for each of the other end's.
        ("q0", XdpPlace::Best, Some(XdpMode::Generic)),
    ] {
        let hook = Hook { device: root.link(device).unwrap().index, direction: Direction::Ingress };
        let attacher = XdpAttacher::placed(scene.pins.clone(), place);
        let attached = root
            .run(|| attacher.attach(hook, &program, "ours").and_then(|_| attacher.attached(hook)).map(|a| a.unwrap()));
        match (attached, expected) {
            (Ok(attached), Some(expected)) => {
                assert_eq!(mode(&attached), expected, "{device} {place:?}");
                let word = if expected == XdpMode::Native { "xdp" } else { "xdpgeneric" };
                let shown = root.sh(&format!("ip link show dev {device}"));
                assert!(shown.split_whitespace().any(|w| w == word || w == format!("prog/{word}")), "{shown}");
                assert!(attached.to_string().contains("ours"), "{attached}");
                assert!(root.run(|| attacher.detach(hook)).unwrap());
            }
            (Err(error), None) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP), "{error}"),
            (attached, _) => panic!("{device} {place:?}: {attached:?}"),
        }
    }
    assert_eq!(scene.pins.list().unwrap(), [""; 0]);
}

/// A replacement stays where the link is, so one for another place is refused.
#[test]
fn ours_in_another_place_is_not_replaced_there() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let hook = pair.hook(Direction::Ingress);
    let (one, two) = (xdp("one", verdict::SHOT), xdp("two", verdict::SHOT));
    let placed = |place| XdpAttacher::placed(scene.pins.clone(), place);
    let (native, generic, best) = (placed(XdpPlace::Native), placed(XdpPlace::Generic), placed(XdpPlace::Best));
    for (first, second, there) in [(&native, &generic, XdpMode::Native), (&generic, &native, XdpMode::Generic)] {
        pair.on_host(|| first.attach(hook, &one, "one")).unwrap();
        for attach in [true, false] {
            let refused = pair.on_host(|| {
                if attach {
                    second.attach(hook, &two, "two").map(drop)
                } else {
                    second.replace(hook, &two, "two").map(drop)
                }
            });
            assert!(matches!(refused, Err(AttachError::OtherMode { mode, .. }) if mode == there), "{refused:?}");
            let stands = pair.on_host(|| first.attached(hook)).unwrap().unwrap();
            assert_eq!((stands.owner, stands.program), (Owner::Ours("one".into()), Some(one.info().id)));
        }
        pair.on_host(|| best.replace(hook, &two, "two")).unwrap();
        assert!(pair.on_host(|| second.detach(hook)).unwrap(), "wherever it is");
    }
}

#[test]
fn a_program_in_our_place_is_told_and_goes_when_named() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Ingress);
    let ours = xdp("ours", verdict::UNSPEC);
    let by_netlink = xdp("stranger", verdict::UNSPEC);
    for case in ["link, driver", "link, stack", "netlink"] {
        let foreign = match case {
            "netlink" => {
                attach_by_netlink(root, "h0", &by_netlink);
                None
            }
            "link, driver" => Some(Foreign::attach(&[(root, "h0")], AyaMode::Driver)),
            _ => Some(Foreign::attach(&[(root, "h0")], AyaMode::Skb)),
        };
        let number = foreign.as_ref().map_or(by_netlink.info().id, |f| f.id);
        let before = (scene.state)(root);
        let refused = pair.on_host(|| scene.attacher.attach(hook, &ours, "ours")).unwrap_err();
        assert!(matches!(refused, AttachError::Occupied { .. }), "{case}: {refused}");
        assert!(refused.to_string().contains("stranger") && refused.to_string().contains(&number.to_string()));
        assert_eq!((scene.state)(root), before, "{case}");
        assert!(!pair.on_host(|| scene.attacher.detach(hook)).unwrap(), "{case}");
        let told = pair.on_host(|| scene.attacher.before(hook)).unwrap();
        let [stranger] = &told[..] else { panic!("{case}: {told:?}") };
        assert_eq!((stranger.owner.clone(), stranger.program), (Owner::Foreign(Some("stranger".into())), Some(number)));
        assert_eq!(mode(stranger) == XdpMode::Native, case == "link, driver");
        // It is evicted as what was told, not as what is there by now.
        let mut other = stranger.clone();
        other.program = Some(ours.info().id);
        assert!(!pair.on_host(|| scene.attacher.evict(hook, &other)).unwrap(), "{case}");
        assert_eq!((scene.state)(root), before, "{case}");
        assert!(pair.on_host(|| scene.attacher.evict(hook, stranger)).unwrap(), "{case}");
        assert!(!pair.on_host(|| scene.attacher.evict(hook, stranger)).unwrap(), "{case}");
        pair.on_host(|| scene.attacher.attach(hook, &ours, "ours")).unwrap();
        assert_eq!(pair.on_host(|| scene.attacher.before(hook)).unwrap(), [], "{case}");
        assert!(pair.on_host(|| scene.attacher.detach(hook)).unwrap());
    }
}

/// The kernel tells of a link the index of its device, and not the namespace.
#[test]
fn a_link_that_could_be_of_another_namespace_is_not_evicted() {
    if !ready() {
        return;
    }
    let (one, two) = (Pair::default(), Pair::default());
    assert_eq!(one.device, two.device);
    let scene = Scene::new();
    let hook = one.hook(Direction::Ingress);
    let foreign = Foreign::attach(&[(one.host.root(), "h0"), (two.host.root(), "h0")], AyaMode::Driver);
    let told = one.on_host(|| scene.attacher.before(hook)).unwrap();
    assert_eq!(told.iter().map(|a| a.program).collect::<Vec<_>>(), [Some(foreign.id)]);
    let refused = one.on_host(|| scene.attacher.evict(hook, &told[0])).unwrap_err();
    assert!(matches!(refused, AttachError::Ambiguous { links: 2, .. }), "{refused}");
    for pair in [&one, &two] {
        assert_eq!(pair.on_host(|| scene.attacher.before(hook)).unwrap(), told, "both stay");
    }
}

#[test]
fn xdp_is_told_of_to_who_attaches_behind_it() {
    if !ready() {
        return;
    }
    let pair = Pair::default();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Ingress);
    let foreign = Foreign::attach(&[(root, "h0")], AyaMode::Driver);
    for direction in [Direction::Ingress, Direction::Egress] {
        let hook = Hook { direction, ..hook };
        let told = pair.on_host(|| {
            ClsactAttacher.attach(hook, &constant("ours", verdict::UNSPEC), "ours").unwrap();
            ClsactAttacher.before(hook).unwrap()
        });
        let expected: &[_] = if direction == Direction::Ingress { &[Some(foreign.id)] } else { &[] };
        assert_eq!(told.iter().map(|a| a.program).collect::<Vec<_>>(), expected, "{direction:?}");
        for told in told {
            assert_eq!(told.to_string(), format!("program {} \"stranger\" on XDP (native)", foreign.id));
            assert!(pair.on_host(|| ClsactAttacher.evict(hook, &told)).unwrap());
            assert_eq!(pair.on_host(|| ClsactAttacher.before(hook)).unwrap(), []);
        }
        assert!(pair.on_host(|| ClsactAttacher.detach(hook)).unwrap());
    }
}

/// Two namespaces, one index, one program: each finds its own link. The device that moves takes its program along.
#[test]
fn a_shared_program_is_found_where_it_is_and_follows_its_device() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let (one, two) = (Pair::default(), Pair::default());
    assert_eq!(one.device, two.device);
    let hook = one.hook(Direction::Ingress);
    let deny = xdp("deny", verdict::SHOT);
    for (pair, label) in [(&one, "one"), (&two, "two")] {
        pair.on_host(|| scene.attacher.attach(hook, &deny, label)).unwrap();
    }
    for (pair, label) in [(&one, "one"), (&two, "two")] {
        let attached = pair.on_host(|| scene.attacher.attached(hook)).unwrap().unwrap();
        assert_eq!(attached.owner, Owner::Ours(label.into()));
    }
    assert!(two.on_host(|| scene.attacher.detach(hook)).unwrap());
    assert!(one.on_host(|| scene.attacher.attached(hook)).unwrap().is_some());

    // Into a namespace of its own, and another device takes its index.
    let pod = one.host.new_pod();
    let root = one.host.root();
    root.sh(&format!("ip link set h0 netns {}", pod.path().display()));
    let inside = Hook { device: pod.link("h0").unwrap().index, ..hook };
    let moved = pod.run(|| scene.attacher.attached(inside)).unwrap().expect("it follows");
    assert_eq!((moved.owner.clone(), moved.program), (Owner::Ours("one".into()), Some(deny.info().id)));
    root.sh(&format!("ip link add h0 index {} type veth peer name x0", one.device));
    assert_eq!(root.run(|| scene.attacher.attached(hook)).unwrap(), None);
    assert!(!root.run(|| scene.attacher.detach(hook)).unwrap());
    // The new one gets a link of its own, with the same program.
    root.run(|| scene.attacher.attach(hook, &deny, "new")).unwrap();
    assert_eq!(root.run(|| scene.attacher.attached(hook)).unwrap().unwrap().owner, Owner::Ours("new".into()));
    assert!(root.run(|| scene.attacher.detach(hook)).unwrap());
    let moved = pod.run(|| scene.attacher.attached(inside)).unwrap().expect("still there");
    assert_eq!(moved.owner, Owner::Ours("one".into()));
    // The pin goes with the device.
    pod.sh("ip link del h0");
    assert_eq!(scene.attacher.remove_vanished().unwrap().len(), 1);
    assert_eq!(scene.pins.list().unwrap(), [""; 0]);
}

/// One program, one index, two namespaces, and the link of one has lost its pin, as when its owner dies while it detaches:
/// the other's is neither taken off nor replaced in its stead.
#[test]
fn the_link_of_another_namespace_is_not_taken_for_ours() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let (one, two) = (Pair::default(), Pair::default());
    assert_eq!(one.device, two.device);
    let hook = one.hook(Direction::Ingress);
    let deny = xdp("deny", verdict::SHOT);
    one.on_host(|| scene.attacher.attach(hook, &deny, "one")).unwrap();
    let pin = scene.pins.list().unwrap().remove(0);
    two.on_host(|| scene.attacher.attach(hook, &deny, "two")).unwrap();
    // The link lives as long as this, without its pin.
    let unpinned = scene.pins.get(&pin).unwrap().unwrap();
    assert!(scene.pins.remove(&pin).unwrap());
    let stands = || two.on_host(|| scene.attacher.attached(hook)).unwrap().map(|a| (a.owner, a.program));
    let before = stands();
    assert_eq!(before, Some((Owner::Ours("two".into()), Some(deny.info().id))));
    let pass = xdp("pass", verdict::UNSPEC);
    for operation in ["attach", "replace", "detach", "attached"] {
        let refused = one.on_host(|| match operation {
            "attach" => scene.attacher.attach(hook, &pass, "new").map(drop),
            "replace" => scene.attacher.replace(hook, &pass, "new").map(drop),
            "detach" => scene.attacher.detach(hook).map(drop),
            _ => scene.attacher.attached(hook).map(drop),
        });
        assert!(matches!(refused, Err(AttachError::Ambiguous { links: 2, .. })), "{operation}: {refused:?}");
        assert_eq!(stands(), before, "{operation}");
    }
    assert_eq!(one.on_host(|| scene.attacher.devices()).unwrap(), [one.device], "it may be");
    // Once it has ended, which takes an RCU grace period, there is nothing to be mistaken.
    drop(unpinned);
    let begun = std::time::Instant::now();
    let attached = loop {
        let attached = one.on_host(|| scene.attacher.attach(hook, &pass, "new"));
        if attached.is_ok() || begun.elapsed() > std::time::Duration::from_secs(60) {
            break attached;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert_eq!(attached.unwrap(), None);
    assert_eq!(stands(), before);
    assert!(
        two.on_host(|| scene.attacher.detach(hook)).unwrap() && one.on_host(|| scene.attacher.detach(hook)).unwrap()
    );
}

/// As before, and the other link was made in the same namespace, for a device that has moved and keeps its index.
#[test]
fn the_link_of_a_moved_device_is_not_taken_for_that_of_the_next() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let (root, pod) = (pair.host.root(), pair.host.new_pod());
    let hook = pair.hook(Direction::Ingress);
    let deny = xdp("deny", verdict::SHOT);
    pair.on_host(|| scene.attacher.attach(hook, &deny, "moved")).unwrap();
    let moved = scene.pins.list().unwrap();
    root.sh(&format!("ip link set h0 netns {}", pod.path().display()));
    assert_eq!(pod.link("h0").unwrap().index, pair.device);
    root.sh(&format!("ip link add h0 index {} type veth peer name x0", pair.device));
    root.run(|| scene.attacher.attach(hook, &deny, "new")).unwrap();
    let link = |label: &str| scene.attacher.links().unwrap().into_iter().find(|l| l.label == label).unwrap().link;
    let pins = scene.pins.list().unwrap();
    let pin = pins.iter().find(|pin| pin.contains(&format!("-{}-", link("new")))).unwrap();
    let unpinned = scene.pins.get(pin).unwrap().unwrap();
    assert!(scene.pins.remove(pin).unwrap());
    let refused = root.run(|| scene.attacher.detach(hook));
    assert!(matches!(refused, Err(AttachError::Ambiguous { links: 2, .. })), "{refused:?}, {moved:?} {pins:?}");
    drop(unpinned);
    root.sh("ip link del h0");
    let attached = pod.run(|| scene.attacher.attached(hook)).unwrap().expect("it stands");
    assert_eq!((attached.owner, attached.program), (Owner::Ours("moved".into()), Some(deny.info().id)));
    assert!(pod.run(|| scene.attacher.detach(hook)).unwrap());
    assert_eq!(scene.pins.list().unwrap(), [""; 0]);
}

/// A classifier that counts the packets that it sees.
fn counting() -> (Program, Array<u64>) {
    let mut code = Asm::program("counts", ProgramKind::Classifier);
    let absent = code.label();
    code.store(Size::W, R10, -4, 0)
        .load_map(R1, "seen")
        .mov(R2, R10)
        .add(R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, absent)
        .mov(R1, 1)
        .atomic(AtomicOp::Add, Size::Dw, R0, 0, R1)
        .bind(absent)
        .ret(verdict::UNSPEC);
    let mut object = Object::new();
    object.add_map(MapSpec::array("seen", 8, 1)).unwrap();
    object.add(code.finish().unwrap()).unwrap();
    let mut loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    (loaded.take_program("counts").unwrap(), Array::new(loaded.take_map("seen").unwrap()).unwrap())
}

/// What XDP drops, tc never sees.
#[test]
fn xdp_decides_before_tc_does() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::default();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Ingress);
    root.set_up("h0");
    root.sh("ip neigh replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev h0");
    let (counts, count) = counting();
    pair.on_host(|| ClsactAttacher.attach(hook, &counts, "counts")).unwrap();
    let echo = |limit| udp_echo(&pair.pod, root, "10.9.0.1".parse().unwrap(), limit).is_ok();
    let seen = || count.load(0).unwrap();
    let (short, long) = (std::time::Duration::from_millis(500), std::time::Duration::from_secs(5));
    assert!((0..12).any(|_| echo(long)), "nothing is attached");
    for place in [XdpPlace::Native, XdpPlace::Generic] {
        let attacher = XdpAttacher::placed(scene.pins.clone(), place);
        pair.on_host(|| attacher.attach(hook, &xdp("deny", verdict::SHOT), "ours")).unwrap();
        // What came before is through.
        let mut before = seen();
        loop {
            std::thread::sleep(short);
            if seen() == std::mem::replace(&mut before, seen()) {
                break;
            }
        }
        assert!(!echo(short), "{place:?}");
        assert_eq!(seen(), before, "{place:?}");
        // The twin.
        pair.on_host(|| attacher.replace(hook, &xdp("pass", verdict::UNSPEC), "ours")).unwrap();
        assert!((0..12).any(|_| echo(long)), "{place:?}");
        assert!(seen() > before, "{place:?}");
        assert!(pair.on_host(|| attacher.detach(hook)).unwrap());
    }
}
