//! The fewest prefixes for a set of addresses.

use ipnet::IpNet;

/// The fewest prefixes that cover the same addresses as those given, and not one address more; IPv4 before IPv6, each in
/// order. Those given may overlap, and may have bits set beyond their length.
pub fn cover(prefixes: impl IntoIterator<Item = IpNet>) -> Vec<IpNet> {
    IpNet::aggregate(&prefixes.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    /// The prefix of the address that is `number` in a universe of 256 at one end of a family's number line.
    fn prefix(universe: u8, number: u8, length: u8) -> IpNet {
        let low = u32::from(number);
        let ip: IpAddr = match universe % 4 {
            0 => Ipv4Addr::from(low).into(),
            1 => Ipv4Addr::from(u32::MAX - 255 + low).into(),
            2 => Ipv6Addr::from(u128::from(low)).into(),
            _ => Ipv6Addr::from(u128::MAX - 255 + u128::from(low)).into(),
        };
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        IpNet::new(ip, bits - length % 9).unwrap()
    }

    /// Which of the addresses of each universe are in a prefix.
    fn numbers(prefixes: &[IpNet]) -> BTreeSet<(u8, u8)> {
        let all = (0..4).flat_map(|universe| (0..=255).map(move |number| (universe, number)));
        all.filter(|(universe, number)| prefixes.iter().any(|p| p.contains(&prefix(*universe, *number, 0).addr())))
            .collect()
    }

    /// How many aligned power-of-two blocks the numbers need at least: a block that is full, else both halves.
    fn fewest(numbers: &BTreeSet<(u8, u8)>, universe: u8, from: u16, size: u16) -> usize {
        let held = (from..from + size).filter(|n| numbers.contains(&(universe, *n as u8))).count();
        match held {
            0 => 0,
            held if held == usize::from(size) => 1,
            _ => {
                let half = size / 2;
                fewest(numbers, universe, from, half) + fewest(numbers, universe, from + half, half)
            }
        }
    }

    proptest! {
        #[test]
        fn a_cover_is_exact_and_has_the_fewest_prefixes(
            given in prop::collection::vec((0..4_u8, any::<u8>(), prop_oneof![3 => Just(0_u8), 1 => 0..9_u8]), 0..80),
        ) {
            let given: Vec<IpNet> = given.into_iter().map(|(u, n, l)| prefix(u, n, l)).collect();
            let covered = cover(given.clone());
            let wanted = numbers(&given);
            prop_assert_eq!(&numbers(&covered), &wanted);
            // Nothing beyond the universes either.
            prop_assert!(covered.iter().all(|p| p.max_prefix_len() - p.prefix_len() <= 8 && p.trunc() == *p));
            let least: usize = (0..4).map(|universe| fewest(&wanted, universe, 0, 256)).sum();
            prop_assert_eq!(covered.len(), least);
            let mut sorted = covered.clone();
            sorted.sort();
            prop_assert_eq!(sorted, covered);
        }
    }

    #[test]
    fn whole_families_are_one_prefix() {
        for (halves, whole) in [(["0.0.0.0/1", "128.0.0.0/1"], "0.0.0.0/0"), (["::/1", "8000::/1"], "::/0")] {
            assert_eq!(cover(halves.map(|half| half.parse().unwrap())), [whole.parse().unwrap()]);
        }
    }
}
