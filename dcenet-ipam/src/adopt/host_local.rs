//! The directory of `host-local` (containernetworking/plugins, `plugins/ipam/host-local/backend/disk`).
//!
//! ```text
//!   /var/lib/cni/networks/NAME/
//!     10.1.0.2            the container's id, CR LF, the interface's name
//!     fd00:1::2           the same; `_` instead of `:` where it was written on Windows
//!     last_reserved_ip.0  where the next search in the first set of ranges begins
//!     lock                locked by flock(2) during every call
//! ```
//! Files of versions before 0.8 hold the container's id alone: host-local itself takes them for any interface of the
//! container, and here they become [`Options::ifname`](super::Options::ifname). A file is empty where host-local was
//! killed between making and writing it; nobody knows its owner, and it is refused.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dcenet_core::model::{ContainerId, IfName};
use rustix::fs::{FlockOperation, flock};

use super::{Entry, Inventory, Origin, Owner, PassedOver, Source, SourceError, Unreadable};

/// The directory of one network.
#[derive(Debug, Clone)]
pub struct HostLocal {
    dir: PathBuf,
}

impl HostLocal {
    /// The directory of the network itself, such as `/var/lib/cni/networks/NAME`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }
}

impl Source for HostLocal {
    /// Holds the directory's lock for as long as it reads, shared, so that no entry is half written. ADD and DEL of
    /// host-local wait meanwhile.
    fn read(&self) -> Result<Inventory, SourceError> {
        let _lock = self.lock()?;
        let io = |doing: &str, path: &Path| {
            let doing = format!("{doing} {}", path.display());
            move |source| SourceError::Io { doing, source }
        };
        let mut files = Vec::new();
        for file in fs::read_dir(&self.dir).map_err(io("reading directory", &self.dir))? {
            files.push(file.map_err(io("reading directory", &self.dir))?.path());
        }
        files.sort();
        let mut inventory = Inventory::default();
        for path in files {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name == LOCK || name.starts_with(CURSOR) {
                let what = if name == LOCK { "the lock" } else { "where the next search begins" };
                inventory.passed_over.push(PassedOver { origin: Origin::new(path, ""), what: what.to_owned() });
                continue;
            }
            // Colons are not allowed in names of files on Windows.
            let address = name.replace('_', ":").parse::<IpAddr>().ok();
            let unreadable = |line, field: &str, reason: String| {
                let origin = Origin { file: path.clone(), line, field: field.to_owned() };
                Unreadable { origin, address, reason }
            };
            let Some(ip) = address else {
                let reason = format!("{name:?} is no address, and no file that host-local makes; move it away");
                inventory.unreadable.push(unreadable(None, "name", reason));
                continue;
            };
            match read_owner(&path) {
                Ok((container, ifname)) => {
                    let owner = Owner::Container { container, ifname, workload: None, node: None };
                    let origin = Origin::new(&path, "");
                    inventory.entries.push(Entry { address: ip, owner, origin });
                }
                Err(Fault::Io(source)) => return Err(io("reading", &path)(source)),
                Err(Fault::Bad { line, field, reason }) => {
                    inventory.unreadable.push(unreadable(line, field, reason));
                }
            }
        }
        Ok(inventory)
    }
}

impl HostLocal {
    fn lock(&self) -> Result<Option<File>, SourceError> {
        let path = self.dir.join(LOCK);
        let io = |source| SourceError::Io { doing: format!("locking {}", path.display()), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            // Nobody has leased yet, or somebody copied the entries alone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        let begun = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => return Ok(Some(file)),
                Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(SourceError::Busy { file: path, limit: PATIENCE }),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io(error.into())),
            }
        }
    }
}

enum Fault {
    Io(io::Error),
    Bad { line: Option<usize>, field: &'static str, reason: String },
}

/// Who has the address, as a file tells.
fn read_owner(path: &Path) -> Result<(ContainerId, Option<IfName>), Fault> {
    let bad = |line, field, reason: String| Fault::Bad { line, field, reason };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Fault::Io)?;
    if file.metadata().map_err(Fault::Io)?.is_dir() {
        return Err(bad(None, "", "is a directory; move it away".to_owned()));
    }
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(Fault::Io)?;
    if bytes.len() as u64 > LONGEST {
        return Err(bad(None, "", format!("is longer than {LONGEST} bytes, which no container id and interface are")));
    }
    let text = std::str::from_utf8(&bytes).map_err(|e| bad(None, "", format!("is no text: {e}")))?.trim();
    if text.is_empty() {
        let reason = "is empty: host-local was killed when it had made the file, and nobody knows the owner; remove \
                      the file once nothing answers for the address";
        return Err(bad(None, "container", reason.to_owned()));
    }
    let mut lines = text.lines();
    let container = lines.next().unwrap_or_default().trim_end();
    let container = container.parse().map_err(|e: dcenet_core::model::ParseError| {
        bad(Some(1), "container", format!("{e}; remove the file if it is not host-local's"))
    })?;
    let ifname = match lines.next() {
        None => None,
        Some(name) => Some(
            name.trim_end()
                .parse()
                .map_err(|e: dcenet_core::model::ParseError| bad(Some(2), "ifname", e.to_string()))?,
        ),
    };
    match lines.next() {
        None => Ok((container, ifname)),
        Some(_) => Err(bad(Some(3), "", "has more than a container and an interface".to_owned())),
    }
}

const LOCK: &str = "lock";
const CURSOR: &str = "last_reserved_ip.";
/// A container id has up to 253 bytes here, an interface 15.
const LONGEST: u64 = 1024;
/// How long is waited for the lock. A call of host-local with 65,000 addresses takes a second.
const PATIENCE: Duration = Duration::from_secs(10);
