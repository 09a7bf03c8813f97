//! What every driver must do, on a real kernel. Run [`conforms`], and with the feature `fault-injection` [`survives_faults`]
//! and [`survives_kills`], in tests of a driver; they panic at the first fault.
//!
//! ```no_run
//! # #[cfg(feature = "fault-injection")] {
//! use dcenet_core::link::conformance::{self, Reach, Subject};
//!
//! let veth = Subject {
//!     prepare: |host| drop(host.root().sh("ip addr add 10.20.0.1/32 dev lo; ip addr add fd20::1/128 dev lo")),
//!     link: |_| serde_json::json!({ "kind": "veth", "mtu": 1400 }),
//!     pods: Reach::Both,
//!     host: Reach::Both,
//!     own_mac: false,
//!     drift: &[],
//! };
//! conformance::conforms(&veth);
//! conformance::survives_faults(&veth);
//! # }
//! ```

#![expect(clippy::unwrap_used, reason = "a suite of tests fails by panicking")]

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{LinkConfig, Policy};
use crate::engine::{AttachError, AttachRequest, Drift, Engine};
use crate::model::{AttachmentKey, MacAddr};
use crate::provider::{Lease, LeasedAddress, LeasedRoute};
use crate::test_support::{HostState, TestHost, TestNetNs, effort, ping};

/// A driver, and what it promises.
#[derive(Debug, Clone, Copy)]
pub struct Subject {
    /// Makes of a host with nothing on it one on which the driver works. Pods have the addresses 10.20.0.N/24 and
    /// fd20::N/64, and the routers 10.20.0.1 and fd20::1, which are the host's where it can be reached.
    pub prepare: fn(&TestHost),
    /// The section `link` for the N-th pod, from 2 on, with an MTU of 1400 bytes.
    pub link: fn(u16) -> Value,
    /// Whether two pods reach each other.
    pub pods: Reach,
    /// Whether pod and host reach each other.
    pub host: Reach,
    /// Whether the pod's device keeps an Ethernet address of its own, whatever is asked for.
    pub own_mac: bool,
    /// What somebody may change on the host, and what a check must say of it: a command, in which END stands for the
    /// host's end of the first pod, and words.
    pub drift: &'static [(&'static str, &'static str)],
}

/// Which families reach a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Both.
    Both,
    /// None: what is sent there does not arrive.
    None,
    /// The driver promises nothing.
    Unknown,
}

/// Attaches, checks, changes and detaches.
///
/// # Panics
/// At the first breach.
pub fn conforms(subject: &Subject) {
    let scene = Scene::new(subject);
    two_pods_come_and_go(&scene);
    every_drift_is_seen(&scene);
    detaches_without_namespace(&scene);
    a_foreign_interface_is_left_alone(&scene);
    a_repeated_attach_with_a_difference_is_refused(&scene);
}

struct Scene<'a> {
    subject: &'a Subject,
    host: TestHost,
    engine: Engine,
    /// What the host was before any attach.
    before: HostState,
}

impl<'a> Scene<'a> {
    fn new(subject: &'a Subject) -> Self {
        let host = TestHost::new();
        host.root().sysctl("ipv6/conf/all/forwarding", "1");
        (subject.prepare)(&host);
        let engine = host.engine(None);
        let before = host.state();
        Self { subject, host, engine, before }
    }

    fn link(&self, n: u16) -> LinkConfig {
        LinkConfig::read(&(self.subject.link)(n)).unwrap()
    }

    fn request<'p>(&self, n: u16, pod: &'p TestNetNs) -> AttachRequest<'p> {
        AttachRequest {
            mac: Some(asked_mac(n)),
            policy: Policy::None,
            fingerprint: "1".into(),
            ..AttachRequest::new(key(n), pod.pod(), self.link(n), lease(n))
        }
    }

    fn check(&self, n: u16, pod: &TestNetNs) -> Vec<Drift> {
        self.engine.check(&key(n), pod.netns()).unwrap()
    }

    /// The host, without what attachments share, is as before. Where a namespace has just ended, after a while.
    fn host_is_as_before(&self, doing: &str) {
        for shared in self.link(2).driver().shared() {
            self.engine.remove_idle(&shared).unwrap();
        }
        let deadline = Instant::now() + LIMIT;
        while self.before != self.host.state() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(self.before.diff(&self.host.state()), "", "{doing}");
        assert_eq!(self.host.records(), [""; 0], "{doing}");
    }
}

fn two_pods_come_and_go(scene: &Scene<'_>) {
    let (subject, engine) = (scene.subject, &scene.engine);
    let (a, b) = (scene.host.new_pod(), scene.host.new_pod());
    let empty = HostState::capture(a.netns());
    let first = engine.attach(&scene.request(2, &a)).unwrap();
    assert!(!first.repeated);
    engine.attach(&scene.request(3, &b)).unwrap();
    assert_eq!((scene.check(2, &a), scene.check(3, &b)), (Vec::new(), Vec::new()));
    let again = engine.attach(&scene.request(2, &a)).unwrap();
    assert!(again.repeated);
    assert_eq!(again.interfaces, first.interfaces);

    // What is said is what is there.
    let device = a.link("eth0").unwrap();
    let said = &first.interfaces[first.pod_interface];
    assert_eq!((said.name.as_str(), said.sandbox.as_deref()), ("eth0", Some(a.path())));
    assert_eq!(device.mac, Some(said.mac));
    assert_eq!(said.mac == asked_mac(2), !subject.own_mac, "{}", said.mac);
    assert_eq!(device.mtu, 1400);
    assert!(device.is_up());
    // No address waits for duplicate detection, and none came by itself.
    assert_eq!(a.sh("ip -6 addr show dev eth0 tentative"), "");
    let addresses = a.sh("ip -o addr show dev eth0 scope global");
    assert_eq!(addresses.lines().count(), 2, "{addresses}");

    let reaches = |from: &TestNetNs, to: [&str; 2], reach: Reach| {
        for address in to {
            let limit = if reach == Reach::None { Duration::from_millis(500) } else { LIMIT };
            match (reach, ping(from, address.parse().unwrap(), limit)) {
                (Reach::Both, Err(error)) => panic!("cannot reach {address}: {error}"),
                (Reach::None, Ok(())) => panic!("{address} is reached, and should not be"),
                _ => {}
            }
        }
    };
    if subject.pods != Reach::Unknown {
        reaches(&a, ["10.20.0.3", "fd20::3"], subject.pods);
        reaches(&b, ["10.20.0.2", "fd20::2"], subject.pods);
    }
    if subject.host != Reach::Unknown {
        reaches(&a, HOST, subject.host);
        reaches(scene.host.root(), ["10.20.0.3", "fd20::3"], subject.host);
    }

    engine.detach(&key(2), Some(a.netns())).unwrap();
    engine.detach(&key(2), Some(a.netns())).unwrap();
    assert_eq!(empty.diff(&HostState::capture(a.netns())), "");
    // The other one still stands.
    assert_eq!(scene.check(3, &b), []);
    if subject.host == Reach::Both {
        reaches(&b, HOST, subject.host);
    }
    engine.detach(&key(3), None).unwrap();
    engine.detach(&key(3), None).unwrap();
    assert_eq!(empty.diff(&HostState::capture(b.netns())), "");
    scene.host_is_as_before("two pods");
}

fn every_drift_is_seen(scene: &Scene<'_>) {
    let pod = scene.host.new_pod();
    assert_eq!(scene.check(2, &pod), [Drift::NotAttached]);
    let end = key(2).id().host_ifname();
    let in_pod = [
        ("ip -4 address flush dev eth0", "address 10.20.0.2"),
        ("ip -6 address flush dev eth0 scope global", "address fd20::2"),
        ("ip -4 route del default", "route 0.0.0.0/0"),
        ("ip -6 route del default", "route ::/0"),
        ("ip link set eth0 mtu 1300", "MTU"),
        ("ip link set eth0 down", "is down"),
        ("ip link set eth0 alias mine", "mark is gone"),
        ("ip link set eth0 down; ip link set eth0 name eth9", "link eth0 is missing"),
    ];
    let on_host = scene.subject.drift.iter().map(|(command, words)| (scene.host.root(), *command, *words));
    let in_pod = in_pod.iter().map(|(command, words)| (&pod, *command, *words)).step_by(effort(2, 1, 1));
    for (place, command, words) in in_pod.chain(on_host) {
        scene.engine.attach(&scene.request(2, &pod)).unwrap();
        assert_eq!(scene.check(2, &pod), []);
        // Additions of others are no drift.
        pod.sh("ip address add 192.0.2.1/32 dev lo");
        assert_eq!(scene.check(2, &pod), []);
        pod.sh("ip address del 192.0.2.1/32 dev lo");
        let other = scene.host.new_pod();
        assert_eq!(scene.check(2, &other), [Drift::OtherNamespace]);
        place.sh(&command.replace("END", end.as_str()));
        let drift = scene.check(2, &pod);
        assert!(drift.iter().any(|d| d.to_string().contains(words)), "{command}: {drift:?}");
        // Somebody who gave it another name, or took our mark, made it his; he gives it back.
        pod.sh("if ip link show eth9 2>/dev/null; then ip link set eth9 name eth0; fi");
        if command.ends_with("alias mine") && place.path() == pod.path() {
            let alias = match scene.link(2) {
                LinkConfig::HostDevice(config) => crate::plan::lent_mark(&key(2), &config.device),
                _ => crate::plan::mark(&key(2)),
            };
            pod.sh(&format!("ip link set eth0 alias {alias}"));
        }
        scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
        scene.host_is_as_before(command);
    }
}

fn detaches_without_namespace(scene: &Scene<'_>) {
    // The caller does not know the namespace any more, which is there.
    let pod = scene.host.new_pod();
    let empty = HostState::capture(pod.netns());
    scene.engine.attach(&scene.request(2, &pod)).unwrap();
    scene.engine.detach(&key(2), None).unwrap();
    assert_eq!(empty.diff(&HostState::capture(pod.netns())), "");
    scene.host_is_as_before("no namespace given");

    // It names another pod's, which has its path by now.
    let other = scene.host.new_pod();
    scene.engine.attach(&scene.request(3, &other)).unwrap();
    let theirs = HostState::capture(other.netns());
    scene.engine.attach(&scene.request(2, &pod)).unwrap();
    scene.engine.detach(&key(2), Some(other.netns())).unwrap();
    assert_eq!(theirs.diff(&HostState::capture(other.netns())), "");
    assert_eq!(empty.diff(&HostState::capture(pod.netns())), "");
    assert_eq!(scene.check(3, &other), []);
    scene.engine.detach(&key(3), Some(other.netns())).unwrap();
    scene.host_is_as_before("another namespace");

    // The device is gone.
    if !matches!(scene.link(2), LinkConfig::HostDevice(_)) {
        scene.engine.attach(&scene.request(2, &pod)).unwrap();
        pod.sh("ip link del eth0");
        scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
        scene.host_is_as_before("device gone");

        // And so it is attached anew.
        scene.engine.attach(&scene.request(2, &pod)).unwrap();
        pod.sh("ip link del eth0");
        assert!(!scene.engine.attach(&scene.request(2, &pod)).unwrap().repeated);
        assert_eq!(scene.check(2, &pod), []);
        scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
        scene.host_is_as_before("device made again");

        // The namespace is gone, and took a virtual device with it.
        scene.engine.attach(&scene.request(2, &pod)).unwrap();
        drop(pod);
        scene.engine.detach(&key(2), None).unwrap();
        scene.engine.detach(&key(2), None).unwrap();
        scene.host_is_as_before("namespace gone");

        // The kernel ends namespaces in its own time; until then an Ethernet address may be in use, which passes.
        let (pod, deadline) = (scene.host.new_pod(), Instant::now() + LIMIT);
        while let Err(error) = scene.engine.attach(&scene.request(2, &pod)) {
            assert!(error.is_retryable() && Instant::now() < deadline, "{error}");
            std::thread::sleep(Duration::from_millis(20));
        }
        scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
        scene.host_is_as_before("namespace gone, and another in its place");
    }
}

fn a_foreign_interface_is_left_alone(scene: &Scene<'_>) {
    let pod = scene.host.new_pod();
    pod.sh("ip link add eth0 type veth peer name other");
    let theirs = HostState::capture(pod.netns());
    let error = scene.engine.attach(&scene.request(2, &pod)).unwrap_err();
    assert!(matches!(error, AttachError::InterfaceExists { .. }), "{error}");
    assert!(error.to_string().contains("has an interface eth0 already"), "{error}");
    assert!(!error.is_retryable());
    assert_eq!(theirs.diff(&HostState::capture(pod.netns())), "");
    scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
    assert_eq!(theirs.diff(&HostState::capture(pod.netns())), "");
    scene.host_is_as_before("foreign interface");
}

fn a_repeated_attach_with_a_difference_is_refused(scene: &Scene<'_>) {
    let (pod, other) = (scene.host.new_pod(), scene.host.new_pod());
    let empty = HostState::capture(other.netns());
    scene.engine.attach(&scene.request(2, &pod)).unwrap();
    let changed = AttachRequest { fingerprint: "2".into(), ..scene.request(2, &pod) };
    for request in [changed, scene.request(2, &other)] {
        let error = scene.engine.attach(&request).unwrap_err();
        assert!(matches!(error, AttachError::AlreadyAttached { .. }), "{error}");
    }
    assert_eq!(scene.check(2, &pod), []);
    assert_eq!(empty.diff(&HostState::capture(other.netns())), "");
    scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
    scene.host_is_as_before("repeated with a difference");
}

fn key(n: u16) -> AttachmentKey {
    AttachmentKey {
        network: "shop".parse().unwrap(),
        container: format!("c{n}").parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    }
}

fn asked_mac(n: u16) -> MacAddr {
    let [high, low] = n.to_be_bytes();
    MacAddr::new([2, 0, 0, 0xa5, high, low])
}

fn lease(n: u16) -> Lease {
    let address = |address: String, gateway: &str| LeasedAddress {
        gateway: Some(gateway.parse().unwrap()),
        ..LeasedAddress::new(address.parse().unwrap(), "pods", n.into())
    };
    let route = |to: &str| LeasedRoute { destination: to.parse().unwrap(), gateway: None };
    Lease {
        addresses: vec![address(format!("10.20.0.{n}/24"), HOST[0]), address(format!("fd20::{n:x}/64"), HOST[1])],
        routes: vec![route("0.0.0.0/0"), route("::/0")],
        dns: Default::default(),
        mac: None,
    }
}

const HOST: [&str; 2] = ["10.20.0.1", "fd20::1"];
const LIMIT: Duration = Duration::from_secs(20);

#[cfg(feature = "fault-injection")]
pub use trouble::{child, survives_faults, survives_kills};

#[cfg(feature = "fault-injection")]
mod trouble {
    use std::os::unix::process::ExitStatusExt;
    use std::path::PathBuf;
    use std::process::{Command, Stdio};

    use serde_json::json;

    use super::{Scene, Subject, asked_mac, key, lease};
    use crate::engine::{AttachRequest, Engine, NamespaceEntry};
    use crate::link::LinkConfig;
    use crate::netns::{Host, NetNs, Pod};
    use crate::test_support::{Fault, HostState, Injection, effort, with_fault};

    /// Makes every netlink request, journal write and setting of an attach, and then of a detach, fail once, and once be
    /// made with its reply lost: all is as before, or the next detach makes it so. In guests it is some of them.
    ///
    /// # Panics
    /// At the first breach.
    pub fn survives_faults(subject: &Subject) {
        let scene = Scene::new(subject);
        let pod = scene.host.new_pod();
        let empty = HostState::capture(pod.netns());
        let is_clean = |doing: &str| {
            assert_eq!(empty.diff(&HostState::capture(pod.netns())), "", "{doing}");
            if !scene.host.records().is_empty() {
                // A record whose removal failed holds nothing that the next detach would not clear.
                scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
            }
            scene.host_is_as_before(doing);
        };
        each_call("attach", effort(5, 1, 1), |injection| {
            let (result, calls) = with_fault(injection, || scene.engine.attach(&scene.request(2, &pod)));
            let ok = result.is_ok();
            if ok {
                assert_eq!(scene.check(2, &pod), []);
                scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
            }
            is_clean(&format!("attach, {injection:?}: {result:?}"));
            (ok, calls)
        });
        each_call("detach", effort(2, 1, 1), |injection| {
            scene.engine.attach(&scene.request(2, &pod)).unwrap();
            let (result, calls) = with_fault(injection, || scene.engine.detach(&key(2), Some(pod.netns())));
            if result.is_err() {
                scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
            }
            is_clean(&format!("detach, {injection:?}: {result:?}"));
            (result.is_ok(), calls)
        });
    }

    fn each_call(what: &str, stride: usize, mut run: impl FnMut(Injection) -> (bool, u64)) {
        for fault in [Fault::Fail, Fault::Lose] {
            let mut fatal = 0;
            for call in (1..).step_by(stride) {
                let (ok, calls) = run(Injection { call, fault });
                fatal += u64::from(!ok);
                if calls < call {
                    assert!(ok, "no fault was met");
                    assert!(fatal > 0, "no fault was fatal");
                    tell(&format!("{what}, {fault:?}: {calls} calls, {fatal} of them fatal"));
                    break;
                }
            }
        }
    }

    /// Kills a process at every call of an attach and of a detach, before and after it: a detach, a recovery or another
    /// attach puts it right. `test` is the name of a test of the same program that calls [`child`] and nothing else.
    /// In guests it is every fifth call.
    ///
    /// # Panics
    /// At the first breach.
    pub fn survives_kills(subject: &Subject, test: &str) {
        let scene = Scene::new(subject);
        let pod = scene.host.new_pod();
        let empty = HostState::capture(pod.netns());
        for fault in ["abort", "abort-after"] {
            // No multiple of the three ways out below.
            for call in (1..).step_by(effort(5, 1, 1)) {
                let doing = format!("{fault}:{call}");
                let order = |verb: &str| {
                    let mut command = Command::new(std::env::current_exe().unwrap());
                    let told = json!({
                        "verb": verb, "host": scene.host.root().path(), "run": scene.host.run_dir(),
                        "pod": pod.path(), "link": (subject.link)(2),
                    });
                    command.args(["--exact", test, "--quiet"]).env(ORDER, told.to_string()).env("DCENET_FAULT", &doing);
                    command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().signal().is_some()
                };
                let killed = order("attach");
                // Killed after its last write, it is attached.
                let records = scene.engine.attachments(&key(2).network).unwrap();
                let finished = records.iter().any(|r| r.done.is_some());
                // Three ways out, in turn: a detach, a recovery, and simply another attach.
                match call % 3 {
                    0 => scene.engine.detach(&key(2), Some(pod.netns())).unwrap(),
                    1 => assert!(scene.engine.recover().unwrap().errors.is_empty(), "{doing}"),
                    _ => {}
                }
                if call % 3 < 2 && !finished {
                    assert_eq!(empty.diff(&HostState::capture(pod.netns())), "", "{doing}");
                    assert_eq!(scene.before.diff(&scene.host.state()), "", "{doing}");
                    assert_eq!(scene.host.records(), [""; 0], "{doing}");
                }
                scene.engine.attach(&scene.request(2, &pod)).unwrap();
                assert_eq!(scene.check(2, &pod), [], "{doing}");
                let stopped = order("detach");
                scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
                assert_eq!(empty.diff(&HostState::capture(pod.netns())), "", "{doing}");
                scene.host_is_as_before(&doing);
                if !killed && !stopped {
                    assert!(call > 5, "nothing was killed");
                    tell(&format!("{fault}: {} calls", call - 1));
                    break;
                }
            }
        }
    }

    /// One attach or detach, as a process of its own, for [`survives_kills`]. Does nothing where nobody gave an order.
    ///
    /// # Panics
    /// Where it fails.
    pub fn child() {
        let Ok(order) = std::env::var(ORDER) else { return };
        let order: serde_json::Value = serde_json::from_str(&order).unwrap();
        let path = |name: &str| PathBuf::from(order[name].as_str().unwrap());
        let act = || {
            let host = Host(NetNs::of_this_thread().unwrap());
            let engine = Engine::new(host, &path("run"), None).unwrap().entering(NamespaceEntry::InPlace);
            let pod = path("pod");
            let netns = NetNs::open(&pod).unwrap();
            if order["verb"] == "detach" {
                return engine.detach(&key(2), Some(&netns)).unwrap();
            }
            let link = LinkConfig::read(&order["link"]).unwrap();
            let request = AttachRequest {
                mac: Some(asked_mac(2)),
                fingerprint: "1".into(),
                ..AttachRequest::new(key(2), Pod { netns: &netns, path: &pod }, link, lease(2))
            };
            engine.attach(&request).unwrap();
        };
        NetNs::open(path("host")).unwrap().run(act).unwrap();
    }

    #[expect(clippy::print_stdout, reason = "a test talks to the person who runs it")]
    fn tell(text: &str) {
        println!("{text}");
    }

    const ORDER: &str = "DCENET_CONFORMANCE_ORDER";
}
