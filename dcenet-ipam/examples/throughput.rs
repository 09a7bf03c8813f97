//! Leases a second that many callers of one process get from a store, each commit alone and in groups.
//!
//! ```text
//! cargo run --release -p dcenet-ipam --example throughput -- DIRECTORY [SECONDS] [CALLERS...]
//! ```

#![expect(clippy::print_stdout, reason = "a tool for people")]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_ipam::store::group::GroupStore;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError};
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let base = arguments.next().ok_or("name a directory")?;
    let seconds: u64 = arguments.next().map_or(Ok(5), |a| a.parse())?;
    let callers: Vec<usize> = arguments.map(|a| a.parse()).collect::<Result<_, _>>()?;
    let callers = if callers.is_empty() { vec![1, 64] } else { callers };
    println!("callers  commits  leases/s  p50        p99        leases/flush  conflicts/lease  in reads  in commits");
    for callers in callers {
        for grouped in [false, true] {
            run(&base, Duration::from_secs(seconds), callers, grouped)?;
        }
    }
    Ok(())
}

fn run(base: &str, limit: Duration, callers: usize, grouped: bool) -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir_in(base)?;
    let config: IpamConfig =
        serde_json::from_str(r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/8", "gateway": "10.0.0.1" } ] }"#)?;
    let log = Arc::new(LogStore::open(dir.path())?);
    let store: Arc<dyn Store> = if grouped { Arc::new(GroupStore::new(log.clone())) } else { log.clone() };
    let timed = Arc::new(Timed { inner: store, reading: zero(), committing: zero(), conflicts: zero() });
    let ipam = Ipam::new(&config, timed.clone())?;
    block_on(ipam.ready())?;
    let (flushes, stop) = (log.disk_use().syncs, AtomicBool::new(false));
    let start = Instant::now();
    let results: Vec<Result<Vec<Duration>, String>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..callers)
            .map(|caller| {
                let (ipam, stop) = (&ipam, &stop);
                scope.spawn(move || {
                    let mut times = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let request = request(caller, times.len()).map_err(|e| e.to_string())?;
                        let begin = Instant::now();
                        block_on(ipam.lease(&request)).map_err(|e| e.to_string())?;
                        times.push(begin.elapsed());
                    }
                    Ok(times)
                })
            })
            .collect();
        thread::sleep(limit);
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| Err("a caller panicked".to_owned()))).collect()
    });
    let elapsed = start.elapsed();
    let mut times: Vec<Duration> = results.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
    times.sort_unstable();
    let held = block_on(ipam.bindings(None))?.len();
    if held != times.len() || times.is_empty() {
        return Err(format!("{held} bindings after {} leases", times.len()).into());
    }
    let leases = times.len() as f64;
    let share = |nanoseconds: &AtomicU64| {
        nanoseconds.load(Ordering::Relaxed) as f64 / 1e9 / elapsed.as_secs_f64() / callers as f64 * 100.0
    };
    println!(
        "{callers:<8} {:<8} {:<9.0} {:<10.1?} {:<10.1?} {:<13.1} {:<16.2} {:<8.0}% {:.0}%",
        if grouped { "grouped" } else { "alone" },
        leases / elapsed.as_secs_f64(),
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        leases / (log.disk_use().syncs - flushes) as f64,
        timed.conflicts.load(Ordering::Relaxed) as f64 / leases,
        share(&timed.reading),
        share(&timed.committing),
    );
    Ok(())
}

fn zero() -> AtomicU64 {
    AtomicU64::new(0)
}

fn request(caller: usize, i: usize) -> Result<LeaseRequest, Box<dyn Error>> {
    let container = format!("{caller:032x}{i:032x}");
    let attachment =
        serde_json::from_value(serde_json::json!({ "network": "net", "container": container, "ifname": "eth0" }))?;
    Ok(LeaseRequest::new(attachment))
}

/// Where the callers' time goes.
#[derive(Debug)]
struct Timed {
    inner: Arc<dyn Store>,
    reading: AtomicU64,
    committing: AtomicU64,
    conflicts: AtomicU64,
}

fn add(counter: &AtomicU64, since: Instant) {
    counter.fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
}

#[async_trait]
impl Store for Timed {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        let begin = Instant::now();
        let result = self.inner.read(keys).await;
        add(&self.reading, begin);
        result
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        let begin = Instant::now();
        let result = self.inner.scan(prefix, after, limit).await;
        add(&self.reading, begin);
        result
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        let begin = Instant::now();
        let result = self.inner.commit(batch).await;
        add(&self.committing, begin);
        if matches!(result, Ok(Outcome::Conflict(_))) {
            self.conflicts.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    async fn first_gap(
        &self,
        prefix: &[u8],
        range: std::ops::RangeInclusive<u128>,
    ) -> Result<Option<u128>, StoreError> {
        let begin = Instant::now();
        let result = self.inner.first_gap(prefix, range).await;
        add(&self.reading, begin);
        result
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}
