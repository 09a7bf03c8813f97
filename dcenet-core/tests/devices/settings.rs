//! Settings of pods: `link.sysctl`.

use dcenet_core::engine::{AttachError, AttachRequest, Drift, Engine};
use dcenet_core::link::LinkConfig;
use dcenet_core::model::AttachmentKey;
use dcenet_core::netns::Pod;
use dcenet_core::plan::Target;
use dcenet_core::provider::{Lease, LeasedAddress};
use dcenet_core::test_support::{HostState, Rung, TestHost, TestNetNs, effort, require};
use serde_json::{Value, json};

const SOMAXCONN: &str = "net.core.somaxconn";

fn key(ifname: &str) -> AttachmentKey {
    AttachmentKey {
        network: "shop".parse().unwrap(),
        container: "c1".parse().unwrap(),
        ifname: ifname.parse().unwrap(),
    }
}

fn attach(engine: &Engine, ifname: &str, pod: &TestNetNs, sysctl: Value) -> Result<bool, AttachError> {
    attach_at(engine, ifname, pod.pod(), sysctl)
}

fn attach_at(engine: &Engine, ifname: &str, pod: Pod<'_>, sysctl: Value) -> Result<bool, AttachError> {
    let link = LinkConfig::read(&json!({ "kind": "veth", "sysctl": sysctl })).unwrap();
    let address = format!("10.20.0.{}/24", 2 + ifname.len());
    let lease = Lease {
        addresses: vec![LeasedAddress::new(address.parse().unwrap(), "pods", 1)],
        routes: Vec::new(),
        dns: Default::default(),
        mac: None,
    };
    engine.attach(&AttachRequest::new(key(ifname), pod, link, lease)).map(|attached| attached.repeated)
}

/// What sysctl(8) says in a namespace.
fn value(netns: &TestNetNs, name: &str) -> String {
    netns.sh(&format!("sysctl -n {name}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn settings_are_made_looked_at_made_again_and_given_back() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let (pod, of_host) = (host.new_pod(), host.state());
    let before = HostState::capture(pod.netns());
    let sysctl = json!({
        SOMAXCONN: "77", "net/ipv4/ip_local_port_range": "20000 30000", "net.ipv4.conf.default.rp_filter": "1",
        "net.ipv4.conf.IFNAME.rp_filter": "2", "net.ipv4.neigh.eth0.retrans_time_ms": "1500",
    });
    let wanted = [
        (SOMAXCONN, "77"),
        ("net.ipv4.ip_local_port_range", "20000 30000"),
        ("net.ipv4.conf.default.rp_filter", "1"),
        ("net.ipv4.conf.eth0.rp_filter", "2"),
        ("net.ipv4.neigh.eth0.retrans_time_ms", "1500"),
    ];
    assert!(!attach(&engine, "eth0", &pod, sysctl.clone()).unwrap());
    for (name, expected) in wanted {
        assert_eq!(value(&pod, name), expected, "{name}");
    }
    assert_eq!(of_host.lines().filter(|l| l.starts_with("setting core")).count(), 1);
    assert!(host.state().lines().all(|line| line != "setting core/somaxconn 77"), "the host has its own");
    assert_eq!(engine.check(&key("eth0"), pod.netns()).unwrap(), []);

    pod.sh("sysctl -qw net.core.somaxconn=78 net.ipv4.conf.eth0.rp_filter=0");
    let drift = engine.check(&key("eth0"), pod.netns()).unwrap();
    let changed = |name: &str, value: &str, is: &str| {
        let [name, value, is] = [name, value, is].map(str::to_owned);
        Drift::SettingChanged { target: Target::Pod, name, value, is: Some(is) }
    };
    assert_eq!(drift, [changed("core/somaxconn", "77", "78"), changed("ipv4/conf/eth0/rp_filter", "2", "0")]);
    assert_eq!(drift[0].to_string(), "pod: net.core.somaxconn is \"78\", and was made \"77\"");

    assert!(attach(&engine, "eth0", &pod, sysctl).unwrap());
    assert_eq!(engine.check(&key("eth0"), pod.netns()).unwrap(), []);
    engine.detach(&key("eth0"), None).unwrap();
    assert_eq!(before.diff(&HostState::capture(pod.netns())), "");
    assert_eq!(of_host.diff(&host.state()), "");
}

#[test]
fn networks_of_a_pod_share_a_setting_until_the_last_has_gone() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let before = value(&pod, SOMAXCONN);
    assert_ne!(before, "77");
    for order in [["eth0", "storage"], ["storage", "eth0"]] {
        for ifname in ["eth0", "storage"] {
            attach(&engine, ifname, &pod, json!({ SOMAXCONN: "77" })).unwrap();
        }
        // A second pod has nothing to do with it.
        let other = host.new_pod();
        let elsewhere = AttachmentKey { container: "c2".parse().unwrap(), ..key("eth0") };
        let link = LinkConfig::read(&json!({ "kind": "veth", "sysctl": { SOMAXCONN: "99" } })).unwrap();
        let none = Lease { addresses: Vec::new(), routes: Vec::new(), dns: Default::default(), mac: None };
        engine.attach(&AttachRequest::new(elsewhere.clone(), other.pod(), link, none)).unwrap();
        assert_eq!((value(&pod, SOMAXCONN), value(&other, SOMAXCONN)), ("77".to_owned(), "99".to_owned()));

        // Another value is refused, before anything is made.
        let error = attach(&engine, "third", &pod, json!({ SOMAXCONN: "78" })).unwrap_err().to_string();
        for word in ["link.sysctl \"net.core.somaxconn = 78\"", "shop/c1/eth0", "\"77\""] {
            assert!(error.contains(word) || word.ends_with("eth0") && error.contains("shop/c1/storage"), "{error}");
        }
        assert!(pod.link("third").is_none());

        engine.detach(&key(order[0]), None).unwrap();
        assert_eq!(value(&pod, SOMAXCONN), "77", "{order:?}");
        engine.detach(&key(order[1]), None).unwrap();
        assert_eq!(value(&pod, SOMAXCONN), before, "{order:?}");
        engine.detach(&elsewhere, None).unwrap();
        assert_eq!(value(&other, SOMAXCONN), before);
    }
    assert_eq!(host.records(), [""; 0]);
}

#[test]
fn a_pod_that_renames_its_device_keeps_the_setting_that_comes_with_it() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    for change in ["ip link set eth0 down; ip link set eth0 name mine", "ip link set eth0 alias mine"] {
        let pod = host.new_pod();
        let before = value(&pod, SOMAXCONN);
        for ifname in ["eth0", "storage"] {
            attach(&engine, ifname, &pod, json!({ SOMAXCONN: "77" })).unwrap();
        }
        pod.sh(change);
        engine.detach(&key("storage"), None).unwrap();
        assert_eq!(value(&pod, SOMAXCONN), "77", "{change}");
        engine.detach(&key("eth0"), None).unwrap();
        assert_eq!(value(&pod, SOMAXCONN), before, "{change}");
    }
    assert_eq!(host.records(), [""; 0]);
}

/// As a runtime attaches them that does not wait for the one before the next.
#[test]
fn networks_that_come_and_go_side_by_side_leave_what_was_before() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let before = value(&pod, SOMAXCONN);
    for round in 0..effort(5, 20, 200) {
        for wanted in ["77", before.as_str()] {
            std::thread::scope(|scope| {
                for ifname in ["eth0", "storage", "x"] {
                    let (engine, pod) = (&engine, &pod);
                    scope.spawn(move || match wanted {
                        "77" => drop(attach(engine, ifname, pod, json!({ SOMAXCONN: "77" })).unwrap()),
                        _ => engine.detach(&key(ifname), None).unwrap(),
                    });
                }
            });
            assert_eq!(value(&pod, SOMAXCONN), wanted, "round {round}");
        }
    }
    assert_eq!(host.records(), [""; 0]);
}

/// Whatever the order in which they come and go, and under which of its names they ask.
#[test]
fn a_setting_with_two_names_is_given_back_as_one() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let names = ["net.ipv4.ip_forward", "net.ipv4.conf.all.forwarding"];
    let before = value(&pod, names[0]);
    let wanted = if before == "0" { "1" } else { "0" };
    for [first, second] in [names, [names[1], names[0]]] {
        attach(&engine, "eth0", &pod, json!({ first: wanted })).unwrap();
        attach(&engine, "storage", &pod, json!({ second: wanted })).unwrap();
        engine.detach(&key("eth0"), None).unwrap();
        assert_eq!(value(&pod, second), wanted, "{first}");
        engine.detach(&key("storage"), None).unwrap();
        assert_eq!(value(&pod, second), before, "{first}");
    }
}

#[test]
fn one_network_does_not_make_of_a_setting_what_another_does_not_want() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let sysctl = json!({ "net.ipv4.conf.IFNAME.rp_filter": "2", "net.ipv4.ip_forward": "1" });
    attach(&engine, "eth0", &pod, sysctl).unwrap();
    // The first one's own device, and another name of the same.
    for (name, value, same) in [("net.ipv4.conf.eth0.rp_filter", "0", "2"), ("net.ipv4.conf.all.forwarding", "0", "1")]
    {
        let error = attach(&engine, "storage", &pod, json!({ name: value })).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("shop/c1/eth0 of the same pod"), "{error}");
        assert!(pod.link("storage").is_none());
        attach(&engine, "storage", &pod, json!({ name: same })).unwrap();
        engine.detach(&key("storage"), None).unwrap();
        assert_eq!(engine.check(&key("eth0"), pod.netns()).unwrap(), []);
    }
    // Its own device is its own.
    attach(&engine, "storage", &pod, json!({ "net.ipv4.conf.IFNAME.rp_filter": "0" })).unwrap();
    assert_eq!(engine.check(&key("eth0"), pod.netns()).unwrap(), []);
}

const PORTS: &str = "net.ipv4.ip_local_port_range";
const FIRST_PORT: &str = "net.ipv4.ip_unprivileged_port_start";

/// The range of ports begins at no privileged one, or is refused (`ipv4_local_port_range` and `ipv4_privileged_ports` in
/// `net/ipv4/sysctl_net_ipv4.c`).
#[test]
fn settings_that_are_tied_to_each_other_come_and_go_together() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let is = || (value(&pod, PORTS), value(&pod, FIRST_PORT));
    let before = is();
    assert_eq!(before.1, "1024");
    let both = json!({ PORTS: "1000 65000", FIRST_PORT: "0" });
    for _ in 0..2 {
        attach(&engine, "eth0", &pod, both.clone()).unwrap();
        assert_eq!(is(), ("1000 65000".to_owned(), "0".to_owned()));
        pod.sh(&format!("sysctl -qw {PORTS}='20000 30000'; sysctl -qw {FIRST_PORT}=1024"));
    }
    attach(&engine, "eth0", &pod, both).unwrap();
    engine.detach(&key("eth0"), None).unwrap();
    assert_eq!(is(), before);
    assert!(attach(&engine, "eth0", &pod, json!({ PORTS: "1000 65000" })).is_err());
    assert_eq!((is(), host.records()), (before, Vec::new()));
}

#[test]
fn what_a_pod_made_of_its_settings_does_not_keep_it() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let (pod, of_host) = (host.new_pod(), host.state());
    attach(&engine, "eth0", &pod, json!({ FIRST_PORT: "0", SOMAXCONN: "77" })).unwrap();
    pod.sh(&format!("sysctl -qw {PORTS}='1000 65000'"));
    let back = || pod.run(|| std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "1024\n"));
    assert!(back().is_err(), "it cannot be given back");
    engine.detach(&key("eth0"), None).unwrap();
    assert_eq!((value(&pod, FIRST_PORT), host.records()), ("0".to_owned(), Vec::new()));
    assert_ne!(value(&pod, SOMAXCONN), "77");
    assert!(pod.link("eth0").is_none());
    assert_eq!(of_host.diff(&host.state()), "");
}

/// The record of a pod that nobody detached, whose namespace's number is another's by now.
#[test]
fn a_record_of_a_namespace_that_is_no_more_asks_for_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let path = host.directory().join("former");
    std::os::unix::fs::symlink(pod.path(), &path).unwrap();
    attach_at(&engine, "storage", Pod { netns: pod.netns(), path: &path }, json!({ SOMAXCONN: "77" })).unwrap();
    // As long as the path leads there it is an attachment of the pod.
    assert!(attach(&engine, "eth0", &pod, json!({ SOMAXCONN: "78" })).unwrap_err().to_string().contains("storage"));
    std::fs::remove_file(&path).unwrap();
    attach(&engine, "eth0", &pod, json!({ SOMAXCONN: "78" })).unwrap();
    assert_eq!(value(&pod, SOMAXCONN), "78");
    engine.detach(&key("eth0"), None).unwrap();
    assert_eq!(value(&pod, SOMAXCONN), "77");
    engine.detach(&key("storage"), None).unwrap();
    assert_eq!(host.records(), [""; 0]);
}

#[test]
fn what_is_not_the_pods_or_refused_by_the_kernel_changes_nothing() {
    if !require(Rung::Netns) {
        return;
    }
    let host = TestHost::new();
    let engine = host.engine(None);
    let pod = host.new_pod();
    let (of_host, of_pod) = (host.state(), HostState::capture(pod.netns()));
    // Of the whole host: there for its administrator, not in a pod.
    let backlog = || std::fs::read_to_string("/proc/sys/net/core/netdev_max_backlog").ok();
    let is = backlog();
    if is.is_none() {
        eprintln!("not looked at whether net.core.netdev_max_backlog stays: this is not the machine's first namespace");
    }
    for (name, set, words) in [
        ("net.core.netdev_max_backlog", "4321", "has no such setting"),
        ("net.core.nothing", "1", "has no such setting"),
        ("net.ipv4.conf.IFNAME.nothing", "1", "has no such setting"),
        ("net.ipv4.conf.eth9.rp_filter", "1", "has no such setting"),
        ("net.ipv4.tcp_available_congestion_control", "x", "cannot be written"),
        ("net.ipv4.route.flush", "1", "cannot be read"),
        ("net.ipv4.conf", "1", "several"),
        ("net.core.somaxconn", "many", "cannot be set to \"many\""),
        ("net.ipv4.conf.IFNAME.rp_filter", "x", "cannot be set to \"x\""),
    ] {
        // What goes before it is given back.
        let mut sysctl = json!({ "net.core.somaxconn": "77", "net.ipv4.ip_local_port_range": "20000 30000" });
        sysctl[name] = json!(set);
        let error = attach(&engine, "eth0", &pod, sysctl).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&name.replace("IFNAME", "eth0")) && text.contains(words), "{name}: {text}");
        assert!(!error.is_retryable(), "{name}");
        assert_eq!(of_pod.diff(&HostState::capture(pod.netns())), "", "{name}");
        assert_eq!(of_host.diff(&host.state()), "", "{name}");
        assert_eq!(host.records(), [""; 0], "{name}");
    }
    assert_eq!(backlog(), is);
    // A device's name, which a tenant may choose, is in the place of a device alone.
    let read = |name: &str| LinkConfig::read(&json!({ "kind": "veth", "sysctl": { name: "1" } }));
    read("net.ipv4.neigh.IFNAME.retrans_time_ms").unwrap();
    for name in ["net.ipv4.IFNAME.all.forwarding", "net.IFNAME.ip_forward", "net.ipv4.conf.IFNAME.IFNAME"] {
        let error = read(name).unwrap_err().to_string();
        assert!(error.contains("link.sysctl") && error.contains(&format!("{name:?}: IFNAME stands")), "{error}");
    }
    assert_eq!(engine.check(&key("eth0"), pod.netns()).unwrap(), [Drift::NotAttached]);
}

#[test]
fn forwarding_of_ipv4_is_missed_by_who_has_such_an_address() {
    if !require(Rung::Netns) {
        return;
    }
    for (address, missed) in [("10.20.0.2/24", true), ("fd20::2/64", false)] {
        let host = TestHost::new();
        let engine = host.engine(None);
        let pod = host.new_pod();
        let link = LinkConfig::read(&json!({ "kind": "bridge", "bridge": "dc0", "isGateway": true })).unwrap();
        let address = LeasedAddress::new(address.parse().unwrap(), "pods", 1);
        let lease = Lease { addresses: vec![address], routes: Vec::new(), dns: Default::default(), mac: None };
        engine.attach(&AttachRequest::new(key("eth0"), pod.pod(), link, lease)).unwrap();
        assert_eq!(engine.check(&key("eth0"), pod.netns()).unwrap(), []);
        host.root().sysctl("ipv4/conf/dc0/forwarding", "0");
        assert_eq!(!engine.check(&key("eth0"), pod.netns()).unwrap().is_empty(), missed);
        engine.detach(&key("eth0"), None).unwrap();
    }
}
