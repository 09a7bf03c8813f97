//! Claims as a user sees them: what is kept, for whom, for how long, and where.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dcenet_core::model::ClusterId;
use dcenet_core::model::LabelSet;
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Ipam;
use dcenet_ipam::model::{AddressSpace, Claim, ClaimKey, KeepPolicy, MacWish};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::flaky::{Failure, FlakyStore};
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;

use crate::{attachment, config, each_store, ipam, lease, release, request};

/// A clock that a test moves.
#[derive(Clone)]
pub(crate) struct Clock(Arc<AtomicU64>);

impl Clock {
    pub(crate) fn new() -> Self {
        Self(Arc::new(AtomicU64::new(1_000_000_000)))
    }

    pub(crate) fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds * 1000, Ordering::Relaxed);
    }

    pub(crate) fn drive(&self, ipam: Ipam) -> Ipam {
        let clock = self.clone();
        ipam.with_clock(move || clock.now())
    }
}

pub(crate) fn key(text: &str) -> ClaimKey {
    text.parse().unwrap()
}

pub(crate) fn space() -> AddressSpace {
    AddressSpace::default()
}

const HOUR: u64 = 3600;

/// A pool of two addresses and one claim that keeps what it got.
fn two(keep: &str) -> String {
    format!(
        r#"{{ "cooldown": "5s", "pools": [ {{ "name": "p", "subnet": "10.0.0.0/24", "ranges": ["10.0.0.1-10.0.0.2"],
             "claims": {{ "shop/db": {{ "keep": {keep} }} }} }} ] }}"#
    )
}

#[test]
fn an_address_kept_for_a_time_is_its_claims_until_then_and_anybodys_afterwards() {
    for keep in [r#""72h""#, r#"{ "for": "72h" }"#] {
        each_store(|store, _| {
            let clock = Clock::new();
            let ipam = clock.drive(ipam(&two(keep), &store));
            assert_eq!(lease(&ipam, "c1", Some("shop/db")).unwrap(), ["10.0.0.1/24"]);
            release(&ipam, "c1");
            assert_eq!(lease(&ipam, "other", None).unwrap(), ["10.0.0.2/24"]);
            clock.advance(71 * HOUR);
            assert!(matches!(lease(&ipam, "more", None).unwrap_err(), LeaseError::Exhausted { .. }));
            assert_eq!(block_on(ipam.usage()).unwrap()[0].kept, 1);
            // A restart within the time begins it anew.
            assert_eq!(lease(&ipam, "c2", Some("shop/db")).unwrap(), ["10.0.0.1/24"]);
            release(&ipam, "c2");
            clock.advance(71 * HOUR);
            assert!(lease(&ipam, "more", None).is_err());
            clock.advance(HOUR);
            // It counts as released now, and cools like every other.
            assert!(lease(&ipam, "more", None).is_err());
            let usage = block_on(ipam.usage()).unwrap().remove(0);
            assert_eq!((usage.kept, usage.cooling), (0, 1));
            clock.advance(6);
            assert_eq!(lease(&ipam, "more", None).unwrap(), ["10.0.0.1/24"]);
            // The claim takes another, once there is one.
            assert!(matches!(lease(&ipam, "c3", Some("shop/db")).unwrap_err(), LeaseError::Exhausted { .. }));
            release(&ipam, "other");
            clock.advance(6);
            assert_eq!(lease(&ipam, "c3", Some("shop/db")).unwrap(), ["10.0.0.2/24"]);
            assert_eq!(block_on(ipam.bindings(None)).unwrap().len(), 2);
        });
    }
}

#[test]
fn a_claim_finds_its_expired_address_again_where_nobody_took_it() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(&two(r#""1h""#), &store));
        lease(&ipam, "c1", Some("shop/db")).unwrap();
        release(&ipam, "c1");
        clock.advance(100 * HOUR);
        assert_eq!(lease(&ipam, "c2", Some("shop/db")).unwrap(), ["10.0.0.1/24"]);
        release(&ipam, "c2");
        clock.advance(2 * HOUR);
        // A sweep makes it a released address and ends the claim.
        assert_eq!(block_on(ipam.expire()).unwrap(), 1);
        assert_eq!(block_on(ipam.expire()).unwrap(), 0);
        assert_eq!(block_on(ipam.claims()).unwrap(), []);
        clock.advance(6);
        assert_eq!(lease(&ipam, "a", None).unwrap(), ["10.0.0.2/24"]);
        assert_eq!(lease(&ipam, "b", None).unwrap(), ["10.0.0.1/24"]);
    });
}

#[test]
fn a_clock_that_jumps_hastens_the_end_of_keeping_and_never_makes_two_holders() {
    each_store(|store, _| {
        let (ours, fast) = (Clock::new(), Clock::new());
        fast.advance(1000 * HOUR);
        let slow_ipam = ours.drive(ipam(&two(r#""72h""#), &store));
        let fast_ipam = fast.drive(ipam(&two(r#""72h""#), &store));
        lease(&slow_ipam, "c1", Some("shop/db")).unwrap();
        // In use it is nobody else's, whatever a clock says.
        assert_eq!(lease(&fast_ipam, "a", None).unwrap(), ["10.0.0.2/24"]);
        assert!(lease(&fast_ipam, "b", None).is_err());
        release(&slow_ipam, "c1");
        assert_eq!(lease(&fast_ipam, "b", None).unwrap(), ["10.0.0.1/24"]);
        assert!(lease(&slow_ipam, "c2", Some("shop/db")).is_err());
        let held: BTreeSet<String> =
            block_on(slow_ipam.bindings(None)).unwrap().iter().map(|b| b.address.to_string()).collect();
        assert_eq!(held.len(), 2);
    });
}

#[test]
fn an_address_kept_for_a_workload_goes_when_somebody_says_that_it_is_gone() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(&two(r#""workload""#), &store));
        let db = "shop/db".parse().unwrap();
        assert_eq!(lease(&ipam, "c1", Some("shop/db")).unwrap(), ["10.0.0.1/24"]);
        release(&ipam, "c1");
        clock.advance(10_000 * HOUR);
        lease(&ipam, "a", None).unwrap();
        assert!(lease(&ipam, "b", None).is_err());
        assert_eq!(block_on(ipam.workload_gone(&"shop/d".parse().unwrap())).unwrap(), 0);
        assert_eq!(block_on(ipam.workload_gone(&db)).unwrap(), 1);
        assert_eq!(block_on(ipam.workload_gone(&db)).unwrap(), 0);
        clock.advance(6);
        assert_eq!(lease(&ipam, "b", None).unwrap(), ["10.0.0.1/24"]);
        release(&ipam, "b");
        clock.advance(6);
        // Said while it still runs, it holds once nothing is attached; a new start takes the word back.
        assert_eq!(lease(&ipam, "c2", Some("shop/db")).unwrap(), ["10.0.0.1/24"]);
        assert_eq!(block_on(ipam.workload_gone(&db)).unwrap(), 1);
        assert!(lease(&ipam, "b", None).is_err());
        release(&ipam, "c2");
        clock.advance(6);
        assert_eq!(lease(&ipam, "b", None).unwrap(), ["10.0.0.1/24"]);
        assert_eq!(block_on(ipam.claims()).unwrap(), []);
    });
}

const SETS: &str = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/24", "claims": {
    "shop/pg-*":  { "members": "ordinal", "addresses": ["10.0.0.20-10.0.0.21", "10.0.0.9"] },
    "shop/log-*": { "members": "ordinal" },
    "shop/web-*": { "members": "replica", "addresses": ["10.0.0.30-10.0.0.31"] } } } ] }"#;

#[test]
fn ordinals_keep_their_addresses_over_scaling_down_and_up() {
    each_store(|store, _| {
        let ipam = ipam(SETS, &store);
        let addresses = ["10.0.0.20/24", "10.0.0.21/24", "10.0.0.9/24"];
        for (i, address) in addresses.iter().enumerate() {
            assert_eq!(lease(&ipam, &format!("a{i}"), Some(&format!("shop/pg-{i}"))).unwrap(), [*address]);
        }
        // Down to one, everything else comes and goes, up again in another order.
        release(&ipam, "a2");
        release(&ipam, "a1");
        let others: Vec<String> = (0..30).flat_map(|i| lease(&ipam, &format!("o{i}"), None).unwrap()).collect();
        assert!(addresses.iter().all(|a| !others.iter().any(|o| o == a)), "{others:?}");
        assert_eq!(lease(&ipam, "b2", Some("shop/pg-2")).unwrap(), ["10.0.0.9/24"]);
        assert_eq!(lease(&ipam, "b1", Some("shop/pg-1")).unwrap(), ["10.0.0.21/24"]);
        let refused = lease(&ipam, "a3", Some("shop/pg-3")).unwrap_err();
        let LeaseError::Invalid { field, reason } = refused else { panic!("{refused}") };
        assert_eq!(field, r#"ipam.pools[0].claims["shop/pg-*"].addresses"#);
        assert_eq!(reason, "there are 3, for ordinals 0 to 2, and none for shop/pg-3; add addresses or scale down");
    });
}

#[test]
fn ordinals_without_addresses_keep_whichever_they_got_first() {
    each_store(|store, _| {
        let ipam = ipam(SETS, &store);
        let first = lease(&ipam, "l0", Some("shop/log-0")).unwrap();
        let second = lease(&ipam, "l1", Some("shop/log-1")).unwrap();
        release(&ipam, "l0");
        release(&ipam, "l1");
        lease(&ipam, "other", None).unwrap();
        assert_eq!(lease(&ipam, "m1", Some("shop/log-1")).unwrap(), second);
        assert_eq!(lease(&ipam, "m0", Some("shop/log-0")).unwrap(), first);
    });
}

#[test]
fn replicas_share_the_addresses_of_their_set_and_one_too_many_is_told_so() {
    each_store(|store, _| {
        let ipam = ipam(SETS, &store);
        assert_eq!(lease(&ipam, "w0", Some("shop/web-7d9f8c6b5-x2x4z")).unwrap(), ["10.0.0.30/24"]);
        assert_eq!(lease(&ipam, "w1", Some("shop/web-7d9f8c6b5-bbbbb")).unwrap(), ["10.0.0.31/24"]);
        let refused = lease(&ipam, "w2", Some("shop/web-7d9f8c6b5-ccccc")).unwrap_err();
        assert!(refused.is_retryable());
        let LeaseError::Exhausted { pool, size } = refused else { panic!("{refused}") };
        assert_eq!((pool.as_str(), size), ("p (claim set shop/web-*)", 2));
        // The next generation of pods takes over, and the addresses are nobody else's in between.
        release(&ipam, "w0");
        let theirs = lease(&ipam, "x", None).unwrap();
        assert_ne!(theirs, ["10.0.0.30/24"]);
        assert_eq!(lease(&ipam, "w3", Some("shop/web-58fcd-kkkkk")).unwrap(), ["10.0.0.30/24"]);
        // A Deployment whose name begins alike is another.
        let admin = lease(&ipam, "w4", Some("shop/web-admin-58fcd-kkkkk")).unwrap();
        assert!(!["10.0.0.30/24", "10.0.0.31/24"].contains(&admin[0].as_str()), "{admin:?}");
    });
}

#[test]
fn replicas_that_start_at_once_get_an_address_each() {
    each_store(|store, _| {
        let json = SETS.replace("10.0.0.30-10.0.0.31", "10.0.0.30-10.0.0.45");
        let mut got: Vec<String> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..16)
                .map(|i| {
                    let (json, store) = (&json, &store);
                    let random = char::from(b"bcdfghjklmnpqrst"[i]);
                    scope.spawn(move || {
                        let workload = format!("shop/web-7d9f8-{random}bcdf");
                        lease(&ipam(json, store), &format!("w{i}"), Some(&workload)).unwrap().remove(0)
                    })
                })
                .collect();
            starts.into_iter().map(|s| s.join().unwrap()).collect()
        });
        got.sort();
        got.dedup();
        assert_eq!(got.len(), 16);
    });
}

#[test]
fn a_claim_follows_its_workload_to_another_node_and_a_renamed_one_its_name() {
    each_store(|store, _| {
        let json = two(r#""forever""#);
        let on = |node: &str| ipam(&json, &store).on_node(node.parse().unwrap(), LabelSet::new());
        let (one, other) = (on("node-1"), on("node-2"));
        let address = lease(&one, "c1", Some("shop/db")).unwrap();
        // The pod cannot be on two nodes.
        assert!(matches!(lease(&other, "c2", Some("shop/db")).unwrap_err(), LeaseError::Held { .. }));
        release(&one, "c1");
        assert_eq!(lease(&other, "c2", Some("shop/db")).unwrap(), address);
        assert_eq!(block_on(one.bindings(None)).unwrap()[0].node, Some("node-2".parse().unwrap()));

        // Renamed while attached: the release keeps it for the new name.
        let plain = ipam(&json.replace("shop/db", "shop/x"), &store);
        assert!(block_on(plain.rename_claim(&space(), &key("shop/db"), &key("shop/store"))).unwrap());
        assert!(!block_on(plain.rename_claim(&space(), &key("shop/db"), &key("shop/store"))).unwrap());
        release(&other, "c2");
        assert_eq!(lease(&plain, "c3", Some("shop/store")).unwrap(), address);
        assert_ne!(lease(&plain, "c4", Some("shop/x")).unwrap(), address);
        let taken = block_on(plain.rename_claim(&space(), &key("shop/store"), &key("shop/x"))).unwrap_err();
        assert!(matches!(&taken, LeaseError::Held { holder, .. } if holder == "claim shop/x"), "{taken}");
        let same = block_on(plain.rename_claim(&space(), &key("shop/x"), &key("shop/x"))).unwrap_err();
        assert!(matches!(&same, LeaseError::Invalid { field, .. } if field == "to"), "{same}");
    });
}

#[test]
fn a_mac_address_stays_with_its_claim() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/24", "claims": {
            "shop/vm": { "address": "10.0.0.7", "mac": "02:00:00:00:00:07" }, "shop/db": { "mac": "from-address" } } } ] }"#;
        let ipam = ipam(json, &store);
        let mac = |container: &str, workload: Option<&str>| {
            block_on(ipam.lease(&request(container, workload))).unwrap().mac.map(|mac| mac.to_string())
        };
        assert_eq!(mac("c0", None), None);
        for container in ["c1", "c2"] {
            assert_eq!(mac(container, Some("shop/vm")).as_deref(), Some("02:00:00:00:00:07"));
            assert_eq!(mac(container, Some("shop/vm")).as_deref(), Some("02:00:00:00:00:07"), "asked again");
            let held = block_on(ipam.held(&attachment(container))).unwrap().unwrap();
            assert_eq!(held.mac.unwrap().to_string(), "02:00:00:00:00:07");
            release(&ipam, container);
        }
        assert_eq!(mac("c3", Some("shop/db")).as_deref(), Some("0a:58:0a:00:00:02"));
        // Recorded at run time, by a virtual machine or a process of any name.
        let claim = Claim {
            key: key("vms/legacy"),
            address: None,
            keep: KeepPolicy::Forever,
            mac: Some("02:00:00:00:00:09".parse::<MacWish>().unwrap()),
        };
        block_on(ipam.record_claim("p", &claim)).unwrap();
        assert_eq!(mac("qemu-4711", Some("vms/legacy")).as_deref(), Some("02:00:00:00:00:09"));
    });
}

fn cluster(name: &str) -> ClusterId {
    name.parse().unwrap()
}

#[test]
fn a_claim_moves_between_clusters_and_is_live_in_one_at_a_time() {
    let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/29" },
                                                  { "name": "six", "subnet": "fd00::/64" } ] }"#;
    each_store(|store, _| {
        let others: [Arc<dyn Store>; 2] = [Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new())];
        let (a, b, c) = (ipam(json, &store), ipam(json, &others[0]), ipam(json, &others[1]));
        let db = key("shop/db");
        block_on(a.reserve("p", &db, Some("10.0.0.5".parse().unwrap()), KeepPolicy::Forever)).unwrap();
        block_on(a.reserve("six", &db, Some("fd00::5".parse().unwrap()), KeepPolicy::Forever)).unwrap();
        let both = ["10.0.0.5/29", "fd00::5/64"];
        assert_eq!(lease(&a, "c1", Some("shop/db")).unwrap(), both);
        // Not while it is used.
        let used = block_on(a.hand_out(&space(), &db, &cluster("b"))).unwrap_err();
        assert!(matches!(&used, LeaseError::Held { holder, .. } if holder.contains("net/c1/eth0")), "{used}");
        release(&a, "c1");
        assert_eq!(block_on(a.hand_out(&space(), &key("shop/none"), &cluster("b"))).unwrap(), None);
        let export = block_on(a.hand_out(&space(), &db, &cluster("b"))).unwrap().unwrap();
        // Lost on the way and asked for again, it is the same; a third cluster gets none.
        assert_eq!(block_on(a.hand_out(&space(), &db, &cluster("b"))).unwrap().unwrap(), export);
        assert!(matches!(block_on(a.hand_out(&space(), &db, &cluster("c"))).unwrap_err(), LeaseError::Held { .. }));
        let away = lease(&a, "c1", Some("shop/db")).unwrap_err();
        assert!(matches!(&away, LeaseError::Held { holder, .. } if holder.contains("cluster b")), "{away}");
        assert!(matches!(block_on(a.forget(&space(), &db)).unwrap_err(), LeaseError::Held { .. }));
        for i in 0..5 {
            lease(&a, &format!("fill{i}"), None).unwrap();
        }
        assert!(matches!(lease(&a, "one-more", None).unwrap_err(), LeaseError::Exhausted { .. }), "it is kept there");

        let export: dcenet_ipam::ClaimExport = serde_json::from_str(&serde_json::to_string(&export).unwrap()).unwrap();
        assert!(
            matches!(block_on(c.hand_in(&export, &cluster("c"))).unwrap_err(), LeaseError::Invalid { field, .. } if field == "to")
        );
        block_on(b.hand_in(&export, &cluster("b"))).unwrap();
        block_on(b.hand_in(&export, &cluster("b"))).unwrap();
        assert_eq!(lease(&b, "c1", Some("shop/db")).unwrap(), both);
        release(&b, "c1");

        // On to c: the old export is worth nothing any more.
        let onward = block_on(b.hand_out(&space(), &db, &cluster("c"))).unwrap().unwrap();
        let old = block_on(b.hand_in(&export, &cluster("b"))).unwrap_err();
        assert!(matches!(&old, LeaseError::Invalid { field, .. } if field == "moves"), "{old}");
        block_on(c.hand_in(&onward, &cluster("c"))).unwrap();
        assert_eq!(lease(&c, "c1", Some("shop/db")).unwrap(), both);
        for cluster in [&a, &b] {
            assert!(lease(cluster, "c9", Some("shop/db")).is_err());
        }
        release(&c, "c1");
        // And home.
        let home = block_on(c.hand_out(&space(), &db, &cluster("a"))).unwrap().unwrap();
        block_on(a.hand_in(&home, &cluster("a"))).unwrap();
        assert_eq!(lease(&a, "c2", Some("shop/db")).unwrap(), both);
        assert!(lease(&c, "c9", Some("shop/db")).is_err());
    });
}

#[test]
fn what_is_handed_in_must_be_free_and_of_a_pool_here() {
    each_store(|store, _| {
        let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/29" } ] }"#;
        let elsewhere: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let (a, b) = (ipam(json, &store), ipam(json, &elsewhere));
        let db = key("shop/db");
        block_on(a.reserve("p", &db, Some("10.0.0.1".parse().unwrap()), KeepPolicy::Forever)).unwrap();
        let export = block_on(a.hand_out(&space(), &db, &cluster("b"))).unwrap().unwrap();
        let narrow = ipam(r#"{ "pools": [ { "name": "q", "subnet": "10.1.0.0/29" } ] }"#, &elsewhere);
        let missing = block_on(narrow.hand_in(&export, &cluster("b"))).unwrap_err();
        assert!(missing.to_string().contains("add a pool"), "{missing}");
        assert_eq!(lease(&b, "first", None).unwrap(), ["10.0.0.1/29"]);
        let taken = block_on(b.hand_in(&export, &cluster("b"))).unwrap_err();
        assert!(matches!(&taken, LeaseError::Held { holder, .. } if holder == "attachment net/first/eth0"), "{taken}");
        // The other cluster is lost for good: somebody vouches for it.
        assert!(block_on(a.take_back(&space(), &db)).unwrap());
        assert!(!block_on(a.take_back(&space(), &db)).unwrap());
        assert_eq!(lease(&a, "c1", Some("shop/db")).unwrap(), ["10.0.0.1/29"]);
    });
}

#[test]
fn sets_and_keep_policies_that_make_no_sense_are_refused_with_field_value_and_remedy() {
    let cases = [
        (r#""shop/a-*": {}"#, r#"claims["shop/a-*"]"#, "add members"),
        (r#""shop/a-*": { "members": "replica" }"#, r#"claims["shop/a-*"]"#, "write addresses"),
        (
            r#""shop/a-*": { "members": "ordinal", "address": "10.0.0.3" }"#,
            r#"claims["shop/a-*"].address"#,
            "\"10.0.0.3\"",
        ),
        (
            r#""shop/a-*": { "members": "ordinal", "mac": "02:00:00:00:00:01" }"#,
            r#"claims["shop/a-*"].mac"#,
            "from-address",
        ),
        (r#""shop/a": { "addresses": ["10.0.0.3"] }"#, r#"claims["shop/a"].addresses"#, "name-*"),
        (r#""shop/a": { "members": "ordinal" }"#, r#"claims["shop/a"].members"#, "name-*"),
        (r#""shop/a#1": {}"#, r#"claims["shop/a#1"]"#, "made by the set"),
        (
            r#""shop/a-*": { "members": "ordinal", "addresses": ["10.0.0.3-10.0.0.5", "10.0.0.4"] }"#,
            r#"claims["shop/a-*"].addresses[1]"#,
            "\"10.0.0.4\" is taken by claim shop/a-*",
        ),
        (
            r#""shop/a-*": { "members": "ordinal", "addresses": ["10.0.0.255"] }"#,
            r#"claims["shop/a-*"].addresses[0]"#,
            "the broadcast address",
        ),
        (
            r#""shop/a-*": { "members": "ordinal", "addresses": ["10.0.1.1"] }"#,
            r#"claims["shop/a-*"].addresses[0]"#,
            "not in the pool's subnet",
        ),
        (
            r#""shop/a-*": { "members": "ordinal", "addresses": ["10.0.0.9-10.0.0.3"] }"#,
            r#"claims["shop/a-*"].addresses[0]"#,
            "lower address first",
        ),
        (
            r#""shop/a-0": {}, "shop/a-*": { "members": "ordinal", "addresses": ["10.0.0.3"] }"#,
            r#"claims["shop/a-0"]"#,
            "another claim or set",
        ),
        (
            r#""shop/a": { "mac": "02:00:00:00:00:01" }, "shop/b": { "mac": "02:00:00:00:00:01" }"#,
            r#"claims["shop/b"]"#,
            "taken by claim shop/a",
        ),
    ];
    for (claims, field, part) in cases {
        let json =
            format!(r#"{{ "pools": [ {{ "name": "p", "subnet": "10.0.0.0/24", "claims": {{ {claims} }} }} ] }}"#);
        let error = config(&json).layout().unwrap_err();
        assert_eq!(error.field, format!("ipam.pools[0].{field}"));
        assert!(error.to_string().contains(part), "{error}");
    }
    let wide = r#"{ "pools": [ { "name": "p", "subnet": "fd00::/64", "claims": {
        "shop/a-*": { "members": "ordinal", "addresses": ["fd00::/64"] } } } ] }"#;
    assert!(config(wide).layout().unwrap_err().to_string().contains("at most 1024"));
    let history = r#"{ "history": { "count": 1 }, "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#;
    assert_eq!(config(history).layout().unwrap_err().field, "ipam.history.count");
}

#[test]
fn what_is_handed_in_is_a_whole_prefix_and_fixed_for_nobody_else() {
    each_store(|store, _| {
        let elsewhere = || -> Arc<dyn Store> { Arc::new(MemoryStore::new()) };
        let prefixes = |length: u8| {
            format!(r#"{{ "pools": [ {{ "name": "p", "subnet": "fd00::/48", "delegate": {length} }} ] }}"#)
        };
        let (a, b) = (ipam(&prefixes(80), &store), ipam(&prefixes(64), &elsewhere()));
        let db = key("shop/db");
        block_on(a.reserve("p", &db, Some("fd00::1:0:0:1".parse().unwrap()), KeepPolicy::Forever)).unwrap();
        let export = block_on(a.hand_out(&space(), &db, &cluster("b"))).unwrap().unwrap();
        let part = block_on(b.hand_in(&export, &cluster("b"))).unwrap_err();
        assert!(part.to_string().contains("ask for fd00::1"), "{part}");

        let json = r#"{ "pools": [ { "name": "q", "subnet": "10.0.0.0/29", "claims": {
            "shop/db": { "address": "10.0.0.5", "keep": "ephemeral" } } } ] }"#;
        let own = elsewhere();
        let plain = ipam(r#"{ "pools": [ { "name": "q", "subnet": "10.0.0.0/29" } ] }"#, &own);
        for (claim, fixed) in [("shop/other", false), ("shop/db", true)] {
            let claim = key(claim);
            block_on(plain.reserve("q", &claim, Some("10.0.0.5".parse().unwrap()), KeepPolicy::Forever)).unwrap();
            let export = block_on(plain.hand_out(&space(), &claim, &cluster("b"))).unwrap().unwrap();
            let taken_in = block_on(ipam(json, &elsewhere()).hand_in(&export, &cluster("b")));
            if fixed {
                taken_in.unwrap();
            } else {
                let taken = taken_in.unwrap_err();
                assert!(matches!(&taken, LeaseError::Held { holder, .. } if holder == "claim shop/db"), "{taken}");
            }
            block_on(plain.take_back(&space(), &claim)).unwrap();
            block_on(plain.forget(&space(), &claim)).unwrap();
        }
    });
}

#[test]
fn a_claim_recorded_again_is_kept_as_long_as_is_said_now() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(&two(r#""1h""#).replace("shop/db", "shop/none"), &store));
        let (db, hour) = (key("shop/db"), KeepPolicy::For(std::time::Duration::from_secs(HOUR)));
        let reserve = |keep| block_on(ipam.reserve("p", &db, Some("10.0.0.1".parse().unwrap()), keep)).unwrap();
        reserve(hour);
        assert_eq!(lease(&ipam, "c1", Some("shop/db")).unwrap(), ["10.0.0.1/24"]);
        release(&ipam, "c1");
        reserve(KeepPolicy::Forever);
        clock.advance(2 * HOUR);
        assert_eq!(block_on(ipam.expire()).unwrap(), 0);
        assert_eq!(lease(&ipam, "a", None).unwrap(), ["10.0.0.2/24"]);
        let refused = lease(&ipam, "b", None).unwrap_err();
        assert!(matches!(refused, LeaseError::Exhausted { .. }), "{refused}");
        // And back again.
        reserve(hour);
        clock.advance(HOUR - 1);
        assert!(lease(&ipam, "b", None).is_err());
        reserve(hour);
        clock.advance(HOUR - 1);
        assert!(lease(&ipam, "b", None).is_err());
        clock.advance(7);
        assert_eq!(lease(&ipam, "b", None).unwrap(), ["10.0.0.1/24"]);
    });
}

#[test]
fn a_place_of_a_set_that_nobody_may_have_is_passed_over() {
    each_store(|store, _| {
        let replica = ["shop/web-7d9f8c6b5-x2x4z", "shop/web-7d9f8c6b5-bbbbb"];
        let next = |ipam: &Ipam, when: &str| {
            let got = lease(ipam, "w0", Some(replica[0])).unwrap_or_else(|refused| panic!("{when}: {refused}"));
            assert_eq!(got, ["10.0.0.31/24"], "{when}");
            let full = lease(ipam, "w1", Some(replica[1])).unwrap_err();
            assert!(matches!(full, LeaseError::Exhausted { .. }), "{when}: {full}");
            release(ipam, "w0");
        };
        let (away, place) = (ipam(SETS, &store), key("shop/web#0"));
        block_on(away.ready()).unwrap();
        block_on(away.hand_out(&space(), &place, &cluster("b"))).unwrap().unwrap();
        next(&away, "away");
        block_on(away.take_back(&space(), &place)).unwrap();
        assert_eq!(lease(&away, "w2", Some(replica[1])).unwrap(), ["10.0.0.30/24"]);

        let fresh = || -> Arc<dyn Store> { Arc::new(MemoryStore::new()) };
        let reserved = SETS.replacen('{', r#"{ "reserved": [ { "addresses": ["10.0.0.30"], "holder": "x" } ],"#, 1);
        next(&ipam(&reserved, &fresh()), "reserved by the configuration");
        let recorded = ipam(&SETS.replace(r#""replica","#, r#""replica", "keep": "ephemeral","#), &fresh());
        block_on(recorded.reserve_external(&space(), "10.0.0.30".parse().unwrap(), "x")).unwrap();
        next(&recorded, "reserved in the store");
    });
}

#[test]
fn what_comes_back_to_a_claim_is_kept_for_its_time_and_no_longer() {
    each_store(|store, _| {
        let clock = Clock::new();
        let home = clock.drive(ipam(&two(r#""1h""#), &store));
        let elsewhere: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let away = clock.drive(ipam(&two(r#""1h""#), &elsewhere));
        let (db, b, own) = (key("shop/db"), cluster("b"), "10.0.0.1".parse().unwrap());
        let begin = || {
            assert_eq!(lease(&home, "db", Some("shop/db")).unwrap(), ["10.0.0.1/24"]);
            release(&home, "db");
        };
        let is_kept_for_its_time = |ipam: &Ipam, when: &str| {
            assert_eq!(lease(ipam, "a", None).unwrap(), ["10.0.0.2/24"], "{when}");
            clock.advance(HOUR - 1);
            assert!(lease(ipam, "b", None).is_err(), "{when}");
            clock.advance(7);
            let got = lease(ipam, "b", None).unwrap_or_else(|refused| panic!("{when}: {refused}"));
            assert_eq!(got, ["10.0.0.1/24"], "{when}");
            release(ipam, "b");
            clock.advance(6);
            release(ipam, "a");
            clock.advance(6);
        };
        begin();
        block_on(home.quarantine(&space(), own, &dcenet_ipam::Quarantine::default())).unwrap();
        clock.advance(2 * HOUR);
        assert!(block_on(home.lift(&space(), own)).unwrap());
        is_kept_for_its_time(&home, "lifted");

        begin();
        let export = block_on(home.hand_out(&space(), &db, &b)).unwrap().unwrap();
        block_on(away.hand_in(&export, &b)).unwrap();
        is_kept_for_its_time(&away, "handed in");
        // As long as it is away it is kept here.
        clock.advance(10 * HOUR);
        assert_eq!(block_on(home.expire()).unwrap(), 0);
        assert!(block_on(home.take_back(&space(), &db)).unwrap());
        is_kept_for_its_time(&home, "taken back");
    });
}

/// amazon-vpc-cni-k8s#3887 (the cooldown was lost on restart) and #2896 (what cooled was not counted as used).
#[test]
fn amazon_vpc_cni_3887_2896_the_cooldown_outlives_a_restart_and_counts_as_used() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::new();
    let json = r#"{ "cooldown": "30s", "pools": [ { "name": "p", "subnet": "10.0.0.0/30" } ] }"#;
    let open = || {
        let store: Arc<dyn Store> = Arc::new(LogStore::open(dir.path()).unwrap());
        clock.drive(ipam(json, &store))
    };
    let ipam = open();
    lease(&ipam, "a", None).unwrap();
    lease(&ipam, "b", None).unwrap();
    release(&ipam, "b");
    clock.advance(1);
    release(&ipam, "a");
    drop(ipam);
    let ipam = open();
    let usage = block_on(ipam.usage()).unwrap().remove(0);
    assert_eq!((usage.size, usage.bound, usage.cooling), (2, 0, 2));
    assert!(matches!(lease(&ipam, "c", None).unwrap_err(), LeaseError::Exhausted { .. }));
    assert!(matches!(block_on(ipam.ready()).unwrap_err(), LeaseError::Exhausted { .. }));
    clock.advance(29);
    drop(ipam);
    // First in, first out, also over a restart: b was released first.
    let ipam = open();
    assert_eq!(lease(&ipam, "c", None).unwrap(), ["10.0.0.2/30"]);
    assert!(lease(&ipam, "d", None).is_err());
    clock.advance(1);
    assert_eq!(lease(&ipam, "d", None).unwrap(), ["10.0.0.1/30"]);
}

/// Calls of the store that a lease and a release make.
pub(crate) fn calls(json: &str, workload: Option<&str>) -> (u64, u64) {
    let store = Arc::new(FlakyStore::new(Arc::new(MemoryStore::new()), Failure::Before, 0));
    let ipam = ipam(json, &(store.clone() as Arc<dyn Store>));
    block_on(ipam.ready()).unwrap();
    // Registered and warm.
    lease(&ipam, "c0", None).unwrap();
    let before = store.calls();
    lease(&ipam, "c1", workload).unwrap();
    let leased = store.calls();
    release(&ipam, "c1");
    (leased - before, store.calls() - leased)
}

#[test]
fn what_is_not_configured_costs_no_call_of_the_store() {
    let plain = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#;
    // Read, gap, slot, commit; read, slot, queue, commit.
    assert_eq!(calls(plain, None), (4, 4));
    // One more: the claims of the store that a named workload may have.
    assert_eq!(calls(plain, Some("shop/db")), (5, 4));
    // A place is chosen by one read of all places; the claim's record is one, the slot is known.
    assert_eq!(calls(SETS, None), (4, 4));
    assert_eq!(calls(SETS, Some("shop/web-7d9f8-bbbbb")), (4, 5));
    assert_eq!(calls(SETS, Some("shop/pg-0")), (4, 5));
}

#[test]
fn a_claim_is_not_kept_for_no_time() {
    each_store(|store, _| {
        let ours = ipam(r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#, &store);
        for time in [Duration::ZERO, Duration::from_micros(900)] {
            let refused = block_on(ours.reserve("p", &"shop/db".parse().unwrap(), None, KeepPolicy::For(time)));
            assert!(matches!(&refused, Err(LeaseError::Invalid { field, .. }) if field == "keep"), "{refused:?}");
        }
        assert_eq!(block_on(ours.claims()).unwrap(), []);
    });
}
