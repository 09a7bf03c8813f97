//! The straight way of settled flows, in the VM alone: its clock stands still, so that a packet meets the tick of the one
//! before. What must not take that way is shown twice: by the programs, and by their twins that lack one of its guards.

use std::net::IpAddr;
use std::num::NonZeroU32;

use dcenet_ebpf::abi::{self, Direction, Endpoint, Event, EventKind, Flow, FlowState, Reason, reason_index};
use dcenet_ebpf::datapath::{self, AllowAll, DenyAll, EmitClassifier, Spec};
use dcenet_ebpf::insn::{Cond, Helper, Insn, Reg::*, Src};
use dcenet_ebpf::object::Program;
use dcenet_ebpf::test_support::packet::*;
use dcenet_ebpf::vm::{Environment, Maps, Skb, Update, Vm};

use crate::harness::*;

const ALLOW: AllowAll = AllowAll { rule: 1 };
const DENY: DenyAll = DenyAll { rule: 2 };
const TICK_NS: u64 = 4_000_000;

/// What keeps a packet off the straight way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guard {
    /// The slot holds an endpoint.
    Active,
    /// The flow was seen in this tick.
    Tick,
    /// The policy that admitted it is that of now.
    Generation,
    /// It is established.
    State,
    /// The packet neither opens nor closes.
    Flags,
}

impl Guard {
    const ALL: [Self; 5] = [Self::Active, Self::Tick, Self::Generation, Self::State, Self::Flags];
}

/// A program, and where it is on the straight way: the last instruction of it.
fn straight(program: &Program, without: Option<Guard>) -> (Program, usize) {
    let mut insns = program.insns().to_vec();
    let jumps = |from: usize| {
        let is_jump = |at: &usize| matches!(program.insns()[*at], Insn::JumpIf { .. });
        (from..insns.len()).filter(is_jump)
    };
    let begin = insns.iter().position(|i| *i == Insn::Call { helper: Helper::Jiffies64 }).unwrap();
    let [_, active] = jumps(0).take(2).collect::<Vec<_>>()[..] else { panic!("no prologue") };
    let [_, tick, _, generation, state, flags] = jumps(begin).take(6).collect::<Vec<_>>()[..] else {
        panic!("no straight way")
    };
    let end = begin + insns[begin..].iter().position(|i| *i == Insn::Exit).unwrap();
    assert!(flags < end);
    let established = i32::from(FlowState::Established as u8);
    let (reset, zero) = (i32::from(FIN | SYN | RST), 0);
    for (guard, at, cond, dst, src) in [
        (Guard::Active, active, Cond::Eq, R1, Src::Imm(zero)),
        (Guard::Tick, tick, Cond::Ne, R1, Src::Reg(R8)),
        (Guard::Generation, generation, Cond::Ne, R2, Src::Reg(R3)),
        (Guard::State, state, Cond::Ne, R2, Src::Imm(established)),
        (Guard::Flags, flags, Cond::Set, R2, Src::Imm(reset)),
    ] {
        let Insn::JumpIf { cond: c, dst: d, src: s, .. } = insns[at] else { panic!("{guard:?} is no jump") };
        assert_eq!((c, d, s), (cond, dst, src), "{guard:?} is elsewhere");
        if without == Some(guard) {
            insns[at] = Insn::Jump { off: 0 };
        }
    }
    let slot = insns[..end].iter().map(Insn::slots).sum();
    (Program::from_insns(program.name(), program.kind(), insns, program.maps().to_vec()), slot)
}

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    verdict: i32,
    /// It took the straight way.
    straight: bool,
    /// What was counted beside the flow.
    why: Why,
}

const STRAIGHT: Seen = Seen { verdict: TC_ACT_UNSPEC, straight: true, why: None };
const KNOWN: Seen = Seen { straight: false, ..STRAIGHT };

const fn dropped(why: Reason) -> Seen {
    Seen { verdict: TC_ACT_SHOT, straight: false, why: Some(why) }
}

/// A pod whose flows begin in one direction only, and have settled.
struct World {
    without: Option<Guard>,
    sample: Option<NonZeroU32>,
    vms: [(Vm, usize); 2],
    maps: Maps,
    env: Environment,
    direction: Direction,
    between: (IpAddr, IpAddr),
}

impl World {
    fn new(
        direction: Direction,
        between: (IpAddr, IpAddr),
        without: Option<Guard>,
        sample: Option<NonZeroU32>,
    ) -> Self {
        let (vms, maps) = programs(classifiers(direction), without, sample);
        let mut world = Self { without, sample, vms, maps, env: Environment::default(), direction, between };
        world.set_endpoint(&endpoint());
        let back = direction.opposite();
        assert_eq!(world.there(SYN), Seen { why: Some(Reason::Allowed), ..KNOWN });
        assert_eq!(world.packet(back, SYN | ACK, 100, 1), KNOWN);
        assert_eq!(world.packet(direction, ACK, 1, 101), KNOWN);
        assert_eq!(world.maps.get(abi::CONNTRACK).unwrap().len(), 1);
        world.maps.get_mut(abi::EVENTS).unwrap().drain();
        world
    }

    fn set_endpoint(&mut self, endpoint: &Endpoint) {
        let endpoints = self.maps.get_mut(abi::ENDPOINTS).unwrap();
        endpoints.update(&0u32.to_ne_bytes(), &endpoint.encode(), Update::Any).unwrap();
    }

    /// Other policies over the same maps.
    fn replace(&mut self, policies: [&dyn EmitClassifier; 2]) {
        (self.vms, _) = programs(policies, self.without, self.sample);
    }

    /// What the side that opened the flow sends.
    fn there(&mut self, flags: u8) -> Seen {
        self.packet(self.direction, flags, 1, 101)
    }

    fn answer(&mut self, flags: u8) -> Seen {
        self.packet(self.direction.opposite(), flags, 101, 1)
    }

    fn packet(&mut self, direction: Direction, flags: u8, sequence: u32, acknowledged: u32) -> Seen {
        let (from, to) = self.between;
        let packet = if direction == self.direction {
            eth().ip(from, to).tcp(40_000, 80, flags)
        } else {
            eth().ip(to, from).tcp(80, 40_000, flags)
        };
        let before = self.reasons(direction);
        let (vm, end) = &mut self.vms[direction as usize];
        vm.reset_coverage();
        let mut skb = Skb::new(packet.numbers(sequence, acknowledged).bytes());
        let run = vm.run(&mut skb, &mut self.maps, &mut self.env).unwrap_or_else(|trap| panic!("{trap}"));
        let straight = vm.has_run(*end);
        let after = self.reasons(direction);
        let mut moved = after.into_iter().filter(|reason| !before.contains(reason)).map(|(reason, _)| reason);
        let why = moved.next();
        assert_eq!(moved.next(), None, "two reasons");
        Seen { verdict: run.value.cast_signed(), straight, why }
    }

    /// Packets by reason.
    fn reasons(&self, direction: Direction) -> Vec<(Reason, u64)> {
        let reasons = self.maps.get(abi::REASONS).unwrap();
        let packets = |reason: &Reason| {
            let value = reasons.lookup(&reason_index(*reason, direction).to_ne_bytes()).unwrap();
            (*reason, u64::from_ne_bytes(value[..8].try_into().unwrap()))
        };
        Reason::ALL.iter().map(packets).collect()
    }

    fn flows(&self) -> Vec<Flow> {
        let tables = abi::FLOW_TABLES.into_iter().filter_map(|name| self.maps.get(name));
        tables.flat_map(|map| map.entries()).map(|(_, value)| Flow::decode(value).unwrap()).collect()
    }

    fn flow(&self) -> Flow {
        let flows = self.flows();
        assert_eq!(flows.len(), 1, "{flows:?}");
        flows[0]
    }

    fn events(&mut self) -> Vec<Event> {
        let events = self.maps.get_mut(abi::EVENTS).unwrap().drain();
        events.iter().map(|bytes| Event::decode(bytes).unwrap()).collect()
    }
}

/// The policies of egress and ingress that let flows begin in one direction only.
fn classifiers(direction: Direction) -> [&'static dyn EmitClassifier; 2] {
    match direction {
        Egress => [&ALLOW, &DENY],
        Ingress => [&DENY, &ALLOW],
    }
}

fn programs(
    [egress, ingress]: [&dyn EmitClassifier; 2],
    without: Option<Guard>,
    sample: Option<NonZeroU32>,
) -> ([(Vm, usize); 2], Maps) {
    let sizes = small();
    let object = datapath::program(&Spec { sample, ..Spec::new(&sizes, egress, ingress) }).unwrap();
    let vms = [datapath::FROM_POD, datapath::TO_POD].map(|name| {
        let (program, end) = straight(&object.link(name).unwrap(), without);
        (Vm::new(&program).unwrap(), end)
    });
    (vms, Maps::new(object.maps()))
}

fn ways() -> impl Iterator<Item = (Direction, (IpAddr, IpAddr))> {
    [Egress, Ingress].into_iter().flat_map(|direction| VERSIONS.map(|between| (direction, way(direction, between))))
}

#[test]
fn packets_of_a_settled_flow_take_the_straight_way_and_are_counted() {
    for (direction, between) in ways() {
        let mut world = World::new(direction, between, None, None);
        let before = world.flow();
        assert_eq!([world.there(ACK), world.there(PSH | ACK), world.answer(ACK)], [STRAIGHT; 3]);
        let bytes = if between.0.is_ipv4() { 14 + 20 + 20 } else { 14 + 40 + 20 };
        let mut expected = before;
        let (own, other) = match direction {
            Egress => (
                (&mut expected.egress_packets, &mut expected.egress_bytes),
                (&mut expected.ingress_packets, &mut expected.ingress_bytes),
            ),
            Ingress => (
                (&mut expected.ingress_packets, &mut expected.ingress_bytes),
                (&mut expected.egress_packets, &mut expected.egress_bytes),
            ),
        };
        *own.0 += 2;
        *own.1 += 2 * bytes;
        *other.0 += 1;
        *other.1 += bytes;
        assert_eq!(world.flow(), expected, "{direction:?} {between:?}");
        assert_eq!(world.events(), []);
        // The first packet of a tick asks the clock, and those behind it need not.
        world.env.advance(TICK_NS);
        assert_eq!([world.there(ACK), world.there(ACK), world.answer(ACK)], [KNOWN, STRAIGHT, STRAIGHT]);
        assert_eq!((world.flow().last_seen, world.flow().tick), (world.env.coarse_ns, world.env.jiffies));
    }
}

#[test]
fn one_in_so_many_packets_of_the_straight_way_is_told_of() {
    for (direction, between) in ways() {
        let mut world = World::new(direction, between, None, NonZeroU32::new(1));
        let (flow, told) = (world.flow(), (world.there(ACK), world.events()));
        // It is told of, and ends where events do.
        assert_eq!(told.0, KNOWN);
        let [event] = told.1[..] else { panic!("{:?}", told.1) };
        assert_eq!((event.kind, event.time, event.rule), (EventKind::Sampled as u8, flow.last_seen, 1));
        let packets = [event.egress_packets, event.ingress_packets];
        assert_eq!(packets[direction as usize], [flow.egress_packets, flow.ingress_packets][direction as usize] + 1);
        // One in so many that none of these is.
        let mut world = World::new(direction, between, None, NonZeroU32::new(u32::MAX));
        assert_eq!((world.there(ACK), world.events()), (STRAIGHT, vec![]));
    }
}

/// Does something, and tells what became of the packet that the guard must keep off the straight way.
type Trial = fn(&mut World) -> Seen;

/// Each with the guard that it needs, and what the program and its twin without the guard make of it.
const TRIALS: [(&str, Guard, Trial, Seen); 11] = [
    ("a slot that nobody has any more", Guard::Active, leave, dropped(Reason::UnknownEndpoint)),
    ("another tick", Guard::Tick, wait, KNOWN),
    ("an answer after the flow's time", Guard::Tick, outlive, dropped(Reason::Denied)),
    ("a policy that denies it now", Guard::Generation, revoke, dropped(Reason::Revoked)),
    ("its answer, by the same", Guard::Generation, revoke_answer, dropped(Reason::Revoked)),
    ("the next who has the slot", Guard::Generation, hand_over, dropped(Reason::Revoked)),
    ("a flow that closes", Guard::State, |world| close(world, ACK), KNOWN),
    ("a FIN", Guard::Flags, |world| ends(world, FIN | ACK), KNOWN),
    ("a RST", Guard::Flags, |world| ends(world, RST), KNOWN),
    ("a SYN of the other side", Guard::Flags, |w| w.answer(SYN), dropped(Reason::Denied)),
    ("another answer to a SYN", Guard::Flags, expect_anew, KNOWN),
];

fn leave(world: &mut World) -> Seen {
    world.set_endpoint(&Endpoint { flags: 0, ..endpoint() });
    world.there(ACK)
}

fn wait(world: &mut World) -> Seen {
    world.env.advance(TICK_NS);
    world.there(ACK)
}

fn outlive(world: &mut World) -> Seen {
    world.env.advance(world.flow().timeout + 1);
    world.answer(ACK)
}

fn deny(world: &mut World, tenure: u16) {
    world.replace([&DENY, &DENY]);
    world.set_endpoint(&Endpoint { generation_egress: 1, generation_ingress: 1, tenure, ..endpoint() });
}

fn revoke(world: &mut World) -> Seen {
    deny(world, 0);
    let seen = world.there(ACK);
    // The entry stays as old as it was, and so do the answers.
    assert_eq!(world.flow().generation, 0);
    seen
}

fn revoke_answer(world: &mut World) -> Seen {
    deny(world, 0);
    world.answer(ACK)
}

fn hand_over(world: &mut World) -> Seen {
    deny(world, 1);
    let seen = world.there(ACK);
    assert_eq!(world.flows().is_empty(), !seen.straight);
    seen
}

fn close(world: &mut World, flags: u8) -> Seen {
    assert_eq!(world.there(FIN | ACK), KNOWN);
    assert_eq!(world.flow().state, FlowState::Closing as u8);
    world.answer(flags)
}

fn ends(world: &mut World, flags: u8) -> Seen {
    let seen = world.answer(flags);
    assert_eq!(world.flow().state == FlowState::Closing as u8, !seen.straight);
    let closed = world.events().iter().filter(|event| event.kind == EventKind::Closed as u8).count();
    assert_eq!(closed, usize::from(!seen.straight));
    seen
}

fn expect_anew(world: &mut World) -> Seen {
    let seen = world.packet(world.direction.opposite(), SYN | ACK, 200, 1);
    assert_eq!(world.flow().expected, if seen.straight { 101 } else { 201 });
    seen
}

#[test]
fn what_is_not_settled_goes_another_way_and_a_missing_guard_shows() {
    for (name, guard, trial, expected) in TRIALS {
        for (direction, between) in ways() {
            let world = |without| World::new(direction, between, without, None);
            assert_eq!(trial(&mut world(None)), expected, "{name}: {direction:?} {between:?}");
            assert_eq!(
                trial(&mut world(Some(guard))),
                STRAIGHT,
                "{name}, without its guard: {direction:?} {between:?}"
            );
        }
    }
    for guard in Guard::ALL {
        assert!(TRIALS.iter().any(|(_, of, ..)| *of == guard), "{guard:?} is not tried");
    }
}

#[test]
fn a_flow_that_is_allowed_again_settles_again() {
    for (direction, between) in ways() {
        let mut world = World::new(direction, between, None, None);
        // The generation of the other direction's policy is no matter of this flow.
        let (egress, ingress) = if direction == Egress { (0, 1) } else { (1, 0) };
        world.set_endpoint(&Endpoint { generation_egress: egress, generation_ingress: ingress, ..endpoint() });
        assert_eq!(world.there(ACK), STRAIGHT);
        world.set_endpoint(&Endpoint { generation_egress: 1, generation_ingress: 1, tenure: 3, ..endpoint() });
        // Judged anew, and no more than once.
        assert_eq!([world.answer(ACK), world.answer(ACK), world.there(ACK)], [KNOWN, STRAIGHT, STRAIGHT]);
        assert_eq!((world.flow().generation, world.flow().tenure), (1, 3));
    }
}
