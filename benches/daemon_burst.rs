//! `daemon-burst`: 64 ADDs at one time, then their 64 DELs, served by `dcenetd`, against bounds: 500 ADDs in a second, and
//! 100 ms for the DELs. A caller is a thread that does what the plugin's process does between its start and its end.
//!
//! The floor of the DELs is the kernel alone: 64 veth pairs to as many namespaces, deleted as one group
//! (`rtnl_group_dellink` in net/core/rtnetlink.c).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dcenet_benches::plugin::build_daemon;
use dcenet_benches::{Row, Sample, Summary, rounds};
use dcenet_core::cni::{Backends, CniError, ErrorCode, NetConf, PolicyChoice, serve};
use dcenet_core::provider::AddressSource;
use dcenet_core::test_support::{TestHost, TestNetNs};
use serde_json::{Value, json};

const ID: &str = "daemon-burst";
const PODS: usize = 64;

fn main() {
    let program = build_daemon();
    let mut summary = Summary::default();
    for (place, root) in [("tmpfs", "/dev/shm"), ("disk", "/var/tmp")] {
        let directory = tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in(root).expect("a directory");
        measure(&program, place, directory.path(), &mut summary);
    }
    summary.write();
}

fn measure(program: &Path, place: &str, directory: &Path, summary: &mut Summary) {
    let host = TestHost::new();
    let pods: Vec<TestNetNs> = (0..PODS).map(|_| host.new_pod()).collect();
    let socket = directory.join("dcenetd.sock");
    let ipam = json!({
        "type": "dcenet", "pools": [{ "name": "pods", "subnet": "10.88.0.0/16", "gateway": "10.88.0.1" }],
        "routes": [{ "dst": "0.0.0.0/0" }],
    });
    let (state, run) = (directory.join("state"), directory.join("run"));
    let daemon = json!({ "ipam": ipam, "server": { "socket": socket }, "stateDir": state, "runDir": run });
    let network = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "dcenet", "daemon": socket,
        "link": { "kind": "bridge", "bridge": "dc0", "isGateway": true }, "ipam": ipam, "stateDir": state, "runDir": run,
    });
    let _daemon = Daemon::start(program, &daemon, directory, &host);
    let network = network.to_string();
    let (mut adds, mut dels, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    // The first makes the bridge and warms the caches.
    for round in 0..=rounds(15, 2) {
        let add = all(&host, &pods, "ADD", &network);
        let del = all(&host, &pods, "DEL", &network);
        let floor = kernel_alone(&host, &pods);
        if round > 0 {
            adds.push(add);
            dels.push(del);
            floors.push(floor);
        }
    }
    let bound = |ms: f64| vec![ms; adds.len()];
    let row = Row::compare(ID, &format!("{PODS} ADD, {place}"), 1.0, &adds, ("128 ms", &bound(128.0)));
    summary.add(row);
    let row = Row::compare(ID, &format!("{PODS} DEL, {place}"), 1.0, &dels, ("100 ms", &bound(100.0)));
    summary.add(row.with_floor(Sample::new(floors).median()));
}

/// A verb for every pod at one time; milliseconds until the last is answered.
fn all(host: &TestHost, pods: &[TestNetNs], verb: &str, network: &str) -> f64 {
    host.root().run(|| {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for (n, pod) in pods.iter().enumerate() {
                scope.spawn(move || call(verb, &format!("bench{n}"), pod.path(), network));
            }
        });
        begin.elapsed().as_secs_f64() * 1e3
    })
}

fn call(verb: &str, container: &str, netns: &Path, network: &str) {
    let environment: BTreeMap<&str, OsString> = BTreeMap::from([
        ("CNI_COMMAND", verb.into()),
        ("CNI_CONTAINERID", container.into()),
        ("CNI_NETNS", netns.into()),
        ("CNI_IFNAME", "eth0".into()),
        ("CNI_PATH", "/usr/lib/cni".into()),
    ]);
    let mut answer = Vec::new();
    let get = |name: &str| environment.get(name).cloned();
    let _ = pollster::block_on(serve(get, &mut network.as_bytes(), &mut answer, &DaemonOnly));
    let said: Value = if answer.is_empty() { Value::Null } else { serde_json::from_slice(&answer).expect("JSON") };
    // A figure of a failed call would be none.
    assert!(said.get("code").is_none(), "{verb} {container}: {said}");
}

/// What no call may come to: that the daemon did not serve it.
struct DaemonOnly;

impl Backends for DaemonOnly {
    fn addresses(&self, _conf: &NetConf) -> Result<Option<Box<dyn AddressSource>>, CniError> {
        Err(CniError::new(ErrorCode::TryAgain, "the daemon did not take the call".to_owned()))
    }

    fn policy(&self, _conf: &NetConf) -> Result<Option<PolicyChoice>, CniError> {
        Ok(None)
    }
}

/// A process of the daemon, killed when it is dropped.
struct Daemon(Child);

impl Daemon {
    /// Starts it and waits until it is ready.
    fn start(program: &Path, config: &Value, directory: &Path, host: &TestHost) -> Self {
        let path = directory.join("dcenetd.json");
        std::fs::write(&path, config.to_string()).expect("a file in our directory");
        let notify = directory.join("notify");
        let notified = UnixDatagram::bind(&notify).expect("a socket in our directory");
        notified.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        let mut command = Command::new(program);
        command.arg("--config").arg(path).env_clear().env("NOTIFY_SOCKET", notify).stdin(Stdio::null());
        let child = host.root().run(|| command.spawn()).expect("the daemon starts");
        let daemon = Self(child);
        let mut told = [0; 7];
        notified.recv(&mut told).expect("the daemon gets ready");
        assert_eq!(&told, b"READY=1");
        daemon
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail where it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Milliseconds that the kernel takes to delete as many veth pairs, as one group.
fn kernel_alone(host: &TestHost, pods: &[TestNetNs]) -> f64 {
    const GROUP: u32 = 77;
    let ip = |arguments: &str| {
        let status = Command::new("ip").args(arguments.split_whitespace()).status().expect("ip runs");
        assert!(status.success(), "ip {arguments}");
    };
    host.root().run(|| {
        for (n, pod) in pods.iter().enumerate() {
            let pod = pod.path().display();
            ip(&format!("link add floor{n} group {GROUP} up type veth peer name floor netns {pod}"));
        }
        let begin = Instant::now();
        ip(&format!("link del group {GROUP}"));
        begin.elapsed().as_secs_f64() * 1e3
    })
}
