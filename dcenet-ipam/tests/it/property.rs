//! Random commands against a model that is a map, and searches at the edges of the number line.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::store::Store;
use dcenet_ipam::store::memory::MemoryStore;
use pollster::block_on;
use proptest::prelude::*;

use crate::{attachment, ipam, lease, request};

thread_local! {
    static NOW: Cell<u64> = const { Cell::new(10_000_000) };
}

const JSON: &str = r#"{ "cooldown": "5s", "pools": [
    { "name": "a", "subnet": "10.0.0.0/29", "exclude": ["10.0.0.6"],
      "claims": { "w/fixed": { "address": "10.0.0.3" }, "w/sticky": {}, "w/brief": { "address": "10.0.0.4", "keep": "ephemeral" } } },
    { "name": "b", "subnet": "10.0.1.0/31" },
    { "name": "six", "subnet": "fd00::/124" } ] }"#;

const WORKLOADS: [Option<&str>; 5] = [None, None, Some("w/fixed"), Some("w/sticky"), Some("w/brief")];

#[derive(Debug, Clone)]
enum Action {
    Lease { container: u8, workload: usize },
    Release { container: u8 },
    Retain { alive: Vec<u8> },
    Wait { ms: u64 },
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => (0..12_u8, 0..WORKLOADS.len()).prop_map(|(container, workload)| Action::Lease { container, workload }),
        4 => (0..12_u8).prop_map(|container| Action::Release { container }),
        1 => prop::collection::vec(0..12_u8, 0..12).prop_map(|alive| Action::Retain { alive }),
        2 => prop_oneof![Just(1), Just(2500), Just(5000), Just(4_000_000)].prop_map(|ms| Action::Wait { ms }),
    ]
}

#[derive(Debug, Default)]
struct Model {
    /// Container to addresses and workload.
    leases: BTreeMap<u8, (Vec<IpAddr>, Option<&'static str>)>,
    freed: BTreeMap<IpAddr, u64>,
    sticky: Option<IpAddr>,
}

impl Model {
    fn in_use(&self) -> BTreeSet<IpAddr> {
        self.leases.values().flat_map(|(addresses, _)| addresses.iter().copied()).collect()
    }

    /// The addresses that anybody may get now, of IPv4 or of IPv6.
    fn open(&self, four: bool, now: u64) -> Vec<IpAddr> {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let all: Vec<IpAddr> = if four {
            ["10.0.0.1", "10.0.0.2", "10.0.0.5", "10.0.1.0", "10.0.1.1"].map(ip).to_vec()
        } else {
            (1..16).map(|n| ip(&format!("fd00::{n:x}"))).collect()
        };
        let used = self.in_use();
        all.into_iter()
            .filter(|a| !used.contains(a) && self.sticky != Some(*a))
            .filter(|a| self.freed.get(a).is_none_or(|at| now - at >= 5000))
            .collect()
    }

    fn release(&mut self, container: u8, now: u64) -> bool {
        let Some((addresses, _)) = self.leases.remove(&container) else { return false };
        for address in addresses {
            self.freed.insert(address, now);
        }
        true
    }

    fn check_lease(&mut self, container: u8, workload: usize, got: Result<Vec<IpAddr>, LeaseError>, now: u64) {
        let workload = WORKLOADS[workload];
        if let Some((addresses, _)) = self.leases.get(&container) {
            assert_eq!(got.unwrap(), *addresses, "a repeated lease is the same");
            return;
        }
        let rival = workload.is_some() && self.leases.values().any(|(_, other)| *other == workload);
        let fixed: Option<IpAddr> = match workload {
            Some("w/fixed") => Some("10.0.0.3".parse().unwrap()),
            Some("w/brief") => Some("10.0.0.4".parse().unwrap()),
            Some("w/sticky") => self.sticky,
            _ => None,
        };
        let open = (self.open(true, now), self.open(false, now));
        match got {
            Ok(addresses) => {
                assert!(!rival, "two attachments of one claim");
                assert_eq!(addresses.len(), 2);
                match fixed {
                    Some(fixed) => assert_eq!(addresses[0], fixed),
                    None => assert!(open.0.contains(&addresses[0]), "{addresses:?} not among {open:?}"),
                }
                if workload == Some("w/sticky") {
                    // A claim without address is one of the first pool's.
                    assert!(addresses[0].to_string().starts_with("10.0.0."));
                    self.sticky = Some(addresses[0]);
                }
                assert!(open.1.contains(&addresses[1]), "{addresses:?} not among {open:?}");
                for (address, open) in addresses.iter().zip([&open.0, &open.1]) {
                    let oldest = |a: &IpAddr| self.freed.get(a).copied().filter(|at| now - at <= 3_600_000);
                    let first_pool = |a: &IpAddr| !a.to_string().starts_with("10.0.1.");
                    if Some(*address) != fixed {
                        let rivals = open.iter().filter(|o| first_pool(o) == first_pool(address));
                        assert!(
                            rivals.clone().all(|o| oldest(address) <= oldest(o)),
                            "{address} was released later than others of {open:?}"
                        );
                    }
                    self.freed.remove(address);
                }
                self.leases.insert(container, (addresses, workload));
            }
            Err(LeaseError::Held { .. }) => assert!(rival),
            Err(LeaseError::Exhausted { .. }) => {
                let narrow: Vec<_> = open.0.iter().filter(|a| a.to_string().starts_with("10.0.0.")).collect();
                let none = match (fixed, workload) {
                    (Some(_), _) => false,
                    (None, Some("w/sticky")) => narrow.is_empty(),
                    (None, _) => open.0.is_empty(),
                };
                assert!(none || open.1.is_empty(), "refused while {open:?} are free");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_commands_agrees_with_a_map(actions in prop::collection::vec(action(), 1..80)) {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let ours = ipam(JSON, &store).with_clock(|| NOW.get());
        let mut model = Model::default();
        for action in actions {
            let now = NOW.get();
            match action {
                Action::Lease { container, workload } => {
                    let got = block_on(ours.lease(&request(&format!("c{container}"), WORKLOADS[workload])));
                    let got = got.map(|l| l.addresses.iter().map(|a| a.address.addr()).collect());
                    model.check_lease(container, workload, got, now);
                }
                Action::Release { container } => {
                    block_on(ours.release_current(&attachment(&format!("c{container}")))).unwrap();
                    model.release(container, now);
                }
                Action::Retain { alive } => {
                    let valid: Vec<_> =
                        alive.iter().map(|c| (format!("c{c}").parse().unwrap(), "eth0".parse().unwrap())).collect();
                    let gone = block_on(ours.retain(&"net".parse().unwrap(), &valid)).unwrap().len();
                    let dead: Vec<u8> = model.leases.keys().copied().filter(|c| !alive.contains(c)).collect();
                    prop_assert_eq!(gone, dead.len());
                    for container in dead {
                        model.release(container, now);
                    }
                }
                Action::Wait { ms } => NOW.set(now + ms),
            }
            let bound: BTreeMap<IpAddr, String> = block_on(ours.bindings(None)).unwrap().into_iter()
                .map(|b| (b.address.addr(), b.attachment.container.to_string())).collect();
            let expected: BTreeMap<IpAddr, String> = model.leases.iter()
                .flat_map(|(c, (addresses, _))| addresses.iter().map(move |a| (*a, format!("c{c}")))).collect();
            prop_assert_eq!(&bound, &expected);
            let counted: u128 = block_on(ours.usage()).unwrap().iter().map(|u| u.bound).sum();
            prop_assert_eq!(counted, bound.len() as u128);
        }
    }
}

#[test]
fn ranges_at_the_edges_of_64_bits_are_handed_out_whole() {
    let cases = [
        // 2^63 - 1, 2^63 and 2^63 + 1 into a /64, then 2^64 - 1, 2^64 and 2^64 + 1 into a /48.
        ("fd00::/64", "fd00::7fff:ffff:ffff:ffff-fd00::8000:0:0:1", 3),
        ("fd00::/48", "fd00::ffff:ffff:ffff:ffff-fd00::1:0:0:0:1", 3),
        ("fd00::/16", "fd00:7fff:ffff:ffff:ffff:ffff:ffff:ffff-fd00:8000::1", 3),
        ("ff00::/8", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 2),
        ("255.255.255.254/31", "255.255.255.254-255.255.255.255", 2),
        ("255.255.255.255/32", "255.255.255.255", 1),
        ("fd00::7/128", "fd00::7", 1),
        ("fd00::6/127", "fd00::6-fd00::7", 2),
        ("0.0.0.0/0", "127.255.255.255-128.0.0.1", 3),
        ("::/0", "::fffe:ffff:ffff-::1:0:0:1", 3),
    ];
    for (subnet, range, count) in cases {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let json = format!(
            r#"{{ "cooldown": "0s", "pools": [ {{ "name": "p", "subnet": "{subnet}", "ranges": ["{range}"] }} ] }}"#
        );
        let ours = ipam(&json, &store);
        let given: BTreeSet<String> =
            (0..count).map(|i| lease(&ours, &format!("c{i}"), None).unwrap().remove(0)).collect();
        assert_eq!(given.len(), count, "{range}: {given:?}");
        assert!(matches!(lease(&ours, "more", None).unwrap_err(), LeaseError::Exhausted { .. }), "{range}");
        for i in 0..count {
            block_on(ours.release_current(&attachment(&format!("c{i}")))).unwrap();
        }
        let again: BTreeSet<String> =
            (0..count).map(|i| lease(&ours, &format!("d{i}"), None).unwrap().remove(0)).collect();
        assert_eq!(again, given, "{range}");
    }
}

/// Where 64-bit thinking fails: offsets around 2^63 and 2^64, and the ends of the subnet.
fn offset() -> impl Strategy<Value = u128> {
    (prop_oneof![Just(0_u128), Just(1 << 63), Just(1 << 64), Just(u128::MAX), any::<u128>()], 0..5_u128)
        .prop_map(|(base, n)| base.wrapping_add(n).wrapping_sub(2))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_offset_of_any_prefix_is_handed_out(bits in any::<u128>(), at in 0..7_usize, offset in offset()) {
        let length = [8, 32, 48, 64, 112, 127, 128][at];
        let hosts = u128::MAX.checked_shr(length.into()).unwrap_or(0);
        let network = ipnet::Ipv6Net::new(bits.into(), length).unwrap().trunc();
        prop_assume!(!"::/8".parse::<ipnet::Ipv6Net>().unwrap().contains(&network));
        // Up to four addresses on from the offset, within the subnet.
        let first = offset & hosts;
        let last = first.saturating_add(3).min(hosts);
        let ip = |offset: u128| std::net::Ipv6Addr::from(u128::from(network.addr()) | offset);
        let json = format!(
            r#"{{ "pools": [ {{ "name": "p", "subnet": "{network}", "ranges": ["{}-{}"] }} ] }}"#, ip(first), ip(last)
        );
        // The subnet-router anycast address is nobody's where there is one.
        let expected: BTreeSet<IpAddr> =
            (first..=last).filter(|o| *o > 0 || length >= 127).map(|o| ip(o).into()).collect();
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let ours = ipam(&json, &store);
        let given: BTreeSet<IpAddr> = (0..expected.len())
            .map(|i| block_on(ours.lease(&request(&format!("c{i}"), None))).unwrap().addresses[0].address.addr())
            .collect();
        prop_assert_eq!(given, expected);
        let refused = matches!(lease(&ours, "more", None).unwrap_err(), LeaseError::Exhausted { .. });
        prop_assert!(refused);
    }
}

#[test]
fn ipv4_mapped_addresses_are_given_to_nobody_as_ipv6() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let json = r#"{ "pools": [ { "name": "p", "subnet": "::/64", "ranges": ["::fffe:ffff:ffff-::1:0:0:0"] } ] }"#;
    let ours = ipam(json, &store);
    let given: Vec<String> = (0..2).map(|i| lease(&ours, &format!("c{i}"), None).unwrap().remove(0)).collect();
    assert_eq!(given, ["::fffe:ffff:ffff/64", "::1:0:0:0/64"]);
    let mut asked = request("c2", None);
    asked.addresses = vec!["::ffff:10.0.0.1".parse().unwrap()];
    assert!(matches!(block_on(ours.lease(&asked)).unwrap_err(), LeaseError::Invalid { .. }));
    let mapped = r#"{ "pools": [ { "name": "p", "subnet": "::ffff:10.0.0.0/120", "delegate": 124 } ] }"#;
    assert_eq!(crate::config(mapped).layout().unwrap_err().field, "ipam.pools[0].subnet");
}
