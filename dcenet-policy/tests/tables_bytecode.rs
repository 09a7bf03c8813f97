//! Runs every file of `tests/tables/` through the whole programs, in the VM and in the kernel: packets from Ethernet up,
//! through the source's program and then the destination's, and the reply back.

#![cfg(feature = "yaml")]

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::{self, Endpoint, Flow, FlowKey, MemberV6, Sizes, Traffic};
use dcenet_ebpf::datapath::{FROM_POD, TO_POD};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loaded, Loader};
use dcenet_ebpf::maps::{Array, HashTable, Map, PerCpuArray, Plain};
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::{Program, TestRun};
use dcenet_ebpf::test_support::packet::{ACK, Packet, SYN, eth};
use dcenet_ebpf::vm::{Environment, Maps, PlantedBug, Skb, Update, Vm};
use dcenet_policy::compiler::{EndpointPlan, PolicySet, Scope};
use dcenet_policy::ir::{Leaf, RuleId};
use dcenet_policy::model::{Direction, PodId, Protocol, Tuple, Verdict};
use dcenet_policy::target::{Artefact, Cache, Policies, Target, Tc};
use dcenet_policy::test_support::bytecode;
use dcenet_policy::test_support::table::{Case, Probe, Table};
use dcenet_policy::{Compiler, Update as Compiled};

fn sizes() -> Sizes {
    Sizes {
        endpoints: 1,
        blocks_v4: 64,
        members_v6: 64,
        blocks_v6: 1,
        classes: 256,
        conntrack: 256,
        conntrack_new: 256,
        fragments: 16,
        rules: 512,
        event_bytes: 1 << 16,
        ..Sizes::default()
    }
}

/// What is in a map of the datapath: name, index, value.
type Cell = (&'static str, u32, Vec<u8>);

/// The class of every address that a case can meet, each as a single address.
fn classes(case: &Case, update: &Compiled) -> Vec<Cell> {
    let ends = case.probes.iter().flat_map(|probe| [probe.source.address, probe.destination.address]);
    let mut entries: BTreeMap<u32, u32> = BTreeMap::new();
    let mut members: BTreeMap<u32, MemberV6> = BTreeMap::new();
    let mut blocks = abi::ROOT_V4_ENTRIES / abi::BLOCK_ENTRIES;
    for address in ends {
        let class = update.table.lookup(address).0;
        match address {
            IpAddr::V4(address) => {
                let [a, b, c, d] = address.octets().map(u32::from);
                let mut at = a << 8 | b;
                for byte in [c, d] {
                    let entry = entries.entry(at).or_insert_with(|| {
                        blocks += 1;
                        abi::CHILD | (blocks - 1)
                    });
                    at = (*entry & !abi::CHILD) * abi::BLOCK_ENTRIES + byte;
                }
                entries.insert(at, class);
            }
            IpAddr::V6(address) => {
                let bits = sizes().members_v6.trailing_zeros();
                let first = abi::member_v6_place(address.to_bits(), bits);
                let mut places = (0..abi::PROBES_V6).map(|step| (first + step) % sizes().members_v6);
                let free = |place: &u32| members.get(place).is_none_or(|other| other.address == address.octets());
                let place = places.find(free).expect("a place in the table");
                members.insert(place, MemberV6 { address: address.octets(), tag: abi::MEMBER_USED | class });
            }
        }
    }
    let mut cells: BTreeMap<u32, [u32; 2]> = BTreeMap::new();
    for (entry, value) in entries {
        cells.entry(entry / 2).or_default()[entry as usize % 2] = value;
    }
    let bytes = |pair: [u32; 2]| pair.iter().flat_map(|half| half.to_ne_bytes()).collect();
    let v4 = cells.into_iter().map(|(index, pair)| (abi::CLASS_V4, index, bytes(pair)));
    let v6 = members.into_iter().map(|(place, member)| (abi::MEMBERS_V6, place, member.encode().to_vec()));
    v4.chain(v6).collect()
}

/// The ids of all classes, zero where the set has none.
fn locals(set: &PolicySet, direction: Direction) -> Vec<Cell> {
    let map = match direction {
        Direction::Ingress => abi::LOCAL_IDS_INGRESS,
        Direction::Egress => abi::LOCAL_IDS_EGRESS,
    };
    let local = |class: u32| set.locals.get(class);
    let four = |index: u32| (0..4).flat_map(|low| local(index * 4 + low).to_ne_bytes()).collect();
    (0..sizes().classes / 4).map(|index| (map, index, four(index))).collect()
}

/// One end that has a policy, as the programs see it.
struct Side<'a> {
    artefact: &'a Artefact,
    cells: Vec<Cell>,
}

impl<'a> Side<'a> {
    fn new(artefact: &'a Artefact, plan: &EndpointPlan, own: IpAddr, classes: &[Cell]) -> Self {
        let endpoint = match own {
            IpAddr::V4(own) => Endpoint::new(Some(own), None, None),
            IpAddr::V6(own) => Endpoint::new(None, Some(own), None),
        };
        let mut cells = classes.to_vec();
        cells.push((abi::ENDPOINTS, 0, endpoint.encode().to_vec()));
        for direction in Direction::ALL {
            cells.extend(locals(plan.set(direction), direction));
        }
        Self { artefact, cells }
    }
}

/// Runs packets on the programs of one endpoint that has seen none before.
trait Machine {
    fn start(&mut self, side: &Side<'_>);

    /// Whether the packet passes. The direction is the pod's.
    fn run(&mut self, direction: Direction, packet: &Packet) -> bool;

    /// How many packets a rule has judged.
    fn judged_by(&mut self, rule: RuleId) -> u64;
}

fn program_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => FROM_POD,
        Direction::Ingress => TO_POD,
    }
}

fn passes(value: u32) -> bool {
    let codes = Tc::new(sizes()).codes();
    if value.cast_signed() == codes.pass {
        return true;
    }
    assert_eq!(value.cast_signed(), codes.drop);
    false
}

#[derive(Default)]
struct InVm {
    bug: Option<PlantedBug>,
    /// By the address of the artefact.
    programs: HashMap<*const Artefact, [Vm; 2]>,
    running: Option<(*const Artefact, Maps)>,
}

impl Machine for InVm {
    fn start(&mut self, side: &Side<'_>) {
        let object = &side.artefact.object;
        let mut maps = Maps::new(object.maps());
        let own = side
            .artefact
            .contents
            .iter()
            .flat_map(|content| content.values().map(|(index, value)| (content.map.as_str(), index, value)));
        let cells = side.cells.iter().map(|(map, index, value)| (*map, *index, value.as_slice()));
        for (map, index, value) in cells.chain(own) {
            maps.get_mut(map).unwrap().update(&index.to_ne_bytes(), value, Update::Any).unwrap();
        }
        let key = std::ptr::from_ref(side.artefact);
        self.programs.entry(key).or_insert_with(|| {
            Direction::ALL.map(|direction| {
                let mut vm = Vm::new(&object.link(program_name(direction)).unwrap()).unwrap();
                if let Some(bug) = self.bug {
                    vm.plant_bug(bug);
                }
                vm
            })
        });
        self.running = Some((key, maps));
    }

    fn run(&mut self, direction: Direction, packet: &Packet) -> bool {
        let (key, maps) = self.running.as_mut().unwrap();
        let place = Direction::ALL.iter().position(|other| *other == direction).unwrap();
        let vm = &mut self.programs.get_mut(key).unwrap()[place];
        let run = vm.run(&mut Skb::new(packet.bytes()), maps, &mut Environment::default());
        passes(run.unwrap_or_else(|trap| panic!("{trap}")).value)
    }

    fn judged_by(&mut self, rule: RuleId) -> u64 {
        let (_, maps) = self.running.as_ref().unwrap();
        let bytes = maps.get(abi::RULES).unwrap().lookup(&rule.0.to_ne_bytes()).unwrap();
        Traffic::read(&bytes[..Traffic::BYTES]).packets
    }
}

/// Programs in the order of [`Direction::ALL`], and the maps that they share with no others.
type Pair = ([Program; 2], Vec<(String, Map)>);

#[derive(Default)]
struct InKernel {
    /// Shared by all programs but for those that stand in `own`.
    maps: Vec<(String, Map)>,
    programs: HashMap<*const Artefact, Pair>,
    written: Vec<(&'static str, u32)>,
    running: Option<*const Artefact>,
}

impl InKernel {
    fn map(&self, name: &str) -> Map {
        let own = self.running.iter().flat_map(|key| &self.programs[key].1);
        let (_, map) = own.chain(&self.maps).find(|(other, _)| other == name).unwrap();
        map.try_clone().unwrap()
    }

    fn store(&self, name: &str, index: u32, value: &[u8]) {
        let map = self.map(name);
        match value.len() {
            8 => Array::<[u8; 8]>::new(map).unwrap().store(index, &Plain::read(value)).unwrap(),
            24 => Array::<[u8; 24]>::new(map).unwrap().store(index, &Plain::read(value)).unwrap(),
            64 => Array::<[u8; 64]>::new(map).unwrap().store(index, &Plain::read(value)).unwrap(),
            other => panic!("values of {other} bytes in {name}"),
        }
    }
}

impl Machine for InKernel {
    fn start(&mut self, side: &Side<'_>) {
        use std::os::fd::AsFd;
        let key = std::ptr::from_ref(side.artefact);
        if !self.programs.contains_key(&key) {
            let shared: Vec<_> = self.maps.iter().map(|(name, map)| (name.as_str(), map.as_fd())).collect();
            let elf = side.artefact.object.to_elf().unwrap();
            let loaded = AyaLoader.load(&elf, &LoadRequest { maps: &shared });
            let mut loaded: Loaded = loaded.unwrap_or_else(|error| panic!("{error}\n{}", error.log()));
            let programs = Direction::ALL.map(|direction| loaded.take_program(program_name(direction)).unwrap());
            let is_own = |name: &str| side.artefact.contents.iter().any(|content| content.map == name);
            let (own, shared): (Vec<_>, Vec<_>) = loaded.maps.into_iter().partition(|(name, _)| is_own(name));
            for content in &side.artefact.contents {
                let (_, map) = own.iter().find(|(name, _)| *name == content.map).unwrap();
                bytecode::write(map, content).unwrap();
            }
            self.maps = shared;
            self.programs.insert(key, (programs, own));
        }
        self.running = Some(key);
        for (map, index) in std::mem::take(&mut self.written) {
            self.store(map, index, if map == abi::MEMBERS_V6 { &[0; 24] } else { &[0; 8] });
        }
        for (map, index, value) in &side.cells {
            self.store(map, *index, value);
            if [abi::CLASS_V4, abi::MEMBERS_V6].contains(map) {
                self.written.push((map, *index));
            }
        }
        for table in abi::FLOW_TABLES {
            let flows = HashTable::<FlowKey, Flow>::new(self.map(table)).unwrap();
            let keys: Vec<FlowKey> = flows.entries().unwrap().into_iter().map(|(key, _)| key).collect();
            flows.remove_all(&keys).unwrap();
        }
    }

    fn run(&mut self, direction: Direction, packet: &Packet) -> bool {
        let place = Direction::ALL.iter().position(|other| *other == direction).unwrap();
        let (programs, _) = &self.programs[&self.running.unwrap()];
        let run = TestRun { packet: &packet.bytes(), context: &[], repeat: 1 };
        passes(programs[place].test_run(&run).unwrap().retval)
    }

    fn judged_by(&mut self, rule: RuleId) -> u64 {
        let rules = PerCpuArray::<Traffic>::new(self.map(abi::RULES)).unwrap();
        rules.load(rule.0).unwrap().iter().map(|traffic| traffic.packets).sum()
    }
}

/// A packet that opens a connection, and what answers it; no answer where the protocol has no ports to know it by.
fn packets(probe: &Probe, protocol: Protocol, port: u16) -> (Packet, Option<Packet>) {
    let (source, destination) = (probe.source.address, probe.destination.address);
    let (there, back) = (eth().ip(source, destination), eth().ip(destination, source));
    match protocol {
        Protocol::TCP => (there.tcp(40_000, port, SYN), Some(back.tcp(port, 40_000, SYN | ACK))),
        Protocol::UDP => (there.udp(40_000, port), Some(back.udp(port, 40_000))),
        Protocol::SCTP => (there.sctp(40_000, port), Some(back.sctp(port, 40_000))),
        Protocol::ICMP | Protocol::ICMPV6 => (there.echo_request(7), Some(back.echo_reply(7))),
        Protocol(other) => (there.protocol(other).payload(40), None),
    }
}

#[derive(Debug, Default)]
struct Seen {
    cases: usize,
    probes: usize,
    runs: usize,
    allowed: usize,
    replies: usize,
    artefacts: usize,
}

/// The answer of one endpoint's programs to one question.
#[derive(Debug, PartialEq)]
struct Answer {
    pass: bool,
    /// Packets that the rule which should have decided has judged.
    judged: u64,
}

fn run_file(text: &str, target: Tc, machine: &mut dyn Machine) -> Result<Seen, String> {
    let table = Table::parse(text).map_err(|error| error.to_string())?;
    let mut compiler = Compiler::new(Scope::Cluster, table.limits);
    let (mut cache, mut seen) = (Cache::new(target), Seen::default());
    // Held, as machines know artefacts by their address.
    let mut artefacts: Vec<Arc<Artefact>> = Vec::new();
    for case in &table.cases {
        let update = compiler.update(&case.cluster).unwrap();
        compiler.release(update.generation - 1);
        let classes = classes(case, &update);
        seen.cases += 1;
        for probe in &case.probes {
            seen.probes += 1;
            let (packet, reply) = packets(probe, case.protocol, case.port);
            let mut passed = true;
            for (pod, tuple) in probe.questions(case.protocol, case.port) {
                let Some(plan) = update.endpoints.get(&pod) else { continue };
                let artefact = cache.get(plan).unwrap();
                let own = match tuple.direction {
                    Direction::Egress => probe.source.address,
                    Direction::Ingress => probe.destination.address,
                };
                let expected: Leaf = update.decide(&pod, &tuple).unwrap();
                machine.start(&Side::new(&artefact, plan, own, &classes));
                artefacts.push(artefact);
                seen.runs += 1;
                let answer = ask(machine, &tuple, &packet, expected);
                let right = Answer { pass: expected.verdict == Verdict::Allow, judged: 1 };
                if answer != right {
                    return Err(format!("line {}: {pod} {tuple:?}: {answer:?}, where {right:?} was due", case.line));
                }
                if let (true, Some(reply)) = (answer.pass, &reply) {
                    seen.replies += 1;
                    if !machine.run(opposite(tuple.direction), reply) {
                        return Err(format!("line {}: {pod} {tuple:?}: the reply is dropped", case.line));
                    }
                }
                passed &= answer.pass;
                if !passed {
                    break;
                }
            }
            seen.allowed += usize::from(passed);
            if passed != (probe.expected == Verdict::Allow) {
                return Err(format!("line {}: {probe:?}: passed: {passed}", case.line));
            }
        }
    }
    seen.artefacts = cache.len();
    Ok(seen)
}

fn ask(machine: &mut dyn Machine, tuple: &Tuple, packet: &Packet, expected: Leaf) -> Answer {
    let before = machine.judged_by(expected.rule);
    let pass = machine.run(tuple.direction, packet);
    Answer { pass, judged: machine.judged_by(expected.rule) - before }
}

fn opposite(direction: Direction) -> Direction {
    match direction {
        Direction::Ingress => Direction::Egress,
        Direction::Egress => Direction::Ingress,
    }
}

fn files() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tables");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let name = |file: &std::path::PathBuf| file.file_name().unwrap().to_string_lossy().into_owned();
    files.iter().map(|file| (name(file), std::fs::read_to_string(file).unwrap())).collect()
}

fn run_all(target: &Tc, mut machine: impl FnMut() -> Box<dyn Machine>) {
    let mut total = Seen::default();
    for (name, text) in files() {
        let seen = run_file(&text, target.clone(), &mut *machine()).unwrap_or_else(|error| panic!("{name}: {error}"));
        total.cases += seen.cases;
        total.probes += seen.probes;
        total.runs += seen.runs;
        total.allowed += seen.allowed;
        total.replies += seen.replies;
        total.artefacts += seen.artefacts;
    }
    println!("{total:?}");
    assert!(total.cases >= 280 && total.probes >= 8_500 && total.artefacts >= 120, "{total:?}");
    assert!(total.allowed * 5 > total.probes && (total.probes - total.allowed) * 8 > total.probes, "{total:?}");
}

#[test]
fn tables_hold_in_the_vm() {
    run_all(&Tc::new(sizes()), || Box::<InVm>::default());
}

#[test]
fn tables_hold_in_the_vm_with_policies_as_tables() {
    run_all(&Tc::new(sizes()).code_arms(0), || Box::<InVm>::default());
}

#[test]
fn tables_hold_in_the_kernel() {
    if require(Rung::Kernel) {
        run_all(&Tc::new(sizes()), || Box::<InKernel>::default());
    }
}

#[test]
fn policies_as_tables_hold_in_the_kernel() {
    if require(Rung::Kernel) {
        for (name, text) in files().into_iter().filter(|(name, _)| name == "ports.txt" || name == "peers.txt") {
            let seen = run_file(&text, Tc::new(sizes()).code_arms(0), &mut InKernel::default());
            let seen = seen.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(seen.runs > 100 && seen.artefacts > 5, "{name}: {seen:?}");
        }
    }
}

/// One pod that others reach on every second port from 1000 on: code beyond the reach of short jumps.
fn many_ports() -> String {
    let ports: Vec<_> = (1000..12_000).step_by(2).map(|port| format!("{{port: {port}}}")).collect();
    let mut text = format!(
        "== topology\nnamespace x\npod x/a pod=a ip=10.0.1.1\npod x/b pod=b ip=10.0.1.2\n== apply\n\
         apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{ name: p, namespace: x }}\n\
         spec: {{ podSelector: {{ matchLabels: {{ pod: a }} }}, ingress: [ {{ ports: [ {} ] }} ] }}\n",
        ports.join(", ")
    );
    for (port, verdict) in
        [(998, 'X'), (1000, '.'), (1001, 'X'), (6500, '.'), (6501, 'X'), (11_998, '.'), (12_000, 'X')]
    {
        text += &format!("== expect tcp/{port}\n      x/a\nx/b   {verdict}\n");
    }
    text
}

#[test]
fn verdicts_are_the_same_at_each_level_of_the_instruction_set() {
    if !require(Rung::Kernel) {
        return;
    }
    let features = Features::probe().unwrap();
    let mut older = features;
    older.isa_v4 = false;
    // A rule for each port.
    let sizes = Sizes { rules: 8192, ..sizes() };
    let targets = [older, features].map(|features| Tc::for_kernel(sizes.clone(), &features));
    let text = many_ports();
    let table = Table::parse(&text).unwrap();
    let update = Compiler::new(Scope::Cluster, table.limits).update(&table.cases[0].cluster).unwrap();
    let plan = &update.endpoints[&PodId::new("x", "a")];
    let policies = Policies { ingress: &plan.ingress.program, egress: &plan.egress.program };
    let [v3, v4] = targets.clone().map(|target| target.lower(policies).unwrap().object.to_elf().unwrap());
    assert_eq!(v3 != v4, features.isa_v4, "the levels differ in the code, or there is nothing to compare");
    for target in targets {
        let isa = target.isa;
        let seen = run_file(&text, target.clone(), &mut InKernel::default());
        let seen = seen.unwrap_or_else(|error| panic!("{isa:?}: {error}"));
        assert_eq!((seen.cases, seen.probes, seen.allowed), (7, 7, 3), "{isa:?}: {seen:?}");
        let (_, text) = files().into_iter().find(|(name, _)| name == "ports.txt").unwrap();
        run_file(&text, target, &mut InKernel::default()).unwrap_or_else(|error| panic!("{isa:?}: {error}"));
    }
}

#[test]
fn a_wrong_vm_is_caught() {
    let (_, text) = &files()[0];
    let mut machine = InVm { bug: Some(PlantedBug::UnsignedCompare), ..InVm::default() };
    let message = run_file(text, Tc::new(sizes()), &mut machine).expect_err("a wrong VM must not pass");
    assert!(message.contains("was due"), "{message}");
}
