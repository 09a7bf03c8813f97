//! `add-latency`: one ADD and one DEL as whole processes, ours against Debian's `bridge` with `host-local`, by turns.
//!
//! Both sides connect a fresh pod to a bridge that is its gateway, with one IPv4 address and a default route, in a host
//! namespace of their own. Ours makes every address durable before it answers; theirs never flushes. "With policy" the pod
//! goes under default deny in both directions while its device is down, and the owner of the policy state, a live one with
//! a policy of its own, is told; ADD does not wait for the owner.
//!
//! The resident set is the greatest of any process of an ADD; its floor is the small process that started it.

use std::path::Path;

use dcenet_benches::owner::Owner;
use dcenet_benches::plugin::{Cost, Counts, Plugin, build_ours};
use dcenet_benches::{Row, Sample, Summary, rounds, say};
use dcenet_core::test_support::{TestHost, TestNetNs};
use serde_json::json;

const ID: &str = "add-latency";
const PEER: &str = "bridge + host-local";
const LAUNCHER: &str = env!("CARGO_BIN_EXE_launcher");

/// The greatest ratios without policy and with it.
struct Goals {
    plain: f64,
    policy: f64,
}

fn main() {
    let program = build_ours();
    let mut summary = Summary::default();
    let disk = tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in("/var/tmp").expect("a directory on disk");
    let memory =
        tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in("/dev/shm").expect("a directory in memory");
    let tmpfs = Goals { plain: 1.0 / 4.0, policy: 1.0 / 3.0 };
    compare(&program, "tmpfs", memory.path(), &tmpfs, &mut summary);
    let durable = Goals { plain: 1.0 / 3.0, policy: 0.45 };
    compare(&program, "disk", disk.path(), &durable, &mut summary);
    summary.write();
}

/// A host of its own, and what runs on it.
struct Side {
    name: &'static str,
    host: TestHost,
    pod: TestNetNs,
    plugin: Plugin,
    adds: Vec<Cost>,
    dels: Vec<Cost>,
}

impl Side {
    fn new(name: &'static str, host: TestHost, plugin: Plugin) -> Self {
        let pod = host.new_pod();
        Self { name, host, pod, plugin, adds: Vec::new(), dels: Vec::new() }
    }

    fn round(&mut self, container: &str, keep: bool) {
        let (add, del) = self.host.root().run(|| {
            let add = self.plugin.run("ADD", container, self.pod.path());
            (add, self.plugin.run("DEL", container, self.pod.path()))
        });
        if keep {
            self.adds.push(add);
            self.dels.push(del);
        }
    }
}

fn compare(program: &Path, place: &str, directory: &Path, goals: &Goals, summary: &mut Summary) {
    let Some(bridge) = Plugin::debian("bridge", their_config(directory)) else {
        say("add-latency: not run, for Debian's containernetworking-plugins are not installed");
        return;
    };
    let mut theirs = Side::new(PEER, TestHost::new(), bridge);
    let ours = |directory: &Path| Plugin { program: program.to_owned(), config: our_config(directory) };
    let mut plain = Side::new("ours", TestHost::new(), ours(&directory.join("plain")));

    let policed = directory.join("policed");
    let mut plugin = ours(&policed);
    let pins = policed.join("bpf");
    plugin.config["policy"] = json!({ "default": "deny", "await": "0s", "pins": pins });
    let mut policy = Side::new("ours with policy", TestHost::new(), plugin);
    std::fs::create_dir_all(policed.join("run")).expect("a directory");
    let owner = Owner::open(policy.host.host(), &policed.join("run"), &pins);

    let floor = Plugin { program: "/bin/true".into(), config: json!({}) };
    let mut floors: Vec<Cost> = Vec::new();
    // The first pairs make the bridges and warm the caches.
    const WARM: usize = 3;
    for round in 0..WARM + rounds(60, 5) {
        for side in [&mut theirs, &mut plain, &mut policy] {
            side.round(&format!("bench{round}"), round >= WARM);
        }
        floors.push(floor.run("VERSION", "none", Path::new("/")));
    }

    let wall = |costs: &[Cost]| costs.iter().map(|c| c.wall_ms).collect::<Vec<_>>();
    let cpu = |costs: &[Cost]| costs.iter().map(|c| c.cpu_ms).collect::<Vec<_>>();
    let row = |variant: &str, goal: f64, ours: &[Cost], theirs: &[Cost], what: fn(&[Cost]) -> Vec<f64>| {
        let floor = Sample::new(what(&floors)).median();
        Row::compare(ID, &format!("{variant}, {place}"), goal, &what(ours), (PEER, &what(theirs))).with_floor(floor)
    };
    summary.add(row("add", goals.plain, &plain.adds, &theirs.adds, wall));
    summary.add(row("add with policy", goals.policy, &policy.adds, &theirs.adds, wall));
    summary.add(row("add cpu", 1.0, &plain.adds, &theirs.adds, cpu));
    summary.add(row("add with policy cpu", 1.0, &policy.adds, &theirs.adds, cpu));
    summary.add(row("del cpu", 1.0, &plain.dels, &theirs.dels, cpu));

    let mut sets: [Vec<f64>; 3] = Default::default();
    let mut launchers = Vec::new();
    let report = directory.join("resident");
    for round in 0..rounds(9, 3) {
        for (side, sets) in [&plain, &policy, &theirs].into_iter().zip(&mut sets) {
            let Side { host, pod, plugin, .. } = side;
            let container = format!("resident{round}");
            let resident = host.root().run(|| {
                let resident = plugin.resident(LAUNCHER.as_ref(), "ADD", &container, pod.path(), &report);
                plugin.run("DEL", &container, pod.path());
                resident
            });
            sets.push(resident.kib);
            launchers.push(resident.launcher_kib);
        }
    }
    let launcher = Sample::new(launchers).median();
    for (variant, ours) in [("add resident set", &sets[0]), ("add with policy resident set", &sets[1])] {
        let row = Row::compare(ID, &format!("{variant}, {place}"), 1.0, ours, (PEER, &sets[2]));
        summary.add(row.in_unit("KiB").with_floor(launcher));
    }

    for Side { name, host, pod, plugin, .. } in [&plain, &policy, &theirs] {
        let size = std::fs::metadata(&plugin.program).map_or(0, |m| m.len()) / 1024;
        let trace = directory.join("trace");
        let counts = host.root().run(|| {
            let counts = Counts::trace(plugin, "ADD", "traced", pod.path(), &trace);
            plugin.run("DEL", "traced", pod.path());
            counts
        });
        let counts = counts.unwrap_or_default();
        say(format_args!("             {place}, {name}: binary {size} KiB, {counts}"));
    }
    owner.close();
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
