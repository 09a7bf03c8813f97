//! What a runtime does with a list of plugins: the sequence of libcni 1.3 (containernetworking/cni, `libcni/api.go`), which
//! no runtime of Debian's has yet.

use std::path::{Path, PathBuf};
use std::process::Command;

use dcenet_core::test_support::TestHost;
use serde_json::{Map, Value, json};

use crate::common::{Pod, Running};

/// A runtime with one network.
pub struct Runtime<'a> {
    host: &'a TestHost,
    /// The list, as a file of it would be.
    pub list: Value,
    /// What the runtime asks for by capability.
    pub capabilities: Map<String, Value>,
    /// Where plugins are, in order.
    pub path: String,
}

/// A plugin that failed, and what it said.
#[derive(Debug)]
pub struct Failure {
    /// Its `type`.
    pub plugin: String,
    /// Its error (CNI 1.1.0, section 5, "Error").
    pub error: Value,
}

impl<'a> Runtime<'a> {
    /// A runtime on the host, which finds our plugin and Debian's.
    pub fn new(host: &'a TestHost, list: Value) -> Self {
        let own = Path::new(env!("CARGO_BIN_EXE_dcenet")).parent().expect("a program is in a directory");
        let path = format!("{}:/usr/lib/cni", own.display());
        Self { host, list, capabilities: Map::new(), path }
    }

    /// `AddNetworkList`. The result is kept only where all succeed.
    pub fn add(&self, pod: &Pod) -> Result<Value, Failure> {
        let mut result = None;
        for plugin in self.plugins() {
            result = Some(self.run("ADD", plugin, Some(pod), self.conf(plugin, result.as_ref()))?);
        }
        let result = result.expect("a list has plugins");
        let kept = json!({
            "kind": "cniCacheV1", "containerId": pod.container, "config": self.list, "ifName": "eth0",
            "networkName": self.list["name"], "netns": pod.netns.path(), "capabilityArgs": self.capabilities,
            "result": result,
        });
        std::fs::create_dir_all(self.cache()).expect("the directory is ours");
        std::fs::write(self.file(&pod.container), kept.to_string()).expect("the directory is ours");
        Ok(result)
    }

    /// `CheckNetworkList`.
    pub fn check(&self, pod: &Pod) -> Result<(), Failure> {
        let kept = self.kept(&pod.container);
        let result = kept.as_ref().map(|kept| &kept["result"]);
        self.plugins().try_for_each(|p| self.run("CHECK", p, Some(pod), self.conf(p, result)).map(drop))
    }

    /// `DelNetworkList`: backward, up to the first that fails.
    pub fn del(&self, pod: &Pod) -> Result<(), Failure> {
        let kept = self.kept(&pod.container);
        let result = kept.as_ref().map(|kept| &kept["result"]);
        let plugins: Vec<&Value> = self.plugins().collect();
        for plugin in plugins.into_iter().rev() {
            self.run("DEL", plugin, Some(pod), self.conf(plugin, result))?;
        }
        self.forget(pod);
        Ok(())
    }

    /// `GCNetworkList`: DEL for what is kept and not valid, of which `gone` has the namespaces, then GC of each plugin; over
    /// failures, which are returned.
    pub fn gc(&self, valid: &[&Pod], gone: &[&Pod]) -> Vec<Failure> {
        let mut failures = Vec::new();
        for pod in gone.iter().filter(|pod| self.kept(&pod.container).is_some()) {
            failures.extend(self.del(pod).err());
        }
        let valid: Vec<Value> = valid.iter().map(|p| json!({ "containerID": p.container, "ifname": "eth0" })).collect();
        for plugin in self.plugins() {
            let mut conf = self.conf(plugin, None);
            for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
                conf[key] = json!(valid);
            }
            failures.extend(self.run("GC", plugin, None, conf).err());
        }
        failures
    }

    /// `GetStatusNetworkList`.
    pub fn status(&self) -> Result<(), Failure> {
        self.plugins().try_for_each(|p| self.run("STATUS", p, None, self.conf(p, None)).map(drop))
    }

    /// Loses what is kept of an attachment.
    pub fn forget(&self, pod: &Pod) {
        match std::fs::remove_file(self.file(&pod.container)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
            _ => {}
        }
    }

    /// The names of what is kept.
    pub fn cached(&self) -> Vec<String> {
        let files = std::fs::read_dir(self.cache()).into_iter().flatten().flatten();
        files.map(|file| file.file_name().to_string_lossy().into_owned()).collect()
    }

    fn plugins(&self) -> impl Iterator<Item = &Value> {
        self.list["plugins"].as_array().expect("a list").iter()
    }

    fn cache(&self) -> PathBuf {
        self.host.directory().join("cache/results")
    }

    fn file(&self, container: &str) -> PathBuf {
        self.cache().join(format!("{}-{container}-eth0", self.list["name"].as_str().expect("text")))
    }

    fn kept(&self, container: &str) -> Option<Value> {
        let text = std::fs::read_to_string(self.file(container)).ok()?;
        Some(serde_json::from_str(&text).expect("it was written whole"))
    }

    /// `buildOneConfig`, with `injectRuntimeConfig`.
    fn conf(&self, plugin: &Value, result: Option<&Value>) -> Value {
        let mut conf = plugin.clone();
        conf["name"] = self.list["name"].clone();
        conf["cniVersion"] = self.list["cniVersion"].clone();
        if let Some(result) = result {
            conf["prevResult"] = result.clone();
        }
        let declared = |name: &String| plugin["capabilities"][name] == true;
        let granted: Map<_, _> = self.capabilities.clone().into_iter().filter(|(name, _)| declared(name)).collect();
        if !granted.is_empty() {
            conf["runtimeConfig"] = Value::Object(granted);
        }
        conf
    }

    fn run(&self, verb: &str, plugin: &Value, pod: Option<&Pod>, conf: Value) -> Result<Value, Failure> {
        let plugin = plugin["type"].as_str().expect("a plugin has a type").to_owned();
        let program = self.path.split(':').map(|directory| Path::new(directory).join(&plugin)).find(|p| p.exists());
        let program = program.unwrap_or_else(|| panic!("{plugin} is not in {}", self.path));
        let args = pod.map(|pod| pod.args());
        let variables: Vec<_> = args.iter().map(|args| ("CNI_ARGS", args.as_str())).collect();
        run(self.host, &program, &self.path, verb, pod, &variables, &conf).map_err(|error| Failure { plugin, error })
    }
}

/// Runs one plugin on the host, with further variables.
pub fn run(
    host: &TestHost,
    program: &Path,
    path: &str,
    verb: &str,
    pod: Option<&Pod>,
    variables: &[(&str, &str)],
    conf: &Value,
) -> Result<Value, Value> {
    let mut command = Command::new(program);
    // The reference plugins run helpers for the host's firewall.
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("CNI_PATH", path).env("CNI_COMMAND", verb);
    if let Some(pod) = pod {
        command.env("CNI_CONTAINERID", &pod.container).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", pod.netns.path());
    }
    command.envs(variables.iter().copied());
    host.root().run(|| Running::start(command, &conf.to_string()).wait()).expect("nobody kills it")
}
