//! What the programs cost, over an empty one. Bounds are wide, as the machine is shared; run with `--nocapture` for the
//! figures, in release for nothing else, for the kernel does the work.

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::{Direction, Endpoint, Sizes};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::datapath::classes::Classes;
use dcenet_ebpf::datapath::{AllowAll, DenyAll, EmitClassifier, Exits, Slot, Spec};
use dcenet_ebpf::insn::{Cond, encode};
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::program::{Program, TestRun};
use dcenet_ebpf::test_support::packet::*;

use crate::classes::{number_classes, store};
use crate::harness::*;

/// Nanoseconds of one run, the least of many bursts.
fn cost(program: &Program, packet: &Packet) -> u64 {
    let frame = packet.bytes();
    let run = TestRun { packet: &frame, context: &[], repeat: 4000 };
    (0..60).map(|_| program.test_run(&run).unwrap().duration.as_nanos() as u64).min().unwrap()
}

fn empty() -> Program {
    let mut asm = Asm::program("empty", ProgramKind::Classifier);
    asm.ret(TC_ACT_UNSPEC);
    let function = asm.finish().unwrap();
    Program::load(ProgramKind::Classifier, "empty", &encode(function.insns())).unwrap()
}

#[test]
fn the_costs_are_within_bounds() {
    if !require(Rung::Kernel) {
        return;
    }
    let (allow, deny) = (AllowAll { rule: 1 }, DenyAll { rule: 2 });
    let sizes = Sizes { conntrack: 65_536, ..small() };
    let open = Pod::with(&Spec { flow_events: u32::MAX, ..Spec::new(&sizes, &allow, &allow) });
    let shut = Pod::with(&Spec { denied_events: 0, ..Spec::new(&sizes, &deny, &deny) });
    let syn = |(from, to)| eth().ip(from, to).tcp(40000, 80, SYN);
    // A SYN that also closes takes its own flow's place each time: a lookup, a classification, an update, an event.
    let anew = |(from, to)| eth().ip(from, to).tcp(40001, 80, SYN | FIN);
    let floor = cost(&empty(), &syn(VERSIONS[0]));
    let mut rows: Vec<(String, u64, u64)> = Vec::new();
    let mut row = |name: String, ns: u64, bound: u64| rows.push((name, ns.saturating_sub(floor), bound));
    for direction in [Egress, Ingress] {
        for (version, addresses) in ["IPv4", "IPv6"].into_iter().zip(VERSIONS) {
            let between = way(direction, addresses);
            let known = |d: Direction| open.program(d);
            row(format!("{direction:?} {version} flow that is new"), cost(known(direction), &syn(between)), 400);
            let (from, to) = between;
            let (there, answer) = (eth().ip(from, to).udp(40000, 53), eth().ip(to, from).udp(53, 40000));
            for _ in 0..4 {
                open.run(direction, &there);
                open.run(direction.opposite(), &answer);
            }
            row(format!("{direction:?} {version} settled flow"), cost(known(direction), &there), 400);
            let full = cost(known(direction), &anew(between));
            row(format!("{direction:?} {version} new flow, event"), full, 2000);
            row(
                format!("{direction:?} {version} denied, no event"),
                cost(shut.program(direction), &syn(between)),
                1000,
            );
        }
    }
    let (from, to) = VERSIONS[0];
    let alone = Pod::with(&Spec { slot: Slot::Constant(5), ..Spec::new(&sizes, &allow, &allow) });
    let (there, answer) = (eth().ip(from, to).udp(40000, 53), eth().ip(to, from).udp(53, 40000));
    for _ in 0..4 {
        alone.run(Egress, &there);
        alone.run(Ingress, &answer);
    }
    row("Egress IPv4 settled flow, slot a constant".into(), cost(alone.program(Egress), &there), 400);
    row("tagged IPv4 known flow".into(), cost(open.program(Egress), &eth().vlan(1).ip(from, to).udp(1, 2)), 1000);
    let ping = eth().ip(from, to).echo_request(1);
    row("IPv4 echo, known flow".into(), cost(open.program(Egress), &ping), 1000);

    // Classes: what one more level costs.
    let tries = Pod::with(&Spec { denied_events: 0, ..Spec::new(&sizes, &deny, &deny) });
    let mut classes = Classes::new(&sizes);
    for text in ["10.1.0.0/16", "10.2.1.0/24", "10.3.1.1/32", "fd00:1::/32", "fd00:2:0:1::/64", "fd01::1/128"] {
        store(&tries, &classes.insert(text.parse().unwrap(), 1).unwrap());
    }
    for peer in ["10.1.1.1", "10.2.1.1", "10.3.1.1", "fd01::1", "fd00:1::1", "fd00:2:0:1::1"] {
        let peer = peer.parse().unwrap();
        let pod: std::net::IpAddr =
            if from.is_ipv4() == matches!(peer, std::net::IpAddr::V4(_)) { from } else { POD6.into() };
        row(format!("denied peer {peer}"), cost(tries.program(Egress), &eth().ip(pod, peer).udp(1, 2)), 1000);
    }
    eprintln!("empty program: {floor} ns; over it:");
    for (name, ns, bound) in &rows {
        eprintln!("{ns:6} ns  {name}");
        assert!(ns <= bound, "{name}: {ns} ns, bound {bound}");
    }
    let endpoint = open.array::<Endpoint>(dcenet_ebpf::abi::ENDPOINTS).load(0).unwrap();
    assert_eq!(endpoint, crate::harness::endpoint());
}

/// A binary search over ports: as much code as a real policy has.
struct Search {
    leaves: u32,
}

impl EmitClassifier for Search {
    fn emit(&self, asm: &mut Asm, exits: &Exits) {
        self.range(asm, exits, 0, self.leaves);
    }
}

impl Search {
    fn range(&self, asm: &mut Asm, exits: &Exits, from: u32, to: u32) {
        if to - from == 1 {
            asm.mov32(Exits::RULE, from as i32 % 64).jump(if from.is_multiple_of(2) {
                exits.allow()
            } else {
                exits.deny()
            });
            return;
        }
        let (middle, upper) = (from.midpoint(to), asm.label());
        asm.jump_if(Cond::Ge, Exits::VALUE, (u64::from(middle) * 65_536 / u64::from(self.leaves)) as i32, upper);
        self.range(asm, exits, from, middle);
        asm.bind(upper);
        self.range(asm, exits, middle, to);
    }
}

#[test]
fn the_verifier_looks_at_a_large_classifier_a_few_times_only() {
    if !require(Rung::Kernel) {
        return;
    }
    let verified = |leaves: u32| {
        let search = Search { leaves };
        let pod = Pod::new(&search, &search);
        number_classes(&pod, 2);
        let function =
            |d: Direction| (pod.program(d).info().verified_instructions, pod.program(d).info().translated_bytes / 8);
        [function(Egress), function(Ingress)]
    };
    let (small, large) = (verified(64), verified(4096));
    for (small, large) in small.iter().zip(&large) {
        let factor = f64::from(large.0 - small.0) / f64::from(large.1 - small.1);
        eprintln!("{} instructions verified for {} slots: {factor:.1} for each slot of a classifier", large.0, large.1);
        assert!(factor < 5.8, "{factor}");
    }
}
