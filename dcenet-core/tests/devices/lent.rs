//! Links of devices that a source hands out, which here are ends of veth pairs: what the engine does with them. Real functions
//! of an adapter are given by dcenet-sriov.

use std::sync::Arc;
use std::time::Duration;

use dcenet_core::engine::{AttachError, AttachRequest, Drift, Engine, TeardownError};
use dcenet_core::link::LinkConfig;
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{DeviceError, DeviceRequest, DeviceSource, DeviceWish, Dns, Lease, LeasedAddress};
use dcenet_core::test_support::{
    Fault, HostState, Injection, Rung, Shelf, TestHost, TestNetNs, effort, ping, require, with_fault,
};
use serde_json::{Value, json};

/// A host with devices to lend.
struct Scene {
    engine: Engine,
    shelf: Arc<Shelf>,
    host: TestHost,
    before: HostState,
}

impl Scene {
    fn new(count: usize) -> Self {
        let host = TestHost::new();
        let shelf = Arc::new(Shelf::new(&host, count));
        Self { engine: host.engine(None).lending_from(shelf.clone()), shelf, before: host.state(), host }
    }

    fn assert_as_before(&self, when: &str) {
        assert_eq!(self.before.diff(&self.host.state()), "", "{when}");
        assert_eq!(self.host.records(), [""; 0], "{when}");
    }
}

fn key(n: u16) -> AttachmentKey {
    AttachmentKey {
        network: "fast".parse().unwrap(),
        container: format!("c{n}").parse().unwrap(),
        ifname: "net1".parse().unwrap(),
    }
}

fn request(n: u16, pod: &TestNetNs) -> AttachRequest<'_> {
    request_by(n, pod, json!({ "kind": "sriov", "pool": Shelf::POOL, "mtu": 1400 }))
}

fn request_by(n: u16, pod: &TestNetNs, link: Value) -> AttachRequest<'_> {
    let address = |text: String| LeasedAddress::new(text.parse().unwrap(), "pods", n.into());
    let addresses = vec![address(format!("10.20.0.{n}/24")), address(format!("fd20::{n:x}/64"))];
    let lease = Lease { addresses, routes: Vec::new(), dns: Dns::default(), mac: None };
    AttachRequest::new(key(n), pod.pod(), LinkConfig::read(&link).unwrap(), lease)
}

#[test]
fn pods_get_devices_talk_over_them_and_give_them_back() {
    if !require(Rung::Netns) {
        return;
    }
    let scene = Scene::new(2);
    let pods: Vec<TestNetNs> = (0..3).map(|_| scene.host.new_pod()).collect();
    let empty = HostState::capture(pods[0].netns());
    let first = scene.engine.attach(&request(2, &pods[0])).unwrap();
    scene.engine.attach(&request(3, &pods[1])).unwrap();
    assert_eq!(scene.engine.check(&key(2), pods[0].netns()).unwrap(), []);
    let again = scene.engine.attach(&request(2, &pods[0])).unwrap();
    assert!(again.repeated && again.interfaces == first.interfaces);
    let device = pods[0].link("net1").unwrap();
    assert_eq!((device.mac, device.mtu), (Some(first.interfaces[0].mac), 1400));
    for there in ["10.20.0.3", "fd20::3"] {
        ping(&pods[0], there.parse().unwrap(), Duration::from_secs(20)).unwrap();
    }
    let error = scene.engine.attach(&request(4, &pods[2])).unwrap_err();
    assert!(matches!(error, AttachError::Device(DeviceError::Unavailable(_))) && error.is_retryable(), "{error}");
    scene.engine.detach(&key(4), Some(pods[2].netns())).unwrap();

    pods[0].sh("ip link set net1 down; ip link set net1 mtu 1300; ip link set net1 up");
    for _ in 0..2 {
        scene.engine.detach(&key(2), Some(pods[0].netns())).unwrap();
    }
    assert_eq!(empty.diff(&HostState::capture(pods[0].netns())), "");
    // Whoever has no path any more.
    scene.engine.detach(&key(3), None).unwrap();
    scene.assert_as_before("all are gone");
}

#[test]
fn what_cannot_be_lent_is_refused_and_changes_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let scene = Scene::new(1);
    let pod = scene.host.new_pod();
    for (link, words) in [
        (json!({ "kind": "sriov" }), "link.pool \"\": nothing says which function"),
        (json!({ "kind": "sriov", "pool": "fat" }), "link.pool: "),
        (json!({ "kind": "sriov", "device": "shelf7" }), "no device is to be had"),
        (json!({ "kind": "sriov", "pool": Shelf::POOL, "mtu": 1000 }), "link.mtu \"1000\": IPv6 needs"),
    ] {
        let error = scene.engine.attach(&request_by(2, &pod, link.clone())).unwrap_err();
        assert!(error.to_string().contains(words), "{link}: {error}");
        scene.assert_as_before(words);
    }
    // The name is taken in the pod: the device is given back.
    pod.sh("ip link add net1 type veth peer name other");
    let error = scene.engine.attach(&request(2, &pod)).unwrap_err();
    assert!(matches!(error, AttachError::InterfaceExists { .. }), "{error}");
    assert!(!scene.shelf.is_lent(&key(2)).unwrap());
    pod.sh("ip link del net1");
    scene.assert_as_before("a name was taken");

    // A program without a source neither attaches nor forgets.
    let without = scene.host.engine(None);
    let error = without.attach(&request(2, &pod)).unwrap_err();
    assert!(matches!(error, AttachError::NoDeviceSource { kind: "sriov" }), "{error}");
    scene.engine.attach(&request(2, &pod)).unwrap();
    let errors = without.detach(&key(2), Some(pod.netns())).unwrap_err();
    assert!(matches!(&errors.0[..], [TeardownError::NoDeviceSource { device }] if device == "shelf0"), "{errors}");
    scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
    scene.assert_as_before("given back");
}

/// As a process leaves it that dies before it has written anything into the journal. The twin has no source.
#[test]
fn a_device_that_was_lent_and_never_recorded_is_given_back_by_a_detach() {
    if !require(Rung::Netns) {
        return;
    }
    let scene = Scene::new(1);
    let pod = scene.host.new_pod();
    let wish = DeviceWish { mtu: Some(1400.try_into().unwrap()), ..DeviceWish::default() };
    let mac = "02:00:00:00:00:07".parse().unwrap();
    let lent = DeviceRequest { attachment: key(2), wish, mac, netns: pod.path().to_owned() };
    scene.shelf.lend(&lent).unwrap();
    scene.host.engine(None).detach(&key(2), None).unwrap();
    assert_ne!(scene.before.diff(&scene.host.state()), "");
    scene.engine.detach(&key(2), None).unwrap();
    scene.assert_as_before("detached");
}

/// The same, and the next attach is of another kind, whose record says nothing of the device. The twin has no source.
#[test]
fn a_device_that_was_lent_and_never_recorded_is_given_back_by_an_attach_of_another_kind() {
    if !require(Rung::Netns) {
        return;
    }
    let scene = Scene::new(1);
    let pod = scene.host.new_pod();
    let mac = "02:00:00:00:00:07".parse().unwrap();
    let wish = DeviceWish { mtu: Some(1400.try_into().unwrap()), ..DeviceWish::default() };
    scene.shelf.lend(&DeviceRequest { attachment: key(2), wish, mac, netns: pod.path().to_owned() }).unwrap();
    let veth = request_by(2, &pod, json!({ "kind": "veth" }));
    let without = scene.host.engine(None);
    without.attach(&veth).unwrap();
    without.detach(&key(2), Some(pod.netns())).unwrap();
    assert!(scene.shelf.is_lent(&key(2)).unwrap());
    scene.engine.attach(&veth).unwrap();
    assert!(!scene.shelf.is_lent(&key(2)).unwrap());
    scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
    scene.assert_as_before("detached");
}

/// As of another state directory. The twin is the source that lent it.
#[test]
fn a_source_that_never_lent_the_pods_device_does_not_say_that_all_is_well() {
    if !require(Rung::Netns) {
        return;
    }
    let scene = Scene::new(1);
    let pod = scene.host.new_pod();
    scene.engine.attach(&request(2, &pod)).unwrap();
    let other = scene.host.engine(None).lending_from(Arc::new(scene.shelf.stranger(&scene.host)));
    for netns in [Some(pod.netns()), None] {
        let errors = other.detach(&key(2), netns).unwrap_err();
        assert!(matches!(&errors.0[..], [TeardownError::StillLent { device, .. }] if device == "shelf0"), "{errors}");
        let drift = other.check(&key(2), pod.netns()).unwrap();
        assert!(matches!(&drift[..], [Drift::DeviceChanged { device, .. }] if device == "shelf0"), "{drift:?}");
    }
    assert_eq!(scene.engine.check(&key(2), pod.netns()).unwrap(), []);
    scene.engine.detach(&key(2), None).unwrap();
    scene.assert_as_before("detached");
}

/// Every request and journal write fails once, or its answer is lost. What a failed call could not take back itself, the
/// detach after it does.
#[test]
fn whatever_call_fails_the_device_comes_back() {
    if !require(Rung::Netns) {
        return;
    }
    let scene = Scene::new(1);
    let pod = scene.host.new_pod();
    let empty = HostState::capture(pod.netns());
    for fault in [Fault::Fail, Fault::Lose] {
        let mut fatal = 0;
        for call in (1..).step_by(effort(4, 1, 1)) {
            let attach = || scene.engine.attach(&request(2, &pod)).map(drop);
            let (outcome, calls) = with_fault(Injection { call, fault }, attach);
            fatal += u32::from(outcome.is_err());
            scene.engine.detach(&key(2), Some(pod.netns())).unwrap();
            scene.assert_as_before(&format!("{fault:?} at call {call}"));
            assert_eq!(empty.diff(&HostState::capture(pod.netns())), "", "{fault:?} at call {call}");
            assert!(!scene.shelf.is_lent(&key(2)).unwrap());
            if calls < call {
                assert!(outcome.is_ok() && fatal > effort(1, 5, 5), "{fatal} of {calls} calls");
                break;
            }
        }
    }
}
