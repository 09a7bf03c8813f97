//! Versions of the specification.

use std::fmt;
use std::str::FromStr;

use super::{CniError, ErrorCode};
use crate::model::serde_by_text;

/// A version of the CNI specification that is served. Matched by exact text, never by range: a version says how a
/// configuration and a result are to be read, and an unknown one says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpecVersion {
    /// 0.3.1: several interfaces and addresses; `ips[].version` is "4" or "6".
    V0_3_1,
    /// 0.4.0: CHECK.
    V0_4_0,
    /// 1.0.0: `ips[].version` is gone.
    V1_0_0,
    /// 1.1.0: GC, STATUS; `mtu`, `socketPath`, `pciID` of interfaces; priority, table, scope, MTU of routes.
    V1_1_0,
}

impl SpecVersion {
    /// All, oldest first.
    pub const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest.
    pub const NEWEST: Self = Self::V1_1_0;

    /// The version as text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SpecVersion {
    type Err = CniError;

    fn from_str(s: &str) -> Result<Self, CniError> {
        Self::ALL.into_iter().find(|v| v.as_str() == s).ok_or_else(|| {
            let served = Self::ALL.map(Self::as_str).join(", ");
            CniError::new(
                ErrorCode::IncompatibleVersion,
                format!("cniVersion {s:?} is not served; use one of {served}"),
            )
        })
    }
}

serde_by_text!(SpecVersion);
