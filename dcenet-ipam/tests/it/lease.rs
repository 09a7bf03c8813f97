//! What a user of the allocator sees, on every backend.

use std::sync::atomic::{AtomicU64, Ordering};

use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::model::{AddressSpace, KeepPolicy};
use pollster::block_on;

use crate::{attachment, attachment_on, each_store, ipam, lease, release, request, texts};

const DUAL: &str = r#"{ "cooldown": "0s", "routes": [ { "dst": "0.0.0.0/0" } ],
    "dns": { "nameservers": ["10.0.0.1"] },
    "pools": [ { "name": "v4", "subnet": "10.0.0.0/29", "gateway": "10.0.0.1",
                 "claims": { "shop/db": { "address": "10.0.0.5" } } },
               { "name": "v6", "subnet": "fd00::/64", "dns": { "nameservers": ["fd00::1"], "domain": "shop" } } ] }"#;

#[test]
fn an_attachment_gets_one_address_of_each_family_and_the_same_again() {
    each_store(|store, _| {
        let ipam = ipam(DUAL, &store);
        let first = block_on(ipam.lease(&request("c1", None))).unwrap();
        assert_eq!(texts(&first), ["10.0.0.2/29", "fd00::1/64"]);
        assert_eq!(first.addresses[0].gateway, Some("10.0.0.1".parse().unwrap()));
        assert_eq!(first.addresses[1].gateway, None);
        assert_eq!(first.routes.len(), 1);
        assert_eq!(first.dns.nameservers, ["10.0.0.1", "fd00::1"]);
        assert_eq!(first.dns.domain.as_deref(), Some("shop"));
        assert!(first.addresses[0].sequence > 0);
        assert_eq!(block_on(ipam.lease(&request("c1", None))).unwrap(), first);
        assert_eq!(block_on(ipam.held(&attachment("c1"))).unwrap(), Some(first));
        assert_eq!(block_on(ipam.held(&attachment("c2"))).unwrap(), None);
    });
}

#[test]
fn release_is_repeatable_and_ends_the_lease() {
    each_store(|store, _| {
        let ipam = ipam(DUAL, &store);
        lease(&ipam, "c1", None).unwrap();
        release(&ipam, "c1");
        release(&ipam, "c1");
        release(&ipam, "never");
        assert_eq!(block_on(ipam.held(&attachment("c1"))).unwrap(), None);
        assert_eq!(block_on(ipam.bindings(None)).unwrap(), []);
    });
}

#[test]
fn a_claimed_address_outlives_its_container_and_goes_to_nobody_else() {
    each_store(|store, _| {
        let ipam = ipam(DUAL, &store);
        assert_eq!(lease(&ipam, "c1", Some("shop/db")).unwrap()[0], "10.0.0.5/29");
        release(&ipam, "c1");
        // .2, .3, .4 and .6 are left: .0 and .7 are reserved, .1 is the gateway.
        for (container, address) in
            [("a", "10.0.0.2/29"), ("b", "10.0.0.3/29"), ("c", "10.0.0.4/29"), ("d", "10.0.0.6/29")]
        {
            assert_eq!(lease(&ipam, container, None).unwrap()[0], address);
        }
        let full = lease(&ipam, "e", None).unwrap_err();
        assert!(matches!(&full, LeaseError::Exhausted { pool, size: 5 } if pool == "v4"), "{full}");
        // Nothing of the other family was taken along.
        assert_eq!(block_on(ipam.bindings(None)).unwrap().len(), 8);
        assert_eq!(lease(&ipam, "c2", Some("shop/db")).unwrap()[0], "10.0.0.5/29");
    });
}

#[test]
fn two_containers_of_one_claim_at_once_are_refused_by_name() {
    each_store(|store, _| {
        let ipam = ipam(DUAL, &store);
        lease(&ipam, "c1", Some("shop/db")).unwrap();
        let refused = lease(&ipam, "c2", Some("shop/db")).unwrap_err();
        assert!(matches!(&refused, LeaseError::Held { holder, .. } if holder == "attachment net/c1/eth0"), "{refused}");
        assert_eq!(block_on(ipam.bindings(None)).unwrap().len(), 2);
    });
}

#[test]
fn a_claim_is_respected_by_other_configurations_of_the_store() {
    each_store(|store, _| {
        let ours = ipam(DUAL, &store);
        // Any lease records the claims; the claim itself was never used.
        lease(&ours, "c1", None).unwrap();
        let theirs = ipam(&DUAL.replace("shop/db", "ops/scan"), &store);
        let refused = lease(&theirs, "c2", Some("ops/scan")).unwrap_err();
        assert!(matches!(&refused, LeaseError::Held { holder, .. } if holder == "claim shop/db"), "{refused}");
        let plain =
            ipam(r#"{ "pools": [ { "name": "v4", "subnet": "10.0.0.0/29", "ranges": ["10.0.0.5"] } ] }"#, &store);
        assert!(matches!(lease(&plain, "c3", None).unwrap_err(), LeaseError::Exhausted { .. }));
        assert_eq!(lease(&ours, "c4", Some("shop/db")).unwrap()[0], "10.0.0.5/29");
    });
}

#[test]
fn a_claim_without_address_keeps_the_first_it_got() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/24",
                        "claims": { "shop/db": {}, "shop/cache": { "keep": "ephemeral" } } } ] }"#;
        let ipam = ipam(json, &store);
        lease(&ipam, "other", None).unwrap();
        let kept = lease(&ipam, "c1", Some("shop/db")).unwrap();
        let lost = lease(&ipam, "c2", Some("shop/cache")).unwrap();
        assert_eq!((kept[0].as_str(), lost[0].as_str()), ("10.0.0.2/24", "10.0.0.3/24"));
        release(&ipam, "other");
        release(&ipam, "c1");
        release(&ipam, "c2");
        assert_eq!(lease(&ipam, "c3", Some("shop/cache")).unwrap(), ["10.0.0.4/24"]);
        assert_eq!(lease(&ipam, "c4", Some("shop/db")).unwrap(), kept);
        let claims = block_on(ipam.claims()).unwrap();
        assert_eq!(claims.len(), 1);
        assert_eq!(claims[0].claim.key.to_string(), "shop/db");
    });
}

#[test]
fn claims_can_be_reserved_and_forgotten_at_run_time() {
    each_store(|store, _| {
        let json =
            r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/30", "gateway": "10.0.0.1" } ] }"#;
        let ipam = ipam(json, &store);
        let db = "shop/db".parse().unwrap();
        block_on(ipam.reserve("p", &db, Some("10.0.0.2".parse().unwrap()), KeepPolicy::Forever)).unwrap();
        assert!(matches!(lease(&ipam, "c1", None).unwrap_err(), LeaseError::Exhausted { .. }));
        let rival = "ops/scan".parse().unwrap();
        let refused =
            block_on(ipam.reserve("p", &rival, Some("10.0.0.2".parse().unwrap()), KeepPolicy::Forever)).unwrap_err();
        assert!(matches!(&refused, LeaseError::Held { holder, .. } if holder == "claim shop/db"), "{refused}");
        assert_eq!(lease(&ipam, "c2", Some("shop/db")).unwrap(), ["10.0.0.2/30"]);
        assert_eq!(block_on(ipam.usage()).unwrap()[0].bound, 1);
        let space = AddressSpace::default();
        assert!(matches!(block_on(ipam.forget(&space, &db)).unwrap_err(), LeaseError::Held { .. }));
        release(&ipam, "c2");
        assert_eq!(block_on(ipam.usage()).unwrap()[0].kept, 1);
        assert!(block_on(ipam.forget(&space, &db)).unwrap());
        assert!(!block_on(ipam.forget(&space, &db)).unwrap());
        assert_eq!(lease(&ipam, "c1", None).unwrap(), ["10.0.0.2/30"]);
    });
}

#[test]
fn a_requested_address_is_given_or_refused() {
    each_store(|store, _| {
        let ipam = ipam(DUAL, &store);
        let ask = |container: &str, addresses: &[&str]| {
            let mut request = request(container, None);
            request.addresses = addresses.iter().map(|a| a.parse().unwrap()).collect();
            block_on(ipam.lease(&request)).map(|l| texts(&l))
        };
        assert_eq!(ask("c1", &["10.0.0.6"]).unwrap(), ["10.0.0.6/29", "fd00::1/64"]);
        // The IPv4-mapped form is the same address.
        let refused = ask("c2", &["::ffff:10.0.0.6"]).unwrap_err();
        assert!(matches!(&refused, LeaseError::Held { holder, .. } if holder.contains("net/c1/eth0")), "{refused}");
        let refused = ask("c2", &["10.0.0.5"]).unwrap_err();
        assert!(matches!(&refused, LeaseError::Held { holder, .. } if holder == "claim shop/db"), "{refused}");
        for bad in
            [&["10.0.0.0"][..], &["10.0.0.1"], &["10.0.0.7"], &["192.0.2.1"], &["10.0.0.3", "10.0.0.4"], &["::1"]]
        {
            assert!(matches!(ask("c2", bad).unwrap_err(), LeaseError::Invalid { .. }), "{bad:?}");
        }
        assert_eq!(block_on(ipam.held(&attachment("c2"))).unwrap(), None);
    });
}

#[test]
fn pools_of_a_family_are_tried_in_order() {
    each_store(|store, _| {
        let json =
            r#"{ "pools": [ { "name": "a", "subnet": "10.0.0.0/31" }, { "name": "b", "subnet": "10.0.1.0/32" } ] }"#;
        let ipam = ipam(json, &store);
        assert_eq!(lease(&ipam, "c1", None).unwrap(), ["10.0.0.0/31"]);
        assert_eq!(lease(&ipam, "c2", None).unwrap(), ["10.0.0.1/31"]);
        block_on(ipam.ready()).unwrap();
        assert_eq!(lease(&ipam, "c3", None).unwrap(), ["10.0.1.0/32"]);
        assert!(matches!(lease(&ipam, "c4", None).unwrap_err(), LeaseError::Exhausted { pool, .. } if pool == "b"));
        assert!(matches!(block_on(ipam.ready()).unwrap_err(), LeaseError::Exhausted { .. }));
    });
}

#[test]
fn overlapping_pools_of_two_configurations_are_refused_by_name() {
    each_store(|store, _| {
        let first = ipam(r#"{ "pools": [ { "name": "big", "subnet": "10.0.0.0/16" } ] }"#, &store);
        lease(&first, "c1", None).unwrap();
        let inside = r#"{ "pools": [ { "name": "small", "subnet": "10.0.7.0/24" } ] }"#;
        let refused = lease(&ipam(inside, &store), "c2", None).unwrap_err();
        let LeaseError::Invalid { field, reason } = refused else { panic!("{refused}") };
        assert_eq!(field, "ipam.pools[0].subnet");
        assert!(reason.contains("overlaps pool big (10.0.0.0/16)"), "{reason}");
        // In a space of its own the same prefix means other addresses.
        let apart = r#"{ "pools": [ { "name": "small", "space": "blue", "subnet": "10.0.0.0/24" } ] }"#;
        assert_eq!(lease(&ipam(apart, &store), "c2", None).unwrap(), ["10.0.0.1/24"]);
        // Under the same name it is the same pool.
        let same = ipam(r#"{ "pools": [ { "name": "big", "subnet": "10.0.0.0/16" } ] }"#, &store);
        assert_eq!(lease(&same, "c3", None).unwrap(), ["10.0.0.2/16"]);
    });
}

#[test]
fn retain_releases_what_is_gone_of_its_own_network_only() {
    each_store(|store, _| {
        let ipam = ipam(r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#, &store);
        for (network, container) in [("net", "alive"), ("net", "gone"), ("net-2", "gone")] {
            let mut request = request(container, None);
            request.attachment = attachment_on(network, container);
            block_on(ipam.lease(&request)).unwrap();
        }
        let fence = block_on(ipam.revision()).unwrap();
        lease(&ipam, "late", None).unwrap();
        let valid = [("alive".parse().unwrap(), "eth0".parse().unwrap())];
        let network = "net".parse().unwrap();
        // What came after the evidence stays although the evidence does not name it.
        assert_eq!(block_on(ipam.retain_since(&network, &valid, fence)).unwrap(), [attachment("gone")]);
        assert_eq!(block_on(ipam.retain(&network, &valid)).unwrap(), [attachment("late")]);
        let left: Vec<String> =
            block_on(ipam.bindings(None)).unwrap().iter().map(|b| b.attachment.to_string()).collect();
        assert_eq!(left, ["net-2/gone/eth0", "net/alive/eth0"]);
    });
}

#[test]
fn a_late_release_does_not_take_a_newer_lease_of_the_same_name() {
    each_store(|store, _| {
        let ipam = ipam(DUAL, &store);
        let old = block_on(ipam.lease(&request("c1", None))).unwrap().addresses[0].sequence;
        release(&ipam, "c1");
        let new = block_on(ipam.lease(&request("c1", None))).unwrap();
        assert!(new.addresses[0].sequence > old);
        assert!(!block_on(ipam.release_sequence(&attachment("c1"), old)).unwrap());
        assert_eq!(block_on(ipam.held(&attachment("c1"))).unwrap(), Some(new));
    });
}

static NOW: AtomicU64 = AtomicU64::new(1_000_000);

#[test]
fn released_addresses_rest_and_return_oldest_first() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "5s", "pools": [ { "name": "p", "subnet": "10.0.0.0/29" } ] }"#;
        let ipam = ipam(json, &store).with_clock(|| NOW.load(Ordering::Relaxed));
        let wait = |ms| NOW.fetch_add(ms, Ordering::Relaxed);
        for c in ["a", "b", "c"] {
            lease(&ipam, c, None).unwrap();
        }
        release(&ipam, "b");
        wait(1000);
        release(&ipam, "a");
        // Three were never used.
        for (c, address) in [("d", "10.0.0.4/29"), ("e", "10.0.0.5/29"), ("f", "10.0.0.6/29")] {
            assert_eq!(lease(&ipam, c, None).unwrap(), [address]);
        }
        assert_eq!(block_on(ipam.usage()).unwrap()[0].cooling, 2);
        assert!(matches!(lease(&ipam, "g", None).unwrap_err(), LeaseError::Exhausted { .. }));
        wait(4500);
        assert_eq!(lease(&ipam, "g", None).unwrap(), ["10.0.0.2/29"]);
        assert!(lease(&ipam, "h", None).is_err());
        // A clock that jumps back far frees what cools, rather than blocking it for as long.
        NOW.fetch_sub(500_000, Ordering::Relaxed);
        assert_eq!(lease(&ipam, "h", None).unwrap(), ["10.0.0.1/29"]);
        NOW.fetch_add(600_000, Ordering::Relaxed);
    });
}
