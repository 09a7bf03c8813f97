//! Pools that are filled to the last address.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::Ipam;
use dcenet_ipam::store::Store;
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;

use crate::{attachment, ipam, release, request};

/// Leases until the pool is empty, and returns what was given.
fn fill(ours: &Ipam, size: usize) -> HashSet<IpAddr> {
    let mut given = HashSet::with_capacity(size);
    for n in 0..size {
        let lease = block_on(ours.lease(&request(&format!("c{n}"), None))).unwrap();
        assert_eq!(lease.addresses.len(), 1);
        assert!(given.insert(lease.addresses[0].address.addr()), "{lease:?} twice, at {n}");
    }
    given
}

/// The pool is full, says so with its numbers, and gives what is released.
fn full(ours: &Ipam, size: usize) {
    for _ in 0..2 {
        let refused = block_on(ours.lease(&request("more", None))).unwrap_err();
        let LeaseError::Exhausted { pool, size: told } = &refused else { panic!("{refused}") };
        assert_eq!((pool.as_str(), *told), ("p", size as u128));
        assert!(refused.to_string().contains(&format!("all {size} are in use")), "{refused}");
    }
    let refused = block_on(ours.ready()).unwrap_err();
    assert!(matches!(refused, LeaseError::Exhausted { .. }), "{refused}");
    let capacity = block_on(ours.capacity()).unwrap();
    assert_eq!((capacity.pools[0].bound, capacity.pools[0].available), (size as u128, 0));
    let middle = block_on(ours.held(&attachment(&format!("c{}", size / 2)))).unwrap().unwrap();
    release(ours, &format!("c{}", size / 2));
    let again = block_on(ours.lease(&request("more", None))).unwrap();
    assert_eq!(again.addresses[0].address, middle.addresses[0].address);
    let refused = block_on(ours.lease(&request("yet-more", None))).unwrap_err();
    assert!(matches!(refused, LeaseError::Exhausted { .. }), "{refused}");
}

#[test]
fn a_pool_of_65_534_addresses_gives_each_once_and_refuses_the_next_with_its_numbers() {
    let json = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.64.0.0/16" } ] }"#;
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(json, &store).with_index();
    let given = fill(&ours, 65_534);
    let [network, broadcast] = ["10.64.0.0", "10.64.255.255"].map(|a| a.parse::<IpAddr>().unwrap());
    assert!(!given.contains(&network) && !given.contains(&broadcast));
    full(&ours, 65_534);
}

#[test]
fn an_ipv6_pool_of_100_000_addresses_gives_each_once_and_refuses_the_next_with_its_numbers() {
    let size: usize = dcenet_core::test_support::effort(20_000, 100_000, 1_000_000);
    let last = format!("fd00::{:x}:{:x}", size >> 16, size & 0xffff);
    let json = format!(
        r#"{{ "cooldown": "0s", "pools": [ {{ "name": "p", "subnet": "fd00::/64", "ranges": ["fd00::1-{last}"] }} ] }}"#
    );
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(&json, &store).with_index();
    let given = fill(&ours, size);
    assert!(given.contains(&last.parse::<IpAddr>().unwrap()));
    full(&ours, size);
}
