//! Plans: what a link driver wants done, as data, each step with its undo.
//!
//! Making a plan touches nothing, so that drivers are tested without privileges. Only the
//! [`Engine`](crate::engine::Engine) carries plans out.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::{AttachmentKey, IfName, MacAddr, Mtu};

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
    /// Puts the host's end, which is still down, under policy.
    AttachPolicy,
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
}

/// What takes a step back. Written to the journal before the step is done, so that it must be harmless where the step
/// never was: it deletes only what it recognises as ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Undo {
    /// Deletes the link of this name, if it has this address or carries the attachment's mark.
    DeleteLink {
        /// In which namespace. One that is gone took the link with it.
        target: Target,
        /// The link.
        end: End,
    },
    /// Takes the attachment's device from under policy.
    DetachPolicy,
    /// Deletes the bridge of this name, if it has this address and no port. Not part of a normal detach.
    DeleteIdleBridge(End),
    /// Deletes the address, if the link has no port. Not part of a normal detach.
    DeleteIdleAddress {
        /// The bridge.
        link: IfName,
        /// The address.
        address: IpNet,
    },
}

impl Undo {
    /// Whether it concerns what attachments share: taken back when the attach that made it fails, and left when a
    /// finished attachment goes.
    pub fn is_shared(&self) -> bool {
        match self {
            Self::DeleteLink { .. } | Self::DetachPolicy => false,
            Self::DeleteIdleBridge(_) | Self::DeleteIdleAddress { .. } => true,
        }
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
    /// Whether the plan makes what other attachments will share.
    pub fn makes_shared(&self) -> bool {
        self.steps.iter().filter_map(|s| s.undo.as_ref()).any(Undo::is_shared)
    }
}

/// The alias that marks a link as the attachment's: `dcenet:` and the key, or the id where the key does not fit
/// (`IFALIASZ` of `include/uapi/linux/if.h` is 256 with the NUL).
pub fn mark(key: &AttachmentKey) -> String {
    let full = format!("{MARK}{key}");
    if full.len() < 256 { full } else { format!("{MARK}{}", key.id()) }
}

/// The alias that marks a link which attachments share.
pub fn shared_mark(name: &IfName) -> String {
    format!("{MARK}shared/{name}")
}

/// Begins every mark of ours.
pub const MARK: &str = "dcenet:";
