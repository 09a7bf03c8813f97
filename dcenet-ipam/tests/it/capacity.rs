//! What is published for a scheduler is how many more leases succeed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dcenet_core::model::LabelSet;
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Ipam;
use dcenet_ipam::capacity::{Capacity, CapacityFeed, PoolCapacity};
use dcenet_ipam::model::{AddressSpace, KeepPolicy};
use dcenet_ipam::select::Node;
use dcenet_ipam::store::Store;
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;

use crate::{each_store, ipam, lease, release, request};

type Clock = Arc<AtomicU64>;

fn named(name: &str) -> Node {
    Node { name: name.parse().unwrap(), labels: LabelSet::new() }
}

fn on(json: &str, store: &Arc<dyn Store>, node: &str, clock: &Clock) -> Ipam {
    let clock = clock.clone();
    let ipam = ipam(json, store).on_node(node.parse().unwrap(), LabelSet::new());
    ipam.with_clock(move || clock.load(Ordering::Relaxed))
}

fn available(capacity: &Capacity, node: &str) -> u128 {
    capacity.on_node(&named(node))[0].available
}

static LEASES: AtomicU64 = AtomicU64::new(0);

/// How many leases succeed before one is refused, which says why.
fn lease_until_exhausted(ipam: &Ipam) -> u128 {
    for n in 0.. {
        let container = format!("last-{}", LEASES.fetch_add(1, Ordering::Relaxed));
        match block_on(ipam.lease(&request(&container, None))) {
            Ok(_) => {}
            Err(LeaseError::Exhausted { .. }) => return n,
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!("no pool here is endless")
}

fn adds_up(pool: &PoolCapacity) {
    let PoolCapacity { size, bound, kept, cooling, quarantined, reserved, available, .. } = pool;
    assert_eq!(*size, bound + kept + cooling + quarantined + reserved + available, "{pool:?}");
    if let Some(unowned) = pool.unowned {
        assert!(unowned + pool.available_to.values().sum::<u128>() <= *available, "{pool:?}");
    }
}

#[test]
fn a_pool_is_counted_by_what_becomes_of_its_addresses() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "10s", "pools": [ { "name": "p", "subnet": "10.0.0.0/27", "gateway": "10.0.0.1",
            "claims": { "shop/db": { "address": "10.0.0.30" } } } ] }"#;
        let clock = Clock::new(1_000_000.into());
        let (a, b) = (on(json, &store, "a", &clock), on(json, &store, "b", &clock));
        // 30 hosts without the gateway; the claim's address is nobody else's, also before it is used.
        let empty = block_on(a.capacity()).unwrap();
        assert_eq!((empty.pools[0].size, empty.pools[0].available, empty.pools[0].kept), (29, 28, 1));

        for n in 0..3 {
            lease(&a, &format!("a{n}"), None).unwrap();
        }
        lease(&b, "b0", None).unwrap();
        lease(&b, "db", Some("shop/db")).unwrap();
        block_on(a.reserve("p", &"shop/web".parse().unwrap(), None, KeepPolicy::Forever)).unwrap();
        let outside = "10.0.0.20-10.0.0.23".parse().unwrap();
        block_on(b.reserve_external(&AddressSpace::default(), outside, "firewall")).unwrap();
        release(&a, "a0");
        let capacity = block_on(b.capacity()).unwrap();
        let pool = &capacity.pools[0];
        adds_up(pool);
        assert_eq!((pool.bound, pool.kept, pool.cooling, pool.reserved, pool.available), (4, 1, 1, 4, 19));
        assert_eq!(capacity.next_due, Some(1_010_000));
        let in_use: Vec<_> = pool.in_use_on.iter().map(|(node, n)| (node.to_string(), *n)).collect();
        assert_eq!(in_use, [("a".to_owned(), 2), ("b".to_owned(), 2)]);
        assert_eq!(available(&capacity, "a"), lease_until_exhausted(&a));

        // The rest that cools is due later, and is one more lease then.
        let full = block_on(b.capacity()).unwrap();
        assert_eq!((available(&full, "b"), full.pools[0].cooling), (0, 1));
        clock.fetch_add(10_000, Ordering::Relaxed);
        assert_eq!(available(&block_on(b.capacity()).unwrap(), "b"), 1);
        assert_eq!(lease_until_exhausted(&b), 1);
    });
}

#[test]
fn a_node_has_what_is_in_its_blocks_and_in_those_of_nobody() {
    let json = |borrow: bool| {
        format!(
            r#"{{ "cooldown": "0s", "pools": [ {{ "name": "p", "subnet": "10.0.0.0/28", "block": {{ "size": 4, "borrow": {borrow} }} }} ] }}"#
        )
    };
    for (borrow, node, expected) in [(false, "a", 6), (false, "b", 4), (false, "c", 2), (true, "c", 8)] {
        let clock = Clock::new(1_000_000.into());
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let json = json(borrow);
        let (a, b) = (on(&json, &store, "a", &clock), on(&json, &store, "b", &clock));
        // a owns the first block, which lacks the network address, and the third; b the second.
        for ours in [(&a, "a0"), (&b, "b0"), (&b, "b1"), (&a, "a1"), (&a, "a2"), (&a, "a3")] {
            lease(ours.0, ours.1, None).unwrap();
        }
        release(&a, "a1");
        let outside = "10.0.0.14".parse().unwrap();
        block_on(a.reserve_external(&AddressSpace::default(), outside, "firewall")).unwrap();
        let capacity = block_on(a.capacity()).unwrap();
        adds_up(&capacity.pools[0]);
        let counted = available(&capacity, node);
        assert_eq!(counted, lease_until_exhausted(&on(&json, &store, node, &clock)), "{borrow} {node} {capacity:?}");
        assert_eq!(counted, expected, "{borrow} {node}");
    }
}

/// Numbers that are always the same.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

#[test]
fn whatever_was_done_the_number_is_how_many_more_leases_succeed() {
    let configs = [
        r#"{ "cooldown": "5s", "pools": [ { "name": "p", "subnet": "10.0.0.0/26", "exclude": ["10.0.0.40-10.0.0.50"] } ] }"#,
        r#"{ "cooldown": "5s", "pools": [ { "name": "p", "subnet": "10.0.0.0/26", "block": { "size": 8, "borrow": false } } ] }"#,
        r#"{ "cooldown": "5s", "pools": [ { "name": "p", "subnet": "10.0.0.0/26", "block": { "size": 8 } } ] }"#,
        r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "fd00::/58", "delegate": 64 } ] }"#,
    ];
    let (mut counts, mut nothing) = (0, 0);
    for (i, json) in configs.iter().enumerate() {
        for seed in 0..40 {
            let mut dice = Dice(seed * 4 + i as u64);
            let clock = Clock::new(1_000_000.into());
            let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
            let nodes = ["a", "b"].map(|name| on(json, &store, name, &clock));
            let mut feed = CapacityFeed::new(&nodes[0]);
            let mut followed = block_on(feed.next(Duration::ZERO)).unwrap().unwrap();
            let mut held = Vec::new();
            for step in 0..dice.below(90) {
                let ours = &nodes[dice.below(2) as usize];
                match dice.below(16) {
                    0..=8 => {
                        let name = format!("c{step}");
                        if lease(ours, &name, None).is_ok() {
                            held.push(name);
                        }
                    }
                    9..=11 if !held.is_empty() => {
                        release(ours, &held.swap_remove(dice.below(held.len() as u64) as usize))
                    }
                    12 => {
                        let keep = KeepPolicy::For(Duration::from_secs(1 + dice.below(9)));
                        let claim = format!("shop/c{step}").parse().unwrap();
                        let recorded = block_on(ours.reserve("p", &claim, None, keep));
                        if recorded.is_ok() && lease(ours, &format!("k{step}"), Some(&claim.to_string())).is_ok() {
                            release(ours, &format!("k{step}"));
                        }
                    }
                    13 => {
                        let low = dice.below(60);
                        let range = match json.contains("delegate") {
                            false => format!("10.0.0.{low}-10.0.0.{}", low + dice.below(3)),
                            true => format!("fd00:0:0:{low:x}::5-fd00:0:0:{low:x}::9"),
                        };
                        // What is in use cannot be reserved.
                        drop(block_on(ours.reserve_external(&AddressSpace::default(), range.parse().unwrap(), "r")));
                    }
                    14 if json.contains("block") => drop(block_on(ours.release_empty_blocks()).unwrap()),
                    _ => drop(clock.fetch_add(dice.below(4_000), Ordering::Relaxed)),
                }
                if let Some(update) = block_on(feed.next(Duration::ZERO)).unwrap() {
                    followed = update;
                }
            }
            let capacity = block_on(nodes[1].capacity()).unwrap();
            assert_eq!(followed.pools, capacity.pools, "the feed tells what a count does, seed {seed} of {json}");
            adds_up(&capacity.pools[0]);
            let which = dice.below(2) as usize;
            let counted = available(&capacity, ["a", "b"][which]);
            assert_eq!(counted, lease_until_exhausted(&nodes[which]), "seed {seed} of {json}: {capacity:?}");
            counts += 1;
            nothing += u32::from(counted == 0);
        }
    }
    assert!(counts == 160 && nothing < 80, "most cases leave something to lease: {nothing} of {counts} do not");
}

#[test]
fn a_feed_wakes_for_changes_and_for_time() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "4s", "pools": [ { "name": "p", "subnet": "10.0.0.0/29" } ] }"#;
        let ours = ipam(json, &store);
        let mut feed = CapacityFeed::new(&ours);
        let next = |feed: &mut CapacityFeed<_>| block_on(feed.next(Duration::from_secs(60))).unwrap().unwrap();
        assert_eq!(next(&mut feed).pools[0].available, 6);
        let other = ipam(json, &store);
        std::thread::scope(|scope| {
            scope.spawn(|| lease(&other, "c", None).unwrap());
            assert_eq!(next(&mut feed).pools[0].available, 5);
        });
        assert_eq!(block_on(feed.next(Duration::ZERO)).unwrap(), None, "nothing has changed");
        release(&other, "c");
        let cooling = next(&mut feed);
        assert_eq!((cooling.pools[0].available, cooling.pools[0].cooling), (5, 1));
        // No write tells of it.
        let rested = next(&mut feed);
        assert_eq!((rested.pools[0].available, rested.pools[0].cooling, rested.revision), (6, 0, cooling.revision));
    });
}

#[test]
fn a_scheduler_is_told_by_node_and_pool() {
    let json = r#"{ "pools": [
        { "name": "all", "subnet": "10.0.0.0/29" },
        { "name": "rack1", "subnet": "10.1.0.0/29", "group": "r", "select": { "nodes": ["rack1-*"] } },
        { "name": "fast", "subnet": "10.2.0.0/30", "group": "f", "select": { "nodeLabels": { "matchLabels": { "nic": "fast" } } } } ] }"#;
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let labels = LabelSet::from([("nic".to_owned(), "fast".to_owned())]);
    let (one, two) = (named("rack1-n1"), Node { labels, ..named("rack2-n1") });
    let ours = ipam(json, &store).on_node(one.name.clone(), LabelSet::new());
    lease(&ours, "c1", None).unwrap();
    let capacity = block_on(ours.capacity()).unwrap();
    let quantities = |node| {
        let resources = capacity.extended_resources(node).unwrap();
        resources.into_iter().map(|(name, quantity)| format!("{name}={quantity}")).collect::<Vec<_>>()
    };
    // What the node has in use is part of what the scheduler takes requests from.
    assert_eq!(quantities(&one), ["dcenet.io/ip-all=6", "dcenet.io/ip-rack1=6"]);
    assert_eq!(quantities(&two), ["dcenet.io/ip-all=5", "dcenet.io/ip-fast=2"]);

    let wants = BTreeMap::from([("all".to_owned(), 1), ("fast".to_owned(), 1)]);
    let answer = serde_json::to_value(capacity.filter([&one, &two], &wants)).unwrap();
    let expected =
        r#"{ "nodenames": ["rack2-n1"], "failedNodes": { "rack1-n1": "pool fast does not serve the node" } }"#;
    assert_eq!(answer, serde_json::from_str::<serde_json::Value>(expected).unwrap());
    let many = capacity.filter([&two], &BTreeMap::from([("fast".to_owned(), 3)]));
    assert_eq!(many.failed_nodes["rack2-n1"], "pool fast has 2 free for the node, and 3 are needed");

    let long = format!(r#"{{ "pools": [ {{ "name": "{}", "subnet": "10.0.0.0/29" }} ] }}"#, "p".repeat(61));
    let error = block_on(ipam(&long, &store).capacity()).unwrap().extended_resources(&one).unwrap_err();
    assert!(error.to_string().contains("at most 60 characters"), "{error}");
}
