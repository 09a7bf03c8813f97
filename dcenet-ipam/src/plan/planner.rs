//! The plan over a store.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use parking_lot::Mutex;

use super::advice::{Advice, advise};
use super::block::Block;
use super::document::{Document, ImportReport};
use super::error::{Holder, PlanError};
use super::machine::{Command, Reply, SpaceView, Step, View, barrier, check_name, spaces_of, step};
use super::model::{
    Claim, Grant, Holding, Level, Orders, Prefix, Purpose, Receipt, Revocation, State, Statement, Utilisation,
};
use super::record::{
    ChangeRecord, Delta, EpochRecord, Node, PrefixRecord, Registry, Tombstone, change_key, change_of, changes,
    epoch_key, node_of, prefixes, registry_key, tombstone_of, tombstones,
};
use super::table::Tree;
use crate::config::PoolConfig;
use crate::ipam::random_id;
use crate::model::AddressSpace;
use crate::store::{Entry, Key, Outcome, Store, require_atomic};

/// The prefixes that one authority owns, in its store.
///
/// Several processes may plan over one store. What is known of the store is kept between calls and brought up to date
/// by each, so that a call costs two reads and a commit, however large the tree.
#[derive(Debug)]
pub struct Plan {
    store: Arc<dyn Store>,
    authority: String,
    view: Mutex<View>,
}

/// What became of a revocation at its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Surrender {
    /// It is given back. Hand the receipt to the parent, as often as need be.
    Returned(Receipt),
    /// There is something in it. Nothing new is claimed in it; once it is empty, surrender it again.
    Draining(Prefix),
}

/// What became of [`Orders`].
#[derive(Debug, Default)]
pub struct Obeyed {
    /// Grants that are in force now.
    pub accepted: Vec<Prefix>,
    /// For the parent.
    pub receipts: Vec<Receipt>,
    /// Still in use: empty them, then state and obey again.
    pub draining: Vec<Prefix>,
    /// What was refused, and why: out of date, or in contradiction to what is held. The rest was done.
    pub refused: Vec<(IpNet, PlanError)>,
}

impl Plan {
    /// The plan of an authority over its store. The authority is the fleet, or the owner whose delegations are accepted
    /// here, such as a cluster's name.
    ///
    /// # Errors
    /// The name is malformed, or the store's batches are not atomic.
    pub fn new(store: Arc<dyn Store>, authority: &str) -> Result<Self, PlanError> {
        check_name("authority", authority)?;
        require_atomic(&*store)?;
        Ok(Self { store, authority: authority.to_owned(), view: Mutex::default() })
    }

    /// Who owns what is planned here.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Adds a space, or changes its rules. Prefixes of the purposes in `unique` overlap nothing in other spaces; for
    /// all others the same prefix may be used once in each space. A prefix that is delegated for [`Purpose::Any`] counts
    /// as used for every purpose.
    ///
    /// # Errors
    /// [`PlanError::Overlap`] if what is there breaks the new rules.
    pub async fn add_space(&self, space: &AddressSpace, unique: &[Purpose]) -> Result<(), PlanError> {
        self.run(&Command::AddSpace { space: space.clone(), unique: unique.to_vec() }).await.map(drop)
    }

    /// Enters a prefix that comes from outside the plan: a registry's, or a site's private one. The claim must name the
    /// prefix. May be repeated.
    ///
    /// # Errors
    /// [`PlanError::Overlap`] with the holder's name.
    pub async fn own(&self, claim: &Claim) -> Result<Prefix, PlanError> {
        self.prefix(&Command::Own(claim.clone())).await
    }

    /// Claims a prefix in one that this authority holds. May be repeated: the same claim gets the same prefix.
    ///
    /// # Errors
    /// [`PlanError::Overlap`] with the holder's name and path, [`PlanError::Exhausted`], [`PlanError::Delegated`],
    /// [`PlanError::Closing`], [`PlanError::Outside`], [`PlanError::Name`], [`PlanError::Purpose`].
    pub async fn claim(&self, claim: &Claim) -> Result<Prefix, PlanError> {
        self.prefix(&Command::Claim(claim.clone())).await
    }

    /// Gives a prefix back to the one that it was claimed in. Returns whether it was held.
    ///
    /// # Errors
    /// [`PlanError::NotEmpty`], [`PlanError::Delegated`]; [`PlanError::Stale`] if it was released and claimed again since.
    pub async fn release(&self, prefix: &Prefix) -> Result<bool, PlanError> {
        Ok(!matches!(self.run(&Command::Release(prefix.clone())).await?, Reply::NotHeld))
    }

    /// Puts a claimed prefix into its owner's hands. From then on only the owner claims in it, from the grant alone.
    /// May be repeated: the same grant is returned.
    ///
    /// # Errors
    /// [`PlanError::NotEmpty`] if something was claimed in it here; [`PlanError::State`] for a pool, for what is asked
    /// back, and for what belongs to this authority itself.
    pub async fn delegate(&self, space: &AddressSpace, cidr: IpNet, level: Level) -> Result<Grant, PlanError> {
        match self.run(&Command::Delegate { space: space.clone(), cidr, level }).await? {
            Reply::Grant(grant) => Ok(*grant),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Takes a granted prefix into this authority's hands. May be repeated.
    ///
    /// # Errors
    /// [`PlanError::Stale`] if it was given back since, or is held by a later grant; [`PlanError::Misdirected`];
    /// [`PlanError::Overlap`] if something here has addresses of it.
    pub async fn accept(&self, grant: &Grant) -> Result<Prefix, PlanError> {
        self.prefix(&Command::Accept(grant.clone())).await
    }

    /// Asks a delegated prefix back. It stays its owner's until the owner's receipt is settled. May be repeated.
    ///
    /// # Errors
    /// [`PlanError::State`] if it is not delegated.
    pub async fn revoke(&self, space: &AddressSpace, cidr: IpNet, level: Level) -> Result<Revocation, PlanError> {
        match self.run(&Command::Revoke { space: space.clone(), cidr, level }).await? {
            Reply::Revocation(revocation) => Ok(*revocation),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Gives a granted prefix back to the parent, or begins to. May be repeated: the same receipt is returned.
    ///
    /// # Errors
    /// [`PlanError::Stale`] if it was granted again since.
    pub async fn surrender(&self, revocation: &Revocation) -> Result<Surrender, PlanError> {
        self.give_up(revocation, false).await
    }

    async fn give_up(&self, revocation: &Revocation, lost: bool) -> Result<Surrender, PlanError> {
        match self.run(&Command::Surrender { revocation: revocation.clone(), lost }).await? {
            Reply::Receipt(receipt) => Ok(Surrender::Returned(*receipt)),
            Reply::Draining(prefix) => Ok(Surrender::Draining(*prefix)),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Frees a delegated prefix that its owner has given back. Returns whether this ended a delegation: a receipt of a
    /// grant that is over already ends nothing, least of all a later grant.
    ///
    /// # Errors
    /// [`PlanError::Stale`] if the receipt is of a grant that this store does not know yet.
    pub async fn settle(&self, receipt: &Receipt) -> Result<bool, PlanError> {
        Ok(!matches!(self.run(&Command::Settle(receipt.clone())).await?, Reply::NotHeld))
    }

    /// Frees a prefix that was asked back on the caller's word that its owner will never use it again: the cluster is
    /// destroyed, or cut off for good. If the word is wrong, two clusters may use the same addresses; the owner learns of
    /// it when it is back, by [`Plan::orders`].
    ///
    /// # Errors
    /// [`PlanError::State`] if it was not revoked before, [`PlanError::Stale`] if it was granted again since.
    pub async fn attest_gone(&self, revocation: &Revocation) -> Result<bool, PlanError> {
        let Revocation { space, cidr, level, owner, epoch } = revocation.clone();
        let receipt = Receipt { space, cidr, level, owner, epoch };
        Ok(!matches!(self.run(&Command::Attest(receipt)).await?, Reply::NotHeld))
    }

    /// What was granted to this authority and is still held. For the parent, whenever both can be reached.
    pub async fn statement(&self) -> Result<Statement, PlanError> {
        let mut holdings = Vec::new();
        for space in self.spaces().await? {
            self.read(&space, |known| {
                for (node, held) in known.index.iter() {
                    let Some(mark) = &held.record.grant else { continue };
                    let (cidr, level) = (node.block.cidr(), node.level);
                    holdings.push(Holding { space: space.clone(), cidr, level, epoch: mark.epoch });
                }
            })
            .await?;
        }
        Ok(Statement { owner: self.authority.clone(), holdings })
    }

    /// What an owner must hear, given what it holds. Nothing is changed.
    ///
    /// # Errors
    /// [`PlanError::Behind`] if the owner holds what was granted after this store's last change.
    pub async fn orders(&self, statement: &Statement) -> Result<Orders, PlanError> {
        let mut orders = Orders::default();
        let mut known = Vec::new();
        let mut spaces = self.spaces().await?;
        spaces.extend(statement.holdings.iter().map(|holding| holding.space.clone()));
        spaces.sort_unstable();
        spaces.dedup();
        for space in spaces {
            let epoch = self
                .read(&space, |view| {
                    let delegated = view.index.iter().filter(|(_, held)| {
                        held.record.owner == statement.owner
                            && matches!(held.record.state, State::Delegated | State::Revoking)
                    });
                    known.extend(delegated.map(|(node, held)| (space.clone(), *node, held.record.clone())));
                    view.epoch
                })
                .await?;
            if let Some(holding) = statement.holdings.iter().find(|h| h.space == space && h.epoch > epoch) {
                let (cidr, granted, space) = (holding.cidr, holding.epoch, space.clone());
                return Err(PlanError::Behind { cidr, granted, current: epoch, space });
            }
        }
        let holds = |holding: &Holding, (space, node, record): &(AddressSpace, Node, PrefixRecord)| {
            let there = (holding.cidr, holding.level, holding.epoch);
            holding.space == *space && there == (node.block.cidr(), node.level, record.epoch)
        };
        for delegated in &known {
            let (space, node, record) = delegated;
            if record.state == State::Revoking {
                let (cidr, level) = (node.block.cidr(), node.level);
                orders.revocations.push(self.revoke(space, cidr, level).await?);
            } else if !statement.holdings.iter().any(|h| holds(h, delegated)) {
                orders.grants.push(self.delegate(space, node.block.cidr(), node.level).await?);
            }
        }
        for holding in &statement.holdings {
            let Holding { space, cidr, level, epoch } = holding.clone();
            if !known.iter().any(|delegated| holds(holding, delegated)) {
                orders.lost.push(Revocation { space, cidr, level, owner: statement.owner.clone(), epoch });
            }
        }
        Ok(orders)
    }

    /// Does what the parent says. May be repeated, and orders may come late or twice.
    ///
    /// # Errors
    /// The store failed. What was refused is in the answer.
    pub async fn obey(&self, orders: &Orders) -> Result<Obeyed, PlanError> {
        let mut done = Obeyed::default();
        // What is lost first: a grant may be of the same addresses.
        let closing = orders.lost.iter().map(|r| (r, true)).chain(orders.revocations.iter().map(|r| (r, false)));
        for (revocation, lost) in closing {
            match self.give_up(revocation, lost).await {
                Ok(Surrender::Returned(receipt)) => done.receipts.push(receipt),
                Ok(Surrender::Draining(prefix)) => done.draining.push(prefix),
                Err(error) => done.refuse(revocation.cidr, error)?,
            }
        }
        for grant in &orders.grants {
            match self.accept(grant).await {
                Ok(prefix) => done.accepted.push(prefix),
                Err(error) => done.refuse(grant.cidr, error)?,
            }
        }
        Ok(done)
    }

    /// Enters prefixes that exist already: all of them, or none and a report of what stands against it. What contains
    /// nothing of the plan and is in nothing of it comes to the top.
    ///
    /// # Errors
    /// [`PlanError::TooLarge`] if the store cannot take it at once.
    pub async fn import(&self, document: &Document) -> Result<ImportReport, PlanError> {
        self.enter(document, false).await
    }

    /// What [`Plan::import`] would do. Nothing is changed.
    pub async fn dry_run(&self, document: &Document) -> Result<ImportReport, PlanError> {
        self.enter(document, true).await
    }

    async fn enter(&self, document: &Document, dry_run: bool) -> Result<ImportReport, PlanError> {
        match self.run(&Command::Import { document: document.clone(), dry_run }).await? {
            Reply::Imported(report) => Ok(report),
            reply => Err(unexpected(&reply)),
        }
    }

    /// A space as a document that [`Plan::import`] takes. Delegations are prefixes like others in it.
    pub async fn document(&self, space: &AddressSpace) -> Result<Document, PlanError> {
        self.read(space, |known| Document::of(space, &known.index)).await
    }

    /// A space as a table.
    pub async fn tree(&self, space: &AddressSpace) -> Result<Tree, PlanError> {
        self.read(space, |known| Tree::of(space, known.epoch, &known.index)).await
    }

    /// The spaces.
    pub async fn spaces(&self) -> Result<Vec<AddressSpace>, PlanError> {
        self.refresh_registry().await?;
        let view = self.view.lock();
        let names = view.registry.iter().flat_map(|(registry, _)| registry.spaces.keys());
        Ok(names.filter_map(|name| name.parse().ok()).collect())
    }

    /// One prefix.
    pub async fn get(&self, space: &AddressSpace, cidr: IpNet, level: Level) -> Result<Option<Prefix>, PlanError> {
        let node = Node { block: Block::check("cidr", &cidr)?, level };
        self.read(space, |known| known.index.prefix(space, &node)).await
    }

    /// How full a prefix is.
    pub async fn utilisation(
        &self,
        space: &AddressSpace,
        cidr: IpNet,
        level: Level,
    ) -> Result<Option<Utilisation>, PlanError> {
        let node = Node { block: Block::check("cidr", &cidr)?, level };
        self.read(space, |known| known.index.utilisation(&node)).await
    }

    /// Who has addresses of a prefix: the smallest prefix around it, else the first inside.
    pub async fn holder(&self, space: &AddressSpace, cidr: IpNet) -> Result<Option<Holder>, PlanError> {
        let block = Block::check("cidr", &cidr)?;
        self.read(space, |known| known.index.overlapping(&block).map(|node| *known.index.holder(space, &node))).await
    }

    /// How to get a free prefix of `length` in a prefix. Nothing of it is done.
    ///
    /// # Errors
    /// [`PlanError::Unknown`], or [`PlanError::Invalid`] for a length that is not inside the prefix.
    pub async fn advise(
        &self,
        space: &AddressSpace,
        cidr: IpNet,
        level: Level,
        length: u8,
    ) -> Result<Advice, PlanError> {
        let block = Block::check("cidr", &cidr)?;
        if !(block.length..=block.family.bits()).contains(&length) {
            let reason = format!("is no prefix length inside {cidr}");
            return Err(PlanError::Invalid { field: "length".to_owned(), value: length.to_string(), reason });
        }
        let advice = self.read(space, |known| advise(space, &known.index, &Node { block, level }, length)).await?;
        advice.ok_or_else(|| PlanError::Unknown { cidr, level: Some(level), space: space.clone() })
    }

    /// Checks that the subnet of a pool is claimed here as a pool of its name, and returns that prefix. Whoever leases
    /// from the pool then leases nothing that another cluster has.
    ///
    /// # Errors
    /// [`PlanError::Unclaimed`] if this authority holds the addresses and the pool was not claimed yet,
    /// [`PlanError::Outside`] if it does not hold them, [`PlanError::Overlap`] if another prefix has them.
    pub async fn verify(&self, pool: &PoolConfig) -> Result<Prefix, PlanError> {
        let space = pool_space(pool)?;
        let block = Block::check("subnet", &pool.subnet)?;
        self.read(&space, |known| {
            let index = &known.index;
            let Some(node) = index.around(&block) else {
                let (cidr, space, authority) = (pool.subnet, space.clone(), self.authority.clone());
                return Err(match index.inside(&block).next() {
                    Some((node, _)) => PlanError::Overlap { cidr, holder: index.holder(&space, node) },
                    None => PlanError::Outside { cidr, space, authority },
                });
            };
            let closed = index
                .chain(&node)
                .into_iter()
                .find(|(_, held)| matches!(held.record.state, State::Delegated | State::Revoking | State::Lost));
            if let Some((closed, held)) = closed {
                let holder = index.holder(&space, &closed);
                return Err(match held.record.state {
                    State::Lost => PlanError::Closing { holder },
                    _ => PlanError::Delegated { holder },
                });
            }
            let cidr = pool.subnet;
            match index.prefix(&space, &node) {
                Some(prefix) if prefix.level == Level::Pool && prefix.name == pool.name => Ok(prefix),
                Some(prefix) if prefix.level == Level::Pool => {
                    Err(PlanError::Overlap { cidr, holder: index.holder(&space, &node) })
                }
                _ => match index.inside(&block).next() {
                    Some((other, _)) => Err(PlanError::Overlap { cidr, holder: index.holder(&space, other) }),
                    None => {
                        let (parent, name) = (index.holder(&space, &node), pool.name.clone());
                        Err(PlanError::Unclaimed { cidr, parent, name })
                    }
                },
            }
        })
        .await?
    }

    /// Claims the subnet of a pool, as its name, for this authority. May be repeated.
    ///
    /// # Errors
    /// Those of [`Plan::claim`].
    pub async fn claim_pool(&self, pool: &PoolConfig, purpose: Purpose) -> Result<Prefix, PlanError> {
        let space = pool_space(pool)?;
        let claim = Claim::at(pool.subnet, Level::Pool, &pool.name, &self.authority);
        self.claim(&claim.purpose(purpose).space(space)).await
    }

    async fn prefix(&self, command: &Command) -> Result<Prefix, PlanError> {
        match self.run(command).await? {
            Reply::Prefix(prefix) => Ok(*prefix),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Answers from a space as it is now.
    async fn read<T>(&self, space: &AddressSpace, answer: impl FnOnce(&SpaceView) -> T) -> Result<T, PlanError> {
        self.refresh(space).await?;
        let view = self.view.lock();
        Ok(match view.spaces.get(space) {
            Some(known) => answer(known),
            None => answer(&SpaceView::default()),
        })
    }

    async fn run(&self, command: &Command) -> Result<Reply, PlanError> {
        let (mut races, mut unknown) = (0, 0);
        loop {
            self.refresh_registry().await?;
            let spaces = {
                let view = self.view.lock();
                let registry = view.registry.as_ref().map(|(registry, _)| registry);
                spaces_of(registry, command.space())
            };
            for space in &spaces {
                self.refresh(space).await?;
            }
            let (mut batch, change, reply) = loop {
                let missing = {
                    let view = self.view.lock();
                    match step(&view, &self.authority, command)? {
                        Step::Commit { batch, change, reply } => break (batch, change, reply),
                        // What was read may be another's whose flush is not done: a commit without writes is a barrier.
                        Step::Done(reply) => break (barrier(&view, command), None, reply),
                        Step::Load(missing) => missing,
                    }
                };
                for space in &missing {
                    self.refresh(space).await?;
                }
            };
            batch.request_id = random_id();
            let (size, limit) = (batch.guards.len() + batch.writes.len(), self.store.caps().max_operations);
            if size > limit {
                return Err(PlanError::TooLarge { size, limit });
            }
            match self.store.commit(&batch).await? {
                Outcome::Committed { revision } => {
                    if let Some(change) = change {
                        let mut view = self.view.lock();
                        if let Some(known) = view.spaces.get_mut(&change.space)
                            && known.epoch + 1 == change.epoch
                        {
                            let advanced = advance(known, revision, &change.deltas);
                            view.forget_unless(&change.space, advanced)?;
                        }
                    }
                    return Ok(reply);
                }
                Outcome::Conflict(_) => {
                    races += 1;
                    if races == RACES {
                        return Err(PlanError::Busy(races));
                    }
                    // Refreshed by the next round, also those spaces that only a rule brought in.
                    let known: Vec<AddressSpace> = self.view.lock().spaces.keys().cloned().collect();
                    for space in known.iter().filter(|space| !spaces.contains(space)) {
                        self.refresh(space).await?;
                    }
                }
                Outcome::Unknown { reason } => {
                    unknown += 1;
                    tracing::warn!(%reason, "the outcome of a change of the plan is unknown; reading what became of it");
                    if unknown == UNKNOWNS {
                        return Err(PlanError::OutcomeUnknown(reason));
                    }
                }
            }
        }
    }

    async fn refresh_registry(&self) -> Result<(), PlanError> {
        let key = registry_key();
        let entry = self.store.read(std::slice::from_ref(&key)).await?.pop().flatten();
        let registry = match &entry {
            Some(entry) => Some((decode::<Registry>(&key, entry)?, entry.version)),
            None => None,
        };
        let mut view = self.view.lock();
        // Another call may have read a newer one meanwhile.
        let newer = |known: &Option<(Registry, u64)>| known.as_ref().map(|(_, v)| *v) <= registry.as_ref().map(|r| r.1);
        if newer(&view.registry) {
            view.registry = registry;
        }
        Ok(())
    }

    /// Brings what is known of a space up to date: by the changes since, or by reading it whole.
    async fn refresh(&self, space: &AddressSpace) -> Result<(), PlanError> {
        loop {
            let known = self.view.lock().spaces.get(space).map(|known| known.epoch);
            let Some(epoch) = known else {
                let loaded = self.load(space).await?;
                let mut view = self.view.lock();
                let newer = view.spaces.get(space).is_none_or(|known| known.epoch < loaded.epoch);
                if newer {
                    view.spaces.insert(space.clone(), loaded);
                }
                return Ok(());
            };
            let page = self.store.scan(&changes(space), Some(&change_key(space, epoch)), PAGE).await?;
            let mut view = self.view.lock();
            let Some(known) = view.spaces.get_mut(space) else { continue };
            let followed = follow(space, known, &page);
            match view.forget_unless(space, followed)? {
                Followed::All if page.len() < PAGE => return Ok(()),
                Followed::All => {}
                Followed::Lost => {
                    view.spaces.remove(space);
                }
            }
        }
    }

    async fn load(&self, space: &AddressSpace) -> Result<SpaceView, PlanError> {
        loop {
            let key = epoch_key(space);
            let begun = self.store.read(std::slice::from_ref(&key)).await?.pop().flatten();
            let (epoch, version) = match &begun {
                Some(entry) => (decode::<EpochRecord>(&key, entry)?.epoch, Some(entry.version)),
                None => (0, None),
            };
            // Pages are of different moments. The changes since the first are absolute: once they are done again, all
            // is of the last one's.
            let prefix = prefixes(space);
            let mut records: BTreeMap<Node, PrefixRecord> = BTreeMap::new();
            for (key, entry) in self.scan_all(&prefix).await? {
                records.insert(node_of(&prefix, &key).ok_or_else(|| no_key(&key))?, decode(&key, &entry)?);
            }
            let prefix = tombstones(space);
            let mut returned = BTreeMap::new();
            for (key, entry) in self.scan_all(&prefix).await? {
                let tombstone: Tombstone = decode(&key, &entry)?;
                returned.insert(tombstone_of(&prefix, &key).ok_or_else(|| no_key(&key))?, tombstone.epoch);
            }
            let mut known = SpaceView { version, epoch, returned, ..SpaceView::default() };
            let prefix = changes(space);
            let mut after = change_key(space, epoch);
            let mut whole = true;
            'pages: loop {
                let page = self.store.scan(&prefix, Some(&after), PAGE).await?;
                for (key, entry) in &page {
                    let number = change_of(&prefix, key).ok_or_else(|| no_key(key))?;
                    let record: ChangeRecord = decode(key, entry)?;
                    let Some(deltas) = record.deltas.filter(|_| number == known.epoch + 1) else {
                        whole = false;
                        break 'pages;
                    };
                    for delta in deltas {
                        redo(&mut records, &mut known.returned, delta);
                    }
                    (known.epoch, known.version) = (number, Some(entry.version));
                    after.clone_from(key);
                }
                if page.len() < PAGE {
                    break;
                }
            }
            if !whole {
                continue;
            }
            for (node, record) in records {
                known.apply(&Delta::Put { cidr: node.block.cidr(), level: node.level, record })?;
            }
            return Ok(known);
        }
    }

    async fn scan_all(&self, prefix: &[u8]) -> Result<Vec<(Key, Entry)>, PlanError> {
        let mut all: Vec<(Key, Entry)> = Vec::new();
        loop {
            let after = all.last().map(|(key, _)| key.as_slice());
            let page = self.store.scan(prefix, after, PAGE).await?;
            let last = page.len() < PAGE;
            all.extend(page);
            if last {
                return Ok(all);
            }
        }
    }
}

impl Obeyed {
    /// Keeps a refusal, and passes a failure on.
    fn refuse(&mut self, cidr: IpNet, error: PlanError) -> Result<(), PlanError> {
        match error {
            PlanError::Store(_) | PlanError::OutcomeUnknown(_) | PlanError::Damaged(_) | PlanError::Busy(_) => {
                Err(error)
            }
            error => {
                self.refused.push((cidr, error));
                Ok(())
            }
        }
    }
}

enum Followed {
    /// All changes of the page are in.
    All,
    /// They do not follow on what is known.
    Lost,
}

fn follow(space: &AddressSpace, known: &mut SpaceView, page: &[(Key, Entry)]) -> Result<Followed, PlanError> {
    let prefix = changes(space);
    for (key, entry) in page {
        let number = change_of(&prefix, key).ok_or_else(|| no_key(key))?;
        // Another call has done it.
        if number <= known.epoch {
            continue;
        }
        let record: ChangeRecord = decode(key, entry)?;
        let Some(deltas) = record.deltas.filter(|_| number == known.epoch + 1) else { return Ok(Followed::Lost) };
        advance(known, entry.version, &deltas)?;
    }
    Ok(Followed::All)
}

fn advance(known: &mut SpaceView, revision: u64, deltas: &[Delta]) -> Result<(), PlanError> {
    for delta in deltas {
        known.apply(delta)?;
    }
    known.epoch += 1;
    known.version = Some(revision);
    Ok(())
}

fn redo(records: &mut BTreeMap<Node, PrefixRecord>, returned: &mut BTreeMap<Block, u64>, delta: Delta) {
    match delta {
        Delta::Delete { cidr, level } => {
            records.remove(&Node { block: Block::of(&cidr), level });
        }
        Delta::Put { cidr, level, record } => {
            records.insert(Node { block: Block::of(&cidr), level }, record);
        }
        Delta::Returned { cidr, epoch } => {
            returned.insert(Block::of(&cidr), epoch);
        }
    }
}

fn pool_space(pool: &PoolConfig) -> Result<AddressSpace, PlanError> {
    match &pool.space {
        None => Ok(AddressSpace::default()),
        Some(text) => text.parse().map_err(|error: dcenet_core::model::ParseError| PlanError::Invalid {
            field: "space".to_owned(),
            value: text.clone(),
            reason: format!("is {}", error.reason),
        }),
    }
}

fn decode<T: serde::de::DeserializeOwned>(key: &[u8], entry: &Entry) -> Result<T, PlanError> {
    serde_json::from_slice(&entry.value).map_err(|error| {
        PlanError::Damaged(format!("the record {:?} cannot be understood: {error}", key.escape_ascii().to_string()))
    })
}

fn no_key(key: &[u8]) -> PlanError {
    PlanError::Damaged(format!("{:?} is no key of a plan", key.escape_ascii().to_string()))
}

fn unexpected(reply: &Reply) -> PlanError {
    PlanError::Damaged(format!("a command was answered by {reply:?}"))
}

/// Entries read at a time.
const PAGE: usize = 512;
/// Lost races after which a command gives up.
const RACES: u32 = 128;
/// Unknown outcomes after which a command gives up.
const UNKNOWNS: u32 = 3;
