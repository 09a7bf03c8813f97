//! What every binder must do, alone and under a source that is interrupted everywhere.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use dcenet_core::model::{AttachmentKey, ContainerId, IfName};
use dcenet_core::provider::{LeaseError, LeaseRequest};
use ipnet::IpNet;

use super::flaky::{Cut, FlakyBinder, Fuse};
use super::{AddressBinder, BindRequest, BindToken, BinderSource};
use crate::store::Store;
use crate::store::flaky::{Faults, FlakyStore};

/// What the outside itself shows to have been handed out, however it is asked.
pub type Outside<'a> = &'a dyn Fn() -> BTreeSet<IpAddr>;

/// Builds a source over a store and a binder.
pub type MakeSource<'a> = &'a dyn Fn(Arc<dyn Store>, Arc<dyn AddressBinder>) -> Box<dyn BinderSource>;

/// Attachments that the suite uses.
///
/// # Panics
/// Never: the names are good.
pub fn attachment(container: &str) -> AttachmentKey {
    AttachmentKey {
        network: "conformance".parse().expect("a name"),
        container: container.parse().expect("a name"),
        ifname: "eth0".parse().expect("a name"),
    }
}

/// Checks a binder alone. `wanted` are two addresses that it may bind, or none where it chooses. Nothing is bound before
/// and after. `round` makes the tokens of repeated runs differ.
///
/// # Panics
/// At what is wrong.
pub async fn check_binder(binder: &dyn AddressBinder, wanted: &[IpNet], outside: Outside<'_>, round: u64) {
    let request = |container: &str, sequence: u64, which: usize| BindRequest {
        token: BindToken { attachment: attachment(container), sequence: round * 100 + sequence },
        addresses: wanted.get(which).into_iter().copied().collect(),
        mac: attachment(container).mac(),
        workload: None,
    };
    let ips = |bound: &super::Bound| bound.addresses.iter().map(|a| a.address.addr()).collect::<BTreeSet<_>>();
    assert_eq!(outside(), BTreeSet::new(), "the outside is not empty");
    binder.ready().await.expect("ready");
    binder.release(&request("a", 1, 0).token, None).await.expect("releasing what was never bound");
    let first = binder.bind(&request("a", 1, 0)).await.expect("the first bind");
    assert_eq!(first.token, request("a", 1, 0).token);
    assert!(!first.addresses.is_empty() && ips(&first) == outside(), "{first:?}, and outside {:?}", outside());
    let again = binder.bind(&request("a", 1, 0)).await.expect("the same bind again");
    assert_eq!(ips(&again), ips(&first), "a repeated bind");
    assert_eq!(outside(), ips(&first), "a repeated bind");
    let second = binder.bind(&request("b", 2, 1)).await.expect("another's bind");
    assert!(ips(&second).is_disjoint(&ips(&first)), "{second:?} and {first:?}");
    assert_eq!(outside(), &ips(&first) | &ips(&second));
    if let Some(address) = wanted.first() {
        let error = binder.bind(&BindRequest { addresses: vec![*address], ..request("c", 3, 0) }).await;
        let error = error.expect_err("an address was bound for two");
        assert!(error.is_certain(), "{error}");
    }
    assert_eq!(ips(&binder.renew(&first).await.expect("a renewal")), ips(&first));
    // An older lease of the same attachment is not this one.
    binder.release(&request("a", 99, 0).token, None).await.expect("another lease's release");
    assert_eq!(outside(), &ips(&first) | &ips(&second), "a release of another lease freed this one");
    binder.release(&first.token, Some(&first)).await.expect("a release");
    assert_eq!(outside(), ips(&second));
    binder.release(&first.token, Some(&first)).await.expect("a release again");
    // As after a crash, when nobody knows what was bound.
    binder.release(&second.token, None).await.expect("a release of what is not known");
    assert_eq!(outside(), BTreeSet::new(), "a release without knowing what was bound");
    if let Some(listed) = binder.list().await.expect("a list") {
        assert_eq!(listed, []);
    }
}

/// What came of [`check_source`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs, each with one call that failed.
    pub runs: u64,
    /// Operations that told of a failure.
    pub errors: u64,
    /// Runs that ended killed.
    pub kills: u64,
    /// Runs in which the outside differed from the source between failure and recovery.
    pub differed: u64,
}

enum Operation {
    Lease(&'static str),
    Release(&'static str),
    Retain(&'static [&'static str]),
}

const SCRIPT: [Operation; 7] = [
    Operation::Lease("c1"),
    Operation::Lease("c2"),
    Operation::Lease("c2"),
    Operation::Release("c1"),
    Operation::Lease("c3"),
    Operation::Retain(&["c2"]),
    Operation::Lease("c1"),
];

async fn operate(source: &dyn BinderSource, operation: &Operation) -> Result<(), LeaseError> {
    match operation {
        Operation::Lease(container) => source.lease(&LeaseRequest::new(attachment(container))).await.map(drop),
        Operation::Release(container) => {
            let attachment = attachment(container);
            let held = source.held(&attachment).await?;
            source.release(&attachment, held.map_or(0, |lease| lease.sequence())).await
        }
        Operation::Retain(valid) => {
            let ifname: IfName = "eth0".parse().expect("a name");
            let valid: Vec<(ContainerId, IfName)> =
                valid.iter().map(|c| (c.parse().expect("a name"), ifname.clone())).collect();
            source.retain(&attachment("c1").network, &valid).await.map(drop)
        }
    }
}

async fn held(source: &dyn BinderSource) -> BTreeSet<IpAddr> {
    let mut all = BTreeSet::new();
    for container in ["c1", "c2", "c3"] {
        let lease = source.held(&attachment(container)).await.expect("a look-up");
        for address in lease.into_iter().flat_map(|lease| lease.addresses) {
            assert!(all.insert(address.address.addr()), "{} is held twice", address.address);
        }
    }
    all
}

/// Runs leases, releases and a collection over a fresh store and outside from `world`, once for each call that can be
/// interrupted, failing before its effect, after it, and by a kill before and after; then has the source repeat what
/// failed, or recover, and compares what it holds with what the outside shows. `step` counts only every so many calls,
/// for outsides that are slow.
///
/// # Panics
/// At what is wrong.
pub async fn check_source(
    world: &dyn Fn() -> (Arc<dyn Store>, Arc<dyn AddressBinder>),
    make: MakeSource<'_>,
    outside: Outside<'_>,
    step: u64,
) -> Tally {
    let mut tally = Tally::default();
    for cut in [Cut::Before, Cut::After, Cut::KilledBefore, Cut::KilledAfter] {
        let mut at = 1;
        loop {
            let (store, binder) = world();
            let fuse = Fuse::new(cut, at);
            let flaky = || -> Box<dyn BinderSource> {
                let store = Arc::new(FlakyStore::with_faults(store.clone(), fuse.clone()));
                make(store, Arc::new(FlakyBinder::new(binder.clone(), fuse.clone())))
            };
            let mut source = flaky();
            // Looks and cleans up without being interrupted.
            let calm = make(store.clone(), binder.clone());
            for operation in &SCRIPT {
                if operate(&*source, operation).await.is_ok() {
                    continue;
                }
                tally.errors += 1;
                if fuse.is_killed() {
                    tally.kills += 1;
                    // The next process.
                    source = make(store.clone(), binder.clone());
                    tally.differed += u64::from(held(&*calm).await != outside());
                    source.recover().await.unwrap_or_else(|e| panic!("{cut:?} at {at}: recovery: {e}"));
                    // A lease whose caller died before its intent was durable is the attachment's, and unknown outside.
                    let (inside, outside) = (held(&*calm).await, outside());
                    assert!(outside.is_subset(&inside), "{cut:?} at {at}: {outside:?} of {inside:?} after recovery");
                } else {
                    tally.differed += u64::from(held(&*calm).await != outside());
                }
                operate(&*source, operation).await.unwrap_or_else(|e| panic!("{cut:?} at {at}: again: {e}"));
                assert_eq!(held(&*calm).await, outside(), "{cut:?} at {at}: after the operation was repeated");
            }
            let survivors = held(&*calm).await;
            assert_eq!(survivors, outside(), "{cut:?} at {at}: at the end");
            assert_eq!(survivors.len(), 2, "{cut:?} at {at}: c1 and c2 have one address each");
            let last = fuse.calls() < at;
            operate(&*calm, &Operation::Retain(&[])).await.expect("the last collection");
            calm.recover().await.expect("the last recovery");
            assert_eq!(outside(), BTreeSet::new(), "{cut:?} at {at}: leaked");
            if last {
                break;
            }
            tally.runs += 1;
            at += step;
        }
    }
    tally
}
