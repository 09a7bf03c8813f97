//! Blocks that nodes own in a pool.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use dcenet_core::model::LabelSet;
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::flaky::{MeetingStore, UnguardedStore};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::{Ipam, OwnedBlock};
use ipnet::IpNet;
use pollster::block_on;

use crate::{attachment, each_store, ipam, later, lease, release, request};

fn node(json: &str, store: &Arc<dyn Store>, name: &str) -> Ipam {
    ipam(json, store).on_node(name.parse().unwrap(), LabelSet::new())
}

/// Four blocks of four: the first lacks the network address, the last the broadcast address.
fn small(options: &str) -> String {
    format!(
        r#"{{ "cooldown": "0s", "pools": [ {{ "name": "p", "subnet": "10.0.0.0/28", "block": {{ "size": 4 {options} }} }} ] }}"#
    )
}

fn owned(ipam: &Ipam) -> Vec<String> {
    block_on(ipam.blocks()).unwrap().iter().map(|b| format!("{} {}", b.prefix, b.owner)).collect()
}

#[test]
fn a_node_hands_out_from_its_own_blocks_and_takes_another_when_they_are_full() {
    each_store(|store, _| {
        let (a, b) = (node(&small(""), &store, "a"), node(&small(""), &store, "b"));
        assert_eq!(lease(&a, "a1", None).unwrap(), ["10.0.0.1/28"]);
        assert_eq!(lease(&b, "b1", None).unwrap(), ["10.0.0.4/28"]);
        assert_eq!(lease(&a, "a2", None).unwrap(), ["10.0.0.2/28"]);
        assert_eq!(lease(&a, "a3", None).unwrap(), ["10.0.0.3/28"]);
        assert_eq!(owned(&a), ["10.0.0.0/30 a", "10.0.0.4/30 b"]);
        assert_eq!(lease(&a, "a4", None).unwrap(), ["10.0.0.8/28"]);
        assert_eq!(lease(&b, "b2", None).unwrap(), ["10.0.0.5/28"]);
        assert_eq!(owned(&b), ["10.0.0.0/30 a", "10.0.0.4/30 b", "10.0.0.8/30 a"]);
        // What is released is used again in its block, the oldest first, before another block is taken.
        release(&a, "a2");
        later();
        release(&a, "a1");
        for c in ["a5", "a6", "a7"] {
            assert!(lease(&a, c, None).unwrap()[0].starts_with("10.0.0."));
        }
        assert_eq!(lease(&a, "a8", None).unwrap(), ["10.0.0.2/28"]);
        assert_eq!(lease(&a, "a9", None).unwrap(), ["10.0.0.1/28"]);
        assert_eq!(owned(&a).len(), 3);
    });
}

#[test]
fn a_full_pool_borrows_unless_that_is_forbidden() {
    each_store(|store, _| {
        let json = small("");
        let (a, b) = (node(&json, &store, "a"), node(&json, &store, "b"));
        let strict = node(&small(r#", "borrow": false"#), &store, "a");
        lease(&b, "b1", None).unwrap();
        // a owns the other three blocks, with eleven addresses.
        for i in 0..11 {
            lease(&strict, &format!("a{i}"), None).unwrap();
        }
        assert_eq!(owned(&a).len(), 4);
        let refused = lease(&strict, "more", None).unwrap_err();
        assert!(matches!(&refused, LeaseError::Exhausted { pool, .. } if pool == "p"), "{refused}");
        assert_eq!(lease(&a, "more", None).unwrap(), ["10.0.0.2/28"]);
        assert_eq!(owned(&a).iter().filter(|o| o.ends_with(" b")).count(), 1, "borrowing moves no block");
        // Borrowed or not, it returns to the queue of its block.
        release(&a, "more");
        later();
        assert_eq!(lease(&b, "b2", None).unwrap(), ["10.0.0.3/28"]);
        assert_eq!(lease(&b, "b3", None).unwrap(), ["10.0.0.2/28"]);
        // All is used: what is released in another's block is borrowed again.
        let full = lease(&a, "full", None).unwrap_err();
        assert!(matches!(full, LeaseError::Exhausted { size: 14, .. }), "{full}");
        release(&b, "b1");
        assert_eq!(lease(&a, "full", None).unwrap(), ["10.0.0.1/28"]);
    });
}

#[test]
fn empty_blocks_are_given_back_and_those_in_use_are_kept() {
    each_store(|store, _| {
        let json = small("");
        let (a, b) = (node(&json, &store, "a"), node(&json, &store, "b"));
        for i in 0..5 {
            lease(&a, &format!("a{i}"), None).unwrap();
        }
        assert_eq!(owned(&a), ["10.0.0.0/30 a", "10.0.0.4/30 a"]);
        assert_eq!(block_on(a.release_empty_blocks()).unwrap(), []);
        for i in [0, 1, 2] {
            release(&a, &format!("a{i}"));
        }
        let given: Vec<OwnedBlock> = block_on(a.release_empty_blocks()).unwrap();
        assert_eq!(given.iter().map(|b| b.prefix.to_string()).collect::<Vec<_>>(), ["10.0.0.0/30"]);
        assert_eq!(owned(&a), ["10.0.0.4/30 a"]);
        assert!(!block_on(a.blocks()).unwrap()[0].closing, "what is in use is open again");
        assert_eq!(lease(&a, "a9", None).unwrap(), ["10.0.0.6/28"]);
        // The next owner goes on in the block's queue, the oldest first.
        assert_eq!(lease(&b, "b0", None).unwrap(), ["10.0.0.1/28"]);
        // A dead node's block is reclaimed by another, but not with a live address in it.
        assert_eq!(block_on(a.reclaim_blocks("b")).unwrap(), []);
        release(&b, "b0");
        assert_eq!(block_on(a.reclaim_blocks("b")).unwrap().len(), 1);
        assert_eq!(block_on(a.reclaim_blocks("b")).unwrap(), []);
        assert_eq!(owned(&a), ["10.0.0.4/30 a"]);
        let nobody = block_on(ipam(&json, &store).release_empty_blocks()).unwrap_err();
        assert!(matches!(nobody, LeaseError::Invalid { field, .. } if field == "ipam.node"));
    });
}

#[test]
fn claims_and_requests_are_served_from_any_block() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/28",
            "block": { "size": "/30", "borrow": false }, "claims": { "shop/db": { "address": "10.0.0.5" } } } ] }"#;
        let (a, b) = (node(json, &store, "a"), node(json, &store, "b"));
        lease(&a, "a1", None).unwrap();
        lease(&b, "b1", None).unwrap();
        assert_eq!(lease(&a, "a2", Some("shop/db")).unwrap(), ["10.0.0.5/28"]);
        let mut asked = request("a3", None);
        asked.addresses = vec!["10.0.0.6".parse().unwrap()];
        assert_eq!(block_on(a.lease(&asked)).unwrap().addresses[0].address.to_string(), "10.0.0.6/28");
        assert_eq!(owned(&a), ["10.0.0.0/30 a", "10.0.0.4/30 b"]);
        // Without a node only such requests can be served.
        let nobody = ipam(json, &store);
        let refused = lease(&nobody, "c1", None).unwrap_err();
        assert!(matches!(&refused, LeaseError::Invalid { field, .. } if field == "ipam.node"), "{refused}");
        asked.attachment = attachment("c2");
        asked.addresses = vec!["10.0.0.9".parse().unwrap()];
        block_on(nobody.lease(&asked)).unwrap();
    });
}

#[test]
fn a_configuration_without_blocks_may_share_the_pool_and_one_with_another_size_may_not() {
    each_store(|store, _| {
        let plain = ipam(&small("").replace(r#", "block": { "size": 4  }"#, ""), &store);
        lease(&plain, "p1", None).unwrap();
        let a = node(&small(""), &store, "a");
        assert_eq!(lease(&a, "a1", None).unwrap(), ["10.0.0.2/28"]);
        for i in 0..12 {
            lease(&plain, &format!("q{i}"), None).unwrap();
        }
        // Released into a block's queue, found by the one that knows of none; and the other way round.
        release(&a, "a1");
        assert_eq!(lease(&plain, "p2", None).unwrap(), ["10.0.0.2/28"]);
        release(&plain, "p2");
        assert_eq!(lease(&a, "a2", None).unwrap(), ["10.0.0.2/28"]);
        let other = node(&small("").replace("\"size\": 4", "\"size\": 8"), &store, "b");
        let refused = lease(&other, "b1", None).unwrap_err();
        let LeaseError::Invalid { field, reason } = &refused else { panic!("{refused}") };
        assert_eq!(field, "ipam.pools[0].block.size");
        assert!(reason.contains("/29 of pool p, which the store holds with /30"), "{reason}");
    });
}

#[test]
fn wrong_blocks_are_refused_by_field() {
    for (size, part) in
        [("3", "\"3\""), ("0", "\"0\""), ("512", "from /24 to /32"), ("\"/23\"", "/23"), ("\"26\"", "26")]
    {
        let json =
            format!(r#"{{ "pools": [ {{ "name": "p", "subnet": "10.0.0.0/24", "block": {{ "size": {size} }} }} ] }}"#);
        let error = crate::config(&json).layout().unwrap_err();
        assert_eq!(error.field, "ipam.pools[0].block.size");
        assert!(error.to_string().contains(part), "{error}");
    }
    let both = r#"{ "pools": [ { "name": "p", "subnet": "fd00::/48", "block": { "size": "/56" }, "delegate": 64 } ] }"#;
    assert_eq!(crate::config(both).layout().unwrap_err().field, "ipam.pools[0].delegate");
}

/// The blocks that two nodes were given their first addresses from, both having decided from the same state.
fn two_first_leases(store: &Arc<dyn Store>) -> Vec<IpNet> {
    let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24", "block": { "size": 16 } } ] }"#;
    block_on(node(json, store, "setup").ready()).unwrap();
    let meeting: Arc<dyn Store> = MeetingStore::over(store.clone(), b"b/");
    thread::scope(|scope| {
        let racers = ["a", "b"].map(|name| {
            let meeting = &meeting;
            scope.spawn(move || {
                let ours = node(json, meeting, name);
                // The second address of the same node, lest the slot's guard be what parts them.
                let mut asked = request(name, None);
                asked.workload = None;
                let first = block_on(ours.lease(&asked)).unwrap().addresses[0].address.addr();
                IpNet::new(first, 28).unwrap().trunc()
            })
        });
        racers.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

#[test]
fn two_nodes_never_own_one_block() {
    each_store(|store, _| {
        let blocks = two_first_leases(&store);
        assert_ne!(blocks[0], blocks[1]);
    });
}

#[test]
fn without_the_blocks_guard_they_do() {
    // Without the slot's too, for the first address of a block is the same for both.
    let unguarded: Arc<dyn Store> = Arc::new(UnguardedStore::new(Arc::new(MemoryStore::new()), |guard| {
        guard.key.starts_with(b"b/") || guard.key.starts_with(b"s/")
    }));
    let blocks = two_first_leases(&unguarded);
    assert_eq!(blocks[0], blocks[1]);
}

#[test]
fn many_nodes_at_once_get_blocks_and_addresses_of_their_own() {
    each_store(|store, _| {
        let json =
            r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/22", "block": { "size": 16, "borrow": false } } ] }"#;
        let given: Vec<(String, Vec<std::net::IpAddr>)> = thread::scope(|scope| {
            let nodes: Vec<_> = (0..6)
                .map(|n| {
                    let store = &store;
                    scope.spawn(move || {
                        let name = format!("n{n}");
                        let ours = node(json, store, &name);
                        let one = |i| {
                            let lease = block_on(ours.lease(&request(&format!("{name}-{i}"), None))).unwrap();
                            lease.addresses[0].address.addr()
                        };
                        (name.clone(), (0..24).map(one).collect())
                    })
                })
                .collect();
            nodes.into_iter().map(|n| n.join().unwrap()).collect()
        });
        let blocks = block_on(ipam(json, &store).blocks()).unwrap();
        let mut all = BTreeMap::new();
        for (name, addresses) in &given {
            for address in addresses {
                assert_eq!(all.insert(*address, name), None, "{address} twice");
                let owner = blocks.iter().find(|b| b.prefix.contains(address)).unwrap();
                assert_eq!(&owner.owner, name, "{address}");
            }
        }
        assert_eq!(all.len(), 6 * 24);
        for name in given.iter().map(|(name, _)| name) {
            assert_eq!(blocks.iter().filter(|b| b.owner == *name).count(), 2, "{blocks:?}");
        }
    });
}

static TURNS: AtomicU64 = AtomicU64::new(0);

#[test]
fn giving_back_and_leasing_at_once_leave_no_address_in_a_block_of_nobody() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/24",
            "block": { "size": 16, "borrow": false } } ] }"#;
        let ours = node(json, &store, "a");
        for turn in 0..60 {
            let container = format!("c{turn}");
            thread::scope(|scope| {
                scope.spawn(|| lease(&node(json, &store, "a"), &container, None).unwrap());
                scope.spawn(|| {
                    TURNS.fetch_add(block_on(ours.release_empty_blocks()).unwrap().len() as u64, Ordering::Relaxed)
                });
            });
            let blocks = block_on(ours.blocks()).unwrap();
            for binding in block_on(ours.bindings(None)).unwrap() {
                let owner = blocks.iter().find(|b| b.prefix.contains(&binding.address.addr()));
                assert_eq!(owner.map(|b| b.owner.as_str()), Some("a"), "{binding:?} {blocks:?}");
            }
            release(&ours, &container);
        }
    });
    assert!(TURNS.load(Ordering::Relaxed) > 0, "no block was ever given back");
}

/// A clock that the test moves.
fn at(ipam: Ipam, now: &Arc<std::sync::atomic::AtomicU64>) -> Ipam {
    let now = now.clone();
    ipam.with_clock(move || now.load(std::sync::atomic::Ordering::Relaxed))
}

#[test]
fn what_has_ended_in_a_block_that_nobody_borrows_from_is_found_by_a_lease() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/29", "ranges": ["10.0.0.1-10.0.0.3"],
            "block": { "size": 4, "borrow": false } } ] }"#;
        let now = Arc::new(std::sync::atomic::AtomicU64::new(1_000_000));
        let a = at(node(json, &store, "a"), &now);
        let keep = dcenet_ipam::model::KeepPolicy::For(std::time::Duration::from_secs(10));
        let claim = "shop/db".parse().unwrap();
        block_on(a.reserve("p", &claim, Some("10.0.0.2".parse().unwrap()), keep)).unwrap();
        assert_eq!(lease(&a, "db", Some("shop/db")).unwrap(), ["10.0.0.2/29"]);
        release(&a, "db");
        assert_eq!(lease(&a, "one", None).unwrap(), ["10.0.0.1/29"]);
        assert_eq!(lease(&a, "two", None).unwrap(), ["10.0.0.3/29"]);
        assert!(matches!(lease(&a, "more", None), Err(LeaseError::Exhausted { .. })), "it is kept for ten seconds");
        now.fetch_add(10_001, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(lease(&a, "more", None).unwrap(), ["10.0.0.2/29"]);
        assert!(matches!(lease(&a, "again", None), Err(LeaseError::Exhausted { .. })));
    });
}

#[test]
fn what_has_ended_in_a_block_of_nobody_is_found_with_the_block() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/29", "ranges": ["10.0.0.2"],
            "block": { "size": 4, "borrow": false } } ] }"#;
        let now = Arc::new(std::sync::atomic::AtomicU64::new(1_000_000));
        // A tool that is on no node, so that no block is claimed.
        let tool = at(ipam(json, &store), &now);
        let keep = dcenet_ipam::model::KeepPolicy::For(std::time::Duration::from_secs(10));
        block_on(tool.reserve("p", &"shop/db".parse().unwrap(), None, keep)).unwrap();
        let a = at(node(json, &store, "a"), &now);
        lease(&a, "db", Some("shop/db")).unwrap();
        release(&a, "db");
        assert_eq!(owned(&a), [""; 0]);
        assert!(matches!(lease(&a, "one", None), Err(LeaseError::Exhausted { .. })));
        now.fetch_add(10_001, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(lease(&a, "one", None).unwrap(), ["10.0.0.2/29"]);
        assert_eq!(owned(&a), ["10.0.0.0/30 a"]);
    });
}

#[test]
fn a_block_that_is_being_given_up_hides_no_address_of_the_others() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/29",
            "block": { "size": 4, "borrow": false } } ] }"#;
        let a = node(json, &store, "a");
        for n in 1..=6 {
            lease(&a, &format!("c{n}"), None).unwrap();
        }
        assert_eq!(owned(&a), ["10.0.0.0/30 a", "10.0.0.4/30 a"]);
        // The oldest release is in the first block, and whoever gives that up stops in the middle.
        release(&a, "c1");
        later();
        release(&a, "c5");
        let key = block_on(store.scan(b"b/default/4/p/", None, 1)).unwrap().remove(0);
        let text = String::from_utf8(key.1.value).unwrap();
        let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
        record["closing"] = true.into();
        let close = dcenet_ipam::store::Batch {
            writes: vec![dcenet_ipam::store::Write::Put(key.0, serde_json::to_vec(&record).unwrap())],
            request_id: 77,
            ..Default::default()
        };
        block_on(store.commit(&close)).unwrap();
        assert_eq!(lease(&a, "next", None).unwrap(), ["10.0.0.5/29"]);
        assert!(matches!(lease(&a, "none", None), Err(LeaseError::Exhausted { .. })));
        // It was not empty, so it is opened again.
        block_on(a.release_empty_blocks()).unwrap();
        assert_eq!(lease(&a, "open", None).unwrap(), ["10.0.0.1/29"]);
    });
}
