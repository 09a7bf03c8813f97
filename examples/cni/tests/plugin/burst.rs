//! Many pods at the same time, each by a process of its own: 32, or 512 with `DCENET_SOAK=1`.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use dcenet_core::test_support::{Rung, effort, require};
use serde_json::json;

use super::addresses;
use super::common::{Node, Pod};

/// How many calls a runtime has under way.
const CALLERS: usize = 16;

#[test]
fn a_burst_of_pods_gets_an_address_each_and_leaves_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    node.config["ipam"]["pools"][0]["subnet"] = json!("10.20.0.0/22");
    node.warm();
    let (before, store) = (node.host.state(), node.store());
    let pods: Vec<Pod> = (0..effort(8, 32, 512)).map(|n| node.pod(&format!("burst{n}"))).collect();
    let results = all(&pods, |pod| node.add(pod).unwrap_or_else(|error| panic!("ADD of {}: {error}", pod.container)));
    let given: BTreeSet<String> = results.iter().flat_map(addresses).collect();
    assert_eq!((given.len(), node.host.records().len()), (2 * pods.len(), pods.len()));
    let (first, last) = (&pods[0], addresses(&results[pods.len() - 1]));
    first.ping(last[0].split('/').next().unwrap());
    node.check(first, &results[0]).unwrap();

    // Runtimes call DEL twice.
    for _ in 0..2 {
        all(&pods, |pod| node.del(pod).unwrap_or_else(|error| panic!("DEL of {}: {error}", pod.container)));
        assert_eq!((node.host.records(), node.store()), (Vec::new(), store.clone()));
        assert_eq!(before.diff(&node.host.state()), "");
    }
}

/// What it gives for each pod, a few at a time.
fn all<T: Send>(pods: &[Pod], call: impl Fn(&Pod) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some(pod) = pods.get(n) else { return done };
            done.push((n, call(pod)));
        }
    };
    let mut done: Vec<(usize, T)> = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(work)).collect();
        callers.into_iter().flat_map(|caller| caller.join().expect("the calls succeed")).collect()
    });
    done.sort_by_key(|(n, _)| *n);
    done.into_iter().map(|(_, value)| value).collect()
}
