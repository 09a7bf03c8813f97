//! Pods that ask the DNS proxy for names, and connect to what they hear at once; behind it Debian's dnsmasq.
#![cfg(feature = "dns")]

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::test_support::{Rung, require, require_with};
use dcenet_policy::dns::{Learn, Proxy, ProxyConfig};
use dcenet_policy::enforcer::flows::{FlowKind, FlowReader, LastFlows};
use dcenet_policy::enforcer::{Enforcer, LearnError, Learner};
use dcenet_policy::model::DomainName;
use dcenet_policy::sources::kubernetes::Documents;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};

use crate::world::*;

const PROGRAM: &str = "/usr/sbin/dnsmasq";

/// In a namespace the proxy, at the node's address, is in reach of a pod that is isolated: it is the pod's own node.
const POLICY: &str = r#"
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: out, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: web } } }
  egress:
  - { action: allow, to: [ { fqdns: [ "*.db.example.com" ] } ], services: [ { protocol: tcp, ports: [ 5432 ] } ] }
"#;

const ANSWERS: u8 = 200;

fn can_run() -> bool {
    let missing = || (!Path::new(PROGRAM).exists()).then(|| "needs Debian's dnsmasq-base".to_owned());
    require(Rung::Kernel) && require_with(Rung::Services, missing)
}

/// Ends with its owner.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Answers for `nN.db.example.com` and `nN.example.com` with 192.0.2.N, and for an alias of the first.
fn server(world: &World) -> Server {
    let mut hosts = String::new();
    for n in 1..=ANSWERS {
        writeln!(hosts, "192.0.2.{n} n{n}.db.example.com n{n}.example.com").unwrap();
    }
    let file = world.host.directory().join("hosts");
    std::fs::write(&file, hosts).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--user=root",
        "--pid-file=",
    ]);
    command.args(["--listen-address=10.20.0.5", "--bind-interfaces", "--local-ttl=1", "--local=/example.com/"]);
    command.args(["--cname=alias.db.example.com,n1.example.com"]);
    command.arg(format!("--addn-hosts={}", file.display()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    Server(world.pod("dns").run(|| command.spawn()).unwrap())
}

fn proxy(world: &World, learn: Arc<dyn Learn>) -> Proxy {
    let config = ProxyConfig {
        listen: vec!["10.20.0.1:53".parse().unwrap()],
        upstreams: vec!["10.20.0.5:53".parse().unwrap()],
        timeout: Duration::from_secs(10),
        ..ProxyConfig::default()
    };
    let proxy = world.host.root().run(|| Proxy::start(config, learn)).unwrap();
    // The server behind is not there at once, nor its neighbour.
    let heard = (0..100).any(|_| {
        let answered = resolve(world, "n1.example.com").is_ok();
        if !answered {
            std::thread::sleep(Duration::from_millis(100));
        }
        answered
    });
    assert!(heard, "dnsmasq does not answer");
    proxy
}

/// What the pod `web` hears.
fn resolve(world: &World, name: &str) -> Result<Vec<IpAddr>, ResponseCode> {
    let mut query = Message::new(7, MessageType::Query, OpCode::Query);
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    let socket = world.pod("web").run(|| UdpSocket::bind("10.20.0.2:0")).unwrap();
    socket.connect("10.20.0.1:53").unwrap();
    socket.set_read_timeout(Some(ALLOWED)).unwrap();
    socket.send(&query.to_vec().unwrap()).unwrap();
    let mut buffer = [0; 1024];
    let length = socket.recv(&mut buffer).unwrap();
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    if answer.metadata.response_code != ResponseCode::NoError {
        return Err(answer.metadata.response_code);
    }
    let address = |data: &RData| match data {
        RData::A(address) => Some(IpAddr::from(address.0)),
        _ => None,
    };
    Ok(answer.answers.iter().filter_map(|record| address(&record.data)).collect())
}

fn connects(world: &World, address: IpAddr, limit: Duration) -> bool {
    let at = SocketAddr::new(address, 5432);
    world.pod("web").run(|| TcpStream::connect_timeout(&at, limit)).is_ok()
}

/// How many packets to the server's addresses were dropped.
fn denied(reader: &mut FlowReader) -> usize {
    let all = LastFlows::new(4096);
    reader.drain(&mut &all).unwrap();
    assert_eq!(all.losses().total(), 0);
    let is_to_server =
        |address: Option<IpAddr>| matches!(address, Some(IpAddr::V4(at)) if at.octets()[..3] == [192, 0, 2]);
    all.flows().iter().filter(|flow| flow.kind == FlowKind::Denied && is_to_server(flow.peer.address)).count()
}

fn world() -> (World, Enforcer) {
    let mut world = World::new();
    let owner = world.started();
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("dns", 5, &[("app", "dns")]);
    let documents = Documents::default().with_yaml("policy.yaml", POLICY).unwrap();
    assert!(owner.replace_documents(&Documents::default(), &documents).unwrap().is_complete());
    let root = world.host.root();
    root.sh(&format!("ip link set lo up; for n in $(seq {ANSWERS}); do ip address add 192.0.2.$n/32 dev lo; done"));
    let listener = root.run(|| TcpListener::bind("0.0.0.0:5432")).unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
    (world, owner)
}

/// Releases answers before they are in force.
struct Early(Learner);

impl Learn for Early {
    fn is_client(&self, client: IpAddr) -> bool {
        self.0.is_endpoint(client)
    }

    fn is_asked_for(&self, name: &DomainName) -> bool {
        self.0.is_asked_for(name)
    }

    fn learn(&self, client: IpAddr, name: &DomainName, addresses: &[(IpAddr, Duration)]) -> Result<(), LearnError> {
        let (learner, name, addresses) = (self.0.clone(), name.clone(), addresses.to_vec());
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(500));
            learner.learn(client, &name, addresses)
        });
        Ok(())
    }
}

#[test]
fn a_connection_made_at_once_after_its_answer_is_never_denied_and_one_after_an_answer_released_early_is() {
    if !can_run() {
        return;
    }
    let (world, owner) = world();
    let _server = server(&world);
    let held = proxy(&world, Arc::new(owner.learner()));
    let mut reader = owner.flows().unwrap();
    assert_eq!(denied(&mut reader), 0);
    for n in 1..=ANSWERS {
        let heard = resolve(&world, &format!("n{n}.db.example.com")).unwrap();
        assert_eq!(heard, [IpAddr::from([192, 0, 2, n])]);
        assert!(connects(&world, heard[0], ALLOWED), "{n}");
        if n % 20 == 0 {
            assert_eq!(denied(&mut reader), 0, "up to {n}");
        }
    }
    let counts = held.counts();
    assert_eq!((counts.learnt, counts.withheld, counts.refused), (ANSWERS.into(), 0, 0), "{counts:?}");
    drop(held);
    // The proxy's port, and the same answers to somebody who knows none of them yet.
    drop(reader);
    owner.uninstall().unwrap();

    let (world, owner) = self::world();
    let _server = server(&world);
    let _early = proxy(&world, Arc::new(Early(owner.learner())));
    let mut reader = owner.flows().unwrap();
    for n in 1..=3 {
        let heard = resolve(&world, &format!("n{n}.db.example.com")).unwrap();
        // The first packet is dropped, and the next one is sent a second later.
        assert!(connects(&world, heard[0], ALLOWED));
    }
    assert!(denied(&mut reader) > 0, "the comparison is blind");
}

#[test]
fn names_that_no_policy_means_are_answered_and_closed_and_an_alias_is_known_by_its_own_name() {
    if !can_run() {
        return;
    }
    let (world, owner) = world();
    let _server = server(&world);
    let proxy = proxy(&world, Arc::new(owner.learner()));
    let heard = resolve(&world, "n1.example.com").unwrap();
    assert!(!connects(&world, heard[0], DENIED), "another name of the address has not been asked for");
    assert_eq!(resolve(&world, "alias.db.example.com").unwrap(), heard);
    assert!(connects(&world, heard[0], ALLOWED));
    assert!(!connects(&world, [192, 0, 2, 2].into(), DENIED), "nobody has asked for this one");
    // What was learnt stays in force without the owner; what is new is not released.
    drop(owner);
    assert!(connects(&world, heard[0], ALLOWED));
    assert_eq!(resolve(&world, "n2.db.example.com"), Err(ResponseCode::ServFail));
    assert_eq!(resolve(&world, "n2.example.com").unwrap(), [IpAddr::from([192, 0, 2, 2])]);
    assert!(proxy.counts().withheld > 0);
}
