//! Frames made by a grammar, for comparisons of one judge of packets with another.
//!
//! [`frame`] is a proptest strategy: Ethernet, up to three tags (802.1Q, 802.1ad), then IPv4 with options and fragments,
//! IPv6 with extension headers and fragments, ARP or an unknown type; then TCP, UDP, SCTP, ICMP and ICMPv6 with errors that
//! quote another packet, neighbour discovery, or another protocol. Some frames are cut off, and some have a wrong byte.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::packet::{ACK, AUTHENTICATION, DESTINATION_OPTIONS, FIN, HOP_BY_HOP, PSH, Packet, ROUTING, RST, SYN, eth};

/// The addresses that frames are between; a frame takes both ends from the same list, so that they meet often.
#[derive(Debug, Clone)]
pub struct Hosts {
    /// Of IPv4.
    pub v4: Vec<Ipv4Addr>,
    /// Of IPv6; also the targets of neighbour discovery.
    pub v6: Vec<Ipv6Addr>,
    /// Ports of TCP, UDP and SCTP.
    pub ports: Vec<u16>,
}

/// A frame of at least 14 bytes, as a test run wants it.
pub fn frame(hosts: &Hosts) -> impl Strategy<Value = Vec<u8>> + use<> {
    let whole = prop_oneof![1 => arp(hosts), 8 => ip(hosts, true), 1 => unknown()];
    let tag = (select(vec![0x8100u16, 0x88a8, 0x9100]), 0u16..4096);
    let tags = prop_oneof![6 => Just(0usize), 2 => Just(1), 1 => Just(2), 1 => Just(3)]
        .prop_flat_map(move |count| prop::collection::vec(tag.clone(), count));
    (tags, whole, damage()).prop_map(|(tags, packet, damage)| {
        let tagged = tags.into_iter().fold(packet, |packet, (ether_type, id)| packet.tag(ether_type, id));
        let mut bytes = tagged.bytes();
        match damage {
            Damage::None => {}
            Damage::Cut(at) => bytes.truncate(at.index(bytes.len() + 1)),
            Damage::Byte(at, with) => {
                let at = at.index(bytes.len().min(100));
                bytes[at] ^= with;
            }
        }
        bytes.resize(bytes.len().max(14), 0);
        bytes
    })
}

#[derive(Debug, Clone)]
enum Damage {
    None,
    /// Nothing from here on.
    Cut(Index),
    /// Bits of one of the first bytes are turned.
    Byte(Index, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        6 => Just(Damage::None),
        2 => any::<Index>().prop_map(Damage::Cut),
        2 => (any::<Index>(), 1u8..).prop_map(|(at, with)| Damage::Byte(at, with)),
    ]
}

fn unknown() -> BoxedStrategy<Packet> {
    let types = select(vec![0x0001u16, 0x0600, 0x8863, 0x88cc, 0x8847, 0xffff]);
    (types, 0usize..64).prop_map(|(ether_type, bytes)| eth().ether_type(ether_type).payload(bytes)).boxed()
}

fn arp(hosts: &Hosts) -> BoxedStrategy<Packet> {
    let host = select(hosts.v4.clone());
    (1u16..5, host.clone(), host).prop_map(|(operation, sender, target)| eth().arp(operation, sender, target)).boxed()
}

fn ip(hosts: &Hosts, with_errors: bool) -> BoxedStrategy<Packet> {
    let network = prop_oneof![ipv4(hosts), ipv6(hosts)];
    let payload = prop_oneof![Just(0usize), 1usize..100];
    let mut upper = vec![(8, ports(hosts)), (2, echo()), (1, discovery(hosts)), (1, other())];
    if with_errors {
        upper.push((3, error(hosts)));
    }
    (network, payload, proptest::strategy::Union::new_weighted(upper))
        .prop_map(|(network, payload, upper)| upper.write(network, payload))
        .boxed()
}

fn ipv4(hosts: &Hosts) -> BoxedStrategy<Packet> {
    let host = select(hosts.v4.clone());
    let options = prop_oneof![4 => Just(Vec::new()), 1 => prop::collection::vec(any::<u8>(), 1..=40)];
    (host.clone(), host, options, fragment())
        .prop_map(|(source, destination, options, fragment)| {
            let packet = eth().ipv4(source, destination).options(&options);
            fragment.map_or(packet.clone(), |(id, offset, more)| packet.fragment(id, offset, more))
        })
        .boxed()
}

fn ipv6(hosts: &Hosts) -> BoxedStrategy<Packet> {
    let host = select(hosts.v6.clone());
    let kind = select(vec![HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS, AUTHENTICATION, 135, 139, 140]);
    let units = prop_oneof![4 => Just(0u8), 2 => 1u8..4, 1 => 4u8..12];
    let extensions = prop_oneof![
        3 => Just(Vec::new()),
        3 => prop::collection::vec((kind.clone(), units.clone()), 1..4),
        1 => prop::collection::vec((kind, units), 4..10),
    ];
    (host.clone(), host, extensions, fragment())
        .prop_map(|(source, destination, extensions, fragment)| {
            let packet = eth().ipv6(source, destination);
            let packet = extensions.into_iter().fold(packet, |packet, (kind, units)| packet.extension(kind, units));
            fragment.map_or(packet.clone(), |(id, offset, more)| packet.fragment(id, offset, more))
        })
        .boxed()
}

/// Identification, of which there are few, so that fragments meet; offset; whether more follow.
fn fragment() -> impl Strategy<Value = Option<(u32, u16, bool)>> + Clone {
    let offset = prop_oneof![Just(0u16), Just(8), Just(16), Just(1480)];
    prop_oneof![3 => Just(None), 1 => (1u32..4, offset, any::<bool>()).prop_map(Some)]
}

/// What follows the IP header.
#[derive(Debug, Clone)]
enum Upper {
    Tcp(u16, u16, u8),
    Udp(u16, u16),
    Sctp(u16, u16),
    Echo(bool, u16),
    Icmp(u8, u8),
    Error(u8, u8, Box<Packet>),
    Neighbour(u8, Ipv6Addr),
    Other(u8),
}

impl Upper {
    fn write(self, packet: Packet, payload: usize) -> Packet {
        match self {
            Self::Tcp(source, destination, flags) => packet.tcp(source, destination, flags).payload(payload),
            Self::Udp(source, destination) => packet.udp(source, destination).payload(payload),
            Self::Sctp(source, destination) => packet.sctp(source, destination).payload(payload),
            Self::Echo(true, id) => packet.echo_request(id).payload(payload),
            Self::Echo(false, id) => packet.echo_reply(id).payload(payload),
            Self::Icmp(kind, code) => packet.icmp(kind, code, [0; 4]).payload(payload),
            Self::Error(kind, code, about) => packet.icmp_error(kind, code, &about),
            Self::Neighbour(kind, target) => packet.neighbour(kind, target),
            Self::Other(protocol) => packet.protocol(protocol).payload(payload),
        }
    }
}

fn ports(hosts: &Hosts) -> BoxedStrategy<Upper> {
    let port = select(hosts.ports.clone());
    let flags = select(vec![SYN, SYN | ACK, ACK, PSH | ACK, FIN | ACK, RST, RST | ACK, SYN | FIN, 0, 0xff]);
    prop_oneof![
        3 => (port.clone(), port.clone(), flags).prop_map(|(a, b, flags)| Upper::Tcp(a, b, flags)),
        2 => (port.clone(), port.clone()).prop_map(|(a, b)| Upper::Udp(a, b)),
        1 => (port.clone(), port).prop_map(|(a, b)| Upper::Sctp(a, b)),
    ]
    .boxed()
}

fn echo() -> BoxedStrategy<Upper> {
    let any_type = (any::<u8>(), 0u8..16).prop_map(|(kind, code)| Upper::Icmp(kind, code));
    prop_oneof![3 => (any::<bool>(), 1u16..4).prop_map(|(request, id)| Upper::Echo(request, id)), 1 => any_type].boxed()
}

/// Errors of both versions (RFC 792, RFC 4443), each also in the other, where it means something else.
fn error(hosts: &Hosts) -> BoxedStrategy<Upper> {
    let kind = select(vec![1u8, 2, 3, 4, 5, 11, 12]);
    (kind, 0u8..8, ip(hosts, false)).prop_map(|(kind, code, about)| Upper::Error(kind, code, Box::new(about))).boxed()
}

fn discovery(hosts: &Hosts) -> BoxedStrategy<Upper> {
    (133u8..138, select(hosts.v6.clone())).prop_map(|(kind, target)| Upper::Neighbour(kind, target)).boxed()
}

fn other() -> BoxedStrategy<Upper> {
    any::<u8>().prop_map(Upper::Other).boxed()
}
