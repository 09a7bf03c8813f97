//! When rules hold.

use std::fmt;

use serde::Serialize;

/// Seconds since 1970-01-01T00:00:00Z without leap seconds (POSIX.1-2024, XBD 4.19).
pub type Time = i64;

/// Times of the week, in the local time of a fixed distance from UTC. A zone whose distance changes, as for daylight saving,
/// cannot be said: what begins at 08:00 in one half of the year begins at 08:00 of the same distance in the other.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Schedule {
    /// Minutes by which local time is ahead of UTC, -1439 to 1439.
    pub offset: i16,
    /// It holds in each of these; never where there is none.
    pub windows: Vec<Window>,
}

/// A time of some days.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Window {
    /// The days on which it begins, Monday being the lowest bit.
    pub days: u8,
    /// The minute of the day with which it begins, 0 to 1439.
    pub from: u16,
    /// The minute with which it is over, 1 to 1440; where it is not after the first, it is one of the next day.
    pub until: u16,
}

impl Schedule {
    /// Whether it holds.
    pub fn holds_at(&self, time: Time) -> bool {
        let (day, minute) = self.local(time);
        self.windows.iter().any(|window| window.holds(day, minute))
    }

    /// When it next begins or ceases to hold; `None` where it never does.
    pub fn next_change(&self, time: Time) -> Option<Time> {
        let now = self.holds_at(time);
        let today = time.saturating_sub(time.saturating_add(self.ahead()).rem_euclid(DAY));
        let after = |days: i64, minute: i64| today.saturating_add(days * DAY).saturating_add(minute * 60);
        // What ends tomorrow may have begun yesterday; after a week all of it comes again.
        let mut edges: Vec<Time> = (0..=8)
            .flat_map(|days| {
                let of_window = |window: &Window| [i64::from(window.from), i64::from(window.until)];
                self.windows.iter().flat_map(of_window).map(move |minute| after(days, minute))
            })
            .filter(|edge| *edge > time)
            .collect();
        edges.sort_unstable();
        edges.into_iter().find(|edge| self.holds_at(*edge) != now)
    }

    fn ahead(&self) -> i64 {
        i64::from(self.offset) * 60
    }

    /// The day of the week, Monday being 0, and the minute of the day.
    fn local(&self, time: Time) -> (i64, u16) {
        let local = time.saturating_add(self.ahead());
        // 1970-01-01 was a Thursday.
        let day = (local.div_euclid(DAY) + 3).rem_euclid(7);
        (day, (local.rem_euclid(DAY) / 60) as u16)
    }
}

impl Window {
    fn holds(&self, day: i64, minute: u16) -> bool {
        let Self { days, from, until } = *self;
        let begins_on = |day: i64| days & (1 << day.rem_euclid(7)) != 0;
        if from < until {
            begins_on(day) && from <= minute && minute < until
        } else {
            begins_on(day) && from <= minute || begins_on(day - 1) && minute < until
        }
    }
}

/// As in objects: `mon,tue 08:00-18:00 +01:00`.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clock = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
        for window in &self.windows {
            let named = DAYS.iter().zip(0..).filter(|(_, bit)| window.days & (1 << bit) != 0).map(|(name, _)| *name);
            let days: Vec<&str> = named.collect();
            write!(f, "{} {}-{}, ", days.join(","), clock(window.from), clock(window.until))?;
        }
        let sign = if self.offset < 0 { '-' } else { '+' };
        write!(f, "{sign}{}", clock(self.offset.unsigned_abs()))
    }
}

/// How days are called, Monday first.
pub(crate) const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
/// Of a day.
pub(crate) const MINUTES: u16 = 1440;
const DAY: i64 = 86_400;

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-23, a Monday, 00:00 UTC.
    const MONDAY: Time = 1_795_392_000;

    fn at(day: i64, hour: i64, minute: i64) -> Time {
        MONDAY + day * DAY + hour * 3600 + minute * 60
    }

    fn schedule(offset: i16, windows: &[(u8, u16, u16)]) -> Schedule {
        let windows = windows.iter().map(|(days, from, until)| Window { days: *days, from: *from, until: *until });
        Schedule { offset, windows: windows.collect() }
    }

    #[test]
    fn office_hours_hold_on_their_days_and_in_their_zone() {
        let office = schedule(0, &[(0b001_1111, 480, 1080)]);
        let held: Vec<bool> =
            [at(0, 7, 59), at(0, 8, 0), at(0, 17, 59) + 59, at(0, 18, 0), at(4, 12, 0), at(5, 12, 0), at(6, 12, 0)]
                .map(|time| office.holds_at(time))
                .into();
        assert_eq!(held, [false, true, true, false, true, false, false]);
        assert_eq!(office.next_change(at(0, 7, 59)), Some(at(0, 8, 0)));
        assert_eq!(office.next_change(at(0, 8, 0)), Some(at(0, 18, 0)));
        assert_eq!(office.next_change(at(4, 18, 0)), Some(at(7, 8, 0)), "over the week's end");
        let ahead = Schedule { offset: 330, ..office.clone() };
        assert!(!ahead.holds_at(at(0, 2, 29)) && ahead.holds_at(at(0, 2, 30)) && !ahead.holds_at(at(0, 12, 30)));
        assert!(!Schedule { offset: -480, ..office }.holds_at(at(0, 15, 59)));
        assert_eq!(ahead.next_change(at(0, 0, 0)), Some(at(0, 2, 30)));
        assert_eq!(ahead.to_string(), "mon,tue,wed,thu,fri 08:00-18:00, +05:30");
    }

    #[test]
    fn a_night_goes_on_into_the_next_day_and_the_next_week() {
        // Begins on Sundays.
        let night = schedule(0, &[(0b100_0000, 1320, 360)]);
        assert!(night.holds_at(at(-1, 22, 0)) && night.holds_at(at(0, 5, 59)) && night.holds_at(at(6, 23, 0)));
        assert!(!night.holds_at(at(0, 6, 0)) && !night.holds_at(at(0, 22, 0)) && !night.holds_at(at(6, 5, 0)));
        assert_eq!(night.next_change(at(0, 0, 0)), Some(at(0, 6, 0)));
        let always = schedule(0, &[(0b111_1111, 0, 720), (0b111_1111, 720, 1440)]);
        assert!(always.holds_at(at(0, 12, 0)) && always.holds_at(at(3, 0, 0)));
        assert_eq!((always.next_change(at(0, 3, 0)), schedule(0, &[]).next_change(0)), (None, None));
        let whole_day = schedule(0, &[(0b000_0001, 0, 1440)]);
        assert_eq!(whole_day.next_change(at(0, 3, 0)), Some(at(1, 0, 0)));
        assert_eq!(whole_day.next_change(at(1, 3, 0)), Some(at(7, 0, 0)));
    }

    #[test]
    fn the_next_change_is_that_of_asking_each_minute() {
        let mut rng = dcenet_core::test_support::Rng::new(7);
        for _ in 0..150 {
            let windows: Vec<(u8, u16, u16)> = (0..rng.below(4))
                .map(|_| (rng.below(128) as u8, rng.below(48) as u16 * 30, 30 + rng.below(48) as u16 * 30))
                .collect();
            let schedule = schedule(rng.below(49) as i16 * 30 - 720, &windows);
            let time = MONDAY + rng.below(7 * 1440) as i64 * 60;
            let now = schedule.holds_at(time);
            let minutes = (1..=8 * 1440).map(|minute| time + minute * 60);
            let asked = minutes.into_iter().find(|minute| schedule.holds_at(*minute) != now);
            assert_eq!(schedule.next_change(time), asked, "{schedule} at {time}");
        }
    }
}
