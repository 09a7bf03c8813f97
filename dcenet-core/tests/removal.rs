//! Links that several threads delete at a time.

mod common;

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use common::{key, lease, request, veth};
use dcenet_core::engine::Removals;
use dcenet_core::test_support::{Rung, TestHost, require};

const PODS: u16 = 32;

/// Attaches pods, has a thread for each detach them all at once, and returns how long that took.
fn detach_at_once(host: &TestHost, removals: Option<&Arc<Removals>>) -> Duration {
    let engine = || match removals {
        Some(removals) => host.engine(None).removing_with(Arc::clone(removals)),
        None => host.engine(None),
    };
    let before = host.state();
    let pods: Vec<_> = (0..PODS).map(|_| host.new_pod()).collect();
    let name = |n: u16| format!("c{n}");
    for (n, pod) in (0..).zip(&pods) {
        engine().attach(&request(&name(n), pod, &veth(), lease(n + 2))).unwrap();
    }
    // Some links go with their pods, before the kernel gets to them or meanwhile.
    let pods: Vec<_> = pods.into_iter().skip(3).collect();
    let start = Barrier::new(usize::from(PODS) + 1);
    let took = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..PODS)
            .map(|n| {
                let (engine, start, key) = (engine(), &start, key(&name(n)));
                scope.spawn(move || {
                    start.wait();
                    engine.detach(&key, None).unwrap();
                    // Its own is gone when it returns.
                    let end = key.id().host_ifname();
                    assert!(host.root().link(end.as_str()).is_none(), "{end} is there");
                })
            })
            .collect();
        start.wait();
        let begun = Instant::now();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        begun.elapsed()
    });
    assert_eq!(before.diff(&host.state()), "");
    assert!(host.records().is_empty());
    drop(pods);
    took
}

#[test]
fn links_deleted_together_are_all_gone_and_no_others() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    // Of a group of its own, as somebody else's may be.
    host.root().sh("ip link add theirs type veth peer name other; ip link set theirs group 77");
    let alone = detach_at_once(&host, None);
    let removals = Arc::new(Removals::default());
    for _ in 0..2 {
        let together = detach_at_once(&host, Some(&removals));
        println!("{PODS} pods: one by one {alone:?}, together {together:?}");
    }
    assert!(removals.together() > 1, "none went with another");
    assert!(host.root().link("theirs").is_some());
}
