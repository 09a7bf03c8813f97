//! What a successful ADD tells the runtime (CNI 1.1.0, section 5, "Add Success"), and its older forms.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::SpecVersion;
use crate::model::{MacAddr, Mtu};
use crate::provider::{Dns, Lease};

/// The result of ADD.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniResult {
    /// What was made, on the host and in the container; nothing by an IPAM plugin.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// The container's addresses.
    #[serde(default)]
    pub ips: Vec<Ip>,
    /// The container's routes.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// Resolver settings.
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
}

/// An interface of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its hardware address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Its MTU in bytes; since 1.1.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// The namespace's path exactly as `CNI_NETNS` gave it; absent on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<PathBuf>,
}

/// An address of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    /// The address with its subnet's prefix length.
    pub address: IpNet,
    /// The subnet's router; says nothing about routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Which of the result's interfaces bears it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    /// "4" or "6"; only in the form of 0.4.0 and older.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
}

/// A route of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination prefix.
    pub dst: IpNet,
    /// Next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

impl CniResult {
    /// Describes a lease on the interface of number `container` in `interfaces`.
    pub fn new(interfaces: Vec<Interface>, container: usize, lease: &Lease) -> Self {
        Self {
            interfaces,
            ips: lease
                .addresses
                .iter()
                .map(|a| Ip { address: a.address, gateway: a.gateway, interface: Some(container), version: None })
                .collect(),
            routes: lease.routes.iter().map(|r| Route { dst: r.destination, gw: r.gateway }).collect(),
            dns: lease.dns.clone(),
        }
    }

    /// Describes a lease for the plugin that asked for it, which has the interfaces (CNI 1.1.0, section 4).
    pub fn of_lease(lease: &Lease) -> Self {
        let mut result = Self::new(Vec::new(), 0, lease);
        for ip in &mut result.ips {
            ip.interface = None;
        }
        result
    }

    /// The result object for stdout, in the form of `version`.
    pub fn to_json(&self, version: SpecVersion) -> String {
        #[derive(Serialize)]
        struct Wire<'a> {
            #[serde(rename = "cniVersion")]
            version: &'a str,
            #[serde(flatten)]
            result: &'a CniResult,
        }
        let mut result = self.clone();
        if version <= SpecVersion::V0_4_0 {
            for ip in &mut result.ips {
                ip.version = Some(if ip.address.addr().is_ipv4() { "4" } else { "6" }.to_owned());
            }
        }
        if version < SpecVersion::V1_1_0 {
            for interface in &mut result.interfaces {
                interface.mtu = None;
            }
        }
        serde_json::to_string(&Wire { version: version.as_str(), result: &result })
            .expect("names, numbers and UTF-8 paths always serialise")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::provider::{LeasedAddress, LeasedRoute};

    fn result() -> CniResult {
        let lease = Lease {
            addresses: ["10.0.0.5/24", "2001:db8::5/64"]
                .map(|a| LeasedAddress::new(a.parse().unwrap(), "p", 1))
                .to_vec(),
            routes: vec![LeasedRoute {
                destination: "0.0.0.0/0".parse().unwrap(),
                gateway: Some("10.0.0.1".parse().unwrap()),
            }],
            dns: Dns::default(),
            mac: None,
        };
        let interface = Interface {
            name: "eth0".to_owned(),
            mac: Some("02:00:00:00:00:01".parse().unwrap()),
            mtu: Some(Mtu::try_from(1500).unwrap()),
            sandbox: Some("/var/run/netns/p".into()),
        };
        CniResult::new(vec![interface], 0, &lease)
    }

    #[test]
    fn the_newest_form_has_all() {
        let json: Value = serde_json::from_str(&result().to_json(SpecVersion::V1_1_0)).unwrap();
        assert_eq!(
            json,
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "mtu": 1500, "sandbox": "/var/run/netns/p"}],
                "ips": [{"address": "10.0.0.5/24", "interface": 0}, {"address": "2001:db8::5/64", "interface": 0}],
                "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}],
            })
        );
    }

    #[test]
    fn older_forms_say_the_family_and_no_mtu() {
        for version in [SpecVersion::V0_3_1, SpecVersion::V0_4_0] {
            let json: Value = serde_json::from_str(&result().to_json(version)).unwrap();
            assert_eq!(json["ips"][0]["version"], "4");
            assert_eq!(json["ips"][1]["version"], "6");
            assert!(json["interfaces"][0].get("mtu").is_none());
        }
        let json: Value = serde_json::from_str(&result().to_json(SpecVersion::V1_0_0)).unwrap();
        assert!(json["ips"][0].get("version").is_none() && json["interfaces"][0].get("mtu").is_none());
    }
}
