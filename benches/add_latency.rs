//! `add-latency`: one ADD and one DEL as whole processes, ours against Debian's `bridge` with `host-local`, by turns.
//!
//! Both sides connect a fresh pod to a bridge that is its gateway, with one IPv4 address and a default route, in a host
//! namespace of their own. Ours makes every address durable before it answers; theirs never flushes.

use std::path::Path;

use dcenet_benches::plugin::{Cost, Counts, Plugin, build_ours};
use dcenet_benches::{Row, Sample, Summary, rounds, say};
use dcenet_core::test_support::TestHost;
use serde_json::json;

const ID: &str = "add-latency";
const PEER: &str = "bridge + host-local";

fn main() {
    let program = build_ours();
    let mut summary = Summary::default();
    let disk = tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in("/var/tmp").expect("a directory on disk");
    let memory =
        tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in("/dev/shm").expect("a directory in memory");
    for (place, directory, goal) in [("tmpfs", memory.path(), 0.25), ("disk", disk.path(), 1.0 / 3.0)] {
        compare(&program, place, directory, goal, &mut summary);
    }
    summary.write();
}

fn compare(program: &Path, place: &str, directory: &Path, goal: f64, summary: &mut Summary) {
    let ours = Plugin { program: program.to_owned(), config: our_config(directory) };
    let Some(theirs) = Plugin::debian("bridge", their_config(directory)) else {
        say("add-latency: not run, for Debian's containernetworking-plugins are not installed");
        return;
    };
    let sides = [(TestHost::new(), &ours), (TestHost::new(), &theirs)];
    let pods = sides.each_ref().map(|(host, _)| host.new_pod());
    let floor = Plugin { program: "/bin/true".into(), config: json!({}) };

    let mut adds: [Vec<Cost>; 2] = Default::default();
    let mut dels: [Vec<Cost>; 2] = Default::default();
    let mut floors: Vec<Cost> = Vec::new();
    // The first pairs make the bridges and warm the caches.
    const WARM: usize = 3;
    for round in 0..WARM + rounds(60, 5) {
        for (side, (host, plugin)) in sides.iter().enumerate() {
            let container = format!("bench{round}");
            let (add, del) = host.root().run(|| {
                let add = plugin.run("ADD", &container, pods[side].path());
                (add, plugin.run("DEL", &container, pods[side].path()))
            });
            if round >= WARM {
                adds[side].push(add);
                dels[side].push(del);
            }
        }
        floors.push(floor.run("VERSION", "none", Path::new("/")));
    }

    let wall = |costs: &[Cost]| costs.iter().map(|c| c.wall_ms).collect::<Vec<_>>();
    let cpu = |costs: &[Cost]| costs.iter().map(|c| c.cpu_ms).collect::<Vec<_>>();
    let row = |variant: &str, goal: f64, of: &[Vec<Cost>; 2], what: fn(&[Cost]) -> Vec<f64>| {
        let [ours, theirs] = of.each_ref().map(|costs| what(costs));
        let floor = Sample::new(what(&floors)).median();
        Row::compare(ID, &format!("{variant}, {place}"), goal, &ours, (PEER, &theirs)).with_floor(floor)
    };
    summary.add(row("add", goal, &adds, wall));
    summary.add(row("add cpu", 1.0, &adds, cpu));
    summary.add(row("del cpu", 1.0, &dels, cpu));

    for (side, (host, plugin)) in sides.iter().enumerate() {
        let size = std::fs::metadata(&plugin.program).map_or(0, |m| m.len()) / 1024;
        let rss = adds[side].iter().map(|c| c.rss_kib).max().unwrap_or_default();
        let (pod, trace) = (pods[side].path(), directory.join("trace"));
        let counts = host.root().run(|| {
            let counts = Counts::trace(plugin, "ADD", "traced", pod, &trace);
            plugin.run("DEL", "traced", pod);
            counts
        });
        let name = if side == 0 { "ours" } else { PEER };
        say(format_args!(
            "             {place}, {name}: rss {rss} KiB, binary {size} KiB, {}",
            counts.unwrap_or_default()
        ));
    }
}

fn our_config(directory: &Path) -> serde_json::Value {
    json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "dcenet",
        "link": { "kind": "bridge", "bridge": "dc0", "isGateway": true },
        "ipam": {
            "type": "dcenet",
            "pools": [{ "name": "pods", "subnet": "10.88.0.0/16", "gateway": "10.88.0.1" }],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
        "stateDir": directory.join("state"), "runDir": directory.join("run"),
    })
}

fn their_config(directory: &Path) -> serde_json::Value {
    json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge",
        "bridge": "cni0", "isGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": directory.join("host-local"),
            "ranges": [[{ "subnet": "10.89.0.0/16", "gateway": "10.89.0.1" }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    })
}
