//! `verdict`: what it takes to find a flow's verdict, by BPF_PROG_TEST_RUN in bursts, over a program that draws the same questions
//! out of an array and answers none: from the peer's address to its class, to the policy set's local id, and through the
//! classifier. *Hot* are 2,048 questions over and over, about one peer of each group, which caches and branch prediction learn;
//! *wide* are 262,144 about all of 16,384 peers, which they cannot.
//!
//! Beside it in the same rounds, for IPv4: code that compares rule after rule; the kernel's trie of prefixes and a hash table of
//! class, protocol and port. And the deployed programs, with everything around the verdict. Also writes
//! `verdict.svg` beside the summary. Needs root.
//!
//! The bounds were set beforehand, in nanoseconds over the empty program.

use std::net::IpAddr;

use dcenet_benches::policies::{Random, addresses, allowed, by_group, one_subject, policy, subject};
use dcenet_benches::{Row, Sample, Summary, plot, rounds, say, target};
use dcenet_ebpf::abi::{self, Endpoint, Sizes, local_ids_element};
use dcenet_ebpf::asm::{Asm, Function};
use dcenet_ebpf::datapath::alone::{self, ALLOW, Judge, QUESTIONS, Question};
use dcenet_ebpf::datapath::classes::Classes;
use dcenet_ebpf::datapath::{self, EmitClassifier, Exits, Spec};
use dcenet_ebpf::insn::{Cond, Helper, IsaLevel, Reg::*, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loaded, Loader};
use dcenet_ebpf::maps::{Array, HashTable, LpmKey, Map, PrefixTable, Put};
use dcenet_ebpf::object::MapSpec;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::{Program, TestRun};
use dcenet_ebpf::test_support::packet::{ACK, Packet, SYN, eth};
use dcenet_policy::compiler::{Limits, Scope};
use dcenet_policy::model::{Direction, Protocol, Tuple, Verdict};
use dcenet_policy::target::{Classifier, Form, MAX_CODE_ARMS, MAX_TABLE_NODES};
use dcenet_policy::{Compiler, Update};

const ID: &str = "verdict";
const PEERS: usize = 16_384;
const HOT: u32 = 2048;
const WIDE: u32 = 1 << 18;
/// Rules, groups of peers, and the most nanoseconds for IPv4: hot, wide.
const SIZES: [(usize, usize, [f64; 2]); 6] = [
    (1, 1, [9.0, 15.0]),
    (10, 4, [10.0, 17.0]),
    (100, 16, [12.0, 26.0]),
    (1_000, 64, [16.0, 40.0]),
    (10_000, 1_024, [26.0, 75.0]),
    (100_000, 1_024, [55.0, 150.0]),
];
/// What IPv6 may take more: hot, wide.
const IPV6: [f64; 2] = [15.0, 60.0];
const HEATS: [(&str, u32); 2] = [("hot", HOT), ("wide", WIDE)];
/// The kernel refuses more: "the sequence of 8193 jumps is too complex".
const LINEAR: usize = 1_000;
/// A tenth of comparing 1,000 rules.
const OVER_LINEAR: f64 = 0.1;
/// Half of the kernel's maps.
const OVER_MAPS: f64 = 0.5;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let isa = Features::probe()?.isa().max(IsaLevel::V3);
    let sizes = Sizes::default();
    let most = rounds(100_000, 1_000);
    let mut summary = Summary::default();
    let mut lines: Vec<plot::Line> = Vec::new();
    let mut points = |name: String, rules: usize, value: f64| match lines.iter_mut().find(|line| line.0 == name) {
        Some(line) => line.1.push((rules as f64, value)),
        None => lines.push((name, vec![(rules as f64, value)])),
    };
    for (rules, groups, bounds) in SIZES.into_iter().filter(|size| size.0 <= most) {
        let mut case = Case::new(&sizes, isa, rules, groups)?;
        case.check()?;
        for _ in 0..rounds(30, 3) {
            case.round()?;
        }
        for (version, more) in [("IPv4", [0.0; 2]), ("IPv6", IPV6)] {
            for (at, (heat, _)) in HEATS.iter().enumerate() {
                let ours = &case.find(version, "ours").ok_or("ours is always there")?[at];
                let bound = bounds[at] + more[at];
                let name = format!("{version}, {rules} rules, {heat}");
                let peer = format!("{bound} ns");
                summary.add(Row::compare(ID, &name, 1.0, ours, (&peer, &vec![bound; ours.len()])).in_unit("ns"));
                points(format!("ours, {version}, {heat}"), rules, Sample::new(ours.clone()).median());
            }
        }
        for (who, from, goal) in [("linear code", LINEAR, OVER_LINEAR), ("LPM trie and hash", 1, OVER_MAPS)] {
            for (at, (heat, _)) in HEATS.iter().enumerate() {
                let Some(theirs) = case.find("IPv4", who).map(|times| &times[at]) else { continue };
                let ours = &case.find("IPv4", "ours").ok_or("ours is always there")?[at];
                let name = format!("IPv4, {rules} rules, {heat}");
                if rules >= from {
                    summary.add(Row::compare(ID, &name, goal, ours, (who, theirs)).in_unit("ns"));
                }
                points(format!("{who}, {heat}"), rules, Sample::new(theirs.clone()).median());
            }
        }
        say(format_args!("{ID}: {rules} rules: {}", case.deployed(&sizes, isa)?));
    }
    std::fs::create_dir_all(target().join("bench"))?;
    let title = "Verdict over an empty program, by the number of rules";
    std::fs::write(target().join("bench/verdict.svg"), plot::svg(title, ["rules", "nanoseconds"], &lines))?;
    summary.write();
    Ok(())
}

/// One size of policy, with everybody who judges it.
struct Case {
    rules: usize,
    groups: usize,
    update: Update,
    /// By family.
    nothing: [Alone; 2],
    judges: Vec<Judged>,
}

/// A judge, by its family and name.
struct Judged {
    family: usize,
    who: &'static str,
    alone: Alone,
    /// By heat, a value for each round.
    times: [Vec<f64>; 2],
}

const VERSIONS: [&str; 2] = ["IPv4", "IPv6"];

impl Case {
    fn new(sizes: &Sizes, isa: IsaLevel, rules: usize, groups: usize) -> Result<Self, Failure> {
        let mut cluster = one_subject(PEERS, groups);
        cluster.insert_policy(policy(by_group(rules, groups)));
        let limits = Limits { arms: MAX_TABLE_NODES, ..Limits::default() };
        let update = Compiler::new(Scope::Cluster, limits).update(&cluster)?;
        let set = &update.endpoints[&subject()].ingress;
        let arms = set.program.diagram.stats().arms;
        let form = if arms <= MAX_CODE_ARMS { Form::Code } else { Form::Table };
        let classifier = Classifier::new(&set.program, form)?;
        let ours = Ours { function: classifier.function(isa)?, map: classifier.map() };
        say(format_args!("{ID}: {rules} rules: {arms} arms as {form:?}, {} classes, {PEERS} peers", update.classes));
        let questions = [questions(rules, groups, 0), questions(rules, groups, 1)];
        let load = |family: usize, judge: Judge<'_>| Alone::load(sizes, isa, judge, &questions[family]);
        let nothing = [load(0, Judge::Nobody)?, load(1, Judge::Nobody)?];
        let mut judges = Vec::new();
        for family in 0..VERSIONS.len() {
            let alone = load(family, Judge::Classes(&ours))?;
            fill(sizes, &alone.loaded, &update)?;
            if let Some(content) = classifier.content() {
                let map = map(&alone.loaded, &content.map)?;
                for (index, value) in content.values() {
                    map.update(&index.to_ne_bytes(), value, Put::Any)?;
                }
            }
            judges.push(Judged { family, who: "ours", alone, times: Default::default() });
        }
        if rules <= LINEAR {
            let alone = load(0, Judge::Address(&Linear { rules, groups }))?;
            judges.push(Judged { family: 0, who: "linear code", alone, times: Default::default() });
        }
        let alone = load(0, Judge::Address(&KernelMaps { rules }))?;
        KernelMaps::fill(&alone.loaded, rules, groups)?;
        judges.push(Judged { family: 0, who: "LPM trie and hash", alone, times: Default::default() });
        Ok(Self { rules, groups, update, nothing, judges })
    }

    /// That everybody answers what the compiled policy says, also about what no rule allows.
    fn check(&self) -> Result<(), Failure> {
        for Judged { family, who, alone, .. } in &self.judges {
            let questions = questions(self.rules, self.groups, *family);
            for at in (0..HOT).step_by(97).chain((HOT..WIDE).step_by(9973)) {
                let Question { peer, protocol, port } = questions[at as usize];
                let tuple = Tuple::ingress(peer, Protocol(protocol), port);
                let leaf = self.update.decide(&subject(), &tuple).ok_or("the subject is an endpoint")?;
                if leaf.verdict != Verdict::Allow {
                    return Err(format!("{tuple:?} is allowed by a rule, and compiled to {leaf:?}").into());
                }
                let answer = alone.ask(at)?;
                let is_right = answer & ALLOW != 0 && (*who != "ours" || answer & !ALLOW == leaf.rule.0);
                if !is_right {
                    return Err(format!("{who}, {} rules, {tuple:?}: {answer:#x}, not {leaf:?}", self.rules).into());
                }
            }
            let array = Array::new(map(&alone.loaded, QUESTIONS)?)?;
            array.store(0, &Question { port: 999, ..questions[0] })?;
            let denied = alone.ask(0)?;
            array.store(0, &questions[0])?;
            if denied & ALLOW != 0 {
                return Err(format!("{who}, {} rules: a port that no rule has is allowed", self.rules).into());
            }
        }
        Ok(())
    }

    fn round(&mut self) -> Result<(), Failure> {
        for (at, (_, count)) in HEATS.into_iter().enumerate() {
            let nothing = [self.nothing[0].burst(count)?, self.nothing[1].burst(count)?];
            for Judged { family, alone, times, .. } in &mut self.judges {
                times[at].push((alone.burst(count)? - nothing[*family]).max(0.1));
            }
        }
        Ok(())
    }

    fn find(&self, version: &str, who: &str) -> Option<&[Vec<f64>; 2]> {
        let judged = self.judges.iter().find(|judged| VERSIONS[judged.family] == version && judged.who == who);
        judged.map(|judged| &judged.times)
    }

    /// What the whole programs take: a packet of a flow that is known, and one that no rule allows.
    fn deployed(&self, sizes: &Sizes, isa: IsaLevel) -> Result<String, Failure> {
        let set = &self.update.endpoints[&subject()].ingress;
        if set.program.diagram.stats().arms > MAX_CODE_ARMS {
            return Ok("deployed as a table, not measured".to_owned());
        }
        let classifier = Classifier::new(&set.program, Form::Code)?;
        let ours = Ours { function: classifier.function(isa)?, map: None };
        let allow = datapath::AllowAll { rule: 1 };
        let object = datapath::program(&Spec { isa, ..Spec::new(sizes, &allow, &ours) })?;
        let mut loaded = AyaLoader.load(&object.to_elf()?, &LoadRequest::default())?;
        let [from_pod, to_pod] = [datapath::FROM_POD, datapath::TO_POD].map(|n| loaded.take_program(n).ok_or(n));
        let (from_pod, to_pod) = (from_pod?, to_pod?);
        fill(sizes, &loaded, &self.update)?;
        let (own, own_v6) = ("192.0.2.1".parse()?, "2001:db8::1".parse()?);
        Array::new(map(&loaded, abi::ENDPOINTS)?)?.store(0, &Endpoint::new(Some(own), Some(own_v6), None))?;
        let (group, port) = allowed(self.rules / 2, self.groups);
        let (own, peer) = (IpAddr::V4(own), addresses(group)[0]);
        let run = |program: &Program, packet: &Packet, repeat| {
            program.test_run(&TestRun { packet: &packet.bytes(), context: &[], repeat })
        };
        let there = |flags| eth().ip(peer, own).tcp(40_000, port, flags);
        let answer = eth().ip(own, peer).tcp(port, 40_000, SYN | ACK);
        run(&to_pod, &there(SYN), 1)?;
        run(&from_pod, &answer, 1)?;
        let known = there(ACK);
        for _ in 0..8 {
            run(&to_pod, &known, 1)?;
            run(&from_pod, &eth().ip(own, peer).tcp(port, 40_000, ACK), 1)?;
        }
        let denied = eth().ip(peer, own).tcp(40_001, 999, SYN);
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..rounds(100, 5) {
            let nothing = self.nothing[0].burst(HOT)?;
            for (times, (packet, verdict)) in times.iter_mut().zip([(&known, -1), (&denied, 2)]) {
                let outcome = run(&to_pod, packet, 4000)?;
                if outcome.retval.cast_signed() != verdict {
                    return Err(format!("a packet met the verdict {}, not {verdict}", outcome.retval).into());
                }
                times.push(outcome.duration.as_secs_f64() * 1e9 - nothing);
            }
        }
        let [known, denied] = times.map(|times| Sample::new(times).median());
        Ok(format!("deployed: {known:.0} ns for a known flow, {denied:.0} ns for what is denied"))
    }
}

/// Questions that rules allow: at first those that are asked again and again, then those about all peers.
fn questions(rules: usize, groups: usize, family: usize) -> Vec<Question> {
    let mut random = Random::new(3);
    let question = |at: u32| {
        let (group, port) = allowed(random.below(rules), groups);
        let member = if at < HOT { 0 } else { random.below(PEERS / groups) };
        let peer = addresses(group + groups * member)[family];
        Question { peer, protocol: Protocol::TCP.0, port }
    };
    (0..WIDE).map(question).collect()
}

/// A loaded program that is asked.
struct Alone {
    program: Program,
    loaded: Loaded,
}

impl Alone {
    fn load(sizes: &Sizes, isa: IsaLevel, judge: Judge<'_>, questions: &[Question]) -> Result<Self, Failure> {
        let object = alone::program(sizes, WIDE, judge, isa)?;
        let mut loaded = AyaLoader.load(&object.to_elf()?, &LoadRequest::default())?;
        let program = loaded.take_program(alone::NAME).ok_or("the program just loaded")?;
        Array::new(map(&loaded, QUESTIONS)?)?.store_all(0, questions)?;
        Ok(Self { program, loaded })
    }

    fn ask(&self, question: u32) -> Result<u32, Failure> {
        let run = TestRun { packet: &packet(question, WIDE), context: &[], repeat: 1 };
        Ok(self.program.test_run(&run)?.retval)
    }

    /// Nanoseconds for one of the first questions, so many.
    fn burst(&self, questions: u32) -> Result<f64, Failure> {
        let repeat = questions.max(20_000);
        let run = TestRun { packet: &packet(0, questions), context: &[], repeat };
        Ok(self.program.test_run(&run)?.duration.as_secs_f64() * 1e9)
    }
}

fn packet(first: u32, questions: u32) -> [u8; 64] {
    let mut packet = [0; 64];
    packet[..4].copy_from_slice(&first.to_ne_bytes());
    packet[4..8].copy_from_slice(&(questions - 1).to_ne_bytes());
    packet
}

/// Writes the class tables, and the local ids of the subject's ingress policy.
fn fill(sizes: &Sizes, loaded: &Loaded, update: &Update) -> Result<(), Failure> {
    let exact = update.table.exact().iter().map(|(address, class)| ((*address).into(), Some(class.0)));
    let prefixes = update.table.prefixes().iter().map(|(prefix, class)| (*prefix, Some(class.0)));
    for write in Classes::new(sizes).apply(&exact.chain(prefixes).collect::<Vec<_>>())? {
        map(loaded, write.map())?.update(&write.index().to_ne_bytes(), &write.value(), Put::Any)?;
    }
    let locals = &update.endpoints[&subject()].set(Direction::Ingress).locals;
    let classes = locals.last().map_or(0, |last| last + 1);
    let mut elements = vec![0u64; classes.div_ceil(4) as usize];
    for class in 0..classes {
        let (element, shift) = local_ids_element(class);
        elements[element as usize] |= u64::from(locals.get(class)) << shift;
    }
    Array::new(map(loaded, abi::LOCAL_IDS_INGRESS)?)?.store_all(0, &elements)?;
    Ok(())
}

fn map(loaded: &Loaded, name: &str) -> Result<Map, Failure> {
    let found = loaded.maps.iter().find(|(n, _)| n == name).ok_or_else(|| format!("no map {name}"))?;
    Ok(found.1.try_clone()?)
}

/// The classifier as it is deployed: a function that the program calls.
struct Ours {
    function: Function,
    map: Option<MapSpec>,
}

impl EmitClassifier for Ours {
    fn emit(&self, asm: &mut Asm, exits: &Exits) {
        asm.call_function(self.function.name())
            .mov(R4, Exits::RULE)
            .and32(Exits::RULE, i32::MAX)
            .jump_if32(Cond::Slt, R4, 0, exits.allow())
            .jump(exits.deny());
    }

    fn maps(&self) -> Vec<MapSpec> {
        self.map.iter().cloned().collect()
    }

    fn functions(&self) -> Vec<Function> {
        vec![self.function.clone()]
    }
}

/// Rule after rule: the peer under a mask, protocol, port. Groups are a power of two, so that a mask says the same as a label.
struct Linear {
    rules: usize,
    groups: usize,
}

impl EmitClassifier for Linear {
    fn emit(&self, asm: &mut Asm, exits: &Exits) {
        for rule in 0..self.rules {
            let (group, port) = allowed(rule, self.groups);
            let next = asm.label();
            asm.mov(R4, Exits::LOCAL_ID)
                .and(R4, self.groups as i32 - 1)
                .jump_if(Cond::Ne, R4, group as i32, next)
                .jump_if(Cond::Ne, Exits::PROTOCOL, i32::from(Protocol::TCP.0), next)
                .jump_if(Cond::Ne, Exits::VALUE, i32::from(port), next)
                .mov32(R0, rule as i32)
                .jump(exits.allow())
                .bind(next);
        }
        asm.mov32(R0, 0).jump(exits.deny());
    }
}

/// The kernel's trie from the peer to its group, and its hash table from group, protocol and port to the rule.
struct KernelMaps {
    rules: usize,
}

impl KernelMaps {
    const TRIE: &str = "peers_trie";
    const RULES: &str = "rules_hash";

    fn fill(loaded: &Loaded, rules: usize, groups: usize) -> Result<(), Failure> {
        let trie = PrefixTable::<4, u32>::new(map(loaded, Self::TRIE)?)?;
        for peer in 0..PEERS {
            let IpAddr::V4(address) = addresses(peer)[0] else { return Err("the first address is of IPv4".into()) };
            trie.store(&LpmKey { prefix_len: 32, data: address.octets() }, &((peer % groups) as u32), Put::Any)?;
        }
        let hash = HashTable::<[u32; 3], u32>::new(map(loaded, Self::RULES)?)?;
        for rule in 0..rules {
            let (group, port) = allowed(rule, groups);
            hash.store(&[group as u32, u32::from(Protocol::TCP.0), port.into()], &(rule as u32), Put::Any)?;
        }
        Ok(())
    }
}

impl EmitClassifier for KernelMaps {
    fn emit(&self, asm: &mut Asm, exits: &Exits) {
        let (trie, hash) = (Exits::STACK.end - 8, Exits::STACK.end - 24);
        let miss = asm.label();
        asm.mov(R7, Exits::PROTOCOL)
            .mov(R8, Exits::VALUE)
            .be(dcenet_ebpf::insn::SwapWidth::W32, R1)
            .store(Size::W, R10, trie + 4, R1)
            .mov(R1, 32)
            .store(Size::W, R10, trie, R1)
            .load_map(R1, Self::TRIE)
            .mov(R2, R10)
            .add(R2, i32::from(trie))
            .call(Helper::MapLookupElem)
            .jump_if(Cond::Eq, R0, 0, miss)
            .load(Size::W, R1, R0, 0)
            .store(Size::W, R10, hash, R1)
            .store(Size::W, R10, hash + 4, R7)
            .store(Size::W, R10, hash + 8, R8)
            .load_map(R1, Self::RULES)
            .mov(R2, R10)
            .add(R2, i32::from(hash))
            .call(Helper::MapLookupElem)
            .jump_if(Cond::Eq, R0, 0, miss)
            .load(Size::W, R0, R0, 0)
            .jump(exits.allow())
            .bind(miss)
            .mov32(R0, 0)
            .jump(exits.deny());
    }

    fn maps(&self) -> Vec<MapSpec> {
        vec![MapSpec::lpm_trie(Self::TRIE, 4, 4, PEERS as u32), MapSpec::hash(Self::RULES, 12, 4, self.rules as u32)]
    }
}
