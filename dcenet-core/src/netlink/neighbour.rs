//! Neighbours: `struct ndmsg` and the `NDA_*` attributes (`include/uapi/linux/neighbour.h`).

use std::net::IpAddr;

use super::message::{Attributes, Message, field};
use super::{FABRIC_PROTOCOL, family_of, ip, octets};
use crate::model::{IfIndex, MacAddr};

/// A neighbour as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeighbourView {
    /// The link on which it is.
    pub index: IfIndex,
    /// Its address.
    pub address: IpAddr,
    /// Its Ethernet address, where known.
    pub mac: Option<MacAddr>,
    /// `NUD_*` state.
    pub state: u16,
    /// Who entered it (`NDA_PROTOCOL`, since Linux 5.0); 0 where nobody says.
    pub protocol: u8,
}

impl NeighbourView {
    /// Reads a `RTM_NEWNEIGH` payload.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let attributes = Attributes::new(payload.get(HEADER..)?);
        Some(Self {
            index: IfIndex::new(field(payload, 4).map(u32::from_ne_bytes)?)?,
            address: attributes.find(libc::NDA_DST).and_then(ip)?,
            mac: attributes.find(libc::NDA_LLADDR).and_then(|a| a.try_into().ok()).map(MacAddr::new),
            state: field(payload, 8).map(u16::from_ne_bytes)?,
            protocol: attributes.find(NDA_PROTOCOL).and_then(|p| p.first().copied()).unwrap_or_default(),
        })
    }

    /// Whether somebody entered it for good (`NUD_PERMANENT`).
    pub fn is_permanent(&self) -> bool {
        self.state & libc::NUD_PERMANENT != 0
    }
}

/// Enters a neighbour for good.
pub(crate) fn add_neighbour(link: &str, index: IfIndex, address: IpAddr, mac: MacAddr) -> Message {
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
    let what = format!("add neighbour {address} at {mac} on {link}");
    let mut message = message(libc::RTM_NEWNEIGH, flags, what, index, address, libc::NUD_PERMANENT);
    message.bytes(libc::NDA_LLADDR, &mac.bytes());
    message
}

/// As [`add_neighbour`], marked as the fabric's.
pub(crate) fn add_fabric_neighbour(link: &str, index: IfIndex, address: IpAddr, mac: MacAddr) -> Message {
    let mut message = add_neighbour(link, index, address, mac);
    message.u8(NDA_PROTOCOL, FABRIC_PROTOCOL);
    message
}

/// Forgets a neighbour.
pub(crate) fn delete_neighbour(link: &str, index: IfIndex, address: IpAddr) -> Message {
    message(libc::RTM_DELNEIGH, 0, format!("forget neighbour {address} on {link}"), index, address, 0)
}

/// Asks for all neighbours.
pub(crate) fn neighbour_dump() -> Message {
    Message::new(libc::RTM_GETNEIGH, 0, "list neighbours", &[0; HEADER])
}

fn message(kind: u16, flags: u16, operation: String, index: IfIndex, address: IpAddr, state: u16) -> Message {
    let mut header = [0; HEADER];
    header[0] = family_of(address);
    header[4..8].copy_from_slice(&index.get().to_ne_bytes());
    header[8..10].copy_from_slice(&state.to_ne_bytes());
    let mut message = Message::new(kind, flags, operation, &header);
    message.bytes(libc::NDA_DST, &octets(address));
    message
}

const HEADER: usize = 12;
const NDA_PROTOCOL: u16 = 12;
