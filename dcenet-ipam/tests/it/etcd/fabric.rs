//! Who has what, followed through etcd by nodes that share nothing else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_core::provider::{FabricSource, FabricTable};
use dcenet_ipam::Ipam;
use dcenet_ipam::fabric::FabricFeed;
use dcenet_ipam::store::etcd::cluster::Cluster;
use pollster::block_on;

use super::{SOON, can_run, memory_dir, open};
use crate::fabric::{node, on, prefixes};
use crate::{lease, release};

/// The next table that is as expected, whatever fails before.
fn until(feed: &mut FabricFeed<Arc<Ipam>>, what: &str, expected: impl Fn(&FabricTable) -> bool) -> FabricTable {
    let deadline = Instant::now() + SOON;
    let mut last = String::new();
    while Instant::now() < deadline {
        match block_on(feed.next(Duration::from_secs(1))) {
            Ok(Some(table)) if expected(&table) => return table,
            Ok(Some(table)) => last = format!("{table:?}"),
            Ok(None) => {}
            Err(error) => {
                last = error.to_string();
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
    panic!("{what} was not told of: {last}");
}

#[test]
fn nodes_hear_of_each_other_also_after_a_member_died_and_history_was_compacted() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let mut cluster = Cluster::start(1, dir.path());
    // Each node has a connection of its own.
    let stores = ["n1", "n2", "n3"].map(|_| open(&cluster.config()));
    let [one, two, three] = ["n1", "n2", "n3"].map(|name| {
        let store = &stores[name[1..].parse::<usize>().unwrap() - 1];
        Arc::new(on(store, name))
    });
    let mut feed = FabricFeed::new(three.clone());
    until(&mut feed, "nothing", |table| table.prefixes.is_empty());
    let mut first = FabricFeed::new(one.clone());
    block_on(first.announce(&node("n1", "192.0.2.1"))).unwrap();
    let inside = block_on(first.lease_inside("n1")).unwrap();
    let table = until(&mut feed, "the first node", |table| table.nodes.len() == 1 && table.prefixes.len() == 2);
    assert!(inside.iter().all(|a| table.prefixes.iter().any(|(prefix, owner)| prefix.contains(a) && owner == "n1")));

    // While the follower looks away, the history that its watch would go on from is compacted, and the member dies.
    lease(&two, "a", None).unwrap();
    block_on(FabricFeed::new(two.clone()).announce(&node("n2", "192.0.2.2"))).unwrap();
    let revision = block_on(two.revision()).unwrap();
    for n in 0..20 {
        lease(&two, &format!("c{n}"), None).unwrap();
        release(&two, &format!("c{n}"));
    }
    cluster.kill(0);
    let mut told = 0;
    while block_on(feed.next(Duration::from_millis(200))).is_ok_and(|table| table.is_some()) {
        told += 1;
    }
    cluster.restart(0);
    assert!(cluster.wait());
    cluster.etcdctl(&["compaction", &(revision + 10).to_string()]);
    block_on(FabricFeed::new(one.clone()).withdraw("n1")).unwrap();
    let table = until(&mut feed, "the second node", |table| table.nodes.keys().eq(["n2"]));
    assert!(told < 3, "changes of addresses in their nodes' blocks are no news");
    assert_eq!(prefixes(&table).values().filter(|owner| **owner == "n2").count(), 2);
    // A follower that begins now is told the same.
    assert_eq!(until(&mut FabricFeed::new(three), "all", |_| true), table);
    // And it goes on.
    lease(&two, "b", None).unwrap();
    block_on(FabricFeed::new(one).announce(&node("n1", "192.0.2.9"))).unwrap();
    until(&mut feed, "the first node's return", |table| table.nodes.contains_key("n1"));
}
