//! Metrics for Prometheus, of the callers, of the store, and of how full the pools are.
//!
//! ```
//! # use std::sync::Arc;
//! # use dcenet_core::provider::{AddressSource, LeaseRequest};
//! # use dcenet_ipam::{Ipam, store::memory::MemoryStore};
//! use dcenet_ipam::metrics::{MeasuredSource, Metrics};
//! use dcenet_ipam::store::measured::MeasuredStore;
//! use prometheus_client::registry::Registry;
//! # pollster::block_on(async {
//! # let config: dcenet_ipam::IpamConfig =
//! #     serde_json::from_str(r#"{ "pools": [ { "name": "db", "subnet": "10.20.0.0/24" } ] }"#)?;
//! # let store = Arc::new(MemoryStore::new());
//!
//! let mut registry = Registry::default(); // the embedder's own
//! let metrics = Metrics::register(&mut registry, &config.layout()?);
//! let ipam = Ipam::new(&config, Arc::new(MeasuredStore::new(store, &metrics)))?;
//! let ipam = MeasuredSource::new(ipam, &metrics);
//! # let attachment = serde_json::from_str(r#"{ "network": "shop", "container": "c1", "ifname": "eth0" }"#)?;
//! ipam.lease(&LeaseRequest::new(attachment)).await?;
//!
//! metrics.publish(&ipam.capacity().await?); // or whenever a `CapacityFeed` tells of a change
//! let mut text = String::new();
//! prometheus_client::encoding::text::encode(&mut text, &registry)?;
//! assert!(text.contains(r#"dcenet_ipam_addresses{space="default",pool="db",state="bound"} 1"#));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # }).unwrap();
//! ```
//!
//! All names begin with `dcenet_ipam_`:
//!
//! | Name | Labels | Of |
//! |---|---|---|
//! | `requests_total` | operation, outcome | calls of [`MeasuredSource`] |
//! | `request_duration_seconds` | operation | how long they took |
//! | `exhaustions_total` | pool | leases that found no free address |
//! | `conflicts_total` | pool | leases of an address that is another's |
//! | `reclaimed_attachments_total` | cause | attachments released because they are gone: by `gc`, `absence` or `node` |
//! | `address_changes_total` | space, pool, state | addresses that became `bound`, `handover`, `kept`, `released`, `quarantined` or `unused`, by whatever command |
//! | `store_commits_total` | outcome | batches that [`MeasuredStore`] sent: `committed`, `conflict` (a lost race, decided again), `unknown` or `failed` |
//! | `store_operation_duration_seconds` | operation | how long the store took |
//! | `store_errors_total` | operation, kind | what it failed at |
//! | `addresses` | space, pool, state | what becomes of the addresses now: `bound`, `kept`, `cooling`, `quarantined`, `reserved`, `free` |
//! | `addresses_revision` | | of which revision of the store `addresses` tells |
//!
//! An outcome is `ok` or the kind of the [`LeaseError`]. An address that is in no pool of the configuration has an empty
//! `pool`. Changes that were committed although the store answered `unknown` are not in `address_changes_total`.
//!
//! [`MeasuredStore`]: crate::store::measured::MeasuredStore

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use dcenet_core::model::{AttachmentKey, ContainerId, IfName, NetworkName};
use dcenet_core::probe::Conflict;
use dcenet_core::provider::{AddressSource, Lease, LeaseError, LeaseRequest};
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::capacity::Capacity;
use crate::config::Layout;
use crate::model::{Addr, AddressSpace, Family as AddressFamily};
use crate::record::{SlotRecord, slot_prefix};
use crate::store::{Outcome, StoreError, Write, number_of};

/// A label's name and value.
type Label = (&'static str, Cow<'static, str>);

/// What is counted; see the [module](self). Clones count into the same.
#[derive(Clone)]
pub struct Metrics {
    pools: Arc<[Subnet]>,
    requests: Family<[Label; 2], Counter>,
    request_duration: Durations,
    exhaustions: Family<[Label; 1], Counter>,
    conflicts: Family<[Label; 1], Counter>,
    reclaimed: Family<[Label; 1], Counter>,
    changes: Family<[Label; 3], Counter>,
    commits: Family<[Label; 1], Counter>,
    store_duration: Durations,
    store_errors: Family<[Label; 2], Counter>,
    addresses: Addresses,
}

type Durations = Family<[Label; 1], Histogram, fn() -> Histogram>;

/// Where the addresses of a pool are.
struct Subnet {
    space: AddressSpace,
    subnet: ipnet::IpNet,
    pool: String,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// Why attachments were released that nobody gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// Snapshots of what is alive did not name them ([`Reclaimer::observe`](crate::reclaim::Reclaimer::observe)).
    Absence,
    /// The runtime's GC did not name them ([`AddressSource::retain`]); [`MeasuredSource`] counts these.
    Gc,
    /// Their node is dead ([`Ipam::drop_node`](crate::Ipam::drop_node)).
    Node,
}

impl Metrics {
    /// Enters all metrics into a registry. `layout` tells which pool an address is of.
    pub fn register(registry: &mut Registry, layout: &Layout) -> Self {
        let pools =
            layout.pools.iter().map(|p| Subnet { space: p.space.clone(), subnet: p.subnet, pool: p.name.clone() });
        let metrics = Self {
            pools: pools.collect(),
            requests: Family::default(),
            request_duration: Family::new_with_constructor(duration_buckets),
            exhaustions: Family::default(),
            conflicts: Family::default(),
            reclaimed: Family::default(),
            changes: Family::default(),
            commits: Family::default(),
            store_duration: Family::new_with_constructor(duration_buckets),
            store_errors: Family::default(),
            addresses: Addresses::default(),
        };
        let r = registry.sub_registry_with_prefix("dcenet_ipam");
        r.register("requests", "Calls, by operation and outcome", metrics.requests.clone());
        let (help, duration) = ("How long calls took, by operation", metrics.request_duration.clone());
        r.register_with_unit("request_duration", help, Unit::Seconds, duration);
        r.register(
            "exhaustions",
            "Leases that found no free address, by the last pool tried",
            metrics.exhaustions.clone(),
        );
        r.register("conflicts", "Leases of an address that is another's, by its pool", metrics.conflicts.clone());
        r.register(
            "reclaimed_attachments",
            "Attachments released because they are gone, by cause",
            metrics.reclaimed.clone(),
        );
        r.register("address_changes", "Addresses by what they became", metrics.changes.clone());
        r.register("store_commits", "Batches by outcome; a conflict is a lost race", metrics.commits.clone());
        let (help, duration) = ("How long the store took, by operation", metrics.store_duration.clone());
        r.register_with_unit("store_operation_duration", help, Unit::Seconds, duration);
        r.register("store_errors", "What the store failed at, by operation and kind", metrics.store_errors.clone());
        r.register_collector(Box::new(metrics.addresses.clone()));
        metrics
    }

    /// Shows these counts until the next call. Nothing is read when somebody scrapes: who embeds the allocator decides how
    /// often the pools are counted, after each change that a [`CapacityFeed`](crate::capacity::CapacityFeed) tells or at
    /// intervals.
    pub fn publish(&self, capacity: &Capacity) {
        *self.addresses.0.lock() = Some(capacity.clone());
    }

    /// Counts attachments that were released because they are gone.
    pub fn count_reclaimed(&self, cause: Cause, attachments: usize) {
        let cause = match cause {
            Cause::Absence => "absence",
            Cause::Gc => "gc",
            Cause::Node => "node",
        };
        self.reclaimed.get_or_create(&[("cause", cause.into())]).inc_by(attachments as u64);
    }

    fn pool_of(&self, space: Option<&AddressSpace>, address: Addr) -> Cow<'static, str> {
        let ip = address.ip();
        let of = |s: &&Subnet| space.is_none_or(|space| s.space == *space) && s.subnet.contains(&ip);
        self.pools.iter().find(of).map_or(Cow::Borrowed(""), |s| s.pool.clone().into())
    }

    /// Counts a call.
    fn count<T>(&self, operation: &'static str, begun: Instant, result: &Result<T, LeaseError>) {
        let seconds = begun.elapsed().as_secs_f64();
        self.request_duration.get_or_create(&[("operation", operation.into())]).observe(seconds);
        let outcome = match result {
            Ok(_) => "ok",
            Err(LeaseError::Busy(_)) => "busy",
            Err(LeaseError::Contested { .. }) => "contested",
            Err(LeaseError::Damaged(_)) => "damaged",
            Err(LeaseError::Exhausted { .. }) => "exhausted",
            Err(LeaseError::Held { .. }) => "held",
            Err(LeaseError::Invalid { .. }) => "invalid",
            Err(LeaseError::Outside { .. }) => "outside",
            Err(LeaseError::Store(_)) => "store",
            Err(_) => "other",
        };
        self.requests.get_or_create(&[("operation", operation.into()), ("outcome", outcome.into())]).inc();
        match result {
            Err(LeaseError::Exhausted { pool, .. }) if operation == "lease" => {
                self.exhaustions.get_or_create(&[("pool", pool.clone().into())]).inc();
            }
            Err(LeaseError::Held { address, .. }) if operation == "lease" => {
                let pool = self.pool_of(None, Addr::from(*address));
                self.conflicts.get_or_create(&[("pool", pool)]).inc();
            }
            _ => {}
        }
    }

    /// Counts a call of the store.
    pub(crate) fn count_store<T>(&self, operation: &'static str, begun: Instant, result: &Result<T, StoreError>) {
        let seconds = begun.elapsed().as_secs_f64();
        self.store_duration.get_or_create(&[("operation", operation.into())]).observe(seconds);
        if let Err(error) = result {
            self.count_store_error(operation, error);
        }
    }

    pub(crate) fn count_store_error(&self, operation: &'static str, error: &StoreError) {
        let kind = match error {
            StoreError::Corrupt { .. } => "corrupt",
            StoreError::Denied(_) => "denied",
            StoreError::Io { .. } => "io",
            StoreError::Misuse(_) => "misuse",
            StoreError::Unavailable(_) => "unavailable",
        };
        self.store_errors.get_or_create(&[("operation", operation.into()), ("kind", kind.into())]).inc();
    }

    /// Counts a batch and, where it was committed, what it made of addresses.
    pub(crate) fn count_commit(&self, writes: &[Write], result: &Result<Outcome, StoreError>) {
        let outcome = match result {
            Ok(Outcome::Committed { .. }) => "committed",
            Ok(Outcome::Conflict(_)) => "conflict",
            Ok(Outcome::Unknown { .. }) => "unknown",
            Err(_) => "failed",
        };
        self.commits.get_or_create(&[("outcome", outcome.into())]).inc();
        if outcome != "committed" {
            return;
        }
        for write in writes {
            let Some((space, address)) = slot_of(write.key()) else { continue };
            let state = match write {
                Write::Delete(_) => "unused",
                Write::Put(_, value) => match serde_json::from_slice(value) {
                    Ok(SlotRecord::Bound { .. }) => "bound",
                    Ok(SlotRecord::Handover { .. }) => "handover",
                    Ok(SlotRecord::Kept { .. }) => "kept",
                    Ok(SlotRecord::Quarantined { .. }) => "quarantined",
                    Ok(SlotRecord::Freed { .. }) => "released",
                    // Of a later version of this crate.
                    Err(_) => "other",
                },
            };
            let pool = self.pool_of(Some(&space), address);
            let labels = [("space", space.to_string().into()), ("pool", pool), ("state", state.into())];
            self.changes.get_or_create(&labels).inc();
        }
    }
}

/// Space and address of the key of a slot.
fn slot_of(key: &[u8]) -> Option<(AddressSpace, Addr)> {
    let rest = key.strip_prefix(b"s/")?;
    let space: AddressSpace = std::str::from_utf8(rest.split(|b| *b == b'/').next()?).ok()?.parse().ok()?;
    [AddressFamily::V4, AddressFamily::V6].into_iter().find_map(|family| {
        let bits = number_of(&slot_prefix(&space, family), key).ok()?;
        Some((space.clone(), Addr { family, bits }))
    })
}

/// From 0.25 ms, which a cached answer takes, to 8 s, which no ADD waits for.
fn duration_buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.00025, 2.0, 16))
}

/// The gauges of the last counts.
#[derive(Clone, Default)]
struct Addresses(Arc<Mutex<Option<Capacity>>>);

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Addresses").finish_non_exhaustive()
    }
}

impl Collector for Addresses {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let capacity = self.0.lock();
        let Some(capacity) = &*capacity else { return Ok(()) };
        let help = "What becomes of the addresses of a pool now, by state";
        let mut family = encoder.encode_descriptor("addresses", help, None, MetricType::Gauge)?;
        for pool in &capacity.pools {
            for (state, count) in [
                ("bound", pool.bound),
                ("kept", pool.kept),
                ("cooling", pool.cooling),
                ("quarantined", pool.quarantined),
                ("reserved", pool.reserved),
                ("free", pool.available),
            ] {
                let labels =
                    [("space", pool.space.to_string()), ("pool", pool.pool.clone()), ("state", state.to_owned())];
                ConstGauge::new(count as f64).encode(family.encode_family(&labels)?)?;
            }
        }
        let help = "The revision of the store that the counts of addresses are of";
        let revision = encoder.encode_descriptor("addresses_revision", help, None, MetricType::Gauge)?;
        ConstGauge::new(capacity.revision as f64).encode(revision)
    }
}

/// A source of addresses whose calls are counted and timed.
#[derive(Debug)]
pub struct MeasuredSource<S> {
    inner: S,
    metrics: Metrics,
}

impl<S> MeasuredSource<S> {
    /// Counts into `metrics`.
    pub fn new(inner: S, metrics: &Metrics) -> Self {
        Self { inner, metrics: metrics.clone() }
    }
}

/// What is called on the source itself is not counted.
impl<S> Deref for MeasuredSource<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.inner
    }
}

#[async_trait]
impl<S: AddressSource> AddressSource for MeasuredSource<S> {
    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, LeaseError> {
        let begun = Instant::now();
        let result = self.inner.lease(request).await;
        self.metrics.count("lease", begun, &result);
        result
    }

    async fn held(&self, attachment: &AttachmentKey) -> Result<Option<Lease>, LeaseError> {
        let begun = Instant::now();
        let result = self.inner.held(attachment).await;
        self.metrics.count("held", begun, &result);
        result
    }

    async fn replace(
        &self,
        attachment: &AttachmentKey,
        sequence: u64,
        conflict: &Conflict,
    ) -> Result<Option<Lease>, LeaseError> {
        let begun = Instant::now();
        let result = self.inner.replace(attachment, sequence, conflict).await;
        self.metrics.count("replace", begun, &result);
        result
    }

    fn is_fixed(&self, address: IpAddr) -> bool {
        self.inner.is_fixed(address)
    }

    async fn release(&self, attachment: &AttachmentKey, sequence: u64) -> Result<(), LeaseError> {
        let begun = Instant::now();
        let result = self.inner.release(attachment, sequence).await;
        self.metrics.count("release", begun, &result);
        result
    }

    async fn retain(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
    ) -> Result<Vec<AttachmentKey>, LeaseError> {
        let begun = Instant::now();
        let result = self.inner.retain(network, valid).await;
        self.metrics.count("retain", begun, &result);
        if let Ok(released) = &result {
            self.metrics.count_reclaimed(Cause::Gc, released.len());
        }
        result
    }

    async fn ready(&self) -> Result<(), LeaseError> {
        let begun = Instant::now();
        let result = self.inner.ready().await;
        self.metrics.count("ready", begun, &result);
        result
    }
}
