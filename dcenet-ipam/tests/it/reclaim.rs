//! What is taken back without a DEL, and what never is. Tests named after an issue hold what went wrong there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::model::LabelSet;
use dcenet_core::model::Workload;
use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Ipam;
use dcenet_ipam::model::NodeName;
use dcenet_ipam::reclaim::{Alive, Policy, ReclaimError, Reclaimed, Reclaimer, Scope, Snapshot};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::flaky::{Failure, FlakyStore};
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;

use crate::claims::Clock;
use crate::{attachment, each_store, ipam, lease, release, request, texts};

const JSON: &str = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/24",
    "claims": { "shop/db-*": { "members": "ordinal" }, "shop/job": { "keep": "workload" } } } ] }"#;

fn containers(alive: &[&str]) -> Alive {
    Alive::Attachments(alive.iter().map(|c| attachment(c)).collect())
}

fn pods(alive: &[(&str, Option<&str>)]) -> Alive {
    let node = |n: &str| n.parse::<NodeName>().unwrap();
    Alive::Workloads(alive.iter().map(|(w, n)| (w.parse::<Workload>().unwrap(), n.map(node))).collect())
}

/// A complete snapshot of everything, begun now.
fn snapshot(ipam: &Ipam, alive: Alive) -> Snapshot {
    block_on(Snapshot::begin(ipam)).unwrap().complete(Scope::default(), alive)
}

fn observe(reclaimer: &mut Reclaimer<'_>, snapshot: &Snapshot) -> Result<Vec<String>, ReclaimError> {
    block_on(reclaimer.observe(snapshot)).map(|r| names(&r))
}

fn names(reclaimed: &Reclaimed) -> Vec<String> {
    reclaimed.released.iter().map(|(attachment, _)| attachment.container.to_string()).collect()
}

fn held(ipam: &Ipam) -> BTreeSet<String> {
    block_on(ipam.bindings(None)).unwrap().iter().map(|b| b.attachment.container.to_string()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

#[test]
fn what_two_complete_snapshots_do_not_name_is_released_and_nothing_else() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        for c in ["alive", "gone", "back"] {
            lease(&ipam, c, None).unwrap();
        }
        let mut reclaimer = Reclaimer::new(&ipam, Policy::default());
        let first = snapshot(&ipam, containers(&["alive"]));
        assert_eq!(observe(&mut reclaimer, &first).unwrap(), Vec::<String>::new());
        // The same evidence twice is one observation.
        assert_eq!(observe(&mut reclaimer, &first).unwrap(), Vec::<String>::new());
        assert_eq!(observe(&mut reclaimer, &snapshot(&ipam, containers(&["alive", "back"]))).unwrap(), ["gone"]);
        // Seen in between: it takes two again.
        assert_eq!(observe(&mut reclaimer, &snapshot(&ipam, containers(&["alive"]))).unwrap(), Vec::<String>::new());
        assert_eq!(observe(&mut reclaimer, &snapshot(&ipam, containers(&["alive"]))).unwrap(), ["back"]);
        assert_eq!(held(&ipam), set(&["alive"]));
        // Another process has observed nothing yet.
        let mut other = Reclaimer::new(&ipam, Policy::default());
        assert_eq!(observe(&mut other, &snapshot(&ipam, containers(&[]))).unwrap(), Vec::<String>::new());
        assert_eq!(held(&ipam), set(&["alive"]));
    });
}

#[test]
fn partial_old_foreign_and_incredible_evidence_is_refused() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        for i in 0..10 {
            lease(&ipam, &format!("c{i}"), None).unwrap();
        }
        let mut reclaimer = Reclaimer::new(&ipam, Policy { most: Some(3), ..Policy::default() });
        let partial = block_on(Snapshot::begin(&ipam)).unwrap().partial(Scope::default(), containers(&[]));
        for _ in 0..3 {
            assert!(matches!(observe(&mut reclaimer, &partial).unwrap_err(), ReclaimError::Partial));
        }
        let old = snapshot(&ipam, containers(&[]));
        lease(&ipam, "c10", None).unwrap();
        let all: Vec<String> = (0..11).map(|i| format!("c{i}")).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        observe(&mut reclaimer, &snapshot(&ipam, containers(&all))).unwrap();
        assert!(matches!(observe(&mut reclaimer, &old).unwrap_err(), ReclaimError::Old { .. }));
        // Nothing alive at all: rather the evidence is wrong.
        observe(&mut reclaimer, &snapshot(&ipam, containers(&[]))).unwrap();
        let refused = observe(&mut reclaimer, &snapshot(&ipam, containers(&[]))).unwrap_err();
        assert!(matches!(refused, ReclaimError::TooMany { absent: 11, most: 3 }), "{refused}");
        let young: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let elsewhere = crate::ipam(JSON, &young);
        let mut foreign = Reclaimer::new(&elsewhere, Policy::default());
        let far = snapshot(&ipam, containers(&[]));
        assert!(matches!(observe(&mut foreign, &far).unwrap_err(), ReclaimError::Foreign { .. }));
        assert_eq!(held(&ipam).len(), 11);
    });
}

#[test]
fn a_grace_only_delays() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(JSON, &store));
        lease(&ipam, "gone", None).unwrap();
        let mut reclaimer = Reclaimer::new(&ipam, Policy { grace: Duration::from_secs(60), ..Policy::default() });
        for _ in 0..5 {
            assert_eq!(observe(&mut reclaimer, &snapshot(&ipam, containers(&[]))).unwrap(), Vec::<String>::new());
            clock.advance(10);
        }
        clock.advance(10);
        assert_eq!(observe(&mut reclaimer, &snapshot(&ipam, containers(&[]))).unwrap(), ["gone"]);
    });
}

#[test]
fn evidence_about_one_node_or_network_says_nothing_of_others() {
    each_store(|store, _| {
        let plain = ipam(JSON, &store);
        lease(&plain, "nowhere", None).unwrap();
        for (node, container) in [("n1", "one"), ("n2", "two")] {
            lease(&ipam(JSON, &store).on_node(node.parse().unwrap(), LabelSet::new()), container, None).unwrap();
        }
        let scope = |node: Option<&str>, network: Option<&str>| Scope {
            node: node.map(|n| n.parse().unwrap()),
            network: network.map(|n| n.parse().unwrap()),
        };
        let empty = |scope| block_on(Snapshot::begin(&plain)).unwrap().complete(scope, containers(&[]));
        let mut reclaimer = Reclaimer::new(&plain, Policy::default());
        // By turns, as one process does that is told by every node.
        let mut released = Vec::new();
        for _ in 0..2 {
            released.extend(observe(&mut reclaimer, &empty(scope(Some("n1"), None))).unwrap());
            released.extend(observe(&mut reclaimer, &empty(scope(None, Some("elsewhere")))).unwrap());
        }
        assert_eq!(released, ["one"]);
        assert_eq!(held(&plain), set(&["nowhere", "two"]));
        // Of a binding without a workload an orchestrator says nothing.
        for _ in 0..3 {
            assert_eq!(observe(&mut reclaimer, &snapshot(&plain, pods(&[]))).unwrap(), Vec::<String>::new());
        }
    });
}

/// whereabouts#162 and #207: the list of pods was older than the list of reservations, so a new pod's address was freed.
#[test]
fn whereabouts_162_207_a_binding_newer_than_the_evidence_stays() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        let mut reclaimer = Reclaimer::new(&ipam, Policy::default());
        let first = block_on(Snapshot::begin(&ipam)).unwrap();
        lease(&ipam, "new", None).unwrap();
        let seen_before = containers(&[]);
        assert_eq!(
            observe(&mut reclaimer, &first.complete(Scope::default(), seen_before.clone())).unwrap(),
            Vec::<String>::new()
        );
        // And what came to be between observations is absent for the first time.
        assert_eq!(observe(&mut reclaimer, &snapshot(&ipam, seen_before)).unwrap(), Vec::<String>::new());
        assert_eq!(held(&ipam), set(&["new"]));
        // The twin: evidence without a fence, as `retain` takes it from a runtime that vouches for its list.
        assert_eq!(block_on(ipam.retain(&"net".parse().unwrap(), &[])).unwrap().len(), 1);
        assert_eq!(held(&ipam), set(&[]));
    });
}

/// whereabouts#176: a StatefulSet's pod had moved to another node, and of two reservations of one name the new one was
/// freed instead of the stale one.
#[test]
fn whereabouts_176_of_two_bindings_of_a_moved_pod_the_stale_one_goes() {
    each_store(|store, _| {
        // Without a claim, so that both bindings can be there at once.
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#;
        let on = |node: &str| ipam(json, &store).on_node(node.parse().unwrap(), LabelSet::new());
        lease(&on("old"), "stale", Some("shop/db-0")).unwrap();
        lease(&on("new"), "fresh", Some("shop/db-0")).unwrap();
        let ipam = ipam(json, &store);
        let mut reclaimer = Reclaimer::new(&ipam, Policy::default());
        let moved = || pods(&[("shop/db-0", Some("new"))]);
        observe(&mut reclaimer, &snapshot(&ipam, moved())).unwrap();
        assert_eq!(observe(&mut reclaimer, &snapshot(&ipam, moved())).unwrap(), ["stale"]);
        assert_eq!(held(&ipam), set(&["fresh"]));
    });
}

/// whereabouts#75 and #550: a node died without a DEL and its addresses were stuck; and a late DEL of the node that came
/// back must not free somebody else's.
#[test]
fn whereabouts_75_550_a_dead_nodes_bindings_come_back_and_its_late_del_frees_nobodys() {
    each_store(|store, _| {
        let on = |node: &str| ipam(JSON, &store).on_node(node.parse().unwrap(), LabelSet::new());
        let (dead, live) = (on("dead"), on("live"));
        let lost = block_on(dead.lease(&request("lost", Some("shop/db-0")))).unwrap();
        let plain = block_on(dead.lease(&request("plain", None))).unwrap();
        assert!(matches!(lease(&live, "new", Some("shop/db-0")).unwrap_err(), LeaseError::Held { .. }));
        let fence = block_on(live.revision()).unwrap();
        let node: NodeName = "dead".parse().unwrap();
        let dropped = block_on(live.drop_node(&node, fence)).unwrap();
        assert_eq!(dropped.len(), 2);
        assert_eq!(lease(&live, "new", Some("shop/db-0")).unwrap(), texts(&lost));
        // The same container name and address too, on another node by now.
        let mut same = request("plain", None);
        same.addresses = vec![plain.addresses[0].address.addr()];
        let again = block_on(live.lease(&same)).unwrap();
        assert_eq!(texts(&again), texts(&plain));
        for (container, lease) in [("lost", &lost), ("plain", &plain)] {
            block_on(dead.release(&attachment(container), lease.sequence())).unwrap();
        }
        assert_eq!(held(&live), set(&["new", "plain"]));
        // The twin: a release by name does free it.
        release(&dead, "plain");
        assert_eq!(held(&live), set(&["new"]));
    });
}

/// whereabouts#291: a full pool refused a restarted pod that held a reservation already.
#[test]
fn whereabouts_291_a_full_pool_serves_who_holds_an_address_already() {
    each_store(|store, _| {
        let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/30",
                        "claims": { "shop/db": { "keep": "72h" } } } ] }"#;
        let ipam = ipam(json, &store);
        let db = lease(&ipam, "c1", Some("shop/db")).unwrap();
        let other = lease(&ipam, "c2", None).unwrap();
        assert!(matches!(lease(&ipam, "c3", None).unwrap_err(), LeaseError::Exhausted { .. }));
        assert_eq!(lease(&ipam, "c2", None).unwrap(), other);
        release(&ipam, "c1");
        assert_eq!(lease(&ipam, "c1-again", Some("shop/db")).unwrap(), db);
    });
}

/// spiderpool#1187: a pod was deleted and made again under one name, and the collection for the old one hit the new.
#[test]
fn spiderpool_1187_a_pod_made_again_under_its_name_is_another_binding() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        let mut reclaimer = Reclaimer::new(&ipam, Policy::default());
        lease(&ipam, "db", Some("shop/x")).unwrap();
        let gone = || pods(&[]);
        observe(&mut reclaimer, &snapshot(&ipam, gone())).unwrap();
        let late = snapshot(&ipam, gone());
        release(&ipam, "db");
        // Even with the same container name.
        lease(&ipam, "db", Some("shop/x")).unwrap();
        assert_eq!(observe(&mut reclaimer, &late).unwrap(), Vec::<String>::new());
        assert_eq!(observe(&mut reclaimer, &snapshot(&ipam, gone())).unwrap(), Vec::<String>::new());
        assert_eq!(held(&ipam), set(&["db"]));
    });
}

/// A store in which a pod is made again at the moment that reclaim has decided and before it commits.
#[derive(Debug)]
struct Meanwhile {
    inner: Arc<dyn Store>,
    armed: std::sync::atomic::AtomicBool,
}

#[async_trait::async_trait]
impl Store for Meanwhile {
    async fn read(
        &self,
        keys: &[dcenet_ipam::store::Key],
    ) -> Result<Vec<Option<dcenet_ipam::store::Entry>>, dcenet_ipam::store::StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(dcenet_ipam::store::Key, dcenet_ipam::store::Entry)>, dcenet_ipam::store::StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(
        &self,
        batch: &dcenet_ipam::store::Batch,
    ) -> Result<dcenet_ipam::store::Outcome, dcenet_ipam::store::StoreError> {
        let releases =
            batch.writes.iter().any(|w| matches!(w, dcenet_ipam::store::Write::Delete(k) if k.starts_with(b"t/")));
        if releases && self.armed.swap(false, std::sync::atomic::Ordering::SeqCst) {
            let ours = ipam(JSON, &self.inner);
            ours.release_current(&attachment("db")).await.unwrap();
            ours.lease(&request("db", Some("shop/x"))).await.unwrap();
        }
        self.inner.commit(batch).await
    }

    fn caps(&self) -> dcenet_ipam::store::Caps {
        self.inner.caps()
    }

    async fn watch(
        &self,
        prefix: &[u8],
        after: u64,
    ) -> Result<Box<dyn dcenet_ipam::store::Watch>, dcenet_ipam::store::StoreError> {
        self.inner.watch(prefix, after).await
    }
}

/// Whether a pod that is made again between reclaim's look and its commit keeps its address.
fn survives(store: Arc<dyn Store>) -> bool {
    let meanwhile = Arc::new(Meanwhile { inner: store.clone(), armed: false.into() });
    let ours = ipam(JSON, &(meanwhile.clone() as Arc<dyn Store>));
    lease(&ours, "db", Some("shop/x")).unwrap();
    let mut reclaimer = Reclaimer::new(&ours, Policy::default());
    observe(&mut reclaimer, &snapshot(&ours, pods(&[]))).unwrap();
    meanwhile.armed.store(true, std::sync::atomic::Ordering::SeqCst);
    observe(&mut reclaimer, &snapshot(&ours, pods(&[]))).unwrap();
    assert!(!meanwhile.armed.load(std::sync::atomic::Ordering::SeqCst), "it came between");
    !held(&ipam(JSON, &store)).is_empty()
}

/// spiderpool#3751: collection took the address of a pod that was alive again.
#[test]
fn spiderpool_3751_the_last_look_is_in_the_same_commit() {
    each_store(|store, _| assert!(survives(store)));
}

#[test]
fn without_the_attachments_guard_the_live_pods_address_is_freed() {
    let unguarded = dcenet_ipam::store::flaky::UnguardedStore::new(Arc::new(MemoryStore::new()), |guard| {
        guard.key.starts_with(b"t/") || guard.key.starts_with(b"s/")
    });
    assert!(!survives(Arc::new(unguarded)));
}

/// spiderpool#412: the address was written, the record of its owner was not, and nobody could judge by what was left.
#[test]
fn spiderpool_412_no_failing_call_leaves_an_address_without_owner() {
    for failure in [Failure::Before, Failure::After, Failure::Lost] {
        for fail_at in 1..=40 {
            let inner: Arc<dyn Store> = Arc::new(MemoryStore::new());
            let flaky: Arc<dyn Store> = Arc::new(FlakyStore::new(inner.clone(), failure, fail_at));
            let told = lease(&ipam(JSON, &flaky), "c1", Some("shop/db-0"));
            let sound = ipam(JSON, &inner);
            let bound = block_on(sound.bindings(None)).unwrap();
            if told.is_ok() {
                assert_eq!(bound.len(), 1);
            }
            // Whatever is bound has an owner that evidence can speak of.
            let used = block_on(sound.usage()).unwrap()[0].bound;
            assert_eq!(used, bound.len() as u128, "{failure:?} at {fail_at}");
            let mut reclaimer = Reclaimer::new(&sound, Policy::default());
            for _ in 0..2 {
                observe(&mut reclaimer, &snapshot(&sound, containers(&[]))).unwrap();
            }
            assert_eq!(block_on(sound.usage()).unwrap()[0].bound, 0);
        }
    }
}

/// calico#13858: after a restart of the agent while a sandbox was made again, two had one address. And
/// amazon-vpc-cni-k8s#711: a restarted agent trusted a runtime that was not ready, and gave live addresses away.
#[test]
fn calico_13858_amazon_vpc_cni_711_a_restart_trusts_nothing_but_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        let store: Arc<dyn Store> = Arc::new(dcenet_ipam::store::log::LogStore::open(dir.path()).unwrap());
        ipam(JSON, &store)
    };
    let old = lease(&open(), "sandbox-1", None).unwrap();
    // The agent is new; the sandbox is made again before the old one's DEL.
    let new = lease(&open(), "sandbox-2", None).unwrap();
    assert_ne!(old, new);
    // The runtime does not answer yet: it names nothing, and says so.
    let agent = open();
    let mut reclaimer = Reclaimer::new(&agent, Policy::default());
    for _ in 0..3 {
        let unready = block_on(Snapshot::begin(&agent)).unwrap().partial(Scope::default(), containers(&[]));
        assert!(observe(&mut reclaimer, &unready).is_err());
    }
    assert_eq!(held(&agent), set(&["sandbox-1", "sandbox-2"]));
    for _ in 0..2 {
        observe(&mut reclaimer, &snapshot(&agent, containers(&["sandbox-2"]))).unwrap();
    }
    assert_eq!(held(&agent), set(&["sandbox-2"]));
}

#[test]
fn claims_that_last_as_long_as_their_workload_end_with_it() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        let address = lease(&ipam, "c1", Some("shop/job")).unwrap();
        lease(&ipam, "d0", Some("shop/db-0")).unwrap();
        release(&ipam, "c1");
        release(&ipam, "d0");
        let mut reclaimer = Reclaimer::new(&ipam, Policy::default());
        let alive = || snapshot(&ipam, pods(&[("shop/job", None)]));
        let gone = || snapshot(&ipam, pods(&[]));
        let ended = |r: &mut Reclaimer<'_>, s: &Snapshot| -> Vec<String> {
            block_on(r.observe(s)).unwrap().ended.iter().map(ToString::to_string).collect()
        };
        for _ in 0..3 {
            assert_eq!(ended(&mut reclaimer, &alive()), Vec::<String>::new());
        }
        assert_eq!(ended(&mut reclaimer, &gone()), Vec::<String>::new());
        // Used since the evidence was collected: it stays.
        let stale = gone();
        assert_eq!(lease(&ipam, "c2", Some("shop/job")).unwrap(), address);
        release(&ipam, "c2");
        assert_eq!(ended(&mut reclaimer, &stale), Vec::<String>::new());
        observe(&mut reclaimer, &gone()).unwrap();
        assert_eq!(ended(&mut reclaimer, &gone()), ["shop/job"]);
        // Those for ever stay.
        let left: Vec<String> = block_on(ipam.claims()).unwrap().iter().map(|c| c.claim.key.to_string()).collect();
        assert_eq!(left, ["shop/db-0"]);
    });
}

#[test]
fn a_silent_node_loses_nothing_unless_policy_says_so() {
    each_store(|store, _| {
        let clock = Clock::new();
        let on = |node: &str| clock.drive(ipam(JSON, &store).on_node(node.parse().unwrap(), LabelSet::new()));
        let (quiet, loud) = (on("quiet"), on("loud"));
        let names = |node: &str| node.parse::<NodeName>().unwrap();
        lease(&quiet, "q", None).unwrap();
        lease(&loud, "l", None).unwrap();
        let beat = |ipam: &Ipam, node: &str| block_on(ipam.heartbeat(&names(node), 7)).unwrap();
        beat(&quiet, "quiet");
        beat(&loud, "loud");
        let nodes = block_on(loud.nodes()).unwrap();
        assert_eq!(nodes.iter().map(|n| n.node.as_str()).collect::<Vec<_>>(), ["loud", "quiet"]);
        assert_eq!((nodes[1].epoch, nodes[1].beat), (7, clock.now()));

        let mut hint = Reclaimer::new(&loud, Policy::default());
        let silence = Some(Duration::from_secs(60));
        let mut strict = Reclaimer::new(&loud, Policy { silence, ..Policy::default() });
        for _ in 0..10 {
            assert_eq!(block_on(hint.silent_nodes()).unwrap(), []);
            clock.advance(1000);
        }
        // The first look of whoever is to judge by it begins the time.
        assert_eq!(block_on(strict.silent_nodes()).unwrap(), []);
        clock.advance(59);
        beat(&loud, "loud");
        assert_eq!(block_on(strict.silent_nodes()).unwrap(), []);
        clock.advance(1);
        let silent = block_on(strict.silent_nodes()).unwrap();
        assert_eq!(silent.len(), 1);
        assert_eq!((silent[0].0.as_str(), silent[0].1.released.len()), ("quiet", 1));
        assert_eq!(held(&loud), set(&["l"]));
        // It returns: its new bindings are of a living node.
        lease(&quiet, "q2", None).unwrap();
        beat(&quiet, "quiet");
        clock.advance(10);
        assert_eq!(block_on(strict.silent_nodes()).unwrap(), []);
        assert_eq!(held(&loud), set(&["l", "q2"]));
    });
}
