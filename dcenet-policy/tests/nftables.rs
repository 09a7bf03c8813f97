//! The tables of `tests/tables/`, rendered for nftables, on real traffic between pods of a router.

#![cfg(feature = "yaml")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestHost, TestNetNs, ping, require_with};
use dcenet_policy::compiler::Scope;
use dcenet_policy::eval;
use dcenet_policy::model::{Protocol, Verdict};
use dcenet_policy::render::nftables::{TABLE, render, undo};
use dcenet_policy::test_support::table::{Case, Probe, Table};

/// Long enough for anything that is allowed.
const ALLOWED: Duration = Duration::from_secs(20);
/// How long what must not come is waited for. What proves it is the same attempt without the table, which must succeed.
const DENIED: Duration = Duration::from_millis(150);

fn ready() -> bool {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    require_with(Rung::Services, || (!has("nft")).then(|| "nft is not installed".to_owned()))
}

/// A router, and a namespace for each holder of addresses.
struct World {
    ends: Vec<TestNetNs>,
    by_address: BTreeMap<IpAddr, usize>,
    host: TestHost,
}

impl World {
    fn new(holders: &[BTreeSet<IpAddr>]) -> Self {
        let host = TestHost::new();
        for (name, value) in
            [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1"), ("ipv6/conf/default/accept_dad", "0")]
        {
            host.root().sysctl(name, value);
        }
        let (mut ends, mut by_address) = (Vec::new(), BTreeMap::new());
        for (index, addresses) in holders.iter().enumerate() {
            let end = host.new_pod();
            end.sysctl("ipv6/conf/default/accept_dad", "0");
            host.root().sh(&format!(
                "ip link add v{index} type veth peer name eth0 netns {}
                 ip link set v{index} up
                 ip addr add 169.254.1.1/32 dev v{index}
                 ip addr add fe80::1/64 dev v{index} nodad",
                end.path().display()
            ));
            end.sh("ip link set eth0 up
                    ip route add 169.254.1.1 dev eth0
                    ip route add default via 169.254.1.1
                    ip -6 route add default via fe80::1 dev eth0");
            for address in addresses {
                let length = if address.is_ipv4() { 32 } else { 128 };
                let nodad = if address.is_ipv4() { "" } else { "nodad" };
                end.sh(&format!("ip addr add {address}/{length} dev eth0 {nodad}"));
                host.root().sh(&format!("ip route add {address}/{length} dev v{index}"));
                by_address.insert(*address, index);
            }
            ends.push(end);
        }
        Self { ends, by_address, host }
    }

    fn load(&self, script: &str) {
        let file = self.host.directory().join("policy.nft");
        std::fs::write(&file, script).unwrap();
        self.host.root().sh(&format!("nft -f {}", file.display()));
    }

    fn ruleset(&self) -> String {
        self.host.root().sh("nft -s list ruleset")
    }

    fn end(&self, address: IpAddr) -> &TestNetNs {
        &self.ends[self.by_address[&address]]
    }

    /// Whether a connection succeeds within a time.
    fn connects(&self, probe: &Probe, protocol: Protocol, port: u16, limit: Duration) -> bool {
        let (from, to) = (probe.source.address, probe.destination.address);
        let client = self.end(from);
        match protocol {
            Protocol::TCP => client.run(|| TcpStream::connect_timeout(&SocketAddr::new(to, port), limit).is_ok()),
            Protocol::UDP => {
                let socket = client.run(|| UdpSocket::bind(SocketAddr::new(from, 0)).unwrap());
                socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                let begun = Instant::now();
                while begun.elapsed() < limit {
                    socket.send_to(b"ping", SocketAddr::new(to, port)).unwrap();
                    if socket.recv_from(&mut [0; 8]).is_ok() {
                        return true;
                    }
                }
                false
            }
            _ => ping(client, to, limit).is_ok(),
        }
    }
}

/// Answers on a port of every address.
struct Servers {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
    /// The kernel accepts for them.
    _listeners: Vec<TcpListener>,
}

impl Servers {
    fn new(world: &World, protocol: Protocol, port: u16) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (mut listeners, mut threads) = (Vec::new(), Vec::new());
        for address in world.by_address.keys() {
            let at = SocketAddr::new(*address, port);
            match protocol {
                Protocol::TCP => listeners.push(world.end(*address).run(|| TcpListener::bind(at).unwrap())),
                Protocol::UDP => {
                    let socket = world.end(*address).run(|| UdpSocket::bind(at).unwrap());
                    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
                    let stop = std::sync::Arc::clone(&stop);
                    threads.push(std::thread::spawn(move || {
                        let mut buffer = [0; 8];
                        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                                let _ = socket.send_to(&buffer[..length], from);
                            }
                        }
                    }));
                }
                _ => {}
            }
        }
        Self { stop, threads, _listeners: listeners }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

/// Addresses in groups that one namespace must hold.
fn holders(case: &Case) -> Vec<BTreeSet<IpAddr>> {
    let mut by_name: BTreeMap<&str, BTreeSet<IpAddr>> = BTreeMap::new();
    for end in case.probes.iter().flat_map(|probe| [&probe.source, &probe.destination]) {
        by_name.entry(&end.name).or_default().insert(end.address);
    }
    let mut groups: Vec<BTreeSet<IpAddr>> = Vec::new();
    for addresses in by_name.into_values() {
        let (mut joined, apart): (Vec<_>, Vec<_>) =
            groups.into_iter().partition(|group| !group.is_disjoint(&addresses));
        joined.push(addresses);
        groups = apart;
        groups.push(joined.into_iter().flatten().collect());
    }
    groups.sort();
    groups
}

fn attempt(world: &World, case: &Case, probes: &[&Probe], limit: impl Fn(&Probe) -> Duration + Sync) -> Vec<bool> {
    std::thread::scope(|scope| {
        let limit = &limit;
        let threads: Vec<_> = probes
            .iter()
            .map(|probe| scope.spawn(move || world.connects(probe, case.protocol, case.port, limit(probe))))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Carries out every `nth` matrix of a file, and returns how many connections were allowed and denied.
fn carry_out(file: &str, nth: usize) -> [usize; 2] {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tables").join(file);
    let table = Table::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
    let (mut world, mut of): (Option<World>, _) = (None, Vec::new());
    let mut seen = [0, 0];
    // Conntrack's view of bare SCTP headers and a port 0 are another matter; the rest of the stack has no such sockets.
    let carried = |case: &&Case| match case.protocol {
        Protocol::ICMP | Protocol::ICMPV6 => true,
        Protocol::TCP | Protocol::UDP => case.port > 0,
        _ => false,
    };
    for case in table.cases.iter().filter(carried).step_by(nth).filter(|case| case.refused.is_empty()) {
        let groups = holders(case);
        if world.is_none() || groups != of {
            world = Some(World::new(&groups));
            of = groups;
        }
        let Some(world) = &world else { continue };
        let rendered = render(&case.cluster, &Scope::Cluster).unwrap();
        world.load(&rendered.script);
        let servers = Servers::new(world, case.protocol, case.port);
        // What stays in one namespace does not meet the router.
        let meets =
            |probe: &&Probe| world.by_address[&probe.source.address] != world.by_address[&probe.destination.address];
        let probes: Vec<&Probe> = case.probes.iter().filter(meets).collect();
        let limit = |probe: &Probe| if probe.expected == Verdict::Allow { ALLOWED } else { DENIED };
        for (probe, connected) in probes.iter().zip(attempt(world, case, &probes, limit)) {
            let judged = probe.questions(case.protocol, case.port);
            let judged = judged.iter().map(|(pod, tuple)| eval::evaluate(&case.cluster, pod, tuple).unwrap().verdict);
            let judged = judged.max().unwrap_or(Verdict::Allow);
            let found = if connected { Verdict::Allow } else { Verdict::Deny };
            assert_eq!(
                [found, judged],
                [probe.expected; 2],
                "{file}:{}: {} ({}) to {} ({}): nftables and evaluator\n{}",
                case.line,
                probe.source.name,
                probe.source.address,
                probe.destination.name,
                probe.destination.address,
                rendered.script
            );
            seen[usize::from(found == Verdict::Deny)] += 1;
        }
        // What was denied was denied by the table.
        world.load(&undo());
        let denied: Vec<&Probe> = probes.into_iter().filter(|probe| probe.expected == Verdict::Deny).collect();
        let without = attempt(world, case, &denied, |_| ALLOWED);
        assert!(without.iter().all(|connected| *connected), "{file}:{}: denied without policy", case.line);
        drop(servers);
    }
    seen
}

#[test]
fn tables_hold_on_real_traffic() {
    if !ready() {
        return;
    }
    let mut seen = [0, 0];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tables");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    for file in files {
        // Those with limits of the compiler are about the limits.
        if file == "isolation.txt" {
            continue;
        }
        let nth = dcenet_core::test_support::effort(6, 2, 1);
        let [allowed, denied] = carry_out(file.to_str().unwrap(), nth);
        seen = [seen[0] + allowed, seen[1] + denied];
    }
    assert!(seen[0] > 100 && seen[1] > 100, "{seen:?} connections were allowed and denied");
    eprintln!("{} connections allowed, {} denied", seen[0], seen[1]);
}

#[test]
fn a_script_replaces_itself_and_is_undone() {
    if !ready() {
        return;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tables/native.txt");
    let table = Table::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
    let [first, last] = [&table.cases[0], table.cases.last().unwrap()]
        .map(|case| render(&case.cluster, &Scope::Cluster).unwrap().script);
    assert_ne!(first, last);
    let world = World::new(&[]);
    world.host.root().sh("nft add table inet other");
    let before = world.ruleset();
    world.load(&last);
    let once = world.ruleset();
    assert!(once.contains(TABLE) && once.contains("tcp dport"), "{once}");
    world.load(&first);
    assert_ne!(world.ruleset(), once);
    world.load(&last);
    world.load(&last);
    assert_eq!(world.ruleset(), once, "nothing of another set of policies is left");
    // A script that fails leaves what is there.
    let broken = first.replace("chain judge {", "chain judge {\n\t\tjump nowhere");
    let file = world.host.directory().join("broken.nft");
    std::fs::write(&file, broken).unwrap();
    world.host.root().sh(&format!("! nft -f {} 2>/dev/null", file.display()));
    assert_eq!(world.ruleset(), once);
    world.load(&undo());
    world.load(&undo());
    assert_eq!(world.ruleset(), before);
}

#[test]
fn what_nftables_cannot_do_is_listed() {
    let text = "== topology\nnamespace x\nnode n1 192.0.2.1\npod x/a ip=10.0.0.1\npod x/b ip=10.0.0.1\npod x/c ip=10.0.0.3\n\
                pod x/h host node=n1\noutside o 192.0.2.9\n== apply\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
                metadata: { name: p, namespace: x }\nspec: { podSelector: {} }\n== expect tcp/80\n  x/c\no X\n";
    let mut cluster = Table::parse(text).unwrap().cases.remove(0).cluster;
    cluster.pods.get_mut(&dcenet_policy::model::PodId::new("x", "c")).unwrap().on_segment = true;
    let rendered = render(&cluster, &Scope::Cluster).unwrap();
    let omitted: Vec<String> = rendered.omitted.iter().map(ToString::to_string).collect();
    assert_eq!(
        omitted,
        [
            "1 pods in their hosts' networks: policies do not apply to them, here or there",
            "address 10.0.0.1: several pods claim it, and which one sends is not known: closed both ways where policy governs one",
            "everything: a change does not reach established connections; end them by conntrack -D",
            "everything: a destination is judged after it is translated: prefixes that hold services' own addresses do not match what goes to a service",
            "everything: a pod is known by its address, not by its device: keep others from sending with it",
            "everything: frames between pods on one bridge are seen only with net.bridge.bridge-nf-call-iptables and -ip6tables",
            "pod x/c: its device is on a segment, past the host's stack: not enforced",
        ]
    );
    assert!(
        rendered.script.contains("10.0.0.1 : drop") && !rendered.script.contains("10.0.0.3"),
        "{}",
        rendered.script
    );
}
