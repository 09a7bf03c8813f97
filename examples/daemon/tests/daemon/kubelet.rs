//! Pools of virtual functions, told to a kubelet that the test plays. The functions are a fixture's, which the daemon sees at
//! `/sys` in a mount namespace of its own.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::process::Command;

use dcenet_core::test_support::{Rung, require};
use dcenet_sriov::test_support::kubelet::{Client, Kubelet, next};
use dcenet_sriov::test_support::{Port, Tree, VfOf};
use serde_json::json;

use crate::common::*;

/// The daemon, with another `/sys`.
fn with_sysfs(tree: &Path) -> Command {
    let script = "mount --bind \"$0\" /sys && exec \"$@\"";
    dcenetd_by(&["/usr/bin/unshare", "--mount", "/bin/sh", "-c", script, tree.to_str().unwrap()])
}

#[test]
fn a_kubelet_hears_of_pools_also_from_a_daemon_that_follows_a_killed_one() {
    if !require(Rung::Netns) {
        return;
    }
    let mut node = Node::new();
    let (sys, plugins) = (node.host.directory().join("sys"), node.host.directory().join("plugins"));
    fs::create_dir(&plugins).unwrap();
    let mut tree = Tree::new(&sys);
    tree.port(&Port { vfs: 3, numa: 1, ..Port::igb("0000:01:00.0", "ens1") });
    tree.port(&Port { vfs: 1, vf: VfOf::UserSpace("vfio-pci"), ..Port::igb("0000:02:00.0", "ens2") });
    node.config["sriov"] = json!({ "pools": [
        { "name": "fast", "select": [{ "pfs": ["ens1#0-1"] }] },
        { "name": "dpdk", "select": [{ "pfs": ["ens2"] }] },
    ] });
    node.config["kubelet"] = json!({ "directory": plugins, "resources": [
        { "name": "example.com/fast", "pool": "fast", "shape": "spread" },
        { "name": "example.com/dpdk", "pool": "dpdk" },
    ] });
    assert!(node.run("--check").status.success());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut kubelet = Kubelet::start(&plugins, Ok(()));
        for is_last in [false, true] {
            let daemon = node.start_by(with_sysfs(&sys));
            let mut clients = BTreeMap::new();
            // Whom nobody follows yet may register again.
            while clients.len() < 2 {
                let register = kubelet.next().await;
                clients.insert(register.resource_name, Client::of(&plugins.join(register.endpoint)).await);
            }
            let names: Vec<&str> = clients.keys().map(String::as_str).collect();
            assert_eq!(names, ["example.com/dpdk", "example.com/fast"]);

            let (mut told, mut followed) = (Vec::new(), Vec::new());
            for client in clients.values_mut() {
                let mut list = client.watch().await;
                let devices = next(&mut list).await;
                followed.push(list);
                for device in devices {
                    let nodes = device.topology.into_iter().flat_map(|at| at.nodes).map(|node| node.id);
                    told.push((device.id, device.health, nodes.collect::<Vec<i64>>()));
                }
            }
            let device = |id: &str, nodes: &[i64]| (id.to_owned(), "Healthy".to_owned(), nodes.to_vec());
            let expected = [("0000:02:10.0", &[][..]), ("0000:01:10.0", &[1]), ("0000:01:10.2", &[1])];
            assert_eq!(told, expected.map(|(id, nodes)| device(id, nodes)));

            let fast = clients.get_mut("example.com/fast").unwrap();
            let given = fast.allocate(&[&["0000:01:10.2"]]).await.unwrap();
            let variable = ("PCIDEVICE_EXAMPLE_COM_FAST".to_owned(), "0000:01:10.2".to_owned());
            assert_eq!((&given[0].envs, given[0].devices.len()), (&HashMap::from([variable]), 0));
            assert!(fast.allocate(&[&["0000:02:10.0"]]).await.is_err(), "of another pool");
            let dpdk = clients.get_mut("example.com/dpdk").unwrap();
            let given = dpdk.allocate(&[&["0000:02:10.0"]]).await.unwrap();
            assert!(given[0].devices.iter().any(|file| file.inside == "/dev/vfio/vfio"), "{given:?}");
            if is_last {
                // The log's last lines come from the thread that ended.
                assert_eq!(daemon.stop().code(), Some(0));
                let left: Vec<_> = fs::read_dir(&plugins).unwrap().map(|e| e.unwrap().file_name()).collect();
                assert_eq!(left, ["kubelet.sock"]);
            } else {
                daemon.kill();
                while !kubelet.hears_nobody() {}
            }
        }
    });
}
