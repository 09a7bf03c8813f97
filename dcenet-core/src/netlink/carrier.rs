//! Whether the kernel has acted on a link's carrier (`net/core/link_watch.c`).

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::link::{HEADER, LinkView, link_by_name};
use super::message::Attributes;
use super::{Failure, NetlinkError, Reply, Socket};
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

/// Between two questions.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// `IF_OPER_UP` of `include/uapi/linux/if.h`.
const IF_OPER_UP: u8 = 6;
