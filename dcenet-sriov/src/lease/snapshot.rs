//! What a function is: what is known of it, put back and looked at.

use std::fmt;

use dcenet_core::model::{IfName, MacAddr};
use serde::{Deserialize, Serialize};

use crate::kernel::{DriverState, NetdevState, VfChange, VfLinkState, VfRate, VfState, VfVlan};

use super::Wanted;

/// What a function is, on both of its sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VfSnapshot {
    /// What its port keeps.
    pub port: VfState,
    /// Its driver.
    pub driver: DriverState,
    /// Its network device in the host's namespace; `None` where its driver makes none.
    pub netdev: Option<NetdevSnapshot>,
}

/// What its network device is. Not its index, which is another after every return.
///
/// Nor is it all that a tenant with `CAP_NET_ADMIN` can change. A move keeps, and nothing puts back: the length of the
/// transmit queue, the group, the sizes of GSO and GRO (`do_setlink` in net/core/rtnetlink.c); and what ethtool sets,
/// such as offloads, channels, rings and coalescing. Binding the driver anew does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetdevSnapshot {
    /// Its name.
    pub name: IfName,
    /// Its alternative names, sorted.
    pub alternative_names: Vec<String>,
    /// Its alias.
    pub alias: Option<String>,
    /// The effective Ethernet address.
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Whether it receives all frames.
    pub promisc: bool,
    /// Whether it receives all multicast frames.
    pub all_multicast: bool,
}

impl From<NetdevState> for NetdevSnapshot {
    fn from(state: NetdevState) -> Self {
        let NetdevState { index: _, name, alternative_names, alias, mac, mtu, up, promisc, all_multicast } = state;
        Self { name, alternative_names, alias, mac, mtu, up, promisc, all_multicast }
    }
}

/// Something of a function that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What.
    pub what: &'static str,
    /// What it should be.
    pub want: String,
    /// What it is.
    pub is: String,
}

impl Difference {
    /// Whether drivers take it over some time after it was written: iavf does with an address when its port has
    /// answered (`iavf_virtchnl_completion` in drivers/net/ethernet/intel/iavf/iavf_virtchnl.c).
    pub(super) fn is_taken_over_later(&self) -> bool {
        matches!(self.what, "mac" | "effectiveMac")
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, want, is } = self;
        write!(f, "{what} is {is} instead of {want}")
    }
}

/// What an address of zeros is taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum NoAddress {
    /// Zeros.
    #[default]
    Zeros,
    /// Zeros, or the function's own address where the driver cannot take an address away.
    OrOwn,
}

impl VfSnapshot {
    /// What it is to be for somebody.
    pub(super) fn with(mut self, wanted: &Wanted) -> Self {
        let VfChange { mac, vlan, rate, spoofchk, link_state, rss_query, trust, node_guid, port_guid } = wanted.port;
        let port = &mut self.port;
        port.mac = mac.unwrap_or(port.mac);
        port.vlan = vlan.unwrap_or(port.vlan);
        port.rate = rate.unwrap_or(port.rate);
        port.link_state = link_state.unwrap_or(port.link_state);
        port.spoofchk = spoofchk.or(port.spoofchk);
        port.rss_query = rss_query.or(port.rss_query);
        port.trust = trust.or(port.trust);
        if let Some(guids) = &mut port.guids {
            guids.node = node_guid.unwrap_or(guids.node);
            guids.port = port_guid.unwrap_or(guids.port);
        }
        if let Some(netdev) = &mut self.netdev {
            netdev.mac = wanted.mac().or(netdev.mac);
            netdev.mtu = wanted.mtu.map_or(netdev.mtu, |mtu| mtu.get());
            netdev.promisc = wanted.promisc.unwrap_or(netdev.promisc);
            netdev.all_multicast = wanted.all_multicast.unwrap_or(netdev.all_multicast);
            // It is raised where it is used, under policy.
            netdev.up = false;
        }
        if let Some(driver) = &wanted.driver {
            let only = Some(driver.clone());
            self.driver = DriverState { driver: only.clone(), driver_override: only };
            self.netdev = None;
        }
        self
    }

    /// With what a function should be that belongs to nobody: no tag, no limit, no trust, its source addresses checked.
    pub(super) fn with_defaults(mut self) -> Self {
        let port = &mut self.port;
        (port.vlan, port.rate, port.link_state) = (VfVlan::default(), VfRate::default(), VfLinkState::Auto);
        port.spoofchk = port.spoofchk.map(|_| true);
        port.trust = port.trust.map(|_| false);
        port.rss_query = port.rss_query.map(|_| false);
        if let Some(netdev) = &mut self.netdev {
            (netdev.promisc, netdev.all_multicast, netdev.up) = (false, false, false);
        }
        self
    }

    /// What has to be written to the port so that a function that is `now` is this again. What the driver does not tell
    /// is not written.
    pub(super) fn port_change(&self, now: &VfState, none: NoAddress) -> VfChange {
        let own = || self.netdev.as_ref().and_then(|netdev| netdev.mac);
        let mac = match none {
            NoAddress::OrOwn if is_zero(self.port.mac) => own().unwrap_or(NOBODY),
            _ => self.port.mac,
        };
        VfState { mac, ..self.port.clone() }.restore(now)
    }

    /// In what `now` is not this. Empty where it is.
    pub(super) fn differences(&self, now: &Self, none: NoAddress) -> Vec<Difference> {
        let mut all = Vec::new();
        let mut tell = |what, want: String, is: String| {
            if want != is {
                all.push(Difference { what, want, is });
            }
        };
        let change = self.port_change(&now.port, none);
        if let Some(mac) = change.mac {
            tell("mac", mac.to_string(), now.port.mac.to_string());
        }
        tell("vlan", format!("{:?}", self.port.vlan), format!("{:?}", now.port.vlan));
        tell("rate", format!("{:?}", self.port.rate), format!("{:?}", now.port.rate));
        tell("linkState", format!("{:?}", self.port.link_state), format!("{:?}", now.port.link_state));
        for (what, want, is) in [
            ("spoofchk", change.spoofchk, now.port.spoofchk),
            ("trust", change.trust, now.port.trust),
            ("rssQuery", change.rss_query, now.port.rss_query),
        ] {
            if let (Some(want), Some(is)) = (want, is) {
                tell(what, want.to_string(), is.to_string());
            }
        }
        tell("guids", format!("{:?}", self.port.guids), format!("{:?}", now.port.guids));
        tell("driver", format!("{:?}", self.driver), format!("{:?}", now.driver));
        match (&self.netdev, &now.netdev) {
            (Some(want), Some(is)) => want.tell(is, &mut tell),
            (want, is) => {
                let name = |netdev: &Option<NetdevSnapshot>| match netdev {
                    Some(netdev) => netdev.name.to_string(),
                    None => "none".to_owned(),
                };
                tell("network device", name(want), name(is));
            }
        }
        all
    }
}

impl NetdevSnapshot {
    fn tell(&self, now: &Self, tell: &mut impl FnMut(&'static str, String, String)) {
        let Self { name, alternative_names, alias, mac, mtu, up, promisc, all_multicast } = self;
        tell("name", name.to_string(), now.name.to_string());
        tell("alternative names", alternative_names.join(" "), now.alternative_names.join(" "));
        tell("alias", format!("{alias:?}"), format!("{:?}", now.alias));
        tell("effectiveMac", format!("{mac:?}"), format!("{:?}", now.mac));
        tell("mtu", mtu.to_string(), now.mtu.to_string());
        tell("up", up.to_string(), now.up.to_string());
        tell("promisc", promisc.to_string(), now.promisc.to_string());
        tell("allMulticast", all_multicast.to_string(), now.all_multicast.to_string());
    }
}

pub(super) fn is_zero(mac: MacAddr) -> bool {
    mac.bytes() == [0; 6]
}

/// An address that no device should have, for a function without one of its own.
const NOBODY: MacAddr = MacAddr::new([2, 0, 0, 0, 0, 0]);
