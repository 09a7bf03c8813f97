//! `guard`: what a frame costs on the parent of macvlans, by BPF_PROG_TEST_RUN in bursts over a program that does nothing: one of
//! nobody whom the guard knows, and one of a pod, whose flow is known. The first is against the look-ups that find out
//! whose a frame is, in hash tables of the same keys, and one copy of bytes out of the packet; the second against what the same
//! packet has cost at the pod's own device, where it was judged first. Needs root, and Linux 6.13.

use std::os::fd::AsFd;

use dcenet_benches::{Row, Summary, rounds, say};
use dcenet_ebpf::abi::{self, Endpoint, Guarded, Namespace, Sender, Sizes};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::datapath::guard::{self, FROM_GUARDED, GUARD, JUDGES, NAMESPACES, SENDERS};
use dcenet_ebpf::datapath::{self, AllowAll, Slot, Spec};
use dcenet_ebpf::insn::{Helper, Reg::*, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loaded, Loader};
use dcenet_ebpf::maps::{Array, HashTable, Map, ProgramArray, Put};
use dcenet_ebpf::object::{Object, ProgramKind};
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::{Program, TestRun};
use dcenet_ebpf::test_support::packet::{Packet, eth};

const ID: &str = "guard";
const BURST: u32 = 4000;
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;
const SLOT: u16 = 5;
/// BPF_PROG_TEST_RUN shows the loopback device.
const PARENT: u32 = 1;
/// The helper for the namespace, the parsing of the source address, and what is between the floor's operations.
const NOBODY: f64 = 1.5;
/// Twice the look-ups, without the straight way of a flow that is seen for the first time.
const POD: f64 = 4.5;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    if !Features::probe()?.netns_cookie {
        say(format_args!("{ID}: not here, for the kernel has no bpf_get_netns_cookie for classifiers (Linux 6.13)"));
        return Ok(());
    }
    let [nothing, floor] = floors()?;
    let parent = Parent::load()?;
    let packet = eth().ip("10.0.0.1".parse()?, "10.0.0.2".parse()?).udp(40_000, 53);
    let answer = eth().ip("10.0.0.2".parse()?, "10.0.0.1".parse()?).udp(53, 40_000);
    for _ in 0..8 {
        run(&parent.from_pod, &packet, 1)?;
        run(&parent.to_pod, &answer, 1)?;
    }
    let pod = Guarded { attachment: 1, netns: guard::netns_cookie()?, slot: u32::from(SLOT) };
    let sender = Sender { mac: source(&packet.bytes())?, parent: PARENT };
    let namespace = Namespace { netns: pod.netns, parent: PARENT };
    let know = || {
        parent.namespaces.store(&namespace, &1, Put::Any)?;
        parent.senders.store(&sender, &pod, Put::Any)
    };
    let forget = || {
        parent.senders.remove(&sender)?;
        parent.namespaces.remove(&namespace)
    };
    // Another's address shows whether a frame is taken for the pod's.
    let spoofed = eth().ip("10.0.0.9".parse()?, "10.0.0.2".parse()?).udp(40_000, 53);
    know()?;
    let known = once(&parent.guard, &spoofed)?;
    forget()?;
    let unknown = once(&parent.guard, &spoofed)?;
    if (known, unknown) != (TC_ACT_SHOT, TC_ACT_UNSPEC) {
        return Err(format!("a spoofed frame of the pod met the verdict {known}, and one of nobody {unknown}").into());
    }
    let [mut bare, mut nobody, mut own, mut judged] = [const { Vec::new() }; 4];
    for _ in 0..rounds(200, 10) {
        let least = run(&nothing, &packet, BURST)?;
        let over = |program: &Program| Ok::<_, Failure>((run(program, &packet, BURST)? - least).max(0.1));
        bare.push(over(&floor)?);
        nobody.push(over(&parent.guard)?);
        know()?;
        own.push(over(&parent.from_pod)?);
        judged.push(over(&parent.guard)?);
        forget()?;
    }
    let mut summary = Summary::default();
    summary.add(Row::compare(ID, "a frame of nobody", NOBODY, &nobody, ("copy, 2 look-ups", &bare)).in_unit("ns"));
    summary.add(Row::compare(ID, "a frame of a pod", POD, &judged, ("its own device", &own)).in_unit("ns"));
    summary.write();
    Ok(())
}

/// Nanoseconds of a run; it must pass.
fn run(program: &Program, packet: &Packet, repeat: u32) -> Result<f64, Failure> {
    let run = program.test_run(&TestRun { packet: &packet.bytes(), context: &[], repeat })?;
    match run.retval.cast_signed() {
        TC_ACT_UNSPEC => Ok(run.duration.as_secs_f64() * 1e9),
        verdict => Err(format!("a packet of an allowed flow met the verdict {verdict}").into()),
    }
}

/// What becomes of a frame.
fn once(program: &Program, packet: &Packet) -> Result<i32, Failure> {
    Ok(program.test_run(&TestRun { packet: &packet.bytes(), context: &[], repeat: 1 })?.retval.cast_signed())
}

fn source(frame: &[u8]) -> Result<[u8; 6], Failure> {
    Ok(frame.get(6..12).ok_or("an Ethernet header")?.try_into()?)
}

/// A program that does nothing, and one that does what the guard cannot do without.
fn floors() -> Result<[Program; 2], Failure> {
    const KEY: i16 = -16;
    let mut object = Object::new();
    for map in guard::maps(&Sizes::default()).into_iter().take(2) {
        object.add_map(map)?;
    }
    for name in ["nothing", "floor"] {
        let mut code = Asm::program(name, ProgramKind::Classifier);
        if name == "floor" {
            code.mov(R6, R1).store(Size::Dw, R10, KEY, 0).store(Size::Dw, R10, KEY + 8, 0).mov(R2, 6).mov(R3, R10);
            code.add(R3, i32::from(KEY)).mov(R4, 6).call(Helper::SkbLoadBytes);
            for map in [NAMESPACES, SENDERS] {
                code.load_map(R1, map).mov(R2, R10).add(R2, i32::from(KEY)).call(Helper::MapLookupElem);
            }
        }
        code.ret(TC_ACT_UNSPEC);
        object.add(code.finish()?)?;
    }
    let mut loaded = AyaLoader.load(&object.to_elf()?, &LoadRequest::default())?;
    let [nothing, floor] = ["nothing", "floor"].map(|name| loaded.take_program(name).ok_or(name));
    Ok([nothing?, floor?])
}

/// A pod's programs, and the guard above it.
struct Parent {
    guard: Program,
    from_pod: Program,
    to_pod: Program,
    senders: HashTable<Sender, Guarded>,
    namespaces: HashTable<Namespace, u64>,
    /// Emptied where nobody holds it.
    _judges: ProgramArray,
}

impl Parent {
    fn load() -> Result<Self, Failure> {
        let (sizes, allow) = (Sizes::default(), AllowAll { rule: 1 });
        let spec = |slot| Spec { slot, ..Spec::new(&sizes, &allow, &allow) };
        let mut pod = load(&datapath::program(&spec(Slot::Constant(SLOT)))?, &[])?;
        let [from_pod, to_pod] = Slot::Constant(SLOT).program_names().map(|name| pod.take_program(name).ok_or(name));
        Array::new(map(&pod, abi::ENDPOINTS)?)?
            .store(u32::from(SLOT), &Endpoint::new(Some("10.0.0.1".parse()?), None, None))?;
        let mut judge = load(&datapath::program(&spec(Slot::Guarded))?, &[&pod])?;
        let mut above = load(&guard::program(&sizes)?, &[&pod])?;
        let judges = ProgramArray::new(map(&above, JUDGES)?)?;
        judges.set(u32::from(SLOT), &judge.take_program(FROM_GUARDED).ok_or(FROM_GUARDED)?)?;
        Ok(Self {
            guard: above.take_program(GUARD).ok_or(GUARD)?,
            from_pod: from_pod?,
            to_pod: to_pod?,
            senders: HashTable::new(map(&above, SENDERS)?)?,
            namespaces: HashTable::new(map(&above, NAMESPACES)?)?,
            _judges: judges,
        })
    }
}

/// Loads an object with those maps of others that it has, too.
fn load(object: &Object, others: &[&Loaded]) -> Result<Loaded, Failure> {
    let has = |name: &str| object.maps().iter().any(|map| map.name == name);
    let all = others.iter().flat_map(|other| &other.maps);
    let maps: Vec<_> = all.filter(|(name, _)| has(name)).map(|(name, map)| (name.as_str(), map.as_fd())).collect();
    Ok(AyaLoader.load(&object.to_elf()?, &LoadRequest { maps: &maps })?)
}

fn map(loaded: &Loaded, name: &str) -> Result<Map, Failure> {
    let found = loaded.maps.iter().find(|(n, _)| n == name).ok_or_else(|| format!("no map {name}"))?;
    Ok(found.1.try_clone()?)
}
