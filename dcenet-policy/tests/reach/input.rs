//! What is read, and what is told of it.

use std::os::unix::fs::symlink;

use dcenet_policy::sources::kubernetes::{Documents, NoteKind};
use serde_json::Value;

use crate::{directory, folder, run};

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

#[test]
fn what_policies_name_and_nobody_gives_is_told() {
    let policy = "\
{apiVersion: dcenet.io/v1alpha1, kind: Policy, metadata: {name: p, namespace: x}, spec: {egress: [
  {action: allow, to: [{prefixGroups: [known, unknwon]}]},
  {action: deny, to: [{service: {name: db}}]},
  {action: deny, to: [{service: {name: early}}]},
  {action: deny, to: [{service: {name: bd}}, {nodes: {}}]}]}}
--- {apiVersion: dcenet.io/v1alpha1, kind: PrefixGroup, metadata: {name: known}, spec: {cidrs: [10.0.0.0/8]}}
--- {apiVersion: v1, kind: Service, metadata: {name: db, namespace: x}, spec: {clusterIP: 10.96.0.1, ports: [{port: 1}]}}
--- {apiVersion: v1, kind: Service, metadata: {name: early, namespace: x}, spec: {clusterIP: None}}
--- {apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: db-1, namespace: x,
  labels: {kubernetes.io/service-name: db}}, addressType: IPv4, endpoints: [], ports: []}
";
    let told = |text: &str| {
        let documents = Documents::default().with_yaml("a.yaml", text).unwrap();
        let notes = documents.notes().into_iter().filter(|note| note.kind == NoteKind::UnknownPeer);
        let texts: Vec<String> = notes.map(|note| note.text).collect();
        let end = ": rules that allow by it match nobody, and those that deny or pass deny everybody";
        texts.iter().map(|text| text.strip_suffix(end).unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(
        told(policy),
        [
            "x/policy/p: no v1 Node is given",
            "x/policy/p: there is no PrefixGroup unknwon",
            "x/policy/p: there is no EndpointSlice of service x/bd",
            "x/policy/p: there is no EndpointSlice of service x/early",
            "x/policy/p: there is no v1 Service x/bd",
        ]
    );
    let with_node = policy.to_owned() + "--- {apiVersion: v1, kind: Node, metadata: {name: n1}}\n";
    assert_eq!(told(&with_node).len(), 4);
}

#[test]
fn capitals_and_links_are_read_or_told() {
    let pod = |name: &str, address: &str| {
        format!(
            r#"{{"apiVersion": "v1", "kind": "Pod", "metadata": {{"name": "{name}"}}, "status": {{"podIP": "{address}"}}}}"#
        )
    };
    let elsewhere = directory(&[("d.yaml", &pod("d", "10.0.0.4")), ("e.txt", &pod("e", "10.0.0.5"))]);
    let directory = directory(&[
        ("a.YAML", &pod("a", "10.0.0.1")),
        ("deep/b.Yml", &pod("b", "10.0.0.2")),
        ("c.JSON", &pod("c", "10.0.0.3")),
        ("odd.yaml.txt", "no object"),
    ]);
    symlink(elsewhere.path(), directory.path().join("linked")).unwrap();
    symlink(elsewhere.path(), directory.path().join("also.yaml")).unwrap();
    symlink(elsewhere.path(), directory.path().join(".hidden")).unwrap();
    symlink(elsewhere.path().join("e.txt"), directory.path().join("deep/e.yaml")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(directory.path().join("s.yml")).unwrap();
    let here = directory.path().to_str().unwrap();
    let (status, out, err) = run(&["--resources", here, "--probe", "sctp/9", "-o", "json"]);
    assert_eq!(status, 0, "{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["results"].as_array().unwrap().len(), 16);
    assert_eq!(
        err.replace(here, "HERE"),
        "reach: not read: HERE/also.yaml: a link to a directory is not followed; give the directory itself\n\
         reach: not read: HERE/linked: a link to a directory is not followed; give the directory itself\n\
         reach: not read: HERE/s.yml: it is no regular file\n\
         reach: namespace default is not given: it has no label but its name\n"
    );
    assert_eq!(told(&report), err);
    // A link that leads nowhere may have been a policy.
    symlink("nowhere", directory.path().join("lost.yaml")).unwrap();
    let (status, _, err) = run(&["--resources", here, "--probe", "sctp/9"]);
    assert_eq!(status, 2);
    assert!(err.contains("/lost.yaml: No such file"), "{err}");
}

/// The report's notes as stderr has them.
fn told(report: &Value) -> String {
    let notes = report["notes"].as_array().unwrap().iter();
    notes.map(|note| format!("reach: {}\n", note["text"].as_str().unwrap())).collect()
}

#[test]
fn the_json_carries_what_stderr_has() {
    for (of, kinds) in [
        ("worlds/kubectl-dump", &["left-out", "left-out", "assumed-namespace", "unused"][..]),
        ("scenarios/cluster-closed", &["closed-rule"; 3]),
        ("scenarios/cluster-priority", &["tie"]),
        ("scenarios/deny-all", &[]),
    ] {
        let resources = match folder(of) {
            world if of.starts_with("worlds") => (None, world),
            scenario => {
                let (joined, _) = crate::scenario(&scenario);
                let path = joined.path().to_owned();
                (Some(joined), path)
            }
        };
        let (status, out, err) =
            run(&["--resources", resources.1.to_str().unwrap(), "--probe", "tcp/80", "-o", "json"]);
        assert_eq!(status, 0, "{err}");
        let report: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(told(&report), err, "{of}");
        let found: Vec<_> = report["notes"].as_array().unwrap().iter().map(|note| note["kind"].clone()).collect();
        assert_eq!(found, kinds, "{of}");
    }
}

#[test]
fn objects_of_different_kinds_may_have_one_name() {
    let object = |version: &str, kind: &str, name: &str, spec: &str, port: u16| {
        format!(
            "---\napiVersion: policy.networking.k8s.io/{version}\nkind: {kind}\nmetadata: {{ name: {name} }}\nspec: {{ {spec}, \
             subject: {{ namespaces: {{}} }}, ingress: [ {{ action: Deny, from: [ {{ namespaces: {{}} }} ], {} }} ] }}\n",
            match kind {
                "ClusterNetworkPolicy" =>
                    format!("protocols: [ {{ tcp: {{ destinationPort: {{ number: {port} }} }} }} ]"),
                _ => format!("ports: [ {{ portNumber: {{ port: {port} }} }} ]"),
            }
        )
    };
    let mut text = String::new();
    for (name, address) in [("a", "10.0.0.1"), ("b", "10.0.0.2")] {
        text +=
            &format!("---\napiVersion: v1\nkind: Pod\nmetadata: {{ name: {name} }}\nstatus: {{ podIP: {address} }}\n");
    }
    text += &object("v1alpha1", "AdminNetworkPolicy", "default", "priority: 1", 1);
    text += &object("v1alpha2", "ClusterNetworkPolicy", "default", "tier: Admin, priority: 2", 2);
    text += &object("v1alpha1", "BaselineAdminNetworkPolicy", "default", "", 3).replace("spec: { ,", "spec: {");
    let second =
        "---\n".to_owned() + &object("v1alpha2", "ClusterNetworkPolicy", "default", "tier: Baseline, priority: 4", 4);
    let directory = directory(&[("a.yaml", &text), ("b.yaml", &second)]);
    let mut arguments = vec!["--resources", directory.path().to_str().unwrap()];
    for probe in ["tcp/1", "tcp/2", "tcp/3", "tcp/4"] {
        arguments.extend(["--probe", probe]);
    }
    for engine in ["evaluator", "vm"] {
        let (status, out, err) = run(&[&arguments[..], &["--engine", engine]].concat());
        assert_eq!(status, 0, "{err}");
        for (port, policy) in
            [(1, "admin:anp/default"), (2, "admin:default"), (3, "baseline:banp/default"), (4, "baseline:default")]
        {
            let line = format!(
                "tcp/{port} default/a -> default/b (10.0.0.1 -> 10.0.0.2): deny; egress allow: no policy selects it; ingress deny: {policy} ingress[0] from[0] ports[0]"
            );
            assert!(out.lines().any(|found| found == line), "{line}\n{out}");
        }
    }
}
