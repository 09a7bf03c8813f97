//! Values that are checked once, where they enter, and trusted from then on.
//!
//! Every type here parses from text, prints as the same text, and serialises as it. There is no I/O.

mod attachment;
mod mac;
mod name;
mod number;

pub use attachment::{AttachmentId, AttachmentKey};
pub use mac::MacAddr;
pub use name::{ClusterId, ContainerId, IfName, LabelSet, NetworkName, Workload};
pub use number::{IfIndex, Mtu, VlanId, VlanRange};

/// A text or number that is no value of the wanted type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {value:?}: {reason}")]
pub struct ParseError {
    /// What was wanted, such as "interface name".
    pub kind: &'static str,
    /// What was given.
    pub value: String,
    /// Why it is refused and what would be accepted.
    pub reason: &'static str,
}

impl ParseError {
    pub(crate) fn new(kind: &'static str, value: impl Into<String>, reason: &'static str) -> Self {
        Self { kind, value: value.into(), reason }
    }
}

/// Implements what every newtype over checked text has in common, given its `FromStr`.
macro_rules! text_value {
    ($($name:ident),+ $(,)?) => {$(
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }

        $crate::model::serde_by_text!($name);
    )+};
}

/// Serialises a type by its `Display` and reads it by its `FromStr`.
macro_rules! serde_by_text {
    ($($name:ident),+ $(,)?) => {$(
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )+};
}

pub(crate) use serde_by_text;
use text_value;
