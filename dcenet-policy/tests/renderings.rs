//! Policies as objects of Kubernetes, read back and compared exactly; the matrix of a report, read by a parser.

#![cfg(feature = "yaml")]

use std::path::Path;

use dcenet_policy::analysis::diff;
use dcenet_policy::model::{
    Cluster, Peer, Peers, Pod, PodId, PolicyId, PortMatch, PortSpec, Ports, Protocol, ServiceId,
};
use dcenet_policy::reach::{Evaluator, reach};
use dcenet_policy::render::networkpolicy::render;
use dcenet_policy::sources::kubernetes::Documents;
use dcenet_policy::test_support::table::Table;
use dcenet_policy::test_support::{self, Rng};

/// The cluster with nothing but what its rendering says, and what that leaves out.
fn back(cluster: &Cluster) -> (Cluster, Vec<String>) {
    let rendered = render(cluster);
    let text = rendered.text();
    let read = Documents::default().with_yaml("rendered", &text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert!(read.closed.is_empty(), "{text}");
    (Cluster { policies: read.policies, ..cluster.clone() }, rendered.omitted.iter().map(ToString::to_string).collect())
}

#[test]
fn what_is_rendered_without_omission_means_the_same() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tables");
    let (mut same, mut partial) = (0, 0);
    for file in ["defaults.txt", "peers.txt", "ports.txt", "selectors.txt", "native.txt", "named.txt", "tiers.txt"] {
        let table = Table::parse(&std::fs::read_to_string(folder.join(file)).unwrap()).unwrap();
        for case in &table.cases {
            let (read, omitted) = back(&case.cluster);
            if omitted.is_empty() {
                let told = diff(&case.cluster, &read).unwrap();
                assert!(told.changes.is_empty(), "{file}:{}:\n{told}", case.line);
                same += 1;
            } else {
                partial += 1;
            }
        }
    }
    assert!(same >= 60 && partial > 0, "{same} the same, {partial} in part");
}

#[test]
fn random_policies_are_the_same_or_closed_or_listed() {
    let (mut same, mut listed) = (0, 0);
    for seed in 0..dcenet_core::test_support::effort(12_u64, 80, 2_400) {
        let mut cluster = test_support::cluster(&mut Rng::new(seed));
        // Of many policies hardly ever all can be said.
        while seed % 2 == 1 && cluster.policies.len() > 1 + seed as usize / 2 % 2 {
            cluster.policies.pop_last();
        }
        let lists = cluster.policies.values_mut().flat_map(|policy| [&mut policy.ingress, &mut policy.egress]);
        // Nobody elsewhere logs, which is told of each such rule.
        lists.flatten().flatten().for_each(|rule| {
            rule.log = false;
            // Nor does anybody learn of names, which in half of the clusters nobody asks for.
            if let (Peers::OneOf(peers), true) = (&mut rule.peers, seed % 2 == 1) {
                peers.retain(|peer| !matches!(peer, Peer::Name(_)));
            }
        });
        let (read, omitted) = back(&cluster);
        let told = diff(&cluster, &read).unwrap();
        if omitted.is_empty() {
            assert!(told.changes.is_empty(), "seed {seed}:\n{told}");
            same += 1;
        } else {
            listed += 1;
        }
        // Without a word that something is open, nothing is.
        if !omitted.iter().any(|omission| omission.ends_with("open to what is behind")) {
            let opened =
                told.changes.iter().find(|change| change.after.verdict == dcenet_policy::model::Verdict::Allow);
            assert!(opened.is_none(), "seed {seed}:\n{}\n{omitted:#?}", opened.unwrap());
        }
    }
    assert!(same > 0 && listed > 0, "{same} the same, {listed} listed");
}

fn two() -> Cluster {
    let mut cluster = Cluster::default();
    for namespace in ["x", "y"] {
        cluster.insert_namespace(namespace, []);
    }
    for (namespace, name, address) in [("x", "db", "10.0.0.1"), ("x", "web", "10.0.0.2"), ("y", "mon", "10.0.0.3")] {
        cluster.pods.insert(PodId::new(namespace, name), Pod::new([("app", name)], [address.parse().unwrap()]));
    }
    cluster
}

#[test]
fn what_kubernetes_cannot_say_is_listed_and_the_rest_is_exact() {
    let policies = r#"
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: db, namespace: x }
spec:
  ingress:
  - { action: allow, from: [ { pods: { podSelector: { matchLabels: { app: web } } } } ], services: [ { protocol: tcp, notPorts: [ 22 ] }, { protocol: icmp, type: 8 } ] }
  - { action: deny, from: [ { cidrs: [ 10.0.0.3/32 ] } ] }
  - { action: allow, from: [ { cidrs: [ 10.0.0.0/8 ] } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: later, namespace: x }
spec: { priority: 2000, ingress: [ { action: allow } ], egress: [ { action: allow } ] }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: edge }
spec:
  tier: admin
  priority: 2000
  ingress: [ { action: deny, from: [ { notCidrs: [ 10.0.0.0/8, "::/0" ] } ] } ]
  egress: [ { action: deny, to: [ { cidrs: [ 192.168.0.0/30 ], except: [ 192.168.0.2/32 ] } ], services: [ { protocol: udp, ports: [ 53 ] }, { protocol: 47 } ] } ]
"#;
    let mut cluster = two();
    cluster.policies = Documents::default().with_yaml("p", policies).unwrap().policies;
    let (read, omitted) = back(&cluster);
    assert_eq!(
        omitted,
        [
            "x/policy/db ingress[0]: port 0 of tcp; closed",
            "x/policy/db ingress[0]: protocol icmp; closed",
            "x/policy/db ingress[2]: left out: x/policy/db ingress[1] may stop it, and cannot be expressed; closed",
            "x/policy/later ingress[0]: left out: x/policy/db ingress[1] may stop it, and cannot be expressed; closed",
            "admin:policy/edge ingress[0]: a peer that is no pod; open to what is behind",
            "admin:policy/edge egress[0]: protocol 47; open to what is behind",
        ]
    );
    // The same without what the list names, in words of its own.
    let rest = r#"
{ apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: { name: db, namespace: x }, spec: { podSelector: {}, ingress: [ { from: [ { podSelector: { matchLabels: { app: web } } } ], ports: [ { port: 1, endPort: 21 }, { port: 23, endPort: 65535 } ] } ] } }
---
{ apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: { name: later, namespace: x }, spec: { podSelector: {}, policyTypes: [ Ingress, Egress ], egress: [ {} ] } }
---
{ apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: { name: edge }, spec: { tier: admin, priority: 1, egress: [ { action: deny, to: [ { cidrs: [ 192.168.0.0/31, 192.168.0.3/32 ] } ], services: [ { protocol: udp, ports: [ 53 ] } ] } ] } }
"#;
    let expected = Cluster { policies: Documents::default().with_yaml("r", rest).unwrap().policies, ..cluster.clone() };
    assert_eq!(diff(&expected, &read).unwrap().to_string(), "");
    assert_ne!(diff(&cluster, &read).unwrap().to_string(), "", "and what the list names does change");
}

#[test]
fn groups_nodes_services_and_tiers_become_what_kubernetes_has_for_them() {
    let written = r#"
{ apiVersion: dcenet.io/v1alpha1, kind: Tier, metadata: { name: early }, spec: { order: 10 } }
---
{ apiVersion: dcenet.io/v1alpha1, kind: Tier, metadata: { name: fence }, spec: { order: 20, end: deny } }
---
{ apiVersion: dcenet.io/v1alpha1, kind: PrefixGroup, metadata: { name: partners }, spec: { cidrs: [ 203.0.113.0/24, 198.51.100.0/25 ], except: [ 203.0.113.128/25 ] } }
---
{ apiVersion: v1, kind: Service, metadata: { name: sql, namespace: x }, spec: { clusterIP: 10.96.0.7, ports: [ { port: 5432 }, { port: 53, protocol: UDP } ] } }
---
{ apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: { name: s1, namespace: x, labels: { kubernetes.io/service-name: sql } }, addressType: IPv4, endpoints: [ { addresses: [ 10.0.0.1 ] }, { addresses: [ 198.51.100.200 ] } ], ports: [ { port: 5432 }, { port: 53, protocol: UDP } ] }
---
{ apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: { name: e }, spec: { tier: early, priority: 1, ingress: [ { action: allow, services: [ { protocol: tcp, ports: [ 1 ] } ] } ] } }
---
{ apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: { name: f }, spec: { tier: fence, priority: 1, ingress: [ { action: allow } ] } }
---
{ apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: { name: n }, spec: { tier: none, priority: 1, ingress: [ { action: allow } ] } }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: web, namespace: x }
spec:
  subject: { podSelector: { matchLabels: { app: web } } }
  ingress:
  - { action: allow, from: [ { prefixGroups: [ partners ] }, { nodes: { matchLabels: { role: a } } } ], services: [ { protocol: tcp, ports: [ 443 ] } ] }
  - { action: allow, from: [ { prefixGroups: [ nowhere ] }, { pods: { serviceAccounts: [ robot ] } } ] }
  egress:
  - { action: allow, to: [ { service: { name: sql } }, { pods: { podSelector: { matchLabels: { app: db } } } } ] }
  - { action: allow, to: [ { service: { name: sql } } ] }
---
{ apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: { name: robots, namespace: x }, spec: { subject: { serviceAccounts: [ robot ] }, ingress: [] } }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: edge }
spec:
  tier: admin
  priority: 7
  ingress: [ { action: deny, from: [ { nodes: { matchLabels: { role: a } } } ] } ]
  egress:
  - { action: deny, to: [ { service: { namespace: x, name: sql } }, { prefixGroups: [ partners ] } ] }
  - { action: pass, to: [ { nodes: { matchLabels: { role: a } } } ] }
"#;
    let documents = Documents::default().with_yaml("p", written).unwrap();
    let mut cluster = two();
    (cluster.policies, cluster.catalog) = (documents.policies.clone(), documents.catalog.clone());
    for (node, address, role) in [("n1", "192.0.2.1", "a"), ("n2", "192.0.2.2", "b")] {
        cluster.nodes.insert(node.to_owned(), [address.parse().unwrap()].into());
        cluster.catalog.node_labels.insert(node.to_owned(), [("role".to_owned(), role.to_owned())].into());
    }
    // What the model says and no reader does: ports beside a service, and a service as a source.
    let web = cluster.policies.get_mut(&PolicyId::new("x", "policy/web")).unwrap();
    let ports =
        [(Protocol::TCP, PortSpec::Range { first: 5000, last: 6000 }), (Protocol::UDP, PortSpec::Named("dns".into()))];
    for (rule, (protocol, port)) in web.egress.as_mut().unwrap().iter_mut().zip(ports) {
        rule.ports = Ports::OneOf(vec![PortMatch { protocol, port }]);
    }
    if let Peers::OneOf(peers) = &mut web.ingress.as_mut().unwrap()[1].peers {
        peers.push(Peer::Service(ServiceId::new("x", "sql")));
    }
    let (read, omitted) = back(&cluster);
    assert_eq!(
        omitted,
        [
            "none:policy/n: left out: Kubernetes has no tier none; open to what is behind",
            "early:policy/e: left out: Kubernetes has no tier early; closed",
            "fence:policy/f: left out: Kubernetes has no tier fence; open to what is behind",
            "x/policy/robots: its subject asks for a service account: left out; open to what is behind",
            "x/policy/web ingress[1]: the group nowhere, which is not known; closed",
            "x/policy/web ingress[1]: a service account; closed",
            "x/policy/web egress[1]: names of ports with a service; closed",
            "admin:policy/edge ingress[0]: a peer that is no pod; open to what is behind",
        ]
    );
    // The same in words of its own.
    let rest = r#"
{ apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: { name: web, namespace: x }, spec: { podSelector: { matchLabels: { app: web } }, policyTypes: [ Ingress, Egress ],
  ingress: [ { from: [ { ipBlock: { cidr: 203.0.113.0/25 } }, { ipBlock: { cidr: 198.51.100.0/25 } }, { ipBlock: { cidr: 192.0.2.1/32 } } ], ports: [ { port: 443 } ] } ],
  egress: [ { to: [ { podSelector: { matchLabels: { app: db } } } ], ports: [ { port: 5000, endPort: 6000 } ] }, { to: [ { ipBlock: { cidr: 198.51.100.200/32 } }, { ipBlock: { cidr: 10.96.0.7/32 } } ], ports: [ { port: 5432 } ] } ] } }
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: { name: edge }
spec:
  tier: Admin
  priority: 7
  subject: { namespaces: {} }
  egress:
  - { action: Deny, to: [ { networks: [ 10.0.0.1/32, 198.51.100.200/32, 10.96.0.7/32 ] } ], protocols: [ { tcp: { destinationPort: { number: 5432 } } }, { udp: { destinationPort: { number: 53 } } } ] }
  - { action: Deny, to: [ { networks: [ 203.0.113.0/25, 198.51.100.0/25 ] } ] }
  - { action: Pass, to: [ { networks: [ 192.0.2.1/32 ] } ] }
"#;
    let expected = Cluster { policies: Documents::default().with_yaml("r", rest).unwrap().policies, ..cluster.clone() };
    assert_eq!(diff(&expected, &read).unwrap().to_string(), "");
    assert_ne!(diff(&cluster, &read).unwrap().to_string(), "", "and what the list names does change");
}

#[test]
fn nodes_whose_labels_are_not_known_are_listed_where_kubernetes_opens_to_them() {
    let nodes = [("n1", "192.0.2.1"), ("n2", "192.0.2.2"), ("far", "203.0.113.1")];
    let kubernetes = |cluster: &mut Cluster| {
        let labels = nodes.map(|(node, _)| (node.to_owned(), [("role".to_owned(), "b".to_owned())].into()));
        cluster.catalog.node_labels.extend(labels);
        cluster.catalog.node_labels.insert("n1".to_owned(), [("role".to_owned(), "a".to_owned())].into());
    };
    let left_out = "admin:policy/edge egress[0]: nodes whose labels are not known; open to what is behind";
    let none: &[&str] = &[];
    let cases: [(&str, &[&str], &[&str]); 9] = [
        ("deny", &["n1", "n2", "far"], &[left_out]),
        ("deny", &["n2"], &[left_out]),
        ("deny", &["far"], &[left_out]),
        ("deny", none, none),
        ("pass", &["n2"], &[left_out]),
        ("pass", none, none),
        ("allow", &["n1", "n2", "far"], none),
        ("allow", &["n1"], none),
        ("allow", none, none),
    ];
    for (action, unknown, listed) in cases {
        let policies = format!(
            "{{ apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: {{ name: edge }}, spec: {{ tier: admin, priority: 1, \
             egress: [ {{ action: {action}, to: [ {{ nodes: {{ matchLabels: {{ role: a }} }} }} ] }} ] }} }}\n---\n\
             {{ apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: {{ name: last }}, spec: {{ tier: baseline, \
             priority: 1, egress: [ {{ action: deny, services: [ {{ protocol: tcp, ports: [ 22 ] }} ] }} ] }} }}\n"
        );
        let mut here = two();
        here.policies = Documents::default().with_yaml("p", &policies).unwrap().policies;
        for (node, address) in nodes {
            let of = if node == "far" { &mut here.catalog.external_addresses } else { &mut here.nodes };
            of.insert(node.to_owned(), [address.parse().unwrap()].into());
        }
        kubernetes(&mut here);
        here.catalog.node_labels.retain(|node, _| !unknown.contains(&node.as_str()));
        let (mut there, omitted) = back(&here);
        assert_eq!(omitted, listed, "{action}, {unknown:?} not known");
        kubernetes(&mut there);
        let told = diff(&here, &there).unwrap();
        assert_eq!(told.changes.is_empty(), listed.is_empty(), "{action}, {unknown:?} not known:\n{told}");
    }
}

#[test]
fn a_matrix_is_well_formed_and_says_what_the_report_says() {
    let mut cluster = two();
    let evil = PodId::new("x", "<b>&\"'\u{1}");
    cluster.pods.insert(evil.clone(), Pod::new([], ["10.0.0.9".parse().unwrap()]));
    cluster.pods.insert(PodId::new("x", "v6"), Pod::new([], ["fd00::1".parse().unwrap()]));
    let deny = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p, namespace: x}, \
                spec: {podSelector: {matchLabels: {app: db}}}}";
    cluster.policies = Documents::default().with_yaml("p", deny).unwrap().policies;
    let mut report = reach(&cluster, &["tcp/80".parse().unwrap()], &mut Evaluator::new(&cluster)).unwrap();
    report.results.retain(|answer| answer.source != evil || answer.destination.name != "mon");
    let text = report.matrix_text();
    let ipv4 = text.split("== ").nth(1).unwrap();
    let rows: Vec<&str> = ipv4.lines().filter_map(|line| line.get(line.len().saturating_sub(7)..)).collect();
    assert_eq!(
        rows,
        ["/80 ipv4", "1 2 3 4", ". X . -", ". . . .", ". X . .", ". X . ."]
            .map(|row| row.get(row.len().saturating_sub(7)..).unwrap())
    );

    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let page = report.matrix_html();
    let html = roxmltree::Document::parse_with_options(&page, options).unwrap();
    let count = |name: &str| {
        html.descendants().filter(|node| node.has_tag_name(("http://www.w3.org/1999/xhtml", name))).count()
    };
    assert_eq!([count("table"), count("caption"), count("td"), count("script"), count("b")], [2, 2, 16 + 1, 0, 0]);
    let cells: String = html
        .descendants()
        .filter(|node| node.tag_name().name() == "td")
        .filter_map(|node| node.first_element_child()?.text())
        .collect();
    assert_eq!(cells, ".X.-.....X...X...");
    assert!(html.descendants().filter(|node| node.tag_name().name() == "th").all(|node| node.has_attribute("scope")));
    assert!(html.descendants().any(|node| node.text() == Some("x/<b>&\"'\u{fffd}")), "{page}");
    assert!(
        page.contains("prefers-color-scheme:dark") && !page.contains("http://") || page.matches("http://").count() == 1
    );
    let svg = report.matrix_svg();
    let svg = roxmltree::Document::parse(&svg).unwrap();
    let titles = svg.descendants().filter(|node| node.tag_name().name() == "title").count();
    assert_eq!(titles, 1 + 16 + 1);
}
