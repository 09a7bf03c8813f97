//! What is added to devices that other plugins made, and made otherwise when their lists ask for something else.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dcenet_core::engine::{AttachError, AttachRequest, Engine, StepError};
use dcenet_core::link::{ChainedConfig, LinkConfig, Policy};
use dcenet_core::model::AttachmentKey;
use dcenet_core::nat::{Nat, PortMapping, Transport};
use dcenet_core::plan::End;
use dcenet_core::provider::{Endpoint, Lease, LeasedAddress, PolicyError, PolicySink};
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, require_with};

/// Tells what was asked of it, in order.
#[derive(Default)]
struct Sink {
    calls: Mutex<Vec<&'static str>>,
    lifts_nothing: AtomicBool,
    is_bare: AtomicBool,
}

impl Sink {
    fn note(&self, call: &'static str) -> Result<(), PolicyError> {
        self.calls.lock().unwrap().push(call);
        Ok(())
    }

    fn calls(&self) -> Vec<&'static str> {
        self.calls.lock().unwrap().clone()
    }
}

impl PolicySink for Sink {
    fn attach(&self, _: &Endpoint) -> Result<(), PolicyError> {
        self.is_bare.store(false, Ordering::Relaxed);
        self.note("attach")
    }

    fn await_enforced(&self, _: &Endpoint, _: Duration) -> Result<(), PolicyError> {
        Ok(())
    }

    fn missing(&self, _: &Endpoint) -> Result<Option<String>, PolicyError> {
        Ok(self.is_bare.load(Ordering::Relaxed).then(|| "no policy is on it".to_owned()))
    }

    fn ready(&self) -> Result<(), PolicyError> {
        Ok(())
    }

    fn detach(&self, _: &AttachmentKey) -> Result<(), PolicyError> {
        self.note("detach")
    }

    fn lift(&self, _: &Endpoint) -> Result<(), PolicyError> {
        match self.lifts_nothing.load(Ordering::Relaxed) {
            true => Err(PolicyError::Unsupported("a test".to_owned())),
            false => self.note("lift"),
        }
    }
}

/// A pod that another plugin has made a port of `br0`.
struct Pod {
    netns: TestNetNs,
    key: AttachmentKey,
    link: LinkConfig,
    lease: Lease,
}

fn pod(host: &TestHost, number: u8) -> Pod {
    let netns = host.new_pod();
    let (end, path) = (format!("h{number}"), netns.path().display().to_string());
    host.root().sh(&format!(
        "ip link add {end} type veth peer name eth0 netns {path}; ip link set {end} master br0; ip link set {end} up"
    ));
    let end_of = |netns: &TestNetNs, name: &str| End {
        name: name.parse().unwrap(),
        mac: netns.link(name).and_then(|link| link.mac).unwrap(),
    };
    let link = LinkConfig::Chained(ChainedConfig {
        host: Some(end_of(host.root(), &end)),
        pod: end_of(&netns, "eth0"),
        bridge: Some("br0".parse().unwrap()),
    });
    let address = LeasedAddress::new(format!("10.20.0.{number}/24").parse().unwrap(), "", 0);
    let lease = Lease { addresses: vec![address], routes: Vec::new(), dns: Default::default(), mac: None };
    let key = AttachmentKey {
        network: "shop".parse().unwrap(),
        container: format!("c{number}").parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    };
    Pod { netns, key, link, lease }
}

/// Returns whether it stood before.
fn attach(engine: &Engine, pod: &Pod, ports: (u16, u16), policy: Policy) -> Result<bool, AttachError> {
    let (host_port, container_port) = ports;
    let port = PortMapping { host_ip: None, host_port, container_port, protocol: Transport::Tcp };
    let request = AttachRequest {
        nat: Nat { masquerade: false, ports: vec![port] },
        policy,
        fingerprint: format!("{ports:?} {policy:?}"),
        ..AttachRequest::new(pod.key.clone(), pod.netns.pod(), pod.link.clone(), pod.lease.clone())
    };
    engine.attach(&request).map(|attached| attached.repeated)
}

fn is_held(attached: &Result<bool, AttachError>) -> bool {
    let Err(AttachError::Step { cause, rollback }) = attached else { return false };
    matches!(cause, StepError::PortHeld { .. }) && rollback.is_empty()
}

#[test]
fn who_asks_for_what_cannot_be_had_keeps_what_he_has() {
    let lacks_nft = || Command::new("nft").arg("--version").output().is_err().then(|| "nft is missing".to_owned());
    if !require_with(Rung::Netns, lacks_nft) {
        return;
    }
    let host = TestHost::new();
    host.root().sh("ip link add br0 type bridge; ip link set br0 up");
    let localnet = || host.root().sh("sysctl -n net.ipv4.conf.br0.route_localnet");
    assert_eq!(localnet(), "0\n");
    let sink = Arc::new(Sink::default());
    let under_policy = host.engine(Some(sink.clone()));
    let plain = host.engine(None).lifting_by(sink.clone());
    let (db, rival) = (pod(&host, 2), pod(&host, 3));
    let listed = || host.root().sh("nft list table inet dcenet");
    let has = |port: u16| listed().contains(&format!(". {port} :")) || listed().contains(&format!(" {port} . "));

    assert!(!attach(&plain, &rival, (8081, 80), Policy::None).unwrap());
    assert!(!attach(&under_policy, &db, (8080, 80), Policy::Wanted).unwrap());
    let before = listed();
    // Without policy, and with a port that another has.
    assert!(is_held(&attach(&plain, &db, (8081, 80), Policy::None)));
    assert_eq!((listed(), sink.calls()), (before, vec!["attach"]));
    assert!(attach(&under_policy, &db, (8080, 80), Policy::Wanted).unwrap());
    // The port can be had, and the policy not be lifted. That of before had another place to lead to.
    sink.lifts_nothing.store(true, Ordering::Relaxed);
    for ports in [(8082, 80), (8080, 81)] {
        attach(&plain, &db, ports, Policy::None).unwrap_err();
        assert!(!has(8082), "{}", listed());
        assert_eq!(under_policy.check(&db.key, db.netns.netns()).unwrap(), []);
        assert!(attach(&under_policy, &db, (8080, 80), Policy::Wanted).unwrap());
    }
    assert_eq!(sink.calls(), ["attach"]);
    // It was begun, and the process killed.
    sink.is_bare.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        assert!(attach(&under_policy, &db, (8080, 80), Policy::Wanted).unwrap());
        assert_eq!(sink.calls(), ["attach", "attach"]);
    }

    sink.lifts_nothing.store(false, Ordering::Relaxed);
    assert!(!attach(&plain, &db, (8082, 80), Policy::None).unwrap());
    assert_eq!(sink.calls(), ["attach", "attach", "lift"]);
    assert!(has(8082) && !has(8080), "{}", listed());
    assert_eq!(plain.check(&db.key, db.netns.netns()).unwrap(), []);
    // Without policy before, either.
    assert!(is_held(&attach(&plain, &db, (8081, 80), Policy::None)));
    assert_eq!(plain.check(&db.key, db.netns.netns()).unwrap(), []);
    assert!(attach(&plain, &db, (8082, 80), Policy::None).unwrap());
    // The same port with another place to lead to.
    assert!(!attach(&plain, &db, (8082, 81), Policy::None).unwrap());
    assert_eq!(plain.check(&db.key, db.netns.netns()).unwrap(), []);
    assert!(has(8082), "{}", listed());

    plain.detach(&rival.key, None).unwrap();
    assert_eq!(localnet(), "1\n", "the other needs it");
    plain.detach(&db.key, None).unwrap();
    assert_eq!((localnet(), host.records()), ("0\n".to_owned(), Vec::new()));
    assert!(!has(8081) && !has(8082), "{}", listed());
}
