//! Each netlink request, journal write and store write of the real binary made to fail once, in each of four ways.
//!
//! Calls share one count, so that the number of a call tells where in a verb it is. `fail` and `lose` come back to the
//! binary, which must take back what it has done; `abort` and `abort-after` end it, and the next call must.

mod common;

use common::{Faulted, Node, Pod};
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_core::test_support::{HostState, Rung, require};
use serde_json::{Value, json};

/// Everything that a verb may change.
#[derive(Debug)]
struct Everything {
    host: HostState,
    pods: Vec<HostState>,
    records: Vec<String>,
    store: Vec<String>,
}

impl Everything {
    fn of(node: &Node, pods: &[&Pod]) -> Self {
        let pods = pods.iter().map(|p| p.state()).collect();
        Self { host: node.host.state(), pods, records: node.host.records(), store: node.store() }
    }

    fn assert_same(&self, after: &Self, what: &str) {
        assert_eq!(self.host.diff(&after.host), "", "host, {what}");
        for (before, after) in self.pods.iter().zip(&after.pods) {
            assert_eq!(before.diff(after), "", "pod, {what}");
        }
        assert_eq!(self.store, after.store, "store, {what}");
        assert_eq!(self.records, after.records, "run directory, {what}");
    }
}

/// What came of a verb that met a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Died,
    Failed,
    Survived,
}

/// Runs `verb` with its first call failing, then its second, until it makes fewer; `after` looks at what is left.
fn each_call(verb: &str, mut run: impl FnMut(&str) -> Faulted, mut after: impl FnMut(Outcome, &str)) {
    for kind in ["fail", "lose", "abort", "abort-after"] {
        let (mut fatal, mut store) = (0, 0);
        for call in 1.. {
            let Faulted { met, outcome } = run(&format!("{kind}:{call}"));
            let what = format!("{verb}, {kind} {}", met.as_deref().unwrap_or("nothing"));
            let came = match &outcome {
                None => Outcome::Died,
                Some(Ok(_)) => Outcome::Survived,
                Some(Err(error)) => {
                    // CNI 1.1.0, section 5, "Error": these three keys.
                    assert_eq!(error["cniVersion"], "1.1.0", "{what}: {error}");
                    assert!(error["code"].as_u64().is_some_and(|code| code > 0), "{what}: {error}");
                    assert!(error["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{what}: {error}");
                    Outcome::Failed
                }
            };
            assert_eq!(came == Outcome::Died, met.is_some() && kind.starts_with("abort"), "{what}: {outcome:?}");
            after(came, &what);
            let Some(met) = met else {
                assert_eq!(came, Outcome::Survived, "{what}: {outcome:?}");
                assert!(call > 1, "{verb} makes calls");
                println!("{verb:<16} {kind:<12} {:>3} calls, {store:>2} of the store; {fatal:>3} fatal", call - 1);
                break;
            };
            store += u32::from(met.contains("store"));
            fatal += u32::from(came != Outcome::Survived);
        }
    }
}

/// A node whose smaller pool is so small that a leaked address is missed at once.
fn node() -> Node {
    let mut node = Node::new();
    node.config["ipam"]["cooldown"] = json!("0s");
    node.config["ipam"]["pools"][0]["subnet"] = json!("10.20.0.0/28");
    node.config["ipam"]["pools"][0]["claims"]["shop/db"]["address"] = json!("10.20.0.7");
    node
}

/// A node with a pod that lives through everything, and one that faults are about.
fn with_neighbour(name: &str) -> (Node, Pod, Pod) {
    let node = node();
    let (neighbour, pod) = (node.pod("neighbour"), node.pod(name));
    node.add(&neighbour).unwrap();
    (node, neighbour, pod)
}

/// Takes all addresses that are free, and says how many there were.
fn lease_all(node: &Node) -> usize {
    let ipam = node.ipam();
    for n in 0.. {
        let attachment =
            serde_json::from_value(json!({ "network": "last", "container": format!("c{n}"), "ifname": "eth0" }));
        let request = LeaseRequest::new(attachment.unwrap());
        match pollster::block_on(ipam.lease(&request)) {
            Ok(_) => {}
            Err(LeaseError::Exhausted { .. }) => return n,
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!("the pool is finite")
}

/// Addresses of the smaller pool beside network, broadcast, gateway and the claim's.
const DYNAMIC: usize = 12;

#[test]
fn first_add_of_a_host_is_all_or_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let mut current = None;
    let mut odd = false;
    let current = std::cell::RefCell::new(&mut current);
    each_call(
        "first ADD",
        |fault| {
            let node = node();
            let pod = node.pod("web");
            let before = (node.host.state(), pod.state());
            let faulted = node.faulted("ADD", Some(&pod), &node.config, fault);
            **current.borrow_mut() = Some((node, pod, before));
            faulted
        },
        |outcome, what| {
            let (node, pod, (host, inside)) = current.borrow_mut().take().unwrap();
            odd = !odd;
            if outcome != Outcome::Failed {
                if outcome == Outcome::Survived || odd {
                    heal(&node, &pod, what);
                }
                node.del(&pod).unwrap();
                // The bridge stays where the attach was complete, as it does on a real host.
                let left = host.diff(&node.host.state());
                assert!(left.lines().all(|l| l.starts_with("+ ") && l.contains("dc0")), "{what}: {left}");
            } else {
                assert_eq!(host.diff(&node.host.state()), "", "{what}");
                if !node.host.records().is_empty() {
                    // A record that could not be removed: DEL does.
                    node.del(&pod).unwrap();
                }
            }
            assert_eq!(inside.diff(&pod.state()), "", "{what}");
            assert_eq!(node.host.records(), Vec::<String>::new(), "{what}");
            // The claims of the configuration may have been recorded.
            assert!(node.store().iter().all(|l| l.starts_with("claim")), "{what}: {:?}", node.store());
            assert_eq!(lease_all(&node), DYNAMIC, "{what}");
        },
    );
}

/// Proves that a repeated ADD finishes what an earlier one began.
fn heal(node: &Node, pod: &Pod, what: &str) {
    let result = node.add(pod).unwrap_or_else(|e| panic!("{what}: {e}"));
    node.check(pod, &result).unwrap_or_else(|e| panic!("{what}: {e}"));
}

fn add_is_all_or_nothing(verb: &str, name: &str) {
    let (node, neighbour, pod) = with_neighbour(name);
    let before = Everything::of(&node, &[&pod, &neighbour]);
    let mut odd = false;
    each_call(
        verb,
        |fault| node.faulted("ADD", Some(&pod), &node.config, fault),
        |outcome, what| {
            odd = !odd;
            match outcome {
                Outcome::Failed if node.host.records() != before.records => {
                    // A record that could not be removed holds nothing: all else is as before without a DEL.
                    let now = Everything::of(&node, &[&pod, &neighbour]);
                    before.assert_same(&Everything { records: before.records.clone(), ..now }, what);
                    node.del(&pod).unwrap();
                }
                Outcome::Failed => {}
                Outcome::Died if odd => node.del(&pod).map(drop).unwrap(),
                Outcome::Died | Outcome::Survived => {
                    heal(&node, &pod, what);
                    node.del(&pod).unwrap();
                }
            }
            before.assert_same(&Everything::of(&node, &[&pod, &neighbour]), what);
        },
    );
    assert_eq!(lease_all(&node), DYNAMIC - 1);
}

#[test]
fn add_beside_a_neighbour_is_all_or_nothing() {
    if require(Rung::Netns) {
        add_is_all_or_nothing("ADD", "web");
    }
}

#[test]
fn add_by_a_claim_is_all_or_nothing() {
    if require(Rung::Netns) {
        add_is_all_or_nothing("ADD by claim", "db");
    }
}

/// Verbs that have nothing to change leave the attachment whole, however they end.
fn changes_nothing(name: &str, verb: &str, config: impl Fn(&Node, &Value) -> Value) {
    let (node, neighbour, pod) = with_neighbour("web");
    let result = node.add(&pod).unwrap();
    let before = Everything::of(&node, &[&pod, &neighbour]);
    let config = config(&node, &result);
    each_call(
        name,
        |fault| node.faulted(verb, Some(&pod), &config, fault),
        |_, what| {
            before.assert_same(&Everything::of(&node, &[&pod, &neighbour]), what);
            assert_eq!(node.add(&pod).as_ref(), Ok(&result), "{what}");
        },
    );
    node.check(&pod, &result).unwrap();
    node.del(&pod).unwrap();
    assert_eq!(lease_all(&node), DYNAMIC - 1);
}

#[test]
fn a_repeated_add_changes_nothing() {
    if require(Rung::Netns) {
        changes_nothing("repeated ADD", "ADD", |node, _| node.config.clone());
    }
}

#[test]
fn check_changes_nothing() {
    if require(Rung::Netns) {
        changes_nothing("CHECK", "CHECK", |node, result| {
            let mut config = node.config.clone();
            config["prevResult"] = result.clone();
            config
        });
    }
}

/// DEL and GC: what one leaves undone the next does, and no address is free while a device bears it.
fn the_next_one_finishes(verb: &str) {
    let (node, neighbour, pod) = with_neighbour("web");
    let before = Everything::of(&node, &[&pod, &neighbour]);
    let config = if verb == "GC" { node.config_for_gc(&[&neighbour]) } else { node.config.clone() };
    each_call(
        verb,
        |fault| {
            node.add(&pod).unwrap();
            node.faulted(verb, (verb != "GC").then_some(&pod), &config, fault)
        },
        |outcome, what| {
            if outcome != Outcome::Survived {
                let bears = pod.state().lines().any(|l| l.starts_with("address eth0 10.20.0."));
                let held = node.store().iter().any(|l| l.contains(&pod.container));
                assert!(held || !bears, "{what}: a free address is in use");
                if verb == "GC" {
                    node.gc(Some(&[&neighbour])).unwrap();
                } else {
                    node.del(&pod).unwrap();
                }
            }
            before.assert_same(&Everything::of(&node, &[&pod, &neighbour]), what);
        },
    );
    assert_eq!(lease_all(&node), DYNAMIC - 1);
}

#[test]
fn a_failed_del_is_finished_by_the_next() {
    if require(Rung::Netns) {
        the_next_one_finishes("DEL");
    }
}

#[test]
fn a_failed_gc_is_finished_by_the_next() {
    if require(Rung::Netns) {
        the_next_one_finishes("GC");
    }
}
