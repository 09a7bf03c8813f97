//! `add-burst`: ADDs of new pods by 1, 2 and 8 callers at one time, each a process, ours against Debian's `bridge` with
//! `host-local`, by turns. A round is 32 pods; its figure is the time from the first call to the last answer, for one ADD.
//! Their DELs are not in it.
//!
//! Both sides connect pods to a bridge that is their gateway, with one IPv4 address and a default route, in a host namespace
//! of their own. Ours makes every address durable before it answers, and callers share no process; theirs never flushes.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use dcenet_benches::plugin::{Plugin, build_ours};
use dcenet_benches::{Row, Summary, rounds, say};
use dcenet_core::test_support::{TestHost, TestNetNs};
use serde_json::json;

const ID: &str = "add-burst";
const PEER: &str = "bridge + host-local";
/// Callers, and the greatest ratio of times.
const GOALS: [(usize, f64); 3] = [(1, 1.0 / 5.0), (2, 1.0 / 4.0), (8, 1.0 / 5.0)];

fn main() {
    let program = build_ours();
    let mut summary = Summary::default();
    for (place, root) in [("tmpfs", "/dev/shm"), ("disk", "/var/tmp")] {
        let directory = tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in(root).expect("a directory");
        compare(&program, place, directory.path(), &mut summary);
    }
    summary.write();
}

fn compare(program: &Path, place: &str, directory: &Path, summary: &mut Summary) {
    let ours = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "dcenet",
        "link": { "kind": "bridge", "bridge": "dc0", "isGateway": true },
        "ipam": {
            "type": "dcenet",
            "pools": [{ "name": "pods", "subnet": "10.88.0.0/16", "gateway": "10.88.0.1" }],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
        "stateDir": directory.join("state"), "runDir": directory.join("run"),
    });
    let theirs = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": directory.join("host-local"),
            "ranges": [[{ "subnet": "10.89.0.0/16", "gateway": "10.89.0.1" }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
        },
    });
    let Some(bridge) = Plugin::debian("bridge", theirs) else {
        say("add-burst: not run, for Debian's containernetworking-plugins are not installed");
        return;
    };
    let pods = rounds(32, 8);
    let sides = [Side::new(Plugin { program: program.to_owned(), config: ours }, pods), Side::new(bridge, pods)];
    for (callers, goal) in GOALS {
        let mut taken: [Vec<f64>; 2] = Default::default();
        // The first makes the bridges and warms the caches.
        for round in 0..=rounds(7, 1) {
            for (side, taken) in sides.iter().zip(&mut taken) {
                let ms = side.all("ADD", callers, round);
                side.all("DEL", callers, round);
                if round > 0 {
                    taken.push(ms);
                }
            }
        }
        let variant = format!("{callers} callers, {place}");
        summary.add(Row::compare(ID, &variant, goal, &taken[0], (PEER, &taken[1])));
    }
}

/// A host of its own with the pods of a round.
struct Side {
    host: TestHost,
    pods: Vec<TestNetNs>,
    plugin: Plugin,
}

impl Side {
    fn new(plugin: Plugin, pods: usize) -> Self {
        let host = TestHost::new();
        let pods = (0..pods).map(|_| host.new_pod()).collect();
        Self { host, pods, plugin }
    }

    /// A verb for every pod by so many callers; milliseconds for one.
    fn all(&self, verb: &str, callers: usize, round: usize) -> f64 {
        let next = AtomicUsize::new(0);
        let call = || {
            while let Some((n, pod)) =
                Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((n, self.pods.get(n)?)))
            {
                self.plugin.run(verb, &format!("bench{callers}-{round}-{n}"), pod.path());
            }
        };
        let begin = Instant::now();
        self.host.root().run(|| {
            std::thread::scope(|scope| {
                for _ in 0..callers {
                    scope.spawn(call);
                }
            });
        });
        begin.elapsed().as_secs_f64() * 1e3 / self.pods.len() as f64
    }
}
