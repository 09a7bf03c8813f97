//! The `policy` section of a configuration.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use dcenet_core::provider::Enforcement;
use dcenet_ebpf::attach::{Attached, Owner};
use dcenet_ebpf::pin::DEFAULT_DIRECTORY;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The `policy` section: `{ "default": "deny", "await": "5s", "pins": "/run/dcenet/bpf", "ahead": ["tracer"] }`. Every key may
/// be left out.
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
    /// What an attachment must offer; others are refused.
    #[serde(skip_serializing_if = "Require::is_any")]
    pub require: Require,
    /// Programs of others that may see packets before policy does, without a check telling of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ahead: Vec<Ahead>,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            default: DefaultVerdict::Deny,
            limit: Limit(Duration::from_secs(5)),
            pins: DEFAULT_DIRECTORY.into(),
            require: Require::Any,
            ahead: Vec::new(),
        }
    }
}

/// What an attachment must offer to be made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Require {
    /// Policy as far as its kind of device allows.
    #[default]
    Any,
    /// At least [`Enforcement::Guarded`]: on a macvlan, a guard on the parent, which only a running owner of the policy state can
    /// put there, before the device is up. Pods that do not say so get none. Needs Linux 6.13.
    Guarded,
    /// [`Enforcement::Full`]: a pod must not be able to pass by its own policy, whatever capabilities it has.
    Full,
}

impl Require {
    const fn is_any(&self) -> bool {
        matches!(self, Self::Any)
    }

    /// Whether that is enough.
    pub const fn is_met_by(self, enforcement: Enforcement) -> bool {
        match self {
            Self::Any => true,
            Self::Guarded => matches!(enforcement, Enforcement::Guarded | Enforcement::Full),
            Self::Full => matches!(enforcement, Enforcement::Full),
        }
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

/// A program of somebody else that the operator knows to let every packet go on, such as a tracer: as text, its tag or its
/// name.
///
/// Neither proves what the program does. A tag is a hash of its instructions with the numbers of its maps left out
/// (kernel/bpf/core.c, `bpf_prog_calc_tag`): a program that reads verdicts or a configuration from maps, calls another by a tail
/// call, or is extended by one (`freplace`), as a dispatcher of XDP programs is, does something else under the same tag. A name
/// says only what its owner called it. So list only programs whose owner is trusted to let packets go on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Ahead {
    /// The hash of its instructions, 16 hexadecimal digits, as `bpftool prog` shows it.
    Tag([u8; 8]),
    /// Its name, or that of its filter. The kernel keeps 15 bytes of a program's name: a longer one here stands also for what
    /// is called by its first 15.
    Name(String),
}

impl Ahead {
    /// Whether it is this one.
    pub fn is(&self, attached: &Attached) -> bool {
        let name = match &attached.owner {
            Owner::Foreign(name) => name.as_deref(),
            _ => None,
        };
        self.names(name, attached.tag)
    }

    /// Whether it is what the kernel calls by this name and tag.
    pub(crate) fn names(&self, name: Option<&str>, tag: Option<[u8; 8]>) -> bool {
        match self {
            Self::Tag(own) => tag == Some(*own),
            Self::Name(own) => {
                name.is_some_and(|other| other == own || other.len() == KERNEL_NAME_BYTES && own.starts_with(other))
            }
        }
    }
}

/// `BPF_OBJ_NAME_LEN` without its zero (include/uapi/linux/bpf.h).
const KERNEL_NAME_BYTES: usize = 15;

impl fmt::Display for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => tag.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// A text that is no [`Ahead`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("program {value:?}: want its tag, 16 hexadecimal digits, or its name")]
pub struct AheadError {
    value: String,
}

impl FromStr for Ahead {
    type Err = AheadError;

    fn from_str(text: &str) -> Result<Self, AheadError> {
        if text.is_empty() || text.contains('\0') {
            return Err(AheadError { value: text.to_owned() });
        }
        let is_tag = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let tag = is_tag.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        Ok(tag.map_or_else(|| Self::Name(text.to_owned()), |tag| Self::Tag(tag.to_be_bytes())))
    }
}

impl Serialize for Ahead {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ahead {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
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
    fn programs_that_are_known_are_tags_or_names() {
        let config: PolicyConfig =
            section::read("policy", &json!({"ahead": ["6deef7357e7b4530", "tracer", "6deef7357e7b453"]})).unwrap();
        let tag = Ahead::Tag([0x6d, 0xee, 0xf7, 0x35, 0x7e, 0x7b, 0x45, 0x30]);
        assert_eq!(config.ahead, [tag, Ahead::Name("tracer".into()), Ahead::Name("6deef7357e7b453".into())]);
        let text = serde_json::to_value(&config).unwrap();
        assert_eq!(text["ahead"], json!(["6deef7357e7b4530", "tracer", "6deef7357e7b453"]));
    }

    #[test]
    fn a_wrong_section_is_refused_with_field_and_remedy() {
        let refusal = |value| section::read::<PolicyConfig>("policy", &value).unwrap_err().to_string();
        assert!(refusal(json!({"awiat": "5s"})).contains("did you mean `await`?"));
        assert!(refusal(json!({"await": "5"})).starts_with("policy.await: duration \"5\": without a unit"));
        assert!(refusal(json!({"await": 5})).starts_with("policy.await"));
        assert!(refusal(json!({"ahead": [""]})).contains("program \"\": want its tag"));
        assert!(refusal(json!({"require": "most"})).starts_with("policy.require: unknown variant"));
        assert!(refusal(json!({"default": "drop"})).starts_with("policy.default: unknown variant"));
    }
}
