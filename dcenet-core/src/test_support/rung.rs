//! Rungs: what a test needs of its machine.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a test needs of the machine that it runs on. A test that needs nothing states no rung.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rung {
    /// Root in the first user namespace, to make network namespaces and devices in them.
    Netns,
    /// `Netns`, and a kernel that loads eBPF programs and has BTF.
    Kernel,
    /// `Netns`, and real servers and clients: etcd, containerd, podman, Debian's CNI plugins.
    Services,
    /// `Kernel`, in a guest of `make vm-test`: kernels of distributions, and devices that a development machine lacks.
    Vm,
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Netns => "netns",
            Self::Kernel => "kernel",
            Self::Services => "services",
            Self::Vm => "vm",
        })
    }
}

/// Tells whether the test that calls it can run here; where it cannot, the test returns at once.
///
/// The environment decides what a missing rung means:
/// - `DCENET_REQUIRE` lists rungs that must be there (`netns,kernel`): a missing one fails the test;
/// - `DCENET_RUNG_LOG` names a file to which each call appends one line, `run RUNG TEST` or `skip RUNG TEST: REASON`,
///   because test runners hide what a passing test prints;
/// - `DCENET_VM` tells that this is a guest of `make vm-test`, and which devices it has.
///
/// ```no_run
/// # use dcenet_core::test_support::{require, Rung};
/// if !require(Rung::Netns) {
///     return;
/// }
/// ```
///
/// # Panics
/// If the rung is missing and required.
#[must_use]
pub fn require(rung: Rung) -> bool {
    require_with(rung, || None)
}

/// As [`require`], with a reason of the test's own for which it cannot run, such as an absent program.
///
/// # Panics
/// If `reason` returns one and the rung is required.
#[must_use]
pub fn require_with(rung: Rung, reason: impl FnOnce() -> Option<String>) -> bool {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("unnamed");
    let reason = missing(rung).or_else(reason);
    record(rung, test, reason.as_deref());
    match reason {
        None => true,
        Some(reason) => {
            let required = std::env::var("DCENET_REQUIRE").unwrap_or_default();
            if required.split(',').any(|r| r.trim() == rung.to_string()) {
                panic!("rung {rung} is required and missing: {reason}");
            }
            eprintln!("SKIP {test}: rung {rung}: {reason}");
            false
        }
    }
}

/// How much a test that repeats itself does: in a guest, whose processor is emulated and ten to twenty times slower; as a
/// rule; and in `make soak` (`DCENET_SOAK=1`).
pub fn effort<T>(guest: T, usual: T, soak: T) -> T {
    if std::env::var_os("DCENET_SOAK").is_some_and(|v| v == "1") {
        soak
    } else if std::env::var_os("DCENET_VM").is_some() {
        guest
    } else {
        usual
    }
}

/// Whether the running kernel is older than `major.minor`, for tests that know what older kernels cannot do. Nothing else
/// looks at versions.
///
/// # Panics
/// Where the kernel's release is no version.
pub fn kernel_is_before(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel has a release");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().expect("a version"));
    (numbers.next(), numbers.next()) < (Some(major), Some(minor))
}

fn record(rung: Rung, test: &str, reason: Option<&str>) {
    let Some(path) = std::env::var_os("DCENET_RUNG_LOG").map(PathBuf::from) else { return };
    let line = match reason {
        None => format!("run {rung} {test}\n"),
        Some(reason) => format!("skip {rung} {test}: {reason}\n"),
    };
    let written =
        OpenOptions::new().create(true).append(true).open(&path).and_then(|mut f| f.write_all(line.as_bytes()));
    if let Err(error) = written {
        panic!("DCENET_RUNG_LOG {}: {error}", path.display());
    }
}

fn missing(rung: Rung) -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .unwrap_or(0);
    const CAP_NET_ADMIN: u64 = 1 << 12;
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    if effective & CAP_NET_ADMIN == 0 || effective & CAP_SYS_ADMIN == 0 {
        return Some("needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN)".to_owned());
    }
    if rung == Rung::Vm && std::env::var_os("DCENET_VM").is_none() {
        return Some("not in a guest of `make vm-test`".to_owned());
    }
    if matches!(rung, Rung::Kernel | Rung::Vm) && !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Some("the kernel has no BTF (/sys/kernel/btf/vmlinux)".to_owned());
    }
    None
}
