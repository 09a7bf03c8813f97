//! What time it is, for rules with schedules.
//!
//! The owner tells its cluster the time whenever that changes which schedules hold, which is a change of policy like any
//! other: programs are replaced, generations bumped, established flows judged anew. It wakes when one is due, and looks at
//! the clock every ten seconds in any case, as somebody may set it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::state::{Shared, State};
use crate::model::Time;

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// The host's clock.
pub(super) fn of_host() -> Clock {
    Arc::new(SystemTime::now)
}

impl Shared {
    /// What time it is.
    pub(super) fn time(&self) -> Time {
        seconds(self.exact_time())
    }

    /// The next whole second.
    pub(super) fn time_up(&self) -> Time {
        let time = self.exact_time();
        let is_whole = time.duration_since(SystemTime::UNIX_EPOCH).map_or(true, |since| since.subsec_nanos() == 0);
        seconds(time).saturating_add(Time::from(!is_whole))
    }

    fn exact_time(&self) -> SystemTime {
        let clock = Arc::clone(&self.clock.lock());
        clock()
    }
}

impl State {
    /// Whether schedules hold otherwise than when the cluster was last told the time.
    pub(super) fn is_late(&self, now: Time) -> bool {
        let mut schedules = self.cluster_ref().catalog.schedules.values();
        match self.cluster_ref().time {
            None => schedules.next().is_some(),
            Some(before) => schedules.any(|schedule| schedule.holds_at(before) != schedule.holds_at(now)),
        }
    }

    /// How long no schedule and no name changes, if something ever does.
    pub(super) fn until_next_change(&self, now: Time) -> Option<Duration> {
        let cluster = self.cluster_ref();
        let names = self.started.then(|| self.learnt.next_end()).flatten();
        let next = [cluster.catalog.next_change(now), names].into_iter().flatten().min()?;
        u64::try_from(next.saturating_sub(now)).ok().map(Duration::from_secs)
    }
}

/// Whole seconds of a time, those before 1970 included.
fn seconds(time: SystemTime) -> Time {
    let whole = |duration: Duration| Time::try_from(duration.as_secs()).unwrap_or(Time::MAX);
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => whole(since),
        Err(before) => -whole(before.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_counted_from_1970_in_both_directions() {
        let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!((seconds(at(0)), seconds(at(86_400))), (0, 86_400));
        assert_eq!(seconds(SystemTime::UNIX_EPOCH - Duration::from_secs(60)), -60);
    }
}
