//! Policies of signed bundles, as their issuer sees them.

use std::fs;

use dcenet_core::test_support::{Rung, require};
use dcenet_policy::bundle::{Bundle, BundleDocument, SigningKey};
use serde_json::{Value, json};

use crate::common::*;

/// RFC 8032, section 7.1, tests 1 and 2.
const KEY: &str = "MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g";
const STRANGER: &str = "MC4CAQAwBQYDK2VwBCIEIEzNCJsoAZYhH2w4x0m52nJDvcTrvuq4SBPKqY6v0kqZ";
const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----\n";

/// Everybody may talk to everybody.
const OPEN: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: db, namespace: shop }
spec: { podSelector: {}, ingress: [ {} ] }
";

fn envelope(key: &str, generation: u64, text: &str) -> String {
    envelope_of("production", key, generation, text)
}

fn envelope_of(name: &str, key: &str, generation: u64, text: &str) -> String {
    let key = format!("-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----\n");
    let bundle = Bundle::new(name, generation, vec![BundleDocument::new("db.yaml", text)]).unwrap();
    bundle.sign(&[SigningKey::from_pem(&key).unwrap()]).unwrap()
}

#[test]
fn a_node_takes_what_is_signed_and_newer_and_tells_what_is_in_force_where() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    let key = node.host.directory().join("issuer.pem");
    fs::write(&key, PUBLIC).unwrap();
    node.config["policies"]["trust"] = json!({ "keys": [key], "sets": { "production": 1 } });
    // Nothing is there yet, and pods are as the default says: nobody takes that for a set without policies.
    let daemon = node.start();
    let page = || -> Value { serde_json::from_str(&node.get("/policy")[2]).unwrap() };
    assert!(page()["refused"].as_str().unwrap().contains("production: no bundle of this set"), "{}", page());
    node.put_policy("production.bundle", &envelope(KEY, 1, OPEN));
    eventually("generation 1 is in force", || page()["sets"][0]["generation"] == 1 && page()["refused"].is_null());
    let [web, db, scan] = ["web", "db", "scan"].map(|name| node.add("shop", name));
    assert!(talks(&web, &db, true) && talks(&scan, &db, true), "generation 1 is open");
    node.put_policy("production.bundle", &envelope(KEY, 2, DB));
    eventually("generation 2 is in force", || !talks(&scan, &db, false));

    let told = page();
    assert_eq!((&told["node"], &told["refused"], &told["version"]), (&"n1".into(), &Value::Null, &1.into()));
    assert_eq!((&told["sets"][0]["name"], &told["sets"][0]["generation"]), (&"production".into(), &2.into()));
    assert!(told["sets"][0]["digest"].as_str().unwrap().starts_with("sha256:"), "{told}");
    assert_eq!(told["sets"][0]["signers"].as_array().unwrap().len(), 1);
    let endpoints = told["endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 3, "{told}");
    assert!(endpoints.iter().all(|e| e["isCurrent"] == true && e["isEnforced"] == true), "{told}");
    assert_eq!(told["isPending"], false);
    assert!(endpoints.iter().any(|e| e["workload"] == "shop/db"), "{told}");
    assert_eq!(node.samples().get("dcenet_daemon_policy_set_generation{set=\"production\"}"), Some(&2.0));

    // None of these takes its place, whatever it opens, and the issuer is told.
    let refused = |name: &str, text: &str, reason: &str| {
        node.put_policy(name, text);
        eventually(reason, || page()["refused"].as_str().is_some_and(|told| told.contains(reason)));
        assert!(!talks(&scan, &db, false), "{reason}");
        assert_eq!(page()["sets"][0]["generation"], 2);
        node.put_policy("production.bundle", &envelope(KEY, 2, DB));
        if name != "production.bundle" {
            fs::remove_file(node.policies().join(name)).unwrap();
        }
        eventually("what was refused is gone", || page()["refused"].is_null());
    };
    refused("production.bundle", &envelope(KEY, 1, OPEN), "generation 1 is older than 2");
    refused("production.bundle", &envelope(KEY, 2, OPEN), "generation 2 is another than the one that was taken");
    refused("production.bundle", &envelope(STRANGER, 3, OPEN), "signed by 0 of the trusted keys");
    refused(
        "staging.bundle",
        &envelope_of("staging", KEY, 1, &OPEN.replace("name: db", "name: open")),
        "no such set is wanted",
    );
    refused("open.yaml", &OPEN.replace("name: db", "name: open"), "nobody has signed it");
    // What says whom the rules mean is no more for whoever brings bundles.
    let cluster = |labels: &str| {
        format!("{{ apiVersion: v1, kind: Pod, metadata: {{ name: db, namespace: shop, labels: {labels} }} }}\n")
    };
    refused("pod.yaml", &cluster("{ app: other }"), "nobody has signed it");
    fs::remove_file(node.policies().join("production.bundle")).unwrap();
    eventually("a bundle is missed", || {
        page()["refused"].as_str().is_some_and(|told| told.contains("no bundle of this set"))
    });
    assert!(!talks(&scan, &db, false));

    // The next daemon knows as well what was taken.
    daemon.kill();
    node.put_policy("production.bundle", &envelope(KEY, 1, OPEN));
    let _daemon = node.start();
    assert!(page()["refused"].as_str().unwrap().contains("generation 1 is older than 2"), "{}", page());
    assert!(!talks(&scan, &db, false));
    // It goes on with that, for what comes as well, and tells so.
    assert_eq!(page()["sets"][0]["generation"], 2, "{}", page());
    let is_under_it = |page: &Value| {
        let endpoints = page["endpoints"].as_array().unwrap();
        endpoints.iter().all(|e| e["isCurrent"] == true && e["isEnforced"] == true)
    };
    let late = node.add("shop", "late");
    assert!(is_under_it(&page()), "{}", page());
    assert!(talks(&late, &web, true) && !talks(&late, &db, false));
    assert_eq!(node.samples()["dcenet_daemon_policies_current"], 0.0);
    // What is signed and newer may open.
    node.put_policy("production.bundle", &envelope(KEY, 3, OPEN));
    eventually("generation 3 is in force", || talks(&scan, &db, false));
    assert!(talks(&web, &db, true));
}

#[test]
fn bundles_and_keys_that_cannot_be_used_are_told_before_the_daemon_begins() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::under_policy();
    node.put_policy("production.bundle", &envelope(KEY, 1, DB));
    let refused = |node: &Node, reason: &str| {
        let output = node.run("--check");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && told.contains(reason), "{reason}: {told}");
    };
    refused(&node, "nobody is trusted; name the public keys");
    let key = node.host.directory().join("issuer.pem");
    node.config["policies"]["trust"] = json!({ "keys": [key], "sets": { "production": 1 } });
    refused(&node, "policies.trust.keys: ");
    fs::write(&key, "no key").unwrap();
    refused(&node, "not a key: ");
    fs::write(&key, PUBLIC).unwrap();
    assert!(node.run("--check").status.success());
    node.config["policies"]["trust"]["threshold"] = 2.into();
    refused(&node, "policies.trust.threshold: 2 of 1 keys");
    node.config["policies"]["trust"] = json!({ "keys": ["issuer.pem"], "sets": { "production": 1 } });
    refused(&node, "policies.trust.keys: \"issuer.pem\" is not absolute");
    node.config["policies"]["trust"] = json!({ "keys": [key], "sets": { "production": 1 } });
    let cluster = node.host.directory().join("cluster");
    fs::create_dir(&cluster).unwrap();
    node.config["policies"]["cluster"] = json!(cluster);
    fs::write(cluster.join("shop.yaml"), "{ apiVersion: v1, kind: Namespace, metadata: { name: shop } }\n").unwrap();
    assert!(node.run("--check").status.success());
    fs::write(cluster.join("open.yaml"), OPEN.replace("name: db", "name: open")).unwrap();
    refused(&node, "open.yaml: policies.cluster is for namespaces, pods, nodes and services");
    fs::remove_file(cluster.join("open.yaml")).unwrap();
    node.put_policy("production.bundle", &envelope(STRANGER, 1, DB));
    refused(&node, "signed by 0 of the trusted keys");
    node.put_policy("production.bundle", &envelope(KEY, 1, DB));
    node.config["policies"]["trust"]["sets"] = json!({ "production": 2 });
    refused(&node, "generation 1 is older than 2");
    node.config["policies"]["trust"]["sets"] = json!({ "production": 1, "base": 1 });
    refused(&node, "base: no bundle of this set is there");
    let long = "a".repeat(241);
    node.config["policies"]["trust"]["sets"] = json!({ long: 1 });
    refused(&node, "longer than the 240 letters that name a file");
    node.config["policies"]["trust"]["sets"] = json!({});
    refused(&node, "policies.trust.sets: none");
}
