//! The `policy` section of a configuration.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use dcenet_ebpf::pin::DEFAULT_DIRECTORY;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The `policy` section: `{ "default": "deny", "await": "5s", "pins": "/run/dcenet/bpf" }`. Every key may be left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PolicyConfig {
    /// What holds for an endpoint until the owner of the policy state has put its own verdicts in place.
    pub default: DefaultVerdict,
    /// How long an attachment waits for those verdicts; `0s` does not wait.
    #[serde(rename = "await")]
    pub limit: Limit,
    /// The bpffs that holds maps and default programs.
    pub pins: PathBuf,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self { default: DefaultVerdict::Deny, limit: Limit(Duration::from_secs(5)), pins: DEFAULT_DIRECTORY.into() }
    }
}

/// What an endpoint may do while its policy is unknown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DefaultVerdict {
    /// Everything, as if there were no policy.
    Allow,
    /// Nothing but resolving addresses (ARP, neighbour discovery).
    #[default]
    Deny,
}

impl DefaultVerdict {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Allow, Self::Deny];

    /// `allow` or `deny`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

/// A length of time, as text such as `500ms`, `5s` or `2m`; at most 10 minutes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Limit(Duration);

impl Limit {
    /// The longest.
    pub const MAX: Self = Self(Duration::from_secs(600));

    /// As a duration.
    pub const fn get(self) -> Duration {
        self.0
    }

    /// A duration, cut to the longest limit and to whole milliseconds.
    pub fn saturating(duration: Duration) -> Self {
        let milliseconds = u64::try_from(duration.min(Self::MAX.0).as_millis()).unwrap_or(u64::MAX);
        Self(Duration::from_millis(milliseconds))
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let milliseconds = self.0.as_millis();
        match (milliseconds % 60_000, milliseconds % 1000) {
            (0, _) if milliseconds > 0 => write!(f, "{}m", milliseconds / 60_000),
            (_, 0) => write!(f, "{}s", milliseconds / 1000),
            _ => write!(f, "{milliseconds}ms"),
        }
    }
}

/// A text that is no [`Limit`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("duration {value:?}: {reason}")]
pub struct LimitError {
    value: String,
    reason: &'static str,
}

impl FromStr for Limit {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let refuse = |reason| Err(LimitError { value: text.to_owned(), reason });
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let scale: u64 = match unit {
            _ if number.is_empty() => return refuse("want a whole number and a unit, such as 500ms, 5s or 2m"),
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "" => return refuse("without a unit; write 500ms, 5s or 2m"),
            _ => return refuse("not a unit that is known; use ms, s or m"),
        };
        match number.parse::<u64>().ok().and_then(|n| n.checked_mul(scale)).map(Duration::from_millis) {
            Some(duration) if duration <= Self::MAX.0 => Ok(Self(duration)),
            _ => refuse("longer than 10m, the most that an attachment may wait"),
        }
    }
}

impl Serialize for Limit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use dcenet_core::section;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_empty_section_is_deny_five_seconds_and_the_usual_pins() {
        let config: PolicyConfig = section::read("policy", &json!({})).unwrap();
        assert_eq!(config, PolicyConfig::default());
        let text = serde_json::to_value(&config).unwrap();
        assert_eq!(text, json!({"default": "deny", "await": "5s", "pins": "/run/dcenet/bpf"}));
    }

    #[test]
    fn limits_are_text_with_a_unit() {
        for (text, milliseconds, shown) in [
            ("0s", 0, "0s"),
            ("500ms", 500, "500ms"),
            ("5000ms", 5000, "5s"),
            ("90s", 90_000, "90s"),
            ("10m", 600_000, "10m"),
        ] {
            let limit: Limit = text.parse().unwrap();
            assert_eq!(limit.get(), Duration::from_millis(milliseconds));
            assert_eq!(limit.to_string(), shown);
        }
        for (text, part) in [
            ("", "whole number"),
            ("s", "whole number"),
            ("-1s", "whole number"),
            ("5", "without a unit"),
            ("5 s", "not a unit"),
            ("1h", "not a unit"),
            ("1.5s", "not a unit"),
            ("601s", "longer than 10m"),
            ("99999999999999999999m", "longer than 10m"),
        ] {
            let error = text.parse::<Limit>().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn a_wrong_section_is_refused_with_field_and_remedy() {
        let refusal = |value| section::read::<PolicyConfig>("policy", &value).unwrap_err().to_string();
        assert!(refusal(json!({"awiat": "5s"})).contains("did you mean `await`?"));
        assert!(refusal(json!({"await": "5"})).starts_with("policy.await: duration \"5\": without a unit"));
        assert!(refusal(json!({"await": 5})).starts_with("policy.await"));
        assert!(refusal(json!({"default": "drop"})).starts_with("policy.default: unknown variant"));
    }
}
