//! A policy or an address with which something is wrong, and everybody else.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dcenet_core::provider::PolicySink;
use dcenet_core::test_support::{Rung, require};
use dcenet_policy::CompileError;
use dcenet_policy::enforcer::{Enforcer, EnforcerError, Phase};
use dcenet_policy::eval::Reason;
use dcenet_policy::isolation::Fault;
use dcenet_policy::model::*;
use dcenet_policy::test_support::PlantedBug;

use crate::streams::Stream;
use crate::world::*;

/// Another policy for `db`, which is beyond the limit of entries in a policy set (200,000): peers times ports.
fn huge() -> Policy {
    let block = |n: u16| IpBlock { cidr: format!("10.20.{}.{}/32", n >> 8, n & 0xff).parse().unwrap(), except: vec![] };
    let port = |n: u16| PortMatch { protocol: Protocol::UDP, port: PortSpec::Range { first: n, last: n } };
    let rule = Rule {
        action: Action::Allow,
        peers: Peers::OneOf((0..500).map(|n| Peer::Block(block(n))).collect()),
        ports: Ports::OneOf((5300..5700).map(port).collect()),
        schedule: None,
        log: false,
    };
    for_db("huge", vec![rule])
}

/// 300 classes of peers, where a node of these tests has room for 256.
fn wide() -> Policy {
    for_db("wide", of_classes(0..300))
}

fn of_classes(numbers: std::ops::Range<u16>) -> Vec<Rule> {
    let rules = numbers.map(|n| Rule {
        action: Action::Allow,
        peers: Peers::OneOf(vec![Peer::Block(IpBlock {
            cidr: format!("10.{}.{}.0/24", 100 + (n >> 8), n & 0xff).parse().unwrap(),
            except: vec![],
        })]),
        ports: Ports::OneOf(vec![PortMatch { protocol: Protocol::UDP, port: PortSpec::Range { first: n, last: n } }]),
        schedule: None,
        log: false,
    });
    rules.collect()
}

/// Networks that lie as far apart as 100 blocks of the table, where there is room for 64.
fn scattered() -> Policy {
    let block = |n| Peer::Block(IpBlock { cidr: format!("{n}.7.7.0/24").parse().unwrap(), except: vec![] });
    let peers = Peers::OneOf((101..=200).map(block).collect());
    for_db("scattered", vec![Rule { action: Action::Allow, peers, ports: Ports::Any, schedule: None, log: false }])
}

fn for_db(name: &str, rules: Vec<Rule>) -> Policy {
    Policy { id: PolicyId::new("shop", name), ingress: Some(rules), ..policies(DB).remove(0) }
}

/// `cache` admits nobody but `db` from here on.
fn cache() -> Vec<Policy> {
    policies(&DB.replace("name: db", "name: cache").replace("app: db", "app: cache").replace("app: web", "app: db"))
}

fn four_pods() -> (World, Enforcer) {
    let mut world = World::new();
    let owner = world.started();
    for (n, name) in (2..).zip(["web", "db", "cache", "scan"]) {
        world.add_enforced(name, n, &[("app", name)]);
    }
    (world, owner)
}

/// What is refused, without the figures: they differ from one attempt to the next, as numbers are released.
fn closed(faults: &[Fault]) -> Vec<(&BTreeSet<PolicyId>, Direction, &BTreeSet<PodId>)> {
    let of = |fault| match fault {
        &Fault::Refused { ref policies, direction, ref pods, .. } => (policies, direction, pods),
        fault => panic!("{fault}"),
    };
    faults.iter().map(of).collect()
}

fn status(owner: &Enforcer, name: &str) -> dcenet_policy::enforcer::EndpointStatus {
    owner.endpoints().into_iter().find(|e| e.attachment == key(name)).unwrap()
}

#[test]
fn a_policy_beyond_a_limit_closes_its_pods_and_the_changes_of_others_arrive() {
    if !require(Rung::Kernel) {
        return;
    }
    let (mut world, owner) = four_pods();
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    world.udp("web", "db", 5353, true);
    world.udp("web", "cache", 5353, true);
    let to = SocketAddr::new(world.address("db", false), 5354);
    assert!(owner.set_policies([]).unwrap().is_complete());
    let stream = Stream::udp(world.pod("web"), world.pod("db"), to);
    assert!(stream.moves(50));

    for (policy, what) in [
        (huge(), "entries in one policy set"),
        (wide(), "classes of peers of the node"),
        (scattered(), "blocks of IPv4 peers"),
    ] {
        let others = || policies(DB).into_iter().chain(cache());
        let report = owner.set_policies(others().chain([policy.clone()])).unwrap();
        let [Fault::Refused { policies: refused, direction, pods, source }] = &report.faults[..] else {
            panic!("{what}: {report:?}")
        };
        assert_eq!((refused, *direction), (&[policy.id.clone()].into(), Direction::Ingress), "{what}");
        assert_eq!(pods, &[PodId::new("shop", "db")].into(), "{what}");
        assert!(matches!(source, CompileError::ImplLimitExceeded { what: of, .. } if *of == what), "{source}");
        assert!(!report.is_complete() && report.failures.is_empty() && report.enforced == 4, "{report:?}");

        // The change of another pod, and of the policies that the pod has beside it.
        world.udp("web", "cache", 5353, false);
        world.udp("db", "cache", 5353, true);
        world.udp("web", "db", 5353, true);
        // What the policy alone would allow, also where a flow was established before.
        world.udp("scan", "db", 5353, false);
        world.udp("web", "db", 5355, false);
        assert_eq!(stream.during(Duration::from_millis(300)).0, 0, "{what}");
        // Whoever asks is told of that, and not of what the policy would allow if it were enforced.
        let question = Tuple::ingress(world.address("scan", false), Protocol::UDP, 5353);
        let told = owner.explain(&PodId::new("shop", "db"), &question).unwrap().decision;
        assert_eq!((told.verdict, told.reason), (Verdict::Deny, Reason::Refused(vec![policy.id.clone()])), "{what}");
        // The pod's own node, and the other direction.
        world.udp("node", "db", 5355, true);
        world.udp("db", "scan", 5355, true);

        // Operators are told; a pod that comes is enforced, and one that the policy selects waits.
        assert_eq!(closed(&status(&owner, "db").faults), closed(&report.faults));
        assert_eq!(status(&owner, "cache").faults, []);
        assert_eq!(closed(&owner.faults()), closed(&report.faults));
        world.add_enforced("late", 6, &[("app", "web")]);
        world.udp("late", "db", 5353, true);
        world.udp("late", "cache", 5353, false);
        world.add("db2", 7, &[("app", "db")]);
        let error = world.await_enforced("db2", Duration::from_millis(300)).unwrap_err();
        assert!(error.contains(&format!("shop/{} for ingress of", policy.id.name)), "{error}");
        assert_eq!(status(&owner, "db2").phase, Phase::Enforced);
        world.udp("late", "db2", 5353, true);
        world.udp("scan", "db2", 5353, false);
        world.delete("late");
        world.delete("db2");

        // Alone, it leaves nothing open.
        assert!(!owner.set_policies([policy.clone()]).unwrap().is_complete());
        world.udp("web", "db", 5353, false);
        world.udp("web", "cache", 5353, true);

        // The fault goes, and what it closed opens.
        let report = owner.set_policies(others()).unwrap();
        assert!(report.is_complete() && owner.faults().is_empty(), "{report:?}");
        world.udp("web", "db", 5353, true);
        world.udp("web", "cache", 5353, false);
        assert!(owner.set_policies([]).unwrap().is_complete());
        assert!(stream.moves(50));
    }
    drop(stream);
    owner.uninstall().unwrap();
}

#[test]
fn peers_beyond_the_room_are_enforced_without_another_change_once_numbers_are_free() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = four_pods();
    let from = |label: &str| Rule {
        action: Action::Allow,
        peers: Peers::OneOf(vec![Peer::Pods(PodMatch {
            namespaces: NamespaceMatch::Named("shop".to_owned()),
            pods: LabelSelector {
                requirements: vec![Requirement { key: label.to_owned(), operator: Operator::Exists }],
            },
        })]),
        ports: Ports::OneOf(vec![PortMatch { protocol: Protocol::UDP, port: PortSpec::Any }]),
        schedule: None,
        log: false,
    };
    // `web` is a peer of the labelled class only, which tells by traffic which change is in force.
    let rules = (0..10).map(|bit| from(&format!("l{bit}"))).chain([from("chosen")]);
    assert!(owner.set_policies([for_db("labels", rules.collect())]).unwrap().is_complete());

    // 100 classes, others in each round: two rounds have room together, three have not. A round that comes late finds
    // numbers released already, and is no test.
    let round = |round: u16| {
        let pod = |n: u16| {
            let number = 100 * (round % 10) + n + 1;
            let labels = (0..10).filter(|bit| number >> bit & 1 == 1).map(|bit| (format!("l{bit}"), String::new()));
            let pod = Pod { labels: labels.collect(), ..Pod::new([], [[10, 30, 0, n as u8].into()]) };
            (PodId::new("shop", format!("peer{n}")), pod)
        };
        let label = if round % 2 == 1 { "chosen" } else { "left" };
        let web = Pod { labels: [(label.to_owned(), String::new())].into(), ..Pod::default() };
        owner.upsert_pods((0..100).map(pod).chain([(PodId::new("shop", "web"), web)]))
    };
    let (last, error) = (1..200).find_map(|n| Some((n, round(n).err()?))).expect("200 changes found room");
    let full = |error: &EnforcerError| {
        matches!(
            error,
            EnforcerError::Compile(CompileError::ImplLimitExceeded { what: "classes of peers of the node", .. })
        )
    };
    assert!(full(&error), "{error}");
    // To ask over the socket would make the owner try again.
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Some(reason) = status(&owner, "db").failure {
        assert!(Instant::now() < deadline, "{reason}");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(owner.faults(), []);
    world.udp("web", "db", 5353, last % 2 == 1);
    owner.uninstall().unwrap();
}

#[test]
fn policies_in_audit_beyond_the_room_are_told_of_without_another_change_once_numbers_are_free() {
    if !require(Rung::Kernel) {
        return;
    }
    let (_world, owner) = four_pods();
    assert!(owner.set_policies([for_db("first", of_classes(0..100))]).unwrap().is_complete());
    // Numbers of the first are free after this only: there is room for it, and none for the third.
    let audit = Policy { mode: Mode::Audit, ..for_db("third", of_classes(200..300)) };
    let report = owner.set_policies([for_db("second", of_classes(100..200)), audit]).unwrap();
    let [Fault::NotAudited { policies, .. }] = &report.faults[..] else { panic!("{report:?}") };
    assert_eq!(policies, &[PolicyId::new("shop", "third")].into());
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Some(fault) = owner.faults().first() {
        assert!(Instant::now() < deadline, "{fault}");
        std::thread::sleep(Duration::from_millis(50));
    }
    owner.uninstall().unwrap();
}

#[test]
fn without_isolation_one_policy_keeps_back_the_changes_of_others() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = four_pods();
    owner.plant_bug(PlantedBug::NothingIsolated);
    for policy in [huge(), wide(), scattered()] {
        let error = owner.set_policies(cache().into_iter().chain([policy])).unwrap_err();
        assert!(matches!(error, EnforcerError::Compile(CompileError::ImplLimitExceeded { .. })), "{error}");
        world.udp("web", "cache", 5353, true);
    }
    assert!(owner.set_policies(cache()).unwrap().is_complete());
    world.udp("web", "cache", 5353, false);
    owner.uninstall().unwrap();
}

#[test]
fn an_address_of_two_endpoints_is_no_selectors_until_one_of_them_goes() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = four_pods();
    assert!(owner.set_policies(policies(DB).into_iter().chain(cache())).unwrap().is_complete());
    world.udp("web", "db", 5353, true);

    // A second endpoint with the addresses of `web`, and labels that nothing allows.
    world.host.root().sh("ip link add tst0 type veth peer name tst1");
    let mut endpoint = world.endpoint("web");
    endpoint.ifindex = world.host.root().link("tst0").unwrap().index;
    endpoint.ifname = "tst0".parse().unwrap();
    endpoint.attachment = key("twin");
    endpoint.workload = Some("shop/twin".parse().unwrap());
    endpoint.labels.clear();
    world.host.root().run(|| world.sink.attach(&endpoint)).unwrap();
    // Its own verdicts are in force: its device tells who it is.
    world.sink.await_enforced(&endpoint, ALLOWED).unwrap();

    let claims: Vec<_> = owner.faults();
    assert_eq!(claims.len(), 2, "{claims:?}");
    for fault in &claims {
        let Fault::AmbiguousAddress { address, pods } = fault else { panic!("{fault}") };
        assert!(endpoint.addresses.contains(address));
        assert_eq!(pods, &["twin", "web"].map(|name| PodId::new("shop", name)).into());
    }
    assert_eq!(status(&owner, "web").faults, claims);
    assert_eq!(status(&owner, "twin").faults, claims);
    assert_eq!(status(&owner, "db").faults, []);
    world.udp("web", "db", 5353, false);
    world.udp("web", "scan", 5353, true);
    world.udp("scan", "web", 5353, true);
    // The changes of others arrive.
    world.udp("db", "cache", 5353, true);
    let report = owner.set_policies(policies(DB).into_iter().chain(cache().into_iter().map(|mut policy| {
        policy.ingress = Some(vec![]);
        policy
    })));
    assert!(report.unwrap().failures.is_empty());
    world.udp("db", "cache", 5353, false);

    // The twin without the guard: each claimant is believed, so that the one passes for the other.
    owner.plant_bug(PlantedBug::ClaimsBelieved);
    owner.set_policies(policies(DB)).unwrap();
    world.udp("web", "db", 5353, true);
    drop(owner);

    let owner = world.open(tools());
    owner.adopt(&world.engine.attachments(&"shop".parse().unwrap()).unwrap()).unwrap();
    owner.set_policies(policies(DB)).unwrap();
    world.host.root().run(|| world.sink.attach(&endpoint)).unwrap();
    owner.start().unwrap();
    world.udp("web", "db", 5353, false);
    world.host.root().run(|| {
        for direction in [dcenet_ebpf::attach::Direction::Ingress, dcenet_ebpf::attach::Direction::Egress] {
            let hook = dcenet_ebpf::attach::Hook { device: endpoint.ifindex, direction };
            dcenet_ebpf::attach::Attacher::detach(&dcenet_ebpf::attach::ClsactAttacher, hook).unwrap();
        }
        world.sink.detach(&key("twin")).unwrap();
    });
    assert!(owner.retry().unwrap().is_complete());
    assert_eq!(owner.faults(), []);
    world.udp("web", "db", 5353, true);
    owner.uninstall().unwrap();
}
