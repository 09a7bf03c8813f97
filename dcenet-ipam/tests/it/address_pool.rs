//! The pool in memory against a map, at the edges of the number line.

use std::collections::BTreeMap;
use std::time::Duration;

use dcenet_ipam::pool::{AddressPool, Ranges, Refused, Use};
use proptest::prelude::*;

const COOLDOWN: u64 = 1_000;
const REMEMBERED: u64 = 5_000;

/// Each with first and last number of its ranges.
fn sets() -> Vec<(&'static str, Vec<(u128, u128)>)> {
    let base = 0xfd00_u128 << 112;
    let around = |offset: u128| (base + offset - 1, base + offset + 1);
    vec![
        ("10.0.0.0/31", vec![]),
        ("10.0.0.7/32", vec![]),
        ("fd00::/127", vec![]),
        ("fd00::1/128", vec![]),
        ("255.255.255.252/30", vec![]),
        ("::ffff:0:0/126", vec![]),
        ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126", vec![]),
        ("0.0.0.0/0", vec![]),
        ("fd00::/64", vec![]),
        ("::/0", vec![]),
        ("2^63 and 2^64, one less and one more", vec![around(1 << 63), around(1 << 64)]),
        (
            "the ends of chunks",
            vec![((1 << 18) - 2, (1 << 18) + 1), (3 << 18, 3 << 18), ((5 << 18) - 1, (5 << 18) - 1)],
        ),
        ("both ends", vec![(0, 1), (u128::MAX - 1, u128::MAX)]),
    ]
}

fn ranges_of((text, ranges): &(&str, Vec<(u128, u128)>)) -> Vec<(u128, u128)> {
    if !ranges.is_empty() {
        return ranges.clone();
    }
    // By another way than the pool: first and last as the library of prefixes has them.
    let number = |ip: std::net::IpAddr| match ip {
        std::net::IpAddr::V4(ip) => u128::from(u32::from(ip)),
        std::net::IpAddr::V6(ip) => ip.into(),
    };
    let prefix: ipnet::IpNet = text.parse().unwrap();
    vec![(number(prefix.network()), number(prefix.broadcast()))]
}

fn pool_of(set: &(&str, Vec<(u128, u128)>)) -> AddressPool {
    let cooldown = Duration::from_millis(COOLDOWN);
    match set.0.parse::<ipnet::IpNet>() {
        Ok(prefix) => AddressPool::new(prefix, cooldown),
        Err(_) => AddressPool::new(Ranges::new(set.1.clone()), cooldown),
    }
}

#[derive(Debug, Clone)]
enum Action {
    Allocate(u8),
    Exact(u8, usize),
    Within(usize, usize),
    Free(usize),
    FreeStale(usize),
    Wait(u64),
    ForgetOld,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => (0..5_u8).prop_map(Action::Allocate),
        3 => (0..5_u8, 0..64_usize).prop_map(|(owner, at)| Action::Exact(owner, at)),
        2 => (0..64_usize, 0..64_usize).prop_map(|(a, b)| Action::Within(a, b)),
        5 => (0..64_usize).prop_map(Action::Free),
        1 => (0..64_usize).prop_map(Action::FreeStale),
        2 => prop_oneof![Just(1), Just(COOLDOWN - 1), Just(COOLDOWN), Just(REMEMBERED + 1)].prop_map(Action::Wait),
        1 => Just(Action::ForgetOld),
    ]
}

/// A map, a list, and walks.
#[derive(Default)]
struct Oracle {
    bound: BTreeMap<u128, (String, u64)>,
    released: Vec<(u128, u64)>,
}

impl Oracle {
    fn lowest(&self, ranges: &[(u128, u128)], first: u128, last: u128) -> Option<u128> {
        for &(low, high) in ranges {
            let (low, high) = (low.max(first), high.min(last));
            let mut candidate = low;
            while candidate <= high {
                if !self.bound.contains_key(&candidate) && !self.released.iter().any(|(a, _)| *a == candidate) {
                    return Some(candidate);
                }
                match candidate.checked_add(1) {
                    Some(next) => candidate = next,
                    None => break,
                }
            }
        }
        None
    }

    fn next(&self, ranges: &[(u128, u128)], now: u64) -> Option<u128> {
        self.lowest(ranges, 0, u128::MAX).or_else(|| {
            let (address, at) = self.released.first()?;
            (now.abs_diff(*at) >= COOLDOWN).then_some(*address)
        })
    }

    fn take(&mut self, address: u128, owner: &str, sequence: u64) {
        self.released.retain(|(a, _)| *a != address);
        assert_eq!(self.bound.insert(address, (owner.to_owned(), sequence)), None, "given twice");
    }
}

/// Addresses where something could go wrong: those around the ends of the ranges, some outside.
fn places(ranges: &[(u128, u128)]) -> Vec<u128> {
    let mut all: Vec<u128> = ranges
        .iter()
        .flat_map(|(low, high)| [*low, *high, low.wrapping_add(*high - low) / 2 + low / 2])
        .flat_map(|n| [n, n.wrapping_add(1), n.wrapping_sub(1), n ^ 1 << 18, n ^ 1 << 63, n ^ 1 << 64])
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn a_pool_agrees_with_a_map(set in 0..sets().len(), actions in prop::collection::vec(action(), 1..90)) {
        let set = &sets()[set];
        let ranges = ranges_of(set);
        let places = places(&ranges);
        let (mut pool, mut oracle, mut now, mut sequences) = (pool_of(set), Oracle::default(), 50_000, Vec::new());
        for action in actions {
            match action {
                Action::Allocate(owner) => {
                    let (owner, expected) = (format!("o{owner}"), oracle.next(&ranges, now));
                    prop_assert_eq!(pool.is_full(now), expected.is_none());
                    match pool.allocate(&owner, now) {
                        Ok(given) => {
                            prop_assert_eq!(Some(given.address), expected);
                            oracle.take(given.address, &owner, given.sequence);
                            sequences.push(given.sequence);
                        }
                        Err(full) => {
                            prop_assert_eq!(expected, None);
                            prop_assert_eq!(full.free_at, oracle.released.first().map(|(_, at)| at + COOLDOWN));
                        }
                    }
                }
                Action::Exact(owner, at) => {
                    let (owner, address) = (format!("o{owner}"), places[at % places.len()]);
                    let inside = ranges.iter().any(|(low, high)| (*low..=*high).contains(&address));
                    let cools = oracle.released.iter().find(|(a, at)| *a == address && now.abs_diff(*at) < COOLDOWN);
                    match pool.allocate_exact(address, &owner, now) {
                        Err(Refused::Outside) => prop_assert!(!inside),
                        Err(Refused::Held { owner }) => prop_assert_eq!(&owner, &oracle.bound[&address].0),
                        Err(Refused::Cooling { free_at }) => {
                            prop_assert_eq!(Some(free_at), cools.map(|(_, at)| at + COOLDOWN));
                        }
                        Err(other) => prop_assert!(false, "{other:?}"),
                        Ok(given) => {
                            prop_assert!(inside && cools.is_none() && given.address == address);
                            oracle.take(address, &owner, given.sequence);
                            sequences.push(given.sequence);
                        }
                    }
                }
                Action::Within(a, b) => {
                    let (a, b) = (places[a % places.len()], places[b % places.len()]);
                    let given = pool.allocate_within(a.min(b), a.max(b), "rival", now);
                    prop_assert_eq!(given.map(|g| g.address), oracle.lowest(&ranges, a.min(b), a.max(b)));
                    if let Some(given) = given {
                        oracle.take(given.address, "rival", given.sequence);
                        sequences.push(given.sequence);
                    }
                }
                Action::Free(at) => {
                    if let Some((&address, (_, sequence))) = oracle.bound.iter().nth(at % oracle.bound.len().max(1)) {
                        prop_assert!(!pool.free(address, sequence + 1, now));
                        prop_assert!(pool.free(address, *sequence, now));
                        prop_assert!(!pool.free(address, *sequence, now));
                        oracle.bound.remove(&address);
                        oracle.released.push((address, now));
                    }
                }
                Action::FreeStale(at) => {
                    prop_assert!(!pool.free(places[at % places.len()], u64::MAX, now));
                }
                Action::Wait(ms) => now += ms,
                Action::ForgetOld => {
                    pool.forget_released(Duration::from_millis(REMEMBERED), now);
                    for _ in 0..2 {
                        if oracle.released.first().is_some_and(|(_, at)| now - at > REMEMBERED) {
                            oracle.released.remove(0);
                        }
                    }
                }
            }
            prop_assert_eq!(pool.bound(), oracle.bound.len() as u64);
            prop_assert_eq!(pool.resting(), oracle.released.len());
            for place in &places {
                let seen = match pool.usage(*place) {
                    Some(Use::Bound { owner, sequence, .. }) => Some(Ok((owner.to_owned(), sequence))),
                    Some(Use::Released { at, .. }) => Some(Err(at)),
                    None => None,
                };
                let held = oracle.bound.get(place).cloned().map(Ok);
                let rests = || oracle.released.iter().find(|(a, _)| a == place).map(|(_, at)| Err(*at));
                prop_assert_eq!(seen, held.or_else(rests));
            }
        }
        let given = sequences.len();
        sequences.sort_unstable();
        sequences.dedup();
        prop_assert_eq!(sequences.len(), given, "a sequence was given twice");
    }
}

#[test]
fn the_oracle_sees_a_pool_that_gives_an_address_twice() {
    let mut oracle = Oracle::default();
    oracle.take(5, "one", 1);
    let again = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| oracle.take(5, "two", 2)));
    assert!(again.is_err());
}

#[test]
fn chunks_that_are_full_are_stepped_over_and_found_again() {
    let last = 3 * (1 << 18) + 7;
    let mut pool = AddressPool::new(Ranges::new([(100, last)]), Duration::ZERO);
    let mut sequence_of = BTreeMap::new();
    for address in 100..=last {
        let given = pool.allocate("one", 0).unwrap();
        assert_eq!(given.address, address);
        sequence_of.insert(address, given.sequence);
    }
    assert!(pool.is_full(0) && pool.allocate("one", 0).unwrap_err().free_at.is_none());
    for address in [(1 << 18) + 5, 100, last] {
        assert!(pool.free(address, sequence_of[&address], 1));
    }
    // In the order of release, not of number.
    for address in [(1 << 18) + 5, 100, last] {
        assert_eq!(pool.allocate("two", 1).unwrap().address, address);
    }
    assert!(pool.is_full(1));
    // Forgotten, they are as if never used: the lowest comes first.
    for address in [last, (2 << 18) - 1] {
        pool.forget(address);
    }
    assert_eq!(pool.allocate("three", 2).unwrap().address, (2 << 18) - 1);
    assert_eq!(pool.allocate("three", 2).unwrap().address, last);
    assert_eq!(pool.bound(), u64::try_from(last - 99).unwrap());
}

#[test]
fn what_is_taken_and_released_over_and_over_leaves_no_growing_queue() {
    let mut pool = AddressPool::new(Ranges::new([(0, 1 << 20)]), Duration::ZERO);
    for n in 0..100_000_u64 {
        let given = pool.allocate_exact(7, &format!("owner-{n}"), n).unwrap();
        assert!(pool.free(7, given.sequence, n));
    }
    assert_eq!((pool.bound(), pool.resting()), (0, 1));
    assert_eq!(pool.next_released(100_000).map(|(address, ..)| address), Some(7));
    // What Debug shows is what there is: queue and names do not grow with what is past.
    assert!(format!("{pool:?}").len() < 20_000, "{} bytes", format!("{pool:?}").len());
}
