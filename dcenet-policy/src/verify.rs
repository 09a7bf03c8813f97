//! Checks a [`RuleList`] between passes. In debug builds and tests it runs after every pass.
//!
//! The invariants:
//!
//! 1. There are 1 to 65,535 local ids, for 0 is the peer that matches nothing.
//! 2. An entry names at least one local id, in ascending intervals that neither overlap nor touch, all below the
//!    count.
//! 3. A port interval has `first <= last`; a protocol without ports has the whole interval.
//! 4. A rule id has one verdict, wherever it stands.
//! 5. The ids without a rule stand where they belong: [`RuleId::NOT_GOVERNED`] as the default only, allowing;
//!    [`RuleId::OWN_NODE`] allows and is never the default; [`RuleId::UNMATCHED`] allows; [`RuleId::ISOLATED`] and
//!    [`RuleId::REFUSED`] deny.
//! 6. A list whose default is [`RuleId::NOT_GOVERNED`] has no entries.
//! 7. The list of what would be with policies in audit is of the same direction and local ids, keeps all these
//!    invariants, and has no such list itself.

use std::collections::HashMap;

use crate::ir::{Entry, RuleId, RuleList, Service};
use crate::model::Verdict;

/// A broken invariant: a defect of the compiler, not of its input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invariant {invariant} broken by {place}: {what}")]
pub struct VerifyError {
    /// The invariant's number in the module's list.
    pub invariant: u8,
    /// `entry N` or `list`.
    pub place: String,
    /// What is wrong.
    pub what: String,
}

/// Checks all invariants.
///
/// # Errors
///
/// The first that is broken.
pub fn verify(list: &RuleList) -> Result<(), VerifyError> {
    let RuleList { direction, locals, entries, default, audit } = list;
    let broken = |invariant, place: &str, what: String| VerifyError { invariant, place: place.to_owned(), what };
    if !(1..=65_535).contains(locals) {
        return Err(broken(1, "list", format!("{locals} local ids")));
    }
    let mut verdicts: HashMap<RuleId, Verdict> = HashMap::new();
    for (index, Entry { locals: ids, service, leaf }) in entries.iter().enumerate() {
        let place = format!("entry {index}");
        let mut next = 0_u32;
        for (first, last) in ids.intervals() {
            if first > last || u32::from(*first) < next || u32::from(*last) >= *locals {
                return Err(broken(2, &place, format!("interval {first}-{last} of {ids}, {locals} ids")));
            }
            next = u32::from(*last) + 2;
        }
        if ids.is_empty() {
            return Err(broken(2, &place, "no local id".to_owned()));
        }
        if let Service::Ports { protocol, first, last } = service
            && (first > last || !protocol.has_ports() && (*first, *last) != (0, u16::MAX))
        {
            return Err(broken(3, &place, format!("service {service}")));
        }
        if *verdicts.entry(leaf.rule).or_insert(leaf.verdict) != leaf.verdict {
            return Err(broken(4, &place, format!("rule {} has two verdicts", leaf.rule.0)));
        }
        let misplaced = match leaf.rule {
            RuleId::NOT_GOVERNED => true,
            RuleId::OWN_NODE | RuleId::UNMATCHED => leaf.verdict == Verdict::Deny,
            RuleId::ISOLATED | RuleId::REFUSED => leaf.verdict == Verdict::Allow,
            _ => false,
        };
        if misplaced {
            return Err(broken(5, &place, format!("{} by rule {}", leaf.verdict, leaf.rule.0)));
        }
    }
    let default_ok = match default.rule {
        RuleId::NOT_GOVERNED | RuleId::UNMATCHED => default.verdict == Verdict::Allow,
        RuleId::ISOLATED | RuleId::REFUSED => default.verdict == Verdict::Deny,
        RuleId::OWN_NODE => false,
        rule => verdicts.get(&rule).is_none_or(|verdict| *verdict == default.verdict),
    };
    if !default_ok {
        return Err(broken(5, "list", format!("default {} by rule {}", default.verdict, default.rule.0)));
    }
    if default.rule == RuleId::NOT_GOVERNED && !entries.is_empty() {
        return Err(broken(6, "list", format!("{} entries", entries.len())));
    }
    if let Some(audit) = audit {
        if audit.direction != *direction || audit.locals != *locals || audit.audit.is_some() {
            return Err(broken(7, "audit", format!("{} locals {}", audit.direction, audit.locals)));
        }
        verify(audit).map_err(|error| VerifyError { place: format!("audit: {}", error.place), ..error })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken_by(text: &str) -> Option<u8> {
        verify(&text.parse().unwrap()).err().map(|error| error.invariant)
    }

    #[test]
    fn every_invariant_is_checked() {
        let one = |entry: &str| broken_by(&format!("ingress locals 4\n{entry}\ndeny 1 default"));
        assert_eq!(one("allow 5 peers 0-1,3 tcp 80-80"), None);
        assert_eq!(one("allow 2 peers 1 any"), None);
        assert_eq!(broken_by("ingress locals 0\ndeny 1 default"), Some(1));
        assert_eq!(broken_by("ingress locals 65536\ndeny 1 default"), Some(1));
        assert_eq!(one("allow 5 peers 4 any"), Some(2));
        assert_eq!(one("allow 5 peers 2,1 any"), Some(2));
        assert_eq!(one("allow 5 peers 1,2 any"), Some(2));
        assert_eq!(one("allow 5 peers 2-1 any"), Some(2));
        assert_eq!(one("allow 5 peers 1 tcp 81-80"), Some(3));
        assert_eq!(one("allow 5 peers 1 47 1-2"), Some(3));
        assert_eq!(one("allow 5 peers 1 47 *"), None);
        assert_eq!(one("allow 5 peers 1 any\ndeny 5 peers 2 any"), Some(4));
        assert_eq!(one("allow 0 peers 1 any"), Some(5));
        assert_eq!(one("allow 1 peers 1 any"), Some(5));
        assert_eq!(one("deny 1 peers 1 any"), None);
        assert_eq!(one("deny 4 peers 1 any"), Some(5));
        assert_eq!(one("allow 4 peers 1 any"), None);
        assert_eq!(broken_by("ingress locals 1\ndeny 4 default"), Some(5));
        assert_eq!(broken_by("ingress locals 1\nallow 5 peers 0 any\nallow 4 default"), None);
        assert_eq!(one("deny 2 peers 1 any"), Some(5));
        assert_eq!(one("allow 3 peers 1 any"), Some(5));
        assert_eq!(one("deny 3 peers 1 any"), None);
        assert_eq!(broken_by("ingress locals 1\nallow 3 default"), Some(5));
        assert_eq!(broken_by("ingress locals 1\ndeny 3 default"), None);
        assert_eq!(broken_by("ingress locals 1\nallow 1 default"), Some(5));
        assert_eq!(broken_by("ingress locals 1\nallow 5 peers 0 any\nallow 0 default"), Some(6));
        assert_eq!(broken_by("ingress locals 1\nallow 0 default\naudit\ndeny 5 peers 0 any\ndeny 1 default"), None);
        assert_eq!(broken_by("ingress locals 1\nallow 0 default\naudit\nallow 1 default"), Some(5));
        let mut nested: RuleList = "ingress locals 1\nallow 0 default".parse().unwrap();
        nested.audit = Some(Box::new(RuleList { locals: 2, ..nested.clone() }));
        assert_eq!(verify(&nested).unwrap_err().invariant, 7);
    }
}
