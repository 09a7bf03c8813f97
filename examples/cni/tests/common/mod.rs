//! A node with pods, and the plugin run on it.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use dcenet_core::test_support::{HostState, TestHost, TestNetNs, ping};
use serde_json::{Value, json};

/// A host and the network configuration that its runtime has.
pub struct Node {
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
        Self { config, host }
    }

    /// Lets a first pod come and go: the bridge that it made stays, as it does on a real host.
    pub fn warm(&self) {
        let pod = self.pod("first");
        self.add(&pod).expect("the first pod is added");
        self.del(&pod).expect("the first pod is deleted");
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
        let mut config = self.config.clone();
        if let Some(valid) = valid {
            let list: Vec<_> = valid.iter().map(|p| json!({ "containerID": p.container, "ifname": "eth0" })).collect();
            config["cni.dev/valid-attachments"] = json!(list);
        }
        self.run("GC", None, None, &config.to_string())
    }

    pub fn call(&self, verb: &str, pod: &Pod, stdin: &str) -> Result<Value, Value> {
        self.run(verb, Some(pod), None, stdin)
    }

    /// With another path in the place of the pod's namespace.
    pub fn call_at(&self, verb: &str, pod: &Pod, netns: &Path) -> Result<Value, Value> {
        self.run(verb, Some(pod), Some(netns), &self.config.to_string())
    }

    fn run(&self, verb: &str, pod: Option<&Pod>, netns: Option<&Path>, stdin: &str) -> Result<Value, Value> {
        let mut command = plugin();
        command.env("CNI_COMMAND", verb);
        if let Some(pod) = pod {
            command
                .env("CNI_CONTAINERID", &pod.container)
                .env("CNI_NETNS", netns.unwrap_or(pod.netns.path()))
                .env("CNI_IFNAME", "eth0")
                .env("CNI_ARGS", format!("K8S_POD_NAME={};IgnoreUnknown=1;X=y;K8S_POD_NAMESPACE=shop", pod.name));
        }
        self.host.root().run(|| execute(command, stdin))
    }
}

impl Pod {
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

fn execute(mut command: Command, stdin: &str) -> Result<Value, Value> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the plugin starts");
    // A plugin that refuses the environment may be gone before it has read.
    let _ = child.stdin.take().expect("stdin is piped").write_all(stdin.as_bytes());
    let output = child.wait_with_output().expect("the plugin ends");
    let answer = match output.stdout.as_slice() {
        [] => Value::Null,
        bytes => serde_json::from_slice(bytes).expect("stdout holds one JSON object"),
    };
    if output.status.success() { Ok(answer) } else { Err(answer) }
}

/// Runs the plugin where it may touch nothing: for calls that need no host.
pub fn run_anywhere(environment: &[(&str, &str)], stdin: &str) -> Result<Value, Value> {
    let mut command = plugin();
    command.envs(environment.iter().copied());
    execute(command, stdin)
}
