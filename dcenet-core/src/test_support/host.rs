//! Throw-away network namespaces that stand for hosts and pods.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::engine::Engine;
use crate::netlink::{Family, LinkChange, LinkView, link_by_name, set_link};
use crate::netns::{Host, NetNs, Pod};
use crate::provider::PolicySink;
use crate::sys;

/// A network namespace of its own, reachable by path for other processes, removed when dropped. `lo` is up.
#[derive(Debug)]
pub struct TestNetNs {
    netns: NetNs,
    path: PathBuf,
}

impl TestNetNs {
    fn create(path: PathBuf) -> Self {
        File::create(&path).expect("a file to mount the namespace on");
        let target = c_path(&path);
        let made = std::thread::spawn(move || {
            sys::unshare_netns()?;
            sys::bind_mount(c"/proc/thread-self/ns/net", &target)
        });
        made.join().expect("no panic in there").expect("unshare(CLONE_NEWNET) and a bind mount");
        let netns = NetNs::open(&path).expect("the namespace just mounted");
        let this = Self { netns, path };
        this.set_up("lo");
        this
    }

    /// The namespace.
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    /// Its path, for child processes.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As the engine takes it.
    pub fn pod(&self) -> Pod<'_> {
        Pod { netns: &self.netns, path: &self.path }
    }

    /// The link of this name, if there is one.
    pub fn link(&self, name: &str) -> Option<LinkView> {
        let mut socket = self.netns.socket(Family::Route).expect("a netlink socket");
        let replies = socket.request(&link_by_name(&name.parse().expect("an interface name"))).ok()?;
        replies.iter().find_map(|r| LinkView::parse(&r.payload))
    }

    /// Sets a link up.
    pub fn set_up(&self, name: &str) {
        let index = self.link(name).expect("the link").index;
        let message = set_link(&name, index, &LinkChange { up: Some(true), ..Default::default() });
        let mut socket = self.netns.socket(Family::Route).expect("a netlink socket");
        socket.request(&message).expect("to set the link up");
    }

    /// Runs `f` on a thread in the namespace.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.netns.run(f).expect("to enter the namespace")
    }

    /// Runs a program in the namespace and returns what it printed.
    ///
    /// # Panics
    /// If it fails.
    pub fn sh(&self, command: &str) -> String {
        let output = self.run(|| std::process::Command::new("sh").args(["-ec", command]).output());
        let output = output.expect("sh starts");
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Writes a setting below `/proc/sys/net` of the namespace.
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = Path::new("/proc/sys/net").join(name);
        self.run(|| fs::write(&path, value)).expect("to write the setting");
    }
}

impl Drop for TestNetNs {
    fn drop(&mut self) {
        unmount(&self.path);
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// A network namespace that stands for a host, with directories of its own. All is removed when it is dropped.
#[derive(Debug)]
pub struct TestHost {
    root: TestNetNs,
    directory: PathBuf,
    pods: AtomicU64,
}

impl TestHost {
    /// A host with nothing but `lo`.
    ///
    /// # Panics
    /// Where the rung `netns` is missing: ask [`require`](super::require) first.
    pub fn new() -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let base = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
        let directory = base.join(format!("dcenet-test-{}-{n}", std::process::id()));
        fs::create_dir_all(directory.join("netns")).expect("a temporary directory");
        fs::create_dir_all(directory.join("run")).expect("a temporary directory");
        let root = TestNetNs::create(directory.join("netns").join("host"));
        Self { root, directory, pods: AtomicU64::new(0) }
    }

    /// Its namespace.
    pub fn root(&self) -> &TestNetNs {
        &self.root
    }

    /// Its namespace, opened once more, for an engine.
    pub fn host(&self) -> Host {
        Host(NetNs::open(self.root.path()).expect("the namespace is mounted"))
    }

    /// The directory for records, as `/run/dcenet` is on a real host. On tmpfs where there is one.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// A directory for anything else, removed with the host.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// An engine for this host.
    pub fn engine(&self, policy: Option<std::sync::Arc<dyn PolicySink>>) -> Engine {
        Engine::new(self.host(), &self.run_dir(), policy).expect("an engine")
    }

    /// A new pod's namespace.
    pub fn new_pod(&self) -> TestNetNs {
        let n = self.pods.fetch_add(1, Ordering::Relaxed);
        TestNetNs::create(self.directory.join("netns").join(format!("pod{n}")))
    }

    /// What its namespace looks like.
    pub fn state(&self) -> super::HostState {
        super::HostState::capture(self.root.netns())
    }

    /// The names of the records in its run directory.
    pub fn records(&self) -> Vec<String> {
        let Ok(files) = fs::read_dir(self.run_dir().join("attachments")) else { return Vec::new() };
        let mut names: Vec<_> = files.flatten().map(|f| f.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Default for TestHost {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        // Pods that outlive their host keep their namespaces, but not the paths to them.
        for file in fs::read_dir(self.directory.join("netns")).into_iter().flatten().flatten() {
            unmount(&file.path());
        }
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("cannot remove {}: {error}", self.directory.display());
        }
    }
}

fn unmount(path: &Path) {
    // Nothing is mounted there where it was unmounted before.
    if let Err(error) = sys::unmount(&c_path(path))
        && error.raw_os_error() != Some(libc::EINVAL)
        && error.raw_os_error() != Some(libc::ENOENT)
    {
        eprintln!("cannot unmount {}: {error}", path.display());
    }
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path has no NUL")
}
