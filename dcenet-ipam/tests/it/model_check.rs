//! The allocator's decisions checked in every order that is possible: two allocators, two addresses, two attachments with
//! or without claims, a collector; each may be killed, and each reply may get lost, at any time. With `DCENET_SOAK` also
//! three attachments, of which two have claims, and three addresses.
//!
//! The state holds what the store holds and what each allocator has read; the decisions are the real
//! [`step`](dcenet_ipam::machine::step). Versions of a key only matter by their order, and those of different keys are
//! not compared, so each state numbers them anew from 1, and the space is finite. (The one number that is compared with
//! the versions of several keys, a collector's fence, is kept as the version that each of them had then: what is written
//! later has a higher one than either.)

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, PoisonError, RwLock};

use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::Ipam;
use dcenet_ipam::machine::{Command, Query, Reply, Step, View, step};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Entry, Key, Outcome, Store, Write, number_of};
use pollster::block_on;
use stateright::{Checker, Model, Property};

use crate::{attachment, config};

/// A bug that the checker must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plant {
    NoSlotGuards,
    ReleaseByName,
    StaleEvidence,
}

struct Allocators {
    ipam: Ipam,
    /// The workloads of the attachments: 0 has a claim to the first address, 1 to any, others have none.
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
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Add(usize),
    Delete(usize),
    Collect,
    Die(usize),
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

const NOW: u64 = 1_800_000_000_000;

impl Allocators {
    fn new(workloads: &'static [usize], addresses: u32, plant: Option<Plant>) -> Self {
        let text = format!(
            r#"{{ "cooldown": "0s", "pools": [ {{ "name": "p", "subnet": "10.0.0.0/29",
                 "ranges": ["10.0.0.1-10.0.0.{addresses}"],
                 "claims": {{ "shop/w0": {{ "address": "10.0.0.1" }}, "shop/w1": {{}} }} }} ] }}"#
        );
        let ipam = Ipam::new(&config(&text), Arc::new(MemoryStore::new())).unwrap();
        let keys: Vec<AttachmentKey> = workloads.iter().map(|w| attachment(&format!("a{w}"))).collect();
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
                    Some(Reply::Leased(lease)) => Status::Running(bits(&lease.addresses[0].address.addr())),
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
                    Some(_) => Status::Absent,
                    None => Status::Deleting { busy: false },
                };
            }
            Task::Release { .. } => {}
        }
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
        let outcome = if fate == Fate::Lost { None } else { Some(apply(&mut world.store, &batch)) };
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
        running().all(|(a, address)| {
            let bound = bound(&world.store, address);
            let alone = running().all(|(b, other)| a == b || address != other);
            let own = bound.is_some_and(|by| by == self.names[a]);
            // The first workload has the first address, and nobody else ever gets it.
            alone && own && (self.workloads[a] == 0) == (address == bits(&"10.0.0.1".parse().unwrap()))
        })
    }

    /// When nobody works and nothing runs, nothing is bound.
    fn clean(&self, world: &World) -> bool {
        let rest = world.allocators.iter().all(Option::is_none)
            && world.attachments.iter().all(|s| matches!(s, Status::Absent));
        let held = world.store.keys().any(|k| k.starts_with(b"t/"))
            || world.store.values().any(|(value, _)| value.starts_with(b"{\"bound\""));
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
                Task::Lease(_) => {}
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

/// By whom an address is bound, as the record says.
fn bound(store: &Content, address: u128) -> Option<String> {
    let (value, _) = store.get(&[b"s/default/4".as_slice(), &address.to_be_bytes()].concat()[..])?;
    let record: serde_json::Value = serde_json::from_slice(value).unwrap();
    record.pointer("/bound/by").and_then(|by| by.as_str()).map(str::to_owned)
}

impl Model for Allocators {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        // The pool is registered and the claims of the configuration are recorded.
        block_on(self.ipam.ready()).unwrap();
        let content = block_on(self.ipam.store().scan(b"", None, 1_000)).unwrap();
        let store = content.into_iter().map(|(key, entry)| (key.into(), (entry.value.into(), entry.version))).collect();
        let mut world =
            World { store, allocators: vec![None; 2], attachments: vec![Status::Absent; self.workloads.len()] };
        canonical(&mut world, &self.records);
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let idle = world.allocators.iter().any(Option::is_none);
        for (a, status) in world.attachments.iter().enumerate() {
            match status {
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
            Action::Delete(a) => {
                // DEL looks first. What it saw may be old when it releases.
                let sequence = self.sequence(&world, a).unwrap_or(0);
                world.attachments[a] = Status::Deleting { busy: true };
                let task = Task::Release { attachment: a, sequence, collecting: false };
                world.allocators[idle?] = Some(Work::new(task));
            }
            Action::Collect => {
                let dead = |s: &Status| matches!(s, Status::Absent | Status::Dead);
                let alive = world.attachments.iter().map(|s| !dead(s)).collect();
                let fence = (0..self.workloads.len()).map(|a| self.sequence(&world, a).unwrap_or(0)).collect();
                world.allocators[idle?] = Some(Work::new(Task::Collect { alive, fence }));
            }
            Action::Die(a) => world.attachments[a] = Status::Dead,
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
            }
        }
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("who was told an address has it alone", |model: &Self, world| model.sound(world)),
            Property::always("nothing is left", |model: &Self, world| model.clean(world)),
            Property::sometimes("all run", |model: &Self, world: &World| {
                let running = world.attachments.iter().filter(|s| matches!(s, Status::Running(_))).count();
                // The first address is the first workload's alone.
                let usable = model.addresses as usize - usize::from(!model.workloads.contains(&0));
                running == model.workloads.len().min(usable)
            }),
        ]
    }
}

fn check(workloads: &'static [usize], addresses: u32, plant: Option<Plant>) -> impl Checker<Allocators> {
    let checker = Allocators::new(workloads, addresses, plant).checker().threads(2).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("workloads {workloads:?}, {addresses} addresses, {plant:?}: {states} states, depth {depth}");
    checker
}

#[test]
fn every_order_of_a_small_world_is_sound() {
    // An allocator can be exhausted, two can want one address, a claim can stand in the way.
    let mut worlds: Vec<(&'static [usize], u32)> = vec![(&[1, 2], 2), (&[0, 2], 2), (&[2, 3], 2)];
    if std::env::var_os("DCENET_SOAK").is_some() {
        worlds.push((&[0, 1, 2], 3));
    }
    for (workloads, addresses) in worlds {
        check(workloads, addresses, None).assert_properties();
    }
}

#[test]
fn planted_bugs_are_found_by_the_checker() {
    for plant in [Plant::NoSlotGuards, Plant::ReleaseByName, Plant::StaleEvidence] {
        let checker = check(&[2, 3], 2, Some(plant));
        let path = checker.discovery("who was told an address has it alone");
        let path = path.unwrap_or_else(|| panic!("{plant:?} was not found"));
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
