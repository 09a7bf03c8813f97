//! Plans: what a link driver wants done, as data, each step with its undo.
//!
//! Making a plan touches nothing, so that drivers are tested without privileges. Only the
//! [`Engine`](crate::engine::Engine) carries plans out.

mod undo;

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use self::undo::{BridgeVlan, Lent, Undo};
use crate::bandwidth::Rate;
use crate::model::{AttachmentKey, IfName, MacAddr, Mtu, VlanId, VlanRange};
use crate::nat::Element;
use crate::netlink::{IpvlanFlag, IpvlanMode, MacvlanMode, NetkitMode, RouteMetrics, VlanProtocol};
use crate::probe::{GatewayProbe, Timing};

/// Steps in the order in which they are done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The steps. Neighbouring ones with the same target travel in one batch.
    pub steps: Vec<Step>,
    /// The host's end of the attachment, where it has one: policy attaches to it.
    pub host_end: Option<End>,
    /// The pod's end.
    pub pod_end: End,
    /// The bridge through which it is connected, where there is one.
    pub bridge: Option<IfName>,
    /// The link of the host by which its packets come to the host, where that is neither the host's end nor the bridge.
    pub router: Option<IfName>,
}

/// One end of an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Its name.
    pub name: IfName,
    /// Its address.
    pub mac: MacAddr,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Where.
    pub target: Target,
    /// What.
    pub operation: Operation,
    /// What takes it back; `None` where it goes together with something that an earlier step made.
    pub undo: Option<Undo>,
    /// Errnos that mean that it is done already, by somebody else: then it is not undone either.
    pub tolerate: &'static [i32],
}

/// In which namespace a step is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// The host's.
    Host,
    /// The pod's.
    Pod,
}

/// What a step does. Links are named; the engine knows or finds their indices.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Creates a veth pair: `near` in the target's namespace, `far` in the other one. Both are down.
    CreateVeth {
        /// The end in the target's namespace.
        near: End,
        /// The end in the other namespace.
        far: End,
        /// MTU of both.
        mtu: Option<Mtu>,
    },
    /// Creates a bridge, down.
    CreateBridge {
        /// Its name and address; it keeps the address for life.
        bridge: End,
        /// Its MTU.
        mtu: Option<Mtu>,
        /// Whether it keeps VLANs apart (`EOPNOTSUPP` where the kernel cannot).
        vlan_filtering: bool,
    },
    /// Has a bridge that exists keep VLANs apart (Linux 3.9).
    FilterVlans {
        /// The bridge.
        bridge: IfName,
    },
    /// Makes a link a port of a bridge, whether it is up or down.
    Join {
        /// The link.
        link: IfName,
        /// The bridge.
        bridge: IfName,
    },
    /// Puts a port of a bridge, or the bridge's own end, into VLANs.
    AddVlans {
        /// The port, or the bridge.
        link: IfName,
        /// The VLANs.
        vlans: VlanRange,
        /// What becomes of tags there.
        tagging: Tagging,
    },
    /// Takes a port of a bridge out of a VLAN.
    DeleteVlan {
        /// The port.
        port: IfName,
        /// The VLAN.
        vlan: VlanId,
    },
    /// Creates a virtual device, down. Its parent, where it has one, is in the target's namespace.
    CreateLink {
        /// Its name and address. Where the kind has no address of its own, its parent's, or zeros.
        link: End,
        /// The name under which it is made, until it is renamed: before Linux 6.14 a name is refused in one namespace
        /// because the other, where the request is made, has a link called so (`rtnl_newlink` in
        /// `net/core/rtnetlink.c`).
        transit: Option<IfName>,
        /// What it is.
        device: Device,
        /// Its MTU.
        mtu: Option<Mtu>,
        /// Where it lives.
        home: Target,
    },
    /// Creates a TAP or TUN device that outlives the process which made it (tun(4): `TUNSETPERSIST`), down.
    CreateTap {
        /// Its name and, for TAP, its address.
        link: End,
        /// The name under which it is made: a request with the name of an existing device opens that one.
        transit: IfName,
        /// What it is.
        tap: TapSpec,
    },
    /// Moves a link of the target's namespace to the other one under another name and marks it, in one request.
    MoveLink {
        /// Its name here.
        link: IfName,
        /// Its name there, and its address, which it keeps.
        to: End,
        /// The alias.
        alias: String,
    },
    /// Renames a link that is down, and marks it: in one request, so that it never has the name without the mark by
    /// which it is recognised.
    Rename {
        /// Its name.
        link: IfName,
        /// Its new name.
        to: IfName,
        /// The alias.
        alias: String,
    },
    /// Writes a setting of the namespace below `/proc/sys/net`.
    WriteSetting {
        /// Its path from there, such as `ipv6/conf/eth0/accept_ra`.
        name: String,
        /// Its value.
        value: String,
    },
    /// Changes what a link has beside addresses.
    Tune {
        /// The link.
        link: IfName,
        /// What is changed.
        tuning: Tuning,
    },
    /// Sets the MTU of a link that exists.
    SetMtu {
        /// The link.
        link: IfName,
        /// Its MTU.
        mtu: Mtu,
    },
    /// Sets the Ethernet address of a link that exists.
    SetMac {
        /// The link.
        link: IfName,
        /// Its address.
        mac: MacAddr,
    },
    /// Has the link answer no ARP request, for any address (`arp_ignore` 8 of `ip-sysctl.rst`).
    NoArpReplies {
        /// The link.
        link: IfName,
    },
    /// Keeps a bridge port from exchanging frames with other such ports (`IFLA_BRPORT_ISOLATED`; Linux 4.18).
    Isolate {
        /// The port.
        port: IfName,
    },
    /// Marks a link as ours by its alias.
    Mark {
        /// The link.
        link: IfName,
        /// The alias.
        alias: String,
    },
    /// Keeps the kernel from giving the link an IPv6 link-local address of its own, with the duplicate address
    /// detection that this entails.
    NoLinkLocal {
        /// The link.
        link: IfName,
    },
    /// Lets IPv4 packets that enter by this link be forwarded, whatever the host's default is.
    ForwardIpv4 {
        /// The link.
        link: IfName,
    },
    /// Makes the link a port of `master`, where given, and sets it up.
    Up {
        /// The link.
        link: IfName,
        /// The bridge.
        master: Option<IfName>,
    },
    /// Has the kernel act on the link's new carrier now. A veth's ends get their carrier when the second one is set up,
    /// but until a worker of the kernel has noticed (net/core/link_watch.c), for up to a second, what is sent over them
    /// is dropped. Asking for the link does the worker's part at once (net/core/rtnetlink.c, `rtnl_getlink`, since Linux
    /// 6.8); before, the engine waits for the worker.
    SettleCarrier {
        /// The link.
        link: IfName,
    },
    /// Has what is sent to an IPv6 address of the link arrive. The kernel takes an address at once, but enters the local
    /// route by which it recognises it in a work queue, though there is no duplicate detection to wait for
    /// (`addrconf_dad_start` in `net/ipv6/addrconf.c`).
    SettleAddress {
        /// The link.
        link: IfName,
        /// The address.
        address: IpAddr,
    },
    /// Lets a bridge port send frames back where they came from.
    Hairpin {
        /// The port.
        port: IfName,
    },
    /// Adds an address, at once usable.
    AddAddress {
        /// The link.
        link: IfName,
        /// The address with its prefix length.
        address: IpNet,
    },
    /// Adds a route marked as ours.
    AddRoute {
        /// The link that it leads to.
        link: IfName,
        /// The route.
        route: RouteSpec,
    },
    /// Enters a neighbour for good.
    AddNeighbour {
        /// The link on which it is.
        link: IfName,
        /// Its address.
        address: IpAddr,
        /// Its Ethernet address.
        mac: MacAddr,
    },
    /// Forgets what is remembered about a reused address.
    ForgetNeighbour {
        /// The link on which it was.
        link: IfName,
        /// The address.
        address: IpAddr,
    },
    /// Lets a link send no faster.
    Shape {
        /// The link.
        link: IfName,
        /// How fast, and how much at once.
        rate: Rate,
    },
    /// Gives a link a place for filters of what comes in.
    AddClsact {
        /// The link.
        link: IfName,
    },
    /// Has what comes in by a link go through another first, and then on as if it came in now.
    Divert {
        /// The link.
        link: IfName,
        /// The other one, of the kind [`Device::Ifb`].
        through: IfName,
    },
    /// Puts the host's end, which is still down, under policy.
    AttachPolicy,
    /// Has the host translate addresses for the attachment.
    Translate {
        /// The entries of our sets.
        elements: Vec<Element>,
    },
    /// Asks whether somebody else on the link's segment has one of the addresses, which are to be entered next, and fails
    /// if so.
    ProbeConflicts {
        /// The link, which is up.
        link: IfName,
        /// The Ethernet address that the addresses are to have.
        mac: MacAddr,
        /// The addresses.
        addresses: Vec<IpAddr>,
        /// How often, and for how long.
        timing: Timing,
    },
    /// Tells the segment who has these addresses now.
    Announce {
        /// The link that has them.
        link: IfName,
        /// Its Ethernet address.
        mac: MacAddr,
        /// The addresses.
        addresses: Vec<IpAddr>,
        /// How often.
        times: u8,
        /// Who does it.
        by: Announcer,
    },
    /// Asks whether gateways answer.
    ProbeGateways {
        /// The link that leads to them.
        link: IfName,
        /// Its Ethernet address.
        mac: MacAddr,
        /// An address of the link, and the gateway that is asked from it.
        gateways: Vec<(IpAddr, IpAddr)>,
        /// How often, and for how long.
        timing: Timing,
        /// What it means if one does not.
        otherwise: GatewayProbe,
    },
}

/// Who tells a segment of the addresses of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Announcer {
    /// A packet socket, on any link. To close it takes the kernel a grace period of RCU, some ten milliseconds (`packet_release` of
    /// `net/packet/af_packet.c`).
    Socket,
    /// The kernel itself, at once: the link's Ethernet address is set to what it is, on which the kernel announces all addresses of
    /// the link while its settings `arp_notify` and `ndisc_notify` say so (`inetdev_event` of `net/ipv4/devinet.c`,
    /// `ndisc_netdev_event` of `net/ipv6/ndisc.c`). For links without hardware, whose drivers have nothing to do for it. What finds no
    /// room in a queue is not told.
    Kernel,
}

/// How frames of a VLAN pass the link that is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tagging {
    /// A port's, without a tag: what comes in without one is of this VLAN (its PVID).
    Untagged,
    /// A port's, with their tag.
    Tagged,
    /// The bridge's own end, with their tag.
    Own,
}

/// A virtual device that is no veth and no bridge. A parent is a link of the namespace in which the request is made.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// An Ethernet address of its own on a parent.
    Macvlan {
        /// The parent.
        parent: IfName,
        /// Whom it reaches.
        mode: MacvlanMode,
        /// Whose frames it gets, in source mode.
        sources: Vec<MacAddr>,
    },
    /// IP addresses of its own behind the parent's Ethernet address.
    Ipvlan {
        /// The parent.
        parent: IfName,
        /// How far up packets are handed over.
        mode: IpvlanMode,
        /// Whom it reaches.
        flag: IpvlanFlag,
    },
    /// The frames of a parent that carry a tag.
    Vlan {
        /// The parent.
        parent: IfName,
        /// The tag's VLAN.
        id: VlanId,
        /// The tag's EtherType.
        protocol: VlanProtocol,
    },
    /// Swallows what is sent to it.
    Dummy,
    /// Gives what is sent to it back where it came in.
    Ifb,
    /// A routing domain.
    Vrf {
        /// Its table.
        table: u32,
    },
    /// A pair, whose other end is in the other namespace.
    Netkit {
        /// Whether it carries Ethernet frames.
        mode: NetkitMode,
        /// The other end.
        peer: End,
    },
}

impl Device {
    /// The link on which it is made.
    pub fn parent(&self) -> Option<&IfName> {
        match self {
            Self::Macvlan { parent, .. } | Self::Ipvlan { parent, .. } | Self::Vlan { parent, .. } => Some(parent),
            Self::Dummy | Self::Ifb | Self::Vrf { .. } | Self::Netkit { .. } => None,
        }
    }

    /// Whether it can be given an Ethernet address.
    pub fn takes_mac(&self) -> bool {
        match self {
            // The parent's.
            Self::Ipvlan { .. } | Self::Macvlan { mode: MacvlanMode::Passthru, .. } => false,
            Self::Netkit { mode, .. } => *mode == NetkitMode::L2,
            Self::Macvlan { .. } | Self::Vlan { .. } | Self::Dummy | Self::Ifb | Self::Vrf { .. } => true,
        }
    }
}

/// A TAP or TUN device (`Documentation/networking/tuntap.rst`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapSpec {
    /// Ethernet frames (TAP) or IP packets (TUN).
    pub ethernet: bool,
    /// Who may open it beside root; anybody with `CAP_NET_ADMIN` where neither is set.
    pub owner: Option<u32>,
    /// The group that may.
    pub group: Option<u32>,
    /// Whether it may be opened several times, a queue each.
    pub multi_queue: bool,
}

/// What a link has beside addresses: `"tuning"` of a configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tuning {
    /// Length of the transmit queue, in packets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_queue_len: Option<u32>,
    /// Whether it takes frames to any address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promisc: Option<bool>,
    /// Whether it takes frames to any group address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allmulti: Option<bool>,
}

impl Tuning {
    /// Whether it changes nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A route over a known link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSpec {
    /// Destination prefix.
    pub destination: IpNet,
    /// Next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// The next hop is on the link although no address's prefix says so.
    #[serde(default)]
    pub on_link: bool,
    /// Metric; the kernel's default where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<u32>,
    /// Table; the main one where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// The address that packets have whose sender chose none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// What it says of the path.
    #[serde(default, skip_serializing_if = "RouteMetrics::is_empty")]
    pub metrics: RouteMetrics,
}

impl RouteSpec {
    /// A route straight to the link.
    pub fn direct(destination: IpNet) -> Self {
        let metrics = RouteMetrics::default();
        Self { destination, gateway: None, on_link: false, metric: None, table: None, source: None, metrics }
    }
}

impl Step {
    /// A step of which nothing is left when something made earlier is gone.
    pub fn new(target: Target, operation: Operation) -> Self {
        Self { target, operation, undo: None, tolerate: &[] }
    }

    /// The same, taken back by `undo`.
    #[must_use]
    pub fn undone_by(mut self, undo: Undo) -> Self {
        self.undo = Some(undo);
        self
    }

    /// The same, content with these errnos.
    #[must_use]
    pub fn content_with(mut self, errnos: &'static [i32]) -> Self {
        self.tolerate = errnos;
        self
    }
}

impl Plan {
    /// The link of the host by which packets come to it; `None` where they do not pass it.
    pub(crate) fn entry(&self) -> Option<&IfName> {
        let end = self.host_end.as_ref()?;
        Some(self.router.as_ref().or(self.bridge.as_ref()).unwrap_or(&end.name))
    }

    /// Whether the plan makes or changes what other attachments will share.
    pub fn makes_shared(&self) -> bool {
        self.steps.iter().filter_map(|s| s.undo.as_ref()).any(Undo::is_shared)
    }

    /// Whether it makes settings that are given back.
    pub(crate) fn restores(&self) -> bool {
        self.steps.iter().any(|step| matches!(step.undo, Some(Undo::RestoreSetting { .. })))
    }
}

/// The alias that marks a link as the attachment's: `dcenet:` and the key, or the id where the key does not fit
/// (`IFALIASZ` of `include/uapi/linux/if.h` is 256 with the NUL).
pub fn mark(key: &AttachmentKey) -> String {
    let full = format!("{MARK}{key}");
    if full.len() < 256 { full } else { format!("{MARK}{}", key.id()) }
}

/// The alias that marks a link of the host called `name` while the attachment has it.
pub fn lent_mark(key: &AttachmentKey, name: &IfName) -> String {
    let full = format!("{MARK}lent/{name}/{key}");
    if full.len() < 256 { full } else { format!("{MARK}lent/{name}/{}", key.id()) }
}

/// Whether the alias is a mark of the attachment.
pub fn is_mark_of(key: &AttachmentKey, alias: &str) -> bool {
    alias == mark(key) || lent_name(alias).is_some_and(|name| alias == lent_mark(key, &name))
}

/// The name on the host of the link that such an alias marks.
pub fn lent_name(alias: &str) -> Option<IfName> {
    alias.strip_prefix(MARK)?.strip_prefix("lent/")?.split_once('/')?.0.parse().ok()
}

/// The alias that marks a link which attachments share.
pub fn shared_mark(name: &IfName) -> String {
    format!("{MARK}shared/{name}")
}

/// Begins every mark of ours.
pub const MARK: &str = "dcenet:";
