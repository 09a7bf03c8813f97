//! Packets as real stacks make them where a link is too small, a datagram too large, or a header unusual: what policy allows
//! gets through, and nothing else does on their account.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestNetNs, require};
use dcenet_ebpf::abi::Reason;
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{Attacher, ClsactAttacher, Direction, Hook, verdict};
use dcenet_ebpf::insn::Reg::*;
use dcenet_ebpf::insn::{AtomicOp, Cond, Helper, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::Array;
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::program::Program;
use dcenet_policy::enforcer::Enforcer;

use crate::frames::{Arrivals, checksum, frame};
use crate::sys::{packet_socket, set_option};
use crate::world::*;

/// `web` may open flows to two ports of `db`, and nobody any to `web`; `db` admits these of `web` and opens none.
const PAIR: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: web, namespace: shop }
spec:
  podSelector: { matchLabels: { app: web } }
  policyTypes: [Ingress, Egress]
  ingress: []
  egress:
  - to: [ { podSelector: { matchLabels: { app: db } } } ]
    ports: [ { port: 5432 }, { port: 5353, protocol: UDP } ]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: db, namespace: shop }
spec:
  podSelector: { matchLabels: { app: db } }
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [ { podSelector: { matchLabels: { app: web } } } ]
    ports: [ { port: 5432 }, { port: 5353, protocol: UDP } ]
  egress: []
"#;

const ALLOWED_PORT: u16 = 5353;
const DENIED_PORT: u16 = 5354;
/// How long is waited for what must come, on a machine that has much else to do.
const LONG: Duration = Duration::from_secs(60);

fn pair() -> (World, Enforcer) {
    let mut world = World::new();
    let owner = world.started();
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    assert!(owner.set_policies(policies(PAIR)).unwrap().is_complete());
    world.udp("web", "db", ALLOWED_PORT, true);
    world.udp("web", "db", DENIED_PORT, false);
    (world, owner)
}

/// A router between `web` and `db`, whose link towards `db` is as small as IPv6 allows (RFC 8200, section 5).
fn router(world: &World) -> TestNetNs {
    let router = world.host.new_pod();
    let path = router.path().display();
    world.host.root().sh(&format!(
        "for n in 0 1; do
             ip link add r$n type veth peer name eth$n netns {path}
             ip link set r$n master dc0 up
         done"
    ));
    // Each device answers for its own address alone, and nobody is told of a shorter way.
    for (name, value) in [("arp_ignore", "1"), ("arp_announce", "2"), ("send_redirects", "0"), ("rp_filter", "0")] {
        router.sysctl(&format!("ipv4/conf/all/{name}"), value);
        router.sysctl(&format!("ipv4/conf/default/{name}"), value);
        for device in ["eth0", "eth1"] {
            router.sysctl(&format!("ipv4/conf/{device}/{name}"), value);
        }
    }
    router.sysctl("ipv4/ip_forward", "1");
    router.sysctl("ipv6/conf/all/forwarding", "1");
    router.sh(&format!(
        "ip link set eth1 mtu {SMALL}
         for n in 0 1; do
             ip link set eth$n up
             ip addr add 10.20.0.7$n/32 dev eth$n
             ip addr add fd20::7$n/128 dev eth$n nodad
         done
         ip route add 10.20.0.2/32 dev eth0; ip route add 10.20.0.3/32 dev eth1
         ip route add fd20::2/128 dev eth0; ip route add fd20::3/128 dev eth1"
    ));
    for (pod, other, by) in [("web", 3, 0), ("db", 2, 1)] {
        world.pod(pod).sh(&format!(
            "ip route add 10.20.0.{other}/32 via 10.20.0.7{by} dev eth0
             ip route add fd20::{other}/128 via fd20::7{by} dev eth0"
        ));
    }
    router
}

const SMALL: u32 = 1280;

/// Drops errors that say that a packet is too large: destination unreachable of IPv4 (RFC 792), type 2 of ICMPv6 (RFC 4443).
/// With it a count of them.
fn without_errors() -> (Program, Array<u64>) {
    let mut code = Asm::program("no_errors", ProgramKind::Classifier);
    let (v6, pass, drop) = (code.label(), code.label(), code.label());
    code.mov(R6, R1);
    let load = |code: &mut Asm, offset: i32| {
        code.mov(R1, R6).mov(R2, offset).mov(R3, R10).add(R3, -8).mov(R4, 1).call(Helper::SkbLoadBytes);
        code.jump_if(Cond::Ne, R0, 0, pass).load(Size::B, R7, R10, -8);
    };
    // The second byte of the EtherType, then protocol and type.
    load(&mut code, 13);
    code.jump_if(Cond::Eq, R7, 0xdd, v6).jump_if(Cond::Ne, R7, 0, pass);
    load(&mut code, 23);
    code.jump_if(Cond::Ne, R7, 1, pass);
    load(&mut code, 34);
    code.jump_if(Cond::Eq, R7, 3, drop).jump(pass).bind(v6);
    load(&mut code, 20);
    code.jump_if(Cond::Ne, R7, 58, pass);
    load(&mut code, 54);
    code.jump_if(Cond::Eq, R7, 2, drop).bind(pass).ret(verdict::UNSPEC).bind(drop);
    let uncounted = code.label();
    code.store(Size::W, R10, -4, 0)
        .load_map(R1, "dropped")
        .mov(R2, R10)
        .add(R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, uncounted)
        .mov(R1, 1)
        .atomic(AtomicOp::Add, Size::Dw, R0, 0, R1)
        .bind(uncounted)
        .ret(verdict::SHOT);
    let mut object = Object::new();
    object.add_map(MapSpec::array("dropped", 8, 1)).unwrap();
    object.add(code.finish().unwrap()).unwrap();
    let mut loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    (loaded.take_program("no_errors").unwrap(), Array::new(loaded.take_map("dropped").unwrap()).unwrap())
}

/// Whether something becomes true in time.
fn in_time(mut holds: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !holds() {
        if begun.elapsed() > LONG {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Sends as much as fits into the buffers, and tells how much of it arrives.
struct Transfer {
    sender: TcpStream,
    receiver: TcpStream,
    sent: usize,
    received: usize,
}

impl Transfer {
    fn new(world: &World, ipv6: bool) -> Self {
        let to = SocketAddr::new(world.address("db", ipv6), 5432);
        let listener = world.pod("db").run(|| TcpListener::bind(to)).unwrap();
        let sender = world.pod("web").run(|| TcpStream::connect_timeout(&to, LONG)).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        sender.set_nonblocking(true).unwrap();
        receiver.set_nonblocking(true).unwrap();
        Self { sender, receiver, sent: 0, received: 0 }
    }

    /// Of this many bytes.
    fn arrives(&mut self, bytes: usize, limit: Duration) -> bool {
        let begun = Instant::now();
        while self.received < bytes && begun.elapsed() < limit {
            let due = bytes.saturating_sub(self.sent).min(30_000);
            if due > 0 {
                self.sent += or_nothing(self.sender.write(&vec![7; due]));
            }
            self.received += or_nothing(self.receiver.read(&mut [0; 65_536]));
            std::thread::sleep(Duration::from_millis(1));
        }
        self.received >= bytes
    }
}

fn or_nothing(moved: std::io::Result<usize>) -> usize {
    match moved {
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        moved => moved.unwrap(),
    }
}

/// RFC 1191, RFC 8201: the router tells of its small link, and only for that its word is let through to a pod that nobody may
/// open a flow to.
#[test]
fn a_path_is_found_to_be_small_through_two_policies() {
    if !require(Rung::Kernel) {
        return;
    }
    const BYTES: usize = 200_000;
    let (world, owner) = pair();
    let router = router(&world);
    let towards_web = Hook { device: router.link("eth0").unwrap().index, direction: Direction::Egress };
    for ipv6 in [false, true] {
        let related = || world.reasons()[&Reason::Related];
        let mut transfer = Transfer::new(&world, ipv6);
        // The twin: without the router's errors nothing large arrives, though it has some to tell.
        let (silence, dropped) = without_errors();
        router.run(|| ClsactAttacher.attach(towards_web, &silence, "silence")).unwrap();
        let before = related();
        let silenced = in_time(|| {
            transfer.arrives(BYTES, Duration::from_millis(100));
            dropped.load(0).unwrap() > 0
        });
        assert!(silenced, "IPv6: {ipv6}: no packet was too large");
        assert!(!transfer.arrives(BYTES, Duration::from_millis(500)), "IPv6: {ipv6}");
        assert_eq!((transfer.received, related() - before), (0, 0), "IPv6: {ipv6}");
        assert!(router.run(|| ClsactAttacher.detach(towards_web)).unwrap());

        assert!(transfer.arrives(BYTES, LONG), "IPv6: {ipv6}: {} of {BYTES} bytes arrived", transfer.received);
        assert!(related() > before, "IPv6: {ipv6}");
        let route = world.pod("web").sh(&format!("ip route get {}", world.address("db", ipv6)));
        assert!(route.contains(&format!("mtu {SMALL}")), "{route}");
    }
    owner.uninstall().unwrap();
}

/// What says that a packet was too large, by whoever sends it: RFC 1191, section 4; RFC 4443, section 3.2.
fn too_large((source, destination): ([u8; 6], [u8; 6]), (from, to): (IpAddr, IpAddr), about: &[u8]) -> Vec<u8> {
    let (kind, rest) = if from.is_ipv4() { ([3, 4], [0, 0, 5, 0]) } else { ([2, 0], [0, 0, 5, 0]) };
    let message = [&kind[..], &[0; 2], &rest, about].concat();
    // As a datagram, of which the UDP header and what follows are replaced.
    let mut error = frame(source, destination, Some((from, to)), 0);
    let header = if from.is_ipv4() { 34 } else { 54 };
    error.truncate(header);
    let length = message.len() as u16;
    if from.is_ipv4() {
        error[16..18].copy_from_slice(&(20 + length).to_be_bytes());
        error[23] = 1;
        // A bridge that filters drops what has a wrong sum.
        error[24..26].fill(0);
        let sum = checksum(&error[14..34]);
        error[24..26].copy_from_slice(&sum.to_be_bytes());
    } else {
        error[18..20].copy_from_slice(&length.to_be_bytes());
        error[20] = 58;
    }
    error.extend(message);
    error
}

/// How often an error is sent that must not pass.
const FORGED: u64 = 100;

/// The same bytes, before there is the flow that they speak of, and after.
#[test]
fn an_error_about_a_flow_that_nobody_opened_does_not_pass() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = pair();
    let router = router(&world);
    let by = (router.link("eth0").unwrap(), world.endpoint("web").mac.bytes());
    let macs = (by.0.mac.unwrap().bytes(), by.1);
    let mut socket = router.run(|| packet_socket(by.0.index.get(), false)).unwrap();
    let mut arrivals = Arrivals::of(world.pod("web"));
    for (kind, (ipv6, from)) in [(false, "10.20.0.70"), (true, "fd20::70")].into_iter().enumerate() {
        let (web, db) = (world.address("web", ipv6), world.address("db", ipv6));
        // From port 40000 to the port that is allowed.
        let about = frame(macs.1, macs.0, Some((web, db)), kind as u8);
        let forged = too_large(macs, (from.parse().unwrap(), web), &about[14..]);
        let mut seen = [0; 2];
        let denied = || world.reasons()[&Reason::Denied];
        let before = denied();
        // Few other packets are denied meanwhile, such as reports of multicast listeners.
        for _ in 0..FORGED {
            socket.write_all(&forged).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(in_time(|| denied() >= before + FORGED), "IPv6: {ipv6}");
        arrivals.drain(&mut seen);
        assert_eq!(seen, [0; 2], "IPv6: {ipv6}: about nobody's flow");

        let any = if ipv6 { "[::]:40000" } else { "0.0.0.0:40000" };
        let client = world.pod("web").run(|| UdpSocket::bind(any)).unwrap();
        let begun = Instant::now();
        while seen[kind] == 0 && begun.elapsed() < LONG {
            // Refused by the other end, which nobody listens at.
            let _ = client.send_to(b"x", SocketAddr::new(db, ALLOWED_PORT));
            socket.write_all(&forged).unwrap();
            std::thread::sleep(Duration::from_millis(5));
            arrivals.drain(&mut seen);
        }
        assert!(seen[kind] > 0, "IPv6: {ipv6}: about a flow that there is");
    }
    owner.uninstall().unwrap();
}

/// Whether a datagram of so many bytes comes there, and one comes back, within the limit.
fn large((client, server): (&TestNetNs, &TestNetNs), to: SocketAddr, bytes: usize, limit: Duration) -> bool {
    let answering = server.run(|| UdpSocket::bind(to)).unwrap();
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let asking = client.run(|| UdpSocket::bind((any, 0))).unwrap();
    answering.set_read_timeout(Some(limit)).unwrap();
    asking.set_read_timeout(Some(limit)).unwrap();
    let data: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8).collect();
    asking.send_to(&data, to).unwrap();
    let mut got = vec![0; 65_536];
    let Ok((length, from)) = answering.recv_from(&mut got) else { return false };
    assert_eq!(got[..length], data);
    answering.send_to(&data, from).unwrap();
    let Ok(length) = asking.recv(&mut got) else { return false };
    assert_eq!(got[..length], data);
    true
}

/// Fragments of RFC 791 and RFC 8200, as the stacks make them, there and back.
#[test]
fn fragments_go_where_their_datagram_may() {
    if !require(Rung::Kernel) {
        return;
    }
    const BYTES: usize = 4_000;
    let (world, owner) = pair();
    let ends = (world.pod("web"), world.pod("db"));
    let to = |port, ipv6| SocketAddr::new(world.address("db", ipv6), port);
    for ipv6 in [false, true] {
        assert!((0..3).any(|_| large(ends, to(ALLOWED_PORT, ipv6), BYTES, ALLOWED)), "IPv6: {ipv6}");
        let dropped = || {
            let reasons = world.reasons();
            (reasons[&Reason::Denied], reasons[&Reason::FragmentWithoutHead])
        };
        let before = dropped();
        // The first fragment, and both that follow it.
        let met = || dropped().0 > before.0 && dropped().1 >= before.1 + 2;
        let passed = world.denied(("web", "db"), ipv6, || {
            let passed = large(ends, to(DENIED_PORT, ipv6), BYTES, DENIED);
            assert!(passed || in_time(met), "IPv6: {ipv6}: {before:?}, then {:?}", dropped());
            passed
        });
        assert!(!passed, "IPv6: {ipv6}");
    }
    // The twin.
    assert!(owner.set_policies(Vec::new()).unwrap().is_complete());
    for ipv6 in [false, true] {
        assert!((0..3).any(|_| large(ends, to(DENIED_PORT, ipv6), BYTES, ALLOWED)), "IPv6: {ipv6}: without policy");
    }
    owner.uninstall().unwrap();
}

/// Which datagrams with hop-by-hop and destination options (RFC 8200, sections 4.3 and 4.6) come to the other end's device.
fn with_options(world: &World, port: u16, limit: Duration) -> bool {
    // Next header and length are the kernel's matter; then one option that pads (PadN).
    const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
    let to = SocketAddr::new(world.address("db", true), port);
    let server = world.pod("db").run(|| UdpSocket::bind(to)).unwrap();
    let client = world.pod("web").run(|| UdpSocket::bind("[::]:0")).unwrap();
    for option in [libc::IPV6_HOPOPTS, libc::IPV6_DSTOPTS] {
        set_option(&client, libc::IPPROTO_IPV6, option, &PADDING).unwrap();
    }
    let device = world.pod("db").link("eth0").unwrap().index.get();
    let mut wire = world.pod("db").run(|| packet_socket(device, false)).unwrap();
    server.set_read_timeout(Some(limit)).unwrap();
    client.send_to(b"x", to).unwrap();
    let arrived = server.recv(&mut [0; 8]).is_ok();
    // Hop-by-hop options, in them what follows: destination options, and UDP behind those.
    let mut bytes = [0; 2048];
    let mut seen = false;
    while let Ok(length) = wire.read(&mut bytes) {
        let is = |at: usize, value| bytes[..length].get(at) == Some(&value);
        seen |= is(12, 0x86) && is(13, 0xdd) && is(20, 0) && is(54, 60) && is(62, 17);
    }
    assert_eq!(seen, arrived, "what arrived had its options");
    arrived
}

#[test]
fn extension_headers_change_no_verdict() {
    if !require(Rung::Kernel) {
        return;
    }
    let (world, owner) = pair();
    assert!((0..3).any(|_| with_options(&world, ALLOWED_PORT, ALLOWED)));
    let denied = || world.reasons()[&Reason::Denied];
    let before = denied();
    let passed = world.denied(("web", "db"), true, || {
        let passed = with_options(&world, DENIED_PORT, DENIED);
        assert!(passed || in_time(|| denied() > before), "nothing was denied");
        passed
    });
    assert!(!passed);
    // The twin.
    assert!(owner.set_policies(Vec::new()).unwrap().is_complete());
    assert!((0..3).any(|_| with_options(&world, DENIED_PORT, ALLOWED)), "without policy");
    owner.uninstall().unwrap();
}
