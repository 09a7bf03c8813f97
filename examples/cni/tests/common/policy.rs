//! The owner of a node's policy state, in the test's own process.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dcenet_core::netns::Host;
use dcenet_core::test_support::TestHost;
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::attach::ClsactAttacher;
use dcenet_ebpf::loader::AyaLoader;
use dcenet_ebpf::pin::Pins;
use dcenet_policy::enforcer::{EndpointStatus, Enforcer, EnforcerConfig, Phase, Tools};
use dcenet_policy::sources::networkpolicy::from_yaml;
use dcenet_policy::target::Tc;
use serde_json::{Value, json};

use super::Node;

/// Decides for pods with the label `app: db`: they hear each other, and nobody else but their node.
pub struct Owner {
    enforcer: Enforcer,
    pins: PathBuf,
}

const POLICY: &str = r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: db, namespace: shop }
spec:
  podSelector: { matchLabels: { app: db } }
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [ { podSelector: { matchLabels: { app: db } } } ]
  egress:
  - to: [ { podSelector: { matchLabels: { app: db } } } ]
"#;

/// How long the owner may take for what takes it a moment on an idle machine.
const PATIENCE: Duration = Duration::from_secs(30);

impl Owner {
    /// So few endpoints have room that slots which are not given back are missed soon.
    pub fn open(host: &TestHost) -> Self {
        Self::open_at(host.host(), host.directory(), host.run_dir())
    }

    /// For the host with these directories.
    pub fn open_at(host: Host, directory: &Path, run_dir: PathBuf) -> Self {
        let sizes = Sizes {
            endpoints: 32,
            blocks_v4: 64,
            members_v6: 256,
            blocks_v6: 64,
            classes: 256,
            conntrack: 4096,
            conntrack_new: 4096,
            fragments: 64,
            rules: 1024,
            event_bytes: 1 << 16,
            ..Sizes::default()
        };
        let pins = Self::pins_below(directory);
        let config = EnforcerConfig {
            node: "host".to_owned(),
            node_addresses: ["10.20.0.1", "2001:db8:20::1"].map(|a| a.parse().expect("an address")).into(),
            run_dir,
            pins: pins.clone(),
        };
        let tools = Tools {
            loader: Arc::new(AyaLoader),
            attacher: Arc::new(ClsactAttacher),
            lowering: Arc::new(Tc::new(sizes)),
        };
        let enforcer = Enforcer::open(host, config, tools).expect("the owner opens");
        enforcer.set_policies(from_yaml(POLICY).expect("the policy is right")).expect("the policy is noted");
        assert!(enforcer.start().expect("the owner starts").is_complete());
        Self { enforcer, pins }
    }

    /// Where its pins are.
    pub fn pins_below(directory: &Path) -> PathBuf {
        directory.join("bpf")
    }

    /// The `policy` section of its clients, who wait for their verdicts.
    pub fn section(&self) -> Value {
        json!({ "default": "deny", "await": "30s", "pins": self.pins })
    }

    /// The endpoints that it knows, when it has nothing left to do about any.
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        let begun = Instant::now();
        loop {
            let endpoints = self.enforcer.endpoints();
            if endpoints.iter().all(|e| e.phase == Phase::Enforced && e.failure.is_none()) {
                return endpoints;
            }
            assert!(begun.elapsed() < PATIENCE, "the owner does not come to an end: {endpoints:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The names in the directory of pins.
    pub fn pins(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.pins).expect("the pins are mounted");
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // The bpffs outlives its owner, and the host's directory cannot be removed around it.
        if let Err(error) = Pins::at(&self.pins).unmount() {
            eprintln!("{error}");
        }
    }
}

impl Node {
    /// A node whose pods, all of them `app: db`, are under policy and wait for their verdicts.
    pub fn under_policy() -> Self {
        let mut node = Self::new();
        let owner = Owner::open(&node.host);
        node.config["policy"] = owner.section();
        node.config["args"] = json!({ "cni": { "labels": [{ "key": "app", "value": "db" }] } });
        node.owner = Some(owner);
        node
    }

    /// What policy there is: endpoints as the owner knows them, pins, and classifiers on the host's devices as iproute2
    /// describes them. A line of text each; none without an owner.
    pub fn policy(&self) -> Vec<String> {
        let Some(owner) = &self.owner else { return Vec::new() };
        let endpoint = |e: &EndpointStatus| format!("endpoint {} slot {:?}", e.attachment, e.slot);
        let mut lines: Vec<String> = owner.endpoints().iter().map(endpoint).collect();
        lines.extend(owner.pins().iter().map(|name| format!("pin {name}")));
        for (device, [ingress, egress]) in self.classifiers() {
            lines.push(format!("{device} ingress {ingress} egress {egress}"));
        }
        lines.sort();
        lines
    }

    /// The classifiers on both hooks of every device, as iproute2 describes them.
    fn classifiers(&self) -> BTreeMap<String, [String; 2]> {
        let disciplines: Value = serde_json::from_str(&self.tc(&["qdisc", "show"], "")).expect("JSON");
        let clsact = disciplines.as_array().expect("a list").iter().filter(|d| d["kind"] == "clsact");
        let devices: Vec<&str> = clsact.map(|d| d["dev"].as_str().expect("a name")).collect();
        let asked = devices.iter().map(|d| format!("filter show dev {d} ingress\nfilter show dev {d} egress\n"));
        let answers = self.tc(&["-batch", "-"], &asked.collect::<String>());
        // One list for each line.
        let mut lists = serde_json::Deserializer::from_str(&answers).into_iter::<Value>().map(|list| {
            let mut list = list.expect("JSON");
            for filter in list.as_array_mut().expect("a list") {
                // The kernel's number of a program is another whenever it is loaded again; its tag is not.
                if let Some(program) = filter.pointer_mut("/options/prog").and_then(Value::as_object_mut) {
                    program.remove("id");
                }
            }
            list.to_string()
        });
        let hooks = |device: &&str| (device.to_string(), [(); 2].map(|()| lists.next().expect("one for each hook")));
        devices.iter().map(hooks).collect()
    }

    /// What `tc` prints as JSON.
    fn tc(&self, arguments: &[&str], stdin: &str) -> String {
        let run = || {
            let mut command = Command::new("tc");
            command.arg("-json").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().expect("tc starts");
            child.stdin.take().expect("stdin is piped").write_all(stdin.as_bytes()).expect("tc reads");
            child.wait_with_output().expect("tc ends")
        };
        let output = self.host.root().run(run);
        assert!(output.status.success(), "tc {arguments:?}");
        String::from_utf8(output.stdout).expect("text")
    }
}
