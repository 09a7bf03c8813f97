//! `policy-throughput`: what TCP between two pods of one node costs: a stream, requests that are answered one after the
//! other, and connections that are opened, used once and closed. By turns over three hosts: ours with a thousand rules in
//! each direction on both pods, ours without policy, and Debian's `bridge` with masquerading, whose netfilter rules each
//! packet that leaves the bridge meets. Ours masquerades nothing here: the peer has no policy, and ours no netfilter rules.
//! Needs root.
//!
//! Costs are times, so that less is better: microseconds for a megabyte, for a request, for a connection.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_benches::owner::Owner;
use dcenet_benches::plugin::Plugin;
use dcenet_benches::{Row, Summary, rounds, say};
use dcenet_core::engine::{AttachRequest, Engine};
use dcenet_core::link::Policy as LinkPolicy;
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{Dns, Lease, LeasedAddress, LeasedRoute, PolicySink};
use dcenet_core::test_support::{TestHost, TestNetNs};
use dcenet_policy::enforcer::{PinnedDefault, PolicyConfig};
use serde_json::json;

const ID: &str = "policy-throughput";
const PEER: &str = "bridge with ipMasq, no policy";
const RULES: u32 = 1000;
/// Admitted by the last rule.
const OPEN: u16 = 7000;
/// Admitted by none.
const CLOSED: u16 = 6999;
const LIMIT: Duration = Duration::from_secs(10);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Two pods on a host of their own.
struct Side {
    client: TestNetNs,
    server: TestNetNs,
    /// The server's.
    address: IpAddr,
    /// By what is measured, a value for each round.
    costs: [Vec<f64>; 3],
    // Dropped after the pods, and before the host: its pins are in the host's directory.
    owner: Option<Owner>,
    // Dropped after the pods, whose namespaces are in its directory.
    _host: TestHost,
}

impl Side {
    fn new(host: TestHost, owner: Option<Owner>, [client, server]: [TestNetNs; 2], address: &str) -> Self {
        let address = address.parse().expect("an address");
        Self { client, server, address, costs: Default::default(), owner, _host: host }
    }

    fn round(&mut self, sizes: &Work) -> io::Result<()> {
        let costs = [self.stream(sizes.stream)?, self.requests(sizes.requests)?, self.connections(sizes.connections)?];
        self.costs.iter_mut().zip(costs).for_each(|(all, cost)| all.push(cost));
        Ok(())
    }

    /// Microseconds for a megabyte, as the server sees it.
    fn stream(&self, time: Duration) -> io::Result<f64> {
        let send = |mut stream: TcpStream| {
            let (block, begin) = (vec![0x42; 128 << 10], Instant::now());
            while begin.elapsed() < time {
                stream.write_all(&block)?;
            }
            Ok(())
        };
        let receive = |mut stream: TcpStream| {
            let (mut block, mut bytes, mut begin) = (vec![0; 128 << 10], 0, None);
            loop {
                match stream.read(&mut block)? {
                    0 => break,
                    read => bytes += read,
                }
                begin.get_or_insert_with(Instant::now);
            }
            let time = begin.ok_or(io::ErrorKind::UnexpectedEof)?.elapsed();
            Ok(time.as_secs_f64() * 1e12 / bytes as f64)
        };
        self.connected(1, |streams| send(streams()?), receive).map(|(_, cost)| cost)
    }

    /// Microseconds for a byte and its answer.
    fn requests(&self, count: u32) -> io::Result<f64> {
        let ask = |mut stream: TcpStream| {
            stream.set_nodelay(true)?;
            let begin = Instant::now();
            for _ in 0..count {
                stream.write_all(&[1])?;
                stream.read_exact(&mut [0])?;
            }
            Ok(begin.elapsed().as_secs_f64() * 1e6 / f64::from(count))
        };
        self.connected(1, |streams| ask(streams()?), answer).map(|(cost, ())| cost)
    }

    /// Microseconds for a connection, a byte and its answer.
    fn connections(&self, count: u32) -> io::Result<f64> {
        let ask = |streams: &dyn Fn() -> io::Result<TcpStream>| {
            let begin = Instant::now();
            for _ in 0..count {
                let mut stream = streams()?;
                stream.set_nodelay(true)?;
                stream.write_all(&[1])?;
                stream.read_exact(&mut [0])?;
            }
            Ok(begin.elapsed().as_secs_f64() * 1e6 / f64::from(count))
        };
        self.connected(count, ask, answer).map(|(cost, ())| cost)
    }

    /// Runs both ends, the server's for each of `count` connections, and gives the client's result and the server's last.
    /// Neither end waits for ever for one that has failed.
    fn connected<C: Send, S: Send>(
        &self,
        count: u32,
        client: impl FnOnce(&dyn Fn() -> io::Result<TcpStream>) -> io::Result<C> + Send,
        server: impl Fn(TcpStream) -> io::Result<S> + Send,
    ) -> io::Result<(C, S)> {
        let listener = self.server.run(|| TcpListener::bind(SocketAddr::new(self.address, OPEN)))?;
        let to = listener.local_addr()?;
        let closing = Closing(Some(listener.try_clone()?));
        std::thread::scope(|scope| {
            let serving = scope.spawn(move || {
                let mut last = None;
                for _ in 0..count {
                    let (stream, _) = listener.accept()?;
                    limit(&stream)?;
                    stream.set_nodelay(true)?;
                    last = Some(server(stream)?);
                }
                last.ok_or_else(|| io::Error::other("no connection was asked for"))
            });
            // Moved in here, so that it is dropped before the scope waits for the server.
            let mut closing = closing;
            let asked = self.client.run(|| {
                client(&|| {
                    let stream = TcpStream::connect_timeout(&to, LIMIT)?;
                    limit(&stream)?;
                    Ok(stream)
                })
            });
            // All connections have been made, though the server may not have taken the last.
            if asked.is_ok() {
                closing.0 = None;
            }
            drop(closing);
            let served = serving.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked")));
            match (asked, served) {
                (Ok(asked), Ok(served)) => Ok((asked, served)),
                (Ok(_), Err(error)) => Err(io::Error::new(error.kind(), format!("the server: {error}"))),
                (Err(error), Ok(_)) => Err(io::Error::new(error.kind(), format!("the client: {error}"))),
                (Err(error), Err(other)) => {
                    Err(io::Error::new(error.kind(), format!("the client: {error}; the server: {other}")))
                }
            }
        })
    }

    /// Whether the client reaches a port on which the server listens.
    fn reaches(&self, port: u16) -> io::Result<bool> {
        let listener = self.server.run(|| TcpListener::bind(SocketAddr::new(self.address, port)))?;
        let to = listener.local_addr()?;
        Ok(self.client.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(1))).is_ok())
    }
}

/// Shuts a listener down when it is dropped, unless it is emptied before: whoever waits in accept(2) gets EINVAL
/// (net/ipv4/af_inet.c, `inet_shutdown`).
struct Closing(Option<TcpListener>);

impl Drop for Closing {
    fn drop(&mut self) {
        if let Some(listener) = self.0.take()
            && let Err(error) = TcpStream::from(OwnedFd::from(listener)).shutdown(Shutdown::Both)
        {
            say(format_args!("{ID}: cannot shut a listener down: {error}"));
        }
    }
}

/// Bounds how long the other end of a connection is waited for.
fn limit(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))
}

/// Answers each byte until the other end closes.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// What a round does on each side.
struct Work {
    stream: Duration,
    requests: u32,
    connections: u32,
}

fn main() -> Result<(), Failure> {
    let host = TestHost::new();
    let pins = host.directory().join("bpf");
    let config = PolicyConfig { pins: pins.clone(), ..PolicyConfig::default() };
    let owner = Owner::with(host.host(), &host.run_dir(), &pins, &policies());
    let sink = Arc::new(PinnedDefault::new(&config, &host.run_dir()));
    let engine = host.engine(Some(Arc::clone(&sink) as _));
    let pods = attach(&host, &engine, Some(&*sink))?;
    let mut policed = Side::new(host, Some(owner), pods, "10.88.0.3");

    let host = TestHost::new();
    let engine = host.engine(None);
    let pods = attach(&host, &engine, None)?;
    let mut plain = Side::new(host, None, pods, "10.88.0.3");
    if policed.reaches(CLOSED)? || !policed.reaches(OPEN)? || !plain.reaches(CLOSED)? {
        return Err("the policy is not in force, or something else is".into());
    }

    let mut theirs = debian();
    if theirs.is_none() {
        say(format_args!("{ID}: without a peer, for Debian's containernetworking-plugins are not installed"));
    }
    let quick = Work { stream: Duration::from_millis(50), requests: 300, connections: 50 };
    let full = Work { stream: Duration::from_millis(300), requests: 3000, connections: 300 };
    let runs = rounds(30, 5);
    let work = if runs == 30 { full } else { quick };
    for side in [Some(&mut policed), Some(&mut plain), theirs.as_mut()].into_iter().flatten() {
        side.round(&quick_start())?;
        side.costs = Default::default();
    }
    for _ in 0..runs {
        for side in [Some(&mut policed), Some(&mut plain), theirs.as_mut()].into_iter().flatten() {
            side.round(&work)?;
        }
    }

    let mut summary = Summary::default();
    for (at, (what, unit)) in [("stream", "us/MB"), ("request", "us"), ("connection", "us")].into_iter().enumerate() {
        let floor = dcenet_benches::Sample::new(plain.costs[at].clone()).median();
        let ours = &policed.costs[at];
        let row = Row::compare(ID, &format!("{what}, policy"), 1.1, ours, ("ours without policy", &plain.costs[at]));
        summary.add(row.in_unit(unit));
        if let Some(theirs) = &theirs {
            let row = Row::compare(ID, &format!("{what}, policy, no masq"), 1.0, ours, (PEER, &theirs.costs[at]));
            summary.add(row.in_unit(unit).with_floor(floor));
        }
    }
    drop(policed.client);
    policed.owner.expect("it has one").close();
    summary.write();
    Ok(())
}

/// Resolves neighbours and warms caches.
fn quick_start() -> Work {
    Work { stream: Duration::from_millis(20), requests: 100, connections: 20 }
}

/// Two pods on the host's bridge, the client first.
fn attach(host: &TestHost, engine: &Engine, sink: Option<&PinnedDefault>) -> Result<[TestNetNs; 2], Failure> {
    let mut pods = Vec::new();
    for n in [2, 3] {
        let pod = host.new_pod();
        let gateway = "10.88.0.1".parse()?;
        let address = LeasedAddress {
            gateway: Some(gateway),
            ..LeasedAddress::new(format!("10.88.0.{n}/24").parse()?, "pods", n)
        };
        let key =
            AttachmentKey { network: "bench".parse()?, container: format!("pod{n}").parse()?, ifname: "eth0".parse()? };
        engine.attach(&AttachRequest {
            key: key.clone(),
            pod: pod.pod(),
            link: serde_json::from_value(json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true }))?,
            lease: Lease {
                addresses: vec![address],
                routes: vec![LeasedRoute { destination: "0.0.0.0/0".parse()?, gateway: None }],
                dns: Dns::default(),
                mac: None,
            },
            mac: None,
            workload: Some(format!("bench/pod{n}").parse()?),
            labels: Default::default(),
            policy: if sink.is_some() { LinkPolicy::Wanted } else { LinkPolicy::None },
            nat: Default::default(),
            fingerprint: "1".into(),
        })?;
        if let Some(sink) = sink {
            let records = engine.attachments(&"bench".parse()?)?;
            let record = records.into_iter().find(|record| record.key == key).ok_or("the record just written")?;
            sink.await_enforced(&record.endpoint().ok_or("an endpoint")?, LIMIT)?;
        }
        pods.push(pod);
    }
    pods.try_into().map_err(|_| "two pods".into())
}

/// A thousand rules in each direction, of which the last is for the pods.
fn policies() -> String {
    let peers = |key: &str| {
        let others: String = (1..RULES)
            .map(|n| {
                let (high, low) = (n / 250, n % 250 + 1);
                format!(
                    "    - {{ {key}: [{{ ipBlock: {{ cidr: 172.16.{high}.{low}/32 }} }}], ports: [{{ protocol: TCP, port: {} }}] }}\n",
                    10_000 + n
                )
            })
            .collect();
        let last = format!(
            "    - {{ {key}: [{{ ipBlock: {{ cidr: 10.88.0.0/24 }} }}], ports: [{{ protocol: TCP, port: {OPEN} }}] }}\n"
        );
        others + &last
    };
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{ name: many, namespace: bench }}\nspec:\n  \
         podSelector: {{}}\n  policyTypes: [Ingress, Egress]\n  ingress:\n{}  egress:\n{}",
        peers("from"),
        peers("to")
    )
}

/// The same two pods by Debian's plugins.
fn debian() -> Option<Side> {
    let host = TestHost::new();
    let config = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge",
        "bridge": "cni0", "isGateway": true, "ipMasq": true,
        "ipam": {
            "type": "host-local", "dataDir": host.directory().join("host-local"),
            "ranges": [[{ "subnet": "10.89.0.0/24", "rangeStart": "10.89.0.2", "gateway": "10.89.0.1" }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    });
    let plugin = Plugin::debian("bridge", config)?;
    let pods = [2, 3].map(|n| {
        let pod = host.new_pod();
        host.root().run(|| plugin.run("ADD", &format!("pod{n}"), pod.path()));
        pod
    });
    Some(Side::new(host, None, pods, "10.89.0.3"))
}
