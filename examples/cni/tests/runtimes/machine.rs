//! A machine for a container runtime.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::{Node, elements};
use crate::without_surprises;

/// The image of every container, and of the process that holds a pod.
pub const IMAGE: &str = "dcenet.test/pod:1";

/// How long a command of a runtime may take, in seconds, on a machine that is busy with much else.
const LIMIT: &str = "300";

/// A node, and namespaces for mounts and processes on it. The first process reads from the test: it ends with the test,
/// and the kernel ends every other process of the namespace with it.
pub struct Machine {
    /// The node, whose configuration is that of the only plugin in the list.
    pub node: Node,
    /// The first process of the namespace, as the test sees it.
    init: u32,
    holder: Child,
    lifeline: Option<ChildStdin>,
}

impl Machine {
    /// A machine whose runtimes find our plugin, and Debian's beside it.
    pub fn new(mut node: Node) -> Self {
        // Debian's runtimes are built with a libcni of before 1.1.0.
        node.config["cniVersion"] = json!("1.0.0");
        without_surprises(&node.host);
        let plugins = plugins(&node);
        std::fs::create_dir_all(&plugins).expect("the directory is ours");
        symlink(env!("CARGO_BIN_EXE_dcenet"), plugins.join("dcenet")).expect("the directory is new");
        for entry in std::fs::read_dir("/usr/lib/cni").expect("the package has plugins").flatten() {
            symlink(entry.path(), plugins.join(entry.file_name())).expect("the directory is new");
        }

        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        // The shell waits for whoever is left without a parent while it waits for `cat`.
        command.args([
            "sh",
            "-ec",
            "mount -t tmpfs run /run; mount -t tmpfs lib /var/lib; mkdir /run/netns; echo; cat; :",
        ]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = node.host.root().run(|| command.spawn()).expect("unshare starts");
        let lifeline = holder.stdin.take();
        let mut line = String::new();
        let mut stdout = BufReader::new(holder.stdout.take().expect("stdout is piped"));
        stdout.read_line(&mut line).expect("stdout can be read");
        assert_eq!(line, "\n", "the machine is not ready");
        let id = holder.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).expect("its children");
        let init = children.trim().parse().expect("it has one child");
        let machine = Self { node, init, holder, lifeline };
        machine.write_image();
        machine
    }

    /// A program on the machine, with a limit to its time.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.server("timeout");
        command.args(["--kill-after=5", LIMIT, program]);
        command
    }

    /// A program on the machine, which runs as long as that.
    pub fn server(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.init)).args(["--mount", "--pid", "--net", "--", program]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", self.directory());
        command
    }

    /// Ends all that runs on it, and waits for that. Does nothing where that was done before.
    pub fn end(&mut self) {
        let Some(lifeline) = self.lifeline.take() else { return };
        drop(lifeline);
        let begun = Instant::now();
        while let Ok(None) = self.holder.try_wait() {
            if begun.elapsed() > Duration::from_secs(20) {
                eprintln!("the machine does not end: {:?}", self.holder.kill());
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if let Err(error) = self.holder.wait() {
            eprintln!("cannot wait for the machine: {error}");
        }
        for hierarchy in hierarchies(Path::new("/sys/fs/cgroup")) {
            remove_cgroup(&hierarchy.join(self.cgroup().trim_start_matches('/')));
        }
    }

    /// Where a test's files are: on the machine as outside.
    pub fn directory(&self) -> &Path {
        self.node.host.directory()
    }

    /// Where plugins are.
    pub fn plugins(&self) -> PathBuf {
        plugins(&self.node)
    }

    /// The control group below which its containers are.
    pub fn cgroup(&self) -> String {
        format!("/dcenet-test-{}-{}", std::process::id(), self.init)
    }

    /// The directory of network configurations, with a list of our plugin alone, which declares these capabilities.
    pub fn write_list(&self, capabilities: &Value) -> PathBuf {
        let mut conf = self.node.config.clone();
        conf["capabilities"] = capabilities.clone();
        let list = json!({ "cniVersion": conf["cniVersion"], "name": conf["name"], "plugins": [conf] });
        let directory = self.directory().join("net.d");
        std::fs::create_dir_all(&directory).expect("the directory is ours");
        std::fs::write(directory.join("10-shop.conflist"), list.to_string()).expect("the directory is ours");
        directory
    }

    /// Has DEL do nothing: what would be left if ours removed nothing.
    pub fn lose_del(&self) {
        // Not through the link: the program behind it is everybody's.
        std::fs::remove_file(self.plugins().join("dcenet")).expect("the link is there");
        let program = env!("CARGO_BIN_EXE_dcenet");
        self.node.install("dcenet", &format!("#!/bin/sh\n[ \"$CNI_COMMAND\" = DEL ] || exec {program}\n"));
    }

    /// Whatever attachments leave: devices, addresses, routes and rules of the host; translations; records; leases; and
    /// namespaces.
    pub fn traces(&self) -> BTreeSet<String> {
        let Node { host, .. } = &self.node;
        let mut traces: BTreeSet<String> = host.state().lines().map(str::to_owned).collect();
        traces.extend(elements(&self.node).into_iter().map(|line| format!("translation {line}")));
        traces.extend(host.records().into_iter().map(|name| format!("record {name}")));
        traces.extend(self.node.store().into_iter().map(|line| format!("store {line}")));
        traces.extend(self.node.policy().into_iter().map(|line| format!("policy {line}")));
        let names = PathBuf::from(format!("/proc/{}/root/run/netns", self.init));
        let names = std::fs::read_dir(names).expect("the machine runs").flatten();
        traces.extend(names.map(|name| format!("namespace {}", name.file_name().to_string_lossy())));
        traces
    }

    /// The archive that runtimes take images from, as `docker save` writes it.
    pub fn image(&self) -> PathBuf {
        self.directory().join("image.tar")
    }

    /// One layer with busybox(1), which the package busybox-static links statically.
    fn write_image(&self) {
        let script = r#"
            cd "$1"; mkdir -p image/layer; cd image/layer
            mkdir bin dev etc proc sys tmp www
            cp /bin/busybox bin
            for applet in cat httpd ip ping sh sleep wget; do ln -s busybox bin/$applet; done
            echo root:x:0:0:root:/:/bin/sh >etc/passwd
            echo hello >www/index.html
            cd ..
            tar -C layer --owner=0 --group=0 -cf layer.tar .
            digest=$(sha256sum layer.tar | cut -d' ' -f1)
            printf '{"architecture":"amd64","os":"linux","config":{"Cmd":["/bin/sleep","1000000"],"Env":["PATH=/bin"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
                "$digest" >config.json
            printf '[{"Config":"config.json","RepoTags":["%s"],"Layers":["layer.tar"]}]' "$2" >manifest.json
            tar -cf ../image.tar manifest.json config.json layer.tar
            rm -r ../image
        "#;
        let status = Command::new("sh").args(["-ec", script, "sh"]).arg(self.directory()).arg(IMAGE).status();
        assert!(status.expect("sh starts").success(), "the image is not written");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

fn plugins(node: &Node) -> PathBuf {
    node.host.directory().join("bin")
}

/// Where the tops of hierarchies of control groups may be: version 2 here, or one for each controller of version 1 below,
/// which has nothing but those. Version 2 has files here, too, and groups (Documentation/admin-guide/cgroup-v2.rst).
fn hierarchies(mount: &Path) -> Vec<PathBuf> {
    std::iter::once(mount.to_owned()).chain(directories(mount)).collect()
}

/// Those right below.
fn directories(path: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// Removes a control group, those below it first. Its processes have ended, but the kernel may not have noted all yet.
fn remove_cgroup(path: &Path) {
    directories(path).for_each(|below| remove_cgroup(&below));
    let begun = Instant::now();
    while let Err(error) = std::fs::remove_dir(path) {
        if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) {
            return;
        }
        if begun.elapsed() > Duration::from_secs(10) {
            eprintln!("cannot remove {}: {error}", path.display());
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_hierarchy_is_a_directory() {
    let mount = tempfile::tempdir().unwrap();
    // As version 2 has them.
    let group = mount.path().join("system.slice");
    std::fs::create_dir(&group).unwrap();
    for file in ["cgroup.procs", "cgroup.controllers"] {
        std::fs::write(mount.path().join(file), "").unwrap();
    }
    assert_eq!(hierarchies(mount.path()), [mount.path().to_owned(), group]);
}
