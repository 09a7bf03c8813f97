//! Several sources over one store, and a renewal that meets a release.

use super::*;

/// Chooses addresses for a pool of this name, in this space.
fn outside_in(store: &Arc<dyn Store>, space: &str, binder: &Arc<Due>) -> OutsideSource<Due> {
    OutsideSource::new(store.clone(), space.parse().unwrap(), "outside", binder.clone()).unwrap()
}

/// Forgets in all records whose they are, as records are that were written without.
fn unname(store: &Arc<dyn Store>) {
    for (key, entry) in block_on(store.scan(b"y/", None, 99)).unwrap() {
        let mut page: serde_json::Value = serde_json::from_slice(&entry.value).unwrap();
        page.as_object_mut().unwrap().remove("owner").expect("a record names its source");
        let writes = vec![Write::Put(key, serde_json::to_vec(&page).unwrap())];
        let request_id = 1000 + u128::from(entry.version);
        block_on(store.commit(&Batch { writes, request_id, ..Batch::default() })).unwrap();
    }
}

/// In two spaces; in one space, from two outsides.
#[test]
fn a_source_leaves_the_leases_of_another_alone() {
    for spaces in [["blue", "red"], ["blue", "blue"]] {
        let dirs = [record(), record()];
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let binders = [0, 1].map(|i| Due::new(&dirs[i].1, 0, &[]));
        let [one, other] = [0, 1].map(|i| outside_in(&store, spaces[i], &binders[i]));
        let own = crate::attachment("c1");
        if spaces[0] == spaces[1] {
            // The same address from both would be in use.
            block_on(binders[1].inner.bind(&BindRequest {
                token: BindToken { attachment: crate::attachment("c9"), sequence: 1 },
                addresses: vec!["10.9.0.1/24".parse().unwrap()],
                mac: crate::attachment("c9").mac(),
                workload: None,
            }))
            .unwrap();
        }
        let mine = block_on(one.lease(&request("c1", None))).unwrap();
        let theirs = block_on(other.lease(&request("c2", None))).unwrap();
        let outside = shown(&dirs[1].1);
        assert_eq!(block_on(one.recover()).unwrap(), Default::default());
        let done = block_on(one.renew_due()).unwrap();
        assert_eq!((done.renewed, done.released, done.failures.len(), done.doomed.len()), (1, 0, 0, 0));
        assert_eq!(shown(&dirs[1].1), outside);
        assert_eq!(block_on(other.held(&crate::attachment("c2"))).unwrap().as_ref(), Some(&theirs));
        assert_eq!((binders[0].renewals(), binders[1].renewals()), (1, 0));
        // Nor by name.
        let refused = [
            block_on(other.lease(&request("c1", None))).unwrap_err(),
            block_on(other.held(&own)).unwrap_err(),
            block_on(other.release(&own, mine.sequence())).unwrap_err(),
        ];
        for error in refused {
            let text = error.to_string();
            assert!(text.contains("another source") && text.contains("blue"), "{text}");
        }
        assert_eq!(block_on(other.retain(&"net".parse().unwrap(), &[])).unwrap(), [crate::attachment("c2")]);
        assert_eq!(block_on(one.held(&own)).unwrap().as_ref(), Some(&mine));
        assert_eq!((shown(&dirs[0].1).len(), pages(&store)), (1, 1));
    }
}

#[test]
fn a_source_that_tells_and_one_that_is_told_share_a_store() {
    let dirs = [record(), record()];
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = Arc::new(ipam(JSON, &store));
    let [tells, told] = [Due::new(&dirs[0].1, 0, &[]), Due::new(&dirs[1].1, 0, &[])];
    let bound = BoundSource::new(ours.clone(), tells.clone());
    let outside = due_source(&store, &told);
    block_on(bound.lease(&request("c1", None))).unwrap();
    block_on(outside.lease(&request("c2", None))).unwrap();
    // One call of each, for its own.
    let rounds = [block_on(bound.renew_due()).unwrap(), block_on(outside.renew_due()).unwrap()];
    assert_eq!(rounds.map(|round| (round.renewed, round.released, round.doomed.len())), [(1, 0, 0); 2]);
    assert_eq!((tells.renewals(), told.renewals()), (1, 1));
    assert_eq!((block_on(bound.recover()).unwrap(), block_on(outside.recover()).unwrap()), Default::default());
    assert_eq!((shown(&dirs[0].1).len(), shown(&dirs[1].1).len(), pages(&store)), (1, 1, 2));
    // What is released past them is let go by its own alone.
    block_on(ours.release_current(&crate::attachment("c1"))).unwrap();
    block_on(ours.release_current(&crate::attachment("c2"))).unwrap();
    assert_eq!(block_on(outside.recover()).unwrap().released, 1);
    assert_eq!((shown(&dirs[0].1).len(), shown(&dirs[1].1).len()), (1, 0));
    assert_eq!(block_on(bound.renew_due()).unwrap().released, 1);
    assert_eq!((shown(&dirs[0].1).len(), pages(&store)), (0, 0));
}

#[test]
fn a_record_that_names_no_source_is_undone_by_nobody_who_only_looks_at_all() {
    let dirs = [record(), record(), record()];
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let binders = [0, 1, 2].map(|i| Due::new(&dirs[i].1, 0, &[]));
    let [one, other] = [0, 1].map(|i| outside_in(&store, ["blue", "red"][i], &binders[i]));
    let ours = Arc::new(ipam(JSON, &store));
    let bound = BoundSource::new(ours.clone(), binders[2].clone());
    let all: [&dyn BinderSource; 3] = [&one, &other, &bound];
    let leases = [0, 1, 2].map(|i| block_on(all[i].lease(&request(&format!("c{i}"), None))).unwrap());
    unname(&store);
    for source in all {
        assert_eq!(block_on(source.recover()).unwrap(), Default::default());
    }
    assert!(block_on(one.lease(&request("c1", None))).unwrap_err().to_string().contains("another source"));
    assert!(block_on(one.release(&crate::attachment("c2"), leases[2].sequence())).is_err());
    // Who renews is whose it is.
    for (i, source) in all.iter().enumerate() {
        let done = block_on(source.renew_due()).unwrap();
        assert_eq!((i, done.renewed, done.released, done.doomed.len()), (i, 1, 0, 0));
        assert_eq!(shown(&dirs[i].1).len(), 1);
    }
    // Without a lease to tell by, only who works on the attachment finishes it.
    unname(&store);
    block_on(ours.release_current(&crate::attachment("c0"))).unwrap();
    for source in all {
        assert_eq!(block_on(source.recover()).unwrap(), Default::default());
    }
    assert_eq!(shown(&dirs[0].1).len(), 1);
    block_on(one.release(&crate::attachment("c0"), leases[0].sequence())).unwrap();
    assert_eq!((shown(&dirs[0].1).len(), pages(&store)), (0, 2));
}

/// An outside that hears of a renewal after another process has released, and gives the address anew, as a DHCP server
/// does.
struct Late {
    due: Arc<Due>,
    store: Arc<dyn Store>,
    /// The other process is killed when it has let go outside.
    killed: bool,
    answers: bool,
}

#[async_trait]
impl AddressBinder for Late {
    fn name(&self) -> String {
        self.due.name()
    }
    async fn bind(&self, request: &BindRequest) -> Result<Bound, BindError> {
        self.due.bind(request).await
    }
    async fn renew(&self, bound: &Bound) -> Result<Bound, BindError> {
        let BindToken { attachment, sequence } = bound.token.clone();
        let fuse = Fuse::new(Cut::KilledAfter, u64::from(self.killed));
        let binder = Arc::new(FlakyBinder::new(self.due.clone(), fuse));
        let other = OutsideSource::new(self.store.clone(), AddressSpace::default(), "outside", binder).unwrap();
        assert_eq!(other.release(&attachment, sequence).await.is_err(), self.killed);
        let (token, mac) = (bound.token.clone(), bound.mac);
        let again = self.due.bind(&BindRequest { token, addresses: vec![], mac, workload: None }).await?;
        if self.answers {
            return Ok(again);
        }
        let source = std::io::Error::other("made to fail").into();
        Err(BindError::Failed { outside: self.name(), doing: "renewing", source })
    }
    async fn release(&self, token: &BindToken, bound: Option<&Bound>) -> Result<(), BindError> {
        self.due.release(token, bound).await
    }
    async fn decline(&self, bound: &Bound, address: IpAddr) -> Result<(), BindError> {
        self.due.decline(bound, address).await
    }
    async fn list(&self) -> Result<Option<Vec<BindToken>>, BindError> {
        Ok(None)
    }
    async fn ready(&self) -> Result<(), BindError> {
        Ok(())
    }
}

#[test]
fn a_renewal_that_comes_after_a_release_is_let_go_again() {
    for (killed, answers) in [(false, true), (false, false), (true, true), (true, false)] {
        let (_dir, path) = record();
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let late = Late { due: Due::new(&path, 0, &[]), store: store.clone(), killed, answers };
        let source = OutsideSource::new(store.clone(), AddressSpace::default(), "outside", Arc::new(late)).unwrap();
        block_on(source.lease(&request("c1", None))).unwrap();
        let done = block_on(source.renew_due()).unwrap();
        assert_eq!((done.renewed, done.released, done.failures.len(), done.doomed.len()), (0, 1, 0, 0));
        assert_eq!((shown(&path).len(), pages(&store)), (0, 0), "killed: {killed}, answers: {answers}");
    }
}

/// Each call takes some, those first that are to end first, and what fails keeps no other waiting.
#[test]
fn a_round_is_bounded_and_failures_come_last() {
    let (_dir, path) = record();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let names: Vec<String> = (0..40).map(|i| format!("c{i:02}")).collect();
    let fails: Vec<&'static str> = names[..20].iter().map(|name| &*name.clone().leak()).collect();
    let binder = Due::new(&path, 0, &fails);
    let source = due_source(&store, &binder);
    for name in &names {
        block_on(source.lease(&request(name, None))).unwrap();
        // Each ends later than the one before.
        std::thread::sleep(Duration::from_millis(2));
    }
    let failed = |done: &dcenet_ipam::binder::Renewals| -> Vec<String> {
        let mut all: Vec<_> = done.doomed.iter().map(|(attachment, _)| attachment.container.to_string()).collect();
        all.sort();
        all
    };
    let first = block_on(source.renew_due()).unwrap();
    assert_eq!((binder.renewals(), first.renewed), (16, 0));
    assert_eq!(failed(&first), names[..16]);
    // More is due, and was not tried.
    assert!(first.next.is_some_and(|at| at <= now()), "{:?}", first.next);
    let second = block_on(source.renew_due()).unwrap();
    assert_eq!((binder.renewals(), second.renewed), (32, 12));
    assert_eq!(failed(&second), names[16..20]);
    let third = block_on(source.renew_due()).unwrap();
    assert_eq!((binder.renewals(), third.renewed), (48, 16), "those renewed last are due again before the failed");
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

/// An outside whose leases have one moment at which they are to be renewed, which writes down when they are.
struct Together {
    inner: RecordingBinder,
    renew: u64,
    renewed: std::sync::Mutex<Vec<u64>>,
}

#[async_trait]
impl AddressBinder for Together {
    fn name(&self) -> String {
        self.inner.name()
    }
    async fn bind(&self, request: &BindRequest) -> Result<Bound, BindError> {
        let bound = self.inner.bind(request).await?;
        Ok(Bound { renew: Some(self.renew), until: Some(self.renew + 100_000), ..bound })
    }
    async fn renew(&self, bound: &Bound) -> Result<Bound, BindError> {
        self.renewed.lock().unwrap().push(now());
        let later = |at: Option<u64>| at.map(|at| at + 1_000_000);
        Ok(Bound { renew: later(bound.renew), until: later(bound.until), ..self.inner.renew(bound).await? })
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

/// The time that a listing tells is the one at which a renewer that watches the store wakes.
#[test]
fn what_is_bound_together_is_renewed_one_after_the_other() {
    let (_dir, path) = record();
    let inner = RecordingBinder::new(&path).with_subnet("10.9.0.0/24".parse().unwrap());
    let binder = Arc::new(Together { inner, renew: now() + 5_000, renewed: Default::default() });
    let mut moments = BTreeSet::new();
    let (mut store, mut due): (Arc<dyn Store>, u64) = (Arc::new(MemoryStore::new()), 0);
    for i in 0..20 {
        // One lease in each store, so that what a listing tells is its.
        let other: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let source = OutsideSource::new(other.clone(), AddressSpace::default(), "outside", binder.clone()).unwrap();
        block_on(source.lease(&request(&format!("c{i}"), None))).unwrap();
        let next = block_on(source.renew_due()).unwrap().next.expect("a time");
        assert!((binder.renew..=binder.renew + 5_000).contains(&next), "{next}");
        moments.insert(next);
        if next > due {
            (store, due) = (other, next);
        }
    }
    assert!(moments.len() > 10, "{moments:?}");
    assert!(due > binder.renew + 1_000, "all 20 at once");
    let source = OutsideSource::new(store, AddressSpace::default(), "outside", binder.clone()).unwrap();
    let (told, rounds) = std::sync::mpsc::channel();
    let renewer = Renewer::new(Arc::new(source)).reporting(move |round| _ = told.send(round.as_ref().unwrap().renewed));
    let stop = renewer.stopper();
    let thread = std::thread::spawn(move || block_on(renewer.run()));
    while rounds.recv_timeout(Duration::from_secs(60)).unwrap() == 0 {}
    stop.stop();
    thread.join().unwrap().unwrap();
    let renewed = binder.renewed.lock().unwrap().clone();
    assert!(renewed.len() == 1 && renewed[0] >= due, "{renewed:?}, and due at {due}");
}
