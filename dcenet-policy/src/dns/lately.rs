//! What the log was told of lately.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::model::DomainName;

/// Names of which the log was told within a minute, so that no client fills it.
#[derive(Debug, Default)]
pub(super) struct Lately(Mutex<HashMap<DomainName, Instant>>);

impl Lately {
    /// Whether the log is to be told of a name now.
    pub(super) fn is_news(&self, name: &DomainName, now: Instant) -> bool {
        let mut told = self.0.lock();
        told.retain(|_, at| now.saturating_duration_since(*at) < AGAIN);
        if told.contains_key(name) || told.len() >= MOST_NAMES {
            return false;
        }
        told.insert(name.clone(), now);
        true
    }
}

/// After this time a name is told of once more.
const AGAIN: Duration = Duration::from_secs(60);

/// Names in that time.
const MOST_NAMES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_told_of_once_in_a_minute_and_of_many_some() {
        let (lately, now) = (Lately::default(), Instant::now());
        let name = |n: usize| -> DomainName { format!("n{n}.example.com").parse().unwrap() };
        assert!(lately.is_news(&name(0), now) && !lately.is_news(&name(0), now));
        assert_eq!((0..1000).filter(|n| lately.is_news(&name(*n), now)).count(), MOST_NAMES - 1);
        let later = now + AGAIN;
        assert!(lately.is_news(&name(0), later) && lately.is_news(&name(999), later));
    }
}
