//! `add-filled`: ADD with 10,000 and with 65,000 addresses in use against ADD with none, both ours, by turns; theirs
//! beside it. `DCENET_BENCH_IN_USE=n` takes another number.
//!
//! The peer of the ratio is ourselves with an empty pool: what is shown is that the cost does not grow.

use std::path::Path;

use dcenet_benches::plugin::{Counts, Plugin, build_ours};
use dcenet_benches::{Row, Sample, Summary, rounds, say};
use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_core::test_support::TestHost;
use dcenet_ipam::Ipam;
use serde_json::{Value, json};

const ID: &str = "add-filled";

fn main() {
    let mut summary = Summary::default();
    let program = build_ours();
    let asked = std::env::var("DCENET_BENCH_IN_USE").ok().map(|text| text.parse().expect("a number of addresses"));
    let counts = match asked {
        Some(count) => vec![count],
        None if rounds(1, 0) == 1 => vec![10_000, 65_000],
        None => vec![1000],
    };
    for in_use in counts {
        run(&mut summary, &program, in_use);
    }
    summary.write();
}

fn run(summary: &mut Summary, program: &Path, in_use: usize) {
    let directory =
        tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in("/dev/shm").expect("a directory in memory");
    let configs = ["filled", "empty"].map(|name| config(&directory.path().join(name)));
    fill(&configs[0], in_use);
    let sides = configs.map(|config| Plugin { program: program.to_owned(), config });

    let hosts = [TestHost::new(), TestHost::new()];
    let pods = hosts.each_ref().map(TestHost::new_pod);
    let mut adds: [Vec<f64>; 2] = Default::default();
    const WARM: usize = 3;
    for round in 0..WARM + rounds(60, 5) {
        for side in 0..2 {
            let container = format!("bench{round}");
            let cost = hosts[side].root().run(|| {
                let cost = sides[side].run("ADD", &container, pods[side].path());
                sides[side].run("DEL", &container, pods[side].path());
                cost
            });
            if round >= WARM {
                adds[side].push(cost.wall_ms);
            }
        }
    }
    assert_eq!(bound(&sides[0].config), u128::try_from(in_use).expect("small"), "nothing else was left or lost");
    assert_eq!(bound(&sides[1].config), 0);
    let variant = format!("{in_use} in use, tmpfs");
    summary.add(Row::compare(ID, &variant, 1.3, &adds[0], ("ours, none in use", &adds[1])));

    let trace = directory.path().join("trace");
    let counts = hosts[0].root().run(|| {
        let counts = Counts::trace(&sides[0], "ADD", "traced", pods[0].path(), &trace);
        sides[0].run("DEL", "traced", pods[0].path());
        counts
    });
    if let Some(counts) = counts {
        say(format_args!("             ours: {counts}"));
        assert!(counts.opens <= MAX_OPENS, "{} files opened; the goal is {MAX_OPENS}", counts.opens);
    }
    their_cost(directory.path(), in_use);
}

/// Fills the peer's directory as it would be, one file an address, and measures it alone: it is slow by seconds.
fn their_cost(directory: &Path, in_use: usize) {
    let data = directory.join("host-local");
    let config = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": { "type": "host-local", "dataDir": data, "ranges": [[{ "subnet": "10.96.0.0/14" }]] },
    });
    let Some(plugin) = Plugin::debian("bridge", config) else { return };
    let store = data.join("bench");
    std::fs::create_dir_all(&store).expect("the peer's directory");
    for n in 0..in_use {
        let address = std::net::Ipv4Addr::from(0x0a60_0100 + u32::try_from(n).expect("small"));
        std::fs::write(store.join(address.to_string()), format!("filled{n}\r\neth0")).expect("the peer's file");
    }
    let host = TestHost::new();
    let pod = host.new_pod();
    let mut costs = Vec::new();
    for round in 0..rounds(10, 2) {
        let container = format!("bench{round}");
        let cost = host.root().run(|| {
            let cost = plugin.run("ADD", &container, pod.path());
            plugin.run("DEL", &container, pod.path());
            cost
        });
        costs.push(cost.wall_ms);
    }
    let trace = directory.join("trace");
    let counts = host.root().run(|| {
        let counts = Counts::trace(&plugin, "ADD", "traced", pod.path(), &trace);
        plugin.run("DEL", "traced", pod.path());
        counts
    });
    say(format_args!(
        "             bridge + host-local, as many in use: {:.1} ms, {} opens",
        Sample::new(costs).median(),
        counts.map_or_else(|| "uncounted".to_owned(), |c| c.opens.to_string()),
    ));
}

/// Of both sides: they differ in nothing but what is in the store.
fn config(directory: &Path) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "dcenet",
        "link": { "kind": "bridge", "bridge": "dc0", "isGateway": true },
        "ipam": { "type": "dcenet", "pools": [{ "name": "pods", "subnet": "10.88.0.0/14", "gateway": "10.88.0.1" }] },
        "stateDir": directory.join("state"), "runDir": directory.join("run"),
    })
}

/// The store that the plugin opens by this configuration.
fn open(config: &Value) -> Ipam {
    let section = serde_json::from_value(config["ipam"].clone()).expect("the section is right");
    Ipam::open(&section, Path::new(config["stateDir"].as_str().expect("a path"))).expect("the store opens")
}

/// Leases addresses to attachments whose names are as long as those of real runtimes.
fn fill(config: &Value, count: usize) {
    let ipam = open(config);
    for n in 0..count {
        let key = json!({ "network": "bench", "container": format!("{n:064x}"), "ifname": "eth0" });
        let attachment = serde_json::from_value(key).expect("an attachment's key");
        let workload = Some(format!("shop/web-{n}").parse().expect("a workload"));
        let request = LeaseRequest { workload, ..LeaseRequest::new(attachment) };
        pollster::block_on(ipam.lease(&request)).expect("a free address");
    }
}

/// Addresses in use, as the store itself counts them.
fn bound(config: &Value) -> u128 {
    pollster::block_on(open(config).usage()).expect("the store answers").iter().map(|pool| pool.bound).sum()
}

/// More would grow with something.
const MAX_OPENS: usize = 12;
