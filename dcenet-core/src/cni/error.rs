//! Errors as the runtime reads them.

use std::fmt;

use serde::Serialize;

use super::SpecVersion;
use crate::model::ParseError;
use crate::provider::{LeaseError, PolicyError};
use crate::section::SectionError;

/// Numbers of errors. Those below 100 are the specification's (CNI 1.1.0, section 5, "Error"); the others are ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorCode {
    /// 1: the configuration's `cniVersion` is not served.
    IncompatibleVersion,
    /// 2: a key of the configuration that cannot be honoured; the message names key and value.
    UnsupportedField,
    /// 4: a missing or wrong environment variable.
    InvalidEnvironment,
    /// 5: stdin or the state directory cannot be read or written.
    Io,
    /// 6: stdin is no JSON object.
    Decode,
    /// 7: the configuration contradicts itself or the host.
    InvalidConfig,
    /// 8: `CNI_NETNS` is no network namespace, or is the caller's own.
    InvalidNetns,
    /// 11: the same call may succeed later.
    TryAgain,
    /// 50: STATUS: an ADD would fail now.
    Unavailable,
    /// 100: the kernel or a backend failed; the message says which and how.
    Failed,
    /// 110: the address that was asked for belongs to somebody else, or every one that was tried does.
    AddressHeld,
    /// 111: a gateway does not answer, and the configuration wants it to.
    GatewaySilent,
    /// 112: a port of the host that was asked for leads to another container.
    PortHeld,
    /// 113: an interface of that name, not of this attachment, is in the container.
    LinkExists,
    /// 114: the kernel lacks a feature that the configuration asks for.
    KernelFeature,
    /// 115: the call failed, and undoing what it had done failed too; DEL repeats the undoing.
    RollbackIncomplete,
    /// 120: CHECK: the container's network is not as ADD left it.
    Drift,
    /// The code of a plugin of others that was run; the message tells which.
    Delegated(u32),
}

impl ErrorCode {
    /// The number.
    pub const fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::UnsupportedField => 2,
            Self::InvalidEnvironment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidConfig => 7,
            Self::InvalidNetns => 8,
            Self::TryAgain => 11,
            Self::Unavailable => 50,
            Self::Failed => 100,
            Self::AddressHeld => 110,
            Self::GatewaySilent => 111,
            Self::PortHeld => 112,
            Self::LinkExists => 113,
            Self::KernelFeature => 114,
            Self::RollbackIncomplete => 115,
            Self::Drift => 120,
            Self::Delegated(code) => code,
        }
    }
}

/// Why a verb failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct CniError {
    /// What kind of failure.
    pub code: ErrorCode,
    /// One sentence for people.
    pub message: String,
    /// More for people; may be empty.
    pub details: String,
}

impl CniError {
    /// An error without details.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    /// The same with details.
    #[must_use]
    pub fn with_details(self, details: impl Into<String>) -> Self {
        Self { details: details.into(), ..self }
    }

    /// The error object for stdout.
    pub fn to_json(&self, version: SpecVersion) -> String {
        #[derive(Serialize)]
        struct Wire<'a> {
            #[serde(rename = "cniVersion")]
            version: &'a str,
            code: u32,
            msg: &'a str,
            #[serde(skip_serializing_if = "str::is_empty")]
            details: &'a str,
        }
        let wire =
            Wire { version: version.as_str(), code: self.code.number(), msg: &self.message, details: &self.details };
        serde_json::to_string(&wire).expect("strings and numbers always serialise")
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (code {})", self.message, self.code.number())?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl From<SectionError> for CniError {
    fn from(error: SectionError) -> Self {
        Self::new(ErrorCode::InvalidConfig, error.to_string())
    }
}

impl From<ParseError> for CniError {
    fn from(error: ParseError) -> Self {
        Self::new(ErrorCode::InvalidConfig, error.to_string())
    }
}

impl From<LeaseError> for CniError {
    fn from(error: LeaseError) -> Self {
        let code = match &error {
            LeaseError::Invalid { .. } => ErrorCode::InvalidConfig,
            LeaseError::Held { .. } => ErrorCode::AddressHeld,
            _ if error.is_retryable() => ErrorCode::TryAgain,
            _ => ErrorCode::Failed,
        };
        Self::new(code, error.to_string()).with_details(causes(&error))
    }
}

impl From<PolicyError> for CniError {
    fn from(error: PolicyError) -> Self {
        let code = match &error {
            PolicyError::Unsupported(_) => ErrorCode::KernelFeature,
            PolicyError::TimedOut { .. } | PolicyError::NotReady { .. } => ErrorCode::TryAgain,
            PolicyError::Failed { .. } => ErrorCode::Failed,
        };
        Self::new(code, error.to_string()).with_details(causes(&error))
    }
}

/// The chain of causes below an error, for `details`, without those that its own text or another cause tells already.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut told = vec![error.to_string()];
    for cause in std::iter::successors(error.source(), |cause| cause.source()) {
        let text = cause.to_string();
        if told.iter().all(|t| !t.contains(&text)) {
            told.push(text);
        }
    }
    told[1..].join(": ")
}
