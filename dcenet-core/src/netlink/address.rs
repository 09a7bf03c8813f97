//! Addresses: `struct ifaddrmsg` and the `IFA_*` attributes (`include/uapi/linux/if_addr.h`).

use std::net::IpAddr;

use ipnet::IpNet;

use super::message::{Attributes, Message, field, number};
use super::{family_of, ip, octets};
use crate::model::IfIndex;

/// An address as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressView {
    /// The link that has it.
    pub index: IfIndex,
    /// The address with its prefix length.
    pub address: IpNet,
    /// `IFA_F_*` flags.
    pub flags: u32,
    /// Its scope: 0 global, 253 link, 254 host.
    pub scope: u8,
}

impl AddressView {
    /// Reads a `RTM_NEWADDR` payload.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let [_, prefix, flags, scope] = field(payload, 0)?;
        let attributes = Attributes::new(payload.get(HEADER..)?);
        let local = attributes.find(libc::IFA_LOCAL).or(attributes.find(libc::IFA_ADDRESS)).and_then(ip)?;
        Some(Self {
            index: IfIndex::new(field(payload, 4).map(u32::from_ne_bytes)?)?,
            address: IpNet::new(local, prefix).ok()?,
            flags: attributes.find(libc::IFA_FLAGS).and_then(number).unwrap_or(flags.into()),
            scope,
        })
    }
}

/// Adds an address. An IPv6 one is usable at once: who handed it out has made sure that it is nobody else's
/// (`IFA_F_NODAD`).
pub(crate) fn add_address(link: &str, index: IfIndex, address: IpNet) -> Message {
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    let mut message = message(libc::RTM_NEWADDR, flags, format!("add address {address} to {link}"), index, address);
    match address {
        IpNet::V4(net) if net.prefix_len() < 31 => {
            message.bytes(libc::IFA_BROADCAST, &net.broadcast().octets());
        }
        IpNet::V4(_) | IpNet::V6(_) => {}
    }
    message
}

/// Removes an address.
pub(crate) fn delete_address(link: &str, index: IfIndex, address: IpNet) -> Message {
    message(libc::RTM_DELADDR, 0, format!("delete address {address} of {link}"), index, address)
}

/// Asks for the addresses of one link, or of all.
pub(crate) fn address_dump(index: Option<IfIndex>) -> Message {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&index.map_or(0, IfIndex::get).to_ne_bytes());
    Message::new(libc::RTM_GETADDR, 0, "list addresses", &header)
}

fn message(kind: u16, flags: u16, operation: String, index: IfIndex, address: IpNet) -> Message {
    let mut header = [0; HEADER];
    header[0] = family_of(address.addr());
    header[1] = address.prefix_len();
    if kind == libc::RTM_NEWADDR && address.addr().is_ipv6() {
        header[2] = NODAD;
    }
    if is_link_local(address.addr()) {
        header[3] = libc::RT_SCOPE_LINK;
    }
    header[4..8].copy_from_slice(&index.get().to_ne_bytes());
    let mut message = Message::new(kind, flags, operation, &header);
    let bytes = octets(address.addr());
    message.bytes(libc::IFA_LOCAL, &bytes).bytes(libc::IFA_ADDRESS, &bytes);
    message
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

const HEADER: usize = 8;
/// `IFA_F_NODAD`, which fits the header's eight bits of flags.
const NODAD: u8 = libc::IFA_F_NODAD as u8;
