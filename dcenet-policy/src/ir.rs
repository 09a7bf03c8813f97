//! The compiler's intermediate form: one first-match list of entries per policy set and direction.
//!
//! An entry matches on the peer's *local id* (see [`classes`](crate::classes)), on protocol, and on an interval of
//! ports (of `type * 256 + code` for ICMP). Everything that depended on names, labels or addresses is resolved.
//!
//! Where policies in audit govern the endpoints, a second list says what would be if they were in force: after a line
//! `audit`, without a first line of its own.
//!
//! The text form, one entry a line, prints and parses back:
//!
//! ```
//! use dcenet_policy::ir::RuleList;
//!
//! let text = "\
//! ingress locals 4
//! allow 7 peers 1-2 tcp 80-443
//! deny 9 peers * any
//! deny 1 default
//! ";
//! let list: RuleList = text.parse().unwrap();
//! assert_eq!(list.entries.len(), 2);
//! assert_eq!(list.to_string(), text);
//! ```

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::model::{Direction, Protocol, Verdict};

/// Names the rule that decided; the [`RuleTable`](crate::compiler::RuleTable) has its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RuleId(pub u32);

impl RuleId {
    /// No policy governs the endpoint in this direction.
    pub const NOT_GOVERNED: Self = Self(0);
    /// Policies isolate the endpoint, and no rule matches.
    pub const ISOLATED: Self = Self(1);
    /// The peer is the endpoint's own node.
    pub const OWN_NODE: Self = Self(2);
    /// A policy that governs the endpoint cannot be enforced, and no other allows it.
    pub const REFUSED: Self = Self(3);
    /// Policies govern the endpoint, none of them isolates it, and no rule of theirs matches.
    pub const UNMATCHED: Self = Self(4);
    /// A tier with policies that govern the endpoint denies what no rule decides, or there is no such tier.
    pub const TIER_END: Self = Self(5);
    /// The first id that names a rule of a policy.
    pub const FIRST: Self = Self(6);
}

/// What a packet ends at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Leaf {
    /// The verdict.
    pub verdict: Verdict,
    /// The rule that decided.
    pub rule: RuleId,
}

/// Local ids, as disjoint closed intervals in ascending order that do not touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct LocalSet(Vec<(u16, u16)>);

impl LocalSet {
    /// All ids below `count`.
    pub fn below(count: u32) -> Self {
        match count.checked_sub(1) {
            None => Self::default(),
            Some(last) => Self(vec![(0, u16::try_from(last).unwrap_or(u16::MAX))]),
        }
    }

    /// The intervals.
    pub fn intervals(&self) -> &[(u16, u16)] {
        &self.0
    }

    /// Each id in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        self.0.iter().flat_map(|(first, last)| *first..=*last)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<u16> for LocalSet {
    /// Takes ids in any order.
    fn from_iter<I: IntoIterator<Item = u16>>(ids: I) -> Self {
        let mut ids: Vec<_> = ids.into_iter().collect();
        ids.sort_unstable();
        let mut intervals: Vec<(u16, u16)> = Vec::new();
        for id in ids {
            match intervals.last_mut() {
                Some((_, last)) if u32::from(id) <= u32::from(*last) + 1 => *last = id,
                _ => intervals.push((id, id)),
            }
        }
        Self(intervals)
    }
}

/// Which services an entry matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    /// Every protocol and port.
    Any,
    /// One protocol, and ports `first` to `last`, both included.
    Ports {
        /// The protocol.
        protocol: Protocol,
        /// First port.
        first: u16,
        /// Last port.
        last: u16,
    },
}

impl Service {
    /// What both hold; none where there is nothing.
    pub fn and(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Any, service) | (service, Self::Any) => Some(service),
            (Self::Ports { protocol, first, last }, Self::Ports { protocol: wanted, first: from, last: until }) => {
                let (first, last) = (first.max(from), last.min(until));
                (protocol == wanted && first <= last).then_some(Self::Ports { protocol, first, last })
            }
        }
    }

    /// All of one protocol.
    pub const fn all_of(protocol: Protocol) -> Self {
        Self::Ports { protocol, first: 0, last: u16::MAX }
    }
}

/// One entry: where peer and service match, and no entry before did, the leaf is the answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The peers' local ids.
    pub locals: LocalSet,
    /// The services.
    pub service: Service,
    /// The answer.
    pub leaf: Leaf,
}

/// The entries of one policy set and direction.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RuleList {
    /// The direction.
    pub direction: Direction,
    /// How many local ids there are; 0, the peer that matches nothing, is always one of them.
    pub locals: u32,
    /// The entries, first match first.
    pub entries: Vec<Entry>,
    /// The answer where no entry matches.
    pub default: Leaf,
    /// What would be the list if policies in audit were in force, of the same direction and local ids; none where there is
    /// no such policy. It has no such list itself.
    pub audit: Option<Box<RuleList>>,
}

impl fmt::Display for LocalSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Ports { protocol, first: 0, last: u16::MAX } => write!(f, "{protocol} *"),
            Self::Ports { protocol, first, last } => write!(f, "{protocol} {first}-{last}"),
        }
    }
}

impl fmt::Display for RuleList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} locals {}", self.direction, self.locals)?;
        self.fmt_entries(f)?;
        if let Some(audit) = &self.audit {
            f.write_str("audit\n")?;
            audit.fmt_entries(f)?;
        }
        Ok(())
    }
}

impl RuleList {
    fn fmt_entries(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { direction: _, locals, entries, default, audit: _ } = self;
        let all = LocalSet::below(*locals);
        for Entry { locals, service, leaf } in entries {
            write!(f, "{} {} peers ", leaf.verdict, leaf.rule.0)?;
            if *locals == all {
                f.write_str("*")?;
            } else {
                write!(f, "{locals}")?;
            }
            writeln!(f, " {service}")?;
        }
        writeln!(f, "{} {} default", default.verdict, default.rule.0)
    }
}

/// A text that is no [`RuleList`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {text:?}: {reason}")]
pub struct ParseIrError {
    /// The line, from 1.
    pub line: usize,
    /// What it says.
    pub text: String,
    /// What was expected.
    pub reason: &'static str,
}

impl FromStr for RuleList {
    type Err = ParseIrError;

    fn from_str(text: &str) -> Result<Self, ParseIrError> {
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let (number, header) = lines.next().unwrap_or((0, ""));
        let fail = |number: usize, line: &str, reason| ParseIrError { line: number + 1, text: line.to_owned(), reason };
        let words: Vec<_> = header.split_whitespace().collect();
        let (direction, locals) = match words[..] {
            ["ingress", "locals", count] => (Direction::Ingress, count.parse().ok()),
            ["egress", "locals", count] => (Direction::Egress, count.parse().ok()),
            _ => return Err(fail(number, header, "must be `ingress locals N` or `egress locals N`")),
        };
        let locals: u32 = locals.ok_or_else(|| fail(number, header, "the count must be a number"))?;

        let mut entries = Vec::new();
        let mut default = None;
        let mut in_force = None;
        for (number, line) in lines {
            if let Some(leaf) = default {
                if in_force.is_some() || line.trim() != "audit" {
                    return Err(fail(number, line, "nothing may follow the default but `audit`, once"));
                }
                in_force = Some((std::mem::take(&mut entries), leaf));
                default = None;
                continue;
            }
            let words: Vec<_> = line.split_whitespace().collect();
            let [verdict, rule, rest @ ..] = &words[..] else {
                return Err(fail(number, line, "must start with a verdict and a rule id"));
            };
            let leaf = leaf(verdict, rule).ok_or_else(|| fail(number, line, "must be `allow ID` or `deny ID`"))?;
            match rest {
                ["default"] => default = Some(leaf),
                ["peers", peers, service @ ..] => {
                    let peers = if *peers == "*" { Some(LocalSet::below(locals)) } else { local_set(peers) };
                    entries.push(Entry {
                        locals: peers.ok_or_else(|| fail(number, line, "peers must be * or like 1-2,4"))?,
                        service: parse_service(service)
                            .ok_or_else(|| fail(number, line, "the service must be `any`, `tcp *` or `tcp 1-2`"))?,
                        leaf,
                    });
                }
                _ => return Err(fail(number, line, "must go on with `peers` or `default`")),
            }
        }
        let default = default.ok_or_else(|| fail(number, header, "the list must end with a default"))?;
        let list = Self { direction, locals, entries, default, audit: None };
        Ok(match in_force {
            Some((entries, default)) => Self { entries, default, audit: Some(Box::new(list.clone())), ..list },
            None => list,
        })
    }
}

fn leaf(verdict: &str, rule: &str) -> Option<Leaf> {
    let verdict = match verdict {
        "allow" => Verdict::Allow,
        "deny" => Verdict::Deny,
        _ => return None,
    };
    Some(Leaf { verdict, rule: RuleId(rule.parse().ok()?) })
}

/// Keeps the intervals as written, so that the verifier is the judge of them.
fn local_set(text: &str) -> Option<LocalSet> {
    text.split(',').map(interval).collect::<Option<_>>().map(LocalSet)
}

fn interval(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some((first.parse().ok()?, last.parse().ok()?))
}

fn parse_service(words: &[&str]) -> Option<Service> {
    match words {
        ["any"] => Some(Service::Any),
        [protocol, ports] => {
            let protocol = Protocol::parse(protocol)?;
            if *ports == "*" {
                return Some(Service::all_of(protocol));
            }
            let (first, last) = interval(ports)?;
            Some(Service::Ports { protocol, first, last })
        }
        _ => None,
    }
}
