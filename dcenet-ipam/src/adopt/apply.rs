//! Carrying a plan out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use dcenet_core::provider::LeaseError;

use super::plan::{Outside, Plan, Refusal, Why};
use super::{AdoptedBy, Adoptee, Origin};
use crate::Ipam;
use crate::config::AddressRange;
use crate::ipam::{decode, store_error};
use crate::machine::{Command, Query, Step, View, step};
use crate::model::{Addr, AddressSpace};
use crate::record::{SlotRecord, attachment_key, claim_key, slot_key};
use crate::store::{Batch, Guard, Key, Outcome, Write};

/// Owners that are decided and committed together.
pub(super) const CHUNK: usize = 1024;
/// Rounds of reading after which deciding gives up: it is read twice at most, and again after each race.
const ROUNDS: u32 = 32;
/// Lost races, or unknown outcomes, after which an owner is given up.
const TRIES: u32 = 64;

/// What was adopted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Attachments that have a lease now.
    pub attachments: usize,
    /// Claims that keep an address now.
    pub claims: usize,
    /// Addresses of both.
    pub addresses: usize,
    /// Addresses that are reserved now.
    pub reserved: usize,
    /// Owners of the plan who had everything already.
    pub present: usize,
}

/// Why a plan was not carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// Entries are refused that the caller did not accept. Nothing of the plan is done but `left`.
    #[error(
        "{} entries are refused, the first: {}; remove the causes and plan again, or accept the refusals by their \
         origins{}",
        refused.len(), Shown(refused.first()), Left(left)
    )]
    Refused {
        /// What is refused.
        refused: Vec<Refusal>,
        /// Owners who were adopted before a refusal came up in a race, and could not be put back, for they have changed
        /// since.
        left: Vec<AdoptedBy>,
    },
    /// The store failed, perhaps half way. Carrying the same plan out again completes it.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

struct Shown<'a>(Option<&'a Refusal>);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |refusal| refusal.fmt(f))
    }
}

struct Left<'a>(&'a [AdoptedBy]);

impl std::fmt::Display for Left<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.len() {
            0 => Ok(()),
            left => write!(f, "; {left} owners have changed since they were adopted, and stay"),
        }
    }
}

/// What the allocator says to an owner.
pub(super) enum Verdict {
    /// This must be committed.
    Commit(Box<Drafted>),
    /// It is so already.
    Done,
    Refused(LeaseError),
    /// Nothing is against it, once the pools of the configuration are registered.
    Unregistered,
}

/// A batch, and what takes it back.
pub(super) struct Drafted {
    batch: Batch,
    undo: Vec<Write>,
}

impl Drafted {
    fn new(batch: Batch, view: &View) -> Self {
        let undo = batch.writes.iter().map(|write| match (write, view.known(write.key())) {
            (write, Some(Some(before))) => Write::Put(write.key().to_vec(), before.value.clone()),
            // Rows of queues are deleted unread, and empty.
            (Write::Delete(key), _) => Write::Put(key.clone(), Vec::new()),
            (Write::Put(key, _), _) => Write::Delete(key.clone()),
        });
        Self { undo: undo.collect(), batch }
    }

    /// Takes back what the commit of the revision did, unless one of its records has changed since.
    fn undo(self, revision: u64, request_id: u128) -> Batch {
        let record = |key: &[u8]| [b"s/", b"t/", b"c/"].iter().any(|prefix| key.starts_with(*prefix));
        let puts = self.batch.writes.iter().filter(|write| matches!(write, Write::Put(key, _) if record(key)));
        let guards = puts.map(|write| Guard { key: write.key().to_vec(), version: Some(revision) }).collect();
        Batch { guards, writes: self.undo, request_id }
    }
}

/// What a call has done so far.
#[derive(Default)]
struct Doing {
    adopted: Adopted,
    /// Commits with their revisions.
    done: Vec<(AdoptedBy, Drafted, u64)>,
    reserved: Vec<Outside>,
}

impl Ipam {
    /// Carries a plan out: all of it, or nothing. Of the plan's refusals those count as accepted whose origins are in
    /// `accepted`; what is refused is left out, and all else done.
    ///
    /// It may be repeated, after success, after a crash and after an error.
    ///
    /// # Errors
    /// [`AdoptError::Refused`] if something is refused that was not accepted, by the plan or since; then nothing is done.
    pub async fn adopt(&self, plan: &Plan, accepted: &BTreeSet<Origin>) -> Result<Adopted, AdoptError> {
        let open = plan.refused.iter().filter(|refusal| !accepted.contains(&refusal.origin));
        let refused: Vec<Refusal> = open.cloned().collect();
        if !refused.is_empty() {
            return Err(AdoptError::Refused { refused, left: Vec::new() });
        }
        let drafts = self.look_over(plan).await?;
        let mut doing = Doing::default();
        doing.adopted.present = plan.present.len() + plan.adoptees.len() - drafts.len();
        let refused = match self.reserve_outside(plan, &mut doing).await? {
            refused if refused.is_empty() => self.commit_all(plan, drafts, &mut doing).await?,
            refused => refused,
        };
        if refused.is_empty() {
            return Ok(doing.adopted);
        }
        let left = self.take_back_all(doing).await?;
        Err(AdoptError::Refused { refused, left })
    }

    /// Has everything decided before anything is done.
    async fn look_over<'p>(&self, plan: &'p Plan) -> Result<Vec<(&'p Adoptee, Box<Drafted>)>, AdoptError> {
        let mut drafts = Vec::with_capacity(plan.adoptees.len());
        let mut refused = Vec::new();
        let mut registered = false;
        for chunk in plan.adoptees.chunks(CHUNK) {
            let mut verdicts = self.judge(chunk).await?;
            if !registered && verdicts.iter().any(|verdict| matches!(verdict, Verdict::Unregistered)) {
                self.register().await?;
                verdicts = self.judge(chunk).await?;
            }
            registered = true;
            for (adoptee, verdict) in chunk.iter().zip(verdicts) {
                match verdict {
                    Verdict::Commit(draft) => drafts.push((adoptee, draft)),
                    Verdict::Done => {}
                    Verdict::Refused(error) => refused.extend(refusals(plan, adoptee, &error)),
                    Verdict::Unregistered => return Err(turns().into()),
                }
            }
        }
        for (outside, user) in plan.outside.iter().zip(self.users_outside(&plan.outside).await?) {
            if let Some(holder) = user.filter(|user| *user != outside.holder) {
                refused.push(held_outside(outside, holder));
            }
        }
        if refused.is_empty() { Ok(drafts) } else { Err(AdoptError::Refused { refused, left: Vec::new() }) }
    }

    async fn reserve_outside(&self, plan: &Plan, doing: &mut Doing) -> Result<Vec<Refusal>, LeaseError> {
        for outside in &plan.outside {
            match self.reserve_external(&outside.space, single(outside.address), &outside.holder).await {
                Ok(true) => {
                    doing.adopted.reserved += 1;
                    doing.reserved.push(outside.clone());
                }
                Ok(false) => {}
                Err(LeaseError::Held { holder, .. }) => return Ok(vec![held_outside(outside, holder)]),
                Err(error) => return Err(error),
            }
        }
        Ok(Vec::new())
    }

    /// Commits chunk by chunk. Returns what is refused by now.
    async fn commit_all(
        &self,
        plan: &Plan,
        drafts: Vec<(&Adoptee, Box<Drafted>)>,
        doing: &mut Doing,
    ) -> Result<Vec<Refusal>, LeaseError> {
        let mut drafts = drafts.into_iter();
        loop {
            let mut open: Vec<(&Adoptee, Box<Drafted>)> = drafts.by_ref().take(CHUNK).collect();
            if open.is_empty() {
                return Ok(Vec::new());
            }
            for tries in 0.. {
                if tries == TRIES {
                    return Err(LeaseError::Busy(format!("{TRIES} races were lost in a row")));
                }
                let lost = self.commit_some(open, doing).await?;
                if lost.is_empty() {
                    break;
                }
                let refused;
                (open, refused) = self.decide_again(plan, lost, doing).await?;
                if !refused.is_empty() {
                    return Ok(refused);
                }
                if open.is_empty() {
                    break;
                }
            }
        }
    }

    /// Commits what it can. Returns the rest, each with whether it is known that it was not committed, for it lost a race.
    async fn commit_some<'p>(
        &self,
        mut open: Vec<(&'p Adoptee, Box<Drafted>)>,
        doing: &mut Doing,
    ) -> Result<Vec<(&'p Adoptee, Box<Drafted>, bool)>, LeaseError> {
        let mut batches = Vec::with_capacity(open.len());
        for (_, draft) in &mut open {
            draft.batch.request_id = self.request_id();
            batches.push(draft.batch.clone());
        }
        let outcomes = self.store().commit_many(&batches).await;
        let mut lost = Vec::new();
        let mut failed = None;
        for ((adoptee, draft), outcome) in open.into_iter().zip(outcomes) {
            match outcome {
                Ok(Outcome::Committed { revision }) => doing.note(adoptee, *draft, revision),
                Ok(Outcome::Conflict(_)) => lost.push((adoptee, draft, true)),
                Ok(Outcome::Unknown { .. }) => lost.push((adoptee, draft, false)),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            None => Ok(lost),
            Some(error) => Err(store_error(error)),
        }
    }

    async fn decide_again<'p>(
        &self,
        plan: &Plan,
        lost: Vec<(&'p Adoptee, Box<Drafted>, bool)>,
        doing: &mut Doing,
    ) -> Result<(Vec<(&'p Adoptee, Box<Drafted>)>, Vec<Refusal>), LeaseError> {
        let adoptees: Vec<Adoptee> = lost.iter().map(|(adoptee, ..)| (*adoptee).clone()).collect();
        let (mut open, mut refused) = (Vec::new(), Vec::new());
        let mut registered = false;
        for ((adoptee, before, overtaken), verdict) in lost.into_iter().zip(self.judge(&adoptees).await?) {
            match verdict {
                Verdict::Commit(draft) => open.push((adoptee, draft)),
                // Another who carries out the same plan was faster: it is his to undo.
                Verdict::Done if overtaken => doing.adopted.present += 1,
                // Our commit, whose outcome was not known.
                Verdict::Done => {
                    let key = own_key(adoptee);
                    let entries = self.store().read(std::slice::from_ref(&key)).await.map_err(store_error)?;
                    if let Some(entry) = entries.into_iter().next().flatten() {
                        doing.note(adoptee, *before, entry.version);
                    }
                }
                Verdict::Refused(error) => refused.extend(refusals(plan, adoptee, &error)),
                Verdict::Unregistered if registered => return Err(turns()),
                Verdict::Unregistered => {
                    self.register().await?;
                    registered = true;
                    open.push((adoptee, before));
                }
            }
        }
        Ok((open, refused))
    }

    /// Puts back what was done, but for what has changed since, which it returns.
    async fn take_back_all(&self, doing: Doing) -> Result<Vec<AdoptedBy>, LeaseError> {
        let mut left = Vec::new();
        let mut done = doing.done.into_iter().rev();
        loop {
            let (mut owners, mut batches) = (Vec::new(), Vec::new());
            for (by, draft, revision) in done.by_ref().take(CHUNK) {
                owners.push(by);
                batches.push(draft.undo(revision, self.request_id()));
            }
            if batches.is_empty() {
                break;
            }
            let outcomes = self.store().commit_many(&batches).await;
            let undone = |outcome: &Result<Outcome, _>| matches!(outcome, Ok(Outcome::Committed { .. }));
            left.extend(owners.into_iter().zip(&outcomes).filter(|(_, o)| !undone(o)).map(|(by, _)| by));
        }
        for outside in doing.reserved {
            self.unreserve_external(&outside.space, single(outside.address), &outside.holder).await?;
        }
        Ok(left)
    }

    /// What the allocator says to each owner, from what the store holds now.
    pub(super) async fn judge(&self, adoptees: &[Adoptee]) -> Result<Vec<Verdict>, LeaseError> {
        let commands: Vec<Command> = adoptees.iter().cloned().map(Command::Adopt).collect();
        let mut verdicts: BTreeMap<usize, Verdict> = BTreeMap::new();
        let mut view = View::default();
        for _ in 0..ROUNDS {
            let (now, mut queries, mut stale) = (self.now(), BTreeSet::new(), false);
            for (i, command) in commands.iter().enumerate() {
                if verdicts.contains_key(&i) {
                    continue;
                }
                let verdict = match step(self.layout(), &view, command, now, 0) {
                    Ok(Step::Read(more)) => {
                        queries.extend(more);
                        continue;
                    }
                    Ok(Step::Stale) => {
                        stale = true;
                        continue;
                    }
                    Ok(Step::Commit(batch, _)) => Verdict::Commit(Box::new(Drafted::new(batch, &view))),
                    Ok(Step::Done(_)) => Verdict::Done,
                    Ok(Step::Unregistered) => Verdict::Unregistered,
                    Err(error) => Verdict::Refused(error),
                };
                verdicts.insert(i, verdict);
            }
            if verdicts.len() == commands.len() {
                return Ok(verdicts.into_values().collect());
            }
            if stale {
                view = View::default();
            } else {
                self.look_up(&mut view, queries).await?;
            }
        }
        Err(LeaseError::Busy(format!("the store changed {ROUNDS} times while it was read")))
    }

    /// Whether the pools of the configuration could be registered.
    pub(super) async fn can_register(&self) -> Result<(), LeaseError> {
        let mut view = View::default();
        while let Step::Read(queries) =
            step(self.layout(), &view, &Command::Register { recorded: false }, self.now(), 0)?
        {
            self.look_up(&mut view, queries).await?;
        }
        Ok(())
    }

    /// Reads for many commands at once.
    async fn look_up(&self, view: &mut View, queries: impl IntoIterator<Item = Query>) -> Result<(), LeaseError> {
        let mut keys: Vec<Key> = Vec::new();
        for query in queries {
            match &query {
                Query::Key(key) => keys.push(key.clone()),
                Query::Gap(prefix, low, high) => {
                    let gap = self.store().first_gap(prefix, *low..=*high).await.map_err(store_error)?;
                    view.learn_gap(query, gap);
                }
                Query::Scan(prefix, after, limit) => {
                    let found = self.store().scan(prefix, after.as_deref(), *limit).await.map_err(store_error)?;
                    view.learn_scan(query, found.into_iter().map(|(key, _)| key).collect());
                }
            }
        }
        for keys in keys.chunks(self.store().caps().max_operations.max(1)) {
            let entries = self.store().read(keys).await.map_err(store_error)?;
            for (key, entry) in keys.iter().zip(entries) {
                view.learn_key(key.clone(), entry);
            }
        }
        Ok(())
    }

    /// Who has each address here, in words; the holder himself if it is reserved for him already.
    pub(super) async fn users_outside(&self, all: &[Outside]) -> Result<Vec<Option<String>>, LeaseError> {
        let mut reservations: BTreeMap<&AddressSpace, Vec<(Addr, Addr, String)>> = BTreeMap::new();
        for outside in all {
            if !reservations.contains_key(&outside.space) {
                let mut found: Vec<(Addr, Addr, String)> = Vec::new();
                for reservation in self.reservations(&outside.space).await? {
                    let range = reservation.range;
                    found.push((Addr::from(range.first), Addr::from(range.last), reservation.holder));
                }
                reservations.insert(&outside.space, found);
            }
        }
        let keys: Vec<Key> = all.iter().map(|o| slot_key(&o.space, Addr::from(o.address))).collect();
        let mut users = Vec::with_capacity(all.len());
        for (keys, all) in keys.chunks(CHUNK).zip(all.chunks(CHUNK)) {
            let mut view = View::default();
            self.look_up(&mut view, keys.iter().cloned().map(Query::Key)).await?;
            for (key, outside) in keys.iter().zip(all) {
                let address = Addr::from(outside.address);
                let recorded = &reservations[&outside.space];
                // They are disjoint and in order.
                let at = recorded.partition_point(|(first, ..)| *first <= address);
                let recorded = recorded[..at].last().filter(|(_, last, _)| *last >= address);
                let written = self.layout().reservation(&outside.space, address);
                let slot = view.known(key).flatten().map(|entry| decode::<SlotRecord>(key, entry)).transpose()?;
                let by = match &slot {
                    Some(SlotRecord::Bound { by, .. } | SlotRecord::Handover { by, .. }) => Some(by.to_string()),
                    Some(SlotRecord::Kept { claim, .. }) => Some(format!("claim {claim}")),
                    _ => None,
                };
                let reserved = recorded.map(|(.., holder)| holder).or(written.map(|reserved| &reserved.holder));
                users.push(match reserved {
                    Some(holder) if *holder == outside.holder => Some(holder.clone()),
                    Some(holder) => Some(format!("reservation {holder}")),
                    None => by,
                });
            }
        }
        Ok(users)
    }
}

impl Doing {
    fn note(&mut self, adoptee: &Adoptee, draft: Drafted, revision: u64) {
        match adoptee.by {
            AdoptedBy::Attachment { .. } => self.adopted.attachments += 1,
            AdoptedBy::Claim { .. } => self.adopted.claims += 1,
        }
        self.adopted.addresses += adoptee.addresses.len();
        self.done.push((adoptee.by.clone(), draft, revision));
    }
}

/// The record that an owner has of its own.
fn own_key(adoptee: &Adoptee) -> Key {
    match (&adoptee.by, adoptee.addresses.first()) {
        (AdoptedBy::Attachment { attachment, .. }, _) => attachment_key(attachment),
        (AdoptedBy::Claim { claim, .. }, Some(address)) => {
            claim_key(&adoptee.space, Addr::from(address.address).family, claim)
        }
        (AdoptedBy::Claim { .. }, None) => Key::new(),
    }
}

fn single(address: IpAddr) -> AddressRange {
    AddressRange { first: address, last: address }
}

fn held_outside(outside: &Outside, holder: String) -> Refusal {
    let Outside { address, holder: owner, origin, .. } = outside.clone();
    Refusal { origin, address: Some(address), owner, why: Why::Held { holder } }
}

fn turns() -> LeaseError {
    LeaseError::Busy("the pools of this configuration are registered and removed by turns".to_owned())
}

/// A refusal of each address that an error is about.
fn refusals(plan: &Plan, adoptee: &Adoptee, error: &LeaseError) -> Vec<Refusal> {
    let (about, why) = match error {
        LeaseError::Held { address, holder } => (Some(*address), Why::Held { holder: holder.clone() }),
        error => (None, Why::Unsuitable { reason: error.to_string() }),
    };
    let owner = match &adoptee.by {
        AdoptedBy::Attachment { attachment, .. } => attachment.to_string(),
        AdoptedBy::Claim { claim, .. } => format!("claim {claim}"),
    };
    let of = |address: IpAddr| Refusal {
        origin: plan.origins.get(&address).cloned().unwrap_or_else(|| Origin::new("", "")),
        address: Some(address),
        owner: owner.clone(),
        why: why.clone(),
    };
    let all = adoptee.addresses.iter().map(|a| a.address);
    all.filter(|address| about.is_none_or(|about| about == *address)).map(of).collect()
}
