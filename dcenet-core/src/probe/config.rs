//! How much care a link takes of its addresses.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::{ParseError, serde_by_text};

/// What is done around the entering of addresses on a link whose segment others are on too: `"underlay"` of a `link`.
///
/// The kinds `macvlan`, `ipvlan` in the mode `l2`, `vlan` and `host-device` have the default where the key is absent;
/// `bridge` does nothing then, for most bridges lead nowhere, and the default where it is `{}`: give it to a bridge one of
/// whose ports leads out of the host.
///
/// ```
/// # use dcenet_core::link::LinkConfig;
/// # let value = serde_json::json!(
/// { "kind": "macvlan", "parent": "eth1",
///   "underlay": { "probes": 3, "within": "75ms", "replacements": 8, "announcements": 2, "gatewayProbe": "warn" } }
/// # );
/// # LinkConfig::read(&value)?;
/// # Ok::<(), dcenet_core::section::SectionError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Underlay {
    /// How often each address is asked for before it is entered, at most 10; 0: it is not. 3 by default (`PROBE_NUM` of
    /// RFC 5227, section 1.1). A link that has no carrier within ten seconds asks nobody, with a line in the log.
    pub probes: Count<10>,
    /// For how long answers are waited for in all, from `5ms` to `10s`; the probes are spread over it evenly. `75ms` by
    /// default.
    ///
    /// RFC 5227 takes 4 to 7 s, so that a host which is woken by the power coming back with a hundred others finds the
    /// segment working, and a wireless one its base station; a pod is made on a segment that works, and its start must not
    /// wait for seconds. Hosts answer within a millisecond; three probes leave room for two frames that are lost. Raise it
    /// where hosts sleep or the segment is slow.
    pub within: Span,
    /// How many addresses may be replaced for one attachment whose addresses are in use, at most 32; 0: none is, and the
    /// first conflict fails it. 8 by default.
    pub replacements: Count<32>,
    /// How often entered addresses are announced, at most 5; 0: they are not. 2 by default (`ANNOUNCE_NUM` of RFC 5227),
    /// without the pause between them, for the first is enough where no frame is lost.
    pub announcements: Count<5>,
    /// What happens where a gateway of the lease does not answer, in the same time as for conflicts. Nothing is asked by
    /// default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway_probe: Option<GatewayProbe>,
}

impl Default for Underlay {
    fn default() -> Self {
        Self {
            probes: Count(3),
            within: Span(Duration::from_millis(75)),
            replacements: Count(8),
            announcements: Count(2),
            gateway_probe: None,
        }
    }
}

impl Underlay {
    /// How conflicts are probed for; `None` where they are not.
    pub fn conflict_probe(&self) -> Option<Timing> {
        let probes = self.probes.0;
        (probes > 0).then_some(Timing { probes, within: self.within.get() })
    }

    /// How gateways are asked.
    pub fn gateway_timing(&self) -> Timing {
        Timing { probes: self.probes.0.max(1), within: self.within.get() }
    }
}

/// How often and for how long something is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// How often; 0 counts as once.
    pub probes: u8,
    /// How long in all. Each question has an even part of it.
    pub within: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Underlay::default().gateway_timing()
    }
}

/// What a gateway that does not answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GatewayProbe {
    /// A line in the log.
    Warn,
    /// The attachment is not made.
    Fail,
}

/// A number from 0 to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Count<const MAX: u8>(u8);

impl<const MAX: u8> Count<MAX> {
    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl<const MAX: u8> TryFrom<u64> for Count<MAX> {
    type Error = String;

    fn try_from(value: u64) -> Result<Self, String> {
        match u8::try_from(value) {
            Ok(count) if count <= MAX => Ok(Self(count)),
            _ => Err(format!("{value} is too many; give at most {MAX}")),
        }
    }
}

impl<const MAX: u8> From<Count<MAX>> for u64 {
    fn from(count: Count<MAX>) -> u64 {
        count.0.into()
    }
}

/// A time from 5 milliseconds to 10 seconds, as text: `75ms`, `2s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(Duration);

impl Span {
    /// The time.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl FromStr for Span {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let refuse = |reason| Err(ParseError::new("time", text, reason));
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let unit = match unit {
            "ms" => 1,
            "s" => 1000,
            _ => return refuse("want a whole number and a unit, such as 75ms or 2s"),
        };
        match number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)) {
            Some(milliseconds @ 5..=10_000) => Ok(Self(Duration::from_millis(milliseconds))),
            Some(_) => refuse("not between 5ms and 10s"),
            None => refuse("want a whole number and a unit, such as 75ms or 2s"),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            ms if ms % 1000 == 0 => write!(f, "{}s", ms / 1000),
            ms => write!(f, "{ms}ms"),
        }
    }
}

serde_by_text!(Span);
