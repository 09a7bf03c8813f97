//! Connection tracking entries (`include/uapi/linux/netfilter/nfnetlink_conntrack.h`): which are there, and away with
//! them.
//!
//! An entry decides how the packets of a flow are translated for as long as it lives, and a UDP sender that never pauses
//! keeps it alive: what maps ports must remove those that tell another way.

use std::net::IpAddr;

use super::ip;
use super::message::{Attributes, Message, field};

/// A tracked flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flow {
    family: u8,
    /// The tuple of its original direction, and what else names the entry, as the kernel wrote them.
    original: Vec<u8>,
    id: Option<Vec<u8>>,
    zone: Option<Vec<u8>>,
    protocol: u8,
    port: u16,
    /// Where its first packet was sent.
    pub(crate) destination: IpAddr,
    /// Who answers: another than `destination` where that was translated.
    pub(crate) answerer: IpAddr,
}

/// Lists the flows of a protocol whose first packet was sent to this port. The kernel picks them out (`CTA_FILTER`, Linux
/// 5.8).
pub(crate) fn flow_dump(ipv4: bool, protocol: u8, port: u16) -> Message {
    let what = format!("list tracked flows of protocol {protocol} to port {port}");
    let mut message = message(GET, family(ipv4), what);
    message.nest(CTA_TUPLE_ORIG | NESTED, |tuple| {
        tuple.nest(CTA_TUPLE_PROTO | NESTED, |proto| {
            proto.u8(CTA_PROTO_NUM, protocol).bytes(CTA_PROTO_DST_PORT, &port.to_be_bytes());
        });
    });
    message.nest(CTA_FILTER | NESTED, |filter| {
        filter.u32(CTA_FILTER_ORIG_FLAGS, FILTER_PROTO_NUM | FILTER_PROTO_DST_PORT).u32(CTA_FILTER_REPLY_FLAGS, 0);
    });
    message
}

/// Deletes an entry: this very one, not a later one of the same addresses. Fails with ENOENT where it is gone.
pub(crate) fn delete_flow(flow: &Flow) -> Message {
    let what = format!("forget the tracked flow to port {} of {}", flow.port, flow.destination);
    let mut message = message(DELETE, flow.family, what);
    message.bytes(CTA_TUPLE_ORIG | NESTED, &flow.original);
    for (attribute, content) in [(CTA_ID, &flow.id), (CTA_ZONE, &flow.zone)] {
        if let Some(content) = content {
            message.bytes(attribute, content);
        }
    }
    message
}

impl Flow {
    /// Reads an entry of the answer to [`flow_dump`].
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let attributes = Attributes::new(payload.get(HEADER..)?);
        let original = attributes.find(CTA_TUPLE_ORIG)?;
        let proto = Attributes::new(Attributes::new(original).find(CTA_TUPLE_PROTO)?);
        Some(Self {
            family: *payload.first()?,
            id: attributes.find(CTA_ID).map(<[u8]>::to_vec),
            zone: attributes.find(CTA_ZONE).map(<[u8]>::to_vec),
            protocol: *proto.find(CTA_PROTO_NUM)?.first()?,
            port: u16::from_be_bytes(field(proto.find(CTA_PROTO_DST_PORT)?, 0)?),
            destination: address(original, [CTA_IP_V4_DST, CTA_IP_V6_DST])?,
            answerer: address(attributes.find(CTA_TUPLE_REPLY)?, [CTA_IP_V4_SRC, CTA_IP_V6_SRC])?,
            original: original.to_vec(),
        })
    }

    /// Whether its first packet was sent to this port.
    pub(crate) fn is_to(&self, protocol: u8, port: u16) -> bool {
        (self.protocol, self.port) == (protocol, port)
    }
}

fn address(tuple: &[u8], kinds: [u16; 2]) -> Option<IpAddr> {
    let addresses = Attributes::new(Attributes::new(tuple).find(CTA_TUPLE_IP)?);
    kinds.into_iter().find_map(|kind| addresses.find(kind)).and_then(ip)
}

fn family(ipv4: bool) -> u8 {
    if ipv4 { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

fn message(kind: u16, family: u8, what: String) -> Message {
    Message::new((libc::NFNL_SUBSYS_CTNETLINK as u16) << 8 | kind, 0, what, &[family, 0, 0, 0])
}

/// `sizeof(struct nfgenmsg)`.
const HEADER: usize = 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 1;
const DELETE: u16 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// Which fields are compared: `CTA_FILTER_F_*` of `net/netfilter/nf_conntrack_netlink.c`.
const FILTER_PROTO_NUM: u32 = 1 << 3;
const FILTER_PROTO_DST_PORT: u32 = 1 << 5;
