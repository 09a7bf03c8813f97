//! What one crate asks of another.
//!
//! The engine and the CNI verbs need addresses and policy without knowing who hands them out. A backend implements
//! these traits; a binary composes.

mod device;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use self::device::{DeviceError, DeviceRequest, DeviceSource, DeviceWish, LentDevice};
use crate::model::{
    AttachmentKey, ContainerId, IfIndex, IfName, LabelSet, MacAddr, Mtu, NetworkName, VlanId, Workload,
};
use crate::netns::NetNsId;
use crate::probe::Conflict;

/// Hands out addresses and takes them back.
///
/// Every answer is durable before it is given: after `Ok` a crash of any process or of the machine changes nothing.
#[async_trait]
pub trait AddressSource: Send + Sync {
    /// Gives the attachment its addresses, all families or none.
    ///
    /// Called by ADD before any device exists. Repeated for an attachment that holds a lease, it returns that lease.
    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, LeaseError>;

    /// The lease that the attachment holds, if any. Called by CHECK, and by DEL to learn what to clean.
    async fn held(&self, attachment: &AttachmentKey) -> Result<Option<Lease>, LeaseError>;

    /// Takes back the attachment's lease if it is the one with this sequence, as [`Lease::sequence`] told it. Whoever was
    /// stopped between looking and releasing cannot free a newer one. Releasing what is not held is `Ok`, for DEL is
    /// repeated; so is 0, the sequence of no lease.
    async fn release(&self, attachment: &AttachmentKey, sequence: u64) -> Result<(), LeaseError>;

    /// Releases every attachment of the network on this node that is not in `valid`, and returns those. Called by GC with
    /// what one node's runtime knows: other networks are left alone, and so is what other nodes have in a store that they
    /// share.
    async fn retain(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
    ) -> Result<Vec<AttachmentKey>, LeaseError>;

    /// Gives the attachment another address in place of one that somebody else on its link has, and hands that out to
    /// nobody for a while, both or nothing. `sequence` is of the lease that the attachment has. Returns the new lease, which
    /// has another sequence; `None` where the address is fixed, and no other may stand for it: nothing changes then.
    ///
    /// The default is for sources that cannot: `None`.
    async fn replace(
        &self,
        _attachment: &AttachmentKey,
        _sequence: u64,
        _conflict: &Conflict,
    ) -> Result<Option<Lease>, LeaseError> {
        Ok(None)
    }

    /// Whether [`replace`](Self::replace) is known to answer `None` for the address, so that whoever has several to replace
    /// need not replace any before it learns that. False by default, and where it is not known.
    fn is_fixed(&self, _address: IpAddr) -> bool {
        false
    }

    /// Whether a lease could be given now; cheap, for STATUS is polled. An exhausted pool is an error.
    async fn ready(&self) -> Result<(), LeaseError>;
}

/// One source for many who ask.
#[async_trait]
impl<T: AddressSource + ?Sized> AddressSource for Arc<T> {
    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, LeaseError> {
        (**self).lease(request).await
    }

    async fn held(&self, attachment: &AttachmentKey) -> Result<Option<Lease>, LeaseError> {
        (**self).held(attachment).await
    }

    async fn release(&self, attachment: &AttachmentKey, sequence: u64) -> Result<(), LeaseError> {
        (**self).release(attachment, sequence).await
    }

    async fn retain(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
    ) -> Result<Vec<AttachmentKey>, LeaseError> {
        (**self).retain(network, valid).await
    }

    async fn replace(
        &self,
        attachment: &AttachmentKey,
        sequence: u64,
        conflict: &Conflict,
    ) -> Result<Option<Lease>, LeaseError> {
        (**self).replace(attachment, sequence, conflict).await
    }

    fn is_fixed(&self, address: IpAddr) -> bool {
        (**self).is_fixed(address)
    }

    async fn ready(&self) -> Result<(), LeaseError> {
        (**self).ready().await
    }
}

/// Who asks for addresses, and for which.
///
/// ```
/// # use dcenet_core::provider::LeaseRequest;
/// let attachment = serde_json::from_str(r#"{ "network": "shop", "container": "c1", "ifname": "eth0" }"#)?;
/// let request = LeaseRequest { workload: Some("shop/db".parse()?), ..LeaseRequest::new(attachment) };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRequest {
    /// What will carry the addresses.
    pub attachment: AttachmentKey,
    /// The stable identity behind the container, where the caller knows it: claims are found by it.
    pub workload: Option<Workload>,
    /// The workload's labels, where the caller knows them: pools are chosen by them.
    pub labels: LabelSet,
    /// Addresses that the caller insists on (CNI capability `ips`); empty for any.
    pub addresses: Vec<IpAddr>,
    /// Pools that the caller insists on, by name or by a pattern with `*` and `?`; empty for those that the source
    /// chooses. Each entry gives one address of each family that it names pools of.
    pub pools: Vec<String>,
}

impl LeaseRequest {
    /// Any addresses, for an attachment of which nothing else is known.
    pub fn new(attachment: AttachmentKey) -> Self {
        Self { attachment, workload: None, labels: LabelSet::new(), addresses: Vec::new(), pools: Vec::new() }
    }
}

/// What an attachment holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The addresses, at most one of a pool, in the order of the pools.
    pub addresses: Vec<LeasedAddress>,
    /// Routes to install beside the one to each address's own subnet.
    pub routes: Vec<LeasedRoute>,
    /// Resolver settings, passed on to the runtime.
    #[serde(default, skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
    /// The MAC address that belongs to the claim, where one is kept with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

impl Lease {
    /// The number of this lease, never used twice; 0 if it has no addresses.
    pub fn sequence(&self) -> u64 {
        self.addresses.first().map_or(0, |address| address.sequence)
    }

    /// The VLAN of the addresses' link, where a pool names one. A source gives no lease whose pools name two.
    pub fn vlan(&self) -> Option<VlanId> {
        self.addresses.iter().find_map(|address| address.vlan)
    }

    /// The lowest MTU that a pool of the lease names: an interface has one for all its addresses.
    pub fn mtu(&self) -> Option<Mtu> {
        self.addresses.iter().filter_map(|address| address.mtu).min()
    }
}

/// One address of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeasedAddress {
    /// The address with the length of its subnet's prefix.
    pub address: IpNet,
    /// The subnet's router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// The pool that it comes from.
    pub pool: String,
    /// The binding's never-reused number: a later release must mean this binding and no other.
    pub sequence: u64,
    /// The VLAN of the pool's subnet, where the pool names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanId>,
    /// The MTU of the pool's link, where the pool names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// The whole prefix that is the attachment's own, where its pool delegates prefixes (RFC 9663, RFC 8273); `address`
    /// is in it. What the attachment does with the rest of it is its own affair: the network routes it there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<IpNet>,
}

impl LeasedAddress {
    /// An address without gateway and link settings.
    pub fn new(address: IpNet, pool: impl Into<String>, sequence: u64) -> Self {
        Self { address, gateway: None, pool: pool.into(), sequence, vlan: None, mtu: None, prefix: None }
    }
}

/// A route of a lease. Without a `gateway` it leads through the subnet router of its family, or straight to the link
/// where there is none (CNI specification 1.1.0, section 5, key `routes`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeasedRoute {
    /// Destination prefix; `0.0.0.0/0` and `::/0` are the default routes.
    #[serde(rename = "dst")]
    pub destination: IpNet,
    /// Next hop.
    #[serde(default, rename = "gw", skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

/// Resolver settings in the CNI specification's form (1.1.0, section 1, key `dns`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Resolver addresses in order of preference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Search domains in order of preference.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why no address was given or taken back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// The configuration or the request contradicts itself; it will fail again until somebody changes it.
    #[error("{field}: {reason}")]
    Invalid {
        /// The path of the wrong field, such as `ipam.pools[0].gateway`.
        field: String,
        /// The value that is refused, why, and what would be accepted.
        reason: String,
    },
    /// No pool that may serve the request has a free address.
    #[error(
        "pool {pool} has no free address: all {size} are in use, kept by claims, or were released a moment ago; \
         enlarge it or release some"
    )]
    Exhausted {
        /// The last pool tried.
        pool: String,
        /// Addresses that the pool could hand out.
        size: u128,
    },
    /// The one address that was asked for belongs to somebody else.
    #[error("address {address} is held by {holder}")]
    Held {
        /// The address.
        address: IpAddr,
        /// The claim or attachment that holds it, for people.
        holder: String,
    },
    /// So many addresses of the pool are in quarantine over conflicts that no more are put there.
    #[error(
        "pool {pool}: {live} of its addresses are in quarantine, for others on the segment have them, and no more are put \
         there at a time; they are with {holders}: find out who that is"
    )]
    Contested {
        /// The pool.
        pool: String,
        /// How many of its addresses are in quarantine over conflicts.
        live: usize,
        /// The Ethernet addresses that were seen to have them, for people.
        holders: String,
    },
    /// Others change the same records all the time; the same call may succeed later.
    #[error("the store is busy: {0}")]
    Busy(String),
    /// Who hands out the addresses outside, or must be told of them, refused or did not answer.
    #[error("{source}")]
    Outside {
        /// Whether the same call may succeed later.
        retryable: bool,
        /// What was asked of whom, and what came of it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The store holds what cannot be true; people must look at it.
    #[error("store: {0}")]
    Damaged(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The store failed or cannot be reached.
    #[error("store: {0}")]
    Store(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl LeaseError {
    /// Whether the same call may succeed later without anybody changing the configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Exhausted { .. } | Self::Contested { .. } | Self::Busy(_) | Self::Store(_) => true,
            Self::Outside { retryable, .. } => *retryable,
            Self::Damaged(_) | Self::Invalid { .. } | Self::Held { .. } => false,
        }
    }
}

/// Puts a device under policy before it carries its first packet.
///
/// Synchronous: attaching is a few short system calls. Implementations act on the device by index in the namespace of
/// the calling thread, which is the one that the device is in ([`Endpoint::place`]), and hold no descriptor between calls.
pub trait PolicySink: Send + Sync {
    /// Attaches the default program to the endpoint's device, which is still down, and tells the owner of the policy
    /// state of it. Repeating it is allowed and changes nothing.
    fn attach(&self, endpoint: &Endpoint) -> Result<(), PolicyError>;

    /// Blocks until the owner has put its own verdicts in place of the default, at most for `limit`.
    fn await_enforced(&self, endpoint: &Endpoint, limit: Duration) -> Result<(), PolicyError>;

    /// What is missing of what `attach` made, or of the owner's in its place, in words; `None` where nothing is. Called by
    /// CHECK.
    fn missing(&self, endpoint: &Endpoint) -> Result<Option<String>, PolicyError>;

    /// Whether an `attach` could succeed now; cheap, for STATUS is polled.
    fn ready(&self) -> Result<(), PolicyError>;

    /// Whether the owner of the policy state would answer now that an endpoint of this attachment appears. ADD asks before
    /// it leases addresses, for those of an attach that fails over a silent owner, which then cannot be told of the undoing
    /// either, would stay leased. `awaited` is whether [`await_enforced`](Self::await_enforced) will follow, which an owner
    /// that is not there fails too. The default is for those who tell nobody.
    fn answers(&self, _attachment: &AttachmentKey, _awaited: bool) -> Result<(), PolicyError> {
        Ok(())
    }

    /// Removes what `attach` made. It must succeed when the device, or all of it, is gone already. Called in the host's
    /// namespace, when the attachment's device is gone as far as the caller can tell: one that lives on in a namespace that
    /// nobody can reach any more must keep its policy.
    fn detach(&self, attachment: &AttachmentKey) -> Result<(), PolicyError>;

    /// Takes policy off a device that lives on, for nobody asks for it any more: its packets pass as if there had never been any.
    /// Called in the host's namespace, for devices of the host; where it fails, the device is under policy as before, or under what
    /// `attach` makes. By default an error: [`detach`](Self::detach) may shut a device.
    fn lift(&self, endpoint: &Endpoint) -> Result<(), PolicyError> {
        let what = format!("take policy off {}, which lives on: remove the pod instead", endpoint.ifname);
        Err(PolicyError::Unsupported(what))
    }

    /// As [`detach`](Self::detach), for an attachment that has neither a record nor a device on this host: most likely there
    /// never was one.
    fn forget(&self, attachment: &AttachmentKey) -> Result<(), PolicyError> {
        self.detach(attachment)
    }
}

/// A device that policy decides for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The attachment that the device serves.
    pub attachment: AttachmentKey,
    /// The device to attach to, by its index in the namespace where it is.
    pub ifindex: IfIndex,
    /// The same device's name.
    pub ifname: IfName,
    /// Where it is, and thus which way packets go through it.
    #[serde(default, skip_serializing_if = "Place::is_host")]
    pub place: Place,
    /// The Ethernet address of the pod's end.
    pub mac: MacAddr,
    /// The pod's IPv6 link-local address, where it is not the one that belongs to `mac` (RFC 4291, appendix A): pods that
    /// share their parent's Ethernet address have others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_local: Option<Ipv6Addr>,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The workload, where known: selectors match its namespace and labels.
    pub workload: Option<Workload>,
    /// The workload's labels, where the runtime told them.
    pub labels: LabelSet,
}

impl Endpoint {
    /// How much of the pod's traffic its policy can hold.
    pub const fn enforcement(&self) -> Enforcement {
        match self.place {
            Place::Host => Enforcement::Full,
            Place::Pod { .. } => Enforcement::EgressBypassable,
        }
    }
}

/// Where the device of an [`Endpoint`] is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Place {
    /// In the host's namespace: its end of a pair. What the pod sends comes in there.
    #[default]
    Host,
    /// In the pod's own namespace, as a macvlan or ipvlan, which have no end on the host. What the pod sends goes out there.
    Pod {
        /// The path of the pod's namespace, as it was given. Nothing, or another's, may be there by now.
        path: PathBuf,
        /// The namespace's identity.
        netns: NetNsId,
    },
}

impl Place {
    /// Whether it is the host.
    pub const fn is_host(&self) -> bool {
        matches!(self, Self::Host)
    }
}

/// What a pod's policy holds against the pod itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub enum Enforcement {
    /// What the pod's stack sends by its device, and what that hands to the stack, is judged. Not so what privileges of the pod
    /// go around:
    /// * A process with CAP_NET_RAW sends past the programs of the pod's own device (`PACKET_QDISC_BYPASS`, packet(7)), and a
    ///   packet socket of it reads frames that ingress policy denies, for the kernel hands them to it before the programs
    ///   (net/core/dev.c, `__netif_receive_skb_core`).
    /// * A process with CAP_NET_ADMIN makes another device on the same parent (drivers/net/macvlan.c,
    ///   `macvlan_common_newlink`), which no program is on: it is judged in neither direction.
    ///
    /// Without these capabilities both directions hold.
    EgressBypassable,
    /// As [`EgressBypassable`](Self::EgressBypassable), and a guard on the parent of the pod's macvlan judges once more, out of the
    /// pod's reach, every frame that the pod sends to the wire, and every unicast frame to another macvlan. Only pods that ask for it
    /// are under guard. By what does this hold:
    /// * CAP_NET_RAW gains nothing towards the wire or by unicast frames: what goes past the pod's own device is judged, and what
    ///   bears another Ethernet address than the pod's is dropped, for the frame's socket tells whose it is.
    /// * CAP_NET_ADMIN gains nothing by another device on the same parent, as long as sockets of the pod send by it: it is dropped.
    ///
    /// A guarded pod must have no other device that leaves by the same parent: a VLAN device over that, or a macvlan on one, a second
    /// macvlan that is not guarded itself, or one whose packets are taken past the host's stack to the parent (Cilium's host routing,
    /// by `bpf_redirect_neigh`). What the pod's sockets send by it is dropped as spoofed.
    ///
    /// What it does not hold:
    /// * Frames to a group (broadcast, multicast) that are sent past the pod's own device reach other macvlans of the parent in the
    ///   mode `bridge`, to which the kernel copies them without the parent. Such a frame may carry a packet for one address, which
    ///   the receiver's stack takes: siblings that are under no policy of their own are reached past the sender's egress policy. Where
    ///   they are, their own ingress judges it. The modes `vepa` and `private` make no such copies and close this, unless
    ///   CAP_NET_ADMIN changes the mode, also that of a receiver.
    /// * CAP_NET_ADMIN can make frames without a socket (forwarded ones, and those that the kernel makes by itself, ARP among them)
    ///   with any Ethernet address, or from a namespace that the pod makes for itself (CAP_SYS_ADMIN): their source is all that the
    ///   guard has. So the pod can answer ARP for an address of its choice, by another device on the same parent, and receive what is
    ///   sent there; and forward packets from it.
    /// * Packet sockets in the pod read what its ingress policy denies, as above.
    Guarded,
    /// Every packet of the pod is judged, out of the pod's reach.
    Full,
}

/// Why a device could not be put under policy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The kernel lacks what is needed.
    #[error("kernel feature missing: {0}")]
    Unsupported(String),
    /// Nobody answered within the limit; the default program stands.
    #[error("policy for {attachment} was not enforced within {limit:?}: is the policy owner running?")]
    TimedOut {
        /// The endpoint's attachment.
        attachment: AttachmentKey,
        /// The limit that passed.
        limit: Duration,
    },
    /// The owner of the policy state is not there or not ready: the same call may succeed later.
    #[error("{doing}: {source}")]
    NotReady {
        /// What was being done, to which device or attachment.
        doing: String,
        /// What is missing.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Attaching, recording or signalling failed.
    #[error("{doing}: {source}")]
    Failed {
        /// What was being done, to which device or file.
        doing: String,
        /// What the system answered.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Takes foreign eBPF programs off a device that changes hands.
///
/// tcx links and XDP programs stay on a device that is moved to another namespace, pinned or held by whoever attached them:
/// what one tenant left would judge, or read, the packets of the next. Classifiers of tc go with the move (`clsact`).
///
/// Implementations act on the device by index in the namespace of the calling thread.
pub trait DeviceScrub: Send + Sync {
    /// Detaches every program from the device, whoever attached it, and returns what was found, in words such as
    /// `tcx ingress program 17 (drop_all)`. What is gone meanwhile is no error. Repeating it finds nothing.
    fn scrub(&self, device: IfIndex) -> Result<Vec<String>, ScrubError>;
}

/// Why a device may still carry foreign programs.
#[derive(Debug, thiserror::Error)]
#[error("device {device}: {what} cannot be taken off: {source}")]
pub struct ScrubError {
    /// The device, by its index.
    pub device: IfIndex,
    /// What stays, in the words of [`DeviceScrub::scrub`].
    pub what: String,
    /// What the system answered.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Tells which node has which addresses, for routes between nodes ([`crate::fabric`]).
#[async_trait]
pub trait FabricSource: Send {
    /// Waits until what is known differs from what the last call told, at most `limit`; `None` when it does not. The first
    /// call tells what there is. Several changes may be told as one; none is left out, but for those that were undone
    /// meanwhile.
    ///
    /// May block the thread for as long as it waits. An error loses nothing: the next call goes on.
    async fn next(&mut self, limit: Duration) -> Result<Option<FabricTable>, FabricSourceError>;

    /// Tells the others of this node, durably. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`FabricSourceError::NameTaken`] where somebody else has changed what this source told of the node: two nodes of a name
    /// would take each other's traffic in turns.
    async fn announce(&mut self, node: &FabricNode) -> Result<(), FabricSourceError>;

    /// Has the node own an address of each family whose prefixes nodes have, durably, for [`FabricNode::inside`]. They are in
    /// prefixes of its own, and the same whenever it is asked until [`withdraw`](Self::withdraw).
    ///
    /// # Errors
    /// [`FabricSourceError::Inside`] where there is none to be had: the node can do without.
    async fn lease_inside(&mut self, name: &str) -> Result<Vec<IpAddr>, FabricSourceError>;

    /// Has the others forget a node, and gives its addresses inside back. What else is its own is then reached by nobody. Of a
    /// node that is not known it is `Ok`.
    async fn withdraw(&mut self, name: &str) -> Result<(), FabricSourceError>;
}

/// How a node is reached by others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FabricNode {
    /// Its name, unique in the cluster.
    pub name: String,
    /// Its addresses on the underlay, at most one of a family.
    pub addresses: Vec<IpAddr>,
    /// Where it takes in VXLAN datagrams, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vtep: Option<Vtep>,
    /// What it sends through VXLAN itself comes from these addresses of its own prefixes, at most one of a family, so that
    /// answers come back through it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inside: Vec<IpAddr>,
}

/// The end of VXLAN tunnels that a node has (RFC 7348, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vtep {
    /// Where datagrams are sent to.
    pub address: IpAddr,
    /// The Ethernet address that frames for the node bear.
    pub mac: MacAddr,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The UDP port.
    pub port: u16,
    /// The largest packet that VXLAN carries on the node's own links, in bytes; `None` where it does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// Who has what, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FabricTable {
    /// Nodes by name.
    pub nodes: BTreeMap<String, FabricNode>,
    /// The subnets of pools whose addresses are routed. What of them is nobody's is unreachable.
    pub pools: BTreeSet<IpNet>,
    /// Which node has the prefix. Of prefixes in each other the longest counts, as in every routing table: an address of a
    /// node's block that another node uses is a prefix of its own.
    pub prefixes: BTreeMap<IpNet, String>,
}

/// Why a source cannot tell, or cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FabricSourceError {
    /// Another node has the name.
    #[error("the name {name} is also another node's, which is at {addresses:?}; give one of the two another name")]
    NameTaken {
        /// The name.
        name: String,
        /// The other's addresses.
        addresses: Vec<IpAddr>,
    },
    /// The node gets no addresses inside.
    #[error(
        "node {name} gets no addresses for what it sends through VXLAN itself, so that answers go past it; give its pools \
         free addresses: {source}"
    )]
    Inside {
        /// The node.
        name: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What holds the records failed.
    #[error(transparent)]
    Source(Box<dyn std::error::Error + Send + Sync>),
}
