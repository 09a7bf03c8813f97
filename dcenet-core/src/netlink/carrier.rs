//! Waiting for what the kernel does in its own time: acting on a link's carrier (`net/core/link_watch.c`), entering the
//! local route of an IPv6 address (`net/ipv6/addrconf.c`), bringing back a device.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::link::{HEADER, LinkView, link_by_name};
use super::message::Attributes;
use super::{Failure, NetlinkError, Reply, RouteView, Socket, route_to};
use crate::model::IfName;
use crate::sys;

/// Whether a `RTM_NEWLINK` payload tells of a link that transmits: its operational state is "up" (RFC 2863). The flags do
/// not tell: `IFF_LOWER_UP` is set before the kernel has acted, and `IFF_RUNNING` is too while the state is unknown.
pub(crate) fn is_operational(payload: &[u8]) -> bool {
    let state = payload.get(HEADER..).and_then(|a| Attributes::new(a).find(libc::IFLA_OPERSTATE));
    state == Some(&[IF_OPER_UP])
}

impl Socket {
    /// Waits until a link transmits, at most for `limit`, and returns whether it does. `listener` is another socket of the
    /// same namespace: before Linux 6.8 a change may carry the sequence of the request that brought it about
    /// (`rtmsg_ifinfo` in `net/core/rtnetlink.c`), and on one socket it would be lost among the replies.
    pub(crate) fn await_operational(
        &mut self,
        mut listener: Self,
        link: &IfName,
        limit: Duration,
    ) -> Result<bool, NetlinkError> {
        let failed = |failure| NetlinkError::new(format!("wait for the carrier of {link}"), failure);
        listener.hear_of_links().map_err(failed)?;
        let deadline = Instant::now() + limit;
        loop {
            // Asked after listening, so that nothing that happens in between is missed.
            let replies = self.request(&link_by_name(link))?;
            let Some(index) = replies.iter().find_map(|r| LinkView::parse(&r.payload)).map(|l| l.index) else {
                return Ok(false);
            };
            if replies.iter().any(|r| is_operational(&r.payload)) {
                return Ok(true);
            }
            // Asking again bounds the harm of a change that was not told.
            let again = deadline.min(Instant::now() + ASK_AGAIN);
            loop {
                let left = again.saturating_duration_since(Instant::now());
                if left.is_zero()
                    || !sys::wait_readable(listener.as_fd(), left).map_err(|e| failed(Failure::Socket(e)))?
                {
                    break;
                }
                match listener.next_change() {
                    Ok(changes) => {
                        let mut ours = changes
                            .iter()
                            .filter(|change| LinkView::parse(&change.payload).is_some_and(|view| view.index == index));
                        if ours.any(|Reply { payload, .. }| is_operational(payload)) {
                            return Ok(true);
                        }
                    }
                    // More happened than the socket holds.
                    Err(Failure::Socket(e)) if e.raw_os_error() == Some(libc::ENOBUFS) => break,
                    Err(failure) => return Err(failed(failure)),
                }
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
        }
    }
}

/// Whether a reply to [`route_to`] tells of an address of the namespace's own.
pub(crate) fn is_local_route(payload: &[u8]) -> bool {
    RouteView::parse(payload).is_some_and(|route| route.kind == libc::RTN_LOCAL)
}

impl Socket {
    /// Waits until the namespace takes an IPv6 address for its own, at most for `limit`, and returns whether it does. The
    /// socket hears of all routes from then on.
    pub(crate) fn await_local(&mut self, address: IpAddr, limit: Duration) -> Result<bool, NetlinkError> {
        let failed = |failure| NetlinkError::new(format!("wait for the local route of {address}"), failure);
        self.hear_of_ipv6_routes().map_err(failed)?;
        let deadline = Instant::now() + limit;
        let ours = |change: &Reply| {
            let route = RouteView::parse(&change.payload).filter(|_| change.kind == libc::RTM_NEWROUTE);
            route.is_some_and(|r| r.kind == libc::RTN_LOCAL && r.destination == address.into())
        };
        'ask: loop {
            // Asked after listening, so that nothing that happens in between is missed.
            match self.request(&route_to(address)) {
                Ok(replies) if replies.iter().any(|r| is_local_route(&r.payload)) => return Ok(true),
                Err(error) if error.errno().is_none_or(|e| !NO_ROUTE.contains(&e)) => return Err(error),
                _ => {}
            }
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() || !sys::wait_readable(self.as_fd(), left).map_err(|e| failed(Failure::Socket(e)))? {
                    return Ok(false);
                }
                match self.next_change() {
                    Ok(changes) if changes.iter().any(ours) => return Ok(true),
                    Ok(_) => {}
                    // More happened than the socket holds.
                    Err(Failure::Socket(e)) if e.raw_os_error() == Some(libc::ENOBUFS) => continue 'ask,
                    Err(failure) => return Err(failed(failure)),
                }
            }
        }
    }

    /// Waits until a link of the namespace is as `wanted` says, until `deadline`, and returns it. The socket hears of all
    /// links from then on.
    pub(crate) fn await_link(
        &mut self,
        deadline: Instant,
        wanted: impl Fn(&LinkView) -> bool,
    ) -> Result<Option<LinkView>, NetlinkError> {
        let failed = |failure| NetlinkError::new("wait for a link", failure);
        if deadline > Instant::now() {
            self.hear_of_links().map_err(failed)?;
        }
        loop {
            if let Some(link) = self.links()?.into_iter().find(&wanted) {
                return Ok(Some(link));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !sys::wait_readable(self.as_fd(), left).map_err(|e| failed(Failure::Socket(e)))? {
                return Ok(None);
            }
            match self.next_change() {
                Err(Failure::Socket(e)) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                other => drop(other.map_err(failed)?),
            }
        }
    }
}

/// Between two questions.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// What the kernel says where no route leads to an address.
pub(crate) const NO_ROUTE: &[i32] = &[libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EACCES];
/// `IF_OPER_UP` of `include/uapi/linux/if.h`.
const IF_OPER_UP: u8 = 6;
