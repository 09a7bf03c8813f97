//! Blocks that applications own in a pool.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use dcenet_core::model::LabelSet;
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::groups::{GroupFeed, Grouping, ListForm};
use dcenet_ipam::model::{AddressSpace, KeepPolicy};
use dcenet_ipam::store::flaky::{Failure, FlakyStore, MeetingStore, UnguardedStore};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Store, Write};
use dcenet_ipam::{Ipam, Quarantine};
use pollster::block_on;

use crate::capacity::Dice;
use crate::{attachment, config, each_store, ipam, lease, release, request};

/// Eight blocks of four; the first lacks the network address, the last the broadcast address.
const DMZ: &str = r#"{ "cooldown": "0s", "pools": [
    { "name": "dmz", "subnet": "10.0.0.0/27", "block": { "size": 4, "owner": "application" } } ] }"#;

fn on(store: &Arc<dyn Store>, node: &str) -> Ipam {
    ipam(DMZ, store).on_node(node.parse().unwrap(), LabelSet::new())
}

fn owned(ipam: &Ipam) -> Vec<String> {
    block_on(ipam.blocks()).unwrap().iter().map(|b| format!("{} {}", b.prefix, b.owner)).collect()
}

fn asks(ipam: &Ipam, container: &str, workload: &str, address: &str) -> Result<String, LeaseError> {
    let mut asked = request(container, Some(workload));
    asked.addresses = vec![address.parse().unwrap()];
    block_on(ipam.lease(&asked)).map(|lease| lease.addresses[0].address.addr().to_string())
}

#[test]
fn an_application_gets_a_block_and_another_when_it_grows_whichever_nodes_it_is_on() {
    each_store(|store, _| {
        let (a, b) = (on(&store, "a"), on(&store, "b"));
        assert_eq!(lease(&a, "web1", Some("shop/web-7d9f8c6b5-x2x4z")).unwrap(), ["10.0.0.1/27"]);
        assert_eq!(lease(&b, "db0", Some("shop/db-0")).unwrap(), ["10.0.0.4/27"]);
        assert_eq!(lease(&b, "web2", Some("shop/web-7d9f8c6b5-bcdfg")).unwrap(), ["10.0.0.2/27"]);
        assert_eq!(lease(&a, "web3", Some("shop/web-66666b5-bcdfh")).unwrap(), ["10.0.0.3/27"]);
        assert_eq!(owned(&a), ["10.0.0.0/30 shop/web", "10.0.0.4/30 shop/db"]);
        assert_eq!(lease(&b, "web4", Some("shop/web-66666b5-bcdfj")).unwrap(), ["10.0.0.8/27"]);
        assert_eq!(lease(&a, "db1", Some("shop/db-1")).unwrap(), ["10.0.0.5/27"]);
        // The same name in another namespace is another application.
        assert_eq!(lease(&a, "other", Some("test/db-0")).unwrap(), ["10.0.0.12/27"]);
        assert_eq!(
            owned(&b),
            ["10.0.0.0/30 shop/web", "10.0.0.4/30 shop/db", "10.0.0.8/30 shop/web", "10.0.0.12/30 test/db"]
        );
        // What an application gave back is its own again before another block is made.
        release(&a, "web2");
        assert_eq!(lease(&a, "web5", Some("shop/web-66666b5-bcdfk")).unwrap(), ["10.0.0.9/27"]);
        for c in ["web6", "web7"] {
            lease(&a, c, Some("shop/web-66666b5-bcdfl")).unwrap();
        }
        assert_eq!(lease(&a, "web8", Some("shop/web-66666b5-bcdfm")).unwrap(), ["10.0.0.2/27"]);
        assert_eq!(owned(&a).len(), 4);
    });
}

#[test]
fn nobody_else_gets_an_address_of_it() {
    each_store(|store, _| {
        let ours = on(&store, "a");
        lease(&ours, "web", Some("shop/web-0")).unwrap();
        let refused = asks(&ours, "db", "shop/db-0", "10.0.0.2").unwrap_err();
        let LeaseError::Held { holder, .. } = &refused else { panic!("{refused}") };
        assert_eq!(holder, "application shop/web, whose block it is in");
        assert_eq!(asks(&ours, "web1", "shop/web-1", "10.0.0.2").unwrap(), "10.0.0.2");
        // One that is asked for, and one that a claim keeps, makes the block the application's.
        assert_eq!(asks(&ours, "db", "shop/db-0", "10.0.0.9").unwrap(), "10.0.0.9");
        let claim = "shop/mail-0".parse().unwrap();
        block_on(ours.reserve("dmz", &claim, Some("10.0.0.13".parse().unwrap()), KeepPolicy::Forever)).unwrap();
        let other = block_on(ours.reserve(
            "dmz",
            &"shop/spam-0".parse().unwrap(),
            Some("10.0.0.3".parse().unwrap()),
            KeepPolicy::Forever,
        ));
        assert!(matches!(other, Err(LeaseError::Held { .. })), "{other:?}");
        assert_eq!(owned(&ours), ["10.0.0.0/30 shop/web", "10.0.0.8/30 shop/db", "10.0.0.12/30 shop/mail"]);
        assert_eq!(lease(&ours, "mail", Some("shop/mail-0")).unwrap(), ["10.0.0.13/27"]);
        assert_eq!(lease(&ours, "mail1", Some("shop/mail-1")).unwrap(), ["10.0.0.12/27"]);
        let nobody = lease(&ours, "c", None).unwrap_err();
        assert!(matches!(&nobody, LeaseError::Invalid { field, .. } if field == "workload"), "{nobody}");
        block_on(ours.ready()).unwrap();
        // All that is left is made blocks of, and then the rest of another's block is of no use to anybody else.
        for n in 0..5 {
            lease(&ours, &format!("app{n}"), Some(&format!("team/app{n}x"))).unwrap();
        }
        let full = lease(&ours, "late", Some("team/late")).unwrap_err();
        assert!(matches!(full, LeaseError::Exhausted { .. }), "{full}");
        lease(&ours, "app0b", Some("team/app0x")).unwrap();
        block_on(ours.ready()).unwrap();
    });
}

#[test]
fn a_bad_address_is_replaced_by_one_of_the_same_application() {
    each_store(|store, _| {
        let ours = on(&store, "a");
        let held = block_on(ours.lease(&request("web", Some("shop/web-0")))).unwrap();
        lease(&ours, "db", Some("shop/db-0")).unwrap();
        let why = Quarantine { reason: "seen".into(), time: None, seen: None };
        let bad: IpAddr = "10.0.0.1".parse().unwrap();
        let other = block_on(ours.replace(&attachment("web"), held.sequence(), bad, &why)).unwrap().unwrap();
        assert_eq!(other.addresses[0].address.to_string(), "10.0.0.2/27");
        assert_eq!(owned(&ours), ["10.0.0.0/30 shop/web", "10.0.0.4/30 shop/db"]);
    });
}

#[test]
fn empty_blocks_go_to_the_next_application_and_those_in_use_do_not() {
    each_store(|store, _| {
        let (ours, nowhere) = (on(&store, "a"), ipam(DMZ, &store));
        for n in 0..4 {
            lease(&ours, &format!("web{n}"), Some("shop/web-0")).unwrap();
        }
        lease(&ours, "db", Some("shop/db-0")).unwrap();
        assert_eq!(owned(&ours), ["10.0.0.0/30 shop/web", "10.0.0.4/30 shop/web", "10.0.0.8/30 shop/db"]);
        // GC releases what the runtime does not name; the blocks are given back by who is asked to.
        let valid = [("web3".parse().unwrap(), "eth0".parse().unwrap())];
        assert_eq!(block_on(ours.retain(&"net".parse().unwrap(), &valid)).unwrap().len(), 4);
        assert_eq!(owned(&ours).len(), 3);
        let given = block_on(nowhere.release_empty_blocks()).unwrap();
        let given: Vec<String> = given.iter().map(|b| format!("{} {}", b.prefix, b.owner)).collect();
        assert_eq!(given, ["10.0.0.0/30 shop/web", "10.0.0.8/30 shop/db"]);
        assert_eq!(owned(&ours), ["10.0.0.4/30 shop/web"]);
        assert_eq!(lease(&ours, "mail", Some("shop/mail-0")).unwrap(), ["10.0.0.1/27"]);
        release(&ours, "web3");
        assert_eq!(block_on(nowhere.reclaim_blocks("shop/mail")).unwrap(), []);
        assert_eq!(block_on(nowhere.reclaim_blocks("shop/web")).unwrap().len(), 1);
    });
}

#[test]
fn an_address_that_is_asked_for_opens_a_block_that_is_being_given_up() {
    each_store(|store, _| {
        let ours = on(&store, "a");
        lease(&ours, "web", Some("shop/web-0")).unwrap();
        let (key, entry) = block_on(store.scan(b"b/default/4/dmz/", None, 1)).unwrap().remove(0);
        let mut record: serde_json::Value = serde_json::from_slice(&entry.value).unwrap();
        record["closing"] = true.into();
        let writes = vec![Write::Put(key, serde_json::to_vec(&record).unwrap())];
        block_on(store.commit(&Batch { writes, request_id: 77, ..Batch::default() })).unwrap();
        assert_eq!(lease(&ours, "web1", Some("shop/web-1")).unwrap(), ["10.0.0.4/27"]);
        assert_eq!(asks(&ours, "web2", "shop/web-2", "10.0.0.2").unwrap(), "10.0.0.2");
        assert!(block_on(ours.blocks()).unwrap().iter().all(|b| !b.closing));
    });
}

#[test]
fn who_does_not_say_the_same_of_the_pool_cannot_share_it() {
    let plain = r#"{ "pools": [ { "name": "dmz", "subnet": "10.0.0.0/27" } ] }"#;
    let nodes = r#"{ "node": { "name": "a" }, "pools": [ { "name": "dmz", "subnet": "10.0.0.0/27", "block": { "size": 4 } } ] }"#;
    for (first, second, parts) in [
        (DMZ, plain, "are of nobody here, and in the store of applications"),
        (DMZ, nodes, "are of nodes here, and in the store of applications"),
        (nodes, DMZ, "are of applications here, and in the store of nodes"),
    ] {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        lease(&ipam(first, &store), "a", Some("shop/web-0")).unwrap();
        let refused = lease(&ipam(second, &store), "b", Some("shop/db-0")).unwrap_err();
        let LeaseError::Invalid { field, reason } = &refused else { panic!("{refused}") };
        assert_eq!(field, "ipam.pools[0].block.owner");
        assert!(reason.contains(parts), "{reason}");
    }
    // A pool that had no blocks begins to have them. What was handed out before stays, in blocks of nobody.
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    lease(&ipam(plain, &store), "old", Some("shop/web-0")).unwrap();
    let ours = ipam(DMZ, &store);
    assert_eq!(lease(&ours, "db", Some("shop/db-0")).unwrap(), ["10.0.0.4/27"]);
    let refused = asks(&ours, "db1", "shop/db-0", "10.0.0.2").unwrap_err();
    assert!(refused.to_string().contains("attachment net/old/eth0 has an address of its block"), "{refused}");
    let capacity = block_on(ours.capacity()).unwrap();
    assert_eq!((capacity.pools[0].available, capacity.pools[0].unowned), (28, Some(23)));
    lease(&ipam(plain, &store), "old2", None).unwrap_err();
    release(&ours, "old");
    assert_eq!(asks(&ours, "db1", "shop/db-0", "10.0.0.2").unwrap(), "10.0.0.2");
}

#[test]
fn borrowing_from_applications_is_refused_by_field() {
    let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24", "block": { "size": 16, "owner": "application", "borrow": true } } ] }"#;
    let error = config(json).layout().unwrap_err();
    assert_eq!(error.field, "ipam.pools[0].block.borrow");
    let wrong = json.replace("application", "team");
    let error = serde_json::from_str::<dcenet_ipam::IpamConfig>(&wrong).unwrap_err().to_string();
    assert!(error.contains("`application` or `node`"), "{error}");
}

/// The addresses that two pods were given at once, both allocators having decided from the same state.
fn two_first_leases(store: &Arc<dyn Store>, workloads: [&str; 2]) -> Vec<IpAddr> {
    block_on(ipam(DMZ, store).ready()).unwrap();
    let meeting: Arc<dyn Store> = MeetingStore::over(store.clone(), b"b/");
    thread::scope(|scope| {
        let racers = [("a", workloads[0]), ("b", workloads[1])].map(|(node, workload)| {
            let meeting = &meeting;
            scope.spawn(move || {
                let lease = block_on(on(meeting, node).lease(&request(node, Some(workload)))).unwrap();
                lease.addresses[0].address.addr()
            })
        });
        racers.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

fn block_of(address: IpAddr) -> ipnet::IpNet {
    ipnet::IpNet::new(address, 30).unwrap().trunc()
}

#[test]
fn two_applications_never_own_one_block_and_one_does_not_make_two() {
    each_store(|store, _| {
        let given = two_first_leases(&store, ["shop/web-0", "shop/db-0"]);
        assert_ne!(block_of(given[0]), block_of(given[1]));
        assert_eq!(owned(&ipam(DMZ, &store)).len(), 2);
    });
    each_store(|store, _| {
        let given = two_first_leases(&store, ["shop/web-0", "shop/web-1"]);
        assert_ne!(given[0], given[1]);
        assert_eq!(block_of(given[0]), block_of(given[1]));
        assert_eq!(owned(&ipam(DMZ, &store)), ["10.0.0.0/30 shop/web"]);
    });
}

#[test]
fn without_the_blocks_guard_two_applications_own_one() {
    // Without the slot's too, for the first address of a block is the same for both.
    let unguarded: Arc<dyn Store> = Arc::new(UnguardedStore::new(Arc::new(MemoryStore::new()), |guard| {
        guard.key.starts_with(b"b/") || guard.key.starts_with(b"s/")
    }));
    let given = two_first_leases(&unguarded, ["shop/web-0", "shop/db-0"]);
    assert_eq!(block_of(given[0]), block_of(given[1]));
}

#[test]
fn giving_back_and_leasing_at_once_leave_no_address_in_a_block_of_another() {
    let given = AtomicU64::new(0);
    each_store(|store, _| {
        let ours = on(&store, "a");
        for turn in 0..40 {
            let container = format!("c{turn}");
            let workload = ["shop/web-0", "shop/db-0", "shop/mail-0"][turn % 3];
            thread::scope(|scope| {
                scope.spawn(|| lease(&on(&store, "b"), &container, Some(workload)).unwrap());
                scope.spawn(|| {
                    let released = block_on(ours.release_empty_blocks()).unwrap();
                    given.fetch_add(released.len() as u64, Ordering::Relaxed);
                });
            });
            each_in_its_own(&ours);
            release(&ours, &container);
        }
    });
    assert!(given.load(Ordering::Relaxed) > 0, "no block was ever given back");
}

/// Whatever is in use is in a block of its application, which is told here by the name alone.
fn each_in_its_own(ours: &Ipam) {
    let blocks = block_on(ours.blocks()).unwrap();
    let owner = |address: IpAddr| blocks.iter().find(|b| b.prefix.contains(&address)).map(|b| b.owner.clone());
    let application = |workload: &str| workload.rsplit_once('-').map(|(owner, _)| owner.to_owned());
    let mut seen = BTreeSet::new();
    for binding in block_on(ours.bindings(None)).unwrap() {
        let address = binding.address.addr();
        assert!(seen.insert(address), "{address} twice");
        assert_eq!(owner(address), application(&binding.workload.unwrap().to_string()), "{address} {blocks:?}");
    }
    for claim in block_on(ours.claims()).unwrap() {
        let address = claim.claim.address.unwrap().ip();
        assert_eq!(owner(address), application(&claim.claim.key.to_string()), "{address} {blocks:?}");
    }
}

#[test]
fn whatever_was_done_each_has_its_own_and_nothing_is_found_damaged() {
    let (mut counts, mut more) = (0, 0);
    for seed in 0..40 {
        let mut dice = Dice(seed);
        let clock = Arc::new(AtomicU64::new(1_000_000));
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let json = DMZ.replace("0s", "5s");
        let nodes = ["a", "b"].map(|name| {
            let clock = clock.clone();
            let ours = ipam(&json, &store).on_node(name.parse().unwrap(), LabelSet::new());
            ours.with_clock(move || clock.load(Ordering::Relaxed))
        });
        let mut held = Vec::new();
        for step in 0..dice.below(70) {
            // Two events in a millisecond would have no order of their own.
            clock.fetch_add(1, Ordering::Relaxed);
            let ours = &nodes[dice.below(2) as usize];
            let (name, pod) = (format!("c{step}"), format!("shop/app{}x-{step}", dice.below(4)));
            let address: IpAddr = format!("10.0.0.{}", 1 + dice.below(30)).parse().unwrap();
            match dice.below(16) {
                0..=6 => {
                    if lease(ours, &name, Some(&pod)).is_ok() {
                        held.push(name);
                    }
                }
                7 | 8 => {
                    if asks(ours, &name, &pod, &address.to_string()).is_ok() {
                        held.push(name);
                    }
                }
                9 | 10 if !held.is_empty() => release(ours, &held.swap_remove(dice.below(held.len() as u64) as usize)),
                11 => {
                    let keep = KeepPolicy::For(Duration::from_secs(1 + dice.below(9)));
                    drop(block_on(ours.reserve("dmz", &pod.parse().unwrap(), Some(address), keep)));
                }
                12 => {
                    let range = format!("{address}").parse().unwrap();
                    drop(block_on(ours.reserve_external(&AddressSpace::default(), range, "router")));
                }
                13 => {
                    let why = Quarantine { reason: "seen".into(), time: Some(Duration::from_secs(6)), seen: None };
                    let bindings = block_on(ours.bindings(None)).unwrap();
                    match bindings.iter().find(|b| b.address.addr() == address) {
                        Some(b) => drop(block_on(ours.replace(&b.attachment, b.sequence, address, &why))),
                        None => drop(block_on(ours.quarantine(&AddressSpace::default(), address, &why))),
                    }
                }
                14 => drop(block_on(ours.release_empty_blocks()).unwrap()),
                _ => drop(clock.fetch_add(dice.below(4_000), Ordering::Relaxed)),
            }
            each_in_its_own(ours);
        }
        let found = block_on(nodes[0].check()).unwrap().findings;
        assert!(found.is_empty(), "seed {seed}: {found:#?}");
        let capacity = block_on(nodes[0].capacity()).unwrap();
        let application = dice.below(5);
        let counted = capacity.pools[0].for_application(&format!("shop/app{application}x"));
        let mut leased = 0;
        while lease(&nodes[1], &format!("last-{leased}"), Some(&format!("shop/app{application}x-9{leased}"))).is_ok() {
            leased += 1;
        }
        assert_eq!(counted, leased, "seed {seed}: {capacity:?}");
        (counts, more) = (counts + 1, more + u32::from(leased > 0));
    }
    assert!(more > counts / 2, "{more} of {counts} had an address left");
}

#[test]
fn a_store_that_fails_at_any_call_leaves_a_block_and_its_address_or_neither() {
    for failure in [Failure::After, Failure::Before, Failure::Lost] {
        for fail_at in 1.. {
            let inner: Arc<dyn Store> = Arc::new(MemoryStore::new());
            lease(&on(&inner, "a"), "web", Some("shop/web-0")).unwrap();
            let flaky = Arc::new(FlakyStore::new(inner.clone(), failure, fail_at));
            let store: Arc<dyn Store> = flaky.clone();
            let (ours, sound) = (on(&store, "a"), on(&inner, "a"));
            let result = lease(&ours, "db", Some("shop/db-0"));
            each_in_its_own(&sound);
            // A batch that was applied although nobody was told is found by the repetition.
            let bound = block_on(sound.bindings(None)).unwrap().len();
            assert!(bound == 2 || result.is_err(), "{failure:?} at {fail_at}: {result:?}");
            assert_eq!(
                owned(&sound).len(),
                bound,
                "{failure:?} at {fail_at}: a block without an address, or none for one"
            );
            assert_eq!(lease(&sound, "db", Some("shop/db-0")).unwrap(), ["10.0.0.4/27"]);
            release(&sound, "db");
            assert_eq!(block_on(sound.release_empty_blocks()).unwrap().len(), 1);
            assert_eq!(block_on(sound.check()).unwrap().findings, []);
            if flaky.calls() < fail_at {
                assert!(fail_at > 4, "{failure:?}: only {fail_at} calls");
                break;
            }
        }
    }
}

#[test]
fn a_block_that_its_application_does_not_find_is_listed_again() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = on(&store, "a");
    lease(&ours, "web", Some("shop/web-0")).unwrap();
    let row = block_on(store.scan(b"o/default/4/dmz/shop/web/", None, 9)).unwrap();
    assert_eq!(row.len(), 1);
    let stray = [b"o/default/4/dmz/shop/db/".to_vec(), 0x0280_0007_u128.to_be_bytes().to_vec()].concat();
    let writes = vec![Write::Delete(row[0].0.clone()), Write::Put(stray, Vec::new())];
    block_on(store.commit(&Batch { writes, request_id: 77, ..Batch::default() })).unwrap();
    let found = block_on(ours.check()).unwrap().findings;
    assert_eq!(found.len(), 2, "{found:#?}");
    block_on(ours.repair(&found)).unwrap();
    assert_eq!(block_on(ours.check()).unwrap().findings, []);
    assert_eq!(block_on(store.scan(b"o/", None, 9)).unwrap()[0].0, row[0].0);
    assert_eq!(lease(&ours, "web1", Some("shop/web-1")).unwrap(), ["10.0.0.2/27"]);
}

#[test]
fn a_firewall_gets_the_blocks_of_an_application_as_its_group() {
    each_store(|store, _| {
        let ours = on(&store, "a");
        let grouping = Grouping { cluster: Some("east".parse().unwrap()), blocks: true, ..Grouping::default() };
        let (web, db) = ("east/shop/web".parse().unwrap(), "east/shop/db".parse().unwrap());
        let mut groups = block_on(ours.groups(&grouping)).unwrap();
        let mut feed = GroupFeed::resume(&ours, &grouping, groups.clone()).unwrap();
        let mut updates = 0;
        for n in 0..9 {
            lease(&ours, &format!("web{n}"), Some(&format!("shop/web-{n}"))).unwrap();
            if n == 2 {
                lease(&ours, "db", Some("shop/db-0")).unwrap();
            }
            while let Some(update) = block_on(feed.next(Duration::ZERO)).unwrap() {
                groups.apply(&update);
                updates += 1;
            }
        }
        // Ten pods: four blocks, each told once.
        assert_eq!(updates, 4);
        assert_eq!(groups.text(&web, ListForm::Cover), "10.0.0.0/30\n10.0.0.8/29\n");
        assert_eq!(groups.text(&db, ListForm::default()), "10.0.0.4/30\n");
        let mut counted = block_on(ours.groups(&grouping)).unwrap();
        counted.revision = groups.revision;
        assert_eq!(counted, groups);
        for n in 0..3 {
            release(&ours, &format!("web{n}"));
        }
        assert_eq!(block_on(feed.next(Duration::ZERO)).unwrap(), None);
        assert_eq!(block_on(ours.release_empty_blocks()).unwrap().len(), 1);
        groups.apply(&block_on(feed.next(Duration::ZERO)).unwrap().unwrap());
        assert_eq!(groups.text(&web, ListForm::Cover), "10.0.0.8/29\n");
        // By addresses, as without.
        let each = block_on(ours.groups(&Grouping { blocks: false, ..grouping })).unwrap();
        assert_eq!(each.text(&db, ListForm::default()), "10.0.0.4/32\n");
    });
}
