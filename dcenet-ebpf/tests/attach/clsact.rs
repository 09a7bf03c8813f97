//! clsact: the suite, and what only it has.

use std::ffi::OsStr;
use std::path::Path;

use dcenet_core::test_support::{Rung, TestNetNs, require};
use dcenet_ebpf::attach::conformance::{Pair, PairKind, Subject, deny};
use dcenet_ebpf::attach::{AttachError, Attacher, ClsactAttacher, Direction, Owner, TcxAttacher, for_kernel};
use dcenet_ebpf::loader::AyaLoader;
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::probe::Features;

use crate::{PLACE, TestPins, conforms};

fn ready() -> bool {
    require(Rung::Kernel)
}

struct Scene;

impl Scene {
    fn new() -> Self {
        Self
    }

    fn subject(&self) -> Subject<'_> {
        let (pair, takes) = (PairKind::Veth, TAKES);
        Subject { attacher: &ClsactAttacher, loader: &AyaLoader, state: &state, pair, takes }
    }

    fn place(&self) -> &OsStr {
        OsStr::new("the device")
    }
}

fn attacher(_: &Path) -> ClsactAttacher {
    ClsactAttacher
}

/// What iproute2 sees. Every device that is up has the discipline `noqueue`.
pub(crate) fn state(host: &TestNetNs) -> String {
    let show = "tc qdisc show dev h0 | sed /noqueue/d; tc filter show dev h0 ingress 2>/dev/null; tc filter show dev h0 egress 2>/dev/null";
    host.sh(&format!("{show}; true"))
}

/// What it takes.
const TAKES: ProgramKind = ProgramKind::Classifier;

conforms!(ready);

#[test]
fn ours_stands_among_filters_by_priority_and_the_last_one_out_removes_the_discipline() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::default();
    let root = pair.host.root();
    root.sh("tc qdisc add dev h0 clsact");
    root.sh("tc filter add dev h0 ingress pref 7 protocol ip u32 match u32 0 0 flowid 1:1");
    let hook = pair.hook(Direction::Ingress);
    pair.on_host(|| {
        let a = &ClsactAttacher;
        a.attach(hook, &deny(), "ours").unwrap();
        let chain = a.chain(hook).unwrap();
        let owners: Vec<_> = chain.iter().map(|c| (c.priority < 100, &c.owner)).collect();
        assert!(owners.contains(&(true, &Owner::Foreign(Some("u32".into())))), "{chain:?}");
        assert!(owners.contains(&(false, &Owner::Ours("ours".into()))), "{chain:?}");
        assert!(a.detach(hook).unwrap());
    });
    assert!(state(root).contains("clsact"));
    // An empty discipline, too, is what it was: ours is not the only one that may have made it.
    root.sh("tc filter del dev h0 ingress");
    pair.on_host(|| {
        ClsactAttacher.attach(hook, &deny(), "ours").unwrap();
        assert!(ClsactAttacher.detach(hook).unwrap());
    });
    assert!(!state(root).contains("clsact"), "the last one out removes it");
}

/// A table of `u32` without a filter decides nothing, and is somebody's all the same.
#[test]
fn a_table_of_u32_is_no_program_and_keeps_the_discipline() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::default();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Ingress);
    root.sh("tc qdisc add dev h0 clsact");
    root.sh("tc filter add dev h0 ingress pref 7 protocol ip handle 1: u32 divisor 1");
    let before = state(root);
    assert!(before.contains("fh 1:"), "{before}");
    let ahead = || pair.on_host(|| ClsactAttacher.before(hook)).unwrap();
    pair.on_host(|| {
        ClsactAttacher.attach(hook, &deny(), "ours").unwrap();
        let chain = ClsactAttacher.chain(hook).unwrap();
        assert!(matches!(&chain[..], [a] if a.owner == Owner::Ours("ours".into())), "{chain:?}");
    });
    assert_eq!(ahead(), []);
    assert!(pair.on_host(|| ClsactAttacher.detach(hook)).unwrap());
    assert_eq!(state(root), before);
    // The twin: a filter in the table is told of.
    pair.on_host(|| ClsactAttacher.attach(hook, &deny(), "ours")).unwrap();
    root.sh("tc filter add dev h0 ingress pref 7 protocol ip u32 ht 1:0 match u32 0 0 flowid 1:1");
    assert_eq!(ahead().iter().map(|a| a.priority).collect::<Vec<_>>(), [7]);
    for filter in ahead() {
        assert!(pair.on_host(|| ClsactAttacher.evict(hook, &filter)).unwrap());
    }
    assert_eq!(ahead(), []);
    assert!(pair.on_host(|| ClsactAttacher.detach(hook)).unwrap());
}

#[test]
fn our_place_taken_by_another_is_an_error_and_not_overwritten() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::default();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Egress);
    root.sh("tc qdisc add dev h0 clsact");
    root.sh("tc filter add dev h0 egress pref 3534 handle 0xdce protocol all bpf da bytecode '1,6 0 0 0,'");
    let before = state(root);
    pair.on_host(|| {
        let a = &ClsactAttacher;
        assert!(matches!(a.attach(hook, &deny(), "x"), Err(AttachError::Occupied { .. })));
        assert!(matches!(a.replace(hook, &deny(), "x"), Err(AttachError::Occupied { .. })));
        assert!(matches!(a.detach(hook), Err(AttachError::Occupied { .. })));
    });
    assert_eq!(state(root), before);
    // The older discipline has one list for both directions.
    root.sh("tc qdisc del dev h0 clsact; tc qdisc add dev h0 ingress");
    let before = state(root);
    pair.on_host(|| {
        let a = &ClsactAttacher;
        assert!(matches!(a.attach(hook, &deny(), "x"), Err(AttachError::Occupied { .. })));
        let ingress = pair.hook(Direction::Ingress);
        a.attach(ingress, &deny(), "x").unwrap();
        assert!(a.attached(ingress).unwrap().is_some());
        assert_eq!(a.chain(hook).unwrap(), []);
        assert!(a.detach(ingress).unwrap());
    });
    assert_eq!(state(root), before);
}

#[test]
fn a_label_may_be_any_text_and_a_class_is_carried() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::default();
    let hook = pair.hook(Direction::Ingress);
    pair.on_host(|| {
        let a = &ClsactAttacher;
        let longest = "ä ,/".repeat(40);
        assert_eq!(longest.len(), 200);
        let tag = dcenet_ebpf::attach::Tag { label: &longest, class: 4_321 };
        a.attach_tagged(hook, &deny(), tag).unwrap();
        let attached = a.attached(hook).unwrap().unwrap();
        assert_eq!((attached.owner, attached.class), (Owner::Ours(longest), 4_321));
        assert!(a.detach(hook).unwrap());
    });
}

/// Where the kernel has no tcx (before 6.6), it is told, clsact is chosen, and asking who runs first is no error.
#[test]
fn a_kernel_without_tcx_is_told_of_and_does_without() {
    if !require(Rung::Kernel) {
        return;
    }
    let features = Features::probe().unwrap();
    let pins = TestPins::new();
    let tcx = TcxAttacher::new(pins.clone());
    let pair = Pair::default();
    let hook = pair.hook(Direction::Ingress);
    pair.on_host(|| {
        let told = |outcome: Result<(), AttachError>| matches!(outcome, Err(AttachError::Unsupported { .. }));
        assert_eq!(told(tcx.attach(hook, &deny(), "x").map(drop)), !features.tcx);
        assert_eq!(told(tcx.chain(hook).map(drop)), !features.tcx);
        assert_eq!(told(tcx.detach(hook).map(drop)), !features.tcx);
        assert_eq!(pins.list().unwrap(), [""; 0]);
        let chosen = for_kernel(&features, &pins);
        chosen.attach(hook, &deny(), "x").unwrap();
        assert_eq!(ClsactAttacher.attached(hook).unwrap().is_some(), !features.tcx);
        assert_eq!(chosen.before(hook).unwrap(), []);
        assert!(chosen.detach(hook).unwrap());
    });
}
