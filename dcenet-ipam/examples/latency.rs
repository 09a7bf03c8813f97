//! What a lease and a release cost a process that lives for one of them, by the number of addresses in use.
//!
//! ```text
//! cargo run --release -p dcenet-ipam --example latency -- DIRECTORY [IN_USE...]
//! ```

#![expect(clippy::print_stdout, reason = "a tool for people")]

use std::error::Error;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::store::log::{DiskUse, LogStore};
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;

const ROUNDS: usize = 400;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let base = arguments.next().ok_or("name a directory")?;
    let sizes: Vec<usize> = arguments.map(|a| a.parse()).collect::<Result<_, _>>()?;
    let sizes = if sizes.is_empty() { vec![0, 10_000, 65_000] } else { sizes };
    let config: IpamConfig =
        serde_json::from_str(r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/11", "gateway": "10.0.0.1" } ] }"#)?;
    println!("in use   lease p50   p99        release p50 p99        opens lease/release  flushes  bytes/binding");
    for size in sizes {
        // Filled where flushing is free, then moved to where it is measured.
        let filled = tempfile::tempdir_in("/dev/shm")?;
        let ipam = Ipam::new(&config, Arc::new(LogStore::open(filled.path())?))?;
        for i in 0..size {
            block_on(ipam.lease(&request(&container(i))?))?;
        }
        drop(ipam);
        let target = tempfile::tempdir_in(&base)?;
        let mut bytes = 0;
        for entry in fs::read_dir(filled.path())? {
            let entry = entry?;
            bytes += if entry.file_name() == "snap" { entry.metadata()?.len() } else { 0 };
            fs::copy(entry.path(), target.path().join(entry.file_name()))?;
        }
        drop(filled);
        fs::File::open(target.path())?.sync_all()?;
        let (mut leases, mut releases) = (Vec::new(), Vec::new());
        let (mut last_lease, mut last_release) = (DiskUse::default(), DiskUse::default());
        for i in 0..ROUNDS {
            let request = request(&container(10_000_000 + i))?;
            let (time, used) = timed(target.path(), &config, |ipam| block_on(ipam.lease(&request)).map(drop))?;
            leases.push(time);
            last_lease = used;
            let (time, used) =
                timed(target.path(), &config, |ipam| block_on(ipam.release_current(&request.attachment)))?;
            releases.push(time);
            last_release = used;
        }
        let per_binding = if size == 0 { "-".to_owned() } else { format!("{}", bytes / size as u64) };
        let (lease, release) = (percentiles(&mut leases), percentiles(&mut releases));
        println!(
            "{size:<8} {:<11.1?} {:<10.1?} {:<11.1?} {:<10.1?} {}/{:<17} {}/{:<6} {per_binding}",
            lease.0,
            lease.1,
            release.0,
            release.1,
            last_lease.opens,
            last_release.opens,
            last_lease.syncs,
            last_release.syncs,
        );
    }
    Ok(())
}

fn timed(
    dir: &Path,
    config: &IpamConfig,
    operation: impl Fn(&Ipam) -> Result<(), LeaseError>,
) -> Result<(Duration, DiskUse), Box<dyn Error>> {
    let start = Instant::now();
    let store = Arc::new(LogStore::open(dir)?);
    let ipam = Ipam::new(config, store.clone())?;
    operation(&ipam)?;
    Ok((start.elapsed(), store.disk_use()))
}

fn percentiles(times: &mut [Duration]) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

/// As long as those of real runtimes.
fn container(i: usize) -> String {
    format!("{i:064x}")
}

fn request(container: &str) -> Result<LeaseRequest, Box<dyn Error>> {
    let attachment =
        serde_json::from_value(serde_json::json!({ "network": "net", "container": container, "ifname": "eth0" }))?;
    Ok(LeaseRequest { workload: Some("shop/web".parse()?), ..LeaseRequest::new(attachment) })
}
