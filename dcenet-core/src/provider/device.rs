//! Devices of the host that are handed out, such as the virtual functions of a network adapter.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::model::{AttachmentKey, IfIndex, IfName, MacAddr, Mtu, NetworkName, VlanId};

/// Hands out devices of the host and takes them back as they were.
///
/// The source alone knows what a device was, and keeps that where a reboot does not lose it; the engine's journal only
/// says which device an attachment has. So there is one owner of every change: the source makes the device what it is
/// to be and brings it home; the engine moves it into the pod's namespace, puts it under policy and gives it addresses,
/// none of which outlives its way home.
///
/// Called in the host's network namespace, by one caller at a time for an attachment ([`crate::engine::Hold`]), and by
/// any number for others, in any number of processes. Synchronous, and as slow as drivers are.
pub trait DeviceSource: Send + Sync {
    /// Gives the attachment a device. It is in the host's namespace then, down, and what was wished for, and the caller
    /// moves it into the namespace of the request next, and nowhere else. What the attachment had before, also by a
    /// call that was killed, is taken back first.
    ///
    /// After `Ok` nobody else gets the device until it is released, whatever dies.
    ///
    /// # Errors
    /// Everything is as it was before, as far as the source can have it so.
    fn lend(&self, request: &DeviceRequest) -> Result<LentDevice, DeviceError>;

    /// Whether the attachment has a device, or one was being given to it or taken from it when a call was killed.
    fn is_lent(&self, attachment: &AttachmentKey) -> Result<bool, DeviceError>;

    /// In what the device is not what the attachment was lent: what the source set of it, or that it is lent to it no
    /// more. For CHECK, while the device is where the caller moved it. Nothing is changed.
    fn missing(&self, attachment: &AttachmentKey, device: &LentDevice) -> Result<Vec<String>, DeviceError>;

    /// Brings the attachment's device home from wherever it is, makes it what it was, and takes every program off it.
    /// Of an attachment that has none it is `Ok`, for DEL is repeated. A device that is home and cannot be made what it
    /// was goes to nobody else; that is the source's affair, and `Ok` too.
    ///
    /// # Errors
    /// Also where the device is found nowhere and may be up in the pod's namespace still, which some process keeps:
    /// [`DeviceError::Busy`], as often as it is asked, until it is found. Its addresses are not free as long, nor is
    /// its policy to go.
    fn release(&self, attachment: &AttachmentKey) -> Result<(), DeviceError>;

    /// The attachments of a network that [have a device](Self::is_lent), in order, each once. Nothing is held: one may
    /// have given its device back by now. For GC, which holds each before it releases it.
    fn lent(&self, network: &NetworkName) -> Result<Vec<AttachmentKey>, DeviceError>;

    /// Whether the source could be asked now, for such a device if one is given; for STATUS. That no device is free is
    /// no error.
    fn ready(&self, wish: Option<&DeviceWish>) -> Result<(), DeviceError>;
}

/// One source for many who ask.
impl<T: DeviceSource + ?Sized> DeviceSource for Arc<T> {
    fn lend(&self, request: &DeviceRequest) -> Result<LentDevice, DeviceError> {
        (**self).lend(request)
    }

    fn is_lent(&self, attachment: &AttachmentKey) -> Result<bool, DeviceError> {
        (**self).is_lent(attachment)
    }

    fn missing(&self, attachment: &AttachmentKey, device: &LentDevice) -> Result<Vec<String>, DeviceError> {
        (**self).missing(attachment, device)
    }

    fn release(&self, attachment: &AttachmentKey) -> Result<(), DeviceError> {
        (**self).release(attachment)
    }

    fn lent(&self, network: &NetworkName) -> Result<Vec<AttachmentKey>, DeviceError> {
        (**self).lent(network)
    }

    fn ready(&self, wish: Option<&DeviceWish>) -> Result<(), DeviceError> {
        (**self).ready(wish)
    }
}

/// Who asks for a device, and for which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRequest {
    /// What it is for.
    pub attachment: AttachmentKey,
    /// What is wished for.
    pub wish: DeviceWish,
    /// The Ethernet address that it is to have.
    pub mac: MacAddr,
    /// The path of the namespace into which it is moved.
    pub netns: PathBuf,
}

/// Which device, and what it is to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceWish {
    /// One of this pool, or any.
    pub pool: Option<String>,
    /// This one, by the name that the source has for devices, such as a PCI address.
    pub device: Option<String>,
    /// What the source's devices can be set to: `link.vf` of the configuration, which the source reads.
    pub settings: Map<String, Value>,
    /// Its MTU, in bytes.
    pub mtu: Option<Mtu>,
    /// The VLAN of its addresses.
    pub vlan: Option<VlanId>,
}

/// A device that was lent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LentDevice {
    /// The name that the source has for it, such as a PCI address.
    pub id: String,
    /// The name of its link in the host's namespace.
    pub name: IfName,
    /// The index of its link there.
    pub index: IfIndex,
    /// Its Ethernet address.
    pub mac: MacAddr,
}

/// Why no device was given or taken back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The configuration or the request is wrong; it will be until somebody changes it.
    #[error("{field}: {reason}")]
    Invalid {
        /// The path of the wrong field, such as `link.pool`.
        field: String,
        /// The value that is refused, why, and what would be accepted.
        reason: String,
    },
    /// There is none to be had now.
    #[error("no device is to be had: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Somebody works on the device now; the same call may succeed later.
    #[error("the device is busy: {0}")]
    Busy(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The device, or what is kept of it, failed.
    #[error("{0}")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl DeviceError {
    /// Whether the same call may succeed later without anybody changing the configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::Busy(_) => true,
            Self::Invalid { .. } | Self::Failed(_) => false,
        }
    }
}
