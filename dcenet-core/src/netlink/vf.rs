//! Settings of virtual functions, as their physical function's driver keeps them (`IFLA_VFINFO_LIST` of
//! `include/uapi/linux/if_link.h`; `rtnl_fill_vf` and `do_setvfinfo` in `net/core/rtnetlink.c`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::link::{HEADER, RTEXT_FILTER_SKIP_STATS, header};
use super::message::{Attributes, Message, field, number};
use super::{NetlinkError, Socket, VlanProtocol};
use crate::model::{IfIndex, MacAddr, ParseError, VlanId};

/// What a physical function's driver says of one of its virtual functions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VfView {
    /// The administrator's Ethernet address; zeros where there is none. Drivers differ: igb reports the function's own,
    /// once that has told it. Of InfiniBand functions, the first bytes of an address that cannot be set so.
    pub mac: MacAddr,
    /// The tag of what it sends and receives.
    pub vlan: VfVlan,
    /// How fast it may send.
    pub rate: VfRate,
    /// Whether frames with other source addresses than its own are dropped; `None` where the driver does not say.
    pub spoofchk: Option<bool>,
    /// Whether it may change its address and ask for promiscuity; `None` where the driver does not say (Linux 4.4).
    pub trust: Option<bool>,
    /// Whether it has carrier. Drivers that cannot set it say `Auto`.
    pub link_state: VfLinkState,
    /// Whether it may read how receive queues are chosen; `None` where the driver does not say (Linux 4.2).
    pub rss_query: Option<bool>,
    /// Its InfiniBand GUIDs (Linux 5.6); `None` on Ethernet.
    pub guids: Option<VfGuids>,
}

impl VfView {
    /// What has to be changed for a function that is as `now` to be as this says. What is as it was is not written:
    /// writing an address would make it the administrator's, and drivers refuse some settings whatever the value. Nor is
    /// what the driver does not tell now.
    pub fn restore(&self, now: &Self) -> VfChange {
        let guid = |which: fn(&VfGuids) -> Guid| {
            let (then, now) = (self.guids.as_ref().map(which)?, now.guids.as_ref().map(which)?);
            Some(then).filter(|then| *then != now)
        };
        let flag = |then: Option<bool>, is: Option<bool>| then.filter(|_| is.is_some() && then != is);
        // InfiniBand addresses are made of GUIDs, and cannot be set.
        let ethernet = self.guids.is_none();
        VfChange {
            mac: Some(self.mac).filter(|mac| ethernet && *mac != now.mac),
            vlan: Some(self.vlan).filter(|vlan| *vlan != now.vlan),
            rate: Some(self.rate).filter(|rate| *rate != now.rate),
            spoofchk: flag(self.spoofchk, now.spoofchk),
            link_state: Some(self.link_state).filter(|state| *state != now.link_state),
            rss_query: flag(self.rss_query, now.rss_query),
            trust: flag(self.trust, now.trust),
            node_guid: guid(|guids| guids.node),
            port_guid: guid(|guids| guids.port),
        }
    }
}

/// The tag that a physical function puts on the frames of a virtual one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VfVlan {
    /// The VLAN; `None` is no tag, or one with a priority alone where `qos` is not 0.
    pub id: Option<VlanId>,
    /// The tag's priority (IEEE 802.1Q, clause 9.6), 0 to 7.
    pub qos: u8,
    /// The tag's EtherType.
    pub protocol: VlanProtocol,
}

/// How fast a virtual function may send, in Mbit/s. 0 is no limit and no guarantee.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VfRate {
    /// What it is guaranteed.
    pub min: u32,
    /// What it cannot exceed.
    pub max: u32,
}

/// Whether a virtual function has carrier (`IFLA_VF_LINK_STATE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VfLinkState {
    /// While its physical function has.
    #[default]
    Auto,
    /// Always: virtual functions of one port reach each other though the port has none.
    Enable,
    /// Never.
    Disable,
}

/// The InfiniBand GUIDs of a virtual function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VfGuids {
    /// Of the node.
    pub node: Guid,
    /// Of its port.
    pub port: Guid,
}

/// A 64-bit InfiniBand identifier (EUI-64), printed as eight lower-case hexadecimal pairs with colons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Guid(pub u64);

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g, h, i] = self.0.to_be_bytes();
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}:{h:02x}:{i:02x}")
    }
}

impl FromStr for Guid {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let refused = || ParseError::new("GUID", text, "not eight hexadecimal pairs with colons");
        let pair = |pair: &str| {
            let good = pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit());
            good.then(|| u8::from_str_radix(pair, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(pair).collect();
        let bytes: [u8; 8] = bytes.and_then(|b| b.try_into().ok()).ok_or_else(refused)?;
        Ok(Self(u64::from_be_bytes(bytes)))
    }
}

crate::model::serde_by_text!(Guid);

/// What is to be changed of a virtual function by its physical function. What is `None` is not touched: drivers refuse
/// attributes that they lack even where the value would change nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VfChange {
    /// See [`VfView::mac`]; zeros take it away, where the driver can.
    pub mac: Option<MacAddr>,
    /// See [`VfView::vlan`]; the default takes it away.
    pub vlan: Option<VfVlan>,
    /// See [`VfView::rate`].
    pub rate: Option<VfRate>,
    /// See [`VfView::spoofchk`].
    pub spoofchk: Option<bool>,
    /// See [`VfView::link_state`].
    pub link_state: Option<VfLinkState>,
    /// See [`VfView::rss_query`].
    pub rss_query: Option<bool>,
    /// See [`VfView::trust`].
    pub trust: Option<bool>,
    /// See [`VfGuids::node`].
    pub node_guid: Option<Guid>,
    /// See [`VfGuids::port`].
    pub port_guid: Option<Guid>,
}

impl VfChange {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why nothing is told of virtual functions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfListError {
    /// The kernel refused. `EMSGSIZE` where there are too many for a message.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The list does not end where the kernel says that it does.
    #[error(
        "list virtual functions of link {link}: it has {wanted}, of which {found} could be read; reduce its number of virtual \
         functions"
    )]
    Incomplete {
        /// The physical function's device.
        link: IfIndex,
        /// How many it has.
        wanted: u32,
        /// How many could be read.
        found: usize,
    },
}

impl Socket {
    /// What a physical function's driver says of its virtual functions, with their numbers, which rise. One may be missing:
    /// the driver did not say anything of it. A device that has none, or cannot tell, has an empty list.
    ///
    /// The kernel asks the driver for each, under the lock of all links.
    ///
    /// # Errors
    /// [`VfListError::Incomplete`] where the list cannot be read to its end: never a part of it.
    pub fn vfs(&mut self, link: IfIndex) -> Result<Vec<(u32, VfView)>, VfListError> {
        let operation = format!("list virtual functions of link {link}");
        let mut message = Message::new(libc::RTM_GETLINK, 0, operation, &header(link.get(), 0, 0));
        message.u32(libc::IFLA_EXT_MASK, RTEXT_FILTER_VF | RTEXT_FILTER_SKIP_STATS);
        let replies = self.request_large(&message)?;
        let Some(reply) = replies.iter().find(|reply| reply.kind == libc::RTM_NEWLINK) else { return Ok(Vec::new()) };
        parse_list(&reply.payload).map_err(|(wanted, found)| VfListError::Incomplete { link, wanted, found })
    }

    /// Changes what a physical function's driver keeps of a virtual one, all by one message.
    ///
    /// # Errors
    /// What was changed before a refusal stays so: see `do_setvfinfo` in net/core/rtnetlink.c, which goes by the order of
    /// [`VfChange`].
    ///
    /// # Minimum kernel version
    /// 4.9 (`IFLA_VF_VLAN_LIST`); 4.10 for GUIDs.
    pub fn set_vf(&mut self, link: IfIndex, vf: u32, change: &VfChange) -> Result<(), NetlinkError> {
        self.request(&set_vf(link, vf, change)).map(drop)
    }
}

/// As [`Socket::set_vf`], as a message.
pub(super) fn set_vf(link: IfIndex, vf: u32, change: &VfChange) -> Message {
    let VfChange { mac, vlan, rate, spoofchk, link_state, rss_query, trust, node_guid, port_guid } = *change;
    let operation = format!("configure virtual function {vf} of link {link}");
    let mut message = Message::new(libc::RTM_SETLINK, 0, operation, &header(link.get(), 0, 0));
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let of_guid = |Guid(guid)| {
        // `struct ifla_vf_guid` has a hole before its 64 bits.
        let mut content = words(&[vf, 0]);
        content.extend(guid.to_ne_bytes());
        content
    };
    message.nest(IFLA_VFINFO_LIST, |list| {
        list.nest(IFLA_VF_INFO, |info| {
            if let Some(mac) = mac {
                // `struct ifla_vf_mac` has room for 32 bytes.
                let mut content = words(&[vf]);
                content.extend(mac.bytes());
                content.resize(4 + 32, 0);
                info.bytes(IFLA_VF_MAC, &content);
            }
            if let Some(VfVlan { id, qos, protocol }) = vlan {
                let protocol: u16 = match protocol {
                    VlanProtocol::Dot1Q => DOT1Q,
                    VlanProtocol::Dot1Ad => DOT1AD,
                };
                let mut content = words(&[vf, id.map_or(0, |id| u32::from(id.get())), u32::from(qos)]);
                content.extend(protocol.to_be_bytes());
                content.extend([0; 2]);
                info.nest(IFLA_VF_VLAN_LIST, |vlans| {
                    vlans.bytes(IFLA_VF_VLAN_INFO, &content);
                });
            }
            if let Some(VfRate { min, max }) = rate {
                info.bytes(IFLA_VF_RATE, &words(&[vf, min, max]));
            }
            let link_state = link_state.map(|state| match state {
                VfLinkState::Auto => 0,
                VfLinkState::Enable => 1,
                VfLinkState::Disable => 2,
            });
            for (attribute, value) in [
                (IFLA_VF_SPOOFCHK, spoofchk.map(u32::from)),
                (IFLA_VF_LINK_STATE, link_state),
                (IFLA_VF_RSS_QUERY_EN, rss_query.map(u32::from)),
                (IFLA_VF_TRUST, trust.map(u32::from)),
            ] {
                if let Some(value) = value {
                    info.bytes(attribute, &words(&[vf, value]));
                }
            }
            if let Some(guid) = node_guid {
                info.bytes(IFLA_VF_IB_NODE_GUID, &of_guid(guid));
            }
        });
        // The kernel is done with an entry when it has set a node GUID (`do_setvfinfo` in net/core/rtnetlink.c): what
        // came after it in the same entry would be dropped, and the answer is no error.
        if let Some(guid) = port_guid {
            list.nest(IFLA_VF_INFO, |info| {
                info.bytes(IFLA_VF_IB_PORT_GUID, &of_guid(guid));
            });
        }
    });
    message
}

/// Reads the list of a `RTM_NEWLINK` payload; or how many functions there are, and how many could be read.
pub(super) fn parse_list(payload: &[u8]) -> Result<Vec<(u32, VfView)>, (u32, usize)> {
    walk(payload, parse_one)
}

/// As [`parse_list`], with what `one` reads of each function.
///
/// An attribute's length has 16 bits, and the list of 335 functions is longer: the kernel overwrites it with what is left
/// (`nla_nest_end` in include/net/netlink.h). So entries are walked by their own lengths, past the end that the list states,
/// as long as their numbers rise, and what was walked must be what is stated, but for a multiple of 65,536.
pub(super) fn walk<T>(payload: &[u8], one: impl Fn(&[u8]) -> Option<(u32, T)>) -> Result<Vec<(u32, T)>, (u32, usize)> {
    let bytes = payload.get(HEADER..).unwrap_or_default();
    let attribute = |at: usize| -> Option<(usize, u16, &[u8])> {
        let len = usize::from(u16::from_ne_bytes(field(bytes, at)?));
        let kind = u16::from_ne_bytes(field(bytes, at + 2)?) & TYPE_MASK;
        Some((len, kind, bytes.get(at + 4..at.checked_add(len)?)?))
    };
    // Where the length wrapped, this attribute ends anywhere: only its head can be read.
    let head = |at: usize| {
        Some((u16::from_ne_bytes(field(bytes, at)?), u16::from_ne_bytes(field(bytes, at + 2)?) & TYPE_MASK))
    };
    let (mut at, mut wanted) = (0, 0);
    let stated = loop {
        match head(at) {
            Some((len, IFLA_VFINFO_LIST)) => break usize::from(len),
            Some((len, kind)) if len >= 4 => {
                if kind == IFLA_NUM_VF {
                    wanted = attribute(at).and_then(|(_, _, content)| number(content)).unwrap_or_default();
                }
                at += usize::from(len).next_multiple_of(4);
            }
            _ => return Ok(Vec::new()),
        }
    };
    let start = at;
    at += 4;
    let mut all: Vec<(u32, T)> = Vec::new();
    while let Some((len, IFLA_VF_INFO, content)) = attribute(at) {
        let Some((vf, view)) = one(content) else { break };
        if vf >= wanted || all.last().is_some_and(|(last, _)| *last >= vf) {
            break;
        }
        all.push((vf, view));
        at += len.next_multiple_of(4);
    }
    if (at - start) % (1 << 16) == stated { Ok(all) } else { Err((wanted, all.len())) }
}

fn parse_one(info: &[u8]) -> Option<(u32, VfView)> {
    let attributes = Attributes::new(info);
    let word = |attribute, place: usize| {
        let content = attributes.find(attribute)?;
        field(content, place * 4).map(u32::from_ne_bytes)
    };
    // The kernel presets what a driver need not fill with -1.
    let flag = |attribute| word(attribute, 1).filter(|value| *value != u32::MAX).map(|value| value != 0);
    let mac: [u8; 6] = field(attributes.find(IFLA_VF_MAC)?, 4)?;
    let tag = attributes.find(IFLA_VF_VLAN_LIST).and_then(|list| Attributes::new(list).find(IFLA_VF_VLAN_INFO));
    let protocol = match tag.and_then(|tag| field(tag, 12)).map(u16::from_be_bytes) {
        Some(DOT1AD) => VlanProtocol::Dot1Ad,
        _ => VlanProtocol::Dot1Q,
    };
    let guid = |attribute| attributes.find(attribute).and_then(|c| field(c, 8)).map(|b| Guid(u64::from_ne_bytes(b)));
    let guids = guid(IFLA_VF_IB_NODE_GUID).zip(guid(IFLA_VF_IB_PORT_GUID));
    let view = VfView {
        mac: MacAddr::new(mac),
        vlan: VfVlan {
            id: word(IFLA_VF_VLAN, 1).and_then(|id| u16::try_from(id).ok()).and_then(|id| VlanId::try_from(id).ok()),
            qos: word(IFLA_VF_VLAN, 2).and_then(|qos| u8::try_from(qos).ok()).unwrap_or_default(),
            protocol,
        },
        rate: VfRate {
            min: word(IFLA_VF_RATE, 1).unwrap_or_default(),
            max: word(IFLA_VF_RATE, 2).or_else(|| word(IFLA_VF_TX_RATE, 1)).unwrap_or_default(),
        },
        spoofchk: flag(IFLA_VF_SPOOFCHK),
        trust: flag(IFLA_VF_TRUST),
        link_state: match word(IFLA_VF_LINK_STATE, 1) {
            Some(1) => VfLinkState::Enable,
            Some(2) => VfLinkState::Disable,
            _ => VfLinkState::Auto,
        },
        rss_query: flag(IFLA_VF_RSS_QUERY_EN),
        guids: guids.map(|(node, port)| VfGuids { node, port }),
    };
    Some((number_of(&attributes)?, view))
}

/// Which function it is. Every entry begins with it.
pub(super) fn number_of(info: &Attributes<'_>) -> Option<u32> {
    number(info.find(IFLA_VF_MAC)?)
}

pub(super) const RTEXT_FILTER_VF: u32 = 1;
const IFLA_NUM_VF: u16 = 21;
const IFLA_VFINFO_LIST: u16 = 22;
const IFLA_VF_INFO: u16 = 1;
const IFLA_VF_MAC: u16 = 1;
const IFLA_VF_VLAN: u16 = 2;
const IFLA_VF_TX_RATE: u16 = 3;
const IFLA_VF_SPOOFCHK: u16 = 4;
const IFLA_VF_LINK_STATE: u16 = 5;
const IFLA_VF_RATE: u16 = 6;
const IFLA_VF_RSS_QUERY_EN: u16 = 7;
const IFLA_VF_TRUST: u16 = 9;
const IFLA_VF_IB_NODE_GUID: u16 = 10;
const IFLA_VF_IB_PORT_GUID: u16 = 11;
const IFLA_VF_VLAN_LIST: u16 = 12;
const IFLA_VF_VLAN_INFO: u16 = 1;
/// `ETH_P_8021Q`.
const DOT1Q: u16 = 0x8100;
/// `ETH_P_8021AD`.
const DOT1AD: u16 = 0x88a8;
/// `NLA_TYPE_MASK`.
const TYPE_MASK: u16 = 0x3fff;

#[cfg(test)]
mod tests {
    use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::link::{LinkAttribute, LinkVfInfo, VfInfo};
    use proptest::prelude::*;

    use super::*;

    fn view(n: u32) -> VfView {
        let [_, _, high, low] = n.to_be_bytes();
        VfView {
            mac: MacAddr::new([2, 0, 0, 0, high, low]),
            vlan: VfVlan { id: u16::try_from(n % 4095).ok().and_then(|id| id.try_into().ok()), ..VfVlan::default() },
            rate: VfRate { min: n, max: 2 * n },
            spoofchk: Some(n.is_multiple_of(2)),
            trust: None,
            link_state: VfLinkState::Enable,
            rss_query: None,
            guids: None,
        }
    }

    /// A reply as the kernel writes it: 192 bytes for each function without statistics, and 16 bits for their sum.
    fn reply(wanted: u32, there: impl Iterator<Item = u32>) -> Vec<u8> {
        let attribute = |kind: u16, content: &[u8]| {
            let len = (content.len() + 4) as u16;
            let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
            bytes.extend_from_slice(content);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        let mut list = Vec::new();
        for n in there {
            let VfView { mac, vlan, rate, spoofchk, .. } = view(n);
            let id = vlan.id.map_or(0, |id| u32::from(id.get()));
            let mut info = attribute(1, &[&words(&[n])[..], &mac.bytes(), &[0; 26]].concat());
            info.extend(attribute(13, &[0xff; 32]));
            info.extend(attribute(2, &words(&[n, id, 0])));
            info.extend(attribute(6, &words(&[n, rate.min, rate.max])));
            info.extend(attribute(3, &words(&[n, rate.max])));
            info.extend(attribute(4, &words(&[n, u32::from(spoofchk.unwrap())])));
            info.extend(attribute(5, &words(&[n, 1])));
            info.extend(attribute(7, &words(&[n, u32::MAX])));
            info.extend(attribute(9, &words(&[n, u32::MAX])));
            info.extend(attribute(12, &attribute(1, &[&words(&[n, id, 0])[..], &[0x81, 0, 0, 0]].concat())));
            list.extend(attribute(1, &info));
        }
        let mut bytes = vec![0; HEADER];
        bytes.extend(attribute(3, b"pf0\0"));
        bytes.extend(attribute(21, &wanted.to_ne_bytes()));
        bytes.extend(((list.len() + 4) as u16).to_ne_bytes());
        bytes.extend(22_u16.to_ne_bytes());
        bytes.extend(list);
        bytes.extend(attribute(43, &attribute(2, &[0])));
        bytes.extend(attribute(56, b"0000:01:00.0\0"));
        bytes
    }

    #[test]
    fn bug_21_lists_of_any_length_are_read_whole() {
        for count in [0, 1, 7, 127, 221, 222, 254, 334, 335, 336, 682, 683, 1_000, 65_535] {
            let list = parse_list(&reply(count, 0..count)).unwrap();
            assert_eq!(list.len(), count as usize);
            assert!(list.iter().enumerate().all(|(at, (n, seen))| *n == at as u32 && *seen == view(*n)), "{count}");
        }
        // The twin: whoever trusts the stated length sees a part.
        let long = reply(400, 0..400);
        let trusting =
            Attributes::new(&long[HEADER..]).find(IFLA_VFINFO_LIST).map_or(0, |list| Attributes::new(list).count());
        assert!(trusting < 400, "{trusting}");
    }

    #[test]
    fn a_list_that_does_not_end_where_it_says_is_an_error_with_both_counts() {
        let mut cut = reply(400, 0..400);
        cut.truncate(HEADER + 40_000);
        let Err((wanted, found)) = parse_list(&cut) else { panic!("read a part") };
        assert!(wanted == 400 && found < 400, "{found}");
        let mut falling = reply(9, [0, 1, 2, 2, 4].into_iter());
        assert_eq!(parse_list(&falling), Err((9, 3)));
        falling = reply(3, [0, 1, 7].into_iter());
        assert_eq!(parse_list(&falling), Err((3, 2)));
        let error = VfListError::Incomplete { link: IfIndex::new(4).unwrap(), wanted: 400, found: 3 };
        assert!(
            error.to_string().starts_with("list virtual functions of link 4: it has 400, of which 3 could be read")
        );
    }

    #[test]
    fn what_the_driver_withholds_is_missing_and_nothing_else() {
        let list = parse_list(&reply(500, (0..500).filter(|n| *n != 3))).unwrap();
        assert_eq!(list.len(), 499);
        assert!(list.iter().all(|(n, seen)| *seen == view(*n)));
    }

    #[test]
    fn all_settings_travel_in_one_message_that_others_read_alike() {
        let change = VfChange {
            mac: Some(MacAddr::new([2, 0, 0, 0, 0, 9])),
            vlan: Some(VfVlan { id: 100.try_into().ok(), qos: 3, protocol: VlanProtocol::Dot1Ad }),
            rate: Some(VfRate { min: 10, max: 20 }),
            spoofchk: Some(false),
            link_state: Some(VfLinkState::Disable),
            rss_query: Some(true),
            trust: Some(true),
            node_guid: Some("00:11:22:33:44:55:66:77".parse().unwrap()),
            port_guid: Some(Guid(8)),
        };
        let mut bytes = Vec::new();
        set_vf(IfIndex::new(7).unwrap(), 5, &change).encode(1, 0, &mut bytes);
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes).unwrap();
        let NetlinkPayload::InnerMessage(RouteNetlinkMessage::SetLink(read)) = message.payload else {
            panic!("{message:?}")
        };
        assert_eq!(read.header.index, 7);
        let [LinkAttribute::VfInfoList(list)] = &read.attributes[..] else { panic!("{read:?}") };
        // Two entries of the one function, because the kernel ends the first with the node's GUID.
        let [LinkVfInfo(infos), LinkVfInfo(after)] = &list[..] else { panic!("{list:?}") };
        // In the order in which the kernel does it.
        let kinds = |infos: &[VfInfo]| -> Vec<String> {
            infos.iter().map(|info| format!("{info:?}").split('(').next().unwrap().to_owned()).collect()
        };
        let wanted = ["Mac", "VlanList", "Rate", "SpoofCheck", "LinkState", "RssQueryEn", "Trust", "IbNodeGuid"];
        assert_eq!(kinds(infos), wanted);
        assert_eq!(kinds(after), ["IbPortGuid"]);
        let said = format!("{after:?}");
        assert!(said.contains("vf_id: 5"), "{said}");
        let said = format!("{infos:?}");
        for part in ["vf_id: 5", "vlan_id: 100", "qos: 3", "min_tx_rate: 10", "max_tx_rate: 20", "Disable"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(infos.iter().all(|info| !matches!(info, VfInfo::Other(_))), "{said}");
    }

    #[test]
    fn guids_round_trip() {
        let text = "00:11:22:33:44:55:66:ff";
        assert_eq!(text.parse::<Guid>().unwrap(), Guid(0x0011_2233_4455_66ff));
        assert_eq!(text.parse::<Guid>().unwrap().to_string(), text);
        for bad in [
            "",
            "00:11",
            "00:11:22:33:44:55:66:7",
            "00:11:22:33:44:55:66:77:88",
            "0011223344556677",
            "+1:11:22:33:44:55:66:77",
        ] {
            bad.parse::<Guid>().unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn hostile_lists_are_read_without_a_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), cut in 0_usize..4_000) {
            std::hint::black_box(parse_list(&bytes).is_ok());
            let mut list = reply(9, 0..9);
            list.truncate(cut);
            list.append(&mut bytes);
            std::hint::black_box(parse_list(&list).is_ok());
        }
    }
}
