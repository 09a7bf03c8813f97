//! A world: runtimes that add and delete containers, processes that die, collectors, and time.

use std::sync::Arc;

use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::Ipam;
use parking_lot::Mutex;

use super::history::{Ground, History, Life};
use super::network::{COOLDOWN, Plant, Server, SimStore};
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
    /// Turns of the scheduler before the world comes to rest.
    pub(super) steps: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Self { seed: 0, plant: None, on_disk: false, busy: false, steps: 6_000 }
    }
}

/// What happened in a world.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) leased: u64,
    pub(super) refused: u64,
    pub(super) released: u64,
    pub(super) collected: u64,
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
        self.leased + self.refused + self.released + self.collected
    }

    /// What went wrong on purpose.
    pub(super) fn faults(&self) -> [(&'static str, u64); 8] {
        [
            ("a kill", self.killed),
            ("a late DEL", self.late),
            ("a jump of a clock", self.jumps),
            ("a pause", self.pauses),
            ("a lost reply", self.unknown),
            ("a doubled request", self.doubled),
            ("a restart", self.restarts),
            ("a collection", self.collected),
        ]
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.leased += other.leased;
        self.refused += other.refused;
        self.released += other.released;
        self.collected += other.collected;
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
}

/// A DEL that has looked and not yet released.
struct Late {
    node: usize,
    container: String,
    sequence: u64,
}

const PLACES: usize = 12;
const NETWORK: &str = "net";

/// A /28 has 13 addresses and there are as many places for containers: sometimes there is none left. IPv6 lies beyond 64
/// bits.
fn config(length: u8, cooldown: u128) -> String {
    format!(
        r#"{{ "cooldown": "{cooldown}ms", "pools": [
            {{ "name": "v4", "subnet": "10.0.0.0/{length}", "gateway": "10.0.0.1",
               "claims": {{ "shop/db": {{ "address": "10.0.0.5" }}, "shop/queue": {{}} }} }},
            {{ "name": "v6", "subnet": "fd00:1::/32", "gateway": "fd00:1::1",
               "ranges": ["fd00:1:0:1::1-fd00:1:0:1::20"],
               "claims": {{ "shop/db": {{}}, "shop/queue": {{ "address": "fd00:1:ffff::5" }} }} }} ] }}"#
    )
}

/// Runs a world to its end. An error is what the judge says.
pub(super) fn run(setup: &Setup) -> Result<Tally, String> {
    let clock = Clock::new(setup.seed);
    let directory = setup.on_disk.then(|| tempfile::tempdir().unwrap());
    let path = directory.as_ref().map(|d| d.path().to_owned());
    let server = Arc::new(Server::new(clock.clone(), setup.plant, path));
    let ground = [(if setup.busy { "10.0.0.0/24" } else { "10.0.0.0/28" }, "10.0.0.1"), ("fd00:1::/32", "fd00:1::1")]
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
    });
    let mut scheduler = Scheduler::new(clock.clone());
    for place in 0..PLACES {
        scheduler.spawn(place, runtime(world.clone(), place));
    }
    scheduler.spawn(PLACES, collector(world.clone()));

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
        let length = if self.busy { 24 } else { 28 };
        let store = SimStore { server: self.server.clone(), node, hot: Arc::default() };
        let (world, clock) = (self.clone(), self.clock.clone());
        Ipam::new(&crate::config(&config(length, cooldown)), Arc::new(store))
            .unwrap()
            .with_clock(move || world.clock.now().saturating_add_signed(world.skew.lock()[node]))
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
        scheduler.spawn(name, runtime(self.clone(), name));
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
                let workload = life.workload.as_ref().map(|w| w.parse().unwrap());
                let request = LeaseRequest { workload, ..LeaseRequest::new(attachment(&life.container)) };
                match ipam.lease(&request).await {
                    Ok(lease) => {
                        world.server.tally.lock().leased += 1;
                        let verdict = world.history.lock().leased(&life, &lease, world.clock.now());
                        world.judge(verdict);
                        world.set(place, Place::Running(life));
                    }
                    Err(error) => {
                        if let LeaseError::Damaged(_) | LeaseError::Invalid { .. } = error {
                            world.judge(Err(format!("{life:?} cannot be: {error}")));
                        }
                        world.server.tally.lock().refused += 1;
                        world.set(place, Place::Deleting(life));
                    }
                }
            }
            Place::Running(life) => {
                world.live(400_000).await;
                if *world.closing.lock() && world.clock.dice(5_000) {
                    return;
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

/// Takes back what the dead have left, again and again.
async fn collector(world: Arc<World>) {
    while !*world.closing.lock() {
        world.clock.sleep(30_000 + world.clock.below(60_000)).await;
        if let Ok(count) = collect(&world).await {
            world.server.tally.lock().collected += count;
        }
    }
}

fn collect(world: &Arc<World>) -> impl Future<Output = Result<u64, LeaseError>> + Send + use<> {
    let world = world.clone();
    async move {
        let ipam = world.ipam(PLACES);
        let alive = || -> Vec<_> {
            let places = world.places.lock();
            let lives = places.iter().filter_map(|place| match place {
                Place::Empty => None,
                Place::Adding(life) | Place::Running(life) | Place::Deleting(life) => Some(attachment(&life.container)),
            });
            lives.map(|key| (key.container, key.ifname)).collect()
        };
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
