//! Packets composed for tests: `eth().ipv4(a, b).tcp(40000, 80, SYN).bytes()`.
//!
//! Lengths, next-header chains and checksums are filled in by [`Packet::bytes`]. What is wrong on purpose is done to the
//! bytes afterwards.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// TCP flag.
pub const FIN: u8 = 0x01;
/// TCP flag.
pub const SYN: u8 = 0x02;
/// TCP flag.
pub const RST: u8 = 0x04;
/// TCP flag.
pub const PSH: u8 = 0x08;
/// TCP flag.
pub const ACK: u8 = 0x10;

/// IPv6 extension header.
pub const HOP_BY_HOP: u8 = 0;
/// IPv6 extension header.
pub const ROUTING: u8 = 43;
/// IPv6 extension header.
pub const FRAGMENT: u8 = 44;
/// IPv6 extension header, of IPsec.
pub const AUTHENTICATION: u8 = 51;
/// IPv6 extension header.
pub const DESTINATION_OPTIONS: u8 = 60;

/// Begins an Ethernet frame between two made-up addresses.
pub fn eth() -> Packet {
    Packet { tags: Vec::new(), network: Network::Raw(0x88b5), protocol: 0, transport: Vec::new(), payload: Vec::new() }
}

/// A frame under construction.
#[derive(Debug, Clone)]
pub struct Packet {
    tags: Vec<(u16, u16)>,
    network: Network,
    protocol: u8,
    transport: Vec<u8>,
    payload: Vec<u8>,
}

#[derive(Debug, Clone)]
enum Network {
    Raw(u16),
    V4 { source: Ipv4Addr, destination: Ipv4Addr, id: u16, fragment: u16, options: Vec<u8> },
    V6 { source: Ipv6Addr, destination: Ipv6Addr, extensions: Vec<(u8, Vec<u8>)> },
}

impl Packet {
    /// Adds a VLAN tag (802.1Q), inside those that are there.
    #[must_use]
    pub fn vlan(self, id: u16) -> Self {
        self.tag(0x8100, id)
    }

    /// Adds a tag of any type.
    #[must_use]
    pub fn tag(mut self, ether_type: u16, id: u16) -> Self {
        self.tags.push((ether_type, id));
        self
    }

    /// Makes it a frame of any type; its content is the payload.
    #[must_use]
    pub fn ether_type(mut self, ether_type: u16) -> Self {
        self.network = Network::Raw(ether_type);
        self
    }

    /// Makes it ARP for IPv4: operation 1 asks, 2 answers.
    #[must_use]
    pub fn arp(self, operation: u16, sender: Ipv4Addr, target: Ipv4Addr) -> Self {
        let mut body = vec![0, 1, 8, 0, 6, 4];
        body.extend(operation.to_be_bytes());
        body.extend(SOURCE_MAC);
        body.extend(sender.octets());
        body.extend([0; 6]);
        body.extend(target.octets());
        self.ether_type(0x0806).data(body)
    }

    /// Makes it IPv4.
    #[must_use]
    pub fn ipv4(mut self, source: Ipv4Addr, destination: Ipv4Addr) -> Self {
        self.network = Network::V4 { source, destination, id: 0x1234, fragment: 0x4000, options: Vec::new() };
        self
    }

    /// Makes it IPv6.
    #[must_use]
    pub fn ipv6(mut self, source: Ipv6Addr, destination: Ipv6Addr) -> Self {
        self.network = Network::V6 { source, destination, extensions: Vec::new() };
        self
    }

    /// Makes it IPv4 or IPv6, by the destination; a source of the other version becomes unspecified.
    #[must_use]
    pub fn ip(self, source: IpAddr, destination: IpAddr) -> Self {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => self.ipv4(source, destination),
            (IpAddr::V6(source), IpAddr::V6(destination)) => self.ipv6(source, destination),
            (_, IpAddr::V4(destination)) => self.ipv4(Ipv4Addr::UNSPECIFIED, destination),
            (_, IpAddr::V6(destination)) => self.ipv6(Ipv6Addr::UNSPECIFIED, destination),
        }
    }

    /// Adds IPv4 options, filled up to a multiple of 4 bytes. IPv6 has none.
    #[must_use]
    pub fn options(mut self, bytes: &[u8]) -> Self {
        if let Network::V4 { options, .. } = &mut self.network {
            options.extend_from_slice(bytes);
            options.resize(options.len().next_multiple_of(4), 0);
        }
        self
    }

    /// Adds an IPv6 extension header of `units` times 8 bytes beyond the first 8 (authentication: 4 bytes), filled with
    /// zeros. IPv4 has none.
    #[must_use]
    pub fn extension(mut self, kind: u8, units: u8) -> Self {
        if let Network::V6 { extensions, .. } = &mut self.network {
            let bytes = if kind == AUTHENTICATION { 8 + 4 * usize::from(units) } else { 8 + 8 * usize::from(units) };
            let mut header = vec![0; bytes];
            header[1] = units;
            extensions.push((kind, header));
        }
        self
    }

    /// Makes it a fragment: the payload begins `offset` bytes into the packet, a multiple of 8.
    #[must_use]
    pub fn fragment(mut self, identification: u32, offset: u16, more: bool) -> Self {
        match &mut self.network {
            Network::V4 { id, fragment, .. } => {
                *id = identification as u16;
                *fragment = (u16::from(more) << 13) | (offset / 8);
            }
            Network::V6 { extensions, .. } => {
                let mut header = vec![0, 0];
                header.extend((offset | u16::from(more)).to_be_bytes());
                header.extend(identification.to_be_bytes());
                extensions.push((FRAGMENT, header));
            }
            Network::Raw(_) => {}
        }
        self
    }

    /// Adds a TCP header.
    #[must_use]
    pub fn tcp(mut self, source: u16, destination: u16, flags: u8) -> Self {
        self.protocol = 6;
        self.transport = ports(source, destination);
        self.transport.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        self
    }

    /// Sets the sequence and acknowledgement numbers of the TCP header.
    #[must_use]
    pub fn numbers(mut self, sequence: u32, acknowledged: u32) -> Self {
        self.transport[4..8].copy_from_slice(&sequence.to_be_bytes());
        self.transport[8..12].copy_from_slice(&acknowledged.to_be_bytes());
        self
    }

    /// Adds a UDP header.
    #[must_use]
    pub fn udp(mut self, source: u16, destination: u16) -> Self {
        self.protocol = 17;
        self.transport = ports(source, destination);
        self.transport.extend([0; 4]);
        self
    }

    /// Adds an SCTP header.
    #[must_use]
    pub fn sctp(mut self, source: u16, destination: u16) -> Self {
        self.protocol = 132;
        self.transport = ports(source, destination);
        self.transport.extend([0; 8]);
        self
    }

    /// Adds an ICMP or ICMPv6 header, by the version.
    #[must_use]
    pub fn icmp(mut self, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        self.protocol = if matches!(self.network, Network::V6 { .. }) { 58 } else { 1 };
        self.transport = vec![kind, code, 0, 0];
        self.transport.extend(rest);
        self
    }

    /// Adds the header of an echo request, by the version.
    #[must_use]
    pub fn echo_request(self, id: u16) -> Self {
        let kind = if matches!(self.network, Network::V6 { .. }) { 128 } else { 8 };
        self.echo(kind, id)
    }

    /// Adds the header of an echo reply, by the version.
    #[must_use]
    pub fn echo_reply(self, id: u16) -> Self {
        let kind = if matches!(self.network, Network::V6 { .. }) { 129 } else { 0 };
        self.echo(kind, id)
    }

    fn echo(self, kind: u8, id: u16) -> Self {
        let [high, low] = id.to_be_bytes();
        self.icmp(kind, 0, [high, low, 0, 1])
    }

    /// Adds the header of an ICMP error about a packet, of which it quotes up to 512 bytes from the IP header on.
    #[must_use]
    pub fn icmp_error(self, kind: u8, code: u8, about: &Packet) -> Self {
        let mut quoted = about.network_bytes();
        quoted.truncate(512);
        self.icmp(kind, code, [0; 4]).data(quoted)
    }

    /// Neighbour discovery about a target: type 135 asks, 136 answers.
    #[must_use]
    pub fn neighbour(self, kind: u8, target: Ipv6Addr) -> Self {
        const ROUTER_SOLICITATION: u8 = 133;
        let message = self.icmp(kind, 0, [0; 4]);
        // A router solicitation has no target (RFC 4861, section 4.1).
        if kind == ROUTER_SOLICITATION { message } else { message.data(target.octets().to_vec()) }
    }

    /// Any other protocol; its content is the payload.
    #[must_use]
    pub fn protocol(mut self, protocol: u8) -> Self {
        self.protocol = protocol;
        self.transport.clear();
        self
    }

    /// Sets the payload.
    #[must_use]
    pub fn data(mut self, payload: impl Into<Vec<u8>>) -> Self {
        self.payload = payload.into();
        self
    }

    /// Sets a payload of so many bytes.
    #[must_use]
    pub fn payload(self, bytes: usize) -> Self {
        self.data(vec![0x5a; bytes])
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend([0x02, 0, 0, 0, 0, 0x02]);
        frame.extend(SOURCE_MAC);
        for (ether_type, id) in &self.tags {
            frame.extend(ether_type.to_be_bytes());
            frame.extend(id.to_be_bytes());
        }
        let ether_type = match self.network {
            Network::Raw(ether_type) => ether_type,
            Network::V4 { .. } => 0x0800,
            Network::V6 { .. } => 0x86dd,
        };
        frame.extend(ether_type.to_be_bytes());
        frame.extend(self.network_bytes());
        frame
    }

    fn network_bytes(&self) -> Vec<u8> {
        match &self.network {
            Network::Raw(_) => self.payload.clone(),
            Network::V4 { source, destination, id, fragment, options } => {
                let upper = self.upper(&pseudo(&source.octets(), &destination.octets(), self.protocol));
                let header = 20 + options.len();
                let mut ip = vec![0x40 | (header / 4) as u8, 0];
                ip.extend(((header + upper.len()) as u16).to_be_bytes());
                ip.extend(id.to_be_bytes());
                ip.extend(fragment.to_be_bytes());
                ip.extend([64, self.protocol, 0, 0]);
                ip.extend(source.octets());
                ip.extend(destination.octets());
                ip.extend(options);
                let sum = checksum(&ip);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                ip.extend(upper);
                ip
            }
            Network::V6 { source, destination, extensions } => {
                let upper = self.upper(&pseudo(&source.octets(), &destination.octets(), self.protocol));
                let kinds: Vec<u8> = extensions.iter().map(|(kind, _)| *kind).chain([self.protocol]).collect();
                let mut body = Vec::new();
                for ((_, header), next) in extensions.iter().zip(&kinds[1..]) {
                    body.push(*next);
                    body.extend(&header[1..]);
                }
                body.extend(upper);
                let mut ip = vec![0x60, 0, 0, 0];
                ip.extend((body.len() as u16).to_be_bytes());
                ip.extend([kinds[0], 255]);
                ip.extend(source.octets());
                ip.extend(destination.octets());
                ip.extend(body);
                ip
            }
        }
    }

    /// Transport header and payload, with the checksum where the protocol has the common one. A later fragment has no
    /// transport header of its own.
    fn upper(&self, pseudo: &[u8]) -> Vec<u8> {
        let later = match &self.network {
            Network::V4 { fragment, .. } => fragment & 0x1fff != 0,
            Network::V6 { extensions, .. } => {
                extensions.iter().any(|(kind, h)| *kind == FRAGMENT && u16::from_be_bytes([h[2], h[3]]) & 0xfff8 != 0)
            }
            Network::Raw(_) => false,
        };
        let mut upper = if later { Vec::new() } else { self.transport.clone() };
        upper.extend(&self.payload);
        if later || self.transport.is_empty() {
            return upper;
        }
        if self.protocol == 17 {
            let length = (upper.len() as u16).to_be_bytes();
            upper[4..6].copy_from_slice(&length);
        }
        let (at, with_pseudo) = match self.protocol {
            1 => (2, false),
            58 => (2, true),
            6 => (16, true),
            17 => (6, true),
            _ => return upper,
        };
        let mut summed = if with_pseudo { pseudo.to_vec() } else { Vec::new() };
        if with_pseudo {
            summed.extend((upper.len() as u32).to_be_bytes());
        }
        summed.extend(&upper);
        let sum = checksum(&summed);
        upper[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        upper
    }
}

fn ports(source: u16, destination: u16) -> Vec<u8> {
    [source.to_be_bytes(), destination.to_be_bytes()].concat()
}

/// The pseudo-header without its length (RFC 9293, section 3.1; RFC 8200, section 8.1), which sums to the same in both
/// forms.
fn pseudo(source: &[u8], destination: &[u8], protocol: u8) -> Vec<u8> {
    [source, destination, &[0, 0, 0, protocol]].concat()
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

const SOURCE_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_is_what_was_written_by_hand() {
        let packet = eth().ipv4(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)).udp(53, 1024).data(*b"hi");
        let hand = [
            0x02, 0, 0, 0, 0, 0x02, 0x02, 0, 0, 0, 0, 0x01, 0x08, 0x00, // Ethernet
            0x45, 0, 0, 30, 0x12, 0x34, 0x40, 0, 64, 17, 0x14, 0x99, 10, 0, 0, 1, 10, 0, 0, 2, // IPv4
            0, 53, 4, 0, 0, 10, 0x7f, 0x39, b'h', b'i', // UDP
        ];
        assert_eq!(packet.bytes(), hand);
    }

    #[test]
    fn extension_headers_are_chained() {
        let address = Ipv6Addr::LOCALHOST;
        let bytes = eth().ipv6(address, address).extension(HOP_BY_HOP, 0).fragment(7, 0, true).tcp(1, 2, SYN).bytes();
        assert_eq!((bytes[20], bytes[54], bytes[62]), (HOP_BY_HOP, FRAGMENT, 6));
        assert_eq!(bytes[62..70], [6, 0, 0, 1, 0, 0, 0, 7]);
        assert_eq!(bytes.len(), 14 + 40 + 8 + 8 + 20);
        assert_eq!(bytes[18..20], 36_u16.to_be_bytes());
    }
}
