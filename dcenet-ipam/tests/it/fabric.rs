//! What is told of nodes and their prefixes, as it changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::model::{LabelSet, MacAddr};
use dcenet_core::provider::{AddressSource, FabricNode, FabricSource, FabricSourceError, FabricTable, Vtep};
use dcenet_ipam::Ipam;
use dcenet_ipam::fabric::FabricFeed;
use dcenet_ipam::reclaim::{Alive, Policy, Reclaimer, Scope, Snapshot};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;

use crate::{config, each_store, ipam, lease, release, request};

pub(crate) const POOLS: &str = r#"{ "cooldown": "0s", "pools": [
    { "name": "pods", "subnet": "10.20.0.0/24", "block": { "size": 64 } },
    { "name": "pods6", "subnet": "fd20::/64", "block": { "size": 256 } },
    { "name": "lan", "subnet": "192.0.2.0/24" } ] }"#;
const SOON: Duration = Duration::from_secs(60);

pub(crate) fn on(store: &Arc<dyn Store>, node: &str) -> Ipam {
    ipam(POOLS, store).on_node(node.parse().unwrap(), LabelSet::new())
}

pub(crate) fn node(name: &str, address: &str) -> FabricNode {
    let address = address.parse().unwrap();
    let vtep = Vtep { address, mac: MacAddr::new([2, 0xdc, 0, 0, 0, 1]), vni: 3534, port: 4789, mtu: None };
    FabricNode { name: name.into(), addresses: vec![address], vtep: Some(vtep), inside: Vec::new() }
}

pub(crate) fn prefixes(table: &FabricTable) -> BTreeMap<String, &str> {
    table.prefixes.iter().map(|(prefix, owner)| (prefix.to_string(), owner.as_str())).collect()
}

fn next(feed: &mut FabricFeed<Arc<Ipam>>) -> FabricTable {
    block_on(feed.next(SOON)).unwrap().expect("it has changed")
}

#[test]
fn blocks_nodes_and_borrowed_addresses_are_told_as_they_come_and_go() {
    each_store(|store, _| {
        let (one, two) = (on(&store, "n1"), on(&store, "n2"));
        let mut feed = FabricFeed::new(Arc::new(on(&store, "n3")));
        let empty = next(&mut feed);
        assert!(empty.nodes.is_empty() && empty.prefixes.is_empty(), "{empty:?}");
        let pools: Vec<_> = empty.pools.iter().map(ToString::to_string).collect();
        assert_eq!(pools, ["10.20.0.0/24", "fd20::/64"], "without the pool whose addresses are on a segment");

        lease(&one, "a", None).unwrap();
        assert_eq!(
            prefixes(&next(&mut feed)),
            BTreeMap::from([("10.20.0.0/26".into(), "n1"), ("fd20::/120".into(), "n1")])
        );
        // Another address of the same blocks is no news.
        lease(&one, "b", None).unwrap();
        assert_eq!(block_on(feed.next(Duration::ZERO)).unwrap(), None);

        // One address of the first node's block that is asked for on the second.
        let mut asked = request("c", None);
        asked.addresses = vec!["10.20.0.40".parse().unwrap()];
        asked.pools = vec!["pods".into()];
        block_on(two.lease(&asked)).unwrap();
        assert_eq!(prefixes(&next(&mut feed)).get("10.20.0.40/32"), Some(&"n2"));
        release(&two, "c");
        assert_eq!(prefixes(&next(&mut feed)).get("10.20.0.40/32"), None);

        // Blocks that are given back, and go to another node.
        for container in ["a", "b"] {
            release(&one, container);
        }
        assert_eq!(block_on(one.release_empty_blocks()).unwrap().len(), 2);
        lease(&two, "d", None).unwrap();
        let mut last = next(&mut feed);
        while let Some(later) = block_on(feed.next(Duration::from_millis(500))).unwrap() {
            last = later;
        }
        assert!(last.prefixes.values().all(|owner| owner == "n2") && last.prefixes.len() == 2, "{last:?}");
        // A feed that begins now tells the same.
        assert_eq!(next(&mut FabricFeed::new(Arc::new(on(&store, "n4")))), last);
    });
}

#[test]
fn a_node_is_known_until_it_is_forgotten_and_its_name_is_its_own() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let mut feed = FabricFeed::new(Arc::new(on(&store, "n1")));
    let mut mine = FabricFeed::new(Arc::new(on(&store, "n1")));
    next(&mut feed);
    let before = node("n1", "192.0.2.1");
    block_on(mine.announce(&before)).unwrap();
    assert_eq!(next(&mut feed).nodes["n1"], before);
    block_on(mine.announce(&before)).unwrap();
    assert_eq!(block_on(feed.next(Duration::ZERO)).unwrap(), None, "repeating it changes nothing");
    // It may change its own address, and a process that begins anew may change what the one before told.
    let after = node("n1", "192.0.2.9");
    block_on(mine.announce(&after)).unwrap();
    assert_eq!(next(&mut feed).nodes["n1"], after);
    let mut other = FabricFeed::new(Arc::new(on(&store, "n1")));
    let others = node("n1", "192.0.2.77");
    block_on(other.announce(&others)).unwrap();
    // But of two that live the second is told.
    let refused = block_on(mine.announce(&after)).unwrap_err();
    assert!(matches!(&refused, FabricSourceError::NameTaken { name, .. } if name == "n1"), "{refused}");
    assert_eq!(next(&mut feed).nodes["n1"], others);

    block_on(on(&store, "n2").drop_node(&"n1".parse().unwrap(), 0)).unwrap();
    assert!(next(&mut feed).nodes.is_empty());
    block_on(other.announce(&others)).unwrap();
    assert_eq!(next(&mut feed).nodes.len(), 1, "who lives comes back");
    block_on(other.withdraw("n1")).unwrap();
    assert!(next(&mut feed).nodes.is_empty());
}

#[test]
fn a_node_has_addresses_inside_its_own_blocks_until_it_is_forgotten() {
    each_store(|store, _| {
        let one = Arc::new(on(&store, "n1"));
        let mut feed = FabricFeed::new(one.clone());
        let leased = block_on(feed.lease_inside("n1")).unwrap();
        assert_eq!(leased.iter().map(|a| a.is_ipv4()).collect::<Vec<_>>(), [true, false]);
        let table = next(&mut feed);
        let owned = prefixes(&table);
        assert_eq!(owned, BTreeMap::from([("10.20.0.0/26".into(), "n1"), ("fd20::/120".into(), "n1")]));
        assert!(leased.iter().all(|a| table.prefixes.keys().any(|prefix| prefix.contains(a))), "{leased:?}");
        // The same whoever asks, also a process that begins anew; another node has others.
        assert_eq!(block_on(feed.lease_inside("n1")).unwrap(), leased);
        assert_eq!(block_on(FabricFeed::new(Arc::new(on(&store, "n1"))).lease_inside("n1")).unwrap(), leased);
        let two = block_on(FabricFeed::new(Arc::new(on(&store, "n2"))).lease_inside("n2")).unwrap();
        assert!(two.iter().all(|a| !leased.contains(a)), "{two:?}");
        let pods = lease(&one, "a", None).unwrap();
        assert!(leased.iter().all(|a| pods.iter().all(|pod| !pod.starts_with(&format!("{a}/")))), "{pods:?}");

        // Snapshots of containers name it never. Their twins: pods that they do not name go, of whichever network.
        let mut alike = request("b", None);
        alike.attachment.network = "dcenet.fabric".parse().unwrap();
        block_on(one.lease(&alike)).unwrap();
        let mut reclaimer = Reclaimer::new(&one, Policy::default());
        let mut released = Vec::new();
        for _ in 0..3 {
            let begun = block_on(Snapshot::begin(&one)).unwrap();
            let snapshot = begun.complete(Scope::default(), Alive::Attachments([].into()));
            released.extend(block_on(reclaimer.observe(&snapshot)).unwrap().released);
        }
        let mut gone: Vec<_> = released.iter().map(|(key, _)| key.container.to_string()).collect();
        gone.sort();
        assert_eq!(gone, ["a", "b"]);
        assert_eq!(block_on(feed.lease_inside("n1")).unwrap(), leased);

        // Of pools that are not any more the address is given up.
        let mut other = config(POOLS);
        other.pools.remove(1);
        let other = Ipam::new(&other, store.clone()).unwrap().on_node("n1".parse().unwrap(), LabelSet::new());
        assert_eq!(block_on(FabricFeed::new(Arc::new(other)).lease_inside("n1")).unwrap().len(), 1);
        block_on(feed.withdraw("n1")).unwrap();
        block_on(one.drop_node(&"n2".parse().unwrap(), u64::MAX)).unwrap();
        assert_eq!(block_on(one.bindings(None)).unwrap().len(), 0);
    });
}

#[test]
fn a_node_whose_pools_are_full_is_told_that_it_has_none_inside() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let pools = r#"{ "pools": [ { "name": "p", "subnet": "10.20.0.0/29", "block": { "size": 8 } } ] }"#;
    let one = Arc::new(ipam(pools, &store).on_node("n1".parse().unwrap(), LabelSet::new()));
    while lease(&one, &format!("c{}", block_on(one.bindings(None)).unwrap().len()), None).is_ok() {}
    let error = block_on(FabricFeed::new(one.clone()).lease_inside("n1")).unwrap_err();
    assert!(matches!(&error, FabricSourceError::Inside { name, .. } if name == "n1"), "{error}");
    assert!(error.to_string().contains("give its pools free addresses: pool p has no free address"), "{error}");
}
