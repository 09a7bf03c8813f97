//! containerd (Debian's 1.6) with runc, driven through its Container Runtime Interface as kubelet does.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, TestHost, effort, require};
use serde_json::{Value, json};

use crate::common::{Node, has_nft, run_anywhere};
use crate::cri::{Client, LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata, PortMapping};
use crate::killed::{descendants, ours};
use crate::machine::{IMAGE, Machine};
use crate::podman::Podman;
use crate::{has, podman};

/// How long anything may take on a machine that is busy with much else.
const LONG: Duration = Duration::from_secs(120);

fn is_here() -> bool {
    let programs = [("containerd", "containerd"), ("runc", "runc"), ("busybox", "busybox-static")];
    has(&programs) && has(&[("/usr/lib/cni/loopback", "containernetworking-plugins")]) && has_nft()
}

/// A machine with containerd, whose network is ours. The machine ends its processes.
pub struct Containerd {
    /// It goes with the machine, but is waited for by us.
    process: Child,
    machine: Machine,
    /// What outlives a restart of the machine.
    root: PathBuf,
    capabilities: Value,
}

impl Containerd {
    /// Pods have our network, whose plugin declares these capabilities.
    fn start(node: Node, capabilities: &Value) -> Self {
        let root = node.host.directory().join("containerd");
        Self::start_with(Machine::new(node), root, capabilities)
    }

    /// What is in `root` was left by another before.
    fn start_with(machine: Machine, root: PathBuf, capabilities: &Value) -> Self {
        let lists = machine.write_list(capabilities);
        let directory = machine.directory();
        // What a machine without the right to raise limits, and without a registry, needs.
        let config = format!(
            "version = 2\nroot = {root:?}\nstate = \"/run/containerd\"\n\
             [grpc]\naddress = {:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{IMAGE}\"\ndisable_apparmor = true\n\
             restrict_oom_score_adj = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = {:?}\nconf_dir = {lists:?}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
            directory.join("containerd.sock"),
            machine.plugins(),
            // Which it makes, and everybody's `/opt` is not the place.
            directory.join("opt")
        );
        std::fs::write(directory.join("containerd.toml"), config).unwrap();
        let process = launch(&machine);
        let containerd = Self { process, machine, root, capabilities: capabilities.clone() };
        containerd.await_ready();
        assert!(containerd.machine.directory().join("opt").is_dir(), "{}", containerd.log());
        containerd
    }

    /// Ends the machine without a word to any plugin, and starts another with what was on its disk: pods as containerd
    /// knows them, and leases. Namespaces, devices and what was below `/run` are gone. The first one's directory goes with it.
    fn reboot(mut self) -> (Self, Self) {
        self.machine.end();
        let mut node = Node { owner: None, host: TestHost::new(), config: self.machine.node.config.clone() };
        node.config["runDir"] = json!(node.host.run_dir());
        let after = Self::start_with(Machine::new(node), self.root.clone(), &self.capabilities);
        (self, after)
    }

    /// Starts it anew on the same machine, where it was killed.
    fn restart(&mut self) {
        self.process.wait().expect("it can be waited for");
        self.process = launch(&self.machine);
        self.await_ready();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.machine.directory().join("containerd.log")).unwrap_or_default()
    }

    fn await_ready(&self) {
        let begun = Instant::now();
        let until = |ready: &mut dyn FnMut() -> bool| {
            while !ready() {
                assert!(begun.elapsed() < LONG, "containerd is not ready: {}", self.log());
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        until(&mut || Client::connect(&self.socket()).is_ok_and(|mut client| client.is_ready()));
        let mut import = self.machine.command("ctr");
        import.arg("-a").arg(self.socket()).args(["-n", "k8s.io", "image", "import"]).arg(self.machine.image());
        let output = import.output().expect("nsenter starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut client = self.client();
        // Which it hears by an event of its own.
        until(&mut || client.has_image(IMAGE));
    }

    fn socket(&self) -> PathBuf {
        self.machine.directory().join("containerd.sock")
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket()).unwrap_or_else(|error| panic!("{error}: {}", self.log()))
    }

    /// A pod of the namespace `shop`.
    fn pod(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "shop".to_owned(),
            }),
            port_mappings: Vec::new(),
            annotations: HashMap::new(),
            linux: Some(LinuxPodSandboxConfig { cgroup_parent: self.machine.cgroup() }),
        }
    }

    fn remove(&self, client: &mut Client, pod: &str) {
        let removed = client.stop(pod).and_then(|()| client.remove(pod));
        removed.unwrap_or_else(|error| panic!("{error}: {}", self.log()));
    }
}

fn launch(machine: &Machine) -> Child {
    let directory = machine.directory();
    let log = File::create(directory.join("containerd.log")).unwrap();
    let mut command = machine.server("containerd");
    command.arg("-c").arg(directory.join("containerd.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("nsenter starts")
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.machine.end();
        if let Err(error) = self.process.wait() {
            eprintln!("cannot wait for containerd: {error}");
        }
    }
}

fn node() -> Node {
    let mut node = Node::new();
    node.config["nat"] = json!({ "masquerade": true });
    node.config["ipam"]["cooldown"] = json!("0s");
    node
}

/// Pods of which a first one has come and gone: the bridge and our table of translations stay.
fn warm() -> Containerd {
    let containerd = Containerd::start(node(), &json!({ "portMappings": true }));
    let mut client = containerd.client();
    let first = client.run_pod(&containerd.pod("first")).unwrap();
    containerd.remove(&mut client, &first);
    containerd
}

#[test]
fn pods_talk_have_ports_of_the_host_and_go() {
    if !is_here() {
        return;
    }
    let containerd = warm();
    let (mut client, before) = (containerd.client(), containerd.machine.traces());
    let mut config = containerd.pod("web");
    config.port_mappings.push(PortMapping { container_port: 80, host_port: 8080 });
    let web = client.run_pod(&config).unwrap();
    let inside = client.start(&web, &config, IMAGE, &["/bin/httpd", "-f", "-h", "/www"]).unwrap();
    let other_config = containerd.pod("client");
    let other = client.run_pod(&other_config).unwrap();
    let other_inside = client.start(&other, &other_config, IMAGE, &["/bin/sleep", "1000000"]).unwrap();

    let [addresses, others] = [&web, &other].map(|pod| client.addresses(pod).unwrap());
    let shown = client.exec(&inside, &["ip", "addr", "show", "eth0"]).unwrap();
    assert_eq!(addresses.len(), 2);
    assert!(addresses.iter().all(|address| shown.contains(&format!(" {address}/"))), "{addresses:?}: {shown}");
    for (from, to) in [(&inside, &others), (&other_inside, &addresses)] {
        for address in to {
            client.exec(from, &["ping", "-c1", "-W20", address]).unwrap();
        }
    }
    for url in [format!("http://{}/", addresses[0]), "http://10.20.0.1:8080/".to_owned()] {
        assert_eq!(client.exec(&other_inside, &["wget", "-qO-", &url]).unwrap(), "hello\n");
    }
    let answer = containerd.machine.node.host.root().run(|| {
        let mut stream = TcpStream::connect_timeout(&"127.0.0.1:8080".parse().unwrap(), LONG)?;
        stream.set_read_timeout(Some(LONG))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    });
    assert!(answer.as_ref().is_ok_and(|text| text.ends_with("hello\n")), "{answer:?}");

    containerd.remove(&mut client, &web);
    containerd.remove(&mut client, &other);
    assert_eq!(containerd.machine.traces(), before);
    // The workload's name reaches the plugin: the claim that the configuration has for it holds, from pod to pod.
    for _ in 0..2 {
        let db = client.run_pod(&containerd.pod("db")).unwrap();
        assert_eq!(client.addresses(&db).unwrap()[0], "10.20.0.77");
        containerd.remove(&mut client, &db);
    }
}

#[test]
fn twenty_pods_come_and_go_twice_and_nothing_is_left() {
    if !is_here() {
        return;
    }
    let containerd = warm();
    let before = containerd.machine.traces();
    let some = |names: std::ops::Range<usize>| {
        let mut client = containerd.client();
        let pods = names.map(|i| client.run_pod(&containerd.pod(&format!("pod{i}"))).unwrap());
        pods.collect::<Vec<_>>()
    };
    for _ in 0..2 {
        let pods: Vec<Vec<String>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|i| scope.spawn(move || some(i * 5..i * 5 + 5))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a pod runs")).collect()
        });
        let mut client = containerd.client();
        let addresses: BTreeSet<_> = pods.iter().flatten().flat_map(|pod| client.addresses(pod).unwrap()).collect();
        assert_eq!(addresses.len(), 40, "{addresses:?}");
        std::thread::scope(|scope| {
            for pods in &pods {
                let containerd = &containerd;
                scope.spawn(move || {
                    let mut client = containerd.client();
                    pods.iter().for_each(|pod| containerd.remove(&mut client, pod));
                });
            }
        });
        assert_eq!(containerd.machine.traces(), before);
    }
}

/// The twin of the others: what is left where DEL does nothing, which GC takes away.
#[test]
fn without_del_pods_leave_what_gc_collects() {
    if !is_here() {
        return;
    }
    let mut containerd = warm();
    let before = containerd.machine.traces();
    containerd.machine.lose_del();
    let mut client = containerd.client();
    let mut config = containerd.pod("web");
    config.port_mappings.push(PortMapping { container_port: 80, host_port: 8080 });
    let web = client.run_pod(&config).unwrap();
    containerd.remove(&mut client, &web);
    let left: Vec<String> = containerd.machine.traces().difference(&before).cloned().collect();
    for kind in ["record ", "store ", "translation "] {
        assert!(left.iter().any(|line| line.starts_with(kind)), "{kind}: {left:?}");
    }
    let machine = &mut containerd.machine;
    machine.node.config["cniVersion"] = json!("1.1.0");
    let kept = machine.node.pod("kept");
    machine.node.gc(Some(&[&kept])).unwrap();
    assert_eq!(machine.traces(), before);
}

/// containerd tells a plugin the pod's namespace and name, and its annotations where the plugin declares that capability,
/// but no labels: those are of the configuration.
#[test]
fn pods_are_under_policy_from_their_first_packet_on() {
    if !is_here() || !require(Rung::Kernel) {
        return;
    }
    let mut node = Node::under_policy();
    node.config["ipam"]["cooldown"] = json!("0s");
    let containerd = Containerd::start(node, &json!({}));
    let mut client = containerd.client();
    let mut pods = Vec::new();
    for name in ["db", "replica"] {
        let config = containerd.pod(name);
        let pod = client.run_pod(&config).unwrap();
        let inside = client.start(&pod, &config, IMAGE, &["/bin/httpd", "-f", "-h", "/www"]).unwrap();
        pods.push((pod, inside));
    }
    let node = &containerd.machine.node;
    let endpoints = || node.policy().into_iter().filter(|line| line.starts_with("endpoint ")).collect::<Vec<_>>();
    assert_eq!(endpoints().len(), 2, "{:?}", endpoints());
    // Somebody on the same bridge who is no workload of the policy.
    let stranger = node.pod("stranger");
    let mut conf = node.config.clone();
    for key in ["policy", "args"] {
        conf.as_object_mut().unwrap().remove(key);
    }
    conf["name"] = json!("others");
    conf["ipam"]["pools"] =
        json!([{ "name": "others", "subnet": "10.20.0.0/24", "ranges": ["10.20.0.200-10.20.0.210"] }]);
    conf["stateDir"] = json!(node.host.directory().join("others"));
    node.call("ADD", &stranger, &conf.to_string()).unwrap();
    let reaches =
        |limit| stranger.netns.run(|| TcpStream::connect_timeout(&"10.20.0.77:80".parse().unwrap(), limit)).is_ok();
    assert_eq!(client.exec(&pods[1].1, &["wget", "-qO-", "http://10.20.0.77/"]).unwrap(), "hello\n");
    assert!(!reaches(Duration::from_secs(1)));
    // The twin: with the classifiers gone it is heard.
    let devices = node.policy().into_iter().filter(|l| l.contains(" ingress ")).collect::<Vec<_>>();
    assert_eq!(devices.len(), 2, "{devices:?}");
    for line in &devices {
        node.host.root().sh(&format!("tc qdisc del dev {} clsact", line.split(' ').next().unwrap()));
    }
    assert!(reaches(LONG));
    node.call("DEL", &stranger, &conf.to_string()).unwrap();
    for (pod, _) in &pods {
        containerd.remove(&mut client, pod);
    }
    assert_eq!(endpoints(), [""; 0]);
    assert_eq!(node.host.records(), [""; 0]);
}

/// containerd is killed while its plugin attaches a pod, which goes on, or right afterwards, and started anew. The pods that it
/// knows then are removed, and GC called: nothing of ours is left.
#[test]
fn what_killed_containerds_leave_goes_by_del_or_gc() {
    if !is_here() {
        return;
    }
    let mut containerd = warm();
    let before = ours(&containerd.machine);
    // The bridge stays for those who are left.
    let node = &containerd.machine.node;
    let mut collect = node.config_for_gc(&[&node.pod("kept")]);
    collect["cniVersion"] = json!("1.1.0");
    let (mut unclean, mut by_gc) = (0u32, 0u32);
    let kills: u32 = effort(1, 3, 30);
    for n in 0..kills {
        let (config, mut client) = (containerd.pod(&format!("killed{n}")), containerd.client());
        let asking = std::thread::spawn(move || client.run_pod(&config));
        // When the plugin is seen at work, when it has begun to write down what it does, or some time after that.
        let is_due = || match n % 3 {
            0 => descendants(containerd.process.id()).iter().any(|process| process.is_called("dcenet")),
            _ => !containerd.machine.node.host.records().is_empty(),
        };
        while !is_due() && !asking.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if n % 3 == 2 {
            std::thread::sleep(Duration::from_millis(5) * n);
        }
        let below = descendants(containerd.process.id());
        // A child of its own bears its name until it executes something else; who is below comes before.
        let server = below.iter().rfind(|process| process.is_called("containerd"));
        server.unwrap_or_else(|| panic!("{}", containerd.log())).kill();
        // The answer that nobody gave, or one that came before.
        drop(asking.join().expect("it does not panic"));
        let deadline = Instant::now() + LONG;
        while below.iter().any(|process| process.is_called("dcenet")) {
            assert!(Instant::now() < deadline, "the plugin does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        unclean += u32::from(ours(&containerd.machine) != before);
        containerd.restart();
        let mut client = containerd.client();
        for pod in client.pods().unwrap() {
            containerd.remove(&mut client, &pod);
        }
        by_gc += u32::from(ours(&containerd.machine) != before);
        let root = containerd.machine.node.host.root();
        root.run(|| run_anywhere(&[("CNI_COMMAND", "GC")], &collect.to_string())).unwrap();
        assert_eq!(ours(&containerd.machine), before, "killed{n}");
    }
    println!("{kills} killed, {unclean} of them unclean before DEL, {by_gc} after it");
    // The twin: there was something to remove.
    assert!(unclean > 0, "{unclean} of {kills} were unclean");
}

/// The meta role, asked by the annotation that containerd hands on.
#[test]
fn a_pod_gets_the_networks_that_its_annotation_names() {
    if !is_here() {
        return;
    }
    let mut node = node();
    let definitions = node.host.directory().join("definitions");
    std::fs::create_dir(&definitions).unwrap();
    let own = json!({ "cniVersion": "1.0.0", "type": "dcenet", "link": { "kind": "bridge", "bridge": "dc1" } });
    let definition = json!({
        "kind": "NetworkAttachmentDefinition", "metadata": { "name": "storage", "namespace": "shop" },
        "spec": { "config": own.to_string() },
    });
    std::fs::write(definitions.join("storage.json"), definition.to_string()).unwrap();
    node.config["selection"] = json!({ "definitions": definitions });
    let capability = "io.kubernetes.cri.pod-annotations";
    let containerd = Containerd::start(node, &json!({ capability: true, "portMappings": true }));
    let mut client = containerd.client();
    let mut config = containerd.pod("web");
    config.annotations.insert("k8s.v1.cni.cncf.io/networks".to_owned(), "storage@stor0".to_owned());
    let mut before = None;
    // The first makes the bridges, which stay.
    for _ in 0..2 {
        let pod = client.run_pod(&config).unwrap_or_else(|error| panic!("{error}: {}", containerd.log()));
        let inside = client.start(&pod, &config, IMAGE, &["/bin/sleep", "1000000"]).unwrap();
        let shown = client.exec(&inside, &["ip", "addr"]).unwrap();
        assert!(shown.contains(" eth0") && shown.contains(" stor0"), "{shown}");
        containerd.remove(&mut client, &pod);
        let after = containerd.machine.traces();
        assert_eq!(*before.get_or_insert_with(|| after.clone()), after);
    }
    assert_eq!(containerd.machine.node.host.records(), [""; 0]);
}

/// Who has which address, without the claims.
fn held_in(node: &Node) -> Vec<String> {
    node.store().into_iter().filter(|line| line.contains(" has ")).collect()
}

/// Namespaces, devices and records are gone, leases are not: whoever had one before keeps it until the runtime, which
/// remembers its pods too, removes them.
#[test]
fn pods_of_before_a_reboot_keep_their_addresses_until_they_are_removed() {
    if !is_here() {
        return;
    }
    let containerd = warm();
    let mut client = containerd.client();
    let old: Vec<String> = ["a", "b"].map(|name| client.run_pod(&containerd.pod(name)).unwrap()).into();
    let held = held_in(&containerd.machine.node);
    assert_eq!(held.len(), 4, "{held:?}");
    let (_gone, containerd) = containerd.reboot();
    let node = &containerd.machine.node;
    assert_eq!((node.host.records().len(), held_in(node)), (0, held.clone()));
    let mut client = containerd.client();
    let new = client.run_pod(&containerd.pod("web")).unwrap();
    let (addresses, now) = (client.addresses(&new).unwrap(), held_in(node));
    assert!(held.iter().all(|line| now.contains(line)) && now.len() == 6, "{now:?}");
    assert!(held.iter().all(|line| addresses.iter().all(|a| !line.contains(&format!("{a}/")))), "{addresses:?}");
    for pod in &old {
        containerd.remove(&mut client, pod);
    }
    assert_eq!(held_in(node).len(), 2, "{:?}", held_in(node));
    assert_eq!(node.host.records().len(), 1);
    containerd.remove(&mut client, &new);
    assert_eq!((node.host.records().len(), held_in(node).len()), (0, 0));
}

#[test]
fn two_runtimes_share_a_network() {
    if !is_here() || !podman::is_here() {
        return;
    }
    let containerd = warm();
    let Some(podman) = Podman::on(&containerd.machine) else { return };
    let before = containerd.machine.traces();
    let names: Vec<String> = (0..8).map(|i| format!("of-podman-{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for _ in 0..2 {
        let pods: Vec<String> = std::thread::scope(|scope| {
            let of_containerd = scope.spawn(|| {
                let mut client = containerd.client();
                (0..8).map(|i| client.run_pod(&containerd.pod(&format!("pod{i}"))).unwrap()).collect()
            });
            names.iter().for_each(|name| podman.start(name, &[], &[]));
            of_containerd.join().expect("pods run")
        });
        let store = held_in(&containerd.machine.node);
        let addresses: BTreeSet<&str> = store.iter().filter_map(|line| line.split(" has ").nth(1)).collect();
        assert_eq!(addresses.len(), 32, "{store:?}");
        let mut client = containerd.client();
        for address in client.addresses(&pods[0]).unwrap() {
            podman.run(&["exec", names[0], "ping", "-c1", "-W20", &address]);
        }
        std::thread::scope(|scope| {
            scope.spawn(|| podman.remove(&names));
            pods.iter().for_each(|pod| containerd.remove(&mut client, pod));
        });
        assert_eq!(containerd.machine.traces(), before);
    }
}
