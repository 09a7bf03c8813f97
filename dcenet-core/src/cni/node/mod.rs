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
//!                    (SCM_RIGHTS), where it can be opened; then NAME=VALUE with a zero byte behind each, and stdin
//! daemon -> plugin   "A" accepted, or "D" declined with a length u32 and a reason
//! plugin -> daemon   "G" go
//! daemon -> plugin   0 done or 1 failed, a length u32, what the plugin is to print
//! ```
//!
//! Nothing is done before `G`: until then either side can leave, and the plugin can serve the call itself. After it the
//! daemon finishes the call whether or not somebody waits, and a plugin that gets no reply does not know what was done: it
//! answers code 11, upon which runtimes call DEL. Both sides talk to root and to their own user only (SO_PEERCRED).
//!
//! The namespace comes as a descriptor to prove that its path means the same on both sides: a daemon that does not find
//! that very namespace there, for it has other mounts, declines.

mod client;
mod server;

use std::io;
use std::os::fd::AsFd;

use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;

pub(super) use self::client::{Outcome, pass};
pub use self::server::Server;

const MAGIC: [u8; 4] = *b"dcen";
/// Of what follows the magic.
const VERSION: u32 = 1;
const HEADER: usize = 16;
const ACCEPTED: u8 = b'A';
const DECLINED: u8 = b'D';
const GO: u8 = b'G';

/// What a plugin is told by its environment (CNI 1.1.0, section 2, "Parameters").
const VARIABLES: [&str; 7] =
    ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH", "CNI_NETNS_OVERRIDE"];

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
