//! Nodes as namespaces, pods by the engine, and traffic between them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use dcenet_core::fabric::{Fabric, FabricConfig, KernelEvents, Mode, Report};
use dcenet_core::netlink::{FABRIC_PROTOCOL, Family};
use dcenet_core::provider::{Dns, FabricNode, FabricTable, Lease, LeasedAddress};
use dcenet_core::test_support::{HostState, Rung, TestHost, TestNetNs, ping, require};

mod advertised;
mod repair;

#[path = "../common/mod.rs"]
mod common;

const SOON: Duration = Duration::from_secs(20);
const NEVER: Duration = Duration::from_millis(600);

/// Whether an answer comes to one of several requests: an IPv6 address takes packets a moment after it was entered, when the
/// kernel's work queue has come to it (`addrconf_dad_work` of `net/ipv6/addrconf.c`).
fn answers(from: &TestNetNs, address: IpAddr, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        if ping(from, address, left.min(NEVER)).is_ok() {
            return true;
        }
    }
}

/// Nodes `n1`, `n2`... on one segment, or each behind a port of its own of a router.
struct Cluster {
    /// Its namespace joins the nodes.
    middle: TestHost,
    nodes: Vec<Node>,
    mode: Mode,
    table: FabricTable,
}

struct Node {
    host: TestHost,
    fabric: Fabric,
    local: FabricNode,
    pod: TestNetNs,
    before: HostState,
}

/// Node `n` has the blocks `10.20.0.(64n)/26` and `fd20::n00/120`; its pod is the fifth of each.
fn pod_addresses(n: usize) -> [IpAddr; 2] {
    [format!("10.20.0.{}", 64 * n + 5).parse().unwrap(), format!("fd20::{n}05").parse().unwrap()]
}

/// What its address inside is, of each family.
fn inside(n: usize) -> Vec<IpAddr> {
    [format!("10.20.0.{}", 64 * n + 1), format!("fd20::{n}01")].iter().map(|a| a.parse().unwrap()).collect()
}

fn table_of<'a>(nodes: impl Iterator<Item = &'a FabricNode>) -> FabricTable {
    let mut table = FabricTable::default();
    table.pools.extend(["10.20.0.0/16", "fd20::/64"].map(|p| p.parse::<ipnet::IpNet>().unwrap()));
    for (n, node) in nodes.enumerate() {
        table.nodes.insert(node.name.clone(), node.clone());
        for prefix in [format!("10.20.0.{}/26", 64 * n), format!("fd20::{n}00/120")] {
            table.prefixes.insert(prefix.parse().unwrap(), node.name.clone());
        }
    }
    table
}

impl Cluster {
    /// `ipv6` is whether the underlay is. One segment or one for each node.
    fn new(count: usize, segments: bool, ipv6: bool, mode: Mode) -> Self {
        let middle = TestHost::new();
        let root = middle.root();
        root.sysctl("ipv4/ip_forward", "1");
        root.sysctl("ipv6/conf/all/forwarding", "1");
        if !segments {
            root.sh("ip link add sw type bridge mcast_snooping 0; ip link set sw up");
        }
        let mut nodes = Vec::new();
        for n in 0..count {
            let host = TestHost::new();
            let up = host.root().path().display().to_string();
            root.sh(&format!("ip link add p{n} type veth peer name up0; ip link set p{n} up"));
            root.sh(&format!("ip link set up0 netns {up}"));
            host.root().sysctl("ipv6/conf/up0/accept_dad", "0");
            host.root().sh("ip link set up0 up");
            // It comes with the carrier, some time after it. Without it no neighbour is asked for.
            let has_link_local = "ip -6 addr show dev up0 scope link | grep -v tentative | grep -q fe80";
            host.root().sh(&format!("for i in $(seq 600); do {has_link_local} && exit 0; sleep 0.05; done; exit 1"));
            let segment = if segments { n } else { 0 };
            let here = format!("192.0.{segment}.{}", n + 1);
            let here6 = format!("2001:db8:{segment}::{}", n + 1);
            if segments {
                root.sh(&format!("ip addr add 192.0.{n}.254/24 dev p{n}"));
                root.sh(&format!("ip -6 addr add 2001:db8:{n}::fe/64 dev p{n} nodad"));
            } else {
                root.sh(&format!("ip link set p{n} master sw"));
            }
            if !ipv6 {
                host.root().sh(&format!("ip addr add {here}/24 dev up0"));
                host.root().sh(&format!("ip route add default via 192.0.{segment}.254"));
            }
            host.root().sh(&format!("ip -6 addr add {here6}/64 dev up0 nodad"));
            host.root().sh(&format!("ip -6 route add default via 2001:db8:{segment}::fe"));
            let pod = host.new_pod();
            let before = host.state();
            let config = FabricConfig { mode, ..FabricConfig::default() };
            let fabric = Fabric::new(host.host(), config, &format!("n{n}"), &host.run_dir()).unwrap();
            let local = fabric.local().unwrap();
            nodes.push(Node { host, fabric, local, pod, before });
        }
        let table = table_of(nodes.iter().map(|node| &node.local));
        Self { middle, nodes, mode, table }
    }

    /// With addresses inside, or without.
    fn have_inside(&mut self, wanted: bool) {
        for (n, node) in self.nodes.iter_mut().enumerate() {
            node.local.inside = if wanted { inside(n) } else { Vec::new() };
        }
        self.table = table_of(self.nodes.iter().map(|node| &node.local));
    }

    fn apply(&self) -> Vec<Report> {
        let reports: Vec<_> = self.nodes.iter().map(|n| n.fabric.apply(&n.local, &self.table).unwrap()).collect();
        for report in &reports {
            assert_eq!((report.failures.len(), report.wanted), (0, report.installed), "{report:?}");
        }
        reports
    }

    /// Gives each node's pod its addresses, with the MTU that the fabric tells.
    fn attach(&self) {
        for (n, node) in self.nodes.iter().enumerate() {
            let mtu = node.fabric.apply(&node.local, &self.table).unwrap().mtu.unwrap_or(1500);
            let link = serde_json::from_value(serde_json::json!({ "kind": "veth", "mtu": mtu })).unwrap();
            let [v4, v6] = pod_addresses(n);
            let address =
                |a: IpAddr, length| LeasedAddress::new(ipnet::IpNet::new(a, length).unwrap(), "pods", n as u64 + 1);
            let addresses = vec![address(v4, 16), address(v6, 64)];
            let lease = Lease { addresses, routes: Vec::new(), dns: Dns::default(), mac: None };
            let engine = node.host.engine(None);
            engine.attach(&common::request(&format!("c{n}"), &node.pod, &link, lease)).unwrap();
        }
    }

    fn reaches(&self, from: usize, to: usize, limit: Duration) -> [bool; 2] {
        pod_addresses(to).map(|address| answers(&self.nodes[from].pod, address, limit))
    }

    fn all_talk(&self) {
        for from in 0..self.nodes.len() {
            for to in (0..self.nodes.len()).filter(|to| *to != from) {
                assert_eq!(self.reaches(from, to, SOON), [true; 2], "n{from} to n{to}: {:?}", self.mode);
            }
        }
    }

    /// A megabyte and its echo, so that segments are as large as they can be.
    fn streams(&self, from: usize, to: usize) {
        for address in pod_addresses(to) {
            let listener = self.nodes[to].pod.run(|| TcpListener::bind(SocketAddr::new(address, 0))).unwrap();
            let target = listener.local_addr().unwrap();
            let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
            let received = std::thread::scope(|scope| {
                let receiver = scope.spawn(|| {
                    let (mut stream, _) = listener.accept().unwrap();
                    stream.set_read_timeout(Some(SOON)).unwrap();
                    let mut received = Vec::new();
                    stream.read_to_end(&mut received).unwrap();
                    received
                });
                let mut stream = self.nodes[from].pod.run(|| TcpStream::connect_timeout(&target, SOON)).unwrap();
                stream.set_write_timeout(Some(SOON)).unwrap();
                stream.write_all(&data).unwrap();
                drop(stream);
                receiver.join().unwrap()
            });
            assert!(received == data, "{} bytes came", received.len());
        }
    }

    /// Removes pods and fabric, and asserts that nothing is left.
    fn end(self) {
        for (n, node) in self.nodes.iter().enumerate() {
            node.host.engine(None).detach(&common::key(&format!("c{n}")), None).unwrap();
            node.fabric.remove().unwrap();
            node.fabric.remove().unwrap();
            assert_eq!(node.before.diff(&node.host.state()), "", "n{n}");
            let setting = node.host.root().sh("cat /proc/sys/net/ipv6/conf/all/forwarding");
            assert_eq!(setting.trim(), "0", "n{n}");
        }
    }
}

#[test]
fn pods_of_three_nodes_on_a_segment_talk_by_routes() {
    if !require(Rung::Netns) {
        return;
    }
    let cluster = Cluster::new(3, false, false, Mode::Auto);
    cluster.apply();
    cluster.attach();
    cluster.all_talk();
    cluster.streams(0, 2);
    for node in &cluster.nodes {
        // Nothing went through the device, which is there for nodes of other segments.
        assert_eq!(node.host.root().sh("grep dcvx0 /proc/net/dev | awk '{ print $11 }'").trim(), "0");
    }
    // Its twin: without the route of one block, nothing of it is reached.
    let twin = cluster.nodes[0].host.root();
    twin.sh("ip route del 10.20.0.64/26; ip -6 route del fd20::100/120");
    assert_eq!(cluster.reaches(0, 1, NEVER), [false; 2]);
    assert_eq!(cluster.reaches(0, 2, SOON), [true; 2]);
    let report = cluster.nodes[0].fabric.apply(&cluster.nodes[0].local, &cluster.table).unwrap();
    assert_eq!(report.changed, 2, "{report:?}");
    assert_eq!(cluster.reaches(0, 1, SOON), [true; 2]);
    cluster.end();
}

#[test]
fn pods_of_three_segments_talk_through_vxlan() {
    if !require(Rung::Netns) {
        return;
    }
    for ipv6 in [false, true] {
        let mut cluster = Cluster::new(3, true, ipv6, Mode::Auto);
        let reports = cluster.apply();
        assert_eq!(reports[0].mtu, Some(if ipv6 { 1430 } else { 1450 }));
        cluster.attach();
        cluster.all_talk();
        cluster.streams(0, 2);
        let root = cluster.nodes[0].host.root();
        assert_eq!(root.sh("ip -6 addr show dev dcvx0"), "", "it makes itself no address");
        // Its twins: without the entry of the forwarding database, and without the neighbour.
        let entry = root.sh("bridge fdb show dev dcvx0 | grep ' dst ' | head -n 1");
        let mac = entry.split_whitespace().next().unwrap().to_owned();
        let peer = if entry.contains("192.0.1.2") || entry.contains("2001:db8:1::2") { 1 } else { 2 };
        root.sh(&format!("bridge fdb del {mac} dev dcvx0"));
        assert_eq!(cluster.reaches(0, peer, NEVER), [false; 2], "{entry}");
        assert_eq!(cluster.apply()[0].changed, 1);
        assert_eq!(cluster.reaches(0, peer, SOON), [true; 2]);
        root.sh("ip neigh flush dev dcvx0 nud permanent; ip -6 neigh flush dev dcvx0 nud permanent");
        assert_eq!(cluster.reaches(0, peer, NEVER), [false; 2]);
        assert_eq!(cluster.apply()[0].changed, 4);
        cluster.all_talk();

        // What a node itself sends, over a network that lets only nodes' addresses through.
        let network = cluster.middle.root();
        network.sh("ip rule add from 10.20.0.0/16 blackhole; ip -6 rule add from fd20::/64 blackhole");
        let answered = |cluster: &Cluster, limit| {
            pod_addresses(1).map(|address| answers(cluster.nodes[0].host.root(), address, limit))
        };
        assert_eq!(answered(&cluster, NEVER), [false; 2], "answers go past the tunnel");
        cluster.have_inside(true);
        assert_eq!(cluster.apply().iter().map(|r| r.changed).collect::<Vec<_>>(), [2; 3]);
        assert_eq!(answered(&cluster, SOON), [true; 2]);
        assert_eq!(cluster.apply().iter().map(|r| r.changed).sum::<usize>(), 0);
        // One that somebody removes comes back, also with the device.
        cluster.nodes[0].host.root().sh("ip addr del 10.20.0.1/32 dev dcvx0");
        assert_eq!(cluster.apply()[0].changed, 5, "and two routes and neighbours that the kernel took away with it");
        cluster.nodes[0].host.root().sh("ip link del dcvx0");
        cluster.apply();
        assert_eq!(answered(&cluster, SOON), [true; 2]);
        cluster.have_inside(false);
        assert_eq!(cluster.apply().iter().map(|r| r.changed).collect::<Vec<_>>(), [6; 3]);
        assert_eq!(cluster.apply().iter().map(|r| r.changed).sum::<usize>(), 0);
        assert_eq!(answered(&cluster, NEVER), [false; 2]);
        cluster.all_talk();
        cluster.end();
    }
}

#[test]
fn what_is_right_is_left_alone_and_what_is_others_too() {
    if !require(Rung::Netns) {
        return;
    }
    let cluster = Cluster::new(2, true, false, Mode::Vxlan);
    let root = cluster.nodes[0].host.root();
    root.sh("ip route add 10.99.0.0/16 via 192.0.0.254 metric 2210; ip route add blackhole 10.20.0.64/26 metric 2210");
    let reports: Vec<_> = cluster.nodes.iter().map(|n| n.fabric.apply(&n.local, &cluster.table).unwrap()).collect();
    assert!(
        reports[0].problems.iter().any(|p| p.contains("route 10.20.0.64/26") && p.contains("stays")),
        "{reports:?}"
    );
    root.sh("ip route show 10.20.0.64/26 | grep blackhole && ip route del blackhole 10.20.0.64/26 metric 2210");
    cluster.apply();
    cluster.attach();
    root.sh("ip neigh add 203.0.113.9 lladdr 02:00:00:00:00:09 nud permanent dev dcvx0");
    root.sh("bridge fdb append 02:00:00:00:00:09 dev dcvx0 dst 198.51.100.9");
    root.sh("ip link set up0 mtu 1400");
    let all = cluster.apply();
    assert_eq!((all[0].mtu, all[0].changed, all[1].changed), (Some(1350), 1, 0), "the device's MTU follows");
    assert!(all[0].problems.iter().any(|p| p.contains("1350 or less")), "{all:?}");
    let index = root.link("dcvx0").unwrap().index;
    // As a process that was killed and started anew.
    assert_eq!(cluster.apply().iter().map(|r| r.changed).sum::<usize>(), 0);
    assert_eq!(root.link("dcvx0").unwrap().index, index);
    root.sh("ip neigh show dev dcvx0 | grep 203.0.113.9; bridge fdb show dev dcvx0 | grep 02:00:00:00:00:09");
    root.sh("ip link set up0 mtu 1500");
    cluster.apply();
    cluster.all_talk();
    root.sh("ip route show 10.99.0.0/16 | grep 2210 && ip route del 10.99.0.0/16");
    cluster.end();

    // A device of another name that was told before goes.
    let host = TestHost::new();
    host.root().sh("ip link add up0 type veth peer name up1; ip link set up0 up; ip addr add 192.0.2.1/24 dev up0");
    let before = host.state();
    for device in ["vx1", "vx2"] {
        let addresses = vec!["192.0.2.1".parse().unwrap()];
        let config = FabricConfig { addresses, device: device.parse().unwrap(), ..FabricConfig::default() };
        let fabric = Fabric::new(host.host(), config, "n1", &host.run_dir()).unwrap();
        fabric.apply(&fabric.local().unwrap(), &FabricTable::default()).unwrap();
        assert!(host.root().link(device).is_some());
        if device == "vx2" {
            assert!(host.root().link("vx1").is_none());
            fabric.remove().unwrap();
        }
    }
    assert_eq!(before.diff(&host.state()), "");

    // A link of that name that is somebody else's stays.
    let host = TestHost::new();
    host.root().sh("ip link add up0 type veth peer name up1; ip link set up0 up; ip addr add 192.0.2.1/24 dev up0");
    host.root().sh("ip link add dcvx0 type veth peer name other");
    let config = FabricConfig { addresses: vec!["192.0.2.1".parse().unwrap()], ..FabricConfig::default() };
    let fabric = Fabric::new(host.host(), config, "n1", &host.run_dir()).unwrap();
    let local = fabric.local().unwrap();
    let before = host.state();
    let error = fabric.apply(&local, &FabricTable::default()).unwrap_err().to_string();
    assert!(error.starts_with("fabric.device: link dcvx0 is there"), "{error}");
    fabric.remove().unwrap();
    assert_eq!(before.diff(&host.state()), "");
}

#[test]
fn blocks_move_and_nodes_change_and_go() {
    if !require(Rung::Netns) {
        return;
    }
    let mut cluster = Cluster::new(3, true, false, Mode::Auto);
    cluster.apply();
    cluster.attach();
    cluster.all_talk();
    // An address of n1's block that n2 has goes to n2, and n1's others stay.
    let pod = cluster.nodes[2].host.new_pod();
    let borrowed: IpAddr = "10.20.0.70".parse().unwrap();
    let address = LeasedAddress::new(ipnet::IpNet::new(borrowed, 16).unwrap(), "pods", 9);
    let lease = Lease { addresses: vec![address], routes: Vec::new(), dns: Dns::default(), mac: None };
    cluster.nodes[2].host.engine(None).attach(&common::request("b", &pod, &common::veth(), lease)).unwrap();
    assert!(ping(&cluster.nodes[0].pod, borrowed, NEVER).is_err());
    cluster.table.prefixes.insert("10.20.0.70/32".parse().unwrap(), "n2".into());
    cluster.apply();
    for from in [0, 1] {
        ping(&cluster.nodes[from].pod, borrowed, SOON).unwrap();
    }
    cluster.all_talk();
    cluster.nodes[2].host.engine(None).detach(&common::key("b"), None).unwrap();
    cluster.table.prefixes.remove(&"10.20.0.70/32".parse().unwrap());
    assert_eq!(cluster.apply()[0].changed, 2, "its route and its neighbour");

    // A node that changes its address is found again: one entry of the database changes, and two of those who may send.
    let root = cluster.nodes[1].host.root();
    root.sh("ip addr add 192.0.1.77/24 dev up0; ip addr del 192.0.1.2/24 dev up0; ip addr add 192.0.1.77/24 dev up0 || true");
    root.sh("ip route replace default via 192.0.1.254");
    cluster.nodes[1].local = cluster.nodes[1].fabric.local().unwrap();
    assert_eq!(cluster.nodes[1].local.addresses[0], "192.0.1.77".parse::<IpAddr>().unwrap());
    cluster.table.nodes.insert("n1".into(), cluster.nodes[1].local.clone());
    assert_eq!(cluster.apply()[0].changed, 3);
    cluster.all_talk();

    // A block that is nobody's any more is unreachable, not sent to the default router.
    let dump = |cluster: &Cluster, n: usize| {
        let mut socket = cluster.nodes[n].host.root().netns().socket(Family::Route).unwrap();
        let routes = socket.routes().unwrap();
        routes
            .into_iter()
            .filter(|r| r.protocol == FABRIC_PROTOCOL)
            .map(|r| r.destination.to_string())
            .collect::<Vec<_>>()
    };
    cluster.table.nodes.remove("n1");
    cluster.table.prefixes.retain(|_, owner| owner != "n1");
    cluster.apply();
    assert!(!dump(&cluster, 0).contains(&"10.20.0.64/26".to_owned()));
    let told =
        cluster.nodes[0].host.root().sh("ip route get 10.20.0.69 2>&1 || true; ip -6 route get fd20::105 2>&1 || true");
    assert_eq!(told.matches("No route to host").count(), 2, "{told}");
    // Nor does an address of the own block that no pod has leave the node.
    let told = cluster.nodes[0].host.root().sh("ip route get 10.20.0.9 2>&1 || true");
    assert!(told.contains("No route to host"), "{told}");
    for (n, node) in cluster.nodes.iter().enumerate() {
        node.host.engine(None).detach(&common::key(&format!("c{n}")), None).unwrap();
        node.fabric.remove().unwrap();
    }
    for n in [0, 2] {
        assert_eq!(cluster.nodes[n].before.diff(&cluster.nodes[n].host.state()), "");
    }
}

#[test]
fn what_others_change_is_heard_of_and_what_pods_change_is_not() {
    if !require(Rung::Netns) {
        return;
    }
    let cluster = Cluster::new(2, true, false, Mode::Auto);
    let Node { host, fabric, local, .. } = &cluster.nodes[0];
    let root = host.root();
    let mut events = KernelEvents::listen(&host.host()).unwrap();
    fabric.apply(local, &cluster.table).unwrap();
    while events.wait(Duration::from_millis(300)).unwrap() {}
    for change in [
        "ip route del 10.20.0.64/26",
        "ip -6 route del fd20::100/120",
        "ip neigh flush dev dcvx0 nud permanent",
        "bridge fdb del $(bridge fdb show dev dcvx0 | grep ' dst ' | cut -d' ' -f1) dev dcvx0",
        "ip link set dcvx0 down",
        "ip link del dcvx0",
        "ip link set up0 mtu 1400",
        "ip addr add 192.0.0.77/24 dev up0",
        "ip route add 203.0.113.0/24 via 192.0.0.254",
    ] {
        root.sh(change);
        assert!(events.wait(SOON).unwrap(), "{change}");
        fabric.apply(local, &cluster.table).unwrap();
        while events.wait(Duration::from_millis(300)).unwrap() {}
        assert_eq!(fabric.apply(local, &cluster.table).unwrap().changed, 0, "{change}");
    }
    for noise in [
        "ip route add 10.20.0.9/32 dev up0; ip -6 route add fd20::9/128 dev up0",
        "ip route del 10.20.0.9/32; ip -6 route del fd20::9/128",
        "ip neigh add 192.0.0.99 lladdr 02:00:00:00:00:09 dev up0; ip neigh del 192.0.0.99 dev up0",
        "ip route add 203.0.113.0/24 via 192.0.0.254 table 77",
    ] {
        root.sh(noise);
        assert!(!events.wait(NEVER).unwrap(), "{noise}");
    }
}
