//! Binders and the sources on them: interrupted everywhere, over a record in a file and over a real DHCP server.

#[cfg(feature = "dhcp")]
mod dhcp;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::Ipam;
use dcenet_ipam::binder::conformance::{self, check_binder, check_source};
use dcenet_ipam::binder::recording::RecordingBinder;
use dcenet_ipam::binder::{
    AddressBinder, BindError, BindRequest, BindToken, BinderSource, Bound, BoundSource, OutsideSource,
};
use dcenet_ipam::model::AddressSpace;
use dcenet_ipam::store::Store;
use dcenet_ipam::store::memory::MemoryStore;
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
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
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
        let again = BoundSource::new(ours.clone(), Arc::new(RecordingBinder::new("/no/such/file")));
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
    let away = BoundSource::new(ours.clone(), Arc::new(RecordingBinder::new("/no/such/file")));
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
