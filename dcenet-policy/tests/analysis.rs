//! Findings, differences and reachability: by hand, and by brute force with the evaluator over small universes.

#![cfg(feature = "yaml")]

use std::collections::BTreeSet;
use std::net::IpAddr;

use dcenet_core::test_support::effort;
use dcenet_policy::analysis::{AnalysisError, Diff, Finding, Thresholds, Way, access, diff, findings};
use dcenet_policy::eval::{self, Reason};
use dcenet_policy::explain;
use dcenet_policy::model::{
    Action, Cluster, Direction, Pod, PodId, PodNetwork, PolicyId, Protocol, SERVICE_ACCOUNT_LABEL, Tuple, Verdict,
};
use dcenet_policy::sources::kubernetes::Documents;
use dcenet_policy::test_support::{self, Rng};

fn shop(policies: &str) -> Cluster {
    let pods = r#"
{ apiVersion: v1, kind: Namespace, metadata: { name: shop, labels: { team: red } } }
---
{ apiVersion: v1, kind: Namespace, metadata: { name: ops } }
---
{ apiVersion: v1, kind: Pod, metadata: { name: db, namespace: shop, labels: { app: db } }, spec: { nodeName: n1, containers: [ { name: c, ports: [ { name: sql, containerPort: 5432 } ] } ] }, status: { podIP: 10.0.0.1, hostIP: 192.0.2.1 } }
---
{ apiVersion: v1, kind: Pod, metadata: { name: web, namespace: shop, labels: { app: web } }, status: { podIP: 10.0.0.2 } }
---
{ apiVersion: v1, kind: Pod, metadata: { name: mon, namespace: ops, labels: { app: mon } }, status: { podIP: 10.0.0.3 } }
"#;
    Documents::default().with_yaml("pods", pods).unwrap().with_yaml("policies", policies).unwrap().into_cluster()
}

#[test]
fn rules_that_do_nothing_or_too_much_are_named() {
    let cluster = shop(
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: a, namespace: shop }
spec:
  podSelector: { matchLabels: { app: db } }
  ingress:
  - { from: [ { podSelector: { matchLabels: { app: web } } } ], ports: [ { port: 5000, endPort: 5999 } ] }
  - { from: [ { podSelector: { matchLabels: { app: web } } } ], ports: [ { port: sql } ] }
  - { from: [ { podSelector: { matchLabels: { app: wbe } } } ] }
  - { from: [ { ipBlock: { cidr: 192.0.2.1/32 } } ] }
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: b, namespace: shop }
spec:
  podSelector: { matchLabels: { app: db } }
  ingress:
  - { from: [ { podSelector: { matchExpressions: [ { key: app, operator: In, values: [ web ] } ] } } ], ports: [ { port: 5000, endPort: 5999 } ] }
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: lost, namespace: shop }
spec: { podSelector: { matchLabels: { app: dbb } } }
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: open, namespace: shop }
spec: { podSelector: { matchLabels: { app: web } }, ingress: [ {} ], egress: [ { to: [ { ipBlock: { cidr: 0.0.0.0/0, except: [ 10.0.0.0/8 ] } } ] }, { to: [ { namespaceSelector: {} } ], ports: [ { protocol: UDP } ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: no-mon }
spec:
  tier: admin
  priority: 5
  ingress:
  - { action: deny, from: [ { pods: { podSelector: { matchLabels: { app: mon } } } } ], services: [ { protocol: tcp, ports: [ 9000 ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: yes-mon }
spec:
  tier: admin
  priority: 6
  subject: { podSelector: { matchLabels: { app: db } } }
  ingress:
  - { action: allow, from: [ { pods: { namespaceSelector: { matchLabels: { kubernetes.io/metadata.name: ops } } } } ], services: [ { protocol: tcp, ports: [ 9000 ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: last }
spec: { tier: baseline, priority: 0, subject: { podSelector: { matchLabels: { app: db } } }, ingress: [ { action: allow } ] }
"#,
    );
    let found = findings(&cluster, &Thresholds::default()).unwrap();
    assert_eq!(
        found.to_string().lines().collect::<Vec<_>>(),
        [
            "no subject: shop/lost selects no pod",
            "shadowed: admin:policy/yes-mon ingress[0] by admin:policy/no-mon ingress[0]",
            "conflicting: admin:policy/yes-mon ingress[0] against admin:policy/no-mon ingress[0], which wins, at shop/db",
            "shadowed: shop/a ingress[1] by shop/a ingress[0]",
            "unreachable: shop/a ingress[2] matches nothing",
            "shadowed: shop/a ingress[3] by the pod's own node",
            "duplicate: shop/b ingress[0] repeats shop/a ingress[0]",
            "too wide: shop/open ingress[0]: everything for everybody: everything for ops/mon, shop/db, shop/web, node n1, others in 0.0.0.0/0, others in ::/0",
            "too wide: shop/open egress[0]: a very large block: everything for node n1, others in 0.0.0.0/0 but 10.0.0.0/8",
            "too wide: shop/open egress[1]: every pod: udp for ops/mon, shop/db, shop/web",
            "shadowed: baseline:policy/last ingress[0] by admin:policy/no-mon ingress[0], shop/a ingress[0], the pod's own node, the pods' isolation",
            "too wide: baseline:policy/last ingress[0]: everything for everybody: everything for ops/mon, shop/db, shop/web, node n1, others in 0.0.0.0/0, others in ::/0",
        ]
    );
    let json = serde_json::to_value(&found).unwrap();
    assert_eq!(json["findings"][0]["kind"], "no-subject");
    assert_eq!(json["findings"][2]["winner"]["policy"]["name"], "policy/no-mon");
}

#[test]
fn nothing_is_said_against_rules_beside_a_policy_that_may_not_govern() {
    let rules = "ingress: [ { action: allow, services: [ { protocol: tcp, ports: [ 80 ] } ] } ]";
    let policy = |name: &str, subject: &str| {
        format!(
            "---\n{{ apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: {{ name: {name}, namespace: shop }}, \
             spec: {{ subject: {{ {subject} }}, {rules} }} }}\n"
        )
    };
    let mut cluster = shop(&format!("{}{}", policy("a", "serviceAccounts: [ a ]"), policy("b", "")));
    let told = |cluster: &Cluster| findings(cluster, &Thresholds::default()).unwrap().to_string();
    let web = PodId::new("shop", "web");
    let labels = |cluster: &mut Cluster, account: Option<&str>| {
        for pod in cluster.pods.values_mut() {
            pod.labels.remove(SERVICE_ACCOUNT_LABEL);
            pod.labels.extend(account.map(|account| (SERVICE_ACCOUNT_LABEL.to_owned(), account.to_owned())));
        }
    };
    // Where the account is known b does repeat a, and may be deleted.
    labels(&mut cluster, Some("a"));
    assert_eq!(told(&cluster), "duplicate: shop/policy/b ingress[0] repeats shop/policy/a ingress[0]\n");
    // Where it is not a allows nothing, and who deletes b closes the pod.
    labels(&mut cluster, None);
    assert_eq!(told(&cluster), "");
    let packet =
        Tuple { direction: Direction::Ingress, peer: "10.0.0.3".parse().unwrap(), protocol: Protocol::TCP, port: 80 };
    let Reason::Rule(decides) = eval::evaluate(&cluster, &web, &packet).unwrap().reason else { panic!() };
    assert_eq!(decides.to_string(), "shop/policy/b ingress[0] ports[0]");
}

#[test]
fn thresholds_say_what_is_too_wide() {
    let cluster = shop(
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: a, namespace: shop }
spec: { podSelector: {}, ingress: [ { from: [ { ipBlock: { cidr: 172.16.0.0/12 } } ], ports: [ { port: 1024, endPort: 2047 } ] } ] }
"#,
    );
    let wide = |v4, ports| findings(&cluster, &Thresholds { v4, v6: 0, ports }).unwrap().findings.len();
    assert_eq!([wide(12, 1024), wide(11, 1024), wide(12, 1025)], [1, 0, 0]);
}

#[test]
fn a_difference_is_told_by_peers_and_ports_with_an_example() {
    let policy = |port: u16| {
        format!(
            "{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {{name: db, namespace: shop}}, spec: {{\
             podSelector: {{matchLabels: {{app: db}}}}, ingress: [{{from: [{{podSelector: {{matchLabels: {{app: web}}}}}}, \
             {{ipBlock: {{cidr: 10.9.0.0/16, except: [10.9.1.0/24]}}}}], ports: [{{port: 5432, endPort: {port}}}]}}]}}}}"
        )
    };
    let (before, after) = (shop(&policy(5440)), shop(&policy(5434)));
    let told = diff(&before, &after).unwrap();
    assert_eq!(
        told.to_string(),
        "deny ingress of shop/db from shop/web: tcp 5435-5440\n  \
           before: allow (shop/db ingress[0] from[0] ports[0]); after: deny (isolated; no rule matches); \
           such as shop/db from 10.0.0.2 tcp/5435\n\
         deny ingress of shop/db from others in 10.9.0.0/16 but 10.9.1.0/24: tcp 5435-5440\n  \
           before: allow (shop/db ingress[0] from[1] ports[0]); after: deny (isolated; no rule matches); \
           such as shop/db from 10.9.0.1 tcp/5435\n"
    );
    assert_eq!(diff(&before, &before).unwrap().changes, []);
    let json = serde_json::to_value(&told).unwrap();
    assert_eq!(json["changes"][0]["services"][0], serde_json::json!({"protocol": "tcp", "first": 5435, "last": 5440}));
    // What the example says, explain says.
    let example = &told.changes[1].example;
    let answer = explain::explain(&after, &example.pod, &Tuple::ingress(example.peer, example.protocol, example.port));
    assert_eq!(answer.unwrap().decision.verdict, Verdict::Deny);
}

#[test]
fn access_takes_both_ends_together() {
    let cluster = shop(
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: db, namespace: shop }
spec:
  podSelector: { matchLabels: { app: db } }
  ingress: [ { from: [ { namespaceSelector: {} } ], ports: [ { port: sql }, { port: 9000 } ] } ]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: web, namespace: shop }
spec:
  podSelector: { matchLabels: { app: web } }
  policyTypes: [ Egress ]
  egress: [ { ports: [ { port: sql }, { port: 53, protocol: UDP } ] } ]
"#,
    );
    let told = |pod: &str, way| access(&cluster, &PodId::new("shop", pod), way).unwrap().to_string();
    assert_eq!(
        told("db", Way::To),
        "shop/db (10.0.0.1) from shop/web: tcp 5432\n\
         shop/db (10.0.0.1) from ops/mon: tcp 5432, 9000\n\
         shop/db (10.0.0.1) from node n1: everything\n"
    );
    assert_eq!(
        told("web", Way::From),
        "shop/web (10.0.0.2) to shop/db: tcp 5432\n\
         shop/web (10.0.0.2) to ops/mon, node n1, others in 0.0.0.0/0: udp 53\n"
    );
    assert!(matches!(access(&cluster, &PodId::new("x", "y"), Way::To), Err(AnalysisError::UnknownPod(_))));
}

/// What policies name beside pods, for [`shop`].
const CATALOG: &str = r#"
{ apiVersion: dcenet.io/v1alpha1, kind: Tier, metadata: { name: security }, spec: { order: 500 } }
---
{ apiVersion: dcenet.io/v1alpha1, kind: Tier, metadata: { name: fence }, spec: { order: 1500, end: deny } }
---
{ apiVersion: dcenet.io/v1alpha1, kind: PrefixGroup, metadata: { name: partners }, spec: { cidrs: [ 203.0.113.0/24 ], except: [ 203.0.113.128/25 ] } }
---
{ apiVersion: v1, kind: Node, metadata: { name: n1, labels: { role: worker } }, status: { addresses: [ { type: InternalIP, address: 192.0.2.1 } ] } }
---
{ apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: { name: sql-1, namespace: shop, labels: { kubernetes.io/service-name: sql } }, addressType: IPv4, endpoints: [ { addresses: [ 10.0.0.1 ] }, { addresses: [ 198.51.100.9 ] } ], ports: [ { port: 5432 } ] }
---
"#;

#[test]
fn tiers_and_their_ends_decide_in_place_of_rules() {
    let policies = r#"
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: first }
spec:
  tier: security
  priority: 1
  subject: { podSelector: { matchLabels: { app: db } } }
  ingress:
  - { action: deny, from: [ { prefixGroups: [ partners ] } ], services: [ { protocol: tcp, ports: [ 22 ] } ] }
  - { action: pass, from: [ { pods: { podSelector: { matchLabels: { app: web } } } } ] }
  - { action: allow, from: [ { pods: { podSelector: { matchLabels: { app: web } } } } ], services: [ { protocol: tcp, ports: [ 80 ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: second }
spec:
  tier: admin
  priority: 1
  subject: { podSelector: { matchLabels: { app: db } } }
  ingress:
  - { action: deny, from: [ { cidrs: [ 203.0.113.7/32 ] } ], services: [ { protocol: tcp, ports: [ 22 ] } ] }
  - { action: allow, from: [ { pods: { podSelector: { matchLabels: { app: web } } } } ], services: [ { protocol: tcp, ports: [ 80 ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: third }
spec:
  tier: fence
  priority: 1
  subject: { podSelector: { matchLabels: { app: db } } }
  ingress:
  - { action: pass, from: [ { nodes: { matchLabels: { role: worker } } } ] }
  - { action: allow, from: [ { prefixGroups: [ nowhere ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: fourth }
spec:
  tier: baseline
  priority: 1
  subject: { podSelector: { matchLabels: { app: db } } }
  ingress:
  - { action: deny, from: [ { pods: { podSelector: { matchLabels: { app: mon } } } } ] }
  - { action: deny, from: [ { nodes: { matchLabels: { role: worker } } } ], services: [ { protocol: tcp, ports: [ 25 ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: lost }
spec: { tier: nowhere, priority: 1, subject: { podSelector: { matchLabels: { app: mon } } }, ingress: [ { action: allow, from: [ { cidrs: [ 203.0.113.9/32 ] } ] } ] }
"#;
    let cluster = shop(&format!("{CATALOG}{policies}"));
    let found = findings(&cluster, &Thresholds::default()).unwrap();
    assert_eq!(
        found.to_string().lines().collect::<Vec<_>>(),
        [
            "unknown tier: nowhere:policy/lost closes the pods that it governs, for there is no tier nowhere",
            "shadowed: admin:policy/second ingress[0] by security:policy/first ingress[0]",
            "shadowed: baseline:policy/fourth ingress[0] by the end of the tier fence",
            "unreachable: fence:policy/third ingress[1] matches nothing",
            "shadowed: nowhere:policy/lost ingress[0] by the want of a tier nowhere",
            "shadowed: security:policy/first ingress[2] by security:policy/first ingress[1]",
        ]
    );
    let json = serde_json::to_value(&found).unwrap();
    assert_eq!(json["findings"][2]["by"], serde_json::json!([{ "tier-end": "fence" }]));
    assert_eq!(json["findings"][4]["by"], serde_json::json!([{ "unknown-tier": "nowhere" }]));
    // With the end taken away the rule behind it decides, and nothing else changes.
    let open = shop(&format!("{}{policies}", CATALOG.replace(", end: deny", "")));
    let told = findings(&open, &Thresholds::default()).unwrap().to_string();
    assert!(!told.contains("policy/fourth"), "{told}");
    let changes = diff(&cluster, &open).unwrap().to_string();
    assert!(
        changes.contains("allow ingress of shop/db from shop/web: every protocol but tcp; tcp 0-79, 81-65535"),
        "{changes}"
    );
    assert!(changes.contains("before: deny (no rule matches, and the tier denies what is left)"), "{changes}");
}

#[test]
fn groups_nodes_and_services_are_peers_of_differences_and_of_access() {
    let policies = r#"
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: web, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: web } } }
  ingress: [ { action: allow, from: [ { prefixGroups: [ partners ] } ], services: [ { protocol: tcp, ports: [ 443 ] } ] } ]
  egress:
  - { action: allow, to: [ { service: { name: sql } } ] }
  - { action: allow, to: [ { nodes: { matchLabels: { role: worker } } } ], services: [ { protocol: tcp, ports: [ 9100 ] } ] }
"#;
    let cluster = shop(&format!("{CATALOG}{policies}"));
    let told = |way| access(&cluster, &PodId::new("shop", "web"), way).unwrap().to_string();
    assert_eq!(told(Way::To), "shop/web (10.0.0.2) from others in 203.0.113.0/24 but 203.0.113.128/25: tcp 443\n");
    assert_eq!(
        told(Way::From),
        "shop/web (10.0.0.2) to shop/db, backend 198.51.100.9: tcp 5432\n\
         shop/web (10.0.0.2) to node n1: tcp 9100\n"
    );
    let moved = CATALOG.replace("198.51.100.9", "198.51.100.10").replace("203.0.113.128/25", "203.0.113.64/26");
    let told = diff(&cluster, &shop(&format!("{moved}{policies}"))).unwrap();
    let lines: Vec<String> =
        told.to_string().lines().filter(|line| !line.starts_with(' ')).map(ToOwned::to_owned).collect();
    assert_eq!(
        lines,
        [
            "deny ingress of shop/web from others in 203.0.113.64/26: tcp 443",
            "allow ingress of shop/web from others in 203.0.113.128/25: tcp 443",
            "deny egress of shop/web to backend 198.51.100.9: tcp 5432",
            "allow egress of shop/web to backend 198.51.100.10: tcp 5432",
        ]
    );
}

/// Ports at which random policies begin and end, and their neighbours.
const PORTS: [u16; 21] =
    [0, 1, 2, 52, 53, 54, 79, 80, 81, 82, 442, 443, 444, 8079, 8080, 8081, 30000, 65533, 65534, 65535, 768];

fn services() -> Vec<(Protocol, u16)> {
    let ported = [Protocol::TCP, Protocol::UDP, Protocol::SCTP, Protocol::ICMP, Protocol::ICMPV6];
    let ported = ported.into_iter().flat_map(|protocol| PORTS.map(|port| (protocol, port)));
    ported.chain([0, 47, 255].map(|protocol| (Protocol(protocol), 0))).collect()
}

/// Every packet of a small universe.
fn universe(clusters: [&Cluster; 2]) -> Vec<(PodId, Tuple)> {
    let addresses: BTreeSet<IpAddr> = clusters.into_iter().flat_map(test_support::addresses).collect();
    let mut all = Vec::new();
    for pod in clusters[0].pods.keys() {
        for direction in Direction::ALL {
            for peer in &addresses {
                let tuple = |(protocol, port)| (pod.clone(), Tuple { direction, peer: *peer, protocol, port });
                all.extend(services().into_iter().map(tuple));
            }
        }
    }
    all
}

/// How many verdicts change, or where the difference says something else.
fn judge(before: &Cluster, after: &Cluster, told: &Diff) -> Result<usize, String> {
    let mut changed = 0;
    for (pod, tuple) in universe([before, after]) {
        let [old, new] = [before, after].map(|cluster| eval::evaluate(cluster, &pod, &tuple).unwrap().verdict);
        let of: Vec<_> = told.changes.iter().filter(|change| change.contains(&pod, &tuple)).collect();
        let agrees = match of[..] {
            [] => old == new,
            [change] => old != new && (change.before.verdict, change.after.verdict) == (old, new),
            _ => false,
        };
        if !agrees {
            return Err(format!("{pod} {tuple:?}: {old} then {new}, but told {of:?}"));
        }
        changed += usize::from(old != new);
    }
    Ok(changed)
}

fn pair(seed: u64) -> [Cluster; 2] {
    let mut rng = Rng::new(seed);
    let mut before = test_support::cluster(&mut rng);
    if seed.is_multiple_of(3) {
        test_support::claim_twice(&mut rng, &mut before);
    }
    let mut after = before.clone();
    for policy in test_support::cluster(&mut rng).policies.into_values() {
        after.insert_policy(policy);
    }
    if seed.is_multiple_of(2) {
        after.policies.pop_first();
    }
    [before, after]
}

#[test]
fn differences_are_those_of_the_evaluator() {
    let (mut changed, mut noticed) = (0, 0);
    for seed in 0..effort(3_u64, 9, 200) {
        let [before, after] = pair(seed);
        let mut told = diff(&before, &after).unwrap();
        changed += judge(&before, &after, &told).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        for change in &told.changes {
            let tuple = Tuple {
                direction: change.direction,
                peer: change.example.peer,
                protocol: change.example.protocol,
                port: change.example.port,
            };
            assert!(change.contains(&change.example.pod, &tuple), "seed {seed}: {change}");
            let verdict = |cluster| eval::evaluate(cluster, &change.example.pod, &tuple).unwrap().verdict;
            assert_eq!([verdict(&before), verdict(&after)], [change.before.verdict, change.after.verdict], "{change}");
        }
        // A difference that keeps something back is noticed.
        if told.changes.pop().is_some() && judge(&before, &after, &told).is_err() {
            noticed += 1;
        }
    }
    assert!(changed > 1_000 && noticed > 0, "{changed} changed verdicts, {noticed} omissions noticed");
}

#[test]
fn access_is_that_of_the_evaluator() {
    let (mut open, mut shut) = (0, 0);
    for seed in 100..100 + effort(3_u64, 9, 200) {
        let cluster = test_support::cluster(&mut Rng::new(seed));
        let addresses = test_support::addresses(&cluster);
        let own: Vec<(&PodId, &Pod)> = cluster.pods.iter().filter(|(_, pod)| pod.network == PodNetwork::Own).collect();
        for (id, pod) in &own {
            for way in [Way::To, Way::From] {
                let told = access(&cluster, id, way).unwrap();
                for (at, peer) in pod.addresses.iter().flat_map(|at| addresses.iter().map(move |peer| (*at, *peer))) {
                    if at.is_ipv4() != peer.is_ipv4() || pod.addresses.contains(&peer) {
                        continue;
                    }
                    let other = own.iter().find(|(_, pod)| pod.addresses.contains(&peer));
                    for (protocol, port) in services() {
                        let (inner, outer) = match way {
                            Way::To => (Tuple::ingress(peer, protocol, port), Tuple::egress(at, protocol, port)),
                            Way::From => (Tuple::egress(peer, protocol, port), Tuple::ingress(at, protocol, port)),
                        };
                        let ours = eval::evaluate(&cluster, id, &inner).unwrap().verdict;
                        let theirs = other.map(|(other, _)| eval::evaluate(&cluster, other, &outer).unwrap().verdict);
                        let expected = ours.max(theirs.unwrap_or(Verdict::Allow)) == Verdict::Allow;
                        let holds = told.allowed.iter().filter(|reachable| {
                            reachable.own.contains(&at)
                                && reachable.peers.contains(peer)
                                && reachable.services.contains(protocol, port)
                        });
                        let holds = holds.count();
                        assert_eq!(holds, usize::from(expected), "seed {seed}: {id} {way:?} {peer} {protocol}/{port}");
                        *if expected { &mut open } else { &mut shut } += 1;
                    }
                }
            }
        }
    }
    assert!(open > 1_000 && shut > 1_000, "{open} allowed, {shut} denied");
}

#[test]
fn rules_said_to_do_nothing_decide_nothing_and_the_others_do() {
    let (mut dead, mut alive) = (0, 0);
    for seed in 200..200 + effort(3_u64, 9, 200) {
        let [mut cluster, _] = pair(seed);
        if seed % 2 == 1 {
            test_support::ask_for_accounts(&mut Rng::new(seed), &mut cluster);
        }
        // At other times, too.
        let mut later = cluster.clone();
        later.time = cluster.time.map(|time| time + 86_400);
        let mut at_times = decided_in(&cluster);
        at_times.append(&mut decided_in(&later));
        let dead_at_times = idle_of(&cluster);
        assert_eq!(dead_at_times.intersection(&at_times).next(), None, "seed {seed}: not at all times");
        // With rules that are there for good or not at all, nothing is passed over.
        let cluster = cluster.in_force().into_owned();
        let (idle, decided) = (idle_of(&cluster), decided_in(&cluster));
        // Of names that nothing has been learnt of nothing is said.
        let named = findings(&cluster, &Thresholds::default()).unwrap().named;
        let is_named = |(policy, direction, index): &(PolicyId, Direction, usize)| {
            named.iter().any(|n| (&n.rule.policy, n.rule.direction, n.rule.rule) == (policy, *direction, *index))
        };
        assert!(dead_at_times.is_subset(&idle));
        assert_eq!(idle.intersection(&decided).next(), None, "seed {seed}: said to do nothing, and decides");
        for policy in cluster.policies.values() {
            for direction in Direction::ALL {
                for (index, rule) in policy.rules(direction).unwrap_or_default().iter().enumerate() {
                    let key = (policy.id.clone(), direction, index);
                    if idle.contains(&key) {
                        dead += 1;
                    } else if rule.action != Action::Pass && !is_named(&key) && told_of(&cluster, &policy.id, direction)
                    {
                        assert!(decided.contains(&key), "seed {seed}: {key:?} decides nothing, and is not told");
                        alive += 1;
                    }
                }
            }
        }
    }
    assert!(dead > 20 && alive > 20, "{dead} idle, {alive} deciding");
}

type Place = (PolicyId, Direction, usize);

/// The rules that are said to do nothing.
fn idle_of(cluster: &Cluster) -> BTreeSet<Place> {
    let mut idle = BTreeSet::new();
    for finding in &findings(cluster, &Thresholds::default()).unwrap().findings {
        match finding {
            Finding::Unreachable { rule } | Finding::Shadowed { rule, .. } | Finding::Duplicate { rule, .. } => {
                idle.insert((rule.policy.clone(), rule.direction, rule.rule));
            }
            Finding::NoSubject { policy } => {
                for direction in Direction::ALL {
                    let rules = cluster.policies[policy].rules(direction).unwrap_or_default().len();
                    idle.extend((0..rules).map(|rule| (policy.clone(), direction, rule)));
                }
            }
            _ => {}
        }
    }
    idle
}

/// The rules that decide anything, by the evaluator.
fn decided_in(cluster: &Cluster) -> BTreeSet<Place> {
    let mut decided = BTreeSet::new();
    for (pod, tuple) in universe([cluster, cluster]) {
        if let Reason::Rule(rule) = eval::evaluate(cluster, &pod, &tuple).unwrap().reason {
            decided.insert((rule.policy, rule.direction, rule.rule));
        }
    }
    decided
}

/// Whether a policy governs any pod in a direction, and only such of which is known what governs them.
fn told_of(cluster: &Cluster, policy: &PolicyId, direction: Direction) -> bool {
    let own = cluster.pods.iter().filter(|(_, pod)| pod.network == PodNetwork::Own);
    let governing = |id| eval::governing(cluster, id, direction).unwrap();
    let governed = own.map(|(id, pod)| (pod, governing(id))).filter(|(_, ids)| ids.contains(policy));
    let governed: Vec<_> = governed.collect();
    let asks = |id: &PolicyId| {
        let requirements = &cluster.policies[id].subject.pods.requirements;
        requirements.iter().any(|requirement| requirement.key == SERVICE_ACCOUNT_LABEL)
    };
    let is_sure = |(pod, ids): &(&Pod, Vec<_>)| pod.labels.contains_key(SERVICE_ACCOUNT_LABEL) || !ids.iter().any(asks);
    !governed.is_empty() && governed.iter().all(is_sure)
}
