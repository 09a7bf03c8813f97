//! A node's daemon that serves the calls of its plugins: many share one open store and its flushes (thick mode).
//!
//! A configuration says where the daemon listens: `"daemon": "/run/dcenet/dcenetd.sock"`. The plugin then hands the call
//! over and prints what comes back; where nobody takes it, it serves the call itself, as long as that is right beside a
//! daemon ([`Backends::stands_alone`](super::Backends::stands_alone)). Whoever embeds a [`Server`] gives it
//! [`Backends`](super::Backends) of its own.
//!
//! # Protocol
//! One call for each connection of a Unix stream socket; numbers are in network order:
//!
//! ```text
//! plugin -> daemon   "dcen", version u32, length of environment u32, length of stdin u32; with it the pod's namespace
//!                    (SCM_RIGHTS), where it can be opened; then NAME=VALUE with a zero byte behind each, and stdin.
//!                    Names are those of CNI, TRACEPARENT, and DCENET_HOST, DCENET_STATE_DIR and DCENET_RUN_DIR: the host's network
//!                    namespace and the two directories, as DEVICE:INODE, or empty where there is no such directory; and likewise
//!                    DCENET_ALLOW_LIST, of an ADD: the list of settings that the node allows
//! daemon -> plugin   "A" accepted, or "D" declined with a length u32 and a reason
//! plugin -> daemon   "G" go
//! daemon -> plugin   0 done or 1 failed, a length u32, what the plugin is to print
//! ```
//!
//! Nothing is done before `G`: until then either side can leave, and the plugin can serve the call itself. A plugin that
//! gets no reply after it does not know what was done: it answers code 11, upon which runtimes call DEL. Calls about one
//! container's interface are served in the order in which they came; one whose turn does not come in time fails with code
//! 11. An ADD whose plugin has left when its turn comes and nobody else holds the attachment is given up; every other call
//! is finished, whether or not somebody waits. A plugin that shuts down one direction has left. Both sides talk to root and
//! to their own user only (SO_PEERCRED).
//!
//! The pod's namespace comes as a descriptor to prove that its path means the same on both sides. A daemon that does not
//! find that very namespace there, for it has other mounts, declines; so does one that is in another network namespace
//! than the plugin, or for which the two directories are others, and of an ADD with settings, or for several networks, one
//! for which the list of settings is another: without it everything would be allowed.

mod client;
mod queue;
mod server;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;

pub(super) use self::client::{Outcome, pass};
pub use self::server::Server;
use super::NetConf;

const MAGIC: [u8; 4] = *b"dcen";
/// Of what follows the magic.
const VERSION: u32 = 2;
const HEADER: usize = 16;
const ACCEPTED: u8 = b'A';
const DECLINED: u8 = b'D';
const GO: u8 = b'G';

/// What a plugin is told by its environment (CNI 1.1.0, section 2, "Parameters"), and of which request the call is a part (W3C
/// Trace Context). A daemon leaves out what it does not know.
const VARIABLES: [&str; 8] = [
    "CNI_COMMAND",
    "CNI_CONTAINERID",
    "CNI_NETNS",
    "CNI_IFNAME",
    "CNI_ARGS",
    "CNI_PATH",
    "CNI_NETNS_OVERRIDE",
    "TRACEPARENT",
];

/// What the plugin adds of its own.
const SHARED: [&str; 3] = ["DCENET_HOST", "DCENET_STATE_DIR", "DCENET_RUN_DIR"];

/// The list of settings that the node allows, which only an ADD asks.
const ALLOWED: &str = "DCENET_ALLOW_LIST";

/// What must mean the same on both sides beside the pod's namespace: the name of its variable, its path, and what is
/// wrong where it differs.
fn shared(conf: &NetConf) -> [(&'static str, &Path, &'static str); 3] {
    const MOUNTS: &str = "run it with the host's mounts";
    let [host, state, run] = SHARED;
    [
        (host, Path::new("/proc/thread-self/ns/net"), "run it in the host's network namespace"),
        (state, &conf.state_dir, MOUNTS),
        (run, &conf.run_dir, MOUNTS),
    ]
}

/// What is at a path: `DEVICE:INODE`, or nothing.
fn identity(path: &Path) -> io::Result<String> {
    match path.metadata() {
        Ok(found) => Ok(format!("{}:{}", found.dev(), found.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// Fails unless the other end is root or our own user.
fn check_peer(socket: impl AsFd) -> io::Result<()> {
    let peer = socket_peercred(socket)?.uid;
    if peer.is_root() || peer == geteuid() {
        return Ok(());
    }
    let reason = format!("the other end is user {}, neither root nor our own", peer.as_raw());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn length(bytes: &[u8]) -> io::Result<[u8; 4]> {
    u32::try_from(bytes.len()).map(u32::to_be_bytes).map_err(io::Error::other)
}
