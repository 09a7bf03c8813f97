//! Address translation of a pod's traffic by its host: masquerading, and ports of the host that lead to the pod.
//!
//! All of it is entries of sets and maps in one nftables table of our own, `inet dcenet`, whose rules are the same
//! however many pods there are. [`elements`] says which entries an attachment has; only the
//! [`Engine`](crate::engine::Engine) enters and removes them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use crate::link::PlanError;

/// What is translated for an attachment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nat {
    /// Whether what the pod sends beyond its own networks bears an address of the host.
    #[serde(default)]
    pub masquerade: bool,
    /// Ports of the host that lead to the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortMapping>,
}

impl Nat {
    /// Whether nothing is translated.
    pub fn is_none(&self) -> bool {
        !self.masquerade && self.ports.is_empty()
    }
}

/// The section `nat` of a configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NatConfig {
    /// Whether packets from the pod's addresses to places outside the networks of these addresses, multicast excepted, are
    /// sent on with an address of the link by which they leave the host, and answers come back; both families. It is what
    /// `ipMasq` of the reference plugin `bridge` does. What is sent to an address of another pod of this host for which
    /// anything is translated keeps its source, for policy would take an address of the host for the host.
    ///
    /// The host is made to forward packets of the families that the pod has (`net.ipv4.ip_forward`,
    /// `net.ipv6.conf.all.forwarding`) where it does not yet, and is left so when the pod goes. **A host that forwards
    /// IPv6 takes no router advertisements** (`accept_ra`, `Documentation/networking/ip-sysctl.rst`): one that has its own
    /// addresses or default route from them loses them when they expire, unless `net.ipv6.conf.LINK.accept_ra` of its
    /// uplink is 2.
    #[serde(default)]
    pub masquerade: bool,
}

/// A port of the host that leads to a port of the pod: an entry of the capability `portMappings` (CNI conventions).
///
/// The host is made to forward packets, which has the consequence for router advertisements that
/// [`NatConfig::masquerade`] tells. Processes of the host reach the port at `127.0.0.1`, but not at `::1`, for Linux routes
/// no packet with that source. Of a pod on a bridge that is under policy, other pods of its network do not reach the mapped
/// port but at the pod's own address: they would have to bear the host's address, and pass for the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortMapping {
    /// The address of the host at which the port is; every address of the host where absent, loopback included. An
    /// unspecified one (`0.0.0.0`, `::`) means every address of its family, and maps nothing where the pod has none of
    /// that family. `::1` is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// The host's port.
    pub host_port: u16,
    /// The pod's port.
    pub container_port: u16,
    /// The transport protocol.
    pub protocol: Transport,
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        HostPort { address: self.host_ip, protocol: self.protocol, port: self.host_port }.fmt(f)
    }
}

/// A transport protocol that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 9260.
    Sctp,
}

impl Transport {
    /// Its number (IANA, "Protocol Numbers").
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    /// The protocol of this name, in whatever case.
    pub fn of_name(name: &str) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Sctp].into_iter().find(|t| t.as_str().eq_ignore_ascii_case(name))
    }
}

/// An entry of one of our sets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Element {
    /// A port of the host, at one address or at all of the pod address's family.
    Port {
        /// The host's address; every one where absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        address: Option<IpAddr>,
        /// The protocol.
        protocol: Transport,
        /// The host's port.
        port: u16,
        /// The pod's address.
        to: IpAddr,
        /// The pod's port.
        to_port: u16,
    },
    /// Callers of a port whose packets the pod would not answer by way of the host: they get an address of the host.
    Hairpin {
        /// The protocol.
        protocol: Transport,
        /// The host's port.
        port: u16,
        /// The callers.
        callers: IpNet,
        /// The pod's address.
        to: IpAddr,
    },
    /// A pod's address, towards which nobody is masqueraded.
    Pod {
        /// The address.
        address: IpAddr,
    },
    /// A pod's address that is masqueraded.
    Masquerade {
        /// The address.
        source: IpAddr,
    },
    /// What a pod's address reaches as itself all the same.
    Home {
        /// The address.
        source: IpAddr,
        /// The network.
        network: IpNet,
    },
}

impl Element {
    /// Whether its key is of the family of IPv4.
    pub fn is_ipv4(&self) -> bool {
        match self {
            Self::Port { to, .. } | Self::Hairpin { to, .. } => to.is_ipv4(),
            Self::Masquerade { source } | Self::Home { source, .. } | Self::Pod { address: source } => source.is_ipv4(),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port { address, protocol, port, to, to_port } => {
                let from = HostPort { address: *address, protocol: *protocol, port: *port };
                write!(f, "{from} to {} of {to}", to_port)
            }
            Self::Hairpin { protocol, port, callers, to } => {
                write!(f, "the way back from {to} to {callers} for port {port}/{}", protocol.as_str())
            }
            Self::Pod { address } => write!(f, "{address} being called by whoever it is"),
            Self::Masquerade { source } => write!(f, "masquerading of {source}"),
            Self::Home { source, network } => write!(f, "{source} reaching {network} as itself"),
        }
    }
}

/// A port of the host, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostPort {
    pub(crate) address: Option<IpAddr>,
    pub(crate) protocol: Transport,
    pub(crate) port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "port {}/{}", self.port, self.protocol.as_str())?;
        self.address.map_or(Ok(()), |address| write!(f, " of {address}"))
    }
}

/// The entries of an attachment with these addresses, each once. `neighbours`: whether others of the pod's networks get an
/// address of the host when they call a mapped port. They need it where the pod would answer them past the host, over a
/// bridge, and must not have it where policy decides by who calls.
///
/// # Errors
/// Where a port is at an address of a family that the pod does not have, at `::1`, or twice.
pub fn elements(nat: &Nat, addresses: &[IpNet], neighbours: bool) -> Result<Vec<Element>, PlanError> {
    let mut elements = Vec::new();
    for (i, mapping) in nat.ports.iter().enumerate() {
        let invalid = |reason: String| PlanError::Invalid {
            field: "runtimeConfig.portMappings",
            value: mapping.to_string(),
            reason,
        };
        let PortMapping { host_ip, host_port: port, container_port: to_port, protocol } = *mapping;
        let overlaps = |other: &&PortMapping| {
            let apart = matches!((specific(other.host_ip), specific(host_ip)), (Some(a), Some(b)) if a != b);
            let families = matches!((other.host_ip, host_ip), (Some(a), Some(b)) if a.is_ipv4() != b.is_ipv4());
            other.host_port == port && other.protocol == protocol && !apart && !families
        };
        if nat.ports[..i].iter().any(|other| other == mapping) {
            continue;
        }
        if let Some(other) = nat.ports[..i].iter().find(overlaps) {
            return Err(invalid(format!("{other} is mapped too, and includes it or is included; drop one of the two")));
        }
        if host_ip.is_some_and(|ip| ip.is_ipv6() && ip.is_loopback()) {
            let reason = "no packet leaves the host with a loopback address of IPv6; give 127.0.0.1, or drop hostIP";
            return Err(invalid(reason.to_owned()));
        }
        // An unspecified address asks for what there is of its family.
        let mut found = host_ip.is_some_and(|ip| ip.is_unspecified());
        for family in [true, false] {
            if host_ip.is_some_and(|ip| ip.is_ipv4() != family) {
                continue;
            }
            // One address of a family is enough to be reached at, and the first is the one that the pod prefers.
            let Some(to) = addresses.iter().find(|a| a.addr().is_ipv4() == family) else { continue };
            found = true;
            let (network, to) = (to.trunc(), to.addr());
            elements.push(Element::Port { address: specific(host_ip), protocol, port, to, to_port });
            let mut callers = vec![if neighbours { network } else { IpNet::from(to) }];
            if reached_by_loopback(host_ip) && family {
                callers.push(LOOPBACK);
            }
            elements.extend(callers.into_iter().map(|callers| Element::Hairpin { protocol, port, callers, to }));
        }
        if !found {
            let reason = "the pod has no address of the family; drop hostIP, or give the network a pool of the family";
            return Err(invalid(reason.to_owned()));
        }
    }
    if nat.masquerade {
        let networks = IpNet::aggregate(&addresses.iter().map(IpNet::trunc).collect());
        for source in addresses.iter().map(IpNet::addr) {
            elements.push(Element::Masquerade { source });
            let same_family = networks.iter().filter(|n| n.addr().is_ipv4() == source.is_ipv4());
            elements.extend(same_family.map(|network| Element::Home { source, network: *network }));
        }
    }
    if !nat.is_none() {
        elements.extend(addresses.iter().map(|address| Element::Pod { address: address.addr() }));
    }
    // The way back of a port is the same at each of its addresses.
    let mut each = Vec::with_capacity(elements.len());
    for element in elements {
        if !each.contains(&element) {
            each.push(element);
        }
    }
    Ok(each)
}

/// Whether a process of the host may call the port at a loopback address of IPv4.
pub(crate) fn reached_by_loopback(host_ip: Option<IpAddr>) -> bool {
    specific(host_ip).is_none_or(|ip| ip.is_loopback()) && host_ip.is_none_or(|ip| ip.is_ipv4())
}

fn specific(address: Option<IpAddr>) -> Option<IpAddr> {
    address.filter(|ip| !ip.is_unspecified())
}

/// `127.0.0.0/8`.
const LOOPBACK: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8));

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host_ip: Option<&str>, host_port: u16) -> PortMapping {
        let host_ip = host_ip.map(|ip| ip.parse().unwrap());
        PortMapping { host_ip, host_port, container_port: 80, protocol: Transport::Tcp }
    }

    /// All but the pod's addresses, one each at the end.
    fn listed(nat: &Nat, addresses: &[&str], neighbours: bool) -> Vec<String> {
        let addresses: Vec<IpNet> = addresses.iter().map(|a| a.parse().unwrap()).collect();
        let mut elements = elements(nat, &addresses, neighbours).unwrap();
        let pods = elements.split_off(elements.len() - addresses.len());
        assert_eq!(pods, addresses.iter().map(|a| Element::Pod { address: a.addr() }).collect::<Vec<_>>());
        elements.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_masqueraded_pod_is_itself_in_all_its_networks() {
        let nat = Nat { masquerade: true, ports: Vec::new() };
        assert_eq!(
            listed(&nat, &["10.1.0.5/24", "10.2.0.5/24", "2001:db8::5/64"], true),
            [
                "masquerading of 10.1.0.5",
                "10.1.0.5 reaching 10.1.0.0/24 as itself",
                "10.1.0.5 reaching 10.2.0.0/24 as itself",
                "masquerading of 10.2.0.5",
                "10.2.0.5 reaching 10.1.0.0/24 as itself",
                "10.2.0.5 reaching 10.2.0.0/24 as itself",
                "masquerading of 2001:db8::5",
                "2001:db8::5 reaching 2001:db8::/64 as itself",
            ]
        );
        // One network within the other is one: entries may not overlap.
        assert_eq!(listed(&nat, &["10.1.0.5/24", "10.1.1.5/16"], true).len(), 4);
    }

    #[test]
    fn a_port_leads_to_both_families_unless_its_address_says_otherwise() {
        let both = ["10.1.0.5/24", "2001:db8::5/64"];
        let ports = |list: &[PortMapping]| Nat { masquerade: false, ports: list.to_vec() };
        assert_eq!(
            listed(&ports(&[port(None, 8080)]), &both, true),
            [
                "port 8080/tcp to 80 of 10.1.0.5",
                "the way back from 10.1.0.5 to 10.1.0.0/24 for port 8080/tcp",
                "the way back from 10.1.0.5 to 127.0.0.0/8 for port 8080/tcp",
                "port 8080/tcp to 80 of 2001:db8::5",
                "the way back from 2001:db8::5 to 2001:db8::/64 for port 8080/tcp",
            ]
        );
        assert_eq!(
            listed(&ports(&[port(Some("192.0.2.1"), 8080)]), &both, false),
            [
                "port 8080/tcp of 192.0.2.1 to 80 of 10.1.0.5",
                "the way back from 10.1.0.5 to 10.1.0.5/32 for port 8080/tcp"
            ]
        );
        assert_eq!(listed(&ports(&[port(Some("::"), 8080)]), &both, true).len(), 2);
        assert_eq!(listed(&ports(&[port(None, 8080), port(None, 8080)]), &both, true).len(), 5);
    }

    #[test]
    fn ports_that_cannot_be_had_are_refused_by_name() {
        let refused = |list: &[PortMapping], addresses: &[&str]| {
            let addresses: Vec<IpNet> = addresses.iter().map(|a| a.parse().unwrap()).collect();
            elements(&Nat { masquerade: false, ports: list.to_vec() }, &addresses, true).unwrap_err().to_string()
        };
        let error = refused(&[port(Some("2001:db8::1"), 80)], &["10.1.0.5/24"]);
        assert!(
            error.contains("runtimeConfig.portMappings") && error.contains("port 80/tcp of 2001:db8::1"),
            "{error}"
        );
        let other = PortMapping { container_port: 81, ..port(None, 80) };
        assert!(refused(&[port(None, 80), other], &["10.1.0.5/24"]).contains("drop one"));
        assert!(refused(&[port(None, 80), port(Some("192.0.2.1"), 80)], &["10.1.0.5/24"]).contains("drop one"));
        let apart = [port(Some("192.0.2.1"), 80), port(Some("192.0.2.2"), 80), port(Some("::"), 80)];
        let nat = Nat { masquerade: false, ports: apart.to_vec() };
        // The first two have one way back.
        assert_eq!(
            listed(&nat, &["10.1.0.5/24", "2001:db8::5/64"], true),
            [
                "port 80/tcp of 192.0.2.1 to 80 of 10.1.0.5",
                "the way back from 10.1.0.5 to 10.1.0.0/24 for port 80/tcp",
                "port 80/tcp of 192.0.2.2 to 80 of 10.1.0.5",
                "port 80/tcp to 80 of 2001:db8::5",
                "the way back from 2001:db8::5 to 2001:db8::/64 for port 80/tcp",
            ]
        );
        assert!(refused(&[port(Some("::1"), 80)], &["2001:db8::5/64"]).contains("127.0.0.1"));
        let any6 = Nat { masquerade: false, ports: vec![port(Some("::"), 80)] };
        assert_eq!(listed(&any6, &["10.1.0.5/24"], true), [""; 0]);
    }
}
