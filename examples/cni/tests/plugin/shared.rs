//! Two nodes that share one store, on a real etcd.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, require, require_with};
use dcenet_ipam::Ipam;
use dcenet_ipam::store::etcd::EtcdStore;
use dcenet_ipam::store::etcd::cluster::Cluster;
use serde_json::json;

use super::addresses;
use super::common::{Node, Pod};

/// Leads from the loopback of a node, which is a network namespace, to that of this machine.
struct Bridge {
    here: SocketAddr,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bridge {
    fn new(node: &Node, there: SocketAddr) -> Self {
        // A socket stays in the namespace that it was made in, whoever uses it.
        let listener = node.host.root().run(|| TcpListener::bind(("127.0.0.1", 0)).unwrap());
        let here = listener.local_addr().unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let told = ends.clone();
        let thread = thread::spawn(move || {
            for caller in listener.incoming().map_while(Result::ok) {
                if told.load(Ordering::Relaxed) {
                    return;
                }
                // Nobody at home: the caller is hung up on.
                let Ok(called) = TcpStream::connect(there) else { continue };
                for (mut from, mut to) in [
                    (caller.try_clone().unwrap(), called.try_clone().unwrap()),
                    (called.try_clone().unwrap(), caller.try_clone().unwrap()),
                ] {
                    thread::spawn(move || {
                        let _ = io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        Self { here, ends, thread: Some(thread) }
    }

    fn end(mut self, node: &Node) {
        self.ends.store(true, Ordering::Relaxed);
        let here = self.here;
        node.host.root().run(|| TcpStream::connect(here)).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The error's code.
fn refused(node: &Node, pod: &Pod) -> (u64, String) {
    let error = node.add(pod).unwrap_err();
    (error["code"].as_u64().unwrap(), error["msg"].as_str().unwrap().to_owned())
}

#[test]
fn two_nodes_share_a_pool_and_a_claim_follows_its_pod() {
    if !require(Rung::Netns) || !require_with(Rung::Services, Cluster::missing) {
        return;
    }
    let dir = tempfile::Builder::new().prefix("dcenet-shared-").tempdir_in("/dev/shm").unwrap();
    let mut cluster = Cluster::start(1, dir.path());
    let there: SocketAddr = cluster.endpoint(0).strip_prefix("http://").unwrap().parse().unwrap();
    let mut nodes = [Node::new(), Node::new()];
    let bridges: Vec<Bridge> = nodes
        .iter_mut()
        .zip(["n1", "n2"])
        .map(|(node, name)| {
            let bridge = Bridge::new(node, there);
            node.config["ipam"] = json!({
                "type": "dcenet", "cooldown": "0s", "node": { "name": name },
                "store": { "kind": "etcd", "endpoints": [format!("http://{}", bridge.here)], "timeout": "4s" },
                "pools": [{ "name": "pods", "subnet": "10.20.0.0/29", "gateway": "10.20.0.1",
                            "claims": { "shop/db": { "address": "10.20.0.6", "keep": "forever" } } }],
            });
            bridge
        })
        .collect();
    let [one, two] = &nodes;

    // Of the six addresses of a /29 one is the gateway's, one the claim's.
    let mut pods = Vec::new();
    let mut given = Vec::new();
    for n in 0..4 {
        let node = [one, two][n % 2];
        let pod = node.pod(&format!("web-{n}"));
        given.extend(addresses(&node.add(&pod).unwrap()));
        pods.push(pod);
    }
    let freed = given[0].clone();
    // Allocators that share a store with other machines do not all begin at the first.
    given.sort();
    assert_eq!(given, ["10.20.0.2/29", "10.20.0.3/29", "10.20.0.4/29", "10.20.0.5/29"]);
    let late = two.pod("late");
    let (code, text) = refused(two, &late);
    assert!(code == 11 && text.contains("pods"), "{code}: {text}");
    // What one node frees the other gets.
    one.del(&pods[0]).unwrap();
    assert_eq!(addresses(&two.add(&late).unwrap()), [freed]);

    let before = one.pod("db");
    assert_eq!(addresses(&one.add(&before).unwrap()), ["10.20.0.6/29"]);
    let rival = two.pod("db");
    assert!(two.add(&rival).is_err(), "it is in use on the first node");
    one.del(&before).unwrap();
    let after = two.pod("db");
    let seated = two.add(&after).unwrap();
    assert_eq!(addresses(&seated), ["10.20.0.6/29"]);

    // A runtime lists what runs on its own node: the first node's GC frees what is stale there, and nothing of the second's.
    let store = Arc::new(EtcdStore::open(&cluster.config()).unwrap());
    let ipam = Ipam::without_pools(store).unwrap();
    let held = || {
        let bindings = pollster::block_on(ipam.bindings(None)).unwrap();
        let mut nodes: Vec<String> = bindings.into_iter().map(|b| b.node.unwrap().to_string()).collect();
        nodes.sort();
        nodes.join(" ")
    };
    assert_eq!(held(), "n1 n2 n2 n2 n2");
    one.gc(Some(&[])).unwrap();
    assert_eq!(held(), "n2 n2 n2 n2");
    two.check(&after, &seated).unwrap();

    // Nobody at home: an error that may be tried again, and nothing left behind.
    cluster.kill(0);
    let (host, lost) = (one.host.state(), one.pod("lost"));
    let (code, text) = refused(one, &lost);
    assert_eq!(code, 11, "{text}");
    assert_eq!(host.diff(&one.host.state()), "");
    cluster.restart(0);
    let begun = Instant::now();
    let given = loop {
        match one.add(&lost) {
            Ok(result) => break result,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(120), "{error}"),
        }
    };
    assert_eq!(addresses(&given).len(), 1);
    one.del(&lost).unwrap();
    two.del(&late).unwrap();
    for (bridge, node) in bridges.into_iter().zip(&nodes) {
        bridge.end(node);
    }
}
