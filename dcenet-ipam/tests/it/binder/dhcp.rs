//! The DHCP binder against Debian's dnsmasq, over a veth pair.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dcenet_core::netns::NetNs;
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, require_with};
use dcenet_ipam::Ipam;
use dcenet_ipam::binder::conformance::{check_binder, check_source};
use dcenet_ipam::binder::dhcp::{DhcpBinder, DhcpConfig};
use dcenet_ipam::binder::{AddressBinder, BindError, BindRequest, BindToken, BinderSource, OutsideSource, Renewer};
use dcenet_ipam::groups::Grouping;
use dcenet_ipam::model::AddressSpace;
use dcenet_ipam::store::Store;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::memory::MemoryStore;
use ipnet::IpNet;
use pollster::block_on;

use super::outside_source;
use crate::{attachment, config, request, texts};

const PROGRAM: &str = "/usr/sbin/dnsmasq";

fn can_run() -> bool {
    let missing = || (!Path::new(PROGRAM).exists()).then(|| "needs Debian's dnsmasq-base".to_owned());
    require_with(Rung::Services, missing)
}

/// A host whose device `c0` leads to a dnsmasq in another namespace.
struct World {
    server: Option<Child>,
    place: TestNetNs,
    dir: tempfile::TempDir,
    host: TestHost,
}

impl World {
    /// With this range, and these further lines of configuration.
    fn new(range: &str, further: &str) -> Self {
        let host = TestHost::new();
        let place = host.new_pod();
        host.root().sh(&format!("ip link add c0 type veth peer name s0 netns {}", place.path().display()));
        host.root().sh("ip link set c0 up");
        for device in ["all", "c0"] {
            host.root().sysctl(&format!("ipv4/conf/{device}/rp_filter"), "0");
        }
        place.sh("ip address add 10.9.0.1/24 dev s0; ip link set s0 up");
        let mut world = Self { server: None, place, dir: tempfile::tempdir().unwrap(), host };
        world.start(range, further);
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&mut self, range: &str, further: &str) {
        let text = format!(
            "port=0\ninterface=s0\nbind-interfaces\nexcept-interface=lo\nuser=root\nno-ping\ndhcp-authoritative\n\
             dhcp-range={range},255.255.255.0,2m\ndhcp-leasefile={}\nlog-facility={}\nlog-dhcp\npid-file=\n{further}\n",
            self.path("leases").display(),
            self.path("log").display()
        );
        fs::write(self.path("conf"), text).unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("--keep-in-foreground").arg(format!("--conf-file={}", self.path("conf").display()));
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        self.server = Some(self.place.run(|| command.spawn()).unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.binder().probe().unwrap().is_none() {
            if let Some(status) = self.server.as_mut().unwrap().try_wait().unwrap() {
                let mut text = String::new();
                let errors = self.server.as_mut().unwrap().stderr.as_mut().unwrap();
                std::io::Read::read_to_string(errors, &mut text).unwrap();
                panic!("dnsmasq ended with {status}: {text}");
            }
            assert!(Instant::now() < deadline, "dnsmasq does not answer: {}", self.log());
        }
    }

    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn binder(&self) -> DhcpBinder {
        let first = Duration::from_millis(400);
        let config = DhcpConfig { first, tries: 4, ..DhcpConfig::new("c0".parse().unwrap()) };
        let netns = NetNs::open(self.host.root().path()).unwrap();
        DhcpBinder::new(config).unwrap().in_netns(Arc::new(netns))
    }

    fn source(&self, store: Arc<dyn Store>) -> OutsideSource<DhcpBinder> {
        OutsideSource::new(store, AddressSpace::default(), "lan", Arc::new(self.binder())).unwrap()
    }

    /// The lines of dnsmasq's lease file by address: when each ends, in seconds since 1970.
    fn leases(&self) -> BTreeMap<IpAddr, u64> {
        // What was sent before this is answered has been written down: one process, one socket, one file.
        assert!(self.binder().probe().unwrap().is_some(), "dnsmasq is gone, or full: {}", self.log());
        let text = fs::read_to_string(self.path("leases")).unwrap();
        let words = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        words.filter(|w| w.len() == 5).map(|w| (w[2].parse().unwrap(), w[0].parse().unwrap())).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop();
    }
}

fn wanted(container: &str, sequence: u64) -> BindRequest {
    let token = BindToken { attachment: attachment(container), sequence };
    BindRequest { token, addresses: vec![], mac: attachment(container).mac(), workload: None }
}

#[test]
fn the_dhcp_binder_conforms() {
    if !can_run() {
        return;
    }
    let world = World::new("10.9.0.10,10.9.0.60", "");
    let outside = || world.leases().into_keys().collect::<BTreeSet<_>>();
    block_on(check_binder(&world.binder(), &[], &outside, 1));
    let make =
        || -> (Arc<dyn Store>, Arc<dyn AddressBinder>) { (Arc::new(MemoryStore::new()), Arc::new(world.binder())) };
    let tally = block_on(check_source(&make, &outside_source, &outside, 3));
    println!("{tally:?}");
    assert!(tally.runs > 30 && tally.kills > 10 && tally.differed > 3, "{tally:?}");
}

#[test]
fn a_lease_survives_a_restart_and_is_renewed_and_released() {
    if !can_run() {
        return;
    }
    let further = "dhcp-option=option:router,10.9.0.1\ndhcp-option=option:dns-server,10.9.0.53\ndomain=example.test";
    let world = World::new("10.9.0.10,10.9.0.60", further);
    let open = || -> Arc<dyn Store> { Arc::new(LogStore::open(&world.path("store")).unwrap()) };
    let lease = block_on(world.source(open()).lease(&request("c1", Some("shop/web")))).unwrap();
    let address = lease.addresses[0].address;
    assert_eq!((address.prefix_len(), lease.addresses[0].gateway), (24, Some("10.9.0.1".parse().unwrap())));
    assert_eq!(
        (&lease.dns.nameservers[..], lease.dns.domain.as_deref()),
        (&["10.9.0.53".to_owned()][..], Some("example.test"))
    );
    assert_eq!(lease.routes[0].destination.to_string(), "0.0.0.0/0");
    let before = world.leases();
    assert!(before.contains_key(&address.addr()), "{before:?}");
    // A restart: everything of ours is new but the store. The same answer, and the server is not asked.
    let requests = |world: &World| world.log().matches("DHCPREQUEST").count();
    let asked = requests(&world);
    let source = world.source(open());
    assert_eq!(block_on(source.lease(&request("c1", None))).unwrap(), lease);
    assert_eq!(requests(&world), asked);
    let round = block_on(source.renew_due()).unwrap();
    assert_eq!((round.renewed, round.failures.len(), round.doomed.len()), (0, 0, 0));
    assert!(round.next.is_some());
    // The record has what a renewal needs.
    let stored = block_on(source_record(&open()));
    let bound = stored.expect("the record");
    thread::sleep(Duration::from_millis(1100));
    let renewed = block_on(world.binder().renew(&bound)).unwrap();
    assert_eq!(renewed.addresses, bound.addresses);
    assert!(renewed.until > bound.until && world.leases()[&address.addr()] > before[&address.addr()]);
    assert_eq!(requests(&world), asked + 1);
    // With the address in the namespace: by unicast, as a client does that is up.
    world.host.root().sh(&format!("ip address add {address} dev c0"));
    let again = block_on(world.binder().renew(&bound)).unwrap();
    assert_eq!(again.addresses, bound.addresses);
    assert!(again.until > renewed.until);
    world.host.root().sh(&format!("ip address del {address} dev c0"));
    // Others see the address as an ordinary one.
    let ours = Ipam::new(&config(r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/29" } ] }"#), open()).unwrap();
    assert_eq!(block_on(ours.bindings(None)).unwrap()[0].address, address);
    let groups = block_on(ours.groups(&Grouping::default())).unwrap();
    let text = groups.text(&"shop/web".parse().unwrap(), Default::default());
    assert_eq!((groups.groups.len(), text), (1, format!("{}/32\n", address.addr())));
    block_on(source.release(&attachment("c1"), lease.sequence() + 1)).unwrap();
    assert!(world.leases().contains_key(&address.addr()), "another lease's release");
    block_on(source.release(&attachment("c1"), lease.sequence())).unwrap();
    assert_eq!(world.leases(), BTreeMap::new());
    assert_eq!(block_on(ours.bindings(None)).unwrap(), []);
    assert_eq!(block_on(source.held(&attachment("c1"))).unwrap(), None);
}

/// What the store has of the one attachment.
async fn source_record(store: &Arc<dyn Store>) -> Option<dcenet_ipam::binder::Bound> {
    let found = store.scan(b"y/", None, 2).await.unwrap();
    let json: serde_json::Value = serde_json::from_slice(&found.first()?.1.value).unwrap();
    serde_json::from_value(json.get("bound")?.clone()).unwrap()
}

#[test]
fn routes_of_the_server_come_with_the_lease() {
    if !can_run() {
        return;
    }
    let further = "dhcp-option=option:classless-static-route,10.50.0.0/16,10.9.0.2,0.0.0.0/0,10.9.0.3";
    let world = World::new("10.9.0.10,10.9.0.20", further);
    let lease = block_on(world.source(Arc::new(MemoryStore::new())).lease(&request("c1", None))).unwrap();
    assert_eq!(lease.addresses[0].gateway, Some("10.9.0.3".parse().unwrap()));
    let routes: Vec<_> = lease.routes.iter().map(|r| format!("{} {}", r.destination, r.gateway.unwrap())).collect();
    assert_eq!(routes, ["10.50.0.0/16 10.9.0.2", "0.0.0.0/0 10.9.0.3"]);
}

#[test]
fn an_exhausted_server_is_an_error_in_bounded_time_and_nobody_gets_what_another_has() {
    if !can_run() {
        return;
    }
    let world = World::new("10.9.0.10,10.9.0.13", "");
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let source = world.source(store.clone());
    // Four clients at once, each with a socket of its own on the same port.
    let leases: Vec<_> = thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|i| {
                let source = &source;
                scope.spawn(move || {
                    let request = request(&format!("c{i}"), None);
                    // Offers are not reservations: of two who were offered the same, one is told no.
                    (0..20).find_map(|_| block_on(source.lease(&request)).ok()).expect("a lease")
                })
            })
            .collect();
        clients.into_iter().map(|c| c.join().unwrap()).collect()
    });
    let all: BTreeSet<_> = leases.iter().flat_map(texts).collect();
    assert_eq!(all.len(), 4, "{leases:?}");
    let records = || block_on(store.scan(b"", None, 99)).unwrap().len();
    let before = records();
    let error = block_on(source.lease(&request("c5", None))).unwrap_err();
    assert!(matches!(&error, LeaseError::Outside { retryable: true, .. }), "{error}");
    assert!(error.to_string().contains("has no address left") && error.to_string().contains("4 times"), "{error}");
    assert_eq!(records(), before, "the failed lease left something");
    let certain = block_on(world.binder().bind(&wanted("c6", 1))).unwrap_err();
    assert!(matches!(certain, BindError::NoAnswer { certain: true, asked: 4, .. }), "{certain}");
    block_on(source.release(&attachment("c2"), leases[2].sequence())).unwrap();
    let lease = block_on(source.lease(&request("c5", None))).unwrap();
    assert_eq!(texts(&lease), texts(&leases[2]));
    // A device that is not there.
    let nowhere = DhcpBinder::new(DhcpConfig::new("nowhere0".parse().unwrap())).unwrap();
    let error = block_on(nowhere.ready()).unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("nowhere0"), "{error}");
}

#[test]
fn a_lease_that_the_server_gave_up_is_lost_and_what_is_in_use_is_declined() {
    if !can_run() {
        return;
    }
    let mut world = World::new("10.9.0.10,10.9.0.12", "");
    let binder = world.binder();
    let bound = block_on(binder.bind(&wanted("c1", 1))).unwrap();
    let address = bound.addresses[0].address.addr();
    // DECLINE: the server keeps the address back, and has another.
    block_on(binder.decline(&bound, address)).unwrap();
    let other = block_on(binder.bind(&wanted("c1", 1))).unwrap();
    assert_ne!(other.addresses[0].address.addr(), address);
    assert!(world.log().contains("DHCPDECLINE"), "{}", world.log());
    let refused = block_on(binder.decline(&other, address)).unwrap_err();
    assert!(refused.to_string().contains("not what"), "{refused}");
    // The server comes back with another range and without its records: NAK.
    world.stop();
    fs::remove_file(world.path("leases")).unwrap();
    let gone = block_on(binder.renew(&other)).unwrap_err();
    assert!(matches!(gone, BindError::NoAnswer { .. }) && gone.is_retryable(), "{gone}");
    world.start("10.9.0.100,10.9.0.110", "");
    let lost = block_on(binder.renew(&other)).unwrap_err();
    assert!(matches!(lost, BindError::Lost { .. }) && !lost.is_retryable(), "{lost}");
    // The whole way: an address in use inside is declined.
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let json = r#"{ "pools": [ { "name": "p", "subnet": "10.9.0.96/27" } ] }"#;
    let inside = Ipam::new(&config(json), store.clone()).unwrap();
    for i in 0..30 {
        block_on(inside.lease(&request(&format!("in{i}"), None))).unwrap();
    }
    // All of the range is in use inside: the source gives up, and leaves nothing outside.
    let source = world.source(store);
    let error = block_on(source.lease(&request("c2", None))).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
    assert_eq!(world.leases(), BTreeMap::new());
    assert!(world.log().matches("DHCPDECLINE").count() >= 5);
}

/// Only who declined waits, and as long as RFC 2131 says (section 3.1, item 5).
#[test]
fn who_declined_an_address_waits_and_nobody_else_does() {
    if !can_run() {
        return;
    }
    let world = World::new("10.9.0.10,10.9.0.60", "");
    let binder = world.binder();
    let bound = block_on(binder.bind(&wanted("c1", 1))).unwrap();
    let declined = Instant::now();
    block_on(binder.decline(&bound, bound.addresses[0].address.addr())).unwrap();
    thread::scope(|scope| {
        let same = scope.spawn(|| (block_on(binder.bind(&wanted("c1", 1))).unwrap(), declined.elapsed()));
        let binder = &binder;
        let other = move |i: u64| block_on(binder.bind(&wanted(&format!("c{i}"), i))).unwrap();
        let others: Vec<_> = (2..6).map(|i| scope.spawn(move || other(i))).collect();
        for other in others {
            other.join().unwrap();
        }
        let (again, after) = same.join().unwrap();
        assert_ne!(again.addresses, bound.addresses);
        assert!(after >= Duration::from_secs(10), "{after:?}");
    });
    // The server heard all others first.
    let log = world.log();
    let since = &log[log.find("DHCPDECLINE").expect("a decline")..];
    let first = |container: &str| discovers(since, container).next().expect("a DISCOVER");
    for other in ["c2", "c3", "c4", "c5"] {
        assert!(first(other) < first("c1"), "{other} waited: {since}");
    }
}

/// The numbers of the lines that tell of a DISCOVER of the container's.
fn discovers<'a>(log: &'a str, container: &str) -> impl Iterator<Item = usize> + use<'a> {
    let mac = attachment(container).mac().to_string();
    let is = move |line: &str| line.contains("DHCPDISCOVER") && line.contains(&mac);
    log.lines().enumerate().filter(move |(_, line)| is(line)).map(|(number, _)| number)
}

/// RFC 2131, section 3.1, item 5, also where nobody knows what the token has.
#[test]
fn a_token_that_declined_is_released_without_a_discover() {
    if !can_run() {
        return;
    }
    let world = World::new("10.9.0.10,10.9.0.60", "");
    let binder = world.binder();
    let bound = block_on(binder.bind(&wanted("c1", 1))).unwrap();
    block_on(binder.decline(&bound, bound.addresses[0].address.addr())).unwrap();
    block_on(binder.release(&bound.token, None)).unwrap();
    assert_eq!(world.leases(), BTreeMap::new());
    let since = |log: String| discovers(&log[log.find("DHCPDECLINE").expect("a decline")..], "c1").count();
    assert_eq!(since(world.log()), 0, "{}", world.log());
    // Whoever knows of no decline asks, and so does this one once it has bound again.
    block_on(world.binder().release(&bound.token, None)).unwrap();
    world.leases();
    assert!(since(world.log()) > 0, "{}", world.log());
    let again = block_on(binder.bind(&wanted("c1", 1))).unwrap();
    assert!(world.leases().contains_key(&again.addresses[0].address.addr()));
    block_on(binder.release(&bound.token, None)).unwrap();
    assert_eq!(world.leases(), BTreeMap::new());
}

/// What a server of ours saw of a message: its type, xid, secs and ciaddr.
type Seen = (u8, [u8; 4], [u8; 2], [u8; 4]);

/// Offers one address and acknowledges another, until it is told a RELEASE.
fn false_server(place: &TestNetNs) -> thread::JoinHandle<Vec<Seen>> {
    let ears = place.run(|| UdpSocket::bind("0.0.0.0:67")).unwrap();
    let mouth = place.run(|| UdpSocket::bind("10.9.0.1:0")).unwrap();
    mouth.set_broadcast(true).unwrap();
    ears.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    thread::spawn(move || {
        let (mut seen, mut buffer) = (Vec::new(), [0; 1500]);
        loop {
            let Ok(length) = ears.recv(&mut buffer) else { return seen };
            let message = &buffer[..length];
            let (mut at, mut kind) = (240, 0);
            while let [code, size, ..] = message[at..]
                && code != 255
            {
                kind = if code == 53 { message[at + 2] } else { kind };
                at += 2 + usize::from(size);
            }
            let part = |from: usize| message[from..from + 4].try_into().unwrap();
            seen.push((kind, part(4), [message[8], message[9]], part(12)));
            let (answer, last) = match kind {
                1 => (2, 20),
                3 => (5, 21),
                _ => return seen,
            };
            let mut reply = message[..240].to_vec();
            reply[0] = 2;
            reply[16..20].copy_from_slice(&[10, 9, 0, last]);
            reply.extend([53, 1, answer, 54, 4, 10, 9, 0, 1, 51, 4, 0, 0, 1, 0, 255]);
            mouth.send_to(&reply, "255.255.255.255:68").unwrap();
        }
    })
}

#[test]
fn an_acknowledgement_of_another_address_than_was_asked_for_is_refused_and_released() {
    if !can_run() {
        return;
    }
    let mut world = World::new("10.9.0.10,10.9.0.60", "");
    world.stop();
    let server = false_server(&world.place);
    let error = block_on(world.binder().bind(&wanted("c1", 1))).unwrap_err();
    assert!(matches!(&error, BindError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("10.9.0.20 was asked for and 10.9.0.21"), "{error}");
    let seen = server.join().unwrap();
    let last = seen.last().unwrap();
    assert_eq!((last.0, last.3), (7, [10, 9, 0, 21]), "{seen:?}");
    // One exchange: xid and secs of REQUEST are those of DISCOVER (RFC 2131, sections 4.4.1 and 3.1, item 3).
    let of = |kind: u8| seen.iter().filter(move |s| s.0 == kind).map(|s| (s.1, s.2)).collect::<BTreeSet<_>>();
    assert!(of(3).is_subset(&of(1)) && of(3).len() == 1, "{seen:?}");
    assert_ne!(last.1, of(3).first().unwrap().0, "a release is an exchange of its own");
}

/// The server's shortest lease is of two minutes; it asks to be renewed every four seconds.
#[test]
fn a_renewer_keeps_a_lease_that_its_twin_loses() {
    if !can_run() {
        return;
    }
    let world = World::new("10.9.0.10,10.9.0.60", "dhcp-option=option:T1,4");
    let stores: [Arc<dyn Store>; 2] = [Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new())];
    let [kept, lost] = [0, 1].map(|i| {
        let lease = block_on(world.source(stores[i].clone()).lease(&request(&format!("c{i}"), None))).unwrap();
        lease.addresses[0].address
    });
    let asked = |address: IpNet| {
        let (request, answer) =
            (format!("DHCPREQUEST(s0) {} ", address.addr()), format!("DHCPACK(s0) {} ", address.addr()));
        (world.log().matches(&request).count(), world.log().matches(&answer).count())
    };
    // More than one where an answer came late.
    let at_first = asked(lost);
    assert!(at_first.0 >= 1 && at_first.1 >= 1, "{at_first:?}");
    // Its renewals are as those of a client that is up: to the server alone.
    world.host.root().sh(&format!("ip address add {kept} dev c0"));
    let source = Arc::new(world.source(stores[0].clone()));
    let before = block_on(source_record(&stores[0])).unwrap().until;
    let renewer = Renewer::new(source);
    let stop = renewer.stopper();
    let thread = thread::spawn(move || block_on(renewer.run()));
    let end = UNIX_EPOCH + Duration::from_millis(block_on(source_record(&stores[1])).unwrap().until.unwrap());
    thread::sleep(end.duration_since(SystemTime::now()).unwrap_or_default());
    stop.stop();
    thread.join().unwrap().unwrap();
    // From here on nobody else makes the server write.
    let deadline = Instant::now() + Duration::from_secs(60);
    while world.leases().contains_key(&lost.addr()) {
        assert!(Instant::now() < deadline, "the twin still has its lease: {}", world.log());
        thread::sleep(Duration::from_secs(1));
    }
    assert!(world.leases().contains_key(&kept.addr()), "{}", world.log());
    let (requests, answers) = asked(kept);
    assert!(requests >= 3 && answers >= 3, "{requests} requests and {answers} answers");
    assert_eq!(asked(lost), at_first, "somebody asked for it again");
    assert!(block_on(source_record(&stores[0])).unwrap().until > before);
}
