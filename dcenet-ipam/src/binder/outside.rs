//! Addresses that the outside hands out.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use dcenet_core::model::{AttachmentKey, ContainerId, IfName, NetworkName};
use dcenet_core::probe::Conflict;
use dcenet_core::provider::{AddressSource, Lease, LeaseError, LeaseRequest, LeasedAddress};

use super::keeper::{self, Keeper, TRIES, Whose};
use super::ledger::{Entry, Ledger, Owner, Page, Stage, overtaken};
use super::{AddressBinder, BindRequest, BinderSource, Bound, BoundAddress, Recovered, Renewals};
use crate::config::ConfigError;
use crate::ipam::{decode, store_error};
use crate::model::{Addr, AddressSpace, NodeName};
use crate::record::{AttachmentRecord, Held, SlotRecord, attachment_key, freed_key, slot_key};
use crate::store::{Batch, Entry as StoreEntry, Guard, Store, Write};

/// Leases what a binder hands out, and remembers it in a store, so that a restart of this process changes no address.
///
/// Beside its own record it writes those of an ordinary lease: bindings, groups and whoever else reads the store see
/// the addresses, and what the outside hands out twice, or what a pool of the same space has in use, is declined and asked
/// for anew. No pool should cover the outside's subnet.
///
/// Release through it. What was released past it, by a [`Reclaimer`](crate::reclaim::Reclaimer) say, is let go outside by
/// the attachment's next lease or release, by [`BinderSource::recover`], or when it is due to be renewed.
///
/// Several sources may share a store. Each keeps the records of its space, pool and binder's name alone, and refuses to
/// work on an attachment that another has leased for: give sources that lead to different outsides different names.
///
/// An attachment's sequence is the revision at which it was asked for. A workload's claims mean nothing here: which
/// address it gets is the outside's choice.
#[derive(Debug)]
pub struct OutsideSource<B: ?Sized> {
    ledger: Ledger,
    space: AddressSpace,
    pool: String,
    node: Option<NodeName>,
    binder: Arc<B>,
}

impl<B: AddressBinder + ?Sized> OutsideSource<B> {
    /// Over a store and an outside. `pool` is the name that leases bear; it is no pool of a configuration.
    ///
    /// # Errors
    /// The name is none.
    pub fn new(store: Arc<dyn Store>, space: AddressSpace, pool: &str, binder: Arc<B>) -> Result<Self, ConfigError> {
        if let Some(reason) = crate::model::name_fault(pool) {
            let fault = crate::config::ConfigFault::Malformed(reason.to_owned());
            return Err(ConfigError { field: "pool".to_owned(), value: pool.to_owned(), fault });
        }
        let owner = Owner::Outside { space: space.clone(), pool: pool.to_owned(), outside: binder.name() };
        Ok(Self { ledger: Ledger::new(store, owner), space, pool: pool.to_owned(), node: None, binder })
    }

    /// Records with each lease that its attachment is on this node, so that evidence about the node can speak of it.
    #[must_use]
    pub fn on_node(self, node: NodeName) -> Self {
        Self { node: Some(node), ..self }
    }

    /// The lease of a record, if it is bound and was not released past this source.
    async fn leased(&self, attachment: &AttachmentKey, entry: &Entry) -> Result<Option<Lease>, LeaseError> {
        match &entry.page {
            Page { stage: Stage::Bound, bound: Some(bound), .. } => {
                Ok(self.is_leased(attachment, entry).await?.then(|| self.lease_of(bound)))
            }
            _ => Ok(None),
        }
    }

    fn lease_of(&self, bound: &Bound) -> Lease {
        let address = |a: &BoundAddress| LeasedAddress {
            gateway: a.gateway,
            ..LeasedAddress::new(a.address, &self.pool, bound.token.sequence)
        };
        Lease {
            addresses: bound.addresses.iter().map(address).collect(),
            routes: bound.routes.clone(),
            dns: bound.dns.clone(),
            mac: Some(bound.mac),
        }
    }

    /// Binds what an intent asks for, and records it.
    async fn complete(&self, request: &BindRequest, entry: &Entry) -> Result<Option<Lease>, LeaseError> {
        for _ in 0..DECLINES {
            let bound = self.binder.bind(request).await?;
            match self.confirm(entry, &bound).await? {
                Confirmed::Yes(bound) => return Ok(Some(self.lease_of(&bound))),
                Confirmed::Overtaken => {
                    self.binder.release(&request.token, Some(&bound)).await?;
                    return Ok(None);
                }
                Confirmed::InUse(address, holder) => {
                    tracing::warn!(%address, %holder, outside = %self.binder.name(), "an address in use was handed out");
                    self.binder.decline(&bound, address).await?;
                }
            }
        }
        let reason = format!("{} hands out addresses that are in use, {DECLINES} times in a row", self.binder.name());
        Err(LeaseError::Busy(reason))
    }

    async fn confirm(&self, entry: &Entry, bound: &Bound) -> Result<Confirmed, LeaseError> {
        let attachment = &bound.token.attachment;
        for _ in 0..TRIES {
            let mut batch = Batch::default();
            let mut held = Vec::new();
            for a in &bound.addresses {
                let address = Addr::from(a.address.addr());
                let key = slot_key(&self.space, address);
                let slot = self.entry(&key).await?;
                if let Some(entry) = &slot {
                    match decode::<SlotRecord>(&key, entry)? {
                        SlotRecord::Bound { by, .. } if by == *attachment => {}
                        // Released past a source, or by a pool that has given the address up.
                        SlotRecord::Freed { at, pool } => {
                            batch.writes.push(Write::Delete(freed_key(&self.space, address, &pool, at)));
                        }
                        other => {
                            let holder = other.holder().map(ToString::to_string);
                            let holder = holder.or(other.claim().map(ToString::to_string));
                            return Ok(Confirmed::InUse(address.ip(), holder.unwrap_or("a quarantine".to_owned())));
                        }
                    }
                }
                batch.guards.push(Guard { key: key.clone(), version: slot.map(|entry| entry.version) });
                batch.writes.push(put(key, &SlotRecord::Bound { by: attachment.clone(), claim: None })?);
                held.push(Held::new(&self.space, a.address, &self.pool));
            }
            let own = attachment_key(attachment);
            let leased = self.entry(&own).await?.is_some();
            if !leased {
                batch.guards.push(Guard { key: own.clone(), version: None });
                let record = AttachmentRecord {
                    workload: entry.page.workload.clone(),
                    addresses: held,
                    mac: Some(bound.mac),
                    node: entry.page.node.clone(),
                    sequence: Some(bound.token.sequence),
                };
                batch.writes.push(put(own, &record)?);
                let page = Page {
                    stage: Stage::Bound,
                    sequence: Some(entry.sequence()),
                    bound: Some(bound.clone()),
                    ..entry.page.clone()
                };
                if self.ledger.write(attachment, Some(entry.version), Some(&page), batch).await?.is_some() {
                    return Ok(Confirmed::Yes(Box::new(bound.clone())));
                }
            }
            match self.ledger.read(attachment).await? {
                Some(now) if now.version == entry.version => {
                    if leased {
                        // It would be overwritten.
                        return Err(keeper::of_another(attachment, None));
                    }
                    // A slot changed: looked at anew.
                }
                // Another call did the same, and what it was told counts.
                Some(Entry { page: Page { stage: Stage::Bound, bound: Some(other), .. }, .. })
                    if other.token == bound.token =>
                {
                    return Ok(Confirmed::Yes(Box::new(other)));
                }
                _ => return Ok(Confirmed::Overtaken),
            }
        }
        Err(overtaken(attachment))
    }

    async fn entry(&self, key: &[u8]) -> Result<Option<StoreEntry>, LeaseError> {
        let found = self.ledger.store.read(&[key.to_vec()]).await.map_err(store_error)?;
        Ok(found.into_iter().next().flatten())
    }
}

enum Confirmed {
    /// With what is bound.
    Yes(Box<Bound>),
    /// The record is another's.
    Overtaken,
    /// Somebody has the address.
    InUse(IpAddr, String),
}

fn put(key: Vec<u8>, value: &impl serde::Serialize) -> Result<Write, LeaseError> {
    Ok(Write::Put(key, serde_json::to_vec(value).map_err(|e| LeaseError::Store(Box::new(e)))?))
}

#[async_trait]
impl<B: AddressBinder + ?Sized> Keeper for OutsideSource<B> {
    type Binder = B;

    fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    fn binder(&self) -> &B {
        &self.binder
    }

    async fn is_leased(&self, attachment: &AttachmentKey, entry: &Entry) -> Result<bool, LeaseError> {
        let own = attachment_key(attachment);
        let Some(record) = self.entry(&own).await? else { return Ok(false) };
        let (version, record) = (record.version, decode::<AttachmentRecord>(&own, &record)?);
        let has = |a: &BoundAddress| {
            let place = Some((self.space.clone(), Addr::from(a.address.addr())));
            record.addresses.iter().any(|held| held.slot() == place)
        };
        let bound = entry.page.bound.iter().flat_map(|bound| &bound.addresses);
        Ok(record.sequence(version) == entry.sequence() && bound.into_iter().all(has))
    }

    async fn whose_unnamed(&self, attachment: &AttachmentKey, entry: &Entry) -> Result<Whose, LeaseError> {
        if !entry.page.addresses.is_empty() {
            // Its source chose the address.
            return Ok(Whose::Others);
        }
        let own = attachment_key(attachment);
        let Some(record) = self.entry(&own).await? else { return Ok(Whose::Nobodys) };
        let (version, record) = (record.version, decode::<AttachmentRecord>(&own, &record)?);
        if record.sequence(version) != entry.sequence() {
            return Ok(Whose::Nobodys);
        }
        let ours = record.addresses.iter().all(|held| held.pool == self.pool);
        Ok(if ours && self.is_leased(attachment, entry).await? { Whose::Ours } else { Whose::Others })
    }

    /// Outside, then of the records.
    async fn undo(&self, attachment: &AttachmentKey, mut entry: Entry) -> Result<bool, LeaseError> {
        let sequence = entry.sequence();
        if entry.page.stage != Stage::Releasing {
            entry.page = Page { stage: Stage::Releasing, sequence: Some(sequence), ..entry.page };
            match self.ledger.write(attachment, Some(entry.version), Some(&entry.page), Batch::default()).await? {
                Some(version) => entry.version = version,
                None => return Ok(false),
            }
        }
        self.binder.release(&entry.token(attachment), entry.page.bound.as_ref()).await?;
        let mut batch = Batch::default();
        let own = attachment_key(attachment);
        let mut is_ours = true;
        if let Some(record) = self.entry(&own).await? {
            is_ours = decode::<AttachmentRecord>(&own, &record)?.sequence(record.version) == sequence;
            if is_ours {
                batch.guards.push(Guard { key: own.clone(), version: Some(record.version) });
                batch.writes.push(Write::Delete(own));
            }
        }
        for a in entry.page.bound.iter().flat_map(|bound| &bound.addresses) {
            let address = Addr::from(a.address.addr());
            let key = slot_key(&self.space, address);
            let Some(slot) = self.entry(&key).await? else { continue };
            match decode::<SlotRecord>(&key, &slot)? {
                SlotRecord::Bound { by, .. } if is_ours && by == *attachment => {}
                // Released past this source into a queue that nobody takes from.
                SlotRecord::Freed { at, pool } if pool == self.pool => {
                    batch.writes.push(Write::Delete(freed_key(&self.space, address, &pool, at)));
                }
                _ => continue,
            }
            batch.guards.push(Guard { key: key.clone(), version: Some(slot.version) });
            batch.writes.push(Write::Delete(key));
        }
        Ok(self.ledger.write(attachment, Some(entry.version), None, batch).await?.is_some())
    }

    async fn settle(&self, attachment: &AttachmentKey, entry: Entry, done: &mut Recovered) -> Result<(), LeaseError> {
        match entry.page.stage {
            Stage::Bound if self.is_leased(attachment, &entry).await? => {}
            Stage::Intent => {
                let lease = self.complete(&entry.request(attachment), &entry).await?;
                done.bound += usize::from(lease.is_some());
            }
            Stage::Bound | Stage::Releasing => done.released += usize::from(self.undo(attachment, entry).await?),
        }
        Ok(())
    }
}

#[async_trait]
impl<B: AddressBinder + ?Sized> AddressSource for OutsideSource<B> {
    /// # Errors
    /// [`LeaseError::Invalid`] for a request that names addresses or pools.
    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, LeaseError> {
        let attachment = &request.attachment;
        for (field, given) in [("addresses", !request.addresses.is_empty()), ("pools", !request.pools.is_empty())] {
            if given {
                let reason = format!("{} chooses the address; leave it out", self.binder.name());
                return Err(LeaseError::Invalid { field: field.to_owned(), reason });
            }
        }
        for _ in 0..TRIES {
            let entry = match keeper::read(self, attachment).await? {
                Some(entry) if entry.page.stage == Stage::Intent => entry,
                Some(entry) => {
                    if let Some(lease) = self.leased(attachment, &entry).await? {
                        return Ok(lease);
                    }
                    self.undo(attachment, entry).await?;
                    continue;
                }
                None => {
                    let (stage, mac) = (Stage::Intent, attachment.mac());
                    let (workload, node) = (request.workload.clone(), self.node.clone());
                    let (owner, sequence, addresses, bound) = (None, None, Vec::new(), None);
                    let page = Page { stage, owner, sequence, addresses, mac, workload, node, bound };
                    match self.ledger.write(attachment, None, Some(&page), Batch::default()).await? {
                        Some(version) => Entry { page, version },
                        None => continue,
                    }
                }
            };
            let asked = BindRequest { workload: request.workload.clone(), ..entry.request(attachment) };
            match self.complete(&asked, &entry).await {
                Ok(Some(lease)) => return Ok(lease),
                Ok(None) => {}
                Err(error) => {
                    if let Err(second) = self.undo(attachment, entry).await {
                        tracing::warn!(%attachment, %second, "what may be bound outside is still recorded");
                    }
                    return Err(error);
                }
            }
        }
        Err(overtaken(attachment))
    }

    async fn held(&self, attachment: &AttachmentKey) -> Result<Option<Lease>, LeaseError> {
        // Also of what is being released, or was released past this source: who knows the sequence lets go outside.
        let entry = keeper::read(self, attachment).await?;
        Ok(entry.and_then(|entry| entry.page.bound).map(|bound| self.lease_of(&bound)))
    }

    async fn release(&self, attachment: &AttachmentKey, sequence: u64) -> Result<(), LeaseError> {
        keeper::release(self, attachment, sequence).await.map(drop)
    }

    async fn retain(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
    ) -> Result<Vec<AttachmentKey>, LeaseError> {
        let mut released = Vec::new();
        let all = self.ledger.all(Some(network)).await?;
        for (attachment, entry) in all.pages {
            if keeper::whose(self, &attachment, &entry).await? == Whose::Others {
                continue;
            }
            if !valid.iter().any(|(c, i)| *c == attachment.container && *i == attachment.ifname) {
                self.release(&attachment, entry.sequence()).await?;
                released.push(attachment);
            }
        }
        keeper::first_unreadable(all.unreadable).map_or(Ok(released), Err)
    }

    /// Declined outside, which keeps the address back for a time of its own; then asked for anew.
    async fn replace(
        &self,
        attachment: &AttachmentKey,
        sequence: u64,
        conflict: &Conflict,
    ) -> Result<Option<Lease>, LeaseError> {
        let entry = keeper::read(self, attachment).await?.filter(|entry| entry.sequence() == sequence);
        let Some((entry, bound)) = entry.and_then(|entry| Some((entry.clone(), entry.page.bound?))) else {
            return Err(overtaken(attachment));
        };
        self.binder.decline(&bound, conflict.address).await?;
        if !self.undo(attachment, entry).await? {
            return Err(overtaken(attachment));
        }
        self.lease(&LeaseRequest::new(attachment.clone())).await.map(Some)
    }

    async fn ready(&self) -> Result<(), LeaseError> {
        Ok(self.binder.ready().await?)
    }
}

#[async_trait]
impl<B: AddressBinder + ?Sized> BinderSource for OutsideSource<B> {
    async fn recover(&self) -> Result<Recovered, LeaseError> {
        keeper::recover(self).await
    }

    async fn renew_due(&self) -> Result<Renewals, LeaseError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        keeper::renew_due(self, u64::try_from(now).unwrap_or(u64::MAX)).await
    }

    fn records(&self) -> &Arc<dyn Store> {
        &self.ledger.store
    }
}

/// Addresses in use that the outside may hand out in a row.
const DECLINES: u32 = 4;
