//! The datapath's programs, on both hooks and with connection tracking, replaced while packets come: nothing that both
//! policies deny gets through, and nothing that both allow is lost.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestNetNs, effort, require};
use dcenet_ebpf::abi::{self, Endpoint, Reason, Sizes};
use dcenet_ebpf::attach::conformance::Pair;
use dcenet_ebpf::attach::{self, Attacher, ClsactAttacher, Hook, Tag};
use dcenet_ebpf::datapath::{self, Spec};
use dcenet_ebpf::program::Program;

use crate::harness::*;

const HOST: [&str; 2] = ["10.9.0.1", "fd09::1"];
const OWN: [&str; 2] = ["10.9.0.2", "fd09::2"];
const SLOT: u16 = 3;
const TAG: Tag<'static> = Tag { label: "pod", class: SLOT };
/// Where both policies let flows go, and where neither does.
const ALLOWED: u16 = 4242;
const DENIED: u16 = 4343;
const UDP: u8 = 17;
/// Datagrams of each sort that are under way at once: a socket holds some 270 of these, and [`Way::exchange`] 64.
const BATCH: u64 = 16;
/// Rounds after which a sender takes a new port, and so opens new flows.
const ROUNDS: u64 = 8;
/// How long is waited for what comes at once on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long at most for a flood, which is there in seconds on an idle machine.
const GIVE_UP: Duration = Duration::from_secs(600);

/// Of each sort and way, what makes a flood.
fn flood() -> u64 {
    effort(100, 2_000, 2_000)
}

/// A server for what is allowed and one for what is not, and a client at the other end.
struct Way<'a> {
    from: &'a TestNetNs,
    to: IpAddr,
    allowed: UdpSocket,
    denied: UdpSocket,
    client: UdpSocket,
    /// The number of the next datagram that is allowed. What comes late, when it was given up, is known by its own.
    next: u64,
    /// Datagrams that reached the server and whose answers reached the client; that were not to; and that came to nothing.
    answered: u64,
    leaked: u64,
    lost: u64,
}

impl<'a> Way<'a> {
    fn new(from: &'a TestNetNs, at: &TestNetNs, to: &str) -> Self {
        let to: IpAddr = to.parse().unwrap();
        let server = |port| {
            let socket = at.run(|| UdpSocket::bind((to, port))).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let client = Self::client(from, to);
        let (allowed, denied) = (server(ALLOWED), server(DENIED));
        Self { from, to, allowed, denied, client, next: 0, answered: 0, leaked: 0, lost: 0 }
    }

    fn client(from: &TestNetNs, to: IpAddr) -> UdpSocket {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = from.run(|| UdpSocket::bind((any, 0))).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }

    /// Some of both sorts, until each that is allowed has its answer.
    fn round(&mut self, number: u64, patience: Duration) {
        if number.is_multiple_of(ROUNDS) {
            self.client = Self::client(self.from, self.to);
        }
        let answered = self.exchange(BATCH, &[ALLOWED, DENIED], patience);
        self.answered += answered;
        self.lost += BATCH - answered;
        self.note_leaks();
    }

    /// Sends so many datagrams to each port, and answers those that are allowed. How many of the answers came, each of which
    /// counts once.
    fn exchange(&mut self, count: u64, ports: &[u16], patience: Duration) -> u64 {
        let first = self.next;
        self.next += count;
        for number in first..self.next {
            for port in ports {
                // The kernel tells the socket of a drop on the way out of its own device (EPERM, ENOBUFS), and of an earlier
                // one that nobody listened (ECONNREFUSED): what is allowed is missed below then.
                let _ = self.client.send_to(&question(number), SocketAddr::new(self.to, *port));
            }
        }
        let begun = Instant::now();
        let mut came = 0_u64;
        while u64::from(came.count_ones()) < count && begun.elapsed() < patience {
            let mut moved = false;
            while let Some((number, from)) = receive(&self.allowed) {
                self.allowed.send_to(&question(number), from).unwrap();
                moved = true;
            }
            while let Some((number, _)) = receive(&self.client) {
                assert!(number < self.next, "{number} was never sent");
                if let Some(place) = number.checked_sub(first) {
                    came |= 1 << place;
                }
                moved = true;
            }
            if !moved {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        came.count_ones().into()
    }

    fn note_leaks(&mut self) {
        while receive(&self.denied).is_some() {
            self.leaked += 1;
        }
    }
}

/// What is in a datagram: the answer says the same.
fn question(number: u64) -> [u8; 8] {
    number.to_ne_bytes()
}

fn receive(socket: &UdpSocket) -> Option<(u64, SocketAddr)> {
    let mut bytes = [0; 9];
    match socket.recv_from(&mut bytes) {
        Ok((length, from)) => {
            let number = bytes[..length].try_into().expect("a number");
            Some((u64::from_ne_bytes(number), from))
        }
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused) => None,
        Err(e) => panic!("{e}"),
    }
}

/// How programs come to be on a hook in the place of others.
type Swap = fn(Hook, &Program);

fn replace(hook: Hook, program: &Program) {
    ClsactAttacher.replace_tagged(hook, program, TAG).unwrap();
}

fn detach_and_attach(hook: Hook, program: &Program) {
    assert!(ClsactAttacher.detach(hook).unwrap());
    ClsactAttacher.attach_tagged(hook, program, TAG).unwrap();
}

/// Tells the other thread when this one ends, however it does.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[derive(Debug)]
struct Seen {
    swaps: u64,
    /// Of each way.
    answered: Vec<u64>,
    leaked: u64,
    lost: u64,
    /// By policy, of both directions.
    denied: u64,
}

/// Swaps programs of two policies until there were so many swaps and a flood, or something has leaked.
/// An answer that takes longer than `patience` is lost.
fn swaps_under_flood(swaps: u64, swap: Swap, patience: Duration) -> Seen {
    let sizes = Sizes { conntrack: 65_536, conntrack_new: 65_536, event_bytes: 4096, ..small() };
    // The same verdicts by other code and other rules.
    let one = List(vec![(0, UDP, ALLOWED)]);
    let two = List(vec![(0, 6, 1), (0, 6, 2), (0, UDP, ALLOWED)]);
    let [one, two] = [one, two].map(|list| datapath::program(&Spec::new(&sizes, &list, &list)).unwrap());
    let maps = Pod::load(&one, &[]);
    maps.set_endpoint(&Endpoint::default());
    let [one, two] = [one, two].map(|object| maps.beside(SLOT, &object));
    let (v4, v6) = (OWN[0].parse().unwrap(), OWN[1].parse().unwrap());
    one.set_endpoint(&Endpoint::new(Some(v4), Some(v6), None).with_mac([2, 0, 0, 0, 0, 2]));

    let pair = Pair::default();
    let host = pair.host.root();
    let hooks = [attach::Direction::Ingress, attach::Direction::Egress].map(|direction| pair.hook(direction));
    let programs = [&one, &two].map(|pod| [pod.program(Egress), pod.program(Ingress)]);
    pair.on_host(|| {
        for (hook, program) in hooks.into_iter().zip(programs[0]) {
            ClsactAttacher.attach_tagged(hook, program, TAG).unwrap();
        }
    });
    host.set_up("h0");
    host.sh("ip neigh replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev h0
         ip neigh replace fd09::2 lladdr 02:00:00:00:00:02 dev h0");
    let mut ways = Vec::new();
    for (at_host, at_pod) in HOST.into_iter().zip(OWN) {
        ways.push(Way::new(&pair.pod, host, at_host));
        ways.push(Way::new(host, &pair.pod, at_pod));
    }
    // For a while after the device is up its other end drops everything by itself (net/core/link_watch.c).
    for way in &mut ways {
        let begun = Instant::now();
        while way.exchange(1, &[ALLOWED], Duration::from_millis(100)) == 0 {
            assert!(begun.elapsed() < PATIENCE, "{} is never reached", way.to);
        }
    }
    let all_denied = || [Egress, Ingress].map(|d| maps.reason(Reason::Denied, d)).iter().sum::<u64>();
    let denied_before = all_denied();

    let endpoints = maps.array::<Endpoint>(abi::ENDPOINTS);
    let (answered, leaked, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            let _ends = Ends(&over);
            pair.on_host(|| {
                let begun = Instant::now();
                let mut count = 0;
                while !over.load(Ordering::Acquire) && leaked.load(Ordering::Relaxed) == 0 {
                    let late = begun.elapsed() > effort(PATIENCE, PATIENCE, Duration::MAX);
                    let enough = count >= if late { swaps / 10 } else { swaps };
                    let flooded = answered.load(Ordering::Relaxed) >= flood();
                    if enough && flooded || begun.elapsed() > effort(GIVE_UP, GIVE_UP, 60 * GIVE_UP) {
                        break;
                    }
                    let new = programs[usize::from(count / 2 % 2 == 0)];
                    for (hook, program) in hooks.into_iter().zip(new) {
                        swap(hook, program);
                    }
                    count += 2;
                    // As an owner does after it has swapped both: what was admitted before is judged anew.
                    if count % 20 == 0 {
                        let mut endpoint = endpoints.load(SLOT.into()).unwrap();
                        endpoint.generation_egress += 1;
                        endpoint.generation_ingress += 1;
                        endpoints.store(SLOT.into(), &endpoint).unwrap();
                    }
                }
                done.store(count, Ordering::Relaxed);
            });
        });
        // A flood that fails has the swapper end, whom the scope waits for.
        let _ends = Ends(&over);
        let mut number = 0;
        while !over.load(Ordering::Acquire) {
            ways.iter_mut().for_each(|way| way.round(number, patience));
            answered.store(ways.iter().map(|way| way.answered).min().unwrap_or(0), Ordering::Relaxed);
            leaked.store(ways.iter().map(|way| way.leaked).sum(), Ordering::Relaxed);
            number += 1;
        }
        swapper.join().unwrap();
    });
    // The last of what is to be denied may be on its way to a program still, or past where there was none.
    let sent: u64 = ways.iter().map(|way| way.answered).sum();
    let begun = Instant::now();
    loop {
        ways.iter_mut().for_each(Way::note_leaks);
        let complete = all_denied() - denied_before >= sent || ways.iter().any(|way| way.leaked > 0);
        if complete || begun.elapsed() > PATIENCE {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    pair.on_host(|| {
        for hook in hooks {
            assert!(ClsactAttacher.detach(hook).unwrap());
        }
    });
    let denied = all_denied();
    Seen {
        swaps: done.into_inner(),
        answered: ways.iter().map(|way| way.answered).collect(),
        leaked: ways.iter().map(|way| way.leaked).sum(),
        lost: ways.iter().map(|way| way.lost).sum(),
        denied: denied - denied_before,
    }
}

#[test]
fn nothing_leaks_and_nothing_is_lost_while_both_programs_are_replaced() {
    if !require(Rung::Kernel) {
        return;
    }
    let seen = swaps_under_flood(effort(100, 10_000, 1_000_000), replace, PATIENCE);
    println!("{seen:?}");
    assert_eq!((seen.leaked, seen.lost), (0, 0), "{seen:?}");
    assert!(seen.swaps >= effort(10, 1_000, 1_000_000), "{seen:?}");
    assert!(seen.answered.iter().all(|n| *n >= flood()), "no flood: {seen:?}");
    // Each way sent as many of those, too, and they met a program that denied them.
    let sent: u64 = seen.answered.iter().sum();
    assert!(seen.denied >= sent, "{seen:?}");
}

/// The twin: between programs there is none. Of its losses nothing is asked.
#[test]
fn what_is_denied_leaks_where_programs_are_detached_before_others_are_attached() {
    if !require(Rung::Kernel) {
        return;
    }
    let seen = swaps_under_flood(effort(2_000, 20_000, 20_000), detach_and_attach, Duration::from_secs(1));
    println!("{seen:?}");
    assert!(seen.leaked > 0, "{seen:?}");
}
