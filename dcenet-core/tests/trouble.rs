//! What goes wrong on real hosts: names taken, namespaces gone, processes killed, many at once.

mod common;

use std::process::{Command, ExitStatus};

use common::{bridge, key, lease, request, veth};
use dcenet_core::engine::{AttachError, Drift, Engine, NamespaceEntry};
use dcenet_core::link::LinkConfig;
use dcenet_core::netns::{Host, NetNs, NetNsError, Pod};
use dcenet_core::test_support::{HostState, Rung, TestHost, ping, require};

#[test]
fn a_foreign_interface_is_named_and_left_alone() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    pod.sh("ip link add eth0 type veth peer name other");
    let (before, theirs) = (host.state(), HostState::capture(pod.netns()));
    for config in [bridge(), veth()] {
        let error = engine.attach(&request("c1", &pod, &config, lease(2))).unwrap_err();
        assert!(matches!(error, AttachError::InterfaceExists { .. }), "{error}");
        assert!(error.to_string().contains("has an interface eth0 already"), "{error}");
        assert!(!error.is_retryable());
        assert_eq!(theirs.diff(&HostState::capture(pod.netns())), "");
        assert_eq!(before.diff(&host.state()), "");
        assert!(host.records().is_empty());
    }
}

#[test]
fn a_foreign_link_with_the_host_ends_name_is_left_alone() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    host.root().sh(&format!("ip link add {} type veth peer name other", key("c1").id().host_ifname()));
    let before = host.state();
    let error = engine.attach(&request("c1", &pod, &bridge(), lease(2))).unwrap_err();
    assert!(matches!(error, AttachError::HostNameTaken { .. }), "{error}");
    engine.detach(&key("c1"), None).unwrap();
    assert_eq!(before.diff(&host.state()), "");
}

#[test]
fn a_bridge_name_that_is_no_bridge_is_refused() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    host.root().sh("ip link add dc0 type veth peer name other");
    let before = host.state();
    let pod = host.new_pod();
    let error = host.engine(None).attach(&request("c1", &pod, &bridge(), lease(2))).unwrap_err();
    assert!(error.to_string().contains("is a veth device and not a bridge"), "{error}");
    assert_eq!(before.diff(&host.state()), "");
    assert!(host.records().is_empty());
}

#[test]
fn the_hosts_own_namespace_and_things_that_are_none_are_refused() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let error = host.engine(None).attach(&request("c1", host.root(), &bridge(), lease(2))).unwrap_err();
    assert!(matches!(error, AttachError::HostNamespace { .. }), "{error}");

    let file = host.directory().join("plain");
    std::fs::write(&file, "").unwrap();
    assert!(matches!(NetNs::open(&file), Err(NetNsError::NotANamespace { .. })));
    assert!(matches!(NetNs::open("/proc/self/ns/mnt"), Err(NetNsError::NotANamespace { .. })));
    let absent = host.directory().join("absent");
    assert!(NetNs::open(&absent).unwrap_err().is_gone());
    assert!(!absent.exists());
}

#[test]
fn detach_needs_no_namespace() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let keeper = host.new_pod();
    engine.attach(&request("keeper", &keeper, &bridge(), lease(9))).unwrap();
    let before = host.state();
    for config in [bridge(), veth()] {
        // Another pod's namespace, offered as the hint.
        let pod = host.new_pod();
        engine.attach(&request("c1", &pod, &config, lease(2))).unwrap();
        let theirs = HostState::capture(keeper.netns());
        engine.detach(&key("c1"), Some(keeper.netns())).unwrap();
        assert_eq!(theirs.diff(&HostState::capture(keeper.netns())), "");
        assert_eq!(before.diff(&host.state()), "");

        // The namespace dies first, and takes the pair with it.
        engine.attach(&request("c1", &pod, &config, lease(2))).unwrap();
        drop(pod);
        engine.detach(&key("c1"), None).unwrap();
        for _ in 0..500 {
            if before == host.state() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(before.diff(&host.state()), "");
    }
}

#[test]
fn a_lost_record_is_made_up_for_by_the_mark() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let before = host.state();
    for tried_again in [false, true] {
        engine.attach(&request("c1", &pod, &veth(), lease(2))).unwrap();
        std::fs::remove_dir_all(host.run_dir()).unwrap();
        if tried_again {
            // The first attempt clears what is in the way.
            engine.attach(&request("c1", &pod, &veth(), lease(2))).unwrap_err();
            engine.attach(&request("c1", &pod, &veth(), lease(2))).unwrap();
        }
        engine.detach(&key("c1"), None).unwrap();
        assert_eq!(before.diff(&host.state()), "");
    }
}

#[test]
fn a_torn_record_is_made_up_for_by_the_mark() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let before = host.state();
    engine.attach(&request("c1", &pod, &veth(), lease(2))).unwrap();
    let path = host.run_dir().join("attachments").join(key("c1").id().to_string());
    std::fs::write(&path, "{\"intent\": {").unwrap();
    engine.detach(&key("c1"), None).unwrap();
    assert_eq!(before.diff(&host.state()), "");
    assert!(host.records().is_empty());

    engine.attach(&request("c1", &pod, &veth(), lease(2))).unwrap();
    std::fs::write(&path, "{\"intent\": 7}\n").unwrap();
    // It stands in nobody's way: neither of lists of other networks nor of the end of its own attachment.
    assert_eq!(engine.attachments(&"other".parse().unwrap()).unwrap(), []);
    engine.detach(&key("c1"), None).unwrap();
    assert_eq!(before.diff(&host.state()), "");
    assert!(!path.exists() && path.with_extension("unreadable").exists());
    engine.attach(&request("c1", &pod, &veth(), lease(2))).unwrap();
    engine.detach(&key("c1"), None).unwrap();
}

#[test]
fn a_repeated_attach_with_a_difference_is_refused() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let (pod, other) = (host.new_pod(), host.new_pod());
    engine.attach(&request("c1", &pod, &bridge(), lease(2))).unwrap();
    let state = host.state();
    let mut changed = request("c1", &pod, &bridge(), lease(2));
    changed.fingerprint = "2".into();
    let error = engine.attach(&changed).unwrap_err();
    assert!(matches!(error, AttachError::AlreadyAttached { difference: "another configuration", .. }), "{error}");
    let error = engine.attach(&request("c1", &other, &bridge(), lease(2))).unwrap_err();
    assert!(matches!(error, AttachError::AlreadyAttached { .. }), "{error}");
    assert_eq!(state.diff(&host.state()), "");
    // Once the device is gone, nothing stands in the way.
    pod.sh("ip link del eth0");
    engine.attach(&request("c1", &other, &bridge(), lease(2))).unwrap();
    engine.detach(&key("c1"), None).unwrap();
}

#[test]
fn every_kind_of_drift_is_seen() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let check = |pod: &dcenet_core::test_support::TestNetNs| engine.check(&key("c1"), pod.netns()).unwrap();
    for config in [bridge(), veth()] {
        let pod = host.new_pod();
        assert_eq!(check(&pod), [Drift::NotAttached]);
        let end = key("c1").id().host_ifname();
        for (place, command, expected) in [
            (&pod, "ip address del 10.20.0.2/24 dev eth0 || ip address del 10.20.0.2/32 dev eth0", "address 10.20.0.2"),
            (&pod, "ip -6 route del default", "route ::/0"),
            (&pod, "ip link set eth0 mtu 1300", "MTU"),
            (&pod, "ip link set eth0 down", "is down"),
            (&pod, "ip link set eth0 address 02:00:00:00:00:01", "Ethernet address"),
            (&pod, "ip link del eth0", "link eth0 is missing"),
            (host.root(), &format!("ip link set {end} down"), "is down"),
            (host.root(), &format!("ip link set {end} alias mine"), "mark is gone"),
        ] {
            let routed = matches!(config, LinkConfig::Veth(_));
            if routed && expected == "MTU" {
                continue;
            }
            engine.attach(&request("c1", &pod, &config, lease(2))).unwrap();
            assert_eq!(check(&pod), []);
            // Additions of others are no drift.
            pod.sh("ip address add 192.0.2.1/32 dev lo; ip address del 192.0.2.1/32 dev lo");
            place.sh(command);
            let drift = check(&pod);
            assert!(drift.iter().any(|d| d.to_string().contains(expected)), "{command}: {drift:?}");
            engine.detach(&key("c1"), None).unwrap();
        }
        engine.attach(&request("c1", &pod, &config, lease(2))).unwrap();
        assert_eq!(engine.check(&key("c1"), host.new_pod().netns()).unwrap(), [Drift::OtherNamespace]);
        engine.detach(&key("c1"), None).unwrap();
    }
}

#[test]
fn a_reused_address_is_reachable_at_once() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    for (round, container) in ["c1", "c2", "c3"].iter().enumerate() {
        let pod = host.new_pod();
        engine.attach(&request(container, &pod, &bridge(), lease(2))).unwrap();
        for address in ["10.20.0.2", "fd20::2"] {
            ping(host.root(), address.parse().unwrap(), std::time::Duration::from_secs(2))
                .unwrap_or_else(|e| panic!("round {round}: {address}: {e}"));
        }
        engine.detach(&key(container), None).unwrap();
    }
}

#[test]
fn twenty_at_once_share_a_new_bridge() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let before = host.state();
    let pods: Vec<_> = (0..20).map(|_| host.new_pod()).collect();
    let engine = host.engine(None);
    std::thread::scope(|scope| {
        for (n, pod) in (2..).zip(&pods) {
            let engine = &engine;
            scope.spawn(move || engine.attach(&request(&format!("c{n}"), pod, &bridge(), lease(n))).unwrap());
        }
    });
    let bridges = |h: &TestHost| h.state().lines().filter(|l| l.contains("master Some(\"dc0\")")).count();
    assert_eq!(bridges(&host), 20);
    let mac = host.root().link("dc0").unwrap().mac;
    std::thread::scope(|scope| {
        for n in 2..22 {
            let engine = &engine;
            scope.spawn(move || engine.detach(&key(&format!("c{n}")), None).unwrap());
        }
    });
    assert_eq!(host.root().link("dc0").unwrap().mac, mac);
    assert!(engine.remove_idle(&"dc0".parse().unwrap()).unwrap());
    assert_eq!(before.diff(&host.state()), "");
}

/// One attach or detach, as a process of its own: what the tests below execute. Told by the environment what to do.
#[test]
fn child() {
    let Ok(command) = std::env::var("DCENET_TEST_CHILD") else { return };
    let [verb, host, run, pod, container, n, kind]: [&str; 7] =
        command.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let host = NetNs::open(host).unwrap();
    host.run(|| {
        let host = Host(NetNs::of_this_thread().unwrap());
        let engine = Engine::new(host, run.as_ref(), None).unwrap().entering(NamespaceEntry::InPlace);
        let netns = NetNs::open(pod).unwrap();
        if verb == "detach" {
            return engine.detach(&key(container), Some(&netns)).unwrap();
        }
        let config = if kind == "bridge" { bridge() } else { veth() };
        let request = dcenet_core::engine::AttachRequest {
            key: key(container),
            pod: Pod { netns: &netns, path: pod.as_ref() },
            link: config,
            lease: lease(n.parse().unwrap()),
            mac: None,
            workload: None,
            labels: Default::default(),
            policy: dcenet_core::link::Policy::None,
            nat: Default::default(),
            fingerprint: "1".into(),
        };
        engine.attach(&request).unwrap();
    })
    .unwrap();
}

fn child_of(host: &TestHost, verb: &str, pod: &std::path::Path, n: u16, kind: &str, fault: Option<String>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let run = host.run_dir();
    let told = format!("{verb} {} {} {} c{n} {n} {kind}", host.root().path().display(), run.display(), pod.display());
    command.args(["--exact", "child", "--quiet"]).env("DCENET_TEST_CHILD", told);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    if let Some(fault) = fault {
        command.env("DCENET_FAULT", fault);
    }
    command
}

#[test]
fn twenty_processes_share_a_new_bridge() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let before = host.state();
    let pods: Vec<_> = (0..20).map(|_| host.new_pod()).collect();
    for verb in ["attach", "detach"] {
        let children: Vec<_> = (2..)
            .zip(&pods)
            .map(|(n, pod)| child_of(&host, verb, pod.path(), n, "bridge", None).spawn().unwrap())
            .collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        assert_eq!(host.records().len(), if verb == "attach" { 20 } else { 0 });
    }
    assert!(host.engine(None).remove_idle(&"dc0".parse().unwrap()).unwrap());
    assert_eq!(before.diff(&host.state()), "");
}

#[test]
fn a_kill_at_any_call_is_repaired() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let (before, empty) = (host.state(), HostState::capture(pod.netns()));
    let died = |status: ExitStatus| std::os::unix::process::ExitStatusExt::signal(&status).is_some();
    for kind in ["bridge", "veth"] {
        for fault in ["abort", "abort-after"] {
            for call in 1.. {
                let with = |verb| child_of(&host, verb, pod.path(), 2, kind, Some(format!("{fault}:{call}")));
                let killed = died(with("attach").status().unwrap());
                // Killed after its last write, it is attached.
                let records = engine.attachments(&key("c2").network).unwrap();
                let finished = records.iter().any(|r| r.done.is_some());
                // Three ways out, in turn: a detach, a recovery, and simply another attach.
                match call % 3 {
                    0 => engine.detach(&key("c2"), None).unwrap(),
                    1 => assert!(engine.recover().unwrap().errors.is_empty(), "{kind} {fault}:{call}"),
                    _ => {}
                }
                let config = if kind == "bridge" { bridge() } else { veth() };
                if call % 3 < 2 && !finished {
                    if let Some(record) = host.records().first() {
                        panic!("{kind} {fault}:{call}: record {record} is left");
                    }
                    assert_eq!(before.diff(&host.state()), "", "{kind} {fault}:{call}");
                    assert_eq!(empty.diff(&HostState::capture(pod.netns())), "", "{kind} {fault}:{call}");
                }
                engine.attach(&request("c2", &pod, &config, lease(2))).unwrap();
                assert_eq!(engine.check(&key("c2"), pod.netns()).unwrap(), [], "{kind} {fault}:{call}");
                let stopped = died(with("detach").status().unwrap());
                engine.detach(&key("c2"), None).unwrap();
                if kind == "bridge" {
                    engine.remove_idle(&"dc0".parse().unwrap()).unwrap();
                }
                assert_eq!(before.diff(&host.state()), "", "{kind} {fault}:{call}");
                assert!(host.records().is_empty());
                if !killed && !stopped {
                    println!("{kind}, {fault}: {} calls", call - 1);
                    break;
                }
            }
        }
    }
}
