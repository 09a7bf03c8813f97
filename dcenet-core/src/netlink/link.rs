//! Links: `struct ifinfomsg` and the `IFLA_*` attributes (`include/uapi/linux/if_link.h`, `net/core/rtnetlink.c`).

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::device;
use super::message::{Attributes, Message, field, number, text};
use super::vlans::{self, BridgeVlans};
use crate::model::{IfIndex, IfName, MacAddr, VlanId};

/// A link as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkView {
    /// Its index.
    pub index: IfIndex,
    /// Its name.
    pub name: String,
    /// The driver's name, such as `veth`; physical devices have none.
    pub kind: Option<String>,
    /// Its address, where it is an Ethernet one.
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// `IFF_*` flags.
    pub flags: u32,
    /// Its alias, where ours carry their mark.
    pub alias: Option<String>,
    /// The index of the bridge or other device that it belongs to.
    pub master: Option<IfIndex>,
    /// The index of its other end or parent (`IFLA_LINK`), in the namespace where that lives.
    pub peer: Option<IfIndex>,
    /// The number by which the link's namespace knows that where the other end or parent lives
    /// (`IFLA_LINK_NETNSID`, Linux 4.0); `None` where it is the same, and the index is of a link here.
    pub peer_netns: Option<i32>,
    /// Length of its transmit queue, in packets.
    pub tx_queue_len: u32,
    /// What its bridge does with it, where it is a port of one.
    pub port: Option<BridgePort>,
    /// What it does with VLANs, where it is a bridge and the kernel can keep them apart.
    pub vlans: Option<BridgeVlans>,
    /// The VLAN whose frames it has, where it is the device of one.
    pub vlan: Option<VlanId>,
}

/// Settings of a port of a bridge (`IFLA_BRPORT_*`, `br_port_fill_attrs` of `net/bridge/br_netlink.c`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BridgePort {
    /// Frames may leave by the port that they came in by.
    pub hairpin: bool,
    /// Frames do not pass between it and other isolated ports (Linux 4.18).
    pub isolated: bool,
}

impl BridgePort {
    fn parse(info: &[u8]) -> Option<Self> {
        let info = Attributes::new(info);
        info.find(IFLA_INFO_SLAVE_KIND).map(text).filter(|kind| kind == "bridge")?;
        let port = Attributes::new(info.find(IFLA_INFO_SLAVE_DATA)?);
        let is_set = |attribute| port.find(attribute).and_then(|value| value.first()).is_some_and(|value| *value != 0);
        Some(Self { hairpin: is_set(IFLA_BRPORT_MODE), isolated: is_set(IFLA_BRPORT_ISOLATED) })
    }
}

impl LinkView {
    /// Reads a `RTM_NEWLINK` payload.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let attributes = Attributes::new(payload.get(HEADER..)?);
        let index = |attribute| attributes.find(attribute).and_then(number).and_then(IfIndex::new);
        Some(Self {
            index: IfIndex::new(field(payload, 4).map(u32::from_ne_bytes)?)?,
            name: attributes.find(libc::IFLA_IFNAME).map(text)?,
            kind: attributes
                .find(libc::IFLA_LINKINFO)
                .and_then(|info| Attributes::new(info).find(libc::IFLA_INFO_KIND))
                .map(text),
            mac: attributes.find(libc::IFLA_ADDRESS).and_then(|a| a.try_into().ok()).map(MacAddr::new),
            mtu: attributes.find(libc::IFLA_MTU).and_then(number).unwrap_or_default(),
            flags: field(payload, 8).map(u32::from_ne_bytes)?,
            alias: attributes.find(libc::IFLA_IFALIAS).map(text),
            master: index(libc::IFLA_MASTER),
            peer: index(libc::IFLA_LINK),
            peer_netns: attributes.find(libc::IFLA_LINK_NETNSID).and_then(number).map(|n| n as i32),
            tx_queue_len: attributes.find(libc::IFLA_TXQLEN).and_then(number).unwrap_or_default(),
            port: attributes.find(libc::IFLA_LINKINFO).and_then(BridgePort::parse),
            vlans: attributes.find(libc::IFLA_LINKINFO).and_then(BridgeVlans::parse),
            vlan: attributes.find(libc::IFLA_LINKINFO).and_then(device::vlan_of),
        })
    }

    /// Whether it is administratively up (`IFF_UP`).
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }
}

/// A veth pair: one end here, the other in the namespace behind `peer_netns`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewVeth<'a> {
    pub(crate) name: &'a IfName,
    pub(crate) mac: MacAddr,
    pub(crate) mtu: Option<u32>,
    pub(crate) peer_name: &'a IfName,
    pub(crate) peer_mac: MacAddr,
    pub(crate) peer_netns: BorrowedFd<'a>,
}

/// Creates a pair, both ends down. Both have explicit addresses: udev would otherwise give them others later
/// (systemd's `MACAddressPolicy=persistent`). The reply describes this end, and the other's index in `peer`.
pub(crate) fn create_veth(veth: &NewVeth<'_>) -> Message {
    let what = format!("create veth {} with peer {}", veth.name, veth.peer_name);
    let mut message = new_link(CREATE, what, &header(0, 0, 0));
    message.text(libc::IFLA_IFNAME, veth.name.as_str());
    message.bytes(libc::IFLA_ADDRESS, &veth.mac.bytes());
    if let Some(mtu) = veth.mtu {
        message.u32(libc::IFLA_MTU, mtu);
    }
    message.nest(libc::IFLA_LINKINFO, |info| {
        info.text(libc::IFLA_INFO_KIND, "veth");
        info.nest(libc::IFLA_INFO_DATA, |data| {
            data.nest(VETH_INFO_PEER, |peer| {
                peer.append(&header(0, 0, 0));
                peer.text(libc::IFLA_IFNAME, veth.peer_name.as_str());
                peer.bytes(libc::IFLA_ADDRESS, &veth.peer_mac.bytes());
                if let Some(mtu) = veth.mtu {
                    peer.u32(libc::IFLA_MTU, mtu);
                }
                peer.bytes(libc::IFLA_NET_NS_FD, &veth.peer_netns.as_raw_fd().to_ne_bytes());
            });
        });
    });
    message
}

/// Creates a bridge, down. A bridge whose address was given keeps it when ports come and go
/// (`br_stp_recalculate_bridge_id` in `net/bridge/br_stp_if.c`).
pub(crate) fn create_bridge(name: &IfName, mac: MacAddr, mtu: Option<u32>, vlan_filtering: bool) -> Message {
    let mut message = new_link(CREATE, format!("create bridge {name}"), &header(0, 0, 0));
    message.text(libc::IFLA_IFNAME, name.as_str());
    message.bytes(libc::IFLA_ADDRESS, &mac.bytes());
    if let Some(mtu) = mtu {
        message.u32(libc::IFLA_MTU, mtu);
    }
    message.nest(libc::IFLA_LINKINFO, |info| {
        info.text(libc::IFLA_INFO_KIND, "bridge");
        if vlan_filtering {
            vlans::write_filtering(info, true);
        }
    });
    message
}

/// What [`set_link`] changes; `None` and `false` leave things as they are.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LinkChange<'a> {
    pub(crate) up: Option<bool>,
    pub(crate) alias: Option<&'a str>,
    pub(crate) master: Option<IfIndex>,
    pub(crate) no_ipv6_link_local: bool,
    pub(crate) ipv4_forwarding: bool,
    pub(crate) no_arp_replies: bool,
    pub(crate) rename: Option<&'a IfName>,
    pub(crate) mac: Option<MacAddr>,
    pub(crate) mtu: Option<u32>,
    pub(crate) tx_queue_len: Option<u32>,
    pub(crate) promisc: Option<bool>,
    pub(crate) allmulti: Option<bool>,
}

/// Changes an existing link. By index and never by name: in a batch the creation before it may have failed because
/// somebody else has the name.
pub(crate) fn set_link(name: &dyn fmt::Display, index: IfIndex, change: &LinkChange<'_>) -> Message {
    let LinkChange {
        up,
        alias,
        master,
        no_ipv6_link_local,
        ipv4_forwarding,
        no_arp_replies,
        rename,
        mac,
        mtu,
        tx_queue_len,
        promisc,
        allmulti,
    } = *change;
    let mut what = format!("configure link {name}:");
    let said = [
        (up == Some(true), "up"),
        (up == Some(false), "down"),
        (alias.is_some(), "alias"),
        (master.is_some(), "master"),
        (no_ipv6_link_local, "addr_gen_mode none"),
        (ipv4_forwarding, "ipv4 forwarding"),
        (no_arp_replies, "arp_ignore"),
        (rename.is_some(), "name"),
        (mac.is_some(), "address"),
        (mtu.is_some(), "mtu"),
        (tx_queue_len.is_some(), "txqueuelen"),
        (promisc.is_some(), "promisc"),
        (allmulti.is_some(), "allmulti"),
    ];
    for (_, word) in said.iter().filter(|(set, _)| *set) {
        what.push(' ');
        what.push_str(word);
    }
    let (mut flags, mut changed) = (0, 0);
    for (value, flag) in [(up, libc::IFF_UP), (promisc, libc::IFF_PROMISC), (allmulti, libc::IFF_ALLMULTI)] {
        if let Some(set) = value {
            changed |= flag as u32;
            flags |= if set { flag as u32 } else { 0 };
        }
    }
    let mut message = new_link(0, what, &header(index.get(), flags, changed));
    if let Some(name) = rename {
        message.text(libc::IFLA_IFNAME, name.as_str());
    }
    if let Some(mac) = mac {
        message.bytes(libc::IFLA_ADDRESS, &mac.bytes());
    }
    for (attribute, number) in [(libc::IFLA_MTU, mtu), (libc::IFLA_TXQLEN, tx_queue_len)] {
        if let Some(number) = number {
            message.u32(attribute, number);
        }
    }
    if let Some(alias) = alias {
        message.bytes(libc::IFLA_IFALIAS, alias.as_bytes());
    }
    if let Some(master) = master {
        message.u32(libc::IFLA_MASTER, master.get());
    }
    if no_ipv6_link_local || ipv4_forwarding || no_arp_replies {
        message.nest(libc::IFLA_AF_SPEC | NESTED, |spec| {
            if ipv4_forwarding || no_arp_replies {
                spec.nest(libc::AF_INET as u16 | NESTED, |inet| {
                    inet.nest(IFLA_INET_CONF | NESTED, |conf| {
                        if ipv4_forwarding {
                            conf.u32(IPV4_DEVCONF_FORWARDING, 1);
                        }
                        if no_arp_replies {
                            conf.u32(IPV4_DEVCONF_ARP_IGNORE, 8);
                        }
                    });
                });
            }
            if no_ipv6_link_local {
                spec.nest(libc::AF_INET6 as u16 | NESTED, |inet6| {
                    inet6.u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE);
                });
            }
        });
    }
    message
}

/// Lets a bridge port send a frame back out of the port it came from.
pub(crate) fn hairpin(port: &IfName, index: IfIndex) -> Message {
    set_port(port, index, "hairpin", IFLA_BRPORT_MODE)
}

/// Keeps frames of a bridge port from other isolated ports.
pub(crate) fn isolate(port: &IfName, index: IfIndex) -> Message {
    set_port(port, index, "isolation", IFLA_BRPORT_ISOLATED)
}

fn set_port(port: &IfName, index: IfIndex, what: &str, attribute: u16) -> Message {
    let mut head = header(index.get(), 0, 0);
    head[0] = libc::AF_BRIDGE as u8;
    let mut message = Message::new(libc::RTM_SETLINK, 0, format!("set {what} on port {port}"), &head);
    message.nest(libc::IFLA_PROTINFO | NESTED, |port| {
        port.u8(attribute, 1);
    });
    message
}

/// Puts a link into a group, which has no meaning but for requests about all of its links.
pub(crate) fn set_group(name: &str, index: IfIndex, group: u32) -> Message {
    let mut message = new_link(0, format!("put link {name} into a group"), &header(index.get(), 0, 0));
    message.u32(libc::IFLA_GROUP, group);
    message
}

/// Deletes all links of a group. `ENODEV` where it has none.
pub(crate) fn delete_group(group: u32) -> Message {
    let mut message = Message::new(libc::RTM_DELLINK, 0, "delete a group of links", &header(0, 0, 0));
    message.u32(libc::IFLA_GROUP, group);
    message
}

/// Deletes a link by index.
pub(crate) fn delete_link(name: &str, index: IfIndex) -> Message {
    Message::new(libc::RTM_DELLINK, 0, format!("delete link {name}"), &header(index.get(), 0, 0))
}

/// Asks for one link.
pub(crate) fn link_by_name(name: &IfName) -> Message {
    let mut message = Message::new(libc::RTM_GETLINK, 0, format!("look up link {name}"), &header(0, 0, 0));
    message.text(libc::IFLA_IFNAME, name.as_str());
    message.u32(libc::IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    message
}

/// Asks for all links, or those of one bridge.
pub(crate) fn link_dump(master: Option<IfIndex>) -> Message {
    let mut message = Message::new(libc::RTM_GETLINK, 0, "list links", &header(0, 0, 0));
    if let Some(master) = master {
        message.u32(libc::IFLA_MASTER, master.get());
    }
    message.u32(libc::IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    message
}

pub(super) fn new_link(flags: u16, operation: String, header: &[u8]) -> Message {
    Message::new(libc::RTM_NEWLINK, flags, operation, header)
}

/// `struct ifinfomsg`.
pub(super) fn header(index: u32, flags: u32, change: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}

pub(super) const HEADER: usize = 16;
/// The echo tells the indices of both ends (since Linux 6.2; before, there is none).
pub(super) const CREATE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL | libc::NLM_F_ECHO) as u16;
pub(super) const NESTED: u16 = libc::NLA_F_NESTED as u16;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INET_CONF: u16 = 1;
/// `IPV4_DEVCONF_FORWARDING` of `include/uapi/linux/ip.h`, which counts from 1 as the attribute does.
const IPV4_DEVCONF_FORWARDING: u16 = 1;
/// `IPV4_DEVCONF_ARP_IGNORE`.
const IPV4_DEVCONF_ARP_IGNORE: u16 = 19;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
/// `IFLA_BRPORT_MODE`: hairpin.
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_ISOLATED: u16 = 33;
pub(super) const RTEXT_FILTER_SKIP_STATS: u32 = 8;
