//! Two ends of a veth pair, and floods between them.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dcenet_core::model::{IfIndex, MacAddr};
use dcenet_core::netlink::{Family, LinkKind, NetkitMode, NetkitPolicy, NewLink};
use dcenet_core::test_support::{TestHost, TestNetNs};

use super::programs::ALLOWED;
use crate::attach::{Direction, Hook};

/// A host with one end of a pair (`h0`, down), a pod with the other (`p0`, up). Neighbours are static, so that no packet is
/// missing for want of an answer to ARP.
#[derive(Debug)]
pub struct Pair {
    // In this order: the host's directory holds the pod's mount.
    /// The pod, with `p0`.
    pub pod: TestNetNs,
    /// The host, with `h0`.
    pub host: TestHost,
    /// The index of `h0`.
    pub device: IfIndex,
    kind: PairKind,
}

/// What joins host and pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairKind {
    /// veth.
    Veth,
    /// netkit, its primary end on the host; everything passes that no program drops. Linux 6.7.
    Netkit,
}

impl Default for Pair {
    fn default() -> Self {
        Self::new(PairKind::Veth)
    }
}

impl Pair {
    /// Makes both.
    ///
    /// # Panics
    /// Where the rung `netns` is missing, or the kernel does not know the kind.
    pub fn new(kind: PairKind) -> Self {
        let host = TestHost::new();
        let pod = host.new_pod();
        let device = join(&host, &pod, kind, None);
        let root = host.root();
        root.sysctl("ipv6/conf/h0/accept_dad", "0");
        pod.sysctl("ipv6/conf/p0/accept_dad", "0");
        root.sh("ip addr add 10.9.0.1/24 broadcast 10.9.0.255 dev h0; ip addr add fd09::1/64 dev h0 nodad");
        pod.sh("ip link set p0 up
             ip addr add 10.9.0.2/24 broadcast 10.9.0.255 dev p0; ip addr add fd09::2/64 dev p0 nodad
             ip neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 dev p0
             ip neigh add fd09::1 lladdr 02:00:00:00:00:01 dev p0");
        Self { pod, host, device, kind }
    }

    /// Removes both ends and makes new ones, without addresses; of veth, `h0` gets the index that it had.
    ///
    /// # Panics
    /// Where that fails.
    pub fn remake(&mut self) {
        self.host.root().sh("ip link del h0");
        self.device = join(&self.host, &self.pod, self.kind, Some(self.device));
    }

    /// A hook of `h0`.
    pub fn hook(&self, direction: Direction) -> Hook {
        Hook { device: self.device, direction }
    }

    /// Runs on a thread in the host's namespace.
    pub fn on_host<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.host.root().run(f)
    }
}

fn join(host: &TestHost, pod: &TestNetNs, kind: PairKind, index: Option<IfIndex>) -> IfIndex {
    let [mac, peer_mac] = [1, 2].map(|n| MacAddr::local([0, 0, 0, 0, 0, n]));
    match kind {
        PairKind::Veth => {
            let index = index.map(|index| format!("index {index}")).unwrap_or_default();
            let pod = pod.path().display();
            host.root().sh(&format!(
                "ip link add h0 address {mac} {index} type veth peer name p0 address {peer_mac} netns {pod}"
            ));
        }
        PairKind::Netkit => {
            let [name, peer_name] = ["h0", "p0"].map(|name| name.parse().unwrap());
            let kind = LinkKind::Netkit {
                mode: NetkitMode::L2,
                policy: NetkitPolicy::Forward,
                peer_policy: NetkitPolicy::Forward,
                peer_name: &peer_name,
                peer_mac: Some(peer_mac),
                peer_mtu: None,
                peer_netns: Some(pod.netns()),
            };
            let link = NewLink { name: &name, kind, mac: Some(mac), mtu: None, netns: None };
            host.root().netns().socket(Family::Route).unwrap().create_link(&link).unwrap();
        }
    }
    host.root().link("h0").unwrap().index
}

/// How packets reach the host: a broadcast and a known neighbour, of both families.
pub(super) const WAYS: [&str; 4] = ["v4 unicast", "v4 broadcast", "v6 unicast", "v6 multicast"];

/// The way is the first byte of a datagram, its number the next eight; the rest makes it long enough for the program.
pub(super) fn datagram(way: usize, number: u64) -> [u8; 32] {
    let mut bytes = [way as u8; 32];
    bytes[1..9].copy_from_slice(&number.to_ne_bytes());
    bytes
}

/// Sends from one end of the pair to the other.
pub(super) struct Sender {
    v4: UdpSocket,
    v6: UdpSocket,
    to: (Ipv4Addr, Ipv6Addr),
    scope: u32,
}

impl Sender {
    pub(super) fn to_host(pair: &Pair) -> Self {
        Self::new(&pair.pod, "p0", 2, 1)
    }

    pub(super) fn to_pod(pair: &Pair) -> Self {
        Self::new(pair.host.root(), "h0", 1, 2)
    }

    pub(super) fn new(from: &TestNetNs, device: &str, own: u8, peer: u8) -> Self {
        let scope = from.link(device).unwrap().index.get();
        let v4 = |last| Ipv4Addr::new(10, 9, 0, last);
        let v6 = |last| Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, u16::from(last));
        from.run(|| {
            let socket = UdpSocket::bind((v4(own), 0)).unwrap();
            socket.set_broadcast(true).unwrap();
            Self { v4: socket, v6: UdpSocket::bind((v6(own), 0)).unwrap(), to: (v4(peer), v6(peer)), scope }
        })
    }

    /// Whether the kernel took it.
    pub(super) fn send(&self, way: usize, port: u16, number: u64) -> bool {
        let bytes = datagram(way, number);
        let sent = match way {
            0 => self.v4.send_to(&bytes, (self.to.0, port)),
            1 => self.v4.send_to(&bytes, (Ipv4Addr::new(10, 9, 0, 255), port)),
            2 => self.v6.send_to(&bytes, (self.to.1, port)),
            _ => {
                let group = SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), port, 0, self.scope);
                self.v6.send_to(&bytes, group)
            }
        };
        sent.is_ok()
    }
}

/// Everything that arrives for a port on the host, by way. One socket takes both families.
pub(super) struct Receiver {
    socket: UdpSocket,
    pub(super) counts: [u64; 4],
}

impl Receiver {
    pub(super) fn new(host: &TestNetNs, port: u16) -> Self {
        host.run(|| {
            // A child of another test that has not come to its program yet holds what we have closed.
            let begun = Instant::now();
            let socket = loop {
                match UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)) {
                    Err(e) if e.kind() == ErrorKind::AddrInUse && begun.elapsed() < PATIENCE => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    bound => break bound.unwrap(),
                }
            };
            socket.set_nonblocking(true).unwrap();
            Self { socket, counts: [0; 4] }
        })
    }

    pub(super) fn drain(&mut self) {
        let mut bytes = [0; 64];
        loop {
            match self.socket.recv(&mut bytes) {
                Ok(length) => {
                    assert_eq!(length, 32);
                    self.counts[usize::from(bytes[0])] += 1;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => panic!("{e}"),
            }
        }
    }
}

/// Floods the host's end, which is down at first, sets it up in the middle, and goes on until `enough` says so. Returns
/// what arrived.
///
/// What the kernel accepts is no proof of a flood: for up to a second after a device is up the other end of the pair
/// drops everything by itself (net/core/link_watch.c). What counts is what comes to the program, or to the socket.
pub(super) fn flood_over_up(pair: &Pair, enough: impl Fn(&[u64; 4]) -> bool) -> [u64; 4] {
    flood(pair, &Sender::to_host(pair), Receiver::new(pair.host.root(), ALLOWED), enough)
}

pub(super) fn flood(
    pair: &Pair,
    sender: &Sender,
    mut receiver: Receiver,
    enough: impl Fn(&[u64; 4]) -> bool,
) -> [u64; 4] {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                for way in 0..4 {
                    sender.send(way, ALLOWED, number);
                }
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        pair.host.root().set_up("h0");
        // Static, as in the other direction.
        pair.host.root().sh("ip neigh replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev h0
             ip neigh replace fd09::2 lladdr 02:00:00:00:00:02 dev h0");
        let start = Instant::now();
        while !enough(&receiver.counts) && start.elapsed() < PATIENCE {
            receiver.drain();
            std::thread::sleep(Duration::from_micros(200));
        }
        stop.store(true, Ordering::Relaxed);
    });
    std::thread::sleep(Duration::from_millis(20));
    receiver.drain();
    receiver.counts
}

/// How long a test waits for what takes a second or two on an idle machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(90);

/// Packets each way that make a flood.
pub(super) const FLOOD: u64 = 2_000;
