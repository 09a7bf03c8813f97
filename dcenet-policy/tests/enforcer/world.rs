//! A host with pods.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::engine::{AttachRequest, Engine};
use dcenet_core::link::Policy as LinkPolicy;
use dcenet_core::model::{AttachmentKey, IfIndex, MacAddr};
use dcenet_core::netns::{Host, NetNs};
use dcenet_core::provider::{Dns, Endpoint, Lease, LeasedAddress, LeasedRoute, PolicySink};
use dcenet_core::test_support::{TestHost, TestNetNs, ping};
use dcenet_ebpf::abi::{self, Reason, Sizes, Traffic, reason_index};
use dcenet_ebpf::attach::{Attached, Attacher, ClsactAttacher, Direction, Hook};
use dcenet_ebpf::loader::AyaLoader;
use dcenet_ebpf::maps::{Map, PerCpuArray};
use dcenet_ebpf::pin::Pins;
use dcenet_policy::enforcer::{DefaultVerdict, Enforcer, EnforcerConfig, PinnedDefault, PolicyConfig, Tools};
use dcenet_policy::model::Policy;
use dcenet_policy::sources::networkpolicy::from_yaml;
use dcenet_policy::target::Tc;
use serde_json::json;

/// Long enough for anything that is allowed.
pub const ALLOWED: Duration = Duration::from_secs(20);
/// How long a test waits for what must not come. That it did not come in that time proves nothing, as resolving an address
/// may take longer (1 s between two tries): see [`World::denied`].
pub const DENIED: Duration = Duration::from_millis(150);

pub fn tools() -> Tools {
    Tools {
        loader: Arc::new(AyaLoader),
        attacher: Arc::new(ClsactAttacher),
        lowering: Arc::new(Tc::new(Sizes::small())),
    }
}

/// A host, its engine and its pods. The owner is separate, for it may die.
pub struct World {
    // Dropped before the host, whose directory they are mounted in.
    pub pods: BTreeMap<String, TestNetNs>,
    /// Pods have no end on the host: they are macvlans on this device of it.
    pub parent: Option<&'static str>,
    /// How these reach each other.
    pub mode: &'static str,
    /// Pods are attached without the name of their workload.
    pub anonymous: bool,
    /// How often the segment of macvlans is asked for an address before a pod gets it.
    pub probes: u8,
    pub engine: Engine,
    pub sink: Arc<PinnedDefault>,
    pub host: TestHost,
}

pub fn config(directory: PathBuf) -> EnforcerConfig {
    EnforcerConfig {
        node: "n1".into(),
        node_addresses: ["10.20.0.1", "fd20::1"].map(|a| a.parse().unwrap()).into(),
        run_dir: directory.join("run"),
        pins: directory.join("bpf"),
    }
}

impl World {
    pub fn new() -> Self {
        Self::with_default(DefaultVerdict::Deny)
    }

    pub fn with_default(default: DefaultVerdict) -> Self {
        Self::with(PolicyConfig { default, ..PolicyConfig::default() })
    }

    /// With a device for macvlans, which is one end of a pair.
    pub fn of_macvlans(policy: PolicyConfig) -> Self {
        let mut world = Self::with(policy);
        world.host.root().sh("ip link add up0 type veth peer name far0
             for end in far0 up0; do ip link set $end addrgenmode none; ip link set $end up; done");
        world.parent = Some("up0");
        world
    }

    pub fn with(policy: PolicyConfig) -> Self {
        let host = TestHost::new();
        host.root().sysctl("ipv6/conf/all/forwarding", "1");
        let policy = PolicyConfig { pins: host.directory().join("bpf"), ..policy };
        let sink = Arc::new(PinnedDefault::new(&policy, &host.run_dir()));
        let engine = host.engine(Some(Arc::clone(&sink) as _));
        Self { host, engine, sink, parent: None, mode: "bridge", anonymous: false, probes: 0, pods: BTreeMap::new() }
    }

    pub fn open(&self, tools: Tools) -> Enforcer {
        Enforcer::open(self.host.host(), config(self.host.directory().to_owned()), tools).unwrap()
    }

    /// An owner that carries changes out.
    pub fn started(&self) -> Enforcer {
        let enforcer = self.open(tools());
        assert!(enforcer.start().unwrap().is_complete());
        enforcer
    }

    pub fn try_add(&mut self, name: &str, n: u16, labels: &[(&str, &str)]) -> Result<(), String> {
        let pod = self.attach(name, n, labels)?;
        self.pods.insert(name.to_owned(), pod);
        Ok(())
    }

    /// Attaches a pod, which the caller keeps.
    pub fn attach(&self, name: &str, n: u16, labels: &[(&str, &str)]) -> Result<TestNetNs, String> {
        let pod = self.host.new_pod();
        let (address, gateway) = ([format!("10.20.0.{n}/24"), format!("fd20::{n:x}/64")], ["10.20.0.1", "fd20::1"]);
        let addresses = address.iter().zip(gateway).map(|(address, gateway)| LeasedAddress {
            gateway: Some(gateway.parse().unwrap()),
            ..LeasedAddress::new(address.parse().unwrap(), "pods", n.into())
        });
        let routes = ["0.0.0.0/0", "::/0"]
            .map(|destination| LeasedRoute { destination: destination.parse().unwrap(), gateway: None });
        let link = match self.parent {
            None => json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true }),
            Some(parent) => {
                json!({ "kind": "macvlan", "parent": parent, "mode": self.mode, "underlay": { "probes": self.probes } })
            }
        };
        let request = AttachRequest {
            key: key(name),
            pod: pod.pod(),
            link: serde_json::from_value(link).unwrap(),
            lease: Lease { addresses: addresses.collect(), routes: routes.into(), dns: Dns::default(), mac: None },
            // Not the one that the engine would derive: runtimes choose.
            mac: Some(MacAddr::local([0, 0xdc, 0, 0, (n >> 8) as u8, n as u8])),
            workload: (!self.anonymous).then(|| format!("shop/{name}").parse().unwrap()),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            policy: LinkPolicy::Wanted,
            nat: Default::default(),
            fingerprint: "1".into(),
        };
        self.engine.attach(&request).map_err(|e| {
            let mut text = e.to_string();
            let mut source = std::error::Error::source(&e);
            while let Some(e) = source {
                text = format!("{text}: {e}");
                source = e.source();
            }
            text
        })?;
        Ok(pod)
    }

    pub fn add(&mut self, name: &str, n: u16, labels: &[(&str, &str)]) {
        self.try_add(name, n, labels).unwrap();
    }

    /// Adds a pod and waits for its own verdicts.
    pub fn add_enforced(&mut self, name: &str, n: u16, labels: &[(&str, &str)]) {
        self.add(name, n, labels);
        self.await_enforced(name, ALLOWED).unwrap();
    }

    pub fn await_enforced(&self, name: &str, limit: Duration) -> Result<(), String> {
        let endpoint = self.endpoint(name);
        self.sink.await_enforced(&endpoint, limit).map_err(|e| e.to_string())
    }

    pub fn delete(&mut self, name: &str) {
        self.engine.detach(&key(name), None).unwrap();
        self.pods.remove(name);
    }

    pub fn endpoint(&self, name: &str) -> Endpoint {
        let record = self.engine.attachments(&"shop".parse().unwrap()).unwrap();
        record.into_iter().find(|r| r.key == key(name)).and_then(|record| record.endpoint()).unwrap()
    }

    pub fn index(&self, name: &str) -> IfIndex {
        self.endpoint(name).ifindex
    }

    /// Ours on both hooks of a pod's host end.
    pub fn attached(&self, name: &str) -> [Option<Attached>; 2] {
        let device = self.index(name);
        self.host.root().run(|| {
            [Direction::Ingress, Direction::Egress]
                .map(|direction| ClsactAttacher.attached(Hook { device, direction }).unwrap())
        })
    }

    pub fn pod(&self, name: &str) -> &TestNetNs {
        if name == "node" { self.host.root() } else { &self.pods[name] }
    }

    pub fn address(&self, name: &str, ipv6: bool) -> IpAddr {
        if name == "node" {
            return if ipv6 { "fd20::1" } else { "10.20.0.1" }.parse().unwrap();
        }
        self.endpoint(name).addresses.into_iter().find(|a| a.is_ipv6() == ipv6).unwrap()
    }

    /// Whether `from` reaches `to` over both families; panics where they differ.
    pub fn tcp(&self, from: &str, to: &str, port: u16, expected: bool) {
        for ipv6 in [false, true] {
            let address = SocketAddr::new(self.address(to, ipv6), port);
            let got = self.probe((from, to), ipv6, expected, |limit| tcp(self.pod(from), self.pod(to), address, limit));
            assert_eq!(got, expected, "tcp {from} -> {to} {address}");
        }
    }

    pub fn udp(&self, from: &str, to: &str, port: u16, expected: bool) {
        for ipv6 in [false, true] {
            let address = SocketAddr::new(self.address(to, ipv6), port);
            let got = self.probe((from, to), ipv6, expected, |limit| udp(self.pod(from), self.pod(to), address, limit));
            assert_eq!(got, expected, "udp {from} -> {to} {address}");
        }
    }

    pub fn ping(&self, from: &str, to: &str, expected: bool) {
        for ipv6 in [false, true] {
            let address = self.address(to, ipv6);
            let got = self.probe((from, to), ipv6, expected, |limit| ping(self.pod(from), address, limit).is_ok());
            assert_eq!(got, expected, "ping {from} -> {to} {address}");
        }
    }

    fn probe(&self, ends: (&str, &str), ipv6: bool, expected: bool, carry_out: impl FnOnce(Duration) -> bool) -> bool {
        if expected { carry_out(ALLOWED) } else { self.denied(ends, ipv6, || carry_out(DENIED)) }
    }

    /// Carries out what must be denied between two ends, and makes sure that a program denied just that, and that it is not
    /// a neighbour who was not found in time: both ends have the other's address written down meanwhile, and the programs
    /// have dropped more afterwards.
    pub fn denied(&self, (one, other): (&str, &str), ipv6: bool, carry_out: impl FnOnce() -> bool) -> bool {
        let ways = [(one, other), (other, one)];
        for (from, to) in ways {
            let (address, mac, device) = (self.address(to, ipv6), self.mac(to), device(from));
            self.pod(from).sh(&format!("ip neigh replace {address} lladdr {mac} nud permanent dev {device}"));
        }
        let before = self.dropped(one) + self.dropped(other);
        let passed = carry_out();
        let after = self.dropped(one) + self.dropped(other);
        for (from, to) in ways {
            // What is allowed asks for itself.
            self.pod(from).sh(&format!("ip neigh del {} dev {}", self.address(to, ipv6), device(from)));
        }
        assert!(passed || after > before, "{one} and {other}, IPv6: {ipv6}: nothing came, and nothing was dropped");
        passed
    }

    /// Packets by what became of them, of all pods.
    pub fn reasons(&self) -> BTreeMap<Reason, u64> {
        let pin = Pins::at(self.host.directory().join("bpf")).get(abi::REASONS).unwrap().unwrap();
        let map = PerCpuArray::<Traffic>::new(Map::from_fd(pin).unwrap()).unwrap();
        let packets = |reason, direction| {
            let cpus = map.load(reason_index(reason, direction)).unwrap();
            cpus.iter().map(|traffic| traffic.packets).sum::<u64>()
        };
        let both = |reason| abi::Direction::ALL.map(|direction| packets(reason, direction)).iter().sum();
        Reason::ALL.iter().map(|reason| (*reason, both(*reason))).collect()
    }

    fn mac(&self, name: &str) -> String {
        if name != "node" {
            return self.endpoint(name).mac.to_string();
        }
        let line = self.host.root().sh("ip -br link show dc0");
        line.split_whitespace().nth(2).unwrap().to_owned()
    }

    /// How many packets programs on a pod's host end have dropped; 0 for the node, which has none. Of pods without such an
    /// end, those of all pods.
    pub fn dropped(&self, name: &str) -> u64 {
        if name == "node" {
            return 0;
        }
        if self.parent.is_some() {
            return self.reasons().iter().filter(|(reason, _)| !reason.passes()).map(|(_, packets)| packets).sum();
        }
        let text = self.host.root().sh(&format!("tc -s -j qdisc show dev {}", self.endpoint(name).ifname));
        let disciplines: serde_json::Value = serde_json::from_str(&text).unwrap();
        let clsact = disciplines.as_array().unwrap().iter().find(|d| d["kind"] == "clsact");
        clsact.map_or(0, |d| d["drops"].as_u64().unwrap())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // What a test that panicked has left.
        let _ = Pins::at(self.host.directory().join("bpf")).unmount();
    }
}

fn device(name: &str) -> &'static str {
    if name == "node" { "dc0" } else { "eth0" }
}

pub fn key(name: &str) -> AttachmentKey {
    AttachmentKey {
        network: "shop".parse().unwrap(),
        container: name.parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    }
}

pub fn tcp(client: &TestNetNs, server: &TestNetNs, to: SocketAddr, limit: Duration) -> bool {
    use std::io::{Read, Write};
    let listener = server.run(|| TcpListener::bind(to)).unwrap();
    let Ok(mut stream) = client.run(|| TcpStream::connect_timeout(&to, limit)) else { return false };
    let (mut accepted, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(limit)).unwrap();
    accepted.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).is_ok()
}

pub fn udp(client: &TestNetNs, server: &TestNetNs, to: SocketAddr, limit: Duration) -> bool {
    let answering = server.run(|| UdpSocket::bind(to)).unwrap();
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let asking = client.run(|| UdpSocket::bind((any, 0))).unwrap();
    answering.set_read_timeout(Some(limit)).unwrap();
    asking.set_read_timeout(Some(limit)).unwrap();
    asking.send_to(b"x", to).unwrap();
    let mut bytes = [0; 8];
    let Ok((_, from)) = answering.recv_from(&mut bytes) else { return false };
    answering.send_to(b"y", from).unwrap();
    asking.recv(&mut bytes).is_ok()
}

pub fn policies(yaml: &str) -> Vec<Policy> {
    from_yaml(yaml).unwrap()
}

/// A policy for `app: db` that admits TCP 5432 and UDP 5353 from `app: web`.
pub const DB: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: db, namespace: shop }
spec:
  podSelector: { matchLabels: { app: db } }
  policyTypes: [Ingress]
  ingress:
  - from: [ { podSelector: { matchLabels: { app: web } } } ]
    ports: [ { port: 5432 }, { port: 5353, protocol: UDP } ]
"#;

pub fn host_of(path: &std::path::Path) -> Host {
    Host(NetNs::open(path).unwrap())
}
