//! Addresses that turned out to be somebody else's.

use std::time::Duration;

use dcenet_core::model::MacAddr;
use dcenet_core::probe::{Conflict, Evidence};
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Quarantine;
use dcenet_ipam::model::KeepPolicy;
use pollster::block_on;

use crate::claims::{Clock, key, space};
use crate::{attachment, each_store, ipam, lease, release, request, texts};

const JSON: &str = r#"{ "cooldown": "5s", "history": {}, "pools": [ { "name": "p", "subnet": "10.0.0.0/29",
    "claims": { "shop/db": { "address": "10.0.0.5" }, "shop/cache": { "mac": "from-address" } } } ] }"#;

fn why(time: Option<u64>) -> Quarantine {
    Quarantine {
        reason: "a printer answers".to_owned(),
        time: time.map(Duration::from_secs),
        seen: Some("02:00:00:00:00:99".parse().unwrap()),
    }
}

fn ip(text: &str) -> std::net::IpAddr {
    text.parse().unwrap()
}

#[test]
fn an_address_in_quarantine_is_nobodys_until_it_is_lifted() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(JSON, &store));
        block_on(ipam.quarantine(&space(), ip("10.0.0.1"), &why(None))).unwrap();
        let others: Vec<String> = (0..4).flat_map(|i| lease(&ipam, &format!("c{i}"), None).unwrap()).collect();
        assert_eq!(others, ["10.0.0.2/29", "10.0.0.3/29", "10.0.0.4/29", "10.0.0.6/29"]);
        assert!(matches!(lease(&ipam, "more", None).unwrap_err(), LeaseError::Exhausted { .. }));
        let mut asked = request("asked", None);
        asked.addresses = vec![ip("10.0.0.1")];
        let refused = block_on(ipam.lease(&asked)).unwrap_err();
        assert!(
            matches!(&refused, LeaseError::Held { holder, .. } if holder == "quarantine (a printer answers)"),
            "{refused}"
        );
        let listed = block_on(ipam.quarantined()).unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].address, listed[0].reason.as_str()), (ip("10.0.0.1"), "a printer answers"));
        assert_eq!((listed[0].seen, listed[0].until), (why(None).seen, None));
        assert_eq!(block_on(ipam.usage()).unwrap()[0].quarantined, 1);
        clock.advance(1_000_000);
        assert!(lease(&ipam, "more", None).is_err(), "without a time only a hand lifts it");
        assert!(block_on(ipam.lift(&space(), ip("10.0.0.1"))).unwrap());
        assert!(!block_on(ipam.lift(&space(), ip("10.0.0.1"))).unwrap());
        assert_eq!(block_on(ipam.quarantined()).unwrap(), []);
        assert!(lease(&ipam, "more", None).is_err(), "it cools as if released");
        clock.advance(5);
        assert_eq!(lease(&ipam, "more", None).unwrap(), ["10.0.0.1/29"]);
        for (address, part) in [("10.0.0.1", "replace it there"), ("192.0.2.1", "in no pool")] {
            let refused = block_on(ipam.quarantine(&space(), ip(address), &why(None))).unwrap_err();
            assert!(refused.to_string().contains(part), "{refused}");
        }
    });
}

#[test]
fn a_quarantine_ends_with_its_time() {
    each_store(|store, _| {
        for swept in [false, true] {
            let clock = Clock::new();
            let json = JSON.replace("10.0.0.", "10.9.9.");
            let ipam = clock.drive(ipam(&json, &store));
            block_on(ipam.quarantine(&space(), ip("10.9.9.1"), &why(Some(60)))).unwrap();
            // Repeated, its time begins anew.
            clock.advance(30);
            block_on(ipam.quarantine(&space(), ip("10.9.9.1"), &why(Some(60)))).unwrap();
            for i in 0..4 {
                lease(&ipam, &format!("c{swept}{i}"), None).unwrap();
            }
            clock.advance(40);
            assert!(lease(&ipam, "more", None).is_err());
            clock.advance(21);
            if swept {
                assert_eq!(block_on(ipam.expire()).unwrap(), 1);
                assert_eq!(block_on(ipam.quarantined()).unwrap(), []);
                clock.advance(1);
            }
            clock.advance(4);
            assert_eq!(lease(&ipam, "more", None).unwrap(), ["10.9.9.1/29"]);
            assert_eq!(block_on(ipam.quarantined()).unwrap(), []);
            for container in ["more".to_owned()].into_iter().chain((0..4).map(|i| format!("c{swept}{i}"))) {
                release(&ipam, &container);
            }
            clock.advance(10);
        }
    });
}

#[test]
fn a_lease_in_conflict_is_replaced_in_one_call() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(JSON, &store));
        let own = attachment("c1");
        let old = block_on(ipam.lease(&request("c1", None))).unwrap();
        assert_eq!(texts(&old), ["10.0.0.1/29"]);
        let new = block_on(ipam.replace(&own, old.sequence(), ip("10.0.0.1"), &why(Some(60)))).unwrap().unwrap();
        assert_eq!(texts(&new), ["10.0.0.2/29"]);
        assert!(new.sequence() > old.sequence());
        assert_eq!(block_on(ipam.held(&own)).unwrap().unwrap(), new);
        assert_eq!(block_on(ipam.quarantined()).unwrap()[0].address, ip("10.0.0.1"));
        // The reply was lost: again gives the same.
        let again = block_on(ipam.replace(&own, old.sequence(), ip("10.0.0.1"), &why(Some(60)))).unwrap();
        assert_eq!(again, Some(new.clone()));
        // The third and fourth candidate too; then the pool is out, and nothing changes.
        let mut current = new.clone();
        for next in ["10.0.0.3/29", "10.0.0.4/29", "10.0.0.6/29"] {
            let bad = current.addresses[0].address.addr();
            current = block_on(ipam.replace(&own, current.sequence(), bad, &why(None))).unwrap().unwrap();
            assert_eq!(texts(&current), [next]);
        }
        let out = block_on(ipam.replace(&own, current.sequence(), ip("10.0.0.6"), &why(None))).unwrap_err();
        assert!(matches!(out, LeaseError::Exhausted { .. }), "{out}");
        assert_eq!(block_on(ipam.held(&own)).unwrap(), Some(current.clone()));
        assert_eq!(block_on(ipam.quarantined()).unwrap().len(), 4);
        // The old lease's DEL means another lease.
        assert!(!block_on(ipam.release_sequence(&own, old.sequence())).unwrap());
        assert_eq!(block_on(ipam.replace(&own, old.sequence(), ip("10.0.0.6"), &why(None))).unwrap(), None);
        let not_his = block_on(ipam.replace(&own, current.sequence(), ip("10.0.0.3"), &why(None))).unwrap_err();
        assert!(not_his.to_string().contains("does not hold it"), "{not_his}");
        let holders = block_on(ipam.history(&space(), ip("10.0.0.1"))).unwrap();
        assert_eq!((holders.len(), holders[0].to), (1, Some(clock.now())));
    });
}

#[test]
fn a_claim_goes_along_unless_its_address_is_fixed() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        let fixed = block_on(ipam.lease(&request("c1", Some("shop/db")))).unwrap();
        let refused =
            block_on(ipam.replace(&attachment("c1"), fixed.sequence(), ip("10.0.0.5"), &why(None))).unwrap_err();
        assert!(refused.to_string().contains("fixes it for the claim shop/db"), "{refused}");
        let cache = block_on(ipam.lease(&request("c2", Some("shop/cache")))).unwrap();
        let moved =
            block_on(ipam.replace(&attachment("c2"), cache.sequence(), ip("10.0.0.1"), &why(None))).unwrap().unwrap();
        assert_eq!(texts(&moved), ["10.0.0.2/29"]);
        assert_eq!(moved.mac.unwrap().to_string(), "0a:58:0a:00:00:02");
        release(&ipam, "c2");
        assert_eq!(lease(&ipam, "c3", Some("shop/cache")).unwrap(), ["10.0.0.2/29"]);
        release(&ipam, "c3");
        // Put into quarantine while kept: the claim takes another.
        block_on(ipam.quarantine(&space(), ip("10.0.0.2"), &why(None))).unwrap();
        assert_eq!(lease(&ipam, "c4", Some("shop/cache")).unwrap(), ["10.0.0.3/29"]);
        assert!(block_on(ipam.lift(&space(), ip("10.0.0.2"))).unwrap());
        // A fixed one waits for its own, and has it again.
        release(&ipam, "c1");
        block_on(ipam.quarantine(&space(), ip("10.0.0.5"), &why(None))).unwrap();
        assert!(matches!(lease(&ipam, "c5", Some("shop/db")).unwrap_err(), LeaseError::Held { .. }));
        assert!(block_on(ipam.lift(&space(), ip("10.0.0.5"))).unwrap());
        assert_eq!(lease(&ipam, "c5", Some("shop/db")).unwrap(), ["10.0.0.5/29"]);
        let taken = block_on(ipam.reserve("p", &key("ops/x"), Some(ip("10.0.0.5")), KeepPolicy::Forever)).unwrap_err();
        assert!(matches!(taken, LeaseError::Held { .. }), "{taken}");
    });
}

#[test]
fn a_claims_address_is_the_claims_when_its_quarantine_ends() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(JSON, &store));
        let (cache, own) = (key("shop/cache"), ip("10.0.0.1"));
        assert_eq!(lease(&ipam, "c0", Some("shop/cache")).unwrap(), ["10.0.0.1/29"]);
        for i in 1..5 {
            lease(&ipam, &format!("c{i}"), None).unwrap();
        }
        let refuses_others = |when: &str| {
            clock.advance(1000);
            let refused = lease(&ipam, "more", None).unwrap_err();
            assert!(matches!(refused, LeaseError::Exhausted { .. }), "{when}: {refused}");
            let mut asked = request("more", None);
            asked.addresses = vec![own];
            let refused = block_on(ipam.lease(&asked)).unwrap_err();
            assert!(matches!(refused, LeaseError::Held { .. }), "{when}: {refused}");
            let usage = block_on(ipam.usage()).unwrap().remove(0);
            assert_eq!((usage.kept, usage.cooling, usage.quarantined), (2, 0, 0), "{when}");
        };
        release(&ipam, "c0");
        block_on(ipam.quarantine(&space(), own, &why(Some(60)))).unwrap();
        refuses_others("here");
        assert_eq!(lease(&ipam, "c0", Some("shop/cache")).unwrap(), ["10.0.0.1/29"]);
        release(&ipam, "c0");
        // While another cluster has the claim it may be in use there.
        block_on(ipam.hand_out(&space(), &cache, &"b".parse().unwrap())).unwrap().unwrap();
        block_on(ipam.quarantine(&space(), own, &why(Some(60)))).unwrap();
        refuses_others("away");
        assert_eq!(block_on(ipam.expire()).unwrap(), 1);
        refuses_others("away and swept");
        block_on(ipam.take_back(&space(), &cache)).unwrap();
        block_on(ipam.quarantine(&space(), own, &why(Some(60)))).unwrap();
        refuses_others("home");
        // Once there is no claim any more it is anybody's.
        block_on(ipam.forget(&space(), &cache)).unwrap();
        assert_eq!(lease(&ipam, "more", None).unwrap(), ["10.0.0.1/29"]);
    });
}

#[test]
fn what_a_claim_left_in_quarantine_is_anybodys_when_that_ends() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(JSON, &store));
        assert_eq!(lease(&ipam, "c0", Some("shop/cache")).unwrap(), ["10.0.0.1/29"]);
        release(&ipam, "c0");
        block_on(ipam.quarantine(&space(), ip("10.0.0.1"), &why(Some(60)))).unwrap();
        assert_eq!(lease(&ipam, "c0", Some("shop/cache")).unwrap(), ["10.0.0.2/29"]);
        for i in 1..4 {
            lease(&ipam, &format!("c{i}"), None).unwrap();
        }
        assert!(lease(&ipam, "more", None).is_err());
        clock.advance(66);
        assert_eq!(lease(&ipam, "more", None).unwrap(), ["10.0.0.1/29"]);
    });
}

#[test]
fn a_configuration_without_the_pool_loses_no_address_when_a_quarantine_ends() {
    each_store(|store, _| {
        let clock = Clock::new();
        let json = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/30" } ] }"#;
        let other = json.replace("10.0.0.0", "10.1.0.0").replace(r#""p""#, r#""q""#);
        let (ipam, other) = (clock.drive(ipam(json, &store)), clock.drive(ipam(&other, &store)));
        block_on(ipam.quarantine(&space(), ip("10.0.0.1"), &why(Some(60)))).unwrap();
        clock.advance(61);
        // The store does not know the pool either.
        assert_eq!(block_on(other.expire()).unwrap(), 0);
        assert_eq!(block_on(ipam.quarantined()).unwrap().len(), 1);
        assert_eq!(lease(&ipam, "a", None).unwrap(), ["10.0.0.2/30"]);
        assert_eq!(block_on(other.expire()).unwrap(), 1);
        assert_eq!(block_on(ipam.quarantined()).unwrap(), []);
        clock.advance(6);
        assert_eq!(lease(&ipam, "b", None).unwrap(), ["10.0.0.1/30"]);
    });
}

/// As who attaches asks for it, who knows the trait alone.
#[test]
fn whoever_found_a_conflict_gets_another_address_and_the_first_is_nobodys_for_an_hour() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(JSON, &store));
        let source: &dyn AddressSource = &ipam;
        let holder = "02:00:00:00:00:99".parse().unwrap();
        let conflict = |address| Conflict { address: ip(address), holder, evidence: Evidence::Used };
        let (own, old) = (attachment("c1"), block_on(source.lease(&request("c1", None))).unwrap());
        let new = block_on(source.replace(&own, old.sequence(), &conflict("10.0.0.1"))).unwrap().unwrap();
        assert_eq!(texts(&new), ["10.0.0.2/29"]);
        // The reply was lost.
        let again = block_on(source.replace(&own, old.sequence(), &conflict("10.0.0.1"))).unwrap();
        assert_eq!(again, Some(new.clone()));
        let listed = block_on(ipam.quarantined()).unwrap();
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].address, listed[0].seen), (ip("10.0.0.1"), Some(holder)));
        assert_eq!(listed[0].until, Some(clock.now() + 3_600_000));
        assert!(listed[0].reason.contains("10.0.0.1 is used by 02:00:00:00:00:99"), "{}", listed[0].reason);
        // Of a lease that is over.
        let late = block_on(source.replace(&own, old.sequence(), &conflict("10.0.0.2"))).unwrap_err();
        assert!(late.is_retryable(), "{late}");
        // One that the configuration fixes is nobody else's.
        let fixed = block_on(source.lease(&request("c2", Some("shop/db")))).unwrap();
        let refused = block_on(source.replace(&attachment("c2"), fixed.sequence(), &conflict("10.0.0.5"))).unwrap();
        assert_eq!(refused, None);
        assert_eq!(block_on(source.held(&attachment("c2"))).unwrap(), Some(fixed));
        assert_eq!(block_on(ipam.quarantined()).unwrap().len(), 1);
    });
}

/// A neighbour that answers every probe, and a runtime that tries again at once.
#[test]
fn whoever_answers_for_every_address_does_not_use_up_the_pool() {
    each_store(|store, _| {
        for (n, (family, length, limit)) in [(4, 24, 31), (4, 26, 16), (6, 64, 1024)].into_iter().enumerate() {
            let subnet = match family {
                4 => format!("10.77.{n}.0/{length}"),
                _ => format!("2001:db8:77:{n}::/{length}"),
            };
            let clock = Clock::new();
            let json = r#"{ "cooldown": "5s", "pools": [ { "name": "p", "subnet": "SUBNET" } ] }"#;
            let ipam = clock.drive(ipam(&json.replace("SUBNET", &subnet), &store));
            let source: &dyn AddressSource = &ipam;
            let conflict = |address, last: u8| Conflict {
                address,
                holder: MacAddr::new([2, 0, 0, 0, 0, last]),
                evidence: Evidence::Used,
            };
            let own = attachment("c1");
            // As an ADD: some replacements, then it gives up.
            let add = |replacements: usize| -> Result<(), LeaseError> {
                let mut lease = block_on(source.lease(&request("c1", None)))?;
                let mut result = Ok(());
                for i in 0..replacements {
                    let bad = lease.addresses[0].address.addr();
                    match block_on(source.replace(&own, lease.sequence(), &conflict(bad, 1 + (i % 6) as u8))) {
                        Ok(other) => lease = other.unwrap(),
                        Err(error) => {
                            // Nothing changed.
                            assert_eq!(block_on(source.held(&own)).unwrap().unwrap(), lease);
                            result = Err(error);
                            break;
                        }
                    }
                }
                block_on(source.release(&own, lease.sequence())).unwrap();
                result
            };
            let quarantined = || block_on(ipam.usage()).unwrap()[0].quarantined;
            let adds = limit / 8 + 20;
            let failed: Vec<LeaseError> = (0..adds).filter_map(|_| add(8).err()).collect();
            assert_eq!(quarantined(), limit as u128, "{subnet}");
            assert_eq!(failed.len(), adds - limit / 8, "{subnet}");
            for error in &failed {
                assert!(matches!(error, LeaseError::Contested { live, .. } if *live == limit), "{error}");
                assert!(error.is_retryable());
            }
            let told = failed[0].to_string();
            assert!(told.contains("02:00:00:00:00:01 (") && told.contains(" and 2 more"), "{told}");
            // Who is in conflict with nobody has an address all the same.
            add(0).unwrap();
            // By hand, the guard removed: more.
            let lease = block_on(source.lease(&request("c1", None))).unwrap();
            let bad = lease.addresses[0].address.addr();
            block_on(ipam.replace(&own, lease.sequence(), bad, &why(Some(3600)))).unwrap().unwrap();
            assert_eq!(quarantined(), limit as u128 + 1);
            release(&ipam, "c1");
            // Once they end, the next may.
            clock.advance(3601);
            add(1).unwrap();
        }
    });
}
