//! What a lease and its release cost inside a process, over the store in memory, by fill and by width of the pool.
//!
//! ```text
//! cargo run --release -p dcenet-ipam --example alloc -- [ROUNDS]
//! ```
//!
//! Each is the whole call: records with owner, sequence and time of release are written, as on any store.

#![expect(clippy::print_stdout, reason = "a tool for people")]

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;

fn main() -> Result<(), Box<dyn Error>> {
    let rounds: usize = std::env::args().nth(1).map_or(Ok(20_000), |text| text.parse())?;
    println!("pool              in use   lease p50   p99.9       release p50 p99.9");
    // Of a /16 two addresses are nobody's; of 65,534 the last six are free at 99.99 %.
    for (subnet, in_use) in [
        ("10.0.0.0/16", 0),
        ("10.0.0.0/16", 32_767),
        ("10.0.0.0/16", 65_528),
        ("fd00::/112", 32_767),
        ("fd00::/64", 32_767),
        ("fd00::/48", 32_767),
        ("fd00::/8", 32_767),
    ] {
        let config: IpamConfig = serde_json::from_str(&format!(
            r#"{{ "cooldown": "0s", "pools": [ {{ "name": "p", "subnet": "{subnet}" }} ] }}"#
        ))?;
        let ipam = Ipam::new(&config, Arc::new(MemoryStore::new()))?;
        for i in 0..in_use {
            block_on(ipam.lease(&request(i)?))?;
        }
        let asked = request(usize::MAX)?;
        let (mut leases, mut releases) = (Vec::with_capacity(rounds), Vec::with_capacity(rounds));
        for _ in 0..rounds {
            let start = Instant::now();
            let lease = black_box(block_on(ipam.lease(&asked))?);
            leases.push(start.elapsed());
            let start = Instant::now();
            block_on(ipam.release_sequence(&asked.attachment, lease.sequence()))?;
            releases.push(start.elapsed());
        }
        let (lease, release) = (percentiles(&mut leases), percentiles(&mut releases));
        println!(
            "{subnet:<17} {in_use:<8} {:<11.2?} {:<11.2?} {:<11.2?} {:<11.2?}",
            lease.0, lease.1, release.0, release.1
        );
    }
    Ok(())
}

fn percentiles(times: &mut [Duration]) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 999 / 1000])
}

fn request(i: usize) -> Result<LeaseRequest, Box<dyn Error>> {
    let container = format!("{i:016x}");
    let attachment =
        serde_json::from_value(serde_json::json!({ "network": "net", "container": container, "ifname": "eth0" }))?;
    Ok(LeaseRequest::new(attachment))
}
