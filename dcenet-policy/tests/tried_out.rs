//! Policies that are tried out: they change no verdict, and of each packet it is told what they would change.

#![cfg(feature = "yaml")]

use dcenet_policy::compiler::{Audit, Decider, Limits, Scope};
use dcenet_policy::ir::{RuleId, RuleList};
use dcenet_policy::isolation::Fault;
use dcenet_policy::model::{Cluster, Mode, Pod, PodId, PolicyId, Protocol, Tuple, Verdict};
use dcenet_policy::render::{networkpolicy, nftables};
use dcenet_policy::sources::native;
use dcenet_policy::test_support::{PlantedBug, compare_random};
use dcenet_policy::{Compiler, Update, eval};

/// `web` may reach `db` at 5432. Tried out: only at 5432 to 5433, and no telnet to anybody.
const POLICIES: &str = r#"
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: db, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: db } } }
  ingress: [ { action: allow, from: [ { pods: { podSelector: { matchLabels: { app: web } } } } ], services: [ { protocol: tcp, ports: [ 22-23, 5432 ] } ] } ]
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: more, namespace: shop }
spec:
  mode: audit
  subject: { podSelector: { matchLabels: { app: db } } }
  ingress: [ { action: allow, services: [ { protocol: tcp, ports: [ 5433 ] } ] } ]
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: no-telnet }
spec:
  mode: audit
  tier: admin
  priority: 1
  ingress: [ { action: deny, services: [ { protocol: tcp, ports: [ 23 ] } ] } ]
"#;

fn shop() -> Cluster {
    let mut cluster = Cluster::default();
    cluster.insert_namespace("shop", []);
    for (name, number) in [("db", 1), ("web", 2), ("scan", 3)] {
        let pod = Pod::new([("app", name)], [[10, 0, 0, number].into()]);
        cluster.pods.insert(PodId::new("shop", name), pod);
    }
    for policy in native::from_yaml(POLICIES).unwrap() {
        cluster.insert_policy(policy);
    }
    cluster
}

/// The verdict and what decides, and the same with the policies in audit where that is something else.
fn told(update: &Update, pod: &str, peer: u8, port: u16) -> (Verdict, String, Option<(Verdict, String)>) {
    let tuple = Tuple::ingress([10, 0, 0, peer].into(), Protocol::TCP, port);
    let leaf = update.decide(&PodId::new("shop", pod), &tuple).unwrap();
    let audit = update.rules.audit(leaf.rule).map(|Audit { verdict, by }| (*verdict, by.to_string()));
    (leaf.verdict, update.rules.name(leaf.rule), audit)
}

const RULE: &str = "shop/policy/db ingress[0] from[0] ports";
const ISOLATED: &str = "isolated; no rule matches";
const TELNET: &str = "admin:policy/no-telnet ingress[0] ports[0]";
const OPEN: &str = "no policy governs the pod in this direction";

#[test]
fn what_is_tried_out_changes_no_verdict_and_is_told() {
    use Verdict::{Allow, Deny};
    let cluster = shop();
    let mut compiler = Compiler::default();
    let update = compiler.update(&cluster).unwrap();
    let would = |verdict, by: &str| Some((verdict, by.to_owned()));
    for (pod, peer, port, expected) in [
        ("db", 2, 5432, (Allow, format!("{RULE}[1]"), None)),
        ("db", 2, 22, (Allow, format!("{RULE}[0]"), None)),
        ("db", 2, 23, (Allow, format!("{RULE}[0]"), would(Deny, TELNET))),
        ("db", 2, 24, (Deny, ISOLATED.to_owned(), None)),
        ("db", 3, 23, (Deny, ISOLATED.to_owned(), would(Deny, TELNET))),
        ("db", 3, 5433, (Deny, ISOLATED.to_owned(), would(Allow, "shop/policy/more ingress[0] ports[0]"))),
        ("web", 3, 23, (Allow, OPEN.to_owned(), would(Deny, TELNET))),
        ("web", 3, 24, (Allow, OPEN.to_owned(), would(Allow, "no rule matches, and no policy isolates the pod"))),
    ] {
        assert_eq!(told(&update, pod, peer, port), expected, "{pod} from {peer} at {port}");
    }
    let asked = |port| {
        let (db, tuple) = (PodId::new("shop", "db"), Tuple::ingress([10, 0, 0, 2].into(), Protocol::TCP, port));
        eval::audit(&cluster, &eval::Refused::new(), &db, &tuple).unwrap().unwrap().to_string()
    };
    assert_eq!(asked(23), format!("deny: {TELNET}"));
    assert_eq!(asked(5432), format!("allow: {RULE}[1]"));

    // In force, it does what was told, and nothing is left to tell.
    let mut enforced = cluster.clone();
    enforced.policies.values_mut().for_each(|policy| policy.mode = Mode::Enforce);
    let after = compiler.update(&enforced).unwrap();
    assert_eq!(told(&after, "db", 2, 23), (Deny, TELNET.to_owned(), None));
    assert_eq!(told(&after, "db", 3, 5433).0, Allow);
    // And back, with what was released given anew.
    compiler.release(after.generation);
    let back = compiler.update(&cluster).unwrap();
    assert_eq!(told(&back, "db", 2, 23), told(&update, "db", 2, 23));
    assert_eq!(told(&back, "web", 3, 23), told(&update, "web", 3, 23));
}

#[test]
fn the_list_has_both_and_parses_back() {
    let update = Compiler::default().update(&shop()).unwrap();
    let list = &update.endpoints[&PodId::new("shop", "web")].ingress.program.list;
    let text = list.to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..3], ["ingress locals 1", "allow 0 default", "audit"]);
    assert!(lines[3].starts_with("deny ") && lines[3].ends_with(" peers * tcp 23-23"), "{text}");
    assert_eq!(lines[4..], ["allow 4 default"]);
    assert_eq!(text.parse::<RuleList>().unwrap(), *list);
    for wrong in ["audit\n", "audit\nallow 4 default\naudit\nallow 4 default\n"] {
        assert!(format!("ingress locals 1\nallow 0 default\n{wrong}").parse::<RuleList>().is_err(), "{wrong}");
    }
}

#[test]
fn what_is_tried_out_and_too_large_takes_nothing_else_with_it() {
    let mut cluster = shop();
    let many: Vec<String> = (0..40).map(|n| format!("10.{n}.0.0/16")).collect();
    let text = POLICIES.replace(
        "services: [ { protocol: tcp, ports: [ 5433 ] } ]",
        &format!("from: [ {{ cidrs: [ {} ] }} ]", many.join(", ")),
    );
    for policy in native::from_yaml(&text).unwrap() {
        cluster.insert_policy(policy);
    }
    let db = PodId::new("shop", "db");
    let limits = Limits { entries: 20, ..Limits::default() };
    let update = Compiler::new(Scope::Cluster, limits).update(&cluster).unwrap();
    let [Fault::NotAudited { policies, pods, .. }] = &update.faults[..] else { panic!("{:?}", update.faults) };
    assert_eq!(
        policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["admin:policy/no-telnet", "shop/policy/more"]
    );
    assert_eq!(pods.iter().collect::<Vec<_>>(), [&db]);
    assert!(update.faults[0].concerns(&db) && !update.faults[0].closes(&db));
    assert!(update.faults[0].effect().starts_with("not told of"));
    assert_eq!(told(&update, "db", 2, 23), (Verdict::Allow, format!("{RULE}[0]"), None));
    // The other pod is told of still.
    assert_eq!(told(&update, "web", 3, 23).2, Some((Verdict::Deny, TELNET.to_owned())));

    // Too little room in the node's tables: nothing is told, and what is in force stays.
    let room = |update: &Update| match update.classes > 10 {
        true => {
            Err(dcenet_policy::CompileError::ImplLimitExceeded { what: "classes", found: update.classes, limit: 10 })
        }
        false => Ok(()),
    };
    let update = Compiler::default().update_within(&cluster, room).unwrap();
    assert!(update.faults.iter().all(|fault| matches!(fault, Fault::NotAudited { .. })), "{:?}", update.faults);
    assert_eq!(update.faults.len(), 2, "{:?}", update.faults);
    assert_eq!(told(&update, "db", 2, 23), (Verdict::Allow, format!("{RULE}[0]"), None));
    assert_eq!(told(&update, "web", 3, 23), (Verdict::Allow, OPEN.to_owned(), None));
}

#[test]
fn renderings_leave_out_what_is_tried_out_and_say_so() {
    let cluster = shop();
    let in_force = cluster.in_force().into_owned();
    let said = |omitted: &[dcenet_policy::render::Omission]| {
        let audit = omitted.iter().filter(|omission| omission.reason.contains("audit"));
        audit.map(|omission| omission.what.clone()).collect::<Vec<_>>()
    };
    let objects = networkpolicy::render(&cluster);
    assert_eq!(said(&objects.omitted), ["admin:policy/no-telnet", "shop/policy/more"]);
    assert_eq!(objects.text(), networkpolicy::render(&in_force).text());
    let script = nftables::render(&cluster, &Scope::Cluster).unwrap();
    assert_eq!(said(&script.omitted), ["admin:policy/no-telnet", "shop/policy/more"]);
    assert_eq!(script.script, nftables::render(&in_force, &Scope::Cluster).unwrap().script);
}

#[test]
fn a_compiler_that_enforces_or_forgets_what_is_tried_out_is_caught() {
    for (bug, says) in [(PlantedBug::AuditEnforced, "evaluator says"), (PlantedBug::AuditForgotten, "in audit, ")] {
        let caught = compare_random(0..200, 300, || Compiler::default().with_planted_bug(bug));
        let message = caught.expect_err("a wrong compiler must not pass").to_string();
        assert!(message.contains(says), "{message}");
    }
    let tally = compare_random(0..300, 300, Compiler::default).unwrap();
    assert!(tally.audited * 100 > tally.pairs, "{} of {} would change", tally.audited, tally.pairs);
}

#[test]
fn rules_are_logged_as_long_as_their_policies_want_it() {
    let mut cluster = shop();
    let mut compiler = Compiler::default();
    let mut is_logged = |cluster: &Cluster, peer: u8, port| {
        let update = compiler.update(cluster).unwrap();
        let tuple = Tuple::ingress([10, 0, 0, peer].into(), Protocol::TCP, port);
        let rule = update.decide(&PodId::new("shop", "db"), &tuple).unwrap().rule;
        update.rules.is_logged(rule)
    };
    assert!(!is_logged(&cluster, 2, 5432));
    let db = cluster.policies.get_mut(&PolicyId::new("shop", "policy/db")).unwrap();
    db.ingress.iter_mut().flatten().for_each(|rule| rule.log = true);
    assert_eq!([5432, 23].map(|port| is_logged(&cluster, 2, port)), [true; 2], "what would be denied, too");
    assert!(!is_logged(&cluster, 3, 5432), "no rule");
    let omitted = networkpolicy::render(&cluster).omitted;
    assert!(
        omitted.iter().any(|o| o.what == "shop/policy/db ingress[0]" && o.reason.contains("logged")),
        "{omitted:?}"
    );
    let db = cluster.policies.get_mut(&PolicyId::new("shop", "policy/db")).unwrap();
    db.ingress.iter_mut().flatten().for_each(|rule| rule.log = false);
    assert!(!is_logged(&cluster, 2, 5432));
}

#[test]
fn numbers_of_rules_are_read_back_by_the_next_owner() {
    let update = Compiler::default().update(&shop()).unwrap();
    let written: Vec<_> = update.rules.iter().collect();
    assert!(written.iter().any(|(_, named)| named.audit().is_some()));
    let text = serde_json::to_string(&written).unwrap();
    let read: Vec<(RuleId, dcenet_policy::compiler::Named)> = serde_json::from_str(&text).unwrap();
    assert_eq!(read.iter().map(|(id, named)| (*id, named)).collect::<Vec<_>>(), written);
    // As owners before audit wrote them.
    let old = r#"[[6,{"policy":{"namespace":"n","name":"web"},"direction":"ingress","rule":0,"peer":0,"port":null}]]"#;
    let read: Vec<(RuleId, dcenet_policy::compiler::Named)> = serde_json::from_str(old).unwrap();
    assert!(matches!(read[0].1.decider(), Decider::Rule(rule) if rule.policy == PolicyId::new("n", "web")));
}
