//! Pools that change while addresses of them are in use.

use dcenet_core::provider::{AddressSource, LeaseError};
use pollster::block_on;

use crate::{attachment, each_store, ipam, lease, release, texts};

fn pool(subnet: &str, ranges: &str, claims: &str) -> String {
    format!(
        r#"{{ "cooldown": "0s", "pools": [ {{ "name": "p", "subnet": "{subnet}", "ranges": [{ranges}],
             "claims": {{ {claims} }} }} ] }}"#
    )
}

#[test]
fn a_shrunk_pool_gives_nothing_outside_and_reports_what_stands_there() {
    each_store(|store, _| {
        let before = ipam(&pool("10.0.0.0/24", "", r#""shop/db": {}"#), &store);
        for c in ["a", "b", "c"] {
            lease(&before, c, None).unwrap();
        }
        assert_eq!(lease(&before, "d", Some("shop/db")).unwrap(), ["10.0.0.4/24"]);
        let after = ipam(&pool("10.0.0.0/24", r#""10.0.0.1-10.0.0.2""#, r#""shop/db": {}"#), &store);
        let outside: Vec<_> = block_on(after.outside()).unwrap().iter().map(|b| b.address.to_string()).collect();
        assert_eq!(outside, ["10.0.0.3/24", "10.0.0.4/24"]);
        let usage = block_on(after.usage()).unwrap().remove(0);
        assert_eq!((usage.size, usage.bound, usage.kept, usage.outside), (2, 4, 0, 2));
        // What stands stays, also when it is asked for again.
        assert_eq!(lease(&after, "c", None).unwrap(), ["10.0.0.3/24"]);
        assert!(matches!(lease(&after, "e", None).unwrap_err(), LeaseError::Exhausted { .. }));
        release(&after, "c");
        assert!(matches!(lease(&after, "e", None).unwrap_err(), LeaseError::Exhausted { .. }));
        release(&after, "d");
        let usage = block_on(after.usage()).unwrap().remove(0);
        assert_eq!((usage.bound, usage.kept, usage.outside), (2, 1, 1));
        release(&after, "a");
        // The claim moves into the pool, and what it had is given up.
        assert_eq!(lease(&after, "f", Some("shop/db")).unwrap(), ["10.0.0.1/24"]);
        assert_eq!(block_on(after.usage()).unwrap()[0].outside, 0);
        assert_eq!(block_on(after.outside()).unwrap(), []);
        // Grown again, it gives them out again.
        assert_eq!(lease(&ipam(&pool("10.0.0.0/24", "", ""), &store), "g", None).unwrap(), ["10.0.0.5/24"]);
    });
}

#[test]
fn a_pool_grows_unless_it_meets_another() {
    each_store(|store, _| {
        let small = ipam(&pool("10.0.0.0/30", "", ""), &store);
        lease(&small, "a", None).unwrap();
        lease(&small, "b", None).unwrap();
        assert!(lease(&small, "c", None).is_err());
        let grown = ipam(&pool("10.0.0.0/24", "", ""), &store);
        // The former broadcast address is one like others.
        assert_eq!(lease(&grown, "c", None).unwrap(), ["10.0.0.3/24"]);
        let other = ipam(r#"{ "pools": [ { "name": "q", "subnet": "10.0.1.0/24" } ] }"#, &store);
        lease(&other, "q", None).unwrap();
        let wide = ipam(&pool("10.0.0.0/16", "", ""), &store);
        let refused = lease(&wide, "d", None).unwrap_err();
        let LeaseError::Invalid { field, reason } = &refused else { panic!("{refused}") };
        assert_eq!(field, "ipam.pools[0].subnet");
        assert!(reason.contains("overlaps pool q (10.0.1.0/24)"), "{reason}");
        assert_eq!(lease(&grown, "d", None).unwrap(), ["10.0.0.4/24"]);
        // Nodes that do not know yet that it has grown go on.
        release(&grown, "a");
        assert_eq!(lease(&small, "e", None).unwrap(), ["10.0.0.1/30"]);
        assert_eq!(lease(&grown, "f", None).unwrap(), ["10.0.0.5/24"]);
    });
}

#[test]
fn a_renumbered_pool_gives_only_new_addresses_and_frees_the_old() {
    each_store(|store, _| {
        let old = ipam(&pool("10.0.0.0/24", "", r#""shop/db": {}"#), &store);
        lease(&old, "a", None).unwrap();
        lease(&old, "b", Some("shop/db")).unwrap();
        let new = ipam(&pool("192.0.2.0/24", "", r#""shop/db": {}"#), &store);
        assert_eq!(lease(&new, "c", None).unwrap(), ["192.0.2.1/24"]);
        let held = block_on(new.held(&attachment("a"))).unwrap().unwrap();
        assert_eq!(texts(&held), ["10.0.0.1/24"]);
        assert_eq!(lease(&new, "a", None).unwrap(), ["10.0.0.1/24"]);
        let usage = block_on(new.usage()).unwrap().remove(0);
        assert_eq!((usage.bound, usage.outside), (1, 2));
        release(&new, "a");
        release(&new, "b");
        assert_eq!(block_on(new.outside()).unwrap(), []);
        assert_eq!(block_on(new.usage()).unwrap()[0].outside, 1, "the claim keeps its old address");
        assert_eq!(lease(&new, "d", Some("shop/db")).unwrap(), ["192.0.2.2/24"]);
        assert_eq!(block_on(new.usage()).unwrap()[0].outside, 0);
        // The old one goes on from what is free, for whoever was not told yet.
        let back = lease(&old, "e", None).unwrap();
        assert_eq!(back, ["10.0.0.3/24"]);
    });
}

#[test]
fn a_claim_is_recorded_only_where_the_configuration_agrees_with_the_store() {
    each_store(|store, _| {
        let claim = "shop/db".parse().unwrap();
        let keep = dcenet_ipam::model::KeepPolicy::Forever;
        let prefixes = r#"{ "pools": [ { "name": "p", "subnet": "2001:db8::/60", "delegate": 64 } ] }"#;
        lease(&ipam(prefixes, &store), "a", None).unwrap();
        // The same pool as addresses: one of them would lie in somebody's prefix.
        let addresses = ipam(r#"{ "pools": [ { "name": "p", "subnet": "2001:db8::/60" } ] }"#, &store);
        let refused =
            block_on(addresses.reserve("p", &claim, Some("2001:db8::77".parse().unwrap()), keep)).unwrap_err();
        assert!(
            matches!(&refused, LeaseError::Invalid { field, .. } if field == "ipam.pools[0].delegate"),
            "{refused}"
        );
        // Another pool where this one is.
        let other = ipam(r#"{ "pools": [ { "name": "q", "subnet": "2001:db8:0:1::/64" } ] }"#, &store);
        let refused = block_on(other.reserve("q", &claim, None, keep)).unwrap_err();
        assert!(refused.to_string().contains("overlaps pool p"), "{refused}");
        assert_eq!(block_on(ipam(prefixes, &store).claims()).unwrap(), []);
    });
}
