//! Policy from the first packet on: a peer floods the address that a pod is about to get, the whole time, and nothing
//! arrives; and an ADD that waits for policy returns when the pod's own verdicts are in force, or not at all.
//!
//! 50 pods come and go under the flood, or 1,000 with `DCENET_SOAK=1`. Pods without policy in between receive it.

mod common;

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Node, Pod};
use dcenet_core::test_support::{Rung, TestNetNs, effort, require};
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::attach::ClsactAttacher;
use dcenet_ebpf::loader::AyaLoader;
use dcenet_ebpf::pin::Pins;
use dcenet_policy::enforcer::{Enforcer, EnforcerConfig, Tools};
use dcenet_policy::sources::networkpolicy::from_yaml;
use dcenet_policy::target::Tc;
use rustix::net::{AddressFamily, SocketFlags, SocketType, eth, socket_with};
use serde_json::{Value, json};

/// A node whose pods may be under policy.
struct World {
    pins: PathBuf,
    node: Node,
}

impl World {
    fn new() -> Self {
        let mut node = Node::new();
        // Each pod takes the address of the one before.
        node.config["ipam"]["cooldown"] = json!("0s");
        let pins = node.host.directory().join("bpf");
        Self { pins, node }
    }

    /// The configuration with a `policy` section, and with this label `app`.
    fn config(&self, wait: &str, app: &str) -> Value {
        let mut config = self.node.config.clone();
        config["policy"] = json!({ "default": "deny", "await": wait, "pins": self.pins });
        config["args"] = json!({ "cni": { "labels": [{ "key": "app", "value": app }] } });
        config
    }

    /// An owner that has not been told yet what the policies are.
    fn owner(&self) -> Enforcer {
        let config = EnforcerConfig {
            node: "host".to_owned(),
            node_addresses: ["10.20.0.1", "2001:db8:20::1"].map(|a| a.parse().unwrap()).into(),
            run_dir: self.node.host.run_dir(),
            pins: self.pins.clone(),
        };
        let tools = Tools {
            loader: Arc::new(AyaLoader),
            attacher: Arc::new(ClsactAttacher),
            lowering: Arc::new(Tc::new(Sizes::small())),
        };
        Enforcer::open(self.node.host.host(), config, tools).unwrap()
    }

    fn add(&self, pod: &Pod, config: &Value) -> Result<Value, Value> {
        self.node.call("ADD", pod, &config.to_string())
    }

    fn del(&self, pod: &Pod, config: &Value) {
        self.node.call("DEL", pod, &config.to_string()).unwrap();
    }

    /// What the programs on a device have dropped; 0 where there are none.
    fn dropped(&self, device: &str) -> u64 {
        let text = self.node.host.root().sh(&format!("tc -s -j qdisc show dev {device}"));
        let disciplines: Value = serde_json::from_str(&text).unwrap();
        let clsact = disciplines.as_array().unwrap().iter().find(|d| d["kind"] == "clsact");
        clsact.map_or(0, |d| d["drops"].as_u64().unwrap())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The bpffs outlives its owner; the host's directory cannot be removed around it.
        let _ = Pins::at(&self.pins).unmount();
    }
}

/// How the flood reaches a pod.
const WAYS: [&str; 4] = ["IPv4 unicast", "IPv4 broadcast", "IPv6 unicast", "IPv6 multicast"];
const VICTIM: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 20, 0, 50), Ipv6Addr::new(0x2001, 0xdb8, 0x20, 0, 0, 0, 0, 0x50));
const VICTIM_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x50];
const PORT: u16 = 4001;

/// Sends without a pause to the victim's addresses, whoever has them, until it is dropped.
struct Flood {
    /// What the kernel took, by way.
    sent: Arc<[AtomicU64; 4]>,
    stopping: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Flood {
    /// Neighbours are written down on the peer, so that it never has to ask for them.
    fn start(peer: &TestNetNs) -> Self {
        let mac = VICTIM_MAC.map(|b| format!("{b:02x}")).join(":");
        peer.sh(&format!(
            "ip neigh replace {} lladdr {mac} nud permanent dev eth0
             ip neigh replace {} lladdr {mac} nud permanent dev eth0",
            VICTIM.0, VICTIM.1
        ));
        let scope = peer.link("eth0").unwrap().index.get();
        let everybody = SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), PORT, 0, scope);
        let targets: [SocketAddr; 4] = [
            (VICTIM.0, PORT).into(),
            (Ipv4Addr::new(10, 20, 0, 255), PORT).into(),
            (VICTIM.1, PORT).into(),
            everybody.into(),
        ];
        let (sent, stopping) = (Arc::new([const { AtomicU64::new(0) }; 4]), Arc::new(AtomicBool::new(false)));
        let sender = |any: IpAddr, ways: [usize; 2]| {
            let socket = peer.run(|| UdpSocket::bind((any, 0))).unwrap();
            socket.set_broadcast(true).unwrap();
            let (sent, stopping) = (Arc::clone(&sent), Arc::clone(&stopping));
            std::thread::spawn(move || {
                while !stopping.load(Ordering::Relaxed) {
                    for way in ways {
                        let taken = socket.send_to(&[way as u8; 32], targets[way]).is_ok();
                        sent[way].fetch_add(u64::from(taken), Ordering::Relaxed);
                    }
                }
            })
        };
        let threads = vec![sender(Ipv4Addr::UNSPECIFIED.into(), [0, 1]), sender(Ipv6Addr::UNSPECIFIED.into(), [2, 3])];
        Self { sent, stopping, threads }
    }

    fn sent(&self) -> [u64; 4] {
        std::array::from_fn(|way| self.sent[way].load(Ordering::Relaxed))
    }

    fn sent_since(&self, before: [u64; 4]) -> [u64; 4] {
        let now = self.sent();
        std::array::from_fn(|way| now[way] - before[way])
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic in there would be told by a flood that stands still.
            let _ = thread.join();
        }
    }
}

/// Every frame that enters a namespace through whatever device, from before there is one.
struct Arrivals {
    socket: File,
    /// Of the flood, by way.
    flood: [u64; 4],
    /// Anything else but resolving addresses, which is always allowed.
    other: Vec<Vec<u8>>,
}

impl Arrivals {
    fn watch(namespace: &TestNetNs) -> Self {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = namespace.run(|| socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(eth::ALL)));
        Self { socket: socket.unwrap().into(), flood: [0; 4], other: Vec::new() }
    }

    fn drain(&mut self) -> [u64; 4] {
        let mut frame = [0; 2048];
        loop {
            match self.socket.read(&mut frame) {
                Ok(length) => self.note(&frame[..length]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return self.flood,
                Err(e) => panic!("{e}"),
            }
        }
    }

    fn note(&mut self, frame: &[u8]) {
        let word = |at: usize| frame.get(at..at + 2).map_or(0, |w| u16::from_be_bytes([w[0], w[1]]));
        let byte = |at: usize| frame.get(at).copied().unwrap_or(0);
        let (udp, arp) = (17, word(12) == 0x0806);
        let (v4, v6) = (word(12) == 0x0800, word(12) == 0x86dd);
        // ICMPv6 133 to 137 (RFC 4861, section 4).
        let discovery = v6 && byte(20) == 58 && (133..=137).contains(&byte(54));
        if frame.get(6..12) == Some(&VICTIM_MAC) || arp || discovery {
            // Its own, or resolving.
        } else if v4 && byte(23) == udp && word(36) == PORT {
            self.flood[usize::from(byte(42))] += 1;
        } else if v6 && byte(20) == udp && word(56) == PORT {
            self.flood[usize::from(byte(62))] += 1;
        } else {
            self.other.push(frame.to_vec());
        }
    }
}

/// Packets each way that make a flood.
const ENOUGH: u64 = 500;
/// How long a test waits for what takes a moment on an idle machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "still not: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn all(counts: [u64; 4], least: u64) -> bool {
    counts.iter().all(|c| *c >= least)
}

/// The host's end of the pod's pair, from the result.
fn host_end(result: &Value) -> String {
    let interfaces = result["interfaces"].as_array().unwrap();
    let end = interfaces.iter().find(|i| i.get("sandbox").is_none() && i["name"] != "dc0");
    end.unwrap()["name"].as_str().unwrap().to_owned()
}

struct Victims<'a> {
    world: &'a World,
    flood: &'a Flood,
}

impl Victims<'_> {
    fn asking_for_its_address(mut config: Value) -> Value {
        let mac = VICTIM_MAC.map(|b| format!("{b:02x}")).join(":");
        config["runtimeConfig"] = json!({ "ips": [VICTIM.0, VICTIM.1], "mac": mac });
        config
    }

    /// A pod under policy comes, is flooded and goes. What was sent while ADD worked, and how many packets its programs
    /// dropped.
    fn denied(&self, round: usize) -> ([u64; 4], u64) {
        let config = Self::asking_for_its_address(self.world.config("0s", "db"));
        let pod = self.world.node.pod("victim");
        let mut arrivals = Arrivals::watch(&pod.netns);
        let before = self.flood.sent();
        let result = self.world.add(&pod, &config).unwrap();
        let added = self.flood.sent();
        let during = self.flood.sent_since(before);
        wait_until("a flood after ADD", || all(self.flood.sent_since(added), ENOUGH));
        // What the sender's kernel took is no proof that it came this far.
        let device = host_end(&result);
        wait_until("a flood at the program", || self.world.dropped(&device) >= 4 * ENOUGH);
        let dropped = self.world.dropped(&device);
        arrivals.drain();
        self.world.del(&pod, &config);
        assert_eq!(arrivals.drain(), [0; 4], "round {round}: arrived, and {dropped} were dropped, by {WAYS:?}");
        assert_eq!(arrivals.other, [[0; 0]; 0], "round {round}: other frames");
        (during, dropped)
    }

    /// The twin without policy. What of the flood had arrived when ADD returned.
    fn open(&self) -> [u64; 4] {
        let config = Self::asking_for_its_address(self.world.node.config.clone());
        let pod = self.world.node.pod("open");
        let mut arrivals = Arrivals::watch(&pod.netns);
        self.world.add(&pod, &config).unwrap();
        let early = arrivals.drain();
        wait_until("a flood in a pod without policy, every way", || all(arrivals.drain(), ENOUGH));
        self.world.del(&pod, &config);
        early
    }
}

#[test]
fn nothing_arrives_before_policy() {
    if !require(Rung::Kernel) {
        return;
    }
    let rounds = effort(10, 50, 1000);
    let world = World::new();
    let _owner = world.owner();
    let peer = world.node.pod("peer");
    world.add(&peer, &world.node.config).unwrap();
    let flood = Flood::start(&peer.netns);
    let victims = Victims { world: &world, flood: &flood };
    let (mut dropped, mut during, mut early) = (0, [0; 4], [0; 4]);
    let (mut round, mut pauses) = (0, 0);
    let open = |early: &mut [u64; 4]| {
        let seen = victims.open();
        *early = std::array::from_fn(|way| early[way] + seen[way]);
    };
    let begun = Instant::now();
    while round < rounds {
        // Between them, so that the flood is known to arrive all along.
        if round % (rounds / 10) == 0 {
            open(&mut early);
        }
        let (sent, there) = victims.denied(round);
        if all(sent, 1) {
            round += 1;
            dropped += there;
            during = std::array::from_fn(|way| during[way] + sent[way]);
        } else {
            // A busy machine let a sender sleep for as long as an ADD takes: that pod proves nothing.
            pauses += 1;
            assert!(pauses <= rounds, "the flood stands still during ADD");
        }
    }
    for _ in 0..rounds {
        if !all(early, 1) {
            open(&mut early);
        }
    }
    assert!(all(early, 1), "the flood misses the time in which ADD works: {early:?} by {WAYS:?}");
    println!(
        "{rounds} pods in {:.1?}, and {pauses} for nothing: {during:?} packets were sent during their ADDs, {dropped} \
         dropped until they went, and none arrived; of pods without policy {early:?} arrived before their ADDs ended",
        begun.elapsed(),
    );
}

/// `web` may connect to `db` at port 5432.
const POLICY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: db, namespace: shop }
spec:
  podSelector: { matchLabels: { app: db } }
  policyTypes: [Ingress]
  ingress:
  - from: [ { podSelector: { matchLabels: { app: web } } } ]
    ports: [ { port: 5432 } ]
"#;

/// SYNs that were sent again (the counter `TCPSynRetrans` of net/ipv4/proc.c).
fn repeated_syns(namespace: &TestNetNs) -> u64 {
    let text = namespace.run(|| fs::read_to_string("/proc/thread-self/net/netstat")).unwrap();
    let mut lines = text.lines().filter(|l| l.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|n| n == "TCPSynRetrans").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

/// A pod `db` whose servers listen before it has a network.
struct Db {
    pod: Pod,
    _servers: [TcpListener; 2],
}

impl Db {
    fn new(world: &World) -> Self {
        let pod = world.node.pod("db");
        let listen = |port| pod.netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))).unwrap();
        let servers = [listen(5432), listen(5433)];
        Self { pod, _servers: servers }
    }

    /// Nothing but what the policy allows, from the first packet on. `result` is what ADD has just returned.
    fn check(&self, result: &Value, web: &Pod, scan: &Pod) {
        let connect = |from: &Pod, to: SocketAddr, limit| from.netns.run(|| TcpStream::connect_timeout(&to, limit));
        let denied = |from, to| {
            let error = connect(from, to, Duration::from_millis(100)).expect_err("it is forbidden");
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{to}: {error}");
        };
        for ip in result["ips"].as_array().unwrap() {
            let (address, _) = ip["address"].as_str().unwrap().split_once('/').unwrap();
            let to = |port| SocketAddr::new(address.parse().unwrap(), port);
            let before = repeated_syns(&web.netns);
            connect(web, to(5432), PATIENCE).unwrap();
            assert_eq!(repeated_syns(&web.netns), before, "{address}: not at the first try");
            denied(web, to(5433));
            denied(scan, to(5432));
        }
    }
}

#[test]
fn an_add_that_waits_returns_when_its_verdicts_are_in_force() {
    if !require(Rung::Kernel) {
        return;
    }
    let world = World::new();
    let owner = world.owner();
    owner.set_policies(from_yaml(POLICY).unwrap()).unwrap();
    let (web, scan, first) = (world.node.pod("web"), world.node.pod("scan"), Db::new(&world));
    world.add(&web, &world.config("0s", "web")).unwrap();
    world.add(&scan, &world.config("0s", "scan")).unwrap();
    let waiting = world.config("30s", "db");
    std::thread::scope(|scope| {
        let adding = scope.spawn(|| world.add(&first.pod, &waiting));
        wait_until("the owner knows of the pod", || owner.endpoints().len() == 3);
        std::thread::sleep(Duration::from_millis(200));
        assert!(!adding.is_finished(), "it does not wait: {:?}", adding.join());
        assert!(owner.start().unwrap().is_complete());
        first.check(&adding.join().unwrap().unwrap(), &web, &scan);
    });
    world.del(&first.pod, &waiting);
    for _ in 0..effort(1, 5, 5) {
        let db = Db::new(&world);
        let config = world.config("30s", "db");
        let result = world.add(&db.pod, &config).unwrap();
        db.check(&result, &web, &scan);
        world.del(&db.pod, &config);
    }
    owner.uninstall().unwrap();
}

#[test]
fn an_add_without_an_owner_fails_in_time_and_leaves_nothing() {
    if !require(Rung::Kernel) {
        return;
    }
    const LIMIT: Duration = Duration::from_secs(3);
    let world = World::new();
    world.node.warm();
    let pod = world.node.pod("web");
    let host = world.node.host.state();
    let inside = pod.state();
    let store = world.node.store();
    let refused = |reason: &str| {
        let begun = Instant::now();
        let error = world.add(&pod, &world.config("3s", "web")).expect_err("nobody decides for the pod");
        let took = begun.elapsed();
        assert_eq!(error["code"], 11, "{error}");
        assert!(error["msg"].as_str().unwrap().contains(reason), "{reason}: {error}");
        assert_eq!(host.diff(&world.node.host.state()), "", "{reason}");
        assert_eq!(inside.diff(&pod.state()), "", "{reason}");
        assert_eq!(world.node.host.records(), [""; 0], "{reason}");
        assert_eq!(world.node.store(), store, "{reason}");
        took
    };

    assert!(refused("no policy owner has prepared this host") < LIMIT);
    let owner = world.owner();
    let took = refused("the default stands");
    assert!((LIMIT..LIMIT + PATIENCE).contains(&took), "an owner that is not started: {took:?}");
    drop(owner);
    assert!(refused("the policy owner does not run") < LIMIT);

    // The same call succeeds when there is one.
    let owner = world.owner();
    assert!(owner.start().unwrap().is_complete());
    let result = world.add(&pod, &world.config("30s", "web")).unwrap();

    // Whoever takes the programs away is found out, and a repeated ADD brings them back.
    let check = |expected: Option<&str>| {
        let mut config = world.config("30s", "web");
        config["prevResult"] = result.clone();
        let answer = world.node.call("CHECK", &pod, &config.to_string());
        match expected {
            None => drop(answer.unwrap()),
            Some(text) => assert!(answer.unwrap_err()["msg"].as_str().unwrap().contains(text)),
        }
    };
    check(None);
    let device = host_end(&result);
    let tag = || {
        let filters = world.node.host.root().sh(&format!("tc filter show dev {device} ingress"));
        let mut words = filters.split_whitespace();
        words.find(|word| *word == "tag").expect("a program is there");
        words.next().unwrap().to_owned()
    };
    let own = tag();
    world.node.host.root().sh(&format!("tc qdisc del dev {device} clsact"));
    check(Some("no policy is on"));
    assert_eq!(world.add(&pod, &world.config("30s", "web")).unwrap(), result);
    check(None);
    assert_eq!(tag(), own, "the pod's own verdicts, not the default");

    // An owner that is away takes nothing from a pod that stands: its last verdicts do too.
    drop(owner);
    let (host, inside) = (world.node.host.state(), pod.state());
    assert_eq!(world.add(&pod, &world.config("1s", "web")).expect_err("nobody answers")["code"], 11);
    assert_eq!(host.diff(&world.node.host.state()), "");
    assert_eq!(inside.diff(&pod.state()), "");
    let owner = world.owner();
    assert!(owner.start().unwrap().is_complete());
    assert_eq!(world.add(&pod, &world.config("30s", "web")).unwrap(), result);
    owner.uninstall().unwrap();
}

#[test]
fn neighbours_are_resolved_while_policy_is_unknown() {
    if !require(Rung::Kernel) {
        return;
    }
    let world = World::new();
    let owner = world.owner();
    let pod = world.node.pod("web");
    let result = world.add(&pod, &world.config("0s", "web")).unwrap();
    let mac = result["interfaces"][2]["mac"].as_str().unwrap().to_owned();
    for address in ["10.20.0.2", "2001:db8:20::2"] {
        let address: IpAddr = address.parse().unwrap();
        world.node.host.root().run(|| {
            let any: IpAddr = if address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            UdpSocket::bind((any, 0)).unwrap().send_to(b"x", (address, PORT)).unwrap();
        });
        wait_until("the host knows where the pod is", || {
            let neighbours = world.node.host.root().sh(&format!("ip neigh show {address} dev dc0"));
            neighbours.contains(&format!("lladdr {mac}"))
        });
    }
    owner.uninstall().unwrap();
}
