//! The allocator's decisions checked in every order that is possible: two allocators, two addresses, two attachments with
//! or without claims, a collector, live migration; each may be killed, and each reply may get lost, at any time. Two
//! attachments of one workload are also what its move to another node looks like. With `DCENET_SOAK` also three
//! addresses and three attachments: of three claims, of two, of a claim that migrates beside another attachment. Without
//! it, only the first steps of those.
//!
//! The state holds what the store holds and what each allocator has read; the decisions are the real
//! [`step`](dcenet_ipam::machine::step). Versions of a key only matter by their order, and those of different keys are
//! not compared, so each state numbers them anew from 1, and the space is finite. (The one number that is compared with
//! the versions of several keys, a collector's fence, is kept as the version that each of them had then: what is written
//! later has a higher one than either.)
//!
//! # Planted bugs
//! Of the nine classes of bugs that allocators of this field had, the six that break what somebody was told are planted
//! here too: a lost update, a collection by stale evidence, a release by name, half a batch, an allocator that acts late
//! (here: it ends a handover that has ended already), and a rebuild from an incomplete source. The other three are the
//! simulator's alone, for this model has nothing that could show them: addresses as 64-bit numbers need IPv6, and here is
//! one IPv4 pool of two or three addresses; a hot object breaks no promise, it makes rivals lose races, and here is no
//! measure of that; fast reuse is seen by a clock, and here time stands still and the cooldown is nothing.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::Ipam;
use dcenet_ipam::machine::{Command, Query, Reply, Step, View, step};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Entry, Key, Outcome, Store, Write, number_of};
use pollster::block_on;
use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::{attachment, config};

/// A bug that the checker must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plant {
    /// A crash in the middle of a commit leaves half of it.
    HalfBatches,
    /// The record of an address is lost, as by a rebuild from a list that was not complete.
    IncompleteRebuild,
    /// Who completes or aborts a handover does so, however late.
    LateHandover,
    NoSlotGuards,
    ReleaseByName,
    StaleEvidence,
}

struct Allocators {
    ipam: Ipam,
    /// The workloads of the attachments: 0 has a claim to the first address, 1 and 2 to any, others have none. Those of
    /// one workload are on different nodes, and may hand it over.
    workloads: &'static [usize],
    /// Of the attachments.
    keys: Vec<AttachmentKey>,
    names: Vec<String>,
    /// Under which keys their records are.
    records: Vec<Bytes>,
    /// Addresses of the pool, from 10.0.0.1 on.
    addresses: u32,
    plant: Option<Plant>,
    /// What was decided before: a world has many orders in which an allocator comes to know the same.
    decided: RwLock<HashMap<u128, Decision>>,
}

type Decision = Arc<Result<Step, LeaseError>>;

/// Shared, for a world differs from the one before it in few records.
type Bytes = Arc<[u8]>;

type Content = BTreeMap<Bytes, (Bytes, u64)>;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    store: Content,
    /// Sorted, for it does not matter which is which.
    allocators: Vec<Option<Work>>,
    attachments: Vec<Status>,
    /// Of each attachment: the one that it may share its address with, and whether that has come.
    declared: Vec<Option<(usize, bool)>>,
    /// Of each attachment's workload: the address that its claim had at first, and is to have for ever.
    kept: Vec<Option<u128>>,
}

/// What the runtime knows of an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Status {
    Absent,
    /// ADD was called, and has not answered.
    Adding {
        busy: bool,
    },
    /// ADD has answered with this address.
    Running(u128),
    /// DEL was called, and has not answered.
    Deleting {
        busy: bool,
    },
    /// Its node died. Nobody calls DEL; the collector finds it.
    Dead,
}

/// What an allocator is doing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Work {
    task: Task,
    /// The caller is not waiting any more.
    abandoned: bool,
    keys: BTreeMap<Bytes, Option<(Bytes, u64)>>,
    gaps: BTreeMap<Query, Option<u128>>,
    scans: BTreeMap<Query, Vec<Key>>,
    /// Whether a race was lost.
    lost: bool,
    /// Releases of a collector that come after this one.
    rest: Vec<(usize, u64)>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Task {
    Lease(usize),
    Release {
        attachment: usize,
        sequence: u64,
        collecting: bool,
    },
    /// The evidence is gathered: who lives, as of which revision.
    Collect {
        alive: Vec<bool>,
        /// Of each attachment's record, 0 where there was none.
        fence: Vec<u64>,
    },
    Begin {
        from: usize,
        sequence: u64,
        to: usize,
    },
    End {
        from: usize,
        to: usize,
        completing: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Add(usize),
    Delete(usize),
    Collect,
    Die(usize),
    /// Declares a handover.
    Begin(usize, usize),
    /// The target has the address from now on.
    Complete(usize, usize),
    /// The source goes on having it.
    Abort(usize, usize),
    /// Of [`Plant::IncompleteRebuild`].
    Rebuild(u32),
    /// Reads what it wants to know next, or ends without a commit.
    Advance(usize),
    Commit(usize, Fate),
    /// The caller has lost patience, the call goes on.
    Abandon(usize),
    Kill(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Fate {
    Answered,
    /// Applied, if its guards hold, and the caller does not learn it.
    ReplyLost,
    Lost,
}

/// Names of properties.
const ALONE: &str = "who was told an address has it alone";
const CLEAN: &str = "nothing is left";

const NOW: u64 = 1_800_000_000_000;

impl Allocators {
    fn new(workloads: &'static [usize], addresses: u32, plant: Option<Plant>) -> Self {
        let text = format!(
            r#"{{ "cooldown": "0s", "pools": [ {{ "name": "p", "subnet": "10.0.0.0/29",
                 "ranges": ["10.0.0.1-10.0.0.{addresses}"],
                 "claims": {{ "shop/w0": {{ "address": "10.0.0.1" }}, "shop/w1": {{}}, "shop/w2": {{}} }} }} ] }}"#
        );
        let ipam = Ipam::new(&config(&text), Arc::new(MemoryStore::new())).unwrap();
        let keys: Vec<AttachmentKey> = (0..workloads.len()).map(|a| attachment(&format!("a{a}"))).collect();
        let names: Vec<String> = keys.iter().map(|key| key.to_string()).collect();
        let records = names.iter().map(|name| format!("t/{name}").into_bytes().into()).collect();
        Self { ipam, workloads, keys, names, records, addresses, plant, decided: RwLock::default() }
    }

    /// The version of an attachment's record, which is the sequence of its lease.
    fn sequence(&self, world: &World, a: usize) -> Option<u64> {
        world.store.get(&self.records[a]).map(|(_, version)| *version)
    }

    fn command(&self, work: &Work) -> Option<Command> {
        Some(match &work.task {
            Task::Lease(a) => Command::Lease(LeaseRequest {
                workload: Some(format!("shop/w{}", self.workloads[*a]).parse().unwrap()),
                ..LeaseRequest::new(self.keys[*a].clone())
            }),
            Task::Release { attachment: a, sequence, .. } => Command::Release {
                attachment: self.keys[*a].clone(),
                sequence: (self.plant != Some(Plant::ReleaseByName)).then_some(*sequence),
            },
            Task::Collect { .. } => return None,
            Task::Begin { from, sequence, to } => Command::BeginHandover {
                from: self.keys[*from].clone(),
                sequence: Some(*sequence),
                to: Some(self.keys[*to].clone()),
                limit: Duration::from_secs(60),
            },
            Task::End { from, completing: true, .. } => Command::CompleteHandover { from: self.keys[*from].clone() },
            Task::End { from, completing: false, .. } => Command::AbortHandover { from: self.keys[*from].clone() },
        })
    }

    fn decide(&self, work: &Work) -> Option<Decision> {
        let known = (&work.task, &work.keys, &work.gaps, &work.scans, work.lost);
        // Two hashes of 64 bits: one alone would take two of some million for the same.
        let hash = |salt: u8| {
            let mut hasher = DefaultHasher::new();
            (salt, &known).hash(&mut hasher);
            u128::from(hasher.finish())
        };
        let number = hash(0) << 64 | hash(1);
        if let Some(decision) = self.decided.read().unwrap_or_else(PoisonError::into_inner).get(&number) {
            return Some(decision.clone());
        }
        let decision = Arc::new(self.decide_anew(work)?);
        self.decided.write().unwrap_or_else(PoisonError::into_inner).insert(number, decision.clone());
        Some(decision)
    }

    fn decide_anew(&self, work: &Work) -> Option<Result<Step, LeaseError>> {
        let mut view = View::default();
        for (key, entry) in &work.keys {
            view.learn_key(
                key.to_vec(),
                entry.as_ref().map(|(value, version)| Entry { value: value.to_vec(), version: *version }),
            );
        }
        for (query, gap) in &work.gaps {
            view.learn_gap(query.clone(), *gap);
        }
        for (query, found) in &work.scans {
            view.learn_scan(query.clone(), found.clone());
        }
        Some(step(self.ipam.layout(), &view, &self.command(work)?, NOW, u64::from(work.lost)))
    }

    /// Ends an allocator's task; the runtime learns the reply if it still waits.
    fn finish(&self, world: &mut World, who: usize, reply: Option<&Reply>) {
        let Some(mut work) = world.allocators[who].take() else { return };
        match work.task {
            Task::Lease(a) => {
                world.attachments[a] = match reply {
                    Some(Reply::Leased(lease)) => {
                        let address = bits(&lease.addresses[0].address.addr());
                        self.runs(world, a, address);
                        Status::Running(address)
                    }
                    // What failed must be deleted.
                    _ => Status::Deleting { busy: false },
                };
            }
            Task::Release { collecting: true, .. } | Task::Collect { .. } => {
                if !work.rest.is_empty() {
                    let (attachment, sequence) = work.rest.remove(0);
                    let task = Task::Release { attachment, sequence, collecting: true };
                    world.allocators[who] = Some(Work { rest: work.rest, ..Work::new(task) });
                }
            }
            Task::Release { attachment, collecting: false, .. } if !work.abandoned => {
                world.attachments[attachment] = match reply {
                    Some(_) => {
                        self.is_absent(world, attachment);
                        Status::Absent
                    }
                    None => Status::Deleting { busy: false },
                };
            }
            // Who declares and ends handovers looks at the attachments, not at these replies.
            Task::Release { .. } | Task::Begin { .. } | Task::End { .. } => {}
        }
    }

    /// An ADD was answered.
    fn runs(&self, world: &mut World, a: usize, address: u128) {
        for declared in world.declared.iter_mut().flatten().filter(|(to, _)| *to == a) {
            declared.1 = true;
        }
        if self.has_claim(a) {
            for (kept, workload) in world.kept.iter_mut().zip(self.workloads) {
                if *workload == self.workloads[a] {
                    kept.get_or_insert(address);
                }
            }
        }
    }

    /// A DEL was answered, or what has died is collected. If it had joined a handover, that is over.
    fn is_absent(&self, world: &mut World, a: usize) {
        for declared in &mut world.declared {
            if *declared == Some((a, true)) {
                *declared = None;
            }
        }
    }

    fn has_claim(&self, a: usize) -> bool {
        self.workloads[a] < 3
    }

    fn advance(&self, world: &mut World, who: usize) -> Option<()> {
        if let Task::Collect { alive, fence } = &world.allocators[who].as_ref()?.task {
            let dead = (0..self.workloads.len()).filter(|a| !alive[*a]);
            let planted = self.plant == Some(Plant::StaleEvidence);
            let held = dead.filter_map(|a| Some((a, self.sequence(world, a)?)));
            let rest = held.filter(|(a, version)| planted || *version <= fence[*a]).collect();
            world.allocators[who].as_mut()?.rest = rest;
            self.finish(world, who, None);
            return Some(());
        }
        let work = world.allocators[who].as_mut()?;
        match self.decide(work)?.as_ref() {
            Ok(Step::Read(queries)) => {
                // Each question is a trip of its own, except that keys are read together.
                match &queries[0] {
                    Query::Key(_) => {
                        for query in queries {
                            if let Query::Key(key) = query {
                                work.keys.insert(key[..].into(), world.store.get(&key[..]).cloned());
                            }
                        }
                    }
                    query @ Query::Gap(prefix, low, high) => {
                        let taken = |n: &u128| world.store.contains_key(&[&prefix[..], &n.to_be_bytes()].concat()[..]);
                        work.gaps.insert(query.clone(), (*low..=*high).find(|n| !taken(n)));
                    }
                    query @ Query::Scan(prefix, after, limit) => {
                        let after = after.as_deref();
                        let keys = world.store.keys().filter(|k| k.starts_with(prefix) && after < Some(k));
                        work.scans.insert(query.clone(), keys.take(*limit).map(|k| k.to_vec()).collect());
                    }
                }
            }
            Ok(Step::Stale) => {
                let task = work.task.clone();
                let kept = (work.abandoned, std::mem::take(&mut work.rest));
                *work = Work { lost: true, abandoned: kept.0, rest: kept.1, ..Work::new(task) };
            }
            Ok(Step::Done(reply)) => self.finish(world, who, Some(reply)),
            Ok(Step::Commit(..)) => return None,
            Ok(Step::Unregistered) => unreachable!("the pool is registered, and nothing removes it"),
            Err(_) => self.finish(world, who, None),
        }
        Some(())
    }

    fn commit(&self, world: &mut World, who: usize, fate: Fate) -> Option<()> {
        let work = world.allocators[who].as_ref()?;
        let decision = self.decide(work)?;
        let Ok(Step::Commit(batch, reply)) = decision.as_ref() else { return None };
        let mut batch = batch.clone();
        if self.plant == Some(Plant::NoSlotGuards) {
            batch.guards.retain(|g| !g.key.starts_with(b"s/"));
        }
        if self.plant == Some(Plant::LateHandover) && matches!(work.task, Task::End { .. }) {
            batch.guards.clear();
        }
        let task = work.task.clone();
        let outcome = if fate == Fate::Lost { None } else { Some(apply(&mut world.store, &batch)) };
        if outcome == Some(true) {
            match task {
                // From now on the other may come.
                Task::Begin { from, to, .. } if *reply == Reply::Done => world.declared[from] = Some((to, false)),
                Task::End { from, .. } => world.declared[from] = None,
                _ => {}
            }
        }
        let work = world.allocators[who].as_mut()?;
        match outcome {
            Some(true) if fate == Fate::Answered => self.finish(world, who, Some(reply)),
            Some(false) if fate == Fate::Answered => {
                work.gaps.clear();
                work.scans.clear();
                work.lost = true;
                for guard in &batch.guards {
                    work.keys.insert(guard.key[..].into(), world.store.get(&guard.key[..]).cloned());
                }
            }
            // Decided anew from what is there.
            _ => {
                work.keys.clear();
                work.gaps.clear();
                work.scans.clear();
            }
        }
        Some(())
    }

    /// Whether what the runtime was told is so.
    fn sound(&self, world: &World) -> bool {
        let running = || {
            let statuses = world.attachments.iter().enumerate();
            statuses.filter_map(|(a, s)| if let Status::Running(address) = s { Some((a, *address)) } else { None })
        };
        let shares = |a: usize, b: usize| world.declared[a].is_some_and(|(to, _)| to == b);
        running().all(|(a, address)| {
            let alone = running().all(|(b, other)| a == b || address != other || shares(a, b) || shares(b, a));
            let own = holders(&world.store, address).contains(&self.names[a]);
            // A claim has its address wherever its workload runs.
            let kept = !self.has_claim(a) || world.kept[a] == Some(address);
            // The first workload has the first address, and nobody else ever gets it.
            alone && own && kept && (self.workloads[a] == 0) == (address == bits(&"10.0.0.1".parse().unwrap()))
        })
    }

    /// When nobody works and nothing runs, nothing is bound.
    fn clean(&self, world: &World) -> bool {
        let rest = world.allocators.iter().all(Option::is_none)
            && world.attachments.iter().all(|s| matches!(s, Status::Absent));
        let held = world.store.keys().any(|k| k.starts_with(b"t/"))
            || world.store.values().any(|(v, _)| v.starts_with(b"{\"bound\"") || v.starts_with(b"{\"handover\""));
        !rest || !held
    }
}

impl Work {
    fn new(task: Task) -> Self {
        let (keys, gaps, scans) = Default::default();
        Self { task, abandoned: false, keys, gaps, scans, lost: false, rest: Vec::new() }
    }
}

/// Applies a batch if its guards hold.
fn apply(store: &mut Content, batch: &Batch) -> bool {
    if batch.guards.iter().any(|g| store.get(&g.key[..]).map(|(_, version)| *version) != g.version) {
        return false;
    }
    // Above whatever is known to anybody: `canonical` has numbered those from 1.
    for write in &batch.writes {
        match write {
            Write::Delete(key) => drop(store.remove(&key[..])),
            Write::Put(key, value) => drop(store.insert(key[..].into(), (value[..].into(), NEW))),
        }
    }
    true
}

/// The version of what is written just now.
const NEW: u64 = u64::MAX - 1;

/// Numbers the versions of each key anew from 1, in their order, and sorts the allocators.
fn canonical(world: &mut World, records: &[Bytes]) {
    fn versions<'a>(world: &'a mut World, records: &[Bytes], mut each: impl FnMut(&Bytes, &'a mut u64)) {
        for (key, (_, version)) in &mut world.store {
            each(key, version);
        }
        for work in world.allocators.iter_mut().flatten() {
            match &mut work.task {
                Task::Release { attachment, sequence, .. } => each(&records[*attachment], sequence),
                Task::Collect { fence, .. } => records.iter().zip(fence).for_each(|(key, version)| each(key, version)),
                Task::Begin { from, sequence, .. } => each(&records[*from], sequence),
                Task::Lease(_) | Task::End { .. } => {}
            }
            for (key, seen) in &mut work.keys {
                if let Some((_, version)) = seen {
                    each(key, version);
                }
            }
            for (attachment, version) in &mut work.rest {
                each(&records[*attachment], version);
            }
        }
    }
    let mut known: HashMap<Bytes, Vec<u64>> = HashMap::new();
    versions(world, records, |key, version| match known.get_mut(key) {
        Some(known) => known.push(*version),
        None => drop(known.insert(key.clone(), vec![0, *version])),
    });
    for known in known.values_mut() {
        known.sort_unstable();
        known.dedup();
    }
    versions(world, records, |key, version| {
        *version = known[key].binary_search(version).expect("collected above") as u64;
    });
    world.allocators.sort_unstable();
}

fn bits(address: &std::net::IpAddr) -> u128 {
    match address {
        std::net::IpAddr::V4(address) => u32::from(*address).into(),
        std::net::IpAddr::V6(address) => u128::from(*address),
    }
}

/// Who has an address, as its record says: one, or both of a handover once the second has joined.
fn holders(store: &Content, address: u128) -> Vec<String> {
    let Some((value, _)) = store.get(&[b"s/default/4".as_slice(), &address.to_be_bytes()].concat()[..]) else {
        return Vec::new();
    };
    let record: serde_json::Value = serde_json::from_slice(value).unwrap();
    let joined = record["handover"]["joined"] == true;
    let second = record["handover"]["to"].as_str().filter(|_| joined);
    let found = [record["bound"]["by"].as_str(), record["handover"]["by"].as_str(), second];
    found.into_iter().flatten().map(str::to_owned).collect()
}

impl Model for Allocators {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        // The pool is registered and the claims of the configuration are recorded.
        block_on(self.ipam.ready()).unwrap();
        let content = block_on(self.ipam.store().scan(b"", None, 1_000)).unwrap();
        let store = content.into_iter().map(|(key, entry)| (key.into(), (entry.value.into(), entry.version))).collect();
        let count = self.workloads.len();
        let attachments = vec![Status::Absent; count];
        let (declared, kept) = (vec![None; count], vec![None; count]);
        let mut world = World { store, allocators: vec![None; 2], attachments, declared, kept };
        canonical(&mut world, &self.records);
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let idle = world.allocators.iter().any(Option::is_none);
        // Whoever takes an attachment out of a handover does not let it join meanwhile.
        let aborting = |a: usize| {
            let aborts = |w: &Work| matches!(w.task, Task::End { to, completing: false, .. } if to == a);
            world.allocators.iter().flatten().any(aborts)
        };
        for (a, status) in world.attachments.iter().enumerate() {
            match status {
                Status::Absent | Status::Adding { busy: false } if aborting(a) => {}
                Status::Absent if idle => actions.push(Action::Add(a)),
                // Whose ADD was killed may be asked for again, or given up.
                Status::Adding { busy: false } if idle => actions.extend([Action::Add(a), Action::Delete(a)]),
                Status::Deleting { busy: false } if idle => actions.push(Action::Delete(a)),
                Status::Running(_) => {
                    actions.push(Action::Die(a));
                    if idle {
                        actions.push(Action::Delete(a));
                    }
                }
                _ => {}
            }
        }
        if idle {
            self.migrations(world, actions);
        }
        if self.plant == Some(Plant::IncompleteRebuild) {
            actions.extend((0..self.addresses).map(Action::Rebuild));
        }
        let collects = |w: &Work| matches!(w.task, Task::Collect { .. } | Task::Release { collecting: true, .. });
        if idle && !world.allocators.iter().flatten().any(collects) {
            actions.push(Action::Collect);
        }
        for (who, work) in world.allocators.iter().enumerate() {
            let Some(work) = work else { continue };
            match self.decide(work).as_deref() {
                Some(Ok(Step::Commit(..))) => {
                    actions.extend([Fate::Answered, Fate::ReplyLost, Fate::Lost].map(|fate| Action::Commit(who, fate)));
                }
                _ => actions.push(Action::Advance(who)),
            }
            actions.push(Action::Kill(who));
            if matches!(work.task, Task::Release { collecting: false, .. }) && !work.abandoned {
                actions.push(Action::Abandon(who));
            }
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        let idle = world.allocators.iter().position(Option::is_none);
        match action {
            Action::Add(a) => {
                world.attachments[a] = Status::Adding { busy: true };
                world.allocators[idle?] = Some(Work::new(Task::Lease(a)));
            }
            Action::Begin(from, to) => {
                let sequence = self.sequence(&world, from).unwrap_or(0);
                world.allocators[idle?] = Some(Work::new(Task::Begin { from, sequence, to }));
            }
            Action::Complete(from, to) | Action::Abort(from, to) => {
                let completing = matches!(action, Action::Complete(..));
                // Who is to go has stopped before.
                let loser = if completing { from } else { to };
                if completing {
                    world.declared[from] = None;
                }
                world.attachments[loser] = Status::Deleting { busy: false };
                world.allocators[idle?] = Some(Work::new(Task::End { from, to, completing }));
            }
            Action::Rebuild(n) => {
                let address = bits(&"10.0.0.1".parse().unwrap()) + u128::from(n);
                world.store.remove(&[b"s/default/4".as_slice(), &address.to_be_bytes()].concat()[..]);
            }
            Action::Delete(a) => {
                // DEL looks first. What it saw may be old when it releases.
                let sequence = self.sequence(&world, a).unwrap_or(0);
                world.attachments[a] = Status::Deleting { busy: true };
                world.declared[a] = None;
                let task = Task::Release { attachment: a, sequence, collecting: false };
                world.allocators[idle?] = Some(Work::new(task));
            }
            Action::Collect => {
                let dead = |s: &Status| matches!(s, Status::Absent | Status::Dead);
                let alive = world.attachments.iter().map(|s| !dead(s)).collect();
                let fence = (0..self.workloads.len()).map(|a| self.sequence(&world, a).unwrap_or(0)).collect();
                world.allocators[idle?] = Some(Work::new(Task::Collect { alive, fence }));
            }
            Action::Die(a) => {
                world.attachments[a] = Status::Dead;
                world.declared[a] = None;
            }
            Action::Advance(who) => self.advance(&mut world, who)?,
            Action::Commit(who, fate) => self.commit(&mut world, who, fate)?,
            Action::Abandon(who) => {
                let work = world.allocators[who].as_mut()?;
                work.abandoned = true;
                if let Task::Release { attachment, .. } = work.task {
                    world.attachments[attachment] = Status::Deleting { busy: false };
                }
            }
            Action::Kill(who) => {
                if self.plant == Some(Plant::HalfBatches) {
                    self.tear(&mut world, who);
                }
                let work = world.allocators[who].take()?;
                match work.task {
                    Task::Lease(a) => world.attachments[a] = Status::Adding { busy: false },
                    Task::Release { attachment, collecting: false, .. } if !work.abandoned => {
                        world.attachments[attachment] = Status::Deleting { busy: false };
                    }
                    _ => {}
                }
            }
        }
        canonical(&mut world, &self.records);
        // Once its remains are collected and nobody works on it, a dead attachment's place is free for another.
        for a in 0..self.workloads.len() {
            let worked_on = world.allocators.iter().flatten().any(|w| {
                w.rest.iter().any(|(b, _)| *b == a)
                    || matches!(w.task, Task::Release { attachment, .. } if attachment == a)
                    || matches!(w.task, Task::Collect { .. })
            });
            let held = self.sequence(&world, a).is_some();
            if matches!(world.attachments[a], Status::Dead) && !held && !worked_on {
                world.attachments[a] = Status::Absent;
                self.is_absent(&mut world, a);
            }
        }
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ALONE, |model: &Self, world| model.sound(world)),
            Property::always(CLEAN, |model: &Self, world| model.clean(world)),
            Property::sometimes("all run", |model: &Self, world: &World| {
                let running = world.attachments.iter().filter(|s| matches!(s, Status::Running(_))).count();
                // The first address is the first workload's alone.
                let usable = model.addresses as usize - usize::from(!model.workloads.contains(&0));
                running == model.workloads.len().min(usable)
            }),
        ]
    }
}

impl Allocators {
    /// What whoever migrates workloads may do: a handover from one of a workload that runs to another that does not yet,
    /// and its end.
    fn migrations(&self, world: &World, actions: &mut Vec<Action>) {
        let runs = |a: usize| matches!(world.attachments[a], Status::Running(_));
        // One at a time of a workload.
        let migrating = |w: &Work| matches!(w.task, Task::Begin { .. } | Task::End { .. });
        let busy = |a: usize| {
            let from = |w: &Work| matches!(w.task, Task::Begin { from, .. } | Task::End { from, .. } if from == a);
            world.allocators.iter().flatten().any(|w| migrating(w) && from(w))
        };
        for from in (0..self.workloads.len()).filter(|a| self.has_claim(*a) && runs(*a) && !busy(*a)) {
            match world.declared[from] {
                Some((to, true)) if runs(to) => {
                    actions.extend([Action::Complete(from, to), Action::Abort(from, to)]);
                }
                Some((to, _)) if matches!(world.attachments[to], Status::Absent) => {
                    // Nobody has come.
                    actions.push(Action::Abort(from, to));
                }
                Some(_) => {}
                None => {
                    let others = (0..self.workloads.len()).filter(|to| {
                        from != *to
                            && self.workloads[*to] == self.workloads[from]
                            && matches!(world.attachments[*to], Status::Absent)
                    });
                    actions.extend(others.map(|to| Action::Begin(from, to)));
                }
            }
        }
    }

    /// The first half of what an allocator was about to commit is written, if it was about to.
    fn tear(&self, world: &mut World, who: usize) {
        let decision = world.allocators[who].as_ref().and_then(|work| self.decide(work));
        if let Some(Ok(Step::Commit(batch, _))) = decision.as_deref() {
            let writes = batch.writes[..batch.writes.len() / 2].to_vec();
            apply(&mut world.store, &Batch { writes, ..batch.clone() });
        }
    }
}

/// How much is looked at.
enum Extent {
    All,
    /// What can come of so many steps.
    Depth(usize),
    /// Until a property is seen to be broken.
    Broken(&'static str),
}

fn check(
    workloads: &'static [usize],
    addresses: u32,
    plant: Option<Plant>,
    extent: &Extent,
) -> impl Checker<Allocators> + use<> {
    let begun = Instant::now();
    let builder = Allocators::new(workloads, addresses, plant).checker().threads(2);
    let builder = match extent {
        Extent::All => builder,
        Extent::Depth(depth) => builder.target_max_depth(*depth),
        Extent::Broken(property) => builder.finish_when(HasDiscoveries::AnyOf([*property].into())),
    };
    let checker = builder.spawn_bfs().join();
    println!(
        "workloads {workloads:?}, {addresses} addresses, {plant:?}: {} states, {} transitions, depth {}, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    checker
}

/// All of a large world with `DCENET_SOAK`, else what can come of its first steps.
fn check_large(workloads: &'static [usize], addresses: u32, depth: usize) {
    if std::env::var_os("DCENET_SOAK").is_some() {
        return check(workloads, addresses, None, &Extent::All).assert_properties();
    }
    let checker = check(workloads, addresses, None, &Extent::Depth(depth));
    assert!(checker.unique_state_count() > 1_000);
    for property in [ALONE, CLEAN] {
        assert!(checker.discovery(property).is_none(), "{property}: {:?}", checker.discovery(property));
    }
}

#[test]
fn every_order_of_a_small_world_is_sound() {
    // An allocator can be exhausted, two can want one address, a claim can stand in the way.
    for workloads in [&[1, 3], &[0, 3], &[3, 4]] {
        check(workloads, 2, None, &Extent::All).assert_properties();
    }
}

/// One claim on two nodes: it moves after its release, or by a handover there and back, and has one address for ever.
#[test]
fn every_order_of_a_migration_is_sound() {
    check_large(&[1, 1], 2, 32);
    check_large(&[0, 0], 2, 14);
    check_large(&[1, 1], 3, 14);
}

#[test]
fn every_order_of_a_migration_beside_another_is_sound() {
    check_large(&[1, 1, 3], 2, 14);
}

#[test]
fn every_order_of_three_claims_is_sound() {
    check_large(&[0, 1, 2], 3, 14);
}

#[test]
fn every_order_of_two_claims_and_another_is_sound() {
    check_large(&[0, 1, 3], 3, 14);
}

#[test]
fn planted_bugs_are_found_by_the_checker() {
    for (plant, workloads, broken) in [
        (Plant::NoSlotGuards, &[3, 4], ALONE),
        (Plant::NoSlotGuards, &[1, 1], ALONE),
        (Plant::ReleaseByName, &[3, 4], ALONE),
        (Plant::StaleEvidence, &[3, 4], ALONE),
        (Plant::HalfBatches, &[3, 4], CLEAN),
        (Plant::IncompleteRebuild, &[3, 4], ALONE),
        (Plant::LateHandover, &[1, 1], ALONE),
    ] {
        let checker = check(workloads, 2, Some(plant), &Extent::Broken(broken));
        let path = checker.discovery(broken).unwrap_or_else(|| panic!("{plant:?} was not found"));
        println!("{plant:?}: {:?}", path.into_actions());
    }
}

/// The store of the model does what a store does.
#[test]
fn the_models_store_is_a_store() {
    let real = MemoryStore::new();
    let mut model = Content::new();
    let put = |n: u8| Write::Put(vec![n], vec![n]);
    let batch = Batch { writes: vec![put(1), put(2)], request_id: 1, ..Batch::default() };
    assert!(apply(&mut model, &batch));
    assert!(matches!(block_on(real.commit(&batch)).unwrap(), Outcome::Committed { .. }));
    let refused = Batch {
        guards: vec![dcenet_ipam::store::Guard { key: vec![1], version: None }],
        writes: vec![Write::Delete(vec![2])],
        request_id: 2,
    };
    assert!(!apply(&mut model, &refused));
    assert!(matches!(block_on(real.commit(&refused)).unwrap(), Outcome::Conflict(_)));
    let keys: Vec<Key> = block_on(real.scan(b"", None, 9)).unwrap().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, model.into_keys().map(|key| key.to_vec()).collect::<Vec<_>>());
    assert!(number_of(b"", &[0; 16]).is_ok());
}
