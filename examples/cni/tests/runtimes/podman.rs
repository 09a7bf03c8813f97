//! podman (Debian's 4.3, the last with a CNI back end in every build).

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dcenet_core::test_support::{Rung, effort, require_with};
use serde_json::json;

use crate::common::{Node, has_nft, run_anywhere};
use crate::has;
use crate::killed::{Process, descendants, has_ended, ours};
use crate::machine::{IMAGE, Machine};

const LONG: Duration = Duration::from_secs(60);

pub fn is_here() -> bool {
    let programs = [("podman", "podman"), ("runc", "runc"), ("conmon", "conmon"), ("busybox", "busybox-static")];
    has(&programs) && has(&[("/usr/lib/cni/loopback", "containernetworking-plugins")]) && has_nft()
}

/// podman on a machine, whose default network is ours.
pub struct Podman<'a>(&'a Machine);

fn machine() -> Machine {
    let mut node = Node::new();
    node.config["nat"] = json!({ "masquerade": true });
    Machine::new(node)
}

impl<'a> Podman<'a> {
    /// None where this podman has no CNI back end, which is told.
    pub fn on(machine: &'a Machine) -> Option<Self> {
        let lists = machine.write_list(&json!({ "portMappings": true, "ips": true, "mac": true }));
        let directory = machine.directory();
        // Not all that a runtime of root's usually has can be had by this one: no higher limits than the test's own, no
        // profile of AppArmor's, which is loaded for the whole host, and no locks in /dev/shm, which is everybody's.
        let containers = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:4096\", \"nproc=1024:4096\"]\nlog_driver = \"k8s-file\"\n\
             apparmor_profile = \"unconfined\"\n\
             [network]\nnetwork_backend = \"cni\"\nnetwork_config_dir = {lists:?}\ncni_plugin_dirs = [{:?}]\n\
             default_network = \"shop\"\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nruntime = \"runc\"\nlock_type = \"file\"\n",
            machine.plugins()
        );
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = {:?}\nrunroot = \"/run/containers\"\n",
            directory.join("graph")
        );
        std::fs::write(directory.join("containers.conf"), containers).unwrap();
        std::fs::write(directory.join("storage.conf"), storage).unwrap();
        let podman = Self(machine);
        if !require_with(Rung::Services, || podman.lacks_cni()) {
            return None;
        }
        podman.run(&["load", "-qi", podman.0.image().to_str().unwrap()]);
        // The bridge and our table of translations are made by whoever comes first, and stay.
        podman.start("first", &[], &[]);
        podman.remove(&["first"]);
        Some(podman)
    }

    /// Why this podman cannot use a plugin: from version 5 on it is built with netavark alone, as a rule.
    fn lacks_cni(&self) -> Option<String> {
        match self.try_run(&["info", "--format", "{{.Host.NetworkBackend}}"]) {
            Ok(backend) if backend == "cni" => None,
            Ok(backend) => Some(format!("podman's network back end is {backend}: install one with CNI, as 4.3 is")),
            Err(error) if error.contains("cni support is not enabled") => Some(format!("podman: {}", error.trim())),
            Err(error) => panic!("podman info: {error}"),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.0.command("podman");
        command.env("CONTAINERS_CONF", self.0.directory().join("containers.conf"));
        command.env("CONTAINERS_STORAGE_CONF", self.0.directory().join("storage.conf"));
        command.args(arguments);
        command
    }

    fn try_run(&self, arguments: &[&str]) -> Result<String, String> {
        let output = self.command(arguments).output().expect("nsenter starts");
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    pub fn run(&self, arguments: &[&str]) -> String {
        self.try_run(arguments).unwrap_or_else(|error| panic!("podman {arguments:?}: {error}"))
    }

    pub fn start(&self, name: &str, options: &[&str], program: &[&str]) {
        let cgroup = self.0.cgroup();
        let arguments = [&["run", "-d", "--name", name, "--cgroup-parent", &cgroup], options, &[IMAGE], program];
        self.run(&arguments.concat());
    }

    pub fn remove(&self, names: &[&str]) {
        self.run(&[&["rm", "-f", "-t0"], names].concat());
    }

    /// Starts so many containers, a few at a time, and returns their names.
    fn start_many(&self, count: usize) -> Vec<String> {
        let names: Vec<String> = (0..count).map(|i| format!("pod{i}")).collect();
        std::thread::scope(|scope| {
            for some in names.chunks(count.div_ceil(4)) {
                scope.spawn(move || some.iter().for_each(|name| self.start(name, &[], &[])));
            }
        });
        names
    }
}

#[test]
fn a_container_has_what_was_asked_for_and_is_heard_by_others() {
    if !is_here() {
        return;
    }
    let machine = machine();
    let Some(podman) = Podman::on(&machine) else { return };
    let before = machine.traces();
    let mac = "02:00:00:00:00:50";
    let asked = ["--ip", "10.20.0.50", "--mac-address", mac, "-p", "8080:80"];
    podman.start("web", &asked, &["/bin/httpd", "-f", "-h", "/www"]);
    podman.start("client", &[], &[]);
    let shown = podman.run(&["exec", "web", "ip", "addr", "show", "eth0"]);
    assert!(shown.contains("inet 10.20.0.50/24") && shown.contains(mac), "{shown}");
    let told = podman.run(&["inspect", "web", "--format", "{{.NetworkSettings.Networks.shop.IPAddress}}"]);
    assert_eq!(told, "10.20.0.50");
    let client = podman.run(&["inspect", "client", "--format", "{{.NetworkSettings.Networks.shop.IPAddress}}"]);
    let sixth = |name| {
        let format = "{{.NetworkSettings.Networks.shop.GlobalIPv6Address}}";
        podman.run(&["inspect", name, "--format", format])
    };
    for (from, to) in [("client", "10.20.0.50"), ("web", &client), ("client", &sixth("web")), ("web", &sixth("client"))]
    {
        podman.run(&["exec", from, "ping", "-c1", "-W20", to]);
    }
    // The pod's own port, and the host's: from another pod, and from the host itself.
    for url in ["http://10.20.0.50/", "http://10.20.0.1:8080/"] {
        assert_eq!(podman.run(&["exec", "client", "wget", "-qO-", url]), "hello");
    }
    let answer = machine.node.host.root().run(|| {
        let mut stream = TcpStream::connect_timeout(&"127.0.0.1:8080".parse().unwrap(), LONG)?;
        stream.set_read_timeout(Some(LONG))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    });
    assert!(answer.as_ref().is_ok_and(|text| text.ends_with("hello\n")), "{answer:?}");
    // What somebody has nobody else gets: an address, and a port of the host.
    let error = podman.try_run(&["run", "-d", "--name", "rival", "--ip", "10.20.0.50", IMAGE]).unwrap_err();
    assert!(error.contains("10.20.0.50"), "{error}");
    podman.remove(&["rival"]);

    // It comes back as it was, within the time for which nobody else could have had the address.
    podman.run(&["restart", "-t0", "web"]);
    let again = podman.run(&["exec", "web", "ip", "addr", "show", "eth0"]);
    assert!(again.contains("inet 10.20.0.50/24") && again.contains(mac), "{again}");
    assert_eq!(podman.run(&["exec", "client", "wget", "-qO-", "http://10.20.0.1:8080/"]), "hello");

    podman.remove(&["web", "client"]);
    assert_eq!(machine.traces(), before);
}

#[test]
fn twenty_containers_come_and_go_twice_and_nothing_is_left() {
    if !is_here() {
        return;
    }
    let machine = machine();
    let Some(podman) = Podman::on(&machine) else { return };
    let before = machine.traces();
    for _ in 0..2 {
        let names = podman.start_many(20);
        let addresses: BTreeSet<String> =
            machine.node.store().iter().filter_map(|l| l.split(" has ").nth(1).map(str::to_owned)).collect();
        assert_eq!(addresses.len(), 40, "{addresses:?}");
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        podman.remove(&names);
        assert_eq!(machine.traces(), before);
    }
}

/// The twin of the others: what is left where DEL does nothing, which GC takes away.
#[test]
fn without_del_containers_leave_what_gc_collects() {
    if !is_here() {
        return;
    }
    let mut machine = machine();
    let Some(podman) = Podman::on(&machine) else { return };
    let before = machine.traces();
    machine.lose_del();
    podman.start("web", &["-p", "8080:80"], &[]);
    podman.remove(&["web"]);
    let left: Vec<String> = machine.traces().difference(&before).cloned().collect();
    for kind in ["record ", "store ", "translation "] {
        assert!(left.iter().any(|line| line.starts_with(kind)), "{kind}: {left:?}");
    }
    machine.node.config["cniVersion"] = json!("1.1.0");
    let kept = machine.node.pod("kept");
    machine.node.gc(Some(&[&kept])).unwrap();
    assert_eq!(machine.traces(), before);
}

/// podman is killed while its plugin attaches a container, which goes on, or right afterwards. Then the container is
/// removed, which podman may know nothing of, and GC called: nothing of ours is left.
#[test]
fn what_killed_podmans_leave_goes_by_del_or_gc() {
    if !is_here() {
        return;
    }
    let machine = machine();
    let Some(podman) = Podman::on(&machine) else { return };
    let (before, cgroup) = (ours(&machine), machine.cgroup());
    // The bridge stays for those who are left.
    let kept = machine.node.pod("kept");
    let mut collect = machine.node.config_for_gc(&[&kept]);
    collect["cniVersion"] = json!("1.1.0");
    let (mut killed, mut unclean, mut by_gc) = (0u32, 0u32, 0u32);
    let kills: u32 = effort(1, 6, 60);
    for n in 0..kills {
        let name = format!("killed{n}");
        let mut start =
            podman.command(&["run", "-d", "--name", &name, "--cgroup-parent", &cgroup, "-p", "8080:80", IMAGE]);
        let mut start = start.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // When the plugin is seen at work, when it has begun to write down what it does, or some time after that.
        let is_due = || match n % 3 {
            0 => descendants(start.id()).iter().any(|process| process.is_called("dcenet")),
            _ => !machine.node.host.records().is_empty(),
        };
        while !is_due() && !has_ended(start.id()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if n % 3 == 2 {
            std::thread::sleep(Duration::from_millis(5) * n);
        }
        let below = descendants(start.id());
        let podmans: Vec<&Process> = below.iter().filter(|process| process.is_called("podman")).collect();
        podmans.iter().for_each(|process| process.kill());
        start.wait().unwrap();
        let deadline = Instant::now() + LONG;
        while below.iter().any(|process| process.is_called("dcenet")) {
            assert!(Instant::now() < deadline, "the plugin does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
        killed += u32::from(!podmans.is_empty());
        unclean += u32::from(!podmans.is_empty() && ours(&machine) != before);
        // It may not know the container.
        let _ = podman.try_run(&["rm", "-f", "-t0", &name]);
        by_gc += u32::from(ours(&machine) != before);
        machine.node.host.root().run(|| run_anywhere(&[("CNI_COMMAND", "GC")], &collect.to_string())).unwrap();
        let after = ours(&machine);
        assert_eq!(after, before, "{name}");
    }
    println!("{killed} of {kills} killed, {unclean} of them unclean before DEL, {by_gc} after it");
    // The twin: there was something to remove.
    assert!(unclean > 0, "{killed} of {kills} killed, {unclean} unclean");
}
