//! What a verdict costs in the kernel, by the number of rules: time over a program that judges nothing, time to load,
//! instructions.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::insn::{Cond, Imm64, Insn, IsaLevel, Reg::*, Size, encode};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::Map;
use dcenet_ebpf::object::{Object, ProgramKind};
use dcenet_ebpf::program::{Program as Loaded, TestRun};
use dcenet_policy::compiler::{Limits, Program};
use dcenet_policy::diagram::Diagram;
use dcenet_policy::ir::RuleList;
use dcenet_policy::model::Verdict;
use dcenet_policy::target::{Classifier, Form, Frame, MAX_CODE_ARMS, Policies, Target, Tc};
use dcenet_policy::test_support::bytecode;

const PORTS: u32 = 30_000;

/// Rule `r` allows TCP port `1000 + 2 (r % 30000)` from peer `r % peers`.
fn policy(direction: &str, rules: u32, peers: u32) -> Program {
    let mut text = format!("{direction} locals {}\n", peers.max(2));
    for rule in 0..rules {
        let port = 1000 + 2 * (rule % PORTS);
        text += &format!("allow {} peers {} tcp {port}-{port}\n", rule + 3, rule % peers);
    }
    text += "deny 1 default";
    let list: RuleList = text.parse().unwrap();
    let diagram = Diagram::build(&list, &Limits::default()).unwrap();
    Program { list, diagram, shadowed: Vec::new() }
}

/// A program that makes up a question that some rule answers, and has it judged unless there is no classifier. The
/// packet holds the state of a linear congruential generator, its factor and its summand.
fn load(rules: u32, peers: u32, classifier: Option<&Classifier<'_>>) -> (Loaded, Vec<Map>) {
    let mut asm = Asm::program("cost", ProgramKind::Classifier);
    asm.isa(IsaLevel::V4);
    let (short, allow, deny) = (asm.label(), asm.label(), asm.label());
    asm.load(Size::W, R6, R1, 76)
        .load(Size::W, R7, R1, 80)
        .mov(R8, R6)
        .add(R8, 32)
        .jump_if(Cond::Gt, R8, R7, short)
        .load(Size::W, R5, R6, 0)
        .load(Size::W, R4, R6, 4)
        .mul32(R5, R4)
        .load(Size::W, R4, R6, 8)
        .add32(R5, R4)
        .store(Size::W, R6, 0, R5)
        .rsh32(R5, 16)
        .mul(R5, rules as i32)
        .rsh(R5, 16)
        .mov(R3, R5)
        .rem32(R3, PORTS as i32)
        .lsh32(R3, 1)
        .add32(R3, 1000)
        .mov(R1, R5)
        .rem32(R1, peers as i32)
        .mov(R2, 6);
    let mut denies = false;
    let mut object = Object::new();
    match classifier {
        Some(classifier) => {
            classifier.write(Frame::DATAPATH, &mut asm, &mut |verdict| {
                denies |= verdict == Verdict::Deny;
                if verdict == Verdict::Allow { allow } else { deny }
            });
            if let Some(map) = classifier.map() {
                object.add_map(map).unwrap();
            }
        }
        None => {
            asm.mov(R0, R1).add(R0, R3).add(R0, R2).jump(allow);
        }
    }
    asm.bind(allow).exit();
    if denies {
        asm.bind(deny).ret(0);
    }
    asm.bind(short).ret(-1);
    object.add(asm.finish().unwrap()).unwrap();
    let linked = object.link("cost").unwrap();
    let maps: Vec<Map> = linked.maps().iter().map(|map| Map::create(map).unwrap()).collect();
    if let Some(content) = classifier.and_then(|classifier| classifier.content()) {
        bytecode::write(&maps[0], content).unwrap();
    }
    let mut code = linked.insns().to_vec();
    for insn in &mut code {
        if let Insn::LoadImm64 { value: Imm64::MapFd(map), .. } = insn {
            *map = maps[*map as usize].as_fd().as_raw_fd();
        }
    }
    let program = Loaded::load(ProgramKind::Classifier, "cost", &encode(&code));
    (program.unwrap_or_else(|error| panic!("{error}\n{}", error.log())), maps)
}

/// Time that the calling thread has had a processor, which on a busy machine is less than has passed.
fn on_cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

/// Nanoseconds of a run, the least of several bursts.
fn time(program: &Loaded, wide: bool) -> u128 {
    let mut packet = [0; 64];
    packet[..4].copy_from_slice(&0x8000_0000_u32.to_ne_bytes());
    let (factor, summand) = if wide { (1_664_525_u32, 1_013_904_223_u32) } else { (1, 0) };
    packet[4..8].copy_from_slice(&factor.to_ne_bytes());
    packet[8..12].copy_from_slice(&summand.to_ne_bytes());
    let run = TestRun { packet: &packet, context: &[], repeat: 50_000 };
    (0..12).map(|_| program.test_run(&run).unwrap().duration.as_nanos()).min().unwrap()
}

#[test]
fn a_verdict_costs_about_the_same_at_any_number_of_rules() {
    if !require(Rung::Kernel) {
        return;
    }
    println!("rules peers form  arms  code  verified  load_us (on CPU)  hot_ns  wide_ns (over an empty program)");
    for (rules, peers) in [(1, 1), (10, 4), (100, 16), (1_000, 64), (10_000, 64), (10_000, 1_024), (100_000, 64)] {
        let policy = policy("ingress", rules, peers);
        let arms = policy.diagram.stats().arms;
        let (empty, _maps) = load(rules, peers, None);
        let floor = [false, true].map(|wide| time(&empty, wide));
        for form in [Form::Code, Form::Table] {
            if form == Form::Code && arms > MAX_CODE_ARMS {
                continue;
            }
            let classifier = Classifier::new(&policy, form).unwrap();
            let start = on_cpu();
            let (program, _maps) = load(rules, peers, Some(&classifier));
            let took = on_cpu() - start;
            let [hot, wide] = [false, true].map(|wide| time(&program, wide) as i128 - floor[usize::from(wide)] as i128);
            let info = program.info();
            // Far above what is printed, as other tests run beside this one; linear code takes microseconds at 10,000 rules.
            assert!(hot < 200 && wide < 1_000, "{rules} rules as {form:?}: hot {hot} ns, wide {wide} ns");
            let size = info.translated_bytes as usize / 8;
            assert!(size < 100 + 3 * arms, "{arms} arms as {size} instructions");
            println!(
                "{rules:>6} {peers:>5} {form:?} {arms:>6} {:>6} {:>7} {:>7} {hot:>4} {wide:>4}",
                info.translated_bytes / 8,
                info.verified_instructions,
                took.as_micros(),
            );
        }
    }
}

#[test]
fn whole_programs_load_up_to_the_limits() {
    if !require(Rung::Kernel) {
        return;
    }
    let sizes = Sizes {
        conntrack: 1024,
        conntrack_new: 1024,
        members_v6: 64,
        blocks_v4: 64,
        blocks_v6: 64,
        endpoints: 8,
        ..Sizes::default()
    };
    for isa in [IsaLevel::V3, IsaLevel::V4] {
        for (rules, peers) in [(1, 1), (100, 16), (1_000, 64), (5_000, 64), (10_000, 64), (20_000, 64)] {
            let (ingress, egress) = (policy("ingress", rules, peers), policy("egress", rules, peers));
            let start = on_cpu();
            let artefact = Tc::new(sizes.clone()).isa(isa).lower(Policies { ingress: &ingress, egress: &egress });
            let artefact = artefact.unwrap();
            let lowered = on_cpu() - start;
            let elf = artefact.object.to_elf().unwrap();
            let written = on_cpu() - start;
            let loaded = AyaLoader.load(&elf, &LoadRequest::default());
            let loaded = loaded.unwrap_or_else(|error| panic!("{isa:?} {rules}: {error}\n{}", error.log()));
            let took = on_cpu() - start;
            let sizes: Vec<_> = loaded
                .programs
                .iter()
                .map(|(_, program)| (program.info().translated_bytes / 8, program.info().verified_instructions))
                .collect();
            let form = if rules < 15_000 { Form::Code } else { Form::Table };
            assert_eq!((artefact.ingress, artefact.egress), (form, form), "{rules} rules");
            for (insns, verified) in &sizes {
                // The datapath around the classifiers, and each classifier followed once.
                assert!(*verified < 40_000 + 2 * insns, "{verified} instructions verified of {insns}");
            }
            println!(
                "{isa:?} {rules} rules, {} arms: {:?}/{:?}, lowered {lowered:?}, ELF {:?}, load {:?}, (insns, verified) {sizes:?}",
                ingress.diagram.stats().arms,
                artefact.ingress,
                artefact.egress,
                written - lowered,
                took - written
            );
        }
    }
}

#[test]
fn much_sharing_over_long_code_becomes_a_table_below_isa_v4() {
    // Peers i and i + n have the same port, so that the second half jumps back over all of the first.
    let peers = 6_000;
    let mut text = format!("ingress locals {}\n", 2 * peers);
    for peer in 0..peers {
        let port = 1000 + 2 * peer;
        text += &format!("allow {} peers {peer},{} tcp {port}-{port}\n", peer + 3, peer + peers);
    }
    text += "deny 1 default";
    let list: RuleList = text.parse().unwrap();
    let limits = Limits { work: 100_000_000, ..Limits::default() };
    let diagram = Diagram::build(&list, &limits).unwrap();
    let (ingress, egress) = (Program { list, diagram, shadowed: Vec::new() }, policy("egress", 1, 1));
    for (isa, form) in [(IsaLevel::V3, Form::Table), (IsaLevel::V4, Form::Code)] {
        let target = Tc::new(Sizes::default()).isa(isa).code_arms(usize::MAX);
        let artefact = target.lower(Policies { ingress: &ingress, egress: &egress }).unwrap();
        assert_eq!(artefact.ingress, form, "{isa:?}");
    }
}
