//! What becomes of a command: a pure function from what is known of the store to a batch, as [`crate::machine`] for
//! addresses.
//!
//! What is known is whole spaces instead of single keys, for a free prefix cannot be found by keys. Every change of a
//! space is guarded by the version of its epoch record, and writes it: two racers who claim overlapping prefixes, thus
//! different keys, meet there, and the second decides again from what the first did.

mod delegation;
mod import;

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::block::Block;
use super::document::{Document, ImportReport};
use super::error::PlanError;
use super::index::Index;
use super::model::{Claim, Grant, Level, Place, Prefix, Purpose, Receipt, Revocation, State};
use super::record::{
    CHANGES, ChangeRecord, Delta, EpochRecord, Node, PrefixRecord, Registry, Tombstone, change_key, epoch_key,
    node_key, registry_key, tombstone_key,
};
use crate::model::{AddressSpace, name_fault};
use crate::store::{Batch, Guard, Key, MAX_VALUE, Write};

/// What is known of one space.
#[derive(Debug, Clone, Default)]
pub(crate) struct SpaceView {
    /// The version of its epoch record; `None` if it was never changed.
    pub(crate) version: Option<u64>,
    pub(crate) epoch: u64,
    pub(crate) index: Index,
    pub(crate) returned: BTreeMap<Block, u64>,
}

impl SpaceView {
    /// Enters what a change did.
    pub(crate) fn apply(&mut self, delta: &Delta) -> Result<(), PlanError> {
        match delta {
            Delta::Delete { cidr, level } => {
                self.index.remove(&Node { block: Block::of(cidr), level: *level });
            }
            Delta::Put { cidr, level, record } => {
                let node = Node { block: Block::of(cidr), level: *level };
                self.index.insert(node, record.clone()).map_err(|clash| {
                    let (new, old) = (clash.new.block.cidr(), clash.old.block.cidr());
                    PlanError::Damaged(format!(
                        "{new} ({}) and {old} ({}) overlap in one space",
                        clash.new.level, clash.old.level
                    ))
                })?;
            }
            Delta::Returned { cidr, epoch } => {
                self.returned.insert(Block::of(cidr), *epoch);
            }
        }
        Ok(())
    }
}

/// What is known of a store.
#[derive(Debug, Default)]
pub(crate) struct View {
    /// With its version.
    pub(crate) registry: Option<(Registry, u64)>,
    pub(crate) spaces: BTreeMap<AddressSpace, SpaceView>,
}

impl View {
    /// Forgets a space of which a change could be entered in part only.
    pub(crate) fn forget_unless<T>(
        &mut self,
        space: &AddressSpace,
        entered: Result<T, PlanError>,
    ) -> Result<T, PlanError> {
        if entered.is_err() {
            self.spaces.remove(space);
        }
        entered
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) enum Command {
    /// Add a space, or change its rules.
    AddSpace {
        space: AddressSpace,
        unique: Vec<Purpose>,
    },
    /// Enter a prefix that comes from outside the plan.
    Own(Claim),
    Claim(Claim),
    Release(Prefix),
    Delegate {
        space: AddressSpace,
        cidr: IpNet,
        level: Level,
    },
    Accept(Grant),
    Revoke {
        space: AddressSpace,
        cidr: IpNet,
        level: Level,
    },
    /// Give a granted prefix back, or drain it.
    Surrender {
        revocation: Revocation,
        lost: bool,
    },
    /// Free what was given back.
    Settle(Receipt),
    /// The same on an operator's word.
    Attest(Receipt),
    Import {
        document: Document,
        dry_run: bool,
    },
}

impl Command {
    pub(crate) fn space(&self) -> &AddressSpace {
        match self {
            Self::AddSpace { space, .. } | Self::Delegate { space, .. } | Self::Revoke { space, .. } => space,
            Self::Own(claim) | Self::Claim(claim) => &claim.space,
            Self::Release(prefix) => &prefix.space,
            Self::Accept(grant) => &grant.space,
            Self::Surrender { revocation, .. } => &revocation.space,
            Self::Settle(receipt) | Self::Attest(receipt) => &receipt.space,
            Self::Import { document, .. } => &document.space,
        }
    }
}

/// The spaces that a decision about a space rests on.
pub(crate) fn spaces_of(registry: Option<&Registry>, space: &AddressSpace) -> Vec<AddressSpace> {
    let mut spaces = vec![space.clone()];
    if let Some(registry) = registry
        && registry.spaces.values().any(|rules| !rules.unique.is_empty())
    {
        spaces.extend(registry.spaces.keys().filter_map(|name| name.parse().ok()).filter(|s| s != space));
    }
    spaces
}

/// What to do next.
#[derive(Debug)]
pub(crate) enum Step {
    /// Read these spaces, and step again.
    Load(Vec<AddressSpace>),
    /// Commit; then the view changes so, and the reply holds.
    Commit { batch: Batch, change: Option<Change>, reply: Reply },
    /// There is nothing to commit.
    Done(Reply),
}

/// What a batch does to the view.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) space: AddressSpace,
    pub(crate) epoch: u64,
    pub(crate) deltas: Vec<Delta>,
}

#[derive(Debug, Clone)]
pub(crate) enum Reply {
    Done,
    NotHeld,
    Prefix(Box<Prefix>),
    Grant(Box<Grant>),
    Revocation(Box<Revocation>),
    Receipt(Box<Receipt>),
    /// The prefix is not empty yet.
    Draining(Box<Prefix>),
    Imported(ImportReport),
}

/// Decides about a command. `authority` is who owns the store.
pub(crate) fn step(view: &View, authority: &str, command: &Command) -> Result<Step, PlanError> {
    let space = command.space();
    let registry = view.registry.as_ref();
    let missing: Vec<AddressSpace> = spaces_of(registry.map(|(registry, _)| registry), space)
        .into_iter()
        .filter(|space| !view.spaces.contains_key(space))
        .collect();
    if !missing.is_empty() {
        return Ok(Step::Load(missing));
    }
    let known = &view.spaces[space];
    let work = Work { view, authority, space, known, epoch: known.epoch + 1 };
    match command {
        Command::AddSpace { unique, .. } => work.add_space(unique),
        Command::Own(claim) => work.own(claim),
        Command::Claim(claim) => work.claim(claim),
        Command::Release(prefix) => work.release(prefix),
        Command::Delegate { cidr, level, .. } => work.delegate(cidr, *level),
        Command::Accept(grant) => work.accept(grant),
        Command::Revoke { cidr, level, .. } => work.revoke(cidr, *level),
        Command::Surrender { revocation, lost } => work.surrender(revocation, *lost),
        Command::Settle(receipt) => work.settle(receipt, false),
        Command::Attest(receipt) => work.settle(receipt, true),
        Command::Import { document, dry_run } => work.import(document, *dry_run),
    }
}

/// A batch that changes nothing and holds only if the spaces that a decision rests on are as they were.
pub(crate) fn barrier(view: &View, command: &Command) -> Batch {
    let registry = view.registry.as_ref().map(|(registry, _)| registry);
    guarded(view, &spaces_of(registry, command.space()))
}

/// The guards of a decision that rests on these spaces and the registry.
fn guarded(view: &View, spaces: &[AddressSpace]) -> Batch {
    let mut batch = Batch::default();
    batch.guards.push(Guard { key: registry_key(), version: view.registry.as_ref().map(|(_, version)| *version) });
    for space in spaces {
        let version = view.spaces.get(space).and_then(|known| known.version);
        batch.guards.push(Guard { key: epoch_key(space), version });
    }
    batch
}

struct Work<'a> {
    view: &'a View,
    authority: &'a str,
    space: &'a AddressSpace,
    known: &'a SpaceView,
    /// The epoch of the change that is being decided.
    epoch: u64,
}

impl Work<'_> {
    fn registry(&self) -> Registry {
        self.view.registry.as_ref().map(|(registry, _)| registry.clone()).unwrap_or_default()
    }

    fn add_space(&self, unique: &[Purpose]) -> Result<Step, PlanError> {
        let mut registry = self.registry();
        let before = registry.clone();
        let rules = registry.spaces.entry(self.space.to_string()).or_default();
        rules.unique = unique.iter().copied().collect();
        if registry == before {
            return Ok(Step::Done(Reply::Done));
        }
        // What is there already must keep the rules too.
        let spaces: Vec<AddressSpace> = registry.spaces.keys().filter_map(|name| name.parse().ok()).collect();
        let missing: Vec<_> = spaces.iter().filter(|s| !self.view.spaces.contains_key(s)).cloned().collect();
        if !missing.is_empty() {
            return Ok(Step::Load(missing));
        }
        for (node, held) in self.known.index.iter() {
            self.keep_apart(&registry, node, held.record.purpose, held.record.state)?;
        }
        let mut batch = guarded(self.view, &spaces);
        batch.writes.push(put(registry_key(), &registry));
        Ok(Step::Commit { batch, change: None, reply: Reply::Done })
    }

    /// Drafts a change of the space, and its reply.
    fn change(&self, registry: Option<&Registry>, deltas: Vec<Delta>, reply: Reply) -> Step {
        let spaces = spaces_of(self.view.registry.as_ref().map(|(registry, _)| registry), self.space);
        let mut batch = guarded(self.view, &spaces);
        if let Some(registry) = registry {
            batch.writes.push(put(registry_key(), registry));
        }
        batch.writes.push(put(epoch_key(self.space), &EpochRecord { epoch: self.epoch }));
        for delta in &deltas {
            batch.writes.push(match delta {
                Delta::Delete { cidr, level } => Write::Delete(self.key(cidr, *level)),
                Delta::Put { cidr, level, record } => put(self.key(cidr, *level), record),
                Delta::Returned { cidr, epoch } => {
                    put(tombstone_key(self.space, &Block::of(cidr)), &Tombstone { epoch: *epoch })
                }
            });
        }
        let mut record = encode(&ChangeRecord { deltas: Some(deltas.clone()) });
        if record.len() > MAX_CHANGE {
            record = encode(&ChangeRecord { deltas: None });
        }
        batch.writes.push(Write::Put(change_key(self.space, self.epoch), record));
        if let Some(old) = self.epoch.checked_sub(CHANGES).filter(|old| *old > 0) {
            batch.writes.push(Write::Delete(change_key(self.space, old)));
        }
        let change = Change { space: self.space.clone(), epoch: self.epoch, deltas };
        Step::Commit { batch, change: Some(change), reply }
    }

    fn key(&self, cidr: &IpNet, level: Level) -> Key {
        node_key(self.space, &Node { block: Block::of(cidr), level })
    }

    fn declared(&self) -> Result<(), PlanError> {
        if self.view.registry.as_ref().is_some_and(|(registry, _)| registry.spaces.contains_key(self.space.as_str())) {
            return Ok(());
        }
        Err(PlanError::Invalid {
            field: "space".to_owned(),
            value: self.space.to_string(),
            reason: "is no space of this plan; add it first".to_owned(),
        })
    }

    fn own(&self, claim: &Claim) -> Result<Step, PlanError> {
        self.declared()?;
        check_names(claim)?;
        let Place::At(cidr) = claim.place else {
            return Err(PlanError::Invalid {
                field: "place".to_owned(),
                value: "a free prefix".to_owned(),
                reason: "what comes from outside the plan is one prefix; name it".to_owned(),
            });
        };
        let block = Block::check("cidr", &cidr)?;
        let node = Node { block, level: claim.level };
        let index = &self.known.index;
        if let Some(held) = index.get(&node)
            && held.parent.is_none()
            && held.record.name == claim.name
            && held.record.owner == claim.owner
            && held.record.purpose == claim.purpose
        {
            return Ok(Step::Done(self.reply(&node)));
        }
        if let Some(other) = index.overlapping(&block) {
            return Err(PlanError::Overlap { cidr, holder: index.holder(self.space, &other) });
        }
        if let Some(other) = index.named(block.family, None, &claim.name) {
            let holder = index.holder(self.space, &other);
            return Err(PlanError::Name { name: claim.name.clone(), holder });
        }
        self.keep_apart(&self.registry(), &node, claim.purpose, State::Held)?;
        Ok(self.enter(node, claim, None))
    }

    fn claim(&self, claim: &Claim) -> Result<Step, PlanError> {
        self.declared()?;
        check_names(claim)?;
        let index = &self.known.index;
        let (wanted, length) = match &claim.place {
            Place::At(cidr) => (Block::check("cidr", cidr)?, None),
            Place::In { parent, length } => (Block::check("parent", parent)?, Some(*length)),
        };
        if let Some(length) = length
            && !(wanted.length..=wanted.family.bits()).contains(&length)
        {
            return Err(PlanError::Invalid {
                field: "length".to_owned(),
                value: length.to_string(),
                reason: format!(
                    "is no prefix length inside {}; take {} to {}",
                    wanted.cidr(),
                    wanted.length,
                    wanted.family.bits()
                ),
            });
        }
        let Some(parent) = index.above(&wanted, claim.level) else {
            return Err(match index.around(&wanted) {
                Some(other) => PlanError::Overlap { cidr: wanted.cidr(), holder: index.holder(self.space, &other) },
                None => self.outside(&wanted),
            });
        };
        if length.is_some() && parent.block != wanted {
            let space = self.space.clone();
            return Err(PlanError::Unknown { cidr: wanted.cidr(), level: None, space });
        }
        if let Some(done) = self.repeated(claim, &parent, &wanted, length)? {
            return Ok(done);
        }
        let block = match length {
            None => {
                let clash = index.around(&wanted).filter(|other| *other != parent);
                if let Some(other) = clash.or_else(|| index.inside(&wanted).next().map(|(node, _)| *node)) {
                    return Err(PlanError::Overlap { cidr: wanted.cidr(), holder: index.holder(self.space, &other) });
                }
                self.may_hold(&parent, claim.purpose)?;
                wanted
            }
            Some(length) => match self.may_hold(&parent, claim.purpose).map(|()| index.fit(&parent, length))? {
                (Some(block), _) => Block { length, ..block },
                (None, largest) => {
                    let parent = index.holder(self.space, &parent);
                    return Err(PlanError::Exhausted { parent, length, largest });
                }
            },
        };
        let node = Node { block, level: claim.level };
        self.keep_apart(&self.registry(), &node, claim.purpose, State::Held)?;
        Ok(self.enter(node, claim, Some(parent)))
    }

    fn outside(&self, block: &Block) -> PlanError {
        let authority = self.authority.to_owned();
        match self.known.index.inside(block).next() {
            Some((node, _)) => {
                PlanError::Overlap { cidr: block.cidr(), holder: self.known.index.holder(self.space, node) }
            }
            None => PlanError::Outside { cidr: block.cidr(), space: self.space.clone(), authority },
        }
    }

    /// The claim again, or one of the same name that contradicts it.
    fn repeated(
        &self,
        claim: &Claim,
        parent: &Node,
        wanted: &Block,
        length: Option<u8>,
    ) -> Result<Option<Step>, PlanError> {
        let index = &self.known.index;
        let Some(node) = index.named(wanted.family, Some(*parent), &claim.name) else { return Ok(None) };
        let Some(held) = index.get(&node) else { return Ok(None) };
        let same = match length {
            None => node.block == *wanted,
            Some(length) => node.block.length == length,
        };
        let record = &held.record;
        if same && node.level == claim.level && record.owner == claim.owner && record.purpose == claim.purpose {
            return Ok(Some(Step::Done(self.reply(&node))));
        }
        Err(PlanError::Name { name: claim.name.clone(), holder: index.holder(self.space, &node) })
    }

    /// Whether this authority may claim in a prefix, and for that purpose.
    fn may_hold(&self, parent: &Node, purpose: Purpose) -> Result<(), PlanError> {
        let index = &self.known.index;
        for (node, held) in index.chain(parent) {
            let holder = || index.holder(self.space, &node);
            match held.record.state {
                State::Held => {}
                State::Delegated | State::Revoking => return Err(PlanError::Delegated { holder: holder() }),
                State::Draining | State::Lost => return Err(PlanError::Closing { holder: holder() }),
            }
        }
        match index.get(parent).map(|held| held.record.purpose) {
            Some(wanted) if wanted != Purpose::Any && wanted != purpose => {
                Err(PlanError::Purpose { purpose, holder: index.holder(self.space, parent), wanted })
            }
            _ => Ok(()),
        }
    }

    /// Refuses a prefix that shares addresses with one in another space where a rule forbids it. What is delegated for
    /// any purpose counts as in use for every one, for its parent does not see what is in it.
    fn keep_apart(&self, registry: &Registry, node: &Node, purpose: Purpose, state: State) -> Result<(), PlanError> {
        let rules = |space: &AddressSpace| registry.spaces.get(space.as_str()).map(|rules| &rules.unique);
        let used = |purpose: Purpose, state: State| {
            purpose != Purpose::Any || matches!(state, State::Delegated | State::Revoking)
        };
        let bound = |space: &AddressSpace, purpose: Purpose| {
            rules(space)
                .is_some_and(|unique| unique.contains(&purpose) || (purpose == Purpose::Any && !unique.is_empty()))
        };
        if !used(purpose, state) {
            return Ok(());
        }
        let ours = bound(self.space, purpose);
        for (space, other) in self.view.spaces.iter().filter(|(space, _)| *space != self.space) {
            let around = other.index.around(&node.block).map(|n| other.index.chain(&n)).unwrap_or_default();
            let inside = other.index.inside(&node.block).map(|(node, held)| (*node, held));
            for (there, held) in around.into_iter().chain(inside) {
                let theirs = held.record.purpose;
                if used(theirs, held.record.state) && (ours || bound(space, theirs)) {
                    let holder = other.index.holder(space, &there);
                    return Err(PlanError::Overlap { cidr: node.block.cidr(), holder });
                }
            }
        }
        Ok(())
    }

    fn enter(&self, node: Node, claim: &Claim, parent: Option<Node>) -> Step {
        let record = PrefixRecord {
            name: claim.name.clone(),
            owner: claim.owner.clone(),
            purpose: claim.purpose,
            epoch: self.epoch,
            state: State::Held,
            grant: None,
        };
        let path = match parent {
            Some(parent) => format!("{}/{}", self.known.index.path(&parent), claim.name),
            None => claim.name.clone(),
        };
        let reply = Reply::Prefix(Box::new(Prefix {
            space: self.space.clone(),
            cidr: node.block.cidr(),
            level: node.level,
            name: claim.name.clone(),
            owner: claim.owner.clone(),
            purpose: claim.purpose,
            path,
            epoch: self.epoch,
            state: State::Held,
        }));
        self.change(None, vec![self.put(&node, record)], reply)
    }

    fn put(&self, node: &Node, record: PrefixRecord) -> Delta {
        Delta::Put { cidr: node.block.cidr(), level: node.level, record }
    }

    fn reply(&self, node: &Node) -> Reply {
        match self.known.index.prefix(self.space, node) {
            Some(prefix) => Reply::Prefix(Box::new(prefix)),
            None => Reply::NotHeld,
        }
    }

    fn release(&self, prefix: &Prefix) -> Result<Step, PlanError> {
        let node = Node { block: Block::check("cidr", &prefix.cidr)?, level: prefix.level };
        let index = &self.known.index;
        let Some(held) = index.get(&node) else { return Ok(Step::Done(Reply::NotHeld)) };
        if held.record.epoch != prefix.epoch {
            let (presented, current) = (prefix.epoch, held.record.epoch);
            return Err(PlanError::Stale { cidr: prefix.cidr, presented, current });
        }
        let holder = || index.holder(self.space, &node);
        if matches!(held.record.state, State::Delegated | State::Revoking) {
            return Err(PlanError::Delegated { holder: holder() });
        }
        if held.record.grant.is_some() {
            let reason = "was granted by a parent: surrender it to that";
            return Err(PlanError::State { holder: holder(), reason });
        }
        self.empty(&node)?;
        let delta = Delta::Delete { cidr: prefix.cidr, level: node.level };
        Ok(self.change(None, vec![delta], Reply::Done))
    }

    fn empty(&self, node: &Node) -> Result<(), PlanError> {
        let index = &self.known.index;
        match index.children(node).next() {
            None => Ok(()),
            Some((first, _)) => Err(PlanError::NotEmpty {
                holder: index.holder(self.space, node),
                first: index.holder(self.space, first),
                count: index.child_count(node),
            }),
        }
    }
}

fn check_names(claim: &Claim) -> Result<(), PlanError> {
    for (field, text) in [("name", &claim.name), ("owner", &claim.owner)] {
        check_name(field, text)?;
    }
    Ok(())
}

pub(crate) fn check_name(field: &str, text: &str) -> Result<(), PlanError> {
    match name_fault(text) {
        None => Ok(()),
        Some(reason) => {
            Err(PlanError::Invalid { field: field.to_owned(), value: text.to_owned(), reason: format!("is {reason}") })
        }
    }
}

fn put(key: Key, record: &impl serde::Serialize) -> Write {
    Write::Put(key, encode(record))
}

fn encode(record: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(record).expect("records have only text keys and serialise")
}

/// The largest record of a change in bytes; whoever follows reads everything when one was larger.
const MAX_CHANGE: usize = MAX_VALUE / 4;
