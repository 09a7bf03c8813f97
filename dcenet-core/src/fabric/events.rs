//! What changes on the host behind the fabric's back.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::reconcile::is_fabric_mac;
use crate::netlink::{
    FABRIC_PROTOCOL, Failure, Family, ForwardingView, NeighbourView, NetlinkError, Reply, RouteView, Socket,
};
use crate::netns::{Host, NetNsError};
use crate::sys;

/// Hears of changes that may make what the fabric has entered wrong: links, addresses, routes that others make, and the
/// fabric's own entries going.
#[derive(Debug)]
pub struct KernelEvents {
    socket: Socket,
}

impl KernelEvents {
    /// Hears of everything from now on. It keeps the namespace alive.
    ///
    /// # Errors
    /// Where there can be no socket.
    pub fn listen(host: &Host) -> Result<Self, NetNsError> {
        let mut socket = host.0.socket(Family::Route)?;
        socket.hear_of(&GROUPS)?;
        Ok(Self { socket })
    }

    /// Waits until something of that happens, at most `limit`, and tells whether it did. Zero looks without waiting.
    ///
    /// # Errors
    /// Where the socket fails.
    pub fn wait(&mut self, limit: Duration) -> Result<bool, NetlinkError> {
        let failed = |e| NetlinkError { operation: "listen to changes".into(), failure: Failure::Socket(e) };
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !sys::wait_readable(self.socket.as_fd(), left).map_err(failed)? {
                return Ok(false);
            }
            // What was lost may have been anything.
            if self.socket.heard()?.is_none_or(|heard| heard.iter().any(matters)) {
                return Ok(true);
            }
        }
    }
}

fn matters(Reply { kind, payload }: &Reply) -> bool {
    match *kind {
        libc::RTM_NEWLINK | libc::RTM_DELLINK | libc::RTM_NEWADDR | libc::RTM_DELADDR => true,
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => RouteView::parse(payload).is_some_and(|route| {
            // Routes of single pods come and go; they lead nowhere else.
            let single = route.destination.prefix_len() == route.destination.max_prefix_len();
            match route.protocol {
                FABRIC_PROTOCOL => *kind == libc::RTM_DELROUTE,
                _ => route.table == u32::from(libc::RT_TABLE_MAIN) && !single,
            }
        }),
        libc::RTM_DELNEIGH => {
            let ours = |n: NeighbourView| n.protocol == FABRIC_PROTOCOL;
            NeighbourView::parse(payload).is_some_and(ours)
                || ForwardingView::parse(payload).is_some_and(|entry| is_fabric_mac(entry.mac))
        }
        _ => false,
    }
}

/// `RTNLGRP_LINK`, `_NEIGH`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV6_IFADDR` and `_IPV6_ROUTE` of
/// `include/uapi/linux/rtnetlink.h`.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];
