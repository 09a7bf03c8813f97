//! What a compiler keeps, shares and refuses from one update to the next.

use std::sync::Arc;

use dcenet_policy::compiler::{Limits, Scope};
use dcenet_policy::ir::RuleId;
use dcenet_policy::model::*;
use dcenet_policy::{CompileError, Compiler};

fn has(key: &str, value: &str) -> LabelSelector {
    let operator = Operator::In([value.to_owned()].into());
    LabelSelector { requirements: vec![Requirement { key: key.to_owned(), operator }] }
}

fn pods(namespace: &str, pods: LabelSelector) -> PodMatch {
    PodMatch { namespaces: NamespaceMatch::Named(namespace.to_owned()), pods }
}

fn tcp(first: u16, last: u16) -> PortMatch {
    PortMatch { protocol: Protocol::TCP, port: PortSpec::Range { first, last } }
}

fn allow(peers: Vec<Peer>, ports: Vec<PortMatch>) -> Rule {
    Rule { action: Verdict::Allow, peers: Peers::OneOf(peers), ports: Ports::OneOf(ports) }
}

fn ingress(name: &str, subject: LabelSelector, rules: Vec<Rule>) -> Policy {
    Policy { id: PolicyId::new("n", name), subject: pods("n", subject), ingress: Some(rules), egress: None }
}

/// Pods p1 to p6: odd ones `app=a`, even ones `app=b`; `b` may reach `a` on port 80.
fn cluster() -> Cluster {
    let mut cluster = Cluster::default();
    cluster.insert_namespace("n", []);
    for number in 1..=6_u8 {
        let app = if number % 2 == 1 { "a" } else { "b" };
        let pod = Pod::new([("app", app)], [[10, 0, 0, number].into()]);
        cluster.pods.insert(PodId::new("n", format!("p{number}")), pod);
    }
    let peers = vec![Peer::Pods(pods("n", has("app", "b")))];
    cluster.insert_policy(ingress("web", has("app", "a"), vec![allow(peers, vec![tcp(80, 80)])]));
    cluster
}

fn pod(name: &str) -> PodId {
    PodId::new("n", name)
}

#[test]
fn endpoints_with_the_same_policies_share_one_set_and_program() {
    let update = Compiler::default().update(&cluster()).unwrap();
    let of = |name| &update.endpoints[&pod(name)];
    assert!(Arc::ptr_eq(&of("p1").ingress, &of("p5").ingress));
    assert!(Arc::ptr_eq(&of("p2").ingress, &of("p4").ingress));
    assert!(!Arc::ptr_eq(&of("p1").ingress.program, &of("p2").ingress.program));
    assert_eq!(update.sets().len(), 3, "isolated ingress, free ingress, free egress");
    assert_eq!(
        of("p1").ingress.program.list.to_string(),
        "ingress locals 2\nallow 3 peers 1 tcp 80-80\ndeny 1 default\n"
    );
    assert_eq!(update.rules.name(RuleId(3)), "n/web ingress[0] from[0] ports[0]");
    // Pods without the label satisfy nothing that is asked, and take no entry.
    assert_eq!(update.table.exact().len(), 3);
    assert_eq!(update.classes, 2);
}

#[test]
fn nothing_changes_for_an_unchanged_cluster() {
    let mut compiler = Compiler::default();
    let first = compiler.update(&cluster()).unwrap();
    let second = compiler.update(&cluster()).unwrap();
    assert!(second.table_changes.is_empty());
    assert!(Arc::ptr_eq(&first.table, &second.table) && Arc::ptr_eq(&first.rules, &second.rules));
    for (name, plan) in &second.endpoints {
        assert!(Arc::ptr_eq(&plan.ingress, &first.endpoints[name].ingress));
        assert!(Arc::ptr_eq(&plan.egress, &first.endpoints[name].egress));
    }
}

#[test]
fn a_label_change_touches_only_the_pods_own_entries() {
    let mut compiler = Compiler::default();
    let mut cluster = cluster();
    let first = compiler.update(&cluster).unwrap();
    cluster.pods.get_mut(&pod("p2")).unwrap().labels = [("app".to_owned(), "c".to_owned())].into();
    let second = compiler.update(&cluster).unwrap();
    assert_eq!(second.table_changes.exact.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.2"]);
    assert!(second.table_changes.prefixes.is_empty());
    let set = |update: &dcenet_policy::Update| Arc::clone(&update.endpoints[&pod("p1")].ingress);
    assert!(Arc::ptr_eq(&set(&first), &set(&second)), "neither program nor class array changes");

    // The last peer goes, and one comes back: the program stays.
    for name in ["p4", "p6"] {
        cluster.pods.get_mut(&pod(name)).unwrap().labels.clear();
    }
    let third = compiler.update(&cluster).unwrap();
    assert!(Arc::ptr_eq(&set(&first).program, &set(&third).program));
    assert!(third.table.exact().is_empty());
    cluster.pods.get_mut(&pod("p6")).unwrap().labels = [("app".to_owned(), "b".to_owned())].into();
    let fourth = compiler.update(&cluster).unwrap();
    assert!(Arc::ptr_eq(&set(&first).program, &set(&fourth).program));
    let tuple = Tuple::ingress([10, 0, 0, 6].into(), Protocol::TCP, 80);
    assert_eq!(fourth.decide(&pod("p1"), &tuple).unwrap().verdict, Verdict::Allow);
}

#[test]
fn a_class_splits_without_touching_other_programs() {
    let mut compiler = Compiler::default();
    let mut cluster = cluster();
    let first = compiler.update(&cluster).unwrap();
    // A second policy asks for one of the pods by another label: its class splits off that of its twins.
    cluster.pods.get_mut(&pod("p2")).unwrap().labels.insert("tier".to_owned(), "x".to_owned());
    let peers = vec![Peer::Pods(pods("n", has("tier", "x")))];
    cluster.insert_policy(ingress("other", has("app", "b"), vec![allow(peers, vec![tcp(1, 1)])]));
    let second = compiler.update(&cluster).unwrap();
    let (before, after) = (&first.endpoints[&pod("p1")].ingress, &second.endpoints[&pod("p1")].ingress);
    assert!(Arc::ptr_eq(&before.program, &after.program));
    assert_eq!(before.id, after.id, "the same array, longer");
    assert!(after.locals.len() > before.locals.len());
    assert_eq!(second.classes, 3);
}

#[test]
fn a_changed_policy_gets_a_new_class_array() {
    let mut compiler = Compiler::default();
    let mut cluster = cluster();
    let first = compiler.update(&cluster).unwrap();
    let peers = vec![Peer::Pods(pods("n", has("app", "a"))), Peer::Pods(pods("n", has("app", "b")))];
    cluster.insert_policy(ingress("web", has("app", "a"), vec![allow(peers, vec![tcp(80, 80)])]));
    let second = compiler.update(&cluster).unwrap();
    let id = |update: &dcenet_policy::Update| update.endpoints[&pod("p1")].ingress.id;
    assert_ne!(id(&first), id(&second), "local ids mean something else now");
}

#[test]
fn numbers_are_reused_only_after_release() {
    let mut compiler = Compiler::default();
    let mut cluster = cluster();
    let rules = |update: &dcenet_policy::Update| update.rules.iter().map(|(id, _)| id.0).collect::<Vec<_>>();
    assert_eq!(rules(&compiler.update(&cluster).unwrap()), [3]);
    let with_port = |port| {
        let peers = vec![Peer::Pods(pods("n", has("app", "b")))];
        ingress(&format!("web{port}"), has("app", "a"), vec![allow(peers, vec![tcp(port, port)])])
    };
    cluster.policies.clear();
    cluster.insert_policy(with_port(1));
    let second = compiler.update(&cluster).unwrap();
    assert_eq!(rules(&second), [4]);
    cluster.policies.clear();
    cluster.insert_policy(with_port(2));
    assert_eq!(rules(&compiler.update(&cluster).unwrap()), [5]);
    compiler.release(second.generation);
    cluster.insert_policy(with_port(3));
    assert_eq!(rules(&compiler.update(&cluster).unwrap()), [3, 5]);
}

#[test]
fn shadowed_rules_are_removed_and_reported() {
    let mut cluster = cluster();
    let peers = vec![Peer::Pods(pods("n", has("app", "b")))];
    cluster.insert_policy(ingress("zz", has("app", "a"), vec![allow(peers, vec![tcp(80, 80), tcp(80, 81)])]));
    let update = Compiler::default().update(&cluster).unwrap();
    let program = &update.endpoints[&pod("p1")].ingress.program;
    let told: Vec<_> = program.shadowed.iter().map(|s| (update.rules.name(s.rule), s.by.clone())).collect();
    assert_eq!(told, [("n/zz ingress[0] from[0] ports[0]".to_owned(), vec![RuleId(3)])]);
    assert_eq!(program.list.entries.len(), 2);
}

#[test]
fn only_the_nodes_own_pods_are_compiled_for() {
    let mut cluster = cluster();
    cluster.pods.get_mut(&pod("p1")).unwrap().node = Some("n1".to_owned());
    let update = Compiler::new(Scope::Node("n1".to_owned()), Limits::default()).update(&cluster).unwrap();
    assert_eq!(update.endpoints.keys().collect::<Vec<_>>(), [&pod("p1")]);
    let tuple = Tuple::ingress([10, 0, 0, 2].into(), Protocol::TCP, 80);
    assert_eq!(update.decide(&pod("p1"), &tuple).unwrap().verdict, Verdict::Allow);
    assert_eq!(update.decide(&pod("p2"), &tuple), None);
}

#[test]
fn what_is_too_large_is_refused_and_the_compiler_stands_as_before() {
    let limited = |limits| Compiler::new(Scope::Cluster, limits);
    let refused = |limits| match limited(limits).update(&cluster()) {
        Err(CompileError::ImplLimitExceeded { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(Limits { entries: 0, ..Limits::default() }), "entries in one policy set");
    assert_eq!(refused(Limits { locals: 1, ..Limits::default() }), "groups of peers in one policy set");
    assert_eq!(refused(Limits { work: 0, ..Limits::default() }), "pairs of entry and peer group in one policy set");
    assert_eq!(refused(Limits { arms: 1, ..Limits::default() }), "arms of one diagram");

    let mut compiler = limited(Limits { entries: 1, ..Limits::default() });
    let mut changed = cluster();
    let first = compiler.update(&changed).unwrap();
    changed.insert_policy(ingress(
        "zz",
        has("app", "a"),
        vec![allow(vec![], vec![]), allow(vec![Peer::Pods(pods("n", has("x", "y")))], vec![tcp(1, 1)])],
    ));
    compiler.update(&changed).unwrap_err();
    let second = compiler.update(&cluster()).unwrap();
    assert_eq!(second.generation, first.generation + 1);
    assert!(Arc::ptr_eq(&first.endpoints[&pod("p1")].ingress, &second.endpoints[&pod("p1")].ingress));
}

#[test]
fn an_address_of_two_pods_is_refused() {
    let mut cluster = cluster();
    cluster.pods.insert(pod("twin"), Pod::new([], [[10, 0, 0, 2].into()]));
    let error = Compiler::default().update(&cluster).unwrap_err();
    assert_eq!(
        error.to_string(),
        "address 10.0.0.2 is held by pods n/p2 and n/twin; remove it from the one that is gone"
    );
}

#[test]
fn empty_lists_of_peers_or_ports_match_nothing() {
    let mut cluster = cluster();
    cluster.policies.clear();
    let any = Peers::Any;
    let none = Rule { action: Verdict::Allow, peers: any, ports: Ports::OneOf(vec![]) };
    cluster.insert_policy(ingress("p", has("app", "a"), vec![allow(vec![], vec![tcp(1, 9)]), none]));
    let update = Compiler::default().update(&cluster).unwrap();
    let tuple = Tuple::ingress([10, 0, 0, 2].into(), Protocol::TCP, 5);
    assert_eq!(update.decide(&pod("p1"), &tuple).unwrap().rule, RuleId::ISOLATED);
    let oracle = dcenet_policy::eval::evaluate(&cluster, &pod("p1"), &tuple).unwrap();
    assert_eq!(oracle.verdict, Verdict::Deny);
}
