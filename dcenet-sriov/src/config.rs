//! What somebody wants of a virtual function, checked before anything is written.
//!
//! What is not said is not touched: drivers refuse attributes that they lack, whatever the value.
//!
//! ```
//! use dcenet_sriov::config::{VfConfig, VfSettings};
//!
//! let settings = VfSettings { vlan: Some(100), qos: Some(3), max_rate: Some(1_000), ..VfSettings::default() };
//! let config = VfConfig::new(settings)?;
//! assert_eq!(config.settings().vlan, Some(100));
//!
//! let error = VfConfig::new(VfSettings { qos: Some(3), ..VfSettings::default() }).unwrap_err();
//! assert_eq!(error.to_string(), "qos 3: a priority needs a tag; set vlan, 1 to 4094, too");
//! # Ok::<(), dcenet_sriov::config::ConfigError>(())
//! ```

use std::collections::BTreeSet;

use dcenet_core::model::{MacAddr, Mtu, VlanId};
use serde::{Deserialize, Serialize};

use crate::kernel::{
    Attribute, Guid, NetdevChange, VfChange, VfLinkState, VfRate, VfState, VfVlan, VlanProtocol, asked,
};

/// What can be set of a virtual function, not checked yet.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct VfSettings {
    /// The Ethernet address, for the port and the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// The VLAN whose tag the port puts on and takes off, 1 to 4094; 0 for no tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// The tag's priority, 0 to 7.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qos: Option<u8>,
    /// The tag's EtherType, `802.1q` or `802.1ad`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<VlanProtocol>,
    /// The rate that it is guaranteed, in Mbit/s; 0 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_rate: Option<u32>,
    /// The rate that it cannot exceed, in Mbit/s; 0 for none. Some drivers take it only while the port has carrier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<u32>,
    /// Whether frames with other source addresses than its own are dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spoofchk: Option<bool>,
    /// Whether it may change its address and ask for promiscuity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
    /// Its carrier: `auto`, `enable` or `disable`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_state: Option<VfLinkState>,
    /// Whether it may read how receive queues are chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_query: Option<bool>,
    /// The InfiniBand node GUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_guid: Option<Guid>,
    /// The InfiniBand port GUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_guid: Option<Guid>,
    /// The device's MTU, in bytes. Its port's is not changed, and is the largest that passes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// Whether the device receives all multicast frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub all_multicast: Option<bool>,
    /// Whether the device receives all frames that come to its port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub promisc: Option<bool>,
}

impl VfSettings {
    /// What a member of a bond inside a pod needs: its address moves to another member, which trust allows and the spoof
    /// check must not stop. One of both alone is not enough on every adapter.
    ///
    /// Bed: modelled.
    pub fn for_bond() -> Self {
        Self { trust: Some(true), spoofchk: Some(false), ..Self::default() }
    }
}

/// Settings that contradict neither themselves nor what any driver could do.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "VfSettings", into = "VfSettings")]
pub struct VfConfig(VfSettings);

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{attribute} {value}: {reason}")]
pub struct ConfigError {
    /// The setting.
    pub attribute: Attribute,
    /// Its value.
    pub value: String,
    /// Why it is refused, and what would be accepted.
    pub reason: String,
}

impl VfConfig {
    /// Checks settings.
    ///
    /// # Errors
    /// The first setting that is wrong, whatever the adapter.
    ///
    /// Bed: none is needed.
    pub fn new(settings: VfSettings) -> Result<Self, ConfigError> {
        let VfSettings { mac, vlan, qos, protocol, min_rate, max_rate, trust, all_multicast, promisc, .. } = &settings;
        let refuse =
            |attribute, value: String, reason: &str| Err(ConfigError { attribute, value, reason: reason.into() });
        if let Some(mac) = mac.filter(|mac| !mac.is_device_address()) {
            let reason = "multicast or zero, which no device may bear; give a unicast address";
            return refuse(Attribute::Mac, mac.to_string(), reason);
        }
        if let Some(vlan) = vlan.filter(|vlan| *vlan > 4094) {
            return refuse(Attribute::Vlan, vlan.to_string(), "no VLAN; give 1 to 4094, or 0 for no tag");
        }
        let tagged = vlan.is_some_and(|vlan| vlan != 0);
        match *qos {
            Some(qos) if qos > 7 => {
                return refuse(Attribute::Qos, qos.to_string(), "a tag has three bits of it; give 0 to 7");
            }
            Some(qos) if qos != 0 && !tagged => {
                return refuse(Attribute::Qos, qos.to_string(), "a priority needs a tag; set vlan, 1 to 4094, too");
            }
            _ => {}
        }
        if *protocol == Some(VlanProtocol::Dot1Ad) && !tagged {
            let reason = "a service tag needs a VLAN; set vlan, 1 to 4094, too";
            return refuse(Attribute::Protocol, "802.1ad".into(), reason);
        }
        rates(min_rate.unwrap_or_default(), max_rate.unwrap_or_default())?;
        for (attribute, wanted) in [(Attribute::AllMulticast, all_multicast), (Attribute::Promisc, promisc)] {
            if *wanted == Some(true) && *trust != Some(true) {
                let reason = "the port ignores it where it does not trust the function; set trust to true, too";
                return refuse(attribute, "true".into(), reason);
            }
        }
        Ok(Self(settings))
    }

    /// The settings.
    pub fn settings(&self) -> &VfSettings {
        &self.0
    }

    /// What is to be written to the port, of which `now` says what it keeps: where one message attribute carries both
    /// rates, the one that nobody asked for is written as it is. A VLAN is one setting: with `vlan` alone the tag's priority is 0
    /// and its EtherType `802.1q`, whatever they are.
    ///
    /// # Errors
    /// Where what is asked for contradicts what is there.
    ///
    /// Bed: igb, netdevsim; modelled.
    pub fn change(&self, now: &VfState) -> Result<VfChange, ConfigError> {
        let settings = &self.0;
        let vlan = settings.vlan.map(|vlan| VfVlan {
            id: VlanId::try_from(vlan).ok(),
            qos: settings.qos.unwrap_or_default(),
            protocol: settings.protocol.unwrap_or_default(),
        });
        let rate = match (settings.min_rate, settings.max_rate) {
            (None, None) => None,
            (min, max) => {
                let (min, max) = (min.unwrap_or(now.rate.min), max.unwrap_or(now.rate.max));
                rates(min, max)?;
                Some(VfRate { min, max })
            }
        };
        Ok(VfChange {
            mac: settings.mac,
            vlan,
            rate,
            spoofchk: settings.spoofchk,
            link_state: settings.link_state,
            rss_query: settings.rss_query,
            trust: settings.trust,
            node_guid: settings.node_guid,
            port_guid: settings.port_guid,
        })
    }

    /// What is to be written to the network device. It is to be written after the port's: a function that is not trusted
    /// cannot change its address once the port has given it one.
    ///
    /// Bed: igb; modelled.
    pub fn netdev(&self) -> NetdevChange {
        NetdevChange {
            mac: self.0.mac,
            mtu: self.0.mtu,
            promisc: self.0.promisc,
            all_multicast: self.0.all_multicast,
            ..NetdevChange::default()
        }
    }

    /// What a driver must be able to set for this.
    pub fn attributes(&self) -> BTreeSet<Attribute> {
        let VfSettings {
            mac,
            vlan,
            qos,
            protocol,
            min_rate,
            max_rate,
            spoofchk,
            trust,
            link_state,
            rss_query,
            node_guid,
            port_guid,
            mtu,
            all_multicast,
            promisc,
        } = &self.0;
        let said = [
            (mac.is_some(), Attribute::Mac),
            (vlan.is_some(), Attribute::Vlan),
            (qos.is_some_and(|qos| qos != 0), Attribute::Qos),
            (*protocol == Some(VlanProtocol::Dot1Ad), Attribute::Protocol),
            (min_rate.is_some_and(|rate| rate != 0), Attribute::MinRate),
            (max_rate.is_some() || min_rate.is_some(), Attribute::MaxRate),
            (spoofchk.is_some(), Attribute::Spoofchk),
            (trust.is_some(), Attribute::Trust),
            (link_state.is_some(), Attribute::LinkState),
            (rss_query.is_some(), Attribute::RssQuery),
            (node_guid.is_some(), Attribute::NodeGuid),
            (port_guid.is_some(), Attribute::PortGuid),
            (mtu.is_some(), Attribute::Mtu),
            (all_multicast.is_some(), Attribute::AllMulticast),
            (promisc.is_some(), Attribute::Promisc),
        ];
        said.into_iter().filter_map(|(set, attribute)| set.then_some(attribute)).collect()
    }
}

impl TryFrom<VfSettings> for VfConfig {
    type Error = ConfigError;

    fn try_from(settings: VfSettings) -> Result<Self, ConfigError> {
        Self::new(settings)
    }
}

impl From<VfConfig> for VfSettings {
    fn from(config: VfConfig) -> Self {
        config.0
    }
}

/// The kernel refuses a guarantee above the limit (`do_setvfinfo` in net/core/rtnetlink.c, since Linux 6.1).
fn rates(min: u32, max: u32) -> Result<(), ConfigError> {
    if max != 0 && min > max {
        let reason = format!("above maxRate, which is {max}; give at most that, or raise maxRate");
        return Err(ConfigError { attribute: Attribute::MinRate, value: min.to_string(), reason });
    }
    Ok(())
}

/// What a port's driver can set of its functions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    driver: Option<String>,
    missing: BTreeSet<Attribute>,
}

/// The driver cannot set it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{attribute}: {} cannot set it; leave it out, or use an adapter whose driver can",
    driver.as_deref().map_or("this port, without a driver,".to_owned(), |name| format!("the driver {name}"))
)]
pub struct Unsupported {
    /// What was wanted.
    pub attribute: Attribute,
    /// The port's driver.
    pub driver: Option<String>,
}

impl Capabilities {
    /// What a port can do: what its driver leaves out of what it says of one of its functions, and what is known of
    /// the driver where that does not tell. Nothing is written. A driver that is not known may still refuse.
    ///
    /// Bed: igb, netdevsim; other drivers modelled.
    pub fn of(driver: Option<&str>, state: &VfState) -> Self {
        let mut missing: BTreeSet<Attribute> = [
            (state.spoofchk.is_none(), Attribute::Spoofchk),
            (state.trust.is_none(), Attribute::Trust),
            (state.rss_query.is_none(), Attribute::RssQuery),
            (state.guids.is_none(), Attribute::NodeGuid),
            (state.guids.is_none(), Attribute::PortGuid),
        ]
        .into_iter()
        .filter_map(|(missing, attribute)| missing.then_some(attribute))
        .collect();
        let known = REFUSALS.iter().filter(|(name, _)| Some(*name) == driver);
        missing.extend(known.flat_map(|(_, attributes)| *attributes));
        Self { driver: driver.map(str::to_owned), missing }
    }

    /// Whether it can be set.
    pub fn supports(&self, attribute: Attribute) -> bool {
        !self.missing.contains(&attribute)
    }

    /// Refuses what the driver cannot do, before anything is written.
    ///
    /// # Errors
    /// The first setting that it cannot, in the order of [`Attribute`].
    ///
    /// Bed: igb; other drivers modelled.
    pub fn check(&self, config: &VfConfig) -> Result<(), Unsupported> {
        match config.attributes().intersection(&self.missing).next() {
            Some(attribute) => Err(Unsupported { attribute: *attribute, driver: self.driver.clone() }),
            None => Ok(()),
        }
    }

    /// As [`check`](Self::check), of a change.
    pub(crate) fn check_change(&self, change: &VfChange) -> Result<(), Unsupported> {
        match asked(change).into_iter().find(|attribute| !self.supports(*attribute)) {
            Some(attribute) => Err(Unsupported { attribute, driver: self.driver.clone() }),
            None => Ok(()),
        }
    }
}

/// What drivers refuse and do not tell by leaving it out: drivers/net/ethernet/intel/igb/igb_main.c (`igb_ndo_set_vf_vlan`,
/// `igb_ndo_set_vf_bw`), intel/ixgbe/ixgbe_sriov.c (`ixgbe_ndo_set_vf_vlan`, `ixgbe_ndo_set_vf_bw`),
/// intel/i40e/i40e_virtchnl_pf.c (`i40e_ndo_set_vf_port_vlan`, `i40e_ndo_set_vf_bw`),
/// mellanox/mlx5/core/en_main.c (`mlx5e_set_vf_vlan`), broadcom/bnx2x/bnx2x_main.c (`bnx2x_netdev_ops`).
const REFUSALS: &[(&str, &[Attribute])] = &[
    ("igb", &[Attribute::Protocol, Attribute::MinRate, Attribute::LinkState]),
    ("ixgbe", &[Attribute::Protocol, Attribute::MinRate]),
    ("i40e", &[Attribute::Protocol, Attribute::MinRate]),
    ("mlx5_core", &[Attribute::Protocol]),
    ("bnx2x", &[Attribute::Protocol, Attribute::MinRate, Attribute::MaxRate]),
];

#[cfg(test)]
mod tests {
    use dcenet_core::section;
    use serde_json::json;

    use super::*;

    fn refused(settings: VfSettings) -> String {
        VfConfig::new(settings).unwrap_err().to_string()
    }

    fn state() -> VfState {
        VfState {
            mac: MacAddr::new([0; 6]),
            vlan: VfVlan::default(),
            rate: VfRate { min: 0, max: 500 },
            spoofchk: Some(true),
            trust: Some(false),
            link_state: VfLinkState::Auto,
            rss_query: None,
            guids: None,
        }
    }

    #[test]
    fn contradictions_name_field_value_and_remedy() {
        let none = VfSettings::default;
        let zero = Some(MacAddr::new([0; 6]));
        for (settings, wanted) in [
            (VfSettings { mac: zero, ..none() }, "mac 00:00:00:00:00:00: multicast or zero"),
            (VfSettings { vlan: Some(4095), ..none() }, "vlan 4095: no VLAN; give 1 to 4094"),
            (VfSettings { vlan: Some(5), qos: Some(8), ..none() }, "qos 8: a tag has three bits"),
            (VfSettings { vlan: Some(0), qos: Some(1), ..none() }, "qos 1: a priority needs a tag"),
            (
                VfSettings { protocol: Some(VlanProtocol::Dot1Ad), ..none() },
                "protocol 802.1ad: a service tag needs a VLAN",
            ),
            (VfSettings { min_rate: Some(9), max_rate: Some(8), ..none() }, "minRate 9: above maxRate, which is 8"),
            (VfSettings { promisc: Some(true), ..none() }, "promisc true: the port ignores it"),
            (VfSettings { all_multicast: Some(true), trust: Some(false), ..none() }, "allMulticast true: the port"),
        ] {
            let said = refused(settings);
            assert!(said.starts_with(wanted), "{said}");
        }
        VfConfig::new(VfSettings { min_rate: Some(9), max_rate: Some(0), ..none() }).unwrap();
        VfConfig::new(VfSettings { promisc: Some(true), trust: Some(true), ..none() }).unwrap();
    }

    #[test]
    fn sections_are_read_strictly_and_written_as_read() {
        let text = json!({ "mac": "02:00:00:00:00:01", "vlan": 7, "protocol": "802.1ad", "linkState": "enable",
            "nodeGuid": "00:11:22:33:44:55:66:77" });
        let config: VfConfig = section::read("link.vf", &text).unwrap();
        assert_eq!(serde_json::to_value(&config).unwrap(), text);
        let error = section::read::<VfConfig>("link.vf", &json!({ "spoofchck": true })).unwrap_err();
        assert!(error.reason.contains("did you mean `spoofchk`?"), "{error}");
        let error = section::read::<VfConfig>("link.vf", &json!({ "qos": 3 })).unwrap_err();
        assert!(error.to_string().contains("qos 3: a priority needs a tag"), "{error}");
    }

    #[test]
    fn bug_24_what_is_not_asked_for_is_not_written() {
        let nothing = VfConfig::default();
        assert_eq!(nothing.change(&state()).unwrap(), VfChange::default());
        assert_eq!(nothing.netdev(), NetdevChange::default());
        assert_eq!(nothing.attributes(), BTreeSet::new());
    }

    #[test]
    fn rates_are_written_in_pairs_and_keep_the_other() {
        let min = |min| VfConfig::new(VfSettings { min_rate: Some(min), ..VfSettings::default() }).unwrap();
        assert_eq!(min(100).change(&state()).unwrap().rate, Some(VfRate { min: 100, max: 500 }));
        let error = min(501).change(&state()).unwrap_err();
        assert_eq!((error.attribute, error.value.as_str()), (Attribute::MinRate, "501"));
    }

    #[test]
    fn what_a_driver_lacks_is_refused_before_the_first_write() {
        let igb = Capabilities::of(Some("igb"), &state());
        let check = |settings| igb.check(&VfConfig::new(settings).unwrap()).map_err(|e| e.attribute);
        let none = VfSettings::default;
        assert_eq!(check(VfSettings { min_rate: Some(1), ..none() }), Err(Attribute::MinRate));
        assert_eq!(check(VfSettings { rss_query: Some(true), ..none() }), Err(Attribute::RssQuery));
        assert_eq!(check(VfSettings { node_guid: Some(Guid(1)), ..none() }), Err(Attribute::NodeGuid));
        assert_eq!(check(VfSettings { link_state: Some(VfLinkState::Auto), ..none() }), Err(Attribute::LinkState));
        let protocol = Some(VlanProtocol::Dot1Ad);
        assert_eq!(check(VfSettings { vlan: Some(5), protocol, ..none() }), Err(Attribute::Protocol));
        assert_eq!(check(VfSettings { vlan: Some(5), qos: Some(1), max_rate: Some(5), ..none() }), Ok(()));
        assert_eq!(check(VfSettings { min_rate: Some(0), ..none() }), Ok(()));
        let said = igb.check(&VfConfig::new(VfSettings { min_rate: Some(1), ..none() }).unwrap()).unwrap_err();
        assert_eq!(
            said.to_string(),
            "minRate: the driver igb cannot set it; leave it out, or use an adapter whose driver can"
        );
        let ice = Capabilities::of(Some("ice"), &state());
        assert!(ice.supports(Attribute::MinRate) && !ice.supports(Attribute::RssQuery));
    }
}
