//! Taking over what another allocator handed out and what is in use already.

use std::net::IpAddr;

use dcenet_core::model::{AttachmentKey, Workload};
use dcenet_core::provider::LeaseError;
use serde::{Deserialize, Serialize};

use super::claim::{refuse_away, serves};
use super::lease::{Entitlement, held, invalid_request};
use super::{Draft, Halt, Reply, Step, Work};
use crate::model::{Addr, AddressSpace, Claim, ClaimKey, KeepPolicy, Members, NodeName, Pool};
use crate::record::{
    AttachmentRecord, ClaimRecord, EventKind, SlotRecord, attachment_key, claim_key, slot_key, space_key,
};
use crate::store::Key;

/// An owner under another allocator with all that it has there; it is taken over as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adoptee {
    /// What it becomes.
    pub by: AdoptedBy,
    /// The routing domain of its addresses.
    pub space: AddressSpace,
    /// Its addresses, at most one of a pool.
    pub addresses: Vec<AdoptedAddress>,
    /// The revision of the store when the other allocator was read: what was used and released here since is not taken,
    /// for what was read is out of date by then.
    pub fence: u64,
}

/// What the owner of adopted addresses becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum AdoptedBy {
    /// An attachment with a lease: DEL of its container releases it, and so do GC and reclaim.
    Attachment {
        /// Its key. DEL and ADD must name the same network.
        attachment: AttachmentKey,
        /// The workload behind, where known. Of its claims, that with the adopted address counts.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        workload: Option<Workload>,
        /// The node that it is on, where known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        node: Option<NodeName>,
    },
    /// A claim that keeps the address, for no container is known that a DEL could name: the next ADD of the workload gets
    /// the address, and what ends the claim frees it.
    Claim {
        /// Its key.
        claim: ClaimKey,
        /// What it keeps; a time begins with the adoption, for nothing is attached here.
        keep: KeepPolicy,
    },
}

/// An address that is taken over.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdoptedAddress {
    /// The address.
    pub address: IpAddr,
    /// The pool of the configuration that it is in.
    pub pool: String,
}

#[cfg(feature = "adopt")]
impl super::View {
    /// What is known of a key: nothing, that it is absent, or its entry.
    pub(crate) fn known(&self, key: &[u8]) -> Option<Option<&crate::store::Entry>> {
        self.keys.get(key).map(Option::as_ref)
    }
}

impl Work<'_> {
    pub(super) fn take_over(&self, adoptee: &Adoptee) -> Result<Step, Halt> {
        let Adoptee { by, space, addresses, fence } = adoptee;
        let mut places = Vec::with_capacity(addresses.len());
        for AdoptedAddress { address, pool } in addresses {
            places.push((self.adoptive_pool(space, pool, Addr::from(*address))?, Addr::from(*address)));
        }
        match by {
            AdoptedBy::Attachment { attachment, workload, node } => {
                let mut keys = vec![attachment_key(attachment)];
                for (pool, address) in &places {
                    keys.extend([slot_key(space, *address)].into_iter().chain(own_claims(pool, workload, attachment)));
                }
                self.need(keys.iter().chain(&self.spaces().into_iter().map(space_key).collect::<Vec<_>>()))?;
                self.take_over_attachment(attachment, workload.as_ref(), node.as_ref(), &places, *fence)
            }
            AdoptedBy::Claim { claim, keep } => match places[..] {
                [(pool, address)] => self.take_over_claim(claim, *keep, pool, address, *fence),
                _ => {
                    let reason = format!("{} for one claim; it keeps one", places.len());
                    Err(LeaseError::Invalid { field: "addresses".to_owned(), reason }.into())
                }
            },
        }
    }

    fn take_over_attachment(
        &self,
        attachment: &AttachmentKey,
        workload: Option<&Workload>,
        node: Option<&NodeName>,
        places: &[(&Pool, Addr)],
        fence: u64,
    ) -> Result<Step, Halt> {
        let own_key = attachment_key(attachment);
        if let Some((record, _)) = self.record::<AttachmentRecord>(&own_key)? {
            let has = |pool: &Pool, address| {
                record.addresses.iter().any(|held| held.slot() == Some((pool.space.clone(), address)))
            };
            return match places.iter().find(|(pool, address)| !has(pool, *address)) {
                None => Ok(Step::Done(Reply::Done)),
                Some((_, address)) => {
                    let has: Vec<String> =
                        record.addresses.iter().map(|held| held.address.addr().to_string()).collect();
                    let holder = format!("nobody, but {attachment} has a lease of {}", has.join(" and "));
                    Err(LeaseError::Held { address: address.ip(), holder }.into())
                }
            };
        }
        let mut draft = Draft::default();
        draft.guard(&own_key, None);
        let mut addresses = Vec::with_capacity(places.len());
        for &(pool, address) in places {
            self.refuse_beforehand(pool, address, Some(attachment), fence)?;
            let claim = self.claim_over(pool, address, workload, attachment)?;
            let key = claim.as_ref().map(|claim| claim.key.clone());
            let slot = SlotRecord::Bound { by: attachment.clone(), claim: key.clone() };
            self.ask_for(workload, key.as_ref());
            self.take(&mut draft, &pool.space, address, &slot, key.as_ref())?;
            if let Some(claim) = &claim
                && self.settle_claim(&mut draft, claim, None)? != address
            {
                return Err(Halt::Stale);
            }
            self.note(&mut draft, &pool.space, address, EventKind::Bound, Some(attachment), workload);
            addresses.push(held(pool, address));
        }
        self.guard_registration(&mut draft)?;
        addresses.sort_by_key(|held| self.layout.pools.iter().position(|p| p.name == held.pool));
        let (workload, node) = (workload.cloned(), node.cloned());
        draft.put(own_key, &AttachmentRecord { workload, addresses, mac: None, node, sequence: None });
        Ok(draft.commit(Reply::Done))
    }

    fn take_over_claim(
        &self,
        claim: &ClaimKey,
        keep: KeepPolicy,
        pool: &Pool,
        address: Addr,
        fence: u64,
    ) -> Result<Step, Halt> {
        let (key, slot) = (claim_key(&pool.space, address.family, claim), slot_key(&pool.space, address));
        self.need([&space_key(&pool.space), &key, &slot])?;
        if let Some((record, _)) = self.record::<ClaimRecord>(&key)? {
            refuse_away(claim, &record)?;
            if Addr::from(record.address) != address {
                let holder = format!("nobody, but the claim {claim} has {}", record.address);
                return Err(LeaseError::Held { address: address.ip(), holder }.into());
            }
            if self.record::<SlotRecord>(&slot)?.is_some_and(|(slot, _)| slot.claim() == Some(claim)) {
                return Ok(Step::Done(Reply::Done));
            }
        }
        self.refuse_beforehand(pool, address, None, fence)?;
        let written = pool.claims.iter().find(|c| c.key == *claim);
        if let Some(fixed) = written.and_then(|c| c.address).filter(|fixed| *fixed != address) {
            let holder = format!("nobody, but the configuration gives the claim {claim} {fixed}");
            return Err(LeaseError::Held { address: address.ip(), holder }.into());
        }
        refuse_fixed(pool, address, |c| c.key == *claim)?;
        let own = written.filter(|c| c.keep != KeepPolicy::Ephemeral);
        let (keep, mac) = own.map_or((keep, None), |c| (c.keep, c.mac));
        let wish = Claim { key: claim.clone(), address: Some(address), keep, mac };
        let step = self.record_claim(&pool.name, &wish, true)?;
        // What is recorded guards the record of the space already, at the version that is looked at here.
        self.guard_registration(&mut Draft::default())?;
        Ok(step)
    }

    /// The pool that an address is to be in.
    fn adoptive_pool(&self, space: &AddressSpace, name: &str, address: Addr) -> Result<&Pool, Halt> {
        let pool = self.pool_of(space, address).filter(|pool| pool.name == name);
        let Some(pool) = pool else {
            return Err(invalid_request(address.ip(), &format!("not in pool {name} of space {space}")));
        };
        if pool.delegate.is_some() {
            let reason = format!("pool {name} delegates prefixes; adopt addresses into one that does not");
            return Err(invalid_request(address.ip(), &reason));
        }
        self.allow(pool, address)?;
        Ok(pool)
    }

    /// Refuses what taking the address would not.
    fn refuse_beforehand(
        &self,
        pool: &Pool,
        address: Addr,
        by: Option<&AttachmentKey>,
        fence: u64,
    ) -> Result<(), Halt> {
        let refuse = |holder: String| Err(LeaseError::Held { address: address.ip(), holder }.into());
        match self.record::<SlotRecord>(&slot_key(&pool.space, address))? {
            Some((SlotRecord::Handover { by, .. }, _)) => refuse(format!("attachment {by}, in a handover")),
            Some((SlotRecord::Bound { by: holder, .. }, _)) if Some(&holder) == by => {
                refuse(format!("attachment {holder}, whose own record lacks it; check the store and repair it"))
            }
            Some((SlotRecord::Freed { .. }, version)) if version > fence => {
                refuse("nobody: it was released after the plan was made; read the other allocator again".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// The claim of the workload that has the address, if one does.
    fn claim_over<'a>(
        &self,
        pool: &'a Pool,
        address: Addr,
        workload: Option<&Workload>,
        attachment: &AttachmentKey,
    ) -> Result<Option<Entitlement<'a>>, Halt> {
        let names = own_names(workload, attachment);
        let set = workload.and_then(|w| pool.sets.iter().find(|set| serves(set, w, attachment)));
        let own = |claim: &Claim| {
            let of_set = set.is_some_and(|set| {
                claim.key.place.is_some()
                    && claim.key.workload == set.owner.workload
                    && claim.key.ifname == set.owner.ifname
            });
            names.contains(&claim.key) || of_set
        };
        refuse_fixed(pool, address, own)?;
        if let Some(claim) = pool.claims.iter().find(|claim| claim.address == Some(address)) {
            return Ok(Some(Entitlement::new(pool, claim)));
        }
        let through =
            |key: &ClaimKey, keep, mac| Entitlement { pool, key: key.clone(), fixed: Some(address), keep, mac };
        for name in &names {
            match self.record::<ClaimRecord>(&claim_key(&pool.space, address.family, name))? {
                Some((record, _)) if Addr::from(record.address) == address => {
                    return Ok(Some(through(name, record.keep, record.mac)));
                }
                // It has another address, and goes on having it.
                Some(_) => return Ok(None),
                None => {}
            }
        }
        let (Some(workload), Some(set)) = (workload, set) else { return Ok(None) };
        if set.members != Members::Ordinal || set.size.is_some() || !pool.free.contains(address.bits) {
            return Ok(None);
        }
        let key = ClaimKey { ifname: set.owner.ifname.clone(), ..ClaimKey::new(workload.clone()) };
        Ok(Some(through(&key, set.keep, set.mac)))
    }
}

/// Refuses an address that the configuration fixes for a claim of somebody else.
fn refuse_fixed(pool: &Pool, address: Addr, own: impl Fn(&Claim) -> bool) -> Result<(), Halt> {
    match pool.claims.iter().find(|claim| claim.address == Some(address)) {
        Some(claim) if !own(claim) => {
            Err(LeaseError::Held { address: address.ip(), holder: format!("claim {}", claim.key) }.into())
        }
        _ => Ok(()),
    }
}

/// The keys of the claims that an attachment may have of its own.
fn own_names(workload: Option<&Workload>, attachment: &AttachmentKey) -> Vec<ClaimKey> {
    let any = workload.map(|workload| ClaimKey::new(workload.clone()));
    any.into_iter().flat_map(|any| [any.clone().on(attachment.ifname.clone()), any]).collect()
}

fn own_claims<'a>(
    pool: &'a Pool,
    workload: &Option<Workload>,
    attachment: &AttachmentKey,
) -> impl Iterator<Item = Key> + use<'a> {
    let names = own_names(workload.as_ref(), attachment);
    names.into_iter().map(move |name| claim_key(&pool.space, pool.family(), &name))
}
