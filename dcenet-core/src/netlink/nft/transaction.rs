//! Changes of tables, each decided on the state that it changes.

use super::{Found, begin, element_dump, end, generation, get_generation};
use crate::netlink::{Failure, Message, NetlinkError, Socket};

/// Makes the changes that `decide` finds necessary, all or none, on the state on which it decided. Of those who change
/// something at once one succeeds, so that all do after as many rounds as they are.
pub(crate) fn change<E: From<NetlinkError>>(
    socket: &mut Socket,
    what: &str,
    mut decide: impl FnMut(&mut Socket) -> Result<Vec<Message>, E>,
) -> Result<(), E> {
    for _ in 0..ATTEMPTS {
        let reply = socket.request(&get_generation())?;
        let Some(generation) = reply.iter().find_map(|reply| generation(&reply.payload)) else {
            let failure = Failure::Malformed("a generation of nftables without its number");
            return Err(NetlinkError::new(what, failure).into());
        };
        let messages = decide(socket)?;
        if messages.is_empty() {
            return Ok(());
        }
        match socket.transact(&begin(generation, what), &messages, &end()) {
            Err(error) if error.errno() == Some(libc::ERESTART) => tracing::debug!(what, "nftables changed; again"),
            done => return Ok(done?),
        }
    }
    Err(NetlinkError::new(what, Failure::Interrupted { attempts: ATTEMPTS }).into())
}

/// The elements of a set; none where there is no such set or table.
pub(crate) fn list(socket: &mut Socket, table: &str, set: &str) -> Result<Vec<Found>, NetlinkError> {
    match socket.dump(&element_dump(table, set)) {
        Ok(replies) => Ok(replies.iter().flat_map(|reply| Found::parse(&reply.payload)).collect()),
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether the kernel answers so for want of the subsystem: without nfnetlink, and without what it leads to
/// (`nfnetlink_rcv_msg` in `net/netfilter/nfnetlink.c`).
pub(crate) fn lacks_subsystem(error: &NetlinkError) -> bool {
    let errno = match &error.failure {
        Failure::Socket(source) => source.raw_os_error(),
        _ => error.errno(),
    };
    matches!(errno, Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOENT))
}

const ATTEMPTS: u32 = 200;

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_kernel_without_nftables_is_told_from_one_that_refuses() {
        let refused = |errno| NetlinkError::new("x", Failure::Refused { errno, message: None, offset: None });
        let unopened = |errno| NetlinkError::new("x", Failure::Socket(io::Error::from_raw_os_error(errno)));
        for errno in [libc::EINVAL, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT, libc::ENOENT] {
            assert!(lacks_subsystem(&refused(errno)) && lacks_subsystem(&unopened(errno)), "{errno}");
        }
        for errno in [libc::EPERM, libc::ENOBUFS, libc::EMFILE] {
            assert!(!lacks_subsystem(&refused(errno)) && !lacks_subsystem(&unopened(errno)), "{errno}");
        }
        assert!(!lacks_subsystem(&NetlinkError::new("x", Failure::Lost)));
    }
}
