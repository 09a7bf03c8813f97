//! An endpoint in slot 0, which is what a test run sees unless the programs hold another, with small maps of its own.
//!
//! To verify the programs takes most of a test's time where the processor is emulated, so what one test has done with is
//! kept for the next that wants the same, its maps as they were at first.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::sync::{LazyLock, Mutex, PoisonError};

use dcenet_core::test_support::effort;
use dcenet_ebpf::abi::{
    self, Direction, Endpoint, Event, EventLimit, Flow, FlowKey, Fragment, FragmentKey, FullTable, Reason, Sizes,
    Traffic, reason_index,
};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::datapath::{self, EmitClassifier, Exits, Slot, Spec};
use dcenet_ebpf::insn::Cond;
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loaded, Loader};
use dcenet_ebpf::maps::{Array, HashTable, Map, PerCpuArray, Plain, Put, RingBuffer};
use dcenet_ebpf::object::Object;
use dcenet_ebpf::program::{Program, TestRun};
use dcenet_ebpf::test_support::packet::Packet;
use dcenet_ebpf::vm::{Environment, Maps, PlantedBug, Skb, Update, Vlan, Vm};

pub const POD4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub const PEER4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
pub const ROUTER4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
pub const PEER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
pub const ROUTER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
pub const POD_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x11);

/// Both versions: the pod's address and the peer's.
pub const VERSIONS: [(IpAddr, IpAddr); 2] =
    [(IpAddr::V4(POD4), IpAddr::V4(PEER4)), (IpAddr::V6(POD6), IpAddr::V6(PEER6))];

pub use Direction::{Egress, Ingress};

/// Why a packet had its verdict: [`None`] for a packet of a known flow, which passes and is counted there.
pub type Why = Option<Reason>;

pub struct Pod {
    kept: Kept,
    slot: u32,
    twin: RefCell<Twin>,
    /// By what another test finds its programs: none where their maps are others' too, or are not put back.
    again: Cell<Option<Vec<u8>>>,
}

/// Programs and their maps.
#[derive(Default)]
struct Kept {
    programs: Option<[Program; 2]>,
    loaded: Loaded,
}

/// What nobody uses now, by the object it was loaded from.
static UNUSED: LazyLock<Mutex<HashMap<Vec<u8>, Vec<Kept>>>> = LazyLock::new(Mutex::default);

impl Kept {
    fn map(&self, name: &str) -> Map {
        let (_, map) = self.loaded.maps.iter().find(|(n, _)| n == name).unwrap();
        map.try_clone().unwrap()
    }

    fn has(&self, name: &str) -> bool {
        self.loaded.maps.iter().any(|(n, _)| n == name)
    }

    /// Puts back the maps that programs write to, and the endpoints.
    fn clear(&self) {
        let endpoints = Array::<Endpoint>::new(self.map(abi::ENDPOINTS)).unwrap();
        (0..endpoints.entries()).for_each(|slot| endpoints.store(slot, &Endpoint::default()).unwrap());
        for name in abi::FLOW_TABLES.into_iter().filter(|name| self.has(name)) {
            empty(&HashTable::<FlowKey, Flow>::new(self.map(name)).unwrap());
        }
        if self.has(abi::FRAGMENTS) {
            empty(&HashTable::<FragmentKey, Fragment>::new(self.map(abi::FRAGMENTS)).unwrap());
        }
        for name in [abi::REASONS, abi::RULES].into_iter().filter(|name| self.has(name)) {
            let counters = PerCpuArray::<Traffic>::new(self.map(name)).unwrap();
            (0..counters.entries()).for_each(|i| counters.store(i, &Traffic::default()).unwrap());
        }
        if self.has(abi::EVENT_LIMITS) {
            let limits = Array::<EventLimit>::new(self.map(abi::EVENT_LIMITS)).unwrap();
            (0..limits.entries()).for_each(|slot| limits.store(slot, &EventLimit::default()).unwrap());
        }
        if self.has(abi::REJECTS) {
            let rejects = Array::<u64>::new(self.map(abi::REJECTS)).unwrap();
            (0..rejects.entries()).for_each(|place| rejects.store(place, &0).unwrap());
        }
        if self.has(abi::EVENTS) {
            RingBuffer::new(self.map(abi::EVENTS)).unwrap().drain(usize::MAX, |_| ()).unwrap();
        }
    }
}

fn empty<K: Plain, V: Plain>(table: &HashTable<K, V>) {
    for (key, _) in table.entries().unwrap() {
        table.remove(&key).unwrap();
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(elf) = self.again.take()
            && !std::thread::panicking()
        {
            let kept = std::mem::take(&mut self.kept);
            UNUSED.lock().unwrap_or_else(PoisonError::into_inner).entry(elf).or_default().push(kept);
        }
    }
}

/// The same programs in the VM, which must come to the same verdicts and flows.
struct Twin {
    object: Object,
    machine: Option<Machine>,
    /// Off where a test has put something into maps that are not copied before each packet.
    on: bool,
}

struct Machine {
    from_pod: Vm,
    to_pod: Vm,
    maps: Maps,
}

impl Machine {
    fn new(object: &Object) -> Self {
        let vm = |name| Vm::new(&object.link(name).unwrap()).unwrap();
        let [from_pod, to_pod] = names(object).map(vm);
        Self { from_pod, to_pod, maps: Maps::new(object.maps()) }
    }
}

/// The names of an object's programs, which tell where they learn their slot.
fn names(object: &Object) -> [&'static str; 2] {
    let has = |names: &[&str; 2]| object.functions().iter().any(|f| f.name() == names[0]);
    [Slot::Class, Slot::Nobody].map(Slot::program_names).into_iter().find(has).unwrap()
}

pub fn small() -> Sizes {
    Sizes {
        endpoints: 8,
        blocks_v4: 64,
        members_v6: 64,
        blocks_v6: 64,
        classes: 256,
        conntrack: 1024,
        conntrack_new: 1024,
        full_table: FullTable::Evict,
        fragments: 64,
        rules: 64,
        event_bytes: 1 << 16,
    }
}

/// The endpoint that most tests use: a trunk, so that tags are passed over.
pub fn endpoint() -> Endpoint {
    Endpoint::new(Some(POD4), Some(POD6), Some(POD_LINK_LOCAL)).as_trunk()
}

impl Pod {
    pub fn new(egress: &dyn EmitClassifier, ingress: &dyn EmitClassifier) -> Self {
        Self::with(&Spec::new(&small(), egress, ingress))
    }

    pub fn with(spec: &Spec<'_>) -> Self {
        let mut pod = Self::load(&datapath::program(spec).unwrap(), &[]);
        if let Slot::Constant(slot) = spec.slot {
            pod.set_endpoint(&Endpoint::default());
            pod.slot = slot.into();
            pod.set_endpoint(&endpoint());
        }
        pod
    }

    /// Another of the same maps, in a slot of its own.
    pub fn beside(&self, slot: u16, object: &Object) -> Self {
        let used: Vec<&str> = object.maps().iter().map(|m| m.name.as_str()).collect();
        let shared: Vec<&Map> =
            self.kept.loaded.maps.iter().filter(|(name, _)| used.contains(&name.as_str())).map(|(_, m)| m).collect();
        self.again.set(None);
        let mut other = Self::load(object, &shared);
        other.slot = slot.into();
        other
    }

    pub fn load(object: &Object, shared: &[&Map]) -> Self {
        let elf = object.to_elf().unwrap();
        let unused = shared.is_empty().then(|| take_unused(&elf)).flatten();
        let kept = unused.unwrap_or_else(|| load(&elf, shared));
        let again = Cell::new(shared.is_empty().then_some(elf));
        // The VM is the same on every kernel, and slow where the processor is emulated.
        let twin = Twin { object: object.clone(), machine: None, on: effort(false, true, true) };
        let pod = Self { kept, slot: 0, twin: RefCell::new(twin), again };
        if shared.is_empty() {
            pod.set_endpoint(&endpoint());
        }
        pod
    }

    /// Other programs over the same maps.
    pub fn replace(&mut self, egress: &dyn EmitClassifier, ingress: &dyn EmitClassifier) {
        let object = datapath::program(&Spec::new(&small(), egress, ingress)).unwrap();
        let shared: Vec<&Map> = self.kept.loaded.maps.iter().map(|(_, m)| m).collect();
        let on = self.twin.borrow().on;
        let other = Self::load(&object, &shared);
        self.again.set(None);
        *self = other;
        self.twin.borrow_mut().on = on;
    }

    pub fn program(&self, direction: Direction) -> &Program {
        let [from_pod, to_pod] = self.kept.programs.as_ref().unwrap();
        match direction {
            Egress => from_pod,
            Ingress => to_pod,
        }
    }

    pub fn map(&self, name: &str) -> Map {
        self.kept.map(name)
    }

    pub fn array<V: Plain>(&self, name: &str) -> Array<V> {
        Array::new(self.map(name)).unwrap()
    }

    pub fn set_endpoint(&self, endpoint: &Endpoint) {
        self.array(abi::ENDPOINTS).store(self.slot, endpoint).unwrap();
    }

    pub fn bump(&self, egress: u32, ingress: u32) {
        let endpoints = self.array::<Endpoint>(abi::ENDPOINTS);
        let mut endpoint = endpoints.load(self.slot).unwrap();
        endpoint.generation_egress += egress;
        endpoint.generation_ingress += ingress;
        endpoints.store(self.slot, &endpoint).unwrap();
    }

    pub fn flows(&self) -> Flows {
        Flows { settled: self.table(abi::CONNTRACK), begun: self.table(abi::CONNTRACK_NEW) }
    }

    fn table(&self, name: &str) -> HashTable<FlowKey, Flow> {
        HashTable::new(self.map(name)).unwrap()
    }

    /// The only flow that there is.
    pub fn flow(&self) -> (FlowKey, Flow) {
        let mut flows = self.flows().entries();
        assert_eq!(flows.len(), 1, "{flows:?}");
        flows.remove(0)
    }

    pub fn set_flow(&self, change: impl FnOnce(&mut Flow)) {
        let (key, mut flow) = self.flow();
        change(&mut flow);
        // Whoever turns its time back must have the clock asked.
        flow.tick = 0;
        self.flows().replace(&key, &flow);
    }

    pub fn limit(&self) -> EventLimit {
        self.array::<EventLimit>(abi::EVENT_LIMITS).load(self.slot).unwrap()
    }

    pub fn rule(&self, rule: u32) -> Traffic {
        sum(&PerCpuArray::new(self.map(abi::RULES)).unwrap().load(rule).unwrap())
    }

    /// The root of the trie leads all of `a.b.0.0/16` to a class.
    pub fn class_v4(&self, a: u8, b: u8, class: u32) {
        self.without_twin();
        let root = self.array::<[u32; 2]>(abi::CLASS_V4);
        let entry = u32::from(a) << 8 | u32::from(b);
        let mut pair = root.load(entry / 2).unwrap();
        pair[entry as usize % 2] = class;
        root.store(entry / 2, &pair).unwrap();
    }

    pub fn local_id(&self, class: u32, local: u16) {
        self.without_twin();
        for map in [abi::LOCAL_IDS_EGRESS, abi::LOCAL_IDS_INGRESS] {
            let ids = self.array::<[u16; 4]>(map);
            let mut four = ids.load(class / 4).unwrap();
            four[class as usize % 4] = local;
            ids.store(class / 4, &four).unwrap();
        }
    }

    pub fn events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        let mut ring = RingBuffer::new(self.map(abi::EVENTS)).unwrap();
        ring.drain(usize::MAX, |bytes| events.push(Event::decode(bytes).unwrap())).unwrap();
        events
    }

    /// How many packets of a direction had their verdict for a reason.
    pub fn reason(&self, reason: Reason, direction: Direction) -> u64 {
        self.reasons()[reason_index(reason, direction) as usize].packets
    }

    fn reasons(&self) -> Vec<Traffic> {
        let reasons = PerCpuArray::<Traffic>::new(self.map(abi::REASONS)).unwrap();
        (0..reasons.entries()).map(|i| sum(&reasons.load(i).unwrap())).collect()
    }

    /// Runs a frame and tells why it had its verdict, having checked that just that was counted.
    pub fn run_bytes(&self, direction: Direction, frame: &[u8]) -> Why {
        let twin = self.run_twin(direction, frame);
        let before = self.reasons();
        let run = TestRun { packet: frame, context: &[], repeat: 1 };
        let verdict = self.program(direction).test_run(&run).unwrap().retval.cast_signed();
        if let Some((expected, flows)) = twin {
            assert_eq!(verdict, expected, "the VM differs from the kernel");
            for (name, flows) in abi::FLOW_TABLES.into_iter().zip(flows) {
                assert_eq!(timeless(self.raw(name)), timeless(flows), "{name}: the VM differs from the kernel");
            }
        }
        let after = self.reasons();
        let moved: Vec<usize> = (0..before.len()).filter(|&i| before[i] != after[i]).collect();
        let Some(&index) = moved.first() else {
            assert_eq!(verdict, TC_ACT_UNSPEC, "a verdict that nothing counted");
            return None;
        };
        let reason = Reason::from_number((index / 2) as u8).unwrap();
        assert_eq!(moved, [reason_index(reason, direction) as usize], "{reason:?}");
        assert_eq!(after[index].packets - before[index].packets, 1);
        assert_eq!(after[index].bytes - before[index].bytes, frame.len() as u64);
        assert_eq!(verdict, if reason.passes() { TC_ACT_UNSPEC } else { TC_ACT_SHOT }, "{reason:?}");
        Some(reason)
    }

    /// Makes the VM err.
    pub fn plant_bug(&self, bug: PlantedBug) {
        let mut twin = self.twin.borrow_mut();
        let Twin { object, machine, .. } = &mut *twin;
        let machine = machine.get_or_insert_with(|| Machine::new(object));
        machine.from_pod.plant_bug(bug);
        machine.to_pod.plant_bug(bug);
    }

    /// How many instructions of a program the VM has run, and how many there are; nothing where no VM runs.
    pub fn coverage(&self, direction: Direction) -> Option<(usize, usize)> {
        let twin = self.twin.borrow();
        let machine = twin.machine.as_ref()?;
        let (vm, name) = match direction {
            Egress => (&machine.from_pod, names(&twin.object)[0]),
            Ingress => (&machine.to_pod, names(&twin.object)[1]),
        };
        let all = twin.object.link(name).unwrap().insns().len();
        Some((all - vm.missed().count(), all))
    }

    pub fn without_twin(&self) {
        self.twin.borrow_mut().on = false;
        self.again.set(None);
    }

    /// The VM's verdict on the frame with a tag of VLAN 5 beside it, which no test run takes (net/bpf/test_run.c,
    /// `convert___skb_to_skb`).
    pub fn run_beside(&self, direction: Direction, frame: &[u8]) -> i32 {
        let vlan = Some(Vlan { tci: 5, proto: 0x8100 });
        self.run_skb(direction, &mut Skb { vlan, ..Skb::new(frame) }).0
    }

    fn run_twin(&self, direction: Direction, frame: &[u8]) -> Option<(i32, [Entries; 2])> {
        let on = self.twin.borrow().on;
        on.then(|| self.run_skb(direction, &mut Skb::new(frame)))
    }

    /// Runs the frame in the VM on copies of the maps: the verdict and the flows afterwards.
    fn run_skb(&self, direction: Direction, skb: &mut Skb) -> (i32, [Entries; 2]) {
        let mut twin = self.twin.borrow_mut();
        let Twin { object, machine, .. } = &mut *twin;
        let Machine { from_pod, to_pod, maps } = machine.get_or_insert_with(|| Machine::new(object));
        let endpoint = self.array::<Endpoint>(abi::ENDPOINTS).load(self.slot).unwrap().encode();
        maps.get_mut(abi::ENDPOINTS).unwrap().update(&self.slot.to_ne_bytes(), &endpoint, Update::Any).unwrap();
        for name in [abi::CONNTRACK, abi::CONNTRACK_NEW, abi::FRAGMENTS] {
            let Some(map) = maps.get_mut(name) else { continue };
            let old: Vec<Vec<u8>> = map.entries().map(|(key, _)| key.to_vec()).collect();
            old.iter().for_each(|key| map.delete(key).unwrap());
            for (key, value) in self.raw(name) {
                map.update(&key, &value, Update::Any).unwrap();
            }
        }
        let mut env = Environment { coarse_ns: uptime_ns(), ..Environment::default() };
        let vm = if direction == Egress { from_pod } else { to_pod };
        let run = vm.run(skb, maps, &mut env).unwrap_or_else(|trap| panic!("{trap}"));
        let flows = abi::FLOW_TABLES.map(|name| {
            let entries = maps.get(name).into_iter().flat_map(|m| m.entries());
            entries.map(|(k, v)| (k.to_vec(), v.to_vec())).collect()
        });
        (run.value.cast_signed(), flows)
    }

    /// A map's entries in bytes.
    fn raw(&self, name: &str) -> Entries {
        if !self.kept.has(name) {
            return Entries::new();
        }
        match name {
            abi::CONNTRACK | abi::CONNTRACK_NEW => {
                let entries = self.table(name).entries().unwrap();
                entries.iter().map(|(k, v)| (k.encode().to_vec(), v.encode().to_vec())).collect()
            }
            _ => {
                let fragments = HashTable::<FragmentKey, Fragment>::new(self.map(name)).unwrap();
                let entries = fragments.entries().unwrap();
                entries.iter().map(|(k, v)| (k.encode().to_vec(), v.encode().to_vec())).collect()
            }
        }
    }

    pub fn run(&self, direction: Direction, packet: &Packet) -> Why {
        self.run_bytes(direction, &packet.bytes())
    }

    /// A packet between the pod and the peer, in a direction.
    #[track_caller]
    pub fn expect(&self, direction: Direction, packet: &Packet, why: Why) {
        assert_eq!(self.run(direction, packet), why, "{direction:?} {packet:?}");
    }
}

fn take_unused(elf: &[u8]) -> Option<Kept> {
    let kept = UNUSED.lock().unwrap_or_else(PoisonError::into_inner).get_mut(elf)?.pop()?;
    kept.clear();
    Some(kept)
}

fn load(elf: &[u8], shared: &[&Map]) -> Kept {
    let names: Vec<String> = shared.iter().map(|m| m.info().name.clone()).collect();
    let maps: Vec<_> = names.iter().zip(shared).map(|(n, m)| (n.as_str(), m.as_fd())).collect();
    let mut loaded = match AyaLoader.load(elf, &LoadRequest { maps: &maps }) {
        Ok(loaded) => loaded,
        Err(error) => panic!("{error}\n{}", error.log()),
    };
    let both = [Slot::Class, Slot::Nobody].map(Slot::program_names);
    let programs = [0, 1].map(|n| both.iter().find_map(|names| loaded.take_program(names[n])).unwrap());
    Kept { programs: Some(programs), loaded }
}

/// The clock of the programs, to a hundredth of a second.
pub fn uptime_ns() -> u64 {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    let seconds: f64 = uptime.split_whitespace().next().unwrap().parse().unwrap();
    (seconds * 1e9) as u64
}

/// The flows of both maps.
pub struct Flows {
    pub settled: HashTable<FlowKey, Flow>,
    pub begun: HashTable<FlowKey, Flow>,
}

impl Flows {
    pub fn entries(&self) -> Vec<(FlowKey, Flow)> {
        [&self.settled, &self.begun].into_iter().flat_map(|table| table.entries().unwrap()).collect()
    }

    pub fn load(&self, key: &FlowKey) -> Option<Flow> {
        self.settled.load(key).unwrap().or_else(|| self.begun.load(key).unwrap())
    }

    /// Where it is.
    fn replace(&self, key: &FlowKey, flow: &Flow) {
        let settled = self.settled.load(key).unwrap().is_some();
        let table = if settled { &self.settled } else { &self.begun };
        table.store(key, flow, Put::Any).unwrap();
    }
}

/// Flows without their time of the last packet: the clocks differ by a tick.
fn timeless(flows: Entries) -> Entries {
    let without = |value: Vec<u8>| Flow { last_seen: 0, tick: 0, ..Flow::decode(&value).unwrap() }.encode().to_vec();
    flows.into_iter().map(|(key, value)| (key, without(value))).collect()
}

/// Keys and values.
type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

/// Addresses in the order of a packet of this direction.
pub fn way(direction: Direction, (pod, peer): (IpAddr, IpAddr)) -> (IpAddr, IpAddr) {
    match direction {
        Egress => (pod, peer),
        Ingress => (peer, pod),
    }
}

fn sum(of: &[Traffic]) -> Traffic {
    of.iter().fold(Traffic::default(), |a, b| Traffic { packets: a.packets + b.packets, bytes: a.bytes + b.bytes })
}

/// Allows what is listed by (local id, protocol, port or ICMP type and code), with its place in the list as the rule;
/// denies the rest by rule 63.
pub struct List(pub Vec<(u16, u8, u16)>);

impl EmitClassifier for List {
    fn emit(&self, asm: &mut Asm, exits: &Exits) {
        for (rule, (local, protocol, value)) in self.0.iter().enumerate() {
            let next = asm.label();
            asm.jump_if(Cond::Ne, Exits::LOCAL_ID, i32::from(*local), next)
                .jump_if(Cond::Ne, Exits::PROTOCOL, i32::from(*protocol), next)
                .jump_if(Cond::Ne, Exits::VALUE, i32::from(*value), next)
                .mov32(Exits::RULE, rule as i32)
                .jump(exits.allow())
                .bind(next);
        }
        asm.mov32(Exits::RULE, 63).jump(exits.deny());
    }
}

pub const TC_ACT_UNSPEC: i32 = -1;
pub const TC_ACT_SHOT: i32 = 2;
