//! Devices that come, go and change, as the kernel tells udev (`lib/kobject_uevent.c`).

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use netlink_sys::SocketAddr;
use netlink_sys::protocols::NETLINK_KOBJECT_UEVENT;

use super::{Failure, NetlinkError};
use crate::netns::{NetNs, NetNsError};
use crate::sys;

/// Hears of every device of the machine. What it is about is not read: look at the devices themselves.
#[derive(Debug)]
pub struct Uevents {
    inner: netlink_sys::Socket,
}

impl Uevents {
    /// Begins to listen, in a network namespace of the first user namespace: others hear of network devices of their own
    /// only (Linux 4.18).
    ///
    /// # Errors
    /// Where the namespace cannot be entered or no socket be opened.
    pub fn listen(netns: &NetNs) -> Result<Self, NetNsError> {
        let open = || -> io::Result<netlink_sys::Socket> {
            let mut socket = netlink_sys::Socket::new(NETLINK_KOBJECT_UEVENT)?;
            // The group to which the kernel sends; udevd sends to another.
            socket.bind(&SocketAddr::new(0, 1))?;
            Ok(socket)
        };
        let inner = netns.run_here_or_there(open)?;
        let inner = inner.map_err(|e| NetlinkError::new("listen for device events", Failure::Socket(e)))?;
        Ok(Self { inner })
    }

    /// Waits for an event, at most for `limit`, and returns whether there was one since the last call.
    pub fn wait(&mut self, limit: Duration) -> Result<bool, NetlinkError> {
        let failed = |error| NetlinkError::new("wait for device events", Failure::Socket(error));
        if !sys::wait_readable(self.inner.as_fd(), limit).map_err(failed)? {
            return Ok(false);
        }
        // All that came: they are one change to whoever looks.
        let mut event = Vec::with_capacity(16 << 10);
        loop {
            event.clear();
            match self.inner.recv(&mut event, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // More came than the socket holds.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }
}
