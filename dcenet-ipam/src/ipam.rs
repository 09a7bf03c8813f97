//! The allocator over a store.

mod index;
mod pools;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use dcenet_core::model::{AttachmentKey, ClusterId, ContainerId, IfName, LabelSet, NetworkName};
use dcenet_core::probe::Conflict;
use dcenet_core::provider::{AddressSource, Dns, Lease, LeaseError, LeaseRequest};
use parking_lot::Mutex;

use self::index::{Index, Proposal};
pub use self::pools::{OwnedBlock, Reservation};
use crate::config::{ConfigError, IpamConfig, Layout};
use crate::machine::{Command, Quarantine, Query, Reply, Step, View, step};
use crate::model::{Addr, AddressSpace, Binding, Claim, ClaimKey, Family, KeepPolicy, NodeName, Pool};
use crate::record::{
    AttachmentRecord, ClaimRecord, SlotRecord, attachment_key, attachment_of, claim_prefix, network_prefix, slot_prefix,
};
use crate::select::Node;
use crate::store::{
    Batch, Entry, Key, Outcome, Sharing, Store, StoreError, Write, number_of, numbered, require_atomic,
};

/// Hands out the addresses of one configuration from a store that others may share.
pub struct Ipam {
    layout: Layout,
    store: Arc<dyn Store>,
    clock: Source,
    entropy: Source,
    /// What the store was seen to hold lately; `None` where reading costs no trip and nobody lives long.
    lately: Option<Mutex<Lately>>,
    index: Option<Index>,
}

/// What a lease may guess, for whatever it rests on is guarded: a wrong guess costs a second trip and nothing else.
#[derive(Default)]
struct Lately {
    /// The records of the address spaces and, with an index, of blocks.
    records: BTreeMap<Key, Entry>,
    /// With an index, which blocks the node was seen to own.
    owned: BTreeMap<Query, Vec<Key>>,
    /// Where the last search began that lost no race.
    entropy: u64,
}

/// Where numbers come from that no function of the store's content can tell.
type Source = Arc<dyn Fn() -> u64 + Send + Sync>;

impl std::fmt::Debug for Ipam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ipam").field("layout", &self.layout).field("store", &self.store).finish_non_exhaustive()
    }
}

/// Why the allocator could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store could not be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<OpenError> for LeaseError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Config(error) => error.into(),
            OpenError::Store(error) => store_error(error),
        }
    }
}

/// How full a pool is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolUsage {
    /// The pool's name.
    pub pool: String,
    /// Its space.
    pub space: AddressSpace,
    /// Addresses that it could have in use.
    pub size: u128,
    /// Addresses that attachments use.
    pub bound: u128,
    /// Addresses that claims keep while nothing is attached.
    pub kept: u128,
    /// Addresses that were released so lately that nobody else gets them yet.
    pub cooling: u128,
    /// Addresses that nobody gets because somebody else on the link answers for them.
    pub quarantined: u128,
    /// Addresses that attachments use or claims keep although the pool does not hand them out any more, for it was shrunk
    /// or renumbered; those of them that are in the subnet are counted above too. [`Ipam::outside`] names them.
    pub outside: u128,
}

/// A claim that is recorded in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedClaim {
    /// The space.
    pub space: AddressSpace,
    /// The pool.
    pub pool: String,
    /// The claim with its address.
    pub claim: Claim,
    /// The cluster that it was handed out to, where it was.
    pub away: Option<ClusterId>,
}

impl Ipam {
    /// Over a store that is open.
    pub fn new(config: &IpamConfig, store: Arc<dyn Store>) -> Result<Self, OpenError> {
        Self::over(config.layout()?, store)
    }

    /// Opens the store that the configuration names; `state_dir` is where it goes if it has no path of its own.
    pub fn open(config: &IpamConfig, state_dir: &Path) -> Result<Self, OpenError> {
        let layout = config.layout()?;
        Self::over(layout, config.store.open(state_dir)?)
    }

    /// Without a configuration, for tools that look at what a store holds, as [`Ipam::check`]: there is no pool to lease
    /// from, no history is looked at, and what is excluded or reserved by configurations is not known.
    pub fn without_pools(store: Arc<dyn Store>) -> Result<Self, OpenError> {
        let layout = Layout {
            pools: Vec::new(),
            routes: Vec::new(),
            dns: Dns::default(),
            cooldown: Layout::COOLDOWN,
            node: None,
            history: None,
            reserved: Vec::new(),
        };
        Self::over(layout, store)
    }

    fn over(layout: Layout, store: Arc<dyn Store>) -> Result<Self, OpenError> {
        require_atomic(&*store)?;
        let lately = (store.caps().sharing == Sharing::Machines).then(Mutex::default);
        Ok(Self { layout, store, clock: Arc::new(wall_clock), entropy: Arc::new(random), lately, index: None })
    }

    /// Keeps an index of the pools in memory, for a process that lives long and has many callers: the node's daemon, an
    /// embedder. A lease then reads little of the store or nothing, no two callers of this process try for the same
    /// address, and what other processes do is learnt from the store's watch. The first lease reads all slots of the
    /// configuration's spaces.
    ///
    /// Call it last: it takes the node, the pools and the store as they are. What is true stays what the store holds; see
    /// [`AddressPool`](crate::pool::AddressPool). Together with [`GroupStore`](crate::store::group::GroupStore), many
    /// callers share each flush of the log.
    #[must_use]
    pub fn with_index(mut self) -> Self {
        self.index = Some(Index::new(&self.layout, self.store.clone()));
        self.lately.get_or_insert_default();
        self
    }

    /// Asks in the name of a node: pools that select by node compare it, and each lease records that its attachment is
    /// there, so that evidence about the node can speak of it.
    #[must_use]
    pub fn on_node(mut self, name: NodeName, labels: LabelSet) -> Self {
        self.layout.node = Some(Node { name, labels });
        self
    }

    /// Takes the time, in milliseconds since 1970, from `clock` instead of the system.
    #[must_use]
    pub fn with_clock(self, clock: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self { clock: Arc::new(clock), ..self }
    }

    /// Takes random numbers from `entropy` instead of the system, as a simulation does that is to be repeated. A number
    /// that comes twice costs lost races, and may make a store take two batches for one.
    #[must_use]
    pub fn with_entropy(self, entropy: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self { entropy: Arc::new(entropy), ..self }
    }

    pub(crate) fn request_id(&self) -> u128 {
        u128::from((self.entropy)()) << 64 | u128::from((self.entropy)())
    }

    /// Milliseconds since 1970.
    pub(crate) fn now(&self) -> u64 {
        (self.clock)()
    }

    /// The checked configuration.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Records a claim in the store, beside those of the configuration. `address` `None` takes a free one.
    ///
    /// # Errors
    /// [`LeaseError::Held`] with the holder's name if another has the address.
    pub async fn reserve(
        &self,
        pool: &str,
        claim: &ClaimKey,
        address: Option<std::net::IpAddr>,
        keep: KeepPolicy,
    ) -> Result<(), LeaseError> {
        self.run(&Command::Reserve { pool: pool.to_owned(), claim: claim.clone(), address, keep }).await.map(drop)
    }

    /// Gives a claim up, in both families; its address is free at once. Returns whether there was one. A claim of the
    /// configuration is recorded again by the next lease of its workload.
    ///
    /// # Errors
    /// [`LeaseError::Held`] if something is attached through it.
    pub async fn forget(&self, space: &AddressSpace, claim: &ClaimKey) -> Result<bool, LeaseError> {
        let command = Command::Forget { space: space.clone(), claim: claim.clone() };
        Ok(self.run(&command).await? == Reply::Done)
    }

    /// Releases the lease of an attachment if it is the one with this sequence. Returns whether it was.
    pub async fn release_sequence(&self, attachment: &AttachmentKey, sequence: u64) -> Result<bool, LeaseError> {
        let command = Command::Release { attachment: attachment.clone(), sequence: Some(sequence) };
        Ok(self.run(&command).await? == Reply::Done)
    }

    /// Releases whatever the attachment holds now, for callers who know that nobody leases for it at the same time.
    pub async fn release_current(&self, attachment: &AttachmentKey) -> Result<(), LeaseError> {
        self.run(&Command::Release { attachment: attachment.clone(), sequence: None }).await.map(drop)
    }

    /// The newest revision of the store: every binding made so far has a sequence up to it, every later one a higher.
    /// Whoever collects evidence of what is alive takes it first, and hands it to [`Ipam::retain_since`].
    pub async fn revision(&self) -> Result<u64, LeaseError> {
        match self
            .store
            .commit(&Batch { request_id: self.request_id(), ..Batch::default() })
            .await
            .map_err(store_error)?
        {
            Outcome::Committed { revision } => Ok(revision),
            Outcome::Conflict(_) => Err(LeaseError::Busy("a batch without guards was refused".to_owned())),
            Outcome::Unknown { reason } => Err(LeaseError::Store(reason.into())),
        }
    }

    /// Releases every attachment of the network, on any node, that is not in `valid` and whose sequence is at most
    /// `fence`: bindings made after the evidence was collected stay. Returns what was released.
    pub async fn retain_since(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
        fence: u64,
    ) -> Result<Vec<AttachmentKey>, LeaseError> {
        self.release_stale(network, valid, fence, |_| true).await
    }

    async fn release_stale(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
        fence: u64,
        judged: impl Fn(&AttachmentRecord) -> bool + Send,
    ) -> Result<Vec<AttachmentKey>, LeaseError> {
        let mut released = Vec::new();
        for (key, entry) in self.scan_all(&network_prefix(Some(network))).await? {
            let Some(attachment) = attachment_of(&key) else { continue };
            let alive = valid.iter().any(|(c, i)| *c == attachment.container && *i == attachment.ifname);
            let record = decode::<AttachmentRecord>(&key, &entry)?;
            let sequence = record.sequence(entry.version);
            let stale = !alive && sequence <= fence && judged(&record);
            if stale && self.release_sequence(&attachment, sequence).await? {
                released.push(attachment);
            }
        }
        Ok(released)
    }

    /// All addresses in use, of one network or of all that share the store.
    pub async fn bindings(&self, network: Option<&NetworkName>) -> Result<Vec<Binding>, LeaseError> {
        let mut bindings = Vec::new();
        for (key, entry) in self.scan_all(&network_prefix(network)).await? {
            let Some(attachment) = attachment_of(&key) else { continue };
            let record: AttachmentRecord = decode(&key, &entry)?;
            for held in &record.addresses {
                let Some((space, _)) = held.slot() else { continue };
                bindings.push(Binding {
                    attachment: attachment.clone(),
                    workload: record.workload.clone(),
                    space,
                    address: held.address,
                    pool: held.pool.clone(),
                    sequence: record.sequence(entry.version),
                    node: record.node.clone(),
                });
            }
        }
        Ok(bindings)
    }

    /// The claims recorded in the spaces of the configuration.
    pub async fn claims(&self) -> Result<Vec<RecordedClaim>, LeaseError> {
        let mut claims = Vec::new();
        for (space, family) in self.families_of_spaces() {
            let prefix = claim_prefix(space, family);
            for (key, entry) in self.scan_all(&prefix).await? {
                let record: ClaimRecord = decode(&key, &entry)?;
                let text = std::str::from_utf8(&key[prefix.len()..]).unwrap_or_default();
                let key = text.parse().map_err(|e| LeaseError::Store(Box::new(e)))?;
                let claim =
                    Claim { key, address: Some(Addr::from(record.address)), keep: record.keep, mac: record.mac };
                let (pool, away) = (record.pool, record.away);
                claims.push(RecordedClaim { space: space.clone(), pool, claim, away });
            }
        }
        Ok(claims)
    }

    /// The spaces of the configuration with each family.
    pub(crate) fn families_of_spaces(&self) -> Vec<(&AddressSpace, Family)> {
        let mut spaces: Vec<&AddressSpace> = self.layout.pools.iter().map(|p| &p.space).collect();
        spaces.sort_unstable();
        spaces.dedup();
        spaces.into_iter().flat_map(|s| [(s, Family::V4), (s, Family::V6)]).collect()
    }

    /// How full the pools of the configuration are. Reads every record of them: a tool's call.
    pub async fn usage(&self) -> Result<Vec<PoolUsage>, LeaseError> {
        let mut all = Vec::with_capacity(self.layout.pools.len());
        for pool in &self.layout.pools {
            all.push(self.pool_usage(pool).await?);
        }
        let bound: Vec<_> =
            self.bindings(None).await?.into_iter().map(|b| (b.space, b.pool, b.address.addr())).collect();
        let kept = self.claims().await?.into_iter().filter_map(|c| Some((c.space, c.pool, c.claim.address?.ip())));
        for (space, pool, ip) in bound.iter().cloned().chain(kept.filter(|k| !bound.contains(k))) {
            let own = self.layout.pools.iter().zip(&mut all).find(|(p, _)| p.name == pool && p.space == space);
            if let Some((pool, usage)) = own
                && !pool.has(Addr::from(ip))
            {
                usage.outside += 1;
            }
        }
        Ok(all)
    }

    async fn pool_usage(&self, pool: &Pool) -> Result<PoolUsage, LeaseError> {
        let prefix = slot_prefix(&pool.space, pool.family());
        let (pool_name, space) = (pool.name.clone(), pool.space.clone());
        let size = pool.size();
        let (bound, kept, cooling, quarantined, outside) = (0, 0, 0, 0, 0);
        let mut usage = PoolUsage { pool: pool_name, space, size, bound, kept, cooling, quarantined, outside };
        let first = Addr::from(pool.subnet.network()).bits;
        let mut after = first.checked_sub(1).map(|below| numbered(&prefix, below));
        let now = (self.clock)();
        let cooling = |at: u64| u128::from(u128::from(now.abs_diff(at)) < self.layout.cooldown.as_millis());
        loop {
            let page = self.store.scan(&prefix, after.as_deref(), PAGE).await.map_err(store_error)?;
            for (key, entry) in &page {
                let bits = number_of(&prefix, key).map_err(store_error)?;
                if !pool.subnet.contains(&Addr { family: pool.family(), bits }.ip()) {
                    return Ok(usage);
                }
                match decode(key, entry)? {
                    SlotRecord::Bound { .. } | SlotRecord::Handover { .. } => usage.bound += 1,
                    // It is still the claim's.
                    SlotRecord::Quarantined { until: Some(end), claim: Some(_), .. } if now >= end => usage.kept += 1,
                    SlotRecord::Kept { until: Some(end), .. } | SlotRecord::Quarantined { until: Some(end), .. }
                        if now >= end =>
                    {
                        usage.cooling += cooling(end);
                    }
                    SlotRecord::Kept { .. } => usage.kept += 1,
                    SlotRecord::Quarantined { .. } => usage.quarantined += 1,
                    SlotRecord::Freed { at, .. } => usage.cooling += cooling(at),
                }
            }
            match page.last() {
                Some((last, _)) if page.len() == PAGE => after = Some(last.clone()),
                _ => return Ok(usage),
            }
        }
    }

    pub(crate) async fn scan_all(&self, prefix: &[u8]) -> Result<Vec<(Key, Entry)>, LeaseError> {
        let mut all: Vec<(Key, Entry)> = Vec::new();
        loop {
            let after = all.last().map(|(key, _)| key.as_slice());
            let page = self.store.scan(prefix, after, PAGE).await.map_err(store_error)?;
            let last = page.len() < PAGE;
            all.extend(page);
            if last {
                return Ok(all);
            }
        }
    }

    /// Runs a command; registers the configuration's pools and claims first where that was not done yet.
    pub(crate) async fn run(&self, command: &Command) -> Result<Reply, LeaseError> {
        for _ in 0..REGISTRATIONS {
            if let Some(reply) = self.attempt(command).await? {
                return Ok(reply);
            }
            self.register().await?;
        }
        Err(LeaseError::Busy("the pools of this configuration are registered and removed by turns".to_owned()))
    }

    pub(crate) async fn register(&self) -> Result<(), LeaseError> {
        self.attempt(&Command::Register { recorded: false }).await?;
        for pool in &self.layout.pools {
            for claim in pool.claims.iter().filter(|c| c.keep != KeepPolicy::Ephemeral) {
                if claim.address.is_none() {
                    continue;
                }
                let record = Command::Record { pool: pool.name.clone(), claim: claim.clone() };
                match self.attempt(&record).await {
                    Ok(Some(_)) => {}
                    // Another configuration has changed the pools meanwhile.
                    Ok(None) => return Ok(()),
                    // Its own workload is refused when it asks; others are not to suffer for it.
                    Err(error @ (LeaseError::Held { .. } | LeaseError::Invalid { .. })) => {
                        tracing::warn!(claim = %claim.key, %error, "a claim of the configuration cannot be recorded");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        self.attempt(&Command::Register { recorded: true }).await.map(drop)
    }

    /// Steps until the command is done; `None` if the configuration must be registered first.
    async fn attempt(&self, command: &Command) -> Result<Option<Reply>, LeaseError> {
        let (mut view, mut entropy, mut guessed) = self.guess(command);
        let (mut conflicts, mut unknown) = (0, 0);
        let (mut proposals, mut passed_over) = (Vec::<Proposal<'_>>::new(), Vec::<Query>::new());
        if guessed {
            self.look(false).await;
        }
        loop {
            // Never older than what the view holds, or a process that stood still would take a fresh release for one of the
            // far future.
            let now = (self.clock)();
            let next = step(&self.layout, &view, command, now, entropy);
            if guessed && !may_be_guessed(&next) {
                (view, guessed) = (View::default(), false);
                proposals.clear();
                continue;
            }
            match next? {
                Step::Done(reply) => return Ok(Some(reply)),
                Step::Unregistered => return Ok(None),
                Step::Read(queries) => {
                    let guesses = guessed.then_some((&mut proposals, &passed_over[..]));
                    self.learn(&mut view, queries, guesses).await?;
                }
                Step::Stale => {
                    count_conflict(&mut conflicts)?;
                    view = View::default();
                    entropy = self.begin_elsewhere();
                }
                Step::Commit(mut batch, reply) => {
                    let refused: Vec<Query> =
                        proposals.iter().filter_map(|p| p.passed_over(&batch.guards).cloned()).collect();
                    if !refused.is_empty() {
                        // Decided again with what the store has behind them.
                        for query in &refused {
                            view.forget_scan(query);
                        }
                        proposals.retain(|p| p.passed_over(&batch.guards).is_none());
                        passed_over.extend(refused);
                        continue;
                    }
                    batch.request_id = self.request_id();
                    match self.store.commit(&batch).await.map_err(store_error)? {
                        Outcome::Committed { revision } => {
                            self.notice_commit(&batch.writes, revision);
                            return Ok(Some(reply.committed(revision)));
                        }
                        Outcome::Conflict(current) => {
                            count_conflict(&mut conflicts)?;
                            for (guard, entry) in batch.guards.iter().zip(&current) {
                                self.notice(&guard.key, entry.as_ref());
                            }
                            let surprised = self.index.as_ref().is_some_and(|i| i.refused(&batch.guards, &current));
                            view.learn_conflict(&batch.guards, current);
                            proposals.clear();
                            entropy = self.begin_elsewhere();
                            if guessed && conflicts >= DISTRUST {
                                // What is guessed is far from what is there.
                                (view, guessed) = (View::default(), false);
                            } else if surprised && guessed {
                                self.look(true).await;
                            }
                        }
                        Outcome::Unknown { reason } => {
                            unknown += 1;
                            tracing::warn!(%reason, "the outcome of a commit is unknown; reading what became of it");
                            if unknown == UNKNOWNS {
                                return Err(LeaseError::Store(reason.into()));
                            }
                            // What the command wanted is either there or not: it is decided anew from what is there.
                            (view, guessed) = (View::default(), false);
                            proposals.clear();
                        }
                    }
                }
            }
        }
    }

    /// What to begin with: a view, entropy, and whether the view is guessed.
    fn guess(&self, command: &Command) -> (View, u64, bool) {
        let mut view = View::default();
        let Some(lately) = &self.lately else { return (view, 0, false) };
        let mut lately = lately.lock();
        if lately.entropy == 0 && self.is_far() {
            // Rivals part ways from the first try on.
            lately.entropy = (self.entropy)().max(1);
        }
        let Command::Lease(request) = command else { return (view, lately.entropy, false) };
        view.learn_key(attachment_key(&request.attachment), None);
        for (key, entry) in &lately.records {
            view.learn_key(key.clone(), Some(entry.clone()));
        }
        for (query, owned) in &lately.owned {
            view.learn_scan(query.clone(), owned.clone());
        }
        (view, lately.entropy, true)
    }

    /// Whether reading the store costs a trip.
    fn is_far(&self) -> bool {
        self.store.caps().sharing == Sharing::Machines
    }

    /// Lets the index learn what others did.
    async fn look(&self, at_once: bool) {
        if let Some(index) = &self.index
            && let Err(error) = index.look(self.now(), at_once).await
        {
            tracing::debug!(%error, "the index of the pools is not up to date");
        }
    }

    /// A place for the next search, after a lost race.
    fn begin_elsewhere(&self) -> u64 {
        let entropy = (self.entropy)().max(1);
        if let Some(lately) = &self.lately
            && self.is_far()
        {
            lately.lock().entropy = entropy;
        }
        entropy
    }

    /// Whether the record of the key may be guessed next time.
    fn may_guess(&self, key: &[u8]) -> bool {
        key.starts_with(b"e/") || self.index.is_some() && key.starts_with(b"b/")
    }

    /// Remembers what may be guessed next time.
    fn notice(&self, key: &[u8], entry: Option<&Entry>) {
        if let Some(lately) = &self.lately
            && self.may_guess(key)
        {
            let mut lately = lately.lock();
            if key.starts_with(b"b/") && lately.records.get(key) != entry {
                lately.owned.clear();
            }
            match entry {
                Some(entry) => drop(lately.records.insert(key.to_vec(), entry.clone())),
                None => drop(lately.records.remove(key)),
            }
        }
    }

    /// The same of what was written.
    fn notice_commit(&self, writes: &[Write], revision: u64) {
        let Some(index) = &self.index else { return };
        index.committed(writes, revision);
        for write in writes.iter().filter(|write| self.may_guess(write.key())) {
            let entry = match write {
                Write::Delete(_) => None,
                Write::Put(_, value) => Some(Entry { value: value.clone(), version: revision }),
            };
            self.notice(write.key(), entry.as_ref());
        }
    }

    /// Reads what is asked for. With `guesses`, the index answers first, but for the queries named there, and adds what it
    /// proposes.
    async fn learn<'a>(
        &'a self,
        view: &mut View,
        queries: Vec<Query>,
        mut guesses: Option<(&mut Vec<Proposal<'a>>, &[Query])>,
    ) -> Result<(), LeaseError> {
        let mut keys = Vec::new();
        for query in queries {
            if let Some((proposals, but)) = &mut guesses
                && !but.contains(&query)
                && self.propose(view, &query, proposals).await
            {
                continue;
            }
            match &query {
                Query::Key(key) => keys.push(key.clone()),
                Query::Gap(prefix, low, high) => {
                    let gap = self.store.first_gap(prefix, *low..=*high).await.map_err(store_error)?;
                    if let (Some(number), true) = (gap, guesses.is_some()) {
                        view.learn_key(numbered(prefix, number), None);
                    }
                    view.learn_gap(query, gap);
                }
                Query::Scan(prefix, after, limit) => {
                    let found = self.store.scan(prefix, after.as_deref(), *limit).await.map_err(store_error)?;
                    let found: Vec<Key> = found.into_iter().map(|(key, _)| key).collect();
                    if let Some(lately) = self.lately.as_ref().filter(|_| self.index.is_some())
                        && prefix.starts_with(b"o/")
                    {
                        lately.lock().owned.insert(query.clone(), found.clone());
                    }
                    view.learn_scan(query, found);
                }
            }
        }
        if !keys.is_empty() {
            let entries = self.store.read(&keys).await.map_err(store_error)?;
            for (key, entry) in keys.into_iter().zip(entries) {
                self.notice(&key, entry.as_ref());
                view.learn_key(key, entry);
            }
        }
        Ok(())
    }

    /// Lets the index answer a query. Returns whether it did.
    async fn propose<'a>(&'a self, view: &mut View, query: &Query, proposals: &mut Vec<Proposal<'a>>) -> bool {
        let Some(index) = &self.index else { return false };
        match query {
            Query::Gap(prefix, low, high) => {
                let mut proposed = index.unused(prefix, *low, *high, self.now());
                if let Some(None) = proposed {
                    // Others may have released something since, and before what was released here.
                    self.look(true).await;
                    proposed = index.unused(prefix, *low, *high, self.now());
                }
                let Some(proposal) = proposed else { return false };
                view.learn_gap(query.clone(), proposal.as_ref().map(|p| p.address));
                if let Some(proposal) = proposal {
                    view.learn_key(numbered(prefix, proposal.address), None);
                    proposals.push(proposal);
                }
                true
            }
            Query::Scan(..) => {
                let Some(proposal) = index.released(query, self.now()) else { return false };
                let Some((key, slot, entry)) = proposal.in_queue() else { return false };
                view.learn_scan(query.clone(), vec![key]);
                view.learn_key(slot, Some(entry));
                proposals.push(proposal);
                true
            }
            Query::Key(_) => false,
        }
    }
}

/// Whether what was decided may rest on guesses: only a commit's guards would tell of a wrong one. That no block of the
/// node has an address left is no guard's, so a block is claimed by who has looked.
fn may_be_guessed(next: &Result<Step, LeaseError>) -> bool {
    match next {
        Ok(Step::Commit(batch, _)) => !batch.guards.iter().any(|g| g.version.is_none() && g.key.starts_with(b"b/")),
        Ok(Step::Read(_)) => true,
        _ => false,
    }
}

impl Ipam {
    /// Whether the configuration fixes the address for a claim.
    pub(crate) fn is_fixed(&self, address: IpAddr) -> bool {
        let address = Some(Addr::from(address));
        self.layout.pools.iter().flat_map(|pool| &pool.claims).any(|claim| claim.address == address)
    }
}

#[async_trait]
impl AddressSource for Ipam {
    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, LeaseError> {
        match self.run(&Command::Lease(request.clone())).await? {
            Reply::Leased(lease) => Ok(lease),
            _ => Err(LeaseError::Store("a lease ended without addresses".into())),
        }
    }

    /// A read: what it shows was durable when ADD replied, or is of an ADD that has not replied yet.
    async fn held(&self, attachment: &AttachmentKey) -> Result<Option<Lease>, LeaseError> {
        match self.run(&Command::Lookup(attachment.clone())).await? {
            Reply::Leased(lease) => Ok(Some(lease)),
            _ => Ok(None),
        }
    }

    async fn release(&self, attachment: &AttachmentKey, sequence: u64) -> Result<(), LeaseError> {
        self.release_sequence(attachment, sequence).await.map(drop)
    }

    /// A runtime knows what runs on its own node: where machines share the store, only what was leased on this node
    /// ([`Ipam::on_node`]) is released. What no node is told of, or another, is left to [`reclaim`](crate::reclaim).
    async fn retain(
        &self,
        network: &NetworkName,
        valid: &[(ContainerId, IfName)],
    ) -> Result<Vec<AttachmentKey>, LeaseError> {
        if self.store.caps().sharing != Sharing::Machines {
            return self.retain_since(network, valid, u64::MAX).await;
        }
        let Some(node) = &self.layout.node else {
            return Err(LeaseError::Invalid {
                field: "ipam.node".to_owned(),
                reason: "it is not given, and other nodes use the same store: what is stale here cannot be told from \
                         what runs there; name the node"
                    .to_owned(),
            });
        };
        self.release_stale(network, valid, u64::MAX, |record| record.node.as_ref() == Some(&node.name)).await
    }

    /// The other address is of the same pool; the one in conflict goes into quarantine for an hour. `None` for one that the
    /// configuration fixes for a claim.
    ///
    /// Whoever answers every probe, by mistake or on purpose, must not use up a pool (RFC 5227, section 2.1.1, wants a limit
    /// to the rate for the same reason): no more than an eighth of a pool's addresses are in quarantine over conflicts at a
    /// time, but 16 of a small pool and 1024 of a large one. Callers that race exceed that by one each.
    ///
    /// # Errors
    /// As [`Ipam::replace`]; [`LeaseError::Contested`] above that limit, and [`LeaseError::Busy`] where the lease is not
    /// held any more: then nothing changes.
    async fn replace(
        &self,
        attachment: &AttachmentKey,
        sequence: u64,
        conflict: &Conflict,
    ) -> Result<Option<Lease>, LeaseError> {
        if self.is_fixed(conflict.address) {
            return Ok(None);
        }
        let why = Quarantine {
            reason: format!("{conflict}, found by {attachment}"),
            time: Some(CONFLICT_QUARANTINE),
            seen: Some(conflict.holder),
        };
        self.bound_conflicts(attachment, conflict.address).await?;
        match Ipam::replace(self, attachment, sequence, conflict.address, &why).await? {
            Some(lease) => Ok(Some(lease)),
            None => Err(LeaseError::Busy(format!("{attachment} does not hold the lease {sequence} any more"))),
        }
    }

    fn is_fixed(&self, address: IpAddr) -> bool {
        Ipam::is_fixed(self, address)
    }

    async fn ready(&self) -> Result<(), LeaseError> {
        self.run(&Command::Probe).await.map(drop)
    }
}

pub(crate) fn decode<T: serde::de::DeserializeOwned>(key: &[u8], entry: &Entry) -> Result<T, LeaseError> {
    serde_json::from_slice(&entry.value).map_err(|error| {
        LeaseError::Store(
            format!("the record {:?} cannot be understood: {error}", key.escape_ascii().to_string()).into(),
        )
    })
}

fn count_conflict(conflicts: &mut u32) -> Result<(), LeaseError> {
    *conflicts += 1;
    if *conflicts < CONFLICTS {
        return Ok(());
    }
    Err(LeaseError::Busy(format!("{CONFLICTS} races were lost in a row")))
}

pub(crate) fn store_error(error: StoreError) -> LeaseError {
    match error {
        StoreError::Corrupt { .. } => LeaseError::Damaged(Box::new(error)),
        error => LeaseError::Store(Box::new(error)),
    }
}

fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// 64 bits that the system's random generator seeds and that differ from call to call.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

pub(crate) fn random_id() -> u128 {
    u128::from(random()) << 64 | u128::from(random())
}

/// For how long nobody gets an address that somebody else was seen to have. Whoever it is comes and goes, and the next
/// probe tells; a server that is told of such an address keeps it back for as long or longer (RFC 2131, section 4.3.3,
/// leaves it to the server).
const CONFLICT_QUARANTINE: Duration = Duration::from_secs(3600);
/// Entries read at a time by listings.
const PAGE: usize = 512;
/// Lost races after which a command gives up.
const CONFLICTS: u32 = 128;
/// Lost races after which a command does without the index.
const DISTRUST: u32 = 16;
/// Unknown outcomes after which a command gives up.
const UNKNOWNS: u32 = 3;
/// Times that the configuration is registered for one command.
const REGISTRATIONS: u32 = 4;
