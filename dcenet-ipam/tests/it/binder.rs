//! Binders and the sources on them: interrupted everywhere, over a record in a file and over a real DHCP server.

#[cfg(feature = "dhcp")]
mod dhcp;
mod sharing;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use dcenet_core::probe::{Conflict, Evidence};
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::Ipam;
use dcenet_ipam::audit::Damage;
use dcenet_ipam::binder::conformance::{self, check_binder, check_source};
use dcenet_ipam::binder::flaky::{Cut, FlakyBinder, Fuse};
use dcenet_ipam::binder::recording::RecordingBinder;
use dcenet_ipam::binder::{
    AddressBinder, BindError, BindRequest, BindToken, BinderSource, Bound, BoundSource, OutsideSource, Renewer,
};
use dcenet_ipam::model::AddressSpace;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError, Write};
use pollster::block_on;

use crate::{config, each_store, ipam, request, texts};

const JSON: &str = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/29" } ] }"#;

fn shown(path: &Path) -> BTreeSet<IpAddr> {
    RecordingBinder::new(path).bound().unwrap().into_keys().collect()
}

fn bound_source(store: Arc<dyn Store>, binder: Arc<dyn AddressBinder>) -> Box<dyn BinderSource> {
    Box::new(BoundSource::new(Arc::new(Ipam::new(&config(JSON), store).unwrap()), binder))
}

fn outside_source(store: Arc<dyn Store>, binder: Arc<dyn AddressBinder>) -> Box<dyn BinderSource> {
    Box::new(OutsideSource::new(store, AddressSpace::default(), "outside", binder).unwrap())
}

/// The outside of the file, while it cannot be reached.
fn away(path: &Path) -> Arc<FlakyBinder> {
    Arc::new(FlakyBinder::new(Arc::new(RecordingBinder::new(path)), Fuse::new(Cut::KilledBefore, 1)))
}

/// A file that does not exist yet.
fn record() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("record");
    (dir, path)
}

#[test]
fn the_recording_binder_conforms() {
    let (_dir, path) = record();
    let wanted = ["10.0.0.1/29".parse().unwrap(), "10.0.0.2/29".parse().unwrap()];
    block_on(check_binder(&RecordingBinder::new(&path), &wanted, &|| shown(&path), 1));
    let choosing = RecordingBinder::new(&path).with_subnet("10.9.0.0/29".parse().unwrap());
    block_on(check_binder(&choosing, &[], &|| shown(&path), 2));
}

/// Interrupted at every call of store and outside: by a failure, a lost answer, and a kill before and after.
#[test]
fn an_interrupted_source_leaks_nothing_and_doubles_nothing() {
    for outside_chooses in [false, true] {
        let (_dir, path) = record();
        let world = || -> (Arc<dyn Store>, Arc<dyn AddressBinder>) {
            let binder = RecordingBinder::new(&path).with_subnet("10.9.0.0/29".parse().unwrap());
            (Arc::new(MemoryStore::new()), Arc::new(binder))
        };
        let make = if outside_chooses { outside_source } else { bound_source };
        let tally = block_on(check_source(&world, &make, &|| shown(&path), 1));
        println!("{tally:?}");
        // Without recovery, or without repeating, outside and inside would differ.
        assert!(tally.runs > 100 && tally.kills > 40 && tally.errors > 100 && tally.differed > 10, "{tally:?}");
    }
}

/// An outside that forgets to let go.
struct Clinging(Arc<dyn AddressBinder>);

#[async_trait]
impl AddressBinder for Clinging {
    fn name(&self) -> String {
        self.0.name()
    }
    async fn bind(&self, request: &BindRequest) -> Result<Bound, BindError> {
        self.0.bind(request).await
    }
    async fn renew(&self, bound: &Bound) -> Result<Bound, BindError> {
        self.0.renew(bound).await
    }
    async fn release(&self, _: &BindToken, _: Option<&Bound>) -> Result<(), BindError> {
        Ok(())
    }
    async fn decline(&self, bound: &Bound, address: IpAddr) -> Result<(), BindError> {
        self.0.decline(bound, address).await
    }
    async fn list(&self) -> Result<Option<Vec<BindToken>>, BindError> {
        Ok(None)
    }
    async fn ready(&self) -> Result<(), BindError> {
        self.0.ready().await
    }
}

/// The twin: what is leaked is seen.
#[test]
fn an_outside_that_keeps_addresses_does_not_pass() {
    let (_dir, path) = record();
    let world = || -> (Arc<dyn Store>, Arc<dyn AddressBinder>) {
        (Arc::new(MemoryStore::new()), Arc::new(Clinging(Arc::new(RecordingBinder::new(&path)))))
    };
    let run = || block_on(check_source(&world, &bound_source, &|| shown(&path), 1));
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_err();
    let told = panic.downcast_ref::<String>().unwrap();
    // The first release of the first run, which nothing interrupts, and the address by name.
    assert!(told.contains("after the operation was repeated") || told.contains("at the end"), "{told}");
    assert!(told.contains("10.0.0.1"), "{told}");
}

#[test]
fn a_refusal_of_the_outside_undoes_the_lease() {
    each_store(|store, dir| {
        let path = dir.join("record-of-the-outside");
        let ours = Arc::new(ipam(JSON, &store));
        let source = BoundSource::new(ours.clone(), Arc::new(RecordingBinder::new(&path).with_limit(1)));
        assert_eq!(texts(&block_on(source.lease(&request("c1", None))).unwrap()), ["10.0.0.1/29"]);
        let error = block_on(source.lease(&request("c2", None))).unwrap_err();
        assert!(matches!(&error, LeaseError::Outside { retryable: true, .. }), "{error}");
        assert!(error.to_string().contains("no address left") && error.to_string().contains("c2"), "{error}");
        assert_eq!(block_on(ours.bindings(None)).unwrap().len(), 1);
        assert_eq!(block_on(store.scan(b"y/", None, 9)).unwrap().len(), 1);
        // A repeat, also by another process, asks nobody and changes nothing.
        let again = BoundSource::new(ours.clone(), away(&path));
        assert_eq!(texts(&block_on(again.lease(&request("c1", None))).unwrap()), ["10.0.0.1/29"]);
        block_on(again.ready()).unwrap_err();
    });
}

/// An outside that cannot be reached at all keeps the address inside too, for it may be in use there.
#[test]
fn while_the_outside_is_away_its_addresses_stay_leased() {
    let (_dir, path) = record();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = Arc::new(ipam(JSON, &store));
    let near = BoundSource::new(ours.clone(), Arc::new(RecordingBinder::new(&path)));
    let away = BoundSource::new(ours.clone(), away(&path));
    let lease = block_on(near.lease(&request("c1", None))).unwrap();
    let key = crate::attachment("c1");
    let error = block_on(away.release(&key, lease.sequence())).unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert_eq!(block_on(ours.bindings(None)).unwrap().len(), 1, "the address could go to somebody else");
    block_on(away.lease(&request("c2", None))).unwrap_err();
    assert_eq!(block_on(near.recover()).unwrap().released, 2);
    assert_eq!((shown(&path).len(), block_on(ours.bindings(None)).unwrap().len()), (0, 0));
    // A late release of the old lease frees nothing of a new one.
    let newer = block_on(near.lease(&request("c1", None))).unwrap();
    block_on(near.release(&key, lease.sequence())).unwrap();
    assert_eq!(shown(&path).len(), 1);
    assert_eq!(block_on(near.held(&key)).unwrap(), Some(newer));
}

/// Released past the source, as by a collector of dead nodes' leases.
#[test]
fn recovery_releases_what_lost_its_lease_and_what_no_record_names() {
    let (_dir, path) = record();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = Arc::new(ipam(JSON, &store));
    let binder = Arc::new(RecordingBinder::new(&path));
    let source = BoundSource::new(ours.clone(), binder.clone());
    block_on(source.lease(&request("c1", None))).unwrap();
    block_on(source.lease(&request("c2", None))).unwrap();
    block_on(ours.release_current(&crate::attachment("c1"))).unwrap();
    let remnant = BindRequest {
        token: BindToken { attachment: crate::attachment("c9"), sequence: 4 },
        addresses: vec!["10.0.0.5/29".parse().unwrap()],
        mac: crate::attachment("c9").mac(),
        workload: None,
    };
    block_on(binder.bind(&remnant)).unwrap();
    assert_eq!(shown(&path).len(), 3);
    let done = block_on(source.recover()).unwrap();
    assert_eq!((done.bound, done.released, done.remnants), (0, 1, 1));
    assert_eq!(shown(&path), ["10.0.0.2".parse().unwrap()].into());
    // A remnant stops nobody who comes before recovery.
    block_on(binder.bind(&BindRequest { addresses: vec!["10.0.0.3/29".parse().unwrap()], ..remnant })).unwrap();
    assert_eq!(texts(&block_on(source.lease(&request("c3", None))).unwrap()), ["10.0.0.3/29"]);
    assert_eq!(shown(&path).len(), 2);
    // Nor does one whose lease was released past the source.
    block_on(ours.release_current(&crate::attachment("c3"))).unwrap();
    assert_eq!(texts(&block_on(source.lease(&request("c4", None))).unwrap()), ["10.0.0.4/29"]);
    for address in ["10.0.0.1", "10.0.0.5", "10.0.0.6"] {
        let hold = address.parse().unwrap();
        block_on(ours.reserve_external(&AddressSpace::default(), hold, "edge")).unwrap();
    }
    assert_eq!(texts(&block_on(source.lease(&request("c5", None))).unwrap()), ["10.0.0.3/29"]);
    let third = block_on(source.held(&crate::attachment("c4"))).unwrap().unwrap();
    block_on(source.release(&crate::attachment("c4"), third.sequence())).unwrap();
    assert_eq!(shown(&path).len(), 2);
    // The collection of the network goes through the outside.
    let valid = [("c5".parse().unwrap(), "eth0".parse().unwrap())];
    let gone = block_on(source.retain(&"net".parse().unwrap(), &valid)).unwrap();
    assert_eq!((gone, shown(&path).len()), (vec![crate::attachment("c2")], 1));
}

#[test]
fn what_the_outside_hands_out_twice_is_declined() {
    let (_dir, path) = record();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    // Somebody inside has the first address that the outside would give.
    let inside = ipam(r#"{ "pools": [ { "name": "p", "subnet": "10.9.0.0/29" } ] }"#, &store);
    assert_eq!(texts(&block_on(inside.lease(&request("inside", None))).unwrap()), ["10.9.0.1/29"]);
    let binder = Arc::new(RecordingBinder::new(&path).with_subnet("10.9.0.0/29".parse().unwrap()));
    let source = OutsideSource::new(store, AddressSpace::default(), "outside", binder).unwrap();
    let lease = block_on(source.lease(&request("c1", None))).unwrap();
    assert_eq!(texts(&lease), ["10.9.0.2/29"]);
    assert_eq!(shown(&path), ["10.9.0.2".parse().unwrap()].into());
    // Nobody inside gets it either.
    assert_eq!(texts(&block_on(inside.lease(&request("c2", None))).unwrap()), ["10.9.0.3/29"]);
    assert_eq!(lease.mac, Some(crate::attachment("c1").mac()));
    // An attachment has one source.
    let error = block_on(source.lease(&request("inside", None))).unwrap_err().to_string();
    assert!(error.contains("another source"), "{error}");
    assert_eq!(shown(&path).len(), 1);
    let asked = LeaseRequest { addresses: vec!["10.9.0.4".parse().unwrap()], ..request("c3", None) };
    let error = block_on(source.lease(&asked)).unwrap_err().to_string();
    assert!(error.contains("addresses") && error.contains("leave it out"), "{error}");
}

#[test]
fn callers_at_once_are_bound_once() {
    let (_dir, path) = record();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    for make in [bound_source, outside_source] {
        std::thread::scope(|scope| {
            for i in 0..8 {
                let binder = RecordingBinder::new(&path).with_subnet("10.9.0.0/29".parse().unwrap());
                let source = make(store.clone(), Arc::new(binder));
                scope.spawn(move || {
                    // Two of each name at a time.
                    let request = LeaseRequest::new(conformance::attachment(&format!("c{}", i / 2)));
                    while block_on(source.lease(&request)).is_err() {}
                });
            }
        });
        assert_eq!(shown(&path).len(), 4);
        let source = make(store.clone(), Arc::new(RecordingBinder::new(&path)));
        block_on(source.retain(&"conformance".parse().unwrap(), &[])).unwrap();
        assert_eq!(shown(&path).len(), 0);
    }
}

/// The rows of the queues of releases.
fn queued(store: &Arc<dyn Store>) -> usize {
    block_on(store.scan(b"f/", None, 99)).unwrap().len()
}

fn pages(store: &Arc<dyn Store>) -> usize {
    block_on(store.scan(b"y/", None, 99)).unwrap().len()
}

/// An outside whose leases are always due, which counts renewals and fails those of the containers named.
struct Due {
    inner: RecordingBinder,
    renewals: AtomicU64,
    at_once: AtomicU64,
    most_at_once: AtomicU64,
    fails: Vec<&'static str>,
    lasts: u64,
}

impl Due {
    fn new(path: &Path, lasts: u64, fails: &[&'static str]) -> Arc<Self> {
        let inner = RecordingBinder::new(path).with_subnet("10.9.0.0/24".parse().unwrap());
        let (renewals, at_once, most_at_once) = Default::default();
        Arc::new(Self { inner, renewals, at_once, most_at_once, fails: fails.to_vec(), lasts })
    }

    fn due(&self, bound: Bound) -> Bound {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
        // With nothing left at the renewal it is not put off.
        Bound { renew: Some(now + self.lasts), until: Some(now + 2 * self.lasts), ..bound }
    }

    fn renewals(&self) -> u64 {
        self.renewals.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl AddressBinder for Due {
    fn name(&self) -> String {
        format!("due, of {}", self.inner.name())
    }
    async fn bind(&self, request: &BindRequest) -> Result<Bound, BindError> {
        Ok(self.due(self.inner.bind(request).await?))
    }
    async fn renew(&self, bound: &Bound) -> Result<Bound, BindError> {
        let now = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_at_once.fetch_max(now, Ordering::SeqCst);
        // Gives way once, as what waits for an answer does.
        let mut asked = false;
        std::future::poll_fn(|context| {
            context.waker().wake_by_ref();
            if std::mem::replace(&mut asked, true) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        self.renewals.fetch_add(1, Ordering::SeqCst);
        if self.fails.contains(&bound.token.attachment.container.as_str()) {
            let source = std::io::Error::other("made to fail").into();
            return Err(BindError::Failed { outside: self.name(), doing: "renewing", source });
        }
        Ok(self.due(self.inner.renew(bound).await?))
    }
    async fn release(&self, token: &BindToken, bound: Option<&Bound>) -> Result<(), BindError> {
        self.inner.release(token, bound).await
    }
    async fn decline(&self, bound: &Bound, address: IpAddr) -> Result<(), BindError> {
        self.inner.decline(bound, address).await
    }
    async fn list(&self) -> Result<Option<Vec<BindToken>>, BindError> {
        Ok(None)
    }
    async fn ready(&self) -> Result<(), BindError> {
        Ok(())
    }
}

fn due_source(store: &Arc<dyn Store>, binder: &Arc<Due>) -> OutsideSource<Due> {
    OutsideSource::new(store.clone(), AddressSpace::default(), "outside", binder.clone()).unwrap()
}

#[test]
fn what_was_released_past_the_source_is_let_go_and_not_renewed_for_ever() {
    let (_dir, path) = record();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let binder = Due::new(&path, 0, &[]);
    let source = due_source(&store, &binder).on_node("n1".parse().unwrap());
    // Whoever collects leases of the dead: it has never heard of the outside.
    let collector = ipam(JSON, &store);
    let c1 = crate::attachment("c1");
    let first = block_on(source.lease(&request("c1", Some("shop/db")))).unwrap();
    let binding = block_on(collector.bindings(None)).unwrap().remove(0);
    assert_eq!(binding.workload.map(|w| w.to_string()).as_deref(), Some("shop/db"));
    assert_eq!(binding.node.map(|n| n.to_string()).as_deref(), Some("n1"));
    assert_eq!(block_on(source.renew_due()).unwrap().renewed, 1);
    // A renewal finds it.
    assert!(block_on(collector.release_sequence(&c1, first.sequence())).unwrap());
    assert_eq!((queued(&store), shown(&path).len()), (1, 1));
    // Who asks what to release is told the sequence.
    assert_eq!(block_on(source.held(&c1)).unwrap(), Some(first));
    let done = block_on(source.renew_due()).unwrap();
    assert_eq!((done.renewed, done.released, done.failures.len()), (0, 1, 0));
    assert_eq!((binder.renewals(), shown(&path).len(), pages(&store), queued(&store)), (1, 0, 0, 0));
    // So does a release, recovery, and the next lease.
    block_on(source.lease(&request("c1", None))).unwrap();
    block_on(collector.release_current(&c1)).unwrap();
    let left = block_on(source.held(&c1)).unwrap().expect("what is left to be released");
    block_on(source.release(&c1, left.sequence())).unwrap();
    assert_eq!((shown(&path).len(), pages(&store), queued(&store)), (0, 0, 0));
    block_on(source.lease(&request("c1", None))).unwrap();
    block_on(collector.release_current(&c1)).unwrap();
    assert_eq!(block_on(source.recover()).unwrap().released, 1);
    assert_eq!((shown(&path).len(), pages(&store), queued(&store)), (0, 0, 0));
    let second = block_on(source.lease(&request("c1", None))).unwrap();
    block_on(collector.release_current(&c1)).unwrap();
    let third = block_on(source.lease(&request("c1", None))).unwrap();
    assert!(third.sequence() > second.sequence());
    assert_eq!((shown(&path).len(), pages(&store), queued(&store)), (1, 1, 0));
    assert_eq!(block_on(collector.bindings(None)).unwrap().len(), 1);
    assert_eq!(block_on(collector.check()).unwrap().findings.iter().filter(|f| f.remedy.is_some()).count(), 0);
}

#[test]
fn an_address_that_cools_inside_is_taken_out_of_its_queue() {
    let (_dir, path) = record();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let inside = ipam(r#"{ "pools": [ { "name": "p", "subnet": "10.9.0.0/29" } ] }"#, &store);
    block_on(inside.lease(&request("inside", None))).unwrap();
    crate::release(&inside, "inside");
    assert_eq!(queued(&store), 1);
    let binder = Arc::new(RecordingBinder::new(&path).with_subnet("10.9.0.0/29".parse().unwrap()));
    let source = OutsideSource::new(store.clone(), AddressSpace::default(), "outside", binder).unwrap();
    assert_eq!(texts(&block_on(source.lease(&request("c1", None))).unwrap()), ["10.9.0.1/29"]);
    assert_eq!(queued(&store), 0);
    let found = block_on(inside.check()).unwrap().findings;
    assert!(found.iter().all(|f| !matches!(f.damage, Damage::StrayRow { .. })), "{found:?}");
}

/// A store that lets another call do its whole work between a call's look at its record and its commit.
#[derive(Debug)]
struct Interrupting {
    inner: Arc<dyn Store>,
    armed: AtomicBool,
    path: std::path::PathBuf,
}

#[async_trait]
impl Store for Interrupting {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        if keys.iter().any(|key| key.starts_with(b"t/")) && self.armed.swap(false, Ordering::SeqCst) {
            let binder = RecordingBinder::new(&self.path).with_subnet("10.9.0.0/29".parse().unwrap());
            let other = outside_source(self.inner.clone(), Arc::new(binder));
            other.lease(&request("c1", None)).await.expect("the other call's lease");
        }
        self.inner.read(keys).await
    }
    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }
    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        self.inner.commit(batch).await
    }
    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.inner.first_gap(prefix, range).await
    }
    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

#[test]
fn two_calls_for_one_attachment_get_one_lease() {
    let (_dir, path) = record();
    let inner: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let store = Arc::new(Interrupting { inner: inner.clone(), armed: AtomicBool::new(true), path: path.clone() });
    let binder = Arc::new(RecordingBinder::new(&path).with_subnet("10.9.0.0/29".parse().unwrap()));
    let source = OutsideSource::new(store.clone(), AddressSpace::default(), "outside", binder).unwrap();
    let lease = block_on(source.lease(&request("c1", None))).unwrap();
    assert!(!store.armed.load(Ordering::SeqCst), "nobody came in between");
    assert_eq!(block_on(source.held(&crate::attachment("c1"))).unwrap(), Some(lease));
    assert_eq!((shown(&path).len(), pages(&inner)), (1, 1));
}

#[test]
fn a_bad_record_and_a_failing_renewal_stop_no_other() {
    let (_dir, path) = record();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let binder = Due::new(&path, 0, &["c03", "c05"]);
    let source = due_source(&store, &binder);
    for i in 0..14 {
        block_on(source.lease(&request(&format!("c{i:02}"), None))).unwrap();
    }
    let planted = |key: &str, value: &str| Write::Put(key.as_bytes().to_vec(), value.as_bytes().to_vec());
    let writes = vec![planted("y/net/c00a/eth0", "{ not ours"), planted("y/net", "{}")];
    block_on(store.commit(&Batch { writes, request_id: 7, ..Batch::default() })).unwrap();
    let done = block_on(source.renew_due()).unwrap();
    assert_eq!((binder.renewals(), done.renewed), (14, 12));
    let most = binder.most_at_once.load(Ordering::SeqCst);
    assert!((2..=16).contains(&most), "{most} renewals at once");
    let mut failed: Vec<&str> = done.failures.iter().map(|f| f.key.as_str()).collect();
    failed.sort_unstable();
    assert_eq!(failed, ["y/net", "y/net/c00a/eth0", "y/net/c03/eth0", "y/net/c05/eth0"]);
    let doomed: Vec<_> = done.doomed.iter().map(|(a, _)| a.container.to_string()).collect();
    assert_eq!(doomed, ["c03", "c05"]);
    // The others are released and recovered as if they were not there, and the call tells of them.
    let error = block_on(source.retain(&"net".parse().unwrap(), &[])).unwrap_err();
    assert!(error.to_string().contains("y/net"), "{error}");
    assert_eq!((shown(&path).len(), pages(&store)), (0, 2));
    assert!(matches!(block_on(source.recover()).unwrap_err(), LeaseError::Damaged(_)));
}

#[test]
fn a_renewer_renews_what_this_and_other_processes_lease_until_it_is_stopped() {
    each_store(|store, dir| {
        let path = dir.join("record-of-the-outside");
        let binder = Due::new(&path, 40, &[]);
        let source = Arc::new(due_source(&store, &binder));
        let (told, rounds) = std::sync::mpsc::channel();
        let renewer = Renewer::new(source.clone())
            .reporting(move |round| _ = told.send(round.as_ref().map_or(usize::MAX, |round| round.renewed)));
        let stop = renewer.stopper();
        let thread = std::thread::spawn(move || block_on(renewer.run()));
        // One round at first, one for what was written before the store was watched. From then on it sleeps, and learns of a
        // lease by the store alone.
        for _ in 0..2 {
            assert_eq!(rounds.recv_timeout(Duration::from_secs(60)).unwrap(), 0);
        }
        block_on(due_source(&store, &binder).lease(&request("c1", None))).unwrap();
        let mut renewed = 0;
        while renewed < 3 {
            renewed += rounds.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        let lease = block_on(source.held(&crate::attachment("c1"))).unwrap().unwrap();
        block_on(source.release(&crate::attachment("c1"), lease.sequence())).unwrap();
        stop.stop();
        thread.join().unwrap().unwrap();
        // What is left is told by nobody: the sender is gone with the renewer.
        assert!(rounds.iter().count() < 1000);
        let after = binder.renewals();
        assert!(after >= 3);
        assert_eq!(shown(&path).len(), 0);
    });
}

/// The outside learns of both: what is let go, and what comes in its place.
#[test]
fn an_address_in_conflict_is_replaced_inside_and_outside() {
    for outside_chooses in [false, true] {
        let (_dir, path) = record();
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let recording = RecordingBinder::new(&path);
        let source = if outside_chooses {
            outside_source(store, Arc::new(recording.with_subnet("10.9.0.0/29".parse().unwrap())))
        } else {
            bound_source(store, Arc::new(recording))
        };
        let old = block_on(source.lease(&request("c1", None))).unwrap();
        let address = old.addresses[0].address.addr();
        let conflict = Conflict { address, holder: "02:00:00:00:00:99".parse().unwrap(), evidence: Evidence::Used };
        let own = crate::attachment("c1");
        let new = block_on(source.replace(&own, old.sequence(), &conflict)).unwrap().unwrap();
        let other = new.addresses[0].address.addr();
        assert_ne!(other, address);
        assert_ne!(new.sequence(), old.sequence());
        assert_eq!(shown(&path), BTreeSet::from([other]));
        assert_eq!(block_on(source.held(&own)).unwrap(), Some(new.clone()));
        // The next one is not given it either.
        let next = block_on(source.lease(&request("c2", None))).unwrap();
        assert!(![address, other].contains(&next.addresses[0].address.addr()), "{next:?}");
        block_on(source.release(&own, new.sequence())).unwrap();
        assert_eq!(shown(&path), BTreeSet::from([next.addresses[0].address.addr()]));
    }
}
