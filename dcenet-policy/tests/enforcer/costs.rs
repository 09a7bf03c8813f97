//! What it costs. Figures are printed; the bounds are for a busy machine.

use std::fmt::Write;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dcenet_core::provider::PolicySink;
use dcenet_core::test_support::{Rung, require};
use dcenet_policy::model::{Pod, PodId};

use crate::world::*;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
fn a_client_attaches_in_much_less_than_a_millisecond_and_changes_are_in_force_at_once() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    world.add_enforced("web", 2, &[("app", "web")]);
    world.add_enforced("db", 3, &[("app", "db")]);
    world.udp("web", "db", 6000, true);

    // Attaching the default: on a veth of the test's own, taken off in between.
    world.host.root().sh("ip link add tst0 type veth peer name tst1");
    let mut endpoint = world.endpoint("web");
    endpoint.ifindex = world.host.root().link("tst0").unwrap().index;
    endpoint.ifname = "tst0".parse().unwrap();
    endpoint.attachment = key("measured");
    endpoint.workload = None;
    let times = |told: bool| {
        world.host.root().run(|| {
            let times = (0..30).map(|_| {
                let begun = Instant::now();
                world.sink.attach(&endpoint).unwrap();
                let time = begun.elapsed();
                for direction in [dcenet_ebpf::attach::Direction::Ingress, dcenet_ebpf::attach::Direction::Egress] {
                    let hook = dcenet_ebpf::attach::Hook { device: endpoint.ifindex, direction };
                    dcenet_ebpf::attach::Attacher::detach(&dcenet_ebpf::attach::ClsactAttacher, hook).unwrap();
                }
                time
            });
            let time = median(times.collect());
            println!("attach of the default, owner {}: {time:?}", if told { "told" } else { "absent" });
            time
        })
    };
    times(true);
    world.sink.detach(&key("measured")).unwrap();

    let mut rules = DB[..DB.find("  ingress:").unwrap()].to_owned() + "  ingress:\n";
    for n in 0..100 {
        writeln!(
            rules,
            "  - {{from: [{{podSelector: {{matchLabels: {{app: web}}}}}}], ports: [{{port: {}, protocol: UDP}}]}}",
            7000 + 2 * n
        )
        .unwrap();
    }
    let shut = rules.replace("app: web", "app: nobody");
    let to = SocketAddr::new(world.address("db", false), 7000);
    let server = world.pod("db").run(|| UdpSocket::bind(to)).unwrap();
    server.set_read_timeout(Some(ALLOWED)).unwrap();
    let client = world.pod("web").run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    let first_packet = |change: &dyn Fn()| {
        server.set_nonblocking(true).unwrap();
        while server.recv(&mut [0; 8]).is_ok() {}
        server.set_nonblocking(false).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    client.send_to(b"x", to).unwrap();
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            let begun = Instant::now();
            change();
            let applied = begun.elapsed();
            server.recv(&mut [0; 8]).unwrap();
            let after = begun.elapsed().saturating_sub(applied);
            stop.store(true, Ordering::Relaxed);
            (applied, after)
        })
    };
    let mut changes = Vec::new();
    let mut members = Vec::new();
    for _ in 0..7 {
        owner.set_policies(policies(&shut)).unwrap();
        let parsed = policies(&rules);
        changes.push(first_packet(&|| drop(owner.set_policies(parsed.clone()).unwrap())));
        // Only the labels of a peer change: tables and generations, no program.
        let web = |app: &str| Pod::new([("app", app)], []);
        owner.upsert_pod(PodId::new("shop", "web"), web("other")).unwrap();
        let before = world.attached("db").map(|a| a.unwrap().program);
        members.push(first_packet(&|| drop(owner.upsert_pod(PodId::new("shop", "web"), web("web")).unwrap())));
        assert_eq!(world.attached("db").map(|a| a.unwrap().program), before);
        owner.remove_pod(&PodId::new("shop", "web")).unwrap();
    }
    for (what, times) in [("100 rules", changes), ("members only", members)] {
        let applied = median(times.iter().map(|t| t.0).collect());
        let after = median(times.iter().map(|t| t.1).collect());
        println!("{what}: the call takes {applied:?}; first packet {after:?} after its return");
        assert!(applied < Duration::from_secs(2) && after < Duration::from_millis(500));
    }
    drop(owner);
    let time = times(false);
    assert!(time < Duration::from_millis(20), "{time:?}");
}
