//! Programs on real devices: in force before the device is up, replaced under load, outliving their process, removed
//! without a trace.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dcenet_core::model::IfIndex;
use dcenet_core::test_support::{Injection, Rung, TestHost, TestNetNs, require, with_fault};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::{AttachError, Attached, Attacher, ClsactAttacher, Direction, Hook, Owner, verdict};
use dcenet_ebpf::insn::Reg::*;
use dcenet_ebpf::insn::{self, AtomicOp, Cond, Helper, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::{Array, Map};
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::program::{Program, TestRun};

/// A host with one end of a veth pair (`h0`, down), a pod with the other (`p0`, up). Neighbours are static, so that no
/// packet is missing for want of an answer to ARP.
struct Pair {
    // In this order: the host's directory holds the pod's mount.
    pod: TestNetNs,
    host: TestHost,
    device: IfIndex,
}

impl Pair {
    fn new() -> Self {
        let host = TestHost::new();
        let pod = host.new_pod();
        let root = host.root();
        // iproute2 takes a process: one that sleeps in the pod's namespace.
        let mut inside = pod.run(|| Command::new("sleep").arg("60").spawn()).unwrap();
        root.sh(&format!(
            "ip link add h0 address 02:00:00:00:00:01 type veth peer name p0 address 02:00:00:00:00:02 netns {}",
            inside.id()
        ));
        inside.kill().unwrap();
        inside.wait().unwrap();
        root.sysctl("ipv6/conf/h0/accept_dad", "0");
        pod.sysctl("ipv6/conf/p0/accept_dad", "0");
        root.sh("ip addr add 10.9.0.1/24 broadcast 10.9.0.255 dev h0; ip addr add fd09::1/64 dev h0 nodad");
        pod.sh("ip link set p0 up
             ip addr add 10.9.0.2/24 broadcast 10.9.0.255 dev p0; ip addr add fd09::2/64 dev p0 nodad
             ip neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 dev p0
             ip neigh add fd09::1 lladdr 02:00:00:00:00:01 dev p0");
        let device = root.link("h0").unwrap().index;
        Self { pod, host, device }
    }

    fn hook(&self, direction: Direction) -> Hook {
        Hook { device: self.device, direction }
    }

    /// Runs on a thread in the host's namespace.
    fn on_host<R: Send>(&self, f: impl FnOnce(&dyn Attacher) -> R + Send) -> R {
        self.host.root().run(|| f(&ClsactAttacher))
    }

    fn device_state(&self) -> String {
        let state =
            "tc qdisc show dev h0; tc filter show dev h0 ingress 2>/dev/null; tc filter show dev h0 egress 2>/dev/null";
        self.host.root().sh(&format!("{state}; true"))
    }
}

fn program(name: &str, code: Asm) -> Program {
    let code = insn::encode(code.finish().unwrap().insns());
    Program::load(ProgramKind::Classifier, name, &code).unwrap()
}

fn constant(name: &str, value: i32) -> Program {
    let mut code = Asm::program(name, ProgramKind::Classifier);
    code.ret(value);
    program(name, code)
}

fn deny() -> Program {
    constant("deny", verdict::SHOT)
}

/// Drops everything, and counts what the flood sends by its way.
fn counting_deny() -> (Program, Array<u64>) {
    let mut code = Asm::program("count_deny", ProgramKind::Classifier);
    let (v4, v6, count, drop) = (code.label(), code.label(), code.label(), code.label());
    let (data, end) = (76, 80);
    code.load(Size::W, R2, R1, data)
        .load(Size::W, R3, R1, end)
        .mov(R4, R2)
        .add(R4, 74)
        .jump_if(Cond::Gt, R4, R3, drop)
        .load(Size::H, R5, R2, 12)
        .jump_if(Cond::Eq, R5, i32::from(0x0800_u16.to_be()), v4)
        .jump_if(Cond::Eq, R5, i32::from(0x86dd_u16.to_be()), v6)
        .jump(drop)
        .bind(v4)
        .load(Size::H, R5, R2, 36)
        .load(Size::B, R6, R2, 42)
        .jump(count)
        .bind(v6)
        .load(Size::H, R5, R2, 56)
        .load(Size::B, R6, R2, 62)
        .bind(count)
        .jump_if(Cond::Ne, R5, i32::from(ALLOWED.to_be()), drop)
        .store(Size::W, R10, -4, R6)
        .load_map(R1, "dropped")
        .mov(R2, R10)
        .add(R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, drop)
        .mov(R1, 1)
        .atomic(AtomicOp::Add, Size::Dw, R0, 0, R1)
        .bind(drop)
        .ret(verdict::SHOT);
    let mut object = Object::new();
    object.add_map(MapSpec::array("dropped", 8, 4)).unwrap();
    object.add(code.finish().unwrap()).unwrap();
    let mut loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    let dropped = Array::new(loaded.take_map("dropped").unwrap()).unwrap();
    (loaded.take_program("count_deny").unwrap(), dropped)
}

fn counts(dropped: &Array<u64>) -> [u64; 4] {
    std::array::from_fn(|way| dropped.load(way as u32).unwrap())
}

const ALLOWED: u16 = 4001;
const DENIED: u16 = 4002;

/// Lets UDP to port `ALLOWED` pass, and neighbour discovery; everything else is dropped.
fn allow_one_port(name: &str) -> Program {
    let mut code = Asm::program(name, ProgramKind::Classifier);
    let (v4, v6, drop, pass) = (code.label(), code.label(), code.label(), code.label());
    let (data, end) = (76, 80);
    code.load(Size::W, R2, R1, data)
        .load(Size::W, R3, R1, end)
        .mov(R4, R2)
        .add(R4, 62)
        .jump_if(Cond::Gt, R4, R3, drop)
        .load(Size::H, R5, R2, 12)
        .jump_if(Cond::Eq, R5, i32::from(0x0800_u16.to_be()), v4)
        .jump_if(Cond::Eq, R5, i32::from(0x86dd_u16.to_be()), v6)
        .jump(drop)
        .bind(v4)
        .load(Size::H, R5, R2, 36)
        .jump_if(Cond::Eq, R5, i32::from(ALLOWED.to_be()), pass)
        .jump(drop)
        .bind(v6)
        .load(Size::H, R5, R2, 56)
        .jump_if(Cond::Eq, R5, i32::from(ALLOWED.to_be()), pass)
        .bind(drop)
        .ret(verdict::SHOT)
        .bind(pass)
        .ret(verdict::UNSPEC);
    program(name, code)
}

/// How packets reach the host: a broadcast and a known neighbour, of both families.
const WAYS: [&str; 4] = ["v4 unicast", "v4 broadcast", "v6 unicast", "v6 multicast"];

/// The way is the first byte of a datagram, its number the next eight; the rest makes it long enough for the program.
fn datagram(way: usize, number: u64) -> [u8; 32] {
    let mut bytes = [way as u8; 32];
    bytes[1..9].copy_from_slice(&number.to_ne_bytes());
    bytes
}

/// Sends from one end of the pair to the other.
struct Sender {
    v4: UdpSocket,
    v6: UdpSocket,
    to: (Ipv4Addr, Ipv6Addr),
    scope: u32,
}

impl Sender {
    fn to_host(pair: &Pair) -> Self {
        Self::new(&pair.pod, "p0", 2, 1)
    }

    fn to_pod(pair: &Pair) -> Self {
        Self::new(pair.host.root(), "h0", 1, 2)
    }

    fn new(from: &TestNetNs, device: &str, own: u8, peer: u8) -> Self {
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
    fn send(&self, way: usize, port: u16, number: u64) -> bool {
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
struct Receiver {
    socket: UdpSocket,
    counts: [u64; 4],
}

impl Receiver {
    fn new(host: &TestNetNs, port: u16) -> Self {
        host.run(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap();
            socket.set_nonblocking(true).unwrap();
            Self { socket, counts: [0; 4] }
        })
    }

    fn drain(&mut self) {
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
fn flood_over_up(pair: &Pair, enough: impl Fn(&[u64; 4]) -> bool) -> [u64; 4] {
    flood(pair, &Sender::to_host(pair), Receiver::new(pair.host.root(), ALLOWED), enough)
}

fn flood(pair: &Pair, sender: &Sender, mut receiver: Receiver, enough: impl Fn(&[u64; 4]) -> bool) -> [u64; 4] {
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
const PATIENCE: Duration = Duration::from_secs(90);

/// Packets each way that make a flood.
const FLOOD: u64 = 2_000;

#[test]
fn nothing_passes_a_deny_all_that_is_attached_while_the_device_is_down() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::new();
    let (program, dropped) = counting_deny();
    pair.on_host(|a| a.attach(pair.hook(Direction::Ingress), &program, "default")).unwrap();
    let seen = flood_over_up(&pair, |_| counts(&dropped).iter().all(|d| *d >= FLOOD));
    let dropped = counts(&dropped);
    assert!(dropped.iter().all(|d| *d >= FLOOD), "the flood: {dropped:?} by {WAYS:?}");
    assert_eq!(seen, [0; 4], "arrived, and {dropped:?} were dropped, by {WAYS:?}");
}

/// The twin: the same flood without the program is seen, every way.
#[test]
fn everything_passes_where_nothing_is_attached() {
    if !require(Rung::Kernel) {
        return;
    }
    let seen = flood_over_up(&Pair::new(), |seen| seen.iter().all(|s| *s >= FLOOD));
    assert!(seen.iter().all(|s| *s >= FLOOD), "arrived {seen:?} by {WAYS:?}");
}

#[test]
fn the_other_way_is_denied_from_the_start_too() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::new();
    let (program, dropped) = counting_deny();
    let hook = pair.hook(Direction::Egress);
    pair.on_host(|a| a.attach(hook, &program, "default")).unwrap();
    let sender = Sender::to_pod(&pair);
    let seen =
        flood(&pair, &sender, Receiver::new(&pair.pod, ALLOWED), |_| counts(&dropped).iter().all(|d| *d >= FLOOD));
    let dropped = counts(&dropped);
    assert!(dropped.iter().all(|d| *d >= FLOOD), "the flood: {dropped:?} by {WAYS:?}");
    assert_eq!(seen, [0; 4], "arrived, and {dropped:?} were dropped, by {WAYS:?}");
    // The twin: without the program the same is seen.
    assert!(pair.on_host(|a| a.detach(hook)).unwrap());
    let seen = flood(&pair, &sender, Receiver::new(&pair.pod, ALLOWED), |seen| seen.iter().all(|s| *s >= FLOOD));
    assert!(seen.iter().all(|s| *s >= FLOOD), "arrived {seen:?} by {WAYS:?}");
}

#[test]
fn an_index_means_the_device_in_the_callers_namespace() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::new();
    let inside = Hook { device: pair.pod.link("p0").unwrap().index, direction: Direction::Ingress };
    pair.pod.run(|| ClsactAttacher.attach(inside, &deny(), "inside")).unwrap();
    assert!(pair.pod.run(|| ClsactAttacher.attached(inside)).unwrap().is_some());
    assert_eq!(pair.on_host(|a| a.attached(pair.hook(Direction::Ingress))).unwrap(), None);
    assert_eq!(pair.on_host(|a| a.attached(inside)).unwrap(), None);
    assert!(pair.pod.run(|| ClsactAttacher.detach(inside)).unwrap());
}

#[test]
fn replaced_under_a_flood_nothing_leaks_and_nothing_is_lost() {
    if !require(Rung::Kernel) {
        return;
    }
    const SWAPS: u64 = 2_000;
    let pair = Pair::new();
    let hook = pair.hook(Direction::Ingress);
    // Both ends take a while to be ready for multicast.
    flood_over_up(&pair, |seen| seen.iter().all(|s| *s > 0));
    let (program, dropped) = counting_deny();
    pair.on_host(|a| a.attach(hook, &program, "default")).unwrap();
    let mut allowed = Receiver::new(pair.host.root(), ALLOWED);
    let mut denied = Receiver::new(pair.host.root(), DENIED);
    let sender = Sender::to_host(&pair);
    let (open, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let must_arrive = [const { AtomicU64::new(0) }; 4];
    let mut refused = 0_u64;
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            pair.on_host(|a| {
                let [one, two] = [allow_one_port("one"), allow_one_port("two")];
                let start = Instant::now();
                while counts(&dropped).iter().any(|d| *d < 100) && start.elapsed() < PATIENCE {
                    std::thread::sleep(Duration::from_millis(2));
                }
                a.replace(hook, &one, "one").unwrap();
                open.store(true, Ordering::Release);
                for swap in 0..SWAPS {
                    let (old, new) = if swap % 2 == 0 { (&one, &two) } else { (&two, &one) };
                    let was = a.replace(hook, new, "swapped").unwrap();
                    assert_eq!(was.program, Some(old.info().id));
                    std::thread::sleep(Duration::from_micros(100));
                }
                stop.store(true, Ordering::Release);
            });
        });
        let mut number = 0;
        while !stop.load(Ordering::Acquire) && !swapper.is_finished() {
            for (way, due) in must_arrive.iter().enumerate() {
                let was_open = open.load(Ordering::Acquire);
                if sender.send(way, ALLOWED, number) && was_open {
                    due.fetch_add(1, Ordering::Relaxed);
                }
                refused += u64::from(sender.send(way, DENIED, number));
            }
            number += 1;
            // A socket holds some 270 of these: we wait for what is under way before it can overflow. What is lost
            // stays under way, and is found below.
            let sent: u64 = must_arrive.iter().map(|s| s.load(Ordering::Relaxed)).sum();
            let start = Instant::now();
            allowed.drain();
            while allowed.counts.iter().sum::<u64>() + 64 < sent && start.elapsed() < Duration::from_secs(2) {
                allowed.drain();
            }
            denied.drain();
        }
        swapper.join().unwrap();
    });
    std::thread::sleep(Duration::from_millis(20));
    allowed.drain();
    denied.drain();
    let must_arrive = must_arrive.map(AtomicU64::into_inner);
    assert!(must_arrive.iter().all(|s| *s >= 1_000) && refused >= 4_000, "the flood: {must_arrive:?}, {refused}");
    assert_eq!(denied.counts, [0; 4], "leaked of {refused}");
    for (way, (seen, sent)) in allowed.counts.iter().zip(must_arrive).enumerate() {
        assert!(*seen >= sent, "{}: {seen} of {sent} that must arrive", WAYS[way]);
    }
}

/// A child that does not outlive a test which fails.
struct KilledAtLast(Child);

impl Drop for KilledAtLast {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_program_outlives_its_process() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::new();
    // This test's own binary, told to attach and to wait for its end.
    let mut child = KilledAtLast(pair.host.root().run(|| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "attaches_and_waits", "--ignored", "--nocapture"])
            .env(DEVICE, pair.device.to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }));
    let hook = pair.hook(Direction::Ingress);
    let start = Instant::now();
    let attached = loop {
        if let Some(attached) = pair.on_host(|a| a.attached(hook)).unwrap() {
            break attached;
        }
        assert!(start.elapsed() < PATIENCE && child.0.try_wait().unwrap().is_none(), "it never attached");
        std::thread::sleep(Duration::from_millis(2));
    };
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    let after = pair.on_host(|a| a.attached(hook)).unwrap().expect("still there");
    assert_eq!(after, attached);
    assert_eq!(after.owner, Owner::Ours("of-the-dead".into()));
    // Whoever comes next adopts it: program and maps are found from the device.
    let program = Program::by_id(after.program.unwrap()).unwrap();
    let [map] = program.info().maps[..] else { panic!("{:?}", program.info()) };
    let dropped = Array::new(Map::by_id(map).unwrap()).unwrap();
    let seen = flood_over_up(&pair, |_| counts(&dropped).iter().all(|d| *d >= FLOOD));
    let dropped = counts(&dropped);
    assert!(dropped.iter().all(|d| *d >= FLOOD), "the flood: {dropped:?} by {WAYS:?}");
    assert_eq!(seen, [0; 4], "arrived, and {dropped:?} were dropped, by {WAYS:?}");
    let run = program.test_run(&TestRun { packet: &[0; 64], context: &[], repeat: 1 }).unwrap();
    assert_eq!(run.retval, verdict::SHOT.cast_unsigned());
    assert_eq!(Some(program.info().tag), after.tag);
    assert!(pair.on_host(|a| a.detach(hook)).unwrap());
}

const DEVICE: &str = "DCENET_TEST_DEVICE";

#[test]
#[ignore = "the child of another test"]
fn attaches_and_waits() {
    let Ok(device) = std::env::var(DEVICE) else { return };
    let device = IfIndex::new(device.parse().unwrap()).unwrap();
    let hook = Hook { device, direction: Direction::Ingress };
    // A test runs on a thread of its own, in the namespace that the process was started in.
    ClsactAttacher.attach(hook, &counting_deny().0, "of-the-dead").unwrap();
    std::thread::sleep(2 * PATIENCE);
    panic!("nobody killed the child");
}

#[test]
fn attaching_and_detaching_leave_the_device_as_it_was() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::new();
    let before = pair.device_state();
    let (ingress, egress) = (pair.hook(Direction::Ingress), pair.hook(Direction::Egress));
    pair.on_host(|a| {
        let (one, two) = (deny(), constant("other", verdict::UNSPEC));
        assert_eq!(a.chain(ingress).unwrap(), []);
        assert!(!a.detach(ingress).unwrap());
        assert!(matches!(a.replace(ingress, &one, "x"), Err(AttachError::NotAttached { .. })));
        assert_eq!(a.attach(ingress, &one, "first").unwrap(), None);
        assert_eq!(a.attached(egress).unwrap(), None);
        assert_eq!(a.attach(egress, &two, "").unwrap(), None);
        // Again, and another in its place.
        let first = a.attached(ingress).unwrap().unwrap();
        assert_eq!((first.program, first.tag), (Some(one.info().id), Some(one.info().tag)));
        assert_eq!(first.owner, Owner::Ours("first".into()));
        assert_eq!(a.attach(ingress, &one, "first").unwrap(), Some(first.clone()));
        assert_eq!(a.attach(ingress, &two, "second").unwrap(), Some(first));
        let chain = a.chain(ingress).unwrap();
        assert!(matches!(&chain[..], [Attached { owner: Owner::Ours(label), .. }] if label == "second"), "{chain:?}");
        assert_eq!(a.attached(egress).unwrap().unwrap().owner, Owner::Ours(String::new()));
        // The other direction keeps the discipline.
        assert!(a.detach(ingress).unwrap());
        assert!(a.attached(egress).unwrap().is_some());
        assert!(a.detach(egress).unwrap());
        assert!(!a.detach(egress).unwrap());
    });
    assert_eq!(pair.device_state(), before);
}

#[test]
fn what_others_have_attached_stays() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::new();
    let root = pair.host.root();
    root.sh("tc qdisc add dev h0 clsact");
    root.sh("tc filter add dev h0 ingress pref 7 protocol ip u32 match u32 0 0 flowid 1:1");
    root.sh("tc filter add dev h0 egress pref 60000 protocol ip u32 match u32 0 0 flowid 1:1");
    let before = pair.device_state();
    assert!(before.contains("clsact") && before.matches("u32").count() > 1, "{before}");
    let hook = pair.hook(Direction::Ingress);
    pair.on_host(|a| {
        a.attach(hook, &deny(), "ours").unwrap();
        let chain = a.chain(hook).unwrap();
        let owners: Vec<_> = chain.iter().map(|c| (c.priority < 100, &c.owner)).collect();
        assert!(owners.contains(&(true, &Owner::Foreign(Some("u32".into())))), "{chain:?}");
        assert!(owners.contains(&(false, &Owner::Ours("ours".into()))), "{chain:?}");
        assert!(a.detach(hook).unwrap());
    });
    assert_eq!(pair.device_state(), before);
    // An empty discipline, too, is what it was: ours is not the only one that may have made it.
    root.sh("tc filter del dev h0 ingress; tc filter del dev h0 egress");
    pair.on_host(|a| {
        a.attach(hook, &deny(), "ours").unwrap();
        assert!(a.detach(hook).unwrap());
    });
    assert!(!pair.device_state().contains("clsact"), "the last one out removes it");
}

#[test]
fn our_place_taken_by_another_is_an_error_and_not_overwritten() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::new();
    let root = pair.host.root();
    let hook = pair.hook(Direction::Egress);
    root.sh("tc qdisc add dev h0 clsact");
    root.sh("tc filter add dev h0 egress pref 3534 handle 0xdce protocol all bpf da bytecode '1,6 0 0 0,'");
    let before = pair.device_state();
    pair.on_host(|a| {
        assert!(matches!(a.attach(hook, &deny(), "x"), Err(AttachError::Occupied { .. })));
        assert!(matches!(a.replace(hook, &deny(), "x"), Err(AttachError::Occupied { .. })));
        assert!(matches!(a.detach(hook), Err(AttachError::Occupied { .. })));
    });
    assert_eq!(pair.device_state(), before);
    // The older discipline has one list for both directions.
    root.sh("tc qdisc del dev h0 clsact; tc qdisc add dev h0 ingress");
    let before = pair.device_state();
    pair.on_host(|a| {
        assert!(matches!(a.attach(hook, &deny(), "x"), Err(AttachError::Occupied { .. })));
        let ingress = pair.hook(Direction::Ingress);
        a.attach(ingress, &deny(), "x").unwrap();
        assert!(a.attached(ingress).unwrap().is_some());
        assert_eq!(a.chain(hook).unwrap(), []);
        assert!(a.detach(ingress).unwrap());
    });
    assert_eq!(pair.device_state(), before);
}

#[test]
fn a_missing_device_and_unfit_programs_are_told_apart() {
    if !require(Rung::Kernel) {
        return;
    }
    let pair = Pair::new();
    let hook = pair.hook(Direction::Ingress);
    let nowhere = Hook { device: IfIndex::new(9_999).unwrap(), direction: Direction::Ingress };
    let mut code = Asm::program("x", ProgramKind::Xdp);
    code.ret(2);
    let xdp = Program::load(ProgramKind::Xdp, "x", &insn::encode(code.finish().unwrap().insns())).unwrap();
    pair.on_host(|a| {
        assert!(matches!(a.attach(nowhere, &deny(), "x"), Err(AttachError::NoDevice(d)) if d == nowhere.device));
        assert!(matches!(a.replace(nowhere, &deny(), "x"), Err(AttachError::NotAttached { .. })));
        assert!(!a.detach(nowhere).unwrap());
        assert_eq!(a.chain(nowhere).unwrap(), []);
        assert!(matches!(a.attach(hook, &xdp, "x"), Err(AttachError::WrongProgram { kind: 6, .. })));
        assert!(matches!(a.attach(hook, &deny(), "a\0b"), Err(AttachError::BadLabel { .. })));
        assert!(matches!(a.attach(hook, &deny(), &"x".repeat(201)), Err(AttachError::BadLabel { .. })));
        let longest = "x".repeat(200);
        a.attach(hook, &deny(), &longest).unwrap();
        assert_eq!(a.attached(hook).unwrap().unwrap().owner, Owner::Ours(longest));
        assert!(a.detach(hook).unwrap());
    });
}

#[test]
fn every_failing_request_leaves_the_old_state_or_the_new() {
    if !require(Rung::Kernel) {
        return;
    }
    use dcenet_core::test_support::Fault;
    let pair = Pair::new();
    let hook = pair.hook(Direction::Ingress);
    let (one, two) = (deny(), constant("other", verdict::UNSPEC));
    let empty = pair.device_state();
    let fail = |call| Injection { call, fault: Fault::Fail };
    let mut counts = Vec::new();
    pair.host.root().run(|| {
        let a = &ClsactAttacher;
        for call in 1.. {
            let (outcome, calls) = with_fault(fail(call), || a.attach(hook, &one, "one"));
            if call > calls {
                outcome.unwrap();
                counts.push(("attach", calls));
                break;
            }
            outcome.unwrap_err();
            assert_eq!(a.chain(hook).unwrap(), [], "attach, call {call}");
        }
        let stands = |p: &Program| a.attached(hook).unwrap().unwrap().program == Some(p.info().id);
        for call in 1.. {
            let (outcome, calls) = with_fault(fail(call), || a.attach(hook, &two, "two"));
            if call > calls {
                outcome.unwrap();
                counts.push(("attach again", calls));
                break;
            }
            assert!(outcome.is_err() && stands(&one), "attach again, call {call}");
        }
        assert!(stands(&two));
        for call in 1.. {
            let (outcome, calls) = with_fault(fail(call), || a.replace(hook, &one, "one"));
            if call > calls {
                outcome.unwrap();
                counts.push(("replace", calls));
                break;
            }
            assert!(outcome.is_err() && stands(&two), "replace, call {call}");
        }
        for call in 1.. {
            let (outcome, calls) = with_fault(fail(call), || a.detach(hook));
            if call > calls {
                outcome.unwrap();
                counts.push(("detach", calls));
                break;
            }
            outcome.unwrap_err();
        }
    });
    assert_eq!(pair.device_state(), empty);
    println!("netlink requests: {counts:?}");
    assert!(counts.iter().all(|(_, calls)| (2..=6).contains(calls)), "{counts:?}");
}
