//! Programs of others that packets meet before policy.

use dcenet_core::provider::PolicySink;
use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{
    Attacher, ClsactAttacher, Direction, Hook, TcxAttacher, XdpAttacher, XdpPlace, verdict, xdp_verdict,
};
use dcenet_ebpf::insn;
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::Program;
use dcenet_policy::enforcer::{PinnedDefault, PolicyConfig};

use crate::inside::{guarded_world, has_guards};
use crate::world::*;

#[test]
fn a_check_names_what_packets_meet_before_policy() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    world.add_enforced("db", 3, &[("app", "db")]);
    world.add_enforced("scan", 4, &[]);
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    let root = world.host.root();
    let endpoint = world.endpoint("db");
    let missing = || root.run(|| world.sink.missing(&endpoint)).unwrap();
    assert_eq!(missing(), None);
    world.udp("scan", "db", 5353, false);

    // A filter of lower priority that answers TC_ACT_OK: policy is not asked any more, and the check says why.
    root.sh(&format!("tc filter add dev {} egress pref 1 protocol all bpf da bytecode '1,6 0 0 0,'", endpoint.ifname));
    world.udp("scan", "db", 5353, true);
    let told = missing().expect("it is told");
    assert!(told.contains("Egress") && told.contains("on clsact with priority 1"), "{told}");
    // Only what was named goes, and policy is asked again.
    let hook = Hook { device: endpoint.ifindex, direction: Direction::Egress };
    let [ahead] = root.run(|| ClsactAttacher.before(hook)).unwrap().try_into().unwrap();
    assert!(root.run(|| ClsactAttacher.evict(hook, &ahead)).unwrap());
    assert_eq!(missing(), None);
    world.udp("scan", "db", 5353, false);
    // One behind ours changes nothing.
    root.sh(&format!(
        "tc filter add dev {} egress pref 60000 protocol all bpf da bytecode '1,6 0 0 0,'",
        endpoint.ifname
    ));
    assert_eq!(missing(), None);
    world.udp("scan", "db", 5353, false);

    if Features::probe().unwrap().tcx {
        // The kernel keeps 15 bytes of it.
        let (name, kept) = ("agent_of_the_mesh", "agent_of_the_me");
        let mut code = Asm::program(name, ProgramKind::Classifier);
        code.ret(verdict::OK);
        let agent =
            Program::load(ProgramKind::Classifier, name, &insn::encode(code.finish().unwrap().insns())).unwrap();
        // Somebody else's, for its pins are others.
        let pins = Pins::open(world.host.directory().join("agent")).unwrap();
        let tcx = TcxAttacher::new(pins.clone());
        root.run(|| tcx.attach(hook, &agent, "agent")).unwrap();
        world.udp("scan", "db", 5353, true);
        let told = missing().expect("it is told");
        assert!(told.contains(&format!("\"{kept}\" on tcx")) && told.contains("policy.ahead"), "{told}");
        // The operator knows it, by its name or by its tag.
        let tag: String = agent.info().tag.iter().map(|byte| format!("{byte:02x}")).collect();
        for (known, accepted) in [
            (name, true),
            (kept, true),
            (&*tag, true),
            ("agent_of_the_m", false),
            ("agent_of_the_mob", false),
            ("0123456789abcdef", false),
        ] {
            let ahead = vec![known.parse().unwrap()];
            let policy = PolicyConfig { pins: world.host.directory().join("bpf"), ahead, ..PolicyConfig::default() };
            let sink = PinnedDefault::new(&policy, &world.host.run_dir());
            let told = root.run(|| sink.missing(&endpoint)).unwrap();
            assert_eq!(told.is_none(), accepted, "{known}: {told:?}");
        }
        assert!(root.run(|| tcx.detach(hook)).unwrap());
        pins.unmount().unwrap();
        assert_eq!(missing(), None);
        world.udp("scan", "db", 5353, false);
    }
    owner.uninstall().unwrap();
}

/// XDP in the stack sees what pods of a parent send to each other, and XDP in the driver only what the wire brings.
#[test]
fn a_program_in_the_driver_of_a_parent_is_not_ahead_of_its_guard() {
    if !require(Rung::Kernel) || !has_guards() {
        return;
    }
    let mut world = guarded_world();
    let owner = world.started();
    world.db_web_scan();
    assert_eq!(world.missing("web"), None);
    let root = world.host.root();
    let hook = Hook { device: root.link("up0").unwrap().index, direction: Direction::Ingress };
    let pins = Pins::open(world.host.directory().join("balancer")).unwrap();
    for (place, verdict, passed, told) in [
        (XdpPlace::Native, xdp_verdict::PASS, true, false),
        (XdpPlace::Generic, xdp_verdict::PASS, true, true),
        // Where each is, packets show.
        (XdpPlace::Native, xdp_verdict::DROP, true, false),
        (XdpPlace::Generic, xdp_verdict::DROP, false, true),
    ] {
        let mut code = Asm::program("balancer", ProgramKind::Xdp);
        code.ret(verdict);
        let balancer =
            Program::load(ProgramKind::Xdp, "balancer", &insn::encode(code.finish().unwrap().insns())).unwrap();
        let xdp = XdpAttacher::placed(pins.clone(), place);
        root.run(|| xdp.attach(hook, &balancer, "balancer")).unwrap();
        let missing = world.missing("web");
        let is_told = missing.as_ref().is_some_and(|told| told.contains("\"balancer\" on XDP"));
        assert_eq!((is_told, missing.is_none()), (told, !told), "{place:?}: {missing:?}");
        for ipv6 in [false, true] {
            let to = std::net::SocketAddr::new(world.address("db", ipv6), 5353);
            let limit = if passed { ALLOWED } else { DENIED };
            assert_eq!(udp(world.pod("web"), world.pod("db"), to, limit), passed, "{place:?} {verdict} {to}");
        }
        assert!(root.run(|| xdp.detach(hook)).unwrap());
    }
    pins.unmount().unwrap();
    assert_eq!(world.missing("web"), None);
    owner.uninstall().unwrap();
}
