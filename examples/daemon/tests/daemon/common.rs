//! A node with pods, its daemon, and traffic.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dcenet_core::cni::{Backends, CniError, NetConf, PolicyChoice, serve};
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_core::test_support::{TestHost, TestNetNs, tcp_echo};
use dcenet_ebpf::pin::Pins;
use dcenet_ipam::Ipam;
use dcenet_ipam::config::IpamConfig;
use dcenet_policy::enforcer::{PinnedDefault, PolicyConfig};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How long something may take that takes a moment on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Only `web` may talk to `db`.
pub const DB: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: db, namespace: shop }
spec:
  podSelector: { matchLabels: { app: db } }
  ingress:
  - from: [ { podSelector: { matchLabels: { app: web } } } ]
";

/// A host, the configuration of its daemon, and that of its network.
pub struct Node {
    pub config: Value,
    pub network: Value,
    pub host: TestHost,
}

/// A pod that the plugin has attached.
pub struct Pod {
    pub address: IpAddr,
    pub netns: TestNetNs,
}

/// What the plugin composes.
pub struct Plugin;

impl Backends for Plugin {
    fn addresses(&self, conf: &NetConf) -> Result<Option<Box<dyn AddressSource>>, CniError> {
        let Some(config) = conf.section::<IpamConfig>("ipam")? else { return Ok(None) };
        let ipam = Ipam::open(&config, &conf.state_dir).map_err(|e| CniError::from(LeaseError::from(e)))?;
        Ok(Some(Box::new(ipam)))
    }

    fn policy(&self, conf: &NetConf) -> Result<Option<PolicyChoice>, CniError> {
        let Some(config) = conf.section::<PolicyConfig>("policy")? else { return Ok(None) };
        let limit = config.limit.get();
        let sink = Arc::new(PinnedDefault::new(&config, &conf.run_dir));
        Ok(Some(PolicyChoice { sink, await_enforced: (!limit.is_zero()).then_some(limit) }))
    }
}

/// Of which request every call is a part.
pub const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

impl Node {
    /// Addresses are taken back, and metrics served; nothing is under policy.
    pub fn new() -> Self {
        let host = TestHost::new();
        let (state, run) = (host.directory().join("state"), host.run_dir());
        let ipam = json!({
            "pools": [{ "name": "v4", "subnet": "10.20.0.0/24", "gateway": "10.20.0.1" }],
            "node": { "name": "n1" },
        });
        let config = json!({
            "node": { "name": "n1" }, "ipam": ipam, "reclaim": { "every": "1s" },
            "metrics": { "listen": format!("unix:{}", run.join("metrics.sock").display()) },
            "log": { "format": "json", "level": "debug" }, "stateDir": state, "runDir": run,
        });
        let network = json!({
            "cniVersion": "1.1.0", "name": "shop", "type": "dcenet",
            "link": { "kind": "bridge", "bridge": "dc0", "isGateway": true },
            "ipam": ipam, "stateDir": state, "runDir": run,
        });
        Self { config, network, host }
    }

    /// Pods are under policies of a directory, and wait for their verdicts.
    pub fn under_policy() -> Self {
        let mut node = Self::new();
        let section = json!({ "default": "deny", "await": "60s", "pins": node.pins() });
        node.config["policy"] = section.clone();
        node.network["policy"] = section;
        fs::create_dir(node.policies()).unwrap();
        node.config["policies"] = json!({ "directory": node.policies() });
        node
    }

    pub fn pins(&self) -> PathBuf {
        self.host.directory().join("bpf")
    }

    pub fn policies(&self) -> PathBuf {
        self.host.directory().join("policies")
    }

    /// Puts a file into the directory of policies, whole at once.
    pub fn put_policy(&self, name: &str, text: &str) {
        let fresh = self.host.directory().join("fresh");
        fs::write(&fresh, text).unwrap();
        fs::rename(fresh, self.policies().join(name)).unwrap();
    }

    pub fn config_file(&self) -> PathBuf {
        let path = self.host.directory().join("dcenetd.json");
        fs::write(&path, self.config.to_string()).unwrap();
        path
    }

    /// Runs the daemon to its end, with an option.
    pub fn run(&self, option: &str) -> Output {
        let path = self.config_file();
        self.host.root().run(|| dcenetd().arg("--config").arg(path).arg(option).output()).unwrap()
    }

    /// Starts the daemon and waits until it is ready.
    pub fn start(&self) -> Daemon {
        self.start_by(dcenetd())
    }

    /// Starts the daemon by a command that ends with its name.
    pub fn start_by(&self, mut command: Command) -> Daemon {
        let socket = self.host.directory().join("notify");
        let _ = fs::remove_file(&socket);
        let notified = UnixDatagram::bind(&socket).unwrap();
        notified.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let log = self.host.directory().join("log");
        let to = fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        command.arg("--config").arg(self.config_file()).env("NOTIFY_SOCKET", &socket).stderr(to);
        let child = self.host.root().run(|| command.spawn()).unwrap();
        let mut daemon = Daemon { child, log, notified };
        let (begun, mut bytes) = (Instant::now(), [0; 64]);
        loop {
            if let Ok(length) = daemon.notified.recv(&mut bytes) {
                assert_eq!(&bytes[..length], b"READY=1");
                return daemon;
            }
            assert_eq!(daemon.child.try_wait().unwrap(), None, "the daemon has ended: {}", daemon.log());
            assert!(begun.elapsed() < PATIENCE, "the daemon does not get ready: {}", daemon.log());
        }
    }

    /// Attaches a new pod with the label `app: NAME`.
    pub fn add(&self, namespace: &str, name: &str) -> Pod {
        self.add_with(namespace, name, json!([{ "key": "app", "value": name }]))
    }

    /// Attaches a new pod with labels, as a runtime tells them.
    pub fn add_with(&self, namespace: &str, name: &str, labels: Value) -> Pod {
        let netns = self.host.new_pod();
        let mut conf = self.network.clone();
        conf["args"] = json!({ "cni": { "labels": labels } });
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}");
        let result = self.call_with(&Plugin, "ADD", name, Some(netns.path()), &args, &conf).unwrap();
        let address = result["ips"][0]["address"].as_str().unwrap_or_else(|| panic!("{result}"));
        let address = address.split_once('/').unwrap().0.parse().unwrap();
        Pod { address, netns }
    }

    /// Calls a verb as a runtime does, for a container that is no workload.
    pub fn call(
        &self,
        plugin: &(dyn Backends + Sync),
        verb: &str,
        container: &str,
        netns: Option<&Path>,
        conf: &Value,
    ) -> Result<Value, Value> {
        self.call_with(plugin, verb, container, netns, "", conf)
    }

    fn call_with(
        &self,
        plugin: &(dyn Backends + Sync),
        verb: &str,
        container: &str,
        netns: Option<&Path>,
        args: &str,
        conf: &Value,
    ) -> Result<Value, Value> {
        let environment: BTreeMap<&str, OsString> = BTreeMap::from([
            ("CNI_COMMAND", verb.into()),
            ("CNI_CONTAINERID", container.into()),
            ("CNI_NETNS", netns.map(Into::into).unwrap_or_default()),
            ("CNI_IFNAME", "eth0".into()),
            ("CNI_ARGS", args.into()),
            ("CNI_PATH", "/usr/lib/cni".into()),
            ("TRACEPARENT", TRACE.into()),
        ]);
        let (get, stdin) = (|name: &str| environment.get(name).cloned(), conf.to_string());
        let answer = self.host.root().run(|| {
            let mut answer = Vec::new();
            let _ = pollster::block_on(serve(get, &mut stdin.as_bytes(), &mut answer, plugin));
            answer
        });
        let answer = if answer.is_empty() { Value::Null } else { serde_json::from_slice(&answer).unwrap() };
        if answer.get("code").is_some() { Err(answer) } else { Ok(answer) }
    }

    /// The containers that have addresses, in order.
    pub fn leased(&self) -> Vec<String> {
        let section: IpamConfig = serde_json::from_value(self.network["ipam"].clone()).unwrap();
        let ipam = Ipam::open(&section, self.network["stateDir"].as_str().unwrap().as_ref()).unwrap();
        let mut names: Vec<String> = pollster::block_on(ipam.bindings(None))
            .unwrap()
            .iter()
            .map(|binding| binding.attachment.container.to_string())
            .collect();
        names.sort();
        names
    }

    /// Asks the daemon over its Unix socket: status line, headers, body.
    pub fn get(&self, path: &str) -> [String; 3] {
        let listen = self.config["metrics"]["listen"].as_str().unwrap();
        let stream = UnixStream::connect(listen.strip_prefix("unix:").unwrap()).unwrap();
        http_get(stream, path)
    }

    /// All samples of the daemon.
    pub fn samples(&self) -> BTreeMap<String, f64> {
        let [status, headers, body] = self.get("/metrics");
        assert!(status.ends_with("200 OK"), "{status}");
        assert!(headers.contains("application/openmetrics-text; version=1.0.0"), "{headers}");
        samples_of(&body)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The bpffs outlives its owner, and the host's directory cannot be removed around it.
        if self.pins().exists()
            && let Err(error) = Pins::at(self.pins()).unmount()
        {
            eprintln!("{error}");
        }
    }
}

pub fn dcenetd() -> Command {
    dcenetd_by(&[])
}

/// By another program, which is told to run it.
pub fn dcenetd_by(words: &[&str]) -> Command {
    let mut words = words.iter().copied().chain([env!("CARGO_BIN_EXE_dcenetd")]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// The daemon's process. Killed when it is dropped.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    notified: UnixDatagram,
}

impl Daemon {
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// How many file descriptors it has, and how many threads.
    pub fn holds(&self) -> (usize, usize) {
        let count = |what: &str| fs::read_dir(format!("/proc/{}/{what}", self.child.id())).unwrap().count();
        (count("fd"), count("task"))
    }

    pub fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it as a service manager does.
    pub fn stop(mut self) -> ExitStatus {
        self.send(Signal::TERM);
        let begun = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if begun.elapsed() > PATIENCE => panic!("the daemon does not end: {}", self.log()),
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let mut bytes = [0; 64];
        let length = self.notified.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"STOPPING=1");
        status
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until it holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "not seen: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a new TCP connection carries data both ways. What is to pass gets time.
pub fn talks(from: &Pod, to: &Pod, passes: bool) -> bool {
    let limit = if passes { PATIENCE } else { Duration::from_millis(400) };
    tcp_echo(&from.netns, &to.netns, to.address, limit).is_ok()
}

/// Datagrams every few milliseconds, counted on both ends, until it is stopped.
pub struct Flood {
    stop: Arc<AtomicBool>,
    arrived: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<u64>,
}

impl Flood {
    pub fn start(from: &Pod, to: &Pod, port: u16) -> Self {
        let to_address = SocketAddr::new(to.address, port);
        let receiving = to.netns.run(|| UdpSocket::bind(to_address)).unwrap();
        receiving.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let sending = from.netns.run(|| UdpSocket::bind((from.address, port))).unwrap();
        sending.connect(to_address).unwrap();
        let (stop, arrived) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
        let ends = stop.clone();
        let sender = std::thread::spawn(move || {
            let mut sent = 0;
            while !ends.load(Ordering::Relaxed) {
                sending.send(b"datagram").unwrap();
                sent += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            sent
        });
        let all_sent = arrived.clone();
        let receiver = std::thread::spawn(move || {
            let mut received = 0;
            loop {
                // Read before the socket is: what was sent by then is in the socket or nowhere.
                let last = all_sent.load(Ordering::Acquire);
                match receiving.recv(&mut [0; 16]) {
                    Ok(_) => received += 1,
                    Err(_) if last => return received,
                    Err(_) => {}
                }
            }
        });
        Self { stop, arrived, sender, receiver }
    }

    /// How many were sent and received.
    pub fn stop(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        self.arrived.store(true, Ordering::Release);
        (sent, self.receiver.join().unwrap())
    }
}

/// HTTP/1.0, in which a body ends with the connection.
pub fn http_get(mut stream: impl Read + Write, path: &str) -> [String; 3] {
    write!(stream, "GET {path} HTTP/1.0\r\nHost: node\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").expect("a header");
    let (status, headers) = head.split_once("\r\n").expect("a status line");
    [status, headers, body].map(str::to_owned)
}

/// Reads the text format of OpenMetrics 1.0 (section "Text format"), as strictly as needed to see that it is one: every sample is
/// of a family that was declared before, counters have the suffix that they must have, values are numbers, and the last
/// line says that nothing is missing.
pub fn samples_of(text: &str) -> BTreeMap<String, f64> {
    let (mut kinds, mut samples) = (BTreeMap::new(), BTreeMap::new());
    let body = text.strip_suffix("# EOF\n").expect("the end is marked");
    for line in body.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, family, rest) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
            match what {
                "TYPE" => assert!(kinds.insert(family.to_owned(), rest.to_owned()).is_none(), "twice: {line}"),
                "HELP" | "UNIT" => {}
                _ => panic!("no such comment: {line}"),
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a value");
        let name = series.split('{').next().unwrap();
        assert!(series == name || series.ends_with('}'), "{line}");
        let family = kinds.iter().find(|(family, kind)| {
            let suffixes: &[&str] = match kind.as_str() {
                "counter" => &["_total"],
                "gauge" => &[""],
                "histogram" => &["_bucket", "_sum", "_count"],
                "info" => &["_info"],
                other => panic!("no such type: {other}"),
            };
            name.strip_prefix(family.as_str()).is_some_and(|suffix| suffixes.contains(&suffix))
        });
        assert!(family.is_some(), "of no declared family: {line}");
        assert!(samples.insert(series.to_owned(), value.parse().expect("a number")).is_none(), "twice: {line}");
    }
    samples
}

/// The JSON objects of a file, a line each.
pub fn json_lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).expect("a line is an object")).collect()
}
