//! Rules that hold at times.

#![cfg(feature = "yaml")]

use dcenet_policy::analysis::{Finding, Findings, Thresholds, Way, access, diff, findings};
use dcenet_policy::compiler::{CompileError, Scope, Update};
use dcenet_policy::isolation::Fault;
use dcenet_policy::model::{Cluster, Pod, PodId, Protocol, Time, Tuple, Verdict};
use dcenet_policy::render::{networkpolicy, nftables};
use dcenet_policy::sources::kubernetes::Documents;
use dcenet_policy::{Compiler, eval};

/// Port 22 in office hours, nothing else from `bad` at night, and what passes on Sundays is not isolated.
const TEXT: &str = r#"
apiVersion: dcenet.io/v1alpha1
kind: Schedule
metadata: { name: office }
spec:
  utcOffset: "+01:00"
  windows: [ { days: [ mon, tue, wed, thu, fri ], from: "08:00", until: "18:00" } ]
---
apiVersion: dcenet.io/v1alpha1
kind: Schedule
metadata: { name: night }
spec: { windows: [ { from: "22:00", until: "06:00" } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: db, namespace: shop }
spec:
  ingress:
  - { action: allow, services: [ { protocol: tcp, ports: [ 22 ] } ], schedule: office }
  - { action: deny, from: [ { cidrs: [ 10.0.0.3/32 ] } ], schedule: night }
  - { action: allow, services: [ { protocol: tcp, ports: [ 80 ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: first }
spec:
  tier: admin
  priority: 1
  ingress:
  - { action: pass, services: [ { protocol: tcp, ports: [ 80 ] } ], schedule: night }
  - { action: deny, services: [ { protocol: tcp, ports: [ 80 ] } ], from: [ { cidrs: [ 10.0.0.4/32 ] } ] }
"#;

/// 2026-11-23, a Monday, 00:00 UTC.
const MONDAY: Time = 1_795_392_000;

fn hour(day: i64, hour: i64) -> Option<Time> {
    Some(MONDAY + day * 86_400 + hour * 3600)
}

fn shop(text: &str) -> Cluster {
    let mut cluster = Documents::default().with_yaml("shop.yaml", text).unwrap().into_cluster();
    cluster.insert_namespace("shop", []);
    cluster.pods.insert(PodId::new("shop", "db"), Pod::new([], [[10, 0, 0, 1].into()]));
    cluster
}

/// By evaluator and compiler.
fn judged(compiler: &mut Compiler, cluster: &Cluster, peer: u8, port: u16) -> Verdict {
    let (db, tuple) = (PodId::new("shop", "db"), Tuple::ingress([10, 0, 0, peer].into(), Protocol::TCP, port));
    let said = eval::evaluate(cluster, &db, &tuple).unwrap();
    let found = compiler.update(cluster).unwrap();
    let leaf = found.decide(&db, &tuple).unwrap();
    assert_eq!(
        (leaf.verdict, found.rules.rule(leaf.rule).is_some()),
        (said.verdict, matches!(said.reason, eval::Reason::Rule(_)))
    );
    // What renderers and analyses start from comes to the same.
    assert_eq!(eval::evaluate(&cluster.in_force(), &db, &tuple).unwrap().verdict, said.verdict);
    said.verdict
}

#[test]
fn rules_are_there_in_their_hours_and_of_one_compiler() {
    use Verdict::{Allow, Deny};
    let mut cluster = shop(TEXT);
    let mut compiler = Compiler::default();
    for (time, ssh, web, web_of_3, web_of_4, what) in [
        (hour(0, 6), Deny, Allow, Allow, Deny, "06:00 UTC is neither"),
        (hour(0, 7), Allow, Allow, Allow, Deny, "the office opens"),
        (hour(0, 17), Deny, Allow, Allow, Deny, "and closes"),
        (hour(5, 10), Deny, Allow, Allow, Deny, "not on Saturdays"),
        (hour(0, 22), Deny, Allow, Deny, Allow, "night: 3 is denied, and 4 passes by what would deny it"),
        (hour(1, 5), Deny, Allow, Deny, Allow, "still"),
        (hour(1, 6), Deny, Allow, Allow, Deny, "no longer"),
        (None, Deny, Deny, Deny, Deny, "whoever does not know the time allows nothing by it"),
    ] {
        cluster.time = time;
        let found =
            [(2, 22), (2, 80), (3, 80), (4, 80)].map(|(peer, port)| judged(&mut compiler, &cluster, peer, port));
        assert_eq!(found, [ssh, web, web_of_3, web_of_4], "{what}");
        assert_eq!(judged(&mut compiler, &cluster, 2, 23), Deny);
    }
    // Nor without the schedules.
    let mut unknown = cluster.clone();
    unknown.time = hour(0, 7);
    unknown.catalog.schedules.clear();
    let found = [(2, 22), (2, 80), (3, 80)].map(|(peer, port)| judged(&mut compiler, &unknown, peer, port));
    assert_eq!(found, [Deny; 3]);
    assert_eq!(cluster.catalog.next_change(MONDAY), hour(0, 6), "the night ends before the office opens");
}

#[test]
fn a_schedule_that_is_not_given_is_told_of_and_one_misspelt_is_refused() {
    let without = TEXT.replace("name: night", "name: nights");
    let documents = Documents::default().with_yaml("shop.yaml", &without).unwrap();
    let told: Vec<String> = documents.unknown_peers().iter().map(|(id, what)| format!("{id}: {what}")).collect();
    assert_eq!(told, ["admin:policy/first: there is no Schedule night", "shop/policy/db: there is no Schedule night"]);
    for (from, to, error) in [
        (
            "\"08:00\"",
            "\"8:00\"",
            "shop.yaml:7: spec.windows[0].from: \"8:00\": must be a time of day from \"00:00\" to \"23:59\", in quotes",
        ),
        (
            "\"18:00\"",
            "\"24:01\"",
            "shop.yaml:7: spec.windows[0].until: \"24:01\": must be a time of day from \"00:01\" to \"24:00\", in quotes; \"24:00\" is the day's end",
        ),
        (
            ", until: \"18:00\"",
            "",
            "shop.yaml:7: spec.windows[0].until: nothing: is required beside the other; leave out both for the whole day",
        ),
        (
            "mon, tue",
            "mon, tuesday",
            "shop.yaml:7: spec.windows[0].days[1]: \"tuesday\": must be mon or tue or wed or thu or fri or sat or sun",
        ),
        (
            "[ mon, tue, wed, thu, fri ]",
            "[]",
            "shop.yaml:7: spec.windows[0].days: []: must have at least one day; leave it out for all",
        ),
        (
            "\"+01:00\"",
            "CET",
            "shop.yaml:6: spec.utcOffset: \"CET\": must be a distance from UTC such as \"+01:00\" or \"-03:30\"",
        ),
        ("schedule: office", "schedule: Office", "shop.yaml:19: spec.ingress[0].schedule: \"Office\": "),
    ] {
        let text = TEXT.replacen(from, to, 1);
        assert_ne!(text, TEXT, "{from}");
        let found = Documents::default().with_yaml("shop.yaml", &text).unwrap_err().to_string();
        let (place, what) = error.split_once(" spec").unwrap();
        assert!(found.starts_with(place) && found.contains(&format!(" spec{what}")), "{found}");
    }
    let of_windows = |count: usize| {
        let listed = vec!["{}"; count].join(", ");
        let text =
            TEXT.replacen("windows: [ { from: \"22:00\", until: \"06:00\" } ]", &format!("windows: [ {listed} ]"), 1);
        Documents::default().with_yaml("shop.yaml", &text).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(of_windows(100), Ok(()));
    let error = of_windows(101).unwrap_err();
    assert!(error.ends_with("spec.windows: 101 windows, more than the 100 that this implementation takes"), "{error}");
}

#[test]
fn renderings_are_of_their_time_and_say_so() {
    let mut cluster = shop(TEXT);
    cluster.time = hour(0, 7);
    let said = |omitted: &[dcenet_policy::render::Omission]| -> Vec<String> {
        let all = omitted.iter().map(ToString::to_string);
        all.filter(|text| text.contains("schedule")).collect()
    };
    let expected = [
        "admin:policy/first ingress[0]: the schedule night: it does not hold now, and is left out; render again when that changes",
        "shop/policy/db ingress[0]: the schedule office: it holds now, and stays; render again when that changes",
        "shop/policy/db ingress[1]: the schedule night: it does not hold now, and is left out; render again when that changes",
    ];
    let objects = networkpolicy::render(&cluster);
    assert_eq!(said(&objects.omitted), expected);
    let script = nftables::render(&cluster, &Scope::Cluster).unwrap();
    assert_eq!(said(&script.omitted), expected);
    let resolved = cluster.in_force().into_owned();
    assert_eq!(script.script, nftables::render(&resolved, &Scope::Cluster).unwrap().script);
    // What does not hold stops nothing behind it.
    let mut without = cluster.clone();
    for policy in without.policies.values_mut() {
        policy.ingress.iter_mut().for_each(|rules| rules.retain(|rule| rule.schedule.as_deref() != Some("night")));
    }
    assert_eq!(objects.text(), networkpolicy::render(&without).text());
    let stopped = |cluster: &Cluster| {
        let omitted = networkpolicy::render(cluster).omitted;
        omitted.iter().any(|omission| omission.reason.contains("may stop it"))
    };
    assert!(objects.text().contains("\"port\": 80") && !stopped(&cluster));
    cluster.time = hour(0, 23);
    assert!(stopped(&cluster), "the twin: it holds");
    cluster.time = hour(0, 19);
    assert_ne!(script.script, nftables::render(&cluster, &Scope::Cluster).unwrap().script);
}

#[test]
fn a_rule_that_does_not_hold_asks_for_no_room() {
    // Blocks of one rule are one class; with a port of its own for each they are many.
    let rules = |count: u8, second: u8, schedule: &str| -> String {
        let rule = |n| {
            format!(
                "  - {{ action: allow, from: [ {{ cidrs: [ 10.{second}.{n}.0/24 ] }} ], \
                 services: [ {{ protocol: tcp, ports: [ {} ] }} ]{schedule} }}\n",
                u16::from(n) + 1
            )
        };
        (0..count).map(rule).collect()
    };
    let policy = |name: &str, rules: String| {
        let metadata = format!("metadata: {{ name: {name}, namespace: shop }}");
        format!("---\napiVersion: dcenet.io/v1alpha1\nkind: Policy\n{metadata}\nspec:\n  ingress:\n{rules}")
    };
    let at_night = policy("watch", rules(50, 1, ", schedule: night"));
    let late = policy("late", rules(20, 2, ""));
    let refused = |compiler: &mut Compiler, cluster: &Cluster, limit: usize| -> Vec<String> {
        let room = |update: &Update| match update.classes {
            found if found > limit => Err(CompileError::ImplLimitExceeded { what: "classes", found, limit }),
            _ => Ok(()),
        };
        let update = compiler.update_within(cluster, room).unwrap();
        let names = update.faults.iter().flat_map(|fault| match fault {
            Fault::Refused { policies, .. } => policies.iter().map(ToString::to_string).collect::<Vec<_>>(),
            other => panic!("{other}"),
        });
        names.collect()
    };
    let (before, after) = (shop(&format!("{TEXT}{at_night}")), shop(&format!("{TEXT}{at_night}{late}")));
    for (time, limit) in [(hour(0, 12), 10), (hour(0, 23), 60)] {
        let at = |cluster: &Cluster| Cluster { time, ..cluster.clone() };
        let mut compiler = Compiler::default();
        assert_eq!(refused(&mut compiler, &at(&before), limit), [""; 0]);
        assert_eq!(refused(&mut compiler, &at(&after), limit), ["shop/policy/late"], "{time:?}: who is in force stays");
    }
    // Of two that come together the one that asks for more goes, which at noon is another.
    let at_once = |time, limit| refused(&mut Compiler::default(), &Cluster { time, ..after.clone() }, limit);
    assert_eq!(at_once(hour(0, 23), 30), ["shop/policy/watch"]);
    assert_eq!(at_once(hour(0, 12), 10), ["shop/policy/late"]);
}

/// The kinds of what is found, and of which rules.
fn found(cluster: &Cluster) -> Vec<String> {
    let Findings { findings, .. } = findings(cluster, &Thresholds::default()).unwrap();
    let idle = findings.iter().filter(|f| matches!(f, Finding::Shadowed { .. } | Finding::Duplicate { .. }));
    idle.map(ToString::to_string).collect()
}

#[test]
fn rules_are_called_idle_only_where_they_are_so_at_all_times() {
    let text = r#"
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: idle, namespace: shop }
spec:
  ingress:
  - { action: deny, from: [ { cidrs: [ 10.0.0.3/32 ] } ], schedule: office }
  - { action: deny, from: [ { cidrs: [ 10.0.0.3/32 ] } ] }
  - { action: allow, from: [ { cidrs: [ 10.0.0.5/32 ] } ] }
  - { action: allow, from: [ { cidrs: [ 10.0.0.5/32 ] } ], schedule: office }
  - { action: allow, from: [ { cidrs: [ 10.0.0.6/32 ] } ], services: [ { protocol: tcp, ports: [ 90 ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: shut }
spec:
  tier: admin
  priority: 1
  ingress:
  - { action: pass, services: [ { protocol: tcp, ports: [ 90 ] } ], schedule: night }
  - { action: deny, services: [ { protocol: tcp, ports: [ 90 ] } ] }
"#;
    let schedules = TEXT.split("---\napiVersion: dcenet.io/v1alpha1\nkind: Policy").next().unwrap();
    let at = |text: &str, time| Cluster { time, ..shop(&format!("{schedules}---{text}")) };
    let duplicate = "duplicate: shop/policy/idle ingress[3] repeats shop/policy/idle ingress[2]";
    assert_eq!(found(&at(text, hour(0, 12))), [duplicate], "it is there when the other is, and always idle");
    assert_eq!(found(&at(text, hour(0, 20))), [""; 0]);
    // The twins: for all time, what takes their packets does so.
    let always = text.replace("/32 ] } ], schedule: office }\n  - { action: deny", "/32 ] } ] }\n  - { action: deny");
    assert_ne!(always, text);
    let second = "duplicate: shop/policy/idle ingress[1] repeats shop/policy/idle ingress[0]";
    assert_eq!(found(&at(&always, hour(0, 12))), [second, duplicate]);
    let without =
        text.replace("  - { action: pass, services: [ { protocol: tcp, ports: [ 90 ] } ], schedule: night }\n", "");
    assert_ne!(without, text);
    let shadowed = "shadowed: shop/policy/idle ingress[4] by admin:policy/shut ingress[0]";
    assert_eq!(found(&at(&without, hour(0, 20))), [shadowed]);
}

#[test]
fn answers_say_of_which_rules_they_are_as_of_now() {
    let open = "---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: open, namespace: shop }
spec: { ingress: [ { action: allow, schedule: night } ] }
";
    let [mut before, mut after] = [TEXT.to_owned(), format!("{TEXT}{open}")].map(|text| shop(&text));
    let mut told = |time| {
        (before.time, after.time) = (time, time);
        assert_eq!(diff(&before, &before).unwrap().scheduled, [], "equal clusters are so at all times");
        let told = diff(&before, &after).unwrap();
        (told.changes.len(), told.to_string(), access(&after, &PodId::new("shop", "db"), Way::To).unwrap().to_string())
    };
    let (changes, diff, access) = told(hour(0, 12));
    let expected = [
        "scheduled: admin:policy/first ingress[0]: night does not hold now; ask again for other times\n",
        "scheduled: shop/policy/db ingress[0]: office holds now; ask again for other times\n",
        "scheduled: shop/policy/db ingress[1]: night does not hold now; ask again for other times\n",
        "scheduled: shop/policy/open ingress[0]: night does not hold now; ask again for other times\n",
    ];
    assert_eq!((changes, diff), (0, expected.concat()));
    assert!(access.ends_with(&expected.concat()), "{access}");
    let (changes, diff, _) = told(hour(0, 23));
    assert!(changes > 0 && diff.contains("open ingress[0]: night holds now"), "{diff}");
    assert!(told(None).1.contains("open ingress[0]: night is not known to hold"));
    let found = findings(&shop(TEXT), &Thresholds::default()).unwrap();
    assert_eq!(found.scheduled.len(), 3);
}
