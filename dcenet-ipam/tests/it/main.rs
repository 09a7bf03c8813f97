//! Tests of the crate from outside, in one binary.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod address_pool;
mod adopt;
mod applications;
mod audit;
mod binder;
mod blocks;
mod capacity;
mod claims;
mod config;
mod crash;
mod delegate;
#[cfg(feature = "etcd")]
mod etcd;
mod external;
mod fabric;
mod faults;
mod fill;
mod group;
mod groups;
mod handover;
mod history;
mod index;
mod lease;
mod log;
mod log_watch;
#[cfg(feature = "metrics")]
mod metrics;
mod model_check;
mod plan;
mod plan_fleet;
mod plan_property;
mod pools;
mod processes;
mod property;
mod quarantine;
mod races;
mod reclaim;
#[cfg(feature = "redb")]
mod redb;
mod resize;
mod sim;
mod watch;

use std::path::Path;
use std::sync::Arc;

use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{AddressSource, Lease, LeaseError, LeaseRequest};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;

pub(crate) fn config(json: &str) -> IpamConfig {
    serde_json::from_str(json).unwrap()
}

pub(crate) fn ipam(json: &str, store: &Arc<dyn Store>) -> Ipam {
    Ipam::new(&config(json), store.clone()).unwrap()
}

/// An attachment of network `net`, interface `eth0`.
pub(crate) fn attachment(container: &str) -> AttachmentKey {
    attachment_on("net", container)
}

pub(crate) fn attachment_on(network: &str, container: &str) -> AttachmentKey {
    AttachmentKey {
        network: network.parse().unwrap(),
        container: container.parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    }
}

pub(crate) fn request(container: &str, workload: Option<&str>) -> LeaseRequest {
    LeaseRequest { workload: workload.map(|w| w.parse().unwrap()), ..LeaseRequest::new(attachment(container)) }
}

/// Leases, and shows the addresses as text.
pub(crate) fn lease(ipam: &Ipam, container: &str, workload: Option<&str>) -> Result<Vec<String>, LeaseError> {
    block_on(ipam.lease(&request(container, workload))).map(|lease| texts(&lease))
}

pub(crate) fn texts(lease: &Lease) -> Vec<String> {
    lease.addresses.iter().map(|a| a.address.to_string()).collect()
}

pub(crate) fn release(ipam: &Ipam, container: &str) {
    block_on(ipam.release_current(&attachment(container))).unwrap();
}

/// Waits for the clock to go on: releases of one millisecond have no order.
pub(crate) fn later() {
    std::thread::sleep(std::time::Duration::from_millis(2));
}

/// Runs a test on every backend. The directory is the log's, empty for memory.
pub(crate) fn each_store(test: impl Fn(Arc<dyn Store>, &Path)) {
    let dir = tempfile::tempdir().unwrap();
    test(Arc::new(MemoryStore::new()), dir.path());
    let dir = tempfile::tempdir().unwrap();
    test(Arc::new(LogStore::open(dir.path()).unwrap()), dir.path());
}
