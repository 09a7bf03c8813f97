//! `etcd-pool`: leases from one pool that all allocators share on etcd, each allocator a process, against what etcd can
//! do at most, a plain creation of the same keys, and against the shapes of peers: the whole pool in one object
//! (Spiderpool, whereabouts), and an object for each allocator's block (Calico).
//!
//! All four use the same client, values of the same size and one member with its data in memory. The plain creation is
//! the transaction of a lease (guards and writes, the lane of the request too) on addresses that each process knows to
//! be its own: no search, no reads, no rivals.

use std::io::{BufRead, BufReader, Write as _};
use std::ops::RangeInclusive;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dcenet_benches::{Row, Sample, Summary, rounds, say};
use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_ipam::store::etcd::cluster::Cluster;
use dcenet_ipam::store::etcd::{EtcdConfig, EtcdStore};
use dcenet_ipam::store::{Batch, Caps, Entry, Guard, Key, Outcome, Store, StoreError, Watch, Write, numbered};
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;
use serde::{Deserialize, Serialize};
use serde_json::json;

const ID: &str = "etcd-pool";
const JOB: &str = "DCENET_BENCH_ETCD_JOB";
/// Leases that are committed together ([`Store::commit_many`]), as a daemon's group commit sends them.
const BATCH: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Shape {
    /// The transaction of a lease without the allocator.
    Create,
    /// A lease.
    Slot,
    /// All addresses in one object.
    OneObject,
    /// One object for each process.
    Block,
    /// As `Create`, [`BATCH`] batches sent together.
    Batched,
}

#[derive(Debug, Serialize, Deserialize)]
struct Job {
    shape: Shape,
    worker: usize,
    prefix: String,
    endpoints: Vec<String>,
    milliseconds: u64,
}

/// What one process did, or all.
#[derive(Debug, Default, Clone, Copy, Serialize, Deserialize)]
struct Done {
    operations: u64,
    retries: u64,
}

fn main() {
    if let Some(job) = std::env::var_os(JOB) {
        work(&serde_json::from_str(job.to_str().expect("JSON is text")).expect("a job"));
        return;
    }
    if let Some(reason) = Cluster::missing() {
        say(format_args!("{ID}: {reason}"));
        return;
    }
    let mut summary = Summary::default();
    let directory =
        tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in("/dev/shm").expect("a directory in memory");
    let cluster = Cluster::start(1, directory.path());
    let window = Duration::from_millis(rounds(3000, 500) as u64);
    let mut run = 0;
    for processes in if rounds(1, 0) == 1 { &[1, 8, 32, 128][..] } else { &[1, 8] } {
        let shapes = [Shape::Create, Shape::Slot, Shape::OneObject, Shape::Block];
        let mut costs: [Vec<f64>; 4] = Default::default();
        let mut totals = [Done::default(); 4];
        for round in 0..rounds(5, 1) {
            // Who comes first finds etcd with less in it: each begins in turn.
            for (at, shape) in (0..4).map(|n| (round + n) % 4).map(|at| (at, shapes[at])) {
                run += 1;
                let done = measure(&cluster, shape, *processes, window, run);
                // A round in which nobody came through counts as one operation.
                costs[at].push(window.as_secs_f64() * 1000.0 / done.operations.max(1) as f64);
                totals[at].operations += done.operations;
                totals[at].retries += done.retries;
            }
        }
        for (at, shape) in shapes.into_iter().enumerate() {
            let rate = 1000.0 / Sample::new(costs[at].clone()).median();
            let retries = totals[at].retries as f64 / totals[at].operations.max(1) as f64;
            say(format_args!("{ID}: {processes:>3} processes, {shape:?}: {rate:.0}/s, {retries:.2} retries each"));
        }
        let variant = format!("slot, {processes} processes");
        // At least half the rate of the creation.
        summary.add(Row::compare(ID, &variant, 2.0, &costs[1], ("plain creation", &costs[0])));
        summary.add(Row::compare(ID, &format!("{variant} "), 1.0, &costs[1], ("one-object CAS", &costs[2])));
        let retries = totals[1].retries as f64 / totals[1].operations.max(1) as f64;
        let row = Row::compare(ID, &format!("{variant}, retries"), 1.0, &[retries], ("0.2 for each lease", &[0.2]));
        summary.add(row.in_unit("retries"));
    }
    let (processes, mut costs) = (8, Vec::new());
    for _ in 0..rounds(5, 1) {
        run += 1;
        let done = measure(&cluster, Shape::Batched, processes, window, run);
        costs.push(window.as_secs_f64() * 1e6 / done.operations.max(1) as f64);
    }
    say(format_args!(
        "{ID}: {processes} processes, batched: {:.0} addresses/s",
        1e6 / Sample::new(costs.clone()).median()
    ));
    let goal = vec![1e6 / 15_000.0; costs.len()];
    summary.add(Row::compare(ID, "1,000 addresses, batched", 1.0, &costs, ("15,000 addresses/s", &goal)));
    summary.write();
}

/// Runs one shape in many processes that begin together, under a prefix of its own.
fn measure(cluster: &Cluster, shape: Shape, processes: usize, window: Duration, run: usize) -> Done {
    let prefix = format!("/bench/{run}/");
    let config = EtcdConfig { prefix: Some(prefix.clone()), ..cluster.config() };
    // Pools are registered once and not by rivals.
    block_on(ipam(&config, open(&config)).ready()).expect("the pool is registered");
    let milliseconds = u64::try_from(window.as_millis()).expect("short");
    let mut workers: Vec<Worker> = (0..processes)
        .map(|worker| {
            let endpoints = config.endpoints.clone();
            Worker::start(&Job { shape, worker, prefix: prefix.clone(), endpoints, milliseconds })
        })
        .collect();
    workers.iter_mut().for_each(|worker| drop(worker.line()));
    workers.iter_mut().for_each(Worker::go);
    let mut sum = Done::default();
    for worker in &mut workers {
        let done: Done = serde_json::from_str(&worker.line()).expect("what was done");
        sum.operations += done.operations;
        sum.retries += done.retries;
        assert!(worker.0.wait().expect("a child of ours").success());
    }
    if matches!(shape, Shape::Create | Shape::Slot) {
        // Each operation has made one address of its own; whoever was cut off by the end may have made one more.
        let made = block_on(open(&config).scan(b"s/default/4", None, usize::MAX)).expect("etcd answers").len() as u64;
        assert!((sum.operations..=sum.operations + processes as u64).contains(&made), "{made} addresses for {sum:?}");
    }
    sum
}

struct Worker(Child, BufReader<std::process::ChildStdout>);

impl Worker {
    fn start(job: &Job) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("a program"))
            .env(JOB, serde_json::to_string(job).expect("a job serialises"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let lines = BufReader::new(child.stdout.take().expect("stdout is piped"));
        Self(child, lines)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.1.read_line(&mut line).expect("a line");
        line
    }

    fn go(&mut self) {
        self.0.stdin.take().expect("stdin is piped").write_all(b"go\n").expect("the worker reads");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn open(config: &EtcdConfig) -> Arc<dyn Store> {
    Arc::new(EtcdStore::open(config).expect("the configuration is right"))
}

fn ipam(config: &EtcdConfig, store: Arc<dyn Store>) -> Ipam {
    let section: IpamConfig = serde_json::from_value(json!({
        "store": { "kind": "etcd", "endpoints": config.endpoints },
        "pools": [{ "name": "pods", "subnet": "10.88.0.0/14", "gateway": "10.88.0.1" }],
    }))
    .expect("the section is right");
    Ipam::new(&section, store).expect("the pool is right")
}

fn work(job: &Job) {
    let config = EtcdConfig {
        endpoints: job.endpoints.clone(),
        prefix: Some(job.prefix.clone()),
        timeout: Some(Duration::from_secs(60)),
        ..Default::default()
    };
    let store = Arc::new(Counting { inner: open(&config), conflicts: AtomicU64::new(0) });
    let ipam = ipam(&config, store.clone());
    let space = block_on(store.read(&[b"e/default".to_vec()])).expect("etcd answers").remove(0).map(|e| e.version);
    say("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("the word to begin");
    let deadline = Instant::now() + Duration::from_millis(job.milliseconds);
    let mut done = Done::default();
    while Instant::now() < deadline {
        let n = (job.worker as u128) << 24 | u128::from(done.operations);
        match job.shape {
            Shape::Create => create(&*store, &[creation(job, space, done.operations)]),
            Shape::Batched => {
                let some = (0..BATCH as u64).map(|n| creation(job, space, done.operations + n));
                create(&*store, &some.collect::<Vec<_>>());
            }
            Shape::Slot => {
                let attachment = serde_json::from_value(attachment(n)).expect("an attachment's key");
                let request = LeaseRequest::new(attachment);
                block_on(ipam.lease(&request)).expect("a free address");
            }
            Shape::OneObject => append(&*store, b"pool".to_vec(), n),
            Shape::Block => append(&*store, format!("block/{}/{}", job.worker, done.operations / 64).into_bytes(), n),
        }
        // Whoever ends after the others has had etcd for himself.
        if Instant::now() < deadline {
            done.operations += if job.shape == Shape::Batched { BATCH as u64 } else { 1 };
        }
    }
    done.retries = store.conflicts.load(Ordering::Relaxed);
    say(serde_json::to_string(&done).expect("figures serialise"));
}

fn attachment(n: u128) -> serde_json::Value {
    json!({ "network": "bench", "container": format!("{n:064x}"), "ifname": "eth0" })
}

/// The keys and values of a lease, at an address that is this worker's.
fn creation(job: &Job, space: Option<u64>, n: u64) -> Batch {
    let mut batch = Batch { request_id: id(job.worker, n), ..Batch::default() };
    batch.guards.push(Guard { key: b"e/default".to_vec(), version: space });
    let container = (job.worker as u128) << 24 | u128::from(n);
    let by = format!("bench/{container:064x}/eth0");
    // Far from the pool, so that no two workers and no allocator meet.
    let address = (job.worker as u128 + 1) << 64 | u128::from(n);
    let slot = (numbered(b"s/default/4", address), json!({ "bound": { "by": by } }));
    let held =
        (format!("t/{by}").into_bytes(), json!({ "addresses": [{ "address": "10.88.100.100/14", "pool": "pods" }] }));
    for (key, value) in [slot, held] {
        batch.guards.push(Guard { key: key.clone(), version: None });
        batch.writes.push(Write::Put(key, value.to_string().into_bytes()));
    }
    batch
}

fn create(store: &dyn Store, batches: &[Batch]) {
    for outcome in block_on(store.commit_many(batches)) {
        match outcome.expect("etcd answers") {
            Outcome::Committed { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Adds an allocation to an object, however often that takes.
fn append(store: &dyn Store, key: Key, n: u128) {
    let mut current = block_on(store.read(std::slice::from_ref(&key))).expect("etcd answers").remove(0);
    for try_again in 0_u64.. {
        let mut object: serde_json::Map<String, serde_json::Value> =
            current.as_ref().map(|entry| serde_json::from_slice(&entry.value).expect("an object")).unwrap_or_default();
        let address = object.len().to_string();
        object.insert(address, json!({ "bound": { "by": format!("bench/{n:064x}/eth0") } }));
        let value = serde_json::to_vec(&object).expect("an object serialises");
        let batch = Batch {
            guards: vec![Guard { key: key.clone(), version: current.as_ref().map(|e| e.version) }],
            writes: vec![Write::Put(key.clone(), value)],
            request_id: id(usize::MAX, n as u64) ^ u128::from(try_again) << 32 ^ n << 64,
        };
        match block_on(store.commit(&batch)).expect("etcd answers") {
            Outcome::Committed { .. } => return,
            Outcome::Conflict(mut now) => current = now.remove(0),
            Outcome::Unknown { reason } => panic!("{reason}"),
        }
    }
}

/// Ids as good as random: an odd multiplier spreads them over the lanes.
fn id(worker: usize, n: u64) -> u128 {
    (((worker as u128 + 1) << 64) | (u128::from(n) + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
}

/// Counts the batches that were refused.
#[derive(Debug)]
struct Counting {
    inner: Arc<dyn Store>,
    conflicts: AtomicU64,
}

#[async_trait]
impl Store for Counting {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let outcome = self.inner.commit(batch).await;
        if matches!(outcome, Ok(Outcome::Conflict(_))) {
            self.conflicts.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    async fn commit_many(&self, batches: &[Batch]) -> Vec<Result<Outcome, StoreError>> {
        let outcomes = self.inner.commit_many(batches).await;
        let refused = outcomes.iter().filter(|outcome| matches!(outcome, Ok(Outcome::Conflict(_)))).count();
        self.conflicts.fetch_add(refused as u64, Ordering::Relaxed);
        outcomes
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.inner.first_gap(prefix, range).await
    }

    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        self.inner.watch(prefix, after).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}
