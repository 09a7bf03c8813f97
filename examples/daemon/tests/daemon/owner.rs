//! The daemon as the owner of the node's policy state.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use dcenet_core::test_support::{Rung, require};
use serde_json::json;

use crate::common::*;

#[test]
fn no_verdict_changes_when_the_daemon_is_stopped_killed_and_started_again() {
    if !require(Rung::Kernel) {
        return;
    }
    let node = Node::under_policy();
    node.put_policy("db.yaml", DB);
    let daemon = node.start();
    let [web, db, scan] = ["web", "db", "scan"].map(|name| node.add("shop", name));
    let holds = || {
        assert!(talks(&web, &db, true), "what is allowed passes");
        assert!(!talks(&scan, &db, false), "what is denied does not");
    };
    holds();
    let (allowed, denied) = (Flood::start(&web, &db, 5353), Flood::start(&scan, &db, 5354));

    let status = daemon.stop();
    assert!(status.success(), "{status}");
    holds();
    let daemon = node.start();
    holds();
    daemon.kill();
    holds();
    let daemon = node.start();
    holds();
    // The new owner knows pods of before by their labels, and pods that come find them.
    let other = node.add("shop", "other");
    assert!(!talks(&other, &db, false));
    assert!(talks(&other, &web, true));

    let (sent, received) = allowed.stop();
    assert!(sent > 50 && received == sent, "{received} of {sent}");
    let (sent, received) = denied.stop();
    assert!(sent > 50 && received == 0, "{received} of {sent}");

    // A stop that takes the programs off is seen by the same means.
    let denied = Flood::start(&scan, &db, 5355);
    assert_eq!(node.run("--uninstall").status.code(), Some(1), "a daemon runs");
    daemon.stop();
    let output = node.run("--uninstall");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(talks(&scan, &db, true));
    let (sent, received) = denied.stop();
    assert!(sent > 0 && received > 0, "{received} of {sent}");
}

/// As with containerd, which tells a plugin no labels.
#[test]
fn pods_whose_runtime_tells_no_labels_have_those_of_their_objects() {
    if !require(Rung::Kernel) {
        return;
    }
    let node = Node::under_policy();
    node.put_policy("db.yaml", DB);
    // Nobody has told the cluster their addresses yet: they are being started.
    let object = |name| json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": "shop", "labels": { "app": name } } });
    node.put_policy(
        "pods.json",
        &json!({ "apiVersion": "v1", "kind": "List", "items": [object("web"), object("db")] }).to_string(),
    );
    let _daemon = node.start();
    let [web, db, scan] = ["web", "db", "scan"].map(|name| node.add_with("shop", name, json!([])));
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));

    fs::remove_file(node.policies().join("pods.json")).unwrap();
    eventually("nobody is the policy's any more", || talks(&scan, &db, false));
}

#[test]
fn a_directory_of_policies_is_followed_and_its_last_good_set_stands() {
    if !require(Rung::Kernel) {
        return;
    }
    let node = Node::under_policy();
    node.put_policy(
        "db.yaml",
        &DB.replace(
            "{ podSelector: { matchLabels: { app: web } } }",
            "{ podSelector: { matchLabels: { app: web } } }, { namespaceSelector: { matchLabels: { team: ops } } }",
        ),
    );
    let daemon = node.start();
    let [web, db] = ["web", "db"].map(|name| node.add("shop", name));
    let scan = node.add("ops", "scan");
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));

    // A namespace gets its labels, and loses them.
    let namespace = "{ apiVersion: v1, kind: Namespace, metadata: { name: ops, labels: { team: ops } } }";
    node.put_policy("namespaces.yaml", namespace);
    eventually("the namespace's labels", || talks(&scan, &db, false));
    fs::remove_file(node.policies().join("namespaces.yaml")).unwrap();
    eventually("the labels are gone", || !talks(&scan, &db, false));
    assert!(talks(&web, &db, true));

    let current = || node.samples()["dcenet_daemon_policies_current"];
    assert_eq!(current(), 1.0);
    // A misspelt key in the second document of a file: with it, everybody could reach db.
    let reads = |outcome: &str| {
        let samples = node.samples();
        samples.get(&format!("dcenet_daemon_policy_reads_total{{outcome=\"{outcome}\"}}")).copied().unwrap_or_default()
    };
    let refused = reads("failed");
    fs::remove_file(node.policies().join("db.yaml")).unwrap();
    node.put_policy("all.yaml", &format!("{namespace}\n---\n{}", DB.replacen("podSelector", "podSelecter", 1)));
    eventually("the refusal", || current() == 0.0 && reads("failed") > refused);
    let log = daemon.log();
    let told = log.lines().rfind(|line| line.contains("policies are refused")).expect("it is told");
    for part in ["all.yaml:", "document 1", "spec.podSelecter", "did you mean", "the last good set stands"] {
        assert!(told.contains(part), "{part} in {told}");
    }
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));

    // Half of a file that is still being written, met because another one changes.
    let mut half = fs::File::create(node.policies().join("all.yaml")).unwrap();
    let (first, second) = DB.split_at(DB.find("app: db").unwrap());
    half.write_all(first.as_bytes()).unwrap();
    let refused = reads("failed");
    node.put_policy("namespaces.yaml", namespace);
    eventually("the refusal of half a file", || reads("failed") > refused);
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));
    half.write_all(second.as_bytes()).unwrap();
    drop(half);
    eventually("the whole file", || current() == 1.0);
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));

    // A daemon that finds nothing but a wrong file leaves the verdicts of the one before.
    fs::remove_file(node.policies().join("all.yaml")).unwrap();
    node.put_policy("db.yaml", DB);
    eventually("the policy", || current() == 1.0);
    assert!(!talks(&scan, &db, false));
    daemon.stop();
    node.put_policy("db.yaml", "kind: NetworkPolicy");
    let daemon = node.start();
    assert!(daemon.log().contains("the last verdicts stand"));
    assert!(talks(&web, &db, true) && !talks(&scan, &db, false));
}

/// An empty file system over a directory, until it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn over(directory: &Path) -> Self {
        let status = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(directory).status();
        assert!(status.unwrap().success());
        Self(directory.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(&self.0).status();
        if !status.as_ref().is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted: {status:?}", self.0.display());
        }
    }
}

const TRIED_OUT: &str = "
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: tried, namespace: shop }
spec: { mode: audit, ingress: [] }
";

/// An unmounted directory, or one that is not mounted yet, looks like one that wants no policy.
#[test]
fn an_empty_directory_takes_no_policy_away_unless_it_is_told_to() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    // A node that never had policies needs none.
    let daemon = node.start();
    let [web, db, scan] = ["web", "db", "scan"].map(|name| node.add("shop", name));
    assert!(talks(&scan, &db, true));
    let current = |node: &Node| node.samples()["dcenet_daemon_policies_current"];
    assert_eq!(current(&node), 1.0);
    let aside = node.host.directory().join("aside");
    let refused = |node: &Node, daemon: &Daemon, why: &str| {
        eventually(why, || current(node) == 0.0 && daemon.log().contains(why));
        assert!(talks(&web, &db, true) && !talks(&scan, &db, false), "{why}");
    };
    node.put_policy("db.yaml", DB);
    eventually("the policy", || !talks(&scan, &db, false));

    // Removed and made anew, as by a copy that has only begun.
    fs::rename(node.policies(), &aside).unwrap();
    refused(&node, &daemon, "No such file or directory");
    fs::create_dir(node.policies()).unwrap();
    refused(&node, &daemon, "no policy is left in it");
    fs::write(node.policies().join("db.yaml"), "").unwrap();
    refused(&node, &daemon, "db.yaml: empty");
    fs::remove_dir_all(node.policies()).unwrap();
    fs::rename(&aside, node.policies()).unwrap();
    eventually("the directory is back", || current(&node) == 1.0);
    assert!(!talks(&scan, &db, false));

    // What is tried out is in force for nobody; the file stays to the end.
    node.put_policy("tried.yaml", TRIED_OUT);
    fs::remove_file(node.policies().join("db.yaml")).unwrap();
    refused(&node, &daemon, "or none but in audit");
    node.put_policy("db.yaml", DB);
    eventually("the policy is back", || current(&node) == 1.0);

    // It is hidden by what is mounted over it, of which nobody is told.
    let refusals = |daemon: &Daemon| daemon.log().matches("no policy is left in it").count();
    let before = refusals(&daemon);
    let mounted = Mounted::over(&node.policies());
    eventually("the mount is seen", || refusals(&daemon) > before && current(&node) == 0.0);
    assert!(!talks(&scan, &db, false));
    // The next daemon starts before the directory is mounted.
    let before = refusals(&daemon);
    daemon.stop();
    let daemon = node.start();
    assert!(refusals(&daemon) > before);
    refused(&node, &daemon, "no policy is left in it");
    drop(mounted);
    eventually("the directory is back", || current(&node) == 1.0);
    assert!(!talks(&scan, &db, false));
    daemon.stop();

    // Where none are wanted, the same directory takes all away.
    node.config["policies"]["allowEmpty"] = json!(true);
    let daemon = node.start();
    fs::remove_file(node.policies().join("db.yaml")).unwrap();
    eventually("no policy", || talks(&scan, &db, false));
    daemon.stop();
    // And none are then missed.
    node.config["policies"]["allowEmpty"] = json!(false);
    let _daemon = node.start();
    assert_eq!(current(&node), 1.0);
}
