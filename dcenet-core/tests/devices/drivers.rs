//! Every link driver, through the conformance suite of its trait, and what is its own.

use std::time::Duration;

use dcenet_core::engine::{AttachError, AttachRequest, StepError};
use dcenet_core::link::conformance::{self, Reach, Subject};
use dcenet_core::link::{LinkConfig, LinkRequest, PlanError, Policy};
use dcenet_core::netlink::CreateLinkError;
use dcenet_core::provider::{Lease, LeasedAddress};
use dcenet_core::test_support::{HostState, Rung, TestHost, TestNetNs, ping, require};
use serde_json::{Value, json};

/// What [`conformance::survives_kills`] runs.
#[test]
fn child() {
    conformance::child();
}

/// The suite's three parts as tests, for a subject in a rung.
macro_rules! suite {
    ($($subject:ident in $rung:ident),+ $(,)?) => {$(
        mod $subject {
            use super::*;

            #[test]
            fn conforms() {
                if require(Rung::$rung) {
                    conformance::conforms(&super::$subject());
                }
            }

            #[test]
            fn survives_faults() {
                if require(Rung::$rung) {
                    conformance::survives_faults(&super::$subject());
                }
            }

            #[test]
            fn survives_kills() {
                if require(Rung::$rung) {
                    conformance::survives_kills(&super::$subject(), "drivers::child");
                }
            }
        }
    )+};
}

suite! {
    bridge in Netns,
    veth in Netns,
    macvlan in Netns,
    macvlan_alone in Netns,
    host_device in Netns,
    tap in Netns,
    ipvlan in Vm,
    vlan in Vm,
    vrf in Vm,
    dummy in Vm,
}

mod netkit {
    use super::*;

    fn is_there() -> bool {
        require(Rung::Vm) && !dcenet_core::test_support::kernel_is_before(6, 7)
    }

    #[test]
    fn conforms() {
        if is_there() {
            conformance::conforms(&super::netkit());
            conformance::conforms(&Subject {
                link: |_| json!({ "kind": "netkit", "mode": "l2", "mtu": 1400 }),
                own_mac: false,
                ..super::netkit()
            });
        }
    }

    #[test]
    fn survives_faults() {
        if is_there() {
            conformance::survives_faults(&super::netkit());
        }
    }

    #[test]
    fn survives_kills() {
        if is_there() {
            conformance::survives_kills(&super::netkit(), "drivers::child");
        }
    }
}

fn bridge() -> Subject {
    Subject {
        prepare: |_| {},
        link: |_| json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true, "hairpinMode": true, "mtu": 1400 }),
        pods: Reach::Both,
        host: Reach::Both,
        own_mac: false,
        drift: &[
            ("ip link set END down", "is down"),
            ("ip link set END alias mine", "mark is gone"),
            ("ip link set END nomaster", "not a port"),
            ("ip addr del 10.20.0.1/24 dev dc0", "address 10.20.0.1/24 of dc0"),
            ("sysctl -qw net.ipv4.conf.dc0.forwarding=0", "net.ipv4.conf.dc0.forwarding"),
        ],
    }
}

fn veth() -> Subject {
    Subject {
        prepare: the_host_is_the_router,
        link: |_| {
            json!({
                "kind": "veth", "mtu": 1400, "tuning": { "txQueueLen": 77, "allmulti": true },
                "sysctl": { "net.core.somaxconn": "77", "net.ipv4.conf.IFNAME.rp_filter": "2" },
            })
        },
        pods: Reach::Both,
        host: Reach::Both,
        own_mac: false,
        drift: &[
            ("ip link set END down", "is down"),
            ("ip link set END alias mine", "mark is gone"),
            ("ip route del 10.20.0.2/32", "route 10.20.0.2/32"),
            ("ip neigh del 10.20.0.2 dev END", "neighbour 10.20.0.2"),
            ("sysctl -qw net.ipv4.conf.END.forwarding=0", "forwarding is \"0\""),
        ],
    }
}

fn macvlan() -> Subject {
    Subject {
        prepare: a_segment,
        link: |_| json!({ "kind": "macvlan", "parent": "up0", "hostAccess": true, "mtu": 1400 }),
        pods: Reach::Both,
        host: Reach::Both,
        own_mac: false,
        drift: &[
            ("ip -6 route del fd20::2/128", "route fd20::2/128"),
            ("ip neigh del 10.20.0.2 dev $(ip -o link show type macvlan | cut -d' ' -f2 | cut -d@ -f1)", "neighbour"),
        ],
    }
}

fn macvlan_alone() -> Subject {
    Subject {
        link: |_| json!({ "kind": "macvlan", "parent": "up0", "mode": "private", "mtu": 1400 }),
        pods: Reach::None,
        host: Reach::None,
        drift: &[],
        ..macvlan()
    }
}

fn host_device() -> Subject {
    Subject {
        prepare: |host| {
            two_cables(host);
            host.root().sh("ip link set up2 mtu 1450 alias cable txqueuelen 500; ip addr add 192.0.2.9/24 dev up2; \
                ip link set up3 mtu 1450");
        },
        link: |n| json!({ "kind": "host-device", "device": format!("up{n}"), "mtu": 1400, "tuning": { "promisc": true } }),
        pods: Reach::Both,
        host: Reach::Both,
        own_mac: true,
        drift: &[],
    }
}

fn tap() -> Subject {
    Subject {
        prepare: |_| tun_is_loaded(),
        link: |_| json!({ "kind": "tap", "owner": 1000, "group": 100, "multiQueue": true, "mtu": 1400 }),
        pods: Reach::Unknown,
        host: Reach::Unknown,
        own_mac: false,
        drift: &[],
    }
}

fn ipvlan() -> Subject {
    Subject {
        prepare: a_segment,
        link: |_| json!({ "kind": "ipvlan", "parent": "up0", "mtu": 1400 }),
        pods: Reach::Both,
        host: Reach::None,
        own_mac: true,
        drift: &[],
    }
}

fn vlan() -> Subject {
    Subject {
        prepare: two_cables,
        link: |n| json!({ "kind": "vlan", "parent": format!("up{n}"), "id": 100, "mtu": 1400 }),
        pods: Reach::Both,
        host: Reach::None,
        own_mac: false,
        drift: &[],
    }
}

fn vrf() -> Subject {
    Subject {
        prepare: |host| {
            the_host_is_the_router(host);
            routing_domains_were_there(host);
        },
        link: |_| json!({ "kind": "vrf", "vrf": "red", "table": 77, "mtu": 1400 }),
        pods: Reach::Both,
        // The rule of the local table comes before that of the domains (net/ipv4/fib_rules.c) until somebody moves it.
        host: Reach::Unknown,
        own_mac: false,
        drift: &[("ip link set END nomaster", "not a port"), ("ip route del 10.20.0.2/32 table 77", "route 10.20.0.2")],
    }
}

fn netkit() -> Subject {
    Subject {
        prepare: the_host_is_the_router,
        link: |_| json!({ "kind": "netkit", "mtu": 1400 }),
        pods: Reach::Both,
        host: Reach::Both,
        own_mac: true,
        drift: &[("ip link set END down", "is down")],
    }
}

fn dummy() -> Subject {
    Subject {
        prepare: |_| {},
        link: |_| json!({ "kind": "dummy", "mtu": 1400 }),
        pods: Reach::None,
        host: Reach::Unknown,
        own_mac: false,
        drift: &[],
    }
}

fn the_host_is_the_router(host: &TestHost) {
    host.root().sh("ip addr add 10.20.0.1/32 dev lo; ip addr add fd20::1/128 dev lo nodad");
}

/// The first routing domain of a namespace has the kernel make rules that stay (`vrf_add_fib_rules` in
/// `drivers/net/vrf.c`). Nothing happens where the kernel has none.
fn routing_domains_were_there(host: &TestHost) {
    host.root().sh("if ip link add first type vrf table 5 2>/dev/null; then ip link del first; fi");
}

/// Where nothing makes the nodes of `/dev` that belong to modules, as in guests.
fn tun_is_loaded() {
    if std::env::var_os("DCENET_VM").is_some() {
        let status = std::process::Command::new("modprobe").arg("tun").status();
        assert!(status.unwrap().success());
    }
}

/// A device `up0` with the host's addresses, to be a parent; its other end swallows what comes.
fn a_segment(host: &TestHost) {
    host.root().sh("ip link add up0 type veth peer name far0; for end in far0 up0; do \
        ip link set $end addrgenmode none; ip link set $end up; done; \
        ip addr add 10.20.0.1/24 dev up0; ip addr add fd20::1/64 dev up0 nodad");
}

/// Devices `up2` and `up3`, whose other ends are ports of a bridge that has the host's addresses.
fn two_cables(host: &TestHost) {
    // Devices that come back from a pod are as new ones in this.
    host.root().sysctl("ipv6/conf/default/addr_gen_mode", "1");
    host.root().sh("ip link add seg type bridge; ip link set seg addrgenmode none; ip link set seg up; \
        ip addr add 10.20.0.1/24 dev seg; ip addr add fd20::1/64 dev seg nodad; for n in 2 3; do \
        ip link add up$n type veth peer name far$n; for end in far$n up$n; do \
        ip link set $end addrgenmode none; done; ip link set far$n master seg; \
        ip link set far$n up; ip link set up$n up; done");
}

fn lease(addresses: &[&str]) -> Lease {
    let addresses = addresses.iter().map(|a| LeasedAddress::new(a.parse().unwrap(), "pods", 1)).collect();
    Lease { addresses, routes: Vec::new(), dns: Default::default(), mac: None }
}

fn request<'a>(container: &str, pod: &'a TestNetNs, link: &Value, addresses: &[&str]) -> AttachRequest<'a> {
    let key = serde_json::from_value(json!({ "network": "shop", "container": container, "ifname": "eth0" })).unwrap();
    AttachRequest::new(key, pod.pod(), LinkConfig::read(link).unwrap(), lease(addresses))
}

/// What iproute2 says of the device in the pod.
fn settings(pod: &TestNetNs) -> Value {
    super::seen(pod, "eth0").unwrap()["linkinfo"]["info_data"].clone()
}

#[test]
fn macvlan_modes_are_those_asked_for() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    a_segment(&host);
    let engine = host.engine(None);
    let before = host.state();
    for (mode, more) in [
        ("bridge", json!({})),
        ("vepa", json!({})),
        ("private", json!({})),
        ("passthru", json!({})),
        ("source", json!({ "sources": ["02:00:00:00:00:0a", "02:00:00:00:00:0b"] })),
    ] {
        let pod = host.new_pod();
        let mut link = json!({ "kind": "macvlan", "parent": "up0", "mode": mode });
        link.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let request = request("c1", &pod, &link, &["10.20.0.2/24", "fd20::2/64"]);
        let attached = engine.attach(&request).unwrap();
        assert_eq!(settings(&pod)["mode"], mode);
        let listed = pod.sh("ip -d link show dev eth0");
        for source in link["sources"].as_array().into_iter().flatten() {
            assert!(listed.contains(source.as_str().unwrap()), "{listed}");
        }
        // It takes nothing over from routers of the segment.
        assert_eq!(pod.sh("cat /proc/sys/net/ipv6/conf/eth0/accept_ra").trim(), "0");
        let own = host.root().link("up0").unwrap().mac;
        assert_eq!(Some(attached.interfaces[0].mac) == own, mode == "passthru");
        assert_eq!(engine.check(&request.key, pod.netns()).unwrap(), []);
        engine.detach(&request.key, None).unwrap();
    }
    assert_eq!(before.diff(&host.state()), "");
}

#[test]
fn without_host_access_host_and_macvlan_pods_do_not_meet() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    a_segment(&host);
    let engine = host.engine(None);
    let reach = |link: &Value, expected: bool| {
        let pod = host.new_pod();
        let request = request("c1", &pod, link, &["10.20.0.2/24", "fd20::2/64"]);
        engine.attach(&request).unwrap();
        let limit = Duration::from_millis(if expected { 20_000 } else { 500 });
        for address in ["10.20.0.2", "fd20::2"] {
            assert_eq!(ping(host.root(), address.parse().unwrap(), limit).is_ok(), expected, "{address}");
        }
        for address in ["10.20.0.1", "fd20::1"] {
            assert_eq!(ping(&pod, address.parse().unwrap(), limit).is_ok(), expected, "{address}");
        }
        engine.detach(&request.key, None).unwrap();
    };
    reach(&json!({ "kind": "macvlan", "parent": "up0" }), false);
    reach(&json!({ "kind": "macvlan", "parent": "up0", "hostAccess": true }), true);
}

#[test]
fn the_segment_learns_nothing_of_the_hosts_own_macvlan() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    a_segment(&host);
    let engine = host.engine(None);
    let (pod, wire) = (host.new_pod(), host.new_pod());
    host.root().sh(&format!("ip link set far0 netns {}", wire.path().display()));
    wire.sh("ip addr add 10.20.0.99/24 dev far0; ip link set far0 up");
    let link = json!({ "kind": "macvlan", "parent": "up0", "hostAccess": true });
    engine.attach(&request("c1", &pod, &link, &["10.20.0.2/24"])).unwrap();
    let [own, shim] = ["link show dev up0", "link show type macvlan"].map(|what| {
        let text = host.root().sh(&format!("ip -o {what}"));
        text.split("link/ether ").nth(1).unwrap()[..17].to_owned()
    });
    // Whom the segment learns last of all who answer.
    let learnt = || {
        wire.sh("ip neigh flush dev far0");
        ping(&wire, "10.20.0.1".parse().unwrap(), Duration::from_secs(20)).unwrap();
        wire.sh("ip neigh show dev far0 10.20.0.1")
    };
    for _ in 0..20 {
        let learnt = learnt();
        assert!(learnt.contains(&own) && !learnt.contains(&shim), "{learnt}");
    }
    // Its silence is what does it.
    let shim_name = host.root().sh("ip -o link show type macvlan | cut -d' ' -f2 | cut -d@ -f1").trim().to_owned();
    host.root().sysctl(&format!("ipv4/conf/{shim_name}/arp_ignore"), "0");
    host.root().sysctl("ipv4/conf/up0/arp_ignore", "8");
    wire.sh("ip neigh flush dev far0");
    let _ = ping(&wire, "10.20.0.1".parse().unwrap(), Duration::from_secs(2));
    let learnt = wire.sh("ip neigh show dev far0 10.20.0.1");
    assert!(learnt.contains(&shim), "{learnt}");
}

#[test]
fn unfit_parents_are_refused_by_name() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    a_segment(&host);
    host.root().sh("ip link add down0 type veth peer name up9; ip link add br9 type bridge; \
        ip link add port0 type veth peer name port1; ip link set port0 master br9; ip link set port0 up");
    let engine = host.engine(None);
    let pod = host.new_pod();
    let (before, inside) = (host.state(), HostState::capture(pod.netns()));
    for (link, words) in [
        (json!({ "kind": "macvlan", "parent": "nope" }), "link.parent \"nope\": the host has no such link"),
        (json!({ "kind": "ipvlan", "parent": "nope" }), "link.parent \"nope\""),
        (json!({ "kind": "vlan", "parent": "nope", "id": 5 }), "link.parent \"nope\""),
        (json!({ "kind": "macvlan", "parent": "down0" }), "run `ip link set down0 up`"),
        (json!({ "kind": "macvlan", "parent": "lo" }), "is the loopback device"),
        (json!({ "kind": "macvlan", "parent": "port0" }), "it is a port of a bridge"),
        (json!({ "kind": "macvlan", "parent": "up0", "mtu": 9000 }), "more than the 1500 bytes of up0"),
        (json!({ "kind": "macvlan", "parent": "up0", "mode": "source" }), "link.sources"),
        (json!({ "kind": "macvlan", "parent": "up0", "sources": ["02:00:00:00:00:01"] }), "link.sources"),
        (json!({ "kind": "macvlan", "parent": "up0", "mode": "vepa", "hostAccess": true }), "link.hostAccess"),
        (json!({ "kind": "vlan", "parent": "up0" }), "link.id"),
        (json!({ "kind": "host-device", "device": "nope" }), "link.device \"nope\""),
        (json!({ "kind": "host-device", "device": "lo" }), "is the loopback device"),
        (json!({ "kind": "host-device", "device": "port0" }), "is a port of a bridge"),
        (json!({ "kind": "vrf", "vrf": "up0", "table": 9 }), "is a veth device and no routing domain"),
        (json!({ "kind": "vrf", "vrf": "red", "table": 254 }), "link.table \"254\""),
    ] {
        let error = engine.attach(&request("c1", &pod, &link, &["10.20.0.2/24"])).unwrap_err();
        assert!(matches!(error, AttachError::Plan(PlanError::Invalid { .. } | PlanError::Conflict { .. })), "{error}");
        assert!(error.to_string().contains(words), "{link}: {error}");
        assert!(!error.is_retryable() || words.contains("port"), "{link}: {error}");
    }
    let wanted = LinkRequest {
        key: request("c1", &pod, &json!({ "kind": "veth" }), &[]).key,
        mac: "02:00:00:00:00:01".parse().unwrap(),
        addresses: Vec::new(),
        routes: Vec::new(),
        policy: Policy::Wanted,
        device: None,
    };
    for (link, words) in [
        (json!({ "kind": "vlan", "parent": "up0", "id": 7 }), "no device that policy could be attached to"),
        (json!({ "kind": "ipvlan", "parent": "up0", "mode": "l3s" }), "that its device's programs never see"),
    ] {
        let link = LinkConfig::read(&link).unwrap();
        let error = link.driver().plan(&wanted, &Default::default()).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    assert_eq!(before.diff(&host.state()), "");
    assert_eq!(inside.diff(&HostState::capture(pod.netns())), "");
}

#[test]
fn a_kind_that_the_kernel_lacks_is_named() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    a_segment(&host);
    routing_domains_were_there(&host);
    let engine = host.engine(None);
    let pod = host.new_pod();
    let (before, inside) = (host.state(), HostState::capture(pod.netns()));
    for link in [
        json!({ "kind": "ipvlan", "parent": "up0" }),
        json!({ "kind": "vlan", "parent": "up0", "id": 5 }),
        json!({ "kind": "vrf", "vrf": "red", "table": 9 }),
        json!({ "kind": "netkit" }),
        json!({ "kind": "dummy" }),
    ] {
        let request = request("c1", &pod, &link, &["10.20.0.2/24"]);
        match engine.attach(&request) {
            Ok(_) => engine.detach(&request.key, None).unwrap(),
            Err(error) => {
                let cause = match &error {
                    AttachError::Step { cause, rollback } if rollback.is_empty() => cause,
                    other => panic!("{link}: {other}"),
                };
                let named = matches!(cause, StepError::Create(CreateLinkError::UnknownKind { .. }));
                assert!(named, "{link}: {error}");
                assert!(error.to_string().contains("it needs Linux"), "{error}");
            }
        }
        for shared in request.link.driver().shared() {
            engine.remove_idle(&shared).unwrap();
        }
        assert_eq!(before.diff(&host.state()), "", "{link}");
        assert_eq!(inside.diff(&HostState::capture(pod.netns())), "", "{link}");
        assert_eq!(host.records(), [""; 0]);
    }
}

#[test]
fn isolated_pods_reach_the_host_and_not_each_other() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    for isolated in [false, true] {
        let link = json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true, "isolated": isolated });
        let (a, b) = (host.new_pod(), host.new_pod());
        let mut keys = Vec::new();
        for (name, pod, address) in [("c1", &a, "10.20.0.2/24"), ("c2", &b, "10.20.0.3/24")] {
            let mut request = request(name, pod, &link, &[address]);
            request.lease.addresses[0].gateway = Some("10.20.0.1".parse().unwrap());
            engine.attach(&request).unwrap();
            keys.push(request.key);
        }
        ping(&a, "10.20.0.1".parse().unwrap(), Duration::from_secs(20)).unwrap();
        let limit = Duration::from_millis(if isolated { 500 } else { 20_000 });
        assert_eq!(ping(&a, "10.20.0.3".parse().unwrap(), limit).is_ok(), !isolated);
        for key in keys {
            engine.detach(&key, None).unwrap();
        }
    }
}

#[test]
fn a_tap_is_its_owners_and_has_as_many_queues_as_asked_for() {
    if !require(Rung::Netns) {
        return;
    }
    tun_is_loaded();
    let host = TestHost::new();
    let engine = host.engine(None);
    for (link, kind, queues) in [
        (json!({ "kind": "tap", "owner": 1000, "group": 100, "multiQueue": true }), "tap", true),
        (json!({ "kind": "tap", "mode": "tun", "owner": 1000 }), "tun", false),
    ] {
        let pod = host.new_pod();
        let request = request("c1", &pod, &link, &["10.20.0.2/24", "fd20::2/64"]);
        engine.attach(&request).unwrap();
        let said = settings(&pod);
        assert_eq!((&said["type"], &said["persist"]), (&json!(kind), &json!(true)), "{said}");
        assert_eq!(said["multi_queue"], json!(queues), "{said}");
        let text = pod.sh("ip -d link show dev eth0");
        assert!(text.contains("user") && (text.contains("group") || kind == "tun"), "{text}");
        engine.detach(&request.key, None).unwrap();
        assert!(pod.link("eth0").is_none());
    }
}

#[test]
fn a_device_comes_back_by_its_mark_where_the_record_is_lost() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    two_cables(&host);
    let engine = host.engine(None);
    let pod = host.new_pod();
    let before = host.state();
    let link = json!({ "kind": "host-device", "device": "up2" });
    let request = request("c1", &pod, &link, &["10.20.0.2/24"]);
    engine.attach(&request).unwrap();
    // Nobody else gets it meanwhile.
    let other = host.new_pod();
    let rival = self::request("c2", &other, &link, &["10.20.0.3/24"]);
    let error = engine.attach(&rival).unwrap_err();
    assert!(error.to_string().contains("another pod may have it"), "{error}");
    std::fs::remove_dir_all(host.run_dir()).unwrap();
    engine.detach(&request.key, Some(pod.netns())).unwrap();
    host.root().sh("ip link set up2 up");
    assert_eq!(before.diff(&host.state()), "");
}

#[test]
fn a_vlan_has_one_device() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    a_segment(&host);
    let engine = host.engine(None);
    let (a, b) = (host.new_pod(), host.new_pod());
    let link = json!({ "kind": "vlan", "parent": "up0", "protocol": "802.1ad" });
    let attach = |name: &str, pod: &TestNetNs| {
        let mut request = request(name, pod, &link, &["10.20.0.2/24"]);
        request.lease.addresses[0].vlan = Some(300.try_into().unwrap());
        engine.attach(&request).map(|_| request.key)
    };
    let key = attach("c1", &a).unwrap();
    assert_eq!(settings(&a)["id"], 300);
    assert_eq!(settings(&a)["protocol"], "802.1ad");
    let error = attach("c2", &b).unwrap_err();
    assert!(error.to_string().contains("VLAN 300 has a device already"), "{error}");
    engine.detach(&key, None).unwrap();
    attach("c2", &b).unwrap();
}

#[test]
fn ipvlan_modes_and_flags_are_those_asked_for() {
    if !require(Rung::Vm) {
        return;
    }
    let host = TestHost::new();
    a_segment(&host);
    let engine = host.engine(None);
    for (mode, flag) in [("l2", "bridge"), ("l2", "private"), ("l3", "vepa"), ("l3", "bridge"), ("l3s", "bridge")] {
        let (a, b) = (host.new_pod(), host.new_pod());
        let link = json!({ "kind": "ipvlan", "parent": "up0", "mode": mode, "flag": flag });
        let mut keys = Vec::new();
        for (name, pod, addresses) in
            [("c1", &a, ["10.20.0.2/24", "fd20::2/64"]), ("c2", &b, ["10.20.0.3/24", "fd20::3/64"])]
        {
            let request = request(name, pod, &link, &addresses);
            engine.attach(&request).unwrap();
            assert_eq!(engine.check(&request.key, pod.netns()).unwrap(), []);
            keys.push(request.key);
        }
        let said = settings(&a);
        assert_eq!((&said["mode"], &said[flag]), (&json!(mode), &json!(true)), "{said}");
        for address in ["10.20.0.3", "fd20::3"] {
            let limit = Duration::from_millis(if flag == "bridge" { 20_000 } else { 500 });
            assert_eq!(ping(&a, address.parse().unwrap(), limit).is_ok(), flag == "bridge", "{mode} {flag} {address}");
        }
        for key in keys {
            engine.detach(&key, None).unwrap();
        }
    }
}
