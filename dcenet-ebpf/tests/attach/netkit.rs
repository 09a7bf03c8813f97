//! netkit: the suite, and what only it has.

use std::path::Path;

use dcenet_core::test_support::{Rung, TestNetNs, require_with};
use dcenet_ebpf::attach::conformance::{Pair, PairKind, constant, deny};
use dcenet_ebpf::attach::{
    AttachError, Attacher, ClsactAttacher, Direction, Hook, NetkitAttacher, Owner, TcxAttacher, Via, everything,
    verdict,
};
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;

use crate::{PLACE, PinScene, Pinning, conforms};

fn ready() -> bool {
    require_with(Rung::Vm, || {
        let netkit = Features::probe().map(|f| f.netkit);
        netkit
            .map_or_else(|e| Some(e.to_string()), |known| (!known).then(|| "the kernel has no netkit (6.7)".to_owned()))
    })
}

type Scene = PinScene<NetkitAttacher>;

impl Pinning for NetkitAttacher {
    const PAIR: PairKind = PairKind::Netkit;

    fn pinning(pins: Pins) -> Self {
        Self::new(pins)
    }

    /// No tool of Debian 12 knows netkit: what is pinned has to do.
    fn seen(_: &TestNetNs) -> String {
        String::new()
    }
}

fn attacher(place: &Path) -> NetkitAttacher {
    NetkitAttacher::new(Pins::at(place))
}

/// What it takes.
const TAKES: ProgramKind = ProgramKind::Classifier;

conforms!(ready);

#[test]
fn only_a_primary_end_takes_programs() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::new(PairKind::Netkit);
    let veth = Pair::default();
    let inside = Hook { device: pair.pod.link("p0").unwrap().index, direction: Direction::Ingress };
    let refused = [
        pair.pod.run(|| scene.attacher.attach(inside, &deny(), "x").map(drop)),
        pair.pod.run(|| scene.attacher.chain(inside).map(drop)),
        veth.on_host(|| scene.attacher.attach(veth.hook(Direction::Egress), &deny(), "x").map(drop)),
    ];
    for refused in refused {
        assert!(matches!(refused, Err(AttachError::WrongDevice { .. })), "{refused:?}");
    }
    // The pod sees no program on its end, by any backend.
    pair.on_host(|| scene.attacher.attach(pair.hook(Direction::Ingress), &deny(), "x")).unwrap();
    assert_eq!(pair.pod.run(|| everything(inside)).unwrap(), []);
    assert!(pair.on_host(|| scene.attacher.detach(pair.hook(Direction::Ingress))).unwrap());
}

/// What comes in has met netkit before tcx, and tcx before clsact; what goes out the other way round.
#[test]
fn netkit_stands_where_the_packet_meets_it() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let pair = Pair::new(PairKind::Netkit);
    let other = Scene::new();
    let tcx = TcxAttacher::new(other.pins.clone());
    for (direction, order) in
        [(Direction::Ingress, ["netkit", "tcx", "clsact"]), (Direction::Egress, ["tcx", "clsact", "netkit"])]
    {
        let hook = pair.hook(direction);
        pair.on_host(|| {
            for (attacher, name) in [
                (&scene.attacher as &dyn Attacher, "netkit"),
                (&tcx as &dyn Attacher, "tcx"),
                (&ClsactAttacher, "clsact"),
            ] {
                attacher.attach(hook, &constant(name, verdict::UNSPEC), name).unwrap();
            }
            let all: Vec<_> = everything(hook)
                .unwrap()
                .into_iter()
                .map(|a| match a.via {
                    Via::Netkit { .. } => "netkit",
                    Via::Tcx { .. } => "tcx",
                    _ => "clsact",
                })
                .collect();
            assert_eq!(all, order);
            let ahead = scene.attacher.before(hook).unwrap();
            assert_eq!(ahead.len(), if direction == Direction::Ingress { 0 } else { 2 });
            let ahead = tcx.before(hook).unwrap();
            assert_eq!(ahead.len(), usize::from(direction == Direction::Ingress));
            for foreign in ahead {
                assert_eq!(foreign.owner, Owner::Foreign(Some("netkit".into())));
                assert!(tcx.evict(hook, &foreign).unwrap());
                assert_eq!(scene.attacher.attached(hook).unwrap(), None);
            }
            assert!(tcx.detach(hook).unwrap() && ClsactAttacher.detach(hook).unwrap());
        });
    }
}

/// The two ends have indices of their own, and the host's devices are found by the host's.
#[test]
fn devices_are_found_by_the_index_of_the_end_that_was_attached_to() {
    if !ready() {
        return;
    }
    let scene = Scene::new();
    let mut pair = Pair::new(PairKind::Netkit);
    // The host counts on, so that the new pair's ends get different indices; the pod's is that of a dummy on the host.
    pair.host.root().sh("ip link add other type dummy");
    pair.remake();
    let inside = pair.pod.link("p0").unwrap().index;
    assert_ne!(inside, pair.device);
    assert_eq!(pair.host.root().link("other").unwrap().index, inside);
    for (direction, told) in [(Direction::Ingress, inside), (Direction::Egress, pair.device)] {
        let hook = pair.hook(direction);
        pair.on_host(|| scene.attacher.attach(hook, &deny(), "x")).unwrap();
        assert_eq!(pair.on_host(|| scene.attacher.devices()).unwrap(), [pair.device], "{direction:?}");
        assert_eq!(pair.pod.run(|| scene.attacher.devices()).unwrap(), [], "{direction:?}");
        let links = scene.attacher.links().unwrap();
        assert_eq!(links.iter().map(|l| l.device).collect::<Vec<_>>(), [Some(told)], "{direction:?}");
        assert!(pair.on_host(|| scene.attacher.detach(hook)).unwrap());
        assert_eq!(pair.on_host(|| scene.attacher.devices()).unwrap(), [], "{direction:?}");
    }
}
