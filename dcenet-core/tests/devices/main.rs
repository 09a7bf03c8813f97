//! Devices that the kernel makes for us, and real ones that it hands over: created, moved and deleted by our netlink,
//! and looked at with iproute2.

mod bridge_vlan;
mod chained;
mod drivers;
mod functions;
mod igb;
mod kinds;
mod lent;
mod netdevsim;
mod settings;
mod underlay;
mod vfio;

use dcenet_core::netlink::{Family, Socket};
use dcenet_core::netns::NetNs;
use dcenet_core::test_support::{TestHost, TestNetNs};

/// A socket of the namespace.
fn socket(netns: &NetNs) -> Socket {
    netns.socket(Family::Route).unwrap()
}

/// What `ip -j -d link` says of a device in a namespace; nothing where there is none of the name.
fn seen(netns: &TestNetNs, name: &str) -> Option<serde_json::Value> {
    let all: Vec<serde_json::Value> = serde_json::from_str(&netns.sh("ip -j -d link show")).unwrap();
    all.into_iter().find(|link| link["ifname"] == name)
}

/// A host with a device `up0`, whose other end swallows what comes, to be a parent. It is a veth: dummies are missing
/// on some kernels.
fn host_with_parent() -> TestHost {
    let host = TestHost::new();
    // Without addresses of their own, whose duplicate detection would go on meanwhile.
    host.root().sh("ip link add up0 type veth peer name far0; for end in far0 up0; do \
        ip link set $end addrgenmode none; ip link set $end up; done");
    host
}

/// In every guest of `make vm-test` this is run first, and must be seen to fail.
#[test]
#[ignore = "fails on purpose"]
fn fails_on_purpose() {
    panic!("as it shall");
}
