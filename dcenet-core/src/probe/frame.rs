//! ARP and neighbour discovery on Ethernet, to the byte.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::MacAddr;

/// Distinguishes our solicitations from others' (RFC 3971, section 5.3.2).
pub(super) type Nonce = [u8; 6];

/// What a frame says, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    /// The sender speaks as this address.
    Is { address: IpAddr, mac: MacAddr },
    /// The sender, who has no address yet, asks whether anybody has this one.
    Probes { address: IpAddr, mac: MacAddr, nonce: Option<Nonce> },
}

/// An ARP request (RFC 826): a probe where `sender` is 0.0.0.0, an announcement where it is the target (RFC 5227, section
/// 1.1).
pub(super) fn arp_request(mac: MacAddr, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(MacAddr::new([0xff; 6]), mac, ARP);
    // Ethernet, IPv4, lengths of both, request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac.bytes());
    frame.extend(sender.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame
}

/// A neighbour solicitation of an address that the sender does not have yet (RFC 4862, section 5.4.2), with a nonce (RFC
/// 7527, section 4.1).
pub(super) fn duplicate_detection(mac: MacAddr, target: Ipv6Addr, nonce: Nonce) -> Vec<u8> {
    let mut option = vec![NONCE, 1];
    option.extend(nonce);
    let group = solicited_node(target);
    icmpv6(group_mac(group), mac, Ipv6Addr::UNSPECIFIED, group, SOLICITATION, 0, target, &option)
}

/// A neighbour solicitation from an address that the sender has (RFC 4861, section 4.3).
pub(super) fn solicitation(mac: MacAddr, sender: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let group = solicited_node(target);
    icmpv6(group_mac(group), mac, sender, group, SOLICITATION, 0, target, &link_layer_option(SOURCE, mac))
}

/// An unsolicited neighbour advertisement that overrides what others remember (RFC 4861, section 7.2.6).
pub(super) fn advertisement(mac: MacAddr, address: Ipv6Addr) -> Vec<u8> {
    let option = link_layer_option(TARGET, mac);
    icmpv6(group_mac(ALL_NODES), mac, address, ALL_NODES, ADVERTISEMENT, OVERRIDE, address, &option)
}

/// The group that whoever has the address listens to (RFC 4291, section 2.7.1).
pub(super) fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., x, y, z] = address.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, x, y, z])
}

/// Reads a frame; `None` where it says nothing that matters, or is not valid (RFC 826; RFC 4861, sections 7.1.1 and
/// 7.1.2).
pub(super) fn parse(frame: &[u8]) -> Option<Said> {
    let source = mac(frame.get(6..12)?)?;
    let payload = frame.get(ETHERNET..)?;
    match u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?) {
        ARP => parse_arp(payload),
        IPV6 => parse_neighbour_discovery(payload, source),
        _ => None,
    }
}

fn parse_arp(packet: &[u8]) -> Option<Said> {
    if packet.get(..6)? != [0, 1, 8, 0, 6, 4] || !matches!(packet.get(6..8)?, [0, 1 | 2]) {
        return None;
    }
    let mac = mac(packet.get(8..14)?)?;
    let ipv4 = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    let (sender, target) = (ipv4(14)?, ipv4(24)?);
    match packet[7] {
        _ if !sender.is_unspecified() => Some(Said::Is { address: sender.into(), mac }),
        1 => Some(Said::Probes { address: target.into(), mac, nonce: None }),
        _ => None,
    }
}

fn parse_neighbour_discovery(packet: &[u8], frame_source: MacAddr) -> Option<Said> {
    let header = packet.get(..40)?;
    if header[0] >> 4 != 6 || header[6] != ICMPV6 || header[7] != HOP_LIMIT {
        return None;
    }
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let message = packet.get(40..40 + length)?;
    let ipv6 = |bytes: &[u8]| Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?));
    let (source, destination) = (ipv6(&header[8..24])?, ipv6(&header[24..40])?);
    let target = ipv6(message.get(8..24)?)?;
    let (kind, code, flags) = (message[0], message[1], message[4]);
    if code != 0 || target.is_multicast() || checksum(source, destination, message) != 0 {
        return None;
    }
    let (mut layer, mut nonce) = (None, None);
    let mut options = &message[24..];
    while !options.is_empty() {
        let (kind_of, length) = (options[0], usize::from(*options.get(1)?) * 8);
        let option = options.get(..length).filter(|o| !o.is_empty())?;
        match kind_of {
            SOURCE | TARGET if kind == ADVERTISEMENT && kind_of == TARGET => layer = mac(&option[2..8]),
            SOURCE if source.is_unspecified() => return None,
            // A longer one is not of ours.
            NONCE if length == 8 => nonce = option[2..8].try_into().ok(),
            _ => {}
        }
        options = &options[length..];
    }
    match kind {
        ADVERTISEMENT if destination.is_multicast() && flags & SOLICITED != 0 => None,
        ADVERTISEMENT => Some(Said::Is { address: target.into(), mac: layer.unwrap_or(frame_source) }),
        SOLICITATION if source.is_unspecified() && destination == solicited_node(target) => {
            Some(Said::Probes { address: target.into(), mac: frame_source, nonce })
        }
        _ => None,
    }
}

fn ethernet(to: MacAddr, from: MacAddr, kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(86);
    frame.extend(to.bytes());
    frame.extend(from.bytes());
    frame.extend(kind.to_be_bytes());
    frame
}

#[expect(clippy::too_many_arguments, reason = "the fields of the message, in order")]
fn icmpv6(
    to: MacAddr,
    from: MacAddr,
    source: Ipv6Addr,
    destination: Ipv6Addr,
    kind: u8,
    flags: u8,
    target: Ipv6Addr,
    option: &[u8],
) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    message.extend(option);
    let sum = checksum(source, destination, &message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    let mut frame = ethernet(to, from, IPV6);
    frame.extend([0x60, 0, 0, 0, 0, message.len() as u8, ICMPV6, HOP_LIMIT]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    frame.extend(message);
    frame
}

/// An option with an Ethernet address (RFC 4861, section 4.6.1).
fn link_layer_option(kind: u8, mac: MacAddr) -> Vec<u8> {
    let mut option = vec![kind, 1];
    option.extend(mac.bytes());
    option
}

/// Where frames to a group go (RFC 2464, section 7).
fn group_mac(group: Ipv6Addr) -> MacAddr {
    let [.., w, x, y, z] = group.octets();
    MacAddr::new([0x33, 0x33, w, x, y, z])
}

/// Over pseudo-header and message (RFC 4443, section 2.3); 0 for a message with a right checksum in it.
fn checksum(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u32 {
        bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))).sum()
    };
    let addresses = words(&source.octets()) + words(&destination.octets());
    let mut sum = addresses + message.len() as u32 + u32::from(ICMPV6) + words(message);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn mac(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr::new)
}

/// Length of an Ethernet header without tags: the kernel keeps those beside the frame.
const ETHERNET: usize = 14;
/// EtherTypes.
pub(super) const ARP: u16 = 0x0806;
pub(super) const IPV6: u16 = 0x86dd;
/// Protocol number.
pub(super) const ICMPV6: u8 = 58;
const HOP_LIMIT: u8 = 255;
/// ICMPv6 types (RFC 4861, sections 4.3 and 4.4).
pub(super) const SOLICITATION: u8 = 135;
pub(super) const ADVERTISEMENT: u8 = 136;
/// Flags of an advertisement.
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;
/// Options: addresses of source and target (RFC 4861, section 4.6.1), nonce (RFC 3971, section 5.3.2).
const SOURCE: u8 = 1;
const TARGET: u8 = 2;
const NONCE: u8 = 14;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
