//! Which pools an attachment gets its addresses from, and what comes with them.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use dcenet_core::model::LabelSet;
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError};
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;

use crate::{attachment_on, config, each_store, ipam, lease, release, request, texts};

fn labels(pairs: &[(&str, &str)]) -> LabelSet {
    pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

fn invalid(result: Result<impl std::fmt::Debug, LeaseError>) -> (String, String) {
    match result.unwrap_err() {
        LeaseError::Invalid { field, reason } => (field, reason),
        other => panic!("{other}"),
    }
}

const SELECTED: &str = r#"{ "cooldown": "0s", "pools": [
    { "name": "rest", "subnet": "10.0.0.0/24" },
    { "name": "shop", "subnet": "10.1.0.0/24", "priority": -1, "select": { "namespaces": ["shop", "team-*"] } },
    { "name": "db", "subnet": "10.2.0.0/24", "priority": -2,
      "select": { "workloads": ["shop/db-?", "scan*"], "labels": { "matchLabels": { "tier": "data" },
                  "matchExpressions": [ { "key": "env", "operator": "NotIn", "values": ["test"] } ] } } },
    { "name": "rack1", "subnet": "10.3.0.0/24", "priority": -3,
      "select": { "nodes": ["rack1-*"], "nodeLabels": { "matchLabels": { "zone": "a" } } } },
    { "name": "lan", "subnet": "10.4.0.0/24", "priority": -4, "select": { "networks": ["lan*"] } } ] }"#;

#[test]
fn a_pool_is_chosen_by_namespace_workload_labels_node_and_network() {
    each_store(|store, _| {
        let ours = ipam(SELECTED, &store);
        let pool = |ipam: &Ipam, container: &str, workload: &str, pairs: &[(&str, &str)]| {
            let request = LeaseRequest { labels: labels(pairs), ..request(container, Some(workload)) };
            block_on(ipam.lease(&request)).unwrap().addresses[0].pool.clone()
        };
        let data = [("tier", "data")];
        assert_eq!(pool(&ours, "c1", "ops/web", &[]), "rest");
        assert_eq!(pool(&ours, "c2", "shop/web", &[]), "shop");
        assert_eq!(pool(&ours, "c3", "team-blue/web", &[]), "shop");
        assert_eq!(pool(&ours, "c4", "team/web", &[]), "rest");
        assert_eq!(pool(&ours, "c5", "shop/db-0", &data), "db");
        assert_eq!(pool(&ours, "c6", "ops/scanner", &data), "db");
        assert_eq!(pool(&ours, "c7", "shop/db-10", &data), "shop");
        assert_eq!(pool(&ours, "c8", "shop/db-1", &[]), "shop");
        assert_eq!(pool(&ours, "c9", "shop/db-1", &[("tier", "data"), ("env", "test")]), "shop");
        assert_eq!(block_on(ours.lease(&request("c10", None))).unwrap().addresses[0].pool, "rest");

        let there = ipam(SELECTED, &store).on_node("rack1-n1".parse().unwrap(), labels(&[("zone", "a")]));
        assert_eq!(pool(&there, "n1", "shop/db-0", &data), "rack1");
        let other_zone = ipam(SELECTED, &store).on_node("rack1-n1".parse().unwrap(), labels(&[("zone", "b")]));
        assert_eq!(pool(&other_zone, "n2", "ops/web", &[]), "rest");
        // The configuration may name the node too.
        let written = SELECTED.replacen('{', r#"{ "node": { "name": "rack1-n2", "labels": { "zone": "a" } },"#, 1);
        assert_eq!(pool(&ipam(&written, &store), "n3", "ops/web", &[]), "rack1");

        let on_lan = LeaseRequest::new(attachment_on("lan-2", "c1"));
        assert_eq!(block_on(there.lease(&on_lan)).unwrap().addresses[0].pool, "lan");
        // A lease that stands does not move when the choice would be another.
        let again = LeaseRequest { labels: labels(&data), ..request("c8", Some("shop/db-1")) };
        assert_eq!(block_on(ours.lease(&again)).unwrap().addresses[0].pool, "shop");
    });
}

#[test]
fn whoever_no_pool_serves_is_told_what_was_compared() {
    each_store(|store, _| {
        let json = r#"{ "pools": [
            { "name": "a", "subnet": "10.0.0.0/24", "select": { "namespaces": ["shop"] } },
            { "name": "b", "subnet": "10.1.0.0/24", "select": { "labels": { "matchLabels": { "tier": "data" } } } },
            { "name": "six", "subnet": "fd00::/64" } ] }"#;
        let ours = ipam(json, &store);
        let asked = LeaseRequest { labels: labels(&[("tier", "web")]), ..request("c1", Some("ops/web")) };
        let (field, reason) = invalid(block_on(ours.lease(&asked)));
        assert_eq!(field, "ipam.pools");
        for part in [
            "no IPv4 pool serves workload ops/web, labels {tier=web}, network net, no node",
            "pool a: namespace ops is not among shop",
            "pool b: label tier is \"web\", not \"data\"",
        ] {
            assert!(reason.contains(part), "{reason}\nlacks {part}");
        }
        assert_eq!(block_on(ours.bindings(None)).unwrap(), []);
        let (_, reason) = invalid(lease(&ours, "c1", None));
        assert!(reason.contains("pool a: namespace (unknown) is not among shop"), "{reason}");
        // STATUS asks for nobody in particular.
        block_on(ours.ready()).unwrap();
    });
}

#[test]
fn an_exhausted_pool_falls_through_by_priority_unless_it_is_strict() {
    each_store(|store, _| {
        let json = r#"{ "pools": [
            { "name": "third", "subnet": "10.0.2.0/32", "priority": 5 },
            { "name": "first", "subnet": "10.0.0.0/32", "priority": -5, "select": { "namespaces": ["*"] } },
            { "name": "second", "subnet": "10.0.1.0/32" },
            { "name": "strict", "subnet": "10.0.3.0/32", "priority": -9, "fallback": false,
              "select": { "namespaces": ["strict"] } } ] }"#;
        let ours = ipam(json, &store);
        assert_eq!(lease(&ours, "c1", Some("default/a")).unwrap(), ["10.0.0.0/32"]);
        assert_eq!(lease(&ours, "c2", Some("default/b")).unwrap(), ["10.0.1.0/32"]);
        assert_eq!(lease(&ours, "s1", Some("strict/a")).unwrap(), ["10.0.3.0/32"]);
        // The third pool has an address, and stays out of reach.
        let refused = lease(&ours, "s2", Some("strict/b")).unwrap_err();
        assert!(matches!(&refused, LeaseError::Exhausted { pool, .. } if pool == "strict"), "{refused}");
        assert_eq!(lease(&ours, "c3", None).unwrap(), ["10.0.2.0/32"]);
        let refused = lease(&ours, "c4", Some("default/c")).unwrap_err();
        assert!(matches!(&refused, LeaseError::Exhausted { pool, .. } if pool == "third"), "{refused}");
    });
}

#[test]
fn a_claim_stays_in_its_pool_whomever_that_selects() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [
            { "name": "vip", "subnet": "10.0.0.0/24", "select": { "namespaces": ["nobody"] },
              "claims": { "shop/db": { "address": "10.0.0.9" } } },
            { "name": "rest", "subnet": "10.1.0.0/24" } ] }"#;
        let ours = ipam(json, &store);
        assert_eq!(lease(&ours, "c1", Some("shop/db")).unwrap(), ["10.0.0.9/24"]);
        assert_eq!(lease(&ours, "c2", Some("shop/web")).unwrap(), ["10.1.0.1/24"]);
        let keep = dcenet_ipam::model::KeepPolicy::Forever;
        block_on(ours.reserve("vip", &"shop/web-2".parse().unwrap(), Some("10.0.0.7".parse().unwrap()), keep)).unwrap();
        assert_eq!(lease(&ours, "c3", Some("shop/web-2")).unwrap(), ["10.0.0.7/24"]);
        let mut asked = request("c4", None);
        asked.addresses = vec!["10.0.0.5".parse().unwrap()];
        let (field, reason) = invalid(block_on(ours.lease(&asked)));
        assert_eq!(field, "addresses");
        assert!(reason.contains("pool vip does not serve no workload"), "{reason}");
    });
}

const GROUPS: &str = r#"{ "cooldown": "0s", "pools": [
    { "name": "main", "subnet": "10.0.0.0/24", "gateway": "10.0.0.1", "vlan": 20, "mtu": 1500 },
    { "name": "six", "subnet": "fd00::/64" },
    { "name": "backup", "subnet": "10.1.0.0/31", "group": "backup", "mtu": 1400,
      "select": { "workloads": ["shop/db-*"] }, "routes": [ { "dst": "192.0.2.0/24" } ] },
    { "name": "backup-2", "subnet": "10.1.1.0/32", "group": "backup", "select": { "workloads": ["shop/db-*"] } },
    { "name": "storage", "subnet": "10.2.0.0/24", "group": "storage", "vlan": 30,
      "select": { "labels": { "matchExpressions": [ { "key": "storage", "operator": "Exists" } ] } } } ] }"#;

#[test]
fn an_attachment_gets_an_address_of_each_group_that_serves_it_or_none() {
    each_store(|store, _| {
        let ours = ipam(GROUPS, &store);
        assert_eq!(lease(&ours, "web", Some("shop/web")).unwrap(), ["10.0.0.2/24", "fd00::1/64"]);
        let request_db = |i: u8| request(&format!("db{i}"), Some(&format!("shop/db-{i}")));
        let first = block_on(ours.lease(&request_db(0))).unwrap();
        assert_eq!(texts(&first), ["10.0.0.3/24", "fd00::2/64", "10.1.0.0/31"]);
        assert_eq!(first.addresses[0].vlan.map(u16::from), Some(20));
        assert_eq!(first.vlan().map(u16::from), Some(20));
        assert_eq!(first.mtu().map(u32::from), Some(1400));
        assert_eq!(first.routes[0].destination.to_string(), "192.0.2.0/24");
        assert_eq!(block_on(ours.held(&first_key())).unwrap().as_ref(), Some(&first));
        assert_eq!(block_on(ours.lease(&request_db(1))).unwrap().addresses[2].pool, "backup");
        assert_eq!(block_on(ours.lease(&request_db(2))).unwrap().addresses[2].pool, "backup-2");
        let refused = block_on(ours.lease(&request_db(3))).unwrap_err();
        assert!(matches!(&refused, LeaseError::Exhausted { pool, .. } if pool == "backup-2"), "{refused}");
        assert_eq!(block_on(ours.bindings(None)).unwrap().len(), 2 + 3 * 3, "nothing of the refused one stayed");
        // One release gives all of them back.
        release(&ours, "db0");
        assert_eq!(block_on(ours.bindings(None)).unwrap().len(), 2 + 2 * 3);
        assert_eq!(block_on(ours.lease(&request_db(3))).unwrap().addresses.len(), 3);
        // Two VLANs on one interface.
        let torn = LeaseRequest { labels: labels(&[("storage", "yes")]), ..request("c", Some("shop/web")) };
        let (_, reason) = invalid(block_on(ours.lease(&torn)));
        assert!(reason.contains("pool main is in VLAN 20 and pool storage in VLAN 30"), "{reason}");
    });
}

fn first_key() -> dcenet_core::model::AttachmentKey {
    crate::attachment("db0")
}

#[test]
fn a_request_names_its_pools_and_gets_an_address_of_each_in_one_batch() {
    each_store(|store, _| {
        let ours = ipam(GROUPS, &store);
        let ask = |container: &str, workload: &str, pools: &[&str]| {
            let pools = pools.iter().map(ToString::to_string).collect();
            block_on(ours.lease(&LeaseRequest { pools, ..request(container, Some(workload)) }))
        };
        assert_eq!(texts(&ask("c1", "shop/web", &["six"]).unwrap()), ["fd00::1/64"]);
        // The order of the lease is that of the configuration.
        assert_eq!(texts(&ask("c2", "shop/db-0", &["backup*", "main"]).unwrap()), ["10.0.0.2/24", "10.1.0.0/31"]);
        for i in 1..3 {
            ask(&format!("d{i}"), "shop/db-0", &["backup*"]).unwrap();
        }
        let refused = ask("d3", "shop/db-0", &["main", "backup*"]).unwrap_err();
        assert!(matches!(&refused, LeaseError::Exhausted { pool, .. } if pool == "backup-2"), "{refused}");
        for (pools, field, part) in [
            (&["main", "mian"][..], "pools[1]", "\"mian\" names no pool of this configuration; there are main, six"),
            (&["main", "m*"], "pools[1]", "names pool main, which an entry before it names"),
            (&["backup"], "pools[0]", "no pool \"backup\" serves workload shop/web"),
            (&["main", "storage"], "pools[1]", "label storage is absent"),
            (&[""], "pools[0]", "names no pool"),
        ] {
            let (at, reason) = invalid(ask("bad", "shop/web", pools));
            assert_eq!(at, field, "{reason}");
            assert!(reason.contains(part), "{reason}\nlacks {part}");
        }
        assert_eq!(block_on(ours.held(&crate::attachment("bad"))).unwrap(), None);
        // Named pools and named addresses go together.
        let mut asked = request("c9", Some("shop/web"));
        asked.pools = vec!["main".to_owned()];
        asked.addresses = vec!["10.0.0.99".parse().unwrap()];
        assert_eq!(texts(&block_on(ours.lease(&asked)).unwrap()), ["10.0.0.99/24"]);
        asked.attachment = crate::attachment("c10");
        asked.addresses = vec!["fd00::99".parse().unwrap()];
        let (_, reason) = invalid(block_on(ours.lease(&asked)));
        assert!(reason.contains("pool six is not among those that the request names"), "{reason}");
    });
}

#[test]
fn wrong_choices_are_refused_by_field() {
    let cases = [
        (r#""select": { "namespaces": [""] }"#, "ipam.pools[0].select.namespaces[0]", "matches nothing"),
        (r#""select": { "namespaces": ["shop/db"] }"#, "ipam.pools[0].select.namespaces[0]", "in workloads"),
        (
            r#""select": { "labels": { "matchExpressions": [ { "key": "a", "operator": "In" } ] } }"#,
            "ipam.pools[0].select.labels.matchExpressions[0].values",
            "need at least one value",
        ),
        (
            r#""select": { "nodeLabels": { "matchExpressions": [ { "key": "a", "operator": "Exists", "values": ["b"] } ] } }"#,
            "ipam.pools[0].select.nodeLabels.matchExpressions[0].values",
            "\"b\" is not accepted: Exists and DoesNotExist take no values",
        ),
        (r#""group": "a/b""#, "ipam.pools[0].group", "\"a/b\""),
    ];
    for (keys, field, part) in cases {
        let json = format!(r#"{{ "pools": [ {{ "name": "p", "subnet": "10.0.0.0/24", {keys} }} ] }}"#);
        let error = config(&json).layout().unwrap_err();
        assert_eq!(error.field, field, "{error}");
        assert!(error.to_string().contains(part), "{error}\nlacks {part}");
    }
    let six = config(r#"{ "pools": [ { "name": "p", "subnet": "fd00::/64", "mtu": 1279 } ] }"#).layout().unwrap_err();
    assert!(six.to_string().contains("at least 1280"), "{six}");
    let node = r#"{ "node": { "name": "a b" }, "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#;
    let error = serde_json::from_str::<IpamConfig>(node).unwrap_err();
    assert!(error.to_string().contains("\"a b\""), "{error}");
    for bad in [
        r#""select": { "namespace": ["a"] }"#,
        r#""select": { "labels": { "matchExpressions": [ { "key": "a", "operator": "in", "values": ["b"] } ] } }"#,
        r#""vlan": 4095"#,
        r#""mtu": 67"#,
        r#""priority": "high""#,
    ] {
        let json = format!(r#"{{ "pools": [ {{ "name": "p", "subnet": "10.0.0.0/24", {bad} }} ] }}"#);
        serde_json::from_str::<IpamConfig>(&json).unwrap_err();
    }
}

#[test]
fn choices_read_back_as_written() {
    for json in [SELECTED, GROUPS] {
        let read = config(json);
        let again: IpamConfig = serde_json::from_str(&serde_json::to_string(&read).unwrap()).unwrap();
        assert_eq!(read, again);
    }
}

/// Counts what is asked of a store.
#[derive(Debug, Default)]
struct CountingStore {
    inner: MemoryStore,
    reads: AtomicUsize,
    keys: AtomicUsize,
    gaps: AtomicUsize,
    scans: AtomicUsize,
    commits: AtomicUsize,
}

impl CountingStore {
    fn take(&self) -> [usize; 5] {
        [&self.reads, &self.keys, &self.gaps, &self.scans, &self.commits].map(|n| n.swap(0, Ordering::Relaxed))
    }
}

#[async_trait]
impl Store for CountingStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.keys.fetch_add(keys.len(), Ordering::Relaxed);
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.scans.fetch_add(1, Ordering::Relaxed);
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.inner.commit(batch).await
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.gaps.fetch_add(1, Ordering::Relaxed);
        self.inner.first_gap(prefix, range).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

#[test]
fn features_that_are_not_configured_cost_no_read() {
    let store = Arc::new(CountingStore::default());
    let dynamic: Arc<dyn Store> = store.clone();
    let plain = ipam(r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#, &dynamic);
    lease(&plain, "c1", None).unwrap();
    store.take();
    // The space and the attachment; the slot that the gap shows. Reads, keys, gaps, scans, commits.
    lease(&plain, "c2", None).unwrap();
    assert_eq!(store.take(), [2, 3, 1, 0, 1]);
    // The claims of the workload, with and without interface.
    lease(&plain, "c3", Some("shop/web")).unwrap();
    assert_eq!(store.take(), [3, 5, 1, 0, 1]);
    release(&plain, "c2");
    assert_eq!(store.take(), [2, 2, 0, 1, 1]);
    let dual = r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/24" }, { "name": "q", "subnet": "fd00::/64" } ] }"#;
    let dual = ipam(dual, &dynamic);
    lease(&dual, "d1", None).unwrap();
    store.take();
    // A second family costs keys, not trips.
    lease(&dual, "d2", Some("shop/web")).unwrap();
    assert_eq!(store.take(), [3, 8, 2, 0, 1]);
}
