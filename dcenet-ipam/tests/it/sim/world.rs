//! A world: runtimes that add and delete containers, processes that die, collectors, and time.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::model::{AttachmentKey, LabelSet};
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::Ipam;
use dcenet_ipam::machine::{MAX_HANDOVER, Quarantine};
use dcenet_ipam::model::AddressSpace;
use dcenet_ipam::reclaim::{Alive, Policy, Reclaimer, Scope, Snapshot};
use parking_lot::Mutex;

use super::history::{Ground, History, KEPT_FOR_A_TIME, Life};
use super::network::{COOLDOWN, KEPT, Plant, Server, SimStore};
use super::scheduler::{Clock, Scheduler, Turn};
use crate::attachment;

/// What a world is made of.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) seed: u64,
    pub(super) plant: Option<Plant>,
    /// Over the log in a directory instead of memory.
    pub(super) on_disk: bool,
    /// Containers live for milliseconds, so that all places write at the same time.
    pub(super) busy: bool,
    /// Nodes own blocks of the IPv4 pool.
    pub(super) blocks: bool,
    /// Turns of the scheduler before the world comes to rest.
    pub(super) steps: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Self { seed: 0, plant: None, on_disk: false, busy: false, blocks: false, steps: 6_000 }
    }
}

/// What happened in a world.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) leased: u64,
    pub(super) refused: u64,
    pub(super) released: u64,
    pub(super) collected: u64,
    pub(super) reclaimed: u64,
    pub(super) completed: u64,
    pub(super) aborted: u64,
    pub(super) quarantined: u64,
    pub(super) expired: u64,
    pub(super) blocks: u64,
    pub(super) killed: u64,
    pub(super) late: u64,
    pub(super) jumps: u64,
    pub(super) pauses: u64,
    pub(super) unknown: u64,
    pub(super) doubled: u64,
    pub(super) restarts: u64,
    pub(super) commits: u64,
    pub(super) conflicts: u64,
}

impl Tally {
    /// Commands that came to an end.
    pub(super) fn operations(&self) -> u64 {
        self.leased
            + self.refused
            + self.released
            + self.collected
            + self.reclaimed
            + self.completed
            + self.aborted
            + self.quarantined
            + self.expired
            + self.blocks
    }

    /// What was done beside leases and releases.
    pub(super) fn kinds(&self) -> [(&'static str, u64); 6] {
        [
            ("a collection", self.collected),
            ("a collection after two observations", self.reclaimed),
            ("a handover that was completed", self.completed),
            ("a handover that was aborted", self.aborted),
            ("a quarantine", self.quarantined),
            ("the end of what was kept or in quarantine", self.expired),
        ]
    }

    /// What went wrong on purpose.
    pub(super) fn faults(&self) -> [(&'static str, u64); 7] {
        [
            ("a kill", self.killed),
            ("a late DEL", self.late),
            ("a jump of a clock", self.jumps),
            ("a pause", self.pauses),
            ("a lost reply", self.unknown),
            ("a doubled request", self.doubled),
            ("a restart", self.restarts),
        ]
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.leased += other.leased;
        self.refused += other.refused;
        self.released += other.released;
        self.collected += other.collected;
        self.reclaimed += other.reclaimed;
        self.completed += other.completed;
        self.aborted += other.aborted;
        self.quarantined += other.quarantined;
        self.expired += other.expired;
        self.blocks += other.blocks;
        self.killed += other.killed;
        self.late += other.late;
        self.jumps += other.jumps;
        self.pauses += other.pauses;
        self.unknown += other.unknown;
        self.doubled += other.doubled;
        self.restarts += other.restarts;
        self.commits += other.commits;
        self.conflicts += other.conflicts;
    }
}

/// Where a place for a container stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Empty,
    Adding(Life),
    Running(Life),
    /// Both may run.
    Migrating {
        from: Life,
        to: Life,
    },
    Deleting(Life),
}

struct World {
    clock: Clock,
    server: Arc<Server>,
    places: Mutex<Vec<Place>>,
    history: Mutex<History>,
    fault: Mutex<Option<String>>,
    lives: Mutex<u64>,
    /// How wrong the clock of each place's node is, in milliseconds.
    skew: Mutex<Vec<i64>>,
    /// DELs that somebody gave up waiting for, and that still run.
    late: Mutex<Vec<Late>>,
    /// No more containers are started.
    closing: Mutex<bool>,
    plant: Option<Plant>,
    busy: bool,
    blocks: bool,
    /// Whether clocks run true.
    timely: bool,
}

/// A DEL that has looked and not yet released.
struct Late {
    node: usize,
    container: String,
    sequence: u64,
}

const PLACES: usize = 12;
/// The name of the task that does what operators do.
const OPERATOR: usize = PLACES + 2;
const NETWORK: &str = "net";

/// A /28 has 13 addresses and there are as many places for containers: sometimes there is none left. IPv6 lies beyond 64
/// bits.
fn config(length: u8, cooldown: u128, options: &str) -> String {
    let kept = KEPT.as_secs();
    format!(
        r#"{{ "cooldown": "{cooldown}ms", "pools": [
            {{ "name": "v4", "subnet": "10.0.0.0/{length}", "gateway": "10.0.0.1" {options},
               "claims": {{ "shop/db": {{ "address": "10.0.0.5" }}, "shop/queue": {{}},
                            "{KEPT_FOR_A_TIME}": {{ "keep": "{kept}s" }} }} }},
            {{ "name": "v6", "subnet": "fd00:1::/32", "gateway": "fd00:1::1",
               "ranges": ["fd00:1:0:1::1-fd00:1:0:1::20"],
               "claims": {{ "shop/db": {{}}, "shop/queue": {{ "address": "fd00:1:ffff::5" }},
                            "{KEPT_FOR_A_TIME}": {{ "keep": "{kept}s" }} }} }} ] }}"#
    )
}

/// Runs a world to its end. An error is what the judge says.
pub(super) fn run(setup: &Setup) -> Result<Tally, String> {
    let clock = Clock::new(setup.seed);
    let directory = setup.on_disk.then(|| tempfile::tempdir().unwrap());
    let path = directory.as_ref().map(|d| d.path().to_owned());
    let server = Arc::new(Server::new(clock.clone(), setup.plant, path));
    let ground = [
        (if setup.busy || setup.blocks { "10.0.0.0/24" } else { "10.0.0.0/28" }, "10.0.0.1"),
        ("fd00:1::/32", "fd00:1::1"),
    ]
    .map(|(subnet, gateway)| Ground { subnet: subnet.parse().unwrap(), gateway: gateway.parse().unwrap() });
    // Half of the worlds have true clocks, so that the time between two uses can be judged.
    let timely = setup.seed.is_multiple_of(2) && !setup.busy;
    let world = Arc::new(World {
        clock: clock.clone(),
        server: server.clone(),
        places: Mutex::new(vec![Place::Empty; PLACES]),
        history: Mutex::new(History::new(ground.into(), &["shop/db", "shop/queue"], timely)),
        fault: Mutex::new(None),
        lives: Mutex::new(0),
        skew: Mutex::new(vec![0; PLACES + 1]),
        late: Mutex::default(),
        closing: Mutex::new(false),
        plant: setup.plant,
        busy: setup.busy,
        blocks: setup.blocks,
        timely,
    });
    let mut scheduler = Scheduler::new(clock.clone());
    for place in 0..PLACES {
        scheduler.spawn(place, runtime(world.clone(), place));
    }
    scheduler.spawn(PLACES, collector(world.clone()));
    if !setup.busy {
        scheduler.spawn(OPERATOR, operator(world.clone()));
    }

    for step in 0..setup.steps {
        if let Turn::Killed(name) = scheduler.turn(20) {
            server.tally.lock().killed += 1;
            world.revive(&mut scheduler, name);
        }
        for late in world.late.lock().drain(..) {
            server.tally.lock().late += 1;
            scheduler.spawn(PLACES + 1, finish(world.clone(), late));
        }
        server.deliver_doubles();
        if clock.dice(5) {
            server.restart();
        }
        if !timely && clock.dice(20) {
            server.tally.lock().jumps += 1;
            let node = clock.below(PLACES as u64) as usize;
            world.skew.lock()[node] = clock.below(7_200_000) as i64 - 3_600_000;
        }
        if step % 64 == 0 {
            world.history.lock().compare(&server.content())?;
        }
        if let Some(fault) = world.fault.lock().take() {
            return Err(fault);
        }
    }

    // To rest: nothing fails any more, nobody starts anything, what runs goes on running, and the dead are collected.
    *server.faulty.lock() = false;
    *world.closing.lock() = true;
    while !matches!(scheduler.turn(0), Turn::Idle) {
        server.deliver_doubles();
        if let Some(fault) = world.fault.lock().take() {
            return Err(fault);
        }
    }
    pollster::block_on(at_once(collect(&world), &mut scheduler)).map_err(|e| e.to_string())?;
    world.history.lock().nothing_leaked(&server.content())?;
    let tally = *server.tally.lock();
    if tally.conflicts * 4 > tally.commits {
        return Err(format!("{} of {} commits were lost races", tally.conflicts, tally.commits));
    }
    Ok(tally)
}

/// Lets a future run while only its own waits advance the time.
async fn at_once<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static, scheduler: &mut Scheduler) -> T {
    let result = Arc::new(Mutex::new(None));
    let put = result.clone();
    scheduler.spawn(usize::MAX, async move {
        let value = future.await;
        *put.lock() = Some(value);
    });
    while !matches!(scheduler.turn(0), Turn::Idle) {}
    result.lock().take().expect("the only task has ended")
}

impl World {
    fn ipam(self: &Arc<Self>, node: usize) -> Ipam {
        let cooldown = if self.busy || self.plant == Some(Plant::NoCooldown) { 0 } else { COOLDOWN.as_millis() };
        let length = if self.busy || self.blocks { 24 } else { 28 };
        let options = if self.blocks { r#", "block": { "size": 4 }"# } else { "" };
        let store = SimStore { server: self.server.clone(), node, hot: Arc::default() };
        let (world, clock) = (self.clone(), self.clock.clone());
        let ipam = Ipam::new(&crate::config(&config(length, cooldown, options)), Arc::new(store)).unwrap();
        let ipam = if self.blocks { ipam.on_node(node_name(node).parse().unwrap(), LabelSet::new()) } else { ipam };
        ipam.with_clock(move || world.clock.now().saturating_add_signed(world.skew.lock()[node]))
            .with_entropy(move || clock.bits())
    }

    fn place(&self, place: usize) -> Place {
        self.places.lock()[place].clone()
    }

    fn set(&self, place: usize, to: Place) {
        self.places.lock()[place] = to;
    }

    fn judge(&self, verdict: Result<(), String>) {
        if let Err(fault) = verdict {
            self.fault.lock().get_or_insert(fault);
        }
    }

    /// Passes some of a container's time.
    async fn live(&self, milliseconds: u64) {
        let milliseconds = if self.busy { 100 } else { milliseconds };
        self.clock.sleep(self.clock.below(milliseconds)).await;
    }

    fn ends(&self, life: &Life) {
        self.history.lock().ends(life, self.clock.now());
    }

    /// A container for a place. Its id is used again if the last one of the place was deleted properly.
    fn bear(&self, place: usize, again: Option<&Life>) -> Life {
        let mut lives = self.lives.lock();
        *lives += 1;
        let container = match again {
            Some(life) => life.container.clone(),
            None => format!("p{place}-{}", *lives),
        };
        let workload = match self.clock.below(4) {
            // One place each, for a claim is one container's at a time.
            0 if place == 0 => Some("shop/db".to_owned()),
            0 if place == 1 => Some("shop/queue".to_owned()),
            0 | 1 if place == 2 => Some(KEPT_FOR_A_TIME.to_owned()),
            1 => Some(format!("shop/web-{place}")),
            _ => None,
        };
        Life { container, number: *lives, workload }
    }

    /// The runtime starts again after its process was killed.
    fn revive(self: &Arc<Self>, scheduler: &mut Scheduler, name: usize) {
        if name == PLACES {
            return scheduler.spawn(PLACES, collector(self.clone()));
        }
        if name == OPERATOR {
            return scheduler.spawn(OPERATOR, operator(self.clone()));
        }
        if name > PLACES {
            return;
        }
        // What it was adding it asks for again, or gives up: then it has to delete it.
        if let Place::Adding(life) = self.place(name)
            && self.clock.dice(5_000)
        {
            self.ends(&life);
            self.set(name, Place::Deleting(life));
        }
        // It does not know how far it came: both go, the target as if its node had died.
        if let Place::Migrating { from, to } = self.place(name) {
            self.ends(&from);
            self.ends(&to);
            self.history.lock().is_over(&from, &to);
            self.set(name, Place::Deleting(from));
        }
        scheduler.spawn(name, runtime(self.clone(), name));
    }

    /// Every container that somebody has begun to make and that is not gone.
    fn alive(&self) -> Vec<AttachmentKey> {
        let places = self.places.lock();
        let lives = places.iter().flat_map(|place| match place {
            Place::Empty => vec![],
            Place::Adding(life) | Place::Running(life) | Place::Deleting(life) => vec![life],
            Place::Migrating { from, to } => vec![from, to],
        });
        lives.map(|life| attachment(&life.container)).collect()
    }

    /// A container for the workload of another, elsewhere.
    fn bear_twin(&self, place: usize, of: &Life) -> Life {
        let mut lives = self.lives.lock();
        *lives += 1;
        Life { container: format!("p{place}-{}", *lives), number: *lives, workload: of.workload.clone() }
    }
}

fn node_name(node: usize) -> String {
    format!("n{node}")
}

/// ADD. What comes of it is judged.
async fn add(world: &World, ipam: &Ipam, life: &Life) -> Result<(), LeaseError> {
    let workload = life.workload.as_ref().map(|w| w.parse().unwrap());
    let request = LeaseRequest { workload, ..LeaseRequest::new(attachment(&life.container)) };
    let asked = world.clock.now();
    match ipam.lease(&request).await {
        Ok(lease) => {
            world.server.tally.lock().leased += 1;
            let verdict = world.history.lock().leased(life, &lease, asked, world.clock.now());
            world.judge(verdict);
            Ok(())
        }
        Err(error) => {
            if let LeaseError::Damaged(_) | LeaseError::Invalid { .. } = error {
                world.judge(Err(format!("{life:?} cannot be: {error}")));
            }
            world.server.tally.lock().refused += 1;
            Err(error)
        }
    }
}

/// Live migration to another node, there or half way and back. Returns who has the address in the end, once the other
/// has surely nothing.
async fn migrate(world: &Arc<World>, ipam: &Ipam, place: usize, from: &Life, to: &Life) -> Life {
    let there = world.ipam((place + 5) % PLACES);
    let (source, target) = (attachment(&from.container), attachment(&to.container));
    world.history.lock().declares(from, to);
    let begun = ipam.begin_handover(&source, None, Some(&target), MAX_HANDOVER).await;
    let joined = matches!(begun, Ok(true)) && add(world, &there, to).await.is_ok();
    if joined {
        world.live(20_000).await;
    }
    let complete = joined && world.clock.dice(5_000);
    let (stays, goes) = if complete { (to, from) } else { (from, to) };
    world.ends(goes);
    world.history.lock().is_over(from, to);
    // If this fails, the release of who goes does it.
    let ended = if complete { ipam.complete_handover(&source).await } else { ipam.abort_handover(&source).await };
    if matches!(ended, Ok(true)) && joined {
        let mut tally = world.server.tally.lock();
        if complete {
            tally.completed += 1;
        } else {
            tally.aborted += 1;
        }
    }
    while delete(world, ipam, goes).await.is_err() {
        world.clock.sleep(1_000).await;
    }
    stays.clone()
}

/// What operators do: quarantine, what ends by time, blocks.
async fn operator(world: Arc<World>) {
    let ipam = world.ipam(PLACES);
    while !*world.closing.lock() {
        world.clock.sleep(5_000 + world.clock.below(60_000)).await;
        match world.clock.below(3) {
            0 => {
                if let Ok(count) = ipam.expire().await {
                    world.server.tally.lock().expired += count as u64;
                }
            }
            1 => confine(&world, &ipam).await,
            _ if world.blocks => {
                // Of the living and of the dead: it makes no difference.
                let owner = node_name(world.clock.below(PLACES as u64) as usize);
                if let Ok(blocks) = ipam.reclaim_blocks(&owner).await {
                    world.server.tally.lock().blocks += blocks.len() as u64;
                }
            }
            _ => {}
        }
    }
}

/// Puts an address into quarantine: for a time that can be judged, or until it is lifted.
async fn confine(world: &World, ipam: &Ipam) {
    let address = IpAddr::from([10, 0, 0, 10 + world.clock.below(4) as u8]);
    let time = world.timely.then_some(Duration::from_secs(90));
    let begun = world.clock.now();
    world.history.lock().may_be_lost(address);
    let why = Quarantine { reason: "somebody else answers for it".to_owned(), time, seen: None };
    if ipam.quarantine(&AddressSpace::default(), address, &why).await.is_err() {
        return;
    }
    world.server.tally.lock().quarantined += 1;
    let until = time.map_or(u64::MAX, |time| begun + time.as_millis() as u64);
    world.history.lock().is_quarantined(address, world.clock.now(), until);
    if time.is_none() {
        world.clock.sleep(world.clock.below(120_000)).await;
        world.history.lock().is_lifted(address);
        while ipam.lift(&AddressSpace::default(), address).await.is_err() {
            world.clock.sleep(1_000).await;
        }
    }
}

/// What a container runtime does at one place of its node, for ever.
async fn runtime(world: Arc<World>, place: usize) {
    let ipam = world.ipam(place);
    let mut last: Option<Life> = None;
    loop {
        match world.place(place) {
            Place::Empty => {
                if *world.closing.lock() {
                    return;
                }
                world.live(60_000).await;
                let life = world.bear(place, last.as_ref());
                world.set(place, Place::Adding(life));
            }
            Place::Adding(life) => {
                let to = match add(&world, &ipam, &life).await {
                    Ok(()) => Place::Running(life),
                    Err(_) => Place::Deleting(life),
                };
                world.set(place, to);
            }
            Place::Running(life) => {
                world.live(400_000).await;
                if *world.closing.lock() && world.clock.dice(5_000) {
                    return;
                }
                let migrates = matches!(life.workload.as_deref(), Some("shop/db" | "shop/queue"));
                if migrates && world.clock.dice(5_000) {
                    let to = world.bear_twin(place, &life);
                    world.set(place, Place::Migrating { from: life, to });
                    continue;
                }
                world.ends(&life);
                if world.clock.dice(500) {
                    // The node lost power: nobody will ever delete it, and its id does not come back.
                    last = None;
                    world.set(place, Place::Empty);
                } else {
                    world.set(place, Place::Deleting(life));
                }
            }
            Place::Migrating { from, to } => {
                let life = migrate(&world, &ipam, place, &from, &to).await;
                world.set(place, Place::Running(life));
            }
            Place::Deleting(life) => match delete(&world, &ipam, &life).await {
                Ok(()) => {
                    world.server.tally.lock().released += 1;
                    last = Some(life);
                    world.set(place, Place::Empty);
                }
                Err(_) => world.clock.sleep(1_000).await,
            },
        }
    }
}

/// DEL: looks, takes devices down, which takes a while and sometimes very long, and releases what it saw.
async fn delete(world: &World, ipam: &Ipam, life: &Life) -> Result<(), LeaseError> {
    let key = attachment(&life.container);
    let held = ipam.held(&key).await?;
    let sequence = held.map_or(0, |lease| lease.sequence());
    world.clock.sleep(1 + world.clock.below(50)).await;
    if world.clock.dice(1_000) && !*world.closing.lock() {
        world.late.lock().push(Late { node: PLACES, container: life.container.clone(), sequence });
        return Err(LeaseError::Busy("the runtime does not wait for it any more".to_owned()));
    }
    ipam.release(&key, sequence).await
}

/// The rest of a DEL whose devices took very long to go.
async fn finish(world: Arc<World>, late: Late) {
    world.clock.sleep(world.clock.below(300_000)).await;
    let (ipam, key) = (world.ipam(late.node), attachment(&late.container));
    let done = match world.plant {
        Some(Plant::ReleaseByName) => ipam.release_current(&key).await,
        _ => ipam.release(&key, late.sequence).await,
    };
    if let Err(error) = done {
        tracing::debug!(%error, "nobody waits for this answer");
    }
}

/// Takes back what the dead have left, again and again: by the runtime's list, and by two observations.
async fn collector(world: Arc<World>) {
    let ipam = world.ipam(PLACES);
    let mut reclaimer = Reclaimer::new(&ipam, Policy::default());
    while !*world.closing.lock() {
        world.clock.sleep(30_000 + world.clock.below(60_000)).await;
        if world.plant.is_some() || world.clock.dice(3_000) {
            if let Ok(count) = collect(&world).await {
                world.server.tally.lock().collected += count;
            }
            continue;
        }
        let Ok(begun) = Snapshot::begin(&ipam).await else { continue };
        let alive = world.alive().into_iter().collect();
        if let Ok(reclaimed) = reclaimer.observe(&begun.complete(Scope::default(), Alive::Attachments(alive))).await {
            world.server.tally.lock().reclaimed += reclaimed.released.len() as u64;
        }
    }
}

fn collect(world: &Arc<World>) -> impl Future<Output = Result<u64, LeaseError>> + Send + use<> {
    let world = world.clone();
    async move {
        let ipam = world.ipam(PLACES);
        let alive = || world.alive().into_iter().map(|key| (key.container, key.ifname)).collect::<Vec<_>>();
        let (valid, fence);
        if world.plant == Some(Plant::StaleEvidence) {
            valid = alive();
            fence = u64::MAX;
            world.clock.sleep(20_000).await;
        } else {
            fence = ipam.revision().await?;
            valid = alive();
        }
        let network = NETWORK.parse().unwrap();
        Ok(ipam.retain_since(&network, &valid, fence).await?.len() as u64)
    }
}
