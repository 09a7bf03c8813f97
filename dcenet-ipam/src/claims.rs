//! What is done with claims beside leasing through them.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use dcenet_core::model::{AttachmentKey, ClusterId, MacAddr, Workload};
use dcenet_core::provider::{AddressSource, Lease, LeaseError};

use crate::ipam::{Ipam, decode, store_error};
use crate::machine::{ClaimExport, Command, Quarantine, Reply};
use crate::model::{Addr, AddressSpace, Claim, ClaimKey};
use crate::record::{SlotRecord, claim_prefix, due_prefix, freed_of, quarantine_prefix, slot_key};
use crate::store::number_of;

/// An address that nobody gets because somebody else on the link answers for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuarantinedAddress {
    /// The routing domain.
    pub space: AddressSpace,
    /// The address.
    pub address: IpAddr,
    /// Why, for people.
    pub reason: String,
    /// Since when, in milliseconds since 1970.
    pub at: u64,
    /// When it ends; `None` if only [`Ipam::lift`] ends it. What has ended is listed until somebody takes it.
    pub until: Option<u64>,
    /// Who answered.
    pub seen: Option<MacAddr>,
    /// The claim that keeps it.
    pub claim: Option<ClaimKey>,
}

/// Two attachments of one claim, or the permission for the second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenHandover {
    /// The routing domain.
    pub space: AddressSpace,
    /// The address.
    pub address: IpAddr,
    /// The claim.
    pub claim: ClaimKey,
    /// Who has it now.
    pub active: AttachmentKey,
    /// Who is to have it; `None` for whoever comes first.
    pub to: Option<AttachmentKey>,
    /// Whether the other holds a lease.
    pub joined: bool,
    /// When the permission ends, in milliseconds since 1970.
    pub until: u64,
}

impl Ipam {
    /// Records a claim in the store with all that belongs to it; see [`Ipam::reserve`].
    ///
    /// # Errors
    /// As [`Ipam::reserve`].
    pub async fn record_claim(&self, pool: &str, claim: &Claim) -> Result<(), LeaseError> {
        self.run(&Command::Record { pool: pool.to_owned(), claim: claim.clone() }).await.map(drop)
    }

    /// Gives a claim another key, in both families at once; its addresses and whatever is attached through it stay.
    /// Returns whether there was one. Rename a claim of the configuration there first, lest it be recorded again.
    ///
    /// # Errors
    /// [`LeaseError::Held`] if there is a claim of the new key, or another cluster has this one.
    pub async fn rename_claim(&self, space: &AddressSpace, from: &ClaimKey, to: &ClaimKey) -> Result<bool, LeaseError> {
        let command = Command::Rename { space: space.clone(), from: from.clone(), to: to.clone() };
        self.is_done(&command).await
    }

    /// The workload exists no more: the addresses that its claims keep for as long as it does
    /// ([`KeepPolicy::Workload`](crate::model::KeepPolicy::Workload)) go back, at once or when their attachment is
    /// released. A later lease of the same name is a new workload and may find other addresses. Returns how many claims
    /// ended.
    pub async fn workload_gone(&self, workload: &Workload) -> Result<usize, LeaseError> {
        let mut ended = 0;
        for (space, claim) in self.claims_of(workload).await? {
            ended += usize::from(self.claim_gone(&space, &claim, None).await?);
        }
        Ok(ended)
    }

    /// As [`Ipam::workload_gone`], of one claim, unless it was used since the revision.
    pub(crate) async fn claim_gone(
        &self,
        space: &AddressSpace,
        claim: &ClaimKey,
        fence: Option<u64>,
    ) -> Result<bool, LeaseError> {
        self.is_done(&Command::Gone { space: space.clone(), claim: claim.clone(), fence }).await
    }

    async fn claims_of(&self, workload: &Workload) -> Result<Vec<(AddressSpace, ClaimKey)>, LeaseError> {
        let mut claims = Vec::new();
        for (space, family) in self.families_of_spaces() {
            let prefix = claim_prefix(space, family);
            for (key, _) in self.scan_all(&[prefix.clone(), workload.to_string().into_bytes()].concat()).await? {
                let text = std::str::from_utf8(&key[prefix.len()..]).unwrap_or_default();
                let claim: ClaimKey = text.parse().map_err(|e| LeaseError::Damaged(Box::new(e)))?;
                if claim.workload == *workload {
                    claims.push((space.clone(), claim));
                }
            }
        }
        claims.sort();
        claims.dedup();
        Ok(claims)
    }

    /// Hands a recorded claim out to another cluster: from now on it is refused here, and its addresses are kept from
    /// everybody, until that cluster hands it back. Repeated for the same cluster, it gives the same export; so what was
    /// lost on the way can be sent again. `None` if there is no such claim in the store.
    ///
    /// At no time do two clusters hold the claim live: the export is made by the commit that ends it here, and only the
    /// cluster that it names takes it in, not twice.
    ///
    /// # Errors
    /// [`LeaseError::Held`] while something is attached through it, or if another cluster has it.
    pub async fn hand_out(
        &self,
        space: &AddressSpace,
        claim: &ClaimKey,
        to: &ClusterId,
    ) -> Result<Option<ClaimExport>, LeaseError> {
        let command = Command::HandOut { space: space.clone(), claim: claim.clone(), to: to.clone() };
        match self.run(&command).await? {
            Reply::HandedOut(export) => Ok(Some(export)),
            _ => Ok(None),
        }
    }

    /// Takes in a claim that another cluster handed out to this one, `here`. It may be repeated.
    ///
    /// # Errors
    /// [`LeaseError::Invalid`] if it was handed out to another cluster, has moved on since, or no pool here has its
    /// addresses; [`LeaseError::Held`] if somebody has one of them.
    pub async fn hand_in(&self, export: &ClaimExport, here: &ClusterId) -> Result<(), LeaseError> {
        self.run(&Command::HandIn { export: export.clone(), here: here.clone() }).await.map(drop)
    }

    /// Has a claim again that was handed out, on the caller's word that the cluster does not hold it and never will: it
    /// is lost, or the export was. Returns whether the claim was away. An export of before is refused here from now on,
    /// but not where it was sent to.
    pub async fn take_back(&self, space: &AddressSpace, claim: &ClaimKey) -> Result<bool, LeaseError> {
        self.is_done(&Command::TakeBack { space: space.clone(), claim: claim.clone() }).await
    }

    /// Declares that the claims which `from` holds move to another attachment: `to`, or whichever leases through them
    /// first. For the time `limit`, at most a day, that one may lease although `from` has the same addresses; `from` stays
    /// the one that has them until [`Ipam::complete_handover`]. Repeating it extends the time. Returns whether `from`
    /// holds a lease (of that sequence).
    ///
    /// If the target dies, its release, its reclaim or [`Ipam::abort_handover`] ends the handover, and `from` has the
    /// addresses. If `from` dies, its release leaves them to the target. Once the time is over nobody new may join, and
    /// [`Ipam::expire`] aborts; before that a late completion is still one.
    ///
    /// # Errors
    /// [`LeaseError::Invalid`] if `from` has no address through a claim, or `to` has a lease of its own;
    /// [`LeaseError::Held`] if yet another has joined.
    pub async fn begin_handover(
        &self,
        from: &AttachmentKey,
        sequence: Option<u64>,
        to: Option<&AttachmentKey>,
        limit: Duration,
    ) -> Result<bool, LeaseError> {
        let command = Command::BeginHandover { from: from.clone(), sequence, to: to.cloned(), limit };
        self.is_done(&command).await
    }

    /// The target has the addresses from now on, and `from` has them no more: its lease is over but for addresses that
    /// are of no claim, and its release finds nothing else. Returns whether there was a handover.
    ///
    /// # Errors
    /// [`LeaseError::Invalid`] if the target has not leased yet.
    pub async fn complete_handover(&self, from: &AttachmentKey) -> Result<bool, LeaseError> {
        self.is_done(&Command::CompleteHandover { from: from.clone() }).await
    }

    /// `from` keeps the addresses, and the target has them no more. Returns whether there was a handover.
    pub async fn abort_handover(&self, from: &AttachmentKey) -> Result<bool, LeaseError> {
        self.is_done(&Command::AbortHandover { from: from.clone() }).await
    }

    /// The handovers that are neither completed nor aborted.
    pub async fn handovers(&self) -> Result<Vec<OpenHandover>, LeaseError> {
        let mut open = Vec::new();
        for (space, address, slot) in self.ending(u64::MAX).await? {
            if let SlotRecord::Handover { by: active, claim, to, joined, until } = slot {
                open.push(OpenHandover { space, address: address.ip(), claim, active, to, joined, until });
            }
        }
        Ok(open)
    }

    /// Puts an address into quarantine, also one that a claim keeps: nobody gets it until the time is over or it is
    /// lifted. A claim that has no address of its own choice takes another meanwhile.
    ///
    /// # Errors
    /// [`LeaseError::Held`] if it is in use: [`Ipam::replace`] is for that. [`LeaseError::Invalid`] if it is in no pool.
    pub async fn quarantine(&self, space: &AddressSpace, address: IpAddr, why: &Quarantine) -> Result<(), LeaseError> {
        self.run(&Command::Quarantine { space: space.clone(), address, why: why.clone() }).await.map(drop)
    }

    /// Ends a quarantine: the address counts as released now, or is its claim's again. Returns whether it was in one.
    pub async fn lift(&self, space: &AddressSpace, address: IpAddr) -> Result<bool, LeaseError> {
        self.is_done(&Command::Lift { space: space.clone(), address }).await
    }

    /// The addresses in quarantine.
    pub async fn quarantined(&self) -> Result<Vec<QuarantinedAddress>, LeaseError> {
        let mut found = Vec::new();
        for (space, family) in self.families_of_spaces() {
            let prefix = quarantine_prefix(space, family);
            for (key, _) in self.scan_all(&prefix).await? {
                let address = Addr { family, bits: number_of(&prefix, &key).map_err(store_error)? };
                let slot = self.slot(space, address).await?;
                if let Some(SlotRecord::Quarantined { reason, at, until, mac: seen, claim, .. }) = slot {
                    let (space, address) = (space.clone(), address.ip());
                    found.push(QuarantinedAddress { space, address, reason, at, until, seen, claim });
                }
            }
        }
        Ok(found)
    }

    /// Gives an attachment another address of the same pool in place of one that turned out to be somebody else's, and
    /// puts that into quarantine, in one commit. A claim without a fixed address goes along. Returns the new lease, with a
    /// new sequence; `None` if the attachment does not hold that lease any more. Repeating it after success gives the
    /// lease that it made.
    ///
    /// # Errors
    /// [`LeaseError::Invalid`] if the lease has no such address, or the configuration fixes it;
    /// [`LeaseError::Exhausted`] if the pool has no other: then nothing changes.
    pub async fn replace(
        &self,
        attachment: &AttachmentKey,
        sequence: u64,
        bad: IpAddr,
        why: &Quarantine,
    ) -> Result<Option<Lease>, LeaseError> {
        let command = Command::Replace { attachment: attachment.clone(), sequence, bad, why: why.clone() };
        match self.run(&command).await? {
            Reply::Leased(lease) => Ok(Some(lease)),
            _ => Ok(None),
        }
    }

    /// Refuses where so many addresses of the pool from which the attachment has this one are in quarantine over conflicts
    /// that no more may be.
    pub(crate) async fn bound_conflicts(&self, attachment: &AttachmentKey, bad: IpAddr) -> Result<(), LeaseError> {
        let lease = AddressSource::held(self, attachment).await?;
        let held = lease.iter().flat_map(|lease| &lease.addresses).find(|held| held.address.addr() == bad);
        // What it does not hold, or not from here, is not replaced either.
        let Some(pool) = held.and_then(|held| self.layout().pools.iter().find(|pool| pool.name == held.pool)) else {
            return Ok(());
        };
        let (family, now) = (Addr::from(bad).family, self.now());
        let prefix = quarantine_prefix(&pool.space, family);
        let mut slots = Vec::new();
        for (key, _) in self.scan_all(&prefix).await? {
            let address = Addr { family, bits: number_of(&prefix, &key).map_err(store_error)? };
            if pool.subnet.contains(&address.ip()) {
                slots.push(slot_key(&pool.space, address));
            }
        }
        let mut holders: BTreeMap<MacAddr, usize> = BTreeMap::new();
        for keys in slots.chunks(SLOTS) {
            let entries = self.store().read(keys).await.map_err(store_error)?;
            for (key, entry) in keys.iter().zip(entries).filter_map(|(key, entry)| Some((key, entry?))) {
                if let SlotRecord::Quarantined { until, mac: Some(mac), from: Some(_), .. } = decode(key, &entry)?
                    && until.is_none_or(|until| until > now)
                {
                    *holders.entry(mac).or_default() += 1;
                }
            }
        }
        let live = holders.values().sum();
        let limit = usize::try_from(pool.size() / 8).unwrap_or(usize::MAX).clamp(FEWEST_CONFLICTS, MOST_CONFLICTS);
        if live < limit {
            return Ok(());
        }
        let mut holders: Vec<(MacAddr, usize)> = holders.into_iter().collect();
        holders.sort_by_key(|(_, count)| Reverse(*count));
        let named: Vec<String> = holders.iter().take(NAMED).map(|(mac, count)| format!("{mac} ({count})")).collect();
        let more = holders.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        Err(LeaseError::Contested { pool: pool.name.clone(), live, holders: format!("{}{more}", named.join(", ")) })
    }

    /// Turns what has ended into what it counts as: addresses kept or in quarantine for a time become released ones, and
    /// handovers are aborted. Nothing else depends on it; a daemon calls it now and then, so that listings are short and
    /// reuse is in order. Returns how many addresses changed.
    pub async fn expire(&self) -> Result<usize, LeaseError> {
        let mut changed = 0;
        for (space, address, _) in self.ending(self.now()).await? {
            changed += usize::from(self.is_done(&Command::Expire { space, address: address.ip() }).await?);
        }
        Ok(changed)
    }

    /// What ends at a time or before.
    async fn ending(&self, limit: u64) -> Result<Vec<(AddressSpace, Addr, SlotRecord)>, LeaseError> {
        let mut found = Vec::new();
        for (space, family) in self.families_of_spaces() {
            let prefix = due_prefix(space, family);
            for (key, _) in self.scan_all(&prefix).await? {
                let Some((at, bits)) = freed_of(&prefix, &key) else { continue };
                if at > limit {
                    break;
                }
                let address = Addr { family, bits };
                if let Some(slot) = self.slot(space, address).await? {
                    found.push((space.clone(), address, slot));
                }
            }
        }
        Ok(found)
    }

    async fn slot(&self, space: &AddressSpace, address: Addr) -> Result<Option<SlotRecord>, LeaseError> {
        let key = slot_key(space, address);
        let entry =
            self.store().read(std::slice::from_ref(&key)).await.map_err(store_error)?.into_iter().next().flatten();
        entry.map(|entry| decode(&key, &entry)).transpose()
    }

    async fn is_done(&self, command: &Command) -> Result<bool, LeaseError> {
        Ok(self.run(command).await? == Reply::Done)
    }
}

/// How many addresses of a pool may be in quarantine over conflicts at a time: an eighth, within these bounds.
const FEWEST_CONFLICTS: usize = 16;
const MOST_CONFLICTS: usize = 1024;
/// Holders that an error names.
const NAMED: usize = 4;
/// Slots read at a time.
const SLOTS: usize = 64;
