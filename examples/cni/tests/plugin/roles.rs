//! The chained and the IPAM-only role by themselves, with every call failing once, and the process killed at every call: what the
//! next DEL or GC leaves is nothing. As the main role has it in `tests/faults.rs` and `tests/kills.rs`.

use std::collections::BTreeSet;

use dcenet_core::test_support::{Rung, effort, require};
use serde_json::{Value, json};

use super::common::{Faulted, Node, Pod, elements, has_nft};

/// A pod that another plugin connects, and ours gives policy, masquerading and a port; or whose addresses only are ours.
struct Role {
    node: Node,
    pod: Pod,
    chained: bool,
}

impl Role {
    fn chained() -> Self {
        let mut node = Node::under_policy();
        let ours = node.config.as_object_mut().unwrap();
        ours.remove("link");
        ours.remove("ipam");
        ours.insert("nat".to_owned(), json!({ "masquerade": true }));
        let ports = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }]);
        ours.insert("runtimeConfig".to_owned(), json!({ "portMappings": ports }));
        let pod = node.pod("db");
        let role = Self { node, pod, chained: true };
        // Our table of translations stays.
        role.theirs(true);
        role.node.call("ADD", &role.pod, &role.config("ADD").to_string()).unwrap();
        role.node.call("DEL", &role.pod, &role.config("DEL").to_string()).unwrap();
        role.theirs(false);
        role
    }

    fn of_addresses() -> Self {
        let mut node = Node::new();
        let ours = node.config.as_object_mut().unwrap();
        ours.remove("link");
        ours.insert("type".to_owned(), json!("bridge"));
        ours.insert("isGateway".to_owned(), json!(true));
        ours["ipam"]["cooldown"] = json!("0s");
        // The claims of the configuration are in the store from the first call on.
        let first = node.pod("first");
        node.add(&first).unwrap();
        node.del(&first).unwrap();
        let pod = node.pod("web");
        Self { node, pod, chained: false }
    }

    /// What the other plugin does: makes the pod's device, and at last deletes it, with what is on it.
    fn theirs(&self, add: bool) {
        if !self.chained {
            return;
        }
        let path = self.pod.netns.path().display();
        let root = self.node.host.root();
        if add {
            root.sh(&format!("ip link add h0 type veth peer name eth0 netns {path}; ip link set h0 up"));
            self.pod.netns.sh("ip addr add 10.20.0.9/24 dev eth0; ip link set eth0 up");
        } else {
            root.sh("ip link del h0");
        }
    }

    fn config(&self, verb: &str) -> Value {
        let mut config = if verb == "GC" { self.node.config_for_gc(&[]) } else { self.node.config.clone() };
        if self.chained && verb != "GC" {
            config["prevResult"] = json!({
                "cniVersion": "1.1.0",
                "interfaces": [{ "name": "h0" }, { "name": "eth0", "sandbox": self.pod.netns.path() }],
                "ips": [{ "address": "10.20.0.9/24", "interface": 1 }],
            });
        }
        config
    }

    fn call(&self, verb: &str) -> Result<Value, Value> {
        match verb {
            "GC" => self.node.gc(Some(&[])),
            _ => self.node.call(verb, &self.pod, &self.config(verb).to_string()),
        }
    }

    fn faulted(&self, verb: &str, fault: &str) -> Faulted {
        self.node.faulted(verb, (verb != "GC").then_some(&self.pod), &self.config(verb), fault)
    }

    /// All that ours may leave; the device is theirs.
    fn traces(&self) -> BTreeSet<String> {
        let Node { host, .. } = &self.node;
        let mut traces: BTreeSet<String> = host.records().into_iter().map(|line| format!("record {line}")).collect();
        if self.chained {
            traces.extend(self.node.policy().into_iter().map(|line| format!("policy {line}")));
            traces.extend(elements(&self.node).into_iter().map(|line| format!("translation {line}")));
        } else {
            traces.extend(self.node.store().into_iter().map(|line| format!("store {line}")));
        }
        traces.extend(host.state().lines().map(str::to_owned));
        traces.extend(self.pod.state().lines().map(|line| format!("pod {line}")));
        traces
    }

    /// Each call of `verb` fails, in one of four ways, and then `DEL` and `GC` by turns finish. Returns how often what was left
    /// before that was seen, by its kind.
    fn each_call(&self, verb: &str) -> BTreeSet<String> {
        let (before, mut seen, mut way) = (self.traces(), BTreeSet::new(), 0);
        for kind in ["fail", "lose", "abort", "abort-after"] {
            for call in (1 + way % 2..).step_by(effort(8, 2, 1)) {
                self.theirs(true);
                if verb != "ADD" {
                    self.call("ADD").unwrap();
                }
                let Faulted { met, outcome } = self.faulted(verb, &format!("{kind}:{call}"));
                let what = format!("{verb}, {kind} {met:?}");
                assert_eq!(outcome.is_none(), met.is_some() && kind.starts_with("abort"), "{what}: {outcome:?}");
                let left = self.traces();
                seen.extend(left.difference(&before).filter_map(|line| line.split(' ').next()).map(str::to_owned));
                way += 1;
                if way % 3 == 0 && verb == "ADD" {
                    // A runtime that tries once more.
                    self.call("ADD").unwrap_or_else(|error| panic!("{what}: {error}"));
                }
                self.call(if way % 2 == 0 { "DEL" } else { "GC" }).unwrap_or_else(|error| panic!("{what}: {error}"));
                self.theirs(false);
                let left: Vec<_> = self.traces().symmetric_difference(&before).cloned().collect();
                assert!(left.is_empty(), "{what}: {left:?}");
                if met.is_none() {
                    assert!(outcome.is_some_and(|outcome| outcome.is_ok()) && call > 3, "{what}");
                    break;
                }
            }
        }
        seen
    }
}

#[test]
fn faults_and_kills_of_the_chained_role_leave_nothing() {
    if !has_nft() || !require(Rung::Kernel) {
        return;
    }
    let role = Role::chained();
    // The twin: what the next call takes away is seen before it.
    let seen = role.each_call("ADD");
    assert!(["record", "policy", "translation"].iter().all(|kind| seen.contains(*kind)), "{seen:?}");
    for verb in ["DEL", "GC"] {
        let seen = role.each_call(verb);
        assert!(seen.contains("record"), "{verb}: {seen:?}");
    }
}

#[test]
fn faults_and_kills_of_the_role_of_addresses_leave_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let role = Role::of_addresses();
    for verb in ["ADD", "DEL", "GC"] {
        let seen = role.each_call(verb);
        assert!(seen.contains("store"), "{verb}: {seen:?}");
        // It makes no device. What it holds an attachment by says nothing, and is a trace for GC all the same.
        assert!(seen.iter().all(|kind| kind == "store" || kind == "record"), "{verb}: {seen:?}");
    }
}
