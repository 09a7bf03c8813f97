//! `group-commit`: leases a second that 64 callers of one process get from the log on a disk, every reply durable, in
//! groups and by an allocator that keeps an index, against one caller who waits for a flush each time; and as many
//! callers as there are addresses, at once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dcenet_benches::{Row, Sample, Summary, rounds, say};
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_ipam::store::group::GroupStore;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;
use serde_json::json;

const ID: &str = "group-commit";
const CALLERS: usize = 64;
const ADDRESSES: usize = 1000;

fn main() {
    let mut summary = Summary::default();
    let window = Duration::from_millis(rounds(2000, 200) as u64);
    let [mut ours, mut peer, mut tails, mut all, mut refusals] = [const { Vec::new() }; 5];
    let runs = rounds(7, 1);
    for _ in 0..runs {
        let one = measure(false, 1, window);
        let group = measure(true, CALLERS, window);
        say(format_args!(
            "{ID}: {CALLERS} callers {:.0}/s, {:.1} a flush; one caller {:.0}/s, {:.1} a flush",
            group.rate, group.per_flush, one.rate, one.per_flush
        ));
        peer.push(1e6 / one.rate);
        ours.push(1e6 / group.rate);
        tails.push(group.p99_ms);
        let (served_ms, refused_ms) = as_many_callers_as_addresses();
        all.push(served_ms);
        refusals.push(refused_ms);
    }
    let same = |value: f64| vec![value; runs];
    let name = format!("{CALLERS} callers");
    summary.add(Row::compare(ID, &name, 0.05, &ours, ("one caller, a flush each", &peer)).in_unit("us"));
    summary.add(Row::compare(ID, &format!("{name} "), 1.0, &ours, ("20,000/s", &same(50.0))).in_unit("us"));
    summary.add(Row::compare(ID, &format!("{name}, p99"), 1.0, &tails, ("25 ms", &same(25.0))));
    let name = format!("{ADDRESSES} callers, as many free");
    summary.add(Row::compare(ID, &name, 1.0, &all, ("3 s", &same(3000.0))));
    summary.add(Row::compare(ID, "and one more, refused", 1.0, &refusals, ("5 ms", &same(5.0))));
    summary.write();
}

struct Done {
    rate: f64,
    p99_ms: f64,
    per_flush: f64,
}

/// An allocator over a log of its own in the directory for temporary files, which should be on a disk.
fn open(grouped: bool, subnet: &str, ranges: &[String]) -> (tempfile::TempDir, Arc<LogStore>, Ipam) {
    let directory = tempfile::Builder::new().prefix("dcenet-bench-").tempdir().expect("a directory");
    let mut pool = json!({ "name": "p", "subnet": subnet });
    if !ranges.is_empty() {
        pool["ranges"] = json!(ranges);
    }
    let config: IpamConfig = serde_json::from_value(json!({ "pools": [pool] })).expect("the section is right");
    let log = Arc::new(LogStore::open(directory.path()).expect("the store opens"));
    let ipam = match grouped {
        true => Ipam::new(&config, Arc::new(GroupStore::new(log.clone()))).map(Ipam::with_index),
        false => Ipam::new(&config, log.clone()),
    };
    let ipam = ipam.expect("the pool is right");
    block_on(ipam.ready()).expect("the pool is registered");
    (directory, log, ipam)
}

fn measure(grouped: bool, callers: usize, window: Duration) -> Done {
    let (_directory, log, ipam) = open(grouped, "10.0.0.0/8", &[]);
    let flushes = log.disk_use().syncs;
    let begin = Instant::now();
    let times: Vec<f64> = thread::scope(|scope| {
        let ipam = &ipam;
        let call = move |caller: usize| {
            let mut times = Vec::new();
            while begin.elapsed() < window {
                let request = request(caller, times.len());
                let asked = Instant::now();
                block_on(ipam.lease(&request)).expect("a free address");
                times.push(asked.elapsed().as_secs_f64() * 1e3);
            }
            times
        };
        let callers: Vec<_> = (0..callers).map(|caller| scope.spawn(move || call(caller))).collect();
        callers.into_iter().flat_map(|caller| caller.join().expect("no caller fails")).collect()
    });
    let (elapsed, leases) = (begin.elapsed().as_secs_f64(), times.len());
    let bindings = block_on(ipam.bindings(None)).expect("the store answers");
    let distinct: BTreeSet<_> = bindings.iter().map(|binding| binding.address.addr()).collect();
    assert_eq!((bindings.len(), distinct.len()), (leases, leases), "none lost, none twice");
    let flushes = log.disk_use().syncs - flushes;
    Done {
        rate: leases as f64 / elapsed,
        p99_ms: Sample::new(times).quantile(0.99),
        per_flush: leases as f64 / flushes as f64,
    }
}

/// Milliseconds until all have one, and until the next is told that there is none.
fn as_many_callers_as_addresses() -> (f64, f64) {
    let (_directory, _log, ipam) = open(true, "10.0.0.0/22", &["10.0.0.1-10.0.3.232".to_owned()]);
    let begin = Instant::now();
    thread::scope(|scope| {
        let ipam = &ipam;
        let threads: Vec<_> = (0..ADDRESSES)
            .map(|caller| scope.spawn(move || block_on(ipam.lease(&request(caller, 0))).expect("one for each")))
            .collect();
        threads.into_iter().for_each(|thread| drop(thread.join().expect("no caller fails")));
    });
    let served = begin.elapsed();
    let bindings = block_on(ipam.bindings(None)).expect("the store answers");
    let distinct: BTreeSet<_> = bindings.iter().map(|binding| binding.address.addr()).collect();
    assert_eq!(distinct.len(), ADDRESSES, "each has another");
    let begin = Instant::now();
    let refused = block_on(ipam.lease(&request(ADDRESSES, 0)));
    let waited = begin.elapsed();
    assert!(matches!(refused, Err(LeaseError::Exhausted { .. })), "{refused:?}");
    (served.as_secs_f64() * 1e3, waited.as_secs_f64() * 1e3)
}

fn request(caller: usize, n: usize) -> LeaseRequest {
    let key = json!({ "network": "bench", "container": format!("{caller:032x}{n:032x}"), "ifname": "eth0" });
    LeaseRequest::new(serde_json::from_value(key).expect("an attachment's key"))
}
