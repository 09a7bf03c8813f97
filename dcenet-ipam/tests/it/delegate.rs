//! Prefixes instead of addresses.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Quarantine;
use dcenet_ipam::model::{AddressSpace, KeepPolicy};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::memory::MemoryStore;
use ipnet::IpNet;
use pollster::block_on;
use proptest::prelude::*;

use crate::claims::{Clock, space};
use crate::{attachment, config, each_store, ipam, later, lease, release, request};

const POOL: &str = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "2001:db8::/48", "delegate": 64,
    "gateway": "fe80::1", "ranges": ["2001:db8::-2001:db8:0:4:8000::"], "exclude": ["2001:db8:0:2::77"],
    "claims": { "shop/db": { "address": "2001:db8:0:1::1" } } } ] }"#;

#[test]
fn an_attachment_gets_a_prefix_and_its_first_address() {
    each_store(|store, _| {
        let ours = ipam(POOL, &store);
        let first = block_on(ours.lease(&request("a", None))).unwrap();
        let leased = &first.addresses[0];
        assert_eq!(leased.address.to_string(), "2001:db8::1/64");
        assert_eq!(leased.prefix, Some("2001:db8::/64".parse().unwrap()));
        assert_eq!(leased.gateway, Some("fe80::1".parse().unwrap()));
        assert_eq!(block_on(ours.held(&attachment("a"))).unwrap(), Some(first));
        // :1 is claimed, of :2 a part is excluded, and only half of :4 is in the range.
        assert_eq!(lease(&ours, "b", None).unwrap(), ["2001:db8:0:3::1/64"]);
        let full = lease(&ours, "c", None).unwrap_err();
        assert!(matches!(full, LeaseError::Exhausted { size: 3, .. }), "{full}");
        let claimed = block_on(ours.lease(&request("d", Some("shop/db")))).unwrap();
        assert_eq!(claimed.addresses[0].prefix, Some("2001:db8:0:1::/64".parse().unwrap()));
        assert_eq!(block_on(ours.usage()).unwrap()[0].bound, 3);
        release(&ours, "b");
        later();
        release(&ours, "a");
        assert_eq!(lease(&ours, "c", None).unwrap(), ["2001:db8:0:3::1/64"], "the oldest release first");
        assert_eq!(lease(&ours, "e", None).unwrap(), ["2001:db8::1/64"]);
    });
}

#[test]
fn a_prefix_can_be_asked_for_and_reserved() {
    each_store(|store, _| {
        let ours = ipam(POOL, &store);
        let ask = |container: &str, address: &str| {
            let mut asked = request(container, None);
            asked.addresses = vec![address.parse().unwrap()];
            block_on(ours.lease(&asked))
        };
        assert_eq!(ask("a", "2001:db8:0:3::1").unwrap().addresses[0].prefix.unwrap().to_string(), "2001:db8:0:3::/64");
        let refused = ask("b", "2001:db8::5").unwrap_err();
        assert!(refused.to_string().contains("ask for 2001:db8::1"), "{refused}");
        assert!(matches!(ask("b", "2001:db8:0:2::1").unwrap_err(), LeaseError::Invalid { .. }));
        // A search does not stop at what was asked for.
        assert_eq!(lease(&ours, "b", None).unwrap(), ["2001:db8::1/64"]);
        let space = AddressSpace::default();
        let inside = "2001:db8::ffff".parse().unwrap();
        let refused = block_on(ours.reserve_external(&space, inside, "router")).unwrap_err();
        assert!(matches!(&refused, LeaseError::Held { holder, .. } if holder == "attachment net/b/eth0"), "{refused}");
        release(&ours, "b");
        block_on(ours.reserve_external(&space, inside, "router")).unwrap();
        assert!(matches!(lease(&ours, "c", None).unwrap_err(), LeaseError::Exhausted { .. }));
        let refused = ask("c", "2001:db8::1").unwrap_err();
        assert!(matches!(&refused, LeaseError::Held { holder, .. } if holder == "reservation router"), "{refused}");
        let claim = "shop/web".parse().unwrap();
        let other = block_on(ours.reserve("p", &claim, Some("2001:db8:0:3::7".parse().unwrap()), KeepPolicy::Forever));
        assert!(other.unwrap_err().to_string().contains("ask for 2001:db8:0:3::1"));
    });
}

#[test]
fn wrong_delegations_are_refused_by_field() {
    let error = |keys: &str| config(&format!(r#"{{ "pools": [ {{ "name": "p", {keys} }} ] }}"#)).layout().unwrap_err();
    for (keys, field, part) in [
        (r#""subnet": "fd00::/48", "delegate": 47"#, "delegate", "from 48 to 128"),
        (r#""subnet": "fd00::/48", "delegate": 129"#, "delegate", "from 48 to 128"),
        (r#""subnet": "10.0.0.0/16", "delegate": 64"#, "delegate", "from 16 to 32"),
        (r#""subnet": "fd00::/48", "delegate": 64, "ranges": ["fd00::1-fd00::ffff"]"#, "ranges", "no address"),
        (r#""subnet": "fd00::/48", "delegate": 64, "gateway": "fd01::1"#, "gateway", "fd01::1"),
        (
            r#""subnet": "fd00::/48", "delegate": 64, "claims": { "a/b": { "address": "fd00:0:0:5::2" } }"#,
            "claims[\"a/b\"].address",
            "write fd00:0:0:5::1",
        ),
        (r#""subnet": "fd00::/48", "gateway": "fe80::1""#, "gateway", "fe80::1"),
    ] {
        let keys = if keys.ends_with("fd01::1") { format!("{keys}\"") } else { keys.to_owned() };
        let error = error(&keys);
        assert_eq!(error.field, format!("ipam.pools[0].{field}"), "{error}");
        assert!(error.to_string().contains(part), "{error}\nlacks {part}");
    }
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let prefixes = r#"{ "pools": [ { "name": "p", "subnet": "fd00::/48", "delegate": 64 } ] }"#;
    lease(&ipam(prefixes, &store), "a", None).unwrap();
    let refused = lease(&ipam(&prefixes.replace(r#", "delegate": 64"#, ""), &store), "b", None).unwrap_err();
    assert!(
        refused.to_string().contains("ipam.pools[0].delegate: none of pool p, which the store holds with /64"),
        "{refused}"
    );
}

#[test]
fn prefixes_that_are_not_remembered_any_more_are_found_again() {
    thread_local! { static NOW: std::cell::Cell<u64> = const { std::cell::Cell::new(1_000_000) } }
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "fd00::/62", "delegate": 64 } ] }"#;
    let ours = ipam(json, &store).with_clock(|| NOW.get());
    for round in 0..20 {
        for i in 0..4 {
            lease(&ours, &format!("c{round}-{i}"), None).unwrap();
        }
        assert!(matches!(lease(&ours, "more", None).unwrap_err(), LeaseError::Exhausted { size: 4, .. }));
        for i in 0..4 {
            release(&ours, &format!("c{round}-{i}"));
            // Longer than releases are remembered.
            NOW.set(NOW.get() + 4_000_000);
        }
    }
}

#[test]
fn rivals_get_prefixes_that_do_not_overlap() {
    each_store(|store, _| {
        let json = r#"{ "pools": [ { "name": "p", "subnet": "fd00::/8", "delegate": 61 } ] }"#;
        let prefixes: Vec<IpNet> = thread::scope(|scope| {
            let callers: Vec<_> = (0..4)
                .map(|caller| {
                    let store = &store;
                    scope.spawn(move || {
                        let one = |i| {
                            let lease = block_on(ipam(json, store).lease(&request(&format!("c{caller}-{i}"), None)));
                            lease.unwrap().addresses[0].prefix.unwrap()
                        };
                        (0..12).map(one).collect::<Vec<_>>()
                    })
                })
                .collect();
            callers.into_iter().flat_map(|c| c.join().unwrap()).collect()
        });
        assert_eq!(prefixes.len(), 48);
        for (i, a) in prefixes.iter().enumerate() {
            assert!(prefixes[i + 1..].iter().all(|b| !a.contains(b) && !b.contains(a)), "{a}");
        }
    });
}

const FOUR: &str = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "fd00::/62", "delegate": 64,
    "claims": { "shop/web": {}, "shop/db": { "address": "fd00:0:0:3::1", "keep": "ephemeral" } } } ] }"#;

#[test]
fn a_claim_without_an_address_asks_for_the_first_of_a_prefix() {
    each_store(|store, _| {
        let ours = ipam(FOUR, &store);
        let mut asked = request("a", Some("shop/web"));
        asked.addresses = vec!["fd00::5".parse().unwrap()];
        let refused = block_on(ours.lease(&asked)).unwrap_err();
        assert!(refused.to_string().contains("ask for fd00::1"), "{refused}");
        assert_eq!(lease(&ours, "b", None).unwrap(), ["fd00::1/64"]);
        asked.addresses = vec!["fd00:0:0:2::1".parse().unwrap()];
        assert_eq!(crate::texts(&block_on(ours.lease(&asked)).unwrap()), ["fd00:0:0:2::1/64"]);
    });
}

fn why(seconds: Option<u64>) -> Quarantine {
    Quarantine { time: seconds.map(Duration::from_secs), ..Quarantine::default() }
}

#[test]
fn a_quarantine_is_of_a_whole_prefix() {
    each_store(|store, _| {
        let clock = Clock::new();
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "fd00::/62", "delegate": 64 } ] }"#;
        let ours = clock.drive(ipam(json, &store));
        let all = || {
            let leases: BTreeSet<_> = (0..4).map(|i| lease(&ours, &format!("c{i}"), None).unwrap()).collect();
            assert!(matches!(lease(&ours, "more", None).unwrap_err(), LeaseError::Exhausted { .. }));
            (0..4).for_each(|i| release(&ours, &format!("c{i}")));
            leases.len()
        };
        assert_eq!(all(), 4);
        let inside = |text: &str| text.parse().unwrap();
        assert_eq!(lease(&ours, "a", None).unwrap(), ["fd00::1/64"]);
        let refused = block_on(ours.quarantine(&space(), inside("fd00::5"), &why(None))).unwrap_err();
        assert!(matches!(&refused, LeaseError::Held { holder, .. } if holder.contains("net/a/eth0")), "{refused}");
        release(&ours, "a");
        block_on(ours.quarantine(&space(), inside("fd00::5"), &why(None))).unwrap();
        let listed = block_on(ours.quarantined()).unwrap();
        assert_eq!(listed.iter().map(|q| q.address).collect::<Vec<_>>(), [inside("fd00::1")]);
        assert!(block_on(ours.lift(&space(), inside("fd00::7"))).unwrap());
        assert_eq!(all(), 4);
        block_on(ours.quarantine(&space(), inside("fd00::9"), &why(Some(60)))).unwrap();
        clock.advance(61);
        assert_eq!(block_on(ours.expire()).unwrap(), 1);
        assert_eq!(all(), 4);
    });
}

#[test]
fn releases_by_a_configuration_without_the_pool_lose_no_prefix() {
    each_store(|store, _| {
        let clock = Clock::new();
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "fd00::/62", "delegate": 64 } ] }"#;
        let other = r#"{ "cooldown": "0s", "pools": [ { "name": "q", "subnet": "fd01::/64" } ] }"#;
        let (ours, other) = (clock.drive(ipam(json, &store)), clock.drive(ipam(other, &store)));
        for round in 0..4 {
            for i in 0..4 {
                lease(&ours, &format!("c{round}-{i}"), None).unwrap();
            }
            assert!(matches!(lease(&ours, "more", None).unwrap_err(), LeaseError::Exhausted { .. }));
            for i in 0..4 {
                release(&other, &format!("c{round}-{i}"));
                // Longer than releases are remembered.
                clock.advance(4000);
            }
            // Nor are they remembered for ever.
            assert!(block_on(store.scan(b"p/", None, 10)).unwrap().len() < 4);
        }
    });
}

#[test]
fn a_prefix_in_quarantine_that_was_never_used_does_not_stop_a_search() {
    each_store(|store, _| {
        let ours = ipam(FOUR, &store);
        block_on(ours.quarantine(&space(), "fd00::1".parse().unwrap(), &why(None))).unwrap();
        assert_eq!(lease(&ours, "a", None).unwrap(), ["fd00:0:0:1::1/64"]);
        assert!(block_on(ours.lift(&space(), "fd00::1".parse().unwrap())).unwrap());
        assert_eq!(lease(&ours, "b", None).unwrap(), ["fd00:0:0:2::1/64"]);
        assert_eq!(lease(&ours, "c", None).unwrap(), ["fd00::1/64"]);
    });
}

#[test]
fn a_prefix_that_a_claim_fixes_is_nobody_elses() {
    each_store(|store, _| {
        let ours = ipam(FOUR, &store);
        for (i, address) in ["fd00::1/64", "fd00:0:0:1::1/64", "fd00:0:0:2::1/64"].into_iter().enumerate() {
            assert_eq!(lease(&ours, &format!("c{i}"), None).unwrap(), [address]);
        }
        let full = lease(&ours, "more", None).unwrap_err();
        assert!(matches!(full, LeaseError::Exhausted { .. }), "{full}");
        assert_eq!(lease(&ours, "db", Some("shop/db")).unwrap(), ["fd00:0:0:3::1/64"]);
    });
}

/// A subnet, a length that it delegates, and how many there are, at most `2^limit`.
fn delegation() -> impl Strategy<Value = (u128, u8, u8)> {
    (any::<u128>(), 1..=128_u8, 0..=3_u8).prop_map(|(bits, delegate, extra)| {
        let length = delegate.saturating_sub(extra).max(1);
        (bits, length, delegate)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_subnet_of_any_length_is_delegated_whole((bits, length, delegate) in delegation()) {
        let subnet = ipnet::Ipv6Net::new(bits.into(), length).unwrap().trunc();
        // Nobody is given IPv4-mapped addresses, which is another test's.
        prop_assume!(!IpNet::from(subnet).contains(&"::ffff:0:0/96".parse::<IpNet>().unwrap()));
        prop_assume!(!"::ffff:0:0/96".parse::<IpNet>().unwrap().contains(&IpNet::from(subnet)));
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let json = format!(r#"{{ "cooldown": "0s",
            "pools": [ {{ "name": "p", "subnet": "{subnet}", "delegate": {delegate} }} ] }}"#);
        let ours = ipam(&json, &store);
        let count = 1_usize << (delegate - length);
        let mut seen = BTreeSet::new();
        for i in 0..count {
            let lease = block_on(ours.lease(&request(&format!("c{i}"), None))).unwrap();
            let prefix = lease.addresses[0].prefix.unwrap();
            prop_assert_eq!(prefix.prefix_len(), delegate);
            prop_assert!(IpNet::from(subnet).contains(&prefix));
            prop_assert!(prefix.contains(&lease.addresses[0].address.addr()));
            seen.insert(prefix);
        }
        // As the library that counts prefixes counts them.
        prop_assert_eq!(seen, subnet.subnets(delegate).unwrap().map(IpNet::from).collect::<BTreeSet<_>>());
        let refused = matches!(lease(&ours, "more", None).unwrap_err(), LeaseError::Exhausted { .. });
        prop_assert!(refused);
    }
}

#[test]
fn a_shrunk_pool_leaves_to_nobody_what_held_prefixes_cover() {
    each_store(|store, _| {
        let pool = |subnet: &str| {
            format!(r#"{{ "cooldown": "0s", "pools": [ {{ "name": "p", "subnet": "{subnet}", "delegate": 64 }} ] }}"#)
        };
        let wide = ipam(&pool("2001:db8::/61"), &store);
        for container in ["a", "b", "c", "d", "e", "f"] {
            lease(&wide, container, None).unwrap();
        }
        // Where the fifth and sixth lie.
        let shrunk = ipam(&pool("2001:db8::/62"), &store);
        block_on(shrunk.ready()).unwrap_err();
        assert_eq!(lease(&shrunk, "f", None).unwrap(), ["2001:db8:0:5::1/64"]);
        for subnet in ["2001:db8:0:4::/62", "2001:db8:0:5::/64", "2001:db8:0:5:8000::/65"] {
            let json = format!(r#"{{ "pools": [ {{ "name": "q", "subnet": "{subnet}" }} ] }}"#);
            let refused = lease(&ipam(&json, &store), "q", None).unwrap_err();
            assert!(refused.to_string().contains("attachment net/"), "{subnet}: {refused}");
            assert!(refused.to_string().contains("pool p"), "{subnet}: {refused}");
        }
        // What nobody holds is free for others.
        let json = r#"{ "pools": [ { "name": "r", "subnet": "2001:db8:0:7::/64" } ] }"#;
        assert_eq!(lease(&ipam(json, &store), "r", None).unwrap(), ["2001:db8:0:7::1/64"]);
        // It can grow again, but not over that.
        let refused = lease(&wide, "g", None).unwrap_err();
        assert!(refused.to_string().contains("pool r"), "{refused}");
        let other = ipam(r#"{ "pools": [ { "name": "q", "subnet": "2001:db8:0:5::/64" } ] }"#, &store);
        release(&shrunk, "f");
        assert_eq!(lease(&other, "q", None).unwrap(), ["2001:db8:0:5::2/64"]);
    });
}

#[test]
fn ground_that_a_pool_of_addresses_gave_up_is_not_delegated_while_one_is_held() {
    each_store(|store, _| {
        let pool =
            |subnet: &str| format!(r#"{{ "cooldown": "0s", "pools": [ {{ "name": "a", "subnet": "{subnet}" }} ] }}"#);
        let wide = ipam(&pool("10.0.0.0/28"), &store);
        for n in 1..=10 {
            lease(&wide, &format!("c{n}"), None).unwrap();
        }
        let shrunk = ipam(&pool("10.0.0.0/29"), &store);
        block_on(shrunk.ready()).unwrap_err();
        let prefixes = r#"{ "pools": [ { "name": "q", "subnet": "10.0.0.8/29", "delegate": 30 } ] }"#;
        let refused = lease(&ipam(prefixes, &store), "q", None).unwrap_err();
        assert!(refused.to_string().contains("attachment net/c"), "{refused}");
        for n in 8..=10 {
            release(&shrunk, &format!("c{n}"));
        }
        lease(&ipam(prefixes, &store), "q", None).unwrap();
    });
}
