//! Pools from text to members.

use dcenet_core::netlink::Family;
use dcenet_core::test_support::{Rung, TestHost, require};
use dcenet_sriov::inventory::Inventory;
use dcenet_sriov::pool::{HostUse, InUse, Members, Pools};
use dcenet_sriov::test_support::{Port, Tree, VfOf};
use serde_json::json;

fn inventory() -> Inventory {
    let directory = tempfile::tempdir().unwrap();
    let mut tree = Tree::new(directory.path());
    tree.port(&Port::igb("0000:01:00.0", "ens1"));
    tree.port(&Port { vf: VfOf::UserSpace("vfio-pci"), ..Port::igb("0000:02:00.0", "ens2") });
    tree.port(&Port::mlx5("0000:81:00.0", "ens3"));
    Inventory::scan(&tree.sysfs()).unwrap()
}

fn pools(value: serde_json::Value) -> Pools {
    Pools::read("pools", &value).unwrap()
}

fn functions(members: &Members) -> Vec<String> {
    members.functions.iter().map(ToString::to_string).collect()
}

#[test]
fn every_key_of_a_selector_narrows_and_every_selector_adds() {
    let inventory = inventory();
    let count = |select: serde_json::Value| {
        let pools = pools(json!([{ "name": "p", "select": select }]));
        pools.resolve(&inventory, &HostUse::default()).unwrap()[0].functions.len()
    };
    assert_eq!(count(json!([{ "vendors": ["8086"] }])), 14);
    assert_eq!(count(json!([{ "vendors": ["0x15b3", "8086"] }])), 18);
    assert_eq!(count(json!([{ "devices": ["10ca"], "drivers": ["vfio-pci"] }])), 7);
    assert_eq!(count(json!([{ "drivers": ["mlx5_core"] }])), 4);
    assert_eq!(count(json!([{ "numa": [1] }])), 4);
    assert_eq!(count(json!([{ "linkTypes": ["ether"] }])), 18);
    assert_eq!(count(json!([{ "linkTypes": ["infiniband"] }])), 0);
    assert_eq!(count(json!([{ "pfs": ["ens1#0-2,6", "0000:02:00.0#0"] }])), 5);
    assert_eq!(count(json!([{ "pfs": ["ens1#0-2"], "numa": [1] }])), 0);
    assert_eq!(count(json!([{ "pfs": ["ens1#0-2"] }, { "pfs": ["ens1#2-3"] }])), 4);
    assert_eq!(count(json!([{ "addresses": ["0000:01:10.2", "0000:05:00.0"] }])), 1);
    let pools = pools(json!([{ "name": "p", "select": [{ "pfs": ["ens1"] }], "exclude": [{ "pfs": ["ens1#1-6"] }] }]));
    let members = pools.resolve(&inventory, &HostUse::default()).unwrap();
    assert_eq!(functions(&members[0]), ["0000:01:10.0"]);
}

#[test]
fn overlaps_are_told_with_both_names() {
    let two = pools(json!([
        { "name": "db", "select": [{ "pfs": ["ens1#0-3"] }] },
        { "name": "web", "select": [{ "drivers": ["igbvf"] }], "exclude": [{ "pfs": ["ens1#0-2"] }] },
    ]));
    let error = two.resolve(&inventory(), &HostUse::default()).unwrap_err();
    assert_eq!(error.to_string(), r#"pools "db" and "web" both have 0000:01:10.6; exclude it from one of them"#);
    assert_eq!(two.possible_overlaps(), [("db", "web")]);
    let apart = pools(json!([
        { "name": "a", "select": [{ "pfs": ["ens1#0-3"] }] },
        { "name": "b", "select": [{ "pfs": ["ens1#4-7"] }] },
        { "name": "c", "select": [{ "pfs": ["ens1"], "drivers": ["vfio-pci"] }] },
    ]));
    apart.resolve(&inventory(), &HostUse::default()).unwrap();
    // The functions of a and b may get that driver.
    assert_eq!(apart.possible_overlaps(), [("a", "c"), ("b", "c")]);
}

#[test]
fn wrong_configuration_is_told_with_its_place_and_the_remedy() {
    for (value, field, reason) in [
        (json!([{ "name": "", "select": [{ "numa": [0] }] }]), "pools[0].name", "give the pool a name"),
        (json!([{ "name": "a", "select": [] }]), "pools[0].select", "give a selector"),
        (
            json!([{ "name": "a", "select": [{}] }]),
            "pools[0].select[0]",
            "every function of the host; give one of vendors",
        ),
        (json!([{ "name": "a", "select": [{ "numa": [] }] }]), "pools[0].select[0].numa", "leave the key out"),
        (
            json!([{ "name": "a", "select": [{ "numa": [0] }], "exclude": [{ "numa": [0] }, {}] }]),
            "pools[0].exclude[1]",
            "every function",
        ),
        (
            json!([{ "name": "a", "select": [{ "vendor": ["8086"] }] }]),
            "pools[0].select[0].vendor",
            "did you mean `vendors`?",
        ),
        (
            json!([{ "name": "a", "select": [{ "vendors": ["intel"] }] }]),
            "pools[0].select[0].vendors[0]",
            "four hexadecimal digits",
        ),
        (
            json!([{ "name": "a", "select": [{ "pfs": ["ens1#3-1"] }] }]),
            "pools[0].select[0].pfs[0]",
            "\"3-1\": a range that ends",
        ),
        (
            json!([{ "name": "a", "select": [{ "addresses": ["10.2"] }] }]),
            "pools[0].select[0].addresses[0]",
            "lspci -D",
        ),
        (
            json!([{ "name": "a", "select": [{ "numa": [0] }] }, { "name": "a", "select": [{ "numa": [1] }] }]),
            "pools[1].name",
            "is the name of pools[0] too",
        ),
    ] {
        let error = Pools::read("pools", &value).unwrap_err();
        assert_eq!(error.field, field, "{error}");
        assert!(error.reason.contains(reason), "{error}");
    }
}

#[test]
fn a_port_that_the_host_uses_is_refused_unless_it_is_shared() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    // The default route leads over a VLAN on ens1, ens3 is a port of a bridge; ens2 is free.
    host.root().sh("for i in 1 2 3; do ip link add ens$i type veth peer name far$i; ip link set ens$i up; done; \
         ip link add link ens1 name up0 type macvlan; ip link set up0 up; \
         ip address add 192.0.2.2/24 dev up0; ip route add default via 192.0.2.1; \
         ip link add br0 type bridge; ip link set ens3 master br0");
    let used = HostUse::read(&mut host.root().netns().socket(Family::Route).unwrap()).unwrap();
    assert_eq!(used.by("ens1"), Some(&InUse::DefaultRoute));
    assert_eq!(used.by("ens2"), None);
    assert_eq!(used.by("ens3"), Some(&InUse::Enslaved("br0".into())));

    let inventory = inventory();
    let config = |shared: bool| {
        pools(json!([{ "name": "p", "select": [{ "pfs": ["ens1", "ens2", "ens3"] }], "sharedPort": shared }]))
    };
    let members = config(false).resolve(&inventory, &used).unwrap();
    assert_eq!(members[0].functions.len(), 7);
    assert!(members[0].functions.iter().all(|f| f.to_string().starts_with("0000:02:")));
    let told: Vec<String> = members[0].refused.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "ens1 (0000:01:00.0) carries the host's default route; select another, or set \"sharedPort\": true",
            "ens3 (0000:81:00.0) is a port of br0; select another, or set \"sharedPort\": true",
        ]
    );
    assert_eq!(config(true).resolve(&inventory, &used).unwrap()[0].functions.len(), 18);

    // One of several next hops may be any.
    host.root().sh("ip address add 198.51.100.2/24 dev ens2; \
         ip route replace default nexthop via 192.0.2.1 dev up0 nexthop via 198.51.100.1 dev ens2");
    let used = HostUse::read(&mut host.root().netns().socket(Family::Route).unwrap()).unwrap();
    assert_eq!(used.by("ens2"), Some(&InUse::PerhapsDefaultRoute));
    assert!(config(false).resolve(&inventory, &used).unwrap()[0].functions.is_empty());
}
