//! Link drivers: what kind of device connects a pod, and how.
//!
//! A driver plans and recognises; it touches nothing. One file beside this one per kind of link.

mod bridge;
mod chained;
#[cfg(feature = "test-support")]
pub mod conformance;
mod dummy;
mod host_device;
mod ipvlan;
mod macvlan;
mod netkit;
mod pod_end;
mod shaper;
mod sriov;
mod tap;
#[cfg(test)]
mod tests;
mod veth;
mod vlan;
mod vrf;

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::bridge::BridgeConfig;
pub use self::chained::ChainedConfig;
pub use self::dummy::DummyConfig;
pub use self::host_device::HostDeviceConfig;
pub use self::ipvlan::IpvlanConfig;
pub use self::macvlan::MacvlanConfig;
pub use self::netkit::NetkitConfig;
pub use self::sriov::SriovConfig;
pub use self::tap::{TapConfig, TapMode};
pub use self::veth::VethConfig;
pub use self::vlan::VlanConfig;
pub use self::vrf::VrfConfig;
use crate::bandwidth::Bandwidth;
use crate::model::{AttachmentKey, IfName, MacAddr, Mtu, VlanId};
use crate::netlink::{AddressView, IpvlanMode, LinkView};
use crate::plan::Plan;
use crate::probe::Underlay;
use crate::provider::{DeviceWish, LeasedAddress, LeasedRoute, LentDevice};
use crate::section::{self, SectionError};
use crate::sysctl::Sysctls;

/// Plans attachments of one kind.
///
/// All methods are pure: called as often as anybody likes, from any thread, without privileges.
pub trait LinkDriver: Send + Sync {
    /// The name of the kind, as in the configuration's `link.kind`.
    fn kind(&self) -> &'static str;

    /// What it wants of a [`DeviceSource`](crate::provider::DeviceSource) before anything is planned; what that gives is
    /// [`LinkRequest::device`]. `None`, the default, for kinds that make their devices.
    ///
    /// # Errors
    /// As [`plan`](Self::plan), as far as it can be told without the device.
    fn device(&self, _: &LinkRequest) -> Result<Option<DeviceWish>, PlanError> {
        Ok(None)
    }

    /// The links of the host that the plan depends on. Called before each [`plan`](Self::plan); the engine looks them
    /// up, with their addresses where `addresses` is set.
    fn needs(&self, request: &LinkRequest) -> Vec<Need>;

    /// What attaching takes, given what the host looks like now.
    ///
    /// # Errors
    /// Where the request, the configuration and the host contradict each other.
    fn plan(&self, request: &LinkRequest, host: &HostView) -> Result<Plan, PlanError>;

    /// Everything that a finished attachment has, whoever made it: what a check compares with. By default the plan for a
    /// host on which nothing is.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    fn expect(&self, request: &LinkRequest, _: &HostView) -> Result<Plan, PlanError> {
        self.plan(request, &HostView::default())
    }

    /// The links of the host that attachments share, and that go when the network does.
    fn shared(&self) -> Vec<IfName> {
        Vec::new()
    }
}

/// What is to be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkRequest {
    /// The attachment.
    pub key: AttachmentKey,
    /// The pod end's Ethernet address.
    pub mac: MacAddr,
    /// The pod's addresses.
    pub addresses: Vec<LeasedAddress>,
    /// The pod's routes.
    pub routes: Vec<LeasedRoute>,
    /// Whether the host's end is put under policy before it is up.
    pub policy: Policy,
    /// The device that a source gave, where the driver [wants](LinkDriver::device) one.
    pub device: Option<LentDevice>,
}

/// Whether policy is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// The engine's policy sink decides for the attachment.
    Wanted,
    /// Nothing is attached.
    None,
}

/// A link of the host that a plan depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Its name.
    pub link: IfName,
    /// Whether its addresses matter too.
    pub addresses: bool,
}

/// What the host looks like, as far as the driver needed it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostView {
    /// The links that exist.
    pub links: Vec<LinkView>,
    /// Their addresses.
    pub addresses: Vec<AddressView>,
}

impl HostView {
    /// The link of this name.
    pub fn link(&self, name: &IfName) -> Option<&LinkView> {
        self.links.iter().find(|l| l.name == name.as_str())
    }

    /// Whether the link has an IPv6 link-local address, whoever gave it.
    pub fn has_link_local(&self, link: &LinkView) -> bool {
        self.addresses.iter().any(|a| a.index == link.index && is_link_local(&a.address))
    }

    /// Whether the link has the address with this prefix length.
    pub fn has_address(&self, link: &LinkView, address: IpNet) -> bool {
        self.addresses.iter().any(|a| a.index == link.index && a.address == address)
    }
}

/// Lists every kind once: its word in the configuration, its variant and its type.
macro_rules! kinds {
    ($($(#[$doc:meta])+ $word:literal => $variant:ident($config:ty)),+ $(,)?) => {
        /// The `link` section of a configuration.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(tag = "kind")]
        #[non_exhaustive]
        pub enum LinkConfig {
            $($(#[$doc])+ #[serde(rename = $word)] $variant($config),)+
            /// A device that a plugin before us in the chain made. No configuration names it.
            #[serde(rename = "chained")]
            Chained(ChainedConfig),
        }

        impl LinkConfig {
            /// The words that `link.kind` may be.
            pub const KINDS: &[&'static str] = &[$($word),+];

            fn of_kind(kind: &str, rest: &Value) -> Option<Result<Self, SectionError>> {
                match kind {
                    $($word => Some(section::read("link", rest).map(Self::$variant)),)+
                    _ => None,
                }
            }

            /// The driver for it.
            pub fn driver(&self) -> &dyn LinkDriver {
                match self {
                    $(Self::$variant(config) => config,)+
                    Self::Chained(config) => config,
                }
            }

            /// Settings of the pod's namespace.
            pub fn sysctl(&self) -> &Sysctls {
                match self {
                    $(Self::$variant(config) => &config.sysctl,)+
                    Self::Chained(_) => Sysctls::NONE,
                }
            }
        }
    };
}

kinds! {
    /// A veth whose host end is a port of a Linux bridge.
    "bridge" => Bridge(BridgeConfig),
    /// A veth with routed addresses and no bridge.
    "veth" => Veth(VethConfig),
    /// An Ethernet address of its own on a device of the host.
    "macvlan" => Macvlan(MacvlanConfig),
    /// IP addresses of its own behind the Ethernet address of a device of the host.
    "ipvlan" => Ipvlan(IpvlanConfig),
    /// A VLAN of a device of the host.
    "vlan" => Vlan(VlanConfig),
    /// A device of the host, which is the pod's for its life.
    "host-device" => HostDevice(HostDeviceConfig),
    /// A virtual function of a network adapter, which is the pod's for its life.
    "sriov" => Sriov(SriovConfig),
    /// A veth with routed addresses, in a routing domain of the host.
    "vrf" => Vrf(VrfConfig),
    /// A netkit pair with routed addresses.
    "netkit" => Netkit(NetkitConfig),
    /// A device that leads nowhere, to bear addresses.
    "dummy" => Dummy(DummyConfig),
    /// A TAP or TUN device for a program in the pod, such as a virtual machine's.
    "tap" => Tap(TapConfig),
}

impl LinkConfig {
    /// What care is taken of addresses on the segment; `None` for a kind, or a configuration of it, that takes none.
    pub fn underlay(&self) -> Option<Underlay> {
        match self {
            Self::Bridge(config) => config.underlay,
            Self::Macvlan(config) => Some(config.underlay.unwrap_or_default()),
            Self::Ipvlan(config) => (config.mode == IpvlanMode::L2).then(|| config.underlay.unwrap_or_default()),
            Self::Vlan(config) => Some(config.underlay.unwrap_or_default()),
            Self::HostDevice(config) => Some(config.underlay.unwrap_or_default()),
            Self::Sriov(config) => Some(config.underlay.unwrap_or_default()),
            Self::Veth(_) | Self::Vrf(_) | Self::Netkit(_) | Self::Dummy(_) | Self::Tap(_) | Self::Chained(_) => None,
        }
    }

    /// The same with these limits in the place of its own, in each direction that they limit.
    ///
    /// # Errors
    /// For a kind whose packets do not pass the host.
    pub fn limited(mut self, bandwidth: Bandwidth) -> Result<Self, PlanError> {
        if bandwidth.is_none() {
            return Ok(self);
        }
        let limits = match &mut self {
            Self::Bridge(config) => &mut config.bandwidth,
            Self::Veth(config) => &mut config.bandwidth,
            Self::Vrf(config) => &mut config.bandwidth,
            Self::Netkit(config) => &mut config.bandwidth,
            other => {
                return Err(PlanError::Invalid {
                    field: "runtimeConfig.bandwidth",
                    value: other.driver().kind().to_owned(),
                    reason:
                        "packets of this link.kind do not pass the host, so that it cannot limit them; use bridge, \
                             veth, vrf or netkit, or drop it"
                            .to_owned(),
                });
            }
        };
        *limits =
            Bandwidth { ingress: bandwidth.ingress.or(limits.ingress), egress: bandwidth.egress.or(limits.egress) };
        Ok(self)
    }

    /// Reads the section `link`.
    ///
    /// # Errors
    /// Names the wrong field by its path from the top of the configuration.
    pub fn read(value: &Value) -> Result<Self, SectionError> {
        // Serde's tagged enums forget the path: the kind is read first, then what belongs to it.
        let at = |field: &str, reason: String| SectionError { field: field.to_owned(), reason };
        let Value::Object(keys) = value else {
            return Err(at("link", format!("{value} is not an object; give {{ \"kind\": ..., ... }}")));
        };
        let mut keys = keys.clone();
        let known = Self::KINDS.join(", ");
        let kind = match keys.remove("kind") {
            Some(Value::String(kind)) => kind,
            Some(other) => return Err(at("link.kind", format!("{other} is not a string"))),
            None => return Err(at("link.kind", format!("missing; give one of {known}"))),
        };
        Self::of_kind(&kind, &Value::Object(keys)).unwrap_or_else(|| {
            let hint = section::suggestion(&kind, Self::KINDS.iter().copied());
            let hint = hint.map(|k| format!("; did you mean `{k}`?")).unwrap_or_default();
            Err(at("link.kind", format!("{kind:?} is none of {known}{hint}")))
        })
    }
}

/// Why no plan could be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The configuration or the request is wrong; it will be until somebody changes it.
    #[error("{field} {value:?}: {reason}")]
    Invalid {
        /// The path of the wrong field, such as `link.bridge`.
        field: &'static str,
        /// Its value.
        value: String,
        /// Why it is refused, and what would be accepted.
        reason: String,
    },
    /// Something on the host stands in the way.
    #[error("link {link}: {reason}")]
    Conflict {
        /// The link.
        link: IfName,
        /// What is wrong with it, and the remedy.
        reason: String,
    },
}

/// The gateway of a route: its own, else the subnet router of its family.
fn gateway_of(route: &LeasedRoute, addresses: &[LeasedAddress]) -> Option<IpAddr> {
    let same_family = |ip: &IpAddr| ip.is_ipv4() == route.destination.addr().is_ipv4();
    route.gateway.or_else(|| addresses.iter().filter_map(|a| a.gateway).find(same_family))
}

/// Refuses routes whose gateway is of the other family, before the kernel does it with fewer words, and those of which only one
/// could be: two to one destination, or one to the subnet that the pod is in by its address.
fn check_routes(request: &LinkRequest) -> Result<(), PlanError> {
    for (index, route) in request.routes.iter().enumerate() {
        let destination = route.destination.trunc();
        let twice = request.routes[..index].iter().any(|other| other.destination.trunc() == destination);
        // The kernel gives IPv6 routes of its own and of others different metrics.
        let is_own = |a: &LeasedAddress| a.address.trunc() == destination && destination.addr().is_ipv4();
        let reason = if twice {
            "another route has the same destination; keep one"
        } else if request.addresses.iter().any(is_own) {
            "the pod's address is in this subnet, which leads there by itself; remove the route"
        } else {
            ""
        };
        if !reason.is_empty() {
            let (field, value) = ("routes[].dst", route.destination.to_string());
            return Err(PlanError::Invalid { field, value, reason: reason.to_owned() });
        }
        if let Some(gateway) = route.gateway
            && gateway.is_ipv4() != route.destination.addr().is_ipv4()
        {
            return Err(PlanError::Invalid {
                field: "routes[].gw",
                value: gateway.to_string(),
                reason: format!("not of the family of {}; give a gateway of the same family", route.destination),
            });
        }
    }
    Ok(())
}

/// Refuses a pod whose addresses do not fit the family's needs on this MTU.
fn check_mtu(mtu: Option<Mtu>, addresses: &[LeasedAddress]) -> Result<(), PlanError> {
    let ipv6 = addresses.iter().any(|a| a.address.addr().is_ipv6());
    match mtu {
        Some(mtu) if ipv6 && mtu.get() < Mtu::IPV6_MIN => Err(PlanError::Invalid {
            field: "link.mtu",
            value: mtu.to_string(),
            reason: format!("IPv6 needs at least {} bytes (RFC 8200, section 5)", Mtu::IPV6_MIN),
        }),
        _ => Ok(()),
    }
}

/// The MTU of an attachment's device: the lower one of the link's configuration and the pools of its addresses.
fn device_mtu(configured: Option<Mtu>, addresses: &[LeasedAddress]) -> Result<Option<Mtu>, PlanError> {
    check_mtu(configured, addresses)?;
    let leased = addresses.iter().filter_map(|a| a.mtu).min();
    let mtu = configured.into_iter().chain(leased).min();
    match check_mtu(mtu, addresses) {
        Err(PlanError::Invalid { value, reason, .. }) => Err(PlanError::Invalid {
            field: "ipam.pools[].mtu",
            value,
            reason: format!("{reason}, and the interface has an IPv6 address too; raise it, or use two attachments"),
        }),
        checked => checked.map(|()| mtu),
    }
}

/// Refuses addresses of a VLAN, for a driver that puts no device into one.
fn refuse_vlan(kind: &str, addresses: &[LeasedAddress]) -> Result<(), PlanError> {
    match addresses.iter().find_map(|a| Some((a.vlan?, &a.pool))) {
        None => Ok(()),
        Some((vlan, pool)) => Err(PlanError::Invalid {
            field: "ipam.pools[].vlan",
            value: vlan.to_string(),
            reason: format!(
                "pool {pool} is in this VLAN, and link.kind {kind:?} puts no device into one; drop it from the pool where \
                 the bridge or its uplink is in the VLAN, or use a link kind that tags"
            ),
        }),
    }
}

/// The VLAN of an attachment: the configuration's, which is `field`, or that of the pools of its addresses.
fn vlan_of(
    field: &'static str,
    configured: Option<VlanId>,
    addresses: &[LeasedAddress],
) -> Result<Option<VlanId>, PlanError> {
    let mut pools = addresses.iter().filter_map(|a| Some((a.vlan?, &a.pool)));
    let Some((vlan, pool)) = pools.next() else { return Ok(configured) };
    match configured {
        Some(id) if id != vlan => {
            let reason = format!("the pool {pool} is of VLAN {vlan}; drop {field}, or take another pool");
            return Err(PlanError::Invalid { field, value: id.to_string(), reason });
        }
        _ => {}
    }
    match pools.find(|(other, _)| *other != vlan) {
        Some((other, second)) => Err(PlanError::Invalid {
            field: "ipam.pools[].vlan",
            value: other.to_string(),
            reason: format!(
                "pool {second} is in it, and {pool} in VLAN {vlan}; take pools of one VLAN, or two attachments"
            ),
        }),
        None => Ok(Some(vlan)),
    }
}

/// The device on which a pod's is made, which must be there, up, and wide enough.
fn parent_of<'a>(host: &'a HostView, name: &IfName, mtu: Option<Mtu>) -> Result<&'a LinkView, PlanError> {
    let conflict = |reason: String| PlanError::Conflict { link: name.clone(), reason };
    let parent = host.link(name).ok_or_else(|| PlanError::Invalid {
        field: "link.parent",
        value: name.to_string(),
        reason: "the host has no such link; name one that `ip link` shows".to_owned(),
    })?;
    if parent.flags & libc::IFF_LOOPBACK as u32 != 0 {
        return Err(conflict("is the loopback device; name one that leads to a network in link.parent".to_owned()));
    }
    if !parent.is_up() {
        return Err(conflict(format!("is down, and nothing on it can be up; run `ip link set {name} up`")));
    }
    match mtu {
        Some(mtu) if mtu.get() > parent.mtu => Err(PlanError::Invalid {
            field: "link.mtu",
            value: mtu.to_string(),
            reason: format!("more than the {} bytes of {name}, on which it is made; give at most that", parent.mtu),
        }),
        _ => Ok(parent),
    }
}

/// The address of the parent, for devices that have no other.
fn parent_mac(parent: &LinkView) -> Result<MacAddr, PlanError> {
    parent.mac.ok_or_else(|| PlanError::Invalid {
        field: "link.parent",
        value: parent.name.clone(),
        reason: "has no Ethernet address; name an Ethernet device".to_owned(),
    })
}

/// Refuses policy for a device whose packets do not pass the host: nothing on the host could decide for it.
fn refuse_policy(request: &LinkRequest, kind: &str) -> Result<(), PlanError> {
    match request.policy {
        Policy::None => Ok(()),
        Policy::Wanted => Err(PlanError::Invalid {
            field: "link.kind",
            value: kind.to_owned(),
            reason:
                "has no device that policy could be attached to before it is up; drop the policy section, or use veth, \
                     bridge, netkit, vrf, macvlan or ipvlan"
                    .to_owned(),
        }),
    }
}

/// The IPv6 link-local address that belongs to an Ethernet address (RFC 4291, appendix A).
fn link_local(mac: MacAddr) -> IpNet {
    let [a, b, c, d, e, f] = mac.bytes();
    let address = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    IpNet::new(IpAddr::from(address), 64).expect("64 is at most 128")
}

/// The link-local address of a pod whose device has another Ethernet address than was asked for, because all devices of its
/// parent share one; `None` where it belongs to its own.
pub(crate) fn link_local_of_another(mac: MacAddr, asked: MacAddr, key: &AttachmentKey) -> Option<Ipv6Addr> {
    match link_local(key.mac()).addr() {
        IpAddr::V6(address) if mac != asked => Some(address),
        _ => None,
    }
}

/// Whether it is an IPv6 link-local address.
pub(crate) fn is_link_local(address: &IpNet) -> bool {
    matches!(address, IpNet::V6(v6) if v6.addr().is_unicast_link_local())
}

/// The host end's address: as the pod's, of the attachment alone, but another.
fn host_mac(key: &AttachmentKey, pod: MacAddr) -> MacAddr {
    let mut bytes = key.mac().bytes();
    // The derived address is local and unicast by its first byte; the last one may be anything.
    bytes[5] ^= 0xff;
    let mac = MacAddr::new(bytes);
    if mac == pod { key.mac() } else { mac }
}
