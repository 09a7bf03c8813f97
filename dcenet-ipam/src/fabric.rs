//! Which node has which prefix, followed by the store's watch: a [`FabricSource`].
//!
//! Of the configuration's pools those are routed whose blocks nodes own. A prefix is a node's
//! - if it is a block that the node owns, also one that is being given up: it may still be in use;
//! - if it is one address of such a pool that an attachment of the node has, and the block around it is not the node's:
//!   borrowed, claimed, or asked for.
//!
//! A node's record (`v/NODE`) has no time limit. That a node is silent says nothing of its pods, so its routes stay until its
//! blocks are reclaimed ([`reclaim`](crate::reclaim)), or somebody who knows that it is gone has it forgotten
//! ([`Ipam::drop_node`], [`FabricSource::withdraw`]).
//!
//! What a node itself sends through VXLAN comes from addresses that it leases as a pod would: the attachment
//! `dcenet.fabric/NODE/vxlan`. No container is behind it, so that no snapshot of containers takes it back.
//!
//! # Limits
//! Each node keeps all attachments of the routed pools in memory, and hears of every change of the store. A record that cannot
//! be read stops the feeds of all nodes until it is mended or removed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Deref;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{
    AddressSource, FabricNode, FabricSource, FabricSourceError, FabricTable, Lease, LeaseError, LeaseRequest,
};
use ipnet::IpNet;

use crate::Ipam;
use crate::config::Layout;
use crate::follow::{FAR, Follower, Replica};
use crate::ipam::{decode, store_error};
use crate::model::{Addr, NodeName, Pool};
use crate::record::{AttachmentRecord, BlockRecord, block_prefix, fabric_key, network_prefix};
use crate::store::{Batch, Entry, Guard, Key, Outcome, Write, number_of};

/// Tells which node has which prefix, whenever that has changed.
///
/// It keeps a copy of the blocks, of the nodes' records, and of the addresses of the routed pools that are in use. What it
/// tells may be a change that a loss of power undoes; the next one tells so.
///
/// ```
/// # use std::{sync::Arc, time::Duration};
/// # use dcenet_core::provider::{AddressSource, FabricSource, LeaseRequest};
/// # use dcenet_ipam::{Ipam, fabric::FabricFeed, store::memory::MemoryStore};
/// # pollster::block_on(async {
/// # let config = serde_json::from_str(
/// #     r#"{ "node": { "name": "n1" }, "pools": [ { "name": "p", "subnet": "10.20.0.0/24", "block": { "size": 64 } } ] }"#)?;
/// let ipam = Arc::new(Ipam::new(&config, Arc::new(MemoryStore::new()))?);
/// let mut feed = FabricFeed::new(ipam.clone());
/// # let attachment = serde_json::from_str(r#"{ "network": "shop", "container": "c1", "ifname": "eth0" }"#)?;
/// ipam.lease(&LeaseRequest::new(attachment)).await?;
/// let table = feed.next(Duration::ZERO).await?.expect("the first call tells what there is");
/// assert_eq!(table.prefixes[&"10.20.0.0/26".parse()?], "n1");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # }).unwrap();
/// ```
pub struct FabricFeed<I> {
    ipam: I,
    book: Book,
    follower: Follower,
    known: Option<FabricTable>,
    /// What this feed told of its node.
    announced: Option<FabricNode>,
}

impl<I> std::fmt::Debug for FabricFeed<I> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FabricFeed").field("revision", &self.follower.revision).finish_non_exhaustive()
    }
}

impl<I: Deref<Target = Ipam>> FabricFeed<I> {
    /// The first call of [`FabricSource::next`] reads the records.
    pub fn new(ipam: I) -> Self {
        let book = Book::new(ipam.layout());
        Self { ipam, book, follower: Follower::default(), known: None, announced: None }
    }

    async fn follow(&mut self, limit: Duration) -> Result<Option<FabricTable>, LeaseError> {
        // No deadline where the clock cannot express it.
        let deadline = Instant::now().checked_add(limit);
        loop {
            if self.follower.behind {
                self.follower.scan(&self.ipam, &mut self.book).await?;
            }
            self.follower.drain(&self.ipam, &mut self.book).await?;
            if self.follower.behind {
                continue;
            }
            if std::mem::take(&mut self.book.changed) || self.known.is_none() {
                let now = self.book.table();
                if self.known.as_ref() != Some(&now) {
                    self.known = Some(now.clone());
                    return Ok(Some(now));
                }
            }
            let left = deadline.map_or(FAR, |deadline| deadline.saturating_duration_since(Instant::now()));
            let Some(watch) = &mut self.follower.watch else { return Ok(None) };
            match watch.next(left).await.map_err(store_error)? {
                Some(change) => self.follower.learn(change, &self.ipam, &mut self.book)?,
                None if left.is_zero() => return Ok(None),
                None => {}
            }
        }
    }

    /// Leases an address of the first routed pool of each family.
    async fn inside(&mut self, name: &str) -> Result<Lease, LeaseError> {
        let attachment = inside_of(name)?;
        let mut pools: Vec<&Pool> = Vec::new();
        for (pool, _) in &self.book.pools {
            if pool.delegate.is_none() && pools.iter().all(|before| before.family() != pool.family()) {
                pools.push(pool);
            }
        }
        if pools.is_empty() {
            let reason = "none of those with blocks that nodes own hands out single addresses; add one".to_owned();
            return Err(LeaseError::Invalid { field: "ipam.pools".to_owned(), reason });
        }
        if let Some(held) = self.ipam.held(&attachment).await? {
            let is_of = |pool: &&Pool| held.addresses.iter().any(|a| pool.subnet.contains(&a.address.addr()));
            if pools.iter().all(is_of) && held.addresses.len() == pools.len() {
                return Ok(held);
            }
            // The pools were others.
            self.ipam.release(&attachment, held.sequence()).await?;
        }
        let pools = pools.iter().map(|pool| pool.name.clone()).collect();
        self.ipam.lease(&LeaseRequest { pools, ..LeaseRequest::new(attachment) }).await
    }

    async fn tell(&mut self, node: &FabricNode) -> Result<(), FabricSourceError> {
        let key = fabric_key(&node.name);
        for _ in 0..TRIES {
            let found = self.ipam.store().read(std::slice::from_ref(&key)).await.map_err(failed)?.pop().flatten();
            let recorded: Option<FabricNode> = match &found {
                Some(entry) => Some(decode(&key, entry).map_err(failed)?),
                None => None,
            };
            if let (Some(recorded), Some(told)) = (&recorded, &self.announced)
                && recorded != told
                && recorded != node
            {
                let (name, addresses) = (node.name.clone(), recorded.addresses.clone());
                return Err(FabricSourceError::NameTaken { name, addresses });
            }
            if recorded.as_ref() == Some(node) {
                self.announced = Some(node.clone());
                return Ok(());
            }
            let guards = vec![Guard { key: key.clone(), version: found.map(|entry| entry.version) }];
            let writes = vec![Write::Put(key.clone(), serde_json::to_vec(node).map_err(failed)?)];
            let batch = Batch { guards, writes, request_id: self.ipam.request_id() };
            match self.ipam.store().commit(&batch).await.map_err(failed)? {
                Outcome::Committed { .. } => {
                    self.announced = Some(node.clone());
                    return Ok(());
                }
                // Read once more, what came of it.
                Outcome::Conflict(_) | Outcome::Unknown { .. } => {}
            }
        }
        Err(failed(LeaseError::Busy(format!("others change the record of node {} all the time", node.name))))
    }
}

#[async_trait]
impl<I: Deref<Target = Ipam> + Send + Sync> FabricSource for FabricFeed<I> {
    async fn next(&mut self, limit: Duration) -> Result<Option<FabricTable>, FabricSourceError> {
        self.follow(limit).await.map_err(failed)
    }

    async fn announce(&mut self, node: &FabricNode) -> Result<(), FabricSourceError> {
        self.tell(node).await
    }

    async fn lease_inside(&mut self, name: &str) -> Result<Vec<IpAddr>, FabricSourceError> {
        let leased = self.inside(name).await.map_err(|error| match error {
            LeaseError::Busy(_) | LeaseError::Store(_) | LeaseError::Damaged(_) => failed(error),
            _ => FabricSourceError::Inside { name: name.to_owned(), source: Box::new(error) },
        })?;
        Ok(leased.addresses.iter().map(|leased| leased.address.addr()).collect())
    }

    async fn withdraw(&mut self, name: &str) -> Result<(), FabricSourceError> {
        let attachment = inside_of(name).map_err(failed)?;
        self.ipam.release_current(&attachment).await.map_err(failed)?;
        self.ipam.write(Write::Delete(fabric_key(name))).await.map_err(failed)?;
        self.announced = None;
        Ok(())
    }
}

/// Whether an attachment of a node holds its addresses inside: no container is behind it.
pub(crate) fn is_inside(attachment: &AttachmentKey, node: Option<&NodeName>) -> bool {
    node.is_some_and(|node| inside_of(node.as_str()).is_ok_and(|inside| inside == *attachment))
}

/// What holds the addresses of a node inside.
fn inside_of(node: &str) -> Result<AttachmentKey, LeaseError> {
    let invalid = |reason: String| LeaseError::Invalid { field: "ipam.node.name".to_owned(), reason };
    Ok(AttachmentKey {
        network: "dcenet.fabric".parse().expect("a network's name"),
        container: node.parse().map_err(|e| invalid(format!("{node:?} cannot name what holds addresses: {e}")))?,
        ifname: "vxlan".parse().expect("an interface's name"),
    })
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> FabricSourceError {
    FabricSourceError::Source(Box::new(error))
}

/// The records that say who has what, each with its version.
struct Book {
    /// Those that are routed, with the length of their blocks.
    pools: Vec<(Pool, u8)>,
    prefixes: Vec<Key>,
    /// By pool and number.
    blocks: BTreeMap<(usize, u128), (u64, String)>,
    nodes: BTreeMap<Key, (u64, FabricNode)>,
    /// Those with addresses in routed pools.
    attachments: BTreeMap<Key, (u64, Place)>,
    /// Whether the table may differ from what it was.
    changed: bool,
}

/// Where an attachment is, and with which addresses, by pool.
#[derive(PartialEq, Eq)]
struct Place {
    node: String,
    sequence: u64,
    addresses: Vec<(usize, Addr)>,
}

impl Replica for Book {
    fn prefixes(&self) -> &[Key] {
        &self.prefixes
    }

    fn reset(&mut self, found: Vec<(Key, Entry)>, _now: u64) -> Result<(), LeaseError> {
        (self.blocks, self.nodes, self.attachments) = Default::default();
        self.changed = true;
        found.into_iter().try_for_each(|(key, entry)| self.enter(key, entry.version, Some(&entry)))
    }

    fn take_in(&mut self, revision: u64, writes: Vec<(Key, Option<Entry>)>, _now: u64) -> Result<(), LeaseError> {
        writes.into_iter().try_for_each(|(key, entry)| self.enter(key, revision, entry.as_ref()))
    }
}

impl Book {
    fn new(layout: &Layout) -> Self {
        let routed = layout.pools.iter().filter_map(|pool| Some((pool.clone(), pool.node_blocks()?)));
        let pools: Vec<_> = routed.collect();
        let mut prefixes = vec![network_prefix(None), fabric_key("")];
        prefixes.extend(pools.iter().map(|(pool, _)| block_prefix(&pool.space, pool.family(), &pool.name)));
        let (blocks, nodes, attachments) = Default::default();
        Self { pools, prefixes, blocks, nodes, attachments, changed: true }
    }

    /// Enters what a key holds since a revision, unless something newer is known.
    fn enter(&mut self, key: Key, revision: u64, entry: Option<&Entry>) -> Result<(), LeaseError> {
        match key.first() {
            Some(b'b') => {
                let of = |(i, (pool, _)): (usize, &(Pool, u8))| {
                    Some((i, number_of(&block_prefix(&pool.space, pool.family(), &pool.name), &key).ok()?))
                };
                let Some(place) = self.pools.iter().enumerate().find_map(of) else { return Ok(()) };
                let owner =
                    entry.map(|entry| decode::<BlockRecord>(&key, entry)).transpose()?.map(|record| record.node);
                self.changed |= set(&mut self.blocks, place, revision, owner);
            }
            Some(b'v') => {
                let node = entry.map(|entry| decode::<FabricNode>(&key, entry)).transpose()?;
                self.changed |= set(&mut self.nodes, key, revision, node);
            }
            Some(b't') => {
                let place = match entry {
                    Some(entry) => self.place_of(&decode(&key, entry)?, entry.version),
                    None => None,
                };
                // Most addresses are in the blocks of their nodes, and no prefixes of their own.
                let strays =
                    |book: &Self, place: &Place| place.addresses.iter().any(|a| book.is_stray(&place.node, *a));
                let before = self.attachments.get(&key).is_some_and(|(_, place)| strays(self, place));
                let after = place.as_ref().is_some_and(|place| strays(self, place));
                self.changed |= set(&mut self.attachments, key, revision, place) && (before || after);
            }
            _ => {}
        }
        Ok(())
    }

    /// `None` for what has no address in a routed pool, or is on no node that is known.
    fn place_of(&self, record: &AttachmentRecord, version: u64) -> Option<Place> {
        let routed = record.addresses.iter().filter_map(|held| {
            let (space, address) = held.slot()?;
            let pool = self.pools.iter().position(|(p, _)| p.space == space && p.subnet.contains(&address.ip()))?;
            Some((pool, address))
        });
        let addresses: Vec<_> = routed.collect();
        let node = record.node.as_ref()?.to_string();
        (!addresses.is_empty()).then(|| Place { node, sequence: record.sequence(version), addresses })
    }

    /// Whether an address is in no block of the node that has it.
    fn is_stray(&self, node: &str, (pool, address): (usize, Addr)) -> bool {
        let shift = u32::from(address.family.bits() - self.pools[pool].1);
        self.blocks.get(&(pool, address.bits >> shift)).is_none_or(|(_, owner)| owner != node)
    }

    fn table(&self) -> FabricTable {
        let mut table = FabricTable {
            nodes: self.nodes.values().map(|(_, node)| (node.name.clone(), node.clone())).collect(),
            pools: self.pools.iter().map(|(pool, _)| pool.subnet.trunc()).collect::<BTreeSet<IpNet>>(),
            prefixes: BTreeMap::new(),
        };
        for ((pool, number), (_, owner)) in &self.blocks {
            let (pool, length) = &self.pools[*pool];
            let (first, _) = pool.block_range(*length, *number);
            let first = Addr { family: pool.family(), bits: first }.ip();
            table.prefixes.extend(IpNet::new(first, *length).map(|prefix| (prefix, owner.clone())));
        }
        // While an address is handed over two have it, and it is the elder's until that is completed.
        let mut elders: BTreeMap<IpNet, u64> = BTreeMap::new();
        for (_, place) in self.attachments.values() {
            for (pool, address) in place.addresses.iter().filter(|a| self.is_stray(&place.node, **a)) {
                debug_assert!(self.pools[*pool].0.subnet.contains(&address.ip()));
                let prefix = IpNet::from(address.ip());
                if elders.get(&prefix).is_none_or(|elder| place.sequence < *elder) {
                    elders.insert(prefix, place.sequence);
                    table.prefixes.insert(prefix, place.node.clone());
                }
            }
        }
        table
    }
}

/// Sets or removes what is known of a key, unless something as new is known. Returns whether it differs.
fn set<K: Ord, V: PartialEq>(map: &mut BTreeMap<K, (u64, V)>, key: K, revision: u64, value: Option<V>) -> bool {
    match (map.get_mut(&key), value) {
        (Some((known, _)), _) if *known >= revision => false,
        (Some(known), Some(value)) => {
            let differs = known.1 != value;
            *known = (revision, value);
            differs
        }
        (Some(_), None) => map.remove(&key).is_some(),
        (None, Some(value)) => map.insert(key, (revision, value)).is_none(),
        (None, None) => false,
    }
}

/// Attempts to write a record that others change.
const TRIES: usize = 8;
