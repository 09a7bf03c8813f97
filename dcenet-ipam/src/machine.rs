//! The allocator: a pure function from what is known to what to do next.
//!
//! [`step`] has no clock, no lock, no I/O and no waiting in it. It is given a [`View`] of the store, and answers with
//! what it must still read, or a batch to commit with the reply that holds once it is committed:
//!
//! ```text
//!            +---- Read(queries) ----> fill the view ----+
//!            v                                           |
//!   step(layout, view, command, now, entropy) -----------+
//!            |                                           |
//!            +---- Commit(batch, reply) --> Committed: reply
//!            |                              Conflict: put the values into the view, forget hints, again
//!            |                              Unknown: forget the view, again
//!            +---- Stale: forget the view, again
//!            +---- Done(reply), Err(refusal)
//! ```
//!
//! So the same code serves a plugin that lives for a millisecond, a daemon, a simulator and a model checker.
//!
//! What keeps it right is in the guards alone: whatever a decision rests on is guarded in its batch. An address is bound
//! by a write to its slot that is guarded by the slot's version; the attachment's record changes in the same batch. A
//! lease also guards the record of the address space, so that nobody registers an overlapping pool meanwhile.
//!
//! # Which address
//! The claim's, else the requested one, else the lowest that was not used lately, else the one released longest ago.
//! Released addresses are remembered for [`REMEMBERED`] at least, in the order of release; none is given to another
//! within the cooldown, and none that cools counts as free. After a lost race the search begins at a random place, so
//! that many callers at once part ways.
//!
//! # Clocks
//! Time only orders reuse. A released address counts as cooling while its time is within the cooldown of now, on either
//! side: a clock that jumps delays or hastens reuse once, by no more than the cooldown, and can do nothing else.

mod adopt;
mod block;
mod choose;
mod claim;
mod external;
mod handover;
pub(crate) mod history;
mod lease;
mod quarantine;
mod release;
mod reserve;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use dcenet_core::model::{AttachmentKey, ClusterId, MacAddr};
use dcenet_core::provider::{Dns, Lease, LeaseError, LeaseRequest, LeasedAddress};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::adopt::{AdoptedAddress, AdoptedBy, Adoptee};
pub use self::claim::ClaimExport;
pub use self::handover::MAX_HANDOVER;
pub use self::quarantine::Quarantine;
use crate::config::Layout;
use crate::model::{Addr, AddressSpace, Claim, ClaimKey, KeepPolicy, NodeName};
use crate::record::{AttachmentRecord, SpaceRecord};
use crate::store::{Batch, Entry, Guard, Key, Write};

/// How long at least the time of a release is remembered, unless the address is used again.
pub const REMEMBERED: Duration = Duration::from_secs(3600);

/// What is asked of the allocator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// End a handover: the old attachment keeps the address.
    AbortHandover {
        /// Who was to hand over.
        from: AttachmentKey,
    },
    /// Take over what an owner has under another allocator. What is so already is [`Step::Done`].
    Adopt(Adoptee),
    /// Permit a second attachment of the claims that one holds, for live migration.
    BeginHandover {
        /// Who has the addresses.
        from: AttachmentKey,
        /// Only if its lease has this sequence.
        sequence: Option<u64>,
        /// Who may join; `None` for the first attachment of the claim that leases.
        to: Option<AttachmentKey>,
        /// For how long; at most [`MAX_HANDOVER`].
        limit: Duration,
    },
    /// End a handover: the new attachment has the address.
    CompleteHandover {
        /// Who handed over.
        from: AttachmentKey,
    },
    /// Turn what holds an address and has ended into what it counts as.
    Expire {
        /// The space.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
    },
    /// Take nothing new from a node's block, so that it can be given up.
    CloseBlock {
        /// The pool's name.
        pool: String,
        /// The block: its first address divided by its size.
        block: u128,
        /// The node that must own it.
        node: String,
    },
    /// Give up a claim: its address goes back, unless something is attached through it.
    Forget {
        /// The space of the claim.
        space: AddressSpace,
        /// The claim.
        claim: ClaimKey,
    },
    /// The workload of a claim is gone.
    Gone {
        /// The space of the claim.
        space: AddressSpace,
        /// The claim.
        claim: ClaimKey,
        /// Only what was last used by a commit up to this revision.
        fence: Option<u64>,
    },
    /// Take a claim in that another cluster handed out.
    HandIn {
        /// What it handed out.
        export: ClaimExport,
        /// The cluster of this store.
        here: ClusterId,
    },
    /// Hand a claim out to another cluster.
    HandOut {
        /// The space of the claim.
        space: AddressSpace,
        /// The claim.
        claim: ClaimKey,
        /// The cluster.
        to: ClusterId,
    },
    /// Record that somebody outside uses addresses. What was leased of them before is for the caller to look for then.
    Hold {
        /// The space.
        space: AddressSpace,
        /// The first address.
        first: Addr,
        /// The last address, of the same family.
        last: Addr,
        /// Who uses them.
        holder: String,
    },
    /// Give an attachment its addresses.
    Lease(LeaseRequest),
    /// End a quarantine.
    Lift {
        /// The space.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
    },
    /// What does an attachment hold?
    Lookup(AttachmentKey),
    /// Could a lease be given now?
    Probe,
    /// Keep an address from everybody.
    Quarantine {
        /// The space.
        space: AddressSpace,
        /// The address.
        address: IpAddr,
        /// Why.
        why: Quarantine,
    },
    /// Record a claim with all that belongs to it, as [`Command::Reserve`] does without a MAC address.
    Record {
        /// The pool's name.
        pool: String,
        /// The claim.
        claim: Claim,
    },
    /// Enter the pools of the configuration into their spaces. With `recorded`, also note that all claims of the
    /// configuration were recorded.
    Register {
        /// Whether the claims were recorded.
        recorded: bool,
    },
    /// Take back what an attachment holds.
    Release {
        /// The attachment.
        attachment: AttachmentKey,
        /// Only if its lease has this sequence: whoever concluded from an older state that the attachment is gone must
        /// not release a newer one. `None` releases what it holds now.
        sequence: Option<u64>,
    },
    /// Take back what an attachment of a node holds if the node's record is still the one that told of its death.
    ReleaseOfNode {
        /// The attachment.
        attachment: AttachmentKey,
        /// The sequence of its lease.
        sequence: u64,
        /// The node.
        node: NodeName,
        /// The version of its record.
        version: Option<u64>,
    },
    /// Give a claim another key; whatever is attached stays.
    Rename {
        /// The space of the claim.
        space: AddressSpace,
        /// Its key.
        from: ClaimKey,
        /// The key that it gets; there must be no claim of that key.
        to: ClaimKey,
    },
    /// Put a bad address of a lease into quarantine and give another in its place.
    Replace {
        /// The attachment.
        attachment: AttachmentKey,
        /// The sequence of its lease.
        sequence: u64,
        /// The bad address.
        bad: IpAddr,
        /// What is wrong with it.
        why: Quarantine,
    },
    /// Record a claim, so that its address is kept for it also from other configurations.
    Reserve {
        /// The pool's name.
        pool: String,
        /// The claim.
        claim: ClaimKey,
        /// The address; `None` for any free one.
        address: Option<IpAddr>,
        /// How long the address is kept.
        keep: KeepPolicy,
    },
    /// Have a claim again that was handed out to a cluster which, as somebody vouches, does not hold it.
    TakeBack {
        /// The space of the claim.
        space: AddressSpace,
        /// The claim.
        claim: ClaimKey,
    },
    /// Give a closed block up, or open it again if something of it is in use.
    SettleBlock {
        /// The pool's name.
        pool: String,
        /// The block: its first address divided by its size.
        block: u128,
        /// The node that must own it.
        node: String,
    },
    /// Take back what [`Command::Hold`] recorded.
    Unhold {
        /// The space.
        space: AddressSpace,
        /// The first address.
        first: Addr,
        /// The last address.
        last: Addr,
        /// Who used them.
        holder: String,
    },
}

/// What the machine wants to know.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Query {
    /// [`Store::first_gap`](crate::store::Store::first_gap): prefix, first, last.
    Gap(Key, u128, u128),
    /// The entry of a key.
    Key(Key),
    /// [`Store::scan`](crate::store::Store::scan): prefix, after, limit.
    Scan(Key, Option<Key>, usize),
}

/// What is known of the store.
#[derive(Debug, Clone, Default)]
pub struct View {
    keys: BTreeMap<Key, Option<Entry>>,
    gaps: BTreeMap<Query, Option<u128>>,
    scans: BTreeMap<Query, Vec<Key>>,
}

impl View {
    /// Enters what a key holds.
    pub fn learn_key(&mut self, key: Key, entry: Option<Entry>) {
        self.keys.insert(key, entry);
    }

    /// Enters the answer to a [`Query::Gap`].
    pub fn learn_gap(&mut self, query: Query, gap: Option<u128>) {
        self.gaps.insert(query, gap);
    }

    /// Enters the answer to a [`Query::Scan`].
    pub fn learn_scan(&mut self, query: Query, found: Vec<Key>) {
        self.scans.insert(query, found);
    }

    /// Forgets the answer to a [`Query::Scan`].
    pub(crate) fn forget_scan(&mut self, query: &Query) {
        self.scans.remove(query);
    }

    /// Enters what a refused batch's guards found, and forgets hints, one of which may have been wrong.
    pub fn learn_conflict(&mut self, guards: &[Guard], current: Vec<Option<Entry>>) {
        self.gaps.clear();
        self.scans.clear();
        for (guard, entry) in guards.iter().zip(current) {
            self.keys.insert(guard.key.clone(), entry);
        }
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Read these, put them into the view and step again.
    Read(Vec<Query>),
    /// Commit the batch (its `request_id` is for the caller to fill in); once it is committed, the reply holds.
    Commit(Batch, Reply),
    /// There is nothing to commit.
    Done(Reply),
    /// The view contradicts itself, for its parts were read at different times: forget it and step again.
    Stale,
    /// The configuration's pools are not registered, or its claims not recorded: first [`Command::Register`],
    /// [`Command::Reserve`] each claim with an address, [`Command::Register`] with `recorded`.
    Unregistered,
}

/// The answer to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// It is so now.
    Done,
    /// To [`Command::HandOut`].
    HandedOut(ClaimExport),
    /// To [`Command::Lease`], [`Command::Lookup`] and [`Command::Replace`]. A sequence of 0 stands for the revision of the commit.
    Leased(Lease),
    /// Nothing is held (under that sequence).
    NotHeld,
}

impl Reply {
    /// Fills in what only the commit could tell.
    #[must_use]
    pub fn committed(mut self, revision: u64) -> Self {
        if let Self::Leased(lease) = &mut self {
            for address in &mut lease.addresses {
                if address.sequence == 0 {
                    address.sequence = revision;
                }
            }
        }
        self
    }
}

/// Decides what to do next about a command. `now` is in milliseconds since 1970. `entropy` is 0 at first; after a
/// conflict it is random and spreads the searches of rivals.
///
/// # Errors
/// The command is refused.
pub fn step(layout: &Layout, view: &View, command: &Command, now: u64, entropy: u64) -> Result<Step, LeaseError> {
    let (missing, aside, spaces_read) = (RefCell::default(), RefCell::default(), RefCell::default());
    let application = RefCell::default();
    let work = Work { layout, view, now, entropy, missing, aside, spaces_read, application };
    let result = match command {
        Command::AbortHandover { from } => work.abort_handover(from),
        Command::Adopt(adoptee) => work.take_over(adoptee),
        Command::BeginHandover { from, sequence, to, limit } => {
            work.begin_handover(from, *sequence, to.as_ref(), *limit)
        }
        Command::CloseBlock { pool, block, node } => work.close_block(pool, *block, node),
        Command::CompleteHandover { from } => work.complete_handover(from),
        Command::Expire { space, address } => work.expire(space, Addr::from(*address)),
        Command::Forget { space, claim } => work.forget(space, claim),
        Command::Gone { space, claim, fence } => work.gone(space, claim, *fence),
        Command::HandIn { export, here } => work.hand_in(export, here),
        Command::HandOut { space, claim, to } => work.hand_out(space, claim, to),
        Command::Hold { space, first, last, holder } => work.hold(space, *first, *last, holder),
        Command::Lease(request) => work.lease(request),
        Command::Lift { space, address } => work.lift(space, Addr::from(*address)),
        Command::Lookup(attachment) => work.lookup(attachment),
        Command::Probe => work.probe(),
        Command::Quarantine { space, address, why } => work.quarantine(space, Addr::from(*address), why),
        Command::Record { pool, claim } => work.record_claim(pool, claim, false),
        Command::Register { recorded } => work.register(*recorded),
        Command::Release { attachment, sequence } => work.release(attachment, *sequence, None),
        Command::ReleaseOfNode { attachment, sequence, node, version } => {
            work.release(attachment, Some(*sequence), Some((node, *version)))
        }
        Command::Rename { space, from, to } => work.rename(space, from, to),
        Command::Replace { attachment, sequence, bad, why } => work.replace(attachment, *sequence, *bad, why),
        Command::Reserve { pool, claim, address, keep } => {
            let (key, address, keep) = (claim.clone(), address.map(Addr::from), *keep);
            work.record_claim(pool, &Claim { key, address, keep, mac: None }, false)
        }
        Command::SettleBlock { pool, block, node } => work.settle_block(pool, *block, node),
        Command::TakeBack { space, claim } => work.take_back(space, claim),
        Command::Unhold { space, first, last, holder } => work.unhold(space, *first, *last, holder),
    };
    match result {
        Ok(step) => Ok(step),
        Err(Halt::Read) => Ok(Step::Read(work.missing.into_inner())),
        Err(Halt::Stale) => Ok(Step::Stale),
        Err(Halt::Unregistered) => Ok(Step::Unregistered),
        Err(Halt::Refuse(error)) => Err(error),
    }
}

/// Why a decision could not be reached yet, or not at all.
enum Halt {
    Read,
    Refuse(LeaseError),
    Stale,
    Unregistered,
}

impl From<LeaseError> for Halt {
    fn from(error: LeaseError) -> Self {
        Self::Refuse(error)
    }
}

struct Work<'a> {
    layout: &'a Layout,
    view: &'a View,
    now: u64,
    entropy: u64,
    missing: RefCell<Vec<Query>>,
    /// What a choice of an address rests on and changes beside the slot, until the address is taken.
    aside: RefCell<Vec<Aside>>,
    spaces_read: RefCell<Vec<(AddressSpace, SpaceEntry)>>,
    /// Whom an address is looked for, where a pool's blocks are of applications.
    application: RefCell<Option<String>>,
}

/// A space's record with its version.
type SpaceEntry = Option<(Rc<SpaceRecord>, u64)>;

/// A guard and writes that go with an address that was chosen.
struct Aside {
    guard: Key,
    version: Option<u64>,
    puts: Vec<(Key, Vec<u8>)>,
}

impl Work<'_> {
    /// The entry of a key, or a halt to read it.
    fn entry(&self, key: &Key) -> Result<Option<&Entry>, Halt> {
        match self.view.keys.get(key) {
            Some(entry) => Ok(entry.as_ref()),
            None => self.want(Query::Key(key.clone())),
        }
    }

    /// Asks for several keys at once, so that they cost one trip.
    fn need<'k>(&self, keys: impl IntoIterator<Item = &'k Key>) -> Result<(), Halt> {
        let absent = keys.into_iter().filter(|key| !self.view.keys.contains_key(*key));
        self.missing.borrow_mut().extend(absent.cloned().map(Query::Key));
        if self.missing.borrow().is_empty() { Ok(()) } else { Err(Halt::Read) }
    }

    fn gap(&self, prefix: &[u8], low: u128, high: u128) -> Result<Option<u128>, Halt> {
        let query = Query::Gap(prefix.to_vec(), low, high);
        match self.view.gaps.get(&query) {
            Some(gap) => Ok(*gap),
            None => self.want(query),
        }
    }

    fn scan(&self, prefix: &[u8], after: Option<Key>, limit: usize) -> Result<&[Key], Halt> {
        let query = Query::Scan(prefix.to_vec(), after, limit);
        match self.view.scans.get(&query) {
            Some(found) => Ok(found),
            None => self.want(query),
        }
    }

    fn want<T>(&self, query: Query) -> Result<T, Halt> {
        self.missing.borrow_mut().push(query);
        Err(Halt::Read)
    }

    fn set_aside(&self, aside: Aside) {
        self.aside.borrow_mut().push(aside);
    }

    /// The record of a key with its version.
    fn record<T: DeserializeOwned>(&self, key: &Key) -> Result<Option<(T, u64)>, Halt> {
        let Some(entry) = self.entry(key)? else { return Ok(None) };
        match serde_json::from_slice(&entry.value) {
            Ok(record) => Ok(Some((record, entry.version))),
            Err(error) => Err(Halt::Refuse(LeaseError::Store(
                format!("the record {:?} cannot be understood: {error}", key.escape_ascii().to_string()).into(),
            ))),
        }
    }

    fn lookup(&self, attachment: &AttachmentKey) -> Result<Step, Halt> {
        let held = self.record::<AttachmentRecord>(&crate::record::attachment_key(attachment))?;
        Ok(Step::Done(match held {
            Some((record, version)) => Reply::Leased(self.compose(&record, record.sequence(version))),
            None => Reply::NotHeld,
        }))
    }

    /// What an attachment's record means under this configuration.
    fn compose(&self, record: &AttachmentRecord, sequence: u64) -> Lease {
        let mut lease = Lease {
            addresses: Vec::new(),
            routes: self.layout.routes.clone(),
            dns: self.layout.dns.clone(),
            mac: record.mac,
        };
        for held in &record.addresses {
            let pool =
                self.layout.pools.iter().find(|p| p.name == held.pool && p.subnet.contains(&held.address.addr()));
            lease.addresses.push(LeasedAddress {
                gateway: pool.and_then(|p| p.gateway),
                vlan: pool.and_then(|p| p.vlan),
                mtu: pool.and_then(|p| p.mtu),
                prefix: held.delegated.then(|| held.address.trunc()),
                ..LeasedAddress::new(held.address, held.pool.as_str(), sequence)
            });
            let Some(pool) = pool else { continue };
            lease.routes.extend(pool.routes.iter().filter(|r| !self.layout.routes.contains(r)).cloned());
            add_dns(&mut lease.dns, &pool.dns);
        }
        lease
    }

    /// Whether a time of release is so recent that the address rests.
    fn cooling(&self, at: u64) -> bool {
        u128::from(self.now.abs_diff(at)) < self.layout.cooldown.as_millis()
    }
}

fn add_dns(dns: &mut Dns, more: &Dns) {
    let Dns { nameservers, domain, search, options } = more;
    let add = |to: &mut Vec<String>, from: &[String]| {
        for text in from {
            if !to.contains(text) {
                to.push(text.clone());
            }
        }
    };
    add(&mut dns.nameservers, nameservers);
    add(&mut dns.search, search);
    add(&mut dns.options, options);
    if dns.domain.is_none() {
        dns.domain.clone_from(domain);
    }
}

/// Gathers a batch.
#[derive(Default)]
struct Draft {
    batch: Batch,
    /// The MAC address of the claims that the batch leases.
    mac: Option<MacAddr>,
}

impl Draft {
    fn guard(&mut self, key: &Key, version: Option<u64>) {
        if !self.batch.guards.iter().any(|g| g.key == *key) {
            self.batch.guards.push(Guard { key: key.clone(), version });
        }
    }

    /// Enters the MAC address that a claim keeps; of several claims the first counts.
    fn bear(&mut self, mac: Option<MacAddr>) {
        self.mac = self.mac.or(mac);
    }

    fn put(&mut self, key: Key, record: &impl Serialize) {
        let value = serde_json::to_vec(record).expect("records have only text keys and serialise");
        self.batch.writes.push(Write::Put(key, value));
    }

    fn put_empty(&mut self, key: Key) {
        self.batch.writes.push(Write::Put(key, Vec::new()));
    }

    fn delete(&mut self, key: Key) {
        self.batch.writes.push(Write::Delete(key));
    }

    fn commit(self, reply: Reply) -> Step {
        Step::Commit(self.batch, reply)
    }
}
