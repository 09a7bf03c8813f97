//! The calling thread's network namespace.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use super::fault::gated;
use super::{SysError, done};

/// A number that no other network namespace has, or will have until the machine starts again.
///
/// # Minimum kernel version
/// 5.14 (`SO_NETNS_COOKIE`).
pub(crate) fn netns_cookie() -> Result<u64, SysError> {
    gated("getsockopt(SO_NETNS_COOKIE)", || {
        let socket = UnixDatagram::unbound()?;
        let mut cookie = 0_u64;
        let mut length = size_of::<u64>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to `cookie` and the length to `length`, both exclusively ours.
        done(unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        })?;
        if length as usize == size_of::<u64>() { Ok(cookie) } else { Err(io::ErrorKind::InvalidData.into()) }
    })
}

/// include/uapi/asm-generic/socket.h.
const SO_NETNS_COOKIE: libc::c_int = 71;
