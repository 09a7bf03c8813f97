//! What the encoders make, against two independent sources: the bytes that iproute2 6.1 sent for the same change
//! (recorded with strace(1) `-e write=3`), and `netlink-packet-route`.

use std::os::fd::AsFd;

use netlink_packet_core::NetlinkMessage;
use netlink_packet_route::RouteNetlinkMessage;

use super::device::create_link;
use super::message::split;
use super::*;
use crate::model::{IfIndex, IfName, MacAddr, VlanId};

/// A message without sequence number and NLM_F_ACK, attributes sorted.
#[derive(Debug, PartialEq)]
struct Tree {
    kind: u16,
    flags: u16,
    header: Vec<u8>,
    attributes: Vec<Node>,
}

#[derive(Debug, PartialEq, PartialOrd, Eq, Ord)]
struct Node {
    attribute: u16,
    content: Vec<u8>,
    children: Vec<Node>,
}

fn nodes(bytes: &[u8], path: &[u16], kind: u16) -> Vec<Node> {
    let mut nodes: Vec<Node> = Attributes::new(bytes)
        .map(|(attribute, content)| {
            let path = [path, &[attribute]].concat();
            let is_link = matches!(kind, libc::RTM_NEWLINK | libc::RTM_SETLINK);
            // The peer of a veth, or of a netkit device, begins with a header of its own.
            let skip = match path[..] {
                [18] | [18, 2] | [26] | [26, _] | [26, 2, _] | [12] if is_link => Some(0),
                [18, 2, 1] if is_link && content.len() >= 16 => Some(16),
                _ => None,
            };
            match skip {
                Some(skip) => Node {
                    attribute,
                    content: content[..skip].to_vec(),
                    children: self::nodes(&content[skip..], &path, kind),
                },
                None => {
                    let mut content = content.to_vec();
                    // Names come with and without their NUL, an alias too.
                    if is_link && matches!(path[..], [3] | [20] | [18, 1] | [18, 2, 1, 3]) {
                        content.truncate(content.iter().position(|b| *b == 0).unwrap_or(content.len()));
                    }
                    Node { attribute, content, children: Vec::new() }
                }
            }
        })
        .collect();
    nodes.sort();
    nodes
}

fn tree(bytes: &[u8]) -> Tree {
    let all: Vec<_> = split(bytes).map(Result::unwrap).collect();
    let [message] = all[..] else { panic!("{} messages", all.len()) };
    let header = match message.kind {
        16..=19 => 16,
        20..=22 => 8,
        24..=26 | 28..=30 | 32..=34 => 12,
        kind => panic!("message type {kind}"),
    };
    let (header, attributes) = message.payload.split_at(header);
    Tree {
        kind: message.kind,
        flags: message.flags & !(libc::NLM_F_ACK as u16),
        header: header.to_vec(),
        attributes: nodes(attributes, &[], message.kind),
    }
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(1, libc::NLM_F_ACK as u16, &mut bytes);
    bytes
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn name(text: &str) -> IfName {
    text.parse().unwrap()
}

fn index(index: u32) -> IfIndex {
    IfIndex::new(index).unwrap()
}

fn mac(last: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, last])
}

fn route(destination: &str, gateway: Option<&str>) -> NewRoute {
    NewRoute {
        index: index(4),
        destination: destination.parse().unwrap(),
        gateway: gateway.map(|g| g.parse().unwrap()),
        on_link: false,
        metric: None,
        table: 254,
        source: None,
        metrics: RouteMetrics::default(),
    }
}

/// Ours and iproute2's, with the command.
fn recorded() -> Vec<(&'static str, Message, &'static str)> {
    let change = LinkChange::default();
    vec![
        (
            "ip link add br0 address 02:00:00:00:00:09 mtu 1400 type bridge",
            create_bridge(&name("br0"), mac(9), Some(1400), false),
            "4c000000100005069e52026b00000000000000000000000000000000000000000a000100020000000009000008000400780500000800030062723000100012000a0001006272696467650000",
        ),
        (
            "ip link set dc1 master br0",
            set_link(&name("dc1"), index(3), &LinkChange { master: Some(index(2)), ..change }),
            "28000000100005009e52026b000000000000000003000000000000000000000008000a0002000000",
        ),
        (
            "ip link set dc1 alias dcenet:x",
            set_link(&name("dc1"), index(3), &LinkChange { alias: Some("dcenet:x"), ..change }),
            "2c000000100005009e52026b00000000000000000300000000000000000000000c0014006463656e65743a78",
        ),
        (
            "ip link set dc1 addrgenmode none",
            set_link(&name("dc1"), index(3), &LinkChange { no_ipv6_link_local: true, ..change }),
            "30000000100005009e52026b000000000000000003000000000000000000000010001a000c000a000500080001000000",
        ),
        (
            "ip link set dc1 up",
            set_link(&name("dc1"), index(3), &LinkChange { up: Some(true), ..change }),
            "20000000100005009e52026b0000000000000000030000000100000001000000",
        ),
        (
            "ip addr add 10.20.0.2/24 brd + dev eth0",
            add_address("eth0", index(4), "10.20.0.2/24".parse().unwrap()),
            "30000000140005069e52026b000000000218000004000000080002000a140002080001000a140002080004000a1400ff",
        ),
        (
            "ip addr add fd20::2/64 dev eth0 nodad",
            add_address("eth0", index(4), "fd20::2/64".parse().unwrap()),
            "40000000140005069e52026b000000000a4002000400000014000200fd20000000000000000000000000000214000100fd200000000000000000000000000002",
        ),
        (
            "ip addr del 10.20.0.2/24 dev eth0",
            delete_address("eth0", index(4), "10.20.0.2/24".parse().unwrap()),
            "28000000150005009f52026b000000000218000004000000080002000a140002080001000a140002",
        ),
        (
            "ip route add default via 169.254.1.1 dev eth0 onlink proto 220",
            add_route("eth0", &NewRoute { on_link: true, ..route("0.0.0.0/0", Some("169.254.1.1")) }),
            "2c000000180005069f52026b0000000002000000fedc00010400000008000500a9fe01010800040004000000",
        ),
        (
            "ip route add 10.30.0.0/16 via 10.20.0.1 dev eth0 proto 220 metric 50 table 100",
            add_route("eth0", &NewRoute { metric: Some(50), table: 100, ..route("10.30.0.0/16", Some("10.20.0.1")) }),
            "3c000000180005069f52026b000000000210000064dc000100000000080001000a1e0000080005000a14000108000600320000000800040004000000",
        ),
        (
            "ip route add default via 10.20.0.1 dev eth0 proto 220 src 10.20.0.2 mtu 1400 advmss 1360",
            add_route(
                "eth0",
                &NewRoute {
                    source: "10.20.0.2".parse().ok(),
                    metrics: RouteMetrics { mtu: Some(1400), advmss: Some(1360) },
                    ..route("0.0.0.0/0", Some("10.20.0.1"))
                },
            ),
            "48000000180005067d3b036b0000000002000000fedc000100000000080005000a140001080007000a14000208000400040000001400080008000200780500000800080050050000",
        ),
        (
            "ip route add 10.40.0.4/32 dev eth0 proto 220",
            add_route("eth0", &route("10.40.0.4/32", None)),
            "2c000000180005069f52026b0000000002200000fedcfd0100000000080001000a2800040800040004000000",
        ),
        (
            "ip neigh add 10.20.0.9 lladdr 02:00:00:00:00:05 dev eth0 nud permanent",
            add_neighbour("eth0", index(4), "10.20.0.9".parse().unwrap(), mac(5)),
            "300000001c000506a052026b00000000020000000400000080000000080001000a1400090a0002000200000000050000",
        ),
        (
            "bridge link set dev dc1 hairpin on",
            hairpin(&name("dc1"), index(3)),
            "2c00000013000500a052026b00000000070000000300000000000000000000000c000c800500040001000000",
        ),
        (
            "ip rule add from 10.20.0.2 lookup 300 priority 220 protocol 220",
            add_rule(&RuleSpec { from: "10.20.0.2/32".parse().unwrap(), table: 300, priority: 220 }),
            "3c00000020000506e10c036b00000000020020000000000100000000080002000a14000208000f002c01000008000600dc00000005001500dc000000",
        ),
        (
            "ip -6 rule add from 2001:db8::2 lookup 300 priority 220 protocol 220",
            add_rule(&RuleSpec { from: "2001:db8::2/128".parse().unwrap(), table: 300, priority: 220 }),
            "4800000020000506e10c036b000000000a00800000000001000000001400020020010db800000000000000000000000208000f002c01000008000600dc00000005001500dc000000",
        ),
        (
            "ip rule del from 10.20.0.2 lookup 300 priority 220 protocol 220",
            delete_rule(&RuleSpec { from: "10.20.0.2/32".parse().unwrap(), table: 300, priority: 220 }),
            "3c00000021000500e10c036b00000000020020000000000000000000080002000a14000208000f002c01000008000600dc00000005001500dc000000",
        ),
        (
            "ip link del dc1",
            delete_link("dc1", index(3)),
            "20000000110005009f52026b0000000000000000030000000000000000000000",
        ),
        (
            "ip link add m0 link p0 type macvlan mode bridge",
            device("m0", LinkKind::Macvlan { parent: index(3), mode: MacvlanMode::Bridge, sources: &[] }),
            "4c00000010000506f679026b00000000000000000000000000000000000000000800050003000000070003006d3000001c0012000b0001006d6163766c616e000c0002000800010004000000",
        ),
        (
            "ip link add i0 link p0 type ipvlan mode l3 vepa",
            device("i0", LinkKind::Ipvlan { parent: index(3), mode: IpvlanMode::L3, flag: IpvlanFlag::Vepa }),
            "5400000010000506f679026b000000000000000000000000000000000000000008000500030000000700030069300000240012000a0001006970766c616e00001400020006000100010000000600020002000000",
        ),
        (
            "ip link add v0 link p0 type vlan protocol 802.1ad id 100",
            device(
                "v0",
                LinkKind::Vlan { parent: index(3), id: VlanId::try_from(100).unwrap(), protocol: VlanProtocol::Dot1Ad },
            ),
            "5000000010000506f679026b0000000000000000000000000000000000000000080005000300000007000300763000002000120008000100766c616e140002000600050088a800000600010064000000",
        ),
        (
            "ip link add d0 type dummy",
            device("d0", LinkKind::Dummy),
            "3800000010000506f679026b00000000000000000000000000000000000000000700030064300000100012000900010064756d6d79000000",
        ),
        (
            "ip link add vrf0 type vrf table 77",
            device("vrf0", LinkKind::Vrf { table: 77 }),
            "4400000010000506f679026b00000000000000000000000000000000000000000900030076726630000000001800120007000100767266000c000200080001004d000000",
        ),
        (
            "ip link add wg0 type wireguard",
            device("wg0", LinkKind::Wireguard),
            "3c00000010000506f679026b00000000000000000000000000000000000000000800030077673000140012000d000100776972656775617264000000",
        ),
        (
            // iproute2 6.15
            "ip link add nk0 type netkit mode l2 forward peer blackhole name nk1",
            device(
                "nk0",
                LinkKind::Netkit {
                    mode: NetkitMode::L2,
                    policy: NetkitPolicy::Forward,
                    peer_policy: NetkitPolicy::Blackhole,
                    peer_name: &name("nk1"),
                    peer_mac: None,
                    peer_mtu: None,
                    peer_netns: None,
                },
            ),
            "70000000100005060b7a026b0000000000000000000000000000000000000000080003006e6b3000480012000a0001006e65746b69740000380002000800050000000000080003000000000008000400020000001c00010000000000000000000000000000000000080003006e6b3100",
        ),
    ]
}

fn device(own: &str, kind: LinkKind<'_>) -> Message {
    create_link(&NewLink { name: &name(own), kind, mac: None, mtu: None, netns: None })
}

fn new_veth() -> (Message, i32) {
    let file = std::fs::File::open("/proc/self/ns/net").unwrap();
    let message = create_veth(&NewVeth {
        name: &name("eth0"),
        mac: mac(1),
        mtu: Some(1400),
        peer_name: &name("dc1"),
        peer_mac: mac(2),
        peer_netns: file.as_fd(),
    });
    (message, std::os::fd::AsRawFd::as_raw_fd(&file))
}

#[test]
fn messages_are_those_of_iproute2() {
    for (command, ours, theirs) in recorded() {
        let mut ours = tree(&encoded(&ours));
        // Ours asks for an echo, and lets a neighbour be replaced.
        ours.flags &= !(libc::NLM_F_ECHO as u16);
        let mut theirs = tree(&hex(theirs));
        if ours.kind == libc::RTM_NEWNEIGH {
            ours.flags &= !(libc::NLM_F_REPLACE as u16);
            theirs.flags &= !(libc::NLM_F_EXCL as u16);
        }
        assert_eq!(ours, theirs, "{command}");
    }
    let (veth, fd) = new_veth();
    let mut ours = tree(&encoded(&veth));
    ours.flags &= !(libc::NLM_F_ECHO as u16);
    // ip link add eth0 address 02:.. mtu 1400 type veth peer name dc1 address 02:.. mtu 1400, and the namespace, which
    // was not asked for there.
    let mut theirs = tree(&hex(
        "80000000100005069e52026b00000000000000000000000000000000000000000a000100020000000001000008000400780500000900030065746830000000004000120008000100766574683400020030000100000000000000000000000000000000000a000100020000000002000008000400780500000800030064633100",
    ));
    let peer = &mut theirs.attributes.iter_mut().find(|n| n.attribute == 18).unwrap().children[1].children[0].children;
    peer.push(Node { attribute: 28, content: fd.to_ne_bytes().to_vec(), children: Vec::new() });
    peer.sort();
    assert_eq!(ours, theirs);
}

#[test]
fn netlink_packet_route_reads_the_same() {
    let all = recorded().into_iter().map(|(command, ours, _)| (command, ours));
    for (command, ours) in all.chain([("veth", new_veth().0)]) {
        let bytes = encoded(&ours);
        let mut read =
            NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes).unwrap_or_else(|e| panic!("{command}: {e}"));
        read.finalize();
        let mut again = vec![0; read.buffer_len()];
        read.serialize(&mut again);
        assert_eq!(tree(&again), tree(&bytes), "{command}");
    }
}
