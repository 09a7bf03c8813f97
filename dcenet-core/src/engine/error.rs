//! Why attaching or detaching failed.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;

use crate::journal::JournalError;
use crate::link::PlanError;
use crate::model::{AttachmentKey, IfName};
use crate::netlink::{CreateLinkError, NetlinkError};
use crate::netns::NetNsError;
use crate::probe::Conflict;
use crate::provider::{DeviceError, PolicyError};
use crate::sysctl::dotted;

/// Why an attachment was not made. What had been done has been taken back, except for what `rollback` lists.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The request and the configuration contradict each other, or the host.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Policy is wanted and nobody was given to the engine who decides.
    #[error(
        "{key}: policy is wanted and this program has no policy backend; drop the policy section or use one that has"
    )]
    NoPolicyBackend {
        /// The attachment.
        key: AttachmentKey,
    },
    /// The pod's namespace is the host's own.
    #[error("network namespace {} is the host's own; give the pod's", path.display())]
    HostNamespace {
        /// The path as given.
        path: PathBuf,
    },
    /// Another attachment has the same 52-bit id.
    #[error("attachment {key} has the same id {} as the existing {other}; choose another container id", key.id())]
    IdCollision {
        /// The attachment asked for.
        key: AttachmentKey,
        /// The one that exists.
        other: Box<AttachmentKey>,
    },
    /// A [`Hold`](super::Hold) is of one attachment.
    #[error("attachment {key} is not held, {held} is; hold the one that is to be attached")]
    NotHeld {
        /// The attachment asked for.
        key: AttachmentKey,
        /// The one that is held.
        held: Box<AttachmentKey>,
    },
    /// The attachment stands, in another namespace or with another configuration.
    #[error("attachment {key} exists already, with {difference}; delete it first")]
    AlreadyAttached {
        /// The attachment.
        key: AttachmentKey,
        /// What differs.
        difference: &'static str,
    },
    /// The pod has an interface of this name, and it is not ours.
    #[error("the namespace {} has an interface {ifname} already; remove it or ask for another name", netns.display())]
    InterfaceExists {
        /// The name.
        ifname: IfName,
        /// The namespace's path.
        netns: PathBuf,
    },
    /// The host has a link with the name of the attachment's device, and it is not ours.
    #[error("the host has a link {ifname} already that is not of this attachment; remove it")]
    HostNameTaken {
        /// The name.
        ifname: IfName,
    },
    /// A namespace cannot be used.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    /// No device was given; nothing was changed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The link is made of a device that somebody hands out, and this program has nobody who does.
    #[error("link.kind {kind:?} needs a source of devices, which this program does not have; use another kind")]
    NoDeviceSource {
        /// The kind.
        kind: &'static str,
    },
    /// The host could not be looked at; nothing was changed.
    #[error("{0}")]
    Look(#[source] NetlinkError),
    /// The journal failed before anything was changed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A step failed.
    #[error("{cause}{}", Leftover(rollback))]
    Step {
        /// The first step that failed.
        #[source]
        cause: StepError,
        /// What could not be taken back; the record is kept, and a detach tries again.
        rollback: Vec<TeardownError>,
    },
    /// What an earlier, unfinished attach left behind could not be taken back.
    #[error("an unfinished attach of {key} stands in the way: {source}")]
    Leftover {
        /// The attachment.
        key: AttachmentKey,
        /// Why.
        #[source]
        source: DetachErrors,
    },
}

impl AttachError {
    /// Whether the same call may succeed later without anybody changing the configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Journal(JournalError::Busy { .. }) => true,
            Self::Look(error) => error.is_retryable(),
            Self::Device(error) => error.is_retryable(),
            Self::Step {
                cause: StepError::Netlink(error) | StepError::Create(CreateLinkError::Netlink(error)),
                ..
            } => error.is_retryable(),
            Self::Step {
                cause:
                    StepError::Policy(PolicyError::TimedOut { .. } | PolicyError::NotReady { .. })
                    | StepError::Unsent { .. },
                ..
            } => true,
            _ => false,
        }
    }

    /// The conflicts over which an attach failed that left nothing behind: with other addresses in the place of these it may
    /// succeed.
    pub fn conflicts(&self) -> Option<&[Conflict]> {
        match self {
            Self::Step { cause: StepError::InUse(conflicts), rollback } if rollback.is_empty() => Some(conflicts),
            _ => None,
        }
    }
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// The kernel refused, or its answer was lost.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A device was refused, by a kernel that has no such kind or for another reason.
    #[error(transparent)]
    Create(#[from] CreateLinkError),
    /// What is done by other means than netlink failed.
    #[error("{what}: {source}")]
    Local {
        /// What was attempted.
        what: String,
        /// What the system answered.
        #[source]
        source: std::io::Error,
    },
    /// A setting of a namespace was refused.
    #[error("{} cannot be set to {value:?}: {source}", dotted(name))]
    Setting {
        /// Its path below `/proc/sys/net`.
        name: String,
        /// What it was to be.
        value: String,
        /// What the kernel answered.
        #[source]
        source: std::io::Error,
    },
    /// The device took no frame (`ENOBUFS`): its queue is full, or programs on it drop all of them, as the default policy of a
    /// device in a pod does before the policy owner has taken note of the pod.
    #[error("{what}: {source}: nothing passed the device; where the pod is under policy, does the policy owner run?")]
    Unsent {
        /// What was attempted.
        what: String,
        /// What the system answered.
        #[source]
        source: std::io::Error,
    },
    /// A namespace could not be entered.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    /// The device could not be put under policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The completion could not be recorded.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Somebody else on the segment has addresses that the attachment was to get.
    #[error("{}", InUse(.0))]
    InUse(Vec<Conflict>),
    /// A route of a pod of several networks cannot be copied into the tables of its interfaces, so that packets would go
    /// elsewhere, or go where they are refused.
    #[error(
        "route {destination} of the pod has {what}, which the tables of several networks cannot have; have its plugin make \
         it otherwise, or attach its network alone"
    )]
    Route {
        /// Where it leads.
        destination: IpNet,
        /// What it has.
        what: &'static str,
    },
    /// A port of the host leads to another attachment.
    #[error("{port} of the host is held by {holder}; give another hostPort, or remove that attachment")]
    PortHeld {
        /// The port.
        port: String,
        /// Who has it.
        holder: String,
    },
    /// The host's kernel cannot translate.
    #[error(
        "the kernel has no {subsystem}, which masquerading and mapped ports need: load its module, or drop nat.masquerade \
         and runtimeConfig.portMappings: {source}"
    )]
    NoTranslation {
        /// What it lacks.
        subsystem: &'static str,
        /// What it answered.
        #[source]
        source: NetlinkError,
    },
    /// The host's kernel keeps no VLANs of a bridge apart.
    #[error(
        "link {link}: this kernel cannot keep VLANs of a bridge apart; it needs Linux 3.9 or later with \
         CONFIG_BRIDGE_VLAN_FILTERING, or a link of the kind vlan"
    )]
    NoVlanFiltering {
        /// What should be in a VLAN.
        link: IfName,
        /// What it answered.
        #[source]
        source: NetlinkError,
    },
    /// Gateways did not answer, and the configuration wants them to.
    #[error(
        "{} does not answer on {link}: is this the right segment, and is it up? link.underlay.gatewayProbe \"warn\" goes \
         on without it",
        Listed(gateways)
    )]
    GatewaySilent {
        /// The gateways.
        gateways: Vec<IpAddr>,
        /// The link that should lead to them.
        link: IfName,
    },
}

/// Something that could not be removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TeardownError {
    /// The kernel refused, or its answer was lost.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A namespace could not be entered.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    /// The policy backend failed.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// What a failed change had replaced could not be made again.
    #[error("what was there before could not be made again: {0}")]
    Former(#[source] Box<StepError>),
    /// The device was not taken back.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The attachment has a device that somebody handed out, and this program has nobody who takes it back.
    #[error(
        "the pod has device {device}, and this program has no source of devices to take it back; use the one that gave it"
    )]
    NoDeviceSource {
        /// The device, as its source calls it.
        device: String,
    },
    /// The source of devices knows nothing of a device that the pod has.
    #[error(
        "device {device} is in the pod as {ifname}, and this source of devices never lent it to the pod; use the one that \
         did, which keeps its records in the stateDir of that configuration"
    )]
    StillLent {
        /// The device, as its source calls it.
        device: String,
        /// Its name in the pod.
        ifname: IfName,
    },
    /// A setting of a namespace did not get its value back.
    #[error("{} cannot be set to {value:?} again: {source}", dotted(name))]
    Setting {
        /// Its path below `/proc/sys/net`.
        name: String,
        /// What it was.
        value: String,
        /// What the kernel answered.
        #[source]
        source: std::io::Error,
    },
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The record belongs to another attachment of the same id.
    #[error("the record of id {} belongs to {other}", key.id())]
    IdCollision {
        /// The attachment asked for.
        key: AttachmentKey,
        /// The one that is recorded.
        other: Box<AttachmentKey>,
    },
}

/// Everything that went wrong while an attachment was removed; the rest is removed.
#[derive(Debug, thiserror::Error)]
#[error("{}", Joined(.0))]
pub struct DetachErrors(pub Vec<TeardownError>);

impl From<JournalError> for DetachErrors {
    fn from(error: JournalError) -> Self {
        Self(vec![error.into()])
    }
}

impl DetachErrors {
    /// `Ok` where nothing went wrong.
    pub(super) fn or_ok(errors: Vec<TeardownError>) -> Result<(), Self> {
        if errors.is_empty() { Ok(()) } else { Err(Self(errors)) }
    }

    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        self.0.iter().all(|error| match error {
            TeardownError::Journal(JournalError::Busy { .. }) => true,
            TeardownError::Netlink(error) => error.is_retryable(),
            TeardownError::Device(error) => error.is_retryable(),
            TeardownError::Policy(PolicyError::TimedOut { .. } | PolicyError::NotReady { .. }) => true,
            _ => false,
        })
    }
}

struct Joined<'a>(&'a [TeardownError]);

impl std::fmt::Display for Joined<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if i > 0 { "; " } else { "" })?;
        }
        Ok(())
    }
}

/// Says who has which address.
pub(crate) struct InUse<'a>(pub(crate) &'a [Conflict]);

impl std::fmt::Display for InUse<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("in conflict with others on the segment: ")?;
        Listed(self.0).fmt(f)
    }
}

struct Listed<'a, T>(&'a [T]);

impl<T: std::fmt::Display> std::fmt::Display for Listed<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if i > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

struct Leftover<'a>(&'a [TeardownError]);

impl std::fmt::Display for Leftover<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, "; and it could not all be taken back: {}", Joined(self.0)) }
    }
}
