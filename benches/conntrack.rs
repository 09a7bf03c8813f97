//! `conntrack`: what the deployed datapath takes for a packet of a flow that it knows and for one that it does not, by
//! BPF_PROG_TEST_RUN in bursts, over a program that does nothing. It is against what the kernel takes, in the same rounds, for
//! the map operations that each cannot do without: a look-up in an LRU hash table of the same keys and values for a known flow;
//! for a new one a look-up among the settled and one among the new, an update, a record into a ring buffer. Beside each ratio
//! stands the time that was set beforehand.
//!
//! A flow that is known is settled, and its packets come faster than the kernel's clock ticks; the first packet of a tick asks
//! the clock, too. As every packet of a burst would be of one tick, a program ahead of ours forgets each time which tick it was:
//! that one is over the same program ahead of nothing, against a look-up, the clock and the counter of ticks. One that is new is admitted by an allowing policy, takes the place of the same flow that has ended, and is
//! told of by an event; the event alone is what that takes over a flow that is not told of. Needs root.

use std::os::fd::AsFd;

use dcenet_benches::{Row, Summary, rounds, say};
use dcenet_ebpf::abi::{self, Be16, Direction, Endpoint, Event, Flow, FlowKey, Sizes};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::datapath::{self, AllowAll, Spec};
use dcenet_ebpf::insn::{Cond, Helper, Reg::*, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loaded, Loader};
use dcenet_ebpf::maps::{Array, Map, ProgramArray, RingBuffer};
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::program::{Program, TestRun};
use dcenet_ebpf::test_support::packet::{FIN, Packet, SYN, eth};

const ID: &str = "conntrack";
/// Runs of a burst: as many events as the ring has room for.
const BURST: u32 = 4000;
const TC_ACT_UNSPEC: i32 = -1;
const UNKNOWN: i32 = 7;
/// Nanoseconds, each where the map operations take as many as these.
const KNOWN: (f64, f64) = (40.0, 31.0);
const NEW: (f64, f64) = (320.0, 2.0 * 31.0 + 209.0 + 32.0);
const EVENT: (f64, f64) = (40.0, 32.0);
/// Half as much again, as for what is between the map operations.
const FIRST: f64 = 1.5;
const EVENT_BYTES: u32 = 1 << 20;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let floors = Floors::load()?;
    let (pod, silent) = (Pod::load(u32::MAX)?, Pod::load(0)?);
    let [v4, v6] = [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")];
    let mut cases = Vec::new();
    for (version, (own, peer)) in [("IPv4", v4), ("IPv6", v6)] {
        let (own, peer) = (own.parse()?, peer.parse()?);
        for (direction, from, to) in [(Direction::Egress, own, peer), (Direction::Ingress, peer, own)] {
            let known = eth().ip(from, to).udp(40_000, 53);
            pod.settle(direction, &known, &eth().ip(to, from).udp(53, 40_000))?;
            let name = match direction {
                Direction::Egress => "sent",
                Direction::Ingress => "received",
            };
            cases.push((format!("known, {version}, {name}"), direction, known, Kind::Known));
            // A SYN that also closes its flow begins it anew each time.
            let anew = eth().ip(from, to).tcp(40_001, 80, SYN | FIN);
            cases.push((format!("new with event, {version}, {name}"), direction, anew, Kind::New));
        }
    }
    let first = eth().ip(v4.0.parse()?, v4.1.parse()?).udp(40_000, 53);
    let ticks = Ticks::load(&pod, &floors.nothing)?;
    let runs = rounds(200, 10);
    let mut ours = vec![Vec::new(); cases.len()];
    let mut events = Vec::new();
    let [mut lookups, mut all, mut records, mut clocks, mut firsts] = [const { Vec::new() }; 5];
    for _ in 0..runs {
        let frame = eth().ip(v4.0.parse()?, v4.1.parse()?).udp(1, 2);
        let nothing = burst(&floors.nothing, &frame)?;
        let over = |program, packet: &Packet| Ok::<_, Failure>((burst(program, packet)? - nothing).max(0.1));
        let [lookup, update, record, clock] = [
            over(&floors.lookup, &frame)?,
            over(&floors.update, &frame)?,
            over(&floors.record, &frame)?,
            over(&floors.clock, &frame)?,
        ];
        floors.drain()?;
        clocks.push(lookup + clock);
        let ahead = burst(&ticks.ahead_of_nothing, &first)?;
        firsts.push((burst(&ticks.ahead_of_ours, &first)? - ahead).max(0.1));
        lookups.push(lookup);
        all.push(2.0 * lookup + update + record);
        records.push(record);
        for (times, (_, direction, packet, _)) in ours.iter_mut().zip(&cases) {
            times.push(over(pod.program(*direction), packet)?);
            pod.drain()?;
        }
        let anew = eth().ip(v4.0.parse()?, v4.1.parse()?).tcp(40_001, 80, SYN | FIN);
        let told = over(&pod.from_pod, &anew)?;
        pod.drain()?;
        events.push((told - over(&silent.from_pod, &anew)?).max(0.1));
    }
    let mut summary = Summary::default();
    for ((name, _, _, kind), times) in cases.iter().zip(&ours) {
        let (goal, peer) = match kind {
            Kind::Known => (KNOWN, ("a look-up", &lookups[..])),
            Kind::New => (NEW, ("2 look-ups, update, record", &all[..])),
        };
        add(&mut summary, name, goal, times, peer);
    }
    let clock = ("a look-up, the clock", &clocks[..]);
    summary.add(Row::compare(ID, "known, the first of a tick, IPv4, sent", FIRST, &firsts, clock).in_unit("ns"));
    add(&mut summary, "an event", EVENT, &events, ("a record", &records));
    say(format_args!("{ID}: over an empty program"));
    summary.write();
    Ok(())
}

/// Adds a row against the map operations, and one against the bound.
fn add(summary: &mut Summary, name: &str, (bound, of): (f64, f64), times: &[f64], peer: (&str, &[f64])) {
    summary.add(Row::compare(ID, name, bound / of, times, peer).in_unit("ns"));
    let bounds = vec![bound; times.len()];
    let name = format!("{name}, at most");
    summary.add(Row::compare(ID, &name, 1.0, times, (&format!("{bound} ns"), &bounds)).in_unit("ns"));
}

#[derive(Clone, Copy)]
enum Kind {
    Known,
    New,
}

/// Nanoseconds of a run, on average over a burst.
fn burst(program: &Program, packet: &Packet) -> Result<f64, Failure> {
    let run = program.test_run(&TestRun { packet: &packet.bytes(), context: &[], repeat: BURST })?;
    Ok(run.duration.as_secs_f64() * 1e9)
}

/// Programs of one map operation each.
struct Floors {
    nothing: Program,
    lookup: Program,
    update: Program,
    record: Program,
    clock: Program,
    loaded: Loaded,
}

impl Floors {
    fn load() -> Result<Self, Failure> {
        const KEY: i16 = -(FlowKey::BYTES as i16);
        const VALUE: i16 = KEY - Event::BYTES as i16;
        let mut object = Object::new();
        let (key, value) = (FlowKey::BYTES as u32, Flow::BYTES as u32);
        object.add_map(MapSpec::lru_hash("flows", key, value, Sizes::default().conntrack))?;
        object.add_map(MapSpec::ringbuf("events", EVENT_BYTES))?;
        let names = ["nothing", "lookup", "update", "record", "clock"];
        for name in names {
            let mut code = Asm::program(name, ProgramKind::Classifier);
            if !["nothing", "clock"].contains(&name) {
                for at in (VALUE..0).step_by(8) {
                    code.store(Size::Dw, R10, at, 1);
                }
            }
            match name {
                "lookup" => code.load_map(R1, "flows").mov(R2, R10).add(R2, i32::from(KEY)).call(Helper::MapLookupElem),
                "update" => code
                    .load_map(R1, "flows")
                    .mov(R2, R10)
                    .add(R2, i32::from(KEY))
                    .mov(R3, R10)
                    .add(R3, i32::from(VALUE))
                    .mov(R4, 0)
                    .call(Helper::MapUpdateElem),
                "record" => code
                    .load_map(R1, "events")
                    .mov(R2, R10)
                    .add(R2, i32::from(VALUE))
                    .mov(R3, Event::BYTES as i32)
                    .mov(R4, 0)
                    .call(Helper::RingbufOutput),
                "clock" => code.call(Helper::KtimeGetCoarseNs).call(Helper::Jiffies64),
                _ => &mut code,
            };
            code.ret(TC_ACT_UNSPEC);
            object.add(code.finish()?)?;
        }
        let mut loaded = load(&object)?;
        let [nothing, lookup, update, record, clock] = names.map(|name| loaded.take_program(name).ok_or(name));
        let (lookup, update, record, clock) = (lookup?, update?, record?, clock?);
        let floors = Self { nothing: nothing?, lookup, update, record, clock, loaded };
        // So that the look-up finds something.
        burst(&floors.update, &eth())?;
        Ok(floors)
    }

    fn drain(&self) -> Result<(), Failure> {
        drain(&self.loaded, "events")
    }
}

/// The deployed programs, which allow all.
struct Pod {
    from_pod: Program,
    to_pod: Program,
    loaded: Loaded,
}

impl Pod {
    /// With so many events about flows in a window.
    fn load(flow_events: u32) -> Result<Self, Failure> {
        let sizes = Sizes { event_bytes: EVENT_BYTES, ..Sizes::default() };
        let allow = AllowAll { rule: 1 };
        let mut loaded = load(&datapath::program(&Spec { flow_events, ..Spec::new(&sizes, &allow, &allow) })?)?;
        let [from_pod, to_pod] = [datapath::FROM_POD, datapath::TO_POD].map(|n| loaded.take_program(n).ok_or(n));
        let pod = Self { from_pod: from_pod?, to_pod: to_pod?, loaded };
        let endpoint = Endpoint::new(Some("10.0.0.1".parse()?), Some("fd00::1".parse()?), None);
        // A test run sees slot 0.
        Array::new(map(&pod.loaded, abi::ENDPOINTS)?)?.store(0, &endpoint)?;
        Ok(pod)
    }

    fn program(&self, direction: Direction) -> &Program {
        match direction {
            Direction::Egress => &self.from_pod,
            Direction::Ingress => &self.to_pod,
        }
    }

    fn settle(&self, direction: Direction, there: &Packet, answer: &Packet) -> Result<(), Failure> {
        for _ in 0..8 {
            for (direction, packet) in [(direction, there), (direction.opposite(), answer)] {
                let run = TestRun { packet: &packet.bytes(), context: &[], repeat: 1 };
                let verdict = self.program(direction).test_run(&run)?.retval.cast_signed();
                if verdict != TC_ACT_UNSPEC {
                    return Err(format!("a packet of an allowed flow met the verdict {verdict}").into());
                }
            }
        }
        Ok(())
    }

    fn drain(&self) -> Result<(), Failure> {
        drain(&self.loaded, abi::EVENTS)
    }
}

/// Programs ahead of others, which forget of a flow in which tick its last packet was.
struct Ticks {
    ahead_of_ours: Program,
    ahead_of_nothing: Program,
    /// Emptied where nobody holds it.
    _next: ProgramArray,
}

impl Ticks {
    /// Of the flow that the pod has settled, from its first address, ahead of what the pod's program does with it and of
    /// `nothing`.
    fn load(pod: &Pod, nothing: &Program) -> Result<Self, Failure> {
        const KEY: i16 = -(FlowKey::BYTES as i16);
        let peer: std::net::Ipv4Addr = "10.0.0.2".parse()?;
        let key = FlowKey {
            slot: 0,
            protocol: 17,
            version: 4,
            pod_port: Be16(40_000),
            peer_port: Be16(53),
            peer: peer.to_ipv6_mapped().octets(),
        };
        let flows = Sizes::default().shared_maps().into_iter().find(|map| map.name == abi::CONNTRACK);
        let mut object = Object::new();
        object.add_map(flows.ok_or("the table of flows")?)?.add_map(MapSpec::prog_array("next", 2))?;
        let names = ["ahead_of_ours", "ahead_of_nothing"];
        for (index, name) in (0..).zip(names) {
            let mut code = Asm::program(name, ProgramKind::Classifier);
            let unknown = code.label();
            code.mov(R6, R1);
            for (at, word) in (KEY..0).step_by(8).zip(key.encode().chunks_exact(8)) {
                code.load_imm64(R1, u64::from_ne_bytes(word.try_into()?)).store(Size::Dw, R10, at, R1);
            }
            code.load_map(R1, abi::CONNTRACK)
                .mov(R2, R10)
                .add(R2, i32::from(KEY))
                .call(Helper::MapLookupElem)
                .jump_if(Cond::Eq, R0, 0, unknown)
                .store(Size::Dw, R0, Flow::TICK, 0)
                .mov(R1, R6)
                .load_map(R2, "next")
                .mov(R3, index)
                .call(Helper::TailCall)
                .bind(unknown)
                // The verdict of no program ahead of which it is.
                .ret(UNKNOWN);
            object.add(code.finish()?)?;
        }
        let flows = map(&pod.loaded, abi::CONNTRACK)?;
        let request = LoadRequest { maps: &[(abi::CONNTRACK, flows.as_fd())] };
        let mut loaded = AyaLoader.load(&object.to_elf()?, &request)?;
        let next = ProgramArray::new(map(&loaded, "next")?)?;
        next.set(0, &pod.from_pod)?;
        next.set(1, nothing)?;
        let [ours, nothing] = names.map(|name| loaded.take_program(name).ok_or(name));
        let ticks = Self { ahead_of_ours: ours?, ahead_of_nothing: nothing?, _next: next };
        // What it stands ahead of is reached, and has met a flow of no tick.
        let before = tick(&flows, &key)?;
        for program in [&ticks.ahead_of_nothing, &ticks.ahead_of_ours] {
            let packet = eth().ip("10.0.0.1".parse()?, peer.into()).udp(40_000, 53).bytes();
            let verdict = program.test_run(&TestRun { packet: &packet, context: &[], repeat: 1 })?.retval.cast_signed();
            if verdict != TC_ACT_UNSPEC {
                return Err(format!("a packet of a settled flow met the verdict {verdict}").into());
            }
            let is_ours = std::ptr::eq(program, &ticks.ahead_of_ours);
            if (tick(&flows, &key)? != 0) != is_ours || before == 0 {
                return Err("a packet of a flow whose tick was forgotten went the way of others".into());
            }
        }
        Ok(ticks)
    }
}

/// In which tick a flow's last packet was.
fn tick(flows: &Map, key: &FlowKey) -> Result<u64, Failure> {
    let mut bytes = [0; Flow::BYTES];
    if !flows.lookup(&key.encode(), &mut bytes)? {
        return Err("the flow just settled is not there".into());
    }
    Ok(Flow::decode(&bytes).ok_or("the bytes of a flow")?.tick)
}

fn load(object: &Object) -> Result<Loaded, Failure> {
    Ok(AyaLoader.load(&object.to_elf()?, &LoadRequest { maps: &[] })?)
}

fn map(loaded: &Loaded, name: &str) -> Result<Map, Failure> {
    let found = loaded.maps.iter().find(|(n, _)| n == name).ok_or_else(|| format!("no map {name}"))?;
    Ok(found.1.try_clone()?)
}

fn drain(loaded: &Loaded, name: &str) -> Result<(), Failure> {
    RingBuffer::new(map(loaded, name)?)?.drain(usize::MAX, |_| ())?;
    Ok(())
}
