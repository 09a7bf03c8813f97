//! Reading NetworkPolicy objects: what they mean, and how bad ones are refused.

#![cfg(feature = "yaml")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use dcenet_policy::model::*;
use dcenet_policy::sources::SourceError;
use dcenet_policy::sources::networkpolicy::{MAX_COMBINATIONS, from_json, from_yaml};

fn with_spec(spec: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: n}}\nspec: {spec}\n"
    )
}

fn read(spec: &str) -> Policy {
    from_yaml(&with_spec(spec)).unwrap().remove(0)
}

fn refusal(spec: &str) -> String {
    from_yaml(&with_spec(spec)).unwrap_err().to_string()
}

#[test]
fn policy_types_default_by_the_rules_that_are_there() {
    let governed = |spec| {
        let policy = read(spec);
        (policy.ingress.is_some(), policy.egress.is_some())
    };
    assert_eq!(governed("{podSelector: {}}"), (true, false));
    assert_eq!(governed("{podSelector: {}, ingress: [{}]}"), (true, false));
    assert_eq!(governed("{podSelector: {}, egress: [{}]}"), (true, true));
    assert_eq!(governed("{podSelector: {}, egress: []}"), (true, false), "an empty list is no section");
    assert_eq!(governed("{podSelector: {}, policyTypes: []}"), (true, false));
    assert_eq!(governed("{podSelector: {}, policyTypes: [Egress]}"), (false, true));
    assert_eq!(governed("{podSelector: {}, policyTypes: [Egress], ingress: [{}]}"), (false, true));
    assert_eq!(governed("{podSelector: {}, policyTypes: [Ingress, Egress]}"), (true, true));
}

#[test]
fn empty_and_missing_lists_match_everything() {
    for spec in ["{ingress: [{}]}", "{ingress: [{from: [], ports: []}]}", "{ingress: [{from: null, ports: null}]}"] {
        let rules = read(spec).ingress.unwrap();
        assert_eq!(
            rules,
            [Rule { action: Action::Allow, peers: Peers::Any, ports: Ports::Any, schedule: None, log: false }],
            "{spec}"
        );
    }
    assert_eq!(read("{ingress: []}").ingress, Some(vec![]));
    assert_eq!(read("{ingress: null}").ingress, Some(vec![]));
}

#[test]
fn peers_take_the_policys_namespace_unless_they_select_one() {
    let policy = read(
        "{ingress: [{from: [
            {podSelector: {matchLabels: {a: b}}},
            {namespaceSelector: {}},
            {namespaceSelector: {matchExpressions: [{key: e, operator: Exists}]}, podSelector: {}}]}]}",
    );
    let Peers::OneOf(peers) = &policy.ingress.as_ref().unwrap()[0].peers else { panic!("three peers") };
    let all = LabelSelector::default;
    let labelled = LabelSelector {
        requirements: vec![Requirement { key: "a".into(), operator: Operator::In(["b".to_owned()].into()) }],
    };
    let existing = LabelSelector { requirements: vec![Requirement { key: "e".into(), operator: Operator::Exists }] };
    let pods = |namespaces, pods| Peer::Pods(PodMatch { namespaces, pods });
    assert_eq!(
        *peers,
        [
            pods(NamespaceMatch::Named("n".into()), labelled),
            pods(NamespaceMatch::Selected(all()), all()),
            pods(NamespaceMatch::Selected(existing), all()),
        ]
    );
}

#[test]
fn ports_are_numbers_names_ranges_or_a_whole_protocol() {
    let policy = read(
        "{ingress: [{ports: [{port: 80}, {port: web, protocol: UDP}, {port: 1, endPort: 65535, protocol: SCTP},
                             {protocol: UDP}, {}]}]}",
    );
    let Ports::OneOf(ports) = &policy.ingress.as_ref().unwrap()[0].ports else { panic!("five ports") };
    let range = |first, last| PortSpec::Range { first, last };
    let expected = [
        (Protocol::TCP, range(80, 80)),
        (Protocol::UDP, PortSpec::Named("web".into())),
        (Protocol::SCTP, range(1, 65535)),
        (Protocol::UDP, PortSpec::Any),
        (Protocol::TCP, PortSpec::Any),
    ];
    assert_eq!(*ports, expected.map(|(protocol, port)| PortMatch { protocol, port }));
}

#[test]
fn lists_and_many_documents_are_read_in_order() {
    let one =
        |name: &str| format!("{{kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {{name: {name}}}}}");
    let text = format!(
        "---\n{}\n---\n# nothing\n---\n{{kind: List, apiVersion: v1, items: [{}, {}]}}\n---\n\
         {{kind: NetworkPolicyList, apiVersion: networking.k8s.io/v1, metadata: {{resourceVersion: '1'}}, \
           items: [{{metadata: {{name: d}}, spec: {{}}}}]}}\n",
        one("a"),
        one("b"),
        one("c")
    );
    let names: Vec<_> = from_yaml(&text).unwrap().into_iter().map(|policy| policy.id.to_string()).collect();
    assert_eq!(names, ["default/a", "default/b", "default/c", "default/d"]);
    assert!(from_yaml("").unwrap().is_empty());
}

#[test]
fn json_and_yaml_mean_the_same() {
    let json = r#"{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy",
        "metadata":{"name":"p","namespace":"n","managedFields":[{"manager":"kubectl"}]},
        "spec":{"podSelector":{"matchLabels":{"app":"db"}},"ingress":[{"ports":[{"port":5432}]}]}}"#;
    let yaml = read("{podSelector: {matchLabels: {app: db}}, ingress: [{ports: [{port: 5432}]}]}");
    assert_eq!(from_json(json).unwrap(), [yaml]);
}

#[test]
fn bad_values_are_refused_with_place_value_and_remedy() {
    let cases = [
        ("{ingress: [{ports: [{port: 0}]}]}", "spec.ingress[0].ports[0].port: 0: must be a number from 1 to 65535"),
        ("{ingress: [{ports: [{port: 65536}]}]}", "spec.ingress[0].ports[0].port: 65536: must be a number"),
        ("{ingress: [{ports: [{port: '80'}]}]}", "spec.ingress[0].ports[0].port: \"80\": must be a number, unquoted"),
        ("{ingress: [{ports: [{port: -1}]}]}", "port: -1: must be a number"),
        ("{ingress: [{ports: [{port: 80.5}]}]}", "port: 80.5: must be a number"),
        ("{ingress: [{ports: [{port: 80, endPort: 79}]}]}", "endPort: 79: must not be below port 80"),
        ("{ingress: [{ports: [{endPort: 79}]}]}", "endPort: 79: needs a numeric port"),
        ("{ingress: [{ports: [{port: web, endPort: 79}]}]}", "endPort: 79: needs a numeric port"),
        ("{ingress: [{ports: [{protocol: tcp}]}]}", "protocol: \"tcp\": must be TCP or UDP or SCTP"),
        ("{ingress: [{ports: [{protocol: ICMP}]}]}", "protocol: \"ICMP\": must be TCP or UDP or SCTP"),
        ("{ingress: [{from: [{}]}]}", "spec.ingress[0].from[0]: {}: must have podSelector"),
        ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}", "ipBlock excludes the selectors"),
        ("{ingress: [{from: [{ipBlock: {}}]}]}", "ipBlock.cidr: nothing: is required"),
        ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]}", "cidr: \"10.0.0.0\": must be a prefix"),
        ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}", "cidr: \"10.0.0.0/33\": must be a prefix"),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}",
            "except[0]: \"11.0.0.0/16\": must be a strict subset of cidr 10.0.0.0/8",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
            "except[0]: \"10.0.0.0/8\": must be a strict subset",
        ),
        ("{policyTypes: [ingress]}", "spec.policyTypes[0]: \"ingress\": must be Ingress or Egress"),
        ("{podSelector: {matchExpressions: [{key: a, operator: in}]}}", "operator: \"in\": must be In or NotIn"),
        ("{podSelector: {matchExpressions: [{key: a, operator: In}]}}", "values: nothing: In needs at least one"),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
            "values: [\"b\"]: Exists takes no values",
        ),
        (
            "{podSelector: {matchLabels: {a: true}}}",
            "spec.podSelector.matchLabels[\"a\"]: true: must be text; quote it",
        ),
        ("{podSelector: {matchLabels: {'a b': c}}}", "the key must be a label key"),
        ("{podSelector: {matchLabels: {a: 'b c'}}}", "\"b c\": must be a label value"),
        ("{podSelector: []}", "spec.podSelector: []: must be an object"),
        ("{ingress: {}}", "spec.ingress: {}: must be a list"),
    ];
    for (spec, expected) in cases {
        let message = refusal(spec);
        assert!(message.starts_with("document 0: ") && message.contains(expected), "{spec}\n{message}");
    }
}

#[test]
fn unknown_fields_are_refused_with_a_suggestion() {
    assert_eq!(
        refusal("{podselector: {}}"),
        "document 0: spec.podselector: unknown field; did you mean \"podSelector\"?"
    );
    assert_eq!(refusal("{egress: [{from: []}]}"), "document 0: spec.egress[0].from: unknown field; remove it");
    assert_eq!(
        refusal("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, exept: []}}]}]}"),
        "document 0: spec.ingress[0].from[0].ipBlock.exept: unknown field; did you mean \"except\"?"
    );
}

#[test]
fn other_documents_are_refused() {
    let message = |text: &str| from_yaml(text).unwrap_err().to_string();
    assert_eq!(message("{kind: Pod, apiVersion: v1}"), "document 0: kind: \"Pod\": must be NetworkPolicy");
    assert!(message("{kind: NetworkPolicy, apiVersion: extensions/v1beta1}").contains("must be networking.k8s.io/v1"));
    assert!(
        message("{kind: List, apiVersion: v1}\n---\n---\nkind: 7").starts_with("document 1: kind: 7: must be text")
    );
    assert!(message("[1]").contains("document 0: the document: [1]: must be an object"));
    assert!(message("a: [").starts_with("not YAML: "));
    assert!(from_json("{").unwrap_err().to_string().starts_with("not JSON: "));
    let unnamed = "{kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {}}";
    assert_eq!(message(unnamed), "document 0: metadata.name: nothing: is required");
    let named = "{kind: NetworkPolicy, apiVersion: networking.k8s.io/v1, metadata: {name: a}}";
    assert!(message(&format!("{named}\n---\n{named}")).contains("document 1: metadata: "));
}

#[test]
fn a_rule_with_too_many_combinations_is_refused() {
    let peers = "{podSelector: {}},".repeat(300);
    let ports = "{port: 80},".repeat(300);
    let text = with_spec(&format!("{{ingress: [{{from: [{peers}], ports: [{ports}]}}]}}"));
    match from_yaml(&text).unwrap_err() {
        SourceError::ImplLimitExceeded { path, found: 90_000, limit: MAX_COMBINATIONS, .. } => {
            assert_eq!(path, "spec.ingress[0]");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn ten_thousand_policies_in_one_file_are_read() {
    let one = |number: usize| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p{number}, namespace: n}}\nspec:\n  \
             podSelector: {{matchLabels: {{app: a{number}}}}}\n  ingress:\n  - from:\n    - podSelector: {{matchLabels: \
             {{app: b}}}}\n    ports: [{{port: 80}}, {{port: 90, endPort: 99}}]\n"
        )
    };
    let text: Vec<String> = (0..10_000).map(one).collect();
    assert_eq!(from_yaml(&text.join("---\n")).unwrap().len(), 10_000);
}

#[test]
fn broken_texts_are_refused_not_fatal() {
    let whole = with_spec(
        "{podSelector: {matchLabels: {a: b}}, policyTypes: [Ingress, Egress],
          ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}, {namespaceSelector: {}}],
                     ports: [{port: 80, endPort: 90}, {port: web, protocol: UDP}]}],
          egress: [{to: [{podSelector: {matchExpressions: [{key: a, operator: NotIn, values: [b]}]}}]}]}",
    );
    let mut rng = dcenet_policy::test_support::Rng::new(1);
    let (mut read, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut bytes = whole.clone().into_bytes();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(bytes.len());
            match rng.below(4) {
                0 => bytes[at] = *rng.pick(b" \n{}[],:-#&*!|>'\"%@`019azAZ~\t\x00"),
                1 => drop(bytes.remove(at)),
                2 => bytes.truncate(at + 1),
                _ => bytes.insert(at, *rng.pick(b"{[,:-0")),
            }
        }
        match from_yaml(&String::from_utf8_lossy(&bytes)) {
            Ok(_) => read += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    }
    assert!(read > 200 && refused > 5_000, "{read} read, {refused} refused");
    let deep = "[".repeat(100_000);
    from_yaml(&deep).unwrap_err();
    from_json(&deep).unwrap_err();
    let bomb = "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
                d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n";
    from_yaml(bomb).unwrap_err();
}
