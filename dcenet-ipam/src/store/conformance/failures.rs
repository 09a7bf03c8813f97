//! The part of the suite about calls that fail.

use std::sync::Arc;

use dcenet_core::model::{AttachmentKey, ContainerId, IfName, LabelSet, NetworkName};
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};

use super::block_on;
use crate::store::flaky::{Failure, FlakyStore};
use crate::store::memory::MemoryStore;
use crate::store::{Key, Sharing, Store};
use crate::{Ipam, IpamConfig};

const JSON: &str = r#"{ "cooldown": "0s", "pools": [
    { "name": "v4", "subnet": "10.0.0.0/29", "claims": { "shop/db": { "address": "10.0.0.5" }, "shop/q": {} } },
    { "name": "v6", "subnet": "fd00::/64" } ] }"#;

type Operation = fn(&Ipam, bool) -> Result<(), LeaseError>;

const OPERATIONS: [Operation; 7] = [
    |ipam, asks| lease(ipam, "c1", Some("shop/db"), asks.then_some(["10.0.0.5", "fd00::1"])),
    |ipam, asks| lease(ipam, "c2", Some("shop/q"), asks.then_some(["10.0.0.1", "fd00::2"])),
    |ipam, _| block_on(ipam.release_current(&attachment("c1"))),
    |ipam, asks| lease(ipam, "c3", None, asks.then_some(["10.0.0.2", "fd00::1"])),
    |ipam, _| block_on(ipam.release_current(&attachment("c3"))),
    |ipam, asks| lease(ipam, "c4", None, asks.then_some(["10.0.0.3", "fd00::3"])),
    |ipam, _| {
        let AttachmentKey { network, container, ifname } = attachment("c2");
        block_on(ipam.retain(&network, &[(container, ifname)])).map(drop)
    },
];

fn attachment(container: &str) -> AttachmentKey {
    let network: NetworkName = "net".parse().unwrap();
    let (container, ifname): (ContainerId, IfName) = (container.parse().unwrap(), "eth0".parse().unwrap());
    AttachmentKey { network, container, ifname }
}

fn lease(ipam: &Ipam, container: &str, workload: Option<&str>, asked: Option<[&str; 2]>) -> Result<(), LeaseError> {
    let workload = workload.map(|w| w.parse().unwrap());
    let addresses = asked.into_iter().flatten().map(|a| a.parse().unwrap()).collect();
    block_on(ipam.lease(&LeaseRequest { workload, addresses, ..LeaseRequest::new(attachment(container)) })).map(drop)
}

fn ipam(store: Arc<dyn Store>) -> Ipam {
    let config: IpamConfig = serde_json::from_str(JSON).unwrap();
    // GC asks where, on a store that machines share.
    Ipam::new(&config, store).unwrap().on_node("n1".parse().unwrap(), LabelSet::default()).with_clock(|| 1_000_000)
}

/// Keys and values, without versions, which differ where a commit was repeated.
fn dump(store: &dyn Store) -> Vec<(Key, Vec<u8>)> {
    let all = block_on(store.scan(b"", None, usize::MAX)).unwrap();
    all.into_iter().map(|(key, entry)| (key, entry.value)).collect()
}

/// Leases, claims, releases and collections over the store, of whose calls each fails once: before it has an effect,
/// after it, or without a word. What a failed operation leaves is what was there before or what it was to leave, and
/// once it is repeated the store holds what a [`MemoryStore`] holds that never failed. `make` gives a new, empty store
/// at each call, of which there are some hundreds.
///
/// # Panics
/// At the first breach.
pub fn failures_leave_all_or_nothing(make: impl Fn() -> Arc<dyn Store>) {
    // Over such a store the allocator begins at a place of its own, and guesses rather than reads.
    let far = make().caps().sharing == Sharing::Machines;
    let healthy: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(healthy.clone());
    let mut states = vec![dump(&*healthy)];
    for operation in OPERATIONS {
        operation(&ours, far).unwrap();
        states.push(dump(&*healthy));
    }
    for failure in [Failure::Before, Failure::Lost, Failure::After] {
        let (mut at, mut errors) = (0, 0);
        loop {
            at += 1;
            let inner = make();
            let flaky = Arc::new(FlakyStore::new(inner.clone(), failure, at));
            let ours = ipam(flaky.clone());
            for (i, operation) in OPERATIONS.iter().enumerate() {
                if operation(&ours, far).is_err() {
                    errors += 1;
                    // Only the first operation is several commits: pools and claims are registered before the lease.
                    let found = dump(&*inner);
                    let registering = i == 0 && !found.iter().any(|(key, _)| key.starts_with(b"t/"));
                    assert!(registering || found == states[i] || found == states[i + 1], "call {at}, operation {i}");
                    operation(&ours, far).unwrap();
                }
                assert_eq!(dump(&*inner), states[i + 1], "{failure:?}, call {at}, operation {i}");
            }
            if flaky.calls() < at {
                break;
            }
        }
        assert!(at > if far { 15 } else { 40 }, "{at} calls");
        // An unknown outcome of a commit is resolved without the caller's help; a plain failure is reported, unless it
        // is of a call that only helps to guess.
        let reported = failure != Failure::Before || far || errors == at - 1;
        assert!(errors > if far { 3 } else { 10 } && reported, "{failure:?}: {errors} of {at}");
    }
}
