//! Virtual functions of a real adapter, QEMU's igb in the guest. The plugin runs in the guest's own namespace, where the ports
//! are; what a function is, iproute2 and sysfs tell.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use dcenet_core::netns::{Host, NetNs};
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, effort, kernel_is_before, ping, require};
use dcenet_sriov::lease::{Leases, VfId};
use dcenet_sriov::test_support::guest::{IgbPort, sh};
use serde_json::{Value, json};

use super::common::{Owner, run_anywhere, start_anywhere};

/// A guest's port with functions, and the configuration of a network on them.
struct Guest {
    /// Goes before the pods.
    owner: Option<Owner>,
    config: Value,
    host: TestHost,
    vfs: Vec<VfId>,
    homes: Vec<String>,
    /// Last, so that what is in pods comes back before it goes.
    port: IgbPort,
}

impl Guest {
    fn with(functions: u16) -> Self {
        let port = IgbPort::with(functions);
        let host = TestHost::new();
        let vfs: Vec<VfId> = (0..functions).map(|n| port.vf(n)).collect();
        let homes = vfs.iter().map(|vf| port.told(*vf)).collect();
        let mut config = of_the_page();
        config["sriov"]["pools"][0]["select"][0]["pfs"] = json!([format!("{}#0-3", port.name)]);
        config["stateDir"] = json!(host.directory().join("state"));
        config["runDir"] = json!(host.run_dir());
        Self { owner: None, config, host, vfs, homes, port }
    }

    fn under_policy(functions: u16) -> Self {
        let mut guest = Self::with(functions);
        let root = Host(NetNs::of_this_thread().unwrap());
        let owner = Owner::open_at(root, guest.host.directory(), guest.host.run_dir());
        guest.config["policy"] = owner.section();
        guest.owner = Some(owner);
        guest
    }

    fn call(&self, verb: &str, name: &str, pod: &Path, config: &Value) -> Result<Value, Value> {
        let args = format!("K8S_POD_NAME={name};IgnoreUnknown=1;K8S_POD_NAMESPACE=shop");
        let environment = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", name),
            ("CNI_NETNS", pod.to_str().unwrap()),
            ("CNI_IFNAME", "net1"),
            ("CNI_ARGS", &args),
        ];
        run_anywhere(&environment, &config.to_string())
    }

    /// As [`call`](Self::call), by a process that dies when it has made so many calls. Whether it came so far.
    fn dies(&self, verb: &str, name: &str, pod: &Path, calls: usize) -> bool {
        let args = format!("K8S_POD_NAME={name};IgnoreUnknown=1;K8S_POD_NAMESPACE=shop");
        let (log, fault) = (self.host.directory().join("fault"), format!("abort-after:{calls}"));
        let environment = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", name),
            ("CNI_NETNS", pod.to_str().unwrap()),
            ("CNI_IFNAME", "net1"),
            ("CNI_ARGS", &args),
            ("DCENET_FAULT", &fault),
            ("DCENET_FAULT_LOG", log.to_str().unwrap()),
        ];
        let answer = start_anywhere(&environment, &self.config.to_string()).wait();
        let met = std::fs::remove_file(&log).is_ok();
        assert_eq!(answer.is_none(), met, "{verb} {calls}: {answer:?}");
        met
    }

    fn add(&self, name: &str, pod: &TestNetNs) -> Result<Value, Value> {
        self.call("ADD", name, pod.path(), &self.config)
    }

    fn labelled(&self, name: &str, pod: &TestNetNs, app: &str) -> Result<Value, Value> {
        let mut config = self.config.clone();
        config["args"] = json!({ "cni": { "labels": [{ "key": "app", "value": app }] } });
        self.call("ADD", name, pod.path(), &config)
    }

    fn del(&self, name: &str, pod: &Path) -> Result<Value, Value> {
        self.call("DEL", name, pod, &self.config)
    }

    fn not_home(&self) -> Vec<String> {
        let now = self.vfs.iter().map(|vf| self.port.told(*vf));
        self.homes.iter().zip(now).filter(|(home, now)| *home != now).map(|(_, now)| now).collect()
    }

    fn assert_home(&self, when: &str) {
        self.assert_free(when);
        assert_eq!(self.host.records(), [""; 0], "{when}");
    }

    /// That every function is as it was, and nobody's.
    fn assert_free(&self, when: &str) {
        assert_eq!(self.not_home(), [""; 0], "{when}");
        let state = self.config["stateDir"].as_str().unwrap();
        let leases = Leases::open(self.port.kernel.clone(), Path::new(state)).unwrap();
        assert!(leases.held().unwrap().is_empty(), "{when}");
    }
}

/// The operators' page's list, as the runtime hands it to the plugin.
fn of_the_page() -> Value {
    const PAGE: &str = include_str!("../../../../docs/operators.md");
    let (_, section) = PAGE.split_once("\n## Virtual functions\n").unwrap();
    let block = section.split("```json").nth(1).unwrap().split("```").next().unwrap();
    let list: Value = serde_json::from_str(block).unwrap();
    let mut config = list["plugins"][0].clone();
    for key in ["cniVersion", "name"] {
        config[key] = list[key].clone();
    }
    config
}

fn address(result: &Value) -> IpAddr {
    super::addresses(result)[0].split('/').next().unwrap().parse().unwrap()
}

/// Carrier comes some time after a device is set up.
fn reaches(pod: &TestNetNs, there: IpAddr) -> bool {
    (0..60).any(|_| ping(pod, there, Duration::from_secs(2)).is_ok())
}

#[test]
fn pods_get_functions_talk_over_them_and_leave_them_as_they_were() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::with(2);
    let (a, b) = (guest.host.new_pod(), guest.host.new_pod());
    let first = guest.add("a", &a).unwrap();
    let second = guest.add("b", &b).unwrap();
    assert_eq!(guest.add("a", &a).unwrap(), first, "repeated");
    let port = guest.port.told(guest.vfs[0]);
    for part in ["\"vlan\":100", "\"qos\":3", "500"] {
        assert!(port.contains(part), "{part}: {port}");
    }
    let device = a.link("net1").unwrap();
    let said = &first["interfaces"][0];
    assert_eq!((said["name"].as_str(), said["mtu"].as_u64(), device.mtu), (Some("net1"), Some(1400), 1400));
    assert_eq!(said["mac"].as_str(), device.mac.map(|mac| mac.to_string()).as_deref());
    let mut checked = guest.config.clone();
    checked["prevResult"] = first.clone();
    guest.call("CHECK", "a", a.path(), &checked).unwrap();
    // Somebody on the host says otherwise, and takes it back.
    let pf = &guest.port.name;
    sh(&format!("ip link set {pf} vf 0 vlan 7 qos 3"));
    let error = guest.call("CHECK", "a", a.path(), &checked).unwrap_err();
    assert_eq!(error["code"], 120, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("vlan is "), "{error}");
    sh(&format!("ip link set {pf} vf 0 vlan 100 qos 3"));
    guest.call("CHECK", "a", a.path(), &checked).unwrap();
    // A list with another state directory neither lends it to another pod nor says that its DEL was one.
    let mut stranger = guest.config.clone();
    stranger["stateDir"] = json!(guest.host.directory().join("other"));
    stranger["runtimeConfig"] = json!({ "deviceID": guest.vfs[0].address.to_string() });
    let error = guest.call("ADD", "x", a.path(), &stranger).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("the ledger of state directory"), "{error}");
    let error = guest.call("DEL", "a", a.path(), &stranger).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("never lent it"), "{error}");
    guest.call("DEL", "x", a.path(), &stranger).unwrap();
    assert!(reaches(&a, address(&second)) && reaches(&b, address(&first)));
    let state = guest.config["stateDir"].as_str().unwrap();
    let leases = Leases::open(guest.port.kernel.clone(), Path::new(state)).unwrap();
    let before = leases.counters().unwrap();
    let names: Vec<String> = before.iter().map(|counted| counted.owner.container.to_string()).collect();
    assert_eq!(names, ["a", "b"]);
    let datagrams = 20;
    b.run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..datagrams {
            socket.send_to(&[0; 500], (address(&first), 9)).unwrap();
        }
    });
    let arrived = || {
        let now = leases.counters().unwrap();
        let grown = |n: usize| {
            let (then, now) = (before[n].by_device.unwrap(), now[n].by_device.unwrap());
            (now.received.packets - then.received.packets, now.sent.bytes - then.sent.bytes)
        };
        assert!(now.iter().all(|counted| counted.by_port.is_none()), "igb counts for ports now: {now:?}");
        grown(0).0 >= datagrams && grown(1).1 >= datagrams * 500
    };
    assert!((0..300).any(|_| arrived() || {
        std::thread::sleep(Duration::from_millis(100));
        false
    }));
    // There are two.
    let c = guest.host.new_pod();
    let error = guest.add("c", &c).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("1 virtual functions are wanted and 0 are free"), "{error}");
    // What the pod's root did to it goes, and so does what a namespace that ends brings back.
    a.sh("ip link set net1 down; ip link set net1 name mine mtu 1300; ip link set mine alias tenants promisc on up");
    guest.del("a", a.path()).unwrap();
    drop(b);
    guest.del("b", Path::new("")).unwrap();
    guest.del("b", Path::new("")).unwrap();
    guest.assert_home("all are gone");
    // The runtime names one; a DEL of who had it before does nothing to it.
    let mut config = guest.config.clone();
    config["runtimeConfig"] = json!({ "deviceID": guest.vfs[1].address.to_string() });
    guest.call("ADD", "c", c.path(), &config).unwrap();
    guest.del("a", a.path()).unwrap();
    guest.del("b", Path::new("")).unwrap();
    assert!(c.link("net1").is_some());
    assert_eq!(guest.not_home().len(), 1);
    // GC, by a runtime that knows of nobody.
    let mut config = guest.config.clone();
    config["cni.dev/valid-attachments"] = json!([]);
    guest.call("GC", "c", c.path(), &config).unwrap();
    guest.assert_home("collected");
}

/// The twin reaches whom the other may not, and what is left before the DEL is not clean.
#[test]
fn a_pod_under_policy_reaches_whom_it_may_and_killed_half_way_leaves_its_function_clean() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::under_policy(4);
    let pods: Vec<TestNetNs> = (0..4).map(|_| guest.host.new_pod()).collect();
    if kernel_is_before(6, 6) {
        // Without tcx nothing holds programs on a device in a pod out of the pod's reach.
        let error = guest.labelled("a", &pods[0], "db").unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains("tcx"), "{error}");
        guest.del("a", pods[0].path()).unwrap();
        guest.assert_home("refused");
        return;
    }
    let added: Vec<Value> = [("a", "db"), ("b", "db"), ("c", "web"), ("d", "web")]
        .iter()
        .zip(&pods)
        .map(|((name, app), pod)| guest.labelled(name, pod, app).unwrap())
        .collect();
    assert!(reaches(&pods[0], address(&added[1])), "a may reach b");
    assert!(reaches(&pods[3], address(&added[2])), "d may reach c");
    for (from, to) in [(0, 2), (2, 0), (3, 1)] {
        let answer = ping(&pods[from], address(&added[to]), Duration::from_secs(5));
        assert!(answer.is_err(), "pod {from} reaches pod {to}");
    }
    for (n, name) in ["a", "b", "c", "d"].iter().enumerate() {
        guest.del(name, pods[n].path()).unwrap();
    }
    guest.assert_home("all are gone");

    let (mut kills, mut unclean, mut calls) = (0, 0, 1);
    // Half way and elsewhere, until one comes to its end.
    while guest.dies("ADD", "a", pods[0].path(), calls) {
        kills += 1;
        unclean += u32::from(!guest.not_home().is_empty());
        guest.del("a", pods[0].path()).unwrap();
        guest.assert_home(&format!("ADD killed after call {calls}"));
        calls += effort(9, 3, 1);
    }
    eprintln!("under policy: {kills} kills, {unclean} unclean before DEL");
    assert!(kills > 3 && unclean * 3 > kills, "{kills} kills, {unclean} unclean");
    guest.del("a", pods[0].path()).unwrap();
    guest.assert_home("the last one lived");
    let owner = guest.owner.as_ref().unwrap();
    assert!(owner.endpoints().is_empty(), "{:?}", owner.endpoints());
    let left: Vec<String> = owner.pins().into_iter().filter(|pin| pin.starts_with("tcx-")).collect();
    assert_eq!(left, [""; 0]);
}

/// In ADD and in DEL; the next call is a DEL or a GC. The twin is what is there before it.
#[test]
fn a_kill_after_any_call_leaves_nothing_after_the_next() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::with(1);
    let (mut kills, mut unclean) = (0, 0);
    for verb in ["ADD", "DEL"] {
        let mut calls = 1;
        loop {
            let pod = guest.host.new_pod();
            if verb == "DEL" {
                guest.add("a", &pod).unwrap();
            }
            let died = guest.dies(verb, "a", pod.path(), calls);
            unclean += u32::from(died && !guest.not_home().is_empty());
            drop(pod);
            // The pod's namespace is gone.
            if verb == "ADD" && kills % 2 == 1 {
                let mut config = guest.config.clone();
                config["cni.dev/valid-attachments"] = json!([]);
                guest.call("GC", "a", Path::new(""), &config).unwrap();
                guest.assert_free(&format!("collected after call {calls}"));
            }
            // After a GC too: an empty record is nobody's until then.
            guest.del("a", Path::new("")).unwrap();
            guest.assert_home(&format!("{verb} killed after call {calls}"));
            if !died {
                break;
            }
            kills += 1;
            calls += effort(5, 2, 1);
        }
    }
    eprintln!("{kills} kills, {unclean} unclean before the next DEL");
    assert!(kills > 8 && unclean * 3 > kills, "{kills} kills, {unclean} unclean");
}
