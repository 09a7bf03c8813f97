//! The example `reach` on directories of Kubernetes objects, with expectations written by hand.

#![cfg(feature = "yaml")]

#[path = "../examples/reach/cli.rs"]
mod cli;
#[path = "reach/input.rs"]
mod input;
#[path = "reach/objects.rs"]
mod objects;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use dcenet_core::test_support::effort;
use dcenet_policy::Compiler;
use dcenet_policy::compiler::{Limits, Scope};
use dcenet_policy::model::{Cluster, Pod, PodId, Verdict};
use dcenet_policy::reach::{Evaluator, Family, Probe, ReachError, Simulator, reach};
use dcenet_policy::sources::kubernetes::Documents;
use dcenet_policy::sources::{SourceError, networkpolicy};
use dcenet_policy::test_support::{self, PlantedBug, Rng};
use serde_json::Value;

/// What the command did: exit status, stdout, stderr.
fn run(arguments: &[&str]) -> (u8, String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let arguments = ["reach"].iter().chain(arguments).map(Into::into);
    let status = cli::run(arguments, &mut out, &mut err);
    (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reach").join(name)
}

fn folders(name: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(folder(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// A new directory with the given files.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    directory
}

/// The error for one file called `a.yaml`, without the directory's name.
fn refusal(text: &str) -> String {
    let directory = directory(&[("a.yaml", text)]);
    let (status, out, err) = run(&["--resources", directory.path().to_str().unwrap(), "--probe", "tcp/80"]);
    assert_eq!((status, out.as_str()), (2, ""), "{err}");
    err.replace(&format!("{}/", directory.path().display()), "").trim_end().to_owned()
}

/// Probe, family, source, destination.
type Key = (String, String, String, String);

/// What `expected.txt` says: `== PROBE [FAMILY]` before a matrix, `== why` before lines of reasons. `.` is allowed, `X`
/// denied, `-` not answered.
#[derive(Debug, Default)]
struct Expected {
    probes: BTreeSet<String>,
    cells: BTreeMap<Key, char>,
    all_allowed: BTreeSet<String>,
    why: Vec<(String, String)>,
}

fn expected(text: &str) -> Expected {
    let mut expected = Expected::default();
    let (mut probe, mut family, mut header) = (String::new(), String::new(), Vec::new());
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match &words[..] {
            ["==", of, rest @ ..] => {
                (probe, family, header) = ((*of).to_owned(), (*rest.first().unwrap_or(&"ipv4")).to_owned(), Vec::new());
                if *of != "why" {
                    expected.probes.insert(probe.clone());
                }
            }
            ["all", "allowed"] => drop(expected.all_allowed.insert(probe.clone())),
            _ if probe == "why" => {
                let (what, why) = line.split_once(": ").unwrap();
                expected.why.push((what.to_owned(), why.to_owned()));
            }
            columns if header.is_empty() => header = columns.iter().map(|name| (*name).to_owned()).collect(),
            [row, cells @ ..] => {
                assert_eq!(cells.len(), header.len(), "{line}");
                for (column, cell) in header.iter().zip(cells) {
                    let key = (probe.clone(), family.clone(), (*row).to_owned(), column.clone());
                    expected.cells.insert(key, cell.chars().next().unwrap());
                }
            }
            [] => {}
        }
    }
    expected
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no {key} in {value}"))
}

/// Runs a scenario by one engine, and returns the report and what differs from the expectations.
fn judge(resources: &Path, expected: &Expected, engine: &str) -> (Value, usize, Vec<String>) {
    let mut arguments = vec!["--resources", resources.to_str().unwrap(), "--engine", engine, "-o", "json"];
    for probe in &expected.probes {
        arguments.extend(["--probe", probe]);
    }
    let (status, out, err) = run(&arguments);
    assert_eq!(status, 0, "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&report["version"], &report["engine"]), (&1.into(), &engine.into()));
    let mut failures = Vec::new();
    let mut cells = expected.cells.clone();
    let mut compared = 0;
    let mut unmatched: BTreeSet<&str> = expected.why.iter().map(|(what, _)| what.as_str()).collect();
    for answer in report["results"].as_array().unwrap() {
        let key: Key = ["probe", "family", "source", "destination"].map(|key| text(answer, key).to_owned()).into();
        let [egress, ingress, verdict] =
            [&answer["egress"]["verdict"], &answer["ingress"]["verdict"], &answer["verdict"]]
                .map(|v| v.as_str().unwrap());
        assert_eq!(verdict == "allow", egress == "allow" && ingress == "allow", "{answer}");
        let wanted = match cells.remove(&key) {
            None if expected.all_allowed.contains(&key.0) => '.',
            None => '-',
            Some(cell) => cell,
        };
        compared += 1;
        if wanted != if verdict == "allow" { '.' } else { 'X' } {
            failures.push(format!("{key:?}: expected {wanted}, found {verdict}"));
        }
        let name = format!("{} {} {}", key.0, key.2, key.3);
        let why = format!("egress {}; ingress {}", text(&answer["egress"], "text"), text(&answer["ingress"], "text"));
        unmatched.remove(name.as_str());
        for (_, wanted) in expected.why.iter().filter(|(what, _)| *what == name) {
            compared += 1;
            if why != *wanted {
                failures.push(format!("{name}: expected {wanted}, found {why}"));
            }
        }
    }
    failures.extend(unmatched.into_iter().map(|what| format!("why {what}: no answer")));
    failures.extend(cells.into_iter().filter(|(_, cell)| *cell != '-').map(|(key, _)| format!("{key:?}: no answer")));
    (report, compared, failures)
}

/// Both engines; their reports must be the same but for the name.
fn judge_both(resources: &Path, expected: &Expected) -> usize {
    let (mut of_evaluator, compared, failures) = judge(resources, expected, "evaluator");
    assert!(failures.is_empty(), "{}, evaluator: {}", resources.display(), failures.join("\n"));
    let (of_vm, _, failures) = judge(resources, expected, "vm");
    assert!(failures.is_empty(), "{}, vm: {}", resources.display(), failures.join("\n"));
    of_evaluator["engine"] = "vm".into();
    assert!(of_evaluator == of_vm, "{}: the reports differ", resources.display());
    compared
}

/// The cluster of three times three pods, together with one scenario.
fn scenario(folder_of: &Path) -> (tempfile::TempDir, Expected) {
    let joined = tempfile::tempdir().unwrap();
    for (name, from) in [("cluster", &folder("cluster")), ("policies", &folder_of.to_owned())] {
        std::fs::create_dir(joined.path().join(name)).unwrap();
        for file in std::fs::read_dir(from).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), joined.path().join(name).join(file.file_name())).unwrap();
        }
    }
    (joined, expected(&std::fs::read_to_string(folder_of.join("expected.txt")).unwrap()))
}

#[test]
fn scenarios_hold_in_both_engines() {
    let (mut scenarios, mut compared, mut denied) = (0, 0, 0);
    for folder_of in folders("scenarios") {
        let (resources, expected) = scenario(&folder_of);
        assert!(!expected.probes.is_empty(), "{}", folder_of.display());
        compared += judge_both(resources.path(), &expected);
        denied += expected.cells.values().filter(|cell| **cell == 'X').count();
        scenarios += 1;
    }
    assert!(scenarios >= 12 && compared > 1_500 && denied > 200, "{scenarios} scenarios, {compared}, {denied} denied");
}

#[test]
fn dual_stack_host_network_and_a_dump_hold_in_both_engines() {
    for folder_of in folders("worlds") {
        let expected = expected(&std::fs::read_to_string(folder_of.join("expected.txt")).unwrap());
        assert!(judge_both(&folder_of, &expected) > 10, "{}", folder_of.display());
    }
}

#[test]
fn a_wrong_expectation_is_noticed() {
    let (resources, mut expected) = scenario(&folder("scenarios/deny-all"));
    let key: Key = ["tcp/80", "ipv4", "x/b", "x/a"].map(str::to_owned).into();
    assert_eq!(expected.cells.insert(key, '.'), Some('X'));
    expected.why[0].1.push('!');
    expected.why.push(("tcp/80 x/b x/nobody".to_owned(), expected.why[0].1.clone()));
    for engine in ["evaluator", "vm"] {
        let (_, _, failures) = judge(resources.path(), &expected, engine);
        assert_eq!(failures.len(), 3, "{failures:?}");
    }
}

/// How many answers the engines were compared on and how many of them deny, or the first cluster on which they differ.
fn compare_engines(seeds: u64, bug: Option<PlantedBug>) -> Result<(usize, usize), u64> {
    let probes: Vec<Probe> = ["tcp/80", "udp/81", "tcp/443", "tcp/8080", "sctp/web", "udp/dns", "icmp"]
        .iter()
        .map(|probe| probe.parse().unwrap())
        .collect();
    let (mut compared, mut denied) = (0, 0);
    for seed in 0..seeds {
        let cluster = test_support::cluster(&mut Rng::new(seed));
        let mut compiler = match bug {
            Some(bug) => Compiler::default().with_planted_bug(bug),
            None => Compiler::default(),
        };
        let evaluated = reach(&cluster, &probes, &mut Evaluator::new(&cluster)).unwrap();
        let mut simulator = Simulator::compiled_by(&mut compiler, &cluster).unwrap();
        let simulated = reach(&cluster, &probes, &mut simulator).unwrap();
        if evaluated.results != simulated.results || evaluated.not_asked != simulated.not_asked {
            return Err(seed);
        }
        compared += evaluated.results.len();
        denied += evaluated.results.iter().filter(|answer| answer.verdict.as_str() == "deny").count();
    }
    Ok((compared, denied))
}

#[test]
fn engines_agree_on_random_clusters() {
    let seeds = effort(10, 60, 600);
    let (compared, denied) = compare_engines(seeds, None).unwrap_or_else(|seed| panic!("seed {seed}"));
    assert!(compared > 100 * seeds as usize && denied * 4 > compared, "{compared} compared, {denied} denied");
}

#[test]
fn engines_that_differ_are_noticed() {
    for bug in [PlantedBug::EndPortExclusive, PlantedBug::ExceptIgnored, PlantedBug::PassIgnored] {
        assert!(compare_engines(200, Some(bug)).is_err(), "{bug:?}");
    }
}

#[test]
fn a_dump_is_told_what_takes_no_part() {
    let resources = folder("worlds/kubectl-dump");
    let (status, out, err) = run(&["--resources", resources.to_str().unwrap(), "--probe", "tcp/5432"]);
    assert_eq!(status, 0);
    assert_eq!(
        err,
        "reach: pod shop/migrate-x7k2p is left out: it is finished\n\
         reach: pod shop/web-pending is left out: it has no address; set status.podIP\n\
         reach: namespace monitoring is not given: it has no label but its name\n\
         reach: not used: apps/v1 ReplicaSet (1)\n"
    );
    assert_eq!(
        out.lines().next().unwrap(),
        "tcp/5432 monitoring/prometheus-0 -> monitoring/prometheus-0 (10.244.1.9 -> 10.244.1.9): allow; \
         egress allow: both ends are the same pod; ingress allow: both ends are the same pod"
    );
    assert_eq!(
        out.lines().nth(1).unwrap(),
        "tcp/5432 monitoring/prometheus-0 -> shop/db-0 (10.244.1.9 -> 10.244.2.7): deny; \
         egress allow: no policy selects it; ingress deny: isolated by shop/db; no rule matches"
    );
    assert_eq!(out.lines().count(), 9);
}

#[test]
fn the_json_has_the_documented_shape() {
    let (resources, _) = scenario(&folder("scenarios/named-port"));
    let (status, out, _) =
        run(&["--resources", resources.path().to_str().unwrap(), "--probe", "tcp/serve-81-tcp", "--output", "json"]);
    assert_eq!(status, 0);
    let report: Value = serde_json::from_str(&out).unwrap();
    let find = |source: &str, destination: &str| {
        let of = |answer: &&Value| answer["source"] == source && answer["destination"] == destination;
        report["results"].as_array().unwrap().iter().find(of).unwrap().clone()
    };
    assert_eq!(
        find("z/c", "y/b"),
        serde_json::json!({
            "probe": "tcp/serve-81-tcp", "source": "z/c", "destination": "y/b", "family": "ipv4",
            "source_address": "10.0.3.3", "destination_address": "10.0.2.2", "protocol": "tcp", "port": 81,
            "egress": { "verdict": "allow", "decided_by": "rule", "policy": "z/named-out", "rule": 0, "peer": 0,
                        "rule_port": 0, "text": "z/named-out egress[0] to[0] ports[0]" },
            "ingress": { "verdict": "allow", "decided_by": "no-policy", "text": "no policy selects it" },
            "verdict": "allow",
        })
    );
    assert_eq!(
        find("x/b", "x/a")["ingress"],
        serde_json::json!({ "verdict": "deny", "decided_by": "isolation", "policies": ["x/named"],
                            "text": "isolated by x/named; no rule matches" })
    );
    assert_eq!(report["not_asked"], serde_json::json!([]));
}

#[test]
fn pairs_that_cannot_be_asked_are_told() {
    let resources = folder("worlds/dual-stack");
    let (status, out, _) = run(&["--resources", resources.to_str().unwrap(), "--probe", "udp/dns", "-o", "json"]);
    assert_eq!(status, 0);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["results"], serde_json::json!([]));
    assert_eq!(report["not_asked"].as_array().unwrap().len(), 25);
    assert_eq!(report["not_asked"][0]["reason"], "shop/both gives no udp port the name \"dns\"");
    let (_, out, _) = run(&["--resources", resources.to_str().unwrap(), "--probe", "icmp"]);
    assert!(out.contains("icmp shop/six -> shop/four: not asked: they have no address family in common\n"), "{out}");
}

#[test]
fn files_of_all_kinds_are_read_and_hidden_ones_are_not() {
    let pod = |name: &str, address: &str| {
        format!(
            r#"{{"apiVersion": "v1", "kind": "Pod", "metadata": {{"name": "{name}"}}, "status": {{"podIP": "{address}"}}}}"#
        )
    };
    let directory = directory(&[
        ("z.yaml", &format!("# Nothing but a comment.\n---\n---\n{}\n---\n", pod("a", "10.0.0.1"))),
        ("deep/er/b.yml", &format!("\u{feff}{}", pod("b", "10.0.0.2"))),
        ("c.json", &format!("\u{feff}{}", pod("c", "10.0.0.3"))),
        ("README.md", "no object"),
        (".hidden.yaml", "no object"),
        (".git/config.yaml", "no object"),
    ]);
    let (status, out, err) = run(&["--resources", directory.path().to_str().unwrap(), "--probe", "sctp/9"]);
    assert_eq!(status, 0, "{err}");
    assert_eq!(out.lines().count(), 9);
    assert_eq!(err, "reach: namespace default is not given: it has no label but its name\n");
    let file = directory.path().join("z.yaml");
    let (status, out, _) = run(&["--resources", file.to_str().unwrap(), "--probe", "sctp/9"]);
    assert_eq!((status, out.lines().count()), (0, 1));
}

#[test]
fn usage_is_checked() {
    let (status, out, err) = run(&["--help"]);
    assert_eq!((status, err.as_str()), (0, ""));
    for word in ["--resources", "--probe", "--engine", "evaluator", "vm", "--output", "json"] {
        assert!(out.contains(word), "{word}: {out}");
    }
    let empty = tempfile::tempdir().unwrap();
    let empty = empty.path().to_str().unwrap();
    for (arguments, message) in [
        (&[][..], "--resources"),
        (&["--resources", empty], "--probe"),
        (&["--resources", empty, "--probe", "tcp/99999"], "ports are 1 to 65535; write tcp/80"),
        (&["--resources", empty, "--probe", "tcp/80", "--engine", "kernel"], "possible values: evaluator, vm"),
        (&["--resources", empty, "--probe", "tcp/80", "-o", "xml"], "possible values: text, json"),
        (&["--resources", empty, "--probe", "tcp/80"], "no file .yaml, .yml or .json is here"),
        (&["--resources", "/nonexistent/reach", "--probe", "tcp/80"], "/nonexistent/reach: No such file"),
    ] {
        let (status, out, err) = run(arguments);
        assert_eq!((status, out.as_str()), (2, ""), "{arguments:?}");
        assert!(err.contains(message), "{arguments:?}: {err}");
    }
}

#[test]
fn bad_input_is_refused_with_its_place() {
    let pod = |name: &str, status: &str| {
        format!("---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\nstatus: {status}\n")
    };
    let policy = |spec: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{ name: p }}\nspec:\n  podSelector: {{}}\n{spec}"
        )
    };
    for (text, message) in [
        (
            policy("  ingress:\n  - ports:\n    - port: 80\n      endport: 90\n"),
            "reach: a.yaml:9: document 0: spec.ingress[0].ports[0].endport: unknown field; did you mean \"endPort\"?",
        ),
        (
            policy(
                "  ingress:\n  - from:\n    - ipBlock:\n        cidr: 10.0.0.0/8\n        except: [ 10.1.0.0/16, 11.0.0.0/16 ]\n",
            ),
            "reach: a.yaml:10: document 0: spec.ingress[0].from[0].ipBlock.except[1]: \"11.0.0.0/16\": \
             must be a strict subset of cidr 10.0.0.0/8",
        ),
        (
            format!("{}{}", pod("one", "{ podIP: 10.0.0.1 }"), pod("one", "{ podIP: 10.0.0.2 }")),
            "reach: a.yaml:10: document 1: metadata: {\"name\":\"one\"}: Pod default/one is in a.yaml, document 0, too; \
             remove or rename one",
        ),
        (
            format!("{}{}", pod("one", "{ podIP: 10.0.0.1 }"), pod("two", "{ podIP: 10.0.0.1 }")),
            "reach: a.yaml:12: document 1: status: {\"podIP\":\"10.0.0.1\"}: 10.0.0.1 is the address of pod default/one, \
             too; correct one, or remove what is gone",
        ),
        (
            pod("one", "{ podIP: 10.0.0 }"),
            "reach: a.yaml:6: document 0: status.podIP: \"10.0.0\": must be an address that a host can have, such as \
             10.0.0.1 or fd00::1",
        ),
        (
            pod("one", "\n  podIPs:\n  - ip: 224.0.0.1"),
            "reach: a.yaml:8: document 0: status.podIPs[0].ip: \"224.0.0.1\": must be an address that a host can have, \
             such as 10.0.0.1 or fd00::1",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata:\n  labels:\n    app.example/tier: 1\n  name: a\n".to_owned(),
            "reach: a.yaml:5: document 0: metadata.labels[\"app.example/tier\"]: 1: must be text; quote it",
        ),
        (
            "replicas: 3\n".to_owned(),
            "reach: a.yaml:1: document 0: apiVersion: nothing: is required; only Kubernetes objects may be here",
        ),
        (
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n".to_owned(),
            "reach: a.yaml:2: document 0: kind: \"CiliumNetworkPolicy\": cilium.io/v2 CiliumNetworkPolicy is not \
             understood, and verdicts without it would be wrong: translate it to a kind and version that is, or remove it",
        ),
        (
            pod("one", "{ phase: Pending }"),
            "reach: pod default/one is left out: it has no address; set status.podIP\n\
             reach: DIRECTORY: there is no pod with an address",
        ),
    ] {
        let found = refusal(&text);
        let found = match found.rsplit_once("reach: /") {
            Some((before, after)) => format!("{before}reach: DIRECTORY:{}", after.split_once(':').unwrap().1),
            None => found,
        };
        assert_eq!(found, message);
    }
    let syntax = refusal("kind: [");
    assert!(syntax.starts_with("reach: a.yaml: not YAML: ") && syntax.contains("line"), "{syntax}");
}

#[test]
fn rules_that_are_closed_are_told_with_their_place() {
    let (resources, _) = scenario(&folder("scenarios/cluster-closed"));
    let (status, _, err) = run(&["--resources", resources.path().to_str().unwrap(), "--probe", "tcp/80"]);
    let file = resources.path().join("policies/policies.yaml");
    assert_eq!(status, 0);
    assert_eq!(
        err.replace(file.to_str().unwrap(), "FILE"),
        "reach: closed: FILE:10: document 0: spec.egress[0].to[0]: spec.egress[0].to[0].services is not known: a rule \
         that allows matches nothing then\n\
         reach: closed: FILE:22: document 1: spec.egress[1].to[0]: spec.egress[1].to[0].services is not known: a rule that \
         denies or passes denies everything then\n\
         reach: closed: FILE:32: document 2: spec.ingress[0].from[0]: spec.ingress[0].from[0].services is not known: a \
         rule that denies or passes denies everything then\n"
    );
}

/// All files below a folder.
fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            found.push(path);
        }
    }
}

#[test]
fn broken_resources_are_refused_not_fatal() {
    let mut found = Vec::new();
    files(&folder(""), &mut found);
    found.sort();
    let mut rng = Rng::new(7);
    let (mut read, mut refused, mut with_line) = (0, 0, 0);
    for path in &found {
        let text = std::fs::read_to_string(path).unwrap();
        for _ in 0..effort(10, 60, 600) {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            let line = rng.below(lines.len());
            match rng.below(5) {
                0 => drop(lines.remove(line)),
                1 => lines.truncate(line),
                2 => lines[line].insert(0, ' '),
                3 => lines[line] = lines[line].replace(['{', '['], ""),
                _ => {
                    let other = lines[rng.below(lines.len())].clone();
                    lines[line] = other;
                }
            }
            match Documents::default().with_yaml("broken.yaml", &lines.join("\n")) {
                Ok(documents) => {
                    let cluster = documents.into_cluster();
                    Compiler::default().update(&cluster).unwrap();
                    read += 1;
                }
                Err(error) => {
                    refused += 1;
                    with_line += usize::from(error.line.is_some());
                    let of_syntax = matches!(error.source, SourceError::Syntax { .. });
                    assert_ne!(of_syntax, error.line.is_some(), "{}: {error}", path.display());
                }
            }
        }
    }
    assert!(found.len() > 20 && read > 100 && refused > 100 && with_line > 50, "{read}, {refused}, {with_line}");
}

#[test]
fn ties_are_told() {
    let (resources, _) = scenario(&folder("scenarios/cluster-priority"));
    let (status, _, err) = run(&["--resources", resources.path().to_str().unwrap(), "--probe", "tcp/80"]);
    let told = "reach: admin:tie-1, admin:tie-2 have one priority: the first by name counts, elsewhere any may\n";
    assert_eq!((status, err.as_str()), (0, told));
}

#[test]
fn the_simulators_tables_grow_with_the_cluster() {
    let mut cluster = Cluster::default();
    for number in 0..100_u16 {
        let [high, low] = (number * 257).to_be_bytes();
        let v4 = std::net::Ipv4Addr::new(10, high, low, 1);
        let v6 = std::net::Ipv6Addr::new(0xfd00, number, 0, 0, 0, 0, 0, 1);
        let pod = Pod::new([("app", if number % 3 == 0 { "a" } else { "b" })], [v4.into(), v6.into()]);
        cluster.pods.insert(PodId::new("n", format!("p{number}")), pod);
    }
    let policies = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: { name: p, namespace: n }\nspec:\n  \
                    podSelector: { matchLabels: { app: a } }\n  ingress:\n  - from:\n    - podSelector: { matchLabels: { app: b } }\n    \
                    - ipBlock: { cidr: 'fd00::/26' }\n    ports: [ { port: 80 } ]\n";
    for policy in networkpolicy::from_yaml(policies).unwrap() {
        cluster.insert_policy(policy);
    }
    let probes = ["tcp/80".parse().unwrap()];
    let evaluated = reach(&cluster, &probes, &mut Evaluator::new(&cluster)).unwrap();
    let simulated = reach(&cluster, &probes, &mut Simulator::new(&cluster).unwrap()).unwrap();
    assert_eq!(evaluated.results.len(), 20_000);
    let denied = |family| evaluated.results.iter().filter(|a| a.family == family && a.verdict == Verdict::Deny).count();
    // 34 pods are `a`: each is closed to the other 33, but for IPv6 to those of fd00:0000 to fd00:003f, 22 of them.
    assert_eq!((denied(Family::Ipv4), denied(Family::Ipv6)), (34 * 33, 22 * 12 + 12 * 11));
    assert!(evaluated.results == simulated.results);
}

#[test]
fn a_simulator_for_what_cannot_be_enforced_is_refused() {
    let mut cluster = Cluster::default();
    cluster.pods.insert(PodId::new("n", "a"), Pod::new([], ["10.0.0.1".parse().unwrap()]));
    let policies = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: { name: p, namespace: n }\n\
                    spec: { podSelector: {}, ingress: [ { ports: [ { port: 1 }, { port: 2 } ] } ] }\n";
    for policy in networkpolicy::from_yaml(policies).unwrap() {
        cluster.insert_policy(policy);
    }
    let mut narrow = Compiler::new(Scope::Cluster, Limits { entries: 1, ..Limits::default() });
    let error = Simulator::compiled_by(&mut narrow, &cluster).unwrap_err();
    assert!(matches!(error, ReachError::Compile(_)), "{error}");
    assert!(error.to_string().starts_with("the policies cannot be compiled: n/p for ingress of n/a: "), "{error}");
}

#[test]
fn bad_cluster_policies_are_refused_with_their_place() {
    let cluster = |spec: &str| {
        format!(
            "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{ name: p }}\nspec: {spec}\n"
        )
    };
    let admin = |kind: &str, name: &str, spec: &str| {
        format!(
            "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: {kind}\nmetadata: {{ name: {name} }}\nspec: {spec}\n"
        )
    };
    let egress = |rule: &str| {
        cluster(&format!("{{ tier: Admin, priority: 1, subject: {{ namespaces: {{}} }}, egress: [ {rule} ] }}"))
    };
    for (text, message) in [
        (
            cluster("{ tier: Top, priority: 1, subject: { namespaces: {} } }"),
            "spec.tier: \"Top\": must be Admin or Baseline",
        ),
        (
            cluster("{ tier: Admin, priority: 1001, subject: { namespaces: {} } }"),
            "spec.priority: 1001: must be a number from 0 to 1000",
        ),
        (cluster("{ tier: Admin, priority: 1 }"), "spec.subject: nothing: must have exactly one of namespaces, pods"),
        (
            cluster("{ tier: Admin, priority: 1, subject: { pods: { namespaceSelector: {} } } }"),
            "spec.subject.pods.podSelector: nothing: is required; {} selects all",
        ),
        (
            egress("{ action: Allow, to: [ { namespaces: {} } ] }"),
            "spec.egress[0].action: \"Allow\": must be Accept or Deny or Pass",
        ),
        (egress("{ action: Deny }"), "spec.egress[0].to: nothing: must have at least one peer"),
        (
            egress("{ action: Deny, to: [ { namespaces: {} } ], protocols: [] }"),
            "spec.egress[0].protocols: []: must have at least one element; leave it out for every protocol",
        ),
        (
            egress("{ action: Deny, to: [ { namespaces: {}, pods: { podSelector: {} } } ] }"),
            "spec.egress[0].to[0]: {\"namespaces\":{},\"pods\":{\"podSelector\":{}}}: must have exactly one field; make several \
             peers of it",
        ),
        (
            egress(
                "{ action: Deny, to: [ { namespaces: {} } ], protocols: [ { tcp: { destinationPort: { number: 1, range: { start: 1, end: 2 } } } } ] }",
            ),
            "spec.egress[0].protocols[0].tcp.destinationPort: {\"number\":1,\"range\":{\"end\":2,\"start\":1}}: must have exactly \
             one of number, range",
        ),
        (
            egress(
                "{ action: Deny, to: [ { namespaces: {} } ], protocols: [ { udp: { destinationPort: { range: { start: 5, end: 5 } } } } ] }",
            ),
            "spec.egress[0].protocols[0].udp.destinationPort.range: {\"end\":5,\"start\":5}: start must be below end",
        ),
        (
            egress(
                "{ action: Deny, to: [ { networks: [ 10.0.0.0/8 ] } ], protocols: [ { destinationNamedPort: web } ] }",
            ),
            "spec.egress[0].protocols: [{\"destinationNamedPort\":\"web\"}]: names of ports need peers that are pods; make two \
             rules of it",
        ),
        (
            egress("{ action: Deny, too: [ { namespaces: {} } ] }"),
            "spec.egress[0].too: unknown field; did you mean \"to\"?",
        ),
        (
            egress(&format!("{{ action: Deny, to: [ {} ] }}", ["{ namespaces: {} }"; 26].join(", "))),
            "has 26 elements, and may have 25 at most",
        ),
        (
            admin("BaselineAdminNetworkPolicy", "other", "{ subject: { namespaces: {} } }"),
            "metadata.name: \"other\": must be default, for there is one of this kind at most",
        ),
        (
            admin(
                "BaselineAdminNetworkPolicy",
                "default",
                "{ subject: { namespaces: {} }, ingress: [ { action: Pass, from: [ { namespaces: {} } ] } ] }",
            ),
            "spec.ingress[0].action: \"Pass\": must be Allow or Deny",
        ),
        (
            admin(
                "AdminNetworkPolicy",
                "a",
                "{ priority: 1, subject: { namespaces: {} }, egress: [ { action: Deny, to: [ { namespaces: {} } ], ports: [ { portRange: { start: 6, end: 5 } } ] } ] }",
            ),
            "spec.egress[0].ports[0].portRange: {\"end\":5,\"start\":6}: start must not be above end",
        ),
        (
            admin("AdminNetworkPolicy", "a, namespace: x", "{ priority: 1, subject: { namespaces: {} } }"),
            "metadata.namespace: \"x\": such a policy is the cluster's; remove the namespace",
        ),
        (
            format!(
                "{}---\n{}",
                admin("AdminNetworkPolicy", "p", "{ priority: 1, subject: { namespaces: {} } }"),
                admin("AdminNetworkPolicy", "p", "{ priority: 2, subject: { namespaces: {} } }")
            ),
            "policy admin:anp/p is in a.yaml, document 0, too; remove or rename one",
        ),
        (
            "apiVersion: policy.networking.k8s.io/v1\nkind: ClusterNetworkPolicy\n".to_owned(),
            "policy.networking.k8s.io/v1 ClusterNetworkPolicy is not understood",
        ),
    ] {
        let found = refusal(&text);
        assert!(found.contains(message), "{found}\nlacks {message}");
    }
}
