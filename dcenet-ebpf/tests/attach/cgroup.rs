//! Programs on cgroups, by live traffic of a process that is in one.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Fault, Injection, Rung, TestHost, require_with, with_fault};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::attach::conformance::deny;
use dcenet_ebpf::attach::{Cgroup, CgroupAttacher, CgroupError, CgroupHook, Owner};
use dcenet_ebpf::insn::Reg::*;
use dcenet_ebpf::insn::{Cond, Size, encode};
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::program::Program;

use crate::{PLACE, TestPins};

const POINTS: [ProgramKind; 6] = [
    ProgramKind::CgroupSkbIngress,
    ProgramKind::CgroupSkbEgress,
    ProgramKind::Connect4,
    ProgramKind::Connect6,
    ProgramKind::SendMsg4,
    ProgramKind::SendMsg6,
];

fn ready() -> bool {
    require_with(Rung::Kernel, || Cgroup::mount_point().err().map(|e| e.to_string()))
}

/// A cgroup that goes with the test.
struct TestCgroup {
    path: PathBuf,
    cgroup: Cgroup,
}

impl TestCgroup {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = Cgroup::mount_point().unwrap().join(format!("dcenet-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self { cgroup: Cgroup::open(&path).unwrap(), path }
    }

    fn hook(&self, point: ProgramKind) -> CgroupHook<'_> {
        CgroupHook { cgroup: &self.cgroup, point }
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        // A process that has ended may be in it for a moment more.
        let begun = Instant::now();
        while let Err(error) = std::fs::remove_dir(&self.path) {
            if error.kind() == ErrorKind::NotFound {
                return;
            }
            if begun.elapsed() > Duration::from_secs(20) {
                eprintln!("{}: {error}", self.path.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Answers 1, or 0, whatever it is asked.
fn constant(point: ProgramKind, answer: i32) -> Program {
    let mut code = Asm::program("constant", point);
    code.ret(answer);
    load(point, code)
}

/// What is done about a destination.
enum Act {
    Deny,
    Redirect(SocketAddr),
}

/// Acts where the destination's port is this one, and lets everything else pass.
fn judge(point: ProgramKind, port: u16, act: &Act) -> Program {
    // struct bpf_sock_addr (include/uapi/linux/bpf.h).
    let (user_ip4, user_ip6, user_port) = (4, 8, 24);
    let mut code = Asm::program("judge", point);
    let pass = code.label();
    code.load(Size::W, R2, R1, user_port).jump_if(Cond::Ne, R2, i32::from(port.to_be()), pass);
    match act {
        Act::Deny => {
            code.ret(0);
        }
        Act::Redirect(to) => {
            let mut word = |at: i16, value: u32| {
                code.mov32(R2, value.cast_signed()).store(Size::W, R1, at, R2);
            };
            match to.ip() {
                IpAddr::V4(ip) => word(user_ip4, u32::from_ne_bytes(ip.octets())),
                IpAddr::V6(ip) => {
                    for (n, four) in ip.octets().chunks_exact(4).enumerate() {
                        word(user_ip6 + 4 * n as i16, u32::from_ne_bytes(four.try_into().unwrap()));
                    }
                }
            }
            word(user_port, u32::from(to.port().to_be()));
        }
    }
    code.bind(pass).ret(1);
    load(point, code)
}

fn load(point: ProgramKind, code: Asm) -> Program {
    Program::load(point, "test", &encode(code.finish().unwrap().insns())).unwrap()
}

/// Servers of two addresses, by TCP and UDP, in a namespace of their own: one answers `a`, the other `b`.
struct Servers {
    host: TestHost,
    stop: AtomicBool,
    sockets: Vec<(TcpListener, UdpSocket, u8)>,
}

impl Servers {
    fn new() -> Self {
        let host = TestHost::new();
        host.root().sh("ip link set lo up");
        let addresses: [(IpAddr, u8); 4] = [
            (Ipv4Addr::LOCALHOST.into(), b'a'),
            (Ipv4Addr::new(127, 0, 0, 2).into(), b'b'),
            (Ipv6Addr::LOCALHOST.into(), b'a'),
            (Ipv6Addr::LOCALHOST.into(), b'b'),
        ];
        let open = |(address, answer): (IpAddr, u8)| {
            // Both protocols on one port.
            (0..100)
                .find_map(|_| {
                    let tcp = TcpListener::bind((address, 0)).ok()?;
                    let udp = UdpSocket::bind(tcp.local_addr().ok()?).ok()?;
                    tcp.set_nonblocking(true).ok()?;
                    udp.set_nonblocking(true).ok()?;
                    Some((tcp, udp, answer))
                })
                .expect("a port that both protocols have free")
        };
        let sockets = host.root().run(|| addresses.map(open).into());
        Self { host, stop: AtomicBool::new(false), sockets }
    }

    /// The address that the `a` or `b` of a family has.
    fn address(&self, v4: bool, answer: u8) -> SocketAddr {
        let own = |(tcp, _, a): &(TcpListener, UdpSocket, u8)| {
            let address = tcp.local_addr().unwrap();
            (*a == answer && address.is_ipv4() == v4).then_some(address)
        };
        self.sockets.iter().find_map(own).unwrap()
    }

    fn serve(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            for (tcp, udp, answer) in &self.sockets {
                while let Ok((mut stream, _)) = tcp.accept() {
                    // Whoever has gone meanwhile is the client's concern.
                    let _ = stream.write_all(&[*answer]);
                }
                let mut bytes = [0; 16];
                while let Ok((_, from)) = udp.recv_from(&mut bytes) {
                    let _ = udp.send_to(&[*answer], from);
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Runs `f` while they serve.
    fn while_serving(&self, f: impl FnOnce()) {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        std::thread::scope(|scope| {
            scope.spawn(|| self.serve());
            let _stop = Stop(&self.stop);
            f();
        });
    }

    /// What a process of the cgroup meets that asks an address: the answer, `EPERM`, or `nothing`.
    fn asked(&self, from: &TestCgroup, protocol: &str, to: SocketAddr, patience: Duration) -> String {
        let mut child = child("talks");
        child.env(CGROUP, &from.path).env(TALK, format!("{protocol} {to} {}", patience.as_millis()));
        let done = self.host.root().run(|| child.output()).unwrap();
        let text = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success(), "{text}{}", String::from_utf8_lossy(&done.stderr));
        let said = text.lines().find_map(|line| line.split_once(SAID)).expect("an outcome").1;
        said.to_owned()
    }
}

const CGROUP: &str = "DCENET_TEST_CGROUP";
const TALK: &str = "DCENET_TEST_TALK";
const KILL: &str = "DCENET_TEST_KILL";
const SAID: &str = "said: ";
/// For what must not come.
const SHORT: Duration = Duration::from_millis(700);
/// For what must.
const LONG: Duration = Duration::from_secs(30);

/// A test of this binary as a process of its own.
fn child(test: &str) -> Command {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("cgroup::{test}"), "--ignored", "--nocapture"]);
    child
}

#[test]
#[ignore = "the child of another test"]
fn talks() {
    let (Ok(cgroup), Ok(talk)) = (std::env::var(CGROUP), std::env::var(TALK)) else { return };
    // A socket belongs to the cgroup that its process was in when it was made.
    std::fs::write(PathBuf::from(cgroup).join("cgroup.procs"), "0").unwrap();
    let words: Vec<&str> = talk.split(' ').collect();
    let to: SocketAddr = words[1].parse().unwrap();
    let patience = Duration::from_millis(words[2].parse().unwrap());
    let ask = || {
        let mut answer = [0];
        if words[0] == "tcp" {
            let mut stream = TcpStream::connect_timeout(&to, patience)?;
            stream.set_read_timeout(Some(patience))?;
            stream.read_exact(&mut answer)?;
        } else {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(patience))?;
            socket.send_to(b"?", to)?;
            socket.recv_from(&mut answer)?;
        }
        Ok::<_, std::io::Error>(char::from(answer[0]).to_string())
    };
    let outcome = ask().unwrap_or_else(|e| match e.kind() {
        ErrorKind::PermissionDenied => "EPERM".to_owned(),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "nothing".to_owned(),
        _ => panic!("{e}"),
    });
    println!("\n{SAID}{outcome}");
}

/// connect(2) and sendmsg(2) are denied, or go elsewhere, in the cgroup alone and for the port alone.
#[test]
fn a_process_reaches_what_its_cgroup_may_reach() {
    if !ready() {
        return;
    }
    let pins = TestPins::new();
    let attacher = CgroupAttacher::new(pins.clone());
    let servers = Servers::new();
    let (inside, outside) = (TestCgroup::new(), TestCgroup::new());
    servers.while_serving(|| {
        for (point, protocol, v4) in [
            (ProgramKind::Connect4, "tcp", true),
            (ProgramKind::Connect6, "tcp", false),
            (ProgramKind::SendMsg4, "udp", true),
            (ProgramKind::SendMsg6, "udp", false),
        ] {
            let [a, b] = [b'a', b'b'].map(|answer| servers.address(v4, answer));
            let hook = inside.hook(point);
            let asks = |from, to| servers.asked(from, protocol, to, LONG);
            assert_eq!([asks(&inside, a), asks(&inside, b)], ["a", "b"], "{point:?}: nothing is attached");
            attacher.attach(hook, &judge(point, a.port(), &Act::Deny), "pod").unwrap();
            assert_eq!([asks(&inside, a), asks(&inside, b)], ["EPERM", "b"], "{point:?}");
            assert_eq!(asks(&outside, a), "a", "{point:?}: another cgroup");
            attacher.replace(hook, &judge(point, a.port(), &Act::Redirect(b)), "pod").unwrap();
            assert_eq!([asks(&inside, a), asks(&inside, b)], ["b", "b"], "{point:?}");
            assert_eq!(asks(&outside, a), "a", "{point:?}: another cgroup");
            // The other protocol has points of its own.
            let other = if protocol == "tcp" { "udp" } else { "tcp" };
            assert_eq!(servers.asked(&inside, other, a, LONG), "a", "{point:?}");
            assert!(attacher.detach(hook).unwrap());
            assert_eq!(asks(&inside, a), "a", "{point:?}: detached");
        }
    });
    assert_eq!(pins.list().unwrap(), [""; 0]);
}

#[test]
fn packets_of_a_cgroup_are_dropped_on_both_ways() {
    if !ready() {
        return;
    }
    let pins = TestPins::new();
    let attacher = CgroupAttacher::new(pins.clone());
    let servers = Servers::new();
    let (inside, outside) = (TestCgroup::new(), TestCgroup::new());
    servers.while_serving(|| {
        for (point, told) in [(ProgramKind::CgroupSkbEgress, "EPERM"), (ProgramKind::CgroupSkbIngress, "nothing")] {
            for v4 in [true, false] {
                let a = servers.address(v4, b'a');
                let hook = inside.hook(point);
                attacher.attach(hook, &constant(point, 0), "pod").unwrap();
                assert_eq!(servers.asked(&inside, "udp", a, SHORT), told, "{point:?}");
                assert_eq!(servers.asked(&outside, "udp", a, LONG), "a", "{point:?}: another cgroup");
                attacher.replace(hook, &constant(point, 1), "pod").unwrap();
                assert_eq!(servers.asked(&inside, "udp", a, LONG), "a", "{point:?}: the twin");
                assert!(attacher.detach(hook).unwrap());
            }
        }
    });
}

/// A program denies what another one lets pass, whichever was first, and from a cgroup above too.
#[test]
fn every_program_is_asked() {
    if !ready() {
        return;
    }
    let (ours, theirs) = (TestPins::new(), TestPins::new());
    let (one, two) = (CgroupAttacher::new(ours.clone()), CgroupAttacher::new(theirs.clone()));
    let servers = Servers::new();
    let above = TestCgroup::new();
    let below = above.path.join("below");
    std::fs::create_dir(&below).unwrap();
    let below = TestCgroup { cgroup: Cgroup::open(&below).unwrap(), path: below };
    let point = ProgramKind::Connect4;
    let (pass, drop) = (constant(point, 1), constant(point, 0));
    let a = servers.address(true, b'a');
    servers.while_serving(|| {
        for hook in [above.hook(point), below.hook(point)] {
            for (first, second) in [(&pass, &drop), (&drop, &pass)] {
                one.attach(hook, first, "ours").unwrap();
                two.attach(hook, second, "theirs").unwrap();
                assert_eq!(servers.asked(&below, "tcp", a, LONG), "EPERM");
                let chain = one.chain(hook).unwrap();
                let owners: Vec<_> = chain.iter().map(|c| (c.owner.clone(), c.program)).collect();
                let foreign = Owner::Foreign(Some("test".into()));
                assert_eq!(owners, [(Owner::Ours("ours".into()), first.info().id), (foreign, second.info().id)]);
                assert!(one.detach(hook).unwrap() && two.detach(hook).unwrap());
            }
        }
        assert_eq!(servers.asked(&below, "tcp", a, LONG), "a");
    });
}

/// A program above that suffers others below it only in its own stead stays in force: ours is refused.
#[test]
fn a_program_above_is_not_switched_off() {
    if !ready() {
        return;
    }
    let pins = TestPins::new();
    let a = CgroupAttacher::new(pins.clone());
    let servers = Servers::new();
    let above = TestCgroup::new();
    let nested = |path: PathBuf| {
        std::fs::create_dir(&path).unwrap();
        TestCgroup { cgroup: Cgroup::open(&path).unwrap(), path }
    };
    let between = nested(above.path.join("between"));
    let below = nested(between.path.join("below"));
    let point = ProgramKind::Connect4;
    let (theirs, ours) = (constant(point, 0), constant(point, 1));
    let address = servers.address(true, b'a');
    let legacy = |verb: &str, flags: &str| {
        let id = theirs.info().id;
        let path = above.path.display();
        let command = format!("bpftool cgroup {verb} {path} cgroup_inet4_connect id {id} {flags}");
        let done = Command::new("sh").args(["-c", &command]).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    servers.while_serving(|| {
        legacy("attach", "override");
        for cgroup in [&below, &between, &above] {
            let refused = a.attach(cgroup.hook(point), &ours, "ours").unwrap_err();
            assert!(matches!(refused, CgroupError::Occupied { .. }), "{refused}");
            assert_eq!(servers.asked(&below, "tcp", address, LONG), "EPERM");
        }
        assert_eq!(pins.list().unwrap(), [""; 0]);
        // The twin: another below, and it is no longer asked.
        let path = below.path.display();
        let command = format!("bpftool cgroup attach {path} cgroup_inet4_connect id {} multi", ours.info().id);
        assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success());
        assert_eq!(servers.asked(&below, "tcp", address, LONG), "a");
        // There is nothing to switch off any more.
        a.attach(below.hook(point), &constant(point, 1), "ours").unwrap();
        assert!(a.detach(below.hook(point)).unwrap());
        legacy("detach", "");
        legacy("attach", "multi");
        a.attach(between.hook(point), &ours, "ours").unwrap();
        assert_eq!(servers.asked(&below, "tcp", address, LONG), "EPERM", "it goes with others");
        assert!(a.detach(between.hook(point)).unwrap());
    });
    // From the lowest, for a cgroup with others in it stays.
    drop((below, between));
}

/// The point goes by the socket's family, and not by the address.
#[test]
fn a_mapped_address_is_asked_for_as_ipv6() {
    if !ready() {
        return;
    }
    let pins = TestPins::new();
    let a = CgroupAttacher::new(pins.clone());
    let servers = Servers::new();
    let inside = TestCgroup::new();
    servers.while_serving(|| {
        let SocketAddr::V4(v4) = servers.address(true, b'a') else { panic!("an IPv4 address") };
        let mapped = SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port()));
        for (point, told) in [(ProgramKind::Connect4, "a"), (ProgramKind::Connect6, "EPERM")] {
            a.attach(inside.hook(point), &judge(point, v4.port(), &Act::Deny), "pod").unwrap();
            assert_eq!(servers.asked(&inside, "tcp", mapped, LONG), told, "{point:?}");
            assert!(a.detach(inside.hook(point)).unwrap());
        }
    });
}

#[test]
fn a_cgroup_is_left_as_it_was() {
    if !ready() {
        return;
    }
    let pins = TestPins::new();
    let a = CgroupAttacher::new(pins.clone());
    let (cgroup, other) = (TestCgroup::new(), TestCgroup::new());
    for point in POINTS {
        let hook = cgroup.hook(point);
        let (one, two) = (constant(point, 1), constant(point, 0));
        assert_eq!(a.chain(hook).unwrap(), []);
        assert!(!a.detach(hook).unwrap());
        assert!(matches!(a.replace(hook, &one, "x"), Err(CgroupError::NotAttached { .. })));
        assert_eq!(a.attach(hook, &one, "first").unwrap(), None);
        let first = a.attached(hook).unwrap().unwrap();
        assert_eq!((first.owner.clone(), first.program), (Owner::Ours("first".into()), one.info().id));
        assert_eq!(first.tag, Some(one.info().tag));
        assert_eq!(a.attach(hook, &one, "first").unwrap(), Some(first.clone()));
        assert_eq!(a.attach(hook, &two, "second").unwrap(), Some(first));
        let second = a.attached(hook).unwrap().unwrap();
        assert_eq!(a.chain(hook).unwrap(), std::slice::from_ref(&second));
        assert_eq!(a.chain(other.hook(point)).unwrap(), []);
        assert_eq!(a.attached(other.hook(point)).unwrap(), None);
        // Another process with the pins finds it, one with others does not.
        assert_eq!(CgroupAttacher::new(Pins::at(pins.directory())).attached(hook).unwrap(), Some(second));
        let strangers = TestPins::new();
        assert_eq!(CgroupAttacher::new(strangers.clone()).attached(hook).unwrap(), None);
        assert!(a.detach(hook).unwrap());
        assert!(!a.detach(hook).unwrap());
        assert_eq!(a.chain(hook).unwrap(), []);
    }
    for point in POINTS {
        a.attach(cgroup.hook(point), &constant(point, 1), "pod").unwrap();
    }
    a.attach(other.hook(POINTS[0]), &constant(POINTS[0], 1), "other").unwrap();
    assert_eq!(a.release("pod").unwrap(), POINTS.len());
    assert_eq!(a.release("pod").unwrap(), 0);
    // The links go with the cgroup, and their pins are told of.
    let id = other.cgroup.id();
    assert_eq!(a.links().unwrap().iter().map(|l| l.cgroup).collect::<Vec<_>>(), [Some(id)]);
    assert_eq!(a.remove_vanished().unwrap(), []);
    drop(other);
    let begun = Instant::now();
    let vanished = loop {
        let vanished = a.remove_vanished().unwrap();
        if !vanished.is_empty() || begun.elapsed() > LONG {
            break vanished;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(matches!(&vanished[..], [l] if l.label == "other" && l.cgroup.is_none()), "{vanished:?}");
    assert_eq!(pins.list().unwrap(), [""; 0]);
}

#[test]
fn unfit_requests_are_told_apart() {
    if !ready() {
        return;
    }
    let pins = TestPins::new();
    let a = CgroupAttacher::new(pins.clone());
    let cgroup = TestCgroup::new();
    let hook = cgroup.hook(ProgramKind::Connect4);
    let program = constant(ProgramKind::Connect4, 1);
    let refused = a.attach(hook, &deny(), "x").unwrap_err();
    assert!(matches!(refused, CgroupError::WrongProgram { kind: 3, .. }), "{refused}");
    // Of the right type, for another point.
    let refused = a.attach(hook, &constant(ProgramKind::Connect6, 1), "x").unwrap_err();
    assert!(matches!(refused, CgroupError::WrongProgram { kind: 18, .. }), "{refused}");
    // Also where it would replace ours: the kernel compares the types alone.
    a.attach(hook, &program, "x").unwrap();
    for other in [ProgramKind::Connect6, ProgramKind::SendMsg4, ProgramKind::SendMsg6] {
        for attach in [true, false] {
            let wrong = constant(other, 1);
            let outcome =
                if attach { a.attach(hook, &wrong, "y").map(drop) } else { a.replace(hook, &wrong, "y").map(drop) };
            assert!(matches!(outcome, Err(CgroupError::WrongProgram { kind: 18, .. })), "{other:?}: {outcome:?}");
            let stands = a.attached(hook).unwrap().unwrap();
            assert_eq!((stands.owner, stands.program), (Owner::Ours("x".into()), program.info().id), "{other:?}");
        }
    }
    assert!(a.detach(hook).unwrap());
    let refused = a.attach(cgroup.hook(ProgramKind::Classifier), &deny(), "x").unwrap_err();
    assert!(matches!(refused, CgroupError::WrongProgram { point: ProgramKind::Classifier, .. }), "{refused}");
    for label in ["a b", "a/b", "ä", &"x".repeat(161)] {
        assert!(matches!(a.attach(hook, &program, label), Err(CgroupError::BadLabel { .. })), "{label}");
    }
    let longest = "x".repeat(160);
    a.attach(cgroup.hook(ProgramKind::Connect4), &program, &longest).unwrap();
    assert_eq!(a.attached(hook).unwrap().unwrap().owner, Owner::Ours(longest));
    assert!(a.detach(hook).unwrap());
    assert!(matches!(Cgroup::open("/proc"), Err(CgroupError::NotACgroup(_))));
    assert!(matches!(Cgroup::open(cgroup.path.join("cgroup.procs")), Err(CgroupError::NotACgroup(_))));
    let missing = Cgroup::open(cgroup.path.join("missing")).unwrap_err();
    assert_eq!(missing.raw_os_error(), Some(libc::ENOENT), "{missing}");
    // Pins that are nowhere.
    let nowhere = CgroupAttacher::new(Pins::at(pins.directory().with_file_name("missing")));
    assert!(!nowhere.detach(hook).unwrap());
    assert_eq!(nowhere.links().unwrap(), []);
    assert!(matches!(nowhere.replace(hook, &program, "x"), Err(CgroupError::NotAttached { .. })));
    assert_eq!(nowhere.attach(hook, &program, "x").unwrap_err().raw_os_error(), Some(libc::ENOENT));
    assert_eq!(a.chain(hook).unwrap(), []);
}

fn carry_out(a: &CgroupAttacher, hook: CgroupHook<'_>, program: &Program, operation: &str) -> Result<(), CgroupError> {
    match operation {
        "attach" => a.attach(hook, program, "new").map(drop),
        "replace" => a.replace(hook, program, "new").map(drop),
        _ => a.detach(hook).map(drop),
    }
}

/// Every system call fails once: the hook is as before, and repeating the operation does it.
#[test]
fn survives_faults() {
    if !ready() {
        return;
    }
    let pins = TestPins::new();
    let a = CgroupAttacher::new(pins.clone());
    let cgroup = TestCgroup::new();
    let point = ProgramKind::Connect6;
    let hook = cgroup.hook(point);
    let (old, new) = (constant(point, 1), constant(point, 0));
    let stands = || a.attached(hook).unwrap().map(|a| (a.owner, a.program));
    for (operation, first) in [("attach", false), ("attach", true), ("replace", true), ("detach", true)] {
        for call in 1.. {
            assert!(call < 100, "{operation} does not come to its end");
            if first {
                a.attach(hook, &old, "old").unwrap();
            }
            let before = stands();
            let fault = Injection { call, fault: Fault::Fail };
            let (outcome, calls) = with_fault(fault, || carry_out(&a, hook, &new, operation));
            if call > calls {
                outcome.unwrap();
                assert!(calls >= 4, "{operation}: {calls} calls");
            } else {
                outcome.unwrap_err();
                // A link whose pin is gone is no longer ours, and ends with its last descriptor.
                let after = stands();
                assert!(after == before || operation == "detach" && after.is_none(), "{operation}, call {call}");
                carry_out(&a, hook, &new, operation).unwrap();
            }
            let done = (operation != "detach").then(|| (Owner::Ours("new".into()), new.info().id));
            assert_eq!(stands(), done, "{operation}, call {call}");
            a.detach(hook).unwrap();
            is_left_empty(&a, hook, &format!("{operation}, call {call}"));
            if call > calls {
                break;
            }
        }
    }
    assert_eq!(pins.list().unwrap(), [""; 0]);
}

/// A link that nothing holds any more is freed after an RCU grace period.
fn is_left_empty(a: &CgroupAttacher, hook: CgroupHook<'_>, told: &str) {
    let begun = Instant::now();
    while !a.chain(hook).unwrap().is_empty() {
        assert!(begun.elapsed() < LONG, "{told}: {:?}", a.chain(hook).unwrap());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "the child of another test"]
fn dies() {
    let (Ok(cgroup), Ok(kill), Some(place)) = (std::env::var(CGROUP), std::env::var(KILL), std::env::var_os(PLACE))
    else {
        return;
    };
    let cgroup = Cgroup::open(cgroup).unwrap();
    let hook = CgroupHook { cgroup: &cgroup, point: ProgramKind::Connect4 };
    let a = CgroupAttacher::new(Pins::at(place));
    let program = constant(ProgramKind::Connect4, 0);
    let (operation, fault) = kill.split_once(' ').unwrap();
    let done = with_fault(Injection::parse(fault).unwrap(), || carry_out(&a, hook, &program, operation));
    done.0.unwrap();
}

/// A process is killed before and after every system call: what was there stands, or what was to come does, and whoever
/// comes next finishes it.
#[test]
fn survives_kills() {
    use std::os::unix::process::ExitStatusExt;
    if !ready() {
        return;
    }
    let pins = TestPins::new();
    let a = CgroupAttacher::new(pins.clone());
    let cgroup = TestCgroup::new();
    let point = ProgramKind::Connect4;
    let hook = cgroup.hook(point);
    let old = constant(point, 1);
    let new_tag = Some(constant(point, 0).info().tag);
    let mut kills = 0;
    for operation in ["attach", "replace", "detach"] {
        'calls: for call in 1.. {
            assert!(call < 100, "{operation} does not come to its end");
            for fault in ["abort", "abort-after"] {
                if operation != "attach" {
                    a.attach(hook, &old, "old").unwrap();
                }
                let before = a.attached(hook).unwrap();
                let mut child = child("dies");
                child.env(CGROUP, &cgroup.path).env(PLACE, pins.directory());
                let ended = child.env(KILL, format!("{operation} {fault}:{call}")).output().unwrap();
                let after = a.attached(hook).unwrap();
                let told = format!("{operation}, {fault} at call {call}: {before:?}, {after:?}, {}", ended.status);
                let killed = ended.status.signal() == Some(libc::SIGABRT);
                assert!(killed || ended.status.success(), "{told}: {}", String::from_utf8_lossy(&ended.stderr));
                let done = match &after {
                    None => operation == "detach",
                    Some(after) => operation != "detach" && after.tag == new_tag,
                };
                assert!(done || after == before, "{told}");
                if after.is_none() {
                    is_left_empty(&a, hook, &told);
                }
                kills += usize::from(killed);
                if killed {
                    carry_out(&a, hook, &constant(point, 0), operation).unwrap();
                    assert_eq!(a.attached(hook).unwrap().is_some(), operation != "detach", "{told}");
                }
                a.detach(hook).unwrap();
                is_left_empty(&a, hook, &told);
                if !killed {
                    assert!(done && call > 2, "{told}");
                    break 'calls;
                }
            }
        }
    }
    println!("killed {kills} times");
    assert!(kills >= 20, "{kills}");
    assert_eq!(pins.list().unwrap(), [""; 0]);
}
