//! The comparison of before and after is itself compared.

use dcenet_core::test_support::{HostState, Rung, TestHost, require};

#[test]
fn one_planted_object_of_each_kind_is_seen_and_its_removal_too() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let root = host.root();
    root.sh("ip link add v0 type veth peer name v1; ip link add br0 address 02:00:00:00:00:08 type bridge");
    // Otherwise link-local addresses would come by themselves, some time later.
    root.sh("for link in v0 v1 br0; do ip link set $link addrgenmode none; done; ip link set v0 up; ip link set v1 up");
    let before = host.state();
    assert!(before.lines().any(|l| l.starts_with("rule ")));
    for (plant, remove, seen) in [
        ("ip link add p0 type veth peer name p1", "ip link del p0", "+ link p0 "),
        ("ip link set v0 master br0", "ip link set v0 nomaster", "master Some(\"br0\")"),
        ("ip link set br0 alias mine", "ip link set br0 alias ''", "mine"),
        ("ip link set br0 up", "ip link set br0 down", "+ link br0 "),
        ("ip link set v0 mtu 1300", "ip link set v0 mtu 1500", "mtu 1300"),
        ("ip addr add 192.0.2.1/24 dev v0", "ip addr del 192.0.2.1/24 dev v0", "+ address v0 192.0.2.1/24"),
        ("ip addr add fd01::1/64 dev v0 nodad", "ip addr del fd01::1/64 dev v0", "+ address v0 fd01::1/64"),
        ("ip route add 192.0.2.0/24 dev v0", "ip route del 192.0.2.0/24 dev v0", "+ route 192.0.2.0/24"),
        ("ip route add fd02::/64 dev v0 table 7", "ip route del fd02::/64 dev v0 table 7", "+ route fd02::/64"),
        ("ip rule add from 192.0.2.1 table 7 prio 9", "ip rule del prio 9", "+ rule "),
        ("ip -6 rule add from fd01::1 table 7 prio 9", "ip -6 rule del prio 9", "+ rule "),
        (
            "ip neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev v0 nud permanent",
            "ip neigh del 192.0.2.9 dev v0",
            "+ neighbour v0 192.0.2.9",
        ),
        ("tc qdisc add dev v0 clsact", "tc qdisc del dev v0 clsact", "+ tc v0 qdisc clsact"),
    ] {
        root.sh(plant);
        let diff = before.diff(&host.state());
        assert!(diff.contains(seen), "{plant}: {diff}");
        root.sh(remove);
        assert_eq!(before.diff(&host.state()), "", "{remove}");
    }
    root.sh("tc qdisc add dev v0 clsact");
    let before = host.state();
    root.sh("tc filter add dev v0 egress protocol ip u32 match u32 0 0 classid 1:1");
    let diff = before.diff(&host.state());
    assert!(diff.contains("+ tc v0 filter u32"), "{diff}");
}

#[test]
fn reading_while_everything_changes_is_whole_or_an_error() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let root = host.root();
    root.sh("for n in $(seq 40); do ip link add fix$n type veth peer name xif$n; done");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..3 {
                root.sh("for n in $(seq 6); do ip link add t$n type veth peer name u$n; ip link del t$n; done");
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            // A dump that never came through whole panics in there; one that did has every link that was always there.
            let state = HostState::capture(root.netns());
            let fixed = state.lines().filter(|l| l.starts_with("link fix") || l.starts_with("link xif")).count();
            assert_eq!(fixed, 80);
        }
    });
}
