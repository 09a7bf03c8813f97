//! Virtual devices of every kind but veth and bridge, and moving devices between namespaces.
//!
//! A device is made straight in the namespace where it is to live, down: its parent is looked up in the socket's own
//! namespace (`rtnl_newlink_create` in `net/core/rtnetlink.c`). Only what exists already, as a virtual function does, has
//! to be moved.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};

use serde::{Deserialize, Serialize};

use super::link::{CREATE, LinkChange, LinkView, delete_link, header, link_by_name, new_link};
use super::message::{Attributes, Message, field, text};
use super::vxlan::VxlanSpec;
use super::{Failure, Family, NetlinkError, Socket};
use crate::model::{IfIndex, IfName, MacAddr, Mtu, VlanId};
use crate::netns::{NetNs, NetNsError};

/// A device to create.
#[derive(Debug, Clone, Copy)]
pub struct NewLink<'a> {
    /// Its name.
    pub name: &'a IfName,
    /// What it is.
    pub kind: LinkKind<'a>,
    /// Its Ethernet address; chosen by the kernel where absent. Ipvlan devices have their parent's, layer-3 ones none.
    pub mac: Option<MacAddr>,
    /// Its MTU; by default the parent's, or what the kind says.
    pub mtu: Option<Mtu>,
    /// Where it is to live; the socket's namespace where absent.
    pub netns: Option<&'a NetNs>,
}

/// The kind of a device, with what that kind alone has (`IFLA_INFO_KIND` and `IFLA_INFO_DATA`).
///
/// A parent is a device in the socket's namespace.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum LinkKind<'a> {
    /// Swallows what is sent to it (`drivers/net/dummy.c`).
    Dummy,
    /// An Ethernet address of its own on a parent device (`drivers/net/macvlan.c`; modes since Linux 2.6.33).
    Macvlan {
        /// The parent. It cannot be an ipvlan's too.
        parent: IfIndex,
        /// Whom it reaches.
        mode: MacvlanMode,
        /// Whose frames it gets, where the mode is [`Source`](MacvlanMode::Source); elsewhere it must be empty (`EINVAL`).
        sources: &'a [MacAddr],
    },
    /// IP addresses of its own behind the parent's Ethernet address (`drivers/net/ipvlan`; since Linux 3.19).
    Ipvlan {
        /// The parent. It cannot be a macvlan's too.
        parent: IfIndex,
        /// How far up packets are handed over. One for all devices of a parent: the latest sets it.
        mode: IpvlanMode,
        /// Whom it reaches. One for all devices of a parent as well.
        flag: IpvlanFlag,
    },
    /// The frames of a parent that carry a tag (`net/8021q/vlan_netlink.c`; the protocol since Linux 3.10).
    Vlan {
        /// The parent.
        parent: IfIndex,
        /// The tag's VLAN.
        id: VlanId,
        /// The tag's EtherType.
        protocol: VlanProtocol,
    },
    /// A routing domain: links made its ports use its table (`drivers/net/vrf.c`; since Linux 4.3).
    Vrf {
        /// The routing table; 0 is none (`EINVAL`).
        table: u32,
    },
    /// A WireGuard tunnel, without keys and peers as yet (`drivers/net/wireguard`; since Linux 5.6). Its UDP socket stays
    /// in the namespace of the creating one.
    Wireguard,
    /// Gives what is sent to it back where it came in (`drivers/net/ifb.c`; since Linux 2.6.16).
    Ifb,
    /// Ethernet frames in UDP datagrams between hosts (RFC 7348; `drivers/net/vxlan`; since Linux 3.7, over IPv6 since
    /// 3.10). It learns nothing: who is where is entered in its forwarding database.
    Vxlan(VxlanSpec),
    /// A pair whose programs run where the packet enters (`drivers/net/netkit.c`; since Linux 6.7).
    Netkit {
        /// Whether it carries Ethernet frames.
        mode: NetkitMode,
        /// What becomes of packets sent into this end when no program decides.
        policy: NetkitPolicy,
        /// The same for the other end.
        peer_policy: NetkitPolicy,
        /// The other end's name. It must be said: the kernel would give it this end's.
        peer_name: &'a IfName,
        /// The other end's Ethernet address; chosen by the kernel where absent. Layer-3 pairs have none (`EOPNOTSUPP`).
        peer_mac: Option<MacAddr>,
        /// The other end's MTU.
        peer_mtu: Option<Mtu>,
        /// Where the other end lives; beside this one where absent.
        peer_netns: Option<&'a NetNs>,
    },
}

/// Whom a macvlan device reaches (`enum macvlan_mode` of `include/uapi/linux/if_link.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum MacvlanMode {
    /// No other device of the parent, not even over a switch that sends back.
    Private,
    /// Others of the parent, if the switch sends their frames back.
    Vepa,
    /// Others of the parent, directly. Never the parent itself.
    Bridge,
    /// It is the only one, and takes the parent over.
    Passthru,
    /// It gets the frames of listed senders and no others (Linux 3.18).
    Source,
}

/// How far up ipvlan hands packets over (`enum ipvlan_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum IpvlanMode {
    /// Frames; broadcast and multicast too.
    L2,
    /// Packets, routed in the parent's namespace; neither broadcast nor multicast, and no ARP.
    L3,
    /// As `L3`, and the parent's netfilter and connection tracking see them (Linux 4.9).
    L3s,
}

/// Whom an ipvlan device reaches (`IPVLAN_F_PRIVATE`, `IPVLAN_F_VEPA`; Linux 4.15).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum IpvlanFlag {
    /// Others of the parent, directly.
    #[default]
    Bridge,
    /// No other device of the parent.
    Private,
    /// Others of the parent, if the switch sends their frames back.
    Vepa,
}

/// The EtherType of a VLAN tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum VlanProtocol {
    /// Customer tags (0x8100, IEEE 802.1Q).
    #[default]
    #[serde(rename = "802.1q")]
    Dot1Q,
    /// Service tags, around customer tags (0x88a8, IEEE 802.1ad).
    #[serde(rename = "802.1ad")]
    Dot1Ad,
}

/// What a netkit pair carries (`enum netkit_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum NetkitMode {
    /// Ethernet frames, with addresses and neighbours.
    L2,
    /// IP packets; no ARP.
    L3,
}

/// What becomes of a packet when no program decides (`enum netkit_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum NetkitPolicy {
    /// It goes to the other end.
    #[default]
    Forward,
    /// It is dropped.
    Blackhole,
}

impl LinkKind<'_> {
    /// The kernel's name of the kind.
    pub fn name(&self) -> &'static str {
        self.about().name
    }

    fn about(&self) -> About {
        let about = |name, since, option| About { name, since, option };
        match self {
            Self::Dummy => about("dummy", "2.6.12", "CONFIG_DUMMY"),
            Self::Macvlan { .. } => about("macvlan", "2.6.33", "CONFIG_MACVLAN"),
            Self::Ipvlan { .. } => about("ipvlan", "3.19", "CONFIG_IPVLAN"),
            Self::Vlan { .. } => about("vlan", "3.10", "CONFIG_VLAN_8021Q"),
            Self::Vrf { .. } => about("vrf", "4.3", "CONFIG_NET_VRF"),
            Self::Wireguard => about("wireguard", "5.6", "CONFIG_WIREGUARD"),
            Self::Ifb => about("ifb", "2.6.16", "CONFIG_IFB"),
            Self::Vxlan(_) => about("vxlan", "3.10", "CONFIG_VXLAN"),
            Self::Netkit { .. } => about("netkit", "6.7", "CONFIG_NETKIT"),
        }
    }

    fn parent(&self) -> Option<IfIndex> {
        match *self {
            Self::Macvlan { parent, .. } | Self::Ipvlan { parent, .. } | Self::Vlan { parent, .. } => Some(parent),
            Self::Dummy | Self::Vrf { .. } | Self::Wireguard | Self::Ifb | Self::Vxlan(_) | Self::Netkit { .. } => None,
        }
    }

    fn data(&self, data: &mut Message) {
        match *self {
            Self::Dummy | Self::Wireguard | Self::Ifb => {}
            Self::Macvlan { mode, sources, .. } => {
                let mode = match mode {
                    MacvlanMode::Private => 1,
                    MacvlanMode::Vepa => 2,
                    MacvlanMode::Bridge => 4,
                    MacvlanMode::Passthru => 8,
                    MacvlanMode::Source => 16,
                };
                data.u32(IFLA_MACVLAN_MODE, mode);
                if !sources.is_empty() {
                    data.u32(IFLA_MACVLAN_MACADDR_MODE, MACVLAN_MACADDR_SET);
                    data.nest(IFLA_MACVLAN_MACADDR_DATA, |list| {
                        for source in sources {
                            list.bytes(IFLA_MACVLAN_MACADDR, &source.bytes());
                        }
                    });
                }
            }
            Self::Ipvlan { mode, flag, .. } => {
                let mode: u16 = match mode {
                    IpvlanMode::L2 => 0,
                    IpvlanMode::L3 => 1,
                    IpvlanMode::L3s => 2,
                };
                let flag: u16 = match flag {
                    IpvlanFlag::Bridge => 0,
                    IpvlanFlag::Private => 1,
                    IpvlanFlag::Vepa => 2,
                };
                data.bytes(IFLA_IPVLAN_MODE, &mode.to_ne_bytes());
                data.bytes(IFLA_IPVLAN_FLAGS, &flag.to_ne_bytes());
            }
            Self::Vlan { id, protocol, .. } => {
                let protocol: u16 = match protocol {
                    VlanProtocol::Dot1Q => 0x8100,
                    VlanProtocol::Dot1Ad => 0x88a8,
                };
                data.bytes(IFLA_VLAN_ID, &id.get().to_ne_bytes());
                data.bytes(IFLA_VLAN_PROTOCOL, &protocol.to_be_bytes());
            }
            Self::Vrf { table } => {
                data.u32(IFLA_VRF_TABLE, table);
            }
            Self::Vxlan(spec) => spec.write(data),
            Self::Netkit { mode, policy, peer_policy, peer_name, peer_mac, peer_mtu, peer_netns } => {
                let word = |policy| match policy {
                    NetkitPolicy::Forward => 0,
                    NetkitPolicy::Blackhole => 2,
                };
                data.u32(IFLA_NETKIT_MODE, if mode == NetkitMode::L2 { 0 } else { 1 });
                data.u32(IFLA_NETKIT_POLICY, word(policy));
                data.u32(IFLA_NETKIT_PEER_POLICY, word(peer_policy));
                data.nest(IFLA_NETKIT_PEER_INFO, |peer| {
                    peer.append(&header(0, 0, 0));
                    peer.text(libc::IFLA_IFNAME, peer_name.as_str());
                    if let Some(mac) = peer_mac {
                        peer.bytes(libc::IFLA_ADDRESS, &mac.bytes());
                    }
                    if let Some(mtu) = peer_mtu {
                        peer.u32(libc::IFLA_MTU, mtu.get());
                    }
                    if let Some(netns) = peer_netns {
                        peer.bytes(libc::IFLA_NET_NS_FD, &netns.as_fd().as_raw_fd().to_ne_bytes());
                    }
                });
            }
        }
    }
}

struct About {
    name: &'static str,
    since: &'static str,
    option: &'static str,
}

/// Why a device was not created.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateLinkError {
    /// The kernel does not know the kind, and has no module for it.
    #[error("create {kind} {name}: this kernel has no {kind}; it needs Linux {since} or later with {option}")]
    UnknownKind {
        /// The device.
        name: IfName,
        /// The kind.
        kind: &'static str,
        /// The first version that has it with the settings that are used.
        since: &'static str,
        /// The kernel's configuration option.
        option: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<NetlinkError>,
    },
    /// The kernel refused it: `EEXIST` where the name is taken, `ENODEV` where there is no such parent, `EBUSY` where the
    /// parent serves another kind. Where the reply was lost it [may be there](NetlinkError::may_have_happened).
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// It is created, but its index cannot be learnt: the namespace cannot be entered.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    /// It was created, and somebody else deleted or renamed it before its index was learnt.
    #[error("link {name} was created and vanished at once: somebody else deletes or renames links here")]
    Vanished {
        /// The device.
        name: IfName,
    },
}

impl Socket {
    /// Creates a device, down, and returns its index in the namespace where it lives.
    ///
    /// # Errors
    /// [`CreateLinkError::UnknownKind`] where the kernel lacks the kind; the other variants say whether the device is
    /// there.
    ///
    /// # Minimum kernel version
    /// That of the [kind](LinkKind). Before 6.2 (no echo on link creation) one more request is made.
    pub fn create_link(&mut self, link: &NewLink<'_>) -> Result<IfIndex, CreateLinkError> {
        let replies = self.request(&create_link(link)).map_err(|source| refused(link.name, &link.kind, source))?;
        let echo = replies.iter().filter(|r| r.kind == libc::RTM_NEWLINK).find_map(|r| LinkView::parse(&r.payload));
        if let Some(made) = echo {
            return Ok(made.index);
        }
        let made = match link.netns {
            None => self.link(link.name)?,
            Some(netns) => netns.socket(Family::Route)?.link(link.name)?,
        };
        made.map(|l| l.index).ok_or_else(|| CreateLinkError::Vanished { name: link.name.clone() })
    }

    /// The link of this name, if there is one.
    pub fn link(&mut self, name: &IfName) -> Result<Option<LinkView>, NetlinkError> {
        match self.request(&link_by_name(name)) {
            Ok(replies) => Ok(replies.iter().find_map(|r| LinkView::parse(&r.payload))),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Moves a link into another namespace, where it is down and, if `name` is given, called so. Its index is kept where
    /// it is free there (`__dev_change_net_namespace` in `net/core/dev.c`). Addresses and routes are lost.
    ///
    /// # Errors
    /// `EEXIST` where a name is taken there: where only the new one is, the link has moved and kept its old name
    /// (`do_setlink` in `net/core/rtnetlink.c` renames afterwards). `EINVAL` where the kind cannot move, as VRF.
    pub fn move_link(&mut self, link: &LinkView, to: &NetNs, name: Option<&IfName>) -> Result<(), NetlinkError> {
        self.request(&move_link(&link.name, link.index, to, name, &LinkChange::default())).map(drop)
    }

    /// Deletes a link.
    ///
    /// # Errors
    /// `ENODEV` where it is gone; `EOPNOTSUPP` where it is a physical device or a virtual function.
    pub fn delete_link(&mut self, link: &LinkView) -> Result<(), NetlinkError> {
        self.request(&delete_link(&link.name, link.index)).map(drop)
    }
}

/// Names the kernel that is too old, where that is the reason.
pub(crate) fn refused(name: &IfName, kind: &LinkKind<'_>, source: NetlinkError) -> CreateLinkError {
    // Drivers use the errno for purposes of their own, with other words.
    match &source.failure {
        Failure::Refused { errno: libc::EOPNOTSUPP, message: None, .. } => {}
        _ if lacks_kind(&source) => {}
        _ => return source.into(),
    }
    let About { name: kind, since, option } = kind.about();
    CreateLinkError::UnknownKind { name: name.clone(), kind, since, option, source: source.into() }
}

/// Whether the kernel says that it does not know the kind of a link.
pub(crate) fn lacks_kind(error: &NetlinkError) -> bool {
    matches!(&error.failure, Failure::Refused { errno: libc::EOPNOTSUPP, message: Some(text), .. } if text == "Unknown device type")
}

/// As [`Socket::create_link`], as a message for a batch.
pub(crate) fn create_link(link: &NewLink<'_>) -> Message {
    let NewLink { name, kind, mac, mtu, netns } = link;
    let mut message = new_link(CREATE, format!("create {kind} {name}"), &header(0, 0, 0));
    message.text(libc::IFLA_IFNAME, name.as_str());
    if let Some(mac) = mac {
        message.bytes(libc::IFLA_ADDRESS, &mac.bytes());
    }
    if let Some(mtu) = mtu {
        message.u32(libc::IFLA_MTU, mtu.get());
    }
    if let Some(parent) = kind.parent() {
        message.u32(libc::IFLA_LINK, parent.get());
    }
    if let Some(netns) = netns {
        message.bytes(libc::IFLA_NET_NS_FD, &netns.as_fd().as_raw_fd().to_ne_bytes());
    }
    message.nest(libc::IFLA_LINKINFO, |info| {
        info.text(libc::IFLA_INFO_KIND, kind.name());
        if !matches!(kind, LinkKind::Dummy | LinkKind::Wireguard) {
            info.nest(libc::IFLA_INFO_DATA, |data| kind.data(data));
        }
    });
    message
}

/// As [`Socket::move_link`], as a message for a batch, with changes that are made on the way.
pub(crate) fn move_link(
    link: &str,
    index: IfIndex,
    to: &NetNs,
    name: Option<&IfName>,
    change: &LinkChange<'_>,
) -> Message {
    let mut message = new_link(0, format!("move link {link}"), &header(index.get(), 0, 0));
    message.bytes(libc::IFLA_NET_NS_FD, &to.as_fd().as_raw_fd().to_ne_bytes());
    if let Some(name) = name {
        message.text(libc::IFLA_IFNAME, name.as_str());
    }
    if let Some(alias) = change.alias {
        message.bytes(libc::IFLA_IFALIAS, alias.as_bytes());
    }
    if let Some(mtu) = change.mtu {
        message.u32(libc::IFLA_MTU, mtu);
    }
    message
}

impl fmt::Display for LinkKind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// That of the device of a VLAN, within `IFLA_LINKINFO`.
pub(super) fn vlan_of(info: &[u8]) -> Option<VlanId> {
    let info = Attributes::new(info);
    info.find(libc::IFLA_INFO_KIND).map(text).filter(|kind| kind == "vlan")?;
    let id = Attributes::new(info.find(libc::IFLA_INFO_DATA)?).find(IFLA_VLAN_ID)?;
    field(id, 0).map(u16::from_ne_bytes)?.try_into().ok()
}

const IFLA_MACVLAN_MODE: u16 = 1;
const IFLA_MACVLAN_MACADDR_MODE: u16 = 3;
const IFLA_MACVLAN_MACADDR: u16 = 4;
const IFLA_MACVLAN_MACADDR_DATA: u16 = 5;
const MACVLAN_MACADDR_SET: u32 = 3;
const IFLA_IPVLAN_MODE: u16 = 1;
const IFLA_IPVLAN_FLAGS: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_VLAN_PROTOCOL: u16 = 5;
const IFLA_VRF_TABLE: u16 = 1;
const IFLA_NETKIT_PEER_INFO: u16 = 1;
const IFLA_NETKIT_POLICY: u16 = 3;
const IFLA_NETKIT_PEER_POLICY: u16 = 4;
const IFLA_NETKIT_MODE: u16 = 5;
