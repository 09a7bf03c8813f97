//! `alloc-memory`: what a pool takes of memory, as a child's resident set grows by it: with nothing in use, and with a
//! million addresses in use, each with owner, sequence and time; beside it a map with the same content.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::process::Command;
use std::time::Duration;

use dcenet_benches::{Row, Summary, rounds, say};
use dcenet_ipam::pool::AddressPool;
use ipnet::IpNet;

const ID: &str = "alloc-memory";
const JOB: &str = "DCENET_BENCH_MEMORY_JOB";
const EMPTY_POOLS: usize = 10_000;
const OWNERS: usize = 1000;

fn main() {
    if let Ok(job) = std::env::var(JOB) {
        let (kind, rest) = job.split_once(' ').expect("a kind and a subnet");
        let (subnet, count) = rest.split_once(' ').expect("a subnet and a count");
        let grown = work(kind, subnet.parse().expect("a prefix"), count.parse().expect("a count"));
        say(format_args!("{} {}", grown, resident()));
        return;
    }
    let mut summary = Summary::default();
    let count = rounds(1_000_000, 100_000);
    let runs = rounds(3, 1);
    for subnet in ["10.0.0.0/8", "fd00::/64"] {
        let [mut each, mut map, mut whole] = [const { Vec::new() }; 3];
        for _ in 0..runs {
            let (grown, resident) = child("pool", subnet, count);
            each.push(grown as f64 / count as f64);
            whole.push(resident as f64 / f64::from(1 << 20));
            map.push(child("map", subnet, count).0 as f64 / count as f64);
        }
        let goal = vec![48.0; runs];
        let variant = format!("{subnet}, {count} in use");
        summary.add(Row::compare(ID, &variant, 1.0, &each, ("48 B each", &goal)).in_unit("B"));
        summary.add(Row::compare(ID, &format!("{variant} "), 1.0, &each, ("a map", &map)).in_unit("B"));
        let goal = vec![64.0; runs];
        let variant = format!("{subnet}, {count}, process");
        summary.add(Row::compare(ID, &variant, 1.0, &whole, ("64 MiB", &goal)).in_unit("MiB"));
    }
    for subnet in ["10.0.0.0/30", "0.0.0.0/0", "::/0"] {
        let each: Vec<f64> =
            (0..runs).map(|_| child("empty", subnet, EMPTY_POOLS).0 as f64 / EMPTY_POOLS as f64).collect();
        let goal = vec![1024.0; runs];
        summary.add(Row::compare(ID, &format!("{subnet}, empty"), 1.0, &each, ("1 KiB", &goal)).in_unit("B"));
    }
    summary.write();
}

/// By how many bytes a process grew for the job, and what it takes in all.
fn child(kind: &str, subnet: &str, count: usize) -> (u64, u64) {
    let output = Command::new(std::env::current_exe().expect("a program"))
        .env(JOB, format!("{kind} {subnet} {count}"))
        .output()
        .expect("a process");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("figures are text");
    let mut figures = text.split_whitespace().map(|figure| figure.parse().expect("bytes"));
    (figures.next().expect("a figure"), figures.next().expect("two figures"))
}

fn work(kind: &str, subnet: IpNet, count: usize) -> u64 {
    let owners: Vec<String> = (0..OWNERS).map(|n| format!("shop/web-{n}")).collect();
    let before = resident();
    match kind {
        "pool" => {
            let mut pool = AddressPool::new(subnet, Duration::from_secs(60));
            for n in 0..count {
                pool.allocate(&owners[n % OWNERS], n as u64).expect("it is wide");
            }
            let grown = resident() - before;
            assert_eq!(black_box(pool).bound(), count as u64);
            grown
        }
        "map" => {
            let mut map = BTreeMap::new();
            for n in 0..count {
                map.insert(n as u128, (owners[n % OWNERS].clone(), n as u64, n as u64));
            }
            let grown = resident() - before;
            assert_eq!(black_box(map).len(), count);
            grown
        }
        _ => {
            let pools: Vec<AddressPool> =
                (0..count).map(|_| AddressPool::new(subnet, Duration::from_secs(60))).collect();
            let grown = resident() - before;
            assert_eq!(black_box(pools).len(), count);
            grown
        }
    }
}

/// Bytes of this process that are in memory (proc_pid_smaps(5)).
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").expect("the kernel tells");
    let line = text.lines().find(|line| line.starts_with("Rss:")).expect("a line of the resident set");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("KiB") * 1024
}
