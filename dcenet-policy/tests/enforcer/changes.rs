//! Policy and pods that change under running traffic.

use std::net::{SocketAddr, UdpSocket};
use std::num::NonZeroU32;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, effort, require};
use dcenet_ebpf::abi::{self, Sizes};
use dcenet_ebpf::loader::{AyaLoader, LoadError, LoadRequest, Loaded, Loader};
use dcenet_ebpf::maps::{Array, Map};
use dcenet_ebpf::pin::Pins;
use dcenet_policy::enforcer::flows::{Flow, FlowKind, FlowSink, JsonLines, LastFlows, Losses};
use dcenet_policy::enforcer::{Enforcer, Phase, Tools};
use dcenet_policy::isolation::Fault;
use dcenet_policy::model::{Direction, Pod, PodId, PolicyId, Verdict};
use dcenet_policy::target::Tc;

use crate::streams::Stream;
use crate::world::*;

const WINDOW: Duration = Duration::from_millis(400);

fn three_pods() -> (World, Enforcer) {
    let mut world = World::new();
    let owner = world.started();
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    world.add_enforced("scan", 4, &[]);
    (world, owner)
}

#[test]
fn a_forbidden_stream_stops_and_an_allowed_one_loses_nothing() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = three_pods();
    let moving = effort(5, 50, 50);
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.address("db", ipv6), 5432);
        let other = SocketAddr::new(world.address("db", ipv6), 5433);
        let push = SocketAddr::new(world.address("db", ipv6), 5354);
        let allowed = Stream::tcp(world.pod("web"), world.pod("db"), to);
        let forbidden = Stream::tcp(world.pod("scan"), world.pod("db"), other);
        let pushed = Stream::pushed(world.pod("web"), world.pod("db"), push);
        // The twin without policy: all of them run.
        for stream in [&allowed, &forbidden, &pushed] {
            assert!(stream.moves(moving));
        }
        // `db` may still open any flow: what goes on must not pass for one of those.
        assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
        assert!(allowed.moves(moving));
        // Retransmissions are of no use, nor do replies to a flow that is denied by now pass.
        assert_eq!(forbidden.during(WINDOW).0, 0);
        assert_eq!(pushed.of_more_than(moving, WINDOW), 0);
        let (sent, received, gap) = allowed.stop();
        assert_eq!(sent, received);
        assert!(gap < Duration::from_secs(1), "{gap:?}");
        // Allowed again, the connection goes on where it stopped.
        assert!(owner.set_policies([]).unwrap().is_complete());
        assert!(pushed.moves(moving));
    }
    owner.uninstall().unwrap();
}

#[test]
fn an_endpoint_made_anew_has_its_slot_and_none_of_its_flows() {
    if !require(Rung::Kernel) {
        return;
    }
    let (mut world, owner) = three_pods();
    owner.set_policies(policies(DB)).unwrap();
    let slot = |owner: &Enforcer, name: &str| {
        owner.endpoints().into_iter().find(|e| e.attachment == key(name)).map(|e| (e.slot.unwrap(), e.generation))
    };
    let (before, generation) = slot(&owner, "db").unwrap();
    let to = SocketAddr::new(world.address("db", false), 5353);
    // A socket of the client's that lives on: the same addresses and ports meet the new pod.
    let client = world.pod("web").run(|| std::net::UdpSocket::bind("0.0.0.0:4000")).unwrap();
    let ask = |world: &World, expected: bool| {
        let server = world.pod("db").run(|| std::net::UdpSocket::bind(to)).unwrap();
        server.set_read_timeout(Some(if expected { ALLOWED } else { DENIED })).unwrap();
        client.send_to(b"x", to).unwrap();
        server.recv(&mut [0; 8]).is_ok()
    };
    assert!(ask(&world, true));
    for round in 1..=3 {
        world.delete("db");
        assert_eq!(slot(&owner, "db"), None);
        // The same name and addresses; other labels every other time.
        let labels: &[_] = if round % 2 == 1 { &[("app", "db"), ("tier", "x")] } else { &[("app", "db")] };
        world.add_enforced("db", 3, labels);
        assert!(ask(&world, true));
    }
    owner.set_policies(policies(&DB.replace("app: web", "app: nobody"))).unwrap();
    assert!(!world.denied(("web", "db"), false, || ask(&world, false)));
    world.delete("db");
    world.delete("scan");
    world.add_enforced("db", 3, &[("app", "db")]);
    let (_, after) = slot(&owner, "db").unwrap();
    let believed = world.denied(("web", "db"), false, || ask(&world, false));
    assert!(!believed, "an old flow of slot {before} was believed");
    assert!(generation < after || slot(&owner, "db").unwrap().0 != before);
    owner.uninstall().unwrap();
}

#[test]
fn flows_and_counters_have_names() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = three_pods();
    let mut reader = owner.flows().unwrap();
    owner.set_policies(policies(DB)).unwrap();
    let kept = LastFlows::new(100);
    reader.drain(&mut &kept).unwrap();
    world.tcp("web", "db", 5432, true);
    world.udp("scan", "db", 5353, false);
    assert!(reader.wait(ALLOWED).unwrap());
    let kept = LastFlows::new(100);
    reader.drain(&mut &kept).unwrap();

    let flows = kept.flows();
    let (web, db, scan) = (PodId::new("shop", "web"), PodId::new("shop", "db"), PodId::new("shop", "scan"));
    for ipv6 in [false, true] {
        let address = Some(world.address("db", ipv6));
        let to_db = |peer: &PodId, kind| {
            flows
                .iter()
                .find(|f| {
                    f.pod.address == address
                        && f.pod.workload.as_ref() == Some(&db)
                        && f.peer.workload.as_ref() == Some(peer)
                        && f.kind == kind
                })
                .unwrap_or_else(|| panic!("{kind:?} from {peer} in {flows:#?}"))
        };
        let admitted = to_db(&web, FlowKind::New);
        assert_eq!((admitted.verdict, admitted.reason, admitted.pod.port), (Verdict::Allow, "allowed", 5432));
        assert_eq!(admitted.policy, Some(PolicyId::new("shop", "db")));
        assert_eq!(admitted.rule.as_deref(), Some("shop/db ingress[0] from[0] ports[0]"));
        assert_eq!(admitted.attachment, Some(key("db")));
        let denied = to_db(&scan, FlowKind::Denied);
        assert_eq!((denied.verdict, denied.reason, denied.pod.port), (Verdict::Deny, "denied", 5353));
        assert_eq!(denied.rule.as_deref(), Some("isolated; no rule matches"));
    }
    world.udp("scan", "db", 5354, false);
    assert!(reader.wait(ALLOWED).unwrap());
    let mut text = Vec::new();
    let handed = reader.drain(&mut JsonLines(&mut text)).unwrap();
    let lines: Vec<serde_json::Value> =
        str::from_utf8(&text).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), handed, "{lines:#?}");
    for ipv6 in [false, true] {
        let line = serde_json::json!({
            "kind": "denied", "verdict": "deny", "reason": "denied", "direction": "ingress", "protocol": "udp",
            "attachment": key("db"), "rule": "isolated; no rule matches",
            "pod": { "address": world.address("db", ipv6), "port": 5354, "workload": "shop/db" },
            "peer": { "address": world.address("scan", ipv6), "workload": "shop/scan" },
        });
        assert!(lines.iter().any(|l| includes(l, &line)), "{line:#} in {lines:#?}");
    }

    let counters = owner.rule_counters().unwrap();
    let count = |rule: &str| counters.iter().find(|c| c.rule == rule).map_or(0, |c| c.packets);
    assert_eq!(count("shop/db ingress[0] from[0] ports[0]"), 2, "{counters:#?}");
    assert_eq!(count("shop/db ingress[0] from[0] ports[1]"), 0);
    assert!(count("isolated; no rule matches") >= 2);
    owner.uninstall().unwrap();
}

/// A flow that goes on is seen, with its counts, before its end, but only while somebody asks and while it has packets.
#[test]
fn flows_that_go_on_are_told_at_intervals_and_samples_of_their_packets() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let mut lowering = Tc::new(Sizes::small());
    lowering.sample = NonZeroU32::new(1);
    let owner = world.open(Tools { lowering: Arc::new(lowering), ..tools() });
    owner.start().unwrap();
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    owner.set_policies(policies(DB)).unwrap();
    let mut reader = owner.flows().unwrap();
    world.udp("web", "db", 5353, true);
    let mut told = |kind: FlowKind| {
        let kept = LastFlows::new(1000);
        reader.drain(&mut &kept).unwrap();
        assert_eq!(kept.losses(), Losses::default());
        let of_db = |f: &Flow| f.kind == kind && f.pod.workload == Some(PodId::new("shop", "db")) && f.pod.port == 5353;
        kept.flows().into_iter().filter(of_db).collect::<Vec<_>>()
    };
    let device = Some(world.index("db"));
    let rule = "shop/db ingress[0] from[0] ports[1]";
    let sampled = told(FlowKind::Sampled);
    // The answer, of either family; the question opened the flow.
    assert_eq!(sampled.len(), 2, "{sampled:#?}");
    for flow in &sampled {
        assert_eq!((flow.direction, flow.interface, flow.tcp_flags), (Direction::Egress, device, None));
        assert_eq!((flow.egress_packets, flow.ingress_packets, flow.rule.as_deref()), (1, 1, Some(rule)));
        assert!(flow.rule_number.is_some());
    }
    owner.sweep().unwrap();
    assert_eq!(told(FlowKind::Active), [], "nobody asked");

    // The clock that flows are stamped by has ticks of some milliseconds: the first flows are of before the question.
    std::thread::sleep(Duration::from_millis(50));
    let to = SocketAddr::new(world.address("db", false), 5353);
    let stream = Stream::udp(world.pod("web"), world.pod("db"), to);
    let mut reader = owner.flows().unwrap();
    reader.report_every(Some(Duration::ZERO));
    let mut told = || {
        let kept = LastFlows::new(10_000);
        reader.drain(&mut &kept).unwrap();
        let of_db = |f: &Flow| f.kind == FlowKind::Active && f.pod.address == Some(to.ip()) && f.pod.port == 5353;
        kept.flows().into_iter().filter(of_db).collect::<Vec<_>>()
    };
    // The owner sweeps by itself as well: what is told may be of a moment before.
    let mut report = |least: u64| {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            owner.sweep().unwrap();
            let mut flows = told();
            assert!(flows.len() <= 1, "a report has a flow once: {flows:#?}");
            if let Some(flow) = flows.pop().filter(|flow| flow.ingress_packets >= least) {
                break flow;
            }
            assert!(Instant::now() < deadline, "no report of {least} packets");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    assert!(stream.moves(20));
    let one = report(20);
    assert_eq!((one.verdict, one.direction, one.interface), (Verdict::Allow, Direction::Ingress, device));
    assert_eq!((one.rule.as_deref(), one.peer.workload.clone()), (Some(rule), Some(PodId::new("shop", "web"))));
    assert!(one.ingress_packets >= 20 && one.ingress_bytes > 20 * 42 && one.time > 0, "{one:#?}");
    assert!(stream.moves(20));
    let two = report(one.ingress_packets + 20);
    assert!(two.time >= one.time, "{two:#?} after {one:#?}");
    // A report that nobody reads waits, and does not pile up, nor does one without the flow take its place.
    for _ in 0..3 {
        assert!(stream.moves(1));
        owner.sweep().unwrap();
    }
    drop(stream);
    std::thread::sleep(Duration::from_millis(20));
    for _ in 0..3 {
        owner.sweep().unwrap();
    }
    assert_eq!(told().len(), 1);
    // Its last packets came after that report.
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        owner.sweep().unwrap();
        if told().is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "a flow without packets is told of");
        std::thread::sleep(Duration::from_millis(10));
    }
    owner.uninstall().unwrap();
}

/// UDP says nothing when it ends; the owner notices by the silence, and the entries of a pod that is gone go as well.
#[test]
fn a_flow_that_ends_by_silence_is_told_and_the_flows_of_a_pod_that_is_gone_are_removed() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let mut lowering = Tc::new(Sizes::small());
    lowering.timeouts.udp_new = Duration::from_secs(1);
    lowering.timeouts.udp_established = lowering.timeouts.udp_new;
    let owner = world.open(Tools { lowering: Arc::new(lowering), ..tools() });
    owner.start().unwrap();
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    let mut reader = owner.flows().unwrap();
    owner.set_policies(policies(DB)).unwrap();
    world.udp("web", "db", 5353, true);
    world.tcp("web", "db", 5432, true);
    // Each pod has its own entry of a flow between them, of either family. The owner sweeps by itself as well.
    let (kept, begun) = (LastFlows::new(100), Instant::now());
    let ended = loop {
        owner.sweep().unwrap();
        reader.drain(&mut &kept).unwrap();
        let ended: Vec<Flow> = kept.flows().into_iter().filter(|f| f.kind == FlowKind::Ended).collect();
        if ended.iter().filter(|f| f.pod.port == 5353 || f.peer.port == 5353).count() >= 4 {
            break ended;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{ended:#?}");
        std::thread::sleep(Duration::from_millis(100));
    };
    let swept = owner.sweep().unwrap();
    assert!(swept.live >= 4, "{swept:?}");
    for ipv6 in [false, true] {
        let of_db = ended.iter().find(|f| f.pod.address == Some(world.address("db", ipv6))).unwrap();
        assert_eq!((of_db.attachment.clone(), of_db.direction), (Some(key("db")), Direction::Ingress));
        assert_eq!(of_db.pod.port, 5353);
        assert_eq!(of_db.peer.workload, Some(PodId::new("shop", "web")));
        assert_eq!(of_db.rule.as_deref(), Some("shop/db ingress[0] from[0] ports[1]"));
        assert!(of_db.time > 0 && of_db.ingress_packets > 0 && of_db.ingress_bytes > 28, "{of_db:#?}");
    }
    world.delete("db");
    // The owner hears of it a moment later.
    let until = |most: usize| {
        let begun = Instant::now();
        while owner.sweep().unwrap().live > most {
            assert!(begun.elapsed() < Duration::from_secs(60), "more than {most} are left");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    until(swept.live - 2);
    world.delete("web");
    until(0);
    owner.uninstall().unwrap();
}

/// The counts at the first FIN are not the last ones, and a flow that is closed is not under way.
#[test]
fn a_flow_that_closed_is_told_with_its_final_counts_when_it_goes() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let mut lowering = Tc::new(Sizes::small());
    lowering.timeouts.tcp_closing = Duration::from_secs(3);
    let owner = world.open(Tools { lowering: Arc::new(lowering), ..tools() });
    owner.start().unwrap();
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    let mut reader = owner.flows().unwrap();
    owner.set_policies(policies(DB)).unwrap();
    reader.report_every(Some(Duration::ZERO));
    world.tcp("web", "db", 5432, true);
    let (kept, begun) = (LastFlows::new(1000), Instant::now());
    let mut told = |kind: FlowKind| {
        reader.drain(&mut &kept).unwrap();
        let ours = |f: &Flow| f.kind == kind && (f.pod.port == 5432 || f.peer.port == 5432);
        kept.flows().into_iter().filter(ours).collect::<Vec<_>>()
    };
    // Each pod has its own entry of a flow between them, of either family.
    let closed = loop {
        let closed = told(FlowKind::Closed);
        if closed.len() >= 4 {
            break closed;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{closed:#?}");
        std::thread::sleep(Duration::from_millis(1));
    };
    // One that the owner has told of by itself may have been open.
    let active = told(FlowKind::Active).len();
    let swept = owner.sweep().unwrap();
    assert_eq!(told(FlowKind::Active).len(), active, "{swept:?}");
    let ended = loop {
        owner.sweep().unwrap();
        let ended = told(FlowKind::Ended);
        if ended.len() >= 4 {
            break ended;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{ended:#?}");
        std::thread::sleep(Duration::from_millis(100));
    };
    let packets = |f: &Flow| f.egress_packets + f.ingress_packets;
    for before in &closed {
        let ends = |f: &&Flow| {
            (f.pod.address, f.pod.port, f.peer.port) == (before.pod.address, before.pod.port, before.peer.port)
        };
        let after: Vec<_> = ended.iter().filter(ends).collect();
        let [after] = after[..] else { panic!("{before:#?} in {ended:#?}") };
        assert!(packets(after) > packets(before), "the other side's FIN: {before:#?} {after:#?}");
        assert_eq!((after.rule.clone(), after.tcp_flags), (before.rule.clone(), None));
    }
    owner.uninstall().unwrap();
}

/// Whether the object has all of the other's members, with their values.
fn includes(object: &serde_json::Value, part: &serde_json::Value) -> bool {
    match part.as_object() {
        Some(members) => members.iter().all(|(name, value)| includes(&object[name], value)),
        None => object == part,
    }
}

#[test]
fn a_rule_that_gets_the_number_of_another_counts_from_zero() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = three_pods();
    let count = |rule: &str| owner.rule_counters().unwrap().into_iter().find(|c| c.rule == rule).map(|c| c.packets);
    owner.set_policies(policies(DB)).unwrap();
    world.tcp("web", "db", 5432, true);
    let known = owner.rule_counters().unwrap().len();
    assert_eq!(count("shop/db ingress[0] from[0] ports[0]"), Some(2));
    // Numbers that fell out of use are given to others when no program of before can count by them any more.
    owner.set_policies([]).unwrap();
    let other = DB.replace("name: db", "name: other");
    let deadline = Instant::now() + ALLOWED;
    loop {
        std::thread::sleep(Duration::from_millis(150));
        owner.set_policies(policies(&other)).unwrap();
        if owner.rule_counters().unwrap().len() == known {
            break;
        }
        assert!(Instant::now() < deadline, "no number was used again");
        owner.set_policies([]).unwrap();
    }
    assert_eq!(count("shop/db ingress[0] from[0] ports[0]"), None);
    assert_eq!(count("shop/other ingress[0] from[0] ports[0]"), Some(0));
    world.tcp("web", "db", 5432, true);
    assert_eq!(count("shop/other ingress[0] from[0] ports[0]"), Some(2));
    owner.uninstall().unwrap();
}

#[test]
fn events_beyond_the_limit_are_counted() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = three_pods();
    owner.set_policies(policies(DB)).unwrap();
    let mut reader = owner.flows().unwrap();
    let to = SocketAddr::new(world.address("db", false), 5353);
    let flood = Stream::udp(world.pod("scan"), world.pod("db"), to);
    let (received, sent) = flood.during(Duration::from_millis(800));
    assert!(received == 0 && sent > 300, "{received} of {sent}");
    drop(flood);
    let kept = LastFlows::new(10_000);
    let handed = reader.drain(&mut &kept).unwrap() as u64;
    let denied = kept.flows().iter().filter(|f| f.kind == FlowKind::Denied).count() as u64;
    let losses = kept.losses();
    assert!(losses.limited > 0 && losses.full == 0 && losses.unreadable == 0, "{losses:?}");
    assert!(denied > 0 && denied + losses.limited >= sent, "{denied} of {handed} told, {losses:?}, {sent} sent");
    owner.uninstall().unwrap();
}

#[test]
fn what_an_endpoint_has_lost_is_told_when_it_is_gone_and_hides_no_other_losses() {
    if !require(Rung::Kernel) {
        return;
    }
    let (mut world, owner) = three_pods();
    owner.set_policies(policies(DB)).unwrap();
    let mut reader = owner.flows().unwrap();
    let lose = |world: &World, name: &str, packets: u64| {
        let to = SocketAddr::new(world.address(name, false), 5353);
        let flood = Stream::udp(world.pod("scan"), world.pod(name), to);
        let (begun, mut sent) = (Instant::now(), 0);
        while sent < packets && begun.elapsed() < Duration::from_secs(20) {
            sent += flood.during(Duration::from_millis(100)).1;
        }
        assert!(sent >= packets, "{sent}");
    };
    let mut told = || {
        let kept = LastFlows::new(10_000);
        reader.drain(&mut &kept).unwrap();
        kept.losses().limited
    };
    lose(&world, "db", 3000);
    let first = told();
    assert!(first > 0);
    lose(&world, "db", 1000);
    world.delete("db");
    assert!(owner.endpoints().iter().all(|e| e.attachment != key("db")));
    let gone = told();
    assert!(gone > 0, "what the endpoint lost before it went");
    world.add_enforced("more", 5, &[("app", "db")]);
    lose(&world, "more", 1000);
    let other = told();
    assert!(other > 0, "after {first} and {gone} of the one that went");
    owner.uninstall().unwrap();
}

/// Fails at its first flow.
struct Broken;

impl FlowSink for Broken {
    fn flow(&mut self, _: &Flow) -> std::io::Result<()> {
        Err(std::io::Error::other("the sink is broken"))
    }

    fn lost(&mut self, _: Losses) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_a_broken_sink_did_not_take_is_counted() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = three_pods();
    let mut reader = owner.flows().unwrap();
    reader.drain(&mut &LastFlows::new(100)).unwrap();
    world.udp("web", "db", 5353, true);
    assert!(reader.drain(&mut Broken).unwrap_err().to_string().contains("the sink is broken"));
    let kept = LastFlows::new(100);
    reader.drain(&mut &kept).unwrap();
    // Two pods, two families; other traffic may have begun, too.
    assert!(kept.losses().undelivered >= 4, "{:?}", kept.losses());
    owner.uninstall().unwrap();
}

#[test]
fn an_address_is_the_local_pods_until_it_goes() {
    if !require(Rung::Kernel) {
        return;
    }
    let (mut world, owner) = three_pods();
    owner.set_policies(policies(DB)).unwrap();
    // A source that is late says that another pod has the address of `scan`.
    let late = || Pod::new([("app", "web")], ["10.20.0.4".parse().unwrap()]);
    assert!(owner.upsert_pod(PodId::new("shop", "late"), late()).unwrap().is_complete());
    world.udp("scan", "db", 5353, false);
    world.delete("scan");
    assert_eq!(owner.endpoints().len(), 2);
    // Now it is the other's, and with a third that claims it nobody's.
    let report = owner.upsert_pod(PodId::new("shop", "more"), late()).unwrap();
    assert!(report.failures.is_empty() && !report.is_complete());
    let [Fault::AmbiguousAddress { address, pods }] = &report.faults[..] else { panic!("{report:?}") };
    assert_eq!((address.to_string().as_str(), pods.len()), ("10.20.0.4", 2));
    world.udp("web", "db", 5353, true);
    world.udp("web", "db", 5354, false);
    assert!(owner.remove_pod(&PodId::new("shop", "more")).unwrap().is_complete());
    world.add_enforced("scan", 4, &[]);
    world.udp("scan", "db", 5353, false);
    owner.uninstall().unwrap();
}

/// Loads nothing while somebody holds the gate, and tells that it stands there.
struct Gated {
    gate: Arc<Mutex<()>>,
    waiting: SyncSender<()>,
}

impl Loader for Gated {
    fn load(&self, elf: &[u8], request: &LoadRequest<'_>) -> Result<Loaded, LoadError> {
        if let Err(TryLockError::WouldBlock) = self.gate.try_lock() {
            let _ = self.waiting.try_send(());
            drop(self.gate.lock());
        }
        AyaLoader.load(elf, request)
    }
}

/// A change may take long. A pod that comes in the meantime is announced to its segment all the same, which its default
/// program lets pass once it knows the pod's addresses; and nothing of the change is mistaken for the pod's.
#[test]
fn an_endpoint_is_admitted_while_a_change_is_under_way() {
    if !require(Rung::Kernel) {
        return;
    }
    let gate = Arc::new(Mutex::new(()));
    let (waiting, stands) = sync_channel(1);
    let mut world = World::new();
    let owner = world.open(Tools { loader: Arc::new(Gated { gate: Arc::clone(&gate), waiting }), ..tools() });
    assert!(owner.set_policies(policies(DB)).unwrap().is_complete());
    assert!(owner.start().unwrap().is_complete());
    let slots = |world: &World, name| world.attached(name).map(|attached| attached.unwrap().class);

    let held = gate.lock().unwrap();
    world.add("db", 3, &[("app", "db")]);
    stands.recv_timeout(ALLOWED).expect("the change comes to the loader");
    world.add("web", 2, &[("app", "web")]);
    let [from_pod, to_pod] = slots(&world, "web");
    assert!(from_pod != 0 && from_pod == to_pod, "{from_pod} {to_pod}");
    // One that goes and comes again with another address, as after a conflict, is known by that one, and is another.
    let pins = Pins::at(world.host.directory().join("bpf"));
    let cells = Map::from_fd(pins.get(abi::ENDPOINTS).unwrap().unwrap()).unwrap();
    let cells = Array::<abi::Endpoint>::new(cells).unwrap();
    let tenure = || cells.load(from_pod.into()).unwrap().tenure;
    let first = tenure();
    world.delete("web");
    world.add("web", 4, &[("app", "web")]);
    assert_eq!(slots(&world, "web"), [from_pod; 2]);
    assert_eq!(tenure(), first + 1);
    for address in [world.address("node", false), world.address("node", true)] {
        let begun = Instant::now();
        world.pod("web").run(|| {
            let local = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(local).unwrap().send_to(b"x", SocketAddr::new(address, 9)).unwrap();
        });
        while !world.pod("web").sh(&format!("ip neigh show {address} dev eth0")).contains("lladdr") {
            assert!(begun.elapsed() < ALLOWED, "{address} is not resolved by who has another address now");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    for name in ["db", "web"] {
        let status = owner.endpoints().into_iter().find(|e| e.attachment == key(name)).unwrap();
        assert_eq!(status.phase, Phase::Default, "{name}");
    }
    drop(held);
    for name in ["db", "web"] {
        world.await_enforced(name, ALLOWED).unwrap();
    }
    assert_eq!(tenure(), first + 1, "the change is no other");
    world.udp("web", "db", 5353, true);
    world.udp("web", "db", 5354, false);
    owner.uninstall().unwrap();
}
