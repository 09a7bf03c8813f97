//! What a compiler keeps, shares and refuses from one update to the next.

use std::sync::Arc;

use dcenet_policy::compiler::{Limits, Scope};
use dcenet_policy::ir::{Leaf, RuleId};
use dcenet_policy::isolation::Fault;
use dcenet_policy::model::*;
use dcenet_policy::test_support::{PlantedBug, Rng, Tally, compare, tuples};
use dcenet_policy::{CompileError, Compiler, eval};

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
    Rule { action: Action::Allow, peers: Peers::OneOf(peers), ports: Ports::OneOf(ports), schedule: None, log: false }
}

fn ingress(name: &str, subject: LabelSelector, rules: Vec<Rule>) -> Policy {
    Policy {
        id: PolicyId::new("n", name),
        priority: 0,
        mode: Mode::Enforce,
        subject: pods("n", subject),
        ingress: Some(rules),
        egress: None,
    }
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
        "ingress locals 2\nallow 6 peers 1 tcp 80-80\ndeny 1 default\n"
    );
    assert_eq!(update.rules.name(RuleId::FIRST), "n/web ingress[0] from[0] ports[0]");
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
fn pods_alone_are_updated_by_what_they_touch() {
    let mut compiler = Compiler::default();
    let mut cluster = cluster();
    // Asked for by nobody's rules yet: a second rule for a label that no pod has.
    let peers = vec![Peer::Pods(pods("n", has("tier", "front")))];
    cluster.insert_policy(ingress("api", has("app", "a"), vec![allow(peers, vec![tcp(443, 443)])]));
    let first = compiler.update(&cluster).unwrap();
    let verdict = |update: &dcenet_policy::Update, peer: u8, port| {
        let question = Tuple::ingress([10, 0, 0, peer].into(), Protocol::TCP, port);
        update.decide(&pod("p1"), &question).unwrap().verdict
    };
    assert_eq!([80, 443].map(|port| verdict(&first, 2, port)), [Verdict::Allow, Verdict::Deny]);
    let set = |update: &dcenet_policy::Update| Arc::clone(&update.endpoints[&pod("p1")].ingress);

    // What the peer satisfies now, nobody did before: its set alone gets another program, under the same number.
    cluster.pods.get_mut(&pod("p2")).unwrap().labels.insert("tier".into(), "front".into());
    let second = compiler.update_pods(&cluster, [&pod("p2")]).unwrap();
    assert_eq!([80, 443].map(|port| verdict(&second, 2, port)), [Verdict::Allow, Verdict::Allow]);
    assert_eq!([80, 443].map(|port| verdict(&second, 4, port)), [Verdict::Allow, Verdict::Deny]);
    assert_eq!(set(&first).id, set(&second).id);
    assert!(!Arc::ptr_eq(&set(&first).program, &set(&second).program));
    let free = |update: &dcenet_policy::Update| Arc::clone(&update.endpoints[&pod("p2")].ingress);
    assert!(Arc::ptr_eq(&free(&first), &free(&second)), "a set that asks for nobody stays as it is");
    assert_eq!(second.table_changes.exact.len(), 1);

    // Another peer that satisfies the same needs its entry and nothing else.
    cluster.pods.get_mut(&pod("p4")).unwrap().labels.insert("tier".into(), "front".into());
    let third = compiler.update_pods(&cluster, [&pod("p4")]).unwrap();
    assert_eq!(verdict(&third, 4, 443), Verdict::Allow);
    assert!(Arc::ptr_eq(&set(&second), &set(&third)));
    assert_eq!(third.table_changes.exact.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.4"]);
    assert_eq!(third.classes, 3, "unknown, `b`, and `b` of the tier");

    // A pod that goes takes its entry along; one that comes is known.
    cluster.pods.remove(&pod("p6"));
    let labels = [("app", "b")];
    cluster.pods.insert(pod("p7"), Pod::new(labels, [[10, 0, 0, 7].into()]));
    let fourth = compiler.update_pods(&cluster, [&pod("p6"), &pod("p7")]).unwrap();
    assert_eq!([6, 7].map(|peer| verdict(&fourth, peer, 80)), [Verdict::Deny, Verdict::Allow]);
    assert!(!fourth.endpoints.contains_key(&pod("p6")) && fourth.endpoints.contains_key(&pod("p7")));
    assert_eq!(fourth.generation, 4);
}

#[test]
fn pods_for_whom_there_is_no_room_take_no_numbers() {
    let mut compiler = Compiler::default();
    let mut cluster = cluster();
    let peers = vec![Peer::Pods(pods("n", has("tier", "front")))];
    cluster.insert_policy(ingress("api", has("app", "a"), vec![allow(peers, vec![tcp(443, 443)])]));
    compiler.update(&cluster).unwrap();
    cluster.pods.get_mut(&pod("p2")).unwrap().labels.insert("tier".into(), "front".into());
    let full = || CompileError::ImplLimitExceeded { what: "entries of a table", found: 2, limit: 1 };
    for _ in 0..3 {
        assert_eq!(compiler.update_pods_within(&cluster, [&pod("p2")], |_| Err(full())).unwrap_err(), full());
    }
    assert!(!compiler.is_unreleased());
    let update = compiler.update_pods(&cluster, [&pod("p2")]).unwrap();
    let class = update.table.lookup([10, 0, 0, 2].into());
    assert_eq!(class.0, 2, "the first number that was free");
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
    assert!(after.locals.last() > before.locals.last());
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
    const FIRST: u32 = RuleId::FIRST.0;
    let mut compiler = Compiler::default();
    let mut cluster = cluster();
    let rules = |update: &dcenet_policy::Update| update.rules.iter().map(|(id, _)| id.0).collect::<Vec<_>>();
    assert_eq!(rules(&compiler.update(&cluster).unwrap()), [FIRST]);
    let with_port = |port| {
        let peers = vec![Peer::Pods(pods("n", has("app", "b")))];
        ingress(&format!("web{port}"), has("app", "a"), vec![allow(peers, vec![tcp(port, port)])])
    };
    cluster.policies.clear();
    cluster.insert_policy(with_port(1));
    let second = compiler.update(&cluster).unwrap();
    assert_eq!(rules(&second), [FIRST + 1]);
    cluster.policies.clear();
    cluster.insert_policy(with_port(2));
    assert_eq!(rules(&compiler.update(&cluster).unwrap()), [FIRST + 2]);
    compiler.release(second.generation);
    cluster.insert_policy(with_port(3));
    assert_eq!(rules(&compiler.update(&cluster).unwrap()), [FIRST, FIRST + 2]);
}

#[test]
fn shadowed_rules_are_removed_and_reported() {
    let mut cluster = cluster();
    let peers = vec![Peer::Pods(pods("n", has("app", "b")))];
    cluster.insert_policy(ingress("zz", has("app", "a"), vec![allow(peers, vec![tcp(80, 80), tcp(80, 81)])]));
    let update = Compiler::default().update(&cluster).unwrap();
    let program = &update.endpoints[&pod("p1")].ingress.program;
    let told: Vec<_> = program.shadowed.iter().map(|s| (update.rules.name(s.rule), s.by.clone())).collect();
    assert_eq!(told, [("n/zz ingress[0] from[0] ports[0]".to_owned(), vec![RuleId::FIRST])]);
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

/// The policies refused in an update, with the pods and what there is too much of.
fn refused(update: &dcenet_policy::Update) -> Vec<(Vec<String>, Vec<String>, &'static str)> {
    let mut all = Vec::new();
    for fault in &update.faults {
        let Fault::Refused { policies, pods, source: CompileError::ImplLimitExceeded { what, .. }, .. } = fault else {
            panic!("{fault:?}");
        };
        let name = |name: &dyn ToString| name.to_string();
        all.push((policies.iter().map(|id| name(id)).collect(), pods.iter().map(|id| name(id)).collect(), *what));
    }
    all
}

fn verdict(update: &dcenet_policy::Update, name: &str, peer: u8, port: u16) -> Leaf {
    update.decide(&pod(name), &Tuple::ingress([10, 0, 0, peer].into(), Protocol::TCP, port)).unwrap()
}

const CLOSED: Leaf = Leaf { verdict: Verdict::Deny, rule: RuleId::REFUSED };

#[test]
fn each_limit_closes_the_pods_of_its_policy() {
    for (limits, what) in [
        (Limits { entries: 0, ..Limits::default() }, "entries in one policy set"),
        (Limits { locals: 1, ..Limits::default() }, "groups of peers in one policy set"),
        (Limits { work: 0, ..Limits::default() }, "pairs of entry and peer group in one policy set"),
        (Limits { arms: 1, ..Limits::default() }, "arms of one diagram"),
    ] {
        let mut compiler = Compiler::new(Scope::Cluster, limits.clone());
        let update = compiler.update(&cluster()).unwrap();
        let pods = ["n/p1", "n/p3", "n/p5"].map(str::to_owned).to_vec();
        assert_eq!(refused(&update), [(vec!["n/web".to_owned()], pods, what)]);
        assert_eq!(verdict(&update, "p1", 2, 80), CLOSED);
        assert_eq!(verdict(&update, "p2", 1, 80).rule, RuleId::NOT_GOVERNED);
        // Nothing changes while it lasts, and what is known to be too large is not looked at again.
        let again = compiler.update(&cluster()).unwrap();
        assert!(again.table_changes.is_empty() && again.faults == update.faults);
        for (name, plan) in &again.endpoints {
            assert!(Arc::ptr_eq(&plan.ingress, &update.endpoints[name].ingress));
        }
        // The twin in which one failure is everybody's.
        let whole = Compiler::new(Scope::Cluster, limits).with_planted_bug(PlantedBug::NothingIsolated);
        assert!(matches!(whole.clone().update(&cluster()), Err(CompileError::ImplLimitExceeded { .. })));
    }
}

#[test]
fn others_get_their_changes_while_a_policy_is_refused_and_it_comes_back() {
    let limits = Limits { entries: 2, ..Limits::default() };
    let mut compiler = Compiler::new(Scope::Cluster, limits);
    let mut changed = cluster();
    let first = compiler.update(&changed).unwrap();
    assert_eq!(verdict(&first, "p1", 2, 80).verdict, Verdict::Allow);
    let from_b = || vec![Peer::Pods(pods("n", has("app", "b")))];
    changed.insert_policy(ingress(
        "web",
        has("app", "a"),
        vec![allow(from_b(), vec![tcp(1, 1), tcp(2, 2), tcp(80, 80)])],
    ));
    changed.insert_policy(ingress("other", has("app", "b"), vec![allow(from_b(), vec![tcp(7, 7)])]));
    let second = compiler.update(&changed).unwrap();
    assert_eq!(refused(&second).len(), 1);
    assert_eq!(verdict(&second, "p1", 2, 80), CLOSED);
    assert_eq!([7, 8].map(|port| verdict(&second, "p2", 4, port).verdict), [Verdict::Allow, Verdict::Deny]);
    compiler.release(second.generation);
    changed.insert_policy(ingress("web", has("app", "a"), vec![allow(from_b(), vec![tcp(80, 80)])]));
    let third = compiler.update(&changed).unwrap();
    assert_eq!(third.faults, []);
    assert_eq!(verdict(&third, "p1", 2, 80).verdict, Verdict::Allow);
}

#[test]
fn a_refused_policy_that_may_deny_stops_those_behind_it() {
    let rule = |action, port| Rule {
        action,
        peers: Peers::Any,
        ports: Ports::OneOf(vec![tcp(port, port)]),
        schedule: None,
        log: false,
    };
    let mut cluster = cluster();
    cluster.policies.clear();
    cluster.insert_policy(ingress("1", has("app", "a"), vec![rule(Action::Allow, 1)]));
    let three = vec![rule(Action::Deny, 9), rule(Action::Allow, 8), rule(Action::Allow, 7)];
    cluster.insert_policy(ingress("2", has("app", "a"), three));
    cluster.insert_policy(ingress("3", has("app", "a"), vec![rule(Action::Allow, 3)]));
    let mut compiler = Compiler::new(Scope::Cluster, Limits { entries: 2, ..Limits::default() });
    let update = compiler.update(&cluster).unwrap();
    assert_eq!(refused(&update)[0].0, ["n/2"]);
    let verdicts = |update: &dcenet_policy::Update| [1, 3, 7, 8, 9].map(|port| verdict(update, "p1", 2, port).verdict);
    let (yes, no) = (Verdict::Allow, Verdict::Deny);
    assert_eq!(verdicts(&update), [yes, no, no, no, no]);
    compare(&cluster, &update, tuples(&mut Rng::new(1), &cluster, 200), &mut Tally::default()).unwrap();
    // Without a rule that denies, those behind it hold.
    cluster.policies.get_mut(&PolicyId::new("n", "2")).unwrap().ingress.as_mut().unwrap()[0].action = Action::Allow;
    let update = compiler.update(&cluster).unwrap();
    assert_eq!(verdicts(&update), [yes, yes, no, no, no]);
    compare(&cluster, &update, tuples(&mut Rng::new(2), &cluster, 200), &mut Tally::default()).unwrap();
}

#[test]
fn where_all_together_are_too_much_the_heaviest_policies_go_first() {
    let mut cluster = cluster();
    let blocks = |count: u8, second: u8| {
        let block = |third| IpBlock { cidr: format!("10.{second}.{third}.0/24").parse().unwrap(), except: vec![] };
        (0..count).map(|third| Peer::Block(block(third))).collect()
    };
    // Blocks of one rule are one class all the same; each its own port makes them differ.
    let rules = |count, second| {
        let peers: Vec<Peer> = blocks(count, second);
        (1..).zip(peers).map(|(port, peer)| allow(vec![peer], vec![tcp(port, port)])).collect()
    };
    cluster.insert_policy(ingress("big", has("app", "a"), rules(100, 1)));
    cluster.insert_policy(ingress("small", has("app", "b"), rules(10, 2)));
    let mut compiler = Compiler::default();
    let limit = |room: usize| {
        move |update: &dcenet_policy::Update| match update.classes {
            found if found > room => Err(CompileError::ImplLimitExceeded { what: "classes", found, limit: room }),
            _ => Ok(()),
        }
    };
    let update = compiler.update_within(&cluster, limit(20)).unwrap();
    let pods = ["n/p1", "n/p3", "n/p5"].map(str::to_owned).to_vec();
    assert_eq!(refused(&update), [(vec!["n/big".to_owned()], pods, "classes")]);
    assert_eq!(verdict(&update, "p1", 2, 80).verdict, Verdict::Allow, "`web` is enforced still");
    assert_eq!(verdict(&update, "p1", 77, 80), CLOSED);
    let from_block = Tuple::ingress([10, 2, 3, 1].into(), Protocol::TCP, 4);
    assert_eq!(update.decide(&pod("p2"), &from_block).unwrap().verdict, Verdict::Allow);
    assert!(update.classes <= 20);

    // What is in force stays, however heavy it is: what comes goes.
    compiler.release(update.generation);
    let update = compiler.update_within(&cluster, limit(200)).unwrap();
    assert_eq!(update.faults, []);
    cluster.insert_policy(ingress("late", has("app", "b"), rules(20, 3)));
    let update = compiler.update_within(&cluster, limit(update.classes + 1)).unwrap();
    assert_eq!(refused(&update)[0].0, ["n/late"]);

    assert_eq!(refused(&Compiler::default().update_within(&cluster, limit(2)).unwrap()).len(), 3);
    assert!(Compiler::default().update_within(&cluster, limit(0)).is_err(), "not even without peers");
}

/// Pods with a label for each bit of their numbers, so that each is a class for who asks for the labels; in place of
/// those before.
fn label_by_number(cluster: &mut Cluster, numbers: std::ops::Range<u16>) {
    cluster.pods.retain(|id, _| !id.name.starts_with("peer"));
    for (at, number) in (0..).zip(numbers) {
        let labels = (0..10).filter(|bit| number >> bit & 1 == 1).map(|bit| (format!("l{bit}"), "x".to_owned()));
        let there = Pod { labels: labels.collect(), ..Pod::new([], [[10, 1, 0, at].into()]) };
        cluster.pods.insert(pod(&format!("peer{at}")), there);
    }
}

fn asks_for_ten_labels(name: &str) -> Policy {
    let rule = |bit: u16| allow(vec![Peer::Pods(pods("n", has(&format!("l{bit}"), "x")))], vec![tcp(bit + 1, bit + 1)]);
    ingress(name, has("app", "a"), (0..10).map(rule).collect())
}

/// As a table that is an array by class.
fn below(limit: usize) -> impl Fn(&dcenet_policy::Update) -> Result<(), CompileError> {
    move |update| match update.table.exact().values().map(|class| class.0 as usize + 1).max() {
        Some(found) if found > limit => Err(CompileError::ImplLimitExceeded { what: "classes", found, limit }),
        _ => Ok(()),
    }
}

#[test]
fn peers_beyond_the_room_change_nothing_until_numbers_are_released() {
    let mut cluster = cluster();
    cluster.insert_policy(asks_for_ten_labels("web"));
    let mut compiler = Compiler::default();
    label_by_number(&mut cluster, 1..21);
    compiler.update_within(&cluster, below(50)).unwrap();
    label_by_number(&mut cluster, 21..41);
    let last = compiler.update_within(&cluster, below(50)).unwrap();
    assert_eq!(last.faults, []);

    // No policy is new, so that none is to blame, and leaving one out would make no room.
    label_by_number(&mut cluster, 41..61);
    let mut tries = 0;
    let result = compiler.update_within(&cluster, |update| {
        tries += 1;
        below(50)(update)
    });
    assert!(matches!(result, Err(CompileError::ImplLimitExceeded { what: "classes", .. })), "{result:?}");
    assert_eq!(tries, 1);

    compiler.release(last.generation);
    let healed = compiler.update_within(&cluster, below(50)).unwrap();
    assert_eq!(healed.faults, []);
    for (at, number) in (0..).zip(41..61_u16) {
        for bit in 0..10 {
            let tuple = Tuple::ingress([10, 1, 0, at].into(), Protocol::TCP, bit + 1);
            let expected = if number >> bit & 1 == 1 { Verdict::Allow } else { Verdict::Deny };
            assert_eq!(healed.decide(&pod("p1"), &tuple).unwrap().verdict, expected, "pod {number}, port {}", bit + 1);
        }
    }
}

#[test]
fn a_policy_that_was_refused_for_numbers_of_peers_alone_has_them_after_release() {
    let mut cluster = cluster();
    cluster.insert_policy(asks_for_ten_labels("web"));
    let mut compiler = Compiler::default();
    label_by_number(&mut cluster, 1..31);
    compiler.update_within(&cluster, below(51)).unwrap();
    assert!(!compiler.is_unreleased());
    label_by_number(&mut cluster, 41..61);
    let peer = Peer::Pods(pods("n", LabelSelector::default()));
    cluster.insert_policy(ingress("new", has("app", "b"), vec![allow(vec![peer], vec![tcp(80, 80)])]));
    let update = compiler.update_within(&cluster, below(51)).unwrap();
    assert_eq!(refused(&update)[0].0, ["n/new"]);
    // Only peers have changed: all that was asked, and every policy set, is in use still.
    assert!(update.retiring.is_empty());
    assert!(compiler.is_unreleased());

    compiler.release(update.generation);
    assert!(!compiler.is_unreleased());
    let update = compiler.update_within(&cluster, below(51)).unwrap();
    assert_eq!(update.faults, []);
    assert_eq!(verdict(&update, "p2", 1, 80).verdict, Verdict::Allow);
}

#[test]
fn a_policy_whose_port_names_are_too_much_is_left_out_though_it_asks_for_anybody() {
    let mut cluster = cluster();
    for number in 0..60_u16 {
        let name = format!("port{}", number % 10);
        let port = NamedPort { name, protocol: Protocol::TCP, port: 1000 + number };
        let there = Pod { ports: [port].into(), ..Pod::new([], [[10, 1, 0, number as u8].into()]) };
        cluster.pods.insert(pod(&format!("peer{number}")), there);
    }
    let mut compiler = Compiler::default();
    compiler.update_within(&cluster, below(50)).unwrap();
    let named = |n| PortMatch { protocol: Protocol::TCP, port: PortSpec::Named(format!("port{n}")) };
    let rule = Rule {
        action: Action::Allow,
        peers: Peers::Any,
        ports: Ports::OneOf((0..10).map(named).collect()),
        schedule: None,
        log: false,
    };
    let subject = pods("n", has("app", "a"));
    let names = Policy {
        id: PolicyId::new("n", "names"),
        priority: 0,
        mode: Mode::Enforce,
        subject,
        ingress: None,
        egress: Some(vec![rule]),
    };
    cluster.insert_policy(names);
    let update = compiler.update_within(&cluster, below(50)).unwrap();
    assert_eq!(refused(&update)[0].0, ["n/names"]);
    let to = |number: u8, port| {
        let tuple = Tuple::egress([10, 1, 0, number].into(), Protocol::TCP, port);
        update.decide(&pod("p1"), &tuple).unwrap()
    };
    assert_eq!(to(7, 1007), CLOSED);
    assert_eq!(verdict(&update, "p1", 2, 80).verdict, Verdict::Allow, "`web` is enforced still");

    // The same with room for it.
    let update = compiler.update_within(&cluster, below(200)).unwrap();
    assert_eq!(update.faults, []);
    let tuple = Tuple::egress([10, 1, 0, 7].into(), Protocol::TCP, 1007);
    assert_eq!(update.decide(&pod("p1"), &tuple).unwrap().verdict, Verdict::Allow);
}

#[test]
fn an_address_of_two_pods_is_nobodys_until_one_of_them_goes() {
    let mut cluster = cluster();
    let mut compiler = Compiler::default();
    compiler.update(&cluster).unwrap();
    cluster.pods.insert(pod("twin"), Pod::new([("app", "b")], [[10, 0, 0, 2].into()]));
    let update = compiler.update(&cluster).unwrap();
    assert_eq!(
        update.faults.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["address 10.0.0.2 is claimed by n/p2 and n/twin: no selector allows it; remove it from those that are gone"]
    );
    assert_eq!(verdict(&update, "p1", 2, 80), Leaf { verdict: Verdict::Deny, rule: RuleId::ISOLATED });
    assert_eq!(verdict(&update, "p1", 4, 80).verdict, Verdict::Allow);
    let believing = Compiler::default().with_planted_bug(PlantedBug::ClaimsBelieved).update(&cluster).unwrap();
    assert_eq!(verdict(&believing, "p1", 2, 80).verdict, Verdict::Allow, "the twin without the guard");

    // What denies one of them denies the address, whatever comes later.
    let deny = Rule { action: Action::Deny, ..allow(vec![Peer::Pods(pods("n", has("tier", "x")))], vec![tcp(80, 80)]) };
    let block = Peer::Block(IpBlock { cidr: "10.0.0.0/24".parse().unwrap(), except: vec![] });
    cluster.insert_policy(ingress("web", has("app", "a"), vec![deny, allow(vec![block], vec![tcp(80, 80)])]));
    assert_eq!(verdict(&compiler.update(&cluster).unwrap(), "p1", 2, 80).verdict, Verdict::Allow);
    cluster.pods.get_mut(&pod("twin")).unwrap().labels = [("tier".to_owned(), "x".to_owned())].into();
    assert_eq!(verdict(&compiler.update(&cluster).unwrap(), "p1", 2, 80).verdict, Verdict::Deny);
    assert_eq!(verdict(&compiler.update(&cluster).unwrap(), "p1", 4, 80).verdict, Verdict::Allow);

    cluster.pods.remove(&pod("twin"));
    let update = compiler.update(&cluster).unwrap();
    assert_eq!(update.faults, []);
    assert_eq!(verdict(&update, "p1", 2, 80).verdict, Verdict::Allow);
}

#[test]
fn empty_lists_of_peers_or_ports_match_nothing() {
    let mut cluster = cluster();
    cluster.policies.clear();
    let any = Peers::Any;
    let none = Rule { action: Action::Allow, peers: any, ports: Ports::OneOf(vec![]), schedule: None, log: false };
    cluster.insert_policy(ingress("p", has("app", "a"), vec![allow(vec![], vec![tcp(1, 9)]), none]));
    let update = Compiler::default().update(&cluster).unwrap();
    let tuple = Tuple::ingress([10, 0, 0, 2].into(), Protocol::TCP, 5);
    assert_eq!(update.decide(&pod("p1"), &tuple).unwrap().rule, RuleId::ISOLATED);
    let oracle = dcenet_policy::eval::evaluate(&cluster, &pod("p1"), &tuple).unwrap();
    assert_eq!(oracle.verdict, Verdict::Deny);
}

/// A policy of the cluster for the pods with the label app=a, on ingress.
fn of_tier(tier: Tier, priority: u16, name: &str, rules: Vec<Rule>) -> Policy {
    let subject = PodMatch { namespaces: NamespaceMatch::Selected(LabelSelector::default()), pods: has("app", "a") };
    Policy {
        id: PolicyId::cluster(tier, name),
        priority,
        mode: Mode::Enforce,
        subject,
        ingress: Some(rules),
        egress: None,
    }
}

/// What evaluator and compiler say of packets from 10.0.0.2 (p2) and from a stranger to a port of p1.
fn told(cluster: &Cluster, port: u16) -> [String; 2] {
    let update = Compiler::default().update(cluster).unwrap();
    compare(cluster, &update, tuples(&mut Rng::new(1), cluster, 500), &mut Tally::default()).unwrap();
    ["10.0.0.2", "192.0.2.77"].map(|peer| {
        let tuple = Tuple::ingress(peer.parse().unwrap(), Protocol::TCP, port);
        let evaluated = eval::evaluate(cluster, &pod("p1"), &tuple).unwrap();
        let compiled = update.decide(&pod("p1"), &tuple).unwrap();
        assert_eq!(evaluated.verdict, compiled.verdict);
        if let eval::Reason::Rule(rule) = &evaluated.reason {
            assert_eq!(update.rules.rule(compiled.rule), Some(rule));
        }
        evaluated.to_string()
    })
}

#[test]
fn tiers_are_tried_in_order_and_isolation_ends_them() {
    let to = |action, port| Rule {
        action,
        peers: Peers::Any,
        ports: Ports::OneOf(vec![tcp(port, port)]),
        schedule: None,
        log: false,
    };
    let mut cluster = cluster();
    cluster.policies.clear();
    assert_eq!(told(&cluster, 80), ["allow: no policy governs the pod in this direction"; 2]);

    // The baseline holds where nothing isolates, and allows what it does not name.
    cluster.insert_policy(of_tier(Tier::Baseline, 0, "b", vec![to(Action::Deny, 80), to(Action::Pass, 81)]));
    assert_eq!(told(&cluster, 80), ["deny: baseline:b ingress[0] ports[0]"; 2]);
    let unmatched = "allow: no rule of baseline:b decides, and no policy isolates the pod";
    assert_eq!(told(&cluster, 81), [unmatched; 2]);
    assert_eq!(told(&cluster, 82), [unmatched; 2]);

    // Isolated by a NetworkPolicy, the baseline is never asked.
    let from_b = vec![Peer::Pods(pods("n", has("app", "b")))];
    cluster.insert_policy(ingress("np", has("app", "a"), vec![allow(from_b.clone(), vec![tcp(80, 80)])]));
    let isolated = "deny: isolated by n/np; no rule matches";
    assert_eq!(told(&cluster, 80), ["allow: n/np ingress[0] from[0] ports[0]", isolated]);
    assert_eq!(told(&cluster, 81), [isolated; 2]);

    // Admin is tried first; what it does not name goes on.
    cluster.insert_policy(of_tier(Tier::Admin, 5, "late", vec![to(Action::Allow, 80), to(Action::Allow, 81)]));
    assert_eq!(told(&cluster, 81), ["allow: admin:late ingress[1] ports[0]"; 2]);
    assert_eq!(told(&cluster, 82), [isolated; 2]);

    // A rule that passes skips the rest of its tier, of later priorities too, for what it matches.
    let pass_b =
        Rule { action: Action::Pass, peers: Peers::OneOf(from_b), ports: Ports::Any, schedule: None, log: false };
    cluster.insert_policy(of_tier(Tier::Admin, 4, "zz-early", vec![pass_b]));
    assert_eq!(
        told(&cluster, 80),
        ["allow: n/np ingress[0] from[0] ports[0]", "allow: admin:late ingress[0] ports[0]"]
    );
    assert_eq!(told(&cluster, 81), [isolated, "allow: admin:late ingress[1] ports[0]"]);

    // Equal priorities go by name.
    cluster.insert_policy(of_tier(Tier::Admin, 5, "a-first", vec![to(Action::Deny, 81)]));
    assert_eq!(told(&cluster, 81), [isolated, "deny: admin:a-first ingress[0] ports[0]"]);
}

#[test]
fn the_own_node_belongs_to_the_tier_of_namespaces() {
    let mut cluster = cluster();
    cluster.policies.clear();
    cluster.nodes.insert("n1".to_owned(), ["192.0.2.77".parse().unwrap()].into());
    cluster.pods.get_mut(&pod("p1")).unwrap().node = Some("n1".to_owned());
    cluster.insert_policy(ingress("np", has("app", "a"), Vec::new()));
    assert_eq!(told(&cluster, 80)[1], "allow: the peer is the pod's own node");
    let deny = Rule { action: Action::Deny, peers: Peers::Any, ports: Ports::Any, schedule: None, log: false };
    cluster.insert_policy(of_tier(Tier::Admin, 0, "deny", vec![deny.clone()]));
    assert_eq!(told(&cluster, 80)[1], "deny: admin:deny ingress[0]");
    cluster.insert_policy(of_tier(Tier::Admin, 0, "deny", vec![Rule { action: Action::Pass, ..deny }]));
    assert_eq!(told(&cluster, 80)[1], "allow: the peer is the pod's own node");
    // On a segment anybody may have the node's address.
    cluster.pods.get_mut(&pod("p1")).unwrap().on_segment = true;
    assert_eq!(told(&cluster, 80)[1], "deny: isolated by n/np; no rule matches");
    let update = Compiler::default().update(&cluster).unwrap();
    compare(&cluster, &update, tuples(&mut Rng::new(3), &cluster, 200), &mut Tally::default()).unwrap();
}

#[test]
fn a_refused_policy_that_passes_closes_what_is_behind_it_in_every_tier() {
    let to = |action, port| Rule {
        action,
        peers: Peers::Any,
        ports: Ports::OneOf(vec![tcp(port, port)]),
        schedule: None,
        log: false,
    };
    let mut cluster = cluster();
    cluster.policies.clear();
    cluster.insert_policy(of_tier(Tier::Admin, 1, "before", vec![to(Action::Allow, 1)]));
    let large = vec![to(Action::Pass, 2), to(Action::Allow, 3), to(Action::Allow, 4), to(Action::Allow, 5)];
    cluster.insert_policy(of_tier(Tier::Admin, 2, "large", large));
    cluster.insert_policy(of_tier(Tier::Baseline, 0, "behind", vec![to(Action::Allow, 6)]));
    let mut compiler = Compiler::new(Scope::Cluster, Limits { entries: 3, ..Limits::default() });
    let verdicts = |update: &dcenet_policy::Update| [1, 2, 3, 6, 7].map(|port| verdict(update, "p1", 2, port).verdict);
    let (yes, no) = (Verdict::Allow, Verdict::Deny);
    let update = compiler.update(&cluster).unwrap();
    assert_eq!(refused(&update)[0].0, ["admin:large"]);
    assert_eq!(verdicts(&update), [yes, no, no, no, no]);
    compare(&cluster, &update, tuples(&mut Rng::new(1), &cluster, 200), &mut Tally::default()).unwrap();
    // Where it can only allow, the rest holds.
    let large = cluster.policies.get_mut(&PolicyId::cluster(Tier::Admin, "large")).unwrap();
    large.ingress.as_mut().unwrap()[0].action = Action::Allow;
    let update = compiler.update(&cluster).unwrap();
    assert_eq!(refused(&update)[0].0, ["admin:large"]);
    assert_eq!(verdicts(&update), [yes, yes, yes, yes, yes]);
    compare(&cluster, &update, tuples(&mut Rng::new(2), &cluster, 200), &mut Tally::default()).unwrap();
}

#[test]
fn a_rule_that_passes_denies_an_address_that_several_claim() {
    let mut cluster = cluster();
    cluster.policies.clear();
    let from_b = Peers::OneOf(vec![Peer::Pods(pods("n", has("app", "b")))]);
    let pass = Rule { action: Action::Pass, peers: from_b, ports: Ports::Any, schedule: None, log: false };
    let deny = Rule { action: Action::Deny, peers: Peers::Any, ports: Ports::Any, schedule: None, log: false };
    cluster.insert_policy(of_tier(Tier::Admin, 0, "pass", vec![pass, deny]));
    let passed = "allow: no rule of admin:pass decides, and no policy isolates the pod";
    assert_eq!(told(&cluster, 80), [passed, "deny: admin:pass ingress[1]"]);
    let claimed = cluster.pods[&pod("p2")].addresses.clone();
    cluster.pods.get_mut(&pod("p3")).unwrap().addresses.extend(claimed);
    assert_eq!(told(&cluster, 80)[0], "deny: admin:pass ingress[0] from[0]");
}

#[test]
fn a_rule_that_passes_counts_what_it_reaches_and_not_what_it_might() {
    let rule = |action, ports: std::ops::RangeInclusive<u16>| Rule {
        action,
        peers: Peers::Any,
        ports: Ports::OneOf(ports.map(|port| tcp(port, port)).collect()),
        schedule: None,
        log: false,
    };
    let mut cluster = cluster();
    cluster.policies.clear();
    cluster.insert_policy(of_tier(Tier::Baseline, 0, "behind", vec![rule(Action::Deny, 11..=20)]));
    let mut compiler = Compiler::new(Scope::Cluster, Limits { entries: 24, ..Limits::default() });
    let verdicts = |update: &dcenet_policy::Update| [9, 10, 11, 20].map(|port| verdict(update, "p1", 2, port).verdict);
    let (yes, no) = (Verdict::Allow, Verdict::Deny);
    // Ten pass, none of them to what is behind, and then three of them: 20 and 23 entries.
    for (first, wanted) in [(1, [yes, yes, no, no]), (4, [yes, yes, no, no])] {
        cluster.insert_policy(of_tier(Tier::Admin, 0, "pass", vec![rule(Action::Pass, first..=first + 9)]));
        let update = compiler.update(&cluster).unwrap();
        assert_eq!(refused(&update), []);
        assert_eq!(verdicts(&update), wanted);
        compare(&cluster, &update, tuples(&mut Rng::new(1), &cluster, 200), &mut Tally::default()).unwrap();
    }
    // Five of them: 25 entries.
    cluster.insert_policy(of_tier(Tier::Admin, 0, "pass", vec![rule(Action::Pass, 6..=15)]));
    let update = compiler.update(&cluster).unwrap();
    assert_eq!(refused(&update)[0].0, ["admin:pass", "baseline:behind"]);
    assert_eq!(verdicts(&update), [no; 4]);
}

#[test]
fn a_group_that_changes_touches_classes_and_no_program() {
    let block = |cidr: &str| IpBlock { cidr: cidr.parse().unwrap(), except: Vec::new() };
    let mut cluster = cluster();
    cluster.policies.clear();
    let peers = Peers::OneOf(vec![Peer::Group("partners".to_owned())]);
    cluster.insert_policy(of_tier(
        Tier::Admin,
        0,
        "deny",
        vec![Rule { action: Action::Deny, peers, ports: Ports::Any, schedule: None, log: false }],
    ));
    cluster.catalog.groups.insert("partners".to_owned(), vec![block("203.0.113.0/24")]);
    let mut compiler = Compiler::default();
    let before = compiler.update(&cluster).unwrap();
    let from = |update: &dcenet_policy::Update, address: &str| {
        let question = Tuple::ingress(address.parse().unwrap(), Protocol::TCP, 80);
        update.decide(&pod("p1"), &question).unwrap().verdict
    };
    assert_eq!(["203.0.113.9", "198.51.100.9"].map(|at| from(&before, at)), [Verdict::Deny, Verdict::Allow]);
    cluster.catalog.groups.insert("partners".to_owned(), vec![block("198.51.100.0/24"), block("2001:db8::/32")]);
    let after = compiler.update(&cluster).unwrap();
    assert_eq!(["203.0.113.9", "198.51.100.9"].map(|at| from(&after, at)), [Verdict::Allow, Verdict::Deny]);
    assert!(!after.table_changes.is_empty());
    let [old, new] = [&before, &after].map(|update| &update.endpoints[&pod("p1")].ingress);
    assert!(Arc::ptr_eq(&old.program, &new.program), "the program is as it was");
}
