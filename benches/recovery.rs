//! `recovery`: how long a process needs from opening the log to its first durable lease, with 65,000 addresses in use and
//! with a million (in a full run).
//!
//! Three states of the files: all in the snapshot; the log as long as it gets before a merge; and with a torn record at
//! its end, as a writer that was killed leaves it. The files are in the page cache, the flush of the lease is in the time.

use std::error::Error;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use dcenet_benches::{Row, Sample, Summary, rounds, say, target};
use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::{Batch, Entry, Key, Outcome, Store, Write, numbered};
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;

const ID: &str = "recovery";

fn main() -> Result<(), Box<dyn Error>> {
    let config: IpamConfig =
        serde_json::from_str(r#"{ "pools": [ { "name": "p", "subnet": "10.0.0.0/8", "gateway": "10.0.0.1" } ] }"#)?;
    let mut summary = Summary::default();
    // Addresses in use, and the most milliseconds that serving them again may take.
    let sizes: &[(usize, f64)] =
        if rounds(1, 0) == 1 { &[(65_000, 50.0), (1_000_000, 400.0)] } else { &[(65_000, 50.0)] };
    for &(size, goal) in sizes {
        // On the disk, as the log is.
        let dir = tempfile::Builder::new().prefix("recovery-").tempdir_in(target())?;
        fill(dir.path(), &config, 1..size)?;
        measure(&mut summary, dir.path(), &config, size, 0, goal)?;
        // A merge comes at 1/128 of the records, of which a binding has two; what is measured adds some.
        let tail = (size / 128).saturating_sub(400);
        fill(dir.path(), &config, size + 1..size + 1 + tail)?;
        measure(&mut summary, dir.path(), &config, size, tail, goal)?;
    }
    summary.write();
    Ok(())
}

fn measure(
    summary: &mut Summary,
    dir: &Path,
    config: &IpamConfig,
    size: usize,
    tail: usize,
    goal: f64,
) -> Result<(), Box<dyn Error>> {
    let (mut opens, mut firsts, mut torn) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..rounds(21, 5) * 2 {
        let tears = i % 2 == 1;
        if tears {
            tear(dir)?;
        }
        let request = request(30_000_000 + tail * 100 + i)?;
        let start = Instant::now();
        let store = Arc::new(LogStore::open(dir)?);
        let open = start.elapsed();
        let ipam = Ipam::new(config, store)?;
        block_on(ipam.lease(&request))?;
        let first = start.elapsed().as_secs_f64() * 1000.0;
        if tears {
            torn.push(first);
        } else {
            opens.push(open.as_secs_f64() * 1000.0);
            firsts.push(first);
        }
        // What is measured does not grow.
        block_on(ipam.release_current(&request.attachment))?;
    }
    let megabytes: u64 = fs::read_dir(dir)?.filter_map(|e| Some(e.ok()?.metadata().ok()?.len())).sum();
    let open = Sample::new(opens).median();
    say(format_args!("{ID}: {size} in use, {} MB, {tail} in the log: opened in {open:.2} ms", megabytes >> 20));
    for (state, times) in [("", &firsts), (", torn end", &torn)] {
        let limit = vec![goal; times.len()];
        let variant = format!("{size} in use, log of {tail}{state}");
        summary.add(Row::compare(ID, &variant, 1.0, times, (&format!("{goal} ms"), &limit)));
    }
    Ok(())
}

/// The front of a record behind the last one.
fn tear(dir: &Path) -> Result<(), Box<dyn Error>> {
    let bytes = fs::read(dir.join("log"))?;
    let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1).next_multiple_of(8);
    let log = fs::OpenOptions::new().write(true).open(dir.join("log"))?;
    log.write_all_at(&[200, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8], end as u64)?;
    Ok(())
}

/// One real lease, whose records are repeated for the addresses behind it, in few large commits.
fn fill(dir: &Path, config: &IpamConfig, numbers: Range<usize>) -> Result<(), Box<dyn Error>> {
    let store = Arc::new(LogStore::open(dir)?);
    let ipam = Ipam::new(config, store.clone())?;
    // The first time it is made, later it is there.
    let lease = block_on(ipam.lease(&request(0)?))?;
    let before = block_on(ipam.bindings(None))?.len();
    let address = lease.addresses.first().ok_or("no address")?.address;
    let IpAddr::V4(first) = address.addr() else { return Err("not IPv4".into()) };
    let of = |start: &[u8]| -> Result<(Key, Entry), Box<dyn Error>> {
        let found = block_on(store.scan(start, None, 1))?;
        Ok(found.into_iter().next().ok_or("a record is missing")?)
    };
    let (slot, attachment) = (of(b"s/")?, of(b"t/")?);
    let replace = |bytes: &[u8], from: &str, to: &str| -> Result<Key, Box<dyn Error>> {
        Ok(std::str::from_utf8(bytes)?.replace(from, to).into_bytes())
    };
    let prefix = &slot.0[..slot.0.len() - 16];
    let end = numbers.end;
    for piece in numbers.clone().collect::<Vec<_>>().chunks(100_000) {
        let mut batches = Vec::with_capacity(piece.len());
        for &i in piece {
            let number = u32::from(first) + i as u32;
            let (old, new) = (container(0), container(i));
            let text = Ipv4Addr::from(number).to_string();
            let (was, is) = (format!("\"{first}/"), format!("\"{text}/"));
            let writes = vec![
                Write::Put(numbered(prefix, number.into()), replace(&slot.1.value, &old, &new)?),
                Write::Put(replace(&attachment.0, &old, &new)?, replace(&attachment.1.value, &was, &is)?),
            ];
            batches.push(Batch { guards: vec![], writes, request_id: i as u128 });
        }
        for outcome in block_on(store.commit_many(&batches)) {
            let Outcome::Committed { .. } = outcome? else { return Err("a commit failed".into()) };
        }
    }
    // The next lease is behind them all, and they are what leases would have made.
    let next = block_on(ipam.lease(&request(10_000_000 + end)?))?;
    let expected = IpAddr::from(Ipv4Addr::from(u32::from(first) + end as u32));
    let held = block_on(ipam.bindings(None))?.len();
    if next.addresses.first().map(|a| a.address.addr()) != Some(expected) || held != before + numbers.len() + 1 {
        return Err(format!("{held} bindings, and the next lease is {next:?}").into());
    }
    Ok(())
}

/// As long as those of real runtimes.
fn container(i: usize) -> String {
    format!("{i:064x}")
}

fn request(i: usize) -> Result<LeaseRequest, Box<dyn Error>> {
    let attachment =
        serde_json::from_value(serde_json::json!({ "network": "net", "container": container(i), "ifname": "eth0" }))?;
    Ok(LeaseRequest { workload: Some("shop/web".parse()?), ..LeaseRequest::new(attachment) })
}
