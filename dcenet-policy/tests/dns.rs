//! The DNS proxy between clients and servers on loopback: what it learns, when it releases answers, and what it refuses.
#![cfg(feature = "dns")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use dcenet_core::test_support::{Rung, TestHost, require};
use dcenet_policy::dns::{Learn, Proxy, ProxyConfig};
use dcenet_policy::enforcer::LearnError;
use dcenet_policy::model::{DomainName, NamePattern};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};

/// Long enough for anything that is to come.
const COMES: Duration = Duration::from_secs(30);

type Answer = Arc<dyn Fn(&Query) -> Vec<Record> + Send + Sync>;

/// A server that answers what a function says, on both transports, until the test's process ends.
fn server(answer: Answer) -> SocketAddr {
    server_with(ResponseCode::NoError, answer)
}

fn server_with(code: ResponseCode, answer: Answer) -> SocketAddr {
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = udp.local_addr().unwrap();
    let tcp = TcpListener::bind(address).unwrap();
    let own = Arc::clone(&answer);
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, client)) = udp.recv_from(&mut buffer) {
            let reply = reply(&buffer[..length], code, &own);
            // Such as somebody who guesses would send, with another number.
            let mut forged = reply.clone();
            forged[0] ^= 0xff;
            udp.send_to(&forged, client).unwrap();
            udp.send_to(&reply, client).unwrap();
        }
    });
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            let query = read_framed(&mut stream);
            write_framed(&mut stream, &reply(&query, code, &answer));
        }
    });
    address
}

fn reply(query: &[u8], code: ResponseCode, answer: &Answer) -> Vec<u8> {
    let query = Message::from_vec(query).unwrap();
    let mut reply = Message::response(query.metadata.id, OpCode::Query);
    reply.metadata.response_code = code;
    reply.add_queries(query.queries.clone());
    reply.add_answers(answer(&query.queries[0]));
    reply.to_vec().unwrap()
}

fn read_framed(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).unwrap();
    message
}

fn write_framed(stream: &mut TcpStream, message: &[u8]) {
    stream.write_all(&(message.len() as u16).to_be_bytes()).unwrap();
    stream.write_all(message).unwrap();
}

fn record(name: &str, ttl: u32, data: &str) -> Record {
    let data = match data.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => RData::A(A(address)),
        Ok(IpAddr::V6(address)) => RData::AAAA(AAAA(address)),
        Err(_) => RData::CNAME(CNAME(Name::from_ascii(data).unwrap())),
    };
    Record::from_rdata(Name::from_ascii(name).unwrap(), ttl, data)
}

fn query(name: &str) -> Vec<u8> {
    let mut query = Message::new(0x1234, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    query.to_vec().unwrap()
}

/// Who is told: what of, whether it may go on, and whether that is well.
#[derive(Default)]
struct Told {
    pattern: Option<NamePattern>,
    is_shut: Mutex<bool>,
    opened: Condvar,
    fails: bool,
    heard: Mutex<Vec<String>>,
}

impl Told {
    fn of(pattern: &str) -> Self {
        Self { pattern: Some(pattern.parse().unwrap()), ..Self::default() }
    }

    fn open(&self) {
        *self.is_shut.lock().unwrap() = false;
        self.opened.notify_all();
    }

    fn hear(&self, text: String) {
        self.heard.lock().unwrap().push(text);
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }
}

impl Learn for Told {
    fn is_client(&self, client: IpAddr) -> bool {
        client == Ipv4Addr::LOCALHOST
    }

    fn is_asked_for(&self, name: &DomainName) -> bool {
        match &self.pattern {
            Some(NamePattern::Exactly(wanted)) => name == wanted,
            Some(NamePattern::Below(parent)) => name.as_str().ends_with(&format!(".{parent}")),
            None => false,
        }
    }

    fn learn(&self, client: IpAddr, name: &DomainName, addresses: &[(IpAddr, Duration)]) -> Result<(), LearnError> {
        let mut is_shut = self.is_shut.lock().unwrap();
        while *is_shut {
            is_shut = self.opened.wait(is_shut).unwrap();
        }
        let told: BTreeMap<IpAddr, u64> = addresses.iter().map(|(address, ttl)| (*address, ttl.as_secs())).collect();
        self.hear(format!("{client}: {name} {told:?}"));
        if self.fails { Err(LearnError::NotStarted) } else { Ok(()) }
    }
}

fn proxy(told: &Arc<Told>, upstreams: &[SocketAddr]) -> Proxy {
    proxy_with(told, ProxyConfig { upstreams: upstreams.to_vec(), ..ProxyConfig::default() })
}

fn proxy_with(told: &Arc<Told>, config: ProxyConfig) -> Proxy {
    let listen = vec![(Ipv4Addr::LOCALHOST, 0).into()];
    let config = ProxyConfig { listen, timeout: Duration::from_secs(10), ..config };
    Proxy::start(config, Arc::clone(told) as _).unwrap()
}

fn client(proxy: &Proxy) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.connect(proxy.addresses()[0]).unwrap();
    socket.set_read_timeout(Some(COMES)).unwrap();
    socket
}

fn receive(client: &UdpSocket) -> Message {
    let mut buffer = [0; 2048];
    let length = client.recv(&mut buffer).unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

fn ask(proxy: &Proxy, name: &str) -> Message {
    let client = client(proxy);
    client.send(&query(name)).unwrap();
    let answer = receive(&client);
    assert_eq!(answer.metadata.id, 0x1234, "the number is the client's own");
    answer
}

#[test]
fn an_answer_is_released_after_it_has_been_learnt_and_others_need_not_wait() {
    let upstream = server(Arc::new(|query| vec![record(&query.name().to_ascii(), 30, "192.0.2.1")]));
    let told = Arc::new(Told { is_shut: Mutex::new(true), ..Told::of("db.example.com") });
    let proxy = proxy(&told, &[upstream]);
    let waiting = client(&proxy);
    waiting.send(&query("DB.example.com.")).unwrap();
    // Many others are answered in the meantime; what nobody asks for is not told.
    for _ in 0..20 {
        assert_eq!(ask(&proxy, "www.example.com.").answers.len(), 1);
    }
    waiting.set_nonblocking(true).unwrap();
    let early = waiting.recv(&mut [0; 512]).map_err(|error| error.kind());
    assert_eq!(early, Err(std::io::ErrorKind::WouldBlock));
    waiting.set_nonblocking(false).unwrap();
    assert_eq!(told.heard(), [""; 0]);
    told.open();
    let answer = receive(&waiting);
    told.hear("released".to_owned());
    assert_eq!(answer.answers, [record("DB.example.com.", 30, "192.0.2.1")]);
    assert_eq!(told.heard(), ["127.0.0.1: db.example.com {192.0.2.1: 30}", "released"]);
    let counts = proxy.counts();
    assert_eq!((counts.queries, counts.learnt, counts.withheld), (21, 1, 0));
}

#[test]
fn addresses_are_those_that_the_name_leads_to_and_times_to_live_are_bounded() {
    let upstream = server(Arc::new(|_| {
        vec![
            record("c.cdn.example.net.", 5, "192.0.2.3"),
            record("c.cdn.example.net.", 200_000, "2001:db8::3"),
            record("B.example.com.", 60, "c.cdn.example.net."),
            record("a.example.com.", 60, "b.example.com."),
            record("other.example.com.", 60, "192.0.2.66"),
            record("c.cdn.example.net.", 60, "127.0.0.1"),
            record("c.cdn.example.net.", 60, "::ffff:192.0.2.7"),
            record("c.cdn.example.net.", 60, "224.0.0.1"),
        ]
    }));
    let told = Arc::new(Told::of("*.example.com"));
    let proxy = proxy(&told, &[upstream]);
    let answer = ask(&proxy, "a.example.com.");
    assert_eq!(told.heard(), ["127.0.0.1: a.example.com {192.0.2.3: 5, 2001:db8::3: 86400}"]);
    let times: Vec<u32> = answer.answers.iter().map(|record| record.ttl).collect();
    assert_eq!(times, [5, 86_400, 60, 60, 60, 60, 60, 60]);
}

#[test]
fn what_cannot_be_learnt_is_not_released() {
    let upstream = server(Arc::new(|query| vec![record(&query.name().to_ascii(), 30, "192.0.2.1")]));
    let told = Arc::new(Told { fails: true, ..Told::of("db.example.com") });
    let proxy = proxy(&told, &[upstream]);
    let answer = ask(&proxy, "db.example.com.");
    assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::ServFail, 0));
    assert_eq!(answer.queries.len(), 1);
    assert_eq!(ask(&proxy, "www.example.com.").metadata.response_code, ResponseCode::NoError);
    assert_eq!(proxy.counts().withheld, 1);
}

#[test]
fn connections_are_served_and_their_answers_learnt() {
    let upstream = server(Arc::new(|query| vec![record(&query.name().to_ascii(), 30, "192.0.2.1")]));
    let told = Arc::new(Told::of("*.example.com"));
    let proxy = proxy(&told, &[upstream]);
    let mut stream = TcpStream::connect(proxy.addresses()[0]).unwrap();
    stream.set_read_timeout(Some(COMES)).unwrap();
    for name in ["a.example.com.", "b.example.com."] {
        write_framed(&mut stream, &query(name));
        let answer = Message::from_vec(&read_framed(&mut stream)).unwrap();
        assert_eq!(answer.answers, [record(name, 30, "192.0.2.1")]);
    }
    assert_eq!(told.heard(), ["127.0.0.1: a.example.com {192.0.2.1: 30}", "127.0.0.1: b.example.com {192.0.2.1: 30}"]);
}

#[test]
fn the_next_server_is_asked_where_one_is_silent_and_without_any_the_client_hears_so() {
    let upstream = server(Arc::new(|query| vec![record(&query.name().to_ascii(), 30, "192.0.2.1")]));
    // Bound, and nobody reads.
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let told = Arc::new(Told::default());
    let start = |upstreams: Vec<SocketAddr>| {
        let listen = vec![(Ipv4Addr::LOCALHOST, 0).into()];
        let timeout = Duration::from_millis(200);
        let config = ProxyConfig { listen, upstreams, timeout, ..ProxyConfig::default() };
        Proxy::start(config, Arc::clone(&told) as _).unwrap()
    };
    let silent = silent.local_addr().unwrap();
    // A server that fails does answer, and the next one is asked; where none does better, its answer counts.
    let failing = server_with(ResponseCode::ServFail, Arc::new(|_| Vec::new()));
    let refusing = server_with(ResponseCode::Refused, Arc::new(|_| Vec::new()));
    let answered_by =
        |upstreams: &[SocketAddr]| ask(&proxy(&told, upstreams), "www.example.com.").metadata.response_code;
    assert_eq!(answered_by(&[failing, refusing, upstream]), ResponseCode::NoError);
    assert_eq!(answered_by(&[refusing, failing]), ResponseCode::Refused);
    let answered = (0..50).any(|_| !ask(&start(vec![silent, upstream]), "www.example.com.").answers.is_empty());
    assert!(answered, "the second server has answered in time once");
    let alone = start(vec![silent]);
    assert_eq!(ask(&alone, "www.example.com.").metadata.response_code, ResponseCode::ServFail);
    assert_eq!(alone.counts().unanswered, 1);
}

#[test]
fn one_client_takes_no_more_than_its_places() {
    let upstream = server(Arc::new(|query| vec![record(&query.name().to_ascii(), 30, "192.0.2.1")]));
    let told = Arc::new(Told { is_shut: Mutex::new(true), ..Told::of("db.example.com") });
    let config = ProxyConfig { upstreams: vec![upstream], most_of_client: 2, ..ProxyConfig::default() };
    let proxy = proxy_with(&told, config);
    let waiting: Vec<UdpSocket> = (0..2).map(|_| client(&proxy)).collect();
    for client in &waiting {
        client.send(&query("db.example.com.")).unwrap();
    }
    // They are taken in the order in which they were sent.
    assert_eq!(ask(&proxy, "www.example.com.").metadata.response_code, ResponseCode::ServFail);
    assert_eq!(proxy.counts().refused, 1);
    told.open();
    waiting.iter().for_each(|client| assert_eq!(receive(client).answers.len(), 1));
    // A place is free a moment after its answer has come.
    let free = (0..1000).any(|_| ask(&proxy, "www.example.com.").metadata.response_code == ResponseCode::NoError);
    assert!(free);
}

/// Whoever reaches the address and is no endpoint hears nothing, unless the configuration says so.
#[test]
fn strangers_are_not_answered() {
    let upstream = server(Arc::new(|query| vec![record(&query.name().to_ascii(), 30, "192.0.2.1")]));
    let told = Arc::new(Told::of("db.example.com"));
    for (clients, answered) in [(vec![], false), (vec!["127.0.0.2/32".parse().unwrap()], true)] {
        let config = ProxyConfig { upstreams: vec![upstream], clients, ..ProxyConfig::default() };
        let proxy = proxy_with(&told, config);
        let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
        stranger.set_read_timeout(Some(Duration::from_millis(if answered { 20_000 } else { 200 }))).unwrap();
        stranger.connect(proxy.addresses()[0]).unwrap();
        stranger.send(&query("db.example.com.")).unwrap();
        assert_eq!(stranger.recv(&mut [0; 512]).is_ok(), answered);
        // The twin of the silence: an endpoint hears it.
        assert_eq!(ask(&proxy, "db.example.com.").answers.len(), 1);
        assert_eq!(proxy.counts().strangers, u64::from(!answered));
    }
}

#[test]
fn an_address_may_come_after_the_proxy_and_keeps_no_other_closed() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let netns = host.root();
    let addresses = ["192.0.2.77:53", "[2001:db8::77]:53"].map(|address| address.parse::<SocketAddr>().unwrap());
    let config = ProxyConfig {
        listen: addresses.to_vec(),
        // Nobody is there, which the proxy tells at once.
        upstreams: vec!["127.0.0.1:9".parse().unwrap()],
        clients: vec!["192.0.2.77/32".parse().unwrap(), "2001:db8::77/128".parse().unwrap()],
        ..ProxyConfig::default()
    };
    let proxy = netns.run(|| Proxy::start(config, Arc::new(Told::default()))).unwrap();
    assert_eq!(proxy.addresses(), addresses);
    netns.sh("ip address add 192.0.2.77/32 dev lo; ip address add 2001:db8::77/128 dev lo nodad");
    for address in addresses {
        let client = netns.run(|| UdpSocket::bind((address.ip(), 0))).unwrap();
        client.set_read_timeout(Some(COMES)).unwrap();
        client.connect(address).unwrap();
        client.send(&query("db.example.com.")).unwrap();
        assert_eq!(receive(&client).metadata.response_code, ResponseCode::ServFail);
    }
    assert!(!proxy.has_ended());
}

#[test]
fn what_is_no_query_is_refused_or_left_alone() {
    let told = Arc::new(Told::default());
    let upstream = server(Arc::new(|_| Vec::new()));
    let proxy = proxy(&told, &[upstream]);
    let client = client(&proxy);
    let mut response = query("a.example.com.");
    response[2] |= 0x80;
    for silent in [&b""[..], b"abc", &response] {
        client.send(silent).unwrap();
    }
    let mut update = query("a.example.com.");
    update[2] = (update[2] & !0x78) | 5 << 3;
    client.send(&update).unwrap();
    assert_eq!(receive(&client).metadata.response_code, ResponseCode::NotImp);
    let mut torn = query("a.example.com.");
    torn.truncate(20);
    client.send(&torn).unwrap();
    let answer = receive(&client);
    assert_eq!((answer.metadata.response_code, answer.metadata.id), (ResponseCode::FormErr, 0x1234));
}

#[test]
fn a_configuration_that_cannot_be_meant_is_refused_by_its_field() {
    let here: SocketAddr = (Ipv4Addr::LOCALHOST, 5353).into();
    let good =
        ProxyConfig { listen: vec![here], upstreams: vec![([192, 0, 2, 1], 53).into()], ..ProxyConfig::default() };
    for (config, told) in [
        (ProxyConfig { listen: Vec::new(), ..good.clone() }, "listen: []: must have an address"),
        (ProxyConfig { listen: vec![([0; 4], 53).into()], ..good.clone() }, "listen: 0.0.0.0:53: must be one address"),
        (ProxyConfig { upstreams: Vec::new(), ..good.clone() }, "upstreams: []: must have the address"),
        (ProxyConfig { upstreams: vec![here], ..good.clone() }, "upstreams: 127.0.0.1:5353: is the proxy itself"),
        (ProxyConfig { timeout: Duration::ZERO, ..good.clone() }, "timeout: 0: must be longer"),
        (ProxyConfig { most: 0, ..good.clone() }, "most: 0: must be at least 1"),
        (ProxyConfig { most_of_client: 0, ..good }, "most_of_client: 0: must be at least 1"),
    ] {
        let error = Proxy::start(config, Arc::new(Told::default())).unwrap_err().to_string();
        assert!(error.starts_with(told), "{error}");
    }
}
