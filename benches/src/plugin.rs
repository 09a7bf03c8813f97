//! CNI plugins, run as a runtime runs them, and what a run costs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;
use wait4::Wait4;

/// A plugin's executable with a configuration.
#[derive(Debug, Clone)]
pub struct Plugin {
    /// The executable.
    pub program: PathBuf,
    /// Its configuration, as it stands on stdin.
    pub config: Value,
}

/// What one execution cost, from before it was started until it was waited for.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Wall time in milliseconds.
    pub wall_ms: f64,
    /// User and system time in milliseconds, that of waited-for children included.
    pub cpu_ms: f64,
    /// The greatest resident set in KiB.
    pub rss_kib: u64,
}

impl Plugin {
    /// Debian's reference plugin of that name, if it is installed.
    pub fn debian(name: &str, config: Value) -> Option<Self> {
        let program = Path::new("/usr/lib/cni").join(name);
        program.exists().then_some(Self { program, config })
    }

    /// Runs a verb for a container in the calling thread's network namespace.
    ///
    /// # Panics
    /// If the plugin cannot be run or fails: a figure of a failed run would be none.
    pub fn run(&self, verb: &str, container: &str, netns: &Path) -> Cost {
        let directory = self.program.parent().expect("the program has a directory");
        let begin = Instant::now();
        let mut child = Command::new(&self.program)
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", self.program.display()));
        let mut stdin = child.stdin.take().expect("stdin is piped");
        stdin.write_all(self.config.to_string().as_bytes()).expect("the plugin reads its configuration");
        drop(stdin);
        let mut stdout = child.stdout.take().expect("stdout is piped");
        let answer = std::io::read_to_string(&mut stdout).expect("the answer is text");
        let used = child.wait4().expect("the plugin can be waited for");
        let wall_ms = begin.elapsed().as_secs_f64() * 1e3;
        assert!(used.status.success(), "{} {verb} failed: {answer}", self.program.display());
        Cost {
            wall_ms,
            cpu_ms: (used.rusage.utime + used.rusage.stime).as_secs_f64() * 1e3,
            rss_kib: used.rusage.maxrss / 1024,
        }
    }
}

/// Builds the release binary of the CNI plugin, as its user would have it, and returns its path.
///
/// # Panics
/// If it cannot be built.
pub fn build_ours() -> PathBuf {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--quiet", "-p", "dcenet-cni"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "dcenet-cni does not build");
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")), PathBuf::from);
    target.join("release/dcenet").canonicalize().expect("cargo has built the binary")
}
