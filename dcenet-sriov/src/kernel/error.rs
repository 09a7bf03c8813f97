//! What the kernel refused, by class, with the attribute and what helps.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// Something that can be set of a virtual function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub enum Attribute {
    /// The administrator's Ethernet address.
    Mac,
    /// The VLAN.
    Vlan,
    /// The VLAN tag's priority.
    Qos,
    /// The VLAN tag's EtherType.
    Protocol,
    /// The guaranteed rate.
    MinRate,
    /// The limit of the rate.
    MaxRate,
    /// The check of source addresses.
    Spoofchk,
    /// The carrier.
    LinkState,
    /// The permission to read how receive queues are chosen.
    RssQuery,
    /// Trust.
    Trust,
    /// The InfiniBand node GUID.
    NodeGuid,
    /// The InfiniBand port GUID.
    PortGuid,
    /// The effective Ethernet address: that of the network device.
    EffectiveMac,
    /// The network device's MTU.
    Mtu,
    /// Whether the network device receives all multicast frames.
    AllMulticast,
    /// Whether the network device receives all frames.
    Promisc,
}

impl Attribute {
    /// Its key in a configuration.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Mac => "mac",
            Self::Vlan => "vlan",
            Self::Qos => "qos",
            Self::Protocol => "protocol",
            Self::MinRate => "minRate",
            Self::MaxRate => "maxRate",
            Self::Spoofchk => "spoofchk",
            Self::LinkState => "linkState",
            Self::RssQuery => "rssQuery",
            Self::Trust => "trust",
            Self::NodeGuid => "nodeGuid",
            Self::PortGuid => "portGuid",
            Self::EffectiveMac => "effectiveMac",
            Self::Mtu => "mtu",
            Self::AllMulticast => "allMulticast",
            Self::Promisc => "promisc",
        }
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

/// What kind of failure it is: what a caller decides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorClass {
    /// The driver or the kernel cannot do it, ever (`EOPNOTSUPP`, `EPROTONOSUPPORT`).
    Unsupported,
    /// Not now (`EBUSY`, `EAGAIN`): the same call may succeed later.
    Busy,
    /// The device, function or attribute is not there (`ENODEV`, `ENOENT`, `ENXIO`).
    Gone,
    /// The namespace is not there.
    NamespaceGone,
    /// The value is refused (`EINVAL`, `ERANGE`, `EADDRNOTAVAIL`).
    Invalid,
    /// The name is taken (`EEXIST`).
    Exists,
    /// Something has run out (`ENOSPC`, `ENOMEM`, `ENOBUFS`).
    Exhausted,
    /// The caller, or the function, is not allowed to (`EPERM`, `EACCES`).
    Denied,
    /// The function's index is not in the port's list: the driver withheld it, or there is no such function.
    NotReported,
    /// The list of virtual functions cannot be read to its end.
    Incomplete,
    /// The reply was lost: it may have happened or not.
    Lost,
    /// Anything else.
    Other,
}

impl ErrorClass {
    /// The class of an errno.
    pub const fn of(errno: i32) -> Self {
        match errno {
            libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOSYS => Self::Unsupported,
            libc::EBUSY | libc::EAGAIN => Self::Busy,
            libc::ENODEV | libc::ENOENT | libc::ENXIO => Self::Gone,
            libc::EINVAL | libc::ERANGE | libc::EADDRNOTAVAIL => Self::Invalid,
            libc::EEXIST => Self::Exists,
            libc::ENOSPC | libc::ENOMEM | libc::ENOBUFS => Self::Exhausted,
            libc::EPERM | libc::EACCES => Self::Denied,
            _ => Self::Other,
        }
    }

    /// What helps, as a rule.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Unsupported => "leave the setting out, or use an adapter whose driver has it",
            Self::Busy => "try again when whoever uses the function is done",
            Self::Gone => "look whether the function still exists: its port's VF count may have been changed",
            Self::NamespaceGone => "give the path of a namespace that lives",
            Self::Invalid => "give another value; some drivers take it only while the port has carrier or is up",
            Self::Exists => "rename what has the name, or choose another",
            Self::Exhausted => "free some, or ask for less",
            Self::Denied => {
                "run as root in the first user namespace; a function changes its own address while it is trusted"
            }
            Self::NotReported => "try again: the port's driver withholds functions that are being reset",
            Self::Incomplete => "reduce the port's VF count",
            Self::Lost => "read the state to learn whether it happened",
            Self::Other => "see the kernel's log",
        }
    }
}

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub struct KernelError {
    /// What was attempted, such as `configure VF 3 of link 2`.
    pub operation: String,
    /// What kind of failure it is.
    pub class: ErrorClass,
    /// The kernel's errno, where it refused.
    pub errno: Option<i32>,
    /// What was refused, where that is known: one message sets many.
    pub attribute: Option<Attribute>,
    /// What the kernel says beside it.
    pub detail: Option<String>,
}

impl KernelError {
    /// A refusal with an errno.
    pub fn refused(operation: impl Into<String>, errno: i32) -> Self {
        Self::of_class(operation, ErrorClass::of(errno)).with_errno(errno)
    }

    /// A failure without an errno.
    pub fn of_class(operation: impl Into<String>, class: ErrorClass) -> Self {
        Self { operation: operation.into(), class, errno: None, attribute: None, detail: None }
    }

    /// A failed system call.
    pub fn io(operation: impl Into<String>, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::refused(operation, errno),
            None => Self::of_class(operation, ErrorClass::Other).saying(error.to_string()),
        }
    }

    /// The same, of this attribute.
    pub fn at(self, attribute: Attribute) -> Self {
        Self { attribute: Some(attribute), ..self }
    }

    /// The same, with the kernel's words.
    pub fn saying(self, detail: impl Into<String>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }

    fn with_errno(self, errno: i32) -> Self {
        Self { errno: Some(errno), ..self }
    }

    /// Whether it may have taken effect all the same.
    pub fn may_have_happened(&self) -> bool {
        self.class == ErrorClass::Lost
    }

    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self.class, ErrorClass::Busy | ErrorClass::Lost | ErrorClass::NotReported)
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.operation)?;
        if let Some(attribute) = self.attribute {
            write!(f, ", {attribute}")?;
        }
        f.write_str(": ")?;
        match (self.errno, &self.detail) {
            (Some(errno), None) => write!(f, "{}", io::Error::from_raw_os_error(errno))?,
            (Some(errno), Some(detail)) => write!(f, "{}: {detail}", io::Error::from_raw_os_error(errno))?,
            (None, Some(detail)) => f.write_str(detail)?,
            (None, None) => f.write_str(match self.class {
                ErrorClass::NamespaceGone => "the namespace is gone",
                ErrorClass::Lost => "the reply was lost",
                ErrorClass::NotReported => "the port's driver does not report this function",
                ErrorClass::Gone => "it is not there",
                _ => "failed",
            })?,
        }
        write!(f, "; {}", self.class.remedy())
    }
}
