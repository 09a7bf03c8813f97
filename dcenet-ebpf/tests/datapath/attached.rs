//! The programs on devices, by each attacher, with the slot from the class id or as a constant: real traffic of two pods.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use dcenet_core::test_support::{Rung, TestNetNs, require, tcp_echo, udp_echo};
use dcenet_ebpf::abi::{Endpoint, Reason};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::conformance::Pair;
use dcenet_ebpf::attach::{self, AttachError, Attacher, ClsactAttacher, Hook, Tag, TcxAttacher};
use dcenet_ebpf::datapath::{self, AllowAll, DatapathError, DenyAll, EmitClassifier, Slot, Spec};
use dcenet_ebpf::insn::{self, Cond, Reg, Size};
use dcenet_ebpf::object::{Object, ProgramKind};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::Program;
use dcenet_ebpf::test_support::packet::*;
use tempfile::TempDir;

use crate::harness::*;

const ALLOW: AllowAll = AllowAll { rule: 1 };
const DENY: DenyAll = DenyAll { rule: 2 };
const HOST: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 1))];
const OWN: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2)), IpAddr::V6(Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 2))];
/// Of what must not come.
const SHORT: Duration = Duration::from_millis(700);
/// Of what must.
const LONG: Duration = Duration::from_secs(5);

/// An attacher, and where it lets programs learn their slot.
struct By {
    name: &'static str,
    attacher: Box<dyn Attacher>,
    constant: bool,
    pins: Option<(Pins, TempDir)>,
}

impl By {
    fn clsact(constant: bool) -> Self {
        let name = if constant { "clsact, constant" } else { "clsact, class" };
        Self { name, attacher: Box::new(ClsactAttacher), constant, pins: None }
    }

    fn tcx(constant: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::open(directory.path().join("bpf")).unwrap();
        let attacher = Box::new(TcxAttacher::new(pins.clone()));
        Self { name: "tcx", attacher, constant, pins: Some((pins, directory)) }
    }

    fn slot(&self, slot: u16) -> Slot {
        if self.constant { Slot::Constant(slot) } else { Slot::Class }
    }
}

impl Drop for By {
    fn drop(&mut self) {
        if let Some((pins, _)) = self.pins.take()
            && let Err(error) = pins.unmount()
        {
            eprintln!("{error}");
        }
    }
}

fn every_attacher() -> Vec<By> {
    let mut all = vec![By::clsact(false), By::clsact(true)];
    if Features::probe().unwrap().tcx {
        all.push(By::tcx(true));
    }
    all
}

fn policy(slot: Slot, egress: &dyn EmitClassifier, ingress: &dyn EmitClassifier) -> Object {
    datapath::program(&Spec { slot, ..Spec::new(&small(), egress, ingress) }).unwrap()
}

/// A pod behind a veth pair, its slot, and the programs that it has now.
struct Wired<'a> {
    pair: Pair,
    by: &'a By,
    slot: u16,
    maps: &'a Pod,
    pod: Pod,
}

impl<'a> Wired<'a> {
    /// With the default programs, and no neighbour known to either end.
    fn new(by: &'a By, slot: u16, maps: &'a Pod) -> Self {
        let pair = Pair::default();
        pair.pod.sh("ip neigh flush dev p0 nud permanent");
        let object = datapath::default_program_of(&small(), by.slot(slot)).unwrap();
        let wired = Self { pair, by, slot, maps, pod: maps.beside(slot, &object) };
        let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xff, 0xfe00, 2);
        let ([IpAddr::V4(v4), _], [_, IpAddr::V6(v6)]) = (OWN, OWN) else { unreachable!("one of each family") };
        wired.pod.set_endpoint(&Endpoint::new(Some(v4), Some(v6), Some(link_local)).with_mac([2, 0, 0, 0, 0, 2]));
        wired.attach();
        wired.pair.host.root().set_up("h0");
        wired
    }

    fn attach(&self) {
        let class = if self.by.constant { 0 } else { self.slot };
        for (direction, program) in [
            (attach::Direction::Ingress, self.pod.program(Egress)),
            (attach::Direction::Egress, self.pod.program(Ingress)),
        ] {
            let hook: Hook = self.pair.hook(direction);
            let tag = Tag { label: "pod", class };
            self.pair.on_host(|| self.by.attacher.attach_tagged(hook, program, tag)).unwrap();
        }
    }

    fn put(&mut self, egress: &dyn EmitClassifier, ingress: &dyn EmitClassifier) {
        self.pod = self.pod_of(self.by.slot(self.slot), egress, ingress);
        self.attach();
        self.pod.bump(1, 1);
    }

    fn pod_of(&self, slot: Slot, egress: &dyn EmitClassifier, ingress: &dyn EmitClassifier) -> Pod {
        self.maps.beside(self.slot, &policy(slot, egress, ingress))
    }

    fn host(&self) -> &TestNetNs {
        self.pair.host.root()
    }

    /// Whether the host answers the pod, by UDP and TCP of each family.
    fn reaches_host(&self, limit: Duration) -> [bool; 4] {
        self.reaches(&self.pair.pod, self.host(), HOST, limit)
    }

    fn is_reached(&self, limit: Duration) -> [bool; 4] {
        self.reaches(self.host(), &self.pair.pod, OWN, limit)
    }

    fn reaches(&self, from: &TestNetNs, to: &TestNetNs, [v4, v6]: [IpAddr; 2], limit: Duration) -> [bool; 4] {
        // What is slow to begin with, such as the first neighbour, is asked for again where it must come.
        let tries = if limit == LONG { 6 } else { 1 };
        let again = |ask: &dyn Fn() -> bool| (0..tries).any(|_| ask());
        [
            again(&|| udp_echo(from, to, v4, limit).is_ok()),
            again(&|| tcp_echo(from, to, v4, limit).is_ok()),
            again(&|| udp_echo(from, to, v6, limit).is_ok()),
            again(&|| tcp_echo(from, to, v6, limit).is_ok()),
        ]
    }

    /// A connection of the pod to its host.
    fn connection(&self) -> (TcpStream, TcpStream) {
        let listener = self.host().run(|| TcpListener::bind((HOST[0], 0))).unwrap();
        let to = listener.local_addr().unwrap();
        let client = self.pair.pod.run(|| TcpStream::connect_timeout(&to, 6 * LONG)).unwrap();
        (client, listener.accept().unwrap().0)
    }

    fn detach(self) {
        for direction in [attach::Direction::Ingress, attach::Direction::Egress] {
            assert!(self.pair.on_host(|| self.by.attacher.detach(self.pair.hook(direction))).unwrap());
        }
    }
}

fn says((client, server): &mut (TcpStream, TcpStream), limit: Duration) -> bool {
    server.set_read_timeout(Some(limit)).unwrap();
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).is_ok()
}

const ALL: [bool; 4] = [true; 4];
const NONE: [bool; 4] = [false; 4];

#[test]
fn two_pods_are_judged_by_their_own_slots_by_every_attacher() {
    if !require(Rung::Kernel) {
        return;
    }
    for by in &every_attacher() {
        let told = by.name;
        let maps = Pod::load(&policy(by.slot(1), &ALLOW, &ALLOW), &[]);
        maps.set_endpoint(&Endpoint::default());
        let (mut one, mut two) = (Wired::new(by, 3, &maps), Wired::new(by, 5, &maps));
        let unknown = maps.reason(Reason::PolicyUnknown, Egress);
        assert_eq!(one.reaches_host(SHORT), NONE, "{told}");
        assert!(maps.reason(Reason::PolicyUnknown, Egress) > unknown, "{told}: by the default program");
        assert!(maps.reason(Reason::Neighbour, Egress) > 0, "{told}: but ARP passed");

        // The pod may open, nobody else: answers pass by their flow alone.
        for wired in [&mut one, &mut two] {
            wired.put(&ALLOW, &DENY);
            assert_eq!(wired.reaches_host(LONG), ALL, "{told}");
            let denied = maps.reason(Reason::Denied, Ingress);
            assert_eq!(wired.is_reached(SHORT), NONE, "{told}");
            assert!(maps.reason(Reason::Denied, Ingress) >= denied + 4, "{told}");
        }
        let mut slots: Vec<u16> = maps.flows().entries().iter().map(|(key, _)| key.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots, [3, 5], "{told}");

        // The twin: with the other direction allowed it is reached, and the other pod's policy is its own.
        one.put(&ALLOW, &ALLOW);
        assert_eq!(one.is_reached(LONG), ALL, "{told}");
        assert_eq!(two.is_reached(SHORT), NONE, "{told}");

        // A change reaches live connections of its endpoint, and of no other.
        let mut connections = [one.connection(), two.connection()];
        assert!(connections.iter_mut().all(|c| says(c, LONG)), "{told}");
        one.put(&DENY, &DENY);
        assert!(!says(&mut connections[0], SHORT), "{told}: cut");
        assert!(says(&mut connections[1], LONG), "{told}: not cut");

        // A source that is not the pod's.
        let spoofed = maps.reason(Reason::Spoofed, Egress);
        two.pair.pod.sh("ip addr add 10.9.0.77/24 dev p0");
        let socket = two.pair.pod.run(|| UdpSocket::bind("10.9.0.77:0")).unwrap();
        socket.send_to(b"x", SocketAddr::new(HOST[0], 9)).unwrap();
        let begun = std::time::Instant::now();
        while maps.reason(Reason::Spoofed, Egress) == spoofed && begun.elapsed() < 6 * LONG {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(maps.reason(Reason::Spoofed, Egress) > spoofed, "{told}");
        one.detach();
        two.detach();
    }
}

/// Without its slot a program knows no endpoint, and drops everything: without a class, and by a constant that is nobody's.
#[test]
fn a_program_without_its_slot_lets_nothing_pass() {
    if !require(Rung::Kernel) {
        return;
    }
    for (by, slot) in &[(By::clsact(true), Slot::Constant(7)), (By::clsact(true), Slot::Class)] {
        let maps = Pod::load(&policy(Slot::Class, &ALLOW, &ALLOW), &[]);
        maps.set_endpoint(&Endpoint::default());
        let mut wired = Wired::new(by, 3, &maps);
        wired.put(&ALLOW, &ALLOW);
        assert_eq!(wired.reaches_host(LONG), ALL, "{}: the twin", by.name);
        wired.pod = wired.pod_of(*slot, &ALLOW, &ALLOW);
        wired.attach();
        let unknown = maps.reason(Reason::UnknownEndpoint, Egress);
        assert_eq!(wired.reaches_host(SHORT), NONE, "{} {slot:?}", by.name);
        assert!(maps.reason(Reason::UnknownEndpoint, Egress) > unknown, "{} {slot:?}", by.name);
        wired.detach();
    }
}

/// What a pod with CAP_NET_ADMIN writes into the class of its packets is what a program on tcx reads there, so that programs
/// that learn their slot in this way are refused; clsact writes its own.
#[test]
fn a_pod_cannot_choose_its_slot() {
    if !require(Rung::Kernel) {
        return;
    }
    /// Which slot the pod chooses.
    const CHOSEN: u16 = 5;
    let by = By::clsact(false);
    let maps = Pod::load(&policy(Slot::Class, &ALLOW, &ALLOW), &[]);
    maps.set_endpoint(&Endpoint::default());
    let mut wired = Wired::new(&by, 3, &maps);
    wired.put(&ALLOW, &ALLOW);
    let pass = attach::conformance::constant("pass", attach::verdict::UNSPEC);
    let inside = Hook { device: wired.pair.pod.link("p0").unwrap().index, direction: attach::Direction::Egress };
    let chosen = Tag { label: "pod", class: CHOSEN };
    wired.pair.pod.run(|| ClsactAttacher.attach_tagged(inside, &pass, chosen)).unwrap();
    assert_eq!(wired.reaches_host(LONG), ALL, "by the slot that the host's own filter gives");
    let slots: Vec<u16> = maps.flows().entries().iter().map(|(key, _)| key.slot).collect();
    assert!(!slots.is_empty() && slots.iter().all(|slot| *slot == 3), "{slots:?}");

    if !Features::probe().unwrap().tcx {
        return;
    }
    let links = By::tcx(true);
    let hook = wired.pair.hook(attach::Direction::Ingress);
    let by_class = wired.pod.program(Egress);
    let refused = wired.pair.on_host(|| links.attacher.attach(hook, by_class, "pod")).unwrap_err();
    assert!(matches!(&refused, AttachError::ReadsClass { program } if program == datapath::FROM_POD), "{refused}");
    assert!(refused.to_string().contains("Slot::Constant"), "{refused}");
    // The default, which an owner may take from its pin, too.
    let default = datapath::default_program_of(&small(), Slot::Class).unwrap();
    let default = maps.beside(3, &default);
    let by_class = default.program(Ingress);
    let refused = wired.pair.on_host(|| links.attacher.attach(hook, by_class, "pod")).unwrap_err();
    assert!(matches!(&refused, AttachError::ReadsClass { program } if program == datapath::TO_POD), "{refused}");

    // The twin: a program that nobody refuses meets the pod's number, where clsact has not been.
    wired.pair.on_host(|| by.attacher.detach(hook)).unwrap();
    let mut code = Asm::program("peek", ProgramKind::Classifier);
    let go_on = code.label();
    // `tc_classid` of struct __sk_buff.
    code.load(Size::W, Reg::R0, Reg::R1, 72).jump_if(Cond::Ne, Reg::R0, i32::from(CHOSEN), go_on);
    code.ret(attach::verdict::SHOT).bind(go_on).ret(attach::verdict::UNSPEC);
    let code = insn::encode(code.finish().unwrap().insns());
    let peek = Program::load(ProgramKind::Classifier, "peek", &code).unwrap();
    wired.pair.on_host(|| links.attacher.attach(hook, &peek, "peek")).unwrap();
    assert_eq!(wired.reaches_host(SHORT), NONE, "each packet of the pod has the number that the pod chose");
    assert!(wired.pair.pod.run(|| ClsactAttacher.detach(inside)).unwrap());
    assert_eq!(wired.reaches_host(LONG), ALL, "without it none has");
    assert!(wired.pair.on_host(|| links.attacher.detach(hook)).unwrap());
}

/// Packet by packet a constant changes nothing but where the endpoint is found, in the kernel and in the VM.
#[test]
fn a_constant_slot_gives_the_verdicts_of_a_class() {
    if !require(Rung::Kernel) {
        return;
    }
    let list = List(vec![(0, 17, 53), (0, 6, 80)]);
    let sizes = small();
    let class = Spec::new(&sizes, &list, &DENY);
    let [class, constant] = [Slot::Class, Slot::Constant(5)].map(|slot| Pod::with(&Spec { slot, ..class.clone() }));
    let mut seen = Vec::new();
    for addresses in VERSIONS {
        for direction in [Egress, Ingress] {
            let (from, to) = way(direction, addresses);
            for packet in [
                eth().ip(from, to).udp(40000, 53).payload(9),
                eth().ip(from, to).udp(40000, 53).payload(9),
                eth().ip(to, from).udp(53, 40000),
                eth().ip(from, to).tcp(40000, 80, SYN),
                eth().ip(from, to).tcp(40000, 81, SYN),
                eth().ip(from, to).echo_request(77),
                eth().vlan(5).ip(from, to).udp(40000, 53),
            ] {
                let why = class.run(direction, &packet);
                assert_eq!(constant.run(direction, &packet), why, "{direction:?} {packet:?}");
                seen.push(why);
            }
        }
    }
    for why in [None, Some(Reason::Allowed), Some(Reason::Denied), Some(Reason::Spoofed)] {
        assert!(seen.contains(&why), "no packet had {why:?}");
    }
    let slots = |pod: &Pod| pod.flows().entries().iter().map(|(key, _)| key.slot).collect::<Vec<_>>();
    assert!(slots(&class).iter().all(|s| *s == 0) && !slots(&class).is_empty());
    assert!(slots(&constant).iter().all(|s| *s == 5) && !slots(&constant).is_empty());
    for direction in [Egress, Ingress] {
        let [class, constant] = [&class, &constant].map(|pod| pod.program(direction).info().verified_instructions);
        eprintln!("{direction:?}: {class} instructions verified by class, {constant} by a constant");
        assert!(constant <= class + class / 10, "{direction:?}: {constant} verified, by class {class}");
    }
}

/// What another endpoint's object is made of costs no second lowering: only the slot differs.
#[test]
fn an_object_with_another_slot_is_the_one_made_of_that_slot() {
    let list = List(vec![(0, 17, 53), (7, 6, 80)]);
    let elf = |slot| policy(Slot::Constant(slot), &list, &DENY).to_elf().unwrap();
    let object = policy(Slot::Constant(1), &list, &DENY);
    let mut patched = elf(1);
    let places = datapath::slot_places(&object, &patched).unwrap();
    for place in places {
        patched[place..place + 4].copy_from_slice(&7_i32.to_le_bytes());
    }
    assert_eq!(patched, elf(7));
    assert_ne!(patched, elf(1));
    for other in [policy(Slot::Class, &list, &DENY), datapath::default_program_of(&small(), Slot::Class).unwrap()] {
        assert_eq!(datapath::slot_places(&other, &other.to_elf().unwrap()), None);
    }
    assert_eq!(datapath::slot_places(&object, &patched), None, "of another slot");
}

#[test]
fn a_slot_that_no_endpoint_has_is_refused() {
    let sizes = small();
    for slot in [0, 8, u16::MAX] {
        let slot_of = |outcome: Result<Object, DatapathError>| match outcome {
            Err(DatapathError::Slot { slot, last: 7 }) => slot,
            other => panic!("{:?}", other.map(|_| "an object")),
        };
        let constant = Slot::Constant(slot);
        assert_eq!(slot_of(datapath::default_program_of(&sizes, constant)), slot);
        let spec = Spec { slot: constant, ..Spec::new(&sizes, &ALLOW, &ALLOW) };
        assert_eq!(slot_of(datapath::program(&spec)), slot);
    }
    assert!(datapath::default_program_of(&sizes, Slot::Constant(7)).is_ok());
    let nobody = Spec { slot: Slot::Nobody, ..Spec::new(&sizes, &ALLOW, &ALLOW) };
    assert!(matches!(datapath::program(&nobody), Err(DatapathError::Slot { slot: 0, last: 7 })));
    assert!(datapath::default_program_of(&sizes, Slot::Nobody).is_ok());
}
