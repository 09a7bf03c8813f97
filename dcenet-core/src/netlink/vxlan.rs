//! VXLAN devices and their forwarding databases (`IFLA_VXLAN_*` of `include/uapi/linux/if_link.h`, `struct ndmsg` with
//! `AF_BRIDGE` and `NTF_SELF`, `drivers/net/vxlan/vxlan_core.c`).

use std::net::IpAddr;

use super::link::{HEADER as LINK_HEADER, header, new_link};
use super::message::{Attributes, Message, field, number};
use super::{ip, octets};
use crate::model::{IfIndex, IfName, MacAddr};

/// What makes one VXLAN device another; only a new device has another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanSpec {
    /// The VXLAN network identifier, of 24 bits (RFC 7348, section 5).
    pub vni: u32,
    /// The UDP port that it sends to and receives on.
    pub port: u16,
    /// The address of the host that datagrams are sent from. It decides of which family all of them are.
    pub local: IpAddr,
    /// Whether it takes senders' places from what it receives. A device without sends nothing astray, but takes in frames
    /// from whoever can send it datagrams all the same.
    pub learning: bool,
}

impl VxlanSpec {
    /// Outer Ethernet, IP, UDP and VXLAN headers, in bytes: what the underlay's MTU must have beyond the device's
    /// (RFC 7348, section 5; the inner Ethernet header is in the outer packet, the outer one is not).
    pub const fn overhead(local: IpAddr) -> u32 {
        match local {
            IpAddr::V4(_) => 20 + 8 + 8 + 14,
            IpAddr::V6(_) => 40 + 8 + 8 + 14,
        }
    }

    pub(super) fn write(&self, data: &mut Message) {
        data.u32(IFLA_VXLAN_ID, self.vni);
        data.bytes(if self.local.is_ipv4() { IFLA_VXLAN_LOCAL } else { IFLA_VXLAN_LOCAL6 }, &octets(self.local));
        data.u8(IFLA_VXLAN_LEARNING, self.learning.into());
        data.bytes(IFLA_VXLAN_PORT, &self.port.to_be_bytes());
        if self.local.is_ipv6() {
            // The kernel's defaults, said because RFC 6935 permits the opposite to tunnels: datagrams bear a checksum, and
            // those without are refused, for over IPv6 nothing else protects the outer header.
            data.u8(IFLA_VXLAN_UDP_ZERO_CSUM6_TX, 0).u8(IFLA_VXLAN_UDP_ZERO_CSUM6_RX, 0);
        }
    }

    /// Reads a `RTM_NEWLINK` payload; `None` where the link is no VXLAN device, or one without an address of the host's.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let info = Attributes::new(payload.get(LINK_HEADER..)?).find(libc::IFLA_LINKINFO)?;
        let info = Attributes::new(info);
        if info.find(libc::IFLA_INFO_KIND).map(super::message::text).as_deref() != Some("vxlan") {
            return None;
        }
        let data = Attributes::new(info.find(libc::IFLA_INFO_DATA)?);
        Some(Self {
            vni: data.find(IFLA_VXLAN_ID).and_then(number)?,
            port: data.find(IFLA_VXLAN_PORT).and_then(|p| field(p, 0)).map(u16::from_be_bytes)?,
            local: data.find(IFLA_VXLAN_LOCAL).or(data.find(IFLA_VXLAN_LOCAL6)).and_then(ip)?,
            learning: data.find(IFLA_VXLAN_LEARNING).and_then(|l| l.first().copied()).is_some_and(|l| l != 0),
        })
    }
}

/// An entry of a VXLAN device's forwarding database: behind which host an Ethernet address is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardingView {
    /// The device.
    pub index: IfIndex,
    /// The Ethernet address; all zero for what has no entry.
    pub mac: MacAddr,
    /// The host, by its address on the underlay.
    pub host: IpAddr,
    /// `NUD_*` state.
    pub state: u16,
}

impl ForwardingView {
    /// Reads a `RTM_NEWNEIGH` payload of the family `AF_BRIDGE`.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let [family] = field(payload, 0)?;
        let attributes = Attributes::new(payload.get(HEADER..)?);
        (i32::from(family) == libc::AF_BRIDGE).then_some(())?;
        Some(Self {
            index: IfIndex::new(field(payload, 4).map(u32::from_ne_bytes)?)?,
            mac: attributes.find(libc::NDA_LLADDR).and_then(|a| a.try_into().ok()).map(MacAddr::new)?,
            host: attributes.find(libc::NDA_DST).and_then(ip)?,
            state: field(payload, 8).map(u16::from_ne_bytes)?,
        })
    }
}

/// Enters behind which host an Ethernet address is, for good, in place of another one.
pub(crate) fn set_forwarding(index: IfIndex, mac: MacAddr, host: IpAddr) -> Message {
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
    forwarding(libc::RTM_NEWNEIGH, flags, format!("forward {mac} to {host}"), index, mac, host)
}

/// Takes back what [`set_forwarding`] entered.
pub(crate) fn delete_forwarding(index: IfIndex, mac: MacAddr, host: IpAddr) -> Message {
    forwarding(libc::RTM_DELNEIGH, 0, format!("forward {mac} to {host} no more"), index, mac, host)
}

fn forwarding(kind: u16, flags: u16, operation: String, index: IfIndex, mac: MacAddr, host: IpAddr) -> Message {
    let mut head = [0; HEADER];
    head[0] = libc::AF_BRIDGE as u8;
    head[4..8].copy_from_slice(&index.get().to_ne_bytes());
    head[8..10].copy_from_slice(&(libc::NUD_PERMANENT | libc::NUD_NOARP).to_ne_bytes());
    head[10] = libc::NTF_SELF;
    let mut message = Message::new(kind, flags, operation, &head);
    message.bytes(libc::NDA_LLADDR, &mac.bytes()).bytes(libc::NDA_DST, &octets(host));
    message
}

/// Asks for the forwarding database of a device.
pub(super) fn forwarding_dump(index: IfIndex) -> Message {
    let mut head = [0; HEADER];
    head[0] = libc::AF_BRIDGE as u8;
    let mut message = Message::new(libc::RTM_GETNEIGH, 0, "list the forwarding database", &head);
    message.u32(NDA_IFINDEX, index.get());
    message
}

/// Gives a VXLAN device its mark: IPv4 is let in by it and may come from where no route over it leads to (`rp_filter` 2,
/// RFC 3704, section 2.4), for an answer to a node's own address goes past the tunnel. `None` leaves the MTU as it is.
pub(crate) fn mark_vxlan(name: &IfName, index: IfIndex, mark: &str, mtu: Option<u32>) -> Message {
    let mut message = new_link(0, format!("configure link {name}: vxlan"), &header(index.get(), 0, 0));
    message.bytes(libc::IFLA_IFALIAS, mark.as_bytes());
    if let Some(mtu) = mtu {
        message.u32(libc::IFLA_MTU, mtu);
    }
    message.nest(libc::IFLA_AF_SPEC | NESTED, |spec| {
        spec.nest(libc::AF_INET as u16 | NESTED, |inet| {
            inet.nest(IFLA_INET_CONF | NESTED, |conf| {
                conf.u32(IPV4_DEVCONF_FORWARDING, 1).u32(IPV4_DEVCONF_RP_FILTER, 2);
            });
        });
    });
    message
}

/// Has a VXLAN device make itself no IPv6 address, if it is set up afterwards. Refused (EAFNOSUPPORT) for one without IPv6,
/// which a link of less than 1280 bytes is (`inet6_validate_link_af` of `net/ipv6/addrconf.c`).
pub(crate) fn no_addresses_of_its_own(name: &IfName, index: IfIndex) -> Message {
    let mut message = new_link(0, format!("configure link {name}: no IPv6 address"), &header(index.get(), 0, 0));
    message.nest(libc::IFLA_AF_SPEC | NESTED, |spec| {
        spec.nest(libc::AF_INET6 as u16 | NESTED, |inet6| {
            inet6.u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE);
        });
    });
    message
}

/// `sizeof(struct ndmsg)`.
const HEADER: usize = 12;
const NESTED: u16 = libc::NLA_F_NESTED as u16;
const NDA_IFINDEX: u16 = 8;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_LOCAL6: u16 = 17;
const IFLA_VXLAN_UDP_ZERO_CSUM6_TX: u16 = 19;
const IFLA_VXLAN_UDP_ZERO_CSUM6_RX: u16 = 20;
const IFLA_INET_CONF: u16 = 1;
/// `IPV4_DEVCONF_FORWARDING` of `include/uapi/linux/ip.h`.
const IPV4_DEVCONF_FORWARDING: u16 = 1;
/// `IPV4_DEVCONF_RP_FILTER`.
const IPV4_DEVCONF_RP_FILTER: u16 = 8;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
