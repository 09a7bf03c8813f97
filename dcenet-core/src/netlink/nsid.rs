//! The numbers by which a namespace knows others: `struct rtgenmsg` and `NETNSA_*` (`include/uapi/linux/net_namespace.h`,
//! `net/core/net_namespace.c`).

use std::os::fd::{AsFd, AsRawFd};

use super::message::{Attributes, Message, field};
use super::{NetlinkError, Socket};
use crate::netns::NetNs;

impl Socket {
    /// The number by which this socket's namespace knows another, as it is in [`LinkView::peer_netns`](super::LinkView);
    /// `None` where it has not met it.
    ///
    /// # Errors
    /// Where the kernel refuses.
    ///
    /// # Minimum kernel version
    /// 4.0.
    pub fn netns_number(&mut self, other: &NetNs) -> Result<Option<i32>, NetlinkError> {
        let mut message = Message::new(libc::RTM_GETNSID, 0, "ask for the number of a namespace", &[0; HEADER]);
        message.u32(NETNSA_FD, other.as_fd().as_raw_fd() as u32);
        let replies = self.request(&message)?;
        let number = |payload: &[u8]| {
            let number = Attributes::new(payload.get(HEADER..)?).find(NETNSA_NSID)?;
            field(number, 0).map(i32::from_ne_bytes)
        };
        let found = replies.iter().filter(|r| r.kind == libc::RTM_NEWNSID).find_map(|r| number(&r.payload));
        Ok(found.filter(|number| *number >= 0))
    }
}

/// `sizeof(struct rtgenmsg)`, with its padding.
const HEADER: usize = 4;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
