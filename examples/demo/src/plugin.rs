//! The CNI binary, executed exactly as a container runtime does it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use dcenet_core::netns::NetNs;
use serde_json::Value;

/// The plugin's executable, and the host on which it runs.
#[derive(Debug)]
pub struct Plugin<'a> {
    /// The executable.
    pub program: PathBuf,
    /// The network namespace that stands for the host.
    pub host: &'a NetNs,
}

/// For whom the plugin is called.
#[derive(Debug, Clone)]
pub struct Container<'a> {
    /// `CNI_CONTAINERID`.
    pub id: String,
    /// `CNI_NETNS`.
    pub netns: &'a Path,
    /// The pod's name, as Kubernetes passes it in `CNI_ARGS`.
    pub workload: (&'a str, &'a str),
}

impl Plugin<'_> {
    /// Calls a verb: the result object, or the error object.
    ///
    /// # Errors
    /// If the program cannot be run or answers neither.
    pub fn call(&self, verb: &str, container: &Container<'_>, config: &Value) -> io::Result<Result<Value, Value>> {
        let (namespace, name) = container.workload;
        let run = || {
            let mut child = Command::new(&self.program)
                .env("CNI_COMMAND", verb)
                .env("CNI_CONTAINERID", &container.id)
                .env("CNI_NETNS", container.netns)
                .env("CNI_IFNAME", "eth0")
                .env("CNI_PATH", self.program.parent().unwrap_or(Path::new("/")))
                .env(
                    "CNI_ARGS",
                    format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID=none"),
                )
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let mut stdin = child.stdin.take().ok_or_else(|| io::Error::other("stdin is not piped"))?;
            stdin.write_all(config.to_string().as_bytes())?;
            drop(stdin);
            child.wait_with_output()
        };
        let output = self.host.run(run).map_err(io::Error::other)??;
        let answer = match output.stdout.as_slice() {
            [] => Value::Null,
            bytes => serde_json::from_slice(bytes)?,
        };
        Ok(if output.status.success() { Ok(answer) } else { Err(answer) })
    }
}
