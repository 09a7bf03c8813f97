//! Each call of the store made to fail once.

use std::sync::Arc;

use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Ipam;
use dcenet_ipam::store::Store;
use dcenet_ipam::store::flaky::{Failure, FlakyStore};
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;

use crate::{attachment, ipam, request};

const JSON: &str = r#"{ "cooldown": "0s", "pools": [
    { "name": "v4", "subnet": "10.0.0.0/29", "claims": { "shop/db": { "address": "10.0.0.5" }, "shop/q": {} } },
    { "name": "v6", "subnet": "fd00::/64" } ] }"#;

type Operation = fn(&Ipam) -> Result<(), LeaseError>;

const OPERATIONS: [Operation; 7] = [
    |ipam| block_on(ipam.lease(&request("c1", Some("shop/db")))).map(drop),
    |ipam| block_on(ipam.lease(&request("c2", Some("shop/q")))).map(drop),
    |ipam| block_on(ipam.release_current(&attachment("c1"))),
    |ipam| block_on(ipam.lease(&request("c3", None))).map(drop),
    |ipam| block_on(ipam.release_current(&attachment("c3"))),
    |ipam| block_on(ipam.lease(&request("c4", None))).map(drop),
    |ipam| {
        block_on(ipam.retain(&"net".parse().unwrap(), &[("c2".parse().unwrap(), "eth0".parse().unwrap())])).map(drop)
    },
];

/// Keys and values, without versions, which differ where a commit was repeated.
fn dump(store: &dyn Store) -> Vec<(Vec<u8>, Vec<u8>)> {
    let all = block_on(store.scan(b"", None, usize::MAX)).unwrap();
    all.into_iter().map(|(key, entry)| (key, entry.value)).collect()
}

#[test]
fn a_failing_call_leaves_all_or_nothing_and_a_repeat_heals() {
    // What the operations leave when nothing fails.
    let healthy: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(JSON, &healthy).with_clock(|| 1_000_000);
    let mut states = vec![dump(&*healthy)];
    for operation in OPERATIONS {
        operation(&ours).unwrap();
        states.push(dump(&*healthy));
    }
    for failure in [Failure::Before, Failure::Lost, Failure::After] {
        let (mut at, mut errors) = (0, 0);
        loop {
            at += 1;
            let inner: Arc<dyn Store> = Arc::new(MemoryStore::new());
            let flaky = Arc::new(FlakyStore::new(inner.clone(), failure, at));
            let store: Arc<dyn Store> = flaky.clone();
            let ours = ipam(JSON, &store).with_clock(|| 1_000_000);
            for (i, operation) in OPERATIONS.iter().enumerate() {
                if operation(&ours).is_err() {
                    errors += 1;
                    // Only the first operation is several commits: pools and claims are registered before the lease.
                    let found = dump(&*inner);
                    let registering = i == 0 && !found.iter().any(|(key, _)| key.starts_with(b"t/"));
                    assert!(registering || found == states[i] || found == states[i + 1], "call {at}, operation {i}");
                    operation(&ours).unwrap();
                }
                assert_eq!(dump(&*inner), states[i + 1], "{failure:?}, call {at}, operation {i}");
            }
            if flaky.calls() < at {
                break;
            }
        }
        assert!(at > 40, "{at} calls");
        // An unknown outcome of a commit is resolved without the caller's help; a plain failure is reported.
        assert!(errors > 10 && (failure != Failure::Before || errors == at - 1), "{failure:?}: {errors} of {at}");
    }
}
