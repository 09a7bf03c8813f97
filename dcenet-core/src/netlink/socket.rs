//! The socket: sends batches, matches replies, reports what the kernel said.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE};

use super::fault::{Gate, gate};
use super::message::{Attributes, Message, Received, field, number, split, text};

/// The netlink families in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Links, addresses, routes, rules, neighbours and traffic control.
    Route,
    /// Generic netlink: families found by name.
    Generic,
    /// nftables and connection tracking.
    Netfilter,
}

/// A synchronous netlink socket, for good bound to the network namespace of the thread that opened it.
///
/// Requests run inside the kernel while `send` is under way, so that a call blocks for as long as the kernel works and
/// no longer. Keep a socket for one operation, not longer: an open one keeps a dead pod's namespace alive.
#[derive(Debug)]
pub struct Socket {
    inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
    peek: bool,
}

/// A message that the kernel sent in reply to a request: an echo, or one object of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The message type, such as `RTM_NEWLINK`.
    pub kind: u16,
    /// What follows the netlink header: the family's fixed header and attributes.
    pub payload: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace. Use [`NetNs::socket`](crate::netns::NetNs::socket),
    /// which says in which.
    ///
    /// # Minimum kernel version
    /// 4.20 for strict checking of dump requests; before, filters of dumps are ignored by the kernel.
    pub(crate) fn open_here(family: Family) -> Result<Self, NetlinkError> {
        let protocol = match family {
            Family::Route => NETLINK_ROUTE,
            Family::Generic => NETLINK_GENERIC,
            Family::Netfilter => NETLINK_NETFILTER,
        };
        let open = || -> io::Result<netlink_sys::Socket> {
            let socket = netlink_sys::Socket::new(protocol)?;
            socket.set_ext_ack(true)?;
            socket.set_cap_ack(true)?;
            if let Err(error) = socket.set_netlink_get_strict_chk(true)
                && error.raw_os_error() != Some(libc::ENOPROTOOPT)
            {
                return Err(error);
            }
            Ok(socket)
        };
        let inner = open().map_err(|e| NetlinkError::new("open netlink socket", Failure::Socket(e)))?;
        Ok(Self { inner, sequence: 0, buffer: Vec::with_capacity(BUFFER), peek: false })
    }

    /// Sends one request and returns the messages that came before its acknowledgement.
    pub fn request(&mut self, message: &Message) -> Result<Vec<Reply>, NetlinkError> {
        self.batch(std::slice::from_ref(message)).pop().expect("one outcome for one message")
    }

    /// As [`request`](Self::request), for what has one reply, of any length: it is looked at before it is received, which
    /// costs one more system call. No acknowledgement is asked for: behind a reply that fills the socket the kernel would
    /// have to drop it (`netlink_attachskb` in net/netlink/af_netlink.c).
    pub fn request_large(&mut self, message: &Message) -> Result<Vec<Reply>, NetlinkError> {
        self.peek = true;
        let replies = self.request(message);
        self.peek = false;
        replies
    }

    /// Sends all requests at once and returns one outcome each, in order.
    ///
    /// The kernel does not stop at the first that fails: later ones are tried, and may fail because of it. The lowest
    /// failing one is the cause.
    pub fn batch(&mut self, messages: &[Message]) -> Vec<Result<Vec<Reply>, NetlinkError>> {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(messages.len() as u32);
        let mut bytes = Vec::with_capacity(messages.len() * 192);
        let mut outcomes: Vec<Pending> = Vec::with_capacity(messages.len());
        let mut die = false;
        for (sequence, message) in (first..).zip(messages) {
            let gate = gate(message.operation());
            die |= gate == Gate::DieAfter;
            outcomes.push(Pending { replies: Vec::new(), end: None, lose: gate == Gate::Lose });
            match gate {
                Gate::Fail(errno) => {
                    let refused = Failure::Refused { errno, message: Some("injected".into()), offset: None };
                    outcomes.last_mut().expect("just pushed").end = Some(Err(refused));
                }
                Gate::Pass | Gate::Lose | Gate::DieAfter => {
                    message.encode(sequence, if self.peek { 0 } else { libc::NLM_F_ACK as u16 }, &mut bytes);
                }
            }
        }
        if !bytes.is_empty() {
            self.exchange(first, &bytes, &mut outcomes);
        }
        if die {
            std::process::abort();
        }
        outcomes
            .into_iter()
            .zip(messages)
            .map(|(pending, message)| {
                let failure = match pending.end {
                    Some(Ok(())) if !pending.lose => return Ok(pending.replies),
                    Some(Err(failure)) => failure,
                    Some(Ok(())) | None => Failure::Lost,
                };
                Err(NetlinkError::new(message.operation(), failure))
            })
            .collect()
    }

    fn exchange(&mut self, first: u32, bytes: &[u8], outcomes: &mut [Pending]) {
        if let Err(error) = retry(|| self.inner.send(bytes, 0)) {
            // Nothing of a datagram that was not accepted reached the kernel's handlers.
            for pending in outcomes.iter_mut().filter(|p| p.end.is_none()) {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                pending.end = Some(Err(Failure::Refused { errno, message: None, offset: None }));
            }
            return;
        }
        let acknowledged = !self.peek;
        while outcomes.iter().any(|p| p.end.is_none()) {
            let received = self.receive(|message| {
                let slot = message.sequence.wrapping_sub(first) as usize;
                let Some(pending) = outcomes.get_mut(slot) else { return };
                match message.kind {
                    ERROR => pending.end = Some(acknowledgement(message)),
                    NOOP => {}
                    kind => {
                        pending.replies.push(Reply { kind, payload: message.payload.to_vec() });
                        if !acknowledged {
                            pending.end = Some(Ok(()));
                        }
                    }
                }
            });
            if let Err(failure) = received {
                tracing::warn!(error = %failure, "netlink replies lost");
                return;
            }
        }
    }

    /// Sends an nftables transaction, which takes place whole or not at all. `begin` and `end` are its frame.
    ///
    /// # Errors
    /// The first message that was refused, or `begin` where the transaction as such was.
    pub(crate) fn transact(
        &mut self,
        begin: &Message,
        messages: &[Message],
        end: &Message,
    ) -> Result<(), NetlinkError> {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(messages.len() as u32 + 2);
        let failed = |message: &Message, failure| Err(NetlinkError::new(message.operation(), failure));
        let gate = gate(begin.operation());
        if let Gate::Fail(errno) = gate {
            return failed(begin, Failure::Refused { errno, message: Some("injected".into()), offset: None });
        }
        let mut bytes = Vec::with_capacity(messages.len() * 192);
        begin.encode(first, 0, &mut bytes);
        // The kernel queues all answers before the first can be read: of success the last one tells, and refusals come
        // unasked, before it (`nfnetlink_rcv_batch` in `net/netfilter/nfnetlink.c`).
        let last = messages.len().saturating_sub(1);
        for (place, (sequence, message)) in (first.wrapping_add(1)..).zip(messages).enumerate() {
            let flags = if place == last { libc::NLM_F_ACK as u16 } else { 0 };
            message.encode(sequence, flags, &mut bytes);
        }
        // Which kernels acknowledge the frame differs (6.10), but a refusal of the whole comes by its beginning.
        end.encode(self.sequence, 0, &mut bytes);
        if let Err(error) = retry(|| self.inner.send(&bytes, 0)) {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            return failed(begin, Failure::Refused { errno, message: None, offset: None });
        }
        let mut whole = None;
        let mut outcomes: Vec<Option<Result<(), Failure>>> = messages.iter().map(|_| None).collect();
        let mut lost = gate == Gate::Lose;
        while whole.is_none() && outcomes.last().is_some_and(Option::is_none) {
            let received = self.receive(|message| {
                if message.kind != ERROR {
                    return;
                }
                match message.sequence.wrapping_sub(first) as usize {
                    0 => whole = acknowledgement(message).err(),
                    place => {
                        if let Some(outcome) = outcomes.get_mut(place - 1) {
                            *outcome = Some(acknowledgement(message));
                        }
                    }
                }
            });
            if let Err(failure) = received {
                tracing::warn!(error = %failure, "netlink replies lost");
                lost = true;
                break;
            }
        }
        if gate == Gate::DieAfter {
            std::process::abort();
        }
        if let Some(failure) = whole {
            return failed(begin, failure);
        }
        for (message, outcome) in messages.iter().zip(outcomes) {
            if let Some(Err(failure)) = outcome {
                return failed(message, failure);
            }
        }
        if lost { failed(begin, Failure::Lost) } else { Ok(()) }
    }

    /// Asks for all objects of a kind. `message` is a get request without `NLM_F_DUMP`, which is added.
    ///
    /// A dump that the kernel reports as interrupted by a change is repeated, a few times.
    ///
    /// # Errors
    /// [`Failure::Interrupted`] where it never came through whole; what the kernel refused otherwise.
    pub fn dump(&mut self, message: &Message) -> Result<Vec<Reply>, NetlinkError> {
        let failed = |failure| NetlinkError::new(message.operation(), failure);
        for _ in 0..DUMP_ATTEMPTS {
            match gate(message.operation()) {
                Gate::Pass => {}
                Gate::DieAfter => std::process::abort(),
                Gate::Lose => return Err(failed(Failure::Lost)),
                Gate::Fail(errno) => {
                    return Err(failed(Failure::Refused { errno, message: Some("injected".into()), offset: None }));
                }
            }
            match self.dump_once(message).map_err(failed)? {
                Dump::Whole(replies) => return Ok(replies),
                Dump::Interrupted => tracing::debug!(operation = message.operation(), "dump interrupted; repeated"),
            }
        }
        Err(failed(Failure::Interrupted { attempts: DUMP_ATTEMPTS }))
    }

    fn dump_once(&mut self, message: &Message) -> Result<Dump, Failure> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let mut bytes = Vec::new();
        message.encode(sequence, libc::NLM_F_DUMP as u16, &mut bytes);
        retry(|| self.inner.send(&bytes, 0)).map_err(Failure::Socket)?;
        let mut replies = Vec::new();
        let mut interrupted = false;
        let mut end = None;
        while end.is_none() {
            self.receive(|message| {
                if message.sequence != sequence {
                    return;
                }
                interrupted |= message.flags & DUMP_INTR != 0;
                match message.kind {
                    ERROR | DONE => end = Some(acknowledgement(message)),
                    NOOP => {}
                    kind => replies.push(Reply { kind, payload: message.payload.to_vec() }),
                }
            })?;
        }
        match end {
            Some(Err(failure)) => Err(failure),
            _ if interrupted => Ok(Dump::Interrupted),
            _ => Ok(Dump::Whole(replies)),
        }
    }

    /// Has the kernel send every change of a link in the namespace too (`RTNLGRP_LINK`).
    pub(super) fn hear_of_links(&mut self) -> Result<(), Failure> {
        self.inner.add_membership(RTNLGRP_LINK).map_err(Failure::Socket)
    }

    /// Has the kernel send every change of an IPv6 route too (`RTNLGRP_IPV6_ROUTE`).
    pub(super) fn hear_of_ipv6_routes(&mut self) -> Result<(), Failure> {
        self.inner.add_membership(RTNLGRP_IPV6_ROUTE).map_err(Failure::Socket)
    }

    /// Waits for the next changes and returns new and changed links and routes.
    pub(super) fn next_change(&mut self) -> Result<Vec<Reply>, Failure> {
        let mut changes = Vec::new();
        self.receive(|message| {
            if matches!(message.kind, libc::RTM_NEWLINK | libc::RTM_NEWROUTE) {
                changes.push(Reply { kind: message.kind, payload: message.payload.to_vec() });
            }
        })?;
        Ok(changes)
    }

    /// Has the kernel send changes of these kinds (`RTNLGRP_*`) to a socket that has sent nothing yet.
    pub(crate) fn hear_of(&mut self, groups: &[u32]) -> Result<(), NetlinkError> {
        let failed = |e| NetlinkError::new("listen to changes", Failure::Socket(e));
        // The first message sent would give it an address. Without one it is told nothing: 0 is whom the kernel leaves out
        // where it leaves out nobody (`do_one_broadcast` of `net/netlink/af_netlink.c`).
        self.inner.bind_auto().map_err(failed)?;
        groups.iter().try_for_each(|group| self.inner.add_membership(*group)).map_err(failed)
    }

    /// Waits for the next changes and returns them, of whatever kind; `None` where more happened than the socket holds.
    pub(crate) fn heard(&mut self) -> Result<Option<Vec<Reply>>, NetlinkError> {
        let mut changes = Vec::new();
        let received = self.receive(|message| {
            changes.push(Reply { kind: message.kind, payload: message.payload.to_vec() });
        });
        match received {
            Ok(()) => Ok(Some(changes)),
            Err(Failure::Socket(e)) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
            Err(failure) => Err(NetlinkError::new("listen to changes", failure)),
        }
    }

    /// Receives one datagram of the kernel and hands over its messages.
    fn receive(&mut self, mut each: impl FnMut(Received<'_>)) -> Result<(), Failure> {
        loop {
            self.buffer.clear();
            if self.peek {
                let look = libc::MSG_PEEK | libc::MSG_TRUNC;
                let (len, _) = retry(|| self.inner.recv_from(&mut self.buffer, look)).map_err(Failure::Socket)?;
                self.buffer.clear();
                self.buffer.reserve(len);
            }
            let (len, from) =
                retry(|| self.inner.recv_from(&mut self.buffer, libc::MSG_TRUNC)).map_err(Failure::Socket)?;
            if from.port_number() != 0 {
                continue;
            }
            if len > self.buffer.len() {
                return Err(Failure::Malformed("a datagram larger than the buffer"));
            }
            for message in split(&self.buffer) {
                each(message.map_err(Failure::Malformed)?);
            }
            return Ok(());
        }
    }
}

struct Pending {
    replies: Vec<Reply>,
    end: Option<Result<(), Failure>>,
    lose: bool,
}

enum Dump {
    Whole(Vec<Reply>),
    Interrupted,
}

/// Reads `NLMSG_ERROR` and `NLMSG_DONE`: an errno, and with `NETLINK_CAP_ACK` the header of the request, then the
/// extended acknowledgement's attributes.
pub(super) fn acknowledgement(message: Received<'_>) -> Result<(), Failure> {
    let errno = match field(message.payload, 0).map(i32::from_ne_bytes) {
        Some(errno) => errno,
        // The end of a dump may come without one.
        None if message.kind == DONE => 0,
        None => return Err(Failure::Malformed("an acknowledgement without its errno")),
    };
    if errno == 0 {
        return Ok(());
    }
    let skip = if message.kind == ERROR { 4 + 16 } else { 4 };
    let attributes = if message.flags & ACK_TLVS != 0 { message.payload.get(skip..) } else { None };
    let attributes = Attributes::new(attributes.unwrap_or_default());
    Err(Failure::Refused {
        errno: errno.wrapping_neg(),
        message: attributes.find(ERR_MSG).map(text),
        offset: attributes.find(ERR_OFFS).and_then(number),
    })
}

fn retry<R>(mut call: impl FnMut() -> io::Result<R>) -> io::Result<R> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// A request that failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation}: {failure}")]
pub struct NetlinkError {
    /// What was attempted, such as `add address 10.0.0.2/24 to eth0`.
    pub operation: String,
    /// How it failed.
    pub failure: Failure,
}

impl NetlinkError {
    pub(crate) fn new(operation: impl Into<String>, failure: Failure) -> Self {
        Self { operation: operation.into(), failure }
    }

    /// The kernel's errno, where it refused the request.
    pub fn errno(&self) -> Option<i32> {
        match &self.failure {
            Failure::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether the request may have taken effect all the same: its reply was not seen.
    pub fn may_have_happened(&self) -> bool {
        !matches!(self.failure, Failure::Refused { .. })
    }

    /// Whether the same request may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match &self.failure {
            Failure::Refused { errno, .. } => {
                // An Ethernet address is in use on a macvlan's parent until the last namespace that had it has ended.
                let in_use = *errno == libc::EADDRINUSE;
                in_use || matches!(*errno, libc::EBUSY | libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR)
            }
            Failure::Interrupted { .. } | Failure::Lost => true,
            Failure::Socket(_) | Failure::Malformed(_) => false,
        }
    }
}

/// How a request failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The kernel refused it.
    #[error("{}{}{}", io::Error::from_raw_os_error(*errno), Said(message.as_deref()), At(*offset))]
    Refused {
        /// The errno, positive.
        errno: i32,
        /// What the kernel says beside it (`NLMSGERR_ATTR_MSG`).
        message: Option<String>,
        /// The offset in the request of what it refuses (`NLMSGERR_ATTR_OFFS`), in bytes.
        offset: Option<u32>,
    },
    /// No reply was seen: it may or may not have happened.
    #[error("the reply was lost; whether it happened is unknown")]
    Lost,
    /// The state changed during every attempt to read it (`NLM_F_DUMP_INTR`).
    #[error("the state kept changing while it was read, {attempts} times")]
    Interrupted {
        /// How often it was tried.
        attempts: u32,
    },
    /// The socket itself failed.
    #[error("netlink socket: {0}")]
    Socket(#[source] io::Error),
    /// The reply is no netlink.
    #[error("malformed reply: {0}")]
    Malformed(&'static str),
}

struct Said<'a>(Option<&'a str>);

impl std::fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |text| write!(f, ": {text}"))
    }
}

struct At(Option<u32>);

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |offset| write!(f, " (at byte {offset} of the request)"))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// `RTNLGRP_LINK` of `include/uapi/linux/rtnetlink.h`.
const RTNLGRP_LINK: u32 = 1;
/// `RTNLGRP_IPV6_ROUTE`.
const RTNLGRP_IPV6_ROUTE: u32 = 11;
const NOOP: u16 = 1;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `NLM_F_DUMP_INTR`.
const DUMP_INTR: u16 = 0x10;
/// `NLM_F_ACK_TLVS`.
const ACK_TLVS: u16 = 0x200;
const ERR_MSG: u16 = 1;
const ERR_OFFS: u16 = 2;
const DUMP_ATTEMPTS: u32 = 10;
/// The kernel fills at most 32 KiB for one read of a dump (`netlink_dump` in `net/netlink/af_netlink.c`).
const BUFFER: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn received(payload: &[u8], flags: u16) -> Received<'_> {
        Received { kind: ERROR, flags, sequence: 1, payload }
    }

    #[test]
    fn a_refusal_carries_the_kernels_words_and_place() {
        let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
        payload.extend([0; 16]);
        payload.extend([12, 0, 1, 0]);
        payload.extend(b"no such\0");
        payload.extend([8, 0, 2, 0, 20, 0, 0, 0]);
        let error = NetlinkError::new("try", acknowledgement(received(&payload, ACK_TLVS)).unwrap_err());
        assert_eq!(error.errno(), Some(libc::EINVAL));
        let text = error.to_string();
        assert_eq!(text, "try: Invalid argument (os error 22): no such (at byte 20 of the request)");
        assert!(!error.may_have_happened() && !error.is_retryable());
        // Without the flag the bytes are the request's.
        let plain = NetlinkError::new("try", acknowledgement(received(&payload, 0)).unwrap_err());
        assert_eq!(plain.to_string(), "try: Invalid argument (os error 22)");
        acknowledgement(received(&[0; 4], 0)).unwrap();
    }

    #[test]
    fn what_is_no_acknowledgement_is_no_success() {
        assert!(acknowledgement(received(&[0; 3], 0)).is_err());
    }

    #[cfg(feature = "test-support")]
    proptest! {
        #[test]
        fn hostile_replies_are_read_without_a_panic(
            mut bytes in prop::collection::vec(any::<u8>(), 16..200),
            kind in prop::sample::select(vec![2u16, 3, 16, 20, 24, 28, 32]),
        ) {
            let len = bytes.len() as u32;
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            super::super::read_hostile(&bytes);
        }
    }
}
