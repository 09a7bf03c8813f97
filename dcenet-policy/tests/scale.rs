//! Growth of diagrams with their rules, and of a compilation with its cluster. Run with `--nocapture` for figures.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "helpers of tests")]

use std::time::Instant;

use dcenet_policy::isolation::Fault;
use dcenet_policy::model::*;
use dcenet_policy::test_support::{Rng, Tally, compare, tuples};
use dcenet_policy::{CompileError, Compiler};

fn label(key: &str, value: usize) -> LabelSelector {
    let operator = Operator::In([format!("v{value}")].into());
    LabelSelector { requirements: vec![Requirement { key: key.to_owned(), operator }] }
}

/// One pod under a policy of `count` rules, each for another /24 and another port range.
fn one_pod(rng: &mut Rng, count: usize) -> (Cluster, PodId) {
    let mut cluster = Cluster::default();
    let pod = PodId::new("n", "p");
    cluster.pods.insert(pod.clone(), Pod::new([], ["192.0.2.1".parse().unwrap()]));
    let rules = (0..count).map(|_| {
        let [a, b] = [rng.below(256) as u8, rng.below(256) as u8];
        let cidr = format!("10.{a}.{b}.0/24").parse().unwrap();
        let first = rng.below(60_000) as u16;
        let port = PortSpec::Range { first, last: first + rng.below(100) as u16 };
        Rule {
            action: Action::Allow,
            peers: Peers::OneOf(vec![Peer::Block(IpBlock { cidr, except: Vec::new() })]),
            ports: Ports::OneOf(vec![PortMatch { protocol: *rng.pick(&[Protocol::TCP, Protocol::UDP]), port }]),
            schedule: None,
            log: false,
        }
    });
    let rules = rules.collect();
    let subject = PodMatch { namespaces: NamespaceMatch::Named("n".to_owned()), pods: LabelSelector::default() };
    cluster.insert_policy(Policy {
        id: PolicyId::new("n", "p"),
        priority: 0,
        mode: Mode::Enforce,
        subject,
        ingress: Some(rules),
        egress: None,
    });
    (cluster, pod)
}

#[test]
fn depth_grows_with_the_logarithm_of_the_rules() {
    for (count, deepest) in [(10, 12), (100, 16), (1_000, 20), (10_000, 25), (100_000, 28)] {
        let mut rng = Rng::new(7);
        let (cluster, pod) = one_pod(&mut rng, count);
        let start = Instant::now();
        let update = Compiler::default().update(&cluster).unwrap();
        let took = start.elapsed();
        let stats = update.endpoints[&pod].ingress.program.diagram.stats();
        eprintln!("{count} rules: {stats:?}, compiled in {took:?}");
        assert!(stats.depth <= deepest, "{count} rules: {stats:?}");
        assert!(stats.arms <= 12 * count && stats.leaves <= count + 1, "{count} rules: {stats:?}");
        let questions = tuples(&mut rng, &cluster, 100_000 / count.min(1_000));
        compare(&cluster, &update, questions, &mut Tally::default()).unwrap();
    }
}

#[test]
fn a_set_beyond_every_bound_is_refused_in_time() {
    // 3,000 groups of peers, each of which needs all of 10,000 overlapping port ranges of its own.
    let mut rng = Rng::new(9);
    let (mut cluster, _) = one_pod(&mut rng, 3_000);
    for rule in cluster.policies.values_mut().flat_map(|policy| policy.ingress.iter_mut()) {
        let overlapping = |number: u16| PortMatch {
            protocol: Protocol::TCP,
            port: PortSpec::Range { first: number, last: u16::MAX - number },
        };
        let ports = Ports::OneOf((0..10_000).map(overlapping).collect());
        rule.push(Rule { action: Action::Allow, peers: Peers::Any, ports, schedule: None, log: false });
    }
    let start = Instant::now();
    let faults = Compiler::default().update(&cluster).unwrap().faults;
    eprintln!("refused after {:?}: {}", start.elapsed(), faults[0]);
    assert!(matches!(&faults[..], [Fault::Refused { source: CompileError::ImplLimitExceeded { .. }, .. }]));
    assert!(start.elapsed().as_secs() < 10);
}

/// 50 namespaces; each policy has 4 rules and selects about 1 in 10 pods of its namespace.
fn large(policies: usize, pods: usize) -> Cluster {
    let mut rng = Rng::new(1);
    let mut cluster = Cluster::default();
    for namespace in 0..50 {
        let team = format!("v{}", namespace % 5);
        cluster.insert_namespace(format!("ns{namespace}"), [("team", team.as_str())]);
    }
    for number in 0..pods {
        let mut pod = Pod::default();
        pod.labels.insert("app".to_owned(), format!("v{}", rng.below(10)));
        pod.labels.insert("tier".to_owned(), format!("v{}", rng.below(4)));
        pod.addresses.insert([10, (number >> 16) as u8, (number >> 8) as u8, number as u8].into());
        cluster.pods.insert(PodId::new(format!("ns{}", number % 50), format!("p{number}")), pod);
    }
    for number in 0..policies {
        let namespace = format!("ns{}", number % 50);
        let mut rule = || {
            let peer = match rng.below(4) {
                0 => Peer::Block(IpBlock {
                    cidr: format!("10.0.{}.0/24", rng.below(256)).parse().unwrap(),
                    except: Vec::new(),
                }),
                1 => Peer::Pods(PodMatch {
                    namespaces: NamespaceMatch::Selected(label("team", rng.below(5))),
                    pods: label("app", rng.below(10)),
                }),
                _ => Peer::Pods(PodMatch {
                    namespaces: NamespaceMatch::Named(namespace.clone()),
                    pods: label("app", rng.below(10)),
                }),
            };
            let first = rng.below(60_000) as u16;
            let port = PortSpec::Range { first, last: first + rng.below(10) as u16 };
            Rule {
                action: Action::Allow,
                peers: Peers::OneOf(vec![peer]),
                ports: Ports::OneOf(vec![PortMatch { protocol: Protocol::TCP, port }]),
                schedule: None,
                log: false,
            }
        };
        let (ingress, egress) = (vec![rule(), rule()], vec![rule(), rule()]);
        cluster.insert_policy(Policy {
            id: PolicyId::new(namespace.clone(), format!("policy{number}")),
            priority: 0,
            mode: Mode::Enforce,
            subject: PodMatch { namespaces: NamespaceMatch::Named(namespace), pods: label("app", rng.below(10)) },
            ingress: Some(ingress),
            egress: Some(egress),
        });
    }
    cluster
}

fn measured(policies: usize, pods: usize) {
    let mut cluster = large(policies, pods);
    let before = resident();
    let mut compiler = Compiler::default();
    let start = Instant::now();
    let update = compiler.update(&cluster).unwrap();
    let took = start.elapsed();
    eprintln!(
        "{policies} policies x {pods} pods: {took:?}, {} classes, {} sets, {} rules; resident {} -> {} kB, peak {} kB",
        update.classes,
        update.sets().len(),
        update.rules.iter().count(),
        before,
        resident(),
        field("VmHWM:"),
    );
    let id = cluster.pods.keys().next().unwrap().clone();
    cluster.pods.get_mut(&id).unwrap().labels.insert("app".to_owned(), "v0".to_owned());
    let start = Instant::now();
    let again = compiler.update(&cluster).unwrap();
    eprintln!("  one label changed: {:?}, {} table entries", start.elapsed(), again.table_changes.exact.len());
    assert!(again.table_changes.exact.len() <= 1);
    let questions = tuples(&mut Rng::new(3), &cluster, 300);
    compare(&cluster, &again, questions, &mut Tally::default()).unwrap();
}

#[test]
fn a_thousand_policies_meet_a_thousand_pods() {
    measured(1_000, 1_000);
}

#[test]
#[ignore = "a measurement of a minute; run it by name"]
fn ten_thousand_policies_meet_ten_thousand_pods() {
    measured(10_000, 10_000);
}

fn resident() -> u64 {
    field("VmRSS:")
}

fn field(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
