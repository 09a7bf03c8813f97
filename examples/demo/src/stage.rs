//! The stage: a host and its pods as network namespaces, below one directory.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use dcenet_core::netns::NetNs;
use dcenet_ebpf::pin::Pins;

/// Everything that the demo makes is below this directory, so that a later run finds what a crash left.
const DIRECTORY: &str = "/run/dcenet-demo";

/// The stage while it stands.
#[derive(Debug)]
pub struct Stage {
    /// The namespace that stands for the host.
    pub host: NetNs,
    /// Held for as long as the demo runs: two at once would stand on each other's feet.
    _place: Place,
}

/// The right to use the directory.
#[derive(Debug)]
pub struct Place(#[expect(dead_code, reason = "the lock ends with the file")] File);

impl Place {
    /// Takes the place, and removes what an earlier run left there.
    ///
    /// # Errors
    /// If another demo runs, or the system refuses.
    pub fn take() -> Result<Self, Box<dyn std::error::Error>> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)?;
        let lock = File::create(directory("lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err("another demo is running; wait for it to end".into()),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        clear()?;
        Ok(Self(lock))
    }
}

impl Stage {
    /// Makes an empty host.
    pub fn set_up(place: Place) -> Result<Self, Box<dyn std::error::Error>> {
        fs::DirBuilder::new().mode(0o700).create(directory("netns"))?;
        let host = NetNs::create(netns_path("host"))?;
        // A host that forwards between its pods and the world, as every node of a cluster does.
        host.run(|| {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
        })??;
        Ok(Self { host, _place: place })
    }

    /// Makes a namespace for a pod, or for somebody outside.
    pub fn namespace(&self, name: &str) -> Result<Pod, Box<dyn std::error::Error>> {
        let path = netns_path(name);
        Ok(Pod { netns: NetNs::create(&path)?, path })
    }

    /// Where the host's namespace is mounted.
    pub fn host_path(&self) -> PathBuf {
        netns_path("host")
    }

    /// A directory of the stage.
    pub fn directory(&self, name: &str) -> PathBuf {
        directory(name)
    }

    /// Removes everything.
    pub fn strike(self) -> Result<(), Box<dyn std::error::Error>> {
        clear()?;
        Ok(fs::remove_dir_all(DIRECTORY)?)
    }
}

/// A namespace with its path.
#[derive(Debug)]
pub struct Pod {
    /// The namespace.
    pub netns: NetNs,
    /// Where it is mounted.
    pub path: PathBuf,
}

/// Whether anything of a demo is there.
pub fn anything_left() -> bool {
    Path::new(DIRECTORY).exists()
}

/// Removes all but the lock.
fn clear() -> Result<(), Box<dyn std::error::Error>> {
    let namespaces = match fs::read_dir(directory("netns")) {
        Ok(entries) => entries.collect::<io::Result<Vec<_>>>()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    for entry in namespaces {
        NetNs::remove(entry.path())?;
    }
    // A bpffs that an owner who was killed has left.
    match Pins::open(directory("bpf")) {
        Ok(pins) => pins.unmount()?,
        Err(error) => return Err(error.into()),
    }
    for name in ["netns", "run", "state", "bpf"] {
        match fs::remove_dir_all(directory(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

fn directory(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn netns_path(name: &str) -> PathBuf {
    directory("netns").join(name)
}
