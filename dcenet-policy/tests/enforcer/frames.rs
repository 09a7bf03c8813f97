//! Frames that a pod makes by itself, with CAP_NET_RAW, or sends from a device of its own making, with CAP_NET_ADMIN: to a
//! pod beside it, and to the wire.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestNetNs, require};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{Attacher, ClsactAttacher, Direction, Hook, verdict};
use dcenet_ebpf::insn;
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::program::Program;

use crate::sys::packet_socket;
use crate::world::*;

/// Nothing may leave `app: web`.
pub const SHUT_IN: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: web, namespace: shop }
spec:
  podSelector: { matchLabels: { app: web } }
  policyTypes: [Egress]
  egress: []
"#;

/// Of each kind.
const FRAMES: u64 = 20;
/// How long is waited for what must come, on a machine that has much else to do.
const LONG: Duration = Duration::from_secs(60);
const PORT: u16 = 5353;
/// What follows the headers of every frame, before the number of its kind.
const MARK: &[u8] = b"an escaped frame";

/// The far end of a cable, or another host of the segment.
struct Wire {
    host: TestNetNs,
}

impl Wire {
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x77];
    const IPV4: &str = "10.20.0.77";
    const IPV6: &str = "fd20::77";

    fn new(world: &World) -> Self {
        let host = world.host.new_pod();
        world.host.root().sh(&format!(
            "ip link add up0 type veth peer name eth0 address 02:00:00:00:00:77 netns {}
             ip link set up0 master dc0 up",
            host.path().display()
        ));
        host.set_up("eth0");
        Self { host }
    }
}

/// Frames that arrive somewhere, by the number of their kind.
pub struct Arrivals(File);

impl Arrivals {
    pub fn of(namespace: &TestNetNs) -> Self {
        Self::on(namespace, "eth0")
    }

    pub fn on(namespace: &TestNetNs, device: &str) -> Self {
        let device = namespace.link(device).unwrap().index.get();
        Self(namespace.run(|| packet_socket(device, false)).unwrap())
    }

    pub fn drain(&mut self, seen: &mut [u64]) {
        let mut frame = [0; 2048];
        loop {
            match self.0.read(&mut frame) {
                Ok(length) => {
                    let place = frame[..length].windows(MARK.len()).position(|bytes| bytes == MARK);
                    if let Some(kind) = place.and_then(|at| frame[..length].get(at + MARK.len())) {
                        seen[usize::from(*kind)] += 1;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => panic!("{e}"),
            }
        }
    }
}

/// What shows that something is of a kind, for [`Arrivals`].
pub fn marked(kind: u8) -> Vec<u8> {
    [MARK, &[kind]].concat()
}

/// Of an IPv4 header whose own sum is 0 (RFC 1071).
pub fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// A UDP datagram, or a frame of no known protocol where there are no addresses (IEEE 802, local experimental EtherType).
pub fn frame(source: [u8; 6], destination: [u8; 6], addresses: Option<(IpAddr, IpAddr)>, kind: u8) -> Vec<u8> {
    let data = marked(kind);
    let length = (8 + data.len()) as u16;
    let udp = [&40_000_u16.to_be_bytes(), &PORT.to_be_bytes(), &length.to_be_bytes(), &[0, 0][..], &data].concat();
    let (ether_type, packet) = match addresses {
        None => (0x88b5_u16, data),
        Some((IpAddr::V4(from), IpAddr::V4(to))) => {
            let mut header = [0; 20];
            header[0] = 0x45;
            header[2..4].copy_from_slice(&(20 + length).to_be_bytes());
            header[8..10].copy_from_slice(&[64, 17]);
            header[12..16].copy_from_slice(&from.octets());
            header[16..20].copy_from_slice(&to.octets());
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            (0x0800, [&header[..], &udp].concat())
        }
        Some((IpAddr::V6(from), IpAddr::V6(to))) => {
            let mut header = [0; 40];
            header[0] = 0x60;
            header[4..6].copy_from_slice(&length.to_be_bytes());
            header[6..8].copy_from_slice(&[17, 64]);
            header[8..24].copy_from_slice(&from.octets());
            header[24..40].copy_from_slice(&to.octets());
            (0x86dd, [&header[..], &udp].concat())
        }
        Some(mixed) => panic!("{mixed:?}"),
    };
    let mut frame = [&destination[..], &source, &ether_type.to_be_bytes(), &packet].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// `web`, whose frames are tried, `db` beside it, and the wire.
struct Scene {
    world: World,
    wire: Wire,
}

impl Scene {
    fn new() -> (Self, dcenet_policy::enforcer::Enforcer) {
        let mut world = World::new();
        let owner = world.started();
        world.add_enforced("web", 2, &[("app", "web")]);
        world.add_enforced("db", 3, &[]);
        let wire = Wire::new(&world);
        // Another way than by raw frames shows that all is ready.
        world.udp("web", "db", PORT, true);
        assert!(owner.set_policies(policies(SHUT_IN)).unwrap().is_complete());
        world.udp("web", "db", PORT, false);
        (Self { world, wire }, owner)
    }

    /// Frames to the pod beside and to the wire, of both families and none, from these source addresses.
    fn frames(&self, sources: &[([u8; 6], [IpAddr; 2])]) -> Vec<Vec<u8>> {
        let beside = (self.world.endpoint("db").mac.bytes(), [false, true].map(|v6| self.world.address("db", v6)));
        let wire = (Wire::MAC, [Wire::IPV4, Wire::IPV6].map(|a| a.parse().unwrap()));
        let mut frames = Vec::new();
        for (source, own) in sources {
            for (destination, to) in [beside, wire] {
                for addresses in [Some((own[0], to[0])), Some((own[1], to[1])), None] {
                    frames.push(frame(*source, destination, addresses, frames.len() as u8));
                }
            }
        }
        frames
    }

    /// Sends every frame many times by a device of `web`, until `enough` is, or patience is at its end. Tells how many of each
    /// came to the pod beside or the wire, and how many frames were refused, as by a program on the device's own queue.
    fn escaped(
        &self,
        device: &str,
        bypass: bool,
        frames: &[Vec<u8>],
        patience: Duration,
        enough: impl Fn(&[u64], u64) -> bool,
    ) -> (Vec<u64>, u64) {
        let mut arrivals = [Arrivals::of(self.world.pod("db")), Arrivals::of(&self.wire.host)];
        let web = self.world.pod("web");
        let index = web.link(device).unwrap().index.get();
        let mut socket = web.run(|| packet_socket(index, bypass)).unwrap();
        let (mut seen, mut refused) = (vec![0; frames.len()], 0);
        for _ in 0..FRAMES {
            for frame in frames {
                let deadline = Instant::now() + LONG;
                loop {
                    match socket.write_all(frame) {
                        Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => refused += 1,
                        // Those before are on their way still, on a machine that has much else to do.
                        Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                            std::thread::sleep(Duration::from_millis(1));
                            continue;
                        }
                        written => written.unwrap(),
                    }
                    break;
                }
            }
            arrivals.iter_mut().for_each(|a| a.drain(&mut seen));
        }
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline && !enough(&seen, refused) {
            std::thread::sleep(Duration::from_millis(5));
            arrivals.iter_mut().for_each(|a| a.drain(&mut seen));
        }
        (seen, refused)
    }

    /// Some of every kind arrive.
    fn is_open(&self, device: &str, bypass: bool, frames: &[Vec<u8>]) {
        let all = |seen: &[u64]| seen.iter().all(|count| *count > 0);
        let (seen, _) = self.escaped(device, bypass, frames, LONG, |seen, _| all(seen));
        assert!(all(&seen), "{device}, past the queues: {bypass}: {seen:?}");
    }

    /// Nothing escapes while the guard is there, and it has dropped every frame; all kinds do without it.
    fn is_closed(&self, device: &str, bypass: bool, frames: &[Vec<u8>]) {
        let before = self.world.dropped("web");
        let sent = FRAMES * frames.len() as u64;
        let dropped = || self.world.dropped("web") - before;
        // What the guard has not dropped yet may be on its way to others.
        let (seen, refused) = self.escaped(device, bypass, frames, LONG, |seen, refused| {
            dropped() + refused >= sent || seen.iter().any(|count| *count > 0)
        });
        assert!(seen.iter().all(|count| *count == 0), "{device}, past the queues: {bypass}: escaped {seen:?}");
        // A full queue refuses what goes past the disciplines, and that is not on its way.
        assert!(refused < sent / 2, "{refused} of {sent} refused");
        assert!(dropped() + refused >= sent, "{} dropped and {refused} refused of {sent}", dropped());
    }

    /// Takes the guard off both pods' host ends.
    fn open(&self) {
        for device in ["web", "db"].map(|name| self.world.index(name)) {
            for direction in [Direction::Ingress, Direction::Egress] {
                let hook = Hook { device, direction };
                assert!(self.world.host.root().run(|| ClsactAttacher.detach(hook)).unwrap());
            }
        }
    }

    fn own(&self) -> ([u8; 6], [IpAddr; 2]) {
        (self.world.endpoint("web").mac.bytes(), [false, true].map(|v6| self.world.address("web", v6)))
    }
}

/// Addresses that are nobody's.
const ANOTHER: ([u8; 6], [&str; 2]) = ([2, 0, 0, 0, 0, 0x66], ["10.20.0.66", "fd20::66"]);

fn another() -> ([u8; 6], [IpAddr; 2]) {
    (ANOTHER.0, ANOTHER.1.map(|a| a.parse().unwrap()))
}

/// What goes past the queueing disciplines and programs of the pod's own device meets those of the host's end all the same.
#[test]
fn a_raw_frame_past_the_queues_meets_policy() {
    if !require(Rung::Kernel) {
        return;
    }
    let (scene, owner) = Scene::new();
    let own = scene.own();
    let frames = scene.frames(&[own, another(), (own.0, another().1), (another().0, own.1)]);
    for bypass in [false, true] {
        scene.is_closed("eth0", bypass, &frames);
    }
    // The twin: without the guard every kind arrives.
    scene.open();
    for bypass in [false, true] {
        scene.is_open("eth0", bypass, &frames);
    }
    // A guard inside the pod holds only what goes through the queues.
    let mut code = Asm::program("deny", ProgramKind::Classifier);
    code.ret(verdict::SHOT);
    let deny = Program::load(ProgramKind::Classifier, "deny", &insn::encode(code.finish().unwrap().insns())).unwrap();
    let web = scene.world.pod("web");
    let inside = Hook { device: web.link("eth0").unwrap().index, direction: Direction::Egress };
    web.run(|| ClsactAttacher.attach(inside, &deny, "inside")).unwrap();
    let (seen, refused) = scene.escaped("eth0", false, &frames, DENIED, |_, _| false);
    assert!(seen.iter().all(|count| *count == 0), "{seen:?}");
    assert_eq!(refused, FRAMES * frames.len() as u64, "by the guard inside");
    scene.is_open("eth0", true, &frames);
    owner.uninstall().unwrap();
}

/// A device that the pod stacks on its own has an address of its own, and the pod's addresses or others: none of it passes.
#[test]
fn a_macvlan_that_a_pod_stacks_on_its_device_reaches_nobody() {
    if !require(Rung::Kernel) {
        return;
    }
    let (scene, owner) = Scene::new();
    let web = scene.world.pod("web");
    web.sh("ip link add mv0 link eth0 address 02:00:00:00:00:66 type macvlan mode bridge; ip link set mv0 up");
    let own = scene.own();
    let frames = scene.frames(&[another(), (another().0, own.1), own]);
    for bypass in [false, true] {
        scene.is_closed("mv0", bypass, &frames);
    }
    // As its stack would: by an address of the segment, to a neighbour that is known.
    let (to, mac) = (scene.world.address("db", false), scene.world.endpoint("db").mac);
    web.sh(&format!(
        "ip addr add 10.20.0.66/32 dev mv0; ip route add {to}/32 dev mv0 src 10.20.0.66
         ip neigh add {to} lladdr {mac} dev mv0"
    ));
    let answered = |limit| udp_echo_from_mv0(&scene.world, to, limit);
    assert!(!answered(DENIED));
    // The twin.
    scene.open();
    for bypass in [false, true] {
        scene.is_open("mv0", bypass, &frames);
    }
    assert!((0..5).any(|_| answered(ALLOWED)), "the stack's own way");
    owner.uninstall().unwrap();
}

/// Whether a datagram that leaves `web` by its macvlan comes to `db`; the way back is not asked for.
fn udp_echo_from_mv0(world: &World, to: IpAddr, limit: Duration) -> bool {
    use std::net::UdpSocket;
    let server = world.pod("db").run(|| UdpSocket::bind((to, 0))).unwrap();
    server.set_read_timeout(Some(limit)).unwrap();
    let client = world.pod("web").run(|| UdpSocket::bind("10.20.0.66:0")).unwrap();
    client.send_to(b"x", server.local_addr().unwrap()).unwrap();
    server.recv(&mut [0; 8]).is_ok()
}
