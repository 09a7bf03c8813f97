//! What the host translates for pods: masquerading and mapped ports, seen by real callers. What is entered is read back by
//! nft(8), which shares nothing with us.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestNetNs, require};
use serde_json::{Value, json};

use crate::common::{Node, Pod, elements, has_nft};

/// Addresses of the host and of the world outside, on the link between them.
const HOST: [&str; 2] = ["192.0.2.1", "2001:db8:f::1"];
const OUTSIDE: [&str; 2] = ["192.0.2.9", "2001:db8:f::9"];
/// The pods' gateways.
const GATEWAYS: [&str; 2] = ["10.20.0.1", "2001:db8:20::1"];
/// Long enough for any machine; what comes is waited for no longer than it takes.
const LONG: Duration = Duration::from_secs(20);
/// For what must not come.
const SHORT: Duration = Duration::from_millis(700);

/// A host, and a namespace outside that knows the way to the pods' own addresses.
fn node() -> (Node, TestNetNs) {
    with_outside(Node::new())
}

fn with_outside(node: Node) -> (Node, TestNetNs) {
    let outside = node.host.new_pod();
    let host = node.host.root();
    host.sh(&format!("ip link add up0 type veth peer name out0 netns {}", outside.path().display()));
    for (netns, link, addresses) in [(host, "up0", HOST), (&outside, "out0", OUTSIDE)] {
        // A host without a link-local address asks for no neighbour on behalf of packets that it forwards.
        netns.sh(&format!(
            "ip addr add fe80::{}/64 dev {link} nodad; ip link set {link} addrgenmode none; ip link set {link} up; ip addr add {}/24 dev {link}; \
             ip addr add {}/64 dev {link} nodad",
            addresses[1].rsplit(':').next().unwrap(),
            addresses[0],
            addresses[1]
        ));
    }
    outside.sh(&format!("ip route add 10.20.0.0/24 via {}; ip route add 2001:db8:20::/64 via {}", HOST[0], HOST[1]));
    (node, outside)
}

/// Answers on a port, over TCP and UDP, with its name and the address of whoever asks.
struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start(netns: &TestNetNs, address: &str, port: u16, name: &str) -> Self {
        let at = SocketAddr::new(address.parse().unwrap(), port);
        let (tcp, udp) = netns.run(|| (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap()));
        tcp.set_nonblocking(true).unwrap();
        udp.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, own) = (stop.clone(), name.to_owned());
        let over_tcp = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match tcp.accept() {
                    // A caller that gave up hears nothing.
                    Ok((mut stream, from)) => drop(write!(stream, "{own} {}", from.ip().to_canonical())),
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        let (stopped, own) = (stop.clone(), name.to_owned());
        let over_udp = std::thread::spawn(move || {
            let mut bytes = [0; 64];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((_, from)) = udp.recv_from(&mut bytes) {
                    drop(udp.send_to(format!("{own} {}", from.ip().to_canonical()).as_bytes(), from));
                }
            }
        });
        Self { stop, threads: vec![over_tcp, over_udp] }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("a server does not panic");
        }
    }
}

fn over_tcp(client: &TestNetNs, to: &str, port: u16, limit: Duration) -> io::Result<String> {
    let to = SocketAddr::new(to.parse::<IpAddr>().unwrap(), port);
    client.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, limit)?;
        stream.set_read_timeout(Some(limit))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

fn udp_socket(client: &TestNetNs, to: &str, port: u16) -> UdpSocket {
    let to = SocketAddr::new(to.parse::<IpAddr>().unwrap(), port);
    client.run(|| {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        socket
    })
}

/// Asks until there is an answer.
fn ask(socket: &UdpSocket, limit: Duration) -> io::Result<String> {
    let begun = Instant::now();
    loop {
        let mut bytes = [0; 64];
        // A port at which nobody listens is refused for a while.
        let answered = socket.send(b"who").and_then(|_| socket.recv(&mut bytes));
        match answered {
            Ok(len) => return Ok(String::from_utf8_lossy(&bytes[..len]).into_owned()),
            Err(error) if begun.elapsed() > limit => return Err(error),
            Err(_) => {}
        }
    }
}

fn over_udp(client: &TestNetNs, to: &str, port: u16, limit: Duration) -> io::Result<String> {
    ask(&udp_socket(client, to, port), limit)
}

/// Asserts that over both transports `to` answers as `expected`.
fn assert_answers(client: &TestNetNs, to: &str, port: u16, expected: &str) {
    for (transport, answer) in [("tcp", over_tcp(client, to, port, LONG)), ("udp", over_udp(client, to, port, LONG))] {
        assert_eq!(
            answer.unwrap_or_else(|e| panic!("{transport} {to} {port}: {e}")),
            expected,
            "{transport} {to} {port}"
        );
    }
}

fn assert_silent(client: &TestNetNs, to: &str, port: u16) {
    for (transport, answer) in [("tcp", over_tcp(client, to, port, SHORT)), ("udp", over_udp(client, to, port, SHORT))]
    {
        assert!(answer.is_err(), "{transport} {to} {port}: {answer:?}");
    }
}

/// The pod's addresses, IPv4 first.
fn addresses(result: &Value) -> Vec<String> {
    let bare = |ip: &Value| ip["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
    result["ips"].as_array().unwrap().iter().map(bare).collect()
}

fn map(node: &mut Node, mappings: Value) {
    node.config["runtimeConfig"] = json!({ "portMappings": mappings });
}

fn both(host_port: u16, container_port: u16) -> Value {
    let one = |protocol: &str| json!({ "hostPort": host_port, "containerPort": container_port, "protocol": protocol });
    json!([one("tcp"), one("udp")])
}

#[test]
fn a_masqueraded_pod_bears_the_hosts_address_outside_and_its_own_at_home() {
    if !has_nft() {
        return;
    }
    let (mut node, outside) = node();
    let (plain, pod, other) = (node.pod("plain"), node.pod("web"), node.pod("cache"));
    // The world knows the way to pods, so that the twin without masquerading is heard too.
    let own = addresses(&node.add(&plain).unwrap());
    let _outside = Server::start(&outside, "::", 7000, "outside");
    node.host.root().sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    for (to, own) in OUTSIDE.iter().zip(&own) {
        assert_answers(&plain.netns, to, 7000, &format!("outside {own}"));
    }
    assert_eq!(elements(&node), [""; 0]);
    node.host.root().sh("sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0");

    node.config["nat"] = json!({ "masquerade": true });
    let result = node.add(&pod).unwrap();
    let own = addresses(&result);
    // What is on already is not written again: that would set every link.
    let host = node.host.root();
    host.sh("ip link add keep0 type bridge; sysctl -qw net.ipv6.conf.keep0.forwarding=0");
    node.add(&other).unwrap();
    assert_eq!(host.sh("sysctl -n net.ipv6.conf.all.forwarding net.ipv6.conf.keep0.forwarding"), "1\n0\n");
    for (to, host) in OUTSIDE.iter().zip(HOST) {
        assert_answers(&pod.netns, to, 7000, &format!("outside {host}"));
    }
    let _neighbour = Server::start(&other.netns, "::", 7000, "neighbour");
    let neighbour = ["10.20.0.4", "2001:db8:20::4"];
    for (to, own) in neighbour.iter().zip(&own) {
        assert_answers(&pod.netns, to, 7000, &format!("neighbour {own}"));
    }
    node.check(&pod, &result).unwrap();
    for name in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
        node.host.root().sh(&format!("sysctl -qw {name}=0"));
        let error = node.check(&pod, &result).unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains(&format!("{name} is not 1")), "{error}");
        node.host.root().sh(&format!("sysctl -qw {name}=1"));
    }
    node.check(&pod, &result).unwrap();
    let listed = elements(&node);
    assert_eq!(listed.len(), 12, "{listed:?}");
    assert!(listed.iter().any(|l| l.starts_with("home4 ") && l.contains(&own[0]) && l.contains("24")), "{listed:?}");

    node.del(&pod).unwrap();
    assert_eq!(elements(&node).len(), 6);
    node.del(&other).unwrap();
    assert_eq!(elements(&node), [""; 0]);
    node.gc(Some(&[])).unwrap();
    assert!(!node.host.root().sh("nft list tables").contains("dcenet"));
}

#[test]
fn a_mapped_port_is_reached_from_outside_from_the_host_and_from_pods() {
    if !has_nft() {
        return;
    }
    let (mut node, outside) = node();
    let (pod, neighbour) = (node.pod("web"), node.pod("cache"));
    node.add(&neighbour).unwrap();
    map(&mut node, both(8080, 80));
    let result = node.add(&pod).unwrap();
    let own = addresses(&result);
    let _server = Server::start(&pod.netns, "::", 80, "web");
    for family in [0, 1] {
        // The pod knows who called, but for those whom it would answer past the host.
        assert_answers(&outside, HOST[family], 8080, &format!("web {}", OUTSIDE[family]));
        assert_answers(node.host.root(), HOST[family], 8080, &format!("web {}", HOST[family]));
        for caller in [&neighbour, &pod] {
            assert_answers(&caller.netns, HOST[family], 8080, &format!("web {}", GATEWAYS[family]));
        }
        assert_answers(&neighbour.netns, &own[family], 80, &format!("web {}", ["10.20.0.2", "2001:db8:20::2"][family]));
        // The port of others is theirs.
        let _theirs = Server::start(&outside, OUTSIDE[family], 8080, "outside");
        node.host.root().sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let seen = ["10.20.0.2", "2001:db8:20::2"][family];
        assert_answers(&neighbour.netns, OUTSIDE[family], 8080, &format!("outside {seen}"));
    }
    assert_answers(node.host.root(), "127.0.0.1", 8080, "web 10.20.0.1");
    node.check(&pod, &result).unwrap();

    node.del(&pod).unwrap();
    assert_eq!(elements(&node), [""; 0]);
    for to in HOST {
        assert_silent(&outside, to, 8080);
    }
    assert_silent(node.host.root(), "127.0.0.1", 8080);
}

#[test]
fn a_port_at_one_address_is_at_that_address_only() {
    if !has_nft() {
        return;
    }
    let (mut node, outside) = node();
    node.host.root().sh("ip addr add 192.0.2.2/24 dev up0");
    let (first, second) = (node.pod("web"), node.pod("cache"));
    let at = |ip: &str| {
        let mut list = both(8080, 80);
        list.as_array_mut().unwrap().iter_mut().for_each(|m| m["hostIP"] = json!(ip));
        list
    };
    map(&mut node, at(HOST[0]));
    node.add(&first).unwrap();
    let _first = Server::start(&first.netns, "::", 80, "first");
    assert_answers(&outside, HOST[0], 8080, &format!("first {}", OUTSIDE[0]));
    for (client, to) in [(&outside, "192.0.2.2"), (&outside, HOST[1]), (node.host.root(), "127.0.0.1")] {
        assert_silent(client, to, 8080);
    }
    // The same port of another address is another's.
    map(&mut node, at("192.0.2.2"));
    node.add(&second).unwrap();
    let _second = Server::start(&second.netns, "::", 80, "second");
    assert_answers(&outside, HOST[0], 8080, &format!("first {}", OUTSIDE[0]));
    assert_answers(&outside, "192.0.2.2", 8080, &format!("second {}", OUTSIDE[0]));
}

#[test]
fn a_port_that_another_has_is_refused_with_its_name() {
    if !has_nft() {
        return;
    }
    let (mut node, _outside) = node();
    let (holder, rival) = (node.pod("web"), node.pod("cache"));
    map(&mut node, both(8080, 80));
    node.add(&holder).unwrap();
    let (before, inside, entered) = (node.host.state(), rival.state(), elements(&node));
    let one = |ip: &str| json!([{ "hostPort": 8080, "containerPort": 81, "protocol": "tcp", "hostIP": ip }]);
    for mappings in [both(8080, 81), one(HOST[0]), one("::")] {
        map(&mut node, mappings);
        let error = node.add(&rival).unwrap_err();
        assert_eq!(error["code"], 112, "{error}");
        let message = error["msg"].as_str().unwrap();
        assert!(
            message.contains(&format!("shop/{}/eth0", holder.container)) && message.contains("port 8080/"),
            "{error}"
        );
        // A DEL follows every failed ADD.
        node.del(&rival).unwrap();
        assert_eq!(elements(&node), entered);
    }
    assert_eq!(before.diff(&node.host.state()), "");
    assert_eq!(inside.diff(&rival.state()), "");
    // The same port of another protocol is free, and the port itself when its holder is gone.
    map(&mut node, json!([{ "hostPort": 8080, "containerPort": 81, "protocol": "sctp" }]));
    node.add(&rival).unwrap();
    node.del(&rival).unwrap();
    node.del(&holder).unwrap();
    map(&mut node, both(8080, 81));
    node.add(&rival).unwrap();
}

/// A sender that never pauses keeps its flow alive in the kernel, with the way that it took first.
#[test]
fn a_udp_sender_that_never_pauses_follows_the_port() {
    if !has_nft() {
        return;
    }
    let (mut node, outside) = node();
    // Flows are tracked from the first mapped port on.
    let anybody = node.pod("anybody");
    map(&mut node, both(9, 9));
    let unmapped = addresses(&node.add(&anybody).unwrap());
    let _anybody = Server::start(&anybody.netns, "::", 80, "anybody");
    let (sender, twin) = (udp_socket(&outside, HOST[0], 8080), udp_socket(&outside, HOST[0], 8081));
    for socket in [&sender, &twin] {
        ask(socket, Duration::ZERO).unwrap_err();
    }
    // The twin: the same entry made by somebody who does not look at flows.
    node.host.root().sh(&format!("nft add element inet dcenet ports4 '{{ udp . 8081 : {} . 80 }}'", unmapped[0]));
    ask(&twin, SHORT).unwrap_err();
    assert!(ask(&udp_socket(&outside, HOST[0], 8081), LONG).is_ok());

    map(&mut node, both(8080, 80));
    for name in ["first", "second"] {
        let pod = node.pod(name);
        node.add(&pod).unwrap();
        let _server = Server::start(&pod.netns, "::", 80, name);
        assert_eq!(ask(&sender, LONG).unwrap(), format!("{name} {}", OUTSIDE[0]));
        node.del(&pod).unwrap();
        ask(&sender, Duration::ZERO).unwrap_err();
    }
}

/// Answers to 127.0.0.1 come in from pods: nothing else may.
#[test]
fn the_hosts_loopback_is_closed_to_pods() {
    if !has_nft() {
        return;
    }
    let (mut node, _outside) = node();
    let pod = node.pod("web");
    map(&mut node, both(8080, 80));
    node.add(&pod).unwrap();
    let _private = Server::start(node.host.root(), "127.0.0.1", 9000, "private");
    pod.netns.sh("ip addr del 127.0.0.1/8 dev lo; sysctl -qw net.ipv4.conf.eth0.route_localnet=1; \
         ip route add 127.0.0.0/8 via 10.20.0.1");
    assert_silent(&pod.netns, "127.0.0.1", 9000);
    node.host.root().sh("nft flush chain inet dcenet guard");
    assert!(over_tcp(&pod.netns, "127.0.0.1", 9000, LONG).is_ok(), "the twin without the guard is let in");
}

#[test]
fn check_tells_what_is_missing_and_add_makes_the_table_whole() {
    if !has_nft() {
        return;
    }
    let (mut node, outside) = node();
    let pod = node.pod("web");
    map(&mut node, both(8080, 80));
    node.config["nat"] = json!({ "masquerade": true });
    let result = node.add(&pod).unwrap();
    let drift = |node: &Node| node.check(&pod, &result).unwrap_err();
    node.host.root().sh("nft delete element inet dcenet ports4 '{ tcp . 8080 }'");
    let error = drift(&node);
    assert_eq!(error["code"], 120);
    assert!(error["msg"].as_str().unwrap().contains("port 8080/tcp"), "{error}");
    node.host.root().sh("nft flush table inet dcenet");
    assert!(drift(&node)["msg"].as_str().unwrap().contains("rules of nftables table inet dcenet are gone"));
    // As a reload of somebody's rule set does.
    node.host.root().sh("nft flush ruleset");
    assert_eq!(node.add(&pod).unwrap(), result);
    node.check(&pod, &result).unwrap();
    // What is gone with the table is no reason not to go.
    node.host.root().sh("nft delete table inet dcenet");
    node.del(&pod).unwrap();

    node.add(&pod).unwrap();
    let _server = Server::start(&pod.netns, "::", 80, "web");
    node.host.root().sh("nft flush table inet dcenet");
    assert_silent(&outside, HOST[0], 8080);
    // The next pod's ADD writes the rules once more.
    node.config.as_object_mut().unwrap().remove("runtimeConfig");
    node.add(&node.pod("cache")).unwrap();
    assert_answers(&outside, HOST[0], 8080, &format!("web {}", OUTSIDE[0]));
}

#[test]
fn gc_removes_what_nobody_has_and_leaves_others_alone() {
    if !has_nft() {
        return;
    }
    let (mut node, _outside) = node();
    node.host
        .root()
        .sh("nft add table inet theirs; nft add chain inet theirs post '{ type nat hook postrouting priority 90; }'; \
         nft add rule inet theirs post ip saddr 10.99.0.0/16 masquerade");
    let theirs = |node: &Node| node.host.root().sh("nft list table inet theirs");
    let before = theirs(&node);
    let (lost, kept, stale) = (node.pod("lost"), node.pod("kept"), node.pod("stale"));
    for (pod, port) in [(&lost, 1001), (&kept, 1002), (&stale, 1003)] {
        map(&mut node, both(port, 80));
        node.add(pod).unwrap();
    }
    // Its record is lost, and its device with it.
    let of_lost: Vec<String> = elements(&node).into_iter().filter(|l| l.contains(&lost.container)).collect();
    assert!(!of_lost.is_empty());
    let key: dcenet_core::model::AttachmentKey =
        serde_json::from_value(json!({ "network": "shop", "container": lost.container, "ifname": "eth0" })).unwrap();
    std::fs::remove_file(node.host.run_dir().join("attachments").join(key.id().to_string())).unwrap();
    node.host.root().sh(&format!("ip link del {}", key.id().host_ifname()));

    // An element of another network's attachment, whose record is nowhere either.
    let foreign = "nft add element inet dcenet masquerade4 '{ 10.77.0.1 comment \"dcenet:other/c/eth0\" }'";
    node.host.root().sh(foreign);
    node.gc(Some(&[&kept])).unwrap();
    let left = elements(&node);
    let of = |pod: &Pod| left.iter().filter(|l| l.contains(&pod.container)).count();
    assert_eq!((of(&lost), of(&stale)), (0, 0), "{left:?}");
    assert!(of(&kept) > 0 && left.iter().any(|l| l.contains("10.77.0.1")), "{left:?}");
    assert_eq!(theirs(&node), before);
    node.gc(Some(&[])).unwrap();
    assert_eq!(elements(&node).len(), 1);
    assert_eq!(theirs(&node), before);
}

#[test]
fn what_cannot_be_translated_is_refused() {
    if !has_nft() {
        return;
    }
    let (mut node, _outside) = node();
    let pod = node.pod("web");
    let before = node.host.state();
    node.config["link"] = json!({ "kind": "macvlan", "parent": "up0" });
    node.config["nat"] = json!({ "masquerade": true });
    let error = node.add(&pod).unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    assert!(error["msg"].as_str().unwrap().starts_with("nat.masquerade"), "{error}");
    node.config["link"] = json!({ "kind": "veth" });
    node.config["nat"] = json!({ "masqueraed": true });
    let error = node.add(&pod).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("did you mean `masquerade`?"), "{error}");
    assert_eq!(before.diff(&node.host.state()), "");
}

/// Without a bridge every pod answers by way of the host.
#[test]
fn a_routed_pod_is_translated_too() {
    if !has_nft() {
        return;
    }
    let (mut node, outside) = node();
    node.config["link"] = json!({ "kind": "veth" });
    node.config["nat"] = json!({ "masquerade": true });
    let (pod, neighbour) = (node.pod("web"), node.pod("cache"));
    let of_neighbour = addresses(&node.add(&neighbour).unwrap());
    map(&mut node, both(8080, 80));
    node.add(&pod).unwrap();
    let _servers = [Server::start(&pod.netns, "::", 80, "web"), Server::start(&outside, "::", 7000, "outside")];
    for family in [0, 1] {
        assert_answers(&pod.netns, OUTSIDE[family], 7000, &format!("outside {}", HOST[family]));
        assert_answers(&outside, HOST[family], 8080, &format!("web {}", OUTSIDE[family]));
        assert_answers(&neighbour.netns, HOST[family], 8080, &format!("web {}", of_neighbour[family]));
        assert!(over_tcp(&pod.netns, HOST[family], 8080, LONG).unwrap().starts_with("web "));
    }
    assert!(over_tcp(node.host.root(), "127.0.0.1", 8080, LONG).unwrap().starts_with("web "));
}

/// Policy sees who really calls, and whom the pod really calls.
#[test]
fn what_policy_denies_is_not_translated_past_it() {
    if !require(Rung::Kernel) || !has_nft() {
        return;
    }
    let (mut node, outside) = with_outside(Node::under_policy());
    node.config["nat"] = json!({ "masquerade": true });
    let (open, closed) = (node.pod("web"), node.pod("db"));
    // The policy selects `app: db` alone, and lets it talk to its like.
    for (pod, app, port) in [(&open, "web", 8080), (&closed, "db", 8081)] {
        node.config["args"] = json!({ "cni": { "labels": [{ "key": "app", "value": app }] } });
        map(&mut node, both(port, 80));
        node.add(pod).unwrap();
    }
    let _servers = [
        Server::start(&open.netns, "::", 80, "open"),
        Server::start(&closed.netns, "::", 80, "closed"),
        Server::start(&outside, "::", 7000, "outside"),
    ];
    for family in [0, 1] {
        assert_answers(&open.netns, OUTSIDE[family], 7000, &format!("outside {}", HOST[family]));
        assert_answers(&outside, HOST[family], 8080, &format!("open {}", OUTSIDE[family]));
        assert_silent(&closed.netns, OUTSIDE[family], 7000);
        assert_silent(&outside, HOST[family], 8081);
        // Not by the mapped port of the node either, though the node itself is let in, by the address that its owner knows.
        assert_silent(&open.netns, HOST[family], 8081);
        assert!(over_tcp(node.host.root(), GATEWAYS[family], 8081, LONG).unwrap().starts_with("closed "));
    }
    for pod in [&open, &closed] {
        node.del(pod).unwrap();
    }
    assert_eq!(elements(&node), [""; 0]);
    assert!(!node.policy().iter().any(|line| line.starts_with("endpoint ")), "{:?}", node.policy());
}

/// Packets to 127.0.0.0/8 come in by the bridge as long as a mapped port needs it.
#[test]
fn a_bridge_is_as_it_was_when_the_last_mapped_port_has_gone() {
    if !has_nft() {
        return;
    }
    let (mut node, _outside) = node();
    let plain = node.pod("plain");
    node.add(&plain).unwrap();
    let is = |node: &Node| node.host.root().sh("sysctl -n net.ipv4.conf.dc0.route_localnet");
    for before in ["0\n", "1\n"] {
        node.host.root().sh(&format!("sysctl -qw net.ipv4.conf.dc0.route_localnet={before}"));
        let pods = ["first", "second", "third"].map(|name| node.pod(name));
        for (pod, port) in pods.iter().zip(8080..) {
            map(&mut node, both(port, 80));
            node.add(pod).unwrap();
            assert_eq!(is(&node), "1\n");
        }
        let _server = Server::start(&pods[2].netns, "::", 80, "third");
        node.del(&pods[0]).unwrap();
        node.del(&pods[1]).unwrap();
        assert_eq!(is(&node), "1\n", "the third needs it");
        assert_answers(node.host.root(), "127.0.0.1", 8082, "third 10.20.0.1");
        node.del(&pods[2]).unwrap();
        assert_eq!(is(&node), before);
    }
}

/// As above, of pods that come at once and go at once, beside some without ports.
#[test]
fn a_bridge_is_as_it_was_after_pods_with_ports_came_and_went_at_once() {
    if !has_nft() {
        return;
    }
    let (mut node, _outside) = node();
    node.warm();
    let is = |node: &Node| node.host.root().sh("sysctl -n net.ipv4.conf.dc0.route_localnet");
    let pods: Vec<_> = (0..8_u16).map(|n| (node.pod("web"), (n % 4 < 3).then_some(8080 + n))).collect();
    let configs: Vec<String> = pods
        .iter()
        .map(|(_, port)| {
            map(&mut node, port.map_or_else(|| json!([]), |port| both(port, 80)));
            node.config.to_string()
        })
        .collect();
    for before in ["0\n", "1\n"] {
        node.host.root().sh(&format!("sysctl -qw net.ipv4.conf.dc0.route_localnet={before}"));
        for verb in ["ADD", "DEL"] {
            std::thread::scope(|scope| {
                for ((pod, _), config) in pods.iter().zip(&configs) {
                    let node = &node;
                    scope.spawn(move || node.call(verb, pod, config).unwrap());
                }
            });
            assert_eq!(is(&node), if verb == "ADD" { "1\n" } else { before });
        }
    }
    assert_eq!((elements(&node), node.host.records()), (Vec::new(), Vec::new()));
}
