//! Leases of pods that are gone.

use dcenet_core::test_support::{Rung, require};

use crate::common::*;

#[test]
fn what_gone_pods_held_is_taken_back_and_nothing_else() {
    if !require(Rung::Netns) {
        return;
    }
    let node = Node::new();
    let [alive, gone, hidden] = ["alive", "gone", "hidden"].map(|name| node.add("shop", name));
    assert_eq!(node.leased(), ["alive", "gone", "hidden"]);
    let records = node.host.records().len();
    let _daemon = node.start();

    // Its path is gone, and its namespace is not: somebody else still uses it.
    let path = hidden.netns.path();
    assert!(std::process::Command::new("umount").arg("-l").arg(path).status().unwrap().success());
    std::fs::remove_file(path).unwrap();
    drop(gone);
    eventually("the lease of the pod that is gone is taken back", || node.leased() == ["alive", "hidden"]);
    assert_eq!(node.host.records().len(), records - 1);
    // A look that ended by now began after the path was gone.
    assert_eq!(node.leased(), ["alive", "hidden"]);

    // With the namespace the proof is there.
    drop(hidden);
    eventually("the lease of the hidden pod is taken back", || node.leased() == ["alive"]);
    eventually("it is counted", || {
        node.samples().get("dcenet_ipam_reclaimed_attachments_total{cause=\"absence\"}") == Some(&2.0)
    });
    let other = node.add("shop", "other");
    assert!(talks(&alive, &other, true));
}
