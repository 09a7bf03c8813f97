//! What an attach costs: exact counts, which no noise moves, and times for people.

mod common;

use std::time::{Duration, Instant};

use common::{bridge, key, lease, request, veth};
use dcenet_core::engine::NamespaceEntry;
use dcenet_core::test_support::{Fault, Injection, Rung, TestHost, effort, kernel_is_before, require, with_fault};

const COUNT_ONLY: Injection = Injection { call: 0, fault: Fault::Fail };

fn quantiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |q: usize| times[times.len() * q / 100].as_micros();
    format!("min {} p50 {} p90 {} us", at(0), at(50), at(90))
}

#[test]
fn an_attach_makes_few_calls() {
    if !require(Rung::Netns) {
        return;
    }
    // Before 6.2 creations have no echo and two indices are asked for; before 6.8 the carriers of two ends are waited for.
    let spare = if kernel_is_before(6, 2) {
        4
    } else if kernel_is_before(6, 8) {
        2
    } else {
        0
    };
    // One of them is made only where the kernel has not entered the IPv6 address's local route yet.
    for (config, most_attach, most_detach) in [(bridge(), 23 + spare, 3), (veth(), 28 + spare, 3)] {
        let kind = config.driver().kind();
        let host = TestHost::new();
        host.root().run(|| {
            let engine = host.engine(None).entering(NamespaceEntry::InPlace);
            // The first one makes the bridge.
            let keeper = host.new_pod();
            engine.attach(&request("keeper", &keeper, &config, lease(200))).unwrap();
            let (mut attach, mut detach) = (Vec::new(), Vec::new());
            for _ in 0..effort(3, 20, 20) {
                let pod = host.new_pod();
                let request = request("c1", &pod, &config, lease(2));
                let (_, calls) = with_fault(COUNT_ONLY, || {
                    let start = Instant::now();
                    engine.attach(&request).unwrap();
                    attach.push(start.elapsed());
                });
                assert!(calls <= most_attach, "{calls}");
                let (_, calls) = with_fault(COUNT_ONLY, || {
                    let start = Instant::now();
                    engine.detach(&key("c1"), None).unwrap();
                    detach.push(start.elapsed());
                });
                assert!(calls <= most_detach, "{calls}");
            }
            println!("{kind}, dual stack: attach {}; detach {}", quantiles(attach), quantiles(detach));
        });
    }
}
