//! Settings of virtual functions, as their physical function's driver keeps them (`IFLA_VFINFO_LIST` of
//! `include/uapi/linux/if_link.h`; `rtnl_fill_vf` and `do_setvfinfo` in `net/core/rtnetlink.c`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::model::{MacAddr, ParseError, VlanId};
use crate::netlink::VlanProtocol;

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
