//! Addresses of our own that the outside is told of.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use dcenet_core::model::{AttachmentKey, ContainerId, IfName, NetworkName};
use dcenet_core::probe::Conflict;
use dcenet_core::provider::{AddressSource, Lease, LeaseError, LeaseRequest};

use super::keeper::{self, Keeper, TRIES, Whose};
use super::ledger::{Entry, Ledger, Owner, Page, Stage, overtaken};
use super::{AddressBinder, BindError, BindRequest, BinderSource, Bound, Recovered, Renewals};
use crate::Ipam;
use crate::store::{Batch, Store};

/// Leases from an [`Ipam`], and tells a binder of each address before the lease is answered.
///
/// Its records are in the store of the `Ipam`. Release through it, not through the `Ipam`: what was released past it, by
/// a [`Reclaimer`](crate::reclaim::Reclaimer) say, stays bound outside until [`BinderSource::recover`], or until it is due
/// to be renewed. What its outside binds without an end is never due: call `recover` now and then.
///
/// Several sources may share a store. Each keeps the records of its binder's name alone, and refuses to work on an
/// attachment that another has leased for.
#[derive(Debug)]
pub struct BoundSource<B: ?Sized> {
    ipam: Arc<Ipam>,
    ledger: Ledger,
    binder: Arc<B>,
}

impl<B: AddressBinder + ?Sized> BoundSource<B> {
    /// Over an allocator and an outside.
    pub fn new(ipam: Arc<Ipam>, binder: Arc<B>) -> Self {
        let ledger = Ledger::new(ipam.store().clone(), Owner::Bound { outside: binder.name() });
        Self { ipam, ledger, binder }
    }

    /// Binds what an intent says, and records it. `false` if somebody else was faster: what was bound is released.
    async fn confirm(&self, attachment: &AttachmentKey, entry: &Entry, bound: Bound) -> Result<bool, LeaseError> {
        let page = Page { stage: Stage::Bound, bound: Some(bound.clone()), ..entry.page.clone() };
        if self.ledger.write(attachment, Some(entry.version), Some(&page), Batch::default()).await?.is_some() {
            return Ok(true);
        }
        let now = self.ledger.read(attachment).await?;
        let same = |now: &Entry| now.page.stage == Stage::Bound && now.sequence() == entry.sequence();
        if now.as_ref().is_some_and(same) {
            return Ok(true);
        }
        self.binder.release(&entry.token(attachment), Some(&bound)).await?;
        Ok(false)
    }

    /// Binds; where somebody has the address whose lease has ended, after releasing that.
    async fn bind(&self, request: &BindRequest) -> Result<Bound, LeaseError> {
        let result = self.binder.bind(request).await;
        let Err(BindError::Held { holder, .. }) = &result else { return Ok(result?) };
        let holder = holder.clone();
        match self.ledger.read(&holder.attachment).await? {
            Some(entry) if entry.sequence() == holder.sequence => {
                if keeper::whose(self, &holder.attachment, &entry).await? == Whose::Others {
                    return Ok(result?);
                }
                let held = self.ipam.held(&holder.attachment).await?;
                if held.is_some_and(|lease| lease.sequence() == holder.sequence) {
                    return Ok(result?);
                }
                // Released past us.
                self.undo(&holder.attachment, entry).await?;
            }
            // A remnant that no record names.
            _ => self.binder.release(&holder, None).await?,
        }
        Ok(self.binder.bind(request).await?)
    }
}

#[async_trait]
impl<B: AddressBinder + ?Sized> Keeper for BoundSource<B> {
    type Binder = B;

    fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    fn binder(&self) -> &B {
        &self.binder
    }

    async fn is_leased(&self, attachment: &AttachmentKey, entry: &Entry) -> Result<bool, LeaseError> {
        let held = self.ipam.held(attachment).await?;
        Ok(held.is_some_and(|lease| lease.sequence() == entry.sequence()))
    }

    async fn whose_unnamed(&self, attachment: &AttachmentKey, entry: &Entry) -> Result<Whose, LeaseError> {
        if entry.page.addresses.is_empty() {
            // The outside chose the address.
            return Ok(Whose::Others);
        }
        Ok(if self.is_leased(attachment, entry).await? { Whose::Ours } else { Whose::Nobodys })
    }

    /// Outside, then inside, then of the record.
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
        self.ipam.release(attachment, sequence).await?;
        Ok(self.ledger.write(attachment, Some(entry.version), None, Batch::default()).await?.is_some())
    }

    async fn settle(&self, attachment: &AttachmentKey, entry: Entry, done: &mut Recovered) -> Result<(), LeaseError> {
        let alive = self.is_leased(attachment, &entry).await?;
        match entry.page.stage {
            Stage::Bound if alive => {}
            Stage::Intent if alive => {
                let bound = self.bind(&entry.request(attachment)).await?;
                done.bound += usize::from(self.confirm(attachment, &entry, bound).await?);
            }
            _ => done.released += usize::from(self.undo(attachment, entry).await?),
        }
        Ok(())
    }
}

#[async_trait]
impl<B: AddressBinder + ?Sized> AddressSource for BoundSource<B> {
    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, LeaseError> {
        let attachment = &request.attachment;
        for _ in 0..TRIES {
            // Before there is a lease inside that would have to be undone.
            keeper::read(self, attachment).await?;
            let lease = self.ipam.lease(request).await?;
            let sequence = lease.sequence();
            let entry = match keeper::read(self, attachment).await? {
                Some(entry) if entry.sequence() != sequence => {
                    if entry.sequence() < sequence {
                        // Of a lease that was released past us.
                        self.undo(attachment, entry).await?;
                    }
                    continue;
                }
                Some(entry) if entry.page.stage == Stage::Bound => return Ok(lease),
                Some(entry) if entry.page.stage == Stage::Releasing => {
                    self.undo(attachment, entry).await?;
                    continue;
                }
                Some(entry) => entry,
                None => {
                    let addresses = lease.addresses.iter().map(|a| a.prefix.unwrap_or(a.address)).collect();
                    let mac = lease.mac.unwrap_or_else(|| attachment.mac());
                    let (stage, sequence, workload) = (Stage::Intent, Some(sequence), request.workload.clone());
                    let (owner, node, bound) = (None, None, None);
                    let page = Page { stage, owner, sequence, addresses, mac, workload, node, bound };
                    match self.ledger.write(attachment, None, Some(&page), Batch::default()).await? {
                        Some(version) => Entry { page, version },
                        None => continue,
                    }
                }
            };
            let asked = BindRequest { workload: request.workload.clone(), ..entry.request(attachment) };
            match self.bind(&asked).await {
                Ok(bound) => {
                    if self.confirm(attachment, &entry, bound).await? {
                        return Ok(lease);
                    }
                }
                Err(error) => {
                    // Where this fails too, the record stays, and whoever comes next goes on from it.
                    if let Err(second) = self.undo(attachment, entry).await {
                        tracing::warn!(%attachment, %second, "a lease that could not be bound is still held");
                    }
                    return Err(error);
                }
            }
        }
        Err(overtaken(attachment))
    }

    async fn held(&self, attachment: &AttachmentKey) -> Result<Option<Lease>, LeaseError> {
        self.ipam.held(attachment).await
    }

    async fn release(&self, attachment: &AttachmentKey, sequence: u64) -> Result<(), LeaseError> {
        if !keeper::release(self, attachment, sequence).await? {
            self.ipam.release(attachment, sequence).await?;
        }
        Ok(())
    }

    async fn retain(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
    ) -> Result<Vec<AttachmentKey>, LeaseError> {
        let alive = |a: &AttachmentKey| valid.iter().any(|(c, i)| *c == a.container && *i == a.ifname);
        let leases = self.ipam.bindings(Some(network)).await?.into_iter().map(|b| (b.attachment, b.sequence));
        let all = self.ledger.all(Some(network)).await?;
        let (mut pages, mut others) = (Vec::new(), BTreeSet::new());
        for (attachment, entry) in all.pages {
            match keeper::whose(self, &attachment, &entry).await? {
                Whose::Others => _ = others.insert(attachment),
                Whose::Ours | Whose::Nobodys => pages.push((attachment, entry.sequence())),
            }
        }
        let mut stale: Vec<_> = leases.chain(pages).filter(|(a, _)| !alive(a) && !others.contains(a)).collect();
        stale.sort();
        stale.dedup();
        let mut released = Vec::new();
        for (attachment, sequence) in stale {
            self.release(&attachment, sequence).await?;
            released.push(attachment);
        }
        released.dedup();
        keeper::first_unreadable(all.unreadable).map_or(Ok(released), Err)
    }

    fn is_fixed(&self, address: IpAddr) -> bool {
        self.ipam.is_fixed(address)
    }

    /// What the outside has been told of is let go there first, so that a kill in between leaves a lease that the next call
    /// lets go too; the other address is told as that of any lease.
    async fn replace(
        &self,
        attachment: &AttachmentKey,
        sequence: u64,
        conflict: &Conflict,
    ) -> Result<Option<Lease>, LeaseError> {
        let Some(mut entry) = keeper::read(self, attachment).await?.filter(|entry| entry.sequence() == sequence) else {
            return AddressSource::replace(&*self.ipam, attachment, sequence, conflict).await;
        };
        if self.ipam.is_fixed(conflict.address) {
            return Ok(None);
        }
        if entry.page.stage != Stage::Releasing {
            entry.page = Page { stage: Stage::Releasing, sequence: Some(sequence), ..entry.page };
            match self.ledger.write(attachment, Some(entry.version), Some(&entry.page), Batch::default()).await? {
                Some(version) => entry.version = version,
                None => return Err(overtaken(attachment)),
            }
        }
        self.binder.release(&entry.token(attachment), entry.page.bound.as_ref()).await?;
        let replaced = AddressSource::replace(&*self.ipam, attachment, sequence, conflict).await?;
        if replaced.is_none() {
            return Ok(None);
        }
        if self.ledger.write(attachment, Some(entry.version), None, Batch::default()).await?.is_none() {
            return Err(overtaken(attachment));
        }
        // The lease stands, and is bound as one whose bind was interrupted.
        self.lease(&LeaseRequest::new(attachment.clone())).await.map(Some)
    }

    async fn ready(&self) -> Result<(), LeaseError> {
        self.binder.ready().await?;
        self.ipam.ready().await
    }
}

#[async_trait]
impl<B: AddressBinder + ?Sized> BinderSource for BoundSource<B> {
    async fn recover(&self) -> Result<Recovered, LeaseError> {
        keeper::recover(self).await
    }

    async fn renew_due(&self) -> Result<Renewals, LeaseError> {
        keeper::renew_due(self, self.ipam.now()).await
    }

    fn records(&self) -> &Arc<dyn Store> {
        &self.ledger.store
    }
}
