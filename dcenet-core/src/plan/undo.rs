//! What takes steps back.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{End, RouteSpec, Target};
use crate::model::{IfName, VlanId};
use crate::nat::Element;
use crate::provider::LentDevice;

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
    /// Deletes the attachment's device in the pod's namespace: the link of this name, if it carries the attachment's mark,
    /// or of the name that it had before it was marked. A namespace that is gone took it with it.
    DeletePodLink {
        /// Its name.
        link: IfName,
        /// Its name before, which is of this attachment alone.
        transit: IfName,
    },
    /// Brings a device back that was moved to the pod, from there or from where the kernel put it when the pod's namespace
    /// ended, and makes it what it was.
    ReturnLink(Box<Lent>),
    /// Has the source of the attachment's device bring it back and make it what it was.
    ReleaseDevice(Box<LentDevice>),
    /// Deletes a route of ours over a link of the host that attachments share.
    DeleteRoute {
        /// The link.
        link: IfName,
        /// The route.
        route: RouteSpec,
    },
    /// Deletes a neighbour of a link of the host that attachments share.
    DeleteNeighbour {
        /// The link.
        link: IfName,
        /// The neighbour's address.
        address: IpAddr,
    },
    /// Takes the attachment's device from under policy.
    DetachPolicy,
    /// Deletes those of these entries of our sets that bear the attachment's mark.
    DeleteTranslation {
        /// The entries.
        elements: Vec<Element>,
    },
    /// Gives a setting of a namespace the value that it had, unless another attachment needs it as it is.
    RestoreSetting {
        /// In which namespace. The pod's may be gone, with the setting.
        target: Target,
        /// Its path below `/proc/sys/net`.
        name: String,
        /// What it was before any attachment changed it.
        before: String,
        /// What the attachment asked for.
        asked: String,
    },
    /// Deletes the link of this name, if it has this address and nobody uses it: no port is left, and no route of ours.
    /// Not part of a normal detach.
    DeleteIdleLink(End),
    /// Deletes the bridge of this name, if it has this address and no port. Not part of a normal detach.
    DeleteIdleBridge(End),
    /// Deletes the address, if the bridge has no port, or none of ours in the VLAN. Not part of a normal detach.
    DeleteIdleAddress {
        /// The bridge, or its device in the VLAN.
        link: IfName,
        /// The address.
        address: IpNet,
        /// The VLAN of which `link` is the device.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vlan: Option<BridgeVlan>,
    },
    /// Deletes the host's own device in a VLAN of a bridge, and takes the bridge's own end out of the VLAN, if no port of ours is
    /// in it. Not part of a normal detach.
    DeleteIdleRouter {
        /// The device, if it bears our mark.
        link: IfName,
        /// The VLAN.
        vlan: BridgeVlan,
        /// Whether the bridge's own end was in the VLAN before, and stays.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        keeps_own: bool,
    },
    /// Has a bridge keep VLANs apart no more, if it has no port. Not part of a normal detach.
    StopFilteringVlans {
        /// The bridge.
        bridge: IfName,
    },
}

impl Undo {
    /// Whether it concerns what attachments share: taken back when the attach that made it fails, and left when a
    /// finished attachment goes.
    pub fn is_shared(&self) -> bool {
        match self {
            Self::DeleteLink { .. }
            | Self::DeletePodLink { .. }
            | Self::ReturnLink(_)
            | Self::ReleaseDevice(_)
            | Self::DeleteRoute { .. }
            | Self::DeleteNeighbour { .. }
            | Self::DeleteTranslation { .. }
            | Self::RestoreSetting { .. }
            | Self::DetachPolicy => false,
            Self::DeleteIdleLink(_)
            | Self::DeleteIdleBridge(_)
            | Self::DeleteIdleAddress { .. }
            | Self::DeleteIdleRouter { .. }
            | Self::StopFilteringVlans { .. } => true,
        }
    }

    /// Whether it is done in the pod's namespace, so that this is needed where it still exists.
    pub fn is_in_pod(&self) -> bool {
        match self {
            Self::DeletePodLink { .. }
            | Self::ReturnLink(_)
            | Self::DeleteLink { target: Target::Pod, .. }
            | Self::RestoreSetting { target: Target::Pod, .. }
            // The source has written down where it went; here it is looked whether it has.
            | Self::ReleaseDevice(_) => true,
            Self::DeleteLink { target: Target::Host, .. }
            | Self::RestoreSetting { target: Target::Host, .. }
            | Self::DeleteRoute { .. }
            | Self::DeleteNeighbour { .. }
            | Self::DeleteTranslation { .. }
            | Self::DetachPolicy
            | Self::DeleteIdleLink(_)
            | Self::DeleteIdleBridge(_)
            | Self::DeleteIdleAddress { .. }
            | Self::DeleteIdleRouter { .. }
            | Self::StopFilteringVlans { .. } => false,
        }
    }
}

/// A VLAN of a bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BridgeVlan {
    /// The bridge.
    pub bridge: IfName,
    /// The VLAN.
    pub id: VlanId,
}

/// What a device of the host was before a pod got it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lent {
    /// Its name on the host, and its Ethernet address.
    pub end: End,
    /// Its name in the pod.
    pub pod_name: IfName,
    /// The alias that it has while it is away.
    pub mark: String,
    /// Its alias.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alias: Option<String>,
    /// Its MTU.
    pub mtu: u32,
    /// Length of its transmit queue, in packets.
    pub tx_queue_len: u32,
    /// Whether it was up.
    pub up: bool,
    /// Whether it was promiscuous by somebody's wish.
    pub promisc: bool,
    /// Whether it took all multicast by somebody's wish.
    pub allmulti: bool,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Whether it comes back when the pod's namespace ends; virtual devices end with it (`default_device_exit_net` in
    /// `net/core/dev.c`).
    pub physical: bool,
}
