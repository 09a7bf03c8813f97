//! Addresses on a segment with others, whose kernels answer as those of any host do.

use std::fmt::Write;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use dcenet_core::engine::{AttachError, AttachRequest, StepError};
use dcenet_core::link::LinkConfig;
use dcenet_core::model::{AttachmentKey, MacAddr};
use dcenet_core::probe::{Conflict, Evidence, Segment, Timing, transmit};
use dcenet_core::provider::{Dns, Lease, LeasedAddress};
use dcenet_core::test_support::{HostState, Rung, TestHost, TestNetNs, effort, ping, require};
use serde_json::json;

use super::host_with_parent;

/// Longer than any machine takes to answer: an answer ends it.
const LONG: Timing = Timing { probes: 3, within: Duration::from_secs(6) };
/// Where one is there, and another is not.
const PATIENT: Timing = Timing { probes: 3, within: Duration::from_secs(2) };
/// For addresses that nobody has.
const SHORT: Timing = Timing { probes: 3, within: Duration::from_millis(75) };

/// A hub, which gives each frame to everybody, and hosts on it.
struct Hub {
    host: TestHost,
}

/// A host, with `eth0`.
struct Station {
    netns: TestNetNs,
    mac: MacAddr,
}

impl Hub {
    fn new() -> Self {
        let host = TestHost::new();
        host.root().sh("ip link add sw0 type bridge; ip link set sw0 addrgenmode none; ip link set sw0 up");
        Self { host }
    }

    /// A host with the addresses `192.0.2.N` and `2001:db8::N`, and this Ethernet address.
    fn station(&self, n: u8, mac: u8) -> Station {
        let netns = self.host.new_pod();
        let mac = MacAddr::new([2, 0, 0, 0, 0, mac]);
        self.host.root().sh(&format!(
            "ip link add p{n} type veth peer name eth0 address {mac} netns {0}; ip link set p{n} addrgenmode none; \
             ip link set p{n} master sw0; ip link set p{n} type bridge_slave learning off flood on; ip link set p{n} up",
            netns.path().display(),
        ));
        netns.sh(&format!(
            "ip link set eth0 addrgenmode none; ip link set eth0 up; ip addr add 192.0.2.{n}/24 dev eth0; \
             ip addr add 2001:db8::{n:x}/64 dev eth0 nodad"
        ));
        let station = Station { netns, mac };
        // Its port forwards when the kernel has noticed the carrier.
        let deadline = Instant::now() + Duration::from_secs(30);
        while n != 1 && ping(&station.netns, ip("192.0.2.1"), Duration::from_millis(200)).is_err() {
            assert!(Instant::now() < deadline, "station {n} reaches nobody");
        }
        station
    }
}

impl Station {
    /// As who has this Ethernet address.
    fn segment_as(&self, mac: MacAddr, addresses: &[IpAddr]) -> Segment {
        let index = self.netns.link("eth0").unwrap().index;
        self.netns.run(|| Segment::open(index, mac, addresses)).unwrap()
    }

    fn segment(&self, addresses: &[IpAddr]) -> Segment {
        self.segment_as(self.mac, addresses)
    }

    fn take(&self, addresses: &[IpAddr]) {
        for address in addresses {
            let length = if address.is_ipv4() { "24" } else { "64 nodad" };
            self.netns.sh(&format!("ip addr add dev eth0 {address}/{length}"));
        }
    }

    fn used(&self, address: IpAddr) -> Conflict {
        Conflict { address, holder: self.mac, evidence: Evidence::Used }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pair(n: u8) -> [IpAddr; 2] {
    [IpAddr::from([192, 0, 2, n]), ip(&format!("2001:db8::{n:x}"))]
}

fn sorted(mut conflicts: Vec<Conflict>) -> Vec<Conflict> {
    conflicts.sort_by_key(|c| c.address);
    conflicts
}

#[test]
fn a_holder_is_seen_with_its_ethernet_address_and_a_free_address_is_free() {
    if !require(Rung::Netns) {
        return;
    }
    let hub = Hub::new();
    let (holder, prober) = (hub.station(1, 1), hub.station(2, 2));
    let (held, free) = (pair(77), pair(78));
    holder.take(&held);
    let all = [held[0], held[1], free[0], free[1]];
    let segment = prober.segment(&all);
    assert_eq!(segment.conflicts(&free, SHORT).unwrap(), []);
    let began = Instant::now();
    assert_eq!(sorted(segment.conflicts(&held, LONG).unwrap()), held.map(|a| holder.used(a)));
    // Beside free ones, until the next probe would be due.
    assert_eq!(sorted(segment.conflicts(&all, LONG).unwrap()), held.map(|a| holder.used(a)));
    assert!(began.elapsed() < LONG.within, "an answer ends the waiting");
    // Without the holder nobody answers for it.
    holder.netns.sh("ip link set eth0 down");
    assert_eq!(segment.conflicts(&held, SHORT).unwrap(), []);
}

/// Ends those who go on until they are told, also where a test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn what_has_the_same_ethernet_address_is_the_same_workload() {
    if !require(Rung::Netns) {
        return;
    }
    let hub = Hub::new();
    let (holder, prober) = (hub.station(1, 1), hub.station(2, 2));
    let wanted = pair(77);
    holder.take(&wanted);
    // It answers, and announces itself all the time, as it does before it is moved here.
    let told = AtomicU64::new(0);
    let announcer = holder.segment(&wanted);
    let probe_as = |mac, timing| {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _ends = Ends(&over);
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    announcer.announce(&wanted, 1).unwrap();
                    told.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            prober.segment_as(mac, &wanted).conflicts(&wanted, timing).unwrap()
        })
    };
    let timing = Timing { probes: 3, within: Duration::from_millis(300) };
    assert_eq!(probe_as(holder.mac, timing), []);
    assert!(told.load(Ordering::Relaxed) > 1);
    // The same frames, to somebody else.
    assert_eq!(sorted(probe_as(prober.mac, LONG)), wanted.map(|a| holder.used(a)));
}

/// From a neighbour that sends about the very addresses, as what is of the workload itself, until it is told to end.
#[test]
fn a_flood_ends_no_later_than_the_probes() {
    if !require(Rung::Netns) {
        return;
    }
    let hub = Hub::new();
    let (noisy, prober) = (hub.station(1, 1), hub.station(2, 2));
    let wanted = pair(77);
    let (over, frames, longest) = (AtomicBool::new(false), AtomicU64::new(0), Duration::from_secs(120));
    let floods = [noisy.segment_as(prober.mac, &wanted), noisy.segment_as(prober.mac, &wanted)];
    std::thread::scope(|scope| {
        let _ends = Ends(&over);
        for flood in &floods {
            scope.spawn(|| {
                let began = Instant::now();
                while !over.load(Ordering::Relaxed) && began.elapsed() < longest {
                    // A frame may find no room.
                    if flood.announce(&wanted, 5).is_ok() {
                        frames.fetch_add(10, Ordering::Relaxed);
                    }
                }
            });
        }
        while frames.load(Ordering::Relaxed) < 1000 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let (began, before) = (Instant::now(), frames.load(Ordering::Relaxed));
        assert_eq!(prober.segment(&wanted).conflicts(&wanted, SHORT).unwrap(), []);
        assert!(frames.load(Ordering::Relaxed) > before, "it went on meanwhile");
        assert!(began.elapsed() < longest / 2, "it went on for as long as the flood: {:?}", began.elapsed());
    });
    // Others are seen in it.
    noisy.take(&wanted);
    assert_eq!(sorted(prober.segment(&wanted).conflicts(&wanted, LONG).unwrap()), wanted.map(|a| noisy.used(a)));
}

/// That `192.0.2.77` and `2001:db8::4d` are at `02:00:00:00:00:01`, with this tag (IEEE 802.1Q).
fn announced(tag: Option<u16>) -> [Vec<u8>; 2] {
    let mac = [2, 0, 0, 0, 0, 1];
    let frame = |to: [u8; 6], kind: [u8; 2], payload: &[&[u8]]| {
        let tag = tag.map_or(Vec::new(), |tag| [[0x81, 0], tag.to_be_bytes()].concat());
        [&to[..], &mac[..], &tag, &kind, &payload.concat()].concat()
    };
    let address = [192, 0, 2, 77];
    let arp = frame([0xff; 6], [8, 6], &[&[0, 1, 8, 0, 6, 4, 0, 1], &mac, &address, &[0; 6], &address]);
    let address = "2001:db8::4d".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let nodes = "ff02::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let (header, message) = ([0x60, 0, 0, 0, 0, 32, 58, 255], [136, 0, 0xf8, 0x92, 0x20, 0, 0, 0]);
    let payload: [&[u8]; 7] = [&header, &address, &nodes, &message, &address, &[2, 1], &mac];
    [arp, frame([0x33, 0x33, 0, 0, 0, 1], [0x86, 0xdd], &payload)]
}

/// What the prober finds while the talker announces what it does not have.
fn found_among(talker: &Station, prober: &Station, tag: Option<u16>, timing: Timing) -> Vec<Conflict> {
    let (wanted, frames) = (pair(77), announced(tag));
    let heard = || -> u64 {
        let shown = prober.netns.sh("cat /proc/thread-self/net/dev");
        let line = shown.lines().find(|l| l.trim_start().starts_with("eth0:")).unwrap();
        line.split_whitespace().nth(2).unwrap().parse().unwrap()
    };
    let index = talker.netns.link("eth0").unwrap().index;
    let (over, told, before) = (AtomicBool::new(false), AtomicU64::new(0), heard());
    let segment = prober.segment(&wanted);
    let found = std::thread::scope(|scope| {
        let _ends = Ends(&over);
        scope.spawn(|| {
            talker.netns.run(|| {
                while !over.load(Ordering::Relaxed) {
                    frames.iter().for_each(|frame| transmit(index, frame).unwrap());
                    told.fetch_add(2, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        });
        let deadline = Instant::now() + LONG.within;
        while told.load(Ordering::Relaxed) < 4 {
            assert!(Instant::now() < deadline, "nobody announces");
            std::thread::sleep(Duration::from_millis(1));
        }
        sorted(segment.conflicts(&wanted, timing).unwrap())
    });
    assert!(heard() >= before + 4, "{tag:?}: the frames came");
    found
}

/// The kernel takes the tag off a frame, and hands it to who listens on the cable.
#[test]
fn frames_of_virtual_networks_on_the_cable_are_of_another_segment() {
    if !require(Rung::Netns) {
        return;
    }
    let hub = Hub::new();
    let (talker, prober) = (hub.station(1, 1), hub.station(2, 2));
    let timing = Timing { probes: 3, within: Duration::from_millis(300) };
    assert_eq!(found_among(&talker, &prober, Some(5), timing), []);
    // Without a tag, and with one that is a priority and no network.
    for same in [None, Some(7 << 13)] {
        assert_eq!(found_among(&talker, &prober, same, LONG), pair(77).map(|a| talker.used(a)), "{same:?}");
    }
}

/// As before, where a device takes them.
#[test]
fn frames_of_a_virtual_network_that_has_a_device_are_that_ones() {
    if !require(Rung::Vm) {
        return;
    }
    let hub = Hub::new();
    let (talker, prober) = (hub.station(1, 1), hub.station(2, 2));
    prober.netns.sh("ip link add link eth0 name eth0.5 type vlan id 5; ip link set eth0.5 up");
    let timing = Timing { probes: 3, within: Duration::from_millis(300) };
    assert_eq!(found_among(&talker, &prober, Some(5), timing), []);
    let index = prober.netns.link("eth0.5").unwrap().index;
    let own = Station { netns: prober.netns, mac: prober.mac };
    let on_vlan = own.netns.run(|| Segment::open(index, own.mac, &pair(77))).unwrap();
    let talker_index = talker.netns.link("eth0").unwrap().index;
    talker.netns.run(|| announced(Some(5)).iter().for_each(|frame| transmit(talker_index, frame).unwrap()));
    assert_eq!(sorted(on_vlan.conflicts(&pair(77), LONG).unwrap()), pair(77).map(|a| talker.used(a)));
}

#[test]
fn a_probe_that_comes_back_is_our_own() {
    if !require(Rung::Netns) {
        return;
    }
    let hub = Hub::new();
    let (mirror, prober) = (hub.station(1, 1), hub.station(2, 2));
    let other = hub.station(3, 3);
    mirror.netns.sh("tc qdisc add dev eth0 clsact; \
         tc filter add dev eth0 ingress protocol all u32 match u32 0 0 action mirred egress redirect dev eth0");
    let sent = || -> u64 {
        let shown = mirror.netns.sh("cat /proc/thread-self/net/dev");
        let line = shown.lines().find(|l| l.trim_start().starts_with("eth0:")).unwrap();
        line.split_whitespace().nth(10).unwrap().parse().unwrap()
    };
    let (wanted, before) = (pair(77), sent());
    assert_eq!(prober.segment(&wanted).conflicts(&wanted, SHORT).unwrap(), []);
    let deadline = Instant::now() + LONG.within;
    while sent() < before + 6 {
        assert!(Instant::now() < deadline, "not all probes came back");
        std::thread::sleep(Duration::from_millis(10));
    }
    // For another host these are probes of somebody else.
    let listener = other.segment(&wanted);
    assert_eq!(prober.segment(&wanted).conflicts(&wanted, SHORT).unwrap(), []);
    let theirs = wanted.map(|address| Conflict { address, holder: prober.mac, evidence: Evidence::Probed });
    assert_eq!(sorted(listener.conflicts(&wanted, SHORT).unwrap()), theirs);
}

#[test]
fn two_who_probe_for_the_same_address_see_each_other() {
    if !require(Rung::Netns) {
        return;
    }
    let hub = Hub::new();
    let (a, b) = (hub.station(1, 1), hub.station(2, 2));
    let wanted = pair(77);
    let barrier = Barrier::new(2);
    let probe = |station: &Station| {
        let segment = station.segment(&wanted);
        barrier.wait();
        sorted(segment.conflicts(&wanted, LONG).unwrap())
    };
    let (of_a, of_b) = std::thread::scope(|scope| {
        let other = scope.spawn(|| probe(&a));
        let own = probe(&b);
        (other.join().unwrap(), own)
    });
    let by = |mac| move |address| Conflict { address, holder: mac, evidence: Evidence::Probed };
    assert_eq!(of_a, wanted.map(by(b.mac)));
    assert_eq!(of_b, wanted.map(by(a.mac)));
}

#[test]
fn a_gateway_that_is_gone_is_named() {
    if !require(Rung::Netns) {
        return;
    }
    let hub = Hub::new();
    let (gateway, pod) = (hub.station(1, 1), hub.station(2, 2));
    let (own, there, gone) = (pair(2), pair(1), pair(99));
    let segment = pod.segment(&own);
    let to = |gateways: [IpAddr; 2]| [(own[0], gateways[0]), (own[1], gateways[1])];
    assert_eq!(segment.unreachable(&to(there), LONG).unwrap(), Vec::<IpAddr>::new());
    assert_eq!(segment.unreachable(&to([there[0], gone[1]]), PATIENT).unwrap(), [gone[1]]);
    gateway.netns.sh("ip link set eth0 down");
    assert_eq!(segment.unreachable(&to(there), SHORT).unwrap(), there);
}

#[test]
fn an_announcement_moves_traffic_to_the_new_holder_at_once() {
    if !require(Rung::Netns) {
        return;
    }
    let hub = Hub::new();
    let (neighbour, old, new) = (hub.station(1, 1), hub.station(2, 2), hub.station(3, 3));
    let moved = pair(77);
    old.take(&moved);
    for address in moved {
        ping(&neighbour.netns, address, Duration::from_secs(20)).unwrap();
    }
    old.netns.sh("ip link set eth0 down");
    new.take(&moved);
    let soon = Duration::from_millis(400);
    for address in moved {
        ping(&neighbour.netns, address, soon).expect_err("the neighbour sends to whoever had it");
    }
    new.segment(&moved).announce(&moved, 2).unwrap();
    for address in moved {
        ping(&neighbour.netns, address, Duration::from_secs(20)).unwrap();
        let known = neighbour.netns.sh(&format!("ip neigh show {address}"));
        assert!(known.contains(&new.mac.to_string()), "{known}");
    }
}

/// Thousands of probes for free addresses while others announce, probe, resolve and move theirs, and somebody looks for the
/// very addresses that are probed for: no alarm. Now and then one is taken: an alarm each time.
#[test]
fn noise_is_no_conflict() {
    if !require(Rung::Netns) {
        return;
    }
    let hub = Hub::new();
    let (noisy, curious, prober) = (hub.station(1, 1), hub.station(2, 2), hub.station(3, 3));
    let candidates: Vec<IpAddr> = (100..110).flat_map(pair).collect();
    let others: Vec<IpAddr> = (50..60).flat_map(pair).collect();
    let own = pair(2);
    let (over, frames) = (AtomicBool::new(false), AtomicU64::new(0));
    let brief = Timing { probes: 1, within: Duration::from_millis(5) };
    let (mut alarms, mut found) = (0, 0);
    std::thread::scope(|scope| {
        let _ends = Ends(&over);
        let make = |turn: &(dyn Fn() + Sync)| {
            while !over.load(Ordering::Relaxed) {
                turn();
                frames.fetch_add(1, Ordering::Relaxed);
            }
        };
        let (announcer, asker) = (noisy.segment(&others), curious.segment(&own));
        let migrating = noisy.segment_as(prober.mac, &candidates);
        let looked_for: Vec<_> = candidates.iter().map(|c| (if c.is_ipv4() { own[0] } else { own[1] }, *c)).collect();
        let others = &others;
        scope.spawn(move || {
            make(&|| {
                announcer.announce(others, 1).unwrap();
                announcer.conflicts(others, brief).unwrap();
            });
        });
        let candidates = &candidates;
        scope.spawn(move || {
            make(&|| {
                asker.unreachable(&looked_for, brief).unwrap();
                migrating.announce(candidates, 1).unwrap();
            });
        });
        let segment = prober.segment(candidates);
        for _ in 0..effort(100, 1000, 10_000) / candidates.len() {
            for pair in candidates.chunks(2) {
                alarms += segment.conflicts(pair, brief).unwrap().len();
                alarms += segment.conflicts(&pair[..1], brief).unwrap().len();
            }
        }
        noisy.take(&candidates[..2]);
        for _ in 0..10 {
            // With sockets of its own: meanwhile nobody has read those of the other, and they are full.
            found += prober.segment(&candidates[..2]).conflicts(&candidates[..2], LONG).unwrap().len();
        }
    });
    assert!(frames.load(Ordering::Relaxed) > 10);
    assert_eq!((alarms, found), (0, 20));
}

fn key() -> AttachmentKey {
    serde_json::from_str(r#"{ "network": "shop", "container": "c1", "ifname": "eth0" }"#).unwrap()
}

/// `10.20.0.2` and `fd20::2`, with gateways.
fn lease() -> Lease {
    let address = |address: &str, gateway| LeasedAddress {
        gateway: Some(ip(gateway)),
        ..LeasedAddress::new(address.parse().unwrap(), "pods", 1)
    };
    let addresses = vec![address("10.20.0.2/24", "10.20.0.1"), address("fd20::2/64", "fd20::1")];
    Lease { addresses, routes: Vec::new(), dns: Dns::default(), mac: None }
}

fn link(value: serde_json::Value) -> LinkConfig {
    LinkConfig::read(&value).unwrap()
}

#[test]
fn a_conflict_is_the_engines_answer_and_nothing_is_left() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let holder = host.new_pod();
    host.root().sh("ip link add dc0 type bridge; ip link set dc0 addrgenmode none; ip link set dc0 up");
    for n in [0, 1] {
        host.root().sh(&format!("ip link add up{n} type veth peer name far{n} netns {}", holder.path().display()));
        for (netns, end) in [(&holder, "far"), (host.root(), "up")] {
            netns.sh(&format!("ip link set {end}{n} addrgenmode none; ip link set {end}{n} up"));
        }
    }
    host.root().sh("ip link set up1 master dc0");
    for (config, far) in [
        (link(json!({ "kind": "macvlan", "parent": "up0", "underlay": { "within": "3s" } })), "far0"),
        (link(json!({ "kind": "bridge", "bridge": "dc0", "underlay": { "within": "3s" } })), "far1"),
    ] {
        let (engine, pod) = (host.engine(None), host.new_pod());
        holder.sh(&format!("ip addr add 10.20.0.2/24 dev {far}; ip addr add fd20::2/64 dev {far} nodad"));
        let (before, empty) = (host.state(), HostState::capture(pod.netns()));
        let request = || AttachRequest::new(key(), pod.pod(), config.clone(), lease());
        let error = engine.attach(&request()).unwrap_err();
        let mac = holder.link(far).unwrap().mac.unwrap();
        let expected =
            ["10.20.0.2", "fd20::2"].map(|a| Conflict { address: ip(a), holder: mac, evidence: Evidence::Used });
        assert_eq!(error.conflicts().map(|c| sorted(c.to_vec())), Some(expected.to_vec()), "{error}");
        assert!(error.to_string().contains(&format!("10.20.0.2 is used by {mac}")), "{error}");
        assert_eq!(before.diff(&host.state()), "");
        assert_eq!(empty.diff(&HostState::capture(pod.netns())), "");
        assert_eq!(host.records(), Vec::<String>::new());
        // Once they are free they are given.
        holder.sh(&format!("ip addr flush dev {far}"));
        let quick = link(serde_json::from_str(&serde_json::to_string(&config).unwrap().replace("3s", "75ms")).unwrap());
        engine.attach(&AttachRequest { link: quick, ..request() }).unwrap();
        engine.detach(&key(), Some(pod.netns())).unwrap();
    }
}

#[test]
fn what_the_parent_remembers_of_an_address_is_forgotten() {
    if !require(Rung::Netns) {
        return;
    }
    let host = host_with_parent();
    for underlay in [json!({ "probes": 0, "announcements": 0 }), json!({})] {
        let (engine, pod) = (host.engine(None), host.new_pod());
        host.root().sh("ip neigh replace 10.20.0.2 lladdr 02:00:00:00:00:99 dev up0 nud stale; \
            ip neigh replace fd20::2 lladdr 02:00:00:00:00:99 dev up0 nud stale");
        let remembered = || host.root().sh("ip neigh show dev up0").lines().count();
        assert_eq!(remembered(), 2);
        let config = link(json!({ "kind": "macvlan", "parent": "up0", "underlay": underlay }));
        engine.attach(&AttachRequest::new(key(), pod.pod(), config, lease())).unwrap();
        assert_eq!(remembered(), 0);
        engine.detach(&key(), Some(pod.netns())).unwrap();
    }
}

#[test]
fn a_silent_gateway_fails_the_attach_where_it_is_to_and_nothing_is_left() {
    if !require(Rung::Netns) {
        return;
    }
    let host = host_with_parent();
    let (engine, pod) = (host.engine(None), host.new_pod());
    let attach = |underlay: serde_json::Value| {
        let config = link(json!({ "kind": "macvlan", "parent": "up0", "underlay": underlay }));
        engine.attach(&AttachRequest::new(key(), pod.pod(), config, lease()))
    };
    let (before, empty) = (host.state(), HostState::capture(pod.netns()));
    let error = attach(json!({ "gatewayProbe": "fail" })).unwrap_err();
    let AttachError::Step { cause: StepError::GatewaySilent { gateways, .. }, rollback } = &error else {
        panic!("{error}");
    };
    assert_eq!((gateways.as_slice(), rollback.len()), (&[ip("10.20.0.1"), ip("fd20::1")][..], 0));
    assert_eq!(error.conflicts(), None);
    assert_eq!(before.diff(&host.state()), "");
    assert_eq!(empty.diff(&HostState::capture(pod.netns())), "");
    attach(json!({ "gatewayProbe": "warn" })).unwrap();
    engine.detach(&key(), Some(pod.netns())).unwrap();
    host.root().sh("ip addr add 10.20.0.1/24 dev far0; ip addr add fd20::1/64 dev far0 nodad");
    attach(json!({ "gatewayProbe": "fail", "probes": 0, "within": "6s" })).unwrap();
}

/// A network card has no carrier for seconds after it was set up.
#[test]
fn a_device_without_carrier_is_waited_for_before_it_asks() {
    if !require(Rung::Netns) {
        return;
    }
    let host = host_with_parent();
    host.root().sh("ip link set far0 down; ip addr add 10.20.0.2/24 dev far0");
    let (engine, pod) = (host.engine(None), host.new_pod());
    let config = link(json!({ "kind": "host-device", "device": "up0", "underlay": { "within": "2s" } }));
    let plugged = AtomicBool::new(false);
    let error = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Longer than the probes go on.
            std::thread::sleep(Duration::from_secs(3));
            plugged.store(true, Ordering::Relaxed);
            host.root().sh("ip link set far0 up");
        });
        let error = engine.attach(&AttachRequest::new(key(), pod.pod(), config, lease())).unwrap_err();
        assert!(plugged.load(Ordering::Relaxed), "it did not wait: {error}");
        error
    });
    assert_eq!(error.conflicts().map(|c| c[0].address), Some(ip("10.20.0.2")), "{error}");
}

/// A parent whose queue has no room for any frame: nothing is known of the addresses and the gateways.
#[test]
fn a_full_queue_fails_probes_of_which_none_went_and_nothing_else() {
    if !require(Rung::Netns) {
        return;
    }
    let host = host_with_parent();
    host.root().sh("tc qdisc add dev up0 root pfifo limit 0");
    let (engine, pod, lines) = (host.engine(None), host.new_pod(), Lines::default());
    let attach = |underlay: serde_json::Value| {
        let config = link(json!({ "kind": "macvlan", "parent": "up0", "underlay": underlay }));
        let request = AttachRequest::new(key(), pod.pod(), config, lease());
        tracing::subscriber::with_default(lines.clone(), || engine.attach(&request))
    };
    let (before, empty) = (host.state(), HostState::capture(pod.netns()));
    for (underlay, what) in
        [(json!({}), "probe for conflicts"), (json!({ "probes": 0, "gatewayProbe": "fail" }), "probe the gateway")]
    {
        let error = attach(underlay).unwrap_err();
        let AttachError::Step {
            cause: StepError::Local { what: failed, source } | StepError::Unsent { what: failed, source },
            ..
        } = &error
        else {
            panic!("{error}");
        };
        assert!(failed.starts_with(what), "{error}");
        assert_eq!(source.raw_os_error(), Some(105), "{error}: ENOBUFS");
        assert_eq!(before.diff(&host.state()), "");
        assert_eq!(empty.diff(&HostState::capture(pod.netns())), "");
    }
    lines.0.lock().unwrap().clear();
    attach(json!({ "probes": 0, "gatewayProbe": "warn" })).unwrap();
    let lines = lines.0.lock().unwrap();
    let said = |line: &&String| line.contains("the gateways could not be asked");
    assert_eq!(lines.iter().filter(said).count(), 1, "{lines:?}");
}

/// By the kernel itself, where the device has no hardware. Who has another's Ethernet address for the pod's addresses has the pod's
/// at once, and the pod's settings are what they were.
#[test]
fn neighbours_are_told_of_a_pod_by_its_kernel() {
    if !require(Rung::Netns) {
        return;
    }
    let host = host_with_parent();
    let neighbour = host.new_pod();
    host.root().sh(&format!(
        "ip link set far0 netns {0}; ip link add dc0 type bridge; ip link set dc0 addrgenmode none; ip link set dc0 up; \
         ip link add up1 type veth peer name far1 netns {0}; ip link set up1 addrgenmode none; ip link set up1 master dc0 up",
        neighbour.path().display()
    ));
    for far in ["far0", "far1"] {
        neighbour.sh(&format!("ip link set {far} addrgenmode none; ip link set {far} up"));
    }
    for (kind, far) in [
        (json!({ "kind": "macvlan", "parent": "up0" }), "far0"),
        (json!({ "kind": "bridge", "bridge": "dc0" }), "far1"),
    ] {
        for announcements in [0, 2] {
            for wished in ["0", "1"] {
                let (engine, pod) = (host.engine(None), host.new_pod());
                pod.sh(&format!(
                    "echo {wished} >/proc/sys/net/ipv4/conf/default/arp_notify; \
                     echo {wished} >/proc/sys/net/ipv6/conf/default/ndisc_notify"
                ));
                for address in ["10.20.0.2", "fd20::2"] {
                    neighbour.sh(&format!("ip neigh replace {address} lladdr 02:00:00:00:00:99 dev {far} nud stale"));
                }
                let mut config = kind.clone();
                config["underlay"] = json!({ "probes": 0, "announcements": announcements });
                engine.attach(&AttachRequest::new(key(), pod.pod(), link(config), lease())).unwrap();
                let mac = pod.link("eth0").unwrap().mac.unwrap().to_string();
                let known = || {
                    ["10.20.0.2", "fd20::2"]
                        .map(|a| neighbour.sh(&format!("ip neigh show {a} dev {far}")).contains(&mac))
                };
                let what = format!("{kind}, announced {announcements} times, wished {wished}");
                if announcements == 0 && wished == "0" {
                    // The guard removed.
                    assert_eq!(known(), [false; 2], "{what}");
                } else if announcements > 0 {
                    let deadline = Instant::now() + Duration::from_secs(20);
                    while known() != [true; 2] {
                        assert!(Instant::now() < deadline, "{what}: {:?}", known());
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
                let settings = "cat /proc/sys/net/ipv4/conf/eth0/arp_notify /proc/sys/net/ipv6/conf/eth0/ndisc_notify";
                assert_eq!(pod.sh(settings).split_whitespace().collect::<Vec<_>>(), [wished; 2], "{what}");
                engine.detach(&key(), Some(pod.netns())).unwrap();
            }
        }
    }
}

/// The lines that this thread would log.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Lines {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = String::new();
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            write!(line, "{field}={value:?} ").unwrap();
        });
        self.0.lock().unwrap().push(line);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// Nobody is at the other end of the cable, or will be.
#[test]
fn a_device_that_never_has_a_carrier_asks_nobody_and_says_so() {
    if !require(Rung::Netns) {
        return;
    }
    let host = host_with_parent();
    host.root().sh("ip link set far0 down");
    let attach = |plugged: bool| {
        let (engine, pod, lines) = (host.engine(None), host.new_pod(), Lines::default());
        if plugged {
            host.root().sh("ip link set far0 up");
        }
        let config = link(json!({ "kind": "host-device", "device": "up0", "underlay": {} }));
        let request = AttachRequest::new(key(), pod.pod(), config, lease());
        tracing::subscriber::with_default(lines.clone(), || engine.attach(&request)).unwrap();
        engine.detach(&key(), Some(pod.netns())).unwrap();
        let lines = lines.0.lock().unwrap();
        lines.iter().filter(|line| line.contains("entered without being asked for")).count()
    };
    assert_eq!((attach(false), attach(true)), (1, 0));
}
