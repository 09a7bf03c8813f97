//! A node with pods, and the plugin run on it.

#![allow(dead_code, reason = "each test program uses a part of it")]

mod policy;

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dcenet_core::test_support::{HostState, Rung, TestHost, TestNetNs, ping, require_with};
use dcenet_ipam::Ipam;
use dcenet_ipam::config::IpamConfig;
use dcenet_ipam::model::Binding;
use serde_json::{Value, json};

pub use self::policy::Owner;

/// A host and the network configuration that its runtime has.
pub struct Node {
    /// Who decides for its pods, where somebody does. Goes before the host.
    pub owner: Option<Owner>,
    /// The network configuration.
    pub config: Value,
    /// The host.
    pub host: TestHost,
}

/// A pod: a namespace and the names by which the runtime knows it.
pub struct Pod {
    pub container: String,
    pub name: String,
    pub netns: TestNetNs,
}

impl Node {
    pub fn new() -> Self {
        let host = TestHost::new();
        let config = json!({
            "cniVersion": "1.1.0", "name": "shop", "type": "dcenet",
            "link": { "kind": "bridge", "bridge": "dc0", "isGateway": true },
            "ipam": {
                "type": "dcenet",
                "pools": [
                    {
                        "name": "v4", "subnet": "10.20.0.0/24", "gateway": "10.20.0.1",
                        "claims": { "shop/db": { "address": "10.20.0.77", "keep": "forever" } },
                    },
                    { "name": "v6", "subnet": "2001:db8:20::/64", "gateway": "2001:db8:20::1" },
                ],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
            "stateDir": host.directory().join("state"), "runDir": host.run_dir(),
        });
        Self { owner: None, config, host }
    }

    /// Lets a first pod come and go: the bridge that it made stays, as it does on a real host.
    pub fn warm(&self) {
        let pod = self.pod("first");
        self.add(&pod).expect("the first pod is added");
        self.del(&pod).expect("the first pod is deleted");
    }

    /// Puts a plugin where the node finds it before Debian's. A child writes it: what a process has open for writing cannot be
    /// executed, nor can it while a child that another test's thread forks meanwhile has the descriptor too.
    pub fn install(&self, name: &str, script: &str) {
        let directory = self.host.directory().join("bin");
        std::fs::create_dir_all(&directory).expect("the directory is ours");
        let mut writer = Command::new("/bin/sh");
        writer.args(["-c", "cat >\"$1\" && chmod 755 \"$1\"", "sh"]).arg(directory.join(name));
        let mut writer = writer.stdin(Stdio::piped()).spawn().expect("sh starts");
        writer.stdin.take().expect("stdin is piped").write_all(script.as_bytes()).expect("it reads");
        assert!(writer.wait().expect("it ends").success(), "{name} is written");
    }

    /// A pod of the namespace `shop`, in a new container.
    pub fn pod(&self, name: &str) -> Pod {
        static COUNT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Pod { container: format!("{name}-{n}"), name: name.to_owned(), netns: self.host.new_pod() }
    }

    pub fn add(&self, pod: &Pod) -> Result<Value, Value> {
        self.call("ADD", pod, &self.config.to_string())
    }

    pub fn del(&self, pod: &Pod) -> Result<Value, Value> {
        self.call("DEL", pod, &self.config.to_string())
    }

    pub fn del_without_namespace(&self, pod: &Pod) -> Result<Value, Value> {
        self.run("DEL", Some(pod), Some("".as_ref()), &self.config.to_string())
    }

    pub fn check(&self, pod: &Pod, result: &Value) -> Result<Value, Value> {
        let mut config = self.config.clone();
        config["prevResult"] = result.clone();
        self.call("CHECK", pod, &config.to_string())
    }

    pub fn status(&self) -> Result<Value, Value> {
        self.run("STATUS", None, None, &self.config.to_string())
    }

    pub fn gc(&self, valid: Option<&[&Pod]>) -> Result<Value, Value> {
        let config = valid.map_or_else(|| self.config.clone(), |valid| self.config_for_gc(valid));
        self.run("GC", None, None, &config.to_string())
    }

    /// The configuration that GC gets where these attachments are valid.
    pub fn config_for_gc(&self, valid: &[&Pod]) -> Value {
        let list: Vec<_> = valid.iter().map(|p| json!({ "containerID": p.container, "ifname": "eth0" })).collect();
        let mut config = self.config.clone();
        config["cni.dev/valid-attachments"] = json!(list);
        config
    }

    /// Runs a verb with a fault as `DCENET_FAULT` takes it.
    pub fn faulted(&self, verb: &str, pod: Option<&Pod>, config: &Value, fault: &str) -> Faulted {
        let log = self.host.directory().join("fault");
        let mut command = self.command(verb, pod, None);
        command.env("DCENET_FAULT", fault).env("DCENET_FAULT_LOG", &log).stderr(Stdio::null());
        let outcome = self.host.root().run(|| Running::start(command, &config.to_string()).wait());
        let met = std::fs::read_to_string(&log).ok().map(|line| line.trim().to_owned());
        if met.is_some() {
            std::fs::remove_file(&log).expect("the log is ours");
        }
        Faulted { met, outcome }
    }

    /// Starts a verb without waiting for its end.
    pub fn start(&self, verb: &str, pod: &Pod) -> Running {
        let command = self.command(verb, Some(pod), None);
        self.host.root().run(|| Running::start(command, &self.config.to_string()))
    }

    /// Starts a verb that stops before its call of this number, if it makes so many.
    pub fn start_to_stop(&self, verb: &str, pod: &Pod, call: usize) -> Running {
        let mut command = self.command(verb, Some(pod), None);
        command.env("DCENET_FAULT", format!("stop:{call}"));
        self.host.root().run(|| Running::start(command, &self.config.to_string()))
    }

    /// The store, opened as the plugin does.
    pub fn ipam(&self) -> Ipam {
        let config: IpamConfig = serde_json::from_value(self.config["ipam"].clone()).expect("the section is right");
        let state: PathBuf = self.config["stateDir"].as_str().expect("a path").into();
        Ipam::open(&config, &state).expect("the store opens")
    }

    /// Who has which address, and what claims record, as lines of text in order.
    pub fn store(&self) -> Vec<String> {
        self.store_of(&self.config)
    }

    /// As [`store`](Self::store), by the section `ipam` of this configuration.
    pub fn store_of(&self, config: &Value) -> Vec<String> {
        let section: IpamConfig = serde_json::from_value(config["ipam"].clone()).expect("the section is right");
        let state: PathBuf = config["stateDir"].as_str().expect("a path").into();
        let ipam = Ipam::open(&section, &state).expect("the store opens");
        let bindings = pollster::block_on(ipam.bindings(None)).expect("the store answers");
        let bound = |b: &Binding| format!("{} has {}", b.attachment, b.address);
        let mut lines: Vec<String> = bindings.iter().map(bound).collect();
        let claims = pollster::block_on(ipam.claims()).expect("the store answers");
        lines.extend(claims.iter().map(|c| format!("claim {} of {}: {:?}", c.claim.key, c.pool, c.claim.address)));
        // Counted from the other side, that of the addresses: both must agree.
        let usage = pollster::block_on(ipam.usage()).expect("the store answers");
        assert_eq!(usage.iter().map(|u| u.bound).sum::<u128>(), bindings.len() as u128, "{lines:?}");
        lines.sort();
        lines
    }

    pub fn call(&self, verb: &str, pod: &Pod, stdin: &str) -> Result<Value, Value> {
        self.run(verb, Some(pod), None, stdin)
    }

    /// With further pairs in `CNI_ARGS`.
    pub fn add_asking(&self, pod: &Pod, config: &Value, args: &str) -> Result<Value, Value> {
        let mut command = self.command("ADD", Some(pod), None);
        command.env("CNI_ARGS", format!("{};{args}", pod.args()));
        self.host.root().run(|| execute(command, &config.to_string()))
    }

    /// For another interface of the pod than its first.
    pub fn call_for(&self, verb: &str, pod: &Pod, ifname: &str, config: &Value) -> Result<Value, Value> {
        let mut command = self.command(verb, Some(pod), None);
        command.env("CNI_IFNAME", ifname);
        self.host.root().run(|| execute(command, &config.to_string()))
    }

    /// With another path in the place of the pod's namespace.
    pub fn call_at(&self, verb: &str, pod: &Pod, netns: &Path) -> Result<Value, Value> {
        self.run(verb, Some(pod), Some(netns), &self.config.to_string())
    }

    fn run(&self, verb: &str, pod: Option<&Pod>, netns: Option<&Path>, stdin: &str) -> Result<Value, Value> {
        let command = self.command(verb, pod, netns);
        self.host.root().run(|| execute(command, stdin))
    }

    fn command(&self, verb: &str, pod: Option<&Pod>, netns: Option<&Path>) -> Command {
        let mut command = plugin();
        // A test's own plugins go before Debian's.
        command.env("CNI_PATH", format!("{}:/usr/lib/cni", self.host.directory().join("bin").display()));
        command.env("CNI_COMMAND", verb);
        if let Some(pod) = pod {
            command
                .env("CNI_CONTAINERID", &pod.container)
                .env("CNI_NETNS", netns.unwrap_or(pod.netns.path()))
                .env("CNI_IFNAME", "eth0")
                .env("CNI_ARGS", pod.args());
        }
        command
    }
}

/// A verb that met a fault, or made too few calls to meet it.
#[derive(Debug)]
pub struct Faulted {
    /// Number and name of the call that failed.
    pub met: Option<String>,
    /// What came of the verb; `None` where its process died.
    pub outcome: Option<Result<Value, Value>>,
}

/// The plugin at work.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Starts a plugin in the calling thread's namespace.
    pub fn start(mut command: Command, stdin: &str) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the plugin starts");
        // A plugin that refuses the environment, or dies, may be gone before it has read.
        let _ = child.stdin.take().expect("stdin is piped").write_all(stdin.as_bytes());
        Self(child)
    }

    /// Its process.
    pub fn id(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.0)
    }

    /// Waits until it is stopped, or has ended. Returns whether it is stopped.
    pub fn is_stopped(&mut self) -> bool {
        let options = rustix::process::WaitIdOptions::STOPPED
            | rustix::process::WaitIdOptions::EXITED
            | rustix::process::WaitIdOptions::NOWAIT;
        let status =
            rustix::process::waitid(rustix::process::WaitId::Pid(self.id()), options).expect("the child is ours");
        status.expect("it was waited for").stopped()
    }

    /// Has it continue.
    pub fn resume(&self) {
        rustix::process::kill_process(self.id(), rustix::process::Signal::CONT).expect("the child is ours");
    }

    /// Kills it, unless it has ended.
    pub fn kill(&mut self) {
        self.0.kill().expect("the child is ours");
    }

    /// Its answer; `None` where it was killed before it had one.
    pub fn wait(mut self) -> Option<Result<Value, Value>> {
        let mut bytes = Vec::new();
        self.0.stdout.take().expect("stdout is piped").read_to_end(&mut bytes).expect("stdout can be read");
        let status = self.0.wait().expect("the plugin ends");
        if status.signal().is_some() && bytes.is_empty() {
            return None;
        }
        let answer = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes).expect("stdout holds one JSON object")
        };
        // Killed between its answer and its end: the answer holds.
        let failed = !status.success() && status.signal().is_none() || answer.get("code").is_some();
        Some(if failed { Err(answer) } else { Ok(answer) })
    }
}

impl Pod {
    /// `CNI_ARGS` as a Kubernetes runtime gives them.
    pub fn args(&self) -> String {
        format!("K8S_POD_NAME={};IgnoreUnknown=1;X=y;K8S_POD_NAMESPACE=shop", self.name)
    }

    pub fn state(&self) -> HostState {
        HostState::capture(self.netns.netns())
    }

    /// Proves that the address answers.
    pub fn ping(&self, address: &str) {
        ping(&self.netns, address.parse().unwrap(), Duration::from_secs(3))
            .unwrap_or_else(|e| panic!("{} cannot reach {address}: {e}", self.name));
    }

    /// Removes the namespace as a runtime does, path and all.
    pub fn remove_namespace(&self) {
        let status = Command::new("umount").arg("-l").arg(self.netns.path()).status().expect("umount runs");
        assert!(status.success());
        std::fs::remove_file(self.netns.path()).expect("the mount point is a file");
    }
}

fn plugin() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dcenet"));
    command.env_clear().env("CNI_PATH", "/usr/lib/cni");
    command
}

fn execute(command: Command, stdin: &str) -> Result<Value, Value> {
    Running::start(command, stdin).wait().expect("the plugin is not killed")
}

/// Runs the plugin where it may touch nothing: for calls that need no host.
pub fn run_anywhere(environment: &[(&str, &str)], stdin: &str) -> Result<Value, Value> {
    start_anywhere(environment, stdin).wait().expect("the plugin is not killed")
}

/// Starts the plugin in the namespace of the calling thread.
pub fn start_anywhere(environment: &[(&str, &str)], stdin: &str) -> Running {
    let mut command = plugin();
    command.envs(environment.iter().copied());
    Running::start(command, stdin)
}

/// Whether a test can run that makes namespaces and reads nftables by nft(8).
pub fn has_nft() -> bool {
    require_with(Rung::Netns, || {
        let missing = Command::new("nft").arg("--version").output().is_err();
        missing.then(|| "nft is missing: install nftables".to_owned())
    })
}

/// The elements of the sets and maps of our nftables table, as nft(8) prints them, each with its set's name; in order.
pub fn elements(node: &Node) -> Vec<String> {
    let listed: Value = serde_json::from_str(&node.host.root().sh("nft -j list ruleset")).expect("nft prints JSON");
    let objects = listed["nftables"].as_array().expect("a list").iter();
    let sets = objects.filter_map(|o| o.get("set").or(o.get("map"))).filter(|set| set["table"] == "dcenet");
    let mut lines: Vec<String> = sets
        .flat_map(|set| {
            let name = set["name"].as_str().expect("a set has a name");
            set["elem"].as_array().into_iter().flatten().map(move |element| format!("{name} {element}"))
        })
        .collect();
    lines.sort();
    lines
}
