//! CNI plugins, run as a runtime runs them, and what a run costs.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;
use wait4::Wait4;

use crate::{rounds, target};

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
}

/// The greatest resident set of an execution.
#[derive(Debug, Clone, Copy)]
pub struct Resident {
    /// Of the plugin, or of the largest process that it ran, in KiB.
    pub kib: f64,
    /// Of the process that started it, in KiB: the least that could have been seen.
    pub launcher_kib: f64,
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
        self.run_with_path(verb, container, netns, directory)
    }

    /// The greatest resident set of a verb's processes, started by the benchmarks' small `launcher`, whose report goes to
    /// the file `report`.
    ///
    /// # Panics
    /// As [`Plugin::run`], and where the launcher is as large as the plugin, for then the figure is the launcher's.
    pub fn resident(&self, launcher: &Path, verb: &str, container: &str, netns: &Path, report: &Path) -> Resident {
        let mut command = Command::new(launcher);
        command.arg(report).arg(&self.program);
        let directory = self.program.parent().expect("the program has a directory");
        self.execute(command, verb, container, netns, directory);
        let text = std::fs::read_to_string(report).expect("the launcher wrote its report");
        let mut words = text.split_whitespace().map(|word| word.parse().expect("a number"));
        let mut next = || words.next().expect("two numbers");
        let resident = Resident { kib: next(), launcher_kib: next() };
        assert!(resident.kib > resident.launcher_kib, "{}: {resident:?}", self.program.display());
        resident
    }

    fn run_with_path(&self, verb: &str, container: &str, netns: &Path, directory: &Path) -> Cost {
        self.execute(Command::new(&self.program), verb, container, netns, directory)
    }

    fn execute(&self, mut command: Command, verb: &str, container: &str, netns: &Path, directory: &Path) -> Cost {
        let begin = Instant::now();
        let mut child = command
            .env_clear()
            // Some of the reference plugins run iptables.
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", directory)
            .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=pod")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", self.program.display()));
        let mut stdin = child.stdin.take().expect("stdin is piped");
        // A program that reads nothing, as the floor's, may be gone by now; its status tells.
        let _ = stdin.write_all(self.config.to_string().as_bytes());
        drop(stdin);
        let mut stdout = child.stdout.take().expect("stdout is piped");
        let answer = std::io::read_to_string(&mut stdout).expect("the answer is text");
        let used = child.wait4().expect("the plugin can be waited for");
        let wall_ms = begin.elapsed().as_secs_f64() * 1e3;
        assert!(used.status.success(), "{} {verb} failed: {answer}", self.program.display());
        Cost { wall_ms, cpu_ms: (used.rusage.utime + used.rusage.stime).as_secs_f64() * 1e3 }
    }
}

/// Builds the release binary of the CNI plugin, as `make build` does, and returns its path.
///
/// # Panics
/// If it cannot be built.
pub fn build_ours() -> PathBuf {
    let linked = ["--", "-C", "target-feature=+crt-static"];
    build(&[&["rustc", "--release", "-p", "dcenet-cni", "--bin", "dcenet"], &linked[..]].concat(), "release/dcenet")
}

/// Builds the daemon's release binary and returns its path; under `DCENET_BENCH_QUICK` the one that tests use.
///
/// # Panics
/// If it cannot be built.
pub fn build_daemon() -> PathBuf {
    if rounds(1, 0) == 1 {
        build(&["build", "--release", "-p", "dcenet-daemon"], "release/dcenetd")
    } else {
        build(&["test", "--workspace", "--no-run", "--test", "daemon"], "debug/dcenetd")
    }
}

fn build(arguments: &[&str], binary: &str) -> PathBuf {
    let status = Command::new(env!("CARGO"))
        .arg("--quiet")
        .args(arguments)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()
        .expect("cargo runs");
    assert!(status.success(), "cargo {}: it does not build", arguments.join(" "));
    target().join(binary).canonicalize().expect("cargo has built the binary")
}

/// What an execution asked of the kernel, counted by strace: figures that no other load on the machine moves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// System calls, of all processes and threads, from the first execve.
    pub calls: usize,
    /// Netlink sockets opened.
    pub netlink_sockets: usize,
    /// Messages sent over them, a batch being one.
    pub netlink_sends: usize,
    /// Files opened, those of the dynamic linker included.
    pub opens: usize,
    /// Calls of fsync and fdatasync.
    pub syncs: usize,
    /// Namespaces entered.
    pub setns: usize,
    /// Programs executed.
    pub execs: usize,
}

impl Counts {
    /// Runs a verb under strace, whose report goes to the file `trace`; `None` where strace is not installed.
    ///
    /// # Panics
    /// If the plugin fails.
    pub fn trace(plugin: &Plugin, verb: &str, container: &str, netns: &Path, trace: &Path) -> Option<Self> {
        let strace = Path::new("/usr/bin/strace");
        if !strace.exists() {
            return None;
        }
        // A script stands for the plugin, so that it is run like any other.
        let script = trace.with_extension("sh");
        let text = format!(
            "#!/bin/sh\nexec {} -f -qq -e signal=none -o {} {}\n",
            strace.display(),
            trace.display(),
            plugin.program.display()
        );
        std::fs::write(&script, text).expect("a script beside the trace");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&script, mode).expect("the script is ours");
        let traced = Plugin { program: script.clone(), config: plugin.config.clone() };
        traced.run_with_path(verb, container, netns, plugin.program.parent().expect("the program has a directory"));
        let report = std::fs::read_to_string(trace).expect("strace wrote its report");
        Some(Self::read(&report))
    }

    fn read(report: &str) -> Self {
        let mut counts = Self::default();
        for line in report.lines() {
            // "PID call(arguments) = result"; a resumed call was counted when it began.
            let Some((_, call)) = line.split_once(' ') else { continue };
            let call = call.trim_start();
            let Some((name, arguments)) = call.split_once('(') else { continue };
            counts.calls += 1;
            match name {
                "socket" if arguments.starts_with("AF_NETLINK") => counts.netlink_sockets += 1,
                "sendto" | "sendmsg" if arguments.contains("nlmsg_") => counts.netlink_sends += 1,
                "open" | "openat" | "openat2" => counts.opens += 1,
                "fsync" | "fdatasync" => counts.syncs += 1,
                "setns" => counts.setns += 1,
                "execve" => counts.execs += 1,
                _ => {}
            }
        }
        counts
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { calls, netlink_sockets, netlink_sends, opens, syncs, setns, execs } = self;
        write!(
            f,
            "{calls} calls, {netlink_sockets} netlink sockets, {netlink_sends} sends, {opens} opens, {syncs} syncs, \
             {setns} setns, {execs} execs"
        )
    }
}
