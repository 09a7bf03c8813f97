//! `add-kinds`: one ADD and one DEL of other kinds of links than `add-latency`'s, as whole processes, by turns: against Debian's
//! `ptp`, `macvlan` and `bridge` with `ipMasq`, each with `host-local`; against podman's netavark; and both families of addresses
//! against IPv4 alone.
//!
//! State is in memory on both sides. On a macvlan ours does not ask the segment for the address (RFC 5227), as theirs cannot.
//! netavark is told the address, for podman allocates it, and the network is internal, so that it writes no firewall rules: it does
//! less than ours. Both families' addresses are in use when ADD returns, which is looked at.

use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use dcenet_benches::plugin::{Plugin, build_ours};
use dcenet_benches::{Row, Summary, rounds, say};
use dcenet_core::test_support::{TestHost, TestNetNs};
use serde_json::{Value, json};

const ID: &str = "add-kinds";
const NETAVARK: &str = "/usr/lib/podman/netavark";
/// The first pairs make bridges and warm the caches.
const WARM: usize = 3;

/// The times of both verbs, in milliseconds.
#[derive(Default)]
struct Times {
    add: Vec<f64>,
    del: Vec<f64>,
}

/// What connects pods, on a host of its own.
struct Side {
    host: TestHost,
    pod: TestNetNs,
    by: By,
    times: Times,
}

enum By {
    Plugin(Plugin),
    Netavark { directory: PathBuf },
}

impl Side {
    fn new(by: By) -> Self {
        let host = TestHost::new();
        host.root().sh("ip link add up0 type veth peer name far0; ip link set far0 up; ip link set up0 up");
        let pod = host.new_pod();
        Self { host, pod, by, times: Times::default() }
    }

    fn round(&mut self, container: &str, keep: bool, look: impl Fn(&TestNetNs)) {
        let Self { host, pod, by, times } = self;
        let mut run = |verb: &str| {
            host.root().run(|| match by {
                By::Plugin(plugin) => plugin.run(verb, container, pod.path()).wall_ms,
                By::Netavark { directory } => netavark(directory, verb, container, pod.path()),
            })
        };
        let add = run("ADD");
        look(pod);
        let del = run("DEL");
        if keep {
            times.add.push(add);
            times.del.push(del);
        }
    }
}

fn main() {
    let program = build_ours();
    let memory =
        tempfile::Builder::new().prefix("dcenet-bench-").tempdir_in("/dev/shm").expect("a directory in memory");
    let mut summary = Summary::default();
    let ours = |name: &str, link: Value, nat: bool, dual: bool| {
        let config = our_config(&memory.path().join(name), link, nat, dual);
        By::Plugin(Plugin { program: program.clone(), config })
    };
    let bridge = || json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true });
    let theirs = |plugin: &str, keys: Value| {
        let config = their_config(&memory.path().join(plugin), plugin, keys);
        Plugin::debian(plugin, config).map(By::Plugin)
    };
    let pairs = [
        ("veth", 1.0 / 3.0, ours("veth", json!({ "kind": "veth" }), false, false), "ptp", theirs("ptp", json!({}))),
        (
            "macvlan",
            1.0 / 3.0,
            ours("macvlan", json!({ "kind": "macvlan", "parent": "up0", "underlay": { "probes": 0 } }), false, false),
            "macvlan",
            theirs("macvlan", json!({ "master": "up0", "mode": "bridge" })),
        ),
        (
            "bridge with masquerade",
            1.0 / 4.0,
            ours("masquerade", bridge(), true, false),
            "bridge with ipMasq",
            theirs("bridge", json!({ "bridge": "cni0", "isGateway": true, "ipMasq": true })),
        ),
    ];
    for (variant, goal, ours, peer, theirs) in pairs {
        match theirs {
            Some(theirs) => compare(variant, goal, ours, peer, theirs, &mut summary),
            None => say("add-kinds: Debian's containernetworking-plugins are not installed"),
        }
    }
    if Path::new(NETAVARK).exists() {
        let theirs = By::Netavark { directory: memory.path().join("netavark") };
        compare("bridge", 1.0, ours("bridge", bridge(), false, false), "netavark", theirs, &mut summary);
    } else {
        say("add-kinds: netavark is not installed");
    }
    let dual = ours("dual", bridge(), false, true);
    compare("both families", 1.2, dual, "IPv4 alone", ours("single", bridge(), false, false), &mut summary);
    summary.write();
}

fn compare(variant: &str, goal: f64, ours: By, peer: &str, theirs: By, summary: &mut Summary) {
    let [mut ours, mut theirs] = [ours, theirs].map(Side::new);
    for round in 0..WARM + rounds(60, 5) {
        let container = format!("bench{round}");
        ours.round(&container, round >= WARM, in_use);
        theirs.round(&container, round >= WARM, |_| ());
    }
    summary.add(Row::compare(ID, &format!("{variant}, add"), goal, &ours.times.add, (peer, &theirs.times.add)));
    // Most of it is the kernel's time for the end of a device.
    summary.add(Row::compare(ID, &format!("{variant}, del"), 1.2, &ours.times.del, (peer, &theirs.times.del)));
}

/// Each address of the pod can be bound: one that is tentative cannot (net/ipv6/af_inet6.c, `__inet6_bind`).
fn in_use(pod: &TestNetNs) {
    let text = pod.sh("ip -j addr show dev eth0");
    let links: Value = serde_json::from_str(&text).expect("what ip(8) prints is JSON");
    let addresses: Vec<IpAddr> = links[0]["addr_info"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|address| address["scope"] == "global")
        .map(|address| address["local"].as_str().and_then(|text| text.parse().ok()).expect("an address"))
        .collect();
    assert!(!addresses.is_empty(), "{text}");
    for address in addresses {
        pod.run(|| UdpSocket::bind((address, 0))).unwrap_or_else(|error| panic!("{address}: {error}"));
    }
}

fn our_config(directory: &Path, link: Value, masquerade: bool, dual: bool) -> Value {
    let gateway = link["kind"] == "bridge";
    let pool = |name: &str, subnet: &str, address: &str| {
        let mut pool = json!({ "name": name, "subnet": subnet });
        if gateway {
            pool["gateway"] = address.into();
        }
        pool
    };
    let (mut pools, mut routes) = (vec![pool("pods", "10.88.0.0/16", "10.88.0.1")], vec![]);
    if dual {
        pools.push(pool("pods6", "fd88::/64", "fd88::1"));
    }
    if gateway {
        routes.push(json!({ "dst": "0.0.0.0/0" }));
        routes.extend(dual.then(|| json!({ "dst": "::/0" })));
    }
    let mut config = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": "dcenet", "link": link,
        "ipam": { "type": "dcenet", "pools": pools, "routes": routes },
        "stateDir": directory.join("state"), "runDir": directory.join("run"),
    });
    if masquerade {
        config["nat"] = json!({ "masquerade": true });
    }
    config
}

fn their_config(directory: &Path, plugin: &str, keys: Value) -> Value {
    let mut config = json!({
        "cniVersion": "1.0.0", "name": "bench", "type": plugin,
        "ipam": {
            "type": "host-local", "dataDir": directory.join("host-local"),
            "ranges": [[{ "subnet": "10.89.0.0/16", "gateway": "10.89.0.1" }]],
        },
    });
    if let (Some(config), Value::Object(keys)) = (config.as_object_mut(), keys) {
        config.extend(keys);
    }
    config
}

/// Runs netavark's `setup` or `teardown` as podman does, and returns the milliseconds.
fn netavark(directory: &Path, verb: &str, container: &str, netns: &Path) -> f64 {
    std::fs::create_dir_all(directory).expect("a directory");
    let id = "0".repeat(64);
    let options = json!({
        "container_id": container, "container_name": container,
        "networks": { "bench": { "static_ips": ["10.90.0.2"], "interface_name": "eth0" } },
        "network_info": { "bench": {
            "name": "bench", "id": id, "driver": "bridge", "network_interface": "nv0", "created": "2020-01-01T00:00:00Z",
            "subnets": [{ "subnet": "10.90.0.0/16", "gateway": "10.90.0.1" }],
            "ipv6_enabled": false, "internal": true, "dns_enabled": false, "ipam_options": { "driver": "host-local" },
        } },
    });
    let file = directory.join("options");
    std::fs::write(&file, options.to_string()).expect("a file");
    let input = std::fs::File::open(&file).expect("the file");
    let command = if verb == "ADD" { "setup" } else { "teardown" };
    let begin = Instant::now();
    let output = Command::new(NETAVARK)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .arg("-c")
        .arg(directory)
        .arg(command)
        .arg(netns)
        .stdin(input)
        .stderr(Stdio::inherit())
        .output()
        .expect("netavark runs");
    let milliseconds = begin.elapsed().as_secs_f64() * 1e3;
    assert!(output.status.success(), "netavark {command}: {}", String::from_utf8_lossy(&output.stdout));
    milliseconds
}
