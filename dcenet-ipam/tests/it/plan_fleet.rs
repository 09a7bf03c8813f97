//! A fleet of clusters, each with a store of its own, that are cut off and come back, and what it costs to ask.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use dcenet_ipam::model::AddressSpace;
use dcenet_ipam::plan::{Claim, Level, Plan, PlanError, Prefix, Purpose, State};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::memory::MemoryStore;
use ipnet::IpNet;
use pollster::block_on;

use crate::plan::net;

/// Drawn by xorshift64*, so that a seed repeats a run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

struct Cluster {
    name: String,
    plan: Plan,
    reachable: bool,
    pools: Vec<Prefix>,
    claimed: usize,
}

/// Whether the parent's word that a cluster is gone is only given when it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    Kept,
    Broken,
}

/// What a run did.
#[derive(Debug, Default)]
struct Outcome {
    claims: usize,
    claims_while_cut_off: usize,
    refused: usize,
    partitions: usize,
    delegations: usize,
    returned: usize,
    lost: usize,
    /// The most pairs of pools of two clusters that shared addresses.
    overlaps: usize,
}

/// Addresses that two of the pools share: sorted by their first address, one begins before another ended.
fn overlapping(clusters: &[Cluster]) -> usize {
    let number = |ip| match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => u128::from(ip),
    };
    let mut all: Vec<(u128, u128)> = clusters
        .iter()
        .flat_map(|c| c.pools.iter().map(|p| (number(p.cidr.network()), number(p.cidr.broadcast()))))
        .collect();
    all.sort_unstable();
    let mut last = None;
    let mut count = 0;
    for (first, end) in all {
        count += usize::from(last.is_some_and(|last| first <= last));
        last = last.max(Some(end));
    }
    count
}

fn give_more(fleet: &Plan, cluster: &Cluster, serial: usize) -> Result<(), PlanError> {
    let space = AddressSpace::default();
    let claim =
        Claim::within(net("10.0.0.0/8"), 17, Level::Cluster, &format!("{}-{serial}", cluster.name), &cluster.name);
    let prefix = block_on(fleet.claim(&claim))?;
    block_on(fleet.delegate(&space, prefix.cidr, prefix.level)).map(drop)
}

fn run(clusters: usize, wanted: usize, seed: u64, word: Word) -> Outcome {
    let space = AddressSpace::default();
    let fleet = Plan::new(Arc::new(MemoryStore::new()), "fleet").unwrap();
    block_on(fleet.add_space(&space, &[])).unwrap();
    block_on(fleet.own(&Claim::at(net("10.0.0.0/8"), Level::Fleet, "corp", "net"))).unwrap();
    let mut random = Random(seed);
    let mut all: Vec<Cluster> = (0..clusters)
        .map(|i| Cluster {
            name: format!("c{i}"),
            plan: Plan::new(Arc::new(MemoryStore::new()) as Arc<dyn Store>, &format!("c{i}")).unwrap(),
            reachable: true,
            pools: Vec::new(),
            claimed: 0,
        })
        .collect();
    let mut outcome = Outcome::default();
    let mut serial = 0;
    while outcome.claims < wanted {
        let which = random.below(clusters);
        match random.below(100) {
            // The line is cut, or mended.
            0 | 1 => {
                all[which].reachable = !all[which].reachable;
                outcome.partitions += usize::from(!all[which].reachable);
            }
            // Both sides speak.
            2..=4 if all[which].reachable => {
                let cluster = &all[which];
                let orders = block_on(fleet.orders(&block_on(cluster.plan.statement()).unwrap())).unwrap();
                let done = block_on(cluster.plan.obey(&orders)).unwrap();
                assert!(done.refused.is_empty(), "{:?}", done.refused);
                outcome.lost += done.draining.iter().filter(|p| p.state == State::Lost).count();
                for receipt in &done.receipts {
                    outcome.returned += usize::from(block_on(fleet.settle(receipt)).unwrap());
                }
            }
            // The fleet gives, whether the cluster hears of it or not.
            5 => {
                serial += 1;
                match give_more(&fleet, &all[which], serial) {
                    Ok(()) => outcome.delegations += 1,
                    Err(PlanError::Exhausted { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            // The fleet takes back.
            6 => {
                let tree = block_on(fleet.tree(&space)).unwrap();
                let theirs: Vec<&Prefix> =
                    tree.rows.iter().map(|r| &r.prefix).filter(|p| p.owner == all[which].name).collect();
                if theirs.len() > 1 {
                    let prefix = theirs[random.below(theirs.len())];
                    let revocation = block_on(fleet.revoke(&space, prefix.cidr, prefix.level)).unwrap();
                    if word == Word::Broken {
                        block_on(fleet.attest_gone(&revocation)).unwrap();
                    }
                }
            }
            // The cluster gives up a pool, or claims one from what it has, cut off or not.
            7..=20 => {
                let cluster = &mut all[which];
                if !cluster.pools.is_empty() {
                    let pool = cluster.pools.swap_remove(random.below(cluster.pools.len()));
                    assert!(block_on(cluster.plan.release(&pool)).unwrap());
                }
            }
            _ => {
                let cluster = &mut all[which];
                let holdings = block_on(cluster.plan.statement()).unwrap().holdings;
                if holdings.is_empty() {
                    continue;
                }
                let holding = &holdings[random.below(holdings.len())];
                cluster.claimed += 1;
                let name = format!("p{}", cluster.claimed);
                let length = 22 + random.below(8) as u8;
                let claim =
                    Claim::within(holding.cidr, length, Level::Pool, &name, &cluster.name).purpose(Purpose::Pod);
                match block_on(cluster.plan.claim(&claim)) {
                    Ok(pool) => {
                        cluster.pools.push(pool);
                        outcome.claims += 1;
                        outcome.claims_while_cut_off += usize::from(!cluster.reachable);
                    }
                    Err(PlanError::Exhausted { .. } | PlanError::Closing { .. }) => {
                        outcome.refused += 1;
                        // Room for the rest of the run.
                        if let Some(pool) = cluster.pools.pop() {
                            assert!(block_on(cluster.plan.release(&pool)).unwrap());
                        }
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
        if outcome.claims % 500 == 0 {
            outcome.overlaps = outcome.overlaps.max(overlapping(&all));
        }
    }
    outcome.overlaps = outcome.overlaps.max(overlapping(&all));
    // Each pool is where its cluster's own store says.
    for cluster in &all {
        let tree = block_on(cluster.plan.tree(&space)).unwrap();
        let stored: BTreeMap<IpNet, &str> = tree
            .rows
            .iter()
            .filter(|r| r.prefix.level == Level::Pool)
            .map(|r| (r.prefix.cidr, r.prefix.name.as_str()))
            .collect();
        let known: BTreeMap<IpNet, &str> = cluster.pools.iter().map(|p| (p.cidr, p.name.as_str())).collect();
        assert_eq!(stored, known, "{}", cluster.name);
    }
    outcome
}

#[test]
fn a_hundred_clusters_that_are_cut_off_never_overlap() {
    let wanted = if std::env::var_os("DCENET_SOAK").is_some_and(|v| v == "1") { 100_000 } else { 5_000 };
    let outcome = run(100, wanted, 0x9e37_79b9_7f4a_7c15, Word::Kept);
    println!("{outcome:?}");
    assert_eq!((outcome.overlaps, outcome.lost), (0, 0), "{outcome:?}");
    assert!(outcome.partitions > 20 && outcome.claims_while_cut_off > wanted / 10, "{outcome:?}");
    assert!(outcome.returned > 0 && outcome.delegations > 100, "{outcome:?}");
}

#[test]
fn without_the_owners_consent_they_do_and_learn_of_it() {
    let outcome = run(20, 5_000, 0x9e37_79b9_7f4a_7c15, Word::Broken);
    println!("{outcome:?}");
    assert!(outcome.overlaps > 0 && outcome.lost > 0, "{outcome:?}");
}
