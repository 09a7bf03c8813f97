//! Addresses that the outside hands out.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use dcenet_core::model::{AttachmentKey, ContainerId, IfName, NetworkName};
use dcenet_core::provider::{AddressSource, Lease, LeaseError, LeaseRequest, LeasedAddress};

use super::ledger::{Entry, Ledger, Page, Stage, overtaken};
use super::{AddressBinder, BindRequest, BinderSource, Bound, Recovered};
use crate::config::ConfigError;
use crate::ipam::{decode, store_error};
use crate::model::{Addr, AddressSpace};
use crate::record::{AttachmentRecord, Held, SlotRecord, attachment_key, slot_key};
use crate::store::{Batch, Entry as StoreEntry, Guard, Store, Write};

/// Leases what a binder hands out, and remembers it in a store, so that a restart of this process changes no address.
///
/// Beside its own record it writes those of an ordinary lease: bindings, groups and whoever else reads the store see
/// the addresses, and what the outside hands out twice, or what a pool of the same space has in use, is declined and asked
/// for anew. No pool should cover the outside's subnet.
///
/// An attachment's sequence is the revision at which it was asked for. A workload's claims mean nothing here: which
/// address it gets is the outside's choice.
#[derive(Debug)]
pub struct OutsideSource<B: ?Sized> {
    ledger: Ledger,
    space: AddressSpace,
    pool: String,
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
        Ok(Self { ledger: Ledger { store }, space, pool: pool.to_owned(), binder })
    }

    fn lease_of(&self, bound: &Bound) -> Lease {
        let address = |a: &super::BoundAddress| LeasedAddress {
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
                Confirmed::Yes => return Ok(Some(self.lease_of(&bound))),
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
        let mut batch = Batch::default();
        let mut held = Vec::new();
        for a in &bound.addresses {
            let address = Addr::from(a.address.addr());
            let key = slot_key(&self.space, address);
            let slot = self.entry(&key).await?;
            if let Some(entry) = &slot {
                match decode::<SlotRecord>(&key, entry)? {
                    SlotRecord::Bound { by, .. } if by == *attachment => {}
                    SlotRecord::Freed { .. } => {}
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
        // A lease of another source for the same attachment would be overwritten.
        let own = attachment_key(attachment);
        if self.entry(&own).await?.is_some() {
            let reason = format!("{attachment} has a lease of another source; use one source for a network");
            return Err(LeaseError::Invalid { field: "attachment".to_owned(), reason });
        }
        batch.guards.push(Guard { key: own.clone(), version: None });
        let record = AttachmentRecord {
            workload: None,
            addresses: held,
            mac: Some(bound.mac),
            node: None,
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
            return Ok(Confirmed::Yes);
        }
        match self.ledger.read(attachment).await? {
            // Another call did the same.
            Some(now) if now.page.bound.as_ref().is_some_and(|b| b.token == bound.token) => Ok(Confirmed::Yes),
            // A slot changed: looked at anew.
            Some(now) if now.version == entry.version => Box::pin(self.confirm(entry, bound)).await,
            _ => Ok(Confirmed::Overtaken),
        }
    }

    /// Lets go outside, then of the records. `false` if somebody else was faster.
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
        for a in entry.page.bound.iter().flat_map(|bound| &bound.addresses) {
            let key = slot_key(&self.space, Addr::from(a.address.addr()));
            if let Some(slot) = self.entry(&key).await?
                && decode::<SlotRecord>(&key, &slot)?.holder() == Some(attachment)
            {
                batch.guards.push(Guard { key: key.clone(), version: Some(slot.version) });
                batch.writes.push(Write::Delete(key));
            }
        }
        let own = attachment_key(attachment);
        if let Some(record) = self.entry(&own).await?
            && decode::<AttachmentRecord>(&own, &record)?.sequence(record.version) == sequence
        {
            batch.guards.push(Guard { key: own.clone(), version: Some(record.version) });
            batch.writes.push(Write::Delete(own));
        }
        Ok(self.ledger.write(attachment, Some(entry.version), None, batch).await?.is_some())
    }

    async fn entry(&self, key: &[u8]) -> Result<Option<StoreEntry>, LeaseError> {
        let found = self.ledger.store.read(&[key.to_vec()]).await.map_err(store_error)?;
        Ok(found.into_iter().next().flatten())
    }

    fn request(&self, attachment: &AttachmentKey, entry: &Entry) -> BindRequest {
        let (addresses, mac) = (entry.page.addresses.clone(), entry.page.mac);
        BindRequest { token: entry.token(attachment), addresses, mac, workload: None }
    }
}

enum Confirmed {
    Yes,
    /// The record is another's.
    Overtaken,
    /// Somebody has the address.
    InUse(IpAddr, String),
}

fn put(key: Vec<u8>, value: &impl serde::Serialize) -> Result<Write, LeaseError> {
    Ok(Write::Put(key, serde_json::to_vec(value).map_err(|e| LeaseError::Store(Box::new(e)))?))
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
            let entry = match self.ledger.read(attachment).await? {
                Some(Entry { page: Page { stage: Stage::Bound, bound: Some(bound), .. }, .. }) => {
                    return Ok(self.lease_of(&bound));
                }
                Some(entry) if entry.page.stage == Stage::Intent => entry,
                Some(entry) => {
                    self.undo(attachment, entry).await?;
                    continue;
                }
                None => {
                    let (stage, mac) = (Stage::Intent, attachment.mac());
                    let page = Page { stage, sequence: None, addresses: Vec::new(), mac, bound: None };
                    match self.ledger.write(attachment, None, Some(&page), Batch::default()).await? {
                        Some(version) => Entry { page, version },
                        None => continue,
                    }
                }
            };
            let asked = BindRequest { workload: request.workload.clone(), ..self.request(attachment, &entry) };
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
        let entry = self.ledger.read(attachment).await?;
        Ok(entry.and_then(|entry| entry.page.bound.as_ref().map(|bound| self.lease_of(bound))))
    }

    async fn release(&self, attachment: &AttachmentKey, sequence: u64) -> Result<(), LeaseError> {
        for _ in 0..TRIES {
            match self.ledger.read(attachment).await? {
                Some(entry) if entry.sequence() == sequence => {
                    if self.undo(attachment, entry).await? {
                        return Ok(());
                    }
                }
                _ => return Ok(()),
            }
        }
        Err(overtaken(attachment))
    }

    async fn retain(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
    ) -> Result<Vec<AttachmentKey>, LeaseError> {
        let mut released = Vec::new();
        for (attachment, entry) in self.ledger.all(Some(network)).await? {
            if !valid.iter().any(|(c, i)| *c == attachment.container && *i == attachment.ifname) {
                self.release(&attachment, entry.sequence()).await?;
                released.push(attachment);
            }
        }
        Ok(released)
    }

    async fn ready(&self) -> Result<(), LeaseError> {
        Ok(self.binder.ready().await?)
    }
}

#[async_trait]
impl<B: AddressBinder + ?Sized> BinderSource for OutsideSource<B> {
    async fn recover(&self) -> Result<Recovered, LeaseError> {
        let (mut done, mut failure) = (Recovered::default(), None);
        for (attachment, entry) in self.ledger.all(None).await? {
            let result = match entry.page.stage {
                Stage::Bound => Ok(()),
                Stage::Intent => {
                    let complete = self.complete(&self.request(&attachment, &entry), &entry).await;
                    complete.map(|lease| done.bound += usize::from(lease.is_some()))
                }
                Stage::Releasing => {
                    self.undo(&attachment, entry).await.map(|undone| done.released += usize::from(undone))
                }
            };
            if let Err(error) = result {
                failure.get_or_insert(error);
            }
        }
        for token in self.binder.list().await?.unwrap_or_default() {
            let entry = self.ledger.read(&token.attachment).await?;
            if entry.is_none_or(|entry| entry.sequence() != token.sequence) {
                match self.binder.release(&token, None).await {
                    Ok(()) => done.remnants += 1,
                    Err(error) => drop(failure.get_or_insert(error.into())),
                }
            }
        }
        failure.map_or(Ok(done), Err)
    }

    async fn renew_due(&self) -> Result<Vec<(AttachmentKey, u64)>, LeaseError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        self.ledger.renew_due(&*self.binder, u64::try_from(now).unwrap_or(u64::MAX)).await
    }
}

/// Times that a call begins anew because others work on the same attachment.
const TRIES: u32 = 8;
/// Addresses in use that the outside may hand out in a row.
const DECLINES: u32 = 4;
