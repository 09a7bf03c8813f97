//! What is read, and what is told of it.

use dcenet_policy::sources::kubernetes::Documents;

/// To find a line costs a parse of the text at most once: a parse for each of these would take hours.
#[test]
fn each_of_many_closed_rules_has_its_line() {
    let (policies, rules) = (800, 25);
    let mut text =
        String::from("apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicyList\nitems:\n");
    for policy in 0..policies {
        text.push_str(&format!(
            "- metadata: {{ name: p{policy} }}\n  spec:\n    tier: Admin\n    priority: 1\n    \
             subject: {{ namespaces: {{}} }}\n    egress:\n"
        ));
        for _ in 0..rules {
            text.push_str("    - { action: Deny, to: [ { domainNames: [ example.org ] } ] }\n");
        }
    }
    let documents = Documents::default().with_yaml("many.yaml", &text).unwrap();
    let wanted = (0..policies).flat_map(|policy| (0..rules).map(move |rule| 3 + policy * (6 + rules) + 6 + rule + 1));
    let found: Vec<_> = documents.closed.iter().map(|closed| closed.line.unwrap()).collect();
    assert_eq!(found.len() as u64, policies * rules);
    assert!(found.into_iter().eq(wanted));
}

#[test]
fn floats_beyond_f64_are_their_text() {
    let text = "\
# Zwölf ✓
apiVersion: v1
kind: Namespace
metadata: { name: n, labels: { v: 12e4567, quoted: '12e4567', w: -1.5E+999, same: &a 9e999, again: *a } }
---
apiVersion: v1
kind: Pod
metadata:
  name: ü
  namespace: n
";
    let refused = Documents::default().with_yaml("a.yaml", text).unwrap_err().to_string();
    assert!(refused.starts_with("a.yaml:9: document 1: metadata.name: "), "{refused}");
    let text = text.replace("name: ü", "name: p\n  annotations: { é: 1e999 }\n  labels: { commit: 1234e567 }");
    let documents = Documents::default().with_yaml("a.yaml", &text).unwrap();
    let labels = |labels: &dcenet_policy::model::Labels| {
        labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
    };
    let namespace = labels(&documents.namespaces["n"]);
    assert_eq!(namespace, "again=9e999,quoted=12e4567,same=9e999,v=12e4567,w=-1.5E+999");
    let (id, _) = documents.left_out.first_key_value().unwrap();
    assert_eq!(id.to_string(), "n/p");
    // What is not beyond it stays a number, and what JSON lacks is refused.
    for (value, message) in
        [("12e4", "must be text; quote it"), (".inf", "not YAML: "), ("-.INF", "not YAML: "), (".nan", "not YAML: ")]
    {
        let text = text.replace("12e4567,", &format!("{value},"));
        let refused = Documents::default().with_yaml("a.yaml", &text).unwrap_err().to_string();
        assert!(refused.contains(message), "{value}: {refused}");
    }
}

#[test]
fn an_address_that_pod_and_node_share_is_the_pods() {
    let pod = |name: &str, host: &str, more: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nspec: {{ nodeName: n-{name}{more} }}\nstatus: \
             {{ podIP: 10.0.0.1, hostIP: {host}, hostIPs: [ {{ ip: {host} }} ] }}\n"
        )
    };
    let read = |text: &str| Documents::default().with_yaml("a.yaml", text);
    let documents = read(&pod("one", "10.0.0.1", "")).unwrap();
    assert_eq!((documents.pods.len(), documents.nodes.len()), (1, 0));
    // A node of another address is told as ever, and so is one whose pod shares its network.
    assert_eq!(read(&pod("one", "10.0.0.9", "")).unwrap().nodes["n-one"].len(), 1);
    assert_eq!(read(&pod("one", "10.0.0.1", ", hostNetwork: true")).unwrap().nodes["n-one"].len(), 1);
    // Nobody else may have it.
    let both = pod("one", "10.0.0.1", "") + &pod("two", "10.0.0.1", ", hostNetwork: true");
    let refused = read(&both).unwrap_err().to_string();
    assert!(refused.contains("10.0.0.1 is the address of pod default/one, too"), "{refused}");
}
