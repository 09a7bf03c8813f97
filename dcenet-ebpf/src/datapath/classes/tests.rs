use std::collections::HashMap;
use std::net::IpAddr;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::abi::{BLOCK_ENTRIES, MEMBER_USED, PROBES_V6, member_v6_place};

/// What the maps hold, read as the programs do.
struct Maps {
    v4: HashMap<u32, [u32; 2]>,
    v6: HashMap<u32, [u32; 2]>,
    nodes: HashMap<u32, NodeV6>,
    members: HashMap<u32, MemberV6>,
    member_bits: u32,
}

impl Maps {
    fn new(sizes: &Sizes) -> Self {
        Self {
            v4: HashMap::new(),
            v6: HashMap::new(),
            nodes: HashMap::new(),
            members: HashMap::new(),
            member_bits: sizes.members_v6.trailing_zeros(),
        }
    }

    fn store(&mut self, write: &Write) {
        match *write {
            Write::ClassV4 { index, pair } => drop(self.v4.insert(index, pair)),
            Write::ClassV6 { index, pair } => drop(self.v6.insert(index, pair)),
            Write::NodeV6 { index, node } => drop(self.nodes.insert(index, node)),
            Write::MemberV6 { index, member } => drop(self.members.insert(index, member)),
        }
    }

    fn class(&self, address: IpAddr) -> ClassId {
        let entry =
            |map: &HashMap<u32, [u32; 2]>, entry: u32| map.get(&(entry / 2)).map_or(0, |p| p[entry as usize % 2]);
        match address {
            IpAddr::V4(address) => {
                let address = u32::from(address);
                let mut found = entry(&self.v4, address >> 16);
                for shift in [8, 0] {
                    if found & CHILD != 0 {
                        found = entry(&self.v4, (found & !CHILD) * BLOCK_ENTRIES + (address >> shift & 0xff));
                    }
                }
                found
            }
            IpAddr::V6(address) => {
                let address = u128::from(address);
                for probe in 0..PROBES_V6 {
                    let place = (member_v6_place(address, self.member_bits) + probe) & ((1 << self.member_bits) - 1);
                    match self.members.get(&place) {
                        Some(m) if m.tag & MEMBER_USED != 0 && m.address == address.to_be_bytes() => {
                            return m.tag & !MEMBER_USED;
                        }
                        Some(m) if m.tag != 0 => {}
                        _ => break,
                    }
                }
                let node = |number: u32| self.nodes.get(&number).copied().unwrap_or_default();
                let (high, low) = ((address >> 64) as u64, address as u64);
                let mut found = node(0).entry;
                for _ in 0..=16 {
                    if found & CHILD == 0 {
                        return found;
                    }
                    let number = found & !CHILD;
                    let n = node(number);
                    if (high & n.mask_high, low & n.mask_low) != (n.prefix_high, n.prefix_low) {
                        return n.entry;
                    }
                    let half = if n.shift & 64 != 0 { high } else { low };
                    found = entry(&self.v6, number * BLOCK_ENTRIES + (half >> (n.shift & 63) & 0xff) as u32);
                }
                panic!("a trie deeper than an address");
            }
        }
    }
}

fn naive(prefixes: &HashMap<IpNet, ClassId>, address: IpAddr) -> ClassId {
    let covering = prefixes.iter().filter(|(net, _)| net.contains(&address));
    covering.max_by_key(|(net, _)| net.prefix_len()).map_or(0, |(_, class)| *class)
}

fn small() -> Sizes {
    Sizes { blocks_v4: 64, members_v6: 16, blocks_v6: 256, ..Sizes::default() }
}

/// Prefixes that meet each other: few different bytes, all lengths.
fn prefix() -> impl Strategy<Value = IpNet> {
    let byte = prop_oneof![Just(0_u8), Just(1), Just(0x80), Just(0xff)];
    prop_oneof![
        (vec(byte.clone(), 4), 0..=32_u8).prop_map(|(b, length)| {
            let address = u32::from_be_bytes([b[0], b[1], b[2], b[3]]);
            IpNet::new(IpAddr::V4(address.into()), length).unwrap().trunc()
        }),
        (vec(byte, 16), prop_oneof![0..=128_u8, Just(128_u8), Just(64_u8)]).prop_map(|(b, length)| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&b);
            // Most share their beginning.
            bytes[2..12].fill(b[2]);
            IpNet::new(IpAddr::V6(bytes.into()), length).unwrap().trunc()
        }),
    ]
}

/// Addresses at the edges of a prefix.
fn edges(net: IpNet) -> Vec<IpAddr> {
    let (first, last) = (net.network(), net.broadcast());
    let step = |address: IpAddr, up: bool| match address {
        IpAddr::V4(a) => IpAddr::V4(u32::from(a).wrapping_add(if up { 1 } else { u32::MAX }).into()),
        IpAddr::V6(a) => IpAddr::V6(u128::from(a).wrapping_add(if up { 1 } else { u128::MAX }).into()),
    };
    vec![first, last, step(first, false), step(last, true)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn every_step_is_what_a_list_of_prefixes_says(
        changes in vec((prefix(), prop_oneof![3 => (1..200_u32).prop_map(Some), 2 => Just(None)], any::<bool>()), 1..40)
    ) {
        let sizes = small();
        let (mut classes, mut maps) = (Classes::new(&sizes), Maps::new(&sizes));
        let mut prefixes: HashMap<IpNet, ClassId> = HashMap::new();
        let mut all = Vec::new();
        for (net, class, settle) in &changes {
            // Taking out what is there is the more interesting case.
            let net = match (class, prefixes.keys().next()) {
                (None, Some(known)) if *settle => *known,
                _ => *net,
            };
            all.extend(edges(net));
            let before: Vec<ClassId> = all.iter().map(|a| naive(&prefixes, *a)).collect();
            let checked = classes.check(&[(net, *class)]);
            let applied = classes.apply(&[(net, *class)]);
            prop_assert_eq!(&checked, &applied.as_ref().map(drop).map_err(Clone::clone));
            let writes = match applied {
                Ok(writes) => writes,
                Err(ClassError::Full { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            match class {
                Some(class) => drop(prefixes.insert(net, *class)),
                None => drop(prefixes.remove(&net)),
            }
            let after: Vec<ClassId> = all.iter().map(|a| naive(&prefixes, *a)).collect();
            for write in &writes {
                maps.store(write);
                for ((address, before), after) in all.iter().zip(&before).zip(&after) {
                    let now = maps.class(*address);
                    prop_assert!(now == *before || now == *after, "{address} is {now}, was {before}, will be {after}");
                }
            }
            for (address, after) in all.iter().zip(&after) {
                prop_assert_eq!(maps.class(*address), *after, "{}", address);
            }
            if *settle {
                classes.settled();
            }
        }
        // All out again: every block comes back.
        for net in prefixes.keys() {
            classes.settled();
            for write in classes.remove(*net).unwrap() {
                maps.store(&write);
            }
        }
        classes.settled();
        for address in all {
            prop_assert_eq!(maps.class(address), 0);
        }
        prop_assert_eq!(classes.v4.check(&[]), Ok(()));
        prop_assert_eq!(classes.free(), (64, 255));
    }
}

impl Classes {
    fn free(&self) -> (usize, usize) {
        (self.v4.free_blocks(), self.v6.free_blocks())
    }
}

#[test]
fn a_member_that_finds_no_place_goes_to_the_trie() {
    let sizes = small();
    let (mut classes, mut maps) = (Classes::new(&sizes), Maps::new(&sizes));
    let net = |i: u128| IpNet::new(IpAddr::V6((0xfd00_u128 << 112 | i).into()), 128).unwrap();
    for i in 0..100 {
        for write in classes.insert(net(i), i as u32 + 1).unwrap() {
            maps.store(&write);
        }
        classes.settled();
    }
    for i in 0..100 {
        assert_eq!(maps.class(net(i).addr()), i as u32 + 1);
    }
    for i in 0..100 {
        for write in classes.remove(net(i)).unwrap() {
            maps.store(&write);
        }
        classes.settled();
        assert_eq!(maps.class(net(i).addr()), 0);
        assert_eq!(maps.class(net(99).addr()), if i == 99 { 0 } else { 100 });
    }
}

#[test]
fn a_change_that_finds_no_room_changes_nothing() {
    let sizes = Sizes { blocks_v4: 3, blocks_v6: 3, ..small() };
    let mut classes = Classes::new(&sizes);
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    assert!(classes.insert(net("10.0.0.1/32"), 1).is_ok());
    let error = classes.insert(net("10.1.0.1/32"), 1).unwrap_err();
    assert_eq!(error, ClassError::Full { map: abi::CLASS_V4, needed: 2, free: 1 });
    assert!(classes.insert(net("10.0.1.1/32"), 1).is_ok());
    assert!(classes.remove(net("10.0.1.1/32")).is_ok());
    assert!(matches!(classes.insert(net("10.0.2.1/32"), 1), Err(ClassError::Full { .. })), "not settled yet");
    classes.settled();
    assert!(classes.insert(net("10.0.2.1/32"), 1).is_ok());

    assert!(classes.apply(&[(net("fd00::/48"), Some(1)), (net("fd00:0:1::/48"), Some(2))]).is_ok());
    let before = format!("{classes:?}");
    let many: Vec<_> = (1..9).map(|i| (net(&format!("fd0{i}:0:0:{i}::/64")), Some(i))).collect();
    assert!(matches!(classes.check(&many), Err(ClassError::Full { map: abi::CLASS_V6, .. })));
    assert!(matches!(classes.apply(&many), Err(ClassError::Full { map: abi::CLASS_V6, .. })));
    assert_eq!(format!("{classes:?}"), before);
    let error = classes.insert(net("10.0.0.0/8"), 1 << 31).unwrap_err();
    assert_eq!(error, ClassError::Class { prefix: net("10.0.0.0/8"), class: 1 << 31 });
}
