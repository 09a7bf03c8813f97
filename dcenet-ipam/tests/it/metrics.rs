//! What a scrape shows after known operations.

use std::sync::Arc;

use dcenet_core::probe::{Conflict, Evidence};
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Ipam;
use dcenet_ipam::metrics::{Cause, MeasuredSource, Metrics};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::flaky::{Failure, FlakyStore, MeetingStore};
use dcenet_ipam::store::measured::MeasuredStore;
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;
use prometheus_client::registry::Registry;

use crate::{attachment, config, each_store, request};

const POOLS: &str = r#"{ "pools": [ { "name": "db", "subnet": "10.0.0.0/29", "gateway": "10.0.0.1",
    "claims": { "shop/db": { "address": "10.0.0.6" } } } ] }"#;

struct Scraped(Registry);

impl Scraped {
    fn text(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.0).unwrap();
        text
    }

    /// The value of a sample, by its name without the prefix, and its labels as they are written.
    fn value(&self, sample: &str) -> Option<f64> {
        let wanted = format!("dcenet_ipam_{sample} ");
        let text = self.text();
        let mut values = text.lines().filter_map(|line| line.strip_prefix(&wanted)).map(|v| v.parse().unwrap());
        let first = values.next();
        assert_eq!(values.next(), None, "{sample} twice in {text}");
        first
    }

    /// All samples of a metric with their values.
    fn all(&self, metric: &str) -> Vec<String> {
        let wanted = format!("dcenet_ipam_{metric}{{");
        let text = self.text();
        let mut found: Vec<String> =
            text.lines().filter_map(|line| Some(line.strip_prefix(&wanted)?.to_owned())).collect();
        found.sort_unstable();
        found
    }
}

fn measured(store: Arc<dyn Store>) -> (Scraped, Metrics, MeasuredSource<Ipam>) {
    let config = config(POOLS);
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry, &config.layout().unwrap());
    let ipam = Ipam::new(&config, Arc::new(MeasuredStore::new(store, &metrics))).unwrap();
    let ipam = MeasuredSource::new(ipam, &metrics);
    (Scraped(registry), metrics, ipam)
}

#[test]
fn a_scrape_shows_what_was_done() {
    each_store(|store, _| {
        let (scraped, metrics, ipam) = measured(store);
        assert_eq!(scraped.all("requests_total"), [""; 0]);
        for container in ["a", "b", "c", "d"] {
            block_on(ipam.lease(&request(container, None))).unwrap();
        }
        let db = block_on(ipam.lease(&request("db", Some("shop/db")))).unwrap();
        let full = block_on(ipam.lease(&request("e", None))).unwrap_err();
        assert!(matches!(full, LeaseError::Exhausted { .. }), "{full}");
        let asked = |address: &str| {
            let mut asked = request("f", None);
            asked.addresses = vec![address.parse().unwrap()];
            block_on(ipam.lease(&asked)).unwrap_err()
        };
        assert!(matches!(asked("10.0.0.2"), LeaseError::Held { .. }));
        assert!(matches!(asked("10.9.0.2"), LeaseError::Invalid { .. }));
        let a = block_on(ipam.held(&attachment("a"))).unwrap().unwrap();
        block_on(ipam.release(&attachment("a"), a.sequence())).unwrap();
        block_on(ipam.release(&attachment("db"), db.sequence())).unwrap();
        // Not held any more, which DEL may ask for again.
        block_on(ipam.release(&attachment("db"), db.sequence())).unwrap();
        let valid = [("c".parse().unwrap(), "eth0".parse().unwrap()), ("d".parse().unwrap(), "eth0".parse().unwrap())];
        assert_eq!(block_on(ipam.retain(&"net".parse().unwrap(), &valid)).unwrap(), [attachment("b")]);
        metrics.count_reclaimed(Cause::Node, 2);

        assert_eq!(
            scraped.all("requests_total"),
            [
                r#"operation="held",outcome="ok"} 1"#,
                r#"operation="lease",outcome="exhausted"} 1"#,
                r#"operation="lease",outcome="held"} 1"#,
                r#"operation="lease",outcome="invalid"} 1"#,
                r#"operation="lease",outcome="ok"} 5"#,
                r#"operation="release",outcome="ok"} 3"#,
                r#"operation="retain",outcome="ok"} 1"#,
            ]
        );
        assert_eq!(scraped.all("exhaustions_total"), [r#"pool="db"} 1"#]);
        assert_eq!(scraped.all("conflicts_total"), [r#"pool="db"} 1"#]);
        assert_eq!(scraped.all("reclaimed_attachments_total"), [r#"cause="gc"} 1"#, r#"cause="node"} 2"#]);
        // Registering records that the claim keeps its address; so does its release.
        assert_eq!(
            scraped.all("address_changes_total"),
            [
                r#"space="default",pool="db",state="bound"} 5"#,
                r#"space="default",pool="db",state="kept"} 2"#,
                r#"space="default",pool="db",state="released"} 2"#,
            ]
        );
        for (operation, calls) in [("lease", 8.0), ("held", 1.0), ("release", 3.0), ("retain", 1.0)] {
            let sample = format!("request_duration_seconds_count{{operation=\"{operation}\"}}");
            assert_eq!(scraped.value(&sample), Some(calls), "{operation}");
            let sample = format!("request_duration_seconds_bucket{{le=\"+Inf\",operation=\"{operation}\"}}");
            assert_eq!(scraped.value(&sample), Some(calls), "{}", scraped.text());
            let sample = format!("request_duration_seconds_sum{{operation=\"{operation}\"}}");
            assert!(scraped.value(&sample).unwrap() > 0.0);
        }
        let commits = scraped.value(r#"store_commits_total{outcome="committed"}"#).unwrap();
        // Five leases and three releases wrote; each of a release that was not held did not have to.
        assert!(commits >= 8.0, "{}", scraped.text());
        assert_eq!(scraped.value(r#"store_operation_duration_seconds_count{operation="commit"}"#), Some(commits));
        assert_eq!(scraped.all("store_errors_total"), [""; 0]);

        // Nothing is read for a scrape: the gauges are what was published last.
        assert_eq!(scraped.all("addresses"), [""; 0]);
        let capacity = block_on(ipam.capacity()).unwrap();
        metrics.publish(&capacity);
        let gauges = |counts: [u8; 6]| {
            let states = ["bound", "kept", "cooling", "quarantined", "reserved", "free"];
            let mut all = Vec::from_iter(states.into_iter().zip(counts));
            all.sort_unstable();
            let line = |(state, n)| format!("space=\"default\",pool=\"db\",state=\"{state}\"}} {n}.0");
            all.into_iter().map(line).collect::<Vec<_>>()
        };
        assert_eq!(scraped.all("addresses"), gauges([2, 1, 2, 0, 0, 0]));
        assert_eq!(scraped.value("addresses_revision"), Some(capacity.revision as f64));
        assert!(scraped.text().ends_with("# EOF\n"));
    });
}

#[test]
fn a_failing_store_is_seen_by_operation_and_kind() {
    for (failure, outcome) in [(Failure::Before, "failed"), (Failure::Lost, "unknown"), (Failure::After, "unknown")] {
        let inner: Arc<dyn Store> = Arc::new(MemoryStore::new());
        block_on(Ipam::new(&config(POOLS), inner.clone()).unwrap().ready()).unwrap();
        // The commit of the lease is the last call: one earlier than a whole lease has.
        let counting = Arc::new(FlakyStore::new(inner.clone(), failure, 0));
        let (_, _, ipam) = measured(counting.clone());
        block_on(ipam.lease(&request("a", None))).unwrap();
        let last = counting.calls();

        let (scraped, _, ipam) = measured(Arc::new(FlakyStore::new(inner, failure, last)));
        let result = block_on(ipam.lease(&request("b", None)));
        assert_eq!(scraped.value(&format!("store_commits_total{{outcome=\"{outcome}\"}}")), Some(1.0));
        let errors = scraped.all("store_errors_total");
        if outcome == "failed" {
            assert!(matches!(result.unwrap_err(), LeaseError::Store(_)));
            assert_eq!(errors, [r#"operation="commit",kind="unavailable"} 1"#]);
            assert_eq!(scraped.all("requests_total"), [r#"operation="lease",outcome="store"} 1"#]);
            assert_eq!(scraped.all("address_changes_total"), [""; 0]);
        } else {
            // Unknown is no failure: what became of it is read, and it is done again where it was lost.
            result.unwrap();
            assert_eq!(errors, [""; 0]);
            assert_eq!(scraped.all("requests_total"), [r#"operation="lease",outcome="ok"} 1"#]);
            assert_eq!(scraped.value(r#"store_commits_total{outcome="committed"}"#), Some(1.0));
        }
        assert_eq!(
            scraped.value(r#"store_operation_duration_seconds_count{operation="read"}"#).map(|n| n > 0.0),
            Some(true)
        );
    }
}

#[test]
fn a_lost_race_is_counted_and_without_a_rival_none_is() {
    let run = |racers: usize| {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        block_on(Ipam::new(&config(POOLS), store.clone()).unwrap().ready()).unwrap();
        let store: Arc<dyn Store> = match racers {
            1 => store,
            // Both have decided from the same state before one of them commits.
            _ => MeetingStore::over(store, b"s/"),
        };
        let (scraped, _, ipam) = measured(store);
        std::thread::scope(|scope| {
            for name in &["a", "b"][..racers] {
                let ipam = &ipam;
                scope.spawn(move || block_on(ipam.lease(&request(name, None))).unwrap());
            }
        });
        let count = |outcome| scraped.value(&format!("store_commits_total{{outcome=\"{outcome}\"}}")).unwrap_or(0.0);
        (count("committed"), count("conflict"))
    };
    assert_eq!(run(1), (1.0, 0.0));
    assert_eq!(run(2), (2.0, 1.0));
}

#[test]
fn a_replacement_reaches_the_source_and_is_counted() {
    each_store(|store, _| {
        let (scraped, _, ipam) = measured(store);
        let lease = block_on(ipam.lease(&request("a", None))).unwrap();
        let address = lease.addresses[0].address.addr();
        let conflict = Conflict { address, holder: "02:00:00:00:00:99".parse().unwrap(), evidence: Evidence::Used };
        let other = block_on(ipam.replace(&attachment("a"), lease.sequence(), &conflict)).unwrap().unwrap();
        assert_ne!(other.addresses[0].address.addr(), address);
        assert_eq!(
            scraped.all("requests_total"),
            [r#"operation="lease",outcome="ok"} 1"#, r#"operation="replace",outcome="ok"} 1"#]
        );
    });
}
