//! What policies mean, and the cluster they apply to.
//!
//! Sources translate into this model; evaluator and compiler both start from it and share nothing else.
//!
//! # How a verdict comes about
//!
//! For one pod and one direction:
//!
//! 1. A pod in its host's network namespace is no subject of policy: allow.
//! 2. If no policy governs the pod in this direction: allow.
//! 3. The governing policies are tried by [`Tier`]: admin, NetworkPolicy, baseline, and those that have names, each in its
//!    [place](TierSpec::order). The rules of a tier form one list, ordered by priority, policy id, rule, peer and port; the
//!    first that matches decides. One that [passes](Action::Pass) ends the tier, and the next one goes on. Where no rule
//!    matches, the tier's [end](TierEnd) says whether the next one goes on or the packet is dropped. A policy of a tier that
//!    is not [known](Catalog::tiers) closes the pods that it governs: deny, before anything else is asked.
//! 4. The tier NetworkPolicy, where one of its policies governs the pod, begins with a rule of its own: traffic between a
//!    pod and the node it runs on is allowed (`networking.k8s.io/v1`, `NetworkPolicySpec.ingress`: "OR if the traffic
//!    source is the pod's local node"; for egress the concept page "Network Policies" of Kubernetes' documentation: traffic
//!    to and from the own node is always allowed). So whatever the node forwards under an address of its own, such as a
//!    NodePort or a proxy's port, is a way round egress policy; a rule of the tier admin that denies the node's addresses
//!    closes it, for that tier comes first. And it is the last: if no rule of it matches, the pod is isolated: deny.
//! 5. If the tiers are through: allow.
//!
//! Tiers, priorities and passing are those of `ClusterNetworkPolicySpec.tier` and `.priority` and of
//! `ClusterNetworkPolicyRuleAction` (`policy.networking.k8s.io/v1alpha2`), which leave open what policies of one priority
//! in one tier do: here the name decides.
//!
//! Where the peer is a pod, it is found by the address in the packet; an address that no pod holds matches no
//! selector, but may match a CIDR block. A CIDR block matches pods' addresses as well. An address that several pods
//! claim matches a selector (and, on egress, a named port) of a rule that allows never, and of a rule that denies where
//! one of them does; a rule that passes denies what it matches for one of them only because it matches a selector or
//! named port.
//!
//! What is not known is treated alike: a rule that allows by it does not match, and one that denies or passes denies.
//!
//! | Not known | Whom such a rule denies |
//! |---|---|
//! | a node's labels, where those of others are | that node |
//! | the labels of all nodes: nor is it known which there are | everybody |
//! | a group of prefixes | everybody |
//! | which clusters there are, where none is known | everybody |
//! | a cluster that the rule's selector asks for by its name; those that are known are still allowed | everybody |
//! | the schedule of a rule, or the time | whom it denies, or would pass |
//! | who answers for a service, or its own addresses; what is known of it is still allowed | everybody, on egress |
//! | all addresses of a name: those learnt so far may not be all | everybody, on egress |
//! | a pod's service account, where the rule's selector asks for it and holds otherwise | that pod |
//!
//! A policy whose subject asks for the service account of a pod that has none that is known governs the pod, and allows
//! nothing; where one of its rules denies or passes, nothing behind it allows anything either.
//!
//! A rule that names a service matches what is addressed to the service itself and to who answers for it: whoever
//! translates the one to the other may stand before or behind the program that judges. What enters by a port of a node
//! (`NodePort`) is addressed to the node.
//!
//! A rule that allows by a [name](NamePattern) matches the addresses that have been learnt of it, whoever has asked for the
//! name, and whatever else they are addresses of: several names may share one.
//!
//! A policy in [audit](Mode::Audit) takes no part in any of this. What the verdict would be with all of them in force is told
//! beside it.
//!
//! Replies are not the model's concern: whoever enforces it judges the first packet of a flow.

mod catalog;
mod names;
mod policy;
mod schedule;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use catalog::{Backend, Catalog, ClusterSpec, ServiceId, TierEnd, TierSpec};
pub use names::{DomainName, NamePattern, Names, NoName};
pub use policy::{Action, Mode, Policy, PolicyId, Rule, RuleRef, Tier};
pub(crate) use schedule::{DAYS, MINUTES};
pub use schedule::{Schedule, Time, Window};

/// The label that every namespace carries with its own name
/// (`k8s.io/api/core/v1`, `LabelMetadataName`; set by the API server since Kubernetes 1.21).
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// The label of a cluster that holds its name, and that of the set of clusters that it belongs to: the names of the
/// properties by which a cluster tells of itself (`about.k8s.io`, KEP-2149, "Well known properties").
pub const CLUSTER_NAME_LABEL: &str = "cluster.clusterset.k8s.io";

/// See [`CLUSTER_NAME_LABEL`].
pub const CLUSTER_SET_LABEL: &str = "clusterset.k8s.io";

/// The label that stands for a pod's service account (`PodSpec.serviceAccountName`); of a pod without it the account is not
/// known. No object can have it, nor a selector of Kubernetes ask for it: a label's key has no `:`.
pub const SERVICE_ACCOUNT_LABEL: &str = "dcenet:service-account";

/// Labels of a pod or a namespace.
pub type Labels = BTreeMap<String, String>;

/// Which way a connection is opened, seen from the pod whose policy is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Towards the pod.
    Ingress,
    /// From the pod.
    Egress,
}

impl Direction {
    /// Both directions.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// `ingress` or `egress`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What happens to the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It passes.
    Allow,
    /// It is dropped.
    Deny,
}

impl Verdict {
    /// `allow` or `deny`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A transport protocol by its IANA number (IPv4 `Protocol`, IPv6 `Next Header` after extension headers).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Protocol(pub u8);

impl Protocol {
    /// ICMP for IPv4.
    pub const ICMP: Self = Self(1);
    /// TCP.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);
    /// SCTP.
    pub const SCTP: Self = Self(132);

    const NAMED: [(Self, &'static str); 5] =
        [(Self::ICMP, "icmp"), (Self::TCP, "tcp"), (Self::UDP, "udp"), (Self::ICMPV6, "icmpv6"), (Self::SCTP, "sctp")];

    /// Whether a [`Tuple`]'s `port` says anything: a port for TCP, UDP and SCTP, type and code for ICMP.
    pub const fn has_ports(self) -> bool {
        matches!(self, Self::TCP | Self::UDP | Self::SCTP | Self::ICMP | Self::ICMPV6)
    }

    /// Reads a lower-case name or a number.
    pub fn parse(text: &str) -> Option<Self> {
        let named = Self::NAMED.iter().find(|(_, name)| *name == text).map(|(protocol, _)| *protocol);
        named.or_else(|| text.parse().ok().map(Self))
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMED.iter().find(|(protocol, _)| protocol == self) {
            Some((_, name)) => f.write_str(name),
            None => self.0.fmt(f),
        }
    }
}

/// What policy knows of a packet that opens a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Tuple {
    /// The direction, seen from the pod whose policy is asked.
    pub direction: Direction,
    /// The other end's address.
    pub peer: IpAddr,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Destination port; for ICMP `type * 256 + code`; 0 for every other protocol.
    pub port: u16,
}

impl Tuple {
    /// A packet from `peer` to the pod.
    pub const fn ingress(peer: IpAddr, protocol: Protocol, port: u16) -> Self {
        Self { direction: Direction::Ingress, peer, protocol, port }
    }

    /// A packet from the pod to `peer`.
    pub const fn egress(peer: IpAddr, protocol: Protocol, port: u16) -> Self {
        Self { direction: Direction::Egress, peer, protocol, port }
    }

    /// The `port` of an ICMP message.
    pub const fn icmp_port(kind: u8, code: u8) -> u16 {
        (kind as u16) << 8 | code as u16
    }
}

/// Selects by labels; all requirements must hold, so that an empty selector selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct LabelSelector {
    /// The requirements, ANDed.
    pub requirements: Vec<Requirement>,
}

/// One condition on one label (`k8s.io/apimachinery/pkg/apis/meta/v1`, `LabelSelectorRequirement`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Requirement {
    /// The label's key.
    pub key: String,
    /// The condition.
    pub operator: Operator,
}

/// A condition on one label. `NotIn` and `DoesNotExist` hold where the label is missing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Operator {
    /// The label exists with one of these values.
    In(BTreeSet<String>),
    /// The label is missing or has none of these values.
    NotIn(BTreeSet<String>),
    /// The label exists.
    Exists,
    /// The label is missing.
    DoesNotExist,
}

/// Which namespaces.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum NamespaceMatch {
    /// The one of this name.
    Named(String),
    /// Those with matching labels.
    Selected(LabelSelector),
}

/// Pods by namespace and labels.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PodMatch {
    /// The pods' namespaces.
    pub namespaces: NamespaceMatch,
    /// The pods in them.
    pub pods: LabelSelector,
}

/// Addresses by prefix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct IpBlock {
    /// Addresses that match...
    pub cidr: IpNet,
    /// ...unless they are in one of these.
    pub except: Vec<IpNet>,
}

/// One kind of other end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Peer {
    /// Pods by labels.
    Pods(PodMatch),
    /// Addresses, of pods or not.
    Block(IpBlock),
    /// Addresses of nodes, by the nodes' labels.
    Nodes(LabelSelector),
    /// The addresses of one of [`Catalog::groups`].
    Group(String),
    /// Addresses of [clusters](Catalog::clusters), by the clusters' labels.
    Clusters(LabelSelector),
    /// On egress the addresses that have been [learnt](Cluster::names) of names, and of a rule that denies or passes everybody;
    /// on ingress nobody.
    Name(NamePattern),
    /// The backends of one of [`Catalog::services`] and its [own addresses](Catalog::service_addresses), at their ports, on
    /// egress; on ingress nobody.
    Service(ServiceId),
}

/// Who the other end may be.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub enum Peers {
    /// Anybody, known or not.
    Any,
    /// Whoever matches one of them; an empty list matches nobody.
    OneOf(Vec<Peer>),
}

/// Which service of the destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub enum Ports {
    /// Every protocol and port.
    Any,
    /// Whatever matches one of them; an empty list matches nothing.
    OneOf(Vec<PortMatch>),
}

/// One protocol and some of its ports.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct PortMatch {
    /// The protocol.
    pub protocol: Protocol,
    /// Its ports.
    pub port: PortSpec,
}

/// Ports of one protocol.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub enum PortSpec {
    /// All of them.
    Any,
    /// `first` to `last`, both included; for ICMP values of `type * 256 + code`.
    Range {
        /// The first.
        first: u16,
        /// The last.
        last: u16,
    },
    /// The ports that the destination pod gives this name for this protocol. On ingress that is the pod under
    /// policy; on egress it is the pod that holds the packet's destination address, and no pod means no match.
    Named(String),
}

/// The name of a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PodId {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl PodId {
    /// Composes the parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for PodId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A port that a pod names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct NamedPort {
    /// The name.
    pub name: String,
    /// Its protocol; the same name may be used once per protocol.
    pub protocol: Protocol,
    /// The number.
    pub port: u16,
}

/// Whose network namespace a pod uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PodNetwork {
    /// One of its own.
    #[default]
    Own,
    /// Its node's (`hostNetwork: true`). Such a pod is neither a subject of policy nor found by a selector; its
    /// address is its node's and can be matched by CIDR.
    Host,
}

/// A pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Pod {
    /// Its labels.
    pub labels: Labels,
    /// Its addresses, of both families.
    pub addresses: BTreeSet<IpAddr>,
    /// The ports that it names.
    pub ports: BTreeSet<NamedPort>,
    /// The node that it runs on, where known.
    pub node: Option<String>,
    /// Whose network namespace it uses.
    pub network: PodNetwork,
    /// Whether its device is straight on a segment, as a macvlan or ipvlan is. There anybody may send from the address of
    /// the pod's node, which is then no reason to let a packet in.
    pub on_segment: bool,
}

impl Pod {
    /// A pod with labels and addresses, no named ports, on no known node.
    pub fn new<'a>(
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
        addresses: impl IntoIterator<Item = IpAddr>,
    ) -> Self {
        Self { labels: owned(labels), addresses: addresses.into_iter().collect(), ..Self::default() }
    }
}

/// Everything that verdicts depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Cluster {
    /// Labels of each namespace. Use [`Cluster::insert_namespace`], which adds the name label.
    pub namespaces: BTreeMap<String, Labels>,
    /// The pods.
    pub pods: BTreeMap<PodId, Pod>,
    /// Addresses of each node, of any of its interfaces.
    pub nodes: BTreeMap<String, BTreeSet<IpAddr>>,
    /// The policies. The key is the policy's own id.
    pub policies: BTreeMap<PolicyId, Policy>,
    /// What policies name beside pods.
    pub catalog: Catalog,
    /// What has been learnt of names of the Domain Name System. Sources leave it empty: by a name nobody is allowed until then.
    pub names: Names,
    /// The time as of which rules with schedules are asked. `None`, as sources leave it: it is not known whether they hold, so
    /// that those that allow match nobody, and those that deny or pass deny whom they match.
    pub time: Option<Time>,
}

impl Cluster {
    /// Adds or replaces a namespace and gives it its [`NAMESPACE_NAME_LABEL`].
    pub fn insert_namespace<'a>(
        &mut self,
        name: impl Into<String>,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) {
        let name = name.into();
        let mut labels = owned(labels);
        labels.insert(NAMESPACE_NAME_LABEL.to_owned(), name.clone());
        self.namespaces.insert(name, labels);
    }

    /// Adds or replaces a policy, and returns the one it replaces.
    pub fn insert_policy(&mut self, policy: Policy) -> Option<Policy> {
        self.policies.insert(policy.id.clone(), policy)
    }

    /// The cluster without the policies in audit, which change no verdict.
    pub fn without_audit(&self) -> Cow<'_, Self> {
        if self.policies.values().all(|policy| policy.mode == Mode::Enforce) {
            return Cow::Borrowed(self);
        }
        let mut cluster = self.clone();
        cluster.policies.retain(|_, policy| policy.mode == Mode::Enforce);
        Cow::Owned(cluster)
    }

    /// The same without policies in audit, and with rules for all time that come to what there is now: one that does not hold
    /// matches nobody, and one of which that is not known allows nobody and denies whom it would pass.
    pub fn in_force(&self) -> Cow<'_, Self> {
        let mut cluster = self.without_audit();
        let is_scheduled = |policy: &Policy| policy.all_rules().any(|rule| rule.schedule.is_some());
        if !cluster.policies.values().any(is_scheduled) {
            return cluster;
        }
        let Self { policies, catalog, time, .. } = cluster.to_mut();
        for policy in policies.values_mut() {
            let Policy { ingress, egress, .. } = policy;
            for rule in [ingress, egress].into_iter().flatten().flatten() {
                match catalog.action_at(*time, rule) {
                    Some(action) => rule.action = action,
                    None => rule.peers = Peers::OneOf(Vec::new()),
                }
                rule.schedule = None;
            }
        }
        cluster
    }

    /// What policies are tried by: the lower first. Those of a tier that is not known come before all others.
    pub fn order<'a>(&self, policy: &'a Policy) -> (Option<u16>, &'a Tier, u16, &'a PolicyId) {
        let tier = &policy.id.tier;
        (self.catalog.tier(tier).map(|spec| spec.order), tier, policy.priority, &policy.id)
    }

    /// The addresses by which rules that name nodes mean each of them: its own, and its external ones.
    pub fn addresses_of_nodes(&self) -> impl Iterator<Item = (&String, &BTreeSet<IpAddr>)> {
        self.nodes.iter().chain(&self.catalog.external_addresses)
    }

    /// A namespace's labels; one that is not known has only its name.
    pub fn namespace_labels(&self, name: &str) -> Labels {
        let known = self.namespaces.get(name).cloned();
        known.unwrap_or_else(|| owned([(NAMESPACE_NAME_LABEL, name)]))
    }
}

fn owned<'a>(labels: impl IntoIterator<Item = (&'a str, &'a str)>) -> Labels {
    labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}
