//! GC, and what a kill leaves that no record tells of.

use std::time::Duration;

use dcenet_core::test_support::{Rung, require};

use super::common::{Faulted, Node};

#[test]
fn gc_takes_records_that_say_nothing_and_leaves_those_at_work() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    node.warm();
    let (killed, standing, working) = (node.pod("killed"), node.pod("standing"), node.pod("working"));
    node.add(&standing).unwrap();
    let records = node.host.records();
    let (host, store) = (node.host.state(), node.store());
    let Faulted { met, outcome } = node.faulted("ADD", Some(&killed), &node.config, "abort-after:1");
    assert_eq!(outcome, None, "it was killed at {met:?}");
    let left = node.host.records();
    assert_eq!(left.len(), 2, "{met:?} left no record");
    let empty = left.iter().find(|name| !records.contains(name)).unwrap();
    assert_eq!(std::fs::read(node.host.run_dir().join("attachments").join(empty)).unwrap(), b"");

    // Another whose record says nothing yet, for it is at work.
    let mut add = node.start_to_stop("ADD", &working, 2);
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !add.is_stopped() {
        assert!(std::time::Instant::now() < deadline, "it does not stop");
    }
    assert_eq!(node.host.records().len(), 3);
    // Without a list nothing is stale.
    node.gc(None).unwrap();
    assert_eq!(node.host.records().len(), 3);
    node.gc(Some(&[&standing, &working])).unwrap();
    assert_eq!(node.host.records().len(), 2, "{:?}", node.host.records());
    assert!(!node.host.records().contains(empty));
    add.resume();
    add.wait().expect("nobody kills it").unwrap();
    node.del(&working).unwrap();
    assert_eq!((node.host.records(), node.store()), (records, store));
    assert_eq!(host.diff(&node.host.state()), "");
}
