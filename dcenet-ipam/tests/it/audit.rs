//! Check and repair. Damage is planted by raw writes, one kind at a time.

use std::cell::Cell;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_ipam::audit::{Damage, Finding, Repaired, Severity};
use dcenet_ipam::binder::recording::RecordingBinder;
use dcenet_ipam::binder::{BinderSource, OutsideSource};
use dcenet_ipam::model::{Claim, KeepPolicy};
use dcenet_ipam::plan;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError, Write};
use dcenet_ipam::{Ipam, Quarantine};
use pollster::block_on;
use proptest::prelude::*;

use crate::{attachment, each_store, ipam, lease, release, request};

/// The operators' tool, as it is run.
#[path = "../../examples/check.rs"]
#[allow(dead_code, reason = "its main is not called")]
mod tool;

const JSON: &str = r#"{ "cooldown": "5s", "history": { "keep": "720h", "count": 64 }, "node": { "name": "n1" }, "pools": [
    { "name": "a", "subnet": "10.0.0.0/24", "exclude": ["10.0.0.100-10.0.0.110"],
      "claims": { "w/fixed": { "address": "10.0.0.3" }, "w/stay": { "keep": "workload" },
                  "w/brief": { "address": "10.0.0.4", "keep": "ephemeral" }, "w/while": { "keep": "1h" } } },
    { "name": "blocks", "subnet": "10.1.0.0/24", "block": { "size": 16 }, "group": "second" },
    { "name": "prefixes", "subnet": "fd00::/48", "delegate": 64 } ] }"#;

thread_local! {
    static NOW: Cell<u64> = const { Cell::new(1_000_000_000) };
}

fn clock() -> u64 {
    NOW.with(Cell::get)
}

fn open(store: &Arc<dyn Store>) -> Ipam {
    ipam(JSON, store).with_clock(clock)
}

fn commit(store: &Arc<dyn Store>, writes: Vec<Write>) {
    let request_id = u128::from(clock()) << 64 | writes.len() as u128 | u128::from(next_id()) << 32;
    let outcome = block_on(store.commit(&Batch { guards: Vec::new(), writes, request_id })).unwrap();
    assert!(matches!(outcome, Outcome::Committed { .. }), "{outcome:?}");
}

fn next_id() -> u32 {
    thread_local! { static NEXT: Cell<u32> = const { Cell::new(1) }; }
    NEXT.with(|next| next.replace(next.get() + 1))
}

fn put(key: impl Into<Key>, value: &str) -> Write {
    Write::Put(key.into(), value.as_bytes().to_vec())
}

fn delete(key: impl Into<Key>) -> Write {
    Write::Delete(key.into())
}

fn bits(address: &str) -> u128 {
    match address.parse().unwrap() {
        std::net::IpAddr::V4(ip) => u32::from(ip).into(),
        std::net::IpAddr::V6(ip) => ip.into(),
    }
}

/// A key by its text and the numbers behind it.
fn numbered(text: &str, numbers: &[&[u8]]) -> Key {
    [text.as_bytes().to_vec(), numbers.concat()].concat()
}

fn slot(address: &str) -> Key {
    let family = if address.contains(':') { '6' } else { '4' };
    numbered(&format!("s/default/{family}"), &[&bits(address).to_be_bytes()])
}

fn bound(container: &str) -> String {
    format!(r#"{{"bound":{{"by":"net/{container}/eth0"}}}}"#)
}

fn value(store: &Arc<dyn Store>, key: &[u8]) -> Option<String> {
    let entry = block_on(store.read(&[key.to_vec()])).unwrap().remove(0)?;
    Some(String::from_utf8(entry.value).unwrap())
}

fn findings(ipam: &Ipam) -> Vec<Finding> {
    block_on(ipam.check()).unwrap().findings
}

fn shown(findings: &[Finding]) -> Vec<String> {
    findings.iter().map(|finding| finding.to_string()).collect()
}

/// A store in which everything that there is stands once.
fn furnished(store: &Arc<dyn Store>) -> Ipam {
    NOW.with(|now| now.set(1_000_000_000));
    let ours = open(store);
    for (container, workload) in
        [("c1", None), ("c2", None), ("c3", Some("w/fixed")), ("c4", Some("w/stay")), ("c5", Some("w/while"))]
    {
        lease(&ours, container, workload).unwrap();
    }
    NOW.with(|now| now.set(now.get() + 10));
    // One address free, one kept for ever, one for a time.
    for container in ["c2", "c3", "c5"] {
        release(&ours, container);
    }
    let why = Quarantine { reason: "somebody answers".into(), time: Some(Duration::from_secs(60)), seen: None };
    block_on(ours.quarantine(&Default::default(), "10.0.0.77".parse().unwrap(), &why)).unwrap();
    let claim = Claim {
        key: "w/moving".parse().unwrap(),
        address: Some("10.0.0.50".parse::<std::net::IpAddr>().unwrap().into()),
        keep: KeepPolicy::Forever,
        mac: None,
    };
    block_on(ours.record_claim("a", &claim)).unwrap();
    lease(&ours, "c6", Some("w/moving")).unwrap();
    block_on(ours.begin_handover(&attachment("c6"), None, Some(&attachment("c7")), Duration::from_secs(600))).unwrap();
    lease(&ours, "c7", Some("w/moving")).unwrap();
    block_on(ours.reserve_external(&Default::default(), "10.0.0.200-10.0.0.210".parse().unwrap(), "routers")).unwrap();
    assert_eq!(shown(&findings(&ours)), Vec::<String>::new(), "a sound store");
    ours
}

/// The address that a container has in a pool.
fn address(ipam: &Ipam, container: &str, pool: &str) -> String {
    let lease = block_on(ipam.held(&attachment(container))).unwrap().unwrap();
    let found = lease.addresses.iter().find(|a| a.pool == pool).unwrap();
    found.address.addr().to_string()
}

/// Plants damage, sees exactly it, mends it, and sees nothing, on each backend.
fn planted(
    damage: impl Fn(&Ipam) -> Vec<Write>,
    expected: impl Fn(&Damage) -> bool,
    severity: Severity,
    repaired: impl Fn(&Ipam),
) {
    each_store(|store, _| {
        let ours = furnished(&store);
        let before = block_on(ours.bindings(None)).unwrap();
        commit(&store, damage(&ours));
        let audit = block_on(ours.check()).unwrap();
        let [finding] = &audit.findings[..] else { panic!("{:#?}", shown(&audit.findings)) };
        assert!(expected(&finding.damage) && finding.severity() == severity, "{finding}");
        assert!(finding.remedy.is_some(), "{finding}");
        assert_eq!(block_on(ours.repair(&audit.findings)).unwrap(), [Repaired::Done], "{finding}");
        assert_eq!(shown(&findings(&ours)), Vec::<String>::new(), "after the repair");
        // Once more, it finds other records than it rests on.
        assert_eq!(block_on(ours.repair(&audit.findings)).unwrap(), [Repaired::Changed]);
        // Whoever held an address holds it.
        let after = block_on(ours.bindings(None)).unwrap();
        for binding in before {
            let holds =
                |b: &&dcenet_ipam::model::Binding| b.attachment == binding.attachment && b.address == binding.address;
            assert!(after.iter().any(|b| holds(&b)), "{binding:?} is gone");
        }
        repaired(&ours);
    });
}

#[test]
fn an_attachment_whose_address_counts_as_free_gets_it_back() {
    planted(
        |ours| vec![delete(slot(&address(ours, "c1", "a")))],
        |damage| matches!(damage, Damage::AttachmentWithoutSlot { attachment: by, .. } if *by == attachment("c1")),
        Severity::Danger,
        |ours| {
            let asked =
                LeaseRequest { addresses: vec![address(ours, "c1", "a").parse().unwrap()], ..request("x", None) };
            block_on(ours.lease(&asked)).unwrap_err();
        },
    );
}

#[test]
fn of_two_who_hold_an_address_the_one_in_its_record_keeps_it() {
    planted(
        |ours| {
            let address = address(ours, "c1", "a");
            let record = format!(r#"{{"addresses":[{{"address":"{address}/24","pool":"a"}}]}}"#);
            vec![put("t/net/ghost/eth0", &record)]
        },
        |damage| matches!(damage, Damage::AttachmentLostAddress { holder, .. } if holder == "attachment net/c1/eth0"),
        Severity::Danger,
        |ours| assert_eq!(block_on(ours.held(&attachment("ghost"))).unwrap(), None),
    );
}

#[test]
fn an_address_of_an_attachment_without_a_record_can_be_released_again() {
    planted(
        |_| vec![put(slot("10.0.0.60"), &bound("lost"))],
        |damage| matches!(damage, Damage::SlotWithoutAttachment { attachment: by, .. } if *by == attachment("lost")),
        Severity::Leak,
        |ours| {
            assert_eq!(address(ours, "lost", "a"), "10.0.0.60");
            release(ours, "lost");
            // Its beginning is in no history, and its end is.
            assert_eq!(shown(&findings(ours)), Vec::<String>::new());
        },
    );
}

#[test]
fn the_second_of_a_handover_is_entered_again() {
    planted(
        |ours| {
            let record = value(ours.store(), b"t/net/c7/eth0").unwrap();
            let mut record: serde_json::Value = serde_json::from_str(&record).unwrap();
            record["addresses"].as_array_mut().unwrap().retain(|held| held["pool"] != "a");
            vec![put("t/net/c7/eth0", &record.to_string())]
        },
        |damage| matches!(damage, Damage::SlotWithoutAttachment { attachment: by, .. } if *by == attachment("c7")),
        Severity::Leak,
        |ours| assert_eq!(address(ours, "c7", "a"), "10.0.0.50"),
    );
}

#[test]
fn a_claims_address_that_counts_as_free_is_kept_again() {
    planted(
        |_| vec![delete(slot("10.0.0.3"))],
        |damage| matches!(damage, Damage::ClaimWithoutSlot { claim, .. } if claim.to_string() == "w/fixed"),
        Severity::Danger,
        |ours| assert_eq!(lease(ours, "new", Some("w/fixed")).unwrap()[0], "10.0.0.3/24"),
    );
}

#[test]
fn a_claim_that_lost_its_address_is_forgotten() {
    planted(
        |ours| {
            let address = address(ours, "c1", "a");
            let record = format!(r#"{{"address":"{address}","pool":"a","keep":"forever"}}"#);
            vec![put("c/default/4/w/robbed", &record)]
        },
        |damage| matches!(damage, Damage::ClaimLostAddress { holder, .. } if holder == "attachment net/c1/eth0"),
        Severity::Leak,
        |_| {},
    );
}

#[test]
fn what_is_kept_for_a_claim_without_a_record_is_its_own_again() {
    planted(
        |_| vec![delete("c/default/4/w/fixed")],
        |damage| matches!(damage, Damage::SlotWithoutClaim { claim, .. } if claim.to_string() == "w/fixed"),
        Severity::Leak,
        |ours| assert_eq!(lease(ours, "new", Some("w/fixed")).unwrap()[0], "10.0.0.3/24"),
    );
    // It has another address: this one goes back.
    planted(
        |_| vec![put(slot("10.0.0.70"), r#"{"kept":{"claim":"w/fixed"}}"#)],
        |damage| matches!(damage, Damage::SlotWithoutClaim { .. }),
        Severity::Leak,
        |ours| assert!(value(ours.store(), &slot("10.0.0.70")).unwrap().contains("freed")),
    );
}

#[test]
fn states_that_no_queue_lists_are_listed_again() {
    let freed = |ours: &Ipam| {
        let all = block_on(ours.store().scan(b"f/default/4/a/", None, 10)).unwrap();
        vec![delete(all[0].0.clone())]
    };
    planted(freed, |d| matches!(d, Damage::Unlisted { state: "released", .. }), Severity::Leak, |_| {});
    let due = |ours: &Ipam| {
        let all = block_on(ours.store().scan(b"k/default/4/", None, 10)).unwrap();
        vec![delete(all[0].0.clone())]
    };
    planted(due, |d| matches!(d, Damage::Unlisted { state: "to end at a time", .. }), Severity::Leak, |_| {});
    let quarantine = numbered("q/default/4", &[&bits("10.0.0.77").to_be_bytes()]);
    planted(
        |_| vec![delete(quarantine.clone())],
        |d| matches!(d, Damage::Unlisted { state: "in quarantine", .. }),
        Severity::Leak,
        |ours| assert_eq!(block_on(ours.quarantined()).unwrap().len(), 1),
    );
    let prefix = |ours: &Ipam| {
        let all = block_on(ours.store().scan(b"p/default/6/prefixes/", None, 10)).unwrap();
        vec![delete(all[0].0.clone())]
    };
    let is_prefix = |d: &Damage| matches!(d, Damage::Unlisted { state: "the first of a delegated prefix", .. });
    planted(prefix, is_prefix, Severity::Leak, |_| {});
}

#[test]
fn rows_that_tell_of_nothing_are_taken_away() {
    let (at, free) = (7_u64.to_be_bytes(), bits("10.0.0.90").to_be_bytes());
    let rows = [
        numbered("f/default/4/a/", &[&at, &free]),
        numbered("k/default/4/", &[&at, &free]),
        numbered("q/default/4", &[&free]),
        numbered("o/default/4/blocks/n9/", &[&0x0a0_1009_u128.to_be_bytes()]),
        numbered("p/default/6/prefixes/", &[&(bits("fd00:0:0:77::") >> 64).to_be_bytes()]),
    ];
    for row in rows {
        let gone = row.clone();
        planted(
            |_| vec![put(row.clone(), "")],
            |damage| matches!(damage, Damage::StrayRow { .. }),
            Severity::Hint,
            |ours| assert_eq!(value(ours.store(), &gone), None),
        );
    }
}

#[test]
fn blocks_that_their_node_does_not_find_are_listed_again() {
    let listed = |ours: &Ipam| {
        let all = block_on(ours.store().scan(b"o/default/4/blocks/n1/", None, 10)).unwrap();
        vec![delete(all[0].0.clone())]
    };
    let is_block = |damage: &Damage| matches!(damage, Damage::BlockUnlisted { node, .. } if node == "n1");
    planted(listed, is_block, Severity::Leak, |_| {});
}

#[test]
fn reservations_are_counted_again() {
    planted(
        |ours| {
            let record =
                value(ours.store(), b"e/default").unwrap().replace(r#""reservations":1"#, r#""reservations":0"#);
            vec![put("e/default", &record)]
        },
        |damage| matches!(damage, Damage::ReservationCount { counted: 0, found: 1, .. }),
        Severity::Danger,
        |ours| {
            let asked = LeaseRequest { addresses: vec!["10.0.0.205".parse().unwrap()], ..request("x", None) };
            let error = block_on(ours.lease(&asked)).unwrap_err().to_string();
            assert!(error.contains("routers"), "{error}");
        },
    );
}

#[test]
fn a_tenure_that_nobody_has_is_ended() {
    let event = numbered(
        "h/default/4",
        &[&bits("10.0.0.91").to_be_bytes(), &1_000_000_000_u64.to_be_bytes(), &7_u32.to_be_bytes()],
    );
    planted(
        |_| vec![put(event.clone(), r#"{"e":"b","by":"net/ghost/eth0"}"#)],
        |damage| matches!(damage, Damage::OpenTenure { attachment: by, .. } if *by == attachment("ghost")),
        Severity::Hint,
        |ours| {
            let tenures = block_on(ours.history(&Default::default(), "10.0.0.91".parse().unwrap())).unwrap();
            assert_eq!(tenures[0].to, Some(clock()));
        },
    );
}

#[test]
fn records_that_cannot_be_read_are_made_anew_from_the_others() {
    let unreadable = |damage: &Damage| matches!(damage, Damage::Unreadable { .. });
    let garbage = "{ not json";
    planted(
        |ours| vec![put(slot(&address(ours, "c1", "a")), garbage)],
        unreadable,
        Severity::Danger,
        |ours| release(ours, "c1"),
    );
    planted(
        |_| vec![put("t/net/c1/eth0", garbage)],
        unreadable,
        Severity::Danger,
        |ours| assert_eq!(block_on(ours.held(&attachment("c1"))).unwrap().unwrap().addresses.len(), 3),
    );
    planted(
        |_| vec![put("c/default/4/w/fixed", garbage)],
        unreadable,
        Severity::Danger,
        |ours| assert_eq!(lease(ours, "new", Some("w/fixed")).unwrap()[0], "10.0.0.3/24"),
    );
    planted(
        |_| vec![put(slot("10.0.0.3"), garbage)],
        unreadable,
        Severity::Danger,
        |ours| {
            assert_eq!(lease(ours, "new", Some("w/fixed")).unwrap()[0], "10.0.0.3/24");
        },
    );
    planted(
        |_| vec![put(slot("10.0.0.66"), garbage)],
        unreadable,
        Severity::Danger,
        |ours| {
            assert!(value(ours.store(), &slot("10.0.0.66")).unwrap().contains("freed"));
        },
    );
    let first = |ours: &Ipam, prefix: &[u8]| block_on(ours.store().scan(prefix, None, 1)).unwrap().remove(0).0;
    planted(
        |ours| vec![put(first(ours, b"b/"), garbage)],
        unreadable,
        Severity::Danger,
        |ours| {
            assert!(block_on(ours.blocks()).unwrap().iter().all(|block| block.owner == "n1"));
        },
    );
    planted(
        |ours| vec![put(first(ours, b"x/"), garbage)],
        unreadable,
        Severity::Danger,
        |ours| {
            let all = block_on(ours.reservations(&Default::default())).unwrap();
            assert!(all.len() == 1 && all[0].holder.starts_with("unknown"), "{all:?}");
        },
    );
    planted(|_| vec![put("n/n1", garbage)], unreadable, Severity::Danger, |_| {});
    planted(|_| vec![put("k/default/4/short", "")], unreadable, Severity::Danger, |_| {});
    planted(
        |_| vec![put("e/default", garbage)],
        unreadable,
        Severity::Danger,
        |ours| {
            lease(ours, "new", None).unwrap();
        },
    );
}

/// Each of the two would say that the other is nobody's.
#[test]
fn records_of_one_lease_that_cannot_be_read_free_nothing_together() {
    each_store(|store, _| {
        let ours = furnished(&store);
        let own = slot(&address(&ours, "c1", "a"));
        let garbage = "{ not json";
        commit(&store, vec![put(own.clone(), garbage), put("t/net/c1/eth0", garbage)]);
        for _ in 0..2 {
            let found = findings(&ours);
            assert!(found.len() >= 2, "{:?}", shown(&found));
            block_on(ours.repair(&found)).unwrap();
        }
        assert_eq!(value(&store, &own).unwrap(), garbage);
        assert_eq!(value(&store, b"t/net/c1/eth0").unwrap(), garbage);
    });
}

/// A place in a set, or a claim whose record is lost, is not told by the workload's name.
#[test]
fn an_address_kept_for_a_claim_of_another_name_stays_with_who_runs_on_it() {
    each_store(|store, _| {
        let ours = furnished(&store);
        let own = slot(&address(&ours, "c1", "a"));
        commit(&store, vec![put(own.clone(), r#"{"kept":{"claim":"shop/web#0"}}"#)]);
        block_on(ours.repair(&findings(&ours))).unwrap();
        let now = value(&store, &own).unwrap();
        assert!(now.contains("bound") && now.contains("net/c1/eth0") && now.contains("shop/web#0"), "{now}");
        assert_eq!(block_on(ours.held(&attachment("c1"))).unwrap().unwrap().addresses.len(), 3);
    });
}

/// What only people can decide is told, and left alone.
#[test]
fn what_has_no_remedy_is_told_and_left_alone() {
    type Plant = fn(&Ipam) -> Vec<Write>;
    type Is = fn(&Damage) -> bool;
    let cases: [(Plant, Is, Severity); 4] = [
        (
            |_| {
                let record = r#"{"addresses":[{"address":"10.9.0.1/24","pool":"gone"}]}"#;
                vec![put("t/net/abroad/eth0", record), put(slot("10.9.0.1"), &bound("abroad"))]
            },
            |damage| matches!(damage, Damage::InNoPool { .. }),
            Severity::Hint,
        ),
        (
            |_| {
                let record = r#"{"addresses":[{"address":"10.0.0.105/24","pool":"a"}]}"#;
                vec![put("t/net/odd/eth0", record), put(slot("10.0.0.105"), &bound("odd"))]
            },
            |damage| matches!(damage, Damage::NotHandedOut { .. }),
            Severity::Hint,
        ),
        (
            |_| {
                let record = r#"{"addresses":[{"address":"10.0.0.205/24","pool":"a"}]}"#;
                vec![put("t/net/intruder/eth0", record), put(slot("10.0.0.205"), &bound("intruder"))]
            },
            |damage| matches!(damage, Damage::InReserved { outsider, .. } if outsider == "routers"),
            Severity::Danger,
        ),
        (
            |_| {
                let held = |address| format!(r#"{{"address":"{address}/24","pool":"a"}}"#);
                let record = format!(r#"{{"addresses":[{},{}]}}"#, held("10.0.0.80"), held("10.0.0.81"));
                let slots = ["10.0.0.80", "10.0.0.81"].map(|address| put(slot(address), &bound("greedy")));
                slots.into_iter().chain([put("t/net/greedy/eth0", &record)]).collect()
            },
            |damage| matches!(damage, Damage::TwoOfPool { .. }),
            Severity::Hint,
        ),
    ];
    for (plant, is, severity) in cases {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let ours = furnished(&store);
        commit(&store, plant(&ours));
        let found = findings(&ours);
        assert!(matches!(&found[..], [one] if is(&one.damage) && one.severity() == severity), "{:?}", shown(&found));
        let before = block_on(store.scan(b"", None, usize::MAX)).unwrap();
        assert_eq!(block_on(ours.repair(&found)).unwrap(), [Repaired::NotRepairable]);
        assert_eq!(block_on(store.scan(b"", None, usize::MAX)).unwrap(), before);
    }
}

#[test]
fn a_pool_that_the_fleet_plan_in_the_store_does_not_know_is_told() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = furnished(&store);
    let planner = plan::Plan::new(store.clone(), "test").unwrap();
    block_on(planner.add_space(&Default::default(), &[])).unwrap();
    let claim = |cidr: &str, name: &str, level| plan::Claim::at(cidr.parse().unwrap(), level, name, "test");
    block_on(planner.own(&claim("10.0.0.0/8", "all", plan::Level::Fleet))).unwrap();
    block_on(planner.claim(&claim("10.0.0.0/24", "a", plan::Level::Pool))).unwrap();
    let found = findings(&ours);
    // The plan knows no pools of IPv6.
    assert!(
        matches!(&found[..], [Finding { damage: Damage::Unplanned { pool, .. }, .. }] if pool == "blocks"),
        "{:?}",
        shown(&found)
    );
}

#[test]
fn a_record_that_changed_since_is_not_mended() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = furnished(&store);
    commit(&store, vec![put(slot("10.0.0.60"), &bound("lost"))]);
    let found = findings(&ours);
    // Meanwhile the attachment leases.
    lease(&ours, "lost", None).unwrap();
    assert_eq!(block_on(ours.repair(&found)).unwrap(), [Repaired::Changed]);
    // What is true now can be mended, and the lease stays.
    let held = block_on(ours.held(&attachment("lost"))).unwrap().unwrap();
    let found = findings(&ours);
    assert_eq!(block_on(ours.repair(&found)).unwrap(), [Repaired::Done], "{:?}", shown(&found));
    let after = block_on(ours.held(&attachment("lost"))).unwrap().unwrap();
    assert_eq!((after.addresses.len(), after.sequence()), (held.addresses.len() + 1, held.sequence()));
}

/// A store to which somebody writes whenever it is scanned, and whose clock goes on meanwhile.
#[derive(Debug)]
struct Busy(Arc<dyn Store>);

#[async_trait]
impl Store for Busy {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.0.read(keys).await
    }
    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        NOW.with(|now| now.set(now.get() + 7));
        commit(&self.0, vec![put("elsewhere/beat", &clock().to_string())]);
        self.0.scan(prefix, after, limit).await
    }
    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        self.0.commit(batch).await
    }
    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.0.first_gap(prefix, range).await
    }
    fn caps(&self) -> Caps {
        self.0.caps()
    }
}

/// Among what is planted are findings whose remedy bears the time.
#[test]
fn a_busy_store_hides_no_finding() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = furnished(&store);
    let open = numbered("h/default/4", &[&bits("10.0.0.90").to_be_bytes(), &9_u64.to_be_bytes(), &[0; 4]]);
    commit(&store, vec![put(open, r#"{"e":"b","by":"net/ghost/eth0"}"#)]);
    commit(&store, vec![put(slot("10.0.0.91"), r#"{"kept":{"claim":"w/stay","until":null}}"#)]);
    commit(&store, vec![put("e/odd", "{ not ours")]);
    let quiet = block_on(ours.check()).unwrap();
    assert_eq!(quiet.findings.len(), 3, "{:?}", shown(&quiet.findings));
    let busy: Arc<dyn Store> = Arc::new(Busy(store.clone()));
    let ours = self::open(&busy);
    let audit = block_on(ours.check()).unwrap();
    assert!(audit.revision > quiet.revision);
    assert_eq!(shown(&audit.findings), shown(&quiet.findings));
    let mended = block_on(ours.repair(&audit.findings)).unwrap();
    assert_eq!(mended, vec![Repaired::Done; 3]);
    assert_eq!(shown(&block_on(ours.check()).unwrap().findings), Vec::<String>::new());
}

/// Prefixes that were delegated before a pool was shrunk or given up are still in use.
#[test]
fn prefixes_of_ground_that_was_given_up_are_no_stray_rows() {
    let pool = |name: &str, subnet: &str, length: u8| {
        format!(
            r#"{{ "cooldown": "0s", "pools": [ {{ "name": "{name}", "subnet": "{subnet}", "delegate": {length} }} ] }}"#
        )
    };
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let wide = ipam(&pool("p", "2001:db8::/61", 64), &store);
    for container in ["a", "b", "c", "d", "e", "f"] {
        lease(&wide, container, None).unwrap();
    }
    let shrunk = ipam(&pool("p", "2001:db8::/62", 64), &store);
    lease(&shrunk, "a", None).unwrap();
    block_on(shrunk.ready()).unwrap_err();
    let odd: Vec<_> = findings(&shrunk).into_iter().map(|f| (f.damage, f.remedy)).collect();
    assert_eq!(odd.len(), 2, "{odd:?}");
    for (damage, remedy) in odd {
        assert!(matches!(&damage, Damage::NotHandedOut { pool, .. } if pool == "p"), "{damage}");
        assert_eq!(remedy, None);
    }
    // A pool that nobody registers any more, of which the length of the prefixes is not known.
    let entry = block_on(store.read(&[b"e/default".to_vec()])).unwrap().remove(0).unwrap();
    let mut record: serde_json::Value = serde_json::from_slice(&entry.value).unwrap();
    record["pools"] = serde_json::json!([]);
    commit(&store, vec![put("e/default", &record.to_string())]);
    let strays = |ipam: &Ipam| findings(ipam).iter().filter(|f| matches!(f.damage, Damage::StrayRow { .. })).count();
    assert_eq!(strays(&shrunk), 0, "{:?}", shown(&findings(&shrunk)));
    // The twin: a row of the same pool for which there is nothing.
    let row = numbered("p/default/6/p/", &[&(bits("2001:db8:0:77::") >> 64).to_be_bytes()]);
    commit(&store, vec![put(row, "")]);
    assert_eq!(strays(&shrunk), 1);
}

/// What an outside has, against the leases.
#[test]
fn records_of_an_outside_are_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = furnished(&store);
    let binder = RecordingBinder::new(dir.path().join("record")).with_subnet("10.9.0.0/24".parse().unwrap());
    let outside = OutsideSource::new(store.clone(), Default::default(), "lan", Arc::new(binder)).unwrap();
    let lease = block_on(outside.lease(&request("dhcp", None))).unwrap();
    assert_eq!(lease.addresses[0].address.to_string(), "10.9.0.1/24");
    assert_eq!(shown(&findings(&ours)), Vec::<String>::new(), "in no pool, and right");
    // Without its record, nobody renews it.
    let key = b"y/net/dhcp/eth0".to_vec();
    let page = value(&store, &key).unwrap();
    commit(&store, vec![delete(key.clone())]);
    let found = findings(&ours);
    assert!(matches!(&found[..], [Finding { damage: Damage::InNoPool { .. }, .. }]), "{:?}", shown(&found));
    commit(&store, vec![put(key.clone(), &page)]);
    // Without its lease, it stays bound outside.
    release(&ours, "dhcp");
    let found = findings(&ours);
    let [Finding { damage: Damage::OutsideWithoutLease { addresses, .. }, remedy: None, .. }, ..] = &found[..] else {
        panic!("{:?}", shown(&found))
    };
    assert_eq!((addresses.as_str(), found[0].severity()), ("10.9.0.1", Severity::Leak));
    assert_eq!(block_on(outside.recover()).unwrap().released, 1);
    assert_eq!(shown(&findings(&ours)), Vec::<String>::new());
    // Begun and not finished, and not to be understood.
    let intent = r#"{"stage":"intent","mac":"02:00:00:00:00:07"}"#;
    commit(&store, vec![put(key, intent), put("y/net/odd/eth0", "{ not ours")]);
    let found = findings(&ours);
    let [
        Finding { damage: Damage::OutsideUnfinished { .. }, .. },
        Finding { damage: Damage::Unreadable { .. }, remedy, .. },
    ] = &found[..]
    else {
        panic!("{:?}", shown(&found))
    };
    assert_eq!(*remedy, None, "what is bound outside would be forgotten");
}

#[test]
fn the_operators_tool_tells_and_mends() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store").display().to_string();
    let run = |arguments: &[&str]| {
        let arguments: Vec<String> = arguments.iter().map(|text| (*text).to_owned()).collect();
        let mut out = Vec::new();
        let sound = tool::run(&arguments, &mut out).map_err(|error| error.to_string())?;
        Ok::<_, String>((sound, String::from_utf8(out).unwrap()))
    };
    assert!(run(&[&path]).unwrap_err().contains("there is no store here"));
    assert!(!std::path::Path::new(&path).exists(), "it made one");
    assert!(run(&[]).unwrap_err().contains("no store"));
    assert!(run(&[&path, "--mend"]).unwrap_err().contains("--mend is no option"));
    assert!(run(&[&path, "-o", "yaml"]).unwrap_err().contains("yaml"));
    let store: Arc<dyn Store> = Arc::new(LogStore::open(std::path::Path::new(&path)).unwrap());
    let ours = furnished(&store);
    let (sound, text) = run(&[&path]).unwrap();
    assert!(sound && text.ends_with(": 0 mended, 0 left\n"), "{text}");
    // One that can be mended, and one that people must decide.
    let lost = address(&ours, "c1", "a");
    let record = r#"{"addresses":[{"address":"10.9.0.1/24","pool":"gone"}]}"#;
    let abroad = vec![put("t/net/abroad/eth0", record), put(slot("10.9.0.1"), &bound("abroad"))];
    commit(&store, [vec![delete(slot(&lost))], abroad.clone()].concat());
    let (sound, json) = run(&[&path, "-o", "json"]).unwrap();
    let told: serde_json::Value = serde_json::from_str(&json).unwrap();
    let all = |told: &serde_json::Value, what: &str| -> Vec<(String, bool)> {
        let found = told[what].as_array().unwrap().iter();
        found.map(|f| (f["severity"].as_str().unwrap().to_owned(), f["remedy"].is_string())).collect()
    };
    assert!(!sound);
    assert_eq!(all(&told, "findings"), [("hint".to_owned(), false), ("danger".to_owned(), true)], "{json}");
    assert_eq!(value(&store, &slot(&lost)), None, "a look changed the store");
    let (sound, json) = run(&[&path, "--repair", "-o", "json"]).unwrap();
    let told: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(!sound, "what people must decide is left");
    assert_eq!(all(&told, "mended"), [("danger".to_owned(), true)]);
    assert_eq!(all(&told, "findings"), [("hint".to_owned(), false)]);
    assert_eq!(address(&ours, "c1", "a"), lost);
    let (_, text) = run(&[&path]).unwrap();
    assert!(text.contains("people must decide") && text.ends_with(": 0 mended, 1 left\n"), "{text}");
    commit(&store, abroad.iter().map(|write| delete(write.key())).collect());
    assert!(run(&[&path, "--repair"]).unwrap().0);
    // With the configuration, what it does not hand out is told too.
    let file = dir.path().join("net.conf").display().to_string();
    std::fs::write(&file, format!(r#"{{ "cniVersion": "1.1.0", "ipam": {JSON} }}"#)).unwrap();
    let record = r#"{"addresses":[{"address":"10.0.0.105/24","pool":"a"}]}"#;
    commit(&store, vec![put("t/net/odd/eth0", record), put(slot("10.0.0.105"), &bound("odd"))]);
    assert!(run(&[&path]).unwrap().0);
    let (sound, text) = run(&[&path, "--config", &file]).unwrap();
    assert!(!sound && text.contains("10.0.0.105") && text.contains("does not hand it out"), "{text}");
}

#[derive(Debug, Clone)]
enum Action {
    Lease(u8, usize),
    Release(u8),
    Handover(u8, u8),
    Complete(u8),
    Abort(u8),
    Quarantine(u8),
    Lift(u8),
    Gone(usize),
    Forget(usize),
    Reserve(u8),
    Unreserve(u8),
    Blocks,
    Expire,
    Wait(u64),
}

const WORKLOADS: [Option<&str>; 6] = [None, None, Some("w/fixed"), Some("w/stay"), Some("w/brief"), Some("w/while")];

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        8 => (0..10_u8, 0..WORKLOADS.len()).prop_map(|(c, w)| Action::Lease(c, w)),
        6 => (0..10_u8).prop_map(Action::Release),
        2 => (0..10_u8, 0..10_u8).prop_map(|(a, b)| Action::Handover(a, b)),
        1 => (0..10_u8).prop_map(Action::Complete),
        1 => (0..10_u8).prop_map(Action::Abort),
        1 => (1..12_u8).prop_map(Action::Quarantine),
        1 => (1..12_u8).prop_map(Action::Lift),
        1 => (2..WORKLOADS.len()).prop_map(Action::Gone),
        1 => (2..WORKLOADS.len()).prop_map(Action::Forget),
        1 => (1..20_u8).prop_map(Action::Reserve),
        1 => (1..20_u8).prop_map(Action::Unreserve),
        1 => Just(Action::Blocks),
        1 => Just(Action::Expire),
        3 => prop_oneof![Just(1_u64), Just(5_000), Just(600_000), Just(4_000_000)].prop_map(Action::Wait),
    ]
}

fn act(ours: &Ipam, action: &Action) {
    let container = |c: &u8| attachment(&format!("c{c}"));
    let space = Default::default();
    let ip = |last: &u8| format!("10.0.0.{last}").parse().unwrap();
    let range = |last: &u8| format!("10.0.0.{last}").parse().unwrap();
    // Refusals are answers too.
    match action {
        Action::Lease(c, w) => drop(lease(ours, &format!("c{c}"), WORKLOADS[*w])),
        Action::Release(c) => release(ours, &format!("c{c}")),
        Action::Handover(a, b) => {
            drop(block_on(ours.begin_handover(&container(a), None, Some(&container(b)), Duration::from_secs(300))));
        }
        Action::Complete(c) => drop(block_on(ours.complete_handover(&container(c)))),
        Action::Abort(c) => drop(block_on(ours.abort_handover(&container(c)))),
        Action::Quarantine(last) => {
            let why = Quarantine { reason: "seen".into(), time: Some(Duration::from_secs(60)), seen: None };
            // One that is held is replaced.
            let held = block_on(ours.bindings(None)).unwrap();
            match held.iter().find(|b| b.address.addr() == ip(last)) {
                Some(b) => drop(block_on(ours.replace(&b.attachment, b.sequence, ip(last), &why))),
                None => drop(block_on(ours.quarantine(&space, ip(last), &why))),
            }
        }
        Action::Lift(last) => drop(block_on(ours.lift(&space, ip(last)))),
        Action::Gone(w) => drop(block_on(ours.workload_gone(&WORKLOADS[*w].unwrap().parse().unwrap()))),
        Action::Forget(w) => drop(block_on(ours.forget(&space, &WORKLOADS[*w].unwrap().parse().unwrap()))),
        Action::Reserve(last) => drop(block_on(ours.reserve_external(&space, range(last), "router"))),
        Action::Unreserve(last) => drop(block_on(ours.unreserve_external(&space, range(last), "router"))),
        Action::Blocks => drop(block_on(ours.release_empty_blocks())),
        Action::Expire => drop(block_on(ours.expire())),
        Action::Wait(ms) => NOW.with(|now| now.set(now.get() + ms)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_done_through_the_allocator_leaves_nothing_to_find(
        actions in prop::collection::vec(action(), 1..80),
    ) {
        NOW.with(|now| now.set(1_000_000_000));
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let ours = open(&store);
        for (i, action) in actions.iter().enumerate() {
            // Two events in a millisecond would have no order of their own.
            NOW.with(|now| now.set(now.get() + 1));
            act(&ours, action);
            let mut found = findings(&ours);
            // Who reserves a claim's address while it is in quarantine, and then lifts that, has said both.
            if actions[..i].iter().any(|before| matches!(before, Action::Quarantine(_))) {
                found.retain(|finding| !matches!(finding.damage, Damage::InReserved { .. }));
            }
            prop_assert!(found.is_empty(), "after {i}, {action:?}: {:#?}", shown(&found));
        }
    }
}
