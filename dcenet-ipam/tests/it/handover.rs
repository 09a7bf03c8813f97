//! Live migration, as whoever migrates sees it.

use std::sync::Arc;
use std::time::Duration;

use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Ipam;
use dcenet_ipam::store::Store;
use dcenet_ipam::store::flaky::{MeetingStore, UnguardedStore};
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;

use crate::claims::{Clock, key, space};
use crate::{attachment, each_store, ipam, lease, release, request, texts};

const JSON: &str = r#"{ "cooldown": "0s", "pools": [
    { "name": "p", "subnet": "10.0.0.0/24", "claims": { "vms/a": { "address": "10.0.0.7", "mac": "from-address" } } },
    { "name": "six", "subnet": "fd00::/64", "claims": { "vms/a": {} } },
    { "name": "q", "subnet": "10.1.0.0/24" } ] }"#;
const VM: Option<&str> = Some("vms/a");
const LIMIT: Duration = Duration::from_secs(300);

fn begin(ipam: &Ipam, from: &str, to: Option<&str>) -> Result<bool, LeaseError> {
    block_on(ipam.begin_handover(&attachment(from), None, to.map(attachment).as_ref(), LIMIT))
}

fn holders(ipam: &Ipam) -> Vec<String> {
    block_on(ipam.bindings(None)).unwrap().iter().map(|b| format!("{} {}", b.attachment.container, b.address)).collect()
}

#[test]
fn a_declared_handover_lets_two_hold_one_claim_and_ends_with_one() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        let source = block_on(ipam.lease(&request("source", VM))).unwrap();
        // Undeclared, the second is refused.
        let refused = lease(&ipam, "target", VM).unwrap_err();
        assert!(
            matches!(&refused, LeaseError::Held { holder, .. } if holder == "attachment net/source/eth0"),
            "{refused}"
        );
        assert!(begin(&ipam, "source", Some("target")).unwrap());
        // Only the declared one.
        let refused = lease(&ipam, "third", VM).unwrap_err();
        assert!(
            matches!(&refused, LeaseError::Held { holder, .. } if holder.contains("in a handover to net/target/eth0")),
            "{refused}"
        );
        let early = block_on(ipam.complete_handover(&attachment("source"))).unwrap_err();
        assert!(early.to_string().contains("wait for the target"), "{early}");
        let target = block_on(ipam.lease(&request("target", VM))).unwrap();
        assert_eq!(texts(&target), texts(&source));
        assert_eq!(target.mac, source.mac);
        assert!(target.mac.is_some());
        assert!(target.sequence() > source.sequence());
        assert_eq!(block_on(ipam.lease(&request("target", VM))).unwrap(), target, "asked again");
        assert_eq!(block_on(ipam.lease(&request("source", VM))).unwrap(), source, "and the source still has it");
        let refused = lease(&ipam, "third", VM).unwrap_err();
        assert!(
            matches!(&refused, LeaseError::Held { holder, .. } if holder.contains("net/source/eth0 and net/target/eth0")),
            "{refused}"
        );
        let open = block_on(ipam.handovers()).unwrap();
        assert_eq!(open.len(), 2, "one of each family: {open:?}");
        assert!(open.iter().all(|h| h.active == attachment("source") && h.joined && h.claim == key("vms/a")));

        assert!(block_on(ipam.complete_handover(&attachment("source"))).unwrap());
        assert!(!block_on(ipam.complete_handover(&attachment("source"))).unwrap());
        assert_eq!(block_on(ipam.handovers()).unwrap(), []);
        assert_eq!(block_on(ipam.held(&attachment("source"))).unwrap(), None);
        // The late DEL of the source, and its GC, find nothing.
        block_on(ipam.release(&attachment("source"), source.sequence())).unwrap();
        release(&ipam, "source");
        assert_eq!(holders(&ipam), ["target 10.0.0.7/24", "target fd00::1/64"]);
        assert!(matches!(lease(&ipam, "third", VM).unwrap_err(), LeaseError::Held { .. }));
        // And back: migration is repeatable.
        assert!(begin(&ipam, "target", None).unwrap());
        assert_eq!(lease(&ipam, "source-2", VM).unwrap(), texts(&source));
        assert!(block_on(ipam.complete_handover(&attachment("target"))).unwrap());
        block_on(ipam.release(&attachment("target"), target.sequence())).unwrap();
        assert_eq!(holders(&ipam), ["source-2 10.0.0.7/24", "source-2 fd00::1/64"]);
        release(&ipam, "source-2");
        assert_eq!(block_on(ipam.usage()).unwrap()[0].kept, 1);
    });
}

#[test]
fn an_aborted_handover_leaves_the_source_and_the_late_release_of_the_target_is_harmless() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        let source = block_on(ipam.lease(&request("source", VM))).unwrap();
        begin(&ipam, "source", None).unwrap();
        let target = block_on(ipam.lease(&request("target", VM))).unwrap();
        assert!(block_on(ipam.abort_handover(&attachment("source"))).unwrap());
        assert_eq!(block_on(ipam.held(&attachment("target"))).unwrap(), None);
        block_on(ipam.release(&attachment("target"), target.sequence())).unwrap();
        assert_eq!(block_on(ipam.held(&attachment("source"))).unwrap(), Some(source.clone()));
        assert!(matches!(lease(&ipam, "target", VM).unwrap_err(), LeaseError::Held { .. }));
        // Its lease has the sequence it always had.
        assert!(block_on(ipam.release_sequence(&attachment("source"), source.sequence())).unwrap());
        assert_eq!(holders(&ipam), Vec::<String>::new());
    });
}

#[test]
fn whichever_dies_leaves_the_address_to_the_other() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        // The target dies: its release ends the handover.
        let source = block_on(ipam.lease(&request("source", VM))).unwrap();
        begin(&ipam, "source", None).unwrap();
        lease(&ipam, "target", VM).unwrap();
        release(&ipam, "target");
        assert_eq!(block_on(ipam.handovers()).unwrap(), []);
        assert_eq!(block_on(ipam.held(&attachment("source"))).unwrap(), Some(source.clone()));
        // The source dies: the target has it, without a word.
        begin(&ipam, "source", None).unwrap();
        let target = block_on(ipam.lease(&request("target-2", VM))).unwrap();
        release(&ipam, "source");
        assert_eq!(block_on(ipam.handovers()).unwrap(), []);
        assert_eq!(block_on(ipam.held(&attachment("target-2"))).unwrap(), Some(target));
        assert!(!block_on(ipam.complete_handover(&attachment("source"))).unwrap());
        assert!(matches!(lease(&ipam, "third", VM).unwrap_err(), LeaseError::Held { .. }));
        // Both die: it is kept.
        begin(&ipam, "target-2", None).unwrap();
        lease(&ipam, "target-3", VM).unwrap();
        release(&ipam, "target-2");
        release(&ipam, "target-3");
        assert_eq!(block_on(ipam.usage()).unwrap()[0].kept, 1);
        assert_eq!(lease(&ipam, "again", VM).unwrap(), texts(&source));
        // The source goes before anybody joined: the declaration goes with it.
        begin(&ipam, "again", Some("never")).unwrap();
        release(&ipam, "again");
        assert_eq!(lease(&ipam, "other", VM).unwrap(), texts(&source));
    });
}

#[test]
fn a_handover_is_bounded_in_time() {
    each_store(|store, _| {
        let clock = Clock::new();
        let ipam = clock.drive(ipam(JSON, &store));
        lease(&ipam, "source", VM).unwrap();
        begin(&ipam, "source", None).unwrap();
        clock.advance(301);
        let late = lease(&ipam, "target", VM).unwrap_err();
        assert!(
            matches!(&late, LeaseError::Held { holder, .. } if holder.contains("time of its handover is over")),
            "{late}"
        );
        // Declared again, it goes on; joined in time, it outlasts its time until somebody ends it.
        begin(&ipam, "source", None).unwrap();
        lease(&ipam, "target", VM).unwrap();
        assert_eq!(block_on(ipam.expire()).unwrap(), 0);
        clock.advance(301);
        assert!(block_on(ipam.expire()).unwrap() >= 1);
        assert_eq!(block_on(ipam.held(&attachment("target"))).unwrap(), None);
        assert!(block_on(ipam.held(&attachment("source"))).unwrap().is_some());
        assert_eq!(block_on(ipam.handovers()).unwrap(), []);
        for wrong in [Duration::ZERO, Duration::from_secs(90_000)] {
            let refused = block_on(ipam.begin_handover(&attachment("source"), None, None, wrong)).unwrap_err();
            assert!(matches!(&refused, LeaseError::Invalid { field, .. } if field == "limit"), "{refused}");
        }
    });
}

#[test]
fn what_cannot_be_handed_over_is_refused() {
    each_store(|store, _| {
        let ipam = ipam(JSON, &store);
        assert!(!begin(&ipam, "nobody", None).unwrap());
        lease(&ipam, "plain", None).unwrap();
        assert!(
            matches!(begin(&ipam, "plain", None).unwrap_err(), LeaseError::Invalid { field, .. } if field == "from")
        );
        let source = block_on(ipam.lease(&request("source", VM))).unwrap();
        assert!(
            matches!(begin(&ipam, "source", Some("source")).unwrap_err(), LeaseError::Invalid { field, .. } if field == "to")
        );
        assert!(
            matches!(begin(&ipam, "source", Some("plain")).unwrap_err(), LeaseError::Invalid { field, .. } if field == "to")
        );
        let from = attachment("source");
        let stale = ipam.begin_handover(&from, Some(source.sequence() - 1), None, LIMIT);
        assert!(!block_on(stale).unwrap(), "another lease is meant");
        begin(&ipam, "source", None).unwrap();
        lease(&ipam, "target", VM).unwrap();
        let other = begin(&ipam, "source", Some("elsewhere")).unwrap_err();
        assert!(matches!(&other, LeaseError::Held { holder, .. } if holder.contains("complete or abort")), "{other}");
        assert!(begin(&ipam, "source", Some("target")).unwrap(), "the same again only takes longer");
        // What another claim or nobody wants, a handover does not open.
        let mut thief = request("thief", None);
        thief.addresses = vec!["10.0.0.7".parse().unwrap()];
        assert!(matches!(block_on(ipam.lease(&thief)).unwrap_err(), LeaseError::Held { .. }));
        assert!(matches!(block_on(ipam.forget(&space(), &key("vms/a"))).unwrap_err(), LeaseError::Held { .. }));
    });
}

/// Two targets that both saw the open place of one handover; what each was told.
fn two_targets(store: Arc<dyn Store>) -> usize {
    use std::sync::Barrier;
    let json = JSON.replace(r#"{ "name": "six", "subnet": "fd00::/64", "claims": { "vms/a": {} } },"#, "");
    let ours = ipam(&json, &store);
    lease(&ours, "source", VM).unwrap();
    begin(&ours, "source", None).unwrap();
    let meeting: Arc<dyn Store> = MeetingStore::over(store, b"t/");
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        let racers = ["t1", "t2"].map(|target| {
            let (json, meeting, start) = (&json, &meeting, &start);
            scope.spawn(move || {
                start.wait();
                usize::from(lease(&ipam(json, meeting), target, VM).is_ok())
            })
        });
        racers.into_iter().map(|r| r.join().unwrap()).sum()
    })
}

#[test]
fn one_of_two_targets_at_once_joins() {
    each_store(|store, _| assert_eq!(two_targets(store), 1));
}

#[test]
fn without_the_slots_guard_both_targets_join() {
    let unguarded = UnguardedStore::new(Arc::new(MemoryStore::new()), |guard| guard.key.starts_with(b"s/"));
    assert_eq!(two_targets(Arc::new(unguarded)), 2);
}
