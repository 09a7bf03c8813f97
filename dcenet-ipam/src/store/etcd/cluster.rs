//! A cluster of one or several members on loopback, for tests and benchmarks.

#![expect(clippy::expect_used, reason = "what a test needs and cannot have ends it")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::EtcdConfig;

/// A running cluster. Its processes end with it, and with the thread that started them.
#[derive(Debug)]
pub struct Cluster {
    dir: PathBuf,
    scheme: &'static str,
    extra: Vec<String>,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    client: u16,
    peer: u16,
    metrics: u16,
    process: Option<Child>,
}

impl Cluster {
    /// Why none can be started here, if so.
    pub fn missing() -> Option<String> {
        let found = |name: &str| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
        };
        let absent: Vec<&str> = ["etcd", "etcdctl", "setpriv"].into_iter().filter(|name| !found(name)).collect();
        (!absent.is_empty()).then(|| format!("not installed: {} (Debian etcd-server, etcd-client)", absent.join(", ")))
    }

    /// Starts members with their data below `dir`, and waits until they have a leader.
    ///
    /// # Panics
    /// If they do not come up.
    pub fn start(size: usize, dir: &Path) -> Self {
        Self::start_with(size, dir, "http", &[])
    }

    /// As [`Cluster::start`], with a scheme for the clients' URLs and more arguments for each member.
    ///
    /// # Panics
    /// If they do not come up.
    pub fn start_with(size: usize, dir: &Path, scheme: &'static str, extra: &[&str]) -> Self {
        for round in 0..5 {
            let extra = extra.iter().map(ToString::to_string).collect();
            let mut cluster = Self { dir: dir.join(format!("etcd{round}")), scheme, extra, members: members(size) };
            for at in 0..size {
                cluster.restart(at);
            }
            // A port that was free may have been taken since; then a member ends at once.
            if cluster.wait() {
                return cluster;
            }
        }
        panic!("etcd does not start; its last words are in {}", dir.display());
    }

    /// How to reach all members.
    pub fn config(&self) -> EtcdConfig {
        EtcdConfig { endpoints: (0..self.members.len()).map(|at| self.endpoint(at)).collect(), ..Default::default() }
    }

    /// The URL of one member for clients.
    pub fn endpoint(&self, at: usize) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.members[at].client)
    }

    /// The number of members, running or not.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// The leader, as it says itself.
    pub fn leader(&self) -> Option<usize> {
        (0..self.members.len()).find(|at| self.metric(*at, "etcd_server_is_leader") == Some(1.0))
    }

    /// The value of a metric of one member, with its labels as etcd writes them.
    pub fn metric(&self, at: usize, name: &str) -> Option<f64> {
        let page = self.get(at, "/metrics")?;
        page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
    }

    /// Kills a member with SIGKILL.
    pub fn kill(&mut self, at: usize) {
        if let Some(mut process) = self.members[at].process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Stops a member in its tracks (SIGSTOP).
    ///
    /// # Panics
    /// If it cannot be signalled.
    pub fn pause(&self, at: usize) {
        self.signal(at, "STOP");
    }

    /// Lets a paused member go on.
    ///
    /// # Panics
    /// If it cannot be signalled.
    pub fn resume(&self, at: usize) {
        self.signal(at, "CONT");
    }

    fn signal(&self, at: usize, signal: &str) {
        let Some(process) = &self.members[at].process else { return };
        let sent = Command::new("sh").args(["-c", &format!("kill -{signal} {}", process.id())]).status();
        assert!(sent.is_ok_and(|status| status.success()), "SIG{signal} to member {at}");
    }

    /// Starts a member that was killed, with the data that it had.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn restart(&mut self, at: usize) {
        let dir = self.dir.join(at.to_string());
        std::fs::create_dir_all(&dir).expect("the member's directory");
        let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).expect("the member's log");
        let errors = log.try_clone().expect("the member's log");
        let peers: Vec<String> =
            self.members.iter().enumerate().map(|(n, m)| format!("m{n}=http://127.0.0.1:{}", m.peer)).collect();
        let member = &self.members[at];
        let (client, peer) =
            (format!("{}://127.0.0.1:{}", self.scheme, member.client), format!("http://127.0.0.1:{}", member.peer));
        // Dies with the thread that starts it, so that also a killed test leaves nothing.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "etcd", "--name", &format!("m{at}")])
            .args(["--data-dir".as_ref(), dir.join("data").as_os_str()])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--listen-metrics-urls", &format!("http://127.0.0.1:{}", member.metrics)])
            .args(["--initial-cluster", &peers.join(","), "--initial-cluster-state", "new"])
            // Slower than etcd's defaults, for a machine where members wait for the processor.
            .args(["--heartbeat-interval", "150", "--election-timeout", "1500"])
            .args(["--logger", "zap", "--log-level", "error"])
            .args(&self.extra)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .expect("setpriv starts");
        self.members[at].process = Some(process);
    }

    /// Waits until all running members know a leader; false if one of them has ended.
    ///
    /// # Panics
    /// If they do not within a minute.
    pub fn wait(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(60);
        for at in 0..self.members.len() {
            while let Some(process) = &mut self.members[at].process {
                if process.try_wait().expect("a child of ours").is_some() {
                    return false;
                }
                if self.get(at, "/health").is_some_and(|text| text.contains(r#""health":"true""#)) {
                    break;
                }
                assert!(Instant::now() < deadline, "member {at} is not healthy after a minute");
                thread::sleep(Duration::from_millis(50));
            }
        }
        true
    }

    /// Runs `etcdctl`, which shares no code with the store, and gives what it prints.
    ///
    /// # Panics
    /// If it fails.
    pub fn etcdctl(&self, arguments: &[&str]) -> String {
        let endpoints = self.config().endpoints.join(",");
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &endpoints, "--command-timeout", "60s"])
            .args(arguments)
            .output()
            .expect("etcdctl runs");
        assert!(output.status.success(), "etcdctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// All keys that begin with a text, with their values, as `etcdctl` reads them.
    ///
    /// # Panics
    /// If it fails.
    pub fn dump(&self, prefix: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
        let text = self.etcdctl(&["get", "--prefix", prefix, "--hex"]);
        let bytes = |line: &str| -> Vec<u8> {
            line.split("\\x").skip(1).map(|hex| u8::from_str_radix(hex, 16).expect("hexadecimal digits")).collect()
        };
        let lines: Vec<&str> = text.lines().collect();
        lines.chunks(2).map(|pair| (bytes(pair[0]), pair.get(1).map(|v| bytes(v)).unwrap_or_default())).collect()
    }

    fn get(&self, at: usize, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.members[at].metrics)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for at in 0..self.members.len() {
            self.kill(at);
        }
    }
}

/// Members on ports that are free now.
fn members(size: usize) -> Vec<Member> {
    let listeners: Vec<TcpListener> =
        (0..3 * size).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port of loopback")).collect();
    let ports: Vec<u16> = listeners.iter().map(|l| l.local_addr().expect("it is bound").port()).collect();
    ports.chunks(3).map(|p| Member { client: p[0], peer: p[1], metrics: p[2], process: None }).collect()
}
