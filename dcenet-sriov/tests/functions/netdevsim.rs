//! The kernel's simulated device: every setting that there is, and more functions than adapters have.

use std::collections::BTreeSet;

use dcenet_core::model::MacAddr;
use dcenet_core::test_support::{Rung, require};
use dcenet_sriov::VfIndex;
use dcenet_sriov::kernel::{Kernel, VfChange, VfLinkState, VfRate, VfVlan, VlanProtocol};
use dcenet_sriov::test_support::conformance::{Bed, conforms};
use dcenet_sriov::test_support::guest::{SimulatedPort, sh};

#[test]
fn netdevsim_conforms() {
    if !require(Rung::Vm) {
        return;
    }
    let port = SimulatedPort::new(8, 4);
    port.set_count(2);
    for vf in [VfIndex(0), VfIndex(1)] {
        conforms(&Bed { kernel: &port.kernel, port: port.index, driver: "netdevsim", vf, function: None, pod: None });
    }
}

/// What is written is read back, and iproute2 says the same.
#[test]
fn every_setting_arrives() {
    if !require(Rung::Vm) {
        return;
    }
    let port = SimulatedPort::new(9, 4);
    port.set_count(3);
    let change = VfChange {
        mac: Some(MacAddr::new([2, 0, 0, 0, 0, 7])),
        vlan: Some(VfVlan { id: 100.try_into().ok(), qos: 5, protocol: VlanProtocol::Dot1Ad }),
        rate: Some(VfRate { min: 100, max: 900 }),
        spoofchk: Some(false),
        link_state: Some(VfLinkState::Disable),
        rss_query: Some(true),
        trust: Some(true),
        ..VfChange::default()
    };
    port.kernel.configure_vf(port.index, VfIndex(1), &change).unwrap();
    let now = port.kernel.vf(port.index, VfIndex(1)).unwrap();
    assert_eq!((Some(now.mac), Some(now.vlan), Some(now.rate)), (change.mac, change.vlan, change.rate));
    assert_eq!((now.spoofchk, now.trust, now.rss_query), (Some(false), Some(true), Some(true)));
    assert_eq!((now.link_state, now.guids), (VfLinkState::Disable, None));
    let all: serde_json::Value = serde_json::from_str(&sh(&format!("ip -j -d link show {}", port.name))).unwrap();
    let said = &all[0]["vfinfo_list"][1];
    assert_eq!(said["address"], "02:00:00:00:00:07", "{said}");
    let tag = &said["vlan_list"][0];
    assert_eq!((&tag["vlan"], &tag["qos"], &tag["protocol"]), (&100.into(), &5.into(), &"802.1ad".into()));
    assert_eq!((&said["spoofchk"], &said["trust"]), (&false.into(), &true.into()), "{said}");
    assert_eq!((&said["query_rss_en"], &said["link_state"]), (&true.into(), &"disable".into()), "{said}");
    let rate = &said["rate"];
    assert_eq!((&rate["max_tx"], &rate["min_tx"]), (&900.into(), &100.into()), "{said}");
    for other in [VfIndex(0), VfIndex(2)] {
        assert_eq!(port.kernel.vf(port.index, other).unwrap().mac, MacAddr::new([0; 6]));
    }
}

/// The length of the list has 16 bits, and is exceeded by 222 functions with their counters, or 335 without. The twin is
/// iproute2, which takes the length for what it says.
#[test]
fn bug_21_lists_of_any_length_are_read_whole_or_not_at_all() {
    if !require(Rung::Vm) {
        return;
    }
    let port = SimulatedPort::new(10, 1_000);
    // Functions keep their addresses while there are fewer of them.
    let mut named = BTreeSet::new();
    for count in [1_u16, 127, 221, 222, 254, 334, 335, 1_000] {
        port.set_count(count);
        // Each tenth, and the last, has an address of its own.
        let mac = |n: u16| MacAddr::new([2, 0, 0, 1, (n >> 8) as u8, n as u8]);
        for n in (0..count).filter(|n| n.is_multiple_of(10) || n + 1 == count) {
            named.insert(n);
            let change = VfChange { mac: Some(mac(n)), ..VfChange::default() };
            port.kernel.configure_vf(port.index, VfIndex(n), &change).unwrap();
        }
        let all = port.kernel.vfs(port.index).unwrap();
        assert_eq!(all.len(), usize::from(count));
        for (n, (index, state)) in (0..).zip(&all) {
            assert_eq!(*index, VfIndex(n), "of {count}");
            assert_eq!(state.mac, if named.contains(&n) { mac(n) } else { MacAddr::new([0; 6]) }, "VF {n} of {count}");
        }
        if count == 1_000 {
            let twin = std::process::Command::new("ip").args(["-j", "link", "show", port.name.as_str()]).output();
            let twin = twin.unwrap();
            // It may print a list cut short, or say that the answer is too long; it must have looked.
            assert!(!twin.stdout.is_empty() || !twin.stderr.is_empty(), "{twin:?}");
            let said: Option<serde_json::Value> = serde_json::from_slice(&twin.stdout).ok();
            let seen = said.and_then(|said| said[0]["vfinfo_list"].as_array().map(Vec::len));
            assert!(seen != Some(1_000), "iproute2 has learnt it: find another twin");
        }
    }
    port.set_count(0);
    assert_eq!(port.kernel.vfs(port.index).unwrap(), []);
}
