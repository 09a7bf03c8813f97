//! A DEL that stands still while the same container is added again, as after a runtime's time limit.

use dcenet_core::provider::AddressSource;
use dcenet_core::test_support::{Rung, require};
use serde_json::json;

use super::addresses;
use super::common::{Node, Pod};

/// A node whose one address is had again at once.
fn node() -> Node {
    let mut node = Node::new();
    node.config["ipam"] = json!({
        "type": "dcenet", "cooldown": "0s",
        "pools": [{ "name": "v4", "subnet": "10.20.0.0/30", "gateway": "10.20.0.1" }],
    });
    node.warm();
    node
}

fn key(pod: &Pod) -> dcenet_core::model::AttachmentKey {
    serde_json::from_value(json!({ "network": "shop", "container": pod.container, "ifname": "eth0" })).unwrap()
}

/// Fails where a device bears an address that the store would give to another, or an address is leased to no device.
fn assert_whole_or_gone(node: &Node, pod: &Pod, what: &str) {
    let device = pod.netns.link("eth0").is_some();
    assert_eq!(
        (node.store().len(), node.host.records().len()),
        (device.into(), device.into()),
        "{what}, device: {device}"
    );
}

#[test]
fn a_del_that_stands_still_anywhere_frees_no_address_of_a_later_add() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    let pod = node.pod("web");
    let (mut busy, mut stops) = (0, 0);
    for call in 1.. {
        node.add(&pod).unwrap();
        let mut del = node.start_to_stop("DEL", &pod, call);
        let stopped = del.is_stopped();
        let again = stopped.then(|| node.add(&pod));
        if stopped {
            del.resume();
        }
        let ended = del.wait().expect("nobody kills it");
        ended.unwrap_or_else(|error| panic!("DEL that stood before call {call}: {error}"));
        assert_whole_or_gone(&node, &pod, &format!("DEL stood before call {call}, ADD: {again:?}"));
        if let Some(Err(error)) = &again {
            assert_eq!(error["code"], 11, "{error}");
            busy += 1;
        }
        node.del(&pod).unwrap();
        if !stopped {
            break;
        }
        stops += 1;
    }
    println!("DEL stood before each of {stops} calls; ADD was told to try again {busy} times");
    // Look-up and deletion of the device, the writes of the store, the removal of the record.
    assert!(stops >= 4 && busy >= stops - 1, "{stops} {busy}");
}

#[test]
fn an_add_that_stands_still_anywhere_keeps_the_address_that_it_reports() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    let pod = node.pod("web");
    for call in 1.. {
        let mut add = node.start_to_stop("ADD", &pod, call);
        let stopped = add.is_stopped();
        let del = stopped.then(|| node.del(&pod));
        if stopped {
            add.resume();
        }
        let added = add.wait().expect("nobody kills it");
        let what = format!("ADD stood before call {call}: {added:?}, DEL: {del:?}");
        assert_whole_or_gone(&node, &pod, &what);
        if let Some(Err(error)) = &del {
            assert_eq!(error["code"], 11, "{error}");
        }
        node.del(&pod).unwrap();
        if !stopped {
            assert!(call > 10, "{call} calls");
            break;
        }
    }
}

/// The two halves of a DEL with an ADD in between: without the hold, the address of a pod that stands is given away.
#[test]
fn without_the_hold_a_slow_del_gives_the_address_of_the_next_attachment_away() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    let (pod, rival) = (node.pod("web"), node.pod("cache"));
    let engine = node.host.engine(None);
    let key = key(&pod);
    let ipam = node.ipam();
    let sequence = || pollster::block_on(ipam.held(&key)).unwrap().map_or(0, |lease| lease.sequence());

    let first = node.add(&pod).unwrap();
    let lease = sequence();
    engine.detach(&key, None).unwrap();
    assert_eq!(node.add(&pod).unwrap()["ips"], first["ips"]);
    pollster::block_on(ipam.release(&key, lease)).unwrap();
    assert_eq!(addresses(&node.add(&rival).unwrap()), addresses(&first), "two pods have it");
    node.del(&rival).unwrap();
    node.del(&pod).unwrap();

    let first = node.add(&pod).unwrap();
    let mut hold = engine.hold_remains(&key, None).unwrap().expect("it is recorded");
    let lease = sequence();
    hold.detach(None).unwrap();
    assert_eq!(node.add(&pod).unwrap_err()["code"], 11);
    pollster::block_on(ipam.release(&key, lease)).unwrap();
    assert_eq!(node.add(&pod).unwrap_err()["code"], 11);
    hold.close().unwrap();
    assert_eq!(node.add(&pod).unwrap()["ips"], first["ips"]);
    assert_eq!(node.add(&rival).unwrap_err()["code"], 11, "there is one address");
}
