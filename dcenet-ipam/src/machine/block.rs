//! Blocks: parts of a pool that a node owns, so that one route leads to many of its addresses; or an application, so that
//! one rule of a firewall does.
//!
//! Ownership is where a node looks first, and never what makes an address unique: that is the slot's guard. A block is
//! claimed in the batch of the first lease from it, guarded by the absence of its record. A lease from an owned block
//! guards the block's record, so that a block which is being given up takes no new address:
//!
//! ```text
//!   absent --lease--> owned --close--> closing --settle, nothing in use--> absent
//!                       ^------------------------settle, in use-----'
//! ```
//!
//! An application's block is more: whatever takes an address of such a pool, also a claim or who asks for that one, does
//! so together with the block ([`Work::own_block`]), which nobody else can then have.

use dcenet_core::model::Workload;
use dcenet_core::provider::LeaseError;

use super::lease::PAGE;
use super::{Aside, Draft, Halt, Reply, Step, Work};
use crate::groups::Grouping;
use crate::model::{Addr, AddressSpace, BlockOwner, Blocks, ClaimKey, Family, Interval, Intervals, Pool};
use crate::record::{
    BlockRecord, SlotRecord, block_prefix, block_queue, freed_prefix, owned_prefix, slot_key, slot_prefix,
};
use crate::store::{Key, Write, number_of, numbered};

impl Work<'_> {
    /// An address for the node or application: from its blocks, else from a new one, else borrowed.
    pub(super) fn search_blocks(&self, pool: &Pool, blocks: Blocks) -> Result<Option<Addr>, Halt> {
        let application = self.application.borrow();
        let owner = match blocks.owner {
            BlockOwner::Application => application.as_deref(),
            BlockOwner::Node => self.layout.node.as_ref().map(|n| n.name.as_str()),
        };
        // A tool that records a claim is on no node, and a probe is for nobody.
        let Some(node) = owner else { return self.search_all(pool) };
        let own = self.owned_blocks(pool, node)?;
        let mut open = Vec::with_capacity(own.len());
        for block in own {
            let (low, high) = pool.block_range(blocks.length, block);
            let free = pool.free.within(low, high);
            if free.size() == 0 {
                continue;
            }
            if let Some(address) = self.unused(pool, &free)?
                && self.lean_on(pool, block, node)?
            {
                return Ok(Some(address));
            }
            open.push((block, free));
        }
        // What rests in one that is being given up must not stand before what rests in the others.
        self.need(&open.iter().map(|(block, _)| block_key(pool, *block)).collect::<Vec<_>>())?;
        let mut closing = Vec::new();
        for (block, _) in &open {
            if self.owned_as(pool, *block, node)?.is_none() {
                closing.push(*block);
            }
        }
        open.retain(|(block, _)| !closing.contains(block));
        if let Some((block, address)) = self.oldest_of(pool, &open)?
            && self.lean_on(pool, block, node)?
        {
            return Ok(Some(address));
        }
        // Where nobody borrows, nobody else finds what has ended in them.
        if !blocks.borrow && !open.is_empty() {
            let free = Intervals::new(open.iter().flat_map(|(_, free)| free.iter()).collect());
            if let Some(address) = self.pick_ended(pool, &free)?
                && self.lean_on(pool, address.bits >> shift_of(pool, blocks), node)?
            {
                return Ok(Some(address));
            }
        }
        if let Some(address) = self.claim_block(pool, blocks, node)? {
            return Ok(Some(address));
        }
        if blocks.borrow { self.search_all(pool) } else { Ok(None) }
    }

    fn owned_blocks(&self, pool: &Pool, node: &str) -> Result<Vec<u128>, Halt> {
        let prefix = owned_prefix(&pool.space, pool.family(), &pool.name, node);
        let (mut own, mut after) = (Vec::new(), None);
        loop {
            let page = self.scan(&prefix, after, PAGE)?;
            own.extend(page.iter().filter_map(|key| number_of(&prefix, key).ok()));
            match page.last() {
                Some(last) if page.len() == PAGE => after = Some(last.clone()),
                _ => return Ok(own),
            }
        }
    }

    /// Rests the decision on the node's owning the block. Returns whether it does and may take from it.
    fn lean_on(&self, pool: &Pool, block: u128, node: &str) -> Result<bool, Halt> {
        let version = self.owned_as(pool, block, node)?;
        if version.is_some() {
            self.set_aside(Aside { guard: block_key(pool, block), version, puts: Vec::new() });
        }
        Ok(version.is_some())
    }

    /// The version of the block's record if the node owns it and may take from it.
    fn owned_as(&self, pool: &Pool, block: u128, node: &str) -> Result<Option<u64>, Halt> {
        let record = self.record::<BlockRecord>(&block_key(pool, block))?;
        Ok(record.filter(|(record, _)| record.node == node && !record.closing).map(|(_, version)| version))
    }

    /// Of what was released in the blocks, the oldest.
    fn oldest_of(&self, pool: &Pool, blocks: &[(u128, Intervals)]) -> Result<Option<(u128, Addr)>, Halt> {
        let mut oldest: Option<(u64, u128, Addr)> = None;
        for (block, free) in blocks {
            // Also what was released before the pool had blocks.
            for queue in [block_queue(&pool.name, *block), pool.name.clone()] {
                let prefix = freed_prefix(&pool.space, pool.family(), &queue);
                if let Some((at, address)) = self.oldest_freed(pool, &prefix, free)?
                    && oldest.is_none_or(|(before, ..)| at < before)
                {
                    oldest = Some((at, *block, address));
                }
            }
        }
        Ok(oldest.map(|(_, block, address)| (block, address)))
    }

    /// Takes a block that nobody owns and that has an address left.
    fn claim_block(&self, pool: &Pool, blocks: Blocks, node: &str) -> Result<Option<Addr>, Halt> {
        let shift = shift_of(pool, blocks);
        let prefix = block_prefix(&pool.space, pool.family(), &pool.name);
        let mut numbers = Intervals::new(pool.free.iter().map(|(low, high)| (low >> shift, high >> shift)).collect());
        // Blocks that nobody owns can be full of what was borrowed. Where anybody may borrow, the search of the whole pool
        // finds an address sooner.
        let tries = if blocks.borrow { TRIES } else { usize::MAX };
        for _ in 0..tries {
            let Some(block) = self.first_free(&prefix, &numbers, |_| Ok(None))? else { break };
            let (low, high) = pool.block_range(blocks.length, block);
            let free = pool.free.within(low, high);
            numbers = numbers.without(&Intervals::new(vec![(block, block)]));
            if blocks.owner == BlockOwner::Application && self.user_in(pool, (low, high))?.is_some() {
                continue;
            }
            let mut found = self.unused(pool, &free)?;
            if found.is_none() {
                found = self.oldest_of(pool, &[(block, free.clone())])?.map(|(_, address)| address);
            }
            if found.is_none() && !blocks.borrow {
                found = self.pick_ended(pool, &free)?;
            }
            if let Some(address) = found {
                // An application's goes with the address, however that was found.
                if blocks.owner == BlockOwner::Node {
                    let puts = claim_writes(pool, block, node);
                    self.set_aside(Aside { guard: numbered(&prefix, block), version: None, puts });
                }
                return Ok(Some(address));
            }
        }
        Ok(None)
    }

    /// Says whom an address is looked for or taken.
    pub(super) fn ask_for(&self, workload: Option<&Workload>, claim: Option<&ClaimKey>) {
        // Nobody pays for the name where no pool asks for it.
        let asked = |pool: &Pool| pool.block.is_some_and(|blocks| blocks.owner == BlockOwner::Application);
        let known = (workload.is_some() || claim.is_some()) && self.layout.pools.iter().any(asked);
        let name = known.then(|| Grouping::default().group(self.layout, workload, claim, None).to_string());
        *self.application.borrow_mut() = name;
    }

    /// Rests the taking of an address on its block being the application's, where its pool's blocks are of applications,
    /// and takes the block with it if it is nobody's.
    pub(super) fn own_block(&self, draft: &mut Draft, space: &AddressSpace, address: Addr) -> Result<(), Halt> {
        let Some(pool) = self.pool_of(space, address) else { return Ok(()) };
        let Some(blocks) = pool.block.filter(|blocks| blocks.owner == BlockOwner::Application) else { return Ok(()) };
        let application = self.application.borrow();
        let Some(application) = application.as_deref() else { return Err(no_application(pool).into()) };
        let refuse = |holder: String| Err(LeaseError::Held { address: address.ip(), holder }.into());
        let block = address.bits >> shift_of(pool, blocks);
        let key = block_key(pool, block);
        match self.record::<BlockRecord>(&key)? {
            Some((record, version)) if record.node == application => {
                draft.guard(&key, Some(version));
                // Whoever gives it up finds it changed.
                if record.closing {
                    draft.put(key, &BlockRecord { closing: false, ..record });
                }
                Ok(())
            }
            Some((record, _)) => refuse(format!("application {}, whose block it is in", record.node)),
            None => {
                if let Some(user) = self.user_in(pool, pool.block_range(blocks.length, block))? {
                    return refuse(format!("nobody, but {user} has an address of its block from before"));
                }
                draft.guard(&key, None);
                draft
                    .batch
                    .writes
                    .extend(claim_writes(pool, block, application).into_iter().map(|(k, v)| Write::Put(k, v)));
                Ok(())
            }
        }
    }

    /// Who uses or keeps an address of a block that nobody owns, as from before the pool had blocks of applications.
    fn user_in(&self, pool: &Pool, range: Interval) -> Result<Option<String>, Halt> {
        let in_use = |slot: &SlotRecord| match slot {
            SlotRecord::Freed { .. } | SlotRecord::Quarantined { claim: None, .. } => false,
            slot => !self.has_ended_for(slot, None),
        };
        let found = self.first_slot(&pool.space, pool.family(), range, in_use)?;
        Ok(found.map(|(_, slot)| match (slot.holder(), slot.claim()) {
            (Some(by), _) => format!("attachment {by}"),
            (None, Some(claim)) => format!("claim {claim}"),
            (None, None) => "quarantine".to_owned(),
        }))
    }

    /// The queue that a release of the address goes to.
    pub(super) fn queue_of(&self, space: &AddressSpace, address: Addr, pool: &str) -> String {
        let owner = self.layout.pools.iter().find(|p| p.name == pool && p.space == *space);
        match owner.and_then(|p| p.block).filter(|_| owner.is_some_and(|p| p.family() == address.family)) {
            Some(blocks) => block_queue(pool, address.bits >> (address.family.bits() - blocks.length)),
            None => pool.to_owned(),
        }
    }

    /// Ends the taking of new addresses from a block.
    pub(super) fn close_block(&self, pool: &str, block: u128, node: &str) -> Result<Step, Halt> {
        let Some((pool, _)) = self.block_pool(pool) else { return Ok(Step::Done(Reply::NotHeld)) };
        let key = numbered(&block_prefix(&pool.space, pool.family(), &pool.name), block);
        let mut draft = Draft::default();
        match self.record::<BlockRecord>(&key)? {
            Some((record, version)) if record.node == node => {
                draft.guard(&key, Some(version));
                draft.put(key, &BlockRecord { closing: true, ..record });
                Ok(draft.commit(Reply::Done))
            }
            _ => Ok(Step::Done(Reply::NotHeld)),
        }
    }

    /// Gives a closed block up if nothing of it is in use, and opens it again if something is.
    pub(super) fn settle_block(&self, pool: &str, block: u128, node: &str) -> Result<Step, Halt> {
        let Some((pool, blocks)) = self.block_pool(pool) else { return Ok(Step::Done(Reply::NotHeld)) };
        let key = numbered(&block_prefix(&pool.space, pool.family(), &pool.name), block);
        let (record, version) = match self.record::<BlockRecord>(&key)? {
            Some((record, version)) if record.node == node && record.closing => (record, version),
            _ => return Ok(Step::Done(Reply::NotHeld)),
        };
        let mut draft = Draft::default();
        draft.guard(&key, Some(version));
        let range = pool.block_range(blocks.length, block);
        if self.first_in_use(&pool.space, pool.family(), range)?.is_some() {
            draft.put(key, &BlockRecord { closing: false, ..record });
            return Ok(draft.commit(Reply::NotHeld));
        }
        draft.delete(numbered(&owned_prefix(&pool.space, pool.family(), &pool.name, node), block));
        draft.delete(key);
        Ok(draft.commit(Reply::Done))
    }

    fn block_pool(&self, pool: &str) -> Option<(&Pool, Blocks)> {
        self.layout.pools.iter().find(|p| p.name == pool).and_then(|p| Some((p, p.block?)))
    }

    /// The first address of the interval that is used, kept or in quarantine.
    pub(super) fn first_in_use(
        &self,
        space: &AddressSpace,
        family: Family,
        range: Interval,
    ) -> Result<Option<(Addr, SlotRecord)>, Halt> {
        self.first_slot(space, family, range, |slot| !matches!(slot, SlotRecord::Freed { .. }))
    }

    /// The first address of the interval whose slot is such.
    fn first_slot(
        &self,
        space: &AddressSpace,
        family: Family,
        (low, high): Interval,
        such: impl Fn(&SlotRecord) -> bool,
    ) -> Result<Option<(Addr, SlotRecord)>, Halt> {
        let prefix = slot_prefix(space, family);
        let mut after: Option<Key> = low.checked_sub(1).map(|below| numbered(&prefix, below));
        loop {
            let page = self.scan(&prefix, after, PAGE)?;
            let inside: Vec<Addr> = page
                .iter()
                .filter_map(|key| number_of(&prefix, key).ok())
                .take_while(|bits| *bits <= high)
                .map(|bits| Addr { family, bits })
                .collect();
            let keys: Vec<Key> = inside.iter().map(|address| slot_key(space, *address)).collect();
            self.need(&keys)?;
            for (address, key) in inside.iter().zip(&keys) {
                if let Some((slot, _)) = self.record::<SlotRecord>(key)?.filter(|(slot, _)| such(slot)) {
                    return Ok(Some((*address, slot)));
                }
            }
            match page.last() {
                Some(last) if page.len() == PAGE && inside.len() == PAGE => after = Some(last.clone()),
                _ => return Ok(None),
            }
        }
    }
}

/// The key of a block's record.
fn block_key(pool: &Pool, block: u128) -> Key {
    numbered(&block_prefix(&pool.space, pool.family(), &pool.name), block)
}

/// What makes a block somebody's.
fn claim_writes(pool: &Pool, block: u128, owner: &str) -> Vec<(Key, Vec<u8>)> {
    let record = BlockRecord { node: owner.to_owned(), closing: false };
    let value = serde_json::to_vec(&record).expect("a name and a flag serialise");
    let row = numbered(&owned_prefix(&pool.space, pool.family(), &pool.name, owner), block);
    vec![(block_key(pool, block), value), (row, Vec::new())]
}

fn no_application(pool: &Pool) -> LeaseError {
    let reason = format!(
        "pool {} gives each application blocks of its own, and the request names no workload; name it, as shop/db-0, or \
         give it another pool",
        pool.name
    );
    LeaseError::Invalid { field: "workload".to_owned(), reason }
}

/// How far an address is shifted to become the number of its block.
fn shift_of(pool: &Pool, blocks: Blocks) -> u32 {
    u32::from(pool.family().bits() - blocks.length)
}

/// When and which address, of a key in the queue of any block of the pool.
pub(super) fn freed_in_block(prefix: &[u8], key: &[u8]) -> Option<(u64, u128)> {
    let rest = key.strip_prefix(prefix)?;
    let queue = rest.iter().position(|b| *b == b'/')?;
    crate::record::freed_of(&rest[..=queue], rest)
}

/// Before the keys in the queues of all blocks of the pool.
pub(super) fn freed_in_blocks_prefix(space: &AddressSpace, family: Family, pool: &str) -> Key {
    let mut prefix = freed_prefix(space, family, pool);
    prefix.pop();
    prefix.push(b'@');
    prefix
}

/// Blocks without an address that are looked at before an address is borrowed.
const TRIES: usize = 16;
