//! What tools ask about pools: blocks, reservations, what stands outside.

use dcenet_core::provider::LeaseError;
use ipnet::IpNet;

use super::{Ipam, decode, store_error};
use crate::config::{AddressRange, ConfigError};
use crate::machine::{Command, Reply};
use crate::model::{Addr, AddressSpace, Binding, BlockOwner, Family, Pool};
use crate::record::{
    BlockRecord, ReservationRecord, SlotRecord, SpaceRecord, block_prefix, reservation_of, reservation_prefix,
    slot_prefix, space_key,
};
use crate::store::{Key, number_of, numbered};

/// A part of a pool that a node or an application owns: a route for the prefix belongs to that node, and a firewall's rule
/// for it to that application.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedBlock {
    /// The space.
    pub space: AddressSpace,
    /// The pool.
    pub pool: String,
    /// The block.
    pub prefix: IpNet,
    /// Who owns it: the name of the node, or the application as `NAMESPACE/NAME`.
    pub owner: String,
    /// Whether it is being given up: somebody stopped between closing and deciding, and the next call decides.
    pub closing: bool,
}

/// Addresses that somebody outside uses, as recorded in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// The space.
    pub space: AddressSpace,
    /// The addresses.
    pub range: AddressRange,
    /// Who uses them.
    pub holder: String,
}

impl Ipam {
    /// Who owns which blocks of the configuration's pools, in order of address.
    pub async fn blocks(&self) -> Result<Vec<OwnedBlock>, LeaseError> {
        let mut all = Vec::new();
        for pool in &self.layout.pools {
            let Some(blocks) = pool.block else { continue };
            let prefix = block_prefix(&pool.space, pool.family(), &pool.name);
            for (key, entry) in self.scan_all(&prefix).await? {
                let BlockRecord { node: owner, closing } = decode(&key, &entry)?;
                let (first, _) = pool.block_range(blocks.length, number_of(&prefix, &key).map_err(store_error)?);
                let first = Addr { family: pool.family(), bits: first }.ip();
                let block = IpNet::new(first, blocks.length).map_err(|e| LeaseError::Damaged(Box::new(e)))?;
                let (space, pool) = (pool.space.clone(), pool.name.clone());
                all.push(OwnedBlock { space, pool, prefix: block, owner, closing });
            }
        }
        Ok(all)
    }

    /// Gives back the blocks of this allocator's node, and of all applications, of which no address is in use or kept, and
    /// returns them. While one is looked over nothing new is taken from it.
    ///
    /// # Errors
    /// [`LeaseError::Invalid`] where nodes own blocks and the node is not known.
    pub async fn release_empty_blocks(&self) -> Result<Vec<OwnedBlock>, LeaseError> {
        let node = self.layout.node.as_ref().map(|node| node.name.as_str());
        let of_nodes = |pool: &Pool| pool.block.is_some_and(|blocks| blocks.owner == BlockOwner::Node);
        if node.is_none()
            && (self.layout.pools.iter().any(of_nodes) || self.layout.pools.iter().all(|p| p.block.is_none()))
        {
            let reason = "the node whose blocks are meant is not known; name it".to_owned();
            return Err(LeaseError::Invalid { field: "ipam.node".to_owned(), reason });
        }
        // Which of them is on which node is of no matter: an application is wherever its pods are.
        self.release_blocks(|block| Some(block.owner.as_str()) == node || block.owner.contains('/')).await
    }

    /// The same for the blocks of another node, which is dead or has left, or for those of one application. Also right if it
    /// lives: it takes a block again when it needs one.
    pub async fn reclaim_blocks(&self, owner: &str) -> Result<Vec<OwnedBlock>, LeaseError> {
        self.release_blocks(|block| block.owner == owner).await
    }

    async fn release_blocks(&self, which: impl Fn(&OwnedBlock) -> bool) -> Result<Vec<OwnedBlock>, LeaseError> {
        let mut released = Vec::new();
        for block in self.blocks().await?.into_iter().filter(|b| which(b)) {
            let shift = Family::of(&block.prefix).bits() - block.prefix.prefix_len();
            let number = Addr::from(block.prefix.network()).bits >> shift;
            let (pool, node) = (block.pool.clone(), block.owner.clone());
            let close = Command::CloseBlock { pool: pool.clone(), block: number, node: node.clone() };
            let settle = Command::SettleBlock { pool, block: number, node };
            if self.run(&close).await? == Reply::Done && self.run(&settle).await? == Reply::Done {
                released.push(block);
            }
        }
        Ok(released)
    }

    /// Records that somebody outside uses the addresses, such as a router or a firewall: no configuration that shares the
    /// store hands them out, and who asks for one is told the holder. Returns whether that is new. They need not be in a
    /// pool.
    ///
    /// # Errors
    /// [`LeaseError::Held`] with the holder if one of the addresses is in use, kept by a claim or reserved otherwise;
    /// [`LeaseError::Invalid`] if the range is none or the holder has no name. The store lacking, the reservation may be
    /// recorded although it was not looked over: repeat the call. A reservation that stood before the call stands after
    /// it, also if an address of it turns out to be in use: whoever wants that takes it back.
    pub async fn reserve_external(
        &self,
        space: &AddressSpace,
        range: AddressRange,
        holder: &str,
    ) -> Result<bool, LeaseError> {
        if holder.is_empty() {
            let reason = "nobody could be told whose the addresses are; name the holder".to_owned();
            return Err(LeaseError::Invalid { field: "holder".to_owned(), reason });
        }
        let (first, last) = ends(&range)?;
        let hold = Command::Hold { space: space.clone(), first, last, holder: holder.to_owned() };
        let new = self.run(&hold).await? == Reply::Done;
        // Nothing is taken of it from here on; what was taken before is seen.
        if let Some((address, user)) = self.user_of(space, first, last).await? {
            if !new {
                return Err(LeaseError::Held { address: address.ip(), holder: user });
            }
            let unhold = Command::Unhold { space: space.clone(), first, last, holder: holder.to_owned() };
            self.run(&unhold).await?;
            return Err(LeaseError::Held { address: address.ip(), holder: user });
        }
        Ok(new)
    }

    /// Takes back what [`Ipam::reserve_external`] recorded for the same range and holder. Returns whether there was such a
    /// reservation.
    ///
    /// # Errors
    /// [`LeaseError::Held`] if the range is another holder's.
    pub async fn unreserve_external(
        &self,
        space: &AddressSpace,
        range: AddressRange,
        holder: &str,
    ) -> Result<bool, LeaseError> {
        let (first, last) = ends(&range)?;
        let unhold = Command::Unhold { space: space.clone(), first, last, holder: holder.to_owned() };
        Ok(self.run(&unhold).await? == Reply::Done)
    }

    /// The recorded reservations of a space, in order of address.
    pub async fn reservations(&self, space: &AddressSpace) -> Result<Vec<Reservation>, LeaseError> {
        let mut all = Vec::new();
        for family in [Family::V4, Family::V6] {
            let prefix = reservation_prefix(space, family);
            for (key, entry) in self.scan_all(&prefix).await? {
                let Some((first, last)) = reservation_of(&prefix, &key) else { continue };
                let ReservationRecord { holder } = decode(&key, &entry)?;
                let ip = |bits| Addr { family, bits }.ip();
                let range = AddressRange { first: ip(first), last: ip(last) };
                all.push(Reservation { space: space.clone(), range, holder });
            }
        }
        Ok(all)
    }

    /// Who uses an address of the range, or a delegated prefix with a part of it.
    async fn user_of(
        &self,
        space: &AddressSpace,
        first: Addr,
        last: Addr,
    ) -> Result<Option<(Addr, String)>, LeaseError> {
        let prefix = slot_prefix(space, first.family);
        let mut after: Option<Key> =
            self.prefix_of(space, first).await?.checked_sub(1).map(|below| numbered(&prefix, below));
        loop {
            let page = self.store.scan(&prefix, after.as_deref(), super::PAGE).await.map_err(store_error)?;
            for (key, entry) in &page {
                let address = Addr { family: first.family, bits: number_of(&prefix, key).map_err(store_error)? };
                if address > last {
                    return Ok(None);
                }
                match decode(key, entry)? {
                    // Nobody uses what is in quarantine, and it goes on being nobody's.
                    SlotRecord::Freed { .. } | SlotRecord::Quarantined { .. } => {}
                    SlotRecord::Bound { by, .. } | SlotRecord::Handover { by, .. } => {
                        return Ok(Some((address, format!("attachment {by}"))));
                    }
                    SlotRecord::Kept { claim, .. } => return Ok(Some((address, format!("claim {claim}")))),
                }
            }
            match page.last() {
                Some((last, _)) if page.len() == super::PAGE => after = Some(last.clone()),
                _ => return Ok(None),
            }
        }
    }

    /// Where what holds the address begins: the address, or its delegated prefix, also one of a pool that only other
    /// configurations know.
    async fn prefix_of(&self, space: &AddressSpace, address: Addr) -> Result<u128, LeaseError> {
        let key = space_key(space);
        let Some(entry) = self.store.read(std::slice::from_ref(&key)).await.map_err(store_error)?.remove(0) else {
            return Ok(address.bits);
        };
        let record: SpaceRecord = decode(&key, &entry)?;
        let length = record.pools.iter().find(|p| p.subnet.contains(&address.ip())).and_then(|p| p.delegate);
        let shift = length.map_or(0, |length| address.family.bits() - length);
        Ok(address.bits >> shift << shift)
    }

    /// What stands although its pool does not hand it out any more, since the pool was shrunk or renumbered: it stays
    /// valid until it is released.
    pub async fn outside(&self) -> Result<Vec<Binding>, LeaseError> {
        let bindings = self.bindings(None).await?;
        let stands_outside = |binding: &Binding| {
            let pool = self.layout.pools.iter().find(|p| p.name == binding.pool && p.space == binding.space);
            pool.is_some_and(|pool| !pool.has(Addr::from(binding.address.addr())))
        };
        Ok(bindings.into_iter().filter(stands_outside).collect())
    }
}

fn ends(range: &AddressRange) -> Result<(Addr, Addr), LeaseError> {
    range.ends().map_err(|fault| ConfigError { field: "range".to_owned(), value: range.to_string(), fault }.into())
}
