//! Addresses that somebody outside uses.

use std::sync::Arc;
use std::thread;

use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::config::AddressRange;
use dcenet_ipam::model::{AddressSpace, KeepPolicy};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::flaky::{Failure, FlakyStore, MeetingStore, UnguardedStore};
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;

use crate::{attachment, config, each_store, ipam, lease, release, request};

const POOL: &str = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/28" } ] }"#;

fn range(text: &str) -> AddressRange {
    text.parse().unwrap()
}

fn holder(result: Result<impl std::fmt::Debug, LeaseError>) -> String {
    match result.unwrap_err() {
        LeaseError::Held { holder, .. } => holder,
        other => panic!("{other}"),
    }
}

fn ask(ipam: &dcenet_ipam::Ipam, container: &str, address: &str) -> Result<String, LeaseError> {
    let mut asked = request(container, None);
    asked.addresses = vec![address.parse().unwrap()];
    block_on(ipam.lease(&asked)).map(|lease| lease.addresses[0].address.to_string())
}

#[test]
fn addresses_reserved_by_the_configuration_go_to_nobody() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s",
            "reserved": [ { "addresses": ["10.0.0.1-10.0.0.4", "10.0.0.8/29"], "holder": "edge routers" },
                          { "addresses": ["10.0.0.6"], "holder": "blue", "space": "blue" } ],
            "pools": [ { "name": "p", "subnet": "10.0.0.0/28" } ] }"#;
        let ours = ipam(json, &store);
        for (container, address) in [("a", "10.0.0.5/28"), ("b", "10.0.0.6/28"), ("c", "10.0.0.7/28")] {
            assert_eq!(lease(&ours, container, None).unwrap(), [address]);
        }
        assert!(matches!(lease(&ours, "d", None).unwrap_err(), LeaseError::Exhausted { size: 3, .. }));
        assert_eq!(holder(ask(&ours, "d", "10.0.0.2")), "reservation edge routers");
        let (db, nine) = ("shop/db".parse().unwrap(), "10.0.0.9".parse().unwrap());
        let reserve = ours.reserve("p", &db, Some(nine), KeepPolicy::Forever);
        assert_eq!(holder(block_on(reserve)), "reservation edge routers");
    });
}

#[test]
fn wrong_reservations_are_refused_by_field() {
    let cases = [
        (
            r#"{ "addresses": ["10.0.0.9-10.0.0.3"], "holder": "x" }"#,
            "ipam.reserved[0].addresses[0]",
            "lower address first",
        ),
        (r#"{ "addresses": ["10.0.0.9-fd00::1"], "holder": "x" }"#, "ipam.reserved[0].addresses[0]", "two families"),
        (r#"{ "addresses": [], "holder": "x" }"#, "ipam.reserved[0].addresses", "nothing is reserved"),
        (r#"{ "addresses": ["10.0.0.9"], "holder": "" }"#, "ipam.reserved[0].holder", "name the holder"),
        (r#"{ "addresses": ["10.0.0.9"], "holder": "x", "space": "a b" }"#, "ipam.reserved[0].space", "a b"),
        (
            r#"{ "addresses": ["10.0.0.9"], "holder": "x" }, { "addresses": ["10.0.0.8/30"], "holder": "y" }"#,
            "ipam.reserved[1].addresses[0]",
            "taken by reservation x",
        ),
        (
            r#"{ "addresses": ["10.0.0.11"], "holder": "x" }"#,
            "ipam.pools[0].claims[\"a/b\"].address",
            "taken by reservation x",
        ),
        (
            r#"{ "addresses": ["10.0.0.0/28"], "holder": "x" }"#,
            "ipam.pools[0].claims[\"a/b\"].address",
            "reservation x",
        ),
    ];
    for (reserved, field, part) in cases {
        let json = format!(
            r#"{{ "reserved": [ {reserved} ], "pools": [ {{ "name": "p", "subnet": "10.0.0.0/28",
                 "claims": {{ "a/b": {{ "address": "10.0.0.11" }} }} }} ] }}"#
        );
        let error = config(&json).layout().unwrap_err();
        assert_eq!(error.field, field, "{error}");
        assert!(error.to_string().contains(part), "{error}\nlacks {part}");
    }
}

#[test]
fn a_recorded_reservation_binds_every_configuration_until_it_is_taken_back() {
    each_store(|store, _| {
        let (ours, space) = (ipam(POOL, &store), AddressSpace::default());
        let reserve = |text: &str, who: &str| block_on(ours.reserve_external(&space, range(text), who));
        // Before any lease registered the pool.
        assert!(reserve("10.0.0.1-10.0.0.3", "router").unwrap());
        assert!(!reserve("10.0.0.1-10.0.0.3", "router").unwrap());
        assert!(reserve("10.0.0.4", "firewall VIP").unwrap());
        assert!(reserve("10.0.0.8/29", "printers").unwrap());
        assert_eq!(holder(reserve("10.0.0.3-10.0.0.5", "other")), "reservation router");
        assert_eq!(holder(reserve("10.0.0.4", "other")), "reservation firewall VIP");
        for (container, address) in [("a", "10.0.0.5/28"), ("b", "10.0.0.6/28"), ("c", "10.0.0.7/28")] {
            assert_eq!(lease(&ipam(POOL, &store), container, None).unwrap(), [address]);
        }
        assert!(matches!(lease(&ours, "d", None).unwrap_err(), LeaseError::Exhausted { .. }));
        assert_eq!(holder(ask(&ours, "d", "10.0.0.2")), "reservation router");
        let claim = "shop/db".parse().unwrap();
        let reserved = ours.reserve("p", &claim, Some("10.0.0.4".parse().unwrap()), KeepPolicy::Forever);
        assert_eq!(holder(block_on(reserved)), "reservation firewall VIP");
        let listed = block_on(ours.reservations(&space)).unwrap();
        let listed: Vec<String> = listed.iter().map(|r| format!("{} {}", r.range, r.holder)).collect();
        assert_eq!(listed, ["10.0.0.1-10.0.0.3 router", "10.0.0.4 firewall VIP", "10.0.0.8-10.0.0.15 printers"]);

        let unreserve = |text: &str, who: &str| block_on(ours.unreserve_external(&space, range(text), who));
        assert!(!unreserve("10.0.0.1-10.0.0.2", "router").unwrap());
        assert_eq!(holder(unreserve("10.0.0.4", "router")), "reservation firewall VIP");
        assert!(unreserve("10.0.0.4", "firewall VIP").unwrap());
        assert!(!unreserve("10.0.0.4", "firewall VIP").unwrap());
        assert_eq!(lease(&ours, "d", None).unwrap(), ["10.0.0.4/28"]);
        // What was released before it was reserved is not used again either.
        release(&ours, "d");
        assert!(reserve("10.0.0.4", "router").unwrap());
        assert!(matches!(lease(&ours, "e", None).unwrap_err(), LeaseError::Exhausted { .. }));
    });
}

#[test]
fn what_is_in_use_or_kept_cannot_be_reserved() {
    each_store(|store, _| {
        let (ours, space) = (ipam(POOL, &store), AddressSpace::default());
        lease(&ours, "a", None).unwrap();
        block_on(ours.reserve(
            "p",
            &"shop/db".parse().unwrap(),
            Some("10.0.0.9".parse().unwrap()),
            KeepPolicy::Forever,
        ))
        .unwrap();
        let reserve = |text: &str| block_on(ours.reserve_external(&space, range(text), "router"));
        assert_eq!(holder(reserve("10.0.0.0-10.0.0.1")), "attachment net/a/eth0");
        assert_eq!(holder(reserve("10.0.0.2-10.0.0.14")), "claim shop/db");
        assert_eq!(block_on(ours.reservations(&space)).unwrap(), []);
        assert_eq!(lease(&ours, "b", None).unwrap(), ["10.0.0.2/28"]);
        assert!(matches!(
            block_on(ours.reserve_external(&space, range("10.0.0.9"), "")).unwrap_err(),
            LeaseError::Invalid { field, .. } if field == "holder"
        ));
        assert!(
            matches!(reserve("10.0.0.9-10.0.0.8").unwrap_err(), LeaseError::Invalid { field, .. } if field == "range")
        );
    });
}

#[test]
fn a_thousand_reservations_side_by_side_are_crossed() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/16" }, { "name": "q", "subnet": "fd00::/64" } ] }"#;
    let (ours, space) = (ipam(json, &store), AddressSpace::default());
    for i in 1..=1000_u32 {
        let one = format!("10.0.{}.{}", i / 256, i % 256);
        block_on(ours.reserve_external(&space, range(&one), &format!("host {i}"))).unwrap();
    }
    block_on(ours.reserve_external(&space, range("fd00::-fd00::7fff:ffff:ffff:ffff"), "lab")).unwrap();
    assert_eq!(lease(&ours, "a", None).unwrap(), ["10.0.3.233/16", "fd00::8000:0:0:0/64"]);
    assert_eq!(holder(ask(&ours, "b", "10.0.3.231")), "reservation host 999");
}

/// A lease and a reservation of the address that it takes, the lease having been decided before.
fn lease_beside_reservation(store: &Arc<dyn Store>) -> (Result<Vec<String>, LeaseError>, Result<bool, LeaseError>) {
    let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24", "ranges": ["10.0.0.1-10.0.0.2"] } ] }"#;
    block_on(ipam(json, store).ready()).unwrap();
    let meeting: Arc<dyn Store> = MeetingStore::over(store.clone(), b"");
    thread::scope(|scope| {
        let lessee = scope.spawn(|| lease(&ipam(json, &meeting), "c1", None));
        let space = AddressSpace::default();
        let reserved = block_on(ipam(json, &meeting).reserve_external(&space, range("10.0.0.1"), "router"));
        (lessee.join().unwrap(), reserved)
    })
}

#[test]
fn a_lease_and_a_reservation_at_once_do_not_share_an_address() {
    each_store(|store, _| {
        let (leased, reserved) = lease_beside_reservation(&store);
        match (leased.unwrap()[0].as_str(), reserved) {
            ("10.0.0.1/24", reserved) => assert_eq!(holder(reserved), "attachment net/c1/eth0"),
            ("10.0.0.2/24", reserved) => assert!(reserved.unwrap()),
            (other, reserved) => panic!("{other} {reserved:?}"),
        }
    });
}

#[test]
fn without_the_spaces_guard_a_lease_decided_before_lands_on_a_reservation() {
    let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#;
    let memory: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let unguarded: Arc<dyn Store> = Arc::new(UnguardedStore::new(memory.clone(), |g| g.key.starts_with(b"e/")));
    for (store, shared) in [(unguarded, true), (Arc::new(MemoryStore::new()) as Arc<dyn Store>, false)] {
        block_on(ipam(json, &store).ready()).unwrap();
        // The lease is decided, then the reservation is made and looked over, then the lease commits.
        let late = crate::races::LateStore::over(store.clone(), b"t/");
        let given = thread::scope(|scope| {
            let lessee = scope.spawn(|| lease(&ipam(json, &late.store()), "c1", None).unwrap());
            late.wait_for_commit();
            let router = range("10.0.0.1");
            block_on(ipam(json, &store).reserve_external(&AddressSpace::default(), router, "router")).unwrap();
            late.let_go();
            lessee.join().unwrap()
        });
        assert_eq!(given[0] == "10.0.0.1/24", shared, "{given:?}");
        assert_eq!(block_on(ipam(json, &store).held(&attachment("c1"))).unwrap().unwrap().addresses.len(), 1);
    }
}

#[test]
fn a_claim_whose_address_was_reserved_meanwhile_gets_another() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(POOL, &store);
    block_on(ours.reserve("p", &"shop/db".parse().unwrap(), None, KeepPolicy::Forever)).unwrap();
    assert_eq!(lease(&ours, "a", Some("shop/db")).unwrap(), ["10.0.0.1/28"]);
    release(&ours, "a");
    // The reservation is recorded, and whoever made it could not look it over, nor take it back.
    let space = AddressSpace::default();
    for call in 1.. {
        let lame: Arc<dyn Store> = Arc::new(FlakyStore::new(store.clone(), Failure::Before, call));
        assert!(block_on(ipam(POOL, &lame).reserve_external(&space, range("10.0.0.1"), "router")).is_err());
        if !block_on(ours.reservations(&space)).unwrap().is_empty() {
            break;
        }
        assert!(call < 20, "no call left it recorded");
    }
    assert_eq!(lease(&ours, "b", Some("shop/db")).unwrap(), ["10.0.0.2/28"]);
    assert_eq!(holder(ask(&ours, "c", "10.0.0.1")), "reservation router");
}

#[test]
fn a_claim_moves_from_what_the_configuration_reserves() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/28", "claims": { "shop/db": {} } } ] }"#;
        assert_eq!(lease(&ipam(json, &store), "a", Some("shop/db")).unwrap(), ["10.0.0.1/28"]);
        let reserved = r#""reserved": [ { "addresses": ["10.0.0.1"], "holder": "router" } ], "pools""#;
        let ours = ipam(&json.replace(r#""pools""#, reserved), &store);
        // In use it stays.
        assert!(matches!(lease(&ours, "b", Some("shop/db")), Err(LeaseError::Held { .. })));
        release(&ours, "a");
        assert_eq!(lease(&ours, "b", Some("shop/db")).unwrap(), ["10.0.0.2/28"]);
        assert_eq!(block_on(ours.usage()).unwrap()[0].kept, 0);
    });
}

#[test]
fn a_repeated_reservation_is_not_taken_back_for_what_it_finds() {
    each_store(|store, _| {
        let ours = ipam(POOL, &store);
        let space = AddressSpace::default();
        assert!(block_on(ours.reserve_external(&space, range("10.0.0.3-10.0.0.6"), "router")).unwrap());
        assert!(!block_on(ours.reserve_external(&space, range("10.0.0.3-10.0.0.6"), "router")).unwrap());
        // As what an older release or a tool by hand would leave.
        let mut key = b"s/default/4".to_vec();
        key.extend(u128::from(u32::from(std::net::Ipv4Addr::new(10, 0, 0, 4))).to_be_bytes());
        let value = br#"{"bound":{"by":"net/stray/eth0"}}"#.to_vec();
        let stray = dcenet_ipam::store::Batch {
            writes: vec![dcenet_ipam::store::Write::Put(key, value)],
            request_id: 78,
            ..Default::default()
        };
        block_on(store.commit(&stray)).unwrap();
        let again = block_on(ours.reserve_external(&space, range("10.0.0.3-10.0.0.6"), "router"));
        assert_eq!(holder(again), "attachment net/stray/eth0");
        assert_eq!(block_on(ours.reservations(&space)).unwrap().len(), 1, "it stands");
        assert_eq!(holder(ask(&ours, "x", "10.0.0.3")), "reservation router");
        // One that is new goes again.
        let new = block_on(ours.reserve_external(&AddressSpace::default(), range("10.0.0.7-10.0.0.9"), "other"));
        assert!(new.unwrap());
    });
}
