use std::fs;
use std::time::Instant;

use dcenet_core::engine::AttachRequest;
use dcenet_core::link::LinkConfig;
use dcenet_core::netns::Host;
use dcenet_core::provider::LeaseRequest;
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, require};
use dcenet_ipam::config::IpamConfig;
use dcenet_ipam::store::Store;
use dcenet_ipam::store::flaky::{Failure, FlakyStore};
use dcenet_ipam::store::memory::MemoryStore;
use serde_json::json;

use super::*;

/// A host with a store and one pod.
struct Scene {
    host: TestHost,
    store: Arc<dyn Store>,
    pod: Option<TestNetNs>,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { host: TestHost::new(), store: Arc::new(MemoryStore::new()), pod: None };
        let pod = scene.host.new_pod();
        let request = LeaseRequest {
            attachment: key(),
            workload: None,
            labels: Default::default(),
            addresses: Vec::new(),
            pools: Vec::new(),
        };
        let lease = pollster::block_on(scene.ipam(scene.store.clone()).lease(&request)).unwrap();
        let link = LinkConfig::read(&json!({ "kind": "bridge", "bridge": "dc0" })).unwrap();
        scene.host.engine(None).attach(&AttachRequest::new(key(), pod.pod(), link, lease)).unwrap();
        Self { pod: Some(pod), ..scene }
    }

    fn ipam(&self, store: Arc<dyn Store>) -> Ipam {
        let section = json!({ "pools": [{ "name": "v4", "subnet": "10.20.0.0/24" }], "node": { "name": "n1" } });
        let section: IpamConfig = serde_json::from_value(section).unwrap();
        Ipam::new(&section, store).unwrap()
    }

    fn reclaim(&self, store: &Arc<dyn Store>) -> Reclaim {
        Reclaim::new(self.host.engine(None), Arc::new(self.ipam(Arc::clone(store))), false)
    }

    fn look(&self, reclaim: &mut Reclaim) -> usize {
        self.host.root().run(|| reclaim.look().len())
    }

    fn is_leased(&self) -> bool {
        pollster::block_on(self.ipam(self.store.clone()).held(&key())).unwrap().is_some()
    }

    /// Ends the pod, and waits until the kernel has removed its pair.
    fn end_pod(&mut self) {
        self.pod = None;
        let begun = Instant::now();
        while self.host.root().link(key().id().host_ifname().as_str()).is_some() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the pair stays");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes the path of the pod's namespace, which lives on.
    fn hide_pod(&self) {
        let path = self.pod.as_ref().unwrap().path();
        assert!(std::process::Command::new("umount").arg("-l").arg(path).status().unwrap().success());
        fs::remove_file(path).unwrap();
    }

    fn rewrite(&self, change: impl FnOnce(String) -> String) {
        let path = self.host.run_dir().join("attachments").join(key().id().to_string());
        let text = fs::read_to_string(&path).unwrap();
        let changed = change(text.clone());
        assert_ne!(changed, text);
        fs::write(path, changed).unwrap();
    }
}

fn key() -> AttachmentKey {
    AttachmentKey {
        network: "shop".parse().unwrap(),
        container: "web".parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    }
}

#[test]
fn a_lease_whose_release_fails_is_released_by_the_next_look() {
    if !require(Rung::Netns) {
        return;
    }
    let mut kept = 0;
    for (failure, call) in
        [Failure::Before, Failure::Lost, Failure::After].into_iter().flat_map(|f| (1..).map(move |n| (f, n)).take(20))
    {
        let mut scene = Scene::new();
        scene.end_pod();
        let flaky = Arc::new(FlakyStore::new(scene.store.clone(), failure, call));
        let store: Arc<dyn Store> = flaky.clone();
        let mut reclaim = scene.reclaim(&store);
        let first = scene.look(&mut reclaim);
        kept += usize::from(first == 0 && scene.is_leased() && !scene.host.records().is_empty());
        let ends = flaky.calls() < call;
        let second = scene.look(&mut reclaim);
        let what = format!("{failure:?} at {call}: {first} and {second}");
        assert!(!scene.is_leased(), "{what}");
        assert_eq!(scene.host.records(), [""; 0], "{what}");
        if ends {
            assert_eq!((first, second), (1, 0), "{what}");
        }
    }
    assert!(kept > 0, "no failure was met");
}

#[test]
fn a_renamed_device_is_no_proof() {
    if !require(Rung::Netns) {
        return;
    }
    let mut scene = Scene::new();
    let mut reclaim = scene.reclaim(&scene.store);
    scene.hide_pod();
    let name = key().id().host_ifname();
    scene.host.root().sh(&format!("ip link set {name} down; ip link set {name} name other0; ip link set other0 up"));
    assert_eq!((scene.look(&mut reclaim), scene.look(&mut reclaim), scene.is_leased()), (0, 0, true));
    // When it is gone, the same look takes it back.
    scene.host.root().sh("ip link delete other0");
    scene.end_pod();
    assert_eq!((scene.look(&mut reclaim), scene.is_leased()), (1, false));
}

/// As in a container with a network of its own, and the host's directories.
#[test]
fn another_namespace_than_the_hosts_proves_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let scene = Scene::new();
    scene.hide_pod();
    let elsewhere = scene.host.new_pod();
    let look = || {
        let engine = Engine::new(Host(NetNs::open(elsewhere.path()).unwrap()), &scene.host.run_dir(), None).unwrap();
        let mut reclaim = Reclaim::new(engine, Arc::new(scene.ipam(scene.store.clone())), false);
        elsewhere.run(|| reclaim.look().len() + reclaim.look().len())
    };
    assert_eq!((look(), scene.is_leased()), (0, true));
    // A record that names this namespace is what stood in the way.
    let id = NetNs::open(elsewhere.path()).unwrap().id();
    let host = scene.host.host().0.id();
    let pair = |id: dcenet_core::netns::NetNsId| format!(r#""host":{{"dev":{},"inode":{}}}"#, id.dev, id.inode);
    scene.rewrite(|text| text.replace(&pair(host), &pair(id)));
    assert_eq!((look(), scene.is_leased()), (1, false));
}

#[test]
fn a_record_of_an_earlier_release_proves_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let mut scene = Scene::new();
    scene.end_pod();
    let host = scene.host.host().0.id();
    scene.rewrite(|text| text.replace(&format!(r#""host":{{"dev":{},"inode":{}}},"#, host.dev, host.inode), ""));
    let mut reclaim = scene.reclaim(&scene.store);
    assert_eq!((scene.look(&mut reclaim), scene.is_leased()), (0, true));
    // But for one of an earlier boot, which nothing has outlived.
    let boot = scene.host.engine(None).boot().to_owned();
    scene.rewrite(|text| text.replace(&boot, "earlier"));
    assert_eq!((scene.look(&mut reclaim), scene.is_leased()), (1, false));
}

#[test]
fn what_was_begun_and_not_finished_is_taken_back_when_nobody_holds_it() {
    if !require(Rung::Netns) {
        return;
    }
    let mut scene = Scene::new();
    scene.rewrite(|text| text.lines().take(1).map(|line| format!("{line}\n")).collect());
    let mut reclaim = scene.reclaim(&scene.store);
    let engine = scene.host.engine(None);
    let held = engine.hold(&key()).unwrap();
    assert_eq!((scene.look(&mut reclaim), scene.look(&mut reclaim), scene.is_leased()), (0, 0, true));
    drop(held);
    assert_eq!((scene.look(&mut reclaim), scene.is_leased()), (1, false));
    assert_eq!(scene.host.records(), [""; 0]);
    scene.end_pod();
}

#[test]
fn a_pod_under_policy_is_left_to_who_owns_it() {
    if !require(Rung::Netns) {
        return;
    }
    let mut scene = Scene::new();
    scene.end_pod();
    scene.rewrite(|text| text.replace(r#""policy":"none""#, r#""policy":"wanted""#));
    let mut reclaim = scene.reclaim(&scene.store);
    assert_eq!((scene.look(&mut reclaim), scene.is_leased()), (0, true));
    reclaim.owns_policy = true;
    assert_eq!((scene.look(&mut reclaim), scene.is_leased()), (1, false));
}
