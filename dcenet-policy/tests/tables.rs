//! Runs every file of `tests/tables/` through evaluator and compiler.

#![cfg(feature = "yaml")]

use std::path::Path;

use dcenet_policy::compiler::Scope;
use dcenet_policy::model::Verdict;
use dcenet_policy::test_support::refused;
use dcenet_policy::test_support::table::Table;
use dcenet_policy::{Compiler, eval};

#[test]
fn tables_hold_in_evaluator_and_compiler() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tables");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let (mut cases, mut verdicts, mut failures) = (0, 0, Vec::new());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let table = Table::parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        // One compiler for the whole file: its steps are updates.
        let mut compiler = Compiler::new(Scope::Cluster, table.limits.clone());
        for case in &table.cases {
            cases += 1;
            let update = compiler.update(&case.cluster).unwrap();
            compiler.release(update.generation - 1);
            assert_eq!(refused(&update), case.refused, "{name}:{}", case.line);
            for probe in &case.probes {
                verdicts += 1;
                let questions = probe.questions(case.protocol, case.port);
                let evaluated = questions
                    .iter()
                    .map(|(pod, tuple)| eval::evaluate_without(&case.cluster, &case.refused, pod, tuple).unwrap());
                let reasons: Vec<String> = evaluated.clone().map(|decision| decision.to_string()).collect();
                let evaluated = evaluated.map(|decision| decision.verdict).max().unwrap_or(Verdict::Allow);
                let compiled = questions.iter().filter_map(|(pod, tuple)| update.decide(pod, tuple));
                let compiled = compiled.map(|leaf| leaf.verdict).max().unwrap_or(Verdict::Allow);
                if (evaluated, compiled) != (probe.expected, probe.expected) {
                    failures.push(format!(
                        "{name}:{}: {} ({}) to {} ({}): expected {}, evaluator {evaluated}, compiler {compiled}; {}",
                        case.line,
                        probe.source.name,
                        probe.source.address,
                        probe.destination.name,
                        probe.destination.address,
                        probe.expected,
                        reasons.join("; ")
                    ));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(cases >= 280 && verdicts >= 8_500, "only {cases} matrices with {verdicts} verdicts were run");
}

#[test]
fn a_wrong_expectation_is_noticed() {
    let text = "== topology\npod x/a ip=10.0.0.1\npod x/b ip=10.0.0.2\n== expect tcp/80\n  x/a x/b\nx/a - X\n";
    let case = &Table::parse(text).unwrap().cases[0];
    let [(pod, tuple), _] = &case.probes[0].questions(case.protocol, case.port)[..] else { panic!("two questions") };
    assert_ne!(eval::evaluate(&case.cluster, pod, tuple).unwrap().verdict, case.probes[0].expected);
}

#[test]
fn unreadable_tables_are_refused_with_the_line() {
    let message = |text: &str| Table::parse(text).unwrap_err().to_string();
    assert_eq!(message("x"), "line 1: must come after a `== ` line");
    let two = "== topology\npod x/a ip=10.0.0.1\npod x/b ip=fd00::1\n== expect tcp/80\n  x/a x/b\n";
    assert_eq!(message(&format!("{two}x/a - .\n")), "line 6: x/a and x/b share no address family for this probe");
    assert_eq!(message(&format!("{two}x/a . -\n")), "line 6: traffic to oneself must be -");
    assert_eq!(message(&format!("{two}x/a -\n")), "line 6: 1 cells for 2 columns");
    assert_eq!(message("== expect tcp/x\n"), "line 1: must be like tcp/80");
}
