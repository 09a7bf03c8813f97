//! Evaluator, diagram, bytecode in the VM and bytecode in the kernel give the same verdict and rule, and the comparison
//! notices when one of them errs.

use std::collections::BTreeMap;
use std::error::Error;
use std::ops::Range;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::insn::IsaLevel;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::vm::PlantedBug;
use dcenet_policy::Compiler;
use dcenet_policy::compiler::{PolicySet, SetId};
use dcenet_policy::target::{Classifier, Form, LoweringBug};
use dcenet_policy::test_support::bytecode::{self, InKernel, InVm, Question};
use dcenet_policy::test_support::{Rng, Tally, cluster, compare, tuples};

/// How to run a comparison.
#[derive(Debug, Clone, Copy)]
struct Setup {
    form: Form,
    isa: IsaLevel,
    kernel: bool,
    lowering_bug: Option<LoweringBug>,
    vm_bug: Option<PlantedBug>,
}

impl Setup {
    fn vm(form: Form) -> Self {
        Self { form, isa: IsaLevel::V3, kernel: false, lowering_bug: None, vm_bug: None }
    }

    fn kernel(form: Form) -> Self {
        Self { kernel: true, ..Self::vm(form) }
    }
}

struct Judges {
    vm: InVm,
    kernel: Option<InKernel>,
}

impl Judges {
    fn new(set: &PolicySet, setup: &Setup) -> Result<Self, Box<dyn Error>> {
        let mut classifier = Classifier::new(&set.program, setup.form)?;
        if let Some(bug) = setup.lowering_bug {
            classifier = classifier.with_planted_bug(bug);
        }
        let object = bytecode::program(&classifier, setup.isa)?;
        let mut vm = InVm::new(&object, classifier.content())?;
        if let Some(bug) = setup.vm_bug {
            vm.plant_bug(bug);
        }
        let kernel = if setup.kernel { Some(InKernel::new(&object, classifier.content())?) } else { None };
        Ok(Self { vm, kernel })
    }

    /// Both give what the diagram gives.
    fn check(&mut self, set: &PolicySet, question: Question) -> Result<(), Box<dyn Error>> {
        let Question { local, protocol, port } = question;
        let expected = set.program.diagram.decide(local, dcenet_policy::model::Protocol(protocol), port);
        let found = self.vm.decide(question)?;
        if found != expected {
            return Err(format!("{question:?}: the diagram says {expected:?}, the VM {found:?}").into());
        }
        if let Some(kernel) = &self.kernel {
            let found = kernel.decide(question)?;
            if found != expected {
                return Err(format!("{question:?}: the diagram says {expected:?}, the kernel {found:?}").into());
            }
        }
        Ok(())
    }
}

/// What a comparison saw.
#[derive(Debug, Default)]
struct Seen {
    programs: usize,
    /// Of which the evaluator is the oracle.
    pairs: usize,
    by_rule: usize,
    allowed: usize,
    /// Of which the diagram is the oracle: both sides of every comparison.
    edges: usize,
}

/// For each seed a cluster, random packets, and all edges of every diagram.
fn compare_all(seeds: Range<u64>, packets: usize, setup: &Setup) -> Result<Seen, Box<dyn Error>> {
    let mut seen = Seen::default();
    for seed in seeds {
        let mut rng = Rng::new(seed);
        let cluster = cluster(&mut rng);
        let update = Compiler::default().update(&cluster)?;
        let at = |error: Box<dyn Error>| format!("seed {seed}: {error}");
        let mut judges: BTreeMap<SetId, Judges> = BTreeMap::new();
        for (id, set) in update.sets() {
            let mut judge = Judges::new(set, setup).map_err(at)?;
            let edges = bytecode::edges(&set.program.diagram);
            seen.edges += edges.len();
            edges.into_iter().try_for_each(|question| judge.check(set, question)).map_err(at)?;
            let missed = judge.vm.missed();
            // A table's code has ways that only a table not written takes; its nodes are met at the edges.
            if setup.form == Form::Code && missed != 0 {
                return Err(format!("seed {seed}: no edge reached {missed} instructions of {id:?}").into());
            }
            seen.programs += 1;
            judges.insert(id, judge);
        }
        let questions = tuples(&mut rng, &cluster, packets);
        let mut tally = Tally::default();
        compare(&cluster, &update, questions.iter().cloned(), &mut tally)?;
        for (pod, tuple) in &questions {
            let Some(plan) = update.endpoints.get(pod) else { continue };
            let set = plan.set(tuple.direction);
            let local = set.local(update.table.lookup(tuple.peer));
            let question = Question { local, protocol: tuple.protocol.0, port: tuple.port };
            judges.get_mut(&set.id).ok_or("a set without a program")?.check(set, question).map_err(at)?;
        }
        seen.pairs += tally.pairs;
        seen.by_rule += tally.by_rule;
        seen.allowed += tally.allowed;
    }
    Ok(seen)
}

fn soak() -> u64 {
    if std::env::var_os("DCENET_SOAK").is_some() { 10 } else { 1 }
}

#[test]
fn evaluator_and_vm_agree_on_a_million_packets() {
    let (mut pairs, mut by_rule) = (0, 0);
    for (seeds, form) in [(0..1_500, Form::Code), (1_500..2_000, Form::Table)] {
        let seen = compare_all(seeds.start * soak()..seeds.end * soak(), 500, &Setup::vm(form)).unwrap();
        let denied = seen.pairs - seen.allowed;
        assert!(seen.allowed * 5 > seen.pairs && denied * 5 > seen.pairs, "{seen:?}");
        pairs += seen.pairs;
        by_rule += seen.by_rule;
    }
    assert!(pairs >= 1_000_000, "{pairs} compared");
    assert!(by_rule * 2 >= pairs, "decided by a rule: {by_rule} of {pairs}");
}

#[test]
fn evaluator_vm_and_kernel_agree() {
    if !require(Rung::Kernel) {
        return;
    }
    let v4 = Features::probe().unwrap().isa_v4;
    let high = Setup { isa: if v4 { IsaLevel::V4 } else { IsaLevel::V3 }, ..Setup::kernel(Form::Code) };
    let (mut programs, mut pairs, mut by_rule) = (0, 0, 0);
    for (seeds, setup) in [
        (10_000..10_100, Setup::kernel(Form::Code)),
        (20_000..20_040, high),
        (30_000..30_060, Setup::kernel(Form::Table)),
    ] {
        let seeds = seeds.start..seeds.start + (seeds.end - seeds.start) * soak();
        let seen = compare_all(seeds, 5_100, &setup).unwrap();
        programs += seen.programs;
        pairs += seen.pairs;
        by_rule += seen.by_rule;
    }
    assert!(programs >= 1_000 && pairs >= 1_000_000, "{programs} programs, {pairs} pairs");
    assert!(by_rule * 2 >= pairs, "decided by a rule: {by_rule} of {pairs}");
}

#[test]
fn a_wrong_lowering_is_caught() {
    for bug in [LoweringBug::OffByOne, LoweringBug::Exchanged, LoweringBug::Narrow] {
        let setup = Setup { lowering_bug: Some(bug), ..Setup::vm(Form::Code) };
        let message = compare_all(0..100, 100, &setup).expect_err("a wrong lowering must not pass").to_string();
        assert!(message.contains("the diagram says"), "{bug:?}: {message}");
    }
}

#[test]
fn a_wrong_vm_is_caught() {
    let setup = Setup { vm_bug: Some(PlantedBug::UnsignedCompare), ..Setup::vm(Form::Table) };
    let message = compare_all(0..100, 100, &setup).expect_err("a wrong VM must not pass").to_string();
    assert!(message.contains("the VM Leaf"), "{message}");
}
