//! Who gets a forged packet into a node's VXLAN device, and who does not.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use dcenet_core::fabric::{Fabric, FabricConfig, Mode, Report};
use dcenet_core::provider::{Dns, FabricNode, FabricTable, Lease, LeasedAddress};
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, ping, require_with};

mod common;

const SOON: Duration = Duration::from_secs(20);
const NEVER: Duration = Duration::from_millis(600);
const PORT: u16 = 4789;
/// Where the victim listens.
const SERVICE: u16 = 7777;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Nodes 0 and 1 and a stranger on one segment, and a pod on each node.
struct Lab {
    /// Its namespace joins them.
    _middle: TestHost,
    nodes: Vec<Node>,
    stranger: TestNetNs,
    table: FabricTable,
    ipv6: bool,
}

struct Node {
    host: TestHost,
    fabric: Fabric,
    local: FabricNode,
    pod: TestNetNs,
}

impl Lab {
    /// `ipv6` is whether VXLAN goes over IPv6.
    fn new(ipv6: bool) -> Self {
        let middle = TestHost::new();
        middle.root().sh("ip link add sw type bridge mcast_snooping 0; ip link set sw up");
        let plug = |n: usize, to: &TestNetNs| {
            middle.root().sh(&format!("ip link add p{n} type veth peer name up0; ip link set p{n} master sw up"));
            middle.root().sh(&format!("ip link set up0 netns {}", to.path().display()));
            to.sh("echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 0 > /proc/sys/net/ipv4/conf/default/rp_filter");
            to.sh("echo 0 > /proc/sys/net/ipv6/conf/up0/accept_dad; echo 0 > /proc/sys/net/ipv4/conf/up0/rp_filter");
            to.sh(&format!("ip addr add {}/24 dev up0; ip link set up0 up", outer(n, false)));
            to.sh(&format!("ip -6 addr add {}/64 dev up0 nodad", outer(n, true)));
        };
        let stranger = middle.new_pod();
        plug(9, &stranger);
        let (mut nodes, mut table) = (Vec::new(), FabricTable::default());
        table.pools.insert("10.20.0.0/16".parse().unwrap());
        for n in 0..2 {
            let host = TestHost::new();
            plug(n, host.root());
            host.root().sysctl("ipv4/ip_forward", "1");
            host.root().sysctl("ipv6/conf/all/forwarding", "1");
            let addresses = vec![outer(n, ipv6)];
            let config = FabricConfig { mode: Mode::Vxlan, addresses, ..FabricConfig::default() };
            let fabric = Fabric::new(host.host(), config, &format!("n{n}"), &host.run_dir()).unwrap();
            let local = fabric.local().unwrap();
            table.nodes.insert(local.name.clone(), local.clone());
            table.prefixes.insert(format!("10.20.0.{}/26", 64 * n).parse().unwrap(), local.name.clone());
            let pod = host.new_pod();
            nodes.push(Node { host, fabric, local, pod });
        }
        let lab = Self { _middle: middle, nodes, stranger, table, ipv6 };
        for (n, node) in lab.nodes.iter().enumerate() {
            lab.apply(n);
            let link = serde_json::from_value(serde_json::json!({ "kind": "veth", "mtu": 1400 })).unwrap();
            let address = |a: IpAddr, length| LeasedAddress {
                gateway: Some(ip(if a.is_ipv4() { "10.20.255.254" } else { "fd20::fe" })),
                ..LeasedAddress::new(ipnet::IpNet::new(a, length).unwrap(), "pods", n as u64 + 1)
            };
            let addresses = vec![address(inner(n), 16), address(ip(&format!("fd20::{n}5")), 64)];
            let route =
                |to: &str| dcenet_core::provider::LeasedRoute { destination: to.parse().unwrap(), gateway: None };
            let routes = vec![route("0.0.0.0/0"), route("::/0")];
            let lease = Lease { addresses, routes, dns: Dns::default(), mac: None };
            node.host.engine(None).attach(&common::request(&format!("c{n}"), &node.pod, &link, lease)).unwrap();
        }
        lab
    }

    fn apply(&self, n: usize) -> Report {
        let report = self.nodes[n].fabric.apply(&self.nodes[n].local, &self.table).unwrap();
        assert_eq!((report.failures.len(), report.wanted), (0, report.installed), "{report:?}");
        report
    }

    fn root(&self, n: usize) -> &TestNetNs {
        self.nodes[n].host.root()
    }

    /// Whether the pod of node 0 gets a packet that names the pod of node 1 as its sender, in a datagram that `from` sends to
    /// node 0.
    fn gets_in(&self, from: &TestNetNs, source: Option<IpAddr>, limit: Duration) -> bool {
        self.gets_in_at(SocketAddr::new(outer(0, self.ipv6), PORT), from, source, limit)
    }

    fn gets_in_at(&self, to: SocketAddr, from: &TestNetNs, source: Option<IpAddr>, limit: Duration) -> bool {
        let victim = self.nodes[0].pod.run(|| UdpSocket::bind(SocketAddr::new(inner(0), SERVICE))).unwrap();
        victim.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let any = ip(if self.ipv6 { "::" } else { "0.0.0.0" });
        let sender = from.run(|| UdpSocket::bind(SocketAddr::new(source.unwrap_or(any), 0))).unwrap();
        let vtep = self.nodes[0].local.vtep.unwrap();
        let forged = forged(vtep.mac.bytes(), vtep.vni);
        let end = Instant::now() + limit;
        while Instant::now() < end {
            sender.send_to(&forged, to).unwrap();
            let mut bytes = [0; 64];
            if let Ok((len, sender)) = victim.recv_from(&mut bytes) {
                assert_eq!((&bytes[..len], sender.ip()), (&FORGED[..], inner(1)));
                return true;
            }
        }
        false
    }
}

/// The address of a host on the segment; the stranger is number 9.
fn outer(n: usize, ipv6: bool) -> IpAddr {
    ip(&if ipv6 { format!("2001:db8::{}", n + 1) } else { format!("192.0.2.{}", n + 1) })
}

/// The address of a node's pod.
fn inner(n: usize) -> IpAddr {
    ip(&format!("10.20.0.{}", 64 * n + 5))
}

const FORGED: [u8; 6] = *b"forged";

/// VXLAN (RFC 7348, section 5), Ethernet, IPv4 and UDP, without a UDP checksum.
fn forged(mac: [u8; 6], vni: u32) -> Vec<u8> {
    let [_, a, b, c] = vni.to_be_bytes();
    let mut bytes = vec![8, 0, 0, 0, a, b, c, 0];
    bytes.extend(mac);
    bytes.extend([2, 0, 0, 0, 0, 9, 8, 0]);
    let (IpAddr::V4(source), IpAddr::V4(destination)): (IpAddr, IpAddr) = (inner(1), inner(0)) else { panic!() };
    bytes.extend(ipv4(source, destination, 8 + FORGED.len() as u16));
    for word in [5555, SERVICE, 8 + FORGED.len() as u16, 0] {
        bytes.extend(word.to_be_bytes());
    }
    bytes.extend(FORGED);
    bytes
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, payload: u16) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + payload).to_be_bytes());
    header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum: u32 = header.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    header[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    header
}

fn nft() -> Option<String> {
    let missing = std::process::Command::new("nft").arg("--version").output().is_err();
    missing.then(|| "nft is missing: install nftables".to_owned())
}

const OPEN: &str = "nft delete table inet dcenet-fabric";

fn strangers_and_pods_are_kept_out(ipv6: bool) {
    let lab = Lab::new(ipv6);
    ping(&lab.nodes[0].pod, inner(1), SOON).unwrap();
    ping(&lab.nodes[1].pod, inner(0), SOON).unwrap();
    // The pod of node 0 also says that it is node 1: nothing but the fence looks at that here.
    let own = &lab.nodes[0].pod;
    let claimed = outer(1, ipv6);
    let length = if ipv6 { 128 } else { 32 };
    own.sh(&format!("ip addr add {claimed}/{length} dev lo{}", if ipv6 { " nodad" } else { "" }));
    let senders = [("a stranger", &lab.stranger, None), ("an own pod", own, None), ("an own pod", own, Some(claimed))];
    for (who, from, source) in senders {
        assert!(!lab.gets_in(from, source, NEVER), "{who} as {source:?}");
    }
    let dropped = lab.root(0).sh("nft list chain inet dcenet-fabric fence");
    assert!(!dropped.contains("packets 0 ") && dropped.contains("packets "), "{dropped}");
    // Their twin: without the fence each gets in.
    lab.root(0).sh(OPEN);
    for (who, from, source) in senders {
        assert!(lab.gets_in(from, source, SOON), "{who} as {source:?}");
    }
    assert!(lab.apply(0).changed > 0);
    for (who, from, source) in senders {
        assert!(!lab.gets_in(from, source, NEVER), "{who} as {source:?}");
    }
    ping(&lab.nodes[0].pod, inner(1), SOON).unwrap();

    // A pod whose node gives it the node's own address. Its twin: without the fence of its node it gets in.
    let family = if ipv6 { "ip6" } else { "ip" };
    lab.root(1).sh(&format!(
        "nft add table {family} test; nft add chain {family} test post '{{ type nat hook postrouting \
                             priority 100; }}'; nft add rule {family} test post oifname up0 masquerade"
    ));
    assert!(!lab.gets_in(&lab.nodes[1].pod, None, NEVER));
    lab.root(1).sh(OPEN);
    assert!(lab.gets_in(&lab.nodes[1].pod, None, SOON));
    lab.apply(1);
    assert!(!lab.gets_in(&lab.nodes[1].pod, None, NEVER));
    // Nor by an address that is translated to the VTEP's.
    lab.root(1).sh(&format!("nft add chain {family} test pre '{{ type nat hook prerouting priority -100; }}'"));
    let service = SocketAddr::new(outer(50, ipv6), 53);
    let end = SocketAddr::new(outer(0, ipv6), PORT);
    lab.root(1)
        .sh(&format!("nft add rule {family} test pre {family} daddr {} udp dport 53 dnat to {end}", service.ip()));
    assert!(!lab.gets_in_at(service, &lab.nodes[1].pod, None, NEVER));
    lab.root(1).sh(OPEN);
    assert!(lab.gets_in_at(service, &lab.nodes[1].pod, None, SOON));
}

#[test]
fn over_ipv4_strangers_and_pods_are_kept_out() {
    if require_with(Rung::Netns, nft) {
        strangers_and_pods_are_kept_out(false);
    }
}

#[test]
fn over_ipv6_strangers_and_pods_are_kept_out() {
    if require_with(Rung::Netns, nft) {
        strangers_and_pods_are_kept_out(true);
    }
}

#[test]
fn the_fence_is_adopted_follows_the_nodes_and_goes_with_the_device() {
    if !require_with(Rung::Netns, nft) {
        return;
    }
    let mut lab = Lab::new(false);
    let handles = |lab: &Lab| lab.root(0).sh("nft -a list table inet dcenet-fabric | grep -v packets");
    let before = handles(&lab);
    // As a process that was killed and started anew.
    assert_eq!(lab.apply(0).changed, 0);
    assert_eq!(handles(&lab), before);
    // What somebody changed of it is put right, and a set that grew too.
    lab.root(0).sh("nft flush chain inet dcenet-fabric input");
    lab.root(0).sh("nft add element inet dcenet-fabric vteps4 '{ 192.0.2.10 }'");
    assert!(lab.gets_in(&lab.stranger, None, SOON));
    assert_eq!(lab.apply(0).changed, 2);
    assert!(!lab.gets_in(&lab.stranger, None, NEVER));
    // Another VXLAN network of the host is no business of the fence.
    lab.root(0).sh(
        "ip link add vx9 type vxlan id 9 dstport 4789 local 192.0.2.1; ip link set vx9 address 02:00:00:00:00:99 up",
    );
    lab.root(0).sh("echo 2 > /proc/sys/net/ipv4/conf/vx9/rp_filter");
    let end = Instant::now() + SOON;
    let received = || -> u64 { lab.root(0).sh("grep vx9 /proc/net/dev | awk '{ print $3 }'").trim().parse().unwrap() };
    while received() == 0 {
        assert!(Instant::now() < end, "nothing of the other network came");
        let sender = lab.stranger.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        sender.send_to(&forged([2, 0, 0, 0, 0, 0x99], 9), SocketAddr::new(outer(0, false), PORT)).unwrap();
    }
    lab.root(0).sh("ip link del vx9");
    // The stranger becomes a node, and is none again.
    let mut node = lab.nodes[1].local.clone();
    node.name = "n9".into();
    node.addresses = vec![outer(9, false)];
    node.vtep.as_mut().unwrap().address = outer(9, false);
    lab.table.nodes.insert("n9".into(), node);
    lab.apply(0);
    assert!(lab.gets_in(&lab.stranger, None, SOON));
    lab.table.nodes.remove("n9");
    lab.apply(0);
    assert!(!lab.gets_in(&lab.stranger, None, NEVER));
    // Another network has another fence, and the table goes with the device.
    let config = FabricConfig { vni: 77, ..FabricConfig::default() };
    let config = FabricConfig { mode: Mode::Vxlan, addresses: vec![outer(0, false)], ..config };
    let host = &lab.nodes[0].host;
    let fabric = Fabric::new(host.host(), config, "n0", &host.run_dir()).unwrap();
    let local = fabric.local().unwrap();
    fabric.apply(&local, &lab.table).unwrap();
    assert_eq!(fabric.apply(&local, &lab.table).unwrap().changed, 0);
    let rules = lab.root(0).sh("nft list table inet dcenet-fabric");
    assert!(rules.contains("vni 77\"") && !rules.contains("vni 3534"), "{rules}");
    fabric.remove().unwrap();
    assert_eq!(lab.root(0).sh("nft list tables"), "");
    fabric.remove().unwrap();
    // Nor is there one where there is no VXLAN.
    lab.apply(0);
    let config = FabricConfig { mode: Mode::Route, addresses: vec![outer(0, false)], ..FabricConfig::default() };
    let fabric = Fabric::new(host.host(), config, "n0", &host.run_dir()).unwrap();
    fabric.apply(&fabric.local().unwrap(), &lab.table).unwrap();
    assert_eq!(lab.root(0).sh("nft list tables"), "");
    assert!(lab.root(0).link("dcvx0").is_none());
}
