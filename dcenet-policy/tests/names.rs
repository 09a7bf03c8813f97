//! Rules by names of the Domain Name System: whom they mean before and after answers are learnt, in evaluator and compiler, and
//! what an answer changes.
#![cfg(feature = "yaml")]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use dcenet_policy::analysis::{Finding, Thresholds, Way, access, diff, findings};
use dcenet_policy::compiler::Scope;
use dcenet_policy::eval::evaluate;
use dcenet_policy::explain::explain;
use dcenet_policy::model::{Action, Cluster, Direction, Peer, Peers, Pod, PodId, Ports, Protocol, Tuple, Verdict};
use dcenet_policy::render::{networkpolicy, nftables};
use dcenet_policy::sources::kubernetes::{Documents, NoteKind};
use dcenet_policy::sources::{clusternetworkpolicy, native};
use dcenet_policy::{Compiler, Update};

use Verdict::{Allow, Deny};

const POLICIES: &str = r#"
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: out, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: web } } }
  egress:
  - action: allow
    to: [ { fqdns: [ db.example.com ] } ]
    services: [ { protocol: tcp, ports: [ 5432 ] } ]
  - action: allow
    to: [ { fqdns: [ "*.Example.com" ] } ]
    services: [ { protocol: tcp, ports: [ 443 ] } ]
  - action: allow
    to: [ { cidrs: [ 198.51.100.0/24 ] } ]
    services: [ { protocol: tcp, ports: [ 53 ] } ]
"#;

const WEB: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

fn shop() -> Cluster {
    let mut cluster = Cluster::default();
    cluster.insert_namespace("shop", []);
    cluster.pods.insert(web(), Pod::new([("app", "web")], [WEB]));
    cluster.pods.insert(PodId::new("shop", "db"), Pod::new([("app", "db")], [address("10.0.0.3")]));
    for policy in native::from_yaml(POLICIES).unwrap() {
        cluster.insert_policy(policy);
    }
    cluster
}

fn web() -> PodId {
    PodId::new("shop", "web")
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn learn(cluster: &mut Cluster, name: &str, addresses: &[&str]) -> BTreeSet<IpAddr> {
    let learnt: BTreeSet<IpAddr> = addresses.iter().map(|text| address(text)).collect();
    for address in &learnt {
        cluster.names.learn(name.parse().unwrap(), *address, 100);
    }
    learnt
}

/// The verdicts for ports 5432, 443 and 53 of an address, on which evaluator and compiler agree.
fn verdicts(cluster: &Cluster, update: &Update, peer: &str) -> [Verdict; 3] {
    [5432, 443, 53].map(|port| {
        let tuple = Tuple::egress(address(peer), Protocol::TCP, port);
        let expected = evaluate(cluster, &web(), &tuple).unwrap().verdict;
        assert_eq!(update.decide(&web(), &tuple).unwrap().verdict, expected, "{peer} {port}");
        expected
    })
}

#[test]
fn a_name_means_what_has_been_learnt_of_it_and_an_answer_makes_no_program() {
    let mut cluster = shop();
    let mut compiler = Compiler::default();
    let first = compiler.update(&cluster).unwrap();
    assert_eq!(verdicts(&cluster, &first, "192.0.2.1"), [Deny; 3]);

    let mut before = first;
    // The name itself, one below that the asterisk means, one two labels below, the one that it does not mean, and another.
    for (name, at, expected) in [
        ("db.example.com", "192.0.2.1", [Allow, Allow, Deny]),
        ("api.example.com", "192.0.2.2", [Deny, Allow, Deny]),
        ("a.b.example.com", "2001:db8::3", [Deny, Allow, Deny]),
        ("example.com", "192.0.2.4", [Deny; 3]),
        ("db.example.org", "192.0.2.5", [Deny; 3]),
        ("notexample.com", "192.0.2.6", [Deny; 3]),
        // Another of the same names.
        ("db.example.com", "192.0.2.7", [Allow, Allow, Deny]),
        // A pod's, and one of a prefix.
        ("api.example.com", "10.0.0.3", [Deny, Allow, Deny]),
        ("api.example.com", "198.51.100.8", [Deny, Allow, Allow]),
    ] {
        let renamed = learn(&mut cluster, name, &[at]);
        assert!(!compiler.would_compile_all(&cluster, [], &renamed), "{name}");
        let after = compiler.update_parts_within(&cluster, [], &renamed, |_| Ok(())).unwrap();
        assert_eq!(verdicts(&cluster, &after, at), expected, "{name}");
        let set = |update: &Update| Arc::clone(&update.endpoints[&web()].egress);
        let is_new = set(&after).program.list != set(&before).program.list;
        // The two rules' names met in no address before, nor did a name and that prefix.
        let is_first = at == "192.0.2.1" || at == "198.51.100.8";
        assert_eq!(is_new, is_first, "{name} at {at}");
        assert!(after.table_changes.exact.keys().all(|changed| *changed == address(at)), "{name}");
        before = after;
    }

    // Nobody is meant on the way in.
    let tuple = Tuple::ingress(address("192.0.2.1"), Protocol::TCP, 5432);
    assert_eq!(evaluate(&cluster, &web(), &tuple).unwrap().verdict, Allow, "ungoverned");
}

#[test]
fn an_address_is_open_under_each_of_its_names_until_the_last_is_over() {
    let mut cluster = shop();
    learn(&mut cluster, "db.example.com", &["192.0.2.1"]);
    cluster.names.learn("api.example.com".parse().unwrap(), address("192.0.2.1"), 200);
    let mut compiler = Compiler::default();
    let both = compiler.update(&cluster).unwrap();
    assert_eq!(verdicts(&cluster, &both, "192.0.2.1"), [Allow, Allow, Deny]);

    cluster.time = Some(70);
    let told = explain(&cluster, &web(), &Tuple::egress(address("192.0.2.1"), Protocol::TCP, 5432)).unwrap();
    assert_eq!(
        told.to_string(),
        "egress of shop/web to 192.0.2.1 (no pod, no node), tcp port 5432\n  \
         allow: shop/policy/out egress[0] to[0] ports[0]\n  \
         governed by shop/policy/out\n  \
         192.0.2.1 is an address of api.example.com for 130 s more\n  \
         192.0.2.1 is an address of db.example.com for 30 s more"
    );
    let json = serde_json::to_value(&told).unwrap();
    assert_eq!(json["peer_names"][1]["name"], "db.example.com");
    assert_eq!(json["peer_names"][1]["until"], 100);
    // Past, and not yet taken out.
    cluster.time = Some(110);
    let told = explain(&cluster, &web(), &Tuple::egress(address("192.0.2.1"), Protocol::TCP, 5432)).unwrap();
    assert_eq!(told.peer_names.iter().map(|learnt| learnt.remaining).collect::<Vec<_>>(), [Some(90), Some(0)]);

    let mut step = |cluster: &mut Cluster, now| {
        let renamed = cluster.names.expire(now);
        assert!(!compiler.would_compile_all(cluster, [], &renamed));
        compiler.update_parts_within(cluster, [], &renamed, |_| Ok(())).unwrap()
    };
    let one = step(&mut cluster, 100);
    assert_eq!(verdicts(&cluster, &one, "192.0.2.1"), [Deny, Allow, Deny]);
    let none = step(&mut cluster, 200);
    assert_eq!(verdicts(&cluster, &none, "192.0.2.1"), [Deny; 3]);
    assert!(none.table.exact().is_empty(), "{:?}", none.table);
    assert!(cluster.names.is_empty());
}

/// A reader refuses such rules; whoever builds the model may have them.
#[test]
fn a_rule_that_denies_by_a_name_denies_everybody_and_one_that_passes_whom_it_does_not_know() {
    for (action, learnt, other) in [(Action::Deny, Deny, Deny), (Action::Pass, Deny, Deny)] {
        let mut cluster = shop();
        learn(&mut cluster, "db.example.com", &["192.0.2.1"]);
        for policy in cluster.policies.values_mut() {
            policy.egress.iter_mut().flatten().for_each(|rule| rule.action = action);
        }
        let update = Compiler::default().update(&cluster).unwrap();
        assert_eq!(verdicts(&cluster, &update, "192.0.2.1")[0], learnt, "{action:?}");
        assert_eq!(verdicts(&cluster, &update, "192.0.2.9")[0], other, "{action:?}");
    }
    // In a tier that isolates nobody the difference is seen.
    let mut cluster = shop();
    learn(&mut cluster, "db.example.com", &["192.0.2.1"]);
    let mut policy = cluster.policies.pop_first().unwrap().1;
    policy.id = dcenet_policy::model::PolicyId::cluster(dcenet_policy::model::Tier::Admin, "out");
    policy.egress.iter_mut().flatten().for_each(|rule| rule.action = Action::Pass);
    cluster.insert_policy(policy);
    let update = Compiler::default().update(&cluster).unwrap();
    assert_eq!(verdicts(&cluster, &update, "192.0.2.1"), [Allow; 3]);
    assert_eq!(verdicts(&cluster, &update, "192.0.2.9"), [Deny, Deny, Allow]);
}

#[test]
fn names_of_cluster_network_policies_are_for_rules_that_accept() {
    let text = |action: &str, names: &str| {
        format!(
            "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{ name: n }}\nspec:\n  tier: \
             Admin\n  priority: 1\n  subject: {{ namespaces: {{}} }}\n  egress:\n  - {{ action: {action}, to: [ {{ domainNames: {names} }} ] }}\n"
        )
    };
    let read =
        clusternetworkpolicy::from_yaml(&text("Accept", r#"[ kubernetes.io, "*.Cloud.example.", a_b.c ]"#)).unwrap();
    assert!(read.closed.is_empty());
    let Peers::OneOf(peers) = &read.policies[0].rules(Direction::Egress).unwrap()[0].peers else { panic!("anybody") };
    let names: Vec<String> = peers
        .iter()
        .map(|peer| match peer {
            Peer::Name(pattern) => pattern.to_string(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(names, ["kubernetes.io", "*.cloud.example", "a_b.c"]);
    for action in ["Deny", "Pass"] {
        let read = clusternetworkpolicy::from_yaml(&text(action, "[ kubernetes.io ]")).unwrap();
        assert_eq!(
            read.closed[0].to_string(),
            "document 0: spec.egress[0].to[0]: domainNames are for rules that accept: a rule that denies or passes denies \
             everything then"
        );
        let rule = &read.policies[0].rules(Direction::Egress).unwrap()[0];
        assert_eq!((rule.action, &rule.peers), (Action::Deny, &Peers::Any));
    }
    for (names, wanted) in [
        ("[ com ]", "domainNames[0]: \"com\" is no full domain name"),
        ("[ a.b, 'a.*.com' ]", "domainNames[1]: \"a.*.com\" is no full domain name"),
        ("[ 192.0.2.1 ]", "domainNames[0]: \"192.0.2.1\" is no full domain name"),
        ("[ 192.0.2.1. ]", "domainNames[0]: \"192.0.2.1.\" is no full domain name"),
        ("[ _sip.example.com ]", "domainNames[0]: \"_sip.example.com\" is no full domain name"),
    ] {
        let read = clusternetworkpolicy::from_yaml(&text("Accept", names)).unwrap();
        assert_eq!(
            read.closed[0].to_string(),
            format!("document 0: spec.egress[0].to[0]: {wanted}: a rule that allows matches nothing then")
        );
        let rule = &read.policies[0].rules(Direction::Egress).unwrap()[0];
        assert_eq!((rule.action, &rule.peers), (Action::Allow, &Peers::OneOf(Vec::new())));
    }
    let told = clusternetworkpolicy::from_yaml(&text("Accept", "[]")).unwrap_err().to_string();
    assert!(
        told.starts_with("document 0: spec.egress[0].to[0].domainNames: []: must have at least one name"),
        "{told}"
    );
}

#[test]
fn whose_addresses_nobody_learns_is_told() {
    let policy = |peer: &str| {
        format!(
            "apiVersion: dcenet.io/v1alpha1\nkind: Policy\nmetadata: {{ name: out, namespace: shop }}\nspec:\n  egress: [ {{ action: \
             allow, to: [ {{ {peer} }} ] }} ]\n"
        )
    };
    let told = |peer: &str| {
        let documents = Documents::default().with_yaml("a.yaml", &policy(peer)).unwrap();
        let notes = documents.notes().into_iter().filter(|note| note.kind == NoteKind::UnlearntNames);
        notes.map(|note| note.text).collect::<Vec<_>>()
    };
    assert_eq!(
        told("fqdns: [ db.example.com, '*.example.org' ]"),
        [
            "shop/policy/out: addresses of names are not known here until somebody learns them: by them nobody is allowed"
        ]
    );
    assert!(told("cidrs: [ 10.0.0.0/8 ]").is_empty());
}

#[test]
fn renderings_have_what_has_been_learnt_or_say_that_they_have_nothing() {
    let mut cluster = shop();
    learn(&mut cluster, "db.example.com", &["192.0.2.1"]);
    let rendered = nftables::render(&cluster, &Scope::Cluster).unwrap();
    assert!(rendered.script.contains("192.0.2.1"), "{}", rendered.script);
    let told: Vec<String> = rendered.omitted.iter().map(ToString::to_string).collect();
    assert!(
        told.contains(
            &"shop/policy/out egress[0]: its names are the addresses learnt so far; render again when other answers are \
              learnt"
                .to_owned()
        ),
        "{told:#?}"
    );
    let rendered = networkpolicy::render(&cluster);
    assert!(!rendered.text().contains("192.0.2.1"));
    let told: Vec<String> = rendered.omitted.iter().map(ToString::to_string).collect();
    assert!(told[0].contains("the name db.example.com, whose addresses change as answers do"), "{told:#?}");
}

/// Whoever enforces them resolves the names itself.
#[test]
fn rendered_cluster_network_policies_keep_the_names_of_rules_that_accept() {
    const TEXT: &str = r#"
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: { name: n }
spec:
  tier: Admin
  priority: 1
  subject: { namespaces: {} }
  egress:
  - { action: Accept, to: [ { domainNames: [ kubernetes.io, "*.example.org" ] }, { networks: [ 192.0.2.0/24 ] } ] }
"#;
    let cluster = || {
        let mut cluster = Cluster::default();
        cluster.insert_namespace("shop", []);
        cluster.pods.insert(web(), Pod::new([("app", "web")], [WEB]));
        cluster
    };
    let read = |text: &str| {
        let mut cluster = cluster();
        for policy in clusternetworkpolicy::from_yaml(text).unwrap().policies {
            cluster.insert_policy(policy);
        }
        cluster
    };
    let of_text = read(TEXT);
    let rendered = networkpolicy::render(&of_text);
    assert!(rendered.omitted.is_empty(), "{:?}", rendered.omitted);
    let mut again = read(&rendered.text());
    learn(&mut again, "kubernetes.io", &["192.0.2.1"]);
    let names = |cluster: &Cluster| -> BTreeSet<String> {
        let rules = cluster.policies.values().flat_map(|policy| policy.rules(Direction::Egress).unwrap());
        let peers = rules.filter_map(|rule| match &rule.peers {
            Peers::OneOf(peers) => Some(peers),
            Peers::Any => None,
        });
        let names = peers.flatten().filter_map(|peer| match peer {
            Peer::Name(pattern) => Some(pattern.to_string()),
            _ => None,
        });
        names.collect()
    };
    assert_eq!(names(&again), names(&of_text));
    assert_eq!(names(&again).len(), 2);
}

/// In files nothing has been learnt, and that is said instead of taking the rules for dead.
#[test]
fn rules_by_names_are_called_neither_dead_nor_without_effect() {
    let before = shop();
    let found = findings(&before, &Thresholds::default()).unwrap();
    let dead: Vec<&Finding> =
        found.findings.iter().filter(|finding| matches!(finding, Finding::Unreachable { .. })).collect();
    assert!(dead.is_empty(), "{dead:?}");
    assert_eq!(found.named.len(), 2);
    assert!(
        found.to_string().contains(
            "named: shop/policy/out egress[1]: *.example.com, of which 0 addresses have been learnt; whom else it means is not seen\n"
        ),
        "{found}"
    );
    // The twin: another rule that matches nobody is.
    let mut other = before.clone();
    for rule in other.policies.values_mut().flat_map(|policy| policy.egress.iter_mut().flatten()).take(1) {
        rule.peers = Peers::OneOf(Vec::new());
    }
    let found = findings(&other, &Thresholds::default()).unwrap();
    assert!(found.findings.iter().any(|finding| matches!(finding, Finding::Unreachable { .. })), "{found}");

    // A rule that opens by a name is seen, and only where it is another.
    let mut after = before.clone();
    let rules = after.policies.values_mut().flat_map(|policy| policy.egress.iter_mut().flatten());
    for rule in rules.filter(|rule| matches!(&rule.peers, Peers::OneOf(peers) if peers.iter().any(|peer| matches!(peer, Peer::Name(name) if name.to_string().starts_with('*'))))) {
        rule.ports = Ports::Any;
    }
    let told = diff(&before, &after).unwrap();
    assert!(told.changes.is_empty());
    assert_eq!(told.named.iter().map(|named| named.rule.rule).collect::<Vec<_>>(), [1], "{told}");
    assert!(diff(&after, &after).unwrap().named.is_empty());
    learn(&mut after, "db.example.com", &["192.0.2.1", "192.0.2.2"]);
    let reached = access(&after, &web(), Way::From).unwrap();
    assert_eq!(reached.named.iter().map(|named| named.learnt).collect::<Vec<_>>(), [2, 2]);
}
