//! Each netlink request, journal write and store write of the real binary made to fail once, in each of four ways.
//!
//! Calls share one count, so that the number of a call tells where in a verb it is. `fail` and `lose` come back to the
//! binary, which must take back what it has done; `abort` and `abort-after` end it, and the next call must.

mod common;

use common::{Faulted, Node, Pod, elements, has_nft};
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_core::test_support::{HostState, Rung, effort, require, require_with};
use dcenet_ebpf::attach::{Attacher, ClsactAttacher, Direction, Hook, Owner, Tag, TcxAttacher};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::probe::Features;
use dcenet_ebpf::program::Program;
use serde_json::{Value, json};

/// Everything that a verb may change.
#[derive(Debug)]
struct Everything {
    host: HostState,
    pods: Vec<HostState>,
    records: Vec<String>,
    store: Vec<String>,
    policy: Vec<String>,
    translated: Vec<String>,
}

impl Everything {
    fn of(node: &Node, pods: &[&Pod]) -> Self {
        let pods = pods.iter().map(|p| p.state()).collect();
        // What the owner knows comes first: it may still be at work on a device.
        let policy = node.policy();
        let translated = if node.config.get("nat").is_some() { elements(node) } else { Vec::new() };
        Self { host: node.host.state(), pods, records: node.host.records(), store: node.store(), policy, translated }
    }

    /// In which parts the two differ, each with the difference.
    fn diff(&self, after: &Self) -> Vec<(&'static str, String)> {
        let lists = |before: &[String], after: &[String]| {
            let gone = before.iter().filter(|l| !after.contains(l)).map(|l| format!("- {l}\n"));
            gone.chain(after.iter().filter(|l| !before.contains(l)).map(|l| format!("+ {l}\n"))).collect::<String>()
        };
        let mut parts = vec![
            ("host", self.host.diff(&after.host)),
            ("store", lists(&self.store, &after.store)),
            ("records", lists(&self.records, &after.records)),
            ("policy", lists(&self.policy, &after.policy)),
            ("nftables", lists(&self.translated, &after.translated)),
        ];
        parts.extend(self.pods.iter().zip(&after.pods).map(|(before, after)| ("pod", before.diff(after))));
        parts.retain(|(_, difference)| !difference.is_empty());
        parts
    }

    fn assert_same(&self, after: &Self, what: &str) {
        assert_eq!(self.diff(after), [], "{what}");
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
///
/// Of the calls at which the process ends every second is taken: after call 3 is before call 4. All are in the soak form,
/// and fewer in guests.
fn each_call(verb: &str, mut run: impl FnMut(&str) -> Faulted, mut after: impl FnMut(Outcome, &str)) {
    let mut calls = 0;
    for kind in ["fail", "lose", "abort", "abort-after"] {
        let (mut fatal, mut store, mut policy) = (0, 0, 0);
        let stride = if kind.starts_with("abort") { effort(8, 2, 1) } else { effort(4, 1, 1) };
        for call in (1..).step_by(stride) {
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
                calls = calls.max(call - 1);
                assert!(calls > 0, "{verb} makes calls");
                println!(
                    "{verb:<28} {kind:<12} {calls:>3} calls; {store:>2} of the store, {policy:>2} of policy, \
                     {fatal:>3} fatal"
                );
                break;
            };
            store += u32::from(met.contains("store"));
            policy += u32::from(OF_POLICY.iter().any(|name| met.contains(name)));
            fatal += u32::from(came != Outcome::Survived);
        }
    }
}

/// In the names of calls that are made for policy alone.
const OF_POLICY: [&str; 6] = ["BPF_", "clsact", "filters", "program", "policy owner", "look up the device"];

/// Whether pods are under policy, and wait for their verdicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    None,
    Awaited,
    /// Awaited, with limits on what pods send and receive.
    Limited,
    /// Awaited, on macvlans, whose programs are on the device in the pod.
    Inside,
}

impl Policy {
    fn ready(self) -> bool {
        let no_tcx =
            || (!Features::probe().is_ok_and(|f| f.tcx)).then(|| "the kernel has no tcx (Linux 6.6)".to_owned());
        match self {
            Self::None => require(Rung::Netns),
            Self::Awaited | Self::Limited => require(Rung::Kernel),
            Self::Inside => require_with(Rung::Kernel, no_tcx),
        }
    }

    /// The verb's name in reports.
    fn name(self, verb: &str) -> String {
        match self {
            Self::None => verb.to_owned(),
            Self::Awaited => format!("{verb} under policy"),
            Self::Limited => format!("{verb} limited"),
            Self::Inside => format!("{verb} under policy inside"),
        }
    }

    /// A node whose smaller pool is so small that a leaked address is missed at once.
    fn node(self) -> Node {
        let mut node = if self == Self::None { Node::new() } else { Node::under_policy() };
        if self == Self::Inside {
            node.host.root().sh("ip link add up0 type veth peer name far0
                 for end in far0 up0; do ip link set $end addrgenmode none; ip link set $end up; done");
            let underlay = json!({ "probes": 0, "announcements": 0 });
            node.config["link"] = json!({ "kind": "macvlan", "parent": "up0", "underlay": underlay });
        }
        if self == Self::Limited {
            let (rate, burst) = (8_000_000, 512_000);
            node.config["link"]["bandwidth"] =
                json!({ "ingressRate": rate, "ingressBurst": burst, "egressRate": rate, "egressBurst": burst });
        }
        node.config["ipam"]["cooldown"] = json!("0s");
        node.config["ipam"]["pools"][0]["subnet"] = json!("10.20.0.0/28");
        node.config["ipam"]["pools"][0]["claims"]["shop/db"]["address"] = json!("10.20.0.7");
        node
    }

    /// A node with a pod that lives through everything, and one that faults are about.
    fn with_neighbour(self, name: &str) -> (Node, Pod, Pod) {
        let node = self.node();
        let (neighbour, pod) = (node.pod("neighbour"), node.pod(name));
        node.add(&neighbour).unwrap();
        (node, neighbour, pod)
    }
}

/// Host ends of pods that are up without a classifier on both hooks: such a pod is under no policy.
fn exposed(host: &HostState) -> Vec<&str> {
    let filtered = |name: &str, parent: &str| {
        host.lines().any(|l| l.starts_with(&format!("tc {name} filter bpf ")) && l.contains(parent))
    };
    let up = host.lines().filter(|l| l.starts_with("link dc") && l.contains("\"veth\"") && l.contains(" flags 0x1 "));
    let names = up.filter_map(|l| l.split(' ').nth(1));
    // The hooks of clsact: include/uapi/linux/pkt_sched.h, `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS`.
    names.filter(|name| !filtered(name, "parent 0xfffffff2") || !filtered(name, "parent 0xfffffff3")).collect()
}

/// Whether a pod's own device is up without a program of ours on both hooks.
fn is_exposed(node: &Node, pod: &Pod) -> bool {
    let Some(device) = pod.netns.link("eth0").filter(|link| link.is_up()) else { return false };
    let links = TcxAttacher::new(Pins::at(node.host.directory().join("bpf")));
    let hooks = [Direction::Ingress, Direction::Egress].map(|direction| Hook { device: device.index, direction });
    !pod.netns.run(|| hooks.into_iter().all(|hook| links.attached(hook).unwrap().is_some()))
}

/// Whatever came of a verb: no pod can be reached without its policy.
fn assert_covered(node: &Node, what: &str) {
    if node.owner.is_some() {
        assert_eq!(exposed(&node.host.state()), [""; 0], "{what}: up without policy");
    }
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

/// Leaves of the node's past nothing: no bridge, no record, no store.
fn forget_all(node: &Node) {
    if node.host.root().link("dc0").is_some() {
        node.host.root().sh("ip link del dc0");
    }
    for directory in [node.host.directory().join("state"), node.host.run_dir().join("attachments")] {
        if directory.exists() {
            std::fs::remove_dir_all(directory).unwrap();
        }
    }
}

fn first_add_is_all_or_nothing(policy: Policy) {
    if !policy.ready() {
        return;
    }
    let node = policy.node();
    let pod = node.pod("web");
    let before = Everything::of(&node, &[&pod]);
    let mut odd = false;
    // From this call on what it was made for stands, and the bridge may be somebody else's too by now.
    let mut complete = None;
    each_call(
        &policy.name("first ADD"),
        |fault| {
            forget_all(&node);
            assert_eq!(before.host.diff(&node.host.state()), "", "a node of which all is forgotten");
            node.faulted("ADD", Some(&pod), &node.config, fault)
        },
        |outcome, what| {
            assert_covered(&node, what);
            odd = !odd;
            let call = what.split_whitespace().find_map(|word| word.parse::<u32>().ok());
            if what.ends_with("write completion") {
                complete = call;
            }
            let was_complete = complete.zip(call).is_some_and(|(complete, call)| call > complete);
            if outcome != Outcome::Failed {
                if outcome == Outcome::Survived || odd {
                    heal(&node, &pod, what);
                }
                node.del(&pod).unwrap();
            } else if !node.host.records().is_empty() {
                // A record that could not be removed: DEL does.
                assert_eq!(before.host.diff(&node.host.state()), "", "{what}");
                node.del(&pod).unwrap();
            }
            for (part, difference) in before.diff(&Everything::of(&node, &[&pod])) {
                let may_stay = match part {
                    // The bridge stays where the attach was complete, as it does on a real host.
                    "host" => {
                        (outcome != Outcome::Failed || was_complete)
                            && difference.lines().all(|l| l.starts_with("+ ") && l.contains("dc0"))
                    }
                    // The claims of the configuration may have been recorded.
                    "store" => difference.lines().all(|l| l.starts_with("+ claim")),
                    _ => false,
                };
                assert!(may_stay, "{what}: {part}: {difference}");
            }
            assert_eq!(lease_all(&node), DYNAMIC, "{what}");
        },
    );
}

#[test]
fn first_add_of_a_host_is_all_or_nothing() {
    first_add_is_all_or_nothing(Policy::None);
}

#[test]
fn first_add_of_a_host_under_policy_is_all_or_nothing() {
    first_add_is_all_or_nothing(Policy::Awaited);
}

/// Proves that a repeated ADD finishes what an earlier one began.
fn heal(node: &Node, pod: &Pod, what: &str) {
    let result = node.add(pod).unwrap_or_else(|e| panic!("{what}: {e}"));
    node.check(pod, &result).unwrap_or_else(|e| panic!("{what}: {e}"));
}

fn add_is_all_or_nothing(policy: Policy, verb: &str, name: &str) {
    if !policy.ready() {
        return;
    }
    let (node, neighbour, pod) = policy.with_neighbour(name);
    let before = Everything::of(&node, &[&pod, &neighbour]);
    let mut odd = false;
    each_call(
        &policy.name(verb),
        |fault| node.faulted("ADD", Some(&pod), &node.config, fault),
        |outcome, what| {
            assert_covered(&node, what);
            assert!(policy != Policy::Inside || !is_exposed(&node, &pod), "{what}: up without policy");
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
    add_is_all_or_nothing(Policy::None, "ADD", "web");
}

#[test]
fn add_under_policy_is_all_or_nothing() {
    add_is_all_or_nothing(Policy::Awaited, "ADD", "web");
}

#[test]
fn add_of_a_limited_pod_is_all_or_nothing() {
    add_is_all_or_nothing(Policy::Limited, "ADD", "web");
}

/// Verbs of a pod that is masqueraded and has a port, beside one whose entries must stay.
fn translated() -> (Node, Pod, Pod) {
    let (mut node, neighbour, pod) = Policy::None.with_neighbour("web");
    node.del(&neighbour).unwrap();
    node.config["nat"] = json!({ "masquerade": true });
    let ports = |port: u16| {
        let one = |protocol| json!({ "hostPort": port, "containerPort": 80, "protocol": protocol });
        json!({ "portMappings": [one("tcp"), one("udp")] })
    };
    node.config["runtimeConfig"] = ports(1001);
    node.add(&neighbour).unwrap();
    node.config["runtimeConfig"] = ports(1002);
    (node, neighbour, pod)
}

#[test]
fn add_with_translation_is_all_or_nothing() {
    if !has_nft() {
        return;
    }
    let (node, neighbour, pod) = translated();
    let before = Everything::of(&node, &[&pod, &neighbour]);
    assert!(!before.translated.is_empty());
    let mut odd = false;
    each_call(
        "ADD with translation",
        |fault| node.faulted("ADD", Some(&pod), &node.config, fault),
        |outcome, what| {
            odd = !odd;
            if outcome == Outcome::Survived || outcome == Outcome::Died && odd {
                heal(&node, &pod, what);
                assert!(elements(&node).len() > before.translated.len(), "{what}");
            }
            node.del(&pod).unwrap();
            before.assert_same(&Everything::of(&node, &[&pod, &neighbour]), what);
        },
    );
}

#[test]
fn del_with_translation_is_finished_by_the_next() {
    if !has_nft() {
        return;
    }
    let (node, neighbour, pod) = translated();
    let before = Everything::of(&node, &[&pod, &neighbour]);
    node.add(&pod).unwrap();
    each_call(
        "DEL with translation",
        |fault| node.faulted("DEL", Some(&pod), &node.config, fault),
        |_, what| {
            node.del(&pod).unwrap_or_else(|e| panic!("{what}: {e}"));
            before.assert_same(&Everything::of(&node, &[&pod, &neighbour]), what);
            heal(&node, &pod, what);
        },
    );
}

#[test]
fn add_by_a_claim_is_all_or_nothing() {
    add_is_all_or_nothing(Policy::None, "ADD by claim", "db");
}

/// The first address is somebody else's: found, replaced, and attached anew.
#[test]
fn add_past_a_conflict_is_all_or_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Policy::None.node();
    let foreign = node.host.new_pod();
    let path = foreign.path().display().to_string();
    node.host.root().sh(&format!("ip link add up0 type veth peer name far0 netns {path}"));
    for (netns, end) in [(&foreign, "far0"), (node.host.root(), "up0")] {
        netns.sh(&format!("ip link set {end} addrgenmode none; ip link set {end} up"));
    }
    foreign.sh("ip addr add 10.20.0.2/28 dev far0");
    node.config["link"] = json!({ "kind": "macvlan", "parent": "up0" });
    let pod = node.pod("web");
    let before = Everything::of(&node, &[&pod]);
    let (mut odd, mut replaced) = (false, 0);
    each_call(
        "ADD past a conflict",
        |fault| {
            forget_all(&node);
            node.faulted("ADD", Some(&pod), &node.config, fault)
        },
        |outcome, what| {
            odd = !odd;
            if outcome != Outcome::Failed {
                if outcome == Outcome::Survived || odd {
                    heal(&node, &pod, what);
                }
                node.del(&pod).unwrap();
            } else if !node.host.records().is_empty() {
                assert_eq!(before.host.diff(&node.host.state()), "", "{what}");
                node.del(&pod).unwrap();
            }
            for (part, difference) in before.diff(&Everything::of(&node, &[&pod])) {
                let may_stay = part == "store" && difference.lines().all(|l| l.starts_with("+ claim"));
                assert!(may_stay, "{what}: {part}: {difference}");
            }
            // What was found stays out of use, and nothing else does.
            let found = pollster::block_on(node.ipam().quarantined()).unwrap();
            assert!(found.iter().all(|q| q.address.to_string() == "10.20.0.2"), "{what}: {found:?}");
            assert_eq!(lease_all(&node), DYNAMIC - found.len(), "{what}");
            replaced += found.len();
        },
    );
    assert!(replaced > 0);
}

/// Verbs that have nothing to change leave the attachment whole, however they end.
fn changes_nothing(policy: Policy, name: &str, verb: &str, config: impl Fn(&Node, &Value) -> Value) {
    if !policy.ready() {
        return;
    }
    let (node, neighbour, pod) = policy.with_neighbour("web");
    let result = node.add(&pod).unwrap();
    let before = Everything::of(&node, &[&pod, &neighbour]);
    let config = config(&node, &result);
    each_call(
        &policy.name(name),
        |fault| node.faulted(verb, (verb != "STATUS").then_some(&pod), &config, fault),
        |_, what| {
            before.assert_same(&Everything::of(&node, &[&pod, &neighbour]), what);
            assert_eq!(node.add(&pod).as_ref(), Ok(&result), "{what}");
        },
    );
    node.check(&pod, &result).unwrap();
    node.del(&pod).unwrap();
    assert_eq!(lease_all(&node), DYNAMIC - 1);
}

fn repeated_add_changes_nothing(policy: Policy) {
    changes_nothing(policy, "repeated ADD", "ADD", |node, _| node.config.clone());
}

#[test]
fn a_repeated_add_changes_nothing() {
    repeated_add_changes_nothing(Policy::None);
}

#[test]
fn a_repeated_add_under_policy_changes_nothing() {
    repeated_add_changes_nothing(Policy::Awaited);
}

fn check_and_status_change_nothing(policy: Policy) {
    changes_nothing(policy, "CHECK", "CHECK", |node, result| {
        let mut config = node.config.clone();
        config["prevResult"] = result.clone();
        config
    });
    if policy == Policy::Awaited {
        changes_nothing(policy, "STATUS", "STATUS", |node, _| node.config.clone());
    }
}

#[test]
fn check_changes_nothing() {
    check_and_status_change_nothing(Policy::None);
}

#[test]
fn check_and_status_under_policy_change_nothing() {
    check_and_status_change_nothing(Policy::Awaited);
}

/// DEL and GC: what one leaves undone the next does, and no address is free while a device bears it.
fn the_next_one_finishes(policy: Policy, verb: &str) {
    if !policy.ready() {
        return;
    }
    let (node, neighbour, pod) = policy.with_neighbour("web");
    let before = Everything::of(&node, &[&pod, &neighbour]);
    let config = if verb == "GC" { node.config_for_gc(&[&neighbour]) } else { node.config.clone() };
    each_call(
        &policy.name(verb),
        |fault| {
            node.add(&pod).unwrap();
            node.faulted(verb, (verb != "GC").then_some(&pod), &config, fault)
        },
        |outcome, what| {
            assert_covered(&node, what);
            assert!(policy != Policy::Inside || !is_exposed(&node, &pod), "{what}: up without policy");
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
    the_next_one_finishes(Policy::None, "DEL");
}

#[test]
fn a_failed_del_of_a_limited_pod_is_finished_by_the_next() {
    the_next_one_finishes(Policy::Limited, "DEL");
}

#[test]
fn a_failed_del_under_policy_is_finished_by_the_next() {
    the_next_one_finishes(Policy::Awaited, "DEL");
}

#[test]
fn a_failed_gc_is_finished_by_the_next() {
    the_next_one_finishes(Policy::None, "GC");
}

#[test]
fn a_failed_gc_under_policy_is_finished_by_the_next() {
    the_next_one_finishes(Policy::Awaited, "GC");
}

#[test]
fn add_under_policy_inside_the_pod_is_all_or_nothing() {
    add_is_all_or_nothing(Policy::Inside, "ADD", "web");
}

#[test]
fn a_repeated_add_under_policy_inside_the_pod_changes_nothing() {
    repeated_add_changes_nothing(Policy::Inside);
}

#[test]
fn check_under_policy_inside_the_pod_changes_nothing() {
    check_and_status_change_nothing(Policy::Inside);
}

#[test]
fn a_failed_del_under_policy_inside_the_pod_is_finished_by_the_next() {
    the_next_one_finishes(Policy::Inside, "DEL");
}

#[test]
fn a_failed_gc_under_policy_inside_the_pod_is_finished_by_the_next() {
    the_next_one_finishes(Policy::Inside, "GC");
}

/// What the tests above ask for is seen where it is missing, and CHECK tells of it.
#[test]
fn a_pod_without_its_links_is_exposed() {
    if !Policy::Inside.ready() {
        return;
    }
    let (node, neighbour, pod) = Policy::Inside.with_neighbour("web");
    let result = node.add(&pod).unwrap();
    assert!(!is_exposed(&node, &pod) && !is_exposed(&node, &neighbour));
    let before = Everything::of(&node, &[&pod]);
    let links = TcxAttacher::new(Pins::at(node.host.directory().join("bpf")));
    let hook = Hook { device: pod.netns.link("eth0").unwrap().index, direction: Direction::Egress };
    assert!(pod.netns.run(|| links.detach(hook)).unwrap());
    assert!(is_exposed(&node, &pod) && !is_exposed(&node, &neighbour));
    let parts = before.diff(&Everything::of(&node, &[&pod]));
    assert!(matches!(&parts[..], [("policy", pin)] if pin.contains("- pin tcx-egress-")), "{parts:?}");
    let error = node.check(&pod, &result).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("no policy is on eth0 (Egress)"), "{error}");
    // Another ADD puts the default there, and the owner its own.
    node.add(&pod).unwrap();
    node.check(&pod, &result).unwrap();
    assert!(!is_exposed(&node, &pod));
}

#[test]
fn every_part_of_the_comparison_sees_what_is_planted() {
    if !require(Rung::Kernel) {
        return;
    }
    let (node, neighbour, pod) = Policy::Awaited.with_neighbour("web");
    let result = node.add(&pod).unwrap();
    let device = |result: &Value| result["interfaces"][1]["name"].as_str().unwrap().to_owned();
    let (root, end) = (node.host.root(), device(&result));
    let look = || Everything::of(&node, &[&pod, &neighbour]);
    let before = look();
    assert_eq!(exposed(&before.host), [""; 0]);
    let pins = node.host.directory().join("bpf");
    let run = node.host.run_dir().join("attachments/0123456789abc");
    let key = json!({ "network": "shop", "container": "planted", "ifname": "eth0" });
    let request = LeaseRequest::new(serde_json::from_value(key).unwrap());
    // The default in the place of the pod's own program, which is told by its code alone.
    let hook = Hook { device: root.link(&end).unwrap().index, direction: Direction::Ingress };
    let attached = root.run(|| ClsactAttacher.attached(hook)).unwrap().unwrap();
    let Owner::Ours(label) = &attached.owner else { panic!("{attached:?}") };
    let own = Program::by_id(attached.program.unwrap()).unwrap();
    let default = Program::from_fd(Pins::at(&pins).get("deny_from_pod").unwrap().unwrap()).unwrap();
    let put = |program: &Program| {
        let tag = Tag { label, class: attached.class };
        root.run(|| ClsactAttacher.replace_tagged(hook, program, tag)).map(drop).unwrap();
    };
    type Act<'a> = Box<dyn Fn() + 'a>;
    let sh = |script: String| -> Act<'_> { Box::new(move || drop(root.sh(&script))) };
    let inside = |script: &'static str| -> Act<'_> { Box::new(|| drop(pod.netns.sh(script))) };
    let planted: [(&str, &[&str], Act<'_>, Act<'_>); 8] = [
        ("link", &["host"], sh("ip link add planted type bridge".into()), sh("ip link del planted".into())),
        (
            "route",
            &["pod"],
            inside("ip route add blackhole 198.51.100.0/24"),
            inside("ip route del blackhole 198.51.100.0/24"),
        ),
        (
            "discipline",
            &["host", "policy"],
            sh("tc qdisc add dev dc0 clsact".into()),
            sh("tc qdisc del dev dc0 clsact".into()),
        ),
        (
            "pin",
            &["policy"],
            sh(format!("mkdir {}/planted", pins.display())),
            sh(format!("rmdir {}/planted", pins.display())),
        ),
        ("record", &["records"], sh(format!("touch {}", run.display())), sh(format!("rm {}", run.display()))),
        (
            "lease",
            &["store"],
            Box::new(|| drop(pollster::block_on(node.ipam().lease(&request)).unwrap())),
            Box::new(|| pollster::block_on(node.ipam().release_current(&request.attachment)).unwrap()),
        ),
        ("another program", &["policy"], Box::new(|| put(&default)), Box::new(|| put(&own))),
        (
            "no programs",
            &["host", "policy"],
            sh(format!("tc qdisc del dev {end} clsact")),
            Box::new(|| assert_eq!(node.add(&pod).as_ref(), Ok(&result))),
        ),
    ];
    for (what, parts, plant, remove) in planted {
        plant();
        let after = look();
        let seen: Vec<&str> = before.diff(&after).into_iter().map(|(part, _)| part).collect();
        assert_eq!(seen, parts, "{what}: {:?}", before.diff(&after));
        let bare: &[&str] = if what == "no programs" { &[&end] } else { &[] };
        assert_eq!(exposed(&after.host), bare, "{what}");
        remove();
        before.assert_same(&look(), what);
    }
}

#[test]
fn without_del_what_an_ended_add_leaves_is_seen() {
    if !require(Rung::Kernel) {
        return;
    }
    let (node, neighbour, pod) = Policy::Awaited.with_neighbour("web");
    let before = Everything::of(&node, &[&pod, &neighbour]);
    let mut left = std::collections::BTreeMap::<&str, usize>::new();
    let mut classifiers = 0;
    for call in 1.. {
        let Faulted { met, outcome } = node.faulted("ADD", Some(&pod), &node.config, &format!("abort-after:{call}"));
        if met.is_some() {
            assert_eq!(outcome, None);
            let differences = before.diff(&Everything::of(&node, &[&pod, &neighbour]));
            classifiers +=
                usize::from(differences.iter().any(|(_, d)| d.contains("+ tc ") && d.contains("filter bpf")));
            differences.into_iter().for_each(|(part, _)| *left.entry(part).or_default() += 1);
        }
        node.del(&pod).unwrap();
        before.assert_same(&Everything::of(&node, &[&pod, &neighbour]), &format!("call {call}"));
        if met.is_none() {
            println!("of {} calls: {left:?} left, and classifiers {classifiers} times", call - 1);
            break;
        }
    }
    assert!(["host", "pod", "records", "store", "policy"].iter().all(|part| left.contains_key(part)), "{left:?}");
    assert!(classifiers > 0);
}
